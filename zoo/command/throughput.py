"""What `zoo benchmark` measures: the forward pass of a network, the training step of a recipe in its own trainer, and
its data without a network."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from zoo import catalog
from zoo.command.progress import samples_of
from zoo.command.runs import recipe_of
from zoo.errors import ZooError, unknown
from zoo.machine import device_of, environment, peak_memory
from zoo.nn.memory_order import to_channels_last
from zoo.training.base import batch_length
from zoo.weights.runs import is_run, open_run

_GAIN = 1.03  # what a doubled batch must bring to be tried on
_LARGEST = 4096


@dataclass(frozen=True)
class Setting:
    """How it is measured; `batch` None: found by doubling."""

    batch: int | None = 8
    size: int | None = None
    repeats: int = 10
    warmup: int = 3
    threads: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    compile: bool = False
    channels_last: bool = False

    @property
    def place(self) -> torch.device:
        return device_of(self.device)


@dataclass
class Measured:
    """Seconds of each pass, and the samples in one."""

    seconds: list[float]
    samples: int
    what: str = "images"
    rate: float = field(init=False)
    best: float = field(init=False)  # what other work on the machine disturbs least

    def __post_init__(self) -> None:
        self.rate = self.samples / float(np.median(self.seconds))
        self.best = self.samples / min(self.seconds)


def measure(name: str, what: str | None, setting: Setting) -> dict[str, Any]:
    """How fast `name` is, a model, a recipe, a leaderboard row or a run.

    Args:
        what: "forward", "train" (a recipe or run) or "data" (likewise); None: "train" of a recipe, else "forward".

    Returns:
        {"name", "what", "samples", "samples_per_s", "batch", "seconds": {"median", "q25", "q75", "all"}, "peak_mib",
        "tried": [{"batch", "samples_per_s"}], "device", the setting, and the machine's facts}.

    Raises:
        ZooError: unknown names, a training step of a model alone, not enough memory for one sample.
    """
    recipe = _recipe_of(name)
    what = what or ("train" if recipe is not None else "forward")
    run = open_run(name) if what != "forward" and is_run(name) else None
    if what != "forward" and recipe is None and run is None:
        raise ZooError(f"{name} has no training data of its own: zoo benchmark RECIPE {what} (see zoo list recipes)")
    passes: Callable[[int], Measured]
    device = setting.place
    of_run = contextlib.nullcontext() if run is None else recipe_of(run)
    with _threads(setting.threads), tempfile.TemporaryDirectory(prefix="zoo-") as folder, of_run as stated:
        recipe = recipe if stated is None else str(stated)
        if what == "forward":
            passes = _forward(name, recipe, setting)
        else:
            assert recipe is not None
            passes = _Recipe(recipe, what, setting, Path(folder))
        batch, found, tried = find_batch(passes, setting, device)
        threads = torch.get_num_threads() if device.type == "cpu" else None
    low, middle, high = np.percentile(found.seconds, [25, 50, 75])
    facts = environment()
    peak = peak_memory(device)
    return {
        "name": name,
        "what": what,
        "samples": found.what,
        "samples_per_s": found.rate,
        "batch": batch,
        "seconds": {
            "median": float(middle),
            "q25": float(low),
            "q75": float(high),
            "all": [round(x, 6) for x in found.seconds],
        },
        "repeats": len(found.seconds),
        "warmup": setting.warmup,
        "peak_mib": None if peak is None else round(peak / 2**20),
        "tried": tried,
        "device": facts["gpu"] if device.type == "cuda" else facts["cpu"]["kind"],
        "threads": threads,
        "dtype": setting.dtype,
        "compile": setting.compile,
        "channels_last": setting.channels_last,
        **facts,
    }


def _recipe_of(name: str) -> str | None:
    """The recipe that `name` is; None where it is a model or a run."""
    if is_run(name):
        return None
    models = {*catalog.list_models(), *catalog.list_weights()}
    if name in models:
        return None
    try:
        catalog.recipe_path(name)
    except ZooError:
        if "/" in name or name.endswith(".yaml") or catalog.is_row(name):
            raise
        raise unknown("model or recipe", name, [*models, *catalog.list_recipes("*")]) from None
    return name


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_batch(
    passes: Callable[[int], Measured], setting: Setting, device: torch.device
) -> tuple[int, Measured, list[dict[str, Any]]]:
    """The batch, as asked for or found by doubling, what it gives, and what else was tried."""
    if setting.batch is not None:
        try:
            return setting.batch, passes(setting.batch), []
        except Exception as error:
            if _is_memory(error):
                raise ZooError(f"batch {setting.batch} does not fit into memory; --batch auto finds one") from error
            raise
    batch, best, tried = 1, None, []
    while batch <= _LARGEST:
        before = _held(device)
        try:
            found = passes(batch)
        except Exception as error:
            if not _is_memory(error):
                raise
            if best is None:
                raise ZooError("not even a batch of 1 fits into memory") from error
            break
        tried.append({"batch": batch, "samples_per_s": found.rate})
        if best is not None and found.best < _GAIN * best[1].best:
            break
        best = (batch, found)
        if not _fits(2 * max(0, _held(device) - before), device):
            break
        batch *= 2
    assert best is not None
    return *best, tried


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _held(device: torch.device) -> int:
    return peak_memory(device) or 0


def _fits(more: int, device: torch.device) -> bool:
    """Whether so many bytes more are likely to be had; a GPU says so itself."""
    if device.type != "cpu":
        return True
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return True
    return more < 0.8 * free


# ------------------------------------------------------------------------------------------------------------ forward


def _forward(name: str, recipe: str | None, setting: Setting) -> Callable[[int], Measured]:
    from zoo.weights import export
    from zoo.weights.pretrained import Architecture
    from zoo.weights.source import open_source

    size, channels, refused = setting.size, 3, ""
    if is_run(name):
        source = open_source(name)
        network, size, channels, refused = source.network, size or source.size, source.channels, source.not_exported
    elif recipe is not None:
        from zoo.command.recipes import load_recipe

        task, data, _ = load_recipe(recipe, {"trainer.logger": False, "trainer.accelerator": "cpu"})
        network, refused = task.get_submodule("network"), getattr(task, "not_exported", "")
        given = getattr(data, "image_size", None)
        size, channels = size or (given if isinstance(given, int) else None), len(getattr(data, "mean", (0, 0, 0)))
    else:
        card, model = catalog.model(name)
        entry = catalog.weight(name)[1] if "." in name else None
        known = entry or next((one for one in card.weights if one.model == model.name), None)
        network = Architecture(card, model.name, dict(entry.overrides) if entry else {}).build()
        if known is not None and not (known.preprocess.longest or known.preprocess.canvas):
            size = size or known.preprocess.size
        elif model.classifier is not None:
            size = size or model.classifier.image_size
    subject = export.subject(network, size, channels, refused=refused)
    device = setting.place
    _prepare(network, setting)
    module = subject.module.to(device)
    if setting.compile:
        module.compile()
    mixed = setting.dtype != "float32"

    def passes(batch: int) -> Measured:
        inputs = _moved(subject.make(batch), setting, device)
        seconds = []
        with torch.inference_mode(), torch.autocast(device.type, getattr(torch, setting.dtype), enabled=mixed):
            for turn in range(setting.warmup + setting.repeats):
                begin = time.perf_counter()
                module(**inputs)
                _synchronize(device)
                if turn >= setting.warmup:
                    seconds.append(time.perf_counter() - begin)
        return Measured(seconds, batch, _counted(inputs))

    return passes


def _counted(inputs: dict[str, Any]) -> str:
    if "video" in inputs:
        return "clips"
    return "images" if inputs.keys() & {"image", "images", "x"} and "times" not in inputs else "samples"


def _prepare(network: nn.Module, setting: Setting) -> None:
    if setting.channels_last:
        to_channels_last(network, _order(any(isinstance(part, nn.Conv3d) for part in network.modules())))


def _order(clips: bool) -> torch.memory_format:
    return torch.channels_last_3d if clips else torch.channels_last


def _moved(inputs: Any, setting: Setting, device: torch.device) -> Any:
    def move(x: torch.Tensor) -> torch.Tensor:
        x = x.to(device)
        if setting.channels_last and x.ndim in (4, 5) and x.is_floating_point():
            x = x.contiguous(memory_format=_order(x.ndim == 5))
        return x

    return torch.utils._pytree.tree_map_only(torch.Tensor, move, inputs)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -------------------------------------------------------------------------------------------------- training and data


class _Clock(L.Callback):
    """Notes how long each training batch takes, from the moment that it is there to its update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        _synchronize(pl_module.device)
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        _synchronize(pl_module.device)
        self.seconds.append(time.perf_counter() - self._begin)


class _Recipe:
    """Training steps, or batches, of a recipe at some batch size."""

    def __init__(self, recipe: str, what: str, setting: Setting, folder: Path) -> None:
        self.recipe, self.what, self.setting, self.folder = recipe, what, setting, folder

    def __call__(self, batch: int) -> Measured:
        from zoo.command.recipes import load_recipe, quiet

        setting, count = self.setting, self.setting.warmup + self.setting.repeats
        device = setting.place
        options: dict[str, Any] = {
            "data.batch_size": batch,
            "model.optim.global_batch": None,
            "trainer.accelerator": "gpu" if device.type == "cuda" else device.type,
            "trainer.devices": [device.index or 0] if device.type == "cuda" else 1,
            "trainer.strategy": "auto",
            "trainer.precision": {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}[setting.dtype],
            "trainer.accumulate_grad_batches": 1,
            "trainer.max_epochs": 1,
            "trainer.max_steps": -1,
            "trainer.limit_train_batches": count,
            "trainer.limit_val_batches": 0,
            "trainer.num_sanity_val_steps": 0,
            "trainer.logger": False,
            "trainer.enable_checkpointing": False,
            "trainer.enable_progress_bar": False,
            "trainer.default_root_dir": str(self.folder),
        }
        task, data, trainer = load_recipe(self.recipe, options)
        if "fit" not in getattr(task, "stages", ("fit",)):
            raise ZooError(f"{self.recipe} does not train; zoo benchmark {self.recipe} forward")
        data.setup("fit")
        loader: Any = data.train_dataloader()
        if self.what == "data":
            return self._data(loader, count)
        one = next(iter(loader))
        _prepare(getattr(task, "network", task), setting)
        one = _moved(one, setting, torch.device("cpu"))
        if setting.compile:
            task.get_submodule("network").compile()
        from zoo.training import EMA

        clock = _Clock()
        trainer.callbacks = [clock, *(c for c in trainer.callbacks if isinstance(c, EMA))]  # type: ignore[attr-defined]
        same: Any = torch.utils.data.DataLoader([one] * count, batch_size=None)  # type: ignore[arg-type]
        data.train_dataloader = lambda: same  # type: ignore[method-assign]
        with quiet():
            trainer.fit(task, datamodule=data)
        return Measured(clock.seconds[setting.warmup :], batch_length(one), samples_of(one))

    def _data(self, loader: Any, count: int) -> Measured:
        seconds: list[float] = []
        samples, what, turns = 0, "samples", 0
        while turns < count:
            begin = time.perf_counter()
            before = turns
            for one in loader:
                now = time.perf_counter()
                turns += 1
                if turns > self.setting.warmup:
                    seconds.append(now - begin)
                samples, what = batch_length(one), samples_of(one)
                if turns == count:
                    break
                begin = time.perf_counter()
            if turns == before:
                raise ZooError(f"{self.recipe}: its training data give no batch of this size")
        return Measured(seconds, samples, what)
