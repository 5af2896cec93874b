"""RetinaNet: Focal Loss for Dense Object Detection.

Tsung-Yi Lin, Priya Goyal, Ross Girshick, Kaiming He, Piotr Dollár. ICCV 2017, arXiv 1708.02002.

A detector without proposals looks at some 100,000 anchors an image, nearly all of them easy background; their small
losses add up to far more than those of the few objects. The focal loss scales cross entropy by (1 - p_t)^gamma: what is
classified well stops counting, with no sampling and no mining. RetinaNet is the plain detector that is trained with it:
a ResNet, a feature pyramid p3 to p7, and two small convolutional subnets over all levels, one for the classes of each
anchor and one for its box.

Conventions: boxes (x1, y1, x2, y2) in continuous pixels; K classes 0..K-1, the background is K; R anchors of all levels
by level, row, column, scale, ratio. Numerics and training are detectron2's, whose published weights load and give the
published boxes; those of torchvision and of Detectron (Caffe2) load, too, with their conventions of anchors and boxes
as options. Where they differ from the paper, the card's ledger says so.

Where the parts are: subnets, anchors, matching, inference in :mod:`zoo.nn.detection.dense`; backbones in
:mod:`zoo.nn.detection.backbone`; the focal losses in :mod:`zoo.ops.focal`.

Deviations from detectron2's code, none of which changes a value beyond rounding:
- The loss is computed on the levels' maps as they come: each anchor's as background, corrected at the positives; no
  copy of all logits, no one-hot targets.
- The threshold of the scores is put to the logits; only candidates go through the sigmoid.
- The normaliser counts the positives of all processes, so that two compute what one does; it is kept in a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchvision.ops import nms

from zoo.errors import ZooError, unknown
from zoo.nn.detection import FPN, ConvTop, FPNConfig, ResNetBackbone, ResNetConfig, configured
from zoo.nn.detection.dense import (
    Assigned,
    DenseAnchorConfig,
    DenseAnchors,
    DenseDetector,
    DenseHead,
    DenseHeadConfig,
    DenseInferenceConfig,
    assign_anchors,
    flatten_level,
    pairs,
    select_dense,
    take_anchors,
)
from zoo.nn.detection.dense import (
    Detection as Found,
)
from zoo.ops.boxes import BoxLoss, Weights, box_loss
from zoo.ops.collective import sum_over
from zoo.ops.focal import class_weights, focal_star_term, focal_term
from zoo.training import Optim
from zoo.training.detection import Detection
from zoo.weights import detectron2
from zoo.weights.pretrained import read_source

Kind = Literal["focal", "focal_star", "ohem"]
Normalizer = Literal["ema", "positives"]
Top = Literal["c5", "p5"]

# ------------------------------------------------------------------------------------------------------- 1. functions


@dataclass(frozen=True)
class RetinaLossConfig:
    """What the anchors are to become, and the losses: the paper's and all that its Table 1 compares it with.

    Args:
        kind: `focal`, FL (equation 5): with gamma 0 the cross entropy (Table 1a; alpha null: not balanced);
            `focal_star`, FL* (appendix A); `ohem`, cross entropy of hard examples alone (Table 1d).
        gamma: focusing parameter of both focal losses.
        alpha: weight of the positives, 1 - alpha of the negatives; null for no weights.
        beta: shift of FL*.
        ohem_batch: hard examples an image.
        ohem_nms: an anchor is no example where a harder one overlaps it more; 1 for no suppression.
        ohem_ratio: negatives for each positive among the examples; null for whatever is hardest.
        normalizer: what the sums are divided by, for each image of the batch: an exponential moving average of the
            number of positive anchors an image (`ema`), or the batch's own number (`positives`).
        momentum, initial: of the average; detectron2's start of 100 is of the 2 images of a process.
        thresholds, labels, low_quality: overlaps that part background, ignored and positive anchors; see
            :func:`zoo.ops.boxes.match`.
        box_loss, box_beta, box_weights: see :func:`zoo.ops.boxes.box_loss`.

    Raises:
        ZooError: an unknown kind or normaliser, or numbers out of range.
    """

    kind: Kind = "focal"
    gamma: float = 2.0
    alpha: float | None = 0.25
    beta: float = 0.0
    ohem_batch: int = 128
    ohem_nms: float = 0.7
    ohem_ratio: float | None = None
    normalizer: Normalizer = "ema"
    momentum: float = 0.9
    initial: float = 50.0
    thresholds: tuple[float, ...] = (0.4, 0.5)
    labels: tuple[int, ...] = (0, -1, 1)
    low_quality: bool = True
    box_loss: BoxLoss = "smooth_l1"
    box_beta: float = 0.0
    box_weights: Weights = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown("loss", self.kind, get_args(Kind))
        if self.normalizer not in get_args(Normalizer):
            raise unknown("normalizer", self.normalizer, get_args(Normalizer))
        if self.gamma < 0 or (self.kind == "focal_star" and not self.gamma):
            raise ZooError(f"gamma is not negative, and more than 0 in FL*; got {self.gamma}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ZooError(f"alpha is null or a weight from 0 to 1, not {self.alpha}")
        if len(self.labels) != len(self.thresholds) + 1 or sorted(self.thresholds) != list(self.thresholds):
            raise ZooError("thresholds rise, and there is one more of the labels than of them")
        if not 0 <= self.momentum <= 1:
            raise ZooError(f"momentum is from 0 to 1, not {self.momentum}")
        if self.ohem_batch < 1 or (self.ohem_ratio is not None and self.ohem_ratio <= 0) or self.initial <= 0:
            raise ZooError("ohem_batch, ohem_ratio and initial are more than 0")

    def term(self, x: Tensor) -> Tensor:
        """The loss, without alpha, where x_t = -x: of a negative's logit x, of a positive's -x."""
        if self.kind == "focal_star":
            return focal_star_term(x, self.gamma, self.beta)
        return focal_term(x, self.gamma if self.kind == "focal" else 0.0)


class Positives(NamedTuple):
    """P positive anchors: their `image` and place among the R anchors (P,), and their `logits` of all classes (P, K)
    and `label` (P,)."""

    image: Tensor
    anchor: Tensor
    label: Tensor
    logits: Tensor

    @property
    def logit(self) -> Tensor:
        """(P,) of the positives' own class."""
        return self.logits.gather(1, self.label[:, None])[:, 0]


def _per_anchor(x: Tensor, num_classes: int) -> Tensor:
    """The sums over classes (B, H W A) of a level's values (B, A K, H, W)."""
    return x.unflatten(1, (-1, num_classes)).sum(dim=2).permute(0, 2, 3, 1).flatten(1)


def anchor_losses(logits: Sequence[Tensor], positives: Positives, loss: RetinaLossConfig) -> Tensor:
    """The classification loss of each anchor (B, R), a sum over classes, the ignored ones' as of background.

    Args:
        logits: (B, A K, H, W) of each level.
        positives: the rest is background.
        loss: which.
    """
    positive, negative = class_weights(loss.alpha)
    classes = positives.logits.shape[1]
    every = torch.cat([_per_anchor(loss.term(x), classes) for x in logits], dim=1) * negative
    x = positives.logit
    correction = positive * loss.term(-x) - negative * loss.term(x)
    return every.index_put((positives.image, positives.anchor), correction, accumulate=True)


@torch.no_grad()
def easy_losses(logits: Sequence[Tensor], positives: Positives, loss: RetinaLossConfig, below: float = 0.1) -> Tensor:
    """The part of :func:`anchor_losses` (B, R) that is of negatives (a class that an anchor is not of) with a
    probability less than `below`."""
    negative, classes = class_weights(loss.alpha)[1], positives.logits.shape[1]
    parts = [_per_anchor(torch.where(x.sigmoid() < below, loss.term(x), 0.0), classes) for x in logits]
    x = positives.logit
    counted = torch.where(x.sigmoid() < below, loss.term(x), 0.0)
    every = torch.cat(parts, dim=1)
    return every.index_put((positives.image, positives.anchor), -counted, accumulate=True) * negative


@torch.no_grad()
def hard_examples(losses: Tensor, positive: Tensor, anchors: Tensor, loss: RetinaLossConfig) -> Tensor:
    """Online hard example mining (section 5.1): the `ohem_batch` examples of an image with the largest losses, after
    a suppression of those that overlap a harder one; with `ohem_ratio` so many negatives for each positive.

    Args:
        losses: (N,) of the anchors that are not ignored.
        positive: (N,) bool.
        anchors: (N, 4).
        loss: `ohem_batch`, `ohem_nms`, `ohem_ratio`.

    Returns:
        Their indices (M,), M <= `ohem_batch`.
    """
    most, ratio = loss.ohem_batch, loss.ohem_ratio
    order = losses.argsort(descending=True, stable=True)
    tried, kept = 8 * most, order
    while True:  # suppression goes from the hardest down: a prefix of the order decides about itself
        part = order[:tried]
        if loss.ohem_nms < 1:
            kept = part[nms(anchors[part], losses[part].to(anchors.dtype), loss.ohem_nms)]
        if ratio is None:
            chosen = kept[:most]
            full = len(chosen) == most
        else:
            found, rest = kept[positive[kept]], kept[~positive[kept]]
            found = found[: max(int(most / (1 + ratio)), 1)]
            rest = rest[: min(int(ratio * max(len(found), 1)), most - len(found))]
            chosen = torch.cat([found, rest])
            full = len(chosen) == most
        if full or tried >= len(order):
            return chosen
        tried *= 4


# --------------------------------------------------------------------------------------------------------- 2. network


class RetinaNet(DenseDetector):
    """A ResNet, a pyramid with convolutional p6 and p7, and a subnet each for classes and boxes (figure 3).

    As it stands RetinaNet R50-FPN. Every part is a config; in Python a mapping of its fields will do.

    Args:
        num_classes: K, without the background.
        resnet: the trunk.
        fpn: the pyramid.
        top: what p6 comes from; null for no p6 and p7.
        levels: the maps that the subnets see; null for all.
        anchors: the boxes that predictions start from.
        head: the subnets.
        loss: matching, classification loss, box loss.
        inference: what is reported.

    Attributes:
        options: all of these, as they came to be.
        normalizer: the moving average of the positives an image, before the next batch; not in the state dict, whose
            keys are those of the published files, but kept in a task's checkpoints.

    Raises:
        ZooError: an unknown option or name, or parts that do not go together.
    """

    def __init__(
        self,
        num_classes: int = 80,
        resnet: ResNetConfig = ResNetConfig(),  # noqa: B008
        fpn: FPNConfig = FPNConfig(inputs=("c3", "c4", "c5")),  # noqa: B008
        top: Top | None = "c5",
        levels: tuple[str, ...] | None = None,
        anchors: DenseAnchorConfig = DenseAnchorConfig(),  # noqa: B008
        head: DenseHeadConfig = DenseHeadConfig(),  # noqa: B008
        loss: RetinaLossConfig = RetinaLossConfig(),
        inference: DenseInferenceConfig = DenseInferenceConfig(),  # noqa: B008
    ) -> None:
        if top is not None and top not in get_args(Top):
            raise unknown("source of p6", str(top), get_args(Top))
        resnet = configured(ResNetConfig, resnet)
        fpn = configured(FPNConfig, {"inputs": ("c3", "c4", "c5"), **fpn} if isinstance(fpn, Mapping) else fpn)
        anchors, head = configured(DenseAnchorConfig, anchors), configured(DenseHeadConfig, head)
        loss, inference = configured(RetinaLossConfig, loss), configured(DenseInferenceConfig, inference)
        trunk = ResNetBackbone(resnet, fpn.inputs)
        above = None
        if top is not None:
            source = fpn.inputs[-1] if top == "c5" else None
            above = ConvTop(fpn.channels, trunk.channels[source] if source else fpn.channels, source)
        backbone = FPN(trunk, fpn, above)
        for name in levels or ():
            if name not in backbone.strides:
                raise unknown("level", name, backbone.strides)
        super().__init__(backbone, inference.pixel_borders)
        self.levels = tuple(levels or backbone.strides)
        self.num_classes, self.loss, self.inference = num_classes, loss, inference
        self.anchors = DenseAnchors([backbone.strides[name] for name in self.levels], anchors)
        self.head = DenseHead(fpn.channels, len(self.levels), self.anchors.per_cell, num_classes, head)
        self.normalizer: Tensor
        self.register_buffer("normalizer", torch.tensor(loss.initial), persistent=False)
        parts = {"anchors": anchors, "head": head, "loss": loss, "inference": inference}
        self.options: dict[str, Any] = {"num_classes": num_classes, "resnet": resnet, "fpn": fpn, "top": top}
        self.options |= {"levels": levels, **parts}

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What COCO measures of it."""
        return ("bbox",)

    def predict(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Anchors (H W A, 4), logits (B, A K, H, W) and deltas (B, A 4, H, W) of each level for images (B, 3, H, W)."""
        maps = self.backbone(images)
        features = [maps[name] for name in self.levels]
        logits, deltas = self.head(features)
        return self.anchors(features), logits, deltas

    def assign(self, anchors: Tensor, targets: Sequence[Mapping[str, Any]]) -> Assigned:
        """Classes and objects of the anchors (R, 4) of each image."""
        loss = self.loss
        return assign_anchors(anchors, targets, self.num_classes, loss.thresholds, loss.labels, loss.low_quality)

    def positives(self, logits: Sequence[Tensor], assigned: Assigned) -> Positives:
        """The positive anchors of a batch."""
        image, anchor = assigned.positives(self.num_classes)
        taken = take_anchors(logits, self.num_classes, image, anchor)
        return Positives(image, anchor, assigned.labels[image, anchor], taken)

    def counted(self, losses: Tensor, assigned: Assigned, anchors: Tensor) -> Tensor:
        """Which anchors' losses (B, R) are summed, bool (B, R): those not ignored; the hard ones of them with OHEM."""
        valid = assigned.labels >= 0
        if self.loss.kind != "ohem":
            return valid
        chosen = torch.zeros_like(valid)
        for image, known in enumerate(valid):
            index = known.nonzero()[:, 0]
            positive = assigned.labels[image, index] < self.num_classes
            hard = hard_examples(losses[image, index].detach(), positive, anchors[index], self.loss)
            chosen[image, index[hard]] = True
        return chosen

    def normalize(self, positives: int, images: int) -> Tensor:
        """What the sums of a batch of so many images are divided by; the moving average moves before it is used.

        Both numbers are taken over all processes, each of which divides by its own images.
        """
        total, count = sum_over(self.normalizer.new_tensor([float(positives), float(images)]))
        rate = total.clamp(min=1) / count
        if self.loss.normalizer == "ema":
            momentum = self.loss.momentum
            rate = self.normalizer.mul_(momentum).add_((1 - momentum) * rate).clone()
        return rate * images

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss_cls` and `loss_box_reg` of a batch with targets, both over the normaliser."""
        anchors, logits, deltas = self.predict(batch["image"])
        joined, targets, loss = torch.cat(anchors), batch["target"], self.loss
        assigned = self.assign(joined, targets)
        positives = self.positives(logits, assigned)
        image, anchor = positives.image, positives.anchor
        every = anchor_losses(logits, positives, loss)
        classes = (every * self.counted(every, assigned, joined)).sum()
        predicted = take_anchors(deltas, 4, image, anchor)
        boxes = assigned.boxes(targets, image, anchor).to(joined.dtype)
        regression = box_loss(predicted, boxes, joined[anchor], loss.box_weights, loss.box_loss, loss.box_beta)
        normalizer = self.normalize(len(anchor), len(targets))
        return {"loss_cls": classes / normalizer, "loss_box_reg": regression / normalizer}

    @torch.no_grad()
    def loss_of_easy(self, batch: Mapping[str, Any], below: float = 0.1) -> tuple[Tensor, Tensor]:
        """(The classification loss of easy negatives, see :func:`easy_losses`; that of all) of a batch with targets,
        sums without the normaliser."""
        anchors, logits, _ = self.predict(batch["image"])
        assigned = self.assign(torch.cat(anchors), batch["target"])
        positives = self.positives(logits, assigned)
        every = anchor_losses(logits, positives, self.loss)
        counted = self.counted(every, assigned, torch.cat(anchors))
        return (easy_losses(logits, positives, self.loss, below) * counted).sum(), (every * counted).sum()

    def detect(self, batch: Mapping[str, Any]) -> list[Found]:
        """Detections in the pixels of the network's input: see :func:`zoo.nn.detection.dense.select_dense`."""
        anchors, logits, deltas = self.predict(batch["image"])
        scores = [flatten_level(x, self.num_classes) for x in logits]
        shifts = [flatten_level(x, 4) for x in deltas]
        found = []
        for image, size in enumerate(pairs(batch["size"])):
            ours = ([x[image] for x in scores], [x[image] for x in shifts])
            bounds = size if self.inference.clip else None
            found.append(select_dense(anchors, *ours, self.inference, self.loss.box_weights, bounds))
        return found


# ------------------------------------------------------------------------------------------------------------ 3. task


class RetinaNetDetection(Detection):
    """Training and evaluation of a :class:`RetinaNet`.

    Args:
        init_from: where :meth:`setup` takes weights from: the name of published weights, a file, or a checkpoint. Of a
            classifier the trunk is filled; of a detector everything but the last layer of another number of classes. A
            trunk in torchvision's layout wants `resnet.stride_in_1x1` false, and RGB pixels.
        clip_each: bound of the norm of each parameter's own gradient; null for none.
        optim: optimiser and schedule.
        network: of :class:`RetinaNet`.
    """

    network: RetinaNet
    meets = True  # all processes' positives are counted

    def __init__(
        self,
        init_from: str | None = None,
        clip_each: float | None = None,
        optim: Optim = Optim(  # noqa: B008
            name="sgd", base_lr=0.01, reference_batch=16, weight_decay=1e-4, no_decay="norm", schedule="step"
        ),
        **network: Any,
    ) -> None:
        detector = RetinaNet(**network)
        super().__init__(detector, optim, detector.iou_types, clip_each=clip_each, init_from=init_from)
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        load_weights(self.network, source)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["loss_normalizer"] = float(self.network.normalizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "loss_normalizer" in checkpoint:
            self.network.normalizer.fill_(checkpoint["loss_normalizer"])


# ---------------------------------------------------------------------------------------------------------- 4. models

_R50: dict[str, Any] = {"depth": 50, "stride_in_1x1": True}
_R101: dict[str, Any] = {"depth": 101, "stride_in_1x1": True}
_X101: dict[str, Any] = {"depth": 101, "stride_in_1x1": False}
_TORCHVISION: dict[str, Any] = {
    "anchors": {"convention": "torchvision"},
    "inference": {"detections": 300, "clip": True},
}


def _build(overrides: Mapping[str, Any], **parts: Any) -> RetinaNet:
    merged = {name: {**parts.get(name, {}), **value} for name, value in overrides.items() if isinstance(value, Mapping)}
    return RetinaNet(**{**parts, **overrides, **merged})


def retinanet_r50_fpn(**overrides: Any) -> RetinaNet:
    """RetinaNet, ResNet-50-FPN."""
    return _build(overrides, resnet=_R50)


def retinanet_r101_fpn(**overrides: Any) -> RetinaNet:
    """RetinaNet, ResNet-101-FPN."""
    return _build(overrides, resnet=_R101)


def retinanet_x101_32x8d_fpn(**overrides: Any) -> RetinaNet:
    """RetinaNet, ResNeXt-101-32x8d-FPN."""
    return _build(overrides, resnet={**_X101, "groups": 32, "width_per_group": 8})


def retinanet_x101_64x4d_fpn(**overrides: Any) -> RetinaNet:
    """RetinaNet, ResNeXt-101-64x4d-FPN."""
    return _build(overrides, resnet={**_X101, "groups": 64, "width_per_group": 4})


def retinanet_r50_fpn_torchvision(**overrides: Any) -> RetinaNet:
    """torchvision's RetinaNet, version 1: p6 of p5, anchors of whole pixels, stride in the 3x3 convolutions."""
    return _build(overrides, resnet={"depth": 50, "stride_in_1x1": False}, top="p5", **_TORCHVISION)


def retinanet_r50_fpn_torchvision_v2(**overrides: Any) -> RetinaNet:
    """torchvision's RetinaNet, version 2: p6 of c5, GroupNorm in the subnets, BatchNorm in the trunk, GIoU loss."""
    return _build(
        overrides,
        resnet={"depth": 50, "stride_in_1x1": False, "norm": "bn", "freeze": 0},
        head={"norm": "gn", "bias": False},
        loss={"box_loss": "giou"},
        **_TORCHVISION,
    )


# ------------------------------------------------------------------------------------------------ 5. official weights

_OURS = re.compile(r"(?:backbone|head)\..+")
_CLASS_LAYERS = re.compile(r"head\.cls_score\.(?:weight|bias)")
_HEAD = re.compile(r"head\.(?:(cls_score|bbox_pred)|(cls|bbox)_subnet\.(\d+)(?:\.(\d))?)\.(\w+)")
# COCO's ids of its 80 classes: of torchvision's 91 outputs the others, and 0, were never an object's.
_COCO_IDS = [k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
_TORCHVISION_HEAD = re.compile(
    r"head\.(?:classification|regression)_head\.(?:conv\.(\d)\.([01])|(cls_logits|bbox_reg))\.(weight|bias)"
)
_TORCHVISION_PYRAMID = re.compile(
    r"backbone\.fpn\.(?:(inner|layer)_blocks\.(\d)\.0|extra_blocks\.(p[67]))\.(weight|bias)"
)
_DETECTRON = re.compile(
    r"fpn_(?:(inner_)?res(\d)_\d+_sum(?:_lateral)?|([67]))_([wb])|retnet_(cls|bbox)_(?:conv_n(\d)|pred)_fpn3_([wb])"
)
_LEAVES = {"w": "weight", "b": "bias"}


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published RetinaNet in our names: detectron2's, torchvision's (both versions) or Detectron's (Caffe2). Our own
    names are left as they are.

    Anchors come to the order that they have here, whatever the file's (torchvision: ratio before scale; Detectron:
    ratios 1, 2, 1/2). Of torchvision's 91 outputs the 80 of COCO's classes are kept, in the order of their ids; its
    version 1 was trained without an eps in the frozen BatchNorm, which is taken off the variances. Momenta of Caffe2
    are left out. Anchors and boxes keep the file's conventions by the options of the model that the weights name.

    Raises:
        ZooError: a key of no such detector.
    """
    if any(key.startswith("head.cls_subnet.convs.") for key in state_dict):
        return detectron2.ours(state_dict, _OURS)
    if any(key.startswith("head.classification_head.") for key in state_dict):
        return _from_torchvision(state_dict)
    if any(key.startswith("retnet_") for key in state_dict):
        return _from_detectron(state_dict)
    step = 3 if any(key.startswith("head.cls_subnet.1.") for key in state_dict) else 2  # conv, norm, ReLU

    def head_name(key: str) -> str | None:
        match = _HEAD.fullmatch(key)
        if match is None:
            return None
        last, subnet, index, level, leaf = match.groups()
        if last:
            return key
        part = "convs" if int(index) % step == 0 else "norms"
        inner = f"levels.{level}." if level is not None else ""
        return f"head.{subnet}_subnet.{part}.{int(index) // step}.{inner}{leaf}"

    return detectron2.rename(state_dict, (detectron2.backbone_name, head_name), "detectron2's RetinaNets")


def _ordered(value: Tensor, outer: int, order: Sequence[int] | None) -> Tensor:
    """The outputs of a last layer (A V, ...) of nine anchors, whose two indices are swapped, or whose inner one (the
    ratio) is put into an `order`."""
    parts = value.unflatten(0, (outer, 9 // outer, -1))
    return (parts.transpose(0, 1) if order is None else parts[:, list(order)]).flatten(0, 2)


def _from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = not any(key.startswith("head.classification_head.conv.0.1.") for key in state_dict)
    converted: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r"backbone\.body\.((?:conv1|bn1|layer[1-4])\..+)", key):
            if first and key.endswith("num_batches_tracked"):
                continue
            name = f"backbone.bottom_up.{match[1]}"
            value = value - 1e-5 if first and key.endswith("running_var") else value
        elif match := _TORCHVISION_PYRAMID.fullmatch(key):
            kind, index, top, leaf = match.groups()
            level = int(index or 0) + 3
            place = f"top.{top}" if top else f"lateral.c{level}.0" if kind == "inner" else f"output.p{level}.0"
            name = f"backbone.{place}.{leaf}"
        elif match := _TORCHVISION_HEAD.fullmatch(key):
            conv, norm, last, leaf = match.groups()
            subnet = "cls" if "classification" in key else "bbox"
            name = f"head.{subnet}_subnet.{'norms' if norm == '1' else 'convs'}.{conv}.{leaf}"
            if last:
                name = f"head.{'cls_score' if last == 'cls_logits' else 'bbox_pred'}.{leaf}"
                value = _ordered(value, 3, None)
                if last == "cls_logits" and len(value) == 9 * 91:
                    value = value.unflatten(0, (9, 91))[:, _COCO_IDS].flatten(0, 1)
        else:
            raise ZooError(f"not a checkpoint of torchvision's RetinaNets: unknown key {key!r}")
        converted[name] = value
    return converted


def _from_detectron(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    trunk: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        match = _DETECTRON.fullmatch(key.removesuffix("_momentum"))
        if match is None:
            trunk[key] = value
            continue
        inner, stage, top, leaf, subnet, conv, head_leaf = match.groups()
        if key.endswith("_momentum"):
            continue
        if subnet:
            last = "cls_score" if subnet == "cls" else "bbox_pred"
            name = f"head.{last if conv is None else f'{subnet}_subnet.convs.{conv}'}.{_LEAVES[head_leaf]}"
            value = value if conv is not None else _ordered(value, 3, (2, 0, 1))
        else:
            place = f"top.p{top}" if top else f"lateral.c{stage}.0" if inner else f"output.p{stage}.0"
            name = f"backbone.{place}.{_LEAVES[leaf]}"
        converted[name] = value
    named = detectron2.convert_trunk(trunk)
    return converted | {f"backbone.bottom_up.{key}": value for key, value in named.items()}


def load_weights(network: RetinaNet, source: str | Path) -> None:
    """Fill `network` from a detector or from an ImageNet classifier.

    Of a detector, the last layer of the classes keeps its fresh weights where their number differs; everything else
    must match. Of a classifier, the trunk is filled.

    Args:
        network: any size.
        source: the name of published weights, a published file, or a checkpoint of ours.

    Raises:
        ZooError: the file is missing, or does not match.
    """
    state = read_source(source)
    if any(key.startswith(("head.", "retnet_")) for key in state):
        detectron2.fill_detector(network, convert_official(state), source, _CLASS_LAYERS)
        return
    detectron2.fill_trunk(network, state, source)
