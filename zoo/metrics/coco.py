"""COCO's average precision of boxes, masks and keypoints (Lin et al. 2014, arXiv:1405.0312).

Matching and accumulation are pycocotools' or, by default, those of its reimplementation faster-coco-eval. Both gave the
same numbers within 2e-14 points on 60 random sets with crowds, ties of scores, empty pictures and unlabelled keypoints
(test_coco_ap.py repeats some) and on the COCO sample. Processor time of `compute` for 500 pictures with 100
detections each of 80 classes, one core of an AMD EPYC, pycocotools 2.0.11 against faster-coco-eval 1.8.0: boxes 3.9 and
0.4 s, masks 3.8 and 1.8 s, keypoints 3.7 and 1.3 s.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.metrics.gathered import Gathered
from zoo.ops.masks import run_lengths

IOU_TYPES = ("bbox", "segm", "keypoints")
BACKENDS = ("faster_coco_eval", "pycocotools")
# Names of the numbers, and what they are: precision or recall, IoU or OKS threshold, area, how many detections.
_DETECTION: dict[str, tuple[str, float | None, str, int]] = {
    "AP": ("precision", None, "all", -1),
    "AP50": ("precision", 0.5, "all", -1),
    "AP75": ("precision", 0.75, "all", -1),
    "APs": ("precision", None, "small", -1),
    "APm": ("precision", None, "medium", -1),
    "APl": ("precision", None, "large", -1),
    "AR1": ("recall", None, "all", 0),
    "AR10": ("recall", None, "all", 1),
    "AR100": ("recall", None, "all", -1),
    "ARs": ("recall", None, "small", -1),
    "ARm": ("recall", None, "medium", -1),
    "ARl": ("recall", None, "large", -1),
}
_KEYPOINTS: dict[str, tuple[str, float | None, str, int]] = {
    "AP": ("precision", None, "all", -1),
    "AP50": ("precision", 0.5, "all", -1),
    "AP75": ("precision", 0.75, "all", -1),
    "APm": ("precision", None, "medium", -1),
    "APl": ("precision", None, "large", -1),
    "AR": ("recall", None, "all", -1),
    "AR50": ("recall", 0.5, "all", -1),
    "AR75": ("recall", 0.75, "all", -1),
    "ARm": ("recall", None, "medium", -1),
    "ARl": ("recall", None, "large", -1),
}


def encode_masks(masks: Any) -> list[dict[str, Any]]:
    """Masks (N, H, W) bool, or run lengths as they are, as N run lengths {"size", "counts"} with text counts."""
    if isinstance(masks, Tensor):
        # (H, W, N) in Fortran's order is (N, W, H) in C's.
        columns = masks.to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
        masks = coco_mask.encode(columns.transpose(2, 1, 0)) if len(masks) else []
    return [
        {"size": [int(x) for x in rle["size"]], "counts": c.decode() if isinstance(c := rle["counts"], bytes) else c}
        for rle in masks
    ]


def _require_masks(masks: Sequence[dict[str, Any]], image_id: int) -> None:
    """Raises a :class:`ZooError` at run lengths of the truth that are none: the tools would read beyond their end."""
    for number, rle in enumerate(masks):
        runs = run_lengths(rle["counts"])
        if runs is None or runs.sum() != rle["size"][0] * rle["size"][1]:
            raise ZooError(f"picture {image_id}: the mask of object {number} is no run lengths of {rle['size']} pixels")


class CocoAP(Gathered):
    """COCO's numbers, in percent, of all pictures seen.

    `update` takes lists of dicts, one a picture, in the pixels of its file:

    - predictions: boxes (N, 4) x0, y0, x1, y1, scores (N,), labels (N,); for "segm" masks, (N, H, W) bool or run
      lengths; for "keypoints" keypoints (N, P, 3), of which x and y count;
    - the truth: image_id (), boxes, labels, iscrowd (N,), area (N,), masks, and keypoints with visibility.

    `compute` returns 12 numbers for boxes and for masks and 10 for keypoints: {"bbox/AP", "bbox/AP50", "bbox/AP75",
    "bbox/APs", ..., "segm/AP", ...}; nan where there is nothing to find (no large object, say). Under several processes
    each gives its pictures; one that comes twice counts once.

    Args:
        iou_types: of "bbox", "segm" and "keypoints".
        class_names: of the labels in order; with them `compute` also gives each class's AP, "bbox/AP of person".
        max_detections: of a picture, for "bbox" and "segm"; for "keypoints" it is 20.
        sigmas: of the P keypoints, as in COCO's OKS; None: COCO's 17.
        backend: "faster_coco_eval" or "pycocotools".

    Raises:
        ZooError: an unknown IoU type or backend, or sigmas that do not fit the keypoints.
    """

    sample = "picture"
    predictions: list[Tensor]
    truth: list[Tensor]

    def __init__(
        self,
        iou_types: Sequence[str] = ("bbox", "segm"),
        class_names: Sequence[str] | None = None,
        max_detections: int = 100,
        sigmas: Sequence[float] | None = None,
        backend: Literal["faster_coco_eval", "pycocotools"] = "faster_coco_eval",
        **kwargs: Any,
    ) -> None:
        nothing = torch.zeros(0, dtype=torch.uint8)
        super().__init__({"predictions": nothing, "truth": nothing}, **kwargs)
        for name in iou_types:
            if name not in IOU_TYPES:
                raise unknown("IoU type", name, IOU_TYPES)
        if backend not in BACKENDS:
            raise unknown("backend of COCO's metric", backend, BACKENDS)
        if max_detections < 1:
            raise ZooError(f"max_detections must be at least 1, got {max_detections}")
        self.iou_types, self.backend, self.max_detections = tuple(iou_types), backend, max_detections
        self.class_names = list(class_names) if class_names is not None else None
        self.sigmas = list(sigmas) if sigmas is not None else None
        self.by_class: dict[str, dict[int, float]] = {}  # of the last `compute`: AP by kind and class
        # A state is lines of json, one a picture, as bytes: text keeps every digit, and all backends gather bytes.
        for state in ("predictions", "truth"):
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self._begin()

    def _begin(self) -> None:
        """An empty piece of each state, so that a process without pictures gathers the same kind of tensor."""
        for state in (self.predictions, self.truth):
            state.append(torch.zeros(0, dtype=torch.uint8, device=self.device))

    def reset(self) -> None:
        """Forget all pictures."""
        super().reset()
        self._begin()

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
        """Adds pictures; `preds` and `target` in the same order."""
        if len(preds) != len(target):
            raise ZooError(f"{len(preds)} predictions for {len(target)} pictures")
        self._count()
        for found, true in zip(preds, target, strict=True):
            image_id = int(true["image_id"])
            self.predictions.append(self._line(self._record(found, image_id, ("scores",))))
            self.truth.append(self._line(self._record(true, image_id, ("iscrowd", "area"))))

    def _record(self, of: dict[str, Any], image_id: int, more: Sequence[str]) -> dict[str, Any]:
        boxes = of["boxes"]
        record = {"id": image_id, "labels": of["labels"].tolist(), **{name: of[name].tolist() for name in more}}
        record["boxes"] = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        if "segm" in self.iou_types:
            record["masks"] = encode_masks(of["masks"])
            if "area" in more:
                _require_masks(record["masks"], image_id)
        if "keypoints" in self.iou_types:
            # COCO counts whole pixels, so that a point in the middle of one is half a pixel less.
            points = of["keypoints"][..., :3]
            shift = points.new_tensor([0.5, 0.5, 0.0])
            record["keypoints"] = (points - shift).flatten(1).tolist()
        return record

    def _line(self, record: dict[str, Any]) -> Tensor:
        data = bytearray((json.dumps(record) + "\n").encode())
        return torch.frombuffer(data, dtype=torch.uint8).to(self.device)

    def compute(self) -> dict[str, Tensor]:
        """The numbers; see the class."""
        self._require()
        predictions, truth = _records(self.predictions), _records(self.truth)
        results: dict[str, float] = {}
        self.by_class = {}
        for kind in self.iou_types:
            results |= self._of_type(kind, predictions, truth)
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        return {name: torch.tensor(value, dtype=exact, device=self.device) for name, value in results.items()}

    def _of_type(
        self, kind: str, predictions: dict[int, dict[str, Any]], truth: dict[int, dict[str, Any]]
    ) -> dict[str, float]:
        from faster_coco_eval import COCO as FastCOCO
        from faster_coco_eval import COCOeval_faster
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        fast = self.backend == "faster_coco_eval"
        true, found = annotations_of(kind, truth, True), annotations_of(kind, predictions, False)
        classes = sorted({a["category_id"] for a in (*true, *found)})
        if self.class_names is not None:
            classes = list(range(len(self.class_names)))
        sizes = {a["image_id"]: a["segmentation"]["size"] for a in (*true, *found) if "segmentation" in a}
        images = [dict(zip(("id", "height", "width"), (k, *sizes.get(k, (0, 0))), strict=True)) for k in sorted(truth)]
        facts = {"images": images, "categories": [{"id": k, "name": str(k)} for k in classes]}
        with contextlib.redirect_stdout(io.StringIO()):
            sides = []
            for annotations in (true, found):
                side = FastCOCO() if fast else COCO()
                side.dataset = {**facts, "annotations": annotations}
                side.createIndex()
                sides.append(side)
            evaluation = (COCOeval_faster if fast else COCOeval)(*sides, kind)
            if kind == "keypoints":
                self._set_sigmas(evaluation, true)
            else:
                evaluation.params.maxDets = [1, 10, self.max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"]  # (threshold, recall, class, area, detections)
        known = {k: precision[:, :, n, 0, -1] for n, k in enumerate(classes)}
        self.by_class[kind] = {
            k: 100 * float(values[values > -1].mean()) for k, values in known.items() if (values > -1).any()
        }
        return self._numbers(kind, evaluation)

    def _set_sigmas(self, evaluation: Any, true: list[dict[str, Any]]) -> None:
        if self.sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(self.sigmas, dtype=float)
        expected = len(evaluation.params.kpt_oks_sigmas)
        wrong = next((len(a["keypoints"]) // 3 for a in true if len(a["keypoints"]) != 3 * expected), None)
        if wrong is not None:
            raise ZooError(f"{expected} sigmas of OKS for {wrong} keypoints; give one for each by sigmas")

    def _numbers(self, kind: str, evaluation: Any) -> dict[str, float]:
        """COCO's means over the (threshold, recall, class, area, detections) of what was accumulated."""
        parameters = evaluation.params
        areas = list(parameters.areaRngLbl)

        def mean(values: np.ndarray) -> float:
            valid = values[values > -1]
            return 100 * float(np.mean(valid)) if valid.size else float("nan")

        numbers = {}
        for name, (what, threshold, area, most) in (_KEYPOINTS if kind == "keypoints" else _DETECTION).items():
            values = evaluation.eval[what][..., areas.index(area), most]
            if threshold is not None:
                values = values[np.isclose(parameters.iouThrs, threshold)]
            numbers[f"{kind}/{name}"] = mean(values)
        for n, name in enumerate(self.class_names or ()):
            numbers[f"{kind}/AP of {name}"] = mean(evaluation.eval["precision"][:, :, n, 0, -1])
        return numbers


def _records(state: Tensor | list[Tensor]) -> dict[int, dict[str, Any]]:
    """The records of a state by picture; the first of several of one picture."""
    pieces = [state] if isinstance(state, Tensor) else state
    text = b"".join(piece.cpu().numpy().tobytes() for piece in pieces)
    records: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        record = json.loads(line)
        records.setdefault(record["id"], record)
    return records


def annotations_of(kind: str, records: dict[int, dict[str, Any]], true: bool) -> list[dict[str, Any]]:
    """Entries in COCO's format; what the tool derives from results is derived here by its rules."""
    entries: list[dict[str, Any]] = []
    for image_id in sorted(records):
        record = records[image_id]
        for n, (label, box) in enumerate(zip(record["labels"], record["boxes"], strict=True)):
            entry: dict[str, Any] = {"id": len(entries) + 1, "image_id": image_id, "category_id": label, "bbox": box}
            if kind == "segm":
                rle = record["masks"][n]
                entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].encode()}
            if kind == "keypoints":
                points = entry["keypoints"] = record["keypoints"][n]
            if true:
                entry |= {"iscrowd": int(record["iscrowd"][n]), "area": record["area"][n]}
                if kind == "keypoints":
                    entry["num_keypoints"] = sum(v > 0 for v in points[2::3])
            else:
                entry |= {"score": record["scores"][n], "iscrowd": 0}
                if kind == "bbox":
                    entry["area"] = box[2] * box[3]
                elif kind == "segm":
                    entry["area"] = int(coco_mask.area(entry["segmentation"]))
                else:
                    x, y = points[0::3], points[1::3]
                    entry["bbox"] = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
                    entry["area"] = entry["bbox"][2] * entry["bbox"][3]
            entries.append(entry)
    return entries
