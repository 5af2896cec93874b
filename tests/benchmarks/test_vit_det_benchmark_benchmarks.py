"""The speed of the ViT benchmark's backbone beside its peers, tried in a tiny form."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed import run


def test_speed_compares_whole_steps(tmp_path: Path) -> None:
    arguments = ["vit_det_benchmark", "--model", "tiny", "--batch", "1", "--repeats", "1", "--warmup", "0"]
    arguments += ["--only", "step", "--out", str(tmp_path / "results")]
    assert run.main(arguments) == 0
    record = json.loads((tmp_path / "results" / "vit_det_benchmark_tiny_float32_b1_cpu_t1.json").read_text())["step"]
    assert [row["name"] for row in record["contenders"]] == ["zoo", "timm"]
    assert record["work"]["flops"] > 1e9
    assert record["work"]["tokens"] == 16
    assert run.main([*arguments, "--official", str(tmp_path)]) == 2  # no checkout of MIMDet
