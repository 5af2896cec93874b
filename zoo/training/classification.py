"""Tasks over a classifier with timm's protocol: supervised training or fine-tuning, and linear probing.

The network has `forward_features`, `forward_head(x, pre_logits=...)` and `forward`. A paper's task is a subclass that
builds its network and says where an encoder may come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from zoo.training.base import BaseModule
from zoo.training.optim import Optim


class Classification(BaseModule):
    """End-to-end training of a classifier, evaluated by top-1, top-5 and cross-entropy.

    Batches hold `image` (B, C, S, S) and `label` (B,). In evaluation they may hold `views` instead, a list of crops
    (B, C, S, S) of each picture: the logits are averaged over them (as fb.resnet.torch sums them for its ten). Logs
    `{val,test}/top1`, `/top5` (fractions) and `/loss`, each sample once on any number of processes.

    Args:
        network: gives logits (B, num_classes).
        optim: optimiser and schedule.
        num_classes: K; top-5 counts min(5, K) classes.
        mixup: Beta parameter of mixup, 0 for none; its draws are paired with those of `cutmix`.
        cutmix: Beta parameter of CutMix, 0 for none.
        label_smoothing: of the training targets.
        init_from: where :meth:`setup` takes pre-trained weights from by :meth:`load_initial`; null: from scratch.
        channels_last: keep activations in the order (B, H, W, C), which most convolutions are faster in.
    """

    monitor = ("val/top1", "max")

    def __init__(
        self,
        network: nn.Module,
        optim: Optim,
        num_classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        init_from: str | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(optim)
        self.network = network
        self.channels_last = channels_last
        if channels_last:
            network.to(memory_format=torch.channels_last)
        self.label_smoothing, self.init_from = label_smoothing, init_from
        self.mixing: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        if mixup or cutmix:
            from zoo.data.transforms import Mixing

            self.mixing = Mixing(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        self.val_metrics, self.test_metrics = (_metrics(num_classes, f"{split}/") for split in ("val", "test"))

    def trainable(self) -> nn.Module:
        return self.network

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) to logits (B, num_classes)."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.network(images)

    def predict_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, num_classes) of a batch of `image`, or averaged over its `views`."""
        if "image" in batch:
            return self(batch["image"])
        return torch.stack([self(view) for view in batch["views"]]).mean(dim=0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.mixing is not None:  # smooths the labels too
            batch = self.mixing(batch)
            return cross_entropy(self(batch["image"]), batch["label"])
        return cross_entropy(self(batch["image"]), batch["label"], label_smoothing=self.label_smoothing)

    def _evaluate(self, batch: Mapping[str, Any], metrics: nn.ModuleDict, split: str) -> None:
        logits = self.predict_logits(batch)
        metrics["accuracy"].update(logits, batch["label"])  # type: ignore[operator]
        metrics["loss"].update(cross_entropy(logits, batch["label"], reduction="none"))  # type: ignore[operator]
        self.log_dict(metrics["accuracy"], prog_bar=split == "val")  # type: ignore[arg-type]
        self.log(f"{split}/loss", metrics["loss"])

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics, "test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Class probabilities (B, num_classes)."""
        return self.predict_logits(batch).softmax(dim=-1)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of images (B, C, S, S)."""
        network: Any = self.network
        return network.forward_head(network.forward_features(images), pre_logits=True)


class LinearClassification(Classification):
    """Linear probing: only a head on frozen features trains; the rest stays in eval mode and takes no gradient.

    Args:
        network: the classifier; all its parameters are frozen.
        head: replaces the classifier of `network`; maps pooled features (B, D) to logits (B, num_classes).
        classifier: the name of the part of `network` that `head` replaces ("head" of a ViT, "fc" of a ResNet).
        optim, num_classes, init_from: as of :class:`Classification`.
    """

    def __init__(
        self,
        network: nn.Module,
        head: nn.Module,
        classifier: str,
        optim: Optim,
        num_classes: int,
        init_from: str | None = None,
    ) -> None:
        super().__init__(network, optim, num_classes, init_from=init_from)
        self.network.requires_grad_(False)
        self.classifier = classifier
        self.network.set_submodule(classifier, head)
        self.train()  # the trainer keeps the modes that it finds

    def trainable(self) -> nn.Module:
        return self.network.get_submodule(self.classifier)

    def train(self, mode: bool = True) -> LinearClassification:
        """Sets the mode of the head; everything frozen stays in eval mode, so that no running statistic moves."""
        super().train(mode)
        self.network.eval()
        self.trainable().train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) to logits (B, num_classes)."""
        with torch.no_grad():
            features = self.features(images)
        return self.trainable()(features)


def _metrics(num_classes: int, prefix: str) -> nn.ModuleDict:
    top: dict[str, Metric | MetricCollection] = {
        f"top{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro", validate_args=False)
        for k in (1, 5)
    }
    return nn.ModuleDict({"accuracy": MetricCollection(top, prefix=prefix, compute_groups=False), "loss": MeanMetric()})
