"""Speed of the token trunk and of improved MeanFlow's step.

`trunk_*` times one training step of the transformer with both heads on noise beside diffusers' nearest, a DiT with
adaLN of the same width and as many blocks. `step_*` times iMF's whole step beside the same network under the calls of
the official JAX code: two passes of a doubled batch, a third for the gated scale, and the derivative of the whole
batch. There is no official PyTorch code that trains, and its network for inference cannot: it turns queries and keys by
a view as complex numbers, through which no gradient flows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Setting, Trainer, Work, count_flops
from zoo.ops.flow import like

RECIPE, LR = "imf/train_imagenet1k", 1e-4
PACKAGES = ("diffusers",)
# width, depth, depth of a head, heads, side of the latents
SIZES = {"b2": (768, 12, 8, 12, 32), "m2": (768, 24, 8, 12, 32), "tiny": (32, 3, 1, 2, 8)}
MODELS = {f"{kind}_{size}": numbers for kind in ("trunk", "step") for size, numbers in SIZES.items()}
DEFAULT_MODEL = "step_b2"


def _options(model: str) -> dict[str, Any]:
    width, depth, head, heads, side = MODELS[model]
    sizes = {"embed_dim": width, "depth": depth, "head_depth": head, "num_heads": heads, "optim.lr": LR}
    return {f"model.{name}": value for name, value in sizes.items()} | {"data.image_size": side}


def _labels(setting: Setting) -> Tensor:
    return (torch.arange(setting.batch) * 389 % 1000).to(setting.device)


def _given(setting: Setting) -> tuple[Tensor, ...]:
    """t, h, omega, t_min, t_max (B,)."""
    drawn = torch.rand(5, setting.batch, generator=torch.Generator().manual_seed(2)).to(setting.device)
    return drawn[0], drawn[1], 1 + drawn[2], drawn[3] / 2, 0.5 + drawn[4] / 2


def _trainer(name: str, network: Any, loss: Callable[[Tensor], Tensor], about: str) -> Trainer:
    """Of a network of ours, with the fused optimiser of its task."""
    import zoo
    from zoo.training.optim import make_optimizer, param_groups

    optim = zoo.load_recipe(RECIPE)[0].optim
    return Trainer(name, zoo.__version__, loss, make_optimizer(param_groups(network, optim), optim, LR, True), about)


# ------------------------------------------------------------------------------------------------------------ the trunk


def ours_trunk(setting: Setting) -> Trainer:
    network = harness.recipe_task(RECIPE, _options(setting.model), setting.device).network
    given, labels = _given(setting), _labels(setting)

    def loss(z: Tensor) -> Tensor:
        u, v = network(z, *given, labels)
        return mse_loss(u.to(z.dtype), z) + mse_loss(v.to(z.dtype), z)

    return _trainer("zoo", network, loss, "zoo.nn.token_dit with both heads, and the fused AdamW of its task")


def diffusers_trunk(setting: Setting) -> Trainer:
    from diffusers import DiTTransformer2DModel

    width, depth, head, heads, side = MODELS[setting.model]
    network = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=4,
        num_layers=depth + head, sample_size=side, patch_size=2, num_embeds_ada_norm=1000,
    ).to(setting.device)  # fmt: skip
    network.train()
    t, labels = _given(setting)[0], _labels(setting)

    def loss(z: Tensor) -> Tensor:
        return mse_loss(network(z, timestep=t, class_labels=labels).sample.to(z.dtype), z)

    about = f"DiTTransformer2DModel, adaLN, {depth + head} blocks as ours; torch.optim.AdamW"
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0)
    return Trainer("diffusers", package_version("diffusers") or "", loss, optimizer, about)


# ------------------------------------------------------------------------------------------------------ the whole step


def ours_step(setting: Setting) -> Trainer:
    labels = _labels(setting)
    return harness.from_recipe(RECIPE, _options(setting.model), lambda z: {"image": z, "label": labels}, setting)


def whole_batches(setting: Setting) -> Trainer:
    """The step as the JAX code calls its network, without the heads that a compiler leaves out, and class dropout."""
    from zoo.generation.imf import average_and_derivative, velocity
    from zoo.ops.meanflow import adaptive_loss

    labels, task = _labels(setting), harness.recipe_task(RECIPE, _options(setting.model), setting.device)
    net, null = task.network, torch.full_like(labels, 1000)

    def loss(x: Tensor) -> Tensor:
        x, noise = net.normalised(x), torch.randn_like(x)
        t, r = task.pairs.pairs(*torch.randn(2, len(x), device=x.device))
        given = task.guidance.conditions(*torch.rand(3, len(x), device=x.device), whole=r >= t)
        z, v = (1 - like(t, x)) * x + like(t, x) * noise, noise - x
        with torch.no_grad():
            scales = torch.cat([given.omega, torch.ones_like(t)])
            twice = velocity(net, torch.cat([z, z]), torch.cat([t, t]), scales, torch.cat([labels, null]))
            everywhere, without = twice.to(x.dtype).chunk(2)
            omega = torch.where((t >= given.t_min) & (t <= given.t_max), given.omega, 1.0)
            within = velocity(net, z, t, omega, labels).to(x.dtype)
            still = v + like(1 - 1 / given.omega, x) * (everywhere - without)
            target = torch.where(like(r >= t, x), still, v + like(1 - 1 / omega, x) * (within - without))
        u, derivative, head = average_and_derivative(net, z, t, r, given, labels, within)
        assert head is not None
        errors = (u + like(t - r, x) * derivative - target, head - target)
        return torch.stack([adaptive_loss(error.square().flatten(1).sum(1)) for error in errors]).sum()

    about = "our network under the official JAX code's calls: two passes of a doubled batch, one more, all derivatives"
    return _trainer("whole batches", net, loss, about)


# ------------------------------------------------------------------------------------------------------------- together


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed is left out."""
    if setting.model.startswith("step"):
        return [ours_step(setting), whole_batches(setting)]
    return [ours_trunk(setting), *([diffusers_trunk(setting)] if package_version("diffusers") else [])]


def images(setting: Setting) -> Tensor:
    """Seeded noise (B, 4, S, S): the time of a step does not depend on what is in it."""
    side = MODELS[setting.model][-1]
    return torch.randn(setting.batch, 4, side, side, generator=torch.Generator().manual_seed(0)).to(setting.device)


def work(setting: Setting) -> Work:
    """FLOPs of one forward and backward pass of both heads; iMF's further passes come on top and are not counted."""
    network = harness.recipe_task(RECIPE, _options(setting.model), "meta").network
    side = MODELS[setting.model][-1]
    with torch.device("meta"):
        given, labels = torch.empty(5, setting.batch), torch.zeros(setting.batch, dtype=torch.long)
        z = torch.empty(setting.batch, 4, side, side)
    flops = count_flops(lambda: torch.stack(network(z, *given, labels)).sum())
    tokens = 20 + network.x_embedder.num_patches
    return Work(setting.batch, setting.batch * tokens, flops, {"tokens": tokens})
