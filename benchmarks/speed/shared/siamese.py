"""What the benchmarks of siamese papers share: the official code as one process on any device, and the pipeline of two
views from JPEG files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torchvision
from PIL import ImageFilter
from torch import Tensor
from torchvision import transforms

from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Work

BATCH = 32  # pictures of a batch where loading is timed


def group_of_one(setting: Setting) -> None:
    """A process group of this process alone, for everyone: official code cannot do without."""
    if not dist.is_initialized():
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "group"), 1)
        backend = "nccl" if setting.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def cuda_is(device: str) -> AbstractContextManager[Any]:
    """`tensor.cuda()` puts it onto the device of the measurement."""
    return patch.object(Tensor, "cuda", lambda self, *_, **__: self.to(device))


def images(setting: Setting, side: int, views: int = 2) -> Tensor:
    """Noise (V,B,3,H,W), the views."""
    return harness.noise(setting, views, setting.batch, 3, side, side)


def _blurred(image: Any) -> Any:
    """The blur of official scripts: Pillow's, with a random radius."""
    return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(()).uniform_(0.1, 2.0))))


def pil_view(
    side: int, scale: float = 0.2, hue: tuple[float, float] = (0.4, 0.1), blur: float = 0.5, solarize: float = 0.0
) -> Any:
    """A view as official scripts make it of a PIL picture (MoCo v2's "aug-plus" unless told): crops from `scale` on,
    jitter of saturation and hue by `hue`, gray, blur and solarisation with these probabilities, flip."""
    sometimes, bilinear = transforms.RandomApply, transforms.InterpolationMode.BILINEAR
    steps: list[Any] = [sometimes([transforms.ColorJitter(0.4, 0.4, *hue)], p=0.8), transforms.RandomGrayscale(p=0.2)]
    steps += [sometimes([transforms.Lambda(_blurred)], p=blur)]
    steps += [transforms.RandomSolarize(128, p=solarize)] if solarize else []
    return harness.pil_crop(side, *steps, scale=(scale, 1.0), interpolation=bilinear)


@contextlib.contextmanager
def two_view_loaders(
    recipe: str, options: Mapping[str, Any], setting: Setting, side: int, views: Sequence[Any], script: str
) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch of two views, in this process (no workers), ours first. `views` are
    theirs, of a PIL picture; `script` says of which official script."""
    first, second = views
    with harness.photos(setting, 4 * BATCH) as (folder, name):
        own, how = {**options, "data.image_size": side}, "JPEG decoding, and two views augmented on uint8 tensors"
        found = [harness.data_from_recipe(recipe, own, folder, BATCH, lambda b: b["views"][0], how)]
        data = torchvision.datasets.ImageFolder(str(folder), lambda image: [first(image), second(image)])
        about = f"torchvision ImageFolder and the PIL transforms of the official script{script}"
        found.append(harness.peer_loader("official", "torchvision", data, BATCH, about, lambda b: b[0][0]))
        yield found, Work(BATCH, detail={"data": name, "crop": side, "views": 2})
