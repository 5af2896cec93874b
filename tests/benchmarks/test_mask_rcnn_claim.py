"""Mask R-CNN's claim in miniature runs, resumes, and measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.claims import mask_rcnn as claim


def test_claim_quick_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    arguments = ["--quick", "--seeds", "2", "--work", str(tmp_path), "--out", str(out)]
    assert claim.main(arguments) == 0
    record = json.loads(out.read_text())
    assert set(record["arms"]) == {"align", "pool", "rounded", "softmax"}
    assert [c["name"] for c in record["claims"]] == [
        "align_over_pool",
        "more_when_strict",
        "rounding_is_the_cause",
        "sigmoid_over_softmax",
    ]
    for arm in record["arms"].values():
        assert len(arm["mean_iou"]) == 2
        assert all(0 <= value <= 1 for value in arm["mean_iou"] + arm["above_75"])

    def never(*arguments: object) -> None:
        raise AssertionError("a finished part is not computed again")

    monkeypatch.setattr(claim, "run_arm", never)
    assert claim.main(arguments) == 0
    assert json.loads(out.read_text())["arms"] == record["arms"]
    with pytest.raises(SystemExit):
        claim.main([*arguments, "--data", "cifar10"])


def test_batches_are_functions_of_seed_and_step() -> None:
    settings = claim.Settings(train_images=16, test_images=8, batch=4, steps=5)
    objects = claim.draw(settings, "train", 16)
    batches, again = claim.Batches(settings, objects, 3), claim.Batches(settings, objects, 3)
    for step in range(5):
        batch = batches[step]
        assert all(value.equal(again[step][name]) for name, value in batch.items())
        assert batch["index"].max() < 4
        # The jittered box still holds most of its object's mask.
        for mask, box in zip(batch["masks"], batch["boxes"].round().int().tolist(), strict=True):
            assert mask[box[1] : box[3], box[0] : box[2]].sum() > 0.6 * mask.sum()
    assert not batches[0]["boxes"].equal(claim.Batches(settings, objects, 4)[0]["boxes"])


def test_rounded_boxes_lie_on_the_map_s_cells() -> None:
    settings = claim.Settings(width=8)
    torch.manual_seed(0)
    task = claim.RegionMasks(settings, "align", rounded=True, softmax=False)
    images = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    index = torch.zeros(1, dtype=torch.long)
    boxes = torch.tensor([[9.0, 20, 50, 33]])
    expected = task(images, index, torch.tensor([[16.0, 16, 48, 32]]))
    assert task(images, index, boxes).equal(expected)
    task.rounded = False
    assert not task(images, index, boxes).equal(expected)
