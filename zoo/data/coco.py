"""Sets in COCO's format: a json of images, categories and annotations beside a folder of pictures.

What lies in a folder is recognised:

- COCO's and LVIS's own layout: ``annotations/instances_train2017.json`` with ``train2017/*.jpg``;
- a json in each split's folder, beside its pictures: ``train/_annotations.coco.json``, ``valid/``, ``test/``;
- json files at the top with the pictures in ``images/`` (or ``images/<split>``), or the path of one json.

Categories are numbered 0, 1, ... in the order of their ids. Coordinates are continuous: a box (x0, y0, x1, y1) spans
pixels from x0 to x1, polygons stand as the file has them, and half a pixel is added to keypoints, which the format
counts in whole pixels.

Files of many tools are read: ids and numbers may be text. An outline that encloses nothing, run lengths of another size
or that cannot be read: the object's box stands for them, in training and in evaluation; an object whose box shows
nothing of the picture is left out of both. :attr:`CocoSource.problems` counts them. A picture is turned as its EXIF
orientation says, unless the json's height and width are those of the file as it is stored.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from zoo.data import files
from zoo.data.files import finite_numbers, whole_number
from zoo.data.lvis import with_coco_classes
from zoo.data.sources import ALIASES, EXTENSIONS, HOLD_OUT, choose_part, decode_image
from zoo.errors import ZooError
from zoo.ops.masks import run_lengths

Rle = dict[str, Any]
"""COCO's compressed run lengths: {"size": [height, width], "counts": bytes}."""

Segment = list[np.ndarray] | np.ndarray
"""An object's outline: polygons, each (points, 2) float64 x, y; or a mask (H, W) uint8."""

_MOST_SIDE = 1 << 20  # pixels
_FAR = 10  # times the picture's longer side; a polygon is drawn point by point, so that its length must be bounded
_FREQUENCIES = ("r", "c", "f")  # LVIS's classes: rare, common, frequent
OTHER_KINDS = ("captions", "panoptic", "stuff", "image_info")


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
        neg_labels, not_exhaustive_labels: of a federated set (LVIS), classes that are known not to be on it, and
            classes on it of which objects may be missing here; else None.
        frequency: (n,) int64, of each object's class: 0 rare, 1 common, 2 frequent; None where the set does not say.
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
    neg_labels: np.ndarray | None = None
    not_exhaustive_labels: np.ndarray | None = None
    frequency: np.ndarray | None = None


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


def box_outline(box: Sequence[float], height: int, width: int) -> list[np.ndarray]:
    """The polygon [(4, 2)] of what a box x0, y0, x1, y1 encloses of a picture."""
    (x, u), (y, v) = np.clip(box[0::2], 0, width).tolist(), np.clip(box[1::2], 0, height).tolist()
    return [np.array([[x, y], [u, y], [u, v], [x, v]], dtype=np.float64)]


# ------------------------------------------------------------------------------------------------------------ the split


class CocoSource:
    """A split in COCO's format, held compactly: a block of bytes that worker processes share.

    Args:
        file: the json.
        images: folder of the pictures.
        content: what the json holds, where it has been read already.
        root: the data folder, which file names must not lead out of; None: the json's.
        outside: they may.

    Attributes:
        class_names, category_ids: of the classes in order.
        keypoint_names: of the P keypoints, empty where the set has none; flip_order: (P,) which keypoint each becomes
            in a mirror.
        frequency: (K,) int64 of each class, as of :class:`Record`, or None.
        federated: whether the set says what is known on which picture.
        image_ids: (N,) int64, the ids or, where some are text, the pictures' places; sizes: (N, 2) int64 height and
            width as the json states them.
        problems: what in the json is odd but harmless, in words, with the number of cases.

    Raises:
        ZooError: no json of this format, pictures missing, an annotation of an unknown category or without a box.
    """

    def __init__(
        self,
        file: Path,
        images: Path,
        content: dict[str, Any] | None = None,
        root: Path | None = None,
        outside: bool = False,
    ) -> None:
        self.file, self.images = file, images
        self.problems: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        content = read_json(file) if content is None else content
        categories = self._by_id(content["categories"], "category")
        self._categories = {key: n for n, (key, _) in enumerate(categories)}
        self.category_ids = self._numbers(categories)
        if any("name" not in c for _, c in categories):
            raise ZooError(f"{file}: a category has no name")
        self.class_names = [str(c["name"]) for _, c in categories]
        frequencies = [str(c.get("frequency")) for _, c in categories]
        self.frequency = None
        if set(frequencies) <= set(_FREQUENCIES):
            self.frequency = np.array([_FREQUENCIES.index(f) for f in frequencies], dtype=np.int64)
        named: list[Any] = next((c["keypoints"] for _, c in categories if isinstance(c.get("keypoints"), list)), [])
        self.keypoint_names: list[str] = [str(k) for k in named]
        self.flip_order = mirror_order(self.keypoint_names)
        pictures = self._by_id(content["images"], "image")
        if not pictures:
            raise ZooError(f"{file} has no images")
        self._places = {key: n for n, (key, _) in enumerate(pictures)}
        self.image_ids = np.array(self._numbers(pictures), dtype=np.int64)
        sizes = [(whole_number(p.get("height")), whole_number(p.get("width"))) for _, p in pictures]
        if any(None in size for size in sizes):
            raise ZooError(f"{file}: an image has no height and width")
        self.sizes = np.array(sizes, dtype=np.int64)
        if (wrong := ((self.sizes < 1) | (self.sizes > _MOST_SIDE)).any(1)).any():
            height, width = self.sizes[wrong][0]
            raise ZooError(f"{file}: an image states {width}x{height} pixels")
        self.federated = all(isinstance(p.get("neg_category_ids"), list) for _, p in pictures)
        if self.federated:
            self._absent = [self._labels(p["neg_category_ids"]) for _, p in pictures]
            self._open_ended = [self._labels(p.get("not_exhaustive_category_ids")) for _, p in pictures]
        self.names = np.array(self._find_pictures([p for _, p in pictures], root, outside), dtype=np.str_)
        self._pack(content["annotations"])

    def __len__(self) -> int:
        return len(self.image_ids)

    def _by_id(self, entries: list[Any], what: str) -> list[tuple[int | str, dict[str, Any]]]:
        """Entries with their ids in the order of these: numbers, then texts that are none."""
        found: list[tuple[int | str, dict[str, Any]]] = []
        for number, entry in enumerate(entries):
            key = _key(entry.get("id")) if isinstance(entry, dict) else None
            if key is None:
                raise ZooError(f"{self.file}: {what} number {number} has no id")
            found.append((key, entry))
        if len({key for key, _ in found}) < len(found):
            raise ZooError(f"{self.file}: several {'images' if what == 'image' else 'categories'} have the same id")
        return sorted(found, key=lambda pair: (isinstance(pair[0], str), pair[0]))

    def _numbers(self, entries: list[tuple[int | str, dict[str, Any]]]) -> list[int]:
        ids = [key for key, _ in entries if isinstance(key, int)]
        return ids if len(ids) == len(entries) else list(range(len(entries)))

    def _labels(self, ids: Any) -> np.ndarray:
        """The classes of some ids of categories; (n,) int64."""
        found = [self._categories.get(_key(k)) for k in ids or ()]  # type: ignore[arg-type]
        return np.array([k for k in found if k is not None], dtype=np.int64)

    def _find_pictures(self, pictures: list[dict[str, Any]], root: Path | None, outside: bool) -> list[str]:
        """The pictures' names below `images`. Where a name's folder is another tool's, the file's own name is enough.

        Raises:
            ZooError: pictures are missing, or a name leads out of the data folder.
        """
        given = [_file_name(picture, self.file) for picture in pictures]
        there = self._listing(given, root, outside)
        plain = {os.path.basename(name): name for name in given}
        aliases = {} if len(plain) < len(given) else {n: b for b, n in plain.items() if b in there and n not in there}
        names = [aliases.get(name, name) for name in given]
        missing = [name for name in names if name not in there]
        if strange := [name for name in missing if not outside and self._leads_out(name, root)]:
            raise ZooError(
                f"{self.file}: the file_name {strange[0]!r} leads out of {root or self.file.parent};"
                " data.options.outside: true allows it"
            )
        if missing:
            raise ZooError(
                f"{len(missing)} of the {len(self)} images of {self.file} are not in {self.images}, first: {missing[0]}"
            )
        return names

    def _listing(self, names: Iterable[str], root: Path | None, outside: bool) -> set[str]:
        """What lies in the folders of some names and in `images` itself."""
        there: set[str] = set()
        for folder in {"", *map(os.path.dirname, names)}:
            if (outside or not self._leads_out(os.path.join(folder, "x"), root)) and os.path.isdir(
                self.images / folder
            ):
                try:
                    there |= {os.path.join(folder, name) for name in os.listdir(self.images / folder)}
                except OSError as error:
                    raise ZooError(f"cannot read {self.images / folder}: {files.reason(error)}") from error
        return there

    def _leads_out(self, name: str, root: Path | None) -> bool:
        full = os.path.abspath(self.images / name)
        return not any(
            full.startswith(os.path.join(os.path.abspath(p), "")) for p in (self.images, root or self.file.parent)
        )

    def _pack(self, annotations: list[Any]) -> None:
        rows: list[list[tuple[Any, ...]]] = [[] for _ in self.image_ids]
        bare = 0
        for number, a in enumerate(annotations):
            if not isinstance(a, dict):
                raise ZooError(f"{self.file}: annotation number {number} is no object of json")
            place = self._places.get(_key(a.get("image_id")))  # type: ignore[arg-type]
            if place is None:
                self.problems["annotations of images that the json does not have"] += 1
                continue
            category = self._categories.get(_key(a.get("category_id")))  # type: ignore[arg-type]
            if category is None:
                raise ZooError(
                    f"{self.file}: annotation {a.get('id')} has category_id {repr(a.get('category_id'))[:80]}, which is"
                    f" none of the {len(self._categories)} categories"
                )
            box = finite_numbers(a.get("bbox"))
            if box is None or len(box) != 4:
                raise ZooError(
                    f"{self.file}: annotation {a.get('id')} has no box of four numbers, but {repr(a.get('bbox'))[:80]}"
                )
            if not self._shows(box, place):
                continue
            area = finite_numbers([a.get("area")])
            segment = self._outline(a.get("segmentation"), place)
            bare += not a.get("segmentation")
            crowd = bool(whole_number(a.get("iscrowd"))) or a.get("iscrowd") is True
            rows[place].append(
                (
                    box,
                    category,
                    crowd,
                    area[0] if area else box[2] * box[3],
                    segment,
                    self._keypoints(a.get("keypoints")),
                )
            )
        if bare and any(row[4] is not None for some in rows for row in some):
            self.problems["objects without an outline"] += bare
        blocks = [np.frombuffer(pickle.dumps(row, protocol=5), np.uint8) for row in rows]
        self._ends = np.cumsum([len(block) for block in blocks])
        self._bytes = np.concatenate(blocks)
        # What choosing and sampling need: the classes of each picture's objects (not crowds), its labelled keypoints.
        self.labels = [np.array([r[1] for r in row if not r[2]], dtype=np.int64) for row in rows]
        self.visible_keypoints = np.array(
            [sum(v > 0 for r in row if not r[2] and r[5] for v in r[5][2::3]) for row in rows], dtype=np.int64
        )

    def _shows(self, box: list[float], place: int) -> bool:
        """Does a box show something of its picture? What is odd about it is counted."""
        height, width = self.sizes[place].tolist()
        x, y, w, h = box
        if w <= 0 or h <= 0:
            self.problems["boxes without area"] += 1
            return False
        if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            self.problems["boxes that reach more than a pixel outside their image"] += 1
        return x < width and y < height and x + w > 0 and y + h > 0

    def _outline(self, segment: Any, place: int) -> Any:
        """What can be used of a segmentation, None: nothing; what is odd about it is counted."""
        if not segment:
            return None
        height, width = self.sizes[place].tolist()
        if isinstance(segment, dict):
            problem = _rle_problem(segment, height, width)
            if problem is not None:
                self.problems[problem] += 1
                return None
            counts = segment["counts"]
            counts = [int(float(c)) for c in counts] if isinstance(counts, list) else counts
            return {"size": [height, width], "counts": counts}
        if not isinstance(segment, list):
            self.problems["outlines of an unknown kind"] += 1
            return None
        read = [_ring(points, _FAR * max(height, width)) for points in segment]
        rings = [ring for ring in read if isinstance(ring, list)]
        problems = [ring for ring in read if isinstance(ring, str)]
        if not rings:
            self.problems[problems[0]] += 1
        elif problems:
            self.problems["outlines with a part that encloses nothing"] += 1
        return rings or None

    def _keypoints(self, points: Any) -> list[float] | None:
        if not points or not self.keypoint_names:
            return None
        numbers = finite_numbers(points)
        if numbers is None or len(numbers) != 3 * len(self.keypoint_names):
            self.problems["lists of keypoints that are not three numbers each"] += 1
            return None
        return numbers

    def annotations(self, index: int) -> list[tuple[Any, ...]]:
        """(box x, y, w, h; class; crowd; area; segmentation; keypoints) of each object; None for what is of no use."""
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
        data = files.read_bytes(path)
        image = decode_image(data, path, upright=True)
        height, width = self.sizes[index].tolist()
        if tuple(image.shape[-2:]) == (width, height) != (height, width):
            image = decode_image(data, path)  # as it is stored, perhaps: what the json was made on
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
        labels = np.array([r[1] for r in rows], dtype=np.int64)
        return Record(
            image=image,
            boxes=boxes,
            labels=labels,
            crowd=np.array([r[2] for r in rows], dtype=bool),
            area=np.array([r[3] for r in rows], dtype=np.float64),
            segments=[r[4] for r in rows],
            keypoints=keypoints,
            image_id=int(self.image_ids[index]),
            path=path,
            neg_labels=self._absent[index] if self.federated else None,
            not_exhaustive_labels=self._open_ended[index] if self.federated else None,
            frequency=None if self.frequency is None else self.frequency[labels],
        )

    def read_many(self, indices: Sequence[int]) -> list[Record]:
        """Several pictures."""
        return [self.read(index) for index in indices]

    def image_counts(self) -> np.ndarray:
        """(K,) int64: on how many pictures each class has an object that is no crowd."""
        present = [np.unique(labels) for labels in self.labels]
        return np.bincount(np.concatenate(present), minlength=len(self.class_names))

    def trainable(self, keypoints: bool = False) -> np.ndarray:
        """(M,) numbers of the pictures with an object that is no crowd or, with `keypoints`, a labelled keypoint."""
        fit = self.visible_keypoints > 0 if keypoints else np.array([len(labels) > 0 for labels in self.labels])
        return fit.nonzero()[0]


def _key(value: Any) -> int | str | None:
    """An id: a number, its text, or another text; None where it is none."""
    number = whole_number(value)
    return number if number is not None else value if isinstance(value, str) and value else None


def _ring(points: Any, far: float) -> list[float] | str:
    """A polygon x, y, x, y, ... or what is wrong with it."""
    try:
        low, high, total = min(points), max(points), sum(points)  # plain numbers, nearly always
    except (TypeError, ValueError):
        if (points := finite_numbers(points)) is None or not points:
            return "outlines that are no numbers"
        low, high, total = min(points), max(points), sum(points)
    if not isinstance(points, list) or not math.isfinite(total):
        return "outlines that are no numbers"
    if len(points) < 6 or len(points) % 2:
        return "outlines of fewer than three points"
    if low < -far or high > far:
        return "outlines far outside their image"
    xs, ys = points[0::2], points[1::2]
    twice = sum(map(mul, xs, ys[1:] + ys[:1])) - sum(map(mul, ys, xs[1:] + xs[:1]))
    if abs(twice) < 1e-6 and np.linalg.matrix_rank(np.stack([xs, ys], 1) - [xs[0], ys[0]], tol=1e-6) < 2:
        return "outlines without area"
    return points


def _rle_problem(segment: dict[str, Any], height: int, width: int) -> str | None:
    size = segment.get("size")
    if not isinstance(size, list) or [whole_number(side) for side in size] != [height, width]:
        return "run lengths of another size than their image"
    runs = run_lengths(segment.get("counts"))
    if runs is None or runs.sum() != height * width:
        return "run lengths that cannot be read"
    return None if runs[1::2].any() else "outlines without area"


def mirror_order(names: Sequence[str]) -> list[int]:
    """For each of some keypoints, which one it becomes in a mirror: "left_eye" the "right_eye", "nose" itself."""
    order = []
    for n, name in enumerate(names):
        swapped = re.sub("left|right", lambda m: "right" if m[0] == "left" else "left", name)
        order.append(names.index(swapped) if swapped in names else n)
    return order


def read_json(file: Path) -> dict[str, Any]:
    """The content of a json in COCO's format.

    Raises:
        ZooError: it cannot be read, is no json, or lacks images, annotations or categories.
    """
    content = files.read_json(file)
    wanted = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in wanted):
        raise ZooError(f"{file} is not in COCO's format: it needs the lists {', '.join(wanted)}")
    if not content["categories"]:
        raise ZooError(f"{file} has no categories")
    return content


def _file_name(picture: Any, file: Path) -> str:
    picture = picture if isinstance(picture, dict) else {}
    name = picture.get("file_name")
    # LVIS v1 names no file; in v0.5 the names are those of COCO 2014.
    if (not name or "neg_category_ids" in picture) and isinstance(picture.get("coco_url"), str):
        name = "/".join(picture["coco_url"].split("/")[-2:])
    if not name or not isinstance(name, str) or "\0" in name:
        raise ZooError(f"{file}: image {picture.get('id')} has no file_name")
    return os.path.normpath(name.replace("\\", "/"))


# ------------------------------------------------------------------------------------------------------ what lies where


@dataclass
class CocoLayout:
    """The parts found in the folder `root`: {"train": json, ...}; `images` is where the user says the pictures are,
    `outside` that their names may lead out of the folder, and `coco_classes` that of LVIS's classes only COCO's are
    read (:func:`zoo.data.lvis.with_coco_classes`)."""

    root: Path
    parts: dict[str, Path]
    images: Path | None = None
    outside: bool = False
    coco_classes: bool = False
    _open: dict[str, CocoSource] = field(default_factory=dict)

    def open(self, split: str) -> tuple[CocoSource, np.ndarray]:
        """A split and which of its pictures belong to it; the rules of splits are those of :mod:`zoo.data.sources`."""
        part, which = choose_part(split, list(self.parts), str(self.root))
        if part not in self._open:
            content = read_json(self.parts[part])
            if self.coco_classes:
                content = with_coco_classes(content)
            place = self._pictures(part, content)
            self._open[part] = source = CocoSource(self.parts[part], place, content, self.root, self.outside)
            files.tell(str(self.parts[part]), source.problems)
            other = next(iter(self._open.values()))
            if other.class_names != source.class_names:
                raise ZooError(f"{source.file} has other categories than {other.file}")
        source = self._open[part]
        number = np.arange(len(source))
        held = number % HOLD_OUT == HOLD_OUT - 1
        if not held.any():
            held[-1:] = True
        return source, number if which == "all" else number[held if which == "held" else ~held]

    def _pictures(self, part: str, content: dict[str, Any]) -> Path:
        file = self.parts[part]
        name = _file_name((content["images"] or [{"file_name": "no image"}])[0], file)
        dated = re.search(r"(train|val|test)(-dev)?\d{4}", file.stem)
        below = [*([dated[0]] if dated else []), *ALIASES.get(part, ()), part, "images", ""]
        found = [self.root / folder for folder in below] + [self.root / "images" / folder for folder in below]
        places = [self.images] if self.images is not None else [file.parent, file.parent / "images", *found]
        for place in places:
            if os.path.isfile(place / name):
                return place
        # No first picture: the folder that holds others of its kind says in full how many are missing.
        for place in places:
            if place.is_dir() and any(entry.lower().endswith(EXTENSIONS) for entry in os.listdir(place)):
                return place
        raise ZooError(f"the images of {file} are not found: there is no {name} in {places[0]} nor near it")


def find_coco(
    place: str | os.PathLike[str],
    annotations: str | None = None,
    images: str | None = None,
    name: str = "instances",
    outside: bool = False,
    coco_classes: bool = False,
) -> CocoLayout:
    """What is in COCO's format at a path.

    Args:
        place: a folder or one json.
        annotations: a word of the names of the wanted json files, such as "person_keypoints"; without it those with
            `name` in theirs, or the only ones.
        images: the folder of the pictures, where it is not found by itself.
        name: of the set.
        outside: let the names of pictures lead out of the folder.
        coco_classes: of LVIS's classes only COCO's 80, in COCO's order.

    Raises:
        ZooError: nothing there, or several files for one split.
    """
    root = Path(place).expanduser()
    pictures = Path(images).expanduser() if images is not None else None
    if root.is_file() and root.suffix == ".json":
        return CocoLayout(root.parent, {"train": root}, pictures, outside, coco_classes)
    if not root.is_dir():
        raise ZooError(f"no folder {str(root)!r}")
    known = {alias: part for part, aliases in ALIASES.items() for alias in aliases}
    found: dict[str, list[Path]] = {}
    for folder, part in [(root, None), (root / "annotations", None), *((root / a, p) for a, p in known.items())]:
        for file in sorted(folder.glob("[!.]*.json")) if folder.is_dir() else []:
            found.setdefault(part or _part_of(file.stem), []).append(file)
    if not found:
        raise ZooError(f"{root} has no json of annotations, neither there nor in annotations/, train/, val/ or test/")
    parts = {part: _one(files, annotations, name) for part, files in found.items()}
    chosen = {part: file for part, file in parts.items() if file is not None}
    if not chosen:
        names = sorted({file.name for files in found.values() for file in files})
        raise ZooError(f"{root} has no annotations named {annotations!r}; it has: {', '.join(names)}")
    return CocoLayout(root, chosen, pictures, outside, coco_classes)


def _part_of(stem: str) -> str:
    return next((part for word, part in (("train", "train"), ("val", "val"), ("test", "test")) if word in stem), "all")


def _one(files: list[Path], word: str | None, name: str) -> Path | None:
    if word is not None:
        files = [file for file in files if word in file.stem]
    else:
        files = [file for file in files if not any(kind in file.stem for kind in OTHER_KINDS)]
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
