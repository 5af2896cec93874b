"""One data module for labelled pictures, whatever the source."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from zoo.data.loader import EpochSampler, ExactSampler, Key, TrainLoader
from zoo.data.shapes import hash64
from zoo.data.sources import ManyReader, Part, Source, describe, open_source
from zoo.data.transforms import EvalResizeCrop, ImageTransform
from zoo.errors import ZooError

_SALT = {"train": 0, "val": 1, "test": 2, "predict": 3}
_BLOCK = 1 << 18  # bytes of pictures normalised together
Batch = dict[str, Any]


@contextmanager
def _own_randomness(foreign: bool) -> Iterator[None]:
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


class SampleSet(Dataset):
    """A source with its transform, normalised and batched; a sample is a function of (seed, salt, epoch, index,
    repeat).

    Args:
        source: gives {"image": uint8 (3, H, W), "label": int}.
        transform: uint8 (3, H, W) -> uint8 (3, S, S), or a float picture that is left as it is; or a list
            of such views.
        mean, std: of the channels in units of the full range.
        seed: of the run.
        salt: keeps the randomness of several splits apart.
    """

    def __init__(
        self,
        source: Source,
        transform: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        salt: int = 0,
    ) -> None:
        self.source, self.transform, self.seed, self.salt = source, transform, seed, salt
        self._mean255, self._std255 = (255 * torch.tensor(x)[:, None, None] for x in (mean, std))
        ours = isinstance(transform, ImageTransform)
        self._random = bool(transform.random) if ours else True
        self._foreign = bool(transform.foreign_random) if ours else True

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | Key) -> Batch:
        batch = self.__getitems__([key])
        return {n: [view[0] for view in value] if n == "views" else value[0] for n, value in batch.items()}

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        """The batch {"image" float32 (B, 3, S, S), "label" (B,), "index" (B,)} of some keys; where the transform gives
        a list, {"views" list of (B, 3, S, S)} instead of the image."""
        full = np.array([(key, 0, 0) if isinstance(key, int) else key for key in keys], dtype=np.int64).reshape(-1, 3)
        index = full[:, 0]
        images: Sequence[Tensor] | Tensor
        if isinstance(self.source, ManyReader):
            many = self.source.read_many(index.tolist())
            images, label = many["image"], many["label"]
        else:
            rows = [self.source[i] for i in index.tolist()]
            images, label = [row["image"] for row in rows], torch.tensor([row["label"] for row in rows])
        seeds = hash64(self.seed, self.salt, full[:, 1], index, full[:, 2]).tolist() if self._random else []
        after = getattr(self.transform, "after_normalize", None)
        with _own_randomness(self._foreign):
            done = []
            for n, image in enumerate(images):
                if seeds:
                    torch.default_generator.manual_seed(seeds[n])
                    if self._foreign:
                        random.seed(seeds[n])
                        np.random.seed(seeds[n] & 0xFFFFFFFF)
                out = self.transform(image)
                done.append(after(self._normalize(out)) if after is not None else out)
        facts = {"label": label, "index": torch.from_numpy(index)}
        if done and isinstance(done[0], list | tuple):
            return {"views": [self._stacked(view) for view in zip(*done, strict=True)], **facts}
        return {"image": self._stacked(done), **facts}

    def _stacked(self, images: Sequence[Tensor]) -> Tensor:
        try:
            stacked = torch.stack(list(images))
        except RuntimeError as error:
            shapes = sorted({"x".join(map(str, tuple(d.shape))) for d in images})
            raise ZooError(
                f"the transform leaves pictures of different sizes in a batch: {', '.join(shapes[:3])}"
            ) from error
        return self._normalize(stacked)

    def _normalize(self, image: Tensor) -> Tensor:
        if image.dtype != torch.uint8:
            return image
        out = torch.empty(image.shape, dtype=torch.float32)
        # A few pictures at a time, all steps while they lie in the cache.
        some = max(1, _BLOCK // max(1, image[0].numel())) if image.ndim == 4 else 3
        for to, block in zip(out.split(some), image.split(some), strict=True):
            to.copy_(block).sub_(self._mean255).div_(self._std255)
        return out


def _same(batch: Batch) -> Batch:
    return batch  # SampleSet has batched already


class ImageDataModule(LightningDataModule):
    """Labelled pictures for training and evaluation. Batches: image (B, 3, S, S) float32, label (B,), index (B,) int64;
    under a transform that gives a list, `views`, a list of such images, instead of image.

    Two runs with the same seed see the same samples, augmented the same way, in the same order, whatever the workers,
    and a run resumed anywhere goes on as if it had not stopped. Evaluation covers each sample once on any number of
    devices.

    Args:
        dataset: a card's name (``zoo list datasets``), a folder, or ``hf://org/name``; see :mod:`zoo.data.sources`.
        data_dir: where a carded set lies on this machine; without it the hub is asked.
        batch_size: per device.
        eval_batch_size: per device; None: as `batch_size`.
        image_size: side in pixels; None: the card's.
        train_transform: on uint8 (3, H, W); None: resize and crop the middle. ``size=None`` in it takes `image_size`.
        eval_transform: likewise, for val, test and predict.
        num_workers: loading processes; None: none for sets in memory, else what the machine's cores allow.
        train_samples: train on this many samples only, drawn once with the seed; for ``shapes`` the split's length.
        repeats: repeated augmentation: how often in a row a sample comes.
        seed: of order and augmentation; None: the one of ``seed_everything``, else 0.
        options: further keywords of the source, such as the difficulty knobs of ``shapes``.
        mean, std: of the channels, instead of the card's.

    Attributes:
        num_classes, class_names, image_size, mean, std: known as soon as the module is made.

    Raises:
        ZooError: an unknown data set or option, a missing folder, a size or count that makes no sense.
    """

    # Where there are more devices than samples, some have nothing to evaluate.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        dataset: str = "shapes",
        data_dir: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        image_size: int | None = None,
        train_transform: nn.Module | None = None,
        eval_transform: nn.Module | None = None,
        num_workers: int | None = None,
        train_samples: int | None = None,
        repeats: int = 1,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        counts = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "image_size": image_size}
        counts |= {"train_samples": train_samples, "repeats": repeats}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ZooError(f"data.{name} must be at least 1, got {value}")
        self.dataset, self.data_dir, self.options = dataset, data_dir, dict(options or {})
        about = describe(dataset, data_dir, **self.options)
        self.num_classes, self.class_names = about.num_classes, about.class_names
        self.image_size = image_size or about.image_size
        self.mean, self.std = tuple(mean or about.mean), tuple(std or about.std)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ZooError(f"mean and std need three numbers each, std positive; got {self.mean} and {self.std}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.train_samples, self.repeats = train_samples, repeats
        self._seed, self._num_workers, self._in_memory = seed, num_workers, about.in_memory
        self.train_transform = self._bound(train_transform)
        self.eval_transform = self._bound(eval_transform)
        self._sources: dict[str, Source] = {}

    def _bound(self, transform: nn.Module | None) -> nn.Module:
        transform = EvalResizeCrop(crop_pct=1.0) if transform is None else transform
        for part in transform.modules() if isinstance(transform, nn.Module) else ():
            if isinstance(part, ImageTransform):
                part.bind(self.image_size, self.mean)
        return transform

    # -------------------------------------------------------------------------------------------------- the machine

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

    # -------------------------------------------------------------------------------------------------- the pictures

    def source(self, split: str) -> Source:
        """The pictures behind a split ("train", "val", "test", "predict"), before any transform; opened once."""
        if split not in self._sources:
            options = dict(self.options)
            if self.dataset == "shapes":
                options = {"size": self.image_size, "length": self.train_samples, **options}
            source = open_source(self.dataset, split, self.data_dir, **options)
            if split == "train" and self.train_samples is not None and self.dataset != "shapes":
                if self.train_samples > len(source):
                    raise ZooError(f"train_samples is {self.train_samples}, but {self.dataset} has {len(source)}")
                generator = torch.Generator().manual_seed(int(hash64(self.seed, 1 << 32)[0]))
                chosen = torch.randperm(len(source), generator=generator)[: self.train_samples]
                source = Part(source, chosen.sort().values)
            self._sources[split] = source
        return self._sources[split]

    def samples(self, split: str, train_transform: bool | None = None) -> SampleSet:
        """The transformed split; `train_transform` chooses between the two transforms, by default as the split asks."""
        use_train = split == "train" if train_transform is None else train_transform
        transform = self.train_transform if use_train else self.eval_transform
        return SampleSet(self.source(split), transform, self.mean, self.std, self.seed, _SALT[split])

    def prepare_data(self) -> None:
        """Download a set of the hub, in one process a node."""
        local = self.dataset == "shapes" or self.data_dir is not None or Path(self.dataset).expanduser().exists()
        if not local:
            open_source(self.dataset, "predict", **self.options)

    def _loader_options(self, samples: SampleSet) -> dict[str, Any]:
        workers = min(self.num_workers, max(1, len(samples)))
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": on_gpu,
            "collate_fn": _same,
        }

    def train_dataloader(self) -> TrainLoader:
        """Shuffled, augmented, equally long on all devices; an incomplete last batch is dropped."""
        samples = self.samples("train")
        sampler = EpochSampler(len(samples), self.seed, self.repeats, **self._place())
        if not len(sampler):
            raise ZooError(
                f"{self.dataset}: {len(samples)} training samples are too few for {sampler.num_replicas} devices"
            )
        return TrainLoader(
            samples,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
            **self._loader_options(samples),
        )

    def _eval_loader(self, split: str) -> DataLoader:
        samples = self.samples(split)
        sampler = ExactSampler(len(samples), **self._place())
        return DataLoader(samples, batch_size=self.eval_batch_size, sampler=sampler, **self._loader_options(samples))

    def val_dataloader(self) -> DataLoader:
        """Each validation sample once."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Each test sample once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The test split, or all of a set without splits (a folder of pictures)."""
        return self._eval_loader("predict")
