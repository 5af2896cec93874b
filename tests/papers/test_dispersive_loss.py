"""Dispersive loss: its forms, over processes, on SiT, DiT and MeanFlow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.processes import in_processes
from tests.training.training_task import trainer
from zoo.errors import ZooError
from zoo.generation import dispersive_loss as dl
from zoo.generation.meanflow import ClassConditionalMeanFlow, Guidance
from zoo.ops.transport import Sampler, Transport
from zoo.training import Optim

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
FAST = Optim(lr=1e-2, weight_decay=0.0, schedule="constant")
TASKS = {
    "sit": dl.SiTTraining,
    "dit": lambda **options: dl.DiTTraining(sampling_steps=3, **options),
    "meanflow": dl.DispersiveMeanFlow,
}


def _task(kind: str = "sit", **options: Any) -> Any:
    torch.manual_seed(0)
    return TASKS[kind](**{**SIZES, "optim": FAST, **options})


def _stirred(task: Any) -> Any:
    """Without the zeros that adaLN-zero begins with."""
    for parameter in task.network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return task


def _batch(count: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, count, 4, 8, 8, generator=draw, dtype=dtype)
    t, drop, noise_t, noise_r, chance = torch.rand(5, count, generator=draw, dtype=dtype)
    drawn = {"noise": noise, "t": t, "drop": drop, "noise_t": noise_t, "noise_r": noise_r, "chance": chance}
    return {"image": x, **drawn, "label": torch.arange(count) % 5, "index": torch.arange(count)}


# ----------------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("form", dl.FORMS)
@pytest.mark.parametrize("unit", [False, True])
def test_the_forms_are_what_they_are_written_as(form: dl.Form, unit: bool) -> None:
    """Pair by pair, and feature by feature."""
    z = torch.randn(5, 2, 3, dtype=torch.float64)
    flat = z.flatten(1)
    rows = flat / flat.norm(dim=1, keepdim=True) if unit or form == "infonce_cosine" else flat
    if form == "covariance":
        covariance = torch.cov(rows.T)
        wanted = (covariance - covariance.diag().diag()).square().sum() / 6
    else:
        distances = (rows[:, None] - rows).square().sum(2) / 6
        if form == "infonce_cosine":
            distances = -rows @ rows.T
        each = (2.0 - distances).clamp(min=0) ** 2 if form == "hinge" else (-distances / 0.3).exp()
        wanted = each.mean() if form == "hinge" else each.mean().log()
    torch.testing.assert_close(dl.dispersive_loss(z, form, 0.3, 2.0, unit=unit), wanted)


def test_the_gradient_pushes_apart_the_closest_most() -> None:
    z = torch.tensor([[0.0], [0.1], [3.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(dl.dispersive_loss(z), z)
    assert gradient[0] > 0 > gradient[1]  # a step down moves the first left, the second right
    assert gradient[2].abs() < gradient[:2].abs().min()


def test_bounds_and_samples_that_are_alike() -> None:
    same = torch.ones(4, 6, requires_grad=True)
    loss = dl.dispersive_loss(same)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, same)[0].isfinite().all()
    assert dl.dispersive_loss(1e3 * torch.eye(4)).item() == pytest.approx(-math.log(4))
    assert dl.dispersive_loss(torch.randn(1, 6)) == 0
    with pytest.raises(ZooError, match="two samples"):
        dl.dispersive_loss(torch.randn(1, 6), "covariance")


def test_distances_far_from_the_origin_in_low_precision() -> None:
    """Centred first, so that float32 keeps them; and never in bfloat16, whatever the run's precision."""
    z = torch.randn(6, 50, dtype=torch.float64) + 1000
    exact, narrow = dl.dispersive_loss(z), dl.dispersive_loss(z.float())
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-3, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert dl.dispersive_loss(z.float()) == narrow
    assert dl.dispersive_loss(z.bfloat16()).dtype == torch.float32


def test_wrong_words_and_numbers_are_named() -> None:
    for options, words in (
        ({"form": "infonce"}, "did you mean 'infonce_"),
        ({"over": "world"}, "world"),
        ({"temperature": 0.0}, "temperature"),
        ({"weight": -1.0}, "weight"),
    ):
        with pytest.raises(ZooError, match=words):
            dl.Dispersive(**options)
    for kind in TASKS:
        with pytest.raises(ZooError, match="blocks of 0 to 2"):
            _task(kind, dispersive=dl.Dispersive(blocks=[3]))
    with pytest.raises(ZooError, match="null_class"):
        _task(null_class=False)
    with pytest.raises(ZooError, match="num_classes"):
        _task(num_classes=0)
    assert dl.Dispersive(blocks=None).places(3) == [0, 1, 2]
    assert dl.Dispersive(blocks=[-1, 0]).places(3) == [0, 2]


# --------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("kind", TASKS)
def test_the_term_is_added_in_training_alone(kind: str) -> None:
    """With its weight, of the blocks that are asked for; MeanFlow's passes with a derivative included."""
    batch, declared = _batch(), dl.Dispersive(0.3, temperature=50.0, blocks=[0, -1])
    task = _stirred(_task(kind, dispersive=declared))
    total = task.training_step(batch, 0)["loss"]
    if kind == "meanflow":
        plain: Any = ClassConditionalMeanFlow(**SIZES, optim=FAST)
        plain.load_state_dict(task.state_dict())
        out = task.loss(batch)
        assert out.loss == total
        alone, acts, start = plain.loss(batch).loss, out.acts, plain
    else:
        out = task.errors(batch)
        alone, acts, start = out.error.mean(), out.acts, task
    assert len(acts) == 2
    added = 0.15 * sum(dl.dispersive_loss(z, temperature=50.0) for z in acts)
    torch.testing.assert_close(total, alone + added)
    (ours,) = torch.autograd.grad(total, task.network.blocks[0].attn.qkv.weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(alone, start.network.blocks[0].attn.qkv.weight)
    assert not torch.allclose(ours, theirs)
    if kind == "meanflow":
        task.eval()
        assert not task.loss(batch).acts


def test_without_the_term_nothing_is_added_and_the_block_is_still_measured() -> None:
    batch = _batch()
    plain, watched = (_stirred(_task(dispersive=d)) for d in (None, dl.Dispersive(0.0, blocks=[0])))
    watched.network.load_state_dict(plain.network.state_dict())
    assert plain.training_step(batch, 0)["loss"] == watched.training_step(batch, 0)["loss"]
    loader = DataLoader([{k: v[i] for k, v in _batch(7).items()} for i in range(7)], batch_size=4)
    (scores,) = trainer().validate(watched, loader, verbose=False)
    watched.eval()
    (z,) = watched.errors(_batch(7)).acts
    z = z.flatten(1)
    pairs = torch.pdist(z).square().mean() / z.shape[1]
    assert scores["val/dispersion"] == pytest.approx(pairs.item(), rel=1e-4)
    assert scores["val/feature_power"] == pytest.approx(z.square().mean().item(), rel=1e-4)
    (scores,) = trainer().validate(plain, loader, verbose=False)
    assert scores.keys() == {"val/error"}


@pytest.mark.parametrize("transport", [Transport(), Transport("vp", "noise"), Transport("gvp", "score", "velocity")])
def test_at_the_start_the_error_is_that_of_a_zero_network(transport: Transport) -> None:
    batch, task = _batch(64), _task(transport=transport)
    path, t = transport.interpolant, transport.times(batch["t"])
    error = transport.loss(torch.zeros_like(batch["image"]), batch["image"], batch["noise"], t)
    torch.testing.assert_close(task.errors(batch).error, error)
    if transport.prediction == "velocity":
        wanted = (batch["image"] - batch["noise"]).square().flatten(1).mean(1)
        torch.testing.assert_close(error, wanted)
    assert path.noise_at == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sit", {"sampler": Sampler("heun", steps=3)}),
        ("sit", {"sampler": Sampler("dopri5"), "guidance": 2.0}),
        ("sit", {"sampler": Sampler("sde_euler", steps=4), "guidance": 2.0, "guided_channels": None}),
        ("dit", {"guidance": 2.0}),
        ("meanflow", {"guidance": Guidance()}),
    ],
)
def test_samples_follow_from_noise_and_label(kind: str, options: Any, tmp_path: Path) -> None:
    """And a checkpoint of the run gives the same ones."""
    task, count = _stirred(_task(kind, in_chans=3, **options)), 3
    images = [{"image": torch.randn(3, 8, 8), "label": i % 5, "index": i} for i in range(8)]
    run = trainer()
    run.fit(task, DataLoader(images, batch_size=4))
    run.save_checkpoint(tmp_path / "own.ckpt")
    reloaded = type(task).load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert reloaded.dispersive == task.dispersive
    noise, label = torch.randn(count, *task.noise_shape), torch.arange(count)
    samples = task.sample(noise, label)
    assert samples.shape == (count, 3, 8, 8)
    torch.testing.assert_close(reloaded.sample(noise, label), samples)
    assert not torch.allclose(task.sample(noise, label + 1), samples)
    if noise.ndim == 5:  # the noises on the way count
        noise[:, 1:] = 0
        assert not torch.allclose(task.sample(noise, label), samples)


def test_settings_of_sampling_can_be_swept() -> None:
    task = _stirred(_task(in_chans=3, sampler=Sampler("euler", steps=2)))
    noise, label = torch.randn(2, *task.noise_shape), torch.tensor([0, 1])
    other = _stirred(_task(in_chans=3, sampler=Sampler("heun", steps=3), guidance=2.0))
    other.network.load_state_dict(task.network.state_dict())
    swept = task.sample(noise, label, guidance=2.0, method="heun", steps=3)
    assert torch.equal(swept, other.sample(noise, label))
    with pytest.raises(ZooError, match="noises"):
        task.sample(noise, label, method="sde_euler")


# ----------------------------------------------------------------------------------------------------------- processes


def _gradients(kind: str, form: dl.Form, world: int, over: str = "all") -> dict[str, Any]:
    """Loss and gradients of one step of one of so many processes, each with its share of eight samples."""

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            named = module.network.named_parameters()
            found["gradients"] = {name: p.grad.clone() for name, p in named}

    found: dict[str, Any] = {}
    declared = dl.Dispersive(0.5, form, blocks=[0, 1], over=over)  # type: ignore[arg-type]
    extra: dict[str, Any] = {"label_dropout": 0.0}
    if kind == "meanflow":
        extra |= {"guidance": None, "pairs": {"equal": 0.5, "equal_by": "chance"}}
    task, batch = _stirred(_task(kind, dispersive=declared, **extra)).double(), _batch(8, torch.float64)
    assert task.meets == (over == "all")
    run = trainer(devices=world, strategy="ddp" if world > 1 else "auto", precision="64-true", callbacks=[Watch()])
    share = 8 // world
    rows = range(run.global_rank * share, (run.global_rank + 1) * share)
    run.fit(task, DataLoader([{k: v[i] for k, v in batch.items()} for i in rows], batch_size=share))
    return found | {"weights": {k: v.detach() for k, v in task.network.state_dict().items()}}


@pytest.mark.parametrize(
    ("kind", "form"), [("sit", "infonce_l2"), ("sit", "covariance"), ("meanflow", "infonce_cosine")]
)
def test_two_processes_disperse_the_whole_batch_as_one_does(kind: str, form: dl.Form) -> None:
    one = _gradients(kind, form, 1)
    for two in in_processes(2, _gradients, kind, form, 2):
        torch.testing.assert_close(two["gradients"], one["gradients"])
        torch.testing.assert_close(two["weights"], one["weights"])
    apart, _ = in_processes(2, _gradients, kind, form, 2, "process")
    name = "blocks.0.attn.qkv.weight"
    assert not torch.allclose(apart["gradients"][name], one["gradients"][name])


# ------------------------------------------------------------------------------------------------------------- weights


def test_the_second_half_of_the_output_is_not_seen() -> None:
    network, x = _stirred(_task()).network, torch.randn(2, 4, 8, 8)
    whole = dl.SiT(**SIZES).requires_grad_(False)
    whole.load_state_dict(network.state_dict())
    t, y = torch.rand(2), torch.tensor([0, 5])
    assert network(x, t, y).shape == x.shape
    out, acts = network.forward_intermediates(x, t, y)
    assert torch.equal(out, network(x, t, y))
    assert len(acts) == 3
    assert dl.SiT(**SIZES, learn_sigma=False).final_layer.linear.out_features == 16
    assert network.final_layer.linear.out_features == 32
    assert dl.convert_official(network.state_dict()).keys() == network.state_dict().keys()
    with pytest.raises(ZooError, match=r"unknown keys, such as 'head\.weight'"):
        dl.convert_official({"head.weight": torch.zeros(1)})
