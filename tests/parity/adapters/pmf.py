"""Runs the kinds of cases that were taken from the official pMF code (JAX); everything else is read from the case."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.generation import pmf
from zoo.ops.meanflow import TimePairs
from zoo.parity import Case, by_entry, filled_inputs, shared
from zoo.training import Optim, half_life_decay, make_optimizer, param_groups

official = shared("imeanflow")
PAIRS = TimePairs(mean=-0.4, std=1.0, equal=0.5, order="equal_first")  # defaults of the official constructor
CLIP = {"mix_uniform": "mix", "uniform_t": "uniform_t", "uniform_r": "uniform_r"}


class Stubbed(pmf.PixelMeanFlow):
    """With the cases' own distances in the place of the networks of perception."""

    def distances(self, batch: Mapping[str, Any], pictures: Tensor, truth: Tensor, rows: Tensor) -> dict[str, Tensor]:
        apart = (pictures - truth).flatten(1)
        found = {"lpips": apart.square().mean(1), "convnext": apart.abs().sum(1)}
        return {name: found[name] for name in self.perception}


def build(
    pairs: TimePairs,
    lpips: bool = False,
    lpips_lambda: float = 1.0,
    convnext: bool = False,
    convnext_lambda: float = 0.0,
    perceptual_max_t: float = 1.0,
    tr_uniform: bool = False,
    **options: Any,
) -> pmf.PixelMeanFlow:
    """The task by the settings of the official constructor, whose defaults these are."""
    # Either flag turns both terms on: there the flags choose which networks the distances come from.
    weights = {"lpips": lpips_lambda, "convnext": convnext_lambda}
    perceptual = pmf.Perceptual(**weights, max_t=perceptual_max_t) if lpips or convnext else None
    if tr_uniform:
        pairs = TimePairs(**{**vars(pairs), "uniform": 0.1})
    return Stubbed(perceptual=perceptual, pairs=pairs, **options)


def _task(case: Case) -> pmf.PixelMeanFlow:
    """Two widths follow from the size of the model or differ between branches; the state says them."""
    shapes = {key.removeprefix("net."): entry["shape"] for key, entry in case["state"].items()}
    hidden = next(shape[0] for key, shape in shapes.items() if key.endswith("mlp.w1._flax_linear.weight"))
    multiple = 1 if hidden == case["config"]["net"]["hidden_size"] * 8 // 3 else 8
    sized = partial(build, bottleneck=shapes["x_embedder.proj1.weight"][0], mlp_multiple=multiple)
    return official.task(case, sized, pmf.convert_official, PAIRS)


def forward(case: Case) -> dict[str, Tensor]:
    return official.forward(case, _task(case).network)


def sample(case: Case) -> dict[str, Tensor]:
    return official.sample(case, _task(case))


def train_loss(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _task(case)
    batch = official.batch(inputs) | {ours: inputs[name].reshape(-1) for name, ours in CLIP.items() if name in inputs}
    errors = task.errors(batch)
    found = official.differentiated(case, task, pmf.convert_official, task.total(batch, errors))
    if task.perceptual is not None:  # a term without weight is logged too
        task.perception = pmf.Perceptual().networks()
    seen = {f"aux_loss_{name}": value.mean() for name, value in task.seen(batch, errors).items()}
    return found | official.plain_means(errors) | seen


def schedules(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    decays = [
        [half_life_decay(step, 1000.0 * life, 1024) for step in config["steps"]] for life in config["ema_halflife_kimg"]
    ]
    return official.schedules(case) | {"ema_edm": torch.tensor(decays, dtype=torch.float64)}


def muon_steps(case: Case) -> dict[str, Tensor]:
    """Leaves are (in, out) there, and ours (out, in)."""
    config, inputs = case["config"], filled_inputs(case)
    model = nn.ParameterDict({name: _turned(inputs[f"p_{name}"]).clone() for name in config["leaves"]})
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


run = by_entry(
    {
        "models.pmfDiT.pmfDiT.__call__": forward,
        "pmf.pixelMeanFlow.sample_one_step": sample,
        "pmf.pixelMeanFlow.forward": train_loss,
        "utils.lr_utils / utils.ema_util / sample_cfg_scale": schedules,
        "optax.contrib.muon(learning_rate, adam_b2)": muon_steps,
    }
)
