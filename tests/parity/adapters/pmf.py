"""Runs the kinds of cases that were taken from the official pMF code (JAX); everything else is read from the case."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.parity import Case, by_entry, filled_inputs
from zoo.training import Optim, make_optimizer, param_groups


def muon_steps(case: Case) -> dict[str, Tensor]:
    """Leaves are (in, out) there, and ours (out, in)."""
    config, inputs = case["config"], filled_inputs(case)
    leaves = {name: inputs[f"p_{name}"] for name in config["leaves"]}
    model = nn.ParameterDict({name: _turned(value).clone() for name, value in leaves.items()})
    optim = Optim(name="muon", lr=config["lr"], betas=(0.9, config["adam_b2"]), weight_decay=0.0)
    optimizer = make_optimizer(param_groups(model, optim), optim, config["lr"])
    outputs = {}
    for k in range(config["steps"]):
        for name, parameter in model.items():
            parameter.grad = _turned(inputs[f"g{k}_{name}"]).clone()
        optimizer.step()
        outputs |= {f"{name}_{k + 1}": _turned(value.detach()).clone() for name, value in model.items()}
    return outputs


def _turned(value: Tensor) -> Tensor:
    return value.T if value.ndim == 2 else value


run = by_entry({"optax.contrib.muon(learning_rate, adam_b2)": muon_steps})
