"""A task that samples, for tests of grids and of evaluation by sampling; also run in two processes.

`python -m tests.training.sampling_task DEVICES OUT` tests it and writes its metrics as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from zoo.data import ImageDataModule
from zoo.metrics.generation import RandomFeatures
from zoo.training import BaseModule, Optim, SamplingEvaluation
from zoo.training.sampling import reference_statistics

METRICS = ["fid", "kid", "precision_recall"]


class Painter(BaseModule):
    """Learns one colour a class and paints noise on it."""

    noise_shape = (3, 32, 32)

    def __init__(self, num_classes: int = 10, optim: Optim = Optim(lr=0.05, schedule="constant")) -> None:  # noqa: B008
        super().__init__(optim)
        self.num_classes = num_classes
        self.colour = nn.Parameter(torch.zeros(max(1, num_classes), 3))

    def sample(self, noise: Tensor, label: Tensor | None) -> Tensor:
        assert (label is None) == (self.num_classes == 0)
        rows = torch.zeros(len(noise), dtype=torch.long, device=noise.device) if label is None else label
        return (self.colour[rows][:, :, None, None] + 0.3 * noise).clamp(-1, 1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        rows = batch["label"] % max(1, self.num_classes)
        return (batch["image"].mean(dim=(2, 3)) - self.colour[rows]).square().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), sync_dist=True, batch_size=len(batch["label"]))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Samples alone are tested."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Samples alone are drawn."""


def data(length: int = 64) -> ImageDataModule:
    half = [0.5] * 3
    return ImageDataModule("shapes", batch_size=16, image_size=32, train_samples=length, mean=half, std=half, seed=3)


def evaluation(**options: Any) -> SamplingEvaluation:
    options = {"num_samples": 45, "extractor": "random", "metrics": METRICS, "kid_subset_size": 20, **options}
    return SamplingEvaluation(**{"batch_size": 8, **options})


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {f"limit_{stage}_batches": 1 for stage in ("val", "test", "predict")}
    return L.Trainer(**{**quiet, "callbacks": list(callbacks), **options})


class BySums(L.Callback):
    """Logs what statistics without features give, which are summed over the processes."""

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = reference_statistics(data(), "train", RandomFeatures(), trainer=trainer)
        pl_module.log_dict({"mean": found.mean.norm().item(), "covariance": found.covariance.norm().item()})


def main(devices: int, out: str) -> None:
    strategy = "auto" if devices == 1 else "ddp"
    # Shares of 23 and 22 samples, in batches of 8: neither the order nor the batches are those of one process.
    callbacks = evaluation(batch_size=45 if devices == 1 else 8), BySums()
    run = trainer(*callbacks, devices=devices, strategy=strategy)
    run.test(Painter(), datamodule=data(), verbose=False)
    if run.is_global_zero:
        with open(out, "w") as file:
            json.dump({name: value.item() for name, value in run.callback_metrics.items()}, file)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
