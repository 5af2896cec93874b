"""Sets in PASCAL VOC's format: an XML file a picture, lists of pictures a split.

A folder of it holds ``Annotations/<name>.xml``, ``JPEGImages/<name>.jpg`` and ``ImageSets/Main/<list>.txt``. VOC itself
is a folder a year (``VOC2007``, ``VOC2012``), perhaps inside ``VOCdevkit``; a list of it is called as detectron2 does,
``voc_2007_trainval``. A split may join several lists. Of one's own folder the lists are called by their files.

VOC counts pixels from 1 and its boxes include their last: a box of pixels 1 to 10 spans 0 to 10 here. Objects may be
marked ``difficult``: they are trained on, as detectron2 does, and VOC's average precision leaves them aside
(:class:`zoo.metrics.VocAP`); ``truncated``, ``pose`` and the parts of an object are not read.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from zoo.data import files
from zoo.data.coco import Record
from zoo.data.sources import EXTENSIONS, decode_image
from zoo.errors import ZooError, unknown

# fmt: off
CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# fmt: on
# The splits of this zoo where nothing else is said: those of "Rethinking ImageNet Pre-training", section 5.2.
SPLITS = {"train": ["voc_2007_trainval", "voc_2012_train"], "val": ["voc_2012_val"]}
_LISTS = {"train": ("train", "trainval"), "val": ("val", "test"), "test": ("test", "val")}
_MOST_BYTES = 1 << 24  # of an XML file


@dataclass
class Annotation:
    """What an XML file says: height and width, and of n objects names, boxes (n, 4) x0, y0, x1, y1, difficult (n,)."""

    size: tuple[int, int]
    names: list[str]
    boxes: np.ndarray
    difficult: np.ndarray


def read_annotation(path: str | os.PathLike[str]) -> Annotation:
    """The content of an XML file of VOC.

    Raises:
        ZooError: it cannot be read, is no XML, declares entities, or lacks a size, a name or a box.
    """
    data = files.read_bytes(path, _MOST_BYTES)
    plain = data.replace(b"\0", b"")  # UTF-16 and 32 have zeros between
    if b"<!DOCTYPE" in plain or b"<!ENTITY" in plain:  # an entity may grow without bound
        raise ZooError(f"{path} declares a document type, which VOC's annotations do not; it is not read")
    try:
        tree = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ZooError(f"{path} is no XML: {files.reason(error)}") from error

    def number(place: ElementTree.Element | None, name: str, what: str) -> float:
        found = files.finite_numbers([place.findtext(name) if place is not None else None])
        if found is None:
            raise ZooError(f"{path}: {what} has no number {name}")
        return found[0]

    size = tree.find("size")
    height, width = (int(number(size, name, "the size")) for name in ("height", "width"))
    if height < 1 or width < 1:
        raise ZooError(f"{path} states {height}x{width} pixels")
    names, boxes, difficult = [], [], []
    for place, one in enumerate(tree.findall("object")):
        name = (one.findtext("name") or "").strip()
        if not name:
            raise ZooError(f"{path}: object number {place} has no name")
        corners = [number(one.find("bndbox"), k, f"the box of {name}") for k in ("xmin", "ymin", "xmax", "ymax")]
        names.append(name)
        boxes.append([corners[0] - 1, corners[1] - 1, corners[2], corners[3]])
        difficult.append((one.findtext("difficult") or "0").strip() == "1")
    return Annotation((height, width), names, np.array(boxes, np.float64).reshape(-1, 4), np.array(difficult, bool))


class VocSource:
    """A split: the pictures of some lists, in their order.

    Args:
        lists: of each list its folder and its file's name.
        class_names: of the labels in order; None: VOC's 20, or the names that are found, sorted.

    Attributes:
        names, sizes: (N,) and (N, 2) of the pictures; image_ids: (N,) the numbers in their names, or their places;
            labels: of the objects of each; problems: what is odd but harmless, with the number of cases.

    Raises:
        ZooError: a list, an XML file or a picture is missing or damaged, or an object is of an unknown class.
    """

    def __init__(self, lists: Sequence[tuple[Path, str]], class_names: Sequence[str] | None = None) -> None:
        self.lists = list(lists)
        self.file = lists[0][0] / "ImageSets" / "Main" / f"{lists[0][1]}.txt"
        self.problems: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.keypoint_names: list[str] = []
        self.flip_order: list[int] = []
        self.names, self._paths, self._found = [], [], []
        for folder, name in self.lists:
            pictures = _pictures(folder)
            for picture in read_list(folder, name):
                if picture not in pictures:
                    raise ZooError(f"{folder / 'JPEGImages'} has no picture {picture!r}, which {name}.txt lists")
                self.names.append(picture)
                self._paths.append(os.path.join(folder, "JPEGImages", pictures[picture]))
                self._found.append(read_annotation(folder / "Annotations" / f"{picture}.xml"))
        if not self.names:
            raise ZooError(f"{self.file} lists no picture")
        said = sorted({name for one in self._found for name in one.names})
        self.class_names = list(class_names or (CLASSES if set(said) <= set(CLASSES) else said))
        for name in said:
            if name not in self.class_names:
                raise unknown(f"class in {self.file.parent.parent.parent}", name, self.class_names)
        number = {name: k for k, name in enumerate(self.class_names)}
        for one in self._found:
            (height, width), (x, y, u, v) = one.size, one.boxes.T
            kept = (u > x) & (v > y) & (x < width) & (y < height) & (u > 0) & (v > 0)
            if not kept.all():
                self.problems["boxes that show nothing of their picture"] += int((~kept).sum())
            one.names = [name for name, keep in zip(one.names, kept, strict=True) if keep]
            one.boxes, one.difficult = one.boxes[kept], one.difficult[kept]
        self.labels = [np.array([number[name] for name in one.names], np.int64) for one in self._found]
        self.sizes = np.array([one.size for one in self._found], np.int64)
        digits = [name.replace("_", "") for name in self.names]
        plain = all(re.fullmatch(r"[0-9]{1,15}", text) for text in digits) and len(set(map(int, digits))) == len(digits)
        self.image_ids = np.array([int(text) for text in digits] if plain else range(len(digits)), np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """The picture's file."""
        return self._paths[index]

    def annotations(self, index: int) -> list[tuple[list[float], str, bool]]:
        """(box, class, difficult) of each object."""
        one = self._found[index]
        return list(zip(one.boxes.tolist(), one.names, one.difficult.tolist(), strict=True))

    def read(self, index: int) -> Record:
        """The picture and its objects.

        Raises:
            ZooError: the file cannot be read, or is of another size than the XML says.
        """
        path, one = self.path(index), self._found[index]
        image = decode_image(files.read_bytes(path), path)
        if tuple(image.shape[-2:]) != one.size:
            raise ZooError(
                f"{path} is {image.shape[-1]}x{image.shape[-2]} pixels, but its XML says {one.size[1]}x{one.size[0]}"
            )
        count = len(one.names)
        return Record(
            image=image,
            boxes=one.boxes,
            labels=self.labels[index],
            crowd=np.zeros(count, dtype=bool),
            area=(one.boxes[:, 2:] - one.boxes[:, :2]).prod(1),
            segments=[None] * count,
            keypoints=None,
            image_id=int(self.image_ids[index]),
            path=path,
            difficult=one.difficult,
        )

    def read_many(self, indices: Sequence[int]) -> list[Record]:
        """Several pictures."""
        return [self.read(index) for index in indices]

    def trainable(self, keypoints: bool = False) -> np.ndarray:
        """(M,) numbers of the pictures with an object."""
        return np.array([len(labels) > 0 for labels in self.labels]).nonzero()[0]


def _pictures(folder: Path) -> dict[str, str]:
    """The pictures of a folder of VOC: file names by their stems."""
    place = folder / "JPEGImages"
    if not place.is_dir():
        raise ZooError(f"no folder {str(place)!r}")
    found = sorted(name for name in os.listdir(place) if name.lower().endswith(EXTENSIONS))
    return {os.path.splitext(name)[0]: name for name in found}


def read_list(folder: Path, name: str) -> list[str]:
    """The pictures that ``ImageSets/Main/<name>.txt`` names, the first word of each line.

    Raises:
        ZooError: no such list; it says which there are.
    """
    file = folder / "ImageSets" / "Main" / f"{name}.txt"
    if not file.is_file():
        raise unknown(f"list in {file.parent}", name, sorted(path.stem for path in file.parent.glob("*.txt")))
    names = [line.split()[0] for line in files.read_text(file).splitlines() if line.strip()]
    if strange := [one for one in names if os.path.basename(one) != one or one.startswith(".")]:
        raise ZooError(f"{file} names {strange[0]!r}, which is no picture's name")
    return names


@dataclass
class VocLayout:
    """The splits found at `root`: of each its lists, (folder, name)."""

    root: Path
    parts: dict[str, list[tuple[Path, str]]]
    class_names: list[str] | None = None
    _open: dict[str, VocSource] = field(default_factory=dict)

    def open(self, split: str) -> tuple[VocSource, np.ndarray]:
        """A split and which of its pictures belong to it. "val", "test" and "predict" stand in for each other.

        Raises:
            ZooError: there is none.
        """
        order = {"val": ("val", "test"), "test": ("test", "val"), "predict": ("test", "val", "train")}
        part = next((p for p in order.get(split, (split,)) if p in self.parts), None)
        if part is None:
            raise ZooError(f"{self.root} has no list for the split {split!r}; say which by data.options.{split}")
        if part not in self._open:
            if self.class_names is None:  # of one's own: the names of all splits
                said = {n for lists in self.parts.values() for n in _names(lists)}
                self.class_names = CLASSES if said <= set(CLASSES) else sorted(said)
            self._open[part] = VocSource(self.parts[part], self.class_names)
            files.tell(str(self._open[part].file), self._open[part].problems)
        source = self._open[part]
        return source, np.arange(len(source))


def _names(lists: Sequence[tuple[Path, str]]) -> set[str]:
    return {
        name
        for folder, listed in lists
        for picture in read_list(folder, listed)
        for name in read_annotation(folder / "Annotations" / f"{picture}.xml").names
    }


def is_voc(place: str | os.PathLike[str]) -> bool:
    """Does a folder hold sets of VOC's format?"""
    return bool(_years(Path(place).expanduser()))


def _years(root: Path) -> dict[str, Path]:
    """The folders of VOC's format at a path, by year; a single one is called ""."""
    if (root / "ImageSets" / "Main").is_dir():
        year = re.fullmatch(r"VOC(\d{4})", root.name)
        return {"": root, **({year[1]: root} if year else {})}
    for place in (root, root / "VOCdevkit"):
        found = {path.name[3:]: path for path in sorted(place.glob("VOC[0-9][0-9][0-9][0-9]"))}
        if found := {year: path for year, path in found.items() if (path / "ImageSets" / "Main").is_dir()}:
            return found
    return {}


def find_voc(
    place: str | os.PathLike[str],
    splits: Mapping[str, Sequence[str]] | None = None,
    class_names: Sequence[str] | None = None,
) -> VocLayout:
    """What is in VOC's format at a path.

    Args:
        place: VOC's folder (with VOCdevkit, or VOC2007 and VOC2012), that of one year, or one's own.
        splits: of train, val or test their lists, "voc_2007_trainval" or the name of a file; None: :data:`SPLITS` where
            there are years, else train (or trainval), val and test.
        class_names: of the labels in order.

    Raises:
        ZooError: nothing there, or a list of a year that is not.
    """
    root = Path(place).expanduser()
    years = _years(root)
    if not years:
        raise ZooError(f"{root} holds no ImageSets/Main, neither itself nor in VOCdevkit, VOC2007 or VOC2012")
    if splits is None and "" in years:
        main = years[""] / "ImageSets" / "Main"
        there = {split: [n for n in names if (main / f"{n}.txt").is_file()] for split, names in _LISTS.items()}
        splits = {split: names[:1] for split, names in there.items() if names}
        if not splits:
            raise ZooError(f"{main} has neither train.txt nor val.txt nor test.txt; say which by data.options.train")
    parts: dict[str, list[tuple[Path, str]]] = {}
    for split, names in (splits or SPLITS).items():
        for name in [names] if isinstance(names, str) else names:
            dated = re.fullmatch(r"voc_(\d{4})_(\w+)", name)
            year = dated[1] if dated else ""
            if year not in years:
                raise unknown(f"year of VOC at {root}", year or name, [known for known in years if known])
            parts.setdefault(split, []).append((years[year], dated[2] if dated else name))
    return VocLayout(root, parts, list(class_names) if class_names else None)
