"""Runs the kinds of cases that were taken from the two official MeanFlow codes, JAX and PyTorch; everything else is
read from the case. Arrays of the JAX code have the channels last."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generation import meanflow as mf
from zoo.nn.autoencoder import SD_SCALE
from zoo.parity import Case, by_entry, filled_inputs, filled_state, gradients, load_filled, named, train
from zoo.training import EMA, Optim

# Settings of the two codes by our names, where these differ.
NET = {"input_size": "img_size", "in_channels": "in_chans", "hidden_size": "embed_dim", "img_resolution": "img_size"}
METHOD = {"noise_dist": "distribution", "P_mean": "mean", "P_std": "std", "data_proportion": "equal"}
METHOD |= {"class_dropout_prob": "label_dropout", "norm_p": "loss_power", "norm_eps": "loss_eps"}
TIMES = {"P_mean_t": "mean", "P_std_t": "std", "P_mean_r": "mean_r", "P_std_r": "std_r"}
DRAWS = {"noise_e": "noise", "ratio_uniform": "chance", "aug_cond": "augment"}
# Changes none of the outputs, or stands elsewhere too.
NO_NUMBER = {"jvp_fn", "num_steps", "num_classes", "dtype"}
# What the official U-Net could be, and MeanFlow's is.
FIXED = {"encoder_type": "standard", "decoder_type": "standard", "embedding_type": "positional"}
# Sizes that a case must give.
DIT = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")
UNET = ["model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout"]
UNET += ["channel_mult_noise", "resample_filter", "img_resolution", "in_channels", "out_channels"]


def _renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in given.items()}


def _first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


# ----------------------------------------------------------------------------------------------------- transformer, JAX


def _transformer_task(case: Case, **options: Any) -> mf.ClassConditionalMeanFlow:
    """What the case does not say of the method is a default of the official constructor, which are ours."""
    method = _renamed(case["config"].get("method", {}), METHOD)
    guided = method.pop("guidance_eq", "cfg") == "cfg"
    parts: list[dict[str, Any]] = []
    for kind in (mf.Guidance, mf.TimePairs):
        names = {field.name for field in fields(kind)} & method.keys()
        parts.append({name: method.pop(name) for name in names})
    guidance = mf.Guidance(**parts[0]) if guided else None
    options |= {name: value for name, value in method.items() if name not in NO_NUMBER}
    given = case["config"]["net"]
    net = _renamed({**given, **{name: given[name] for name in DIT}}, NET)
    task = mf.ClassConditionalMeanFlow(guidance=guidance, pairs=mf.TimePairs(**parts[1]), **net, **options)
    load_filled(task.network, case, mf.convert_official)
    return task


def dit_forward(case: Case) -> dict[str, Tensor]:
    inputs, network = filled_inputs(case), _transformer_task(case).network
    with torch.no_grad():
        return {"out": _last(network(_first(inputs["x"]), (inputs["t"], inputs["h"]), inputs["y"]))}


def sample_steps(case: Case) -> dict[str, Tensor]:
    inputs, network = filled_inputs(case), _transformer_task(case).network
    with torch.no_grad():
        states = mf.steps(network, _first(inputs["z"]), inputs["labels"], case["config"]["t_steps"])
        return {f"z_{k}": _last(z) for k, z in enumerate(states, start=1)}


def _drawn(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels and draws of a step, as a batch of ours names them."""
    times = {name: inputs[name].reshape(-1) for name in ("noise_t", "noise_r")}
    return {"label": inputs["labels"], "noise": _first(inputs["noise_e"]), "drop": inputs["drop_uniform"], **times}


def train_loss(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _transformer_task(case)
    out = task.loss({"image": _first(inputs["imgs"]), **_drawn(inputs)})
    out.loss.backward()
    found = gradients(task.network, zeros=True)
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    values = {"loss": out.loss, "v_loss": out.velocity_error, "grad_l2_all": norm}
    return values | named(case, mf.convert_official, grad=found)


def _optim(settings: Mapping[str, Any], **options: Any) -> Optim:
    decay = settings.get("weight_decay", 0.0)  # neither train.py has another
    return Optim(weight_decay=decay, no_decay="none", schedule="constant", **options)


def train_run(case: Case) -> dict[str, Tensor]:
    settings, inputs = case["config"]["train"], filled_inputs(case)
    betas = (settings.get("adam_b1", 0.9), settings["adam_b2"])  # optax.adamw's own first
    task = _transformer_task(case, optim=_optim(settings, lr=settings["learning_rate"], betas=betas))
    ema = EMA(settings["ema_val"])

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        mean, std = step["cached"].chunk(2, dim=-1)
        return {"image": _first((mean + std * step["vae_noise"]) * SD_SCALE), **_drawn(step)}

    def after() -> dict[str, Tensor]:
        with ema.applied(task):
            return {"ema_sample_1step": _last(task.network.sample(_first(inputs["z_eval"]), inputs["labels_eval"]))}

    values = {"v_loss": "velocity_error"}
    return train(case, task, mf.convert_official, batch, epochs=1, averages={"ema": ema}, values=values, after=after)


# ------------------------------------------------------------------------------------------------------ U-Net, PyTorch


def _unet_task(case: Case, **options: Any) -> mf.UnconditionalMeanFlow:
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
    task = mf.UnconditionalMeanFlow(augment=0.0, pairs=pairs, **_renamed(sizes, NET), **options)
    load_filled(task.network, case, mf.convert_official)
    return task


def unet_forward(case: Case) -> dict[str, Tensor]:
    inputs, network = filled_inputs(case), _unet_task(case).network.eval()
    with torch.no_grad():
        return {"u": network(inputs["x"], (inputs["t"], inputs["h"]), inputs.get("aug_cond"))}


def unet_loss(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _unet_task(case)
    out = task.loss({"image": inputs["x"], **_renamed(inputs, DRAWS)})
    out.loss.backward()
    return {"loss": out.loss, **named(case, mf.convert_official, grad=gradients(task.network))}


def _averages(case: Case) -> dict[str, EMA]:
    args = case["config"]["args"]
    decays = dict(zip(mf.AVERAGES, [args["ema_decay"], *args["ema_decays"]], strict=False))
    return {name: EMA(decay, every_n_steps=16, per_step=True, name=name) for name, decay in decays.items()}


def unet_ema(case: Case) -> dict[str, Tensor]:
    inputs, task, averages = filled_inputs(case), _unet_task(case), _averages(case)
    wanted = [(key, *re.fullmatch(r"ema(\d*)_(\d+)", key).groups()) for key in case["outputs"]]  # type: ignore[union-attr]
    outputs = {}
    for ema in averages.values():
        ema.start(task)
    for step in range(1, 1 + max(int(at) for _, _, at in wanted)):
        with torch.no_grad():
            task.network.map_layer0.weight += inputs["delta"]
        for ema in averages.values():
            ema.step(task)
        for key, which, at in wanted:
            if int(at) == step:
                outputs[key] = averages[f"net_ema{which}"].weights["network.map_layer0.weight"].clone()
    return outputs


def train_run_unet(case: Case) -> dict[str, Tensor]:
    settings, inputs = case["config"]["train"], filled_inputs(case)
    rate = {"lr": settings["lr"], "betas": tuple(settings["betas"]), "warmup_epochs": settings["warmup_epochs"]}
    optim = _optim(settings, name="adam", warmup_start_lr=1e-8, **rate)  # LinearLR's start_factor, to the peak
    task, averages = _unet_task(case, optim=optim), _averages(case)
    shown = averages[mf.AVERAGES[0]]
    for ema in averages.values():
        ema.steps = int(filled_state(case)["num_updates"])

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        return {"image": 2 * step["images"] - 1, **_renamed(step, DRAWS)}

    def after() -> dict[str, Tensor]:
        with shown.applied(task):
            times = (inputs["t_eval"], inputs["h_eval"])
            u = task.network(inputs["x_eval"], times, inputs.get("aug_cond_eval"))
        return {"ema_u": u, "num_updates": torch.tensor(shown.steps)}

    return train(case, task, mf.convert_official, batch, averages=averages, after=after)


run = by_entry(
    {
        "models.models_dit.DiT.__call__": dit_forward,
        "meanflow.MeanFlow.sample_one_step": sample_steps,
        "meanflow.MeanFlow.forward": train_loss,
        "train.train_step_with_vae (state as create_train_state builds it)": train_run,
        "models.unet.SongUNet.forward": unet_forward,
        "models.meanflow.MeanFlow.forward_with_loss": unet_loss,
        "models.ema.update_ema_net": unet_ema,
        "training.train_loop.train_one_epoch (as train.main sets it up)": train_run_unet,
    }
)
