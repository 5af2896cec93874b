"""Speed of MoCo v2: our training step and data pipeline beside those of the official code and of lightly's parts.

Every step is whole: query forward, moving average of the key encoder, shuffled key forward, logits against the queue,
enqueue, backward, SGD. All run as one process in a gloo group, which the official code cannot do without, with the
sizes of the ResNet-50 recipe or of the official CIFAR-10 demo; nobody else's code is copied here.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.environment import package_version
from benchmarks.speed.harness import Loader, Setting, Trainer, Work, count_flops, forever, photos, revision
from zoo.errors import ZooError

LR, MOMENTUM, WEIGHT_DECAY = 0.03, 0.9, 1e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = ("lightly",)
LOADING_BATCH = 32


@dataclass(frozen=True)
class Size:
    """A recipe's network: `small` for the CIFAR-10 stem, without the splits of BatchNorm, which the script lacks."""

    arch: str
    img_size: int
    queue_size: int
    small: bool = False
    momentum: float = 0.999
    temperature: float = 0.2
    dim: int = 128


MODELS = {
    "resnet50": Size("resnet50", 224, 65536),
    "resnet18_cifar": Size("resnet18", 32, 4096, small=True, momentum=0.99, temperature=0.1),
    "tiny": Size("resnet18", 32, 16),  # for the harness's own test
}
DEFAULT_MODEL = "resnet50"


def _ours_network(size: Size) -> nn.Module:
    from zoo.selfsup.moco import MoCoV2

    return MoCoV2(
        arch=size.arch,
        dim=size.dim,
        queue_size=size.queue_size,
        momentum=size.momentum,
        temperature=size.temperature,
        small_images=size.small,
    )


def ours(size: Size, setting: Setting) -> Trainer:
    import zoo
    from zoo.selfsup.moco import info_nce
    from zoo.training import optim

    network: Any = _ours_network(size).to(setting.device)
    declared = optim.Optim(name="sgd", lr=LR, weight_decay=WEIGHT_DECAY, no_decay="none", interval="epoch")
    optimizer = optim.make_optimizer(optim.param_groups(network.encoder_q, declared), declared, LR, fused=True)
    return Trainer(
        "zoo",
        zoo.__version__,
        lambda views: info_nce(network.step(views[0], views[1])),
        optimizer,
        "zoo.selfsup.moco: the step and the SGD of its task",
    )


@contextlib.contextmanager
def _on_this_device(device: str) -> Iterator[None]:
    """`Tensor.cuda` of the official code means the device that is timed."""
    before = Tensor.cuda
    if not device.startswith("cuda"):
        Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Tensor.cuda = before  # type: ignore[method-assign]


def _one_process_group(device: str) -> None:
    """The official code talks to a process group; one of this process alone, for everyone."""
    if not dist.is_initialized():
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "group"), 1)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store, rank=0, world_size=1)


def _backbone(size: Size) -> Callable[..., nn.Module]:
    """torchvision's ResNet, as the official script takes it, with the demo's stem where the size wants it."""
    import torchvision

    def build(**options: Any) -> nn.Module:
        network = getattr(torchvision.models, size.arch)(**options)
        if size.small:
            network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return network

    return build


def official(size: Size, setting: Setting) -> Trainer:
    assert setting.official is not None
    source = setting.official / "moco" / "builder.py"
    if not source.is_file():
        raise ZooError(f"{setting.official} is no checkout of facebookresearch/moco: it has no moco/builder.py")
    spec = importlib.util.spec_from_file_location("official_moco_builder", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _one_process_group(setting.device)
    network = module.MoCo(_backbone(size), size.dim, size.queue_size, size.momentum, size.temperature, mlp=True)
    network.to(setting.device)
    optimizer = torch.optim.SGD(network.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def loss(views: Tensor) -> Tensor:
        with _on_this_device(setting.device):
            logits, labels = network(views[0], views[1])
        return cross_entropy(logits, labels)

    about = "facebookresearch/moco on torchvision's ResNet, a process group of one; torch.optim.SGD as in its script"
    return Trainer("official", revision(setting.official), loss, optimizer, about)


class _LightlyMoCo(nn.Module):
    """MoCo v2 put together from lightly's parts, as its documentation describes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead

        backbone: Any = _backbone(size)()
        width = backbone.fc.in_features
        backbone.fc = nn.Identity()
        self.momentum = size.momentum
        self.backbone, self.projection_head = backbone, MoCoProjectionHead(width, width, size.dim)
        self.slow = copy.deepcopy(nn.ModuleList([self.backbone, self.projection_head])).requires_grad_(False)
        self.criterion = NTXentLoss(size.temperature, memory_bank_size=(size.queue_size, size.dim))

    def forward(self, views: Tensor) -> Tensor:
        """Views (2,B,C,H,W) to the scalar loss."""
        from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

        update_momentum(self.backbone, self.slow[0], m=self.momentum)
        update_momentum(self.projection_head, self.slow[1], m=self.momentum)
        query = self.projection_head(self.backbone(views[0]))
        with torch.no_grad():
            shuffled, order = batch_shuffle(views[1])
            key = batch_unshuffle(self.slow[1](self.slow[0](shuffled)), order)
        return self.criterion(query, key)


def lightly_moco(size: Size, setting: Setting) -> Trainer:
    network = _LightlyMoCo(size).to(setting.device)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    return Trainer(
        "lightly",
        package_version("lightly") or "",
        network,
        optimizer,
        "MoCoProjectionHead, NTXentLoss with a memory bank, update_momentum; torch.optim.SGD",
    )


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first. A peer that is not installed and a checkout that is not given are left out."""
    size = MODELS[setting.model]
    builders: list[Callable[[], Trainer]] = [lambda: ours(size, setting)]
    if setting.official is not None:
        builders.append(lambda: official(size, setting))
    if package_version("lightly"):
        builders.append(lambda: lightly_moco(size, setting))
    return [build() for build in builders]


def images(setting: Setting) -> Tensor:
    """Seeded noise (2,B,3,H,W), the two views: the time of a step does not depend on what is in them."""
    side = MODELS[setting.model].img_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, setting.batch, 3, side, side, generator=generator).to(setting.device)


def work(setting: Setting) -> Work:
    """Images are pairs of views; measured FLOPs of queries, keys and the logits."""
    size = MODELS[setting.model]
    with torch.device("meta"):
        network: Any = _ours_network(size)
        batch = torch.empty(setting.batch, 3, size.img_size, size.img_size)

        def loss() -> Tensor:
            query, key = network.query(batch), network.key(batch)
            return (query @ network.queue).sum() + (query * key).sum()

        flops = count_flops(loss)
    return Work(setting.batch, flops=flops, detail={"queue_size": size.queue_size, "views": 2})


def _zoo_loader(folder: Path, side: int) -> Loader:
    import zoo
    from zoo.data.datamodule import ImageDataModule
    from zoo.data.transforms import ContrastiveAugment, TwoViews

    module = ImageDataModule(
        dataset=str(folder),
        batch_size=LOADING_BATCH,
        image_size=side,
        train_transform=TwoViews(ContrastiveAugment()),
        num_workers=0,
        seed=0,
    )
    module.setup("fit")
    return Loader(
        "zoo",
        zoo.__version__,
        forever(module.train_dataloader(), lambda b: b["views"][0]),
        "ImageDataModule with TwoViews(ContrastiveAugment()), on uint8 tensors",
    )


class _PillowBlur:
    """The blur of the official script: Pillow's, with a random radius."""

    def __call__(self, image: Any) -> Any:
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(()).uniform_(0.1, 2.0))))


class _Twice:
    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> list[Tensor]:
        return [self.transform(image), self.transform(image)]


def _official_loader(folder: Path, side: int) -> Loader:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(side, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([_PillowBlur()], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    data = datasets.ImageFolder(str(folder), _Twice(transforms.Compose(steps)))
    loader = DataLoader(data, batch_size=LOADING_BATCH, shuffle=True, drop_last=True)
    return Loader(
        "official",
        f"torchvision {package_version('torchvision')}",
        forever(loader, lambda b: b[0][0]),
        "torchvision ImageFolder and the PIL transforms of the official script's --aug-plus",
    )


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from JPEG files to a batch of two views, in this process (no workers), ours first."""
    side = MODELS[setting.model].img_size
    with photos(setting, 4 * LOADING_BATCH) as (folder, name):
        work = Work(LOADING_BATCH, detail={"data": name, "crop": side, "views": 2})
        yield [make(folder, side) for make in (_zoo_loader, _official_loader)], work
