"""3-D residual networks for video: stem, blocks, stages, non-local blocks, pathways and heads.

The family of C2D, I3D, Slow and SlowFast. Space is treated as in a 2-D ResNet; time enters by the kernel of the first
convolution of a block (T x 1 x 1 in a bottleneck) in those blocks of a stage that are temporal, and nowhere else: no
block strides in time. Features are (B, C, T, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, conv2d, logsigmoid, max_pool3d, relu

from zoo.errors import ZooError, unknown
from zoo.nn.recompute import recompute
from zoo.ops.attention import attention

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
Block = Literal["bottleneck", "basic"]
Similarity = Literal["softmax", "dot_product"]
Activation = Literal["softmax", "sigmoid"]

# ------------------------------------------------------------------------------------------------------- convolutions


class TemporalConv3d(nn.Conv3d):
    """Conv3d of kernel (k, 1, 1), bias-free and padded to the same length, with a stride in time only.

    It is computed as a 2-D convolution over (T, H * W), which is what it is: several times as fast on a CPU.

    Args:
        in_chans, out_chans: channels.
        kernel: k, odd.
        stride: in time.
    """

    def __init__(self, in_chans: int, out_chans: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(in_chans, out_chans, (kernel, 1, 1), (stride, 1, 1), (kernel // 2, 0, 0), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, T, H, W) to (B, out_chans, T / stride, H, W)."""
        stride, padding = (self.stride[0], 1), (self.kernel_size[0] // 2, 0)
        flat = conv2d(x.flatten(3), self.weight.flatten(3), None, stride, padding)
        return flat.unflatten(3, x.shape[3:])


def _spatial(
    in_chans: int, out_chans: int, stride: int, dilation: int, temporal_kernel: int = 1, groups: int = 1
) -> nn.Conv3d:
    """T x 3 x 3, padded to the same size."""
    return nn.Conv3d(
        in_chans,
        out_chans,
        (temporal_kernel, 3, 3),
        (1, stride, stride),
        (temporal_kernel // 2, dilation, dilation),
        (1, dilation, dilation),
        groups,
        bias=False,
    )


# ------------------------------------------------------------------------------------------------------------- blocks


class ResidualBlock3d(nn.Module):
    """relu(shortcut(x) + F(x)); the shortcut is 1 x 1 x 1 and normalised where the shape changes.

    "bottleneck": F is T x 1 x 1, 1 x 3 x 3 (with the stride and the dilation), 1 x 1 x 1. "basic": T x 3 x 3 (with the
    stride), 1 x 3 x 3 (with the dilation). Each convolution is followed by BN and, but for the last, by ReLU.

    Args:
        in_chans, inner_chans, out_chans: channels; a basic block has no inner ones.
        block: which of the two.
        temporal_kernel: T.
        stride, dilation: in space.
        groups: of a bottleneck's 1 x 3 x 3.
        stride_in_1x1: a bottleneck's first convolution strides, not its second.
    """

    def __init__(
        self,
        in_chans: int,
        inner_chans: int,
        out_chans: int,
        block: Block = "bottleneck",
        temporal_kernel: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if block not in ("bottleneck", "basic"):
            raise unknown("block", str(block), ("bottleneck", "basic"))
        self.shortcut_conv: nn.Module | None = None
        self.shortcut_bn: nn.Module | None = None
        if in_chans != out_chans or stride != 1:
            self.shortcut_conv = nn.Conv3d(in_chans, out_chans, 1, (1, stride, stride), bias=False)
            self.shortcut_bn = nn.BatchNorm3d(out_chans)
        self.conv_c: nn.Module | None = None
        self.bn_c: nn.Module | None = None
        if block == "bottleneck":
            self.conv_a: nn.Conv3d = TemporalConv3d(in_chans, inner_chans, temporal_kernel)
            if stride_in_1x1 and stride != 1:
                kernel, padding = (temporal_kernel, 1, 1), (temporal_kernel // 2, 0, 0)
                self.conv_a = nn.Conv3d(in_chans, inner_chans, kernel, (1, stride, stride), padding, bias=False)
                stride = 1
            self.bn_a = nn.BatchNorm3d(inner_chans)
            self.conv_b = _spatial(inner_chans, inner_chans, stride, dilation, groups=groups)
            self.bn_b = nn.BatchNorm3d(inner_chans)
            self.conv_c = TemporalConv3d(inner_chans, out_chans)
            self.bn_c = nn.BatchNorm3d(out_chans)
        else:
            self.conv_a = _spatial(in_chans, out_chans, stride, 1, temporal_kernel)
            self.bn_a = nn.BatchNorm3d(out_chans)
            self.conv_b = _spatial(out_chans, out_chans, 1, dilation)
            self.bn_b = nn.BatchNorm3d(out_chans)

    @property
    def last_bn(self) -> nn.Module:
        """The normalisation whose scale starts at 0."""
        return self.bn_b if self.bn_c is None else self.bn_c

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, T, H, W) to (B, out_chans, T, H / stride, W / stride)."""
        f = relu(self.bn_a(self.conv_a(x)), inplace=True)
        f = self.bn_b(self.conv_b(f))
        if self.conv_c is not None and self.bn_c is not None:
            f = self.bn_c(self.conv_c(relu(f, inplace=True)))
        if self.shortcut_conv is not None and self.shortcut_bn is not None:
            x = self.shortcut_bn(self.shortcut_conv(x))
        return relu(f.add_(x), inplace=True)


class NonLocal3d(nn.Module):
    """x + BN(W_z y), y_i = sum over all positions j of w_ij g(x_j) (Wang et al. 2018, section 3).

    The weights are softmax_j(theta_i . phi_j / sqrt(inner)) or theta_i . phi_j / N, N being the number of j. BN's scale
    starts at 0, so that the block starts as the identity.

    Args:
        chans: channels C of x.
        inner_chans: of theta, phi and g.
        similarity: which of the two.
        pool: kernel and stride (t, h, w) of a maximum taken of x before phi and g; the queries stay whole.
        groups: parts that time is split into; a position sees only its own part.
    """

    def __init__(
        self,
        chans: int,
        inner_chans: int,
        similarity: Similarity = "softmax",
        pool: Sequence[int] = (1, 2, 2),
        groups: int = 1,
    ) -> None:
        super().__init__()
        if similarity not in ("softmax", "dot_product"):
            raise unknown("similarity", str(similarity), ("softmax", "dot_product"))
        self.similarity, self.pool, self.groups = similarity, tuple(pool), groups
        self.theta, self.phi, self.g = (nn.Conv3d(chans, inner_chans, 1) for _ in range(3))
        self.out = nn.Conv3d(inner_chans, chans, 1)
        self.bn = nn.BatchNorm3d(chans)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to the same shape; raises ZooError where T is no multiple of the groups."""
        if self.groups == 1:
            return self._apart(x)
        batch, _, time, *_ = x.shape
        if time % self.groups:
            raise ZooError(f"{time} frames cannot be split into {self.groups} non-local groups")
        parts = x.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return self._apart(parts).unflatten(0, (batch, self.groups)).transpose(1, 2).flatten(2, 3)

    def _apart(self, x: Tensor) -> Tensor:
        pooled = max_pool3d(x, self.pool) if max(self.pool) > 1 else x
        query, key, value = (
            part.flatten(2).transpose(1, 2) for part in (self.theta(x), self.phi(pooled), self.g(pooled))
        )
        if self.similarity == "softmax":
            heads = (part.unsqueeze(1) for part in (query, key, value))
            y = attention(*heads).squeeze(1)
        else:  # (theta phi^T) g = theta (phi^T g), from the smaller matrix
            inner, positions = key.shape[2], key.shape[1]
            if inner < positions:
                y = query @ (key.transpose(1, 2) @ value / positions)
            else:
                y = (query @ key.transpose(1, 2) / positions) @ value
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.bn(self.out(y))


class Stage3d(nn.Module):
    """Residual blocks of one width.

    Args:
        in_chans, inner_chans, out_chans, block: as of :class:`ResidualBlock3d`.
        depth: the number of blocks.
        temporal_kernels: T of each block, repeated until there are enough.
        temporal_blocks: only so many blocks from the first have their T, the others 1; None: all.
        stride: of the first block.
        dilation: of all blocks.
        nonlocal_after: blocks (from 0) that a non-local block follows.
        similarity, nonlocal_pool, nonlocal_groups: of those.
        groups, stride_in_1x1: as of :class:`ResidualBlock3d`.
    """

    def __init__(
        self,
        in_chans: int,
        inner_chans: int,
        out_chans: int,
        depth: int,
        block: Block = "bottleneck",
        temporal_kernels: Sequence[int] = (1,),
        temporal_blocks: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        nonlocal_after: Sequence[int] = (),
        similarity: Similarity = "dot_product",
        nonlocal_pool: Sequence[int] = (1, 2, 2),
        nonlocal_groups: int = 1,
        groups: int = 1,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        temporal_blocks = depth if temporal_blocks is None else temporal_blocks
        if not 0 <= temporal_blocks <= depth:
            raise ZooError(f"a stage of {depth} blocks cannot have {temporal_blocks} temporal ones")
        if not all(0 <= place < depth for place in nonlocal_after):
            raise ZooError(f"non-local blocks follow blocks 0 to {depth - 1}, not {list(nonlocal_after)}")
        self.blocks = nn.ModuleList(
            ResidualBlock3d(
                out_chans if i else in_chans,
                inner_chans,
                out_chans,
                block,
                temporal_kernels[i % len(temporal_kernels)] if i < temporal_blocks else 1,
                1 if i else stride,
                dilation,
                groups,
                stride_in_1x1,
            )
            for i in range(depth)
        )
        self.nonlocals = nn.ModuleDict(
            {
                str(i): NonLocal3d(out_chans, out_chans // 2, similarity, nonlocal_pool, nonlocal_groups)
                for i in nonlocal_after
            }
        )

    def forward(self, x: Tensor, recomputed: bool = False) -> Tensor:
        """(B, in_chans, T, H, W) to (B, out_chans, T, H / stride, W / stride).

        With `recomputed`, only the blocks' inputs are kept for the backward pass.
        """
        for i, block in enumerate(self.blocks):
            parts = [block, *([self.nonlocals[str(i)]] if str(i) in self.nonlocals else [])]
            for part in parts:
                x = recompute(part, x) if recomputed else part(x)
        return x


class Stem3d(nn.Module):
    """T x 7 x 7 convolution with spatial stride 2, BN, ReLU, 1 x 3 x 3 maximum with spatial stride 2."""

    def __init__(self, in_chans: int, out_chans: int, temporal_kernel: int = 1) -> None:
        super().__init__()
        kernel, padding = (temporal_kernel, 7, 7), (temporal_kernel // 2, 3, 3)
        self.conv = nn.Conv3d(in_chans, out_chans, kernel, (1, 2, 2), padding, bias=False)
        self.bn = nn.BatchNorm3d(out_chans)

    def forward(self, video: Tensor) -> Tensor:
        """(B, in_chans, T, H, W) to (B, out_chans, T, H / 4, W / 4)."""
        # The maximum is taken before the ReLU: the same numbers and gradients, from a quarter of the work.
        x = max_pool3d(self.bn(self.conv(video)), (1, 3, 3), (1, 2, 2), (0, 1, 1))
        return relu(x, inplace=True)


class Pathway3d(nn.Module):
    """A stem and the stages res2 to res5.

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: channels w of the stem; stage s (from 0) puts out 4 * w * 2^s, a bottleneck has w * 2^s inner ones.
        block: of all stages. Basic blocks put out as many channels as bottlenecks do, as in PySlowFast.
        temporal_kernels: T of the stem and of the blocks of each stage (one number, or several that are repeated).
        temporal_blocks: how many blocks of each stage are temporal; None: all.
        lateral_chans: channels joined to the inputs of the four stages from another pathway.
        strides, dilations: in space, of each stage.
        nonlocal_after: for each stage the blocks that a non-local block follows.
        similarity: of the non-local blocks.
        nonlocal_pools, nonlocal_groups: of the non-local blocks of each stage.
        temporal_pool: kernel and stride of a maximum over time behind res2 (2 in C2D and I3D).
        in_chans: of the video.
        groups: of the bottlenecks' 1 x 3 x 3, which have as many times the inner channels (ResNeXt).
        stride_in_1x1: as of :class:`ResidualBlock3d`.
    """

    def __init__(
        self,
        depth: int = 50,
        width: int = 64,
        block: Block = "bottleneck",
        temporal_kernels: Sequence[int | Sequence[int]] = (1, 1, 1, 3, 3),
        temporal_blocks: Sequence[int | None] = (None, None, None, None),
        lateral_chans: Sequence[int] = (0, 0, 0, 0),
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        nonlocal_after: Sequence[Sequence[int]] = ((), (), (), ()),
        similarity: Similarity = "dot_product",
        nonlocal_pools: Sequence[Sequence[int]] = ((1, 2, 2),) * 4,
        nonlocal_groups: Sequence[int] = (1, 1, 1, 1),
        temporal_pool: int = 1,
        in_chans: int = 3,
        groups: int = 1,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ZooError(f"depth must be one of {', '.join(map(str, DEPTHS))}, not {depth}")
        stem_kernel, *stage_kernels = temporal_kernels
        if not isinstance(stem_kernel, int) or len(stage_kernels) != 4:
            raise ZooError("temporal_kernels are five: one number for the stem, and one or several for each stage")
        self.out_chans = [width, *(4 * width * 2**s for s in range(4))]
        self.spatial_stride = 4 * math.prod(strides)
        self.temporal_pool = temporal_pool
        self.stem = Stem3d(in_chans, width, stem_kernel)
        self.stages = nn.ModuleList(
            Stage3d(
                self.out_chans[s] + lateral_chans[s],
                groups * width * 2**s,
                self.out_chans[s + 1],
                DEPTHS[depth][s],
                block,
                (kernels,) if isinstance(kernels, int) else tuple(kernels),
                temporal_blocks[s],
                strides[s],
                dilations[s],
                nonlocal_after[s],
                similarity,
                nonlocal_pools[s],
                nonlocal_groups[s],
                groups,
                stride_in_1x1,
            )
            for s, kernels in enumerate(stage_kernels)
        )

    def after_res2(self, x: Tensor) -> Tensor:
        """The maximum over time that C2D and I3D take behind res2."""
        if self.temporal_pool == 1:
            return x
        return max_pool3d(x, (self.temporal_pool, 1, 1))

    def forward(self, video: Tensor, recomputed: bool = False) -> Tensor:
        """(B, C, T, H, W) to features (B, out_chans[-1], T / temporal_pool, H / stride, W / stride)."""
        x = self.stem(video)
        for s, stage in enumerate(self.stages):
            x = stage(x, recomputed)
            if s == 0:
                x = self.after_res2(x)
        return x


def init_resnet3d(network: nn.Module) -> None:
    """He's normal initialisation by fan-out of all 3-D convolutions, biases 0; scales of BN 1, but 0 for the last of a
    residual or non-local block; linear layers N(0, 0.01^2) with biases 0 (PySlowFast's).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init_classifier(module)
        elif isinstance(module, ResidualBlock3d):
            nn.init.zeros_(module.last_bn.weight)  # type: ignore[arg-type]
        elif isinstance(module, NonLocal3d):
            nn.init.zeros_(module.bn.weight)


def init_classifier(linear: nn.Linear) -> None:
    """Weights N(0, 0.01^2), biases 0."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)


# -------------------------------------------------------------------------------------------------------------- heads


def mean_probabilities(logits: Tensor, activation: Activation) -> Tensor:
    """The logits (B, K) whose probabilities are the means of those of logits (B, ..., K) over all positions between.

    With "softmax" they are log-probabilities up to a constant, so that another softmax and the cross-entropy are right;
    with "sigmoid" each class stands alone.
    """
    if logits.ndim == 2:
        return logits
    logits = logits.flatten(1, -2)
    if logits.shape[1] == 1:
        return logits[:, 0]
    if activation == "softmax":
        return logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
    return logsigmoid(logits).logsumexp(1) - logsigmoid(-logits).logsumexp(1)


class PooledHead3d(nn.Module):
    """Average pooling of each pathway with a fixed window and stride 1, concatenation, dropout, a linear classifier.

    On larger inputs than the window's there are several positions: the classifier is applied at each, and in evaluation
    probabilities are averaged, in training logits.

    Args:
        chans: of each pathway.
        windows: (T, H, W) of each pathway; None pools everything.
        num_classes: K; 0: no classifier, its output is the pooled features.
        dropout: before the classifier.
        activation: of the classes, by which positions are averaged.
    """

    def __init__(
        self,
        chans: Sequence[int],
        windows: Sequence[Sequence[int] | None],
        num_classes: int,
        dropout: float = 0.5,
        activation: Activation = "softmax",
    ) -> None:
        super().__init__()
        if activation not in ("softmax", "sigmoid"):
            raise unknown("activation", str(activation), ("softmax", "sigmoid"))
        self.num_features = sum(chans)
        self.windows: list[tuple[int, ...] | None] = [None if w is None else tuple(w) for w in windows]
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier for `num_classes` classes (0: none)."""
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(self.fc, nn.Linear):
            init_classifier(self.fc)

    def pool(self, pathways: Sequence[Tensor]) -> Tensor:
        """Features (B, C_p, T_p, H, W) of each pathway to pooled ones (B, T', H', W', sum of C_p)."""
        pooled = []
        for x, window in zip(pathways, self.windows, strict=True):
            if window is None or window == tuple(x.shape[2:]):
                pooled.append(x.mean((2, 3, 4), keepdim=True))
            else:
                pooled.append(avg_pool3d(x, window, 1))
        return torch.cat(pooled, 1).permute(0, 2, 3, 4, 1)

    def position_logits(self, pathways: Sequence[Tensor]) -> Tensor:
        """Logits (B, T', H', W', K), or pooled features without a classifier."""
        return self.fc(self.dropout(self.pool(pathways)))

    def forward(self, pathways: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Features of each pathway to logits (B, K); with `pre_logits` to pooled features (B, sum of C_p)."""
        if pre_logits or not self.num_classes:
            return self.pool(pathways).mean((1, 2, 3))
        logits = self.position_logits(pathways)
        return logits.mean((1, 2, 3)) if self.training else mean_probabilities(logits, self.activation)


class RoIHead3d(nn.Module):
    """Classifies boxes of the middle frame: mean over time of each pathway, RoIAlign of the boxes, maximum over the
    aligned grid, concatenation, dropout, a linear classifier.

    Args:
        chans: of each pathway.
        num_classes: K.
        dropout: before the classifier.
        spatial_stride: of the features; 16 where res5 is dilated.
        resolution: side of the aligned grid.
        aligned: shift boxes by half a pixel, as RoIAlign should have from the beginning.
    """

    def __init__(
        self,
        chans: Sequence[int],
        num_classes: int,
        dropout: float = 0.5,
        spatial_stride: int = 16,
        resolution: int = 7,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.num_classes = sum(chans), num_classes
        self.spatial_stride, self.resolution, self.aligned = spatial_stride, resolution, aligned
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier for `num_classes` classes (0: none)."""
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(self.fc, nn.Linear):
            init_classifier(self.fc)

    def forward(self, pathways: Sequence[Tensor], boxes: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Features of each pathway and boxes to logits (N, K), or to features (N, sum of C_p) with `pre_logits`.

        Args:
            pathways: (B, C_p, T_p, H, W) each.
            boxes: for each of the B videos (N_b, 4): x1, y1, x2, y2 in pixels of the input. N is the sum of N_b.
            pre_logits: leave dropout and classifier out.
        """
        from torchvision.ops import roi_align

        rois = torch.cat([torch.cat([b.new_full((len(b), 1), float(i)), b], dim=1) for i, b in enumerate(boxes)]).to(
            pathways[0].dtype
        )
        pooled = []
        for x in pathways:
            grid = roi_align(
                x.mean(2), rois, self.resolution, 1 / self.spatial_stride, sampling_ratio=0, aligned=self.aligned
            )
            pooled.append(grid.amax((2, 3)))
        features = torch.cat(pooled, 1)
        return features if pre_logits else self.fc(self.dropout(features))


# ----------------------------------------------------------------------------------------------------------- networks


class VideoNetwork(nn.Module):
    """What all networks here share: timm's protocol, with videos (B, C, T, H, W) for images.

    A subclass has `head` and `forward_features(video) -> [features of each pathway]`.
    """

    head: PooledHead3d | RoIHead3d
    clip_shape: tuple[int, int, int, int]  # (C, T, S, S) of a training clip
    grad_checkpointing = False

    @property
    def num_features(self) -> int:
        return self.head.num_features

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier for `num_classes` classes (0: none)."""
        self.head.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    @property
    def export_part(self) -> str:
        """What an export holds: boxes come in any number, so that of a network for detection it is its features."""
        return "forward" if isinstance(self.head, PooledHead3d) else "forward_features"

    def example_inputs(self, count: int) -> dict[str, Tensor]:
        """Arguments of forward for so many clips, for an export."""
        return {"video": torch.randn(count, *self.clip_shape, generator=torch.Generator().manual_seed(0))}

    def forward_features(self, video: Any) -> list[Tensor]:
        raise NotImplementedError

    def forward_head(
        self, pathways: Sequence[Tensor], boxes: Sequence[Tensor] | None = None, pre_logits: bool = False
    ) -> Tensor:
        """Features of each pathway (and boxes, of a network for detection) to logits, or to pooled features."""
        if isinstance(self.head, PooledHead3d):
            return self.head(pathways, pre_logits)
        if boxes is None:
            raise ZooError("a network for detection wants the boxes that it is to classify")
        return self.head(pathways, boxes, pre_logits)

    def forward(self, video: Any, boxes: Sequence[Tensor] | None = None) -> Tensor:
        """A video (B, C, T, H, W) to logits (B, K), or with boxes (N_b, 4) for each video to logits (sum of N_b, K)."""
        return self.forward_head(self.forward_features(video), boxes)


class ResNet3d(VideoNetwork):
    """One pathway with its head: Slow, Fast alone, C2D, I3D.

    Args:
        num_frames, crop_size: of a training clip; they fix the window that the head pools.
        num_classes, dropout, activation: of the head.
        detection: classify boxes instead of clips; give res5 stride 1 and dilation 2 then.
        aligned: RoIAlign of the boxes with the half-pixel shift.
        global_pool: pool all positions instead of a fixed window.
        grad_checkpointing: see :meth:`set_grad_checkpointing`.
        pathway: arguments of :class:`Pathway3d`.
    """

    def __init__(
        self,
        num_frames: int = 8,
        crop_size: int = 224,
        num_classes: int = 400,
        dropout: float = 0.5,
        activation: Activation = "softmax",
        detection: bool = False,
        aligned: bool = True,
        global_pool: bool = False,
        grad_checkpointing: bool = False,
        **pathway: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        self.clip_shape = (pathway.get("in_chans", 3), num_frames, crop_size, crop_size)
        self.pathway = Pathway3d(**pathway)
        frames = num_frames // self.pathway.temporal_pool
        self.head = make_head(
            [self.pathway],
            [frames],
            crop_size,
            num_classes,
            dropout,
            activation,
            detection,
            aligned,
            global_pool,
        )
        init_resnet3d(self)

    def forward_features(self, video: Any) -> list[Tensor]:
        """A video (B, C, T, H, W) to [features (B, C', T, h, w)]."""
        return [self.pathway(video, self.grad_checkpointing and self.training)]


def make_head(
    pathways: Sequence[Pathway3d],
    frames: Sequence[int],
    crop_size: int,
    num_classes: int,
    dropout: float,
    activation: Activation,
    detection: bool,
    aligned: bool,
    global_pool: bool = False,
) -> PooledHead3d | RoIHead3d:
    """The head over `pathways` whose features have `frames` frames, for training crops of `crop_size`."""
    chans = [pathway.out_chans[-1] for pathway in pathways]
    stride = pathways[0].spatial_stride
    if detection:
        return RoIHead3d(chans, num_classes, dropout, stride, aligned=aligned)
    side = crop_size // stride
    if side < 1:
        raise ZooError(f"crop_size {crop_size} is smaller than the network's stride, {stride}")
    windows = [None if global_pool else (time, side, side) for time in frames]
    return PooledHead3d(chans, windows, num_classes, dropout, activation)
