"""Points of maps and masks: sampling, and which ones are uncertain (PointRend, arXiv 1912.08193, section 3).

Points (x, y) lie in [0, 1] of a box, or of a padded image, whose pixel centres lie at half numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from zoo.errors import ZooError
from zoo.ops.boxes import at_least_float32


class PointNoise(NamedTuple):
    """Numbers in [0, 1) that training points are made of, row by row: `oversampled`, k N points of each region or image
    of which the most uncertain stay, and `fresh`, those that cover everything. More than are needed will do."""

    oversampled: Tensor
    fresh: Tensor


def sample_points(maps: Tensor, points: Tensor, mode: Literal["bilinear", "nearest"] = "bilinear") -> Tensor:
    """Values (N, C, P) of `maps` (N, C, H, W) at `points` (N, P, 2) in [0, 1]; zero half a cell beyond the border.

    In at least float32: a half-precision number cannot tell two cells of a large map apart.
    """
    maps = at_least_float32(maps)
    return grid_sample(maps, 2 * points.to(maps.dtype)[:, :, None] - 1, mode=mode, align_corners=False)[..., 0]


def grid_points(height: int, width: int, like: Tensor) -> Tensor:
    """The centres (height * width, 2) of a regular grid's cells, row by row."""
    y = (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) / height
    x = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) / width
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)


def of_class(logits: Tensor, labels: Tensor) -> Tensor:
    """The map (R, ...) of each region's class out of (R, K, ...); the only one where K is 1."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(labels), device=labels.device), labels]


def class_uncertainty(logits: Tensor, labels: Tensor) -> Tensor:
    """(R, ...) of class logits (R, K, ...): how near a probability of one half is, -|logit| of the region's class."""
    return -of_class(logits, labels).abs()


def margin_uncertainty(logits: Tensor) -> Tensor:
    """(B, ...) of class logits (B, K, ...): how near the second best class is to the best, their difference (<= 0)."""
    best = logits.topk(2, dim=1).values
    return best[:, 1] - best[:, 0]


def _uniform(numbers: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if numbers is None:
        return torch.rand(shape, device=like.device, dtype=like.dtype)
    count = torch.Size(shape).numel()
    if numbers.numel() < count:
        raise ZooError(f"points want {count} random numbers, {numbers.numel()} are given")
    return numbers.flatten()[:count].view(shape).to(like)


@torch.no_grad()
def uncertain_points(
    logits: Tensor,
    uncertainty: Callable[[Tensor], Tensor],
    count: int,
    oversample: float = 3,
    importance: float = 0.75,
    noise: PointNoise | None = None,
) -> Tensor:
    """Points (N, count, 2) to train on, more of them where `logits` (N, K, H, W) are uncertain (section 3.2).

    Of `oversample` times as many uniform points the `importance` share of `count` that are the most uncertain, then
    uniform ones. The uncertainty is that of the logits at the points: between two cells of opposite sign it is large,
    and neither of them need be uncertain itself.

    Args:
        logits: coarse predictions.
        uncertainty: of sampled logits (N, K, P), as (N, P).
        count, oversample, importance: N, k and beta of the paper.
        noise: what the points are drawn by; by default torch's global generator.
    """
    logits, n = at_least_float32(logits), len(logits)
    oversampled, fresh = noise or (None, None)
    drawn = _uniform(oversampled, (n, int(count * oversample), 2), logits)
    chosen = int(importance * count)
    most = uncertainty(sample_points(logits, drawn)).topk(chosen, dim=1).indices
    points = drawn.gather(1, most[..., None].expand(-1, -1, 2))
    return torch.cat([points, _uniform(fresh, (n, count - chosen, 2), logits)], dim=1)


def uncertain_cells(uncertainty: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most uncertain cells of maps (N, H, W): their places (N, P) row by row, and centres (N, P, 2); P is `count`,
    or all there are."""
    height, width = uncertainty.shape[-2:]
    places = uncertainty.flatten(1).topk(min(height * width, count), dim=1).indices
    x, y = (places % width + 0.5) / width, (places // width + 0.5) / height
    return places, torch.stack([x, y], dim=2).to(uncertainty.dtype)


def image_points(boxes: Tensor, points: Tensor) -> Tensor:
    """Points (R, P, 2) of `boxes` (R, 4) in pixels of the image."""
    return boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])


def fine_features(maps: Sequence[Tensor], strides: Sequence[int], pixels: Tensor, counts: Sequence[int]) -> Tensor:
    """Features (C, R, P) at `pixels` (R, P, 2), the channels of all `maps` (B, C, H, W) beside each other.

    A map covers the padded image, W times its stride pixels: by these the coordinates are divided.

    Args:
        maps, strides: the levels.
        pixels: of the regions, image after image.
        counts: regions of each image.
    """
    levels = []
    for features, stride in zip(maps, strides, strict=True):
        features = at_least_float32(features)
        side = pixels.new_tensor([features.shape[-1] * stride, features.shape[-2] * stride])
        grids = (2 * (pixels / side) - 1).to(features.dtype).split(list(counts))
        levels.append(
            torch.cat(
                [
                    grid_sample(x[None], grid[None], align_corners=False)[0]
                    for x, grid in zip(features, grids, strict=True)
                ],
                dim=1,
            )
        )
    return torch.cat(levels) if len(levels) > 1 else levels[0]


@torch.no_grad()
def sample_masks(masks: Tensor, index: Tensor, pixels: Tensor) -> Tensor:
    """Values (n, P) in [0, 1] of the masks (G, h, w) bool that `index` (n,) names at `pixels` (n, P, 2), bilinear, zero
    outside."""
    height, width = masks.shape[-2:]
    flat, base = masks.flatten(), (index * (height * width))[:, None]
    place = pixels - 0.5
    low = place.floor()
    share = place - low
    value = torch.zeros_like(place[..., 0])
    for right in (0, 1):
        for below in (0, 1):
            x, y = low[..., 0].long() + right, low[..., 1].long() + below
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            at = base + y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
            across = share[..., 0] if right else 1 - share[..., 0]
            down = share[..., 1] if below else 1 - share[..., 1]
            value += across * down * (flat[at] & inside)
    return value
