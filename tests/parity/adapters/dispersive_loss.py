"""Runs the kinds of cases that were taken from the released PyTorch code, and from the table of the loss's forms;
everything else is read from the case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.generation import dispersive_loss as dl
from zoo.ops.transport import Transport
from zoo.parity import Case, by_entry, filled_inputs, gradients, load_filled, named, train
from zoo.training import EMA, Optim

NET = {"input_size": "img_size", "in_channels": "in_chans", "hidden_size": "embed_dim"}
SIZES = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")
DRAWS = {"latents": "image", "labels": "label", "noise": "noise", "t_uniform": "t", "label_drop_uniform": "drop"}


def loss_of_outputs(case: Case) -> dict[str, Tensor]:
    z = filled_inputs(case)["z"].requires_grad_()
    loss = dl.dispersive_loss(z, temperature=case["config"]["tau"])
    return {"disp": loss, "grad_z": torch.autograd.grad(loss, z)[0]}


def forms(case: Case) -> dict[str, Tensor]:
    config, z = case["config"], filled_inputs(case)["z"]
    known: dict[str, dict[str, Any]] = {
        "infonce_l2_raw": {"form": "infonce_l2", "per_dim": False},
        "infonce_l2_per_dim": {"form": "infonce_l2", "per_dim": True},
        "infonce_cos": {"form": "infonce_cosine"},
        "hinge_l2_raw": {"form": "hinge", "per_dim": False},
        "hinge_l2_per_dim": {"form": "hinge", "per_dim": True},
        "covariance_offdiag_sq_sum": {"form": "covariance", "per_dim": False},
    }
    settings = {"temperature": config["tau"], "margin": config["margin"]}
    return {name: dl.dispersive_loss(z, **options, **settings) for name, options in known.items()}


def _task(case: Case, sizes: Mapping[str, Any], optim: Optim | None = None) -> dl.SiTTraining:
    config = case["config"]
    net = {NET.get(name, name): sizes[name] for name in SIZES}
    dropout, transport = sizes["class_dropout_prob"], config["transport"]
    return dl.SiTTraining(
        transport=Transport(
            path=transport["path_type"].lower(),
            prediction=transport["prediction"],
            loss_weight=transport["loss_weight"] or "none",
            train_eps=transport.get("train_eps"),
            sample_eps=transport.get("sample_eps"),
        ),
        dispersive=dl.Dispersive(config["lambda"], temperature=config["tau"]) if config["return_act"] else None,
        label_dropout=dropout,
        optim=optim or Optim(),
        learn_sigma=sizes["learn_sigma"],
        null_class=dropout > 0,
        **net,
    )


def _batch(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {DRAWS[name]: value for name, value in inputs.items()}


def train_loss(case: Case) -> dict[str, Tensor]:
    task, batch = _task(case, case["config"]["constructor"]), _batch(filled_inputs(case))
    load_filled(task.network, case, dl.convert_official)
    out = task.errors(batch)
    values = {"pred": out.output, "loss_per_sample": out.error}
    if task.dispersive is not None:
        added = task.dispersive(out.acts)
        values |= {"last_act": out.acts[-1], "disp_term": added, "loss_per_sample": out.error + added}
    loss = values["loss_per_sample"].mean()
    loss.backward()
    return {"loss": loss, **values, **named(case, dl.convert_official, grad=gradients(task.network, zeros=True))}


def train_run(case: Case) -> dict[str, Tensor]:
    settings, inputs = case["config"]["train"], filled_inputs(case)
    rate = {"lr": settings["lr"], "weight_decay": settings["weight_decay"], "betas": (0.9, 0.999)}
    task = _task(case, case["config"]["model"], Optim(schedule="constant", no_decay="none", **rate))
    ema = EMA(settings["ema_decay"])

    def after() -> dict[str, Tensor]:
        with ema.applied(task):
            evaluated = (inputs[f"{name}_eval"] for name in ("x", "t", "labels"))
            return {"ema_model_output": task.network(*evaluated)}

    values = {"disp_term": "dispersive"}
    batches = lambda step, k: _batch(step)  # noqa: E731
    return train(case, task, dl.convert_official, batches, averages={"ema": ema}, values=values, after=after)


run = by_entry(
    {
        "transport.Transport.disp_loss": loss_of_outputs,
        "": forms,
        "transport.Transport.training_losses + models.SiT": train_loss,
        "train.py loop: transport.Transport.training_losses + torch AdamW + update_ema": train_run,
    }
)
