"""Labelled pictures from wherever they lie: map-style sources of {"image": uint8 (3, H, W), "label": int}.

A data set is named by its card (``cifar10``), by a path, or by a hub id (``hf://org/name``). What lies at a path is
recognised:

- ``datasets`` folders: ``save_to_disk`` (one split or several), or parquet or arrow files, their split told by the
  file's name; pictures may be ``datasets``' own, bytes, or structs of bytes and path;
- an image folder: ``<class>/*.jpg``, also one level down in ``train/``, ``val/``, ``test/``; or pictures alone,
  unlabelled (label -1). Beside class folders with pictures, a ``train`` without class folders is a class too;
- the idx files of (Fashion-)MNIST, gzipped or not.

Splits. "val" is the set's validation split or, where it has none, its test split; "test" the other way round. A set
with one part only keeps every tenth sample of it, in stored order, for both, and trains on the rest. "predict" is the
test split or the whole of a set with one part only.

All pictures become RGB bytes: of 16-bit ones the upper byte counts, of floats 0..1 become 0..255. What a source leaves
out it counts: `skipped` are files that are no pictures, `problems` samples that are lost.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import math
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from zoo.data.files import MOST_BYTES, numbered_classes, read_bytes, read_json, reason, require_regular, tell
from zoo.data.shapes import ShapesDataset, make_knobs
from zoo.errors import ZooError, unknown

ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing", "t10k"),
}
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
_PNG, _GIF = b"\x89PNG", b"GIF8"
_BY_PILLOW = {_PNG: "PNG", _GIF: "GIF"}
MOST_PIXELS = 178_956_970  # of a picture; twice Pillow's limit, at which it refuses too
TABLES = (".parquet", ".arrow")
HOLD_OUT = 10
_SHAPES_LENGTH = {"train": 50_000, "val": 5_000, "test": 5_000}


class Source(Protocol):
    """A split of a data set."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@runtime_checkable
class ManyReader(Protocol):
    """A source that reads several samples in one go: {"image": (n, 3, H, W), "label": (n,)}."""

    def read_many(self, indices: Sequence[int]) -> dict[str, Tensor]: ...


# ------------------------------------------------------------------------------------------------------------- pictures


def decode_image(data: bytes | Tensor, name: str = "image", upright: bool = False) -> Tensor:
    """Encoded bytes -> uint8 (3, H, W) RGB; torchvision's decoders, Pillow for what they do not read, for png, where
    torchvision's (0.29) ends the process on a damaged file, and for gif, of which it decodes all frames. `upright`
    turns a photo as its EXIF orientation says.

    Raises:
        ZooError: neither can read it; `name` says which.
    """
    from torchvision.io import ImageReadMode, decode_image

    encoded = data if isinstance(data, Tensor) else torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    width, height = _stated_size(encoded)
    if width * height > MOST_PIXELS:
        raise ZooError(f"cannot read {name} as an image: {width}x{height} pixels are more than {MOST_PIXELS:,}")
    kind = next((name for mark, name in _BY_PILLOW.items() if encoded[:4].numpy().tobytes() == mark), None)
    if kind is None:
        try:
            image = decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=upright)
            if image.ndim == 3 and image.dtype == torch.uint8:
                return image
        except RuntimeError:
            pass
    import io

    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded.numpy().tobytes()), formats=None if kind is None else (kind,)) as opened:
            picture = ImageOps.exif_transpose(opened) if upright else opened
            plain = picture.mode == "RGB" or _is_wide(picture.mode)
            pixels = np.array(picture if plain else picture.convert("RGB"))
            of_tiff = opened.format == "TIFF"
    except UnidentifiedImageError as error:
        raise ZooError(f"cannot read {name} as an image: it is of no known format, or damaged") from error
    except Exception as error:
        raise ZooError(f"cannot read {name} as an image: {reason(error)}") from error
    if pixels.ndim == 2:
        pixels = np.repeat(_to_bytes(pixels, of_tiff, name)[..., None], 3, -1)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _stated_size(encoded: Tensor) -> tuple[int, int]:
    """Width and height that a png, gif or jpeg says it has, so that nothing is set aside for absurd ones; else 0, 0."""
    head = encoded[:32].numpy().tobytes()
    if head.startswith(_PNG) and len(head) >= 24:
        return struct.unpack(">II", head[16:24])
    if head.startswith(_GIF) and len(head) >= 10:
        return struct.unpack("<HH", head[6:10])
    if not head.startswith(b"\xff\xd8"):
        return 0, 0
    data, at = encoded.numpy(), 2
    while at + 9 < len(data) and data[at] == 0xFF:  # from marker to marker
        kind = int(data[at + 1])
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9].tobytes())
            return width, height
        at += 2 + (int(data[at + 2]) << 8 | int(data[at + 3])) if kind != 0xFF else 1
    return 0, 0


def _is_wide(mode: str) -> bool:
    """Is this a mode of Pillow's with more than a byte a pixel and channel?"""
    return mode.startswith("I") or mode == "F"


def _to_bytes(pixels: np.ndarray, of_tiff: bool, name: str) -> np.ndarray:
    """(H, W) uint8 of gray values of a wider range: floats of 0..1; whole numbers of 16 bits or, as int32 in a TIFF,
    of the smallest of 8, 16 and 31 bits that holds the picture's values."""
    low, high = (pixels.min(), pixels.max()) if pixels.size else (0, 0)
    if pixels.dtype.kind == "f":
        if not (low >= 0 and high <= 1):
            raise ZooError(f"cannot read {name} as an image: floats from {low:g} to {high:g}, where 0 to 1 are known")
        return (pixels * 255 + 0.5).astype(np.uint8)
    if low < 0:
        raise ZooError(f"cannot read {name} as an image: the value {low} is negative")
    shift = 8
    if pixels.dtype.itemsize > 2 and of_tiff:
        shift = 0 if high < 1 << 8 else 8 if high < 1 << 16 else 23
    return (pixels >> shift).astype(np.uint8)


def read_image(path: str | os.PathLike[str], upright: bool = False) -> Tensor:
    """A picture file -> uint8 (3, H, W) RGB, turned as its EXIF orientation says if `upright`.

    Raises:
        ZooError: the file is missing or not a picture.
    """
    return decode_image(read_bytes(path, MOST_BYTES), str(path), upright)


# -------------------------------------------------------------------------------------------------------------- sources


class FolderSource:
    """Picture files with their labels (-1 without); turned as their EXIF orientation says if `upright`."""

    upright = False

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        class_names: list[str],
        skipped: Counter[str] | None = None,
        problems: Counter[str] | None = None,
    ) -> None:
        self.skipped, self.problems = skipped or Counter(), problems or Counter()
        self.paths = np.array(paths, dtype=np.str_)  # one block of memory, which worker processes share
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_image(str(self.paths[index]), self.upright), "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        return str(self.paths[index])


class MemorySource:
    """Pictures held in memory as (N, C, H, W) uint8, C 1 or 3."""

    def __init__(self, images: Tensor, labels: Tensor, class_names: list[str]) -> None:
        self.images, self.labels, self.class_names = images, labels.long(), class_names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index].expand(3, -1, -1), "label": int(self.labels[index])}

    def read_many(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """{"image": (n, 3, H, W), "label": (n,)}."""
        at = torch.as_tensor(indices)
        return {"image": self.images[at].expand(-1, 3, -1, -1), "label": self.labels[at]}


class ArrowPictures:
    """The column of pictures of a Hugging Face ``datasets`` split; rows without a picture are left out, and counted.

    Args:
        split: with, or cut down to, the wanted columns.
        image: the column of pictures.
        name: of the set, for messages.

    Attributes:
        rows: (n,) numbers of the rows with a picture, None: all.
    """

    def __init__(self, split: Any, image: str, name: str) -> None:
        import datasets

        if isinstance(split.features[image], datasets.Image):
            split = split.cast_column(image, datasets.Image(decode=False))
        self._split, self.image, self.name = split, image, name
        self.problems: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.rows: np.ndarray | None = None
        if _may_lack(split.data.column(image)):
            batches = split.select_columns([image]).with_format("arrow").iter(1000)
            self.keep(np.concatenate([_has_picture(batch[image]) for batch in batches]), "rows without a picture")

    def keep(self, fit: np.ndarray, without: str) -> None:
        """Leave out the rows of the split that are not `fit` (length,) bool, and count them as `without`."""
        if fit.all():
            return
        rows = np.arange(len(fit)) if self.rows is None else self.rows
        lost = rows[~fit[rows]]
        if len(lost):
            self.problems[f"{without}, first: number {lost[0]}"] += len(lost)
        self.rows = rows[fit[rows]]

    def __len__(self) -> int:
        return len(self._split) if self.rows is None else len(self.rows)

    def row(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """The picture uint8 (3, H, W) of a sample, and its whole row."""
        number = int(index if self.rows is None else self.rows[index])
        row = self._split[number]
        cell = row[self.image]
        cell = cell if isinstance(cell, dict) else {"bytes": cell}
        if cell.get("bytes") is not None:
            return decode_image(cell["bytes"], f"sample {number} of {self.name}"), row
        return read_image(str(cell.get("path"))), row


def _parts_of(kind: Any) -> list[str]:
    """Where the pictures of a column of structs stand."""
    return [kind.field(k).name for k in range(kind.num_fields) if kind.field(k).name in ("bytes", "path")]


def _may_lack(column: Any) -> bool:
    """Could a picture be missing in a column? A look at counts, none at pictures."""
    for chunk in column.chunks:
        empty = [chunk.field(part).null_count for part in _parts_of(chunk.type)]
        if chunk.null_count or (empty and min(empty)):
            return True
    return False


def _has_picture(column: Any) -> np.ndarray:
    """(n,) bool."""
    import pyarrow.compute as pc

    column = column.combine_chunks()
    there = pc.is_valid(column)
    if parts := [pc.is_valid(pc.struct_field(column, part)) for part in _parts_of(column.type)]:
        there = pc.and_(there, parts[0] if len(parts) == 1 else pc.or_(*parts))
    return there.to_numpy(zero_copy_only=False)


class ArrowSource(ArrowPictures):
    """A split of a Hugging Face ``datasets`` set.

    Args (beside those of :class:`ArrowPictures`):
        labels: (length,) int64 of the split's rows, -1 without.
        unlabelled: what is wrong with them, where they can serve no task that wants labels.
    """

    def __init__(
        self, split: Any, image: str, labels: np.ndarray, class_names: list[str], name: str, unlabelled: str = ""
    ) -> None:
        super().__init__(split.select_columns([image]), image, name)
        self.labels = labels if self.rows is None else labels[self.rows]
        self.class_names, self.unlabelled = class_names, unlabelled

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.row(index)[0], "label": int(self.labels[index])}


def file_of(source: Any, index: int) -> str | None:
    """The file of a source's sample, where it has one."""
    name = getattr(source, "name", None)
    return name(index) if callable(name) else None


class Part:
    """Some samples of another source, in the order given."""

    def __init__(self, source: Source, indices: Sequence[int] | Tensor) -> None:
        self.source, self.indices, self.class_names = (
            source,
            torch.as_tensor(indices, dtype=torch.long),
            source.class_names,
        )
        self.problems = getattr(source, "problems", Counter())
        self.skipped = getattr(source, "skipped", Counter())
        if isinstance(source, ManyReader):
            self.read_many: Callable[[Sequence[int]], dict[str, Tensor]] = self._read_many

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str | None:
        """The file of a sample, where it has one."""
        return file_of(self.source, int(self.indices[index]))

    def _read_many(self, indices: Sequence[int]) -> dict[str, Tensor]:
        assert isinstance(self.source, ManyReader)
        return self.source.read_many(self.indices[torch.as_tensor(indices)].tolist())


# ------------------------------------------------------------------------------------------------------ what lies where


@dataclass
class _Layout:
    """A recognised set: its parts by the names they have there, its classes, and how to open a part."""

    name: str
    parts: list[str]
    class_names: Callable[[], list[str]]
    open: Callable[[str], Source]
    in_memory: bool = False


def choose_part(split: str, parts: Sequence[str], name: str) -> tuple[str, str]:
    """Which stored part serves a split, and which of its samples: ("test", "all"), ("train", "kept" | "held").

    Raises:
        ZooError: unknown split, or nothing to train on.
    """
    if split not in ("train", "val", "test", "predict"):
        raise unknown("split", split, ("train", "val", "test", "predict"))
    found = {kind: next((p for a in names for p in parts if p.lower() == a), None) for kind, names in ALIASES.items()}
    evaluation = found["val"] or found["test"]
    train = found["train"] or (parts[0] if len(parts) == 1 and evaluation is None else None)
    if split == "train":
        if train is None:
            raise ZooError(f"{name} has no split to train on; it has: {', '.join(parts)}")
        return train, "all" if evaluation else "kept"
    first = found["val"] if split == "val" else found["test"]
    if evaluation is not None:
        return first or evaluation, "all"
    if train is None:
        raise ZooError(f"{name} has none of the splits train, val and test; it has: {', '.join(parts)}")
    return train, "all" if split == "predict" else "held"


def select(source: Source, which: str) -> Source:
    """Those samples of a part that :func:`choose_part` means by "all", "kept" or "held"."""
    if which == "all":
        return source
    number = torch.arange(len(source))
    held = number % HOLD_OUT == HOLD_OUT - 1
    if not held.any():
        held[-1:] = True
    return Part(source, number[held if which == "held" else ~held])


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def subfolders(folder: Path) -> list[str]:
    """The names of a folder's folders, links to folders too, without hidden ones, in order."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise ZooError(f"cannot read {folder}: {reason(error)}") from error


def _pictures(folder: Path, deep: bool) -> tuple[list[str], Counter[str]]:
    """The pictures in a folder, if `deep` in all below it too, links followed; and what else is there.

    Raises:
        ZooError: a picture's name on a pipe or a device.
    """
    found: list[str] = []
    skipped: Counter[str] = Counter()
    todo = [str(folder)]
    while todo:
        at = todo.pop()
        try:
            with os.scandir(at) as scanned:
                entries = [e for e in scanned if not e.name.startswith(".")]
        except OSError as error:
            raise ZooError(f"cannot read {at}: {reason(error)}") from error
        for entry in entries:
            if entry.is_dir():
                if deep and entry.is_symlink() and _is_above(entry.path, at):
                    skipped["links to a folder above them"] += 1
                elif deep:
                    todo.append(entry.path)
            elif _is_picture(entry.name):
                if not entry.is_file() and os.path.exists(entry.path):
                    require_regular(entry.path)
                found.append(entry.path)
            else:
                ending = os.path.splitext(entry.name)[1].lower()
                skipped[f"files ending in {ending}" if ending else "files without an ending"] += 1
    return sorted(found), skipped


def holds_pictures(folder: Path) -> bool:
    """Are there pictures in a folder or below it?"""
    return bool(_pictures(folder, deep=True)[0])


def _is_above(link: str, folder: str) -> bool:
    target, here = os.path.realpath(link), os.path.realpath(folder)
    return here == target or here.startswith(target.rstrip(os.sep) + os.sep)


def split_folders(folder: Path, holds: Callable[[Path], bool]) -> dict[str, Path]:
    """Those of a folder's folders that are its splits.

    A set may have a class called "train". So where folders of other names hold samples (`holds`), folders called as
    splits are splits only if there are class folders with samples in one of them.
    """
    known = {alias for names in ALIASES.values() for alias in names}
    below = subfolders(folder)
    named = {name: folder / name for name in below if name.lower() in known}
    if named and any(name not in named and holds(folder / name) for name in below):
        nested = any(holds(place / name) for place in named.values() for name in subfolders(place))
        return named if nested else {}
    return named


def lead_part(parts: dict[str, Path]) -> Path:
    """The folder whose classes are the set's: the training split's, or the first."""
    return next((path for name, path in parts.items() if name.lower() in ALIASES["train"]), next(iter(parts.values())))


def _image_folder(folder: Path) -> _Layout | None:
    parts = split_folders(folder, holds_pictures)
    beside = [name for name in subfolders(folder) if name not in parts] if parts else []
    flat = not parts
    if flat:
        parts = {"train": folder}
    lead = lead_part(parts)
    classes = subfolders(lead)
    if flat and not (any(holds_pictures(folder / c) for c in classes) or _pictures(folder, deep=False)[0]):
        return None
    if not classes and not _pictures(lead, deep=False)[0]:
        return None

    def open_part(part: str) -> Source:
        root = parts[part]
        loose, skipped = _pictures(root, deep=False)
        problems: Counter[str] = Counter()
        for name in beside:
            if count := len(_pictures(folder / name, deep=True)[0]):
                problems[f"pictures in {folder / name}, which is no split"] = count
        if not classes:
            return FolderSource(loose, [-1] * len(loose), [], skipped, problems)
        here = subfolders(root)
        for name in here:
            if name not in classes:
                raise ZooError(f"{root / name}: no class of that name in {lead}")
        if not here and loose:
            raise ZooError(f"{root} holds {len(loose)} loose pictures; expected one folder per class, as in {lead}")
        if loose:
            problems["pictures beside the class folders"] = len(loose)
        paths, labels, skipped = [], [], Counter[str]()  # beside class folders stands what is about the set
        for name in here:
            files, others = _pictures(root / name, deep=True)
            skipped += others
            paths += files
            labels += [classes.index(name)] * len(files)
        return FolderSource(paths, labels, classes, skipped, problems)

    return _Layout(str(folder), list(parts), lambda: classes, open_part)


_MOST_IDX = 1 << 34  # bytes
_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes, gzipped or not (format: Yann LeCun's MNIST page).

    Raises:
        ZooError: it is something else, or shorter than its header says.
    """
    require_regular(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            magic = file.read(4)
            if magic[:3] != b"\0\0\x08" or len(magic) < 4:
                raise ZooError(f"{path} is no idx file of unsigned bytes")
            sides = file.read(4 * magic[3])
            shape = struct.unpack(f">{len(sides) // 4}I", sides[: len(sides) // 4 * 4])
            stated = math.prod(shape)
            data = bytearray()
            while len(data) <= min(stated, _MOST_IDX) and (piece := file.read(1 << 24)):
                data += piece
    except (OSError, EOFError, zlib.error) as error:
        raise ZooError(f"cannot read {path}: {reason(error)}") from error
    if len(sides) != 4 * magic[3] or len(data) != stated:
        raise ZooError(f"{path} is damaged: {len(data)} bytes for an array of {'x'.join(map(str, shape))}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _idx(folder: Path) -> _Layout | None:
    files = {
        part: (images, labels)
        for part, (image_stem, label_stem) in _IDX.items()
        if (images := _idx_file(folder, image_stem)) and (labels := _idx_file(folder, label_stem))
    }
    if not files:
        return None

    def names() -> list[str]:
        return [str(k) for k in range(1 + max(int(read_idx(labels).max(initial=0)) for _, labels in files.values()))]

    def open_part(part: str) -> Source:
        images, labels = (torch.from_numpy(read_idx(path)) for path in files[part])
        if images.ndim != 3 or labels.ndim != 1:
            raise ZooError(
                f"{folder}: the {part} images have {images.ndim} axes and the labels {labels.ndim}, not 3 and 1"
            )
        if len(images) != len(labels):
            raise ZooError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
        return MemorySource(images[:, None], labels, names())

    return _Layout(str(folder), list(files), names, open_part, in_memory=True)


def image_column(splits: dict[str, Any], wanted: str | None, name: str) -> str:
    """The column of pictures that all `splits` have: the `wanted` one, one of ``datasets``' own kind, or one of bytes.

    Raises:
        ZooError: there is none.
    """
    import datasets

    features = next(iter(splits.values())).features
    own = [k for k, f in features.items() if isinstance(f, datasets.Image)]
    raw = [k for k, f in features.items() if _holds_bytes(f)]
    column = wanted or next(iter([*own, *(k for k in raw if k.lower() in _IMAGE_NAMES), *raw]), None)
    for part, split in splits.items():
        if column is None or column not in split.features:
            named, where = (f" {column!r}" if column else ""), f" in split {part!r}" if len(splits) > 1 else ""
            raise ZooError(
                f"{name} has no image column{named}{where}; columns: {', '.join(split.features)};"
                " data.options.image_column names it"
            )
        if not isinstance(feature := split.features[column], datasets.Image) and not _holds_bytes(feature):
            raise ZooError(f"{name}: column {column!r} holds no pictures; data.options.image_column names another")
    return str(column)


_IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "image_bytes")
LABEL_NAMES = ("label", "labels", "fine_label")
# Names under which labels stand too, but other things as well, so that the user has to say so.
_LABEL_LIKE = (
    "target",
    "targets",
    "class",
    "classes",
    "category",
    "coarse_label",
    "class_id",
    "category_id",
    "class_label",
)


def _holds_bytes(feature: Any) -> bool:
    """Is this a column of bytes, or of structs with them?"""
    if isinstance(feature, dict):
        return _holds_bytes(feature.get("bytes"))
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _label_column(features: dict[str, Any], name: str) -> str | None:
    import datasets

    classes = [k for k, f in features.items() if isinstance(f, datasets.ClassLabel)]
    found = next((k for k in LABEL_NAMES if k in classes), None) or next(iter(classes), None)
    found = found or next((k for k in LABEL_NAMES if k in features), None)
    if found is None and (like := next((k for k in features if k.lower() in _LABEL_LIKE), None)):
        raise ZooError(
            f"{name} has no column 'label'; if {like!r} holds the labels, say so by data.options.label_column: {like}"
            " (null: read it without labels)"
        )
    return found


_HINT = "data.options.label_column names another column, null none"


def _label_values(split: Any, column: str, where: str) -> np.ndarray:
    """(length,) int64 class numbers, -1 where there is none."""
    import pyarrow as pa

    values = split.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    kind = values.type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind):
        try:
            return values.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise ZooError(f"{where}: a label in column {column!r} is absurd ({reason(error)}); {_HINT}") from error
    if pa.types.is_floating(kind):  # what pandas makes of whole numbers, some of which are missing
        numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        there = np.isfinite(numbers)
        if (numbers[there] % 1 == 0).all() and (abs(numbers[there]) < 1 << 62).all():
            return np.where(there, numbers, -1).astype(np.int64)
    what = "lists (several labels a picture)" if pa.types.is_nested(kind) else f"values of type {kind}"
    raise ZooError(f"{where}: the labels in column {column!r} are not whole numbers but {what}; {_HINT}")


def _arrow_layout(
    name: str,
    splits: dict[str, Any],
    image: str | None,
    label: str | None,
    names: list[str] | None,
    labelled: bool = True,
) -> _Layout:
    """`labelled` False: read without labels."""
    import datasets

    image = image_column(splits, image, name)
    lead = next((p for p in splits if p.lower() in ALIASES["train"]), next(iter(splits)))
    ordered = {lead: splits[lead], **splits}
    columns = {k: f for split in reversed(ordered.values()) for k, f in split.features.items() if k != image}
    if not labelled:
        label = None
    elif label is None:
        label = _label_column(columns, name)
    elif label not in columns:
        raise ZooError(f"{name} has no column {label!r}; columns: {', '.join(columns)}")
    read: dict[str, np.ndarray] = {}

    def labels(part: str) -> np.ndarray:
        """As they are stored."""
        if part not in read:
            there = label is not None and label in splits[part].features
            where = f"{name}, split {part!r}"
            read[part] = _label_values(splits[part], str(label), where) if there else np.full(len(splits[part]), -1)
        return read[part]

    def own_names(part: str) -> list[str] | None:
        feature = splits[part].features.get(label)
        return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    def class_names() -> list[str]:
        if names is not None or label is None:
            return names or []
        if (stored := next((own for part in ordered if (own := own_names(part)) is not None), None)) is not None:
            return stored
        top = max(int(labels(part).max(initial=-1)) for part in splits)
        return numbered_classes(top + 1, f"{name}, column {label!r}")

    cached: list[list[str]] = []

    def names_once() -> list[str]:
        if not cached:
            cached.append(class_names())
        return cached[0]

    def open_part(part: str) -> Source:
        known, own, numbers = names_once(), own_names(part), labels(part)
        if own is not None and own != known and (names is None or set(own) == set(known)):
            if strange := [one for one in own if one not in known]:
                raise ZooError(f"{name}: split {part!r} has the class {strange[0]!r}, which split {lead!r} has not")
            order = np.array([*(known.index(one) for one in own), -1])
            outside = (numbers < 0) | (numbers >= len(own))
            numbers = np.where(outside, numbers, order[np.where(outside, -1, numbers)])
        wrong = ""
        if label is not None:
            if label not in splits[part].features:
                wrong = f"{name}: split {part!r} has no column {label!r}; {_HINT}"
            elif (bad := np.flatnonzero((numbers < 0) | (numbers >= len(known)))).size:
                value, all_ = int(numbers[bad[0]]), len(numbers)
                what = "None or -1" if value == -1 else f"{value}, outside the {len(known)} classes"
                wrong = f"{name}: {bad.size} of {all_} labels in column {label!r} of split {part!r} are {what}, first:"
                wrong = f"{wrong} number {bad[0]}; {_HINT}"
        return ArrowSource(splits[part], image, numbers, known, name, wrong)

    return _Layout(name, list(splits), names_once, open_part)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of ``datasets``, whose local conversions take a moment only."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _saved(folder: Path) -> dict[str, Any] | None:
    if not ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
        return None
    import datasets

    for state in folder.glob("**/state.json"):
        _require_files(state)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ZooError(f"cannot open {folder} as a saved datasets folder: {reason(error)}") from error
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _require_files(state: Path) -> None:
    """Raises a :class:`ZooError` where a saved split names a file that is none, or none of its folder's."""
    content = read_json(state)
    read_json(state.with_name("dataset_info.json"))
    entries = content.get("_data_files") if isinstance(content, dict) else None
    for entry in entries if isinstance(entries, list) else [None]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name != os.path.basename(name):
            raise ZooError(f"{state} names no files of its own folder")
        require_regular(state.parent / name, 1 << 50)


def _table_files(path: Path) -> dict[str, Any] | None:
    """Parquet and arrow files, grouped into splits by their names or their folders'."""
    places = [path] if path.is_file() else [p for under in ("*", "*/*") for p in path.glob(under)]
    files = sorted(p for p in places if p.suffix in TABLES and not p.name.startswith((".", "cache-")))
    if not files:
        return None
    import datasets

    known = {alias: alias for names in ALIASES.values() for alias in names}
    groups: dict[str, list[Path]] = {}
    for file in files:
        require_regular(file, 1 << 50)
        words = re.split(r"[-_.]", file.name.lower())
        part = known.get(words[0]) or known.get(file.parent.name.lower() if path.is_dir() else "", "train")
        groups.setdefault(part, []).append(file)
    try:
        with _quiet():
            return {
                part: datasets.concatenate_datasets(
                    [
                        *([_parquet_files(parquet)] if (parquet := _ending(some, ".parquet")) else []),
                        *map(_arrow_file, _ending(some, ".arrow")),
                    ]
                )
                for part, some in groups.items()
            }
    except Exception as error:
        raise ZooError(f"cannot read the parquet or arrow files of {path}: {reason(error)}") from error


def _ending(files: Sequence[Path], suffix: str) -> list[str]:
    return [str(file) for file in files if file.suffix == suffix]


def _parquet_files(parquet: list[str]) -> Any:
    """``datasets`` maps a copy that it writes to its cache; where it cannot, the table is held in memory."""
    import datasets

    try:
        return datasets.Dataset.from_parquet(parquet)
    except OSError:
        import pyarrow as pa
        import pyarrow.parquet as pq

        return datasets.Dataset(pa.concat_tables([pq.read_table(file) for file in parquet]))


def _arrow_file(file: str) -> Any:
    """A file of ``datasets`` (a stream of arrow) or of other tools (arrow's file format)."""
    import datasets
    import pyarrow as pa

    with pa.memory_map(file) as mapped:
        if mapped.read(6) == b"ARROW1":
            mapped.seek(0)
            return datasets.Dataset(pa.ipc.open_file(mapped).read_all())
    return datasets.Dataset.from_file(file)


def arrow_splits(path: Path) -> dict[str, Any] | None:
    """The splits of a saved ``datasets`` folder, or of parquet or arrow files at `path`; None where it is neither.

    Raises:
        ZooError: it is one of them but cannot be read.
    """
    return (_saved(path) if path.is_dir() else None) or _table_files(path)


def hub_splits(repository: str, revision: str | None, config: str | None) -> dict[str, Any]:
    """The splits of a set of the hub.

    Raises:
        ZooError: it cannot be loaded.
    """
    import datasets

    with _hub_or_cache() as reachable:
        try:
            loaded = datasets.load_dataset(repository, config, revision=revision)
        except Exception as error:
            detail = reason(error)
            if not reachable:
                detail = (
                    "no connection to the hub, and it is not in its cache; where it lies on this machine, name its"
                    " folder: --data.data_dir FOLDER, or --data.dataset FOLDER"
                )
            raise ZooError(f"cannot load hf://{repository}: {detail}") from error
    return dict(loaded)


@contextlib.contextmanager
def _hub_or_cache() -> Iterator[bool]:
    """Whether the hub answers. Where not, its libraries, which would retry for minutes, use their cache only."""
    import datasets
    import huggingface_hub

    constants: Any = huggingface_hub.constants
    config: Any = datasets.config
    if constants.HF_HUB_OFFLINE:
        yield False
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the library's transport raises
        settings = ((constants, constants.HF_HUB_OFFLINE), (config, config.HF_HUB_OFFLINE))
        for owner, _ in settings:
            owner.HF_HUB_OFFLINE = True
        try:
            yield False
        finally:
            for owner, before in settings:
                owner.HF_HUB_OFFLINE = before
        return
    yield True


def _at_path(
    path: Path,
    image: str | None,
    label: str | None,
    names: list[str] | None,
    what: str = "dataset",
    labelled: bool = True,
) -> _Layout:
    if not path.exists():
        raise missing_path(path, what)
    if not path.is_dir() and path.suffix not in TABLES:
        raise ZooError(f"{path} is a file; a data set is a folder or a .parquet or .arrow file")
    splits = arrow_splits(path)
    if splits is not None:
        return _arrow_layout(str(path), splits, image, label, names, labelled)
    layout = _idx(path) or _image_folder(path)
    if layout is None:
        raise ZooError(
            f"{path} is in no known layout: need class folders of pictures, pictures, parquet or arrow"
            " files, a saved datasets folder or idx files"
        )
    return layout


def missing_path(path: Path, what: str = "dataset") -> ZooError:
    """The error for a path that is not there; names the nearest sibling."""
    where = path.expanduser().absolute()
    while not where.parent.is_dir() and where.parent != where:
        where = where.parent
    siblings = [p.name for p in where.parent.iterdir()] if where.parent.is_dir() else []
    near = difflib.get_close_matches(where.name, siblings, n=1, cutoff=0.5)
    return ZooError(f"{what}: no such folder {path}" + (f"; did you mean {where.parent / near[0]}?" if near else ""))


# ------------------------------------------------------------------------------------------------------ the public face


_OPTIONS = ("revision", "config", "image_column", "label_column")


def _card(dataset: str) -> Any | None:
    from zoo.catalog import data_card, list_datasets

    return data_card(dataset) if dataset in list_datasets() else None


def _resolve(
    dataset: str, data_dir: str | os.PathLike[str] | None, options: dict[str, Any]
) -> tuple[_Layout, Any | None]:
    """The layout behind a name and its card; not for the embedded world."""
    for option in options:
        if option not in _OPTIONS:
            raise unknown(f"option of {dataset}", option, _OPTIONS)
    image, label = options.get("image_column"), options.get("label_column")
    labelled = options.get("label_column", "") is not None  # null: without labels
    revision, config = options.get("revision"), options.get("config")
    if dataset.startswith("hf://"):
        repository = dataset.removeprefix("hf://").strip("/")
        return _arrow_layout(dataset, hub_splits(repository, revision, config), image, label, None, labelled), None
    card = _card(dataset)
    if card is None:
        from zoo.catalog import list_datasets

        path = Path(dataset).expanduser()
        if not path.exists() and not (os.sep in dataset or dataset.startswith(".")):
            raise unknown("dataset", dataset, list_datasets())
        return _at_path(path, image, label, None, labelled=labelled), None
    image, label = image or card.columns.image, label or card.columns.label
    names = list(card.class_names) if card.class_names else None
    if data_dir is not None:
        root = Path(data_dir).expanduser()
        root = root / dataset if (root / dataset).is_dir() else root
        layout = _at_path(root, image, label, names, "data_dir", labelled)
        found = layout.class_names()
        if found and len(found) != card.num_classes and not layout.in_memory:
            raise ZooError(
                f"{layout.name} has {len(found)} classes, {dataset} has {card.num_classes};"
                " name the folder itself as the dataset"
            )
        if names and layout.in_memory:
            layout.class_names = lambda: names
        return layout, card
    if card.hub_id is None:
        raise ZooError(f"{dataset} is read from a folder only: give its path as data_dir")
    splits = hub_splits(card.hub_id, revision, config)
    # Splits the card leaves out have no labels.
    listed = {a for names_ in ALIASES.values() for a in names_ if set(names_) & set(card.splits)}
    splits = {k: v for k, v in splits.items() if k in listed}
    return _arrow_layout(dataset, splits, image, label, names, labelled), card


def open_source(
    dataset: str, split: str = "train", data_dir: str | os.PathLike[str] | None = None, **options: Any
) -> Source:
    """Open a split of a data set.

    Args:
        dataset: a card's name, a path, or ``hf://org/name``.
        split: "train", "val", "test" or "predict"; the module's docstring says what serves it.
        data_dir: where a carded set lies, if not on the hub; the folder itself or the one that holds it under its name.
        **options: for ``shapes``: `size`, `length`, `seed`, `cache` and the knobs of :class:`zoo.data.shapes.Knobs`;
            else `revision`, `config` (of the hub), `image_column`, `label_column` (None: without labels).

    Raises:
        ZooError: nothing there, an unknown layout or option, or a split that cannot be served.
    """
    if dataset == "shapes":
        length = options.pop("length", None)
        part = "test" if split == "predict" else split
        if part not in _SHAPES_LENGTH:
            raise unknown("split", split, (*_SHAPES_LENGTH, "predict"))
        if length is not None and split != "train":  # `length` is about training; evaluation stays comparable
            length = None
        return ShapesDataset(part, _SHAPES_LENGTH[part] if length is None else length, **_shapes_options(options))
    layout, card = _resolve(dataset, data_dir, options)
    return _open(layout, split, upright=card is None)


def split_names(dataset: str, data_dir: str | os.PathLike[str] | None = None, **options: Any) -> list[str]:
    """The splits that a data set has of its own, by their names there; what :func:`open_source` serves may be parts."""
    if dataset == "shapes":
        return list(_SHAPES_LENGTH)
    return list(_resolve(dataset, data_dir, options)[0].parts)


def _open(layout: _Layout, split: str, upright: bool) -> Source:
    part, which = choose_part(split, layout.parts, layout.name)
    source = layout.open(part)
    if isinstance(source, FolderSource):  # a folder of one's own; published numbers were measured on pictures as stored
        source.upright = upright
    if split != "predict" and (wrong := getattr(source, "unlabelled", "")):
        raise ZooError(wrong)
    tell(layout.name, getattr(source, "problems", {}), getattr(source, "skipped", {}))
    if not len(source):
        raise ZooError(f"{layout.name}: no pictures in split {part!r}")
    return select(source, which)


def _shapes_options(options: dict[str, Any]) -> dict[str, Any]:
    own = {key: options[key] for key in ("size", "seed", "cache") if key in options}
    make_knobs(**{k: v for k, v in options.items() if k not in own})
    return options


@dataclass
class Description:
    """What can be said of a data set before any picture is read."""

    num_classes: int
    class_names: list[str]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_memory: bool


def describe(dataset: str, data_dir: str | os.PathLike[str] | None = None, **options: Any) -> Description:
    """Classes, size and colour statistics of a data set: from its card, else from its folder's listing or features.

    A set without a card has size 224 and ImageNet's mean and deviation. One-channel statistics are given three times.

    Raises:
        ZooError: as :func:`open_source`.
    """
    card = _card(dataset) if not dataset.startswith("hf://") else None
    if dataset == "shapes":
        shapes = {k: v for k, v in options.items() if k != "length"}
        knobs = make_knobs(**{k: v for k, v in _shapes_options(shapes).items() if k not in ("size", "seed", "cache")})
        mean, std = (card.mean, card.std) if card is not None else ((0.5,) * 3, (0.25,) * 3)
        names = knobs.class_names
        return Description(len(names), names, int(options.get("size", 64)), tuple(mean), tuple(std), True)
    if card is not None and card.num_classes is None:
        raise ZooError(f"{dataset} is a set of {card.task}, not of labelled pictures")
    if card is None or data_dir is not None:
        layout, _ = _resolve(dataset, data_dir, options)
        names, in_memory = layout.class_names(), layout.in_memory
    else:
        for option in options:
            if option not in _OPTIONS:
                raise unknown(f"option of {dataset}", option, _OPTIONS)
        names, in_memory = list(card.class_names or ()), False
    if card is None:
        from zoo.data.transforms import IMAGENET_MEAN, IMAGENET_STD

        return Description(len(names), names, 224, IMAGENET_MEAN, IMAGENET_STD, in_memory)
    names = names or [str(k) for k in range(card.num_classes)]
    mean, std = (tuple(x) * (3 if len(x) == 1 else 1) for x in (card.mean, card.std))
    return Description(card.num_classes, names, card.image_size, mean, std, in_memory)
