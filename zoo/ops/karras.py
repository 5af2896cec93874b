"""Denoisers and their noise levels as EDM writes them (Karras et al. 2022, arXiv 2206.00364, Table 1).

A denoiser of y = x + s e is D(y, s) = skip(s) y + out(s) F(in(s) y, noise(s)), F being the network. Noise levels s are
tensors (B,), or of any shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError


class Scalings(NamedTuple):
    """The four scalings of a denoiser, shaped like its noise levels."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Preconditioning:
    """Scalings, the loss weight of |D - x|^2, the noise levels of training, and those that are supported.

    Attributes:
        normal: whether the draws of :meth:`sigma` are standard normal, or uniform in [0, 1).
    """

    normal: ClassVar[bool] = False

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest noise level there is."""
        return 0.0, math.inf

    def scalings(self, sigma: Tensor) -> Scalings:
        raise NotImplementedError

    def weight(self, sigma: Tensor) -> Tensor:
        """Of |D - x|^2 in the loss."""
        return 1 / sigma.square()

    def sigma(self, draw: Tensor) -> Tensor:
        """Noise levels of training from draws."""
        raise NotImplementedError

    def round(self, sigma: Tensor) -> Tensor:
        """The nearest noise levels that the network knows."""
        return sigma


@dataclass(frozen=True)
class EDM(Preconditioning):
    """EDM's own: unit variance at the input and the output of the network; levels are log-normal.

    Args:
        sigma_data: standard deviation of the data.
        mean, std: of the logarithm of the noise levels.
    """

    sigma_data: float = 0.5
    mean: float = -1.2
    std: float = 1.2
    normal: ClassVar[bool] = True

    def scalings(self, sigma: Tensor) -> Scalings:
        data = self.sigma_data
        total = sigma.square() + data**2
        return Scalings(data**2 / total, sigma * data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4)

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def sigma(self, draw: Tensor) -> Tensor:
        return (draw * self.std + self.mean).exp()


@dataclass(frozen=True)
class VP(Preconditioning):
    """Variance preserving (Song et al. 2021): the network predicts the noise.

    Args:
        beta_range: how much beta grows over the process.
        beta_min: where it begins.
        steps: in which the network counts time.
        least_time: the earliest of training.
    """

    beta_range: float = 19.9
    beta_min: float = 0.1
    steps: int = 1000
    least_time: float = 1e-5

    @property
    def range(self) -> tuple[float, float]:
        low, high = self.sigma_at(torch.tensor([self.least_time, 1.0], dtype=torch.float64)).tolist()
        return low, high

    def sigma_at(self, t: Tensor) -> Tensor:
        """The noise level at times t in [0, 1]."""
        return (0.5 * self.beta_range * t.square() + self.beta_min * t).expm1().sqrt()

    def time_of(self, sigma: Tensor) -> Tensor:
        """The inverse of :meth:`sigma_at`."""
        root = (self.beta_min**2 + 2 * self.beta_range * sigma.square().log1p()).sqrt()
        return (root - self.beta_min) / self.beta_range

    def scalings(self, sigma: Tensor) -> Scalings:
        noise = (self.steps - 1) * self.time_of(sigma)
        return Scalings(torch.ones_like(sigma), -sigma, 1 / (sigma.square() + 1).sqrt(), noise)

    def sigma(self, draw: Tensor) -> Tensor:
        return self.sigma_at(1 + draw * (self.least_time - 1))


@dataclass(frozen=True)
class VE(Preconditioning):
    """Variance exploding (Song et al. 2021): the network predicts the noise, its sign turned; levels are log-uniform.

    Args:
        sigma_min, sigma_max: the range of noise levels.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    @property
    def range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def scalings(self, sigma: Tensor) -> Scalings:
        one = torch.ones_like(sigma)
        return Scalings(one, sigma, one, (0.5 * sigma).log())

    def sigma(self, draw: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** draw


@dataclass(frozen=True)
class IDDPM(Preconditioning):
    """Improved DDPM (Nichol and Dhariwal 2021): a table of `steps` noise levels, of which training draws evenly; the
    network predicts the noise. It has twice the channels, whose second half, of the variance, a denoiser leaves.

    Args:
        least_ratio, offset: EDM's C_1 and C_2.
        steps: M.
    """

    least_ratio: float = 0.001
    offset: float = 0.008
    steps: int = 1000

    @property
    def table(self) -> Tensor:
        """u_0 > ... > u_M = 0 (M + 1,), float64."""
        j = torch.arange(self.steps + 1, dtype=torch.float64)
        abar = (0.5 * math.pi * j / self.steps / (self.offset + 1)).sin().square()
        ratio = (abar[:-1] / abar[1:]).clamp(min=self.least_ratio)
        # u_{j-1}^2 + 1 = (u_j^2 + 1) / ratio_j, from u_M = 0 on.
        growth = (1 / ratio).flip(0).cumprod(0).flip(0)
        return torch.cat([(growth - 1).sqrt(), growth.new_zeros(1)])

    @property
    def range(self) -> tuple[float, float]:
        table = self.table
        return float(table[-2]), float(table[0])

    def _index(self, sigma: Tensor) -> Tensor:
        table = self.table.to(sigma.device)
        return (sigma.double()[..., None] - table).abs().argmin(-1)

    def scalings(self, sigma: Tensor) -> Scalings:
        noise = self.steps - 1 - self._index(sigma).to(sigma.dtype)
        return Scalings(torch.ones_like(sigma), -sigma, 1 / (sigma.square() + 1).sqrt(), noise)

    def sigma(self, draw: Tensor) -> Tensor:
        return self.table.to(draw)[(draw * self.steps).long()]

    def round(self, sigma: Tensor) -> Tensor:
        return self.table.to(sigma)[self._index(sigma)]


def noise_levels(count: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Falling noise levels (N,) from `high` to `low`, float64, evenly spaced in their rho-th root (equation 5).

    Raises:
        ZooError: fewer than one, or a range that does not rise from above 0.
    """
    if count < 1 or not 0 < low < high:
        raise ZooError(f"{count} noise levels from {high} down to {low} are none")
    place = torch.linspace(0, 1, count, dtype=torch.float64)
    return (high ** (1 / rho) + place * (low ** (1 / rho) - high ** (1 / rho))) ** rho
