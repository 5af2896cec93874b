"""Run by test_meanflow.py in one or two processes: MeanFlow steps on pinned samples and draws.

`python -m tests.papers.ddp_meanflow KIND DEVICES OUT` writes the averaged gradients of every step and the weights
at the end. One process takes in two micro-batches what two processes take at once, so that the counts of a batch
(how many samples have r = t, how many lose their label) are the same.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from zoo.generation.meanflow import ClassConditionalMeanFlow, Guidance, UnconditionalMeanFlow
from zoo.training import EMA, Optim

BATCH, STEPS = 4, 3  # a process, or a micro-batch
OPTIM = Optim(lr=1e-2, weight_decay=0.0, schedule="constant")


def task(kind: str) -> Any:
    L.seed_everything(0, verbose=False)
    if kind == "unet":
        sizes: dict[str, Any] = {
            "img_size": 8,
            "model_channels": 8,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "dropout": 0.0,
        }
        module: Any = UnconditionalMeanFlow(None, **sizes, channel_mult_emb=2, augment=0.0, optim=OPTIM)
    else:
        sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
        module = ClassConditionalMeanFlow(
            None, **sizes, guidance=Guidance(1.0, 0.5, 0.1, 0.9), label_dropout=0.3, optim=OPTIM
        )
    for parameter in module.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # adaLN-zero would hide most gradients
    return module.double()


class Pinned(Dataset):
    """Samples and draws that depend on the index alone."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __len__(self) -> int:
        return 2 * BATCH * STEPS

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(index)
        normal = torch.randn(2, self.channels, 8, 8, generator=draw, dtype=torch.float64)
        times, even = torch.randn(2, generator=draw).double(), torch.rand(2, generator=draw).double()
        return {
            "image": normal[0],
            "noise": normal[1],
            "noise_t": times[0],
            "noise_r": times[1],
            "chance": even[0],
            "drop": even[1],
            "label": index % 5,
        }


class Data(L.LightningDataModule):
    batch_size = BATCH

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.data = Pinned(channels)

    def train_dataloader(self) -> DataLoader:
        world, rank = self.trainer.world_size, self.trainer.global_rank  # type: ignore[union-attr]
        batches = range(rank, 2 * STEPS, world)
        mine = [k * BATCH + i for k in batches for i in range(BATCH)]
        return DataLoader(Subset(self.data, mine), BATCH)


class Diary(L.Callback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in module.network.named_parameters()})


def run(kind: str, devices: int, out: str) -> None:
    torch.set_num_threads(1)
    module, diary, ema = task(kind), Diary(), EMA(0.5)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=2 // devices,
        max_epochs=1,
        precision="64-true",
        callbacks=[diary, ema],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, Data(3 if kind == "unet" else 4))
    record = {"gradients": diary.gradients, "weights": dict(module.network.state_dict()), "average": ema.weights}
    torch.save(record, f"{out}.{trainer.global_rank}")


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3])
