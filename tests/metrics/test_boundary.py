"""Boundary IoU by its definition: distances to the contour, borders of the picture, pairs over processes."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ZooError
from zoo.metrics import BoundaryIoU
from zoo.metrics.boundary import overlaps
from zoo.ops.masks import boundary_width, inner_boundary


@pytest.mark.parametrize("width", [1, 2, 5])
def test_boundaries_are_what_erosion_takes_away(width: int) -> None:
    masks = torch.rand(4, 20, 31, generator=torch.Generator().manual_seed(0)) > 0.1
    masks[1, 2:18, 3:30] = True
    masks[2] = True
    eroded = masks
    for _ in range(width):  # by 3x3, as the paper's code; nothing lies outside the picture
        padded = torch.nn.functional.pad(eroded, [1] * 4)
        eroded = padded.unfold(1, 3, 1).unfold(2, 3, 1).flatten(3).all(3)
    assert torch.equal(inner_boundary(masks, width), masks & ~eroded)
    assert inner_boundary(masks[:0], width).shape == (0, 20, 31)


def test_a_small_shift_costs_boundaries_more_than_masks() -> None:
    true, found = torch.zeros(1, 100, 100, dtype=torch.bool), torch.zeros(1, 100, 100, dtype=torch.bool)
    true[:, 20:80, 20:80] = found[:, 21:81, 20:80] = True
    width = boundary_width((100, 100))
    assert (width, boundary_width((5, 5))) == (3, 1)
    whole, rim = overlaps(found, true, width)
    assert whole.item() == pytest.approx(59 / 61)
    assert rim.item() < 0.8 < whole.item()
    metric = BoundaryIoU()
    metric.update([found, true], [true, true])
    metric.update([found[:0]], [true[:0]])
    numbers = metric.compute()
    assert numbers["boundary_iou"].item() == pytest.approx(50 * (1 + rim.item()))
    assert numbers["least_iou"] == numbers["boundary_iou"] < numbers["mask_iou"]


def test_mistakes_are_named() -> None:
    metric, masks = BoundaryIoU(), torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(ZooError, match="seen no pair of masks"):
        metric.compute()
    with pytest.raises(ZooError, match="masks of"):
        metric.update([masks], [masks[:, :2]])
    with pytest.raises(ZooError, match="share of the diagonal"):
        BoundaryIoU(0)
