"""What every claim in miniature shares: seeds, an interval, a store that resumes, and the record of the result."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, command_line, environment

HERE = Path(__file__).resolve().parent
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of a quantity over seeds with its 95 % interval by Student's t (none of one seed).

    Two arms are compared by the differences within each seed, so that what a seed does to both cancels.
    """
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n, "values": list(values)}
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    quantile = _T95[n - 2] if n - 2 < len(_T95) else 1.96 + 2.6 / (n - 1)
    half = quantile * deviation / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": deviation, "n": n, "values": list(values)}


@dataclass(frozen=True)
class SubClaim:
    """One thing that can hold or not: `effect` in `unit` over the seeds, held where the whole 95 % interval lies above
    `bound`. The statement, the bound and the unit are fixed before the run."""

    name: str
    statement: str
    unit: str
    bound: float
    effect: list[float]

    def record(self) -> dict[str, Any]:
        found = interval(self.effect)
        low, high = found["low"], found["high"]
        held = low is not None and low > self.bound
        verdict = "held" if held else "not held" if high is not None and high < self.bound else "undecided"
        criterion = f"95 % interval above {self.bound:g} {self.unit}"
        return {
            "name": self.name,
            "statement": self.statement,
            "criterion": criterion,
            "unit": self.unit,
            "effect": found,
            "held": held,
            "verdict": verdict,
        }


class Store:
    """Finished parts of a run, one JSON file each, under a folder named after the settings.

    A part that is there is not computed again: a killed run goes on where it was, and a changed setting starts anew.
    """

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.folder = root / digest
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where a part keeps a file of its own."""
        return self.folder / name

    def part(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a part, computed if it is not stored yet; its wall and processor `seconds` are added."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text())
        start, processor = time.perf_counter(), time.process_time()
        record = compute()
        record["seconds"] = time.perf_counter() - start
        record["processor_seconds"] = time.process_time() - processor
        write(record, path)
        return record


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every claim has."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    options.add_argument("--threads", type=int, default=1, help="threads of a process (default 1)")
    options.add_argument("--quick", action="store_true", help="a few steps a part: tries the program, says nothing")
    options.add_argument("--data", help="dataset (default: CIFAR-10 where its folder is found, else shapes)")
    options.add_argument("--data-dir", type=Path, help="folder of the dataset")
    options.add_argument(
        "--work", type=Path, default=Path("runs/claims"), help="folder of finished parts, for resuming"
    )
    options.add_argument("--out", type=Path, help="the result file (default: results/ here in a checkout, else --work)")
    return options


def result_path(paper: str, given: argparse.Namespace) -> Path:
    """Where the result goes: the committed place only for a full run from a checkout."""
    if given.out is not None:
        return given.out
    in_checkout = (ROOT / "pyproject.toml").is_file()
    return (HERE / "results" if in_checkout and not given.quick else given.work) / f"{paper}.json"


def result(
    paper: str,
    statement: str,
    settings: dict[str, Any],
    arms: dict[str, Any],
    claims: Sequence[SubClaim],
    parts: Sequence[dict[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """The record of a finished run; `held` is true where every sub-claim holds. `parts` are those of the store."""
    records = [claim.record() for claim in claims]
    return {
        "claim": paper,
        "statement": statement,
        "held": all(record["held"] for record in records),
        "claims": records,
        "arms": arms,
        "settings": settings,
        "seconds": round(sum(part["seconds"] for part in parts), 1),
        "processor_seconds": round(sum(part["processor_seconds"] for part in parts), 1),
        "command": command_line(),
        "environment": environment(),
        **more,
    }


def show(record: dict[str, Any]) -> None:
    """Print a result, a line a sub-claim."""
    print(f"{record['claim']}: {record['statement']}")
    for claim in record["claims"]:
        effect = claim["effect"]
        spread = "" if effect["low"] is None else f" [{effect['low']:+.4g}, {effect['high']:+.4g}]"
        print(f"  {claim['verdict']:9} {claim['statement']}: {effect['mean']:+.4g}{spread} {claim['unit']}")
