"""Speed of MoCo v2: our training step and data pipeline beside those of the official code and of lightly's parts.

Every step is whole: query forward, moving average of the key encoder, shuffled key forward, logits against the queue,
enqueue, backward, SGD. All run as one process in a gloo group, which the official code cannot do without, with the
sizes of the ResNet-50 recipe or of the official CIFAR-10 demo; nobody else's code is copied here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import siamese

RECIPE = "moco_v2/pretrain_imagenet1k"
SGD = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}
PACKAGES = ("lightly",)
_V2 = {"dim": 128, "momentum": 0.999, "temperature": 0.2, "small_images": False}
_DEMO = {"momentum": 0.99, "temperature": 0.1, "small_images": True}  # without the splits of BatchNorm of its notebook
MODELS: dict[str, dict[str, Any]] = {
    "resnet50": {**_V2, "arch": "resnet50", "img_size": 224, "queue_size": 65536},
    "resnet18_cifar": {**_V2, "arch": "resnet18", "img_size": 32, "queue_size": 4096, **_DEMO},
    "tiny": {**_V2, "arch": "resnet18", "img_size": 32, "queue_size": 16},  # for the harness's own test
}
DEFAULT_MODEL = "resnet50"


def _options(size: dict[str, Any]) -> dict[str, Any]:
    own = {f"model.{name}": value for name, value in size.items() if name != "img_size"}
    return {**own, "data.image_size": size["img_size"]}


def _backbone(size: dict[str, Any], **options: Any) -> Any:
    """torchvision's ResNet, as the official script takes it, with the demo's stem where the size wants it."""
    network: Any = torchvision.models.get_model(size["arch"], **options)
    if size["small_images"]:
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network


def official(size: dict[str, Any], setting: Setting) -> Trainer:
    assert setting.official is not None
    module = harness.import_from(setting.official, "moco.builder")
    siamese.group_of_one(setting)
    numbers = [size[name] for name in ("dim", "queue_size", "momentum", "temperature")]
    network = module.MoCo(lambda **options: _backbone(size, **options), *numbers, mlp=True).to(setting.device)

    def loss(views: Tensor) -> Tensor:
        with siamese.cuda_is(setting.device):
            logits, labels = network(views[0], views[1])
        return cross_entropy(logits, labels)

    about = "facebookresearch/moco on torchvision's ResNet, a process group of one; torch.optim.SGD as in its script"
    version, optimizer = harness.revision(setting.official), torch.optim.SGD(network.parameters(), **SGD)
    return Trainer("official", version, loss, optimizer, about)


def lightly_moco(size: dict[str, Any], setting: Setting) -> Trainer:
    """MoCo v2 put together from lightly's parts, as its documentation describes."""
    from lightly.loss import NTXentLoss
    from lightly.models import utils
    from lightly.models.modules import MoCoProjectionHead

    trunk = _backbone(size)
    width, trunk.fc = trunk.fc.in_features, nn.Identity()
    quick = nn.ModuleList([trunk, MoCoProjectionHead(width, width, size["dim"])]).to(setting.device)
    slow = copy.deepcopy(quick).requires_grad_(False)
    criterion = NTXentLoss(size["temperature"], memory_bank_size=(size["queue_size"], size["dim"])).to(setting.device)

    def loss(views: Tensor) -> Tensor:
        for ours, theirs in zip(quick, slow, strict=True):
            utils.update_momentum(ours, theirs, m=size["momentum"])
        query = quick[1](quick[0](views[0]))
        with torch.no_grad():
            shuffled, order = utils.batch_shuffle(views[1])
            key = utils.batch_unshuffle(slow[1](slow[0](shuffled)), order)
        return criterion(query, key)

    about = "MoCoProjectionHead, NTXentLoss with a memory bank, update_momentum; torch.optim.SGD"
    optimizer = torch.optim.SGD(quick.parameters(), **SGD)
    return Trainer("lightly", package_version("lightly") or "", loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size = MODELS[setting.model]
    ours = harness.from_recipe(RECIPE, _options(size), lambda views: {"views": views}, setting)
    peers = {official: setting.official, lightly_moco: package_version("lightly")}
    return [ours, *(build(size, setting) for build, here in peers.items() if here)]


def images(setting: Setting) -> Tensor:
    """Noise (2,B,3,H,W), the two views."""
    return siamese.images(setting, MODELS[setting.model]["img_size"])


def work(setting: Setting) -> Work:
    """Images are pairs of views; measured FLOPs of queries, keys and the logits."""
    size = MODELS[setting.model]
    network = harness.recipe_task(RECIPE, _options(size), "meta").network
    batch = torch.empty(setting.batch, 3, size["img_size"], size["img_size"], device="meta")

    def loss() -> Tensor:
        query, key = network.query(batch), network.key(batch)
        return (query @ network.queue).sum() + (query * key).sum()

    return Work(setting.batch, 0, harness.count_flops(loss), {"queue_size": size["queue_size"], "views": 2})


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch of two views, in this process (no workers), ours first."""
    side = MODELS[setting.model]["img_size"]
    with siamese.two_view_loaders(RECIPE, {}, setting, side, [siamese.pil_view(side)] * 2, "'s --aug-plus") as found:
        yield found
