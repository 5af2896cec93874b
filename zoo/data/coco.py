"""Sets in COCO's format: a json of images, categories and annotations beside a folder of pictures.

What lies in a folder is recognised:

- COCO's and LVIS's own layout: ``annotations/instances_train2017.json`` with ``train2017/*.jpg``;
- a json in each split's folder, beside its pictures: ``train/_annotations.coco.json``, ``valid/``, ``test/``;
- json files at the top with the pictures in ``images/`` (or ``images/<split>``), or the path of one json.

Categories are numbered 0, 1, ... in the order of their ids. Coordinates are continuous: a box (x0, y0, x1, y1) spans
pixels from x0 to x1, polygons stand as the file has them, and half a pixel is added to keypoints, which the format
counts in whole pixels.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from zoo.data.sources import ALIASES, EXTENSIONS, HOLD_OUT, choose_part, read_image
from zoo.errors import ZooError

Rle = dict[str, Any]
"""COCO's compressed run lengths: {"size": [height, width], "counts": bytes}."""

Segment = list[np.ndarray] | np.ndarray
"""An object's outline: polygons, each (points, 2) float64 x, y; or a mask (H, W) uint8."""

_OTHER_KINDS = ("captions", "panoptic", "stuff", "image_info")


@dataclass
class Record:
    """A picture and the n objects on it, as they are stored.

    Attributes:
        image: (3, H, W) uint8 RGB.
        boxes: (n, 4) float64 x0, y0, x1, y1.
        labels: (n,) int64 from 0.
        crowd: (n,) bool: a group that was not told apart.
        area: (n,) float64, pixels of the object.
        segments: of each object what the set has: polygons [[x, y, x, y, ...], ...], run lengths, or a (H, W) uint8
            mask; None where it has none.
        keypoints: (n, P, 3) float64 x, y, visibility (0 not labelled, 1 hidden, 2 visible), or None.
        image_id: the set's number of the picture.
        path: its file, "" where it was drawn.
    """

    image: Tensor
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    segments: list[Any]
    keypoints: np.ndarray | None
    image_id: int
    path: str = ""


# ---------------------------------------------------------------------------------------------------------- run lengths


def to_rle(segment: Any, height: int, width: int) -> Rle:
    """Any of COCO's forms of a segmentation as compressed run lengths, as ``COCO.annToRLE`` makes it."""
    if isinstance(segment, np.ndarray):
        return coco_mask.encode(np.asfortranarray(segment))
    if isinstance(segment, list):
        return coco_mask.merge(coco_mask.frPyObjects(segment, height, width))
    if isinstance(segment["counts"], list):
        return coco_mask.frPyObjects(segment, height, width)
    return segment


# ------------------------------------------------------------------------------------------------------------ the split


class CocoSource:
    """A split in COCO's format, held compactly: a block of bytes that worker processes share.

    Args:
        file: the json.
        images: folder of the pictures.
        indices: only these of its pictures, in the order of their ids.

    Attributes:
        class_names, category_ids: of the classes in order.
        keypoint_names: of the P keypoints, empty where the set has none; flip_order: (P,) which keypoint each becomes
            in a mirror.
        image_ids: (N,) int64; sizes: (N, 2) int64 height and width as the json states them.
        problems: what in the json is odd but harmless, in words, with the number of cases.

    Raises:
        ZooError: no json of this format, pictures missing, an annotation of an unknown category or without a box.
    """

    def __init__(self, file: Path, images: Path) -> None:
        self.file, self.images = file, images
        content = _content(file)
        categories = sorted(content["categories"], key=lambda c: c["id"])
        self.category_ids = [int(c["id"]) for c in categories]
        self.class_names = [str(c["name"]) for c in categories]
        named = next((c for c in categories if c.get("keypoints")), None)
        self.keypoint_names: list[str] = [str(k) for k in named["keypoints"]] if named else []
        self.flip_order = mirror_order(self.keypoint_names)
        pictures = sorted(content["images"], key=lambda image: image["id"])
        if not pictures:
            raise ZooError(f"{file} has no images")
        self.image_ids = np.array([int(p["id"]) for p in pictures], dtype=np.int64)
        try:
            self.sizes = np.array([(int(p["height"]), int(p["width"])) for p in pictures], dtype=np.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise ZooError(f"{file}: an image has no height and width") from error
        self.names = np.array([_file_name(p, file) for p in pictures], dtype=np.str_)
        self._require_pictures()
        self.problems: Counter[str] = Counter()
        self._pack(content["annotations"])

    def __len__(self) -> int:
        return len(self.image_ids)

    def _require_pictures(self) -> None:
        folders = {os.path.dirname(name) for name in self.names.tolist()}
        there = set()
        for folder in folders:
            if (self.images / folder).is_dir():
                there |= {os.path.join(folder, name) for name in os.listdir(self.images / folder)}
        missing = [name for name in self.names.tolist() if name not in there]
        if missing:
            raise ZooError(
                f"{len(missing)} of the {len(self)} images of {self.file} are not in {self.images}, first: {missing[0]}"
            )

    def _pack(self, annotations: list[dict[str, Any]]) -> None:
        number = {int(i): n for n, i in enumerate(self.image_ids)}
        if len(number) < len(self.image_ids):
            raise ZooError(f"{self.file}: several images have the same id")
        category = {i: n for n, i in enumerate(self.category_ids)}
        rows: list[list[tuple[Any, ...]]] = [[] for _ in self.image_ids]
        for a in annotations:
            place = number.get(a.get("image_id", -1))
            if place is None:
                self.problems["annotations of images that the json does not have"] += 1
                continue
            if a.get("category_id") not in category:
                raise ZooError(
                    f"{self.file}: annotation {a.get('id')} has category_id {a.get('category_id')!r}, which is none of"
                    f" the {len(category)} categories"
                )
            box = a.get("bbox")
            if not isinstance(box, list) or len(box) != 4 or not all(map(math.isfinite, box)):
                raise ZooError(f"{self.file}: annotation {a.get('id')} has no box of four numbers, but {box!r}")
            self._look_at(a, box, place)
            area = float(a["area"]) if "area" in a else float(box[2] * box[3])
            rows[place].append(
                (box, category[a["category_id"]], bool(a.get("iscrowd", 0)), area, a.get("segmentation") or None,
                 a.get("keypoints"))
            )  # fmt: skip
        blocks = [np.frombuffer(pickle.dumps(row, protocol=5), np.uint8) for row in rows]
        self._ends = np.cumsum([len(block) for block in blocks])
        self._bytes = np.concatenate(blocks)
        # What choosing and sampling need: the classes of each picture's objects (not crowds), its labelled keypoints.
        self.labels = [np.array([r[1] for r in row if not r[2]], dtype=np.int64) for row in rows]
        self.visible_keypoints = np.array(
            [sum(v > 0 for r in row if not r[2] and r[5] for v in r[5][2::3]) for row in rows], dtype=np.int64
        )

    def _look_at(self, annotation: dict[str, Any], box: list[float], place: int) -> None:
        height, width = self.sizes[place]
        x, y, w, h = box
        if w <= 0 or h <= 0:
            self.problems["boxes without area"] += 1
        elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            self.problems["boxes that reach more than a pixel outside their image"] += 1
        segment = annotation.get("segmentation")
        if isinstance(segment, list) and segment and not any(len(p) >= 6 and len(p) % 2 == 0 for p in segment):
            self.problems["outlines of fewer than three points"] += 1

    def annotations(self, index: int) -> list[tuple[Any, ...]]:
        """(box x, y, w, h; class; crowd; area; segmentation; keypoints) of each object, as the json has them."""
        start = self._ends[index - 1] if index else 0
        return pickle.loads(self._bytes[start : self._ends[index]].data)  # our own bytes

    def path(self, index: int) -> str:
        """The picture's file."""
        return os.path.join(self.images, str(self.names[index]))

    def read(self, index: int) -> Record:
        """The picture, upright, and its objects.

        Raises:
            ZooError: the file cannot be read, or is of another size than the json says.
        """
        path = self.path(index)
        image = read_image(path, upright=True)
        height, width = self.sizes[index]
        if tuple(image.shape[-2:]) != (height, width):
            raise ZooError(
                f"{path} is {image.shape[-1]}x{image.shape[-2]} pixels, but {self.file.name} says {width}x{height}"
            )
        rows = self.annotations(index)
        boxes = np.array([r[0] for r in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        keypoints = None
        if self.keypoint_names:
            flat = [r[5] or [0] * (3 * len(self.keypoint_names)) for r in rows]
            keypoints = np.array(flat, dtype=np.float64).reshape(len(rows), -1, 3)
            keypoints[..., :2] += 0.5
        return Record(
            image=image,
            boxes=boxes,
            labels=np.array([r[1] for r in rows], dtype=np.int64),
            crowd=np.array([r[2] for r in rows], dtype=bool),
            area=np.array([r[3] for r in rows], dtype=np.float64),
            segments=[r[4] for r in rows],
            keypoints=keypoints,
            image_id=int(self.image_ids[index]),
            path=path,
        )

    def read_many(self, indices: Sequence[int]) -> list[Record]:
        """Several pictures."""
        return [self.read(index) for index in indices]

    def trainable(self, keypoints: bool = False) -> np.ndarray:
        """(M,) numbers of the pictures with an object that is no crowd or, with `keypoints`, a labelled keypoint."""
        fit = self.visible_keypoints > 0 if keypoints else np.array([len(labels) > 0 for labels in self.labels])
        return fit.nonzero()[0]


def mirror_order(names: Sequence[str]) -> list[int]:
    """For each of some keypoints, which one it becomes in a mirror: "left_eye" the "right_eye", "nose" itself."""
    order = []
    for n, name in enumerate(names):
        swapped = re.sub("left|right", lambda m: "right" if m[0] == "left" else "left", name)
        order.append(names.index(swapped) if swapped in names else n)
    return order


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ZooError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ZooError(f"{file} is no json: {error}") from error
    wanted = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in wanted):
        raise ZooError(f"{file} is not in COCO's format: it needs the lists {', '.join(wanted)}")
    if not content["categories"]:
        raise ZooError(f"{file} has no categories")
    return content


def _file_name(picture: dict[str, Any], file: Path) -> str:
    name = picture.get("file_name")
    if not name and picture.get("coco_url"):  # LVIS names no file
        name = "/".join(picture["coco_url"].split("/")[-2:])
    if not name:
        raise ZooError(f"{file}: image {picture.get('id')} has no file_name")
    return os.path.normpath(str(name))


# ------------------------------------------------------------------------------------------------------ what lies where


@dataclass
class CocoLayout:
    """The parts found in the folder `root`: {"train": json, ...}; `images` is where the user says the pictures are."""

    root: Path
    parts: dict[str, Path]
    images: Path | None = None
    _open: dict[str, CocoSource] = field(default_factory=dict)

    def open(self, split: str) -> tuple[CocoSource, np.ndarray]:
        """A split and which of its pictures belong to it; the rules of splits are those of :mod:`zoo.data.sources`."""
        part, which = choose_part(split, list(self.parts), str(self.root))
        if part not in self._open:
            self._open[part] = source = CocoSource(self.parts[part], self._pictures(part))
            other = next(iter(self._open.values()))
            if other.class_names != source.class_names:
                raise ZooError(f"{source.file} has other categories than {other.file}")
        source = self._open[part]
        number = np.arange(len(source))
        held = number % HOLD_OUT == HOLD_OUT - 1
        if not held.any():
            held[-1:] = True
        return source, number if which == "all" else number[held if which == "held" else ~held]

    def _pictures(self, part: str) -> Path:
        file = self.parts[part]
        name = _file_name((_content(file)["images"] or [{"file_name": "no image"}])[0], file)
        dated = re.search(r"(train|val|test)(-dev)?\d{4}", file.stem)
        below = [*([dated[0]] if dated else []), *ALIASES.get(part, ()), part, "images", ""]
        found = [self.root / folder for folder in below] + [self.root / "images" / folder for folder in below]
        places = [self.images] if self.images is not None else [file.parent, file.parent / "images", *found]
        for place in places:
            if (place / name).is_file():
                return place
        # No first picture: the folder that holds others of its kind says in full how many are missing.
        for place in places:
            if place.is_dir() and any(entry.lower().endswith(EXTENSIONS) for entry in os.listdir(place)):
                return place
        raise ZooError(f"the images of {file} are not found: there is no {name} in {places[0]} nor near it")


def find_coco(
    place: str | os.PathLike[str], annotations: str | None = None, images: str | None = None, name: str = "instances"
) -> CocoLayout:
    """What is in COCO's format at a path.

    Args:
        place: a folder or one json.
        annotations: a word of the names of the wanted json files, such as "person_keypoints"; without it those with
            `name` in theirs, or the only ones.
        images: the folder of the pictures, where it is not found by itself.
        name: of the set.

    Raises:
        ZooError: nothing there, or several files for one split.
    """
    root = Path(place).expanduser()
    pictures = Path(images).expanduser() if images is not None else None
    if root.is_file() and root.suffix == ".json":
        return CocoLayout(root.parent, {"train": root}, pictures)
    if not root.is_dir():
        raise ZooError(f"no folder {str(root)!r}")
    known = {alias: part for part, aliases in ALIASES.items() for alias in aliases}
    found: dict[str, list[Path]] = {}
    for folder, part in [(root, None), (root / "annotations", None), *((root / a, p) for a, p in known.items())]:
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            found.setdefault(part or _part_of(file.stem), []).append(file)
    if not found:
        raise ZooError(f"{root} has no json of annotations, neither there nor in annotations/, train/, val/ or test/")
    parts = {part: _one(files, annotations, name) for part, files in found.items()}
    chosen = {part: file for part, file in parts.items() if file is not None}
    if not chosen:
        names = sorted({file.name for files in found.values() for file in files})
        raise ZooError(f"{root} has no annotations named {annotations!r}; it has: {', '.join(names)}")
    return CocoLayout(root, chosen, pictures)


def _part_of(stem: str) -> str:
    return next((part for word, part in (("train", "train"), ("val", "val"), ("test", "test")) if word in stem), "all")


def _one(files: list[Path], word: str | None, name: str) -> Path | None:
    if word is not None:
        files = [file for file in files if word in file.stem]
    else:
        files = [file for file in files if not any(kind in file.stem for kind in _OTHER_KINDS)]
        for preferred in (name, "instances"):
            files = [file for file in files if preferred in file.stem] or files
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ZooError(f"several annotations of one split: {names}; say which by data.options.annotations")
    return files[0] if files else None


def repeat_factors(labels: Sequence[np.ndarray], threshold: float) -> Tensor:
    """How often each picture should come so that rare classes are seen (Gupta et al. 2019, LVIS, appendix B.2).

    r(class) = max(1, sqrt(threshold / share of pictures with the class)), r(picture) = the largest of its classes.

    Args:
        labels: the classes on each picture, once or more.
        threshold: the share of pictures below which a class is rare.

    Returns:
        (N,) float64, at least 1.
    """
    present = [np.unique(row) for row in labels]
    seen = Counter(int(label) for row in present for label in row)
    rate = {k: max(1.0, math.sqrt(threshold * len(present) / count)) for k, count in seen.items()}
    return torch.tensor([max((rate[int(k)] for k in row), default=1.0) for row in present], dtype=torch.float64)
