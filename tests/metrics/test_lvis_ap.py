"""LvisAP against digits of lvis-api (0.5.3, commit 7d7f07d) on random federated worlds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from tests.metrics.test_coco_ap import HEIGHT, WIDTH, as_batches, random_world
from zoo.errors import ZooError
from zoo.metrics import CocoAP, LvisAP

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR", "ARs", "ARm", "ARl")
# Pictures, objects, detections, classes; the last world has more detections of a picture than the 300 that count.
SHAPES = ((10, 8, 20, 7), (25, 14, 40, 5), (4, 3, 700, 2))
# Of each world lvis-api's numbers of boxes and of masks, made by LVISEval(LVIS, LVISResults) on what `federated_world`
# returns, with the ids, boxes, masks and scores alone of the detections.
EXPECTED: dict[tuple[int, str], list[float]] = {
    (0, "bbox"): [
        25.78893894098986,
        49.68538062597468,
        16.958074928371957,
        26.583956354819154,
        29.934464875058936,
        math.nan,
        32.708004133746705,
        26.53854314002829,
        14.660736952816162,
        37.75850340136054,
        36.82142857142857,
        41.5,
        math.nan,
    ],
    (0, "segm"): [
        25.44529131092073,
        49.68538062597468,
        20.058364549170772,
        26.104052241958886,
        31.395409540954088,
        math.nan,
        32.180201353468675,
        25.970414898632722,
        14.817802659386818,
        37.95068027210885,
        37.75,
        41.0,
        math.nan,
    ],
    (1, "bbox"): [
        19.323792964664126,
        33.79720821099993,
        20.06285261674463,
        17.565965326117166,
        29.828840175659334,
        math.nan,
        15.139790668462846,
        21.991369773844564,
        22.356643938705798,
        44.59503459503459,
        35.9,
        58.871753246753244,
        math.nan,
    ],
    (1, "segm"): [
        19.02129838707001,
        32.86933072504714,
        19.93144858958337,
        16.17423021879591,
        33.44251782206721,
        math.nan,
        15.01202892606682,
        21.37820128911767,
        22.326031504981074,
        44.476190476190474,
        35.45238095238095,
        59.44913419913419,
        math.nan,
    ],
    (2, "bbox"): [
        23.160052989423072,
        36.78217821782178,
        20.576107061255573,
        28.009572401009475,
        28.565414944855828,
        math.nan,
        16.022379034546226,
        30.297726944299917,
        math.nan,
        98.33333333333334,
        95.0,
        100.0,
        math.nan,
    ],
    (2, "segm"): [
        24.60237931707091,
        36.78217821782178,
        19.674409748667173,
        27.43951300050973,
        35.31541413445066,
        math.nan,
        15.94833887451879,
        33.25641975962302,
        math.nan,
        98.33333333333334,
        95.0,
        100.0,
        math.nan,
    ],
}


def federated_world(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A set in LVIS's format, and detections: ties, empty pictures, objects and detections without area."""
    truth, results = random_world(seed, *SHAPES[seed])
    random = np.random.default_rng(1000 + seed)
    for category in truth["categories"]:
        category["frequency"] = "rcf"[category["id"] % 3]
    for a in truth["annotations"]:
        a["iscrowd"] = 0
    nothing = coco_mask.encode(np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F"))
    truth["annotations"][0] |= {"area": 0.0, "segmentation": nothing}
    results[1] |= {"bbox": [5.0, 5.0, 0.0, 9.0], "segmentation": nothing}
    for image in truth["images"]:
        here = sorted({a["category_id"] for a in truth["annotations"] if a["image_id"] == image["id"]})
        absent = [c["id"] for c in truth["categories"] if c["id"] not in here]
        image["neg_category_ids"] = [k for k in absent if random.random() < 0.5]
        image["not_exhaustive_category_ids"] = [k for k in here if random.random() < 0.3]
    return truth, results


def as_federated(
    truth: dict[str, Any], results: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same as predictions and targets of the zoo."""
    preds, target = as_batches(truth, results)
    order = {c["id"]: "rcf".index(c["frequency"]) for c in truth["categories"]}
    for image, one in zip(truth["images"], target, strict=True):
        one["neg_labels"] = torch.tensor(image["neg_category_ids"], dtype=torch.int64)
        one["not_exhaustive_labels"] = torch.tensor(image["not_exhaustive_category_ids"], dtype=torch.int64)
        one["frequency"] = torch.tensor([order[k] for k in one["labels"].tolist()], dtype=torch.int64)
    return preds, target


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_lvis_api(seed: int, kind: str) -> None:
    preds, target = as_federated(*federated_world(seed))
    metric = LvisAP((kind,))
    for n in range(0, len(preds), 3):
        metric.update(preds[n : n + 3], target[n : n + 3])
    found = metric.compute()
    assert list(found) == [f"{kind}/{name}" for name in NAMES]
    expected = np.array(EXPECTED[seed, kind])
    np.testing.assert_allclose([float(v) for v in found.values()], expected, rtol=1e-10, atol=1e-10)
    assert np.isfinite(expected).sum() >= 8


def test_classes_of_which_nothing_is_known_do_not_count() -> None:
    box = torch.tensor([[10.0, 10, 50, 50]])
    truth = {
        "image_id": 1, "boxes": box, "labels": torch.tensor([0]), "area": torch.tensor([1600.0]),
        "iscrowd": torch.tensor([0]), "frequency": torch.tensor([2]), "neg_labels": torch.tensor([2]),
        "not_exhaustive_labels": torch.zeros(0, dtype=torch.int64),
    }  # fmt: skip
    # A better detection elsewhere of the class itself, one of an unknown class, the right one.
    boxes, scores = torch.cat([box + 60, box, box]), torch.tensor([0.9, 0.8, 0.7])
    found = {"boxes": boxes, "scores": scores, "labels": torch.tensor([0, 1, 0])}

    def ap(truth: dict[str, Any], metric: CocoAP | None = None) -> dict[str, float]:
        metric = metric or LvisAP(("bbox",), class_names=["a", "b", "c"])
        metric.update([found], [truth])
        return {name: float(value) for name, value in metric.compute().items()}

    assert ap(truth)["bbox/AP"] == pytest.approx(50)
    assert ap({**truth, "not_exhaustive_labels": torch.tensor([0])})["bbox/AP"] == pytest.approx(100)
    # Without federated fields it is COCO's, of what is there.
    plain = {name: truth[name] for name in ("image_id", "boxes", "labels", "area", "iscrowd")}
    numbers = ap(plain)
    assert numbers["bbox/AP"] == pytest.approx(ap(plain, CocoAP(("bbox",)))["bbox/AP"])
    assert math.isnan(numbers["bbox/APf"])
    assert math.isnan(numbers["bbox/AP of b"])
    assert numbers["bbox/AP of a"] == numbers["bbox/AP"]
    # A class that is known to be absent is no part of the mean, as it has nothing to be found.
    metric = LvisAP(("bbox",))
    metric.update([{**found, "labels": torch.tensor([2, 2, 0])}], [truth])
    assert float(metric.compute()["bbox/AP"]) == pytest.approx(100)
    assert metric.by_class == {"bbox": {0: pytest.approx(100)}}


def test_only_the_best_detections_count_and_masks_may_be_pixels() -> None:
    preds, target = as_federated(*federated_world(0))
    for p in preds:
        pixels = [torch.from_numpy(coco_mask.decode(rle)) for rle in p["masks"]]
        p["masks"] = torch.stack(pixels).bool() if pixels else torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)
    few, cut = LvisAP(("segm",), max_detections=4), LvisAP(("segm",))
    few.update(preds, target)
    orders = [p["scores"].argsort(descending=True, stable=True)[:4] for p in preds]
    best = [{name: value[kept] for name, value in p.items()} for p, kept in zip(preds, orders, strict=True)]
    cut.update(best, target)
    expected = {name: float(value) for name, value in cut.compute().items()}
    assert {name: float(value) for name, value in few.compute().items()} == pytest.approx(expected, nan_ok=True)
    assert 0 < expected["segm/AR"] < EXPECTED[0, "segm"][9]


def test_mistakes_are_named() -> None:
    with pytest.raises(ZooError, match="IoU type of LVIS 'keypoints'"):
        LvisAP(("bbox", "keypoints"))
    preds, target = as_federated(*federated_world(0))
    target[0]["frequency"] = torch.tensor([1] * 20)
    with pytest.raises(ZooError, match="frequency is of each"):
        LvisAP(("bbox",)).update(preds, target)
    with pytest.raises(ZooError, match="1 predictions for 0 pictures"):
        LvisAP().update([{}], [])
