"""Levels of noise t = 0 ... T - 1 of denoising autoencoders and of diffusion in discrete steps: z_t = gamma_t z +
sigma_t e, the most noise at T - 1. Sections and names of the kinds are those of arXiv 2401.14404."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown

Kind = Literal["original", "linear", "unscaled", "single"]
SINGLE_SIGMA = math.sqrt(1 / 3)  # section 4.3, "Single noise level"; also that of Figures 7 and 8


def original_gamma2(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """gamma_t^2 (T,), the product of 1 - beta up to t, for beta linear in t (section 3; DDPM's and DiT's)."""
    return (1 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)).cumprod(0)


def linear_gamma2(steps: int = 1000) -> Tensor:
    """gamma_t^2 = 1 - (t + 1) / T (T,) (section 4.1, "Replace noise schedule"; where it begins is our reading)."""
    return 1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps


def unscaled_sigma(steps: int = 1000, last: float = math.sqrt(2)) -> Tensor:
    """sigma_t (T,), linear from 0 to `last`, for gamma = 1 (section 4.3, "Remove input scaling")."""
    return torch.linspace(0, last, steps, dtype=torch.float64)


@dataclass(frozen=True)
class NoiseSchedule:
    """Levels of noise t = 0 ... T-1.

    Args:
        kind: "original" (DDPM's), "linear" (gamma^2 is), "unscaled" (gamma = 1, sigma linear from 0) or "single"
            (gamma = 1, one sigma).
        steps: T; of "single" it is 1.
        sigma: of "unscaled" the last one, by default the root of 2; of "single" its one, by default the root of 1/3.
        beta_start, beta_end: of "original".

    Raises:
        ZooError: an unknown kind, or a value out of range.
    """

    kind: Kind = "unscaled"
    steps: int = 1000
    sigma: float | None = None
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if self.kind not in ("original", "linear", "unscaled", "single"):
            raise unknown("kind of noise schedule", self.kind, ("original", "linear", "unscaled", "single"))
        if self.steps < 2 or not (self.sigma is None or self.sigma > 0) or not 0 < self.beta_start <= self.beta_end < 1:
            raise ZooError(
                "a noise schedule has 2 steps or more, a sigma above 0, and betas within 0 and 1 that do not fall"
            )
        if self.sigma is not None and self.preserving:
            raise ZooError(f"the noise schedule {self.kind!r} takes no sigma")

    @classmethod
    def of(cls, noise: NoiseSchedule | Mapping[str, Any]) -> NoiseSchedule:
        """Itself, or that of a plain mapping, which is what a checkpoint holds."""
        return cls(**noise) if isinstance(noise, Mapping) else noise

    @property
    def preserving(self) -> bool:
        """Whether gamma^2 + sigma^2 = 1."""
        return self.kind in ("original", "linear")

    def levels(self) -> tuple[Tensor, Tensor]:
        """gamma (T,) and sigma (T,), float64."""
        if self.kind == "single":
            sigma = torch.tensor([SINGLE_SIGMA if self.sigma is None else self.sigma], dtype=torch.float64)
        elif self.kind == "unscaled":
            sigma = unscaled_sigma(self.steps, math.sqrt(2) if self.sigma is None else self.sigma)
        else:
            original = self.kind == "original"
            gamma2 = (
                original_gamma2(self.steps, self.beta_start, self.beta_end) if original else linear_gamma2(self.steps)
            )
            return gamma2.sqrt(), (1 - gamma2).sqrt()
        return torch.ones_like(sigma), sigma

    def betas(self) -> Tensor:
        """1 - gamma_t^2 / gamma_{t-1}^2 in float64, of a schedule that keeps the variance: (T,), or (T - 1,) where
        nothing is left of the data at the last level, as of "linear"."""
        gamma2 = self.levels()[0].square()
        gamma2 = gamma2[gamma2 > 0]
        return 1 - gamma2 / torch.cat([gamma2.new_ones(1), gamma2[:-1]])

    def check(self, t: int) -> None:
        """Raises ZooError where there is no level t."""
        last = 0 if self.kind == "single" else self.steps - 1
        if not 0 <= t <= last:
            raise ZooError(f"this noise schedule has the levels t = 0 to {last}, not {t}")
