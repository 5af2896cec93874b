"""Exploring Simple Siamese Representation Learning (SimSiam).

Xinlei Chen, Kaiming He. CVPR 2021, arXiv 2011.10566.

Two views of an image go through one encoder. A small predictor maps the embedding of each view to that of the other,
and their cosine similarity is maximised; the embedding that is compared with counts as a constant (stop-gradient).
There are no negatives, no momentum encoder and no large batch. A constant embedding would be a minimum too, yet
training does not end there, unless the stop-gradient or the predictor is taken away.

A step, in this order: the encoder embeds the first view, then the second, each a batch of its own for BatchNorm; then
the predictor takes the one and the other. The predictor's learning rate does not decay.

Conventions: views (N, 3, S, S); embeddings z and predictions p (N, d). Losses lie in [-1, 1].

The paper's ablations are options of the network (predictor, BatchNorm of the heads) and of the task (stop-gradient,
symmetry, similarity, alternation, moving-average targets); sections and tables stand beside them.

Deviations from the official code, none of which changes a value: the bias before the projector's last BatchNorm is no
parameter of the optimiser (there it is one without gradient).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from zoo.errors import ZooError, unknown
from zoo.metrics.spread import channel_deviation
from zoo.nn.projector import mlp_head
from zoo.nn.resnet import resnet
from zoo.ops.collective import gather
from zoo.training import Optim
from zoo.training.siamese import EmbeddingTask
from zoo.training.trunks import ResNetFineTuning, ResNetLinearProbe
from zoo.weights.layouts import AFFINE, BATCH_NORM, RESNET, one_network, renamed, resnet_exports

__all__ = [
    "EXPORTS",
    "SimSiam",
    "SimSiamFineTuning",
    "SimSiamLinearProbe",
    "SimSiamPretraining",
    "convert_official",
    "convert_trunk",
    "moving_targets",
    "negative_cosine",
    "negative_cross_entropy",
    "siamese_loss",
    "simsiam_resnet50",
    "simsiam_resnet50_trunk",
]

Similarity = Literal["cosine", "cross_entropy"]
Norms = Literal["none", "hidden", "default", "all"]
Predictor = Literal["trained", "fixed", "none"]

# ------------------------------------------------------------------------------------------------------- 1. equations


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """D(p, z) = -cos(p, z) of (N, d) each, mean over N (Eq. 1)."""
    with torch.autocast(prediction.device.type, enabled=False):  # in float32 under mixed precision
        return -cosine_similarity(_wide(prediction), _wide(target), dim=1).mean()


def negative_cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """D(p, z) = -softmax(z) . log softmax(p) of (N, d) each over their channels, mean over N (section 4.5)."""
    with torch.autocast(prediction.device.type, enabled=False):
        return -(_wide(target).softmax(dim=1) * _wide(prediction).log_softmax(dim=1)).sum(dim=1).mean()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


SIMILARITIES = {"cosine": negative_cosine, "cross_entropy": negative_cross_entropy}


def siamese_loss(predictions: Sequence[Tensor], targets: Sequence[Tensor], similarity: Similarity = "cosine") -> Tensor:
    """L = D(p1, z2) / 2 + D(p2, z1) / 2 (Eq. 2); with p1 alone D(p1, z2) (section 4.6, asymmetric).

    Args:
        predictions: (p1, p2) or (p1,), each (N, d).
        targets: (z1, z2), each (N, d); detached by who wants them so (Eq. 3 and 4).
        similarity: D.
    """
    distance = SIMILARITIES[similarity]
    terms = [distance(p, z) for p, z in zip(predictions, reversed(targets), strict=len(predictions) == 2)]
    return torch.stack(terms).mean()


def moving_targets(old: Tensor, embedding: Tensor, momentum: float) -> Tensor:
    """eta <- m eta + (1 - m) F(T'(x)) of rows (N, d) (section 5.2); a row of zeros, not seen before, becomes the
    embedding."""
    return torch.where((old != 0).any(dim=1, keepdim=True), torch.lerp(embedding, old, momentum), embedding)


# --------------------------------------------------------------------------------------------------------- 2. network


class SimSiam(nn.Module):
    """Encoder f, a ResNet with a projector for its classifier, and predictor h (section 3).

    Args:
        dim: d, of the embeddings.
        pred_dim: of the predictor's hidden layer, a bottleneck.
        projector_layers: 3 on ImageNet, 2 on CIFAR-10 (Appendix D).
        norms: BatchNorm of the heads (Table 3): "none", in "hidden" layers, "default" (and on the projector's output),
            "all" (and on the predictor's output).
        predictor: "trained"; "fixed" at its start, or "none" (Table 1).
        encoder: of :func:`zoo.nn.resnet.resnet`; blocks begin as the identity (`zero_init_last`).

    Raises:
        ZooError: an unknown name, or a number out of range.
    """

    export_part = "features"

    def __init__(
        self,
        dim: int = 2048,
        pred_dim: int = 512,
        projector_layers: int = 3,
        norms: Norms = "default",
        predictor: Predictor = "trained",
        zero_init_last: bool = True,
        **encoder: Any,
    ) -> None:
        super().__init__()
        if min(dim, pred_dim, projector_layers) < 1:
            raise ZooError(
                "SimSiam wants dim, pred_dim and projector_layers of 1 or more; got"
                f" {dim}, {pred_dim} and {projector_layers}"
            )
        for kind, name, known in (
            ("choice of norms", norms, ("none", "hidden", "default", "all")),
            ("predictor", predictor, ("trained", "fixed", "none")),
        ):
            if name not in known:
                raise unknown(kind, name, known)
        self.dim = dim
        self.encoder = resnet(num_classes=dim, zero_init_last=zero_init_last, **encoder)
        width, hidden, output = self.encoder.num_features, norms != "none", norms in ("default", "all")
        projector = mlp_head(
            [width] * projector_layers + [dim], hidden, "plain" if output else "none", output_bias=True
        )
        if output:  # BatchNorm takes the bias away again
            last = projector[-2]
            assert isinstance(last, nn.Linear)
            last.bias.requires_grad_(False)
        self.encoder.fc = projector
        self.predictor: nn.Module = nn.Identity()
        if predictor != "none":
            last_norm: Literal["affine", "none"] = "affine" if norms == "all" else "none"
            self.predictor = mlp_head([dim, pred_dim, dim], hidden, last_norm, output_bias=True)
            self.predictor.requires_grad_(predictor == "trained")

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings z (N, d) of images (N, 3, S, S)."""
        return self.encoder(images)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (N, D) of images, before the projector."""
        return self.encoder.forward_head(self.encoder.forward_features(images), pre_logits=True)

    def project(self, features: Tensor) -> Tensor:
        """Embeddings (N, d) of pooled features (N, D)."""
        return self.encoder.fc(features)


# ----------------------------------------------------------------------------------------------------------- 3. tasks

_PRETRAIN = Optim(
    name="sgd",
    base_lr=0.05,
    weight_decay=1e-4,
    no_decay="none",
    schedule="cosine",
    interval="epoch",
    constant_lr=("predictor",),
)


class SimSiamPretraining(EmbeddingTask):
    """Pre-training (Algorithm 1).

    Training batches hold `views`, two of (N, 3, S, S), or four and more of which each two are a pair (the asymmetric
    "2x" of section 4.6); and `index` (N,), where targets are moving averages. Evaluation batches hold `image`. Logged
    are `train/spread` and `{val,test}/spread`, the mean deviation of the channels of unit embeddings in units of
    1/sqrt(d) (section 4.1): 1 where they fill the sphere, 0 where they collapse.

    Args:
        stop_gradient: off, it collapses (section 4.1).
        symmetric: each view predicts the other; off, the first alone predicts (section 4.6).
        similarity: "cosine", or "cross_entropy" over the channels (section 4.5).
        alternation: targets are those of the encoder as it was every so many updates ago, or at the beginning of the
            "epoch" (section 5.2, multi-step alternation); 1 is SimSiam.
        target_momentum: m; targets are moving averages of an image's embeddings over the epochs, to be used without
            predictor (section 5.2: 0.8); null for SimSiam. They take 4 d bytes an image, in the checkpoint too.
        feature: what `features` gives to probes: the pooled features of the "trunk", or the "embedding".
        optim: optimiser and schedule.
        network: of :class:`SimSiam`.

    Raises:
        ZooError: an unknown name, or options that exclude each other.
    """

    network: SimSiam
    memory: Tensor

    def __init__(
        self,
        stop_gradient: bool = True,
        symmetric: bool = True,
        similarity: Similarity = "cosine",
        alternation: int | Literal["epoch"] = 1,
        target_momentum: float | None = None,
        feature: Literal["trunk", "embedding"] = "trunk",
        optim: Optim = _PRETRAIN,
        **network: Any,
    ) -> None:
        whole = SimSiam(**network)
        super().__init__(whole, whole.dim, feature, optim)
        self.save_hyperparameters()
        if similarity not in SIMILARITIES:
            raise unknown("similarity", similarity, SIMILARITIES)
        if (alternation != "epoch" and alternation < 1) or not 0 <= (target_momentum or 0.0) < 1:
            raise ZooError(
                "alternation must be 1 or more or 'epoch', and target_momentum in [0, 1) or null; got"
                f" {alternation} and {target_momentum}"
            )
        if (alternation != 1) + (target_momentum is not None) + (not stop_gradient) > 1:
            raise ZooError(
                "alternation, target_momentum and stop_gradient false are three kinds of targets: choose one"
            )
        self.stop_gradient, self.symmetric, self.similarity = stop_gradient, symmetric, similarity
        self.alternation, self.target_momentum = alternation, target_momentum
        self.target: ResNet | None = None
        if alternation != 1:
            self.target = copy.deepcopy(self.network.encoder).requires_grad_(False)
        if target_momentum is not None:
            self.register_buffer("memory", torch.zeros(0, self.network.dim))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.target_momentum is not None and not len(self.memory):
            samples = getattr(self.trainer.datamodule, "samples", None)  # type: ignore[attr-defined]
            if samples is None:
                raise ZooError(
                    "target_momentum wants a data module with samples(split): it keeps a target of each image"
                )
            self.memory = torch.zeros(len(samples("train")), self.network.dim, device=self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint.get("state_dict", {}).get("memory")
        if self.target_momentum is not None and isinstance(kept, Tensor) and kept.ndim == 2:
            self.memory = self.memory.new_zeros(len(kept), self.network.dim)
        super().on_load_checkpoint(checkpoint)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        views = batch.get("views")
        if views is None or len(views) < 2 or len(views) % 2:
            raise ZooError(
                "SimSiam trains on 'views', an even number of each image, which the batch does not hold: wrap"
                " data.train_transform in TwoViews"
            )
        if len(views[0]) < 2:
            raise ZooError("SimSiam's BatchNorm wants two images or more in a batch of views, which holds one")
        self._begin(batch_idx)
        losses, deviations = [], []
        for first, second in zip(views[::2], views[1::2], strict=True):
            embeddings = self.embed(first, second)
            predictions = [self.network.predictor(z) for z in embeddings[: 2 if self.symmetric else 1]]
            targets = self.targets((first, second), embeddings, batch)
            losses.append(siamese_loss(predictions, targets, self.similarity))
            deviations.append(channel_deviation(embeddings[0].detach().float()))
        if self._trainer is not None:
            spread = torch.stack(deviations).mean() * self.network.dim**0.5
            self.log("train/spread", spread, on_step=True, on_epoch=True, batch_size=len(views[0]))
        return torch.stack(losses).mean()

    def _begin(self, batch_idx: int) -> None:
        """At the start of an alternation the encoder of the targets becomes the encoder as it is."""
        if self.target is None:
            return
        window, step = 1, 0
        if self._trainer is not None:
            window, step = self.trainer.accumulate_grad_batches, self.trainer.global_step
        due = batch_idx == 0
        if self.alternation != "epoch":
            due = batch_idx % window == 0 and step % self.alternation == 0
        if due:
            self.target.load_state_dict(self.network.encoder.state_dict())

    def embed(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """z1 and z2 (N, d) of two views; z2 without gradient where none will be asked for."""
        z1 = self.network(first)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.symmetric or not self.stop_gradient)):
            return z1, self.network(second)

    def targets(
        self, views: tuple[Tensor, Tensor], embeddings: tuple[Tensor, Tensor], batch: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """What the embeddings z1, z2 are as targets, (N, d) each."""
        if not self.stop_gradient:
            return embeddings
        with torch.no_grad():
            if self.target is not None:
                return [self.target(view) for view in views]
            if self.target_momentum is None:
                return [z.detach() for z in embeddings]
            index, found = batch["index"], [z.detach().float() for z in embeddings]
            old = self.memory[index]
            used = found if self.symmetric else found[1:]
            kept = moving_targets(old, torch.stack(used).mean(dim=0), self.target_momentum)
            self.memory[gather(index)] = gather(kept)
            return [moving_targets(old, z, self.target_momentum) for z in found]

    def sides(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """Predictions of first views, the source, and embeddings of second ones, the target: (N, d) each."""
        return {"source": self.network.predictor(self.network(views[0])), "target": self.network(views[1])}


class SimSiamLinearProbe(ResNetLinearProbe):
    """Linear classification of frozen features (Appendix A): LARC, base rate 0.1, batch 4096."""

    published = Optim(name="larc", base_lr=0.1, weight_decay=0.0, no_decay="none", schedule="cosine", interval="epoch")


class SimSiamFineTuning(ResNetFineTuning):
    """End-to-end training from a pre-training. The paper has none."""


# ---------------------------------------------------------------------------------------------------------- 4. models


def simsiam_resnet50(**overrides: Any) -> SimSiam:
    """SimSiam with a ResNet-50: encoder with projector, and predictor, to train on."""
    return SimSiam(**{"arch": "resnet50", **overrides})


def simsiam_resnet50_trunk(num_classes: int = 0, **overrides: Any) -> ResNet:
    """The ResNet-50 of the encoder without its projector; `num_classes` for a classifier on it."""
    return resnet("resnet50", num_classes, **overrides)


# ------------------------------------------------------------------------------------------------ 5. official weights

_OFFICIAL = re.compile(
    rf"(?:module\.)?((?:encoder\.)?{RESNET}|encoder\.fc\.\d\.{BATCH_NORM}|predictor\.\d\.{BATCH_NORM}|fc\.{AFFINE})"
)


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names: `encoder.*` and `predictor.*`, with `module.` before them or without.

    One network alone (`conv1.weight`, ..., `fc.weight`: the official linear classifiers) keeps its names.

    Raises:
        ZooError: a key that belongs to neither.
    """
    return renamed(state_dict, _OFFICIAL, "a SimSiam checkpoint")


def convert_trunk(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk of the encoder, without its projector, from a state dict that :func:`convert_official` takes.

    Raises:
        ZooError: it holds no encoder.
    """
    return one_network(convert_official(state_dict), "encoder", "not a SimSiam checkpoint: it holds no encoder")


EXPORTS = resnet_exports("SimSiam", convert_trunk)
