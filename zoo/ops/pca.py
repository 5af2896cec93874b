"""Principal axes of a stream of vectors: sums are kept, never the vectors, so that any number of them fits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError

_ROWS = 1 << 15  # vectors that are held in float64 at a time


class PrincipalAxes(NamedTuple):
    """`basis` (D, D), an axis a row, by falling variance; `mean` (D,); `variances` (D,) along the axes. Float64."""

    basis: Tensor
    mean: Tensor
    variances: Tensor

    def explained(self, count: int) -> Tensor:
        """The share () of the variance that the first `count` axes hold."""
        return self.variances[:count].sum() / self.variances.sum()


class Moments:
    """Number, sum and sum of outer products of vectors of D numbers, in float64. Those of two streams add up.

    Args:
        dim: D.
        device: where the sums are kept; vectors are brought there.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, vectors: Tensor) -> None:
        """Takes in vectors (..., D)."""
        for rows in vectors.detach().reshape(-1, len(self.total)).split(_ROWS):
            rows = rows.to(self.total)
            self.count += len(rows)
            self.total += rows.sum(dim=0)
            self.products.addmm_(rows.T, rows)

    def __add__(self, other: Moments) -> Moments:
        both = Moments(len(self.total), self.total.device)
        both.count = self.count + other.count
        both.total, both.products = self.total + other.total, self.products + other.products
        return both

    def covariance(self, center: bool = True) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D), divided by the number; without `center` the mean is taken to be zero.

        Raises:
            ZooError: no vectors were seen.
        """
        if not self.count:
            raise ZooError("principal axes want vectors, and there were none")
        mean = self.total / self.count if center else torch.zeros_like(self.total)
        return mean, self.products / self.count - mean.outer(mean)

    def axes(self, center: bool = True) -> PrincipalAxes:
        """The eigenvectors of the covariance. Of the two signs of each that one is taken whose largest entry is
        positive.

        Raises:
            ZooError: no vectors were seen, or some were not finite.
        """
        mean, covariance = self.covariance(center)
        if not bool(covariance.isfinite().all()):
            raise ZooError("principal axes want finite vectors")
        variances, vectors = torch.linalg.eigh(covariance)
        basis = vectors.T.flip(0)
        largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
        return PrincipalAxes(basis * largest.sign(), mean, variances.flip(0).clamp(min=0))
