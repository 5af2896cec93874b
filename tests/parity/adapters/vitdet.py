"""Runs the kinds of cases that were taken from ViTDet in facebookresearch/detectron2, whose keys are flat; everything
else is read from the case."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zoo.detection import vitdet
from zoo.detection.vitdet import PyramidConfig, ViTDet, ViTDetDetection, ViTPyramid, convert_official
from zoo.errors import ZooError
from zoo.nn.detection import configured
from zoo.nn.detection.vit import ViTConfig
from zoo.parity import Case, Config, filled_inputs, gradients, load_filled, named, shared, train
from zoo.training import Optim
from zoo.training.optim import lr_at, param_groups

official = shared("detectron2")
RGB = {official.MEAN: [123.675, 116.28, 103.53], official.STD: [58.395, 57.12, 57.375]}
RPN = {"sizes": "anchor_sizes", "pre_nms": "pre_nms_topk", "post_nms": "post_nms_topk", "samples": "rpn_batch"}
SAME = ("img_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "window_size", "patch_size")


def run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    if "train" in config:
        return train_run(case)
    if "iters" in config:
        return optimizer(case)
    return network(case) if "training" in config else backbone(case)


def vit(config: Config) -> ViTConfig:
    windowed = config["window_block_indexes"]
    own: dict[str, Any] = {name: config[name] for name in SAME if name in config}
    own["global_blocks"] = tuple(k for k in range(config["depth"]) if k not in windowed)
    own["conv_blocks"] = tuple(config["residual_block_indexes"])
    own["pos_grid"] = config["pretrain_img_size"] // own.get("patch_size", 16)
    return ViTConfig(**own, drop_path=config.get("drop_path_rate", 0.0))


def options(config: Config) -> dict[str, Any]:
    """Our network's options for the flat keys of a detector."""
    match = re.search(r"/((?:cascade_)?mask_rcnn_vitdet_[blh])_", config["base_config"])
    if match is None:
        raise ZooError(f"no network of ours for the base config {config['base_config']!r}")
    given: dict[str, Any] = {"vit": vars(vit(config)), "num_classes": config["num_classes"]}
    given["pyramid"] = given["mask"] = {"channels": config["out_channels"]}
    given["roi"] = {"samples": config["roi_batch"], "detections": config["topk"]}
    given["rpn"] = {ours: config[theirs] for ours, theirs in {**RPN, "box_weights": "rpn_box_weights"}.items()}
    given["box"] = {"conv_channels": config["out_channels"], "fc_channels": config["fc_dim"]}
    if "LVIS" in config["base_config"]:
        given["roi"]["score_threshold"] = 0.02
        given["box"] |= {"sigmoid": True, "federated": 50}
    with torch.device("meta"):
        return getattr(vitdet, match[1])(**given).options


def divisibility(config: Config) -> int:
    return config["square_pad"] or 2 * config.get("patch_size", 16)


def backbone(case: Case) -> dict[str, Tensor]:
    """Tokens and levels, and gradients of the sum over levels of their mean square."""
    pyramid = configured(PyramidConfig, {"channels": case["config"]["out_channels"]})
    # The case's names are those within a backbone.
    stem = "backbone."

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = convert_official({f"{stem}{key}": value for key, value in state.items()})
        return {key.removeprefix(stem): value for key, value in renamed.items()}

    net: Any = load_filled(ViTPyramid(vit(case["config"]), pyramid), case, convert).eval()
    image = filled_inputs(case)["image"]
    levels = net(image)
    sum(x.square().mean() for x in levels.values()).backward()
    return {"tokens": net.bottom_up(image)["last"], **levels, **named(case, convert, grad=gradients(net))}


def network(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    net: Any = load_filled(ViTDet(**options(config)), case, convert_official).train(config["training"])
    return official.network(case, net, RGB, divisibility(config), convert_official)


def optim(solver: Config, base_lr: float, state: Iterable[str], factor: float, values: list[float]) -> Optim:
    """AdamW and its schedule; `factor` of the warm-up and `values` where the case has none."""
    values, milestones = solver.get("lr_values", values), tuple(solver["milestones"])
    factors = tuple(value / values[0] for value in values[1 : len(milestones) + 1])
    return Optim(
        name="adamw",
        lr=base_lr * values[0],
        betas=tuple(solver.get("betas", (0.9, 0.999))),
        weight_decay=solver["weight_decay"],
        layer_decay=solver["lr_decay_rate"],
        schedule="step",
        milestone_steps=milestones,
        factors=factors,
        warmup_steps=min(solver["warmup_iters"], solver["max_iter"]),
        warmup_start_lr=base_lr * solver.get("warmup_factor", factor) * values[0],
        **official.decays(solver, state, base_lr),
    )


def optimizer(case: Case) -> dict[str, Tensor]:
    """Each parameter's rate and decay, by sorted official name, and the schedule."""
    config, state = case["config"], case["state"]
    kind = "cascade_mask_rcnn" if "roi_heads.box_head.0.conv1.weight" in state else "mask_rcnn"
    blocks = {"depth": config["depth"], "conv_blocks": tuple(config["residual_block_indexes"]), "global_blocks": ()}
    with torch.device("meta"):  # names alone matter
        net = getattr(vitdet, f"{kind}_vitdet_b")(vit={"embed_dim": 24, **blocks})
    rule = optim(config, config["base_lr"], state, 0.001, [1.0, 0.1, 0.01])
    of = {name: group for group in param_groups(net, rule) for name in group["names"]}
    ours = [next(iter(convert_official({key: torch.empty(0)}))) for key in sorted(state)]
    if set(ours) != set(of):
        raise ZooError(f"other parameters: {sorted(set(ours) ^ set(of))[:3]}")
    steps, peak = config["max_iter"], rule.peak_lr(1)
    rates = [lr_at(rule, t, steps, peak, rule.warmup_steps, rule.milestone_steps) for t in config["iters"]]
    found = {key: [of[name][entry] for name in ours] for key, entry in (("lr", "lr_scale"), ("weight_decay",) * 2)}
    found["lr_multiplier"] = [rate / config["base_lr"] for rate in rates]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def train_run(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    model, solver = config["model"], config["train"]
    iterations = solver["max_iter"]
    rule = optim(solver, solver["lr"], case["state"], solver["warmup_factor"], solver["lr_values"])
    task = ViTDetDetection(**options(model), optim=rule)
    net = task.network

    def step(given: dict[str, Tensor], k: int) -> dict[str, Any]:
        images = [given[f"image{n}"] for n in range(len(model["image_sizes"]))]
        made = official.batch(images, RGB, divisibility(model), case)
        return {**made, "target": official.targets(model, case, k), "noise": given["perm_uniform"]}

    def after() -> dict[str, Tensor]:
        made = official.batch([inputs["image_eval"]], RGB, divisibility(model), case)
        features = net.backbone(made["image"])
        return {f"eval_{name}": x for name, x in features.items()}

    whole = {**case, "config": {**config, "train": {"iterations": iterations, **solver}}}
    return train(whole, task, convert_official, step, epochs=1, after=after)
