"""Runs the kinds of cases that stand for uEDM: whole denoisers of NVlabs/edm with their losses and sampler, and closed
forms of coefficients. Everything but the kind is read from the case."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.generation import uedm
from zoo.ops import karras
from zoo.parity import Case, dtype_of, filled_inputs, gradients, load_filled, named

# Options of the official constructors: of the preconditioning, and by our names where these differ.
OWN = {"vp": {"beta_d": "beta_range", "beta_min": "beta_min", "M": "steps", "epsilon_t": "least_time"}}
OWN |= {"ve": {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}, "edm": {"sigma_data": "sigma_data"}}
OWN |= {"iddpm": {"C_1": "least_ratio", "C_2": "offset", "M": "steps"}}
NAMES = {"vp": "vp", "ve": "ve", "edm": "edm", "iddpm": "edm_iddpm", "uedm": "uedm"}
NET = {"img_resolution": "img_size", "img_channels": "in_chans"}
SAMPLER = {"num_steps": "steps", "S_churn": "churn", "S_min": "churn_min", "S_max": "churn_max"}
SAMPLER |= {"S_noise": "churn_noise", "sigma_min": "sigma_min", "sigma_max": "sigma_max", "rho": "rho"}
KINDS = {"SongUNet": uedm.UNetDenoising, "DhariwalUNet": uedm.ADMDenoising}
NO_NUMBER = {"use_fp16", "label_dropout"}  # on the CPU, and in evaluation


def _task(case: Case) -> Any:
    config, precond = case["config"], case["config"]["precond"]
    given = dict(config["constructor"])
    kind = given.pop("model_type", "SongUNet" if precond in ("vp", "ve") else "DhariwalUNet")
    own = {ours: given.pop(theirs) for theirs, ours in OWN.get(precond, {}).items() if theirs in given}
    options = {NET.get(name, name): value for name, value in given.items() if name not in NO_NUMBER}
    if kind == "SongUNet":  # the official default, where a case does not say
        options = {"channel_mult": (1, 2, 2, 2), "dropout": 0.1, "augment_dim": 0, **options}
    sampler = config.get("sampler") or {}
    if odd := sampler.keys() - SAMPLER.keys():
        raise ZooError(f"a sampler with other options: {', '.join(sorted(odd))}")
    if kind not in KINDS:
        raise unknown("network", kind, KINDS)
    task = KINDS[kind](
        augment=0.0,
        sampling=uedm.Sampling(**{SAMPLER[name]: value for name, value in sampler.items()}),
        formulation=NAMES[precond],
        formulation_options=own,
        noise_conditional=not config["noise_unconditional"],
        **options,
    )
    load_filled(task.network, case, uedm.convert_official)
    return task.eval()


def _labels(inputs: dict[str, Tensor]) -> Tensor | None:
    """Labels (B,); a row of zeros is none of the classes."""
    hot = next((inputs[name] for name in inputs if re.fullmatch(r"(class_)?labels?(_onehot)?", name)), None)
    if hot is None:
        return None
    if hot.ndim == 1:
        return hot.long()
    return torch.where(hot.sum(1) > 0, hot.argmax(1), hot.shape[1])


def denoiser(case: Case) -> dict[str, Tensor]:
    task, inputs = _task(case), filled_inputs(case)
    network: uedm.Denoiser = task.network
    # Frozen where it learns nothing without the time; a gradient of it is a number all the same.
    network.requires_grad_(True)
    label, augment = _labels(inputs), next((inputs[name] for name in inputs if name.startswith("augment")), None)
    formulation, wanted = network.formulation, case["outputs"]
    found: dict[str, Tensor] = {}
    if any(name.startswith(("loss", "grad")) for name in wanted):
        draw = inputs["sigma_normal" if formulation.normal else "sigma_uniform"].flatten()
        batch = {"image": inputs["images"], "time": draw, "noise": inputs["noise"], "label": label, "augment": augment}
        found["loss_map"] = task.loss_map(batch)
        found["loss_mean"] = found["loss_map"].mean()
        found["loss_mean"].backward()
        found |= named(case, uedm.convert_official, grad=gradients(network, zeros=True))
    with torch.no_grad():
        if "denoised" in wanted:
            # All cases take EDM's log-normal levels here, whatever their own.
            sigma = karras.EDM().sigma(inputs["sigma_normal"]).to(dtype_of(case))
            found["denoised"] = network.denoise(
                inputs["images"] + sigma * inputs["noise"], sigma.flatten(), label, augment
            )
        if "samples" in wanted:
            noises = [inputs[f"churn_noise_{k}"] for k in range(task.sampling.steps) if task.sampling.churn]
            states = uedm.sample_path(
                lambda z, t: network(z, t, label), formulation, inputs["latents"], task.sampling, noises
            )
            found["samples"] = list(states)[-1]
    return found


# -------------------------------------------------------------------------------------------------------- closed forms


def reformulation(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    t = torch.tensor(config["t"], dtype=dtype_of(case))
    found = {}
    for name in sorted({name.partition("_")[0] for name in case["outputs"]}):
        own = {"sigma_data": config["sigma_data"]} if name in ("edm", "uedm") else {}
        formulation = uedm.make_formulation(NAMES[name], own)
        assert isinstance(formulation, uedm.Preconditioned)
        a, b, c, d, w = formulation.coefficients(t)
        skip, out, scale, _ = formulation.scalings(t)
        # Solving D = skip y + out r for r once more, with unit data and unit noise.
        checks = {"c_check": (1 - skip) / out, "d_check": -skip * t / out}
        values = {"a": a, "b": b, "c": c, "d": d, "weight": w, "cskip": skip, "cout": out, "cin": scale} | checks
        found |= {f"{name}_{key}": value for key, value in values.items()}
    return found


def coefficients(case: Case) -> dict[str, Tensor]:
    config = {key: torch.tensor(value, dtype=dtype_of(case)) for key, value in case["config"].items()}
    found = {}

    def add(name: str, states: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> None:
        alpha, beta = states
        c, d = (value[:-1] for value in targets)
        kappa, eta, _ = uedm.step_coefficients((alpha[:-1], beta[:-1]), (c, d), (alpha[1:], beta[1:]))
        after = torch.cat([kappa[1:].flip(0).cumprod(0).flip(0), kappa.new_ones(1)])
        found.update({f"{name}_kappa": kappa, f"{name}_eta": eta, f"{name}_kappa_product_after": after})

    if "alpha_bar" in config:
        abar = config["alpha_bar"]
        add("ddim", (abar.sqrt(), (1 - abar).sqrt()), (torch.zeros_like(abar), torch.ones_like(abar)))
    if "t_flow" in config:
        flow = uedm.FlowMatching()
        add("fm_euler", flow.state(config["t_flow"]), flow.coefficients(config["t_flow"])[2:4])
    if "sigma" in config:
        sigma, one = config["sigma"], torch.ones_like(config["sigma"])
        for name, ours in (("edm", "edm"), ("uedm", "uedm")):
            formulation = uedm.make_formulation(ours, {"sigma_data": float(config["sigma_data"])})
            add(f"{name}_euler", formulation.state(sigma), formulation.coefficients(sigma)[2:4])
        add("xpred_ve_euler", (one, sigma), (one, torch.zeros_like(sigma)))
    return found


def run(case: Case) -> dict[str, Tensor]:
    """By what the case configures: a denoiser, noise levels, or steps of samplers."""
    kinds: dict[str, Callable[[Case], dict[str, Tensor]]] = {"precond": denoiser, "t": reformulation}
    kinds |= dict.fromkeys(("alpha_bar", "t_flow", "sigma"), coefficients)
    for key, kind in kinds.items():
        if key in case["config"]:
            return kind(case)
    raise unknown("kind of case", ", ".join(case["config"]), kinds)
