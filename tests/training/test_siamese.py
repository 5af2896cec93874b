"""What siamese pre-trainings share: LARC, constant rates, momentum schedules, monitors of collapse."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from zoo.data import ImageDataModule
from zoo.data.transforms import ContrastiveAugment, MAEPretrain
from zoo.data.views import Views
from zoo.errors import ZooError
from zoo.metrics.spread import Spread, channel_deviation, view_variance
from zoo.ops.momentum import cosine_momentum, move_towards
from zoo.training import LARC, BaseModule, Optim, ViewVariance, param_groups, run_position


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 4, **options})


@pytest.mark.parametrize(("dtype", "clip"), [(torch.float64, False), (torch.float64, True), (torch.bfloat16, False)])
def test_larc_follows_its_definition(dtype: torch.dtype, clip: bool) -> None:
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5), torch.zeros(5)]
    mine = [nn.Parameter(p.to(dtype)) for p in start]
    reference = [p.to(dtype).double() for p in start]
    buffers = [torch.zeros_like(p) for p in reference]
    optimizer = LARC(mine, lr=0.6, weight_decay=0.01, clip=clip)
    for _ in range(3):
        for i, (p, q) in enumerate(zip(mine, reference, strict=True)):
            p.grad = torch.randn(p.shape).to(dtype)
            g = p.grad.double()
            if q.norm() > 0:
                ratio = 0.001 * q.norm() / (g.norm() + 0.01 * q.norm() + 1e-8)
                g = (min(ratio / 0.6, torch.tensor(1.0)) if clip else ratio) * (g + 0.01 * q)
            buffers[i] = 0.9 * buffers[i] + g
            reference[i] = q - 0.6 * buffers[i]
        optimizer.step()
    tolerance = 1e-12 if dtype == torch.float64 else 5e-2
    for p, q in zip(mine, reference, strict=True):
        torch.testing.assert_close(p.detach().double(), q, rtol=tolerance, atol=tolerance)
    with pytest.raises(ZooError, match="LARC wants"):
        LARC(mine, lr=-1.0)


class Task(BaseModule):
    """Two parts; keeps the rate of every group and the position at every step."""

    def __init__(self, optim: Optim) -> None:
        super().__init__(optim)
        self.network = nn.ModuleDict({"predictor": nn.Linear(4, 2), "encoder": nn.Linear(4, 4)})
        self.rates: list[list[float]] = []
        self.positions: list[tuple[float, float]] = []

    def trainable(self) -> nn.Module:
        return self.network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])
        self.positions.append(run_position(self.optim, self.trainer))
        return self.network["predictor"](self.network["encoder"](batch[0])).square().mean()


@pytest.mark.parametrize("name", ["sgd", "larc"])
def test_a_part_keeps_its_rate(name: Any) -> None:
    optim = Optim(name=name, lr=0.1, interval="epoch", no_decay="none", constant_lr=("predictor",))
    task = Task(optim)
    groups = param_groups(task.network, optim)
    assert [group["names"][0] for group in groups] == ["encoder.weight", "predictor.weight"]
    run = trainer(accumulate_grad_batches=2)
    run.fit(task, DataLoader(TensorDataset(torch.ones(16, 4)), batch_size=4))
    assert [rates[0] for rates in task.rates[::4]] == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)
    assert {rates[1] for rates in task.rates} == {0.1}
    assert task.positions[::2] == [(0.5 * k, 4.0) for k in range(8)]
    assert run.callback_metrics["train/lr"] == pytest.approx(0.0146447, rel=1e-5)
    with pytest.raises(ZooError, match="names 'encod', which no"):
        param_groups(task.network, Optim(constant_lr=("encod",)))


def test_momentum_rises_to_1() -> None:
    found = [cosine_momentum(epoch, 300, 0.99) for epoch in (0, 150, 300, 301)]
    assert found == pytest.approx([0.99, 0.995, 1.0, 1.0])
    target, source = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(source.weight, 3.0)
    source.running_mean += 1
    move_towards(target, source, 0.75)
    assert target.weight.tolist() == [1.5, 1.5]
    assert target.running_mean.tolist() == [0, 0]


def test_monitors_of_collapse() -> None:
    torch.manual_seed(0)
    free, same = 5 * torch.randn(400, 64), torch.ones(400, 64)
    assert channel_deviation(free) * 64**0.5 == pytest.approx(1.0, abs=0.02)
    assert channel_deviation(same) == 0
    spread = Spread(64)
    spread.update(normalize(free, dim=1))
    assert spread.compute().float() == pytest.approx((channel_deviation(free) * 8).item(), rel=1e-5)
    views = torch.stack([free, free + torch.randn(400, 64)])
    assert view_variance(torch.stack([free, free])) == 0
    assert view_variance(views) == pytest.approx(
        (normalize(views, dim=2).diff(dim=0).square().sum(2) / 2).mean().item()
    )


class Sides(Task):
    def __init__(self) -> None:
        super().__init__(Optim())
        self.network = nn.Linear(3 * 16 * 16, 8)

    def sides(self, views: list[Tensor]) -> dict[str, Tensor]:
        return {"source": self.network(views[0].flatten(1)), "target": self.network(views[1].flatten(1))}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_variance_of_views_by_side() -> None:
    L.seed_everything(0, verbose=False)
    weak = MAEPretrain(scale=(0.9, 1.0))
    transform = Views([ContrastiveAugment(), weak])
    data = ImageDataModule("shapes", image_size=16, train_samples=32, train_transform=transform, batch_size=8, seed=0)
    watch = ViewVariance(images=16, repeats=4)
    first, second = (
        trainer(callbacks=[watch], limit_val_batches=1).validate(Sides(), datamodule=data, verbose=False)[0]
        for _ in range(2)
    )
    assert 0 < first["variance/target"] < first["variance/source"] < 2
    assert second.keys() == first.keys()
    plain = ImageDataModule("shapes", image_size=16, train_samples=8, batch_size=8, seed=0)
    with pytest.raises(ZooError, match="gives views"):
        trainer(callbacks=[watch], limit_val_batches=1).validate(Sides(), datamodule=plain, verbose=False)
    with pytest.raises(ZooError, match="2 or more repeats"):
        ViewVariance(repeats=1)
