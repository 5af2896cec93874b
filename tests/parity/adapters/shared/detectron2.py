"""What the adapters of papers in detectron2 share: its settings as our options, its batches, its solver."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.nn.detection import RCNN
from zoo.ops.boxes import BoxLoss
from zoo.parity import Case, Config, Convert, dtype_of, filled_inputs, gradients, named
from zoo.training import Optim

NORMS = {"": None, "FrozenBN": "frozen_bn", "BN": "bn", "SyncBN": "bn", "nnSyncBN": "bn", "GN": "gn", "LN": "ln"}
POOLINGS = {"ROIAlignV2": "align", "ROIAlign": "align_unshifted", "ROIPool": "pool"}
MEAN, STD = "PIXEL_MEAN", "PIXEL_STD"


def _levels(names: Iterable[str]) -> list[str]:
    """res2 is c2 here."""
    return [name.replace("res", "c") for name in names]


def _bound(value: float) -> float | None:
    return value if value >= 0 else None


def choice(what: str, known: Mapping[str, Any]) -> Callable[[str], Any]:
    """Ours for a word of theirs; another word is a :class:`ZooError`."""

    def ours(word: str) -> Any:
        if word not in known:
            raise unknown(what, str(word), known)
        return known[word]

    return ours


norm, pooling = choice("NORM", NORMS), choice("POOLER_TYPE", POOLINGS)


# Our options by detectron2's settings: part, field, and what becomes of the value. Two settings of one field, for
# training and for evaluation, are its two entries.
_SAME: Callable[[Any], Any] = lambda value: value  # noqa: E731
FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "ROI_HEADS.NUM_CLASSES": ("num_classes", _SAME),
    "RESNETS.DEPTH": ("resnet.depth", _SAME),
    "RESNETS.NORM": ("resnet.norm", norm),
    "RESNETS.STEM_OUT_CHANNELS": ("resnet.stem_channels", _SAME),
    "RESNETS.RES2_OUT_CHANNELS": ("resnet.channels", _SAME),
    "RESNETS.NUM_GROUPS": ("resnet.groups", _SAME),
    "RESNETS.WIDTH_PER_GROUP": ("resnet.width_per_group", _SAME),
    "RESNETS.STRIDE_IN_1X1": ("resnet.stride_in_1x1", _SAME),
    "RESNETS.RES5_DILATION": ("resnet.dilation", _SAME),
    "RESNETS.DEFORM_ON_PER_STAGE": ("resnet.deform", tuple),
    "BACKBONE.FREEZE_AT": ("resnet.freeze", _SAME),
    "FPN.IN_FEATURES": ("fpn.inputs", _levels),
    "FPN.OUT_CHANNELS": ("fpn.channels", _SAME),
    "FPN.NORM": ("fpn.norm", norm),
    "FPN.FUSE_TYPE": ("fpn.fuse", _SAME),
    "RPN.IN_FEATURES": ("rpn.levels", _levels),
    "ANCHOR_GENERATOR.SIZES": ("rpn.sizes", _SAME),
    "ANCHOR_GENERATOR.ASPECT_RATIOS": ("rpn.ratios", _SAME),
    "ANCHOR_GENERATOR.OFFSET": ("rpn.offset", _SAME),
    "RPN.CONV_DIMS": ("rpn.conv_channels", _SAME),
    "RPN.BBOX_REG_WEIGHTS": ("rpn.box_weights", _SAME),
    "RPN.IOU_THRESHOLDS": ("rpn.thresholds", _SAME),
    "RPN.IOU_LABELS": ("rpn.labels", _SAME),
    "RPN.BATCH_SIZE_PER_IMAGE": ("rpn.samples", _SAME),
    "RPN.POSITIVE_FRACTION": ("rpn.positive_fraction", _SAME),
    "RPN.BOUNDARY_THRESH": ("rpn.boundary", _bound),
    "RPN.PRE_NMS_TOPK_TRAIN": ("rpn.pre_nms.0", _SAME),
    "RPN.PRE_NMS_TOPK_TEST": ("rpn.pre_nms.1", _SAME),
    "RPN.POST_NMS_TOPK_TRAIN": ("rpn.post_nms.0", _SAME),
    "RPN.POST_NMS_TOPK_TEST": ("rpn.post_nms.1", _SAME),
    "RPN.NMS_THRESH": ("rpn.nms_threshold", _SAME),
    "PROPOSAL_GENERATOR.MIN_SIZE": ("rpn.min_size", _SAME),
    "RPN.BBOX_REG_LOSS_TYPE": ("rpn.box_loss", _SAME),
    "RPN.SMOOTH_L1_BETA": ("rpn.beta", _SAME),
    "RPN.LOSS_WEIGHT": ("rpn.loss_weight", _SAME),
    "RPN.BBOX_REG_LOSS_WEIGHT": ("rpn.box_loss_weight", _SAME),
    "ROI_HEADS.IN_FEATURES": ("roi.levels", _levels),
    "ROI_HEADS.IOU_THRESHOLDS": ("roi.thresholds", _SAME),
    "ROI_HEADS.IOU_LABELS": ("roi.labels", _SAME),
    "ROI_HEADS.BATCH_SIZE_PER_IMAGE": ("roi.samples", _SAME),
    "ROI_HEADS.POSITIVE_FRACTION": ("roi.positive_fraction", _SAME),
    "ROI_HEADS.PROPOSAL_APPEND_GT": ("roi.append_truth", _SAME),
    "ROI_HEADS.SCORE_THRESH_TEST": ("roi.score_threshold", _SAME),
    "ROI_HEADS.NMS_THRESH_TEST": ("roi.nms_threshold", _SAME),
    "TEST.DETECTIONS_PER_IMAGE": ("roi.detections", _SAME),
    "ROI_BOX_HEAD.NUM_CONV": ("box.convs", _SAME),
    "ROI_BOX_HEAD.CONV_DIM": ("box.conv_channels", _SAME),
    "ROI_BOX_HEAD.NORM": ("box.norm", norm),
    "ROI_BOX_HEAD.NUM_FC": ("box.fcs", _SAME),
    "ROI_BOX_HEAD.FC_DIM": ("box.fc_channels", _SAME),
    "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": ("box.class_agnostic", _SAME),
    "ROI_BOX_HEAD.BBOX_REG_WEIGHTS": ("box.weights", _SAME),
    "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("box.loss", _SAME),
    "ROI_BOX_HEAD.SMOOTH_L1_BETA": ("box.beta", _SAME),
    "ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": ("box.loss_weight", _SAME),
    "ROI_BOX_HEAD.USE_SIGMOID_CE": ("box.sigmoid", _SAME),
    "ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": ("box.train_on_predictions", _SAME),
    "ROI_BOX_CASCADE_HEAD.IOUS": ("box.cascade_ious", _SAME),
    "ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": ("box.cascade_weights", _SAME),
    "ROI_MASK_HEAD.NUM_CONV": ("mask.convs", _SAME),
    "ROI_MASK_HEAD.CONV_DIM": ("mask.channels", _SAME),
    "ROI_MASK_HEAD.NORM": ("mask.norm", norm),
    "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": ("mask.class_agnostic", _SAME),
    "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": ("keypoint.keypoints", _SAME),
    "ROI_KEYPOINT_HEAD.CONV_DIMS": ("keypoint.channels", _SAME),
    "ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": ("keypoint.by_visible", _SAME),
    "ROI_KEYPOINT_HEAD.LOSS_WEIGHT": ("keypoint.loss_weight", _SAME),
}
for _theirs, _part in {"ROI_BOX_HEAD": "box", "ROI_MASK_HEAD": "mask", "ROI_KEYPOINT_HEAD": "keypoint"}.items():
    FIELDS |= {
        f"{_theirs}.POOLER_RESOLUTION": (f"{_part}.pool.size", _SAME),
        f"{_theirs}.POOLER_SAMPLING_RATIO": (f"{_part}.pool.sampling", _SAME),
        f"{_theirs}.POOLER_TYPE": (f"{_part}.pool.pooling", pooling),
    }
# What else a setting may say, and the values that we have.
ELSEWHERE: dict[str, Sequence[Any]] = {
    "META_ARCHITECTURE": ("GeneralizedRCNN",),
    "LOAD_PROPOSALS": (False,),
    "BACKBONE.NAME": ("build_resnet_fpn_backbone", "build_resnet_backbone"),
    "FPN.FUSE_TYPE": ("sum", "avg"),
    "ROI_HEADS.NAME": ("StandardROIHeads", "Res5ROIHeads", "CascadeROIHeads"),
    "PROPOSAL_GENERATOR.NAME": ("RPN",),
    "ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "RPN.HEAD_NAME": ("StandardRPNHead",),
    "RPN.BBOX_REG_LOSS_TYPE": get_args(BoxLoss),
    "ROI_BOX_HEAD.NAME": ("FastRCNNConvFCHead", ""),
    "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": get_args(BoxLoss),
    "ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "ROI_KEYPOINT_HEAD.NAME": ("KRCNNConvDeconvUpsampleHead",),
    "ROI_BOX_HEAD.USE_FED_LOSS": (False,),
    "RESNETS.DEFORM_MODULATED": (False,),
    "RESNETS.DEFORM_NUM_GROUPS": (1,),
}
# Of a cascade of which the case says no more.
CASCADE = {
    "cascade_ious": (0.5, 0.6, 0.7),
    "cascade_weights": tuple((10.0 * k, 10.0 * k, 5.0 * k, 5.0 * k) for k in (1, 2, 3)),
}
# How base configs are called, and how they differ from the published network that they are.
_BASE = re.compile(r"((?:cascade_)?(?:mask|faster|keypoint)_rcnn)_([RX])_(\d+)_(?:(32x8d)_)?(FPN|C4|DC5)")
PROPOSALS = {"FPN": ((2000, 1000), (1000, 1000))} | dict.fromkeys(("C4", "DC5"), ((12000, 6000), (2000, 1000)))
_WIDER = {"ROI_BOX_HEAD.NUM_FC": 1, "ROI_BOX_HEAD.NUM_CONV": 4}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "cls_agnostic": {"ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True, "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True},
    "giou": {
        "RPN.BBOX_REG_LOSS_TYPE": "giou",
        "RPN.BBOX_REG_LOSS_WEIGHT": 2.0,
        "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou",
        "ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 10.0,
    },
    "Cityscapes/": {"ROI_HEADS.NUM_CLASSES": 8},
    "_gn": {f"{part}.NORM": "GN" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")} | _WIDER,
    "_syncbn": {f"{part}.NORM": "SyncBN" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")} | _WIDER,
    "3x_gn": {"RESNETS.STRIDE_IN_1X1": False},
    "scratch": {"RESNETS.STRIDE_IN_1X1": False, "BACKBONE.FREEZE_AT": 0},
    "9x": {STD: [57.375, 57.12, 58.395]},
    "X_101_32x8d": {STD: [57.375, 57.12, 58.395]},
}


def settings(model: Mapping[str, Any], further: Mapping[str, Any] | None = None) -> tuple[str | None, Config]:
    """(The published network that the case builds on, or None; the settings it gives, flat, without ``MODEL.``).

    A case gives all of them ("resolved", beside what it overrides), or a base config and what it overrides.

    Raises:
        ZooError: a base config of no network of ours.
    """
    if "resolved" in model:
        return None, Config(_flat(model.get("overrides", {})) | _flat(model["resolved"]))
    base = model["base_config"]
    match = _BASE.search(base.rpartition("/")[2])
    if match is None:
        raise ZooError(f"no network of ours for the base config {base!r}")
    kind, letter, depth, groups, design = match.groups()
    name = "_".join(filter(None, (kind, letter.lower() + depth, groups, design.lower())))
    person, before, after = kind.startswith("keypoint"), *PROPOSALS[design]
    given: dict[str, Any] = {
        MEAN: [103.53, 116.28, 123.675],
        STD: [1.0, 1.0, 1.0],
        "MASK_ON": "mask" in kind,
        "KEYPOINT_ON": person,
        "ROI_HEADS.NUM_CLASSES": 1 if person else 80,
        "RPN.PRE_NMS_TOPK_TRAIN": before[0],
        "RPN.PRE_NMS_TOPK_TEST": before[1],
        "RPN.POST_NMS_TOPK_TRAIN": 1500 if person else 2000 if kind.startswith("cascade") else after[0],
        "RPN.POST_NMS_TOPK_TEST": after[1],
    }
    for word, changes in DIFFERENCES.items():
        given |= changes if word in base else {}
    return name, Config({**given, **_flat(further or {}), **_flat(model["overrides"])})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        flat |= _flat(value, name) if isinstance(value, Mapping) else {name.removeprefix("MODEL."): value}
    return flat


def options(
    given: Mapping[str, Any], fields: Mapping[str, Any] | None = None, elsewhere: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Our network's options; a part that is off is None.

    Args:
        given: the settings, as of :func:`settings`.
        fields: a paper's own, as FIELDS; they win.
        elsewhere: likewise, as ELSEWHERE.

    Raises:
        ZooError: what we have not.
    """
    table = FIELDS | dict(fields or {})
    for name, known in (ELSEWHERE | dict(elsewhere or {})).items():
        if given.get(name, known[0]) not in known:
            raise unknown(name, str(given[name]), map(str, known))
    heads = given.get("ROI_HEADS.NAME")
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in table or (heads != "CascadeROIHeads" and heads and name.startswith("ROI_BOX_CASCADE_HEAD")):
            continue
        ours, make = table[name]
        *parts, leaf = ours.split(".")
        place = found
        for part in parts:
            place = place.setdefault(part, {})
        place[leaf] = make(value)
    for name in {"pre_nms", "post_nms"} & found.get("rpn", {}).keys():
        found["rpn"][name] = (found["rpn"][name]["0"], found["rpn"][name]["1"])
    for part in ("mask", "keypoint"):
        if not given.get(f"{part.upper()}_ON", True):
            found[part] = None
    if heads == "CascadeROIHeads":
        found["box"] = CASCADE | found.get("box", {})
    if heads is not None:
        found["design"] = "fpn" if given["FPN.IN_FEATURES"] else "c4" if heads == "Res5ROIHeads" else "dc5"
    return found


# ------------------------------------------------------------------------------------------------------------ networks


def network(case: Case, net: RCNN, given: Mapping[str, Any], divisibility: int, convert: Convert) -> dict[str, Tensor]:
    """Losses and gradients of a batch, or what :func:`evaluate` gives, of a filled network in the case's mode."""
    config, inputs = case["config"], filled_inputs(case)
    images = [inputs[f"image{n}"] for n in range(len(config["image_sizes"]))]
    made = batch(images, given, divisibility, case)
    if config["training"]:
        losses = net({**made, "target": targets(config, case)}, inputs["perm_uniform"])
        total = sum(losses.values())
        total.backward()
        return {**losses, "total": total, **named(case, convert, grad=gradients(net))}
    with torch.no_grad():
        return evaluate(case, net, made)


def evaluate(case: Case, net: RCNN, made: dict[str, Any]) -> dict[str, Tensor]:
    """Levels, proposals and detections, at the size of the batch and as of the original images."""
    config = case["config"]
    features, proposals = net.propose(made)
    outputs = {f"feature_{name.replace('c', 'res')}": x for name, x in features.items()}
    for n, found in enumerate(proposals):
        outputs |= {f"proposals{n}": found.boxes, f"proposal_logits{n}": found.logits}
    sizes = zip(net.detect(made), config["image_sizes"], config["output_sizes"], strict=True)
    for n, (found, size, original) in enumerate(sizes):
        outputs |= {f"boxes{n}": found["boxes"], f"scores{n}": found["scores"], f"classes{n}": found["labels"]}
        final = net.postprocess(found, size, original)
        outputs |= {f"final_{key}{n}": value for key, value in final.items() if key in ("boxes", "keypoints")}
        if "mask_probs" in found:
            outputs[f"mask_probs{n}"] = found["mask_probs"][:, None]
            outputs[f"final_mask_area{n}"] = final["masks"].sum(dim=(1, 2))
        if "keypoints" in found:
            outputs |= {f"keypoints{n}": found["keypoints"], f"keypoint_logits{n}": found["heatmaps"]}
    return outputs


# ------------------------------------------------------------------------------------------------------------- batches


def batch(images: Sequence[Tensor], given: Mapping[str, Any], divisibility: int, case: Case) -> dict[str, Any]:
    """Raw images (3, H, W) normalised, then padded to a common size."""
    dtype, device = dtype_of(case), case.get("device", "cpu")
    mean, std = (torch.tensor(given[key], dtype=dtype, device=device)[:, None, None] for key in (MEAN, STD))
    sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (-(-max(sides) // divisibility) * divisibility for sides in zip(*sizes, strict=True))
    padded = torch.zeros(len(images), 3, height, width, dtype=dtype, device=device)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = (image.to(dtype) - mean) / std
    return {"image": padded, "size": torch.tensor(sizes)}


def targets(config: Mapping[str, Any], case: Case, at: int | None = None) -> list[dict[str, Tensor]]:
    """The objects of each image; `at` picks an iteration of a run."""

    def given(key: str) -> Any:
        return config[key] if at is None else config[key][at]

    made = []
    for image, (height, width) in enumerate(config["image_sizes"]):
        boxes = torch.tensor(given("gt_boxes")[image], dtype=dtype_of(case), device=case.get("device", "cpu")).reshape(
            -1, 4
        )
        labels = torch.tensor(given("gt_classes")[image], dtype=torch.int64, device=case.get("device", "cpu"))
        target = {"boxes": boxes, "labels": labels}
        if "gt_masks" in config:
            if config["gt_masks"] != "ellipse":
                raise ZooError(f"gt_masks {config['gt_masks']!r}: only ellipses are known")
            target["masks"] = ellipses(boxes, height, width)
        if "gt_keypoints" in config:
            most = max((len(one) for objects in given("gt_keypoints") for one in objects), default=1)
            points = torch.tensor(given("gt_keypoints")[image], dtype=dtype_of(case), device=case.get("device", "cpu"))
            target["keypoints"] = points if len(points) else points.reshape(0, most, 3)
        made.append(target)
    return made


def ellipses(boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks (N, H, W) of the ellipses that touch the boxes' sides."""
    y = torch.arange(height, dtype=boxes.dtype, device=boxes.device)[None, :, None] + 0.5
    x = torch.arange(width, dtype=boxes.dtype, device=boxes.device)[None, None] + 0.5
    x1, y1, x2, y2 = (boxes[:, k, None, None] for k in range(4))
    across, down = (x - (x1 + x2) / 2) / ((x2 - x1) / 2), (y - (y1 + y2) / 2) / ((y2 - y1) / 2)
    return across**2 + down**2 <= 1


def semantic_fields(part: str) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """FIELDS of the semantic branch, which is our `part`."""
    same = {"IN_FEATURES": "levels", "NUM_CLASSES": "classes", "CONVS_DIM": "channels", "COMMON_STRIDE": "stride"}
    same |= {"LOSS_WEIGHT": "loss_weight"}
    fields = {f"SEM_SEG_HEAD.{theirs}": (f"{part}.{ours}", _SAME) for theirs, ours in same.items()}
    return {**fields, "SEM_SEG_HEAD.NORM": (f"{part}.norm", norm)}


def semantic_targets(count: int, given: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Labels of the pixels of each image. Those do not count whose number is under 0.1, nor of the label that the case
    ignores."""
    made = []
    for n in range(count):
        labels = inputs[f"sem_seg{n}"].long()
        labels = labels.masked_fill(labels == given.get("SEM_SEG_HEAD.IGNORE_VALUE", 255), 255)
        made.append(labels.masked_fill(inputs[f"ignore{n}"] < 0.1, 255) if f"ignore{n}" in inputs else labels)
    return made


# -------------------------------------------------------------------------------------------------------------- solver


def optim(solver: Config) -> Optim:
    """The SOLVER section: groups of decay, warm-up and schedule by iteration."""
    policy, warm_up = solver["LR_SCHEDULER_NAME"], solver["WARMUP_METHOD"]
    policies = {"WarmupMultiStepLR": "step", "WarmupCosineLR": "cosine"}
    if policy not in policies:
        raise unknown("LR_SCHEDULER_NAME", policy, policies)
    if warm_up not in ("linear", "constant"):
        raise unknown("WARMUP_METHOD", warm_up, ("linear", "constant"))
    start = solver["BASE_LR"] * solver["WARMUP_FACTOR"]
    own = {"milestone_steps": tuple(solver["STEPS"]), "gamma": solver["GAMMA"]}
    if policy == "WarmupCosineLR":
        own = {"schedule_from": "start", "min_lr": solver.get("BASE_LR_END", 0.0)}
    return Optim(
        name="sgd",
        lr=solver["BASE_LR"],
        momentum=solver["MOMENTUM"],
        nesterov=solver["NESTEROV"],
        weight_decay=solver["WEIGHT_DECAY"],
        norm_weight_decay=solver["WEIGHT_DECAY_NORM"],
        bias_weight_decay=solver["WEIGHT_DECAY_BIAS"],
        bias_lr_scale=1.0 if solver["BIAS_LR_FACTOR"] is None else solver["BIAS_LR_FACTOR"],
        no_decay="none",
        schedule=policies[policy],  # type: ignore[arg-type]
        warmup_steps=min(solver["WARMUP_ITERS"], solver["MAX_ITER"]),
        **{"warmup_start_lr": start} if warm_up == "linear" else {"warmup_lr": start},
        **own,
    )


def decays(solver: Config, state: Iterable[str], base_lr: float, norm: float | None = 0.0) -> dict[str, Any]:
    """The groups of ``get_default_optimizer_params`` as fields of an Optim: norms' own decay (None: as the others'),
    and overrides by the last part of a name, of which those that no key of the `state` has do nothing.

    Raises:
        ZooError: an override of something else than rate and decay.
    """
    leaves = {key.rpartition(".")[2] for key in state}
    overrides: dict[str, dict[str, float]] = {}
    for leaf, entry in solver["overrides"].items():
        if strange := entry.keys() - {"lr", "weight_decay"}:
            raise unknown(f"override of {leaf}", min(strange), ("lr", "weight_decay"))
        if leaf in leaves:
            own = {
                "weight_decay": entry.get("weight_decay"),
                "lr_scale": entry["lr"] / base_lr if "lr" in entry else None,
            }
            overrides[leaf] = {key: value for key, value in own.items() if value is not None}
    norm = solver.get("weight_decay_norm", norm)
    return {"no_decay": "none", "norm_weight_decay": norm, "overrides": overrides}


def clipping(solver: Config) -> tuple[float | None, dict[str, Any]]:
    """(The bound of each parameter's own norm or None, options of the trainer)."""
    clip = solver["CLIP_GRADIENTS"]
    if not clip["ENABLED"]:
        return None, {}
    if clip["CLIP_TYPE"] == "value":
        return None, {"gradient_clip_val": clip["CLIP_VALUE"], "gradient_clip_algorithm": "value"}
    if clip["CLIP_TYPE"] != "norm" or clip["NORM_TYPE"] != 2.0:
        raise ZooError(
            f"CLIP_TYPE {clip['CLIP_TYPE']!r} of norm {clip['NORM_TYPE']}: only value, and norm 2, are built"
        )
    return clip["CLIP_VALUE"], {}


def lowest_level(case: Case, maps: list[Tensor]) -> int:
    """The level (log2 of the stride) of the first map: the one by whose strides all maps cover the image; else that of
    the first stride where every map has one; else as the case's notes call the levels (LOW..HIGH).

    Raises:
        ZooError: the case says nothing of it.
    """
    config, sides = case["config"], case["config"]["image_size"]
    shapes = [tuple(x.shape[-2:]) for x in maps]
    for lowest, whole in itertools.product(range(7), (math.floor, math.ceil)):
        if shapes == [tuple(whole(side / 2 ** (lowest + k)) for side in sides) for k in range(len(maps))]:
            return lowest
    if len(config["strides"]) == len(maps):
        return int(math.log2(config["strides"][0]))
    if told := re.search(r"assign_boxes_to_levels\((\d+)\.\.\d+\)", case.get("notes", "")):
        return int(told[1])
    raise ZooError("neither the maps' sizes nor the strides nor the notes say which level the first map is")
