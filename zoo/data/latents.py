"""Latents computed once and kept: a folder of safetensors shards, what makes it, and the data module that reads it.

    zoo data latents imagenet1k --data_dir /data/imagenet --autoencoder sd_vae.ft_mse --image_size 256 -o latents

A folder holds ``latents.json``, which says what the latents are, and for each split ``<split>-NNNNN.safetensors``:

    mean, std   (n, views, C, h, w)   moments of each picture and, where there are two views, of its mirror image
    label       (n,) int64

Moments are those of the autoencoder, not scaled; :class:`LatentDataModule` draws a latent afresh each time a sample
comes, and scales it. Samples are read where they lie: a shard is never loaded as a whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.base import SALT, Batch, SeededDataModule, at_least_one, key_parts, sample_seeds
from zoo.data.datamodule import ImageDataModule
from zoo.data.files import read_json
from zoo.data.loader import Key
from zoo.data.transforms import ADMCrop
from zoo.errors import ZooError

FACTS = "latents.json"
VERSION = 1
SPLITS = ("train", "val", "test")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# What must agree for a half-made folder to be gone on with.
_KIND = ("version", "dataset", "autoencoder", "scale", "image_size", "shape", "views", "dtype", "shard_size")


# --------------------------------------------------------------------------------------------------------------- making


def cache_latents(
    dataset: str,
    out: str | Path,
    autoencoder: str,
    image_size: int,
    data_dir: str | None = None,
    splits: Sequence[str] = ("train",),
    mirrored: bool = True,
    dtype: str = "float32",
    scale: float | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    shard_size: int = 4096,
    part: tuple[int, int] = (0, 1),
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Encodes the pictures of a data set, cropped as :class:`~zoo.data.transforms.ADMCrop` does, into the folder `out`.

    Shards that are there already are left, so that a call goes on where another was stopped.

    Args:
        dataset, data_dir, options: as in :class:`~zoo.data.ImageDataModule`.
        autoencoder, scale: as in :func:`zoo.nn.autoencoder.load_autoencoder`.
        image_size: side of the pictures in pixels.
        splits: of "train", "val" and "test".
        mirrored: keep the moments of each picture's mirror image too.
        dtype: of the moments.
        device: where to encode.
        batch_size: pictures encoded at a time.
        shard_size: samples in a file.
        part: (k, n) makes every n-th shard only, from the k-th on: for n devices at once.

    Returns:
        The content of ``latents.json``.

    Raises:
        ZooError: the folder holds other latents, or something cannot be read or written.
    """
    from zoo.nn.autoencoder import FrozenAutoencoder

    at_least_one(image_size=image_size, batch_size=batch_size, shard_size=shard_size)
    if dtype not in DTYPES:
        raise ZooError(f"latents are kept as {', '.join(DTYPES)}, not {dtype!r}")
    if not 0 <= part[0] < part[1]:
        raise ZooError(f"part {part[0]}/{part[1]} makes no sense: count from 0")
    if wrong := [split for split in splits if split not in SPLITS]:
        raise ZooError(f"latents are made of the splits {', '.join(SPLITS)}, not {wrong[0]!r}")
    half = [0.5, 0.5, 0.5]
    data = ImageDataModule(
        dataset, data_dir, batch_size, image_size=image_size, eval_transform=ADMCrop(), mean=half, std=half,
        options=options,
    )  # fmt: skip
    frozen = FrozenAutoencoder(autoencoder, scale, batch_size)
    net = frozen.net(torch.device(device))
    side = image_size // net.factor
    folder = Path(out).expanduser()
    facts: dict[str, Any] = {
        "version": VERSION,
        "dataset": dataset,
        "autoencoder": autoencoder,
        "scale": net.scale,
        "image_size": image_size,
        "shape": [net.channels, side, side],
        "views": 2 if mirrored else 1,
        "dtype": dtype,
        "shard_size": shard_size,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "splits": {split: len(data.source(split)) for split in splits},
    }
    facts = _agree(folder, facts)
    for split in splits:
        samples = data.samples(split, train_transform=False)
        for number, first in list(enumerate(range(0, len(samples), shard_size)))[part[0] :: part[1]]:
            path = folder / _shard(split, number)
            if not path.exists():
                _write(
                    path, _encode(samples, range(first, min(first + shard_size, len(samples))), frozen, facts, device)
                )
    return facts


def _agree(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes the facts of a folder, joined with those of its other splits."""
    from zoo.weights.download import lock, replacing

    with lock(folder / FACTS):
        if (folder / FACTS).is_file():
            known = read_facts(folder)
            for key in _KIND:
                if known[key] != facts[key]:
                    raise ZooError(
                        f"{folder} holds other latents: {key} is {known[key]} there and {facts[key]} here; take another"
                        " folder"
                    )
            facts["splits"] = {**known["splits"], **facts["splits"]}
        with replacing(folder / FACTS) as file:
            file.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _encode(samples: Any, indices: range, frozen: Any, facts: dict[str, Any], device: Any) -> dict[str, Tensor]:
    dtype = DTYPES[facts["dtype"]]
    rows: dict[str, list[Tensor]] = {"mean": [], "std": [], "label": []}
    for first in range(0, len(indices), frozen.batch_size):
        batch = samples.__getitems__(list(indices[first : first + frozen.batch_size]))
        images = batch["image"].to(device)
        views = [images, images.flip(-1)][: facts["views"]]
        moments = [frozen.encode(view) for view in views]
        for name, of_views in zip(("mean", "std"), zip(*moments, strict=True), strict=True):
            rows[name].append(torch.stack(of_views, dim=1).to("cpu", dtype))
        rows["label"].append(batch["label"])
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    from zoo.weights.download import replacing

    with replacing(path) as file:
        save_file(tensors, file)


# -------------------------------------------------------------------------------------------------------------- reading


def _shard(split: str, number: int) -> str:
    return f"{split}-{number:05d}.safetensors"


def read_facts(folder: Path) -> dict[str, Any]:
    """``latents.json`` of a folder of latents.

    Raises:
        ZooError: there is none, or it is of another version.
    """
    if not (folder / FACTS).is_file():
        raise ZooError(f"{folder} is no folder of latents: no {FACTS} (zoo data latents makes one)")
    facts = read_json(folder / FACTS)
    wanted = {*_KIND, "num_classes", "class_names", "splits"}
    if not isinstance(facts, dict) or facts.get("version") != VERSION or not wanted <= set(facts):
        raise ZooError(f"{folder / FACTS} is of another version: make the latents anew with zoo data latents")
    counts = [facts["shard_size"], *facts["splits"].values()] if isinstance(facts["splits"], dict) else [None]
    shape = facts["shape"] if isinstance(facts["shape"], list) and len(facts["shape"]) == 3 else [None]
    if (
        not all(isinstance(number, int) and 0 < number < 1 << 40 for number in (*counts, *shape))
        or max(shape) > 1 << 14
    ):
        raise ZooError(f"{folder / FACTS} states no whole numbers of samples, and no shape of latents")
    return facts


@lru_cache(maxsize=4096)
def _open(path: str) -> Any:
    """A shard, mapped into memory; nothing of it is read yet."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path}: not a whole shard of latents ({str(error).splitlines()[0]})") from error


class LatentSource:
    """The moments of a split, in stored order.

    Args:
        folder: of latents.
        split: "train", "val" or "test".

    Raises:
        ZooError: the folder does not have the split, or not all of its shards.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.facts = read_facts(folder)
        if split not in self.facts["splits"]:
            raise ZooError(f"{folder} has no latents of {split}; it has {', '.join(self.facts['splits'])}")
        self.length: int = self.facts["splits"][split]
        self.shard_size: int = self.facts["shard_size"]
        self.paths = [str(folder / _shard(split, n)) for n in range(math.ceil(self.length / self.shard_size))]
        if missing := [path for path in self.paths if not Path(path).is_file()]:
            raise ZooError(
                f"{len(missing)} of {len(self.paths)} shards are missing ({missing[0]}); zoo data latents goes on where"
                " it stopped"
            )

    def __len__(self) -> int:
        return self.length

    def read(self, index: np.ndarray, view: np.ndarray) -> dict[str, Tensor]:
        """{"mean" (B, C, h, w), "std", "label" (B,)} of samples `index` (B,) in their views (B,): 0 as they are, 1
        mirrored."""
        rows: dict[str, list[Tensor]] = {"mean": [], "std": [], "label": []}
        for number, place, side in zip(index // self.shard_size, index % self.shard_size, view, strict=True):
            shard = _open(self.paths[number])
            at, look = int(place), int(side)
            for name in ("mean", "std"):
                rows[name].append(shard.get_slice(name)[at : at + 1, look : look + 1][0, 0].float())
            rows["label"].append(shard.get_slice("label")[at : at + 1][0])
        return {name: torch.stack(parts) for name, parts in rows.items()}


class _Latents(Dataset):
    """Latents as a model sees them: drawn from their moments, and scaled."""

    def __init__(self, source: LatentSource, indices: np.ndarray, flip: bool, seed: int, salt: int) -> None:
        self.source, self.indices, self.flip, self.seed, self.salt = source, indices, flip, seed, salt
        self.scale: float = source.facts["scale"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        """{"image" float32 (B, C, h, w), "label" (B,), "index" (B,)} of some keys."""
        parts = key_parts(keys)
        index = parts[:, 0]
        noise, view = [], np.zeros(len(parts), dtype=np.int64)
        generator = torch.Generator()
        for n, seed in enumerate(sample_seeds(self.seed, self.salt, parts)):
            generator.manual_seed(seed)
            if self.flip:
                view[n] = int(torch.randint(2, (), generator=generator))
            noise.append(torch.randn(*self.source.facts["shape"], generator=generator, dtype=torch.float32))
        moments = self.source.read(self.indices[index], view)
        latents = (moments["mean"] + moments["std"] * torch.stack(noise)) * self.scale
        return {"image": latents, "label": moments["label"], "index": torch.from_numpy(index)}

    def __getitem__(self, key: int | Key) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}


class LatentDataModule(SeededDataModule):
    """Latents of a folder that ``zoo data latents`` made. Batches: image float32 (B, C, h, w), drawn afresh from the
    posterior and scaled; label (B,), index (B,) int64.

    A split that the folder lacks is, for evaluation, the training split.

    Args:
        dataset: the folder.
        batch_size: per device.
        eval_batch_size: per device; None: as `batch_size`.
        image_size: side of the latents, and
        num_classes: of the labels: what a recipe says of them before they are made; the folder must agree.
        mirrored: train on mirror images too, half of the time; the folder must hold them.
        num_workers: loading processes; None: what the machine's cores allow.
        train_samples: train on this many samples only, drawn once with the seed.
        seed: of order and draws; None: the one of ``seed_everything``, else 0.

    Attributes:
        class_names: of the labels; none before the latents are made.

    Raises:
        ZooError: no such folder where its sizes are not stated, or one that does not agree.
    """

    def __init__(
        self,
        dataset: str,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        image_size: int | None = None,
        num_classes: int | None = None,
        mirrored: bool = True,
        num_workers: int | None = None,
        train_samples: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, 1, seed)
        at_least_one(train_samples=train_samples, image_size=image_size)
        self.dataset, self.folder = dataset, Path(dataset).expanduser()
        self.mirrored, self.train_samples = mirrored, train_samples
        self.class_names: list[str] = []
        if image_size is None or num_classes is None or (self.folder / FACTS).is_file():
            facts = read_facts(self.folder)
            if mirrored and facts["views"] < 2:
                raise ZooError(f"{dataset} holds no mirror images: set data.mirrored to false, or make them anew")
            for name, stated, there in (
                ("image_size", image_size, facts["shape"][-1]),
                ("num_classes", num_classes, facts["num_classes"]),
            ):
                if stated not in (None, there):
                    raise ZooError(f"{dataset}: {name} of the latents is {there}, not {stated}")
            image_size, num_classes, self.class_names = facts["shape"][-1], facts["num_classes"], facts["class_names"]
        self.image_size, self.num_classes = image_size, num_classes

    def source(self, split: str) -> LatentSource:
        """The moments behind a split."""
        known = read_facts(self.folder)["splits"]
        name = "test" if split == "predict" else split
        return LatentSource(self.folder, name if name in known or split == "train" else "train")

    def samples(self, split: str) -> Dataset:
        source = self.source(split)
        indices = np.arange(len(source))
        if split == "train" and self.train_samples is not None:
            indices = self.drawn_part(len(source), self.train_samples).numpy()
        return _Latents(source, indices, self.mirrored and split == "train", self.seed, SALT[split])
