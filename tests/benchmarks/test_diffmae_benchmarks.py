"""DiffMAE's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed import run

FAKE_CHECKOUT = """
import torch

class MaskedAutoencoderViT(torch.nn.Module):
    def __init__(self, weight_fm, self_attn, norm_pix_loss, mlp_ratio, norm_layer, **sizes):
        super().__init__()
        print("its settings")
        self.layer = torch.nn.Linear(sizes["img_size"], sizes["embed_dim"])

    def forward_encoder(self, images, mask_ratio):
        return self.layer(images), mask_ratio, None, None

    def forward_decoder(self, images, latent, mask, ids_restore, places, mask_ratio):
        assert mask == mask_ratio == 0.75
        return latent, None

    def forward_loss(self, images, predicted, mask, places):
        return predicted.square().mean()
"""


def test_speed_compares_steps(tmp_path: Path) -> None:
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "models_cross.py").write_text(FAKE_CHECKOUT)
    out = tmp_path / "results"
    arguments = ["diffmae", "--model", "tiny", "--batch", "2", "--repeats", "2", "--warmup", "1", "--only", "step"]
    assert run.main([*arguments, "--out", str(out), "--official", str(tmp_path / "checkout")]) == 0
    record = json.loads((out / "diffmae_tiny_float32_b2_cpu_t1.json").read_text())
    assert [row["name"] for row in record["step"]["contenders"]] == ["zoo", "zoo, MAE", "kimdanni/DiffMAE"]
    assert record["step"]["work"]["flops"] > 0
