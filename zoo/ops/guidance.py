"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor, channels: int | None = None) -> Tensor:
    """unconditional + scale * (conditional - unconditional): a scale of 1 is no guidance.

    Args:
        conditional, unconditional: outputs (B, C, ...) of the network with a label and without.
        scale: a number, or a tensor that multiplies them.
        channels: guide these first channels only; the others are the conditional ones. Official DiT and SiT sample
            with 3 (of four latent channels).
    """
    if channels is None:
        return unconditional + scale * (conditional - unconditional)
    first = guide(conditional[:, :channels], unconditional[:, :channels], scale)
    return torch.cat([first, conditional[:, channels:]], dim=1)


def guided(
    network: Callable[..., Tensor], scale: float, null_label: int, channels: int | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`network` (x, t, labels) under guidance: both passes in one batch, the null label being `null_label`."""

    def call(x: Tensor, t: Any, labels: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, null_label)])
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(conditional, unconditional, scale, channels)

    return call


def scale_within(
    t: Tensor, scale: float | Tensor, low: float | Tensor, high: float | Tensor, otherwise: float = 1.0
) -> Tensor:
    """`scale` at times (B,) in [low, high], `otherwise` elsewhere (guidance interval, arXiv 2404.07724)."""
    inside = (t >= low) & (t <= high)
    return torch.where(inside, scale, otherwise).to(t.dtype)


def drop_labels(labels: Tensor, drop: Tensor, null_label: int) -> Tensor:
    """Labels (B,) with `null_label` where `drop` (B,) is true, by which a network learns the unconditional output."""
    return torch.where(drop, null_label, labels)
