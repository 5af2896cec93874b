"""MeanFlow: equations, networks, tasks, published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.training.training_task import trainer
from zoo.errors import ZooError
from zoo.generation import meanflow as mf
from zoo.nn.dit import MODERN
from zoo.training import Optim

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
UNET: dict[str, Any] = {"img_size": 8, "model_channels": 8, "channel_mult": [1, 2], "channel_mult_emb": 2}
UNET |= {"num_blocks": 1, "attn_resolutions": [4]}
FAST = Optim(lr=1e-2, weight_decay=0.0, schedule="constant")


def _task(**options: Any) -> mf.ClassConditionalMeanFlow:
    torch.manual_seed(0)
    return mf.ClassConditionalMeanFlow(**{**SIZES, "optim": FAST, **options})


def _stirred(network: Any) -> Any:
    """Without the zeros that adaLN-zero begins with, in float64."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.double()


def _batch(count: int = 8, channels: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, count, channels, 8, 8, generator=draw, dtype=torch.float64)
    noise_t, noise_r = torch.randn(2, count, generator=draw, dtype=torch.float64)
    chance, drop = torch.rand(2, count, generator=draw, dtype=torch.float64)
    drawn = {"noise": noise, "noise_t": noise_t, "noise_r": noise_r, "chance": chance, "drop": drop}
    return {"image": x, **drawn, "label": torch.arange(count) % 5, "index": torch.arange(count)}


# ----------------------------------------------------------------------------------------------------------- equations


class Ball(nn.Module):
    """The exact average velocity where the data are one point 0: u = z / t, for any r."""

    times = ("t", "h")

    def forward(self, z: Tensor, times: Any, condition: Any = None) -> Tensor:
        return z / times[0].view(-1, 1, 1, 1)


def test_the_exact_average_velocity_has_no_error() -> None:
    x, noise = torch.zeros(6, 1, 2, 2), torch.randn(6, 1, 2, 2)
    t, r = torch.rand(6) * 0.5 + 0.5, torch.rand(6) * 0.5
    loss = mf.meanflow_loss(Ball(), x, noise, t, r)
    assert loss.error.max() < 1e-8
    assert loss.velocity_error.max() < 1e-8
    (end,) = mf.steps(Ball(), noise)
    assert end.abs().max() < 1e-6
    few = list(mf.steps(Ball(), noise, times=(1.0, 0.6, 0.0)))
    torch.testing.assert_close(few[0], 0.6 * noise)
    wrong = mf.meanflow_loss(Ball(), x, noise, t, r, tangent=(0.0, 0.0))
    assert wrong.error.min() > 1e-3


def test_pairs_are_ordered_and_as_many_are_equal_as_they_should() -> None:
    draws = mf.TimePairs().noise(1000, torch.device("cpu"))
    t, r = mf.TimePairs().pairs(*draws)
    assert torch.all(r <= t)
    assert torch.equal(r[:750], t[:750])
    assert torch.all(r[750:] < t[750:])
    t, r = mf.TimePairs(equal=0.25, equal_by="chance", order="clamp", mean_r=-4.0).pairs(*draws)
    assert torch.all(r <= t)
    torch.testing.assert_close(t, torch.sigmoid(draws[0] - 0.4))
    assert torch.all(r[draws[2] < 0.25] == t[draws[2] < 0.25])
    uniform = mf.TimePairs(distribution="uniform", equal=0.0)
    noise = uniform.noise(1000, torch.device("cpu"))
    t, r = uniform.pairs(*noise)
    assert torch.equal(t, torch.maximum(noise[0], noise[1]))
    with pytest.raises(ZooError, match="did you mean 'logit_normal'"):
        mf.TimePairs(distribution="logitnormal")  # type: ignore[arg-type]
    with pytest.raises(ZooError, match="share"):
        mf.TimePairs(equal=1.5)
    with pytest.raises(ZooError, match="draws"):
        mf.TimePairs(equal_by="chance").pairs(*noise[:2])


def test_guidance_mixes_velocities_within_its_interval() -> None:
    v, unconditional, conditional = torch.randn(3, 4, 1, 2, 2)
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    guided = mf.Guidance(0.2, 0.92, 0.2, 0.8).velocity(v, unconditional, conditional, t)
    assert torch.equal(guided[0], v[0])
    torch.testing.assert_close(guided[1], 0.2 * v[1] - 0.12 * unconditional[1] + 0.92 * conditional[1])
    guided = mf.Guidance(3.0, 0.0).velocity(v, unconditional, None, t)
    torch.testing.assert_close(guided, unconditional + 3 * (v - unconditional))


def test_the_adaptive_loss() -> None:
    error = torch.tensor([1.0, 100.0], requires_grad=True)
    assert mf.adaptive_loss(error, 0.0) == error.mean()
    loss = mf.adaptive_loss(error, 1.0, 1e-9)
    assert loss.item() == pytest.approx(1)
    loss.backward()
    assert error.grad is not None
    torch.testing.assert_close(error.grad, torch.tensor([0.5, 0.005]))


@pytest.mark.parametrize("kappa", [0.0, 0.5])
@pytest.mark.parametrize("equal", [0.0, 0.5, 1.0])
def test_what_is_left_out_changes_no_number(kappa: float, equal: float) -> None:
    """The loss as the paper writes it: every network call on the whole batch."""
    task = _task(guidance=mf.Guidance(1.5, kappa), label_dropout=0.5, pairs=mf.TimePairs(equal=equal))
    network, batch = _stirred(task.network), _batch()
    out = task.loss(batch)
    ours = torch.autograd.grad(out.loss, list(network.parameters()))

    x, noise = batch["image"], batch["noise"]
    t, r = task.pairs.pairs(batch["noise_t"], batch["noise_r"])
    wide = [value.view(-1, 1, 1, 1) for value in (t, r)]
    z, v = (1 - wide[0]) * x + wide[0] * noise, noise - x
    null = torch.full_like(batch["label"], 5)
    drop = torch.arange(8) < (batch["drop"] < 0.5).sum()
    with torch.no_grad():
        still = [t, torch.zeros_like(t)]
        guided = 1.5 * v + (1 - 1.5 - kappa) * network(z, still, null) + kappa * network(z, still, batch["label"])
    guided = torch.where(drop.view(-1, 1, 1, 1), v, guided)
    label = torch.where(drop, null, batch["label"])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        u, derivative = torch.func.jvp(
            lambda z, t, r: network(z, (t, t - r), label), (z, t, r), (guided, torch.ones_like(t), torch.zeros_like(t))
        )
    error = (u - (guided - (wide[0] - wide[1]) * derivative).detach()).square().sum((1, 2, 3))
    loss = (error / (error.detach() + 0.01)).mean()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.error, error.detach())
    for a, b in zip(ours, torch.autograd.grad(loss, list(network.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_changes_no_number() -> None:
    task, batch = _task(), _batch()
    weight = _stirred(task.network).blocks[0].attn.qkv.weight
    (plain,) = torch.autograd.grad(task.loss(batch).loss, weight)
    task.network.set_grad_checkpointing()
    (saved,) = torch.autograd.grad(task.loss(batch).loss, weight)
    torch.testing.assert_close(saved, plain)


@pytest.mark.parametrize("equal", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_of_blocks_come_with_the_loss(equal: float, checkpointing: bool) -> None:
    """In the order of the samples, with the gradient of a plain pass, and without changing the loss."""
    task = _task(guidance=None, pairs=mf.TimePairs(equal=equal, equal_by="chance"))
    network, batch = _stirred(task.network), _batch()
    network.set_grad_checkpointing(checkpointing)
    plain = task.loss(batch)
    x, noise, options = batch["image"], batch["noise"], {"power": task.loss_power, "eps": task.loss_eps}
    t, r = task.pairs.pairs(*(batch[name] for name in ("noise_t", "noise_r", "chance")))
    options |= task.condition(batch)
    out = mf.meanflow_loss(network, x, noise, t, r, blocks=[0, -1], **options)
    torch.testing.assert_close(out.loss, plain.loss)
    labels = mf.drop_labels(batch["label"], options["dropped"], 5)
    z = mf.PATH.interpolate(x, noise, t)
    _, acts = network.forward_intermediates(z, (t, t - r), labels, indices=[0, -1])
    weight = network.blocks[0].attn.qkv.weight
    for act, own in zip(out.acts, acts, strict=True):
        torch.testing.assert_close(act, own)
        draw = torch.randn_like(act)
        ours, theirs = (torch.autograd.grad((a * draw).sum(), weight, retain_graph=True)[0] for a in (act, own))
        torch.testing.assert_close(ours, theirs)


# --------------------------------------------------------------------------------------------------------------- tasks


def test_gradients_reach_every_parameter_of_the_unet() -> None:
    unet = mf.UnconditionalMeanFlow(**UNET)
    _stirred(unet.network)
    batch = _batch(channels=3)
    unet.loss({**batch, "augment": torch.randn(8, 6, dtype=torch.float64)}).loss.backward()
    for name, parameter in unet.network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_at_the_start_the_error_is_that_of_a_zero_network() -> None:
    """adaLN-zero predicts 0: the error is |v|^2, and the guided target that of omega v."""
    batch = {key: value.float() if value.is_floating_point() else value for key, value in _batch(64).items()}
    plain = _task(guidance=None).loss(batch)
    velocity = (batch["noise"] - batch["image"]).square().flatten(1).sum(1)
    torch.testing.assert_close(plain.error, velocity)
    torch.testing.assert_close(plain.velocity_error, velocity)
    assert plain.loss.item() == pytest.approx(1, abs=1e-3)
    guided = _task(guidance=mf.Guidance(3.0, 0.0), label_dropout=0.0).loss(batch)
    torch.testing.assert_close(guided.error, 9 * velocity)


def _loader(channels: int = 4, count: int = 16) -> DataLoader:
    images = torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader([{"image": images[i], "label": i % 5, "index": i} for i in range(count)], batch_size=8)


def _predicted(task: Any, batch_size: int = 8, **options: Any) -> Tensor:
    parts: Any = trainer(**options).predict(task, DataLoader(_loader(3).dataset, batch_size=batch_size))
    return torch.cat([part["picture"] for part in parts])


def test_a_checkpoint_samples_the_same(tmp_path: Path) -> None:
    task = _task(in_chans=3)
    run = trainer()
    run.fit(task, _loader(3))
    run.save_checkpoint(tmp_path / "own.ckpt")
    reloaded = mf.ClassConditionalMeanFlow.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    noise, label = torch.randn(2, *task.noise_shape), torch.tensor([0, 4])
    torch.testing.assert_close(reloaded.sample(noise, label), task.sample(noise, label))
    assert (reloaded.guidance, reloaded.pairs) == (mf.Guidance(), mf.TimePairs())
    assert not torch.equal(task.sample(noise, label), task.sample(noise, label.flip(0)))


def test_pictures_depend_on_the_index_alone_whatever_the_precision() -> None:
    task = _task(in_chans=3)
    _stirred(task.network).float()
    pictures = _predicted(task)
    assert pictures.shape == (16, 3, 8, 8)
    assert pictures.dtype == torch.uint8
    for other in (_predicted(task, batch_size=3), _predicted(task, precision="64-true")):
        assert (pictures.int() - other.int()).abs().max() <= 1


def test_few_steps_and_the_unconditional_task() -> None:
    task = mf.UnconditionalMeanFlow(**UNET, sampling_times=[1.0, 0.5, 0.0], optim=FAST)
    trainer().fit(task, _loader(3), _loader(3))
    assert task.num_classes == 0
    task.eval()  # dropout
    noise = torch.randn(2, *task.noise_shape)
    *_, end = mf.steps(task.network, noise, None, (1.0, 0.5, 0.0))
    assert torch.equal(task.sample(noise), end)
    assert not torch.equal(task.sample(noise), task.network.sample(noise))
    assert _predicted(task).shape == (16, 3, 8, 8)


def test_conditions_and_wrong_arguments_are_named() -> None:
    for times in (["t", "r"], ["h"], ["t", "r", "h"]):
        task = _task(times=times)
        assert [name for name in ("t", "r", "h") if hasattr(task.network, f"{name}_embedder")] == times
        _stirred(task.network)
        assert task.loss(_batch()).loss.isfinite()
    with pytest.raises(ZooError, match="sampling_times"):
        _task(sampling_times=[0.0, 1.0])
    with pytest.raises(ZooError, match="augment_dim"):
        mf.UnconditionalMeanFlow(**{**UNET, "augment_dim": 0})
    with pytest.raises(TypeError, match="null_class"):  # a network without "no label" could not be guided
        _task(null_class=False)
    with pytest.raises(ZooError, match="num_classes"):
        _task(num_classes=0)


def test_options_of_the_networks_reach_them() -> None:
    unet = mf.UnconditionalMeanFlow(**UNET, resample_filter=[1, 1], channel_mult_noise=1).network
    assert unet.enc["4x4_down"].conv0.resample_filter.shape[-2:] == (2, 2)
    assert unet.map_layer0.in_features == 2 * 8
    assert mf.UnconditionalMeanFlow(**UNET).network.map_layer0.in_features == 2 * 2 * 8
    assert hasattr(_task(style=MODERN).network.blocks[0].mlp, "w12")


# --------------------------------------------------------------------------------------------------- published weights


def test_the_average_that_was_published_is_taken() -> None:
    network = mf.UnconditionalMeanFlow(**UNET).network
    sets = {name: {k: v + n for k, v in network.state_dict().items()} for n, name in enumerate(("net", *mf.AVERAGES))}
    state = {f"{name}.{key}": value for name, found in sets.items() for key, value in found.items()}
    state["num_updates"] = torch.tensor(16)
    assert all(torch.equal(value, sets["net_ema1"][key]) for key, value in mf.convert_official(state).items())
    assert torch.equal(mf.convert_official(state, "net")["map_layer0.bias"], sets["net"]["map_layer0.bias"])
    assert mf.convert_official(dict(network.state_dict())).keys() == network.state_dict().keys()
    with pytest.raises(ZooError, match=r"unknown keys, such as 'head\.weight'"):
        mf.convert_official({**state, "net_ema1.head.weight": torch.zeros(1)})
    with pytest.raises(ZooError, match="holds no 'net_ema1'"):
        mf.convert_official({k: v for k, v in state.items() if not k.startswith("net_ema1.")})
    with pytest.raises(ZooError, match="different keys"):
        mf.convert_official({k: v for k, v in state.items() if k != "net_ema2.map_layer0.bias"})
    with pytest.raises(ZooError, match="unknown keys"):
        mf.convert_official({"net/blocks/layers_0/norm1/scale": torch.zeros(1)})


def test_published_weights_are_loaded_by_name_through_their_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zip of a flax training state, as the file is described, for a small network."""
    import zipfile

    from tests.formats.test_flax import _msgpack, _tree
    from zoo import create_model

    with torch.device("meta"):
        small = mf.meanflow_b4(depth=1, num_classes=5, embed_dim=32, num_heads=4)
    arrays = {}
    for key, value in small.state_dict().items():
        parts = ["layers_" + part if part.isdigit() else part for part in key.split(".")]
        leaf = {"bias": "bias", "weight": "kernel"}[parts.pop()]
        shape = list(value.shape)
        if parts[-1] == "embedding_table":
            parts, leaf = [*parts, "_flax_embedding"], "embedding"
        elif len(shape) == 4:
            shape = [shape[2], shape[3], shape[1], shape[0]]
        else:
            parts, shape = [*parts, "_flax_linear"], shape[::-1]
        arrays["/".join(["net", *parts, leaf])] = torch.randn(shape).numpy()
    state = {"step": 1, "params": _tree(arrays), "ema_params": _tree(arrays), "opt_state": {}}
    with zipfile.ZipFile(tmp_path / "MF-B-4.zip", "w") as archive:
        archive.writestr("MF-B-4/checkpoint_1", _msgpack(state))
    sizes: dict[str, Any] = {"depth": 1, "num_classes": 5, "embed_dim": 32, "num_heads": 4}
    network = create_model("meanflow_b4", weights=tmp_path / "MF-B-4.zip", **sizes)
    kernel = arrays["net/blocks/layers_0/attn/qkv/_flax_linear/kernel"]
    assert torch.equal(network.get_parameter("blocks.0.attn.qkv.weight"), torch.from_numpy(kernel).T)
