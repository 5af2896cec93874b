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
from torch import Tensor, nn

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
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels


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
    recipe: str,
    options: Mapping[str, Any],
    batch: Callable[[Tensor], Mapping[str, Any]],
    setting: Setting,
    start: Mapping[str, Tensor] | None = None,
    loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
) -> Trainer:
    """Our contender: the training step of a recipe's task, and the optimiser that it declares, fused as in training.

    Args:
        recipe: its name, or that of a leaderboard row.
        options: as on the command line. `model.optim.lr` keeps a few steps without a warm-up finite.
        batch: from the images that all contenders get to the batch that the task reads.
        setting: device, and the batch by which a `base_lr` is scaled.
        start: what the network starts from, key for key; None: random weights. No `init_from` is loaded.
        loss: of the task and a batch, where something else than its training step is timed.
    """
    import zoo
    from zoo.training.optim import make_optimizer, param_groups

    task = recipe_task(recipe, options, setting.device)
    if start is not None:
        task.network.load_state_dict(start)
    rate = task.optim.peak_lr(task.optim.global_batch or setting.batch)
    optimizer = make_optimizer(param_groups(task.trainable(), task.optim), task.optim, rate, fused=True)

    def step(images: Tensor) -> Tensor:
        found = task.training_step(batch(images), 0) if loss is None else loss(task, batch(images))
        return found["loss"] if isinstance(found, Mapping) else found

    kind = task.network if loss is not None else task
    what = "the network in the loss of all" if loss is not None else "its training step"
    how = f"{'fused ' * bool(optimizer.defaults.get('fused'))}{type(optimizer).__name__}"
    about = f"{type(kind).__module__}.{type(kind).__name__} of {recipe}: {what} and its own {how}"
    return Trainer("zoo", zoo.__version__, step, optimizer, about)


def noise(setting: Setting, *shape: int, seed: int = 0) -> Tensor:
    """Seeded noise of a shape, on the device: the time of a step does not depend on what is in the pictures."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(setting.device)


def costs(contenders: Mapping[str, tuple[nn.Module, Callable[[], Tensor]]]) -> dict[str, dict[str, int]]:
    """`flops` and `parameters` of each contender's network on the meta device, given its loss: do all do the same?"""
    return {
        "flops": {name: count_flops(loss) for name, (_, loss) in contenders.items()},
        "parameters": {name: sum(p.numel() for p in net.parameters()) for name, (net, _) in contenders.items()},
    }


def data_from_recipe(
    recipe: str,
    options: Mapping[str, Any],
    folder: Path,
    batch: int,
    image: Callable[[Any], Tensor] = lambda batch: batch["image"],
    how: str = "JPEG decoding and crop on uint8 tensors",
) -> Loader:
    """Our pipeline: what a recipe's data module reads in this process from a folder or file in place of its data set.

    Args:
        recipe, options: as in :func:`from_recipe`.
        folder: of classes, or what else the data module takes as `dataset`.
        batch: pictures in one.
        image: from the module's batch to the tensor that the network gets.
        how: the pipeline in words.
    """
    import zoo

    own = {"data.dataset": str(folder), "data.batch_size": batch, "data.num_workers": 0}
    data: Any = zoo.load_recipe(recipe, {**_NO_RUN, **own, **options})[1]
    data.setup("fit")
    about = f"{type(data).__name__} of {recipe}: {how}"
    return Loader("zoo", zoo.__version__, forever(data.train_dataloader(), image), about)


def pil_crop(side: int, *further: Any, **options: Any) -> Any:
    """The transforms that official scripts share: torchvision's random resized crop, bicubic unless `options` say else,
    `further` ones, flip and ImageNet's normalisation, on PIL pictures."""
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(side, **{"interpolation": bicubic, **options})
    ends = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([crop, *further, *ends])


def peer_loader(
    name: str,
    package: str | Path,
    dataset: Any,
    batch: int | None,
    about: str,
    image: Callable[[Any], Tensor] = lambda batch: batch[0],
    **options: Any,
) -> Loader:
    """A peer's pipeline: shuffled batches of a dataset, of (image, label) unless told, loaded in this process.

    Args:
        package: whose version counts, or a checkout, whose revision does.
        batch: pictures in one; None: the dataset gives whole batches by itself.
        options: of the DataLoader.
    """
    from torch.utils.data import DataLoader

    whole = {"batch_size": None} if batch is None else {"batch_size": batch, "shuffle": True, "drop_last": True}
    if isinstance(package, Path):
        version = revision(package)
    else:
        version = f"{package} " * (package != name) + (package_version(package) or "")
    return Loader(name, version, forever(DataLoader(dataset, **whole, **options), image), about)


@contextlib.contextmanager
def crop_loaders(
    recipe: str,
    options: Mapping[str, Any],
    setting: Setting,
    side: int,
    batch: int,
    peer: tuple[str, str],
    jitter: float | None = None,
    **crop: Any,
) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to batches of crops: a recipe's, that of :func:`pil_crop`, and timm's.

    Args:
        recipe, options: of ours.
        side: of the crops, in pixels.
        batch: crops in one.
        peer: the name of the second, and what it is.
        jitter: of the colours, in both peers.
        crop: of the peers, as of torchvision's RandomResizedCrop.
    """
    from timm.data import ImageDataset, create_transform
    from torchvision import datasets, transforms

    colours = {"interpolation": "bicubic", "mean": MEAN, "std": STD}
    timms = create_transform(side, True, color_jitter=jitter, **colours, **crop)
    steps = [] if jitter is None else [transforms.ColorJitter(jitter, jitter, jitter)]
    with photos(setting, 4 * batch) as (folder, name):
        found = [data_from_recipe(recipe, options, folder, batch)]
        theirs = datasets.ImageFolder(str(folder), pil_crop(side, *steps, **crop))
        found.append(peer_loader(peer[0], "torchvision", theirs, batch, peer[1]))
        about = "ImageDataset, create_transform" + (f" with color_jitter {jitter}" if jitter else "")
        found.append(peer_loader("timm", "timm", ImageDataset(str(folder), transform=timms), batch, about))
        yield found, Work(batch, detail={"data": name, "crop": side})


@contextlib.contextmanager
def importing(checkout: Path, *needed: str, stand_ins: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[None]:
    """Modules of a checkout, and what they import from there, can be imported; afterwards sys.path and sys.modules are
    as they were.

    Args:
        needed: modules or packages of the checkout by which it is known.
        stand_ins: modules that it asks for without using them here, by their names; where there are none.

    Raises:
        ZooError: the checkout lacks one of `needed`, or a package that it wants is not installed.
    """
    for path in (name.replace(".", "/") for name in needed):
        if not (checkout / f"{path}.py").is_file() and not (checkout / path / "__init__.py").is_file():
            raise ZooError(f"{checkout} is not the official checkout: it has no {path}.py")
    made = {name: ModuleType(name) for name in stand_ins or {} if name not in sys.modules}
    for name, module in made.items():
        module.__dict__.update((stand_ins or {})[name])
    tops = {path.stem for path in checkout.iterdir() if path.is_dir() or path.suffix == ".py"}
    tops |= {name.partition(".")[0] for name in made}

    def of_these_names() -> dict[str, ModuleType]:
        return {key: module for key, module in sys.modules.items() if key.partition(".")[0] in tops}

    before = of_these_names()
    for key in before:
        del sys.modules[key]
    sys.modules.update(made)
    sys.path.insert(0, str(checkout))
    try:
        yield
    except ModuleNotFoundError as error:
        raise ZooError(f"{checkout.name} wants {error.name}, which is not installed") from error
    finally:
        sys.path.remove(str(checkout))
        for key in of_these_names():
            del sys.modules[key]
        sys.modules.update(before)


def import_from(checkout: Path, name: str) -> ModuleType:
    """A module or package of a checkout; see :func:`importing`."""
    with importing(checkout, name):
        return importlib.import_module(name)


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
