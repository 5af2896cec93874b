"""Improved MeanFlow: the loss, guidance as a condition, sampling, the task."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.formats.test_flax import _msgpack, _tree
from tests.training.training_task import trainer
from zoo import create_model
from zoo.errors import ZooError
from zoo.generation import imf
from zoo.nn.autoencoder import SD_SCALE
from zoo.ops.flow import like
from zoo.ops.guidance import drop_labels
from zoo.training import Optim

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 3, "head_depth": 1, "num_heads": 4}
SIZES |= {"num_classes": 5}
FAST = Optim(lr=1e-2, weight_decay=0.0, schedule="constant")


def _task(**options: Any) -> imf.ImprovedMeanFlow:
    torch.manual_seed(0)
    return imf.ImprovedMeanFlow(**{**SIZES, "optim": FAST, **options})


def _stirred(network: Any) -> Any:
    """Without the zeros that a network begins with, in float64."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.double()


def _batch(count: int = 8, channels: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, count, channels, 8, 8, generator=draw, dtype=torch.float64)
    normal = torch.randn(2, count, generator=draw, dtype=torch.float64)
    uniform = torch.rand(4, count, generator=draw, dtype=torch.float64)
    names = ("omega_uniform", "t_min_uniform", "t_max_uniform", "drop")
    drawn = {"noise_t": normal[0], "noise_r": normal[1], **dict(zip(names, uniform, strict=True))}
    labels = {"label": torch.arange(count) % 5, "index": torch.arange(count)}
    return {"image": x, "noise": noise, **drawn, **labels}


# ----------------------------------------------------------------------------------------------------------- equations


def test_scales_follow_the_power_law() -> None:
    uniform = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for beta in (0.0, 1.0, 2.0):
        scales = imf.power_law(uniform, 8.0, beta)
        assert scales[0] == 1
        assert scales[-1].item() == pytest.approx(8)
        density = 1 / scales.diff()  # in proportion to omega^-beta
        fit = torch.linalg.lstsq(torch.stack([scales[1:].log(), torch.ones(2000)], 1), density.log()).solution
        assert fit[0].item() == pytest.approx(-beta, abs=0.01)


def test_intervals_are_drawn_for_moving_samples_only() -> None:
    uniform, whole = torch.tensor([0.2, 0.2, 0.8]), torch.tensor([True, False, False])
    drawn = imf.GuidanceConditions(omega_max=4.0).conditions(uniform, uniform, uniform, whole)
    torch.testing.assert_close(drawn.t_min, torch.tensor([0.0, 0.1, 0.4]))
    torch.testing.assert_close(drawn.t_max, torch.tensor([1.0, 0.6, 0.9]))
    assert torch.equal(drawn.omega, 4.0**uniform)
    always = imf.GuidanceConditions(interval=False).conditions(uniform, uniform, uniform, whole)
    assert not always.t_min.any()
    assert torch.all(always.t_max == 1)
    with pytest.raises(ZooError, match="omega_max"):
        imf.GuidanceConditions(omega_max=0.5)


def _written_out(task: imf.ImprovedMeanFlow, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both errors as the paper and its code write them: every network call on the whole batch."""
    net, x, noise = task.network, batch["image"], batch["noise"]
    t, r = task.pairs.pairs(batch["noise_t"], batch["noise_r"])
    z, v = (1 - like(t, x)) * x + like(t, x) * noise, noise - x
    draws = (batch[f"{name}_uniform"] for name in ("omega", "t_min", "t_max"))
    given = task.guidance.conditions(*draws, whole=r >= t)
    null = torch.full_like(batch["label"], 5)
    dropped = torch.arange(8) < (batch["drop"] < task.label_dropout).sum()
    ones, zeros = torch.ones_like(t), torch.zeros_like(t)
    head = -1 if net.velocity_head else 0
    heads = "uv" if net.velocity_head else "u"

    def velocity(omega: Tensor, labels: Tensor) -> Tensor:
        return net(z, t, zeros, omega, zeros, ones, labels, heads=heads)[head]

    with torch.no_grad():
        without, everywhere = velocity(ones, null), velocity(given.omega, batch["label"])
        omega = torch.where((t >= given.t_min) & (t <= given.t_max), given.omega, 1.0)
        within = velocity(omega, batch["label"])
        guided = v + like(1 - 1 / omega, x) * (within - without)
        still = v + like(1 - 1 / given.omega, x) * (everywhere - without)
        guided = torch.where(like(r >= t, x), still, guided)
        guided = torch.where(like(dropped, x), v, guided)
    labels = drop_labels(batch["label"], dropped, 5)
    tangent = within if task.tangent == "predicted" else guided
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        u, derivative = torch.func.jvp(
            lambda z, t, r: net(z, t, t - r, *given, labels, heads="u")[0], (z, t, r), (tangent, ones, zeros)
        )
    compound = u + like(t - r, x) * derivative.detach()
    errors = [(compound - guided).square().flatten(1).sum(1)]
    if net.velocity_head:
        errors.append((net(z, t, t - r, *given, labels, heads="v")[0] - guided).square().flatten(1).sum(1))
    loss = sum((error / (error.detach() + task.loss_eps) ** task.loss_power).mean() for error in errors)
    return torch.as_tensor(loss), errors[0], errors[-1]


@pytest.mark.parametrize("velocity_head", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"label_dropout": 0.5},
        {"pairs": imf.TimePairs(equal=0.0), "tangent": "target", "loss_power": 0.5},
        {"pairs": imf.TimePairs(equal=1.0), "label_dropout": 0.0},
        {"guidance": imf.GuidanceConditions(omega_max=1.0), "tangent": "target"},
        {"guidance": imf.GuidanceConditions(beta=2.0, interval=False), "grad_checkpointing": True},
    ],
)
def test_what_is_left_out_changes_no_number(options: dict[str, Any], velocity_head: bool) -> None:
    task, batch = _task(**options, velocity_head=velocity_head), _batch()
    weights = list(_stirred(task.network).parameters())
    out = task.loss(batch)
    ours = torch.autograd.grad(out.loss, weights)
    task.network.set_grad_checkpointing(False)
    loss, error, velocity_error = _written_out(task, batch)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.error, error.detach())
    if velocity_head:
        torch.testing.assert_close(out.velocity_error, velocity_error.detach())
    for a, b in zip(ours, torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_at_the_start_both_errors_are_those_of_a_zero_network() -> None:
    batch = {key: value.float() if value.is_floating_point() else value for key, value in _batch(64).items()}
    errors = _task().errors(batch)
    velocity = (batch["noise"] - batch["image"]).square().flatten(1).sum(1)
    torch.testing.assert_close(errors.u, velocity)
    torch.testing.assert_close(errors.v, velocity)
    assert not errors.average.any()
    assert _task().loss(batch).loss.item() == pytest.approx(2, abs=1e-3)
    assert _task(velocity_head=False).loss(batch).loss.item() == pytest.approx(1, abs=1e-3)


class Point(nn.Module):
    """The exact velocities where the data are one point 0: u = v = z / t for any r; the interface of the networks."""

    velocity_head, grad_checkpointing, num_classes = True, False, 5

    def trunk(self, z: Tensor, h: Tensor, *given: Tensor) -> Tensor:
        return z

    def head(self, name: str, tokens: Tensor) -> Tensor:
        return tokens

    def velocity_from(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return output / like(t, output)

    def forward(self, z: Tensor, t: Tensor, *given: Tensor, heads: str = "uv") -> tuple[Tensor, ...]:
        return (z / like(t, z),) * len(heads)


def test_exact_velocities_have_no_error() -> None:
    noise, t, r = torch.randn(6, 1, 2, 2), torch.rand(6) * 0.5 + 0.5, torch.rand(6) * 0.5
    given = imf.Conditions.of(3.0, (0.0, 1.0), noise)
    network: Any = Point()
    errors = imf.imf_errors(network, torch.zeros(6, 1, 2, 2), noise, t, r, given, torch.arange(6) % 5)
    assert errors.u.max() < 1e-8
    assert errors.v.max() < 1e-8
    *_, end = imf.steps(network, noise, torch.zeros(6).long(), (1.0, 0.4, 0.0))
    assert end.abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------- network and task


def test_samples_follow_omega_and_interval_and_latents_come_back_scaled() -> None:
    normal = {"latent_mean": [1.0, 2.0, 3.0, 4.0], "latent_std": [2.0] * 4}
    network = _stirred(imf.ImprovedMeanFlowDiT(**SIZES, **normal, omega=3.0, interval=(0.2, 0.8)))
    noise, label = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([0, 4])
    found = network.sample(noise, label)
    (z,) = imf.steps(network, noise, label, omega=3.0, interval=(0.2, 0.8))
    torch.testing.assert_close(network.normalised(found), z)
    torch.testing.assert_close(found, (2 * z + torch.arange(1.0, 5).view(-1, 1, 1)) * SD_SCALE)
    for other in ({"omega": 4.0}, {"interval": (0.0, 1.0)}, {"times": (1.0, 0.5, 0.0)}):
        assert not torch.equal(network.sample(noise, label, **other), found)
    assert torch.equal(imf.ImprovedMeanFlowDiT(**SIZES).normalised(noise), noise)
    with pytest.raises(ZooError, match="an omega of 1 or more"):
        network.sample(noise, label, omega=0.5)
    for wrong, word in (
        ({"latent_mean": [0.0] * 4}, "go together"),
        ({"latent_mean": [0.0], "latent_std": [1.0]}, "4 channels"),
        ({"omega": 0.5}, "omega"),
        ({"interval": (0.8, 0.2)}, "interval"),
    ):
        with pytest.raises(ZooError, match=word):
            imf.ImprovedMeanFlowDiT(**SIZES, **wrong)


def _loader(count: int = 16) -> DataLoader:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader([{"image": images[i], "label": i % 5, "index": i} for i in range(count)], batch_size=8)


def test_a_checkpoint_samples_the_same_and_tells_its_errors(tmp_path: Path) -> None:
    task = _task(in_chans=3, omega=2.0, guidance=imf.GuidanceConditions(beta=2.0))
    run = trainer()
    run.fit(task, _loader(), _loader())
    told = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("val/")}
    assert told["val/compound_square"] >= told["val/compound_error"] ** 2 > 0
    assert told.keys() >= {"val/error", "val/velocity_error"}
    run.save_checkpoint(tmp_path / "own.ckpt")
    reloaded = imf.ImprovedMeanFlow.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    noise, label = torch.randn(2, *task.noise_shape), torch.tensor([0, 4])
    torch.testing.assert_close(reloaded.sample(noise, label), task.sample(noise, label))
    assert (reloaded.guidance, reloaded.pairs) == (task.guidance, task.pairs)
    for other in ({"omega": 4.0}, {"interval": (0.0, 0.5)}, {"steps": 2}):
        assert not torch.equal(task.sample(noise, label, **other), task.sample(noise, label))
    assert torch.equal(task.sample(noise, label, 2.0, (0.0, 1.0), 1), task.sample(noise, label))
    with pytest.raises(ZooError, match="tangent"):
        _task(tangent="wrong")


# --------------------------------------------------------------------------------------------------- published weights


def test_flax_and_torch_files_are_the_same_network(tmp_path: Path) -> None:
    network = _stirred(imf.ImprovedMeanFlowDiT(**SIZES)).float()
    flax, torch_file = {}, {}
    for key, value in network.state_dict().items():
        value = value[0] if key.endswith("_tokens") else value
        name = key.replace("_table.weight", "_table._flax_embedding.weight")
        linear = key.endswith((".weight", ".bias")) and "norm" not in key and "x_embedder" not in key
        if linear and name == key:
            name = "._flax_linear.".join(key.rsplit(".", 1))
        torch_file[f"net.{name}"] = value
        *parts, leaf = name.split(".")
        if leaf == "weight":
            leaf = "embedding" if "_flax_embedding" in parts else "kernel"
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value
            value = value.T if value.ndim == 2 and leaf == "kernel" else value
        path = "/".join(["net", *parts, leaf]).replace("mlp/0", "mlp/layers_0").replace("mlp/2", "mlp/layers_2")
        for kind in ("shared_blocks", "u_heads", "v_heads"):
            path = path.replace(f"{kind}/", f"{kind}_")
        flax[path] = value
    for state in (flax, torch_file):
        converted = imf.convert_official(state)
        assert converted.keys() == network.state_dict().keys()
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in converted.items())
    inference = {key: value for key, value in torch_file.items() if "v_heads" not in key}
    imf.ImprovedMeanFlowDiT(**SIZES, velocity_head=False).load_state_dict(imf.convert_official(inference))
    # By name, out of a zip of a flax training state as the file is described; raw weights are not in it.
    arrays = {key: value.numpy() for key, value in flax.items() if "v_heads" not in key}
    with zipfile.ZipFile(tmp_path / "iMF-B-2.zip", "w") as archive:
        state = {"step": 1, "params": {}, "ema_params": _tree(arrays), "opt_state": {}}
        archive.writestr("iMF-B-2/checkpoint_1", _msgpack(state))
    loaded = create_model("imf_b2", weights=tmp_path / "iMF-B-2.zip", **SIZES)
    assert torch.equal(loaded.get_parameter("u_heads.0.mlp.w2.weight"), network.u_heads[0].mlp.w2.weight)
    with pytest.raises(ZooError, match="unknown key"):
        imf.convert_official({**torch_file, "net.adaLN.weight": torch.zeros(1)})
