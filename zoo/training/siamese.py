"""Pre-training of embeddings: what siamese tasks log, predict and give to probes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import normalize

from zoo.metrics.spread import Spread
from zoo.training.base import BaseModule
from zoo.training.optim import Optim

Feature = Literal["trunk", "embedding"]


class EmbeddingTask(BaseModule):
    """Trains a network that embeds images, on views of them; a task adds its step.

    Training batches hold `views`, evaluation batches `image` (N, 3, S, S). Logged is `{val,test}/spread`, the mean
    deviation of the channels of unit embeddings in units of 1/sqrt(C): 1 where they fill the sphere, 0 where they
    collapse.

    Args:
        network: gives embeddings (N, C) of images, by `features` pooled features (N, D), and by `project` the
            embeddings of these.
        dim: C.
        feature: what `features` gives to probes: the pooled features of the "trunk", or the "embedding".
        optim: optimiser and schedule.
    """

    batch_keys = ("views", "image")
    network: Any

    def __init__(self, network: nn.Module, dim: int, feature: Feature, optim: Optim) -> None:
        super().__init__(optim)
        self.network, self.feature = network, feature
        self.val_spread, self.test_spread = Spread(dim), Spread(dim)

    def trainable(self) -> nn.Module:
        return self.network

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.val_spread.update(normalize(self.network(batch["image"]), dim=1))

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.test_spread.update(normalize(self.network(batch["image"]), dim=1))

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val/spread", self.val_spread.compute().float(), prog_bar=True)
        self.val_spread.reset()

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.log("test/spread", self.test_spread.compute().float())
        self.test_spread.reset()

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The `features` (N, D) and the `embedding` (N, C), of unit length, of images."""
        features = self.network.features(batch["image"])
        return {"features": features, "embedding": normalize(self.network.project(features), dim=1)}

    def features(self, images: Tensor) -> Tensor:
        """Frozen features (N, D), or embeddings (N, C), of images (N, 3, S, S)."""
        return self.network.features(images) if self.feature == "trunk" else self.network(images)
