"""Runs the kinds of cases that were taken from facebookresearch/detectron2; everything else is read from the case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zoo.detection.mask_rcnn import MaskRCNN, MaskRCNNDetection, convert_official
from zoo.nn.detection.backbone import FPNConfig, ResNetConfig
from zoo.nn.detection.roi_heads import (
    BoxHeadConfig,
    KeypointHeadConfig,
    MaskHeadConfig,
    PoolConfig,
    RoIConfig,
    RoIPooler,
    rois_of,
)
from zoo.nn.detection.rpn import AnchorGenerator, RPNConfig
from zoo.ops.boxes import decode_boxes, encode_boxes, match, pairwise_iou, permutation, pyramid_levels, sample_labels
from zoo.ops.keypoints import heatmaps_to_keypoints
from zoo.ops.masks import crop_masks, crop_polygons, paste_masks
from zoo.parity import Case, dtype_of, filled_inputs, fit, load_filled
from zoo.training import Optim, param_groups

NORMS = {"": None, "FrozenBN": "frozen_bn", "BN": "bn", "SyncBN": "bn", "nnSyncBN": "bn", "GN": "gn"}
POOLINGS = {"ROIAlignV2": "align", "ROIAlign": "align_unshifted", "ROIPool": "pool"}


def run(case: Case) -> dict[str, Tensor]:
    config, entry = case["config"], case["official"]["entry"]
    if "SimpleTrainer" in entry:
        return train_run(case)
    if "meta_arch" in entry:
        return train(case) if config["training"] else evaluate(case)
    return box_ops(case)


# ---------------------------------------------------------------------------------------------- detectron2's settings

# Those of the base config mask_rcnn_R_50_FPN_1x, for runs, whose cases give the differences from a base config only.
DEFAULTS: dict[str, Any] = {
    "MASK_ON": True,
    "KEYPOINT_ON": False,
    "PIXEL_MEAN": [103.53, 116.28, 123.675],
    "PIXEL_STD": [1.0, 1.0, 1.0],
    "BACKBONE.FREEZE_AT": 2,
    "FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "FPN.OUT_CHANNELS": 256,
    "FPN.NORM": "",
    "FPN.FUSE_TYPE": "sum",
    "PROPOSAL_GENERATOR.MIN_SIZE": 0,
    "ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
    "ANCHOR_GENERATOR.OFFSET": 0.0,
    "RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "RPN.BOUNDARY_THRESH": -1,
    "RPN.IOU_THRESHOLDS": [0.3, 0.7],
    "RPN.IOU_LABELS": [0, -1, 1],
    "RPN.BATCH_SIZE_PER_IMAGE": 256,
    "RPN.POSITIVE_FRACTION": 0.5,
    "RPN.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "RPN.BBOX_REG_LOSS_WEIGHT": 1.0,
    "RPN.BBOX_REG_WEIGHTS": [1.0, 1.0, 1.0, 1.0],
    "RPN.SMOOTH_L1_BETA": 0.0,
    "RPN.LOSS_WEIGHT": 1.0,
    "RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "RPN.PRE_NMS_TOPK_TEST": 1000,
    "RPN.POST_NMS_TOPK_TRAIN": 1000,
    "RPN.POST_NMS_TOPK_TEST": 1000,
    "RPN.NMS_THRESH": 0.7,
    "RPN.CONV_DIMS": [-1],
    "ROI_HEADS.NAME": "StandardROIHeads",
    "ROI_HEADS.NUM_CLASSES": 80,
    "ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "ROI_HEADS.IOU_THRESHOLDS": [0.5],
    "ROI_HEADS.IOU_LABELS": [0, 1],
    "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "ROI_HEADS.POSITIVE_FRACTION": 0.25,
    "ROI_HEADS.SCORE_THRESH_TEST": 0.05,
    "ROI_HEADS.NMS_THRESH_TEST": 0.5,
    "ROI_HEADS.PROPOSAL_APPEND_GT": True,
    "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 1.0,
    "ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
    "ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.0,
    "ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
    "ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "ROI_BOX_HEAD.NUM_FC": 2,
    "ROI_BOX_HEAD.FC_DIM": 1024,
    "ROI_BOX_HEAD.NUM_CONV": 0,
    "ROI_BOX_HEAD.CONV_DIM": 256,
    "ROI_BOX_HEAD.NORM": "",
    "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False,
    "ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": False,
    "ROI_BOX_HEAD.USE_FED_LOSS": False,
    "ROI_BOX_HEAD.USE_SIGMOID_CE": False,
    "ROI_BOX_CASCADE_HEAD.IOUS": [0.5, 0.6, 0.7],
    "ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": [
        [10.0, 10.0, 5.0, 5.0],
        [20.0, 20.0, 10.0, 10.0],
        [30.0, 30.0, 15.0, 15.0],
    ],
    "ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
    "ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 0,
    "ROI_MASK_HEAD.POOLER_TYPE": "ROIAlignV2",
    "ROI_MASK_HEAD.NUM_CONV": 4,
    "ROI_MASK_HEAD.CONV_DIM": 256,
    "ROI_MASK_HEAD.NORM": "",
    "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": False,
    "ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 14,
    "ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": 0,
    "ROI_KEYPOINT_HEAD.POOLER_TYPE": "ROIAlignV2",
    "ROI_KEYPOINT_HEAD.CONV_DIMS": [512] * 8,
    "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 17,
    "ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True,
    "ROI_KEYPOINT_HEAD.LOSS_WEIGHT": 1.0,
    "RESNETS.DEPTH": 50,
    "RESNETS.NUM_GROUPS": 1,
    "RESNETS.NORM": "FrozenBN",
    "RESNETS.WIDTH_PER_GROUP": 64,
    "RESNETS.STRIDE_IN_1X1": True,
    "RESNETS.RES5_DILATION": 1,
    "RESNETS.RES2_OUT_CHANNELS": 256,
    "RESNETS.STEM_OUT_CHANNELS": 64,
}
_ONE_LEVEL = {
    "FPN.IN_FEATURES": [],
    "ANCHOR_GENERATOR.SIZES": [[32, 64, 128, 256, 512]],
    "RPN.PRE_NMS_TOPK_TRAIN": 12000,
    "RPN.PRE_NMS_TOPK_TEST": 6000,
    "RPN.POST_NMS_TOPK_TRAIN": 2000,
}


def _normed(norm: str) -> dict[str, Any]:
    heads = {"FPN.NORM": norm, "ROI_BOX_HEAD.NORM": norm, "ROI_MASK_HEAD.NORM": norm, "RESNETS.NORM": norm}
    return {**heads, "ROI_BOX_HEAD.NUM_FC": 1, "ROI_BOX_HEAD.NUM_CONV": 4}


# How the other base configs differ, by words of their names.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"MASK_ON": False},
    "R_101_": {"RESNETS.DEPTH": 101},
    "_C4": {
        **_ONE_LEVEL,
        "RPN.IN_FEATURES": ["res4"],
        "ROI_HEADS.NAME": "Res5ROIHeads",
        "ROI_HEADS.IN_FEATURES": ["res4"],
        "ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
        "ROI_BOX_HEAD.NUM_FC": 0,
        "ROI_MASK_HEAD.NUM_CONV": 0,
    },
    "_DC5": {
        **_ONE_LEVEL,
        "RPN.IN_FEATURES": ["res5"],
        "ROI_HEADS.IN_FEATURES": ["res5"],
        "RESNETS.RES5_DILATION": 2,
    },
    "X_101_32x8d": {
        "PIXEL_STD": [57.375, 57.12, 58.395],
        "RESNETS.DEPTH": 101,
        "RESNETS.NUM_GROUPS": 32,
        "RESNETS.WIDTH_PER_GROUP": 8,
        "RESNETS.STRIDE_IN_1X1": False,
    },
    "keypoint_rcnn": {
        "MASK_ON": False,
        "KEYPOINT_ON": True,
        "RPN.POST_NMS_TOPK_TRAIN": 1500,
        "ROI_HEADS.NUM_CLASSES": 1,
        "ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.5,
    },
    "cascade": {
        "RPN.POST_NMS_TOPK_TRAIN": 2000,
        "ROI_HEADS.NAME": "CascadeROIHeads",
        "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    },
    "cls_agnostic": {"ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True, "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True},
    "giou": {
        "RPN.BBOX_REG_LOSS_TYPE": "giou",
        "RPN.BBOX_REG_LOSS_WEIGHT": 2.0,
        "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou",
        "ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 10.0,
    },
    "Cityscapes/": {"ROI_HEADS.NUM_CLASSES": 8},
    "_gn": {**_normed("GN"), "RESNETS.STRIDE_IN_1X1": False},
    "_syncbn": _normed("SyncBN"),
    "scratch": {"BACKBONE.FREEZE_AT": 0, "RESNETS.STRIDE_IN_1X1": False},
    "9x": {"PIXEL_STD": [57.375, 57.12, 58.395]},
}


def resolve(base_config: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a base config, given by its path, with overrides."""
    settings = dict(DEFAULTS)
    for word, changes in DIFFERENCES.items():
        if word in base_config:
            settings |= changes
    settings |= {name.removeprefix("MODEL."): value for name, value in overrides.items() if name.startswith("MODEL.")}
    model: dict[str, Any] = {}
    for name, value in settings.items():
        part, _, leaf = name.rpartition(".")
        (model.setdefault(part, {}) if part else model)[leaf] = value
    return {"MODEL": model, "TEST.DETECTIONS_PER_IMAGE": overrides.get("TEST.DETECTIONS_PER_IMAGE", 100)}


# ------------------------------------------------------------------------------------------------------- the network


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _ours(names: Iterable[str]) -> tuple[str, ...]:
    """res2 is c2 here."""
    return tuple(name.replace("res", "c") for name in names)


def _options(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the network that detectron2's settings describe."""
    model = resolved["MODEL"]
    trunk, fpn, anchors, rpn = (model[key] for key in ("RESNETS", "FPN", "ANCHOR_GENERATOR", "RPN"))
    roi, box, mask, keypoint = (
        model.get(key) for key in ("ROI_HEADS", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")
    )
    design = "fpn" if fpn["IN_FEATURES"] else "c4" if roi["NAME"] == "Res5ROIHeads" else "dc5"
    cascade = model.get("ROI_BOX_CASCADE_HEAD", {}) if roi["NAME"] == "CascadeROIHeads" else {}
    unsupported = box.get("USE_FED_LOSS") or any(trunk.get("DEFORM_ON_PER_STAGE", ()))
    if unsupported:
        raise NotImplementedError("federated losses and deformable convolutions")

    def pool(head: Mapping[str, Any]) -> PoolConfig:
        return PoolConfig(head["POOLER_RESOLUTION"], head["POOLER_SAMPLING_RATIO"], POOLINGS[head["POOLER_TYPE"]])

    return {
        "num_classes": roi["NUM_CLASSES"],
        "design": design,
        "resnet": ResNetConfig(
            depth=trunk["DEPTH"],
            norm=NORMS[trunk["NORM"]],
            stem_channels=trunk["STEM_OUT_CHANNELS"],
            channels=trunk["RES2_OUT_CHANNELS"],
            groups=trunk["NUM_GROUPS"],
            width_per_group=trunk["WIDTH_PER_GROUP"],
            stride_in_1x1=trunk["STRIDE_IN_1X1"],
            dilation=trunk["RES5_DILATION"],
            freeze=model["BACKBONE"]["FREEZE_AT"],
        ),
        "fpn": FPNConfig(
            inputs=_ours(fpn["IN_FEATURES"]),
            channels=fpn["OUT_CHANNELS"],
            norm=NORMS[fpn["NORM"]],
            fuse=fpn["FUSE_TYPE"],
        ),
        "rpn": RPNConfig(
            levels=_ours(rpn["IN_FEATURES"]),
            sizes=_tuples(anchors["SIZES"]),
            ratios=_tuples(anchors["ASPECT_RATIOS"]),
            offset=anchors["OFFSET"],
            conv_channels=_tuples(rpn["CONV_DIMS"]),
            box_weights=_tuples(rpn["BBOX_REG_WEIGHTS"]),
            thresholds=_tuples(rpn["IOU_THRESHOLDS"]),
            labels=_tuples(rpn["IOU_LABELS"]),
            samples=rpn["BATCH_SIZE_PER_IMAGE"],
            positive_fraction=rpn["POSITIVE_FRACTION"],
            boundary=rpn["BOUNDARY_THRESH"] if rpn["BOUNDARY_THRESH"] >= 0 else None,
            pre_nms=(rpn["PRE_NMS_TOPK_TRAIN"], rpn["PRE_NMS_TOPK_TEST"]),
            post_nms=(rpn["POST_NMS_TOPK_TRAIN"], rpn["POST_NMS_TOPK_TEST"]),
            nms_threshold=rpn["NMS_THRESH"],
            min_size=model["PROPOSAL_GENERATOR"]["MIN_SIZE"],
            box_loss=rpn["BBOX_REG_LOSS_TYPE"],
            beta=rpn["SMOOTH_L1_BETA"],
            loss_weight=rpn["LOSS_WEIGHT"],
            box_loss_weight=rpn["BBOX_REG_LOSS_WEIGHT"],
        ),
        "roi": RoIConfig(
            levels=_ours(roi["IN_FEATURES"]),
            thresholds=_tuples(roi["IOU_THRESHOLDS"]),
            labels=_tuples(roi["IOU_LABELS"]),
            samples=roi["BATCH_SIZE_PER_IMAGE"],
            positive_fraction=roi["POSITIVE_FRACTION"],
            append_truth=roi["PROPOSAL_APPEND_GT"],
            score_threshold=roi["SCORE_THRESH_TEST"],
            nms_threshold=roi["NMS_THRESH_TEST"],
            detections=resolved["TEST.DETECTIONS_PER_IMAGE"],
        ),
        "box": BoxHeadConfig(
            pool=pool(box),
            convs=box["NUM_CONV"],
            conv_channels=box["CONV_DIM"],
            norm=NORMS[box["NORM"]],
            fcs=box["NUM_FC"],
            fc_channels=box["FC_DIM"],
            class_agnostic=box["CLS_AGNOSTIC_BBOX_REG"],
            weights=_tuples(box["BBOX_REG_WEIGHTS"]),
            loss=box["BBOX_REG_LOSS_TYPE"],
            beta=box["SMOOTH_L1_BETA"],
            loss_weight=box["BBOX_REG_LOSS_WEIGHT"],
            sigmoid=box["USE_SIGMOID_CE"],
            train_on_predictions=box["TRAIN_ON_PRED_BOXES"],
            cascade_ious=_tuples(cascade.get("IOUS", [])),
            cascade_weights=_tuples(cascade.get("BBOX_REG_WEIGHTS", [])),
        ),
        "mask": MaskHeadConfig(
            pool=pool(mask),
            convs=mask["NUM_CONV"],
            channels=mask["CONV_DIM"],
            norm=NORMS[mask["NORM"]],
            class_agnostic=mask["CLS_AGNOSTIC_MASK"],
        )
        if model["MASK_ON"]
        else None,
        "keypoint": KeypointHeadConfig(
            pool=pool(keypoint),
            keypoints=keypoint["NUM_KEYPOINTS"],
            channels=_tuples(keypoint["CONV_DIMS"]),
            by_visible=keypoint["NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS"],
            loss_weight=keypoint["LOSS_WEIGHT"],
        )
        if model["KEYPOINT_ON"]
        else None,
    }


def _batch(images: Sequence[Tensor], resolved: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """Raw images (3, H, W) normalised, then padded to a common size."""
    model = resolved["MODEL"]
    mean, std = (
        torch.tensor(model[key], dtype=dtype_of(case), device=case["device"])[:, None, None]
        for key in ("PIXEL_MEAN", "PIXEL_STD")
    )
    sizes = [tuple(image.shape[1:]) for image in images]
    multiple = 2 ** max(int(name[3:]) for name in model["FPN"]["IN_FEATURES"]) if model["FPN"]["IN_FEATURES"] else 1
    height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes, strict=True))
    padded = torch.zeros(len(images), 3, height, width, dtype=dtype_of(case), device=case["device"])
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = (image.to(padded.dtype) - mean) / std
    return {"image": padded, "size": torch.tensor(sizes)}


def _targets(config: Mapping[str, Any], sizes: Sequence[Sequence[int]], case: Case, at: int | None) -> list[dict]:
    """The objects of each image; `at` picks an iteration of a run."""

    def given(key: str) -> Any:
        return config[key] if at is None else config[key][at]

    targets = []
    for image, (height, width) in enumerate(sizes):
        boxes = torch.tensor(given("gt_boxes")[image], dtype=dtype_of(case), device=case["device"]).reshape(-1, 4)
        labels = torch.tensor(given("gt_classes")[image], dtype=torch.int64, device=case["device"])
        target = {"boxes": boxes, "labels": labels}
        if "gt_masks" in config:
            assert config["gt_masks"] == "ellipse"
            target["masks"] = _ellipses(boxes, height, width)
        if "gt_keypoints" in config:
            keypoints = torch.tensor(given("gt_keypoints")[image], dtype=dtype_of(case), device=case["device"])
            target["keypoints"] = keypoints
        targets.append(target)
    return targets


def _ellipses(boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks (N, H, W) of the ellipses that touch the boxes' sides."""
    y = torch.arange(height, dtype=boxes.dtype, device=boxes.device)[None, :, None] + 0.5
    x = torch.arange(width, dtype=boxes.dtype, device=boxes.device)[None, None] + 0.5
    x1, y1, x2, y2 = (boxes[:, k, None, None] for k in range(4))
    across, down = (x - (x1 + x2) / 2) / ((x2 - x1) / 2), (y - (y1 + y2) / 2) / ((y2 - y1) / 2)
    return across**2 + down**2 <= 1


def _official_names(case: Case) -> dict[str, str]:
    return {ours: theirs for theirs in case["state"] for ours in convert_official({theirs: torch.empty(0)})}


def _gradients(network: MaskRCNN, case: Case) -> dict[str, Tensor]:
    names = _official_names(case)
    return {f"grad:{names[key]}": p.grad for key, p in network.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ networks, one batch


def train(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    resolved, sizes = config["resolved"], config["image_sizes"]
    network = load_filled(MaskRCNN(**_options(resolved)), case, convert_official).train()
    batch = _batch([inputs[f"image{n}"] for n in range(len(sizes))], resolved, case)
    batch["target"] = _targets(config, sizes, case, None)
    losses = network(batch, inputs["perm_uniform"])
    total = sum(losses.values())
    total.backward()
    return {**losses, "total": total, **_gradients(network, case)}


@torch.no_grad()
def evaluate(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    resolved, sizes = config["resolved"], config["image_sizes"]
    network = load_filled(MaskRCNN(**_options(resolved)), case, convert_official).eval()
    batch = _batch([inputs[f"image{n}"] for n in range(len(sizes))], resolved, case)
    features, proposals = network.propose(batch)
    outputs = {f"feature_{name.replace('c', 'res')}": x for name, x in features.items()}
    for n, found in enumerate(proposals):
        outputs |= {f"proposals{n}": found.boxes, f"proposal_logits{n}": found.logits}
    for n, (found, size, original) in enumerate(zip(network.detect(batch), sizes, config["output_sizes"], strict=True)):
        outputs |= {f"boxes{n}": found["boxes"], f"scores{n}": found["scores"], f"classes{n}": found["labels"]}
        final = network.postprocess(found, size, original)
        outputs[f"final_boxes{n}"] = final["boxes"]
        if "mask_probs" in found:
            outputs[f"mask_probs{n}"] = found["mask_probs"][:, None]
            outputs[f"final_mask_area{n}"] = final["masks"].sum(dim=(1, 2))
        if "keypoints" in found:
            outputs |= {f"keypoints{n}": found["keypoints"], f"keypoint_logits{n}": found["heatmaps"]}
            outputs[f"final_keypoints{n}"] = final["keypoints"]
    return outputs


# ------------------------------------------------------------------------------------------- whole runs, by the trainer


class Batches(L.LightningDataModule):
    """The batches of a case, one an iteration, as an epoch."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        super().__init__()
        self.batches, self.batch_size = batches, len(batches[0]["image"])

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches)

    def train_dataloader(self) -> Batches:
        return self


class Record(L.Callback):
    """The losses and the learning rate of every step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.parts: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        logged = {key.removeprefix("train/"): value for key, value in trainer.callback_metrics.items()}
        self.parts.append({key: value.clone() for key, value in logged.items() if key.startswith("loss_")})


def train_run(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    model, solver = config["model"], config["effective"]["SOLVER"]
    resolved = model.get("resolved") or resolve(model["base_config"], model["overrides"])
    sizes, count = model["image_sizes"], solver["MAX_ITER"]
    clip = solver["CLIP_GRADIENTS"]
    by_norm = clip["ENABLED"] and clip["CLIP_TYPE"] == "norm"
    optim = Optim(
        name="sgd",
        lr=solver["BASE_LR"],
        momentum=solver["MOMENTUM"],
        nesterov=solver["NESTEROV"],
        weight_decay=solver["WEIGHT_DECAY"],
        no_decay="norm" if solver["WEIGHT_DECAY_NORM"] == 0 else "none",
        schedule="step",
        milestone_steps=tuple(solver["STEPS"]),
        gamma=solver["GAMMA"],
        warmup_steps=solver["WARMUP_ITERS"],
        warmup_start_lr=solver["BASE_LR"] * solver["WARMUP_FACTOR"],
    )
    options = {name: False if part is None else part for name, part in _options(resolved).items()}
    task = MaskRCNNDetection(model=None, **options, optim=optim, clip_each=clip["CLIP_VALUE"] if by_norm else None)
    load_filled(task.network, case, convert_official)
    batches = []
    for k in range(count):
        batch = _batch([inputs[f"image{n}_{k}"] for n in range(len(sizes))], resolved, case)
        targets = _targets(model, sizes, case, k)
        batches.append({**batch, "target": targets, "noise": inputs[f"perm_uniform_{k}"]})
    record = Record()
    by_value = {"gradient_clip_val": clip["CLIP_VALUE"], "gradient_clip_algorithm": "value"}
    fit(case, task, Batches(batches), record, 1, **(by_value if clip["ENABLED"] and not by_norm else {}))
    network = task.network.to(case["device"], dtype_of(case)).eval()
    names = _official_names(case)
    groups = param_groups(network, optim)
    decays = {names[name]: group["weight_decay"] for group in groups for name in group["names"]}
    with torch.no_grad():
        features = network.backbone(_batch([inputs["image_eval"]], resolved, case)["image"])
        logits, deltas = network.rpn.head([features[name] for name in network.rpn.levels])
    levels = {name: k for k, name in enumerate(network.rpn.levels)}
    outputs: dict[str, Tensor] = {f"eval_{name.replace('c', 'res')}": x for name, x in features.items()}
    outputs |= {f"eval_logits_{name.replace('c', 'res')}": logits[k] for name, k in levels.items()}
    outputs |= {f"eval_deltas_{name.replace('c', 'res')}": deltas[k] for name, k in levels.items()}
    return {
        **outputs,
        "loss": torch.stack(record.losses),
        **{f"loss:{name}": torch.stack([parts[name] for parts in record.parts]) for name in record.parts[0]},
        "lr": torch.tensor(record.rates, dtype=torch.float64),
        "weight_decay_by_sorted_name": torch.tensor([decays[name] for name in sorted(decays)], dtype=torch.float64),
        **{f"param:{names[name]}": p.detach() for name, p in network.named_parameters()},
        **{f"param:{names[name]}": b for name, b in network.named_buffers() if name in names},
    }


# ---------------------------------------------------------------------------------------------------------- functions


def box_ops(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    height, width = config["image_size"]
    dtype, device = dtype_of(case), case["device"]

    def boxes_from(uniform: Tensor, least: float) -> Tensor:
        side = uniform.new_tensor([width, height])
        corner = uniform[:, :2] * (side - least)
        return torch.cat([corner, (corner + least + uniform[:, 2:] * 0.6 * side).minimum(side)], dim=1)

    strides = config["strides"]
    grids = [torch.zeros(1, 1, -(-height // s), -(-width // s), dtype=dtype, device=device) for s in strides]
    anchors = torch.cat(AnchorGenerator(strides, config["sizes"], config["ratios"], config["offset"])(grids))
    truth, proposals = boxes_from(inputs["gt_uniform"], 10), boxes_from(inputs["proposal_uniform"], 4)
    iou = pairwise_iou(truth, anchors)
    index, labels = match(iou, config["thresholds"], config["labels"], low_quality=True)
    permute = permutation(inputs["perm_uniform"])
    positive, negative = sample_labels(labels, config["num_samples"], config["positive_fraction"], 0, permute)
    weights = _tuples(config["weights"])
    count = sum(name.startswith("feat") for name in inputs)
    maps = [inputs[f"feat{k}"] for k in range(count)]
    lowest = (height // maps[0].shape[2]).bit_length() - 1
    highest = lowest + count - 1
    half = len(proposals) // 2
    pooler = RoIPooler(
        [2 ** (lowest + k) for k in range(count)],
        PoolConfig(7, config["sampling_ratio"], POOLINGS[config["pooler"]]),
        config["canonical_size"],
    )
    logits, heatmaps = inputs["mask_logits"], inputs["heatmaps"]
    pasted = paste_masks((3 * logits[:, 0]).sigmoid(), proposals[: len(logits)], (height, width))
    polygons = [[polygon] for polygon in config["polygons"]]
    polygon_boxes = torch.tensor(config["polygon_boxes"], dtype=dtype, device=device)
    deltas = inputs["random_deltas"].unflatten(1, (-1, 4))
    return {
        "anchors": anchors,
        "gt_boxes": truth,
        "proposals": proposals,
        "iou": iou,
        "matched_gt": index,
        "match_labels": labels,
        "sampled_pos": positive,
        "sampled_neg": negative,
        "deltas": encode_boxes(truth[index], anchors, weights),
        "decoded": decode_boxes(deltas, proposals[:, None], weights).flatten(1),
        "levels": pyramid_levels(proposals, lowest, highest, config["canonical_size"]),
        "roi_features": pooler(maps, rois_of([proposals[:half], proposals[half:]])),
        "pasted_area": pasted.sum(dim=(1, 2)),
        "pasted_cols": pasted.sum(dim=1),
        "keypoints": heatmaps_to_keypoints(heatmaps, proposals[: len(heatmaps)]),
        "mask_targets": crop_masks(
            _ellipses(truth, height, width), torch.arange(len(truth)), truth * 0.9 + 2, config["mask_size"]
        ),
        "polygon_targets": crop_polygons(polygons, polygon_boxes, config["mask_size"]),
    }
