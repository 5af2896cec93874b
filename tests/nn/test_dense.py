"""What single-stage detectors share: anchors by convention, statistics by level, matching, selection."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from zoo.nn.detection.dense import (
    ConvSubnet,
    DenseAnchorConfig,
    DenseAnchors,
    DenseInferenceConfig,
    assign_anchors,
    candidates,
    flatten_level,
    select_dense,
    take_anchors,
)
from zoo.nn.detection.results import postprocess


def test_conventions_of_others() -> None:
    """torchvision's anchors are its own; Detectron's those of its documentation: 32 pixels, three ratios, stride 8."""
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    maps = [torch.zeros(1, 1, *size) for size in ((100, 136), (50, 68), (25, 34), (13, 17), (7, 9))]
    theirs = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)(
        ImageList(torch.zeros(1, 3, 800, 1088), [(800, 1088)]), maps
    )
    ours = torch.cat(DenseAnchors([8, 16, 32, 64, 128], DenseAnchorConfig(convention="torchvision"))(maps))
    by_ratio = ours.view(-1, 3, 3, 4).transpose(1, 2).reshape(-1, 4)
    assert torch.equal(by_ratio, theirs[0])
    config = DenseAnchorConfig(((32.0,),), scales_per_octave=1, offset=0.5, convention="detectron")
    half = torch.tensor([[22.0, 12.0], [16.0, 16.0], [12.0, 24.0]])  # halves of 4 x (11 x 6, 8 x 8, 6 x 12)
    assert torch.equal(DenseAnchors([8], config)([maps[-1][..., :1, :1]])[0], 4 + torch.cat([-half, half], dim=1))
    anchors, logits = [torch.tensor([[0.0, 0, 10, 10]])] * 2, [torch.tensor([[-2.0]])] * 2
    one = select_dense(anchors, logits, [torch.zeros(1, 4)] * 2, DenseInferenceConfig(0.2, last_threshold=0.0))
    assert one["anchors"].tolist() == [1]
    moved = postprocess(one, (20, 20), (40, 40), pixel_borders=True)
    assert moved["boxes"].tolist() == [[0, 0, 19, 19]]


def test_predictions_are_taken_in_the_anchors_order() -> None:
    maps = [torch.randn(2, 6 * 3, 2, 3), torch.randn(2, 6 * 3, 1, 2)]
    flat = torch.cat([flatten_level(x, 3) for x in maps], dim=1)
    assert flat.shape == (2, 48, 3)
    assert torch.equal(flat[1, 7], maps[0][1, 3:6, 0, 1])  # the second cell's second anchor
    image, anchor = torch.tensor([0, 0, 1, 1]), torch.tensor([40, 3, 47, 35])
    assert torch.equal(take_anchors(maps, 3, image, anchor), flat[image, anchor])
    assert take_anchors(maps, 3, image[:0], anchor[:0]).shape == (0, 3)


def test_statistics_of_a_norm_are_each_level_s_own() -> None:
    net = ConvSubnet(4, convs=1, norm="bn", levels=2).train()
    near, far = torch.randn(2, 4, 6, 6), 100 + torch.randn(2, 4, 3, 3)
    outputs = net([near, far])
    assert all(x.mean().item() == pytest.approx(0.4, abs=0.1) for x in outputs)  # ReLU of a standard normal
    kept = [norm.running_mean.abs().max() for norm in net.norms[0].levels]
    assert kept[1] > 10 * kept[0]
    assert {key for key, _ in net.named_parameters()} == {
        "convs.0.weight", "convs.0.bias", "norms.0.weight", "norms.0.bias",
    }  # fmt: skip


def test_assignment_and_candidates() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 22], [0, 0, 10, 24], [50, 50, 60, 60]])
    targets = [{"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([2])}]
    targets.append({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)})
    assigned = assign_anchors(anchors, targets, 5)
    assert assigned.labels.tolist() == [[2, -1, -1, 5], [5, 5, 5, 5]]
    image, anchor = assigned.positives(5)
    assert assigned.boxes(targets, image, anchor).tolist() == [[0, 0, 10, 10]]
    far = [{"boxes": torch.tensor([[0.0, 0, 10, 40]]), "labels": torch.tensor([1])}]
    assert assign_anchors(anchors, far, 5).labels.tolist() == [[5, 1, 1, 5]]
    assert assign_anchors(anchors[[0, 3]], far, 5).labels.tolist() == [[1, 5]]  # the best there is
    assert assign_anchors(anchors[[0, 3]], far, 5, low_quality=False).labels.tolist() == [[5, 5]]
    scores, anchor, label = candidates(torch.tensor([[0.0, 3.0], [-9.0, 1.0]]), 0.4, 2)
    assert torch.equal(scores, torch.tensor([3.0, 1.0]).sigmoid())
    assert (anchor.tolist(), label.tolist()) == ([0, 1], [1, 1])


def test_overlaps_are_float32_s_whatever_the_network_has() -> None:
    """Anchors of a symmetric cell overlap an object alike but for rounding, which says which of them are best."""
    maps = [torch.zeros(1, 1, 12, 16)]
    config = DenseAnchorConfig(sizes=((16.0, 30.0),), scales_per_octave=1)
    anchors = torch.cat(DenseAnchors([8], config)(maps))
    target = {"boxes": torch.tensor([[10.0, 12, 60, 70], [50, 20, 120, 90]]), "labels": torch.tensor([0, 1])}
    single = assign_anchors(anchors, [target], 2)
    double = assign_anchors(anchors.double(), [{**target, "boxes": target["boxes"].double()}], 2)
    assert torch.equal(single.labels, double.labels)
    assert torch.equal(single.objects, double.objects)
