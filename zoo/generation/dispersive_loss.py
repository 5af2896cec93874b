"""Diffuse and Disperse: Image Generation with Representation Regularization.

Runqian Wang, Kaiming He. 2025, arXiv 2506.09027.

A diffusion model learns by regression alone. Dispersive loss adds one term on what a block inside it computes of a
batch: the outputs z_i of different samples push each other apart, as the negatives of a contrastive loss do. There are
no positive pairs, for the regression's target ties each sample already; so there is no second view, no projection head
and no further parameter. L = mean_i L_diff(x_i) + lambda * L_disp({z_i}).

It is added here to three things: SiT (the paper's main model; :mod:`zoo.ops.transport`), DiT
(:mod:`zoo.ops.diffusion`) and MeanFlow (:mod:`zoo.generation.meanflow`).

Conventions: x data, e noise. SiT: z_t = t x + (1 - t) e, so that the noise is at t = 0 and v = x - e; t in [0, 1]
enters the network as it is. DiT: steps 0 to T - 1, the noise at the last. MeanFlow's noise is at t = 1.

The released code was read, and run, from a copy of it (whaletech-ai/Disperse-Loss@eb6550e), whose loss is the one that
the authors' README shows.

Deviations from that code, none of which changes a value but by rounding:
- Distances come from the products of the centred outputs: B^2 F operations in one product of matrices, where pdist
  takes as many, one by one, and its backward pass as many again.
- The covariances of F features, F^2 of them, come from the same B^2 products.
- The loss is computed in float32 at least, whatever the precision of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from zoo.errors import ZooError, unknown
from zoo.generation.meanflow import ClassConditionalMeanFlow, Loss
from zoo.metrics.generation import to_uint8
from zoo.metrics.spread import PairwiseDistance
from zoo.nn.autoencoder import PIXELS, FrozenAutoencoder
from zoo.nn.dit import SIZES, DiT, convert_dit
from zoo.ops.collective import gather_with_grad
from zoo.ops.diffusion import Diffusion
from zoo.ops.guidance import drop_labels, guided
from zoo.ops.samplers import Field
from zoo.ops.transport import Sampler, Transport
from zoo.training import BaseModule, Optim
from zoo.training.sampling import draw_samples

__all__ = [
    "DiTTraining",
    "DiTWithVariance",
    "Dispersive",
    "DispersiveMeanFlow",
    "SiT",
    "SiTTraining",
    "convert_official",
    "covariance_loss",
    "dispersive_loss",
    "hinge_loss",
    "infonce_loss",
    "sit_b2",
    "sit_l2",
    "sit_s2",
    "sit_xl2",
    "squared_distances",
]

Form = Literal["infonce_l2", "infonce_cosine", "hinge", "covariance"]
FORMS: tuple[Form, ...] = ("infonce_l2", "infonce_cosine", "hinge", "covariance")

# ------------------------------------------------------------------------------------------------------- 1. equations


def squared_distances(z: Tensor) -> Tensor:
    """|z_i - z_j|^2 (B, B) of z (B, F), with zeros where i = j."""
    z = z - z.mean(dim=0)  # the distances stay, and less is lost where they are small beside the vectors
    products = z @ z.T
    squares = products.diagonal()
    return squares[:, None] + squares - 2 * products


def infonce_loss(distances: Tensor, temperature: float) -> Tensor:
    """log mean_ij exp(-D_ij / temperature) of distances (B, B), all ordered pairs and those with i = j (equation 6).

    At most 0, and not below -log B: the B pairs with i = j stay.
    """
    return (-distances / temperature).flatten().logsumexp(0) - math.log(distances.numel())


def hinge_loss(distances: Tensor, margin: float) -> Tensor:
    """mean_ij max(0, margin - D_ij)^2 of distances (B, B)."""
    return (margin - distances).clamp_min(0).square().mean()


def covariance_loss(z: Tensor) -> Tensor:
    """sum of Cov_mn^2 over m != n, Cov (F, F) the covariance of the features of z (B, F), with B - 1.

    Of the F^2 covariances only B^2 products are formed: the sum of all their squares is that of the squared products of
    the centred rows.

    Raises:
        ZooError: fewer than two samples.
    """
    if len(z) < 2:
        raise ZooError("a covariance wants two samples or more in a batch")
    z = z - z.mean(dim=0)
    every = (z @ z.T).square().sum()
    return (every - z.square().sum(dim=0).square().sum()) / (len(z) - 1) ** 2


def dispersive_loss(
    z: Tensor,
    form: Form = "infonce_l2",
    temperature: float = 1.0,
    margin: float = 1.0,
    per_dim: bool = True,
    unit: bool = False,
) -> Tensor:
    """L_disp (), in float32 at least, of the outputs z (B, ...) of one block, each flattened (Table 1).

    Args:
        z: they all have a gradient; nothing is stopped.
        form: "infonce_l2", "infonce_cosine" (D = -cosine), "hinge" or "covariance".
        temperature: of the two InfoNCE forms.
        margin: of the hinge.
        per_dim: divide squared distances, and the sum of squared covariances, by the number of features, as the
            released code does with the former; without it the loss of wide outputs is -log B and has no gradient.
        unit: bring each z_i to length 1 first.

    Raises:
        ZooError: an unknown form.
    """
    if form not in FORMS:
        raise unknown("form of dispersive loss", form, FORMS)
    kind = z.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        z = z.to(torch.promote_types(z.dtype, torch.float32)).flatten(1)
        if unit or form == "infonce_cosine":
            z = normalize(z, dim=1)
        if form == "infonce_cosine":
            return infonce_loss(-(z @ z.T), temperature)
        share = 1 / z.shape[1] if per_dim else 1.0
        if form == "covariance":
            return covariance_loss(z) * share
        distances = squared_distances(z) * share
        return infonce_loss(distances, temperature) if form == "infonce_l2" else hinge_loss(distances, margin)


@dataclass(frozen=True)
class Dispersive:
    """The term that is added: how much of it, of which form, on which blocks, over which samples.

    The defaults are the released PyTorch code's; the paper's JAX runs have weight 0.5, temperature 0.5 and the block
    depth // 4, over 16 samples. The loss depends on how many samples meet, also by the share 1 / B of the pairs i = j:
    accumulating batches is not the same as one larger batch.

    Args:
        weight: lambda; 0 leaves the term out, and evaluation still measures `blocks`.
        form, temperature, margin, per_dim, unit: of :func:`dispersive_loss`.
        blocks: numbers of blocks from 0, or from the end by -1, -2, ...; null for all. The mean over several is taken.
        over: "process": the samples of each process apart, as released; "all": the samples of all processes meet.

    Raises:
        ZooError: a value out of range.
    """

    weight: float = 0.25
    form: Form = "infonce_l2"
    temperature: float = 1.0
    margin: float = 1.0
    blocks: Sequence[int] | None = (-1,)
    per_dim: bool = True
    unit: bool = False
    over: Literal["process", "all"] = "process"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("form of dispersive loss", self.form, FORMS)
        if self.over not in ("process", "all"):
            raise unknown("reach of dispersive loss", self.over, ("process", "all"))
        if self.weight < 0 or self.temperature <= 0:
            raise ZooError("dispersive loss wants a weight of 0 or more and a temperature above 0")

    def places(self, depth: int) -> list[int]:
        """`blocks` counted from the front, in their order, of a network of `depth` of them.

        Raises:
            ZooError: a block that is not there.
        """
        blocks = range(depth) if self.blocks is None else self.blocks
        if not blocks or not all(-depth <= block < depth for block in blocks):
            raise ZooError(f"dispersive loss wants blocks of 0 to {depth - 1}, not {list(blocks)}")
        return sorted({block % depth for block in blocks})

    def __call__(self, acts: Sequence[Tensor]) -> Tensor:
        """weight * L_disp () of the outputs (B, ...) of the blocks."""
        options: dict[str, Any] = {name: getattr(self, name) for name in ("temperature", "margin", "per_dim", "unit")}
        parts = [dispersive_loss(gather_with_grad(z) if self.over == "all" else z, self.form, **options) for z in acts]
        return self.weight * torch.stack(parts).mean()


def declared(dispersive: Dispersive | Mapping[str, Any] | None) -> Dispersive | None:
    """What a checkpoint holds as a plain mapping."""
    return Dispersive(**dispersive) if isinstance(dispersive, Mapping) else dispersive


# ---------------------------------------------------------------------------------------------------------- 2. network


class SiT(DiT):
    """SiT's transformer, on Stable Diffusion's latents or on pixels.

    Args:
        learn_sigma: the last layer has twice the channels, of which the first half is the output; published weights
            have it, no loss sees the other half.
        options: sizes and blocks, of :class:`~zoo.nn.dit.DiT`.
    """

    autoencoder = "sd_vae.ft_ema"

    def __init__(self, learn_sigma: bool = True, in_chans: int = 4, **options: Any) -> None:
        super().__init__(in_chans=in_chans, out_chans=2 * in_chans if learn_sigma else in_chans, **options)

    def _end(self, x: Tensor, c: Tensor) -> Tensor:
        return super()._end(x, c)[:, : self.in_chans]


class DiTWithVariance(DiT):
    """DiT's transformer: of the output's channels the first half is noise, the other says where in its range each
    variance is.

    Args:
        options: sizes and blocks, of :class:`~zoo.nn.dit.DiT`.
    """

    def __init__(self, in_chans: int = 4, **options: Any) -> None:
        super().__init__(in_chans=in_chans, out_chans=2 * in_chans, **options)


# ------------------------------------------------------------------------------------------------------------ 3. tasks


class Errors(NamedTuple):
    """The network's `output` (B, C, S, S), its `error` (B,) and the outputs `acts` (B, N, D) of the blocks."""

    output: Tensor
    error: Tensor
    acts: Sequence[Tensor]


class _DispersedTraining(BaseModule):
    """Training of a class-conditional transformer, whatever its objective; the two tasks below say that.

    Batches hold `image` (B, C, S, S), pictures in [-1, 1] or scaled latents, and `label` (B,). They may pin the draws:
    `noise` (B, C, S, S), and uniform ones (B,) `t` and `drop`. Evaluation logs the error without the added term, and of
    the first block of `dispersive` the mean squared distance between its outputs for two samples, and their mean
    square, a feature: `val/dispersion` and `val/feature_power`.
    """

    batch_keys = ("image", "label")
    sampling_options: Sequence[str] = ("guidance",)

    def __init__(
        self,
        network: DiT,
        dispersive: Dispersive | None,
        label_dropout: float,
        guidance: float,
        guided_channels: int | None,
        autoencoder: str,
        optim: Optim,
    ) -> None:
        super().__init__(optim)
        if network.num_classes < 1:
            raise ZooError("a class-conditional model wants num_classes of 1 or more")
        if (label_dropout or guidance != 1) and not network.null_class:
            raise ZooError("dropped labels and guidance want a network with null_class")
        self.network, self.num_classes = network, network.num_classes
        self.dispersive = declared(dispersive)
        self.label_dropout, self.guidance, self.guided_channels = label_dropout, guidance, guided_channels
        self.autoencoder = FrozenAutoencoder(autoencoder)
        self.blocks: list[int] = []
        if self.dispersive is not None:
            self.blocks = self.dispersive.places(len(network.blocks))
            self.meets = self.dispersive.over == "all" and self.dispersive.weight > 0
            features = network.embed_dim * (math.prod(network.x_embedder.grid) + network.context_tokens)
            self.val_dispersion, self.test_dispersion = PairwiseDistance(features), PairwiseDistance(features)

    def trainable(self) -> nn.Module:
        return self.network

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of one sample's noise: (C, S, S), or (1 + K, C, S, S) where the sampler takes K more on its way."""
        shape = self.network.noise_shape
        return (1 + self.kicks, *shape) if self.kicks else shape

    @property
    def kicks(self) -> int:
        """Further noises that the sampler takes."""
        raise NotImplementedError

    def _objective(self, x: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Callable[..., Tensor]]:
        """Noised x, the times as the network takes them, and the error (B,) of its output."""
        raise NotImplementedError

    def _sample(self, network: Field, z: Tensor, kicks: Sequence[Tensor], **options: Any) -> Tensor:
        """Data (B, C, S, S) by a network (z, t); options are of `sampling_options`."""
        raise NotImplementedError

    def errors(self, batch: Mapping[str, Any]) -> Errors:
        """What the losses of a batch are made of."""
        x, labels, network = batch["image"], batch["label"], self.network
        noise = self.draws(batch, "noise", *x.shape[1:], normal=True).to(x.dtype)
        z, t, error = self._objective(x, noise, self.draws(batch, "t"))
        if self.training and self.label_dropout:
            labels = drop_labels(labels, self.draws(batch, "drop") < self.label_dropout, self.num_classes)
        if self.blocks and not (self.training and self.dispersive is not None and not self.dispersive.weight):
            output, acts = network.forward_intermediates(z, t, labels, indices=self.blocks)
        else:
            output, acts = network(z, t, labels), []
        return Errors(output, error(output), acts)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        out = self.errors(batch)
        error, options = out.error.mean(), {"on_step": True, "on_epoch": True, "sync_dist": True}
        self.log("train/error", error, batch_size=len(out.error), **options)
        if self.dispersive is None or not self.dispersive.weight:
            return {"loss": error, "error": error.detach()}
        added = self.dispersive(out.acts)
        self.log("train/dispersive", added, batch_size=len(out.error), **options)
        return {"loss": error + added, "error": error.detach(), "dispersive": added.detach()}

    def _evaluate(self, stage: str, batch: Mapping[str, Any]) -> None:
        out = self.errors(batch)
        self.tally(f"{stage}/error", out.error)
        if out.acts:
            z = out.acts[0].flatten(1).float()
            self.tally(f"{stage}/feature_power", z.square().mean(1))
            getattr(self, f"{stage}_dispersion").update(z)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _log_dispersion(self, stage: str) -> None:
        if self.dispersive is not None:
            metric = getattr(self, f"{stage}_dispersion")
            self.log(f"{stage}/dispersion", metric.compute().float())
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._log_dispersion("val")

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._log_dispersion("test")

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor, guidance: float | None = None, **options: Any) -> Tensor:
        """Pictures (B, 3, H, W), about in [-1, 1], of noise (B, *noise_shape) and labels (B,).

        Args:
            noise, label: of the samples.
            guidance: the scale; None: the task's.
            options: others of `sampling_options`.
        """
        guidance = self.guidance if guidance is None else guidance
        first, *kicks = noise.to(self.dtype).unbind(1) if self.kicks else (noise.to(self.dtype),)
        call: Callable[..., Tensor] = self.network
        if guidance != 1:
            call = guided(call, guidance, self.num_classes, self.guided_channels)
        return self.autoencoder.decode(self._sample(lambda z, t: call(z, t, label), first, kicks, **options))

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """A generated picture (B, 3, H, W), uint8, of each sample's class, from noise that its index decides."""
        pictures = draw_samples(self, batch["index"].tolist(), batch["image"].device, label=batch["label"])
        return {"picture": to_uint8(pictures), "index": batch["index"]}


class SiTTraining(_DispersedTraining):
    """SiT, with dispersive loss or without (null).

    Args:
        transport: path and prediction.
        dispersive: the added term.
        label_dropout: chance of each sample to train without label.
        sampler: how samples are drawn.
        guidance: scale of classifier-free guidance; 1 for none.
        guided_channels: the first channels that it acts on, 3 in the official code; null for all.
        autoencoder: weights of the autoencoder whose latents are modelled, or "pixels".
        optim: optimiser and schedule.
        network: of :class:`SiT`; a recipe takes `img_size` and `num_classes` from the data module.

    Raises:
        ZooError: no classes, a block that is not there, or guidance without null label.
    """

    sampling_options = ("guidance", "method", "steps", "atol", "rtol")

    def __init__(
        self,
        transport: Transport = Transport(),  # noqa: B008 (frozen)
        dispersive: Dispersive | None = Dispersive(),
        label_dropout: float = 0.1,
        sampler: Sampler = Sampler(),  # noqa: B008
        guidance: float = 1.0,
        guided_channels: int | None = 3,
        autoencoder: str = PIXELS,
        optim: Optim = Optim(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant"),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        super().__init__(SiT(**network), dispersive, label_dropout, guidance, guided_channels, autoencoder, optim)
        self.save_hyperparameters()
        self.transport = Transport(**transport) if isinstance(transport, Mapping) else transport
        self.sampler = Sampler(**sampler) if isinstance(sampler, Mapping) else sampler

    @property
    def kicks(self) -> int:
        return self.sampler.kicks

    def _objective(self, x: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Callable[..., Tensor]]:
        t = self.transport.times(uniform).to(x.dtype)
        z = self.transport.interpolant.interpolate(x, noise, t)
        return z, t, lambda output: self.transport.loss(output, x, noise, t)

    def _sample(self, network: Field, z: Tensor, kicks: Sequence[Tensor], **options: Any) -> Tensor:
        sampler = replace(self.sampler, **options)
        if sampler.kicks != self.kicks:
            raise ZooError(f"samples that start from {1 + self.kicks} noises each cannot be drawn by {options}")
        *_, state = sampler.states(network, z, self.transport, kicks)
        return state


class DiTTraining(_DispersedTraining):
    """DiT, which predicts the noise and the variance of 1000 steps, with dispersive loss or without (null).

    Args:
        sampling_steps: of the reverse process.
        dispersive, label_dropout, guidance, guided_channels, autoencoder, optim: as in :class:`SiTTraining`.
        network: of :class:`DiTWithVariance`; a recipe takes `img_size` and `num_classes` from the data module.

    Raises:
        ZooError: as :class:`SiTTraining`.
    """

    def __init__(
        self,
        sampling_steps: int = 250,
        dispersive: Dispersive | None = Dispersive(),
        label_dropout: float = 0.1,
        guidance: float = 1.0,
        guided_channels: int | None = 3,
        autoencoder: str = PIXELS,
        optim: Optim = Optim(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant"),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        trunk = DiTWithVariance(**network)
        super().__init__(trunk, dispersive, label_dropout, guidance, guided_channels, autoencoder, optim)
        self.save_hyperparameters()
        self.diffusion, self.reverse = Diffusion("linear"), Diffusion("linear", respacing=sampling_steps)

    @property
    def kicks(self) -> int:
        return len(self.reverse)

    def _objective(self, x: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Callable[..., Tensor]]:
        t = (uniform * len(self.diffusion)).long()
        return self.diffusion.noised(x, t, noise), t, lambda out: self.diffusion.losses(out, x, noise, t)["loss"]

    def _sample(self, network: Field, z: Tensor, kicks: Sequence[Tensor], **options: Any) -> Tensor:
        *_, state = self.reverse.ancestral(network, z, kicks)
        return state


class DispersiveMeanFlow(ClassConditionalMeanFlow):
    """MeanFlow's transformer, with dispersive loss.

    Args:
        dispersive: the added term.
        options: of :class:`~zoo.generation.meanflow.ClassConditionalMeanFlow`.

    Raises:
        ZooError: as that one, or a block that is not there.
    """

    def __init__(self, dispersive: Dispersive = Dispersive(), **options: Any) -> None:
        super().__init__(**options)
        self.save_hyperparameters()
        self.dispersive = Dispersive(**dispersive) if isinstance(dispersive, Mapping) else dispersive
        self.blocks = self.dispersive.places(len(self.network.blocks))
        self.meets = self.dispersive.over == "all"

    def condition(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().condition(batch), "blocks": self.blocks if self.training else ()}

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        """MeanFlow's loss; in training with the term added."""
        out = super().loss(batch)
        if not out.acts:
            return out
        added = self.dispersive(out.acts)
        if self._trainer is not None:
            self.log("train/dispersive", added, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(out.error))
        return out._replace(loss=out.loss + added)


# ----------------------------------------------------------------------------------------------------------- 4. models


def sit_s2(**overrides: Any) -> SiT:
    """SiT-S/2 on latents of 32 x 32 x 4."""
    return SiT(**{**SIZES["S"], "patch_size": 2, **overrides})


def sit_b2(**overrides: Any) -> SiT:
    """SiT-B/2 on latents of 32 x 32 x 4."""
    return SiT(**{**SIZES["B"], "patch_size": 2, **overrides})


def sit_l2(**overrides: Any) -> SiT:
    """SiT-L/2 on latents of 32 x 32 x 4."""
    return SiT(**{**SIZES["L"], "patch_size": 2, **overrides})


def sit_xl2(**overrides: Any) -> SiT:
    """SiT-XL/2 on latents of 32 x 32 x 4."""
    return SiT(**{**SIZES["XL"], "patch_size": 2, **overrides})


# ------------------------------------------------------------------------------------------------- 5. official weights


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict, raw or averaged, in the names of :class:`SiT`, which are the official ones.

    Raises:
        ZooError: a key of another layout.
    """
    return convert_dit(state_dict)
