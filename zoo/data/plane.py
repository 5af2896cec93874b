"""Distributions of points in the plane, on which a generative method is seen to work or to fail in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.base import SALT, Batch, SeededDataModule, at_least_one, key_parts
from zoo.data.loader import Key
from zoo.data.shapes import hash64
from zoo.errors import ZooError, unknown

# Centres of equally likely modes and their deviation; the first is where a network that starts at 0 starts.
MODES: dict[str, tuple[list[list[float]], float]] = {
    "one_mode": ([[0.0, 0.0]], 0.2),
    "two_modes": ([[0.0, 0.0], [2.0, 0.0]], 0.2),
    "three_modes": ([[0.0, 0.0], [2.0, 0.0], [1.0, 1.7]], 0.2),
}

TRAIN_SAMPLES = 25_600


class _Points(Dataset):
    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, key: int | Key) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        index = torch.from_numpy(key_parts(keys)[:, 0])
        return {"image": self.points[index], "label": torch.zeros_like(index), "index": index}


class PlaneDataModule(SeededDataModule):
    """Points as pictures of one pixel. Batches: image (B, 2, 1, 1) float32, label (B,), all 0, and index (B,) int64.

    Order and resuming are :class:`~zoo.data.base.SeededDataModule`'s.

    Args:
        dataset: "one_mode", "two_modes" or "three_modes": Gaussians of deviation 0.2, at a distance of 2.
        batch_size: per device.
        eval_batch_size: per device; None: as `batch_size`.
        train_samples: points to train on; None: 25,600.
        eval_samples: points of each other split.
        seed: of points and order; None: the one of ``seed_everything``, else 0.

    Attributes:
        modes: their centres (K, 2).
        deviation: theirs.

    Raises:
        ZooError: another data set, or a count below 1.
    """

    def __init__(
        self,
        dataset: str = "two_modes",
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        train_samples: int | None = None,
        eval_samples: int = 2048,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, None, 1, seed, in_memory=True)
        at_least_one(train_samples=train_samples, eval_samples=eval_samples)
        if dataset not in MODES:
            raise unknown("data set of the plane", dataset, MODES)
        self.dataset, self.counts = dataset, {"train": train_samples or TRAIN_SAMPLES}
        self.eval_samples, self.image_size, self.num_classes = eval_samples, 1, 1
        centres, self.deviation = MODES[dataset]
        self.modes = torch.tensor(centres)

    def samples(self, split: str) -> Dataset:
        if split not in SALT:
            raise ZooError(f"the splits are {', '.join(SALT)}, not {split!r}")
        count = self.counts.get(split, self.eval_samples)
        generator = torch.Generator().manual_seed(int(hash64(self.seed, SALT[split])[0]))
        mode = torch.randint(len(self.modes), (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        points = self.modes[mode] + self.deviation * noise
        return _Points(points[:, :, None, None])

    def points(self, split: str) -> Tensor:
        """The points (N, 2) of a split."""
        found: Any = self.samples(split)
        return found.points.flatten(1)
