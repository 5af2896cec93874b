"""The task of detectors: test-time augmentation, LVIS's metric and class counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.data.test_detection_data import content, lvis, write_set
from zoo.data.detection import DetectionDataModule
from zoo.detection.mask_rcnn import MaskRCNN, MaskRCNNDetection
from zoo.errors import ZooError
from zoo.training.tta import TTA, detect_augmented, views

TINY: dict[str, Any] = {
    "num_classes": 3,
    "resnet": {"depth": 18, "norm": "bn", "stem_channels": 8, "channels": 8, "freeze": 0},
    "fpn": {"channels": 16, "norm": "bn"},
    "rpn": {"sizes": [[12], [24], [48], [72], [96]], "samples": 16, "pre_nms": [50, 50], "post_nms": [20, 20]},
    "roi": {"samples": 8, "detections": 6, "score_threshold": 0.0},
    "box": {"fc_channels": 16},
    "mask": {"convs": 1, "channels": 16},
}


@pytest.fixture
def network() -> MaskRCNN:
    """With scores that differ."""
    torch.manual_seed(0)
    network = MaskRCNN(**TINY).double().eval()
    heads: Any = network.roi_heads
    for layer in (heads.box_predictors[0].cls_score, heads.box_predictors[0].bbox_pred, heads.mask_head.predictor):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return network


def batch() -> dict[str, Tensor]:
    """Two images of different sizes, padded."""
    image = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image[0, :, 80:] = image[1, :, :, 64:] = 0
    sizes = torch.tensor([[80, 96], [96, 64]])
    return {"image": image, "size": sizes, "original_size": torch.tensor([[120, 144], [96, 64]])}


@pytest.mark.parametrize("n", [0, 1])
@torch.no_grad()
def test_one_view_that_changes_nothing_gives_what_the_network_gives(network: MaskRCNN, n: int) -> None:
    one = {name: value[n : n + 1] for name, value in batch().items()}
    height, width = one["size"][0].tolist()
    one["image"] = one["image"][:, :, :height, : -(-width // 32) * 32]
    one["image"] = torch.nn.functional.pad(one["image"], (0, 0, 0, -height % 32))
    plain, merged = network(one)[0], detect_augmented(network, one, TTA((min(height, width),), flip=False))[0]
    assert len(plain["boxes"]) > 2
    for name in ("boxes", "scores", "labels", "masks"):
        torch.testing.assert_close(merged[name], plain[name], rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_views_of_a_mirrored_image_find_the_mirrored_objects(network: MaskRCNN) -> None:
    one = {name: value[1:] for name, value in batch().items()}
    mirrored = {**one, "image": one["image"][..., :64].flip(-1)}
    config = TTA((64, 96), flip=True)
    found, other = (detect_augmented(network, each, config)[0] for each in (one, mirrored))
    assert found["masks"].shape == (len(found["boxes"]), 96, 64)
    x1, y1, x2, y2 = other["boxes"].unbind(1)
    torch.testing.assert_close(found["boxes"], torch.stack([64 - x2, y1, 64 - x1, y2], 1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["scores"], other["scores"], rtol=1e-5, atol=1e-6)
    assert (found["masks"] == other["masks"].flip(-1)).double().mean() > 0.999
    assert len(found["boxes"]) <= 6


def test_views_move_boxes_to_and_fro() -> None:
    made = views(torch.randn(1, 3, 40, 60), (80, 120), TTA((20, 40), max_size=45, flip=True), 32)
    assert [view.size for view in made] == [(20, 30), (20, 30), (30, 45), (30, 45)]
    assert {tuple(view.batch["image"].shape[-2:]) for view in made} == {(32, 32), (32, 64)}
    box = torch.tensor([[12.0, 8, 60, 80]])
    assert made[1].seen(box).tolist() == [[15, 2, 27, 20]]
    for view in made:
        torch.testing.assert_close(view.stored(view.seen(box)), box)


def test_a_detector_of_lvis_trains_on_its_counts_and_is_measured_by_its_rules(tmp_path: Path) -> None:
    for file, folder, first in (("train", "train2017", 0), ("val", "val2017", 6)):
        write_set(tmp_path, content(4, first), "instances.json", folder)
        (tmp_path / f"lvis_v1_{file}.json").write_text(json.dumps(lvis(4, first, "v1", folder)))
    data = DetectionDataModule("lvis_v1", str(tmp_path), num_workers=0, train_transforms=[], eval_transforms=[])
    more = {"box": {"fc_channels": 16, "sigmoid": True, "federated": 2}, "roi": {**TINY["roi"], "soft_nms": "linear"}}
    task = MaskRCNNDetection(metric="lvis", tta=TTA((40, 50)), **{**TINY, **more})
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, data)
    weights = task.network.roi_heads.box_predictors[0].fed_loss_cls_weights  # type: ignore[union-attr,index]
    torch.testing.assert_close(weights, torch.tensor([2.0, 2**0.5, 0]))
    trainer.validate(task, data, verbose=False)
    assert {"val/box/APr", "val/mask/APf", "val/mask/AR"} <= set(trainer.callback_metrics)
    found = trainer.predict(task, data)
    assert len(found or []) == 4  # of the first picture's batch on


def test_mistakes_are_named() -> None:
    with pytest.raises(ZooError, match="did you mean 'lvis'"):
        MaskRCNNDetection(metric="lvi", **TINY)  # type: ignore[arg-type]
    with pytest.raises(ZooError, match="keypoints are not merged"):
        MaskRCNNDetection(tta=TTA(), **{**TINY, "mask": None, "keypoint": {"keypoints": 2, "channels": [8]}})
    with pytest.raises(ZooError, match=r"tta\.sizes"):
        MaskRCNNDetection(tta=TTA(sizes=()), **TINY)
