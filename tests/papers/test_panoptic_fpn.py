"""Panoptic FPN: the network's losses and segments, its official weights, its tasks, and what zoo predict draws."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.ops import DeformConv2d

import zoo
from tests.papers.test_mask_rcnn import SHORT, TINY, batch_of
from zoo.command.cli import main
from zoo.command.drawing import draw_segments
from zoo.data.panoptic import PanopticClasses, find_panoptic
from zoo.detection import mask_rcnn, panoptic_fpn
from zoo.detection.panoptic_fpn import CombineConfig, PanopticFPN, SemanticFPN, combine, convert_official, load_weights
from zoo.errors import ZooError
from zoo.metrics import PanopticQuality
from zoo.nn.detection import FPN, ResNetBackbone, ResNetConfig, SemanticHead, SemanticHeadConfig, Subsample
from zoo.nn.detection.semantic import padded_labels, resize_logits

SEMANTIC = {"classes": 5, "channels": 32}
SMALL: dict[str, Any] = {**TINY, "semantic": SEMANTIC, "combine": {"stuff_area": 8, "score": 0.1}}


def build(**options: Any) -> PanopticFPN:
    torch.manual_seed(0)
    network = panoptic_fpn.panoptic_fpn_r50(**{**SMALL, **options})
    for name, buffer in network.named_buffers():  # frozen BatchNorm of random weights normalises nothing
        if name.endswith(("bn2.weight", "bn3.weight")):
            buffer.fill_(0.3)
    return network


def batch(network: PanopticFPN) -> dict[str, Any]:
    made = batch_of(network)
    draw = torch.Generator().manual_seed(2)
    for target, (height, width) in zip(made["target"], made["size"].tolist(), strict=True):
        labels = torch.randint(0, 5, (height, width), generator=draw).to(torch.uint8)
        labels[:4] = 255
        target["semantic"] = labels
    return made


# ---------------------------------------------------------------------------------------------------------- the branch


@pytest.mark.parametrize("fuse", ["sum", "concat"])
def test_the_branch_is_what_the_paper_says(fuse: Any) -> None:
    """Each level to a quarter of the image's size on its own, then all together, then classes."""
    torch.manual_seed(0)
    fpn = FPN(ResNetBackbone(ResNetConfig(depth=18, stem_channels=8, channels=8), ("c2", "c3", "c4", "c5")),
              mask_rcnn.FPNConfig(channels=16), Subsample())  # fmt: skip
    head = SemanticHead(fpn, SemanticHeadConfig(classes=5, channels=32, fuse=fuse)).double()
    assert [len(stages) for stages in head.branches.values()] == [1, 1, 2, 3]
    maps = {name: torch.randn(2, 16, 64 // stride, 96 // stride).double() for name, stride in fpn.strides.items()}
    levels = []
    for name, stages in head.branches.items():
        x = maps[name]
        for stage in stages:
            x = stage(x).relu()
            x = x if name == "p2" else nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        levels.append(x)
    joined = sum(levels) if fuse == "sum" else torch.cat(levels, 1)
    torch.testing.assert_close(head(maps), head.predictor(joined))
    for wrong in ({"levels": ("p2", "p9")}, {"stride": 8}, {"fuse": "mean"}, {"norm": "fn"}):
        with pytest.raises(ZooError):
            SemanticHead(fpn, SemanticHeadConfig(**wrong))


def test_the_loss_is_the_mean_over_labelled_pixels() -> None:
    network = build()
    head, labels = network.semantic_head, [torch.full((8, 8), 255), torch.tensor([[3] * 8] * 4)]
    logits = torch.randn(2, 5, 2, 2)
    assert padded_labels(labels, (8, 8)).shape == (2, 8, 8)
    whole = head.upsampled(logits)[1, :, :4].flatten(1).T
    expected = 0.5 * nn.functional.cross_entropy(whole, torch.full((32,), 3))
    torch.testing.assert_close(head.loss(logits, labels), expected)
    assert head.loss(logits, labels[:1] * 2).item() == 0
    picked = resize_logits(head.upsampled(logits)[1], (4, 8), (9, 17))
    assert picked.shape == (5, 9, 17)


# ----------------------------------------------------------------------------------------------------------- combining


def test_masks_come_first_and_stuff_takes_the_rest() -> None:
    masks = torch.zeros(5, 10, 10, dtype=torch.bool)
    masks[0, :4] = True  # second best
    masks[1, 2:6] = True  # best: covers half of the first, which is allowed
    masks[2, 3:5] = True  # covered whole
    masks[4] = True  # of too low a score
    scores, labels = torch.tensor([0.8, 0.9, 0.7, 0.95, 0.2]), torch.tensor([4, 5, 6, 7, 8])  # the fourth is empty
    semantic = torch.full((10, 10), 1)
    semantic[8:], semantic[9, 5:], semantic[:7] = 2, 0, 3
    found = combine(masks, scores, labels, semantic, CombineConfig(stuff_area=6))
    assert found["segments"].tolist() == [[1, 1, 5, 40], [2, 1, 4, 20], [3, 0, 1, 10], [4, 0, 2, 15], [5, 0, 3, 10]]
    assert found["segment_scores"][:2].tolist() == pytest.approx([0.9, 0.8])
    assert found["segment_scores"][2:].isnan().all()
    assert found["panoptic"][9].tolist() == [4] * 5 + [0] * 5
    few = combine(masks, scores, labels, semantic, CombineConfig(stuff_area=11, things=(2,)))
    assert few["segments"][:, :3].tolist() == [[1, 1, 5], [2, 1, 4]]
    none = combine(masks[:0], scores[:0], labels[:0], semantic, CombineConfig(stuff_area=0))
    assert none["segments"][:, 1].sum() == 0
    assert none["segments"][:, 3].sum() == 95


# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("shared", [True, False])
def test_losses_start_as_theory_says_and_reach_every_parameter(shared: bool) -> None:
    network = build(shared=shared, resnet={**TINY["resnet"], "depth": 50, "width_per_group": 2}).train()
    losses = network(batch(network))
    assert next(iter(losses)) == "loss_sem_seg"
    sum(losses.values()).backward()
    reached = {key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    frozen = {key for key, p in network.named_parameters() if not p.requires_grad}
    assert reached == {key for key, _ in network.named_parameters()} - frozen
    nn.init.zeros_(network.semantic_head.predictor.weight)
    assert network(batch(network))["loss_sem_seg"].item() == pytest.approx(0.5 * math.log(5), abs=1e-5)
    if shared:
        noise = torch.rand(5000)
        once = network(batch(network), noise)
        network.instance_loss_weight = 2.0
        weighted = network(batch(network), noise)
        assert weighted["loss_mask"].item() == pytest.approx(2 * once["loss_mask"].item(), rel=1e-5)
        assert weighted["loss_rpn_cls"].item() == pytest.approx(once["loss_rpn_cls"].item(), rel=1e-5)


def test_segments_are_in_the_pixels_of_the_file() -> None:
    network = build(roi={**TINY["roi"], "score_threshold": 0.0}).eval()
    with torch.no_grad():
        found = network({key: value for key, value in batch(network).items() if key != "target"})
    metric = PanopticQuality(3, 5)
    for one, (height, width) in zip(found, ((128, 192), (112, 144)), strict=True):
        assert one["semantic"].shape == one["panoptic"].shape == (height, width)
        assert one["masks"].shape[1:] == (height, width)
        truth = torch.cat([one["segments"][:, :3], torch.zeros(len(one["segments"]), 1), one["segments"][:, 3:]], 1)
        panoptic = {"ids": one["panoptic"], "segments": truth.long()}
        metric.update([one], [{"image_id": torch.tensor(height), "panoptic": panoptic}])
    assert metric.compute()["PQ"].item() == pytest.approx(100)


def test_what_does_not_go_together_is_named() -> None:
    for options, message in (
        ({"mask": None}, "with masks"),
        ({"semantic": {"channel": 3}}, "did you mean 'channels'"),
        ({"resnet": {"depth": 18, "deform": (False, True, True, True)}}, "bottlenecks"),
    ):
        with pytest.raises(ZooError, match=message):
            PanopticFPN(**{**SMALL, **options})
    network = build().train()
    with pytest.raises(ZooError, match=r"set data\.semantic"):
        network(batch_of(network))


def test_deformable_convolutions_start_as_plain_ones() -> None:
    torch.manual_seed(0)
    options = {"depth": 50, "stem_channels": 8, "channels": 16, "width_per_group": 4, "freeze": 0}
    deform = ResNetBackbone(ResNetConfig(**options, deform=(False, True, False, True)))
    assert isinstance(deform.layer2[0].conv2, DeformConv2d)
    plain = ResNetBackbone(ResNetConfig(**options))
    plain.load_state_dict({key: value for key, value in deform.state_dict().items() if "offset" not in key})
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(deform(image)["c5"], plain(image)["c5"], rtol=1e-4, atol=1e-4)
    deform(image)["c5"].sum().backward()
    assert deform.layer4[0].conv2_offset.weight.grad.any()


# ------------------------------------------------------------------------------------------------------------- weights


def test_official_names_become_ours() -> None:
    state = {f"sem_seg_head.p5.{k}.norm.weight": torch.zeros(1) for k in (0, 2, 4)}
    state |= {"sem_seg_head.predictor.bias": torch.zeros(1), "sem_seg_head.p2.0.weight": torch.zeros(1)}
    state |= {"backbone.bottom_up.res4.3.conv2_offset.bias": torch.zeros(1)}
    branches = {f"semantic_head.branches.p5.{k}.1.weight" for k in range(3)} | {"semantic_head.branches.p2.0.0.weight"}
    rest = {"semantic_head.predictor.bias", "backbone.bottom_up.layer3.3.conv2_offset.bias"}
    assert set(convert_official(state)) == branches | rest
    with pytest.raises(ZooError, match=r"unknown key 'sem_seg_head\.p5\.1"):
        convert_official({"sem_seg_head.p5.1.weight": torch.zeros(1)})


def test_a_start_from_other_networks(tmp_path: Path) -> None:
    source, file = build(), tmp_path / "source.pth"
    torch.save({"model": source.state_dict()}, file)
    other = build(semantic={**SEMANTIC, "classes": 7})
    load_weights(other, file)
    same = {key for key, value in other.state_dict().items() if value.equal(source.state_dict().get(key, value[:0]))}
    assert set(other.state_dict()) - same == {f"semantic_head.predictor.{leaf}" for leaf in ("weight", "bias")}
    torch.save({"model": mask_rcnn.mask_rcnn_r50_fpn(**TINY).state_dict()}, file)
    before = source.semantic_head.predictor.weight.clone()
    load_weights(source, file)
    assert source.semantic_head.predictor.weight.equal(before)
    deep = {"depth": 50, "width_per_group": 2, "stem_channels": 8, "channels": 8}
    trunk = ResNetBackbone(ResNetConfig(**deep))
    torch.save(trunk.state_dict(), file)
    offsets = {**deep, "deform": (False, False, False, True)}
    for network in (
        build(resnet=offsets, shared=False), SemanticFPN(resnet=deep, fpn=TINY["fpn"], semantic=SEMANTIC)
    ):  # fmt: skip
        load_weights(network, file)
        trunks = [m for m in network.modules() if isinstance(m, ResNetBackbone)]
        assert len(trunks) == 1 + isinstance(network, PanopticFPN)
        assert all(m.conv1.weight.equal(trunk.conv1.weight) for m in trunks)


# --------------------------------------------------------------------------------------------------------------- tasks


def test_the_task_logs_all_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, data, trainer = zoo.load_recipe("panoptic_fpn/pocket", SHORT)
    trainer.fit(task, data)
    wanted = {f"val/panoptic/{kind}{part}" for kind in ("PQ", "SQ", "RQ") for part in ("", "_th", "_st")}
    wanted |= {"val/semantic/mIoU", "val/semantic/pACC", "val/box/AP", "val/mask/AP", "train/loss_sem_seg"}
    assert wanted <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    photo = tmp_path / "7.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 80, 3)).astype(np.uint8)).save(photo)
    assert main(["predict", str(tmp_path / "saved.ckpt"), str(photo), "-o", str(tmp_path / "out" / "all.json")]) == 0
    written = json.loads((tmp_path / "out" / "all.json").read_text())
    assert [c["name"] for c in written["categories"] if not c["isthing"]] == [
        "plain", "striped", "checked", "cloudy", "grainy"
    ]  # fmt: skip
    Image.open(photo).save(tmp_path / "out" / "7.png")
    source, _ = find_panoptic(tmp_path / "out" / "all.json", "all").open("predict")  # our own reader reads it
    truth = source.read(0).panoptic
    assert truth is not None
    ids, areas = np.unique(truth.ids[truth.ids > 0], return_counts=True)
    assert dict(truth.segments[:, [0, 3]].tolist()) == dict(zip(ids.tolist(), areas.tolist(), strict=True))
    assert main(["predict", str(tmp_path / "saved.ckpt"), str(photo), "-o", str(tmp_path / "drawn.png")]) == 0
    assert Image.open(tmp_path / "drawn.png").size == (320, 240)
    assert "pixels)" in capsys.readouterr().out


def test_semantic_fpn_trains_and_is_measured() -> None:
    options = {"resnet": {"depth": 18, "stem_channels": 8, "channels": 8, "norm": "bn", "freeze": 0}}
    task = panoptic_fpn.SemanticSegmentation(**options, fpn={"channels": 8}, semantic={**SEMANTIC, "classes": 6})
    _, data, trainer = zoo.load_recipe("panoptic_fpn/pocket", SHORT)
    trainer.callbacks = []
    trainer.fit(task, data)
    assert {"val/semantic/mIoU", "val/semantic/fIoU", "train/loss_sem_seg"} <= set(trainer.callback_metrics)
    found = trainer.predict(task, data.val_dataloader())[0]
    assert found[0]["semantic"].shape == (96, 96)


def test_segments_are_drawn_in_colours() -> None:
    ids = torch.zeros(40, 60, dtype=torch.int32)
    ids[:, :20], ids[:, 20:40] = 1, 2
    drawn = draw_segments(torch.full((3, 40, 60), 100, dtype=torch.uint8), ids, [1, 2], ["sky", "cat"])
    assert drawn.shape == (3, 200, 300)
    left, middle, right = (drawn[:, 10, x].tolist() for x in (20, 150, 280))
    assert len({tuple(left), tuple(middle), tuple(right)}) == 3
    assert right == [60] * 3  # grey and dark: nothing known
    assert PanopticClasses(("cat", "sky"), (True, False)).place(False, 1) == 1
