"""From noise to data along a path: fixed-step ODE solvers and Euler-Maruyama (SiT), by explicit times and noises.

Times run from the path's noise to its data, whichever of 0 and 1 that is. Functions of (z, t) get t as a (B,) tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.ops.flow import Path, Prediction

Field = Callable[[Tensor, Tensor], Tensor]
OdeMethod = Literal["euler", "midpoint", "heun", "rk4"]


def _rk4(f: Field, z: Tensor, t: Tensor, dt: Tensor, first: Tensor) -> Tensor:
    """The 3/8 rule."""
    k2 = f(z + dt * first / 3, t + dt / 3)
    k3 = f(z + dt * (k2 - first / 3), t + dt * 2 / 3)
    k4 = f(z + dt * (first - k2 + k3), t + dt)
    return (first + 3 * (k2 + k3) + k4) / 8


# The slope of a step from the one at its beginning.
_SLOPES: dict[str, Callable[[Field, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "euler": lambda f, z, t, dt, first: first,
    "midpoint": lambda f, z, t, dt, first: f(z + dt / 2 * first, t + dt / 2),
    "heun": lambda f, z, t, dt, first: (first + f(z + dt * first, t + dt)) / 2,
    "rk4": _rk4,
}


def _batch(t: Tensor, z: Tensor) -> Tensor:
    return t.expand(len(z))


def times_between(start: float, end: float, steps: int, like: Tensor) -> Tensor:
    """`steps` + 1 evenly spaced times from `start` to `end`, in the dtype and on the device of `like`."""
    if steps < 1:
        raise ZooError(f"a sampler takes 1 step or more, not {steps}")
    return torch.linspace(start, end, steps + 1, dtype=torch.float64).to(like)


def ode_path(velocity: Field, z: Tensor, times: Tensor, method: OdeMethod = "euler") -> Iterator[Tensor]:
    """The states after each step of dz/dt = velocity(z, t) over `times` (N + 1,).

    Evaluations of the network a step: 1 (euler), 2 (midpoint, heun), 4 (rk4).
    """
    if method not in _SLOPES:
        raise unknown("ODE method", method, _SLOPES)

    def field(z: Tensor, t: Tensor) -> Tensor:
        return velocity(z, _batch(t, z))

    for t, after in pairwise(times):
        dt = after - t
        z = z + dt * _SLOPES[method](field, z, t, dt, field(z, t))
        yield z


def sde_path(
    path: Path,
    prediction: Prediction,
    network: Field,
    z: Tensor,
    times: Tensor,
    noises: Sequence[Tensor],
    form: str = "sbdm",
    norm: float = 1.0,
    method: Literal["euler", "heun"] = "euler",
    last_step: Literal["mean", "tweedie", "euler"] | None = "mean",
    last_step_size: float = 0.04,
) -> Iterator[Tensor]:
    """The states after each step of dz = (v + w score) dt + sqrt(2 w) dW (SiT, section 2.4), and the last one.

    Args:
        path, prediction, network: what `network` (z, t) predicts, and along which path; its noise is at 0.
        times: (N + 1,), from noise to where the last step begins.
        noises: N standard normal tensors like z.
        form, norm: of w, see :meth:`Path.diffusion`.
        method: Euler-Maruyama, or Heun.
        last_step: from the last time: the SDE's drift alone ("mean"), Tweedie's formula, the ODE ("euler"), or None.
        last_step_size: its length.
    """
    if path.noise_at != 0:
        raise ZooError("the SDE sampler runs on a path whose noise is at time 0")
    if method not in ("euler", "heun"):
        raise unknown("SDE method", method, ("euler", "heun"))

    def parts(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity, score and w."""
        now = _batch(t, z)
        output = network(z, now)
        velocity = path.velocity_from(prediction, output, z, now)
        return velocity, path.score_from(prediction, output, z, now), path.diffusion(form, z, now, norm)

    def drift(z: Tensor, t: Tensor) -> Tensor:
        velocity, score, w = parts(z, t)
        return velocity + w * score

    for t, after, noise in zip(times[:-1], times[1:], noises, strict=True):
        dt = after - t
        kick = (2 * path.diffusion(form, z, _batch(t, z), norm)).sqrt() * dt.sqrt() * noise
        if method == "euler":
            z = z + dt * drift(z, t) + kick
        else:
            z = z + kick
            first = drift(z, t)
            z = z + dt / 2 * (first + drift(z + dt * first, after))
        yield z
    t = times[-1]
    velocity, score, w = parts(z, t) if last_step is not None else (z, z, z)
    ends: dict[str | None, Callable[[], Tensor]] = {
        None: lambda: z,
        "mean": lambda: z + last_step_size * (velocity + w * score),
        "tweedie": lambda: path.data_from_score(score, z, _batch(t, z)),
        "euler": lambda: z + last_step_size * velocity,
    }
    if last_step not in ends:
        raise unknown("last step", str(last_step), [str(end) for end in ends])
    yield ends[last_step]()
