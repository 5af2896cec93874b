"""ViTDet: Exploring Plain Vision Transformer Backbones for Object Detection.

Yanghao Li, Hanzi Mao, Ross Girshick, Kaiming He. ECCV 2022, arXiv 2203.16527.

A plain, single-scale ViT that was pre-trained as a masked autoencoder becomes a detector's backbone by what fine-tuning
adds: a pyramid whose levels are all made of the last map, by transposed convolutions and pooling in parallel, without
lateral connections; and attention in windows that do not shift, with four blocks that carry news between them, by
global attention or by convolutions that start as the identity. Mask R-CNN or Cascade Mask R-CNN stands on top, with
channel LayerNorm in pyramid and heads.

Conventions: as in :mod:`zoo.detection.mask_rcnn`; RGB images, padded at the right and below to a square; tokens of 16
pixels; blocks counted from 0.

Where the parts are: windows, relative positions and propagation in :mod:`zoo.nn.detection.vit`, heads and their losses
in :mod:`zoo.nn.detection.roi_heads`.

Deviations from detectron2's code, none of which changes a value beyond rounding:
- Relative positions are further channels of queries and keys, not a second pass over the scores.
- Padding of windows is zeros behind the projection, whose biases of keys and values are applied to match.
- Any image whose sides are multiples of 32 goes through; the published code takes none above its square of 1024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d
from torchvision.ops import Conv2dNormActivation

from zoo.errors import ZooError, unknown
from zoo.nn.detection import (
    RCNN,
    RPN,
    BoxHeadConfig,
    MaskHeadConfig,
    RoIConfig,
    RoIHeads,
    RPNConfig,
    configured,
)
from zoo.nn.detection.backbone import Norm, norm_layer
from zoo.nn.detection.vit import ViTBackbone, ViTConfig, rescaled
from zoo.ops.pos_embed import resize_pos_embed
from zoo.selfsup.mae import convert_official as convert_mae
from zoo.training import Optim
from zoo.training.detection import Detection, MetricName
from zoo.training.tta import TTA
from zoo.weights import detectron2
from zoo.weights.pretrained import fill, read_source

PyramidKind = Literal["simple", "fpn", "last_fpn", "none"]

# --------------------------------------------------------------------------------------------------------- 1. network


@dataclass(frozen=True)
class PyramidConfig:
    """Levels p2 to p6 on a ViT (section 3; figure 2; Table 1).

    Args:
        kind: `simple`: every level of the last map (figure 2c); `last_fpn`: the same with FPN's top-down sums (2b);
            `fpn`: likewise, of the maps after each quarter of the blocks (2a); `none`: p4 alone.
        channels: of every level.
        norm: after each of its convolutions; null for none.
    """

    kind: PyramidKind = "simple"
    channels: int = 256
    norm: Norm | None = "ln"

    def __post_init__(self) -> None:
        if self.kind not in get_args(PyramidKind):
            raise unknown("pyramid", str(self.kind), get_args(PyramidKind))


class ViTPyramid(nn.Module):
    """A ViT and the levels on it: each the map at a scale of its own, then a 1x1 and a 3x3 convolution.

    Args:
        vit, pyramid: what stands here.

    Attributes:
        channels, strides: of the levels by name.
    """

    def __init__(self, vit: ViTConfig, pyramid: PyramidConfig) -> None:
        super().__init__()
        kind, self.top_down = pyramid.kind, pyramid.kind in ("fpn", "last_fpn")
        if kind == "fpn" and vit.depth % 4:
            raise ZooError(f"the pyramid fpn takes a map after each quarter of the blocks; {vit.depth} have none")
        factors = {"p2": 4, "p3": 2, "p4": 1, "p5": 0.5} if kind != "none" else {"p4": 1}
        quarters = {f"p{k + 1}": vit.depth * k // 4 - 1 for k in range(1, 5)}
        self.source = {name: name if kind == "fpn" else "last" for name in factors}
        self.bottom_up = ViTBackbone(vit, quarters if kind == "fpn" else None)
        self.scale, self.lateral, self.output = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        norm = norm_layer(pyramid.norm)
        for name, factor in factors.items():
            scaling = rescaled(vit.embed_dim, factor, pyramid.norm)
            inputs: Any = scaling.out_channels
            self.scale[name] = scaling
            for part, kernel in ((self.lateral, 1), (self.output, 3)):
                part[name] = Conv2dNormActivation(
                    inputs, pyramid.channels, kernel, norm_layer=norm, activation_layer=None
                )
                inputs = pyramid.channels
        self.strides = {name: round(vit.patch_size / factor) for name, factor in factors.items()}
        if kind != "none":
            self.strides["p6"] = 2 * self.strides["p5"]
        self.channels = dict.fromkeys(self.strides, pyramid.channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W), sides multiples of the patch, to the levels."""
        maps = self.bottom_up(images)
        levels: dict[str, Tensor] = {}
        above: Tensor | None = None
        for name in reversed(list(self.lateral)):
            x = self.lateral[name](self.scale[name](maps[self.source[name]]))
            if self.top_down and above is not None:
                x = x + interpolate(above, size=x.shape[-2:], mode="nearest")
            above = x
            levels[name] = self.output[name](x)
        ordered = dict(reversed(levels.items()))
        if "p6" in self.strides:
            ordered["p6"] = max_pool2d(ordered["p5"], kernel_size=1, stride=2)
        return ordered


class ViTDet(RCNN):
    """A plain ViT, a pyramid of its last map, and the heads of Mask R-CNN or of its cascade.

    As it stands ViTDet-B with Mask R-CNN. Every part is a config; in Python a mapping of its fields will do.

    Args:
        num_classes: K, without the background.
        vit: the backbone.
        pyramid: the levels on it. `none` wants five anchor sizes on one level (`rpn.sizes`).
        rpn: proposals.
        roi: samples, and what is reported.
        box: the box head; with `cascade_ious` a cascade of them.
        mask: the mask head; null for none.

    Attributes:
        options: all of these, as they came to be.

    Raises:
        ZooError: an unknown option or name, or parts that do not go together.
    """

    def __init__(
        self,
        num_classes: int = 80,
        vit: ViTConfig = ViTConfig(),  # noqa: B008
        pyramid: PyramidConfig = PyramidConfig(),
        rpn: RPNConfig = RPNConfig(conv_channels=(-1, -1)),  # noqa: B008
        roi: RoIConfig = RoIConfig(),  # noqa: B008
        box: BoxHeadConfig = BoxHeadConfig(convs=4, fcs=1, norm="ln"),  # noqa: B008
        mask: MaskHeadConfig | None = MaskHeadConfig(norm="ln"),  # noqa: B008
    ) -> None:
        vit, pyramid, rpn = configured(ViTConfig, vit), configured(PyramidConfig, pyramid), configured(RPNConfig, rpn)
        roi, box = configured(RoIConfig, roi), configured(BoxHeadConfig, box)
        mask = None if mask is None else configured(MaskHeadConfig, mask)
        backbone = ViTPyramid(vit, pyramid)
        pooled = [name for name in backbone.channels if name != "p6"]
        if roi.levels is None:
            roi = replace(roi, levels=tuple(pooled))
        heads = RoIHeads(backbone, num_classes, roi, box, mask)
        super().__init__(backbone, RPN(backbone, rpn), heads)
        self.num_classes = num_classes
        parts = {"vit": vit, "pyramid": pyramid, "rpn": rpn, "roi": roi, "box": box, "mask": mask}
        self.options: dict[str, Any] = {"num_classes": num_classes, **parts}

    @property
    def size_divisibility(self) -> int:
        """What the sides of a padded batch are multiples of: the square that its positions are made for."""
        vit: ViTConfig = self.options["vit"]
        return vit.img_size

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What COCO measures of it: "bbox", and "segm" with masks."""
        return ("bbox", "segm") if self.roi_heads.mask_head is not None else ("bbox",)

    @property
    def num_layer_ids(self) -> int:
        """Layers for layer-wise learning rates: embedding, blocks, and all that stands on them."""
        vit: Any = self.backbone.bottom_up
        return vit.num_layer_ids

    def layer_id(self, name: str) -> int:
        """The layer of parameter `name`, as of :meth:`zoo.nn.detection.vit.ViTBackbone.layer_id`."""
        vit: Any = self.backbone.bottom_up
        return vit.layer_id(name.removeprefix("backbone.bottom_up.")) if _of_vit(name) else self.num_layer_ids - 1

    def weight_decay_too(self) -> set[str]:
        """Of the norms, those over channels: `optim.no_decay: norm` spares the ViT's own alone, as detectron2's does,
        which does not know its channel LayerNorm for a norm."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, LayerNorm2d)
            for name, _ in module.named_parameters()
        }


def _of_vit(name: str) -> bool:
    return name.startswith("backbone.bottom_up.")


# ------------------------------------------------------------------------------------------------------------ 2. task


class ViTDetDetection(Detection):
    """Training and evaluation of a :class:`ViTDet`.

    Args:
        init_from: where :meth:`setup` takes weights from: the name of published weights, a file, or a checkpoint. Of
            MAE (and of a ViT of its layout) the blocks are filled; of a ViTDet everything but layers of another number
            of classes. Tables of positions are resized, and so are the filters of patches of another size.
        metric: whose average precision is evaluated: `coco`, or `lvis` with what it says of each picture.
        tta: views of an image that are merged in evaluation; null for the image as it is.
        optim: optimiser and schedule.
        network: of :class:`ViTDet`.
    """

    network: ViTDet

    def __init__(
        self,
        init_from: str | None = None,
        metric: MetricName = "coco",
        tta: TTA | None = None,
        optim: Optim = Optim(  # noqa: B008
            name="adamw", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1, no_decay="norm", layer_decay=0.7,
            schedule="step",
        ),
        **network: Any,
    ) -> None:  # fmt: skip
        detector = ViTDet(**network)
        super().__init__(detector, optim, detector.iou_types, init_from=init_from, metric=metric, tta=tta)
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        load_weights(self.network, source)


# ---------------------------------------------------------------------------------------------------------- 3. models

_L = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "drop_path": 0.4, "global_blocks": (5, 11, 17, 23)}
_H = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "drop_path": 0.5, "global_blocks": (7, 15, 23, 31)}
_HEADS: dict[str, Any] = {
    "rpn": {"conv_channels": (-1, -1)},
    "box": {"convs": 4, "fcs": 1, "norm": "ln"},
    "mask": {"norm": "ln"},
}
_CASCADE: dict[str, Any] = {
    **_HEADS,
    "box": {
        **_HEADS["box"],
        "class_agnostic": True,
        "cascade_ious": (0.5, 0.6, 0.7),
        "cascade_weights": ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
    },
}


def _build(vit: Mapping[str, Any], heads: Mapping[str, Any], overrides: Mapping[str, Any]) -> ViTDet:
    parts: dict[str, Any] = {"vit": vit, **heads}
    for name, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(parts.get(name), Mapping)
        parts[name] = {**parts[name], **value} if both else value
    return ViTDet(**parts)


def mask_rcnn_vitdet_b(**overrides: Any) -> ViTDet:
    """ViTDet-B with Mask R-CNN."""
    return _build({}, _HEADS, overrides)


def mask_rcnn_vitdet_l(**overrides: Any) -> ViTDet:
    """ViTDet-L with Mask R-CNN."""
    return _build(_L, _HEADS, overrides)


def mask_rcnn_vitdet_h(**overrides: Any) -> ViTDet:
    """ViTDet-H with Mask R-CNN."""
    return _build(_H, _HEADS, overrides)


def cascade_mask_rcnn_vitdet_b(**overrides: Any) -> ViTDet:
    """ViTDet-B with Cascade Mask R-CNN."""
    return _build({}, _CASCADE, overrides)


def cascade_mask_rcnn_vitdet_l(**overrides: Any) -> ViTDet:
    """ViTDet-L with Cascade Mask R-CNN."""
    return _build(_L, _CASCADE, overrides)


def cascade_mask_rcnn_vitdet_h(**overrides: Any) -> ViTDet:
    """ViTDet-H with Cascade Mask R-CNN."""
    return _build(_H, _CASCADE, overrides)


def _trunk(size: Mapping[str, Any], overrides: Mapping[str, Any]) -> ViTBackbone:
    return ViTBackbone(configured(ViTConfig, {**size, "rel_pos": None, **overrides}))


def vit_base_patch16_trunk(**overrides: Any) -> ViTBackbone:
    """The blocks of ViT-B/16 that detectors start from; no relative positions yet."""
    return _trunk({}, overrides)


def vit_large_patch16_trunk(**overrides: Any) -> ViTBackbone:
    """The blocks of ViT-L/16 that detectors start from; no relative positions yet."""
    return _trunk(_L, overrides)


def vit_huge_patch16_trunk(**overrides: Any) -> ViTBackbone:
    """The blocks of ViT-H with patches of 16 pixels that detectors start from; no relative positions yet."""
    return _trunk(_H, overrides)


# ------------------------------------------------------------------------------------------------ 4. official weights

_OURS = re.compile(r"(?:backbone|rpn\.head|roi_heads)\..+")
_CLASS_LAYERS = re.compile(
    r"roi_heads\.(?:box_predictors\.\d\.\w+|mask_head\.predictor)\.(?:weight|bias)"
    r"|roi_heads\.box_predictors\.\d\.fed_loss_cls_weights"
)
_LEAF = r"(?:(norm)\.)?(weight|bias)"
_VIT = re.compile(
    r"backbone\.net\.(pos_embed|patch_embed\.proj\.(?:weight|bias)|blocks\.\d+\."
    r"(?:(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12]|residual\.(?:conv|norm)[123])\.(?:weight|bias)|attn\.rel_pos_[hw]))"
)
# Of each level the places of its rescaling, and where the two convolutions stand behind them.
_SCALING = {"2": ("013", 4), "3": ("0", 1), "4": ("", 0), "5": ("", 1)}
_SIMFP = re.compile(rf"backbone\.simfp_([2-5])\.(\d)\.{_LEAF}")
_FRESH = re.compile(r"\.rel_pos_[hw]$|\.residual\.|_rel_pos_bias\.|\.ls[12]\.")


def backbone_name(key: str) -> str | None:
    """A ViT (`backbone.net`) and the simple pyramid on it (`backbone.simfp_2` to `simfp_5`)."""
    if match := _VIT.fullmatch(key):
        return f"backbone.bottom_up.{match[1]}"
    if match := _SIMFP.fullmatch(key):
        level, place, norm, leaf = match.groups()
        scaling, first = _SCALING[level]
        if place in scaling:
            return None if norm else f"backbone.scale.p{level}.{place}.{leaf}"
        part = {first: "lateral", first + 1: "output"}.get(int(place))
        return part and f"backbone.{part}.p{level}.{int(bool(norm))}.{leaf}"
    return None


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViTDet of detectron2's model zoo in our names. Our own names are left as they are.

    Raises:
        ZooError: a key of no such detector.
    """
    if any(key.startswith("rpn.head.") for key in state_dict):
        return detectron2.ours(state_dict, _OURS)
    rules = (backbone_name, detectron2.rpn_name, detectron2.roi_name)
    return detectron2.rename(
        {key: value for key, value in state_dict.items() if key not in ("pixel_mean", "pixel_std")},
        rules,
        "detectron2's ViTDet",
    )


def convert_trunk(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The patches, positions and blocks of an MAE encoder in the names of :class:`~zoo.nn.detection.vit.ViTBackbone`;
    class token, final norm, decoder and head are left out.

    Raises:
        ZooError: a key of no MAE checkpoint.
    """
    parts = ("patch_embed.", "pos_embed", "blocks.")
    return {key: value for key, value in convert_mae(state_dict).items() if key.startswith(parts)}


def resized_tables(network: ViTDet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `state` in our names with the tables of the network's size: absolute positions (bicubic), relative ones
    (linear), and the filters of patches (bicubic)."""
    own, found = network.state_dict(), dict(state)
    for key, value in state.items():
        if key not in own or value.shape == own[key].shape or not _of_vit(key):
            continue
        wanted, leaf = own[key].shape, key.rpartition(".")[2]
        if leaf == "pos_embed":
            config = network.options["vit"]
            found[key] = resize_pos_embed(value, (config.pos_grid,) * 2, int(config.class_slot))
        elif leaf in ("rel_pos_h", "rel_pos_w") and value.shape[1] == wanted[1]:
            found[key] = interpolate(value.T[None], size=wanted[0], mode="linear")[0].T
        elif key.endswith("patch_embed.proj.weight") and value.shape[:2] == wanted[:2]:
            found[key] = interpolate(value, size=tuple(wanted[2:]), mode="bicubic", align_corners=False)
    return found


def load_weights(network: ViTDet, source: str | Path) -> None:
    """Fill `network` from a detector or from a pre-trained ViT.

    Of a detector, the last layers keep their fresh weights where the number of classes differs; everything else must
    match. Of a ViT, patches, positions and blocks are filled; relative positions and propagating convolutions start
    fresh.

    Args:
        network: any size; see :func:`resized_tables`.
        source: the name of published weights (of ViTDet, or `mae_vit_*` and `vit_*.mae_*`), a published file, or a
            checkpoint of ours.

    Raises:
        ZooError: the file is missing, or does not match.
    """
    state = read_source(source)
    if any(key.startswith(("rpn.head.", "proposal_generator.")) for key in state):
        converted = resized_tables(network, convert_official(state))
        detectron2.fill_detector(network, converted, source, _CLASS_LAYERS)
        return
    named = {f"backbone.bottom_up.{key}": value for key, value in convert_trunk(state).items()}
    fill(network, resized_tables(network, named), source, lambda key: _of_vit(key) and _FRESH.search(key) is None)
