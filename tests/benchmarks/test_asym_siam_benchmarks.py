"""Asym-Siam's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from benchmarks.speed import run

FAKE_OFFICIAL = """
import torch

class MoCo(torch.nn.Module):
    def __init__(self, base_encoder, dim, K, m, T):
        super().__init__()
        self.encoder_q = base_encoder(num_classes=dim)

    def forward(self, im_q, im_q_mini, im_k):
        assert (len(im_q), len(im_q_mini), len(im_k)) == (1, 2, 2)
        logits = [self.encoder_q(image) for image in im_q + im_q_mini]
        return logits, [torch.zeros(len(one), dtype=torch.long).cuda() for one in logits]
"""


def test_speed_compares_whole_steps_and_pipelines(tmp_path: Path) -> None:
    (tmp_path / "checkout" / "moco").mkdir(parents=True)
    (tmp_path / "checkout" / "moco" / "builder.py").write_text(FAKE_OFFICIAL)
    out = tmp_path / "results"
    arguments = ["asym_siam", "--model", "tiny", "--batch", "4", "--repeats", "2", "--warmup", "1", "--out", str(out)]
    try:
        assert run.main([*arguments, "--official", str(tmp_path / "checkout")]) == 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    record = json.loads((out / "asym_siam_tiny_float32_b4_cpu_t1.json").read_text())
    assert [row["name"] for row in record["step"]["contenders"]] == ["zoo", "official"]
    assert [row["name"] for row in record["data"]["contenders"]] == ["zoo", "official"]
    assert record["step"]["work"]["flops"] > 0
