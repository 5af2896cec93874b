"""Pixel MeanFlow: crops, predictions, losses of perception, the task and its settings when sampling."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tests.training.sampling_task import data, trainer
from zoo.command.cli import main
from zoo.errors import ZooError
from zoo.generation import pmf
from zoo.nn.perceptual import ConvNeXtV2Features, FrozenNetwork
from zoo.ops.flow import like
from zoo.ops.meanflow import TimePairs, adaptive_loss
from zoo.training import EMA, Optim, SamplingEvaluation, param_groups
from zoo.training.sampling import draw_samples

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "head_depth": 1, "num_heads": 2}
SIZES |= {"num_classes": 5, "bottleneck": 8}
FAST = Optim(name="muon", lr=1e-2, weight_decay=0.0, schedule="constant")


class Colours(nn.Module):
    """A distance like LPIPS's: (B,) of pairs of pictures."""

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return (images - others).square().mean((1, 2, 3))


SMALL = {"lpips": Colours, "convnext": partial(ConvNeXtV2Features, depths=(1, 1, 1, 1), dims=(4, 4, 4, 8))}


def _task(**options: Any) -> pmf.PixelMeanFlow:
    torch.manual_seed(0)
    task = pmf.PixelMeanFlow(**{**SIZES, "optim": FAST, **options})
    task.perception = {name: FrozenNetwork(SMALL[name]) for name in task.perception}
    for parameter in task.network.parameters():  # without the zeros that a network begins with
        nn.init.normal_(parameter, std=0.2)
    return task


def _batch(count: int = 8) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, count, 3, 32, 32, generator=draw)
    normal, uniform = torch.randn(2, count, generator=draw), torch.rand(7, count, generator=draw)
    names = ("omega_uniform", "t_min_uniform", "t_max_uniform", "drop", "mix", "uniform_t", "uniform_r")
    drawn = {"noise_t": normal[0], "noise_r": normal[1], **dict(zip(names, uniform, strict=True))}
    drawn["crop"] = torch.rand(count, 4, generator=draw)
    return {"image": x, "noise": noise, **drawn, "label": torch.arange(count) % 5, "index": torch.arange(count)}


# ----------------------------------------------------------------------------------------------------------- equations


def test_what_a_perfect_picture_stands_for_is_the_velocity_of_the_path() -> None:
    x, noise = torch.randn(2, 4, 3, 2, 2)
    t = torch.tensor([0.0, 0.01, 0.05, 0.9])
    path = pmf.PixelPath()
    z, network = path.interpolate(x, noise, t), _task().network
    torch.testing.assert_close(path.velocity(x, noise, t), network.velocity_from(x, z, t))
    torch.testing.assert_close(path.velocity(x, noise, t)[2:], (noise - x)[2:])
    torch.testing.assert_close(pmf.predicted_picture(z, t, network.velocity_from(x, z, t))[2:], x[2:])
    assert _task(predict="u").network.velocity_from(x, z, t) is x


@pytest.mark.parametrize("size", [7, 16, 40])
def test_the_whole_picture_is_resized_as_by_torch(size: int) -> None:
    images = torch.randn(2, 3, 16, 20, dtype=torch.float64, requires_grad=True)
    whole = torch.tensor([[0, 0, 16, 20]] * 2)
    ours = pmf.crop_resize(images, whole, size)
    if size <= 16:  # what makes pictures smaller is bicubic with antialiasing, whose a is -0.5
        theirs = interpolate(images, (size, size), mode="bicubic", antialias=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(ours.sum(), images)
    assert gradient.isfinite().all()


def test_a_box_is_cut_out_of_its_own_picture() -> None:
    images = torch.randn(3, 2, 12, 12)
    boxes = torch.tensor([[0, 0, 4, 4], [3, 5, 4, 4], [8, 8, 4, 4]])
    out = pmf.crop_resize(images, boxes, 4)
    for k, (top, left, tall, wide) in enumerate(boxes.tolist()):
        torch.testing.assert_close(out[k], images[k, :, top : top + tall, left : left + wide])
    level = pmf.crop_resize(torch.ones(3, 1, 12, 12), boxes, 9)
    torch.testing.assert_close(level, torch.ones_like(level))


def test_boxes_lie_within_the_picture_and_have_the_areas_asked_for() -> None:
    boxes = pmf.random_boxes(torch.rand(4000, 4, generator=torch.Generator().manual_seed(0)), 64, 48)
    top, left, tall, wide = boxes.unbind(1)
    assert min(v.min() for v in (top, left)) == 0
    assert (top + tall).max() == 64
    assert (left + wide).max() == 48
    area = (tall * wide) / (64 * 48)
    assert 0.07 < area.min() < 0.1
    assert area.max() > 0.95
    inner = (tall < 64) & (wide < 48) & (tall > 20)
    assert (wide / tall)[inner].min() > 0.7
    assert (wide / tall)[inner].max() < 1.4


def test_losses_of_perception_are_those_of_samples_below_the_threshold() -> None:
    task, batch = _task(perceptual=pmf.Perceptual(max_t=0.7, size=32)), _batch()
    errors = task.errors(batch)
    near = errors.t < 0.7
    assert 0 < near.sum() < 8
    found = task.seen(batch, errors)
    assert set(found) == {"lpips", "convnext"}
    pictures = errors.z - like(errors.t, errors.z) * errors.average
    boxes = pmf.random_boxes(batch["crop"], 32, 32)
    first, second = (pmf.crop_resize(x, boxes, 32) for x in (pictures, batch["image"]))
    net = task.perception["convnext"].net(torch.device("cpu"))
    whole = {"lpips": (first - second).square().mean((1, 2, 3)), "convnext": (net(first) - net(second)).square().sum(1)}
    plain = pmf.PixelMeanFlow.total(_task(), batch, errors)
    for name, weight in (("lpips", 0.4), ("convnext", 0.1)):
        torch.testing.assert_close(found[name], torch.where(near, whole[name], 0))
        plain = plain + weight * adaptive_loss(torch.where(near, whole[name], 0))
    loss = task.total(batch, errors)
    torch.testing.assert_close(loss, plain)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.network.parameters())
    assert not any("perception" in name for name, _ in task.named_parameters())
    assert not any("perception" in name for name in task.state_dict())
    none = _task(perceptual=pmf.Perceptual(max_t=0.0, size=32))
    torch.testing.assert_close(none.total(batch, errors), pmf.PixelMeanFlow.total(_task(), batch, errors))


def test_a_share_of_the_pairs_is_uniform() -> None:
    draws = _batch(2000)
    pairs = TimePairs(mean=-20.0, mean_r=-20.0, equal=0.0, order="equal_first", uniform=0.1)
    uniform = [draws[name] for name in ("mix", "uniform_t", "uniform_r")]
    t, r = pairs.pairs(draws["noise_t"], draws["noise_r"], None, uniform)
    mixed = draws["mix"] < 0.1
    assert 0.07 < mixed.float().mean() < 0.13
    assert t[~mixed].max() < 1e-6
    torch.testing.assert_close(t[mixed], torch.maximum(*uniform[1:])[mixed])
    torch.testing.assert_close(r[mixed], torch.minimum(*uniform[1:])[mixed])


# ---------------------------------------------------------------------------------------------------- network and task


def test_one_step_from_noise_gives_the_networks_picture() -> None:
    task = _task(noise_scale=2.0, omega=3.0, interval=(0.2, 0.6))
    network, noise, label = task.network, torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    one, nothing = torch.ones(2), torch.zeros(2)
    with torch.no_grad():
        tokens = network.trunk(2 * noise, one, 3 * one, 0.2 * one, 0.6 * one, label)
        picture = network.head("u", tokens)
    torch.testing.assert_close(task.sample(noise, label), picture)
    torch.testing.assert_close(network.sample(noise, label), picture)
    torch.testing.assert_close(task.sample(noise, label, steps=1), picture)
    two = network.sample(noise, label, times=(1.0, 0.5, 0.0), omega=1.0, interval=(0.0, 1.0))
    torch.testing.assert_close(task.sample(noise, label, omega=1.0, interval=(0.0, 1.0), steps=2), two)
    torch.testing.assert_close(draw_samples(task, [3], "cpu", 0, label[:1], omega=1.0, steps=2).shape, (1, 3, 32, 32))
    assert nothing.sum() == 0


def test_muon_takes_the_linear_layers_alone() -> None:
    network = _task().network
    names = {name: group["orthogonal"] for group in param_groups(network, FAST) for name in group["names"]}
    linear = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, matrix in names.items() if matrix} == linear
    assert not names["y_embedder.embedding_table.weight"]
    assert not names["class_tokens"]


def test_settings_of_sampling_and_averages_are_swept(tmp_path: Path) -> None:
    task = _task(num_classes=10)
    sweep = {"samples": 8, "omega": [1.0, 2.0], "interval": [[0.0, 1.0]], "average": ["ema_5", "raw"], "steps": [1, 2]}
    evaluation = SamplingEvaluation(num_samples=8, extractor="random", reference="val", batch_size=8, sweep=sweep)
    averages = [EMA(half_life=5000.0, name="ema_5"), EMA(half_life=20_000.0, name="ema_20")]
    for ema in averages:
        ema.start(task)
    run = trainer(evaluation, *averages, default_root_dir=tmp_path)
    run.test(task, datamodule=data(), verbose=False)
    assert len(json.loads((tmp_path / "sweep.json").read_text())["table"]) == 8
    assert evaluation.best in [{k: row[k] for k in evaluation.best} for row in evaluation.table]


def test_wrong_arguments_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="unknown prediction 'v'"):
        _task(predict="v")
    with pytest.raises(ZooError, match="noise_scale must be positive"):
        _task(noise_scale=0.0)
    with pytest.raises(ZooError, match="perceptual wants weights"):
        pmf.Perceptual(lpips=0.0, convnext=0.0)
    task = pmf.PixelMeanFlow(**SIZES, optim=FAST, perceptual=pmf.Perceptual(vgg=str(tmp_path / "no.pth")))
    with pytest.raises(ZooError, match="no weights of LPIPS"):  # before the first step
        trainer(max_epochs=1).fit(task, datamodule=data())


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--average=ema_7", "zoo: unknown average 'ema_7'"),
        ("--sweep={omega: 1.0}", "zoo: sweep: omega wants a list of values, not 1.0"),
        ("--sweep={shade: [1.0]}", "unknown sampling option of PixelMeanFlow 'shade'"),
    ],
)
def test_the_command_tells_what_cannot_be_chosen(
    option: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["test", "pmf/pocket", "--trainer.accelerator=cpu", option]) == 2
    assert line in capsys.readouterr().err
