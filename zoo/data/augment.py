"""EDM's augmentation (Karras et al. 2022, arXiv 2206.00364, appendix F.2): a network is told how its pictures were
changed, so that what it generates is not changed too.

It takes whole batches of float pictures, on their device. Warps go by way of a picture of twice the size, up and down
by an orthogonal wavelet (StyleGAN2-ADA, Karras et al. 2020, arXiv 2006.06676, appendix B), so that where nothing moves
nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, conv_transpose2d, grid_sample, pad

from zoo.errors import ZooError, unknown

# The low-pass filter of the symlet with six vanishing moments.
_SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
_EDGE = len(_SYM6) // 4  # pixels of a picture that its neighbours reach into
# Length of each change's label; the label of a batch has them in this order.
PARTS = {"xflip": 1, "yflip": 1, "scale": 1, "rotate": 2, "aniso": 2, "translate": 2}
SCALE_STD = ANISO_STD = 0.2  # of the logarithm to base 2
TRANSLATE_STD = 0.125  # of the picture's side


def edm_draws(
    count: int, p: float, parts: Sequence[str] = tuple(PARTS), device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """What is done to `count` pictures, by part, 0 for nothing: "xflip" and "yflip" (B,) of 0 and 1, "scale" (B,)
    normal, "rotate" (B,) an angle, "aniso" (B, 2) normal and an angle, "translate" (B, 2) normal.

    Each part comes with chance `p`, but for "xflip", which always is an even draw.
    """
    draws = {}
    for part in parts:
        rows = 2 if part == "translate" else 1
        if part.endswith("flip"):
            value = torch.randint(2, (count, 1), device=device).float()
        elif part == "rotate":
            value = math.pi * (2 * torch.rand(count, 1, device=device) - 1)
        else:
            value = torch.randn(count, rows, device=device)
        if part != "xflip":
            value = value * (torch.rand(count, 1, device=device) < p)
        if part == "aniso":  # along the axes of the picture, or along others
            angle = math.pi * (2 * torch.rand(count, 1, device=device) - 1)
            value = torch.cat([value, angle * (torch.rand(count, 1, device=device) < 0.5)], dim=1)
        draws[part] = value.squeeze(1) if value.shape[1] == 1 else value
    return draws


def edm_labels(draws: Mapping[str, Tensor]) -> Tensor:
    """The labels (B, L) of what :func:`edm_draws` drew, all 0 where nothing is done."""
    columns = []
    for part in PARTS:
        if part not in draws:
            continue
        value = draws[part]
        if part == "rotate":
            columns += [value.cos() - 1, value.sin()]
        elif part == "aniso":
            columns += [value[:, 0] * value[:, 1].cos(), value[:, 0] * value[:, 1].sin()]
        else:
            columns += list(value.reshape(len(value), -1).unbind(1))
    return torch.stack(columns, dim=1)


def edm_affine(draws: Mapping[str, Tensor], side: int, count: int, device: torch.device | str) -> Tensor:
    """Where each pixel comes from: (B, 2, 3) maps places of the result, in pixels from its middle, to places of the
    picture. Scaling, then rotation, stretching and translation."""
    linear = torch.eye(2, device=device).expand(count, 2, 2)
    if "scale" in draws:
        linear = linear * torch.exp2(-SCALE_STD * draws["scale"])[:, None, None]
    if "rotate" in draws:
        linear = linear @ _rotation(draws["rotate"])
    if "aniso" in draws:
        stretch = torch.exp2(ANISO_STD * draws["aniso"][:, 0])
        along, angle = torch.diag_embed(torch.stack([1 / stretch, stretch], dim=1)), draws["aniso"][:, 1]
        linear = linear @ _rotation(-angle) @ along @ _rotation(angle)
    shift = torch.zeros(count, 2, 1, device=device)
    if "translate" in draws:
        shift = linear @ (-TRANSLATE_STD * side * draws["translate"])[:, :, None]
    return torch.cat([linear, shift], dim=2)


def _rotation(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -s], dim=1), torch.stack([s, c], dim=1)], dim=1)


def wavelet_warp(images: Tensor, affine: Tensor) -> Tensor:
    """Float pictures (B, C, S, S) warped by `affine` (B, 2, 3), as :func:`edm_affine` gives it. Beyond its border a
    picture is reflected, as far as it goes once."""
    channels, side = images.shape[1], images.shape[-1]
    # The farthest that a corner reaches beyond the border, the filters' reach included.
    half = (side - 1) / 2
    corners = images.new_tensor([[-half, half, half, -half], [-half, -half, half, half], [1, 1, 1, 1]])
    reach = math.ceil((affine @ corners).abs().max().item() - half + 2 * _EDGE)
    margin = min(max(0, reach), side - 1)
    images = pad(images, (margin,) * 4, mode="reflect")

    taps = images.new_tensor(_SYM6).expand(channels, 1, 1, -1)
    even = len(_SYM6) // 2 - 1
    images = conv_transpose2d(images, taps, stride=(1, 2), padding=(0, even), groups=channels)
    images = conv_transpose2d(images, taps.transpose(2, 3), stride=(2, 1), padding=(even, 0), groups=channels)
    # In pixels of the doubled picture, whose middle lies half a pixel aside of the old one's.
    linear, shift = affine[:, :, :2], 2 * affine[:, :, 2:]
    shift = shift + linear.sum(dim=2, keepdim=True) / 2 - 0.5
    wide, large = 2 * (side + 2 * _EDGE), images.shape[-1]
    # From the units of affine_grid, in which a picture reaches from -1 to 1, and back.
    theta = torch.cat([linear * (wide / large), shift * (2 / large)], dim=2)
    places = affine_grid(theta, [len(images), channels, wide, wide], align_corners=False)
    images = grid_sample(images, places, mode="bilinear", padding_mode="zeros", align_corners=False)

    images = conv2d(images, taps, stride=(1, 2), padding=(0, even), groups=channels)
    images = conv2d(images, taps.transpose(2, 3), stride=(2, 1), padding=(even, 0), groups=channels)
    return images[..., _EDGE:-_EDGE, _EDGE:-_EDGE]


def edm_augment(images: Tensor, draws: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Float pictures (B, C, S, S) changed as :func:`edm_draws` drew it, and the labels (B, L) that say so."""
    for part, axis in (("xflip", 3), ("yflip", 2)):
        if part in draws:
            images = torch.where(draws[part].bool()[:, None, None, None], images.flip(axis), images)
    affine = edm_affine(draws, images.shape[-1], len(images), images.device)
    moved = (affine - torch.eye(2, 3, device=affine.device)).flatten(1).any(dim=1)
    if moved.any():  # the others would come out as they are
        images = images.index_put((moved,), wavelet_warp(images[moved], affine[moved].to(images.dtype)))
    return images, edm_labels(draws)


class EDMAugment:
    """The augmentation on a batch; draws from torch's global generator, which the task seeds for each step.

    Args:
        p: chance of each change but the flip: 0.12 on CIFAR-10.
        parts: of "xflip", "yflip", "scale", "rotate", "aniso" and "translate". EDM takes all six (a label of 9
            numbers).
    """

    def __init__(self, p: float = 0.12, parts: Sequence[str] = ("xflip", "scale", "aniso", "translate")) -> None:
        if not 0 <= p <= 1:
            raise ZooError(f"the chance of an augmentation must lie in [0, 1], got {p}")
        for part in parts:
            if part not in PARTS:
                raise unknown("augmentation", part, PARTS)
        self.p, self.parts = p, [part for part in PARTS if part in parts]

    @property
    def label_dim(self) -> int:
        """The length of a label."""
        return sum(PARTS[part] for part in self.parts)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with changed `image` (B, C, S, S) and its label `augment` (B, L); the one given stays as it is."""
        image = batch["image"]
        if image.shape[-1] != image.shape[-2]:
            raise ZooError(f"EDM's augmentation takes square pictures, not {tuple(image.shape[-2:])}")
        changed, label = edm_augment(image, edm_draws(len(image), self.p, self.parts, image.device))
        return {**batch, "image": changed, "augment": label}
