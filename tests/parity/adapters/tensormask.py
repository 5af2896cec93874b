"""Runs the kinds of cases taken from detectron2's project TensorMask; everything else is read from the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.detection.tensormask import TensorMask, TensorMaskDetection, assign_windows, convert_official
from zoo.nn.detection.rpn import AnchorGenerator
from zoo.ops.tensor_masks import swap_align2nat
from zoo.parity import Case, Config, filled_inputs, gradients, load_filled, named, shared, train

official = shared("detectron2")

NAMES = {
    "head": "convs NUM_CONVS cls_channels CLS_CHANNELS box_channels BBOX_CHANNELS mask_channels MASK_CHANNELS"
    " aligned ALIGNED_ON bipyramid BIPYRAMID_ON",
    "loss": "box_weights BBOX_REG_WEIGHTS gamma FOCAL_LOSS_GAMMA mask_weight MASK_LOSS_WEIGHT positive_weight"
    " POSITIVE_WEIGHT",
    "inference": "score_threshold SCORE_THRESH_TEST candidates TOPK_CANDIDATES_TEST nms_threshold NMS_THRESH_TEST",
    "windows": "levels IN_FEATURES",
}
FIELDS: dict[str, Any] = {
    "TENSOR_MASK.FOCAL_LOSS_ALPHA": ("loss.alpha", lambda alpha: alpha if alpha >= 0 else None),
    "TENSOR_MASK.NUM_CLASSES": ("num_classes", lambda value: value),
    "ANCHOR_GENERATOR.SIZES": ("windows.sizes", lambda value: value),
    "TEST.DETECTIONS_PER_IMAGE": ("inference.detections", lambda value: value),
}
for part, names in NAMES.items():
    ours, theirs = names.split()[::2], names.split()[1::2]
    FIELDS |= {f"TENSOR_MASK.{b}": (f"{part}.{a}", lambda value: value) for a, b in zip(ours, theirs, strict=True)}
# Settings that the project's code does not read, or that have one value there.
ELSEWHERE: dict[str, Any] = {
    "META_ARCHITECTURE": ("TensorMask",),
    "BACKBONE.NAME": ("build_retinanet_resnet_fpn_backbone",),
    "ANCHOR_GENERATOR.ASPECT_RATIOS": ([[1.0]],),
}
# Those of the base config, where a case tells only how it differs.
BASE: dict[str, Any] = {
    "PIXEL_MEAN": [103.53, 116.28, 123.675],
    "PIXEL_STD": [1.0, 1.0, 1.0],
    "FPN.FUSE_TYPE": "avg",
    "TENSOR_MASK.TOPK_CANDIDATES_TEST": 6000,
}


def run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    if "lambdas" in config:
        return swaps(case)
    if "scale_thresh" in config:
        return assignment(case)
    return train_run(case) if "effective" in config else network(case)


def settings(model: Config, further: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(The settings of a case, our network's options)."""
    if "resolved" in model:
        given = official.settings(model)[1]
    else:
        flat = {**(further or {}), **model["overrides"]}
        given = Config({**BASE, **{key.removeprefix("MODEL."): value for key, value in flat.items()}})
    found = official.options(given, FIELDS, ELSEWHERE)
    if not given.get("MASK_ON", True):
        found.setdefault("head", {})["masks"] = False
    return given, {key: value for key, value in found.items() if key not in ("rpn", "mask", "keypoint")}


def network(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    given, options = settings(config)
    net: Any = load_filled(TensorMask(**options), case, convert_official).train(config["training"])
    images = range(len(config["image_sizes"]))
    batch = official.batch([inputs[f"image{n}"] for n in images], given, net.size_divisibility, case)
    if config["training"]:
        losses = net({**batch, "target": official.targets(config, case)})
        (total := sum(losses.values())).backward()
        return {**losses, "total": total, **named(case, convert_official, grad=gradients(net))}
    with torch.no_grad():
        return evaluate(case, net, batch)


def evaluate(case: Case, net: TensorMask, batch: dict[str, Any]) -> dict[str, Tensor]:
    config, features = case["config"], net.features(batch["image"])
    outputs = {f"feature_{name}": x for name, x in zip(net.windows.levels, features, strict=True)}
    for level, (logits, deltas) in enumerate(zip(*net.head(features), strict=True)):
        outputs |= {f"logits{level}": logits, f"deltas{level}": deltas}
    for level, tensors in enumerate(net.head.natural_masks(features) if net.head.config.masks else []):
        outputs |= {f"masks_level{level}_window{window}": masks for window, masks in enumerate(tensors)}
    anchors = net.anchors(features)
    index = torch.arange(sum(map(len, anchors)))
    cells = net.cells(features, torch.zeros_like(index), index)
    lengths = torch.tensor(net.anchors.strides)[cells.level]
    outputs |= {"anchors": torch.cat(anchors), "unit_lengths": lengths, "indexes": torch.stack(cells, dim=1)}
    sizes = zip(net.detect(batch), config["image_sizes"], config["output_sizes"], strict=True)
    for n, (found, size, original) in enumerate(sizes):
        outputs |= {f"boxes{n}": found["boxes"], f"scores{n}": found["scores"], f"classes{n}": found["labels"]}
        outputs[f"windows{n}"], final = found["windows"], net.postprocess(found, size, original)
        outputs[f"final_boxes{n}"] = final["boxes"]
        if "mask_probs" in found:
            outputs[f"mask_means{n}"] = features[0].new_tensor([mask.mean() for mask in found["mask_probs"]])
            outputs[f"mask_sizes{n}"] = torch.tensor([len(mask) for mask in found["mask_probs"]])
            outputs[f"final_mask_area{n}"] = final["masks"].sum(dim=(1, 2))
    return outputs


def assignment(case: Case) -> dict[str, Tensor]:
    config, uniform = case["config"], filled_inputs(case)["gt_uniform"]
    height, width = config["image_size"]
    side = uniform.new_tensor([width, height])
    corner = uniform[:, :2] * (side - 10)
    boxes = torch.cat([corner, (corner + 8 + uniform[:, 2:] * 0.5 * side).minimum(side)], dim=1)
    grids = [uniform.new_zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in config["strides"]]
    windows = AnchorGenerator(config["strides"], config["sizes"], [[1.0]])(grids)
    units = torch.cat([x.new_full((len(x),), stride) for x, stride in zip(windows, config["strides"], strict=True)])
    found = {"gt_boxes": boxes}
    rules = config["min_anchor_size"], config["scale_thresh"], config["spatial_thresh"]
    for unique in (True, False):
        index, labels = assign_windows(boxes, torch.cat(windows), units, *rules, unique)
        found |= {f"matches_unique_{unique}": index, f"labels_unique_{unique}": labels}
    return found


def swaps(case: Case) -> dict[str, Tensor]:
    found, inputs = {}, filled_inputs(case)
    for n, scale in enumerate(case["config"]["lambdas"]):
        x = inputs[f"x{n}"].requires_grad_()
        y = swap_align2nat(x, scale, case["config"]["pad_val"])
        found |= {f"y{n}": y, f"grad{n}": torch.autograd.grad(y.square().sum() / 2, x)[0]}
    return found


def train_run(case: Case) -> dict[str, Tensor]:
    config, effective = case["config"], case["config"]["effective"]
    model, solver = config["model"], effective["SOLVER"]
    given, options = settings(model, {key: entry for key, entry in effective.items() if key.startswith("MODEL.")})
    clip_each, clipping = official.clipping(solver)
    task = TensorMaskDetection(**options, optim=official.optim(solver), clip_each=clip_each)
    net = task.network

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Any]:
        images = range(len(model["image_sizes"]))
        made = official.batch([step[f"image{n}"] for n in images], given, net.size_divisibility, case)
        return {**made, "target": official.targets(model, case, k)}

    run = {"iterations": solver["MAX_ITER"], **config.get("train", {})}
    return train({**case, "config": {**config, "train": run}}, task, convert_official, batch, epochs=1, **clipping)
