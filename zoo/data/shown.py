"""What a network sees, as pictures again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pixels(data: Any, x: Tensor) -> Tensor | None:
    """Pictures or clips of a batch as uint8, in red, green and blue.

    Args:
        data: the data module that normalised them.
        x: (B, 3, H, W) or (B, 3, T, H, W).

    Returns:
        The same shape; None where `data` does not say how it normalises, or `x` has other channels.
    """
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    if mean is None or std is None or x.ndim not in (4, 5) or x.shape[1] != 3 or len(mean) != 3:
        return None
    shape = (1, 3, *[1] * (x.ndim - 2))
    mean, std = (torch.as_tensor(value, dtype=torch.float32).view(shape) for value in (mean, std))
    shown = x.detach().float().cpu() * std + mean
    if not hasattr(data, "normalise"):  # a detector's mean and deviation are of 0..255 already
        shown = shown * 255
    elif data.channels == "bgr":
        shown = shown.flip(1)
    return shown.clamp(0, 255).round().to(torch.uint8)


def strip(clip: Tensor, count: int = 3) -> Tensor:
    """Some frames of a clip (3, T, H, W) uint8 beside each other, one white pixel or more between: the first, the last,
    those between. (3, H, about count * W)."""
    frames = clip[:, torch.linspace(0, clip.shape[1] - 1, count).round().long()]
    gap = max(1, clip.shape[-1] // 64)
    frames = torch.nn.functional.pad(frames, (0, gap), value=255)
    return frames.permute(0, 2, 1, 3).reshape(clip.shape[0], clip.shape[2], -1)[..., :-gap]


def name_of(names: Sequence[str] | None, k: int) -> str:
    """The name of class `k`, or its number where it has none."""
    return str(names[k]) if names is not None and 0 <= k < len(names) else f"class {k}"
