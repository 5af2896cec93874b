"""Pictures with their captions from wherever they lie, and the data module that pairs them up.

A set is named by its card (``coco_captions``), a path, or a hub id (``hf://org/name``). What lies at a path is
recognised:

- webdataset shards, ``*.tar`` with ``KEY.jpg`` and ``KEY.txt`` (what img2dataset writes), also one level down in
  ``train/``, ``val/``, ``test/``. Shards lie on a file system: they are indexed once (kept in the cache folder), and
  any sample is then one read;
- COCO captions, ``annotations/captions_<split>.json`` beside the folders of pictures;
- a Karpathy split, ``dataset_*.json``, beside the pictures (COCO, Flickr30k);
- ``datasets`` folders or parquet files with a column of pictures and one of captions (a text or a list of texts);
- tables ``*.tsv`` or ``*.csv`` with columns ``filepath`` and ``title`` (open_clip's), or ``caption``.

A picture without a caption is left out; sources count that in `problems`, and in `skipped` what no reader takes.

Splits are served as in :mod:`zoo.data.sources`; of shards that are not sorted into splits the last is held out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.base import SALT, Batch, at_least_one, key_parts
from zoo.data.datamodule import ImageDataModule, SampleSet
from zoo.data.files import read_json, read_text, reason, require_regular, tell, whole_number
from zoo.data.loader import EpochSampler
from zoo.data.shapes import ShapesDataset, hash64, render
from zoo.data.sources import (
    ALIASES,
    EXTENSIONS,
    LABEL_NAMES,
    TABLES,
    ArrowPictures,
    Description,
    ManyReader,
    Source,
    arrow_splits,
    choose_part,
    decode_image,
    describe,
    holds_pictures,
    hub_splits,
    image_column,
    missing_path,
    open_source,
    read_image,
    select,
    subfolders,
)
from zoo.data.text import WordPiece, prompts, vocabulary_path
from zoo.errors import ZooError, unknown
from zoo.paths import cache_dir
from zoo.weights import download

CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentences", "title")
_OF_DATASETS = ("dataset_info.json", "dataset_dict.json")  # files of Hugging Face's, not of Karpathy's
_OPTIONS = ("revision", "config", "image_column", "caption_column")

# -------------------------------------------------------------------------------------------------------------- sources
# Rows are {"image": uint8 (3, H, W), "captions": list of str, "label": int, -1 where there is none}.


class ShapesPairs(ShapesDataset):
    """The embedded world with its captions."""

    def read_many(self, indices: Sequence[int]) -> dict[str, Any]:
        """{"image" (n, 3, S, S) uint8, "label" (n,), "captions"} of some samples."""
        drawn = render(self.seed, self.split, indices, self.size, ("image", "label", "caption"), **self.knobs)
        return {"image": drawn["image"], "label": drawn["label"], "captions": [[text] for text in drawn["caption"]]}


class FilePairs:
    """Picture files with their captions; those without one are left out."""

    def __init__(self, pairs: Sequence[tuple[str, list[str]]], problems: Counter[str] | None = None) -> None:
        self.class_names: list[str] = []
        self.problems, self.skipped = Counter(problems or {}), Counter[str]()
        kept = [(path, texts) for path, texts in pairs if texts]
        if len(kept) < len(pairs):
            self.problems["pictures without a caption"] += len(pairs) - len(kept)
        self.paths, self.captions = np.array([path for path, _ in kept], dtype=np.str_), [texts for _, texts in kept]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_image(str(self.paths[index])), "captions": self.captions[index], "label": -1}


def _texts(cell: Any) -> list[str]:
    """The captions in a value: a text or a list of texts, without empty ones."""
    cells = cell if isinstance(cell, list) else [cell]
    return [text for one in cells if isinstance(one, str) and (text := " ".join(one.split()))]


class ArrowPairs(ArrowPictures):
    """A split of a Hugging Face ``datasets`` set; rows without a picture or a caption are left out."""

    def __init__(self, split: Any, image: str, caption: str, name: str) -> None:
        super().__init__(split.select_columns([image, caption]), image, name)
        self.caption = caption
        self.class_names: list[str] = []
        batches = split.select_columns([caption]).with_format("arrow").iter(10_000)
        told = [_has_text(batch[caption]) for batch in batches]
        self.keep(np.concatenate(told) if told else np.zeros(0, bool), "rows without a caption")

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, row = self.row(index)
        return {"image": image, "captions": _texts(row[self.caption]), "label": -1}


def _has_text(column: Any) -> np.ndarray:
    """(n,) bool: does a cell hold a caption?"""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        filled = pc.not_equal(pc.utf8_trim_whitespace(column), "").fill_null(False)
        return filled.combine_chunks().to_numpy(zero_copy_only=False)
    return np.array([bool(_texts(cell)) for cell in column.to_pylist()], dtype=bool)


class ShardPairs:
    """webdataset shards, read at random places. A sample that cannot be read is replaced by the next of its shard.

    Attributes:
        sizes: samples of each shard.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.class_names: list[str] = []
        self.problems, self.skipped = Counter[str](), Counter[str]()
        self.paths = [str(path) for path in paths]
        self.sizes = [len(shard_index(path, mmap=True)) for path in self.paths]
        self._ends = np.cumsum(self.sizes)
        for path in self.paths:
            lost, others = _index(path)[1:]
            self.problems += lost
            self.skipped += others

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, index: int) -> tuple[str, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self.paths[shard], index - int(self._ends[shard]) + self.sizes[shard]

    def exact(self, index: int, step: int = 0) -> dict[str, Any]:
        """A sample, or the one `step` behind it in its shard, without any that would stand in for it."""
        path, place = self._place(index)
        rows = _open_index(path)
        at, length, text_at, text_length = rows[(place + step) % len(rows)].tolist()
        image = decode_image(_piece(path, at, length), f"sample {place + step} of {path}")
        text = _piece(path, text_at, text_length).decode("utf-8", errors="replace").strip()
        return {"image": image, "captions": [text], "label": -1}

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, place = self._place(index)
        problem: ZooError | None = None
        for step in range(min(16, len(_open_index(path)))):
            try:
                return self.exact(index, step)
            except ZooError as error:
                problem = error
                warnings.warn(f"{error}; the next sample stands in for it", stacklevel=2)
        raise ZooError(f"{path}: no readable sample around number {place}") from problem


@lru_cache(maxsize=64)
def _open_index(path: str) -> np.ndarray:
    return shard_index(path)


@lru_cache(maxsize=64)
def _open_shard(path: str) -> io.FileIO:
    return io.FileIO(path)  # closed when it falls out of the cache


def _piece(path: str, at: int, length: int) -> bytes:
    return os.pread(_open_shard(path).fileno(), length, at)  # needs no position, so that forks may share the file


def shard_index(path: str | os.PathLike[str], mmap: bool = False) -> np.ndarray:
    """(n, 4) int64 of a tar of n pairs: where the picture begins in the file, its bytes, and the same of the text.

    Made at first use and kept in the cache folder, where that can be written, under the file's path, size and time. A
    key without a picture or a text is left out. Of a tar that breaks off, what is whole is taken; of several written
    one behind the other, all.

    Raises:
        ZooError: the file is no tar, or holds no pair.
    """
    kept = _index(path)[0]
    return np.load(kept, mmap_mode="r" if mmap else None) if isinstance(kept, Path) else kept


def _index(path: str | os.PathLike[str]) -> tuple[np.ndarray | Path, Counter[str], Counter[str]]:
    """The index of a tar or where it is kept, what was lost in it, and what is no picture and no text."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror}") from error
    mark = hashlib.sha256(f"2 {os.path.abspath(path)} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:24]
    kept = cache_dir() / "shards" / f"{mark}.npy"
    if kept.is_file() and (told := kept.with_suffix(".json")).is_file():
        content = read_json(told)
        return kept, Counter(content["problems"]), Counter(content["skipped"])
    rows, problems, skipped = _scan_once(str(path), mark)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with download.replacing(kept) as part, part.open("wb") as file:
            np.save(file, rows)
        with download.replacing(kept.with_suffix(".json")) as part:
            part.write_text(json.dumps({"problems": problems, "skipped": skipped}))
    except (OSError, ZooError):  # it is read again the next time
        return rows, problems, skipped
    return kept, problems, skipped


@lru_cache(maxsize=64)
def _scan_once(path: str, mark: str) -> tuple[np.ndarray, Counter[str], Counter[str]]:
    require_regular(path, 1 << 50)
    rows: list[tuple[int, ...]] = []
    problems, skipped = Counter[str](), Counter[str]()
    size = os.path.getsize(path)
    reached = 0
    try:
        with open(path, "rb") as file:
            while (begin := _next_archive(file, reached)) is not None:
                images: dict[str, tuple[int, int]] = {}
                texts: dict[str, tuple[int, int]] = {}
                file.seek(begin)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        if member.offset < reached or member.size < 0:
                            raise tarfile.ReadError("a member that lies before another")
                        reached = member.offset + tarfile.BLOCKSIZE
                        if member.isfile() and member.offset_data + member.size > size:
                            raise tarfile.ReadError("unexpected end of data")
                        _sort_in(member, images, texts, problems, skipped)
                    if tar.offset == begin or tar.offset >= size:  # no header, or no end
                        raise tarfile.ReadError("unexpected end of data")
                    reached = tar.offset
                rows += [(*images[key], *texts[key]) for key in images if key in texts]
                _count(problems, "pictures without a .txt", len(images.keys() - texts.keys()))
                _count(problems, "texts without a picture", len(texts.keys() - images.keys()))
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        rows += [(*images[key], *texts[key]) for key in images if key in texts] if reached else []
        if not rows:
            raise ZooError(f"{path} is no whole tar: {reason(error)}") from error
        problems["shards that break off or are damaged"] += 1
    if not rows:
        raise ZooError(f"{path} holds no pair of a picture and a .txt of one name")
    return np.array(rows, dtype=np.int64), problems, skipped


def _count(counts: Counter[str], what: str, number: int) -> None:
    if number:
        counts[what] += number


def _next_archive(file: io.BufferedReader, at: int) -> int | None:
    """Where in a file of tars the next one begins, from the block at `at` on; None: only zeros follow."""
    file.seek(at)
    while block := file.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            return at
        at += tarfile.BLOCKSIZE
    return None if at else 0  # an empty file is none


def _sort_in(
    member: tarfile.TarInfo,
    images: dict[str, tuple[int, int]],
    texts: dict[str, tuple[int, int]],
    problems: Counter[str],
    skipped: Counter[str],
) -> None:
    folder, _, name = member.name.rpartition("/")
    key, dot, kind = name.partition(".")
    if not member.isfile() or not key:
        return
    ending = f"{dot}{kind}".lower()
    kinds = images if ending in EXTENSIONS else texts if ending == ".txt" else None
    if kinds is None:
        _count(skipped, f"members ending in {ending or 'nothing'}", ending != ".json")  # img2dataset writes those
    elif f"{folder}/{key}" in kinds:
        problems["members of a name that came before"] += 1
    else:
        kinds[f"{folder}/{key}"] = member.offset_data, member.size


# ------------------------------------------------------------------------------------------------------ what lies where

Layout = tuple[list[str], Callable[[str], Source]]
"""The parts of a set, and how to open one."""


def _known_parts(names: Sequence[str]) -> list[str]:
    known = {alias for names_ in ALIASES.values() for alias in names_}
    return [name for name in names if name.lower() in known]


def _shards(folder: Path) -> Layout | None:
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    parts = {path.name: sorted(path.glob("*.tar")) for path in below if _known_parts([path.name])}
    parts = {name: files for name, files in parts.items() if files}
    if not parts:
        files = sorted(folder.glob("*.tar"))
        if not files:
            return None
        parts = {"train": files[:-1], "val": files[-1:]} if len(files) > 1 else {"train": files}
    return list(parts), lambda part: ShardPairs(parts[part])


def _lists(path: Path, *wanted: str) -> dict[str, list[dict[str, Any]]]:
    """The `wanted` lists of objects in a json."""
    content = read_json(path)
    for key in wanted:
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ZooError(f"{path} has no lists {' and '.join(wanted)}")
    return content


def _name_of(entry: dict[str, Any], key: str, path: Path) -> str:
    """The text under a key."""
    name = entry.get(key)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ZooError(f"{path}: an image has no {key}, but {str(name)[:80]!r}")
    return name


def _coco(folder: Path) -> Layout | None:
    where = folder / "annotations" if (folder / "annotations").is_dir() else folder
    files = {path.stem.removeprefix("captions_"): path for path in sorted(where.glob("captions_*.json"))}
    parts = {name.rstrip("0123456789") or name: (name, path) for name, path in files.items()}
    if not parts:
        return None

    def open_part(part: str) -> Source:
        name, path = parts[part]
        content = _lists(path, "images", "annotations")

        def key(value: Any) -> int | str:
            number = whole_number(value)
            return str(value) if number is None else number

        texts: dict[int | str, list[str]] = {key(entry.get("id")): [] for entry in content["images"]}
        problems: Counter[str] = Counter()
        for entry in content["annotations"]:
            told = texts.get(key(entry.get("image_id")))
            found = _texts(entry.get("caption"))
            _count(problems, "captions of images that the json does not have", told is None)
            _count(problems, "captions that are empty or no text", not found)
            if told is not None:
                told += found
        find = _finder(folder, (name, part, "images", ""))
        images = [(_name_of(entry, "file_name", path), texts[key(entry.get("id"))]) for entry in content["images"]]
        return FilePairs([(find(file) if told else "", told) for file, told in images], problems)

    return list(parts), open_part


def _karpathy(folder: Path) -> Layout | None:
    files = [file for file in sorted(folder.glob("dataset_*.json")) if file.name not in _OF_DATASETS]
    if not files:
        return None
    content = _lists(files[0], "images")["images"]
    split_of = {"restval": "train"}
    parts: dict[str, list[dict[str, Any]]] = {}
    for entry in content:
        split = _name_of(entry, "split", files[0])
        parts.setdefault(split_of.get(split, split), []).append(entry)

    def open_part(part: str) -> Source:
        find = _finder(folder, ("images", "flickr30k-images", "flickr30k_images", ""))
        pairs = []
        for entry in parts[part]:
            sentences = entry.get("sentences")
            raw = [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else []
            name = os.path.join(str(entry.get("filepath") or ""), _name_of(entry, "filename", files[0]))
            pairs.append((find(name), _texts(raw)))
        return FilePairs(pairs)

    return list(parts), open_part


def _finder(folder: Path, places: Sequence[str]) -> Callable[[str], str]:
    """Where pictures lie: under the first of `places` in `folder` that holds the first one asked for. A name that leads
    out of `folder` is refused."""
    place: list[Path] = []
    inside = os.path.join(os.path.abspath(folder), "")

    def find(name: str) -> str:
        candidates = [folder / under for under in places]
        for candidate in place or candidates:
            if not os.path.abspath(candidate / name).startswith(inside):
                raise ZooError(f"{folder}: the picture {name!r} leads out of the folder")
        if not place:
            found = next((c for c in candidates if os.path.isfile(c / name)), None)
            if found is None:
                raise ZooError(f"{folder}: no picture {name} in {', '.join(str(c) for c in candidates)}")
            place.append(found)
        return str(place[0] / name)

    return find


def _tables(path: Path) -> Layout | None:
    files = [path] if not path.is_dir() else sorted([*path.glob("[!.]*.tsv"), *path.glob("[!.]*.csv")])
    tables = {file.stem if _known_parts([file.stem]) else "train": file for file in files if file.suffix not in TABLES}
    if not tables:
        return None
    return list(tables), lambda part: _read_table(tables[part])


def _read_table(file: Path) -> FilePairs:
    """A table of ``filepath`` and ``title`` or ``caption``.

    Raises:
        ZooError: it lacks these columns, or quotes are open at its end.
    """
    problems: Counter[str] = Counter()
    rows = _rows(file, problems)
    head = rows[0] if rows else []
    caption = next((c for c in ("title", *CAPTION_COLUMNS) if c in head), None)
    if caption is None or "filepath" not in head:
        raise ZooError(f"{file} needs the columns filepath and title; it has {', '.join(head)[:200]}")
    at, told = head.index("filepath"), head.index(caption)
    pairs = []
    for row in rows[1:]:
        if len(row) <= at or not row[at].strip() or "\0" in row[at]:
            problems["rows without a path"] += 1
        else:
            pairs.append((str(file.parent / row[at]), _texts(row[told] if told < len(row) else None)))
    return FilePairs(pairs, problems)


def _rows(file: Path, problems: Counter[str]) -> list[list[str]]:
    """The rows of a csv or tsv, its head first.

    A quote that nothing closes would make one row of all that follow. So where rows reach over lines and every line is
    a row by itself, with all columns and a picture's name, the lines are the rows and their quotes mean nothing.
    """
    text = read_text(file)
    mark = "\t" if file.suffix == ".tsv" else ","
    csv.field_size_limit(1 << 27)
    try:
        rows: list[list[str]] | None = [
            row for row in csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True) if row
        ]
    except csv.Error:
        rows = None
    if rows is not None and not any("\n" in cell or "\r" in cell for row in rows for cell in row):
        return rows
    lines = [line for line in io.StringIO(text, newline=None).read().split("\n") if line]
    head = next(csv.reader(lines[:1], delimiter=mark), [])
    at = head.index("filepath") if "filepath" in head else 0
    found, open_ = [head], 0
    for line in lines[1:]:
        try:
            row = next(csv.reader([line], delimiter=mark, strict=True))
        except csv.Error:
            split = line.rsplit if at == len(head) - 1 else line.split  # marks left over are the caption's
            row, open_ = split(mark, len(head) - 1), open_ + 1
        found.append(row)
    if all(len(row) == len(head) and row[at].strip().lower().endswith(EXTENSIONS) for row in found[1:]):
        _count(problems, "rows with an unmatched quote, read as they stand", open_)
        return found
    if rows is None:
        raise ZooError(
            f"{file}: an unmatched quote, and lines that are no rows by themselves; double or remove the quote"
        )
    return rows


def _arrow(splits: dict[str, Any], name: str, image: str | None, caption: str | None) -> Layout:
    features = next(iter(splits.values())).features
    column = image_column(splits, image, name)
    caption = caption or next((k for k in CAPTION_COLUMNS if k in features), None)
    for split in splits.values():
        if caption not in split.features:
            named = f" {caption!r}" if caption else ""
            raise ZooError(
                f"{name} has no caption column{named}; columns: {', '.join(split.features)};"
                " data.options.caption_column names it"
            )
    return list(splits), lambda part: ArrowPairs(splits[part], column, str(caption), name)


class PromptPairs:
    """Labelled pictures whose captions are the prompts of their class."""

    def __init__(self, pictures: Source, texts: Sequence[Sequence[str]]) -> None:
        self.pictures, self.texts, self.class_names = pictures, texts, pictures.class_names

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.pictures[index]
        return {"image": row["image"], "captions": self.texts[int(row["label"])], "label": row["label"]}


def _card(dataset: str) -> Any | None:
    from zoo.catalog import data_card, list_datasets

    return data_card(dataset) if dataset in list_datasets() else None


def open_pairs(
    dataset: str, split: str = "train", data_dir: str | os.PathLike[str] | None = None, **options: Any
) -> Source:
    """Open a split of a set of captioned pictures.

    Args:
        dataset: a card's name, a path, or ``hf://org/name``.
        split: "train", "val", "test" or "predict".
        data_dir: where a carded set lies: the folder itself, or the one that holds it under its name.
        **options: for ``shapes``: `size`, `length`, `seed` and its knobs; else `revision`, `config` (of the hub),
            `image_column`, `caption_column`.

    Raises:
        ZooError: nothing there, an unknown layout or option, or a split that cannot be served.
    """
    if dataset == "shapes":
        plain = open_source(dataset, split, **options)  # which checks all of it
        assert isinstance(plain, ShapesDataset)
        if options.get("cache") is not None:
            raise ZooError("shapes: captions are drawn with their pictures; leave the option cache out")
        return ShapesPairs(plain.split, plain.length, plain.size, plain.seed, **plain.knobs)
    for option in options:
        if option not in _OPTIONS:
            raise unknown(f"option of {dataset}", option, _OPTIONS)
    columns = (options.get("image_column"), options.get("caption_column"))
    card = None if dataset.startswith("hf://") else _card(dataset)
    hub = dataset.removeprefix("hf://").strip("/") if dataset.startswith("hf://") else None
    if card is not None:
        columns = (columns[0] or card.columns.image, columns[1] or card.columns.caption)
        if card.columns.caption is None:
            raise ZooError(f"{dataset} is a set of {card.task}: it has no captions")
        if data_dir is None:
            hub = card.hub_id
            if hub is None:
                raise ZooError(f"{dataset} is read from a folder only: give its path as data_dir")
    if hub is not None:
        parts, open_part = _arrow(hub_splits(hub, options.get("revision"), options.get("config")), dataset, *columns)
    else:
        path = Path(dataset if card is None else data_dir or "").expanduser()
        path = path / dataset if card is not None and (path / dataset).is_dir() else path
        if card is None and not path.exists() and os.sep not in dataset and not dataset.startswith("."):
            from zoo.catalog import list_datasets

            raise unknown("dataset", dataset, list_datasets())
        (parts, open_part), dataset = _at_path(path, options, "dataset" if card is None else "data_dir"), str(path)
    part, which = choose_part(split, parts, dataset)
    source = open_part(part)
    tell(dataset, getattr(source, "problems", {}), getattr(source, "skipped", {}))
    if not len(source):
        raise ZooError(f"{dataset}: no pairs in split {part!r}")
    return select(source, which)


def is_caption_set(path: Path) -> bool:
    """Does a path hold captioned pictures, rather than labelled ones with a tar or a table beside them?"""
    if path.is_dir():
        if _coco(path) or _karpathy(path):
            return True
        if _shards(path):
            return not any(holds_pictures(path / name) for name in subfolders(path))
    tables = [path] if path.is_file() else [*path.glob("[!.]*.tsv"), *path.glob("[!.]*.csv")]
    for table in tables:
        if table.suffix in (".tsv", ".csv"):
            head = set(re.split(r"[,\t]", read_text(table).partition("\n")[0].strip()))
            if "filepath" in head and head & {"title", *CAPTION_COLUMNS}:
                return True
    splits = arrow_splits(path)
    columns = next(iter(splits.values())).features if splits else {}
    return any(name in columns for name in CAPTION_COLUMNS) and not any(name in columns for name in LABEL_NAMES)


def _at_path(path: Path, options: dict[str, Any], what: str) -> Layout:
    if not path.exists():
        raise missing_path(path, what)
    if path.is_dir():
        for recognise in (_shards, _coco, _karpathy):
            if layout := recognise(path):
                return layout
    splits = arrow_splits(path) if path.is_dir() or path.suffix in TABLES else None
    if splits is not None:
        return _arrow(splits, str(path), options.get("image_column"), options.get("caption_column"))
    if layout := _tables(path):
        return layout
    raise ZooError(
        f"{path} is in no known layout of captioned pictures: need webdataset shards, COCO captions, a Karpathy split,"
        " parquet files, a saved datasets folder, or a table of filepath and title"
    )


# ---------------------------------------------------------------------------------------------------- order and samples


class StreamSampler(EpochSampler):
    """Epochs of `epoch_samples` cut out of an endless stream that passes over all samples again and again.

    In each pass shards come in an order of their own, and samples are shuffled within groups of `window` shards, so
    that few files are open at a time. The order is a function of (seed, pass); ranks are dealt samples in turn.

    Args:
        sizes: samples of each shard, in the order of their numbers.
        epoch_samples: length of an epoch ("virtual" where it is not that of a pass).
        seed, rank, world: as of :class:`EpochSampler`.
    """

    def __init__(
        self, sizes: Sequence[int], epoch_samples: int, seed: int = 0, window: int = 8, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(epoch_samples, seed, 1, rank, world)
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.window = window

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        first = self.epoch * self.length
        stop = first + self.num_samples * self.num_replicas
        at = first + self.first * self.num_replicas + self.rank
        total = int(self.sizes.sum())
        while at < stop:
            turn, place = divmod(at, total)
            end = min(stop - turn * total, total)
            for begin, samples in self._groups(turn, place):
                for position in range(place - begin, min(end - begin, len(samples)), self.num_replicas):
                    yield int(samples[position]), turn, 0
                    place += self.num_replicas
                if place >= end:
                    break
            at = turn * total + place

    def _groups(self, turn: int, place: int) -> Iterator[tuple[int, Tensor]]:
        """Of one pass, from the group that holds `place` on: where a group begins, and its samples in their order."""

        def generator(*words: int) -> torch.Generator:
            return torch.Generator().manual_seed(int(hash64(self.seed, turn, *words)[0]))

        begin = 0
        order = torch.randperm(len(self.sizes), generator=generator())
        for number, group in enumerate(order.split(self.window)):
            count = int(self.sizes[group.numpy()].sum())
            if begin + count > place:
                runs = [torch.arange(self.starts[s], self.starts[s] + self.sizes[s]) for s in group.tolist()]
                yield begin, torch.cat(runs)[torch.randperm(count, generator=generator(number))]
            begin += count


class PairSet(SampleSet):
    """A source of captioned pictures, batched: {"image" (B, 3, S, S), "text" (M, L) int64, "caption" list of M str,
    "owner" (M,), "label" (B,), "index" (B,)}, `owner` being the index of the picture a text belongs to.

    Args (beside those of :class:`~zoo.data.datamodule.SampleSet`):
        tokenize: texts to numbers.
        draw: give one caption of each picture, drawn at random (M = B), as in training.
        captions: otherwise, how many of each at most; None: all.
    """

    def __init__(
        self, *arguments: Any, tokenize: WordPiece, draw: bool = True, captions: int | None = None, **facts: Any
    ) -> None:
        super().__init__(*arguments, **facts)
        self.tokenize, self.captions_drawn, self.captions = tokenize, draw, captions

    def _read(self, index: Sequence[int]) -> tuple[Sequence[Tensor] | Tensor, Batch]:
        if isinstance(self.source, ManyReader):
            many: dict[str, Any] = self.source.read_many(index)
            return many["image"], {"label": many["label"], "captions": many["captions"]}
        rows = [self.source[i] for i in index]
        facts = {"label": torch.tensor([row["label"] for row in rows]), "captions": [row["captions"] for row in rows]}
        return [row["image"] for row in rows], facts

    def __getitems__(self, keys: Sequence[Any]) -> Batch:
        batch = super().__getitems__(keys)
        captions, parts = batch.pop("captions"), key_parts(keys)
        if self.captions_drawn:
            draws = hash64(self.seed, self.salt, parts[:, 1], parts[:, 0], parts[:, 2], 1).tolist()
            kept = [[texts[draw % len(texts)]] for texts, draw in zip(captions, draws, strict=True)]
        else:
            kept = [texts[: self.captions] for texts in captions]
        flat = [text for texts in kept for text in texts]
        owner = batch["index"].repeat_interleave(torch.tensor([len(texts) for texts in kept]))
        return {**batch, "text": self.tokenize(flat), "caption": flat, "owner": owner}


# ------------------------------------------------------------------------------------------------------ the data module


class ImageTextDataModule(ImageDataModule):
    """Captioned pictures for training, and for evaluation captions to retrieve or classes to tell without training.

    Batches as of :class:`PairSet`. With `eval_dataset`, evaluation batches are its labelled pictures instead: image,
    label, index. Seeds, order and resumption are those of :class:`~zoo.data.ImageDataModule`.

    Args:
        dataset: a card's name, a folder or ``hf://org/name``, see :mod:`zoo.data.image_text`.
        data_dir: where a carded set lies on this machine.
        batch_size: per device.
        eval_batch_size: per device; None: as `batch_size`.
        image_size: side in pixels; None: the card's, else 224.
        train_transform: on uint8 (3, H, W); None: resize and crop the middle.
        eval_transform: likewise, for val, test and predict.
        num_workers: loading processes; None: none for sets in memory, else what the machine's cores allow.
        train_samples: train on this many pairs only, drawn once with the seed; for ``shapes`` the split's length.
        epoch_samples: length of an epoch, whatever the set's (FLIP counts "virtual" epochs of 1,281,167 samples).
        tokenizer: a vocabulary's name or file, see :mod:`zoo.data.text`.
        context_length: L, tokens of a text.
        captions: the set's "own", or of a labelled set without any the "prompts" of each picture's class, in training;
            evaluation has none to retrieve then.
        eval_captions: captions of a picture that are evaluated; None: all.
        eval_dataset: labelled pictures to classify in evaluation instead of the set's own splits.
        eval_data_dir: where they lie.
        templates: of zero-shot prompts: ``short``, ``long``, or a list.
        seed: of order, augmentation and the choice of captions; None: the one of ``seed_everything``, else 0.
        options: further keywords of the source.
        mean, std: of the channels, instead of the card's.

    Attributes:
        num_classes, class_names: of `eval_dataset`, else of the set's own labels, if it has any.

    Raises:
        ZooError: an unknown data set, vocabulary or option, a missing folder, a count that makes no sense.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        data_dir: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        image_size: int | None = None,
        train_transform: nn.Module | None = None,
        eval_transform: nn.Module | None = None,
        num_workers: int | None = None,
        train_samples: int | None = None,
        epoch_samples: int | None = None,
        tokenizer: str = "bert",
        context_length: int = 32,
        captions: Literal["own", "prompts"] = "own",
        eval_captions: int | None = 5,
        eval_dataset: str | None = None,
        eval_data_dir: str | None = None,
        templates: str | list[str] = "short",
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        if captions not in ("own", "prompts"):
            raise unknown("captions", captions, ("own", "prompts"))
        self.captions = captions
        self.eval_dataset, self.eval_data_dir, self.templates = eval_dataset, eval_data_dir, templates
        at_least_one(epoch_samples=epoch_samples, eval_captions=eval_captions)
        self.epoch_samples, self.eval_captions = epoch_samples, eval_captions
        self.tokenize = WordPiece(tokenizer, context_length)
        super().__init__(
            dataset=dataset,
            data_dir=data_dir,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            image_size=image_size,
            train_transform=train_transform,
            eval_transform=eval_transform,
            num_workers=num_workers,
            train_samples=train_samples,
            seed=seed,
            options=options,
            mean=mean,
            std=std,
        )
        self._eval_sources: dict[str, Source] = {}
        self._prompts: Tensor | None = None

    def preprocess_facts(self) -> dict[str, Any]:
        """Those of the pictures, and of the texts: "tokenizer", "context_length", "templates"."""
        words = {"tokenizer": str(self.tokenize.vocabulary), "context_length": self.tokenize.length}
        return {**super().preprocess_facts(), **words, "templates": self.templates}

    def _describe(self, dataset: str, data_dir: str | None, options: dict[str, Any]) -> Description:
        if self.captions == "prompts":
            about = describe(dataset, data_dir, **options)
        else:
            about = describe_pairs(dataset, **options)
        if self.eval_dataset is None:
            return about
        known = describe(self.eval_dataset, self.eval_data_dir)
        names = known.class_names
        if not names or names == [str(k) for k in range(len(names))]:
            names = prompts(self.eval_dataset)[0]
        return Description(len(names), names, about.image_size, about.mean, about.std, about.in_memory)

    def _open(self, split: str, **options: Any) -> Source:
        if self.captions == "prompts":
            pictures = open_source(self.dataset, split, self.data_dir, **options)
            return PromptPairs(pictures, prompts(self.dataset, pictures.class_names, self.templates)[1])
        return open_pairs(self.dataset, split, self.data_dir, **options)

    def prepare_data(self) -> None:
        """Fetch what is to be fetched, in one process a node: a set of the hub, the vocabulary, the shards' index.

        Pictures of `eval_dataset` alone are evaluated, and what is trained on need not be there.
        """
        if self.eval_dataset is None or self.trainer is None or self.trainer.state.fn == "fit":
            super().prepare_data()
        vocabulary_path(self.tokenize.vocabulary)
        path = Path(self.data_dir or self.dataset).expanduser()
        if path.is_dir():
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                list(pool.map(shard_index, [*path.glob("*.tar"), *path.glob("*/*.tar")]))

    @property
    def class_prompts(self) -> Tensor | None:
        """Token numbers (K, T, L) of T prompts for each of the K classes; None where there are no classes."""
        if self._prompts is None and self.class_names:
            _, texts = prompts(self.eval_dataset or self.dataset, self.class_names, self.templates)
            self._prompts = self.tokenize.table(texts)
        return self._prompts

    def samples(self, split: str, train_transform: bool | None = None) -> SampleSet:
        """The transformed split; of `eval_dataset` where that serves it."""
        use_train = split == "train" if train_transform is None else train_transform
        transform = self.train_transform if use_train else self.eval_transform
        if self.eval_dataset is not None and split != "train":
            if split not in self._eval_sources:
                self._eval_sources[split] = open_source(self.eval_dataset, split, self.eval_data_dir)
            return SampleSet(self._eval_sources[split], transform, self.mean, self.std, self.seed, SALT[split])
        if self.captions == "prompts" and split != "train":
            return SampleSet(self.source(split), transform, self.mean, self.std, self.seed, SALT[split])
        return PairSet(
            self.held(split),
            transform,
            self.mean,
            self.std,
            self.seed,
            SALT[split],
            tokenize=self.tokenize,
            draw=split == "train",
            captions=self.eval_captions,
        )

    def train_sampler(self, samples: Any) -> EpochSampler:
        """The order of training on this rank: of shards, or where `epoch_samples` is given, a stream's."""
        source = self.source("train")
        sizes = source.sizes if isinstance(source, ShardPairs) else [len(samples)]
        if self.epoch_samples is None and len(sizes) == 1:
            return super().train_sampler(samples)
        return StreamSampler(sizes, self.epoch_samples or len(samples), self.seed, **self._place())


def describe_pairs(dataset: str, **options: Any) -> Description:
    """Size and colour statistics of a captioned set, and the classes of the embedded world.

    A set without a card has size 224 and ImageNet's mean and deviation.
    """
    if dataset == "shapes":
        return describe(dataset, **options)
    from zoo.data.transforms import IMAGENET_MEAN, IMAGENET_STD

    card = None if dataset.startswith("hf://") else _card(dataset)
    mean, std = (card.mean, card.std) if card is not None else (None, None)
    size = card.image_size if card is not None else None
    return Description(0, [], size or 224, tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD), False)
