"""Generative tasks by what they sample: grids of pictures during training, and distances from real pictures.

A task (or a network) that samples gives

- ``sample(noise, label) -> images``: noise (B, *noise_shape), labels (B,) int64 or None, to pictures (B, 3, H, W) in
  [-1, 1]; a function of its arguments alone,
- ``noise_shape``: of one sample's noise, such as (4, 32, 32),
- ``num_classes``: 0 where it is unconditional,
- ``sampling_options``, where its sampling has settings: the names of further keyword arguments of ``sample``, such as
  ("guidance", "interval", "steps"), each by default as the task says. A sweep finds the best of them.

Noise and label of sample number k are functions of (seed, k), whatever the batches and the number of processes: the
same samples come from one device and from eight, and a number can be had again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor

from zoo import files
from zoo.data.shapes import hash64
from zoo.errors import ZooError, unknown
from zoo.metrics.generation import (
    Extractor,
    GenerationMetrics,
    Rounding,
    Statistics,
    has_pictures,
    make_extractor,
    read_pictures,
    to_uint8,
)
from zoo.training.ema import check_average, evaluation_weights

Labels = Literal["random", "balanced"]


@runtime_checkable
class Samples(Protocol):
    """What samples; see the module's beginning."""

    noise_shape: Sequence[int]
    num_classes: int

    def sample(self, noise: Tensor, label: Tensor | None) -> Tensor: ...


def check_samples(model: Any) -> None:
    """Raises ZooError unless `model` samples."""
    missing = [name for name in ("sample", "noise_shape", "num_classes") if not hasattr(model, name)]
    if missing:
        raise ZooError(f"{type(model).__name__} does not sample: it has no {' and no '.join(missing)}")


def noise_of(indices: Sequence[int], shape: Sequence[int], seed: int = 0) -> Tensor:
    """Standard normal noise (B, *shape), float32 on the CPU, of the samples with these numbers."""
    generator = torch.Generator()
    rows = []
    for index in indices:
        generator.manual_seed(int(hash64(seed, 0x6E6F697365, index)[0]))  # apart from other uses of the seed
        rows.append(torch.randn(*shape, generator=generator, dtype=torch.float32))  # whatever the default is
    return torch.stack(rows)


def labels_of(
    indices: Sequence[int], num_classes: int, count: int, seed: int = 0, labels: Labels = "random"
) -> Tensor | None:
    """Labels (B,) of the samples with these numbers, of `count` in all; None where there are no classes.

    "random": drawn evenly, by (seed, number); "balanced": equally many of each class, in the order of the classes.
    """
    if labels not in ("random", "balanced"):
        raise unknown("labels", labels, ("random", "balanced"))
    if not num_classes:
        return None
    if labels == "balanced":
        return torch.tensor([index * num_classes // count for index in indices])
    drawn = [int(hash64(seed, 0x6C6162656C, index)[0]) for index in indices]
    return torch.tensor([(number & 0xFFFFFFFF) * num_classes >> 32 for number in drawn])


def draw_samples(
    model: Any,
    indices: Sequence[int],
    device: torch.device | str,
    seed: int = 0,
    label: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of the samples with these numbers and labels; call in inference mode. `options`
    are of the model's `sampling_options`."""
    noise = noise_of(indices, tuple(model.noise_shape), seed).to(device)
    images = model.sample(noise, None if label is None else label.to(device), **options)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ZooError(f"{type(model).__name__}.sample gave no pictures (B, 3, H, W) but {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """A uint8 sheet (3, H, W) of pictures (N, 3, H, W) in [-1, 1], in rows; by default about square. Small pictures
    are shown enlarged."""
    from torchvision.utils import make_grid

    count = len(images)
    columns = columns or math.ceil(math.sqrt(count))
    zoom = max(1, 64 // images.shape[-1])
    pixels = to_uint8(images.float(), "round").repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    return make_grid(pixels, nrow=columns, padding=2, pad_value=255)


def reference_statistics(
    data: Any,
    split: str,
    extractor: Extractor,
    device: torch.device | str = "cpu",
    features: bool = False,
    trainer: L.Trainer | None = None,
) -> Statistics:
    """The statistics of a split's pictures, each once, by the evaluation transform.

    Args:
        data: an :class:`~zoo.data.ImageDataModule`.
        split: "train", "val", "test" or "predict".
        extractor: on `device`.
        features: keep the features too, for KID, precision and recall.
        trainer: each process takes a share, and all get the whole; call on every process. Where it limits the batches
            of the split to a number, so many count.
    """
    from zoo.data.base import same
    from zoo.data.loader import ExactSampler
    from zoo.training.probe import gather_samples, told

    samples = data.samples(split, train_transform=False)
    rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    limit = getattr(trainer, f"limit_{split}_batches", None)
    pictures = min(len(samples), limit * data.eval_batch_size) if limit and isinstance(limit, int) else len(samples)
    if pictures < max(2, world):
        raise ZooError(f"the split {split!r} has too few pictures for statistics: {pictures}")
    options: dict[str, Any] = {"num_workers": data.num_workers, "collate_fn": same}
    sampler = ExactSampler(pictures, rank, world)
    loader = torch.utils.data.DataLoader(samples, data.eval_batch_size, sampler=sampler, **options)
    shift, scale = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    rows: list[tuple[Tensor, Tensor]] = []
    total = square = count = torch.zeros((), dtype=torch.float64, device=device)
    with torch.inference_mode():
        for batch in told(f"statistics of {split}: batch", loader, trainer) if trainer else loader:
            pixels = (batch["image"] * scale + shift) * 2 - 1
            x, _ = extractor(to_uint8(pixels, "round").to(device))
            if features:
                rows.append((x, batch["index"].to(device)))
            else:
                wide = x.double()
                total, square, count = total + wide.sum(dim=0), square + wide.T @ wide, count + len(x)
    name = f"{data.dataset} {split}, {pictures} pictures"
    if features:
        found, index = (torch.cat(column).clone() for column in zip(*rows, strict=True))
        if trainer:
            found = gather_samples(trainer, {"features": found, "index": index})["features"]
        return replace(Statistics.of(found, name), facts=extractor.facts)
    if world > 1 and trainer:
        total, square, count = (
            trainer.strategy.all_gather(v.clone()).reshape(world, *v.shape).sum(0) for v in (total, square, count)
        )
    mean = total / count
    return Statistics(mean, (square - count * mean.outer(mean)) / (count - 1), None, name, extractor.facts)


def _pictures(trainer: L.Trainer, split: str) -> Any:
    data: Any = getattr(trainer, "datamodule", None)
    if data is None or not hasattr(data, "eval_transform"):
        raise ZooError(f"reference: {split} wants a data module of pictures; name a file of statistics (.npz) instead")
    return data


class SampleGrid(L.Callback):
    """Draws the same samples again and again while a task trains, in one picture each time, and logs it.

    <run>/pictures/samples_stepNNNNNNN.png, and "samples" in TensorBoard. The samples are those of the averaged weights
    where an :class:`~zoo.training.EMA` evaluates. With classes, a row each for as many of them as there are rows.
    Also ends ``zoo predict RECIPE``.

    Args:
        count: samples.
        columns: pictures in a row; None: about square.
        every_n_epochs: draw after so many epochs; None: only at the end.
        every_n_steps: draw after so many optimiser steps, besides.
        batch_size: samples drawn at a time.
        classes: labels of the rows; None: the first classes there are.
        seed: of the noise.
        out: the folder; default <log folder of the run>/pictures.
    """

    def __init__(
        self,
        count: int = 64,
        columns: int | None = None,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        batch_size: int = 64,
        classes: list[int] | None = None,
        seed: int = 0,
        out: str | None = None,
    ) -> None:
        _at_least_one(
            count=count, columns=columns, every_n_epochs=every_n_epochs, every_n_steps=every_n_steps,
            batch_size=batch_size,
        )  # fmt: skip
        self.count, self.columns = count, columns or math.ceil(math.sqrt(count))
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.batch_size, self.classes, self.seed, self.out = batch_size, classes, seed, out
        self._drawn = -1  # the step of the last picture

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_samples(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps and step and step % self.every_n_steps == 0 and step != self._drawn:
            self.draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and trainer.global_step != self._drawn:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._drawn:
            self.draw(trainer, pl_module)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Path | None:
        """Draws and writes one picture; its path, on the first process. Call on every process."""
        from torchvision.io import write_png

        self._drawn = trainer.global_step
        folder = self.out or str(Path(trainer.log_dir or ".") / "pictures")  # log_dir is a collective call
        path = None
        if trainer.is_global_zero:
            with (
                evaluation_weights(trainer, pl_module),
                torch.inference_mode(),
                trainer.precision_plugin.forward_context(),
            ):
                sheet = self.sheet(pl_module, pl_module.device).cpu()
            path = Path(folder) / f"samples_step{trainer.global_step:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(sheet, str(path))
            for logger in trainer.loggers:
                add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
                if callable(add_image):
                    add_image("samples", sheet, trainer.global_step)
            print(f"picture: {path}", flush=True)
        trainer.strategy.barrier()
        return path

    def sheet(self, model: Any, device: torch.device | str) -> Tensor:
        """The uint8 picture (3, H, W) of a model's samples."""
        label = None
        if model.num_classes:
            rows = math.ceil(self.count / self.columns)
            classes = self.classes or [row % model.num_classes for row in range(rows)]
            if bad := [k for k in classes if not 0 <= k < model.num_classes]:
                raise ZooError(f"there is no class {bad[0]}: the model has {model.num_classes}")
            label = torch.tensor([classes[k // self.columns % len(classes)] for k in range(self.count)])
        parts = []
        for first in range(0, self.count, self.batch_size):
            indices = range(first, min(first + self.batch_size, self.count))
            mine = None if label is None else label[first : first + self.batch_size]
            parts.append(draw_samples(model, indices, device, self.seed, mine))
        return grid(torch.cat(parts), self.columns)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]


# Settings of sampling by name whose values are no plain numbers: what they are, and the test of one.
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "average": ("a name", lambda value: isinstance(value, str)),
    "interval": ("two times that rise, such as [0.1, 1.0]", _is_interval),
    "method": ("a name", lambda value: isinstance(value, str)),
    "steps": ("a whole number of 1 or more", lambda value: isinstance(value, int) and value is not True and value >= 1),
}


@dataclass(frozen=True)
class Sweep:
    """Settings of sampling to be compared: every combination of `values`, on so many `samples` each."""

    values: dict[str, list[Any]]
    samples: int = 5000

    @staticmethod
    def of(facts: Mapping[str, Any] | None) -> Sweep | None:
        """From ``{samples: 5000, NAME: [VALUE, ...], ...}``.

        Raises:
            ZooError: nothing to sweep over, a value that is no list, or no samples.
        """
        if facts is None:
            return None
        values = {name: value for name, value in facts.items() if name != "samples"}
        if not values:
            raise ZooError("a sweep wants lists of values by name, such as {guidance: [1, 2]}")
        for name, value in values.items():
            if not isinstance(value, list) or not value:
                raise ZooError(f"sweep: {name} wants a list of values, not {value!r}")
        samples = facts.get("samples", 5000)
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 2:
            raise ZooError(f"sweep: samples must be a number of 2 or more, not {samples!r}")
        return Sweep(values, samples)

    def check(self, model: Any, callbacks: Sequence[Any]) -> None:
        """Raises ZooError for a name that sampling does not know, a value of another kind than the setting's, or an
        average that is not there."""
        known = [*getattr(model, "sampling_options", ()), "average"]
        for name in self.values:
            if name not in known:
                raise unknown(f"sampling option of {type(model).__name__}", str(name), known)
        for name, values in self.values.items():
            what, fits = _VALUES.get(name, ("a number", _is_number))
            if odd := [value for value in values if not fits(value)]:
                raise ZooError(f"sweep: a value of {name} is {what}, not {odd[0]!r}")
        for name in self.values.get("average", ()):
            check_average(callbacks, name)

    def settings(self) -> list[dict[str, Any]]:
        """Every combination; the last name changes fastest."""
        return [dict(zip(self.values, row, strict=True)) for row in product(*self.values.values())]

    def lines(self, table: Sequence[Mapping[str, Any]], best: int) -> list[str]:
        """The table, its best row marked."""
        heads = list(table[0])
        rows = [heads, *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in table)]
        widths = [max(len(row[k]) for row in rows) for k in range(len(heads))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines[best + 1] += "  best"
        return [f"sweep, {self.samples} samples each:", *(f"  {line.rstrip()}" for line in lines)]


class SamplingEvaluation(L.Callback):
    """The field's protocol: so many samples, compared with real pictures, at the end of validation and of testing.

    Logs `val/fid` (or `test/fid`, ...), under the names of :class:`~zoo.metrics.generation.GenerationMetrics`: only
    features of Inception give a FID. The numbers are the same for any number of processes and any batch size.

    With a `sweep` (``zoo test RECIPE --sweep '{samples: 5000, guidance: [6, 7], average: [ema_500, ema_1000]}'``) every
    combination of the values is measured first, on fewer samples; the table is printed and kept as <run>/sweep.json and
    in result.json, and the evaluation proper samples with the best. `validate` and `test` sweep, training does not.

    Args:
        num_samples: 50,000 in the papers.
        metrics: of "fid", "is", "kid" and "precision_recall".
        extractor: "inception", "random", or an extractor.
        extractor_options: of the extractor by name, such as {resize: antialias} or {weights: FILE}.
        reference: an .npz of statistics (`mu` and `sigma`, or `ref_mu` and `ref_sigma`), for KID, precision and recall
            with `features` or ADM's pictures (`arr_0`); or a split of the run's data, "train" or "val", without
            augmentation.
        labels: "random", or "balanced", equally many of each class.
        rounding: of pictures to bytes, see :func:`~zoo.metrics.generation.to_uint8`.
        batch_size: samples drawn at a time on each device.
        every_n_epochs: during training, at the validation of every so many epochs only.
        val_samples: samples at a validation during training, where all of them would take too long; None: all.
        kid_subset_size: samples in a subset of the kernel distance.
        seed: of noises and labels.
        sweep: lists of values by name: of the task's `sampling_options`, and of `average`, the names of averages (or
            "raw"); `samples`, a number, is of each combination (5000). The first of `metrics` decides.
    """

    def __init__(
        self,
        num_samples: int = 50_000,
        metrics: Sequence[str] = ("fid",),
        extractor: str | Extractor = "inception",
        extractor_options: dict[str, Any] | None = None,
        reference: str = "train",
        labels: Labels = "random",
        rounding: Rounding = "adm",
        batch_size: int = 64,
        every_n_epochs: int = 1,
        val_samples: int | None = None,
        kid_subset_size: int = 1000,
        seed: int = 0,
        sweep: dict[str, Any] | None = None,
    ) -> None:
        _at_least_one(
            num_samples=num_samples, batch_size=batch_size, every_n_epochs=every_n_epochs, val_samples=val_samples
        )
        to_uint8(torch.zeros(1), rounding)
        labels_of([], 0, 1, labels=labels)
        self.num_samples, self.val_samples, self.every_n_epochs = num_samples, val_samples, every_n_epochs
        self.metrics, self.extractor, self.extractor_options = list(metrics), extractor, dict(extractor_options or {})
        self.reference, self.labels, self.rounding = reference, labels, rounding
        self.batch_size, self.kid_subset_size, self.seed = batch_size, kid_subset_size, seed
        self.sweep = Sweep.of(sweep)
        self.table: list[dict[str, Any]] = []  # of a sweep: its settings with their numbers
        self.best: dict[str, Any] = {}  # settings
        self._metric: GenerationMetrics | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_samples(pl_module)
        if self.sweep is not None:
            self.sweep.check(pl_module, trainer.callbacks)  # type: ignore[attr-defined]
        if stage in ("fit", "validate", "test") and self._metric is None:
            # Made here, so that missing weights are told before hours of training and not after them.
            extractor = make_extractor(self.extractor, **self.extractor_options)
            fixed = None
            if self.reference not in ("train", "val"):
                fixed = Statistics.read(self.reference)
                if self._wants_features and fixed.features is None and not has_pictures(self.reference):
                    raise ZooError(
                        f"KID, precision and recall want features or pictures of the reference; {self.reference} holds"
                        " statistics only"
                    )
            elif self.metrics != ["is"]:
                _pictures(trainer, self.reference)
            self._metric = GenerationMetrics(extractor, self.metrics, fixed, kid_subset_size=self.kid_subset_size)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        fitting = trainer.state.fn == "fit"
        if fitting and (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        count = self.val_samples if fitting and self.val_samples else self.num_samples
        self._log(trainer, pl_module, "val", count)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "test", self.num_samples)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str, count: int) -> None:
        if self.sweep is not None and trainer.state.fn != "fit":
            self.run_sweep(trainer, pl_module)
        for name, value in self.evaluate(trainer, pl_module, count, self.best).items():
            # A number, and the same on every process already.
            pl_module.log(f"{stage}/{name}", value.item(), prog_bar=True)

    def run_sweep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fills `table` and `best`, prints the table and writes it. Call on every process."""
        assert self.sweep is not None
        assert self._metric is not None
        first = {"precision_recall": "precision"}.get(self.metrics[0], self.metrics[0])
        name, better = self._metric.label(first), -1.0 if first in ("is", "precision") else 1.0
        settings = self.sweep.settings()
        self.table = []
        for k, setting in enumerate(settings):
            what = f"sweep {k + 1} of {len(settings)}: batch"
            found = self.evaluate(trainer, pl_module, self.sweep.samples, setting, what)
            self.table.append({**setting, **{key: value.item() for key, value in found.items()}})
        scores = [better * row[name] if math.isfinite(row[name]) else math.inf for row in self.table]
        at = scores.index(min(scores))
        self.best = settings[at]
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir is a collective call
        if trainer.is_global_zero:
            print("\n".join(self.sweep.lines(self.table, at)), flush=True)
            files.write_json(Path(folder) / "sweep.json", self.results()["sweep"])

    def results(self) -> dict[str, Any]:
        """What a result holds of a sweep beside the metrics."""
        if not self.table or self.sweep is None:
            return {}
        return {"sweep": {"samples": self.sweep.samples, "best": self.best, "table": self.table}}

    def evaluate(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        count: int,
        setting: Mapping[str, Any] | None = None,
        what: str = "evaluation by samples: batch",
    ) -> dict[str, Tensor]:
        """The metrics of `count` samples, the same on every process. Call on every process.

        Args:
            trainer, pl_module: what samples, and its data.
            count: samples.
            setting: of the task's `sampling_options`, and the name of an `average`, where not as the task says.
            what: told of the progress.
        """
        options = dict(setting or {})
        average = options.pop("average", None)
        from zoo.training.probe import told

        assert self._metric is not None
        if count < trainer.world_size:
            raise ZooError(f"{count} samples cannot be shared by {trainer.world_size} processes")
        metric = self._metric.to(pl_module.device)
        metric.reset()
        if metric.reference is None and self.metrics != ["is"]:
            data, whole = _pictures(trainer, self.reference), self._wants_features
            metric.reference = reference_statistics(
                data, self.reference, metric.extractor, metric.device, whole, trainer
            )
        elif metric.reference and self._wants_features and metric.reference.features is None:
            metric.reference = replace(metric.reference, features=self._features(read_pictures(self.reference)))
        with (
            evaluation_weights(trainer, pl_module, average),
            torch.inference_mode(),
            trainer.precision_plugin.forward_context(),
        ):
            shares = list(self._shares(count, trainer.global_rank, trainer.world_size))
            for indices in told(what, shares, trainer):
                label = labels_of(indices, pl_module.num_classes, count, self.seed, self.labels)  # type: ignore[arg-type]
                images = draw_samples(pl_module, indices, pl_module.device, self.seed, label, **options)
                metric.update(to_uint8(images.float(), self.rounding), torch.tensor(indices, device=pl_module.device))
        found = metric.compute()
        metric.reset()
        return found

    @property
    def _wants_features(self) -> bool:
        return not {"kid", "precision_recall"}.isdisjoint(self.metrics)

    def _features(self, pictures: Tensor) -> Tensor:
        assert self._metric is not None
        with torch.inference_mode():
            parts = [
                self._metric.extractor(part.to(self._metric.device))[0] for part in pictures.split(self.batch_size)
            ]
        return torch.cat(parts).clone()

    def _shares(self, count: int, rank: int, world: int) -> Iterator[list[int]]:
        mine = range(rank, count, world)
        for first in range(0, len(mine), self.batch_size):
            yield list(mine[first : first + self.batch_size])

    def protocol(self) -> dict[str, Any]:
        """What must agree for two numbers of this evaluation to be compared, but for the task itself."""
        facts: Mapping[str, Any] = self._metric.protocol() if self._metric else {"reference": self.reference}
        own = ("num_samples", "labels", "rounding", "seed")
        sampled = {"sampled_with": self.best} if self.best else {}
        noise = {"noise": "by (seed, number of the sample)"}
        return {**facts, **{name: getattr(self, name) for name in own}, **noise, **sampled}


def _at_least_one(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ZooError(f"{name} must be at least 1, not {value}")
