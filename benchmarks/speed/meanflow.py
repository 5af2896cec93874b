"""Speed of the generation trunk and of MeanFlow's step, beside the official codes and diffusers.

`dit_*` times the trunk: one training step of a plain diffusion transformer on noise, the same for DiT, SiT and
diffusers, with the AdamW of the official scripts. `unet_cifar10` times MeanFlow's whole step on CIFAR-10,
Jacobian-vector product included, against py-meanflow. `--official` is a checkout of DiT, SiT or py-meanflow, or a
folder of several; nobody else's code is copied here.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.environment import package_version
from benchmarks.speed.harness import Loader, Setting, Trainer, Work, count_flops, forever, photos, revision
from zoo.errors import ZooError

LR = 1e-4
PACKAGES = ("diffusers",)
LOADING_BATCH, LOADING_SIDE = 32, 256
# What tells a checkout: a file that only it has.
CHECKOUTS = {
    "DiT": ("diffusion/gaussian_diffusion.py", "models.py"),
    "SiT": ("transport/transport.py", "models.py"),
    "py-meanflow": ("meanflow/models/meanflow.py", "meanflow/models/unet.py"),
}


@dataclass(frozen=True)
class Size:
    """A network: a transformer where `patch_size` is given, else the U-Net."""

    img_size: int
    patch_size: int | None = None
    embed_dim: int = 128
    depth: int = 4
    num_heads: int = 12
    num_blocks: int = 4

    @property
    def tokens(self) -> int:
        return (self.img_size // self.patch_size) ** 2 if self.patch_size else 0


MODELS = {
    "dit_b4": Size(32, 4, 768, 12, 12),
    "dit_b2": Size(32, 2, 768, 12, 12),
    "dit_xl2": Size(32, 2, 1152, 28, 16),
    "unet_cifar10": Size(32),
    "tiny": Size(8, 2, 32, 2, 2),  # for the harness's own test
    "tiny_unet": Size(8, embed_dim=8, num_blocks=1),
}
DEFAULT_MODEL = "dit_b4"


def _checkouts(folder: Path | None) -> dict[str, Path]:
    """The official codes at `folder` or in it, by name."""
    if folder is None:
        return {}
    found = {}
    for name, files in CHECKOUTS.items():
        for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
            if all((place / file).is_file() for file in files):
                found.setdefault(name, place)
    if not found:
        raise ZooError(f"{folder} holds no checkout of {', '.join(CHECKOUTS)}")
    return found


def _import(folder: Path, name: str) -> ModuleType:
    """Import `name` of a checkout, leaving sys.path and sys.modules as they were."""
    top = name.partition(".")[0]

    def ours() -> dict[str, ModuleType]:
        return {key: module for key, module in sys.modules.items() if key == top or key.startswith(f"{top}.")}

    before = ours()
    for key in before:
        del sys.modules[key]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for key in ours():
            del sys.modules[key]
        sys.modules.update(before)


# ------------------------------------------------------------------------------------------------------------ the trunk


def _trunk_loss(network: Callable[[Tensor, Tensor, Tensor], Tensor], setting: Setting) -> Callable[[Tensor], Tensor]:
    """The squared error of a network's output against noise, with times and labels that every contender gets."""
    generator = torch.Generator().manual_seed(1)
    side = MODELS[setting.model].img_size
    t = torch.rand(setting.batch, generator=generator).to(setting.device)
    y = torch.randint(0, 1000, (setting.batch,), generator=generator).to(setting.device)
    target = torch.randn(setting.batch, 4, side, side, generator=generator).to(setting.device)
    return lambda z: mse_loss(network(z, t, y).to(target.dtype), target)


def _ours_dit(size: Size) -> nn.Module:
    from zoo.nn.dit import DiT

    assert size.patch_size is not None
    return DiT(
        img_size=size.img_size,
        patch_size=size.patch_size,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
    )


def ours_trunk(size: Size, setting: Setting) -> Trainer:
    import zoo
    from zoo.training import optim

    network = _ours_dit(size).to(setting.device)
    declared = optim.Optim(lr=LR, weight_decay=0.0, betas=(0.9, 0.999), schedule="constant")
    optimizer = optim.make_optimizer(optim.param_groups(network, declared), declared, LR, fused=True)
    about = "zoo.nn.dit: the trunk and the fused AdamW of its tasks"
    return Trainer("zoo", zoo.__version__, _trunk_loss(network, setting), optimizer, about)


def official_trunk(name: str, folder: Path, size: Size, setting: Setting) -> Trainer:
    module = _import(folder, "models")
    network = getattr(module, name)(
        input_size=size.img_size,
        patch_size=size.patch_size,
        hidden_size=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        learn_sigma=False,
    ).to(setting.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0)
    about = f"the official {name}, without learnt variance; torch.optim.AdamW as in its train.py"
    return Trainer(name, revision(folder), _trunk_loss(network, setting), optimizer, about)


def diffusers_trunk(size: Size, setting: Setting) -> Trainer:
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=size.num_heads,
        attention_head_dim=size.embed_dim // size.num_heads,
        in_channels=4,
        out_channels=4,
        num_layers=size.depth,
        sample_size=size.img_size,
        patch_size=size.patch_size,
        num_embeds_ada_norm=1000,
    ).to(setting.device)
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0)

    def call(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return network(z, timestep=t, class_labels=y).sample

    about = "DiTTransformer2DModel, whose every block embeds time and label anew; torch.optim.AdamW"
    return Trainer("diffusers", package_version("diffusers") or "", _trunk_loss(call, setting), optimizer, about)


# ------------------------------------------------------------------------------------------------------ MeanFlow's step


def _unet_task(size: Size) -> Any:
    from zoo.generation.meanflow import UnconditionalMeanFlow

    return UnconditionalMeanFlow(
        img_size=size.img_size, model_channels=size.embed_dim, num_blocks=size.num_blocks, attn_resolutions=[16]
    )


def _labels(setting: Setting) -> Tensor:
    return torch.zeros(setting.batch, 6, device=setting.device)


def ours_unet(size: Size, setting: Setting) -> Trainer:
    import zoo
    from zoo.training import optim

    task = _unet_task(size).to(setting.device).train()
    optimizer = optim.make_optimizer(optim.param_groups(task.network, task.optim), task.optim, LR, fused=True)
    augment = _labels(setting)

    def loss(images: Tensor) -> Tensor:
        return task.loss({"image": images, "augment": augment}).loss

    about = "zoo.generation.meanflow: draws, loss and the fused Adam of its task"
    return Trainer("zoo", zoo.__version__, loss, optimizer, about)


def official_unet(folder: Path, size: Size, setting: Setting) -> Trainer:
    models = _import(folder / "meanflow", "models.meanflow")
    # A second import forgets the first: the U-Net's module comes by the same one.
    unet = _import(folder / "meanflow", "models.unet")
    args = Namespace(
        ema_decay=0.9999,
        ema_decays=[],
        tr_sampler="v0",
        ratio=0.75,
        P_mean_t=-2.0,
        P_std_t=2.0,
        P_mean_r=-2.0,
        P_std_r=2.0,
        norm_p=0.75,
        norm_eps=1e-3,
    )
    sizes = {
        "img_resolution": size.img_size,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": size.embed_dim,
        "num_blocks": size.num_blocks,
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
        "channel_mult": [2, 2, 2],
        "dropout": 0.2,
        "augment_dim": 6,
    }
    network = models.MeanFlow(unet.SongUNet, args, sizes).to(setting.device).train()
    optimizer = torch.optim.Adam(network.net.parameters(), lr=LR)
    augment = _labels(setting)
    about = "py-meanflow: MeanFlow.forward_with_loss, whose derivative is of the whole batch; torch.optim.Adam"
    return Trainer("py-meanflow", revision(folder), lambda x: network.forward_with_loss(x, augment), optimizer, about)


# ------------------------------------------------------------------------------------------------------------- together


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size, found = MODELS[setting.model], _checkouts(setting.official)
    if size.patch_size is None:
        builders: list[Callable[[], Trainer]] = [lambda: ours_unet(size, setting)]
        if "py-meanflow" in found:
            builders.append(lambda: official_unet(found["py-meanflow"], size, setting))
        return [build() for build in builders]
    builders = [lambda: ours_trunk(size, setting)]
    for name in ("DiT", "SiT"):
        if name in found:
            builders.append(lambda name=name: official_trunk(name, found[name], size, setting))  # type: ignore[misc]
    if package_version("diffusers"):
        builders.append(lambda: diffusers_trunk(size, setting))
    return [build() for build in builders]


def images(setting: Setting) -> Tensor:
    """Seeded noise (B, C, S, S): the time of a step does not depend on what is in it."""
    size = MODELS[setting.model]
    channels = 4 if size.patch_size else 3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch, channels, size.img_size, size.img_size, generator=generator)
    return x.to(setting.device)


def work(setting: Setting) -> Work:
    """FLOPs of one forward and backward pass; the U-Net's Jacobian-vector product comes on top and is not counted."""
    size = MODELS[setting.model]
    with torch.device("meta"):
        t = torch.empty(setting.batch)
        if size.patch_size:
            network = _ours_dit(size)
            z = torch.empty(setting.batch, 4, size.img_size, size.img_size)
            labels = torch.zeros(setting.batch, dtype=torch.long)
            flops = count_flops(lambda: network(z, t, labels).sum())
        else:
            network = _unet_task(size).network
            x = torch.empty(setting.batch, 3, size.img_size, size.img_size)
            flops = count_flops(lambda: network(x, (t, t), None).sum())
    return Work(setting.batch, setting.batch * size.tokens, flops, {"tokens": size.tokens})


# ----------------------------------------------------------------------------------------------------------------- data


def _zoo_loader(folder: Path) -> Loader:
    import zoo
    from zoo.data.datamodule import ImageDataModule
    from zoo.data.transforms import ADMCrop

    half = [0.5, 0.5, 0.5]
    module = ImageDataModule(
        dataset=str(folder),
        batch_size=LOADING_BATCH,
        image_size=LOADING_SIDE,
        train_transform=ADMCrop(flip=0.5),
        num_workers=0,
        seed=0,
        mean=half,
        std=half,
    )
    module.setup("fit")
    batches = forever(module.train_dataloader(), lambda b: b["image"])
    return Loader("zoo", zoo.__version__, batches, "ImageDataModule with ADMCrop")


def _official_crop(folder: Path) -> Callable[[Any, int], Any]:
    """The function `center_crop_arr` of an official train.py, which cannot be imported without a GPU's libraries."""
    from PIL import Image

    tree = ast.parse((folder / "train.py").read_text())
    wanted = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name == "center_crop_arr"]
    if not wanted:
        raise ZooError(f"{folder}/train.py has no center_crop_arr")
    names: dict[str, Any] = {"Image": Image, "np": np}
    exec(compile(ast.Module(wanted, []), "train.py", "exec"), names)
    return names["center_crop_arr"]


def _official_loader(name: str, checkout: Path, folder: Path) -> Loader:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    crop = _official_crop(checkout)
    steps = [
        lambda image: crop(image, LOADING_SIDE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3, inplace=True),
    ]
    data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    loader = DataLoader(data, batch_size=LOADING_BATCH, shuffle=True, drop_last=True)
    about = f"torchvision ImageFolder, and the crop and transforms of {name}'s train.py"
    return Loader(name, revision(checkout), forever(loader, lambda b: b[0]), about)


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch in [-1, 1], in this process (no workers), ours first."""
    found = {name: place for name, place in _checkouts(setting.official).items() if (place / "train.py").is_file()}
    with photos(setting, 4 * LOADING_BATCH) as (folder, name):
        made = [_zoo_loader(folder), *(_official_loader(key, place, folder) for key, place in found.items())]
        yield made[:2], Work(LOADING_BATCH, detail={"data": name, "crop": LOADING_SIDE})
