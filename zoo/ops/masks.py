"""Masks of objects inside boxes and inside images (detectron2's numerics)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, max_pool2d, pad
from torchvision.ops import roi_align

from zoo.ops.boxes import at_least_float32


def crop_masks(masks: Tensor, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What `boxes` (P, 4) see of the `masks` (G, h, w) that `index` (P,) names, resampled to bool (P, size, size).

    RoIAlign with as many samples as a cell has pixels, then a threshold of one half.
    """
    rois = torch.cat([index[:, None], boxes], dim=1).float()  # float32 whatever the network has, as in detectron2
    return roi_align(masks[:, None].float(), rois, size, 1.0, 0, aligned=True)[:, 0] >= 0.5


def crop_polygons(polygons: Sequence[Sequence[np.ndarray]], boxes: Tensor, size: int) -> Tensor:
    """The same of objects given as polygons (x1, y1, x2, y2, ...), one list an object, each drawn by COCO's rasteriser
    on the grid of its own box of `boxes` (P, 4); bool (P, size, size)."""
    from pycocotools import mask as coco

    targets = torch.zeros(len(polygons), size, size, dtype=torch.bool)
    for target, rings, box in zip(targets, polygons, boxes.double().cpu().numpy(), strict=True):
        corner = np.tile(box[:2], 1)
        scale = size / np.maximum(box[2:] - box[:2], 0.1)
        moved = [((np.asarray(ring, float).reshape(-1, 2) - corner) * scale).ravel() for ring in rings]
        drawn = coco.decode(coco.merge(coco.frPyObjects(moved, size, size)))
        target.copy_(torch.from_numpy(drawn.astype(bool)))
    return targets.to(boxes.device)


def crop_objects(target: Mapping[str, Any], index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The same of the objects of a `target` that `index` (P,) names, from its `polygons` where it has them, else from
    its `masks`; bool (P, size, size)."""
    if "polygons" in target:
        return crop_polygons([target["polygons"][n] for n in index.tolist()], boxes, size)
    return crop_masks(target["masks"], index, boxes, size)


def paste_masks(
    probabilities: Tensor | Sequence[Tensor], boxes: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Soft masks (N, M, M), or N of (M, M) each of its own size, of `boxes` (N, 4), drawn into images of `size` (H, W):
    bool (N, H, W).

    Each is sampled bilinearly at the centres of the pixels of its box (zero beyond its border) and thresholded.
    """
    height, width = size
    pasted = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    boxes = at_least_float32(boxes)
    limits = boxes.new_tensor([width, height])
    low = (boxes[:, :2].floor() - 1).clamp(min=0).tolist()
    high = (boxes[:, 2:].ceil() + 1).minimum(limits).tolist()
    for n, ((x1, y1), (x2, y2)) in enumerate(zip(low, high, strict=True)):
        x = torch.arange(x1, x2, dtype=boxes.dtype, device=boxes.device) + 0.5
        y = torch.arange(y1, y2, dtype=boxes.dtype, device=boxes.device) + 0.5
        x = (x - boxes[n, 0]) / (boxes[n, 2] - boxes[n, 0]) * 2 - 1
        y = (y - boxes[n, 1]) / (boxes[n, 3] - boxes[n, 1]) * 2 - 1
        if not (len(x) and len(y)):
            continue
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        soft = at_least_float32(probabilities[n])
        values = grid_sample(soft[None, None], grid[None].to(soft.dtype), align_corners=False)
        pasted[n, int(y1) : int(y2), int(x1) : int(x2)] = values[0, 0] >= threshold
    return pasted


def boundary_width(size: tuple[int, int], share: float = 0.02) -> int:
    """Pixels that a `share` of the diagonal of a picture of `size` (H, W) is, 1 or more (Boundary IoU, section 4)."""
    return max(1, round(share * (size[0] ** 2 + size[1] ** 2) ** 0.5))


def inner_boundary(masks: Tensor, width: int) -> Tensor:
    """The pixels of masks (N, H, W) bool that lie within `width` pixels (the larger of both axes' distances) of one
    that does not belong to them; beyond the picture nothing does."""
    if not masks.numel():
        return masks
    outside = pad(~masks, [width] * 4, value=True)[:, None].float()
    window = 2 * width + 1
    near = max_pool2d(max_pool2d(outside, (window, 1), 1), (1, window), 1)[:, 0] > 0
    return masks & near


def run_lengths(counts: Any) -> np.ndarray | None:
    """(n,) int64 runs of zeros and ones in turn from COCO's list of them or its compressed text; None where it is
    neither. (pycocotools reads beyond the end of text that is none.)"""
    if isinstance(counts, list):
        try:
            runs = np.array([float(count) for count in counts])
        except (TypeError, ValueError, OverflowError):
            return None
        fit = len(runs) and (runs >= 0).all() and (runs < 1 << 40).all() and (runs % 1 == 0).all()
        return runs.astype(np.int64) if fit else None
    try:
        text = counts if isinstance(counts, bytes) else counts.encode("ascii")
    except (AttributeError, UnicodeEncodeError):
        return None
    # Six bits a letter: five of the number, low ones first, and whether more follow; the highest is the sign.
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = digits & 32 == 0
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or not last[-1]:
        return None
    ends = last.nonzero()[0]
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends - starts + 1
    if length.max() > 7:
        return None
    place = np.arange(len(digits)) - np.repeat(starts, length)
    runs = np.add.reduceat((digits & 31) << 5 * place, starts)
    runs -= (digits[ends] >> 4 & 1) << 5 * length
    for first in (1, 2):  # from the fourth on, a number is the difference to the last but one
        runs[first::2] = runs[first::2].cumsum()
    return runs if runs.min() >= 0 else None
