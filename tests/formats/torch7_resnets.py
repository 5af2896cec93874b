"""Torch7 networks as preresnet.lua and resnet-pre-act.lua nest them, and what Torch7 computes from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.formats.test_torch7 import module
from zoo.formats.torch7 import Torch7Object


def official_tree(layout: str, n: int, kind: str, widths: tuple[int, ...], classes: int) -> Torch7Object:
    """A Torch7 network with random weights, nested as the official files nest theirs."""

    def conv(a: int, b: int, k: int, stride: int = 1) -> Torch7Object:
        return module("cudnn.SpatialConvolution", weight=torch.randn(b, a, k, k) / math.sqrt(a * k * k), stride=stride)

    def norm(a: int) -> Torch7Object:
        facts = {"weight": torch.rand(a) + 0.5, "bias": torch.randn(a) / 10}
        facts |= {"running_mean": torch.randn(a) / 10, "running_var": torch.rand(a) + 0.5}
        return module("nn.SpatialBatchNormalization", **facts)

    def plain(name: str) -> Torch7Object:
        return module(f"nn.{name}")

    bottleneck = layout == "resnet-pre-act"
    imagenet = layout == "imagenet"
    kernels = (1, 3, 1) if bottleneck else (3, 3)

    def unit(a: int, width: int, stride: int, place: str) -> Torch7Object:
        outs = (width, width, 4 * width) if bottleneck else (width, width)
        shared = a != outs[-1] if bottleneck else place == "first" and not (imagenet and width == widths[0])
        bare = imagenet and width == widths[0] and place == "first"
        activation = [] if bare else [norm(a), plain("ReLU")]
        branch, channels = [], a
        for i, (out, kernel) in enumerate(zip(outs, kernels, strict=True)):
            branch += [norm(channels), plain("ReLU")] if i else []
            branch.append(conv(channels, out, kernel, stride if i == 0 else 1))
            channels = out
        if kind == "C" or (kind == "B" and a != channels):
            shortcut = module("nn.Sequential", conv(a, channels, 1, stride))
        elif a != channels:
            parts = module("nn.Concat", plain("Identity"), plain("MulConstant"))
            shortcut = module("nn.Sequential", module("nn.SpatialAveragePooling", stride=stride), parts)
        else:
            shortcut = plain("Identity")
        lead, inner = (activation, branch) if shared else ([], activation + branch)
        table = module("nn.ConcatTable", module("nn.Sequential", *inner), shortcut)
        return module("nn.Sequential", *lead, table, plain("CAddTable"))

    stem = [conv(3, widths[0], 7, 2), norm(widths[0]), plain("ReLU"), plain("SpatialMaxPooling")]
    parts = stem if imagenet else stem[:1]
    parts[0] = conv(3, widths[0], 7 if imagenet else 3, 2 if imagenet else 1)
    a = widths[0]
    for s, width in enumerate(widths):
        units = []
        for u in range(n):
            units.append(unit(a, width, 2 if s and not u else 1, "first" if not u else "other"))
            a = width * (4 if bottleneck else 1)
        parts.append(module("nn.Sequential", *units))
    head = module("nn.Linear", weight=torch.randn(classes, a) / math.sqrt(a), bias=torch.randn(classes))
    return module("nn.Sequential", *parts, norm(a), plain("ReLU"), plain("SpatialAveragePooling"), plain("View"), head)


def run_tree(node: Torch7Object, x: Tensor, imagenet: bool = False) -> Tensor:
    """What Torch7 computes from a tree in evaluation."""
    name, fields = node.kind.partition(".")[2], node.fields
    parts = [fields["modules"][float(i)] for i in range(1, len(fields["modules"]) + 1)] if "modules" in fields else []
    if name == "Sequential":
        for part in parts:
            x = run_tree(part, x)
        return x
    if name == "ConcatTable":
        return [run_tree(part, x) for part in parts]  # type: ignore[return-value]
    functional = nn.functional
    return {
        "Concat": lambda: torch.cat([run_tree(part, x) for part in parts], dim=1),
        "CAddTable": lambda: sum(x),
        "SpatialConvolution": lambda: functional.conv2d(
            x, fields["weight"], stride=fields["stride"], padding=fields["weight"].shape[-1] // 2
        ),
        "SpatialBatchNormalization": lambda: functional.batch_norm(
            x, fields["running_mean"], fields["running_var"], fields["weight"], fields["bias"]
        ),
        "ReLU": lambda: torch.relu(x),
        "Identity": lambda: x,
        "MulConstant": lambda: 0 * x,
        "SpatialMaxPooling": lambda: functional.max_pool2d(x, 3, 2, 1),
        "SpatialAveragePooling": lambda: (
            functional.avg_pool2d(x, 1, fields["stride"]) if "stride" in fields else x.mean((2, 3), keepdim=True)
        ),
        "View": lambda: x.flatten(1),
        "Linear": lambda: functional.linear(x, fields["weight"], fields["bias"]),
    }[name]()
