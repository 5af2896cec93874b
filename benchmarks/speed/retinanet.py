"""Speed of RetinaNet: our training step and data pipeline beside detectron2's and torchvision's, at equal settings.

Everyone trains ResNet-50-FPN with the stem and the second stage frozen and frozen BatchNorm, on the same images with
the same objects. A step is whole: backbone, subnets over five levels, matching of all anchors, focal loss on each of
them, box loss, backward, SGD. torchvision's has anchors of whole pixels and p6 of p5, which makes it the smaller
network; of our weights it takes the trunk's, detectron2 all. detectron2 is a checkout (`--official`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import detection, detection_data
from zoo.detection.retinanet import convert_official

RECIPE, LR = "retinanet/train_coco", 1e-3
PACKAGES = ("fvcore", "pycocotools")
CONFIG = "COCO-Detection/retinanet_R_50_FPN_1x"


@dataclass(frozen=True)
class Size:
    """Images; `depth` is the recipe's, but in the harness's own test."""

    height: int
    width: int
    depth: int = 50

    @property
    def channels(self) -> int:
        return 256 if self.depth >= 50 else 64

    @property
    def options(self) -> dict[str, Any]:
        trunk = {"depth": self.depth, "channels": self.channels, "stride_in_1x1": False}
        own: dict[str, Any] = {f"model.resnet.{name}": value for name, value in trunk.items()}
        return {**own, "model.init_from": None, "model.optim.lr": LR}


MODELS = {
    "retinanet_r50_fpn": Size(320, 480),
    "retinanet_r50_fpn_800": Size(800, 1216),
    "tiny": Size(64, 96, depth=18),  # for the harness's own test
}
DEFAULT_MODEL = "retinanet_r50_fpn"


def _ours(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    return detection.ours(RECIPE, size, setting, start)


def official(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    checkout = setting.official
    assert checkout is not None
    config = detection.detectron2_config(checkout, CONFIG, setting.device)
    config.MODEL.RESNETS.DEPTH, config.MODEL.RESNETS.RES2_OUT_CHANNELS = size.depth, size.channels
    config.MODEL.RESNETS.STRIDE_IN_1X1, config.SOLVER.BASE_LR = False, LR  # the stride as torchvision's
    network = detection.detectron2(checkout, "detectron2.modeling").build_model(config)
    detection.same_weights(network, convert_official, start)
    targets = detection.objects(size.height, size.width, setting.batch, setting.device)
    about = "facebookresearch/detectron2 (its compiled module not built) with its own optimizer"
    return detection.official(network, config, setting, targets, about, False)


def torchvision_retinanet(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    """torchvision's, version 1; its trunk starts from ours."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.retinanet import LastLevelP6P7

    above: Any = LastLevelP6P7(256, 256)
    options = {"trainable_layers": 3, "returned_layers": [2, 3, 4], "extra_blocks": above}
    backbone = resnet_fpn_backbone(backbone_name=f"resnet{size.depth}", weights=None, **options)
    sides = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    made = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 5)
    network: Any = RetinaNet(backbone, 80, anchor_generator=made).train().to(setting.device)
    own = {key.replace("backbone.bottom_up.", "backbone.body."): value for key, value in start.items()}
    for key, value in network.state_dict().items():
        if key in own:
            value.copy_(own[key])
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, momentum=0.9, weight_decay=1e-4)
    targets = detection.objects(size.height, size.width, setting.batch, setting.device)
    known = [{"boxes": one["boxes"], "labels": one["labels"]} for one in targets]

    def loss(images: Tensor) -> Tensor:
        features = list(network.backbone(images).values())
        outputs = network.head(features)
        anchors = network.anchor_generator(ImageList(images, [tuple(images.shape[-2:])] * len(images)), features)
        return torch.stack(list(network.compute_loss(known, outputs, anchors).values())).sum()

    about = "torchvision.models.detection.RetinaNet (version 1) without its transform; torch.optim.SGD"
    return Trainer("torchvision", package_version("torchvision") or "", loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. detectron2 is left out where its checkout is not given."""
    size = MODELS[setting.model]
    contenders = [_ours, *([official] if setting.official is not None else []), torchvision_retinanet]
    return [build(size, setting, detection.start(RECIPE, size)) for build in contenders]


def images(setting: Setting) -> Tensor:
    """Noise (B,3,H,W)."""
    return detection.images(MODELS[setting.model], setting)


def work(setting: Setting) -> Work:
    """Measured FLOPs of the convolutions."""
    size = MODELS[setting.model]
    network = harness.recipe_task(RECIPE, size.options, "meta").network
    with torch.device("meta"):
        batch = torch.empty(setting.batch, 3, size.height, size.width)

        def loss() -> Tensor:
            maps = network.backbone(batch)
            logits, deltas = network.head([maps[name] for name in network.levels])
            return torch.stack([x.sum() for x in (*logits, *deltas)]).sum()

        flops = harness.count_flops(loss)
    detail = {"image": [size.height, size.width], "objects": detection.OBJECTS}
    return Work(setting.batch, flops=flops, detail=detail)


def loaders(setting: Setting) -> contextlib.AbstractContextManager[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files and a COCO json to a training batch."""
    return detection_data.loaders(RECIPE, CONFIG, setting)
