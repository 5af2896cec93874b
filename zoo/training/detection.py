"""The task over a detector: its losses, and COCO's or LVIS's average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from zoo.errors import unknown
from zoo.metrics import CocoAP, LvisAP
from zoo.nn.detection import configured
from zoo.nn.detection.roi_heads import BoxPredictor
from zoo.training.base import BaseModule
from zoo.training.optim import Optim
from zoo.training.tta import TTA, detect_augmented, require_augmentable

MetricName = Literal["coco", "lvis"]
NAMES = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}


class Detection(BaseModule):
    """Training of a detector, evaluated by COCO's average precision or LVIS's.

    The network gives losses by name in training mode and detections in the files' pixels in evaluation
    (:class:`zoo.nn.detection.rcnn.RCNN`); batches are those of :class:`zoo.data.detection.DetectionDataModule`. Logs
    `train/` + each loss, and `{val,test}/box/AP`, `/box/AP50` and all the other numbers of COCO, `/mask/...` and
    `/keypoint/...` likewise where the network gives those; each picture once on any number of processes. A network with
    a federated loss learns from the data module on how many pictures its classes are (`class_image_counts`).

    Args:
        network: the detector.
        optim: optimiser and schedule.
        iou_types: what is evaluated, of "bbox", "segm" and "keypoints".
        oks_sigmas: of the keypoints, as in COCO's OKS; null for COCO's 17.
        clip_each: bound of the norm of each parameter's own gradient; null for none.
        init_from: where :meth:`setup` takes pre-trained weights from by :meth:`load_initial`; null: from scratch.
        metric: `coco`, or `lvis`: the numbers of :class:`~zoo.metrics.LvisAP`, for boxes and masks.
        tta: views of an image that are merged in evaluation, of an R-CNN; null for the image as it is.

    Raises:
        ZooError: an unknown metric, or one or views that the network is not for.
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
        metric: MetricName = "coco",
        tta: TTA | None = None,
    ) -> None:
        super().__init__(optim)
        self.network = network
        self.clip_each, self.init_from = clip_each, init_from
        self.tta = None if tta is None else configured(TTA, tta)
        if self.tta is not None:
            require_augmentable(network, self.tta)
        if metric not in get_args(MetricName):
            raise unknown("metric", metric, get_args(MetricName))
        self.val_metric, self.test_metric = (
            LvisAP(iou_types) if metric == "lvis" else CocoAP(iou_types=iou_types, sigmas=oks_sigmas) for _ in range(2)
        )

    def trainable(self) -> nn.Module:
        return self.network

    def forward(self, batch: Mapping[str, Any]) -> Any:
        return self.network(batch)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        count = getattr(getattr(self.trainer, "datamodule", None), "class_image_counts", lambda: None)
        predictors = [m for m in self.network.modules() if isinstance(m, BoxPredictor) and m.config.federated]
        if predictors and (counts := count()) is not None:
            for predictor in predictors:
                predictor.count_images(counts)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses: dict[str, Tensor] = self.network(batch, batch.get("noise"))
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch["image"]))
        return torch.stack(list(losses.values())).sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.clip_each is None:
            return
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                clip_grad_norm_(parameter, self.clip_each)

    def _find(self, batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        return self.network(batch) if self.tta is None else detect_augmented(self.network, batch, self.tta)  # type: ignore[arg-type]

    def _evaluate(self, batch: Mapping[str, Any], metric: CocoAP) -> dict[str, Any]:
        """Hands a batch to the metric; what was found, for callbacks."""
        found = self._find(batch)
        metric.update(found, batch["target"])
        return {"detections": found}

    def judged(self, split: str) -> dict[str, Any]:
        """The AP of each class in the last evaluation of a split; see :class:`~zoo.training.ErrorAnalysis`."""
        metric = self.val_metric if split == "val" else self.test_metric
        return {"ap": {NAMES.get(kind, kind): scores for kind, scores in metric.by_class.items()}}

    def _report(self, metric: CocoAP, split: str) -> None:
        for name, value in metric.compute().items():
            kind, _, number = name.partition("/")
            self.log(f"{split}/{NAMES.get(kind, kind)}/{number}", value, prog_bar=split == "val" and number == "AP")
        metric.reset()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, self.val_metric)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._report(self.val_metric, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, self.test_metric)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._report(self.test_metric, "test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Tensor]]:
        """Detections of each picture, in its file's pixels."""
        return self._find(batch)
