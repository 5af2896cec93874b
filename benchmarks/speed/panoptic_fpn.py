"""Speed of Panoptic FPN: our training step beside detectron2's, and inference, from normalised images to panoptic maps.

The settings are those of mask_rcnn.py: ResNet-50-FPN, 256 anchors and 512 regions an image, polygons as masks, all from
the same weights. Every pixel has one of 54 labels, in blocks. torchvision's detectors have no semantic branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import detection
from zoo.detection.panoptic_fpn import convert_official

RECIPE, LR = "panoptic_fpn/train_coco", 1e-3
PACKAGES = ("fvcore", "pycocotools")
_ABOUT = "facebookresearch/detectron2 (its compiled module not built)"
CONFIG = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x"


@dataclass(frozen=True)
class Size:
    """Images and samples; all else is the recipe's."""

    height: int
    width: int
    samples: int = 512
    anchors: int = 256

    @property
    def options(self) -> dict[str, Any]:
        samples = {"model.roi.samples": self.samples, "model.rpn.samples": self.anchors}
        return {**samples, "model.init_from": None, "model.optim.lr": LR}


MODELS = {
    "panoptic_fpn_r50": Size(320, 480),
    "tiny": Size(64, 96, samples=32, anchors=32),  # for the harness's own test
}
DEFAULT_MODEL = "panoptic_fpn_r50"


def _labels(size: Size, setting: Setting) -> list[Tensor]:
    """(H, W) labels of blocks of 16 pixels."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 54, (setting.batch, -(-size.height // 16), -(-size.width // 16)), generator=draw)
    whole = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, : size.height, : size.width]
    return list(whole.to(setting.device))


def _targets(size: Size, setting: Setting) -> list[dict[str, Any]]:
    made = detection.objects(size.height, size.width, setting.batch, setting.device)
    return [{**one, "semantic": labels} for one, labels in zip(made, _labels(size, setting), strict=True)]


def _ours(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    return detection.ours(RECIPE, size, setting, start, _targets(size, setting))


def _official_network(checkout: Path, size: Size, device: str, start: Mapping[str, Tensor], threshold: float) -> Any:
    """detectron2's network, and its settings."""
    config = detection.detectron2_config(checkout, CONFIG, device)
    config.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, config.MODEL.RPN.BATCH_SIZE_PER_IMAGE = size.samples, size.anchors
    config.MODEL.ROI_HEADS.SCORE_THRESH_TEST = min(threshold, 0.05)
    config.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = threshold
    config.SOLVER.BASE_LR = LR
    network = detection.detectron2(checkout, "detectron2.modeling").build_model(config)
    return detection.same_weights(network, convert_official, start), config


def official(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    checkout = setting.official
    assert checkout is not None
    network, config = _official_network(checkout, size, setting.device, start, 0.5)
    labels, given = _labels(size, setting), network.forward
    network.forward = lambda inputs: given([{**x, "sem_seg": y} for x, y in zip(inputs, labels, strict=True)])
    about = f"{_ABOUT}, its optimizer, polygons"
    return detection.official(network, config, setting, _targets(size, setting), about, masks=True)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. detectron2 is left out where its checkout is not given."""
    size, contenders = MODELS[setting.model], [_ours, official][: 1 + (setting.official is not None)]
    return [build(size, setting, detection.start(RECIPE, size)) for build in contenders]


def images(setting: Setting) -> Tensor:
    """Noise (B,3,H,W)."""
    return detection.images(MODELS[setting.model], setting)


def work(setting: Setting) -> Work:
    """Measured FLOPs of the convolutions and linear layers, with a quarter of the regions under the mask head."""

    def further(network: Any, maps: Any, count: int) -> list[Tensor]:
        return [*detection.masks_of(network, maps, count), network.semantic_head(maps)]

    return detection.region_work(RECIPE, MODELS[setting.model], setting, further, labels=54)


def samplers(setting: Setting) -> tuple[list[Loader], Work]:
    """Inference, with 100 detections an image: of random weights none is sure, so the thresholds of scores are 0."""
    size, batch = MODELS[setting.model], setting.batch
    options = {**size.options, "model.roi.score_threshold": 0.0, "model.combine.score": 0.0}
    network = harness.recipe_task(RECIPE, options, setting.device).network.eval()
    network.load_state_dict(start := detection.start(RECIPE, size))
    pictures, sizes = images(setting), torch.tensor([[size.height, size.width]] * batch)

    ours = detection.inferences(
        lambda: [x["panoptic"] for x in network({"image": pictures, "size": sizes})], torch.stack
    )
    found = [Loader("zoo", zoo.__version__, ours, "the network of the recipe in evaluation")]
    if setting.official is not None:
        theirs = _official_network(setting.official, size, setting.device, start, 0.0)[0].eval()
        inputs = [{"image": x, "height": size.height, "width": size.width} for x in pictures]
        maps = detection.inferences(lambda: [x["panoptic_seg"][0] for x in theirs(inputs)], torch.stack)
        found.append(Loader("official", harness.revision(setting.official), maps, _ABOUT))
    return found, Work(batch, detail={"title": f"panoptic maps of {size.height} x {size.width} pixels"})
