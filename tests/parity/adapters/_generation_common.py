"""Runs the kinds of cases that the papers of generation share: DiT, SiT, and the scores of samples. No paper of ours
owns them, so their slug is that of the field. Everything but the kind is read from the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.nn.dit import DiT
from zoo.ops.diffusion import Diffusion
from zoo.ops.flow import GVPPath, LinearPath, Path, VPPath
from zoo.ops.guidance import guide, guided
from zoo.ops.samplers import OdeMethod, dopri5_path, ode_path, sde_path, times_between
from zoo.parity import Case, by_entry, filled_inputs, shared

PATHS = {"Linear": LinearPath, "GVP": GVPPath, "VP": VPPath}
ODE_METHODS: dict[str, OdeMethod] = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun", "rk4": "rk4"}
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


def _path(case: Case) -> tuple[Path, Any]:
    transport = case["config"]["transport"]
    return PATHS[transport["path_type"]](noise_at=0), transport.get("prediction") or "velocity"


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


def _eps(case: Case) -> tuple[float, float]:
    """What is left out at the ends of time, in training and in sampling."""
    path, prediction = _path(case)
    given = case["config"]["transport"]
    if isinstance(path, LinearPath | GVPPath) and prediction == "velocity":
        return 0.0, 0.0
    train = given.get("train_eps")
    default = 1e-5 if isinstance(path, VPPath) else 1e-3
    return (default, 1e-3) if train is None else (train, given.get("sample_eps"))


def _interval(case: Case, eps: float, form: str = "SBDM", sde: bool = False, last: float = 0.0) -> tuple[float, float]:
    path, prediction = _path(case)
    end = 1 - last if sde and last else 1 - eps
    if isinstance(path, VPPath):
        return 0.0, end
    if prediction == "velocity" and not sde:
        return 0.0, 1.0
    return (eps if (form == "SBDM" and sde) or prediction != "velocity" else 0.0), end


def transport_loss(case: Case) -> dict[str, Tensor]:
    inputs, network = filled_inputs(case), _network(case, False)
    path, prediction = _path(case)
    x, noise = inputs["latents"], inputs["noise"]
    start, end = _interval(case, _eps(case)[0])
    t = inputs["t_uniform"] * (end - start) + start
    pred = network(path.interpolate(x, noise, t), t, inputs["y"])
    weight: Any = case["config"]["transport"].get("loss_weight") or "none"
    return {"pred": pred, "loss_per_sample": path.loss(prediction, pred, x, noise, t, weight)}


def transport_sampler(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    options, y, z = config["kwargs"], inputs["y"], inputs["noise"]
    path, prediction = _path(case)
    network, (_, eps) = _network(case, False), _eps(case)

    def output(z: Tensor, t: Tensor) -> Tensor:
        return network(z, t, y)

    if config["sampler"] == "ode":
        steps = options.get("num_steps", 50) - 1
        times = times_between(*_interval(case, eps), steps, z)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            return path.velocity_from(prediction, output(z, t), z, t)

        method = options.get("sampling_method", "dopri5")
        if method == "dopri5":
            walk = dopri5_path(velocity, z, times, options.get("atol", 1e-6), options.get("rtol", 1e-3))
        else:
            walk = ode_path(velocity, z, times, ODE_METHODS[method])
        states = list(walk)
        return {"first": states[0], "last": states[-1]}
    form, steps = options.get("diffusion_form", "SBDM"), options.get("num_steps", 250) - 1
    last = options.get("last_step", "Mean")
    size = options.get("last_step_size", 0.04) if last else 0.0
    states = list(
        sde_path(
            path,
            prediction,
            output,
            z,
            times_between(*_interval(case, eps, form, True, size), steps, z),
            [inputs[f"step_noise_{k}"] for k in range(steps)],
            form=FORMS.get(form, form),
            norm=options.get("diffusion_norm", 1.0),
            method=options.get("sampling_method", "Euler").lower(),
            last_step=last.lower() if last else None,
            last_step_size=size,
        )
    )
    return {"first": states[1], "last": states[-1]}  # the noise itself is not among the official states


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
