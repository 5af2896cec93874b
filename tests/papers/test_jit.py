"""JiT: equations, sampler, network, task, published weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.training.training_task import trainer
from zoo.errors import ZooError
from zoo.generation import jit
from zoo.training import Optim

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
SIZES |= {"bottleneck": 8, "context_tokens": 2, "context_start": 1}
FAST = Optim(lr=1e-2, weight_decay=0.0, schedule="constant")
QUANTITIES: Any = jit.QUANTITIES


def _task(**options: Any) -> jit.Denoising:
    torch.manual_seed(0)
    return jit.Denoising(**{**SIZES, "optim": FAST, **options})


def _stirred(network: Any) -> Any:
    """Without the zeros that adaLN-zero begins with."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def _points(t: list[float]) -> dict[str, Tensor]:
    """Data, noise and velocity at the times given, and z."""
    x, eps = torch.randn(2, len(t), 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.tensor(t, dtype=torch.float64)
    wide = times.view(-1, 1, 1, 1)
    return {"x": x, "eps": eps, "v": x - eps, "z": wide * x + (1 - wide) * eps, "t": times}


# ----------------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("given", QUANTITIES)
@pytest.mark.parametrize("wanted", QUANTITIES)
def test_the_three_quantities_of_a_point_agree(given: Any, wanted: Any) -> None:
    p = _points([0.06, 0.5, 0.94])
    torch.testing.assert_close(jit.convert(given, wanted, p[given], p["z"], p["t"]), p[wanted])


@pytest.mark.parametrize("prediction", QUANTITIES)
@pytest.mark.parametrize("space", QUANTITIES)
def test_a_perfect_network_has_no_loss_at_any_time(prediction: Any, space: Any) -> None:
    p = _points([0.0, 0.01, 0.5, 0.99, 1.0])
    given = (p["x"], p["eps"], p["t"], None, prediction, space)
    assert jit.denoising_loss(lambda z, t, y: p[prediction], *given).max() < 1e-20
    loss = jit.denoising_loss(lambda z, t, y: p[prediction] + 0.1, *given)
    assert torch.isfinite(loss).all()
    assert (loss[1:4] > 0).all()


def test_near_the_data_the_v_loss_is_the_x_loss_over_the_bound() -> None:
    p = _points([0.5, 0.97, 1.0])
    v, x = (
        jit.denoising_loss(lambda z, t, y: 0 * z, p["x"], p["eps"], p["t"], None, "x", space) for space in ("v", "x")
    )
    torch.testing.assert_close(v / x, torch.tensor([4.0, 400.0, 400.0], dtype=torch.float64))
    with pytest.raises(ZooError, match="quantity"):
        jit.convert("noise", "v", p["x"], p["z"], p["t"])  # type: ignore[arg-type]


def test_the_noise_grows_with_the_resolution() -> None:
    assert [jit.resolution_noise_scale(side) for side in (32, 256, 512, 1024)] == [1, 1, 2, 4]
    assert _task().noise_scale == 1
    assert _task(img_size=512, patch_size=128, noise_scale=None).noise_scale == 2
    assert _task(noise_scale=3.0).noise_scale == 3


def test_guidance_acts_strictly_inside_its_interval() -> None:
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    assert jit.Sampling(guidance=2.9, interval=(0.1, 0.9)).scale(t).tolist() == [1, 1, 2.9, 1, 1]
    assert jit.Sampling(guidance=2.9, interval=(0.0, 1.0)).scale(t).tolist() == [2.9, 2.9, 2.9, 2.9, 1]
    for wrong in ({"interval": (0.5, 0.1)}, {"steps": 0}, {"method": "rk4"}):
        with pytest.raises(ZooError):
            jit.Sampling(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- sampler


class _Point(nn.Module):
    """Predicts one picture and counts how often, in batches of how many."""

    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        self.picture, self.calls = picture, []

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((len(z), t[0].item()))
        return self.picture.expand_as(z)


@pytest.mark.parametrize(("method", "evaluations"), [("heun", 9), ("euler", 5)])
def test_the_last_step_is_eulers(method: Any, evaluations: int) -> None:
    picture = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    network, how = _Point(picture), jit.Sampling(steps=5, method=method)
    noise, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    states = list(jit.steps(lambda z, t: jit.guided_velocity(network, z, t, labels, 9, how), noise, how))
    assert len(states) == 5
    assert len(network.calls) == evaluations
    torch.testing.assert_close(states[-1], picture.expand_as(noise))  # straight lines: every solver is exact
    torch.testing.assert_close(states[1], 0.6 * noise + 0.4 * picture)
    (only,) = jit.steps(lambda z, t: picture - z, noise, jit.Sampling(steps=1, method=method))
    torch.testing.assert_close(only, picture.expand_as(noise))


def test_the_unconditional_pass_is_made_where_it_counts() -> None:
    task = _task().eval()
    network = _stirred(task.network).double()
    z, labels = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3])
    how = jit.Sampling(guidance=3.0, interval=(0.3, 0.8))
    for time in (0.2, 0.5, 0.99):
        t = torch.full((2,), time, dtype=torch.float64)
        wide = max(1 - time, 0.05)
        given, free = ((network(z, t, y) - z) / wide for y in (labels, torch.full_like(labels, 5)))
        expected = free + 3 * (given - free) if time == 0.5 else given
        torch.testing.assert_close(jit.guided_velocity(network, z, t, labels, 5, how), expected)
    counted = _Point(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    list(jit.steps(lambda z, t: jit.guided_velocity(counted, z, t, labels, 5, how), z, jit.Sampling(steps=10)))
    assert {(size, 0.3 < t < 0.8) for size, t in counted.calls} == {(2, False), (4, True)}


# ---------------------------------------------------------------------------------------------------- network and task


def test_dropout_is_in_the_middle_half_of_the_blocks_and_in_training_alone() -> None:
    network = _stirred(jit.JiT(**{**SIZES, "depth": 9}, attn_drop=0.3, proj_drop=0.4))
    middle = [2 <= k < 6 for k in range(9)]
    assert [block.attn.attn_drop == 0.3 for block in network.blocks] == middle
    assert [block.attn.proj_drop == 0.4 for block in network.blocks] == middle
    assert [block.mlp.drop == 0.4 for block in network.blocks] == middle
    z, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5])
    assert not torch.equal(network(z, t, y), network(z, t, y))
    assert torch.equal(network.eval()(z, t, y), network(z, t, y))
    for drop in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
        one = _stirred(jit.JiT(**SIZES, **drop))
        assert not torch.equal(one(z, t, y), one(z, t, y)), drop
    with pytest.raises(ZooError, match="share"):
        jit.JiT(**SIZES, proj_drop=1.0)


def test_at_the_start_the_prediction_is_zero() -> None:
    """adaLN-zero predicts 0: an x-prediction's v-loss is |x|^2 / max(1 - t, 0.05)^2."""
    x, noise_t = torch.randn(64, 3, 8, 8), torch.randn(64)
    loss = _task().loss({"image": x, "label": torch.zeros(64, dtype=torch.long), "noise_t": noise_t})
    wide = (1 - torch.sigmoid(0.8 * noise_t - 0.8)).clamp(min=0.05)
    torch.testing.assert_close(loss, x.square().mean((1, 2, 3)) / wide**2)


def test_labels_are_dropped_in_training_alone() -> None:
    task, labels = _task(label_dropout=0.5), torch.arange(5)
    batch = {"image": torch.randn(5, 3, 8, 8), "label": labels, "drop": torch.tensor([0.1, 0.9, 0.2, 0.6, 0.49])}
    assert task.drawn(batch)[2].tolist() == [5, 1, 5, 3, 5]
    task.eval()
    assert torch.equal(task.drawn({**batch, "index": labels})[2], labels)


def test_checkpointing_and_options_of_the_parts() -> None:
    plain = _task(style={"norm": "rms", "mlp": "swiglu"}, bottleneck=None, context_tokens=0)
    assert plain.network.rope_cos is None
    assert hasattr(plain.network.x_embedder, "proj")
    task = _task()
    _stirred(task.network).double()
    batch = {"image": torch.randn(2, 3, 8, 8), "label": torch.tensor([0, 1]), "noise": torch.randn(2, 3, 8, 8)}
    batch = {k: v.double() if v.is_floating_point() else v for k, v in {**batch, "noise_t": torch.randn(2)}.items()}
    weight = task.network.blocks[0].attn.qkv.weight
    (kept,) = torch.autograd.grad(task.loss({**batch, "drop": torch.ones(2)}).mean(), weight)
    task.network.set_grad_checkpointing()
    (again,) = torch.autograd.grad(task.loss({**batch, "drop": torch.ones(2)}).mean(), weight)
    torch.testing.assert_close(again, kept)


def _loader(batch_size: int = 8, count: int = 16) -> DataLoader:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data: Any = [{"image": images[i], "label": i % 5, "index": i} for i in range(count)]
    return DataLoader(data, batch_size=batch_size)


def test_a_checkpoint_samples_the_same_and_is_swept_over(tmp_path: Path) -> None:
    task = _task(sampling=jit.Sampling(steps=3, guidance=2.0))
    run = trainer()
    run.fit(task, _loader(), _loader())
    run.save_checkpoint(tmp_path / "own.ckpt")
    reloaded = jit.Denoising.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True).eval()
    task.eval()
    noise, label = torch.randn(2, *task.noise_shape), torch.tensor([0, 4])
    torch.testing.assert_close(reloaded.sample(noise, label), task.sample(noise, label))
    assert (reloaded.sampling.steps, reloaded.sampling.guidance) == (3, 2.0)
    for name, value in {"guidance": 4.0, "interval": (0.6, 1.0), "steps": 2}.items():
        assert name in task.sampling_options
        assert not torch.equal(task.sample(noise, label, **{name: value}), task.sample(noise, label)), name
    torch.testing.assert_close(task.sample(noise, label), task.network.sample(noise, label, task.sampling))
    with pytest.raises(ZooError, match="want labels"):
        task.sample(noise)


def test_pictures_depend_on_the_index_alone() -> None:
    task = _task(sampling={"steps": 2})
    _stirred(task.network)
    found = []
    for batch_size in (8, 3):
        parts: Any = trainer().predict(task, _loader(batch_size))
        found.append(torch.cat([part["picture"] for part in parts]))
    assert found[0].shape == (16, 3, 8, 8)
    assert found[0].dtype == torch.uint8
    assert (found[0].int() - found[1].int()).abs().max() <= 1


def test_wrong_arguments_are_named() -> None:
    wrong = [({"prediction": "u"}, "quantity"), ({"loss_space": "u"}, "quantity"), ({"t_eps": 0.0}, "t_eps")]
    for options, words in [*wrong, ({"num_classes": 0, "context_tokens": 0}, "num_classes")]:
        with pytest.raises(ZooError, match=words):
            _task(**options)


# --------------------------------------------------------------------------------------------------- published weights


def test_the_published_average_is_taken_out_of_its_file(tmp_path: Path) -> None:
    from zoo import create_model

    network = jit.JiT(**SIZES)
    sets = {
        name: {f"net.{key}": value + k for key, value in network.state_dict().items()}
        for k, name in enumerate(("model", "model_ema1", "model_ema2"))
    }
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4}]}
    torch.save({**sets, "optimizer": optimizer, "epoch": 1, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "last.pth")
    loaded = create_model("jit_b16", weights=tmp_path / "last.pth", **SIZES)
    name = "blocks.1.attn.q_norm.weight"
    assert torch.equal(loaded.get_parameter(name), network.get_parameter(name) + 1)
    assert jit.convert_official(network.state_dict()).keys() == network.state_dict().keys()
    with pytest.raises(ZooError, match=r"1 unknown keys, such as 'blocks\.0\.mlp\.fc1\.bias'"):
        jit.convert_official({**sets["model"], "net.blocks.0.mlp.fc1.bias": torch.zeros(1)})
