"""SlowFast Networks for Video Recognition.

Christoph Feichtenhofer, Haoqi Fan, Jitendra Malik, Kaiming He. ICCV 2019, arXiv 1812.03982.

Two 3-D ResNets see the same clip. The Slow pathway takes T frames, a large stride apart, and has all the channels; it
tells what is there. The Fast pathway takes alpha times as many frames and has a fraction beta = 1/8 of the channels; it
tells how it moves, and costs a fifth of the whole. Behind the stem and each of res2, res3, res4, a lateral connection
brings Fast's features to Slow's frame rate and appends them to Slow's channels. Both are pooled over space and time and
classified together. There is no optical flow, and no pre-training on pictures.

Conventions: a video (B, C, T, H, W) is that of the Fast pathway, normalised; Slow's frames are picked from it. "4x16"
names a Slow pathway of 4 frames, 16 raw frames apart. Probabilities are what evaluation averages: over the positions of
a larger crop, and over the views of a video.

Deviations from the official code, none of which changes a value:
- Convolutions over time alone are computed as two-dimensional ones over (T, H * W).
- A network gives logits in evaluation too: those whose probabilities are the means over the positions. The official one
  gives the probabilities themselves, and so loses those that round to 0 or 1 before the cross-entropy.
- The dot-product form of the non-local block multiplies its three matrices in the cheaper order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from zoo.errors import ZooError, unknown
from zoo.nn.resnet3d import (
    Activation,
    Block,
    Pathway3d,
    ResNet3d,
    Similarity,
    TemporalConv3d,
    VideoNetwork,
    init_resnet3d,
    make_head,
)
from zoo.nn.video_names import from_published
from zoo.training import Optim
from zoo.training.video import ActionDetection, MultiLabelVideoClassification, VideoClassification

__all__ = [
    "Lateral",
    "SlowFast",
    "SlowFastClassification",
    "SlowFastDetection",
    "SlowFastMultiLabel",
    "convert_official",
    "fast_only",
    "pack_pathways",
    "slow_indices",
    "slow_only",
    "slow_r50_4x16",
    "slow_r50_4x16_ava",
    "slow_r50_4x16_nl",
    "slow_r50_8x8",
    "slow_r50_8x8_nl",
    "slowfast_r50_4x16",
    "slowfast_r50_4x16_nl",
    "slowfast_r50_8x8",
    "slowfast_r50_8x8_ava",
    "slowfast_r50_8x8_nl",
    "slowfast_r50_16x8",
    "slowfast_r101_8x8",
    "slowfast_r101_8x8_50_50",
    "slowfast_r101_8x8_50_50_nl",
    "slowfast_r101_8x8_50_50_nl_ava",
    "slowfast_r101_8x8_50_101",
    "slowfast_r101_16x8_50_50",
    "slowfast_r101_16x8_50_50_nl",
    "slowfast_r101_16x8_50_50_nl_ava",
    "time_to_channel",
]

Fusion = Literal["none", "time_to_channel_sum", "time_to_channel_concat", "time_strided_sample", "time_strided_conv"]
SLOW_KERNELS, FAST_KERNELS = (1, 1, 1, 3, 3), (5, 3, 3, 3, 3)  # temporal, of the stem and res2 to res5 (Table 1)
_OF_BOTH = ("alpha", "fusion", "fusion_ratio", "fusion_kernel", "slow_temporal_blocks", "fast_temporal_blocks")

# ------------------------------------------------------------------------------------------------------- 1. equations


def slow_indices(num_frames: int, alpha: int) -> Tensor:
    """(num_frames // alpha,) frames of the Slow pathway among the Fast one's: evenly from the first to the last, both
    included, truncated. They are not exactly alpha apart."""
    return torch.linspace(0, num_frames - 1, num_frames // alpha).long()


def pack_pathways(video: Tensor, alpha: int) -> tuple[Tensor, Tensor]:
    """The Slow (B, C, T / alpha, H, W) and the Fast (B, C, T, H, W) pathway's input of a video (section 3).

    Raises:
        ZooError: the video has fewer than alpha frames.
    """
    frames = video.shape[2]
    if frames < alpha:
        raise ZooError(f"a clip of {frames} frames is too short for alpha {alpha}: set data.num_frames to more")
    return video.index_select(2, slow_indices(frames, alpha).to(video.device)), video


def time_to_channel(fast: Tensor, alpha: int) -> Tensor:
    """(B, C, alpha T, H, W) to (B, alpha C, T, H, W): alpha frames become the channels of one (section 3.4)."""
    parts = fast.unflatten(2, (-1, alpha))
    return parts.transpose(2, 3).flatten(1, 2)


# --------------------------------------------------------------------------------------------------------- 2. network


class Lateral(nn.Module):
    """A lateral connection from Fast to Slow (section 3.4, Table 5a).

    "time_strided_conv": k x 1 x 1 convolution with stride alpha to `ratio` times the channels, BN, ReLU, appended to
    Slow's channels. "time_strided_sample": one of every alpha frames, appended. "time_to_channel_concat": alpha frames
    as the channels of one, appended; "time_to_channel_sum": the same, added. "none": no connection.

    Args:
        slow_chans, fast_chans: of the features that meet.
        alpha: Fast's frames for one of Slow's.
        fusion: which of these.
        ratio: of the convolution's output channels to Fast's.
        kernel: k.
    """

    def __init__(
        self,
        slow_chans: int,
        fast_chans: int,
        alpha: int = 8,
        fusion: Fusion = "time_strided_conv",
        ratio: int = 2,
        kernel: int = 5,
    ) -> None:
        super().__init__()
        if fusion not in get_args(Fusion):
            raise unknown("fusion", str(fusion), get_args(Fusion))
        self.alpha, self.fusion = alpha, fusion
        self.conv: nn.Module | None = None
        self.bn: nn.Module | None = None
        added = {
            "none": 0,
            "time_to_channel_sum": 0,
            "time_to_channel_concat": alpha * fast_chans,
            "time_strided_sample": fast_chans,
            "time_strided_conv": ratio * fast_chans,
        }
        self.out_chans = added[fusion]
        if fusion == "time_to_channel_sum" and alpha * fast_chans != slow_chans:
            raise ZooError(f"time_to_channel_sum wants alpha {alpha} equal to beta_inv {slow_chans // fast_chans}")
        if fusion == "time_strided_conv":
            self.conv = TemporalConv3d(fast_chans, self.out_chans, kernel, alpha)
            self.bn = nn.BatchNorm3d(self.out_chans)

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        """Slow's features (B, C, T, H, W) with those of Fast (B, C', alpha T, H, W) appended or added."""
        if fast.shape[2] != self.alpha * slow.shape[2] and self.fusion != "none":
            raise ZooError(f"clips whose frames are no multiple of alpha {self.alpha}: change data.num_frames")
        if self.conv is not None and self.bn is not None:
            return torch.cat([slow, relu(self.bn(self.conv(fast)), inplace=True)], dim=1)
        if self.fusion == "time_strided_sample":
            return torch.cat([slow, fast[:, :, :: self.alpha]], dim=1)
        if self.fusion == "time_to_channel_concat":
            return torch.cat([slow, time_to_channel(fast, self.alpha)], dim=1)
        return slow + time_to_channel(fast, self.alpha) if self.fusion == "time_to_channel_sum" else slow


class SlowFast(VideoNetwork):
    """The two pathways, their lateral connections and a head.

    Args:
        depth, width, block, strides, dilations, similarity, nonlocal_pools, nonlocal_groups, in_chans, groups,
            stride_in_1x1: as of :class:`zoo.nn.resnet3d.Pathway3d`.
        alpha: Fast's frames for one of Slow's.
        beta_inv: Slow's channels for one of Fast's.
        fusion, fusion_ratio, fusion_kernel: of the lateral connections, see :class:`Lateral`.
        slow_temporal_blocks, fast_temporal_blocks: how many blocks of each stage have a temporal kernel; None: all
            (which in Slow's res2 and res3 is 1 anyway). "50_50" in a name of depth 101 means that in res4 it is 6 in
            both pathways, as in depth 50.
        nonlocal_after: for each stage the blocks of Slow that a non-local block follows.
        num_frames, crop_size: of a training clip, in Fast's frames; they fix the window that the head pools.
        num_classes, dropout, activation, detection, aligned: as of :class:`zoo.nn.resnet3d.ResNet3d`.
        grad_checkpointing: keep only the blocks' inputs for the backward pass, and compute the rest again.
    """

    def __init__(
        self,
        depth: int = 50,
        width: int = 64,
        alpha: int = 8,
        beta_inv: int = 8,
        fusion: Fusion = "time_strided_conv",
        fusion_ratio: int = 2,
        fusion_kernel: int = 5,
        block: Block = "bottleneck",
        slow_temporal_blocks: Sequence[int | None] = (None, None, None, None),
        fast_temporal_blocks: Sequence[int | None] = (None, None, None, None),
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        nonlocal_after: Sequence[Sequence[int]] = ((), (), (), ()),
        similarity: Similarity = "dot_product",
        nonlocal_pools: Sequence[Sequence[int]] = ((1, 2, 2),) * 4,
        nonlocal_groups: Sequence[int] = (1, 1, 1, 1),
        num_frames: int = 32,
        crop_size: int = 224,
        num_classes: int = 400,
        dropout: float = 0.5,
        activation: Activation = "softmax",
        detection: bool = False,
        aligned: bool = True,
        in_chans: int = 3,
        groups: int = 1,
        stride_in_1x1: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if width % beta_inv:
            raise ZooError(f"width {width} is no multiple of beta_inv {beta_inv}")
        if num_frames % alpha:
            raise ZooError(f"num_frames {num_frames} is no multiple of alpha {alpha}")
        self.alpha, self.grad_checkpointing = alpha, grad_checkpointing
        self.clip_shape = (in_chans, num_frames, crop_size, crop_size)
        common: dict[str, Any] = {
            "depth": depth,
            "block": block,
            "strides": strides,
            "dilations": dilations,
            "in_chans": in_chans,
            "groups": groups,
            "stride_in_1x1": stride_in_1x1,
        }
        narrow = width // beta_inv
        laterals = [
            Lateral(chans, chans // beta_inv, alpha, fusion, fusion_ratio, fusion_kernel)
            for chans in (width, 4 * width, 8 * width, 16 * width)
        ]
        self.lateral = nn.ModuleList(laterals)
        self.slow = Pathway3d(
            width=width,
            temporal_kernels=SLOW_KERNELS,
            temporal_blocks=slow_temporal_blocks,
            lateral_chans=[lateral.out_chans for lateral in laterals],
            nonlocal_after=nonlocal_after,
            similarity=similarity,
            nonlocal_pools=nonlocal_pools,
            nonlocal_groups=nonlocal_groups,
            **common,
        )
        self.fast = Pathway3d(
            width=narrow, temporal_kernels=FAST_KERNELS, temporal_blocks=fast_temporal_blocks, **common
        )
        self.head = make_head(
            [self.slow, self.fast],
            [num_frames // alpha, num_frames],
            crop_size,
            num_classes,
            dropout,
            activation,
            detection,
            aligned,
        )
        init_resnet3d(self)

    def forward_features(self, video: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """A video (B, C, T, H, W), or Slow's and Fast's frames of it, to the features of both pathways.

        They are (B, 2048, T / alpha, H / 32, W / 32) and (B, 256, T, H / 32, W / 32) at the published widths.
        """
        slow, fast = pack_pathways(video, self.alpha) if isinstance(video, Tensor) else video
        recomputed = self.grad_checkpointing and self.training
        slow, fast = self.slow.stem(slow), self.fast.stem(fast)
        for lateral, slow_stage, fast_stage in zip(self.lateral, self.slow.stages, self.fast.stages, strict=True):
            slow = slow_stage(lateral(slow, fast), recomputed)
            fast = fast_stage(fast, recomputed)
        return [slow, fast]


def slow_only(**options: Any) -> ResNet3d:
    """The Slow pathway alone: temporal kernels of 3 in res4 and res5, no pooling over time."""
    return ResNet3d(temporal_kernels=SLOW_KERNELS, **options)


def fast_only(width: int = 64, beta_inv: int = 8, **options: Any) -> ResNet3d:
    """The Fast pathway of a SlowFast network of `width`, alone."""
    return ResNet3d(width=width // beta_inv, temporal_kernels=FAST_KERNELS, **options)


# ----------------------------------------------------------------------------------------------------------- 3. models

_R50, _R101 = {"depth": 50}, {"depth": 101}
_4X16 = {"alpha": 8, "fusion_kernel": 5, "num_frames": 32}
_8X8 = {"alpha": 4, "fusion_kernel": 7, "num_frames": 32}
_16X8 = {"alpha": 4, "fusion_kernel": 7, "num_frames": 64}
_K5 = {"fusion_kernel": 5}  # of all networks of depth 101, and of those with non-local blocks
_AS_IN_R50 = (None, None, 6, None)
_50_50 = {"slow_temporal_blocks": _AS_IN_R50, "fast_temporal_blocks": _AS_IN_R50}
_NL_R50 = {"nonlocal_after": ((), (1, 3), (1, 3, 5), ())}
_NL_R101 = {"nonlocal_after": ((), (), (6, 13, 20), ())}
_AVA = {"detection": True, "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2), "num_classes": 80}
_AVA_POOL = {"nonlocal_pools": ((2, 2, 2),) * 4}


def slow_r50_4x16(**overrides: Any) -> ResNet3d:
    """Slow-only ResNet-50, 4 frames 16 apart."""
    return slow_only(**{**_R50, "num_frames": 4, **overrides})


def slow_r50_8x8(**overrides: Any) -> ResNet3d:
    """Slow-only ResNet-50, 8 frames 8 apart."""
    return slow_only(**{**_R50, "num_frames": 8, **overrides})


def slow_r50_4x16_nl(**overrides: Any) -> ResNet3d:
    """Slow-only ResNet-50 with 5 non-local blocks, 4 frames 16 apart."""
    return slow_only(**{**_R50, **_NL_R50, "num_frames": 4, **overrides})


def slow_r50_8x8_nl(**overrides: Any) -> ResNet3d:
    """Slow-only ResNet-50 with 5 non-local blocks, 8 frames 8 apart."""
    return slow_only(**{**_R50, **_NL_R50, "num_frames": 8, **overrides})


def slow_r50_4x16_ava(**overrides: Any) -> ResNet3d:
    """Slow-only ResNet-50 for boxes of AVA, 4 frames 16 apart."""
    return slow_only(**{**_R50, **_AVA, "num_frames": 4, **overrides})


def slowfast_r50_4x16(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-50, 4x16: 4 and 32 frames."""
    return SlowFast(**{**_R50, **_4X16, **overrides})


def slowfast_r50_8x8(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-50, 8x8: 8 and 32 frames."""
    return SlowFast(**{**_R50, **_8X8, **overrides})


def slowfast_r50_16x8(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-50, 16x8: 16 and 64 frames (fine-tuned on Charades and Something-Something v2)."""
    return SlowFast(**{**_R50, **_16X8, **overrides})


def slowfast_r50_4x16_nl(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-50 with 5 non-local blocks, 4x16."""
    return SlowFast(**{**_R50, **_4X16, **_NL_R50, **overrides})


def slowfast_r50_8x8_nl(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-50 with 5 non-local blocks, 8x8."""
    return SlowFast(**{**_R50, **_8X8, **_K5, **_NL_R50, **overrides})


def slowfast_r50_8x8_ava(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-50 for boxes of AVA, 8x8."""
    return SlowFast(**{**_R50, **_8X8, **_AVA, **overrides})


def slowfast_r101_8x8(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-101, 8x8, temporal kernels in all blocks of res4."""
    return SlowFast(**{**_R101, **_8X8, **_K5, **overrides})


def slowfast_r101_8x8_50_101(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-101, 8x8, temporal kernels in 6 blocks of Slow's res4 and in all of Fast's."""
    return SlowFast(**{**_R101, **_8X8, **_K5, "slow_temporal_blocks": _AS_IN_R50, **overrides})


def slowfast_r101_8x8_50_50(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-101, 8x8, temporal kernels in 6 blocks of res4."""
    return SlowFast(**{**_R101, **_8X8, **_K5, **_50_50, **overrides})


def slowfast_r101_8x8_50_50_nl(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-101 with 3 non-local blocks in res4, 8x8, temporal kernels in 6 blocks of res4."""
    return SlowFast(**{**_R101, **_8X8, **_K5, **_50_50, **_NL_R101, **overrides})


def slowfast_r101_16x8_50_50(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-101, 16x8, temporal kernels in 6 blocks of res4."""
    return SlowFast(**{**_R101, **_16X8, **_K5, **_50_50, **overrides})


def slowfast_r101_16x8_50_50_nl(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-101 with 3 non-local blocks in res4, 16x8, temporal kernels in 6 blocks of res4."""
    return SlowFast(**{**_R101, **_16X8, **_K5, **_50_50, **_NL_R101, **overrides})


def slowfast_r101_8x8_50_50_nl_ava(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-101 with 3 non-local blocks for boxes of AVA, 8x8."""
    return SlowFast(**{**_R101, **_8X8, **_K5, **_50_50, **_NL_R101, **_AVA_POOL, **_AVA, **overrides})


def slowfast_r101_16x8_50_50_nl_ava(**overrides: Any) -> SlowFast:
    """SlowFast ResNet-101 with 3 non-local blocks for boxes of AVA, 16x8."""
    return SlowFast(**{**_R101, **_16X8, **_K5, **_50_50, **_NL_R101, **_AVA_POOL, **_AVA, **overrides})


# ------------------------------------------------------------------------------------------------------------ 4. tasks


class SlowFastClassification(VideoClassification):
    """Training and evaluation with one label a clip (Kinetics, Something-Something).

    Args:
        arch: both pathways, or one of them alone: "slow" sees `num_frames` frames, "fast" is `beta_inv` times as narrow
            as `width` says.
        init_from: weights to start from, all but the classifier, and but non-local blocks where they have none: the
            name of published ones, or a file.
        label_smoothing, channels_last, optim: as of the base class.
        network: of :class:`SlowFast`, or of :func:`slow_only` or :func:`fast_only`.

    Raises:
        ZooError: an option of both pathways for one alone.
    """

    activation: Activation = "softmax"
    detection = False
    network: VideoNetwork

    def __init__(
        self,
        arch: Literal["slowfast", "slow", "fast"] = "slowfast",
        init_from: str | None = None,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        optim: Optim = Optim(name="sgd", lr=0.1, nesterov=True, weight_decay=1e-4),  # noqa: B008
        **network: Any,
    ) -> None:
        made: VideoNetwork
        if arch == "slowfast":
            made = SlowFast(activation=self.activation, detection=self.detection, **network)
        elif wrong := [key for key in network if key in _OF_BOTH or (key == "beta_inv" and arch == "slow")]:
            raise ZooError(f"arch {arch} is one pathway: leave {', '.join(wrong)} out")
        elif arch == "slow":
            made = slow_only(activation=self.activation, detection=self.detection, **network)
        elif arch == "fast":
            made = fast_only(activation=self.activation, detection=self.detection, **network)
        else:
            raise unknown("arch", str(arch), ("slowfast", "slow", "fast"))
        super().__init__(made, optim, made.num_classes, label_smoothing, init_from, channels_last)
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        from zoo.weights.pretrained import fill, read_source

        state = convert_official(read_source(source))
        trunk = {key: value for key, value in state.items() if not key.startswith("head.")}
        fresh = r"head\." if any(".nonlocals." in key for key in trunk) else r"head\.|.*\.nonlocals\."
        fill(self.network, trunk, source, lambda key: not re.match(fresh, key))


class SlowFastMultiLabel(MultiLabelVideoClassification, SlowFastClassification):
    """The same with any number of labels a clip (Charades)."""

    activation = "sigmoid"


class SlowFastDetection(ActionDetection, SlowFastClassification):
    """The same for boxes with any number of actions each (AVA, section 5); res5 is to have stride 1 and dilation 2."""

    detection = True


# ------------------------------------------------------------------------------------------------ 5. official weights


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network of PySlowFast or PyTorchVideo, or a Caffe2 one, in our names; see :mod:`zoo.nn.video_names`.

    A state dict in our names passes unchanged.

    Raises:
        ZooError: a key that belongs to none of these layouts.
    """
    both = re.compile(r"t_conv1_w|s1\.pathway1.*|(model\.)?blocks\.0\.multipathway.*|slow\..*")
    two = any(both.fullmatch(key) for key in state_dict)
    return from_published(state_dict, ("slow", "fast") if two else ("pathway",))
