"""One data module for labelled pictures, whatever the source."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.data import batches
from zoo.data.base import SALT, Batch, SeededDataModule, at_least_one, key_parts, own_randomness, sample_seeds
from zoo.data.loader import Key
from zoo.data.memory import SMALL, hold
from zoo.data.sources import Description, ManyReader, Part, Source, describe, file_of, open_source
from zoo.data.transforms import EvalResizeCrop, ImageTransform
from zoo.errors import ZooError

_BLOCK = 1 << 18  # bytes of pictures normalised together
_TOGETHER = 1 << 20  # bytes of pictures augmented together


class SampleSet(Dataset):
    """A source with its transform, normalised and batched; a sample is a function of (seed, salt, epoch, index,
    repeat), whatever else is in its batch.

    Where the source reads many small pictures in one go and the transform is one of ours that changes many, they are
    changed together; else one by one. The law is the same, the draws are others.

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

    def name(self, index: int) -> str | None:
        """The file of a sample, where it has one."""
        return file_of(self.source, index)

    def __getitem__(self, key: int | Key) -> Batch:
        batch = self.__getitems__([key])
        return {n: [view[0] for view in value] if n == "views" else value[0] for n, value in batch.items()}

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        """The batch {"image" float32 (B, 3, S, S), "label" (B,), "index" (B,)} of some keys; where the transform gives
        a list, {"views" list of (B, 3, S, S)} instead of the image."""
        parts = key_parts(keys)
        index = parts[:, 0]
        images, facts = self._read(index.tolist())
        facts["index"] = torch.from_numpy(index)
        done: Any = self._together(images, parts)
        if isinstance(done, list):
            return {"views": [self._normalize(view) for view in done], **facts}
        if done is not None:
            return {"image": self._normalize(done), **facts}
        seeds = sample_seeds(self.seed, self.salt, parts) if self._random else []
        after = getattr(self.transform, "after_normalize", None)
        with own_randomness(self._foreign):
            done = []
            for n, image in enumerate(images):
                if seeds:
                    torch.default_generator.manual_seed(seeds[n])
                    if self._foreign:
                        random.seed(seeds[n])
                        np.random.seed(seeds[n] & 0xFFFFFFFF)
                out = self.transform(image)
                done.append(after(self._normalize(out)) if after is not None else out)
        if done and isinstance(done[0], list | tuple):
            return {"views": [self._stacked(view) for view in zip(*done, strict=True)], **facts}
        return {"image": self._stacked(done), **facts}

    def _together(self, images: Sequence[Tensor] | Tensor, parts: np.ndarray) -> Tensor | list[Tensor] | None:
        """All pictures changed in one go, or None where they go one by one."""
        transform = self.transform
        if not isinstance(images, Tensor) or max(images.shape[-2:]) > SMALL:
            return None
        if not isinstance(transform, ImageTransform) or transform.draws is None:
            return None
        draws = batches.uniforms(self.seed, self.salt, parts, transform.draws)
        some = max(1, _TOGETHER // images[0].numel())
        done = [transform.batch(*block) for block in zip(images.split(some), draws.split(some), strict=True)]
        if isinstance(done[0], list):
            return [torch.cat(view) for view in zip(*done, strict=True)]
        return torch.cat(done)  # type: ignore[arg-type]

    def _read(self, index: Sequence[int]) -> tuple[Sequence[Tensor] | Tensor, Batch]:
        """The pictures of some samples, and what else the batch says of them."""
        if isinstance(self.source, ManyReader):
            many = self.source.read_many(index)
            return many["image"], {"label": many["label"]}
        rows = [self.source[i] for i in index]
        return [row["image"] for row in rows], {"label": torch.tensor([row["label"] for row in rows])}

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


class ImageDataModule(SeededDataModule):
    """Labelled pictures for training and evaluation. Batches: image (B, 3, S, S) float32, label (B,), index (B,) int64;
    under a transform that gives a list, `views`, a list of such images, instead of image.

    Order, randomness, resuming and evaluation are :class:`~zoo.data.base.SeededDataModule`'s. Pictures of one size up
    to 64 pixels are kept in memory as bytes (decoded at the start, up to 1 GiB a split) and changed a whole batch at a
    time by those of our transforms that can (:class:`~zoo.data.transforms.ImageTransform`).

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
        at_least_one(batch_size=batch_size, image_size=image_size, train_samples=train_samples)
        about = self._describe(dataset, data_dir, dict(options or {}))
        super().__init__(batch_size, eval_batch_size, num_workers, repeats, seed, about.in_memory)
        self.dataset, self.data_dir, self.options = dataset, data_dir, dict(options or {})
        self.num_classes, self.class_names = about.num_classes, about.class_names
        self.image_size = image_size or about.image_size
        self.mean, self.std = tuple(mean or about.mean), tuple(std or about.std)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ZooError(f"mean and std need three numbers each, std positive; got {self.mean} and {self.std}")
        self.train_samples = train_samples
        self.train_transform = self._bound(train_transform)
        self.eval_transform = self._bound(eval_transform)
        self._sources: dict[str, Source] = {}
        self._held: dict[str, Source] = {}

    def preprocess_facts(self) -> dict[str, Any]:
        """Those of the evaluation transform; of one that is not the zoo's, its `transform` by name."""
        transform = self.eval_transform
        facts = transform.facts() if isinstance(transform, ImageTransform) else None
        kind = type(transform)
        facts = facts or {"size": self.image_size, "transform": f"{kind.__module__}.{kind.__qualname__}"}
        return {"kind": "image", **facts, "mean": list(self.mean), "std": list(self.std), "channels": "rgb"}

    def _describe(self, dataset: str, data_dir: str | None, options: dict[str, Any]) -> Description:
        return describe(dataset, data_dir, **options)

    def _open(self, split: str, **options: Any) -> Source:
        return open_source(self.dataset, split, self.data_dir, **options)

    def _bound(self, transform: nn.Module | None) -> nn.Module:
        transform = EvalResizeCrop(crop_pct=1.0) if transform is None else transform
        for part in transform.modules() if isinstance(transform, nn.Module) else ():
            if isinstance(part, ImageTransform):
                part.bind(self.image_size, self.mean)
        return transform

    def source(self, split: str) -> Source:
        """The pictures behind a split ("train", "val", "test", "predict"), before any transform; opened once."""
        if split not in self._sources:
            options = dict(self.options)
            if self.dataset == "shapes":
                options = {"size": self.image_size, "length": self.train_samples, **options}
            source = self._open(split, **options)
            if split == "train" and self.train_samples is not None and self.dataset != "shapes":
                source = Part(source, self.drawn_part(len(source), self.train_samples))
            self._sources[split] = source
        return self._sources[split]

    def held(self, split: str) -> Source:
        """:meth:`source`, in memory where its pictures are small; then no loading processes are needed."""
        if split not in self._held:
            source = self.source(split)
            self._held[split] = hold(source)
            self._in_memory |= self._held[split] is not source
        return self._held[split]

    def samples(self, split: str, train_transform: bool | None = None) -> SampleSet:
        """The transformed split; `train_transform` chooses between the two transforms, by default as the split asks."""
        use_train = split == "train" if train_transform is None else train_transform
        transform = self.train_transform if use_train else self.eval_transform
        return SampleSet(self.held(split), transform, self.mean, self.std, self.seed, SALT[split])

    def prepare_data(self) -> None:
        """Download a set of the hub, in one process a node."""
        local = self.dataset == "shapes" or self.data_dir is not None or Path(self.dataset).expanduser().exists()
        if not local:
            self._open("predict", **self.options)
