"""Looks a data set over before a run: counts, classes and their order, unreadable samples, and a hash of all of it."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.data.files import in_words, read_bytes, reason
from zoo.errors import ZooError
from zoo.paths import cache_dir
from zoo.weights.download import replacing, say

if TYPE_CHECKING:
    from zoo.catalog import DataCard
    from zoo.data.coco import CocoLayout, CocoSource
    from zoo.data.latents import LatentSource

SPLITS = ("train", "val", "test")
GRIDS = "abstract reasoning on grids"  # the task of sets that are no pictures
_CHUNK = 256


def check(dataset: str, data_dir: str | None = None, read: bool = True, shown: int = 5) -> dict[str, Any]:
    """Opens every split of a data set and, with `read`, each sample of it.

    Of a set in COCO's format `per_class` counts objects, and boxes outside their picture and the like are problems.
    Captions, grids and latents are read too: whatever layout a data module of the zoo takes.

    Args:
        dataset: a card's name, a folder or a hub id.
        data_dir: where the named set lies.
        read: decode every sample (of a video the first, middle and last frame); without it only labels that cost
            nothing are counted and there is no hash.
        shown: how many unreadable samples are named.

    Returns:
        {"dataset", "classes" in order, "splits": {split: {"samples", "per_class", "unreadable", "skipped", "sha256"}},
        "sha256", "problems"}: `problems` are sentences; an empty list means a set fit to run on. `skipped` counts what
        lies there and is nothing that could be read, by kind.

    Raises:
        ZooError: no such data set, or no split of it can be opened.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what sources tell at the start of a run stands in the report
        return _check(dataset, data_dir, read, shown)


def _check(dataset: str, data_dir: str | None, read: bool, shown: int) -> dict[str, Any]:
    from zoo import catalog
    from zoo.data.arc import splits_in

    card = catalog.data_card(dataset) if dataset in catalog.list_datasets() else None
    place = Path(dataset).expanduser()
    if card is not None and card.task == GRIDS:
        return _check_grids(dataset, data_dir, card.splits)
    if card is None and place.is_dir() and (grids := splits_in(place)):
        return _check_grids(dataset, data_dir, dict.fromkeys(grids))
    names, open_split, known = _opened(dataset, data_dir, card)
    problems: list[str] = []
    splits: dict[str, dict[str, Any]] = {}
    missing: list[str] = []
    told: set[str] = set()
    for split in known:
        try:
            source = open_split(split)
        except ZooError as error:
            missing.append(str(error))
            continue
        splits[split] = found = _read(source, read, shown, split)
        found["skipped"] = dict(getattr(source, "skipped", {}))
        if isinstance(source, _Objects):
            names = source.source.class_names
        if hasattr(source, "per_class"):
            found["per_class"] = source.per_class()
        if (oddities := in_words(getattr(source, "problems", {}))) and oddities not in told:
            told.add(oddities)
            problems.append(f"{split}: {oddities}")
        problems += _problems(split, found, names)
        if card is not None and (stated := card.splits.get(split)) and stated != found["samples"]:
            problems.append(f"{split}: {found['samples']} samples, the card of {dataset} states {stated}")
    if not splits:
        raise ZooError(missing[0])
    problems += [line for line in dict.fromkeys(missing) if line not in problems]
    if card is not None and card.class_names and names != list(card.class_names):
        at = next((i for i, (a, b) in enumerate(zip(names, card.class_names, strict=False)) if a != b), len(names))
        problems.append(f"classes differ from the card's, first at number {at}: their order is the meaning of labels")
    hashes = {split: found["sha256"] for split, found in splits.items()}
    whole = None
    if all(hashes.values()):
        whole = hashlib.sha256(json.dumps([names, hashes]).encode()).hexdigest()
    report = {
        "dataset": dataset,
        "data_dir": data_dir,
        "classes": names,
        "splits": splits,
        "sha256": whole,
        "problems": problems,
    }
    if whole is not None:
        _keep(report)
    return report


def _keep(report: dict[str, Any]) -> None:
    """Note what was found, for the results of later runs; where that cannot be written, the report is all there is."""
    path = _record(report["dataset"], report["data_dir"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps({key: report[key] for key in ("dataset", "data_dir", "sha256", "problems")}))
    except (OSError, ZooError) as error:
        say(f"later runs will not state this hash: {path.parent} cannot be written ({reason(error)})")


def _check_grids(dataset: str, data_dir: str | None, stated_of: dict[str, int | None]) -> dict[str, Any]:
    """The report of a set of ARC tasks; samples are tasks, and reading is checking."""
    from zoo.data.arc import MAX_SIDE, read_tasks

    splits: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    missing: list[str] = []
    for split, stated in stated_of.items():
        try:
            tasks = read_tasks(dataset, split, data_dir)
        except ZooError as error:
            missing.append(str(error))
            continue
        digest = hashlib.sha256()
        for task in tasks:
            digest.update(task.name.encode())
            for grid in (grid for pair in (*task.train, *task.test) for grid in pair if grid is not None):
                shape = bytes(grid.shape) if max(grid.shape) < 256 else repr(grid.shape).encode()
                digest.update(shape + grid.astype("uint8").tobytes())
                if max(grid.shape) > MAX_SIDE:
                    problems.append(f"{split}: {task.name} has a grid of {grid.shape}, longer than {MAX_SIDE}")
            if not task.train or not task.test:
                problems.append(f"{split}: {task.name} has no demonstrations or no tests")
        splits[split] = {"samples": len(tasks), "per_class": None, "unreadable": 0, "skipped": {}}
        splits[split]["sha256"] = digest.hexdigest()
        if stated and stated != len(tasks):
            problems.append(f"{split}: {len(tasks)} tasks, the card of {dataset} states {stated}")
    if not splits:
        raise ZooError(missing[0])
    problems += missing
    whole = hashlib.sha256(json.dumps({name: found["sha256"] for name, found in splits.items()}).encode()).hexdigest()
    report: dict[str, Any] = {
        "dataset": dataset,
        "data_dir": data_dir,
        "classes": [],
        "splits": splits,
        "sha256": whole,
    }
    report["problems"] = problems
    _keep(report)
    return report


def _opened(
    dataset: str, data_dir: str | None, card: DataCard | None
) -> tuple[list[str], Callable[[str], Any], Sequence[str]]:
    """The classes of a set, where they are known before its splits, what opens one of these, and their names."""
    from zoo.data import image_text, latents, sources, video_sources

    objects = card is not None and dataset != "shapes" and "detection" in card.task and "video" not in card.task
    place = Path(dataset).expanduser()
    if card is None and (place / latents.FACTS).is_file():
        facts = latents.read_facts(place)
        return list(facts["class_names"]), lambda split: _Latents(latents.LatentSource(place, split)), facts["splits"]
    if (coco := coco_of(dataset, data_dir, objects)) is not None:
        return [], lambda split: _Objects(*coco.open(split)), SPLITS
    captioned = card.columns.caption is not None if card is not None else place.exists()
    if dataset != "shapes" and captioned and (card is not None or image_text.is_caption_set(place)):
        return [], lambda split: _Captioned(image_text.open_pairs(dataset, split, data_dir)), SPLITS
    if video_sources.is_video_set(dataset):
        layout = video_sources.open_layout(dataset, data_dir)
        return list(layout.class_names), lambda split: video_sources.open_part(layout, split), SPLITS
    names = list(sources.describe(dataset, data_dir).class_names)
    return names, lambda split: sources.open_source(dataset, split, data_dir), SPLITS


def checked_hash(dataset: str, data_dir: str | None = None) -> str | None:
    """The hash that `zoo data check` last found for a data set on this machine; None where it was never checked."""
    try:
        return json.loads(_record(dataset, data_dir).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return None


def _record(dataset: str, data_dir: str | None) -> Path:
    place = (
        os.path.abspath(data_dir) if data_dir else (os.path.abspath(dataset) if os.path.exists(dataset) else dataset)
    )
    return cache_dir() / "checked" / f"{hashlib.sha256(f'{dataset} {place}'.encode()).hexdigest()[:16]}.json"


def coco_of(dataset: str, data_dir: str | None, carded: bool) -> CocoLayout | None:
    """Where a set in COCO's format lies, if it is one."""
    from zoo.data.coco import OTHER_KINDS, find_coco

    if carded and data_dir is None:
        raise ZooError(f"{dataset} is read from a folder: say where it lies by --data_dir")
    place = Path(data_dir or dataset).expanduser()
    if not carded and not (place.suffix == ".json" and place.is_file()):
        near = [*place.glob("[!.]*.json"), *place.glob("*/[!.]*.json")] if data_dir is None and place.is_dir() else []
        known = [file for file in near if not any(kind in file.stem for kind in OTHER_KINDS)]
        if not any(b'"annotations"' in read_bytes(file, 1 << 36) for file in known):
            return None
    return find_coco(place, name=dataset if data_dir else "instances")


class _Objects:
    """A split in COCO's format as a source of pictures; their label is a hash of what is said of them."""

    def __init__(self, source: CocoSource, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.problems, self.skipped = source.problems, source.skipped

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.indices[index])
        said = repr(self.source.annotations(row)).encode()
        return {"image": self.source.read(row).image, "label": int(hashlib.sha256(said).hexdigest()[:15], 16)}

    def per_class(self) -> dict[str, int]:
        """Objects of each class that are no crowd."""
        counts = Counter(int(label) for row in self.indices for label in self.source.labels[row])
        return {str(label): counts[label] for label in sorted(counts)}


class _Captioned:
    """A split of captioned pictures as a source of pictures; their label is a hash of the captions."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.problems, self.skipped = getattr(source, "problems", {}), getattr(source, "skipped", {})

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from zoo.data.image_text import ShardPairs
        from zoo.data.sources import Part

        source = self.source
        if isinstance(source, Part):
            index, source = int(source.indices[index]), source.source
        row = source.exact(index) if isinstance(source, ShardPairs) else source[index]
        said = repr(row["captions"]).encode()
        return {"image": row["image"], "label": int(hashlib.sha256(said).hexdigest()[:15], 16)}

    def per_class(self) -> None:
        """Captions have no classes."""


class _Latents:
    """A split of latents as a source of pictures: the moments of its first view."""

    def __init__(self, source: LatentSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.source.read(np.array([index]), np.zeros(1, np.int64))
        if not row["mean"].isfinite().all():
            raise ZooError(f"latent {index} is not finite")
        return {"image": row["mean"][0], "label": int(row["label"])}


def _read(source: Any, read: bool, shown: int, split: str) -> dict[str, Any]:
    from zoo.data.sources import ManyReader

    found: dict[str, Any] = {"samples": len(source), "per_class": None, "unreadable": 0, "examples": [], "sha256": None}
    if not read:
        return found
    digest, labels = hashlib.sha256(), Counter[int]()
    many = isinstance(source, ManyReader)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        for chunk in _progress(range(0, len(source), _CHUNK), f"reading {split}"):
            indices = range(chunk, min(chunk + _CHUNK, len(source)))
            rows = _many(source, indices) if many else pool.map(lambda i: _one(source, i), indices)
            for image, label, problem in rows:
                if problem is not None:
                    found["unreadable"] += 1
                    found["examples"] = [*found["examples"], problem][:shown]
                    continue
                labels.update(label if isinstance(label, list) else [label])
                digest.update(f"{label} {'x'.join(map(str, image.shape))} ".encode())
                digest.update(hashlib.sha256(image.contiguous().numpy()).digest())
    found["per_class"] = {str(label): labels[label] for label in sorted(labels)}
    found["sha256"] = digest.hexdigest()
    return found


def _one(source: Any, index: int) -> tuple[Any, int | list[int], str | None]:
    try:
        row = source[index]
    except Exception as error:  # whatever a decoder throws is the finding
        return None, -1, " ".join(str(error).split()) or type(error).__name__
    label = row["label"]
    return row["image"], label if isinstance(label, list) else int(label), None


def _many(source: Any, indices: Sequence[int]) -> Iterator[tuple[Any, int, str | None]]:
    batch = source.read_many(indices)
    return ((image, int(label), None) for image, label in zip(batch["image"], batch["label"], strict=True))


def _progress(chunks: range, text: str) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from chunks
        return
    yield from track(chunks, text, console=console, transient=True)


def _problems(split: str, found: dict[str, Any], names: list[str]) -> list[str]:
    lines = []
    if found["unreadable"]:
        lines.append(f"{split}: {found['unreadable']} unreadable samples, first: {found['examples'][0]}")
    counts = found["per_class"]
    if counts is None:
        return lines
    if names:
        outside = sorted(int(label) for label in counts if not 0 <= int(label) < len(names))
        if outside and outside != [-1]:
            lines.append(f"{split}: label {outside[0]} is outside the {len(names)} classes")
        empty = [name for number, name in enumerate(names) if str(number) not in counts]
        if empty and outside != [-1]:
            lines.append(f"{split}: {len(empty)} of {len(names)} classes have no sample, first: {empty[0]}")
    return lines


def print_report(report: dict[str, Any]) -> None:
    """The report as a table, the classes in order, the problems as one line each."""
    from zoo.command.show import print_table

    names = report["classes"]
    head = ", ".join(names[:10]) + (f", … {names[-1]}" if len(names) > 10 else "")
    print(f"{report['dataset']}: {len(names)} classes" + (f" in this order: {head}" if names else " (no labels)"))
    body = []
    for split, found in report["splits"].items():
        counts = list((found["per_class"] or {}).values())
        spread = "" if not counts else str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"
        body.append([split, found["samples"], spread, found["unreadable"], (found["sha256"] or "")[:16]])
    print_table(["split", "samples", "per class", "unreadable", "sha256"], body, ["samples", "unreadable"])
    if report["sha256"]:
        print(f"sha256 of the whole: {report['sha256']}")
    for split, found in report["splits"].items():
        if found["skipped"]:
            print(f"left out of {split}: {in_words(found['skipped'])}")
    for line in report["problems"]:
        print(f"problem: {line}")
    if not report["problems"]:
        print("fit to run on")
