"""What every data module of the zoo shares: order and randomness from seeds, exact evaluation, resumable training."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.loader import EpochSampler, EvalLoader, ExactSampler, Key, TrainLoader
from zoo.data.shapes import hash64
from zoo.errors import ZooError

SALT = {"train": 0, "val": 1, "test": 2, "predict": 3}
Batch = dict[str, Any]


@contextmanager
def own_randomness(foreign: bool) -> Iterator[None]:
    """Give the global generators back as they were: what data loading draws must not move what training draws."""
    state = torch.default_generator.get_state()
    python, numpy = (random.getstate(), np.random.get_state()) if foreign else (None, None)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
        if python is not None and numpy is not None:
            random.setstate(python)
            np.random.set_state(numpy)


def key_parts(keys: Sequence[int | Key]) -> np.ndarray:
    """(B, 3) int64: index, epoch and repetition of each key; a bare index is of epoch 0."""
    full = [(key, 0, 0) if isinstance(key, int) else key for key in keys]
    return np.array(full, dtype=np.int64).reshape(-1, 3)


def sample_seeds(seed: int, salt: int, parts: np.ndarray) -> list[int]:
    """A 64-bit seed for what is drawn at random about each sample: a function of (seed, salt, epoch, index,
    repetition) alone. `parts` as :func:`key_parts` gives them; `salt` keeps splits apart (:data:`SALT`)."""
    return hash64(seed, salt, parts[:, 1], parts[:, 0], parts[:, 2]).tolist()


def same(batch: Batch) -> Batch:
    """The collation of sets that give whole batches."""
    return batch


def as_batch(batch: Any, *wanted: str) -> Batch:
    """A batch as the tasks of the zoo read it: a dict with the keys `wanted`. A pair (image, label), which data sets of
    torchvision give, becomes one.

    Raises:
        ZooError: it is neither, or keys are missing; it names those that are there.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        image, label = batch
        if image.ndim == 4 and label.ndim in (1, 2) and len(label) == len(image):
            batch = {"image": image, "label": label}
    if not isinstance(batch, dict):
        kind = type(batch).__name__
        raise ZooError(f"a batch is a dict with the keys {', '.join(wanted)}, or a pair (image, label); got a {kind}")
    if missing := [key for key in wanted if key not in batch]:
        raise ZooError(f"a batch has no {', '.join(missing)}; its keys are: {', '.join(map(str, batch)) or 'none'}")
    return batch


def at_least_one(**counts: int | None) -> None:
    """Raises a :class:`ZooError` that names the first of the settings of ``data`` below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ZooError(f"data.{name} must be at least 1, got {value}")


class SeededDataModule(LightningDataModule):
    """Loaders over sets whose samples are functions of (seed, split, epoch, index, repetition).

    A subclass gives :meth:`samples`; its sets take keys (an index, or an :data:`~zoo.data.loader.Key`) in
    ``__getitems__`` and return a whole batch, a dict. Two runs with the same seed then see the same samples, changed
    the same way, in the same order, whatever the workers; a run resumed anywhere goes on as if it had not stopped; and
    evaluation covers each sample once on any number of devices.

    Args:
        batch_size: per device.
        eval_batch_size: per device; None: as `batch_size`.
        num_workers: loading processes; None: none for sets in memory, else what the machine's cores allow.
        repeats: repeated augmentation: how often in a row a sample comes.
        seed: of order and augmentation; None: the one of ``seed_everything``, else 0.
        in_memory: whether samples cost next to nothing to read.
    """

    dataset: str
    train_loader: type[TrainLoader] = TrainLoader
    eval_loader: type[DataLoader] = EvalLoader

    # Where there are more devices than samples, some have nothing to evaluate.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        repeats: int = 1,
        seed: int | None = None,
        in_memory: bool = False,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        at_least_one(batch_size=batch_size, eval_batch_size=eval_batch_size, repeats=repeats)
        most = max(64, 8 * (os.cpu_count() or 1))
        if num_workers is not None and not 0 <= num_workers <= most:
            raise ZooError(f"num_workers: 0 to {most} loader processes on this machine, got {num_workers}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.repeats, self._seed, self._num_workers, self._in_memory = repeats, seed, num_workers, in_memory

    def __str__(self) -> str:
        """Its name and set: Lightning's own text would make all the loaders."""
        return f"{type(self).__name__}({self.dataset})"

    def facts(self) -> dict[str, Any]:
        """What is to be known of the data beside weights that were trained on them, in plain types: the names of the
        "classes" in order (None where there are none), how evaluation prepares a sample ("preprocess": of
        :meth:`preprocess_facts`), and the "data": {"module", "dataset", "data_dir", "num_classes", "sha256" of what
        ``zoo data check`` found}."""
        from zoo.data.check import checked_hash

        folder = getattr(self, "data_dir", None)
        data = {
            "module": f"{type(self).__module__}.{type(self).__qualname__}",
            "dataset": str(self.dataset),
            "data_dir": None if folder is None else str(folder),
            "num_classes": getattr(self, "num_classes", None),
            "sha256": checked_hash(str(self.dataset), folder),
        }
        names = [str(name) for name in getattr(self, "class_names", None) or []]
        return {"classes": names or None, "preprocess": self.preprocess_facts(), "data": data}

    def preprocess_facts(self) -> dict[str, Any] | None:
        """How evaluation prepares a sample, in the words of :class:`zoo.catalog.Preprocess` as far as they go; `kind`
        says of what: "image", "objects", "clip" or "grid". None where nothing is known."""
        return None

    def samples(self, split: str) -> Dataset:
        """The transformed split: "train", "val", "test" or "predict"."""
        raise NotImplementedError

    @property
    def seed(self) -> int:
        """What order and augmentation start from."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed

    @property
    def num_workers(self) -> int:
        """Loading processes of each loader on each device."""
        if self._num_workers is not None:
            return self._num_workers
        if self._in_memory:
            return 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = self.trainer.num_devices if self.trainer is not None else 1
        return min(8, max(0 if cores == 1 else 1, cores // devices - 1))

    def _place(self) -> dict[str, int]:
        """This process's rank and the number of processes."""
        if self.trainer is not None:
            return {"rank": self.trainer.global_rank, "world": self.trainer.world_size}
        return {"rank": 0, "world": 1}

    def _loader_options(self, samples: Any) -> dict[str, Any]:
        workers = min(self.num_workers, max(1, len(samples)))
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": on_gpu,
            "collate_fn": same,
        }

    def drawn_part(self, length: int, count: int) -> Tensor:
        """(count,) int64, rising: `count` of `length` training samples, drawn once with the seed.

        Raises:
            ZooError: there are fewer.
        """
        if count > length:
            raise ZooError(f"train_samples is {count}, but {self.dataset} has {length}")
        generator = torch.Generator().manual_seed(int(hash64(self.seed, 1 << 32)[0]))
        return torch.randperm(length, generator=generator)[:count].sort().values

    def train_sampler(self, samples: Any) -> EpochSampler:
        """The order of training on this rank."""
        return EpochSampler(len(samples), self.seed, self.repeats, **self._place())

    def train_dataloader(self) -> TrainLoader:
        """Shuffled, augmented, equally long on all devices; an incomplete last batch is dropped."""
        samples: Any = self.samples("train")
        sampler = self.train_sampler(samples)
        if not len(sampler):
            raise ZooError(
                f"{self.dataset}: {len(samples)} training samples are too few for {sampler.num_replicas} devices"
            )
        return self.train_loader(
            samples,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
            **self._loader_options(samples),
        )

    def _eval_loader(self, split: str) -> DataLoader:
        samples: Any = self.samples(split)
        # The trainer limits the batches of each process; here all of them together get what one process would.
        limit = getattr(self.trainer, f"limit_{split}_batches", None)
        count = min(len(samples), limit * self.eval_batch_size) if limit and isinstance(limit, int) else len(samples)
        sampler = ExactSampler(count, **self._place())
        options = self._loader_options(samples)
        return self.eval_loader(samples, batch_size=self.eval_batch_size, sampler=sampler, **options)

    def val_dataloader(self) -> DataLoader:
        """Each validation sample once."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Each test sample once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The test split, or all of a set without splits (a folder of pictures)."""
        return self._eval_loader("predict")
