"""Speed of the ViT benchmark: our backbone's training step beside MIMDet's and timm's, at equal settings.

A step is whole: a plain ViT with windows and four global blocks, four taps resampled, a pyramid with BatchNorm, the sum
of the mean squares of its levels, backward, AdamW. The heads are Mask R-CNN's, timed there (`mask_rcnn`). MIMDet is a
checkout (`--official`); it needs detectron2 and einops on PYTHONPATH. timm's ViT of SAM is the nearest that can be
installed by pip: its relative positions are a product with the query for each axis, where the others add a bias.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import detection_data
from zoo.errors import ZooError
from zoo.nn.detection.vit import rescaled

RECIPE, LR = "vit_det_benchmark/train_lsj_coco", 1e-4
PACKAGES = ("timm", "torchvision")


@dataclass(frozen=True)
class Size:
    """The ViT; the pyramid has the recipe's channels."""

    image: int = 1024
    dim: int = 768
    depth: int = 12
    heads: int = 12
    window: int = 16

    @property
    def options(self) -> dict[str, Any]:
        vit = {"img_size": [self.image, self.image], "embed_dim": self.dim, "depth": self.depth}
        vit |= {"num_heads": self.heads, "window_size": self.window, "drop_path_rate": 0.0}
        given = {f"model.vit.{name}": value for name, value in vit.items()}
        return {**given, "model.init_from": None, "model.optim.lr": LR}


MODELS = {
    "vit_b": Size(),
    "vit_b_256_depth8": Size(256, depth=8, window=8),
    "tiny": Size(64, 64, 4, 2, 2),  # for the harness's own test
}
DEFAULT_MODEL = "vit_b"


def squares(maps: Any) -> Tensor:
    """The loss of all: the sum of the levels' mean squares."""
    return torch.stack([x.float().square().mean() for x in maps.values()]).sum()


def _ours(size: Size, setting: Setting) -> Trainer:
    def loss(task: Any, batch: Any) -> Tensor:
        return squares(task.network.backbone(batch["image"]))

    return harness.from_recipe(RECIPE, size.options, lambda x: {"image": x}, setting, loss=loss)


def _adamw(network: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(network.parameters(), LR, betas=(0.9, 0.999), weight_decay=0.1)


def official(size: Size, setting: Setting) -> Trainer:
    checkout = setting.official
    assert checkout is not None
    sys.modules.setdefault("detectron2._C", ModuleType("detectron2._C"))  # not built; nothing timed here calls it
    try:
        detectron2 = importlib.import_module("detectron2")
        detectron2._C = sys.modules["detectron2._C"]  # type: ignore[attr-defined]
        fpn = importlib.import_module("detectron2.modeling.backbone.fpn")
        theirs = harness.import_from(checkout, "models.benchmarking").BenchmarkingViTDet
    except ModuleNotFoundError as error:
        raise ZooError(f"MIMDet ({checkout}) wants {error.name} on PYTHONPATH") from error
    vit = theirs(
        size.window, img_size=size.image, embed_dim=size.dim, depth=size.depth, num_heads=size.heads,
        sincos_pos_embed=True, norm_layer=nn.LayerNorm,
    )  # fmt: skip
    network = fpn.FPN(vit, list(vit.output_shape()), 256, norm="BN", top_block=fpn.LastLevelMaxPool())
    network.to(setting.device).train()

    def loss(images: Tensor) -> Tensor:
        return squares(network(SimpleNamespace(tensor=images)))

    about = "hustvl/MIMDet BenchmarkingViTDet in detectron2's FPN (BN), torch.optim.AdamW"
    return Trainer("official", harness.revision(checkout), loss, _adamw(network), about)


class TimmBackbone(nn.Module):
    """timm's ViT of SAM with the taps of the others and torchvision's pyramid."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from timm.models.vision_transformer_sam import VisionTransformerSAM
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        self.ends = [size.depth // 4 * (k + 1) - 1 for k in range(4)]
        self.vit = VisionTransformerSAM(
            size.image, embed_dim=size.dim, depth=size.depth, num_heads=size.heads, num_classes=0, use_rel_pos=True,
            window_size=size.window, global_attn_indexes=tuple(self.ends), neck_chans=0,
        )  # fmt: skip
        self.adaptor = nn.ModuleList(rescaled(size.dim, k, "gn", (size.dim,) * 2) for k in (4, 2, 1, 0.5))
        self.pyramid = FeaturePyramidNetwork([size.dim] * 4, 256, LastLevelMaxPool(), nn.BatchNorm2d)

    def forward(self, images: Tensor) -> Any:
        maps = self.vit.forward_intermediates(images, self.ends, intermediates_only=True)
        return self.pyramid({str(k): layers(x) for k, (layers, x) in enumerate(zip(self.adaptor, maps, strict=True))})


def timm_sam(size: Size, setting: Setting) -> Trainer:
    network = TimmBackbone(size).to(setting.device).train()
    about = "timm VisionTransformerSAM, our resampling, torchvision's FeaturePyramidNetwork; torch.optim.AdamW"
    return Trainer("timm", package_version("timm") or "", lambda x: squares(network(x)), _adamw(network), about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. MIMDet is left out where its checkout is not given."""
    size = MODELS[setting.model]
    return [build(size, setting) for build in (_ours, *([official] if setting.official else []), timm_sam)]


def images(setting: Setting) -> Tensor:
    """Noise (B, 3, S, S)."""
    return harness.noise(setting, setting.batch, 3, *[MODELS[setting.model].image] * 2)


def work(setting: Setting) -> Work:
    """Measured FLOPs of the matrix products and convolutions."""
    size = MODELS[setting.model]
    backbone = harness.recipe_task(RECIPE, size.options, "meta").network.backbone
    batch = torch.empty(setting.batch, 3, size.image, size.image, device="meta")
    tokens = setting.batch * (size.image // 16) ** 2
    return Work(setting.batch, tokens, harness.count_flops(lambda: squares(backbone(batch))), {"image": size.image})


def loaders(setting: Setting) -> contextlib.AbstractContextManager[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files and a COCO json to a training batch, as of Mask R-CNN."""
    return detection_data.loaders("mask_rcnn/train_coco", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", setting)
