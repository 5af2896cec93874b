"""Speed of Mask R-CNN: our training step and data pipeline beside detectron2's and torchvision's, at equal settings.

Everyone trains ResNet-50-FPN with the stem and the second stage frozen and frozen BatchNorm, on the same images with
the same objects: 256 anchors and 512 regions an image are sampled, from 2000 proposals a level and 1000 an image, and
RoIAlign takes as many samples as a bin covers cells. A step is whole: backbone, proposals, matching and sampling, both
stages' heads and losses, backward, SGD. Masks to train on are polygons, as published, where the code takes such, else
bit masks. All start from the same weights, so that they propose alike.

detectron2 is a checkout (`--official`): it needs fvcore, iopath, omegaconf, hydra-core, yacs, cloudpickle, tabulate and
termcolor; its compiled module is not built, and nothing timed here calls it.
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
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import package_version
from benchmarks.speed.harness import Loader, Setting, Trainer, Work, count_flops, forever, photos, revision
from zoo.errors import ZooError

LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4
OBJECTS = 7  # an image of COCO has 7.3 on average
PACKAGES = ("fvcore", "pycocotools")
LOADING_BATCH = 2


@dataclass(frozen=True)
class Size:
    """Images and samples; `depth` and `samples` are the recipe's, but in the harness's own test."""

    height: int
    width: int
    masks: bool = True
    depth: int = 50
    samples: int = 512
    anchors: int = 256


MODELS = {
    "mask_rcnn_r50_fpn": Size(320, 480),
    "faster_rcnn_r50_fpn": Size(320, 480, masks=False),
    "mask_rcnn_r50_fpn_800": Size(800, 1216),
    "tiny": Size(64, 96, depth=18, samples=32, anchors=32),  # for the harness's own test
}
DEFAULT_MODEL = "mask_rcnn_r50_fpn"


def objects(size: Size, batch: int) -> list[dict[str, Any]]:
    """Seeded objects of each image: ellipses as boxes (N, 4), labels (N,), polygons and masks (N, H, W)."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    y, x = np.mgrid[: size.height, : size.width] + 0.5
    made = []
    for _ in range(batch):
        half = rng.uniform(0.05, 0.3, (OBJECTS, 2)) * [size.width, size.height]
        centre = half + rng.uniform(0, 1, (OBJECTS, 2)) * ([size.width, size.height] - 2 * half)
        rim = centre[:, None] + half[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        inside = [((x - c[0]) / h[0]) ** 2 + ((y - c[1]) / h[1]) ** 2 <= 1 for c, h in zip(centre, half, strict=True)]
        made.append(
            {
                "boxes": torch.from_numpy(np.concatenate([centre - half, centre + half], axis=1)).float(),
                "labels": torch.from_numpy(rng.integers(0, 80, OBJECTS)),
                "polygons": [[points.ravel()] for points in rim],
                "masks": torch.from_numpy(np.stack(inside)),
            }
        )
    return made


def calmed(network: Any) -> Any:
    """Random weights under frozen BatchNorm, which normalises nothing: the last scale of every block becomes small, or
    activations grow from block to block until the proposals are not finite."""
    for name, buffer in network.named_buffers():
        if name.endswith(("bn3.weight", "conv3.norm.weight")):
            buffer.fill_(0.1)
    return network


def _ours_network(size: Size) -> Any:
    from zoo.detection.mask_rcnn import mask_rcnn_r50_fpn

    channels = 256 if size.depth >= 50 else 64
    return mask_rcnn_r50_fpn(
        resnet={"depth": size.depth, "channels": channels, "stride_in_1x1": False},
        roi={"samples": size.samples},
        rpn={"samples": size.anchors},
        **({} if size.masks else {"mask": None}),
    )


def shared(size: Size) -> dict[str, Tensor]:
    """The weights that all start from: what they propose decides how many regions their mask heads get."""
    torch.manual_seed(0)
    return calmed(_ours_network(size)).state_dict()


def ours(size: Size, setting: Setting) -> Trainer:
    import zoo
    from zoo.training import optim

    network = _ours_network(size).to(setting.device).train()
    network.load_state_dict(shared(size))
    declared = optim.Optim(name="sgd", lr=LR, weight_decay=WEIGHT_DECAY, no_decay="norm", schedule="step")
    optimizer = optim.make_optimizer(optim.param_groups(network, declared), declared, LR, fused=True)
    targets = [
        {key: value.to(setting.device) if isinstance(value, Tensor) else value for key, value in target.items()}
        for target in objects(size, setting.batch)
    ]
    sizes = torch.tensor([[size.height, size.width]] * setting.batch)

    def loss(images: Tensor) -> Tensor:
        return torch.stack(list(network({"image": images, "size": sizes, "target": targets}).values())).sum()

    return Trainer("zoo", zoo.__version__, loss, optimizer, "zoo.detection.mask_rcnn: the step and the SGD of its task")


def official_module(checkout: Path, name: str) -> Any:
    """A module of a checkout of detectron2, without its compiled part.

    Raises:
        ZooError: no such checkout, or a package that it wants is missing.
    """
    if not (checkout / "detectron2" / "modeling").is_dir():
        raise ZooError(f"{checkout} is no checkout of facebookresearch/detectron2: it has no detectron2/modeling")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    sys.modules.setdefault("detectron2._C", types.ModuleType("detectron2._C"))
    try:
        package = importlib.import_module("detectron2")
        package._C = sys.modules["detectron2._C"]
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ZooError(f"detectron2 wants {error.name}: pip install {error.name}") from error


def official_config(size: Size, setting: Setting) -> Any:
    """detectron2's settings of the published network, with the images' and samples' sizes of this measurement."""
    assert setting.official is not None
    config = official_module(setting.official, "detectron2.config").get_cfg()
    name = "COCO-InstanceSegmentation/mask_rcnn" if size.masks else "COCO-Detection/faster_rcnn"
    config.merge_from_file(str(setting.official / "configs" / f"{name}_R_50_FPN_1x.yaml"))
    config.MODEL.DEVICE = setting.device
    config.MODEL.RESNETS.DEPTH = size.depth
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if size.depth >= 50 else 64
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False  # as torchvision's
    config.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = size.samples
    config.MODEL.RPN.BATCH_SIZE_PER_IMAGE = size.anchors
    config.MODEL.PIXEL_MEAN = [0.0, 0.0, 0.0]
    return config


def official(size: Size, setting: Setting) -> Trainer:
    from zoo.detection.mask_rcnn import convert_official

    assert setting.official is not None
    config = official_config(size, setting)
    config.SOLVER.BASE_LR = LR
    network = official_module(setting.official, "detectron2.modeling").build_model(config).train()
    weights = shared(size)
    theirs = {next(iter(convert_official({key: value}))): key for key, value in network.state_dict().items()}
    network.load_state_dict({theirs[key]: value for key, value in weights.items()})
    optimizer = official_module(setting.official, "detectron2.solver").build_optimizer(config, network)
    structures = official_module(setting.official, "detectron2.structures")
    events = official_module(setting.official, "detectron2.utils.events")
    instances = []
    for target in objects(size, setting.batch):
        found = structures.Instances((size.height, size.width))
        found.gt_boxes, found.gt_classes = structures.Boxes(target["boxes"]), target["labels"]
        if size.masks:
            found.gt_masks = structures.PolygonMasks(target["polygons"])
        instances.append(found.to(setting.device))

    def loss(images: Tensor) -> Tensor:
        with events.EventStorage():
            losses = network([{"image": x, "instances": y} for x, y in zip(images, instances, strict=True)])
        return sum(losses.values())  # type: ignore[return-value]

    about = "facebookresearch/detectron2 (its compiled module not built) with its own optimizer; polygons as masks"
    return Trainer("official", revision(setting.official), loss, optimizer, about)


def torchvision_rcnn(size: Size, setting: Setting) -> Trainer:
    """torchvision's, without its resizing of images, and with the settings of the others."""
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import MultiScaleRoIAlign

    def pool(side: int) -> MultiScaleRoIAlign:
        return MultiScaleRoIAlign(["0", "1", "2", "3"], side, sampling_ratio=0)

    backbone = resnet_fpn_backbone(backbone_name=f"resnet{size.depth}", weights=None, trainable_layers=3)
    options: dict[str, Any] = {
        "rpn_pre_nms_top_n_train": 2000,
        "rpn_post_nms_top_n_train": 1000,
        "rpn_batch_size_per_image": size.anchors,
        "box_batch_size_per_image": size.samples,
        "box_roi_pool": pool(7),
    }
    if size.masks:
        network: Any = MaskRCNN(backbone, 81, mask_roi_pool=pool(14), **options)
    else:
        network = FasterRCNN(backbone, 81, **options)
    weights = shared(size)
    for key, value in network.state_dict().items():
        name = re.sub(r"backbone\.body\.", "backbone.bottom_up.", key)
        name = re.sub(r"fpn\.inner_blocks\.(\d)", lambda found: f"lateral.c{int(found[1]) + 2}", name)
        name = re.sub(r"fpn\.layer_blocks\.(\d)", lambda found: f"output.p{int(found[1]) + 2}", name)
        name = name.replace("rpn.head.conv.0.0", "rpn.head.conv.0").replace("cls_logits", "objectness_logits")
        name = name.replace("rpn.head.bbox_pred", "rpn.head.anchor_deltas")
        if not name.startswith("roi_heads."):
            value.copy_(weights[name])
    network.to(setting.device).train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    targets = []
    for made in objects(size, setting.batch):
        target = {"boxes": made["boxes"], "labels": made["labels"] + 1}
        if size.masks:
            target["masks"] = made["masks"].to(torch.uint8)
        targets.append({key: value.to(setting.device) for key, value in target.items()})

    def loss(images: Tensor) -> Tensor:
        listed = ImageList(images, [(size.height, size.width)] * len(images))
        features = network.backbone(images)
        proposals, losses = network.rpn(listed, features, targets)
        _, more = network.roi_heads(features, proposals, listed.image_sizes, targets)
        return torch.stack([*losses.values(), *more.values()]).sum()

    version = package_version("torchvision") or ""
    about = "torchvision.models.detection without its transform, sampling_ratio 0; torch.optim.SGD; bit masks"
    return Trainer("torchvision", version, loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. detectron2 is left out where its checkout is not given."""
    size = MODELS[setting.model]
    builders: list[Callable[[], Trainer]] = [lambda: ours(size, setting)]
    if setting.official is not None:
        builders.append(lambda: official(size, setting))
    builders.append(lambda: torchvision_rcnn(size, setting))
    return [build() for build in builders]


def images(setting: Setting) -> Tensor:
    """Seeded noise (B,3,H,W): the time of a step hardly depends on what is in it."""
    size = MODELS[setting.model]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(setting.batch, 3, size.height, size.width, generator=generator).to(setting.device)


def work(setting: Setting) -> Work:
    """Measured FLOPs of the convolutions and linear layers, with a quarter of the regions under the mask head."""
    size = MODELS[setting.model]
    with torch.device("meta"):
        network: Any = _ours_network(size)
        batch = torch.empty(setting.batch, 3, size.height, size.width)

        def loss() -> Tensor:
            maps = network.backbone(batch)
            logits, deltas = network.rpn.head(list(maps.values()))
            heads = network.roi_heads
            regions = torch.empty(setting.batch * size.samples, 256, 7, 7, requires_grad=True)
            classes, boxes = heads.box_predictors[0](heads.box_heads[0](regions))
            outputs = [*logits, *deltas, classes, boxes]
            if size.masks:
                outputs.append(heads.mask_head(torch.empty(len(regions) // 4, 256, 14, 14, requires_grad=True)))
            return torch.stack([x.sum() for x in outputs]).sum()

        flops = count_flops(loss)
    detail = {"image": [size.height, size.width], "regions": size.samples, "anchors": size.anchors, "objects": OBJECTS}
    return Work(setting.batch, flops=flops, detail=detail)


# ------------------------------------------------------------------------------------------------------------ pipelines


@contextlib.contextmanager
def _coco(setting: Setting) -> Iterator[tuple[Path, Path, str]]:
    """A folder of JPEG files, a COCO json about them, and what they are: drawn polygons on photos or on noise."""
    with photos(setting, 16) as (folder, name), tempfile.TemporaryDirectory() as made:
        from PIL import Image

        rng = np.random.default_rng(0)
        pictures: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
        flat = Path(made) / "images"
        flat.mkdir()
        for index, path in enumerate(itertools.islice(sorted(folder.rglob("*.*")), 32)):
            if path.suffix.lower() not in (".jpg", ".jpeg"):
                continue
            with Image.open(path) as image:
                width, height = image.size
            (flat / f"{index}.jpg").symlink_to(path.resolve())
            pictures.append({"id": index, "file_name": f"{index}.jpg", "height": height, "width": width})
            for _ in range(OBJECTS):
                half = rng.uniform(0.05, 0.3, 2) * [width, height]
                centre = half + rng.uniform(0, 1, 2) * ([width, height] - 2 * half)
                rim = centre + half * np.stack([np.cos(angles), np.sin(angles)], axis=1)
                box = [*(centre - half).tolist(), *(2 * half).tolist()]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": int(rng.integers(1, 4)),
                        "bbox": box,
                        "area": float(math.pi * half.prod()),
                        "iscrowd": 0,
                        "segmentation": [rim.ravel().tolist()],
                    }
                )
        categories = [{"id": k, "name": f"class {k}"} for k in (1, 2, 3)]
        file = Path(made) / "instances.json"
        file.write_text(json.dumps({"images": pictures, "annotations": annotations, "categories": categories}))
        yield flat, file, f"{name} with drawn polygons"


def _zoo_loader(folder: Path, file: Path) -> Loader:
    import zoo
    from zoo.data.detection import DetectionDataModule

    module = DetectionDataModule(
        dataset=str(file), batch_size=LOADING_BATCH, channels="bgr", masks="polygon", num_workers=0, seed=0,
        aspect_grouping=False, options={"images": str(folder)},
    )  # fmt: skip
    module.setup("fit")
    about = "DetectionDataModule: Pillow's resizing, polygons"
    return Loader("zoo", zoo.__version__, forever(module.train_dataloader(), lambda batch: batch["image"]), about)


def _official_loader(folder: Path, file: Path, setting: Setting) -> Loader:
    assert setting.official is not None
    coco = official_module(setting.official, "detectron2.data.datasets.coco")
    mapper = official_module(setting.official, "detectron2.data.dataset_mapper").DatasetMapper(
        official_config(MODELS[DEFAULT_MODEL], setting), is_train=True
    )
    rows = coco.load_coco_json(str(file), str(folder))

    def batches() -> Iterator[Tensor]:
        # Its model pads and normalises the batch; so does this, for the same end.
        for first in itertools.count():
            made = [mapper(rows[(first * LOADING_BATCH + k) % len(rows)])["image"] for k in range(LOADING_BATCH)]
            yield _padded(made)

    about = "detectron2's DatasetMapper, batched and normalised as its model does"
    return Loader("official", revision(setting.official), batches(), about)


def _padded(pictures: list[Tensor]) -> Tensor:
    height, width = (32 * math.ceil(max(x.shape[axis] for x in pictures) / 32) for axis in (1, 2))
    mean = torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    batch = torch.zeros(len(pictures), 3, height, width)
    for out, picture in zip(batch, pictures, strict=True):
        out[:, : picture.shape[1], : picture.shape[2]] = picture - mean
    return batch


def _torchvision_loader(folder: Path, file: Path) -> Loader:
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    transform = v2.Compose(
        [v2.RandomShortestSize([640, 672, 704, 736, 768, 800], 1333), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    data = wrap_dataset_for_transforms_v2(
        CocoDetection(str(folder), str(file), transforms=transform), target_keys=("boxes", "labels", "masks")
    )

    def batches() -> Iterator[Tensor]:
        for first in itertools.count():
            yield _padded([data[(first * LOADING_BATCH + k) % len(data)][0] for k in range(LOADING_BATCH)])

    version = package_version("torchvision") or ""
    about = "CocoDetection with transforms v2 on Pillow images and bit masks, batched as the others"
    return Loader("torchvision", version, batches(), about)


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files and a COCO json to a training batch, in this process (no workers), ours first."""
    with _coco(setting) as (folder, file, name):
        made = [_zoo_loader(folder, file)]
        if setting.official is not None:
            made.append(_official_loader(folder, file, setting))
        made.append(_torchvision_loader(folder, file))
        yield made, Work(LOADING_BATCH, detail={"data": name, "crop": "640 to 800"})
