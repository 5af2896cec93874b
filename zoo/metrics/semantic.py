"""Numbers of semantic segmentation from one confusion matrix over all pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.metrics.gathered import Gathered


class SemanticIoU(Gathered):
    """mIoU, fIoU, mACC and pACC, in percent, of all pictures seen.

    Of the pixels whose true label counts: `mIoU` is the mean of the IoU over the classes that occur in the truth,
    `fIoU` the same weighted by how many pixels a class has, `mACC` the mean over them of the share of its pixels that
    are right, and `pACC` the share of all pixels. They are those of detectron2's evaluation of semantic segmentation.

    `update` takes label maps (H, W), of any number of pictures in lists. `by_class` holds the IoU of each class of the
    last `compute`, nan where there was none of it.

    Args:
        num_classes: C.
        ignored: the true label of pixels that do not count.

    Raises:
        ZooError: maps of different sizes, a label that is no class.
    """

    sample = "picture"
    confusion: Tensor

    def __init__(self, num_classes: int, ignored: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ZooError(f"a confusion matrix wants 1 class or more, not {num_classes}")
        self.num_classes, self.ignored = num_classes, ignored
        self.by_class: Tensor = torch.zeros(0)
        self.add_state(
            "confusion", default=torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, preds: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Adds pictures; `preds` and `target` in the same order."""
        if len(preds) != len(target):
            raise ZooError(f"{len(preds)} label maps for {len(target)} pictures")
        self._count()
        for found, true in zip(preds, target, strict=True):
            if found.shape != true.shape:
                raise ZooError(
                    f"a label map of {tuple(found.shape)} for a picture of {tuple(true.shape)} (height, width)"
                )
            found, true = found.to(self.device).long().flatten(), true.to(self.device).long().flatten()
            counts = true != self.ignored
            found, true = found[counts], true[counts]
            for what, labels in (("predicted", found), ("true", true)):
                if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                    raise ZooError(
                        f"{what} labels from {int(labels.min())} to {int(labels.max())}, but {self.num_classes} classes"
                    )
            flat = torch.bincount(true * self.num_classes + found, minlength=self.num_classes**2)
            self.confusion = self.confusion + flat.view(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """The numbers; see the class. Nan where no pixel counted."""
        self._require()
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        matrix = self.confusion.to(exact)  # (true, predicted)
        right, pixels, claimed = matrix.diag(), matrix.sum(1), matrix.sum(0)
        there = pixels > 0
        iou = right / (pixels + claimed - right)
        self.by_class = 100 * iou.where(there, iou.new_tensor(float("nan"))).cpu()
        share = pixels / pixels.sum()
        return {
            "mIoU": 100 * iou[there].mean(),
            "fIoU": 100 * (iou * share)[there].sum() if there.any() else share.new_tensor(float("nan")),
            "mACC": 100 * (right / pixels)[there].mean(),
            "pACC": 100 * right.sum() / pixels.sum(),
        }
