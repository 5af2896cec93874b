"""The speed of PointRend, tried in a tiny form without its peer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import run


@pytest.mark.parametrize("section", ["step", "sample"])
def test_speed_times_whole_steps_and_inference(section: str, tmp_path: Path) -> None:
    arguments = ["pointrend", "--model", "tiny", "--batch", "1", "--repeats", "1", "--warmup", "0", "--only"]
    assert run.main([*arguments, section, "--out", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").glob("*.json")
    record = json.loads(file.read_text())[section]
    assert [row["name"] for row in record["contenders"]] == ["zoo"]
    if section == "step":
        assert record["work"]["flops"] > 1e9
    assert run.main([*arguments, section, "--official", str(tmp_path)]) == 2  # no checkout of detectron2
