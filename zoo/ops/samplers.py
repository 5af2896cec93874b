"""From noise to data along a path: ODE solvers and Euler-Maruyama (SiT), by explicit times and noises.

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


# Dormand and Prince's pair of orders 5 and 4: nodes, weights of the stages, weights of the result (whose stage is the
# first of the next step), its difference from order 4, and of the middle of a step.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
_MIDDLE = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)


def dopri5_path(
    velocity: Field, z: Tensor, times: Tensor, atol: float = 1e-6, rtol: float = 1e-3, max_steps: int = 10_000
) -> Iterator[Tensor]:
    """The states at ``times[1:]`` of dz/dt = velocity(z, t), by steps as long as their error allows (SiT's default).

    Dormand-Prince 5(4) with the controller of torchdiffeq (error in the root mean square over the whole batch, steps
    that grow tenfold at most, a quartic between the steps), so that the numbers are those of codes that use it.

    Raises:
        ZooError: the times neither rise nor fall, or more than `max_steps` steps are wanted.
    """
    direction = 1.0 if times[-1] > times[0] else -1.0
    clock = (direction * times.double()).tolist()
    if any(a >= b for a, b in pairwise(clock)):
        raise ZooError("an ODE is solved over times that rise, or that fall")

    def field(z: Tensor, t: float) -> Tensor:
        return direction * velocity(z, torch.full((len(z),), direction * t, dtype=z.dtype, device=z.device))

    def size(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    def mix(slopes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return torch.stack([w * k for w, k in zip(weights, slopes, strict=True) if w]).sum(0)

    t, slope = clock[0], field(z, clock[0])
    tolerance = atol + rtol * z.abs()
    d0, d1 = size(z / tolerance), size(slope / tolerance)
    dt = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    d2 = size((field(z + dt * slope, t + dt) - slope) / tolerance) / dt
    dt = min(100 * dt, max(1e-6, dt * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** 0.2)
    begin, end, polynomial = t, t, [z]  # of the last step
    count = 0
    for wanted in clock[1:]:
        while wanted > end:
            count += 1
            if count > max_steps:
                raise ZooError(
                    f"the ODE takes more than {max_steps} steps: loosen atol and rtol, or take another method"
                )
            slopes = [slope]
            for node, weights in zip(_NODES, _STAGES, strict=True):
                after = z + dt * mix(slopes, weights)
                slopes.append(field(after, t + node * dt))
            tolerance = atol + rtol * torch.maximum(z.abs(), after.abs())
            error = size(dt * mix(slopes, _ERROR) / tolerance)
            if error <= 1:
                middle, first, last = z + dt * mix(slopes, _MIDDLE), dt * slope, dt * slopes[-1]
                polynomial = [
                    z,
                    first,
                    last - 4 * first - 11 * z - 5 * after + 16 * middle,
                    5 * first - 3 * last + 18 * z + 14 * after - 32 * middle,
                    2 * (last - first) - 8 * (after + z) + 16 * middle,
                ]
                begin, end = t, t + dt
                t, z, slope = end, after, slopes[-1]
            least = 1.0 if error < 1 else 0.2
            dt *= 10.0 if error == 0 else min(10.0, max(0.9 / error**0.2, least))
        place = (wanted - begin) / (end - begin)
        state = polynomial[-1]
        for part in polynomial[-2::-1]:
            state = part + place * state
        yield state


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
