"""LVIS's average precision of boxes and masks (Gupta et al. 2019, arXiv:1908.03195, section 3.3).

LVIS is a federated set: of each picture it is known which classes are there, which are not, and of which classes that
are there some objects may be missing. A detection of any other class is neither right nor wrong there.

Matching and accumulation are faster-coco-eval's in its LVIS mode, a class at a time, so that only the pictures count
where something is known of it. The numbers are those of lvis-api 0.5.3's `LVISEval` within 1e-10 points on random sets
with ties of scores, empty pictures and more detections than are counted (test_lvis_ap.py).
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.metrics.coco import CocoAP, annotations_of

IOU_TYPES = ("bbox", "segm")
FREQUENCIES = ("r", "c", "f")
"""Rare, common and frequent classes: on 1 to 10, 11 to 100 and more pictures of the training set."""

# Names of the numbers, and what they are: precision or recall, IoU threshold, area, frequency of the classes.
_NUMBERS: dict[str, tuple[str, float | None, int, str | None]] = {
    "AP": ("precision", None, 0, None),
    "AP50": ("precision", 0.5, 0, None),
    "AP75": ("precision", 0.75, 0, None),
    "APs": ("precision", None, 1, None),
    "APm": ("precision", None, 2, None),
    "APl": ("precision", None, 3, None),
    "APr": ("precision", None, 0, "r"),
    "APc": ("precision", None, 0, "c"),
    "APf": ("precision", None, 0, "f"),
    "AR": ("recall", None, 0, None),
    "ARs": ("recall", None, 1, None),
    "ARm": ("recall", None, 2, None),
    "ARl": ("recall", None, 3, None),
}
_FEDERATED = ("neg_labels", "not_exhaustive_labels", "frequency")


class LvisAP(CocoAP):
    """LVIS's numbers, in percent, of all pictures seen.

    `update` takes what :class:`~zoo.metrics.CocoAP`'s does, and in the truth of a picture

    - neg_labels (n,): classes that are known not to be on it;
    - not_exhaustive_labels (m,): classes on it of which objects may be missing in the truth: a detection that matches
      nothing is not counted against them;
    - frequency (N,): of each object's class, 0 rare, 1 common, 2 frequent.

    A picture without `neg_labels` is one of an ordinary set: all classes are known on it. LVIS has no crowds: `iscrowd`
    is not looked at. Of a picture the `max_detections` best detections count, the first of equals, before those of
    classes are left out of which nothing is known.

    `compute` returns 13 numbers for boxes and for masks: {"bbox/AP", "bbox/AP50", ..., "bbox/APr" of rare classes,
    "bbox/APc", "bbox/APf", "bbox/AR", ..., "segm/AP", ...}; nan where there is nothing to find. Under several processes
    each gives its pictures; one that comes twice counts once.

    Args:
        iou_types: of "bbox" and "segm".
        class_names: of the labels in order; with them `compute` also gives each class's AP, "bbox/AP of zebra".
        max_detections: of a picture.

    Raises:
        ZooError: an unknown IoU type.
    """

    def __init__(
        self,
        iou_types: Sequence[str] = ("bbox", "segm"),
        class_names: Sequence[str] | None = None,
        max_detections: int = 300,
        **kwargs: Any,
    ) -> None:
        for name in iou_types:
            if name not in IOU_TYPES:
                raise unknown("IoU type of LVIS", name, IOU_TYPES)
        super().__init__(iou_types, class_names, max_detections, **kwargs)

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
        """Adds pictures; `preds` and `target` in the same order."""
        if len(preds) == len(target):
            preds = [self._counted(found, true) for found, true in zip(preds, target, strict=True)]
        super().update(preds, target)

    def _counted(self, found: dict[str, Any], true: dict[str, Any]) -> dict[str, Any]:
        """The detections that count: the best, of classes of which something is known."""
        labels, kept = found["labels"], torch.arange(len(found["labels"]), device=found["labels"].device)
        if len(kept) > self.max_detections:
            kept = found["scores"].argsort(descending=True, stable=True)[: self.max_detections]
        if "neg_labels" in true:
            there = true["labels"][(true["area"] > 0).to(true["labels"].device)]
            known = torch.cat([there.cpu(), torch.as_tensor(true["neg_labels"]).cpu().to(there.dtype)])
            kept = kept[torch.isin(labels[kept], known.to(labels.device))]
        chosen = {name: found[name][kept] for name in ("boxes", "scores", "labels")}
        if "segm" in self.iou_types:
            masks = found["masks"]
            chosen["masks"] = masks[kept] if isinstance(masks, Tensor) else [masks[n] for n in kept.tolist()]
        return chosen

    def _record(self, of: dict[str, Any], image_id: int, more: Sequence[str]) -> dict[str, Any]:
        record = super()._record(of, image_id, more)
        if "area" not in more:
            return record
        for name in _FEDERATED:
            if name in of:
                record[name] = torch.as_tensor(of[name]).tolist()
        if len(record.get("frequency", record["labels"])) != len(record["labels"]):
            raise ZooError(f"picture {image_id}: frequency is of each of the {len(record['labels'])} objects' classes")
        return record

    def _of_type(
        self, kind: str, predictions: dict[int, dict[str, Any]], truth: dict[int, dict[str, Any]]
    ) -> dict[str, float]:
        """Objects and detections without area do not count, as in lvis-api."""
        sides: list[dict[int, list[dict[str, Any]]]] = [defaultdict(list), defaultdict(list)]
        for side, records in zip(sides, (truth, predictions), strict=True):
            for entry in annotations_of(kind, records, side is sides[0]):
                if 0 < entry["area"] < float("inf"):
                    side[entry["category_id"]].append({**entry, "iscrowd": 0})
        frequency = {
            label: FREQUENCIES[of]
            for record in truth.values()
            for label, of in zip(record["labels"], record.get("frequency", ()), strict=False)
        }
        open_ended = {k: set(record.get("not_exhaustive_labels", ())) for k, record in truth.items()}
        classes = sorted(sides[0])  # the others have nothing to be found
        evaluated = [_of_class(kind, k, sides[0][k], sides[1][k], open_ended) for k in classes]
        of_kind: dict[int, float] = {}
        numbers = {}
        for name, (what, threshold, area, wanted) in _NUMBERS.items():
            values = [
                result[what][..., area]
                for k, result in zip(classes, evaluated, strict=True)
                if wanted is None or frequency.get(k) == wanted
            ]
            numbers[f"{kind}/{name}"] = _mean([v if threshold is None else v[threshold == _THRESHOLDS] for v in values])
        for k, result in zip(classes, evaluated, strict=True):
            if not np.isnan(value := _mean([result["precision"][..., 0]])):
                of_kind[k] = value
        self.by_class[kind] = of_kind
        for k, name in enumerate(self.class_names or ()):
            numbers[f"{kind}/AP of {name}"] = of_kind.get(k, float("nan"))
        return numbers


_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU


def _mean(values: Sequence[np.ndarray]) -> float:
    """The mean in percent of what is not -1."""
    valid = np.concatenate([v.reshape(-1) for v in values]) if values else np.zeros(0)
    valid = valid[valid > -1]
    return 100 * float(np.mean(valid)) if valid.size else float("nan")


def _of_class(
    kind: str,
    label: int,
    true: list[dict[str, Any]],
    found: list[dict[str, Any]],
    open_ended: dict[int, set[int]],
) -> dict[str, np.ndarray]:
    """Precision (threshold, recall, area) and recall (threshold, area) of one class; -1 where there is nothing to find.

    Args:
        kind: "bbox" or "segm".
        label: the class.
        true, found: its objects and detections in COCO's format.
        open_ended: of each picture the classes of which objects may be missing.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    # Every detection left is of a class that is known on its picture; one without objects must be said to be absent.
    sizes = {a["image_id"]: a["segmentation"]["size"] if kind == "segm" else (0, 0) for a in (*true, *found)}
    facts = {
        "images": [
            {
                "id": k,
                "height": sizes[k][0],
                "width": sizes[k][1],
                "neg_category_ids": [label],
                "not_exhaustive_category_ids": [label] if label in open_ended[k] else [],
            }
            for k in sorted(sizes)
        ],
        "categories": [{"id": label, "name": str(label), "frequency": "f"}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for entries in (true, found):
            side = COCO()
            side.dataset = {**facts, "annotations": entries}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval_faster(*sides, kind, lvis_style=True)
        # Those of a picture have been counted already.
        evaluation.params.maxDets = [max(1, len(found))]
        evaluation.evaluate()
        evaluation.accumulate()
    return {
        "precision": evaluation.eval["precision"][:, :, 0, :, 0],
        "recall": evaluation.eval["recall"][:, 0, :, 0],
    }
