"""Focal losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import softplus
from torchvision.ops import sigmoid_focal_loss

from zoo.ops.focal import focal_loss, focal_loss_star


def test_the_losses_are_what_the_paper_says() -> None:
    x = torch.linspace(-4, 4, 9)
    for y in (torch.zeros(9), torch.ones(9)):
        torch.testing.assert_close(focal_loss(x, y), sigmoid_focal_loss(x, y))
        torch.testing.assert_close(focal_loss(x, y, None, 0.0), softplus(x * (1 - 2 * y)))
        star = -torch.sigmoid(2 * x * (2 * y - 1) + 1).log() / 2  # equations 7 and 8
        torch.testing.assert_close(focal_loss_star(x, y, None, 2.0, 1.0), star)
    easy = math.log(0.9 / 0.1)  # p_t 0.9: a hundredth of the cross entropy (section 3.2)
    one = torch.tensor([easy]), torch.ones(1)
    assert float(focal_loss(*one, None) / focal_loss(*one, None, 0.0)) == pytest.approx(0.01, rel=1e-4)
    assert focal_loss(x.bfloat16(), torch.ones(9)).dtype == torch.float32
