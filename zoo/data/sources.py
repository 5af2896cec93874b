"""Labelled pictures from wherever they lie: map-style sources of {"image": uint8 (3, H, W), "label": int}.

A data set is named by its card (``cifar10``), by a path, or by a hub id (``hf://org/name``). What lies at a path is
recognised:

- ``datasets`` folders: ``save_to_disk`` (one split or several), or parquet files, their split told by the file's name;
- an image folder: ``<class>/*.jpg``, also one level down in ``train/``, ``val/``, ``test/``; or pictures alone,
  unlabelled (label -1);
- the idx files of (Fashion-)MNIST, gzipped or not.

Splits. "val" is the set's validation split or, where it has none, its test split; "test" the other way round. A set
with one part only keeps every tenth sample of it, in stored order, for both, and trains on the rest. "predict" is the
test split or the whole of a set with one part only. All pictures become RGB.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from zoo.data.shapes import ShapesDataset, make_knobs
from zoo.errors import ZooError, unknown

ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing", "t10k"),
}
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
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
    """Encoded bytes -> uint8 (3, H, W) RGB; torchvision's decoders, Pillow for what they do not read. `upright` turns
    a photo as its EXIF orientation says.

    Raises:
        ZooError: neither can read it; `name` says which.
    """
    from torchvision.io import ImageReadMode, decode_image

    encoded = data if isinstance(data, Tensor) else torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    try:
        image = decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=upright)
        if image.ndim == 3 and image.dtype == torch.uint8:
            return image
    except RuntimeError:
        pass
    import io

    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(encoded.numpy().tobytes())) as opened:
            picture = ImageOps.exif_transpose(opened) if upright else opened
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:
        raise ZooError(
            f"cannot read {name} as an image: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def read_image(path: str | os.PathLike[str], upright: bool = False) -> Tensor:
    """A picture file -> uint8 (3, H, W) RGB, turned as its EXIF orientation says if `upright`.

    Raises:
        ZooError: the file is missing or not a picture.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror}") from error
    return decode_image(data, str(path), upright)


# -------------------------------------------------------------------------------------------------------------- sources


class FolderSource:
    """Picture files with their labels (-1 without)."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], class_names: list[str]) -> None:
        self.paths = np.array(paths, dtype=np.str_)  # one block of memory, which worker processes share
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_image(str(self.paths[index])), "label": int(self.labels[index])}


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


class ArrowSource:
    """A split of a Hugging Face ``datasets`` set."""

    def __init__(self, split: Any, image: str, label: str | None, class_names: list[str], name: str) -> None:
        import datasets

        self._split = split.cast_column(image, datasets.Image(decode=False)).select_columns(
            [c for c in (image, label) if c]
        )
        self.image, self.label, self.class_names, self.name = image, label, class_names, name

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._split[int(index)]
        cell = row[self.image]
        name = f"sample {index} of {self.name}"
        image = decode_image(cell["bytes"], name) if cell["bytes"] is not None else read_image(cell["path"])
        label = row[self.label] if self.label else None
        return {"image": image, "label": -1 if label is None else int(label)}


class Part:
    """Some samples of another source, in the order given."""

    def __init__(self, source: Source, indices: Sequence[int] | Tensor) -> None:
        self.source, self.indices, self.class_names = (
            source,
            torch.as_tensor(indices, dtype=torch.long),
            source.class_names,
        )
        if isinstance(source, ManyReader):
            self.read_many: Callable[[Sequence[int]], dict[str, Tensor]] = self._read_many

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

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


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _pictures(folder: Path, deep: bool) -> list[str]:
    if deep:
        files = [os.path.join(at, f) for at, _, names in os.walk(folder) for f in names if _is_picture(f)]
        return sorted(files)
    with os.scandir(folder) as entries:
        return sorted(e.path for e in entries if _is_picture(e.name) and e.is_file())


def _image_folder(folder: Path) -> _Layout | None:
    known = {alias for names in ALIASES.values() for alias in names}
    below = _subfolders(folder)
    parts = {name: folder / name for name in below if name.lower() in known}
    flat = not parts
    if flat:
        parts = {"train": folder}
    lead = parts[choose_part("train", list(parts), str(folder))[0]] if any(
        p.lower() in ALIASES["train"] for p in parts
    ) else next(iter(parts.values()))  # fmt: skip
    classes = _subfolders(lead)
    if flat and not (any(_pictures(folder / c, deep=True) for c in classes[:3]) or _pictures(folder, deep=False)):
        return None
    if not classes and not _pictures(lead, deep=False):
        return None

    def open_part(part: str) -> Source:
        root = parts[part]
        if not classes:
            paths = _pictures(root, deep=False)
            return FolderSource(paths, [-1] * len(paths), [])
        here = _subfolders(root)
        for name in here:
            if name not in classes:
                raise ZooError(f"{root / name}: no class of that name in {lead}")
        if not here and (loose := _pictures(root, deep=False)):
            raise ZooError(f"{root} holds {len(loose)} loose pictures; expected one folder per class, as in {lead}")
        paths, labels = [], []
        for name in here:
            files = _pictures(root / name, deep=True)
            paths += files
            labels += [classes.index(name)] * len(files)
        return FolderSource(paths, labels, classes)

    return _Layout(str(folder), list(parts), lambda: classes, open_part)


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
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ZooError(f"cannot read {path}: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ZooError(f"{path} is no idx file of unsigned bytes")
    header = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    if len(data) - header != int(np.prod(shape)):
        raise ZooError(f"{path} is damaged: {len(data) - header} bytes for an array of {'x'.join(map(str, shape))}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _idx(folder: Path) -> _Layout | None:
    files = {
        part: (images, labels)
        for part, (image_stem, label_stem) in _IDX.items()
        if (images := _idx_file(folder, image_stem)) and (labels := _idx_file(folder, label_stem))
    }
    if not files:
        return None

    def names() -> list[str]:
        return [str(k) for k in range(1 + max(int(read_idx(labels).max()) for _, labels in files.values()))]

    def open_part(part: str) -> Source:
        images, labels = (torch.from_numpy(read_idx(path)) for path in files[part])
        if len(images) != len(labels):
            raise ZooError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
        return MemorySource(images[:, None], labels, names())

    return _Layout(str(folder), list(files), names, open_part, in_memory=True)


def _arrow_layout(
    name: str, splits: dict[str, Any], image: str | None, label: str | None, names: list[str] | None
) -> _Layout:
    import datasets

    features = next(iter(splits.values())).features
    image = image or next((k for k, f in features.items() if isinstance(f, datasets.Image)), None)
    if image is None or image not in features:
        raise ZooError(f"{name} has no image column{f' {image!r}' if image else ''}; columns: {', '.join(features)}")
    if label is None:
        label = next((k for k, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
        label = label or next((k for k in ("label", "labels", "fine_label") if k in features), None)
    elif label not in features:
        raise ZooError(f"{name} has no column {label!r}; columns: {', '.join(features)}")

    def class_names() -> list[str]:
        if names is not None or label is None:
            return names or []
        if isinstance(features[label], datasets.ClassLabel):
            return list(features[label].names)
        top = max(max(part.unique(label), default=-1) for part in splits.values())
        if not isinstance(top, int):
            raise ZooError(f"{name}: the labels in column {label!r} are not whole numbers")
        return [str(k) for k in range(top + 1)]

    cached: list[list[str]] = []

    def names_once() -> list[str]:
        if not cached:
            cached.append(class_names())
        return cached[0]

    return _Layout(
        name, list(splits), names_once, lambda part: ArrowSource(splits[part], image, label, names_once(), name)
    )


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

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ZooError(f"cannot open {folder} as a saved datasets folder: {str(error).splitlines()[0]}") from error
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _parquet(path: Path) -> dict[str, Any] | None:
    files = [path] if path.is_file() else sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")])
    if not files:
        return None
    import datasets

    known = {alias: alias for names in ALIASES.values() for alias in names}
    groups: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[-_.]", file.name.lower())
        part = known.get(words[0]) or known.get(file.parent.name.lower() if path.is_dir() else "", "train")
        groups.setdefault(part, []).append(str(file))
    try:
        with _quiet():
            return {part: datasets.Dataset.from_parquet(names) for part, names in groups.items()}
    except Exception as error:
        raise ZooError(f"cannot read the parquet files of {path}: {str(error).splitlines()[0]}") from error


def arrow_splits(path: Path) -> dict[str, Any] | None:
    """The splits of a saved ``datasets`` folder or of parquet files at `path`; None where it is neither.

    Raises:
        ZooError: it is one of them but cannot be read.
    """
    return (_saved(path) if path.is_dir() else None) or _parquet(path)


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
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
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
    path: Path, image: str | None, label: str | None, names: list[str] | None, what: str = "dataset"
) -> _Layout:
    if not path.exists():
        raise missing_path(path, what)
    if path.is_file() and path.suffix != ".parquet":
        raise ZooError(f"{path} is a file; a data set is a folder or a .parquet file")
    splits = arrow_splits(path)
    if splits is not None:
        return _arrow_layout(str(path), splits, image, label, names)
    layout = _idx(path) or _image_folder(path)
    if layout is None:
        raise ZooError(
            f"{path} is in no known layout: need class folders of pictures, pictures, parquet files,"
            " a saved datasets folder or idx files"
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
    revision, config = options.get("revision"), options.get("config")
    if dataset.startswith("hf://"):
        repository = dataset.removeprefix("hf://").strip("/")
        return _arrow_layout(dataset, hub_splits(repository, revision, config), image, label, None), None
    card = _card(dataset)
    if card is None:
        from zoo.catalog import list_datasets

        path = Path(dataset).expanduser()
        if not path.exists() and not (os.sep in dataset or dataset.startswith(".")):
            raise unknown("dataset", dataset, list_datasets())
        return _at_path(path, image, label, None), None
    image, label = image or card.columns.image, label or card.columns.label
    names = list(card.class_names) if card.class_names else None
    if data_dir is not None:
        root = Path(data_dir).expanduser()
        layout = _at_path(root / dataset if (root / dataset).is_dir() else root, image, label, names, "data_dir")
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
    return _arrow_layout(dataset, {k: v for k, v in splits.items() if k in listed}, image, label, names), card


def open_source(
    dataset: str, split: str = "train", data_dir: str | os.PathLike[str] | None = None, **options: Any
) -> Source:
    """Open a split of a data set.

    Args:
        dataset: a card's name, a path, or ``hf://org/name``.
        split: "train", "val", "test" or "predict"; the module's docstring says what serves it.
        data_dir: where a carded set lies, if not on the hub; the folder itself or the one that holds it under its name.
        **options: for ``shapes``: `size`, `length`, `seed`, `cache` and the knobs of :class:`zoo.data.shapes.Knobs`;
            else `revision`, `config` (of the hub), `image_column`, `label_column`.

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
    layout, _ = _resolve(dataset, data_dir, options)
    return _open(layout, split)


def _open(layout: _Layout, split: str) -> Source:
    part, which = choose_part(split, layout.parts, layout.name)
    source = layout.open(part)
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
