"""Leaderboard rows as commands: options, weights, run folders, verdicts and one's own results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import zoo
from tests.command.test_cli import CONFIG
from zoo import catalog
from zoo.command import verdict
from zoo.command.cli import main
from zoo.command.reading import run_name

ROW: dict[str, Any] = {"dataset": "toy", "metric": "top1", "model": "tiny", "where": "Table 1", "recipe": "toy.yaml"}
CARD: dict[str, Any] = {
    "slug": "toys",
    "field": "selfsup",
    "title": "Toys",
    "authors": ["A. Uthor"],
    "year": 2026,
    "summary": "A test's paper.",
    "models": [{"name": "tiny", "params": 9}],
    "weights": [
        {
            "name": "tiny.a",
            "urls": ["https://example.org/a.pth"],
            "licence": "MIT",
            "kind": "full",
            "preprocess": {"size": 64},
        }
    ],
    "leaderboard": [
        {**ROW, "id": "short", "value": 1.0, "logged": "100 - 100 * test/loss", "tolerance": 200.0}
        | {"options": {"model.optim": {"name": "sgd"}, "model.optim.base_lr": 0.5, "trainer.max_epochs": 1}},
        {**ROW, "id": "three", "value": 4.0, "logged": "test/loss", "weights": "tiny.a"}
        | {"options": {"model.num_classes": 3, "data.length": 8}},
        {**ROW, "id": "bare", "value": None, "recipe": None},
        {**ROW, "id": "first", "value": 5.0, "then": "toys:three", "options": {"trainer.max_epochs": 1}},
    ],
}
CODE = """
import torch
def tiny(num_classes=3): return torch.nn.ModuleDict({"layer": torch.nn.Linear(2, num_classes)})
def convert_official(state): return {key.removeprefix("official."): value for key, value in state.items()}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe, and a paper of one's own with rows of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "toy.yaml").write_text("# A toy.\n" + yaml.safe_dump(CONFIG))
    (tmp_path / "own" / "toys.yaml").write_text(yaml.safe_dump(CARD, sort_keys=False))
    (tmp_path / "own" / "toys.py").write_text(CODE)
    monkeypatch.setenv("ZOO_PAPERS", str(tmp_path / "own"))
    return tmp_path


def test_a_row_is_its_recipe_with_its_options_and_the_command_line_wins(here: Path) -> None:
    module, _, trainer = zoo.load_recipe("toys:short")
    assert (module.optim.name, module.optim.base_lr, trainer.max_epochs) == ("sgd", 0.5, 1)
    module, data, trainer = zoo.load_recipe("toys:three", {"trainer.max_epochs": 7})
    assert (module.num_classes, data.length, trainer.max_epochs) == (3, 8, 7)
    assert run_name("toys:three") == "toys/three"


def test_fit_resume_and_test_a_row(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "toys:short"]) == 0
    (run,) = (here / "runs" / "toys" / "short").iterdir()
    assert (run / "config.yaml").read_text().startswith("# recipe: toys:short\n")
    capsys.readouterr()
    assert main(["test", "toys:short", "--ckpt_path", "last"]) == 0
    out = capsys.readouterr().out
    record = json.loads(max((here / "runs").rglob("result.json"), key=lambda p: p.stat().st_mtime_ns).read_text())
    loss = record["metrics"]["test/loss"]
    assert record["verdict"]["measured"] == pytest.approx(100 - 100 * loss)
    assert record["verdict"]["verdict"] == "within tolerance"
    assert "verdict: toys:short top1: within tolerance" in out
    assert len(record["weights"]["sha256"]) == 64
    assert {"torch", "lightning", "zoo"} <= record["versions"].keys()
    # The settings of the run that is taken up count as those of the command line.
    assert main(["fit", "toys:short", "--data.length", "12"]) == 0
    for words, said in (
        (["--ckpt_path", "last"], "none: --data.length changes"),
        (["-c", "extra.yaml"], "none: --c changes"),
    ):
        (here / "extra.yaml").write_text("data: {init_args: {length: 12}}")
        assert main(["test", "toys:short", *words]) == 0
        assert said in capsys.readouterr().out
    for path in (here / "runs").rglob("result.json"):
        if "--data.length" in path.read_text() or "extra" in path.read_text():
            path.unlink()
    for at, odd in enumerate(("{}", "7", '"toys:short"', '{"row": "toys:short"}', '{"row": 7, "verdict": 1}')):
        (here / "runs" / str(at)).mkdir()
        (here / "runs" / str(at) / "result.json").write_text('{"verdict": %s}' % odd)  # noqa: UP031
    # The user's own result stands beside the published one.
    assert main(["leaderboard", "toys", "--results", "runs", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert [entry["measured"] for entry in rows["short"]["results"]] == [record["verdict"]["measured"]]
    assert rows["three"]["results"] == []
    assert rows["three"]["command"] == "zoo test toys:three"
    assert main(["leaderboard", "toys", "--results", "runs", "--markdown", "board.md"]) == 0
    assert "within tolerance" in (here / "board.md").read_text()
    assert main(["leaderboard", "--results", "nowhere"]) == 2
    assert main(["leaderboard", "toys", "--markdown", "."]) == 2


def test_a_row_is_tested_with_its_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strictly: every entry of the network, in the official layout or ours; a checkpoint of one's own goes before."""
    state = {"layer.weight": torch.zeros(3, 2), "layer.bias": torch.full((3,), 2.0)}
    save_file({f"official.{key}": value for key, value in state.items()}, here / "good.safetensors")
    save_file({"official.layer.weight": state["layer.weight"]}, here / "half.safetensors")
    assert main(["test", "toys:three", "--weights", "good.safetensors"]) == 0
    assert "toys:three top1: within tolerance (measured 4, published 4" in capsys.readouterr().out
    assert main(["test", "toys:three", "--weights=good.safetensors", "--data.length=4"]) == 0
    assert "none: --data.length changes the row's protocol" in capsys.readouterr().out
    for words, line in (
        (["test", "toys:three", "--weights", "half.safetensors"], "1 missing (layer.bias)"),
        (["test", "toys:three", "--weights", "none.pth"], "none.pth"),
        (["fit", "toys:three", "--weights", "good.safetensors"], "model.init_from"),
        (["test", "toys:three", "--weights"], "--weights wants"),
        (["fit", "toys:bare"], "has no recipe"),
        (["fit", "toys:shirt"], "did you mean 'toys:short'?"),
        (["show", "toys:shirt"], "did you mean 'toys:short'?"),
        (["fit", "tois:short"], "did you mean 'toys'?"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert line in err.splitlines()[-1]


def test_weights_for_other_pictures_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.data import LatentDataModule
    from zoo.weights.pretrained import load_published

    class Data:
        image_size = 224
        eval_transform = torch.nn.Identity()

    with pytest.raises(zoo.ZooError, match=r"tiny\.a expects pictures of image_size 64; the recipe's data give 224"):
        load_published(torch.nn.Linear(1, 1), "tiny.a", catalog.paper("toys"), Data())
    Data.image_size, Data.eval_transform.size = 64, 96  # what evaluation sees counts, not what training does
    with pytest.raises(zoo.ZooError, match="expects pictures of image_size 64; the recipe's data give 96"):
        load_published(torch.nn.Linear(1, 1), "tiny.a", catalog.paper("toys"), Data())
    latents = LatentDataModule("none", image_size=8, num_classes=3)  # their side is not the pictures'
    monkeypatch.setattr("zoo.weights.pretrained.fetch_weights", {}.__getitem__)
    with pytest.raises(KeyError, match="tiny"):  # fetched
        load_published(torch.nn.Linear(1, 1), "tiny.a", catalog.paper("toys"), latents)


def test_a_first_stage_says_what_comes_then(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "toys:first"]) == 0
    assert "then zoo fit toys:three --model.init_from CHECKPOINT\n" in capsys.readouterr().out
    assert main(["fit", "toys:first"]) == 0
    assert "second stage: then zoo fit toys:three --model.init_from runs/toys/first/" in capsys.readouterr().out


def test_show_a_row(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "toys:three"]) == 0
    out = capsys.readouterr().out
    assert "zoo test toys:three\n" in out
    assert "zoo fit toy.yaml --model.num_classes=3 --data.length=8\n" in out
    assert main(["show", "toys:bare"]) == 0
    assert "no recipe" in capsys.readouterr().out
    for words in (["__complete", "fit", "toys:th"], ["__complete", "test", "toys", ":", "th"]):
        assert main(words) == 0
    assert capsys.readouterr().out.split() == ["toys:three", "three"]


@pytest.mark.parametrize(
    ("change", "metrics", "expected"),
    [
        ({"metric": "top1", "unit": "%"}, {"test/top1": 0.502}, (50.2, "within tolerance")),
        ({"metric": "top1", "unit": "%"}, {"test/top1": 0.51}, (51.0, "better")),
        ({"metric": "error", "unit": "%", "higher_is_better": False}, {"test/top1": 0.49}, (51.0, "worse")),
        ({"metric": "fid", "higher_is_better": False}, {"test/fid": 48.5}, (48.5, "better")),
        ({"metric": "fid"}, {"test/fid": 50.9}, (50.9, "within tolerance")),
        ({"metric": "box/AP", "unit": "%", "tolerance": 3.0}, {"test/box/AP": 47.5}, (47.5, "within tolerance")),
        ({"metric": "x"}, {"test/y": 1.0}, (None, "none: the test logged no x")),
        ({"value": None}, {"test/top1": 0.5}, (50.0, "none: no value was published")),
        ({}, {"test/top1": float("nan")}, (pytest.approx(float("nan"), nan_ok=True), "none: the test logged nan")),
    ],
)
def test_verdicts(
    change: dict[str, Any], metrics: dict[str, float], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"id": "a", "value": 50.0, **{**ROW, "recipe": None}, **change}
    monkeypatch.setattr(catalog, "row", lambda name: (None, catalog.Row(**facts)))
    found = verdict.verdict("p:a", metrics, ["--data.num_workers=2", "--ckpt_path", "last"])
    assert (found["measured"], found["verdict"]) == (pytest.approx(expected[0], nan_ok=True), expected[1])
    assert found["verdict"] in verdict.verdict_line(found)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"options": {"model.x": 1}, "recipe": None}, "options and weights are of a recipe"),
        ({"options": {"--model.x": 1}}, "options"),
        ({"weights": "tiny.b"}, "'tiny.b' is none of the card's weights"),
        ({"logged": "a + b + c"}, "logged"),
        ({"tolerance": 0}, "tolerance"),
        ({"id": "../x"}, "id"),
    ],
)
def test_wrong_rows_are_one_line(here: Path, change: dict[str, Any], line: str) -> None:
    card = {**CARD, "leaderboard": [{**ROW, "id": "a", "value": 1.0, **change}]}
    (here / "own" / "toys.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(zoo.ZooError, match=line):
        catalog.paper("toys")
