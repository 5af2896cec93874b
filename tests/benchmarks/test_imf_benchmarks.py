"""iMF's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import run


@pytest.mark.parametrize("model", ["trunk_tiny", "step_tiny"])
def test_speed_compares_whole_steps(tmp_path: Path, model: str) -> None:
    arguments = ["imf", "--model", model, "--batch", "4", "--repeats", "1", "--warmup", "1", "--out", str(tmp_path)]
    assert run.main([*arguments, "--only", "step"]) == 0
    record = json.loads((tmp_path / f"imf_{model}_float32_b4_cpu_t1.json").read_text())["step"]
    assert record["contenders"][0]["name"] == "zoo"
    assert model == "trunk_tiny" or record["contenders"][1]["name"] == "whole batches"
    assert record["work"]["flops"] > 0
