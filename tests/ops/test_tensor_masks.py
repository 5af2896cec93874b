"""Tensors of masks: the swap against its 16 corners one by one, gradients, and masks of chosen windows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d, grid_sample

from benchmarks.speed.tensormask import sixteen_corners
from zoo.errors import ZooError
from zoo.ops.masks import paste_masks
from zoo.ops.tensor_masks import (
    align2nat,
    aligned_windows,
    interpolation,
    nat2align,
    swap_align2nat,
    upscale_align2nat,
    upscale_masks,
)

# V, scale, H, W: odd and even masks, whole and half positions, maps that the scale does not divide, or that are small
SHAPES = [
    (3, 1, 6, 7),
    (4, 1, 5, 6),
    (3, 2, 8, 9),
    (5, 4, 9, 8),
    (4, 3, 7, 5),
    (3, 3, 7, 8),
    (1, 2, 5, 4),
    (2, 8, 3, 9),
]


@pytest.mark.parametrize(("side", "scale", "height", "width"), SHAPES)
@pytest.mark.parametrize("pad", [-6.0, 0.5])
def test_the_swap_is_that_of_16_corners(side: int, scale: int, height: int, width: int, pad: float) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, side**2, height, width, dtype=torch.float64, generator=draw, requires_grad=True)
    wanted, found = sixteen_corners(x, scale, pad), swap_align2nat(x, scale, pad)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn(wanted.shape, dtype=torch.float64, generator=draw)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (found, wanted)))


@pytest.mark.parametrize(("side", "scale", "height", "width"), SHAPES)
def test_masks_of_chosen_windows_are_the_whole_tensors(side: int, scale: int, height: int, width: int) -> None:
    draw = torch.Generator().manual_seed(1)
    features, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=draw, requires_grad=True)
        for shape in ((2, 5, height, width), (side**2, 5, 1, 1), (side**2,))
    )
    whole = swap_align2nat(conv2d(features, weight, bias), scale)
    places = [torch.arange(n) for n in (2, *whole.shape[-2:])]
    found = aligned_windows(features, weight, bias, torch.cartesian_prod(*places), side * scale, scale)
    wanted = whole.permute(0, 2, 3, 1).reshape(found.shape)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=draw)
    for one, other in zip(
        *(torch.autograd.grad(y, (features, weight, bias), upstream) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(("side", "size"), [(4, 6), (3, 9), (5, 5)])
def test_upscaled_windows_too(side: int, size: int, mode: str) -> None:
    features, weight, bias = torch.randn(1, 4, 6, 5), torch.randn(side**2, 4, 1, 1), torch.randn(side**2)
    whole = upscale_align2nat(conv2d(features, weight, bias), size, mode=mode)  # type: ignore[arg-type]
    found = aligned_windows(features, weight, bias, torch.tensor([[0, 2, 3], [0, 0, 0]]), size, mode=mode)  # type: ignore[arg-type]
    wanted = torch.stack([whole[0, :, 2, 3], whole[0, :, 0, 0]]).view_as(found)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_aligned_to_natural_and_back() -> None:
    """Entry (v, u) of the window at (y, x) is what lies (v, u) from its corner (section 3.3)."""
    x = torch.randn(1, 9, 8, 8)
    natural = align2nat(x).unflatten(1, (3, 3))
    assert natural[0, 2, 0, 4, 4] == pytest.approx(float(x.unflatten(1, (3, 3))[0, 2, 0, 5, 3]), abs=1e-5)
    assert natural[0, 0, 0, 0, 0] == pytest.approx(-6)
    torch.testing.assert_close(nat2align(align2nat(x))[..., 2:-2, 2:-2], x[..., 2:-2, 2:-2], rtol=1e-4, atol=1e-5)
    aligned = nat2align(x).unflatten(1, (3, 3))
    assert aligned[0, 2, 0, 4, 4] == pytest.approx(float(x.unflatten(1, (3, 3))[0, 2, 0, 3, 5]), abs=1e-5)


def test_upscaling_interpolates_masks() -> None:
    x = torch.randn(1, 16, 2, 3, dtype=torch.float64)
    whole = upscale_masks(x, 6, pad=0.0).unflatten(1, (6, 6))
    place = (torch.arange(6, dtype=torch.float64) + 0.5) / 3 - 1
    grid = torch.stack(torch.meshgrid(place, place, indexing="xy"), dim=-1)[None]
    wanted = grid_sample(x[..., 1, 2].view(1, 1, 4, 4), grid, align_corners=False)
    torch.testing.assert_close(whole[..., 1, 2], wanted[0])
    assert interpolation(2, 4, "nearest").tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert interpolation(2, 4)[0].tolist() == [0.75, 0]  # a quarter lies outside


def test_masks_of_several_sizes_are_drawn_together() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 8, 8]])
    masks = [torch.ones(2, 2), torch.ones(5, 5)]
    drawn = paste_masks(masks, boxes, (8, 8))
    assert drawn.sum((1, 2)).tolist() == [16, 36]
    assert drawn[1, 2:, 2:].all()


def test_half_precision_keeps_the_pad() -> None:
    x = torch.randn(1, 9, 4, 4).bfloat16()
    found = swap_align2nat(x, 2)
    assert found.dtype == torch.bfloat16
    assert found[0, 0, 0, 0] == -6


@pytest.mark.parametrize("call", [lambda x: swap_align2nat(x, 0), lambda x: align2nat(x[:, :5])])
def test_what_is_no_tensor_of_masks(call: object) -> None:
    with pytest.raises(ZooError, match=r"whole number from 1|no square masks"):
        call(torch.zeros(1, 9, 3, 3))  # type: ignore[operator]
    with pytest.raises(ZooError, match="did you mean 'nearest'"):
        interpolation(2, 4, "nearst")  # type: ignore[arg-type]
