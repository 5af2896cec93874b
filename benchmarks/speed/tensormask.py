"""Speed of TensorMask: our training step beside detectron2's project, and the swap of units beside plain indexing.

The step is whole: ResNet-50-FPN (stem and second stage frozen), head, windows, losses, backward, SGD, from the same
weights, on the same images and objects. The project's swap is a CUDA kernel, which is not built; in its place stands
:func:`sixteen_corners`, the same arithmetic by torch's indexing. The settings `swap_...` time it beside
`swap_align2nat`, forward and backward, on masks of 15 x 15 pixels. detectron2 is a checkout (`--official`).
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import zoo
from benchmarks.speed import harness
from benchmarks.speed.harness import Setting, Trainer, Work
from benchmarks.speed.shared import detection
from zoo.detection.tensormask import convert_official
from zoo.ops.tensor_masks import mask_side, swap_align2nat

RECIPE, LR, PACKAGES = "tensormask/train_coco", 1e-3, ("fvcore", "pycocotools")
CONFIG, PROJECT = "tensormask_R_50_FPN_1x", "projects/TensorMask"


@dataclass(frozen=True)
class Size:
    """Images in pixels; or, with a `scale` of the swap alone, maps in cells."""

    height: int
    width: int
    depth: int = 50
    scale: int = 0
    channels: int = 256

    @property
    def options(self) -> dict[str, Any]:
        trunk = {"model.resnet.depth": self.depth, "model.resnet.channels": self.channels}
        return {**trunk, "model.init_from": None, "model.optim.lr": LR}


MODELS = {
    "tensormask_r50_fpn": Size(160, 256),
    **{f"swap_{scale}": Size(64, 96, scale=scale) for scale in (1, 4, 32)},
    "tiny": Size(64, 96, depth=18, channels=64),  # for the harness's own test
}
DEFAULT_MODEL = "tensormask_r50_fpn"


def sixteen_corners(x: Tensor, scale: int, pad: float) -> Tensor:
    """Each entry of the swap of (B, V * V, H, W) from the 16 entries around it, fetched one by one."""
    side, sides, out = mask_side(x.shape[1]), x.shape[-2:], torch.zeros((), device=x.device, dtype=x.dtype)
    x, places, size = x.unflatten(1, (side, side)), [], side * scale
    for length, shapes in zip(sides, (((-1, 1, 1, 1), (-1, 1)), ((-1, 1, 1), (-1,))), strict=True):
        counts = size, math.ceil(length / scale)
        pixel, cell = (torch.arange(n, device=x.device).double().view(k) for n, k in zip(counts, shapes, strict=True))
        places += [((pixel + 0.5) / scale - 0.5, side), (cell * scale + pixel - size / 2 + 0.5, length)]
    for picks in itertools.product((0, 1), repeat=4):
        weight, inside, index = torch.ones((), device=x.device), torch.tensor(True, device=x.device), []
        for (place, length), pick in zip(places, picks, strict=True):
            corner = place.floor() + pick
            weight = weight * (1 - (place - corner).abs()).to(x.dtype)
            inside = inside & (corner >= 0) & (corner < length)
            index.append(corner.long().clamp(0, length - 1))
        v, y, u, column = index
        out = out + weight * torch.where(inside, x[:, v, u, y, column], pad)
    return out.flatten(1, 2)


def _ours(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    return detection.ours(RECIPE, size, setting, start)


def official(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    checkout = setting.official
    assert checkout is not None
    detection.detectron2(checkout, "detectron2.config")  # the project imports it
    sys.path.insert(0, str(checkout / PROJECT))
    sys.modules.setdefault("tensormask._C", ModuleType("tensormask._C"))
    project = importlib.import_module("tensormask")
    project.layers.SwapAlign2Nat.forward = lambda self, x: sixteen_corners(x, self.lambda_val, self.pad_val)
    config = detection.detectron2_config(checkout, CONFIG, setting.device, project.add_tensormask_config, PROJECT)
    trunk, config.SOLVER.BASE_LR = config.MODEL.RESNETS, LR
    trunk.DEPTH, trunk.RES2_OUT_CHANNELS = size.depth, size.channels
    network = detection.detectron2(checkout, "detectron2.modeling").build_model(config)
    detection.same_weights(network, convert_official, start)
    targets = detection.objects(size.height, size.width, setting.batch, setting.device)
    about = "facebookresearch/detectron2, projects/TensorMask, its own optimizer; torch's indexing for its CUDA swap"
    return detection.official(network, config, setting, targets, about, masks=True)


def _swap(name: str, version: str, swap: Any, scale: int, about: str) -> Trainer:
    """Forward and backward of the mean of squares; the parameter that an optimizer wants plays no part."""
    idle = torch.nn.Parameter(torch.zeros(()))

    def loss(masks: Tensor) -> Tensor:
        return swap(masks.detach().requires_grad_(), scale, -6.0).square().mean() + 0 * idle

    return Trainer(name, version, loss, torch.optim.SGD([idle], LR), about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. detectron2 is left out where its checkout is not given."""
    size = MODELS[setting.model]
    if size.scale:
        ours = "zoo.ops.tensor_masks.swap_align2nat: strided views, a pass for each pair of axes"
        plain = "the 16 corners of each entry by torch's indexing, with its own gradient"
        peer = _swap("indexing", torch.__version__, sixteen_corners, size.scale, plain)
        return [_swap("zoo", zoo.__version__, swap_align2nat, size.scale, ours), peer]
    start = detection.start(RECIPE, size)
    return [build(size, setting, start) for build in ([_ours, official] if setting.official is not None else [_ours])]


def images(setting: Setting) -> Tensor:
    """Noise: images (B, 3, H, W), or masks (B, 225, H, W) of the swap alone."""
    size = MODELS[setting.model]
    return harness.noise(setting, setting.batch, 225 if size.scale else 3, size.height, size.width)


def work(setting: Setting) -> Work:
    """FLOPs of the convolutions, all mask maps'; of the swap, 16 multiply-adds an entry and as many backward."""
    size = MODELS[setting.model]
    shape = [size.height, size.width]
    if size.scale:
        cells = math.prod(math.ceil(side / size.scale) for side in shape)
        entries, detail = 225 * setting.batch * size.scale**2 * cells, {"map": shape, "scale": size.scale}
        return Work(setting.batch, flops=64 * entries, detail=detail)
    network = harness.recipe_task(RECIPE, size.options, "meta").network
    with torch.device("meta"):

        def loss() -> Tensor:
            features = network.features(torch.empty(setting.batch, 3, *shape))
            parts = [*network.head(features), network.head.mask_maps(features, range(len(features))).values()]
            return torch.stack([x.sum() for part in parts for x in part]).sum()

        flops = harness.count_flops(loss)
    return Work(setting.batch, flops=flops, detail={"image": shape, "objects": detection.OBJECTS})
