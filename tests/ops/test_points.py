"""Points of maps and masks: sampling, and which ones are uncertain."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import grid_sample

from zoo.errors import ZooError
from zoo.ops.points import (
    PointNoise,
    class_uncertainty,
    fine_features,
    grid_points,
    margin_uncertainty,
    sample_masks,
    sample_points,
    uncertain_cells,
    uncertain_points,
)


def test_points_lie_at_cell_centres_and_maps_are_read_there() -> None:
    maps = torch.arange(24.0).view(1, 2, 3, 4)
    points = grid_points(3, 4, maps)
    assert points[0].tolist() == [0.125, pytest.approx(1 / 6)]
    torch.testing.assert_close(sample_points(maps, points[None])[0], maps[0].flatten(1))
    assert sample_points(maps.bfloat16(), points[None]).dtype == torch.float32
    places, centres = uncertain_cells(maps[:, 0], 5)
    assert places.tolist() == [[11, 10, 9, 8, 7]]
    torch.testing.assert_close(centres[0], points[places[0]])
    assert uncertain_cells(maps[:, 0], 99)[0].shape == (1, 12)


def test_uncertainty_is_that_of_the_logits_at_the_points() -> None:
    """Between cells of opposite sign a point is uncertain, though none of the cells is."""
    logits = torch.tensor([[[[-8.0, 8.0]]]])
    oversampled = torch.tensor([[0.5, 0.5], [0.25, 0.5], [0.8, 0.5], [0.45, 0.5]])
    noise = PointNoise(oversampled, torch.tensor([0.1, 0.2]))
    labels = torch.zeros(1, dtype=torch.long)
    points = uncertain_points(logits, lambda x: class_uncertainty(x, labels), 2, 2, 0.5, noise)
    assert points.tolist() == [[[0.5, 0.5], [pytest.approx(0.1), pytest.approx(0.2)]]]
    with pytest.raises(ZooError, match="want 6 random numbers, 2 are given"):
        uncertain_points(logits, lambda x: x[:, 0], 3, 1, 0, PointNoise(oversampled, torch.zeros(2)))
    torch.manual_seed(0)
    everywhere = uncertain_points(logits, lambda x: class_uncertainty(x, labels), 4000, 1, 0)
    near = uncertain_points(logits, lambda x: class_uncertainty(x, labels), 4000, 3, 0.75)
    assert (everywhere[..., 0] - 0.5).abs().mean() > 0.24 > 0.15 > (near[..., 0] - 0.5).abs().mean()
    logits = torch.tensor([[3.0, 1.0], [2.0, 1.0], [-1.0, 1.0]])[None]
    assert margin_uncertainty(logits).tolist() == [[-1.0, 0.0]]
    assert class_uncertainty(logits, torch.tensor([2])).tolist() == [[-1.0, -1.0]]


def test_labels_of_points_are_those_of_interpolated_masks() -> None:
    draw = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 9, 14, generator=draw) > 0.5
    index, pixels = torch.tensor([2, 0, 2, 1]), torch.rand(4, 50, 2, generator=draw) * 18 - 2
    grid = 2 * pixels / torch.tensor([14, 9]) - 1
    wanted = grid_sample(masks[index][:, None].float(), grid[:, :, None], align_corners=False)[:, 0, :, 0]
    torch.testing.assert_close(sample_masks(masks, index, pixels), wanted)


def test_fine_features_are_read_from_the_image_of_each_region() -> None:
    maps = [torch.stack([torch.full((2, 4, 4), float(n)) for n in (1, 2)]), torch.ones(2, 1, 2, 2)]
    found = fine_features(maps, (4, 8), torch.full((3, 5, 2), 8.0), [1, 2])
    assert found.shape == (3, 3, 5)
    assert found[:, :, 0].tolist() == [[1, 2, 2], [1, 2, 2], [1, 1, 1]]
