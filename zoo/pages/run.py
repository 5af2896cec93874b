"""What a run left behind: config, metrics, result, errors and pictures. Read as untrusted, and without torch."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo import catalog
from zoo.errors import ZooError
from zoo.machine import OF_THE_MACHINE

_FILES = ("config.yaml", "metrics.csv", "result.json")
_MOST_BYTES = 64 << 20  # of a file that is read
_PICTURES, _PICTURE_BYTES, _PICTURE_SIDE = 12, 400_000, 1400


@dataclass
class Run:
    """A run's folder, read.

    Attributes:
        folder: where it lies.
        recipe: the name that its config or result states.
        config: resolved, as ``config.yaml`` has it; empty for a test.
        result: ``result.json``; empty where the run was stopped.
        series: (step, value) of each logged metric.
        errors: by split what :class:`zoo.training.ErrorAnalysis` wrote.
    """

    folder: Path
    recipe: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Recipe and time."""
        return f"{self.recipe} {self.folder.name}".strip()

    @property
    def protocol(self) -> dict[str, Any]:
        """How the result was measured, as far as it is told."""
        stated = self.result.get("protocol")
        return stated if isinstance(stated, dict) else {}

    @property
    def metrics(self) -> dict[str, float]:
        """The final numbers; of a run that was stopped the last that were logged."""
        stated = self.result.get("metrics")
        if isinstance(stated, dict):
            return {str(k): float(v) for k, v in stated.items() if isinstance(v, int | float)}
        last: dict[str, float] = {}
        for name, points in self.series.items():
            if points and not name.startswith((*OF_THE_MACHINE, "train/lr", "lr-")):
                last[name.removesuffix("_step").removesuffix("_epoch")] = points[-1][1]
        return last

    def checkpoint(self, which: str = "last") -> Path | None:
        """``last`` or ``best``, where the run kept one."""
        pattern = {"last": "last.ckpt", "best": "best*.ckpt"}[which]
        return next(iter(sorted((self.folder / "checkpoints").glob(pattern), reverse=True)), None)


def find(name: str) -> Path:
    """The run folder that `name` means: itself, the one a checkpoint lies in, or that of ``runs:last`` and its like
    (:mod:`zoo.weights.runs`).

    Raises:
        ZooError: there is none.
    """
    from zoo.weights.runs import find_checkpoint, is_run

    path = Path(name)
    if any((path / known).is_file() for known in _FILES):  # of a test there is no checkpoint
        return path
    if not is_run(name):
        if path.exists():
            raise ZooError(f"{name}: not a run's folder; it has none of {', '.join(_FILES)}")
        raise ZooError(f"no run {name!r}: a run's folder, a checkpoint in one, or runs:last")
    folder = find_checkpoint(name).parent.parent
    if not any((folder / known).is_file() for known in _FILES):
        raise ZooError(f"{name}: lies in no run's folder; {folder} has none of {', '.join(_FILES)}")
    return folder


def read(folder: Path) -> Run:
    """The run in `folder`; what is missing or broken is left out."""
    config = _yaml(folder / "config.yaml")
    result = _json(folder / "result.json")
    run = Run(folder, _recipe(folder, result), config, result, _series(folder / "metrics.csv"))
    for split in ("val", "test"):
        if found := _json(folder / f"errors_{split}.json"):
            run.errors[split] = found
    return run


def _text(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(catalog.read_facts(path, "run"))
    except ZooError:
        return {}


def _recipe(folder: Path, result: Mapping[str, Any]) -> str:
    if isinstance(result.get("recipe"), str):
        return str(result["recipe"])
    match = re.match(r"# recipe: (\S+)", _text(folder / "config.yaml"))
    return match[1] if match else ""


def _series(path: Path) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    text = _text(path)
    for row in csv.DictReader(io.StringIO(text, newline="")):
        try:
            step = float(row.get("step") or "nan")
        except ValueError:
            continue
        for name, value in row.items():
            if not isinstance(name, str) or not isinstance(value, str) or name in ("step", "epoch"):
                continue
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(step) and math.isfinite(number):
                found.setdefault(name, []).append((step, number))
    return found


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys, as on the command line, and their values."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        found |= flat(value, inner)
    return found


def changes(run: Run) -> list[tuple[str, Any, Any]] | None:
    """(key, as the recipe states it, as it was run) of what differs from the named recipe or row: what the recipe
    states, and what the run's command line asked for. None where the recipe is not known here."""
    here = flat(run.config)
    try:
        stated = flat(catalog.read_facts(catalog.recipe_path(run.recipe), "recipe"))
        if catalog.is_row(run.recipe):
            stated |= catalog.row(run.recipe)[1].options
    except ZooError:
        return None
    asked = re.findall(r"--([\w.]+)", str(run.result.get("command", "")))
    keys = dict.fromkeys([*stated, *(key.replace(".init_args", "") for key in asked)])
    found = []
    for key in keys:
        if key in here and key not in ("ckpt_path", "config") and not _same(stated.get(key), here[key]):
            found.append((key, stated.get(key, "(not stated)"), here[key]))
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether a value is what a recipe states, which may leave out keys that have defaults."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(key in b and _same(value, b[key]) for key, value in a.items())
    return a == b or str(a) == str(b)


def pictures(run: Run) -> list[tuple[str, str]]:
    """(name, address with the data inside) of the pictures, the newest of each kind; a large one smaller."""
    kinds: dict[str, Path] = {}
    for path in sorted((run.folder / "pictures").rglob("*.png")):
        kinds[re.sub(r"[\d]+", "#", path.name)] = path
    found = []
    for path in [*kinds.values()][:_PICTURES]:
        address = _embedded(path)
        if address:
            found.append((path.relative_to(run.folder / "pictures").as_posix(), address))
    return found


def _embedded(path: Path) -> str | None:
    from PIL import Image

    try:
        if path.stat().st_size <= _PICTURE_BYTES:
            with Image.open(path) as picture:
                picture.verify()
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
            for quality in (88, 70, 50):
                data = io.BytesIO()
                small.save(data, "JPEG", quality=quality)
                if data.tell() <= _PICTURE_BYTES:
                    break
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
