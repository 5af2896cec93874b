"""l-DAE's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed import run

MODELS = """
import torch

class DiT(torch.nn.Module):
    def __init__(self, input_size, patch_size, hidden_size, depth, num_heads, in_channels, num_classes, learn_sigma):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 1)
"""
DIFFUSION = """
class create_diffusion:
    num_timesteps = 1000

    def __init__(self, respacing, learn_sigma):
        assert not learn_sigma

    def training_losses(self, model, x, t, options):
        assert len(options["y"]) == len(x) == len(t)
        return {"loss": (model.layer(x) - x).square().flatten(1).mean(1)}
"""


def test_speed_compares_whole_steps(tmp_path: Path) -> None:
    checkout, out = tmp_path / "DiT", tmp_path / "results"
    (checkout / "diffusion").mkdir(parents=True)
    (checkout / "diffusion" / "__init__.py").write_text("from .gaussian_diffusion import create_diffusion")
    (checkout / "diffusion" / "gaussian_diffusion.py").write_text(DIFFUSION)
    (checkout / "models.py").write_text(MODELS)
    sizes = ["--model", "tiny", "--batch", "4", "--repeats", "1", "--warmup", "1", "--out", str(out)]
    arguments = ["l_dae", *sizes, "--only", "step", "--official"]
    assert run.main([*arguments, str(checkout)]) == 0
    record = json.loads((out / "l_dae_tiny_float32_b4_cpu_t1.json").read_text())
    assert [row["name"] for row in record["step"]["contenders"]][:2] == ["zoo", "DiT"]
    assert record["step"]["work"]["flops"] > 0
    assert run.main([*arguments, str(out)]) == 2
