"""FLIP's claim and its speed comparison run and say what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.claims import flip as claim
from benchmarks.speed import flip as speed
from benchmarks.speed import harness, run


def test_claim_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "flip.json"
    arguments = ["--quick", "--data", "shapes", "--seeds", "2", "--work", str(tmp_path), "--out", str(out)]
    assert claim.main(arguments) == 0
    record = json.loads(out.read_text())
    assert set(record["arms"]) == set(claim.ARMS)
    assert len(record["claims"]) == 4
    assert [record["arms"][arm]["encoder_tokens"][0] for arm in claim.ARMS] == [65, 33, 17]
    for arm in record["arms"].values():
        assert all(0 <= value <= 1 for value in arm["top1"] + arm["tuned_top1"])

    def never(*arguments: object) -> None:
        raise AssertionError("a finished part is not computed again")

    monkeypatch.setattr(claim, "run_arm", never)
    assert claim.main(arguments) == 0


def test_arms_see_the_same_number_of_encoder_tokens() -> None:
    settings = claim.Settings()
    tokens = [settings.steps(ratio) * settings.encoder_tokens(ratio) for ratio in claim.ARMS.values()]
    assert max(tokens) / min(tokens) < 1.005


def test_speed_beside_open_clip(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("webdataset")
    out = tmp_path / "results"
    arguments = ["flip", "--model", "tiny", "--batch", "2", "--repeats", "1", "--warmup", "0", "--out", str(out)]
    assert run.main(arguments) == 0
    (path,) = out.glob("*.json")
    record = json.loads(path.read_text())
    assert [row["name"] for row in record["step"]["contenders"]] == ["zoo", "open_clip", "open_clip, fused AdamW"]
    assert [row["name"] for row in record["data"]["contenders"]] == ["zoo", "open_clip"]
    assert "training step, tiny" in (out / "RESULTS.md").read_text()


def test_contenders_do_the_same_work() -> None:
    pytest.importorskip("open_clip")
    work = speed.work(harness.Setting(model="flip_base_patch16", batch=2))
    flops, parameters = (list(work.detail[key].values()) for key in ("flops", "parameters"))
    assert work.tokens == 2 * (99 + 32)
    assert max(flops) / min(flops) < 1.05
    assert max(parameters) / min(parameters) < 1.01
