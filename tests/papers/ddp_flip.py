"""Run by test_ddp.py: FLIP in some processes under Lightning's DDP.

`python -m tests.papers.ddp_flip fit 2 OUT` trains a few steps and writes the weights, and every step's averaged
gradients, to OUT. Two processes see the same pairs a step as one, and the same masks.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from zoo.multimodal.flip import FLIPPretraining
from zoo.training import Optim

SIZES: dict[str, Any] = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "vocab_size": 40},
    **{"context_length": 6, "text_embed_dim": 12, "text_depth": 2, "text_num_heads": 2, "proj_dim": 8},
}
BATCH, STEPS = 8, 3  # pairs a step over all processes


class Pinned(Dataset):
    """Pairs with their masks, functions of the index alone."""

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        return {
            "image": torch.randn(3, 32, 32, generator=draw, dtype=torch.float64),
            "text": torch.randint(0, 40, (6,), generator=draw),
            "mask_noise": torch.rand(16, generator=draw, dtype=torch.float64),
        }


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        share = BATCH // world
        mine = [step * BATCH + rank * share + k for step in range(STEPS) for k in range(share)]
        return DataLoader(Subset(Pinned(), mine), share)


class Gradients(L.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        named = module.network.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def trainer(devices: int, callbacks: list[L.Callback], precision: Any, *plugins: Any) -> L.Trainer:
    strategy: Any = DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        precision=precision,
        callbacks=callbacks,
        plugins=list(plugins),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def fit(devices: int, out: str, micro_batch: int | None = None) -> None:
    L.seed_everything(0, verbose=False)
    optim = Optim(name="sgd", lr=0.5, weight_decay=0.01, schedule="constant")
    module, gradients = FLIPPretraining(**SIZES, micro_batch=micro_batch, optim=optim).double(), Gradients()
    run = trainer(devices, [gradients], "64-true")
    run.fit(module, Data())
    if run.is_global_zero:
        torch.save({"state": module.network.state_dict(), "gradients": gradients.steps}, out)


def fit_in_pieces(devices: int, out: str) -> None:
    fit(devices, out, micro_batch=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"fit": fit, "fit_in_pieces": fit_in_pieces}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
