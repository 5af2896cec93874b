"""uEDM's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed import run

NETWORKS = """
import torch

class EDMPrecond(torch.nn.Module):
    def __init__(self, img_resolution, img_channels, model_type, model_channels, augment_dim, **sizes):
        super().__init__()
        self.layer = torch.nn.Conv2d(img_channels, img_channels, 1)
        self.label = torch.nn.Linear(augment_dim, 1)

    def forward(self, x, labels, augment_labels):
        return self.layer(x) + self.label(augment_labels)[:, :, None, None]
"""
LOSS = """
class EDMLoss:
    def __call__(self, net, images, labels, augment_pipe):
        x, augment = augment_pipe(images)
        return (net(x, labels, augment_labels=augment) - x) ** 2
"""


def test_speed_compares_whole_steps(tmp_path: Path) -> None:
    package = tmp_path / "edm" / "training"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "networks.py").write_text(NETWORKS)
    (package / "loss.py").write_text(LOSS)
    out = tmp_path / "results"
    words = ["uedm", "--model", "tiny", "--batch", "2", "--repeats", "1", "--warmup", "1", "--out", str(out)]
    assert run.main([*words, "--only", "step", "--official", str(tmp_path / "edm")]) == 0
    record = json.loads((out / "uedm_tiny_float32_b2_cpu_t1.json").read_text())
    names = [row["name"] for row in record["step"]["contenders"]]
    assert names[:2] == ["zoo", "edm"]
    assert record["step"]["work"]["flops"] > 0
    assert run.main([*words, "--only", "step", "--official", str(out)]) == 2
