"""Speed of pre-activation ResNets: our training step and data pipeline beside those of timm and torchvision.

The official code is Lua for Torch7, which current machines cannot run: it cannot be timed. The peers are the
nearest networks that are maintained: timm's resnetv2 with batch normalisation, whose units are ours but whose stem
leaves normalisation and ReLU to the first unit, behind the pooling (so that they run on a quarter of the pixels), and
torchvision's resnet, whose units are the original ones, with normalised projections. Parameters and FLOPs agree within
half a percent. All are trained by SGD with Nesterov momentum in the memory order channels_last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.environment import package_version
from benchmarks.speed.harness import Loader, Setting, Trainer, Work, count_flops, forever, photos

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = ("timm", "torchvision")
LOADING_BATCH = 64


@dataclass(frozen=True)
class Size:
    """A network by its names here, in timm and in torchvision, and the side of its images."""

    zoo: str
    timm: str
    torchvision: str
    img_size: int = 224


MODELS = {
    "preact_resnet50": Size("preact_resnet50", "resnetv2_50", "resnet50"),
    "preact_resnet101": Size("preact_resnet101", "resnetv2_101", "resnet101"),
    "preact_resnet18": Size("preact_resnet18", "resnetv2_18", "resnet18"),
    "tiny": Size("preact_resnet18", "resnetv2_18", "resnet18", 32),  # for the harness's own test
}
DEFAULT_MODEL = "preact_resnet50"


def _trainer(name: str, version: str, network: nn.Module, optimizer: torch.optim.Optimizer, about: str) -> Trainer:
    def loss(images: Tensor) -> Tensor:
        labels = torch.arange(len(images), device=images.device)
        return cross_entropy(network(images.contiguous(memory_format=torch.channels_last)), labels)

    return Trainer(name, version, loss, optimizer, about)


def ours(size: Size, setting: Setting) -> Trainer:
    import zoo
    from zoo.training import optim

    network = zoo.create_model(size.zoo).to(setting.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    declared = optim.Optim(name="sgd", lr=LR, nesterov=True, weight_decay=WEIGHT_DECAY, no_decay="none")
    optimizer = optim.make_optimizer(optim.param_groups(network, declared), declared, LR, fused=True)
    return _trainer("zoo", zoo.__version__, network, optimizer, "zoo.recognition.preact_resnet: its task's fused SGD")


def _peer(name: str, network: nn.Module, about: str, setting: Setting) -> Trainer:
    network.to(setting.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        network.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    return _trainer(name, package_version(name) or "", network, optimizer, f"{about}; torch.optim.SGD defaults")


def trainers(setting: Setting) -> list[Trainer]:
    """Ours first, then timm's and torchvision's."""
    import timm
    import torchvision

    size = MODELS[setting.model]
    v2, v1 = timm.create_model(size.timm), torchvision.models.get_model(size.torchvision)
    return [
        ours(size, setting),
        _peer("timm", v2, f"{size.timm}: the same units, normalisation of the stem behind its pooling", setting),
        _peer("torchvision", v1, f"{size.torchvision}: original units, normalised projections", setting),
    ]


def images(setting: Setting) -> Tensor:
    """Seeded noise images (B,3,H,W): the time of a step does not depend on what is in them."""
    side = MODELS[setting.model].img_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(setting.batch, 3, side, side, generator=generator).to(setting.device)


def work(setting: Setting) -> Work:
    """Images and the measured FLOPs of our network; those of the peers stand beside them."""
    import timm
    import torchvision

    import zoo

    size = MODELS[setting.model]
    with torch.device("meta"):
        networks = {
            "zoo": zoo.create_model(size.zoo),
            "timm": timm.create_model(size.timm),
            "torchvision": torchvision.models.get_model(size.torchvision),
        }
        batch = torch.empty(setting.batch, 3, size.img_size, size.img_size)
        flops = {name: count_flops(lambda net=net: net(batch).sum()) for name, net in networks.items()}
    parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}
    return Work(setting.batch, 0, flops["zoo"], {"flops": flops, "parameters": parameters})


def _zoo_loader(folder: Path, side: int, batch: int) -> Loader:
    import zoo
    from zoo.data.datamodule import ImageDataModule
    from zoo.data.transforms import InceptionTrain

    module = ImageDataModule(
        dataset=str(folder),
        batch_size=batch,
        image_size=side,
        train_transform=InceptionTrain(side, lighting=0.0),
        num_workers=0,
        seed=0,
    )
    module.setup("fit")
    return Loader(
        "zoo",
        zoo.__version__,
        forever(module.train_dataloader(), lambda b: b["image"]),
        "ImageDataModule with InceptionTrain without its lighting: crop, jitter, flip on tensors",
    )


def _torchvision_loader(folder: Path, side: int, batch: int) -> Loader:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(side, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ColorJitter(0.4, 0.4, 0.4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    loader = DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)
    about = "ImageFolder, RandomResizedCrop, ColorJitter 0.4, flip on PIL pictures"
    return Loader("torchvision", package_version("torchvision") or "", forever(loader, lambda b: b[0]), about)


def _timm_loader(folder: Path, side: int, batch: int) -> Loader:
    from timm.data import ImageDataset, create_transform
    from torch.utils.data import DataLoader

    transform = create_transform(side, is_training=True, color_jitter=0.4, interpolation="bicubic", mean=MEAN, std=STD)
    loader = DataLoader(ImageDataset(str(folder), transform=transform), batch_size=batch, shuffle=True, drop_last=True)
    about = "ImageDataset, create_transform with color_jitter 0.4"
    return Loader("timm", package_version("timm") or "", forever(loader, lambda b: b[0]), about)


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch, in this process (no workers), ours first."""
    side, batch = MODELS[setting.model].img_size, LOADING_BATCH
    with photos(setting, 4 * batch) as (folder, name):
        makers = (_zoo_loader, _torchvision_loader, _timm_loader)
        yield [make(folder, side, batch) for make in makers], Work(batch, detail={"data": name, "crop": side})
