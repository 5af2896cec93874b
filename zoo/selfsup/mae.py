"""Masked Autoencoders Are Scalable Vision Learners.

Kaiming He, Xinlei Chen, Saining Xie, Yanghao Li, Piotr Dollár, Ross Girshick. CVPR 2022, arXiv 2111.06377.

Mask 75 % of an image's patches, encode only the visible ones with a ViT, and let a small decoder, which also gets a
shared mask token at every hidden place, regress the pixels of the hidden patches. The encoder never sees a mask token,
so pre-training costs a third of what it would and large plain ViTs learn from ImageNet-1k alone. Afterwards the decoder
is dropped; the encoder is fine-tuned end to end, or probed with a linear classifier.

Conventions: images (B, C, S, S) normalised by the data set's mean and standard deviation; L patches of P = p*p*C
numbers in the order (row, column, channel); K of them visible; token 0 is the class token; `mask` is 1 where hidden.

Deviations from the official PyTorch code, none of which changes a value:
- Visible patches are embedded by a matrix product after the selection, not by a convolution before it.
- The decoder keeps the shuffled order (visible first) and shuffles its position table instead of its tokens. Attention
  does not depend on the order, and the hidden tokens are then the tail of the sequence.
- Training takes :meth:`MaskedAutoencoder.loss`, in which the last decoder block, its norm and the prediction compute
  the hidden tokens only. :meth:`MaskedAutoencoder.forward` predicts every patch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from zoo.errors import ZooError
from zoo.nn.masked import MaskedEncoder
from zoo.nn.vit import NORM_EPS, Block, VisionTransformer, init_as_linear, run_blocks
from zoo.ops.masking import random_masking, take_tokens, tokens_at
from zoo.ops.patches import patchify, unpatchify
from zoo.ops.pos_embed import resize_pos_embed
from zoo.ops.sheet import titled_sheet
from zoo.training import BaseModule, Classification, LinearClassification, Optim, probe_head
from zoo.weights.pretrained import fill, read_source

__all__ = [
    "MAEFineTuning",
    "MAELinearProbe",
    "MAEPretraining",
    "MaskedAutoencoder",
    "convert_official",
    "load_encoder",
    "mae_vit_base_patch16",
    "mae_vit_huge_patch14",
    "mae_vit_large_patch16",
    "normalize_patches",
    "patchify",
    "random_masking",
    "reconstruction_loss",
    "unpatchify",
    "vit_base_patch16",
    "vit_huge_patch14",
    "vit_huge_patch14_448",
    "vit_large_patch16",
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COLUMNS = ("original", "masked", "reconstruction", "reconstruction + visible")

# ------------------------------------------------------------------------------------------------------- 1. equations


def normalize_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Patches (B, L, P), each standardised by its own mean and unbiased variance (section 3, "Target")."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * (variance + eps).rsqrt()


def reconstruction_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of patches (B, L, P) where `mask` (B, L) is 1: one mean over the whole batch (section 3)."""
    per_patch = (pred - target).square().mean(dim=-1)
    return (per_patch * mask).sum() / mask.sum()


# --------------------------------------------------------------------------------------------------------- 2. network


class MaskedAutoencoder(MaskedEncoder):
    """The asymmetric encoder and decoder.

    Args:
        img_size: side of the square images, in pixels.
        norm_pix_loss: reconstruct standardised patches (Table 1d) instead of raw pixels.
        grad_checkpointing: recompute activations in the backward pass, for H/14 on small memory.
    """

    export_part = "forward_features"
    pos_embed: nn.Parameter
    decoder_pos_embed: nn.Parameter

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = True,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            grad_checkpointing=grad_checkpointing,
        )
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)

        self.add_positions("decoder_pos_embed", decoder_embed_dim)
        self._initialize()

    def _initialize(self) -> None:
        init_as_linear(self.patch_embed.proj)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def target(self, patches: Tensor) -> Tensor:
        """What the decoder is to predict for `patches` (B, L, P)."""
        return normalize_patches(patches) if self.norm_pix_loss else patches

    def _decode(self, latent: Tensor, ids_shuffle: Tensor, last: int | None = None) -> Tensor:
        """Latent tokens (B, 1 + K, D) to predictions (B, 1 + L, P) in shuffled order, or of the `last` tokens only."""
        hidden = ids_shuffle.shape[1] + 1 - latent.shape[1]
        x = torch.cat([self.decoder_embed(latent), self.mask_token.expand(len(latent), hidden, -1)], dim=1)
        table = self.decoder_pos_embed
        positions = tokens_at(table[:, 1:], ids_shuffle)
        x = x + torch.cat([table[:, :1].expand(len(latent), -1, -1), positions], dim=1)
        x = run_blocks(self.decoder_blocks, x, self.grad_checkpointing, last)
        if last is not None:
            x = x[:, -last:]
        return self.decoder_pred(self.decoder_norm(x))

    def forward_encoder(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latent tokens (B, 1 + K, D) in shuffled order, mask (B, L), and ids_restore (B, L), which unshuffles."""
        patches, masking = self._mask(images, mask_ratio, noise)
        kept = masking.ids_keep
        latent = self._encode(take_tokens(patches, kept), tokens_at(self.pos_embed[:, 1:], kept))
        return latent, masking.mask, masking.ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predictions (B, L, P) of all patches, in the grid's order."""
        return take_tokens(self._decode(latent, ids_restore.argsort(dim=1))[:, 1:], ids_restore)

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """The loss of predictions (B, L, P) of all patches."""
        return reconstruction_loss(pred, self.target(patchify(images, self.patch_size)), mask)

    def forward(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, predictions (B, L, P) of all patches, and mask (B, L).

        `noise` (B, L) decides which patches stay; uniform from the global generator where it is not given.
        """
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(images, pred, mask), pred, mask

    def loss(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> Tensor:
        """The loss that :meth:`forward` returns, without the work that it does not depend on.

        Raises:
            ZooError: `mask_ratio` hides no patch.
        """
        patches, (kept, masked, _, _) = self._mask(images, mask_ratio, noise)
        hidden = masked.shape[1]
        if not hidden:
            raise ZooError(f"mask_ratio {mask_ratio} hides none of {self.num_patches} patches: there is no loss")
        latent = self._encode(take_tokens(patches, kept), tokens_at(self.pos_embed[:, 1:], kept))
        pred = self._decode(latent, torch.cat([kept, masked], dim=1), last=hidden)
        target = self.target(take_tokens(patches, masked))
        return mse_loss(pred.to(target.dtype), target)

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, S, S) as the encoder saw them (hidden patches 0), as predicted, and the prediction with the
        visible patches pasted in. Predictions of standardised patches get back their patch's mean and deviation."""
        _, pred, mask = self(images, mask_ratio, noise)
        patches = patchify(images, self.patch_size)
        pred = pred.to(patches.dtype)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            pred = pred * (variance + 1e-6).sqrt() + mean
        hidden = mask.unsqueeze(-1).to(patches.dtype)
        views = patches * (1 - hidden), pred, patches * (1 - hidden) + pred * hidden
        seen, predicted, pasted = (unpatchify(view, self.patch_size) for view in views)
        return seen, predicted, pasted

    def picture(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        mean: Any = IMAGENET_MEAN,
        std: Any = IMAGENET_STD,
    ) -> Tensor:
        """A uint8 sheet (3, H, W): a row an image; titled columns original, masked, reconstruction, and reconstruction
        + visible.

        `mean` and `std` are those by which `images` (B, C, S, S) were normalised. Small images are shown enlarged.
        """
        views = [images, *self.reconstruct(images, mask_ratio, noise)]
        seen = views[1].abs().amax(dim=1, keepdim=True) > 0
        shift, scale = (
            torch.as_tensor(v, dtype=images.dtype, device=images.device)[:, None, None] for v in (mean, std)
        )
        pixels = [view * scale + shift for view in views]
        pixels[1] = torch.where(seen, pixels[1], 0.5)
        return titled_sheet(dict(zip(_COLUMNS, pixels, strict=True)))


# ----------------------------------------------------------------------------------------------------------- 3. tasks


class MAEPretraining(BaseModule):
    """Pre-training (Table 8).

    Batches hold `image` (B, C, S, S), and may pin the masks by `mask_noise` (B, L).

    Args:
        mask_ratio: share of patches that are hidden.
        feature: what `features` gives to probes: the class "token", or the mean of the patch tokens ("avg").
        compile: compile the training loss with torch.compile.
        optim: optimiser and schedule.
        network: of :class:`MaskedAutoencoder`.
    """

    batch_keys = ("image",)

    def __init__(
        self,
        mask_ratio: float = 0.75,
        feature: Literal["token", "avg"] = "token",
        compile: bool = False,
        optim: Optim = Optim(base_lr=1.5e-4, warmup_epochs=40),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters()
        self.network = MaskedAutoencoder(**network)
        length = self.network.num_patches
        if not (0 < mask_ratio < 1 and 1 <= int(length * (1 - mask_ratio)) < length):
            raise ZooError(f"mask_ratio {mask_ratio} of {length} patches must hide at least one and leave at least one")
        self.mask_ratio, self.feature = mask_ratio, feature
        self._loss = torch.compile(self.network.loss) if compile else self.network.loss

    def trainable(self) -> nn.Module:
        return self.network

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The reconstruction loss of a batch."""
        images = batch["image"]  # before the draws, so that its absence is told
        # Drawn here, so that a compiled loss sees the same masks as one that is not.
        return self._loss(images, self.mask_ratio, self.draws(batch, "mask_noise", self.network.num_patches))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.tally("val/loss", self.loss(batch), len(batch["image"]))

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.tally("test/loss", self.loss(batch), len(batch["image"]))

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The `reconstruction` (B, C, S, S), visible patches pasted in, and the `masked` images, both normalised."""
        images = batch["image"]
        noise = self.draws(batch, "mask_noise", self.network.num_patches)
        seen, _, pasted = self.network.reconstruct(images, self.mask_ratio, noise)
        return {"masked": seen, "reconstruction": pasted}

    def features(self, images: Tensor) -> Tensor:
        """Frozen features (B, D) of whole images (B, C, S, S)."""
        tokens = self.network.forward_features(images)
        return tokens[:, 0] if self.feature == "token" else tokens[:, 1:].mean(dim=1)

    def picture(self, batch: Mapping[str, Any]) -> Tensor:
        """The sheet (3, H, W) of :meth:`MaskedAutoencoder.picture`."""
        data = getattr(self._trainer, "datamodule", None)
        mean, std = getattr(data, "mean", IMAGENET_MEAN), getattr(data, "std", IMAGENET_STD)
        return self.network.picture(batch["image"], self.mask_ratio, batch.get("mask_noise"), mean, std)


class MAEFineTuning(Classification):
    """End-to-end fine-tuning (Table 9).

    Args:
        init_from: where :meth:`setup` takes the encoder from: a checkpoint of :class:`MAEPretraining`, a published
            file, or the name of published weights; null trains from scratch. Position embeddings are resized.
        mixup: Beta parameter of mixup, 0 for none; its draws are paired with those of `cutmix`.
        cutmix: Beta parameter of CutMix, 0 for none.
        label_smoothing: of the training targets.
        optim: optimiser and schedule.
        network: of :class:`~zoo.nn.vit.VisionTransformer`.
    """

    network: VisionTransformer

    def __init__(
        self,
        init_from: str | None = None,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        label_smoothing: float = 0.1,
        optim: Optim = Optim(base_lr=5e-4, betas=(0.9, 0.999), layer_decay=0.65, warmup_epochs=5, min_lr=1e-6),  # noqa: B008
        **network: Any,
    ) -> None:
        vit = VisionTransformer(**network)
        super().__init__(vit, optim, vit.num_classes, mixup, cutmix, label_smoothing, init_from)
        self.save_hyperparameters()
        if init_from is not None:
            nn.init.trunc_normal_(self.network.get_parameter("head.weight"), std=2e-5)

    def load_initial(self, source: str) -> None:
        load_encoder(self.network, source)


class MAELinearProbe(LinearClassification):
    """Linear probing (Table 10): the class token through BatchNorm without affine and one linear layer, LARS.

    Only the head trains; the encoder is frozen, and its features take no gradient. Arguments as in
    :class:`MAEFineTuning`; the paper's `global_pool` here is "token".
    """

    network: VisionTransformer

    def __init__(
        self,
        init_from: str | None = None,
        optim: Optim = Optim(name="lars", base_lr=0.1, weight_decay=0.0, warmup_epochs=10),  # noqa: B008
        **network: Any,
    ) -> None:
        vit = VisionTransformer(**network)
        super().__init__(vit, probe_head(vit.embed_dim, vit.num_classes), "head", optim, vit.num_classes, init_from)
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        load_encoder(self.network, source)


# ---------------------------------------------------------------------------------------------------------- 4. models


def mae_vit_base_patch16(**overrides: Any) -> MaskedAutoencoder:
    """MAE with a ViT-B/16 encoder and the default decoder (8 blocks of width 512)."""
    return MaskedAutoencoder(**{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **overrides})


def mae_vit_large_patch16(**overrides: Any) -> MaskedAutoencoder:
    """MAE with a ViT-L/16 encoder and the default decoder (8 blocks of width 512)."""
    return MaskedAutoencoder(**{"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **overrides})


def mae_vit_huge_patch14(**overrides: Any) -> MaskedAutoencoder:
    """MAE with a ViT-H/14 encoder and the default decoder (8 blocks of width 512)."""
    return MaskedAutoencoder(**{"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, **overrides})


def vit_base_patch16(**overrides: Any) -> VisionTransformer:
    """ViT-B/16 classifier, average-pooled."""
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **overrides})


def vit_large_patch16(**overrides: Any) -> VisionTransformer:
    """ViT-L/16 classifier, average-pooled."""
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **overrides})


def vit_huge_patch14(**overrides: Any) -> VisionTransformer:
    """ViT-H/14 classifier, average-pooled."""
    return VisionTransformer(**{"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, **overrides})


def vit_huge_patch14_448(**overrides: Any) -> VisionTransformer:
    """ViT-H/14 classifier for 448-pixel images (the paper's best), average-pooled."""
    return vit_huge_patch14(**{"img_size": 448, **overrides})


# ------------------------------------------------------------------------------------------------ 5. official weights

_AFFINE = r"\.(?:weight|bias)"
_OFFICIAL = re.compile(
    r"(?:cls_token|mask_token|pos_embed|decoder_pos_embed"
    rf"|(?:patch_embed\.proj|norm|fc_norm|decoder_embed|decoder_norm|decoder_pred|head|head\.1){_AFFINE}"
    r"|head\.0\.(?:running_mean|running_var|num_batches_tracked)"
    rf"|(?:decoder_)?blocks\.\d+\.(?:norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2){_AFFINE})"
)
_ENCODER = re.compile(r"(?:cls_token|pos_embed|patch_embed\.proj\..+|blocks\..+|norm\..+)")

# Hugging Face ViTMAE, names before and since transformers 5.
_HF_WHOLE = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
_HF_LAYER = re.compile(r"(vit\.(?:encoder\.layer|layers)|decoder\.decoder_layers)\.(\d+)\.(.+)\.(weight|bias)")
_HF_PARTS = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "output.dense": "mlp.fc2",
}
_HF_QKV = re.compile(r"attention\.(?:attention\.)?([qkv])(?:_proj|uery|ey|alue)")


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names: the official encoder, full, fine-tuned and probed layouts (which are ours,
    and timm's), and Hugging Face ViTMAE, whose separate q, k and v are joined.

    Raises:
        ZooError: a key that belongs to none of these layouts, or a q, k or v without the other two.
    """
    if not any(key.startswith("vit.") for key in state_dict):
        if foreign := [key for key in state_dict if not _OFFICIAL.fullmatch(key)]:
            raise ZooError(f"not an MAE checkpoint: {len(foreign)} unknown keys, such as {foreign[0]!r}")
        return dict(state_dict)
    converted: dict[str, Tensor] = {}
    joint: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        stem, _, leaf = key.rpartition(".")
        if key in _HF_WHOLE:
            converted[_HF_WHOLE[key]] = value
        elif stem in _HF_WHOLE:
            converted[f"{_HF_WHOLE[stem]}.{leaf}"] = value
        elif match := _HF_LAYER.fullmatch(key):
            stack, index, part, leaf = match.groups()
            block = f"{'blocks' if stack.startswith('vit') else 'decoder_blocks'}.{index}"
            if part in _HF_PARTS:
                converted[f"{block}.{_HF_PARTS[part]}.{leaf}"] = value
            elif qkv := _HF_QKV.fullmatch(part):
                joint.setdefault(f"{block}.attn.qkv.{leaf}", {})[qkv[1]] = value
            else:
                raise ZooError(f"not a ViTMAE checkpoint: unknown key {key!r}")
        else:
            raise ZooError(f"not a ViTMAE checkpoint: unknown key {key!r}")
    for key, parts in joint.items():
        if set(parts) != set("qkv"):
            raise ZooError(
                f"a ViTMAE checkpoint must hold q, k and v of {key!r}; it has only {', '.join(sorted(parts))}"
            )
        converted[key] = torch.cat([parts[name] for name in "qkv"])
    return converted


def load_encoder(
    network: VisionTransformer,
    source: str | Path,
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = convert_official,
) -> None:
    """Fill the encoder of `network` from a pre-training run; decoder and head of the source are left out.

    Args:
        network: any size; position embeddings are resized to its grid, its head and `fc_norm` stay as they are.
        source: a checkpoint of :class:`MAEPretraining` (.ckpt), a published file, or the name of published weights.
        convert: puts the source's keys into our names.

    Raises:
        ZooError: the file is missing, or its encoder is not of this network's shape.
    """
    state = {key: value for key, value in convert(read_source(source)).items() if _ENCODER.fullmatch(key)}
    if network.global_pool == "avg":
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    if "pos_embed" in state:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], network.patch_embed.grid)
    fill(network, state, source, lambda key: _ENCODER.fullmatch(key) is not None)
