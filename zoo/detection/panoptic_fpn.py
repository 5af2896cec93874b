"""Panoptic Feature Pyramid Networks.

Alexander Kirillov, Ross Girshick, Kaiming He, Piotr Dollár. CVPR 2019, arXiv 1901.02446.

One network for things and stuff: Mask R-CNN on a feature pyramid, and on the same pyramid a light semantic branch. From
each level p2..p5 it goes up to a quarter of the image's size by 3x3 convolutions and bilinear upsampling, adds the
levels up and classifies each pixel. Both are trained together; at the end a simple rule makes one map of masks and
pixels, in which every pixel belongs to one segment. The branch alone, Semantic FPN, segments as well as dilated
networks do, with less memory.

Conventions: things have labels 0..K-1; a pixel's semantic label is one of C, of which those in `combine.things` stand
for things (0 alone, or in Cityscapes the things' own labels), 255 for pixels that do not count (:mod:`zoo.data.
panoptic`). Segment ids count from 1 in a picture; 0 is no segment.

Where the parts are: the branch in :mod:`zoo.nn.detection.semantic`, all else of the network as in
:mod:`zoo.detection.mask_rcnn`; PQ in :mod:`zoo.metrics.panoptic`.

Deviations from detectron2's code, none of which changes a value beyond rounding: those of Mask R-CNN; the levels of the
semantic branch are added up before their last, common upsampling; the loss of a batch without a labelled pixel is 0; a
kind of stuff of which nothing is left makes no empty segment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.detection.mask_rcnn import MaskRCNN
from zoo.errors import ZooError
from zoo.metrics.panoptic import PanopticQuality
from zoo.metrics.semantic import SemanticIoU
from zoo.nn.detection import (
    FPN,
    FPNConfig,
    ResNetBackbone,
    ResNetConfig,
    SemanticHead,
    SemanticHeadConfig,
    configured,
)
from zoo.nn.detection.semantic import SemanticNetwork, file_logits, labels_of, resize_logits, sizes_of
from zoo.ops.boxes import permutation
from zoo.training import Optim
from zoo.training.detection import Detection
from zoo.training.segmentation import Segmentation
from zoo.weights import detectron2
from zoo.weights.detectron2 import convert_trunk as convert_trunk
from zoo.weights.pretrained import read_source

# ------------------------------------------------------------------------------------------------------- 1. functions


@dataclass(frozen=True)
class CombineConfig:
    """How masks and labels become one map; see :func:`combine`.

    Args:
        things: the semantic labels that stand for things.
        score: a mask of a lower score is left out.
        overlap: so is one of which a larger share belongs to others already.
        stuff_area: and a kind of stuff that is left with fewer pixels, in those of the output.
    """

    things: tuple[int, ...] = (0,)
    score: float = 0.5
    overlap: float = 0.5
    stuff_area: int = 4096


def combine(
    masks: Tensor, scores: Tensor, labels: Tensor, semantic: Tensor, config: CombineConfig
) -> dict[str, Tensor]:
    """Masks and semantic labels as segments that do not overlap (section 3.1, "Panoptic inference").

    The masks are laid down from the highest score on, each where nothing lies yet, unless too much of it is covered;
    then every kind of stuff takes what is left of its pixels.

    Args:
        masks: (N, H, W) bool; scores: (N,); labels: (N,) of things.
        semantic: (H, W) integers.
        config: thresholds.

    Returns:
        panoptic (H, W) int32, the segment of each pixel, 0 for none; segments (n, 4) int64: id, 1 for a thing, its
        label or the semantic label, pixels; segment_scores (n,), nan for stuff.
    """
    ids = torch.zeros(semantic.shape, dtype=torch.int32, device=semantic.device)
    areas = masks.flatten(1).sum(1).tolist()
    rows: list[tuple[int, int, int]] = []
    kept: list[int] = []
    for n in scores.argsort(descending=True, stable=True).tolist():
        if scores[n] < config.score:
            break
        if not areas[n]:
            continue
        free = masks[n] & (ids == 0)
        if (areas[n] - int(free.sum())) / areas[n] > config.overlap:
            continue
        rows.append((len(rows) + 1, 1, int(labels[n])))
        kept.append(n)
        ids[free] = len(rows)
    left = ids == 0
    counts = torch.bincount(semantic[left].flatten().long(), minlength=1)
    numbers = torch.zeros(max(len(counts), int(semantic.max()) + 1), dtype=torch.int32)
    for label, area in enumerate(counts.tolist()):
        if label not in config.things and area >= max(config.stuff_area, 1):
            rows.append((len(rows) + 1, 0, label))
            numbers[label] = len(rows)
    ids = torch.where(left, numbers.to(ids.device)[semantic.long()], ids)
    table = torch.tensor(rows, dtype=torch.int64, device=ids.device).view(-1, 3)
    sizes = torch.bincount(ids.flatten().long(), minlength=len(rows) + 1)[1:]
    found = torch.full((len(rows),), float("nan"), dtype=scores.dtype, device=ids.device)
    found[: len(kept)] = scores[kept].to(ids.device)
    return {"panoptic": ids, "segments": torch.cat([table, sizes[:, None]], 1), "segment_scores": found}


# --------------------------------------------------------------------------------------------------------- 2. networks


class PanopticFPN(MaskRCNN):
    """Mask R-CNN and a semantic branch on one pyramid.

    Args:
        semantic: the branch.
        combine: how the two become one map.
        instance_loss_weight: lambda_i, of the losses of the region heads (equation 1); those of the proposals have
            weights of their own (`rpn.loss_weight`).
        shared: one backbone and pyramid for both; else each has its own: two networks, trained side by side (Table 3a).
        detector: of :class:`~zoo.detection.mask_rcnn.MaskRCNN`, in its design `fpn` with masks.

    Raises:
        ZooError: another design, no masks, a semantic head that does not fit the pyramid.
    """

    def __init__(
        self,
        semantic: SemanticHeadConfig = SemanticHeadConfig(),  # noqa: B008
        combine: CombineConfig = CombineConfig(),
        instance_loss_weight: float = 1.0,
        shared: bool = True,
        **detector: Any,
    ) -> None:
        super().__init__(**detector)
        if self.design != "fpn" or self.roi_heads.mask_head is None:
            raise ZooError("Panoptic FPN wants the design fpn with masks")
        semantic, combine = configured(SemanticHeadConfig, semantic), configured(CombineConfig, combine)
        resnet, fpn = self.options["resnet"], self.options["fpn"]
        self.semantic_backbone = None if shared else FPN(ResNetBackbone(resnet, fpn.inputs), fpn)
        self.semantic_head = SemanticHead(self.semantic_backbone or self.backbone, semantic)
        self.combine, self.instance_loss_weight = combine, instance_loss_weight
        self.options |= {"semantic": semantic, "combine": combine}
        self.options |= {"instance_loss_weight": instance_loss_weight, "shared": shared}

    def forward(self, batch: Mapping[str, Any], noise: Tensor | None = None, **further: Any) -> Any:
        """Losses by name in training mode, else what :meth:`segment` gives.

        Args:
            batch: as of :class:`~zoo.nn.detection.rcnn.RCNN`; in training the targets hold `semantic` (h, w), too.
            noise: likewise.

        Raises:
            ZooError: training without such targets.
        """
        if not self.training:
            return self.segment(batch)
        labels, targets = labels_of(batch), batch["target"]
        maps = self.backbone(batch["image"])
        losses = {"loss_sem_seg": self.semantic_head.loss(self._semantic_logits(batch, maps), labels)}
        sizes, permute = [(height, width) for height, width in batch["size"].tolist()], permutation(noise)
        proposals, of_proposals = self.rpn(maps, sizes, targets, permute)
        of_regions = self.roi_heads.losses(maps, proposals, sizes, targets, permute, **further)
        return losses | of_proposals | {key: value * self.instance_loss_weight for key, value in of_regions.items()}

    def _semantic_logits(self, batch: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        return self.semantic_head(maps if self.semantic_backbone is None else self.semantic_backbone(batch["image"]))

    def raw(self, batch: Mapping[str, Any]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Detections in the pixels of the network's input, and semantic logits (B, C, H / 4, W / 4)."""
        maps, proposals = self.propose(batch)
        sizes = [(height, width) for height, width in batch["size"].tolist()]
        return self.roi_heads.detect(maps, proposals, sizes), self._semantic_logits(batch, maps)

    def segment(self, batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Of each picture in its file's pixels: what a detector finds (boxes, scores, labels, masks), `semantic` (H, W)
        uint8, and panoptic, segments and segment_scores of :func:`combine`."""
        detections, logits = self.raw(batch)
        found = []
        for detection, some, (size, original) in zip(detections, logits.split(1), sizes_of(batch), strict=True):
            result = self.postprocess(detection, size, original)
            labels = resize_logits(self.semantic_head.upsampled(some)[0], size, original).argmax(dim=0)
            merged = combine(result["masks"], result["scores"], result["labels"], labels, self.combine)
            found.append({**result, "semantic": labels.to(torch.uint8), **merged})
        return found


class SemanticFPN(SemanticNetwork):
    """The semantic branch alone on a pyramid (section 4.1).

    Args:
        resnet: the trunk.
        fpn: the pyramid.
        semantic: the branch.
    """

    def __init__(
        self,
        resnet: ResNetConfig = ResNetConfig(),  # noqa: B008
        fpn: FPNConfig = FPNConfig(),  # noqa: B008
        semantic: SemanticHeadConfig = SemanticHeadConfig(loss_weight=1.0),  # noqa: B008
    ) -> None:
        super().__init__()
        resnet, fpn = configured(ResNetConfig, resnet), configured(FPNConfig, fpn)
        semantic = configured(SemanticHeadConfig, semantic)
        self.backbone = FPN(ResNetBackbone(resnet, fpn.inputs), fpn)
        self.semantic_head = SemanticHead(self.backbone, semantic)
        self.options: dict[str, Any] = {"resnet": resnet, "fpn": fpn, "semantic": semantic}

    def losses(self, batch: Mapping[str, Any], **further: Any) -> dict[str, Tensor]:
        """{"loss_sem_seg"}."""
        labels = labels_of(batch)
        return {"loss_sem_seg": self.semantic_head.loss(self.semantic_head(self.backbone(batch["image"])), labels)}

    def logits(self, batch: Mapping[str, Any]) -> Iterator[Tensor]:
        logits = self.semantic_head(self.backbone(batch["image"])).split(1)
        return file_logits((self.semantic_head.upsampled(x)[0] for x in logits), batch)  # one by one: they are large


# ------------------------------------------------------------------------------------------------------------ 3. tasks

_SGD = Optim(name="sgd", base_lr=0.02, reference_batch=16, weight_decay=1e-4, no_decay="norm", schedule="step")


class PanopticSegmentation(Detection):
    """Training and evaluation of a :class:`PanopticFPN`.

    Logs what :class:`~zoo.training.detection.Detection` does, `{val,test}/panoptic/PQ` with SQ and RQ, likewise `_th`
    of things and `_st` of stuff, and `{val,test}/semantic/mIoU` with fIoU, mACC and pACC.

    Args:
        init_from: where :meth:`setup` takes weights from: the name of published weights, a file, or a checkpoint. Of a
            classifier the trunk is filled; of a detector, with a semantic branch or without, all that is there, layers
            of another number of classes excepted.
        clip_each: bound of the norm of each parameter's own gradient; null for none.
        optim: optimiser and schedule.
        network: of :class:`PanopticFPN`.
    """

    monitor = ("val/panoptic/PQ", "max")
    network: PanopticFPN

    def __init__(
        self, init_from: str | None = None, clip_each: float | None = None, optim: Optim = _SGD, **network: Any
    ) -> None:
        made = PanopticFPN(**network)
        super().__init__(made, optim, made.iou_types, None, clip_each, init_from)
        things, classes = made.num_classes, made.semantic_head.config.classes
        self.val_panoptic, self.test_panoptic = (PanopticQuality(things, classes) for _ in range(2))
        self.val_semantic, self.test_semantic = (SemanticIoU(classes) for _ in range(2))
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        load_weights(self.network, source)

    def _more(self, split: str) -> dict[str, Any]:
        return {name: getattr(self, f"{split}_{name}") for name in ("panoptic", "semantic")}

    def _evaluate(self, batch: Mapping[str, Any], metric: Any) -> dict[str, Any]:
        found = super()._evaluate(batch, metric)
        seen, more = found["detections"], self._more("val" if metric is self.val_metric else "test")
        if any("panoptic" not in target for target in batch["target"]):
            raise ZooError("the data have no panoptic truth: set data.semantic")
        more["panoptic"].update(seen, batch["target"])
        more["semantic"].update([one["semantic"] for one in seen], [one["semantic"] for one in batch["target"]])
        return found

    def _report(self, metric: Any, split: str) -> None:
        super()._report(metric, split)
        for kind, other in self._more(split).items():
            for name, value in other.compute().items():
                self.log(f"{split}/{kind}/{name}", value, prog_bar=split == "val" and name == "PQ")
            other.reset()


class SemanticSegmentation(Segmentation):
    """Training and evaluation of a :class:`SemanticFPN`. Logs `train/loss_sem_seg`, and what
    :class:`~zoo.training.segmentation.Segmentation` does.

    Args:
        init_from: as of :class:`PanopticSegmentation`.
        optim: optimiser and schedule.
        network: of :class:`SemanticFPN`.
    """

    network: SemanticFPN

    def __init__(self, init_from: str | None = None, optim: Optim = _SGD, **network: Any) -> None:
        made = SemanticFPN(**network)
        super().__init__(made, made.semantic_head.config.classes, optim, init_from)
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        load_weights(self.network, source)


# ----------------------------------------------------------------------------------------------------------- 4. models

_DEMO: dict[str, Any] = {
    "resnet": {"norm": "gn", "stride_in_1x1": False, "deform": (False, True, True, True)},
    "fpn": {"norm": "gn"},
    "rpn": {"post_nms": (2000, 1000)},
    "box": {
        "class_agnostic": True,
        "cascade_ious": (0.5, 0.6, 0.7),
        "cascade_weights": ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
    },
    "mask": {"norm": "gn"},
}


def _build(depth: int, design: Mapping[str, Any], overrides: Mapping[str, Any]) -> PanopticFPN:
    options: dict[str, Any] = {"resnet": {"depth": depth}}
    for given in (design, overrides):
        for name, value in given.items():
            both = isinstance(value, Mapping) and isinstance(options.get(name), Mapping)
            options[name] = {**options[name], **value} if both else value
    return PanopticFPN(**options)


def panoptic_fpn_r50(**overrides: Any) -> PanopticFPN:
    """Panoptic FPN, ResNet-50."""
    return _build(50, {}, overrides)


def panoptic_fpn_r101(**overrides: Any) -> PanopticFPN:
    """Panoptic FPN, ResNet-101."""
    return _build(101, {}, overrides)


def panoptic_fpn_r101_dconv_cascade_gn(**overrides: Any) -> PanopticFPN:
    """Panoptic FPN, ResNet-101 with deformable convolutions, a cascade of box heads and GroupNorm: detectron2's
    demonstration."""
    return _build(101, _DEMO, overrides)


def semantic_fpn_r50(**overrides: Any) -> SemanticFPN:
    """Semantic FPN, ResNet-50."""
    return SemanticFPN(**{"resnet": {"depth": 50}, **overrides})


def semantic_fpn_r101(**overrides: Any) -> SemanticFPN:
    """Semantic FPN, ResNet-101."""
    return SemanticFPN(**{"resnet": {"depth": 101}, **overrides})


def semantic_fpn_x101_32x8d(**overrides: Any) -> SemanticFPN:
    """Semantic FPN, ResNeXt-101-32x8d."""
    trunk = {"depth": 101, "groups": 32, "width_per_group": 8, "stride_in_1x1": False}
    return SemanticFPN(**{"resnet": trunk, **overrides})


# ------------------------------------------------------------------------------------------------- 5. official weights

_OURS = re.compile(r"(?:backbone|rpn\.head|roi_heads|semantic_backbone|semantic_head)\..+")
_CLASS_LAYERS = re.compile(
    r"(?:roi_heads\.(?:box_predictors\.\d\.\w+|mask_head\.predictor)|semantic_head\.predictor)\.(?:weight|bias)"
)
_RULES = (detectron2.backbone_name, detectron2.rpn_name, detectron2.roi_name, detectron2.semantic_name)


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Panoptic FPN of detectron2's model zoo in our names. Our own names are left as they are.

    Early files also hold the pixels' mean and deviation and the anchors; they are compared with what the published
    networks take, and left out.

    Raises:
        ZooError: a key of no such network, or a mean or anchors that are not those of the published networks.
    """
    if any(key.startswith(("rpn.head.", "semantic_head.")) for key in state_dict):
        return detectron2.ours(state_dict, _OURS)
    return detectron2.rename(state_dict, _RULES, "detectron2's Panoptic FPN")


def load_weights(network: PanopticFPN | SemanticFPN, source: str | Path) -> None:
    """Fill `network` from another Panoptic FPN, from a Mask R-CNN, which leaves the semantic branch fresh, or from an
    ImageNet classifier, which fills the trunk, of two networks both.

    Args:
        network: any size.
        source: the name of published weights, a published file, or a checkpoint of ours.

    Raises:
        ZooError: the file is missing, or does not match.
    """
    state = read_source(source)
    signs = ("rpn.head.", "proposal_generator.", "semantic_head.", "sem_seg_head.")
    if any(key.startswith(signs) for key in state):
        converted, own = convert_official(state), network.state_dict()
        whole = {part for part in ("rpn", "roi_heads", "semantic_head") if f"{part}." in _parts(own)}
        lacking = {part for part in whole if f"{part}." not in _parts(converted)}
        converted = {key: value for key, value in converted.items() if f"{key.split('.')[0]}." in _parts(own)}
        fresh = {key: value for key, value in own.items() if key.split(".")[0] in lacking}
        detectron2.fill_detector(network, {**fresh, **converted}, source, _CLASS_LAYERS)
        return
    for prefix in ("backbone.bottom_up.", "semantic_backbone.bottom_up."):
        own = {key: value for key, value in network.state_dict().items() if key.startswith(prefix)}
        # A classifier has no offsets of deformable convolutions: these stay as they are.
        offsets = {key.removeprefix(prefix): value for key, value in own.items() if ".conv2_offset." in key}
        if own:
            detectron2.fill_trunk(network, {**state, **offsets}, source, prefix)


def _parts(state: Mapping[str, Tensor]) -> set[str]:
    return {f"{key.split('.')[0]}." for key in state}
