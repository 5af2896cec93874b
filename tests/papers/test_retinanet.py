"""RetinaNet: its losses, its network, its official weights, its task."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

import zoo
from tests.processes import in_processes
from zoo.detection import retinanet
from zoo.detection.retinanet import RetinaNet, convert_official
from zoo.errors import ZooError
from zoo.nn.detection import ResNetBackbone, ResNetConfig
from zoo.nn.detection.dense import DenseInferenceConfig, flatten_level
from zoo.ops.focal import focal_loss, focal_loss_star
from zoo.training import EasyNegativeShare

TINY: dict[str, Any] = {
    "num_classes": 3,
    "resnet": {"depth": 18, "stem_channels": 8, "channels": 8, "norm": "bn", "freeze": 0},
    "fpn": {"channels": 8},
    "anchors": {"sizes": ((8,), (16,), (32,), (48,), (64,))},
    "head": {"convs": 1},
    "inference": {"detections": 5},
}


def build(**options: Any) -> RetinaNet:
    """A tiny one; of a part, `options` name some fields."""
    torch.manual_seed(0)
    parts = {
        key: {**TINY[key], **part} if isinstance(part, dict) and key in TINY else part for key, part in options.items()
    }
    return RetinaNet(**{**TINY, **parts})


def batch_of(count: int = 2) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    boxes = ([[4.0, 6, 40, 50], [50, 8, 90, 40]], [[10.0, 10, 60, 50]])
    target = [{"boxes": torch.tensor(b), "labels": torch.arange(len(b))} for b in boxes]
    size = torch.tensor([[64, 96], [56, 72]])
    batch = {"image": torch.randn(2, 3, 64, 96, generator=draw), "size": size, "original_size": 2 * size}
    return {key: value[:count] for key, value in batch.items()} | {"target": target[:count]}


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("kind", ["focal", "focal_star", "ohem"])
def test_losses_by_anchor_are_the_elementwise_ones(kind: str) -> None:
    loss = retinanet.RetinaLossConfig(kind=kind, beta=0.5 if kind == "focal_star" else 0.0)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    maps = [3 * torch.randn(2, 2 * 3, n, n, generator=draw) for n in (3, 2)]
    flat = torch.cat([flatten_level(x, 3) for x in maps], dim=1)
    image, anchor, label = torch.tensor([0, 0, 1]), torch.tensor([1, 20, 7]), torch.tensor([2, 0, 1])
    positives = retinanet.Positives(image, anchor, label, flat[image, anchor])
    targets = torch.zeros_like(flat)
    targets[image, anchor, label] = 1
    if kind == "focal_star":
        wanted = focal_loss_star(flat, targets, 0.25, 2.0, 0.5)
    else:
        wanted = focal_loss(flat, targets, 0.25, 2.0 if kind == "focal" else 0.0)
    torch.testing.assert_close(retinanet.anchor_losses(maps, positives, loss), wanted.sum(dim=2))
    easy = wanted * ((flat.sigmoid() < 0.1) & (targets == 0))
    torch.testing.assert_close(retinanet.easy_losses(maps, positives, loss), easy.sum(dim=2))


def test_hard_examples() -> None:
    losses = torch.tensor([5.0, 4.9, 4.0, 3.0, 2.0, 1.0])
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 1, 10, 11], *([20.0 * k, 0, 20 * k + 10, 10] for k in range(1, 5))])
    positive = torch.tensor([False, False, False, True, False, False])

    def chosen(**options: Any) -> list[int]:
        return retinanet.hard_examples(
            losses, positive, anchors, retinanet.RetinaLossConfig(kind="ohem", **options)
        ).tolist()

    assert chosen(ohem_batch=3, ohem_nms=1.0) == [0, 1, 2]
    assert chosen(ohem_batch=3, ohem_nms=0.5) == [0, 2, 3]  # the second overlaps the first
    assert chosen(ohem_batch=4, ohem_nms=0.5, ohem_ratio=3.0) == [3, 0, 2, 4]
    assert chosen(ohem_batch=8, ohem_nms=0.5, ohem_ratio=1.0) == [3, 0]
    draw = torch.Generator().manual_seed(0)  # a prefix of the order decides as the whole does
    corner = 60 * torch.rand(500, 2, generator=draw)
    many, scores = torch.cat([corner, corner + 10], dim=1), torch.rand(500, generator=draw)
    loss = retinanet.RetinaLossConfig(kind="ohem", ohem_batch=4, ohem_nms=0.1)
    found = retinanet.hard_examples(scores, torch.zeros(500, dtype=torch.bool), many, loss)
    assert found.tolist() == nms(many, scores, 0.1)[:4].tolist()


# -------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize(
    "options",
    [{}, {"top": "p5", "head": {"norm": "bn"}}, {"head": {"norm": "gn", "channels": 32, "bias": False}},
     {"loss": {"kind": "ohem"}}, {"loss": {"kind": "focal_star", "normalizer": "positives", "box_loss": "giou"}}],
)  # fmt: skip
def test_losses_start_as_theory_says_and_reach_every_parameter(options: dict[str, Any]) -> None:
    network = build(**options).train()
    batch = batch_of()
    anchors, logits, _ = network.predict(batch["image"])
    assert float(torch.cat([x.flatten() for x in logits]).sigmoid().mean()) == pytest.approx(0.01, rel=0.1)
    losses = network(batch)
    if not options:  # alpha 0.25: of each positive -0.25 0.99^2 log 0.01 at the start, of the rest next to nothing
        assigned = network.assign(torch.cat(anchors), batch["target"])
        count = len(assigned.positives(3)[0])
        normalizer = 0.9 * 100 + 0.1 * count
        assert float(losses["loss_cls"]) == pytest.approx(0.25 * 0.99**2 * math.log(100) * count / normalizer, rel=0.1)
    sum(losses.values()).backward()
    unreached = {key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {key for key in unreached if not key.startswith("backbone.top.")}  # all hard examples may be smaller
    assert not unreached or network.loss.kind == "ohem"


def test_the_normaliser_moves_before_use_and_counts_images() -> None:
    network, batch = build().train(), batch_of()
    count = len(network.assign(torch.cat(network.predict(batch["image"])[0]), batch["target"]).positives(3)[0])
    value = 50.0
    for _ in range(2):
        network(batch)
        value = 0.9 * value + 0.1 * count / 2
        assert float(network.normalizer) == pytest.approx(value)
    for images in (1, 2, 3, 4):  # detectron2's is of a process's batch, whatever its size, and starts at 100
        network, theirs = build(loss={"initial": 100 / images}), 100.0
        for positives in (7, 0, 40):
            theirs = 0.9 * theirs + 0.1 * max(positives, 1)
            assert float(network.normalize(positives, images)) == pytest.approx(theirs)
    network = build(loss={"normalizer": "positives"})
    assert float(network.normalize(0, 2)) == 1
    assert float(network.normalize(7, 2)) == 7
    assert float(network.normalizer) == 50
    assert "normalizer" not in network.state_dict()


def _losses(world: int, folder: Path) -> tuple[list[dict[str, float]], float]:
    network = build(resnet={"norm": "gn", "stem_channels": 32, "channels": 32}, loss={"kind": "focal"}).train()
    batch = batch_of()
    if world > 1:
        rank = int(os.environ["LOCAL_RANK"])
        place = f"file://{folder / 'meet'}"
        torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
        batch = {key: value[rank : rank + 1] for key, value in batch.items()}
    found = [{key: value.item() for key, value in network(batch).items()} for _ in range(2)]
    return found, float(network.normalizer)


def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    whole, average = _losses(1, tmp_path)
    (first, mean), (second, other) = in_processes(2, _losses, 2, tmp_path)
    assert average == mean == other
    for one, a, b in zip(whole, first, second, strict=True):
        assert {key: (a[key] + b[key]) / 2 for key in one} == pytest.approx(one, rel=1e-5)


def test_detections_are_in_the_pixels_of_the_file_and_images_may_be_empty() -> None:
    network = build(inference={"score_threshold": 0.0}).eval()
    with torch.no_grad():
        found = network({key: value for key, value in batch_of().items() if key != "target"})
    for detection, (height, width) in zip(found, ((128, 192), (112, 144)), strict=True):
        assert 0 < len(detection["boxes"]) <= 5
        assert detection["scores"].tolist() == sorted(detection["scores"].tolist(), reverse=True)
        assert (detection["boxes"] >= 0).all()
        assert (detection["boxes"] <= torch.tensor([width, height, width, height])).all()
    network.inference = DenseInferenceConfig(score_threshold=0.9)
    with torch.no_grad():
        assert [len(one["boxes"]) for one in network(batch_of())] == [0, 0]
    batch = batch_of()
    batch["target"] = [{key: value[:0] for key, value in one.items()} for one in batch["target"]]
    losses = network.train()(batch)
    assert losses["loss_box_reg"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in network.parameters())
    with pytest.raises(ZooError, match="target"):
        network({"image": batch["image"]})


def test_half_precision_keeps_losses_and_boxes_in_float32() -> None:
    network = build().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(batch_of())
        found = network.eval().detect(batch_of())
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found[0]["boxes"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": "c6"}, "unknown source of p6 'c6'"), ({"levels": ("p3", "p9")}, "unknown level 'p9'"),
        ({"loss": {"kind": "focl"}}, "did you mean 'focal'"), ({"loss": {"alpha": 2.0}}, "alpha"),
        ({"loss": {"normalizer": "none"}}, "unknown normalizer"), ({"head": {"prior": 1.0}}, "prior"),
        ({"loss": {"kind": "focal_star", "gamma": 0.0}}, "gamma"), ({"loss": {"labels": (0, 1)}}, "labels"),
        ({"loss": {"thresholds": (0.5, 0.4)}}, "rise"), ({"loss": {"momentum": 2.0}}, "momentum"),
        ({"anchors": {"ratios": ((0.0,),)}}, "ratios of anchors"), ({"loss": {"initial": 0.0}}, "initial"),
        ({"anchors": {"convention": "caffe"}}, "unknown convention"),
        ({"inference": {"detection": 3}}, "did you mean 'detections'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        RetinaNet(**{**TINY, **options})


# -------------------------------------------------------------------------------------------------------------- weights


def _as_detectron(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head and pyramid of ours in Detectron's names, its ratios being 1, 2, 1/2."""
    names = {"head.cls_score": "retnet_cls_pred_fpn3", "head.bbox_pred": "retnet_bbox_pred_fpn3"}
    found = {}
    for key, value in state.items():
        place, _, leaf = key.rpartition(".")
        if place in names:
            value = value.unflatten(0, (3, 3, -1))[:, [1, 2, 0]].flatten(0, 2)
            found[f"{names[place]}_{leaf[0]}"] = value
        elif place.startswith("head."):
            subnet, _, conv = place.removeprefix("head.").partition("_subnet.convs.")
            found[f"retnet_{subnet}_conv_n{conv}_fpn3_{leaf[0]}"] = value
    return found


def test_official_names_become_ours(tmp_path: Path) -> None:
    """The names of whole networks are tried by the layouts and the parity cases."""
    network = build()
    own = network.state_dict()
    head = {key: value for key, value in own.items() if key.startswith("head.")}
    theirs = _as_detectron(head) | {"fpn_6_w": own["backbone.top.p6.weight"], "fpn_6_w_momentum": torch.zeros(1)}
    theirs |= {"fpn_inner_res4_5_sum_lateral_w": own["backbone.lateral.c4.0.weight"], "lr": torch.zeros(1)}
    theirs |= {"res2_0_branch1_bn_s": torch.ones(8), "retnet_cls_pred_fpn3_w_momentum": torch.zeros(1)}
    converted = convert_official(theirs)
    assert all(torch.equal(converted[key], value) for key, value in head.items())
    assert torch.equal(converted["backbone.top.p6.weight"], own["backbone.top.p6.weight"])
    assert "backbone.bottom_up.layer1.0.downsample.1.running_var" in converted
    assert convert_official(own).keys() == own.keys()  # ours stay ours
    cycled = {"head.cls_subnet.1.0.running_mean": 0, "head.cls_subnet.1.weight": 1, "head.cls_subnet.3.bias": 2}
    assert convert_official({key: torch.tensor(v) for key, v in cycled.items()}) == {
        "head.cls_subnet.norms.0.levels.0.running_mean": 0,
        "head.cls_subnet.norms.0.weight": 1,
        "head.cls_subnet.convs.1.bias": 2,
    }
    for wrong in ({**own, "x": torch.zeros(1)}, {**theirs, "x": torch.zeros(1)}, {"head.x": torch.zeros(1)},
                  {"head.classification_head.x": torch.zeros(1)}):  # fmt: skip
        with pytest.raises(ZooError, match="unknown key"):
            convert_official(wrong)
    torch.save({"model": own}, tmp_path / "detector.pth")
    other = build(num_classes=5)
    retinanet.load_weights(other, tmp_path / "detector.pth")
    fresh = {key for key, value in other.state_dict().items() if own[key].shape != value.shape}
    assert fresh == {"head.cls_score.weight", "head.cls_score.bias"}
    assert torch.equal(other.head.bbox_pred.weight, network.head.bbox_pred.weight)
    trunk = ResNetBackbone(ResNetConfig(**TINY["resnet"])).state_dict()
    torch.save(trunk, tmp_path / "trunk.pth")
    retinanet.load_weights(other, tmp_path / "trunk.pth")
    assert torch.equal(other.backbone.bottom_up.layer4[0].conv1.weight, trunk["layer4.0.conv1.weight"])


# ----------------------------------------------------------------------------------------------------------------- task


def test_the_normaliser_is_kept_and_easy_negatives_are_measured(tmp_path: Path) -> None:
    options = {
        "data.batch_size": 2, "data.eval_batch_size": 2, "data.num_workers": 0, "model.optim.global_batch": None,
        "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 1, "trainer.max_epochs": 1,
        "trainer.logger": False,
        "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False, "trainer.num_sanity_val_steps": 0,
        "model.loss.gamma": 0.0, "model.loss.alpha": None, "model.clip_each": 1.0,
    }  # fmt: skip
    task, data, trainer = zoo.load_recipe("retinanet/pocket", options)
    trainer.callbacks = [EasyNegativeShare()]  # type: ignore[attr-defined]
    trainer.fit(task, data)
    logged = trainer.callback_metrics
    assert {"val/box/AP50", "train/loss_cls", "train/loss_box_reg"} <= set(logged)
    assert 0.3 < logged["val/easy_negative_share"] < 1  # of cross entropy, at the start
    assert float(task.network.normalizer) != 50
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = retinanet.RetinaNetDetection.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert again.network.options == task.network.options
    assert float(again.network.normalizer) == pytest.approx(float(task.network.normalizer))
    with pytest.raises(ZooError, match=r"model\.loss\.gama"):
        zoo.load_recipe("retinanet/pocket", {**options, "model.loss.gama": 1})
