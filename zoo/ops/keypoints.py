"""Keypoints as one cell of a map over a box (Mask R-CNN, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from zoo.ops.boxes import at_least_float32


def keypoint_cells(keypoints: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The cell of a `size` x `size` map over each box (P, 4) in which each of its keypoints (P, K, 3) lies.

    A point on the right or lower border belongs to the last cell.

    Returns:
        The cells' indices (P, K), row by row, and which of them count (P, K): visible, and inside the box.
    """
    x1, y1, x2, y2 = (boxes[:, None, k] for k in range(4))
    x, y, visible = keypoints.unbind(dim=-1)
    column, row = ((x - x1) * (size / (x2 - x1))).floor().long(), ((y - y1) * (size / (y2 - y1))).floor().long()
    column, row = column.masked_fill(x == x2, size - 1), row.masked_fill(y == y2, size - 1)
    valid = (column >= 0) & (row >= 0) & (column < size) & (row < size) & (visible > 0)
    return (row * size + column) * valid, valid


def heatmaps_to_keypoints(maps: Tensor, boxes: Tensor) -> Tensor:
    """Keypoints (R, K, 4) from logits (R, K, S, S) over `boxes` (R, 4): x, y, logit, score.

    A map is resized to its box by bicubic interpolation; the point is the middle of its largest cell. The score is
    exp(largest) over the sum of exp over the S x S map, so that boxes of unlike sizes compare.
    """
    maps, boxes = at_least_float32(maps), at_least_float32(boxes)
    found = maps.new_zeros(*maps.shape[:2], 4)
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    whole = sizes.ceil()
    for n, (width, height) in enumerate(whole.long().tolist()):
        resized = interpolate(maps[n, None], size=(height, width), mode="bicubic", align_corners=False)[0].flatten(1)
        logit, place = resized.max(dim=1)
        cell = torch.stack([place % width, place // width], dim=1).to(boxes.dtype)
        found[n, :, :2] = (cell + 0.5) * (sizes[n] / whole[n]) + boxes[n, :2]
        found[n, :, 2] = logit
        found[n, :, 3] = 1 / (maps[n].flatten(1) - logit[:, None]).exp().sum(dim=1)
    return found
