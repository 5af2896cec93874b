"""What all metrics of the zoo do alike, and the bank of kNN."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torchmetrics

from zoo.errors import MissingPackage, ZooError
from zoo.metrics import (
    ARCScore,
    CocoAP,
    FrameMAP,
    ImageTextRetrieval,
    KNNAccuracy,
    MultiLabelMAP,
    MultiViewAccuracy,
    VocAP,
)
from zoo.metrics.generation import GenerationMetrics

EVERY = {
    "arc": ARCScore,
    "coco": CocoAP,
    "frames": lambda: FrameMAP(3),
    "retrieval": ImageTextRetrieval,
    "knn": lambda: KNNAccuracy(3, k=2),
    "labels": lambda: MultiLabelMAP(3),
    "views": lambda: MultiViewAccuracy(3),
    "voc": VocAP,
    "generation": lambda: GenerationMetrics("random"),
}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", EVERY)
def test_compute_before_update_is_refused_alike(kind: str) -> None:
    metric: torchmetrics.Metric = EVERY[kind]()
    for _ in range(2):  # a reset brings that back
        with pytest.raises(ZooError, match=rf"{type(metric).__name__} has seen no .* \(update comes first\)"):
            metric.compute()
        metric.reset()
    wanted = {"retrieval": None, "generation": False}
    assert metric.higher_is_better is wanted.get(kind, True)
    assert not metric.is_differentiable


def test_a_generation_metric_says_which_way_is_better() -> None:
    for metrics, better in ((("fid", "kid"), False), (("is", "precision_recall"), True), (("fid", "is"), None)):
        assert GenerationMetrics("random", metrics).higher_is_better is better


def test_a_metric_is_plotted() -> None:
    metric = KNNAccuracy(3, k=2)
    value = {"top1": torch.tensor(0.5), "top5": torch.tensor(1.0)}
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(MissingPackage, match="pip install matplotlib"):
            metric.plot(value)
    else:
        assert len(metric.plot(value)) == 2


def test_the_bank_is_a_state_of_its_own() -> None:
    features, labels = torch.eye(6), torch.tensor([0, 1, 2, 0, 1, 2])
    metric = KNNAccuracy(3, k=1)
    metric.update_bank(features, labels)
    assert metric(features, labels)["top1"] == 1  # the value of a batch
    assert metric(features[:3], (labels[:3] + 1) % 3)["top1"] == 0
    assert metric.compute()["top1"] == pytest.approx(6 / 9)  # of both
    assert torch.equal(torch.cat(list(metric.bank_labels)), labels)  # once
    metric.update_bank(features, labels)
    metric.reset()
    with pytest.raises(ZooError, match="KNNAccuracy has no bank"):
        metric(features, labels)
    metric.update(features, labels)
    metric.update_bank(features, labels)
    assert metric.compute()["top1"] == 1
    metric.bank_labels[0] = (labels + 1) % 3
    metric.update_bank(features[:0], labels[:0])
    assert metric.compute()["top1"] == 0  # not what was computed of the bank before
