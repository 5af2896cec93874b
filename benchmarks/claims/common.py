"""What every claim in miniature shares: the images, a training run, an interval over seeds, a store that resumes, the
record of the result."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.environment import ROOT, command_line, environment
from zoo.data.sources import open_source

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


# ---------------------------------------------------------------------------------------------------- images, training


def choose_data(given: str | None, folder: Path | None) -> tuple[str, str | None]:
    """The dataset and its folder: CIFAR-10 where it lies beside the checkout, else the embedded world."""
    if given is not None:
        return given, str(folder) if folder else None
    beside = folder or ROOT.parent / "shared" / "data" / "cifar10"
    return ("cifar10", str(beside)) if beside.is_dir() else ("shapes", None)


@dataclass
class World:
    """The images (N,3,H,W) uint8 and labels (N,) of the two splits, and how to normalise."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    mean: Tensor
    std: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


def _read(dataset: str, split: str, folder: str | None, count: int, **options: Any) -> tuple[Tensor, Tensor, int]:
    source = open_source(dataset, split, folder, **options)
    samples = [source[index] for index in range(min(count, len(source)))]
    images = torch.stack([sample["image"] for sample in samples])
    return images, torch.tensor([int(sample["label"]) for sample in samples]), len(source.class_names)


def open_world(dataset: str, folder: str | None, img_size: int, train_images: int, test_images: int) -> World:
    """Reads the images once; they stay in memory as bytes. `img_size` is that of images which are drawn."""
    options = {"size": img_size} if dataset == "shapes" else {}
    *train, classes = _read(dataset, "train", folder, train_images, **options)
    *test, _ = _read(dataset, "test", folder, test_images, **options)
    pixels = train[0][:5000].float().div(255)
    mean, std = pixels.mean((0, 2, 3)).view(3, 1, 1), pixels.std((0, 2, 3)).view(3, 1, 1)
    return World((train[0], train[1]), (test[0], test[1]), classes, mean, std)


class Batches(Dataset):
    """Augmented training batches: item `i` is a pure function of the seed and `i`.

    :meth:`augment` shifts images by up to an eighth of their side (reflected at the border) and flips them, all of a
    batch at once; a subclass may do otherwise.
    """

    def __init__(self, images: Tensor, labels: Tensor, world: World, steps: int, batch: int, seed: int) -> None:
        self.images, self.labels, self.world = images, labels, world
        self.steps, self.batch, self.seed = steps, min(batch, len(images)), seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        epoch, place = divmod(step, len(self.images) // self.batch)
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.seed * 100_003 + epoch))
        index = order[place * self.batch : (place + 1) * self.batch]
        generator = torch.Generator().manual_seed((self.seed * 100_003 + step) * 2 + 1)
        return {**self.augment(self.images[index], generator), "label": self.labels[index], "index": index}

    def augment(self, images: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """The normalised pictures that training sees, by their key in the batch, of images (B, 3, H, W) as bytes."""
        count, _, height, width = images.shape
        pad = height // 8
        padded = torch.nn.functional.pad(images.float(), (pad,) * 4, mode="reflect")
        top, left = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        flip = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
        batch = torch.arange(count)[:, None, None]
        moved = padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return {"image": self.world.normalise(moved)}


class Diary(L.Callback):
    """The loss of every step, and the wall and processor seconds of every step after the first ten.

    Processor time is what the comparison of arms takes: other programs on the machine hardly touch it.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.processor: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.start = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        if batch_idx >= min(10, trainer.max_steps // 2):
            self.seconds.append(time.perf_counter() - self.start[0])
            self.processor.append(time.process_time() - self.start[1])

    def loss_at(self, step: int) -> float | None:
        """Mean loss of the ten steps that end with `step` (from 1); None where the run was shorter."""
        return None if len(self.losses) < step else sum(self.losses[step - 10 : step]) / 10


def train(task: L.LightningModule, batches: Batches, diary: Diary | None = None) -> tuple[L.Trainer, Diary]:
    """One pass over the batches; the trainer writes nothing."""
    diary = diary or Diary()
    trainer = L.Trainer(
        max_steps=len(batches),
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        callbacks=[diary],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(batches, batch_size=None))
    return trainer, diary


def labelled(world: World, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """The seed's labelled subset of the training images, the same number of each class."""
    images, labels = world.train
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    share = count // world.classes
    picked = torch.cat([order[labels[order] == c][:share] for c in range(world.classes)])
    return images[picked], labels[picked]


@torch.no_grad()
def in_batches(function: Any, images: Tensor, world: World, size: int = 250) -> Tensor:
    """What `function` makes of normalised images (N, 3, H, W), a part at a time."""
    return torch.cat([function(world.normalise(part)) for part in images.split(size)])


# ------------------------------------------------------------------------------------------------------- parts, results


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


def run_arms(
    paper: str,
    statement: str,
    given: Any,
    kind: Callable[..., Any],
    quick: dict[str, Any],
    arms: list[str],
    one_arm: Callable[[Any, World, int, str], dict[str, Any]],
    conclude: Callable[[list[dict[str, dict[str, Any]]]], list[SubClaim]],
) -> int:
    """:func:`run_seeds` on labelled pictures, the arms of one :class:`World`."""
    dataset, folder = choose_data(given.data, given.data_dir)
    settings = replace(kind(dataset=dataset), **(quick if given.quick else {}))

    @cache
    def world() -> World:
        return open_world(dataset, folder, settings.img_size, settings.train_images, settings.test_images)

    def run_arm(seed: int, arm: str) -> dict[str, Any]:
        return one_arm(settings, world(), seed, arm)

    return run_seeds(paper, statement, given, settings, {arm: {} for arm in arms}, run_arm, conclude)


def run_seeds(
    paper: str,
    statement: str,
    given: Any,
    settings: Any,
    arms: Mapping[str, Mapping[str, Any]],
    run_arm: Callable[[int, str], dict[str, Any]],
    conclude: Callable[[list[dict[str, dict[str, Any]]]], list[SubClaim]],
) -> int:
    """All seeds and arms, each computed or taken from the store, and the result file, which tells the arms' options."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    seeds: list[dict[str, dict[str, Any]]] = []
    try:
        store = Store(given.work / paper, asdict(settings) | {"threads": given.threads})
        for seed in range(given.seeds):
            seeds.append({})
            for arm in arms:
                found = store.part(f"seed{seed}_{arm}", lambda s=seed, a=arm: run_arm(s, a))
                seeds[-1][arm] = found
                told = ", ".join(f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, float))
                print(f"seed {seed} {arm}: {told}", flush=True)
    finally:
        torch.set_num_threads(threads)
    parts = [found for seed in seeds for found in seed.values()]
    numbers = {
        arm: {**told, **{key: [seed[arm][key] for seed in seeds] for key in seeds[0][arm]}}
        for arm, told in arms.items()
    }
    options = {"seeds": given.seeds, "threads": given.threads, "quick": given.quick}
    record = result(paper, statement, asdict(settings) | options, numbers, conclude(seeds), parts)
    out = result_path(paper, given)
    write(record, out)
    show(record)
    if given.quick:
        print("a quick run tries the program; its numbers say nothing")
    print(f"written: {out}")
    return 0
