"""Whether embeddings fill the space or collapse, and how far apart they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Spread(Metric):
    """The mean standard deviation of the channels of unit vectors (N, C), in units of 1/sqrt(C): 1 where they fill the
    sphere, 0 where all are the same. NaN for fewer than two vectors.

    Args:
        dim: C.
    """

    full_state_update = False
    higher_is_better = True
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, embedding: Tensor) -> None:
        """Takes vectors (N, C)."""
        wide = embedding.detach().to(self.total.dtype)
        self.count += len(wide)
        self.total += wide.sum(dim=0)
        self.squares += wide.square().sum(dim=0)

    def compute(self) -> Tensor:
        variance = (self.squares - self.total.square() / self.count) / (self.count - 1)
        return variance.clamp_min(0).sqrt().mean() * len(self.total) ** 0.5


class PairwiseDistance(Metric):
    """The mean of |z_i - z_j|^2 / C over all pairs i != j of vectors (N, C). NaN for fewer than two of them.

    Args:
        dim: C.
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    square: Tensor

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("square", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, vectors: Tensor) -> None:
        """Takes vectors (N, C)."""
        wide = vectors.detach().to(self.total.dtype)
        self.count += len(wide)
        self.total += wide.sum(dim=0)
        self.square += wide.square().sum()

    def compute(self) -> Tensor:
        spread = self.square - self.total.square().sum() / self.count
        return 2 * spread.clamp_min(0) / (self.count - 1) / len(self.total)
