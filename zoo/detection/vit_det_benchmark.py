"""Benchmarking Detection Transfer Learning with Vision Transformers.

Yanghao Li, Saining Xie, Xinlei Chen, Piotr Dollár, Kaiming He, Ross Girshick. Technical report 2021, arXiv 2111.11429.

A plain ViT becomes the backbone of Mask R-CNN, so that ways to pre-train it can be compared on COCO. Four maps of
stride 4 to 32 are made from four of its depths, each after a quarter of the blocks, by transposed convolutions and
pooling; a pyramid with BatchNorm stands on them. Attention is within windows but for the last block of each quarter.
All else is one recipe for everyone: large-scale jitter, AdamW, stochastic depth; rate, decay, depth rate and length
are searched for each initialisation. Pre-training by masking (BEiT, MAE) is the first without labels to beat labels.

Conventions: boxes and classes as in :mod:`zoo.detection.mask_rcnn`; tokens (B, H, W, D) on the grid of patches, no
class token; maps c2..c5 of the ViT of stride patch/4 to 2 patch, whatever they are in pixels; block i counts from 0.

No official code was published. "[H]" is hustvl/MIMDet, which reproduces the row of MAE; what the paper's text was not
at hand for follows it, and each such place is in the card's ledger: windows of 16, how maps are resampled, where global
blocks stand, the optimiser's values, the start of a random network.

Choices of ours:
- A file's position table is resized and trains; [H] puts a transposed sine-cosine table in its place
  (`vit.positions: sincos_transposed` with `file_positions: false`).
- Stochastic depth is drawn for each picture; [H] draws it for each window in windowed blocks.
- A window that does not divide the grid (14 of 64) is padded with zeros after the norm; [H] refuses it.
- Windows are cut inside the attention, and the bias of positions is read out of its table once a forward for all blocks
  of a kind: the same values. Blocks are those of :mod:`zoo.nn.detection.vit`, shared with ViTDet.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from timm.layers import lecun_normal_
from torch import Tensor, nn

from zoo.detection.mask_rcnn import MaskRCNN
from zoo.errors import ZooError, unknown
from zoo.nn.detection import (
    FPN,
    RCNN,
    RPN,
    BoxHeadConfig,
    FPNConfig,
    MaskHeadConfig,
    RoIConfig,
    RoIHeads,
    RPNConfig,
    Subsample,
    configured,
)
from zoo.nn.detection import vit as vit_layers
from zoo.nn.detection.rpn import Proposals
from zoo.ops.pos_embed import resize_pos_embed, sincos_2d
from zoo.training import Optim
from zoo.training.detection import Detection
from zoo.weights import detectron2
from zoo.weights.pretrained import fill, read_source

Positions = Literal["sincos", "sincos_transposed", "normal", "zero"]

# ------------------------------------------------------------------------------------------------------- 1. functions


def position_table(positions: Positions, embed_dim: int, grid: tuple[int, int]) -> Tensor:
    """The table (1, H W, D) that a network starts with: MAE's sines and cosines, these with the halves for rows and
    columns exchanged ([H]), normal numbers of deviation 0.02, or zeros.

    Raises:
        ZooError: another name.
    """
    if positions not in get_args(Positions):
        raise unknown("positions", positions, get_args(Positions))
    if positions.startswith("sincos"):
        return sincos_2d(embed_dim, grid, rows_first=positions == "sincos_transposed")
    table = torch.zeros(1, grid[0] * grid[1], embed_dim)
    return nn.init.trunc_normal_(table, std=0.02) if positions == "normal" else table


def fitted_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A pre-trained table (1, prefix + S S, D) without its prefix (class token and the like), resized to `grid`
    (bicubic): (1, H W, D)."""
    prefix = table.shape[1] - math.isqrt(table.shape[1]) ** 2
    return resize_pos_embed(table[:, prefix:], grid, num_prefix=0)


def fitted_bias(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """BEiT's shared table ((2S - 1)^2 + 3, heads) without the rows of its class token, the last three, resized to that
    of `grid` (bicubic): ((2H - 1)(2W - 1), heads)."""
    return resize_pos_embed(table[None, :-3], (2 * grid[0] - 1, 2 * grid[1] - 1), num_prefix=0)[0]


# --------------------------------------------------------------------------------------------------------- 2. network


@dataclass(frozen=True)
class ViTConfig:
    """A ViT as the backbone of a detector.

    Args:
        img_size: height and width that pictures are padded to; for others, all tables of positions are resized.
        patch_size, embed_dim, depth, num_heads, mlp_ratio: of the ViT; the depth is a multiple of 4 (of 4 blocks all
            are global).
        window_size: side in patches of the windows of all blocks but the last of each quarter.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        positions: the table of absolute positions that it starts with, unless a file gives one; see
            :func:`position_table`. It trains.
        init_values: start of the scales of residual branches, which BEiT has (0.1); null for none.
        freeze_patch_embed: the embedding of patches does not train.
        grad_checkpointing: recompute the blocks' activations in the backward pass.
    """

    img_size: tuple[int, int] = (1024, 1024)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    window_size: int = 16
    drop_path_rate: float = 0.0
    positions: Positions = "sincos"
    init_values: float | None = None
    freeze_patch_embed: bool = False
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.depth % 4 or self.depth < 4:
            raise ZooError(f"a ViT with four maps wants a depth that is a multiple of 4, not {self.depth}")
        if any(side % self.patch_size for side in self.img_size) or self.window_size < 1:
            raise ZooError(
                f"img_size {list(self.img_size)} must be multiples of patch_size {self.patch_size}, and window_size"
                f" {self.window_size} positive"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size


class TappedViT(vit_layers.ViTBackbone):
    """Images (B, 3, H, W) to the maps c2 (upsampled by 4), c3 (by 2), c4 and c5 (halved), of D channels.

    Keys of the attention have no bias that counts (:class:`~zoo.nn.detection.vit.MapAttention`), as in BEiT.
    """

    windowed_rel_pos_bias: vit_layers.SharedPositions
    global_rel_pos_bias: vit_layers.SharedPositions

    def __init__(self, config: ViTConfig) -> None:
        quarter, patch = config.depth // 4, config.patch_size
        ends = tuple(quarter * (k + 1) - 1 for k in range(4))
        names = ("c2", "c3", "c4", "c5")
        same = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "window_size", "grad_checkpointing")
        facts = vit_layers.ViTConfig(
            **{name: getattr(config, name) for name in same},
            img_size=max(config.img_size),
            drop_path=config.drop_path_rate,
            global_blocks=ends,
            rel_pos="shared",
            pos_grid=1,
            class_slot=False,
            layer_scale=config.init_values,
        )
        super().__init__(facts, dict(zip(names, ends, strict=True)))
        self.taps = config
        self.strides = {"c2": patch // 4, "c3": patch // 2, "c4": patch, "c5": 2 * patch}
        self.pos_embed = nn.Parameter(position_table(config.positions, config.embed_dim, config.grid))
        self.global_rel_pos_bias = vit_layers.SharedPositions(config.num_heads, config.grid)
        self.adaptor = nn.ModuleDict(
            {
                name: vit_layers.rescaled(config.embed_dim, factor, "gn", (config.embed_dim,) * 2)
                for name, factor in zip(names, (4, 2, 1, 0.5), strict=True)
            }
        )
        self._initialize()
        self.patch_embed.requires_grad_(not config.freeze_patch_embed)

    def _initialize(self) -> None:
        """[H]'s: normal weights cut at one deviation, those that end branch i (from 1) over sqrt(2 i); LeCun-normal
        convolutions; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                lecun_normal_(module.weight)
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        block: Any
        with torch.no_grad():
            for k, block in enumerate(self.blocks):
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.div_(math.sqrt(2 * (k + 1)))

    def no_weight_decay(self) -> set[str]:
        kinds = ("windowed", "global")
        return {"pos_embed", *(f"{kind}_rel_pos_bias.relative_position_bias_table" for kind in kinds)}

    def positions(self, size: tuple[int, int]) -> Tensor:
        table = (
            self.pos_embed if size == tuple(self.taps.grid) else resize_pos_embed(self.pos_embed, size, num_prefix=0)
        )
        return table.unflatten(1, size)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: self.adaptor[name](x) for name, x in super().forward(images).items()}


class ViTMaskRCNN(RCNN):
    """Mask R-CNN on a ViT and a pyramid, with BatchNorm in the pyramid and the heads, two convolutions before the
    proposals, and four before the box head's linear layer.

    As it stands ViT-B without stochastic depth. Every part is a config; in Python a mapping of its fields will do.

    Args:
        num_classes: K, without the background.
        vit: the trunk.
        fpn, rpn, roi, box: of :class:`~zoo.detection.mask_rcnn.MaskRCNN`.
        mask: the mask head; null for none.
        grey: in evaluation, what lies beside a picture is grey (128) as in training crops, not the mean colour; for
            [H]'s files.

    Attributes:
        options: all of these, as they came to be.

    Raises:
        ZooError: an unknown option or name, or parts that do not go together.
    """

    def __init__(
        self,
        num_classes: int = 80,
        vit: ViTConfig = ViTConfig(),
        fpn: FPNConfig = FPNConfig(norm="bn"),  # noqa: B008
        rpn: RPNConfig = RPNConfig(conv_channels=(-1, -1)),  # noqa: B008
        roi: RoIConfig = RoIConfig(),  # noqa: B008
        box: BoxHeadConfig = BoxHeadConfig(convs=4, fcs=1, norm="bn"),  # noqa: B008
        mask: MaskHeadConfig | None = MaskHeadConfig(norm="bn"),  # noqa: B008
        grey: bool = False,
    ) -> None:
        vit, fpn = configured(ViTConfig, vit), configured(FPNConfig, fpn)
        rpn, roi, box = configured(RPNConfig, rpn), configured(RoIConfig, roi), configured(BoxHeadConfig, box)
        mask = None if mask is None else configured(MaskHeadConfig, mask)
        backbone = FPN(TappedViT(vit), fpn, Subsample())
        pooled = tuple(f"p{name[1:]}" for name in fpn.inputs)
        rpn = dataclasses.replace(rpn, levels=rpn.levels or tuple(backbone.channels))
        roi = dataclasses.replace(roi, levels=roi.levels or pooled)
        super().__init__(backbone, RPN(backbone, rpn), RoIHeads(backbone, num_classes, roi, box, mask))
        self.num_classes, self.grey = num_classes, grey
        parts = {"vit": vit, "fpn": fpn, "rpn": rpn, "roi": roi, "box": box, "mask": mask}
        self.options: dict[str, Any] = {"num_classes": num_classes, **parts, "grey": grey}

    @property
    def size_divisibility(self) -> int:
        """What the sides of a padded batch are to be multiples of: all pictures get one size."""
        config: ViTConfig = self.options["vit"]
        return max(config.img_size)

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What COCO measures of it."""
        return ("bbox",) if self.roi_heads.mask_head is None else ("bbox", "segm")

    def propose(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[Proposals]]:
        if not self.grey:
            return super().propose(batch)
        images = batch["image"]
        mean, std = (images.new_tensor(x)[:, None, None] for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
        y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        height, width = batch["size"].to(images.device).T[..., None, None]
        inside = (y[:, None] < height) & (x < width)
        return super().propose({**batch, "image": torch.where(inside[:, None], images, (128 - mean) / std)})


# ------------------------------------------------------------------------------------------------------------ 3. task


class ViTMaskRCNNDetection(Detection):
    """Training and evaluation of a :class:`ViTMaskRCNN`.

    Args:
        init_from: where :meth:`setup` takes weights from: the name of published weights, a file, or a checkpoint; see
            :func:`load_weights`. Null: random weights.
        file_positions: take a pre-trained file's table of absolute positions, resized; else that of `vit.positions`
            stays.
        optim: optimiser and schedule; as it stands [H]'s for MAE and ViT-B, of 100 epochs in batches of 64.
        network: of :class:`ViTMaskRCNN`.
    """

    network: ViTMaskRCNN

    def __init__(
        self,
        init_from: str | None = None,
        file_positions: bool = True,
        optim: Optim = Optim(  # noqa: B008
            lr=8e-5,
            betas=(0.9, 0.999),
            weight_decay=0.1,
            no_decay="norm",
            schedule_from="start",
            warmup_steps=461,
            warmup_start_lr=8e-8,
        ),
        **network: Any,
    ) -> None:
        detector = ViTMaskRCNN(**network)
        super().__init__(detector, optim, detector.iou_types, init_from=init_from)
        self.save_hyperparameters()
        self.file_positions = file_positions

    def load_initial(self, source: str) -> None:
        load_weights(self.network, source, self.file_positions)


# ---------------------------------------------------------------------------------------------------------- 4. models


def _with(part: Mapping[str, Any], overrides: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`overrides`, of whose mapping `name` unnamed fields are those of `part`."""
    given = overrides.get(name, {})
    return {**overrides, name: {**part, **given} if isinstance(given, Mapping) else given}


def mask_rcnn_vit_base(**overrides: Any) -> ViTMaskRCNN:
    """Mask R-CNN on ViT-B/16, stochastic depth 0.1."""
    return ViTMaskRCNN(**_with({"drop_path_rate": 0.1}, overrides, "vit"))


def mask_rcnn_vit_large(**overrides: Any) -> ViTMaskRCNN:
    """Mask R-CNN on ViT-L/16, stochastic depth 0.4 (a choice: ViTDet's)."""
    size = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "drop_path_rate": 0.4}
    return ViTMaskRCNN(**_with(size, overrides, "vit"))


_V2: dict[str, dict[str, Any]] = {
    "resnet": {"depth": 50, "norm": "bn", "stride_in_1x1": False, "freeze": 0},
    "fpn": {"norm": "bn"},
    "rpn": {"conv_channels": (-1, -1), "beta": 1 / 9, "post_nms": (2000, 1000)},
    "box": {"convs": 4, "fcs": 1, "norm": "bn", "beta": 1 / 9, "pool": {"pooling": "align_unshifted", "sampling": 2}},
    "mask": {"norm": "bn", "pool": {"size": 14, "pooling": "align_unshifted", "sampling": 2}},
}


def mask_rcnn_r50_fpn_v2(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN R50-FPN with this paper's heads, as torchvision's `maskrcnn_resnet50_fpn_v2`.

    Equal to it are all maps, the logits and deltas of proposals, what RoIAlign samples in a region, and the heads'
    outputs of it. Not equal, for detectron2's way is kept: anchors are not rounded to whole pixels, proposals rank by
    logit and may be narrower than a thousandth of a pixel, boxes of under a hundredth stay until the end, masks are
    pasted at pixel centres, pictures are resized by Pillow's filter, and probabilities are over 80 classes and the
    background, not over ids of COCO that no object has, too.
    """
    for name, part in _V2.items():
        overrides = _with(part, overrides, name)
    return MaskRCNN(**overrides)


# ----------------------------------------------------------------------------------------------------------- 5. files

_OURS = re.compile(r"(?:backbone|rpn\.head|roi_heads)\..+")
_CLASS_LAYERS = re.compile(r"roi_heads\.(?:box_predictors\.\d\.\w+|mask_head\.predictor)\.(?:weight|bias)")
_TABLE = re.compile(r"(?:windowed|global)_rel_pos_bias\.relative_position_bias_table")
_BLOCKS = re.compile(
    r"(?:patch_embed\.proj|blocks\.\d+\.(?:norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2))\.(?:weight|bias)"
    r"|blocks\.\d+\.ls[12]\.gamma"
)
_LEFT_OUT = re.compile(
    r"(?:cls_token|dist_token|mask_token|rel_pos_bias\.relative_position_index|decoder_.+|head\..+|predictor\..+"
    r"|(?:norm|fc_norm|head_dist|lm_head|pre_logits\.fc)\.(?:weight|bias)|momentum_encoder\..+)"
)
_BEIT_TABLE = "rel_pos_bias.relative_position_bias_table"
_TRUNK = "backbone.bottom_up."


def _as_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BEiT's scales under timm's names, and its biases of queries and values as one with zeros for the keys."""
    state: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r"(.*blocks\.\d+)\.gamma_([12])", key):
            state[f"{match[1]}.ls{match[2]}.gamma"] = value
        elif key.endswith("attn.q_bias"):
            if (other := state_dict.get(f"{key[:-6]}v_bias")) is None:
                raise ZooError(f"not a checkpoint of BEiT: it has {key!r} and no v_bias beside it")
            state[f"{key[:-6]}qkv.bias"] = torch.cat([value, torch.zeros_like(value), other])
        elif not (key.endswith("attn.v_bias") and f"{key[:-6]}q_bias" in state_dict):
            state[key] = value
    return state


def trunk_name(key: str) -> str | None:
    """Our name of a parameter of [H]'s ViT and its adaptor; see :mod:`zoo.weights.detectron2`."""
    if not key.startswith(_TRUNK):
        return None
    name = key.removeprefix(_TRUNK)
    if match := re.fullmatch(r"ms_adaptor\.(?:0\.([013])|1)\.(weight|bias)", name):
        layer, leaf = match.groups()
        return f"{_TRUNK}adaptor.{f'c2.{layer}' if layer else 'c3.0'}.{leaf}"
    return key if name == "pos_embed" or _BLOCKS.fullmatch(name) or _TABLE.fullmatch(name) else None


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detector of [H], whole or its backbone, in our names. Our own names are left as they are.

    The indices of relative positions are compared with ours and left out.

    Raises:
        ZooError: a key of no such detector, or indices of another order.
    """
    if any(key.startswith(("rpn.head.", f"{_TRUNK}adaptor.")) for key in state_dict):
        return detectron2.ours(state_dict, _OURS)
    weights = {key: value for key, value in state_dict.items() if not key.endswith("relative_position_index")}
    for key in state_dict.keys() - weights.keys():
        _check_index(state_dict, key)
    rules = (trunk_name, detectron2.backbone_name, detectron2.rpn_name, detectron2.roi_name)
    return detectron2.rename(_as_ours(weights), rules, "MIMDet's benchmarking detectors")


def _check_index(state: Mapping[str, Tensor], key: str) -> None:
    index, table = state[key], state.get(beside := key.replace("position_index", "position_bias_table"))
    if not _TABLE.fullmatch(beside.removeprefix(_TRUNK)) or table is None:
        raise ZooError(f"not a checkpoint of MIMDet's benchmarking detectors: unknown key {key!r}")
    if index.is_meta or index.is_floating_point():  # no indices, only their places
        return
    rows, count = len(table), len(index)
    for height in (n for n in range(1, count + 1) if count % n == 0):
        width = count // height
        if (2 * height - 1) * (2 * width - 1) != rows:
            continue
        y, x = (torch.arange(count) // width, torch.arange(count) % width)
        down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1
        if torch.equal(down * (2 * width - 1) + right, index.cpu().long()):
            return
    raise ZooError(f"{key!r} orders relative positions otherwise than MIMDet's detectors")


def convert_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's `maskrcnn_resnet50_fpn_v2` in the names of :func:`mask_rcnn_r50_fpn_v2`.

    The background comes last, and has neither box nor mask; the ten ids of COCO that no class has are left out.

    Raises:
        ZooError: a key of no such detector, or of another number of classes than COCO's 91.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _torchvision_name(key)
        if name is None or name in converted:
            raise ZooError(f"not a checkpoint of torchvision's maskrcnn_resnet50_fpn_v2: unknown key {key!r}")
        if _CLASS_LAYERS.fullmatch(name):
            per_class = 4 if "bbox_pred" in name else 1
            if len(value) != 91 * per_class:
                raise ZooError(f"{key!r} is of {len(value) // per_class} classes, not of COCO's 91 ids")
            rows = [*COCO_IDS, 0] if "cls_score" in name else list(COCO_IDS)
            value = value.unflatten(0, (91, per_class))[rows].flatten(0, 1)
        converted[name] = value
    return converted


COCO_IDS = tuple(n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
_V2_NAMES = (
    (r"backbone\.body\.((?:conv1|bn1|layer[1-4])\..+)", lambda m: f"backbone.bottom_up.{m[1]}"),
    (r"backbone\.fpn\.inner_blocks\.([0-3])\.([01]\..+)", lambda m: f"backbone.lateral.c{2 + int(m[1])}.{m[2]}"),
    (r"backbone\.fpn\.layer_blocks\.([0-3])\.([01]\..+)", lambda m: f"backbone.output.p{2 + int(m[1])}.{m[2]}"),
    (r"rpn\.head\.conv\.([01])\.0\.(weight|bias)", lambda m: f"rpn.head.conv.{2 * int(m[1])}.{m[2]}"),
    (r"rpn\.head\.cls_logits\.(weight|bias)", lambda m: f"rpn.head.objectness_logits.{m[1]}"),
    (r"rpn\.head\.bbox_pred\.(weight|bias)", lambda m: f"rpn.head.anchor_deltas.{m[1]}"),
    (r"roi_heads\.box_head\.([0-3])\.([01]\..+)", lambda m: f"roi_heads.box_heads.0.conv{1 + int(m[1])}.{m[2]}"),
    (r"roi_heads\.box_head\.5\.(weight|bias)", lambda m: f"roi_heads.box_heads.0.fc1.{m[1]}"),
    (r"roi_heads\.box_predictor\.((?:cls_score|bbox_pred)\..+)", lambda m: f"roi_heads.box_predictors.0.{m[1]}"),
    (r"roi_heads\.mask_head\.([0-3])\.([01]\..+)", lambda m: f"roi_heads.mask_head.mask_fcn{1 + int(m[1])}.{m[2]}"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(weight|bias)", lambda m: f"roi_heads.mask_head.deconv.{m[1]}"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(weight|bias)", lambda m: f"roi_heads.mask_head.predictor.{m[1]}"),
)


def _torchvision_name(key: str) -> str | None:
    return next((name(match) for pattern, name in _V2_NAMES if (match := re.fullmatch(pattern, key))), None)


def convert_encoder(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a pre-trained ViT has for our trunk, in timm's names: `patch_embed.proj.*`, `blocks.*`, `pos_embed`, and of
    BEiT `rel_pos_bias.relative_position_bias_table`.

    Read are MAE (encoder or whole), DeiT and timm, MoCo v3 (its query encoder), and BEiT with one shared table.
    Class tokens, final norms, heads, decoders and momentum encoders are left out.

    Raises:
        ZooError: a key of none of these.
    """
    converted: dict[str, Tensor] = {}
    for key, value in _as_ours(state_dict).items():
        name = re.sub(r"^(?:module\.)?(?:base_encoder\.)?", "", key)
        if _BLOCKS.fullmatch(name) or name in ("pos_embed", _BEIT_TABLE):
            converted[name] = value
        elif not _LEFT_OUT.fullmatch(name):
            raise ZooError(f"not a ViT of MAE, DeiT, MoCo v3 or BEiT with a shared table: unknown key {key!r}")
    return converted


def load_weights(network: ViTMaskRCNN, source: str | Path, file_positions: bool = True) -> None:
    """Fill `network` from a detector, or its trunk from a pre-trained ViT, and tell what starts anew.

    Of a detector, the last layers keep their fresh weights where the number of classes differs; everything else must
    match. Of a ViT (see :func:`convert_encoder`) the embedding of patches and all blocks must; positions are resized,
    BEiT's relative ones for both tables.

    Args:
        network: any size.
        source: the name of published weights, a published file, or a checkpoint of ours.
        file_positions: take the file's absolute positions where it has some.

    Raises:
        ZooError: the file is missing, or does not match.
    """
    state = read_source(source)
    if any(key.startswith(("rpn.head.", "proposal_generator.")) for key in state):
        detectron2.fill_detector(network, convert_official(state), source, _CLASS_LAYERS)
        return
    encoder = convert_encoder(state)
    config: ViTConfig = network.options["vit"]
    if (config.init_values is not None) != any(key.endswith("ls1.gamma") for key in encoder):
        raise ZooError(
            f"init_from: {source}: vit.init_values must be a number for networks with layer scale (BEiT 0.1), else null"
        )
    positions, relative = encoder.pop("pos_embed", None), encoder.pop(_BEIT_TABLE, None)
    if positions is not None and file_positions:
        encoder["pos_embed"] = fitted_positions(positions, config.grid)
    if relative is not None:
        for kind, grid in (("windowed", (config.window_size,) * 2), ("global", config.grid)):
            encoder[f"{kind}_rel_pos_bias.relative_position_bias_table"] = fitted_bias(relative, grid)
    given = {f"{_TRUNK}{key}": value for key, value in encoder.items()}
    fill(
        network, given, source, lambda key: key in given or key.startswith((f"{_TRUNK}patch_embed", f"{_TRUNK}blocks"))
    )
    fresh = {
        re.sub(r"^(backbone\.bottom_up\.\w+|backbone\.\w+|\w+).*", r"\1", k)
        for k in network.state_dict().keys() - given
    }
    rank_zero_info(f"starts anew: {', '.join(sorted(fresh))}")
