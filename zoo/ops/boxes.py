"""Boxes as detectors use them: overlap, coding, anchors, matching, sampling, losses.

Boxes are (x1, y1, x2, y2) in continuous pixels, width x2 - x1 (no +1). Conventions and numerics are detectron2's:
anchors are never rounded and lie on the cells' top-left corners, the order is (level, row, column, size, ratio).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss
from torchvision.ops import box_iou, complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from zoo.errors import unknown

Weights = tuple[float, float, float, float]
BoxLoss = Literal["smooth_l1", "giou", "diou", "ciou"]
SoftNMS = Literal["linear", "gaussian"]
Permute = Callable[[int, torch.device], Tensor]

# A side grows by no more than this in one decoding: the longest side of 1000 pixels from a stride of 16.
MAX_LOG_SCALE = math.log(1000 / 16)


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 where it is of lower precision: pixels of large images need more than 8 or 11 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ----------------------------------------------------------------------------------------------------- geometry, coding


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (A, B) of boxes (A, 4) and (B, 4); 0 where both are empty."""
    return box_iou(a, b).nan_to_num_(0.0)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) cut off at an image of `size` (height, width)."""
    height, width = size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def nonempty(boxes: Tensor, min_size: float = 0.0) -> Tensor:
    """Which of the boxes (N, 4) have both sides longer than `min_size`; bool (N,)."""
    return (boxes[:, 2:] - boxes[:, :2] > min_size).all(dim=1)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Weights = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The deltas (N, 4) that turn `anchors` (N, 4) into `boxes` (N, 4) (R-CNN, appendix C).

    wx (gx - ax) / aw, wy (gy - ay) / ah, ww log(gw / aw), wh log(gh / ah), with centres x, y and sides w, h.
    """
    size, anchor_size = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2 / anchor_size
    return torch.cat([shift, (size / anchor_size).log()], dim=1) * boxes.new_tensor(weights)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Weights = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes (..., 4) from deltas (..., 4) on anchors that broadcast to them; sides grow at most 62.5-fold."""
    deltas = at_least_float32(deltas)
    anchors = anchors.to(deltas.dtype)
    deltas = deltas / deltas.new_tensor(weights)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + size / 2 + deltas[..., :2] * size
    half = deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * size / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def box_loss(
    deltas: Tensor, boxes: Tensor, anchors: Tensor, weights: Weights, kind: BoxLoss = "smooth_l1", beta: float = 0.0
) -> Tensor:
    """The summed regression loss of predicted `deltas` (P, 4) whose `anchors` (P, 4) are to become `boxes` (P, 4).

    Args:
        kind: smooth L1 of the deltas, or one of the IoU losses of the decoded boxes.
        beta: where smooth L1 turns from L2 to L1; 0 for plain L1.

    Raises:
        ZooError: an unknown kind.
    """
    if kind == "smooth_l1":
        target = encode_boxes(boxes, anchors, weights)
        return smooth_l1_loss(at_least_float32(deltas), target, reduction="sum", beta=beta)
    losses = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}
    if kind not in losses:
        raise unknown("box loss", kind, get_args(BoxLoss))
    return losses[kind](decode_boxes(deltas, anchors, weights), boxes, reduction="sum")


# ------------------------------------------------------------------------------------------------------------- anchors


@lru_cache(maxsize=64)
def cell_anchors(sizes: tuple[float, ...], ratios: tuple[float, ...], device: torch.device) -> Tensor:
    """Anchors (S * R, 4), float32, around (0, 0): for each size s and each ratio a = h / w, w = sqrt(s^2 / a)."""
    sides = [(math.sqrt(size**2 / ratio), ratio) for size in sizes for ratio in ratios]
    return torch.tensor([[-w / 2, -a * w / 2, w / 2, a * w / 2] for w, a in sides], device=device)


def grid_anchors(cells: Tensor, grid: Sequence[int], stride: int, offset: float = 0.0) -> Tensor:
    """Anchors (H * W * A, 4) of a map of `grid` (H, W) cells, `stride` pixels apart, ordered by row, column, anchor.

    `offset` is the place of a cell's centre in strides; 0 puts it at the cell's top-left corner.
    """
    height, width = grid
    y = torch.arange(offset * stride, (height + offset) * stride, stride, device=cells.device, dtype=cells.dtype)
    x = torch.arange(offset * stride, (width + offset) * stride, stride, device=cells.device, dtype=cells.dtype)
    y, x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1)
    return (shifts[:, :, None] + cells).reshape(-1, 4)


# --------------------------------------------------------------------------------------------------------- suppression


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    method: SoftNMS = "gaussian",
    threshold: float = 0.5,
    sigma: float = 0.5,
    min_score: float = 1e-4,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS (Bodla et al. 2017, arXiv 1704.04503, section 3): in turn the best detection left is reported, and the
    scores of those of its class that overlap it are lowered instead of set to zero.

    Args:
        boxes, scores, labels: (N, 4), (N,), (N,) of an image's detections.
        method: by which factor at an overlap u: "linear", 1 - u where u is above the threshold (equation 2);
            "gaussian", exp(-u^2 / sigma) at any overlap (equation 3).
        threshold, sigma: of the two methods.
        min_score: a detection of a lower score is dropped; 1e-4 in the Detectron of the paper's authors (m).
        most: how many to report; None: all.

    Returns:
        Which detections (M,), and their scores (M,), best first.

    Raises:
        ZooError: an unknown method.
    """
    if method not in get_args(SoftNMS):
        raise unknown("method of soft-NMS", method, get_args(SoftNMS))
    left, chosen, values = scores.clone(), [], []
    for _ in range(len(scores) if most is None else min(most, len(scores))):
        value, best = left.max(dim=0)
        if value < min_score:
            break
        chosen.append(best)
        values.append(value)
        overlap = pairwise_iou(boxes[best][None], boxes)[0]
        if method == "linear":
            factor = torch.where(overlap > threshold, 1 - overlap, torch.ones_like(overlap))
        else:
            factor = (-overlap.square() / sigma).exp()
        left = torch.where(labels == labels[best], left * factor, left)
        left[best] = -1
    if not chosen:
        return labels.new_zeros(0), scores.new_zeros(0)
    return torch.stack(chosen), torch.stack(values)


# -------------------------------------------------------------------------------------------------- matching, sampling


def match(
    iou: Tensor, thresholds: Sequence[float], labels: Sequence[int], low_quality: bool = False
) -> tuple[Tensor, Tensor]:
    """Matches N predictions to M objects by their overlap `iou` (M, N).

    Args:
        thresholds: t1 < t2 < ...; they part the overlaps into [0, t1), [t1, t2), ..., [tn, 1].
        labels: one for each part: 1 positive, 0 negative, -1 neither.
        low_quality: make every prediction positive that overlaps some object as much as none does better (ties
            included); it keeps the object that it overlaps most itself (Faster R-CNN, section 3.1.2, case i).

    Returns:
        The index of each prediction's best object (N,), the first of equals, and its label (N,).
    """
    if not iou.numel():
        nothing = iou.new_zeros(iou.shape[1], dtype=torch.int64)
        return nothing, nothing + labels[0]
    best, index = iou.max(dim=0)
    parts = torch.bucketize(best, best.new_tensor(thresholds), right=True)
    label = torch.tensor(labels, device=iou.device)[parts]
    if low_quality:
        label[(iou == iou.amax(dim=1, keepdim=True)).any(dim=0)] = 1
    return index, label


class Draws:
    """A source of permutations and of uniform numbers, the same `noise` (N,) for each; without it, torch's global
    generator."""

    def __init__(self, noise: Tensor | None = None) -> None:
        self.noise = noise

    def __call__(self, n: int, device: torch.device) -> Tensor:
        """A permutation of n; from noise by sorting its first n numbers."""
        return torch.randperm(n, device=device) if self.noise is None else self.noise[:n].argsort(stable=True)

    def uniform(self, n: int, device: torch.device) -> Tensor:
        """(n,) numbers in 0..1."""
        return torch.rand(n, device=device) if self.noise is None else self.noise[:n]


def permutation(noise: Tensor | None) -> Draws:
    """A source of permutations: of n from uniform `noise` (>= n,) by sorting its first n numbers, else from torch's
    global generator."""
    return Draws(noise)


def sample_labels(
    labels: Tensor, count: int, positive_fraction: float, background: int, permute: Permute
) -> tuple[Tensor, Tensor]:
    """At most `count` of the predictions with `labels` (N,), of which at most so large a fraction is positive.

    Labels of -1 are never taken, `background` is negative, everything else positive. Too few positives are made up for
    by negatives. Two permutations are drawn: of the positives, then of the negatives.

    Returns:
        Indices of the positives and of the negatives.
    """
    positive = ((labels != -1) & (labels != background)).nonzero()[:, 0]
    negative = (labels == background).nonzero()[:, 0]
    positives = min(len(positive), int(count * positive_fraction))
    negatives = min(len(negative), count - positives)
    first = permute(len(positive), labels.device)[:positives]
    second = permute(len(negative), labels.device)[:negatives]
    return positive[first], negative[second]


def pyramid_levels(
    boxes: Tensor, lowest: int, highest: int, canonical_size: float = 224.0, canonical_level: int = 4
) -> Tensor:
    """The pyramid level of each box (R, 4), counted from `lowest` (FPN, equation 1): a box of `canonical_size` pixels
    belongs to `canonical_level`, one of twice the side to the level above."""
    size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = (canonical_level + (size / canonical_size + 1e-8).log2()).floor()
    return level.clamp(lowest, highest).long() - lowest
