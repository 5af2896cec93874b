"""Metrics that torchmetrics does not have."""

from __future__ import annotations

from zoo.metrics.knn import KNNAccuracy, knn_scores
from zoo.metrics.video import FrameMAP, MultiLabelMAP, MultiViewAccuracy

__all__ = ["FrameMAP", "KNNAccuracy", "MultiLabelMAP", "MultiViewAccuracy", "knn_scores"]
