"""An Empirical Study of Training Self-Supervised Vision Transformers (MoCo v3).

Xinlei Chen, Saining Xie, Kaiming He. ICCV 2021, arXiv 2104.02057.

MoCo without its queue, for Vision Transformers: the other images of a large batch are the negatives, a predictor stands
on the query encoder, and each of two views is query and key in turn. ViTs train unstably in this and in other siamese
frameworks: accuracy dips and recovers, and a point or more is lost unseen. The dips begin as spikes of the gradient in
the first layer, the projection of the patches; frozen at its random start, the training is stable.

A step, in this order: queries of both views, each a batch of its own for BatchNorm; the momentum encoder moves towards
the query encoder as it is before the update; keys of both views, without gradient; the loss.

Conventions: views (N, 3, S, S) of each of R processes; queries q and keys k (N, C), keys of all processes (R * N, C).

Deviations from the official code, none of which changes a value: the momentum is read from the same clock as the
learning rate, and under gradient accumulation the momentum encoder moves once an update.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from zoo.errors import ZooError, unknown
from zoo.metrics.spread import channel_deviation
from zoo.nn.projector import mlp_head
from zoo.nn.resnet import RESNETS, resnet
from zoo.nn.vit import VisionTransformer, init_as_linear
from zoo.ops.collective import gather, world
from zoo.ops.momentum import cosine_momentum, move_towards
from zoo.ops.pos_embed import resize_pos_embed, sincos_2d
from zoo.training import Classification, LinearClassification, Optim, run_position
from zoo.training.siamese import EmbeddingTask
from zoo.training.trunks import ResNetFineTuning, ResNetLinearProbe, new_classifier
from zoo.weights.layouts import AFFINE, BATCH_NORM, RESNET, one_network, renamed, resnet_exports
from zoo.weights.pretrained import fill, read_source

__all__ = [
    "EXPORTS",
    "VITS",
    "MoCoV3",
    "MoCoV3FineTuning",
    "MoCoV3LinearProbe",
    "MoCoV3Pretraining",
    "MoCoV3ResNetFineTuning",
    "MoCoV3ResNetLinearProbe",
    "MoCoV3ViT",
    "contrastive_loss",
    "conv_stem",
    "convert_official",
    "convert_trunk",
    "moco_v3_resnet50",
    "moco_v3_resnet50_trunk",
    "moco_v3_vit_base",
    "moco_v3_vit_base_trunk",
    "moco_v3_vit_conv_base",
    "moco_v3_vit_conv_small",
    "moco_v3_vit_huge",
    "moco_v3_vit_large",
    "moco_v3_vit_small",
    "moco_v3_vit_small_trunk",
    "symmetric_loss",
]

# ------------------------------------------------------------------------------------------------------- 1. equations


def contrastive_loss(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """2T times the cross-entropy of each query with its own key among those of all processes (Algorithm 1, `ctr`).

    Args:
        query: (N, C), of any length; row i belongs to row i of `key`.
        key: (N, C), of any length, which takes no gradient; N is the same on every process.
        temperature: T.

    Returns:
        The mean over this process's N queries: gradients averaged over the processes are those of the whole batch.
    """
    with torch.autocast(query.device.type, enabled=False):  # in float32 under mixed precision
        query, key = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key))
        query, key = normalize(query, dim=1), normalize(key, dim=1)
        labels = torch.arange(len(query), device=query.device) + world()[0] * len(query)
        return 2 * temperature * cross_entropy(query @ gather(key).T / temperature, labels)


def symmetric_loss(queries: Sequence[Tensor], keys: Sequence[Tensor], temperature: float) -> Tensor:
    """ctr(q1, k2) + ctr(q2, k1) of the queries and keys of two views, (N, C) each."""
    (q1, q2), (k1, k2) = queries, keys
    return contrastive_loss(q1, k2, temperature) + contrastive_loss(q2, k1, temperature)


# --------------------------------------------------------------------------------------------------------- 2. network

Stem = Literal["patch", "conv"]
Positions = Literal["sincos", "learned", "none"]
Pool = Literal["token", "avg", "norm_avg"]

VITS: dict[str, dict[str, Any]] = {
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 12},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
    "vit_conv_small": {"embed_dim": 384, "depth": 11, "num_heads": 12, "stem": "conv"},
    "vit_conv_base": {"embed_dim": 768, "depth": 11, "num_heads": 12, "stem": "conv"},
}


def conv_stem(in_chans: int, embed_dim: int) -> nn.Sequential:
    """Images (B, C, S, S) to (B, D, S/16, S/16): four 3x3 convolutions of stride 2 with BatchNorm and ReLU, of D/8,
    D/4, D/2 and D channels, and a 1x1 convolution (Xiao et al. 2021, arXiv 2106.14881)."""
    layers: list[nn.Module] = []
    width = in_chans
    for wider in (embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim):
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU(True)]
        width = wider
    return nn.Sequential(*layers, nn.Conv2d(width, embed_dim, 1))


class TokenBatchNorm(nn.Module):
    """BatchNorm of tokens (B, N, D) over batch and tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


class MoCoV3ViT(VisionTransformer):
    """The ViT encoder: fixed position table, class token, and initial weights of its own (section 4, Appendix A.1).

    Args:
        arch: a name in VITS.
        img_size, in_chans, num_classes: as of :class:`~zoo.nn.vit.VisionTransformer`.
        patch_size, embed_dim, depth, num_heads: other sizes than those of `arch`.
        stem: "patch", or "conv": :func:`conv_stem`, for patches of 16 pixels; null: that of `arch`.
        stop_grad_conv1: freeze the patch projection at its start (section 4.2); of no effect on a convolutional stem.
        positions: "sincos", of which the first half encodes the row; "learned", or "none" (section 6.2).
        pool: the class "token"; the mean of the patches, "avg" without the final LayerNorm, "norm_avg" after it
            (section 6.2).
        mlp_norm: before the MLPs "layer" norm, or "batch" norm over all tokens (ViT-BN, Table 1).
        options: drop_rate, drop_path_rate, grad_checkpointing and mlp_ratio, as of the base class.

    Raises:
        ZooError: an unknown name, or a stem of another patch size.
    """

    def __init__(
        self,
        arch: str = "vit_base",
        img_size: int = 224,
        patch_size: int | None = None,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        stem: Stem | None = None,
        stop_grad_conv1: bool = True,
        positions: Positions = "sincos",
        pool: Pool = "token",
        mlp_norm: Literal["layer", "batch"] = "layer",
        **options: Any,
    ) -> None:
        if arch not in VITS:
            raise unknown("architecture", arch, VITS)
        own: dict[str, Any] = {"patch_size": 16, "stem": "patch", **VITS[arch]}
        asked = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        sizes: dict[str, Any] = {name: own[name] if value is None else value for name, value in asked.items()}
        stem, dim = stem or own["stem"], sizes["embed_dim"]
        for kind, name, known in (
            ("stem", stem, ("patch", "conv")),
            ("kind of positions", positions, ("sincos", "learned", "none")),
            ("pool", pool, ("token", "avg", "norm_avg")),
            ("norm of the MLPs", mlp_norm, ("layer", "batch")),
        ):
            if name not in known:
                raise unknown(kind, name, known)
        if stem == "conv" and (sizes["patch_size"] != 16 or dim % 8):
            raise ZooError(
                "a convolutional stem wants patch_size 16 and embed_dim divisible by 8, not"
                f" {sizes['patch_size']} and {dim}"
            )
        super().__init__(
            img_size=img_size, in_chans=in_chans, num_classes=num_classes, global_pool="token", **sizes, **options
        )
        self.global_pool = "token" if pool == "token" else "avg"
        if pool == "avg":
            self.set_submodule("norm", nn.Identity())
        if mlp_norm == "batch":
            for block in self.blocks:
                block.set_submodule("norm2", TokenBatchNorm(dim))
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                bound = math.sqrt(6 / (fan_in + (fan_out // 3 if name.endswith("qkv") else fan_out)))
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        if stem == "conv":
            self.patch_embed.set_submodule("proj", conv_stem(in_chans, dim))
        else:
            init_as_linear(self.patch_embed.proj)
            assert self.patch_embed.proj.bias is not None
            nn.init.zeros_(self.patch_embed.proj.bias)
            self.patch_embed.proj.requires_grad_(not stop_grad_conv1)
        if positions != "learned":
            table = torch.zeros_like(self.pos_embed)
            if positions == "sincos":
                table = sincos_2d(dim, self.patch_embed.grid, num_prefix=1, rows_first=True)
            self.pos_embed = nn.Parameter(table, requires_grad=False)


def _check_options(arch: str, options: Mapping[str, Any]) -> None:
    """Refuses options that only encoders of the other kind have."""
    kinds: tuple[Any, ...] = (MoCoV3ViT, VisionTransformer) if arch in VITS else (resnet,)
    known = {name for kind in kinds for name in inspect.signature(kind).parameters}
    if foreign := [name for name in options if name not in known]:
        raise ZooError(f"the encoder {arch} has no option {foreign[0]!r}")


class MoCoV3(nn.Module):
    """Query encoder with projector, the momentum encoder that follows it, and the predictor (section 3).

    Args:
        arch: of the encoder: a name in VITS, or in :data:`zoo.nn.resnet.RESNETS`, whose blocks begin as the identity.
        dim: C, of the embeddings.
        mlp_dim: of the heads' hidden layers. The heads have no biases. A ViT's projector has three layers and its
            predictor two, both with BatchNorm without affine at the end; a ResNet's projector has two layers, and its
            predictor no BatchNorm at the end.
        temperature: T.
        head_norm: BatchNorm in the heads (section 6.2).
        predictor: without it queries are projections, as in MoCo v1 and v2 (section 6.2).
        img_size: side of a ViT's images, in pixels.
        encoder: of :class:`MoCoV3ViT`, or of :func:`zoo.nn.resnet.resnet`.

    Raises:
        ZooError: an unknown name, or a number out of range.
    """

    export_part = "features"

    def __init__(
        self,
        arch: str = "vit_base",
        dim: int = 256,
        mlp_dim: int = 4096,
        temperature: float = 0.2,
        head_norm: bool = True,
        predictor: bool = True,
        img_size: int = 224,
        **encoder: Any,
    ) -> None:
        super().__init__()
        if min(dim, mlp_dim) < 1 or temperature <= 0:
            raise ZooError(
                "MoCo v3 wants dim and mlp_dim of 1 or more and temperature > 0; got"
                f" {dim}, {mlp_dim} and {temperature}"
            )
        if arch not in VITS and arch not in RESNETS:
            raise unknown("architecture", arch, [*VITS, *RESNETS])
        self.dim, self.temperature = dim, temperature
        self.base_encoder: MoCoV3ViT | ResNet
        _check_options(arch, encoder)
        if arch in VITS:
            self.base_encoder = MoCoV3ViT(arch=arch, img_size=img_size, num_classes=0, **encoder)
        else:
            encoder = {"zero_init_last": True, **encoder}
            self.base_encoder = resnet(arch=arch, num_classes=0, **encoder)
        self.head_name, hidden = ("head", 2) if arch in VITS else ("fc", 1)
        width, last = int(self.base_encoder.num_features), head_norm and arch in VITS
        projector = mlp_head([width, *[mlp_dim] * hidden, dim], head_norm, "plain" if head_norm else "none", bias=False)
        self.base_encoder.set_submodule(self.head_name, projector)
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)
        self.predictor: nn.Module = nn.Identity()
        if predictor:
            self.predictor = mlp_head([dim, mlp_dim, dim], head_norm, "plain" if last else "none", bias=False)

    def weight_decay_too(self) -> set[str]:
        """Class token and learned positions, which a ViT spares otherwise, are decayed here."""
        return {"base_encoder.cls_token", "base_encoder.pos_embed"}

    def query(self, images: Tensor) -> Tensor:
        """Queries (N, C), not normalised, of images (N, 3, S, S)."""
        return self.predictor(self.base_encoder(images))

    @torch.no_grad()
    def key(self, images: Tensor) -> Tensor:
        """Keys (N, C), not normalised, of images (N, 3, S, S)."""
        return self.momentum_encoder(images)

    def step(self, x1: Tensor, x2: Tensor, momentum: float | None) -> tuple[list[Tensor], list[Tensor]]:
        """Queries and keys of two views (Algorithm 1); between them the momentum encoder moves, if `momentum` is
        given."""
        queries = [self.query(x1), self.query(x2)]
        if momentum is not None:
            move_towards(self.momentum_encoder, self.base_encoder, momentum)
        return queries, [self.key(x1), self.key(x2)]

    def forward(self, images: Tensor) -> Tensor:
        """Projections (N, C) of images (N, 3, S, S) by the query encoder."""
        return self.base_encoder(images)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (N, D) of the query encoder, before its projector."""
        return self.base_encoder.forward_head(self.base_encoder.forward_features(images), pre_logits=True)

    def project(self, features: Tensor) -> Tensor:
        """Projections (N, C) of pooled features (N, D)."""
        return self.base_encoder.get_submodule(self.head_name)(features)


# ----------------------------------------------------------------------------------------------------------- 3. tasks

_PRETRAIN = Optim(base_lr=1.5e-4, weight_decay=0.1, betas=(0.9, 0.999), no_decay="none", warmup_epochs=40)
_PROBE = Optim(name="sgd", base_lr=3.0, weight_decay=0.0, no_decay="none", schedule="cosine", interval="epoch")
_FINETUNE = Optim(base_lr=2.5e-4, betas=(0.9, 0.999), warmup_epochs=5, warmup_start_lr=1e-6, min_lr=1e-5)


class MoCoV3Pretraining(EmbeddingTask):
    """Pre-training (Algorithm 1).

    Training batches hold `views`, two of (N, 3, S, S); evaluation batches hold `image`. Logged are `train/momentum`,
    and `train/spread` of the queries' and `{val,test}/spread` of the projections' unit vectors: the mean deviation of
    their channels in units of 1/sqrt(C), 1 where they fill the sphere, 0 where they collapse.

    Args:
        momentum: m of the momentum encoder at the start.
        momentum_cosine: m rises to 1 by half a cosine over the run; off, it stays.
        feature: what `features` gives to probes: the pooled features of the "trunk", or the "embedding" (projection).
        optim: optimiser and schedule.
        network: of :class:`MoCoV3`.

    Raises:
        ZooError: `momentum` lies outside [0, 1].
    """

    network: MoCoV3
    meets = True

    def __init__(
        self,
        momentum: float = 0.99,
        momentum_cosine: bool = True,
        feature: Literal["trunk", "embedding"] = "trunk",
        optim: Optim = _PRETRAIN,
        **network: Any,
    ) -> None:
        whole = MoCoV3(**network)
        super().__init__(whole, whole.dim, feature, optim)
        self.save_hyperparameters()
        if not 0 <= momentum <= 1:
            raise ZooError(f"momentum must be in [0, 1], not {momentum}")
        self.momentum, self.momentum_cosine = momentum, momentum_cosine

    def momentum_now(self) -> float:
        """m of the current update."""
        if not self.momentum_cosine or self._trainer is None:
            return self.momentum
        return cosine_momentum(*run_position(self.optim, self.trainer), self.momentum)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        views = batch.get("views")
        if views is None or len(views) != 2:
            raise ZooError(
                "MoCo v3 trains on 'views', two of each image, which the batch does not hold: set data.train_transform"
                " to Views of two transforms, or to TwoViews"
            )
        if len(views[0]) < 2 and any(isinstance(part, nn.BatchNorm1d) for part in self.network.modules()):
            raise ZooError("BatchNorm wants two images or more a process in training: set data.batch_size to 2 or more")
        window = 1 if self._trainer is None else self.trainer.accumulate_grad_batches
        momentum = self.momentum_now()
        queries, keys = self.network.step(views[0], views[1], momentum if batch_idx % window == 0 else None)
        if self._trainer is not None:
            spread = channel_deviation(queries[0].detach().float()) * self.network.dim**0.5
            self.log_dict({"train/momentum": momentum, "train/spread": spread}, batch_size=len(views[0]))
        return symmetric_loss(queries, keys, self.network.temperature)

    def sides(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """Queries of first views, the source, and keys of second ones, the target: (N, C) each."""
        return {"source": self.network.query(views[0]), "target": self.network.key(views[1])}


def _load_vit(network: MoCoV3ViT, source: str) -> None:
    state = convert_trunk(read_source(source))
    if "pos_embed" in state:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], network.patch_embed.grid)
    fill(network, state, source, lambda key: not key.startswith("head."))


class MoCoV3LinearProbe(LinearClassification):
    """Linear classification of a frozen ViT's pooled features (official README): SGD, base rate 3, batch 1024; the
    classifier starts from N(0, 0.01) weights and biases of 0.

    Args:
        arch: a name in VITS.
        num_classes: taken from the data module by a recipe.
        init_from: a checkpoint of :class:`MoCoV3Pretraining`, a published file, or the name of published weights.
            Position tables are resized.
        optim: optimiser and schedule.
        network: of :class:`MoCoV3ViT`.
    """

    network: MoCoV3ViT

    def __init__(
        self,
        arch: str = "vit_base",
        num_classes: int = 1000,
        init_from: str | None = None,
        optim: Optim = _PROBE,
        **network: Any,
    ) -> None:
        trunk = MoCoV3ViT(arch=arch, num_classes=num_classes, **network)
        head = new_classifier(nn.Linear(trunk.embed_dim, num_classes))
        super().__init__(trunk, head, "head", optim, num_classes, init_from)
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        _load_vit(self.network, source)


class MoCoV3FineTuning(Classification):
    """End-to-end fine-tuning of a ViT as DeiT trains (section 6.3); everything trains, patch projection and positions
    too.

    Args:
        arch: a name in VITS.
        num_classes, init_from, optim, network: as of :class:`MoCoV3LinearProbe`.
        mixup, cutmix, label_smoothing: as of :class:`~zoo.training.Classification`.
    """

    network: MoCoV3ViT

    def __init__(
        self,
        arch: str = "vit_base",
        num_classes: int = 1000,
        init_from: str | None = None,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        label_smoothing: float = 0.1,
        optim: Optim = _FINETUNE,
        **network: Any,
    ) -> None:
        whole = MoCoV3ViT(arch=arch, num_classes=num_classes, **network)
        whole.requires_grad_(True)
        super().__init__(whole, optim, num_classes, mixup, cutmix, label_smoothing, init_from)
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        _load_vit(self.network, source)


class MoCoV3ResNetLinearProbe(ResNetLinearProbe):
    """Linear classification of a frozen ResNet's features (official README): SGD, base rate 0.1, batch 1024."""

    published = replace(_PROBE, base_lr=0.1)


class MoCoV3ResNetFineTuning(ResNetFineTuning):
    """End-to-end training of a ResNet. The paper has none."""


# ---------------------------------------------------------------------------------------------------------- 4. models


def moco_v3_vit_small(**overrides: Any) -> MoCoV3:
    """MoCo v3 with ViT-S/16 encoders of 12 heads: both encoders with projectors, and predictor, to train on."""
    return MoCoV3(**{"arch": "vit_small", **overrides})


def moco_v3_vit_base(**overrides: Any) -> MoCoV3:
    """MoCo v3 with ViT-B/16 encoders."""
    return MoCoV3(**{"arch": "vit_base", **overrides})


def moco_v3_vit_large(**overrides: Any) -> MoCoV3:
    """MoCo v3 with ViT-L/16 encoders."""
    return MoCoV3(**{"arch": "vit_large", **overrides})


def moco_v3_vit_huge(**overrides: Any) -> MoCoV3:
    """MoCo v3 with ViT-H/14 encoders."""
    return MoCoV3(**{"arch": "vit_huge", **overrides})


def moco_v3_vit_conv_small(**overrides: Any) -> MoCoV3:
    """MoCo v3 with ViT-S encoders of 11 blocks behind a convolutional stem."""
    return MoCoV3(**{"arch": "vit_conv_small", **overrides})


def moco_v3_vit_conv_base(**overrides: Any) -> MoCoV3:
    """MoCo v3 with ViT-B encoders of 11 blocks behind a convolutional stem."""
    return MoCoV3(**{"arch": "vit_conv_base", **overrides})


def moco_v3_resnet50(**overrides: Any) -> MoCoV3:
    """MoCo v3 with ResNet-50 encoders: T 1."""
    return MoCoV3(**{"arch": "resnet50", "temperature": 1.0, **overrides})


def moco_v3_vit_small_trunk(**overrides: Any) -> MoCoV3ViT:
    """The ViT-S/16 of 12 heads without its projector; `num_classes` for a classifier on it."""
    return MoCoV3ViT(**{"arch": "vit_small", **overrides})


def moco_v3_vit_base_trunk(**overrides: Any) -> MoCoV3ViT:
    """The ViT-B/16 without its projector; `num_classes` for a classifier on it."""
    return MoCoV3ViT(**{"arch": "vit_base", **overrides})


def moco_v3_resnet50_trunk(num_classes: int = 0, **overrides: Any) -> ResNet:
    """The ResNet-50 without its projector; `num_classes` for a classifier on it."""
    return resnet("resnet50", num_classes, **overrides)


# ------------------------------------------------------------------------------------------------ 5. official weights

_VIT = (
    rf"(?:cls_token|pos_embed|patch_embed\.proj\.(?:{AFFINE}|\d+\.{BATCH_NORM})|norm\.{AFFINE}"
    rf"|blocks\.\d+\.(?:(?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.{AFFINE}|norm2\.norm\.{BATCH_NORM}))"
)
_OFFICIAL = re.compile(
    rf"(?:module\.)?((?:base_encoder\.|momentum_encoder\.)(?:{RESNET}|{_VIT}|(?:fc|head)\.\d\.{BATCH_NORM})"
    rf"|predictor\.\d\.{BATCH_NORM}|{RESNET}|{_VIT}|(?:fc|head)\.{AFFINE})"
)


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names: `base_encoder.*`, `momentum_encoder.*` and `predictor.*`, with `module.`
    before them or without, of ViTs and ResNets.

    One network alone (`cls_token`, ..., `head.weight`, or `conv1.weight`, ..., `fc.weight`: the official linear
    classifiers) keeps its names.

    Raises:
        ZooError: a key that belongs to none of these layouts.
    """
    return renamed(state_dict, _OFFICIAL, "a MoCo v3 checkpoint")


def convert_trunk(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The query encoder, without projector or classifier, from a state dict that :func:`convert_official` takes.

    Raises:
        ZooError: it holds no query encoder.
    """
    lacking = "not a MoCo v3 checkpoint: it holds no query encoder"
    return one_network(convert_official(state_dict), "base_encoder", lacking, ("conv1.weight", "cls_token"))


def _resnet_trunk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    trunk = convert_trunk(state)
    if "conv1.weight" not in trunk:
        raise ZooError("this format is for ResNets, and the weights are a Vision Transformer's: use --to deit")
    return trunk


def _to_deit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    trunk = convert_trunk(state)
    if "cls_token" not in trunk:
        raise ZooError("this format is for Vision Transformers, and the weights are a ResNet's: use --to torchvision")
    return {"model": trunk}


EXPORTS = {"deit": _to_deit, **resnet_exports("MoCo v3", _resnet_trunk)}
