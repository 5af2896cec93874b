"""CocoAP against pycocotools on random worlds and the COCO sample, and in two processes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from tests.conftest import ROOT
from zoo.errors import ZooError
from zoo.metrics import CocoAP

TYPES = ("bbox", "segm", "keypoints")
HEIGHT, WIDTH, POINTS = 120, 160, 17


def _ellipse(box: list[float]) -> dict[str, Any]:
    x, y, w, h = box
    column, row = np.arange(WIDTH) - x - w / 2, np.arange(HEIGHT) - y - h / 2
    inside = (column / (w / 2)) ** 2 + ((row / (h / 2)) ** 2)[:, None] <= 1
    return coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))


def random_world(
    seed: int, pictures: int = 10, objects: int = 8, found: int = 20, classes: int = 3
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A set in COCO's format with crowds, empty pictures and unlabelled keypoints, and detections with ties."""
    random = np.random.default_rng(seed)
    truth: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    ids = [3 * n + 7 for n in range(pictures)]
    for image_id in ids:
        here = []
        for _ in range(random.integers(0, objects + 1)):
            w, h = random.uniform(4, WIDTH / 2), random.uniform(4, HEIGHT / 2)
            box = [round(float(v), 2) for v in (random.uniform(0, WIDTH - w), random.uniform(0, HEIGHT - h), w, h)]
            points = np.stack([random.integers(0, WIDTH, POINTS), random.integers(0, HEIGHT, POINTS)], 1)
            visible = random.integers(0, 3, POINTS) * (random.random() < 0.8)
            points = np.concatenate([points, visible[:, None]], 1) * (visible > 0)[:, None]
            mask = _ellipse(box)
            here.append(
                {"id": len(truth) + len(here) + 1, "image_id": image_id, "category_id": int(random.integers(classes)),
                 "bbox": box, "area": float(coco_mask.area(mask)), "iscrowd": int(random.random() < 0.15),
                 "segmentation": mask, "keypoints": points.reshape(-1).tolist(),
                 "num_keypoints": int((visible > 0).sum())}
            )  # fmt: skip
        for _ in range(random.integers(0, found + 1)):
            if here and random.random() < 0.7:
                near = here[random.integers(len(here))]
                box = [float(v) for v in np.array(near["bbox"]) + random.normal(0, 2, 4)]
                label = near["category_id"]
                points = np.array(near["keypoints"], float).reshape(-1, 3) + random.normal(0, 2, (POINTS, 3))
            else:
                box = [float(v) for v in random.uniform(4, 60, 4)]
                label, points = int(random.integers(classes)), random.uniform(0, 100, (POINTS, 3))
            box[2:] = [max(2.0, v) for v in box[2:]]
            results.append(
                {"image_id": image_id, "category_id": label, "bbox": box, "score": round(float(random.random()), 1),
                 "segmentation": _ellipse(box), "keypoints": points.reshape(-1).tolist()}
            )  # fmt: skip
        truth += here
    images = [{"id": k, "height": HEIGHT, "width": WIDTH} for k in ids]
    categories = [{"id": k, "name": f"class {k}"} for k in range(classes)]
    return {"images": images, "annotations": truth, "categories": categories}, results


def pycocotools_numbers(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str, sigmas: Any = None
) -> np.ndarray:
    """The numbers that pycocotools prints, in percent, nan for its -1."""
    wanted = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
    kept = [{k: r[k] for k in ("image_id", "category_id", "score", wanted)} for r in copy.deepcopy(results)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(kept), kind)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.where(evaluation.stats < 0, np.nan, 100 * evaluation.stats)


def as_batches(
    truth: dict[str, Any], results: list[dict[str, Any]], dtype: torch.dtype = torch.float64
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same as predictions and targets of the zoo, a dict a picture."""

    def tensor(rows: list[dict[str, Any]], key: str, *shape: int) -> Tensor:
        return torch.tensor([r[key] for r in rows], dtype=dtype).view(len(rows), *shape)

    def one(rows: list[dict[str, Any]]) -> dict[str, Any]:
        boxes = tensor(rows, "bbox", 4)
        boxes[:, 2:] += boxes[:, :2]
        points = max((len(r["keypoints"]) // 3 for r in rows), default=POINTS)
        return {
            "boxes": boxes,
            "labels": torch.tensor([r["category_id"] for r in rows], dtype=torch.int64),
            "masks": [r["segmentation"] for r in rows],
            "keypoints": tensor(rows, "keypoints", points, 3) + torch.tensor([0.5, 0.5, 0]),
        }

    preds, target = [], []
    for image in truth["images"]:
        rows = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        more = {"area": tensor(rows, "area"), "iscrowd": tensor(rows, "iscrowd").long()}
        target.append({**one(rows), **more, "image_id": torch.tensor(image["id"])})
        rows = [r for r in results if r["image_id"] == image["id"]]
        preds.append({**one(rows), "scores": tensor(rows, "score")})
    return preds, target


def _numbers(metric: CocoAP, kind: str) -> np.ndarray:
    return np.array([float(value) for name, value in metric.compute().items() if name.startswith(f"{kind}/")])


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_pycocotools(seed: int, backend: Any) -> None:
    world = random_world(seed, *[(10, 8, 20, 3), (25, 14, 40, 2), (3, 2, 130, 1)][seed])
    preds, target = as_batches(*world)
    for kind in TYPES:
        metric = CocoAP((kind,), backend=backend)
        for n in range(0, len(preds), 3):
            metric.update(preds[n : n + 3], target[n : n + 3])
        expected = pycocotools_numbers(*world, kind)
        assert np.isfinite(expected).sum() >= 5
        np.testing.assert_allclose(_numbers(metric, kind), expected, rtol=1e-12, atol=1e-12)


def test_the_order_of_pictures_and_their_doubles_do_not_matter() -> None:
    preds, target = as_batches(*random_world(3))
    metric, other = CocoAP(TYPES), CocoAP(TYPES)
    metric.update(preds, target)
    for n in [*reversed(range(len(preds))), 0, 4]:
        other.update([preds[n]], [target[n]])
    expected = {name: float(value) for name, value in metric.compute().items()}
    assert {name: float(value) for name, value in other.compute().items()} == pytest.approx(expected, nan_ok=True)
    other.reset()
    other.update(preds[:1], target[:1])
    assert {n: float(v) for n, v in other.compute().items()} != pytest.approx(expected, nan_ok=True)


def test_masks_may_be_pixels_and_a_perfect_detector_gets_everything() -> None:
    _, target = as_batches(*random_world(4))
    for truth in target:
        truth["iscrowd"].zero_()
    preds = [{**t, "scores": torch.ones(len(t["labels"]))} for t in target]
    for p in preds:
        pixels = [torch.from_numpy(coco_mask.decode(rle)) for rle in p["masks"]]
        p["masks"] = torch.stack(pixels).bool() if pixels else torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)
    metric = CocoAP(class_names=["a", "b", "c"])
    metric.update(preds, target)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert [found[f"{k}/{n}"] for k in ("bbox", "segm") for n in ("AP", "AP75", "APs", "AR100", "AP of b")] == [
        pytest.approx(100)
    ] * 10


def test_nothing_found_is_zero_and_nothing_to_find_is_nan() -> None:
    _, target = as_batches(*random_world(4))
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    for backend in ("faster_coco_eval", "pycocotools"):
        metric = CocoAP(("bbox",), backend=backend)
        metric.update([nothing] * len(target), target)
        assert float(metric.compute()["bbox/AP"]) == 0
        metric.reset()
        metric.update([nothing], [{**nothing, "image_id": 1, "area": torch.zeros(0), "iscrowd": torch.zeros(0)}])
        assert math.isnan(float(metric.compute()["bbox/AP"]))


def test_other_keypoints_want_their_own_sigmas() -> None:
    truth, results = random_world(6)
    for row in (*truth["annotations"], *results):
        row["keypoints"] = row["keypoints"][:15]
    for row in truth["annotations"]:
        row["num_keypoints"] = sum(v > 0 for v in row["keypoints"][2::3])
    preds, target = as_batches(truth, results)
    for p in (*preds, *target):
        p["keypoints"] = p["keypoints"][:, :5]
    metric = CocoAP(("keypoints",), sigmas=[0.1] * 5)
    metric.update(preds, target)
    expected = pycocotools_numbers(truth, results, "keypoints", [0.1] * 5)
    np.testing.assert_allclose(_numbers(metric, "keypoints"), expected, rtol=1e-12)
    wrong = CocoAP(("keypoints",))
    wrong.update(preds, target)
    with pytest.raises(ZooError, match="17 sigmas of OKS for 5 keypoints"):
        wrong.compute()


def test_mistakes_are_named() -> None:
    with pytest.raises(ZooError, match="unknown IoU type 'box'; did you mean 'bbox'"):
        CocoAP(("box",))
    with pytest.raises(ZooError, match="backend"):
        CocoAP(backend="cocoapi")  # type: ignore[arg-type]
    with pytest.raises(ZooError, match="1 predictions for 0 pictures"):
        CocoAP().update([{}], [])
    with pytest.raises(ZooError, match="needs pictures"), pytest.warns(UserWarning, match="before the"):
        CocoAP().compute()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        command = [
            sys.executable,
            "-m",
            "tests.metrics.ddp_coco_ap",
            str(rank),
            str(world),
            port,
            str(tmp_path / f"{world}{rank}"),
        ]
        runs.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for run in runs:
        assert run.wait(timeout=120) == 0, run.stderr.read()[-3000:] if run.stderr else ""
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("10", "20", "21"))
    for name, expected in one.items():
        assert first[name] == second[name] == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert expected["bbox/AP"] > 1


@pytest.mark.parametrize("annotations", ["instances", "person_keypoints"])
def test_on_coco_pictures_through_the_data_module(shared: Path, annotations: str) -> None:
    """The truth that the data module hands on is what pycocotools reads from the json, crowds included."""
    from zoo.data.detection import DetectionDataModule

    folder = shared / "data" / "coco_sample"
    keypoints = annotations == "person_keypoints"
    module = DetectionDataModule(str(folder), options={"annotations": annotations}, keypoints=keypoints, num_workers=0)
    truth = json.loads((folder / f"{annotations}.json").read_text())
    for a in truth["annotations"]:
        a.setdefault("keypoints", [0] * 51)
    # Detections: the objects themselves, moved.
    random = np.random.default_rng(0)
    sizes = {i["id"]: (i["height"], i["width"]) for i in truth["images"]}
    results = []
    for a in truth["annotations"]:
        x, y, w, h = np.array(a["bbox"]) + random.normal(0, 3, 4)
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        rle = coco_mask.merge(coco_mask.frPyObjects(polygon, *sizes[a["image_id"]]))
        row = {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": [x, y, w, h], "segmentation": rle}
        points = np.array(a["keypoints"], float) + random.normal(0, 2, 51)
        results.append({**row, "score": round(float(random.random()), 1), "keypoints": points.tolist()})
    types = ("bbox", "segm", "keypoints") if keypoints else ("bbox", "segm")
    metric = CocoAP(types)
    number = {k: n for n, k in enumerate(sorted(c["id"] for c in truth["categories"]))}
    preds, _ = as_batches(truth, [{**r, "category_id": number[r["category_id"]]} for r in results])
    order = {image["id"]: n for n, image in enumerate(truth["images"])}
    seen = 0
    for split in ("train", "val"):
        samples = module.samples(split, training=False)
        for n in range(len(samples)):
            batch = samples[n]
            metric.update([preds[order[int(batch["target"][0]["image_id"])]]], batch["target"])
            seen += 1
    assert seen == len(truth["images"])
    for kind in types:
        expected = pycocotools_numbers(truth, results, kind)
        np.testing.assert_allclose(_numbers(metric, kind), expected, rtol=1e-9, atol=1e-9)
