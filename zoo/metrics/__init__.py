"""Metrics that torchmetrics does not have."""

from __future__ import annotations

from zoo.metrics.knn import KNNAccuracy, knn_scores
from zoo.metrics.retrieval import ImageTextRetrieval
from zoo.metrics.zero_shot import class_features

__all__ = ["ImageTextRetrieval", "KNNAccuracy", "class_features", "knn_scores"]
