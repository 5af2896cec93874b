"""SimSiam's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed import run

FAKE_OFFICIAL = """
import torch

class SimSiam(torch.nn.Module):
    def __init__(self, base_encoder, dim, pred_dim):
        super().__init__()
        self.encoder, self.predictor = base_encoder(num_classes=dim, zero_init_residual=True), torch.nn.Linear(dim, dim)

    def forward(self, x1, x2):
        z1, z2 = self.encoder(x1), self.encoder(x2)
        return self.predictor(z1), self.predictor(z2), z1.detach(), z2.detach()
"""


def test_speed_compares_whole_steps_and_pipelines(tmp_path: Path) -> None:
    (tmp_path / "checkout" / "simsiam").mkdir(parents=True)
    (tmp_path / "checkout" / "simsiam" / "builder.py").write_text(FAKE_OFFICIAL)
    out = tmp_path / "results"
    arguments = ["simsiam", "--model", "tiny", "--batch", "4", "--repeats", "2", "--warmup", "1", "--out", str(out)]
    assert run.main([*arguments, "--official", str(tmp_path / "checkout")]) == 0
    record = json.loads((out / "simsiam_tiny_float32_b4_cpu_t1.json").read_text())
    assert [row["name"] for row in record["step"]["contenders"]][:2] == ["zoo", "official"]
    assert [row["name"] for row in record["data"]["contenders"]] == ["zoo", "official"]
    assert record["step"]["work"]["flops"] > 0
