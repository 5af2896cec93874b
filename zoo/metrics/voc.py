"""PASCAL VOC's average precision of boxes (Everingham et al. 2010, IJCV 88, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.ops import box_iou

from zoo.errors import ZooError, unknown
from zoo.metrics.gathered import Gathered

Rule = Literal["area", "11point"]
THRESHOLDS = tuple(k / 100 for k in range(50, 100, 5))


def average_precision(right: Tensor, count: int, rule: Rule = "area") -> float:
    """The average precision of one class, in 0..1.

    Args:
        right: (N,) bool, whether each detection, the surest first, finds an object; those that count for nothing are
            left out.
        count: of the objects there are, more than 0.
        rule: "area", what lies under the curve of precision over recall, of which the highest precision at any greater
            recall counts (from VOC2010 on); "11point", the mean of that at recalls 0, 0.1, ..., 1 (VOC2007).
    """
    found = right.double().cumsum(0)
    recall = found / count
    precision = found / torch.arange(1, len(found) + 1, dtype=torch.float64, device=found.device)
    best = precision.flip(0).cummax(0).values.flip(0)
    if rule == "11point":
        places = torch.searchsorted(recall, torch.arange(11, dtype=torch.float64, device=found.device) * 0.1)
        return float(torch.cat([best, best.new_zeros(1)])[places].mean())
    return float((best * recall.diff(prepend=recall.new_zeros(1))).sum())


def find_objects(overlap: Tensor, difficult: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Which detections of a class are right, and which count at all.

    Each detection is compared with the object of its picture that it overlaps most. An overlap above the threshold
    finds it, once; a second time, or with less overlap, the detection is wrong. One that finds a difficult object
    counts neither way.

    Args:
        overlap: (N, 2) float64 of detections, the surest first: the largest IoU, and the number of the object.
        difficult: (M,) bool of the objects.
        threshold: of the IoU.

    Returns:
        right (N,) and counted (N,), bool.
    """
    near = overlap[:, 0] > threshold
    chosen = torch.where(near, overlap[:, 1].long(), len(difficult))
    ignored = torch.cat([difficult, difficult.new_zeros(1)])[chosen]
    first = torch.full((len(difficult) + 1,), len(chosen), device=chosen.device)
    order = torch.arange(len(chosen), device=chosen.device)
    first = first.scatter_reduce(0, chosen, order, "amin")
    return near & ~ignored & (first[chosen] == order), ~ignored


class VocAP(Gathered):
    """VOC's numbers, in percent, of all pictures seen.

    `update` takes lists of dicts, one a picture, in the pixels of its file: predictions with boxes (N, 4) x0, y0, x1,
    y1, scores (N,), labels (N,); the truth with image_id (), boxes, labels, and `difficult` (N,), none where it is
    missing. Boxes are continuous: VOC's pixels 1 to 10 are a box from 0 to 10, so that overlaps are those of VOC's own
    count of whole pixels.

    `compute` gives {"bbox/AP50", "bbox/AP75", "bbox/AP"}: the means over classes at an IoU above 0.5, above 0.75, and
    over thresholds from 0.5 to 0.95. Classes without an object that counts are left out; nan where there is none. Of
    detections of one score those of pictures with smaller ids come first. Under several processes each gives its
    pictures; one that comes twice counts once.

    Args:
        rule: see :func:`average_precision`; VOC2007 has "11point".
        class_names: of the labels in order; with them `compute` also gives each class's AP50, "bbox/AP50 of cat".

    Raises:
        ZooError: an unknown rule.
    """

    sample = "picture"
    pictures: list[Tensor]
    found: list[Tensor]
    objects: list[Tensor]

    def __init__(self, rule: Rule = "area", class_names: Sequence[str] | None = None, **kwargs: Any) -> None:
        nothing = {
            "pictures": torch.zeros(0, 3, dtype=torch.int64),  # id, detections, objects
            "found": torch.zeros(0, 6, dtype=torch.float64),  # label, score, box
            "objects": torch.zeros(0, 6, dtype=torch.float64),  # label, difficult, box
        }
        super().__init__(nothing, **kwargs)
        if rule not in get_args(Rule):
            raise unknown("rule of VOC's average precision", rule, get_args(Rule))
        self.rule: Rule = rule
        self.class_names = list(class_names) if class_names is not None else None
        self.by_class: dict[str, dict[int, float]] = {}  # of the last `compute`: AP50 by kind and class
        for name in nothing:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
        """Adds pictures; `preds` and `target` in the same order."""
        if len(preds) != len(target):
            raise ZooError(f"{len(preds)} predictions for {len(target)} pictures")
        self._count()
        for given, true in zip(preds, target, strict=True):
            difficult = true.get("difficult", torch.zeros(len(true["labels"])))
            numbers = [int(true["image_id"]), len(given["labels"]), len(true["labels"])]
            self.pictures.append(torch.tensor([numbers], device=self.device))
            self.found.append(self._columns(given["labels"], given["scores"], given["boxes"]))
            self.objects.append(self._columns(true["labels"], difficult, true["boxes"]))

    def _columns(self, labels: Tensor, second: Tensor, boxes: Tensor) -> Tensor:
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        columns = (labels[:, None], second[:, None], boxes.reshape(-1, 4))
        return torch.cat([column.detach().to(self.device, exact) for column in columns], dim=1)

    def compute(self) -> dict[str, Tensor]:
        """The numbers; see the class."""
        self._require()
        pictures, found, objects = (_joined(state) for state in (self.pictures, self.found, self.objects))
        found, of_found = _once(pictures[:, 0], pictures[:, 1], found)
        objects, of_objects = _once(pictures[:, 0], pictures[:, 2], objects)
        classes = objects[objects[:, 1] == 0, 0].unique().long().tolist()
        table = {}
        for label in classes:
            mine, true = found[:, 0] == label, objects[:, 0] == label
            table[label] = self._of_class(found[mine], of_found[mine], objects[true], of_objects[true])
        first = {label: values[0] for label, values in table.items()}
        self.by_class = {"bbox": first}
        every = torch.tensor(list(table.values()), dtype=torch.float64).reshape(-1, len(THRESHOLDS))
        numbers = {"AP50": every[:, 0], "AP75": every[:, THRESHOLDS.index(0.75)], "AP": every}
        for n, name in enumerate(self.class_names or ()):
            numbers[f"AP50 of {name}"] = torch.tensor([first.get(n, float("nan"))], dtype=torch.float64)
        return {f"bbox/{name}": value.mean().to(self.device) for name, value in numbers.items()}

    def _of_class(self, found: Tensor, of_found: Tensor, objects: Tensor, of_objects: Tensor) -> list[float]:
        """The AP of a class at each threshold, from its detections and objects and the pictures they are of."""
        order = found[:, 1].argsort(descending=True, stable=True)
        found, of_found = found[order], of_found[order]
        difficult = objects[:, 1] > 0
        overlap = found.new_zeros(len(found), 2)
        for picture in of_found.unique().tolist():
            mine, true = of_found == picture, (of_objects == picture).nonzero()[:, 0]
            if len(true):
                best, index = box_iou(found[mine, 2:], objects[true, 2:]).nan_to_num().max(dim=1)
                overlap[mine] = torch.stack([best, true[index].double()], dim=1)
        scores = []
        for threshold in THRESHOLDS:
            right, counted = find_objects(overlap, difficult, threshold)
            scores.append(100 * average_precision(right[counted], int((~difficult).sum()), self.rule))
        return scores


def _joined(state: Tensor | list[Tensor]) -> Tensor:
    joined = state if isinstance(state, Tensor) else torch.cat(state)
    return joined.cpu() if joined.dtype == torch.int64 else joined.cpu().double()


def _once(ids: Tensor, counts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each picture, the first time it comes, in the order of the ids; and the picture of each row."""
    known, picture = ids.unique(return_inverse=True)
    here = torch.arange(len(ids))
    first = torch.full((len(known),), len(ids)).scatter_reduce(0, picture, here, "amin")
    place = here.repeat_interleave(counts)
    kept = (first[picture] == here)[place].nonzero()[:, 0]
    kept = kept[picture[place[kept]].argsort(stable=True)]
    return rows[kept], picture[place[kept]]
