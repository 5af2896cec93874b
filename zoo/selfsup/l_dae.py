"""Deconstructing Denoising Diffusion Models for Self-Supervised Learning.

Xinlei Chen, Zhuang Liu, Saining Xie, Kaiming He. ICLR 2025, arXiv 2401.14404.

A latent diffusion transformer is taken apart step by step, until a classical denoising autoencoder is left, and a
linear probe says at each step what its encoder, the first half of its blocks, has learnt. What matters is that noise is
added in a latent space of few numbers a patch; that space may be the first principal components of patches. The end of
the walk is l-DAE: project patches on their principal components, add noise there, project back to pixels, and train a
ViT to give back the clean picture. Every step of the walk is the same task with other options.

Conventions: pictures (B, C, S, S) normalised by the data set's mean and deviation; L patches of D = p*p*C numbers in
the order (row, column, channel); latents z (B, L, d); z_t = gamma_t z + sigma_t e for t = 0 ... T-1, the most noise at
T-1. Networks give tokens (B, L, .), never pictures. |.|^2 is a sum over the numbers of a token; losses are means of it
over tokens and samples.

No official code is public. What the paper leaves open, and how it is settled here, stands in the card's ledger.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from zoo.data.patch_pca import fill_tokenizer
from zoo.errors import ZooError, unknown
from zoo.nn.autoencoder import PIXELS, FrozenAutoencoder
from zoo.nn.dit import DiT, FinalLayer, fold_condition, sinusoids
from zoo.nn.patch_tokenizer import Clean, LatentNorm, PatchTokenizer, fold_tokenizer
from zoo.nn.vit import VisionTransformer
from zoo.ops.denoising import step_noises
from zoo.ops.diffusion import Diffusion
from zoo.ops.flow import like
from zoo.ops.guidance import drop_labels
from zoo.ops.patches import patchify, unpatchify
from zoo.ops.pos_embed import resize_pos_embed
from zoo.ops.sheet import titled_sheet
from zoo.training import BaseModule, Classification, LinearClassification, Optim, probe_head
from zoo.weights.pretrained import fill, read_source

__all__ = [
    "DenoisingAutoencoder",
    "LDAEFineTuning",
    "LDAELinearProbe",
    "LDAEPretraining",
    "NoiseSchedule",
    "clean_weight",
    "convert_official",
    "corrupt",
    "export_encoder",
    "l_dae_vit_12l_patch16",
    "l_dae_vit_base_patch16",
    "l_dae_vit_large_patch16",
    "linear_gamma2",
    "load_encoder",
    "original_gamma2",
    "unscaled_sigma",
    "weighted_residual",
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SINGLE_SIGMA = math.sqrt(1 / 3)  # section 4.3, "Single noise level"; also that of Figures 7 and 8
Kind = Literal["original", "linear", "unscaled", "single"]
Target = Literal["noise", "latent", "projection", "original"]
Space = Literal["image", "latent"]

# ------------------------------------------------------------------------------------------------------- 1. equations


def original_gamma2(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """gamma_t^2 (T,), the product of 1 - beta up to t, for beta linear in t (section 3; DDPM's and DiT's)."""
    return (1 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)).cumprod(0)


def linear_gamma2(steps: int = 1000) -> Tensor:
    """gamma_t^2 = 1 - (t + 1) / T (T,) (section 4.1, "Replace noise schedule"; where it begins is our reading)."""
    return 1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps


def unscaled_sigma(steps: int = 1000, last: float = math.sqrt(2)) -> Tensor:
    """sigma_t (T,), linear from 0 to `last`, for gamma = 1 (section 4.3, "Remove input scaling")."""
    return torch.linspace(0, last, steps, dtype=torch.float64)


def clean_weight(gamma2: Tensor, sigma2: Tensor) -> Tensor:
    """lambda_t = gamma^2 / (gamma^2 + sigma^2), weight of the error in clean data: gamma^2 where the two add up to 1,
    1 / (1 + sigma^2) without input scaling (section 4.3)."""
    return gamma2 / (gamma2 + sigma2)


def corrupt(latents: Tensor, noise: Tensor, gamma: Tensor | float, sigma: Tensor) -> Tensor:
    """z_t = gamma z + sigma e (B, L, d) of latents and noise (B, L, d), with gamma and sigma (B,) (equation 1)."""
    scaled = latents if isinstance(gamma, float) and gamma == 1 else torch.as_tensor(gamma).to(latents)
    scaled = scaled if scaled is latents else like(scaled, latents) * latents
    return torch.addcmul(scaled, like(sigma.to(latents), latents), noise)


def weighted_residual(residual: Tensor, weight: Tensor, latent_dim: int, tail_weight: float = 0.1) -> Tensor:
    """lambda_t sum_i w_i r_i^2 (B, L) of components r (B, L, D), w = 1 for the first d and `tail_weight` for the others
    (equation 4); `weight` is lambda_t (B,)."""
    squares = residual.square()
    total = squares[..., :latent_dim].sum(-1) + tail_weight * squares[..., latent_dim:].sum(-1)
    return like(weight.to(total), total) * total


@dataclass(frozen=True)
class NoiseSchedule:
    """Levels of noise t = 0 ... T-1.

    Args:
        kind: "original" (DDPM's), "linear" (gamma^2 is), "unscaled" (gamma = 1, sigma linear from 0) or "single"
            (gamma = 1, one sigma).
        steps: T; of "single" it is 1.
        sigma: of "unscaled" the last one, by default the root of 2; of "single" its one, by default the root of 1/3.
        beta_start, beta_end: of "original".

    Raises:
        ZooError: an unknown kind, or a value out of range.
    """

    kind: Kind = "unscaled"
    steps: int = 1000
    sigma: float | None = None
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if self.kind not in ("original", "linear", "unscaled", "single"):
            raise unknown("kind of noise schedule", self.kind, ("original", "linear", "unscaled", "single"))
        if self.steps < 2 or not (self.sigma is None or self.sigma > 0) or not 0 < self.beta_start <= self.beta_end < 1:
            raise ZooError(
                "a noise schedule has 2 steps or more, a sigma above 0, and betas within 0 and 1 that do not fall"
            )
        if self.sigma is not None and self.preserving:
            raise ZooError(f"the noise schedule {self.kind!r} takes no sigma")

    @property
    def preserving(self) -> bool:
        """Whether gamma^2 + sigma^2 = 1."""
        return self.kind in ("original", "linear")

    def levels(self) -> tuple[Tensor, Tensor]:
        """gamma (T,) and sigma (T,), float64."""
        if self.kind == "single":
            sigma = torch.tensor([SINGLE_SIGMA if self.sigma is None else self.sigma], dtype=torch.float64)
        elif self.kind == "unscaled":
            sigma = unscaled_sigma(self.steps, math.sqrt(2) if self.sigma is None else self.sigma)
        else:
            original = self.kind == "original"
            gamma2 = (
                original_gamma2(self.steps, self.beta_start, self.beta_end) if original else linear_gamma2(self.steps)
            )
            return gamma2.sqrt(), (1 - gamma2).sqrt()
        return torch.ones_like(sigma), sigma


# --------------------------------------------------------------------------------------------------------- 2. network


class DenoisingAutoencoder(DiT):
    """A DiT whose first blocks are the encoder and whose others are the decoder, with the space that noise is added in.

    adaLN: a two-layer MLP in each block, of hidden width `condition_ratio` * D (appendix A).

    Args:
        img_size, patch_size, in_chans: of the pictures, or of the latents of a convolutional autoencoder.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer; `depth` counts encoder and decoder.
        encoder_depth: blocks of the encoder; null: half of them.
        condition_ratio: hidden width of the adaLN's MLPs, in units of `embed_dim`.
        num_classes: labels that the network is conditioned on; 0 for none.
        tokenizer: noise is added to linear latents of patches; without it to the patches themselves.
        latent_dim, latent_norm: of :class:`~zoo.nn.patch_tokenizer.PatchTokenizer`.
        input, output: "latent": tokens of `latent_dim` numbers; "image": patches of pixels. Without tokenizer "image".
        grad_checkpointing: recompute activations in the backward pass.

    Raises:
        ZooError: latents without tokenizer, or an encoder of no block or of all.
    """

    tokenizer: PatchTokenizer | None

    def __init__(
        self,
        img_size: int = 256,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        encoder_depth: int | None = None,
        condition_ratio: float = 0.25,
        num_classes: int = 0,
        tokenizer: bool = True,
        latent_dim: int = 32,
        latent_norm: LatentNorm = "global",
        input: Space = "image",
        output: Space = "image",
        grad_checkpointing: bool = False,
    ) -> None:
        if not tokenizer and "latent" in (input, output):
            raise ZooError("input and output are latents where there is a tokenizer; without it set them to image")
        if img_size % patch_size:
            raise ZooError(f"img_size {img_size} is no multiple of patch_size {patch_size}")
        of_latents = input == "latent"
        super().__init__(
            img_size // patch_size if of_latents else img_size, 1 if of_latents else patch_size,
            latent_dim if of_latents else in_chans, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            mlp_ratio=mlp_ratio, num_classes=num_classes, pos_embed="stored", grad_checkpointing=grad_checkpointing,
        )  # fmt: skip
        self.encoder_depth = depth // 2 if encoder_depth is None else encoder_depth
        if not 1 <= self.encoder_depth <= depth:
            raise ZooError(f"an encoder has 1 to {depth} blocks of {depth}, not {self.encoder_depth}")
        self.input, self.output, self.pixel_patch = input, output, patch_size
        self.tokenizer = PatchTokenizer(patch_size, in_chans, latent_dim, latent_norm) if tokenizer else None
        self.patch_dim = patch_size**2 * in_chans
        self.latent_dim = latent_dim if tokenizer else self.patch_dim
        hidden = max(1, int(embed_dim * condition_ratio))
        for block in self.blocks:
            block.adaLN_modulation = nn.Sequential(
                nn.SiLU(), nn.Linear(embed_dim, hidden), nn.SiLU(), nn.Linear(hidden, 6 * embed_dim)
            )
        self.final_layer = FinalLayer(embed_dim, 1, self.latent_dim if output == "latent" else self.patch_dim)
        for name, parameter in self.named_parameters():
            if re.search(r"adaLN_modulation\.1\.weight", name) and name.startswith("blocks"):
                nn.init.xavier_uniform_(parameter)
            elif "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)

    @property
    def num_patches(self) -> int:
        return math.prod(self.x_embedder.grid)

    def _end(self, x: Tensor, c: Tensor) -> Tensor:
        return self.final_layer(x, c)

    def latents(self, images: Tensor) -> Tensor:
        """What noise is added to (B, L, d), of pictures (B, C, S, S)."""
        return patchify(images, self.pixel_patch) if self.tokenizer is None else self.tokenizer.latents(images)

    def seen(self, latents: Tensor) -> Tensor:
        """The network's input of latents (B, L, d): pictures (B, C, S, S), or the latents as (B, d, S/p, S/p)."""
        if self.input == "latent":
            return unpatchify(latents, 1)
        return self.pictures(latents)

    def pictures(self, latents: Tensor) -> Tensor:
        """Pictures (B, C, S, S) that latents (B, L, d) stand for."""
        return unpatchify(latents, self.pixel_patch) if self.tokenizer is None else self.tokenizer.pictures(latents)

    def null_labels(self, count: int, device: torch.device) -> Tensor | None:
        """The label (B,) for "no label"; None where the network takes none."""
        return torch.full((count,), self.num_classes, device=device) if self.num_classes else None

    def encode(self, x: Tensor, t: Tensor, depth: int | None = None) -> Tensor:
        """The encoder's tokens (B, L, D), or those after `depth` blocks, of the network's input at levels t (B,)."""
        place = (depth or self.encoder_depth) - 1
        labels = self.null_labels(len(x), x.device)
        found: list[Tensor] = self.forward_intermediates(
            x, t, labels, indices=[place], stop_early=True, intermediates_only=True
        )
        return found[-1]


# ------------------------------------------------------------------------------------------- 3. the encoder as a ViT


def export_encoder(
    state: Mapping[str, Tensor], t: int = 10, depth: int | None = None, clean: Clean = "projected", in_chans: int = 3
) -> dict[str, Tensor]:
    """The encoder at one t as an ordinary ViT, which takes pictures: weights of
    :class:`~zoo.nn.vit.VisionTransformer` (``class_token=False, gelu="tanh"``) and of timm's, without norm and head.

    Scales and shifts of adaLN become those of LayerNorm, its gates enter the projections behind them, and the
    projection on latents the patch embedding (appendix A: "they can be merged given the fixed t").

    Args:
        state: of a :class:`DenoisingAutoencoder`.
        t: the level of noise that the network is told.
        depth: blocks that are kept; null: half of them.
        clean: what a network that was trained on pictures sees of one: "projected" on the latents, as in training, or
            the "image" itself.
        in_chans: of the pictures.

    Raises:
        ZooError: the weights are not of such a network, or have fewer blocks.
    """
    try:
        blocks = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))
        depth = blocks // 2 if depth is None else depth
        if depth > blocks:
            raise ZooError(f"the pre-trained network has {blocks} blocks, not the {depth} that are wanted")
        weight = state["t_embedder.mlp.0.weight"]
        c = linear(sinusoids(torch.tensor([float(t)])).to(weight), weight, state["t_embedder.mlp.0.bias"])
        c = linear(silu(c), state["t_embedder.mlp.2.weight"], state["t_embedder.mlp.2.bias"])
        if "y_embedder.embedding_table.weight" in state:
            c = c + state["y_embedder.embedding_table.weight"][-1]
        kernel, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
        tokenizer = {key.removeprefix("tokenizer."): value for key, value in state.items() if "tokenizer." in key}
        if tokenizer:
            kernel, bias = fold_tokenizer(kernel, bias, tokenizer, in_chans, clean)
        embedding = {"patch_embed.proj.weight": kernel, "patch_embed.proj.bias": bias}
        return {"pos_embed": state["pos_embed"], **embedding, **fold_condition(state, c[0], depth)}
    except (KeyError, ValueError) as error:
        raise ZooError(f"not the weights of a denoising autoencoder of this paper ({error})") from error


_ENCODER = re.compile(r"pos_embed|patch_embed\.proj\..+|blocks\..+")


def load_encoder(
    network: VisionTransformer, source: str | Path, t: int = 10, clean: Clean = "projected"
) -> dict[str, Tensor]:
    """Fill `network` with the exported encoder of a pre-training run; returns all that the source holds.

    Args:
        network: as many blocks of the pre-trained ones as it has; position embeddings are resized to its grid, its head
            and `fc_norm` stay as they are.
        source: a checkpoint of :class:`LDAEPretraining`, or a file of a :class:`DenoisingAutoencoder`.
        t, clean: of :func:`export_encoder`.

    Raises:
        ZooError: the file is missing, or its encoder is not of this network's shape.
    """
    state = convert_official(read_source(source))
    found = export_encoder(state, t, len(network.blocks), clean, network.patch_embed.in_chans)
    found["pos_embed"] = resize_pos_embed(found["pos_embed"], network.patch_embed.grid, num_prefix=0)
    fill(network, found, source, lambda key: _ENCODER.fullmatch(key) is not None)
    return state


# ----------------------------------------------------------------------------------------------------------- 4. tasks


def _schedule(noise: NoiseSchedule | Mapping[str, Any]) -> NoiseSchedule:
    """What a checkpoint holds as a plain mapping."""
    return NoiseSchedule(**noise) if isinstance(noise, Mapping) else noise


def _check_level(t: int, levels: Tensor) -> None:
    if not 0 <= t < len(levels):
        raise ZooError(f"this noise schedule has the levels t = 0 to {len(levels) - 1}, not {t}")


class LDAEPretraining(BaseModule):
    """Any step of the walk from DiT to l-DAE; the defaults are l-DAE's.

    Batches hold `image` (B, C, S, S): pictures, or without tokenizer latents too, and `label` (B,) where the network
    takes classes. They may pin the draws: `noise` (B, L, d), uniform `t` and `drop` (B,).

    Args:
        axes: where the tokenizer comes from: "fit" takes principal components of the training split when a run begins;
            or a file of ``zoo data patch_pca``; or a checkpoint of a trained linear autoencoder of patches. A
            checkpoint of this task holds them, and they are not taken anew.
        fit_images: pictures that are read for that.
        center: take the mean patch off before the components are found.
        target: what is predicted: the "noise", the clean "latent", its "projection" back to pixels, or the "original"
            picture, with weights in the space of principal components (equation 4).
        tail_weight: weight of the components that noise is not added to; of the target "original".
        noise: levels.
        t: the level that `features` tells the network.
        clean: what `features` shows a network of pictures; see :func:`export_encoder`.
        label_dropout: chance of each sample to train without its label.
        sampling_steps: of :meth:`sample`, which steps that keep the variance can.
        autoencoder: weights of the autoencoder whose latents the batches hold, or "pixels"; samples are decoded by it.
        optim: optimiser and schedule.
        network: of :class:`DenoisingAutoencoder`.

    Raises:
        ZooError: options that do not go together.
    """

    batch_keys: Sequence[str]

    def __init__(
        self,
        axes: str = "fit",
        fit_images: int = 10_000,
        center: bool = True,
        target: Target = "original",
        tail_weight: float = 0.1,
        noise: NoiseSchedule = NoiseSchedule(),
        t: int = 10,
        clean: Clean = "projected",
        label_dropout: float = 0.1,
        sampling_steps: int = 250,
        autoencoder: str = PIXELS,
        optim: Optim = Optim(base_lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup_epochs=100),  # noqa: B008
        **network: Any,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters()
        self.network = net = DenoisingAutoencoder(**network)
        if target not in ("noise", "latent", "projection", "original"):
            raise unknown("target", target, ("noise", "latent", "projection", "original"))
        of_pixels = target in ("projection", "original")
        if of_pixels != (net.output == "image") and net.tokenizer is not None:
            raise ZooError(f"the target {target!r} wants model.output {'image' if of_pixels else 'latent'}")
        if of_pixels and net.tokenizer is None:
            raise ZooError(f"the target {target!r} wants a tokenizer; without one it is the same as latent")
        if fit_images < 1 or sampling_steps < 1 or not 0 <= label_dropout <= 1:
            raise ZooError("model.fit_images and model.sampling_steps are 1 or more, model.label_dropout is in [0, 1]")
        self.axes, self.fit_images, self.center = axes, fit_images, center
        self.target, self.tail_weight, self.noise = target, tail_weight, _schedule(noise)
        self.t, self.clean, self.label_dropout = t, clean, label_dropout
        self.num_classes, self.noise_shape = net.num_classes, (net.num_patches, net.latent_dim)
        self.gamma, self.sigma = self.noise.levels()
        self.weight = clean_weight(self.gamma**2, self.sigma**2)
        _check_level(t, self.sigma)
        self.batch_keys = ("image", "label") if net.num_classes else ("image",)
        self.sampling_steps, self.autoencoder = sampling_steps, FrozenAutoencoder(autoencoder)

    def trainable(self) -> nn.Module:
        return self.network

    # The tokenizer is found once, and from then on a part of every checkpoint: the signs of axes are arbitrary.

    def setup(self, stage: str) -> None:
        super().setup(stage)
        tokenizer = self.network.tokenizer
        if tokenizer is None or self._trainer is None or self.trainer.ckpt_path is not None or tokenizer.fitted():
            return
        if self.trainer.is_global_zero:
            data = getattr(self.trainer, "datamodule", None)
            fill_tokenizer(tokenizer, self.axes, data, self.fit_images, self.center)
        tokenizer.load_state_dict(self.trainer.strategy.broadcast(tokenizer.state_dict()))

    def _levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """gamma, sigma and lambda (B,) at t (B,)."""
        gamma, sigma, weight = (table.to(x.device, x.dtype)[t] for table in (self.gamma, self.sigma, self.weight))
        return gamma, sigma, weight

    def _labels(self, batch: Mapping[str, Any]) -> Tensor | None:
        if not self.num_classes:
            return None
        labels: Tensor = batch["label"]
        if self.training and self.label_dropout:
            labels = drop_labels(labels, self.draws(batch, "drop") < self.label_dropout, self.num_classes)
        return labels

    def _goal(self, images: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
        """What the network's output is to be (B, L, .)."""
        if self.target == "noise":
            return noise
        if self.target == "latent":
            return latents
        tokenizer = self.network.tokenizer
        assert tokenizer is not None
        return patchify(images, self.network.pixel_patch) if self.target == "original" else tokenizer.decode(latents)

    def losses(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss (B,) of each sample."""
        images, net = batch["image"], self.network
        latents = net.latents(images)
        noise = self.draws(batch, "noise", *self.noise_shape, normal=True).to(latents.dtype)
        t = (self.draws(batch, "t") * len(self.sigma)).long()
        gamma, sigma, weight = self._levels(t, latents)
        noisy = corrupt(latents, noise, 1.0 if not self.noise.preserving else gamma, sigma)
        output = net(net.seen(noisy), t, self._labels(batch))
        error = self._goal(images, latents, noise) - output
        if self.target == "original" and net.tokenizer is not None:
            residual = net.tokenizer.components(error.to(latents.dtype))
            return weighted_residual(residual, weight, net.latent_dim, self.tail_weight).mean(1)
        squares = error.to(latents.dtype).square().sum(-1).mean(1)
        return squares if self.target == "noise" else weight * squares

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.losses(batch).mean()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.tally("val/loss", self.losses(batch))

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.tally("test/loss", self.losses(batch))

    def features(self, images: Tensor) -> Tensor:
        """The encoder's features (B, D) of pictures (B, C, S, S), without noise, averaged over the tokens."""
        net = self.network
        through = net.input == "latent" or (net.tokenizer is not None and self.clean == "projected")
        seen = net.seen(net.latents(images)) if through else images
        return net.encode(seen, torch.full((len(images),), self.t, device=images.device)).mean(dim=1)

    @torch.no_grad()
    def denoise(self, images: Tensor, noise: Tensor, t: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pictures (B, C, S, S) with noise (B, L, d) of level t, and what the network makes of them."""
        net, latents = self.network, self.network.latents(images)
        level = torch.full((len(images),), t, device=images.device)
        gamma, sigma, _ = self._levels(level, latents)
        noisy = corrupt(latents, noise.to(latents.dtype), gamma, sigma)
        if labels is None:
            labels = net.null_labels(len(images), images.device)
        output = net(net.seen(noisy), level, labels).to(latents.dtype)
        if self.target == "noise":
            output = (noisy - like(sigma, noisy) * output) / like(gamma, noisy).clamp(min=1e-3)
        whole = self.target in ("projection", "original")
        return net.pictures(noisy), unpatchify(output, net.pixel_patch) if whole else net.pictures(output)

    @property
    def shown_level(self) -> int:
        """The t whose noise is nearest to that of the paper's pictures, sigma / gamma = sqrt(1/3) (Figures 7 and 8)."""
        return int((self.sigma - SINGLE_SIGMA * self.gamma).abs().argmin())

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The `noised` and the `denoised` pictures (B, C, S, S), normalised as the data."""
        noise = self.draws(batch, "noise", *self.noise_shape, normal=True)
        noised, denoised = self.denoise(batch["image"], noise, self.shown_level)
        return {"noised": noised, "denoised": denoised}

    def picture(self, batch: Mapping[str, Any]) -> Tensor:
        """A uint8 sheet (3, H, W): a row a picture; titled columns original, noised and denoised."""
        images = batch["image"]
        views = [images, *self.predict_step(batch, 0).values()]
        data = getattr(self._trainer, "datamodule", None)
        mean, std = getattr(data, "mean", IMAGENET_MEAN), getattr(data, "std", IMAGENET_STD)
        if self.autoencoder.source != PIXELS:
            views, mean, std = [self.autoencoder.decode(view) for view in views], (0.5,) * 3, (0.5,) * 3
        shift, scale = (
            torch.as_tensor(v, dtype=images.dtype, device=images.device)[:, None, None] for v in (mean, std)
        )
        pixels = [view * scale + shift for view in views]
        return titled_sheet(dict(zip(("original", "noised", "denoised"), pixels, strict=True)))

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """Pictures (B, 3, H, W) of noise (B, L, d), by the ancestral sampler, for the first steps of the walk.

        Raises:
            ZooError: no such diffusion: noise that does not keep the variance, or a target in pixels.
        """
        net = self.network
        if not self.noise.preserving or self.target not in ("noise", "latent"):
            raise ZooError("samples want a noise schedule original or linear, and the target noise or latent")
        gamma2 = self.gamma.square()
        gamma2 = gamma2[gamma2 > 0]  # at the last level of "linear" nothing is left of the data
        betas = 1 - gamma2 / torch.cat([gamma2.new_ones(1), gamma2[:-1]])
        prediction: Literal["noise", "data"] = "noise" if self.target == "noise" else "data"
        steps = min(self.sampling_steps, len(betas))
        diffusion = Diffusion(betas, respacing=steps, prediction=prediction, variance="fixed_small")
        call = lambda z, t: net(net.seen(z), t, label)  # noqa: E731
        *_, state = diffusion.ancestral(call, noise.to(self.dtype), step_noises(noise, steps))
        return self.autoencoder.decode(net.pictures(state))


class LDAEFineTuning(Classification):
    """End-to-end fine-tuning of the exported encoder, average-pooled (appendix B).

    Args:
        init_from: where the encoder comes from: a checkpoint of :class:`LDAEPretraining`; null trains from scratch.
        t, clean: of :func:`export_encoder`.
        mixup, cutmix, label_smoothing: of :class:`~zoo.training.Classification`.
        optim: optimiser and schedule.
        network: of :class:`~zoo.nn.vit.VisionTransformer`; a recipe sets `class_token` to false and `gelu` to "tanh".
    """

    network: VisionTransformer

    def __init__(
        self,
        init_from: str | None = None,
        t: int = 10,
        clean: Clean = "projected",
        mixup: float = 0.8,
        cutmix: float = 1.0,
        label_smoothing: float = 0.1,
        optim: Optim = Optim(lr=4e-3, betas=(0.9, 0.999), layer_decay=0.85, warmup_epochs=5),  # noqa: B008
        **network: Any,
    ) -> None:
        vit = VisionTransformer(**network)
        super().__init__(vit, optim, vit.num_classes, mixup, cutmix, label_smoothing, init_from)
        self.save_hyperparameters()
        self.t, self.clean = t, clean
        if init_from is not None:
            nn.init.trunc_normal_(self.network.get_parameter("head.weight"), std=2e-5)

    def load_initial(self, source: str) -> None:
        load_encoder(self.network, source, self.t, self.clean)


class LDAELinearProbe(LinearClassification):
    """Linear probing: the exported encoder's average-pooled tokens through BatchNorm without affine and one linear
    layer (appendix A). Blocks of the network are the probed depth.

    Args:
        init_from, t, clean: of :class:`LDAEFineTuning`.
        noisy: show pictures with the noise of level `t`, in training and in evaluation.
        noise: of the pre-training; where `noisy`.
        latent_dim: of the pre-training's tokenizer, or null for none; where `noisy`.
        autoencoder: weights of the autoencoder whose latents the encoder takes; "pixels" for none. It takes pictures
            in [-1, 1].
        optim: optimiser and schedule.
        network: of :class:`~zoo.nn.vit.VisionTransformer`; a recipe sets `class_token` to false and `gelu` to "tanh".
    """

    network: VisionTransformer

    def __init__(
        self,
        init_from: str | None = None,
        t: int = 10,
        clean: Clean = "projected",
        noisy: bool = False,
        noise: NoiseSchedule = NoiseSchedule(),
        latent_dim: int | None = 32,
        autoencoder: str = PIXELS,
        optim: Optim = Optim(name="lars", base_lr=0.1, weight_decay=0.0, warmup_epochs=10),  # noqa: B008
        **network: Any,
    ) -> None:
        vit = VisionTransformer(**network)
        vit.norms_pooled = False
        del vit.fc_norm
        super().__init__(vit, probe_head(vit.embed_dim, vit.num_classes), "head", optim, vit.num_classes, init_from)
        self.save_hyperparameters()
        self.t, self.clean, self.noisy = t, clean, noisy
        self.gamma, self.sigma = _schedule(noise).levels()
        _check_level(t, self.sigma)
        embed = vit.patch_embed
        self.tokenizer = PatchTokenizer(embed.patch_size, embed.in_chans, latent_dim) if noisy and latent_dim else None
        self.autoencoder = FrozenAutoencoder(autoencoder)

    def load_initial(self, source: str) -> None:
        state = load_encoder(self.network, source, self.t, self.clean)
        if self.tokenizer is not None:
            own = {
                key.removeprefix("tokenizer."): value for key, value in state.items() if key.startswith("tokenizer.")
            }
            if not own or own["encoder"].shape != self.tokenizer.encoder.shape:
                raise ZooError(f"{source} holds no tokenizer of model.latent_dim {self.tokenizer.latent_dim}")
            self.tokenizer.load_state_dict(own)

    def _shown(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its pictures as the encoder gets them."""
        images = batch["image"]
        if self.autoencoder.source != PIXELS:
            net = self.autoencoder.net(images.device)
            images = self.autoencoder.encode(images)[0] * net.scale
        if self.noisy:
            patch, tokenizer = self.network.patch_embed.patch_size, self.tokenizer
            latents = patchify(images, patch) if tokenizer is None else tokenizer.latents(images)
            noise = self.draws(batch, "noise", *latents.shape[1:], normal=True).to(latents)
            gamma, sigma = (table[self.t].to(latents).expand(len(images)) for table in (self.gamma, self.sigma))
            noisy = corrupt(latents, noise, gamma, sigma)
            images = unpatchify(noisy, patch) if tokenizer is None else tokenizer.pictures(noisy)
        return {**batch, "image": images}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step(self._shown(batch), batch_idx)

    def predict_logits(self, batch: Mapping[str, Any]) -> Tensor:
        return super().predict_logits(self._shown(batch))


# ---------------------------------------------------------------------------------------------- 5. models and weights


def l_dae_vit_base_patch16(**overrides: Any) -> DenoisingAutoencoder:
    """l-DAE with an encoder ViT-B/16 and a decoder of its size, 256 pixels."""
    return DenoisingAutoencoder(**{"embed_dim": 768, "depth": 24, "num_heads": 12, **overrides})


def l_dae_vit_12l_patch16(**overrides: Any) -> DenoisingAutoencoder:
    """l-DAE on DiT-L: its first 12 blocks are the encoder ("half large"), the others the decoder; 256 pixels."""
    return DenoisingAutoencoder(**{"embed_dim": 1024, "depth": 24, "num_heads": 16, **overrides})


def l_dae_vit_large_patch16(**overrides: Any) -> DenoisingAutoencoder:
    """l-DAE with an encoder ViT-L/16 and a decoder of its size, 256 pixels."""
    return DenoisingAutoencoder(**{"embed_dim": 1024, "depth": 48, "num_heads": 16, **overrides})


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a :class:`DenoisingAutoencoder`; no official ones are published.

    Raises:
        ZooError: a key that no such network has.
    """
    known = re.compile(
        r"pos_embed|x_embedder\.proj\.(weight|bias)|t_embedder\.mlp\.[02]\.(weight|bias)|y_embedder\.embedding_table\.weight"
        r"|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.[13])\.(weight|bias)"
        r"|final_layer\.(linear|adaLN_modulation\.1)\.(weight|bias)"
        r"|tokenizer\.(basis|variances|mean|back|encoder|decoder|gain)"
    )
    if foreign := [key for key in state_dict if not known.fullmatch(key)]:
        raise ZooError(f"not a checkpoint of l-DAE: {len(foreign)} unknown keys, such as {foreign[0]!r}")
    return dict(state_dict)
