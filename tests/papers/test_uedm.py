"""Noise conditioning: formulations, samplers, what is lost without the time, networks, tasks, published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.training.training_task import trainer
from zoo.errors import ZooError
from zoo.generation import uedm
from zoo.ops.diffusion import Diffusion
from zoo.ops.flow import like
from zoo.training import Optim

UNET: dict[str, Any] = {"img_size": 8, "model_channels": 8, "channel_mult": [1, 2], "channel_mult_emb": 2}
UNET |= {"num_blocks": 1, "attn_resolutions": [4], "augment_dim": 0, "dropout": 0.0}
FAST = Optim(lr=1e-2, weight_decay=0.0, schedule="constant")
NAMES = sorted(uedm.FORMULATIONS)
F64: dict[str, Any] = {"dtype": torch.float64}


def _times(formulation: uedm.Formulation, count: int = 5) -> Tensor:
    draws = torch.linspace(0.05, 0.95, count, **F64)
    return formulation.time(torch.special.ndtri(draws) if formulation.normal else draws)


def _stirred(network: Any) -> Any:
    """Away from the start, where outputs are almost 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def _task(**options: Any) -> uedm.UNetDenoising:
    torch.manual_seed(0)
    return uedm.UNetDenoising(**{**UNET, "augment": 0.0, "optim": FAST, "sampling": uedm.Sampling(steps=3), **options})


# --------------------------------------------------------------------------------------------------------- formulations


@pytest.mark.parametrize("name", NAMES)
def test_data_and_noise_follow_from_input_and_target(name: str) -> None:
    formulation = uedm.make_formulation(name)
    t, draw = _times(formulation), torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 5, 3, **F64, generator=draw)
    a, b, c, d, w = (like(value, x) for value in formulation.coefficients(t))
    z, r = a * x + b * noise, c * x + d * noise
    torch.testing.assert_close((d * z - b * r) / (a * d - b * c), x)
    alpha, beta = (like(value, x) for value in formulation.state(t))
    torch.testing.assert_close(z, (alpha * x + beta * noise) * like(formulation.scale(t), x))
    torch.testing.assert_close(w, torch.ones_like(w))


def test_edm_keeps_unit_variance_and_uedm_an_output_scaling_of_one() -> None:
    edm, unconditional = uedm.make_formulation("edm"), uedm.make_formulation("uedm")
    assert isinstance(edm, uedm.Preconditioned)
    assert isinstance(unconditional, uedm.Preconditioned)
    t = _times(edm)
    a, b, c, d, _ = edm.coefficients(t)
    torch.testing.assert_close(0.25 * a.square() + b.square(), torch.ones_like(t))
    torch.testing.assert_close(0.25 * c.square() + d.square(), torch.ones_like(t))
    ours, theirs = unconditional.coefficients(t), edm.scalings(t)
    torch.testing.assert_close(ours.c, 1 - theirs.skip)
    torch.testing.assert_close(ours.d, -t * theirs.skip)
    assert unconditional.scalings(t).out.eq(1).all()


def test_the_table_of_improved_ddpm() -> None:
    scheme = uedm.make_formulation("edm_iddpm").scheme  # type: ignore[attr-defined]
    levels = scheme.table
    assert len(levels) == 1001
    assert levels[-1] == 0
    assert scheme.range == (float(levels[999]), float(levels[0]))
    torch.testing.assert_close(scheme.round(levels * 1.0001), levels)
    assert scheme.scalings(levels[:3]).noise.tolist() == [999, 998, 997]


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"method": "heun"}, {"stochasticity": 1.0}, {"method": "heun", "churn": 4.0}])
def test_a_sampler_finds_the_only_picture_there_is(name: str, options: dict[str, Any]) -> None:
    formulation = uedm.make_formulation(name)
    sampling = uedm.Sampling(**{"method": "euler", "steps": 6, **options})
    x, noise = torch.full((2, 1, 2, 2), 0.3, **F64), torch.randn(2, 1, 2, 2, **F64)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        a, b, c, d, _ = (like(value, z) for value in formulation.coefficients(t))
        return c * x + d * (z - a * x) / b

    noises = list(torch.randn(sampling.noises, *noise.shape, **F64))
    if (sampling.method == "heun" and not formulation.straight) or (sampling.churn and name == "flow_matching"):
        with pytest.raises(ZooError, match=r"heun|churn"):
            list(uedm.sample_path(predict, formulation, noise, sampling, noises))
        return
    states = list(uedm.sample_path(predict, formulation, noise, sampling, noises))
    assert len(states) == 6
    torch.testing.assert_close(states[-1], x, rtol=0, atol=1e-7)


def test_a_stochastic_step_is_ddpm_s_posterior() -> None:
    process = Diffusion("linear", variance="fixed_small")
    formulation = uedm.DiscreteDiffusion("linear")
    z, r = torch.randn(2, 1, 1, 2, 2)
    for step in (999, 70, 1):
        t = torch.tensor([step])
        found = process.posterior(r, z, t)
        states = [formulation.state(torch.tensor(float(at), **F64)) for at in (step, step - 1)]
        target = formulation.coefficients(torch.tensor(float(step), **F64))[2:4]
        kappa, eta, zeta = uedm.step_coefficients(states[0], target, states[1], 1.0)
        torch.testing.assert_close((kappa * z + eta * r).float(), found.mean)
        torch.testing.assert_close(2 * zeta.log().float(), found.log_variance[0, 0, 0, 0])


@pytest.mark.parametrize(
    "wrong", [{"method": "rk4"}, {"steps": 1}, {"stochasticity": 2.0}, {"method": "heun", "stochasticity": 0.5}]
)
def test_samplers_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ZooError, match=r"method|steps|heun"):
        uedm.Sampling(**wrong)


# --------------------------------------------------------------------------------------------------- without the time


@pytest.mark.parametrize("dimensions", [400, 4000])
def test_the_time_is_known_the_better_the_more_dimensions(dimensions: int) -> None:
    """Statements 1 and 2 for a single picture, 0: Var[t | z] = t^2 / 2D, and E(z) = 1/2 while |R(z)|^2 is D."""
    draw, t = torch.Generator().manual_seed(0), 0.5
    grid = torch.linspace(0.3, 0.7, 2001, **F64)
    z = t * torch.randn(dimensions, **F64, generator=draw)
    found = uedm.effective_targets(z, torch.zeros(1, dimensions, **F64), uedm.FlowMatching().coefficients(grid))
    mean = found.posterior @ grid
    variance = found.posterior @ (grid - mean).square()
    assert variance.item() == pytest.approx(t**2 / (2 * dimensions), rel=0.2)
    assert found.error.item() == pytest.approx(0.5, rel=0.2)
    assert found.unconditional.square().sum().item() == pytest.approx(dimensions, rel=0.2)


@pytest.mark.parametrize("name", ["flow_matching", "edm", "ddpm"])
def test_targets_and_their_stretch_are_those_of_the_mixture(name: str) -> None:
    """Against the gradient of log p(z | t), which tells the expected noise, and the Jacobian by autograd."""
    formulation, draw = uedm.make_formulation(name), torch.Generator().manual_seed(0)
    points, z = torch.randn(3, 4, **F64, generator=draw), torch.randn(4, **F64, generator=draw)
    here = uedm.Coefficients(*(value[0] for value in formulation.coefficients(_times(formulation, 4)[2:3])))
    a, b, c, d, _ = here

    def log_density(z: Tensor) -> Tensor:
        return (-(z - a * points).square().sum(1) / (2 * b**2)).logsumexp(0)

    def target(z: Tensor) -> Tensor:
        noise = -b * torch.func.grad(log_density)(z)
        return c * (z - b * noise) / a + d * noise

    found = uedm.effective_targets(z, points, uedm.Coefficients(*(value[None] for value in here)))
    torch.testing.assert_close(found.unconditional, target(z))
    assert found.error.item() == pytest.approx(0, abs=1e-20)
    jacobian: Any = torch.func.jacrev(target)(z)
    stretch = torch.linalg.matrix_norm(jacobian, ord=2)
    torch.testing.assert_close(uedm.lipschitz(z, points, here, iterations=500), stretch, rtol=1e-6, atol=0)


def test_the_bound_is_not_passed_by_two_samplers_that_differ_so_much() -> None:
    kappa, eta, stretch, delta = torch.rand(4, 8, **F64)
    x = other = torch.zeros((), **F64)
    for k, e, grow, apart in zip(kappa, eta, stretch, delta, strict=True):  # networks of one number, at their worst
        x, other = k * x + e * grow * x, k * other + e * (grow * other + apart)
    torch.testing.assert_close(uedm.accumulated_bound(kappa, eta, stretch, delta), other - x)


def test_ddim_is_bounded_far_worse_than_flow_matching() -> None:
    draw = torch.Generator().manual_seed(0)
    points = 0.5 * torch.randn(16, 192, **F64, generator=draw)
    callback, sampling = uedm.ErrorBound(samples=2, times=64), uedm.Sampling(method="euler", steps=10)
    found = {
        name: callback.measure(uedm.make_formulation(name), sampling, points, draw)
        for name in ("flow_matching", "edm", "ddpm")
    }
    assert found["flow_matching"]["error_bound"] < found["edm"]["error_bound"] < found["ddpm"]["error_bound"]
    assert all(value.isfinite() for numbers in found.values() for value in numbers.values())
    with pytest.raises(ZooError, match="at least one"):
        uedm.ErrorBound(points=0)


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("kind", [uedm.UNetDenoiser, uedm.ADMDenoiser])
@pytest.mark.parametrize("told", [True, False])
def test_what_is_not_told_the_time_gives_the_same_at_any(kind: Any, told: bool) -> None:
    sizes = {"img_size": 8, "model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}
    network = _stirred(kind(**sizes, label_dim=3, augment_dim=9, noise_conditional=told)).eval()
    z, t, label = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 2.0]), torch.tensor([0, 3])
    augment = torch.randn(2, 9)
    with torch.no_grad():
        out = network(z, t, label, augment)
        assert torch.allclose(out, network(z, t.flip(0), label, augment)) != told
        assert not torch.allclose(out[:1], network(z, t, label.flip(0), augment)[:1])
        assert not torch.allclose(out, network(z, t, label, 2 * augment))
    out.requires_grad_(False)
    network(z, t, label, augment).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_denoiser_gives_what_its_network_means() -> None:
    network = uedm.UNetDenoiser(**UNET, formulation="edm").double()
    t = _times(network.formulation, 4)
    x, noise = torch.randn(2, 4, 3, 8, 8, **F64)
    _, _, c, d, _ = (like(value, x) for value in network.formulation.coefficients(t))

    class Exact(nn.Module):
        def forward(self, z: Tensor, *rest: Any) -> Tensor:
            return c * x + d * noise

    network.model = Exact()  # type: ignore[assignment]
    torch.testing.assert_close(network.denoise(x + like(t, x) * noise, t), x)


def test_what_learns_nothing_is_not_trained() -> None:
    frozen = [name for name, p in _task().network.named_parameters() if not p.requires_grad]
    assert frozen == ["model.map_layer0.weight"]
    for options in ({"noise_conditional": True}, {"label_dim": 2}, {"augment_dim": 9, "augment": 0.1}):
        assert all(p.requires_grad for p in _task(**options).parameters())


# --------------------------------------------------------------------------------------------------------------- tasks


def _loader(count: int = 16) -> DataLoader:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader([{"image": images[i], "label": i % 2, "index": i} for i in range(count)], batch_size=8)


@pytest.mark.parametrize("name", NAMES)
def test_at_the_start_the_loss_is_that_of_a_zero_network(name: str) -> None:
    task, draw = _task(formulation=name, sampling=uedm.Sampling("euler")), torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 4, 3, 8, 8, generator=draw)
    time = torch.rand(4, generator=draw)
    found = task.loss_map({"image": x, "noise": noise, "time": time})
    _, _, c, d, w = (like(value, x) for value in task.formulation.coefficients(task.formulation.time(time)))
    torch.testing.assert_close(found, w * (c * x + d * noise).square(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{"augment": 0.5, "augment_dim": 9}, {"label_dim": 2, "label_dropout": 0.5}])
def test_a_run_and_its_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    task = _task(**options, sampling=uedm.Sampling(steps=3, churn=1.0))
    run = trainer()
    run.fit(task, _loader(), _loader())
    run.save_checkpoint(tmp_path / "own.ckpt")
    again = uedm.UNetDenoising.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert again.sampling == task.sampling
    noise, label = torch.randn(3, *task.noise_shape), torch.tensor([0, 1, 0]) if task.num_classes else None
    task.eval(), again.eval()
    torch.testing.assert_close(again.sample(noise, label), task.sample(noise, label))
    # Each sample's own noises, whatever the batch.
    alone = task.sample(noise[1:2], None if label is None else label[1:2])
    torch.testing.assert_close(task.sample(noise, label)[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(task.sample(noise, label, churn=0.0), task.sample(noise, label))


def test_mistakes_are_told() -> None:
    for match, options in (
        ("did you mean 'uedm'", {"formulation": "uedmm"}),
        ("other options", {"formulation_options": {"sigma": 1}}),
        ("noise schedule", {"formulation": "ddpm", "formulation_options": {"betas": "square"}}),
        ("takes euler", {"formulation": "ddpm"}),
        ("set augment_dim", {"augment": 0.1}),
        ("did you mean 'fourier'", {"embedding_type": "fouriers"}),
        ("multiple of 32", {"model_channels": 36, "channel_mult": [4, 1]}),
    ):
        with pytest.raises(ZooError, match=match):
            _task(**options)
    task = _task(label_dim=2)
    with pytest.raises(ZooError, match="wants labels"):
        task.network(torch.zeros(1, 3, 8, 8), torch.ones(1))


# --------------------------------------------------------------------------------------------------- published weights


@pytest.mark.parametrize("kind", [uedm.UNetDenoiser, uedm.ADMDenoiser])
def test_official_names_and_heads(kind: Any) -> None:
    """Rows of an official head alternate between query, key and value."""
    sizes = {"img_size": 8, "model_channels": 128, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}
    with torch.device("meta"):
        wanted = kind(**sizes).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in wanted.items()}
    key = "model.dec.4x4_in0.qkv.bias"
    state[key] = torch.arange(384.0)
    found = uedm.convert_official(state)
    assert found.keys() == wanted.keys()
    heads = 2 if kind is uedm.ADMDenoiser else 1
    expected = torch.arange(384.0).reshape(heads, 128 // heads, 3)
    torch.testing.assert_close(found[key].reshape(3, heads, 128 // heads), expected.permute(2, 0, 1))
    bare = {name.removeprefix("model."): value for name, value in state.items()}
    assert uedm.convert_official({**bare, "u": torch.zeros(1001)}).keys() == wanted.keys()
    with pytest.raises(ZooError, match=r"unknown keys, such as 'head\.weight'"):
        uedm.convert_official({**state, "model.head.weight": torch.zeros(1)})
