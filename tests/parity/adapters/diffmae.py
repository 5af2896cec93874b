"""Runs the kinds of cases that were derived from the paper's equations; everything else is read from the case."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.diffusion import Diffusion
from zoo.ops.masking import random_masking
from zoo.ops.patches import patchify
from zoo.parity import Case, Config, filled_inputs
from zoo.selfsup.diffmae import diffuse, noise_schedule, posterior_step
from zoo.selfsup.mae import reconstruction_loss


def _betas(config: Config, rho: float) -> Tensor:
    return noise_schedule(*(config[name] for name in ("timesteps", "beta_start", "beta_end")), rho)


def _process(config: Config, rho: float) -> Diffusion:
    return Diffusion(_betas(config, rho), prediction="data", variance="fixed_small")


def schedules(case: Case) -> dict[str, Tensor]:
    found = {}
    for rho in case["config"]["rhos"]:
        process = _process(case["config"], rho)
        found |= {f"beta_rho_{rho}": _betas(case["config"], rho), f"alpha_bar_rho_{rho}": process.abar}
    return found


def step(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    patches = patchify(inputs["imgs"], config["patch_size"])
    process = _process(config, config["rho"])
    t = torch.as_tensor(config["t"], device=patches.device).expand(len(patches))
    mask = random_masking(inputs["mask_noise"], config["mask_ratio"]).mask
    noisy = diffuse(patches, mask, t, inputs["noise"], process)
    drawn = posterior_step(noisy, inputs["prediction"], t, inputs["step_noise"], process)
    return {
        "mask": mask,
        "noisy_patches": noisy,
        "loss": reconstruction_loss(inputs["prediction"], patches, mask),
        "posterior_sample": torch.where(mask[..., None] > 0, drawn, patches),
    }


def run(case: Case) -> dict[str, Tensor]:
    """What the case's outputs are compared with; its kind shows in what it is asked for."""
    return schedules(case) if "rhos" in case["config"] else step(case)
