"""Scaling Language-Image Pre-training via Masking (FLIP).

Yanghao Li, Haoqi Fan, Ronghang Hu, Christoph Feichtenhofer, Kaiming He. CVPR 2023, arXiv 2212.00794.

CLIP whose image encoder sees, in training, only a random half (or quarter) of the patches: masked ones are removed, not
replaced, and nothing is reconstructed. The encoder costs half (a quarter), so that the same hours see more pairs, and
more of them are contrasted in a step. Evaluation is on whole images; a short tuning without masks closes the gap.

Conventions: images (B, 3, S, S) normalised; text (B, L) word-piece numbers without [CLS] and [SEP], filled up with 0,
all of which the text encoder attends to; features z are unit vectors (B, P); batch k of a step holds one text an image.

Deviations from the official JAX code, none of which changes a value:
- Kept patches are embedded by a matrix product after the selection, not by a convolution before it.
- The last text block computes the first token only, which alone is used; without masks nothing is shuffled.
- Each process contrasts its own pairs with those of all (see :func:`zoo.ops.contrastive.clip_loss`), and the
  log-sum-exp subtracts the maximum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding
from torch.utils.checkpoint import checkpoint

from zoo.data.text import WordPiece, prompts
from zoo.errors import ZooError
from zoo.metrics.retrieval import ImageTextRetrieval
from zoo.metrics.zero_shot import class_features, unit
from zoo.nn.vit import NORM_EPS, Block, PatchEmbed, init_as_linear, run_blocks
from zoo.ops.collective import gather_objects
from zoo.ops.contrastive import clip_loss
from zoo.ops.masking import random_masking, take_tokens, tokens_at
from zoo.ops.patches import patchify
from zoo.ops.pos_embed import sincos_2d
from zoo.training import BaseModule, Optim
from zoo.weights.pretrained import fill, read_source

__all__ = [
    "FLIP",
    "FLIPPretraining",
    "ImageEncoder",
    "TextEncoder",
    "convert_official",
    "flip_base_patch16",
    "flip_huge_patch14",
    "flip_large_patch16",
]

MAX_LOG_SCALE = math.log(100)
_Block = partial(Block, gelu="tanh")

# --------------------------------------------------------------------------------------------------------- 1. network


class ImageEncoder(nn.Module):
    """A ViT of which, in training, a part of the patches is left out (section 3, "Image masking")."""

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(_Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        # A fixed table, stored as a parameter because the published files hold it so; its first row is not used.
        table = sincos_2d(embed_dim, self.patch_embed.grid, num_prefix=1)
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def forward(self, images: Tensor, mask_ratio: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """Tokens (B, 1 + K, D), class token first, of the K = int(L * (1 - mask_ratio)) patches of smallest `noise`.

        `noise` (B, L) is uniform from the global generator where it is not given. Without masks K is L.
        """
        self.patch_embed.check(images)
        patches = patchify(images, self.patch_embed.patch_size)
        positions = self.pos_embed[:, 1:]
        if mask_ratio > 0:
            if noise is None:
                noise = torch.rand(patches.shape[:2], device=images.device)
            elif noise.shape != patches.shape[:2]:
                raise ZooError(f"mask noise must be {tuple(patches.shape[:2])}, not {tuple(noise.shape)}")
            kept = random_masking(noise, mask_ratio).ids_keep
            patches, positions = take_tokens(patches, kept), tokens_at(positions, kept)
        x = self.patch_embed.embed_patches(patches) + positions
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return self.norm(run_blocks(self.blocks, x, self.grad_checkpointing))


class TextEncoder(nn.Module):
    """A transformer over word pieces that attends in both directions, and to the filling too (section 3)."""

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.token_embed = nn.Embedding(vocab_size, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, context_length, embed_dim))
        self.blocks = nn.ModuleList(_Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def _embed(self, text: Tensor) -> Tensor:
        length = self.pos_embed.shape[1]
        if text.ndim != 2 or text.shape[1] != length:
            raise ZooError(f"the text encoder takes (B, {length}) word pieces, not {tuple(text.shape)}")
        return embedding(text, self.token_embed.weight) + self.pos_embed

    def forward(self, text: Tensor) -> Tensor:
        """Word pieces (B, L) to tokens (B, L, D)."""
        return self.norm(run_blocks(self.blocks, self._embed(text), self.grad_checkpointing))

    def first(self, text: Tensor) -> Tensor:
        """The first of the tokens that :meth:`forward` gives, (B, D); the last block computes no other."""
        # Attention knows no order: once positions are added, the first token may stand last, where `last` finds it.
        x = self._embed(text).roll(-1, dims=1)
        return self.norm(run_blocks(self.blocks, x, self.grad_checkpointing, last=1)[:, -1])


class FLIP(nn.Module):
    """Image and text encoder into one space.

    Args:
        img_size: side of the square images, in pixels.
        embed_dim, depth, num_heads: of the image encoder.
        vocab_size: word pieces; BERT's 30,522 and one that is never used, as the published models have them.
        context_length: L.
        text_embed_dim, text_depth, text_num_heads: of the text encoder.
        proj_dim: P, size of the common space.
        mlp_ratio, text_mlp_ratio: hidden size of the MLPs over that of the tokens.
        image_pool: "avg" over class and patch tokens, or the class "token".
        text_pool: the first "token", or "avg".
        proj_bias: give the projections a bias.
        temperature: a fixed one; None: it is learnt, starting at 0.07, within [0.01, 1].
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
        vocab_size: int = 30523,
        context_length: int = 32,
        text_embed_dim: int = 768,
        text_depth: int = 12,
        text_num_heads: int = 12,
        proj_dim: int = 768,
        mlp_ratio: float = 4.0,
        text_mlp_ratio: float = 4.0,
        image_pool: Literal["avg", "token"] = "avg",
        text_pool: Literal["token", "avg"] = "token",
        proj_bias: bool = False,
        temperature: float | None = None,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, pool in (("image_pool", image_pool), ("text_pool", text_pool)):
            if pool not in ("avg", "token"):
                raise ZooError(f"{name} must be 'avg' or 'token', not {pool!r}")
        self.image_pool, self.text_pool, self.temperature = image_pool, text_pool, temperature
        self.visual = ImageEncoder(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio)
        self.text = TextEncoder(vocab_size, context_length, text_embed_dim, text_depth, text_num_heads, text_mlp_ratio)
        self.visual_proj = nn.Linear(embed_dim, proj_dim, bias=proj_bias)
        self.text_proj = nn.Linear(text_embed_dim, proj_dim, bias=proj_bias)
        if temperature is None:
            self.logit_scale = nn.Parameter(torch.empty(1))
        self.set_grad_checkpointing(grad_checkpointing)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        init_as_linear(self.visual.patch_embed.proj)
        nn.init.zeros_(self.visual.patch_embed.proj.bias)  # type: ignore[arg-type]
        for tensor in (self.visual.cls_token, self.text.token_embed.weight, self.text.pos_embed):
            nn.init.normal_(tensor, std=0.02)
        if self.temperature is None:
            nn.init.constant_(self.logit_scale, math.log(1 / 0.07))

    def example_inputs(self, count: int) -> dict[str, Tensor]:
        """Arguments of forward for so many pairs, for an export."""
        generator = torch.Generator().manual_seed(0)
        patches, length = self.visual.patch_embed, self.text.pos_embed.shape[1]
        images = torch.randn(count, patches.in_chans, patches.img_size, patches.img_size, generator=generator)
        words = torch.randint(1, self.text.token_embed.num_embeddings - 1, (count, length), generator=generator)
        return {"images": images, "text": words}

    def weight_decay_too(self) -> set[str]:
        """The official code decays the scale: where it is clipped, and so has no gradient, this brings it back."""
        return {"logit_scale"} if self.temperature is None else set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.grad_checkpointing = self.text.grad_checkpointing = enable

    @property
    def num_patches(self) -> int:
        return self.visual.patch_embed.num_patches

    @property
    def scale(self) -> Tensor:
        """What products of features are multiplied by: exp of the logit scale, clipped to [1, 100]."""
        if self.temperature is not None:
            return self.visual.cls_token.new_tensor(1 / self.temperature)
        return self.logit_scale.clamp(0, MAX_LOG_SCALE).exp()

    def pool_image(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, 1 + K, D) to one vector (B, D)."""
        return tokens.mean(dim=1) if self.image_pool == "avg" else tokens[:, 0]

    def encode_image(self, images: Tensor, mask_ratio: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """Images (B, C, S, S) to unit features (B, P); masks as in :meth:`ImageEncoder.forward`."""
        return unit(self.visual_proj(self.pool_image(self.visual(images, mask_ratio, noise))))

    def encode_text(self, text: Tensor) -> Tensor:
        """Word pieces (B, L) to unit features (B, P)."""
        pooled = self.text.first(text) if self.text_pool == "token" else self.text(text).mean(dim=1)
        return unit(self.text_proj(pooled))

    def forward(
        self, images: Tensor, text: Tensor, mask_ratio: float = 0.0, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The unit features (B, P) of images (B, C, S, S) and of word pieces (B, L)."""
        return self.encode_image(images, mask_ratio, noise), self.encode_text(text)

    def loss(self, images: Tensor, text: Tensor, mask_ratio: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """The contrastive loss of the pairs, over all processes (section 3, "Objective")."""
        image, of_text = self(images, text, mask_ratio, noise)
        return clip_loss(image, of_text, self.scale)

    @torch.no_grad()
    def zero_shot(
        self, images: Tensor, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> Tensor:
        """Probabilities (B, K) that images (B, C, S, S) show what the K `names` say, put into `templates`.

        Words are cut by BERT's published vocabulary, which is fetched at first use.
        """
        _, texts = prompts("imagenet1k", names, templates)
        table = WordPiece("bert", self.text.pos_embed.shape[1]).table(texts).to(images.device)
        classes = class_features(self.encode_text, table)
        return (self.scale * self.encode_image(images) @ classes.T).softmax(dim=-1)


# ------------------------------------------------------------------------------------------------------------ 2. task


class FLIPPretraining(BaseModule):
    """Pre-training, and with `mask_ratio` 0 the unmasked tuning after it (section 3; appendix A, "Pre-training").

    Batches hold `image` (B, C, S, S) and `text` (B, L), and may pin the masks by `mask_noise` (B, L). Evaluation takes
    labelled images, which are classified zero-shot, images with captions, which are retrieved, or both; it logs
    `{val,test}/top1`, `/top5` (fractions) and `/image_to_text_r1` ... `/text_to_image_median`. The classes' prompts are
    the data module's `class_prompts` (K, T, L).

    Args:
        mask_ratio: share of patches that are left out in training.
        init_from: where :meth:`setup` takes the weights from: a checkpoint of this task, a published file, or the name
            of published weights; null trains from scratch.
        micro_batch: encode so many pairs at a time and once more in the backward pass, so that the memory of a step is
            that of `micro_batch` pairs while all of a device's batch are contrasted; null: all at once.
        monitor: what the best checkpoint is chosen by; null: none is.
        compile: compile the encoders with torch.compile.
        optim: optimiser and schedule.
        network: of :class:`FLIP`.
    """

    batch_keys = ("image", "text")
    meets = True

    def __init__(
        self,
        mask_ratio: float = 0.5,
        init_from: str | None = None,
        micro_batch: int | None = None,
        monitor: str | None = "val/top1",
        compile: bool = False,
        optim: Optim = Optim(base_lr=4e-6, weight_decay=0.2, warmup_epochs=40),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters()
        self.network = FLIP(**network)
        patches = self.network.num_patches
        if not (0 <= mask_ratio < 1 and int(patches * (1 - mask_ratio)) >= 1):
            raise ZooError(f"mask_ratio {mask_ratio} of {patches} patches must leave at least one")
        if micro_batch is not None and micro_batch < 1:
            raise ZooError(f"micro_batch must be at least 1, not {micro_batch}")
        self.mask_ratio, self.init_from, self.micro_batch = mask_ratio, init_from, micro_batch
        self.monitor = None if monitor is None else (monitor, "max")
        self._encode = torch.compile(self.network.forward) if compile else self.network.forward
        self.retrieval = nn.ModuleDict({split: ImageTextRetrieval() for split in ("val", "test")})
        self._classes: Tensor | None = None

    def trainable(self) -> nn.Module:
        return self.network

    def load_initial(self, source: str) -> None:
        """Fill both encoders. The image encoder's table is fixed: one of another resolution is made anew."""
        state, own = convert_official(read_source(source)), self.network.state_dict()
        table = "visual.pos_embed"
        if table in state and state[table].shape != own[table].shape:
            state[table] = own[table]
        fill(self.network, state, source, lambda key: True)

    def on_fit_start(self) -> None:
        if (steps := self.trainer.accumulate_grad_batches) > 1:
            wanted = self.optim.global_batch
            whole = f"{wanted} / {self.trainer.world_size} process(es)" if wanted else f"{steps} times as many"
            raise ZooError(
                f"pairs are contrasted within a step, which {steps} accumulated batches are not: set data.batch_size to"
                f" {whole}, and model.micro_batch to what fits the memory"
            )
        data = getattr(self.trainer, "datamodule", None)
        self._check_vocabulary(getattr(data, "tokenize", None))

    def _check_vocabulary(self, tokenize: Any) -> None:
        rows = self.network.text.token_embed.num_embeddings
        if tokenize is not None and tokenize.size > rows:
            raise ZooError(
                f"the vocabulary {tokenize.vocabulary!r} has {tokenize.size} word pieces, the model {rows}: set"
                f" model.vocab_size to {tokenize.size}"
            )

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The features (B, P) of a training batch's images, masked, and texts."""
        images, text, noise = batch["image"], batch["text"], batch.get("mask_noise")
        if noise is None and self.mask_ratio:  # drawn here, so that a compiled or repeated pass sees the same masks
            noise = self.draws(batch, "mask_noise", self.network.num_patches)
        if self.micro_batch is None or self.micro_batch >= len(images):
            return self._encode(images, text, self.mask_ratio, noise)
        pieces = [
            checkpoint(self._encode, part, words, self.mask_ratio, uniform, use_reentrant=False)
            for part, words, uniform in zip(
                images.split(self.micro_batch),
                text.split(self.micro_batch),
                noise.split(self.micro_batch) if noise is not None else [None] * len(images),
                strict=noise is not None,
            )
        ]
        image, of_text = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return image, of_text

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        image, text = self.encode(batch)
        scale = self.network.scale
        self.log("train/scale", scale.detach().squeeze(), on_step=True, on_epoch=False, batch_size=1)
        return clip_loss(image, text, scale)

    # ------------------------------------------------------------------------------------------------- evaluation

    def class_vectors(self) -> Tensor | None:
        """One unit vector (K, P) for each class of the data module; None where it has no prompts."""
        table = getattr(getattr(self.trainer, "datamodule", None), "class_prompts", None)
        if table is None:
            return None
        self._check_vocabulary(self.trainer.datamodule.tokenize)  # type: ignore[attr-defined]
        return class_features(self.network.encode_text, table.to(self.device))

    def on_validation_epoch_start(self) -> None:
        self._classes = self.class_vectors()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def _evaluate(self, batch: Mapping[str, Any], split: str) -> dict[str, Tensor]:
        """Logs a batch's numbers; where it tells classes their logits (B, K) and losses (B,), for callbacks."""
        found: dict[str, Tensor] = {}
        image = self.network.encode_image(batch["image"]).float()
        if self._classes is not None and "label" in batch:
            logits = image @ self._classes.float().T
            hits = logits.topk(min(5, logits.shape[1])).indices == batch["label"][:, None]
            self.tally(f"{split}/top1", hits[:, 0])
            self.tally(f"{split}/top5", hits.any(dim=1))
            scaled = logits * self.network.scale.float()
            found = {"logits": scaled, "loss": cross_entropy(scaled, batch["label"], reduction="none")}
        if "text" in batch:
            text = self.network.encode_text(batch["text"]).float()
            self.retrieval[split].update(image, batch["index"], text, batch["owner"])  # type: ignore[operator]
        return found

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test")

    def _report(self, split: str) -> None:
        metric: Any = self.retrieval[split]
        # A process without samples must join the others all the same.
        if any(gather_objects(metric.update_called)):
            self.log_dict({f"{split}/{key}": value for key, value in metric.compute().items()})
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._report("val")

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._report("test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The `features` (B, P) of images and, where there are classes, their `probabilities` (B, K)."""
        image = self.network.encode_image(batch["image"])
        if self._classes is None:
            return {"features": image}
        return {"features": image, "probabilities": (self.network.scale * image @ self._classes.T).softmax(dim=-1)}

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of images (B, C, S, S) before the projection, for probes."""
        return self.network.pool_image(self.network.visual(images))


# ---------------------------------------------------------------------------------------------------------- 3. models


def flip_base_patch16(**overrides: Any) -> FLIP:
    """FLIP B/16: image encoder ViT-B/16, text encoder of 12 blocks of width 512."""
    image = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    text = {"text_embed_dim": 512, "text_depth": 12, "text_num_heads": 8, "proj_dim": 512}
    return FLIP(**{**image, **text, **overrides})


def flip_large_patch16(**overrides: Any) -> FLIP:
    """FLIP L/16: image encoder ViT-L/16, text encoder of 12 blocks of width 768."""
    image = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    text = {"text_embed_dim": 768, "text_depth": 12, "text_num_heads": 12, "proj_dim": 768}
    return FLIP(**{**image, **text, **overrides})


def flip_huge_patch14(**overrides: Any) -> FLIP:
    """FLIP H/14: image encoder ViT-H/14, text encoder of 24 blocks of width 1024."""
    image = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
    text = {"text_embed_dim": 1024, "text_depth": 24, "text_num_heads": 16, "proj_dim": 1024}
    return FLIP(**{**image, **text, **overrides})


# ------------------------------------------------------------------------------------------------ 4. official weights

_TOWERS = {"img_encoder": "visual", "txt_encoder": "text"}
_PARTS = {
    "embedding": "patch_embed.proj",
    "token_embedding": "token_embed",
    "posembed_encoder.pos_embedding": "pos_embed",
    "cls": "cls_token",
    "Transformer.encoder_norm": "norm",
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "MultiHeadDotProductAttention_0.out": "attn.proj",
    "MlpBlock_0.Dense_0": "mlp.fc1",
    "MlpBlock_0.Dense_1": "mlp.fc2",
    "img_mlp1": "visual_proj",
    "txt_mlp1": "text_proj",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "embedding": "weight"}
_BLOCK = re.compile(r"Transformer\.encoderblock_(\d+)\.(.+)")
_JOINT = re.compile(r"MultiHeadDotProductAttention_0\.(query|key|value)")
_OURS = re.compile(
    r"logit_scale|(?:visual|text)_proj\.(?:weight|bias)|(?:visual|text)\.(?:cls_token|pos_embed|token_embed\.weight"
    r"|(?:patch_embed\.proj|norm|blocks\.\d+\.(?:norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(?:weight|bias))"
)


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flax parameter tree in our names (paths joined by "/" or "."): kernels are transposed to (out, in), that of the
    patch embedding to (out, in, row, column), and query, key and value are joined. Our own layout is passed on.

    Raises:
        ZooError: a key that belongs to neither layout, or a query, key or value without the other two.
    """
    keys = [key.replace("/", ".") for key in state_dict]
    if not any(key.startswith(tuple(_TOWERS)) for key in keys):
        if foreign := [key for key in keys if not _OURS.fullmatch(key)]:
            raise ZooError(f"not a FLIP checkpoint: {len(foreign)} unknown keys, such as {foreign[0]!r}")
        return dict(state_dict)
    converted: dict[str, Tensor] = {}
    joint: dict[str, dict[str, Tensor]] = {}
    for key, value in zip(keys, state_dict.values(), strict=True):
        tower, _, path = key.partition(".") if key.startswith(tuple(_TOWERS)) else ("", "", key)
        prefix = f"{_TOWERS[tower]}." if tower in _TOWERS else ""
        if match := _BLOCK.fullmatch(path):
            prefix, path = f"{prefix}blocks.{int(match[1])}.", match[2]
        stem, _, leaf = path.rpartition(".")
        if leaf == "kernel":
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        if path == "logit_scale":
            converted[path] = value
        elif path in ("cls", "posembed_encoder.pos_embedding") and prefix:
            converted[prefix + _PARTS[path]] = value
        elif stem in _PARTS and leaf in _LEAVES:
            converted[f"{prefix}{_PARTS[stem]}.{_LEAVES[leaf]}"] = value
        elif (match := _JOINT.fullmatch(stem)) and leaf in _LEAVES:
            joint.setdefault(f"{prefix}attn.qkv.{_LEAVES[leaf]}", {})[match[1]] = value
        else:
            raise ZooError(f"not a FLIP checkpoint: unknown key {key!r}")
    for key, parts in joint.items():
        if set(parts) != {"query", "key", "value"}:
            raise ZooError(f"a FLIP checkpoint must hold query, key and value of {key!r}; it has {', '.join(parts)}")
        converted[key] = torch.cat([parts[name] for name in ("query", "key", "value")])
    return converted
