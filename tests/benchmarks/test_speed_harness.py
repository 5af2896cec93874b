"""What the speed files share: contenders from recipes, and how peers are imported."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed import harness
from benchmarks.speed.harness import Setting
from zoo.errors import ZooError

RECIPE = "preact_resnet/pocket"
OPTIONS = {"model.depths": [1, 1, 1], "model.widths": [4, 8, 16], "model.optim.lr": 0.01, "data.image_size": 16}
SETTING = Setting(batch=4)


def _batch(images: Tensor) -> dict[str, Tensor]:
    return {"image": images, "label": torch.arange(len(images))}


@pytest.mark.parametrize("last", [True, False])
def test_ours_is_the_recipes_task_and_optimiser(last: bool) -> None:
    options = {**OPTIONS, "model.channels_last": last, "model.optim.weight_decay": 0.25}
    trainer = harness.from_recipe(RECIPE, options, _batch, SETTING)
    groups = trainer.optimizer.param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.01, 0.25)}
    kernel = next(p for group in groups for p in group["params"] if p.ndim == 4 and p.shape[1] > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last) == last
    before = kernel.detach().clone()
    found = harness.training_step(trainer, harness.noise(SETTING, 4, 3, 16, 16), SETTING)
    assert found["loss"] == pytest.approx(2.3, abs=1)
    assert not torch.equal(kernel, before)
    assert f"PreActResNetClassification of {RECIPE}: its training step and its own fused SGD" in trainer.about


def test_ours_starts_where_it_is_told_and_can_be_timed_in_another_loss() -> None:
    start = harness.recipe_task(RECIPE, OPTIONS).network.state_dict()
    images = harness.noise(SETTING, 4, 3, 16, 16)
    losses = [harness.from_recipe(RECIPE, OPTIONS, _batch, SETTING, start).loss(images) for _ in range(2)]
    assert losses[0] == losses[1]
    of_all = harness.from_recipe(
        RECIPE, OPTIONS, _batch, SETTING, start, lambda task, batch: task.network(batch["image"]).square().mean()
    )
    assert of_all.loss(images) != losses[0]
    assert "PreActResNet of" in of_all.about
    with pytest.raises(RuntimeError, match="Missing key"):
        harness.from_recipe(RECIPE, OPTIONS, _batch, SETTING, {})


def test_costs_of_each() -> None:
    with torch.device("meta"):
        nets, x = {"a": nn.Linear(3, 5), "b": nn.Linear(3, 5, bias=False)}, torch.empty(2, 3)
    found = harness.costs({name: (net, lambda net=net: net(x).sum()) for name, net in nets.items()})
    assert found == {"flops": dict.fromkeys("ab", 2 * (2 * 2 * 3 * 5)), "parameters": {"a": 20, "b": 15}}


class _Whole(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield {"picture": torch.ones(3, 1)}


def test_a_peer_that_gives_whole_batches(tmp_path: Path) -> None:
    loader = harness.peer_loader("peer", tmp_path, _Whole(), None, "", lambda batch: batch["picture"])
    assert loader.version == "unknown"  # the folder has no commit
    assert next(loader.batches).shape == (3, 1)


def test_what_is_imported_from_a_checkout_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "their_models").mkdir()
    (tmp_path / "their_models" / "net.py").write_text("import their_layers\nfrom no_such_package.ops import Pool\n")
    (tmp_path / "their_layers.py").write_text("WIDTH = 3\n")
    before = dict(sys.modules)
    stand_ins = {"no_such_package": {}, "no_such_package.ops": {"Pool": nn.Identity}}
    with harness.importing(tmp_path, "their_models.net", stand_ins=stand_ins):
        module = importlib.import_module("their_models.net")
    assert (module.Pool, module.their_layers.WIDTH) == (nn.Identity, 3)
    assert {"their_models", "their_layers", "no_such_package"} & sys.modules.keys() == set()
    assert before.keys() <= sys.modules.keys()
    assert str(tmp_path) not in sys.path
    with pytest.raises(ZooError, match="wants no_such_package"):
        harness.import_from(tmp_path, "their_models.net")
    with pytest.raises(ZooError, match=r"no their_models/others.py"):
        harness.import_from(tmp_path, "their_models.others")
