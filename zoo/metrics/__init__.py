"""Metrics that torchmetrics does not have."""

from __future__ import annotations

from zoo.metrics.arc import ARCScore, vote
from zoo.metrics.knn import KNNAccuracy, knn_scores

__all__ = ["ARCScore", "KNNAccuracy", "knn_scores", "vote"]
