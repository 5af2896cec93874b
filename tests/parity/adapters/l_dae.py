"""Runs the kinds of cases that stand for l-DAE: the paper's formulas. A case is known by its name, or by what it gives;
everything else is read from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.patch_tokenizer import PatchTokenizer
from zoo.ops.patches import patchify, unpatchify
from zoo.ops.pca import Moments, PrincipalAxes
from zoo.parity import Case, dtype_of, filled_inputs
from zoo.selfsup import l_dae


def corrupt_and_loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    images, raw, patch, dim = inputs["imgs"], inputs["pca_raw"], config["patch_size"], config["latent_dim"]
    q, r = torch.linalg.qr(raw)
    basis = (q * r.diagonal().sign()).T
    zeros = torch.zeros_like(basis[0])
    tokenizer = PatchTokenizer(patch, images.shape[1], dim, latent_norm=config.get("latent_norm", "none"))
    tokenizer = tokenizer.to(images)
    tokenizer.take_axes(PrincipalAxes(basis, zeros, zeros + 1))
    sigma = torch.as_tensor(config["sigma"]).to(images).expand(len(images))
    latent = tokenizer.latents(images)
    noisy = l_dae.corrupt(latent, inputs["noise"], 1.0, sigma)
    residual = tokenizer.components(patchify(images - inputs["prediction"], patch))
    weight = l_dae.clean_weight(torch.ones_like(sigma), sigma**2)
    per_patch = l_dae.weighted_residual(residual, weight, dim, config["tail_weight"])
    image = unpatchify(tokenizer.decode(noisy), patch, (images.shape[2] // patch, images.shape[3] // patch))
    found = {"latent": latent, "noisy_latent": noisy, "noisy_image": image, "residual": residual}
    return {**found, "per_patch_loss": per_patch, "loss": per_patch.mean()}


def noise_schedules(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    steps = config["timesteps"]
    schedules = {kind: l_dae.NoiseSchedule(kind, steps) for kind in ("linear", "unscaled")}
    if any(name.endswith("_original") for name in case["outputs"]):
        schedules["original"] = l_dae.NoiseSchedule("original", steps, None, config["beta_start"], config["beta_end"])
    found: dict[str, Tensor] = {}
    for name, schedule in schedules.items():
        gamma, sigma = schedule.levels()
        weight = l_dae.clean_weight(gamma**2, sigma**2)
        found |= {f"gamma2_{name}": gamma**2, f"sigma_{name}": sigma, f"lambda_clean_{name}": weight}
    found |= {"sigma_linear_vp": found["sigma_linear"], "lambda_clean_vp": found["lambda_clean_linear"]}
    return {name: found[name].to(dtype_of(case)) for name in found if name in case["outputs"]}


def patch_pca(case: Case) -> dict[str, Tensor]:
    config, images = case["config"], filled_inputs(case)["imgs"]
    rows = torch.linspace(0.5, 2, images.shape[2], dtype=images.dtype, device=images.device)
    patches = patchify(images * rows[:, None], config["patch_size"]).flatten(0, 1)
    moments = Moments(patches.shape[1], images.device)
    for part in patches.split(max(1, len(patches) // 3)):  # as a stream
        moments.update(part)
    axes, dim = moments.axes(config["center"]), config["latent_dim"]
    tokenizer = PatchTokenizer(config["patch_size"], images.shape[1], dim, latent_norm="none").to(images)
    tokenizer.take_axes(axes)
    latents = tokenizer.encode(patches)
    return {
        "eigenvalues": axes.variances.to(images),
        "reconstruction": tokenizer.decode(latents) - tokenizer.mean,
        "explained": axes.explained(dim).to(images),
        "latent_std": latents.square().mean(dim=0).sqrt(),
    }


def run(case: dict[str, Any]) -> dict[str, Tensor]:
    """What the case's outputs are compared with."""
    if "pca_raw" in case["inputs"]:
        return corrupt_and_loss(case)
    if "timesteps" in case["config"]:
        return noise_schedules(case)
    if "imgs" in case["inputs"]:
        return patch_pca(case)
    raise ZooError(f"{case['case']}: no formula of this paper")
