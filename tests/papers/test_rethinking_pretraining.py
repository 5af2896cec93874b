"""Rethinking ImageNet Pre-training: the schedule, the recipe's rules, normalisation over processes, pre-training."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from tests.processes import in_processes
from zoo.detection import rethinking_pretraining as paper
from zoo.detection.mask_rcnn import MaskRCNN
from zoo.detection.rethinking_pretraining import ResNetClassifier, RethinkingDetection, milestones, schedule
from zoo.errors import ZooError
from zoo.nn.batchnorm import reduce_batch_norms
from zoo.training import PreciseBN

TINY: dict[str, Any] = {
    "num_classes": 3,
    "resnet": {"depth": 18, "stem_channels": 32, "channels": 32},
    "fpn": {"channels": 32},
    "rpn": {"sizes": ((8,), (16,), (32,), (48,), (64,)), "pre_nms": (60, 60), "post_nms": (40, 20), "samples": 32},
    "roi": {"samples": 32, "detections": 5},
    "box": {"fc_channels": 16, "conv_channels": 32},
    "mask": {"convs": 2, "channels": 32},
}
MODELS = [name for name in dir(paper) if name.endswith(("fpn_gn", "fpn_syncbn"))]
SHORT = {
    "data.batch_size": 2, "data.eval_batch_size": 2, "data.num_workers": 0, "model.optim.global_batch": None,
    "trainer.limit_val_batches": 1, "trainer.max_epochs": -1, "trainer.logger": False, "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False, "trainer.num_sanity_val_steps": 0, "trainer.enable_checkpointing": False,
}  # fmt: skip


def build(name: str = "mask_rcnn_r50_fpn_gn", **options: Any) -> MaskRCNN:
    """A published design made tiny."""
    torch.manual_seed(0)
    given = {**TINY, **options}
    if name.startswith(("faster", "keypoint")):
        del given["mask"]
    if name.startswith("keypoint"):
        given |= {"num_classes": 1, "keypoint": {"keypoints": 4, "channels": (8,)}}
    return getattr(paper, name)(**given)


def batch_of(objects: bool = True) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    target: dict[str, Tensor] = {"boxes": torch.tensor([[4.0, 6, 40, 50]]), "labels": torch.tensor([0])}
    target["masks"] = torch.zeros(1, 64, 64, dtype=torch.bool)
    target["masks"][0, 6:50, 4:40] = True
    target["keypoints"] = torch.tensor([[[10.0, 10, 2], [20, 20, 2], [30, 30, 2], [5, 40, 2]]])
    if not objects:
        target = {key: value[:0] for key, value in target.items()}
    image = torch.randn(1, 3, 64, 64, generator=draw)
    return {"image": image, "size": torch.tensor([[64, 64]]), "target": [target]}


# ------------------------------------------------------------------------------------------------------------- schedule


def test_the_rate_is_divided_in_the_last_steps_whatever_the_length() -> None:
    assert schedule(1) == (90_000, (60_000, 80_000))
    assert schedule(2) == (180_000, (120_000, 160_000))
    assert schedule(6) == (540_000, (480_000, 520_000))
    assert schedule(9, batch=64) == (202_500, (187_500, 197_500))
    assert milestones(540_000) == schedule(6).milestones
    assert milestones(18_000) == (12_000, 16_000)
    for drops in ((2, 4), (2, 0)):
        with pytest.raises(ZooError, match="drops count down"):
            milestones(10, drops)
    for multiple, batch in ((0, 16), (1, 0)):
        with pytest.raises(ZooError, match="positive multiple and batch"):
            schedule(multiple, batch)


def test_a_run_s_rates_follow_its_length() -> None:
    task, data, trainer = zoo.load_recipe(
        "rethinking_pretraining/pocket", {**SHORT, "trainer.max_steps": 8, "model.drops": [2, 1], "model.mask": None}
    )
    rates: list[float] = []
    task.on_train_batch_start = lambda *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    task.optim = paper.replace(task.optim, lr=1.0, warmup_steps=0)
    trainer.fit(task, data)
    assert rates == pytest.approx([1.0] * 6 + [0.1, 0.01])
    own = {"model.optim.milestone_steps": [2], "model.mask": None, "trainer.max_steps": 1}
    task, data, trainer = zoo.load_recipe("rethinking_pretraining/pocket", {**SHORT, **own})
    trainer.fit(task, data)
    assert task.optim.milestone_steps == (2,)  # those of the declaration win


def test_random_weights_are_not_frozen() -> None:
    short = {**SHORT, "trainer.max_steps": 1, "model.drops": [], "model.mask": None}
    task, data, trainer = zoo.load_recipe("rethinking_pretraining/pocket", {**short, "model.resnet.freeze": 2})
    endless = {"trainer.max_steps": -1, "trainer.max_epochs": 1, "data.train_samples": 2}
    one, data_of, run = zoo.load_recipe("rethinking_pretraining/pocket", {**short, **endless})
    with pytest.raises(ZooError, match=r"set trainer\.max_steps"):
        run.fit(one, data_of)
    with pytest.raises(ZooError, match="first 2 stages of the trunk would keep their random weights"):
        trainer.fit(task, data)


# -------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_normalised_and_trains_and_starts_as_theory_says(name: str) -> None:
    network = build(name).train()
    kind = nn.BatchNorm2d if name.endswith("syncbn") else nn.GroupNorm
    heads = (network.rpn, network.roi_heads.keypoint_head)
    bare = {id(m) for head in heads if head is not None for m in head.modules()}
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d) and id(m) not in bare]
    assert sum(isinstance(m, kind) for m in network.modules()) == sum(conv.bias is None for conv in convs) > 20
    assert all(p.requires_grad for p in network.parameters())
    losses = network(batch_of())
    first = next(losses[key] for key in losses if key.startswith("loss_cls"))
    assert first.item() == pytest.approx(math.log(network.num_classes + 1), abs=0.3)
    assert losses["loss_rpn_cls"].item() == pytest.approx(math.log(2), abs=0.1)
    if "loss_mask" in losses:
        assert losses["loss_mask"].item() == pytest.approx(math.log(2), abs=0.05)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("source", ["classifier", "task"])
def test_a_classifier_fills_the_trunk_with_its_normalisation(tmp_path: Path, source: str) -> None:
    classifier = ResNetClassifier(5, {**TINY["resnet"], "norm": "gn", "freeze": 0})  # type: ignore[arg-type]
    assert classifier(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    state = classifier.state_dict()
    if source == "task":
        task = paper.ClassifierPretraining(3, {**TINY["resnet"], "norm": "gn", "freeze": 0})  # type: ignore[arg-type]
        torch.save(state, tmp_path / "trunk.pth")
        task.load_initial(str(tmp_path / "trunk.pth"))
        assert task.network.fc.out_features == 3
        trunk = task.network.state_dict()
    else:
        torch.save({"model": state}, tmp_path / "trunk.pth")
        detector = RethinkingDetection(init_from=str(tmp_path / "trunk.pth"), **build().options)
        detector.setup("fit")
        trunk = {k.removeprefix("backbone.bottom_up."): v for k, v in detector.network.state_dict().items()}
    for key, value in state.items():
        if not key.startswith("fc."):
            assert torch.equal(trunk[key], value), key


def test_levels_are_joined_in_known_ways_only() -> None:
    with pytest.raises(ZooError, match="unknown fuse 'max'"):
        build(fpn={"channels": 32, "fuse": "max"})


# ----------------------------------------------------------------------------------------- normalisation over processes


def _layer(rows: tuple[int, ...], alone: bool) -> dict[str, Any]:
    """A layer's output, gradients and statistics for so many maps on each process (or all on one)."""
    import torch.distributed as dist

    rank = int(os.environ.get("LOCAL_RANK", 0))
    if not alone:
        dist.init_process_group("gloo", rank=rank)
    maps = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    parts = [maps[: sum(rows)]] if alone else maps[: sum(rows)].split(rows)
    layer = nn.Sequential(nn.BatchNorm2d(3)).double()
    reduce_batch_norms(layer)
    x = parts[rank].clone().requires_grad_()
    y = layer(x)
    (y**3).sum().backward()
    norm: Any = layer[0]
    weight = norm.weight.grad if norm.weight.grad is not None else torch.zeros(3).double()
    if not alone:
        dist.all_reduce(weight)
    kept = {"y": y.detach(), "x": x.grad, "weight": weight, "mean": norm.running_mean, "var": norm.running_var}
    return {key: value.clone() for key, value in kept.items()}


@pytest.mark.parametrize("rows", [(5, 0), (0, 0), (3, 2)])
def test_a_process_without_regions_does_no_harm(rows: tuple[int, int]) -> None:
    whole = _layer(rows, alone=True)
    found = in_processes(2, _layer, rows, False)
    for key, value in whole.items():
        joined = torch.cat([one[key] for one in found]) if key in "yx" else found[0][key]
        torch.testing.assert_close(joined, value, msg=lambda text, key=key: f"{key}: {text}")
        assert joined.isfinite().all()
    assert torch.equal(found[0]["var"], found[1]["var"])


def _detector() -> dict[str, Any]:
    import torch.distributed as dist

    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank)
    network = build("mask_rcnn_r50_fpn_syncbn").train()
    reduce_batch_norms(network)
    losses = network(batch_of(objects=rank == 0))
    sum(losses.values()).backward()
    finite = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
    buffers = {key: value for key, value in network.named_buffers() if "running" in key}
    return {"finite": finite, "mask": losses["loss_mask"].item(), "buffers": buffers}


def test_one_process_has_no_objects() -> None:
    with_objects, without = in_processes(2, _detector)
    assert with_objects["finite"]
    assert without["finite"]
    assert with_objects["mask"] > 0 == without["mask"]
    assert all(torch.equal(value, without["buffers"][key]) for key, value in with_objects["buffers"].items())
    assert any("mask_head" in key and value.abs().sum() > 0 for key, value in without["buffers"].items())


def test_precise_statistics_of_a_detector() -> None:
    """Those of heads are of the regions they see; what training draws is not moved."""
    norms: dict[str, Any] = {f"model.{part}.norm": "bn" for part in ("resnet", "fpn", "box", "mask")}
    short = {**SHORT, **norms, "trainer.max_steps": 2, "model.drops": [], "model.box.convs": 1, "model.mask.convs": 1}
    ends = []
    for callbacks in ([], [PreciseBN(2)]):
        task, data, trainer = zoo.load_recipe("rethinking_pretraining/pocket", {**short, "data.train_samples": 4})
        trainer.callbacks += callbacks
        trainer.fit(task, data)
        ends.append(task)
    plain, precise = ends
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), precise.parameters(), strict=True))
    norm = precise.network.roi_heads.mask_head.mask_fcn1[1]
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().clone()))
    means = norm.running_mean.clone(), norm.running_var.clone()
    PreciseBN(2).estimate(trainer, precise)
    maps = torch.cat(seen).double()
    torch.testing.assert_close(norm.running_mean.double(), maps.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), maps.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-6)
    assert all(x.isfinite().all() for x in means)
    assert not torch.equal(plain.network.roi_heads.mask_head.mask_fcn1[1].running_mean, means[0])
