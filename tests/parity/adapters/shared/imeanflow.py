"""What the cases of iMF and pMF share: their two official JAX codes have one method and one set of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.generation.imf import GuidedMeanFlow, steps
from zoo.ops.meanflow import GuidanceConditions, TimePairs, power_law
from zoo.parity import Case, filled_inputs, gradients, load_filled, named
from zoo.training import Optim, lr_at

# Settings of the official code by our names.
NET = {"input_size": "img_size", "in_channels": "in_chans", "hidden_size": "embed_dim", "aux_head_depth": "head_depth"}
METHOD = {"class_dropout_prob": "label_dropout", "norm_p": "loss_power", "norm_eps": "loss_eps"}
PAIRS = {"P_mean": "mean", "P_std": "std", "data_proportion": "equal"}
# Sizes that a case must give.
SIZES = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
DRAWS = ("noise_t", "noise_r", "t_min_uniform", "t_max_uniform", "omega_uniform")

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Build = Callable[..., GuidedMeanFlow]


def task(case: Case, build: Build, convert: Convert, pairs: TimePairs, **names: str) -> GuidedMeanFlow:
    """The task of a case, filled. What a case does not say is a default of the official constructor, which are ours.

    Args:
        build: of the options of our task.
        pairs: the paper's, whose numbers a case may replace.
        names: further settings of the method, official name to ours.
    """
    method = dict(case["config"].get("method", {}))
    chosen = {ours: method.pop(theirs) for theirs, ours in PAIRS.items() if theirs in method}
    guidance = GuidanceConditions(omega_max=1 + method.pop("cfg_max", 7.0), beta=method.pop("cfg_beta", 1.0))
    names = METHOD | names
    options = {names.get(name, name): value for name, value in method.items()}
    given = case["config"]["net"]
    net = {NET.get(name, name): value for name, value in {**given, **{name: given[name] for name in SIZES}}.items()}
    made = build(guidance=guidance, pairs=replace(pairs, **chosen), **net, **options)
    load_filled(made.network, case, convert)
    return made


def forward(case: Case, network: torch.nn.Module) -> dict[str, Tensor]:
    inputs = filled_inputs(case)
    with torch.no_grad():
        u, v = network(*(inputs[name] for name in ("x", "t", "h", "omega", "t_min", "t_max", "y")))
    return {"u": u, "v": v}


def sample(case: Case, made: GuidedMeanFlow) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    times = torch.linspace(1, 0, config["num_steps"] + 1, dtype=torch.float64).tolist()
    interval = config["t_min"], config["t_max"]
    with torch.no_grad():
        start = made.noise_scale * inputs["noise"]
        states = steps(made.network, start, inputs["labels"], times, config["omega"], interval)
        return {f"z_{k}": z for k, z in enumerate(states, start=1)}


def batch(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of ours, its draws pinned, of a training case's inputs."""
    drawn = {name: inputs[name].reshape(-1) for name in DRAWS}
    own = {"image": inputs["images"], "label": inputs["labels"], "noise": inputs["noise_e"]}
    return {**own, **drawn, "drop": inputs["drop_uniform"].reshape(-1)}


def differentiated(case: Case, made: GuidedMeanFlow, convert: Convert, loss: Tensor) -> dict[str, Tensor]:
    """The loss and its gradients."""
    loss.backward()
    found = gradients(made.network, zeros=True)
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    return {"loss": loss, "grad_l2_all": norm} | named(case, convert, grad=found)


def plain_means(errors: Any) -> dict[str, Tensor]:
    """The two errors as the official code logs them: means over pictures and numbers."""
    numbers = errors.z[0].numel()
    return {"loss_u": errors.u.mean() / numbers, "loss_v": errors.v.mean() / numbers}


def schedules(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    outputs = {}
    for beta in config["cfg_betas"]:
        outputs[f"omega_beta_{beta}"] = power_law(inputs["omega_uniform"], 1 + config["cfg_max"], beta)
    lr, warmup, pace = config["base_lr"], config["warmup_epochs"], config["steps_per_epoch"]
    kinds: dict[str, tuple[Any, float]] = {"constant": ("const", 0.0), "cosine": ("cosine", config["lr_min_factor"])}
    for schedule, (name, floor) in kinds.items():
        optim = Optim(lr=lr, schedule=schedule, warmup_epochs=warmup, min_lr=floor * lr)  # type: ignore[arg-type]
        # optax counts the warm-up into the steps of the cosine, from which the official code has taken it already.
        total = config["total_epochs"] - warmup
        rates = [lr_at(optim, step / pace, total, lr) for step in config["steps"]]
        outputs[f"warmup_{name}"] = torch.tensor(rates, dtype=torch.float64)
    return outputs
