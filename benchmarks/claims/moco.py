"""MoCo's claim in miniature: a large dictionary helps, and it must be kept consistent by a slow key encoder.

Three arms a seed, the same small ResNet, images and steps in each: MoCo with a queue of 2,048 keys and momentum 0.99;
the same without momentum (the key encoder is a copy of the query encoder); the same with a queue of one batch. Features
are judged by nearest neighbours. Real data (CIFAR-10) where it is found, the embedded `shapes` otherwise.

    python benchmarks/claims/moco.py           # about a quarter of an hour on one core; a killed run goes on
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from benchmarks.claims.common import (
    Batches,
    Diary,
    SubClaim,
    World,
    in_batches,
    labelled,
    parser,
    run_arms,
    train,
)
from zoo.metrics.knn import KNNAccuracy
from zoo.selfsup.moco import MoCoPretraining
from zoo.training import Optim

STATEMENT = "a queue beats a dictionary of one batch, and a slowly moving key encoder beats a copy of the query encoder"
ARMS: dict[str, dict[str, Any]] = {
    "queue": {"queue_size": 2048, "momentum": 0.99},
    "no_momentum": {"queue_size": 2048, "momentum": 0.0},
    "one_batch": {"queue_size": 128, "momentum": 0.99},
}


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers but the seed and the arm."""

    dataset: str = "cifar10"
    img_size: int = 32
    layers: tuple[int, ...] = (1, 1, 1, 1)
    width: int = 16
    bn_splits: int = 4
    dim: int = 64
    temperature: float = 0.1
    batch: int = 128
    train_images: int = 50_000
    steps: int = 1000
    lr: float = 0.06
    weight_decay: float = 5e-4
    scale: float = 0.2
    bank_images: int = 10_000
    test_images: int = 5000
    neighbours: int = 20


QUICK = {"train_images": 256, "steps": 3, "bank_images": 100, "test_images": 64}


@dataclass(frozen=True)
class Augmentation:
    """Random crop and flip, colours, and perhaps a blur; as the paper's, for a whole batch at once.

    Args:
        scale: least share of the area that a crop has.
        hue: strength of the hue's shift; brightness, contrast and saturation have 0.4.
        jitter: chance that the colours are jittered.
        gray_first: grayscale comes before the jitter (v1), not after it.
        blur: chance of a Gaussian blur.
        sigma: bounds of its width in pixels; the paper's 0.1 to 2 are for 224 pixels.
    """

    scale: float = 0.2
    hue: float = 0.4
    jitter: float = 1.0
    gray_first: bool = True
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 1.0)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, 3, H, W) of bytes to augmented ones in [0, 1]."""

        def draw(*bounds: float) -> Tensor:
            low, high = bounds or (0.0, 1.0)
            return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)

        x = _crop(images.float() / 255, draw, self.scale)
        gray = draw() < 0.2
        if self.gray_first:
            x = torch.where(gray, _luma(x), x)
        x = torch.where(draw() < self.jitter, _jitter(x, draw, self.hue), x)
        if not self.gray_first:
            x = torch.where(gray, _luma(x), x)
        blurred = _blur(x, draw(*self.sigma)) if self.blur else x
        return torch.where(draw() < self.blur, blurred, x)


Draw = Callable[..., Tensor]


def _crop(x: Tensor, draw: Draw, scale: float) -> Tensor:
    """A random box of `scale` to 1 of the area, 3/4 to 4/3 in shape, flipped with chance 1/2, at the old size."""
    area, shape = draw(scale, 1.0), draw(-math.log(4 / 3), math.log(4 / 3)).exp()
    width, height = ((area * f).sqrt().clamp(max=1).flatten() for f in (shape, 1 / shape))
    left, top = ((2 * draw().flatten() - 1) * (1 - side) for side in (width, height))
    flip = torch.where(draw().flatten() < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(left)
    theta = torch.stack([torch.stack([width * flip, zero, left], 1), torch.stack([zero, height, top], 1)], 1)
    return grid_sample(
        x, affine_grid(theta, list(x.shape), align_corners=False), padding_mode="reflection", align_corners=False
    )


def _luma(x: Tensor) -> Tensor:
    return (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _jitter(x: Tensor, draw: Draw, hue: float) -> Tensor:
    """Brightness, contrast and saturation by factors of 0.6 to 1.4, then the hue turned, in this order."""
    x = (x * draw(0.6, 1.4)).clamp(0, 1)
    x = torch.lerp(_luma(x).mean((2, 3), keepdim=True), x, draw(0.6, 1.4)).clamp(0, 1)
    x = torch.lerp(_luma(x), x, draw(0.6, 1.4)).clamp(0, 1)
    # The hue is an angle of the plane orthogonal to gray: a rotation about (1, 1, 1).
    angle = draw(-hue, hue).flatten() * 2 * math.pi
    axis = torch.full((3,), 3**-0.5)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) * 3**-0.5
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    turn = cos * torch.eye(3) + sin * cross + (1 - cos) * torch.outer(axis, axis)
    return torch.einsum("bij,bjhw->bihw", turn, x).clamp(0, 1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian of 7 pixels, each image with its own width (B, 1, 1, 1)."""
    reach = torch.arange(-3.0, 4.0)
    kernel = torch.softmax(-(reach**2) / (2 * sigma.view(-1, 1) ** 2), dim=1).repeat_interleave(3, 0)
    flat = pad(x, (3, 3, 3, 3), mode="reflect").flatten(0, 1)[None]
    flat = conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return conv2d(flat, kernel[:, None, None, :], groups=len(kernel)).view(x.shape)


class Views(Batches):
    """Batches of two views of each image."""

    augmentation = Augmentation()

    def augment(self, images: Tensor, generator: torch.Generator) -> dict[str, Any]:
        return {"views": [self.world.normalise(255 * self.augmentation(images, generator)) for _ in range(2)]}


class Lookups(Diary):
    """Also how often queries found their keys, in the last tenth of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        self.found.append(float(trainer.callback_metrics["train/acc1_step"]))

    def at_end(self, values: list[float]) -> float:
        return mean(values[-max(1, len(values) // 10) :])


def optimiser(settings: Any) -> Optim:
    """SGD as the official CIFAR-10 demo has it, with a cosine to the end of the run."""
    return Optim(name="sgd", lr=settings.lr, weight_decay=settings.weight_decay, no_decay="none", schedule="cosine")


def pretrain(
    settings: Any, world: World, seed: int, task: MoCoPretraining, augmentation: Augmentation
) -> dict[str, Any]:
    """Trains a task on two views; what the look-ups and the losses came to."""
    batches = Views(*world.train, world, settings.steps, settings.batch, seed)
    batches.augmentation = augmentation
    diary = Lookups()
    train(task, batches, diary)
    task.eval()
    return {
        "final_loss": diary.at_end(diary.losses),
        "final_lookup_top1": diary.at_end(diary.found),
        "loss_at_100": diary.loss_at(100),
        "loss_at_1000": diary.loss_at(1000),
    }


def neighbours(settings: Settings, world: World, seed: int, task: MoCoPretraining) -> float:
    """Top-1 of the nearest neighbours (k 20, T 0.1) by the trunk's features, on the test images."""
    metric = KNNAccuracy(world.classes, settings.neighbours, temperature=0.1)
    images, labels = labelled(world, seed, settings.bank_images)
    metric.update_bank(in_batches(task.features, images, world), labels)
    metric.update(in_batches(task.features, world.test[0], world), world.test[1])
    return float(metric.compute()["top1"])


def pretraining_task(settings: Settings, arm: str) -> MoCoPretraining:
    return MoCoPretraining(
        arch="resnet18",
        layers=list(settings.layers),
        width=settings.width,
        bn_splits=settings.bn_splits,
        dim=settings.dim,
        temperature=settings.temperature,
        optim=optimiser(settings),
        **ARMS[arm],
    )


def one_arm(settings: Settings, world: World, seed: int, arm: str) -> dict[str, Any]:
    """Pre-trains an arm and judges its features; also those it had before the first step."""
    L.seed_everything(seed, verbose=False)
    task = pretraining_task(settings, arm).eval()
    before = neighbours(settings, world, seed, task)
    record = pretrain(settings, world, seed, task.train(), Augmentation(settings.scale))
    return {**record, "knn_top1": neighbours(settings, world, seed, task), "knn_top1_untrained": before}


def conclude(seeds: list[dict[str, dict[str, Any]]]) -> list[SubClaim]:
    """The sub-claims, stated with their bounds before the run, over the seeds."""

    def gain(arm: str, other: str) -> list[float]:
        return [100 * (seed[arm]["knn_top1"] - seed[other]["knn_top1"]) for seed in seeds]

    points = "points of kNN top-1"
    return [
        SubClaim(
            "queue", "a queue of 2,048 keys beats a dictionary of one batch", points, 0.0, gain("queue", "one_batch")
        ),
        SubClaim(
            "momentum", "a key encoder with momentum 0.99 beats one without", points, 0.0, gain("queue", "no_momentum")
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    given = parser(__doc__).parse_args(argv)
    return run_arms("moco", STATEMENT, given, Settings, QUICK, list(ARMS), one_arm, conclude)


if __name__ == "__main__":
    raise SystemExit(main())
