"""The official implementations' numbers, replayed on ours: the package's cases and those of ZOO_PARITY_CASES."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo import parity
from zoo.command.cli import main
from zoo.errors import ZooError

CASES = parity.find_cases()


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_case(path: Path) -> None:
    verdicts = parity.run_case(parity.load(path))
    assert verdicts
    bad = [f"{verdict.output}: {verdict.note}" for verdict in verdicts if not verdict.ok]
    assert not bad, "\n".join(bad)


def test_no_public_case_is_missing(shared: Path) -> None:
    ours = {(case["paper"], case["case"]) for case in map(parity.load, CASES)}
    papers = {paper for paper, _ in ours}
    published = [parity.load(path) for paper in papers for path in (shared / "parity" / paper).glob("*.json")]
    assert {(case["paper"], case["case"]) for case in published} <= ours


def test_float32_agrees_too() -> None:
    verdicts = parity.run_case(parity.load(_case("pretrain_norm_pix")), dtype="float32")
    assert all(verdict.ok for verdict in verdicts)


def test_a_wrong_number_is_found(tmp_path: Path) -> None:
    case = parity.load(_case("pretrain_norm_pix"))
    case["outputs"]["loss"]["mean"] *= 1 + 1e-4
    case["outputs"]["nothing"] = case["outputs"]["mask"]
    (tmp_path / "wrong.json").write_text(json.dumps(case))
    notes = {v.output: v.note for v in parity.run_cases("mae", [tmp_path]) if not v.ok}
    assert notes.keys() == {"loss", "nothing"}
    assert notes["loss"].startswith("mean differs by")
    assert notes["nothing"] == "not computed"


def test_a_failing_case_is_a_verdict_and_not_a_crash() -> None:
    case = parity.load(_case("pretrain_norm_pix"))
    case["state"]["stray.weight"] = {"shape": [2], "rule": "normal"}
    verdicts = parity.run_case(case)
    assert {verdict.ok for verdict in verdicts} == {False}
    assert "stray.weight" in verdicts[0].note


def test_cases_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = parity.load(_case("lr_schedule"))
    (tmp_path / "further").mkdir()
    (tmp_path / "further" / "more.json").write_text(json.dumps(case))
    (tmp_path / "further" / "other_paper.json").write_text(json.dumps({**case, "paper": "unheard_of"}))
    monkeypatch.setenv("ZOO_PARITY_CASES", str(tmp_path))
    assert {path.name for path in parity.find_cases()} - {path.name for path in CASES} == {"more.json"}
    monkeypatch.setenv("ZOO_PARITY_CASES", str(tmp_path / "absent"))
    with pytest.raises(ZooError, match="absent"):
        parity.find_cases()


def test_unknown_paper_and_dtype_are_named() -> None:
    with pytest.raises(ZooError, match="did you mean 'mae'"):
        parity.run_cases("maee")
    with pytest.raises(ZooError, match="float32"):
        parity.run_case(parity.load(_case("lr_schedule")), dtype="float23")


def test_a_case_whose_optional_package_is_missing_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _case("unet_small")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    verdicts = parity.run_case(parity.load(path))
    assert {verdict.ok for verdict in verdicts} == {None}
    monkeypatch.setattr(parity, "run_cases", lambda *args, **options: verdicts)
    assert main(["parity", "varc"]) == 0
    shown = capsys.readouterr().out
    assert "skipped" in shown
    assert "pip install 'paperzoo[beyond]'" in shown


def test_fill_is_a_pure_function_of_the_name() -> None:
    spec = {"shape": [2, 3, 4], "rule": "fan_in"}
    a, b = parity.fill("a.weight", spec), parity.fill("a.weight", spec)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, parity.fill("b.weight", spec))
    normal = parity.fill("a.weight", {**spec, "rule": "normal"})
    np.testing.assert_allclose(a * np.sqrt(12), normal)
    assert parity.fill("x", {"rule": "keep"}) is None
    assert parity.fill("n", {"shape": [5], "rule": "randint:2:4"}).tolist() <= [3] * 5
    with pytest.raises(ZooError, match="normal"):
        parity.fill("x", {"shape": [1], "rule": "normall"})


def test_digest_compares_shape_and_values() -> None:
    x = torch.arange(40.0).reshape(5, 8)
    assert parity.compare(parity.digest(x), x) is None
    assert parity.compare(parity.digest(x), x.T).startswith("shape")
    assert parity.compare(parity.digest(x), x + 1).startswith("mean")
    assert parity.compare(parity.digest(x), x.flip(0)).startswith("probe")


def _case(name: str) -> Path:
    return next(path for path in CASES if path.stem == name)
