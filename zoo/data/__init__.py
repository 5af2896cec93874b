"""Data modules, sources, transforms, and the embedded world."""

from __future__ import annotations

from zoo.data.datamodule import ImageDataModule
from zoo.data.latents import LatentDataModule
from zoo.data.loader import EpochSampler, ExactSampler, TrainLoader
from zoo.data.sources import open_source

__all__ = ["EpochSampler", "ExactSampler", "ImageDataModule", "LatentDataModule", "TrainLoader", "open_source"]
