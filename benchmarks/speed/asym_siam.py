"""Speed of Asym-Siam: our training step and data pipeline beside those of the official code.

Every step is whole: queries of the large crop and of small ones, moving average of the key encoder, the key views in
one shuffled batch, logits against the queue, enqueue, backward, SGD. All run as one process in a gloo group, which the
official code cannot do without; no other package has these designs. Nobody else's code is copied here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import siamese

RECIPE = "asym_siam/pretrain_imagenet1k"
SGD = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}
PACKAGES: tuple[str, ...] = ()
_SCRIPT = {"dim": 128, "queue_size": 65536, "momentum": 0.999, "temperature": 0.2}
MODELS: dict[str, dict[str, Any]] = {
    "resnet50": {**_SCRIPT, "arch": "resnet50", "img_size": 224, "minis": 0, "keys": 2},
    "resnet50_multicrop": {**_SCRIPT, "arch": "resnet50", "img_size": 224, "minis": 6, "keys": 1},
    "tiny": {**_SCRIPT, "arch": "resnet18", "queue_size": 16, "img_size": 32, "minis": 2, "keys": 2},  # for a test
}
DEFAULT_MODEL = "resnet50"


def _options(size: dict[str, Any]) -> dict[str, Any]:
    own = {f"model.{name}": size[name] for name in (*_SCRIPT, "arch")}
    own |= {"model.source_minis": size["minis"], "model.target_views": size["keys"]}
    return {**own, "data.image_size": size["img_size"]}


def _views(size: dict[str, Any], images: Tensor) -> list[Tensor]:
    """The large crop, small ones cut out of further images, and the keys."""
    small = size["img_size"] * 96 // 224
    minis = [view[..., :small, :small] for view in images[1 : 1 + size["minis"]]]
    return [images[0], *minis, *images[1 + size["minis"] :]]


def official(size: dict[str, Any], setting: Setting) -> Trainer:
    assert setting.official is not None
    module = harness.import_from(setting.official, "moco.builder")
    siamese.group_of_one(setting)
    numbers = [size[name] for name in _SCRIPT]
    network = module.MoCo(getattr(torchvision.models, size["arch"]), *numbers).to(setting.device)
    first_key = 1 + size["minis"]

    def loss(images: Tensor) -> Tensor:
        views = _views(size, images)
        with siamese.cuda_is(setting.device):
            logits, labels = network(views[:1], views[1:first_key], views[first_key:])
        terms: Sequence[Tensor] = [cross_entropy(*pair) for pair in zip(logits, labels, strict=True)]
        return terms[0] + (torch.stack(terms[1:]).mean() if len(terms) > 1 else 0)

    about = (
        "facebookresearch/asym-siam on torchvision's ResNet, a process group of one; torch.optim.SGD as in its script"
    )
    version, optimizer = harness.revision(setting.official), torch.optim.SGD(network.parameters(), **SGD)
    return Trainer("official", version, loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A checkout that is not given is left out."""
    size = MODELS[setting.model]
    ours = harness.from_recipe(RECIPE, _options(size), lambda images: {"views": _views(size, images)}, setting)
    return [ours, *([official(size, setting)] if setting.official else [])]


def images(setting: Setting) -> Tensor:
    """Noise (V,B,3,H,W), of which the views are made."""
    size = MODELS[setting.model]
    return siamese.images(setting, size["img_size"], 1 + size["minis"] + size["keys"])


def work(setting: Setting) -> Work:
    """Images with all their views; measured FLOPs of queries, keys and logits."""
    size = MODELS[setting.model]
    network = harness.recipe_task(RECIPE, _options(size), "meta").network
    count, side = 1 + size["minis"] + size["keys"], size["img_size"]
    views = _views(size, torch.empty(count, setting.batch, 3, side, side, device="meta"))
    first_key = 1 + size["minis"]

    def loss() -> Tensor:
        queries = [network.query(view) for view in views[:first_key]]
        keys = torch.stack([network.key(view) for view in views[first_key:]]).mean(dim=0)
        return torch.stack([(q @ network.queue).sum() + (q * keys).sum() for q in queries]).sum()

    return Work(setting.batch, 0, harness.count_flops(loss), {"queue_size": size["queue_size"], "views": count})


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch of two views, in this process (no workers), ours first."""
    side = MODELS[setting.model]["img_size"]
    with siamese.two_view_loaders(RECIPE, {}, setting, side, [siamese.pil_view(side)] * 2, "'s baseline") as found:
        yield found
