"""Speed of training from scratch: our step of Mask R-CNN with GroupNorm beside detectron2's and torchvision's.

Everyone trains ResNet-50-FPN from random weights with nothing frozen, GroupNorm in trunk, pyramid, box head (four
convolutions) and mask head, on the same images with the same objects: 256 anchors and 512 regions an image are sampled,
from 2000 proposals a level and 1000 an image, and RoIAlign takes as many samples as a bin covers cells. A step is
whole: backbone, proposals, matching and sampling, both stages' heads and losses, backward, SGD. Masks to train on are
polygons, as published, where the code takes such, else bit masks. detectron2 is a checkout (`--official`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import package_version
from benchmarks.speed.harness import Setting, Trainer, Work
from benchmarks.speed.shared import detection
from zoo.detection.rethinking_pretraining import convert_official

RECIPE, LR = "rethinking_pretraining/train_coco", 1e-3
CONFIG = "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn"
PACKAGES = ("fvcore", "pycocotools")


@dataclass(frozen=True)
class Size:
    """Images and samples; `depth` and `samples` are the recipe's, but in the harness's own test."""

    height: int
    width: int
    depth: int = 50
    samples: int = 512
    anchors: int = 256

    @property
    def options(self) -> dict[str, Any]:
        trunk = {"depth": self.depth, "channels": 256 if self.depth >= 50 else 64}
        own: dict[str, Any] = {f"model.resnet.{name}": value for name, value in trunk.items()}
        return {**own, "model.roi.samples": self.samples, "model.rpn.samples": self.anchors, "model.optim.lr": LR}


MODELS = {
    "mask_rcnn_r50_fpn_gn": Size(320, 480),
    "mask_rcnn_r50_fpn_gn_few": Size(192, 288, samples=64),  # regions an image; for a machine with little time
    "tiny": Size(64, 96, depth=18, samples=32, anchors=32),  # for the harness's own test
}
DEFAULT_MODEL = "mask_rcnn_r50_fpn_gn"


def _ours(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    return detection.ours(RECIPE, size, setting, start)


def official(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    checkout = setting.official
    assert checkout is not None
    config = detection.detectron2_config(checkout, CONFIG, setting.device)
    config.MODEL.RESNETS.DEPTH = size.depth
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = size.options["model.resnet.channels"]
    config.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, config.MODEL.RPN.BATCH_SIZE_PER_IMAGE = size.samples, size.anchors
    config.SOLVER.BASE_LR = LR
    network = detection.detectron2(checkout, "detectron2.modeling").build_model(config)
    detection.same_weights(network, convert_official, start)
    targets = detection.objects(size.height, size.width, setting.batch, setting.device)
    about = "facebookresearch/detectron2 (its compiled module not built) with its own optimizer; polygons as masks"
    return detection.official(network, config, setting, targets, about, True)


def torchvision_rcnn(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    """torchvision's with the heads of its second version, and the settings of the others."""
    samples = {"rpn_batch_size_per_image": size.anchors, "box_batch_size_per_image": size.samples}
    norm = partial(nn.GroupNorm, 32)
    network = detection.torchvision_rcnn(size.depth, True, start, norm, **samples).to(setting.device)
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, weight_decay=1e-4)
    targets = detection.objects(size.height, size.width, setting.batch, setting.device)
    about = (
        "torchvision.models.detection without its transform: heads of version 2 with GroupNorm, sampling_ratio 0;"
        " torch.optim.SGD; bit masks"
    )
    loss = detection.torchvision_loss(network, targets)
    return Trainer("torchvision", package_version("torchvision") or "", loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. detectron2 is left out where its checkout is not given."""
    size = MODELS[setting.model]
    contenders = [_ours, *([official] if setting.official is not None else []), torchvision_rcnn]
    return [build(size, setting, detection.start(RECIPE, size)) for build in contenders]


def images(setting: Setting) -> Tensor:
    """Noise (B,3,H,W)."""
    return detection.images(MODELS[setting.model], setting)


def work(setting: Setting) -> Work:
    """Measured FLOPs of the convolutions and linear layers, with a quarter of the regions under the mask head."""
    return detection.region_work(RECIPE, MODELS[setting.model], setting, detection.masks_of)
