"""VocAP against a plain computation by the challenge's words, in whole pixels, and in two processes."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import in_processes
from zoo.errors import ZooError
from zoo.metrics import VocAP

World = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def random_world(seed: int, pictures: int = 12, classes: int = 3, ties: bool = False) -> World:
    """Predictions and truth: boxes of whole pixels, difficult objects, empty pictures, a class without objects."""
    random = np.random.default_rng(seed)

    def boxes(count: int) -> np.ndarray:
        corner = random.integers(0, 60, (count, 2))
        return np.concatenate([corner, corner + random.integers(4, 40, (count, 2))], 1).astype(float)

    preds, target = [], []
    for n in range(pictures):
        own = boxes(random.integers(0, 6))
        near = np.repeat(own, random.integers(0, 4, len(own)), axis=0) + random.integers(-3, 4, (1, 4))
        found = np.concatenate([near, boxes(random.integers(0, 4))])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        scores = random.random(len(found)) if not ties else random.integers(1, 4, len(found)) / 4
        preds.append(_numbers(found, scores=scores, labels=random.integers(0, classes + 1, len(found))))
        target.append(
            {
                **_numbers(own, labels=random.integers(0, classes, len(own))),
                "difficult": torch.from_numpy((random.random(len(own)) < 0.3).astype(np.int64)),
                "image_id": torch.tensor(100 - n),
            }
        )
    return preds, target


def _numbers(boxes: np.ndarray, **rest: np.ndarray) -> dict[str, Any]:
    return {"boxes": torch.from_numpy(boxes).float(), **{name: torch.from_numpy(value) for name, value in rest.items()}}


def plain(preds: list[Any], target: list[Any], threshold: float, points: bool) -> list[float]:
    """The AP of each class with objects, detection by detection, in VOC's pixels: counted from 1, the last included."""
    found = []
    for label in sorted({int(x) for t in target for x, d in zip(t["labels"], t["difficult"], strict=True) if not d}):
        rows = [
            (-float(score), int(t["image_id"]), n, box.tolist())
            for n, (p, t) in enumerate(zip(preds, target, strict=True))
            for score, own, box in zip(p["scores"], p["labels"], p["boxes"], strict=True)
            if own == label
        ]
        rows.sort(key=lambda row: row[:2])
        taken: set[tuple[int, int]] = set()
        right, wrong = [], []
        for _, _, n, (x, y, u, v) in rows:
            best, place = 0.0, None
            for k, (own, other) in enumerate(zip(target[n]["labels"], target[n]["boxes"].tolist(), strict=True)):
                if own != label:
                    continue
                w = min(u, other[2]) - max(x + 1, other[0] + 1) + 1
                h = min(v, other[3]) - max(y + 1, other[1] + 1) + 1
                if w <= 0 or h <= 0:
                    continue
                sides = [(b[2] - (b[0] + 1) + 1) * (b[3] - (b[1] + 1) + 1) for b in ((x, y, u, v), other)]
                if (iou := w * h / (sum(sides) - w * h)) > best:
                    best, place = iou, k
            hit = best > threshold and place is not None
            if hit and target[n]["difficult"][place]:
                continue
            right.append(float(hit and (n, place) not in taken))
            wrong.append(1 - right[-1])
            if hit:
                taken.add((n, place))
        count = sum(int((t["labels"] == label).logical_and(t["difficult"] == 0).sum()) for t in target)
        recall = np.cumsum(right) / count
        precision = np.cumsum(right) / np.maximum(np.cumsum(right) + np.cumsum(wrong), 1)
        if points:
            best_at = [max(precision[recall >= t], default=0.0) for t in np.arange(0.0, 1.1, 0.1)]
            found.append(100 * float(np.mean(best_at)))
        else:
            steps = np.unique(recall[recall > 0])
            best_at = [max(precision[recall >= t]) for t in steps]
            found.append(100 * float(np.sum(np.diff([0.0, *steps]) * best_at)))
    return found


@pytest.mark.parametrize("rule", ["area", "11point"])
@pytest.mark.parametrize("seed", range(6))
def test_numbers_are_those_of_a_plain_computation(seed: int, rule: Any) -> None:
    preds, target = random_world(seed, ties=seed > 3)
    metric = VocAP(rule, class_names=["a", "b", "c", "d"])
    for n in range(0, len(preds), 5):
        metric.update(preds[n : n + 5], target[n : n + 5])
    found = metric.compute()
    by_threshold = [plain(preds, target, k / 100, rule == "11point") for k in range(50, 100, 5)]
    assert float(found["bbox/AP50"]) == pytest.approx(np.mean(by_threshold[0]), rel=1e-12)
    assert float(found["bbox/AP75"]) == pytest.approx(np.mean(by_threshold[5]), rel=1e-12)
    assert float(found["bbox/AP"]) == pytest.approx(np.mean(by_threshold), rel=1e-12)
    assert list(metric.by_class["bbox"].values()) == pytest.approx(by_threshold[0])
    assert math.isnan(float(found["bbox/AP50 of d"]))
    assert 1 < found["bbox/AP50"] < 99


def test_what_the_rules_say_of_a_small_case() -> None:
    """One object found second: the curve is a precision of 1/2 at a recall of 1/2, for either rule in its own way."""
    box = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    preds = [{"boxes": box[[1, 0]], "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 0])}]
    there = torch.tensor([[0.0, 0, 10, 10], [40, 40, 50, 50]])
    target: list[Any] = [{"image_id": torch.tensor(1), "boxes": there, "labels": torch.tensor([0, 0])}]
    for rule, expected in (("area", 25.0), ("11point", 100 * 6 / 11 / 2)):
        metric = VocAP(rule)  # type: ignore[arg-type]
        metric.update(preds, target)
        assert float(metric.compute()["bbox/AP50"]) == pytest.approx(expected)
    target[0]["difficult"] = torch.tensor([1, 0])
    metric.reset()
    metric.update(preds, target)
    assert float(metric.compute()["bbox/AP50"]) == 0.0
    metric.reset()
    metric.update([{key: value[:0] for key, value in preds[0].items()}], target)  # nothing found
    assert float(metric.compute()["bbox/AP50"]) == 0.0
    with pytest.raises(ZooError, match="rule of VOC's average precision '12point'; did you mean"):
        VocAP("12point")  # type: ignore[arg-type]


def _dealt(empty: bool) -> dict[str, float]:
    """Rank 1 gets few pictures and one that rank 0 has, too; or none."""
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
    preds, target = random_world(3, ties=True)
    dealt = ([range(12), []] if empty else [[0, 1, 2, 3, 4, 5, 6, 8, 10], [11, 9, 7, 8]])[dist.get_rank()]
    metric = VocAP()
    for n in dealt:
        metric.update(preds[n : n + 1], target[n : n + 1])
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("empty", [False, True])
def test_two_processes_give_what_one_gives(empty: bool) -> None:
    alone = VocAP()
    alone.update(*random_world(3, ties=True))
    expected = {name: float(value) for name, value in alone.compute().items()}
    for found in in_processes(2, _dealt, empty):
        assert found == pytest.approx(expected, rel=1e-12)
