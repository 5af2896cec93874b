"""Momentum Contrast for Unsupervised Visual Representation Learning (MoCo), and its improved baselines (MoCo v2).

Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie, Ross Girshick. CVPR 2020, arXiv 1911.05722.
v2: Xinlei Chen, Haoqi Fan, Ross Girshick, Kaiming He. 2020, arXiv 2003.04297.

Contrastive learning as a look-up: a query, one view of an image, must find its key, another view of the same image,
among many keys. The dictionary is large because it is a queue of the keys of past batches, and consistent because the
key encoder is not trained but follows the query encoder as a slow moving average. Version 2 is the same method with an
MLP for a head, a higher temperature, stronger augmentation and a cosine schedule.

A step, in this order: the key encoder moves towards the query encoder (whose weights are those before this step's
update); queries and keys are computed; the loss compares them with the queue as it was; the keys enter the queue.

Conventions: views (N, 3, S, S) of this process, R processes; embeddings of C numbers with unit length; the queue holds
K keys in columns (C, K). Only parameters are averaged: the key encoder's BatchNorm statistics are those of its batches.

Shuffling BN: were a query and its key normalised with the same batch statistics, these would give the match away. So
the keys of all processes are encoded in a random order. One process alone needs `bn_splits` (:class:`SplitBatchNorm`).

Deviations from the official code, none of which changes a value: the key encoder moves at the start of the step and
not between queries and keys. Under gradient accumulation it moves, and the keys enter, once for each update of the
weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from zoo.errors import ZooError
from zoo.nn.batchnorm import SplitBatchNorm
from zoo.nn.resnet import resnet
from zoo.ops.collective import from_first, gather, world
from zoo.ops.momentum import move_towards
from zoo.training import Optim
from zoo.training.siamese import EmbeddingTask
from zoo.training.trunks import ResNetFineTuning, ResNetLinearProbe
from zoo.weights.layouts import AFFINE, RESNET, one_network, resnet_exports

__all__ = [
    "EXPORTS",
    "MoCo",
    "MoCoFineTuning",
    "MoCoLinearProbe",
    "MoCoPretraining",
    "MoCoTask",
    "MoCoV2",
    "MoCoV2Pretraining",
    "convert_official",
    "convert_trunk",
    "enqueue",
    "info_nce",
    "info_nce_logits",
    "moco_resnet50",
    "moco_resnet50_trunk",
    "moco_v2_resnet50",
    "moco_v2_resnet50_trunk",
    "move_towards",
    "rank_rows",
    "unshuffled",
]

# ------------------------------------------------------------------------------------------------------- 1. equations


def info_nce_logits(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Similarities (N, 1 + K) of queries (N, C) to their own keys (N, C), then to the queue (C, K), over T (Eq. 1)."""
    with torch.autocast(query.device.type, enabled=False):  # in float32 under mixed precision
        own = (query * key).sum(dim=1, keepdim=True)
        return torch.cat([own, query @ queue], dim=1) / temperature


def info_nce(logits: Tensor) -> Tensor:
    """The (K + 1)-way softmax loss of logits (N, 1 + K) whose first column is the match (Eq. 1), mean over N."""
    return cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Writes keys (B, C) over the oldest columns of the queue (C, K), in place, and moves `pointer` (1,) on.

    Raises:
        ZooError: K is no multiple of B.
    """
    size, batch = queue.shape[1], len(keys)
    if size % batch:
        raise ZooError(f"queue_size {size} is no multiple of the {batch} keys of an update: change it or the batch")
    place = (pointer + torch.arange(batch, device=pointer.device)) % size
    queue[:, place] = keys.T.to(queue.dtype)
    pointer.copy_((pointer + batch) % size)


def rank_rows(permutation: Tensor, rank: int, size: int) -> Tensor:
    """Which rows of the global batch rank `rank` of `size` encodes: its share (N,) of a permutation (R * N,)."""
    return permutation.view(size, -1)[rank]


def unshuffled(rows: Tensor, permutation: Tensor) -> Tensor:
    """Rows (R * N, ...) in the order of `permutation`, back in their own order."""
    return rows[permutation.argsort()]


# --------------------------------------------------------------------------------------------------------- 2. network


class MoCo(nn.Module):
    """Query encoder, key encoder and queue.

    Args:
        dim: C, of the embeddings.
        queue_size: K, a multiple of the global batch.
        momentum: m of the key encoder.
        temperature: T of the softmax.
        encoder: of :func:`zoo.nn.resnet.resnet`.

    Raises:
        ZooError: an unknown architecture, or a number out of range.
    """

    export_part = "features"

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        **encoder: Any,
    ) -> None:
        super().__init__()
        if dim < 1 or queue_size < 1 or not 0 <= momentum <= 1 or temperature <= 0:
            raise ZooError(
                "MoCo wants dim and queue_size of 1 or more, momentum in [0, 1] and temperature > 0; got"
                f" {dim}, {queue_size}, {momentum} and {temperature}"
            )
        self.momentum, self.temperature = momentum, temperature
        self.encoder_q = resnet(num_classes=dim, **encoder)
        self.encoder_q.fc = self.head(self.encoder_q.fc)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def head(self, projection: nn.Linear) -> nn.Module:
        """What maps pooled features (N, D) to embeddings: in version 1 the linear `projection` itself."""
        return projection

    @property
    def queue_size(self) -> int:
        return self.queue.shape[1]

    @staticmethod
    def _embed(encoder: nn.Module, images: Tensor) -> Tensor:
        embedding = encoder(images)
        return normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)

    def query(self, images: Tensor) -> Tensor:
        """Embeddings (N, C) of images (N, 3, S, S) by the query encoder."""
        return self._embed(self.encoder_q, images)

    @torch.no_grad()
    def key(self, images: Tensor) -> Tensor:
        """Embeddings (N, C) of images (N, 3, S, S) by the key encoder, in the order in which they come."""
        return self._embed(self.encoder_k, images)

    @torch.no_grad()
    def keys(self, images: Tensor, permutation: Tensor | None = None) -> Tensor:
        """Keys (R * N, C) of the images (N, 3, S, S) of all processes, encoded in the order of `permutation` (R * N,).

        Rank 0's permutation counts; it draws one where none is given (section 3.3, "Shuffling BN").
        """
        rank, size = world()
        if permutation is None:
            permutation = torch.randperm(size * len(images))
        elif len(permutation) != size * len(images):
            raise ZooError(f"the permutation must have {size * len(images)} entries, not {len(permutation)}")
        permutation = from_first(permutation.to(images.device))
        mine = gather(images)[rank_rows(permutation, rank, size)]
        return unshuffled(gather(self.key(mine)), permutation)

    def update_key_encoder(self) -> None:
        """Moves the key encoder towards the query encoder."""
        move_towards(self.encoder_k, self.encoder_q, self.momentum)

    def logits(self, query: Tensor, keys: Tensor) -> Tensor:
        """Logits (N, 1 + K) of this process's queries (N, C), given the keys (R * N, C) of all."""
        own = keys.view(-1, *query.shape)[world()[0]]
        queue = self.queue.to(query.dtype, copy=True)  # the backward pass wants it as it is now
        return info_nce_logits(query, own, queue, self.temperature)

    def enqueue(self, keys: Tensor) -> None:
        """Keys (B, C) of all processes take the place of the oldest."""
        enqueue(self.queue, self.queue_ptr, keys)

    def step(self, im_q: Tensor, im_k: Tensor, permutation: Tensor | None = None) -> Tensor:
        """Logits (N, 1 + K) of one training step (Algorithm 1), in which key encoder and queue move."""
        self.update_key_encoder()
        keys = self.keys(im_k, permutation)
        logits = self.logits(self.query(im_q), keys)
        self.enqueue(keys)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, C) of images (N, 3, S, S): the queries."""
        return self.query(images)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (N, D) of the query encoder, before its head."""
        return self.encoder_q.forward_head(self.encoder_q.forward_features(images), pre_logits=True)

    def project(self, features: Tensor) -> Tensor:
        """What the head makes (N, C) of pooled features (N, D), of any length."""
        return self.encoder_q.fc(features)


class MoCoV2(MoCo):
    """MoCo with a two-layer MLP for a head, and the temperature that suits it (v2, section 3). Arguments as MoCo's."""

    def __init__(self, temperature: float = 0.2, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)

    def head(self, projection: nn.Linear) -> nn.Module:
        """Linear (D, D), ReLU, then the `projection`."""
        width = projection.in_features
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), projection)


# ----------------------------------------------------------------------------------------------------------- 3. tasks

_V1 = Optim(
    name="sgd",
    lr=0.03,
    weight_decay=1e-4,
    no_decay="none",
    schedule="step",
    interval="epoch",
    milestones=(120, 160),
)
_V2 = replace(_V1, schedule="cosine", milestones=())


class MoCoTask(EmbeddingTask):
    """What the tasks share that train a :class:`MoCo`: a step, its queue, evaluation and features.

    Evaluation batches hold `image`; logged is `{val,test}/spread`, the mean deviation of the embeddings' channels in
    units of 1/sqrt(C): 1 where they fill the sphere, 0 where they collapse. Training logs `train/acc1`, the share of
    queries that find their key among K + 1.

    Args:
        network: to train.
        feature: what `features` gives to probes: the pooled features of the "trunk", or the "embedding" of the head.
        optim: optimiser and schedule.
    """

    network: MoCo
    meets = True
    views = 2  # of each image

    def __init__(self, network: MoCo, feature: Literal["trunk", "embedding"], optim: Optim) -> None:
        super().__init__(network, network.queue.shape[0], feature, optim)
        self._waiting: list[Tensor] = []  # keys of an accumulation window that is still open

    def trainable(self) -> nn.Module:
        return self.network.encoder_q

    def on_train_start(self) -> None:
        if self.trainer.world_size == 1 and not any(isinstance(m, SplitBatchNorm) for m in self.network.modules()):
            rank_zero_warn(
                "one process with model.bn_splits 1: queries and keys share their BatchNorm statistics, by which the"
                " network can cheat; set model.bn_splits (8 for a batch of 256) or use several devices"
            )

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        views = batch.get("views")
        if views is None or len(views) != self.views:
            raise ZooError(
                f"MoCo trains on 'views', {self.views} of each image, which the batch does not hold: wrap"
                f" data.train_transform in {'TwoViews' if self.views == 2 else 'zoo.data.views.Views'}"
            )
        window = 1 if self._trainer is None else self.trainer.accumulate_grad_batches
        if batch_idx % window == 0:
            self.network.update_key_encoder()
        loss, logits, keys = self.contrast(views, batch.get("permutation"))
        self._waiting += keys
        if (batch_idx + 1) % window == 0 or self.trainer.is_last_batch:
            self.network.enqueue(torch.cat(self._waiting))
            self._waiting = []
        if self._trainer is not None:
            hits = logits.detach().argmax(dim=1) == 0
            self.log("train/acc1", hits.float().mean(), on_step=True, on_epoch=True, batch_size=len(views[0]))
        return loss

    def contrast(self, views: Sequence[Tensor], permutation: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The loss of a batch of `views`, the logits (M, 1 + K) that `train/acc1` is of, and the keys (R * N, C) to
        enter the queue, in order."""
        raise NotImplementedError


class MoCoPretraining(MoCoTask):
    """Pre-training (section 3.3, Algorithm 1).

    Training batches hold `views`, two of (N, 3, S, S), and may pin the shuffling by `permutation` (R * N,), for the
    symmetric loss (2, R * N). Logs are :class:`MoCoTask`'s.

    Args:
        symmetric: each view is query and key in turn, and the losses add up (the official CIFAR-10 demo).
        feature: what `features` gives to probes: the pooled features of the "trunk", or the "embedding" of the head.
        optim: optimiser and schedule.
        network: of :class:`MoCo`.
    """

    def __init__(
        self,
        symmetric: bool = False,
        feature: Literal["trunk", "embedding"] = "trunk",
        optim: Optim = _V1,
        **network: Any,
    ) -> None:
        super().__init__(self.build(**network), feature, optim)
        self.save_hyperparameters()
        self.symmetric = symmetric

    def build(self, **network: Any) -> MoCo:
        """The network that this task trains."""
        return MoCo(**network)

    def contrast(self, views: Sequence[Tensor], permutation: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        pairs = [(views[0], views[1]), (views[1], views[0])][: 2 if self.symmetric else 1]
        permutations = [None] * len(pairs) if permutation is None else permutation.view(len(pairs), -1)
        logits, keys = [], []
        for (im_q, im_k), order in zip(pairs, permutations, strict=True):
            query = self.network.query(im_q)
            keys.append(self.network.keys(im_k, order))
            logits.append(self.network.logits(query, keys[-1]))
        loss = torch.stack([info_nce(part) for part in logits]).sum()
        return loss, torch.cat(logits), keys[::-1]  # the keys of the first view come first


class MoCoV2Pretraining(MoCoPretraining):
    """Pre-training of version 2: :class:`MoCoV2`, T 0.2, cosine schedule. Arguments as MoCoPretraining's."""

    def __init__(self, temperature: float = 0.2, optim: Optim = _V2, **options: Any) -> None:
        super().__init__(temperature=temperature, optim=optim, **options)

    def build(self, **network: Any) -> MoCo:
        return MoCoV2(**network)


class MoCoLinearProbe(ResNetLinearProbe):
    """Linear classification of frozen features (section 4.1): SGD without decay, lr 30, the trunk in eval mode."""

    published = replace(_V1, lr=30.0, weight_decay=0.0, milestones=(60, 80))


class MoCoFineTuning(ResNetFineTuning):
    """End-to-end training (appendix A.6, on iNaturalist 2018)."""


# ---------------------------------------------------------------------------------------------------------- 4. models


def moco_resnet50(**overrides: Any) -> MoCo:
    """MoCo with ResNet-50 encoders and a linear head: both encoders and the queue, to train on."""
    return MoCo(**{"arch": "resnet50", **overrides})


def moco_v2_resnet50(**overrides: Any) -> MoCoV2:
    """MoCo v2 with ResNet-50 encoders and an MLP head: both encoders and the queue, to train on."""
    return MoCoV2(**{"arch": "resnet50", **overrides})


def moco_resnet50_trunk(num_classes: int = 0, **overrides: Any) -> ResNet:
    """The ResNet-50 of the query encoder without its head: what MoCo is for."""
    return resnet("resnet50", num_classes, **overrides)


def moco_v2_resnet50_trunk(num_classes: int = 0, **overrides: Any) -> ResNet:
    """The ResNet-50 of MoCo v2's query encoder without its head."""
    return resnet("resnet50", num_classes, **overrides)


# ------------------------------------------------------------------------------------------------ 5. official weights

_ENCODER = re.compile(rf"{RESNET}|fc(?:\.[02])?\.{AFFINE}")
_OFFICIAL = re.compile(r"(?:module\.)?(encoder_[qk]\.)?(?:net\.(\d)\.)?(.*)")
# The CIFAR-10 demo keeps the network's parts in a Sequential called net.
_DEMO = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4", "9": "fc"}


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names: `encoder_q.*`, `encoder_k.*`, `queue`, `queue_ptr`.

    Takes the official layout, with DistributedDataParallel's `module.` or without, and that of the CIFAR-10 demo
    (`encoder_q.net.0.weight`). One network alone (`conv1.weight`, ...; the official linear classifiers) stays as it is.

    Raises:
        ZooError: a key that belongs to none of these layouts.
    """
    converted = {}
    for key, value in state_dict.items():
        side, part, name = _OFFICIAL.fullmatch(key).groups(default="")  # type: ignore[union-attr]
        if part:
            name = f"{_DEMO.get(part, part)}.{name}"
        if not (_ENCODER.fullmatch(name) or (name in ("queue", "queue_ptr") and not side)):
            raise ZooError(f"not a MoCo checkpoint: unknown key {key!r}")
        converted[f"{side}{name}"] = value
    return converted


def convert_trunk(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk of the query encoder, without its head, from a state dict that :func:`convert_official` takes.

    Raises:
        ZooError: it holds no query encoder.
    """
    return one_network(convert_official(state_dict), "encoder_q", "not a MoCo checkpoint: it holds no query encoder")


EXPORTS = resnet_exports("MoCo", convert_trunk)
