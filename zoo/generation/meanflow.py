"""Mean Flows for One-step Generative Modeling.

Zhengyang Geng, Mingyang Deng, Xingjian Bai, J. Zico Kolter, Kaiming He. NeurIPS 2025, arXiv 2505.13447.

Flow matching learns the velocity v of the path from noise to data, and integrates it in many steps. MeanFlow learns the
average velocity u(z, r, t) = 1/(t - r) * integral of v from r to t, whose one step is the whole way. Differentiating
(t - r) u in t gives u = v - (t - r) du/dt with the total derivative du/dt = v . grad_z u + d_t u, which is one
Jacobian-vector product of the network: the target that it regresses, its gradient stopped. No teacher, no curriculum.
Guidance is put into the target, so that a guided sample still takes one evaluation.

Conventions: x data, e noise, z_t = (1 - t) x + t e, so that the noise is at t = 1 and v = e - x; 0 <= r <= t <= 1, and
h = t - r. Networks are called as network(z, (t, h), condition) with unscaled times; the condition is a label for the
transformers (the last row of whose table is "no label") and how a picture was augmented for the U-Net.

Deviations from the official code, none of which changes a value of a network without dropout:
- The Jacobian-vector product is taken of the samples with r < t only. Where r = t its factor is 0.
- Where r = t and the label is kept, the conditional velocity of the guidance is what the network predicts anyway, and
  is not evaluated anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.data.augment import EDMAugment
from zoo.errors import ZooError
from zoo.metrics.generation import to_uint8
from zoo.nn.autoencoder import PIXELS, FrozenAutoencoder, convert_autoencoder, sd_vae
from zoo.nn.dit import SIZES, DiT, convert_dit, flax_to_torch
from zoo.nn.unet import SongUNet, convert_edm
from zoo.ops.flow import LinearPath, like
from zoo.ops.guidance import drop_labels, scale_within
from zoo.ops.meanflow import TimePairs, adaptive_loss, flow_steps, forward_derivative
from zoo.training import BaseModule, Optim
from zoo.training.sampling import draw_samples

__all__ = [
    "ClassConditionalMeanFlow",
    "Guidance",
    "MeanFlow",
    "MeanFlowDiT",
    "MeanFlowUNet",
    "TimePairs",
    "UnconditionalMeanFlow",
    "adaptive_loss",
    "average_velocity",
    "convert_autoencoder",
    "convert_official",
    "meanflow_b2",
    "meanflow_b4",
    "meanflow_l2",
    "meanflow_loss",
    "meanflow_m2",
    "meanflow_unet_cifar10",
    "meanflow_xl2",
    "sd_vae",
    "steps",
    "velocity_and_derivative",
]

PATH = LinearPath(noise_at=1)
Time = Literal["t", "r", "h"]
TIMES: tuple[Time, ...] = ("t", "h")

# ------------------------------------------------------------------------------------------------------- 1. equations


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance in the target (section 4.2; with kappa, equation 21 and Table 5).

    The effective scale is omega / (1 - kappa). With omega 1 and kappa 0 there is none.

    Args:
        omega: weight of the sample's own velocity.
        kappa: weight of the network's conditional velocity.
        t_start, t_end: times within which it acts.
    """

    omega: float = 1.0
    kappa: float = 0.5
    t_start: float = 0.0
    t_end: float = 1.0

    def velocity(self, v: Tensor, unconditional: Tensor, conditional: Tensor | None, t: Tensor) -> Tensor:
        """omega v + (1 - omega - kappa) u(z, t, t) + kappa u(z, t, t, label), (B, ...); plain v outside the interval.

        `conditional` is not wanted where kappa is 0.
        """
        omega = like(scale_within(t, self.omega, self.t_start, self.t_end), v)
        if conditional is None:
            return unconditional + omega * (v - unconditional)
        kappa = like(scale_within(t, self.kappa, self.t_start, self.t_end, otherwise=0.0), v)
        return omega * v + (1 - omega - kappa) * unconditional + kappa * conditional


def _times(network: Any, t: Tensor, r: Tensor) -> list[Tensor]:
    values = {"t": t, "r": r, "h": t - r}
    return [values[name] for name in getattr(network, "times", TIMES)]


def average_velocity(network: Callable[..., Tensor], z: Tensor, t: Tensor, r: Tensor, condition: Any = None) -> Tensor:
    """u(z, r, t) (B, ...): the network at those of t, r and h = t - r that it is conditioned on (Table 1c)."""
    return network(z, _times(network, t, r), condition)


def _velocity_and_acts(
    network: Any, z: Tensor, t: Tensor, r: Tensor, condition: Any, blocks: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    if not blocks:
        return average_velocity(network, z, t, r, condition), []
    return network.forward_intermediates(z, _times(network, t, r), condition, indices=blocks)


def velocity_and_derivative(
    network: Callable[..., Tensor],
    z: Tensor,
    t: Tensor,
    r: Tensor,
    condition: Any,
    velocity: Tensor,
    tangent: tuple[float, float] = (0.0, 1.0),
    blocks: Sequence[int] = (),
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """u, its derivative along (dz, dr, dt) = (velocity, *tangent), and the outputs (B, N, D) of `blocks`. Table 1b has
    wrong tangents.

    In one forward pass, of which u can be differentiated; in two for a network that checkpoints its activations, where
    the second keeps none. Fused attention has no forward-mode derivative, so the written-out kernel is taken.
    """
    dr, dt = (torch.full_like(t, value) for value in tangent)
    if getattr(network, "grad_checkpointing", False) and torch.is_grad_enabled():
        u, acts = _velocity_and_acts(network, z, t, r, condition, blocks)
        with torch.no_grad():
            return u, velocity_and_derivative(network, z, t, r, condition, velocity, tangent)[1], acts
    return forward_derivative(
        lambda z, t, r: _velocity_and_acts(network, z, t, r, condition, blocks),
        (z, t, r),
        (velocity, dt, dr),
        has_aux=True,
    )


class Loss(NamedTuple):
    """The `loss` (), and per sample (B,) the `error` |u - target|^2 that it weighs and |u - v|^2, which is watched;
    with their gradient the outputs `acts` (B, N, D) of the blocks that were asked for."""

    loss: Tensor
    error: Tensor
    velocity_error: Tensor
    acts: Sequence[Tensor] = ()


def meanflow_loss(
    network: Callable[..., Tensor],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    condition: Tensor | None = None,
    guidance: Guidance | None = None,
    null_label: int | None = None,
    dropped: Tensor | None = None,
    power: float = 1.0,
    eps: float = 0.01,
    tangent: tuple[float, float] = (0.0, 1.0),
    blocks: Sequence[int] = (),
) -> Loss:
    """The loss of a batch (sections 4.1 and 4.2).

    Args:
        network: (z, times, condition) to u.
        x: data (B, C, S, S).
        noise: e, likewise.
        t, r: (B,), r <= t.
        condition: labels (B,), or what else the network is conditioned on.
        guidance: None for none.
        null_label: the label of "no label"; wanted by `guidance` and `dropped`.
        dropped: (B,) bool: these train the unconditional velocity, towards the plain v.
        power, eps: of :func:`adaptive_loss`.
        tangent: (dr, dt) of the Jacobian-vector product.
        blocks: of a transformer, those whose outputs are given too, in their order.
    """
    z, v = PATH.interpolate(x, noise, t), PATH.velocity(x, noise, t)
    given = condition
    if dropped is not None and condition is not None and null_label is not None:
        given = drop_labels(condition, dropped, null_label)

    def at(rows: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return z[rows], t[rows], r[rows], None if labels is None else labels[rows]

    still, apart = ((r >= t).nonzero()[:, 0], (r < t).nonzero()[:, 0])
    u = torch.empty_like(z)
    parts: list[tuple[Tensor, list[Tensor]]] = []
    if len(still):
        found, acts = _velocity_and_acts(network, *at(still, given), blocks)
        u = u.index_put((still,), found.to(u.dtype))
        parts.append((still, acts))
    target = v
    if guidance is not None and condition is not None and null_label is not None:
        conditional = None
        with torch.no_grad():
            unconditional = average_velocity(network, z, t, t, torch.full_like(condition, null_label))
            if guidance.kappa > 0:
                conditional = u.detach().clone()
                if len(apart):
                    rows, times, _, labels = at(apart, condition)
                    conditional[apart] = average_velocity(network, rows, times, times, labels).to(u.dtype)
            target = guidance.velocity(v, unconditional, conditional, t)
            if dropped is not None:
                target = torch.where(like(dropped, v), v, target)
    if len(apart):
        moved, derivative, acts = velocity_and_derivative(network, *at(apart, given), target[apart], tangent, blocks)
        u = u.index_put((apart,), moved.to(u.dtype))
        parts.append((apart, acts))
        span = like(t - r, v)[apart]
        target = target.index_put((apart,), target[apart] - span * derivative.detach().to(v.dtype))
    error = (u - target).square().flatten(1).sum(1)
    watched = (u.detach() - v).square().flatten(1).sum(1)
    order = torch.cat([rows for rows, _ in parts]).argsort()
    together = [torch.cat(some)[order] for some in zip(*(acts for _, acts in parts), strict=True)]
    return Loss(adaptive_loss(error, power, eps), error.detach(), watched, together)


def steps(
    network: Callable[..., Tensor], z: Tensor, condition: Any = None, times: Sequence[float] = (1.0, 0.0)
) -> Iterator[Tensor]:
    """The states (B, ...) after each step z - (t - r) u(z, r, t), from noise z over falling `times`; with two times
    there is one step, one evaluation."""
    yield from flow_steps(lambda z, t, r: average_velocity(network, z, t, r, condition), z, times)


# --------------------------------------------------------------------------------------------------------- 2. networks


class MeanFlowDiT(DiT):
    """A transformer of average velocities on Stable Diffusion's latents, or on pixels.

    Args:
        times: which of t, r and h = t - r it is conditioned on (Table 1c).
        options: sizes and blocks, of :class:`~zoo.nn.dit.DiT`.
    """

    autoencoder = "sd_vae.ft_mse"

    def __init__(self, times: Sequence[Time] = TIMES, **options: Any) -> None:
        super().__init__(times=times, pos_embed="fixed", out_chans=None, null_class=True, **options)

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor | None = None, times: Sequence[float] = (1.0, 0.0)) -> Tensor:
        """Samples like `noise` (B, C, S, S) of classes `label` (B,), in as many evaluations as `times` has steps."""
        return list(steps(self, noise, label, times))[-1]


class MeanFlowUNet(SongUNet):
    """An unconditional U-Net of average velocities, on pixels. The defaults are the paper's on CIFAR-10.

    Args:
        img_size: side of the square pictures.
        in_chans: their channels.
        dropout, augment_dim, channel_mult_noise, resample_filter: as in :class:`~zoo.nn.unet.SongUNet`, as are
        options: its other sizes.
    """

    def __init__(
        self,
        img_size: int = 32,
        in_chans: int = 3,
        dropout: float = 0.2,
        augment_dim: int = 6,
        channel_mult_noise: int = 2,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        **options: Any,
    ) -> None:
        super().__init__(
            img_resolution=img_size,
            in_channels=in_chans,
            out_channels=in_chans,
            dropout=dropout,
            augment_dim=augment_dim,
            channel_mult_noise=channel_mult_noise,
            resample_filter=resample_filter,
            num_times=len(TIMES),
            **options,
        )

    @torch.no_grad()
    def sample(self, noise: Tensor, label: None = None, times: Sequence[float] = (1.0, 0.0)) -> Tensor:
        """Samples like `noise` (B, C, S, S), in as many evaluations as `times` has steps."""
        return list(steps(self, noise, None, times))[-1]


# ------------------------------------------------------------------------------------------------------------ 3. tasks


class MeanFlow(BaseModule):
    """Training and sampling, whatever the network; the two tasks below say what it is conditioned on.

    Batches hold `image` (B, C, S, S), pictures in [-1, 1] or scaled latents. They may pin the draws: `noise` (B, C, S,
    S), and (B,) each `noise_t`, `noise_r`, `chance`, `drop`, and for uniform times `mix`, `uniform_t`, `uniform_r`. In
    evaluation, where each sample's draws are its own, pairs are equal and labels dropped by chance, one by one.

    Args:
        network: of (z, times, condition); it samples.
        optim: optimiser and schedule.
        pairs: how times are drawn.
        loss_power, loss_eps: of :func:`adaptive_loss`.
        sampling_times: from 1 to 0; [1, 0] is one step.
        autoencoder: weights of the autoencoder whose latents are modelled, or "pixels".
    """

    batch_keys: Sequence[str] = ("image",)

    def __init__(
        self,
        network: Any,
        optim: Optim,
        pairs: TimePairs,
        loss_power: float,
        loss_eps: float,
        sampling_times: Sequence[float],
        autoencoder: str = PIXELS,
    ) -> None:
        super().__init__(optim)
        if len(sampling_times) < 2 or any(t <= r for t, r in pairwise(sampling_times)):
            raise ZooError(f"sampling_times must fall from the noise at 1 to the data at 0, not {list(sampling_times)}")
        self.network = network
        self.num_classes, self.noise_shape = network.num_classes, network.noise_shape
        # A checkpoint holds declarations as plain mappings.
        self.pairs = TimePairs(**pairs) if isinstance(pairs, Mapping) else pairs
        self.loss_power, self.loss_eps = loss_power, loss_eps
        self.sampling_times = tuple(sampling_times)
        self.autoencoder = FrozenAutoencoder(autoencoder)

    def trainable(self) -> nn.Module:
        return self.network

    def _draws(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(noise, t, r) of a batch."""
        x, pairs, names = batch["image"], self.pairs, ("noise_t", "noise_r", "chance")
        if self.training:
            drawn = [batch.get(name, value) for name, value in zip(names, pairs.noise(len(x), x.device), strict=True)]
        else:  # a sample's pair must not depend on its place in a batch
            pairs, normal = replace(pairs, equal_by="chance"), pairs.distribution == "logit_normal"
            drawn = [self.draws(batch, name, normal=normal and name != "chance") for name in names]
        uniform = [self.draws(batch, name) for name in ("mix", "uniform_t", "uniform_r")] if pairs.uniform else None
        t, r = pairs.pairs(drawn[0], drawn[1], drawn[2], uniform)
        noise = self.draws(batch, "noise", *x.shape[1:], normal=True)
        return noise.to(x.dtype), t.to(x.dtype), r.to(x.dtype)

    def _dropped(self, batch: Mapping[str, Any], share: float) -> Tensor:
        """(B,) bool, which samples lose their label: as many as draws are below `share`, the first of the batch; in
        evaluation those themselves."""
        dropped = self.draws(batch, "drop") < share
        return torch.arange(len(dropped), device=dropped.device) < dropped.sum() if self.training else dropped

    def condition(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the loss of a batch depends on besides: further arguments of :func:`meanflow_loss`."""
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        """The loss of a batch."""
        noise, t, r = self._draws(batch)
        options = {"power": self.loss_power, "eps": self.loss_eps, **self.condition(batch)}
        return meanflow_loss(self.network, batch["image"], noise, t, r, **options)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        out = self.loss(batch)
        error = out.error.mean()
        self.log("train/error", error, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(out.error))
        return {"loss": out.loss, "error": error, "velocity_error": out.velocity_error.mean()}

    def _evaluate(self, stage: str, batch: Mapping[str, Any]) -> None:
        out = self.loss(batch)
        self.tally(f"{stage}/error", out.error)
        self.tally(f"{stage}/velocity_error", out.velocity_error)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("test", batch)

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, H, W), about in [-1, 1], of noise (B, C, S, S) and, for a conditional model, labels (B,)."""
        return self.autoencoder.decode(self.network.sample(noise.to(self.dtype), label, self.sampling_times))

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """A generated picture (B, 3, H, W), uint8, of each sample's class, from noise that its index decides."""
        label = batch["label"] if self.num_classes else None
        pictures = draw_samples(self, batch["index"].tolist(), batch["image"].device, label=label)
        return {"picture": to_uint8(pictures), "index": batch["index"]}


class ClassConditionalMeanFlow(MeanFlow):
    """A transformer conditioned on classes, with guidance in the target: the ImageNet models (Tables 1, 2 and 4).

    Batches hold `label` (B,) too.

    Args:
        guidance: null trains without.
        label_dropout: share of samples that train without label; count(draws below it) of them, the first of the batch.
        tangent: (dr, dt) of the Jacobian-vector product; other than [0, 1] it is wrong on purpose (Table 1b).
        pairs, loss_power, loss_eps, sampling_times, autoencoder, optim: as in :class:`MeanFlow`.
        network: of :class:`MeanFlowDiT`; a recipe takes `img_size` and `num_classes` from the data module.

    Raises:
        ZooError: as :class:`MeanFlow`, or no classes.
    """

    batch_keys = ("image", "label")

    def __init__(
        self,
        guidance: Guidance | None = Guidance(),
        label_dropout: float = 0.1,
        tangent: tuple[float, float] = (0.0, 1.0),
        pairs: TimePairs = TimePairs(),  # noqa: B008 (frozen)
        loss_power: float = 1.0,
        loss_eps: float = 0.01,
        sampling_times: Sequence[float] = (1.0, 0.0),
        autoencoder: str = PIXELS,
        optim: Optim = Optim(lr=1e-4, weight_decay=0.0, schedule="constant"),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        super().__init__(MeanFlowDiT(**network), optim, pairs, loss_power, loss_eps, sampling_times, autoencoder)
        self.save_hyperparameters()
        if self.num_classes < 1:
            raise ZooError("a class-conditional model wants num_classes of 1 or more")
        self.label_dropout, self.tangent = label_dropout, tangent
        self.guidance = Guidance(**guidance) if isinstance(guidance, Mapping) else guidance

    def condition(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        labels = batch["label"]
        dropped = self._dropped(batch, self.label_dropout)
        known = {"guidance": self.guidance, "null_label": self.num_classes, "tangent": self.tangent}
        return {"condition": labels, "dropped": dropped, **known}


class UnconditionalMeanFlow(MeanFlow):
    """The U-Net on pixels, without classes: CIFAR-10 (Table 3).

    Batches may hold `augment` (B, A), which says how pictures were augmented; sampling goes without.

    Args:
        augment: chance of each of EDM's geometric changes in training, whose labels the network sees; 0 for none.
        pairs, loss_power, loss_eps, sampling_times, optim: as in :class:`MeanFlow`.
        network: of :class:`MeanFlowUNet`; a recipe takes `img_size` from the data module.

    Raises:
        ZooError: as :class:`MeanFlow`, or `augment_dim` is not the length of the augmentation's labels.
    """

    def __init__(
        self,
        augment: float = 0.12,
        pairs: TimePairs = TimePairs(mean=-2.0, std=2.0, equal=0.25, equal_by="chance"),  # noqa: B008
        loss_power: float = 0.75,
        loss_eps: float = 1e-3,
        sampling_times: Sequence[float] = (1.0, 0.0),
        optim: Optim = Optim(lr=6e-4, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant", warmup_epochs=200),  # noqa: B008
        **network: Any,
    ) -> None:
        super().__init__(MeanFlowUNet(**network), optim, pairs, loss_power, loss_eps, sampling_times)
        self.save_hyperparameters()
        self.augment = EDMAugment(augment) if augment else None
        if self.augment is not None and self.augment.label_dim != self.network.augment_dim:
            length = self.augment.label_dim
            raise ZooError(f"the augmentation's labels hold {length} numbers: set augment_dim, or augment: 0")

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        if self.augment is not None and "augment" not in batch:
            batch = self.augment(dict(batch))
        return super().training_step(batch, batch_idx)

    def condition(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"condition": batch.get("augment")}


# ---------------------------------------------------------------------------------------------------------- 4. models


def meanflow_b4(**overrides: Any) -> MeanFlowDiT:
    """MF-B/4 on latents of 32 x 32 x 4."""
    return MeanFlowDiT(**{**SIZES["B"], "patch_size": 4, **overrides})


def meanflow_b2(**overrides: Any) -> MeanFlowDiT:
    """MF-B/2 on latents of 32 x 32 x 4."""
    return MeanFlowDiT(**{**SIZES["B"], "patch_size": 2, **overrides})


def meanflow_m2(**overrides: Any) -> MeanFlowDiT:
    """MF-M/2 on latents of 32 x 32 x 4."""
    return MeanFlowDiT(**{**SIZES["M"], "patch_size": 2, **overrides})


def meanflow_l2(**overrides: Any) -> MeanFlowDiT:
    """MF-L/2 on latents of 32 x 32 x 4."""
    return MeanFlowDiT(**{**SIZES["L"], "patch_size": 2, **overrides})


def meanflow_xl2(**overrides: Any) -> MeanFlowDiT:
    """MF-XL/2 on latents of 32 x 32 x 4."""
    return MeanFlowDiT(**{**SIZES["XL"], "patch_size": 2, **overrides})


def meanflow_unet_cifar10(**overrides: Any) -> MeanFlowUNet:
    """The DDPM++ U-Net for CIFAR-10, with labels of augmentation and dropout 0.2."""
    return MeanFlowUNet(**overrides)


# ------------------------------------------------------------------------------------------------ 5. official weights

AVERAGES = ("net_ema", "net_ema1", "net_ema2")


def convert_official(state_dict: Mapping[str, Tensor], average: str = "net_ema1") -> dict[str, Tensor]:
    """A published state dict in our names: flax parameters of the transformers (with or without ``net/``), or the
    PyTorch file of the U-Net, which holds the raw weights `net` and three averages.

    Args:
        average: of the U-Net, the set to take where there is more than `net`: net, net_ema (decay 0.9999), net_ema1
            (0.99995, the published one), net_ema2 (0.9996).

    Raises:
        ZooError: a key that belongs to neither layout.
    """
    if any("/" in key for key in state_dict):
        return _checked(flax_to_torch({key.removeprefix("net/"): value for key, value in state_dict.items()}))
    sets: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        name, _, rest = key.partition(".")
        if key != "num_updates":
            name, rest = (name, rest) if name in ("net", *AVERAGES) else ("net", key)
            sets.setdefault(name, {})[rest] = value
    sets = {name: _checked(found) for name, found in sets.items()}
    if len(sets) == 1:
        return next(iter(sets.values()))
    if average not in sets:
        raise ZooError(f"the checkpoint holds no {average!r}; it has {', '.join(sets) or 'nothing'}")
    if odd := next((name for name, found in sets.items() if found.keys() != sets[average].keys()), None):
        raise ZooError(f"the sets of weights {odd} and {average} of the checkpoint hold different keys")
    return sets[average]


def _checked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    transformer = any(key.startswith("blocks.") for key in state)
    return convert_dit(state, times=("t", "r", "h")) if transformer else convert_edm(state)
