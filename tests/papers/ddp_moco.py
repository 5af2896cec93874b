"""Run by test_ddp.py: MoCo in two processes under Lightning's DDP, and what one process says they must compute.

`python -m tests.papers.ddp_moco fit 2 OUT` trains a few steps and writes, for each rank, the state of the network
and every step's loss and averaged gradients to OUT.0 and OUT.1. `... replay 2 OUT` computes the same in one
process, rank after rank on a copy of the network of its own.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.selfsup.moco import MoCo, MoCoV2Pretraining, info_nce, move_towards
from zoo.training import Optim
from zoo.training.base import seed_position

SMALL: dict[str, Any] = {"arch": "resnet18", "layers": [1, 1, 1, 1], "width": 8, "dim": 8, "queue_size": 24}
BATCH, STEPS, LR = 4, 5, 0.05  # a process


class Pinned(Dataset):
    """Pairs of views that depend on the index alone."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(index)
        return {"views": list(torch.randn(2, 3, 32, 32, generator=draw, dtype=torch.float64))}


class Data(L.LightningDataModule):
    batch_size = BATCH

    def train_dataloader(self) -> DataLoader:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        length = BATCH * STEPS
        return DataLoader(
            torch.utils.data.Subset(Pinned(length * world), range(rank * length, (rank + 1) * length)), BATCH
        )


class Diary(L.Callback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        named = module.network.encoder_q.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named})

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())


def task() -> MoCoV2Pretraining:
    L.seed_everything(0, verbose=False)
    optim = Optim(name="sgd", lr=LR, weight_decay=0.01, no_decay="none", schedule="constant")
    return MoCoV2Pretraining(**SMALL, momentum=0.9, optim=optim).double()


def record(network: MoCo, gradients: list[dict[str, Tensor]], losses: list[Tensor]) -> dict[str, Any]:
    return {"state": network.state_dict(), "gradients": gradients, "losses": losses}


def fit(devices: int, out: str) -> None:
    module, diary = task(), Diary()
    # Buffers are not broadcast, so that equal queues are the ranks' own work.
    strategy = DDPStrategy(process_group_backend="gloo", broadcast_buffers=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        precision="64-true",
        callbacks=[diary],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, Data())
    torch.save(record(module.network, diary.gradients, diary.losses), f"{out}.{trainer.global_rank}")


def replay(devices: int, out: str) -> None:
    """The card's equations on one process: BatchNorm apart for each rank, gradients averaged, one queue."""
    data = Pinned(devices * BATCH * STEPS)
    first = task().network
    networks = [first, *(copy.deepcopy(first) for _ in range(devices - 1))]
    optimizers = [torch.optim.SGD(n.encoder_q.parameters(), LR, 0.9, weight_decay=0.01) for n in networks]
    diaries: list[tuple[list, list]] = [([], []) for _ in networks]
    for step in range(STEPS):
        places = [
            range(r * BATCH * STEPS + step * BATCH, r * BATCH * STEPS + (step + 1) * BATCH) for r in range(devices)
        ]
        views = [[torch.stack([data[i]["views"][v] for i in place]) for place in places] for v in (0, 1)]
        seed_position(0, 0, 0, step, 0, 0)  # as rank 0 does before it draws
        order = torch.randperm(devices * BATCH)
        mixed = torch.cat(views[1])[order].chunk(devices)
        for network in networks:
            move_towards(network.encoder_k, network.encoder_q, 0.9)
        encoded = torch.cat([network.key(part) for network, part in zip(networks, mixed, strict=True)])
        keys = torch.empty_like(encoded)
        keys[order] = encoded
        queue = first.queue.clone()
        losses = []
        for network, im_q, own in zip(networks, views[0], keys.chunk(devices), strict=True):
            query = network.query(im_q)
            logits = torch.cat([(query * own).sum(1, keepdim=True), query @ queue], 1) / network.temperature
            losses.append(info_nce(logits))
            network.zero_grad()
            losses[-1].backward()
        named = [dict(network.encoder_q.named_parameters()) for network in networks]
        mean = {name: torch.stack([n[name].grad for n in named]).mean(0) for name in named[0]}
        at = int(first.queue_ptr)
        for network, parameters, optimizer, diary, loss in zip(
            networks, named, optimizers, diaries, losses, strict=True
        ):
            for name, parameter in parameters.items():
                parameter.grad = mean[name].clone()
            optimizer.step()
            network.queue[:, at : at + len(keys)] = keys.T
            network.queue_ptr[0] = (at + len(keys)) % queue.shape[1]
            diary[0].append(mean)
            diary[1].append(loss.detach())
    for rank, (network, diary) in enumerate(zip(networks, diaries, strict=True)):
        torch.save(record(network, *diary), f"{out}.{rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"fit": fit, "replay": replay}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
