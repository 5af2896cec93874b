"""The training floor: base module, optimiser declaration, averaging, probes and guards."""

from __future__ import annotations

from zoo.training.base import BaseModule, seed_position
from zoo.training.callbacks import Freeze, NonFiniteGuard, Pictures, PreciseBN, Timing, default_callbacks
from zoo.training.checkpoints import BestCheckpoint, LastCheckpoint
from zoo.training.classification import Classification, LinearClassification
from zoo.training.ema import EMA, choose_average, evaluation_weights, half_life_decay
from zoo.training.error_analysis import ErrorAnalysis
from zoo.training.inpainting import Inpainting
from zoo.training.lars import LARC, LARS
from zoo.training.measures import (
    EasyNegativeShare,
    FactorAccuracy,
    GivenBoxMasks,
    GradientSpread,
    Instability,
    ParameterCount,
    UnitDeletion,
    ViewVariance,
)
from zoo.training.muon import Muon, NAdam
from zoo.training.optim import Optim, build, hold_global_batch, lr_at, make_optimizer, param_groups, run_position
from zoo.training.plane import PlaneEvaluation
from zoo.training.probe import KNNProbe, LinearProbe, extract_features, fit_probe, gather_samples, probe_head
from zoo.training.sampling import SampleGrid, SamplingEvaluation
from zoo.training.sync import SyncBatchNorm
from zoo.training.video import ActionDetection, MultiLabelVideoClassification, VideoClassification

__all__ = [
    "EMA",
    "LARC",
    "LARS",
    "ActionDetection",
    "BaseModule",
    "BestCheckpoint",
    "Classification",
    "EasyNegativeShare",
    "ErrorAnalysis",
    "FactorAccuracy",
    "Freeze",
    "GivenBoxMasks",
    "GradientSpread",
    "Inpainting",
    "Instability",
    "KNNProbe",
    "LastCheckpoint",
    "LinearClassification",
    "LinearProbe",
    "MultiLabelVideoClassification",
    "Muon",
    "NAdam",
    "NonFiniteGuard",
    "Optim",
    "ParameterCount",
    "Pictures",
    "PlaneEvaluation",
    "PreciseBN",
    "SampleGrid",
    "SamplingEvaluation",
    "SyncBatchNorm",
    "Timing",
    "UnitDeletion",
    "VideoClassification",
    "ViewVariance",
    "build",
    "choose_average",
    "default_callbacks",
    "evaluation_weights",
    "extract_features",
    "fit_probe",
    "gather_samples",
    "half_life_decay",
    "hold_global_batch",
    "lr_at",
    "make_optimizer",
    "param_groups",
    "probe_head",
    "run_position",
    "seed_position",
]
