"""A small classifier on two Gaussian-blob splits, for tests of the training floor; also run in two processes.

`python -m tests.training.training_task DEVICES OUT` fits it with probes and the average and writes weights and scores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import MeanMetric

from zoo.machine import OF_THE_MACHINE
from zoo.training import EMA, BaseModule, KNNProbe, LinearProbe, Optim, default_callbacks

CLASSES = 6
OPTIM = Optim(lr=0.05, schedule="constant", weight_decay=0.0)


class Blobs(Dataset):
    """Class blobs in 8 dimensions behind a fixed rotation; a sample depends on (split, index) alone."""

    def __init__(self, split: int, length: int, noise: float = 0.8) -> None:
        self.split, self.length, self.noise = split, length, noise
        self.centres = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(self.split * 10_000 + index)
        label = index % CLASSES
        return {
            "image": self.centres[label] + self.noise * torch.randn(8, generator=draw),
            "label": label,
            "index": index,
        }


class Strided(Sampler):
    """Every `world`-th index: shares of unequal length, nothing padded."""

    def __init__(self, length: int, rank: int, world: int, drop: bool = False) -> None:
        self.indices = range(rank, length - length % world if drop else length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class Data(L.LightningDataModule):
    num_classes = CLASSES

    def __init__(self, train: int = 240, held: int = 61, batch_size: int = 24) -> None:
        super().__init__()
        self.train, self.held, self.whole = train, held, batch_size

    @property
    def batch_size(self) -> int:
        """Samples a process loads at a time; `batch_size` of the constructor over all of them."""
        return self.whole // (self.trainer.world_size if self.trainer else 1)

    def _loader(self, split: int, length: int) -> DataLoader:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        data = Blobs(split, length)
        return DataLoader(data, self.batch_size, sampler=Strided(length, rank, world, drop=split == 0))

    def train_dataloader(self) -> DataLoader:
        return self._loader(0, self.train)

    def val_dataloader(self) -> DataLoader:
        return self._loader(1, self.held)

    def test_dataloader(self) -> DataLoader:
        return self._loader(2, self.held)


class Classifier(BaseModule):
    """An MLP with BatchNorm (buffers for the average) and, by `noise`, draws from the global generator."""

    def __init__(self, optim: Optim = OPTIM, noise: float = 0.0, break_at: int | None = None) -> None:
        super().__init__(optim)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, CLASSES)
        self.noise, self.break_at = noise, break_at
        self.loss = MeanMetric()  # a logged mean of means would depend on how the samples are dealt out
        self.validated: list[Tensor] = []

    def features(self, image: Tensor) -> Tensor:
        return self.body(image)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image = batch["image"] + self.noise * torch.randn_like(batch["image"])
        loss = cross_entropy(self.head(self.body(image)), batch["label"])
        return loss * float("nan") if self.trainer.global_step == self.break_at else loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated.append(self.head.weight.detach().clone())
        loss = cross_entropy(self.head(self.body(batch["image"])), batch["label"])
        self.loss.update(loss, weight=len(batch["label"]))
        self.log("val/loss", self.loss)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated.append(self.head.weight.detach().clone())

    def picture(self, batch: dict[str, Tensor]) -> Tensor:
        rows = self.features(batch["image"]).clamp(0, 1)  # one row of pixels a sample
        return (255 * rows).to(torch.uint8).expand(3, *rows.shape).contiguous()


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "max_epochs": 2, "use_distributed_sampler": False}
    return L.Trainer(**{**quiet, **options})


def main(devices: int, out: str) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    module = Classifier(Optim(base_lr=0.5, global_batch=24, schedule="constant"))
    module.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())  # BatchNorm would see other batches in two processes
    module.double()
    callbacks = [*default_callbacks(), EMA(0.9), KNNProbe(k=10), LinearProbe(batch_size=48)]
    strategy = "ddp" if devices > 1 else "auto"
    run = trainer(devices=devices, strategy=strategy, callbacks=callbacks, precision="64-true")
    run.fit(module, Data())
    metrics = {
        name: float(value) for name, value in run.callback_metrics.items() if not name.startswith(OF_THE_MACHINE)
    }
    (test,) = run.test(module, Data(), verbose=False)
    if run.is_global_zero:
        ema = next(c for c in callbacks if isinstance(c, EMA))
        torch.save({"weights": module.state_dict(), "ema": ema.weights, "fit": metrics, "test": test}, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
