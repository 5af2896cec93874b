"""Masks and keypoints of regions: cut out of the image, and put back."""

from __future__ import annotations

import numpy as np
import torch

from zoo.ops.keypoints import heatmaps_to_keypoints, keypoint_cells
from zoo.ops.masks import crop_masks, crop_polygons, paste_masks


def test_masks_are_cropped_and_pasted_back() -> None:
    boxes = torch.tensor([[10.0, 12, 42, 44], [5, 5, 50, 20]])
    masks = torch.zeros(2, 60, 70, dtype=torch.bool)
    masks[0, 12:44, 10:26] = True  # the left half of the first box
    cropped = crop_masks(masks, torch.tensor([0, 1]), boxes, 28)
    assert cropped[0, :, :14].all()
    assert not cropped[0, :, 14:].any()
    assert not cropped[1].any()
    pasted = paste_masks(cropped.float(), boxes, (60, 70))
    assert pasted.shape == (2, 60, 70)
    assert (pasted[0] ^ masks[0]).sum() <= 32  # a column at the edge at most
    polygon = [[np.array([10.0, 12, 26, 12, 26, 44, 10, 44])], [np.array([60.0, 50, 65, 50, 65, 55])]]
    drawn = crop_polygons(polygon, boxes, 28)
    assert (drawn[0] ^ cropped[0]).float().mean() < 0.05
    assert not drawn[1].any()
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 6)).shape == (0, 5, 6)


def test_keypoints_come_back_from_their_cells() -> None:
    boxes = torch.tensor([[10.0, 20, 66, 76], [0, 0, 112, 28]])
    keypoints = torch.tensor(
        [[[12.3, 70.1, 2], [66, 76, 1], [9, 30, 2], [30, 30, 0]], [[0.0, 0, 1], [111, 27, 2], [50, 14, 2], [5, 29, 1]]]
    )
    cells, valid = keypoint_cells(keypoints, boxes, 56)
    assert valid.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert cells[0, 1] == 56 * 56 - 1  # on the border: the last cell
    maps = torch.full((2, 4, 56 * 56), -8.0).scatter(2, cells[..., None], 8.0).unflatten(2, (56, 56))
    found = heatmaps_to_keypoints(maps, boxes)
    off = (found[..., :2] - keypoints[..., :2]).abs()[valid]
    assert (off <= torch.tensor([2.0, 1.0])).all()
    assert (found[..., 3] > 0).all()
    assert found[0, :2, 3].min() > 0.99  # the box is as large as its map: all of the mass lies in one cell
