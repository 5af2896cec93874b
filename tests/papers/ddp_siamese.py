"""Run by test_ddp.py: siamese networks in some processes under Lightning's DDP, BatchNorm over all of them. Two
processes see the same views a step as one."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from tests.papers.ddp_flip import BATCH, STEPS, Gradients, trainer
from zoo.selfsup.asym_siam import AsymSiamPretraining
from zoo.selfsup.moco_v3 import MoCoV3Pretraining
from zoo.selfsup.simsiam import SimSiamPretraining
from zoo.training import BaseModule, Optim, SyncBatchNorm

TRUNK: dict[str, Any] = {"arch": "resnet18", "layers": [1, 1, 1, 1], "width": 8, "dim": 8}
VIT: dict[str, Any] = {
    "arch": "vit_small",
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
}
OPTIM = Optim(name="sgd", lr=0.05, weight_decay=0.01, no_decay="none", schedule="constant")
TASKS: dict[str, tuple[type[BaseModule], dict[str, Any]]] = {
    "simsiam": (SimSiamPretraining, {**TRUNK, "pred_dim": 4}),
    "moco_v3": (MoCoV3Pretraining, {**VIT, "dim": 8, "mlp_dim": 12, "momentum": 0.9}),
    # AsymBN and MeanEnc on the target, a small crop on the source.
    "asym_siam": (
        AsymSiamPretraining,
        {**TRUNK, "queue_size": 24, "momentum": 0.9, "sync_bn": "target", "source_minis": 1, "target_views": 2},
    ),
}


class Pinned(Dataset):
    """Views of a picture that depend on its index alone."""

    def __init__(self, views: int) -> None:
        self.views = views

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, index: int) -> dict[str, list[Tensor]]:
        draw = torch.Generator().manual_seed(index)
        return {"views": list(torch.randn(self.views, 3, 16, 16, generator=draw, dtype=torch.float64))}


class Data(L.LightningDataModule):
    def __init__(self, views: int) -> None:
        super().__init__()
        self.views = views

    def train_dataloader(self) -> DataLoader:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        share = BATCH // world
        mine = [step * BATCH + rank * share + k for step in range(STEPS) for k in range(share)]
        return DataLoader(Subset(Pinned(self.views), mine), share)


def fit(name: str, devices: int) -> dict[str, Any]:
    """The state of the network after three steps, and their averaged gradients."""
    L.seed_everything(0, verbose=False)
    kind, options = TASKS[name]
    module, gradients = kind(**options, optim=OPTIM).double(), Gradients()
    trainer(devices, [gradients], "64-true", SyncBatchNorm()).fit(module, Data(4 if name == "asym_siam" else 2))
    return {"state": dict(module.network.state_dict()), "gradients": gradients.steps}
