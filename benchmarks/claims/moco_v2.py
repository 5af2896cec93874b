"""MoCo v2's claim in miniature: an MLP head makes better features, and stronger augmentation does them no harm.

Three arms a seed, the same small ResNet, images and steps in each: MoCo v1 (linear head, T 0.07); the MLP head with T
0.2; and that with the augmentation of v2 (milder hue, jitter by chance, blur). The frozen features are judged by a
linear classifier. Real data (CIFAR-10) where it is found, the embedded `shapes` otherwise.

    python benchmarks/claims/moco_v2.py        # about a quarter of an hour on one core; a killed run goes on
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch

from benchmarks.claims.common import SubClaim, World, in_batches, labelled, parser, run_arms
from benchmarks.claims.moco import Augmentation, optimiser, pretrain
from zoo.selfsup.moco import MoCoPretraining, MoCoV2Pretraining
from zoo.training import Optim
from zoo.training.probe import fit_probe

STATEMENT = (
    "the MLP head improves the frozen features of MoCo, and the stronger augmentation costs them at most a point"
)
V1 = Augmentation()
V2 = Augmentation(hue=0.1, jitter=0.8, gray_first=False, blur=0.5)
ARMS: dict[str, tuple[type[MoCoPretraining], float, Augmentation]] = {
    "v1": (MoCoPretraining, 0.07, V1),
    "mlp": (MoCoV2Pretraining, 0.2, V1),
    "mlp_aug_plus": (MoCoV2Pretraining, 0.2, V2),
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
    queue_size: int = 2048
    momentum: float = 0.99
    batch: int = 128
    train_images: int = 50_000
    steps: int = 1000
    lr: float = 0.06
    weight_decay: float = 5e-4
    probe_labels: int = 10_000
    probe_epochs: int = 60
    probe_lr: float = 3e-3
    test_images: int = 5000


QUICK = {"train_images": 256, "steps": 3, "probe_labels": 100, "probe_epochs": 2, "test_images": 64}


def probe(settings: Settings, world: World, seed: int, task: MoCoPretraining) -> float:
    """Top-1 of a linear classifier (AdamW, BatchNorm before it) on the trunk's frozen features, on the test images."""
    images, labels = labelled(world, seed, settings.probe_labels)
    features = in_batches(task.features, images, world)
    optim = Optim(lr=settings.probe_lr, betas=(0.9, 0.999), weight_decay=0.0, warmup_epochs=settings.probe_epochs / 10)
    head = fit_probe(features, labels, world.classes, settings.probe_epochs, batch_size=250, optim=optim, seed=seed)
    with torch.no_grad():
        logits = head(in_batches(task.features, world.test[0], world))
    return float((logits.argmax(1) == world.test[1]).float().mean())


def one_arm(settings: Settings, world: World, seed: int, arm: str) -> dict[str, Any]:
    """Pre-trains an arm and judges its features; also those it had before the first step."""
    kind, temperature, augmentation = ARMS[arm]
    L.seed_everything(seed, verbose=False)
    task = kind(
        arch="resnet18",
        layers=list(settings.layers),
        width=settings.width,
        bn_splits=settings.bn_splits,
        dim=settings.dim,
        queue_size=settings.queue_size,
        momentum=settings.momentum,
        temperature=temperature,
        optim=optimiser(settings),
    ).eval()
    before = probe(settings, world, seed, task)
    record = pretrain(settings, world, seed, task.train(), augmentation)
    return {**record, "probe_top1": probe(settings, world, seed, task), "probe_top1_untrained": before}


def conclude(seeds: list[dict[str, dict[str, Any]]]) -> list[SubClaim]:
    """The sub-claims, stated with their bounds before the run, over the seeds."""

    def gain(arm: str, other: str) -> list[float]:
        return [100 * (seed[arm]["probe_top1"] - seed[other]["probe_top1"]) for seed in seeds]

    points = "points of top-1"
    return [
        SubClaim("mlp", "the MLP head with T 0.2 beats the linear head with T 0.07", points, 0.0, gain("mlp", "v1")),
        SubClaim(
            "aug_plus",
            "with the stronger augmentation it loses at most one point",
            points,
            -1.0,
            gain("mlp_aug_plus", "mlp"),
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    given = parser(__doc__).parse_args(argv)
    return run_arms("moco_v2", STATEMENT, given, Settings, QUICK, list(ARMS), one_arm, conclude)


if __name__ == "__main__":
    raise SystemExit(main())
