"""Sets of videos from wherever they lie: Kinetics lists, folders of clips, frame lists with labels, AVA's key frames.

A set is named by its card (``kinetics400``, with its folder as ``data_dir``) or by a path. What lies at a path is
recognised:

- a list ``.csv``, or a folder with ``train.csv``, ``val.csv``, ``test.csv``: a video a line, ``path label`` or
  ``path extra label`` or ``path`` (unlabelled, -1), separated by spaces, commas or tabs; a path with separators in it
  is known by its ending, or by what lies there. Class names come from
  ``classids.json`` ({name: number}) beside it, where it is;
- the same names with a frame list in them (first line ``original_vido_id video_id frame_id path labels``): Charades,
  several labels a frame, or Something-Something, with its ``something-something-v2-*.json`` beside;
- a folder with ``frame_lists``, ``frames`` and ``annotations``: AVA;
- ``<class>/<video>``, also one level down in ``train``, ``val``, ``test``, or videos alone, unlabelled. A video may be
  a file or a folder of pictures.

What a folder holds beside videos is counted in a source's `skipped` and `problems`. Splits are chosen as in
:mod:`zoo.data.sources`. Whether a listed video is there and whole is found out when it is read.
"""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zoo.data.clips import LENGTHS, ClipsDataset
from zoo.data.clips import make_knobs as clip_knobs
from zoo.data.files import numbered_classes, read_json, read_text, tell
from zoo.data.sources import ALIASES, HOLD_OUT, choose_part, lead_part, missing_path, split_folders, subfolders
from zoo.data.video_reader import PicturesReader, VideoReader, is_video, open_video, pictures_in
from zoo.errors import ZooError, unknown

if TYPE_CHECKING:
    from zoo.catalog import DataCard

FRAME_LIST_HEADER = "original_vido_id"  # sic
_OPTIONS = ("backend", "fps", "min_frames", "prefix", "separator")
_AVA_OPTIONS = (
    *("version", "label_map", "train_boxes", "eval_boxes", "train_score_threshold", "score_threshold", "val_every"),
)
_AVA_SECONDS = range(902, 1799)  # those with annotations
_AVA_START, _AVA_FPS, _AVA_CLASSES = 900, 30, 80


class VideoSource(Protocol):
    """A split of a set of videos.

    Attributes:
        kind: "label", one class a video; "labels", any number; "boxes", classes of boxes on key frames.
    """

    class_names: list[str]
    kind: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls the video."""
        ...

    def open(self, index: int) -> VideoReader:
        """The video; :class:`~zoo.data.video_reader.VideoError` where it cannot be read."""
        ...


def _multi_hot(classes: Sequence[int], count: int) -> Tensor:
    hot = torch.zeros(count)
    hot[list(classes)] = 1
    return hot


class _Checkable:
    """Lets ``zoo data check`` look at videos as it looks at pictures: first, middle and last frame."""

    class_names: list[str]

    def __getitem__(self: Any, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        reader = self.open(index)
        try:
            last = reader.num_frames - 1
            frames = reader.frames_at([0, last // 2, last])
        finally:
            reader.close()
        return {"image": frames, "label": self.classes_of(index)}


class VideoList(_Checkable):
    """Videos with one label each, -1 without."""

    kind = "label"

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        class_names: list[str],
        backend: str | None = None,
        fps: float = 30.0,
        skipped: Counter[str] | None = None,
    ) -> None:
        self.skipped, self.problems = skipped or Counter(), Counter[str]()
        self.paths = np.array(paths, dtype=np.str_)  # one block of memory, which worker processes share
        self._labels = np.asarray(labels, dtype=np.int64)
        self.class_names, self.backend, self.fps = class_names, backend, fps

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def open(self, index: int) -> VideoReader:
        return open_video(str(self.paths[index]), self.backend, self.fps)

    def label(self, index: int, frames: Tensor | None = None) -> int:
        """The video's class."""
        return int(self._labels[index])

    def classes_of(self, index: int) -> int:
        """The same."""
        return int(self._labels[index])


@dataclass
class FrameList:
    """The videos of a frame list: their pictures, and the classes of each picture."""

    names: list[str]
    paths: list[np.ndarray]  # of bytes, which take a quarter of what text takes
    codes: list[np.ndarray]  # for each picture, which of `sets` holds for it
    sets: list[tuple[int, ...]]


class PicturesSource(_Checkable):
    """Videos as pictures, with one label each, or with labels a picture (`labels` None).

    In training a clip has the classes of the pictures it spans, else those of the whole video.
    """

    def __init__(
        self,
        frames: FrameList,
        prefix: str,
        class_names: list[str],
        labels: Sequence[int] | None = None,
        fps: float = 30.0,
    ) -> None:
        self.frames, self.prefix, self.class_names, self.fps = frames, prefix, class_names, fps
        self.kind = "labels" if labels is None else "label"
        self._labels = None if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.frames.names)

    def name(self, index: int) -> str:
        return self.frames.names[index]

    def open(self, index: int) -> VideoReader:
        return PicturesReader(_Joined(self.prefix, self.frames.paths[index]), self.fps)

    def label(self, index: int, frames: Tensor | None = None) -> int | Tensor:
        """Its class, or (K,) float32 of 0 and 1: the classes from the first to the last of `frames`, None: of all."""
        if self._labels is not None:
            return int(self._labels[index])
        return _multi_hot(self._spanned(index, frames), len(self.class_names))

    def _spanned(self, index: int, frames: Tensor | None = None) -> list[int]:
        codes = self.frames.codes[index]
        if frames is not None:
            codes = codes[int(frames[0]) : int(frames[-1]) + 1]
        return sorted({label for code in np.unique(codes).tolist() for label in self.frames.sets[code]})

    def classes_of(self, index: int) -> int | list[int]:
        """Its class or classes."""
        return self._spanned(index) if self._labels is None else int(self._labels[index])


class _Joined(Sequence):
    """Paths below a folder, joined when asked for."""

    def __init__(self, prefix: str, paths: np.ndarray) -> None:
        self.prefix, self.paths = prefix, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return os.path.join(self.prefix, self.paths[index].decode())


class AVASource(_Checkable):
    """Key frames of long videos: boxes, normalised to 0..1, and what the people in them do."""

    kind = "boxes"

    def __init__(
        self,
        frames: FrameList,
        prefix: str,
        items: list[tuple[int, int]],
        boxes: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]],
        truth: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]],
        class_names: list[str],
    ) -> None:
        self.frames, self.prefix, self.items, self.class_names = frames, prefix, items, class_names
        self._boxes, self._truth = boxes, truth

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        video, second = self.items[index]
        return f"{self.frames.names[video]},{second:04d}"

    def open(self, index: int) -> VideoReader:
        return PicturesReader(_Joined(self.prefix, self.frames.paths[self.items[index][0]]), _AVA_FPS)

    def keyframe(self, index: int) -> dict[str, Any]:
        """{"frame" its number, "boxes" (N, 4) to classify and their "labels" (N, K) of 0 and 1, "true_boxes" (G, 4)
        with "true_labels" (G,), a row for each label, "video_id", "second"}; boxes normalised, float32."""
        video, second = key = self.items[index]
        boxes, hot = self._boxes.get(key, _no_boxes(len(self.class_names)))
        true_boxes, true_hot = self._truth.get(key, _no_boxes(len(self.class_names)))
        which, labels = np.nonzero(true_hot)
        return {
            "frame": (second - _AVA_START) * _AVA_FPS,
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(hot),
            "true_boxes": torch.from_numpy(true_boxes[which]),
            "true_labels": torch.from_numpy(labels),
            "video_id": video,
            "second": second,
        }

    def classes_of(self, index: int) -> list[int]:
        """The classes on the key frame."""
        return sorted(set(self.keyframe(index)["true_labels"].tolist()))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        frame = min(self.keyframe(index)["frame"], len(self.frames.paths[self.items[index][0]]) - 1)
        return {"image": self.open(index).frames_at([frame]), "label": self.classes_of(index)}


def _no_boxes(classes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((0, 4), np.float32), np.zeros((0, classes), np.float32)


class VideoPart(_Checkable):
    """Some videos of another source, in the order given."""

    def __init__(self, source: Any, indices: Sequence[int] | Tensor) -> None:
        self.source, self.indices = source, torch.as_tensor(indices, dtype=torch.long)
        self.class_names, self.kind = source.class_names, source.kind
        self.problems, self.skipped = (getattr(source, name, Counter()) for name in ("problems", "skipped"))

    def __len__(self) -> int:
        return len(self.indices)

    def __getattr__(self, name: str) -> Any:
        if name not in ("name", "open", "label", "keyframe", "classes_of"):
            raise AttributeError(name)
        method = getattr(self.source, name)
        return lambda index, *rest: method(int(self.indices[index]), *rest)


# ------------------------------------------------------------------------------------------------------- reading lists


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if text := line.strip():
            yield number, text


def _separator(line: str) -> str:
    """What stands between the columns of a list, told by its first line."""
    for mark in ("\t", ",", " "):
        columns = line.split(mark)
        if len(columns) in (2, 3) and columns[-1].strip().isdigit():
            return mark
    return " "


def _columns(line: str, separator: str, root: str) -> tuple[str | None, str | None]:
    """The path and the label, None without, of a line; no path where it cannot be told. A separator may stand in the
    path itself."""
    if separator == "," and line.startswith('"'):
        columns = next(csv.reader([line]))
    else:
        columns = line.split(separator)
    columns = [column.strip() for column in columns]
    first, before, label = columns[0], separator.join(columns[:-1]), columns[-1]
    if (
        len(columns) == 1
        or is_video(line)
        or (not label.lstrip("-").isdigit() and os.path.isdir(os.path.join(root, line)))
    ):
        return line if len(columns) > 1 else first or None, None
    if len(columns) > 2 and not is_video(first) and (is_video(before) or os.path.isdir(os.path.join(root, before))):
        return before, label
    return first if first and len(columns) <= 3 else None, label


def read_video_list(path: Path, prefix: str | None = None, separator: str | None = None) -> tuple[list[str], list[int]]:
    """The videos of a Kinetics-style list and their labels.

    Args:
        path: the list.
        prefix: the folder that its paths are relative to; None: the list's own.
        separator: between columns; None: told by the first line.

    Raises:
        ZooError: a line with no or too many columns, or with a label that is no whole number; it names the line.
    """
    root = str(path.parent) if prefix is None else prefix
    paths, labels = [], []
    for number, line in _lines(path):
        separator = _separator(line) if separator is None else separator
        hint = "; data.options.separator says what stands between columns"
        name, label = _columns(line, separator, root)
        if name is None:
            count = len(line.split(separator))
            raise ZooError(f"{path}:{number}: need `path label`, got {count} columns between {separator!r}")
        try:
            labels.append(-1 if label is None else int(label))
        except ValueError as error:
            told = hint if number == 1 else ""
            raise ZooError(f"{path}:{number}: the label {str(label)[:40]!r} is no whole number{told}") from error
        if labels[-1] < -1:
            raise ZooError(f"{path}:{number}: the label {labels[-1]} is negative")
        listed = os.path.join(root, name)
        if "\0" in name or (label is None and not is_video(listed) and not os.path.isdir(listed)):
            raise ZooError(f"{path}:{number}: {line[:80]!r} is no video and has no label after {separator!r}{hint}")
        paths.append(listed)
    if not paths:
        raise ZooError(f"{path} lists no video")
    return paths, labels


def read_frame_list(path: Path) -> FrameList:
    """A frame list: ``original_vido_id video_id frame_id path labels`` a picture, labels as ``"3,17"`` or ``""``.

    Raises:
        ZooError: a line with other columns, or with labels that are no whole numbers; it names the line.
    """
    found: dict[str, tuple[list[bytes], list[int]]] = {}
    codes: dict[str, int] = {}
    sets: list[tuple[int, ...]] = []
    for number, line in _lines(path):
        columns = line.split()
        if number == 1 and columns[0] == FRAME_LIST_HEADER:
            continue
        if len(columns) != 5:
            raise ZooError(f"{path}:{number}: need 5 columns (video, number, frame, path, labels), got {len(columns)}")
        labels = columns[4]
        if labels not in codes:
            try:
                classes = tuple(int(word) for word in labels.strip("\"'").split(",") if word)
                if min(classes, default=0) < 0:
                    raise ValueError
            except ValueError as error:
                raise ZooError(f"{path}:{number}: the labels {labels[:40]} are no whole numbers") from error
            codes[labels] = len(sets)
            sets.append(classes)
        paths, numbers = found.setdefault(columns[0], ([], []))
        paths.append(columns[3].encode())
        numbers.append(codes[labels])
    if not found:
        raise ZooError(f"{path} lists no frames")
    return FrameList(
        list(found),
        [np.array(paths) for paths, _ in found.values()],
        [np.array(numbers, dtype=np.int32) for _, numbers in found.values()],
        sets,
    )


def read_label_map(path: Path) -> dict[int, str]:
    """Numbers and names of classes in a ``.pbtxt`` of blocks with ``name:`` and ``id:`` or ``label_id:``.

    Raises:
        ZooError: there are none.
    """
    classes: dict[int, str] = {}
    name = ""
    for number, line in _lines(path):
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "name":
            name = value.strip("\"'")
        elif key in ("id", "label_id"):
            if not value.isdigit():
                raise ZooError(f"{path}:{number}: the number {value!r} of {name!r} is no whole number")
            classes[int(value)] = name
    if not classes:
        raise ZooError(f"{path} has no classes")
    return classes


Boxes = dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]


def read_ava_boxes(paths: Sequence[Path], threshold: float | None = None, classes: int = _AVA_CLASSES) -> Boxes:
    """Boxes of AVA's lists: for each (video, second) boxes (N, 4) normalised and labels (N, classes) of 0 and 1.

    Rows are ``video,second,x1,y1,x2,y2,action,person`` or, for detections, with a score in the eighth column; equal
    boxes are one box with several labels. Seconds without annotations in AVA are passed over.

    Args:
        paths: the lists; their boxes are joined.
        threshold: leave out boxes with a lower score; None: the lists have no scores.
        classes: actions are numbered 1..classes; an empty one or -1 is none.

    Raises:
        ZooError: a row that cannot be read; it names the line.
    """
    found: dict[tuple[str, int], dict[tuple[str, ...], list[int]]] = {}
    for path in paths:
        for number, line in _lines(path):
            row = next(csv.reader([line]))
            try:
                if threshold is not None and float(row[7]) < threshold:
                    continue
                second = int(float(row[1]))
                action = int(row[6]) if row[6] not in ("", "-1") else 0
                coordinates = tuple(row[2:6])
                if not all(math.isfinite(float(x)) for x in coordinates) or len(coordinates) < 4:
                    raise ValueError
            except (ValueError, IndexError, OverflowError, csv.Error) as error:
                raise ZooError(f"{path}:{number}: need video,second,x1,y1,x2,y2,action,…; got {line[:80]!r}") from error
            if not 0 <= action <= classes:
                raise ZooError(f"{path}:{number}: the action {action} is outside 1..{classes}")
            if second in _AVA_SECONDS:
                labels = found.setdefault((row[0], second), {}).setdefault(coordinates, [])
                labels += [action - 1] if action else []
    return {
        key: (
            np.array([[float(x) for x in box] for box in boxes], np.float32),
            np.stack([_multi_hot(labels, classes).numpy() for labels in boxes.values()]),
        )
        for key, boxes in found.items()
    }


# ------------------------------------------------------------------------------------------------------ what lies where


@dataclass
class Layout:
    """A recognised set of videos: its parts by the names they have there, its classes, and how to open a part."""

    name: str
    parts: list[str]
    class_names: list[str]
    open: Callable[[str, str], Any]  # (part, split)
    kind: str = "label"
    sampling: str = "window"


def _list_parts(folder: Path) -> dict[str, Path]:
    known = {alias for names in ALIASES.values() for alias in names}
    return {p.stem: p for p in sorted(folder.glob("*.csv")) if p.stem.lower() in known}


def _first_line(path: Path) -> str:
    return next((line for _, line in _lines(path)), "")


def _class_names(folder: Path, count: int, listed: Path) -> list[str]:
    """Names from `classids.json`, else numbers."""
    path = folder / "classids.json"
    if not path.is_file():
        return numbered_classes(count, str(listed))
    ids = read_json(path)
    try:
        names = {int(number): str(name).strip('"') for name, number in ids.items()}
    except (AttributeError, ValueError, TypeError, OverflowError) as error:
        raise ZooError(f"{path}: need {{name: number}}") from error
    if sorted(names) != list(range(len(names))):
        raise ZooError(f"{path}: the numbers are not 0..{len(names) - 1}")
    return [names[k] for k in range(len(names))]


def _video_lists(folder: Path, parts: dict[str, Path], classes: int | None, options: dict[str, Any]) -> Layout:
    prefix, separator = options.get("prefix"), options.get("separator")
    read = {part: read_video_list(path, prefix, separator) for part, path in parts.items()}
    highest = max(max(labels) for _, labels in read.values())
    names = _class_names(folder, classes if classes is not None else highest + 1, next(iter(parts.values())))
    for part, (paths, labels) in read.items():
        if max(labels) >= len(names):
            at = next(k for k, label in enumerate(labels) if label >= len(names))
            raise ZooError(f"{parts[part]}: the label {labels[at]} of {paths[at]} is outside the {len(names)} classes")

    def open_part(part: str, split: str) -> VideoList:
        return VideoList(*read[part], names, options.get("backend"), options.get("fps") or 30.0)

    return Layout(str(folder), list(parts), names, open_part)


def _frame_lists(folder: Path, parts: dict[str, Path], classes: int | None, options: dict[str, Any]) -> Layout:
    prefix = options.get("prefix") or str(folder)
    ids = folder / "something-something-v2-labels.json"
    if ids.is_file():
        try:
            numbers = {str(name): int(number) for name, number in read_json(ids).items()}
        except (AttributeError, ValueError, TypeError, OverflowError) as error:
            raise ZooError(f"{ids}: need {{name: number}}") from error
        names = [name for name, _ in sorted(numbers.items(), key=lambda item: item[1])]

        def open_labelled(part: str, split: str) -> PicturesSource:
            stem = "train" if part.lower() in ALIASES["train"] else "validation"
            path = folder / f"something-something-v2-{stem}.json"
            frames, chosen, labels = read_frame_list(parts[part]), [], []
            place = {name: k for k, name in enumerate(frames.names)}
            entries = read_json(path)
            if not isinstance(entries, list) or not all(
                isinstance(e, dict) and {"id", "template"} <= set(e) for e in entries
            ):
                raise ZooError(f"{path}: need a list of objects with id and template")
            for entry in entries:
                template = str(entry["template"]).replace("[", "").replace("]", "")
                if template not in numbers:
                    raise unknown(f"template in {path}", template, numbers)
                if str(entry["id"]) in place:
                    chosen.append(place[str(entry["id"])])
                    labels.append(numbers[template])
            if not chosen:
                raise ZooError(f"{path} and {parts[part]} have no video in common")
            names_, paths, codes = frames.names, frames.paths, frames.codes
            kept = FrameList(
                [names_[k] for k in chosen], [paths[k] for k in chosen], [codes[k] for k in chosen], frames.sets
            )
            return PicturesSource(kept, prefix, names, labels)

        return Layout(str(folder), list(parts), names, open_labelled, sampling="segment")

    read: dict[str, FrameList] = {}

    def lists(part: str) -> FrameList:
        if part not in read:
            read[part] = read_frame_list(parts[part])
        return read[part]

    if classes is None:
        highest = max((max(labels, default=-1) for part in parts for labels in lists(part).sets), default=-1)
        classes = highest + 1
    names = numbered_classes(classes, str(next(iter(parts.values()))))

    def open_part(part: str, split: str) -> PicturesSource:
        frames = lists(part)
        for labels in frames.sets:
            if labels and not 0 <= min(labels) <= max(labels) < len(names):
                raise ZooError(f"{parts[part]}: the labels {labels} are outside the {len(names)} classes")
        return PicturesSource(frames, prefix, names)

    return Layout(str(folder), list(parts), names, open_part, kind="labels", sampling="strided")


def _ava(folder: Path, options: dict[str, Any]) -> Layout:
    annotations, version = folder / "annotations", str(options.get("version") or "2.2")
    parts = _list_parts(folder / "frame_lists")
    if not parts:
        raise ZooError(f"{folder / 'frame_lists'} holds neither train.csv nor val.csv")
    maps = sorted(annotations.glob("*.pbtxt"), key=lambda p: ("activitynet" not in p.name, p.name))
    label_map = annotations / options["label_map"] if options.get("label_map") else (maps[0] if maps else None)
    evaluated = read_label_map(label_map) if label_map else {k: str(k) for k in range(1, _AVA_CLASSES + 1)}
    if max(evaluated) > _AVA_CLASSES:
        raise ZooError(f"{label_map}: the class {max(evaluated)} is outside 1..{_AVA_CLASSES}")
    names = [evaluated.get(k, f"action {k}") for k in range(1, _AVA_CLASSES + 1)]
    columns = np.array([k in evaluated for k in range(1, _AVA_CLASSES + 1)])

    def listed(option: str) -> list[Path]:
        return [annotations / name for name in options.get(option) or ()]

    def open_part(part: str, split: str) -> AVASource:
        frames = read_frame_list(parts[part])
        place = {name: k for k, name in enumerate(frames.names)}
        training = part.lower() in ALIASES["train"]
        stem = "train" if training else "val"
        truth = read_ava_boxes([annotations / f"ava_{stem}_v{version}.csv"])
        if training and split == "train":
            boxes = {**truth}
            threshold = options.get("train_score_threshold")
            for key, more in read_ava_boxes(listed("train_boxes"), 0.9 if threshold is None else threshold).items():
                own = boxes.get(key, _no_boxes(_AVA_CLASSES))
                boxes[key] = tuple(np.concatenate(pair) for pair in zip(own, more, strict=True))  # type: ignore[assignment]
            excluded: set[tuple[str, int]] = set()
        else:
            lists = listed("eval_boxes") or [
                p for p in (annotations / f"ava_{stem}_predicted_boxes.csv",) if p.is_file()
            ]
            threshold = options.get("score_threshold")
            boxes = read_ava_boxes(lists, 0.8 if threshold is None else threshold) if lists else truth
            excluded = _excluded(annotations / f"ava_{stem}_excluded_timestamps_v{version}.csv")
        every = int(options.get("val_every") or 4) if split == "val" else 1
        keys = boxes.keys() | (truth.keys() if split != "train" else set())
        kept = sorted(k for k in keys if k[0] in place and k not in excluded and k[1] % every == 0)
        if absent := sorted({video for video, _ in keys if video not in place}):
            warnings.warn(
                f"{folder}: {len(absent)} annotated videos are not in {parts[part].name}, first: {absent[0]}",
                stacklevel=2,
            )
        if not kept:
            raise ZooError(f"{folder}: no key frame of split {split!r} has both frames and annotations")

        def numbered(found: Boxes) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
            return {(place[video], second): found[video, second] for video, second in kept if (video, second) in found}

        graded = {key: (where, hot * columns) for key, (where, hot) in truth.items()}
        items = [(place[video], second) for video, second in kept]
        prefix = options.get("prefix") or str(folder / "frames")
        return AVASource(frames, prefix, items, numbered(boxes), numbered(graded), names)

    return Layout(str(folder), list(parts), names, open_part, kind="boxes", sampling="centred")


def _excluded(path: Path) -> set[tuple[str, int]]:
    if not path.is_file():
        return set()
    found = set()
    for number, line in _lines(path):
        video, _, second = line.partition(",")
        try:
            found.add((video, int(float(second))))
        except (ValueError, OverflowError) as error:
            raise ZooError(f"{path}:{number}: need video,second; got {line[:80]!r}") from error
    return found


def _videos(folder: Path) -> tuple[list[str], Counter[str]]:
    """The videos in a folder, files and folders of pictures; and what else is there."""
    found: list[str] = []
    skipped: Counter[str] = Counter()
    with os.scandir(folder) as entries:
        for e in entries:
            if e.name.startswith("."):
                continue
            if e.is_dir():
                if pictures_in(e.path) and not subfolders(Path(e.path)):
                    found.append(e.path)
            elif is_video(e.name) and (e.is_file() or not os.path.exists(e.path)):
                found.append(e.path)
            elif is_video(e.name):
                raise ZooError(f"{e.path} is a pipe, a socket or a device, not a video")
            else:
                ending = os.path.splitext(e.name)[1].lower()
                skipped[f"files ending in {ending}" if ending else "files without an ending"] += 1
    return sorted(found), skipped


def _class_folders(folder: Path, options: dict[str, Any]) -> Layout | None:
    parts = split_folders(folder, lambda place: bool(_videos(place)[0])) or {"train": folder}
    lead = lead_part(parts)
    classes = [name for name in subfolders(lead) if _videos(lead / name)[0]]
    if not classes and not _videos(lead)[0]:
        return None

    def open_part(part: str, split: str) -> VideoList:
        root, paths, labels = parts[part], [], []
        loose, skipped = _videos(root)
        told = (options.get("backend"), options.get("fps") or 30.0)
        if not classes:
            return VideoList(loose, [-1] * len(loose), [], *told, skipped)
        skipped = Counter()  # beside class folders stands what is about the set
        for name in subfolders(root):
            videos, others = _videos(root / name)
            if videos and name not in classes:
                raise ZooError(f"{root / name}: no class of that name in {lead}")
            skipped += others
            paths += videos
            labels += [classes.index(name)] * len(videos)
        source = VideoList(paths, labels, classes, *told, skipped)
        if loose := [path for path in loose if os.path.basename(path) not in classes]:
            source.problems["videos beside the class folders"] = len(loose)
        return source

    return Layout(str(folder), list(parts), classes, open_part)


def _at_path(path: Path, classes: int | None, options: dict[str, Any], what: str = "dataset") -> Layout:
    if not path.exists():
        raise missing_path(path, what)
    if not path.is_dir():
        if path.suffix not in (".csv", ".txt"):
            raise ZooError(f"{path} is a file; a set of videos is a folder or a list (.csv)")
        make = _frame_lists if _first_line(path).startswith(FRAME_LIST_HEADER) else _video_lists
        return make(path.parent, {"train": path}, classes, options)
    if (path / "frame_lists").is_dir() and (path / "annotations").is_dir():
        return _ava(path, options)
    for folder in (path, path / "frame_lists"):
        if folder.is_dir() and (parts := _list_parts(folder)):
            first = _first_line(next(iter(parts.values())))
            make = _frame_lists if first.startswith(FRAME_LIST_HEADER) else _video_lists
            return make(path, parts, classes, options)
    layout = _class_folders(path, options)
    if layout is None:
        raise ZooError(
            f"{path} is in no known layout of videos: need train.csv and val.csv, AVA's folders, class folders of"
            " videos, or videos"
        )
    return layout


# ------------------------------------------------------------------------------------------------------ the public face


def is_video_set(dataset: str) -> bool:
    """Is this the card of a set of videos, or a path with lists or video files? ``shapes`` is one of pictures first."""
    from zoo.catalog import data_card, list_datasets

    if dataset in list_datasets():
        return data_card(dataset).task.startswith("video")
    path = Path(dataset).expanduser()
    if not path.is_dir():
        return path.suffix in (".csv", ".txt")
    if _list_parts(path) or (path / "frame_lists").is_dir():
        return True
    return any(is_video(name) for _, _, names in os.walk(path) for name in names)


def open_layout(dataset: str, data_dir: str | os.PathLike[str] | None = None, **options: Any) -> Layout:
    """What is known of a set of videos before any video is read; :func:`open_part` opens its splits.

    Args:
        dataset: a card's name, a path, or ``shapes`` for the drawn world of :mod:`zoo.data.clips`.
        data_dir: where a carded set lies: the folder itself, or the one that holds it under its name.
        **options: `backend` ("pyav", "torchcodec"), `fps` (of videos in pictures), `min_frames`, `prefix` (of the paths
            in lists), `separator` (in lists); for AVA `version`, `label_map`, `train_boxes`, `eval_boxes` (lists of
            detected boxes in `annotations`), `train_score_threshold` (0.9), `score_threshold` (0.8) and `val_every` (4:
            validation takes every fourth second). For ``shapes`` `size`, `seed`, `length` and the knobs of
            :class:`zoo.data.clips.Knobs`.

    Raises:
        ZooError: nothing there, an unknown layout or option, lists that cannot be read.
    """
    from zoo.catalog import data_card, list_datasets

    if dataset == "shapes":
        return _shapes(options)
    for option in options:
        if option not in (*_OPTIONS, *_AVA_OPTIONS):
            raise unknown(f"option of {dataset}", option, (*_OPTIONS, *_AVA_OPTIONS))
    if dataset in list_datasets():
        card = data_card(dataset)
        if not card.task.startswith("video"):
            raise ZooError(f"{dataset} is a set for {card.task}, not of videos")
        if data_dir is None:
            return _nowhere(card)
        root = Path(data_dir).expanduser()
        layout = _at_path(root / dataset if (root / dataset).is_dir() else root, card.num_classes, options, "data_dir")
        if card.num_classes is not None and layout.class_names and len(layout.class_names) != card.num_classes:
            raise ZooError(
                f"{layout.name} has {len(layout.class_names)} classes, {dataset} has {card.num_classes};"
                " name the folder itself as the dataset"
            )
        if card.class_names:
            layout.class_names[:] = card.class_names
        return layout
    if "://" in dataset:
        raise ZooError(f"{dataset}: sets of videos are read from folders and lists on this machine")
    path = Path(dataset).expanduser()
    if not path.exists() and not (os.sep in dataset or dataset.startswith(".")):
        raise unknown("dataset", dataset, list_datasets())
    return _at_path(path, None, options)


def _nowhere(card: DataCard) -> Layout:
    """What a card tells of a set that lies nowhere yet, so that a recipe can be built without it."""

    def open_part(part: str, split: str) -> Any:
        raise ZooError(f"{card.name} is read from a folder only: give its path as data_dir")

    kinds = {"video action detection": ("boxes", "centred"), "video classification": ("label", "window")}
    kind, sampling = kinds.get(card.task, ("labels", "strided"))
    names = card.class_names or [f"class {k}" for k in range(card.num_classes or 0)]
    return Layout(card.name, list(card.splits), names, open_part, kind, sampling)


def _shapes(options: dict[str, Any]) -> Layout:
    own = {key: options[key] for key in ("size", "seed", "length") if key in options}
    knobs = {key: value for key, value in options.items() if key not in own}
    settings = clip_knobs(**knobs)

    def open_part(part: str, split: str) -> ClipsDataset:
        length = own.get("length") if part == "train" else None  # evaluation stays comparable
        given = {key: value for key, value in own.items() if key != "length"}
        return ClipsDataset(part, LENGTHS[part] if length is None else length, **given, **knobs)

    kind = {"motions": "labels", "boxes": "boxes"}.get(settings.label, "label")
    sampling = "centred" if kind == "boxes" else "window"
    return Layout("shapes", list(LENGTHS), settings.class_names, open_part, kind, sampling)


def open_part(layout: Layout, split: str) -> Any:
    """The videos of a split, "train", "val", "test" or "predict".

    Raises:
        ZooError: a split that the set cannot serve.
    """
    part, which = choose_part(split, layout.parts, layout.name)
    source = layout.open(part, split)
    tell(layout.name, getattr(source, "problems", {}), getattr(source, "skipped", {}))
    if not len(source):
        raise ZooError(f"{layout.name}: no videos in split {part!r}")
    if which == "all":
        return source
    number = torch.arange(len(source))
    held = number % HOLD_OUT == HOLD_OUT - 1
    if not held.any():
        held[-1:] = True
    return VideoPart(source, number[held if which == "held" else ~held])
