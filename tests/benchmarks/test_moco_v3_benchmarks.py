"""MoCo v3's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed import run
from tests.processes import in_processes

FAKE_VITS = """
import torch
from timm.models.layers.helpers import to_2tuple
from timm.models.vision_transformer import VisionTransformer

def vit_small(num_classes, stop_grad_conv1, **sizes):
    assert to_2tuple(VisionTransformer.num_tokens) == (1, 1) and stop_grad_conv1
    return VisionTransformer(num_classes=num_classes, **sizes)
"""
FAKE_BUILDER = """
import torch

class MoCo_ViT(torch.nn.Module):
    def __init__(self, base_encoder, dim, mlp_dim, T):
        super().__init__()
        self.base_encoder = base_encoder(num_classes=dim)

    def forward(self, x1, x2, m):
        torch.distributed.get_rank()
        return (self.base_encoder(x1) * self.base_encoder(x2.cuda())).mean()
"""


def test_speed_compares_whole_steps_and_pipelines(tmp_path: Path) -> None:
    (tmp_path / "checkout" / "moco").mkdir(parents=True)
    (tmp_path / "checkout" / "moco" / "builder.py").write_text(FAKE_BUILDER)
    (tmp_path / "checkout" / "vits.py").write_text(FAKE_VITS)
    out = tmp_path / "results"
    arguments = ["moco_v3", "--model", "tiny", "--batch", "4", "--repeats", "2", "--warmup", "1", "--out", str(out)]
    # In a process of its own: gloo's threads, once begun, do not live on in processes that later tests fork.
    assert in_processes(1, run.main, [*arguments, "--official", str(tmp_path / "checkout")]) == [0]
    record = json.loads((out / "moco_v3_tiny_float32_b4_cpu_t1.json").read_text())
    assert [row["name"] for row in record["step"]["contenders"]][:2] == ["zoo", "official"]
    assert [row["name"] for row in record["data"]["contenders"]] == ["zoo", "official"]
    assert record["step"]["work"]["flops"] > 0
