"""Runs the kinds of cases that were taken from the official JiT; everything else is read from the case."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generation import jit
from zoo.ops.flow import like
from zoo.ops.pos_embed import apply_rope, rope_2d
from zoo.parity import Case, by_entry, dtype_of, filled_inputs, gradients, load_filled, named, train
from zoo.training import EMA, Optim, param_groups

# Settings of the official constructors by our names.
NET = {
    "input_size": "img_size",
    "patch_size": "patch_size",
    "in_channels": "in_chans",
    "hidden_size": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "attn_drop": "attn_drop",
    "proj_drop": "proj_drop",
    "num_classes": "num_classes",
    "bottleneck_dim": "bottleneck",
    "in_context_len": "context_tokens",
    "in_context_start": "context_start",
}


def _sizes(facts: Mapping[str, Any]) -> dict[str, Any]:
    if odd := facts.keys() - NET.keys():
        raise ZooError(f"settings of the network that are not known: {', '.join(sorted(odd))}")
    return {ours: facts[theirs] for theirs, ours in NET.items()}


# -------------------------------------------------------------------------------------------------------------- network


def forward(case: Case) -> dict[str, Tensor]:
    inputs = filled_inputs(case)
    network = jit.JiT(**_sizes(case["config"]["constructor"])).eval()
    load_filled(network, case, jit.convert_official)
    out, acts = network.forward_intermediates(inputs["x"], inputs["t"], inputs["y"])
    out.square().sum().backward()
    found = named(case, jit.convert_official, grad=gradients(network))
    return {"out": out, **{f"block{k}": act for k, act in enumerate(acts)}, **found}


def rope(case: Case) -> dict[str, Tensor]:
    """`dim` is the half of a head that turns by the row."""
    facts, q = case["config"], filled_inputs(case)["q"]
    side = facts["pt_seq_len"]
    tables = rope_2d(2 * facts["dim"], (side, side), facts.get("num_cls_token", 0))
    return {"rotated": apply_rope(q, *(table.to(q) for table in tables))}


# --------------------------------------------------------------------------------------------------------------- losses


def conversions(case: Case) -> dict[str, Tensor]:
    """Every output is called A_pred_B_loss."""
    inputs, formula = filled_inputs(case), case["config"]["t"]
    if not (match := re.fullmatch(r"([\d.]+)\s*\+\s*([\d.]+)\s*\*\s*t_uniform", formula)):
        raise ZooError(f"times that are not A + B * t_uniform: {formula!r}")
    t = float(match[1]) + float(match[2]) * inputs["t_uniform"]
    found = {}
    for output in case["outputs"]:
        prediction, space = re.fullmatch(r"(\w+)_pred_(\w+)_loss", output).groups()  # type: ignore[union-attr]
        how: tuple[Any, Any] = (prediction, space)
        given = (inputs["x"], inputs["noise"], t)
        found[output] = jit.denoising_loss(lambda z, t, y: inputs["net_out"], *given, None, *how).mean()
    return found


def _task(case: Case, **options: Any) -> jit.Denoising:
    facts = case["config"]["denoiser"]
    task = jit.Denoising(
        t_mean=facts["P_mean"],
        t_std=facts["P_std"],
        t_eps=facts["t_eps"],
        noise_scale=facts["noise_scale"],
        label_dropout=facts["label_drop_prob"],
        sampling=jit.Sampling(
            steps=facts["num_sampling_steps"],
            method=facts["sampling_method"],
            guidance=facts["cfg"],
            interval=(facts["interval_min"], facts["interval_max"]),
        ),
        **_sizes(case["config"]["net"]),
        **options,
    )
    load_filled(task.network, case, jit.convert_official)
    return task.to(case.get("device", "cpu"), dtype_of(case))


def _batch(inputs: Mapping[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    draws = {"noise": inputs["noise"], "noise_t": inputs["time_normal"], "drop": inputs["label_drop_uniform"]}
    return {"image": image, "label": inputs["labels"], **draws}


def train_loss(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _task(case).train()
    batch = _batch(inputs, inputs["x"])
    loss = task.training_step(batch, 0)
    loss.backward()
    noise, t, labels = task.drawn(batch)
    z = like(t, noise) * inputs["x"] + like(1 - t, noise) * noise
    found = named(case, jit.convert_official, grad=gradients(task.network, zeros=True))
    return {"loss": loss, "t": t, "z": z, "labels_dropped": labels, **found}


def sample(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _task(case).eval()
    return {"samples": task.sample(inputs["noise"], inputs["labels"])}


# ------------------------------------------------------------------------------------------------------------------ run


def _decays(network: jit.JiT, optim: Optim) -> Tensor:
    """Of the two official groups, undecayed and decayed; ours are one where the recipe decays nothing."""
    of = {name: group["weight_decay"] for group in param_groups(network, optim) for name in group["names"]}
    undecayed = {name for name, p in network.named_parameters() if p.ndim == 1 or name.endswith(".bias")}
    groups = [{of[name] for name in names} for names in (undecayed, of.keys() - undecayed)]
    if any(len(decays) != 1 for decays in groups):
        raise ZooError(f"weight decays that are not one a group: {groups}")
    return torch.tensor([decay for decays in groups for decay in decays])


def train_run(case: Case) -> dict[str, Tensor]:
    settings, inputs = case["config"]["train"], filled_inputs(case)
    optim = Optim(
        base_lr=settings["blr"],
        weight_decay=settings["weight_decay"],
        betas=tuple(settings["betas"]),
        schedule=settings["lr_schedule"],
        warmup_epochs=settings["warmup_epochs"],
        min_lr=settings["min_lr"],
    )
    task = _task(case, optim=optim)
    averages = {"ema": EMA(settings["ema_decay1"]), "ema2": EMA(settings["ema_decay2"], name="ema2")}

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        return _batch(step, step["images"] / 255 * 2 - 1)

    def after() -> dict[str, Tensor]:
        with averages["ema"].applied(task):
            out = task.network(inputs["z_eval"], inputs["t_eval"], inputs["labels_eval"])
        return {"ema_model_output": out, "weight_decay_per_group": _decays(task.network, optim)}

    return train(case, task, jit.convert_official, batch, averages=averages, after=after)


run = by_entry(
    {
        "model_jit.JiT": forward,
        "util.model_util.VisionRotaryEmbeddingFast": rope,
        "": conversions,  # of the paper's Table 1, not of code
        "denoiser.Denoiser": train_loss,
        "denoiser.Denoiser.generate": sample,
        "engine_jit.train_one_epoch (as main_jit sets it up)": train_run,
    }
)
