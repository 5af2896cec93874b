"""Speed of MAE: our pre-training step and data pipeline beside those of the official code, transformers and lightly.

Every network has the same sizes, sees the same images, masks 75 % of the patches, standardises the target patches and
is updated by AdamW as its own training script sets it up; nobody else's code is copied here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import vision_transformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared.old_libraries import as_in_2021

RECIPE, MASK_RATIO, LR = "mae/pretrain_imagenet1k", 0.75, 1.5e-4
PACKAGES, LOADING_BATCH = ("transformers", "lightly"), 64
NAMES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
NAMES += ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
MODELS: dict[str, dict[str, int]] = {
    name: dict(zip(NAMES, sizes, strict=True))
    for name, sizes in {
        "vit_base_patch16": (224, 16, 768, 12, 12, 512, 8, 16),
        "vit_large_patch16": (224, 16, 1024, 24, 16, 512, 8, 16),
        "vit_huge_patch14": (224, 14, 1280, 32, 16, 512, 8, 16),
        "tiny": (32, 8, 32, 2, 2, 32, 1, 2),  # for the harness's own test
    }.items()
}
DEFAULT_MODEL = "vit_base_patch16"


def recipe_options(size: dict[str, int]) -> dict[str, Any]:
    """Those of a recipe of MAE's shape, for a network of this size."""
    own = {f"model.{name}": value for name, value in size.items() if name != "img_size"}
    return {**own, "data.image_size": size["img_size"], "model.mask_ratio": MASK_RATIO, "model.optim.lr": LR}


def _adamw(network: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """With the two groups of the official script: no weight decay on biases and one-dimensional parameters."""
    return torch.optim.AdamW(param_groups_weight_decay(network, 0.05), lr=LR, betas=(0.9, 0.95), **options)


def official(size: dict[str, int], setting: Setting, fused_attention: bool) -> Trainer:
    assert setting.official is not None
    options = {"mlp_ratio": 4, "norm_layer": partial(nn.LayerNorm, eps=1e-6), "norm_pix_loss": True}
    with as_in_2021():
        module = harness.import_from(setting.official, "models_mae")
        network = module.MaskedAutoencoderViT(**size, **options).to(setting.device)
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = module.fused_attn and fused_attention
    attention = "today's timm blocks" if fused_attention else "attention written out, as in the timm it was written for"
    name = "official" if fused_attention else "official, 2021 attention"
    about = f"facebookresearch/mae, {attention}; torch.optim.AdamW defaults as in its script"
    version = harness.revision(setting.official)
    return Trainer(name, version, lambda images: network(images, MASK_RATIO)[0], _adamw(network), about)


def transformers_vit_mae(size: dict[str, int], setting: Setting) -> Trainer:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # in NAMES' order
    names += ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads")
    options: dict[str, Any] = dict(zip(names, (size[name] for name in NAMES), strict=True))
    options |= {"intermediate_size": 4 * size["embed_dim"], "decoder_intermediate_size": 4 * size["decoder_embed_dim"]}
    options |= {"mask_ratio": MASK_RATIO, "norm_pix_loss": True, "attn_implementation": "sdpa"}
    network = ViTMAEForPreTraining(ViTMAEConfig(**options)).to(setting.device).train()
    about = "ViTMAEForPreTraining with SDPA; fused AdamW, the default of its Trainer"
    optimizer = _adamw(network, fused=True)
    return Trainer("transformers", package_version("transformers") or "", lambda x: network(x).loss, optimizer, about)


def lightly_mae(size: dict[str, int], setting: Setting) -> Trainer:
    """MAE put together from lightly's parts, as its documentation describes."""
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM

    of_decoder = {name: size[f"decoder_{name}"] for name in ("embed_dim", "depth", "num_heads")}
    of_encoder = {name: value for name, value in size.items() if not name.startswith("decoder")}
    vit = vision_transformer.VisionTransformer(**of_encoder, num_classes=0)  # type: ignore[arg-type]
    side, width = size["patch_size"], of_decoder["embed_dim"]
    parts = {
        "encoder": MaskedVisionTransformerTIMM(vit=vit),
        "embed": nn.Linear(size["embed_dim"], width),
        "decoder": MaskedVisionTransformerDecoderTIMM(num_patches=(size["img_size"] // side) ** 2, **of_decoder),
        "predict": nn.Linear(width, side**2 * 3),
    }
    network: Any = nn.ModuleDict(parts).to(setting.device)
    decoder = network["decoder"]

    def loss(images: Tensor) -> Tensor:
        shape = (images.shape[0], decoder.sequence_length)
        keep, masked = utils.random_token_mask(size=shape, mask_ratio=MASK_RATIO, device=images.device)
        latent = network["embed"](network["encoder"].encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, shape)
        tokens = utils.set_at_index(tokens, keep, latent.type_as(tokens))
        decoded = decoder.decode(decoder.add_pos_embed(tokens))
        predicted = network["predict"](utils.get_at_index(decoded, masked))
        target = utils.get_at_index(utils.patchify(images, side), masked - 1)
        return nn.functional.mse_loss(predicted, utils.normalize_mean_var(target))

    about = "MaskedVisionTransformerTIMM and its decoder; predicts masked patches only; torch.optim.AdamW defaults"
    return Trainer("lightly", package_version("lightly") or "", loss, _adamw(network), about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size = MODELS[setting.model]
    found = [harness.from_recipe(RECIPE, recipe_options(size), lambda images: {"image": images}, setting)]
    if setting.official is not None:
        found += [official(size, setting, fused_attention=fused) for fused in (True, False)]
    peers: dict[str, Callable[..., Trainer]] = {"transformers": transformers_vit_mae, "lightly": lightly_mae}
    return found + [build(size, setting) for name, build in peers.items() if package_version(name)]


def images(setting: Setting) -> Tensor:
    """Noise (B,3,H,W)."""
    side = MODELS[setting.model]["img_size"]
    return harness.noise(setting, setting.batch, 3, side, side)


def work(setting: Setting) -> Work:
    """Tokens that pass the encoder (the visible quarter and cls) and the decoder (all and cls); measured FLOPs."""
    size = MODELS[setting.model]
    network, side = harness.recipe_task(RECIPE, recipe_options(size), "meta").network, size["img_size"]
    batch = torch.empty(setting.batch, 3, side, side, device="meta")
    flops = harness.count_flops(lambda: network(batch, MASK_RATIO)[0])
    encoder, decoder = int(network.num_patches * (1 - MASK_RATIO)) + 1, network.num_patches + 1
    detail = {"encoder_tokens": encoder, "decoder_tokens": decoder, "mask_ratio": MASK_RATIO}
    return Work(setting.batch, setting.batch * (encoder + decoder), flops, detail)


def loaders(setting: Setting) -> contextlib.AbstractContextManager[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch, in this process (no workers), ours first."""
    size = MODELS[setting.model]
    official = ("official", "torchvision ImageFolder and the PIL transforms of the official script")
    common: Any = (setting, size["img_size"], LOADING_BATCH)
    return harness.crop_loaders(RECIPE, recipe_options(size), *common, official, scale=(0.2, 1.0))
