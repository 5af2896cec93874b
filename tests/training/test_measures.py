"""The callbacks that ablations measure by."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import zoo
from zoo.errors import ZooError
from zoo.training import (
    FactorAccuracy,
    GivenBoxMasks,
    GradientSpread,
    Instability,
    KNNProbe,
    LinearProbe,
    UnitDeletion,
)
from zoo.training.measures import dips

SMALL = {
    **{"trainer.logger": False, "trainer.enable_checkpointing": False, "trainer.enable_progress_bar": False},
    **{
        "trainer.max_steps": 2,
        "trainer.max_epochs": -1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.accelerator": "cpu",
    },
    "trainer.limit_val_batches": 1,
}
RESNET = {
    **{"model.depths": [2, 2, 2], "model.widths": [4, 4, 4], "data.batch_size": 8, "data.eval_batch_size": 12},
    **{"data.train_samples": 32, "model.optim": {"global_batch": 8}},
}


def recipe(name: str, tmp_path: Any, *callbacks: L.Callback, **options: Any) -> tuple[Any, Any, L.Trainer]:
    module, data, trainer = zoo.load_recipe(
        name, {**SMALL, **options, "trainer.callbacks": [], "trainer.default_root_dir": str(tmp_path)}
    )
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    return module, data, trainer


def test_gradient_spread_leaves_the_run_as_it_was(tmp_path: Any) -> None:
    states, spreads = [], []
    scaled = {"model.scale_x": 0.1, "model.shortcut": "constant_scaling"}
    for watched, more in ((False, {}), (True, {}), (True, scaled)):
        watch = [GradientSpread("network.stages.*.*")] if watched else []
        module, data, trainer = recipe("preact_resnet/pocket", tmp_path, *watch, **RESNET, **more)
        trainer.fit(module, datamodule=data)
        states.append(module.state_dict())
        spreads.append(trainer.callback_metrics.get("gradient_spread"))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert spreads[0] is None
    assert float(spreads[2]) > float(spreads[1]) + 0.2
    module, data, trainer = recipe("preact_resnet/pocket", tmp_path, GradientSpread("network.units.*"), **RESNET)
    with pytest.raises(ZooError, match=r"network\.units"):
        trainer.fit(module, datamodule=data)


def test_deleting_units_that_do_nothing_costs_nothing(tmp_path: Any) -> None:
    module, data, trainer = recipe("preact_resnet/pocket", tmp_path, UnitDeletion("network.stages.*.*"), **RESNET)
    units = [unit for stage in module.network.stages for unit in stage]
    found = []
    for _ in range(2):
        trainer.validate(module, datamodule=data, verbose=False)
        found.append(float(trainer.callback_metrics["deletion_median"]))
        for unit in units:
            torch.nn.init.zeros_(unit.conv2.weight)
    assert found[0] != 0
    assert found[1] == 0
    assert [unit for stage in module.network.stages for unit in stage] == units


def test_factors_of_a_label(tmp_path: Any) -> None:
    module, data, trainer = recipe("preact_resnet/pocket", tmp_path, FactorAccuracy({"row": 2, "column": 5}), **RESNET)

    def predict_logits(batch: dict[str, Any]) -> Tensor:
        row, column = batch["label"] // 5, batch["label"] % 5
        guess = (1 - row) * 5 + torch.where(batch["index"] % 4 == 0, column, (column + 1) % 5)
        return torch.nn.functional.one_hot(guess, 10).float()

    module.predict_logits = predict_logits
    trainer.validate(module, datamodule=data, verbose=False)
    assert float(trainer.callback_metrics["val/row"]) == 0
    assert float(trainer.callback_metrics["val/column"]) == pytest.approx(0.25)
    assert float(trainer.callback_metrics["val/top1"]) == 0


def test_masks_in_given_boxes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that fills every box is right where objects fill theirs, and a network cannot move the boxes."""
    options = {"data.eval_batch_size": 20, "data.train_samples": 8}
    module, data, trainer = recipe("mask_rcnn/pocket", tmp_path, GivenBoxMasks(jitter=0.0), **options)

    def complete(maps: Any, found: Any) -> None:
        for one in found:
            one["mask_probs"] = torch.ones(len(one["boxes"]), 28, 28)

    monkeypatch.setattr(module.network.roi_heads, "complete", complete)
    trainer.validate(module, datamodule=data, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if "val/mask_" in name}
    batch = next(iter(data.val_dataloader()))
    from pycocotools import mask as coco

    shares, sides = [], []
    for target in batch["target"]:
        for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            shares.append(coco.decode(mask).sum() / ((box[2] - box[0]) * (box[3] - box[1])))
            sides.append(max(box[2] - box[0], box[3] - box[1]))
    assert found["val/mask_iou"] == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    assert found["val/mask_above_50"] == pytest.approx(sum(share > 0.5 for share in shares) / len(shares))
    large = [share for share, side in zip(shares, sides, strict=True) if side >= 32]
    assert found["val/mask_iou_large"] == pytest.approx(sum(large) / len(large), abs=1e-5)


def test_probes_learn_from_some_and_are_held_to_the_limit(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    update = zoo.metrics.knn.KNNAccuracy.update_bank
    monkeypatch.setattr(
        "zoo.training.probe.KNNAccuracy.update_bank",
        lambda self, features, labels: seen.append(len(labels)) or update(self, features, labels),
    )
    probes = [KNNProbe(k=3, train_samples=20), LinearProbe(epochs=2, warmup_epochs=1, train_samples=20)]
    module, data, trainer = recipe("preact_resnet/pocket", tmp_path, *probes, **RESNET)
    trainer.validate(module, datamodule=data, verbose=False)
    assert seen == [20]
    # One batch of 12 validation samples.
    hits = 12 * float(trainer.callback_metrics["probe_top1"])
    assert hits == pytest.approx(round(hits))
    with pytest.raises(ZooError, match="train_samples"):
        KNNProbe(train_samples=1)


def test_dips_count_each_fall_once() -> None:
    assert dips([0.1, 0.3, 0.27, 0.29, 0.4, 0.2, 0.3, 0.41, 0.38]) == 3
    assert dips([0.1, 0.3, 0.27, 0.25, 0.3], drop=0.1) == 0
    with pytest.raises(ZooError, match="every_n_steps"):
        Instability(every_n_steps=0)
