"""What the adapters read from a case, tried on cases that differ from the published ones."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zoo import parity
from zoo.errors import ZooError
from zoo.parity.cases import Config
from zoo.training import param_groups

CASES = Path(__file__).parent / "cases"


def _case(paper: str, name: str) -> parity.Case:
    case = parity.load(CASES / paper / f"{name}.json")
    return {**case, "config": Config.of(case["config"])}


@pytest.mark.parametrize("name", ["c4_inference", "cascade_train", "dc5_inference", "keypoint_train"])
def test_mask_rcnn_knows_the_base_configs(name: str) -> None:
    """All settings follow from the base config and what the case overrides."""
    case = _case("mask_rcnn", name)
    del case["config"]["resolved"]
    assert {verdict.note for verdict in parity.run_case(case)} == {""}


@pytest.mark.parametrize(
    ("sides", "maps", "strides", "notes", "lowest"),
    [
        ([96, 128], [(24, 32), (12, 16)], [8], "", 2),
        ([90, 130], [(23, 33), (12, 17)], [8], "", 2),  # rounded up
        ([90, 130], [(11, 16), (5, 8)], [8], "", 3),  # rounded down
        ([50, 70], [(24, 32), (12, 16)], [16, 32], "", 4),  # maps of their own: one stride a map
        ([50, 70], [(24, 32), (12, 16)], [8], "assign_boxes_to_levels(2..3)", 2),
        ([50, 70], [(24, 32), (12, 16)], [8], "", None),
    ],
)
def test_mask_rcnn_reads_the_lowest_level(
    sides: list[int], maps: list[tuple[int, int]], strides: list[int], notes: str, lowest: int | None
) -> None:
    read = parity.shared("detectron2").lowest_level
    case = {"config": Config.of({"image_size": sides, "strides": strides}), "notes": notes}
    features = [torch.zeros(1, 4, *shape) for shape in maps]
    if lowest is None:
        with pytest.raises(ZooError, match="which level"):
            read(case, features)
    else:
        assert read(case, features) == lowest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ROI_BOX_HEAD.NAME", "OtherHead"),
        ("ROI_MASK_HEAD.NAME", "PointRendMaskHead"),
        ("BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
        ("RESNETS.NORM", "CycleBN"),
        ("FPN.FUSE_TYPE", "max"),
        ("ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
        ("RPN.BBOX_REG_LOSS_TYPE", "siou"),
        ("LOAD_PROPOSALS", True),
    ],
)
def test_detectron2_s_settings_that_we_have_not_are_named(name: str, value: Any) -> None:
    official = parity.shared("detectron2")
    case = _case("mask_rcnn", "fpn_inference")
    section, _, leaf = name.rpartition(".")
    (case["config"]["resolved"]["MODEL"][section] if section else case["config"]["resolved"]["MODEL"])[leaf] = value
    with pytest.raises(ZooError, match=f"unknown {leaf if leaf in ('NORM', 'POOLER_TYPE') else name} '{value}'"):
        official.options(official.settings(case["config"])[1])


def test_detectron2_s_overrides_count_where_the_resolved_settings_say_nothing() -> None:
    official, config = parity.shared("detectron2"), _case("mask_rcnn", "fpn_inference")["config"]
    config["overrides"] |= {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True]}
    config["resolved"]["MODEL"]["ROI_HEADS"]["NAME"] = "CascadeROIHeads"
    found = official.options(official.settings(config)[1])
    assert found["resnet"]["deform"] == (False, True, True, True)
    assert found["box"]["cascade_ious"] == (0.5, 0.6, 0.7)
    assert found["box"]["cascade_weights"][2] == (30, 30, 15, 15)


def test_detectron2_s_image_without_objects_has_keypoints_of_the_others_number() -> None:
    config = {"image_sizes": [[9, 9], [9, 9]], "gt_boxes": [[], [[0, 0, 5, 5]]], "gt_classes": [[], [0]]}
    case = {"config": config | {"gt_keypoints": [[], [[[1, 2, 2], [3, 4, 0]]]]}}
    empty, full = parity.shared("detectron2").targets(case["config"], case)
    assert empty["keypoints"].shape == (0, 2, 3)
    assert full["keypoints"].shape == (1, 2, 3)


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Linear(2, 1)


def _decays(optim: Any) -> dict[str, tuple[float, float]]:
    groups = param_groups(_Small(), optim)
    return {name: (group["weight_decay"], group["lr_scale"]) for group in groups for name in group["names"]}


SOLVER = {"WEIGHT_DECAY_NORM": 0.0, "WEIGHT_DECAY_BIAS": None, "BIAS_LR_FACTOR": 1.0}


@pytest.mark.parametrize(
    ("settings", "norm", "norm_bias", "bias"),
    [
        ({}, (0.0, 1), (0.0, 1), (0.01, 1)),
        ({"WEIGHT_DECAY_NORM": None}, (0.01, 1), (0.01, 1), (0.01, 1)),
        ({"WEIGHT_DECAY_NORM": 0.003}, (0.003, 1), (0.003, 1), (0.01, 1)),
        ({"WEIGHT_DECAY_BIAS": 0.02, "BIAS_LR_FACTOR": 2.0}, (0.0, 1), (0.02, 2), (0.02, 2)),
    ],
)
def test_detectron2_groups(settings: dict[str, Any], norm: Any, norm_bias: Any, bias: Any) -> None:
    solver = Config({**_case("mask_rcnn", "train_run")["config"]["effective"]["SOLVER"], **SOLVER, **settings})
    found = _decays(parity.shared("detectron2").optim(solver))
    expected = {"conv.weight": (0.01, 1), "fc.weight": (0.01, 1), "fc.bias": bias}
    assert found == {**expected, "norm.weight": norm, "norm.bias": norm_bias}


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        (
            {"BN.WEIGHT_DECAY": 0.01},
            [(0.01, {"norm.weight", "norm.bias"}), (0.05, {"conv.weight", "fc.weight", "fc.bias"})],
        ),
        (
            {"BN.WEIGHT_DECAY": 0.05},
            [(0.05, {"norm.weight", "norm.bias"}), (0.05, {"conv.weight", "fc.weight", "fc.bias"})],
        ),
        (
            {"BN.WEIGHT_DECAY": 0.01, "SOLVER.ZERO_WD_1D_PARAM": True},
            [(0.01, {"norm.weight", "norm.bias"}), (0.0, {"fc.bias"}), (0.05, {"conv.weight", "fc.weight"})],
        ),
    ],
)
def test_pyslowfast_groups(settings: dict[str, Any], groups: list[tuple[float, set[str]]]) -> None:
    official = parity.shared("pyslowfast")
    given = official.settings(_case("slowfast", "train_run")) | {"SOLVER.WEIGHT_DECAY": 0.05} | settings
    found = param_groups(_Small(), official.optim(Config(given)))
    assert [(group["weight_decay"], set(group["names"])) for group in found] == groups


@pytest.mark.parametrize(
    ("paper", "name", "path", "value", "message"),
    [
        ("slowfast", "slow_r50_narrow", ("cfg", "MODEL.ARCH"), "slower", "did you mean 'slow'"),
        ("slowfast", "lr_cosine_warmup", ("cfg", "SOLVER.LR_POLICY"), "exp", "LR_POLICY"),
        ("slowfast", "train_run", ("effective", "SOLVER"), {}, "does not say"),
        ("mask_rcnn", "fpn_train", ("resolved", "MODEL", "ROI_BOX_HEAD", "USE_FED_LOSS"), True, "USE_FED_LOSS"),
        ("mask_rcnn", "train_run", ("effective", "SOLVER", "LR_SCHEDULER_NAME"), "Other", "LR_SCHEDULER_NAME"),
        ("mask_rcnn", "train_run", ("model", "base_config"), "configs/retina.yaml", "no network of ours"),
        ("flip", "forward_loss_mask50", ("model_img", "sincos"), False, "learnt positions"),
        ("meanflow", "train_loss_none", ("method", "warp"), 2.0, "warp"),
        ("mae", "train_run", ("train", "blr"), None, "does not say 'blr'"),
        ("drifting", "train_run", ("train", "lr_schedule", "lr_schedule"), "step", "did you mean"),
    ],
)
def test_what_an_adapter_cannot_read_is_named(
    paper: str, name: str, path: tuple[str, ...], value: Any, message: str
) -> None:
    case = _case(paper, name)
    place = case["config"]
    for part in path[:-1]:
        place = place[part]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    notes = {verdict.note for verdict in parity.run_case(case)}
    assert len(notes) == 1
    assert message in notes.pop()


def test_drifting_reads_a_cosine() -> None:
    case = _case("drifting", "train_run")
    schedule = case["config"]["train"]["lr_schedule"]
    schedule |= {"lr_schedule": "cosine", "total_steps": 7}
    peak, warmup = schedule["learning_rate"], schedule["warmup_steps"]
    assert warmup == 2
    falls = [(1 - 1e-6) * (1 + math.cos(math.pi * k / 5)) / 2 + 1e-6 for k in range(2)]
    expected = torch.tensor([1e-6, (1e-6 + peak) / 2, *(peak * share for share in falls)], dtype=torch.float64)
    torch.testing.assert_close(parity.adapter("drifting")(case)["lr"], expected)


def test_drifting_reads_a_generator_without_tokens() -> None:
    case = _case("drifting", "generator")
    case["config"]["net"] |= {"n_cls_tokens": 0, "noise_classes": 0}
    absent = r"noise_embeds_|LightningDiT_0/(cls_embed|TorchLinear_1/)"
    case["state"] = {key: entry for key, entry in case["state"].items() if not re.match(absent, key)}
    del case["inputs"]["style"]
    assert parity.adapter("drifting")(case)["samples"].isfinite().all()


def test_pmf_logs_a_term_without_weight() -> None:
    case = _case("pmf", "train_loss_perceptual")
    both = parity.adapter("pmf")(case)
    case["config"]["method"] |= {"convnext": False, "convnext_lambda": 0.0}
    one = parity.adapter("pmf")(case)
    assert one["loss"] < both["loss"]
    assert one["aux_loss_convnext"] == both["aux_loss_convnext"]


def test_retinanet_s_image_without_objects_matches_boxes_of_zeros() -> None:
    case = _case("retinanet", "train")
    case["config"] |= {"gt_boxes": [[], case["config"]["gt_boxes"][1]], "gt_classes": [[], [1]]}
    found = parity.adapter("retinanet")(case)
    assert not found["matched_boxes_sum"][0].any()
    assert (found["matched_boxes_sum"][1] > 0).all()
    assert (found["anchor_labels"][0] == 3).all()


def test_tensormask_reads_a_loss_without_weights_and_an_image_without_detections() -> None:
    case, adapter = _case("tensormask", "train"), parity.adapter("tensormask")
    weighted = adapter(case)
    case["config"]["resolved"]["MODEL"]["TENSOR_MASK"]["FOCAL_LOSS_ALPHA"] = -1
    plain = adapter(case)
    assert weighted["loss_cls"] < 0.71 * plain["loss_cls"]  # nearly all are negatives, of weight 0.7
    assert weighted["loss_mask"] == plain["loss_mask"]
    case = _case("tensormask", "inference")
    case["config"]["resolved"]["MODEL"]["TENSOR_MASK"]["SCORE_THRESH_TEST"] = 1.0
    found = adapter(case)
    assert found["boxes0"].shape == (0, 4)
    assert found["mask_means0"].shape == found["mask_sizes0"].shape == (0,)
