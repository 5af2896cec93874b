"""Tensors of masks (TensorMask, arXiv 1903.12174, section 3).

A window's mask has V x U pixels, a map H x W cells; a tensor (V, U, H, W) holds a mask pixel for every cell. In the
*natural* representation entry (v, u, y, x) belongs to the window whose centre is at cell (y, x); in the *aligned* one
it is what lies at cell (y, x), said of every window that covers it. Here masks are square and flattened into channels,
c = v * V + u, as convolutions give them: (B, V * V, H, W).

Mask pixel v of V lies v - V / 2 + 1 / 2 mask pixels from its window's centre: on cells where V is odd, half way between
two where it is even. Values between cells and between mask pixels are interpolated linearly in all four axes. A corner
of such an interpolation that lies outside of the map or of the mask counts as `pad`, a logit of no object (-6).

The original is a CUDA kernel that fetches the 16 corners of each entry. They are a product of two pairs of axes, (v, y)
and (u, x), and along a pair the entries that a block of mask pixels needs are one strided view of the map. So here a
pass over the tensor for each pair does it, with nothing indexed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import avg_pool2d, pad

from zoo.errors import ZooError, unknown
from zoo.ops.boxes import at_least_float32

Interpolation = Literal["bilinear", "nearest"]
PAD = -6.0  # its sigmoid is 0.0025


def mask_side(channels: int) -> int:
    """V of V * V channels.

    Raises:
        ZooError: no square number.
    """
    side = math.isqrt(channels)
    if side * side != channels:
        raise ZooError(f"{channels} channels are no square masks")
    return side


def interpolation(side: int, size: int, mode: Interpolation = "bilinear", like: Tensor | None = None) -> Tensor:
    """Weights (size, side) by which `size` mask pixels are made of `side`: pixel v lies at (v + 1/2) side / size - 1/2.

    Weights that would fall outside are left out, so that the first and last rows may sum to less than 1.

    Raises:
        ZooError: an unknown mode.
    """
    if mode not in get_args(Interpolation):
        raise unknown("interpolation of masks", mode, get_args(Interpolation))
    place = (torch.arange(size, dtype=torch.float64) + 0.5) * (side / size) - 0.5
    known = torch.arange(side, dtype=torch.float64)
    distance = (place[:, None] - known).abs()
    if mode == "nearest":
        weights = ((place[:, None] + 0.5).floor() == known).double()
    else:
        weights = (1 - distance).clamp(min=0)
    return weights if like is None else weights.to(like.device, torch.promote_types(like.dtype, torch.float32))


# -------------------------------------------------------------------------------------------------- whole tensors


class _Sheared(torch.autograd.Function):
    """out[v, y] = x[(v + 1/2) / s - 1/2, s y + v - s V / 2 + 1/2] of two axes, for a whole number s, linear in between,
    zero outside; y in steps of s. Its gradient adds up through the same views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: int, y: int, scale: int) -> Tensor:
        ctx.shape, ctx.args = x.shape, (v, y, scale)
        front, back = _margins(x.shape, v, y, scale)
        source = pad(x, _pad_widths(x.dim(), v, y, int(scale > 1), front, back))
        if x.shape[v] * scale % 2 == 0:  # half way between two cells
            source = (source.narrow(y, 0, source.shape[y] - 1) + source.narrow(y, 1, source.shape[y] - 1)).mul_(0.5)
        shape = list(x.shape)
        shape[y] = -(-shape[y] // scale)
        shape.insert(v + 1, scale)
        out = x.new_empty(shape)
        for first, weight, lower, upper in _views(source, x.shape, v, y, scale):
            part = out.narrow(v + 1, first, lower.shape[v + 1])
            if upper is None:
                part.copy_(lower)
            else:
                torch.lerp(lower, upper, weight, out=part)
        return out.flatten(v, v + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (v, y, scale), shape = ctx.args, ctx.shape
        front, back = _margins(shape, v, y, scale)
        even, margin = shape[v] * scale % 2 == 0, int(scale > 1)
        padded = list(shape)
        padded[v] += 2 * margin
        padded[y] += front + back - int(even)
        source = grad.new_zeros(padded)
        grad = grad.unflatten(v, (shape[v], scale))
        for first, weight, lower, upper in _views(source, shape, v, y, scale):
            part = grad.narrow(v + 1, first, lower.shape[v + 1])
            if upper is None:
                lower.add_(part)
            else:
                over = part * weight
                upper.add_(over)
                lower.add_(part - over)
        source, rows = source.narrow(v, margin, shape[v]), shape[y]
        own = source.narrow(y, front, rows)
        return (own + source.narrow(y, front - 1, rows)).mul_(0.5) if even else own, None, None, None


def _margins(shape: torch.Size, v: int, y: int, scale: int) -> tuple[int, int]:
    """Rows of zeros before and after a map, so that every position lies on it; where positions lie between two rows, at
    least one."""
    side, rows, even = shape[v] * scale, -(-shape[y] // scale), shape[v] * scale % 2 == 0
    last = (rows - 1) * scale + side - 1 - side // 2
    return side // 2, max(last + 1 + 2 * even - shape[y], int(even))


def _pad_widths(dims: int, v: int, y: int, margin: int, front: int, back: int) -> list[int]:
    widths = [0] * (2 * dims)
    widths[2 * (dims - 1 - v) : 2 * (dims - v)] = margin, margin
    widths[2 * (dims - 1 - y) : 2 * (dims - y)] = front, back
    return widths


def _views(
    source: Tensor, shape: torch.Size, v: int, y: int, scale: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """For runs of the `scale` mask pixels that one of V becomes: the first of the run, weights of the upper of the two
    that it lies between, and views of the lower and the upper, with the run as axis v + 1.

    Pixel v = s a + b of a window at cell s y needs row s (a + y) + b: one stride for a, one for y and one for b.
    """
    steps = source.stride()
    rows = -(-shape[y] // scale)
    half = scale // 2
    for first, count, below in ((0, half, 1), (half, scale - half, 0)):
        if not count:
            continue
        place = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) / scale - 0.5 + below
        weight = place.to(source.device, source.dtype)[(...,) + (None,) * (source.dim() - 1 - v)]
        size, stride = list(shape), list(steps)
        size[y], stride[y] = rows, scale * steps[y]
        size.insert(v + 1, count)
        stride[v] += scale * steps[y]
        stride.insert(v + 1, steps[y])
        start = source.storage_offset() + first * steps[y] + (int(scale > 1) - below) * steps[v]
        lower = source.as_strided(size, stride, start)
        upper = None if not place.any() else source.as_strided(size, stride, start + steps[v])
        yield first, weight, lower, upper


def swap_align2nat(masks: Tensor, scale: int, pad: float = PAD) -> Tensor:
    """Aligned masks with coarse pixels on a fine map to natural masks with fine pixels on a coarse map (section 3.5):
    (B, V * V, H, W) to (B, V' * V', ceil(H / scale), ceil(W / scale)), V' = scale * V.

    Entry (v, u, y, x) is the input's at map position scale * y + v - V' / 2 + 1/2 and mask position (v + 1/2) / scale -
    1/2, and likewise for x and u.

    Raises:
        ZooError: a scale below 1, or channels that are no square.
    """
    if scale < 1 or scale != int(scale):
        raise ZooError(f"the scale of swap_align2nat is a whole number from 1 up, not {scale}")
    side = mask_side(masks.shape[1])
    x = (at_least_float32(masks) - pad).unflatten(1, (side, side)).contiguous()
    x = _Sheared.apply(_Sheared.apply(x, 1, 3, int(scale)), 2, 4, int(scale))
    return (x.flatten(1, 2) + pad).to(masks.dtype)


def align2nat(masks: Tensor, pad: float = PAD) -> Tensor:
    """The aligned representation to the natural one, where a mask pixel is as large as a cell (section 3.3):
    out(v, u, y, x) = masks(v, u, y + v - V/2 + 1/2, x + u - V/2 + 1/2), of one shape (B, V * V, H, W)."""
    return swap_align2nat(masks, 1, pad)


def nat2align(masks: Tensor, pad: float = PAD) -> Tensor:
    """The natural representation to the aligned one: out(v, u, y, x) = masks(v, u, y - v + V/2 - 1/2, ...).

    It undoes :func:`align2nat` wherever that has not left the map, for odd V.
    """
    side = mask_side(masks.shape[1])
    turned = masks.unflatten(1, (side, side)).flip(1, 2).flatten(1, 2)
    return align2nat(turned, pad).unflatten(1, (side, side)).flip(1, 2).flatten(1, 2)


def upscale_masks(masks: Tensor, size: int, pad: float = PAD, mode: Interpolation = "bilinear") -> Tensor:
    """Masks (B, V * V, H, W) with `size` pixels a side: (B, size * size, H, W)."""
    side = mask_side(masks.shape[1])
    weights = interpolation(side, size, mode, masks)
    x = (at_least_float32(masks) - pad).unflatten(1, (side, side))
    return (torch.einsum("iv,bvuhw,ju->bijhw", weights, x, weights).flatten(1, 2) + pad).to(masks.dtype)


def upscale_align2nat(masks: Tensor, size: int, pad: float = PAD, mode: Interpolation = "bilinear") -> Tensor:
    """Aligned masks with coarse pixels to natural masks of `size` pixels a side, each as large as a cell (section 3.4):
    (B, V * V, H, W) to (B, size * size, H, W)."""
    return align2nat(upscale_masks(masks, size, pad, mode), pad)


# -------------------------------------------------------------------------------------------------- chosen windows


class _Dots(torch.autograd.Function):
    """Sums over channels of the features that each window sees times weights: (B, C, H, W), (C, S, S) and the windows'
    (image, top, left) to (P, S, S), zero outside of the map. No copy of what the windows see is kept."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: Tensor, windows: list[tuple[int, int, int]]) -> Tensor:
        ctx.save_for_backward(features, weights)
        ctx.windows = windows
        out = weights.new_zeros(len(windows), *weights.shape[1:])
        for n, image, on_map, on_mask in _overlaps(windows, features.shape[-2:], weights.shape[-1]):
            seen = features[image, :, *on_map].to(weights.dtype)
            out[n, *on_mask] = (seen * weights[:, *on_mask]).sum(dim=0)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        features, weights = ctx.saved_tensors
        to_features, to_weights = torch.zeros_like(features), torch.zeros_like(weights)
        for n, image, on_map, on_mask in _overlaps(ctx.windows, features.shape[-2:], weights.shape[-1]):
            part = grad[n, *on_mask]
            to_features[image, :, *on_map] += (weights[:, *on_mask] * part).to(features.dtype)
            to_weights[:, *on_mask].addcmul_(features[image, :, *on_map].to(weights.dtype), part)
        return to_features, to_weights, None


Place = tuple[slice, slice]


def _overlaps(
    windows: list[tuple[int, int, int]], grid: torch.Size, side: int
) -> Iterator[tuple[int, int, Place, Place]]:
    """Of each window that meets the map: its number, its image, and the shared part on the map and in the window."""
    height, width = grid
    for n, (image, top, left) in enumerate(windows):
        y, x = (max(top, 0), min(top + side, height)), (max(left, 0), min(left + side, width))
        if y[0] < y[1] and x[0] < x[1]:
            yield n, image, (slice(*y), slice(*x)), (slice(y[0] - top, y[1] - top), slice(x[0] - left, x[1] - left))


def aligned_windows(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    windows: Tensor,
    size: int,
    stride: int = 1,
    pad: float = PAD,
    mode: Interpolation = "bilinear",
) -> Tensor:
    """Masks (P, size, size) of some windows: what a 1x1 convolution to aligned masks and :func:`swap_align2nat` (or
    :func:`upscale_align2nat`, at `stride` 1) give there, without the tensors of all windows.

    The swap is linear, so that the layer's weights are interpolated instead of its outputs: of every window only its
    own size x size pixels are computed.

    Args:
        features: (B, C, H, W), the input of the convolution.
        weight, bias: of the convolution, (V * V, C, 1, 1) and (V * V,).
        windows: (P, 3) int64, image, row and column of the natural masks' map.
        size: V', pixels a side of the masks.
        stride: cells of `features` for one of the natural map.
        pad, mode: as above.
    """
    side, places = mask_side(len(weight)), windows.tolist()
    even = size % 2 == 0
    if even:  # cell n of the means lies between cells n - 1 and n
        features = avg_pool2d(features, 2, 1, 1)
    first = even - size // 2
    corners = [(image, row * stride + first, column * stride + first) for image, row, column in places]
    with torch.autocast(features.device.type, enabled=False):
        rows = interpolation(side, size, mode, weight)
        shaped = at_least_float32(weight).view(side, side, -1)
        weights = torch.einsum("iv,vuc,ju->cij", rows, shaped, rows)
        biases = rows @ (at_least_float32(bias) - pad).view(side, side) @ rows.T
        inside = [
            _inside(windows[:, k] * stride + first, size, length - even, even, biases)
            for k, length in ((1, features.shape[-2]), (2, features.shape[-1]))
        ]
        dots = _Dots.apply(features, weights, corners)
        return dots + biases * (inside[0][:, :, None] * inside[1][:, None, :]) + pad


def _inside(first: Tensor, size: int, length: int, even: bool, like: Tensor) -> Tensor:
    """How much of each of `size` places from `first` (P,) on lies on `length` cells, (P, size): those between two cells
    may do so by half."""
    place = first[:, None] + torch.arange(size, device=first.device)
    on = ((place >= 0) & (place < length)).to(like.device, like.dtype)
    return (on + ((place > 0) & (place <= length)).to(on)) / 2 if even else on
