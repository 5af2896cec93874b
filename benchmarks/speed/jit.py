"""Speed of JiT: training step and sampler beside those of the official code, and diffusers' nearest transformer.

All train x-prediction under the v-loss on the same pictures. The official code compiles its blocks where it is
imported; here it does so with `--compile` only, as ours does. It puts tables and masks on a GPU wherever it runs: on a
CPU those calls do nothing. It wants einops.
"""

from __future__ import annotations

import contextlib
import warnings
from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from zoo.errors import ZooError

RECIPE, LR, GUIDANCE, STEPS = "jit/train_imagenet1k", 2e-4, 3.0, 50
PACKAGES = ("diffusers",)
LOADING_BATCH = 32
B = {"embed_dim": 768, "num_heads": 12, "bottleneck": 128}
MODELS: dict[str, dict[str, int]] = {
    "b16": {**B, "img_size": 256, "patch_size": 16, "depth": 12, "context_start": 4},
    "b32": {**B, "img_size": 512, "patch_size": 32, "depth": 12, "context_start": 4},
    "b16_depth2": {**B, "img_size": 256, "patch_size": 16, "depth": 2, "context_start": 1},  # sampling on a CPU
    "tiny": {
        **{"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2},
        **{"bottleneck": 8, "context_start": 1},  # for the harness's own test
    },
}
DEFAULT_MODEL = "b16"


def _options(size: dict[str, int]) -> dict[str, Any]:
    own = {f"model.{name}": value for name, value in size.items() if name != "img_size"}
    return {
        **own,
        "data.image_size": size["img_size"],
        "model.optim.lr": LR,
        "model.sampling.guidance": GUIDANCE,
        "model.sampling.steps": STEPS,
    }


def _labels(count: int, device: str) -> Tensor:
    return torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(1)).to(device)


@contextlib.contextmanager
def _as_on_a_gpu(device: str) -> Iterator[None]:
    """The official code's calls of .cuda(), and of autocast for one, do no harm on a CPU."""
    with contextlib.ExitStack() as stack:
        if not device.startswith("cuda"):
            stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda self: self))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield


def _denoiser(size: dict[str, int], setting: Setting) -> Any:
    """The official Denoiser around a network of this size."""
    assert setting.official is not None
    if package_version("einops") is None:
        raise ZooError("the official code of JiT wants einops: pip install einops")
    with _as_on_a_gpu(setting.device):
        keep = contextlib.nullcontext() if setting.compile else mock.patch.object(torch, "compile", lambda f: f)
        with keep:
            module = harness.import_from(setting.official, "denoiser")
        names = {"patch_size": "patch_size", "embed_dim": "hidden_size", "depth": "depth", "num_heads": "num_heads"}
        names |= {"bottleneck": "bottleneck_dim", "context_start": "in_context_start"}
        own = {theirs: size[ours] for ours, theirs in names.items()}
        whole = module.JiT_models["JiT-B/16"].__globals__["JiT"]
        module.JiT_models["timed"] = lambda **options: whole(**own, in_context_len=32, **options)
        times = {"P_mean": -0.8, "P_std": 0.8, "t_eps": 0.05, "noise_scale": max(1.0, size["img_size"] / 256)}
        averages = {"ema_decay1": 0.9999, "ema_decay2": 0.9996, "label_drop_prob": 0.1, "class_num": 1000}
        drawn = {"sampling_method": "heun", "num_sampling_steps": STEPS, "cfg": GUIDANCE}
        drawn |= {"interval_min": 0.1, "interval_max": 1.0, "attn_dropout": 0.0, "proj_dropout": 0.0}
        args = Namespace(model="timed", img_size=size["img_size"], **times, **averages, **drawn)
        return module.Denoiser(args).to(setting.device)


def official(size: dict[str, int], setting: Setting) -> Trainer:
    model = _denoiser(size, setting).train()
    labels = _labels(setting.batch, setting.device)

    def loss(images: Tensor) -> Tensor:
        with _as_on_a_gpu(setting.device):
            return model(images, labels)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, (0.9, 0.95), weight_decay=0.0)
    about = "LTH14/JiT: Denoiser.forward, attention written out; torch.optim.AdamW as in its main_jit.py"
    return Trainer("official", harness.revision(setting.official), loss, optimizer, about)  # type: ignore[arg-type]


def diffusers_trunk(size: dict[str, int], setting: Setting) -> Trainer:
    from diffusers import DiTTransformer2DModel

    from zoo.generation.jit import denoising_loss
    from zoo.ops.flow import logit_normal

    network: nn.Module = DiTTransformer2DModel(
        num_attention_heads=size["num_heads"],
        attention_head_dim=size["embed_dim"] // size["num_heads"],
        in_channels=3,
        out_channels=3,
        num_layers=size["depth"],
        sample_size=size["img_size"],
        patch_size=size["patch_size"],
        num_embeds_ada_norm=1000,
    )
    network = network.to(setting.device).train()
    labels = _labels(setting.batch, setting.device)

    def loss(images: Tensor) -> Tensor:
        t = logit_normal(torch.randn(len(images), device=images.device), -0.8, 0.8)
        call: Any = lambda z, t, y: network(z, timestep=t, class_labels=y).sample  # noqa: E731
        return denoising_loss(call, images, torch.randn_like(images), t, labels).mean()

    about = "DiTTransformer2DModel: LayerNorm and GELU, no rotary positions, no context tokens; torch.optim.AdamW"
    optimizer = torch.optim.AdamW(network.parameters(), LR, (0.9, 0.95), weight_decay=0.0)
    return Trainer("diffusers", package_version("diffusers") or "", loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first; ours once more with activations recomputed."""
    size, labels = MODELS[setting.model], _labels(setting.batch, setting.device)

    def ours(**options: Any) -> Trainer:
        how = {**_options(size), **options}
        return harness.from_recipe(RECIPE, how, lambda images: {"image": images, "label": labels}, setting)

    found = [ours(), ours(**{"model.grad_checkpointing": True})]
    found[1].name = "zoo, checkpointed"
    found += [official(size, setting)] if setting.official is not None else []
    return found + ([diffusers_trunk(size, setting)] if package_version("diffusers") else [])


def images(setting: Setting) -> Tensor:
    """Seeded noise (B, 3, S, S): the time of a step does not depend on what is in it."""
    side, generator = MODELS[setting.model]["img_size"], torch.Generator().manual_seed(0)
    return torch.randn(setting.batch, 3, side, side, generator=generator).to(setting.device)


def work(setting: Setting) -> Work:
    size = MODELS[setting.model]
    task = harness.recipe_task(RECIPE, _options(size), "meta")
    x, t = (
        torch.empty(setting.batch, 3, *[size["img_size"]] * 2, device="meta"),
        torch.empty(setting.batch, device="meta"),
    )
    labels = torch.zeros(setting.batch, dtype=torch.long, device="meta")
    tokens = (size["img_size"] // size["patch_size"]) ** 2
    flops = harness.count_flops(lambda: task.network(x, t, labels).sum())
    return Work(setting.batch, setting.batch * tokens, flops, {"tokens": tokens})


def samplers(setting: Setting) -> tuple[list[Loader], Work]:
    """Heun's 50 steps under guidance, ours first."""
    import zoo

    size, labels = MODELS[setting.model], _labels(setting.batch, setting.device)
    task = harness.recipe_task(RECIPE, _options(size), setting.device).eval()
    shape = (setting.batch, 3, size["img_size"], size["img_size"])
    mixed, device = setting.torch_dtype is not torch.float32, setting.device.split(":")[0]

    def forever(draw: Any) -> Iterator[Tensor]:
        while True:
            with torch.inference_mode(), torch.autocast(device, setting.torch_dtype, enabled=mixed):
                pictures = draw()
                yield pictures.cpu()

    draw = forever(lambda: task.sample(torch.randn(shape, device=setting.device), labels))
    found = [
        Loader("zoo", zoo.__version__, draw, "Denoising.sample: both passes in one batch, one outside the interval")
    ]
    if setting.official is not None:
        model = _denoiser(size, setting).eval()

        def theirs() -> Tensor:
            with _as_on_a_gpu(setting.device):
                return model.generate(labels)

        about = "LTH14/JiT: Denoiser.generate, two passes at every evaluation"
        found.append(Loader("official", harness.revision(setting.official), forever(theirs), about))
    title = f"{STEPS}-step Heun, {setting.model}, {setting.dtype}, batch {setting.batch}, guidance {GUIDANCE}"
    return found, Work(setting.batch, detail={"title": title})


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """From JPEG files to a batch of centre crops in [-1, 1], in this process (no workers), ours first."""
    from torchvision import datasets, transforms

    size = MODELS[setting.model]
    with harness.photos(setting, 4 * LOADING_BATCH) as (folder, name):
        found = [harness.data_from_recipe(RECIPE, _options(size), folder, LOADING_BATCH)]
        if setting.official is not None:
            crop = harness.import_from(setting.official / "util", "crop").center_crop_arr
            steps = [lambda image: crop(image, size["img_size"]), transforms.RandomHorizontalFlip()]
            data = datasets.ImageFolder(str(folder), transforms.Compose([*steps, transforms.PILToTensor()]))
            about = "torchvision ImageFolder with the crop and transforms of the official main_jit.py; bytes"
            found.append(harness.peer_loader("official", "torchvision", data, LOADING_BATCH, about))
        yield found, Work(LOADING_BATCH, detail={"data": name, "crop": size["img_size"]})
