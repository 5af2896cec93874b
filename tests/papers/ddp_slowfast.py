"""Run by test_slowfast.py in one or two processes: SlowFast on pinned micro-batches, two to an update, then the
precise statistics of batch normalisation, then validation on the views of videos that the processes share unevenly.

Two processes take one micro-batch each, one process takes both in turn: batch statistics are those of a micro-batch
in either case, so that weights, precise statistics and scores must agree. `python -m tests.papers.ddp_slowfast
DEVICES OUT` writes them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.training import Optim, PreciseBN
from zoo.video.slowfast import SlowFastClassification

MICRO, UPDATES, VIDEOS, VIEWS, CLASSES = 2, 3, 5, 3, 4


class Pinned(Dataset):
    """Clips that depend on the index alone."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        draw = torch.Generator().manual_seed(index)
        video = index // VIEWS
        return {
            "video": torch.randn(3, 8, 32, 32, generator=draw, dtype=torch.float64),
            "label": video % CLASSES,
            "video_id": video,
            "view": index % VIEWS,
        }


class Share(Sampler):
    """The micro-batches rank, rank + world, rank + 2 * world, ..."""

    def __init__(self, rank: int, world: int, length: int, micro: int) -> None:
        self.order = [
            i for first in range(rank * micro, length, world * micro) for i in range(first, min(first + micro, length))
        ]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class Data(L.LightningDataModule):
    batch_size = MICRO

    def _loader(self, length: int, micro: int) -> DataLoader:
        share = Share(self.trainer.global_rank, self.trainer.world_size, length, micro)
        return DataLoader(Pinned(length), micro, sampler=share)

    def train_dataloader(self) -> DataLoader:
        return self._loader(2 * MICRO * UPDATES, MICRO)

    def val_dataloader(self) -> DataLoader:
        return self._loader(VIDEOS * VIEWS, 4)  # two processes get 8 and 7 views


def run(devices: int, out: str) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    optim = Optim(
        name="sgd",
        lr=0.05,
        nesterov=True,
        weight_decay=1e-2,
        no_decay="norm",
        schedule="constant",
        global_batch=2 * MICRO,
    )
    small = {"depth": 18, "width": 8, "alpha": 4, "beta_inv": 4, "num_frames": 8, "crop_size": 32, "dropout": 0.0}
    module = SlowFastClassification(None, **small, num_classes=CLASSES, optim=optim)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        precision="64-true",
        callbacks=[PreciseBN()],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=Data())
    if trainer.is_global_zero:
        state = {key: value for key, value in module.network.state_dict().items() if "num_batches" not in key}
        scores = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        torch.save({**state, **scores}, out)


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
