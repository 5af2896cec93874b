"""The trunk of the generation field: blocks, paths, samplers, guidance, diffusion steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import parity
from zoo.errors import ZooError
from zoo.nn.dit import MODERN, BlockStyle, DiT, convert_dit, flax_to_torch
from zoo.ops.diffusion import Diffusion, spaced_steps
from zoo.ops.flow import GVPPath, LinearPath, VPPath
from zoo.ops.flow import Path as FlowPath
from zoo.ops.guidance import drop_labels, guide, guided, scale_within
from zoo.ops.pos_embed import apply_rope, rope_2d
from zoo.ops.samplers import dopri5_path, ode_path, sde_path, times_between

SMALL: dict[str, Any] = {"img_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
STYLES = {
    "classic": BlockStyle(),
    "modern": MODERN,
    "no_shift": BlockStyle(norm="rms", mlp="gelu", shift=False),
}


def _inputs(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, t = torch.randn(count, 4, 8, 8, generator=draw), torch.rand(count, generator=draw)
    return x, t, torch.randint(0, 6, (count,), generator=draw)


def _stirred(network: DiT) -> DiT:
    """Without the zeros that adaLN-zero begins with."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


# -------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("style", STYLES)
def test_a_new_network_is_zero_and_its_blocks_are_the_identity(style: str) -> None:
    network = DiT(**SMALL, style=STYLES[style])
    x, t, y = _inputs()
    out, acts = network.forward_intermediates(x, t, y)
    assert out.shape == x.shape
    assert out.abs().max() == 0
    assert len(acts) == 3
    embedded = network.x_embedder(x) + network.pos_embed
    assert all(torch.equal(act, embedded) for act in acts)


def test_intermediates_are_the_outputs_of_the_blocks_that_are_asked_for() -> None:
    network = _stirred(DiT(**SMALL, context_tokens=2, context_start=1))
    inputs, ran = _inputs(), []
    for block in network.blocks:
        block.register_forward_hook(lambda block, arguments, output: ran.append(output))
    out, acts = network.forward_intermediates(*inputs)
    assert [act.shape[1] for act in acts] == [16, 18, 18]
    assert all(act is output for act, output in zip(acts, ran, strict=True))
    torch.testing.assert_close(out, network(*inputs))
    for indices, picked in (([0, -1], [0, 2]), (2, [1, 2]), ([1], [1])):
        _, found = network.forward_intermediates(*inputs, indices=indices)
        assert all(torch.equal(act, acts[k]) for act, k in zip(found, picked, strict=True))
    ran.clear()
    (first,) = network.forward_intermediates(*inputs, indices=[0], stop_early=True, intermediates_only=True)
    assert len(ran) == 1
    assert torch.equal(first, acts[0])
    network.set_grad_checkpointing()
    assert torch.equal(network.forward_intermediates(*inputs)[1][-1], acts[-1])
    with pytest.raises(ZooError, match="blocks 0 to 2"):
        network.forward_intermediates(*inputs, indices=[3])
    with pytest.raises(ZooError, match="intermediates_only"):
        network.forward_intermediates(*inputs, indices=[0], stop_early=True)


@pytest.mark.parametrize("style", STYLES)
def test_gradients_reach_every_parameter(style: str) -> None:
    network = _stirred(DiT(**SMALL, style=STYLES[style], times=("t", "h"), context_tokens=2, context_start=1))
    x, t, y = _inputs()
    network(x, (t, t / 2), y).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_switches_change_what_they_say() -> None:
    networks = {name: DiT(**SMALL, style=style) for name, style in STYLES.items()}
    keys = {name: set(network.state_dict()) for name, network in networks.items()}
    assert "blocks.0.norm1.weight" in keys["modern"] - keys["classic"]
    assert "blocks.0.attn.q_norm.weight" in keys["modern"] - keys["classic"]
    assert "blocks.0.mlp.w12.weight" in keys["modern"] - keys["no_shift"]
    assert networks["no_shift"].blocks[0].adaLN_modulation[1].out_features == 4 * 32
    assert networks["classic"].blocks[0].adaLN_modulation[1].out_features == 6 * 32
    exact, tanh = (DiT(**SMALL, style=BlockStyle(mlp=kind)) for kind in ("gelu", "gelu_tanh"))
    exact.load_state_dict(_stirred(tanh).state_dict())
    x, t, y = _inputs()
    difference = (exact(x, t, y) - tanh(x, t, y)).abs().max()
    assert 0 < difference < 0.1 * tanh(x, t, y).abs().max()
    with pytest.raises(ZooError, match="norm layer or rms"):
        BlockStyle(norm="batch")  # type: ignore[arg-type]


def test_conditions_are_checked() -> None:
    network = DiT(**SMALL, times=("t", "h"))
    x, t, y = _inputs()
    with pytest.raises(ZooError, match=r"t, h; 1 were given"):
        network(x, t, y)
    with pytest.raises(ZooError, match="wants labels"):
        network(x, (t, t))
    with pytest.raises(ZooError, match="takes no labels"):
        DiT(**{**SMALL, "num_classes": 0})(x, t, y)
    with pytest.raises(ZooError, match="context tokens"):
        DiT(**SMALL, context_tokens=2, context_start=3)
    assert DiT(**{**SMALL, "num_classes": 0})(x, t).shape == x.shape
    assert DiT(**SMALL, null_class=False).y_embedder.embedding_table.num_embeddings == 5


def test_position_tables_are_stored_fixed_or_none() -> None:
    stored, fixed, none = (DiT(**SMALL, pos_embed=kind) for kind in ("stored", "fixed", "none"))
    assert "pos_embed" in stored.state_dict()
    assert "pos_embed" not in fixed.state_dict()
    assert torch.equal(stored.pos_embed, fixed.pos_embed)
    assert none.pos_embed is None
    assert all("pos_embed" not in name for name, _ in stored.named_parameters())


def test_checkpointing_changes_no_number() -> None:
    network, (x, t, y) = _stirred(DiT(**SMALL, style=MODERN)).double(), _inputs()
    x, t = x.double(), t.double()
    weight = network.blocks[0].attn.qkv.weight
    (plain,) = torch.autograd.grad(network(x, t, y).sum(), weight)
    network.set_grad_checkpointing()
    (saved,) = torch.autograd.grad(network(x, t, y).sum(), weight)
    torch.testing.assert_close(saved, plain)


def test_rotary_positions_depend_on_differences_alone() -> None:
    cos, sin = rope_2d(8, (4, 4), num_prefix=1)
    assert cos.shape == (17, 8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(-1, 1, 1, 17, -1)
    scores = (apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).transpose(-2, -1))[0, 0]
    grid = scores[1:, 1:].view(4, 4, 4, 4)  # row, column of the query; row, column of the key
    torch.testing.assert_close(grid[0, 0, 1, 2], grid[2, 1, 3, 3], rtol=1e-5, atol=1e-6)
    assert not torch.isclose(grid[0, 0, 1, 2], grid[0, 0, 2, 1])
    assert torch.equal(apply_rope(q, cos, sin)[..., 0, :], q[..., 0, :])  # the prefix is not turned
    with pytest.raises(ZooError, match="divisible by 4"):
        rope_2d(6, (2, 2))


def _jit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


@pytest.mark.parametrize("name", ["forward", "forward_no_context"])
def test_the_modern_block_is_that_of_jit(shared: Path, name: str) -> None:
    """RMSNorm, SwiGLU, rotary positions, query-key norm, low-rank patches, context tokens: official numbers."""
    case = {**parity.load(shared / "parity" / "jit" / f"{name}.json"), "device": "cpu"}
    facts, inputs = case["config"]["constructor"], parity.filled_inputs(case)
    network: Any = DiT(
        img_size=facts["input_size"],
        patch_size=facts["patch_size"],
        in_chans=facts["in_channels"],
        embed_dim=facts["hidden_size"],
        depth=facts["depth"],
        num_heads=facts["num_heads"],
        mlp_ratio=facts["mlp_ratio"],
        num_classes=facts["num_classes"],
        style=MODERN,
        bottleneck=facts["bottleneck_dim"],
        context_tokens=facts["in_context_len"],
        context_start=facts["in_context_start"],
    )
    parity.load_filled(network, case, _jit)
    out, acts = network.forward_intermediates(inputs["x"], inputs["t"], inputs["y"])
    found = {"out": out, **{f"block{k}": act for k, act in enumerate(acts)}}
    compared = [key for key in case["outputs"] if key in found]
    assert "out" in compared
    for key in compared:
        assert parity.compare(case["outputs"][key], found[key], 1e-5, 1e-6) is None, key


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("layout", "side"), [("DiT-XL-2-256", 32), ("DiT-XL-2-512", 64), ("SiT-XL-2-256", 32)])
def test_published_layouts_convert_key_for_key(shared: Path, layout: str, side: int) -> None:
    published = json.loads((shared / "statedicts" / "_generation_common" / f"{layout}.json").read_text())
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in published["keys"].items()}
        network = DiT(img_size=side, out_chans=8)  # the defaults are XL/2's
    converted = convert_dit(state)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in network.state_dict().items()}
    table = network.pos_embed.numel()  # a parameter there, a buffer here
    assert sum(p.numel() for p in network.parameters()) + table == published["params"]
    with pytest.raises(ZooError, match=r"blocks\.0\.norm1\.weight"):
        convert_dit({**state, "blocks.0.norm1.weight": torch.empty(1)})


def test_flax_kernels_are_turned() -> None:
    linear, conv = torch.randn(3, 5), torch.randn(2, 2, 4, 8)
    state = flax_to_torch(
        {"a/layers_1/_flax_linear/kernel": linear, "x/proj/kernel": conv, "t/_flax_embedding/embedding": linear}
    )
    assert torch.equal(state["a.1.weight"], linear.T)
    assert torch.equal(state["x.proj.weight"], conv.permute(3, 2, 0, 1))
    assert torch.equal(state["t.weight"], linear)
    with pytest.raises(ZooError, match="a/b"):
        flax_to_torch({"a/b": linear})


# --------------------------------------------------------------------------------------------------------------- paths

PATHS = {"linear": LinearPath, "gvp": GVPPath, "vp": VPPath}


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("kind", PATHS)
def test_the_velocity_is_the_derivative_of_the_path(kind: str, noise_at: int) -> None:
    path: FlowPath = PATHS[kind](noise_at=noise_at)
    x, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda t: path.interpolate(x, noise, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.velocity(x, noise, t), derivative)


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("kind", PATHS)
def test_predictions_of_one_point_agree(kind: str, noise_at: int) -> None:
    """For one data point the noise is known, and all predictions say the same."""
    path: FlowPath = PATHS[kind](noise_at=noise_at)
    x, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    z, v = path.interpolate(x, noise, t), path.velocity(x, noise, t)
    score = path.score_from("noise", noise, z, t)
    torch.testing.assert_close(path.score_from("velocity", v, z, t), score)
    torch.testing.assert_close(path.velocity_from("noise", noise, z, t), v)
    torch.testing.assert_close(path.velocity_from("score", score, z, t), v)
    torch.testing.assert_close(path.data_from_score(score, z, t), x)
    for prediction, output in (("velocity", v), ("noise", noise), ("score", score)):
        assert path.loss(prediction, output, x, noise, t).abs().max() < 1e-20
    with pytest.raises(ZooError, match="unknown prediction"):
        path.velocity_from("data", v, z, t)  # type: ignore[arg-type]


def test_the_two_conventions_are_mirror_images() -> None:
    ours, other = LinearPath(noise_at=1), LinearPath(noise_at=0)
    x, noise, t = torch.randn(3, 2), torch.randn(3, 2), torch.rand(3)
    torch.testing.assert_close(ours.interpolate(x, noise, t), other.interpolate(x, noise, 1 - t))
    assert torch.equal(ours.velocity(x, noise, t), -other.velocity(x, noise, 1 - t))
    assert torch.equal(ours.velocity(x, noise, t), noise - x)
    with pytest.raises(ZooError, match="time 0 or 1"):
        LinearPath(noise_at=2)


# ------------------------------------------------------------------------------------------------------------ samplers


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_ode_solvers_have_their_order(method: Any, order: int) -> None:
    errors = []
    for steps in (8, 16):
        times = times_between(0.0, 1.0, steps, torch.zeros((), dtype=torch.float64))
        *_, end = ode_path(lambda z, t: -z * (1 + t[:, None]), torch.ones(1, 1, dtype=torch.float64), times, method)
        errors.append(abs(end.item() - torch.tensor(-1.5).exp().item()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("times", [(0.0, 0.3, 1.0), (1.0, 0.3, 0.0)])
def test_the_adaptive_solver_keeps_its_tolerance(times: tuple[float, ...]) -> None:
    def exact(t: float) -> float:
        return torch.tensor(3 * t - 4 * t**2).exp().item()

    calls = []

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        calls.append(t[0].item())
        return z * (3 - 8 * t[:, None])

    start = torch.full((2, 1), exact(times[0]), dtype=torch.float64)
    for tolerance in (1e-3, 1e-8):
        calls.clear()
        states = dopri5_path(velocity, start, torch.tensor(times), atol=tolerance, rtol=tolerance)
        for t, state in zip(times[1:], states, strict=True):
            assert state[0, 0].item() == pytest.approx(exact(t), rel=100 * tolerance)
        assert len(calls) < {1e-3: 60, 1e-8: 400}[tolerance]
    with pytest.raises(ZooError, match="rise, or that fall"):
        list(dopri5_path(velocity, start, torch.tensor([0.0, 0.5, 0.2])))
    with pytest.raises(ZooError, match="more than 2 steps"):
        list(dopri5_path(velocity, start, torch.tensor([0.0, 1.0]), rtol=1e-9, max_steps=2))


def test_the_sde_sampler_finds_a_gaussian() -> None:
    """Data N(0, 0.25): the exact score is known, and the samples have the deviation 0.5."""
    path = LinearPath(noise_at=0)

    def score(z: Tensor, t: Tensor) -> Tensor:
        return -z / (0.25 * t**2 + (1 - t) ** 2)[:, None]

    draw = torch.Generator().manual_seed(0)
    noises = [torch.randn(4000, 1, generator=draw, dtype=torch.float64) for _ in range(100)]
    times = times_between(0.001, 0.96, 100, noises[0])
    start = torch.randn(4000, 1, generator=draw, dtype=torch.float64)
    for method in ("euler", "heun"):
        *_, end = sde_path(path, "score", score, start, times, noises, "sigma", method=method)  # type: ignore[arg-type]
        assert end.std().item() == pytest.approx(0.5, rel=0.05)
    with pytest.raises(ZooError, match="noise is at time 0"):
        list(sde_path(LinearPath(noise_at=1), "score", score, start, times, noises))


def test_guidance() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 2, 2)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    first = guide(conditional, unconditional, 2.0, channels=3)
    assert torch.equal(first[:, 3:], conditional[:, 3:])
    torch.testing.assert_close(first[:, :3], (2 * conditional - unconditional)[:, :3])
    call = guided(lambda x, t, y: x * y[:, None], 3.0, null_label=9)
    x, t, y = torch.ones(2, 1), torch.zeros(2), torch.tensor([1, 2])
    assert call(x, t, y).flatten().tolist() == [9 + 3 * (1 - 9), 9 + 3 * (2 - 9)]
    assert scale_within(torch.tensor([0.0, 0.5, 1.0]), 4.0, 0.3, 0.8).tolist() == [1, 4, 1]
    assert drop_labels(y, torch.tensor([True, False]), 9).tolist() == [9, 2]


# ----------------------------------------------------------------------------------------------------- diffusion steps


def test_respacing() -> None:
    assert spaced_steps(1000, "4") == spaced_steps(1000, 4) == [0, 333, 666, 999]
    assert spaced_steps(300, "10,15,20")[:3] == [0, 11, 22]
    assert len(spaced_steps(300, "10,15,20")) == 45
    assert spaced_steps(1000, "ddim50") == list(range(0, 1000, 20))
    assert spaced_steps(5, "") == list(range(5))
    with pytest.raises(ZooError, match="no whole stride"):
        spaced_steps(1000, "ddim999")
    with pytest.raises(ZooError, match="cannot keep"):
        spaced_steps(10, 11)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sqrt_linear"])
def test_a_network_that_knows_the_noise_is_brought_to_the_data(schedule: str) -> None:
    process = Diffusion(schedule, respacing=20, variance="fixed_small")
    assert process.abar[0] > 0.99
    assert process.abar[-1] < 0.01
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 1, 4, 4, generator=draw, dtype=torch.float64)
    t = torch.full((3,), 19)
    z = process.noised(x, t, noise)

    def network(z: Tensor, steps: Tensor) -> Tensor:
        abar = Diffusion(schedule).abar[steps].view(-1, 1, 1, 1)
        return (z - abar.sqrt() * x) / (1 - abar).sqrt()

    *_, end = process.ddim(network, z, [noise] * 20)
    torch.testing.assert_close(end, x)
    *_, end = process.ancestral(network, z, [torch.randn(noise.shape, generator=draw)] * 20)
    torch.testing.assert_close(end, x)
    output = network(z, process.network_steps(t))
    assert process.losses(output, x, noise, t)["loss"].max() < 1e-10


def test_the_variational_bound_trains_the_variance_alone() -> None:
    torch.manual_seed(0)
    process = Diffusion()
    x, noise = torch.rand(2, 2, 4, 4, 4) * 2 - 1
    output = torch.randn(2, 8, 4, 4, requires_grad=True)
    losses = process.losses(output, x, noise, torch.tensor([0, 500]))
    mean, variance = torch.autograd.grad(losses["vb"].sum(), output)[0].chunk(2, dim=1)
    assert mean.abs().max() == 0
    assert (variance.abs().amax((1, 2, 3)) > 0).all()
    with pytest.raises(ZooError, match="noise schedule"):
        Diffusion("quadratic")
