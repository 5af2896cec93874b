"""Pixel MeanFlow's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.speed import run

FAKE = """
import torch

class pmfDiT_tiny(torch.nn.Module):
    def __init__(self, eval_mode):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x, t, h, w, t_min, t_max, y):
        return self.layer(x), x
"""


@pytest.mark.parametrize("model", ["trunk_tiny", "sample_tiny"])
def test_speed_compares_steps_and_samplers(tmp_path: Path, model: str) -> None:
    (tmp_path / "official" / "models").mkdir(parents=True)
    (tmp_path / "official" / "models" / "pmfDiT.py").write_text(FAKE)
    (tmp_path / "official" / "pmf.py").write_text("from models import pmfDiT")
    out = tmp_path / "results"
    arguments = ["pmf", "--model", model, "--batch", "2", "--repeats", "1", "--warmup", "1", "--out", str(out)]
    assert run.main([*arguments, "--only", "step", "--official", str(tmp_path / "official")]) == 0
    record = json.loads((out / f"pmf_{model}_float32_b2_cpu_t1.json").read_text())
    names = [row["name"] for row in record["step"]["contenders"]]
    peers = ["torch.optim.Muon"] * hasattr(torch.optim, "Muon") if model == "trunk_tiny" else ["official"]
    assert names == ["zoo", *peers]
    assert record["step"]["work"]["flops"] > 0
