"""Speed of pixel MeanFlow: its trunk with Muon, and its one-step sampler.

`trunk_*` times one training step of the transformer with both heads on noise, with the Muon of its recipe beside
PyTorch's own Muon (matrices) and NAdam (the rest), which are other optimisers; diffusers' nearest network is beside the
same trunk in :mod:`benchmarks.speed.imf`. `sample_*` times one-step sampling beside the official PyTorch code (branch
torch of Lyy-iiis/pMF), which does not train; the update that the harness asks for is of one number there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Setting, Trainer, Work, count_flops

RECIPE, LR = "pmf/train_imagenet1k", 1e-3
PACKAGES = ("torch",)
# width, depth, depth of a head, heads, patch, side of the pictures, the official function
SIZES: dict[str, tuple[Any, ...]] = {
    "b16": (768, 16, 8, 12, 16, 256, "pmfDiT_B_16"),
    "tiny": (32, 3, 1, 2, 8, 32, "pmfDiT_tiny"),  # for the harness's own test
}
MODELS = {f"{kind}_{size}": numbers for kind in ("trunk", "sample") for size, numbers in SIZES.items()}
DEFAULT_MODEL = "trunk_b16"


def _options(setting: Setting) -> dict[str, Any]:
    width, depth, head, heads, patch, side, _ = MODELS[setting.model]
    sizes = {"embed_dim": width, "depth": depth, "head_depth": head, "num_heads": heads, "patch_size": patch}
    own = {"perceptual": None, "optim.lr": LR, "velocity_head": not setting.model.startswith("sample")}
    return {f"model.{name}": value for name, value in {**sizes, **own}.items()} | {"data.image_size": side}


def _labels(setting: Setting) -> Tensor:
    return (torch.arange(setting.batch) * 389 % 1000).to(setting.device)


def _given(setting: Setting) -> tuple[Tensor, ...]:
    """t, h, omega, t_min, t_max (B,)."""
    drawn = torch.rand(5, setting.batch, generator=torch.Generator().manual_seed(2)).to(setting.device)
    return drawn[0], drawn[1], 1 + drawn[2], drawn[3] / 2, 0.5 + drawn[4] / 2


class Both(torch.optim.Optimizer):
    """Two optimisers as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.parts = parts

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


def _trunk(setting: Setting) -> tuple[Any, Callable[[Tensor], Tensor]]:
    task = harness.recipe_task(RECIPE, _options(setting), setting.device)
    given, labels = _given(setting), _labels(setting)

    def loss(z: Tensor) -> Tensor:
        u, v = task.network(z, *given, labels)
        return mse_loss(u.to(z.dtype), z) + mse_loss(v.to(z.dtype), z)

    return task, loss


def ours_trunk(setting: Setting) -> Trainer:
    import zoo
    from zoo.training.optim import make_optimizer, param_groups

    task, loss = _trunk(setting)
    optimizer = make_optimizer(param_groups(task.network, task.optim), task.optim, LR)
    return Trainer("zoo", zoo.__version__, loss, optimizer, "zoo.nn.token_dit with both heads, and its recipe's Muon")


def torch_muon(setting: Setting) -> Trainer:
    task, loss = _trunk(setting)
    matrices = [m.weight for m in task.network.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in task.network.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=0.0, momentum=0.95)
    optimizer = Both(muon, torch.optim.NAdam(rest, lr=LR, betas=(0.9, 0.95)))
    about = "the same network with torch.optim.Muon and torch.optim.NAdam, which are other optimisers (see the card)"
    return Trainer("torch.optim.Muon", package_version("torch") or "", loss, optimizer, about)


def _sampler(name: str, version: str, sample: Callable[[Tensor], Tensor], setting: Setting, about: str) -> Trainer:
    one = nn.Parameter(torch.ones((), device=setting.device))

    def loss(noise: Tensor) -> Tensor:
        with torch.no_grad():
            picture = sample(noise)
        return picture.float().mean() * one

    return Trainer(name, version, loss, torch.optim.SGD([one], lr=0.0), about)


def ours_sample(setting: Setting) -> Trainer:
    import zoo

    network = harness.recipe_task(RECIPE, _options(setting), setting.device).network.eval()
    labels = _labels(setting)
    return _sampler("zoo", zoo.__version__, lambda z: network.sample(z, labels), setting, "PixelMeanFlowDiT.sample")


def official_sample(setting: Setting) -> Trainer:
    assert setting.official is not None
    network = getattr(harness.import_from(setting.official, "pmf").pmfDiT, MODELS[setting.model][-1])(eval_mode=True)
    network = network.to(setting.device).eval()
    one, labels = torch.ones(setting.batch, device=setting.device), _labels(setting)
    about = "Lyy-iiis/pMF, branch torch: the network at t = 1, r = 0, and the step z - u"

    def sample(z: Tensor) -> Tensor:
        return z - network(z, one, one, 8.5 * one, 0.1 * one, 0.7 * one, labels)[0]

    return _sampler("official", harness.revision(setting.official), sample, setting, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    if setting.model.startswith("sample"):
        return [ours_sample(setting), *([official_sample(setting)] if setting.official is not None else [])]
    return [ours_trunk(setting), *([torch_muon(setting)] if hasattr(torch.optim, "Muon") else [])]


def images(setting: Setting) -> Tensor:
    """Seeded noise (B, 3, S, S): the time of a step does not depend on what is in it."""
    side = MODELS[setting.model][5]
    return torch.randn(setting.batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(setting.device)


def work(setting: Setting) -> Work:
    """FLOPs of one forward and backward pass of both heads (of one head, for sampling too)."""
    network = harness.recipe_task(RECIPE, _options(setting), "meta").network
    side = MODELS[setting.model][5]
    with torch.device("meta"):
        given, labels = torch.empty(5, setting.batch), torch.zeros(setting.batch, dtype=torch.long)
        z = torch.empty(setting.batch, 3, side, side)
    heads = "uv" if network.velocity_head else "u"
    flops = count_flops(lambda: torch.stack(network(z, *given, labels, heads=heads)).sum())
    tokens = 20 + network.x_embedder.num_patches
    return Work(setting.batch, setting.batch * tokens, flops, {"tokens": tokens})
