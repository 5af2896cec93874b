"""Metrics of video against plain loops, in any order, with duplicates, in one and two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from tests.conftest import ROOT
from tests.metrics import ddp_video_metrics as two
from zoo.errors import ZooError
from zoo.metrics import FrameMAP, MultiLabelMAP, MultiViewAccuracy


def test_views_are_summed_and_ranked() -> None:
    scores, labels, video, view = two.views("accuracy")
    metric = MultiViewAccuracy(two.CLASSES, (1, 2, 9))
    for part in torch.randperm(len(scores)).split(5):
        metric.update(scores[part], labels[part], video[part], view[part])
    total = scores.view(two.VIDEOS, two.VIEWS, -1).sum(1)
    order = total.argsort(1, descending=True)
    truth = labels.view(two.VIDEOS, -1)[:, :1]
    found = metric.compute()
    for k in (1, 2):
        assert found[f"top{k}"] == (order[:, :k] == truth).any(1).float().mean()
    assert found["top9"] == 1


def test_a_view_that_comes_twice_counts_once() -> None:
    scores, labels, video, view = two.views("accuracy")
    metric, once = MultiViewAccuracy(two.CLASSES), MultiViewAccuracy(two.CLASSES)
    once.update(scores, labels, video, view)
    for part in (slice(None), slice(3, 30), slice(8, 9)):
        metric.update(scores[part], labels[part], video[part], view[part])
    torch.testing.assert_close(metric.videos(), once.videos(), rtol=0, atol=0)


def test_labels_take_the_maximum_and_empty_classes_drop() -> None:
    scores, labels, video, view = two.views("labels")
    labels = labels.clone()
    labels[:, 2] = 0
    metric = MultiLabelMAP(two.CLASSES)
    metric.update(scores, labels, video, view)
    best = scores.view(two.VIDEOS, two.VIEWS, -1).amax(1)
    truth = labels.view(two.VIDEOS, two.VIEWS, -1)[:, 0].long()
    each = [binary_average_precision(best[:, k], truth[:, k]) for k in (0, 1, 3, 4)]
    torch.testing.assert_close(metric.compute()["mAP"].float(), torch.stack(each).mean())


def test_average_precision_takes_equal_scores_together() -> None:
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        scores = torch.randint(6, (30,), generator=draw).float()
        truth = torch.rand(30, generator=draw) > 0.5
        expected = binary_average_precision(scores / 6, truth.long())
        metric = MultiLabelMAP(1, reduce="sum")
        metric.update(scores[:, None], truth.long()[:, None], torch.arange(30), torch.zeros(30, dtype=torch.long))
        torch.testing.assert_close(metric.compute()["mAP"].float(), expected)


def _iou(a: Tensor, b: Tensor) -> float:
    width, height = (min(a[2 + k], b[2 + k]) - max(a[k], b[k]) for k in (0, 1))
    common = max(width, 0) * max(height, 0)
    return float(common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common))


def _frame_ap(frames: list[dict], column: int) -> float:
    """The area under the precision envelope, by the book."""
    rows, positives = [], 0
    for frame in frames:
        truth = [box for box, label in zip(frame["true_boxes"], frame["true_labels"], strict=True) if label == column]
        positives += len(truth)
        taken = [False] * len(truth)
        for box, score in zip(frame["boxes"], frame["scores"][:, column], strict=True):
            overlaps = [_iou(box, other) for other in truth]
            best = max(range(len(truth)), key=lambda k: overlaps[k], default=None)
            right = best is not None and overlaps[best] >= 0.5 and not taken[best]
            if right:
                taken[best] = True
            rows.append((float(score), right))
    if not positives:
        return float("nan")
    rows.sort(key=lambda row: -row[0])
    points, hits = [], 0
    for seen, (_, right) in enumerate(rows, 1):
        hits += right
        points.append((hits / positives, hits / seen))
    recall = area = 0.0
    for k, (reached, _) in enumerate(points):
        area += (reached - recall) * max(precision for _, precision in points[k:])
        recall = reached
    return area


def test_frame_map_is_what_the_book_says() -> None:
    frames = [two.key_frame(k) for k in range(40)]
    metric = FrameMAP(two.CLASSES, classes=[0, 1, 3, 4])
    for k in torch.randperm(40).tolist():
        metric.update(**frames[k])
    metric.update(**frames[7])  # again
    expected = [_frame_ap(frames, k) for k in (0, 1, 3, 4)]
    assert metric.per_class().tolist() == pytest.approx(expected, nan_ok=True, rel=1e-6)
    assert 0.1 < float(metric.compute()["mAP"]) < 0.95
    assert float(metric.compute()["mAP"]) == pytest.approx(sum(expected) / 4, rel=1e-6)


def test_frame_map_of_frames_without_boxes() -> None:
    none, box = torch.zeros(0, 4), torch.tensor([[0.1, 0.1, 0.5, 0.5]])
    metric = FrameMAP(2)
    metric.update(torch.zeros(0, 2), none, box, torch.tensor([1]), 0, 902)  # missed
    assert metric.per_class().nan_to_num(-1).tolist() == [-1, 0]
    metric.update(torch.tensor([[0.3, 0.9]]), box, none, torch.zeros(0), 0, 903)  # there is nothing
    metric.update(torch.tensor([[0.3, 0.8]]), box, box, torch.tensor([1]), 0, 904)
    assert metric.per_class().nan_to_num(-1).tolist() == [-1, 0.25]
    metric.reset()
    metric.update(torch.tensor([[0.3, 0.9]]), box[:, [0, 1, 0, 3]], box, torch.tensor([0]), 0, 903)  # without area
    assert metric.per_class().nan_to_num(-1).tolist() == [0, -1]


def test_two_processes_compute_what_one_computes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.metrics.ddp_video_metrics"]
    both = [
        subprocess.Popen(
            [*command, str(rank), port, str(tmp_path / "out")], cwd=ROOT, env=environment, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in both:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told.decode()[-3000:]
    alone = two.compute((list(range(two.VIDEOS * two.VIEWS)), list(range(two.FRAMES))))
    for rank in range(2):
        results = json.loads((tmp_path / f"out.{rank}").read_text())
        assert results["mixed"] == pytest.approx(alone, rel=1e-12)
        assert results["one empty"] == pytest.approx(alone, rel=1e-12)
        assert results["others"] == pytest.approx(two.others(0), rel=1e-6)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_mistakes_are_named() -> None:
    with pytest.raises(ZooError, match="has seen no video"):
        MultiViewAccuracy(3).compute()
    with pytest.raises(ZooError, match=r"scores must be \(B, 3\)"):
        MultiViewAccuracy(3).update(torch.rand(2, 4), torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ZooError, match="top_k must be at least 1"):
        MultiViewAccuracy(3, 0)
    with pytest.raises(ZooError, match="reduce must be one of sum, max"):
        MultiLabelMAP(3, reduce="mean")
    with pytest.raises(ZooError, match="the data has no labels"):
        MultiLabelMAP(0)
    with pytest.raises(ZooError, match="columns of the scores"):
        FrameMAP(3, classes=[3])
    unlabelled = MultiLabelMAP(3)
    unlabelled.update(torch.rand(2, 3), torch.zeros(2, 3), torch.arange(2), torch.zeros(2))
    with pytest.raises(ZooError, match="no video has a label"):
        unlabelled.compute()
