"""How sharp what was filled in is, beside what was there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class GradientRatio(Metric):
    """The mean absolute difference of neighbouring pixels of predictions over that of the truth, where pixels are
    hidden: 1 for pictures as sharp as the truth, below 1 for blurred ones, above 1 for noisy ones.

    Neighbours lie beside or below each other, and both are hidden. NaN where there are none.
    """

    full_state_update = False
    predicted: Tensor
    true: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("predicted", "true"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, true: Tensor, hidden: Tensor) -> None:
        """Takes pictures or clips (B, C, ..., H, W) and which pixels are `hidden`, bool (B, 1, ..., H, W)."""
        for axis in (-1, -2):
            length = hidden.shape[axis] - 1
            both = hidden.narrow(axis, 0, length) & hidden.narrow(axis, 1, length)
            for name, x in (("predicted", predicted), ("true", true)):
                steps = x.diff(dim=axis).abs().to(self.true.dtype) * both
                setattr(self, name, getattr(self, name) + steps.sum())

    def compute(self) -> Tensor:
        return self.predicted / self.true
