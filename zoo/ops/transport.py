"""SiT's transport: which path, what the network predicts on it, and how samples are drawn (Ma et al. 2024, arXiv
2401.08740).

Noise is at time 0, data at time 1. Near the ends some predictions divide by zero; how far times keep away from them is
that of the official code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.ops.flow import PREDICTIONS, GVPPath, LinearPath, Path, Prediction, VPPath
from zoo.ops.samplers import dopri5_path, ode_path, sde_path, times_between

PATHS: dict[str, type[Path]] = {"linear": LinearPath, "gvp": GVPPath, "vp": VPPath}
ODE = ("dopri5", "euler", "midpoint", "heun", "rk4")
SDE = ("sde_euler", "sde_heun")


@dataclass(frozen=True)
class Transport:
    """What is learnt (sections 2 and 3.1, Tables 1 to 3 of SiT).

    Args:
        path: "linear", "gvp" (generalised variance preserving) or "vp".
        prediction: "velocity", "noise" or "score".
        loss_weight: of noise and score prediction, see :meth:`~zoo.ops.flow.Path.loss`.
        train_eps, sample_eps: how far times keep away from the ends where a prediction is singular there; None: 1e-3,
            but 1e-5 in training on the "vp" path. A velocity on the other two paths is singular nowhere and takes none.

    Raises:
        ZooError: an unknown word.
    """

    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Prediction = "velocity"
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    train_eps: float | None = None
    sample_eps: float | None = None

    def __post_init__(self) -> None:
        for value, kind, known in (
            (self.path, "path", PATHS),
            (self.prediction, "prediction", PREDICTIONS),
            (self.loss_weight, "loss weight", ("none", "velocity", "likelihood")),
        ):
            if value not in known:
                raise unknown(kind, value, known)

    @property
    def interpolant(self) -> Path:
        """The path itself."""
        return PATHS[self.path](noise_at=0)

    def _eps(self, training: bool) -> float:
        if self.path != "vp" and self.prediction == "velocity":
            return 0.0
        given = self.train_eps if training else self.sample_eps
        if given is not None:
            return given
        return 1e-5 if training and self.path == "vp" else 1e-3

    def interval(
        self, training: bool = False, sde: str | None = None, last_step_size: float = 0.0
    ) -> tuple[float, float]:
        """The first and the last time: of training, of an ODE, or of the SDE whose diffusion is of the form `sde`."""
        eps = self._eps(training)
        end = 1 - (last_step_size if sde and last_step_size else eps)
        if self.path == "vp":
            return 0.0, end
        singular = self.prediction != "velocity"
        if not (singular or sde):
            return 0.0, 1.0
        return (eps if singular or sde == "sbdm" else 0.0), end

    def times(self, uniform: Tensor) -> Tensor:
        """Times of training of uniform draws (B,)."""
        start, end = self.interval(training=True)
        return uniform * (end - start) + start

    def loss(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The error (B,) of a network's `output` at z_t."""
        return self.interpolant.loss(self.prediction, output, x, noise, t, self.loss_weight)


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn (section 3.2 of SiT).

    Args:
        method: of the ODE "dopri5" (the official default; its steps are as long as the error of the whole batch allows,
            so that a sample depends, within that error, on the others of its batch), "euler", "midpoint", "heun" or
            "rk4"; of the SDE "sde_euler" (Euler-Maruyama) or "sde_heun".
        steps: of the fixed methods, for the SDE with the last one; of dopri5 the states that are seen. The official
            num_steps counts points: its ODE takes one step less.
        atol, rtol: tolerances of dopri5.
        form, norm: of the SDE's diffusion, see :meth:`~zoo.ops.flow.Path.diffusion`.
        last_step: of the SDE, see :func:`~zoo.ops.samplers.sde_path`; None for none.
        last_step_size: its length.

    Raises:
        ZooError: an unknown method, or too few steps.
    """

    method: Literal["dopri5", "euler", "midpoint", "heun", "rk4", "sde_euler", "sde_heun"] = "dopri5"
    steps: int = 250
    atol: float = 1e-6
    rtol: float = 1e-3
    form: str = "sigma"
    norm: float = 1.0
    last_step: Literal["mean", "tweedie", "euler"] | None = "mean"
    last_step_size: float = 0.04

    def __post_init__(self) -> None:
        if self.method not in (*ODE, *SDE):
            raise unknown("sampler", self.method, (*ODE, *SDE))
        least = 2 if self.method in SDE else 1
        if self.steps < least:
            raise ZooError(f"the sampler {self.method} takes {least} steps or more, not {self.steps}")

    @property
    def kicks(self) -> int:
        """Normal tensors that a sample takes beside the one it starts from."""
        return self.steps - 1 if self.method in SDE else 0

    def states(
        self, network: Callable[[Tensor, Tensor], Tensor], z: Tensor, transport: Transport, kicks: Sequence[Tensor] = ()
    ) -> Iterator[Tensor]:
        """The states (B, ...) after each step from noise z (B, ...) on; the last is data.

        Args:
            network: (z, t) to what `transport` predicts.
            kicks: as many standard normal tensors like z as :attr:`kicks` says.
        """
        path, prediction = transport.interpolant, transport.prediction
        if self.method in SDE:
            size = self.last_step_size if self.last_step else 0.0
            times = times_between(*transport.interval(sde=self.form, last_step_size=size), self.steps - 1, z)
            options: Any = {"form": self.form, "norm": self.norm, "method": self.method.removeprefix("sde_")}
            options |= {"last_step": self.last_step, "last_step_size": self.last_step_size}
            return sde_path(path, prediction, network, z, times, kicks, **options)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            return path.velocity_from(prediction, network(z, t), z, t)

        times = times_between(*transport.interval(), self.steps, z)
        if self.method == "dopri5":
            return dopri5_path(velocity, z, times, self.atol, self.rtol)
        return ode_path(velocity, z, times, self.method)  # type: ignore[arg-type]
