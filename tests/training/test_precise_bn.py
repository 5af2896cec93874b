"""Precise statistics of batch normalisation: those of all batches together, of all processes."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.processes import in_processes
from zoo.training import PreciseBN

DATA = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) * 3 + 5


class Toy(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def predict_logits(self, batch: Tensor) -> Tensor:
        return self.norm(batch)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.predict_logits(batch).square().sum() * self.norm.weight.sum() * 0

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.seen = self.norm.running_mean.clone()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def _fitted(batches: int, devices: int = 1) -> dict[str, Tensor]:
    module = Toy()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[PreciseBN(batches)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    share = DATA[int(os.environ["LOCAL_RANK"]) :: 2] if devices > 1 else DATA
    trainer.fit(module, DataLoader(share, 4 // devices), DataLoader(DATA, 4))
    assert module.norm.momentum == 0.1
    assert int(module.norm.num_batches_tracked) == 5
    return {"mean": module.norm.running_mean, "var": module.norm.running_var, "seen": module.seen}


@pytest.mark.parametrize("batches", [5, 2])
@pytest.mark.parametrize("devices", [1, 2])
def test_statistics_are_those_of_all_batches_together(batches: int, devices: int) -> None:
    used = DATA[: 4 * batches]
    for found in [_fitted(batches)] if devices == 1 else in_processes(2, _fitted, batches, 2):
        torch.testing.assert_close(found["mean"], used.mean(0))
        torch.testing.assert_close(found["var"], used.var(0, correction=0))
        torch.testing.assert_close(found["seen"], used.mean(0), msg="validation sees them already")
