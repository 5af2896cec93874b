"""Runs the kinds of cases that were taken from the two official MeanFlow codes, JAX and PyTorch; everything else is
read from the case. Arrays of the JAX code have the channels last."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generation.meanflow import (
    AVERAGES,
    ClassConditionalMeanFlow,
    Guidance,
    TimePairs,
    UnconditionalMeanFlow,
    convert_official,
    steps,
)
from zoo.nn.autoencoder import SD_SCALE
from zoo.parity import Case, by_entry, filled_inputs, filled_state, gradients, load_filled, named, train
from zoo.training import EMA, Optim


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


# ----------------------------------------------------------------------------------------------------- transformer, JAX

NET = {"input_size": "img_size", "in_channels": "in_chans", "hidden_size": "embed_dim"}
NET |= {name: name for name in ("patch_size", "depth", "num_heads", "mlp_ratio", "num_classes")}
# What meanflow.py takes where the case says nothing.
METHOD = {"noise_dist": "logit_normal", "P_mean": -0.4, "P_std": 1.0, "data_proportion": 0.75, "guidance_eq": "cfg"}
METHOD |= {"omega": 1.0, "kappa": 0.5, "t_start": 0.0, "t_end": 1.0, "class_dropout_prob": 0.1}
METHOD |= {"norm_p": 1.0, "norm_eps": 0.01}
NO_NUMBER = {"jvp_fn", "num_steps", "num_classes", "dtype"}  # what changes none of the outputs, or stands elsewhere too


def _transformer_task(case: Case, **options: Any) -> ClassConditionalMeanFlow:
    given = case["config"].get("method", {})
    if odd := given.keys() - METHOD.keys() - NO_NUMBER:
        raise ZooError(f"the method has settings that ours has not: {', '.join(sorted(odd))}")
    method = {**METHOD, **given}
    guidance = Guidance(**{key: method[key] for key in ("omega", "kappa", "t_start", "t_end")})
    task = ClassConditionalMeanFlow(
        model=None,
        **{ours: case["config"]["net"][theirs] for theirs, ours in NET.items()},
        guidance=guidance if method["guidance_eq"] == "cfg" else None,
        label_dropout=method["class_dropout_prob"],
        pairs=TimePairs(
            distribution=method["noise_dist"],
            mean=method["P_mean"],
            std=method["P_std"],
            equal=method["data_proportion"],
        ),
        loss_power=method["norm_p"],
        loss_eps=method["norm_eps"],
        **options,
    )
    load_filled(task.network, case, convert_official)
    return task


def dit_forward(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _transformer_task(case)
    with torch.no_grad():
        out = task.network(_channels_first(inputs["x"]), (inputs["t"], inputs["h"]), inputs["y"])
    return {"out": _channels_last(out)}


def sample_steps(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _transformer_task(case)
    with torch.no_grad():
        states = steps(task.network, _channels_first(inputs["z"]), inputs["labels"], case["config"]["t_steps"])
        return {f"z_{k}": _channels_last(z) for k, z in enumerate(states, start=1)}


def _drawn(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels and draws of a step, as a batch of ours names them."""
    times = {name: inputs[name].reshape(-1) for name in ("noise_t", "noise_r")}
    noise = _channels_first(inputs["noise_e"])
    return {"label": inputs["labels"], "noise": noise, "drop": inputs["drop_uniform"], **times}


def train_loss(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _transformer_task(case)
    out = task.loss({"image": _channels_first(inputs["imgs"]), **_drawn(inputs)})
    out.loss.backward()
    found = gradients(task.network, zeros=True)
    return {
        "loss": out.loss,
        "v_loss": out.velocity_error,
        "grad_l2_all": torch.stack([g.norm() for g in found.values()]).norm(),
        **named(case, convert_official, grad=found),
    }


def train_run(case: Case) -> dict[str, Tensor]:
    settings, inputs = case["config"]["train"], filled_inputs(case)
    optim = Optim(
        lr=settings["learning_rate"],
        betas=(settings.get("adam_b1", 0.9), settings["adam_b2"]),  # optax.adamw's own, as is no decay of train.py
        weight_decay=settings.get("weight_decay", 0.0),
        no_decay="none",
        schedule="constant",
    )
    task, ema = _transformer_task(case, optim=optim), EMA(settings["ema_val"])

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        mean, std = step["cached"].chunk(2, dim=-1)
        return {"image": _channels_first((mean + std * step["vae_noise"]) * SD_SCALE), **_drawn(step)}

    def after() -> dict[str, Tensor]:
        with ema.applied(task):
            sample = task.network.sample(_channels_first(inputs["z_eval"]), inputs["labels_eval"])
        return {"ema_sample_1step": _channels_last(sample)}

    values = {"v_loss": "velocity_error"}
    return train(case, task, convert_official, batch, epochs=1, averages={"ema": ema}, values=values, after=after)


# ------------------------------------------------------------------------------------------------------ U-Net, PyTorch

# What the official U-Net could be, and MeanFlow's is.
FIXED = {"resample_filter": [1, 3, 3, 1], "channel_mult_noise": 2}
FIXED |= {"encoder_type": "standard", "decoder_type": "standard", "embedding_type": "positional"}
SAME = ("model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout")


def _unet_task(case: Case, **options: Any) -> UnconditionalMeanFlow:
    net, args = case["config"]["net"], case["config"]["args"]
    if odd := [key for key, value in FIXED.items() if net.get(key, value) != value]:
        raise ZooError(f"a network that MeanFlow does not have: {odd}")
    return UnconditionalMeanFlow(
        model=None,
        **{key: net[key] for key in SAME},
        img_size=net["img_resolution"],
        in_chans=net["in_channels"],
        augment_dim=net.get("augment_dim", 0),
        augment=0.0,
        pairs=TimePairs(
            mean=args["P_mean_t"],
            std=args["P_std_t"],
            mean_r=args["P_mean_r"],
            std_r=args["P_std_r"],
            equal=1 - args["ratio"],
            equal_by="chance",
            order="sort" if args["tr_sampler"] == "v0" else "clamp",
        ),
        loss_power=args["norm_p"],
        loss_eps=args["norm_eps"],
        **options,
    )


DRAWS = {"noise_e": "noise", "noise_t": "noise_t", "noise_r": "noise_r", "ratio_uniform": "chance"}
DRAWS |= {"aug_cond": "augment"}


def unet_forward(case: Case) -> dict[str, Tensor]:
    inputs, network = filled_inputs(case), load_filled(_unet_task(case).network, case, convert_official).eval()
    with torch.no_grad():
        return {"u": network(inputs["x"], (inputs["t"], inputs["h"]), inputs.get("aug_cond"))}


def unet_loss(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _unet_task(case).train()
    load_filled(task.network, case, convert_official)
    drawn = {ours: inputs[theirs] for theirs, ours in DRAWS.items() if theirs in inputs}
    out = task.loss({"image": inputs["x"], **drawn})
    out.loss.backward()
    return {"loss": out.loss, **named(case, convert_official, grad=gradients(task.network))}


def _averages(case: Case) -> dict[str, EMA]:
    args = case["config"]["args"]
    decays = dict(zip(AVERAGES, [args["ema_decay"], *args["ema_decays"]], strict=False))
    return {name: EMA(decay, every_n_steps=16, per_step=True, name=name) for name, decay in decays.items()}


def unet_ema(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _unet_task(case)
    load_filled(task.network, case, convert_official)
    averages, outputs = _averages(case), {}
    for ema in averages.values():
        ema.start(task)
    wanted = [(key, *re.fullmatch(r"ema(\d*)_(\d+)", key).groups()) for key in case["outputs"]]  # type: ignore[union-attr]
    for step in range(1, 1 + max(int(step) for _, _, step in wanted)):
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
    optim = Optim(
        name="adam",
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        weight_decay=settings.get("weight_decay", 0.0),
        no_decay="none",
        schedule="constant",
        warmup_epochs=settings["warmup_epochs"],
        warmup_start_lr=1e-8,  # LinearLR's start_factor of train.py, to the peak
    )
    task, averages = _unet_task(case, optim=optim), _averages(case)
    updates = int(filled_state(case)["num_updates"])
    for ema in averages.values():
        ema.steps = updates
    shown = averages[AVERAGES[0]]

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        drawn = {ours: step[theirs] for theirs, ours in DRAWS.items() if theirs in step}
        return {"image": 2 * step["images"] - 1, **drawn}

    def after() -> dict[str, Tensor]:
        with shown.applied(task):
            times = (inputs["t_eval"], inputs["h_eval"])
            return {
                "ema_u": task.network(inputs["x_eval"], times, inputs.get("aug_cond_eval")),
                "num_updates": torch.tensor(shown.steps),
            }

    return train(case, task, convert_official, batch, averages=averages, after=after)


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
