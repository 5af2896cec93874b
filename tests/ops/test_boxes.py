"""Boxes: coding, overlaps, levels, matching, sampling and losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from zoo.errors import ZooError
from zoo.ops.boxes import (
    MAX_LOG_SCALE,
    box_loss,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    match,
    nonempty,
    pairwise_iou,
    permutation,
    pyramid_levels,
    sample_labels,
    soft_nms,
)


def random_boxes(count: int, seed: int = 0, side: float = 100.0) -> Tensor:
    corner, size = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([corner * side, corner * side + 1 + size * side], dim=1)


def test_coding_is_its_own_inverse_and_bounded() -> None:
    boxes, anchors, weights = random_boxes(50), random_boxes(50, seed=1), (10.0, 10.0, 5.0, 5.0)
    deltas = encode_boxes(boxes, anchors, weights)
    torch.testing.assert_close(decode_boxes(deltas, anchors, weights), boxes)
    torch.testing.assert_close(encode_boxes(anchors, anchors), torch.zeros(50, 4, dtype=torch.float64))
    huge = decode_boxes(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0, 16, 16]]))
    torch.testing.assert_close((huge[0, 2] - huge[0, 0]).item(), 16 * math.exp(MAX_LOG_SCALE), rtol=1e-4, atol=0)
    assert decode_boxes(torch.zeros(2, 4, dtype=torch.bfloat16), torch.ones(2, 4)).dtype == torch.float32


def test_geometry() -> None:
    boxes = torch.tensor([[-5.0, -5, 10, 10], [0, 0, 200, 300], [20, 20, 20, 30]])
    clipped = clip_boxes(boxes, (100, 150))
    assert clipped.tolist() == [[0, 0, 10, 10], [0, 0, 150, 100], [20, 20, 20, 30]]
    assert nonempty(clipped).tolist() == [True, True, False]
    assert nonempty(clipped, 12).tolist() == [False, True, False]
    iou = pairwise_iou(boxes[:1], torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]))
    torch.testing.assert_close(iou, torch.tensor([[100 / 225, 0.0]]))
    assert not pairwise_iou(torch.zeros(1, 4), torch.zeros(1, 4)).isnan().any()
    sides = torch.tensor([10.0, 111, 112, 223, 224, 448, 5000])
    assert pyramid_levels(torch.stack([0 * sides, 0 * sides, sides, sides], 1), 2, 5).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_matching_keeps_the_best_anchor_of_every_object() -> None:
    iou = torch.tensor([[0.8, 0.5, 0.2, 0.1], [0.1, 0.2, 0.25, 0.25]])
    index, labels = match(iou, (0.3, 0.7), (0, -1, 1))
    assert (index.tolist(), labels.tolist()) == ([0, 0, 1, 1], [1, -1, 0, 0])
    index, labels = match(iou, (0.3, 0.7), (0, -1, 1), low_quality=True)
    assert labels.tolist() == [1, -1, 1, 1]  # ties too
    index, labels = match(torch.zeros(0, 4), (0.5,), (0, 1))
    assert (index.tolist(), labels.tolist()) == ([0] * 4, [0] * 4)
    assert match(torch.tensor([[0.5]]), (0.5,), (0, 1))[1].tolist() == [1]  # a threshold belongs to what is above it


def test_samples_are_bounded_and_replayable() -> None:
    labels = torch.tensor([1] * 30 + [0] * 100 + [-1] * 20)
    positive, negative = sample_labels(labels, 40, 0.5, 0, permutation(None))
    assert (len(positive), len(negative)) == (20, 20)
    assert (labels[positive] == 1).all()
    assert (labels[negative] == 0).all()
    positive, negative = sample_labels(labels[20:], 40, 0.5, 0, permutation(None))
    assert (len(positive), len(negative)) == (10, 30)  # negatives make up for what is missing
    noise = torch.rand(150)
    first, again = (sample_labels(labels, 40, 0.5, 0, permutation(noise)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
def test_box_losses_vanish_at_the_truth(kind: Any) -> None:
    boxes, anchors = random_boxes(8), random_boxes(8, seed=2)
    deltas = encode_boxes(boxes, anchors).requires_grad_()
    assert box_loss(deltas, boxes, anchors, (1.0,) * 4, kind).item() == pytest.approx(0, abs=1e-6)
    box_loss(deltas + 0.1, boxes, anchors, (1.0,) * 4, kind).backward()
    assert deltas.grad is not None
    assert (deltas.grad.abs().sum(dim=1) > 0).all()
    with pytest.raises(ZooError, match="did you mean 'giou'"):
        box_loss(deltas, boxes, anchors, (1.0,) * 4, "gious")  # type: ignore[arg-type]


def test_soft_nms_lowers_what_overlaps_a_better_box_of_its_class() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 2], [0, 0, 10, 10], [50, 50, 60, 60]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.05]), torch.tensor([0, 0, 0, 1, 0])
    kept, values = soft_nms(boxes, scores, labels, "linear", threshold=0.5)
    # The second overlaps the first by 0.8, the third by 0.2 only, and the fourth is of another class.
    assert kept.tolist() == [0, 2, 3, 1, 4]
    torch.testing.assert_close(values, torch.tensor([0.9, 0.7, 0.6, 0.8 * 0.2, 0.05]))
    kept, values = soft_nms(boxes, scores, labels, "gaussian", sigma=0.5, min_score=0.1)
    third, second = 0.7 * math.exp(-(0.2**2) / 0.5), 0.8 * math.exp(-(0.8**2) / 0.5)
    assert kept.tolist() == [0, 2, 3, 1]
    torch.testing.assert_close(values, torch.tensor([0.9, third, 0.6, second * math.exp(-(0.25**2) / 0.5)]))
    assert soft_nms(boxes, scores, labels, most=2)[0].tolist() == [0, 2]
    assert soft_nms(boxes[:0], scores[:0], labels[:0])[0].shape == (0,)
    # Narrow enough, it keeps what hard suppression keeps.
    many, values, kinds = random_boxes(60, side=30), torch.rand(60, dtype=torch.float64), torch.arange(60) % 3
    kept, _ = soft_nms(many, values, kinds, "gaussian", sigma=1e-6)
    assert kept.tolist() == batched_nms(many, values, kinds, 0.0).tolist()
    with pytest.raises(ZooError, match="did you mean 'linear'"):
        soft_nms(boxes, scores, labels, "linar")  # type: ignore[arg-type]
