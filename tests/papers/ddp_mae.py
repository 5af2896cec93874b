"""Run by test_ddp.py in one or two processes: a few MAE steps on pinned samples, and an exact test metric.

`python -m tests.papers.ddp_mae fit DEVICES OUT` writes the weights after four optimiser steps; `... metric DEVICES
OUT` the classifier's test metrics over a set whose length no number of processes divides.
"""

from __future__ import annotations

import json
import sys

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.selfsup.mae import MAEFineTuning, MAEPretraining
from zoo.training import Optim

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
GLOBAL_BATCH, STEPS = 8, 4


class Pinned(Dataset):
    """Samples, labels and mask noise that depend on the index alone."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        draw = torch.Generator().manual_seed(index)
        return {
            "image": torch.randn(3, 16, 16, generator=draw, dtype=torch.float64),
            "mask_noise": torch.rand(16, generator=draw, dtype=torch.float64),
            "label": int(torch.randint(0, 5, (), generator=draw)),
        }


class Strided(Sampler):
    """Every `world`-th index from `rank` on: the union of the ranks' k-th batches is one process's k-th batch."""

    def __init__(self, length: int, rank: int, world: int) -> None:
        self.indices = range(rank, length, world)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class Data(L.LightningDataModule):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def _loader(self) -> DataLoader:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        data = Pinned(self.length)
        return DataLoader(data, GLOBAL_BATCH // world, sampler=Strided(len(data), rank, world))

    train_dataloader = test_dataloader = _loader


def run(what: str, devices: int, out: str) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if what == "fit":
        optim = Optim(name="adamw", base_lr=1e-2, weight_decay=0.05, betas=(0.9, 0.95))
        module = MAEPretraining(**TINY, **DECODER, optim=optim)
        trainer.fit(module, Data(GLOBAL_BATCH * STEPS))
        if trainer.is_global_zero:
            torch.save({k: v for k, v in module.state_dict().items() if v.is_floating_point()}, out)
    else:
        module = MAEFineTuning(**TINY, num_classes=5, optim=Optim())
        (metrics,) = trainer.test(module, Data(37), verbose=False)
        if trainer.is_global_zero:
            with open(out, "w") as file:
                json.dump(metrics, file)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3])
