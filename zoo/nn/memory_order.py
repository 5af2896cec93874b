"""Networks in the memory order channels_last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def to_channels_last(network: nn.Module, order: torch.memory_format = torch.channels_last) -> None:
    """Lays the weights of `network` out in `order`, `torch.channels_last` or `torch.channels_last_3d`, in place.

    Its pointwise convolutions with a stride take every so many pixels of their input first, and go without the stride:
    the same function. On CPUs oneDNN's own way of doing so gives wrong gradients or writes outside of its memory where
    input channels are few (https://github.com/uxlfoundation/oneDNN/issues/6035). Once torch brings a mended oneDNN,
    the loop goes.
    """
    network.to(memory_format=order)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and _pointwise(module) and max(module.stride) > 1:
            module.register_forward_pre_hook(_EveryFew(module.stride))
            module.stride = (1,) * len(module.stride)


def _pointwise(conv: nn.Conv2d | nn.Conv3d) -> bool:
    return set(conv.kernel_size) == {1} and (isinstance(conv.padding, str) or not any(conv.padding))


class _EveryFew:
    """A hook that hands every stride-th pixel on."""

    def __init__(self, stride: tuple[int, ...]) -> None:
        self.places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = inputs[0]
        return x[self.places], *inputs[1:]
