"""Position tables of Vision Transformers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from zoo.errors import ZooError


def sincos_1d(embed_dim: int, positions: Tensor) -> Tensor:
    """Sine and cosine features (M, embed_dim) of positions (M,), in float64: [sin(x w_i) | cos(x w_i)].

    w_i = 10000^(-i / (embed_dim / 2)) for i in 0 .. embed_dim/2 - 1.
    """
    half = embed_dim // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = positions.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(embed_dim: int, grid: tuple[int, int], num_prefix: int = 0) -> Tensor:
    """A fixed table (1, num_prefix + rows*columns, embed_dim), float32; prefix rows are zero.

    The first half of the channels encodes the column, the second the row (MAE's order; MoCo v3 has them swapped).

    Raises:
        ZooError: `embed_dim` is no multiple of 4.
    """
    if embed_dim % 4:
        raise ZooError(f"a 2-D sine-cosine table wants a width divisible by 4, not {embed_dim}")
    rows, columns = grid
    column = sincos_1d(embed_dim // 2, torch.arange(columns)).expand(rows, columns, -1)
    row = sincos_1d(embed_dim // 2, torch.arange(rows))[:, None].expand(rows, columns, -1)
    table = torch.cat([column, row], dim=-1).reshape(1, rows * columns, embed_dim)
    return torch.cat([table.new_zeros(1, num_prefix, embed_dim), table], dim=1).float()


def rope_2d(head_dim: int, grid: tuple[int, int], num_prefix: int = 0, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine (num_prefix + rows*columns, head_dim), float32, of rotary positions on a grid.

    The first half of a head's channels turns by the row, the second by the column, each in neighbouring pairs
    (2i, 2i+1) at rate theta^(-2i / (head_dim/2)). Prefix tokens are not turned.

    Raises:
        ZooError: `head_dim` is no multiple of 4.
    """
    if head_dim % 4:
        raise ZooError(f"2-D rotary positions want heads of a width divisible by 4, not {head_dim}")
    rows, columns = grid
    half = head_dim // 2
    rates = theta ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    row, column = ((torch.arange(n)[:, None] * rates).repeat_interleave(2, dim=1) for n in grid)
    angles = torch.cat(
        [row[:, None].expand(rows, columns, half), column[None].expand(rows, columns, half)], dim=-1
    ).reshape(rows * columns, head_dim)
    angles = torch.cat([angles.new_zeros(num_prefix, head_dim), angles])
    return angles.cos().float(), angles.sin().float()


def rope_1d(head_dim: int, length: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, head_dim), float32, of rotary positions in a row: the pair (2i, 2i+1) of a head's
    channels turns at rate theta^(-2i / head_dim).

    Raises:
        ZooError: `head_dim` is odd.
    """
    if head_dim % 2:
        raise ZooError(f"rotary positions want heads of an even width, not {head_dim}")
    rates = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = (torch.arange(length)[:, None] * rates).repeat_interleave(2, dim=1)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs (2i, 2i+1) of queries or keys (B, H, N, D) by the angles of `cos` and `sin` (N, D)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def resize_pos_embed(pos_embed: Tensor, new_grid: tuple[int, int], num_prefix: int = 1) -> Tensor:
    """A table (1, num_prefix + h*w, D) of a square grid, resized to `new_grid` (rows, columns); prefix rows are kept.

    Bicubic, align_corners False, no antialias, as the official MAE code does (timm's loader uses antialias).

    Raises:
        ZooError: the old grid is not square.
    """
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise ZooError(f"a position table of {patches.shape[1]} patches is no square grid and cannot be resized")
    if (side, side) == tuple(new_grid):
        return pos_embed
    image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = interpolate(image, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)
