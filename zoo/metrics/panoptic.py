"""Panoptic quality (Kirillov et al. 2019, arXiv 1801.00868) by the rules of panopticapi, crowds and void included.

Of each class PQ = sum of the IoU of matches / (TP + FP / 2 + FN / 2) = SQ RQ. A predicted and a true segment of one
class match if their IoU is above one half, where the union leaves out what of the prediction lies where nothing is
known. Crowds are neither matched nor missed; a prediction without a match does not count if more than half of it lies
where nothing is known or in the crowd of its class. Classes without any segment do not enter the mean.

(torchmetrics' PanopticQuality knows no crowds.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.metrics.gathered import Gathered

_TP, _FP, _FN = 0, 1, 2


def match_segments(
    found: np.ndarray, found_segments: np.ndarray, true: np.ndarray, true_segments: np.ndarray
) -> np.ndarray:
    """What of a picture is found, missed and wrong.

    Args:
        found: (H, W) the predicted segment of each pixel, 0 for none.
        found_segments: (n, 2) id and class.
        true: (H, W) the true one, 0 where nothing is known.
        true_segments: (m, 4) id, class, 1 for a crowd, pixels as stated.

    Returns:
        (k, 4) int64 rows: class; 0 for a match, 1 for a false positive, 2 for a false negative; of a match the pixels
        of intersection and union, else zeros. In the order in which panopticapi counts them.

    Raises:
        ZooError: maps of different sizes, or a predicted segment without pixels or without a class.
    """
    if found.shape != true.shape:
        raise ZooError(f"a panoptic map of {found.shape} for a picture of {true.shape} (height, width)")
    numbers, index = np.unique(found_segments[:, 0]), _places(found, found_segments[:, 0])
    areas = np.bincount(index.ravel(), minlength=len(numbers) + 2)
    if areas[-1] or not areas[1:-1].all():
        raise ZooError("the predicted segments are not those of the predicted map")
    known = np.unique(true_segments[:, 0])
    pairs = np.bincount(
        (_places(true, true_segments[:, 0]) * (len(numbers) + 1) + index).ravel(),
        minlength=(len(known) + 2) * (len(numbers) + 1),
    ).reshape(len(known) + 2, len(numbers) + 1)
    place = {int(number): n for n, number in enumerate(numbers, 1)}
    kind = {place[int(number)]: int(label) for number, label in found_segments}
    truth = {int(row[0]): row for row in true_segments}
    rows: list[tuple[int, int, int, int]] = []
    matched_true: set[int] = set()
    matched_found: set[int] = set()
    for n, number in enumerate(known.tolist(), 1):
        _, label, crowd, area = truth[number].tolist()
        for k in np.flatnonzero(pairs[n]).tolist():
            if not k or crowd or kind[k] != label:
                continue
            union = int(areas[k]) + area - int(pairs[n, k]) - int(pairs[0, k])
            if pairs[n, k] / union > 0.5:
                rows.append((label, _TP, int(pairs[n, k]), union))
                matched_true.add(number)
                matched_found.add(k)
    crowds: dict[int, int] = {}
    for number, label, crowd, _ in true_segments.tolist():
        if number in matched_true:
            continue
        if crowd:
            crowds[label] = int(np.searchsorted(known, number)) + 1
        else:
            rows.append((label, _FN, 0, 0))
    for number, label in found_segments.tolist():
        k = place[number]
        if k in matched_found:
            continue
        excused = pairs[0, k] + (pairs[crowds[label], k] if label in crowds else 0)
        if excused / areas[k] <= 0.5:
            rows.append((label, _FP, 0, 0))
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _places(ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Of each id its place from 1 among the sorted `numbers`; 0 for 0, and one more than the last for others."""
    ordered = np.unique(numbers)
    if not len(ordered):
        return (ids != 0).astype(np.int64)
    place = np.searchsorted(ordered, ids).clip(max=len(ordered) - 1)
    return np.where(ids == 0, 0, np.where(ordered[place] == ids, place + 1, len(ordered) + 1))


class PanopticQuality(Gathered):
    """PQ, SQ and RQ, in percent, of all pictures seen.

    `update` takes lists of dicts, one a picture, in the pixels of its file:

    - predictions: panoptic (H, W), the segment of each pixel, 0 for none; segments (n, 3 or more), id, 1 for a thing,
      and its label, or the semantic label of stuff;
    - the truth: image_id (), and panoptic, a dict of ids (H, W) and segments (n, 5) id, thing, label, crowd, pixels.

    `compute` returns {"PQ", "SQ", "RQ"} of all classes, those of things ("PQ_th", ...) and of stuff ("PQ_st", ...);
    nan where there is none. `by_class` holds (K + C, 4) sum of IoU, TP, FP and FN of each class of the last `compute`,
    things first. Under several processes each gives its pictures; one that comes twice counts once, and the order of
    the sums is that of the pictures' ids.

    Args:
        things: K, how many labels things have.
        semantic: C, how many semantic labels there are.
    """

    sample = "picture"
    rows: list[Tensor]

    def __init__(self, things: int, semantic: int, **kwargs: Any) -> None:
        super().__init__({"rows": torch.zeros(0, 6, dtype=torch.int64)}, **kwargs)
        self.things, self.semantic = things, semantic
        self.by_class = np.zeros((things + semantic, 4))
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, preds: Sequence[Mapping[str, Any]], target: Sequence[Mapping[str, Any]]) -> None:
        """Adds pictures; `preds` and `target` in the same order.

        Raises:
            ZooError: other numbers of them, maps of different sizes, labels beyond those of the classes.
        """
        if len(preds) != len(target):
            raise ZooError(f"{len(preds)} predictions for {len(target)} pictures")
        self._count()
        for found, true in zip(preds, target, strict=True):
            segments, truth = (_numpy(x) for x in (found["segments"], true["panoptic"]["segments"]))
            rows = match_segments(
                _numpy(found["panoptic"]),
                np.stack([segments[:, 0], self._classes(segments)], 1),
                _numpy(true["panoptic"]["ids"]),
                np.stack([truth[:, 0], self._classes(truth), truth[:, 3], truth[:, 4]], 1),
            )
            place = np.stack([np.full(len(rows), int(true["image_id"])), np.arange(len(rows))], 1)
            self.rows.append(torch.from_numpy(np.concatenate([place, rows], 1)).to(self.device))

    def _classes(self, segments: np.ndarray) -> np.ndarray:
        thing, label = segments[:, 1] > 0, segments[:, 2]
        if ((label < 0) | (label >= np.where(thing, self.things, self.semantic))).any():
            raise ZooError(f"a label beyond {self.things} of things or {self.semantic} of pixels: {label.tolist()}")
        return np.where(thing, label, self.things + label)

    def compute(self) -> dict[str, Tensor]:
        """The numbers; see the class."""
        self._require()
        pieces = [self.rows] if isinstance(self.rows, Tensor) else self.rows
        rows = np.unique(np.concatenate([_numpy(piece) for piece in pieces]), axis=0)  # in order, each once
        table = self.by_class = np.zeros((self.things + self.semantic, 4))
        for _, _, label, outcome, both, either in rows.tolist():
            table[label, 1 + outcome] += 1
            if outcome == _TP:
                table[label, 0] += both / either
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        numbers = {}
        parts = {"": slice(None), "_th": slice(self.things), "_st": slice(self.things, None)}
        for name, part in parts.items():
            iou, right, wrong, missed = table[part][table[part, 1:].any(1)].T
            half = right + wrong / 2 + missed / 2
            values = {"PQ": iou / half, "SQ": iou / np.maximum(right, 1), "RQ": right / half}
            for kind, value in values.items():
                mean = sum(value.tolist()) / len(value) if len(value) else float("nan")
                numbers[kind + name] = torch.tensor(100 * mean, dtype=exact, device=self.device)
        return numbers


def _numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
