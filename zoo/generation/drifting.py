"""Generative Modeling via Drifting (Drifting Models).

Mingyang Deng, He Li, Tianhong Li, Yilun Du, Kaiming He. 2026, arXiv 2602.04770.

A generator maps noise to a sample in one step, and its distribution q drifts towards the data's p while it is trained.
The drift of a sample x is V(x) = V+(x) - V-(x): attraction to real samples, each weighed by a kernel of its distance,
less the same of generated ones. Swapping p and q turns V round, so that it vanishes where q = p. Training regresses a
sample on where it should be, sg(x + V(x)). No teacher, no discriminator, no integration, no Jacobian. Images are
compared in the features of a frozen encoder, a ResNet that was pre-trained as a masked autoencoder, each for itself.
Guidance with scale alpha: real images of any class count among the generated ones, to be repelled; alpha is drawn in
training, the generator is conditioned on it, and it is chosen when sampling.

Conventions: noise and images (B, C, S, S), pictures in [-1, 1] or scaled latents; features (B, T, D), each of the T
places a problem of its own. Of a step: L labels, G generated samples each (label by label), P real images of the label
("positives") and N of any class ("unconditional"). alpha >= 1, 1 for no guidance.

Deviations from the official code (JAX), of which the first two change no value:
- Rotary positions turn neighbouring channels, not those half a head apart: :func:`convert_official` reorders the
  channels of queries and keys.
- The affinity is one exponential, exp(l - (lse_y l + lse_x l) / 2), not the root of two softmaxes.
- Banks hold what all processes push, and are saved; there each host has its own, filled anew when a run is resumed.
- The style of a sample is chosen by its noise, so that a sample is a function of its noise, label and alpha.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.errors import ZooError
from zoo.generation.drifting_encoder import (
    FrozenFeatures,
    MAEResNetPretraining,
    mae_resnet_256,
    mae_resnet_640,
    mae_resnet_640_pixel,
)
from zoo.metrics.energy import energy_score
from zoo.metrics.generation import to_uint8
from zoo.nn.autoencoder import PIXELS, FrozenAutoencoder
from zoo.nn.dit import MODERN, SIZES, DiTBlock, FinalLayer, RMSNorm, TimestepEmbedder
from zoo.nn.resnet_mae import FeatureSet, convert_mae_resnet
from zoo.ops.collective import gather
from zoo.ops.patches import patchify, unpatchify
from zoo.ops.pos_embed import rope_1d, sincos_2d
from zoo.training import BaseModule, Optim
from zoo.training.bank import Banks
from zoo.training.sampling import noise_of

__all__ = [
    "AlphaDistribution", "Banks", "Drift", "Drifting", "DriftingGenerator", "Field", "MAEResNetPretraining", "Sets",
    "convert_official", "drift_loss", "drifting_b2", "drifting_b16", "drifting_l2", "drifting_l16", "mae_resnet_256",
    "mae_resnet_640", "mae_resnet_640_pixel", "unconditional_weight",
]  # fmt: skip

# ------------------------------------------------------------------------------------------------------- 1. equations


@dataclass(frozen=True)
class AlphaDistribution:
    """How guidance scales are drawn: p(alpha) ~ alpha^(-power) on [low, high] (appendix A).

    Args:
        low, high: the range.
        power: of the density; 1 is even in log(alpha).
        plain: share of the labels that get 1, no guidance.

    Raises:
        ZooError: a range that is none, or a share outside [0, 1].
    """

    low: float = 1.0
    high: float = 4.0
    power: float = 3.0
    plain: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high or not 0 <= self.plain <= 1:
            raise ZooError(f"alpha is drawn from a range 0 < low <= high, plain with a share in [0, 1]; got {self}")

    def draw(self, uniform: Tensor, chance: Tensor) -> Tensor:
        """alpha (L,) of uniform numbers (L,) for the scale, and (L,) for whether it is 1."""
        k = 1 - self.power
        if abs(k) < 1e-6:
            alpha = self.low * (self.high / self.low) ** uniform
        else:
            alpha = (self.low**k + uniform * (self.high**k - self.low**k)) ** (1 / k)
        return torch.where(chance < self.plain, 1.0, alpha)


def unconditional_weight(alpha: Tensor, generated: int, unconditional: int) -> Tensor:
    """The weight (L,) of an unconditional sample among the negatives, by which the guidance is alpha (section 3)."""
    return (alpha - 1) * (generated - 1) / max(1, unconditional)


@dataclass(frozen=True)
class Field:
    """The drifting field (section 3).

    Args:
        temperatures: of the kernel exp(-distance / t); the fields of all are normalised and added.
        attraction, repulsion: factors of V+ and of V-; equal ones are the paper's, others break the anti-symmetry
            (Table 1).
        all_processes: the mean distance and the size of the forces, by which they are normalised, are those of all
            processes, so that so many compute what one computes; False: each its own.

    Raises:
        ZooError: no temperatures, or one that is not positive.
    """

    temperatures: tuple[float, ...] = (0.2, 0.05, 0.02)
    attraction: float = 1.0
    repulsion: float = 1.0
    all_processes: bool = True

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) <= 0:
            raise ZooError(f"a drifting field wants temperatures above 0, not {list(self.temperatures)}")


class Drift(NamedTuple):
    """The `loss` (B,) of each problem, and () each: `scale`, the mean distance, and by temperature the `forces`, the
    mean square of V before it is normalised, which says how far q is from p (the loss does not)."""

    loss: Tensor
    scale: Tensor
    forces: dict[float, Tensor]


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (B, G, Y) of x (B, G, D) and y (B, Y, D), at least 1e-4."""
    squares = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None]
    return torch.baddbmm(squares, x, y.transpose(1, 2), alpha=-2).clamp_min_(1e-8).sqrt_()


def drift_loss(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None = None,
    weight_gen: Tensor | None = None,
    weight_pos: Tensor | None = None,
    weight_neg: Tensor | None = None,
    field: Field = Field(),
) -> Drift:
    """|x / s - sg(x / s + V)|^2 of generated samples, mean over samples and channels (section 3).

    Computed in float32 at least. One mean distance and one size of the force are taken over all problems together.

    Args:
        gen: generated samples (B, G, D), of B problems; the only gradient is theirs.
        pos: real samples (B, P, D).
        neg: further samples (B, N, D) to be repelled, beside the generated ones.
        weight_gen, weight_pos, weight_neg: of each sample (B, G), (B, P), (B, N); None: 1.
        field: which.
    """
    wide = torch.promote_types(gen.dtype, torch.float32)
    average: Callable[[Tensor], Tensor] = _average if field.all_processes else torch.Tensor.detach
    with torch.autocast(gen.device.type, enabled=False):
        x = gen.to(wide)
        fixed = x.detach()
        sets = [fixed, *((fixed[:, :0] if s is None else s.detach().to(wide)) for s in (neg, pos))]
        given = (weight_gen, weight_neg, weight_pos)
        weights = [s.new_ones(s.shape[:2]) if w is None else w.to(wide) for s, w in zip(sets, given, strict=True)]
        y, w = torch.cat(sets, dim=1), torch.cat(weights, dim=1)[:, None]
        repelled = sets[0].shape[1] + sets[1].shape[1]

        distance = _distances(fixed, y)
        scale = average((distance * w).mean()) / average(w.mean())
        unit = (scale / math.sqrt(x.shape[2])).clamp_min(1e-3)
        closeness = -distance / scale.clamp_min(1e-3)
        closeness.diagonal(dim1=1, dim2=2).sub_(100)  # a sample does not repel itself
        y, fixed = y / unit, fixed / unit
        total, forces = torch.zeros_like(fixed), {}
        for temperature in field.temperatures:
            logits = closeness / temperature
            logits = logits - (logits.logsumexp(2, keepdim=True) + logits.logsumexp(1, keepdim=True)) / 2
            affinity = logits.exp_().clamp_min_(1e-3) * w
            negative, positive = affinity[:, :, :repelled], affinity[:, :, repelled:]
            to_positive, to_negative = positive.sum(2, keepdim=True), negative.sum(2, keepdim=True)
            positive *= field.attraction * to_negative
            negative *= -field.repulsion * to_positive
            force = torch.baddbmm(-affinity.sum(2, keepdim=True) * fixed, affinity, y)
            forces[temperature] = average(force.square().mean())
            total += force / forces[temperature].clamp_min(1e-8).sqrt()
        return Drift((x / unit - (fixed + total)).square().mean((1, 2)), scale, forces)


def _average(value: Tensor) -> Tensor:
    """The mean of a number () of each process."""
    return gather(value.reshape(1)).mean()


@dataclass(frozen=True)
class Sets:
    """How many samples of a kind are in a step (Tables 2 and 8); for each batch of each process.

    Args:
        labels: L, those of the first so many images of a batch in random order.
        generated: G, of a label, with one alpha.
        positives: P, of a label.
        unconditional: N, for a label.
    """

    labels: int = 4
    generated: int = 64
    positives: int = 64
    unconditional: int = 16

    def __post_init__(self) -> None:
        if min(self.labels, self.positives) < 1 or self.generated < 2 or self.unconditional < 0:
            raise ZooError("a step wants a label and a positive at least, and two generated samples of it")


# --------------------------------------------------------------------------------------------------------- 2. network

BLOCKS = replace(MODERN, swiglu_multiple=32)
ALPHA_SCALE = 0.02


class DriftingGenerator(nn.Module):
    """A transformer from noise to a sample in one pass, conditioned on label, styles and alpha (section 4, appendix A).

    Args:
        img_size: side of the square samples.
        patch_size: side of a patch.
        in_chans: channels of the samples.
        embed_dim, depth, num_heads, mlp_ratio: sizes of the transformer.
        num_classes: labels.
        context_tokens: tokens of the condition before those of the patches.
        style_tokens: J, random indices that are embedded and added to the condition.
        num_styles: K, the values of each.
        grad_checkpointing: recompute activations in the backward pass.

    Raises:
        ZooError: no class, or sizes that do not divide.
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 4,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        context_tokens: int = 16,
        style_tokens: int = 32,
        num_styles: int = 64,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.sample_shape, self.patch_size, self.num_classes = (in_chans, img_size, img_size), patch_size, num_classes
        self.context_tokens, self.style_tokens, self.num_styles = context_tokens, style_tokens, num_styles
        self.grad_checkpointing = grad_checkpointing
        if num_classes < 1 or img_size % patch_size or embed_dim % num_heads:
            raise ZooError("a generator wants a class, a patch_size that divides img_size, and num_heads embed_dim")
        grid = (img_size // patch_size, img_size // patch_size)
        self.x_embedder = nn.Linear(patch_size**2 * in_chans, embed_dim)
        self.pos_embed = nn.Parameter(sincos_2d(embed_dim, grid))
        self.y_embedder = nn.Embedding(num_classes, embed_dim)
        if style_tokens:
            self.style_embedder = nn.EmbeddingBag(style_tokens * num_styles, embed_dim, mode="sum")
        self.alpha_embedder, self.alpha_norm = TimestepEmbedder(embed_dim), RMSNorm(embed_dim)
        if context_tokens:
            self.context = nn.Linear(embed_dim, embed_dim)
            self.cls_embed = nn.Parameter(torch.empty(1, context_tokens, embed_dim))
        self.blocks = nn.ModuleList(DiTBlock(embed_dim, num_heads, mlp_ratio, BLOCKS) for _ in range(depth))
        self.final_layer = FinalLayer(embed_dim, patch_size, in_chans, BLOCKS)
        cos, sin = rope_1d(embed_dim // num_heads, context_tokens + grid[0] * grid[1])
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name == "cls_embed" or ("embedder" in name and not name.startswith("x_embedder")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)

    @property
    def noise_shape(self) -> tuple[int]:
        """(M,) of the standard normal numbers that a sample starts from: its noise, then one for each style."""
        return (math.prod(self.sample_shape) + self.style_tokens,)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def condition(self, styles: Tensor | None, labels: Tensor, alpha: Tensor) -> Tensor:
        """(B, D) of styles (B, J) in 0 ... K-1 (None without style tokens), labels (B,) and alpha (B,)."""
        c = self.y_embedder(labels) + ALPHA_SCALE * self.alpha_norm(self.alpha_embedder(alpha))
        if not self.style_tokens:
            return c
        if styles is None:
            raise ZooError("a generator with style tokens wants styles")
        first = torch.arange(self.style_tokens, device=styles.device) * self.num_styles  # row of each table
        return c + self.style_embedder(styles + first)

    def forward(self, noise: Tensor, styles: Tensor | None, labels: Tensor, alpha: Tensor) -> Tensor:
        """Samples (B, C, S, S) of noise (B, C, S, S), styles (B, J), labels (B,) and alpha (B,)."""
        c = self.condition(styles, labels, alpha)
        if tuple(noise.shape[1:]) != self.sample_shape:
            raise ZooError(f"the generator takes noise of shape {self.sample_shape}, not {tuple(noise.shape[1:])}")
        x = self.x_embedder(patchify(noise, self.patch_size)) + self.pos_embed
        if self.context_tokens:
            x = torch.cat([(self.context(c)[:, None] + self.cls_embed).to(x.dtype), x], dim=1)
        rope = (self.rope_cos, self.rope_sin)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, rope, use_reentrant=False)
            else:
                x = block(x, c, rope)
        return unpatchify(self.final_layer(x[:, self.context_tokens :], c), self.patch_size)

    def split(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The noise (B, C, S, S) and the styles (B, J) in standard normal numbers (B, M): equally likely styles."""
        normal = noise[:, math.prod(self.sample_shape) :]
        styles = torch.special.ndtr(normal.float()) * self.num_styles
        picture = noise[:, : math.prod(self.sample_shape)].unflatten(1, self.sample_shape)
        return picture, styles.long().clamp_max(self.num_styles - 1)

    def sample(self, noise: Tensor, label: Tensor, alpha: float = 1.0, temperature: float = 1.0) -> Tensor:
        """Samples (B, C, S, S) of standard normal numbers (B, M) and labels (B,) in one evaluation; the noise is
        multiplied by the temperature."""
        picture, styles = self.split(noise)
        picture = (picture * temperature).to(self.pos_embed.dtype)
        return self(picture, styles, label, torch.full_like(picture[:, 0, 0, 0], alpha))


# ----------------------------------------------------------------------------------------------------------- 3. tasks


class Drifting(BaseModule):
    """Training of the generator and sampling.

    Batches hold `image` (B, C, S, S), pictures in [-1, 1] or scaled latents, and `label` (B,). All of a batch goes into
    the banks; the step is of a few of its labels. They may pin `positives` (L, P, C, S, S) and `unconditional`
    (L, N, C, S, S), and then nothing is banked and `label` is (L,); and the draws: (L,) each, uniform, `alpha_uniform`
    and `plain_uniform`; `noise` (L G, C, S, S) and `styles` (L G, J). Logs `train/force`, the mean square of the drift
    over features and temperatures; the loss itself does not tell progress.

    Evaluation logs `{val,test}/energy`, the energy score of `eval_samples` samples of an image's class
    (:func:`~zoo.metrics.energy.energy_score`). Lower is better.

    Args:
        encoder: of the features: the name of published weights, a file, or a checkpoint of
            :class:`MAEResNetPretraining`; null compares images themselves.
        features: of the encoder.
        convnext: the features of ConvNeXt V2 too: a file of its weights, or "published"; null for none.
        field: the drift.
        alpha: how guidance scales are drawn.
        sets: samples in a step.
        banks: samples kept.
        sampling_alpha: guidance scale of samples.
        eval_samples: samples for each image in evaluation.
        autoencoder: weights of the autoencoder whose latents are modelled, or "pixels".
        optim: optimiser and schedule; `global_batch` counts the images that are banked in an update.
        network: of :class:`DriftingGenerator`; a recipe takes `img_size` and `num_classes` from the data module.
    """

    batch_keys: Sequence[str] = ("image", "label")
    meets = True
    sampling_options = ("alpha",)

    def __init__(
        self,
        encoder: str | None = None,
        features: FeatureSet = FeatureSet(),  # noqa: B008 (frozen)
        convnext: str | None = None,
        field: Field = Field(),
        alpha: AlphaDistribution = AlphaDistribution(),
        sets: Sets = Sets(),
        banks: Banks = Banks(),  # noqa: B008
        sampling_alpha: float = 1.0,
        eval_samples: int = 4,
        autoencoder: str = PIXELS,
        optim: Optim = Optim(lr=2e-4, weight_decay=0.01, no_decay="none", schedule="constant"),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters()
        self.network = DriftingGenerator(**network)
        self.num_classes, self.noise_shape = self.network.num_classes, self.network.noise_shape
        # A checkpoint holds declarations as plain mappings.
        self.field, self.alpha = _declared(Field, field), _declared(AlphaDistribution, alpha)
        self.sets = _declared(Sets, sets)
        self.positive_bank, self.unconditional_bank = _declared(Banks, banks).make(self.num_classes)
        self.sampling_alpha, self.eval_samples = sampling_alpha, eval_samples
        self.features = FrozenFeatures(encoder, _declared(FeatureSet, features), self.network.sample_shape[0], convnext)
        self.autoencoder = FrozenAutoencoder(autoencoder)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.features.check()

    def trainable(self) -> nn.Module:
        return self.network

    def _real(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (L,), positives (L, P, ...) and unconditional samples (L, N, ...) of a batch."""
        images, labels = batch["image"], batch["label"]
        if "positives" in batch:
            return labels, batch["positives"], batch["unconditional"]
        everything, all_labels = gather(images), gather(labels)
        self.positive_bank.push(everything, all_labels)
        self.unconditional_bank.push(everything, torch.zeros_like(all_labels))
        labels = labels[torch.randperm(len(labels))[: self.sets.labels].to(labels.device)]
        positives = self.positive_bank.draw(labels, self.sets.positives)
        unconditional = self.unconditional_bank.draw(torch.zeros_like(labels), self.sets.unconditional)
        return labels, positives.to(images), unconditional.to(images)

    def drifts(self, batch: Mapping[str, Any]) -> dict[str, Drift]:
        """The drift of every feature, of a step on this batch."""
        labels, positives, unconditional = self._real(batch)
        count, each, net, at = len(labels), self.sets.generated, self.network, labels.device

        def pinned(name: str, make: Callable[[], Tensor]) -> Tensor:
            return batch[name] if name in batch else make()

        uniform, chance = (pinned(n, lambda: torch.rand(count, device=at)) for n in ("alpha_uniform", "plain_uniform"))
        alpha = self.alpha.draw(uniform, chance).to(positives.dtype)
        noise = pinned("noise", lambda: torch.randn(count * each, *net.sample_shape, device=at))
        styles = pinned("styles", lambda: torch.randint(net.num_styles, (count * each, net.style_tokens), device=at))
        with torch.no_grad():
            real = self.features(torch.cat([positives, unconditional], dim=1).flatten(0, 1))
        samples = net(noise.to(positives.dtype), styles, *(v.repeat_interleave(each) for v in (labels, alpha)))
        made = self.features(samples.to(positives.dtype))
        weight = unconditional_weight(alpha, each, unconditional.shape[1])
        found = {}
        for name, x in made.items():
            gen, y = (_by_place(v, count) for v in (x, real[name]))
            pos, neg = y[:, : positives.shape[1]], y[:, positives.shape[1] :]
            weights = weight.repeat_interleave(len(gen) // count)[:, None].expand(-1, neg.shape[1])
            found[name] = drift_loss(gen, pos, neg, weight_neg=weights, field=self.field)
        return found

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        drifts = self.drifts(batch)
        loss = torch.stack([drift.loss.mean() for drift in drifts.values()]).sum()
        force = torch.stack([size for drift in drifts.values() for size in drift.forces.values()]).mean()
        self.log("train/force", force, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(batch["label"]))
        return {"loss": loss, "force": force}

    def _evaluate(self, stage: str, batch: Mapping[str, Any]) -> None:
        images, labels, each = batch["image"], batch["label"], self.eval_samples
        noise = self.draws(batch, "noise", each, *self.noise_shape, normal=True)
        y = self.network.sample(noise.flatten(0, 1), labels.repeat_interleave(each), self.sampling_alpha)
        y = y.float().unflatten(0, (-1, each))
        self.tally(f"{stage}/energy", energy_score(images.float().flatten(1), y.flatten(2)))

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("test", batch)

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor, alpha: float | None = None) -> Tensor:
        """Pictures (B, 3, H, W), about in [-1, 1], of normal numbers (B, M) and labels (B,), in one evaluation."""
        return self.autoencoder.decode(self.network.sample(noise, label, alpha or self.sampling_alpha))

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """A generated `picture` (B, 3, H, W), uint8, of each sample's class, from noise that its index decides; where
        samples are no pictures, the `sample`."""
        noise = noise_of(batch["index"].tolist(), self.noise_shape).to(batch["image"].device)
        made = self.sample(noise, batch["label"])
        found = {"picture": to_uint8(made)} if made.shape[1] == 3 else {"sample": made}
        return {**found, "index": batch["index"]}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        banks = {"positive": self.positive_bank, "unconditional": self.unconditional_bank}
        checkpoint["banks"] = {name: bank.state() for name, bank in banks.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.positive_bank.load(checkpoint["banks"]["positive"])
            self.unconditional_bank.load(checkpoint["banks"]["unconditional"])


def _declared(kind: type[Any], value: Any) -> Any:
    return kind(**value) if isinstance(value, Mapping) else value


def _by_place(x: Tensor, labels: int) -> Tensor:
    """Features (L X, T, D) as (L T, X, D): a problem for each label and place."""
    return x.unflatten(0, (labels, -1)).transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------- 4. models


def drifting_b2(**overrides: Any) -> DriftingGenerator:
    """The B/2 generator of latents of 32 x 32 x 4."""
    return DriftingGenerator(**{**SIZES["B"], "patch_size": 2, **overrides})


def drifting_l2(**overrides: Any) -> DriftingGenerator:
    """The L/2 generator of latents of 32 x 32 x 4."""
    return DriftingGenerator(**{**SIZES["L"], "patch_size": 2, **overrides})


def drifting_b16(**overrides: Any) -> DriftingGenerator:
    """The B/16 generator of pictures of 256 pixels."""
    return DriftingGenerator(**{**SIZES["B"], "img_size": 256, "patch_size": 16, "in_chans": 3, **overrides})


def drifting_l16(**overrides: Any) -> DriftingGenerator:
    """The L/16 generator of pictures of 256 pixels."""
    return DriftingGenerator(**{**SIZES["L"], "img_size": 256, "patch_size": 16, "in_chans": 3, **overrides})


# ------------------------------------------------------------------------------------------------ 5. official weights

_BLOCK = {
    "TorchLinear_0": "adaLN_modulation.1",
    "RMSNorm_0": "norm1",
    "RMSNorm_1": "norm2",
    "Attention_0/TorchLinear_0": "attn.qkv",
    "Attention_0/TorchLinear_1": "attn.proj",
    "Attention_0/q_norm": "attn.q_norm",
    "Attention_0/k_norm": "attn.k_norm",
    "SwiGLUFFN_0/TorchLinear_0": "mlp.0",
    "SwiGLUFFN_0/TorchLinear_1": "mlp.1",
    "SwiGLUFFN_0/TorchLinear_2": "mlp.w3",
}
_OUTSIDE = {
    "Embed_0": "y_embedder",
    "RMSNorm_0": "alpha_norm",
    "TimestepEmbedder_0/TorchLinear_0": "alpha_embedder.mlp.0",
    "TimestepEmbedder_0/TorchLinear_1": "alpha_embedder.mlp.2",
    "LightningDiT_0/TorchLinear_0": "x_embedder",
    "LightningDiT_0/TorchLinear_1": "context",
    "LightningDiT_0/FinalLayer_0/TorchLinear_0": "final_layer.adaLN_modulation.1",
    "LightningDiT_0/FinalLayer_0/RMSNorm_0": "final_layer.norm_final",
    "LightningDiT_0/FinalLayer_0/TorchLinear_1": "final_layer.linear",
}
_LEAF = re.compile(r"(?:LightningDiT_0/blocks_(\d+)/)?(.+?)(?:/Dense_0)?/(kernel|bias|weight|embedding)")
_TURNED = re.compile(r"blocks\.\d+\.attn\.(?:qkv\.(?:weight|bias)|[qk]_norm\.weight)")


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published parameters (flax, by path) of a generator or of an encoder in our names and layouts; ours stay.

    The tables of styles become one, and so do the two gates of a SwiGLU. The channels of queries and keys are
    reordered: those that a rotation turns together become neighbours.

    Raises:
        ZooError: a key of another network, or a part of what is joined is missing.
    """
    if not any(key.startswith("LightningDiT_0/") for key in state_dict):
        return convert_mae_resnet(state_dict)
    found: dict[str, Tensor] = {}
    styles: dict[int, Tensor] = {}
    for key, value in state_dict.items():
        if table := re.fullmatch(r"noise_embeds_(\d+)/embedding", key):
            styles[int(table[1])] = value
        elif key in ("LightningDiT_0/pos_embed", "LightningDiT_0/cls_embed"):
            found[key.rpartition("/")[2]] = value
        else:
            index, path, leaf = match.groups() if (match := _LEAF.fullmatch(key)) else (None, "", "")
            name = (_OUTSIDE if index is None else _BLOCK).get(path)
            if name is None:
                raise ZooError(f"not a checkpoint of a drifting generator: unknown key {key!r}")
            name = name if index is None else f"blocks.{index}.{name}"
            found[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"] = value.T if leaf == "kernel" else value
    try:
        width = len(found["blocks.0.attn.q_norm.weight"])
        for key in [key for key in found if _TURNED.fullmatch(key)]:
            found[key] = _neighbours(found[key], width)
        for first in [key for key in found if ".mlp.0." in key and key.startswith("blocks.")]:
            gates = [found.pop(first), found.pop(first.replace(".mlp.0.", ".mlp.1."))]
            found[first.replace(".mlp.0.", ".mlp.w12.")] = torch.cat(gates)
        if styles:
            found["style_embedder.weight"] = torch.cat([styles[k] for k in range(len(styles))])
    except KeyError as error:
        raise ZooError(f"not a whole checkpoint of a drifting generator: {error} is missing") from error
    return found


def _neighbours(x: Tensor, width: int) -> Tensor:
    """Heads of a width along the first axis of x, so that channels i and i + width / 2 become neighbours; of a fused
    projection the queries and keys, the first two thirds."""
    order = torch.arange(width).view(2, -1).T.flatten()
    if len(x) == width:
        return x[order]
    q, k, v = x.chunk(3)
    return torch.cat([*(part.unflatten(0, (-1, width))[:, order].flatten(0, 1) for part in (q, k)), v])
