"""Rotary position embedding on a grid, and attention with masked keys."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ZooError
from zoo.ops.attention import attention
from zoo.ops.pos_embed import RopeLayout, apply_rope, rope_1d, rope_2d


def test_rotation_shows_relative_positions_only() -> None:
    cos, sin = (table.double() for table in rope_2d(8, (5, 6), num_prefix=1))
    q, k = torch.randn(2, 8, dtype=torch.float64)
    scores = apply_rope(q.expand(31, -1), cos, sin) @ apply_rope(k.expand(31, -1), cos, sin).T
    assert torch.allclose(scores[0, 0], q @ k)  # the prefix does not turn
    grid = scores[1:, 1:].reshape(5, 6, 5, 6)
    assert torch.allclose(grid[1, 1, 3, 2], grid[0, 3, 2, 4])  # two down, one to the right
    assert not torch.allclose(grid[1, 1, 3, 2], grid[1, 1, 2, 3])
    with pytest.raises(ZooError, match="divisible by 4"):
        rope_2d(6, (2, 2))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_layouts_differ_in_the_order_of_channels_only(layout: RopeLayout) -> None:
    cos, sin = (table.double() for table in rope_1d(8, 12, num_prefix=1, layout=layout))
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turn = [apply_rope(x.expand(13, -1), cos, sin, layout) for x in (q, k)]
    scores = turn[0] @ turn[1].T
    assert torch.allclose(scores[0, 0], q @ k)
    assert torch.allclose(scores[2, 5], scores[7, 10])
    order = torch.arange(8) if layout == "interleaved" else torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    pairs = torch.view_as_complex(q[order.argsort()].view(4, 2))
    turned = pairs * torch.polar(torch.ones(4).double(), 3 * 10000.0 ** (-torch.arange(4).double() / 4))
    torch.testing.assert_close(turn[0][4][order.argsort()], torch.view_as_real(turned).flatten())
    both = [rope_2d(8, (3, 2), layout=kind)[0] for kind in ("interleaved", layout)]  # type: ignore[arg-type]
    assert torch.equal(both[0][:, order], both[1])
    with pytest.raises(ZooError, match="even width"):
        rope_1d(5, 2)
    with pytest.raises(ZooError, match="rotary layout"):
        rope_1d(4, 2, layout="halves")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_keys_are_not_seen(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8).to(dtype)
    mask = torch.rand(2, 1, 1, 7) < 0.6
    mask[..., 0] = True
    out = attention(q, k, v, mask)
    moved = torch.where(mask.transpose(-1, -2), v, 100 * torch.ones_like(v))
    assert torch.equal(attention(q, torch.where(mask.transpose(-1, -2), k, -k), moved, mask), out)
    reference = ((q.double() @ k.double().mT) / 8**0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v.double()
    assert torch.allclose(out.double(), reference, atol=1e-5 if dtype == torch.float32 else 3e-2)
    torch.manual_seed(0)
    dropped = torch.stack([attention(q, k, v, mask, dropout=0.5) for _ in range(300)]).double().mean(0)
    assert (dropped - reference).abs().mean() < 0.1
