"""ViTDet: pyramids, heads, groups of the optimiser, starts from other weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.detection import vitdet
from zoo.detection.vitdet import (
    ViTDet,
    ViTDetDetection,
    ViTPyramid,
    convert_official,
    convert_trunk,
    load_weights,
    resized_tables,
)
from zoo.errors import ZooError
from zoo.nn.detection import configured
from zoo.selfsup.mae import MaskedAutoencoder
from zoo.training import Optim
from zoo.training.optim import param_groups

TINY: dict[str, Any] = {
    "num_classes": 3,
    "vit": {
        "img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "drop_path": 0.0,
        "window_size": 3, "global_blocks": (1, 3), "pos_grid": 4,
    },
    "pyramid": {"channels": 8},
    "rpn": {"sizes": ((8,), (16,), (24,), (32,), (48,)), "pre_nms": (60, 60), "post_nms": (40, 20), "samples": 32},
    "roi": {"samples": 32, "detections": 5},
    "box": {"convs": 1, "conv_channels": 8, "fc_channels": 16},
    "mask": {"convs": 1, "channels": 8},
}  # fmt: skip
DESIGNS: dict[str, dict[str, Any]] = {
    "mask_rcnn_vitdet_b": {},
    "cascade_mask_rcnn_vitdet_b": {},
    "fpn": {"pyramid": {"kind": "fpn"}},
    "last_fpn": {"pyramid": {"kind": "last_fpn"}},
    "none": {"pyramid": {"kind": "none"}, "rpn": {"sizes": ((8, 16, 24, 32, 48),)}},
    "lvis": {"box": {"sigmoid": True, "federated": 2}, "mask": None},
}


def build(design: str = "mask_rcnn_vitdet_b", **options: Any) -> ViTDet:
    """A published design made tiny; of a part, `options` name some fields."""
    torch.manual_seed(0)
    parts = {**TINY}
    for given in (DESIGNS[design], options):
        for key, part in given.items():
            parts[key] = {**parts[key], **part} if isinstance(part, dict) else part
    return getattr(vitdet, design if "rcnn" in design else "mask_rcnn_vitdet_b")(**parts)


def batch_of(classes: int = 3) -> dict[str, Any]:
    """Two images in a square, the second smaller, with objects and masks."""
    images, sizes, targets = torch.randn(2, 3, 64, 64), [(64, 64), (56, 40)], []
    images[1, :, 56:] = images[1, :, :, 40:] = 0
    for boxes, (height, width) in zip(([[4.0, 6, 40, 50], [30, 8, 60, 40]], [[10.0, 10, 36, 50]]), sizes, strict=True):
        found = torch.tensor(boxes)
        x1, y1, x2, y2 = found.T[..., None, None]
        x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
        masks = (x > x1) & (x < x2) & (y > y1) & (y < y2)
        targets.append({"boxes": found, "labels": torch.arange(len(found)) % classes, "masks": masks})
    return {"image": images, "size": torch.tensor(sizes), "original_size": 2 * torch.tensor(sizes), "target": targets}


# -------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("design", DESIGNS)
def test_losses_start_as_theory_says_and_reach_every_parameter(design: str) -> None:
    network = build(design).train()
    losses = network(batch_of())
    wanted = math.log(4) if design != "lvis" else None
    classes = [value.item() for name, value in losses.items() if name.startswith("loss_cls")]
    assert len(classes) == (3 if design.startswith("cascade") else 1)
    for value in classes:
        # A federated loss of two or more of three classes, each a guess.
        assert value == pytest.approx(wanted, abs=0.2) if wanted else 1.9 * math.log(2) < value < 3.1 * math.log(2)
    assert losses["loss_rpn_cls"].item() == pytest.approx(math.log(2), abs=0.1)
    sum(losses.values()).backward()
    assert {key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()} == set()


@pytest.mark.parametrize("design", DESIGNS)
def test_detections_are_in_the_pixels_of_the_file(design: str) -> None:
    network = build(design, roi={"score_threshold": 0.0}).eval()
    with torch.no_grad():
        found = network({key: value for key, value in batch_of().items() if key != "target"})
    for detection, (height, width) in zip(found, ((128, 128), (112, 80)), strict=True):
        assert 0 < len(detection["boxes"]) <= 5
        assert (detection["boxes"] >= 0).all()
        assert (detection["boxes"] <= torch.tensor([width, height, width, height])).all()
        if network.roi_heads.mask_head is not None:
            assert detection["masks"].shape == (len(detection["boxes"]), height, width)


def test_levels_are_of_the_last_map_alone() -> None:
    def sources(kind: str) -> list[set[str]]:
        """Of each level, the blocks whose output it is made of by a path of its own."""
        net = ViTPyramid(
            configured(vitdet.ViTConfig, TINY["vit"]), configured(vitdet.PyramidConfig, {"kind": kind, "channels": 8})
        )
        return [{net.source[name]} for name in net.lateral]

    assert sources("simple") == sources("last_fpn") == [{"last"}] * 4
    assert sources("fpn") == [{"p2"}, {"p3"}, {"p4"}, {"p5"}]
    network: Any = build("fpn")
    assert network.backbone.bottom_up.outputs == {"p2": 0, "p3": 1, "p4": 2, "p5": 3}
    assert vars(build().backbone)["strides"] == {"p2": 2, "p3": 4, "p4": 8, "p5": 16, "p6": 32}
    assert vars(build("none").backbone)["strides"] == {"p4": 8}


def test_half_precision_keeps_boxes_in_float32() -> None:
    network = build().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(batch_of())
        found = network.eval().detect(batch_of())
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found[0]["boxes"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pyramid": {"kind": "simpel"}}, "did you mean 'simple'"),
        ({"vit": {"widow_size": 3}}, "unknown option of ViTConfig 'widow_size'; did you mean 'window_size'"),
        ({"vit": {**TINY["vit"], "depth": 5}, "pyramid": {"kind": "fpn"}}, "each quarter of the blocks; 5 have none"),
        ({"box": {"cascade_ious": (0.5,)}}, "class-agnostic"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        ViTDet(**{**TINY, **options})


# ------------------------------------------------------------------------------------------------------------ optimiser


@pytest.mark.parametrize("everything", [False, True])
def test_norms_over_channels_decay_and_rates_fall_with_depth(everything: bool) -> None:
    network = build(vit={"conv_blocks": (2,)})
    optim = Optim(weight_decay=0.1, layer_decay=0.5, no_decay="none" if everything else "norm")
    found = {name: group for group in param_groups(network, optim) for name in group["names"]}
    assert len(found) == len(list(network.parameters()))
    vit = "backbone.bottom_up."
    spared = {name for name, group in found.items() if group["weight_decay"] == 0}
    norms = {f"{vit}blocks.{k}.norm{n}.{leaf}" for k in range(4) for n in (1, 2) for leaf in ("weight", "bias")}
    assert spared == (set() if everything else norms | {f"{vit}pos_embed"})
    scales = {name: found[name]["lr_scale"] for name in found}
    assert scales[f"{vit}pos_embed"] == scales[f"{vit}patch_embed.proj.bias"] == 0.5**5
    assert scales[f"{vit}blocks.0.attn.rel_pos_h"] == 0.5**4
    assert scales[f"{vit}blocks.2.residual.norm1.weight"] == scales["backbone.lateral.p2.0.weight"] == 1
    assert scales["roi_heads.mask_head.predictor.bias"] == scales["rpn.head.conv.0.weight"] == 1


# -------------------------------------------------------------------------------------------------------------- weights


def test_official_names_become_ours() -> None:
    """The names of whole networks are tried by the parity cases."""
    assert set(
        convert_official(
            {key: torch.zeros(1) for key in ("backbone.simfp_2.1.bias", "backbone.simfp_2.4.norm.weight")}
            | {"backbone.simfp_5.2.weight": torch.zeros(1), "pixel_mean": torch.zeros(3, 1, 1)}
        )
    ) == {"backbone.scale.p2.1.bias", "backbone.lateral.p2.1.weight", "backbone.output.p5.0.weight"}
    for key in ("backbone.simfp_4.2.weight", "backbone.simfp_2.0.norm.weight", "backbone.net.norm.weight"):
        with pytest.raises(ZooError, match=f"unknown key '{key}'"):
            convert_official({key: torch.zeros(1)})
    own = build("lvis").state_dict()
    assert "roi_heads.box_predictors.0.fed_loss_cls_weights" in own
    assert convert_official(own).keys() == own.keys()


def test_an_autoencoder_fills_blocks_patches_and_positions(tmp_path: Path) -> None:
    source = MaskedAutoencoder(
        img_size=36, patch_size=6, embed_dim=16, depth=4, num_heads=2, decoder_embed_dim=16, decoder_depth=1,
        decoder_num_heads=2,
    )  # fmt: skip
    nn.init.normal_(source.pos_embed)
    torch.save({"model": source.state_dict()}, tmp_path / "mae.pth")
    network = build(vit={"conv_blocks": (1,)})
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_weights(network, tmp_path / "mae.pth")
    own, vit = network.state_dict(), "backbone.bottom_up."
    for key, value in convert_trunk(source.state_dict()).items():
        if value.shape == own[vit + key].shape:
            assert torch.equal(own[vit + key], value), key
    # 6 x 6 positions and 6 pixels of a patch, for 4 x 4 and 8; the class token's row is kept.
    assert own[f"{vit}pos_embed"].shape == (1, 17, 16)
    assert torch.equal(own[f"{vit}pos_embed"][:, 0], source.pos_embed[:, 0])
    assert not torch.equal(own[f"{vit}patch_embed.proj.weight"], before[f"{vit}patch_embed.proj.weight"])
    fresh = {key for key in own if torch.equal(own[key], before[key])}
    assert all(("rel_pos" in key or "residual" in key) for key in fresh if key.startswith(f"{vit}blocks") and
               not key.endswith(("norm1.weight", "norm2.weight", "bias")))  # fmt: skip
    with pytest.raises(ZooError, match="does not fit the model"):
        load_weights(build(vit={"embed_dim": 32}), tmp_path / "mae.pth")


def test_a_detector_of_another_size_and_other_classes(tmp_path: Path) -> None:
    source = build()
    for name, parameter in source.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter)
    torch.save({"model": source.state_dict()}, tmp_path / "detector.pth")
    other = build(num_classes=5, vit={"img_size": 96, "pos_grid": 6})
    load_weights(other, tmp_path / "detector.pth")
    own, key = other.state_dict(), "backbone.bottom_up.blocks.1.attn.rel_pos_h"
    assert own[key].shape == (23, 8)
    torch.testing.assert_close(own[key][11], source.state_dict()[key][7])  # the middle: no difference of place
    assert torch.equal(
        own["backbone.bottom_up.blocks.0.attn.rel_pos_h"], source.state_dict()[key.replace("s.1", "s.0")]
    )
    same = resized_tables(source, source.state_dict())
    assert all(torch.equal(value, same[key]) for key, value in source.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------- task

SHORT = {
    "data.batch_size": 2, "data.eval_batch_size": 2, "data.num_workers": 0, "model.optim.global_batch": None,
    "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 1, "trainer.max_epochs": 1, "trainer.logger": False,
    "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False, "trainer.num_sanity_val_steps": 0,
}  # fmt: skip


def test_the_task_is_made_anew_from_a_checkpoint(tmp_path: Path) -> None:
    options = {"model.mask.convs": 1, "model.roi.soft_nms": "linear", "model.tta": {"sizes": [96], "flip": True}}
    task, data, trainer = zoo.load_recipe("vitdet/pocket", {**SHORT, **options})
    trainer.fit(task, data)
    assert {"val/box/AP", "val/mask/AP50", "train/loss_mask", "train/loss_rpn_loc"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = ViTDetDetection.load_from_checkpoint(tmp_path / "saved.ckpt")
    network: Any = task.network
    assert again.network.options == network.options
    assert (again.tta, again.network.options["roi"].soft_nms) == (task.tta, "linear")


def test_the_network_s_options_are_the_task_s() -> None:
    with pytest.raises(ZooError, match=r"unknown key 'model.vit.depht' of .*model.vit.depth'"):
        zoo.load_recipe("vitdet/pocket", {**SHORT, "model.vit.depht": 1})
