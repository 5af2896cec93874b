"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, InstDisc, arXiv:1805.01978)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.utilities import dim_zero_cat

from zoo.errors import ZooError
from zoo.metrics.gathered import Gathered


def knn_scores(
    query: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, k: int = 200, temperature: float = 0.07
) -> Tensor:
    """Class scores (N, K) of features `query` (N, D) from the labelled `bank` (M, D), `bank_labels` (M,).

    Both are L2-normalised here; each of the k nearest by cosine votes exp(cosine / temperature) for its class. A bank
    smaller than k votes as a whole.
    """
    query, bank = normalize(query, dim=1), normalize(bank, dim=1)
    cosine, nearest = (query @ bank.T).topk(min(k, len(bank)), dim=1)
    scores = cosine.new_zeros(len(query), num_classes)
    return scores.scatter_add_(1, bank_labels[nearest], (cosine / temperature).exp())


class KNNAccuracy(Gathered):
    """Top-1 and top-5 accuracy (fractions) of a weighted kNN classifier.

    `update_bank` takes labelled features, `update` those to classify; `compute` returns {"top1", "top5"}. Under several
    processes each gives its share: bank and queries are gathered before they meet. A batch's value (`forward`) is of
    the bank so far, of this process.

    Args:
        num_classes: K; top-5 counts min(5, K) classes.
        k: neighbours (200 in InstDisc; DINO reports 20).
        temperature: T of the vote exp(cosine / T).
        chunk: queries compared with the bank at a time.
    """

    sample = "feature"
    bank_features: list[Tensor]
    bank_labels: list[Tensor]
    query_features: list[Tensor]
    query_labels: list[Tensor]

    def __init__(
        self, num_classes: int, k: int = 200, temperature: float = 0.07, chunk: int = 1024, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._bank: tuple[list[Tensor], list[Tensor]] | None = None
        if num_classes < 1 or k < 1 or temperature <= 0 or chunk < 1:
            raise ZooError(
                "kNN wants num_classes, k and chunk of 1 or more and temperature > 0; got "
                f"{num_classes}, {k}, {chunk} and {temperature}"
            )
        self.num_classes, self.k, self.temperature, self.chunk = num_classes, k, temperature, chunk
        for name in ("bank_features", "bank_labels", "query_features", "query_labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update_bank(self, features: Tensor, labels: Tensor) -> None:
        """Adds features (B, D) with labels (B,) to vote."""
        self._computed = None  # what was computed was of another bank
        self.bank_features.append(features)
        self.bank_labels.append(labels)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Adds features (B, D) with labels (B,) to be classified."""
        self._count()
        self.query_features.append(features)
        self.query_labels.append(labels)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch and returns its own value; the bank is not the batch's, and stays."""
        self._bank = list(self.bank_features), list(self.bank_labels)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.bank_features, self.bank_labels = self._bank
            self._bank = None

    def reset(self) -> None:
        """Forget queries and bank."""
        super().reset()
        if self._bank is not None:  # within forward
            self.bank_features, self.bank_labels = (list(part) for part in self._bank)

    def compute(self) -> dict[str, Tensor]:
        self._require()
        if not len(self.bank_features):  # a list, or a tensor once synced
            raise ZooError("KNNAccuracy has no bank: update_bank comes before compute")
        bank, bank_labels = dim_zero_cat(self.bank_features), dim_zero_cat(self.bank_labels)
        features, labels = dim_zero_cat(self.query_features), dim_zero_cat(self.query_labels)
        first = torch.zeros((), dtype=torch.long, device=labels.device)
        five = torch.zeros_like(first)
        for part, truth in zip(features.split(self.chunk), labels.split(self.chunk), strict=True):
            scores = knn_scores(part, bank, bank_labels, self.num_classes, self.k, self.temperature)
            hits = scores.topk(min(5, self.num_classes), dim=1).indices == truth[:, None]
            first += hits[:, 0].sum()
            five += hits.sum()
        return {"top1": first / len(labels), "top5": five / len(labels)}
