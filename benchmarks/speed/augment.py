"""Speed of augmentation: small pictures from memory to a normalised batch, ours beside torchvision's transforms.

    python benchmarks/speed/run.py augment --model two_views --batch 256 --data ../shared/data/cifar10

The pictures are those of CIFAR-10 where a folder with them is given, else drawn ones of the same size. torchvision's
transforms change one picture after the other, version 2 on tensors and version 1 by Pillow, as the field's scripts do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.environment import package_version
from benchmarks.speed.harness import Loader, Setting, Work, forever

SIDE = 32
PACKAGES = ("torchvision", "pillow")


@dataclass(frozen=True)
class Recipe:
    """An augmentation and how many views of a picture it gives."""

    title: str
    views: int = 1


MODELS = {
    "crop_flip": Recipe("pad, crop and flip"),
    "resized_crop": Recipe("random resized crop and flip"),
    "two_views": Recipe("two views of MoCo v2 (crop, jitter, gray, blur, flip)", 2),
    "moco_v3_views": Recipe("the two views of MoCo v3 (crop, jitter, gray, blur always and seldom, solarize, flip)", 2),
}
DEFAULT_MODEL = "two_views"


def _ours(model: str) -> Any:
    from zoo.data import transforms as T
    from zoo.data.views import Views

    if model == "moco_v3_views":
        kinds: list[dict[str, Any]] = [{"blur_prob": 1.0}, {"blur_prob": 0.1, "solarize_prob": 0.2}]
        v3: dict[str, Any] = {"scale": (0.08, 1.0), "jitter": (0.4, 0.4, 0.2, 0.1)}
        return Views([T.ContrastiveAugment(**v3, **kind) for kind in kinds])
    made = {"crop_flip": T.PadCropTrain, "resized_crop": T.MAEPretrain, "two_views": T.ContrastiveAugment}[model]()
    return T.TwoViews(made) if MODELS[model].views == 2 else made


def _first(batch: dict[str, Any]) -> Tensor:
    return batch["views"][0] if "views" in batch else batch["image"]


def _theirs(model: str, package: Any, mean: tuple[float, ...], std: tuple[float, ...], tensor: list[Any]) -> list[Any]:
    """The same views of torchvision's `transforms` or `transforms.v2`; `tensor` makes floats of the picture."""
    bilinear, sometimes = package.InterpolationMode.BILINEAR, package.RandomApply

    def view(scale: float, jitter: tuple[float, ...], blur: float, *more: Any) -> list[Any]:
        crop = package.RandomResizedCrop(SIDE, (scale, 1.0), interpolation=bilinear)
        colours = [sometimes([package.ColorJitter(*jitter)], p=0.8), package.RandomGrayscale(0.2)]
        return [crop, *colours, sometimes([package.GaussianBlur(9, (0.1, 2.0))], p=blur), *more]

    v3 = (0.08, (0.4, 0.4, 0.2, 0.1))
    bicubic = package.InterpolationMode.BICUBIC
    views = {
        "crop_flip": [[package.RandomCrop(SIDE, padding=4)]],
        "resized_crop": [[package.RandomResizedCrop(SIDE, (0.2, 1.0), interpolation=bicubic)]],
        "two_views": [view(0.2, (0.4, 0.4, 0.4, 0.1), 0.5)] * 2,
        "moco_v3_views": [view(*v3, 1.0), view(*v3, 0.1, package.RandomSolarize(128, p=0.2))],
    }[model]
    ends = [package.RandomHorizontalFlip(), *tensor, package.Normalize(mean, std)]
    return [package.Compose([*steps, *ends]) for steps in views]


class _OneByOne(Dataset):
    """Pictures in memory, each changed when it is asked for."""

    def __init__(self, pictures: list[Any], views: list[Callable[[Any], Tensor]]) -> None:
        self.pictures, self.views = pictures, views

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> list[Tensor]:
        return [view(self.pictures[index]) for view in self.views]


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from memory to a batch in this process (no workers), ours first."""
    import torchvision
    from torchvision import transforms as v1
    from torchvision.transforms import v2
    from torchvision.transforms.v2.functional import to_pil_image

    import zoo
    from zoo.data import ImageDataModule

    recipe, count = MODELS[setting.model], 4 * setting.batch
    drawn = setting.data is None
    module = ImageDataModule(
        "shapes" if drawn else "cifar10",
        None if drawn else str(setting.data),
        batch_size=setting.batch,
        image_size=SIDE,
        train_samples=count,
        train_transform=_ours(setting.model),
        num_workers=0,
        seed=0,
    )
    samples = module.held("train")
    pictures = [samples[k]["image"] for k in range(count)]
    ours = "ImageDataModule: pictures in memory as bytes, a whole batch changed at a time"
    found = [Loader("zoo", zoo.__version__, forever(module.train_dataloader(), _first), ours)]
    to_float = [v2.ToDtype(torch.float32, scale=True)]
    peers = (
        ("torchvision v2", v2, to_float, pictures, "transforms.v2 on uint8 tensors, one by one"),
        ("torchvision v1", v1, [v1.ToTensor()], [to_pil_image(p) for p in pictures], "transforms on Pillow's pictures"),
    )
    for name, package, tensor, held, about in peers:
        data = _OneByOne(held, _theirs(setting.model, package, module.mean, module.std, tensor))
        loader = DataLoader(data, batch_size=setting.batch, shuffle=True, drop_last=True)
        version = package_version("torchvision") or torchvision.__version__
        found.append(Loader(name, version, forever(loader, lambda views: views[0]), about))
    data_name = "drawn pictures" if setting.data is None else "CIFAR-10"
    title = f"{recipe.title}, {data_name} in memory, {SIDE} pixels, batch {setting.batch}"
    yield found, Work(setting.batch, detail={"title": title, "views": recipe.views})
