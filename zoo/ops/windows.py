"""Square windows of a map of tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def windows(x: Tensor, side: int) -> Tensor:
    """Cuts maps (B, H, W, C) into windows (B * n, side, side, C), rows of windows first; what the last ones lack at the
    right and bottom is zeros."""
    height, width = x.shape[1:3]
    down, right = -height % side, -width % side
    if down or right:
        x = pad(x, (0, 0, 0, right, 0, down))
    x = x.unflatten(1, (-1, side)).unflatten(3, (-1, side))  # (B, rows, side, columns, side, C)
    return x.transpose(2, 3).flatten(0, 2).contiguous()


def joined(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The maps (B, H, W, C) of `size` (H, W) that were cut into `windows` (B * n, side, side, C)."""
    side, (height, width) = x.shape[1], size
    rows, columns = -(-height // side), -(-width // side)
    x = x.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :height, :width]
