"""Run by test_mask_rcnn.py: a small Mask R-CNN in two processes under Lightning's DDP, and what that must be.

`python -m tests.papers.ddp_mask_rcnn fit 2 OUT` trains a few steps, one image a process, and writes each rank's
weights to OUT.0 and OUT.1. `... replay 2 OUT` computes the same in one process: losses of each image apart,
gradients averaged.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset

from zoo.detection.mask_rcnn import MaskRCNNDetection
from zoo.training import Optim

STEPS, LR = 3, 1e-3
SMALL: dict[str, Any] = {
    "num_classes": 3,
    "resnet": {"depth": 18, "stem_channels": 8, "channels": 8, "norm": "frozen_bn"},
    "fpn": {"channels": 8},
    "rpn": {"sizes": ((8,), (16,), (32,), (48,), (64,)), "pre_nms": (60, 60), "post_nms": (40, 20), "samples": 32},
    "roi": {"samples": 16},
    "box": {"fc_channels": 16},
    "mask": {"convs": 1, "channels": 8},
}


class Pinned(Dataset):
    """Images with 1 + index % 2 objects, and the draws of their samples."""

    def __init__(self, first: int, length: int) -> None:
        self.first, self.length = first, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        index += self.first
        draw = torch.Generator().manual_seed(index)
        corner = torch.rand(1 + index % 2, 2, generator=draw, dtype=torch.float64) * 24
        boxes = torch.cat([corner, corner + 20 + 10 * torch.rand(corner.shape, generator=draw)], dim=1)
        masks = torch.rand(len(boxes), 64, 64, generator=draw) > 0.5
        return {
            "image": 0.3 * torch.randn(1, 3, 64, 64, generator=draw, dtype=torch.float64),
            "size": torch.tensor([[64, 64]]),
            "target": [{"boxes": boxes, "labels": torch.arange(len(boxes)), "masks": masks}],
            "noise": torch.rand(3000, generator=draw, dtype=torch.float64),
        }


class Data(L.LightningDataModule):
    batch_size = 1

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Pinned(self.trainer.global_rank * STEPS, STEPS), batch_size=None)


def task() -> MaskRCNNDetection:
    L.seed_everything(0, verbose=False)
    optim = Optim(name="sgd", lr=LR, weight_decay=0.01, no_decay="norm", schedule="constant")
    return MaskRCNNDetection(model=None, **SMALL, optim=optim).double()


def fit(devices: int, out: str) -> None:
    module = task()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, Data())
    torch.save(module.network.state_dict(), f"{out}.{trainer.global_rank}")


def replay(devices: int, out: str) -> None:
    network = task().network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, 0.9, weight_decay=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(devices):
            batch = Pinned(rank * STEPS, STEPS)[step]
            (torch.stack(list(network(batch, batch["noise"]).values())).sum() / devices).backward()
        optimizer.step()
    torch.save(network.state_dict(), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"fit": fit, "replay": replay}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
