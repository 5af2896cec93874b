"""Runs the kinds of cases that were taken from the two official MeanFlow codes, JAX and PyTorch; everything else is
read from the case. Arrays of the JAX code have the channels last."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from zoo.generation import meanflow as mf
from zoo.nn.autoencoder import SD_SCALE
from zoo.parity import Case, by_entry, filled_inputs, gradients, load_filled, named, shared, train
from zoo.training import EMA

# Settings of the two codes by our names, where these differ.
NET = {"input_size": "img_size", "in_channels": "in_chans", "hidden_size": "embed_dim"}
METHOD = {"noise_dist": "distribution", "P_mean": "mean", "P_std": "std", "data_proportion": "equal"}
METHOD |= {"class_dropout_prob": "label_dropout", "norm_p": "loss_power", "norm_eps": "loss_eps"}
# Changes none of the outputs, or stands elsewhere too.
NO_NUMBER = {"jvp_fn", "num_steps", "num_classes", "dtype"}
# Sizes that a case must give.
DIT = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")

pytorch = shared("py_meanflow")


def _first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


# ----------------------------------------------------------------------------------------------------- transformer, JAX


def _transformer_task(case: Case, **options: Any) -> mf.ClassConditionalMeanFlow:
    """What the case does not say of the method is a default of the official constructor, which are ours."""
    method = pytorch.renamed(case["config"].get("method", {}), METHOD)
    guided = method.pop("guidance_eq", "cfg") == "cfg"
    parts: list[dict[str, Any]] = []
    for kind in (mf.Guidance, mf.TimePairs):
        names = {field.name for field in fields(kind)} & method.keys()
        parts.append({name: method.pop(name) for name in names})
    guidance = mf.Guidance(**parts[0]) if guided else None
    options |= {name: value for name, value in method.items() if name not in NO_NUMBER}
    given = case["config"]["net"]
    net = pytorch.renamed({**given, **{name: given[name] for name in DIT}}, NET)
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


def train_run(case: Case) -> dict[str, Tensor]:
    settings, inputs = case["config"]["train"], filled_inputs(case)
    betas = (settings.get("adam_b1", 0.9), settings["adam_b2"])  # optax.adamw's own first
    task = _transformer_task(case, optim=pytorch.optim(settings, lr=settings["learning_rate"], betas=betas))
    ema = EMA(settings["ema_val"])

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        mean, std = step["cached"].chunk(2, dim=-1)
        return {"image": _first((mean + std * step["vae_noise"]) * SD_SCALE), **_drawn(step)}

    def after() -> dict[str, Tensor]:
        with ema.applied(task):
            return {"ema_sample_1step": _last(task.network.sample(_first(inputs["z_eval"]), inputs["labels_eval"]))}

    values = {"v_loss": "velocity_error"}
    return train(case, task, mf.convert_official, batch, epochs=1, averages={"ema": ema}, values=values, after=after)


run = by_entry(
    {
        "models.models_dit.DiT.__call__": dit_forward,
        "meanflow.MeanFlow.sample_one_step": sample_steps,
        "meanflow.MeanFlow.forward": train_loss,
        "train.train_step_with_vae (state as create_train_state builds it)": train_run,
        "models.unet.SongUNet.forward": pytorch.forward,
        "models.meanflow.MeanFlow.forward_with_loss": pytorch.loss,
        "models.ema.update_ema_net": pytorch.ema,
        "training.train_loop.train_one_epoch (as train.main sets it up)": pytorch.train_run,
    }
)
