"""Finds cases, runs them through the papers' adapters, and says for each output whether it agrees."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from zoo.errors import MissingPackage, ZooError, unknown
from zoo.files import module_from
from zoo.parity.cases import Case, Config, compare
from zoo.paths import share

# Relative and absolute tolerance of a digest; half precision shows gross errors only.
TOLERANCES = {
    "float64": (1e-5, 1e-7),
    "float32": (1e-3, 1e-5),
    "bfloat16": (2e-1, 2e-2),
    "float16": (3e-2, 3e-3),
}
Adapter = Callable[[Case], dict[str, Tensor]]


@dataclass(frozen=True)
class Verdict:
    """How one output of one case compares; `note` is empty where it agrees. `ok` is None where the case was not
    computed, for want of the optional package that `note` names. `seconds` are those of the whole case, and stand with
    its first output (0 with the others), so that they may be added up."""

    paper: str
    case: str
    function: str
    output: str
    ok: bool | None
    note: str
    seconds: float


def find_cases(paper: str | None = None, folders: Iterable[str | os.PathLike[str]] = ()) -> list[Path]:
    """The case files of one paper (default: of every paper that has an adapter): the package's, those under `folders`,
    and those under the folders of ``ZOO_PARITY_CASES`` (separated as in ``PATH``).

    Raises:
        ZooError: a folder is missing, or the paper has no adapter.
    """
    known = sorted(path.stem for path in share("parity/adapters").glob("*.py") if path.stem != "__init__")
    if paper is not None and paper not in known:
        raise unknown("paper with parity cases", paper, known)
    extra = [*folders, *filter(None, os.environ.get("ZOO_PARITY_CASES", "").split(os.pathsep))]
    roots = [share("parity/cases"), *(Path(folder).expanduser() for folder in extra)]
    if missing := [root for root in roots if not root.is_dir()]:
        raise ZooError(f"no folder of parity cases {str(missing[0])!r}")
    found: dict[Path, None] = {}
    for root in roots:
        for path in sorted(root.rglob("*.json")):
            case = load(path)
            owner = case.get("paper") if isinstance(case, dict) and "outputs" in case else None
            if owner == paper or (paper is None and owner in known):
                found[path.resolve()] = None
    return list(found)


def load(path: str | os.PathLike[str]) -> Case:
    """A case from its file; a ZooError where it is no JSON."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ZooError(f"{os.fspath(path)}: not a parity case ({error})") from error


def adapter(paper: str) -> Adapter:
    """The function `run` of the paper's adapter."""
    return _module(paper).run


def shared(name: str) -> ModuleType:
    """``parity/adapters/shared/<name>.py``: what the adapters of papers with one official code base share."""
    return _module(f"shared/{name}")


@cache
def _module(name: str) -> ModuleType:
    path = share("parity/adapters") / f"{name}.py"
    if not path.is_file():
        raise ZooError(f"no parity adapter {path}")
    return module_from(path, f"zoo_parity_{name.replace('/', '_')}")


def by_entry(kinds: Mapping[str, Adapter]) -> Adapter:
    """An adapter that goes by the official function or class (`entry`) that a case is about."""

    def run(case: Case) -> dict[str, Tensor]:
        entry = case["official"].get("entry", "")
        if entry not in kinds:
            raise unknown("kind of case", entry, kinds)
        return kinds[entry](case)

    return run


def run_case(case: Case, dtype: str | None = None, device: str = "cpu") -> list[Verdict]:
    """One verdict for each output of a case, computed in `dtype` (default: the case's own) on `device`."""
    own = case.get("dtype", "float64")
    dtype = dtype or own
    if dtype not in TOLERANCES:
        raise unknown("dtype", dtype, TOLERANCES)
    rtol, atol = max(TOLERANCES[dtype], TOLERANCES[own])
    begin = time.perf_counter()
    problem, outputs, skipped = "", {}, False
    with _quiet():
        try:
            compute, config = adapter(case["paper"]), Config.of(case["config"])
            begin = time.perf_counter()  # what the adapter imports is not the case's time
            outputs = compute({**case, "config": config, "dtype": dtype, "device": device})
        except MissingPackage as error:
            problem, skipped = str(error), True
        except Exception as error:  # a case that fails must not keep the others from their verdict
            problem = " ".join(f"{type(error).__name__}: {error}".split())
    seconds = round(time.perf_counter() - begin, 3)
    official = case["official"]
    function = official.get("entry") or official.get("derived_from", "")
    verdicts: list[Verdict] = []
    for name, expected in case["outputs"].items():
        note = problem or (
            "not computed" if name not in outputs else compare(expected, outputs[name], rtol, atol) or ""
        )
        ok, spent = None if skipped else not note, 0.0 if verdicts else seconds
        verdicts.append(Verdict(case["paper"], case["case"], function, name, ok, note, spent))
    return verdicts


def run_cases(
    paper: str | None = None,
    folders: Iterable[str | os.PathLike[str]] = (),
    dtype: str | None = None,
    device: str = "cpu",
) -> list[Verdict]:
    """Replays the cases of one paper, or of all, with a verdict for each output; see :func:`find_cases`.

    Raises:
        ZooError: unknown paper or dtype, missing folder, a device that this machine lacks.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ZooError(f"device {device!r} is not here: {str(error).splitlines()[0]}") from error
    return [verdict for path in find_cases(paper, folders) for verdict in run_case(load(path), dtype, device)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the announcements of Lightning's trainer, on one thread (cases are tiny, and threads that wait for each
    other made some a hundred times slower on a busy machine), and with this process's random state left as it was."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    state, threads = np.random.get_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(state)
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
