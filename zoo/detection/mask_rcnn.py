"""Mask R-CNN.

Kaiming He, Georgia Gkioxari, Piotr Dollár, Ross Girshick. ICCV 2017, arXiv 1703.06870.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from zoo.errors import ZooError, unknown
from zoo.nn.detection.backbone import FPN, FPNConfig, ResNetBackbone, ResNetConfig, Subsample
from zoo.nn.detection.rcnn import RCNN, configured
from zoo.nn.detection.roi_heads import (
    BoxHeadConfig,
    KeypointHeadConfig,
    MaskHeadConfig,
    PoolConfig,
    Res5RoIHeads,
    RoIConfig,
    RoIHeads,
)
from zoo.nn.detection.rpn import RPN, RPNConfig

Design = Literal["fpn", "dc5", "c4"]


class MaskRCNN(RCNN):
    """Faster R-CNN with a branch for masks (or keypoints) on top of a ResNet."""

    def __init__(
        self,
        num_classes: int = 80,
        design: Design = "fpn",
        resnet: ResNetConfig = ResNetConfig(),
        fpn: FPNConfig = FPNConfig(),
        rpn: RPNConfig = RPNConfig(),
        roi: RoIConfig = RoIConfig(),
        box: BoxHeadConfig = BoxHeadConfig(),
        mask: MaskHeadConfig | None = MaskHeadConfig(),
        keypoint: KeypointHeadConfig | None = None,
    ) -> None:
        if design not in get_args(Design):
            raise unknown("design", design, get_args(Design))
        trunk_outputs = {"fpn": fpn.inputs, "dc5": ("c5",), "c4": ("c4",)}[design]
        backbone: Any = ResNetBackbone(resnet, trunk_outputs)
        if design == "fpn":
            backbone = FPN(backbone, fpn, Subsample())
        levels = tuple(f"p{name[1:]}" for name in fpn.inputs) if design == "fpn" else trunk_outputs
        roi = dataclasses.replace(roi, levels=roi.levels or levels)
        rpn = dataclasses.replace(rpn, levels=rpn.levels or (tuple(backbone.channels) if design == "fpn" else levels))
        if design == "c4":
            heads: RoIHeads = Res5RoIHeads(resnet, backbone, num_classes, roi, box, mask)
        else:
            heads = RoIHeads(backbone, num_classes, roi, box, mask, keypoint)
        super().__init__(backbone, RPN(backbone, rpn), heads)


_PARTS = (
    (r"backbone\.bottom_up\.", "backbone.bottom_up."),
)


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    fpn = any(key.startswith("backbone.fpn_") for key in state_dict)
    for key, value in state_dict.items():
        converted[_our_name(key)] = value
    return converted


def _our_name(key: str) -> str:
    if match := re.fullmatch(r"(backbone(?:\.bottom_up)?|roi_heads)\.(.+)", key):
        prefix, rest = match.groups()
        if trunk := re.fullmatch(r"stem\.conv1\.(?:(norm)\.)?(\w+)", rest):
            return f"{prefix}.{'bn1' if trunk[1] else 'conv1'}.{trunk[2]}"
        if trunk := re.fullmatch(r"res([2-5])\.(\d+)\.(?:conv([123])|(shortcut))\.(?:(norm)\.)?(\w+)", rest):
            stage, block, conv, shortcut, norm, leaf = trunk.groups()
            root = f"{prefix}.res5" if prefix == "roi_heads" else f"{prefix}.layer{int(stage) - 1}"
            part = f"downsample.{int(bool(norm))}" if shortcut else f"{'bn' if norm else 'conv'}{conv}"
            return f"{root}.{block}.{part}.{leaf}"
    if match := re.fullmatch(r"backbone\.fpn_(lateral|output)(\d)\.(?:(norm)\.)?(\w+)", key):
        kind, level, norm, leaf = match.groups()
        return f"backbone.{kind}.{'c' if kind == 'lateral' else 'p'}{level}.{int(bool(norm))}.{leaf}"
    if match := re.fullmatch(r"proposal_generator\.rpn_head\.conv(?:\.conv(\d+))?\.(\w+)", key):
        return f"rpn.head.conv.{2 * int(match[1] or 0)}.{match[2]}"
    if match := re.fullmatch(r"proposal_generator\.rpn_head\.((?:objectness_logits|anchor_deltas)\.\w+)", key):
        return f"rpn.head.{match[1]}"
    if match := re.fullmatch(r"roi_heads\.(\w+_head(?:\.\d)?)\.(conv\d|mask_fcn\d)\.(?:(norm)\.)?(\w+)", key):
        head, layer, norm, leaf = match.groups()
        return f"roi_heads.{head}.{layer}.{int(bool(norm))}.{leaf}"
    return key
