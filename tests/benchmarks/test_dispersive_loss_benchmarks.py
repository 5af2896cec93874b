"""Dispersive loss's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed import run

MODELS = """
import torch

class SiT(torch.nn.Module):
    def __init__(self, input_size, patch_size, hidden_size, depth, num_heads, in_channels, num_classes):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 1)
"""
TRANSPORT = """
import torchdiffeq

class Transport:
    def disp_loss(self, z):
        return z.flatten(1).pow(2).mean().cuda()

    def training_losses(self, model, x, options):
        assert options["return_act"] and len(options["y"]) == len(x)
        return {"loss": (model.layer(x) - x).flatten(1).mean(1) + self.disp_loss(x)}
"""


def test_speed_compares_whole_steps(tmp_path: Path) -> None:
    checkout = tmp_path / "official" / "DispLoss"
    (checkout / "transport").mkdir(parents=True)
    (checkout / "transport" / "__init__.py").write_text("from .transport import Transport as create_transport")
    (checkout / "transport" / "transport.py").write_text(TRANSPORT)
    (checkout / "models.py").write_text(MODELS)
    out = tmp_path / "results"
    arguments = [
        "dispersive_loss",
        "--model",
        "tiny",
        "--batch",
        "4",
        "--repeats",
        "1",
        "--warmup",
        "1",
        "--out",
        str(out),
    ]
    assert run.main([*arguments, "--only", "step", "--official", str(tmp_path / "official")]) == 0
    record = json.loads((out / "dispersive_loss_tiny_float32_b4_cpu_t1.json").read_text())
    names = [row["name"] for row in record["step"]["contenders"]]
    assert names[:2] == ["zoo", "DispLoss"]
    assert record["step"]["work"]["flops"] > 0
    assert run.main([*arguments, "--only", "step", "--official", str(out)]) == 2
