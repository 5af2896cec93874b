"""Speed of MAE: our pre-training step and data pipeline beside those of the official code, transformers and lightly.

Every network has the same sizes, sees the same images, masks 75 % of the patches, standardises the target patches and
is updated by AdamW as its own training script sets it up; nobody else's code is copied here, it is imported from where
it is installed or checked out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.environment import package_version
from benchmarks.speed.harness import Loader, Setting, Trainer, Work, count_flops, forever, photos, revision
from zoo.errors import ZooError

MASK_RATIO = 0.75
LR, BETAS, WEIGHT_DECAY = 1.5e-4, (0.9, 0.95), 0.05
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = ("transformers", "lightly")
LOADING_BATCH = 64


@dataclass(frozen=True)
class Size:
    """The sizes of a masked autoencoder, in our names."""

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16

    @property
    def patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2


MODELS = {
    "vit_base_patch16": Size(224, 16, 768, 12, 12),
    "vit_large_patch16": Size(224, 16, 1024, 24, 16),
    "vit_huge_patch14": Size(224, 14, 1280, 32, 16),
    "tiny": Size(32, 8, 32, 2, 2, 32, 1, 2),  # for the harness's own test
}
DEFAULT_MODEL = "vit_base_patch16"


def _decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The two groups of the official script: no weight decay on biases and one-dimensional parameters."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim == 1 or name.endswith(".bias"))]
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": WEIGHT_DECAY}]


def _ours_network(size: Size) -> nn.Module:
    from dataclasses import asdict

    from zoo.selfsup.mae import MaskedAutoencoder

    return MaskedAutoencoder(**asdict(size), mlp_ratio=4, norm_pix_loss=True)


def ours(size: Size, setting: Setting) -> Trainer:
    import zoo
    from zoo.training import optim

    network = _ours_network(size).to(setting.device)
    declared = optim.Optim(name="adamw", lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    optimizer = optim.make_optimizer(optim.param_groups(network, declared), declared, LR, fused=True)
    return Trainer(
        "zoo",
        zoo.__version__,
        lambda images: network.loss(images, MASK_RATIO),
        optimizer,
        "zoo.selfsup.mae: the loss and the fused AdamW of its task",
    )


@contextlib.contextmanager
def _as_when_written() -> Iterator[None]:
    """Give the official code what it expects of the libraries of 2021: `qk_scale` in timm's Block, `np.float`."""
    from timm.models import vision_transformer

    block = vision_transformer.Block

    class BlockOf2021(block):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, qk_scale: float | None = None, **kwargs: Any) -> None:
            if qk_scale is not None:
                raise ValueError("this shim knows the default scale only")
            super().__init__(*args, **kwargs)

    had_float = "float" in vars(np)
    vision_transformer.Block = BlockOf2021
    if not had_float:
        np.float = float  # type: ignore[attr-defined]
    try:
        yield
    finally:
        vision_transformer.Block = block
        if not had_float:
            del np.float  # type: ignore[attr-defined]


def _official_module(checkout: Path) -> ModuleType:
    """Import `models_mae` of a checkout of facebookresearch/mae, leaving sys.path and sys.modules as they were."""
    source = checkout / "models_mae.py"
    if not source.is_file():
        raise ZooError(f"{checkout} is no checkout of facebookresearch/mae: it has no models_mae.py")
    spec = importlib.util.spec_from_file_location("official_models_mae", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = {name: m for name, m in sys.modules.items() if name == "util" or name.startswith("util.")}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(checkout))
        for name in [n for n in sys.modules if n == "util" or n.startswith("util.")]:
            del sys.modules[name]
        sys.modules.update(before)
    return module


def official(size: Size, setting: Setting, fused_attention: bool) -> Trainer:
    assert setting.official is not None
    with _as_when_written():
        network = (
            _official_module(setting.official)
            .MaskedAutoencoderViT(
                img_size=size.img_size,
                patch_size=size.patch_size,
                embed_dim=size.embed_dim,
                depth=size.depth,
                num_heads=size.num_heads,
                decoder_embed_dim=size.decoder_embed_dim,
                decoder_depth=size.decoder_depth,
                decoder_num_heads=size.decoder_num_heads,
                mlp_ratio=4,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                norm_pix_loss=True,
            )
            .to(setting.device)
        )
    if not fused_attention:
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    optimizer = torch.optim.AdamW(_decay_groups(network), lr=LR, betas=BETAS)
    attention = "today's timm blocks" if fused_attention else "attention written out, as in the timm it was written for"
    return Trainer(
        "official" if fused_attention else "official, 2021 attention",
        revision(setting.official),
        lambda images: network(images, MASK_RATIO)[0],
        optimizer,
        f"facebookresearch/mae, {attention}; torch.optim.AdamW defaults as in its script",
    )


def transformers_vit_mae(size: Size, setting: Setting) -> Trainer:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=size.img_size,
        patch_size=size.patch_size,
        hidden_size=size.embed_dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.embed_dim,
        decoder_hidden_size=size.decoder_embed_dim,
        decoder_num_hidden_layers=size.decoder_depth,
        decoder_num_attention_heads=size.decoder_num_heads,
        decoder_intermediate_size=4 * size.decoder_embed_dim,
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    network = ViTMAEForPreTraining(config).to(setting.device).train()
    optimizer = torch.optim.AdamW(_decay_groups(network), lr=LR, betas=BETAS, fused=True)
    return Trainer(
        "transformers",
        package_version("transformers") or "",
        lambda images: network(images).loss,
        optimizer,
        "ViTMAEForPreTraining with SDPA; fused AdamW, the default of its Trainer",
    )


class _LightlyMAE(nn.Module):
    """MAE put together from lightly's parts, as its documentation describes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from lightly.models.modules import MaskedVisionTransformerTIMM
        from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
        from timm.models.vision_transformer import VisionTransformer

        vit = VisionTransformer(
            img_size=size.img_size,
            patch_size=size.patch_size,
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            num_classes=0,
        )
        self.patch_size = size.patch_size
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.embed = nn.Linear(size.embed_dim, size.decoder_embed_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=size.patches,
            embed_dim=size.decoder_embed_dim,
            depth=size.decoder_depth,
            num_heads=size.decoder_num_heads,
        )
        self.predict = nn.Linear(size.decoder_embed_dim, size.patch_size**2 * 3)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B,C,H,W) to the scalar loss."""
        from lightly.models import utils

        shape = (images.shape[0], self.decoder.sequence_length)
        keep, masked = utils.random_token_mask(size=shape, mask_ratio=MASK_RATIO, device=images.device)
        latent = self.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, shape)
        tokens = utils.set_at_index(tokens, keep, latent.type_as(tokens))
        decoded = self.decoder.decode(self.decoder.add_pos_embed(tokens))
        predicted = self.predict(utils.get_at_index(decoded, masked))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), masked - 1)
        return nn.functional.mse_loss(predicted, utils.normalize_mean_var(target))


def lightly_mae(size: Size, setting: Setting) -> Trainer:
    network = _LightlyMAE(size).to(setting.device)
    optimizer = torch.optim.AdamW(_decay_groups(network), lr=LR, betas=BETAS)
    return Trainer(
        "lightly",
        package_version("lightly") or "",
        network,
        optimizer,
        "MaskedVisionTransformerTIMM and its decoder; predicts masked patches only; torch.optim.AdamW defaults",
    )


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size = MODELS[setting.model]
    builders: list[Callable[[], Trainer]] = [lambda: ours(size, setting)]
    if setting.official is not None:
        builders.append(lambda: official(size, setting, fused_attention=True))
        builders.append(lambda: official(size, setting, fused_attention=False))
    if package_version("transformers"):
        builders.append(lambda: transformers_vit_mae(size, setting))
    if package_version("lightly"):
        builders.append(lambda: lightly_mae(size, setting))
    return [build() for build in builders]


def images(setting: Setting) -> Tensor:
    """Seeded noise images (B,3,H,W): the time of a step does not depend on what is in them."""
    side = MODELS[setting.model].img_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(setting.batch, 3, side, side, generator=generator).to(setting.device)


def work(setting: Setting) -> Work:
    """Tokens that pass the encoder (the visible quarter and cls) and the decoder (all and cls); measured FLOPs."""
    size = MODELS[setting.model]
    encoder, decoder = int(size.patches * (1 - MASK_RATIO)) + 1, size.patches + 1
    with torch.device("meta"):
        network = _ours_network(size)
        batch = torch.empty(setting.batch, 3, size.img_size, size.img_size)
        flops = count_flops(lambda: network(batch, MASK_RATIO)[0])
    detail = {"encoder_tokens": encoder, "decoder_tokens": decoder, "mask_ratio": MASK_RATIO}
    return Work(setting.batch, setting.batch * (encoder + decoder), flops, detail)


def _zoo_loader(folder: Path, side: int, batch: int) -> Loader:
    import zoo
    from zoo.data.datamodule import ImageDataModule
    from zoo.data.transforms import MAEPretrain

    module = ImageDataModule(
        dataset=str(folder), batch_size=batch, image_size=side, train_transform=MAEPretrain(side), num_workers=0, seed=0
    )
    module.setup("fit")
    return Loader(
        "zoo",
        zoo.__version__,
        forever(module.train_dataloader(), lambda b: b["image"]),
        "ImageDataModule with MAEPretrain: JPEG decoding and bicubic crop on uint8 tensors",
    )


def _official_loader(folder: Path, side: int, batch: int) -> Loader:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(side, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    loader = DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)
    return Loader(
        "official",
        f"torchvision {package_version('torchvision')}",
        forever(loader, lambda b: b[0]),
        "torchvision ImageFolder and the PIL transforms of the official script",
    )


def _timm_loader(folder: Path, side: int, batch: int) -> Loader:
    from timm.data import ImageDataset, create_transform
    from torch.utils.data import DataLoader

    transform = create_transform(
        side, is_training=True, scale=(0.2, 1.0), color_jitter=None, interpolation="bicubic", mean=MEAN, std=STD
    )
    data = ImageDataset(str(folder), transform=transform)
    loader = DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)
    return Loader(
        "timm", package_version("timm") or "", forever(loader, lambda b: b[0]), "ImageDataset, create_transform"
    )


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch, in this process (no workers), ours first."""
    side = MODELS[setting.model].img_size
    batch = LOADING_BATCH
    with photos(setting, 4 * LOADING_BATCH) as (folder, name):
        makers = (_zoo_loader, _official_loader, _timm_loader)
        yield [make(folder, side, batch) for make in makers], Work(batch, detail={"data": name, "crop": side})
