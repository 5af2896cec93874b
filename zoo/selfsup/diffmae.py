"""Diffusion Models as Masked Autoencoders (DiffMAE).

Chen Wei, Karttikeya Mangalam, Po-Yao Huang, Yanghao Li, Haoqi Fan, Hu Xu, Huiyu Wang, Cihang Xie, Alan Yuille,
Christoph Feichtenhofer. ICCV 2023, arXiv 2304.03283.

MAE guesses hidden patches in one step, and blurs what it cannot know. DiffMAE models their distribution given the
visible ones: these go, clean, through MAE's encoder; the hidden ones are noised, and a decoder that attends to the
encoder regresses their clean pixels. It pre-trains about as well as MAE, it inpaints by the sampler of a diffusion
model, and at the last time, where the input is pure noise, it is MAE with noise for a mask token.

Conventions: images (B, C, S, S), or clips (B, C, T, S, S), normalised by the data set's mean and standard deviation; L
patches of P numbers, K of them visible, M hidden, in MAE's orders; token 0 of the encoder is the class token; `mask` is
1 where hidden. Times t are 1 ... T, as the paper counts; x_t^m = sqrt(abar_t) x_0^m + sqrt(1 - abar_t) e.

No official code was released, and the paper's body could not be had when this was written: what the card's ledger calls
a choice follows the abstract, the project page, what is known second-hand, and MAE.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import layer_norm, mse_loss
from torch.utils.checkpoint import checkpoint

from zoo.errors import ZooError, unknown
from zoo.nn.clip_patches import clip_width, load_clip_patches
from zoo.nn.dit import TimestepEmbedder
from zoo.nn.masked import MaskedEncoder
from zoo.nn.perceptual import FrozenNetwork
from zoo.nn.vit import NORM_EPS, Attention, Block, init_as_linear, run_blocks
from zoo.ops.attention import attention
from zoo.ops.denoising import noise_stream
from zoo.ops.diffusion import Diffusion
from zoo.ops.masking import Masking, centre_masking, put_tokens, random_masking, take_tokens, tokens_at
from zoo.ops.sheet import titled_sheet
from zoo.selfsup import mae
from zoo.selfsup.mae import IMAGENET_MEAN, IMAGENET_STD, normalize_patches
from zoo.training import BaseModule, Optim
from zoo.weights.pretrained import fill, read_source

__all__ = [
    "DiffMAEFineTuning",
    "DiffMAELinearProbe",
    "DiffMAEPretraining",
    "DiffusionMaskedAutoencoder",
    "convert_official",
    "diffmae_vit_base_patch16",
    "diffmae_vit_huge_patch14",
    "diffmae_vit_large_patch16",
    "diffuse",
    "encoder_links",
    "noise_schedule",
    "posterior_step",
]

Decoder = Literal["joint", "cross", "cross-self"]
PIXEL_BOUND = 3.0  # what an estimate from predicted noise is held to; ImageNet's normalised pixels are in [-2.12, 2.64]
SHOWN = (0.25, 0.5, 0.75)  # of the way, where a picture shows the sampler's states

# ------------------------------------------------------------------------------------------------------- 1. equations


def noise_schedule(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, rho: float = 0.8) -> Tensor:
    """beta_t^rho (T,) in float64, on the CPU, for beta linear in t; rho < 1 enlarges every beta, which is more noise.

    Raises:
        ZooError: rho is not in (0, 1], or the betas are not in (0, 1).
    """
    if not (0 < rho <= 1 and 0 < beta_start <= beta_end < 1 and timesteps >= 1):
        raise ZooError(
            "a noise schedule wants 0 < beta_start <= beta_end < 1, rho in (0, 1] and 1 step or more; got"
            f" {beta_start}, {beta_end}, {rho} and {timesteps}"
        )
    return torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64, device="cpu") ** rho


def diffuse(patches: Tensor, mask: Tensor, t: Tensor, noise: Tensor, process: Diffusion) -> Tensor:
    """Patches (B, L, P) noised to the times t (B,) where `mask` (B, L) is 1, clean elsewhere."""
    return torch.where(mask[..., None] > 0, process.noised(patches, t - 1, noise), patches)


def posterior_step(x_t: Tensor, x_0: Tensor, t: Tensor, noise: Tensor, process: Diffusion) -> Tensor:
    """A draw (B, ...) of q(x_{t-1} | x_t, x_0) at times t (B,) by standard normal `noise` (Ho et al. 2020, equations 6
    and 7); x_0 itself at t = 1.

    `process` predicts data, with the true posterior's variance.
    """
    model = process.posterior(x_0, x_t, t - 1)
    last = (t == 1).view(-1, *[1] * (x_t.ndim - 1))
    return torch.where(last, model.mean, model.mean + (0.5 * model.log_variance).exp() * noise)


def encoder_links(depth: int, decoder_depth: int) -> list[int]:
    """Behind how many encoder blocks each decoder block reads, top down: decoder block j of J reads layer
    round((J - j) / J * depth), and so the first one the last. The map for unequal depths is a choice."""
    return [round((decoder_depth - j) / decoder_depth * depth) for j in range(decoder_depth)]


# --------------------------------------------------------------------------------------------------------- 2. network


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a context of another width, whose keys can be kept from step to step."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ZooError(f"decoder_embed_dim {dim} is not divisible by decoder_num_heads {num_heads}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def keys(self, context: Tensor) -> Tensor:
        """Keys and values (2, B, heads, N, D / heads) of a context (B, N, C)."""
        return self.kv(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """Tokens (B, M, D) to (B, M, D)."""
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return self.proj(attention(q, keys[0], keys[1]).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """A decoder block of noised tokens: cross-attention to an encoder layer, self-attention among them unless left out,
    MLP, each pre-norm and residual. The encoder layer is normalised too, unless it is so already."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        mlp_ratio: float,
        self_attention: bool,
        norm_context: bool,
    ) -> None:
        super().__init__()
        self.norm_context = nn.LayerNorm(context_dim, eps=NORM_EPS) if norm_context else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = CrossAttention(dim, context_dim, num_heads)
        self.self_attention = self_attention
        if self_attention:
            self.norm_self = nn.LayerNorm(dim, eps=NORM_EPS)
            self.self_attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def keys(self, context: Tensor) -> Tensor:
        """What :meth:`forward` wants of an encoder layer (B, 1 + K, C)."""
        return self.cross_attn.keys(self.norm_context(context))

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """Tokens (B, M, D) to (B, M, D)."""
        x = x + self.cross_attn(self.norm1(x), keys)
        if self.self_attention:
            x = x + self.self_attn(self.norm_self(x))
        return x + self.mlp(self.norm2(x))


class DiffusionMaskedAutoencoder(MaskedEncoder):
    """MAE's encoder of the visible patches, and a decoder that denoises the hidden ones.

    Args:
        img_size: side of the square images, in pixels.
        decoder: "cross-self", "cross" (noised tokens never see each other), or "joint" (MAE's: self-attention over
            visible and noised tokens). The first two read the encoder's layers by :func:`encoder_links`.
        timesteps: T.
        beta_start, beta_end, rho: of :func:`noise_schedule`.
        prediction: what the decoder predicts, the clean patches ("x0") or their noise ("eps").
        norm_pix_loss: regress patches standardised as in MAE; for transfer alone, such a model does not sample.
        feature_dim: instead of pixels, regress features of so many channels, which :meth:`loss` is given.
        num_frames: of clips; null: the input is images.
        tubelet_size: frames of a space-time patch.
        grad_checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder: Decoder = "cross-self",
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rho: float = 0.8,
        prediction: Literal["x0", "eps"] = "x0",
        norm_pix_loss: bool = False,
        feature_dim: int | None = None,
        num_frames: int | None = None,
        tubelet_size: int = 2,
        grad_checkpointing: bool = False,
    ) -> None:
        if decoder not in ("joint", "cross", "cross-self"):
            raise unknown("decoder", decoder, ("joint", "cross", "cross-self"))
        if prediction not in ("x0", "eps"):
            raise unknown("prediction", prediction, ("x0", "eps"))
        if (prediction == "eps") + norm_pix_loss + (feature_dim is not None) > 1:
            raise ZooError("prediction eps, norm_pix_loss and features are three targets of the decoder: choose one")
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            num_frames,
            tubelet_size,
            grad_checkpointing,
        )
        self.decoder, self.prediction, self.norm_pix_loss = decoder, prediction, norm_pix_loss
        self.feature_dim, self.timesteps = feature_dim, timesteps
        self.betas = noise_schedule(timesteps, beta_start, beta_end, rho)  # no buffer: float64 whatever the module is
        self.process = Diffusion(
            self.betas, prediction="data" if prediction == "x0" else "noise", variance="fixed_small"
        )

        width, joint = decoder_embed_dim, decoder == "joint"
        self.links = [] if joint else encoder_links(depth, decoder_depth)
        if joint:
            self.decoder_embed = nn.Linear(embed_dim, width)
            blocks: list[nn.Module] = [Block(width, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)]
        else:
            sizes, alone = (width, embed_dim, decoder_num_heads, mlp_ratio), decoder == "cross"
            blocks = [CrossBlock(*sizes, not alone, layer < depth) for layer in self.links]
        self.decoder_patch_embed = nn.Linear(self.patch_values, width)
        self.add_positions("decoder_pos_embed", width, num_prefix=int(joint))
        self.t_embedder = TimestepEmbedder(width)
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(width, feature_dim or self.patch_values)
        self._initialize()

    def _initialize(self) -> None:
        init_as_linear(self.patch_embed.proj)
        nn.init.normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def encode(self, patches: Tensor, masking: Masking) -> list[Tensor]:
        """What the decoder wants of the visible ones among the patches (B, L, P), at any time: the keys of each block,
        or of a joint decoder the visible tokens (B, 1 + K, D), alone."""
        kept, table = masking.ids_keep, self.positions()
        x = self._embed(take_tokens(patches, kept), tokens_at(table[:, 1:], kept), table[:, :1])
        if self.decoder == "joint":
            own = self.positions("decoder_pos_embed")
            places = torch.cat([own[:, :1].expand(len(x), -1, -1), tokens_at(own[:, 1:], kept)], dim=1)
            latent = self.norm(run_blocks(self.blocks, x, self.grad_checkpointing))
            return [self.decoder_embed(latent) + places]
        layers = {0: x}
        for number, block in enumerate(self.blocks, 1):
            x = run_blocks(nn.ModuleList([block]), x, self.grad_checkpointing)
            layers[number] = x
        layers[len(self.blocks)] = self.norm(x)
        return [block.keys(layers[link]) for block, link in zip(self.decoder_blocks, self.links, strict=True)]  # type: ignore[operator]

    def decode(self, memory: list[Tensor], masking: Masking, noisy: Tensor, t: Tensor) -> Tensor:
        """What the decoder predicts (B, M, P), or (B, M, feature_dim), of hidden patches (B, M, P) noised to the times
        t (B,), by the `memory` of :meth:`encode`."""
        prefix = int(self.decoder == "joint")
        places = tokens_at(self.positions("decoder_pos_embed")[:, prefix:], masking.ids_masked)
        x = self.decoder_patch_embed(noisy) + places + self.t_embedder(t)[:, None]
        if self.decoder == "joint":
            last = x.shape[1]
            x = run_blocks(self.decoder_blocks, torch.cat([memory[0], x], dim=1), self.grad_checkpointing, last)[
                :, -last:
            ]
        else:
            for block, keys in zip(self.decoder_blocks, memory, strict=True):
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, keys, use_reentrant=False)
                else:
                    x = block(x, keys)
        return self.decoder_pred(self.decoder_norm(x))

    def loss(
        self,
        inputs: Tensor,
        mask_noise: Tensor,
        t: Tensor,
        noise: Tensor,
        mask_ratio: float = 0.75,
        features: Tensor | None = None,
    ) -> Tensor:
        """The mean squared error over the hidden patches, of every time alike.

        Args:
            inputs: images or clips.
            mask_noise: (B, L); decides which patches stay, see :func:`~zoo.ops.masking.random_masking`.
            t: times (B,) in 1 ... T.
            noise: standard normal (B, L, P), of which the hidden patches' is used.
            features: of all patches (B, L, feature_dim), where these are the target.
        """
        patches, masking = self._mask(inputs, mask_ratio, mask_noise)
        hidden = masking.ids_masked
        clean, noise = take_tokens(patches, hidden), take_tokens(noise, hidden)
        noisy = self.process.noised(clean, t - 1, noise)
        if self.feature_dim is not None:
            assert features is not None
            target = take_tokens(features, hidden)
        elif self.prediction == "eps":
            target = noise
        else:
            target = normalize_patches(clean) if self.norm_pix_loss else clean
        pred = self.decode(self.encode(patches, masking), masking, noisy, t)
        return mse_loss(pred.to(target.dtype), target)

    def forward(self, images: Tensor) -> Tensor:
        """The tokens (B, 1 + L, D) of whole images, or clips, which are what pre-training is for."""
        return self.forward_features(images)

    def check_samples(self) -> None:
        """Raises ZooError where the decoder's target is none that a sampler could go on with at every time."""
        if self.norm_pix_loss or self.feature_dim is not None:
            target = "standardised patches" if self.norm_pix_loss else "features"
            raise ZooError(
                f"this model regresses {target}, which are not what is noised: it does not sample; train one with"
                " norm_pix_loss false and no teacher"
            )
        if self.prediction == "eps" and not bool((1 / self.process.abar).sqrt().float().isfinite().all()):
            raise ZooError(
                f"at its last times this schedule (beta {self.betas[0]:.2g} to {self.betas[-1]:.2g}) leaves nothing to"
                " tell from predicted noise: it does not sample; a larger rho, or prediction x0"
            )

    @torch.no_grad()
    def inpaint(self, inputs: Tensor, masking: Masking, noise: Tensor, steps: int | None = None) -> Iterator[Tensor]:
        """The sampler's states (B, M, P) after each step, all of hidden patches: DDPM's posterior with the predicted
        x_0, over all T times or `steps` evenly spaced ones. The encoder runs once; visible patches are never noised.

        Args:
            noise: standard normal (B, L, P), of which the hidden patches' is the first state. The noise of later steps
                is a function of it, sample by sample.

        Raises:
            ZooError: the target is not pixels, or more steps than times.
        """
        self.check_samples()
        self.patch_embed.check(inputs)
        memory = self.encode(self.to_patches(inputs), masking)
        process = Diffusion(self.betas, respacing=steps or "", prediction="data", variance="fixed_small")

        def data(z: Tensor, step: Tensor) -> Tensor:
            output = self.decode(memory, masking, z, step + 1).to(z.dtype)
            if self.prediction == "x0":
                return output
            return self.process.posterior(output, z, step).data.clamp(-PIXEL_BOUND, PIXEL_BOUND)

        first = take_tokens(noise, masking.ids_masked)
        yield from process.ancestral(data, first, islice(noise_stream(first), len(process)))

    def paste(self, inputs: Tensor, masking: Masking, hidden: Tensor | float) -> Tensor:
        """Images or clips with `hidden` (B, M, P), or one number, in the places of the hidden patches."""
        patches = self.to_patches(inputs)
        size = (*masking.ids_masked.shape, patches.shape[2])
        values = hidden if isinstance(hidden, Tensor) else patches.new_full(size, hidden)
        return self.from_patches(put_tokens(patches, masking.ids_masked, values))


# ----------------------------------------------------------------------------------------------------------- 3. tasks


class DiffMAEPretraining(BaseModule):
    """Pre-training, and inpainting by what was learnt.

    Batches hold `image` (B, C, S, S), or of a network of clips `video` (B, C, T, S, S). They may pin `mask_noise`
    (B, L), `time` (B,), uniform in [0, 1), and `noise` (B, L, P).

    Args:
        mask_ratio: share of patches that are hidden.
        inpaint: what `predict` hides: "random" patches, `mask_ratio` of them, or the "centre" (the middle half of each
            side).
        steps: of the sampler, at most T; null: all T.
        teacher: the target is what a frozen CLIP says of each patch: timm's name of its image tower, such as
            vit_base_patch16_clip_224.openai; null: pixels.
        teacher_file: the tower's weights; null: those that timm fetches.
        feature: what `features` gives to probes: the class "token", or the mean of the patch tokens ("avg").
        init_from: MAE's or DiffMAE's weights, of which the encoder starts; null: from scratch.
        compile: compile the training loss with torch.compile.
        optim: optimiser and schedule.
        network: of :class:`DiffusionMaskedAutoencoder`.
    """

    def __init__(
        self,
        mask_ratio: float = 0.75,
        inpaint: Literal["random", "centre"] = "random",
        steps: int | None = 50,
        teacher: str | None = None,
        teacher_file: str | None = None,
        feature: Literal["token", "avg"] = "avg",
        init_from: str | None = None,
        compile: bool = False,
        optim: Optim = Optim(base_lr=1.5e-4, warmup_epochs=40),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters()
        if teacher is not None:
            network["feature_dim"] = clip_width(teacher)
        self.network = DiffusionMaskedAutoencoder(**network)
        length = self.network.num_patches
        if not (0 < mask_ratio < 1 and 1 <= int(length * (1 - mask_ratio)) < length):
            raise ZooError(f"mask_ratio {mask_ratio} of {length} patches must hide at least one and leave at least one")
        if self.network.feature_dim is not None and teacher is None:
            raise ZooError("feature_dim is the teacher's to say: name one by model.teacher")
        if steps is not None and not 1 <= steps <= self.network.timesteps:
            raise ZooError(f"the sampler takes 1 to {self.network.timesteps} steps (model.steps), not {steps}")
        if inpaint not in ("random", "centre"):
            raise unknown("inpaint", inpaint, ("random", "centre"))
        self.mask_ratio, self.inpaint, self.steps, self.feature = mask_ratio, inpaint, steps, feature
        self.init_from = init_from
        self.key = "image" if self.network.num_frames is None else "video"
        self.batch_keys = (self.key,)
        self.teacher: FrozenNetwork | None = None
        if teacher is not None:
            grid = self.network.patch_embed.grid[-1]
            self.teacher = FrozenNetwork(partial(load_clip_patches, teacher, grid, teacher_file))
        self._loss = torch.compile(self.network.loss) if compile else self.network.loss

    def trainable(self) -> nn.Module:
        return self.network

    def setup(self, stage: str) -> None:
        if self.teacher is not None and stage in ("fit", "validate", "test"):
            self.teacher.check()
        super().setup(stage)

    def load_initial(self, source: str) -> None:
        state = {k: v for k, v in convert_official(read_source(source)).items() if _ENCODER.fullmatch(k)}
        fill(self.network, state, source, lambda key: _ENCODER.fullmatch(key) is not None)

    def _scale(self) -> tuple[Any, Any]:
        """Mean and deviation by which the inputs were normalised."""
        data = getattr(self._trainer, "datamodule", None)
        return getattr(data, "mean", IMAGENET_MEAN), getattr(data, "std", IMAGENET_STD)

    @torch.no_grad()
    def targets(self, inputs: Tensor) -> Tensor | None:
        """The teacher's features (B, L, F) of each patch, standardised over F; of clips, those of the first frame of
        each space-time patch. None without a teacher."""
        if self.teacher is None:
            return None
        mean, std = (torch.as_tensor(v, device=inputs.device)[:, None, None] for v in self._scale())
        frames = inputs if inputs.ndim == 4 else inputs[:, :, :: self.network.patch_embed.tubelet_size].transpose(1, 2)
        pixels = frames.flatten(0, -4) * std + mean
        features = self.teacher.net(inputs.device)(pixels)
        return layer_norm(features, features.shape[-1:]).reshape(len(inputs), -1, features.shape[-1])

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The denoising loss of a batch."""
        inputs, net = batch[self.key], self.network  # before the draws, so that its absence is told
        mask_noise = self.draws(batch, "mask_noise", net.num_patches)
        t = 1 + (self.draws(batch, "time") * net.timesteps).long().clamp(max=net.timesteps - 1)
        noise = self.draws(batch, "noise", net.num_patches, net.patch_values, normal=True)
        return self._loss(inputs, mask_noise, t, noise, self.mask_ratio, self.targets(inputs))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.tally("val/loss", self.loss(batch), len(batch[self.key]))

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.tally("test/loss", self.loss(batch), len(batch[self.key]))

    def _masking(self, batch: Mapping[str, Any], kind: str) -> Masking:
        if kind == "random":
            return random_masking(self.draws(batch, "mask_noise", self.network.num_patches), self.mask_ratio)
        middle = centre_masking(self.network.patch_embed.grid, len(batch[self.key]))
        return Masking(*(part.to(self.device) for part in middle))

    def _states(self, batch: Mapping[str, Any], masking: Masking) -> Iterator[Tensor]:
        size = (self.network.num_patches, self.network.patch_values)
        return self.network.inpaint(
            batch[self.key], masking, self.draws(batch, "noise", *size, normal=True), self.steps
        )

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The `masked` inputs (hidden patches 0) and the `reconstruction`, a sample with the visible patches in place;
        both like the input, normalised."""
        masking = self._masking(batch, self.inpaint)
        hidden = deque(self._states(batch, masking), maxlen=1).pop()
        masked, sample = (self.network.paste(batch[self.key], masking, value) for value in (0.0, hidden))
        return {"masked": masked, "reconstruction": sample}

    def features(self, images: Tensor) -> Tensor:
        """Frozen features (B, D) of whole images or clips."""
        tokens = self.network.forward_features(images)
        return tokens[:, 0] if self.feature == "token" else tokens[:, 1:].mean(dim=1)

    def picture(self, batch: Mapping[str, Any]) -> Tensor:
        """A uint8 sheet (3, H, W), a row an image (of clips, the middle frame): masked, the sampler's states on the
        way, the sample, the original. First by random masks, then by the centre."""
        inputs = batch[self.key]
        mean, std = (torch.as_tensor(v, dtype=inputs.dtype, device=inputs.device)[:, None, None] for v in self._scale())

        def frame(values: Tensor) -> Tensor:
            return values if values.ndim == 4 else values[:, :, values.shape[2] // 2]

        total = self.steps or self.network.timesteps
        wanted = {step: f"step {step}" for step in (max(1, round(share * total)) for share in SHOWN)}
        wanted[total] = f"sample, {total} steps"
        columns: dict[str, list[Tensor]] = {}
        for kind in ("random", "centre"):
            masking = self._masking(batch, kind)
            hidden = self.network.paste(torch.zeros_like(inputs), masking, 1.0) > 0
            columns.setdefault("masked", []).append(torch.where(frame(hidden), 0.5, frame(inputs) * std + mean))
            for step, state in enumerate(self._states(batch, masking), 1):
                if step in wanted:
                    pasted = frame(self.network.paste(inputs, masking, state))
                    columns.setdefault(wanted[step], []).append(pasted * std + mean)
            columns.setdefault("original", []).append(frame(inputs) * std + mean)
        return titled_sheet({title: torch.cat(parts) for title, parts in columns.items()})


class DiffMAEFineTuning(mae.MAEFineTuning):
    """End-to-end fine-tuning, by MAE's recipe; `init_from` takes DiffMAE's encoders, and MAE's."""

    def load_initial(self, source: str) -> None:
        mae.load_encoder(self.network, source, convert_official)


class DiffMAELinearProbe(mae.MAELinearProbe):
    """Linear probing, by MAE's recipe; `init_from` takes DiffMAE's encoders, and MAE's."""

    def load_initial(self, source: str) -> None:
        mae.load_encoder(self.network, source, convert_official)


# ---------------------------------------------------------------------------------------------------------- 4. models


def diffmae_vit_base_patch16(**overrides: Any) -> DiffusionMaskedAutoencoder:
    """DiffMAE with a ViT-B/16 encoder and a cross-self decoder of 8 blocks of width 512."""
    return DiffusionMaskedAutoencoder(**{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **overrides})


def diffmae_vit_large_patch16(**overrides: Any) -> DiffusionMaskedAutoencoder:
    """DiffMAE with a ViT-L/16 encoder and a cross-self decoder of 8 blocks of width 512."""
    return DiffusionMaskedAutoencoder(
        **{"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **overrides}
    )


def diffmae_vit_huge_patch14(**overrides: Any) -> DiffusionMaskedAutoencoder:
    """DiffMAE with a ViT-H/14 encoder and a cross-self decoder of 8 blocks of width 512."""
    return DiffusionMaskedAutoencoder(
        **{"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, **overrides}
    )


# ------------------------------------------------------------------------------------------------ 5. state dicts

_AFFINE = r"\.(?:weight|bias)"
_POSITIONS = r"pos_embed(?:_spatial|_temporal|_class)?"
_ENCODER_LAYERS = (
    rf"(?:patch_embed\.proj|norm|blocks\.\d+\.(?:norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2)){_AFFINE}"
)
_ENCODER = re.compile(rf"cls_token|{_POSITIONS}|{_ENCODER_LAYERS}")
_DECODER = re.compile(
    rf"decoder_{_POSITIONS}"
    rf"|(?:decoder_embed|decoder_patch_embed|t_embedder\.mlp\.[02]|decoder_norm|decoder_pred){_AFFINE}"
    r"|decoder_blocks\.\d+\.(?:norm_context|norm1|norm_self|norm2|attn\.qkv|attn\.proj|cross_attn\.(?:q|kv|proj)"
    rf"|self_attn\.(?:qkv|proj)|mlp\.fc[12]){_AFFINE}"
)


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in our names: DiffMAE's, of which none was published, so that they are ours; or any of those that
    :func:`zoo.selfsup.mae.convert_official` takes.

    Raises:
        ZooError: a key that belongs to none of these layouts.
    """
    if not any(key.startswith(("decoder_patch_embed.", "t_embedder.")) for key in state_dict):
        return mae.convert_official(state_dict)
    if foreign := [key for key in state_dict if not (_ENCODER.fullmatch(key) or _DECODER.fullmatch(key))]:
        raise ZooError(f"not a DiffMAE checkpoint: {len(foreign)} unknown keys, such as {foreign[0]!r}")
    return dict(state_dict)
