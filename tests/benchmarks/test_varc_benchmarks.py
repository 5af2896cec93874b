"""VARC's speed comparison runs and says what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.speed import run

FAKE_VIT = """
import torch
from utils.helper import COLORS

class ARCViT(torch.nn.Module):
    def __init__(self, num_tasks, image_size, num_colors, embed_dim, depth, num_heads, mlp_dim):
        super().__init__()
        self.inner = torch.nn.Embedding(COLORS, num_colors)

    def forward(self, canvas, task, attention_mask):
        assert attention_mask.shape == canvas.shape
        return self.inner(canvas).permute(0, 3, 1, 2)
"""
FAKE_LOADER = """
import torch

class ARCDataset:
    def __init__(self, folder, split, subset, max_size):
        self.size = max_size
        assert list((folder / "data" / split).glob("*.json"))

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"inputs": torch.zeros(self.size, self.size)}

def collate_fn(batch):
    return {"inputs": torch.stack([item["inputs"] for item in batch])}
"""


def test_speed_compares_with_the_official_code(tmp_path: Path) -> None:
    for name, text in (
        ("src/ARC_ViT.py", FAKE_VIT),
        ("src/ARC_loader.py", FAKE_LOADER),
        ("utils/helper.py", "COLORS = 12"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    out = tmp_path / "results"
    arguments = ["varc", "--model", "tiny", "--batch", "2", "--repeats", "1", "--warmup", "0", "--out", str(out)]
    assert run.main([*arguments, "--official", str(tmp_path)]) == 0
    record = json.loads((out / "varc_tiny_float32_b2_cpu_t1.json").read_text())
    for section in ("step", "data"):
        assert [row["name"] for row in record[section]["contenders"]] == ["zoo", "official"]
    assert record["step"]["work"]["flops"] > 0
    assert "varc: tasks to canvases of 64" in (out / "RESULTS.md").read_text()
    assert not {name for name in sys.modules if name.partition(".")[0] in ("src", "utils")}
    assert run.main([*arguments, "--only", "data"]) == 2
