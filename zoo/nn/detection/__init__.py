"""Layers of detectors: backbones, proposals, region heads, the two-stage network of them, and dense heads."""

from __future__ import annotations

from zoo.nn.detection.backbone import FPN, ConvTop, FPNConfig, ResNetBackbone, ResNetConfig, Subsample
from zoo.nn.detection.dense import (
    DenseAnchorConfig,
    DenseAnchors,
    DenseDetector,
    DenseHead,
    DenseHeadConfig,
    DenseInferenceConfig,
)
from zoo.nn.detection.rcnn import RCNN, configured
from zoo.nn.detection.roi_heads import (
    BoxHeadConfig,
    KeypointHeadConfig,
    MaskHeadConfig,
    PoolConfig,
    Res5RoIHeads,
    RoIConfig,
    RoIHeads,
    RoIPooler,
)
from zoo.nn.detection.rpn import RPN, AnchorGenerator, RPNConfig
from zoo.nn.detection.semantic import SemanticHead, SemanticHeadConfig

__all__ = [
    "FPN",
    "RCNN",
    "RPN",
    "AnchorGenerator",
    "BoxHeadConfig",
    "ConvTop",
    "DenseAnchorConfig",
    "DenseAnchors",
    "DenseDetector",
    "DenseHead",
    "DenseHeadConfig",
    "DenseInferenceConfig",
    "FPNConfig",
    "KeypointHeadConfig",
    "MaskHeadConfig",
    "PoolConfig",
    "RPNConfig",
    "Res5RoIHeads",
    "ResNetBackbone",
    "ResNetConfig",
    "RoIConfig",
    "RoIHeads",
    "RoIPooler",
    "SemanticHead",
    "SemanticHeadConfig",
    "Subsample",
    "configured",
]
