"""Residual networks (He et al. 2016) as timm builds them, initialised as torchvision's, and their names elsewhere.

Parameter names are torchvision's: conv1, bn1, layer1.0.conv1, ..., layer2.0.downsample.0, ..., fc. The stride of a
bottleneck is in its 3x3 convolution (version 1.5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from zoo.errors import ZooError, unknown
from zoo.nn.batchnorm import SplitBatchNorm

RESNETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def resnet(
    arch: str = "resnet50",
    num_classes: int = 1000,
    layers: Sequence[int] | None = None,
    width: int = 64,
    small_images: bool = False,
    bn_splits: int = 1,
    in_chans: int = 3,
    zero_init_last: bool = False,
) -> ResNet:
    """A ResNet with timm's protocol (forward_features, forward_head, reset_classifier).

    Convolutions start from He-normal weights (fan out), as in torchvision.

    Args:
        arch: a name in RESNETS: the kind of block, and how many of them in each stage.
        num_classes: outputs of `fc`; 0 for pooled features.
        layers: blocks of each stage, instead of those of `arch`.
        width: channels of the first stage's 3x3 convolutions; they double from stage to stage. The stem keeps 64.
        small_images: a 3x3 stem of stride 1 without max-pooling, for images of 32 pixels.
        bn_splits: more than 1 for :class:`SplitBatchNorm` throughout.
        in_chans: channels of the image.
        zero_init_last: the scale of the last BatchNorm of a block starts from 0 and not from 1, so that blocks are the
            identity (Goyal et al. 2017, arXiv 1706.02677, section 5.1).

    Raises:
        ZooError: an unknown name, or a number that makes no network.
    """
    if arch not in RESNETS:
        raise unknown("architecture", arch, RESNETS)
    block, depths = RESNETS[arch]
    depths = depths if layers is None else tuple(layers)
    if len(depths) != 4 or min(*depths, width, bn_splits) < 1 or num_classes < 0:
        raise ZooError(
            f"a ResNet wants four stages of at least one block, width and bn_splits of 1 or more; got layers"
            f" {list(depths)}, width {width}, bn_splits {bn_splits}, num_classes {num_classes}"
        )
    network = ResNet(
        block,  # type: ignore[arg-type]
        depths,
        num_classes=num_classes,
        in_chans=in_chans,
        channels=tuple(width * 2**stage for stage in range(4)),
        norm_layer=partial(SplitBatchNorm, num_splits=bn_splits) if bn_splits > 1 else nn.BatchNorm2d,
        zero_init_last=zero_init_last,
    )
    if small_images:
        network.set_submodule("conv1", nn.Conv2d(in_chans, 64, kernel_size=3, padding=1, bias=False))
        network.set_submodule("maxpool", nn.Identity())
    return network


def torchvision_trunk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a trunk, without `fc`: the names of torchvision's and timm's ResNet, and so those of the `body`
    of torchvision's detection backbones."""
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def detectron2_trunk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a trunk, without `fc`, under the names of detectron2's ResNet.

    The stem gets `stem.`, layerN becomes res(N + 1), bnN the `norm` of convN, the downsampling `shortcut` with its
    `norm`. Use with RGB input and STRIDE_IN_1X1 False.
    """
    renamed = {}
    for key, value in torchvision_trunk(state).items():
        name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
        name = name if name.startswith("res") else f"stem.{name}"
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[re.sub(r"\bbn(\d)", r"conv\1.norm", name)] = value
    return renamed
