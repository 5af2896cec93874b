"""Diffusion in discrete steps (Ho et al. 2020; Nichol and Dhariwal 2021), as DiT and its successors train and sample
it: z_t = sqrt(abar_t) x + sqrt(1 - abar_t) e for t = 0 ... T - 1; the noise is at T - 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.ops.flow import like

BETAS: dict[str, Callable[[int], Tensor]] = {
    "linear": lambda steps: torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64),
    "sqrt_linear": lambda steps: torch.linspace(0.0015**0.5, 0.0195**0.5, steps, dtype=torch.float64) ** 2,
    "cosine": lambda steps: _cosine(steps),
}


def _cosine(steps: int) -> Tensor:
    """1 - abar(t + 1) / abar(t), at most 0.999, for abar(s) = cos^2(pi/2 (s + 0.008) / 1.008)."""
    s = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def spaced_steps(total: int, respacing: str | int | Sequence[int]) -> list[int]:
    """Which of `total` steps a shorter sampler keeps, rising.

    Args:
        respacing: a number; numbers of steps for equal sections of the process ("10,15,20"); or "ddimN", every k-th
            step such that N remain.

    Raises:
        ZooError: a section is too short, or no stride gives N steps.
    """
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        wanted = int(respacing.removeprefix("ddim"))
        for every in range(1, total):
            if len(range(0, total, every)) == wanted:
                return list(range(0, total, every))
        raise ZooError(f"no whole stride keeps {wanted} of {total} steps")
    if isinstance(respacing, str):
        counts = [int(part) for part in respacing.split(",")] if respacing else [total]
    else:
        counts = [respacing] if isinstance(respacing, int) else list(respacing)
    kept: set[int] = set()
    start = 0
    for index, count in enumerate(counts):
        size = total // len(counts) + (index < total % len(counts))
        if size < count:
            raise ZooError(f"a section of {size} steps cannot keep {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Added up as the reference does: where a half is rounded, a product may fall on the other side.
        place = 0.0
        for _ in range(count):
            kept.add(start + round(place))
            place += stride
        start += size
    return sorted(kept)


@dataclass(frozen=True)
class Posterior:
    """p(z_{t-1} | z_t) of a model: `mean` and `log_variance`, and the `data` that it expects."""

    mean: Tensor
    log_variance: Tensor
    data: Tensor


class Diffusion:
    """The forward process and its learnt inverse, for a network that predicts noise, or data.

    Args:
        betas: the name of a schedule, or the T values of it.
        steps: T.
        respacing: see :func:`spaced_steps`; the process then has the kept steps only, and the network gets their
            numbers in the full one.
        prediction: what the network predicts.
        variance: "learned_range" (the network has twice the channels; the second half interpolates log variances),
            "fixed_large" (beta) or "fixed_small" (the true posterior's).
    """

    def __init__(
        self,
        betas: str | Tensor = "linear",
        steps: int = 1000,
        respacing: str | int | Sequence[int] = "",
        prediction: Literal["noise", "data"] = "noise",
        variance: Literal["learned_range", "fixed_large", "fixed_small"] = "learned_range",
    ) -> None:
        if isinstance(betas, str):
            if betas not in BETAS:
                raise unknown("noise schedule", betas, BETAS)
            betas = BETAS[betas](steps)
        if prediction not in ("noise", "data") or variance not in ("learned_range", "fixed_large", "fixed_small"):
            raise ZooError(f"unknown prediction {prediction!r} or variance {variance!r}")
        self.prediction, self.variance = prediction, variance
        self.kept = spaced_steps(len(betas), respacing)
        abar = (1 - betas.double()).cumprod(0)[self.kept]
        before = torch.cat([abar.new_ones(1), abar[:-1]])
        self.abar, self.abar_before = abar, before
        gone = abar < torch.finfo(abar.dtype).tiny  # nothing of the data is left, not even a ratio
        given = betas.to(abar) if len(abar) == len(betas) else torch.ones_like(abar)
        self.betas = torch.where(gone, given, 1 - abar / before)
        posterior = self.betas * (1 - before) / (1 - abar)
        # The first posterior variance is 0; its logarithm is that of the second.
        first = posterior[1:2] if len(abar) > 1 else posterior
        self.small_log_variance = torch.cat([first, posterior[1:]]).log()
        self.large_log_variance = torch.cat([first, self.betas[1:]]).log()
        self.mean_of_data = self.betas * before.sqrt() / (1 - abar)
        self.mean_of_z = (1 - before) * (1 - self.betas).sqrt() / (1 - abar)

    def __len__(self) -> int:
        return len(self.abar)

    @staticmethod
    def _at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Entries of a table at steps (B,), shaped to multiply x; rounded to float32, as the official code does."""
        return like(table.to(t.device)[t].float(), x)

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z_t of data x (B, ...) at steps t (B,)."""
        return self._at(self.abar.sqrt(), t, x) * x + self._at((1 - self.abar).sqrt(), t, x) * noise

    def _data(self, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The data that z_t and its noise stand for."""
        return self._at((1 / self.abar).sqrt(), t, z) * z - self._at((1 / self.abar - 1).sqrt(), t, z) * noise

    def _noise(self, data: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The noise that z_t and its data stand for."""
        return (self._at((1 / self.abar).sqrt(), t, z) * z - data) / self._at((1 / self.abar - 1).sqrt(), t, z)

    def network_steps(self, t: Tensor) -> Tensor:
        """The numbers (B,) that a network knows the steps t by: those of the full process."""
        return torch.tensor(self.kept, device=t.device)[t]

    def posterior(self, output: Tensor, z: Tensor, t: Tensor, clip: bool = False) -> Posterior:
        """What a network's `output` at z_t (B, C, ...) says of z_{t-1}; `clip` holds the expected data to [-1, 1]."""
        if self.variance == "learned_range":
            output, range_ = output.chunk(2, dim=1)
            share = (range_ + 1) / 2
            high = self._at(self.betas.log(), t, z)
            log_variance = share * high + (1 - share) * self._at(self.small_log_variance, t, z)
        else:
            fixed = self.large_log_variance if self.variance == "fixed_large" else self.small_log_variance
            log_variance = self._at(fixed, t, z).expand_as(z)
        data = output if self.prediction == "data" else self._data(output, z, t)
        data = data.clamp(-1, 1) if clip else data
        return Posterior(self._posterior_mean(data, z, t), log_variance, data)

    def _posterior_mean(self, data: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self._at(self.mean_of_data, t, z) * data + self._at(self.mean_of_z, t, z) * z

    def losses(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """{"mse", ["vb",] "loss"} (B,) of a network's output at z_t. The variational bound, in bits per dimension,
        trains the variance alone: the mean is held in it (Nichol and Dhariwal 2021)."""
        z, mean = self.noised(x, t, noise), output
        losses = {}
        if self.variance == "learned_range":
            mean, range_ = output.chunk(2, dim=1)
            losses["vb"] = self.variational_bound(torch.cat([mean.detach(), range_], dim=1), x, z, t)
        target = noise if self.prediction == "noise" else x
        losses["mse"] = (mean - target).square().flatten(1).mean(1)
        return {**losses, "loss": losses["mse"] + losses.get("vb", 0.0)}

    def variational_bound(self, output: Tensor, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The bound's term (B,) at t in bits per dimension: KL to the true posterior, and at t = 0 the likelihood of
        8-bit data in [-1, 1]."""
        model = self.posterior(output, z, t)
        true_mean, true_log = self._posterior_mean(x, z, t), self._at(self.small_log_variance, t, x)
        log = model.log_variance
        kl = 0.5 * (log - true_log - 1 + (true_log - log).exp() + (true_mean - model.mean).square() * (-log).exp())
        first = -_log_likelihood_of_bytes(x, model.mean, 0.5 * log)
        return torch.where(t == 0, first.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    def ancestral(
        self, network: Callable[[Tensor, Tensor], Tensor], z: Tensor, noises: Iterable[Tensor], clip: bool = False
    ) -> Iterator[Tensor]:
        """The states of DDPM's sampler from z (B, ...), a step and a noise each; the last step adds none.

        `network` (z, t) gets the steps' numbers in the full process.
        """
        for step, noise in zip(reversed(range(len(self))), noises, strict=True):
            t = torch.full((len(z),), step, device=z.device)
            model = self.posterior(network(z, self.network_steps(t)), z, t, clip)
            z = model.mean if step == 0 else model.mean + (0.5 * model.log_variance).exp() * noise
            yield z

    def ddim(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        z: Tensor,
        noises: Sequence[Tensor],
        eta: float = 0.0,
        clip: bool = False,
    ) -> Iterator[Tensor]:
        """The states of DDIM's sampler (Song et al. 2021, equation 12); `eta` scales its noise."""
        for step, noise in zip(reversed(range(len(self))), noises, strict=True):
            t = torch.full((len(z),), step, device=z.device)
            data = self.posterior(network(z, self.network_steps(t)), z, t, clip).data
            abar, before = self._at(self.abar, t, z), self._at(self.abar_before, t, z)
            epsilon = self._noise(data, z, t)
            sigma = eta * ((1 - before) / (1 - abar)).sqrt() * (1 - abar / before).sqrt()
            z = before.sqrt() * data + (1 - before - sigma.square()).sqrt() * epsilon
            if step:
                z = z + sigma * noise
            yield z


def _log_likelihood_of_bytes(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probabilities, in nats, of 8-bit values in [-1, 1] under a Gaussian cut into 256 cells; the tanh
    approximation of its distribution function."""

    def cdf(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    inverse = (-log_std).exp()
    upper, lower = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    least = 1e-12
    inner = (upper - lower).clamp(min=least).log()
    edge = torch.where(x > 0.999, (1 - lower).clamp(min=least).log(), inner)
    return torch.where(x < -0.999, upper.clamp(min=least).log(), edge)
