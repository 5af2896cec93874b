"""The task over a network of semantic segmentation: its losses, and mIoU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.metrics.semantic import SemanticIoU
from zoo.nn.detection.semantic import labels_of
from zoo.training.base import BaseModule
from zoo.training.optim import Optim


class Segmentation(BaseModule):
    """Training of a network that labels every pixel, and its evaluation.

    The network gives losses by name in training mode and, of each picture, {"semantic": (H, W)} in its file's pixels in
    evaluation; batches are those of :class:`zoo.data.detection.DetectionDataModule` with `semantic`. Logs `train/` +
    each loss, and `{val,test}/semantic/mIoU` with fIoU, mACC and pACC.

    Args:
        network: what segments.
        classes: C, how many labels there are.
        optim: optimiser and schedule.
        init_from: where :meth:`setup` takes pre-trained weights from by :meth:`load_initial`; null: from scratch.
    """

    monitor = ("val/semantic/mIoU", "max")
    batch_keys = ("image", "size", "target")
    not_exported = "takes a whole batch"

    def __init__(self, network: nn.Module, classes: int, optim: Optim, init_from: str | None = None) -> None:
        super().__init__(optim)
        self.network, self.init_from = network, init_from
        self.val_semantic, self.test_semantic = (SemanticIoU(classes) for _ in range(2))

    def trainable(self) -> nn.Module:
        return self.network

    def forward(self, batch: Mapping[str, Any]) -> Any:
        return self.network(batch)

    def further(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Random numbers that a batch gives the network."""
        return {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses: dict[str, Tensor] = self.network(batch, **self.further(batch))
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch["image"]))
        return torch.stack(list(losses.values())).sum()

    def _evaluate(self, batch: Mapping[str, Any], metric: SemanticIoU) -> None:
        metric.update([one["semantic"] for one in self.network(batch)], labels_of(batch))

    def _report(self, metric: SemanticIoU, split: str) -> None:
        for name, value in metric.compute().items():
            self.log(f"{split}/semantic/{name}", value, prog_bar=split == "val" and name == "mIoU")
        metric.reset()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, self.val_semantic)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._report(self.val_semantic, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, self.test_semantic)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._report(self.test_semantic, "test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Tensor]]:
        """The label map of each picture, in its file's pixels."""
        return self.network(batch)
