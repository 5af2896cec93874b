"""How well masks agree at their boundaries (Cheng et al., "Boundary IoU", CVPR 2021, arXiv 2103.16562)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.metrics.gathered import Gathered
from zoo.ops.masks import boundary_width, inner_boundary


def overlaps(preds: Tensor, target: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mask IoU (N,) and Boundary IoU (N,) of masks (N, H, W) bool, pair by pair; of two empty ones 0.

    Boundary IoU (equation 2 there) is the IoU of the parts of both masks that lie within `width` pixels of their own
    contour.
    """

    def iou(a: Tensor, b: Tensor) -> Tensor:
        return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)

    return iou(preds, target), iou(inner_boundary(preds, width), inner_boundary(target, width))


class BoundaryIoU(Gathered):
    """Mean IoU of masks and of their boundaries, in percent, over all pairs seen.

    `update` takes masks (N, H, W) bool of a picture each, in lists: those predicted and, pair by pair, the true ones.
    `compute` gives `boundary_iou`, `mask_iou` and `least_iou`, the mean of the smaller of the two, which the paper's
    Boundary AP judges by.

    Args:
        share: the boundary's width as a share of the picture's diagonal.

    Raises:
        ZooError: a share out of (0, 1], or masks that are no pairs.
    """

    sample = "pair of masks"
    total: Tensor
    pairs: Tensor

    def __init__(self, share: float = 0.02, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < share <= 1:
            raise ZooError(f"the boundary is a share of the diagonal in (0, 1], not {share}")
        self.share = share
        self.add_state("total", default=torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Adds pictures."""
        if len(preds) != len(target):
            raise ZooError(f"masks of {len(preds)} pictures, true ones of {len(target)}")
        self._count()
        for found, true in zip(preds, target, strict=True):
            if found.shape != true.shape:
                raise ZooError(f"masks of {tuple(found.shape)}, true ones of {tuple(true.shape)}")
            height, width = found.shape[-2:]
            pair = found.to(self.device).bool(), true.to(self.device).bool()
            whole, rim = overlaps(*pair, boundary_width((height, width), self.share))
            self.total = self.total + torch.stack([rim, whole, rim.minimum(whole)]).double().sum(1)
            self.pairs = self.pairs + len(found)

    def compute(self) -> dict[str, Tensor]:
        """The numbers; see the class."""
        self._require()
        rim, whole, least = 100 * self.total / self.pairs.clamp(min=1)
        return {"boundary_iou": rim, "mask_iou": whole, "least_iou": least}
