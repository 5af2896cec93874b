"""Time the same work done by several codebases, round after round, and say how far apart they are.

All contenders live in one process and take turns: a round runs each of them once, the order rotates from round to
round, and a ratio is taken within a round. A machine that slows down for a minute slows all of them, so that ratios
stay sound where absolute times do not. Beside the wall clock stands the processor time of the process, which other
programs on the machine hardly touch.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import ROOT, package_version
from zoo.errors import ZooError

# Dense tensor-core peaks in TFLOP/s from the makers' data sheets: (float32 as TF32, bfloat16).
GPU_PEAKS: dict[str, tuple[float, float]] = {
    "V100": (15.7, 125.0),
    "A100": (156.0, 312.0),
    "A10": (62.5, 125.0),
    "L4": (60.0, 121.0),
    "L40S": (183.0, 362.0),
    "RTX 3090": (35.6, 71.0),
    "RTX 4090": (82.6, 165.2),
    "H100": (494.5, 989.4),
    "H200": (494.5, 989.4),
    "B200": (1125.0, 2250.0),
}


@dataclass(frozen=True)
class Setting:
    """The conditions that every contender shares."""

    model: str = ""
    dtype: str = "float32"
    threads: int = 1
    batch: int = 8
    repeats: int = 7
    warmup: int = 2
    device: str = "cpu"
    compile: bool = False
    official: Path | None = None
    data: Path | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


@dataclass
class Trainer:
    """A network under training: `loss` maps the images (B,C,H,W) to a scalar, `optimizer` is the one its own training
    script builds. `about` says what is being timed in words."""

    name: str
    version: str
    loss: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    about: str


@dataclass
class Loader:
    """A data pipeline: an endless iterator over batches, each a tensor (B,C,H,W) ready for the network."""

    name: str
    version: str
    batches: Iterator[Tensor]
    about: str


@dataclass(frozen=True)
class Work:
    """What one step does, for the rates: images, tokens that pass a transformer, floating-point operations."""

    images: int
    tokens: int = 0
    flops: int = 0
    detail: dict[str, Any] = field(default_factory=dict)


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}


def count_flops(loss: Callable[[], Tensor]) -> int:
    """Floating-point operations of the matrix products of one forward and backward pass (2 a multiply-add).

    Call it with a network and images on the meta device: nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return int(counter.get_total_flops())


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def training_step(trainer: Trainer, images: Tensor, setting: Setting) -> dict[str, float]:
    """One whole training step: forward, backward, update. Returns the seconds of each part and the loss."""
    mixed = setting.torch_dtype is not torch.float32
    device_type = setting.device.split(":")[0]
    _synchronize(setting.device)
    start, processor = time.perf_counter(), time.process_time()
    with torch.autocast(device_type, setting.torch_dtype, enabled=mixed):
        loss = trainer.loss(images)
    _synchronize(setting.device)
    forward = time.perf_counter()
    loss.backward()
    _synchronize(setting.device)
    backward = time.perf_counter()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    _synchronize(setting.device)
    end = time.perf_counter()
    return {
        "seconds": end - start,
        "processor": time.process_time() - processor,
        "forward": forward - start,
        "backward": backward - forward,
        "update": end - backward,
        "loss": float(loss.detach()),
    }


def peak_memory(trainer: Trainer, images: Tensor, setting: Setting) -> int:
    """Bytes at the peak of a trainer's second step above those before its first: gradients, the optimiser's state and
    activations, but not the weights. On a CPU they are those of a process of its own, with one thread."""
    if setting.device.startswith("cuda"):
        training_step(trainer, images, setting)
        torch.cuda.reset_peak_memory_stats(setting.device)
        training_step(trainer, images, setting)
        state = [v for values in trainer.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        weights = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        own = sum(v.numel() * v.element_size() for v in (*state, *weights)) - sum(
            v.numel() * v.element_size() for v in weights
        )
        held = torch.cuda.memory_allocated(setting.device)
        return torch.cuda.max_memory_allocated(setting.device) - held + own
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def measured() -> None:
        torch.set_num_threads(1)
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(2):
            training_step(trainer, images, setting)
        send.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)

    process = context.Process(target=measured)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise ZooError(f"{trainer.name}: the process that measured its memory died") from None
    finally:
        process.join()


def _loading_step(loader: Loader) -> dict[str, float]:
    start, processor = time.perf_counter(), time.process_time()
    next(loader.batches)
    return {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}


def interleave(steps: dict[str, Callable[[], dict[str, float]]], repeats: int, warmup: int) -> dict[str, list[dict]]:
    """Run every step `warmup + repeats` times in turns; the records of the last `repeats` rounds, by name."""
    names = list(steps)
    records: dict[str, list[dict]] = {name: [] for name in names}
    enabled = gc.isenabled()
    for turn in range(warmup + repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            gc.disable()
            record = steps[name]()
            if enabled:
                gc.enable()
            if turn >= warmup:
                records[name].append(record)
    return records


def _share_of_peak(rate: float, setting: Setting) -> float | None:
    """Achieved operations per second over the GPU's peak at this dtype; None on a CPU or an unknown card."""
    if not setting.device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(setting.device)
    for card in sorted(GPU_PEAKS, key=len, reverse=True):
        if card in name:
            return rate / (GPU_PEAKS[card][setting.dtype == "bfloat16"] * 1e12)
    return None


def _report(contenders: list[Any], records: dict[str, list[dict]], work: Work, setting: Setting) -> dict[str, Any]:
    ours = {key: [run[key] for run in records[contenders[0].name]] for key in ("seconds", "processor")}
    rows = []
    for contender in contenders:
        runs = records[contender.name]
        seconds = [run["seconds"] for run in runs]
        row: dict[str, Any] = {
            "name": contender.name,
            "version": contender.version,
            "about": contender.about,
            "seconds": {**spread(seconds), "all": [round(s, 5) for s in seconds]},
            "images_per_second": work.images / spread(seconds)["median"],
            # Above 1 the first contender, ours, is the faster one.
            "times_ours": spread([theirs / mine for theirs, mine in zip(seconds, ours["seconds"], strict=True)]),
        }
        if not setting.device.startswith("cuda"):
            used = [run["processor"] for run in runs]
            row["processor_seconds"] = spread(used)
            row["processor_times_ours"] = spread([a / b for a, b in zip(used, ours["processor"], strict=True)])
        if work.tokens:
            row["tokens_per_second"] = work.tokens / spread(seconds)["median"]
        if work.flops:
            rate = work.flops / spread(seconds)["median"]
            row["tflops"] = rate / 1e12
            row["share_of_peak"] = _share_of_peak(rate, setting)
        for part in ("forward", "backward", "update"):
            if part in runs[0]:
                row[part] = spread([run[part] for run in runs])["median"]
        if "loss" in runs[0]:
            row["last_loss"] = runs[-1]["loss"]
        rows.append(row)
    return {"work": asdict(work), "rounds": setting.repeats, "contenders": rows}


def time_training(trainers: list[Trainer], images: Tensor, work: Work, setting: Setting) -> dict[str, Any]:
    """Interleaved whole training steps; the first trainer is ours. Fails on a loss that is not finite."""
    if setting.compile:
        for trainer in trainers:
            trainer.loss = torch.compile(trainer.loss)
    steps = {t.name: (lambda t=t: training_step(t, images, setting)) for t in trainers}
    records = interleave(steps, setting.repeats, setting.warmup)
    for name, runs in records.items():
        if not np.isfinite([run["loss"] for run in runs]).all():
            raise ZooError(f"{name}: the loss is not finite; this comparison means nothing")
    return _report(trainers, records, work, setting)


def time_loading(loaders: list[Loader], work: Work, setting: Setting) -> dict[str, Any]:
    """Interleaved batches of the data pipelines; the first is ours."""
    records = interleave({x.name: (lambda x=x: _loading_step(x)) for x in loaders}, setting.repeats, setting.warmup)
    return _report(loaders, records, work, setting)


# What a recipe says of the run is of no use here: the harness has the steps, the precision and the device.
_NO_RUN = {"trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.logger": False}


def recipe_task(recipe: str, options: Mapping[str, Any], device: str = "cpu") -> Any:
    """The task of a recipe, with options as on the command line, to train on a device; on "meta" it has no values."""
    import zoo

    with torch.device("meta" if device == "meta" else "cpu"):
        task: Any = zoo.load_recipe(recipe, {**_NO_RUN, **options})[0]
    task.log = lambda *_, **__: None  # there is no trainer; its peers log nothing either
    return task.to(device).train()


def from_recipe(
    recipe: str, options: Mapping[str, Any], batch: Callable[[Tensor], Mapping[str, Any]], setting: Setting
) -> Trainer:
    """Our contender: the training step of a recipe's task, and the fused optimiser that the recipe declares.

    Args:
        recipe: its name, or that of a leaderboard row.
        options: as on the command line. `model.optim.lr` keeps a few steps without a warm-up finite.
        batch: from the images that all contenders get to the batch that the task reads.
        setting: device, and the batch by which a `base_lr` is scaled.
    """
    import zoo
    from zoo.training.optim import make_optimizer, param_groups

    task = recipe_task(recipe, options, setting.device)
    rate = task.optim.peak_lr(task.optim.global_batch or setting.batch)
    optimizer = make_optimizer(param_groups(task.trainable(), task.optim), task.optim, rate, fused=True)

    def loss(images: Tensor) -> Tensor:
        found = task.training_step(batch(images), 0)
        return found["loss"] if isinstance(found, Mapping) else found

    kind = type(task)
    about = f"{kind.__module__}.{kind.__name__} of {recipe}: its training step and its own optimiser, fused"
    return Trainer("zoo", zoo.__version__, loss, optimizer, about)


def data_from_recipe(recipe: str, options: Mapping[str, Any], folder: Path, batch: int) -> Loader:
    """Our pipeline: the training images of a recipe's data module, read in this process from a folder of classes."""
    import zoo

    own = {"data.dataset": str(folder), "data.batch_size": batch, "data.num_workers": 0}
    data: Any = zoo.load_recipe(recipe, {**_NO_RUN, **own, **options})[1]
    data.setup("fit")
    about = f"{type(data).__name__} of {recipe}: JPEG decoding and crop on uint8 tensors"
    return Loader("zoo", zoo.__version__, forever(data.train_dataloader(), lambda b: b["image"]), about)


def peer_loader(name: str, package: str, dataset: Any, batch: int, about: str) -> Loader:
    """A peer's pipeline: shuffled batches of a dataset of (image, label), loaded in this process."""
    from torch.utils.data import DataLoader

    loader = DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True)
    version = f"{package} " * (package != name) + (package_version(package) or "")
    return Loader(name, version, forever(loader, lambda b: b[0]), about)


def import_from(checkout: Path, name: str) -> ModuleType:
    """A module of a checkout, with what it imports from there; sys.path and sys.modules stay as they were.

    Raises:
        ZooError: the checkout has no such module.
    """
    if not (checkout / f"{name}.py").is_file():
        raise ZooError(f"{checkout} is not the official checkout: it has no {name}.py")
    tops = {path.stem for path in checkout.iterdir() if path.is_dir() or path.suffix == ".py"}

    def of_these_names() -> dict[str, ModuleType]:
        return {key: module for key, module in sys.modules.items() if key.partition(".")[0] in tops}

    before = of_these_names()
    for key in before:
        del sys.modules[key]
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(checkout))
        for key in of_these_names():
            del sys.modules[key]
        sys.modules.update(before)


def forever(loader: Any, image: Callable[[Any], Tensor]) -> Iterator[Tensor]:
    """The images of a loader's batches, epoch after epoch."""
    while True:
        for batch in loader:
            yield image(batch)


def revision(checkout: Path) -> str:
    """The commit of a checkout, read from its files."""
    git = checkout / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if head.startswith("ref: "):
            reference = head[5:]
            loose = git / reference
            if loose.is_file():
                head = loose.read_text().strip()
            else:
                lines = (git / "packed-refs").read_text().splitlines()
                head = next(line.split()[0] for line in lines if line.endswith(" " + reference))
        return head[:12]
    except (OSError, StopIteration):
        return "unknown"


def _draw_jpegs(folder: Path, count: int) -> None:
    """Smooth coloured noise at a common photo size, where no photos are given."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        path = folder / f"class_{index % 10}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)


@contextlib.contextmanager
def photos(setting: Setting, count: int = 256) -> Iterator[tuple[Path, str]]:
    """A folder of classes with JPEG files (at least `count`), and what it is."""
    sample = ROOT.parent / "shared" / "data" / "imagenet_sample"
    if setting.data is not None:
        yield setting.data, setting.data.name
    elif sample.is_dir():
        yield sample, "imagenet_sample"
    else:
        with tempfile.TemporaryDirectory() as folder:
            _draw_jpegs(Path(folder), count)
            yield Path(folder), "drawn 500x375 JPEGs"
