"""Runs the kinds of cases that were taken from facebookresearch/asym-siam; everything else is read from the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.data.views import scale_mix, scale_mix_boxes
from zoo.parity import Case, by_entry, filled_inputs, gradients, load_filled, named, train
from zoo.selfsup.asym_siam import AsymSiam, AsymSiamPretraining, convert_official, multi_crop_loss
from zoo.training import Optim, lr_at

BLOCKS = {"BasicBlock": "resnet18", "Bottleneck": "resnet50"}


def _options(config: dict[str, Any]) -> dict[str, Any]:
    names = {"dim": "dim", "K": "queue_size", "m": "momentum", "T": "temperature"}
    options = {ours: config[theirs] for theirs, ours in names.items()}
    base = config["base_encoder"]
    options |= {"arch": BLOCKS[base["block"]], "layers": list(base["layers"])}
    sync = "target" if config.get("enable_asym_bn", False) else "none"
    return {**options, "source_minis": config["mini_crops"], "target_views": config["keys"], "sync_bn": sync}


def _views(inputs: dict[str, Tensor], config: dict[str, Any]) -> list[Tensor]:
    minis = [inputs[f"im_q_mini_{k}"] for k in range(config["mini_crops"])]
    return [inputs["im_q"], *minis, *(inputs[f"im_k_{k}"] for k in range(config["keys"]))]


def step(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    network = load_filled(AsymSiam(**_options(config)), case, convert_official).train()
    network.update_key_encoder()
    large, minis, keys = network.contrast(_views(inputs, config), inputs["idx_shuffle"])
    network.enqueue(keys)
    loss = multi_crop_loss(large, minis)
    loss.backward()
    found = {"loss": loss, **{f"logits_{k}": logits for k, logits in enumerate([*large, *minis])}}
    return {**found, **named(case, convert_official, after=network.state_dict(), grad=gradients(network))}


def _optim(settings: dict[str, Any]) -> Optim:
    own = {"momentum": 0.9, "weight_decay": 1e-4}  # of main_moco.py
    chosen: dict[str, Any] = {name: settings.get(name, value) for name, value in own.items()}
    return Optim(name="sgd", lr=settings["lr"], no_decay="none", schedule="cosine", interval="epoch", **chosen)


def lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    rates = [lr_at(_optim(config), epoch, config["epochs"], config["lr"]) for epoch in range(config["epochs"])]
    return {"lr_per_epoch": torch.tensor(rates, dtype=torch.float64)}


def scalemix(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    first, second = inputs["view1"], inputs["view2"]
    lam = torch.tensor([config["lam"]], dtype=torch.float64)
    boxes = scale_mix_boxes(*first.shape[-2:], lam, torch.tensor([[config["cx"], config["cy"]]]))
    return {"mixed": scale_mix(first[None], second[None], boxes)[0]}


def train_run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    task = AsymSiamPretraining(**_options(config["model"]), optim=_optim(config["train"]))

    def batch(inputs: dict[str, Tensor], k: int) -> dict[str, Any]:
        return {"views": _views(inputs, config["model"]), "permutation": inputs["idx_shuffle"]}

    return train(case, task, convert_official, batch)


run = by_entry(
    {
        "moco.builder.MoCo": step,
        "moco.loader.scalemix": scalemix,
        "main_moco.adjust_learning_rate": lr_schedule,
        "main_moco.train + main_moco.adjust_learning_rate": train_run,
    }
)
