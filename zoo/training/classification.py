"""Tasks over a classifier with timm's protocol: supervised training or fine-tuning, and linear probing.

The network has `forward_features`, `forward_head(x, pre_logits=...)` and `forward`. A paper's task is a subclass that
builds its network and says where an encoder may come from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.errors import ZooError
from zoo.nn.memory_order import to_channels_last
from zoo.training.base import BaseModule
from zoo.training.optim import Optim


def check_classes(data: Any, num_classes: int) -> None:
    """Refuses a data module whose labels a classifier of so many classes cannot learn: on a GPU they would end the
    process.

    Raises:
        ZooError: the set has no labels, or more classes.
    """
    known = getattr(data, "num_classes", None)
    name = getattr(data, "dataset", type(data).__name__)
    if known == 0:
        raise ZooError(
            f"{name}: has no labels to learn or to be judged by; a folder a class gives them, or another task"
        )
    if known is not None and known > num_classes:
        raise ZooError(f"{name} has {known} classes, the model {num_classes}: leave out model.num_classes")


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
    batch_keys = ("image", "label")

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
        self.network, self.num_classes = network, num_classes
        self.channels_last = channels_last
        if channels_last:
            to_channels_last(network)
        self.label_smoothing, self.init_from = label_smoothing, init_from
        self.mixing: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        if mixup or cutmix:
            from zoo.data.transforms import Mixing

            self.mixing = Mixing(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)

    def setup(self, stage: str) -> None:
        if stage != "predict" and self._trainer is not None:
            check_classes(getattr(self.trainer, "datamodule", None), self.num_classes)
        super().setup(stage)

    def load_initial(self, source: str) -> None:
        """Fill all of the network but its classifier, as the paper's `convert_official` reads the weights."""
        from zoo.weights.pretrained import fill, read_source

        convert = getattr(sys.modules[type(self).__module__], "convert_official", dict)
        network: Any = self.network
        last = network.get_classifier()
        name = next((name for name, part in network.named_modules() if part is last), "")

        def wanted(key: str) -> bool:
            return not name or not key.startswith(f"{name}.")

        state = {key: value for key, value in convert(read_source(source)).items() if wanted(key)}
        fill(self.network, state, source, wanted)

    def trainable(self) -> nn.Module:
        return self.network

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) to logits (B, num_classes)."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.network(images)

    def predict_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, num_classes) of a batch of `image`, or averaged over its `views`."""
        if "views" in batch and "image" not in batch:
            return torch.stack([self(view) for view in batch["views"]]).mean(dim=0)
        return self(batch["image"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.mixing is not None:  # smooths the labels too
            batch = self.mixing(batch)
            return cross_entropy(self(batch["image"]), batch["label"])
        return cross_entropy(self(batch["image"]), batch["label"], label_smoothing=self.label_smoothing)

    def _evaluate(self, batch: Mapping[str, Any], split: str) -> dict[str, Tensor]:
        """Logs a batch's numbers; its logits (B, num_classes) and losses (B,), for callbacks."""
        logits, label = self.predict_logits(batch), batch["label"]
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]
        hits &= ~logits.isnan().any(dim=1, keepdim=True)  # NaN would be the largest
        self.tally(f"{split}/top1", hits[:, 0])
        self.tally(f"{split}/top5", hits.any(dim=1))
        loss = cross_entropy(logits, label, reduction="none")
        self.tally(f"{split}/loss", loss)
        return {"logits": logits, "loss": loss}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test")

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
