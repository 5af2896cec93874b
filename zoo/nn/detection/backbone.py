"""Backbones of detectors: ResNet's stages by name, and the feature pyramid on top of them.

A backbone maps images (B, C, H, W) to a dict of feature maps and says of each its `channels` and its `strides`. Maps of
a ResNet are called c2 to c5 after the stage they come from (stride 4 to 32), those of a pyramid p2, p3, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, max_pool2d, relu_
from torchvision.models import resnet
from torchvision.ops import Conv2dNormActivation, DeformConv2d, FrozenBatchNorm2d

from zoo.errors import ZooError, unknown

Norm = Literal["frozen_bn", "bn", "gn", "ln"]
DEPTHS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def norm_layer(name: str | None) -> Callable[[int], nn.Module] | None:
    """The normalisation called `name`; None for none.

    `frozen_bn` has fixed statistics and scales, `bn` becomes SyncBN by `trainer.sync_batchnorm`, `gn` has 32 groups,
    `ln` normalises over the channels of each place (eps 1e-6).

    Raises:
        ZooError: an unknown name.
    """
    known: dict[str, Any] = {
        "frozen_bn": FrozenBatchNorm2d,
        "bn": nn.BatchNorm2d,
        "gn": partial(nn.GroupNorm, 32),
        "ln": LayerNorm2d,
    }
    if name is not None and name not in known:
        raise unknown("norm", name, known)
    return None if name is None else known[name]


def he_normal(module: nn.Module) -> None:
    """Initialises a convolution from He-normal weights (fan out), and its bias from 0."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    if module.bias is not None:
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def lecun_uniform(module: nn.Module) -> None:
    """Initialises a layer as Caffe2's XavierFill: uniform of variance 1 / fan in, and its bias from 0."""
    nn.init.kaiming_uniform_(module.weight, a=1)  # type: ignore[arg-type]
    if module.bias is not None:
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)); frozen BatchNorm goes into the convolution's weights, which saves two passes over its output."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    return conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def _shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    if downsample is None:
        return x
    conv, norm = downsample.children()
    return conv_norm(conv, norm, x)  # type: ignore[arg-type]


class BasicBlock(resnet.BasicBlock):
    """torchvision's block of two 3x3 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        out = relu_(conv_norm(self.conv1, self.bn1, x))
        out = conv_norm(self.conv2, self.bn2, out)
        return relu_(out.add_(_shortcut(self.downsample, x)))


class Bottleneck(resnet.Bottleneck):
    """torchvision's bottleneck; its stride is in the 3x3 convolution, or in the first 1x1 with `stride_in_1x1`.

    With `deform` the 3x3 convolution is deformable (Dai et al., ICCV 2017): its samples move by offsets that another
    convolution, of zeros at first, makes of its input.
    """

    def __init__(self, *args: Any, stride_in_1x1: bool = False, deform: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        first: Any = self.conv1
        middle: Any = self.get_submodule("conv2")
        if stride_in_1x1:
            first.stride, middle.stride = middle.stride, first.stride
        if deform:
            place = {"stride": middle.stride, "padding": middle.padding, "dilation": middle.dilation}
            self.conv2_offset = nn.Conv2d(middle.in_channels, 18, 3, **place)
            own: Any = DeformConv2d(
                middle.in_channels, middle.out_channels, 3, groups=middle.groups, bias=False, **place
            )
            self.conv2 = own  # in its place

    def forward(self, x: Tensor) -> Tensor:
        out = relu_(conv_norm(self.conv1, self.bn1, x))
        middle: Any = self.get_submodule("conv2")
        if isinstance(middle, DeformConv2d):
            out = relu_(self.bn2(middle(out, self.conv2_offset(out))))
        else:
            out = relu_(conv_norm(middle, self.bn2, out))
        out = conv_norm(self.conv3, self.bn3, out)
        return relu_(out.add_(_shortcut(self.downsample, x)))


@dataclass(frozen=True)
class ResNetConfig:
    """A ResNet or ResNeXt as detectors take it.

    Args:
        depth: a key of DEPTHS.
        norm: see :func:`norm_layer`; frozen stages of a `bn` network have `frozen_bn`.
        stem_channels: outputs of the 7x7 convolution.
        channels: outputs of the second stage (c2); they double from stage to stage.
        groups, width_per_group: of the 3x3 convolutions of c2; 32 and 8 for X-101-32x8d.
        stride_in_1x1: as in MSRA's (Caffe's) networks; else version 1.5.
        dilation: of c5, which has stride 1 if it is 2 (DC5).
        freeze: how many stages do not train, the stem being the first.
        deform: of the stages c2 to c5, whether their 3x3 convolutions are deformable; of bottlenecks only.
    """

    depth: int = 50
    norm: Norm = "frozen_bn"
    stem_channels: int = 64
    channels: int = 256
    groups: int = 1
    width_per_group: int = 64
    stride_in_1x1: bool = True
    dilation: int = 1
    freeze: int = 2
    deform: tuple[bool, bool, bool, bool] = (False, False, False, False)

    def __post_init__(self) -> None:
        if self.depth not in DEPTHS:
            raise unknown("ResNet depth", str(self.depth), map(str, DEPTHS))
        if self.norm not in get_args(Norm):
            raise unknown("norm", str(self.norm), get_args(Norm))
        if self.dilation not in (1, 2) or not 0 <= self.freeze <= 5:
            raise ZooError(f"resnet wants dilation 1 or 2 and freeze 0 to 5, not {self.dilation} and {self.freeze}")
        if len(self.deform) != 4 or (any(self.deform) and self.depth < 50):
            raise ZooError("resnet.deform is of four stages, and of the bottlenecks of depth 50 and more")


def resnet_stage(config: ResNetConfig, stage: int, blocks: int | None = None) -> nn.Sequential:
    """Stage 2 to 5 of a ResNet; `blocks` of them instead of the depth's own number."""
    frozen = stage <= config.freeze
    norm = norm_layer("frozen_bn" if frozen and config.norm == "bn" else config.norm)
    dilation = config.dilation if stage == 5 else 1
    stride = 1 if stage == 2 or dilation > 1 else 2
    outputs = config.channels * 2 ** (stage - 2)
    inputs = config.stem_channels if stage == 2 else outputs // 2
    layers: list[nn.Module] = []
    for _ in range(blocks or DEPTHS[config.depth][stage - 2]):
        shortcut = None
        if inputs != outputs:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))  # type: ignore[misc]
        if config.depth < 50:
            layers.append(BasicBlock(inputs, outputs, stride, shortcut, norm_layer=norm))
        else:
            planes = outputs // Bottleneck.expansion
            width = config.width_per_group * 2 ** (stage - 2)
            layers.append(
                Bottleneck(
                    inputs,
                    planes,
                    stride,
                    shortcut,
                    groups=config.groups,
                    base_width=64 * (width + 0.5) / planes,  # torchvision rounds planes * base_width / 64 down
                    dilation=dilation,
                    norm_layer=norm,
                    stride_in_1x1=config.stride_in_1x1,
                    deform=config.deform[stage - 2],
                )
            )
        inputs, stride = outputs, 1
    sequence = nn.Sequential(*layers)
    for module in sequence.modules():
        if isinstance(module, nn.Conv2d | DeformConv2d):
            he_normal(module)
    for block in sequence:
        if isinstance(offset := getattr(block, "conv2_offset", None), nn.Conv2d):
            nn.init.zeros_(offset.weight)
    return sequence.requires_grad_(not frozen)


class ResNetBackbone(nn.Module):
    """The stages of a ResNet up to the last of the `outputs`, with torchvision's parameter names (conv1, layer1, ...).

    Args:
        config: the network.
        outputs: names of the maps to give, of c2 to c5.
        in_chans: channels of the image.
    """

    def __init__(self, config: ResNetConfig, outputs: Sequence[str] = ("c5",), in_chans: int = 3) -> None:
        super().__init__()
        known = [f"c{stage}" for stage in range(2, 6)]
        for name in outputs:
            if name not in known:
                raise unknown("ResNet map", name, known)
        self.outputs = tuple(outputs)
        frozen = config.freeze >= 1
        self.conv1 = nn.Conv2d(in_chans, config.stem_channels, 7, 2, 3, bias=False).requires_grad_(not frozen)
        he_normal(self.conv1)
        self.bn1 = norm_layer("frozen_bn" if frozen and config.norm == "bn" else config.norm)(config.stem_channels)  # type: ignore[misc]
        self.bn1.requires_grad_(not frozen)
        stages = range(2, max(int(name[1:]) for name in outputs) + 1)
        for stage in stages:
            self.add_module(f"layer{stage - 1}", resnet_stage(config, stage))
        self.channels = {f"c{stage}": config.channels * 2 ** (stage - 2) for stage in stages}
        strides = {f"c{stage}": 2**stage for stage in stages}
        self.strides = {**strides, **({"c5": 16} if config.dilation > 1 and 5 in stages else {})}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = max_pool2d(relu_(conv_norm(self.conv1, self.bn1, images)), 3, 2, 1)
        maps = {}
        for name in self.channels:
            x = self.get_submodule(f"layer{int(name[1:]) - 1}")(x)
            if name in self.outputs:
                maps[name] = x
        return maps


class Subsample(nn.Module):
    """p6 of R-CNNs: every other cell of the last level (FPN, section 4.1)."""

    levels = 1

    def forward(self, last: Tensor, maps: Mapping[str, Tensor]) -> list[Tensor]:
        return [max_pool2d(last, kernel_size=1, stride=2)]


class ConvTop(nn.Module):
    """p6 and p7 of single-stage detectors: 3x3 convolutions of stride 2, p6 of `source`, p7 of ReLU(p6) (RetinaNet,
    section 4).

    Args:
        channels: of both.
        in_channels: of the source.
        source: a map of the trunk (c5), or null for the pyramid's last level (p5).
    """

    levels = 2

    def __init__(self, channels: int, in_channels: int, source: str | None = "c5") -> None:
        super().__init__()
        self.source = source
        self.p6 = nn.Conv2d(in_channels, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)
        lecun_uniform(self.p6)
        lecun_uniform(self.p7)

    def forward(self, last: Tensor, maps: Mapping[str, Tensor]) -> list[Tensor]:
        p6 = self.p6(last if self.source is None else maps[self.source])
        return [p6, self.p7(p6.relu())]


@dataclass(frozen=True)
class FPNConfig:
    """A feature pyramid.

    Args:
        inputs: the maps of the backbone that get a level, from fine to coarse.
        channels: of every level.
        norm: after each of its convolutions; null for none, and biases instead.
        fuse: how a level and the one above it are joined.
    """

    inputs: tuple[str, ...] = ("c2", "c3", "c4", "c5")
    channels: int = 256
    norm: Norm | None = None
    fuse: Literal["sum", "avg"] = "sum"


class FPN(nn.Module):
    """Feature Pyramid Network (Lin et al., CVPR 2017) on top of another backbone.

    torchvision's has neither the average of TensorMask nor levels by name, whence this one.

    Args:
        bottom_up: the backbone below.
        config: the pyramid.
        top: makes the levels above the last: gets it and the maps of `bottom_up`, gives `top.levels` maps.

    Raises:
        ZooError: an unknown way to join levels.
    """

    def __init__(self, bottom_up: nn.Module, config: FPNConfig, top: nn.Module | None = None) -> None:
        super().__init__()
        self.bottom_up, self.top = bottom_up, top
        if config.fuse not in ("sum", "avg"):
            raise unknown("fuse", config.fuse, ("sum", "avg"))
        self.fuse, self.inputs = config.fuse, config.inputs
        below: Any = bottom_up
        norm = norm_layer(config.norm)

        def layer(inputs: int, kernel: int) -> nn.Module:
            made = Conv2dNormActivation(inputs, config.channels, kernel, norm_layer=norm, activation_layer=None)
            lecun_uniform(made[0])
            return made

        self.lateral = nn.ModuleDict({name: layer(below.channels[name], 1) for name in config.inputs})
        self.output = nn.ModuleDict({f"p{name[1:]}": layer(config.channels, 3) for name in config.inputs})
        self.strides = {f"p{name[1:]}": below.strides[name] for name in config.inputs}
        for _ in range(getattr(top, "levels", 0)):
            last = int(list(self.strides)[-1][1:])
            self.strides[f"p{last + 1}"] = self.strides[f"p{last}"] * 2
        self.channels = dict.fromkeys(self.strides, config.channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.bottom_up(images)
        levels: dict[str, Tensor] = {}
        above: Tensor | None = None
        for name in reversed(self.inputs):
            x = self.lateral[name](maps[name])
            if above is not None:
                x = x + interpolate(above, size=x.shape[-2:], mode="nearest")
                x = x / 2 if self.fuse == "avg" else x
            above = x
            levels[f"p{name[1:]}"] = self.output[f"p{name[1:]}"](x)
        ordered = dict(reversed(levels.items()))
        if self.top is not None:
            names = list(self.strides)[len(ordered) :]
            ordered.update(zip(names, self.top(ordered[f"p{self.inputs[-1][1:]}"], maps), strict=True))
        return ordered
