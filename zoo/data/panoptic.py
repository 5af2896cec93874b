"""Panoptic truth: every pixel belongs to one segment, a thing or a region of stuff, or to none.

Sets that give it: COCO's panoptic format (a json beside a folder of PNGs whose colour is the segment's id, R + 256 G +
65536 B), Cityscapes as it is downloaded (``leftImg8bit/`` beside ``gtFine/``), and the embedded world.

Categories stand in the order of their ids. A thing's label is its place among the things, as a detector counts classes.
A pixel's semantic label is, in the scheme "all", the place of its category among all; in the scheme "separated", 0 for
every thing and 1, 2, ... for the kinds of stuff (what detectron2 calls separated); 255 where nothing is known.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.data import files
from zoo.data.coco import CocoLayout, CocoSource, Record, find_coco, read_json
from zoo.data.files import finite_numbers, whole_number
from zoo.data.sources import choose_part, decode_image
from zoo.errors import ZooError, unknown

SCHEMES = ("separated", "all")
_IDS = 1 << 24
_IGNORED = 255


@dataclass(frozen=True)
class PanopticClasses:
    """The categories of a set, in the order of their ids.

    Args:
        names: of all.
        things: which of them are things.
        scheme: of semantic labels, "separated" or "all"; see the module.
        ids: the set's own numbers of them; empty: 1, 2, ...
    """

    names: tuple[str, ...]
    things: tuple[bool, ...]
    scheme: str = "separated"
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise unknown("scheme of semantic labels", self.scheme, SCHEMES)
        if len(self.names) >= _IGNORED:
            raise ZooError(f"{len(self.names)} categories, but labels of pixels go up to {_IGNORED - 1}")

    @property
    def thing_names(self) -> list[str]:
        """Of a detector's classes."""
        return [name for name, thing in zip(self.names, self.things, strict=True) if thing]

    @property
    def semantic_names(self) -> list[str]:
        """Of the semantic labels."""
        if self.scheme == "all":
            return list(self.names)
        return ["things", *(name for name, thing in zip(self.names, self.things, strict=True) if not thing)]

    @property
    def thing_labels(self) -> tuple[int, ...]:
        """The semantic labels that stand for things."""
        return (0,) if self.scheme == "separated" else tuple(np.flatnonzero(self.things).tolist())

    def place(self, thing: bool, label: int) -> int:
        """The category of a thing's label, or of a semantic label of stuff."""
        at = np.flatnonzero((np.array(self.things, bool) == thing) & (self.labels() == label))
        if len(at) != 1:
            raise ZooError(f"no {'thing' if thing else 'stuff'} has the label {label}")
        return int(at[0])

    def facts(self) -> dict[str, Any]:
        """In plain types; `PanopticClasses.of` takes them back."""
        return {
            "names": list(self.names),
            "things": [bool(thing) for thing in self.things],
            "scheme": self.scheme,
            "ids": [int(number) for number in self.ids],
        }

    @classmethod
    def of(cls, facts: Any) -> PanopticClasses:
        """What :meth:`facts` gave.

        Raises:
            ZooError: it is something else.
        """
        try:
            names, things, ids = (tuple(facts[key]) for key in ("names", "things", "ids"))
            plain = all(isinstance(n, str) for n in names) and all(isinstance(n, int) for n in (*things, *ids))
            if not plain or len(things) != len(names) or len(ids) not in (0, len(names)):
                raise ValueError
            return cls(names, things, str(facts["scheme"]), ids)
        except (KeyError, TypeError, ValueError) as error:
            raise ZooError(f"no names of panoptic categories: {str(facts)[:80]}") from error

    def semantic(self) -> np.ndarray:
        """(n,) the semantic label of each category."""
        things = np.array(self.things, bool)
        return np.arange(len(things)) if self.scheme == "all" else np.where(things, 0, np.cumsum(~things))

    def labels(self) -> np.ndarray:
        """(n,) of a thing its place among the things, of stuff its semantic label."""
        things = np.array(self.things, bool)
        return np.where(things, np.cumsum(things) - 1, self.semantic())


@dataclass
class Panoptic:
    """What a picture shows.

    Attributes:
        ids: (H, W) int32, the segment of each pixel; 0 for none.
        segments: (n, 4) int64: id, category, 1 for a crowd, pixels.
    """

    ids: np.ndarray
    segments: np.ndarray

    def semantic(self, classes: PanopticClasses) -> np.ndarray:
        """(H, W) uint8 semantic labels."""
        return _painted(self.ids, self.segments[:, 0], classes.semantic()[self.segments[:, 1]])

    def truth(self, classes: PanopticClasses) -> dict[str, torch.Tensor]:
        """What metrics want: `ids` (H, W) int32 and `segments` (n, 5) int64: id, 1 for a thing, its label or the
        semantic label, 1 for a crowd, pixels."""
        number, category, crowd, area = self.segments.T
        thing = np.array(classes.things, np.int64)[category]
        rows = np.stack([number, thing, classes.labels()[category], crowd, area], 1)
        return {"ids": torch.from_numpy(self.ids), "segments": torch.from_numpy(rows)}


_TABLE: list[np.ndarray] = []  # of every id its label: one for the process, since it is large


def _painted(ids: np.ndarray, numbers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(H, W) uint8 label of the segment `ids` (H, W); 255 for those that are not among `numbers` (n,)."""
    if not _TABLE:
        _TABLE.append(np.full(_IDS, _IGNORED, np.uint8))
    table = _TABLE[0]
    table[numbers] = labels
    painted = table[ids]
    table[numbers] = _IGNORED
    return painted


# -------------------------------------------------------------------------------------------------------- COCO's format


def ids_of(colours: np.ndarray) -> np.ndarray:
    """(H, W) int32 ids of the colours (3, H, W) uint8 of a panoptic PNG."""
    red, green, blue = colours.astype(np.int32)
    return red + (green << 8) + (blue << 16)


def colours_of(ids: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 colours of ids (H, W) below 2 to the 24th."""
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], -1).astype(np.uint8)


def coco_panoptic(results: Sequence[dict[str, Any]], classes: PanopticClasses) -> dict[str, Any]:
    """The content of a json in COCO's panoptic format, of files that were parted into segments.

    Args:
        results: {"image", "height", "width", "map", "segments": [{"id", "thing", "index", "area"}]} of each file; those
            with an "error" are left out. The file's name without its ending is the picture's id where it is a number.
        classes: the categories.
    """
    ids = classes.ids or tuple(range(1, len(classes.names) + 1))
    images, annotations = [], []
    for n, row in enumerate(results):
        if "error" in row:
            continue
        stem = Path(row["image"]).stem
        number = int(stem) if stem.isdecimal() else n
        images.append({"id": number, "file_name": Path(row["image"]).name, **{k: row[k] for k in ("height", "width")}})
        segments = []
        for one in row["segments"]:
            category = ids[classes.place(one["thing"], one["index"])]
            segments.append({"id": one["id"], "category_id": category, "area": one["area"], "iscrowd": 0})
        annotations.append({"image_id": number, "file_name": Path(row["map"]).name, "segments_info": segments})
    names = zip(ids, classes.names, classes.things, strict=True)
    categories = [{"id": number, "name": name, "isthing": int(thing)} for number, name, thing in names]
    return {"images": images, "annotations": annotations, "categories": categories}


class PanopticSource(CocoSource):
    """A split in COCO's panoptic format. Its objects are the segments of things or, where there is such a file too,
    those of COCO's instances of the same pictures, which have polygons.

    Args:
        file: the panoptic json.
        images: folder of the pictures.
        maps: folder of the PNGs.
        content: what the json holds.
        instances: what the json of instances holds; None: there is none.
        root, outside: as of :class:`~zoo.data.coco.CocoSource`.

    Attributes:
        category_names, things, panoptic_ids: of all categories, in the order of their ids.

    Raises:
        ZooError: as of CocoSource; a category that does not say whether it is a thing, a picture without segments, a
            segment of no known category, other things than the instances have.
    """

    def __init__(
        self,
        file: Path,
        images: Path,
        maps: Path,
        content: dict[str, Any],
        instances: dict[str, Any] | None = None,
        root: Path | None = None,
        outside: bool = False,
    ) -> None:
        self.file, self.maps = file, maps
        known = sorted(_categories(content, file), key=lambda row: row[0])
        places = {number: n for n, (number, _, _) in enumerate(known)}
        self.category_names, self.things = [name for _, name, _ in known], [thing for _, _, thing in known]
        self.panoptic_ids = list(places)
        rows = {}
        for entry in content["annotations"]:
            if not isinstance(entry, dict) or not isinstance(entry.get("segments_info"), list):
                raise ZooError(f"{file}: an annotation has no segments_info, which the panoptic format wants")
            rows[whole_number(entry.get("image_id"))] = entry
        objects = _objects(content, instances, rows, file)
        super().__init__(file, images, objects, root, outside)
        own = PanopticClasses(tuple(self.category_names), tuple(self.things)).thing_names
        if self.class_names != own:
            raise ZooError(f"{file}: its things are other categories than those of the instances beside it")
        if missing := [int(number) for number in self.image_ids if number not in rows]:
            raise ZooError(f"{file}: image {missing[0]} has no annotation")
        found = [_segments(rows[int(number)], places, file) for number in self.image_ids]
        self._ends_of_segments = np.cumsum([len(one) for one in found])
        self._segments = np.concatenate(found)
        self._maps = np.array([_map_name(rows[int(number)], file) for number in self.image_ids], dtype=np.str_)

    def _outline(self, segment: Any, place: int) -> Any:
        return segment if isinstance(segment, dict) and "id" in segment else super()._outline(segment, place)

    def panoptic(self, index: int) -> Panoptic:
        """The segments of a picture.

        Raises:
            ZooError: the PNG is missing or of another size, or has segments that the json does not know.
        """
        path = str(self.maps / str(self._maps[index]))
        colours = decode_image(files.read_bytes(path), path).numpy()
        if colours.shape[1:] != tuple(self.sizes[index]):
            height, width = self.sizes[index]
            raise ZooError(
                f"{path} is {colours.shape[2]}x{colours.shape[1]} pixels, but {self.file.name} says {width}x{height}"
            )
        start = self._ends_of_segments[index - 1] if index else 0
        return Panoptic(ids_of(colours), self._segments[start : self._ends_of_segments[index]])

    def read(self, index: int) -> Record:
        record = super().read(index)
        if tuple(record.image.shape[1:]) != tuple(self.sizes[index]):
            raise ZooError(f"{record.path} is turned by its EXIF orientation, which a panoptic map is not")
        record.panoptic = panoptic = self.panoptic(index)
        record.segments = [
            (panoptic.ids == one["id"]).astype(np.uint8) if isinstance(one, dict) and "id" in one else one
            for one in record.segments
        ]
        return record

    def trainable(self, keypoints: bool = False) -> np.ndarray:
        """All pictures: those without objects have stuff."""
        return super().trainable(True) if keypoints else np.arange(len(self))


def _categories(content: dict[str, Any], file: Path) -> Iterable[tuple[int, str, bool]]:
    for entry in content["categories"]:
        number, thing = whole_number(entry.get("id")), entry.get("isthing") if isinstance(entry, dict) else None
        if number is None or thing not in (0, 1) or "name" not in entry:
            raise ZooError(f"{file}: a category lacks id, name or isthing, which the panoptic format wants")
        yield number, str(entry["name"]), bool(thing)


def _segments(entry: dict[str, Any], places: dict[int, int], file: Path) -> np.ndarray:
    """(n, 4) id, category, crowd and area of a picture's segments."""
    rows = []
    for segment in entry["segments_info"]:
        number, category = (whole_number(segment.get(key)) for key in ("id", "category_id"))
        area = finite_numbers([segment.get("area")])
        if number is None or not 0 < number < _IDS or category not in places or area is None:
            raise ZooError(
                f"{file}: image {entry.get('image_id')} has a segment without an id, an area or a known category_id:"
                f" {str(segment)[:80]}"
            )
        rows.append((number, places[category], int(bool(segment.get("iscrowd"))), int(area[0])))
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _objects(
    content: dict[str, Any], instances: dict[str, Any] | None, rows: dict[Any, dict[str, Any]], file: Path
) -> dict[str, Any]:
    """The objects of the panoptic json's pictures in COCO's format of instances."""
    if instances is not None:
        annotations = [a for a in instances["annotations"] if whole_number(a.get("image_id")) in rows]
        return {"images": content["images"], "categories": instances["categories"], "annotations": annotations}
    categories = [c for c in content["categories"] if c["isthing"]]
    things = {c["id"] for c in categories}
    annotations = [
        {**segment, "image_id": image, "segmentation": {"id": segment.get("id")}}
        for image, entry in rows.items()
        for segment in entry["segments_info"]
        if segment.get("category_id") in things
    ]
    return {"images": content["images"], "categories": categories, "annotations": annotations}


def _map_name(entry: dict[str, Any], file: Path) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name or os.path.basename(name) != name:
        raise ZooError(f"{file}: the annotation of image {entry.get('image_id')} names no PNG: {str(name)[:80]!r}")
    return name


@dataclass
class PanopticLayout(CocoLayout):
    """The panoptic parts of a folder, and the instances beside them."""

    instances: dict[str, Path] = field(default_factory=dict)

    def source(self, part: str, content: dict[str, Any]) -> CocoSource:
        file = self.parts[part]
        instances = read_json(self.instances[part]) if part in self.instances else None
        name = _map_name((content["annotations"] or [{}])[0], file)
        places = [file.parent / file.stem, self.root / file.stem, file.parent / "panoptic", self.root / "panoptic"]
        maps = next((place for place in places if (place / name).is_file()), None)
        if maps is None:
            raise ZooError(f"the PNGs of {file} are not found: there is no {name} in {places[0]} nor near it")
        images = self._pictures(part, content)
        return PanopticSource(file, images, maps, content, instances, self.root, self.outside)


def find_panoptic(
    place: str | os.PathLike[str],
    annotations: str | None = None,
    images: str | None = None,
    outside: bool = False,
) -> PanopticLayout | CityscapesLayout:
    """What of a folder has panoptic truth: Cityscapes, or json files with "panoptic" (or `annotations`) in their names.

    Instances of the same split, in json files with "instances" in their names, are used beside it.

    Raises:
        ZooError: nothing there, or several files for one split.
    """
    root = Path(place).expanduser()
    if is_cityscapes(root):
        return find_cityscapes(root)
    found = find_coco(place, annotations or "panoptic", images, outside=outside)
    layout = PanopticLayout(found.root, found.parts, found.images, outside)
    if root.is_dir():
        folders = [file.parent for file in found.parts.values()]
        if any(file for folder in folders for file in folder.glob("*instances*.json")):
            layout.instances = {
                part: file for part, file in find_coco(place, "instances", images).parts.items() if part in found.parts
            }
    return layout


# ----------------------------------------------------------------------------------------------------------- Cityscapes

# Label ids of the 19 classes that are evaluated, in the order of their training ids.
_CITY_LABELS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITY_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
CITY_THINGS = (False,) * 11 + (True,) * 8


def is_cityscapes(root: Path) -> bool:
    """Is it the folder of Cityscapes as it is downloaded?"""
    return (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir()


class CityscapesSource:
    """A split of Cityscapes with its fine annotations. Boxes are tight around the masks; groups that were not told
    apart are crowds, and what is not evaluated is nothing.

    Args:
        pictures: the ``*_leftImg8bit.png`` files.
        root: the folder of the set.
    """

    def __init__(self, pictures: Sequence[Path], root: Path) -> None:
        self.pictures, self.root = list(pictures), root
        self.category_names, self.things = list(CITY_NAMES), list(CITY_THINGS)
        self.class_names = [name for name, thing in zip(CITY_NAMES, CITY_THINGS, strict=True) if thing]
        self.keypoint_names: list[str] = []
        self.flip_order: list[int] = []

    def __len__(self) -> int:
        return len(self.pictures)

    def panoptic(self, index: int) -> Panoptic:
        """The segments of a picture: ids are those of ``*_gtFine_instanceIds.png``, label or 1000 x label + number."""
        from PIL import Image

        picture = self.pictures[index]
        name = picture.name.replace("_leftImg8bit.png", "_gtFine_instanceIds.png")
        path = self.root / "gtFine" / picture.parent.relative_to(self.root / "leftImg8bit") / name
        try:
            with Image.open(path) as opened:
                ids = np.array(opened).astype(np.int32)
        except OSError as error:
            raise ZooError(f"cannot read {path}: {files.reason(error)}") from error
        numbers, counts = np.unique(ids, return_counts=True)
        rows = []
        for number, area in zip(numbers.tolist(), counts.tolist(), strict=True):
            label = number if number < 1000 else number // 1000
            if label in _CITY_LABELS:
                category = _CITY_LABELS.index(label)
                rows.append((number, category, int(number < 1000 and CITY_THINGS[category]), area))
        segments = np.array(rows, dtype=np.int64).reshape(-1, 4)
        known = np.isin(ids, segments[:, 0])
        return Panoptic(np.where(known, ids, 0), segments)

    def read(self, index: int) -> Record:
        """A picture and its objects.

        Raises:
            ZooError: a file cannot be read, or the two are not of one size.
        """
        path = str(self.pictures[index])
        image = decode_image(files.read_bytes(path), path)
        panoptic = self.panoptic(index)
        if panoptic.ids.shape != tuple(image.shape[1:]):
            raise ZooError(f"{path} and its annotation are not of one size")
        return record_of(image, panoptic, CITY_THINGS, index, path)

    def read_many(self, indices: Sequence[int]) -> list[Record]:
        """Several pictures."""
        return [self.read(index) for index in indices]


def record_of(image: torch.Tensor, panoptic: Panoptic, things: Sequence[bool], image_id: int, path: str = "") -> Record:
    """A picture whose objects are the segments of things."""
    labels = np.cumsum(things) - 1
    rows = panoptic.segments[np.array(things, bool)[panoptic.segments[:, 1]]]
    masks = [(panoptic.ids == number).astype(np.uint8) for number in rows[:, 0]]
    boxes = []
    for mask in masks:
        y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([x[0], y[0], x[-1] + 1, y[-1] + 1])
    return Record(
        image=image,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=labels[rows[:, 1]].astype(np.int64),
        crowd=rows[:, 2] > 0,
        area=np.array([mask.sum() for mask in masks], dtype=np.float64),
        segments=list(masks),
        keypoints=None,
        image_id=image_id,
        path=path,
        panoptic=panoptic,
    )


@dataclass
class CityscapesLayout:
    """The splits of Cityscapes that have annotations: {"train": pictures, ...}."""

    root: Path
    parts: dict[str, list[Path]]

    def open(self, split: str) -> tuple[CityscapesSource, np.ndarray]:
        """A split, whole; see :func:`zoo.data.sources.choose_part`."""
        part, which = choose_part(split, list(self.parts), str(self.root))
        if which != "all":
            raise ZooError(f"{self.root} has the split {part} alone; Cityscapes has train and val")
        source = CityscapesSource(self.parts[part], self.root)
        return source, np.arange(len(source))


def find_cityscapes(root: Path) -> CityscapesLayout:
    """The annotated splits train and val in a folder of Cityscapes.

    Raises:
        ZooError: none is there.
    """
    parts = {}
    for part in ("train", "val"):
        pictures = sorted((root / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"))
        if pictures and (root / "gtFine" / part).is_dir():
            parts[part] = pictures
    if not parts:
        raise ZooError(f"{root} has neither train nor val of Cityscapes in leftImg8bit/ and gtFine/")
    return CityscapesLayout(root, parts)
