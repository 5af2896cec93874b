"""Mask R-CNN.

Kaiming He, Georgia Gkioxari, Piotr Dollár, Ross Girshick. ICCV 2017, arXiv 1703.06870.

Faster R-CNN finds boxes and their classes; a small convolutional branch, in parallel, predicts a binary mask of each
region for every class. Two ideas carry it. RoIAlign samples a region's features bilinearly where they are, without the
rounding of RoIPool, and masks are decoupled from classes: each class has its own sigmoid map, and the box branch alone
decides which one counts. The same frame predicts keypoints as one-hot masks, and without the branch it is Faster R-CNN.

Conventions: boxes (x1, y1, x2, y2) in continuous pixels; K classes 0..K-1, the background is K; maps c2..c5 of the
ResNet and p2..p6 of the pyramid, of stride 4 to 64. Numerics and training are detectron2's, whose published weights
load and give the published boxes; where they differ from the paper, the card's ledger says so.

Where the parts are: RoIAlign (RoIPooler), the heads and their losses in :mod:`zoo.nn.detection.roi_heads`, proposals in
:mod:`zoo.nn.detection.rpn`, backbones in :mod:`zoo.nn.detection.backbone`.

Deviations from detectron2's code, none of which changes a value beyond rounding:
- Frozen BatchNorm is folded into the convolution before it, in training too.
- Only the best proposals of a level are decoded, and deltas are encoded for the sampled positives alone.
- Mask targets are cropped from each object's mask without a copy for every region.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.nn.detection import (
    FPN,
    RCNN,
    RPN,
    BoxHeadConfig,
    FPNConfig,
    KeypointHeadConfig,
    MaskHeadConfig,
    Res5RoIHeads,
    ResNetBackbone,
    ResNetConfig,
    RoIConfig,
    RoIHeads,
    RPNConfig,
    Subsample,
    configured,
)
from zoo.training import Optim
from zoo.training.detection import Detection, MetricName
from zoo.training.tta import TTA
from zoo.weights import detectron2
from zoo.weights.detectron2 import convert_trunk as convert_trunk
from zoo.weights.pretrained import read_source

Design = Literal["fpn", "dc5", "c4"]

# --------------------------------------------------------------------------------------------------------- 1. network


class MaskRCNN(RCNN):
    """A ResNet, a region proposal network and heads for boxes and masks (or keypoints, or neither).

    As it stands Mask R-CNN R50-FPN. Every part is a config; in Python a mapping of its fields will do.

    Args:
        num_classes: K, without the background.
        design: `fpn`, heads on a pyramid (figure 4, right); `c4`, the fifth stage as the head of each region (figure 4,
            left); `dc5`, heads on a fifth stage that is dilated instead of strided. The published `c4` and `dc5` have
            five anchor sizes on one level and more proposals (`rpn`), those of `c4` regions of 14 cells (`box.pool`).
        resnet: the trunk.
        fpn: the pyramid of the design `fpn`.
        rpn: proposals.
        roi: samples, and what is reported.
        box: the box head; with `cascade_ious` a cascade of them. In `c4` its convolutions and layers are not there.
        mask, keypoint: the other heads; null for none.

    Attributes:
        options: all of these, as they came to be.

    Raises:
        ZooError: an unknown design, option or name, or parts that do not go together.
    """

    def __init__(
        self,
        num_classes: int = 80,
        design: Design = "fpn",
        resnet: ResNetConfig = ResNetConfig(),  # noqa: B008
        fpn: FPNConfig = FPNConfig(),  # noqa: B008
        rpn: RPNConfig = RPNConfig(),  # noqa: B008
        roi: RoIConfig = RoIConfig(),  # noqa: B008
        box: BoxHeadConfig = BoxHeadConfig(),  # noqa: B008
        mask: MaskHeadConfig | None = MaskHeadConfig(),  # noqa: B008
        keypoint: KeypointHeadConfig | None = None,
    ) -> None:
        if design not in get_args(Design):
            raise unknown("design", design, get_args(Design))
        resnet, fpn = configured(ResNetConfig, resnet), configured(FPNConfig, fpn)
        rpn, roi, box = configured(RPNConfig, rpn), configured(RoIConfig, roi), configured(BoxHeadConfig, box)
        mask = None if mask is None else configured(MaskHeadConfig, mask)
        keypoint = None if keypoint is None else configured(KeypointHeadConfig, keypoint)
        if design == "dc5":
            resnet = dataclasses.replace(resnet, dilation=2)
        trunk = ResNetBackbone(resnet, {"fpn": fpn.inputs, "dc5": ("c5",), "c4": ("c4",)}[design])
        backbone: Any = FPN(trunk, fpn, Subsample()) if design == "fpn" else trunk
        pooled = tuple(f"p{name[1:]}" for name in fpn.inputs) if design == "fpn" else trunk.outputs
        rpn = dataclasses.replace(rpn, levels=rpn.levels or (tuple(backbone.channels) if design == "fpn" else pooled))
        roi = dataclasses.replace(roi, levels=roi.levels or pooled)
        if design == "c4":
            if keypoint is not None:
                raise ZooError("the design c4 has no keypoint head; take fpn")
            heads: RoIHeads = Res5RoIHeads(resnet, backbone, num_classes, roi, box, mask)
        else:
            heads = RoIHeads(backbone, num_classes, roi, box, mask, keypoint)
        super().__init__(backbone, RPN(backbone, rpn), heads)
        self.num_classes, self.design = num_classes, design
        parts = {"resnet": resnet, "fpn": fpn, "rpn": rpn, "roi": roi, "box": box, "mask": mask, "keypoint": keypoint}
        self.options: dict[str, Any] = {"num_classes": num_classes, "design": design, **parts}

    @property
    def size_divisibility(self) -> int:
        """What the sides of a padded batch must be multiples of."""
        backbone: Any = self.backbone
        return max(backbone.bottom_up.strides.values()) if self.design == "fpn" else 1

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What COCO measures of it: "bbox", and "segm" or "keypoints"."""
        heads = (("segm", self.roi_heads.mask_head), ("keypoints", self.roi_heads.keypoint_head))
        return ("bbox", *(name for name, head in heads if head is not None))


# ------------------------------------------------------------------------------------------------------------ 2. task


class MaskRCNNDetection(Detection):
    """Training and evaluation of a :class:`MaskRCNN`.

    Args:
        init_from: where :meth:`setup` takes weights from: the name of published weights, a file, or a checkpoint. Of a
            classifier the trunk is filled; of a detector everything but layers of another number of classes. A trunk in
            torchvision's layout wants `resnet.stride_in_1x1` false, and RGB pixels.
        oks_sigmas: of the keypoints, as in COCO's OKS; null for COCO's 17.
        clip_each: bound of the norm of each parameter's own gradient; null for none.
        metric: whose average precision is evaluated: `coco`, or `lvis` with what it says of each picture.
        tta: views of an image that are merged in evaluation; null for the image as it is.
        optim: optimiser and schedule.
        network: of :class:`MaskRCNN`.
    """

    network: MaskRCNN

    def __init__(
        self,
        init_from: str | None = None,
        oks_sigmas: list[float] | None = None,
        clip_each: float | None = None,
        metric: MetricName = "coco",
        tta: TTA | None = None,
        optim: Optim = Optim(  # noqa: B008
            name="sgd", base_lr=0.02, reference_batch=16, weight_decay=1e-4, no_decay="norm", schedule="step"
        ),
        **network: Any,
    ) -> None:
        detector = MaskRCNN(**network)
        super().__init__(detector, optim, detector.iou_types, oks_sigmas, clip_each, init_from, metric, tta)
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        load_weights(self.network, source)


# ---------------------------------------------------------------------------------------------------------- 3. models

_MSRA: dict[str, Any] = {"stride_in_1x1": True}
_R50, _R101 = {"depth": 50, **_MSRA}, {"depth": 101, **_MSRA}
_X101 = {"depth": 101, "groups": 32, "width_per_group": 8, "stride_in_1x1": False}
_ONE_LEVEL: dict[str, Any] = {
    "sizes": ((32, 64, 128, 256, 512),),
    "pre_nms": (12000, 6000),
    "post_nms": (2000, 1000),
}
_C4: dict[str, Any] = {"design": "c4", "rpn": _ONE_LEVEL, "box": {"pool": {"size": 14}}, "mask": {"convs": 0}}
_DC5: dict[str, Any] = {"design": "dc5", "rpn": _ONE_LEVEL}
# More proposals, and a softer box loss (detectron2's Base-Keypoint-RCNN-FPN).
_PERSON: dict[str, Any] = {
    "num_classes": 1,
    "rpn": {"post_nms": (1500, 1000)},
    "box": {"beta": 0.5},
    "mask": None,
    "keypoint": {},
}
_CASCADE: dict[str, Any] = {
    "rpn": {"post_nms": (2000, 1000)},
    "box": {
        "class_agnostic": True,
        "cascade_ious": (0.5, 0.6, 0.7),
        "cascade_weights": ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
    },
}


# Networks that are normalised everywhere have four convolutions in the box head.
_GN: dict[str, Any] = {
    "fpn": {"norm": "gn"},
    "box": {"convs": 4, "fcs": 1, "norm": "gn"},
    "mask": {"norm": "gn"},
}
_LSJ: dict[str, Any] = {
    "fpn": {"norm": "bn"},
    "rpn": {"conv_channels": (-1, -1)},
    "box": {"convs": 4, "fcs": 1, "norm": "bn"},
    "mask": {"norm": "bn"},
}


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `more`, mappings in mappings included."""
    merged = dict(base)
    for name, value in more.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _build(resnet: Mapping[str, Any], design: Mapping[str, Any], overrides: Mapping[str, Any]) -> MaskRCNN:
    return MaskRCNN(**_merged(_merged({"resnet": resnet}, design), overrides))


def faster_rcnn_r50_c4(**overrides: Any) -> MaskRCNN:
    """Faster R-CNN, ResNet-50, the fifth stage as the head."""
    return _build(_R50, {**_C4, "mask": None}, overrides)


def faster_rcnn_r50_dc5(**overrides: Any) -> MaskRCNN:
    """Faster R-CNN, ResNet-50 with a dilated fifth stage."""
    return _build(_R50, {**_DC5, "mask": None}, overrides)


def faster_rcnn_r50_fpn(**overrides: Any) -> MaskRCNN:
    """Faster R-CNN, ResNet-50-FPN."""
    return _build(_R50, {"mask": None}, overrides)


def faster_rcnn_r101_c4(**overrides: Any) -> MaskRCNN:
    """Faster R-CNN, ResNet-101, the fifth stage as the head."""
    return _build(_R101, {**_C4, "mask": None}, overrides)


def faster_rcnn_r101_dc5(**overrides: Any) -> MaskRCNN:
    """Faster R-CNN, ResNet-101 with a dilated fifth stage."""
    return _build(_R101, {**_DC5, "mask": None}, overrides)


def faster_rcnn_r101_fpn(**overrides: Any) -> MaskRCNN:
    """Faster R-CNN, ResNet-101-FPN."""
    return _build(_R101, {"mask": None}, overrides)


def faster_rcnn_x101_32x8d_fpn(**overrides: Any) -> MaskRCNN:
    """Faster R-CNN, ResNeXt-101-32x8d-FPN."""
    return _build(_X101, {"mask": None}, overrides)


def mask_rcnn_r50_c4(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-50, the fifth stage as the head."""
    return _build(_R50, _C4, overrides)


def mask_rcnn_r50_dc5(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-50 with a dilated fifth stage."""
    return _build(_R50, _DC5, overrides)


def mask_rcnn_r50_fpn(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-50-FPN."""
    return _build(_R50, {}, overrides)


def mask_rcnn_r101_c4(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-101, the fifth stage as the head."""
    return _build(_R101, _C4, overrides)


def mask_rcnn_r101_dc5(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-101 with a dilated fifth stage."""
    return _build(_R101, _DC5, overrides)


def mask_rcnn_r101_fpn(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-101-FPN."""
    return _build(_R101, {}, overrides)


def mask_rcnn_x101_32x8d_fpn(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNeXt-101-32x8d-FPN."""
    return _build(_X101, {}, overrides)


def mask_rcnn_r50_fpn_gn(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-50-FPN with GroupNorm everywhere and a box head of four convolutions."""
    return _build({"depth": 50, "norm": "gn", "stride_in_1x1": False}, _GN, overrides)


def mask_rcnn_r50_fpn_lsj(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-50-FPN with BatchNorm everywhere: the baselines of large-scale jitter."""
    return _build({**_R50, "norm": "bn", "freeze": 0}, _LSJ, overrides)


def mask_rcnn_r101_fpn_lsj(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-101-FPN with BatchNorm everywhere: the baselines of large-scale jitter."""
    return _build({**_R101, "norm": "bn", "freeze": 0}, _LSJ, overrides)


def cascade_mask_rcnn_r50_fpn(**overrides: Any) -> MaskRCNN:
    """Cascade Mask R-CNN with three stages, ResNet-50-FPN."""
    return _build(_R50, _CASCADE, overrides)


def keypoint_rcnn_r50_fpn(**overrides: Any) -> MaskRCNN:
    """Keypoint R-CNN, ResNet-50-FPN: 17 keypoints of persons."""
    return _build(_R50, _PERSON, overrides)


def keypoint_rcnn_r101_fpn(**overrides: Any) -> MaskRCNN:
    """Keypoint R-CNN, ResNet-101-FPN: 17 keypoints of persons."""
    return _build(_R101, _PERSON, overrides)


def keypoint_rcnn_x101_32x8d_fpn(**overrides: Any) -> MaskRCNN:
    """Keypoint R-CNN, ResNeXt-101-32x8d-FPN: 17 keypoints of persons."""
    return _build(_X101, _PERSON, overrides)


def resnet50_msra_trunk(**overrides: Any) -> ResNetBackbone:
    """The ResNet-50 trunk (stride in the 1x1 convolutions, frozen BatchNorm) that detectors start from."""
    return ResNetBackbone(configured(ResNetConfig, {**_R50, **overrides}))


def resnet101_msra_trunk(**overrides: Any) -> ResNetBackbone:
    """The ResNet-101 trunk (stride in the 1x1 convolutions, frozen BatchNorm) that detectors start from."""
    return ResNetBackbone(configured(ResNetConfig, {**_R101, **overrides}))


def resnet50_gn_trunk(**overrides: Any) -> ResNetBackbone:
    """The ResNet-50 trunk with GroupNorm that detectors with GroupNorm start from."""
    return ResNetBackbone(configured(ResNetConfig, {"norm": "gn", "stride_in_1x1": False, **overrides}))


def resnext101_32x8d_trunk(**overrides: Any) -> ResNetBackbone:
    """The ResNeXt-101-32x8d trunk (frozen BatchNorm) that detectors start from."""
    return ResNetBackbone(configured(ResNetConfig, {**_X101, **overrides}))


# ------------------------------------------------------------------------------------------------ 4. official weights

_OURS = re.compile(r"(?:backbone|rpn\.head|roi_heads)\..+")
_CLASS_LAYERS = re.compile(r"roi_heads\.(?:box_predictors\.\d\.\w+|mask_head\.predictor)\.(?:weight|bias)")
_RULES = (detectron2.backbone_name, detectron2.rpn_name, detectron2.roi_name)


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detector of detectron2's model zoo in our names. Our own names are left as they are.

    Early files also hold the pixels' mean and deviation and the anchors; they are compared with what the published
    networks take, and left out.

    Raises:
        ZooError: a key of no such detector, or a mean or anchors that are not those of the published networks.
    """
    if any(key.startswith("rpn.head.") for key in state_dict):
        return detectron2.ours(state_dict, _OURS)
    return detectron2.rename(state_dict, _RULES, "detectron2's R-CNNs")


def load_weights(network: MaskRCNN, source: str | Path) -> None:
    """Fill `network` from a detector or from an ImageNet classifier.

    Of a detector, the last layers keep their fresh weights where the number of classes differs; everything else must
    match. Of a classifier, the trunk is filled, and in a C4 network the stage that is its head.

    Args:
        network: any size.
        source: the name of published weights, a published file, or a checkpoint of ours.

    Raises:
        ZooError: the file is missing, or does not match.
    """
    state = read_source(source)
    if any(key.startswith(("rpn.head.", "proposal_generator.")) for key in state):
        detectron2.fill_detector(network, convert_official(state), source, _CLASS_LAYERS)
        return
    prefix = "backbone.bottom_up." if network.design == "fpn" else "backbone."
    detectron2.fill_trunk(network, state, source, prefix, "roi_heads.res5." if network.design == "c4" else None)
