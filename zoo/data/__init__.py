"""Data modules, sources, transforms, and the embedded world."""

from __future__ import annotations

from zoo.data.arc import ARCDataModule, ARCTaskDataModule
from zoo.data.datamodule import ImageDataModule
from zoo.data.loader import EpochSampler, ExactSampler, TrainLoader
from zoo.data.sources import open_source

__all__ = [
    "ARCDataModule",
    "ARCTaskDataModule",
    "EpochSampler",
    "ExactSampler",
    "ImageDataModule",
    "TrainLoader",
    "open_source",
]
