"""Data modules, sources, transforms, and the embedded world."""

from __future__ import annotations

from zoo.data.arc import ARCDataModule, ARCTaskDataModule
from zoo.data.datamodule import ImageDataModule
from zoo.data.image_text import ImageTextDataModule
from zoo.data.latents import LatentDataModule
from zoo.data.loader import EpochSampler, ExactSampler, TrainLoader
from zoo.data.plane import PlaneDataModule
from zoo.data.shaken import ShakenImageDataModule
from zoo.data.sources import open_source
from zoo.data.video import VideoDataModule

__all__ = [
    "ARCDataModule",
    "ARCTaskDataModule",
    "EpochSampler",
    "ExactSampler",
    "ImageDataModule",
    "ImageTextDataModule",
    "LatentDataModule",
    "PlaneDataModule",
    "ShakenImageDataModule",
    "TrainLoader",
    "VideoDataModule",
    "open_source",
]
