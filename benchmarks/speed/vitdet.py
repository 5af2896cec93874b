"""Speed of ViTDet: our training step and inference beside detectron2's and transformers', at equal settings.

What is ViTDet's own is timed: ViT-B's blocks, in windows of 14 but for one global block in three, with decomposed
relative positions, without drop path. A step is whole: patches, positions, blocks, the mean square of the last map,
backward, AdamW. Pyramid and heads are Mask R-CNN's, timed there. detectron2 is a checkout (`--official`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import detection

RECIPE, LR = "vitdet/train_coco", 1e-4
Contender = tuple[nn.Module, Callable[[Tensor], Tensor], str, str]
PACKAGES = ("transformers", "fvcore")


@dataclass(frozen=True)
class Size:
    """Side of the image in pixels and blocks of the ViT, of which every third is global."""

    side: int
    depth: int
    width: int = 768
    heads: int = 12
    window: int = 14

    @property
    def windowed(self) -> list[int]:
        return [k for k in range(self.depth) if k % 3 != 2]

    @property
    def options(self) -> dict[str, Any]:
        own = {
            "img_size": self.side, "depth": self.depth, "embed_dim": self.width, "num_heads": self.heads,
            "window_size": self.window, "global_blocks": list(range(2, self.depth, 3)), "drop_path": 0.0,
        }  # fmt: skip
        return {f"model.vit.{name}": value for name, value in own.items()} | {"model.init_from": None}


MODELS = {
    "blocks_b": Size(512, 3),
    "tiny": Size(64, 3, 16, 2, 3),  # for the harness's own test
}
DEFAULT_MODEL = "blocks_b"


def _vit(size: Size, device: str = "cpu") -> Any:
    return harness.recipe_task(RECIPE, size.options, device).network.backbone.bottom_up


def _trainer(name: str, version: str, network: nn.Module, last: Callable[[Tensor], Tensor], about: str) -> Trainer:
    """Mean square of the last map under AdamW with two groups of weight decay."""
    optimizer = torch.optim.AdamW(param_groups_weight_decay(network, 0.1), LR, betas=(0.9, 0.999), fused=True)
    return Trainer(name, version, lambda x: last(x).float().square().mean(), optimizer, f"{about}; fused AdamW")


def _ours(size: Size, setting: Setting) -> Contender:
    import zoo

    network = _vit(size)
    return network, lambda x: network(x)["last"], zoo.__version__, "zoo.nn.detection.vit.ViTBackbone"


def _official(size: Size, setting: Setting) -> Contender:
    checkout = setting.official
    assert checkout is not None
    network = detection.detectron2(checkout, "detectron2.modeling.backbone.vit").ViT(
        img_size=size.side, embed_dim=size.width, depth=size.depth, num_heads=size.heads, window_size=size.window,
        window_block_indexes=size.windowed, use_rel_pos=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        out_feature="last",
    )  # fmt: skip
    network.load_state_dict(_vit(size).state_dict())  # the same names and sizes
    about = "facebookresearch/detectron2's modeling.backbone.vit.ViT"
    return network, lambda x: network(x)["last"], harness.revision(checkout), about


def _transformers(size: Size, setting: Setting) -> Contender:
    from transformers import VitDetBackbone, VitDetConfig

    config = VitDetConfig(
        hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.heads, image_size=size.side,
        pretrain_image_size=224, window_size=size.window, window_block_indices=size.windowed,
        use_relative_position_embeddings=True, out_indices=[size.depth],
    )  # fmt: skip
    network, version = VitDetBackbone(config), package_version("transformers") or ""
    return network, lambda x: network(x).feature_maps[-1], version, "transformers' VitDetBackbone"


def _contenders(setting: Setting) -> Iterator[tuple[str, Contender]]:
    size = MODELS[setting.model]
    yield "zoo", _ours(size, setting)
    if setting.official is not None:
        yield "official", _official(size, setting)
    if package_version("transformers"):
        yield "transformers", _transformers(size, setting)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first; detectron2 where its checkout is given, transformers where it is installed."""
    return [
        _trainer(name, version, network.train().to(setting.device), last, about)
        for name, (network, last, version, about) in _contenders(setting)
    ]


def images(setting: Setting) -> Tensor:
    """Noise (B,3,S,S)."""
    return harness.noise(setting, setting.batch, 3, *[MODELS[setting.model].side] * 2)


def work(setting: Setting) -> Work:
    """FLOPs of our network, which takes relative positions as further channels of the scores' product."""
    size = MODELS[setting.model]
    with torch.device("meta"):
        network = _vit(size, "meta")
        batch = torch.empty(setting.batch, 3, size.side, size.side)
        flops = harness.count_flops(lambda: network(batch)["last"].square().mean())
    tokens = setting.batch * (size.side // 16) ** 2
    return Work(setting.batch, tokens=tokens, flops=flops, detail={"image": size.side, "blocks": size.depth})


def samplers(setting: Setting) -> tuple[list[Loader], Work]:
    """Inference: the last map of a batch, in the given precision, without gradients."""
    pixels, mixed = images(setting), setting.torch_dtype is not torch.float32

    device = setting.device.split(":")[0]

    def forever(last: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        while True:
            with torch.no_grad(), torch.autocast(device, setting.torch_dtype, enabled=mixed):
                found = last(pixels)
            yield found

    found = []
    for name, (network, last, version, about) in _contenders(setting):
        network.eval().to(setting.device)
        found.append(Loader(name, version, forever(last), f"{about}, inference"))
    return found, Work(setting.batch, detail={"title": f"inference, {setting.model}, {setting.dtype}"})
