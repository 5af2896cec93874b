"""MeanFlow's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import run

FAKE_DIT = """
import torch

class DiT(torch.nn.Module):
    def __init__(self, input_size, patch_size, hidden_size, depth, num_heads, learn_sigma):
        super().__init__()
        assert not learn_sigma
        self.layer = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x, t, y):
        return self.layer(x) * t[:, None, None, None]
"""


@pytest.mark.parametrize("model", ["tiny", "tiny_unet"])
def test_speed_compares_whole_steps(tmp_path: Path, model: str) -> None:
    checkout = tmp_path / "official" / "DiT"
    (checkout / "diffusion").mkdir(parents=True)
    (checkout / "diffusion" / "gaussian_diffusion.py").touch()
    (checkout / "models.py").write_text(FAKE_DIT)
    out = tmp_path / "results"
    arguments = ["meanflow", "--model", model, "--batch", "4", "--repeats", "1", "--warmup", "1", "--out", str(out)]
    assert run.main([*arguments, "--only", "step", "--official", str(tmp_path / "official")]) == 0
    record = json.loads((out / f"meanflow_{model}_float32_b4_cpu_t1.json").read_text())
    names = [row["name"] for row in record["step"]["contenders"]]
    assert names[:2] == (["zoo", "DiT"] if model == "tiny" else ["zoo"])
    assert record["step"]["work"]["flops"] > 0
    assert run.main([*arguments, "--only", "step", "--official", str(out)]) == 2
