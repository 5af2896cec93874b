"""Runs the kinds of cases that were taken from hustvl/MIMDet; everything else is read from the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.detection.vit_det_benchmark import (
    TappedViT,
    ViTConfig,
    ViTMaskRCNN,
    ViTMaskRCNNDetection,
    convert_official,
    fitted_bias,
    fitted_positions,
    position_table,
)
from zoo.nn.detection import FPN, FPNConfig, Subsample
from zoo.nn.detection.vit import SharedPositions
from zoo.ops.pos_embed import sincos_2d
from zoo.parity import Case, Config, dtype_of, filled_inputs, gradients, load_filled, named, shared
from zoo.parity.cases import Official
from zoo.training import Optim, lr_at, param_groups


def run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    return optimizer(case) if "base_lr" in config else position(case) if "checkpoint_grid" in config else backbone(case)


def vit(config: Config) -> dict[str, Any]:
    """Fields of a ViTConfig."""
    side = config["img_size"]
    same = (
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "window_size",
        "drop_path_rate",
        "init_values",
    )
    given = {name: config[name] for name in same}
    given |= {"img_size": tuple(side) if isinstance(side, list) else (side, side)}
    given["freeze_patch_embed"] = config.get("stop_grad_conv1", False)
    return given


class Backbone(nn.Module):
    """The pyramid under the name that it has in a detector."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        pyramid = FPNConfig(channels=config["out_channels"], norm="bn")
        self.backbone = FPN(TappedViT(ViTConfig(**vit(config))), pyramid, Subsample())


def backbone(case: Case) -> dict[str, Tensor]:
    inputs = filled_inputs(case)
    net: Any = load_filled(Backbone(case["config"]), case, convert_official).eval()
    taps, maps = net.backbone.bottom_up(inputs["image"]), net.backbone(inputs["image"])
    found = {f"s{n}": x for n, x in enumerate(taps.values())} | maps
    found["loss"] = torch.stack([x.square().mean() for x in maps.values()]).sum()[None]
    found["loss"].backward()
    evaluated = {name: gradient.clone() for name, gradient in gradients(net, zeros=True).items()}
    net.zero_grad()
    maps = net.train().backbone(inputs["image"])
    loss = torch.stack([(x - inputs[f"target_{name}"]).square().mean() for name, x in maps.items()]).sum()[None]
    loss.backward()
    found |= {"train_loss": loss, **{f"train_{name}": x for name, x in maps.items()}}
    trained, buffers = gradients(net, zeros=True), dict(net.named_buffers())
    return found | named(case, convert_official, grad=evaluated, train_grad=trained, buffer=buffers)


def position(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    patch, dim, window = config["patch_size"], config["embed_dim"], config["window_size"]
    square = (config["img_size_square"] // patch,) * 2
    high, wide = config["img_size_wide"]
    table = inputs["pos_embed"]
    shared = SharedPositions(config["num_heads"], window).to(dtype_of(case))
    shared.relative_position_bias_table.data = small = fitted_bias(inputs["beit_table"], (window, window))
    sizes = {name: config[name] for name in ("patch_size", "embed_dim", "depth", "num_heads", "window_size")}
    side = (config["img_size_square"],) * 2
    kinds: Any = ((side, "sincos"), ((high, wide), "sincos"), (side, "sincos_transposed"), (side, "zero"))
    with torch.device("meta"):
        nets = [TappedViT(ViTConfig(img_size=size, positions=start, **sizes)) for size, start in kinds]
    return {
        "resized_square": fitted_positions(table, square),
        "resized_wide": fitted_positions(table, (high // patch, wide // patch)),
        "regenerated_square": position_table("sincos_transposed", dim, square),
        "zeroed_square": position_table("zero", dim, square),
        "mae_table_square": sincos_2d(dim, square),
        "trainable": torch.tensor([net.pos_embed.requires_grad for net in nets], dtype=dtype_of(case)),
        "beit_windowed_table": small,
        "beit_global_table": fitted_bias(inputs["beit_table"], square),
        "windowed_bias": shared(window, window),
    }


def optimizer(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    channels, classes = config["out_channels"], config["num_classes"]
    parts: dict[str, Any] = {
        "vit": vit(config),
        "fpn": {"channels": channels, "norm": "bn"},
        "box": {"convs": 4, "conv_channels": channels, "fcs": 1, "fc_channels": config["fc_dim"], "norm": "bn"},
        "mask": {"channels": channels, "norm": "bn"},
    }
    official = Official(case, convert_official)
    optim = Optim(
        lr=config["base_lr"],
        betas=tuple(config["betas"]),
        weight_decay=config["weight_decay"],
        **shared("detectron2").decays(config, official.names, config["base_lr"]),
        schedule_from="start",
        warmup_start_lr=config["warmup_factor"] * config["base_lr"],
    )
    with torch.device("meta"):
        task = ViTMaskRCNNDetection(optim=optim, num_classes=classes, **parts)
    assert isinstance(task.network, ViTMaskRCNN)
    groups = param_groups(task.trainable(), optim)
    of = {name: group for group in groups for name in group["names"]}
    ours = [official.find(name) for name in sorted(official.names)]
    rows = [of[name] for name in ours if name in of]
    length = config["max_iter"]
    start = config["warmup_length"] * length
    rates = [lr_at(optim, k, length, config["base_lr"], warmup_epochs=start) for k in config["iters"]]
    # detectron2 merges the groups of one rate and decay.
    return {
        "lr": torch.tensor([row["lr_scale"] for row in rows], dtype=torch.float64),
        "weight_decay": torch.tensor([row["weight_decay"] for row in rows], dtype=torch.float64),
        "groups": torch.tensor([len({(group["lr_scale"], group["weight_decay"]) for group in groups})]),
        "lr_multiplier": torch.tensor(rates, dtype=torch.float64) / config["base_lr"],
    }
