"""What the MeanFlow family shares: time pairs, guidance as a condition, the derivative along the flow, the adaptive
weight, and the sampler. r <= t, noise at t = 1, and u(z, r, t) is the average velocity between them.

MeanFlow is Geng et al. 2025 (arXiv 2505.13447), improved MeanFlow (iMF) arXiv 2512.02012, pixel MeanFlow (pMF) arXiv
2601.22158.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.errors import ZooError, unknown
from zoo.ops.flow import logit_normal


@dataclass(frozen=True)
class TimePairs:
    """How the pairs r <= t of training are drawn (MeanFlow, section 4.3, Tables 1a and 1d).

    Args:
        distribution: of t and r: "logit_normal" or "uniform".
        mean, std: of the logit-normal.
        mean_r, std_r: of r, where they differ from those of t.
        equal: share of the samples with r = t.
        equal_by: these are the first of a batch ("count": int(equal * B) of them, the ImageNet code), or drawn one by
            one ("chance", the CIFAR-10 code).
        order: where the draws come as r > t, they are swapped ("sort"), or r is set to t ("clamp": the improved sampler
            of the CIFAR-10 code, v1). "equal_first" sorts too, but sets r to t before it: those samples keep the
            distribution of t, and not that of the greater of two (pMF).
        uniform: share of the samples whose t and r are uniform, whatever the distribution (pMF).

    Raises:
        ZooError: an unknown word, or a share outside [0, 1].
    """

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = -0.4
    std: float = 1.0
    mean_r: float | None = None
    std_r: float | None = None
    equal: float = 0.75
    equal_by: Literal["count", "chance"] = "count"
    order: Literal["sort", "clamp", "equal_first"] = "sort"
    uniform: float = 0.0

    def __post_init__(self) -> None:
        words = {
            "distribution": ("logit_normal", "uniform"),
            "equal_by": ("count", "chance"),
            "order": ("sort", "clamp", "equal_first"),
        }
        for kind, known in words.items():
            if (value := getattr(self, kind)) not in known:
                raise unknown(kind, value, known)
        if not 0 <= self.equal <= 1:
            raise ZooError(f"the share of samples with r = t must be in [0, 1], not {self.equal}")
        if not 0 <= self.uniform <= 1:
            raise ZooError(f"the share of samples with uniform times must be in [0, 1], not {self.uniform}")

    def noise(self, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh draws (B,) for :meth:`pairs`."""
        draw = torch.randn if self.distribution == "logit_normal" else torch.rand
        return draw(count, device=device), draw(count, device=device), torch.rand(count, device=device)

    def pairs(
        self,
        noise_t: Tensor,
        noise_r: Tensor,
        chance: Tensor | None = None,
        uniform: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(t, r), (B,) each, of draws (B,): standard normal, or uniform, for t and r; uniform ones by which, with
        `equal_by` "chance", r becomes t; and, where a share has uniform times, three uniform ones: by the first of
        them a sample takes the others for t and r."""
        t, r = noise_t, noise_r
        if self.distribution == "logit_normal":
            t = logit_normal(t, self.mean, self.std)
            mean_r = self.mean if self.mean_r is None else self.mean_r
            r = logit_normal(r, mean_r, self.std if self.std_r is None else self.std_r)
        if self.uniform:
            if uniform is None:
                raise ZooError("pairs of which a share is uniform want the draws for it")
            t, r = (
                torch.where(uniform[0] < self.uniform, new, old) for new, old in zip(uniform[1:], (t, r), strict=True)
            )
        if self.equal_by == "count":
            equal = torch.arange(len(t), device=t.device) < int(len(t) * self.equal)
        elif chance is None:
            raise ZooError("pairs that are equal by chance want the draws for it")
        else:
            equal = chance < self.equal
        if self.order == "equal_first":
            r = torch.where(equal, t, r)
        t, r = t if self.order == "clamp" else torch.maximum(t, r), torch.minimum(t, r)
        return t, torch.where(equal, t, r)


class Conditions(NamedTuple):
    """What a network is told of its guidance, (B,) each: the scale omega >= 1, and the times between which it acts."""

    omega: Tensor
    t_min: Tensor
    t_max: Tensor

    def at(self, rows: Tensor) -> Conditions:
        return Conditions(*(value[rows] for value in self))

    @classmethod
    def of(cls, omega: float, interval: Sequence[float], like: Tensor) -> Conditions:
        """The same for every sample of a batch `like` (B, ...)."""
        numbers = (omega, *interval)
        return cls(*(torch.full((like.shape[0],), value, dtype=like.dtype, device=like.device) for value in numbers))


def power_law(uniform: Tensor, greatest: float, beta: float = 1.0) -> Tensor:
    """Scales in [1, greatest] of density in proportion to omega^-beta, from `uniform` draws (iMF)."""
    if beta == 1:
        return greatest**uniform
    return (1 + uniform * (greatest ** (1 - beta) - 1)) ** (1 / (1 - beta))


@dataclass(frozen=True)
class GuidanceConditions:
    """How the guidance scale and interval of a training sample are drawn (iMF, Table 1b).

    t_min is uniform in [0, 1/2], t_max in [1/2, 1]; samples with r = t have the whole of [0, 1].

    Args:
        omega_max: greatest scale; 1 trains without guidance.
        beta: of the power law omega^-beta.
        interval: whether the interval is drawn, or always [0, 1].

    Raises:
        ZooError: `omega_max` below 1.
    """

    omega_max: float = 8.0
    beta: float = 1.0
    interval: bool = True

    def __post_init__(self) -> None:
        if self.omega_max < 1:
            raise ZooError(f"omega_max is 1 (no guidance) or more, not {self.omega_max}")

    def conditions(self, omega: Tensor, t_min: Tensor, t_max: Tensor, whole: Tensor) -> Conditions:
        """Of uniform draws (B,); `whole` (B,) bool: these act at all times."""
        if not self.interval:
            whole = torch.ones_like(whole)
        low, high = torch.where(whole, 0, 0.5 * t_min), torch.where(whole, 1, 0.5 + 0.5 * t_max)
        return Conditions(power_law(omega, self.omega_max, self.beta), low, high)


def forward_derivative(
    function: Callable[..., Any], at: Sequence[Tensor], direction: Sequence[Tensor], has_aux: bool = False
) -> Any:
    """`torch.func.jvp`: the value of `function`, which can be differentiated, its derivative along `direction`, and
    what else it gives with `has_aux`. Fused attention has no forward-mode derivative: the written-out kernel is taken.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, tuple(at), tuple(direction), has_aux=has_aux)


def adaptive_loss(error: Tensor, power: float = 1.0, eps: float = 0.01) -> Tensor:
    """The mean of error / (error + eps)^power, the weight's gradient stopped (MeanFlow, section 4.3, Table 1e). A power
    of 0 is plain L2; at 1 the loss is about 1 whatever the error."""
    return (error / (error.detach() + eps) ** power).mean()


def flow_steps(
    average_velocity: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, times: Sequence[float] = (1.0, 0.0)
) -> Iterator[Tensor]:
    """The states (B, ...) after each step z - (t - r) u(z, t, r), from noise z over falling `times`; with two times
    there is one step, one evaluation."""
    for t, r in pairwise(times):
        now, then = (torch.full((z.shape[0],), value, dtype=z.dtype, device=z.device) for value in (t, r))
        z = z - (t - r) * average_velocity(z, now, then)
        yield z
