"""Speed of a Drifting Model's step, and of its loss.

`step_*` times a whole training step on latents, compared as they are (no encoder, which costs everyone the same): ours
beside diffusers' DiT as the generator, of the same width and depth, under the loss written out plainly in torch.
`loss_*` times the loss alone, forward and backward, for one feature: ours beside the plain form. There is no official
PyTorch code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Setting, Trainer, Work, count_flops
from zoo.generation.drifting import drift_loss

RECIPE, LR = "drifting/train_imagenet1k", 1e-4
PACKAGES = ("diffusers",)
TEMPERATURES = (0.2, 0.05, 0.02)
# A step: width, depth, heads, side of the latents, patch. The batch is the generated samples of one label.
STEPS = {"step_b4": (768, 12, 12, 32, 4), "step_b2": (768, 12, 12, 32, 2), "step_tiny": (32, 2, 2, 8, 2)}
# A loss: problems, generated and real samples of each, channels; layer3 of the encoder of width 256 has 64 places
# a label.
LOSSES = {"loss_layer3": (64, 64, 80, 1024), "loss_tiny": (2, 4, 5, 8)}
MODELS: dict[str, Any] = {**STEPS, **LOSSES}
DEFAULT_MODEL = "step_b4"


def plain_loss(gen: Tensor, real: Tensor) -> Tensor:
    """The loss of gen (B, G, D) and real samples (B, P, D) as the equations say it, without further care."""
    with torch.no_grad():
        y, count = torch.cat([gen, real], 1), gen.shape[1]
        distance = (
            (gen[:, :, None].square().sum(3) + y[:, None].square().sum(3) - 2 * gen @ y.mT).clamp_min(1e-8).sqrt()
        )
        scale = distance.mean()
        unit, apart = scale / gen.shape[2] ** 0.5, distance / scale
        apart = apart + 100 * torch.nn.functional.pad(torch.eye(count, device=gen.device), (0, real.shape[1]))
        goal = gen / unit
        for temperature in TEMPERATURES:
            logits = -apart / temperature
            affinity = (logits.softmax(2) * logits.softmax(1)).clamp_min(1e-6).sqrt()
            minus, plus = affinity[:, :, :count], affinity[:, :, count:]
            weights = torch.cat([-minus * plus.sum(2, keepdim=True), plus * minus.sum(2, keepdim=True)], 2)
            force = weights @ (y / unit) - weights.sum(2, keepdim=True) * (gen / unit)
            goal = goal + force / force.square().mean().clamp_min(1e-8).sqrt()
    return (gen / unit - goal).square().mean((1, 2))


# ------------------------------------------------------------------------------------------------------------ a step


def _options(setting: Setting) -> dict[str, Any]:
    width, depth, heads, side, patch = STEPS[setting.model]
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch, "encoder": None}
    sizes |= {"sets": {"labels": 1, "generated": setting.batch, "positives": setting.batch, "unconditional": 0}}
    return {f"model.{name}": value for name, value in sizes.items()} | {"data.image_size": side, "model.optim.lr": LR}


def ours_step(setting: Setting) -> Trainer:
    label = torch.zeros(1, dtype=torch.long, device=setting.device)

    def batch(images: Tensor) -> dict[str, Tensor]:
        return {"image": images, "label": label, "positives": images[None], "unconditional": images[None, :0]}

    return harness.from_recipe(RECIPE, _options(setting), batch, setting)


def diffusers_step(setting: Setting) -> Trainer:
    from diffusers import DiTTransformer2DModel

    width, depth, heads, side, patch = STEPS[setting.model]
    network = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=4,
        num_layers=depth, sample_size=side, patch_size=patch, num_embeds_ada_norm=1000,
    ).to(setting.device)  # fmt: skip
    network.train()
    labels = torch.zeros(setting.batch, dtype=torch.long, device=setting.device)
    alpha = torch.ones(setting.batch, device=setting.device)

    def loss(images: Tensor) -> Tensor:
        made = network(torch.randn_like(images), timestep=alpha, class_labels=labels).sample
        return plain_loss(made.flatten(1)[None].float(), images.flatten(1)[None].float()).mean()

    about = "DiTTransformer2DModel as the generator, the plain loss; torch.optim.AdamW"
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    return Trainer("diffusers", package_version("diffusers") or "", loss, optimizer, about)


# ----------------------------------------------------------------------------------------------------------- the loss


def _loss_trainer(name: str, version: str, loss: Callable[..., Tensor], setting: Setting, about: str) -> Trainer:
    problems, generated, _, channels = LOSSES[setting.model]
    draw = torch.Generator().manual_seed(1)
    gen = nn.Parameter(torch.randn(problems, generated, channels, generator=draw).to(setting.device))
    return Trainer(name, version, lambda real: loss(gen, real).mean(), torch.optim.SGD([gen], lr=LR), about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first."""
    import zoo

    if setting.model in LOSSES:
        ours = _loss_trainer("zoo", zoo.__version__, lambda *x: drift_loss(*x).loss, setting, "drift_loss")
        about = "two softmaxes and a root, a field for each temperature"
        return [ours, _loss_trainer("plain", torch.__version__, plain_loss, setting, about)]
    found = [ours_step(setting)]
    return found + ([diffusers_step(setting)] if package_version("diffusers") else [])


def images(setting: Setting) -> Tensor:
    """Seeded noise: latents (B, 4, S, S), or real features (B, P, D)."""
    shape: tuple[int, ...]
    if setting.model in LOSSES:
        problems, _, real, channels = LOSSES[setting.model]
        shape = (problems, real, channels)
    else:
        shape = (setting.batch, 4, *(STEPS[setting.model][3],) * 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setting.device)


def work(setting: Setting) -> Work:
    """FLOPs of one forward and backward pass of the generator, or of the loss."""
    if setting.model in LOSSES:
        problems, generated, _, channels = LOSSES[setting.model]
        gen = torch.randn(problems, generated, channels, requires_grad=True)
        flops = count_flops(lambda: drift_loss(gen, images(setting).cpu()).loss.sum())
        return Work(problems * generated, problems * generated, flops, {"problems": problems})
    task = harness.recipe_task(RECIPE, _options(setting), "meta")
    net, count = task.network, setting.batch
    noise = torch.empty(count, *net.sample_shape, device="meta")
    styles, labels = (torch.zeros(*s, dtype=torch.long, device="meta") for s in ((count, net.style_tokens), (count,)))
    flops = count_flops(lambda: net(noise, styles, labels, torch.empty(count, device="meta")).sum())
    tokens = net.pos_embed.shape[1] + net.context_tokens
    return Work(count, count * tokens, flops, {"tokens": tokens})
