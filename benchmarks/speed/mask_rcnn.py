"""Speed of Mask R-CNN: our training step and data pipeline beside detectron2's and torchvision's, at equal settings.

Everyone trains ResNet-50-FPN with the stem and the second stage frozen and frozen BatchNorm, on the same images with
the same objects: 256 anchors and 512 regions an image are sampled, from 2000 proposals a level and 1000 an image, and
RoIAlign takes as many samples as a bin covers cells. A step is whole: backbone, proposals, matching and sampling, both
stages' heads and losses, backward, SGD. Masks to train on are polygons, as published, where the code takes such, else
bit masks. All start from the same weights, so that they propose alike. detectron2 is a checkout (`--official`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import package_version
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import detection, detection_data
from zoo.detection.mask_rcnn import convert_official

RECIPE, LR = "mask_rcnn/train_coco", 1e-3
PACKAGES = ("fvcore", "pycocotools")


@dataclass(frozen=True)
class Size:
    """Images and samples; `depth` and `samples` are the recipe's, but in the harness's own test."""

    height: int
    width: int
    masks: bool = True
    depth: int = 50
    samples: int = 512
    anchors: int = 256

    @property
    def channels(self) -> int:
        return 256 if self.depth >= 50 else 64

    @property
    def options(self) -> dict[str, Any]:
        trunk = {"depth": self.depth, "channels": self.channels, "stride_in_1x1": False}
        own: dict[str, Any] = {f"model.resnet.{name}": value for name, value in trunk.items()}
        own |= {"model.roi.samples": self.samples, "model.rpn.samples": self.anchors, "model.init_from": None}
        return {**own, "model.optim.lr": LR, **({} if self.masks else {"model.mask": None})}

    @property
    def config(self) -> str:
        """detectron2's."""
        return f"COCO-{'InstanceSegmentation/mask' if self.masks else 'Detection/faster'}_rcnn_R_50_FPN_1x"


MODELS = {
    "mask_rcnn_r50_fpn": Size(320, 480),
    "faster_rcnn_r50_fpn": Size(320, 480, masks=False),
    "mask_rcnn_r50_fpn_800": Size(800, 1216),
    "tiny": Size(64, 96, depth=18, samples=32, anchors=32),  # for the harness's own test
}
DEFAULT_MODEL = "mask_rcnn_r50_fpn"


def _ours(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    return detection.ours(RECIPE, size, setting, start)


def official(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    checkout = setting.official
    assert checkout is not None
    config = detection.detectron2_config(checkout, size.config, setting.device)
    config.MODEL.RESNETS.DEPTH, config.MODEL.RESNETS.RES2_OUT_CHANNELS = size.depth, size.channels
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False  # as torchvision's
    config.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, config.MODEL.RPN.BATCH_SIZE_PER_IMAGE = size.samples, size.anchors
    config.SOLVER.BASE_LR = LR
    network = detection.detectron2(checkout, "detectron2.modeling").build_model(config)
    detection.same_weights(network, convert_official, start)
    targets = detection.objects(size.height, size.width, setting.batch, setting.device)
    about = "facebookresearch/detectron2 (its compiled module not built) with its own optimizer; polygons as masks"
    return detection.official(network, config, setting, targets, about, size.masks)


def torchvision_rcnn(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    """torchvision's, with the settings of the others."""
    samples = {"rpn_batch_size_per_image": size.anchors, "box_batch_size_per_image": size.samples}
    network = detection.torchvision_rcnn(size.depth, size.masks, start, **samples).to(setting.device)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, momentum=0.9, weight_decay=1e-4)
    targets = detection.objects(size.height, size.width, setting.batch, setting.device)
    about = "torchvision.models.detection without its transform, sampling_ratio 0; torch.optim.SGD; bit masks"
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
    size = MODELS[setting.model]
    further = detection.masks_of if size.masks else lambda *_: []
    return detection.region_work(RECIPE, size, setting, further)


def loaders(setting: Setting) -> contextlib.AbstractContextManager[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files and a COCO json to a training batch."""
    return detection_data.loaders(RECIPE, MODELS[DEFAULT_MODEL].config, setting)
