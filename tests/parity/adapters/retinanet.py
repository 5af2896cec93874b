"""Runs the kinds of cases that were taken from detectron2's RetinaNet and fvcore; all else is read from the case."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoo.detection.retinanet import RetinaNet, RetinaNetDetection, convert_official
from zoo.errors import ZooError
from zoo.ops.focal import focal_loss, focal_loss_star
from zoo.parity import Case, filled_inputs, gradients, load_filled, named, shared, train

official = shared("detectron2")

_SAME = lambda value: value  # noqa: E731
_OWN = {  # RETINANET.*
    "IN_FEATURES": "levels", "NUM_CLASSES": "num_classes", "NUM_CONVS": "head.convs", "PRIOR_PROB": "head.prior",
    "IOU_THRESHOLDS": "loss.thresholds", "IOU_LABELS": "loss.labels", "BBOX_REG_WEIGHTS": "loss.box_weights",
    "FOCAL_LOSS_GAMMA": "loss.gamma", "SMOOTH_L1_LOSS_BETA": "loss.box_beta", "BBOX_REG_LOSS_TYPE": "loss.box_loss",
    "SCORE_THRESH_TEST": "inference.score_threshold", "TOPK_CANDIDATES_TEST": "inference.candidates",
    "NMS_THRESH_TEST": "inference.nms_threshold",
}  # fmt: skip
_ANCHORS = {"SIZES": "sizes", "ASPECT_RATIOS": "ratios", "OFFSET": "offset"}
FIELDS = {f"RETINANET.{theirs}": (ours, _SAME) for theirs, ours in _OWN.items()} | {
    "ROI_HEADS.NUM_CLASSES": ("roi.classes", _SAME),  # left out, as all of the R-CNNs' parts
    **{f"ANCHOR_GENERATOR.{key}": (f"anchors.{ours}", _SAME) for key, ours in _ANCHORS.items()},
    "RETINANET.NORM": ("head.norm", official.norm),
    "RETINANET.FOCAL_LOSS_ALPHA": ("loss.alpha", lambda alpha: alpha if alpha >= 0 else None),
    "TEST.DETECTIONS_PER_IMAGE": ("inference.detections", _SAME),
}
LOSSES: dict[str, Any] = {"focal": focal_loss, "focal_star": focal_loss_star}
ELSEWHERE = {"META_ARCHITECTURE": ("RetinaNet",), "BACKBONE.NAME": ("build_retinanet_resnet_fpn_backbone",)}


def run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    if "gammas" in config:
        return losses(case)
    return train_run(case) if "effective" in config else network(case)


def losses(case: Case) -> dict[str, Tensor]:
    """FL and FL* of logits and targets, and their gradients."""
    config, inputs = case["config"], filled_inputs(case)
    outputs = {}
    for (name, loss), alpha, gamma in product(LOSSES.items(), config["alphas"], config["gammas"]):
        x = (3 * inputs["logits"]).requires_grad_()
        y = (inputs["targets"] < config["positive_rate"]).to(x.dtype)
        value = loss(x, y, alpha if alpha >= 0 else None, gamma)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        key = f"{name}_a{alpha}_g{gamma}"
        outputs |= {key: value, f"{key}_grad": gradient}
    return outputs


def given(model: dict[str, Any], further: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a case, flat: a resolved config, or what it overrides of a published one of ImageNet's pixels."""
    if "resolved" in model:
        return official.settings(model)[1]
    if "retinanet_R_" not in (base := model["base_config"]):
        raise ZooError(f"no network of ours for the base config {base!r}")
    depth = int(base.split("retinanet_R_")[1].split("_")[0])
    start = {"RESNETS.DEPTH": depth, official.MEAN: [103.53, 116.28, 123.675], official.STD: [1.0, 1.0, 1.0]}
    return start | official.settings({"resolved": {**(further or {}), **model["overrides"]}})[1]


def options(settings: dict[str, Any], images: int) -> dict[str, Any]:
    """Our network's; the normaliser of a batch of so many images starts at 100."""
    known = {"num_classes", "resnet", "fpn", "levels", "anchors", "head", "loss", "inference"}
    made = {key: value for key, value in official.options(settings, FIELDS, ELSEWHERE).items() if key in known}
    if "sizes" in made.get("anchors", {}):  # the settings name every size
        made["anchors"]["scales_per_octave"] = 1
    made.setdefault("loss", {})["initial"] = 100 / images
    return made


def network(case: Case) -> dict[str, Tensor]:
    """Assignment, losses of two steps and gradients, or maps and detections."""
    config, inputs = case["config"], filled_inputs(case)
    settings = given(config)
    made = RetinaNet(**options(settings, len(config["image_sizes"])))
    net: Any = load_filled(made, case, convert_official).train(config["training"])
    images = [inputs[f"image{n}"] for n in range(len(config["image_sizes"]))]
    batch = official.batch(images, settings, net.size_divisibility, case)
    if config["training"]:
        return steps(case, net, {**batch, "target": official.targets(config, case)})
    with torch.no_grad():
        return evaluate(case, net, batch)


def steps(case: Case, net: RetinaNet, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The losses of the same batch again and again: the normaliser moves."""
    anchors = torch.cat(net.predict(batch["image"])[0])
    assigned = net.assign(anchors, batch["target"])
    sums = [pad(target["boxes"].sum(dim=1), (0, 1)) for target in batch["target"]]  # 0 where there are no objects
    matched = torch.stack([x[index] for x, index in zip(sums, assigned.objects, strict=True)])
    outputs = {"anchor_labels": assigned.labels, "matched_boxes_sum": matched}
    count = sum(key.startswith("normalizer_step") for key in case["outputs"])
    for step in range(1, count + 1):
        found = net(batch)
        outputs |= {f"{key}_step{step}": value for key, value in found.items()}
        outputs[f"normalizer_step{step}"] = net.normalizer * len(batch["image"])
    torch.stack(list(found.values())).sum().backward()
    return outputs | named(case, convert_official, grad=gradients(net))


def evaluate(case: Case, net: RetinaNet, batch: dict[str, Any]) -> dict[str, Tensor]:
    config = case["config"]
    anchors, logits, deltas = net.predict(batch["image"])
    outputs = {f"feature_{name}": x for name, x in net.backbone(batch["image"]).items()} | {
        "anchors": torch.cat(anchors)
    }
    for name, scores, moves in zip(net.levels, logits, deltas, strict=True):
        outputs |= {f"logits_{name}": scores, f"deltas_{name}": moves}
    sizes = zip(net.detect(batch), config["image_sizes"], config["output_sizes"], strict=True)
    for n, (found, size, original) in enumerate(sizes):
        outputs |= {f"boxes{n}": found["boxes"], f"scores{n}": found["scores"], f"classes{n}": found["labels"]}
        outputs[f"final_boxes{n}"] = net.postprocess(found, size, original)["boxes"]
    return outputs


def train_run(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    model, effective = config["model"], config["effective"]
    solver, images = effective["SOLVER"], len(model["image_sizes"])
    settings = given(model, {key: entry for key, entry in effective.items() if key.startswith("MODEL.")})
    clip_each, clipping = official.clipping(solver)
    task = RetinaNetDetection(**options(settings, images), optim=official.optim(solver), clip_each=clip_each)
    net = task.network

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Any]:
        made = official.batch([step[f"image{n}"] for n in range(images)], settings, net.size_divisibility, case)
        return {**made, "target": official.targets(model, case, k)}

    def after() -> dict[str, Tensor]:
        image = official.batch([inputs["image_eval"]], settings, net.size_divisibility, case)["image"]
        _, logits, deltas = net.predict(image)
        found = {f"eval_{name}": x for name, x in net.backbone(image).items()}
        for name, scores, moves in zip(net.levels, logits, deltas, strict=True):
            found |= {f"eval_logits_{name}": scores, f"eval_deltas_{name}": moves}
        return found

    whole = {**case, "config": {**config, "train": {"iterations": solver["MAX_ITER"], **config.get("train", {})}}}
    return train(whole, task, convert_official, batch, epochs=1, after=after, **clipping)
