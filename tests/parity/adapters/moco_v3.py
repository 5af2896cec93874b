"""Runs the kinds of cases that were taken from facebookresearch/moco-v3; everything else is read from the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.data.transforms import box_blur, solarize
from zoo.ops.momentum import cosine_momentum
from zoo.parity import Case, by_entry, filled_inputs, gradients, load_filled, named, train
from zoo.selfsup.moco_v3 import MoCoV3, MoCoV3Pretraining, convert_official, symmetric_loss
from zoo.training import LARS, Optim, lr_at

BLOCKS = {"BasicBlock": "resnet18", "Bottleneck": "resnet50"}
VIT = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "stop_grad_conv1")


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the network that a case's config describes."""
    heads = {"dim": config["dim"], "mlp_dim": config["mlp_dim"], "temperature": config["T"]}
    if "base_encoder" in config:
        base = config["base_encoder"]
        return {**heads, "arch": BLOCKS[base["block"]], "layers": list(base["layers"])}
    vit = config["vit"]
    sizes = {name: vit[name] for name in VIT if name in vit}
    return {**heads, **sizes, "arch": "vit_base", "stem": "conv" if vit.get("conv_stem") else "patch"}


def step(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    network = load_filled(MoCoV3(**_sizes(config)), case, convert_official).train()
    queries, keys = network.step(inputs["x1"], inputs["x2"], config["m"])
    loss = symmetric_loss(queries, keys, network.temperature)
    loss.backward()
    found = {"loss": loss, "q1": queries[0], "q2": queries[1], "k1": keys[0], "k2": keys[1]}
    found |= named(case, convert_official, after=network.state_dict(), grad=gradients(network))
    parameters = list(network.base_encoder.parameters())
    found["trainable"] = torch.tensor([p.requires_grad for p in parameters], dtype=loss.dtype)
    if hasattr(network.base_encoder, "pos_embed"):
        found["pos_embed"] = network.base_encoder.pos_embed
    return {**found, **_evaluated(network, inputs["x1"])}


@torch.no_grad()
def _evaluated(network: MoCoV3, images: Tensor) -> dict[str, Tensor]:
    projection = network.eval()(images)
    return {"eval_projection": projection, "eval_prediction": network.predictor(projection)}


def _optim(settings: dict[str, Any]) -> Optim:
    own = {"weight_decay": settings.get("weight_decay", 1e-6), "warmup_epochs": settings.get("warmup_epochs", 10)}
    if settings.get("optimizer", "lars") == "lars":
        own |= {"name": "lars", "momentum": settings.get("momentum", 0.9), "no_decay": "1d"}
    else:
        own |= {"name": "adamw", "betas": (0.9, 0.999), "no_decay": "none"}
    return Optim(base_lr=settings["base_lr"], **own)


def schedules(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    optim, total, steps = Optim(warmup_epochs=config["warmup_epochs"]), config["epochs"], config["iters_per_epoch"]
    places = [epoch + i / steps for epoch in range(total) for i in range(steps)]
    rates = [lr_at(optim, place, total, config["lr"]) for place in places]
    momenta = [cosine_momentum(place, total, config["moco_m"]) for place in places]
    return {"lr": torch.tensor(rates, dtype=torch.float64), "momentum": torch.tensor(momenta, dtype=torch.float64)}


def lars_steps(case: Case) -> dict[str, Tensor]:
    config, inputs, outputs = case["config"], filled_inputs(case), {}
    count = config["params"]
    parameters = [nn.Parameter(inputs[f"param_{i}"].clone()) for i in range(count)]
    options = {key: config[key] for key in ("lr", "weight_decay", "momentum", "trust_coefficient") if key in config}
    optimizer = LARS(parameters, **options)
    for k in range(config["steps"]):
        for i, parameter in enumerate(parameters):
            parameter.grad = inputs[f"grad_{i}_{k}"].clone()
        optimizer.step()
        outputs |= {f"param_{i}_after_{k}": p.detach().clone() for i, p in enumerate(parameters)}
    return outputs


def blur_solarize(case: Case) -> dict[str, Tensor]:
    image = filled_inputs(case)["image"].permute(2, 0, 1).to(torch.uint8)
    changed = {"blurred": box_blur(image, case["config"]["sigma"]), "solarized": solarize(image)}
    return {name: picture.permute(1, 2, 0).double() for name, picture in changed.items()}


def train_run(case: Case) -> dict[str, Tensor]:
    model, settings = case["config"]["model"], case["config"]["train"]
    momentum = {"momentum": settings["moco_m"], "momentum_cosine": settings["moco_m_cos"]}
    task = MoCoV3Pretraining(**_sizes(model), **momentum, optim=_optim(settings))
    evaluated = filled_inputs(case)["x_eval"]
    return train(
        case,
        task,
        convert_official,
        lambda inputs, k: {"views": [inputs["x1"], inputs["x2"]]},
        after=lambda: _evaluated(task.network, evaluated),
    )


run = by_entry(
    {
        "moco.builder.MoCo_ViT": step,
        "moco.builder.MoCo_ResNet": step,
        "moco.loader.GaussianBlur+Solarize": blur_solarize,
        "moco.optimizer.LARS": lars_steps,
        "main_moco.adjust_learning_rate+adjust_moco_momentum": schedules,
        "main_moco.train": train_run,
    }
)
