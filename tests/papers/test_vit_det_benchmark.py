"""The ViT benchmark: its trunk, the files that it starts from, torchvision's detector in our names."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.detection import vit_det_benchmark as paper
from zoo.detection.vit_det_benchmark import (
    TappedViT,
    ViTConfig,
    ViTMaskRCNN,
    convert_encoder,
    convert_official,
    convert_torchvision,
    fitted_positions,
    load_weights,
)
from zoo.errors import ZooError
from zoo.nn.detection.roi_heads import rois_of
from zoo.nn.detection.vit import SharedPositions
from zoo.ops.pos_embed import sincos_2d
from zoo.selfsup.mae import MaskedAutoencoder
from zoo.selfsup.moco_v3 import MoCoV3

VIT: dict[str, Any] = {
    "img_size": (64, 64), "patch_size": 8, "embed_dim": 32, "depth": 8, "num_heads": 2, "window_size": 3
}  # fmt: skip
TINY: dict[str, Any] = {
    "num_classes": 3,
    "vit": VIT,
    "fpn": {"channels": 8, "norm": "bn"},
    "rpn": {"sizes": ((8,), (16,), (24,), (32,), (48,)), "conv_channels": (-1, -1), "samples": 256},
    "roi": {"samples": 16, "detections": 5},
    "box": {"convs": 2, "conv_channels": 8, "fcs": 1, "fc_channels": 16, "norm": "bn"},
    "mask": {"convs": 2, "channels": 8, "norm": "bn"},
}
TRUNK = "backbone.bottom_up."


def build(seed: int = 0, **vit: Any) -> ViTMaskRCNN:
    torch.manual_seed(seed)
    return ViTMaskRCNN(**{**TINY, "vit": {**VIT, **vit}})


def batch_of(images: int = 2) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 8:40, 4:30] = masks[1, 30:60, 36:60] = True
    boxes = torch.tensor([[4.0, 8, 30, 40], [36, 30, 60, 60]])
    target = {"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": masks}
    size = torch.tensor([[64, 64]] * images)
    return {"image": torch.randn(images, 3, 64, 64, generator=draw), "size": size, "target": [target] * images}


# ---------------------------------------------------------------------------------------------------------------- trunk


def test_losses_start_as_theory_says_and_reach_every_parameter() -> None:
    network = build(drop_path_rate=0.1, init_values=0.1).train()
    losses = network(batch_of())
    assert losses["loss_cls"].item() == pytest.approx(math.log(4), abs=0.2)
    assert losses["loss_rpn_cls"].item() == pytest.approx(math.log(2), abs=0.1)
    assert losses["loss_mask"].item() == pytest.approx(math.log(2), abs=0.02)
    sum(losses.values()).backward()
    dead = {key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert not dead
    assert network.iou_types == ("bbox", "segm")


def test_what_the_trunk_starts_with() -> None:
    config = ViTConfig(**{**VIT, "img_size": (48, 80)})
    trunk = TappedViT(config)
    assert config.grid == (6, 10)
    torch.testing.assert_close(trunk.pos_embed, sincos_2d(32, (6, 10)))  # MAE's order
    assert trunk.pos_embed.requires_grad
    for table in (trunk.windowed_rel_pos_bias, trunk.global_rel_pos_bias):
        assert not table.relative_position_bias_table.any()
    blocks: Any = trunk.blocks
    for k, block in enumerate(blocks):
        assert block.attn.qkv.weight.abs().max() <= 0.02
        assert block.mlp.fc2.weight.abs().max() <= 0.02 / math.sqrt(2 * (k + 1))
    assert [block.attn.window for block in blocks] == [3, 0] * 4
    frozen = TappedViT(ViTConfig(**VIT, freeze_patch_embed=True)).patch_embed
    assert not any(p.requires_grad for p in frozen.parameters())


def test_four_taps_after_quarters_of_the_blocks() -> None:
    trunk = TappedViT(ViTConfig(**VIT)).eval()
    images = torch.randn(1, 3, 64, 64)
    maps = trunk(images)
    assert {name: tuple(x.shape[1:]) for name, x in maps.items()} == {
        "c2": (32, 32, 32), "c3": (32, 16, 16), "c4": (32, 8, 8), "c5": (32, 4, 4)
    }  # fmt: skip
    assert trunk.strides == {"c2": 2, "c3": 4, "c4": 8, "c5": 16}
    other = images.clone()
    other[..., :8, :8] += 1  # windows of three patches: what is not in the first one learns of it in the second block
    blocks: Any = trunk.blocks
    x, y = (trunk.patch_embed.proj(z).permute(0, 2, 3, 1) for z in (images, other))
    bias = torch.zeros(2, 9, 9)
    seen = (blocks[0](x, bias) - blocks[0](y, bias)).abs().amax(dim=3)[0] > 1e-6
    assert seen[:3, :3].any()
    assert not seen[3:].any()
    assert not seen[:, 3:].any()
    assert ((trunk(other)["c4"] - maps["c4"]).abs().amax(dim=1) > 0).all()
    assert trunk(torch.zeros(1, 3, 64, 96))["c4"].shape[2:] == (8, 12)  # another size: positions are resized


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_relative_bias_is_that_of_the_distance(grid: tuple[int, int]) -> None:
    height, width = grid
    positions = SharedPositions(2, grid)
    table = positions.relative_position_bias_table
    table.data = torch.randn_like(table)
    bias = positions(height, width)
    places = list(itertools.product(range(height), range(width)))
    for (a, (y, x)), (b, (v, u)) in itertools.product(enumerate(places), repeat=2):
        row = (y - v + height - 1) * (2 * width - 1) + x - u + width - 1
        assert torch.equal(bias[:, a, b], table[row])


def test_stochastic_depth_is_drawn_for_each_picture() -> None:
    trunk = TappedViT(ViTConfig(**VIT, drop_path_rate=0.9)).train()
    block: Any = trunk.blocks[6]  # windowed
    x = torch.randn(16, 8, 8, 32)
    moved = (block(x, torch.zeros(2, 9, 9)) - x).abs().amax(dim=3) > 0
    whole = moved.flatten(1).float().mean(dim=1)
    assert set(whole.tolist()) <= {0.0, 1.0}
    assert 0 < whole.mean() < 1


def test_grey_beside_a_picture() -> None:
    network = build().eval()
    batch = batch_of(1)
    batch["size"] = torch.tensor([[40, 64]])
    grey = (128 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    by_hand = {**batch, "image": batch["image"].clone()}
    by_hand["image"][0, :, 40:] = grey[:, None, None]
    with torch.no_grad():
        expected, plain = (network.propose(x)[0]["p3"] for x in (by_hand, batch))
        network.grey = True
        torch.testing.assert_close(network.propose(batch)[0]["p3"], expected)
    assert not torch.allclose(plain, expected)


@pytest.mark.parametrize(
    ("vit", "message"),
    [
        ({}, "64 x 90 pixels do not part into patches of 8"),
        ({"depth": 6}, "a multiple of 4, not 6"),
        ({"img_size": (60, 64)}, "multiples of patch_size 8"),
        ({"positions": "sincso"}, "did you mean 'sincos'"),
        ({"windw_size": 3}, "unknown option of ViTConfig 'windw_size'"),
    ],
)
def test_what_does_not_go_together_is_named(vit: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        build(**vit).backbone(torch.zeros(1, 3, 64, 90))


def pretrained(kind: str) -> dict[str, Tensor]:
    """A small pre-trained network's state dict, of a 4 x 4 grid."""
    torch.manual_seed(1)
    size: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 8, "num_heads": 2}
    if kind == "moco_v3":
        network: Any = MoCoV3("vit_small", dim=16, mlp_dim=16, img_size=32, patch_size=8, depth=1)
        return {f"module.{key}": value for key, value in network.state_dict().items()}
    network = MaskedAutoencoder(32, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, **size)
    state = {key: torch.randn_like(value) for key, value in network.state_dict().items()}
    if kind == "mae":
        return state
    state = {key: value for key, value in state.items() if not key.startswith(("decoder", "mask_token"))}
    if kind == "supervised":
        return {**state, "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    del state["pos_embed"]
    for k in range(8):
        of_query, _, of_value = state.pop(f"blocks.{k}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{k}.attn.q_bias": of_query, f"blocks.{k}.attn.v_bias": of_value}
        state |= {f"blocks.{k}.gamma_{n}": torch.full((32,), 0.1 * n) for n in (1, 2)}
    index = torch.zeros(17, 17, dtype=torch.int64)
    shared = "rel_pos_bias.relative_position_"
    return {**state, f"{shared}bias_table": torch.randn(7 * 7 + 3, 2), f"{shared}index": index}


@pytest.mark.parametrize("kind", ["mae", "supervised", "beit"])
def test_starts_from_pre_trained_files(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = pretrained(kind)
    torch.save({"model": state}, tmp_path / "vit.pth")
    network = build(init_values=0.3 if kind == "beit" else None)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_weights(network, tmp_path / "vit.pth")
    own = network.state_dict()
    assert torch.equal(own[f"{TRUNK}blocks.7.mlp.fc2.weight"], state["blocks.7.mlp.fc2.weight"])
    told = caplog.messages[-1]
    assert told.startswith("starts anew: ")
    assert {f"{TRUNK}adaptor", "backbone.lateral", "backbone.output", "roi_heads", "rpn"} <= set(told[13:].split(", "))
    tables = [f"{TRUNK}{name}_rel_pos_bias.relative_position_bias_table" for name in ("windowed", "global")]
    if kind == "beit":
        assert torch.equal(own[f"{TRUNK}blocks.0.ls2.gamma"], state["blocks.0.gamma_2"])
        bias = own[f"{TRUNK}blocks.0.attn.qkv.bias"].chunk(3)
        assert torch.equal(bias[0], state["blocks.0.attn.q_bias"])
        assert torch.equal(bias[2], state["blocks.0.attn.v_bias"])
        assert not bias[1].any()
        assert all(own[name].any() for name in tables)
        assert f"{TRUNK}pos_embed" in told
        return
    assert not any(own[name].any() for name in tables)
    assert torch.equal(own[f"{TRUNK}pos_embed"], fitted_positions(state["pos_embed"], (8, 8)))
    other = build()
    load_weights(other, tmp_path / "vit.pth", file_positions=False)
    assert torch.equal(other.state_dict()[f"{TRUNK}pos_embed"], before[f"{TRUNK}pos_embed"])


def test_moco_v3_gives_its_query_encoder() -> None:
    state = pretrained("moco_v3")
    encoder = convert_encoder(state)
    assert {key.partition(".")[0] for key in encoder} == {"blocks", "patch_embed", "pos_embed"}
    assert torch.equal(encoder["blocks.0.norm1.weight"], state["module.base_encoder.blocks.0.norm1.weight"])


@pytest.mark.parametrize(
    ("vit", "change", "message"),
    [
        ({}, {"blocks.0.attn.relative_position_bias_table": 1}, "unknown key 'blocks.0.attn.relative_position"),
        ({"init_values": 0.1}, {}, "vit.init_values"),
        ({"embed_dim": 64}, {}, "does not fit the model"),
        ({}, {"blocks.8.norm1.weight": 32}, "does not fit the model"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    vit: dict[str, Any], change: dict[str, int], message: str, tmp_path: Path
) -> None:
    torch.save({**pretrained("mae"), **{key: torch.zeros(n) for key, n in change.items()}}, tmp_path / "vit.pth")
    with pytest.raises(ZooError, match=message):
        load_weights(build(**vit), tmp_path / "vit.pth")


def test_a_detector_of_other_classes_keeps_its_last_layers(tmp_path: Path) -> None:
    source = build(seed=1)
    torch.save(source.state_dict(), tmp_path / "detector.pth")
    other = ViTMaskRCNN(**{**TINY, "num_classes": 5})
    load_weights(other, tmp_path / "detector.pth")
    own, given = other.state_dict(), source.state_dict()
    fresh = {key for key in own if own[key].shape != given[key].shape}
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in fresh} == {"cls_score", "bbox_pred", "predictor"}
    assert all(torch.equal(own[key], given[key]) for key in own.keys() - fresh)
    assert convert_official(given).keys() == given.keys()  # our names stay


def test_indices_of_another_order_and_unknown_keys_are_refused() -> None:
    name = f"{TRUNK}windowed_rel_pos_bias.relative_position_"
    y, x = torch.arange(9) // 3, torch.arange(9) % 3
    right = (y[:, None] - y + 2) * 5 + x[:, None] - x + 2
    table = {f"{name}bias_table": torch.zeros(25, 2)}
    assert set(convert_official({**table, f"{name}index": right})) == set(table)
    with pytest.raises(ZooError, match="orders relative positions otherwise"):
        convert_official({**table, f"{name}index": right.T})
    for stray in (f"{TRUNK}blocks.0.norm3.weight", "head.weight", f"{TRUNK}cls_token"):
        with pytest.raises(ZooError, match=f"unknown key '{stray}'"):
            convert_official({**table, stray: torch.zeros(1)})


def test_torchvision_s_detector_has_the_same_maps_and_outputs() -> None:
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).eval()
    ours = paper.mask_rcnn_r50_fpn_v2().eval()
    ours.load_state_dict(convert_torchvision(theirs.state_dict()))
    classes = [*paper.COCO_IDS, 0]
    assert len(classes) == 81
    images, boxes = torch.randn(1, 3, 128, 128), [torch.tensor([[3.0, 5, 60, 90], [20, 20, 50, 44], [0, 0, 128, 128]])]
    heads, theirs_heads = ours.roi_heads, theirs.roi_heads
    with torch.no_grad():
        maps, other = ours.backbone(images), theirs.backbone(images)
        for a, b in zip(maps.values(), other.values(), strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(ours.rpn.head(list(maps.values())), theirs.rpn.head(list(other.values())), strict=True):
            torch.testing.assert_close(a, b)
        levels = [maps[name] for name in heads.levels]
        pooled = heads.box_pooler(levels, rois_of(boxes))
        torch.testing.assert_close(pooled, theirs_heads.box_roi_pool(other, boxes, [(128, 128)]))
        logits, deltas = heads.box_predictors[0](heads.box_heads[0](pooled))
        wanted, moves = theirs_heads.box_predictor(theirs_heads.box_head(pooled))
        torch.testing.assert_close(logits, wanted[:, classes])
        torch.testing.assert_close(deltas.unflatten(1, (80, 4)), moves.unflatten(1, (91, 4))[:, classes[:-1]])
        regions = heads.mask_pooler(levels, rois_of(boxes))
        masks = theirs_heads.mask_predictor(theirs_heads.mask_head(regions))
        torch.testing.assert_close(heads.mask_head(regions), masks[:, classes[:-1]])
    with pytest.raises(ZooError, match="is of 81 classes, not of COCO's 91 ids"):
        convert_torchvision({"roi_heads.box_predictor.cls_score.bias": torch.zeros(81)})
