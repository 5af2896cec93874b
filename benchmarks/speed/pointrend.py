"""Speed of PointRend: our training step and inference beside detectron2's project, at equal settings.

Everyone trains ResNet-50-FPN with the stem and the second stage frozen and frozen BatchNorm, on the same images with
the same objects as bit masks, 256 anchors and 512 regions an image, 196 points a region, from the same weights. A step
is whole: backbone, proposals, all heads and losses, backward, SGD. Inference goes to masks of 224x224 pasted into the
image, 100 an image. No package on pip has the network. detectron2 is a checkout (`--official`) with projects/PointRend,
of whose imports OpenCV, which draws colours in training, is not used here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import detection
from zoo.detection.pointrend import convert_official

RECIPE, LR = "pointrend/train_coco", 1e-3
CONFIG = "InstanceSegmentation/pointrend_rcnn_R_50_FPN_1x_coco"
PACKAGES = ("fvcore", "pycocotools")
_ABOUT = "facebookresearch/detectron2, projects/PointRend (its compiled module not built)"


@dataclass(frozen=True)
class Size:
    """Images and samples; those of regions are the recipe's, but in the harness's own test."""

    height: int
    width: int
    samples: int = 512
    anchors: int = 256

    @property
    def options(self) -> dict[str, Any]:
        samples = {"model.roi.samples": self.samples, "model.rpn.samples": self.anchors}
        return {**samples, "model.init_from": None, "model.optim.lr": LR}


MODELS = {
    "pointrend_rcnn_r50_fpn": Size(320, 480),
    "pointrend_rcnn_r50_fpn_800": Size(800, 1216),
    "tiny": Size(64, 96, samples=32, anchors=32),  # for the harness's own test
}
DEFAULT_MODEL = "pointrend_rcnn_r50_fpn"


def _ours(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    targets = detection.objects(size.height, size.width, setting.batch, setting.device)
    known = [{name: value for name, value in target.items() if name != "polygons"} for target in targets]
    return detection.ours(RECIPE, size, setting, start, known)


def _official_network(size: Size, setting: Setting, start: dict[str, Tensor], threshold: float) -> tuple[Any, Any]:
    """detectron2's network, and its settings."""
    checkout = setting.official
    assert checkout is not None
    detection.detectron2(checkout, "detectron2.config")  # before there is a cv2, of which it would ask the version
    sys.modules.setdefault("cv2", ModuleType("cv2"))
    project = detection.detectron2(checkout, "detectron2.projects.point_rend")
    config = detection.detectron2_config(
        checkout, CONFIG, setting.device, project.add_pointrend_config, "projects/PointRend"
    )
    config.SOLVER.BASE_LR, config.MODEL.ROI_HEADS.SCORE_THRESH_TEST = LR, threshold
    config.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, config.MODEL.RPN.BATCH_SIZE_PER_IMAGE = size.samples, size.anchors
    network = detection.detectron2(checkout, "detectron2.modeling").build_model(config)
    return detection.same_weights(network, convert_official, start), config


def official(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    network, config = _official_network(size, setting, start, 0.05)
    given = detection.objects(size.height, size.width, setting.batch, setting.device)
    about = f"{_ABOUT} with detectron2's optimizer"
    return detection.official(network, config, setting, given, about, masks=True, bits=True)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. detectron2 is left out where its checkout is not given."""
    size = MODELS[setting.model]
    contenders = [_ours, *([official] if setting.official is not None else [])]
    return [build(size, setting, detection.start(RECIPE, size)) for build in contenders]


def images(setting: Setting) -> Tensor:
    """Noise (B,3,H,W)."""
    return detection.images(MODELS[setting.model], setting)


def work(setting: Setting) -> Work:
    """Measured FLOPs of the convolutions and linear layers, with a quarter of the regions under the mask head."""

    def further(network: Any, maps: Any, count: int) -> list[Tensor]:
        masks = network.roi_heads.mask_head
        coarse = masks.coarse_head(torch.empty(count, 256, 14, 14, requires_grad=True))
        points = (torch.empty(1, n, count * 196, requires_grad=True) for n in (256, 80))
        return [coarse, masks.point_head(*points)]

    return detection.region_work(RECIPE, MODELS[setting.model], setting, further, points=196)


def samplers(setting: Setting) -> tuple[list[Loader], Work]:
    """Inference from normalised images to 100 pasted masks an image: with random weights none would be sure enough, so
    the threshold of scores is 0."""
    size, batch = MODELS[setting.model], setting.batch
    options = {**size.options, "model.roi.score_threshold": 0.0}
    network = harness.recipe_task(RECIPE, options, setting.device).network.eval()
    start = {key: value.to(setting.device) for key, value in detection.start(RECIPE, size).items()}
    network.load_state_dict(start)
    pictures, sizes = images(setting), torch.tensor([[size.height, size.width]] * batch)

    ours = detection.inferences(lambda: [x["masks"] for x in network({"image": pictures, "size": sizes})], torch.cat)
    found = [Loader("zoo", package_version("zoo") or "", ours, "the network of the recipe in evaluation")]
    if setting.official is not None:
        theirs = _official_network(size, setting, start, 0.0)[0].eval()
        inputs = [{"image": x, "height": size.height, "width": size.width} for x in pictures]
        masks = detection.inferences(lambda: [x["instances"].pred_masks for x in theirs(inputs)], torch.cat)
        found.append(Loader("official", harness.revision(setting.official), masks, _ABOUT))
    what = f"inference of {size.height} x {size.width} pixels to 100 masks, rendered at 224 x 224"
    return found, Work(batch, detail={"title": what})
