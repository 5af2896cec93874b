"""Runs the kinds of cases taken from the official VARC: canvas, decoding and vote, schedule, ViT, U-Net."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.beyond.varc import VARCTraining, VARCUNet, VARCViT, convert_official, pixel_loss
from zoo.data.arc import BORDER, Pair, View, draw_view, evaluation_view, place, read_grid
from zoo.errors import unknown
from zoo.metrics.arc import vote
from zoo.ops.pos_embed import apply_rope
from zoo.parity import Case, filled_inputs, gradients, load_filled, named
from zoo.training import lr_at

UNET_SIZES = {"small": (160, 1, False), "medium": (240, 1, False), "big": (320, 2, True)}  # width, blocks, mid block


def run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    if "views" in config:
        return decode(case)
    if "model" in config:
        return unet(case) if "size" in config["model"] else vit(case)
    return canvas(case) if "draws" in config else schedule(case)


def canvas(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    grids = {name: grid.cpu().numpy() for name, grid in inputs.items()}
    pair, size = Pair(grids["input"], grids.get("output")), config["max_size"]
    draws, ranges = iter(config["draws"]), []

    def draw(low: int, high: int) -> int:
        ranges.append((low, high))
        return next(draws)

    found: dict[str, Any] = {}
    views = {"augmented": draw_view(pair, size, draw)}
    views["evaluation"] = evaluation_view(pair, size, config["fix_scale_factor"])
    for kind, view in views.items():
        placed = place(pair, size, view)
        found |= {f"{kind}_{name}": part for name, part in zip(("inputs", "mask", "targets"), placed, strict=True)}
        found[f"{kind}_offset_scale"] = np.array([view.x, view.y, view.scale])
    found["augmented_draw_ranges"] = np.array(ranges)
    return {name: torch.as_tensor(value.astype(np.float64)) for name, value in found.items()}


def decode(case: Case) -> dict[str, Tensor]:
    config, pixels = case["config"], filled_inputs(case)["pixels"].cpu().numpy()
    grids = []
    for number, about in enumerate(config["views"]):
        canvas = pixels[number % len(pixels)].copy()
        (x, y), (height, width) = about["offset"], about["border_at"]
        shown = canvas[y:, x:]
        shown[shown == BORDER] = 0
        if width < shown.shape[1]:
            shown[:, width] = BORDER
        if height < shown.shape[0]:
            shown[height] = BORDER
        colors = about["color_map"]
        mapping = None if colors is None else dict(enumerate(colors))
        grids.append(read_grid(canvas, View(about["scale"], x, y), about["suffix"], mapping))
    ranked = vote(grids[ballot] for ballot in config["ballots"])
    outputs = {f"grid_{number}": grid for number, grid in enumerate(grids)}
    outputs |= {"votes": np.array([count for _, count in ranked]), "winner": ranked[0][0]}
    if len(ranked) > 1:
        outputs["runner_up"] = ranked[1][0]
    return {name: torch.as_tensor(np.asarray(value, dtype=np.float64)) for name, value in outputs.items()}


def schedule(case: Case) -> dict[str, Tensor]:
    epochs, lr = case["config"]["epochs"], case["config"]["lr"]
    optim = VARCTraining(embed_dim=8, depth=1, num_heads=1, mlp_dim=8, img_size=4).optim
    warmup = min(epochs // 5, optim.warmup_epochs)
    rates = [lr_at(optim, epoch, epochs, lr, warmup) for epoch in range(epochs + 1)]
    return {"lr_of_epoch": torch.tensor(rates, dtype=torch.float64)}


def vit(case: Case) -> dict[str, Tensor]:
    options, inputs = dict(case["config"]["model"]), filled_inputs(case)
    options["img_size"] = options.pop("image_size")
    net = load_filled(VARCViT(**options), case, convert_official).eval()
    assert isinstance(net, VARCViT)
    canvas, task, mask = inputs["canvas"], inputs["task_ids"], inputs.get("mask")
    outputs = {"logits": net(canvas, task, mask), "logits_no_mask": net(canvas, task)}
    if "targets" in inputs:
        loss = net.loss(canvas, task, mask, inputs["targets"])  # of the patches that decide it, not from the logits
        loss.backward()
        outputs |= {"loss": loss, **_gradients(net, case)}
    if "q" in inputs:
        outputs["rope_of_q"] = apply_rope(inputs["q"], net.rope_cos, net.rope_sin)
    return outputs


def unet(case: Case) -> dict[str, Tensor]:
    options, inputs = dict(case["config"]["model"]), filled_inputs(case)
    size = options.pop("size")
    if size not in UNET_SIZES:
        raise unknown("size of the U-Net", size, UNET_SIZES)
    width, depth, mid_block = UNET_SIZES[size]
    options["img_size"] = options.pop("image_size")
    net = VARCUNet(embed_dim=width, depth=depth, num_heads=width // 40, mid_block=mid_block, **options)
    load_filled(net, case, convert_official).eval()
    logits = net(inputs["canvas"], inputs["task_ids"])
    outputs = {"logits": logits}
    if "targets" in inputs:
        loss = pixel_loss(logits, inputs["targets"])
        loss.backward()
        outputs |= {"loss": loss, **_gradients(net, case)}
    return outputs


def _gradients(net: torch.nn.Module, case: Case) -> dict[str, Tensor]:
    """Gradients by the short names that cases give them, and by official keys."""
    found = gradients(net)
    short = {"task_tokens": "task_embed.weight", "color_embed": "color_embed.weight", "head": "head.weight"}
    short |= {"positional_embed": "pos_embed", "patch_embed": "patch_embed.proj.weight"}
    official = named(case, convert_official, grad=found)
    return {**official, **{f"grad_{name}": found[ours] for name, ours in short.items() if ours in found}}
