"""The plain Vision Transformer as a backbone: attention in windows with a few blocks that carry news between them.

Pre-trained networks come with 14 x 14 tokens and attend to all of them; a detector has 64 x 64. Most blocks therefore
attend within windows, and a few propagate: by attention over the whole map, or by convolutions whose last norm starts
at 0. Positions are resized to the map at every call. (Li et al., ViTDet, arXiv 2203.16527, section 3; Li et al.,
Benchmarking Detection Transfer Learning, arXiv 2111.11429, section 2.2.)

Tokens are maps (B, H, W, C) inside; parameter names are those of timm and MAE, with `rel_pos_h`, `rel_pos_w` and
`residual` as in detectron2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, pad
from torch.utils.checkpoint import checkpoint

from zoo.errors import ZooError, unknown
from zoo.nn.detection.backbone import Norm, he_normal, norm_layer
from zoo.nn.vit import NORM_EPS, PatchEmbed
from zoo.ops.attention import attention
from zoo.ops.pos_embed import resize_pos_embed
from zoo.ops.windows import joined, windows

RelPos = Literal["decomposed", "shared"]
ConvKind = Literal["bottleneck", "basic", "naive"]


@dataclass(frozen=True)
class ViTConfig:
    """A ViT as detectors take it. As it stands ViTDet-B.

    Args:
        img_size: side in pixels that the tables of relative positions of global blocks are made for; others are
            resized.
        patch_size, embed_dim, depth, num_heads, mlp_ratio: of the network.
        drop_path: stochastic depth of the last block; it rises linearly from 0 at the first.
        window_size: side of the windows in tokens; 0: every block is global.
        global_blocks: which blocks, from 0, attend to the whole map.
        conv_blocks: which blocks are followed by a residual block of convolutions.
        conv: what that block is: 1x1, 3x3 and 1x1 convolutions of half the width, two 3x3, or one.
        shift: of the windowed blocks every other one, from the second, has its windows shifted by half a side.
        rel_pos: `decomposed`: q.Rh + q.Rw, tables of each block; `shared`: a bias a head from one table for all
            windowed and one for all global blocks; null for none.
        pos_grid: side in tokens of the table of absolute positions: that of the pre-training.
        class_slot: the table has a row for the class token, which is kept and not used.
        layer_scale: what the scales of the residual branches start from; null for none.
        grad_checkpointing: recompute activations in the backward pass.

    Raises:
        ZooError: a value out of range.
    """

    img_size: int = 1024
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    drop_path: float = 0.1
    window_size: int = 14
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    conv_blocks: tuple[int, ...] = ()
    conv: ConvKind = "bottleneck"
    shift: bool = False
    rel_pos: RelPos | None = "decomposed"
    pos_grid: int = 14
    class_slot: bool = True
    layer_scale: float | None = None
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.conv not in get_args(ConvKind):
            raise unknown("convolutional block", str(self.conv), get_args(ConvKind))
        if self.rel_pos is not None and self.rel_pos not in get_args(RelPos):
            raise unknown("sort of relative positions", str(self.rel_pos), get_args(RelPos))
        if self.embed_dim % self.num_heads:
            raise ZooError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if self.img_size % self.patch_size:
            raise ZooError(f"img_size {self.img_size} is no multiple of patch_size {self.patch_size}")
        for name in ("global_blocks", "conv_blocks"):
            if wrong := [k for k in getattr(self, name) if not 0 <= k < self.depth]:
                raise ZooError(f"{name} counts blocks from 0 to {self.depth - 1}, not {wrong[0]}")


def relative_rows(table: Tensor, size: int) -> Tensor:
    """Rows (size, size, D) of a `table` (L, D) of relative positions along one axis: [q, k] is that of q - k.

    A table of another length than 2 size - 1 is resized linearly first (detectron2).
    """
    length = 2 * size - 1
    if len(table) != length:
        table = interpolate(table.T[None], size=length, mode="linear")[0].T
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places + size - 1]


def with_positions(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product is scale q.k + q.rows[y, y'] + q.columns[x, x'] (ViTDet; MViTv2, equation 4).

    The two products with the query are further channels of it, and the key's row and column, as ones among zeros, their
    counterparts: the sums are made where the scores are, by whatever kernel makes them.

    Args:
        q, k: (B, h, H * W, D).
        rows, columns: (H, H, D) and (W, W, D), as of :func:`relative_rows`.
        scale: of the product of queries and keys; of the result it is 1.

    Returns:
        (B, h, H * W, D + H + W, filled up with zeros to a multiple of 8) twice.
    """
    height, width = len(rows), len(columns)
    maps = q.unflatten(2, (height, width))
    by_row = torch.einsum("bhyxd,ykd->bhyxk", maps, rows.to(q.dtype)).flatten(2, 3)
    by_column = torch.einsum("bhyxd,xkd->bhyxk", maps, columns.to(q.dtype)).flatten(2, 3)
    spare = -(q.shape[-1] + height + width) % 8
    one_of = k.new_zeros(height, width, height + width + spare)
    one_of[..., :height] = torch.eye(height, dtype=k.dtype, device=k.device)[:, None]
    one_of[..., height : height + width] = torch.eye(width, dtype=k.dtype, device=k.device)
    queries = [q * scale, by_row, by_column, *([q.new_zeros(*q.shape[:-1], spare)] if spare else [])]
    places = one_of.flatten(0, 1).expand(*k.shape[:-1], -1)
    return torch.cat(queries, dim=-1), torch.cat([k, places], dim=-1)


class MapAttention(nn.Module):
    """Self-attention on maps of tokens, in windows or over all of them.

    What windows lack at the borders is filled up with zeros that take part, as in detectron2: their keys and values are
    the projection's biases. A bias of all keys leaves a softmax as it is, and one of all values passes through it, so
    that here padding is zeros behind the projection, and the values' bias comes afterwards.

    Args:
        dim, num_heads: of the tokens.
        window: side of the windows; 0: all of the map.
        offset: by which windows begin above and left of the map.
        table: side in tokens that relative positions are made for; 0 for none.
    """

    def __init__(self, dim: int, num_heads: int, window: int = 0, offset: int = 0, table: int = 0) -> None:
        super().__init__()
        self.num_heads, self.window, self.offset = num_heads, window, offset
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.has_table = table > 0
        if table:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * table - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * table - 1, dim // num_heads))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Maps (B, H, W, C) to (B, H, W, C); `bias` (h, N, N) is added to the scores within a window."""
        dim = x.shape[-1]
        of_query, of_value = self.qkv.bias[:dim], self.qkv.bias[2 * dim :]
        qkv = linear(x, self.qkv.weight, torch.cat([of_query, torch.zeros_like(self.qkv.bias[dim:])]))
        if self.offset:
            qkv = pad(qkv, (0, 0, self.offset, 0, self.offset, 0))
        size = (qkv.shape[1], qkv.shape[2])
        if self.window:
            qkv = windows(qkv, self.window)
        rows, columns = qkv.shape[1:3]
        q, k, v = qkv.flatten(1, 2).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scale = q.shape[-1] ** -0.5
        if self.has_table:
            tables = relative_rows(self.rel_pos_h, rows), relative_rows(self.rel_pos_w, columns)
            q, k = with_positions(q, k, *tables, scale)
            scale = 1.0
        if bias is not None:
            bias = bias.to(q.dtype)
        out = attention(q, k, v, mask=bias, scale=scale).transpose(1, 2).flatten(2).unflatten(1, (rows, columns))
        if self.window:
            out = joined(out, size)[:, self.offset :, self.offset :]
        return linear(out, self.proj.weight, self.proj.bias + self.proj.weight @ of_value)


class SharedPositions(nn.Module):
    """A bias of each head for the place of a key relative to its query, from one table that many blocks share
    (Benchmarking Detection Transfer Learning, section 2.2; BEiT's without the class token).

    Args:
        num_heads: h.
        size: of the map in tokens, that the table is made for: its side, or rows and columns; on other maps it is
            resized (bicubic).
    """

    def __init__(self, num_heads: int, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size
        rows = math.prod(2 * n - 1 for n in self.size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))

    def forward(self, height: int, width: int) -> Tensor:
        """(h, H * W, H * W)."""
        own, wanted = (2 * self.size[0] - 1, 2 * self.size[1] - 1), (2 * height - 1, 2 * width - 1)
        table = self.relative_position_bias_table.T.unflatten(1, own)
        if own != wanted:
            table = interpolate(table[None], size=wanted, mode="bicubic", align_corners=False)[0]
        # Entry (y, x, i, j) of these strided views is of the key at (H - 1 - i, W - 1 - j): no index, no scattered sum.
        views = table.unfold(1, height, 1).unfold(2, width, 1)
        return views.flip(3, 4).flatten(3).flatten(1, 2)


class ConvBlock(nn.Module):
    """A residual block of convolutions, each followed by channel LayerNorm, and by GELU but for the last one. The last
    norm's scale is 0 at the start: the block is the identity (ViTDet, section 3).

    Args:
        dim: C.
        kind: `bottleneck`: 1x1, 3x3, 1x1 with half the width; `basic`: two 3x3; `naive`: one 3x3.
    """

    def __init__(self, dim: int, kind: ConvKind = "bottleneck") -> None:
        super().__init__()
        shapes = {
            "bottleneck": [(dim, dim // 2, 1), (dim // 2, dim // 2, 3), (dim // 2, dim, 1)],
            "basic": [(dim, dim, 3), (dim, dim, 3)],
            "naive": [(dim, dim, 3)],
        }[kind]
        self.count = len(shapes)
        for k, (inputs, outputs, kernel) in enumerate(shapes, 1):
            conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
            he_normal(conv)
            self.add_module(f"conv{k}", conv)
            self.add_module(f"norm{k}", LayerNorm2d(outputs))
        nn.init.zeros_(self.get_submodule(f"norm{self.count}").weight)  # type: ignore[arg-type]
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        out = x
        for k in range(1, self.count + 1):
            out = self.get_submodule(f"norm{k}")(self.get_submodule(f"conv{k}")(out))
            out = self.act(out) if k < self.count else out
        return x + out


class MapBlock(nn.Module):
    """A pre-norm block on maps of tokens: x + attention(norm(x)), x + mlp(norm(x)), and perhaps convolutions.

    Args:
        config: the network's.
        index: the block's number from 0.
    """

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        dim, everywhere = config.embed_dim, index in config.global_blocks or not config.window_size
        window = 0 if everywhere else config.window_size
        offset = window // 2 if config.shift and index % 2 else 0
        table = (window or config.img_size // config.patch_size) if config.rel_pos == "decomposed" else 0
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = MapAttention(dim, config.num_heads, window, offset, table)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), act_layer=nn.GELU)
        rate = config.drop_path * index / max(1, config.depth - 1)
        self.drop_path = DropPath(rate) if rate else nn.Identity()
        scaled = config.layer_scale is not None
        self.ls1, self.ls2 = (LayerScale(dim, config.layer_scale) if scaled else nn.Identity() for _ in range(2))  # type: ignore[arg-type]
        self.residual = ConvBlock(dim, config.conv) if index in config.conv_blocks else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Maps (B, H, W, C) to (B, H, W, C); `bias` as of :class:`MapAttention`."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), bias)))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        if self.residual is not None:
            x = self.residual(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x


class ViTBackbone(nn.Module):
    """The blocks of a ViT without class token and final norm; maps of `patch_size` stride after chosen blocks.

    Args:
        config: the network.
        outputs: the block, from 0, that each map comes after; null: `last`, that of the last block.
        in_chans: channels of the image.

    Attributes:
        channels, strides: of the maps by name.
    """

    def __init__(self, config: ViTConfig, outputs: Mapping[str, int] | None = None, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        self.outputs = dict(outputs or {"last": config.depth - 1})
        if wrong := [k for k in self.outputs.values() if not 0 <= k < config.depth]:
            raise ZooError(f"a ViT of {config.depth} blocks has no map after block {wrong[0]} (counted from 0)")
        self.channels = dict.fromkeys(self.outputs, config.embed_dim)
        self.strides = dict.fromkeys(self.outputs, config.patch_size)
        side = config.img_size // config.patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_grid**2 + config.class_slot, config.embed_dim))
        self.patch_embed = PatchEmbed(config.img_size, config.patch_size, in_chans, config.embed_dim)
        self.windowed_rel_pos_bias = self.global_rel_pos_bias = None
        if config.rel_pos == "shared":
            if config.window_size:
                self.windowed_rel_pos_bias = SharedPositions(config.num_heads, config.window_size)
            if config.global_blocks or not config.window_size:
                self.global_rel_pos_bias = SharedPositions(config.num_heads, side)
        self.blocks = nn.ModuleList(MapBlock(config, k) for k in range(config.depth))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def num_layer_ids(self) -> int:
        """Layers for layer-wise learning rates: embedding, blocks, and what stands on them."""
        return self.config.depth + 2

    def layer_id(self, name: str) -> int:
        """The layer of parameter `name`: 0 of positions and patches, block i is i + 1; its convolutions and shared
        positions belong to the top."""
        if name == "pos_embed" or name.startswith("patch_embed."):
            return 0
        if name.startswith("blocks.") and ".residual." not in name:
            return int(name.split(".")[1]) + 1
        return self.num_layer_ids - 1

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def positions(self, size: tuple[int, int]) -> Tensor:
        """Absolute positions (1, H, W, C) of a map of `size` (H, W)."""
        prefix = int(self.config.class_slot)
        return resize_pos_embed(self.pos_embed, size, num_prefix=prefix)[:, prefix:].unflatten(1, size)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W), sides multiples of the patch, to maps (B, C, H / patch, W / patch).

        Raises:
            ZooError: sides that are no multiples.
        """
        config = self.config
        if images.shape[-2] % config.patch_size or images.shape[-1] % config.patch_size:
            raise ZooError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels do not part into patches of"
                f" {config.patch_size}; set data.size_divisibility"
            )
        x = self.patch_embed.proj(images).permute(0, 2, 3, 1)
        size = (x.shape[1], x.shape[2])
        x = x + self.positions(size)
        bias_of: dict[bool, Any] = {True: None, False: None}
        if self.windowed_rel_pos_bias is not None:
            bias_of[True] = self.windowed_rel_pos_bias(config.window_size, config.window_size)
        if self.global_rel_pos_bias is not None:
            bias_of[False] = self.global_rel_pos_bias(*size)
        maps: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks[: max(self.outputs.values()) + 1]):
            bias = bias_of[bool(block.attn.window)]  # type: ignore[union-attr]
            if config.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, bias)
            if index in self.outputs.values():
                maps[index] = x.permute(0, 3, 1, 2)
        return {name: maps[index] for name, index in self.outputs.items()}


def rescaled(dim: int, factor: float, norm: Norm | None = "ln", widths: tuple[int, int] | None = None) -> nn.Sequential:
    """Layers that make a map of stride 16 one of stride 4, 8, 16 or 32 (`factor` 4, 2, 1, 1/2): transposed 2x2
    convolutions, with `norm` and GELU between two of them; nothing; 2x2 max pooling.

    Args:
        dim: channels of the map.
        factor: of its sides.
        norm: between the two convolutions of factor 4.
        widths: outputs of the first and the second convolution; null: dim / 2 and dim / 4 (ViTDet, section 3).

    Returns:
        Layers with an attribute `out_channels`.

    Raises:
        ZooError: another factor.
    """
    first, second = widths or (dim // 2, dim // 4)
    layers: list[nn.Module]
    if factor == 4:
        made = norm_layer(norm)
        between = [] if made is None else [made(first)]
        layers = [nn.ConvTranspose2d(dim, first, 2, 2), *between, nn.GELU(), nn.ConvTranspose2d(first, second, 2, 2)]
    elif factor == 2:
        layers, second = [nn.ConvTranspose2d(dim, first, 2, 2)], first
    elif factor in (1, 0.5):
        layers, second = [nn.MaxPool2d(2, 2)] if factor < 1 else [], dim
    else:
        raise ZooError(f"a map is made 4, 2, 1 or 1/2 times as large, not {factor}")
    rescaling = nn.Sequential(*layers)
    rescaling.out_channels = second  # type: ignore[assignment]
    return rescaling
