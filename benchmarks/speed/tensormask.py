"""Speed of TensorMask: our training step beside detectron2's project, and the swap of units beside plain indexing.

The step is whole: ResNet-50-FPN with the stem and the second stage frozen, head, windows, losses, backward, SGD, from
the same weights, on the same images and objects. The project's swap is a CUDA kernel, which is not built; in its place
stands :func:`sixteen_corners`, the same arithmetic by torch's indexing. The settings `swap_...` time that function
beside `swap_align2nat`, forward and backward, on masks of 15 x 15 pixels. For each entry of its output the kernel reads
16 entries, and in its backward adds to 16; here an entry takes one interpolation for each pair of axes, and a mean of
two neighbours before it. No other package has the swap. detectron2 is a checkout (`--official`).
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

RECIPE, LR = "tensormask/train_coco", 1e-3
PACKAGES = ("fvcore", "pycocotools")


@dataclass(frozen=True)
class Size:
    """Images in pixels; or, with a `scale` of the swap alone, maps in cells."""

    height: int
    width: int
    depth: int = 50
    scale: int = 0

    @property
    def channels(self) -> int:
        return 256 if self.depth >= 50 else 64

    @property
    def options(self) -> dict[str, Any]:
        trunk = {"model.resnet.depth": self.depth, "model.resnet.channels": self.channels}
        return {**trunk, "model.init_from": None, "model.optim.lr": LR}


MODELS = {
    "tensormask_r50_fpn": Size(160, 256),
    "swap_1": Size(64, 96, scale=1),
    "swap_4": Size(64, 96, scale=4),
    "swap_32": Size(64, 96, scale=32),
    "tiny": Size(64, 96, depth=18),  # for the harness's own test
}
DEFAULT_MODEL = "tensormask_r50_fpn"


def sixteen_corners(x: Tensor, scale: int, pad: float) -> Tensor:
    """Each entry of the swap of (B, V * V, H, W) from the 16 entries around it, fetched one by one."""
    sides = side, height, _, width = (mask_side(x.shape[1]), x.shape[-2], mask_side(x.shape[1]), x.shape[-1])
    size, rows, columns = side * scale, math.ceil(height / scale), math.ceil(width / scale)
    x, out, places = x.unflatten(1, (side, side)), torch.zeros((), device=x.device, dtype=x.dtype), []
    for count, shape in ((rows, (size, 1, rows, 1)), (columns, (1, size, 1, columns))):
        pixel, cell = (torch.arange(n, device=x.device, dtype=torch.float64) for n in (size, count))
        places.append(((pixel[:, None] + 0.5).expand(-1, count) / scale - 0.5).reshape(shape))
        places.append((cell * scale + pixel[:, None] - size / 2 + 0.5).view(shape))
    for picks in itertools.product((0, 1), repeat=4):
        weight, inside, index = torch.ones((), device=x.device), torch.tensor(True, device=x.device), []
        for place, pick, length in zip(places, picks, sides, strict=True):
            low = place.floor()
            weight = weight * ((place - low) if pick else 1 - (place - low)).to(x.dtype)
            corner = low.long() + pick
            inside = inside & (corner >= 0) & (corner < length)
            index.append(corner.clamp(0, length - 1))
        v, y, u, column = index
        out = out + weight * torch.where(inside, x[:, v, u, y, column], pad)
    return out.flatten(1, 2)


def _ours(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    targets = detection.objects(size.height, size.width, setting.batch, setting.device)
    batch = {"size": torch.tensor([[size.height, size.width]] * setting.batch), "target": targets}
    return harness.from_recipe(RECIPE, size.options, lambda x: {"image": x, **batch}, setting, start)


def official(size: Size, setting: Setting, start: dict[str, Tensor]) -> Trainer:
    """The project's network from its config, with its own optimizer."""
    checkout, stub = setting.official, ModuleType("tensormask._C")
    assert checkout is not None
    config = detection.detectron2(checkout, "detectron2.config").get_cfg()
    sys.path.insert(0, str(checkout / "projects/TensorMask"))
    sys.modules.setdefault("tensormask._C", stub)
    project = importlib.import_module("tensormask")
    project.add_tensormask_config(config)
    project.layers.SwapAlign2Nat.forward = lambda self, x: sixteen_corners(x, self.lambda_val, self.pad_val)
    config.merge_from_file(str(checkout / "projects/TensorMask/configs/tensormask_R_50_FPN_1x.yaml"))
    config.MODEL.DEVICE, config.MODEL.PIXEL_MEAN, config.SOLVER.BASE_LR = setting.device, [0.0, 0.0, 0.0], LR
    config.MODEL.RESNETS.DEPTH, config.MODEL.RESNETS.RES2_OUT_CHANNELS = size.depth, size.channels
    network = detection.detectron2(checkout, "detectron2.modeling").build_model(config).train()
    theirs = {next(iter(convert_official({key: value}))): key for key, value in network.state_dict().items()}
    network.load_state_dict({theirs[key]: value for key, value in start.items()})
    optimizer = detection.detectron2(checkout, "detectron2.solver").build_optimizer(config, network)
    targets = detection.objects(size.height, size.width, setting.batch, setting.device)
    loss = detection.detectron2_loss(checkout, network, targets, masks=True)
    about = "facebookresearch/detectron2, projects/TensorMask, its own optimizer; torch's indexing for its CUDA swap"
    return Trainer("official", harness.revision(checkout), loss, optimizer, about)


def _swap(name: str, version: str, swap: Any, scale: int, about: str) -> Trainer:
    """Forward and backward of the sum of squares; the parameter that an optimizer wants plays no part."""
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
        both = (("zoo", zoo.__version__, swap_align2nat, ours), ("indexing", torch.__version__, sixteen_corners, plain))
        return [_swap(name, version, swap, size.scale, about) for name, version, swap, about in both]
    torch.manual_seed(0)
    start = detection.calmed(harness.recipe_task(RECIPE, size.options).network).state_dict()
    contenders = [_ours, *([official] if setting.official is not None else [])]
    return [build(size, setting, start) for build in contenders]


def images(setting: Setting) -> Tensor:
    """Noise: images (B, 3, H, W), or masks (B, 225, H, W) of the swap alone."""
    size = MODELS[setting.model]
    return harness.noise(setting, setting.batch, 225 if size.scale else 3, size.height, size.width)


def work(setting: Setting) -> Work:
    """FLOPs of the convolutions, with the mask maps of all levels; of the swap alone, 16 multiply-adds an entry forward
    and as many backward."""
    size = MODELS[setting.model]
    shape = [size.height, size.width]
    if size.scale:
        entries = (
            setting.batch * 225 * size.scale**2 * math.ceil(shape[0] / size.scale) * math.ceil(shape[1] / size.scale)
        )
        return Work(setting.batch, flops=64 * entries, detail={"map": shape, "scale": size.scale})
    network = harness.recipe_task(RECIPE, size.options, "meta").network
    with torch.device("meta"):
        batch = torch.empty(setting.batch, 3, *shape)

        def loss() -> Tensor:
            features = network.features(batch)
            logits, deltas = network.head(features)
            maps = network.head.mask_maps(features, range(len(features)))
            return torch.stack([x.sum() for x in (*logits, *deltas, *maps.values())]).sum()

        flops = harness.count_flops(loss)
    return Work(setting.batch, flops=flops, detail={"image": shape, "objects": detection.OBJECTS})
