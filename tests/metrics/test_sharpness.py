"""The gradient ratio of what was filled in."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ZooError
from zoo.metrics.sharpness import GradientRatio
from zoo.training import Inpainting


def test_blur_lowers_the_gradient_ratio() -> None:
    x, hidden = torch.randn(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    hidden[..., 2:6, 2:6] = True
    ratio = GradientRatio()
    ratio.update(torch.where(hidden, x / 2, 7.0), x, hidden)  # what is visible does not count
    assert ratio.compute().item() == pytest.approx(0.5)


def test_clips_and_seams_between_hidden_and_visible_do_not_count() -> None:
    x, hidden = torch.randn(1, 3, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4, dtype=torch.bool)
    hidden[:, :, 0, 0, :2] = True  # one pair
    ratio = GradientRatio()
    ratio.update(3 * x, x, hidden)
    assert ratio.true.item() == pytest.approx((x[:, :, 0, 0, 0] - x[:, :, 0, 0, 1]).abs().sum().item())
    assert ratio.compute().item() == pytest.approx(3)


def test_inpainting_wants_samples() -> None:
    with pytest.raises(ZooError, match="num_samples"):
        Inpainting(num_samples=0)
