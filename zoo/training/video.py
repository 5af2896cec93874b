"""Tasks over a network of :mod:`zoo.nn.resnet3d`: classify clips, classify them by several labels, classify boxes.

Batches hold `video` (B, C, T, H, W), and in evaluation `video_id` (B,) and `view` (B,): a test set gives each video as
several clips and crops, and a metric joins what the network says of them, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchmetrics import MeanMetric, Metric

from zoo.metrics.video import FrameMAP, MultiLabelMAP, MultiViewAccuracy
from zoo.nn.memory_order import to_channels_last
from zoo.training.base import BaseModule
from zoo.training.classification import check_classes
from zoo.training.optim import Optim


class VideoClassification(BaseModule):
    """End-to-end training of a classifier of clips that have one label each: `label` (B,).

    In evaluation the softmax of all views of a video is summed. Logs `{val,test}/top1`, `/top5` (fractions) and `/loss`
    (the mean over views).

    Args:
        network: gives logits (B, num_classes) of videos.
        optim: optimiser and schedule.
        num_classes: K; top-5 counts min(5, K) classes.
        label_smoothing: of the training targets.
        init_from: where :meth:`setup` takes pre-trained weights from by :meth:`load_initial`; null: from scratch.
        channels_last: keep activations in the order (B, T, H, W, C), which poolings and normalisations are faster in.
    """

    monitor = ("val/top1", "max")
    batch_keys: Sequence[str] = ("video", "label", "video_id", "view")

    def __init__(
        self,
        network: nn.Module,
        optim: Optim,
        num_classes: int,
        label_smoothing: float = 0.0,
        init_from: str | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(optim)
        self.network, self.num_classes = network, num_classes
        self.label_smoothing, self.init_from, self.channels_last = label_smoothing, init_from, channels_last
        if channels_last:
            to_channels_last(network, torch.channels_last_3d)
        self.val_metrics, self.test_metrics = (
            nn.ModuleDict({"score": self.make_metric(), "loss": MeanMetric()}) for _ in range(2)
        )

    def make_metric(self) -> Metric:
        """The metric that :meth:`update_metric` hands the views to; it computes numbers by name."""
        return MultiViewAccuracy(self.num_classes)

    def setup(self, stage: str) -> None:
        if stage != "predict" and self._trainer is not None:
            check_classes(getattr(self.trainer, "datamodule", None), self.num_classes)
        super().setup(stage)

    def trainable(self) -> nn.Module:
        return self.network

    def forward(self, video: Tensor | Sequence[Tensor], *inputs: Any) -> Tensor:
        """Videos (B, C, T, H, W), or what each pathway takes of them, to logits (B, num_classes)."""
        if self.channels_last:
            order = torch.channels_last_3d
            if isinstance(video, Tensor):
                video = video.contiguous(memory_format=order)
            else:
                video = [frames.contiguous(memory_format=order) for frames in video]
        return self.network(video, *inputs)

    def predict_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """What the losses and probabilities are of."""
        return self(batch["video"])

    def losses(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The loss of each sample (B,)."""
        smoothing = self.label_smoothing if self.training else 0.0
        return cross_entropy(logits, batch["label"], reduction="none", label_smoothing=smoothing)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of the classes, in the shape of the logits."""
        return logits.softmax(dim=-1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.losses(self.predict_logits(batch), batch).mean()

    def update_metric(self, metric: Any, logits: Tensor, batch: Mapping[str, Any]) -> None:
        """Hands a batch of views to the metric."""
        metric.update(self.probabilities(logits), batch["label"], batch["video_id"], batch["view"])

    def _evaluate(self, batch: Mapping[str, Any], metrics: Any) -> dict[str, Tensor]:
        """Hands a batch to the metrics; its logits and losses, for callbacks."""
        logits = self.predict_logits(batch)
        loss = self.losses(logits, batch)
        metrics["loss"].update(loss)
        self.update_metric(metrics["score"], logits, batch)
        return {"logits": logits, "loss": loss}

    def judged(self, split: str) -> dict[str, Any]:
        """What the last evaluation of a split says of single classes; see :class:`~zoo.training.ErrorAnalysis`."""
        score: Any = (self.val_metrics if split == "val" else self.test_metrics)["score"]
        if isinstance(score, MultiViewAccuracy):
            return {} if score.joined is None else {"pairs": score.joined}
        return {"ap": {"video" if isinstance(score, MultiLabelMAP) else "box": score.by_class}}

    def _log_scores(self, metrics: Any, split: str) -> None:
        scores = {**metrics["score"].compute(), "loss": metrics["loss"].compute()}
        named = {f"{split}/{name}": value.float() for name, value in scores.items()}
        self.log_dict(named, prog_bar=split == "val", sync_dist=True)
        for metric in metrics.values():
            metric.reset()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._log_scores(self.val_metrics, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._log_scores(self.test_metrics, "test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        """What is predicted of which view: {"probabilities" (B, num_classes), "video_id" (B,), "view" (B,)}."""
        named = {name: batch[name] for name in ("video_id", "view")}
        return {"probabilities": self.probabilities(self.predict_logits(batch)), **named}


class MultiLabelVideoClassification(VideoClassification):
    """The same for clips that have any number of labels each (Charades): `label` (B, num_classes) of 0 and 1.

    Trained by binary cross-entropy, the mean over clips and classes; evaluated by the mean average precision of the
    largest probability over the views. Logs `{val,test}/mAP` (a fraction) and `/loss`.
    """

    monitor = ("val/mAP", "max")

    def make_metric(self) -> Metric:
        return MultiLabelMAP(self.num_classes)

    def losses(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return binary_cross_entropy_with_logits(logits, batch["label"].to(logits.dtype), reduction="none").mean(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


class ActionDetection(VideoClassification):
    """Classifies the boxes of a clip's middle frame by several actions each (AVA).

    Batches hold, for each video, a dict in `target`: `boxes` (N, 4) in pixels of the clip, `labels` (N, num_classes) of
    0 and 1; in evaluation also `original_boxes` (N, 4), and what is really there, `true_boxes` (G, 4) and `true_labels`
    (G,), with `video_id` and `second`. Trained by binary cross-entropy, the mean over boxes and classes; evaluated by
    the frame mAP over the `classes`. Logs `{val,test}/mAP` (a fraction) and `/loss`.
    """

    monitor = ("val/mAP", "max")
    batch_keys = ("video", "target")
    classes: list[int] | None = None  # columns that are evaluated; None: all

    def make_metric(self) -> Metric:
        return FrameMAP(self.num_classes, self.classes)

    def predict_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (sum of N, num_classes) of the boxes of all videos."""
        return self(batch["video"], [target["boxes"] for target in batch["target"]])

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        """For each key frame {"probabilities" (N, num_classes), "boxes" (N, 4) in units of the frame's sides,
        "video_id", "second"}."""
        scores = self.probabilities(self.predict_logits(batch))
        parts = scores.split([len(target["boxes"]) for target in batch["target"]])
        return [
            {"probabilities": part, "boxes": target["original_boxes"], **{k: target[k] for k in ("video_id", "second")}}
            for part, target in zip(parts, batch["target"], strict=True)
        ]

    def losses(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        labels = torch.cat([target["labels"] for target in batch["target"]]).to(logits.dtype)
        return binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def update_metric(self, metric: Any, logits: Tensor, batch: Mapping[str, Any]) -> None:
        scores = self.probabilities(logits).split([len(target["boxes"]) for target in batch["target"]])
        for score, target in zip(scores, batch["target"], strict=True):
            metric.update(
                score,
                target["original_boxes"],
                target["true_boxes"],
                target["true_labels"],
                target["video_id"],
                target["second"],
            )
