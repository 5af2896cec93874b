"""Numerical parity: what the official implementations compute, replayed on our code.

A case is a JSON file. It names every tensor of an official state dict and every input by a shape and a fill rule, and
holds digests of the outputs that the official code produced from them. No weights are stored: a tensor is drawn anew
from its own name. A paper's adapter, ``parity/adapters/<paper>.py``, has ``run(case) -> dict[str, Tensor]``.

`run_cases` is what ``zoo parity`` and ``tests/parity`` do; further cases come from the folders in ``ZOO_PARITY_CASES``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import MissingPackage, ZooError, unknown
from zoo.paths import share

PROBES = 16
# Relative and absolute tolerance of a digest; half precision shows gross errors only.
TOLERANCES = {
    "float64": (1e-5, 1e-7),
    "float32": (1e-3, 1e-5),
    "bfloat16": (2e-1, 2e-2),
    "float16": (3e-2, 3e-3),
}
Case = dict[str, Any]
Adapter = Callable[[Case], dict[str, Tensor]]


@dataclass(frozen=True)
class Verdict:
    """How one output of one case compares; `note` is empty where it agrees. `ok` is None where the case was not
    computed, for want of the optional package that `note` names."""

    paper: str
    case: str
    function: str
    output: str
    ok: bool | None
    note: str
    seconds: float


# ------------------------------------------------------------------------------------------------- inputs and digests


def fill(name: str, spec: Mapping[str, Any]) -> np.ndarray | None:
    """The float64 or int64 array that `name` holds under `spec` ("shape", "rule"[, "values"]); None for "keep".

    Raises:
        ZooError: an unknown rule.
    """
    rule, shape = spec["rule"], tuple(spec.get("shape", ()))
    if rule == "keep":
        return None
    if rule == "values":
        return np.asarray(spec["values"])
    if rule in ("zeros", "ones"):
        return np.full(shape, float(rule == "ones"))
    draw = np.random.RandomState(zlib.crc32(name.encode()))
    if rule.startswith("randint:"):
        low, high = map(int, rule.split(":")[1:])
        return draw.randint(low, high, size=shape).astype(np.int64)
    if rule == "uniform":
        return np.asarray(draw.random_sample(shape))
    x = np.asarray(draw.standard_normal(shape))
    by_rule: dict[str, Callable[[], np.ndarray]] = {
        "normal": lambda: x,
        "fan_in": lambda: x / np.sqrt(max(1, int(np.prod(shape[1:])))),
        "fan_in_last_out": lambda: x / np.sqrt(max(1, int(np.prod(shape[:-1])))),
        "small": lambda: 0.1 * x,
        "one": lambda: 1 + 0.1 * x,
        "var": lambda: 0.5 + np.abs(x) / 2,
    }
    if rule not in by_rule:
        raise unknown("fill rule", rule, by_rule)
    return np.asarray(by_rule[rule]())


def _filled(spec: Mapping[str, Any], case: Case, prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for name, entry in spec.items():
        array = fill(prefix + name, entry)
        if array is not None:
            tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)).to(case.get("device", "cpu"))
            tensors[name] = tensor.to(dtype_of(case)) if tensor.is_floating_point() else tensor
    return tensors


def filled_state(case: Case) -> dict[str, Tensor]:
    """The official state dict of a case, without the entries that are kept, in the case's dtype and on its device."""
    return _filled(case["state"], case, "")


def filled_inputs(case: Case) -> dict[str, Tensor]:
    """The inputs of a case, in its dtype and on its device."""
    return _filled(case["inputs"], case, "input:")


def dtype_of(case: Case) -> torch.dtype:
    return getattr(torch, case.get("dtype", "float64"))


def load_filled(network: nn.Module, case: Case, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> nn.Module:
    """`network` in the case's dtype and on its device, filled by way of `convert` from the official keys.

    Raises:
        ZooError: a key is left over, or one is missing that the case does not keep.
    """
    network = network.to(case.get("device", "cpu"), dtype_of(case))
    report = network.load_state_dict(convert(filled_state(case)), strict=False)
    kept = {name for name, entry in case["state"].items() if entry["rule"] == "keep"}
    if report.unexpected_keys or not set(report.missing_keys) <= kept:
        raise ZooError(f"keys differ: missing {report.missing_keys}, unexpected {report.unexpected_keys}, kept {kept}")
    return network


_PRECISION: dict[str, Any] = {
    "float64": "64-true",
    "float32": "32-true",
    "bfloat16": "bf16-true",
    "float16": "16-true",
}


def fit(
    case: Case, module: Any, data: Any, callback: Any, max_epochs: int, also: Iterable[Any] = (), **options: Any
) -> Any:
    """Trains a task on a case's batches with Lightning's trainer, in the case's dtype and on its device; the trainer.

    Args:
        case: says dtype and device.
        module: the LightningModule, filled already.
        data: a LightningDataModule that gives the case's batches in order.
        callback: keeps what the case compares.
        max_epochs: the length that the schedule sees.
        also: further callbacks, such as averages of the weights.
        options: further ones of the trainer.
    """
    import lightning as L

    trainer = L.Trainer(
        accelerator=torch.device(case["device"]).type,
        devices=1,
        precision=_PRECISION[case["dtype"]],
        max_epochs=max_epochs,
        callbacks=[callback, *also],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def digest(tensor: Any) -> dict[str, Any]:
    """Shape, mean, standard deviation, L2 norm and 16 evenly spaced elements, as plain JSON."""
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu().double().numpy()
    x = np.asarray(tensor, dtype=np.float64)
    flat = x.reshape(-1)
    where = np.unique(np.linspace(0, max(0, flat.size - 1), min(PROBES, flat.size)).round().astype(int))
    return {
        "shape": list(x.shape),
        "mean": float(flat.mean()) if flat.size else 0.0,
        "std": float(flat.std()) if flat.size else 0.0,
        "l2": float(np.sqrt((flat**2).sum())),
        "probe": [float(v) for v in flat[where]],
    }


def compare(expected: Mapping[str, Any], tensor: Any, rtol: float = 1e-5, atol: float = 1e-7) -> str | None:
    """None where `tensor` agrees with the digest `expected`, else one line that says how it differs."""
    got = digest(tensor)
    if got["shape"] != expected["shape"]:
        return f"shape {got['shape']} instead of {expected['shape']}"
    for field in ("mean", "std", "l2", "probe"):
        a, b = np.asarray(got[field]), np.asarray(expected[field])
        allowed = atol + rtol * max(float(np.abs(b).max(initial=0.0)), expected["std"])
        worst = float(np.abs(a - b).max(initial=0.0))
        if not worst <= allowed:
            shown = f"{a.reshape(-1)[:3]} against {b.reshape(-1)[:3]}"
            return f"{field} differs by {worst:.3g} (allowed {allowed:.3g}): {shown}"
    return None


# ------------------------------------------------------------------------------------------------------------- runner


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


@cache
def adapter(paper: str) -> Adapter:
    """The function `run` of the paper's adapter."""
    path = share("parity/adapters") / f"{paper}.py"
    spec = importlib.util.spec_from_file_location(f"zoo_parity_{paper}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ZooError(f"no parity adapter {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


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
            outputs = adapter(case["paper"])({**case, "dtype": dtype, "device": device})
        except MissingPackage as error:
            problem, skipped = str(error), True
        except Exception as error:  # a case that fails must not keep the others from their verdict
            problem = " ".join(f"{type(error).__name__}: {error}".split())
    seconds = round(time.perf_counter() - begin, 3)
    official = case["official"]
    function = official.get("entry") or official.get("derived_from", "")
    verdicts = []
    for name, expected in case["outputs"].items():
        note = problem or (
            "not computed" if name not in outputs else compare(expected, outputs[name], rtol, atol) or ""
        )
        verdicts.append(
            Verdict(case["paper"], case["case"], function, name, None if skipped else not note, note, seconds)
        )
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
