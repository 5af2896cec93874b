"""Metrics that torchmetrics does not have."""

from __future__ import annotations

from zoo.metrics.knn import KNNAccuracy, knn_scores

__all__ = ["KNNAccuracy", "knn_scores"]
