"""Position tables of Vision Transformers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from zoo.errors import ZooError, unknown


def sincos_1d(embed_dim: int, positions: Tensor) -> Tensor:
    """Sine and cosine features (M, embed_dim) of positions (M,), in float64: [sin(x w_i) | cos(x w_i)].

    w_i = 10000^(-i / (embed_dim / 2)) for i in 0 .. embed_dim/2 - 1.
    """
    half = embed_dim // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = positions.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(embed_dim: int, grid: tuple[int, int], num_prefix: int = 0, rows_first: bool = False) -> Tensor:
    """A fixed table (1, num_prefix + rows*columns, embed_dim), float32; prefix rows are zero.

    The first half of the channels encodes the column, the second the row (MAE's order); with `rows_first` it is the
    other way round (MoCo v3's).

    Raises:
        ZooError: `embed_dim` is no multiple of 4.
    """
    if embed_dim % 4:
        raise ZooError(f"a 2-D sine-cosine table wants a width divisible by 4, not {embed_dim}")
    rows, columns = grid
    column = sincos_1d(embed_dim // 2, torch.arange(columns)).expand(rows, columns, -1)
    row = sincos_1d(embed_dim // 2, torch.arange(rows))[:, None].expand(rows, columns, -1)
    halves = [row, column] if rows_first else [column, row]
    table = torch.cat(halves, dim=-1).reshape(1, rows * columns, embed_dim)
    return torch.cat([table.new_zeros(1, num_prefix, embed_dim), table], dim=1).float()


RopeLayout = Literal["interleaved", "half"]


def _turns(angles: Tensor, num_prefix: int, layout: RopeLayout) -> tuple[Tensor, Tensor]:
    """Cosine and sine (num_prefix + N, D), float32, of the angles (N, D/2) of the pairs; the prefix does not turn."""
    if layout not in ("interleaved", "half"):
        raise unknown("rotary layout", layout, ("interleaved", "half"))
    angles = angles.repeat_interleave(2, dim=1) if layout == "interleaved" else torch.cat([angles, angles], dim=1)
    angles = torch.cat([angles.new_zeros(num_prefix, angles.shape[1]), angles])
    return angles.cos().float(), angles.sin().float()


def rope_1d(
    head_dim: int, length: int, num_prefix: int = 0, theta: float = 10000.0, layout: RopeLayout = "interleaved"
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (num_prefix + length, head_dim), float32, of rotary positions along a sequence.

    Pair i of a head's channels turns by the place at rate theta^(-2i / head_dim). `layout` says which channels make a
    pair: neighbours (2i, 2i+1), or (i, i + head_dim/2) with "half" (rotate-half). Prefix tokens are not turned.

    Raises:
        ZooError: `head_dim` is odd, or another layout.
    """
    if head_dim % 2:
        raise ZooError(f"rotary positions want heads of an even width, not {head_dim}")
    rates = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return _turns(torch.arange(length)[:, None] * rates, num_prefix, layout)


def rope_2d(
    head_dim: int,
    grid: tuple[int, int],
    num_prefix: int = 0,
    theta: float = 10000.0,
    layout: RopeLayout = "interleaved",
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (num_prefix + rows*columns, head_dim), float32, of rotary positions on a grid.

    The first half of a head's pairs turns by the row, the second by the column, pair i of a half at rate
    theta^(-2i / (head_dim/2)). `layout` as in :func:`rope_1d`. Prefix tokens are not turned.

    Raises:
        ZooError: `head_dim` is no multiple of 4, or another layout.
    """
    if head_dim % 4:
        raise ZooError(f"2-D rotary positions want heads of a width divisible by 4, not {head_dim}")
    rows, columns = grid
    half = head_dim // 2
    rates = theta ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    row, column = (torch.arange(n)[:, None] * rates for n in grid)
    size = (rows, columns, len(rates))
    angles = torch.cat([row[:, None].expand(size), column[None].expand(size)], dim=-1).reshape(rows * columns, half)
    return _turns(angles, num_prefix, layout)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, layout: RopeLayout = "interleaved") -> Tensor:
    """Turns the channel pairs of queries or keys (B, H, N, D) by the angles of `cos` and `sin` (N, D), which are of
    the same layout: pairs (2i, 2i+1), or (i, i + D/2) with "half"."""
    if layout == "interleaved" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass over the memory instead of six: a pair is a complex number, turned by a product.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        pairs = (wide if wide.stride(-1) == 1 else wide.contiguous()).unflatten(-1, (-1, 2))
        turn = torch.complex(cos[..., ::2].to(wide.dtype), sin[..., ::2].to(wide.dtype))
        return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)
    if layout == "interleaved":
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
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
