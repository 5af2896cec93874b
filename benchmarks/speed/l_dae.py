"""Speed of l-DAE: a training step of DiT, where its walk begins, beside that of the official DiT and of diffusers'.

All are of one size, see the same latents (32 x 32 x 4) and labels, predict noise alone (no variance), and are updated
by AdamW. `--official` is a checkout of facebookresearch/DiT; nobody else's code is copied here, it is imported from
where it lies. l-DAE itself has no code but ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Setting, Trainer, Work
from benchmarks.speed.shared import diffusion

RECIPE, LR = "l_dae/pretrain_dit_imagenet1k", 1e-4
PACKAGES = ("diffusers",)
MODELS: dict[str, dict[str, int]] = {
    "dit_s2": {"img_size": 32, "patch_size": 2, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "dit_b2": {"img_size": 32, "patch_size": 2, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "dit_l2": {"img_size": 32, "patch_size": 2, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "tiny": {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2},  # for the harness's own test
}
DEFAULT_MODEL = "dit_s2"


def _options(size: dict[str, int]) -> dict[str, Any]:
    """The recipe's, for a network of this size on latents that are given."""
    own: dict[str, Any] = {f"model.{name}": value for name, value in size.items() if name != "img_size"}
    options = {"data.image_size": size["img_size"], "model.optim.lr": LR, "model.autoencoder": "pixels"}
    return {**own, **options, "trainer.callbacks": []}


def ours(size: dict[str, int], setting: Setting) -> Trainer:
    labels = diffusion.labels_of(setting)
    return harness.from_recipe(RECIPE, _options(size), lambda z: {"image": z, "label": labels}, setting)


def official(checkout: Path, size: dict[str, int], setting: Setting) -> Trainer:
    """The loss of its own train.py, but for the variance, which l-DAE's baseline does not learn."""
    process = harness.import_from(checkout, "diffusion").create_diffusion("", learn_sigma=False)
    sizes = diffusion.official_sizes(size)
    network = harness.import_from(checkout, "models").DiT(**sizes, in_channels=4, num_classes=1000, learn_sigma=False)
    network.to(setting.device).train()
    labels = diffusion.labels_of(setting)

    def loss(z: Tensor) -> Tensor:
        t = torch.randint(0, process.num_timesteps, (len(z),), device=z.device)
        return process.training_losses(network, z, t, {"y": labels})["loss"].mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0)
    about = "DiT's training_losses without variance; torch.optim.AdamW as in train.py"
    return Trainer("DiT", harness.revision(checkout), loss, optimizer, about)


def diffusers_dit(size: dict[str, int], setting: Setting) -> Trainer:
    network, call = diffusion.diffusers_dit(size, setting)
    labels = diffusion.labels_of(setting)
    gamma2 = (1 - torch.linspace(1e-4, 0.02, 1000, device=setting.device)).cumprod(0)

    def loss(z: Tensor) -> Tensor:
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),), device=z.device)
        kept = gamma2[t].view(-1, 1, 1, 1)
        out = call(kept.sqrt() * z + (1 - kept).sqrt() * noise, t, labels)
        return (out - noise).square().mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0)
    about = "DiTTransformer2DModel, whose every block embeds time and label anew; torch.optim.AdamW"
    return Trainer("diffusers", package_version("diffusers") or "", loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size = MODELS[setting.model]
    found = diffusion.checkouts(setting.official, {"DiT": diffusion.TRUNKS["DiT"]})
    builders: list[Callable[[], Trainer]] = [lambda: ours(size, setting)]
    builders += [lambda: official(found["DiT"], size, setting)] if found else []
    if package_version("diffusers"):
        builders.append(lambda: diffusers_dit(size, setting))
    return [build() for build in builders]


def images(setting: Setting) -> Tensor:
    """Seeded latents (B, 4, S, S) of noise: the time of a step does not depend on what is in them."""
    side = MODELS[setting.model]["img_size"]
    return harness.noise(setting, setting.batch, 4, side, side)


def work(setting: Setting) -> Work:
    """Tokens that pass the transformer; FLOPs of its passes."""
    size = MODELS[setting.model]
    network = harness.recipe_task(RECIPE, _options(size), "meta").network
    return diffusion.trunk_work(network, size, setting)
