"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) on a grid: each axis turns half of the channels."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ZooError


def rope_2d(head_dim: int, grid: tuple[int, int], num_prefix: int = 0, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (num_prefix + rows*columns, head_dim) float32, for :func:`rotate`.

    Of H = head_dim / 2 channels an axis, channels 2i and 2i + 1 turn by position * base^(-2i / H): the first H by the
    row, the others by the column. Prefix tokens do not turn.

    Raises:
        ZooError: `head_dim` is no multiple of 4.
    """
    if head_dim % 4:
        raise ZooError(f"2-D rotary embedding wants heads of a multiple of 4 channels, not {head_dim}")
    half = head_dim // 2
    rates = base ** -(torch.arange(0, half, 2).float() / half)
    rows, columns = ((torch.arange(side).float()[:, None] * rates).repeat_interleave(2, dim=1) for side in grid)
    angles = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns.expand(grid[0], -1, -1)], dim=-1).flatten(0, 1)
    angles = torch.cat([angles.new_zeros(num_prefix, head_dim), angles])
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (..., N, head_dim), each pair of neighbouring channels turned by its angle (..., N, head_dim)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos + turned * sin
