"""Layers of detectors: anchors, pooling of regions, heads, frozen norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from zoo.errors import ZooError
from zoo.nn.detection import AnchorGenerator, MaskHeadConfig, PoolConfig, ResNetBackbone, ResNetConfig, RoIPooler
from zoo.nn.detection.backbone import conv_norm
from zoo.nn.detection.roi_heads import BoxHeadConfig, BoxPredictor, MaskHead, Regions, federated_classes, rois_of
from zoo.ops.boxes import Draws
from zoo.weights.detectron2 import roi_name


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


def test_roi_warp_is_roi_align_of_boxes_rounded_to_cells() -> None:
    maps, rois = [torch.randn(1, 4, 6, 6)], torch.tensor([[0, 9.0, 20, 50, 33]])
    warp, align = (RoIPooler([16], PoolConfig(pooling=kind)) for kind in ("warp", "align"))
    torch.testing.assert_close(warp(maps, rois), align(maps, torch.tensor([[0, 16.0, 16, 48, 32]])))
    assert not warp(maps, rois).equal(align(maps, rois))
    thin = warp(maps, torch.tensor([[0, 16.0, 16, 18, 18]]))  # a cell at least
    torch.testing.assert_close(thin, align(maps, torch.tensor([[0, 16.0, 16, 32, 32]])))


def test_masks_under_a_softmax_have_a_rival_for_the_background() -> None:
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


def test_frozen_stages_of_a_batchnorm_network_keep_their_statistics() -> None:
    network = ResNetBackbone(ResNetConfig(18, "bn", 8, 8, freeze=2), ("c3",)).train()
    assert isinstance(network.bn1, FrozenBatchNorm2d)
    kinds = {
        type(module) for module in network.get_submodule("layer1").modules() if "BatchNorm" in type(module).__name__
    }
    assert kinds == {FrozenBatchNorm2d}
    assert isinstance(network.get_submodule("layer2.0.bn1"), nn.BatchNorm2d)


def test_regions_of_no_pictures_are_none() -> None:
    assert rois_of([]).shape == (0, 5)
    assert rois_of([torch.zeros(0, 4), torch.zeros(0, 4)]).shape == (0, 5)
    pooler = RoIPooler([4, 8], PoolConfig(7))
    assert pooler([torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)], rois_of([])).shape == (0, 2, 7, 7)


def test_a_federated_loss_is_of_the_classes_present_and_some_drawn() -> None:
    labels, weights = torch.tensor([3, 3, 5, 8]), torch.tensor([1.0, 4, 0, 1, 1, 1, 2, 2])  # 8: background
    kept = federated_classes(labels, weights, 5, torch.rand(8))
    assert kept.shape == (8,)
    assert kept[[3, 5]].all()
    assert not kept[2]  # of weight 0
    assert kept.sum() == 4  # the background has a place
    assert federated_classes(labels, weights, 2, torch.rand(8)).nonzero()[:, 0].tolist() == [3, 5]
    assert federated_classes(labels, weights, 50, torch.rand(8)).sum() == 7
    # The first draw is proportional to the weights.
    noise = torch.rand(4000, 8, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([federated_classes(labels, weights, 4, row) for row in noise]).float().mean(0)
    torch.testing.assert_close(drawn[[0, 1, 4, 6, 7]], torch.tensor([0.1, 0.4, 0.1, 0.2, 0.2]), rtol=0, atol=0.03)


def test_a_predictor_with_a_federated_loss_counts_pictures() -> None:
    torch.manual_seed(0)
    config = BoxHeadConfig(sigmoid=True, federated=3)
    predictor = BoxPredictor(4, 6, config, config.weights)
    predictor.count_images(torch.tensor([100, 0, 0, 0, 0, 0]))
    assert predictor.state_dict()["fed_loss_cls_weights"].tolist() == [10, 0, 0, 0, 0, 0]
    official = "roi_heads.box_predictor{}.fed_loss_cls_weights"
    assert roi_name(official.format("")) == "roi_heads.box_predictors.0.fed_loss_cls_weights"
    assert roi_name(official.format(".2")) == "roi_heads.box_predictors.2.fed_loss_cls_weights"
    logits, deltas, boxes = torch.randn(3, 7), torch.zeros(3, 24), torch.tensor([[0.0, 0, 9, 9]]).repeat(3, 1)
    which = torch.tensor([2, 6, 6])
    regions = Regions(torch.zeros(3, dtype=torch.long), boxes, which, torch.zeros(3, dtype=torch.long), boxes)
    loss = predictor.losses(logits, deltas, regions, Draws(torch.rand(6)))["loss_cls"]
    target = torch.tensor([[0.0, 1], [0, 0], [0, 0]])  # classes 0, drawn, and 2
    expected = nn.functional.binary_cross_entropy_with_logits(logits[:, [0, 2]], target, reduction="sum") / 3
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ZooError, match=r"box\.sigmoid"):
        BoxPredictor(4, 6, BoxHeadConfig(federated=3), config.weights)
