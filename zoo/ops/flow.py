"""Paths between data and noise, z_t = alpha(t) x + sigma(t) e, and what a network may predict on them.

Every path says where its noise is. `noise_at=1` (MeanFlow and most flow-matching papers): z_0 = x, z_1 = e, and for the
linear path v = e - x. `noise_at=0` (SiT, JiT): z_0 = e, z_1 = x, v = x - e. The same network is of the other convention
under t' = 1 - t and v' = -v.

Times are (B,) tensors, or numbers; x, e, z, v are (B, ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown

Prediction = Literal["velocity", "noise", "score"]
PREDICTIONS = ("velocity", "noise", "score")


def like(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) shaped (B, 1, ...) so that they multiply x (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Path:
    """A path; subclasses give `_alpha`, `_sigma` and their logarithmic derivative in the time s whose noise is at 0.

    Args:
        noise_at: the time, 0 or 1, at which z is noise.

    Raises:
        ZooError: `noise_at` is neither.
    """

    noise_at: int

    def __post_init__(self) -> None:
        if self.noise_at not in (0, 1):
            raise ZooError(f"a path has its noise at time 0 or 1, not {self.noise_at!r}")

    @property
    def _direction(self) -> int:
        return 1 if self.noise_at == 0 else -1

    def _s(self, t: Tensor) -> Tensor:
        return t if self.noise_at == 0 else 1 - t

    def _alpha(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(s) and its derivative."""
        raise NotImplementedError

    def _sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """sigma(s) and its derivative."""
        raise NotImplementedError

    def _log_rate(self, s: Tensor) -> Tensor:
        """(d alpha / ds) / alpha."""
        raise NotImplementedError

    def _half_variance(self, s: Tensor) -> Tensor:
        """g in v = (log_rate) z + g * score: log_rate * sigma^2 - sigma * sigma'."""
        sigma, d_sigma = self._sigma(s)
        return self._log_rate(s) * sigma.square() - sigma * d_sigma

    # ---- the way in

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t (B, ...) between data x and noise."""
        s = like(self._s(t), x)
        return self._alpha(s)[0] * x + self._sigma(s)[0] * noise

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The conditional velocity dz/dt of the path through x and noise."""
        s = like(self._s(t), x)
        return self._direction * (self._alpha(s)[1] * x + self._sigma(s)[1] * noise)

    # ---- what a prediction means

    def velocity_from(self, prediction: Prediction, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The velocity that a network's `output` stands for at z, t."""
        if prediction == "velocity":
            return output
        s = like(self._s(t), z)
        score = self.score_from(prediction, output, z, t)
        return self._direction * (self._log_rate(s) * z + self._half_variance(s) * score)

    def score_from(self, prediction: Prediction, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The score, the gradient of log p_t at z, that a network's `output` stands for."""
        if prediction not in PREDICTIONS:
            raise unknown("prediction", prediction, PREDICTIONS)
        s = like(self._s(t), z)
        if prediction == "score":
            return output
        sigma, d_sigma = self._sigma(s)
        if prediction == "noise":
            return -output / sigma
        alpha, d_alpha = self._alpha(s)
        inverse = alpha / d_alpha
        return (inverse * self._direction * output - z) / (sigma.square() - inverse * d_sigma * sigma)

    def data_from_score(self, score: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The expected data (z + sigma^2 score) / alpha at z (Tweedie)."""
        s = like(self._s(t), z)
        return (z + self._sigma(s)[0].square() * score) / self._alpha(s)[0]

    def loss(
        self,
        prediction: Prediction,
        output: Tensor,
        x: Tensor,
        noise: Tensor,
        t: Tensor,
        weight: Literal["none", "velocity", "likelihood"] = "none",
    ) -> Tensor:
        """The mean squared error (B,) of a network's `output` against what it is to predict (SiT, section 2).

        `weight` is of noise and score prediction: "velocity" makes them the velocity's error, "likelihood" that of the
        maximum likelihood.
        """
        if weight not in ("none", "velocity", "likelihood"):
            raise unknown("loss weight", weight, ("none", "velocity", "likelihood"))
        if prediction == "velocity":
            return (output - self.velocity(x, noise, t)).square().flatten(1).mean(1)
        if prediction not in PREDICTIONS:
            raise unknown("prediction", prediction, PREDICTIONS)
        s = like(self._s(t), x)
        sigma = self._sigma(s)[0]
        error = output - noise if prediction == "noise" else output * sigma + noise
        factor: Tensor = {
            "none": lambda: torch.ones_like(s),
            "velocity": lambda: (self._half_variance(s) / sigma).square(),
            "likelihood": lambda: self._half_variance(s) / sigma.square(),
        }[weight]()
        return (factor * error.square()).flatten(1).mean(1)

    def diffusion(self, form: str, z: Tensor, t: Tensor, norm: float = 1.0) -> Tensor:
        """w(t), broadcast against z, of the reverse SDE dz = (v + w score) dt + sqrt(2 w) dW (SiT, section 2.4).

        Forms: constant, sbdm (the SDE of score-based diffusion), sigma, linear, decreasing, bump (sin^2, the official
        "inccreasing-decreasing").
        """
        s = like(self._s(t), z)
        forms = {
            "constant": lambda: torch.full_like(s, norm),
            "sbdm": lambda: norm * self._half_variance(s),
            "sigma": lambda: norm * self._sigma(s)[0],
            "linear": lambda: norm * (1 - s),
            "decreasing": lambda: 0.25 * (norm * torch.cos(math.pi * s) + 1) ** 2,
            "bump": lambda: norm * torch.sin(math.pi * s) ** 2,
        }
        if form not in forms:
            raise unknown("form of diffusion", form, forms)
        return forms[form]()


@dataclass(frozen=True)
class LinearPath(Path):
    """Straight lines: alpha = s, sigma = 1 - s."""

    def _alpha(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return s, torch.ones_like(s)

    def _sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - s, -torch.ones_like(s)

    def _log_rate(self, s: Tensor) -> Tensor:
        return 1 / s


@dataclass(frozen=True)
class GVPPath(Path):
    """Generalised variance preserving: alpha = sin(pi s / 2), sigma = cos(pi s / 2)."""

    def _alpha(self, s: Tensor) -> tuple[Tensor, Tensor]:
        angle = s * math.pi / 2
        return angle.sin(), math.pi / 2 * angle.cos()

    def _sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        angle = s * math.pi / 2
        return angle.cos(), -math.pi / 2 * angle.sin()

    def _log_rate(self, s: Tensor) -> Tensor:
        return math.pi / (2 * torch.tan(s * math.pi / 2))


@dataclass(frozen=True)
class VPPath(Path):
    """The variance-preserving diffusion of score-based models, beta from `beta_min` (data) to `beta_max` (noise)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, s: Tensor) -> Tensor:
        return -0.25 * (1 - s) ** 2 * (self.beta_max - self.beta_min) - 0.5 * (1 - s) * self.beta_min

    def _log_rate(self, s: Tensor) -> Tensor:
        return 0.5 * (1 - s) * (self.beta_max - self.beta_min) + 0.5 * self.beta_min

    def _alpha(self, s: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._log_alpha(s).exp()
        return alpha, alpha * self._log_rate(s)

    def _sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        square = (2 * self._log_alpha(s)).exp()
        sigma = (1 - square).sqrt()
        return sigma, -square * self._log_rate(s) / sigma

    def _half_variance(self, s: Tensor) -> Tensor:
        return self._log_rate(s)


def logit_normal(noise: Tensor, mean: float, std: float) -> Tensor:
    """Times sigmoid(mean + std * noise) in (0, 1) from standard normal `noise`; where the noise of a path moves to the
    other end, the sign of `mean` turns."""
    return torch.sigmoid(noise * std + mean)
