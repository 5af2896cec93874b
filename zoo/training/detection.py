"""The task over a detector: its losses, and the average precisions of COCO and of PASCAL VOC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from zoo.metrics.coco import CocoAP
from zoo.metrics.voc import Rule, VocAP
from zoo.training.base import BaseModule
from zoo.training.optim import Optim

NAMES = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}


class Detection(BaseModule):
    """Training of a detector, evaluated by COCO's average precision.

    The network gives losses by name in training mode and detections in the files' pixels in evaluation
    (:class:`zoo.nn.detection.rcnn.RCNN`); batches are those of :class:`zoo.data.detection.DetectionDataModule`. Logs
    `train/` + each loss, and `{val,test}/box/AP`, `/box/AP50` and all the other numbers of COCO, `/mask/...` and
    `/keypoint/...` likewise where the network gives those; each picture once on any number of processes.

    Args:
        network: the detector.
        optim: optimiser and schedule.
        iou_types: what is evaluated, of "bbox", "segm" and "keypoints".
        oks_sigmas: of the keypoints, as in COCO's OKS; null for COCO's 17.
        clip_each: bound of the norm of each parameter's own gradient; null for none.
        init_from: where :meth:`setup` takes pre-trained weights from by :meth:`load_initial`; null: from scratch.
        voc: the rule of PASCAL VOC's average precision of boxes, `{val,test}/voc/AP50` and others; null: without it.
    """

    monitor = ("val/box/AP", "max")
    batch_keys = ("image", "size", "target")
    not_exported = "takes a whole batch, and gives as many detections as it finds"

    def __init__(
        self,
        network: nn.Module,
        optim: Optim,
        iou_types: tuple[str, ...] = ("bbox",),
        oks_sigmas: Sequence[float] | None = None,
        clip_each: float | None = None,
        init_from: str | None = None,
        voc: Rule | None = None,
    ) -> None:
        super().__init__(optim)
        self.network = network
        self.clip_each, self.init_from = clip_each, init_from
        self.val_metric, self.test_metric = (CocoAP(iou_types=iou_types, sigmas=oks_sigmas) for _ in range(2))
        self.val_voc, self.test_voc = (None if voc is None else VocAP(voc) for _ in range(2))

    def trainable(self) -> nn.Module:
        return self.network

    def forward(self, batch: Mapping[str, Any]) -> Any:
        return self.network(batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses: dict[str, Tensor] = self.network(batch, batch.get("noise"))
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch["image"]))
        return torch.stack(list(losses.values())).sum()

    def statistics_pass(self, batch: Mapping[str, Any]) -> None:
        """A batch through the network in training mode, losses included; see :class:`~zoo.training.PreciseBN`."""
        self.network(batch, batch.get("noise"))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.clip_each is None:
            return
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                clip_grad_norm_(parameter, self.clip_each)

    def _evaluate(self, batch: Mapping[str, Any], metric: CocoAP, voc: VocAP | None = None) -> dict[str, Any]:
        """Hands a batch to the metrics; what was found, for callbacks."""
        found = self.network(batch)
        metric.update(found, batch["target"])
        if voc is not None:
            voc.update(found, batch["target"])
        return {"detections": found}

    def judged(self, split: str) -> dict[str, Any]:
        """The AP of each class in the last evaluation of a split; see :class:`~zoo.training.ErrorAnalysis`."""
        metric = self.val_metric if split == "val" else self.test_metric
        return {"ap": {NAMES.get(kind, kind): scores for kind, scores in metric.by_class.items()}}

    def _report(self, metric: CocoAP | VocAP | None, split: str) -> None:
        if metric is None:
            return
        for name, value in metric.compute().items():
            kind, _, number = name.partition("/")
            self.log(f"{split}/{NAMES.get(kind, kind)}/{number}", value, prog_bar=split == "val" and number == "AP")
        metric.reset()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, self.val_metric, self.val_voc)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._report(self.val_metric, "val")
        self._report(self.val_voc, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, self.test_metric, self.test_voc)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._report(self.test_metric, "test")
        self._report(self.test_voc, "test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Tensor]]:
        """Detections of each picture, in its file's pixels."""
        return self.network(batch)
