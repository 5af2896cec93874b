"""Speed of SimSiam: our training step and data pipeline beside those of the official code and of lightly's parts.

Every step is whole: both views forward, one after the other, both predictions, the symmetric loss, backward, SGD. All
run on one process, without SyncBatchNorm; nobody else's code is copied here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import siamese

RECIPE = "simsiam/pretrain_imagenet1k"
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
PACKAGES = ("lightly",)
MODELS: dict[str, dict[str, Any]] = {
    "resnet50": {"arch": "resnet50", "dim": 2048, "pred_dim": 512, "img_size": 224},
    "resnet18": {"arch": "resnet18", "dim": 2048, "pred_dim": 512, "img_size": 32},
    "tiny": {"arch": "resnet18", "dim": 32, "pred_dim": 8, "img_size": 32},  # for the harness's own test
}
DEFAULT_MODEL = "resnet50"


def _options(size: dict[str, Any]) -> dict[str, Any]:
    own = {f"model.{name}": value for name, value in size.items() if name != "img_size"}
    return {**own, "data.image_size": size["img_size"]}


def _loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    return -(cosine_similarity(p1, z2.detach()).mean() + cosine_similarity(p2, z1.detach()).mean()) / 2


def official(size: dict[str, Any], setting: Setting) -> Trainer:
    assert setting.official is not None
    module = harness.import_from(setting.official, "simsiam.builder")
    arch: Any = getattr(torchvision.models, size["arch"])
    network = module.SimSiam(arch, size["dim"], size["pred_dim"]).to(setting.device)
    about = "facebookresearch/simsiam on torchvision's ResNet; torch.optim.SGD in two groups, as its script has it"
    groups = [{"params": network.encoder.parameters()}, {"params": network.predictor.parameters()}]
    version, optimizer = harness.revision(setting.official), torch.optim.SGD(groups, **SGD)
    return Trainer("official", version, lambda views: _loss(*network(views[0], views[1])), optimizer, about)


def lightly_simsiam(size: dict[str, Any], setting: Setting) -> Trainer:
    """SimSiam put together from lightly's parts, as its documentation describes."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

    trunk: Any = torchvision.models.get_model(size["arch"], zero_init_residual=True)
    width, trunk.fc = trunk.fc.in_features, nn.Identity()
    projector = SimSiamProjectionHead(width, width, size["dim"])
    predictor = SimSiamPredictionHead(size["dim"], size["pred_dim"], size["dim"])
    network = nn.ModuleList([trunk, projector, predictor]).to(setting.device)
    criterion = NegativeCosineSimilarity()

    def loss(views: Tensor) -> Tensor:
        z = [projector(trunk(view)) for view in views]
        p = [predictor(one) for one in z]
        return (criterion(p[0], z[1].detach()) + criterion(p[1], z[0].detach())) / 2

    about = "SimSiamProjectionHead, SimSiamPredictionHead, NegativeCosineSimilarity; torch.optim.SGD"
    optimizer = torch.optim.SGD(network.parameters(), **SGD)
    return Trainer("lightly", package_version("lightly") or "", loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size = MODELS[setting.model]
    options = {**_options(size), "model.optim.lr": SGD["lr"]}
    ours = harness.from_recipe(RECIPE, options, lambda views: {"views": list(views)}, setting)
    peers = {official: setting.official, lightly_simsiam: package_version("lightly")}
    return [ours, *(build(size, setting) for build, here in peers.items() if here)]


def images(setting: Setting) -> Tensor:
    """Noise (2,B,3,H,W), the two views."""
    return siamese.images(setting, MODELS[setting.model]["img_size"])


def work(setting: Setting) -> Work:
    """Images are pairs of views; measured FLOPs of embeddings and predictions."""
    size = MODELS[setting.model]
    network = harness.recipe_task(RECIPE, _options(size), "meta").network
    batch = torch.empty(setting.batch, 3, size["img_size"], size["img_size"], device="meta")

    def loss() -> Tensor:
        return torch.stack([network.predictor(network(batch)).sum() for _ in range(2)]).sum()

    return Work(setting.batch, 0, harness.count_flops(loss), {"views": 2})


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch of two views, in this process (no workers), ours first."""
    side = MODELS[setting.model]["img_size"]
    with siamese.two_view_loaders(RECIPE, {}, setting, side, [siamese.pil_view(side)] * 2, "") as found:
        yield found
