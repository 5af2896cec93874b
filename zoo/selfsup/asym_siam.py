"""On the Importance of Asymmetry for Siamese Representation Learning (Asym-Siam).

Xiao Wang, Haoqi Fan, Yuandong Tian, Daisuke Kihara, Xinlei Chen. CVPR 2022, arXiv 2204.00613.

Of the two encoders of a siamese network the source gets the gradient and the target does not. How much the encodings of
one image vary under augmentation should be lower on the target than on the source: what raises this variance (more and
smaller crops, mixed views, stronger augmentation) helps on the source, what lowers it (mean encodings, synchronised
BatchNorm, weaker augmentation) helps on the target, and each harms on the other side. The baseline is MoCo v2 with
BatchNorm in a projector of three layers.

The five designs combine, and each can be put on either side:

- MultiCrop: `source_minis` (6 of 96 pixels in the paper) beside the large crop; every crop is compared with the key.
- ScaleMix and AsymAug: transforms of one side (`ScaleMix` and `RandAugmented` of :mod:`zoo.data.views`).
- AsymBN: `sync_bn`: the projector's BatchNorm of one side sees the batches of 8 processes; the trunks' never do.
- MeanEnc: `target_views` (2) are encoded, and the unscaled outputs of an image averaged.

A batch's `views` come in this order: `source_views` large crops of the source, its `source_minis`, `target_views` of
the target, its `target_minis`. A step is as MoCo's; the key views of all processes are shuffled together.

Deviations from the official code, none of which changes a value: as MoCo's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.functional import normalize

from zoo.errors import ZooError, unknown
from zoo.nn.batchnorm import GatheredBatchNorm1d, SplitBatchNorm1d
from zoo.nn.projector import mlp_head
from zoo.nn.resnet import resnet
from zoo.ops.collective import world
from zoo.selfsup.moco import MoCoTask, MoCoV2, info_nce
from zoo.training import Optim
from zoo.training.trunks import ResNetFineTuning, ResNetLinearProbe
from zoo.weights.layouts import AFFINE, BATCH_NORM, RESNET, one_network, renamed, resnet_exports

__all__ = [
    "EXPORTS",
    "AsymSiam",
    "AsymSiamFineTuning",
    "AsymSiamLinearProbe",
    "AsymSiamPretraining",
    "asym_siam_resnet50",
    "asym_siam_resnet50_trunk",
    "convert_official",
    "convert_trunk",
    "mean_encoding",
    "multi_crop_loss",
]

SyncBN = Literal["none", "source", "target", "both"]

# ------------------------------------------------------------------------------------------------------- 1. equations


def mean_encoding(outputs: Tensor) -> Tensor:
    """MeanEnc: outputs (V, N, C) of V views of each image, of any length, to one embedding (N, C) of unit length."""
    mean = outputs.mean(dim=0)
    return normalize(mean.to(torch.promote_types(mean.dtype, torch.float32)), dim=1)


def multi_crop_loss(large: Sequence[Tensor], minis: Sequence[Tensor]) -> Tensor:
    """MultiCrop: the loss of large crops, and the mean loss of small ones beside it, from their logits (N, 1 + K)."""
    terms = [torch.stack([info_nce(logits) for logits in crops]).mean() for crops in (large, minis) if crops]
    return torch.stack(terms).sum()


# --------------------------------------------------------------------------------------------------------- 2. network


class AsymSiam(MoCoV2):
    """MoCo v2 with BatchNorm after the projector's first layer, whose sides may be made to differ.

    Args:
        source_views: large crops of the source whose outputs are averaged (MeanEnc on the source: 2).
        source_minis: small crops of the source (MultiCrop: 6).
        target_views: large crops of the target whose outputs are averaged (MeanEnc: 2).
        target_minis: small crops of the target, keys of their own, which do not enter the queue.
        sync_bn: whose projector normalises over the batches of `sync_group` processes (AsymBN: "target").
        sync_group: processes.
        moco: of :class:`~zoo.selfsup.moco.MoCoV2`. Under `bn_splits` one process stands for several: the projector is
            split too, unless it is synchronised.

    Raises:
        ZooError: an unknown name, or a number out of range.
    """

    export_part = "features"

    def __init__(
        self,
        source_views: int = 1,
        source_minis: int = 0,
        target_views: int = 1,
        target_minis: int = 0,
        sync_bn: SyncBN = "none",
        sync_group: int = 8,
        bn_splits: int = 1,
        **moco: Any,
    ) -> None:
        if min(source_views, target_views) < 1 or min(source_minis, target_minis) < 0:
            raise ZooError(
                "Asym-Siam wants 1 or more large crops of a side, and 0 or more small ones; got source"
                f" {source_views} and {source_minis}, target {target_views} and {target_minis}"
            )
        if sync_bn not in ("none", "source", "target", "both"):
            raise unknown("side", sync_bn, ("none", "source", "target", "both"))
        super().__init__(bn_splits=bn_splits, **moco)
        self.counts = source_views, source_minis, target_views, target_minis
        for side, encoder in (("source", self.encoder_q), ("target", self.encoder_k)):
            width = encoder.num_features
            norm: nn.BatchNorm1d = SplitBatchNorm1d(width, bn_splits) if bn_splits > 1 else nn.BatchNorm1d(width)
            if sync_bn in (side, "both"):
                norm = GatheredBatchNorm1d(width, sync_group)
            encoder.fc.set_submodule("1", norm.requires_grad_(side == "source"))

    def head(self, projection: nn.Linear) -> nn.Module:
        """Linear, BatchNorm, ReLU, Linear, ReLU, Linear."""
        width = projection.in_features
        return mlp_head([width, width, width, projection.out_features], norm=[True, False], bias=True)

    def key(self, images: Tensor) -> Tensor:
        """Outputs (N, C), of any length, of the key encoder for images (N, 3, S, S)."""
        with torch.no_grad():
            return self.encoder_k(images)

    def keys(self, images: Tensor | Sequence[Tensor], permutation: Tensor | None = None) -> Tensor:
        """Keys (R * N, C) of the images of all processes: of each the mean encoding of its views, (N, 3, S, S) each.

        Args:
            images: the views; one will do.
            permutation: (R * V * N,), of what all processes encode together; see :meth:`MoCo.keys`.
        """
        views = [images] if isinstance(images, Tensor) else list(images)
        outputs = super().keys(torch.cat(views), permutation)
        by_view = outputs.view(world()[1], len(views), len(views[0]), -1).transpose(0, 1).flatten(1, 2)
        return mean_encoding(by_view)

    def source(self, views: Sequence[Tensor]) -> Tensor:
        """Queries (N, C) of views (N, 3, S, S), encoded one after the other: the mean encoding."""
        return mean_encoding(torch.stack([self.encoder_q(view) for view in views]))

    def contrast(
        self, views: Sequence[Tensor], permutation: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Of a batch of views in their order: logits (N, 1 + K) of the large crop and of the small ones, and the keys
        (R * N, C) to enter the queue.

        `permutation` is that of the large views of the target; the small ones are shuffled by one of their own.
        """
        sources, minis, targets, small_targets = _dealt(views, self.counts)
        query = self.source(sources)
        small_queries = [self.query(view) for view in minis]
        keys = self.keys(targets, permutation)
        small = [self.logits(q, keys) for q in small_queries]
        small += [self.logits(query, self.keys(view)) for view in small_targets]
        return [self.logits(query, keys)], small, keys


def _dealt(views: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    ends = [sum(counts[: k + 1]) for k in range(len(counts))]
    return [views[end - count : end] for end, count in zip(ends, counts, strict=True)]


# ----------------------------------------------------------------------------------------------------------- 3. tasks

_PRETRAIN = Optim(name="sgd", lr=0.03, weight_decay=1e-4, no_decay="none", schedule="cosine", interval="epoch")


class AsymSiamPretraining(MoCoTask):
    """Pre-training on the views of each side; logs are :class:`~zoo.selfsup.moco.MoCoTask`'s.

    Training batches hold `views` in the order of the module's head, and may pin the shuffling of the target's large
    views by `permutation` (R * V * N,).

    Args:
        feature: what `features` gives to probes: the pooled features of the "trunk", or the "embedding" of the head.
        optim: optimiser and schedule.
        network: of :class:`AsymSiam`.
    """

    network: AsymSiam

    def __init__(
        self, feature: Literal["trunk", "embedding"] = "trunk", optim: Optim = _PRETRAIN, **network: Any
    ) -> None:
        super().__init__(AsymSiam(**network), feature, optim)
        self.save_hyperparameters()
        self.views = sum(self.network.counts)

    def contrast(self, views: Sequence[Tensor], permutation: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        if len(views[0]) < 2:
            raise ZooError("Asym-Siam's BatchNorm wants two images or more in a batch of views, which holds one")
        large, minis, keys = self.network.contrast(views, permutation)
        return multi_crop_loss(large, minis), large[0], [keys]

    def sides(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """Embeddings (N, C) of each side's large views, for :class:`~zoo.training.ViewVariance`."""
        sources, _, targets, _ = _dealt(views, self.network.counts)
        return {
            "source": self.network.source(sources),
            "target": mean_encoding(torch.stack([self.network.key(view) for view in targets])),
        }


class AsymSiamLinearProbe(ResNetLinearProbe):
    """Linear classification of frozen features (official README): LARC, base rate 0.1, batch 4096, as SimSiam's."""

    published = Optim(name="larc", base_lr=0.1, weight_decay=0.0, no_decay="none", schedule="cosine", interval="epoch")


class AsymSiamFineTuning(ResNetFineTuning):
    """End-to-end training from a pre-training. The official code has none."""


# ---------------------------------------------------------------------------------------------------------- 4. models


def asym_siam_resnet50(**overrides: Any) -> AsymSiam:
    """Asym-Siam with ResNet-50 encoders: both encoders and the queue, to train on."""
    return AsymSiam(**{"arch": "resnet50", **overrides})


def asym_siam_resnet50_trunk(num_classes: int = 0, **overrides: Any) -> ResNet:
    """The ResNet-50 of the source encoder without its projector; `num_classes` for a classifier on it."""
    return resnet("resnet50", num_classes, **overrides)


# ------------------------------------------------------------------------------------------------ 5. official weights

_OFFICIAL = re.compile(
    rf"(?:module\.)?((?:encoder_[qk]\.)?{RESNET}|(?:encoder_[qk]\.)?fc\.[0135]\.{BATCH_NORM}|queue|queue_ptr|fc\.{AFFINE})"
)


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names: `encoder_q.*`, `encoder_k.*`, `queue`, `queue_ptr`, with `module.` before
    them or without. One network alone (`conv1.weight`, ...: a linear classifier) keeps its names.

    Raises:
        ZooError: a key that belongs to neither.
    """
    return renamed(state_dict, _OFFICIAL, "an Asym-Siam checkpoint")


def convert_trunk(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk of the source encoder, without its projector, from a state dict that :func:`convert_official` takes.

    Raises:
        ZooError: it holds no source encoder.
    """
    return one_network(
        convert_official(state_dict), "encoder_q", "not an Asym-Siam checkpoint: it holds no source encoder"
    )


EXPORTS = resnet_exports("Asym-Siam", convert_trunk)
