"""The speed of ViTDet's backbone beside its peers, tried in a tiny form."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed import run


def test_speed_compares_whole_steps_and_inference(tmp_path: Path) -> None:
    arguments = ["vitdet", "--model", "tiny", "--batch", "1", "--repeats", "1", "--warmup", "0"]
    for only, name in (("step", "b1"), ("sample", "b1_sample")):
        assert run.main([*arguments, "--only", only, "--out", str(tmp_path)]) == 0
        record = json.loads((tmp_path / f"vitdet_tiny_float32_{name}_cpu_t1.json").read_text())[only]
        assert record["contenders"][0]["name"] == "zoo"
    assert run.main([*arguments, "--official", str(tmp_path)]) == 2  # no checkout of detectron2
