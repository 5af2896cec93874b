"""How samples in the plane lie among those that they should be like; see :class:`~zoo.data.PlaneDataModule`."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.training.ema import evaluation_weights
from zoo.training.sampling import check_samples, labels_of, noise_of

REACH = 3.0  # a sample is at a mode within so many deviations of its centre


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 64) -> Tensor:
    """The mean over evenly spread directions of the 1-Wasserstein distance of points (N, 2) and (N, 2), projected."""
    angles = torch.arange(directions, dtype=x.dtype, device=x.device) * (math.pi / directions)
    rays = torch.stack([angles.cos(), angles.sin()])
    return ((x @ rays).sort(0).values - (y @ rays).sort(0).values).abs().mean()


def least_mode(x: Tensor, modes: Tensor, radius: float) -> Tensor:
    """The share of points (N, 2) within a radius of the mode (K, 2) that has the fewest of them, times K: 1 where all
    have their share, 0 where one is empty."""
    near = torch.cdist(x, modes) <= radius
    return near.to(x.dtype).mean(0).min() * len(modes)


class PlaneEvaluation(L.Callback):
    """Logs, at the end of validation (`val/`) and of testing (`test/`), `sliced_wasserstein` between samples and as
    many points of the split, and `least_mode`. The samples are the same for any number of processes.

    Args:
        num_samples: samples, as many as the split has points at most.
        seed: of their noise.
    """

    def __init__(self, num_samples: int = 2048, seed: int = 0) -> None:
        if num_samples < 1:
            raise ZooError(f"num_samples must be at least 1, not {num_samples}")
        self.num_samples, self.seed = num_samples, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_samples(pl_module)
        if not hasattr(trainer.datamodule, "modes"):  # type: ignore[attr-defined]
            raise ZooError("PlaneEvaluation wants a data module of the plane (zoo.data.PlaneDataModule)")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module
        points = data.points(stage)[: self.num_samples].to(pl_module.device)
        with evaluation_weights(trainer, pl_module), torch.inference_mode():
            noise = noise_of(range(len(points)), tuple(model.noise_shape), self.seed).to(pl_module.device)
            label = labels_of(range(len(points)), model.num_classes, len(points), self.seed)
            drawn = model.sample(noise, None if label is None else label.to(pl_module.device))
        drawn = drawn.flatten(1).to(points.dtype)
        if drawn.shape != points.shape:
            raise ZooError(
                f"{type(pl_module).__name__} gave no points of the plane but samples of {drawn.shape[1]} numbers"
            )
        reached = least_mode(drawn, data.modes.to(drawn), REACH * data.deviation)
        pl_module.log(f"{stage}/sliced_wasserstein", sliced_wasserstein(drawn, points).item(), prog_bar=True)
        pl_module.log(f"{stage}/least_mode", reached.item(), prog_bar=True)
