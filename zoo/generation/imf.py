"""Improved Mean Flows: On the Challenges of Fastforward Generative Models (iMF).

Zhengyang Geng, Yiyang Lu, Zongze Wu, Eli Shechtman, J. Zico Kolter, Kaiming He. CVPR 2026, arXiv 2512.02012.

MeanFlow regresses the average velocity u on a target that holds the network's own derivative, taken along the noisy
conditional velocity e - x. Improved MeanFlow writes the same identity as a loss on the instantaneous velocity: the
compound V = u + (t - r) stopgrad(du/dt) regresses v, and du/dt is taken along the velocity that the network itself
predicts, a function of z_t alone, so that the loss varies less. That velocity comes from a second head, or, at the
boundary r = t, from u. The guidance scale omega and the interval [t_min, t_max] in which it acts become conditions of
the network, drawn anew for each training sample and free when sampling, still in one evaluation. Conditions enter as
tokens and there is no adaLN, which makes the model a third smaller.

Conventions: x data, e noise, z_t = (1 - t) x + t e, so that the noise is at t = 1 and v = e - x; 0 <= r <= t <= 1 and
h = t - r. Networks are called as network(z, t, h, omega, t_min, t_max, labels, heads) and give a velocity for each
letter of heads; h is all that the transformer sees of the times.

Deviations from the official code, none of which changes a value:
- The Jacobian-vector product is taken of the samples with r < t only, and of what u needs: not of the v-head.
- Of the three network calls behind the guided target (two passes of a doubled batch, then one with omega = 1 outside of
  its interval) one joint pass is left: samples with r = t have the interval [0, 1], and their conditional velocity is
  what the training pass gives; the others need it at the gated omega only; and where omega is 1 or the label is dropped
  the unconditional velocity has no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.generation.meanflow import Loss, MeanFlow
from zoo.nn.autoencoder import PIXELS, SD_SCALE
from zoo.nn.token_dit import TokenDiT, convert_token_dit
from zoo.ops.flow import LinearPath, Path, like
from zoo.ops.guidance import drop_labels, scale_within
from zoo.ops.meanflow import (
    Conditions,
    GuidanceConditions,
    TimePairs,
    adaptive_loss,
    flow_steps,
    forward_derivative,
    power_law,
)
from zoo.training import Optim

__all__ = [
    "LATENT_MEAN",
    "LATENT_STD",
    "Conditions",
    "Errors",
    "GuidanceConditions",
    "GuidedMeanFlow",
    "ImprovedMeanFlow",
    "ImprovedMeanFlowDiT",
    "TimePairs",
    "adaptive_loss",
    "average_and_derivative",
    "convert_official",
    "imf_b2",
    "imf_errors",
    "imf_l2",
    "imf_m2",
    "imf_xl2",
    "power_law",
    "steps",
    "velocity",
]

PATH = LinearPath(noise_at=1)
Tangent = Literal["predicted", "target"]
# Of the four channels of Stable Diffusion's latents as the autoencoder gives them (not times 0.18215), by which the
# official code normalises them.
LATENT_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
LATENT_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)

# ------------------------------------------------------------------------------------------------------- 1. equations


def velocity(network: TokenDiT, z: Tensor, t: Tensor, omega: Tensor, labels: Tensor) -> Tensor:
    """v(z, t) (B, ...), guided by omega (B,) at all times: of the v-head at h = 0, or of u where there is none
    (the boundary variant, Table 1a)."""
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    (v,) = network(z, t, zero, omega, zero, one, labels, heads="v" if network.velocity_head else "u")
    return v


def average_and_derivative(
    network: TokenDiT, z: Tensor, t: Tensor, r: Tensor, given: Conditions, labels: Tensor, tangent: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """u, its derivative du/dt along (dz, dt, dr) = (tangent, 1, 0), and v of the v-head if there is one, all (B, ...).

    In one forward pass; where the network checkpoints its activations, the derivative has a pass of its own.
    """

    def average(z: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        tokens = network.trunk(z, t - r, *given, labels)
        return network.velocity_from(network.head("u", tokens), z, t), tokens

    at, along = (z, t, r), (tangent, torch.ones_like(t), torch.zeros_like(r))
    if network.grad_checkpointing and torch.is_grad_enabled():
        u, tokens = average(*at)
        with torch.no_grad():
            _, derivative, _ = forward_derivative(average, at, along, has_aux=True)
    else:
        u, derivative, tokens = forward_derivative(average, at, along, has_aux=True)
    v = network.velocity_from(network.head("v", tokens), z, t) if network.velocity_head else None
    return u, derivative.detach(), v


class Errors(NamedTuple):
    """Per sample (B,) `u` |V - v_g|^2 and `v` |v - v_g|^2, summed over the picture; without v-head the second has no
    gradient. Besides, the noised `z` (B, ...), its times `t` and `r`, and u(z, r, t) `average` (B, ...)."""

    u: Tensor
    v: Tensor
    z: Tensor
    t: Tensor
    r: Tensor
    average: Tensor


def imf_errors(
    network: TokenDiT,
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    given: Conditions,
    labels: Tensor,
    dropped: Tensor | None = None,
    tangent: Tangent = "predicted",
    path: Path = PATH,
) -> Errors:
    """What the loss of a batch is made of (the loss on v, and guidance as a condition; Tables 1a and 1b).

    The guided velocity v_g = v + (1 - 1/omega) (v(z, t | label) - v(z, t | none)), omega being 1 outside of its
    interval, is what V and the v-head regress.

    Args:
        network: of u and v, or of u alone.
        x: data (B, C, S, S).
        noise: e, likewise.
        t, r: (B,), r <= t.
        given: guidance, (B,) each. Samples with r = t have the interval [0, 1].
        labels: (B,); the network's `num_classes` is "no label".
        dropped: (B,) bool: these train the unconditional velocity, towards the plain v.
        tangent: along which du/dt is taken: the "predicted" conditional velocity, or the "target" v_g, which without
            guidance is MeanFlow's e - x.
        path: between x and noise.
    """
    if tangent not in ("predicted", "target"):
        raise unknown("tangent", tangent, ("predicted", "target"))
    z, v_path = path.interpolate(x, noise, t), path.velocity(x, noise, t)
    dropped = torch.zeros_like(t, dtype=torch.bool) if dropped is None else dropped
    null = network.num_classes
    kept = drop_labels(labels, dropped, null)
    still, apart = (r >= t).nonzero()[:, 0], (r < t).nonzero()[:, 0]
    both = network.velocity_head

    u, v, conditional = torch.empty_like(z), torch.empty_like(z), torch.zeros_like(z)
    if len(still):
        out = network(z[still], t[still], (t - r)[still], *given.at(still), kept[still], heads="uv" if both else "u")
        u, v = u.index_put((still,), out[0].to(u.dtype)), v.index_put((still,), out[-1].to(v.dtype))
        conditional[still] = v.detach()[still]
    with torch.no_grad():
        omega = scale_within(t, given.omega, given.t_min, given.t_max)
        guided = (omega != 1) & ~dropped
        along = apart if tangent == "predicted" else (guided & (r < t)).nonzero()[:, 0]
        without = guided.nonzero()[:, 0]
        rows = torch.cat([along, without])
        if len(rows):
            known = torch.cat([labels[along], torch.full_like(labels[without], null)])
            scale = torch.cat([omega[along], torch.ones_like(omega[without])])
            found = velocity(network, z[rows], t[rows], scale, known).to(z.dtype)
            conditional[along] = found[: len(along)]
            target = v_path.index_put(
                (without,),
                v_path[without] + like(1 - 1 / omega[without], z) * (conditional[without] - found[len(along) :]),
            )
        else:
            target = v_path
    compound = u
    if len(apart):
        moving = conditional if tangent == "predicted" else target
        u_apart, derivative, v_apart = average_and_derivative(
            network, z[apart], t[apart], r[apart], given.at(apart), kept[apart], moving[apart]
        )
        u = u.index_put((apart,), u_apart.to(u.dtype))
        span = like(t - r, z)[apart]
        compound = u.index_put((apart,), (u_apart + span * derivative).to(u.dtype))
        v_apart = conditional[apart] if v_apart is None else v_apart
        v = v.index_put((apart,), v_apart.to(v.dtype))
    v = v if both else v.detach()
    u_error, v_error = ((value - target).square().flatten(1).sum(1) for value in (compound, v))
    return Errors(u_error, v_error, z, t, r, u)


def steps(
    network: TokenDiT,
    z: Tensor,
    labels: Tensor,
    times: Sequence[float] = (1.0, 0.0),
    omega: float = 1.0,
    interval: Sequence[float] = (0.0, 1.0),
) -> Iterator[Tensor]:
    """The states (B, ...) after each step, from noise z over falling `times`, guided by `omega` within `interval`;
    omega 1 is no guidance."""
    given = Conditions.of(omega, interval, z)

    def average(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return network(z, t, t - r, *given, labels, heads="u")[0]

    return flow_steps(average, z, times)


# ---------------------------------------------------------------------------------------------------------- 2. network


class ImprovedMeanFlowDiT(TokenDiT):
    """A transformer of average velocities on Stable Diffusion's latents, or on pixels.

    Args:
        latent_mean, latent_std: of each channel of the latents as the autoencoder gives them, by which they are
            normalised; None: what comes in is modelled as it is.
        omega, interval: guidance of samples, where :meth:`sample` is not told another.
        sizes: of :class:`~zoo.nn.token_dit.TokenDiT`.

    Raises:
        ZooError: as :class:`~zoo.nn.token_dit.TokenDiT`; not a number a channel; an omega below 1, or no interval.
    """

    autoencoder = "sd_vae.ft_mse"

    def __init__(
        self,
        latent_mean: Sequence[float] | None = None,
        latent_std: Sequence[float] | None = None,
        omega: float = 1.0,
        interval: Sequence[float] = (0.0, 1.0),
        **sizes: Any,
    ) -> None:
        super().__init__(**sizes)
        if (latent_mean is None) != (latent_std is None):
            raise ZooError("latent_mean and latent_std go together")
        mean, std = latent_mean or [0.0] * self.in_chans, latent_std or [1.0] * self.in_chans
        if len(mean) != self.in_chans or len(std) != self.in_chans or min(std) <= 0:
            raise ZooError(f"latent_mean and latent_std want a number for each of {self.in_chans} channels")
        if omega < 1 or len(interval) != 2 or not interval[0] <= interval[1]:
            raise ZooError(f"guidance wants an omega of 1 or more and an interval, not {omega} and {list(interval)}")
        self.scaled = latent_mean is not None
        self.register_buffer("latent_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("latent_std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.omega, self.interval = omega, tuple(interval)

    def normalised(self, x: Tensor) -> Tensor:
        """What is modelled (B, C, S, S), of latents times 0.18215 as data modules give them, or of pixels."""
        return (x / SD_SCALE - self.latent_mean) / self.latent_std if self.scaled else x

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        label: Tensor,
        times: Sequence[float] = (1.0, 0.0),
        omega: float | None = None,
        interval: Sequence[float] | None = None,
    ) -> Tensor:
        """Samples like `noise` (B, C, S, S) of classes `label` (B,), latents times 0.18215 or pixels, in as many
        evaluations as `times` has steps; guided by `omega` within `interval`, by default those of the network."""
        omega, interval = self.omega if omega is None else omega, self.interval if interval is None else interval
        if omega < 1:
            raise ZooError(f"guidance wants an omega of 1 or more, not {omega}")
        z = list(steps(self, noise, label, times, omega, interval))[-1]
        return (z * self.latent_std + self.latent_mean) * SD_SCALE if self.scaled else z


# ------------------------------------------------------------------------------------------------------------- 3. tasks


class GuidedMeanFlow(MeanFlow):
    """MeanFlow whose guidance is a condition of the network: the training step of improved MeanFlow, whatever the
    network predicts.

    Batches are as those of :class:`~zoo.generation.meanflow.MeanFlow` with `label` (B,); they may pin `omega_uniform`,
    `t_min_uniform` and `t_max_uniform` (B,) too.

    Logs `error` |V - v_g|^2 and `velocity_error` |v - v_g|^2, and of the samples with r < t alone `compound_error` and
    its mean square, `compound_square` (in evaluation), by which the variance of the loss is known.

    Args:
        network: of :class:`ImprovedMeanFlowDiT`.
        guidance: how scale and interval of a sample are drawn.
        label_dropout: share of samples that train without label; count(draws below it) of them, the first of the batch.
        tangent: of :func:`imf_errors`.
        noise_scale: deviation of the noise; the network's :meth:`sample` knows it.
        path: between data and noise.
        pairs, loss_power, loss_eps, sampling_times, autoencoder, optim: as in
            :class:`~zoo.generation.meanflow.MeanFlow`.
    """

    batch_keys = ("image", "label")
    sampling_options = ("omega", "interval", "steps")

    def __init__(
        self,
        network: ImprovedMeanFlowDiT,
        optim: Optim,
        pairs: TimePairs,
        guidance: GuidanceConditions,
        label_dropout: float,
        tangent: Tangent,
        loss_power: float,
        loss_eps: float,
        sampling_times: Sequence[float],
        autoencoder: str,
        noise_scale: float = 1.0,
        path: Path = PATH,
    ) -> None:
        super().__init__(network, optim, pairs, loss_power, loss_eps, sampling_times, autoencoder)
        if tangent not in ("predicted", "target"):
            raise unknown("tangent", tangent, ("predicted", "target"))
        self.guidance = GuidanceConditions(**guidance) if isinstance(guidance, Mapping) else guidance
        self.label_dropout, self.noise_scale, self.path = label_dropout, noise_scale, path
        self.tangent: Tangent = tangent

    def errors(self, batch: Mapping[str, Any]) -> Errors:
        """What the loss of a batch is made of."""
        noise, t, r = self._draws(batch)
        omega, t_min, t_max = (self.draws(batch, f"{name}_uniform").to(t.dtype) for name in Conditions._fields)
        given = self.guidance.conditions(omega, t_min, t_max, whole=r >= t)
        x, noise = self.network.normalised(batch["image"]), self.noise_scale * noise
        dropped = self._dropped(batch, self.label_dropout)
        return imf_errors(self.network, x, noise, t, r, given, batch["label"], dropped, self.tangent, self.path)

    def total(self, batch: Mapping[str, Any], errors: Errors) -> Tensor:
        """The loss () of the errors of a batch."""
        loss = adaptive_loss(errors.u, self.loss_power, self.loss_eps)
        return loss + adaptive_loss(errors.v, self.loss_power, self.loss_eps) if self.network.velocity_head else loss

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        """The loss of a batch; its errors are |V - v_g|^2 and |v - v_g|^2."""
        errors = self.errors(batch)
        return Loss(self.total(batch, errors), errors.u.detach(), errors.v.detach())

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        errors = self.errors(batch)
        found = {"error": errors.u.detach().mean(), "velocity_error": errors.v.detach().mean()}
        apart = errors.u.detach()[errors.r < errors.t]  # whose curve Figure 3 shows
        for name, value in {**found, "compound_error": apart.mean() if len(apart) else apart.sum()}.items():
            self.log(f"train/{name}", value, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(errors.u))
        return {"loss": self.total(batch, errors), **found}

    def _evaluate(self, stage: str, batch: Mapping[str, Any]) -> None:
        errors = self.errors(batch)
        apart = errors.u[errors.r < errors.t]
        self.tally(f"{stage}/error", errors.u)
        self.tally(f"{stage}/velocity_error", errors.v)
        self.tally(f"{stage}/compound_error", apart)
        self.tally(f"{stage}/compound_square", apart.square())

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        label: Tensor | None = None,
        omega: float | None = None,
        interval: Sequence[float] | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W), about in [-1, 1], of standard normal noise (B, C, S, S) and labels (B,); guided by
        `omega` within `interval`, by default as the network is; in so many equal `steps`, or those of `sampling_times`.
        """
        times = self.sampling_times if steps is None else [1 - k / steps for k in range(steps + 1)]
        return self.autoencoder.decode(self.network.sample(noise.to(self.dtype), label, times, omega, interval))


class ImprovedMeanFlow(GuidedMeanFlow):
    """Improved MeanFlow of a class-conditional transformer: the ImageNet models (Tables 1 to 3).

    Args:
        guidance, label_dropout, tangent, pairs, loss_power, loss_eps, sampling_times, autoencoder, optim: as in
            :class:`GuidedMeanFlow`.
        network: of :class:`ImprovedMeanFlowDiT`; ``velocity_head: false`` is the boundary variant. A recipe takes
            `img_size` and `num_classes` from the data module.
    """

    def __init__(
        self,
        guidance: GuidanceConditions = GuidanceConditions(),  # noqa: B008 (frozen)
        label_dropout: float = 0.1,
        tangent: Tangent = "predicted",
        pairs: TimePairs = TimePairs(equal=0.5),  # noqa: B008
        loss_power: float = 1.0,
        loss_eps: float = 0.01,
        sampling_times: Sequence[float] = (1.0, 0.0),
        autoencoder: str = PIXELS,
        optim: Optim = Optim(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, schedule="constant", warmup_epochs=10),  # noqa: B008
        **network: Any,
    ) -> None:
        super().__init__(
            ImprovedMeanFlowDiT(**network), optim, pairs, guidance, label_dropout, tangent, loss_power, loss_eps,
            sampling_times, autoencoder,
        )  # fmt: skip
        self.save_hyperparameters()


# ----------------------------------------------------------------------------------------------------------- 4. models

# As for sampling: without v-head.
_LATENTS: dict[str, Any] = {"patch_size": 2, "latent_mean": LATENT_MEAN, "latent_std": LATENT_STD}
_LATENTS |= {"velocity_head": False}


def _size(depth: int, dim: int, omega: float, interval: tuple[float, float], overrides: dict[str, Any]) -> Any:
    sizes = {"depth": depth, "embed_dim": dim, "num_heads": dim // 64, "omega": omega, "interval": interval}
    return ImprovedMeanFlowDiT(**{**_LATENTS, **sizes, **overrides})


def imf_b2(**overrides: Any) -> ImprovedMeanFlowDiT:
    """iMF-B/2 on latents of 32 x 32 x 4, without v-head (``velocity_head=True`` has it), guided as its samples were."""
    return _size(12, 768, 8.0, (0.4, 0.65), overrides)


def imf_m2(**overrides: Any) -> ImprovedMeanFlowDiT:
    """iMF-M/2, likewise."""
    return _size(24, 768, 10.5, (0.4, 0.6), overrides)


def imf_l2(**overrides: Any) -> ImprovedMeanFlowDiT:
    """iMF-L/2, likewise."""
    return _size(32, 1024, 10.5, (0.4, 0.6), overrides)


def imf_xl2(**overrides: Any) -> ImprovedMeanFlowDiT:
    """iMF-XL/2, likewise."""
    return _size(48, 1024, 8.0, (0.42, 0.62), overrides)


# ------------------------------------------------------------------------------------------------- 5. official weights


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names, flax or PyTorch, with the v-head (``-full``) or without.

    Raises:
        ZooError: a key of another layout.
    """
    return convert_token_dit(state_dict)
