"""Cases of py-meanflow, the PyTorch code of MeanFlow on CIFAR-10: its U-Net, loss, averages and runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generation import meanflow as mf
from zoo.parity import Case, filled_inputs, filled_state, gradients, load_filled, named, train
from zoo.training import EMA, Optim

# Settings by our names, where these differ.
NET = {"in_channels": "in_chans", "img_resolution": "img_size"}
TIMES = {"P_mean_t": "mean", "P_std_t": "std", "P_mean_r": "mean_r", "P_std_r": "std_r"}
DRAWS = {"noise_e": "noise", "ratio_uniform": "chance", "aug_cond": "augment"}
# What the U-Net could be, and MeanFlow's is.
FIXED = {"encoder_type": "standard", "decoder_type": "standard", "embedding_type": "positional"}
# Sizes that a case must give.
UNET = ["model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout"]
UNET += ["channel_mult_noise", "resample_filter", "img_resolution", "in_channels", "out_channels"]


def renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in given.items()}


def optim(settings: Mapping[str, Any], **options: Any) -> Optim:
    decay = settings.get("weight_decay", 0.0)  # neither official train.py has another
    return Optim(weight_decay=decay, no_decay="none", schedule="constant", **options)


def task_of(case: Case, **options: Any) -> mf.UnconditionalMeanFlow:
    net, args = case["config"]["net"], case["config"]["args"]
    sizes = {name: net[name] for name in UNET}
    fixed = FIXED | {"out_channels": sizes["in_channels"]}
    if odd := [name for name, value in fixed.items() if net.get(name, value) != value]:
        raise ZooError(f"a network that MeanFlow does not have: {odd}")
    del sizes["out_channels"]
    order: Any = "sort" if args["tr_sampler"] == "v0" else "clamp"
    times = {ours: args[theirs] for theirs, ours in TIMES.items()}
    options |= {"loss_power": args["norm_p"], "loss_eps": args["norm_eps"], "augment_dim": net.get("augment_dim", 0)}
    pairs = mf.TimePairs(equal=1 - args["ratio"], equal_by="chance", order=order, **times)
    task = mf.UnconditionalMeanFlow(augment=0.0, pairs=pairs, **renamed(sizes, NET), **options)
    load_filled(task.network, case, mf.convert_official)
    return task


def forward(case: Case) -> dict[str, Tensor]:
    inputs, network = filled_inputs(case), task_of(case).network.eval()
    with torch.no_grad():
        return {"u": network(inputs["x"], (inputs["t"], inputs["h"]), inputs.get("aug_cond"))}


def loss(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), task_of(case)
    out = task.loss({"image": inputs["x"], **renamed(inputs, DRAWS)})
    out.loss.backward()
    return {"loss": out.loss, **named(case, mf.convert_official, grad=gradients(task.network))}


def _averages(case: Case) -> dict[str, EMA]:
    args = case["config"]["args"]
    decays = dict(zip(mf.AVERAGES, [args["ema_decay"], *args["ema_decays"]], strict=False))
    return {name: EMA(decay, every_n_steps=16, per_step=True, name=name) for name, decay in decays.items()}


def ema(case: Case) -> dict[str, Tensor]:
    inputs, task, averages = filled_inputs(case), task_of(case), _averages(case)
    wanted = [(key, *re.fullmatch(r"ema(\d*)_(\d+)", key).groups()) for key in case["outputs"]]  # type: ignore[union-attr]
    outputs = {}
    for average in averages.values():
        average.start(task)
    for step in range(1, 1 + max(int(at) for _, _, at in wanted)):
        with torch.no_grad():
            task.network.map_layer0.weight += inputs["delta"]
        for average in averages.values():
            average.step(task)
        for key, which, at in wanted:
            if int(at) == step:
                outputs[key] = averages[f"net_ema{which}"].weights["network.map_layer0.weight"].clone()
    return outputs


def train_run(case: Case) -> dict[str, Tensor]:
    settings, inputs = case["config"]["train"], filled_inputs(case)
    rate = {"lr": settings["lr"], "betas": tuple(settings["betas"]), "warmup_epochs": settings["warmup_epochs"]}
    declared = optim(settings, name="adam", warmup_start_lr=1e-8, **rate)  # LinearLR's start_factor, to the peak
    task, averages = task_of(case, optim=declared), _averages(case)
    shown = averages[mf.AVERAGES[0]]
    for average in averages.values():
        average.steps = int(filled_state(case)["num_updates"])

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        return {"image": 2 * step["images"] - 1, **renamed(step, DRAWS)}

    def after() -> dict[str, Tensor]:
        with shown.applied(task):
            times = (inputs["t_eval"], inputs["h_eval"])
            u = task.network(inputs["x_eval"], times, inputs.get("aug_cond_eval"))
        return {"ema_u": u, "num_updates": torch.tensor(shown.steps)}

    return train(case, task, mf.convert_official, batch, averages=averages, after=after)
