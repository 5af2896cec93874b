"""Leaderboard rows as commands: the options that make a recipe a row, and the verdict on a measured value."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo import catalog
from zoo.catalog import Row
from zoo.errors import ZooError

# How the field's metrics follow from what the tasks log (accuracies as fractions, COCO's AP in percent).
_LOGGED = {
    "top1": "100 * test/top1",
    "top5": "100 * test/top5",
    "zero-shot top1": "100 * test/top1",
    "knn_top1": "100 * knn_top1",
    "error": "100 - 100 * test/top1",
    "top1_error": "100 - 100 * test/top1",
    "top5_error": "100 - 100 * test/top5",
    "pass@1": "100 * test/pass_at_1",
    "pass@2": "100 * test/pass_at_2",
    "mAP": "100 * test/mAP",
}
# How far the same weights lie apart under another decoder, resize or precision: percentage points; elsewhere a share.
_POINTS, _SHARE = 0.2, 0.02
# Options that change where and how fast a row runs, not what it measures.
_HARMLESS = re.compile(
    r"ckpt_path|weights|verbose|seed_everything|data\.(init_args\.)?(data_dir|num_workers|eval_batch_size|pin_memory|prefetch_factor)"
    r"|trainer\.(accelerator|devices|num_nodes|strategy|precision|default_root_dir|logger|enable_\w+|log_every_n_steps)"
)


def row_words(row: Row) -> list[str]:
    """The options of a row as words of a command line."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in row.options.items()]


def row_commands(name: str) -> list[str]:
    """The commands that run a row: by its address, and spelled out; none where no recipe does."""
    _, row = catalog.row(name)
    if row.recipe is None:
        return []
    head = re.search(r"^# Run: zoo (\w+)", catalog.recipe_path(row.recipe).read_text(encoding="utf-8"), re.MULTILINE)
    main = head[1] if head else "fit"  # test-time training is a test
    what = dict.fromkeys(["test", main] if row.weights else [main])
    after = [second_stage(row)] if row.then else []
    return [*(f"zoo {one} {name}" for one in what), f"zoo {main} {shlex.join([row.recipe, *row_words(row)])}", *after]


def second_stage(row: Row, checkpoint: str = "CHECKPOINT") -> str:
    """The command that gives the value of a row whose own run is a first stage, from the checkpoint of that."""
    return f"then zoo fit {row.then} --model.init_from {shlex.quote(checkpoint)}"


def tolerance_of(row: Row) -> float | None:
    """How far a measured value may lie from the published one: the row's own, or a default by its unit."""
    if row.tolerance is not None or row.value is None:
        return row.tolerance
    return _POINTS if row.unit == "%" else _SHARE * abs(row.value)


def measured_value(row: Row, metrics: Mapping[str, float]) -> float | None:
    """The row's metric from those that a test logged; None where it is not among them."""
    match = re.fullmatch(catalog.LOGGED, row.logged or _LOGGED.get(row.metric, f"test/{row.metric}"))
    if match is None or match["name"] not in metrics:
        return None
    value = metrics[match["name"]] * float(match["scale"] or 1)
    return float(match["offset"] or 0) + (-value if match["sign"] == "-" else value)


def verdict(name: str, metrics: Mapping[str, float], options: Sequence[str]) -> dict[str, Any]:
    """What a test of the row `name` says about its published value.

    Args:
        name: ``paper:id``.
        metrics: what was logged.
        options: the command line after the row; a change of what is measured forbids a comparison.

    Returns:
        {row, metric, unit, measured, published, difference, tolerance, verdict}; `verdict` is "within tolerance",
        "better" or "worse" (by more than that), or says why there is none.
    """
    _, row = catalog.row(name)
    value, tolerance = measured_value(row, metrics), tolerance_of(row)
    found: dict[str, Any] = {
        "row": name,
        "metric": row.metric,
        "unit": row.unit,
        "measured": value,
        "published": row.value,
        "difference": None,
        "tolerance": tolerance,
    }
    changed = [key for key in _keys(options) if not _HARMLESS.fullmatch(key)]
    if value is None:
        return found | {"verdict": f"none: the test logged no {row.metric}"}
    if not math.isfinite(value):
        return found | {"verdict": f"none: the test logged {value}"}
    if row.value is None or tolerance is None:
        return found | {"verdict": "none: no value was published"}
    difference = value - row.value
    found["difference"] = difference
    if changed:
        return found | {"verdict": f"none: --{changed[0]} changes the row's protocol"}
    if abs(difference) <= tolerance + 1e-9 * abs(value):  # numbers of a table are decimal
        return found | {"verdict": "within tolerance"}
    return found | {"verdict": "better" if (difference > 0) == row.higher_is_better else "worse"}


def _keys(options: Sequence[str]) -> list[str]:
    return [word.lstrip("-").partition("=")[0] for word in options if re.match("-{1,2}[a-zA-Z]", word)]


def verdict_line(found: Mapping[str, Any]) -> str:
    """A verdict in a line."""
    unit = f" {found['unit']}" if found["unit"] else ""
    numbers = [f"{key} {found[key]:.4g}{unit}" for key in ("measured", "published") if found[key] is not None]
    if found["difference"] is not None:
        numbers.append(f"difference {found['difference']:+.2g}")
    if found["tolerance"] is not None:
        numbers.append(f"tolerance {found['tolerance']:.2g}")
    return f"verdict: {found['row']} {found['metric']}: {found['verdict']} ({', '.join(numbers)})"


def results_of(folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The tests of rows whose result files lie under `folder`, by row, the newest last.

    Raises:
        ZooError: no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ZooError(f"--results: no folder {str(folder)!r}")
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(root.rglob("result.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            judged = dict(record["verdict"])
            if not isinstance(judged["verdict"], str) or not isinstance(judged["measured"], int | float | None):
                continue
            entry = {**judged, "date": record.get("date"), "file": str(path)}
            found.setdefault(judged["row"], []).append(entry)
        except (OSError, ValueError, TypeError, LookupError):  # of another command, or broken
            continue
    for entries in found.values():
        entries.sort(key=lambda entry: (str(entry["date"]), entry["file"]))
    return found
