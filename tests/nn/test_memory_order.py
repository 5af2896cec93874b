"""channels_last is only an order in memory: also where oneDNN computes strided pointwise convolutions wrongly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from zoo.nn.memory_order import to_channels_last
from zoo.nn.resnet3d import TemporalConv3d
from zoo.training import Classification, Optim, VideoClassification


class Pooled(nn.Sequential):
    """Convolutions, then the mean of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flatten(2).mean(2)


def _gradients(task: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    out = task(x)
    weights = torch.arange(1.0, out.numel() + 1).view_as(out)
    return (out, *torch.autograd.grad((out * weights).sum(), [x, *task.network.parameters()]))


@pytest.mark.parametrize("dims", [2, 3])
def test_strided_pointwise_gradients_are_those_of_the_default_layout(dims: int) -> None:
    """oneDNN issue 6035: on CPUs with AVX2 and up to 7 input channels these were wrong, or the process died."""
    torch.manual_seed(0)
    conv, task = ((nn.Conv2d, Classification), (nn.Conv3d, VideoClassification))[dims - 2]
    for channels in range(1, 18):
        for stride in (2, 3) if channels < 9 else (2,):
            network = Pooled(conv(channels, 4, 1, stride=stride, bias=False))
            x = torch.randn(4, channels, *[9] * dims)
            plain, ordered = (
                task(copy.deepcopy(network), Optim(), num_classes=4, channels_last=order) for order in (False, True)
            )
            expected = _gradients(plain, x)
            for _ in range(2):
                torch.testing.assert_close(_gradients(ordered, x), expected, rtol=1e-4, atol=1e-4)
    assert plain.network.state_dict().keys() == ordered.network.state_dict().keys()


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(nn.Conv2d(3, 4, 1, stride=(2, 1), padding=1), id="padded"),
        pytest.param(nn.Conv2d(3, 4, 1, stride=2, padding="valid"), id="valid"),
        pytest.param(TemporalConv3d(3, 4, kernel=1, stride=4), id="temporal"),
        pytest.param(nn.Conv3d(4, 4, 1, stride=(1, 2, 2), groups=2), id="grouped"),
    ],
)
def test_channels_last_changes_no_convolution(network: Any) -> None:
    dims = network.weight.ndim - 2
    order = (torch.channels_last, torch.channels_last_3d)[dims - 2]
    x = torch.randn(2, network.in_channels, *[8] * dims)
    expected = network(x)
    weights = torch.randn_like(expected)
    gradient = torch.autograd.grad((expected * weights).sum(), network.weight)[0]
    to_channels_last(network, order)
    for _ in range(3):
        found = network(x.contiguous(memory_format=order))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), network.weight)[0], gradient)
