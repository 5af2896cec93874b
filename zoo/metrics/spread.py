"""Whether embeddings fill the space or collapse, and how far apart they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric


def channel_deviation(embedding: Tensor) -> Tensor:
    """The collapse monitor of SimSiam (arXiv 2011.10566, section 4.1): the mean over channels of the (unbiased)
    deviation over samples of embeddings (N, C), each scaled to unit length. About 1/sqrt(C) where they fill the sphere,
    0 where they collapse; :class:`Spread` is its ratio to 1/sqrt(C) over a whole split."""
    return normalize(embedding, dim=1).std(dim=0).mean()


def view_variance(embedding: Tensor) -> Tensor:
    """The variance within images (Asym-Siam, arXiv 2204.00613) of embeddings (V, N, C) of V views of N images, each
    scaled to unit length: the (unbiased) variance over the views, summed over channels, mean over images. 0 where all
    views of an image are encoded alike."""
    return normalize(embedding, dim=2).var(dim=0).sum(dim=1).mean()


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
