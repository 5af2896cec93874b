"""Pictures that shake: clips with two things to name, what is seen and how fast it moves.

Each picture moves on a small circle, and the frequency lies in one of several bands. Between frames that stand 1 /
`width` apart, a band of that `width` covers a whole turn: with the random phase, all bands look alike to whoever sees
only those. (With 28 frames and bands 1/9 turns wide these are frames 0, 9, 18 and 27: the ones that the Slow pathway of
SlowFast takes at alpha 7.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.base import SALT, Batch, key_parts
from zoo.data.datamodule import ImageDataModule, SampleSet
from zoo.data.loader import Key
from zoo.data.shapes import hash64
from zoo.errors import ZooError

_DRAWS = 1 << 40  # keeps these draws apart from those of the augmentation


def shake(images: Tensor, frequency: Tensor, phase: Tensor, radius: float, frames: Tensor) -> Tensor:
    """Pictures (B, C, S, S) moved on circles of `radius` pixels, wrapped around at the borders: (B, C, T, S, S).

    `frequency` (B,) in turns a frame, negative ones the other way round; `phase` (B,) in turns; `frames` (T,) numbers.
    """
    angle = 2 * torch.pi * (phase[:, None] + frequency[:, None] * frames.double())
    right, down = ((radius * f(angle)).round().long() for f in (torch.cos, torch.sin))
    height, across = images.shape[-2:]
    rows = (torch.arange(height) - down[..., None]) % height  # (B, T, S)
    columns = (torch.arange(across) - right[..., None]) % across
    batch = torch.arange(len(images))[:, None, None, None]
    return images[batch, :, rows[..., :, None], columns[..., None, :]].permute(0, 4, 1, 2, 3)


class ShakenSet(Dataset):
    """Samples of pictures as clips; batches of :class:`ShakenImageDataModule`. In evaluation the bands take turns."""

    def __init__(self, pictures: SampleSet, data: ShakenImageDataModule, salt: int) -> None:
        self.pictures, self.data, self.salt = pictures, data, salt

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: int | Key) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        batch, data, parts = self.pictures.__getitems__(keys), self.data, key_parts(keys)
        drawn = [
            hash64(data.seed, self.salt + _DRAWS, parts[:, 1], parts[:, 0], parts[:, 2], number) for number in range(4)
        ]
        place, phase, sense, choice = (torch.from_numpy((draw >> np.uint64(11)) * 2.0**-53) for draw in drawn)
        bands = torch.tensor(data.bands, dtype=torch.float64)
        band = (choice * len(bands)).long() if self.salt == SALT["train"] else batch["index"] % len(bands)
        frequency = (bands[band] + data.width * place) * torch.where(sense < 0.5, 1, -1)
        video = shake(batch["image"], frequency, phase, data.radius, torch.tensor(data.frames))
        label = batch["label"] * len(bands) + band
        return {
            "video": video,
            "label": label,
            "index": batch["index"],
            "video_id": batch["index"],
            "view": torch.zeros_like(label),
        }


class ShakenImageDataModule(ImageDataModule):
    """Labelled pictures that shake. Batches: `video` (B, 3, T, S, S) float32, normalised; `label` (B,), the picture's
    class * bands + its band; `index`, `video_id` and `view` (B,) int64, as a set of videos has them.

    Args:
        frames: numbers of the frames that are shown; a count T stands for 0 to T - 1.
        bands: where the frequencies of each band begin, in turns a frame.
        width: of the bands.
        radius: of the circle, in pixels.
        data: the rest, as of :class:`~zoo.data.ImageDataModule`.

    Attributes:
        num_classes: of pairs of class and band.
    """

    def __init__(
        self,
        frames: int | list[int] = 28,
        bands: list[float] = [0.02, 0.14, 0.26, 0.38],  # noqa: B006 (never changed)
        width: float = 1 / 9,
        radius: float = 3.0,
        **data: Any,
    ) -> None:
        super().__init__(**data)
        self.frames = list(range(frames)) if isinstance(frames, int) else list(frames)
        if not self.frames or not bands or width < 0 or radius < 0:
            raise ZooError("shaken pictures want frames and bands, and width and radius that are not negative")
        self.bands, self.width, self.radius = list(bands), width, radius
        self.num_classes *= len(self.bands)
        self.class_names = [f"{name}, band {n}" for name in self.class_names for n in range(len(self.bands))]

    def preprocess_facts(self) -> None:  # type: ignore[override]  # a picture alone is no sample
        return None

    def samples(self, split: str, train_transform: bool | None = None) -> Any:
        """The transformed split as clips."""
        return ShakenSet(super().samples(split, train_transform), self, SALT[split])
