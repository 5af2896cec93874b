"""MoCo's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.speed import run

FAKE_OFFICIAL = """
import torch

class MoCo(torch.nn.Module):
    def __init__(self, base_encoder, dim, K, m, T, mlp):
        super().__init__()
        self.encoder_q = base_encoder(num_classes=dim)

    def forward(self, im_q, im_k):
        assert torch.distributed.get_world_size() == 1
        labels = torch.zeros(len(im_q), dtype=torch.long).cuda()
        return self.encoder_q(im_q) + self.encoder_q(im_k), labels
"""


def test_speed_compares_whole_steps_and_pipelines(tmp_path: Path) -> None:
    (tmp_path / "checkout" / "moco").mkdir(parents=True)
    (tmp_path / "checkout" / "moco" / "builder.py").write_text(FAKE_OFFICIAL)
    out, cuda = tmp_path / "results", torch.Tensor.cuda
    arguments = ["moco", "--model", "tiny", "--batch", "4", "--repeats", "2", "--warmup", "1", "--out", str(out)]
    try:
        assert run.main([*arguments, "--official", str(tmp_path / "checkout")]) == 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert torch.Tensor.cuda is cuda
    record = json.loads((out / "moco_tiny_float32_b4_cpu_t1.json").read_text())
    assert [row["name"] for row in record["step"]["contenders"]][:2] == ["zoo", "official"]
    assert [row["name"] for row in record["data"]["contenders"]] == ["zoo", "official"]
    assert record["step"]["work"]["flops"] > 0
    assert "tokens/s" not in (out / "RESULTS.md").read_text()
    assert run.main([*arguments, "--only", "step", "--official", str(tmp_path)]) == 2
