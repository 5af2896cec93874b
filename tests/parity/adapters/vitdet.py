"""Runs the kinds of cases that were taken from ViTDet in facebookresearch/detectron2, whose keys are flat; everything
else is read from the case."""

from __future__ import annotations

import math
import re
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
    base = config["base_config"].rpartition("/")[2]
    match = re.match(r"((?:cascade_)?mask_rcnn_vitdet_[blh])_", base)
    if match is None:
        raise ZooError(f"no network of ours for the base config {base!r}")
    given: dict[str, Any] = {"vit": vars(vit(config)), "num_classes": config["num_classes"]}
    given["pyramid"] = {"channels": config["out_channels"]}
    given["rpn"] = {
        "sizes": config["anchor_sizes"],
        "pre_nms": config["pre_nms_topk"],
        "post_nms": config["post_nms_topk"],
        "samples": config["rpn_batch"],
        "box_weights": config["rpn_box_weights"],
    }
    given["roi"] = {"samples": config["roi_batch"], "detections": config["topk"]}
    given["box"] = {"conv_channels": config["out_channels"], "fc_channels": config["fc_dim"]}
    given["mask"] = {"channels": config["out_channels"]}
    if "LVIS" in config["base_config"]:
        given["roi"]["score_threshold"] = 0.02
        given["box"] |= {"sigmoid": True, "federated": 50}
    with torch.device("meta"):
        return getattr(vitdet, match[1])(**given).options


def batch(images: list[Tensor], config: Config, case: Case) -> dict[str, Any]:
    return official.batch(images, RGB, config["square_pad"], case)


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
    """Losses and gradients of a batch, or proposals and detections."""
    config, inputs = case["config"], filled_inputs(case)
    net: Any = load_filled(ViTDet(**options(config)), case, convert_official).train(config["training"])
    images = [inputs[f"image{n}"] for n in range(len(config["image_sizes"]))]
    made = batch(images, config, case)
    if config["training"]:
        losses = net({**made, "target": official.targets(config, case)}, inputs["perm_uniform"])
        total = sum(losses.values())
        total.backward()
        return {**losses, "total": total, **named(case, convert_official, grad=gradients(net))}
    with torch.no_grad():
        return evaluate(case, net, made)


def evaluate(case: Case, net: ViTDet, made: dict[str, Any]) -> dict[str, Tensor]:
    config = case["config"]
    features, proposals = net.propose(made)
    outputs = {f"feature_{name}": x for name, x in features.items()}
    for n, one in enumerate(proposals):
        outputs |= {f"proposals{n}": one.boxes, f"proposal_logits{n}": one.logits}
    for n, (found, size, whole) in enumerate(
        zip(net.detect(made), config["image_sizes"], config["output_sizes"], strict=True)
    ):
        outputs |= {f"boxes{n}": found["boxes"], f"scores{n}": found["scores"], f"classes{n}": found["labels"]}
        final = net.postprocess(found, size, whole)
        outputs |= {f"mask_probs{n}": found["mask_probs"][:, None], f"final_boxes{n}": final["boxes"]}
        outputs[f"final_mask_area{n}"] = final["masks"].sum(dim=(1, 2))
    return outputs


def optim(solver: Config, iterations: int, lr: float, factor: float, values: list[float]) -> Optim:
    """AdamW by detectron2's groups: norms as `weight_decay_norm`, overrides by leaf name."""
    spared = solver.get("weight_decay_norm", 0.0) is not None
    overrides = solver["overrides"]
    if overrides not in ({}, {"pos_embed": {"weight_decay": 0.0}}) or spared != bool(overrides):
        raise ZooError(f"groups of weight decay with overrides {overrides} and norms spared: {spared} are not built")
    return Optim(
        name="adamw",
        lr=lr,
        betas=tuple(solver.get("betas", (0.9, 0.999))),
        weight_decay=solver["weight_decay"],
        no_decay="norm" if spared else "none",
        layer_decay=solver["lr_decay_rate"],
        schedule="step",
        milestone_steps=tuple(solver["milestones"]),
        factors=tuple(value / values[0] for value in values[1:]),
        warmup_steps=min(solver["warmup_iters"], iterations),
        warmup_start_lr=lr * factor * values[0],
    )


def optimizer(case: Case) -> dict[str, Tensor]:
    """Each parameter's rate and decay, by sorted official name, and the schedule."""
    config, state = case["config"], case["state"]

    def shape(key: str) -> list[int]:
        return state[key]["shape"]

    name = "backbone.net.blocks.0.attn.rel_pos_h"
    dim, width = shape("backbone.net.pos_embed")[-1], shape(name)[-1]
    predictor = "roi_heads.box_predictor.cls_score.weight"
    vit_config = {
        "embed_dim": dim, "depth": config["depth"], "num_heads": dim // width, "window_size": 14,
        "global_blocks": (), "conv_blocks": tuple(config["residual_block_indexes"]),
        "mlp_ratio": shape("backbone.net.blocks.0.mlp.fc1.weight")[0] / dim,
        "pos_grid": math.isqrt(shape("backbone.net.pos_embed")[1]),
    }  # fmt: skip
    channels = shape("backbone.simfp_4.0.weight")[0]
    with torch.device("meta"):
        net = vitdet.mask_rcnn_vitdet_b(
            vit=vit_config, pyramid={"channels": channels}, num_classes=shape(predictor)[0] - 1,
            box={"conv_channels": channels, "fc_channels": shape(predictor)[1]}, mask={"channels": channels},
        )  # fmt: skip
    chosen = optim(config, config["max_iter"], config["base_lr"], 0.001, [1.0, 0.1, 0.01])
    found = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in param_groups(net, chosen)
        for name in group["names"]
    }
    ours = {key: next(iter(convert_official({key: torch.empty(0)}))) for key in sorted(state)}
    if set(ours.values()) != set(found):
        raise ZooError(f"other parameters: {sorted(set(ours.values()) ^ set(found))[:3]}")
    scales, decays = zip(*(found[name] for name in ours.values()), strict=True)
    warmup, milestones = chosen.warmup_steps, chosen.milestone_steps
    peak = chosen.peak_lr(1)
    factors = [lr_at(chosen, t, config["max_iter"], peak, warmup, milestones) / peak for t in config["iters"]]
    found_of = {"lr": scales, "weight_decay": decays, "lr_multiplier": factors}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found_of.items()}


def train_run(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    model, solver = config["model"], config["train"]
    iterations = solver["max_iter"]
    rule = optim(solver, iterations, solver["lr"], solver["warmup_factor"], solver["lr_values"])
    task = ViTDetDetection(**options(model), optim=rule)
    net = task.network

    def step(given: dict[str, Tensor], k: int) -> dict[str, Any]:
        images = [given[f"image{n}"] for n in range(len(model["image_sizes"]))]
        made = batch(images, model, case)
        return {**made, "target": official.targets(model, case, k), "noise": given["perm_uniform"]}

    def after() -> dict[str, Tensor]:
        features = net.backbone(batch([inputs["image_eval"]], model, case)["image"])
        return {f"eval_{name}": x for name, x in features.items()}

    whole = {**case, "config": {**config, "train": {"iterations": iterations, **solver}}}
    return train(whole, task, convert_official, step, epochs=1, after=after)
