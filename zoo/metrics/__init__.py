"""Metrics that torchmetrics does not have (or not to the last digit)."""

from __future__ import annotations

from zoo.metrics.arc import ARCScore, vote
from zoo.metrics.coco import CocoAP
from zoo.metrics.knn import KNNAccuracy, knn_scores
from zoo.metrics.lvis import LvisAP
from zoo.metrics.retrieval import ImageTextRetrieval
from zoo.metrics.video import FrameMAP, MultiLabelMAP, MultiViewAccuracy
from zoo.metrics.zero_shot import class_features

__all__ = [
    "ARCScore",
    "CocoAP",
    "FrameMAP",
    "ImageTextRetrieval",
    "KNNAccuracy",
    "LvisAP",
    "MultiLabelMAP",
    "MultiViewAccuracy",
    "class_features",
    "knn_scores",
    "vote",
]
