"""The speed of from-scratch Mask R-CNN beside its peers, tried in a tiny form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import run


def test_speed_compares_whole_steps(tmp_path: Path) -> None:
    few = ["--batch", "1", "--repeats", "1", "--warmup", "0", "--only", "step"]
    arguments = ["rethinking_pretraining", "--model", "tiny", *few]
    assert run.main([*arguments, "--out", str(tmp_path / "results")]) == 0
    record = json.loads((tmp_path / "results" / "rethinking_pretraining_tiny_float32_b1_cpu_t1.json").read_text())[
        "step"
    ]
    assert [row["name"] for row in record["contenders"]] == ["zoo", "torchvision"]
    assert record["work"]["flops"] > 1e9
    assert record["contenders"][0]["last_loss"] == pytest.approx(record["contenders"][1]["last_loss"], rel=0.2)
    assert run.main([*arguments, "--official", str(tmp_path)]) == 2  # no checkout of detectron2
