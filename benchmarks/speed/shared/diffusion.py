"""The peers of papers of generation: the trunks of DiT, SiT and diffusers, and the official pipeline from pictures.

`--official` is a checkout, or a folder of several.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchvision import datasets, transforms

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from zoo.errors import ZooError

LR = 1e-4
BATCH, SIDE = 32, 256  # of the pictures that are loaded
# What tells a checkout: files that only it has.
TRUNKS = {
    "DiT": ("diffusion/gaussian_diffusion.py", "models.py"),
    "SiT": ("transport/transport.py", "models.py"),
}


def checkouts(folder: Path | None, known: Mapping[str, tuple[str, ...]] = TRUNKS) -> dict[str, Path]:
    """The official codes at `folder` or in it, by name.

    Raises:
        ZooError: it holds none.
    """
    if folder is None:
        return {}
    found: dict[str, Path] = {}
    for name, files in known.items():
        for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
            if all((place / file).is_file() for file in files):
                found.setdefault(name, place)
    if not found:
        raise ZooError(f"{folder} holds no checkout of {', '.join(known)}")
    return found


def official_sizes(size: Mapping[str, int]) -> dict[str, int]:
    """A network's sizes under the names of the official DiT and SiT."""
    names = {"img_size": "input_size", "embed_dim": "hidden_size"}
    return {names.get(name, name): value for name, value in size.items()}


def diffusers_dit(
    size: Mapping[str, int], setting: Setting, out_channels: int = 4
) -> tuple[nn.Module, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """diffusers' DiT of this size, and what it makes of latents (B, 4, S, S), times and labels."""
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": size["num_heads"], "attention_head_dim": size["embed_dim"] // size["num_heads"]}
    sizes |= {"num_layers": size["depth"], "sample_size": size["img_size"], "patch_size": size["patch_size"]}
    network = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=out_channels, num_embeds_ada_norm=1000)
    network.to(setting.device).train()
    return network, lambda z, t, y: network(z, timestep=t, class_labels=y).sample


def labels_of(setting: Setting) -> Tensor:
    """Labels (B,) that every contender gets."""
    return torch.randint(0, 1000, (setting.batch,), generator=torch.Generator().manual_seed(1)).to(setting.device)


def trunk_work(network: Any, size: Mapping[str, int], setting: Setting) -> Work:
    """Tokens that pass a transformer (on the meta device) of latents (B, 4, S, S); FLOPs of its passes."""
    with torch.device("meta"):
        z = torch.empty(setting.batch, 4, size["img_size"], size["img_size"])
        t, labels = torch.empty(setting.batch), torch.zeros(setting.batch, dtype=torch.long)
        flops = harness.count_flops(lambda: network(z, t, labels).sum())
    tokens = (size["img_size"] // size["patch_size"]) ** 2
    return Work(setting.batch, setting.batch * tokens, flops, {"tokens": tokens})


def trunk_loss(setting: Setting, side: int, channels: int = 4) -> Callable[[Callable[..., Tensor], Tensor], Tensor]:
    """The squared error of a network (z, t, y) against noise, with times and labels that every contender gets."""
    generator = torch.Generator().manual_seed(1)
    t = torch.rand(setting.batch, generator=generator).to(setting.device)
    y = torch.randint(0, 1000, (setting.batch,), generator=generator).to(setting.device)
    target = torch.randn(setting.batch, channels, side, side, generator=generator).to(setting.device)
    return lambda network, z: mse_loss(network(z, t, y).to(target.dtype), target)


def trunks(size: Mapping[str, int], found: Mapping[str, Path], setting: Setting) -> list[Trainer]:
    """The official DiT and SiT where their checkouts are, and diffusers' where it is installed, with AdamW as in the
    official scripts. `size`: img_size, patch_size, embed_dim, depth, num_heads."""
    loss = trunk_loss(setting, size["img_size"])

    def trainer(name: str, version: str, network: Any, call: Callable[..., Tensor], about: str) -> Trainer:
        optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0)
        return Trainer(name, version, lambda z: loss(call, z), optimizer, about)

    made = []
    theirs = official_sizes(size)
    for name, place in found.items():
        if name in TRUNKS:
            network = getattr(harness.import_from(place, "models"), name)(**theirs, learn_sigma=False)
            about = f"the official {name}, without learnt variance; torch.optim.AdamW as in its train.py"
            network.to(setting.device)
            made.append(trainer(name, harness.revision(place), network, network, about))
    if version := package_version("diffusers"):
        network, call = diffusers_dit(size, setting)
        about = "DiTTransformer2DModel, whose every block embeds time and label anew; torch.optim.AdamW"
        made.append(trainer("diffusers", version, network, call, about))
    return made


def _official_crop(folder: Path) -> Callable[[Any, int], Any]:
    """The function `center_crop_arr` of an official train.py, which cannot be imported without a GPU's libraries."""
    tree = ast.parse((folder / "train.py").read_text())
    wanted = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name == "center_crop_arr"]
    if not wanted:
        raise ZooError(f"{folder}/train.py has no center_crop_arr")
    names: dict[str, Any] = {"Image": Image, "np": np}
    exec(compile(ast.Module(wanted, []), "train.py", "exec"), names)
    return names["center_crop_arr"]


@contextlib.contextmanager
def loaders(recipe: str, found: Mapping[str, Path], setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch in [-1, 1], in this process (no workers): that of a recipe's data module
    with the crop of the official codes, and the first official one."""
    half = [0.5, 0.5, 0.5]
    crop = {"class_path": "zoo.data.transforms.ADMCrop", "init_args": {"flip": 0.5}}
    options = {"data.image_size": SIDE, "data.mean": half, "data.std": half, "data.train_transform": crop}
    with harness.photos(setting, 4 * BATCH) as (folder, photographs):
        made = [harness.data_from_recipe(recipe, options, folder, BATCH, how="ADMCrop on uint8 tensors")]
        for name, place in found.items():
            if (place / "train.py").is_file() and len(made) < 2:
                cut = _official_crop(place)
                ends = [transforms.ToTensor(), transforms.Normalize(half, half, inplace=True)]
                steps = [lambda image, cut=cut: cut(image, SIDE), transforms.RandomHorizontalFlip(), *ends]
                data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
                about = f"torchvision ImageFolder, and the crop and transforms of {name}'s train.py"
                made.append(harness.peer_loader(name, place, data, BATCH, about))
        yield made, Work(BATCH, detail={"data": photographs, "crop": SIDE})
