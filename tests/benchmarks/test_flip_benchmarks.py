"""FLIP's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import flip as speed
from benchmarks.speed import harness, run


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
