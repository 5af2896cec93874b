"""Runs the kinds of cases taken from PySlowFast: networks, heads, layouts, runs, schedules, sampling, scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.nn.resnet3d import RoIHead3d
from zoo.parity import Case, dtype_of, filled_inputs, gradients, load_filled, named, shared, train
from zoo.training import Optim, lr_at
from zoo.video.slowfast import (
    SlowFast,
    SlowFastClassification,
    SlowFastDetection,
    SlowFastMultiLabel,
    convert_official,
)

official = shared("pyslowfast")
TASKS = {"cross_entropy": SlowFastClassification, "bce_logit": SlowFastMultiLabel, "bce": SlowFastDetection}


def run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    for kind, mark in (
        (train_run, "train"),
        (official.sampling, "windows"),
        (official.frame_map, "groundtruth"),
        (official.multi_label, "threshold"),
    ):
        if mark in config:
            return kind(case)
    return network(case) if case["state"] else schedule(case)


# ----------------------------------------------------------------------------------------------------- networks, runs


def _video(inputs: dict[str, Tensor], names: list[str]) -> Any:
    """What the network takes: both pathways' frames, or those of the only one."""
    found = [inputs[name] for name in names]
    return found if len(found) > 1 else found[0]


def _by_video(which: Tensor, count: int) -> list[Tensor]:
    """The rows that belong to each of `count` videos."""
    return [(which == i).nonzero()[:, 0] for i in range(count)]


def _of_boxes(net: Any, video: Any, boxes: Tensor) -> Tensor:
    """Logits of rows (video, x1, y1, x2, y2), in their order."""
    rows = _by_video(boxes[:, 0], len(video[0] if isinstance(video, list) else video))
    return net(video, [boxes[r, 1:] for r in rows])[torch.cat(rows).argsort()]


def network(case: Case) -> dict[str, Tensor]:
    inputs = filled_inputs(case)
    net: Any = load_filled(official.create(case), case, convert_official)
    clips = [name for name, value in inputs.items() if value.ndim == 5]
    names = ["slow", "fast"] if isinstance(net, SlowFast) else [min(clips, key=len)]
    outputs: dict[str, Tensor] = {}
    if isinstance(net.head, RoIHead3d):
        for mode in ("eval", "train"):
            logits = _of_boxes(net.train(mode == "train"), _video(inputs, names), inputs["boxes"].to(dtype_of(case)))
            outputs |= {f"{mode}_logits": logits, f"{mode}_scores": official.probabilities(case, logits)}
        return outputs
    with torch.no_grad():
        net.eval()
        for name, suffix in (("", ""), ("_fullconv", "_large")):
            if f"{names[0]}{suffix}" not in inputs:
                continue
            features = net.forward_features(_video(inputs, [f"{name}{suffix}" for name in names]))
            outputs[f"eval_logits{name}"] = net.head.position_logits(features)
            outputs[f"eval_probs{name}"] = official.probabilities(case, net.forward_head(features))
        outputs["train_logits"] = net.train()(_video(inputs, names))
    if isinstance(net, SlowFast) and net.lateral[0].bn is not None:
        outputs["fuse_bn_mean_after"] = net.lateral[0].bn.running_mean
    return outputs | named(case, convert_official, buffer=net.state_dict(), grad=gradients(net))


def train_run(case: Case) -> dict[str, Tensor]:
    config, given, inputs = case["config"], official.settings(case), filled_inputs(case)
    net, names = official.create(case), config["train"]["pathways"]
    kind = TASKS[given["MODEL.LOSS_FUNC"]]
    with torch.device("meta"):  # its network gives way to the case's
        task: Any = kind(width=8, num_classes=net.num_classes, optim=official.optim(given))
    task.network = net
    for metrics in (task.val_metrics, task.test_metrics):
        metrics.to_empty(device=case.get("device", "cpu"))

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Any]:
        made = {"video": _video(step, names), "label": step["labels"]}
        if "boxes" in step:
            rows = _by_video(step["boxes"][:, 0], len(step[names[0]]))
            made["target"] = [{"boxes": step["boxes"][r, 1:], "labels": step["labels"][r]} for r in rows]
        return made

    def after() -> dict[str, Tensor]:
        video = _video(inputs, [f"{name}_eval" for name in names])
        logits = _of_boxes(net, video, inputs["boxes_eval"]) if "boxes_eval" in inputs else net(video)
        return {"eval_probs": official.probabilities(case, logits)}

    epochs, clipping = given["SOLVER.MAX_EPOCH"], official.clipping(given)
    return train(case, task, convert_official, batch, epochs=epochs, after=after, **clipping)


def schedule(case: Case) -> dict[str, Tensor]:
    given = official.settings(case)
    optim = Optim(**official.schedule(given))
    total, peak = given["SOLVER.MAX_EPOCH"], optim.peak_lr(1)
    return {"lr": torch.tensor([lr_at(optim, epoch, total, peak) for epoch in case["config"]["epochs"]]).double()}
