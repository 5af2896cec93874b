"""Looks a data set over before a run: counts, classes and their order, unreadable samples, and a hash of all of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.paths import cache_dir

SPLITS = ("train", "val", "test")
GRIDS = "abstract reasoning on grids"  # the task of sets that are no pictures
_CHUNK = 256


def check(dataset: str, data_dir: str | None = None, read: bool = True, shown: int = 5) -> dict[str, Any]:
    """Opens every split of a data set and, with `read`, each sample of it.

    Args:
        dataset: a card's name, a folder or a hub id.
        data_dir: where the named set lies.
        read: decode every sample; without it only labels that cost nothing are counted and there is no hash.
        shown: how many unreadable samples are named.

    Returns:
        {"dataset", "classes" in order, "splits": {split: {"samples", "per_class", "unreadable", "sha256"}}, "sha256",
        "problems"}: `problems` are sentences; an empty list means a set fit to run on.

    Raises:
        ZooError: no such data set, or no split of it can be opened.
    """
    from zoo import catalog
    from zoo.data.sources import describe, open_source

    card = catalog.data_card(dataset) if dataset in catalog.list_datasets() else None
    if card is not None and card.task == GRIDS:
        return _check_grids(dataset, data_dir, card)
    about = describe(dataset, data_dir)
    names = list(about.class_names)
    problems: list[str] = []
    splits: dict[str, dict[str, Any]] = {}
    missing: list[str] = []
    for split in SPLITS:
        try:
            source = open_source(dataset, split, data_dir)
        except ZooError as error:
            missing.append(str(error))
            continue
        splits[split] = found = _read(source, read, shown, split)
        problems += _problems(split, found, names)
        if card is not None and (stated := card.splits.get(split)) and stated != found["samples"]:
            problems.append(f"{split}: {found['samples']} samples, the card of {dataset} states {stated}")
    if not splits:
        raise ZooError(missing[0])
    problems += [line for line in missing if line not in problems]
    if card is not None and card.class_names and names != list(card.class_names):
        place = next((i for i, (a, b) in enumerate(zip(names, card.class_names, strict=False)) if a != b), len(names))
        problems.append(
            f"classes differ from the card's, first at number {place}: their order is the meaning of labels"
        )
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
    """Note what was found, for the results of later runs."""
    path = _record(report["dataset"], report["data_dir"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key: report[key] for key in ("dataset", "data_dir", "sha256", "problems")}))


def _check_grids(dataset: str, data_dir: str | None, card: Any) -> dict[str, Any]:
    """The report of a set of ARC tasks; samples are tasks, and reading is checking."""
    from zoo.data.arc import MAX_SIDE, read_tasks

    splits: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for split, stated in card.splits.items():
        tasks = read_tasks(dataset, split, data_dir)
        digest = hashlib.sha256()
        for task in tasks:
            digest.update(task.name.encode())
            for grid in (grid for pair in (*task.train, *task.test) for grid in pair if grid is not None):
                digest.update(bytes(grid.shape) + grid.astype("uint8").tobytes())
                if max(grid.shape) > MAX_SIDE:
                    problems.append(f"{split}: {task.name} has a grid of {grid.shape}, longer than {MAX_SIDE}")
            if not task.train or not task.test:
                problems.append(f"{split}: {task.name} has no demonstrations or no tests")
        splits[split] = {"samples": len(tasks), "per_class": None, "unreadable": 0, "sha256": digest.hexdigest()}
        if stated and stated != len(tasks):
            problems.append(f"{split}: {len(tasks)} tasks, the card of {dataset} states {stated}")
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
                labels[label] += 1
                digest.update(f"{label} {'x'.join(map(str, image.shape))} ".encode())
                digest.update(hashlib.sha256(image.contiguous().numpy()).digest())
    found["per_class"] = {str(label): labels[label] for label in sorted(labels)}
    found["sha256"] = digest.hexdigest()
    return found


def _one(source: Any, index: int) -> tuple[Any, int, str | None]:
    try:
        row = source[index]
    except Exception as error:  # whatever a decoder throws is the finding
        return None, -1, " ".join(str(error).split()) or type(error).__name__
    return row["image"], int(row["label"]), None


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
    from zoo.show import print_table

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
    for line in report["problems"]:
        print(f"problem: {line}")
    if not report["problems"]:
        print("fit to run on")
