"""Runs the kinds of cases that the papers of generation share: DiT, SiT, and the scores of samples. No paper of ours
owns them, so their slug is that of the field. Everything but the kind is read from the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.nn.dit import DiT
from zoo.ops.diffusion import Diffusion
from zoo.ops.guidance import guide, guided
from zoo.ops.transport import Sampler, Transport
from zoo.parity import Case, by_entry, filled_inputs, shared

ODE_METHODS: Any = {"dopri5": "dopri5", "euler": "euler", "midpoint": "midpoint", "heun2": "heun", "rk4": "rk4"}
SDE_METHODS: Any = {"Euler": "sde_euler", "Heun": "sde_heun"}
FORMS = {"SBDM": "sbdm", "inccreasing-decreasing": "bump"}
_network, scores = shared("dit").network, shared("generation_scores")


# ---------------------------------------------------------------------------------------------------------------- DiT


def dit(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    network, x, y, t = _network(case, True), inputs["latents"], inputs["y"], inputs["timesteps"]
    variance: Any = "learned_range" if config["constructor"].get("learn_sigma", True) else "fixed_large"
    process = Diffusion(variance=variance)
    losses = process.losses(network(process.noised(x, t, inputs["noise"]), t, y), x, inputs["noise"], t)
    outputs = {"out": network(x, t, y), **losses}
    if "sample_noise" not in inputs:
        return outputs

    short = Diffusion(respacing=config["timestep_respacing"], variance=variance)
    steps = len(short)
    noises = [inputs[f"step_noise_{k}"][: len(y)] for k in range(steps)]
    null = config["constructor"]["num_classes"]
    field = guided(network, config["cfg_scale"], null, channels=3)

    def conditional(z: Tensor, t: Tensor) -> Tensor:
        return field(z, t, y)

    z = inputs["sample_noise"]
    walk = short.ddim if "ddim" in config["sampler"].lower() else short.ancestral
    # Beyond the guided channels each half of the doubled batch keeps its own prediction, and so its own course; the
    # conditional half's is what the sampler gives.
    *_, samples = walk(conditional, z, noises)
    return {**outputs, "samples": samples, "kept_timesteps": torch.tensor(short.kept)}


# ---------------------------------------------------------------------------------------------------------------- SiT


def _transport(case: Case) -> Transport:
    given = case["config"]["transport"]
    train_eps = given.get("train_eps")
    return Transport(
        path=given["path_type"].lower(),
        prediction=given.get("prediction") or "velocity",
        loss_weight=given.get("loss_weight") or "none",
        train_eps=train_eps,
        # The official code takes its own default for both where that of training is not given.
        sample_eps=None if train_eps is None else given.get("sample_eps"),
    )


def sit(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    network, x, t, y = _network(case, False), inputs["x"], inputs["t"], inputs["y"]
    outputs = {"out": network(x, t, y)}
    if "cfg_scale" in config:
        outputs["out_cfg"] = _doubled(network, x, t, y, config["cfg_scale"])
    full = DiT(
        img_size=config["constructor"]["input_size"],
        patch_size=config["constructor"]["patch_size"],
        embed_dim=config["constructor"]["hidden_size"],
        depth=0,
    )
    return {**outputs, "pos_embed": full.pos_embed}


def _doubled(network: Any, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
    """Both halves of a batch that holds each sample with a label and, in the second half, with another."""
    half = x[: len(x) // 2]
    first, second = network(torch.cat([half, half]), t, y).chunk(2)
    other = torch.cat([guide(first, second, scale)[:, :3], second[:, 3:]], dim=1)
    return torch.cat([guide(first, second, scale, channels=3), other])


def transport_loss(case: Case) -> dict[str, Tensor]:
    inputs, network, transport = filled_inputs(case), _network(case, False), _transport(case)
    x, noise, t = inputs["latents"], inputs["noise"], transport.times(inputs["t_uniform"])
    pred = network(transport.interpolant.interpolate(x, noise, t), t, inputs["y"])
    return {"pred": pred, "loss_per_sample": transport.loss(pred, x, noise, t)}


def transport_sampler(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    network, options, y = _network(case, False), config["kwargs"], inputs["y"]
    if config["sampler"] == "ode":
        method = options.get("sampling_method", "dopri5")
        tolerances = {name: options[name] for name in ("atol", "rtol") if name in options}
        sampler = Sampler(ODE_METHODS[method], steps=options.get("num_steps", 50) - 1, **tolerances)
    else:
        form, last = options.get("diffusion_form", "SBDM"), options.get("last_step", "Mean")
        sampler = Sampler(
            SDE_METHODS[options.get("sampling_method", "Euler")],
            steps=options.get("num_steps", 250),
            form=FORMS.get(form, form),
            norm=options.get("diffusion_norm", 1.0),
            last_step=last.lower() if last else None,
            last_step_size=options.get("last_step_size", 0.04),
        )
    kicks = [inputs[f"step_noise_{k}"] for k in range(sampler.kicks)]
    states = list(sampler.states(lambda z, t: network(z, t, y), inputs["noise"], _transport(case), kicks))
    # Of the SDE the noise itself is not among the official states.
    return {"first": states[1 if sampler.kicks else 0], "last": states[-1]}


KINDS = by_entry(
    {
        "models.DiT + diffusion.create_diffusion": dit,
        "models.SiT": sit,
        "transport.Transport.training_losses": transport_loss,
        "transport.Sampler": transport_sampler,
        "metric_fid / metric_isc / metric_kid / metric_prc": scores.scores,
        "interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x": scores.tf1_bilinear,
    }
)


def run(case: Case) -> dict[str, Tensor]:
    with torch.no_grad():
        return KINDS(case)
