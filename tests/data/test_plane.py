"""Points in the plane, and how samples lie among them."""

from __future__ import annotations

import pytest
import torch

from zoo.data import PlaneDataModule
from zoo.errors import ZooError
from zoo.training.plane import PlaneEvaluation, least_mode, sliced_wasserstein


def test_points_are_those_of_their_modes() -> None:
    data = PlaneDataModule("two_modes", train_samples=4000, eval_samples=100)
    points = data.points("train")
    assert points.shape == (4000, 2)
    assert torch.equal(points, PlaneDataModule("two_modes", train_samples=4000).points("train"))
    assert not torch.equal(points[:100], data.points("val"))
    right = points[:, 0] > 1
    assert right.float().mean().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(points[right].mean(0), data.modes[1], atol=0.03, rtol=0)
    assert points[right].std(0).tolist() == pytest.approx([0.2, 0.2], abs=0.02)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (256, 2, 1, 1)
    with pytest.raises(ZooError, match="did you mean 'two_modes'"):
        PlaneDataModule("two_mode")


def test_measures_tell_one_mode_from_two() -> None:
    modes = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    both, one = modes.repeat(50, 1), modes[:1].repeat(100, 1)
    assert least_mode(both, modes, 0.5) == 1
    assert least_mode(one, modes, 0.5) == 0
    assert sliced_wasserstein(both, both.flip(0)) == 0
    assert sliced_wasserstein(both, one).item() == pytest.approx(2 / torch.pi, rel=0.01)  # half of them, 2 apart
    with pytest.raises(ZooError, match="num_samples"):
        PlaneEvaluation(0)
