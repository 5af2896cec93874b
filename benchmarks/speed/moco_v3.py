"""Speed of MoCo v3: our training step and data pipeline beside those of the official code and of lightly's parts.

Every step is whole: queries of both views, moving average of the momentum encoder, keys of both views, the symmetric
loss, backward, AdamW, the patch projection frozen. All run as one process in a gloo group, which the official code
cannot do without, and it runs on today's timm; nobody else's code is copied here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import siamese
from benchmarks.speed.shared.old_libraries import as_in_timm_0_4

RECIPE = "moco_v3/pretrain_imagenet1k"
ADAMW = {"lr": 1.5e-4, "weight_decay": 0.1}
MOMENTUM = 0.99
PACKAGES = ("lightly",)
_HEADS = {"dim": 256, "mlp_dim": 4096, "temperature": 0.2}
_TINY = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vit_small": {**_HEADS, "arch": "vit_small", "img_size": 224},
    "vit_base": {**_HEADS, "arch": "vit_base", "img_size": 224},
    "tiny": {**_HEADS, "arch": "vit_small", "img_size": 32, "dim": 16, "mlp_dim": 32, **_TINY},  # for a test
}
DEFAULT_MODEL = "vit_small"


def _options(size: dict[str, Any]) -> dict[str, Any]:
    own = {f"model.{name}": value for name, value in size.items() if name != "img_size"}
    return {**own, "data.image_size": size["img_size"]}


def _trunk(size: dict[str, Any]) -> dict[str, Any]:
    """What a ViT of timm is called with for this size, beside its name."""
    return {name: size[name] for name in ("img_size", *_TINY) if name in size}


def official(size: dict[str, Any], setting: Setting) -> Trainer:
    assert setting.official is not None
    siamese.group_of_one(setting)
    builder = harness.import_from(setting.official, "moco.builder")
    numbers = [size[name] for name in ("dim", "mlp_dim", "temperature")]
    with as_in_timm_0_4():
        vit = getattr(harness.import_from(setting.official, "vits"), size["arch"])
        network = builder.MoCo_ViT(partial(vit, stop_grad_conv1=True, **_trunk(size)), *numbers)
    network.to(setting.device)

    def loss(views: Tensor) -> Tensor:
        with siamese.cuda_is(setting.device):
            return network(views[0], views[1], MOMENTUM)

    about = (
        f"facebookresearch/moco-v3 on timm {timm.__version__}, a process group of one; torch.optim.AdamW as its script"
    )
    version, optimizer = harness.revision(setting.official), torch.optim.AdamW(network.parameters(), **ADAMW)
    return Trainer("official", version, loss, optimizer, about)


def lightly_moco_v3(size: dict[str, Any], setting: Setting) -> Trainer:
    """MoCo v3 put together from timm's encoder and lightly's heads and moving average; it has no loss for it."""
    from lightly.models import utils
    from lightly.models.modules import MoCoProjectionHead

    trunk: Any = timm.create_model(f"{size['arch']}_patch16_224", num_classes=0, **_trunk(size))
    trunk.patch_embed.proj.requires_grad_(False)
    trunk.pos_embed.requires_grad_(False)
    hidden, dim = size["mlp_dim"], size["dim"]
    quick = nn.Sequential(trunk, MoCoProjectionHead(trunk.num_features, hidden, dim, 3, batch_norm=True))
    predictor = MoCoProjectionHead(dim, hidden, dim, 2, batch_norm=True).to(setting.device)
    quick, slow = quick.to(setting.device), copy.deepcopy(quick).requires_grad_(False).to(setting.device)

    def term(query: Tensor, key: Tensor) -> Tensor:
        logits = normalize(query, dim=1) @ normalize(key, dim=1).T / size["temperature"]
        return 2 * size["temperature"] * cross_entropy(logits, torch.arange(len(query), device=query.device))

    def loss(views: Tensor) -> Tensor:
        q1, q2 = (predictor(quick(view)) for view in views)
        with torch.no_grad():
            utils.update_momentum(quick, slow, m=MOMENTUM)
            k1, k2 = (slow(view) for view in views)
        return term(q1, k2) + term(q2, k1)

    about = "timm's encoder, MoCoProjectionHead and update_momentum; torch.optim.AdamW"
    parameters = [p for part in (quick, predictor) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **ADAMW)
    return Trainer("lightly", package_version("lightly") or "", loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size = MODELS[setting.model]
    options = {**_options(size), "model.optim.lr": ADAMW["lr"]}
    ours = harness.from_recipe(RECIPE, options, lambda views: {"views": list(views)}, setting)
    peers = {official: setting.official, lightly_moco_v3: package_version("lightly")}
    return [ours, *(build(size, setting) for build, here in peers.items() if here)]


def images(setting: Setting) -> Tensor:
    """Noise (2,B,3,H,W), the two views."""
    return siamese.images(setting, MODELS[setting.model]["img_size"])


def work(setting: Setting) -> Work:
    """Images are pairs of views; measured FLOPs of queries and keys."""
    size = MODELS[setting.model]
    network = harness.recipe_task(RECIPE, _options(size), "meta").network
    batch = torch.empty(setting.batch, 3, size["img_size"], size["img_size"], device="meta")

    def loss() -> Tensor:
        return torch.stack([network.query(batch).sum() + network.key(batch).sum() for _ in range(2)]).sum()

    return Work(setting.batch, 0, harness.count_flops(loss), {"views": 2})


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch of two views, in this process (no workers), ours first."""
    side, hue = MODELS[setting.model]["img_size"], (0.2, 0.1)
    views = [siamese.pil_view(side, 0.08, hue, 1.0), siamese.pil_view(side, 0.08, hue, 0.1, solarize=0.2)]
    with siamese.two_view_loaders(RECIPE, {}, setting, side, views, "") as found:
        yield found
