"""The plain ViT as a backbone of detectors: windows, positions, propagation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from zoo.errors import ZooError
from zoo.nn.detection.vit import (
    ConvBlock,
    MapAttention,
    MapBlock,
    SharedPositions,
    ViTBackbone,
    ViTConfig,
    relative_rows,
    rescaled,
    with_positions,
)
from zoo.ops.attention import attention

TINY = ViTConfig(
    img_size=48, patch_size=8, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.0, drop_path=0.0, window_size=4,
    global_blocks=(1, 3), pos_grid=3,
)  # fmt: skip


def tiny(**changes: object) -> ViTConfig:
    return ViTConfig(**{**vars(TINY), **changes})


def written_out(layer: MapAttention, x: Tensor) -> Tensor:
    """The attention as the paper and detectron2 have it: padding before the projection, one window after another."""
    height, width, dim = x.shape[1:]
    side, offset, heads = layer.window or height, layer.offset, layer.num_heads
    across = layer.window or width
    down, right = -(height + offset) % side, -(width + offset) % across
    padded = pad(x, (0, 0, offset, right, offset, down))
    out = torch.zeros_like(padded)
    for top in range(0, padded.shape[1], side):
        for left in range(0, padded.shape[2], across):
            window = padded[:, top : top + side, left : left + across].flatten(1, 2)
            q, k, v = layer.qkv(window).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(2, 3) * (dim // heads) ** -0.5
            rows, columns = relative_rows(layer.rel_pos_h, side), relative_rows(layer.rel_pos_w, across)
            maps = q.unflatten(2, (side, across))
            by_row = torch.einsum("bhyxd,ykd->bhyxk", maps, rows)[..., :, None]
            by_column = torch.einsum("bhyxd,xkd->bhyxk", maps, columns)[..., None, :]
            scores = scores + (by_row + by_column).flatten(4, 5).flatten(2, 3)
            found = layer.proj((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
            out[:, top : top + side, left : left + across] = found.unflatten(1, (side, across))
    return out[:, offset : offset + height, offset : offset + width]


@pytest.mark.parametrize(("window", "offset"), [(4, 0), (4, 2), (3, 0), (0, 0)])
def test_attention_is_that_of_the_paper(window: int, offset: int) -> None:
    torch.manual_seed(0)
    layer = MapAttention(16, 2, window, offset, table=5).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 6, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), written_out(layer, x))


def test_positions_are_channels_of_queries_and_keys() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 20, 6), torch.randn(2, 3, 20, 6)
    rows, columns = torch.randn(4, 4, 6), torch.randn(5, 5, 6)
    queries, keys = with_positions(q, k, rows, columns, 0.5)
    assert queries.shape == keys.shape == (2, 3, 20, 16)  # 6 + 4 + 5, filled up
    a, b = 7, 13  # places (1, 2) and (2, 3)
    wanted = 0.5 * (q[:, :, a] * k[:, :, b]).sum(-1) + (q[:, :, a] * (rows[1, 2] + columns[2, 3])).sum(-1)
    torch.testing.assert_close((queries[:, :, a] * keys[:, :, b]).sum(-1), wanted)


def test_relative_rows_go_by_the_difference_and_are_resized() -> None:
    table = torch.arange(7.0)[:, None]
    assert relative_rows(table, 4)[2, 0] == 5
    assert relative_rows(table, 4)[0, 2] == 1
    longer = interpolate(table.T[None], size=11, mode="linear")[0].T
    torch.testing.assert_close(relative_rows(table, 6)[0, 5], longer[0])


def test_shared_positions_by_place() -> None:
    shared = SharedPositions(2, 4)
    torch.nn.init.normal_(shared.relative_position_bias_table)
    bias, width = shared(4, 4), 7
    assert bias.shape == (2, 16, 16)
    row = (2 - 1 + 3) * width + (0 - 3 + 3)  # from (2, 0) to (1, 3)
    assert torch.equal(bias[:, 8, 7], shared.relative_position_bias_table[row])
    assert shared(3, 5).shape == (2, 15, 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_numbers_are_added_to_the_scores(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    bias = torch.randn(2, 6, 6)
    wanted = (q @ k.transpose(2, 3) * 0.3 + bias).softmax(3) @ v
    found = attention(q.to(dtype), k.to(dtype), v.to(dtype), bias.to(dtype), scale=0.3)
    tight = dtype == torch.float32
    torch.testing.assert_close(found.float(), wanted, atol=1e-5 if tight else 0.05, rtol=1e-4 if tight else 0.05)


@pytest.mark.parametrize("kind", ["bottleneck", "basic", "naive"])
def test_convolutions_start_as_the_identity(kind: str) -> None:
    block, x = ConvBlock(8, kind), torch.randn(1, 8, 5, 4)  # type: ignore[arg-type]
    assert torch.equal(block(x), x)
    torch.nn.init.ones_(block.get_submodule(f"norm{block.count}").weight)  # type: ignore[arg-type]
    assert not torch.allclose(block(x), x)


def test_news_passes_windows_in_global_shifted_and_convolutional_blocks_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 16, dtype=torch.float64)
    other = x.clone()
    other[:, 5, 5] += torch.randn(16)

    def reached(config: ViTConfig, index: int) -> Tensor:
        block = MapBlock(config, index).double()
        if block.residual is not None:
            torch.nn.init.ones_(block.residual.norm3.weight)  # type: ignore[arg-type, union-attr]
        return (block(x) - block(other)).abs().sum(-1)[0] > 1e-12

    windowed = reached(TINY, 0)
    assert windowed[4:, 4:].all()
    assert windowed.sum() == 16
    assert reached(TINY, 1).all()
    shifted = reached(tiny(shift=True, global_blocks=()), 1)
    assert shifted[2:6, 2:6].all()
    assert shifted.sum() == 16
    assert reached(tiny(conv_blocks=(0,)), 0)[3, 4]  # next to the window


@pytest.mark.parametrize(
    "changes", [{}, {"rel_pos": "shared"}, {"rel_pos": None, "conv_blocks": (1,), "layer_scale": 0.1}]
)
def test_maps_of_chosen_blocks_and_recomputed_gradients(changes: dict[str, object]) -> None:
    images, found = torch.randn(2, 3, 48, 40), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = ViTBackbone(tiny(**changes, grad_checkpointing=checkpointing), {"a": 0, "b": 3})
        maps = net(images)
        assert {name: tuple(x.shape) for name, x in maps.items()} == dict.fromkeys("ab", (2, 16, 6, 5))
        sum(x.square().mean() for x in maps.values()).backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == dict(net.named_parameters()).keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])
    names = ("pos_embed", "blocks.2.mlp.fc1.bias", "blocks.1.residual.conv1.weight")
    assert [net.layer_id(name) for name in names] == [0, 3, 5]
    assert max(map(net.layer_id, found[0])) < net.num_layer_ids == 6


def test_what_does_not_go_together_is_named() -> None:
    for changes, message in (
        ({"conv": "bottelneck"}, "did you mean 'bottleneck'"),
        ({"rel_pos": "shard"}, "did you mean 'shared'"),
        ({"num_heads": 3}, "not divisible by num_heads"),
        ({"img_size": 50}, "no multiple of patch_size"),
        ({"global_blocks": (1, 4)}, "counts blocks from 0 to 3, not 4"),
    ):
        with pytest.raises(ZooError, match=message):
            tiny(**changes)
    with pytest.raises(ZooError, match="no map after block 7"):
        ViTBackbone(TINY, {"c": 7})
    with pytest.raises(ZooError, match="40 x 50 pixels do not part into patches of 8"):
        ViTBackbone(TINY)(torch.zeros(1, 3, 40, 50))
    with pytest.raises(ZooError, match="not 3"):
        rescaled(8, 3)
