"""Denoising models in one formulation, and their samplers in one form.

z = a(t) x + b(t) e is what a network sees of data x and noise e, r = c(t) x + d(t) e what it regresses; t rises with
the noise, and each formulation has its own. A sampler's state is alpha(t) x + beta(t) e, and its step x' = kappa x +
eta r + zeta noise, whatever the formulation (equations 1, 2 and 4 of arXiv 2502.13129).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.ops import karras
from zoo.ops.diffusion import BETAS, spaced_steps
from zoo.ops.flow import like

Network = Callable[..., Tensor]


class Coefficients(NamedTuple):
    """z = a x + b e, r = c x + d e, and the weight w of |network - r|^2, each shaped like t (equations 1 and 2)."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    w: Tensor


class Formulation:
    """A denoising model by its coefficients.

    Attributes:
        normal: whether the draws of :meth:`time` are standard normal, or uniform in [0, 1).
        straight: whether the sampler's state is linear in t, as the second order of a step wants it.
        outputs: channels that the network gives for each of the picture; the first are r.
    """

    normal = False
    straight = True
    outputs = 1

    def time(self, draw: Tensor) -> Tensor:
        """Times of training (B,) from draws: p(t)."""
        raise NotImplementedError

    def coefficients(self, t: Tensor) -> Coefficients:
        raise NotImplementedError

    def embedding(self, t: Tensor) -> Tensor:
        """What a network that is told the time gets of it."""
        raise NotImplementedError

    def state(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, beta) of the sampler's state alpha x + beta e."""
        return self.coefficients(t)[:2]

    def scale(self, t: Tensor) -> Tensor:
        """z / state."""
        return torch.ones_like(t)

    def round(self, t: Tensor) -> Tensor:
        """The nearest times that the network knows."""
        return t

    def steps(self, sampling: Sampling) -> Tensor:
        """Falling times (N + 1,) of a sampler, from noise to data, float64."""
        raise NotImplementedError


@dataclass(frozen=True)
class FlowMatching(Formulation):
    """z = (1 - t) x + t e, r = e - x, t uniform.

    Args:
        time_scale: of the t that a network is told.
    """

    time_scale: float = 1000.0

    def time(self, draw: Tensor) -> Tensor:
        return draw

    def coefficients(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one, one)

    def embedding(self, t: Tensor) -> Tensor:
        return self.time_scale * t

    def steps(self, sampling: Sampling) -> Tensor:
        return torch.linspace(1, 0, sampling.steps + 1, dtype=torch.float64)


class DiscreteDiffusion(Formulation):
    """Steps t = 0 ... T - 1 of z = sqrt(abar) x + sqrt(1 - abar) e, r = e; t = -1 is the data.

    Args:
        betas: "linear" (DDPM, DDIM) or "cosine" (iDDPM), see :mod:`zoo.ops.diffusion`.
        total: T.
    """

    straight = False

    def __init__(self, betas: str = "linear", total: int = 1000) -> None:
        if betas not in BETAS:
            raise unknown("noise schedule", betas, BETAS)
        self.total = total
        abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - BETAS[betas](total)).cumprod(0)])
        self.a, self.b = abar.sqrt(), (1 - abar).sqrt()

    def time(self, draw: Tensor) -> Tensor:
        return (draw * self.total).floor()

    def coefficients(self, t: Tensor) -> Coefficients:
        place, one = t.long() + 1, torch.ones_like(t)
        return Coefficients(self.a.to(t)[place], self.b.to(t)[place], torch.zeros_like(t), one, one)

    def embedding(self, t: Tensor) -> Tensor:
        return t

    def steps(self, sampling: Sampling) -> Tensor:
        kept = spaced_steps(self.total, sampling.steps)
        return torch.tensor([*kept[::-1], -1], dtype=torch.float64)


class Preconditioned(Formulation):
    """A denoiser of EDM's kind, whose t is the noise level: z = in(t) (x + t e), and D = skip (x + t e) + out r.

    The sampler's state is x + t e.

    Args:
        scheme: its scalings, weight, and noise levels.
        constant_output: the output scaling is 1 at all t; |network - r|^2 keeps its weight.
    """

    def __init__(self, scheme: karras.Preconditioning, constant_output: bool = False) -> None:
        self.scheme, self.constant_output = scheme, constant_output
        self.normal = scheme.normal
        self.outputs = 2 if isinstance(scheme, karras.IDDPM) else 1

    def scalings(self, t: Tensor) -> karras.Scalings:
        found = self.scheme.scalings(t)
        return found._replace(out=torch.ones_like(t)) if self.constant_output else found

    def time(self, draw: Tensor) -> Tensor:
        return self.scheme.sigma(draw)

    def coefficients(self, t: Tensor) -> Coefficients:
        skip, out, scale, _ = self.scalings(t)
        weight = self.scheme.weight(t) * self.scheme.scalings(t).out.square()
        return Coefficients(scale, scale * t, (1 - skip) / out, -t * skip / out, weight)

    def embedding(self, t: Tensor) -> Tensor:
        return self.scheme.scalings(t).noise

    def state(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def scale(self, t: Tensor) -> Tensor:
        return self.scheme.scalings(t).input

    def round(self, t: Tensor) -> Tensor:
        return self.scheme.round(t)

    def steps(self, sampling: Sampling) -> Tensor:
        low, high = self.scheme.range
        low, high = max(low, sampling.sigma_min), min(high, sampling.sigma_max)
        levels = self.round(karras.noise_levels(sampling.steps, low, high, sampling.rho))
        return torch.cat([levels, levels.new_zeros(1)])


def denoising_loss(
    network: Network, formulation: Formulation, x: Tensor, noise: Tensor, t: Tensor, **condition: Any
) -> Tensor:
    """w(t) |network(z) - r|^2 of each element (B, C, S, S), at z = a x + b noise (equation 2)."""
    a, b, c, d, w = (like(value, x) for value in formulation.coefficients(t))
    z = (a * x + b * noise).to(x.dtype)
    return w * (network(z, t, **condition) - (c * x + d * noise)).square()


@dataclass(frozen=True)
class Sampling:
    """A sampler (equation 4).

    Args:
        method: "euler": one evaluation a step, which is DDIM for diffusion; "heun": two, but for the last step.
        steps: N; evaluations are N, or 2 N - 1.
        stochasticity: lambda in [0, 1] of an Euler step: 0 is the ODE (DDIM), 1 the posterior (DDPM's ancestral step).
        sigma_min, sigma_max, rho: noise levels of a preconditioned denoiser, as far as it supports them.
        churn, churn_min, churn_max, churn_noise: EDM's stochastic sampler (its algorithm 2): noise that is added before
            a step, at noise levels within a range, and its scale.

    Raises:
        ZooError: an unknown method, or a value out of range.
    """

    method: Literal["euler", "heun"] = "heun"
    steps: int = 18
    stochasticity: float = 0.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in ("euler", "heun"):
            raise unknown("method", self.method, ("euler", "heun"))
        if self.steps < 2 or not 0 <= self.stochasticity <= 1 or self.churn < 0:
            raise ZooError("a sampler has 2 steps or more, a stochasticity in [0, 1] and a churn of 0 or more")
        if self.stochasticity and self.method == "heun":
            raise ZooError("stochasticity is of the method euler; heun has churn")

    @property
    def noises(self) -> int:
        """How many noises a sample takes besides its start."""
        return self.steps if self.stochasticity or self.churn else 0


def step_coefficients(
    state: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    stochasticity: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(kappa, eta, zeta) of x' = kappa x + eta r + zeta noise (equation 4) from the state alpha x + beta e to another.

    State and target r = c x + d e are two equations for the expected data and noise; the new state is their mixture,
    with the share of noise drawn afresh that DDIM's eta says, here `stochasticity`.

    Args:
        state, target, after: (alpha, beta), (c, d), (alpha', beta').
    """
    (alpha, beta), (c, d), (alpha_, beta_) = state, target, after
    fresh = stochasticity * beta_ * (1 - (alpha * beta_ / (alpha_ * beta)).square()).clamp(min=0).sqrt()
    kept = (beta_.square() - fresh.square()).clamp(min=0).sqrt()
    both = alpha * d - beta * c
    return (alpha_ * d - kept * c) / both, (alpha * kept - alpha_ * beta) / both, fresh


def between(formulation: Formulation, t: Tensor, after: Tensor, share: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients of a formulation's step from t to `after`."""
    target = formulation.coefficients(t)[2:4]
    return step_coefficients(formulation.state(t), target, formulation.state(after), share)


def sample_path(
    predict: Callable[[Tensor, Tensor], Tensor],
    formulation: Formulation,
    noise: Tensor,
    sampling: Sampling,
    noises: Sequence[Tensor] = (),
) -> Iterator[Tensor]:
    """The sampler's states (B, ...) after each step, from standard normal `noise`, in its dtype.

    Args:
        predict: (z, t) to r, both (B, ...) and (B,) in the dtype of `noise`.
        noises: as many as ``sampling.noises``; one a step.
    """
    if sampling.method == "heun" and not formulation.straight:
        raise ZooError("the method heun wants a formulation in continuous time; discrete diffusion takes euler")
    if sampling.churn and not isinstance(formulation, Preconditioned):
        raise ZooError("churn is of preconditioned denoisers")
    times = formulation.steps(sampling).to(noise.device, noise.dtype)
    rate = min(sampling.churn / sampling.steps, math.sqrt(2) - 1)

    def r(x: Tensor, t: Tensor) -> Tensor:
        return predict(x * formulation.scale(t), t.expand(x.shape[0]))

    x = noise * formulation.state(times[0])[1]
    for index, (t, after) in enumerate(pairwise(times)):
        if sampling.churn:
            level = float(t)
            gamma = rate if sampling.churn_min <= level <= sampling.churn_max else 0.0
            raised = formulation.round(t + gamma * t)
            x = x + (raised.square() - t.square()).clamp(min=0).sqrt() * sampling.churn_noise * noises[index]
            t = raised
        kappa, eta, zeta = between(formulation, t, after, sampling.stochasticity)
        ahead = kappa * x + eta * r(x, t)
        if sampling.stochasticity:
            ahead = ahead + zeta * noises[index]
        if sampling.method == "heun" and index < len(times) - 2:
            # The mean of this slope and that at the end, which an Euler step back from there tells.
            kappa, eta, _ = between(formulation, after, t)
            back = kappa * ahead + eta * r(ahead, after)
            ahead = ahead + (x - back) / 2
        x = ahead
        yield x


def _generators(noise: Tensor) -> list[torch.Generator]:
    """One for each sample of `noise` (B, ...), seeded by its content."""
    rows = [row.detach().float().cpu().contiguous().numpy().tobytes() for row in noise]
    return [torch.Generator().manual_seed(zlib.crc32(row)) for row in rows]


def noise_stream(noise: Tensor) -> Iterator[Tensor]:
    """Endless tensors like `noise` (B, ...), each sample's a function of its noise alone; one is held at a time."""
    generators, shape = _generators(noise), noise.shape[1:]
    while True:
        yield torch.stack([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]).to(noise)


def step_noises(noise: Tensor, count: int) -> list[Tensor]:
    """`count` tensors like `noise` (B, ...), each sample's a function of its noise alone."""
    rows = []
    for row, generator in zip(noise, _generators(noise), strict=True):
        rows.append(torch.randn(count, *row.shape, generator=generator, dtype=torch.float32))
    return list(torch.stack(rows, dim=1).to(noise)) if count else []
