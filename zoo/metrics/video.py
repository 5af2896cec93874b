"""Metrics of video: several views a video, several labels a video, boxes with actions on key frames.

States are kept by video, and what comes twice counts once: the numbers are the same for one, two, three processes, in
any order, with or without a sampler's padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from zoo.errors import ZooError
from zoo.metrics.gathered import Gathered

_COMBINE = ("sum", "max")


def _unique_rows(*keys: Tensor) -> Tensor:
    """Positions of the first row of each combination of the integer `keys` (N,), in the keys' order."""
    rows = torch.stack(keys, 1)
    unique, inverse = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(rows), dtype=torch.long, device=rows.device)
    return first.scatter_reduce_(0, inverse, torch.arange(len(rows), device=rows.device), "amin")


class _Rows(Gathered):
    """States are lists of rows, whose shapes and types are known."""

    sample = "video"

    def __init__(self, rows: dict[str, Tensor], **kwargs: Any) -> None:
        super().__init__(rows, **kwargs)
        for name in rows:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def _parts(self, name: str) -> list[Tensor]:
        state = getattr(self, name)
        return [state] if isinstance(state, Tensor) else list(state)

    def _all(self, name: str) -> Tensor:
        return torch.cat([self._rows[name].to(self.device), *self._parts(name)])


class _ByVideo(_Rows):
    """Keeps the scores of every view; each (video, view) counts once."""

    def __init__(self, num_classes: int, reduce: str, label_rows: Tensor, **kwargs: Any) -> None:
        if num_classes < 1:
            raise ZooError(f"num_classes must be at least 1, got {num_classes}: the data has no labels")
        if reduce not in _COMBINE:
            raise ZooError(f"reduce must be one of {', '.join(_COMBINE)}, got {reduce!r}")
        number = torch.empty(0, dtype=torch.long)
        rows = {"scores": torch.empty(0, num_classes), "labels": label_rows, "video_id": number, "view": number}
        super().__init__(rows, **kwargs)
        self.num_classes, self.reduce = num_classes, reduce

    def update(self, scores: Tensor, labels: Tensor, video_id: Tensor, view: Tensor) -> None:
        """Adds B views.

        Args:
            scores: (B, num_classes), probabilities as a rule.
            labels: (B,) int64, or (B, num_classes) with 1 for each class of the video.
            video_id: (B,) int64.
            view: (B,) int64, the number of the view among the video's.
        """
        if scores.ndim != 2 or scores.shape[1] != self.num_classes:
            raise ZooError(f"scores must be (B, {self.num_classes}), got {tuple(scores.shape)}")
        self._count()
        given = {"scores": scores.float(), "labels": labels, "video_id": video_id, "view": view}
        for name, rows in given.items():
            getattr(self, name).append(rows.detach().to(self._rows[name].dtype))

    def videos(self) -> tuple[Tensor, Tensor, Tensor]:
        """All videos seen: ids (V,), scores (V, K) float64 combined over their views, labels (V,) or (V, K)."""
        self._require()
        video_id, view = self._all("video_id"), self._all("view")
        keep = torch.zeros_like(video_id, dtype=torch.bool)
        keep[_unique_rows(video_id, view)] = True
        ids, row = torch.unique(video_id, return_inverse=True)
        # In float64, so that the order of the views moves no digit that matters; a part at a time, as all of Kinetics'
        # views take a gigabyte.
        start = 0 if self.reduce == "sum" else -math.inf
        combined = torch.full((len(ids), self.num_classes), start, dtype=torch.float64, device=video_id.device)
        at = 0
        for part in self._parts("scores"):
            here = keep[at : at + len(part)]
            index = row[at : at + len(part)][here][:, None].expand(-1, self.num_classes)
            combined.scatter_reduce_(0, index, part[here].double(), "sum" if self.reduce == "sum" else "amax")
            at += len(part)
        return ids, combined, self._all("labels")[_unique_rows(video_id)]


class MultiViewAccuracy(_ByVideo):
    """Top-k accuracies (fractions) of videos, the scores of their views summed, as all of these papers test.

    `compute` gives {"top1", "top5"}, or what `top_k` names.

    Args:
        num_classes: K.
        top_k: for each k, a video counts as right when its label is among its min(k, K) highest scores.
        reduce: "sum" or "max" over the views.
    """

    def __init__(
        self, num_classes: int, top_k: int | Sequence[int] = (1, 5), reduce: str = "sum", **kwargs: Any
    ) -> None:
        super().__init__(num_classes, reduce, torch.empty(0, dtype=torch.long), **kwargs)
        self.top_k = (top_k,) if isinstance(top_k, int) else tuple(top_k)
        self.joined: tuple[Tensor, Tensor] | None = None  # labels and guesses (V,) of the last `compute`
        if not self.top_k or min(self.top_k) < 1:
            raise ZooError(f"top_k must be at least 1, got {top_k}")

    def compute(self) -> dict[str, Tensor]:
        _, scores, labels = self.videos()
        order = scores.topk(min(max(self.top_k), self.num_classes), dim=1).indices
        self.joined = labels, order[:, 0]
        hits = (order == labels[:, None]).float()
        return {f"top{k}": hits[:, :k].sum(1).mean() for k in self.top_k}


class MultiLabelMAP(_ByVideo):
    """Mean average precision (a fraction) of videos with several labels each, as Charades is scored.

    The scores of a video's views are combined by their maximum; classes that no video has are left out of the mean.
    `compute` gives {"mAP"}.

    Args:
        num_classes: K.
        reduce: "max" or "sum" over the views.
    """

    def __init__(self, num_classes: int, reduce: str = "max", **kwargs: Any) -> None:
        super().__init__(num_classes, reduce, torch.empty(0, num_classes), **kwargs)
        self.by_class: dict[int, float] = {}  # AP in percent, of the last `compute`

    def compute(self) -> dict[str, Tensor]:
        _, scores, labels = self.videos()
        truth = labels > 0.5
        present = truth.any(0).nonzero()[:, 0].tolist()
        if not present:
            raise ZooError("MultiLabelMAP: no video has a label")
        scores = scores / scores.amax().clamp(min=1)  # torchmetrics takes what exceeds 1 for logits
        each = [binary_average_precision(scores[:, k], truth[:, k].long()) for k in present]
        self.by_class = {k: 100 * float(one) for k, one in zip(present, each, strict=True)}
        return {"mAP": torch.stack(each).mean()}


class FrameMAP(_Rows):
    """Frame mAP of AVA: mean over classes of the area under the precision envelope at IoU 0.5 (a fraction).

    Each detection is matched to the box of the class that it overlaps most on its key frame; of several that claim one
    box, the first as listed is right, whatever the scores, as PySlowFast's copy of the evaluator has it (PASCAL and
    AVA's own script take the highest score). A class without ground truth has no AP and is left out of the mean. A key
    frame that comes twice counts once. `compute` gives {"mAP"}.

    Args:
        num_classes: columns of the scores.
        classes: the columns that are evaluated (60 of AVA's 80); None: all.
        iou: overlap that makes a match.
    """

    def __init__(self, num_classes: int, classes: list[int] | None = None, iou: float = 0.5, **kwargs: Any) -> None:
        chosen = list(range(num_classes)) if classes is None else sorted(classes)
        if not chosen or min(chosen) < 0 or max(chosen) >= num_classes:
            raise ZooError(f"classes must be columns of the scores, 0..{num_classes - 1}; got {classes}")
        key, boxes = torch.empty(0, 3, dtype=torch.long), torch.empty(0, 4, dtype=torch.float64)
        rows = {"scores": torch.empty(0, num_classes), "boxes": boxes, "key": key}
        rows |= {"true_labels": torch.empty(0, dtype=torch.long), "true_boxes": boxes, "true_key": key}
        super().__init__(rows, **kwargs)
        self.num_classes, self.classes, self.iou = num_classes, chosen, iou
        self.by_class: dict[int, float] = {}  # AP in percent, of the last `compute`

    def update(
        self,
        scores: Tensor,
        boxes: Tensor,
        true_boxes: Tensor,
        true_labels: Tensor,
        video_id: int | Tensor,
        second: int | Tensor,
    ) -> None:
        """Adds a key frame: what was detected on it, and what is there.

        Args:
            scores: (D, num_classes) of the detected boxes.
            boxes: (D, 4) x0, y0, x1, y1, in the same units as `true_boxes`; a box without area is passed over.
            true_boxes: (G, 4); a box with several labels stands there once for each.
            true_labels: (G,) columns of `scores`; those that are not evaluated are passed over.
            video_id, second: which key frame it is.
        """
        if scores.ndim != 2 or scores.shape[1] != self.num_classes:
            raise ZooError(f"scores must be (D, {self.num_classes}), got {tuple(scores.shape)}")
        self._count()
        # The third number tells the boxes of a key frame apart.
        keys = [
            torch.tensor([[int(video_id), int(second), k] for k in range(n)], device=scores.device).view(-1, 3).long()
            for n in (len(scores), len(true_labels))
        ]
        given = {"scores": scores, "boxes": boxes, "key": keys[0]}
        given |= {"true_labels": true_labels, "true_boxes": true_boxes, "true_key": keys[1]}
        for name, rows in given.items():
            getattr(self, name).append(rows.detach().to(self._rows[name].dtype))

    def per_class(self) -> Tensor:
        """(len(classes),) float64 AP of each evaluated class, NaN where it has no ground truth."""
        self._require()
        key, true_key = self._all("key"), self._all("true_key")
        keep, true_keep = _unique_rows(*key.unbind(1)), _unique_rows(*true_key.unbind(1))
        scores, boxes, key = self._all("scores")[keep], self._all("boxes")[keep], key[keep]
        true_labels, true_boxes = self._all("true_labels")[true_keep], self._all("true_boxes")[true_keep]
        true_key = true_key[true_keep]
        solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        scores, boxes, key = scores[solid], boxes[solid], key[solid]
        found, true, overlap = _pairs(boxes, key, true_boxes, true_key)
        results = []
        for column in self.classes:
            mine = true_labels[true] == column
            right = _matched(len(scores), found[mine], true[mine], overlap[mine], self.iou)
            right = right[scores[:, column].argsort(descending=True, stable=True)]
            results.append(_envelope_precision(right, int((true_labels == column).sum())))
        return torch.stack(results)

    def compute(self) -> dict[str, Tensor]:
        each = self.per_class()
        self.by_class = {
            k: 100 * value for k, value in zip(self.classes, each.tolist(), strict=True) if not math.isnan(value)
        }
        return {"mAP": each.nanmean()}


def _pairs(boxes: Tensor, key: Tensor, true_boxes: Tensor, true_key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of a detected and a true box of the same key frame: their positions and their IoU, each (P,).

    Keys (N, 3) rise, so that the true boxes of a frame are neighbours.
    """
    _, frame = torch.unique(torch.cat([true_key[:, :2], key[:, :2]]), dim=0, return_inverse=True)
    true_frame, frame = frame[: len(true_key)], frame[len(true_key) :]
    first = torch.searchsorted(true_frame, frame)
    count = torch.searchsorted(true_frame, frame, right=True) - first
    found = torch.arange(len(boxes), device=boxes.device).repeat_interleave(count)
    within = torch.arange(len(found), device=boxes.device) - (count.cumsum(0) - count)[found]
    true = first[found] + within
    a, b = boxes[found], true_boxes[true]
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    common = sides.prod(1)
    area = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - common
    return found, true, common / area


def _matched(count: int, found: Tensor, true: Tensor, overlap: Tensor, iou: float) -> Tensor:
    """(count,) bool: is each detection the first in the list to claim the true box that it overlaps most? The pairs are
    those of one class."""
    pairs = len(found)
    best = overlap.new_full((count,), -1.0).scatter_reduce_(0, found, overlap, "amax")
    number = torch.arange(pairs, device=found.device)
    is_best = overlap == best[found]
    chosen = number.new_full((count,), pairs)  # of equal overlaps the first
    chosen.scatter_reduce_(0, found[is_best], number[is_best], "amin")
    right = torch.zeros(count, dtype=torch.bool, device=found.device)
    place = (best >= iou).nonzero()[:, 0]
    right[place[_unique_rows(true[chosen[place]])]] = True
    return right


def _envelope_precision(right: Tensor, positives: int) -> Tensor:
    """Area under the precision envelope of detections (D,), sorted by falling score; NaN without positives; ()."""
    if not positives:
        return torch.tensor(math.nan, dtype=torch.float64, device=right.device)
    hits = right.double().cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1, device=right.device)
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(right) else precision
    return envelope[right].sum() / positives
