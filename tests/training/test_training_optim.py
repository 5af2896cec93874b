"""The declaration of optimiser and schedule, LARS, and what is built from them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zoo.errors import ZooError
from zoo.training import LARS, BaseModule, Muon, NAdam, Optim, lr_at, param_groups
from zoo.training.muon import orthogonalise
from zoo.training.optim import make_optimizer


class Tiny(nn.Module):
    """Two layers with the layer protocol: ids 0 (tokens), 1, 2 (head)."""

    num_layer_ids = 3

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.block = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)

    def layer_id(self, name: str) -> int:
        return 0 if name == "token" else 1 if name.startswith("block") else 2

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(x)))


class Task(BaseModule):
    """Least squares, and the learning rate of every update."""

    def __init__(self, optim: Optim) -> None:
        super().__init__(optim)
        self.network = Tiny()
        self.rates: list[float] = []

    def trainable(self) -> nn.Module:
        return self.network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.network(batch[0]).square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(max(group["lr"] for group in optimizer.param_groups))


class Data(L.LightningDataModule):
    def __init__(self, length: int = 32, batch_size: int = 4) -> None:
        super().__init__()
        self.length, self.batch_size = length, batch_size

    def train_dataloader(self) -> DataLoader:
        draw = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.randn(self.length, 4, generator=draw)), self.batch_size)


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, **options})


def test_schedule_has_warmup_cosine_and_floor() -> None:
    optim = Optim(warmup_epochs=5, min_lr=1e-6)
    assert lr_at(optim, 0, 100, 2e-3) == 0
    assert lr_at(optim, 2.5, 100, 2e-3) == pytest.approx(1e-3)
    assert lr_at(optim, 5, 100, 2e-3) == pytest.approx(2e-3)
    assert lr_at(optim, 52.5, 100, 2e-3) == pytest.approx((2e-3 + 1e-6) / 2)
    assert lr_at(optim, 100, 100, 2e-3) == pytest.approx(1e-6)
    assert lr_at(optim, 120, 100, 2e-3) == pytest.approx(1e-6)


def test_schedule_of_the_published_mae_run() -> None:
    # case mae/lr_schedule: 100 epochs of 3 iterations, group scale 0.65
    optim = Optim(warmup_epochs=5, min_lr=1e-6)
    rates = [0.65 * lr_at(optim, i / 3, 100, 2e-3) for i in range(300)]
    assert sum(rates) / 300 == pytest.approx(0.0006503076666666667, rel=1e-9)
    assert rates[-1] == pytest.approx(6.894704235926981e-07, rel=1e-9)


def test_schedule_by_whole_epochs_and_by_milestones() -> None:
    whole = Optim(interval="epoch")
    assert lr_at(whole, 3.9, 10, 1.0) == lr_at(whole, 3, 10, 1.0) == pytest.approx(0.5 * (1 + math.cos(0.3 * math.pi)))
    step = Optim(schedule="step", milestones=(60, 80), gamma=0.1)
    assert [lr_at(step, e, 100, 30.0) for e in (0, 59.9, 60, 80)] == pytest.approx([30, 30, 3, 0.3])
    assert lr_at(Optim(schedule="constant"), 7, 10, 0.1) == 0.1


def test_groups_undecayed_first_without_layer_decay() -> None:
    spared, decayed = param_groups(Tiny(), Optim(weight_decay=0.1))
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    assert spared["names"] == ["token", "block.bias", "norm.weight", "norm.bias", "head.bias"]
    assert decayed["names"] == ["block.weight", "head.weight"]
    (everything,) = param_groups(Tiny(), Optim(weight_decay=0.1, no_decay="none"))
    assert len(everything["names"]) == 7


def test_exclusions_of_a_part_count_in_the_whole() -> None:
    spared, _ = param_groups(nn.ModuleDict({"net": Tiny()}), Optim())
    assert "net.token" in spared["names"]


def test_groups_with_layer_decay_in_order_of_occurrence() -> None:
    groups = param_groups(Tiny(), Optim(layer_decay=0.5, weight_decay=0.1))
    assert [g["names"][0] for g in groups] == ["token", "block.weight", "block.bias", "norm.weight", "head.weight"]
    assert [g["lr_scale"] for g in groups] == [0.25, 0.5, 0.5, 1.0, 1.0]
    assert [g["weight_decay"] for g in groups] == [0.0, 0.1, 0.0, 0.0, 0.1]


def test_layer_decay_without_layer_ids_and_nothing_to_train_are_named() -> None:
    with pytest.raises(ZooError, match="layer_id"):
        param_groups(nn.Linear(2, 2), Optim(layer_decay=0.5))
    with pytest.raises(ZooError, match="nothing to train"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), Optim())


def test_norms_and_biases_may_have_a_decay_of_their_own() -> None:
    optim = Optim(weight_decay=0.1, norm_weight_decay=0.01, no_decay="none")
    norm, rest = param_groups(Tiny(), optim)
    assert (norm["names"], norm["weight_decay"]) == (["norm.weight", "norm.bias"], 0.01)
    assert (len(rest["names"]), rest["weight_decay"]) == (5, 0.1)
    norm, spared, rest = param_groups(Tiny(), dataclasses.replace(optim, no_decay="1d", norm_weight_decay=0.0))
    assert (norm["weight_decay"], spared["weight_decay"]) == (0.0, 0.0)
    assert spared["names"] == ["token", "block.bias", "head.bias"]
    norm, bias, rest = param_groups(Tiny(), dataclasses.replace(optim, bias_weight_decay=0.2, bias_lr_scale=2.0))
    assert norm["names"] == ["norm.weight"]
    assert bias["names"] == ["block.bias", "norm.bias", "head.bias"]
    assert (bias["weight_decay"], bias["lr_scale"], rest["lr_scale"]) == (0.2, 2.0, 1.0)
    scales = [g["lr_scale"] for g in param_groups(Tiny(), Optim(layer_decay=0.5, bias_lr_scale=2.0))]
    assert scales == [0.25, 0.5, 1.0, 1.0, 2.0, 1.0]


def test_overrides_by_the_last_part_of_a_name_come_last() -> None:
    optim = Optim(layer_decay=0.5, weight_decay=0.1, norm_weight_decay=0.01, no_decay="none")
    own = {"bias": {"weight_decay": 0.3}, "token": {"weight_decay": 0.0, "lr_scale": 3.0}}
    groups = param_groups(Tiny(), dataclasses.replace(optim, overrides=own))
    of = {name: (group["weight_decay"], group["lr_scale"]) for group in groups for name in group["names"]}
    assert (of["token"], of["norm.bias"], of["norm.weight"]) == ((0.0, 3.0), (0.3, 1.0), (0.01, 1.0))
    assert (of["block.bias"], of["block.weight"]) == ((0.3, 0.5), (0.1, 0.5))
    with pytest.raises(ZooError, match="names 'nix'"):
        param_groups(Tiny(), dataclasses.replace(optim, overrides={"nix": {"weight_decay": 0.0}}))


def test_a_norm_that_decays_like_the_rest_has_no_decay_of_its_own() -> None:
    model = Tiny()
    model.weight_decay_too = lambda: {"norm.weight"}  # type: ignore[assignment]
    groups = param_groups(model, Optim(weight_decay=0.1, norm_weight_decay=0.0, no_decay="none"))
    assert [group["names"] for group in groups if group["weight_decay"] == 0] == [["norm.bias"]]


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"name": "adam", "weight_decay": 0.1, "eps": 1e-2}, torch.optim.Adam),
        ({"name": "adamw", "weight_decay": 0.1, "eps": 1e-2}, torch.optim.AdamW),
        ({"name": "sgd", "weight_decay": 0.1, "dampening": 0.3}, torch.optim.SGD),
    ],
)
def test_optimisers_take_what_is_declared(options: dict, reference: Any) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 2), torch.randn(2, 3, 2)
    optim = Optim(**options, betas=(0.8, 0.9), momentum=0.7, no_decay="none")
    own = {"momentum": 0.7, "dampening": 0.3} if optim.name == "sgd" else {"betas": (0.8, 0.9), "eps": 1e-2}
    found = []
    for make in (
        lambda layer: make_optimizer(param_groups(layer, optim), optim, 0.1),
        lambda layer: reference(layer.parameters(), lr=0.1, weight_decay=0.1, **own),
    ):
        layer = nn.Linear(2, 3, bias=False)
        layer.weight.data = start.clone()
        optimizer = make(layer)
        for gradient in gradients:
            layer.weight.grad = gradient.clone()
            optimizer.step()
        found.append(layer.weight.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "adagrad"},
        {"schedule": "cosin"},
        {"base_lr": 0},
        {"global_batch": 0},
        {"norm_weight_decay": -1.0},
        {"bias_lr_scale": 0.0},
        {"overrides": {"bias": {"weight_decay": -1.0}}},
        {"overrides": {"bias": {"betas": 0.9}}},
        {"nesterov": True, "dampening": 0.1},
        {"first_epoch": 2, "interval": "epoch"},
        {"first_epoch": 1},
        {"first_epoch": 1, "interval": "epoch", "warmup_epochs": 1},
    ],
)
def test_wrong_declarations_are_refused(options: dict) -> None:
    with pytest.raises(ZooError):
        Optim(**options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lars_follows_its_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5), torch.zeros(3, 2)]
    mine = [nn.Parameter(p.to(dtype)) for p in start]
    reference = [p.to(dtype).double() for p in start]
    buffers = [torch.zeros_like(p) for p in reference]
    optimizer = LARS(mine, lr=0.6, weight_decay=0.01)
    for _ in range(3):
        for i, (p, q) in enumerate(zip(mine, reference, strict=True)):
            gradient = torch.randn(p.shape).to(dtype)
            p.grad, g = gradient, gradient.double()
            if q.ndim > 1:
                g = g + 0.01 * q
                if q.norm() > 0:
                    g = g * 0.001 * q.norm() / g.norm()
            buffers[i] = 0.9 * buffers[i] + g
            reference[i] = q - 0.6 * buffers[i]
        optimizer.step()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for p, q in zip(mine, reference, strict=True):
        assert p.dtype == dtype
        torch.testing.assert_close(p.detach().double(), q, rtol=tolerance, atol=tolerance)


def test_lars_takes_a_closure_and_refuses_nonsense() -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    def closure() -> Tensor:
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert LARS([weight], lr=0.1).step(closure).item() == 4
    assert weight.max() < 1
    with pytest.raises(ZooError, match="momentum"):
        LARS([weight], lr=0.1, momentum=1.0)


def test_rates_of_a_run_are_those_of_the_first_micro_batch() -> None:
    optim = Optim(base_lr=0.4, warmup_epochs=1, schedule="cosine")
    task = Task(optim)
    trainer(max_epochs=5, accumulate_grad_batches=2).fit(task, Data(length=16))  # 4 batches, 2 updates an epoch
    peak = 0.4 * 8 / 256
    assert task.rates == pytest.approx([lr_at(optim, i / 2, 5, peak) for i in range(10)])
    assert task.rates[0] == 0


def test_max_epochs_is_the_length_and_max_steps_only_without_it() -> None:
    optim = Optim(lr=1.0)
    cut, whole = Task(optim), Task(optim)
    trainer(max_epochs=4, max_steps=6).fit(cut, Data(length=16))
    assert cut.rates == pytest.approx([lr_at(optim, i / 4, 4, 1.0) for i in range(6)])
    trainer(max_epochs=-1, max_steps=6).fit(whole, Data(length=16))
    assert whole.rates == pytest.approx([lr_at(optim, i, 6, 1.0) for i in range(6)])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [({"schedule": "cosine"}, [0.75, 0.25, 0]), ({"schedule": "step", "milestones": (1, 3)}, [0.1, 0.1, 0.01])],
)
def test_epochs_counted_from_1_are_one_ahead(schedule: dict, expected: list[float]) -> None:
    optim = Optim(lr=1.0, interval="epoch", first_epoch=1, **schedule)
    task = Task(optim)
    trainer(max_epochs=3).fit(task, Data(length=8))  # 2 updates an epoch
    assert task.rates == pytest.approx([rate for rate in expected for _ in range(2)])


def test_warmup_in_steps_and_uneven_windows() -> None:
    optim = Optim(lr=1.0, warmup_steps=2, schedule="constant")
    task = Task(optim)
    trainer(max_epochs=2, accumulate_grad_batches=2).fit(task, Data(length=20))  # 5 batches: windows of 2, 2, 1
    assert task.rates == pytest.approx([0, 0.5, 1, 1, 1, 1])


def test_a_stream_counts_in_steps() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.ones(100, 4))

    optim = Optim(lr=1.0, warmup_steps=1)
    task = Task(optim)
    task.training_step = lambda batch, batch_idx: task.network(batch).square().mean()  # type: ignore[method-assign]
    trainer(max_epochs=-1, max_steps=5).fit(task, DataLoader(Stream(), 4))
    expected = [0, *(0.5 * (1 + math.cos(math.pi * (i - 1) / 4)) for i in range(1, 5))]
    assert task.rates == pytest.approx(expected)
    with pytest.raises(ZooError, match="warmup_steps"):
        trainer(max_epochs=-1, max_steps=5).fit(Task(Optim(lr=1.0, warmup_epochs=1)), DataLoader(Stream(), 4))


def test_an_endless_cosine_is_refused() -> None:
    with pytest.raises(ZooError, match="max_epochs"):
        trainer(max_epochs=-1).fit(Task(Optim(lr=1.0)), Data())
    with pytest.raises(ZooError, match="max_epochs"):
        trainer(max_epochs=-1, max_steps=2).fit(Task(Optim(lr=1.0, interval="epoch", first_epoch=1)), Data())


def test_global_batch_is_held_by_accumulation() -> None:
    task = Task(Optim(base_lr=0.4, schedule="constant", global_batch=12))
    run = trainer()
    run.fit(task, Data(length=32, batch_size=4))  # 8 batches: two windows of 3, the open one is dropped
    assert run.accumulate_grad_batches == 3
    assert task.rates == pytest.approx([0.4 * 12 / 256] * 2)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (Data(batch_size=5), {}, "divisor of 12"),
        (Data(batch_size=4), {"accumulate_grad_batches": 2}, "3 is derived"),
        (Data(batch_size=4, length=8), {}, "fewer than the 3"),
    ],
)
def test_a_global_batch_that_cannot_be_held_says_what_to_change(data: Data, options: dict, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        trainer(**options).fit(Task(Optim(global_batch=12)), data)


def test_loaders_without_data_module_tell_their_batch() -> None:
    task = Task(Optim(base_lr=1.0, schedule="constant"))
    trainer().fit(task, Data(length=16).train_dataloader())
    assert task.rates == pytest.approx([4 / 256] * 4)


def test_yaml_and_command_line_reach_the_declaration(tmp_path, monkeypatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model:\n  class_path: tests.training.test_training_optim.Task\n  init_args:\n    optim:\n"
        "      base_lr: 1.5e-4\n      betas: [0.9, 0.999]\n      milestones: [60, 80]\n"
        "data:\n  class_path: tests.training.test_training_optim.Data\n"
    )
    arguments = ["--config", str(recipe), "--model.optim.weight_decay", "0.1", "--trainer.logger", "false"]
    cli = LightningCLI(
        run=False,
        args=arguments,
        subclass_mode_model=True,
        subclass_mode_data=True,
        model_class=L.LightningModule,
        datamodule_class=L.LightningDataModule,
        save_config_callback=None,
    )
    assert cli.model.optim == Optim(base_lr=1.5e-4, betas=(0.9, 0.999), milestones=(60, 80), weight_decay=0.1)


def test_a_constant_warm_up_starts_at_its_rate() -> None:
    """0.01 for so many steps, then the full rate (ResNet on CIFAR)."""
    declared = Optim(name="sgd", lr=0.1, schedule="step", milestones=(2.0,), warmup_steps=3, warmup_lr=0.01)
    rates = [lr_at(declared, step / 4, 3.0, 0.1, 3 / 4) for step in range(10)]
    assert rates == pytest.approx([0.01] * 3 + [0.1] * 5 + [0.01] * 2)
    with pytest.raises(ZooError, match="warmup_lr"):
        Optim(warmup_lr=0.0)


def test_warm_up_from_a_rate_and_milestones_in_steps() -> None:
    """detectron2's schedule: linear from a rate to what the steps say at the end of the warm-up."""
    optim = Optim(lr=1.0, schedule="step", warmup_steps=4, warmup_start_lr=0.2, milestone_steps=(6, 9), gamma=0.1)
    task = Task(optim)
    trainer(max_epochs=-1, max_steps=11).fit(task, Data(length=12))  # 3 updates an epoch
    assert task.rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    early = Optim(schedule="step", warmup_start_lr=0.5, milestones=(1,), gamma=0.1)
    assert [lr_at(early, epoch, 4, 1.0, 2.0) for epoch in (0, 1, 2)] == pytest.approx([0.5, 0.3, 0.1])
    with pytest.raises(ZooError, match="warmup_start_lr"):
        Optim(warmup_start_lr=-0.1)


def test_decay_may_spare_normalisation_layers_alone() -> None:
    network = nn.Sequential(nn.Conv2d(1, 32, 1), nn.BatchNorm2d(32), nn.GroupNorm(32, 32), nn.Linear(2, 2))
    spared, decayed = param_groups(network, Optim(no_decay="norm", weight_decay=0.1))
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0, 0.1)
    assert spared["names"] == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert decayed["names"] == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_the_warm_up_ends_on_the_cosine_that_counts_from_the_start() -> None:
    optim = Optim(name="sgd", lr=0.1, schedule_from="start", warmup_epochs=34, warmup_start_lr=0.01)
    rates = [lr_at(optim, epoch, 196, 0.1) for epoch in (0, 17, 33.999999, 34, 98, 196)]
    end = 0.05 * (1 + math.cos(math.pi * 34 / 196))
    assert rates == pytest.approx([0.01, (0.01 + end) / 2, end, end, 0.05, 0.0], abs=1e-7)
    steps = Optim(lr=1.0, schedule="step", schedule_from="start", milestones=(2, 4), factors=(0.5, 0.02))
    assert [lr_at(steps, epoch, 5, 1.0) for epoch in (0, 1.9, 2, 4)] == [1.0, 1.0, 0.5, 0.02]
    inside = Optim(lr=1.0, schedule="step", schedule_from="start", milestones=(2,), warmup_epochs=4)
    assert lr_at(inside, 2, 8, 1.0) == pytest.approx(0.05), "halfway up to the value behind the step"
    with pytest.raises(ZooError, match=r"optim.factors are 1, one a milestone would be 2"):
        Optim(milestones=(1, 2), factors=(0.1,))


# --- Muon and NAdam ----------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Matrices, and what is none: a token, a convolution, a bias, a table of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 2, 6))
        self.conv = nn.Conv2d(3, 6, 2)
        self.table = nn.Embedding(5, 6)
        self.wide, self.tall = nn.Linear(6, 4), nn.Linear(4, 8, bias=False)


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int, first: int = 0) -> None:
    for k in range(first, first + steps):
        draw = torch.Generator().manual_seed(k)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
        optimizer.step()


def test_muon_takes_matrices_and_nadam_the_rest() -> None:
    model = Tokens()
    optim = Optim(name="muon", weight_decay=0.0, layer_decay=None)
    groups = param_groups(model, optim)
    names = {name: group["orthogonal"] for group in groups for name in group["names"]}
    assert {name for name, matrix in names.items() if matrix} == {"wide.weight", "tall.weight"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    muon = make_optimizer(groups, optim, 0.1)
    stepped(muon, model, 2)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(before)
    plain = dataclasses.replace(optim, name="nadam")
    stepped(make_optimizer(param_groups(model, plain), plain, 0.1), model, 2)
    for name, p in model.named_parameters():
        assert after[name].equal(p) != names[name], name
    square = muon.state[model.tall.weight]
    assert set(square) == {"step", "momentum"}


def test_the_step_of_a_matrix_is_about_orthogonal() -> None:
    for shape, norm in (((4, 12), 1.0), ((12, 4), math.sqrt(3))):
        p = nn.Parameter(torch.zeros(shape))
        stepped(Muon([p], lr=1.0), nn.ParameterList([p]), 1)
        values = torch.linalg.svdvals(p.detach()) / norm
        assert 0.6 < values.min() <= values.max() < 1.3
    assert orthogonalise(torch.zeros(3, 3)).equal(torch.zeros(3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_resumes_to_the_bit_with_moments_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    optim = Optim(name="muon", weight_decay=0.1)
    models = [Tokens().to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (make_optimizer(param_groups(model, optim), optim, 0.01) for model in models)
    stepped(first, models[0], 5)
    stepped(second, models[1], 3)
    saved = {name: value.clone() for name, value in models[1].state_dict().items()}, second.state_dict()
    resumed = Tokens().to(dtype)
    resumed.load_state_dict(saved[0])
    third = make_optimizer(param_groups(resumed, optim), optim, 0.01)
    third.load_state_dict(saved[1])
    stepped(third, resumed, 2, first=3)
    assert all(value.equal(resumed.state_dict()[name]) for name, value in models[0].state_dict().items())
    moments = [value for state in third.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert {value.dtype for value in moments} == {torch.float32}


def test_muon_and_nadam_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZooError, match="NAdam wants lr"):
        NAdam([nn.Parameter(torch.zeros(1))], lr=-1.0)
    with pytest.raises(ZooError, match="Muon wants 0 <= momentum < 1"):
        Muon([nn.Parameter(torch.zeros(1))], momentum=1.0)
    with pytest.raises(ZooError, match=r"optim\.muon_momentum must be in"):
        Optim(name="muon", muon_momentum=1.0)
    run = trainer(strategy="auto")
    # As in strategies that split the weights.
    monkeypatch.setattr(type(run.strategy), "restore_checkpoint_after_setup", True)
    with pytest.raises(ZooError, match="muon wants whole matrices on every device"):
        run.fit(Task(Optim(name="muon", lr=0.1)), datamodule=Data())


def test_muon_under_the_one_declaration() -> None:
    task = Task(Optim(name="muon", lr=0.1, schedule="constant", weight_decay=0.0))
    before = task.network.block.weight.detach().clone()
    trainer(gradient_clip_val=1.0).fit(task, datamodule=Data())
    assert task.rates == [0.1] * 8
    assert not task.network.block.weight.equal(before)
