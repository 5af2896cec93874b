"""Speed of pre-activation ResNets: our training step and data pipeline beside those of timm and torchvision.

The official code is Lua for Torch7, which current machines cannot run: it cannot be timed. The peers are the
nearest networks that are maintained: timm's resnetv2 with batch normalisation, whose units are ours but whose stem
leaves normalisation and ReLU to the first unit, behind the pooling (so that they run on a quarter of the pixels), and
torchvision's resnet, whose units are the original ones, with normalised projections. Parameters and FLOPs agree within
half a percent. All are trained by SGD with Nesterov momentum in the memory order channels_last.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work

RECIPE = "preact_resnet/train_aspect_imagenet1k"
PACKAGES = ("timm", "torchvision")
LOADING_BATCH = 64


@dataclass(frozen=True)
class Size:
    """A network by its units a stage, its names in timm and in torchvision, and the side of its images."""

    depths: tuple[int, ...]
    block: str
    timm: str
    torchvision: str
    img_size: int = 224

    @property
    def options(self) -> dict[str, Any]:
        return {"model.depths": self.depths, "model.block": self.block, "data.image_size": self.img_size}

    def peers(self) -> dict[str, nn.Module]:
        return {
            "timm": timm.create_model(self.timm),
            "torchvision": torchvision.models.get_model(self.torchvision),
        }


MODELS = {
    "preact_resnet50": Size((3, 4, 6, 3), "bottleneck", "resnetv2_50", "resnet50"),
    "preact_resnet101": Size((3, 4, 23, 3), "bottleneck", "resnetv2_101", "resnet101"),
    "preact_resnet18": Size((2, 2, 2, 2), "basic", "resnetv2_18", "resnet18"),
    "tiny": Size((2, 2, 2, 2), "basic", "resnetv2_18", "resnet18", 32),  # for the harness's own test
}
DEFAULT_MODEL = "preact_resnet50"


def _labels(images: Tensor) -> Tensor:
    return torch.arange(len(images), device=images.device)


def _peer(name: str, network: Any, about: str, setting: Setting) -> Trainer:
    network.to(setting.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def loss(images: Tensor) -> Tensor:
        return cross_entropy(network(images.contiguous(memory_format=torch.channels_last)), _labels(images))

    return Trainer(name, package_version(name) or "", loss, optimizer, f"{about}; torch.optim.SGD defaults")


def trainers(setting: Setting) -> list[Trainer]:
    """Ours first, then timm's and torchvision's."""
    size = MODELS[setting.model]
    abouts = {
        "timm": f"{size.timm}: the same units, normalisation of the stem behind its pooling",
        "torchvision": f"{size.torchvision}: original units, normalised projections",
    }
    ours = harness.from_recipe(RECIPE, size.options, lambda x: {"image": x, "label": _labels(x)}, setting)
    return [ours, *(_peer(name, network, abouts[name], setting) for name, network in size.peers().items())]


def images(setting: Setting) -> Tensor:
    """Noise (B,3,H,W)."""
    side = MODELS[setting.model].img_size
    return harness.noise(setting, setting.batch, 3, side, side)


def work(setting: Setting) -> Work:
    """Images and the measured FLOPs of our network; those of the peers stand beside them."""
    size = MODELS[setting.model]
    ours = harness.recipe_task(RECIPE, size.options, "meta").network
    with torch.device("meta"):
        batch = torch.empty(setting.batch, 3, size.img_size, size.img_size)
        networks = {"zoo": ours, **size.peers()}
    costs = harness.costs({name: (net, lambda net=net: net(batch).sum()) for name, net in networks.items()})
    return Work(setting.batch, 0, costs["flops"]["zoo"], costs)


def loaders(setting: Setting) -> contextlib.AbstractContextManager[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch, in this process (no workers), ours first: without lighting noise."""
    size = MODELS[setting.model]
    options = {**size.options, "data.train_transform.lighting": 0.0, "data.train_transform.kernel": "pillow"}
    peer = ("torchvision", "ImageFolder, RandomResizedCrop, ColorJitter 0.4, flip on PIL pictures")
    return harness.crop_loaders(RECIPE, options, setting, size.img_size, LOADING_BATCH, peer, jitter=0.4)
