"""Speed of DiffMAE's pre-training step: ours beside MAE's, and a reimplementation by path (there is no official code).

Every network has the same encoder and a decoder of as many blocks of the same width, sees the same images, masks 75 %
of the patches, regresses standardised patches and is updated by AdamW. kimdanni/DiffMAE (CC BY-NC 4.0, on CrossMAE) is
run from a checkout that `--official` names; nobody else's code is copied here.
"""

from __future__ import annotations

import contextlib
import io
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from benchmarks.speed import harness, mae
from benchmarks.speed.harness import Setting, Trainer, Work
from benchmarks.speed.mae import LR, MASK_RATIO, recipe_options

RECIPE = "diffmae/pretrain_imagenet1k"
PACKAGES = ("timm", "diffusers")
MODELS, DEFAULT_MODEL = mae.MODELS, mae.DEFAULT_MODEL


def reimplementation(size: dict[str, int], setting: Setting) -> Trainer:
    """Its cross-self decoder, which reads learned mixtures of all encoder layers."""
    assert setting.official is not None
    options: dict[str, Any] = {"weight_fm": True, "self_attn": True, "norm_pix_loss": True, "mlp_ratio": 4}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
        module = harness.import_from(setting.official, "models_cross")
        network = module.MaskedAutoencoderViT(**size, **options, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    network = network.to(setting.device).train()

    def loss(images: Tensor) -> Tensor:
        """Its forward without its autocast, which is of CUDA alone; the dtype is everyone's."""
        latent, mask, ids_restore, places = network.forward_encoder(images, MASK_RATIO)
        predicted, _ = network.forward_decoder(images, latent, mask, ids_restore, places, MASK_RATIO)
        return network.forward_loss(images, predicted, mask, places)

    optimizer = torch.optim.AdamW(param_groups_weight_decay(network, 0.05), lr=LR, betas=(0.9, 0.95))
    about = "kimdanni/DiffMAE, cross-attention to learned mixtures of encoder layers; torch.optim.AdamW defaults"
    return Trainer("kimdanni/DiffMAE", harness.revision(setting.official), loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first."""
    size = MODELS[setting.model]
    found = [harness.from_recipe(RECIPE, recipe_options(size), lambda images: {"image": images}, setting)]
    twin = harness.from_recipe(mae.RECIPE, recipe_options(size), lambda images: {"image": images}, setting)
    twin.name = "zoo, MAE"
    found.append(twin)
    return found + ([reimplementation(size, setting)] if setting.official is not None else [])


def images(setting: Setting) -> Tensor:
    """Noise (B,3,H,W)."""
    side = MODELS[setting.model]["img_size"]
    return harness.noise(setting, setting.batch, 3, side, side)


def work(setting: Setting) -> Work:
    """Tokens that pass the encoder (the visible quarter and cls) and the decoder (the hidden ones); measured FLOPs."""
    size = MODELS[setting.model]
    network, side = harness.recipe_task(RECIPE, recipe_options(size), "meta").network, size["img_size"]
    batch, length = torch.empty(setting.batch, 3, side, side, device="meta"), network.num_patches
    draws = [torch.empty(setting.batch, length, device="meta")]
    draws += [torch.ones(setting.batch, dtype=torch.long, device="meta")]
    draws += [torch.empty(setting.batch, length, network.patch_values, device="meta")]
    flops = harness.count_flops(lambda: network.loss(batch, *draws))
    encoder = int(length * (1 - MASK_RATIO)) + 1
    decoder = length + 1 - encoder
    detail = {"encoder_tokens": encoder, "decoder_tokens": decoder, "mask_ratio": MASK_RATIO}
    return Work(setting.batch, setting.batch * (encoder + decoder), flops, detail)
