"""Mask R-CNN: boxes, masks, keypoints as functions; the network's invariants, gradients and weights; its task."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.speed import run
from tests.papers.test_ddp import _run
from zoo.detection import mask_rcnn
from zoo.detection.mask_rcnn import MaskRCNN, MaskRCNNDetection, convert_official, convert_trunk, load_weights
from zoo.errors import ZooError
from zoo.nn.detection.backbone import ResNetBackbone, ResNetConfig, conv_norm
from zoo.nn.detection.roi_heads import PoolConfig, RoIPooler, rois_of
from zoo.nn.detection.rpn import AnchorGenerator
from zoo.ops.boxes import (
    MAX_LOG_SCALE,
    box_loss,
    cell_anchors,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    match,
    nonempty,
    pairwise_iou,
    permutation,
    pyramid_levels,
    sample_labels,
)
from zoo.ops.keypoints import heatmaps_to_keypoints, keypoint_cells
from zoo.ops.masks import crop_masks, crop_polygons, paste_masks
from zoo.training import Optim

TINY: dict[str, Any] = {
    "num_classes": 3,
    "resnet": {"depth": 18, "stem_channels": 8, "channels": 8, "freeze": 2},
    "fpn": {"channels": 8},
    "rpn": {"sizes": ((8,), (16,), (32,), (48,), (64,)), "pre_nms": (60, 60), "post_nms": (40, 20), "samples": 32},
    "roi": {"samples": 32, "detections": 5},
    "box": {"fc_channels": 16},
    "mask": {"convs": 1, "channels": 8},
}
ONE_LEVEL = {**TINY["rpn"], "sizes": ((8, 16, 32),)}
CASCADE = {
    "class_agnostic": True,
    "cascade_ious": (0.5, 0.6, 0.7),
    "cascade_weights": ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
}
DESIGNS: dict[str, dict[str, Any]] = {
    "fpn": {},
    "c4": {"design": "c4", "rpn": ONE_LEVEL, "box": {"pool": {"size": 8}}, "mask": {"convs": 0, "channels": 8}},
    "dc5": {"design": "dc5", "rpn": ONE_LEVEL, "resnet": {**TINY["resnet"], "depth": 50, "width_per_group": 2}},
    "cascade": {"box": {**TINY["box"], **CASCADE}},
    "keypoint": {"num_classes": 1, "mask": None, "keypoint": {"keypoints": 4, "channels": (8,)}},
    "faster": {"mask": None},
    "bn": {
        "resnet": {**TINY["resnet"], "norm": "bn", "freeze": 0},
        "fpn": {"channels": 8, "norm": "bn"},
        "rpn": {**TINY["rpn"], "conv_channels": (-1, -1)},
        "box": {"convs": 2, "conv_channels": 8, "fcs": 1, "fc_channels": 16, "norm": "bn"},
        "mask": {"convs": 1, "channels": 8, "norm": "bn"},
    },
}


def build(**options: Any) -> MaskRCNN:
    torch.manual_seed(0)
    network = MaskRCNN(**{**TINY, **options})
    for name, buffer in network.named_buffers():  # frozen BatchNorm of random weights normalises nothing
        if name.endswith(("bn2.weight", "bn3.weight")):
            buffer.fill_(0.3)
    return network


def batch_of(network: MaskRCNN, empty: bool = False) -> dict[str, Any]:
    """Two images, the second smaller than the padding, with objects, masks and keypoints."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 64, 96, generator=draw)
    images[1, :, 56:] = images[1, :, :, 72:] = 0
    boxes = [torch.tensor([[4.0, 6, 40, 50], [50, 8, 90, 40]]), torch.tensor([[10.0, 10, 60, 50]])]
    targets = []
    for found, (height, width) in zip(boxes, ((64, 96), (56, 72)), strict=True):
        if empty and len(found) == 1:
            found = found[:0]
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        inside = [(x > b[0]) & (x < b[2]) & (y > b[1]) & (y < b[3]) for b in found]
        points = (
            found[:, None, :2] + torch.rand(len(found), 4, 2, generator=draw) * (found[:, 2:] - found[:, :2])[:, None]
        )
        targets.append(
            {
                "boxes": found,
                "labels": torch.arange(len(found)) % network.num_classes,
                "masks": torch.stack(inside) if len(found) else torch.zeros(0, height, width, dtype=torch.bool),
                "keypoints": torch.cat([points, torch.full((len(found), 4, 1), 2.0)], dim=2),
            }
        )
    return {
        "image": images,
        "size": torch.tensor([[64, 96], [56, 72]]),
        "original_size": torch.tensor([[128, 192], [112, 144]]),
        "target": targets,
    }


# ------------------------------------------------------------------------------------------------------------ functions


def random_boxes(count: int, seed: int = 0, side: float = 100.0) -> Tensor:
    corner, size = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([corner * side, corner * side + 1 + size * side], dim=1)


def test_coding_is_its_own_inverse_and_bounded() -> None:
    boxes, anchors, weights = random_boxes(50), random_boxes(50, seed=1), (10.0, 10.0, 5.0, 5.0)
    deltas = encode_boxes(boxes, anchors, weights)
    torch.testing.assert_close(decode_boxes(deltas, anchors, weights), boxes)
    torch.testing.assert_close(encode_boxes(anchors, anchors), torch.zeros(50, 4, dtype=torch.float64))
    huge = decode_boxes(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0, 16, 16]]))
    torch.testing.assert_close((huge[0, 2] - huge[0, 0]).item(), 16 * math.exp(MAX_LOG_SCALE), rtol=1e-4, atol=0)
    assert decode_boxes(torch.zeros(2, 4, dtype=torch.bfloat16), torch.ones(2, 4)).dtype == torch.float32


def test_geometry() -> None:
    boxes = torch.tensor([[-5.0, -5, 10, 10], [0, 0, 200, 300], [20, 20, 20, 30]])
    clipped = clip_boxes(boxes, (100, 150))
    assert clipped.tolist() == [[0, 0, 10, 10], [0, 0, 150, 100], [20, 20, 20, 30]]
    assert nonempty(clipped).tolist() == [True, True, False]
    assert nonempty(clipped, 12).tolist() == [False, True, False]
    iou = pairwise_iou(boxes[:1], torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]))
    torch.testing.assert_close(iou, torch.tensor([[100 / 225, 0.0]]))
    assert not pairwise_iou(torch.zeros(1, 4), torch.zeros(1, 4)).isnan().any()
    sides = torch.tensor([10.0, 111, 112, 223, 224, 448, 5000])
    assert pyramid_levels(torch.stack([0 * sides, 0 * sides, sides, sides], 1), 2, 5).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_anchors_are_exact_and_in_order() -> None:
    made = AnchorGenerator([16], [[32, 64]], [[0.5, 1.0]])([torch.zeros(1, 1, 2, 3)])[0]
    assert made.shape == (2 * 3 * 4, 4)
    torch.testing.assert_close(made[1], torch.tensor([-16.0, -16, 16, 16]))
    width, height = (made[0, 2] - made[0, 0]).item(), (made[0, 3] - made[0, 1]).item()
    assert height / width == pytest.approx(0.5)
    assert height * width == pytest.approx(32**2)
    torch.testing.assert_close(made[4:8] - made[:4], torch.tensor([16.0, 0, 16, 0]).expand(4, 4))  # columns first
    with pytest.raises(ZooError, match="3 levels"):
        AnchorGenerator([4, 8, 16], [[8], [16]], [[1.0]])


def test_matching_keeps_the_best_anchor_of_every_object() -> None:
    iou = torch.tensor([[0.8, 0.5, 0.2, 0.1], [0.1, 0.2, 0.25, 0.25]])
    index, labels = match(iou, (0.3, 0.7), (0, -1, 1))
    assert (index.tolist(), labels.tolist()) == ([0, 0, 1, 1], [1, -1, 0, 0])
    index, labels = match(iou, (0.3, 0.7), (0, -1, 1), low_quality=True)
    assert labels.tolist() == [1, -1, 1, 1]  # ties too
    index, labels = match(torch.zeros(0, 4), (0.5,), (0, 1))
    assert (index.tolist(), labels.tolist()) == ([0] * 4, [0] * 4)
    assert match(torch.tensor([[0.5]]), (0.5,), (0, 1))[1].tolist() == [1]  # a threshold belongs to what is above it


def test_samples_are_bounded_and_replayable() -> None:
    labels = torch.tensor([1] * 30 + [0] * 100 + [-1] * 20)
    positive, negative = sample_labels(labels, 40, 0.5, 0, permutation(None))
    assert (len(positive), len(negative)) == (20, 20)
    assert (labels[positive] == 1).all()
    assert (labels[negative] == 0).all()
    positive, negative = sample_labels(labels[20:], 40, 0.5, 0, permutation(None))
    assert (len(positive), len(negative)) == (10, 30)  # negatives make up for what is missing
    noise = torch.rand(150)
    first, again = (sample_labels(labels, 40, 0.5, 0, permutation(noise)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
def test_box_losses_vanish_at_the_truth(kind: Any) -> None:
    boxes, anchors = random_boxes(8), random_boxes(8, seed=2)
    deltas = encode_boxes(boxes, anchors).requires_grad_()
    assert box_loss(deltas, boxes, anchors, (1.0,) * 4, kind).item() == pytest.approx(0, abs=1e-6)
    box_loss(deltas + 0.1, boxes, anchors, (1.0,) * 4, kind).backward()
    assert deltas.grad is not None
    assert (deltas.grad.abs().sum(dim=1) > 0).all()
    with pytest.raises(ZooError, match="did you mean 'giou'"):
        box_loss(deltas, boxes, anchors, (1.0,) * 4, "gious")  # type: ignore[arg-type]


def test_masks_are_cropped_and_pasted_back() -> None:
    boxes = torch.tensor([[10.0, 12, 42, 44], [5, 5, 50, 20]])
    masks = torch.zeros(2, 60, 70, dtype=torch.bool)
    masks[0, 12:44, 10:26] = True  # the left half of the first box
    cropped = crop_masks(masks, torch.tensor([0, 1]), boxes, 28)
    assert cropped[0, :, :14].all()
    assert not cropped[0, :, 14:].any()
    assert not cropped[1].any()
    pasted = paste_masks(cropped.float(), boxes, (60, 70))
    assert pasted.shape == (2, 60, 70)
    assert (pasted[0] ^ masks[0]).sum() <= 32  # a column at the edge at most
    polygon = [[np.array([10.0, 12, 26, 12, 26, 44, 10, 44])], [np.array([60.0, 50, 65, 50, 65, 55])]]
    drawn = crop_polygons(polygon, boxes, 28)
    assert (drawn[0] ^ cropped[0]).float().mean() < 0.05
    assert not drawn[1].any()
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 6)).shape == (0, 5, 6)


def test_keypoints_come_back_from_their_cells() -> None:
    boxes = torch.tensor([[10.0, 20, 66, 76], [0, 0, 112, 28]])
    keypoints = torch.tensor(
        [[[12.3, 70.1, 2], [66, 76, 1], [9, 30, 2], [30, 30, 0]], [[0.0, 0, 1], [111, 27, 2], [50, 14, 2], [5, 29, 1]]]
    )
    cells, valid = keypoint_cells(keypoints, boxes, 56)
    assert valid.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert cells[0, 1] == 56 * 56 - 1  # on the border: the last cell
    maps = torch.full((2, 4, 56 * 56), -8.0).scatter(2, cells[..., None], 8.0).unflatten(2, (56, 56))
    found = heatmaps_to_keypoints(maps, boxes)
    off = (found[..., :2] - keypoints[..., :2]).abs()[valid]
    assert (off <= torch.tensor([2.0, 1.0])).all()
    assert (found[..., 3] > 0).all()
    assert found[0, :2, 3].min() > 0.99  # the box is as large as its map: all of the mass lies in one cell


def test_roi_warp_is_roi_align_of_boxes_rounded_to_cells() -> None:
    maps, rois = [torch.randn(1, 4, 6, 6)], torch.tensor([[0, 9.0, 20, 50, 33]])
    warp, align = (RoIPooler([16], PoolConfig(pooling=kind)) for kind in ("warp", "align"))
    torch.testing.assert_close(warp(maps, rois), align(maps, torch.tensor([[0, 16.0, 16, 48, 32]])))
    assert not warp(maps, rois).equal(align(maps, rois))
    thin = warp(maps, torch.tensor([[0, 16.0, 16, 18, 18]]))  # a cell at least
    torch.testing.assert_close(thin, align(maps, torch.tensor([[0, 16.0, 16, 32, 32]])))


def test_masks_under_a_softmax_have_a_rival_for_the_background() -> None:
    from zoo.nn.detection import MaskHeadConfig
    from zoo.nn.detection.roi_heads import MaskHead, Regions

    torch.manual_seed(0)
    head = MaskHead(4, 3, MaskHeadConfig(convs=1, channels=8, softmax=True))
    x, labels = torch.randn(2, 4, 14, 14), torch.tensor([0, 2])
    assert head(x).shape == (2, 4, 28, 28)
    boxes = torch.tensor([[0.0, 0, 28, 28]]).repeat(2, 1)
    regions = Regions(torch.zeros(2, dtype=torch.long), boxes, labels, torch.zeros(2, dtype=torch.long), boxes)
    full = [{"masks": torch.ones(1, 28, 28, dtype=torch.bool)}]
    expected = -head(x).log_softmax(dim=1)[torch.arange(2), labels].mean()
    torch.testing.assert_close(head.loss(x, regions, full), expected)
    chosen = head.of_class(head(x), labels)
    torch.testing.assert_close(chosen, head(x)[torch.arange(2), labels] - head(x)[:, 3])
    with pytest.raises(ZooError, match="class_agnostic"):
        MaskHead(4, 3, MaskHeadConfig(softmax=True, class_agnostic=True))


def test_pooling_takes_the_level_of_a_box_and_says_what_it_wants() -> None:
    maps = [torch.full((1, 1, 64 // 2**k, 64 // 2**k), float(k)) for k in range(4)]
    boxes = torch.tensor([[10.0, 10, 60, 60], [0, 0, 250, 250], [0, 0, 120, 120]])
    pooled = RoIPooler([4, 8, 16, 32], PoolConfig(7))(maps, rois_of([boxes]))
    assert pooled.shape == (3, 1, 7, 7)
    assert pooled.mean(dim=(1, 2, 3)).tolist() == [0.0, 2.0, 1.0]
    with pytest.raises(ZooError, match="double"):
        RoIPooler([4, 16], PoolConfig())
    with pytest.raises(ZooError, match="did you mean 'align'"):
        RoIPooler([4], PoolConfig(pooling="alige"))  # type: ignore[arg-type]


def test_regions_of_no_pictures_are_none() -> None:
    assert rois_of([]).shape == (0, 5)
    assert rois_of([torch.zeros(0, 4), torch.zeros(0, 4)]).shape == (0, 5)
    pooler = RoIPooler([4, 8], PoolConfig(7))
    assert pooler([torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)], rois_of([])).shape == (0, 2, 7, 7)


def test_frozen_norms_fold_into_convolutions() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, padding=1, bias=False).double(), FrozenBatchNorm2d(6).double()
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected, folded = norm(conv(x)), conv_norm(conv, norm, x)
    torch.testing.assert_close(folded, expected)
    wanted = torch.autograd.grad(expected.square().sum(), conv.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(folded.square().sum(), conv.weight)[0], wanted)


# -------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("name", DESIGNS)
def test_losses_start_as_theory_says_and_reach_every_parameter(name: str) -> None:
    network = build(**DESIGNS[name]).train()
    losses = network(batch_of(network))
    classes = [losses[key].item() for key in losses if key.startswith("loss_cls")]
    assert len(classes) == (3 if name == "cascade" else 1)
    for value in classes:
        assert value == pytest.approx(math.log(network.num_classes + 1), abs=0.2)
    assert losses["loss_rpn_cls"].item() == pytest.approx(math.log(2), abs=0.1)
    if "loss_mask" in losses:
        assert losses["loss_mask"].item() == pytest.approx(math.log(2), abs=0.02)
    if "loss_keypoint" in losses:
        assert losses["loss_keypoint"].item() > math.log(56 * 56) - 0.5  # no map is better than chance
    sum(losses.values()).backward()
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key
        else:
            assert parameter.grad is None, key
    frozen = [key for key, parameter in network.named_parameters() if not parameter.requires_grad]
    assert bool(frozen) == (name != "bn")
    assert all("conv1" in key or "layer1" in key for key in frozen)


def test_frozen_stages_of_a_batchnorm_network_keep_their_statistics() -> None:
    network = ResNetBackbone(ResNetConfig(18, "bn", 8, 8, freeze=2), ("c3",)).train()
    assert isinstance(network.bn1, FrozenBatchNorm2d)
    kinds = {
        type(module) for module in network.get_submodule("layer1").modules() if "BatchNorm" in type(module).__name__
    }
    assert kinds == {FrozenBatchNorm2d}
    assert isinstance(network.get_submodule("layer2.0.bn1"), nn.BatchNorm2d)


@pytest.mark.parametrize("name", DESIGNS)
def test_detections_are_in_the_pixels_of_the_file(name: str) -> None:
    network = build(**DESIGNS[name], roi={**TINY["roi"], "score_threshold": 0.0}).eval()
    batch = batch_of(network)
    del batch["target"]
    with torch.no_grad():
        found = network(batch)
    assert len(found) == 2
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
    losses = network(batch_of(network, empty=True))
    assert all(loss.isfinite() for loss in losses.values())
    batch = batch_of(network)
    batch["target"] = [{key: value[:0] for key, value in target.items()} for target in batch["target"]]
    losses = network(batch)
    assert losses["loss_mask"].item() == losses["loss_box_reg"].item() == 0
    sum(losses.values()).backward()  # every process keeps its part of the graph
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    network.roi_heads.config = mask_rcnn.RoIConfig(levels=network.roi_heads.levels, score_threshold=2.0)
    with torch.no_grad():
        found = network.eval()(batch_of(network))
    assert [len(detection["boxes"]) for detection in found] == [0, 0]
    assert found[0]["masks"].shape == (0, 128, 192)


def test_the_draws_are_an_argument() -> None:
    network = build().train()
    batch, noise = batch_of(network), torch.rand(5000, generator=torch.Generator().manual_seed(3))
    first, again, other = network(batch, noise), network(batch, noise), network(batch, noise.flip(0))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["loss_rpn_cls"], other["loss_rpn_cls"])


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
        ({"resnet": {"norm": "batch"}}, "unknown norm 'batch'"),
        ({"fpn": {"inputs": ("c2", "c6")}}, "unknown ResNet map 'c6'"),
        ({"box": {"cascade_ious": (0.5, 0.6), "cascade_weights": ((1.0,) * 4,) * 2}}, "class-agnostic"),
        ({"box": {"cascade_ious": (0.5,), "class_agnostic": True}}, "as many box.cascade_weights"),
        ({"design": "c4", "keypoint": {}}, "no keypoint head"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        MaskRCNN(**{**TINY, **options})


def test_training_without_targets_and_after_divergence() -> None:
    network = build().train()
    batch = batch_of(network)
    with pytest.raises(ZooError, match="target"):
        network({key: value for key, value in batch.items() if key != "target"})
    batch["image"][0, 0, 0, 0] = math.nan
    with pytest.raises(ZooError, match="diverged"):
        network(batch)


# -------------------------------------------------------------------------------------------------------------- weights


def official_names(network: MaskRCNN) -> dict[str, Tensor]:
    """The state of a network under detectron2's names (of an FPN network with one box head and a mask head)."""
    rules = (
        (r"^backbone\.bottom_up\.(conv|bn)1\.", r"backbone.bottom_up.stem.\g<1>1."),
        (r"\.layer(\d)\.", lambda found: f".res{int(found[1]) + 1}."),
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"\.downsample\.0\.", ".shortcut."),
        (r"\.downsample\.1\.", ".shortcut.norm."),
        (r"^backbone\.(lateral|output)\.[cp](\d)\.0\.", r"backbone.fpn_\1\2."),
        (r"^rpn\.head\.conv\.0\.", "proposal_generator.rpn_head.conv."),
        (r"^rpn\.head\.", "proposal_generator.rpn_head."),
        (r"(box_head|box_predictor)s\.0\.", r"\1."),
        (r"(mask_fcn\d)\.0\.", r"\1."),
    )
    renamed = {}
    for key, value in network.state_dict().items():
        for pattern, to in rules:
            key = re.sub(pattern, to, key)
        renamed[key] = value
    return renamed


def test_official_names_become_ours_and_constants_are_checked() -> None:
    network = build()
    state = official_names(network)
    assert "backbone.bottom_up.res2.0.conv1.norm.running_mean" in state
    assert "proposal_generator.rpn_head.objectness_logits.weight" in state
    sizes = (32.0, 64.0, 128.0, 256.0, 512.0)
    half = [torch.tensor([[-s / 2, -s / 2, s / 2, s / 2]]) for s in sizes]
    anchors = {
        f"proposal_generator.anchor_generator.cell_anchors.{k}": cell_anchors(
            (s,), (0.5, 1.0, 2.0), torch.device("cpu")
        )
        for k, s in enumerate(sizes)
    }
    constants = {"pixel_mean": torch.tensor([103.53, 116.28, 123.675])[:, None, None], "pixel_std": torch.ones(3, 1, 1)}
    converted = convert_official({**state, **anchors, **constants})
    own = network.state_dict()
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[key], own[key]) for key in own)
    assert convert_official(own).keys() == own.keys()  # ours stay ours
    for wrong, message in (
        ({"pixel_mean": torch.tensor([123.675, 116.28, 103.53])}, "pixel_mean"),
        ({f"proposal_generator.anchor_generator.cell_anchors.{k}": x for k, x in enumerate(half)}, "anchors"),
        ({"roi_heads.box_head.fc9.extra": torch.zeros(1)}, "unknown key 'roi_heads.box_head.fc9.extra'"),
    ):
        with pytest.raises(ZooError, match=message):
            convert_official({**state, **wrong})
    with pytest.raises(ZooError, match="1 unknown keys, such as 'stray'"):
        convert_official({**own, "stray": torch.zeros(1)})


def test_weights_of_detectors_and_classifiers_are_taken(tmp_path: Path) -> None:
    source, file = build(), tmp_path / "detector.pth"
    torch.save({"model": official_names(source)}, file)
    other = build(num_classes=5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    load_weights(other, file)
    own, given = other.state_dict(), source.state_dict()
    fresh = {key for key in own if own[key].shape != given[key].shape}
    assert fresh == {
        *(
            f"roi_heads.box_predictors.0.{layer}.{leaf}"
            for layer in ("cls_score", "bbox_pred")
            for leaf in ("weight", "bias")
        ),
        *(f"roi_heads.mask_head.predictor.{leaf}" for leaf in ("weight", "bias")),
    }
    assert all(torch.equal(own[key], before[key] if key in fresh else given[key]) for key in own)
    with pytest.raises(ZooError, match="does not fit the model"):
        load_weights(build(fpn={"channels": 16}), file)

    trunk = ResNetBackbone(ResNetConfig(18, "frozen_bn", 8, 8)).state_dict()
    assert set(convert_trunk({**trunk, "stem.fc.weight": torch.zeros(1)})) == set(trunk)
    torch.save(trunk, tmp_path / "trunk.pth")
    network = build()
    load_weights(network, tmp_path / "trunk.pth")
    filled = network.backbone.bottom_up.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(filled[key], value) for key, value in trunk.items())

    deep = {**TINY["resnet"], "depth": 50, "width_per_group": 2}
    stages = ResNetBackbone(ResNetConfig(**deep)).state_dict()
    torch.save(stages, tmp_path / "deep.pth")
    network = build(**{**DESIGNS["c4"], "resnet": deep})
    load_weights(network, tmp_path / "deep.pth")
    own = network.state_dict()
    for key, value in stages.items():  # the fifth stage is the head of the regions
        home = key.replace("layer4", "roi_heads.res5") if key.startswith("layer4") else f"backbone.{key}"
        assert torch.equal(own[home], value), key
    with pytest.raises(ZooError, match="does not fit the model"):
        load_weights(network, tmp_path / "trunk.pth")


def test_caffe2_names_and_affine_norms() -> None:
    state = {
        "conv1_w": torch.ones(8, 3, 7, 7),
        "res_conv1_bn_s": torch.ones(8),
        "res_conv1_bn_b": torch.zeros(8),
        "res2_0_branch1_w": torch.ones(8, 8, 1, 1),
        "res2_0_branch1_bn_s": torch.ones(8),
        "res2_0_branch1_bn_b": torch.ones(8),
        "res2_0_branch2a_w": torch.ones(8, 8, 1, 1),
        "res2_0_branch2a_w_momentum": torch.ones(1),
        "pred_w": torch.ones(1),
    }
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


class Batches(L.LightningDataModule):
    batch_size = 2

    def __init__(self, batches: list[dict[str, Any]], truth: list[dict[str, Any]]) -> None:
        super().__init__()
        self.batches, self.truth = batches, truth

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.truth, batch_size=None)  # type: ignore[arg-type]

    predict_dataloader = val_dataloader


def test_the_task_trains_and_reports_cocos_numbers() -> None:
    optim = Optim(name="sgd", lr=1e-3, no_decay="norm", schedule="constant")
    task = MaskRCNNDetection(model=None, **TINY, optim=optim, clip_each=0.5)
    assert task.network.iou_types == ("bbox", "segm")
    batch = batch_of(task.network)
    truth = batch_of(task.network)
    for number, target in enumerate(truth["target"]):
        target["boxes"] = target["boxes"] * 2  # the truth of evaluation is in the file's pixels
        target["masks"] = target["masks"].repeat_interleave(2, 1).repeat_interleave(2, 2)
        target["area"] = target["masks"].sum(dim=(1, 2)).double()
        target["iscrowd"] = torch.zeros(len(target["boxes"]), dtype=torch.int64)
        target["image_id"] = torch.tensor(number)
    bounded: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            bounded.extend(float(p.grad.norm()) for p in module.parameters() if p.grad is not None)

    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, max_epochs=3, logger=False, enable_checkpointing=False, callbacks=[Watch()],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    data = Batches([batch], [truth])
    trainer.fit(task, data)
    metrics = trainer.callback_metrics
    assert {"val/box/AP", "val/mask/AP50", "train/loss", "train/loss_mask", "train/loss_rpn_loc"} <= set(metrics)
    assert bounded
    assert max(bounded) <= 0.5 * (1 + 1e-4)
    (found,) = trainer.predict(task, data)  # type: ignore[misc]
    assert found[0]["masks"].shape[1:] == (128, 192)
    with pytest.raises(ZooError, match="did you mean 'mask_rcnn_r50_fpn'"):
        MaskRCNNDetection(model="mask_rcnn_r50_fnp")


def test_overrides_of_a_published_size_change_only_what_they_name() -> None:
    with torch.device("meta"):
        network = mask_rcnn.keypoint_rcnn_r50_fpn(rpn={"samples": 8}, box={"fc_channels": 64})
    assert network.rpn.config.samples == 8
    assert network.rpn.config.post_nms == (1500, 1000)
    assert network.roi_heads.box.beta == 0.5
    assert network.num_classes == 1
    assert network.iou_types == ("bbox", "keypoints")
    assert network.size_divisibility == 32
    with torch.device("meta"):
        assert mask_rcnn.mask_rcnn_r50_c4().size_divisibility == 1
        task = MaskRCNNDetection(model=None, mask=False, keypoint={"keypoints": 5}, oks_sigmas=[0.1] * 5)
    assert task.network.iou_types == ("bbox", "keypoints")


def test_two_processes_average_their_own_losses(tmp_path: Path) -> None:
    """Every process divides by its own regions, as the official code does; gradients are the mean over processes."""
    two, one = (_run(what, 2, tmp_path / what, "tests.papers.ddp_mask_rcnn") for what in ("fit", "replay"))
    first, second = (torch.load(f"{two}.{rank}", weights_only=True) for rank in range(2))
    expected = torch.load(one, weights_only=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, expected, rtol=1e-7, atol=1e-9)


def test_speed_compares_whole_steps(tmp_path: Path) -> None:
    arguments = ["mask_rcnn", "--model", "tiny", "--batch", "1", "--repeats", "1", "--warmup", "0", "--only", "step"]
    assert run.main([*arguments, "--out", str(tmp_path / "results")]) == 0
    record = json.loads((tmp_path / "results" / "mask_rcnn_tiny_float32_b1_cpu_t1.json").read_text())["step"]
    assert [row["name"] for row in record["contenders"]] == ["zoo", "torchvision"]
    assert record["work"]["flops"] > 1e9
    assert record["contenders"][0]["last_loss"] == pytest.approx(record["contenders"][1]["last_loss"], rel=0.2)
    assert run.main([*arguments, "--official", str(tmp_path)]) == 2  # no checkout of detectron2
