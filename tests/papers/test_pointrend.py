"""PointRend: its points, its heads, adaptive subdivision, its official weights, its tasks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.detection import pointrend
from zoo.detection.pointrend import (
    PointHeadConfig,
    PointMaskConfig,
    PointRend,
    PointRendDetection,
    PointRendMaskHead,
    PointRendSegmentation,
    PointRendSemantic,
    convert_official,
    load_weights,
)
from zoo.errors import ZooError
from zoo.nn.detection.roi_heads import MaskHead, MaskHeadConfig
from zoo.ops.points import (
    PointNoise,
    grid_points,
)

HEAD = {"channels": 8, "train_points": 16, "steps": 2, "points": 64}
TINY: dict[str, Any] = {
    "num_classes": 3,
    "resnet": {"depth": 18, "stem_channels": 8, "channels": 8},
    "fpn": {"channels": 8},
    "rpn": {"sizes": ((8,), (16,), (32,), (48,), (64,)), "pre_nms": (60, 60), "post_nms": (40, 20), "samples": 32},
    "roi": {"samples": 32, "detections": 5, "score_threshold": 0.0},
    "box": {"fc_channels": 16},
    "point": {"channels": 8, "fc_channels": 16, "head": HEAD},
}
STREETS: dict[str, Any] = {
    "resnet": TINY["resnet"],
    "fpn": TINY["fpn"],
    "head": {"classes": 4, "channels": 32},
    "point": {**HEAD, "coarse_each_layer": False},
}


def build(**options: Any) -> PointRend:
    torch.manual_seed(0)
    return PointRend(**{**TINY, **options})


def batch() -> dict[str, Any]:
    """Two images, the second smaller than the padding, with objects and label maps."""
    draw, sizes = torch.Generator().manual_seed(1), [(64, 96), (56, 72)]
    images = torch.randn(2, 3, 64, 96, generator=draw)
    images[1, :, 56:] = images[1, :, :, 72:] = 0
    targets = []
    for boxes, (height, width) in zip(([[4.0, 6, 40, 50], [50, 8, 90, 40]], [[10.0, 10, 60, 50]]), sizes, strict=True):
        found = torch.tensor(boxes)
        x1, y1, x2, y2 = found.T[..., None, None]
        x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
        semantic = torch.randint(4, (height, width), generator=draw).to(torch.uint8)
        semantic[:4] = 255
        masks = (x > x1) & (x < x2) & (y > y1) & (y < y2)
        targets.append({"boxes": found, "labels": torch.arange(len(found)), "masks": masks, "semantic": semantic})
    size = torch.tensor(sizes)
    return {"image": images, "size": size, "original_size": 2 * size, "target": targets}


def without_objects(target: dict[str, Any]) -> dict[str, Any]:
    return {key: value[:0] for key, value in target.items()}


# ---------------------------------------------------------------------------------------------------------------- heads


def test_subdivision_starts_where_every_point_is_predicted_anew() -> None:
    """The shortcut's mask is that of the literal steps; without enough points it is not taken."""
    network = build().eval()
    head: Any = network.roi_heads.mask_head
    nn.init.normal_(head.point_head.predictor.weight, std=1.0)
    image = batch()["image"]
    rois, labels = torch.tensor([[0, 4.0, 6, 40, 50], [1, 10, 10, 60, 50]]), torch.tensor([0, 2])
    with torch.no_grad():
        maps = network.backbone(image)
        coarse = head.coarse(maps, rois)

        def at(points: Tensor) -> Tensor:
            return head.at(maps, rois, coarse, points)[torch.arange(2), labels]

        whole = at(grid_points(28, 28, coarse).expand(2, -1, -1)).view(2, 28, 28).sigmoid()
        object.__setattr__(head.config.head, "points", 784)
        torch.testing.assert_close(head.probabilities(maps, rois, labels), whole)
        object.__setattr__(head.config.head, "points", 400)  # 14x14 at once, then 400 of 28x28
        part = head.probabilities(maps, rois, labels)
    same = (part - whole).abs() < 1e-6
    assert part.shape == whole.shape
    assert 400 <= int(same[0].sum()) < 784


def test_the_mask_head_costs_what_the_paper_says() -> None:
    """Table 2: 0.9 G multiply-adds for a mask of 224x224, 34 G for four convolutions at that size."""
    with torch.device("meta"):
        backbone: Any = pointrend.pointrend_rcnn_r50_fpn().backbone
        head = PointRendMaskHead(backbone, 80, PointMaskConfig())
        convs = MaskHead(256, 80, MaskHeadConfig())
        points, count = head.point_head, 28 * 28 + 3 * 784
        with FlopCounterMode(display=False) as rendered:
            head.coarse_head(torch.empty(1, 256, 14, 14))
            points(torch.empty(1, 256, count), torch.empty(1, 80, count))
        with FlopCounterMode(display=False) as dense:
            convs(torch.empty(1, 256, 112, 112))
    assert rendered.get_total_flops() / 2e9 == pytest.approx(0.9, abs=0.05)
    assert dense.get_total_flops() / 2e9 == pytest.approx(34, abs=0.5)


def test_losses_start_as_theory_says_and_reach_every_parameter() -> None:
    network = build().train()
    losses = network(batch())
    for name in ("loss_mask", "loss_mask_point"):
        assert losses[name].item() == pytest.approx(math.log(2), abs=0.02)
    assert losses["loss_cls"].item() == pytest.approx(math.log(4), abs=0.2)
    sum(losses.values()).backward()
    reached = {key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {key for key, p in network.named_parameters() if p.requires_grad}
    bare = build(point={**TINY["point"], "head": None}).train()
    assert "loss_mask_point" not in bare(batch())
    given, grid = batch(), build(point={**TINY["point"], "head": {**HEAD, "regular": True}}).train()
    assert grid(given)["loss_mask_point"].isfinite()
    given["target"][0]["polygons"] = []
    with pytest.raises(ZooError, match="bit masks"):
        grid(given)


def test_images_without_objects_keep_every_parameter_in_the_graph() -> None:
    network, empty = build().train(), batch()
    empty["target"] = [without_objects(target) for target in empty["target"]]
    losses = network(empty)
    assert losses["loss_mask"].item() == losses["loss_mask_point"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_detections_have_masks_of_the_rendered_size_in_the_pixels_of_the_file() -> None:
    network = build().eval()
    assert network.iou_types == ("bbox", "segm")
    with torch.no_grad():
        raw, final = network.detect(batch()), network(batch())
    assert {x["mask_probs"].shape[1:] for x in raw} == {(28, 28)}
    assert [x["masks"].shape[1:] for x in final] == [(128, 192), (112, 144)]
    heads: Any = network.roi_heads
    heads.config = replace(heads.config, score_threshold=1.0)
    with torch.no_grad():
        assert [x["masks"].shape for x in network(batch())] == [(0, 128, 192), (0, 112, 144)]  # nothing found
    network = build().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert network.detect(batch())[0]["mask_probs"].dtype == torch.float32


def test_null_point_head_is_mask_r_cnn() -> None:
    standard = build(point=None, mask={"convs": 1, "channels": 8})
    assert isinstance(standard.roi_heads.mask_head, MaskHead)
    assert standard.roi_heads.box.train_on_predictions
    assert "loss_mask_point" not in standard.train()(batch())


def test_label_maps_are_refined_and_pixels_without_label_do_not_count() -> None:
    torch.manual_seed(0)
    network, given = PointRendSemantic(**STREETS).train(), batch()
    losses = network(given)
    assert losses["loss_sem_seg_point"].item() == pytest.approx(math.log(4), abs=0.05)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    for target in given["target"]:
        target["semantic"] = torch.full_like(target["semantic"], 255)
    assert all(loss.item() == 0 for loss in network(given).values())
    found = network.eval()(given)
    assert [x["semantic"].shape for x in found] == [(128, 192), (112, 144)]
    branch = PointRendSemantic(**{**STREETS, "point": None})
    assert set(branch.train()(batch())) == {"loss_sem_seg"}
    assert branch.eval()(batch())[1]["semantic"].shape == (112, 144)
    two = PointRendSemantic(**{**STREETS, "point": {**STREETS["point"], "levels": ("p2", "p3")}}).eval()
    assert two.segment(given)[0]["semantic"].dtype == torch.uint8  # levels side by side
    with pytest.raises(ZooError, match="semantic"):
        network.train()({**given, "target": [{}, {}]})


def test_labels_end_below_the_one_that_does_not_count() -> None:
    with pytest.raises(ZooError, match="1 to 255 classes"):
        PointRendSemantic(**{**STREETS, "head": {"classes": 256}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"point": {"levels": ("p6",)}}, "level of the mask head 'p6'"),
        ({"point": {"heads": {}}}, "unknown option of PointMaskConfig 'heads'"),
        ({"point": {"head": {"oversample": 0.5}}}, "oversample must be 1 or more"),
        ({"point": {"head": {"regular": True, "train_points": 20}}}, "square number"),
        ({"point": {"head": {"steps": -1}}}, "steps not negative"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        build(**options)


# -------------------------------------------------------------------------------------------------------------- weights


def test_names_of_every_generation_become_ours() -> None:
    heads = ("mask_head.coarse_head.fc1", "mask_head.coarse_head.coarse_mask_fc1", "mask_coarse_head.coarse_mask_fc1")
    for name in heads:
        assert set(convert_official({f"roi_heads.{name}.weight": torch.zeros(1)})) == {
            "roi_heads.mask_head.coarse_head.fc1.weight"
        }
    assert set(convert_official({"roi_heads.mask_point_head.predictor.bias": torch.zeros(1)})) == {
        "roi_heads.mask_head.point_head.predictor.bias"
    }
    with pytest.raises(ZooError, match="unknown key 'roi_heads"):
        convert_official({"roi_heads.mask_head.point_head.fc1.extra": torch.zeros(1)})
    for own in (build().state_dict(), PointRendSemantic(**STREETS).state_dict()):
        assert convert_official(own).keys() == own.keys()


def test_another_number_of_classes_keeps_the_layers_that_depend_on_it(tmp_path: Path) -> None:
    source = build()
    torch.save({"model": source.state_dict()}, tmp_path / "detector.pth")
    other = build(num_classes=5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    load_weights(other, tmp_path / "detector.pth")
    own, given = other.state_dict(), source.state_dict()
    fresh = {key for key in own if own[key].shape != given[key].shape}
    assert {key.split(".")[2] for key in fresh if "mask_head" in key} == {"coarse_head", "point_head"}
    assert all(torch.equal(own[key], before[key] if key in fresh else given[key]) for key in own)


# ----------------------------------------------------------------------------------------------------------------- task


def test_tasks_take_numbers_from_the_batch_and_metrics_by_name() -> None:
    given = batch()
    given |= {"noise": torch.rand(9000), "point_noise": PointNoise(torch.rand(9000), torch.rand(9000))}
    instances, pixels = PointRendDetection(metric="lvis", **TINY), PointRendSegmentation(**STREETS)
    for task in (instances, pixels):
        task.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
        first, second = (task.training_step(given, 0).item() for _ in range(2))
        assert first == second
        given["point_noise"] = PointNoise(torch.rand(9000), torch.rand(9000))
        assert task.training_step(given, 0).item() != first
    assert type(instances.val_metric).__name__ == "LvisAP"
    pixels.network.eval()
    pixels._evaluate({**given, "original_size": given["size"]}, pixels.val_semantic)
    assert 0 < pixels.val_semantic.compute()["pACC"] < 100
    assert PointHeadConfig().train_points == 196
