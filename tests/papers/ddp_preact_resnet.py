"""Run by test_preact_resnet.py in one or two processes: SGD on pinned micro-batches, two to an update.

Two processes take one micro-batch each, one process takes both in turn: batch statistics are those of a micro-batch in
either case, and so the updates must agree. `python -m tests.papers.ddp_preact_resnet DEVICES OUT` writes the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.recognition.preact_resnet import PreActResNetClassification
from zoo.training import Optim

MICRO, UPDATES = 4, 4


class Pinned(Dataset):
    """Samples that depend on the index alone."""

    def __len__(self) -> int:
        return 2 * MICRO * UPDATES

    def __getitem__(self, index: int) -> dict:
        draw = torch.Generator().manual_seed(index)
        return {"image": torch.randn(3, 8, 8, generator=draw, dtype=torch.float64), "label": index % 5}


class Share(Sampler):
    """The micro-batches rank, rank + world, rank + 2 * world, ..."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[int]:
        for first in range(self.rank * MICRO, 2 * MICRO * UPDATES, self.world * MICRO):
            yield from range(first, first + MICRO)

    def __len__(self) -> int:
        return 2 * MICRO * UPDATES // self.world


class Data(L.LightningDataModule):
    batch_size = MICRO

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Pinned(), MICRO, sampler=Share(self.trainer.global_rank, self.trainer.world_size))


def run(devices: int, out: str) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    optim = Optim(
        name="sgd",
        lr=0.1,
        nesterov=True,
        weight_decay=1e-2,
        no_decay="none",
        schedule="constant",
        global_batch=2 * MICRO,
    )
    module = PreActResNetClassification(None, depth=8, widths=[4, 8, 16], num_classes=5, optim=optim)
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
    trainer.fit(module, Data())
    if trainer.is_global_zero:
        assert trainer.global_step == UPDATES
        torch.save(dict(module.network.named_parameters()), out)


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
