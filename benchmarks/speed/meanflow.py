"""Speed of the generation trunk and of MeanFlow's step, beside the official codes and diffusers.

`dit_*` times the trunk: one training step of a plain diffusion transformer on noise, the same for DiT, SiT and
diffusers, with the AdamW of the official scripts. `unet_cifar10` times MeanFlow's whole step on CIFAR-10,
Jacobian-vector product included, against py-meanflow. `--official` is a checkout of DiT, SiT or py-meanflow, or a
folder of several; nobody else's code is copied here.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import diffusion
from benchmarks.speed.shared.diffusion import LR

PACKAGES = ("diffusers",)
TRUNK, UNET = "meanflow/train_imagenet1k", "meanflow/train_cifar10"
CHECKOUTS = {**diffusion.TRUNKS, "py-meanflow": ("meanflow/models/meanflow.py", "meanflow/models/unet.py")}
NAMES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
MODELS: dict[str, dict[str, int]] = {  # a transformer where there are patches, else the U-Net
    "dit_b4": dict(zip(NAMES, (32, 4, 768, 12, 12), strict=True)),
    "dit_b2": dict(zip(NAMES, (32, 2, 768, 12, 12), strict=True)),
    "dit_xl2": dict(zip(NAMES, (32, 2, 1152, 28, 16), strict=True)),
    "unet_cifar10": {"img_size": 32, "model_channels": 128, "num_blocks": 4},
    "tiny": dict(zip(NAMES, (8, 2, 32, 2, 2), strict=True)),  # for the harness's own test
    "tiny_unet": {"img_size": 8, "model_channels": 8, "num_blocks": 1},
}
DEFAULT_MODEL = "dit_b4"


def _recipe(size: dict[str, int]) -> tuple[str, dict[str, Any]]:
    """The recipe of a network, and its options; the trunk, like DiT, is conditioned on one time."""
    own: dict[str, Any] = {f"model.{name}": value for name, value in size.items() if name != "img_size"}
    own |= {"data.image_size": size["img_size"], "model.optim.lr": LR}
    if "patch_size" in size:
        return TRUNK, {**own, "model.times": ["t"], "model.autoencoder": "pixels", "model.optim.betas": [0.9, 0.999]}
    return UNET, own


def _trunk(size: dict[str, int], setting: Setting) -> Trainer:
    loss = diffusion.trunk_loss(setting, size["img_size"])
    recipe, options = _recipe(size)

    def of_all(task: Any, batch: Any) -> Tensor:
        return loss(lambda z, t, y: task.network(z, (t,), y), batch["image"])

    return harness.from_recipe(recipe, options, lambda z: {"image": z}, setting, loss=of_all)


def _labels(setting: Setting) -> Tensor:
    """How the pictures were augmented: not."""
    return torch.zeros(setting.batch, 6, device=setting.device)


def _unet(size: dict[str, int], setting: Setting) -> Trainer:
    recipe, options = _recipe(size)
    augment = _labels(setting)
    return harness.from_recipe(recipe, options, lambda x: {"image": x, "augment": augment}, setting)


def official_unet(folder: Path, size: dict[str, int], setting: Setting) -> Trainer:
    models = harness.import_from(folder / "meanflow", "models.meanflow")
    # A second import forgets the first: the U-Net's module comes by the same one.
    unet = harness.import_from(folder / "meanflow", "models.unet")
    args = {"ema_decay": 0.9999, "ema_decays": [], "tr_sampler": "v0", "ratio": 0.75, "norm_p": 0.75, "norm_eps": 1e-3}
    args |= {"P_mean_t": -2.0, "P_std_t": 2.0, "P_mean_r": -2.0, "P_std_r": 2.0}
    sizes = {"img_resolution": size["img_size"], "in_channels": 3, "out_channels": 3, "augment_dim": 6, "dropout": 0.2}
    sizes |= {"model_channels": size["model_channels"], "num_blocks": size["num_blocks"], "channel_mult": [2, 2, 2]}
    sizes |= {"channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
    network = models.MeanFlow(unet.SongUNet, Namespace(**args), sizes).to(setting.device).train()
    optimizer, augment = torch.optim.Adam(network.net.parameters(), lr=LR), _labels(setting)
    about = "py-meanflow: MeanFlow.forward_with_loss, whose derivative is of the whole batch; torch.optim.Adam"
    version = harness.revision(folder)
    return Trainer("py-meanflow", version, lambda x: network.forward_with_loss(x, augment), optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size, found = MODELS[setting.model], diffusion.checkouts(setting.official, CHECKOUTS)
    if "patch_size" in size:
        return [_trunk(size, setting), *diffusion.trunks(size, found, setting)]
    theirs = [official_unet(found["py-meanflow"], size, setting)] if "py-meanflow" in found else []
    return [_unet(size, setting), *theirs]


def images(setting: Setting) -> Tensor:
    """Noise (B, C, S, S): latents for a trunk, pictures for the U-Net."""
    size = MODELS[setting.model]
    side = size["img_size"]
    return harness.noise(setting, setting.batch, 4 if "patch_size" in size else 3, side, side)


def work(setting: Setting) -> Work:
    """FLOPs of one forward and backward pass; the U-Net's Jacobian-vector product comes on top and is not counted."""
    size = MODELS[setting.model]
    network, side = harness.recipe_task(*_recipe(size), "meta").network, size["img_size"]
    tokens = (side // size["patch_size"]) ** 2 if "patch_size" in size else 0
    with torch.device("meta"):
        t, labels = torch.empty(setting.batch), torch.zeros(setting.batch, dtype=torch.long)
        x = torch.empty(setting.batch, 4 if tokens else 3, side, side)
        inputs = ((t,), labels) if tokens else ((t, t), None)
        flops = harness.count_flops(lambda: network(x, *inputs).sum())
    return Work(setting.batch, setting.batch * tokens, flops, {"tokens": tokens})


def loaders(setting: Setting) -> contextlib.AbstractContextManager[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch in [-1, 1]."""
    return diffusion.loaders(UNET, diffusion.checkouts(setting.official, CHECKOUTS), setting)
