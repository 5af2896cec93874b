"""The transformer of iMF and pMF: shapes, its start, heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.token_dit import NUM_PREFIX, PREFIX, Block, SwiGLU, TokenDiT, convert_token_dit

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 3, "head_depth": 2, "num_heads": 4}
SIZES |= {"num_classes": 5}
PIXELS: dict[str, Any] = {"bottleneck": 6, "rope": "grid", "pos_embed": True, "mlp_multiple": 8}


def _inputs(count: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    z, times = torch.randn(count, 4, 8, 8, generator=draw), torch.rand(4, count, generator=draw)
    return [z, times[0], times[1], 1 + 5 * times[2], times[3] / 2, torch.ones(count), torch.arange(count)]


def _stirred(**options: Any) -> TokenDiT:
    torch.manual_seed(0)
    network = TokenDiT(**{**SIZES, **options})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize("options", [{}, PIXELS])
def test_it_starts_as_zero_and_its_blocks_as_the_identity(options: dict[str, Any]) -> None:
    network, inputs = TokenDiT(**SIZES, **options), _inputs()
    u, v = network(*inputs)
    assert u.shape == v.shape == inputs[0].shape
    assert not u.any()
    assert not v.any()
    tokens = network.trunk(inputs[0], *inputs[2:])
    assert tokens.shape == (3, NUM_PREFIX + 16, 32)
    block = network.u_heads[0]
    assert isinstance(block, Block)
    assert torch.equal(block(tokens, network.rope_cos, network.rope_sin), tokens)
    # The prefix is a learned token and the embedding, in this order of conditions.
    first = PREFIX["class"]
    omega = network.omega_embedder(1 - 1 / inputs[3])[:, None] + network.get_parameter("omega_tokens")
    if network.pos_embed is None:
        torch.testing.assert_close(tokens[:, first : first + 4], omega)


@pytest.mark.parametrize("options", [{}, PIXELS])
def test_every_condition_but_t_matters_and_heads_come_as_asked(options: dict[str, Any]) -> None:
    network, inputs = _stirred(**options), _inputs()
    u, v = network(*inputs)
    assert not torch.equal(u, v)
    torch.testing.assert_close(network(*inputs, heads="v")[0], v)
    torch.testing.assert_close(network(*inputs, heads="u")[0], u)
    for place in range(1, 7):
        changed = list(inputs)
        changed[place] = (changed[place] + 1) if place == 6 else changed[place] * 0.5 + 0.6
        assert torch.equal(network(*changed)[0], u) == (place == 1)
    without = TokenDiT(**{**SIZES, **options, "velocity_head": False})
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("v_")}
    without.load_state_dict(state)
    torch.testing.assert_close(without(*inputs, heads="u")[0], u)
    with pytest.raises(ZooError, match="no head 'v'"):
        without(*inputs)


def test_checkpointing_changes_no_number() -> None:
    network, inputs = _stirred(), _inputs()
    weight = network.get_parameter("shared_blocks.0.mlp.w2.weight")
    (plain,) = torch.autograd.grad(network(*inputs)[0].square().sum(), weight)
    network.set_grad_checkpointing()
    (again,) = torch.autograd.grad(network(*inputs)[0].square().sum(), weight)
    torch.testing.assert_close(again, plain)


def test_widths_and_what_does_not_fit() -> None:
    assert [SwiGLU(width, multiple).w1.out_features for width, multiple in ((1280, 1), (1280, 8), (768, 8))] == [
        3413, 3416, 2048,
    ]  # fmt: skip
    for options, word in (({"head_depth": 4}, "depth"), ({"num_classes": 0}, "classes"), ({"num_heads": 5}, "heads")):
        with pytest.raises(ZooError, match=word):
            TokenDiT(**{**SIZES, **options})
    with pytest.raises(ZooError, match="not a checkpoint"):
        convert_token_dit({"net.blocks.0.attn.qkv.weight": torch.zeros(1)})
