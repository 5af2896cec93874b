"""Training steps of papers of detection: drawn objects, ours, detectron2 from a checkout, torchvision.

detectron2 needs fvcore, iopath, omegaconf, hydra-core, yacs, cloudpickle, tabulate and termcolor; its compiled module
is not built, and nothing timed here calls it.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed import harness
from benchmarks.speed.harness import Setting, Trainer, Work
from zoo.errors import ZooError

OBJECTS = 7  # an image of COCO has 7.3 on average


def ellipses(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) and outlines (N, 24, 2) of as many ellipses in an image as COCO's have objects."""
    angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    half = rng.uniform(0.05, 0.3, (OBJECTS, 2)) * [width, height]
    centre = half + rng.uniform(0, 1, (OBJECTS, 2)) * ([width, height] - 2 * half)
    rim = centre[:, None] + half[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([centre - half, centre + half], axis=1), rim


def objects(height: int, width: int, batch: int, device: str) -> list[dict[str, Any]]:
    """Seeded objects of each image: boxes (N, 4), labels (N,), polygons and masks (N, H, W)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] + 0.5
    made = []
    for _ in range(batch):
        boxes, rim = ellipses(rng, height, width)
        (left, top), (right, bottom) = boxes[:, :2].T[..., None, None], boxes[:, 2:].T[..., None, None]
        u, v = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
        tensors = {
            "boxes": torch.from_numpy(boxes).float(),
            "labels": torch.from_numpy(rng.integers(0, 80, OBJECTS)),
            "masks": torch.from_numpy(u**2 + v**2 <= 1),
        }
        polygons = [[points.ravel()] for points in rim]
        made.append({"polygons": polygons, **{name: value.to(device) for name, value in tensors.items()}})
    return made


class Sized(Protocol):
    """A size that a paper is timed at."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def options(self) -> dict[str, Any]: ...


class Sampled(Sized, Protocol):
    """Likewise, of a network that looks at so many regions and anchors an image."""

    @property
    def samples(self) -> int: ...

    @property
    def anchors(self) -> int: ...


def start(recipe: str, size: Sized) -> dict[str, Tensor]:
    """The weights that all start from: what they propose decides how many regions their mask heads get."""
    torch.manual_seed(0)
    return calmed(harness.recipe_task(recipe, size.options).network).state_dict()


def ours(
    recipe: str, size: Sized, setting: Setting, start: dict[str, Tensor], targets: list[dict[str, Any]] | None = None
) -> Trainer:
    """A recipe's training step on drawn objects, or on `targets`."""
    given = objects(size.height, size.width, setting.batch, setting.device) if targets is None else targets
    batch = {"size": torch.tensor([[size.height, size.width]] * setting.batch), "target": given}
    return harness.from_recipe(recipe, size.options, lambda x: {"image": x, **batch}, setting, start)


def images(size: Sized, setting: Setting) -> Tensor:
    """Noise (B,3,H,W)."""
    return harness.noise(setting, setting.batch, 3, size.height, size.width)


def region_work(
    recipe: str, size: Sampled, setting: Setting, further: Callable[[Any, Any, int], list[Tensor]], **detail: Any
) -> Work:
    """Measured FLOPs of trunk, proposals and box head, and of what `further` makes of the network, its maps and the
    number of the regions that are objects, a quarter."""
    network = harness.recipe_task(recipe, size.options, "meta").network
    with torch.device("meta"):
        batch = torch.empty(setting.batch, 3, size.height, size.width)

        def loss() -> Tensor:
            maps, heads = network.backbone(batch), network.roi_heads
            logits, deltas = network.rpn.head(list(maps.values()))
            count = setting.batch * size.samples
            found = heads.box_predictors[0](heads.box_heads[0](torch.empty(count, 256, 7, 7, requires_grad=True)))
            outputs = [*logits, *deltas, *found, *further(network, maps, count // 4)]
            return torch.stack([x.sum() for x in outputs]).sum()

        flops = harness.count_flops(loss)
    known = {"image": [size.height, size.width], "regions": size.samples, "anchors": size.anchors, "objects": OBJECTS}
    return Work(setting.batch, flops=flops, detail={**known, **detail})


def masks_of(network: Any, maps: Any, count: int) -> list[Tensor]:
    """What the mask head makes of so many regions; see :func:`region_work`."""
    return [network.roi_heads.mask_head(torch.empty(count, 256, 14, 14, requires_grad=True))]


def calmed(network: Any) -> Any:
    """Random weights under frozen BatchNorm, which normalises nothing: the last scale of every block becomes small, or
    activations grow from block to block until the proposals are not finite."""
    for name, buffer in network.named_buffers():
        if name.endswith(("bn3.weight", "conv3.norm.weight")):
            buffer.fill_(0.1)
    return network


def detectron2(checkout: Path, name: str) -> Any:
    """A module of a checkout of detectron2, without its compiled part; it stays imported, as its modules meet again.

    Raises:
        ZooError: no such checkout, or a package that it wants is missing.
    """
    if not (checkout / "detectron2" / "modeling").is_dir():
        raise ZooError(f"{checkout} is no checkout of facebookresearch/detectron2: it has no detectron2/modeling")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    sys.modules.setdefault("detectron2._C", ModuleType("detectron2._C"))
    try:
        package = importlib.import_module("detectron2")
        package._C = sys.modules["detectron2._C"]
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ZooError(f"detectron2 wants {error.name}: pip install {error.name}") from error


def detectron2_config(
    checkout: Path, config: str, device: str, further: Callable[[Any], None] = lambda config: None, place: str = "."
) -> Any:
    """detectron2's settings of a published network ("COCO-Detection/faster_rcnn_R_50_FPN_1x"), for pictures that are
    centred at 0; `further` adds those of the project whose folder `place` is."""
    made = detectron2(checkout, "detectron2.config").get_cfg()
    further(made)
    made.merge_from_file(str(checkout / place / "configs" / f"{config}.yaml"))
    made.MODEL.DEVICE, made.MODEL.PIXEL_MEAN = device, [0.0, 0.0, 0.0]
    return made


def detectron2_loss(
    checkout: Path, network: Any, targets: list[dict[str, Any]], masks: bool, bits: bool = False
) -> Callable[..., Tensor]:
    """The sum of the losses of a network of detectron2 for images (B, 3, H, W) of these objects, masks as polygons, or
    as bits."""
    structures = detectron2(checkout, "detectron2.structures")
    events = detectron2(checkout, "detectron2.utils.events")
    instances = []
    for target in targets:
        found = structures.Instances(tuple(target["masks"].shape[-2:]))
        found.gt_boxes, found.gt_classes = structures.Boxes(target["boxes"]), target["labels"]
        if masks:
            known = structures.BitMasks(target["masks"]) if bits else structures.PolygonMasks(target["polygons"])
            found.gt_masks = known
        instances.append(found)

    def loss(images: Tensor) -> Tensor:
        with events.EventStorage():
            losses = network([{"image": x, "instances": y} for x, y in zip(images, instances, strict=True)])
        return sum(losses.values())  # type: ignore[return-value]

    return loss


def official(
    network: Any,
    config: Any,
    setting: Setting,
    targets: list[dict[str, Any]],
    about: str,
    masks: bool,
    bits: bool = False,
) -> Trainer:
    """The training step of a network of detectron2 with its own optimizer; see :func:`detectron2_loss`."""
    checkout = setting.official
    assert checkout is not None
    optimizer = detectron2(checkout, "detectron2.solver").build_optimizer(config, network)
    loss = detectron2_loss(checkout, network.train(), targets, masks, bits)
    return Trainer("official", harness.revision(checkout), loss, optimizer, about)


def same_weights(network: Any, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], start: Any) -> Any:
    """detectron2's network with the weights `start` of ours, of which `convert` knows the names."""
    theirs = {next(iter(convert({key: value}))): key for key, value in network.state_dict().items()}
    network.load_state_dict({theirs[key]: value for key, value in start.items()})
    return network


def inferences(results: Callable[[], list[Tensor]], join: Callable[[list[Tensor]], Tensor]) -> Iterator[Tensor]:
    """What networks find of a batch, again and again."""
    while True:
        with torch.no_grad():
            yield join(results())


def torchvision_rcnn(
    depth: int, masks: bool, start: dict[str, Tensor], norm: Callable[[int], Any] | None = None, **options: Any
) -> Any:
    """torchvision's Faster or Mask R-CNN for COCO with proposals and RoIAlign as detectron2 has them, in training; its
    trunk and its proposals start from weights of ours. With a `norm` every layer but that of the proposals has it, the
    box head has four convolutions, and nothing is frozen."""
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
    from torchvision.ops import MultiScaleRoIAlign

    box, mask = (MultiScaleRoIAlign(["0", "1", "2", "3"], side, sampling_ratio=0) for side in (7, 14))
    if norm is None:
        backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, trainable_layers=3)
    else:
        backbone = _normalised_backbone(depth, norm)
        options["box_head"] = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm)
        options |= {"mask_head": MaskRCNNHeads(256, [256] * 4, 1, norm)} if masks else {}
    options |= {"rpn_pre_nms_top_n_train": 2000, "rpn_post_nms_top_n_train": 1000, "box_roi_pool": box}
    options |= {"mask_roi_pool": mask} if masks else {}
    network: Any = (MaskRCNN if masks else FasterRCNN)(backbone, 81, **options)
    for key, value in network.state_dict().items():
        name = re.sub(r"backbone\.body\.", "backbone.bottom_up.", key)
        name = re.sub(r"fpn\.inner_blocks\.(\d)", lambda found: f"lateral.c{int(found[1]) + 2}", name)
        name = re.sub(r"fpn\.layer_blocks\.(\d)", lambda found: f"output.p{int(found[1]) + 2}", name)
        name = name.replace("rpn.head.conv.0.0", "rpn.head.conv.0").replace("cls_logits", "objectness_logits")
        name = name.replace("rpn.head.bbox_pred", "rpn.head.anchor_deltas")
        if not name.startswith("roi_heads."):
            value.copy_(start[name])
    return network.train()


def _normalised_backbone(depth: int, norm: Callable[[int], Any]) -> Any:
    """torchvision's ResNet and pyramid with another normalisation."""
    from torchvision.models import get_model
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    trunk = get_model(f"resnet{depth}", norm_layer=norm)
    widths = [(256 if depth >= 50 else 64) * 2**k for k in range(4)]
    return BackboneWithFPN(trunk, {f"layer{k + 1}": str(k) for k in range(4)}, widths, 256, norm_layer=norm)


def torchvision_loss(network: Any, targets: list[dict[str, Any]]) -> Callable[[Tensor], Tensor]:
    """The sum of the losses of torchvision's for images (B, 3, H, W), which it would resize, masks as bits."""
    from torchvision.models.detection.image_list import ImageList

    known = [
        {"boxes": one["boxes"], "labels": one["labels"] + 1, "masks": one["masks"].to(torch.uint8)} for one in targets
    ]

    def loss(images: Tensor) -> Tensor:
        listed = ImageList(images, [tuple(images.shape[-2:])] * len(images))
        features = network.backbone(images)
        proposals, losses = network.rpn(listed, features, known)
        _, more = network.roi_heads(features, proposals, listed.image_sizes, known)
        return torch.stack([*losses.values(), *more.values()]).sum()

    return loss
