"""Speed of EDM's training step, which is uEDM's: ours beside NVlabs/edm (`--official`, a checkout) and diffusers.

The same DDPM++ or NCSN++ in each, told the noise level, with EDM's loss and Adam; augmentation is left out, its labels
(0) are given. Diffusers' UNet2DModel is the nearest it has: the same widths, blocks and attention, without the labels.
Nobody else's code is copied here.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import diffusion
from zoo.ops.karras import EDM

LR = 1e-4
RECIPE = "uedm/train_cifar10"
PACKAGES = ("diffusers",)
NCSNPP: dict[str, Any] = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
NCSNPP |= {"resample_filter": [1, 3, 3, 1]}
MODELS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"model_channels": 128, "num_blocks": 4},
    "ncsnpp": {"model_channels": 128, "num_blocks": 4, **NCSNPP},
    "ddpmpp_half": {"model_channels": 64, "num_blocks": 2},  # an eighth of the work, for a CPU
    "tiny": {"model_channels": 16, "num_blocks": 1},  # for the harness's own test
}
DEFAULT_MODEL = "ddpmpp"
SIDE, LABELS = 32, 9


def _options(size: dict[str, Any]) -> dict[str, Any]:
    own = {f"model.{name}": value for name, value in size.items()}
    return {**own, "model.formulation": "edm", "model.noise_conditional": True, "model.optim.lr": LR}


def _ours(size: dict[str, Any], setting: Setting) -> Trainer:
    augment = torch.zeros(setting.batch, LABELS, device=setting.device)
    return harness.from_recipe(RECIPE, _options(size), lambda x: {"image": x, "augment": augment}, setting)


def _official(size: dict[str, Any], setting: Setting) -> Trainer:
    checkout = diffusion.checkouts(setting.official, {"edm": ("training/networks.py", "training/loss.py")})["edm"]
    with harness.importing(checkout, "training.networks", "training.loss"):
        networks, losses = (importlib.import_module(f"training.{name}") for name in ("networks", "loss"))
        sizes = {"channel_mult": [2, 2, 2], "augment_dim": LABELS, "dropout": 0.13, **size}
        network = networks.EDMPrecond(SIDE, 3, model_type="SongUNet", **sizes).to(setting.device).train()
        loss = losses.EDMLoss()
    augment = torch.zeros(setting.batch, LABELS, device=setting.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8)
    about = "EDMPrecond and EDMLoss of NVlabs/edm; torch.optim.Adam as in its train.py"

    def step(x: Tensor) -> Tensor:
        return loss(network, x, None, lambda images: (images, augment)).sum() / setting.batch

    return Trainer("edm", harness.revision(checkout), step, optimizer, about)


def _diffusers(size: dict[str, Any], setting: Setting) -> Trainer:
    from diffusers import UNet2DModel

    width = 2 * size["model_channels"]
    network = UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(width,) * 3,
        layers_per_block=size["num_blocks"],
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=width,
        dropout=0.13,
    )
    network.to(setting.device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8)
    scheme = EDM()

    def step(x: Tensor) -> Tensor:
        sigma = scheme.sigma(torch.randn(len(x), device=x.device))
        scalings = scheme.scalings(sigma)
        skip, out, scale, weight = (v[:, None, None, None] for v in (*scalings[:3], scheme.weight(sigma)))
        noisy = x + sigma[:, None, None, None] * torch.randn_like(x)
        denoised = skip * noisy + out * network(scale * noisy, scalings.noise).sample
        return (weight * (denoised - x).square()).sum() / len(x)

    about = "UNet2DModel, the nearest: attention in every block on the way up at 16 pixels; torch.optim.Adam"
    return Trainer("diffusers", package_version("diffusers") or "", step, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size = MODELS[setting.model]
    made = [_ours(size, setting)]
    if setting.official is not None:
        made.append(_official(size, setting))
    if package_version("diffusers"):
        made.append(_diffusers(size, setting))
    return made


def images(setting: Setting) -> Tensor:
    """Noise (B, 3, 32, 32)."""
    return harness.noise(setting, setting.batch, 3, SIDE, SIDE)


def work(setting: Setting) -> Work:
    """FLOPs of one forward and backward pass of the network."""
    network = harness.recipe_task(RECIPE, _options(MODELS[setting.model]), "meta").network
    with torch.device("meta"):
        x, t = torch.empty(setting.batch, 3, SIDE, SIDE), torch.ones(setting.batch)
        flops = harness.count_flops(lambda: network(x, t).sum())
    return Work(setting.batch, 0, flops)


def loaders(setting: Setting) -> contextlib.AbstractContextManager[tuple[list[Loader], Work]]:
    """Our pipeline from JPEG files to a batch in [-1, 1]; EDM's reads pictures of the right size from a zip."""
    return diffusion.loaders(RECIPE, {}, setting)
