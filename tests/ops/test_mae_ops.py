"""Patches, masking and position tables, also for random sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.ops.attention import attention
from zoo.ops.masking import centre_masking, random_masking, take_tokens, tokens_at
from zoo.ops.patches import patchify, unpatchify
from zoo.ops.pos_embed import resize_pos_embed, sincos_2d


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_patches_invert(batch: int, channels: int, rows: int, columns: int, patch: int) -> None:
    images = torch.randn(batch, channels, rows * patch, columns * patch)
    patches = patchify(images, patch)
    assert patches.shape == (batch, rows * columns, patch * patch * channels)
    assert torch.equal(unpatchify(patches, patch, (rows, columns)), images)


def test_the_order_within_patches_is_row_column_channel() -> None:
    images = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    assert patchify(images, 2)[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]
    with pytest.raises(ZooError, match="5x4"):
        patchify(torch.zeros(1, 1, 5, 4), 2)
    with pytest.raises(ZooError, match="do not fill"):
        unpatchify(torch.zeros(1, 3, 4), 2)


@given(st.integers(1, 4), st.integers(2, 64), st.floats(0, 0.99), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_masking_partitions_the_tokens(batch: int, length: int, ratio: float, seed: int) -> None:
    noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    keep = int(length * (1 - ratio))
    if keep < 1:
        with pytest.raises(ZooError):
            random_masking(noise, ratio)
        return
    kept, masked, restore, mask = random_masking(noise, ratio)
    assert kept.shape == (batch, keep)
    shuffled = torch.cat([kept, masked], 1)
    assert torch.equal(shuffled.sort(1).values, torch.arange(length).expand(batch, -1))
    assert torch.equal(shuffled.gather(1, restore), torch.arange(length).expand(batch, -1))
    assert mask.sum(1).tolist() == [length - keep] * batch
    assert mask.gather(1, kept).sum() == 0
    if keep < length:
        assert (noise.gather(1, kept).max(1).values <= noise.gather(1, masked).min(1).values).all()


def test_masks_are_uniform() -> None:
    noise = torch.rand(4000, 16, generator=torch.Generator().manual_seed(0))
    share = random_masking(noise, 0.75).mask.mean(0)
    assert (share - 0.75).abs().max() < 0.03


def test_tokens_are_taken_by_sample() -> None:
    tokens, ids = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    taken = take_tokens(tokens, ids)
    assert torch.equal(taken[0, 0], tokens[0, 4])
    assert torch.equal(taken[1, 1], tokens[1, 1])
    assert torch.equal(tokens_at(tokens[:1], ids)[1, 0], tokens[0, 1])


def test_positions_encode_the_column_first() -> None:
    table = sincos_2d(8, (2, 3), num_prefix=1)
    assert table.shape == (1, 7, 8)
    assert table[0, 0].abs().max() == 0
    grid = table[0, 1:].reshape(2, 3, 8)
    assert torch.equal(grid[0, :, :4], grid[1, :, :4])
    assert torch.equal(grid[:, 0, 4:], grid[:, 2, 4:])
    angles = torch.tensor([2.0, 0.02])  # column 2 at rates 1 and 1/100
    torch.testing.assert_close(grid[0, 2, :4], torch.cat([angles.sin(), angles.cos()]))
    with pytest.raises(ZooError, match="divisible by 4"):
        sincos_2d(6, (2, 2))


def test_a_position_table_of_the_same_grid_is_left_alone() -> None:
    table = torch.randn(1, 17, 8)
    assert resize_pos_embed(table, (4, 4)) is table
    larger = resize_pos_embed(table, (6, 5))
    assert larger.shape == (1, 31, 8)
    assert torch.equal(larger[:, :1], table[:, :1])
    assert resize_pos_embed(table[:, 1:], (8, 8), num_prefix=0).shape == (1, 64, 8)
    with pytest.raises(ZooError, match="no square grid"):
        resize_pos_embed(table, (6, 6), num_prefix=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_softmax_attention_in_every_dtype(dtype: torch.dtype) -> None:
    """Fewer queries than keys, as in MAE's last decoder block; half precision takes another path on a CPU."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, length, 16).requires_grad_() for length in (5, 9, 9)]
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
    out = attention(q, k, v)
    wanted = ((inputs[0] / 4) @ inputs[1].mT).softmax(-1) @ inputs[2]
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(out.float(), wanted, atol=tolerance, rtol=tolerance)
    out.float().square().sum().backward()
    wanted.square().sum().backward()
    for mine, theirs in zip((q, k, v), inputs, strict=True):
        torch.testing.assert_close(mine.grad.float(), theirs.grad, atol=4 * tolerance, rtol=4 * tolerance)


def test_the_centre_is_hidden() -> None:
    masking = centre_masking((4, 4), 2)
    assert masking.mask[0].reshape(4, 4).tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert masking.ids_masked[1].tolist() == [5, 6, 9, 10]
    order = torch.cat([masking.ids_keep, masking.ids_masked], dim=1)
    assert torch.equal(order.gather(1, masking.ids_restore), torch.arange(16).expand(2, -1))
    assert centre_masking((3, 4, 4), 1).mask.sum() == 12
    with pytest.raises(ZooError, match="middle"):
        centre_masking((4, 4), 1, share=0.1)
