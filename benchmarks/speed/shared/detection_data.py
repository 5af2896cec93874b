"""Pipelines of papers of detection: a COCO set of drawn polygons, read by ours, detectron2 and torchvision."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Work
from benchmarks.speed.shared.detection import detectron2, detectron2_config, ellipses

BATCH = 2  # of the pictures that are loaded


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
