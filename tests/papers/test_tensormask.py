"""TensorMask: whose window is an object's, representations of masks, losses at the start, its task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.data.detection import ResizeShortestEdge
from zoo.detection.tensormask import (
    TensorMask,
    TensorMaskDetection,
    assign_windows,
    convert_official,
    given_windows,
    load_weights,
)
from zoo.errors import ZooError
from zoo.nn.detection import ResNetBackbone, ResNetConfig
from zoo.training.measures import GivenBoxMasks

TINY: dict[str, Any] = {
    "num_classes": 3,
    "resnet": {"depth": 18, "stem_channels": 8, "channels": 8},
    "fpn": {"inputs": ("c2", "c3", "c4"), "channels": 8, "fuse": "avg"},
    "top": False,
    "windows": {"levels": ("p2", "p3", "p4"), "sizes": ((12, 20), (24, 40), (48, 80))},
    "head": {"convs": 1, "cls_channels": 8, "box_channels": 8, "mask_channels": 8},
    "inference": {"candidates": 60, "detections": 5, "score_threshold": 0.0},
}
FORMS: dict[str, dict[str, Any]] = {
    "bipyramid": {},
    "aligned": {"bipyramid": False},
    "natural": {"bipyramid": False, "aligned": False},
    "aligned_upscaled": {"bipyramid": False, "upscale": 1.5},
    "natural_upscaled": {"bipyramid": False, "aligned": False, "upscale": 1.5, "interpolation": "nearest"},
    "boxes": {"masks": False},
}


def build(form: str = "bipyramid", **options: Any) -> TensorMask:
    torch.manual_seed(0)
    network = TensorMask(**{**TINY, "head": {**TINY["head"], **FORMS[form]}, **options})
    for name, buffer in network.named_buffers():  # frozen BatchNorm of random weights normalises nothing
        if name.endswith("bn2.weight"):
            buffer.fill_(0.3)
    return network


def batch_of() -> dict[str, Any]:
    """Two images, the second smaller than the padding; its only object suits windows of the last level."""
    draw = torch.Generator().manual_seed(1)
    images, sizes = torch.randn(2, 3, 64, 96, generator=draw), [(64, 96), (56, 72)]
    images[1, :, 56:] = images[1, :, :, 72:] = 0
    targets = []
    for boxes, (height, width) in zip(([[4.0, 6, 20, 24], [50, 8, 60, 16]], [[16.0, 14, 48, 50]]), sizes, strict=True):
        found = torch.tensor(boxes)
        x1, y1, x2, y2 = found.T[..., None, None]
        x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
        masks = (x > x1) & (x < x2) & (y > y1) & (y < y2)
        targets.append({"boxes": found, "labels": torch.arange(len(found)), "masks": masks})
    size = torch.tensor(sizes)
    return {"image": images, "size": size, "original_size": 2 * size, "target": targets}


# ------------------------------------------------------------------------------------------------------------ functions


def test_whose_window_is_an_object_s() -> None:
    windows = torch.tensor([[0.0, 0, 40, 40], [4, 0, 44, 40], [8, 0, 48, 40], [-10, -10, 50, 50], [-60, -60, 100, 100]])
    units = torch.tensor([4.0, 4, 4, 4, 16])
    objects = torch.tensor([[6.0, 6, 34, 34]])
    # centre at 20: the third is 2 units off, the last too large for an object of 28 (144 > 2 * 28)
    index, labels = assign_windows(objects, windows, units, 16)
    assert labels.tolist() == [1, 1, 0, 1, 0]
    assert assign_windows(objects, windows, units, 144)[1].tolist() == [1, 1, 0, 1, 1]  # small objects may have it
    assert assign_windows(objects, windows, units, 16, distance=2)[1].tolist()[2] == 0  # 8 does not contain 6
    two = torch.tensor([[6.0, 6, 34, 34], [2.0, 8, 38, 32]])
    index, labels = assign_windows(two, windows, units, 16)
    assert labels.tolist() == [0, 1, 0, 0, 0]  # windows of both are nobody's; the second alone leaves 2..38
    assert index[1] == 0
    assert assign_windows(two, windows, units, 16, unique=False)[1].tolist() == [-1, 1, 0, -1, 0]
    assert assign_windows(two[:0], windows, units, 16)[1].tolist() == [0] * 5
    assert given_windows(two, windows).tolist() == [0, 0]
    assert given_windows(torch.tensor([[-99.0, 0, 99, 20]]), windows).tolist() == [4]


# -------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("form", FORMS)
def test_losses_start_as_theory_says_and_reach_every_parameter(form: str) -> None:
    network, batch = build(form).train(), batch_of()
    losses = network(batch)
    features = network.features(batch["image"])
    image, index, _ = network.assign(network.anchors(features), batch["target"])
    cells = network.cells(features, image, index)
    assert {(0, 0), (0, 1), (1, 1)} <= set(zip(cells.level.tolist(), cells.window.tolist(), strict=True))
    windows = torch.cat(network.anchors(features))
    # FL* of all pairs at the prior, of which each positive window has one
    alpha, gamma, logit = 0.3, 3.0, -math.log(99)
    negative = (1 - alpha) * math.log1p(math.exp(gamma * logit)) / gamma
    positive = alpha * math.log1p(math.exp(-gamma * logit)) / gamma
    wanted = (2 * len(windows) * network.num_classes * negative) / len(index) + positive - negative
    assert losses["loss_cls"].item() == pytest.approx(wanted, rel=0.05)
    if form != "boxes":
        # 2 log 2, but for the half more that an object's pixels count, and for pixels off the map
        assert 1.2 < losses["loss_mask"].item() < 3 * math.log(2) + 0.5
    sum(losses.values()).backward()
    reached = {key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    frozen = {key for key, p in network.named_parameters() if not p.requires_grad}
    assert reached == {key for key, _ in network.named_parameters()} - frozen


@pytest.mark.parametrize("form", FORMS)
def test_detections_are_in_the_pixels_of_the_file(form: str) -> None:
    network = build(form).eval()
    with torch.no_grad():
        found = network({key: value for key, value in batch_of().items() if key != "target"})
    for detection, (height, width) in zip(found, ((128, 192), (112, 144)), strict=True):
        count = len(detection["boxes"])
        assert 0 < count <= 5
        assert detection["scores"].tolist() == sorted(detection["scores"].tolist(), reverse=True)
        assert (detection["boxes"] <= torch.tensor([width, height, width, height])).all()
        if form != "boxes":
            assert detection["masks"].shape == (count, height, width)
            assert detection["masks"].dtype == torch.bool


@pytest.mark.parametrize("form", [form for form in FORMS if form != "boxes"])
def test_masks_of_some_windows_are_those_of_the_whole_tensors(form: str) -> None:
    network = build(form).double()
    for layer in network.head.mask_pred.values():
        nn.init.normal_(layer.weight)
    with torch.no_grad():
        features = network.features(batch_of()["image"].double())
        whole = network.head.natural_masks(features)
        count = sum(len(x) for x in network.anchors(features))
        index = torch.arange(0, count, 7)
        cells = network.cells(features, torch.ones_like(index), index)
        maps = network.head.mask_maps(features, range(3))
        for level, window, _, where in cells.groups():
            drawn = network.head.masks(maps[level], level, window, where)
            tensor, size = whole[level][window], network.head.size(level, window)
            assert tensor.shape == (2, size**2, *features[level].shape[-2:])
            wanted = tensor[where[:, 0], :, where[:, 1], where[:, 2]]
            torch.testing.assert_close(drawn, wanted.view_as(drawn))


def test_images_without_objects() -> None:
    network, batch = build().train(), batch_of()
    batch["target"][1] = {key: value[:0] for key, value in batch["target"][1].items()}
    assert all(loss.isfinite() for loss in network(batch).values())
    batch["target"][0] = {key: value[:0] for key, value in batch["target"][0].items()}
    losses = network(batch)
    assert losses["loss_mask"].item() == losses["loss_box_reg"].item() == 0
    sum(losses.values()).backward()  # every process keeps its part of the graph
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    nothing = build(inference={"score_threshold": 1.0}).eval()
    with torch.no_grad():
        assert nothing(batch_of())[0]["masks"].shape == (0, 128, 192)


def test_polygons_and_bit_masks_ask_for_almost_the_same() -> None:
    network, batch = build().train(), batch_of()
    by_mask = network(batch)["loss_mask"].item()
    for target in batch["target"]:
        del target["masks"]
        target["polygons"] = [[box.double().numpy()[[0, 1, 2, 1, 2, 3, 0, 3]]] for box in target["boxes"]]
    assert network(batch)["loss_mask"].item() == pytest.approx(by_mask, rel=0.15)  # masks of 3 to 10 pixels a side


def test_half_precision_keeps_boxes_and_losses_in_float32() -> None:
    network, batch = build().train(), batch_of()
    whole = network(batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(batch)
        found = network.eval().detect(batch)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert losses["loss_cls"].item() == pytest.approx(whole["loss_cls"].item(), rel=0.05)
    assert found[0]["boxes"].dtype == torch.float32


def test_masks_of_given_boxes_are_measured() -> None:
    network, batch = build().eval(), batch_of()
    with torch.no_grad():
        found = network.draw_given(batch, [target["boxes"] for target in batch["target"]])
    assert [len(one["mask_probs"]) for one in found] == [2, 1]
    assert [len(mask) for one in found for mask in one["mask_probs"]] == [20 // 4, 12 // 4, 40 // 8 * 2]
    with pytest.raises(ZooError, match="no mask head"):
        GivenBoxMasks().on_validation_batch_end(None, _Task(build("boxes")), None, batch, 0)  # type: ignore[arg-type]


class _Task:
    def __init__(self, network: nn.Module) -> None:
        self.network, self.device = network, torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": {"aligned": False}}, "bipyramid has aligned masks"),
        ({"head": {"upscale": 3.0}}, "no further upscaling"),
        ({"head": {"prior": 2.0}}, "prior"),
        ({"loss": {"alpha": -1.0}}, "alpha null or"),
        ({"inference": {"clip": True}}, "other detectors"),
        ({"windows": {"levels": ("p2", "p8"), "sizes": ((12,), (24,))}}, "no level p8"),
        ({"windows": {"levels": ("p2", "p3"), "sizes": ((12,),)}}, "as many windows for each of the 2 levels"),
        ({"windows": {"levels": ("p2",), "sizes": ((12, 13),)}}, "masks of one size"),
        ({"head": {"mask_chanels": 3}}, "did you mean 'mask_channels'"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        TensorMask(**{**TINY, **options})


# ---------------------------------------------------------------------------------------------------- weights, the task


def test_official_names_become_ours() -> None:
    """The names of whole networks are tried by the parity cases."""
    names = {
        "head.mask_subnet.6.weight": "head.mask_subnet.convs.3.weight",
        "head.mask_pred_09.bias": "head.mask_pred.9.bias",
        "head.mask_fuse.0.bias": "head.mask_fuse.bias",
    }
    assert list(convert_official({key: torch.zeros(1) for key in names})) == list(names.values())
    for wrong in ("head.mask_subnet.5.weight", "head.align2nat_00.scale"):
        with pytest.raises(ZooError, match=f"unknown key '{wrong}'"):
            convert_official({wrong: torch.zeros(1)})
    own = build().state_dict()
    assert convert_official(own).keys() == own.keys()


def test_networks_are_filled_from_others(tmp_path: Path) -> None:
    source, other = build(), build(num_classes=5)
    torch.save({"model": source.state_dict()}, tmp_path / "detector.pth")
    load_weights(other, tmp_path / "detector.pth")
    own, given = other.state_dict(), source.state_dict()
    assert {key for key in own if own[key].shape != given[key].shape} == {
        "head.cls_score.weight",
        "head.cls_score.bias",
    }
    assert all(torch.equal(own[key], given[key]) for key in own if "cls_score" not in key)
    trunk = ResNetBackbone(ResNetConfig(**TINY["resnet"]), ("c4",)).state_dict()
    torch.save(trunk, tmp_path / "trunk.pth")
    load_weights(other, tmp_path / "trunk.pth")
    assert all(torch.equal(other.state_dict()[f"backbone.bottom_up.{key}"], value) for key, value in trunk.items())


def test_the_task_is_made_anew_from_its_options() -> None:
    task, _, _ = zoo.load_recipe("tensormask/pocket", {"model.head.bipyramid": False, "model.head.upscale": 1.5})
    again = TensorMaskDetection(**task.network.options)
    assert again.network.options == task.network.options
    assert again.network.head.mask_pred["5"].out_channels == 9
    assert again.val_metric.iou_types == ("bbox", "segm")


def test_6x_draws_whole_numbers_of_a_range() -> None:
    assert ResizeShortestEdge([640, 643], between=True).sizes == [640, 641, 642, 643]
