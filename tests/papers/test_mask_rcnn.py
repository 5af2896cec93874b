"""Mask R-CNN: the network's designs, its official weights, its task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import zoo
from zoo.detection import mask_rcnn
from zoo.detection.mask_rcnn import MaskRCNN, MaskRCNNDetection, convert_official, convert_trunk, load_weights
from zoo.errors import ZooError
from zoo.nn.detection import ResNetBackbone, ResNetConfig
from zoo.ops.boxes import cell_anchors

TINY: dict[str, Any] = {
    "num_classes": 3,
    "resnet": {"depth": 18, "stem_channels": 8, "channels": 8},
    "fpn": {"channels": 8},
    "rpn": {"sizes": ((8,), (16,), (32,), (48,), (64,)), "pre_nms": (60, 60), "post_nms": (40, 20), "samples": 32},
    "roi": {"samples": 32, "detections": 5},
    "box": {"fc_channels": 16},
    "mask": {"convs": 1, "channels": 8},
}
ONE_LEVEL = {"sizes": ((8, 16, 32),)}
DEEP = {"depth": 50, "width_per_group": 2}
DESIGNS: dict[str, dict[str, Any]] = {
    "mask_rcnn_r50_fpn": {},
    "mask_rcnn_r50_c4": {"rpn": ONE_LEVEL, "box": {"pool": {"size": 8}}, "mask": {"convs": 0}},
    "mask_rcnn_r50_dc5": {"rpn": ONE_LEVEL, "resnet": DEEP},
    "cascade_mask_rcnn_r50_fpn": {},
    "keypoint_rcnn_r50_fpn": {"num_classes": 1, "mask": None, "keypoint": {"keypoints": 4, "channels": (8,)}},
    "faster_rcnn_r50_fpn": {"mask": None},
    "mask_rcnn_r50_fpn_lsj": {"box": {"convs": 2, "conv_channels": 8}},
}


def build(design: str = "mask_rcnn_r50_fpn", **options: Any) -> MaskRCNN:
    """A published design made tiny; of a part, `options` name some fields."""
    torch.manual_seed(0)
    parts = {
        key: {**TINY[key], **part} if isinstance(part, dict) and key in TINY else part for key, part in options.items()
    }
    network = getattr(mask_rcnn, design)(**{**TINY, **parts})
    for name, buffer in network.named_buffers():  # frozen BatchNorm of random weights normalises nothing
        if name.endswith(("bn2.weight", "bn3.weight")):
            buffer.fill_(0.3)
    return network


def batch_of(network: MaskRCNN) -> dict[str, Any]:
    """Two images, the second smaller than the padding, with objects, masks and keypoints."""
    draw = torch.Generator().manual_seed(1)
    images, sizes = torch.randn(2, 3, 64, 96, generator=draw), [(64, 96), (56, 72)]
    images[1, :, 56:] = images[1, :, :, 72:] = 0
    targets = []
    for boxes, (height, width) in zip(([[4.0, 6, 40, 50], [50, 8, 90, 40]], [[10.0, 10, 60, 50]]), sizes, strict=True):
        found = torch.tensor(boxes)
        x1, y1, x2, y2 = found.T[..., None, None]
        x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
        shift = torch.rand(len(found), 4, 2, generator=draw) * (found[:, 2:] - found[:, :2])[:, None]
        target = {"boxes": found, "labels": torch.arange(len(found)) % network.num_classes}
        target["masks"] = (x > x1) & (x < x2) & (y > y1) & (y < y2)
        target["keypoints"] = torch.cat([found[:, None, :2] + shift, torch.full((len(found), 4, 1), 2.0)], dim=2)
        targets.append(target)
    size = torch.tensor(sizes)
    return {"image": images, "size": size, "original_size": 2 * size, "target": targets}


def without_objects(target: dict[str, Any]) -> dict[str, Any]:
    return {key: value[:0] for key, value in target.items()}


# -------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("name", DESIGNS)
def test_losses_start_as_theory_says_and_reach_every_parameter(name: str) -> None:
    network = build(name, **DESIGNS[name]).train()
    losses = network(batch_of(network))
    classes = [losses[key].item() for key in losses if key.startswith("loss_cls")]
    assert len(classes) == (3 if name.startswith("cascade") else 1)
    for value in classes:
        assert value == pytest.approx(math.log(network.num_classes + 1), abs=0.2)
    assert losses["loss_rpn_cls"].item() == pytest.approx(math.log(2), abs=0.1)
    if "loss_mask" in losses:
        assert losses["loss_mask"].item() == pytest.approx(math.log(2), abs=0.02)
    if "loss_keypoint" in losses:
        assert losses["loss_keypoint"].item() > math.log(56 * 56) - 0.5  # no map is better than chance
    sum(losses.values()).backward()
    reached = {key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    frozen = {key for key, p in network.named_parameters() if not p.requires_grad}
    assert reached == {key for key, _ in network.named_parameters()} - frozen
    assert bool(frozen) == (not name.endswith("lsj"))
    assert all("conv1" in key or "layer1" in key for key in frozen)


@pytest.mark.parametrize("name", DESIGNS)
def test_detections_are_in_the_pixels_of_the_file(name: str) -> None:
    network = build(name, **DESIGNS[name], roi={"score_threshold": 0.0}).eval()
    batch = {key: value for key, value in batch_of(network).items() if key != "target"}
    with torch.no_grad():
        found = network(batch)
    for detection, (height, width) in zip(found, ((128, 192), (112, 144)), strict=True):
        count = len(detection["boxes"])
        assert 0 < count <= 5
        assert detection["scores"].tolist() == sorted(detection["scores"].tolist(), reverse=True)
        assert (detection["boxes"] >= 0).all()
        assert (detection["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert detection["labels"].max() < network.num_classes
        if network.roi_heads.mask_head is not None:
            assert detection["masks"].shape == (count, height, width)
            assert detection["masks"].dtype == torch.bool
        if network.roi_heads.keypoint_head is not None:
            assert detection["keypoints"].shape == (count, 4, 3)


def test_images_without_objects_or_detections() -> None:
    network = build().train()
    batch = batch_of(network)
    batch["target"][1] = without_objects(batch["target"][1])
    assert all(loss.isfinite() for loss in network(batch).values())
    batch["target"][0] = without_objects(batch["target"][0])
    losses = network(batch)
    assert losses["loss_mask"].item() == losses["loss_box_reg"].item() == 0
    sum(losses.values()).backward()  # every process keeps its part of the graph
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    network.roi_heads.config = mask_rcnn.RoIConfig(levels=network.roi_heads.levels, score_threshold=2.0)
    with torch.no_grad():
        found = network.eval()(batch_of(network))
    assert [len(detection["boxes"]) for detection in found] == [0, 0]
    assert found[0]["masks"].shape == (0, 128, 192)


def test_polygons_and_bit_masks_ask_for_almost_the_same() -> None:
    network = build().train()
    batch, noise = batch_of(network), torch.rand(5000, generator=torch.Generator().manual_seed(3))
    nn.init.normal_(network.roi_heads.mask_head.predictor.weight, std=0.5)
    by_mask = network(batch, noise)["loss_mask"].item()
    for target in batch["target"]:
        del target["masks"]
        corners = [[0, 1, 2, 1, 2, 3, 0, 3]]
        target["polygons"] = [[box.double().numpy()[corner] for corner in corners] for box in target["boxes"]]
    assert network(batch, noise)["loss_mask"].item() == pytest.approx(by_mask, rel=0.02)


def test_half_precision_keeps_boxes_in_float32() -> None:
    network = build().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(batch_of(network))
        found = network.eval().detect(batch_of(network))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found[0]["boxes"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "fnp"}, "did you mean 'fpn'"),
        ({"resnet": {"dept": 18}}, "unknown option of ResNetConfig 'dept'; did you mean 'depth'"),
        ({"resnet": {"depth": 49}}, "unknown ResNet depth"),
        ({"fpn": {"inputs": ("c2", "c6")}}, "unknown ResNet map 'c6'"),
        ({"box": {"cascade_ious": (0.5, 0.6), "cascade_weights": ((1.0,) * 4,) * 2}}, "class-agnostic"),
        ({"box": {"cascade_ious": (0.5,), "class_agnostic": True}}, "as many box.cascade_weights"),
        ({"design": "c4", "keypoint": {}}, "no keypoint head"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        MaskRCNN(**{**TINY, **options})


# -------------------------------------------------------------------------------------------------------------- weights


def test_official_names_become_ours_and_constants_are_checked() -> None:
    """The names of whole networks are tried by the parity cases."""
    state = {"proposal_generator.rpn_head.conv.weight": torch.zeros(1), "roi_heads.box_head.fc1.bias": torch.ones(1)}
    sizes, ratios = (32.0, 64.0, 128.0, 256.0, 512.0), (0.5, 1.0, 2.0)
    place = "proposal_generator.anchor_generator.cell_anchors."
    anchors = {f"{place}{k}": cell_anchors((size,), ratios, torch.device("cpu")) for k, size in enumerate(sizes)}
    constants = {"pixel_mean": torch.tensor([103.53, 116.28, 123.675])[:, None, None], "pixel_std": torch.ones(3, 1, 1)}
    assert set(convert_official({**state, **anchors, **constants})) == {
        "rpn.head.conv.0.weight",
        "roi_heads.box_heads.0.fc1.bias",
    }
    for wrong, message in (
        ({"pixel_mean": torch.tensor([123.675, 116.28, 103.53])}, "pixel_mean"),
        ({key: value[:1] for key, value in anchors.items()}, "anchors"),
        ({"roi_heads.box_head.fc9.extra": torch.zeros(1)}, "unknown key 'roi_heads.box_head.fc9.extra'"),
    ):
        with pytest.raises(ZooError, match=message):
            convert_official({**state, **wrong})
    own = build().state_dict()
    assert convert_official(own).keys() == own.keys()  # ours stay ours
    with pytest.raises(ZooError, match="1 unknown keys, such as 'stray'"):
        convert_official({**own, "stray": torch.zeros(1)})


def test_a_detector_of_other_classes_keeps_its_last_layers(tmp_path: Path) -> None:
    source, file = build(), tmp_path / "detector.pth"
    torch.save({"model": source.state_dict()}, file)
    other = build(num_classes=5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    load_weights(other, file)
    own, given = other.state_dict(), source.state_dict()
    fresh = {key for key in own if own[key].shape != given[key].shape}
    layers = ("box_predictors.0.cls_score", "box_predictors.0.bbox_pred", "mask_head.predictor")
    assert fresh == {f"roi_heads.{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    assert all(torch.equal(own[key], before[key] if key in fresh else given[key]) for key in own)
    with pytest.raises(ZooError, match="does not fit the model"):
        load_weights(build(fpn={"channels": 16}), file)


@pytest.mark.parametrize("design", ["mask_rcnn_r50_fpn", "mask_rcnn_r50_c4"])
def test_a_classifier_fills_the_trunk(design: str, tmp_path: Path) -> None:
    state = ResNetBackbone(ResNetConfig(**{**TINY["resnet"], **DEEP})).state_dict()
    assert set(convert_trunk({**state, "stem.fc.weight": torch.zeros(1)})) == set(state)
    torch.save(state, tmp_path / "trunk.pth")
    network = build(design, **DESIGNS[design] | {"resnet": DEEP})
    load_weights(network, tmp_path / "trunk.pth")
    own = network.state_dict()
    for key, value in state.items():
        home = f"backbone.{'' if design.endswith('c4') else 'bottom_up.'}{key}"
        if design.endswith("c4"):  # the fifth stage is the head of the regions
            home = home.replace("backbone.layer4", "roi_heads.res5")
        assert torch.equal(own[home], value), key
    with pytest.raises(ZooError, match="does not fit the model"):
        load_weights(build(design, **DESIGNS[design]), tmp_path / "trunk.pth")


def test_caffe2_names_and_affine_norms() -> None:
    ones, small = torch.ones(8), torch.ones(8, 8, 1, 1)
    state = {"conv1_w": torch.ones(8, 3, 7, 7), "res_conv1_bn_s": ones, "res_conv1_bn_b": 0 * ones, "pred_w": ones}
    state |= {"res2_0_branch1_w": small, "res2_0_branch1_bn_s": ones, "res2_0_branch1_bn_b": ones}
    state |= {"res2_0_branch2a_w": small, "res2_0_branch2a_w_momentum": ones}
    converted = convert_trunk(state)
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.1.bias", "layer1.0.conv1.weight"} <= set(converted)
    assert len(converted) == 11
    norm = FrozenBatchNorm2d(8)
    norm.load_state_dict({key.removeprefix("bn1."): v for key, v in converted.items() if key.startswith("bn1.")})
    x = torch.randn(1, 8, 2, 2)
    torch.testing.assert_close(norm(x), x)  # an affine layer, whatever eps
    group = convert_trunk({"conv1_gn_s": torch.ones(8), "res2_0_branch2a_gn_b": torch.ones(8)})
    assert set(group) == {"bn1.weight", "layer1.0.bn1.bias"}  # GroupNorm has no statistics
    with pytest.raises(ZooError, match="unknown key 'res9"):
        convert_trunk({"res9_0_branch1_w": torch.ones(1)})


# ----------------------------------------------------------------------------------------------------------------- task


SHORT = {
    "data.batch_size": 2, "data.eval_batch_size": 2, "data.num_workers": 0, "model.optim.global_batch": None,
    "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 1, "trainer.max_epochs": 1, "trainer.logger": False,
    "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False, "trainer.num_sanity_val_steps": 0,
}  # fmt: skip


def test_the_task_bounds_each_gradient_and_is_made_anew_from_a_checkpoint(tmp_path: Path) -> None:
    options = {"model.box.pool.pooling": "pool", "model.mask.convs": 1, "model.clip_each": 0.01}
    bounded: list[float] = []
    task, data, trainer = zoo.load_recipe("mask_rcnn/pocket", {**SHORT, **options})

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            bounded.extend(float(p.grad.norm()) for p in module.parameters() if p.grad is not None)

    trainer.callbacks = [Watch()]  # type: ignore[attr-defined]
    trainer.fit(task, data)
    assert max(bounded) == pytest.approx(0.01, rel=1e-3)
    assert {"val/box/AP", "val/mask/AP50", "train/loss_mask", "train/loss_rpn_loc"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = MaskRCNNDetection.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert again.network.options == task.network.options
    assert again.network.roi_heads.box_pooler.config.pooling == "pool"
    assert (len(again.network.roi_heads.mask_head), again.clip_each) == (4, 0.01)


def test_the_network_s_options_are_the_task_s() -> None:
    for key, said in (("box.pool.poling", "box.pool.pooling'"), ("mask.conv", "mask.convs'"), ("model", "design")):
        with pytest.raises(ZooError, match=f"unknown key 'model.{key}' of .*{said}"):
            zoo.load_recipe("mask_rcnn/pocket", {**SHORT, f"model.{key}": 1})


def test_overrides_of_a_published_size_change_only_what_they_name() -> None:
    with torch.device("meta"):
        network = mask_rcnn.keypoint_rcnn_r50_fpn(rpn={"samples": 8}, box={"fc_channels": 64})
        c4 = mask_rcnn.mask_rcnn_r50_c4()
        task = MaskRCNNDetection(mask=None, keypoint={"keypoints": 5}, oks_sigmas=[0.1] * 5)
    assert (network.rpn.config.samples, network.rpn.config.post_nms) == (8, (1500, 1000))
    assert (network.roi_heads.box.beta, network.num_classes) == (0.5, 1)
    assert network.iou_types == task.network.iou_types == ("bbox", "keypoints")
    assert (network.size_divisibility, c4.size_divisibility) == (32, 1)
