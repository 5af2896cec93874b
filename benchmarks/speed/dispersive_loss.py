"""Speed of dispersive loss: our SiT's training step beside that of the released code, of plain SiT and of diffusers.

All are of one size, see the same latents (32 x 32 x 4) and labels, and are updated by AdamW. `--official` is a
checkout of DispLoss or SiT, or a folder of both; nobody else's code is copied here, it is imported from where it lies.
SiT and diffusers have no such term and are timed without.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Setting, Trainer, Work
from benchmarks.speed.shared import diffusion
from zoo.errors import ZooError

RECIPE, LR = "dispersive_loss/train_sit_imagenet1k", 1e-4
PACKAGES = ("diffusers",)
MODELS: dict[str, dict[str, int]] = {
    "sit_s2": {"img_size": 32, "patch_size": 2, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "sit_b2": {"img_size": 32, "patch_size": 2, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "sit_xl2": {"img_size": 32, "patch_size": 2, "embed_dim": 1152, "depth": 28, "num_heads": 16},
    "tiny": {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2},  # for the harness's own test
}
DEFAULT_MODEL = "sit_s2"
OFFICIAL = ("transport/transport.py", "models.py")


def _options(size: dict[str, int]) -> dict[str, Any]:
    """The recipe's, for a network of this size on latents that are given."""
    own: dict[str, Any] = {f"model.{name}": value for name, value in size.items() if name != "img_size"}
    return {**own, "data.image_size": size["img_size"], "model.optim.lr": LR, "model.autoencoder": "pixels"}


def _checkouts(folder: Path | None) -> list[Path]:
    """The official codes at `folder` or in it."""
    if folder is None:
        return []
    places = (folder, *sorted(path for path in folder.iterdir() if path.is_dir()))
    found = [place for place in places if all((place / file).is_file() for file in OFFICIAL)]
    if not found:
        raise ZooError(f"{folder} holds no checkout of DispLoss or SiT")
    return found


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """What the released step takes for granted: CUDA, which without one is where tensors lie already, and torchdiffeq,
    which its losses import and its sampling alone calls."""
    cuda, solver = Tensor.cuda, ModuleType("torchdiffeq")
    solver.odeint = None  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    if absent := importlib.util.find_spec("torchdiffeq") is None:
        sys.modules["torchdiffeq"] = solver
    try:
        yield
    finally:
        Tensor.cuda = cuda  # type: ignore[method-assign]
        if absent:
            del sys.modules["torchdiffeq"]


def ours(size: dict[str, int], setting: Setting) -> Trainer:
    labels = diffusion.labels_of(setting)
    return harness.from_recipe(RECIPE, _options(size), lambda z: {"image": z, "label": labels}, setting)


def official(checkout: Path, size: dict[str, int], setting: Setting) -> Trainer:
    """The loss of its own train.py: training_losses of a network in training mode."""
    with _as_on_a_gpu():
        transport = harness.import_from(checkout, "transport").create_transport()
        sizes = diffusion.official_sizes(size)
        network = harness.import_from(checkout, "models").SiT(**sizes, in_channels=4, num_classes=1000)
    network.to(setting.device).train()
    with_term = hasattr(transport, "disp_loss")
    options: dict[str, Any] = {"y": diffusion.labels_of(setting), **({"return_act": True} if with_term else {})}

    def loss(z: Tensor) -> Tensor:
        with _as_on_a_gpu():
            return transport.training_losses(network, z, options)["loss"].mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0)
    name = "DispLoss" if with_term else "SiT"
    about = f"{name}'s training_losses, {'with' if with_term else 'without'} the term; torch.optim.AdamW as in train.py"
    return Trainer(name, harness.revision(checkout), loss, optimizer, about)


def diffusers_dit(size: dict[str, int], setting: Setting) -> Trainer:
    network, call = diffusion.diffusers_dit(size, setting, out_channels=8)
    labels = diffusion.labels_of(setting)

    def loss(z: Tensor) -> Tensor:
        noise, t = torch.randn_like(z), torch.rand(len(z), device=z.device)
        wide = t.view(-1, 1, 1, 1)
        out = call(wide * z + (1 - wide) * noise, t, labels)
        return (out[:, :4] - (z - noise)).square().mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0)
    about = "DiTTransformer2DModel, whose every block embeds time and label anew, without the term; torch.optim.AdamW"
    return Trainer("diffusers", package_version("diffusers") or "", loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size = MODELS[setting.model]
    builders: list[Callable[[], Trainer]] = [lambda: ours(size, setting)]
    builders += [lambda place=place: official(place, size, setting) for place in _checkouts(setting.official)]  # type: ignore[misc]
    if package_version("diffusers"):
        builders.append(lambda: diffusers_dit(size, setting))
    return [build() for build in builders]


def images(setting: Setting) -> Tensor:
    """Seeded latents (B, 4, S, S) of noise: the time of a step does not depend on what is in them."""
    side = MODELS[setting.model]["img_size"]
    return harness.noise(setting, setting.batch, 4, side, side)


def work(setting: Setting) -> Work:
    """Tokens that pass the transformer; FLOPs of the network's passes, the term's own not counted."""
    size = MODELS[setting.model]
    network = harness.recipe_task(RECIPE, _options(size), "meta").network
    return diffusion.trunk_work(network, size, setting)
