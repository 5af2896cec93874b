"""Where an evaluation errs: counted exactly on any number of processes, and never at the cost of the run."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tests.processes import in_processes
from zoo.data import ImageDataModule
from zoo.metrics.coco import CocoAP
from zoo.metrics.video import FrameMAP, MultiLabelMAP, MultiViewAccuracy
from zoo.recognition.preact_resnet import PreActResNet
from zoo.training import Classification, ErrorAnalysis, Optim


def _trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), use_distributed_sampler=False,
        **{**quiet, **options},
    )  # fmt: skip


def _task() -> Classification:
    torch.manual_seed(0)
    return Classification(PreActResNet([1, 1, 1], [4, 8, 16], num_classes=10), Optim(), 10)


def _data() -> ImageDataModule:
    return ImageDataModule("shapes", image_size=16, eval_batch_size=8, seed=0)


def _validate(folder: str, world: int) -> None:
    options = {"devices": world, "strategy": "ddp"} if world > 1 else {"devices": 1}
    trainer = _trainer(Path(folder), ErrorAnalysis(worst=5), limit_val_batches=6, **options)
    trainer.validate(_task(), _data(), verbose=False)


def test_a_classifier_is_judged_alike_by_one_and_two_processes(tmp_path: Path) -> None:
    for world in (1, 2):
        in_processes(world, _validate, str(tmp_path / str(world)), world)
    one, two = (json.loads((tmp_path / str(world) / "errors_val.json").read_text()) for world in (1, 2))
    assert one == two
    batch = _data().samples("val").__getitems__(list(range(48)))
    task = _task().eval()
    with torch.no_grad():
        logits = task(batch["image"])
    loss = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
    pairs = list(zip(batch["label"].tolist(), logits.argmax(1).tolist(), strict=True))
    assert one["confusion"] == [[*pair, pairs.count(pair)] for pair in sorted(set(pairs))]
    assert one["samples"] == 48
    assert [entry["index"] for entry in one["worst"]] == loss.argsort(descending=True)[:5].tolist()
    names = _data().class_names
    for entry in one["worst"]:
        truth, guess = pairs[entry["index"]]
        assert (entry["truth"], entry["guess"]) == (names[truth], names[guess])
        assert entry["loss"] == pytest.approx(loss[entry["index"]].item(), rel=1e-5)
        picture = Image.open(io.BytesIO(base64.b64decode(entry["picture"].partition(",")[2])))
        assert picture.size == (96, 96)


class _Finder(L.LightningModule):
    """Says of each picture what its batch holds as `found`."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return {"detections": batch["found"]}

    def judged(self, split: str) -> dict[str, Any]:
        return {"ap": {"box": {0: 50.0, 1: 25.0}, "mask": {}}}


def _objects(*rows: tuple[list[int], int, float], crowd: int = 0) -> dict[str, Tensor]:
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).view(-1, 4)
    labels, scores = torch.tensor([row[1] for row in rows]).long(), torch.tensor([row[2] for row in rows])
    return {
        "boxes": boxes,
        "labels": labels,
        "scores": scores,
        "iscrowd": torch.tensor([0] * (len(rows) - crowd) + [1] * crowd),
    }


A, B, FAR = [0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 50, 9]


@pytest.mark.parametrize(
    ("found", "true", "mistakes"),
    [
        (_objects((A, 0, 0.9)), _objects((A, 0, 1)), 0),
        (_objects((A, 1, 0.9)), _objects((A, 0, 1)), 2),  # another class: missed, and false
        (_objects((A, 0, 0.4)), _objects((A, 0, 1)), 1),  # not sure enough
        (_objects((A, 0, 0.9), (A, 0, 0.8)), _objects((A, 0, 1)), 1),  # twice
        (_objects((FAR, 0, 0.9)), _objects((A, 0, 1), (B, 1, 1)), 3),
        (_objects(), _objects((A, 0, 1)), 1),
        (_objects((A, 0, 0.9)), _objects(), 1),
        (_objects((A, 0, 0.9)), _objects((A, 0, 1), crowd=1), 0),  # on a crowd nothing is false
    ],
)
def test_mistakes_of_a_detector(found: Any, true: Any, mistakes: int, tmp_path: Path) -> None:
    true["image_id"] = torch.tensor(7)
    sizes = torch.tensor([[32, 60]])
    batch = {
        "image": torch.zeros(1, 3, 32, 64),
        "size": sizes,
        "original_size": sizes,
        "target": [true],
        "found": [found],
    }
    loader = DataLoader([batch], batch_size=None)
    _trainer(tmp_path, ErrorAnalysis()).validate(_Finder(), loader, verbose=False)
    errors = json.loads((tmp_path / "errors_val.json").read_text())
    (entry,) = errors["worst"]
    assert (entry["loss"], entry["measure"], entry["index"]) == (mistakes, "mistakes", 7)
    assert errors["ap"] == {"box": {"class 0": 50.0, "class 1": 25.0}}


class _Odd(_Finder):
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return {"detections": [{"scores": None}]}


def test_a_fault_is_a_line_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = DataLoader([{"target": [{}], "image": torch.zeros(1, 3, 8, 8)}], batch_size=None)
    _trainer(tmp_path, ErrorAnalysis()).validate(_Odd(), loader, verbose=False)
    assert capsys.readouterr().err.count("no error analysis of val: TypeError") == 1
    assert not (tmp_path / "errors_val.json").exists()


def test_metrics_keep_what_they_found_of_classes() -> None:
    coco = CocoAP(iou_types=("bbox",))
    true = _objects((A, 0, 1), (B, 3, 1)) | {"image_id": torch.tensor(1), "area": torch.tensor([100.0, 100.0])}
    coco.update([_objects((A, 0, 0.9))], [true])
    coco.compute()
    assert coco.by_class == {"bbox": {0: pytest.approx(100), 3: 0.0}}
    views = MultiViewAccuracy(3)
    views.update(torch.eye(3)[[0, 1, 2]], torch.tensor([0, 0, 2]), torch.tensor([5, 5, 8]), torch.tensor([0, 1, 0]))
    views.compute()
    assert views.joined is not None
    assert [row.tolist() for row in views.joined] == [[0, 2], [0, 2]]
    labels = MultiLabelMAP(2)
    labels.update(torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([0]))
    labels.compute()
    assert labels.by_class == {0: 100.0}
    frames = FrameMAP(2)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    frames.update(torch.tensor([[0.1, 0.9]]), box, box, torch.tensor([1]), 0, 0)
    frames.compute()
    assert frames.by_class == {1: pytest.approx(100)}
