"""Augmentation of small pictures a whole batch at a time: functions of their draws, on uint8 (B, C, H, W).

Each picture's result is a function of its own draws alone, bit for bit, whatever stands beside it in the batch (sums
are taken of whole numbers, so that their order does not matter), and equals that of the transforms of one picture
(:mod:`zoo.data.transforms`): a resize is torch's of bytes and a blur is Pillow's, to the last bit; colours follow
torchvision's equations on bytes, where about one value in 100,000 is a level aside after a change of hue.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from zoo.data.shapes import hash64, splitmix64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's
ORDERS = torch.tensor(list(itertools.permutations(range(4))))
"""(24, 4): the orders in which brightness, contrast, saturation and hue may be jittered."""


def uniforms(seed: int, salt: int, parts: np.ndarray, count: int) -> Tensor:
    """(B, count) float64 in [0, 1), row b a function of (seed, salt, epoch, index, repetition) alone.

    Args:
        seed: of the run.
        salt: keeps splits apart.
        parts: (B, 3) int64 index, epoch and repetition.
        count: numbers a sample takes.
    """
    keys = hash64(seed, salt, parts[:, 1], parts[:, 0], parts[:, 2], 0xBA7C4)[:, None]
    bits = splitmix64(keys + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


# -------------------------------------------------------------------------------------------------------------- places


def resized_crop_boxes(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], draws: Tensor
) -> Tensor:
    """(B, 4) int64 (top, left, height, width): :func:`~zoo.data.transforms.random_resized_crop_params` of draws
    (B, 10, 4)."""
    target, aspect = _area_and_aspect(height, width, scale, ratio, draws)
    w, h = (target * aspect).sqrt().round(), (target / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, top, left = (x.gather(1, first)[:, 0] for x in (w, h, draws[..., 2], draws[..., 3]))
    boxes = torch.stack([(top * (height - h + 1)).floor(), (left * (width - w + 1)).floor(), h, w], dim=1)
    ch, cw = height, width
    if width / height < ratio[0]:
        ch = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        cw = min(width, round(height * ratio[1]))
    centre = boxes.new_tensor([(height - ch) // 2, (width - cw) // 2, ch, cw])
    return torch.where(fits.any(1, keepdim=True), boxes, centre).long()


def one_draw_boxes(height: int, width: int, scale: Sequence[float], ratio: Sequence[float], draws: Tensor) -> Tensor:
    """(B, 4) int64 boxes: :func:`~zoo.data.transforms.one_draw_crop_params` of draws (B, 4)."""
    target, aspect = _area_and_aspect(height, width, scale, ratio, draws)
    w = (target * aspect).sqrt().round().clamp(1, width)
    h = (target / aspect).sqrt().round().clamp(1, height)
    top, left = (draws[:, 2] * (height - h + 1)).floor(), (draws[:, 3] * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], dim=1).long()


def _area_and_aspect(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], draws: Tensor
) -> tuple[Tensor, Tensor]:
    low, high = math.log(ratio[0]), math.log(ratio[1])
    target = height * width * (scale[0] + draws[..., 0] * (scale[1] - scale[0]))
    return target, (low + draws[..., 1] * (high - low)).exp()


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror those pictures left to right for which `flipped` (B,) is true, in place."""
    images[flipped] = images[flipped].flip(-1)
    return images


def pad_crop(images: Tensor, padding: int, colour: Sequence[int], top: Tensor, left: Tensor) -> Tensor:
    """Pad with a colour on all sides and cut out pictures of the old size at `top`, `left` (B,) int64."""
    count, _, height, width = images.shape
    padded = images.new_tensor(colour)[:, None, None].repeat(count, 1, height + 2 * padding, width + 2 * padding)
    padded[..., padding : padding + height, padding : padding + width] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded.numpy(), (height, width), axis=(2, 3))
    return torch.from_numpy(windows[np.arange(count), :, top.numpy(), left.numpy()])


def cut_out(images: Tensor, side: int, colour: Sequence[int], row: Tensor, column: Tensor) -> Tensor:
    """Cutout (DeVries and Taylor 2017): a square of `side` pixels around (row, column) (B,) int64 takes the colour, as
    far as it lies in the picture."""
    down, right = (torch.arange(extent) for extent in images.shape[-2:])
    top, left = (row - side // 2)[:, None], (column - side // 2)[:, None]
    inside = ((down >= top) & (down < top + side))[:, :, None] & ((right >= left) & (right < left + side))[:, None]
    return torch.where(inside[:, None], images.new_tensor(colour)[:, None, None], images)


# ------------------------------------------------------------------------------------------------------------- resizing


def _filter(x: Tensor, interpolation: str) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = ((1.5 * x) - 2.5) * x * x + 1  # Keys' cubic with a = -1/2
    far = -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def resize_weights(
    begin: Tensor, extent: Tensor, whole: int, size: int, interpolation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Of a resize along one axis: whole numbers (B, size, whole), and the power of two (B,) that they sum to.

    Pixels begin..begin + extent of `whole` become `size`, antialiased, in the fixed-point numbers of torch's resize of
    bytes: 16 bits, as many of them behind the point as the largest weight allows. They are float32 where their sums
    with bytes are exact in it, else float64.
    """
    scale = (extent.double() / size)[:, None]
    place = torch.arange(size, dtype=torch.float64)
    if interpolation == "nearest":
        first, weights, unit = (place * scale).floor(), torch.ones(len(begin), size, 1), torch.ones(len(begin))
    else:
        stretch = scale.clamp(min=1)  # of the filter where the picture shrinks
        centre, support = scale * (place + 0.5), stretch * (1 if interpolation == "bilinear" else 2)
        first = (centre - support + 0.5).trunc().clamp(min=0)
        last = torch.minimum((centre + support + 0.5).trunc(), extent[:, None])
        at = first[:, :, None] + torch.arange(int((last - first).max()))
        weights = _filter((at - centre[:, :, None] + 0.5) / stretch[:, :, None], interpolation)
        weights *= at < last[:, :, None]
        weights /= weights.sum(2, keepdim=True)
        unit = torch.exp2((((2**15 - 0.5) / weights.amax((1, 2))).log2().ceil() - 1).clamp(max=22))
        weights = weights * unit[:, None, None]
        weights = (weights + torch.where(weights < 0, -0.5, 0.5)).trunc()
    exact = torch.float32 if int(unit.max()) <= 2**15 else torch.float64
    full = torch.zeros(len(begin), size, whole + weights.shape[2], dtype=exact)
    at = (first + begin[:, None]).long()[:, :, None] + torch.arange(weights.shape[2])
    full.scatter_(2, at, weights.to(exact))
    return full[..., :whole].numpy(), unit.to(exact).numpy()


def crop_resize(images: Tensor, boxes: Tensor, size: int, interpolation: str = "bicubic") -> Tensor:
    """Cut boxes (B, 4) (top, left, height, width) out of uint8 pictures and resize each to a square; (B, C, size, size)
    uint8, as :func:`~zoo.data.transforms.crop_resize` does."""
    count, channels, height, width = images.shape
    top, left, h, w = boxes.unbind(1)
    across, unit = resize_weights(left, w, width, size, interpolation)
    rows = images.numpy().reshape(count, channels * height, width).astype(across.dtype)
    # NumPy's products keep to float32 whatever precision training asks of torch's.
    pixels = _rounded(rows @ across.transpose(0, 2, 1), unit[:, None, None]).reshape(count, channels, height, size)
    down, unit = resize_weights(top, h, height, size, interpolation)
    pixels = _rounded(down[:, None] @ pixels.astype(down.dtype, copy=False), unit[:, None, None, None])
    return torch.from_numpy(pixels.astype(np.uint8))


def _rounded(sums: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Sums of fixed-point weights times bytes as bytes, in place."""
    sums += unit / 2
    sums *= 1 / unit
    return np.clip(np.floor(sums, out=sums), 0, 255, out=sums)


# -------------------------------------------------------------------------------------------------------------- colours
# Planes (3, n, H, W) float32 of whole numbers: each step ends on bytes, as it does for one picture.


def _gray(planes: Tensor) -> Tensor:
    r, g, b = planes
    return (r * _LUMA[0]).add_(g, alpha=_LUMA[1]).add_(b, alpha=_LUMA[2]).floor_()


def _blend(planes: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (planes * factor.float()).addcmul_(other, (1 - factor).float()).clamp_(0, 255).floor_()


def _brightness(planes: Tensor, factor: Tensor) -> Tensor:
    return (planes * factor.float()).clamp_(0, 255).floor_()


def _contrast(planes: Tensor, factor: Tensor) -> Tensor:
    return _blend(planes, _gray(planes).mean((1, 2), keepdim=True), factor)


def _saturation(planes: Tensor, factor: Tensor) -> Tensor:
    return _blend(planes, _gray(planes), factor)


def _hue(planes: Tensor, shift: Tensor) -> Tensor:
    r, g, b = planes = planes / 255
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    over = chroma.clamp(min=1e-6).reciprocal_()  # of gray pixels it is multiplied by 0
    green = torch.where(high == g, (b - r).mul_(over).add_(2), (r - g).mul_(over).add_(4))
    hue = torch.where(high == r, (g - b).mul_(over), green).div_(6).add_(shift.float())  # red 0, green 1/3, blue 2/3
    hue.sub_(hue.floor()).mul_(6)
    out = torch.stack([hue - 3, hue - 2, hue - 4]).abs_()  # how far from cyan, green and blue
    out[0].sub_(1)
    out[1:].neg_().add_(2)
    return out.clamp_(0, 1).mul_(chroma).add_(low).mul_(255.999).floor_().clamp_(0, 255)


STEPS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_brightness, _contrast, _saturation, _hue)


def jitter(planes: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of planes (3, n, H, W) by `factors` (n, 4), picture by picture in
    the order (n, 4) given, of numbers 0 to 3; -1 does nothing. In place."""
    for which in order.T:
        for number, step in enumerate(STEPS):
            rows = (which == number).nonzero()[:, 0]
            if len(rows):
                some = step(planes.index_select(1, rows), factors[rows, number][:, None, None])
                planes.index_copy_(1, rows, some)
    return planes


def jitter_one(picture: Tensor, steps: Sequence[tuple[int, float]]) -> Tensor:
    """A uint8 picture (3, H, W) changed by `steps`, pairs of a number as of :func:`jitter` and its factor, in order."""
    planes = picture[:, None].to(torch.float32, memory_format=torch.contiguous_format)
    for number, factor in steps:
        planes = STEPS[number](planes, torch.tensor([[[factor]]], dtype=torch.float64))
    return planes[:, 0].to(torch.uint8)


def gray(planes: Tensor, rows: Tensor) -> Tensor:
    """Turn pictures `rows` of planes (3, n, H, W) gray, in place."""
    return planes.index_copy_(1, rows, _gray(planes.index_select(1, rows)).expand(3, -1, -1, -1))


def solarize(planes: Tensor, rows: Tensor, threshold: int = 128) -> Tensor:
    """Invert what is as bright as `threshold` in pictures `rows` of planes (3, n, H, W), in place."""
    some = planes.index_select(1, rows)
    return planes.index_copy_(1, rows, torch.where(some >= threshold, 255 - some, some))


def box_weights(sigma: Tensor) -> np.ndarray:
    """(R, n) uint32, in units of 2 ** -24: the weights of the pixels 0, 1, ... steps away in one pass of a box filter;
    three passes stand for a Gaussian of `sigma` (n,) pixels.

    The box has the radius l + a, l whole, at which three passes have the Gaussian's variance; the pixels at its ends
    count in part (Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering").
    """
    variance = sigma.float().square() / 3  # float32 where Pillow computes in it
    whole = (((12.0 * variance.double() + 1).sqrt().float() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    whole, inner = (whole + part).floor(), (2**24 / ((whole + part) * 2 + 1)).floor().double()
    edge = ((2**24 - (whole.double() * 2 + 1) * inner) / 2).floor()
    away = torch.arange(int(whole.max()) + 2)[:, None]
    weights = torch.where(away <= whole, inner, torch.where(away == whole + 1, edge, 0.0))
    return weights.numpy().astype(np.uint32)


def blur(planes: Tensor, rows: Tensor, sigma: Tensor) -> Tensor:
    """Blur pictures `rows` of planes (3, n, H, W) by Gaussians of `sigma` (n,) pixels, in place, as Pillow does: three
    box filters across and three down, each ending on bytes; beyond its ends a line goes on as it ends."""
    if not len(rows):
        return planes
    pixels = boxes_thrice(planes.index_select(1, rows).numpy(), sigma[rows])
    return planes.index_copy_(1, rows, torch.from_numpy(pixels.astype(np.float32)))


def boxes_thrice(pixels: np.ndarray, sigma: Tensor) -> np.ndarray:
    """Pixels (C, n, H, W) of whole numbers up to 255 blurred by `sigma` (n,) as :func:`blur` says, in uint32."""
    weights = box_weights(sigma)
    reach, pixels = len(weights) - 1, pixels.astype(np.uint32)
    for _ in range(2):
        lines = np.ascontiguousarray(pixels.transpose(3, 0, 1, 2))  # the axis of the filter first: long rows to add
        length = len(lines)
        each = [np.ascontiguousarray(np.broadcast_to(w[:, None], lines.shape[1:])) for w in weights]
        for _ in range(3):
            padded = np.concatenate([*[lines[:1]] * reach, lines, *[lines[-1:]] * reach])
            lines = lines * each[0]
            for away in range(1, reach + 1):
                pair = padded[reach - away :][:length] + padded[reach + away :][:length]
                lines += np.multiply(pair, each[away], out=pair)
            lines += np.uint32(1 << 23)
            lines >>= np.uint32(24)
        pixels = lines.transpose(1, 2, 0, 3)  # now down, with both sides swapped; then back
    return pixels
