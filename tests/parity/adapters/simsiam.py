"""Runs the kinds of cases that were taken from facebookresearch/simsiam and apex's LARC; the rest is in the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.metrics.spread import channel_deviation
from zoo.parity import Case, by_entry, filled_inputs, gradients, load_filled, named, train
from zoo.selfsup.simsiam import SimSiam, SimSiamPretraining, convert_official, siamese_loss
from zoo.training import LARC, Optim, lr_at

BLOCKS = {"BasicBlock": "resnet18", "Bottleneck": "resnet50"}


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    base = config["base_encoder"]
    encoder = {"arch": BLOCKS[base["block"]], "layers": list(base["layers"])}
    return {**encoder, "dim": config["dim"], "pred_dim": config["pred_dim"]}


def step(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    used = config.get("predictor", True)

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        converted = convert_official(state)  # without a predictor the case still has one, which is not used
        return {key: value for key, value in converted.items() if used or not key.startswith("predictor.")}

    network = load_filled(SimSiam(**_sizes(config), predictor="trained" if used else "none"), case, convert).train()
    z1, z2 = network(inputs["x1"]), network(inputs["x2"])
    p1, p2 = network.predictor(z1), network.predictor(z2)
    targets = [z.detach() if config.get("stop_gradient", True) else z for z in (z1, z2)]
    loss = siamese_loss([p1, p2], targets)
    loss.backward()
    found = {"loss": loss, "p1": p1, "p2": p2, "z1": z1, "z2": z2, "output_std": channel_deviation(z1)}
    return {**found, **named(case, convert, after=network.state_dict(), grad=gradients(network))}


def _optim(settings: dict[str, Any]) -> Optim:
    fixed = ("predictor",) if settings.get("fix_pred_lr", True) else ()
    own = {"momentum": 0.9, "weight_decay": 1e-4}  # of main_simsiam.py
    chosen: dict[str, Any] = {name: settings.get(name, value) for name, value in own.items()}
    chosen |= {"base_lr": settings["base_lr"], "constant_lr": fixed}
    return Optim(name="sgd", no_decay="none", schedule="cosine", interval="epoch", **chosen)


def lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    optim = _optim(config)
    peak = optim.peak_lr(config["batch_size"])
    rates = [lr_at(optim, epoch, config["epochs"], peak) for epoch in range(config["epochs"])]
    encoder = torch.tensor(rates, dtype=torch.float64)
    return {"lr_encoder": encoder, "lr_predictor": torch.full_like(encoder, peak) if optim.constant_lr else encoder}


def larc_steps(case: Case) -> dict[str, Tensor]:
    config, inputs, outputs = case["config"], filled_inputs(case), {}
    names = [name for name in inputs if not name.startswith("grad_")]
    parameters = {name: nn.Parameter(inputs[name].clone()) for name in names}
    options = {key: config[key] for key in ("lr", "momentum", "weight_decay", "trust_coefficient", "clip")}
    optimizer = LARC(parameters.values(), **options)
    for k in range(config["steps"]):
        for name, parameter in parameters.items():
            parameter.grad = inputs[f"grad_{name}_{k}"].clone()
        optimizer.step()
        outputs |= {f"{name}_after_{k}": p.detach().clone() for name, p in parameters.items()}
    return outputs


def train_run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    task = SimSiamPretraining(**_sizes(config["model"]), optim=_optim(config["train"]))
    evaluated = filled_inputs(case)["x_eval"]

    def after() -> dict[str, Tensor]:
        z = task.network(evaluated)
        return {"eval_z": z, "eval_p": task.network.predictor(z)}

    return train(case, task, convert_official, lambda i, k: {"views": [i["x1"], i["x2"]]}, after=after)


run = by_entry(
    {
        "simsiam.builder.SimSiam": step,
        "apex.parallel.LARC.LARC": larc_steps,
        "main_simsiam.adjust_learning_rate": lr_schedule,
        "main_simsiam.train + main_simsiam.adjust_learning_rate": train_run,
    }
)
