"""Identity Mappings in Deep Residual Networks.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun. ECCV 2016, arXiv 1603.05027.

A residual unit computes y = h(x) + F(x), x' = f(y). Where both the shortcut h and what follows the addition, f, are the
identity, the signal and its gradient pass between any two units unchanged plus a sum: x_L = x_l + sum of F(x_i). The
paper shows by ablation that scaling, gating, a 1x1 convolution or dropout on the shortcut hurt, and makes f the
identity by moving batch normalisation and ReLU in front of each convolution ("full pre-activation"), which trains
1001-layer networks on CIFAR and a 200-layer one on ImageNet.

Conventions: images (B, C, H, W) normalised by the data set's mean and standard deviation; a unit has L convolutions
(2 basic, 3 bottleneck), and `bn1` is the first batch normalisation met in it, `conv1` the first convolution.

Deviations from the official Torch7 code, none of which changes a value:
- Global average pooling instead of a window of 8x8 or 7x7, the same at the training size; other sizes are taken too.
- Zero channels of shortcut type A are padded, not computed as 0 * x.
"""

# Annotations are not postponed here: torch.fx writes them into traced code, where TorchScript must be able to read
# them.
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, relu

from zoo.errors import ZooError, unknown
from zoo.nn.protocol import StagedClassifier
from zoo.training import Classification, Optim

__all__ = [
    "PreActResNet",
    "PreActResNetClassification",
    "ResidualUnit",
    "convert_official",
    "preact_resnet18",
    "preact_resnet20_cifar",
    "preact_resnet32_cifar",
    "preact_resnet34",
    "preact_resnet44_cifar",
    "preact_resnet50",
    "preact_resnet56_cifar",
    "preact_resnet101",
    "preact_resnet110_cifar",
    "preact_resnet152",
    "preact_resnet164_cifar",
    "preact_resnet200",
    "preact_resnet1001_cifar",
    "preact_resnet1202_cifar",
    "preact_resnet_cifar",
    "preact_resnet_imagenet",
    "shortcut_and_branch",
    "units_per_stage",
]

# ------------------------------------------------------------------------------------------------------- 1. equations


class Order(NamedTuple):
    """Where a unit's activations stand: before its first convolution, after its last, and after the addition.

    Between two convolutions there is BN-ReLU in all of them (Fig. 4).
    """

    before: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


UNITS = {
    "original": Order(end=("bn",), after=("relu",)),
    "bn_after_add": Order(after=("bn", "relu")),
    "relu_before_add": Order(end=("bn", "relu")),
    "relu_only_preact": Order(before=("relu",), end=("bn",)),
    "full_preact": Order(before=("bn", "relu")),
}
Unit = Literal["original", "bn_after_add", "relu_before_add", "relu_only_preact", "full_preact"]
Shortcut = Literal["identity", "constant_scaling", "exclusive_gating", "shortcut_only_gating", "conv1x1", "dropout"]
SHORTCUTS = get_args(Shortcut)  # Fig. 2


def shortcut_and_branch(
    x: Tensor, f: Tensor, kind: str, gate: Tensor | None = None, scale_x: float = 1.0, scale_f: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What is added up in a unit (section 3.1, Fig. 2), from the shortcut's input x and the branch F(x), equal shapes.

    Args:
        kind: "constant_scaling": scale_x * x and scale_f * F. "exclusive_gating": (1 - g) * x and g * F with
            g = sigmoid(gate). "shortcut_only_gating": (1 - g) * x and F. Else x and F as they are.
        gate: the logit of g, of the shape of x.
    """
    if kind == "constant_scaling":
        return scale_x * x, scale_f * f
    if kind in ("exclusive_gating", "shortcut_only_gating"):
        assert gate is not None, "a gated shortcut wants the logit of its gate"
        kept = (-gate).sigmoid() * x
        return kept, gate.sigmoid() * f if kind == "exclusive_gating" else f
    return x, f


def units_per_stage(depth: int, block: str = "basic") -> int:
    """n of a CIFAR network of three stages: depth 6n + 2 with basic units, 9n + 2 with bottlenecks.

    Raises:
        ZooError: a depth that is none of these.
    """
    layers = {"basic": 6, "bottleneck": 9}
    if block not in layers:
        raise unknown("block", block, layers)
    n, rest = divmod(depth - 2, layers[block])
    if rest or n < 1:
        near = max(1, round((depth - 2) / layers[block])) * layers[block] + 2
        raise ZooError(f"depth {depth} of a {block} CIFAR network must be {layers[block]}n + 2; the nearest is {near}")
    return n


# --------------------------------------------------------------------------------------------------------- 2. network


def _conv(in_chans: int, out_chans: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, bias=bias)


class ResidualUnit(nn.Module):
    """One unit of Fig. 4 with a shortcut of Fig. 2.

    Args:
        in_chans: channels of x.
        widths: output channels of its two or three convolutions; the last is the unit's.
        kernels: their kernel sizes.
        strides: their strides (default 1).
        unit: order of the activations, a key of `UNITS`.
        shortcut: what happens on the shortcut.
        shortcut_type: where the shape changes: "A" subsamples and pads zero channels, "B" is a 1x1 convolution; "C" is
            a 1x1 convolution in any unit, and the same as `shortcut` "conv1x1".
        preact: "own": the shortcut takes x itself; "shared": it takes x behind the unit's first activation, too;
            "none": that activation is left out (it stands in the stem).
        scale_x, scale_f: of constant scaling.
        gate_bias: initial bias of the gate, b_g.
        dropout: rate on the shortcut under `shortcut` "dropout".
    """

    if TYPE_CHECKING:
        conv1: nn.Module
        conv2: nn.Module
        conv3: nn.Module
        bn1: nn.Module
        bn2: nn.Module
        bn3: nn.Module

    # Branches on these are decided when the unit is scripted.
    __constants__ = (
        "after_bn",
        "after_relu",
        "before_bn",
        "before_relu",
        "deep",
        "drops",
        "end_bn",
        "leads",
        "overwrites",
    )

    def __init__(
        self,
        in_chans: int,
        widths: Sequence[int],
        kernels: Sequence[int] = (3, 3),
        strides: Sequence[int] | None = None,
        unit: str = "full_preact",
        shortcut: str = "identity",
        shortcut_type: str = "B",
        preact: Literal["own", "shared", "none"] = "own",
        scale_x: float = 1.0,
        scale_f: float = 1.0,
        gate_bias: float = 0.0,
        dropout: float = 0.5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        for what, name, known in (
            ("unit", unit, UNITS),
            ("shortcut", shortcut, SHORTCUTS),
            ("shortcut_type", shortcut_type, "ABC"),
        ):
            if name not in known:
                raise unknown(what, name, known)
        if len(widths) not in (2, 3):
            raise ZooError(f"a unit has two or three convolutions, not {len(widths)}")
        strides = strides or (1,) * len(widths)
        self.shortcut, self.drops = shortcut, shortcut == "dropout"
        self.scale_x, self.scale_f, self.gate_bias, self.dropout = scale_x, scale_f, gate_bias, dropout
        self.out_chans, self.stride, self.deep = widths[-1], math.prod(strides), len(widths) == 3
        self.order = order = UNITS[unit]
        self.leads = "bn" in order.before
        self.before_bn, self.before_relu = (step in order.before and preact != "none" for step in ("bn", "relu"))
        self.shared = preact == "shared"
        self.end_bn, self.after_bn, self.after_relu = "bn" in order.end, "bn" in order.after, "relu" in order.after
        # A ReLU keeps its output for the backward pass; what a convolution or a normalisation gives may be overwritten.
        self.overwrites = "relu" not in order.end

        norms = [in_chans if self.before_bn else 0, *widths[:-1]] if self.leads else list(widths)
        for i, width in enumerate(norms, 1):
            if width:
                setattr(self, f"bn{i}", nn.BatchNorm2d(width))
        channels = in_chans
        for i, (width, kernel, stride) in enumerate(zip(widths, kernels, strides, strict=True), 1):
            setattr(self, f"conv{i}", _conv(channels, width, kernel, stride))
            channels = width

        changes = in_chans != self.out_chans or self.stride != 1
        convolves = shortcut == "conv1x1" or shortcut_type == "C" or (shortcut_type == "B" and changes)
        self.shortcut_conv = _conv(in_chans, self.out_chans, 1, self.stride) if convolves else None
        self.missing = self.out_chans - in_chans
        if not convolves and self.missing < 0:
            raise ZooError(f"shortcut type A pads channels: it cannot lead from {in_chans} to {self.out_chans}")
        gated = shortcut.endswith("gating")
        self.gate = _conv(in_chans, self.out_chans, 1, self.stride, bias=True) if gated else None
        self.drop_path = DropPath(drop_path) if drop_path else None

    def _shaped(self, x: Tensor) -> Tensor:
        """The shortcut's input in the shape of the unit's output."""
        if self.shortcut_conv is not None:
            return self.shortcut_conv(x)
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return pad(x, [0, 0, 0, 0, 0, self.missing]) if self.missing else x

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, in_chans, H, W) to (B, out_chans, H / stride, W / stride)."""
        f = x
        if self.before_bn:
            f = relu(self.bn1(x), inplace=True)
        elif self.before_relu:
            f = relu(x)
        if self.shared:
            x = f
        f = self.conv1(f)
        if self.leads:
            f = self.conv2(relu(self.bn2(f), inplace=True))
            if self.deep:
                f = self.conv3(relu(self.bn3(f), inplace=True))
        else:
            f = self.conv2(relu(self.bn1(f), inplace=True))
            if self.deep:
                f = self.conv3(relu(self.bn2(f), inplace=True))
        if self.end_bn:
            f = self._last_norm(f)
        if not self.overwrites:
            f = relu(f, inplace=True)

        kept = self._shaped(x)
        if self.drops:
            kept = dropout(kept, self.dropout, self.training)
        gate = self.gate(x) if self.gate is not None else None
        if self.drop_path is not None:
            f = self.drop_path(f)
        kept, f = shortcut_and_branch(kept, f, self.shortcut, gate, self.scale_x, self.scale_f)
        y = f.add_(kept) if self.overwrites else f + kept
        if self.after_bn:
            y = self._last_norm(y)
        return relu(y, inplace=True) if self.after_relu else y

    def _last_norm(self, x: Tensor) -> Tensor:
        if self.deep:
            return self.bn3(x)
        return self.bn2(x)


class PreActResNet(StagedClassifier):
    """A residual network of any of the paper's units for CIFAR (three stages) or ImageNet (four); timm's protocol.

    Args:
        depths: units of each stage; stages after the first halve the resolution.
        widths: inner width of the units of each stage; a bottleneck puts out four times as much.
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1).
        unit, shortcut, shortcut_type, scale_x, scale_f, gate_bias, dropout: as of :class:`ResidualUnit`, in all units.
        stride_in: the convolution of a bottleneck that strides: "3x3" (preresnet.lua) or "1x1" (resnet-pre-act.lua).
        stem: "cifar": one 3x3 convolution; "imagenet": 7x7 with stride 2, BN, ReLU, 3x3 maximum with stride 2.
        stem_width: output channels of the stem; by default those of the first stage's width.
        num_classes: 0 for no classifier (logits are the pooled features).
        global_pool: "avg", or "" for none (then without a classifier).
        drop_rate: dropout of the features before the classifier.
        drop_path_rate: stochastic depth of the last unit; it rises linearly from 0 at the first.
        grad_checkpointing: keep only the units' inputs for the backward pass, and compute the rest again.
    """

    def __init__(
        self,
        depths: Sequence[int] = (18, 18, 18),
        widths: Sequence[int] = (16, 32, 64),
        block: Literal["basic", "bottleneck"] = "basic",
        unit: Unit = "full_preact",
        shortcut: Shortcut = "identity",
        shortcut_type: Literal["A", "B", "C"] = "B",
        scale_x: float = 1.0,
        scale_f: float = 1.0,
        gate_bias: float = 0.0,
        dropout: float = 0.5,
        stride_in: Literal["1x1", "3x3"] = "3x3",
        stem: Literal["cifar", "imagenet"] = "cifar",
        stem_width: int | None = None,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        grad_checkpointing: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for what, name, known in (
            ("block", block, ("basic", "bottleneck")),
            ("unit", unit, UNITS),
            ("stride_in", stride_in, ("1x1", "3x3")),
            ("stem", stem, ("cifar", "imagenet")),
        ):
            if name not in known:
                raise unknown(what, name, known)
        if len(depths) != len(widths) or not depths or min(*depths, *widths) < 1:
            raise ZooError(f"depths and widths must be positive, one a stage; got {list(depths)} and {list(widths)}")
        order = UNITS[unit]
        imagenet = stem == "imagenet"
        stem_width = widths[0] if stem_width is None else stem_width
        self.grad_checkpointing, self.drop_rate = grad_checkpointing, drop_rate
        self.conv1 = _conv(in_chans, stem_width, 7 if imagenet else 3, 2 if imagenet else 1)
        # What a pre-activation unit does first, the stem leaves to it; but for ImageNet the pooling comes in between.
        normalised = imagenet or "bn" not in order.before
        self.bn1 = nn.BatchNorm2d(stem_width) if normalised else None
        self.stem_relu = imagenet or not order.before
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else None

        basic = block == "basic"
        strided = 0 if basic or stride_in == "1x1" else 1
        channels, reduction = stem_width, 4 if imagenet else 1
        self.feature_info = [{"num_chs": stem_width, "reduction": 2 if imagenet else 1, "module": "conv1"}]
        stages: list[nn.Module] = []
        rates = iter([drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))])
        for s, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            outs, kernels = ((width, width), (3, 3)) if basic else ((width, width, 4 * width), (1, 3, 1))
            units = []
            for u in range(depth):
                stride = 2 if s and not u else 1
                strides = [stride if i == strided else 1 for i in range(len(outs))]
                # The first unit of a stage activates before it splits (appendix): preresnet.lua does so in any stage,
                # resnet-pre-act.lua where the width changes, which is in any stage of its networks.
                preact: Literal["own", "shared", "none"] = "own" if u else "none" if imagenet and not s else "shared"
                made = (unit, shortcut, shortcut_type, preact, scale_x, scale_f, gate_bias, dropout, next(rates))
                units.append(ResidualUnit(channels, outs, kernels, strides, *made))
                channels = outs[-1]
            stages.append(nn.Sequential(*units))
            reduction *= 2 if s else 1
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{s}"})
        self.stages = nn.ModuleList(stages)
        self.ends_in_relu = "relu" in order.before
        self.norm = nn.BatchNorm2d(channels) if "bn" in order.before else None
        self.num_features = self.head_hidden_size = channels
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions N(0, 2 / (k * k * out_chans)), as in He et al. 2015 by fan-out; gates start at their bias."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, ResidualUnit) and module.gate is not None and module.gate.bias is not None:
                nn.init.constant_(module.gate.bias, module.gate_bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by layer for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^conv1|^bn1", "blocks": blocks}

    def _stem(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The stem's output before its ReLU and pooling, and behind them.

        The maximum is taken before the ReLU: the same numbers and gradients, from a quarter of the work.
        """
        inner = self.conv1(images)
        if self.bn1 is not None:
            inner = self.bn1(inner)
        x = inner if self.maxpool is None else self.maxpool(inner)
        return inner, relu(x, inplace=self.maxpool is not None) if self.stem_relu else x

    def _stem_feature(self, inner: Tensor) -> Tensor:
        return relu(inner) if self.stem_relu else inner

    def _end(self, x: Tensor) -> Tensor:
        """What pre-activation units leave to be done behind the last addition (appendix)."""
        if self.norm is not None:
            x = self.norm(x)
            return relu(x, inplace=True)
        return relu(x) if self.ends_in_relu else x

    def _prune_end(self) -> None:
        self.norm, self.ends_in_relu = None, False


# ------------------------------------------------------------------------------------------------------------ 3. task


class PreActResNetClassification(Classification):
    """Supervised training and evaluation.

    Args:
        mixup, cutmix: Beta parameters, 0 for none.
        label_smoothing: of the training targets.
        channels_last: keep activations in the order (B, H, W, C).
        init_from: weights to start from, all but the classifier: the name of published ones, or a file.
        optim: optimiser and schedule.
        network: of :class:`PreActResNet`.
    """

    network: PreActResNet

    def __init__(
        self,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        channels_last: bool = True,
        init_from: str | None = None,
        optim: Optim = Optim(name="sgd", lr=0.1, nesterov=True, weight_decay=1e-4, no_decay="none"),  # noqa: B008
        **network: Any,
    ) -> None:
        net = PreActResNet(**network)
        super().__init__(net, optim, net.num_classes, mixup, cutmix, label_smoothing, init_from, channels_last)
        self.save_hyperparameters()


# ---------------------------------------------------------------------------------------------------------- 4. models


def preact_resnet_cifar(depth: int, block: str = "basic", **overrides: Any) -> PreActResNet:
    """A CIFAR network of `depth` layers: three stages of n units, 6n + 2 (basic) or 9n + 2 (bottleneck).

    Basic networks are those of preresnet.lua with its default on CIFAR, shortcut type A; bottlenecks those of
    resnet-pre-act.lua, whose first 1x1 convolution strides.
    """
    depths = (units_per_stage(depth, block),) * 3
    own = {"stride_in": "1x1", "shortcut_type": "B" if block == "bottleneck" else "A"}
    return PreActResNet(**{"depths": depths, "block": block, **own, **overrides})


_IMAGENET = {
    18: ((2, 2, 2, 2), "basic"),
    34: ((3, 4, 6, 3), "basic"),
    50: ((3, 4, 6, 3), "bottleneck"),
    101: ((3, 4, 23, 3), "bottleneck"),
    152: ((3, 8, 36, 3), "bottleneck"),
    200: ((3, 24, 36, 3), "bottleneck"),
}


def preact_resnet_imagenet(depth: int, **overrides: Any) -> PreActResNet:
    """An ImageNet network of preresnet.lua: 18 or 34 layers of basic units, 50, 101, 152 or 200 of bottlenecks."""
    if depth not in _IMAGENET:
        raise ZooError(f"depth {depth} of an ImageNet network must be one of {', '.join(map(str, _IMAGENET))}")
    depths, block = _IMAGENET[depth]
    own = {"widths": (64, 128, 256, 512), "stem": "imagenet", "num_classes": 1000}
    return PreActResNet(**{"depths": depths, "block": block, **own, **overrides})


def preact_resnet20_cifar(**overrides: Any) -> PreActResNet:
    """20 layers of basic units for CIFAR (n = 3)."""
    return preact_resnet_cifar(20, **overrides)


def preact_resnet32_cifar(**overrides: Any) -> PreActResNet:
    """32 layers of basic units for CIFAR (n = 5)."""
    return preact_resnet_cifar(32, **overrides)


def preact_resnet44_cifar(**overrides: Any) -> PreActResNet:
    """44 layers of basic units for CIFAR (n = 7)."""
    return preact_resnet_cifar(44, **overrides)


def preact_resnet56_cifar(**overrides: Any) -> PreActResNet:
    """56 layers of basic units for CIFAR (n = 9)."""
    return preact_resnet_cifar(56, **overrides)


def preact_resnet110_cifar(**overrides: Any) -> PreActResNet:
    """110 layers of basic units for CIFAR (n = 18), the network of the ablations."""
    return preact_resnet_cifar(110, **overrides)


def preact_resnet1202_cifar(**overrides: Any) -> PreActResNet:
    """1202 layers of basic units for CIFAR (n = 200)."""
    return preact_resnet_cifar(1202, **overrides)


def preact_resnet164_cifar(**overrides: Any) -> PreActResNet:
    """164 layers of bottlenecks for CIFAR (n = 18)."""
    return preact_resnet_cifar(164, "bottleneck", **overrides)


def preact_resnet1001_cifar(**overrides: Any) -> PreActResNet:
    """1001 layers of bottlenecks for CIFAR (n = 111)."""
    return preact_resnet_cifar(1001, "bottleneck", **overrides)


def preact_resnet18(**overrides: Any) -> PreActResNet:
    """18 layers of basic units for ImageNet."""
    return preact_resnet_imagenet(18, **overrides)


def preact_resnet34(**overrides: Any) -> PreActResNet:
    """34 layers of basic units for ImageNet."""
    return preact_resnet_imagenet(34, **overrides)


def preact_resnet50(**overrides: Any) -> PreActResNet:
    """50 layers of bottlenecks for ImageNet."""
    return preact_resnet_imagenet(50, **overrides)


def preact_resnet101(**overrides: Any) -> PreActResNet:
    """101 layers of bottlenecks for ImageNet."""
    return preact_resnet_imagenet(101, **overrides)


def preact_resnet152(**overrides: Any) -> PreActResNet:
    """152 layers of bottlenecks for ImageNet."""
    return preact_resnet_imagenet(152, **overrides)


def preact_resnet200(**overrides: Any) -> PreActResNet:
    """200 layers of bottlenecks for ImageNet: 152 with 16 more units at 28x28."""
    return preact_resnet_imagenet(200, **overrides)


# ------------------------------------------------------------------------------------------------ 5. official weights

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_OURS = re.compile(
    rf"(?:conv1\.weight|(?:bn1|norm)\.(?:{'|'.join(_NORM)})|fc\.(?:weight|bias)"
    rf"|stages\.\d+\.\d+\.(?:conv\d\.weight|shortcut_conv\.weight|gate\.(?:weight|bias)|bn\d\.(?:{'|'.join(_NORM)})))"
)
_IN_UNIT = re.compile(r"(\d+)\.(\d+)\.(?:(0)|2\.0\.(\d)|0\.0\.(\d)|([02])\.1\.0)\.(\w+)")


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Torch7 network of preresnet.lua or resnet-pre-act.lua in our names.

    The official keys are the 0-based places of a layer in its nested containers (``4.0.0.0.3.weight``). The counters
    ``num_batches_tracked``, which Torch7 does not have, are added as 0. A state dict in our names passes unchanged.

    Raises:
        ZooError: a key that belongs to neither layout.
    """
    if "conv1.weight" in state_dict:
        if foreign := [key for key in state_dict if not _OURS.fullmatch(key)]:
            raise ZooError(f"not a pre-activation ResNet: {len(foreign)} unknown keys, such as {foreign[0]!r}")
        return dict(state_dict)
    imagenet = "12.weight" in state_dict
    top = {"0": "conv1", "1": "bn1", "8": "norm", "12": "fc"} if imagenet else {"0": "conv1", "4": "norm", "8": "fc"}
    first, stages = (4, 4) if imagenet else (1, 3)
    converted: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        path, _, leaf = key.rpartition(".")
        if path in top:
            name: str | None = top[path]
        else:
            found = _IN_UNIT.fullmatch(key)
            name = None
            if found and first <= int(found[1]) < first + stages:
                part = _part_of_unit(found, bare=imagenet and found[1] == "4" and found[2] == "0")
                name = part and f"stages.{int(found[1]) - first}.{found[2]}.{part}"
        ours = f"{name}.{leaf}"
        if name is None or not _OURS.fullmatch(ours):
            raise ZooError(f"not a pre-activation ResNet: unknown key {key!r}")
        converted[ours] = value
        if leaf == "running_var":
            counter = torch.zeros((), dtype=torch.long, device=value.device)
            converted.setdefault(f"{name}.num_batches_tracked", counter)
    return converted


def _part_of_unit(found: re.Match[str], bare: bool) -> str | None:
    """The name of a unit's layer from its place; `bare` is the unit whose first activation stands in the stem."""
    _, _, shared, behind_shared, in_branch, shortcut, _ = found.groups()
    if shortcut is not None:
        return "shortcut_conv"
    if shared is not None:
        return "bn1"
    # A branch is BN-ReLU-conv over and over, without the first BN-ReLU where that is shared or missing.
    if behind_shared is not None and not bare:
        place = int(behind_shared) + 2
    elif in_branch is not None:
        place = int(in_branch) + (2 if bare else 0)
    else:
        return None
    kind = {0: "bn", 2: "conv"}.get(place % 3)
    return kind and f"{kind}{place // 3 + 1}"
