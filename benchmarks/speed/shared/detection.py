"""The peers of papers of detection: detectron2 from a checkout, torchvision's pipeline; drawn objects and a COCO set.

detectron2 needs fvcore, iopath, omegaconf, hydra-core, yacs, cloudpickle, tabulate and termcolor; its compiled module
is not built, and nothing timed here calls it.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Work
from zoo.errors import ZooError

OBJECTS = 7  # an image of COCO has 7.3 on average
BATCH = 2  # of the pictures that are loaded


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


@contextlib.contextmanager
def coco(setting: Setting) -> Iterator[tuple[Path, Path, str]]:
    """A folder of JPEG files, a COCO json about them, and what they are: drawn polygons on photos or on noise."""
    rng = np.random.default_rng(0)
    with harness.photos(setting, 16) as (folder, name), tempfile.TemporaryDirectory() as made:
        pictures: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        flat = Path(made) / "images"
        flat.mkdir()
        for index, path in enumerate(itertools.islice(sorted(folder.rglob("*.*")), 32)):
            if path.suffix.lower() not in (".jpg", ".jpeg"):
                continue
            with Image.open(path) as image:
                width, height = image.size
            (flat / f"{index}.jpg").symlink_to(path.resolve())
            pictures.append({"id": index, "file_name": f"{index}.jpg", "height": height, "width": width})
            for (left, top, right, bottom), rim in zip(*ellipses(rng, height, width), strict=True):
                one = {"id": len(annotations) + 1, "image_id": index, "category_id": int(rng.integers(1, 4))}
                one |= {"bbox": [left, top, right - left, bottom - top], "segmentation": [rim.ravel().tolist()]}
                one |= {"area": math.pi / 4 * (right - left) * (bottom - top), "iscrowd": 0}
                annotations.append(one)
        categories = [{"id": k, "name": f"class {k}"} for k in (1, 2, 3)]
        file = Path(made) / "instances.json"
        file.write_text(json.dumps({"images": pictures, "annotations": annotations, "categories": categories}))
        yield flat, file, f"{name} with drawn polygons"


def _padded(pictures: list[Tensor]) -> Tensor:
    """A batch, normalised, as the models of the peers pad it."""
    height, width = (32 * math.ceil(max(x.shape[axis] for x in pictures) / 32) for axis in (1, 2))
    mean = torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    batch = torch.zeros(len(pictures), 3, height, width)
    for out, picture in zip(batch, pictures, strict=True):
        out[:, : picture.shape[1], : picture.shape[2]] = picture - mean
    return batch


def _in_turn(read: Callable[[int], Tensor], count: int) -> Iterator[Tensor]:
    for first in itertools.count():
        yield _padded([read((first * BATCH + k) % count) for k in range(BATCH)])


def _detectron2_loader(folder: Path, file: Path, checkout: Path, config: str) -> Loader:
    made = detectron2_config(checkout, config, "cpu")
    mapper = detectron2(checkout, "detectron2.data.dataset_mapper").DatasetMapper(made, is_train=True)
    rows = detectron2(checkout, "detectron2.data.datasets.coco").load_coco_json(str(file), str(folder))
    batches = _in_turn(lambda index: mapper(rows[index])["image"], len(rows))
    about = "detectron2's DatasetMapper, batched and normalised as its model does"
    return Loader("official", harness.revision(checkout), batches, about)


def _torchvision_loader(folder: Path, file: Path) -> Loader:
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    resize = v2.RandomShortestSize([640, 672, 704, 736, 768, 800], 1333)
    plain = CocoDetection(
        str(folder), str(file), transforms=v2.Compose([resize, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    )
    data = wrap_dataset_for_transforms_v2(plain, target_keys=("boxes", "labels", "masks"))
    about = "CocoDetection with transforms v2 on Pillow images and bit masks, batched as the others"
    batches = _in_turn(lambda index: data[index][0], len(data))
    return Loader("torchvision", package_version("torchvision") or "", batches, about)


@contextlib.contextmanager
def loaders(recipe: str, config: str, setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files and a COCO json to a training batch, in this process (no workers): a recipe's,
    detectron2's of a config where its checkout is given, torchvision's."""
    with coco(setting) as (folder, file, name):
        options = {"data.options": {"images": str(folder)}, "data.aspect_grouping": False}
        how = "Pillow's resizing, polygons"
        found = [harness.data_from_recipe(recipe, options, file, BATCH, how=how)]
        if setting.official is not None:
            found.append(_detectron2_loader(folder, file, setting.official, config))
        found.append(_torchvision_loader(folder, file))
        yield found, Work(BATCH, detail={"data": name, "crop": "640 to 800"})
