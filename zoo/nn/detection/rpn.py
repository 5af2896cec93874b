"""The region proposal network (Faster R-CNN, section 3.1), with detectron2's numerics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import batched_nms

from zoo.errors import ZooError
from zoo.ops.boxes import (
    BoxLoss,
    Permute,
    Weights,
    at_least_float32,
    box_loss,
    cell_anchors,
    clip_boxes,
    decode_boxes,
    grid_anchors,
    match,
    nonempty,
    pairwise_iou,
    sample_labels,
)

Sizes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class RPNConfig:
    """Anchors, head, training samples and proposals.

    Args:
        levels: the maps it looks at; null for all of the backbone's.
        sizes: the anchors' sides in pixels, for each level or once for all.
        ratios: their heights over widths, likewise.
        offset: the anchors' place in a cell, in strides.
        conv_channels: outputs of the head's 3x3 convolutions; -1 for as many as inputs.
        box_weights: of the deltas.
        thresholds, labels: overlaps that part negative, ignored and positive anchors.
        samples: anchors an image that enter the loss, of which `positive_fraction` may be positive.
        boundary: anchors that leave the image by more pixels are ignored; null for none.
        pre_nms: best proposals a level before suppression, in training and evaluation.
        post_nms: best proposals an image after it, in training and evaluation.
        nms_threshold: overlap above which the lower of two proposals of a level is dropped.
        min_size: proposals must have longer sides, in pixels.
        box_loss, beta: see :func:`zoo.ops.boxes.box_loss`.
        loss_weight, box_loss_weight: factors; the second for the box loss on top of the first.
    """

    levels: tuple[str, ...] | None = None
    sizes: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    ratios: tuple[tuple[float, ...], ...] = ((0.5, 1.0, 2.0),)
    offset: float = 0.0
    conv_channels: tuple[int, ...] = (-1,)
    box_weights: Weights = (1.0, 1.0, 1.0, 1.0)
    thresholds: tuple[float, ...] = (0.3, 0.7)
    labels: tuple[int, ...] = (0, -1, 1)
    samples: int = 256
    positive_fraction: float = 0.5
    boundary: float | None = None
    pre_nms: tuple[int, int] = (2000, 1000)
    post_nms: tuple[int, int] = (1000, 1000)
    nms_threshold: float = 0.7
    min_size: float = 0.0
    box_loss: BoxLoss = "smooth_l1"
    beta: float = 0.0
    loss_weight: float = 1.0
    box_loss_weight: float = 1.0


class AnchorGenerator(nn.Module):
    """Anchors of every level; see :func:`zoo.ops.boxes.cell_anchors` and :func:`zoo.ops.boxes.grid_anchors`.

    Args:
        strides: of the levels.
        sizes, ratios: for each level, or once for all.

    Raises:
        ZooError: `sizes` or `ratios` for another number of levels.
    """

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[Sequence[float]],
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.strides, self.offset = tuple(strides), offset
        count = len(self.strides)
        if not {len(sizes), len(ratios)} <= {1, count}:
            raise ZooError(f"anchors of {len(sizes)} sizes and {len(ratios)} ratios do not suit {count} levels")
        self.sizes = [tuple(map(float, entry)) for entry in (sizes if len(sizes) > 1 else [sizes[0]] * count)]
        self.ratios = [tuple(map(float, entry)) for entry in (ratios if len(ratios) > 1 else [ratios[0]] * count)]

    @property
    def per_cell(self) -> int:
        """Anchors a cell."""
        return len(self.sizes[0]) * len(self.ratios[0])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Anchors (H * W * A, 4) of each feature map (B, C, H, W), in at least float32."""
        made = []
        for x, sizes, ratios, stride in zip(features, self.sizes, self.ratios, self.strides, strict=True):
            # Rounded to float32 first, as the published networks have them: equal overlaps then stay equal.
            cells = cell_anchors(sizes, ratios, x.device).to(torch.promote_types(x.dtype, torch.float32))
            made.append(grid_anchors(cells, x.shape[-2:], stride, self.offset))
        return made


class RPNHead(nn.Module):
    """3x3 convolutions with ReLU, then an objectness logit and four deltas an anchor; shared by all levels."""

    def __init__(self, in_channels: int, anchors: int, conv_channels: Sequence[int] = (-1,)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for outputs in conv_channels:
            outputs = in_channels if outputs == -1 else outputs
            layers += [nn.Conv2d(in_channels, outputs, 3, padding=1), nn.ReLU(inplace=True)]
            in_channels = outputs
        self.conv = nn.Sequential(*layers)
        self.objectness_logits = nn.Conv2d(in_channels, anchors, 1)
        self.anchor_deltas = nn.Conv2d(in_channels, anchors * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (B, A, H, W) and deltas (B, 4 A, H, W) of each map (B, C, H, W)."""
        hidden = [self.conv(x) for x in features]
        return [self.objectness_logits(x) for x in hidden], [self.anchor_deltas(x) for x in hidden]


class Proposals(NamedTuple):
    """Proposals of one image, best first."""

    boxes: Tensor
    logits: Tensor


class RPN(nn.Module):
    """Proposals and, in training, the losses of their network.

    Args:
        backbone: says of its maps their `channels` and `strides`.
        config: all the rest.
    """

    def __init__(self, backbone: nn.Module, config: RPNConfig) -> None:
        super().__init__()
        below: Any = backbone
        self.config = config
        self.levels = tuple(config.levels or below.channels)
        strides = [below.strides[name] for name in self.levels]
        self.anchors = AnchorGenerator(strides, config.sizes, config.ratios, config.offset)
        self.head = RPNHead(below.channels[self.levels[0]], self.anchors.per_cell, config.conv_channels)

    def forward(
        self,
        features: Mapping[str, Tensor],
        sizes: Sizes,
        targets: Sequence[Mapping[str, Any]] | None,
        permute: Permute,
    ) -> tuple[list[Proposals], dict[str, Tensor]]:
        """Proposals of each image, and the losses if there are `targets`.

        Args:
            features: the backbone's maps.
            sizes: (height, width) of each image inside the padding.
            targets: dicts with `boxes` (N, 4).
            permute: draws the samples; for each image in turn, the positives' permutation, then the negatives'.
        """
        maps = [features[name] for name in self.levels]
        logits, deltas = self.head(maps)
        anchors = self.anchors(maps)
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas]
        losses = {} if targets is None else self.losses(anchors, logits, deltas, sizes, targets, permute)
        with torch.no_grad():
            return self.propose(anchors, logits, deltas, sizes), losses

    @torch.no_grad()
    def sample(
        self, anchors: Tensor, sizes: Sizes, targets: Sequence[Mapping[str, Any]], permute: Permute
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which anchors (R, 4) of each image enter the loss.

        Returns:
            Indices into the images' anchors one after another, (P,) of positives and (Q,) of negatives; the positives'
            anchors (P, 4) and the boxes (P, 4) that they are to become.
        """
        config = self.config
        positives, negatives, chosen, boxes = [], [], [], []
        for image, (size, target) in enumerate(zip(sizes, targets, strict=True)):
            truth = target["boxes"].to(anchors.dtype)
            index, labels = match(pairwise_iou(truth, anchors), config.thresholds, config.labels, low_quality=True)
            if config.boundary is not None:
                height, width = size
                limit = anchors.new_tensor([width, height]) + config.boundary
                inside = (anchors[:, :2] >= -config.boundary).all(dim=1) & (anchors[:, 2:] < limit).all(dim=1)
                labels[~inside] = -1
            positive, negative = sample_labels(labels, config.samples, config.positive_fraction, 0, permute)
            positives.append(positive + image * len(anchors))
            negatives.append(negative + image * len(anchors))
            chosen.append(anchors[positive])
            boxes.append(truth[index[positive]] if len(truth) else truth)
        return torch.cat(positives), torch.cat(negatives), torch.cat(chosen), torch.cat(boxes)

    def losses(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        sizes: Sizes,
        targets: Sequence[Mapping[str, Any]],
        permute: Permute,
    ) -> dict[str, Tensor]:
        """`loss_rpn_cls` and `loss_rpn_loc`, each over (samples x images), whatever was there to sample."""
        config = self.config
        positive, negative, chosen, boxes = self.sample(torch.cat(list(anchors)), sizes, targets, permute)
        scores = at_least_float32(torch.cat(list(logits), dim=1).flatten()[torch.cat([positive, negative])])
        labels = torch.zeros_like(scores)
        labels[: len(positive)] = 1
        predicted = torch.cat(list(deltas), dim=1).flatten(0, 1)[positive]
        objectness = binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        regression = box_loss(predicted, boxes, chosen, config.box_weights, config.box_loss, config.beta)
        count = config.samples * len(targets)
        return {
            "loss_rpn_cls": objectness * (config.loss_weight / count),
            "loss_rpn_loc": regression * (config.loss_weight * config.box_loss_weight / count),
        }

    def propose(
        self, anchors: Sequence[Tensor], logits: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Sizes
    ) -> list[Proposals]:
        """The best boxes of each image: the top of each level, suppressed within the level, then the top of all.

        Raises:
            ZooError: in training, a box or logit that is not finite.
        """
        config, evaluation = self.config, int(not self.training)
        boxes, scores, levels = [], [], []
        for level, (cells, values, shifts) in enumerate(zip(anchors, logits, deltas, strict=True)):
            best, index = at_least_float32(values).topk(min(values.shape[1], config.pre_nms[evaluation]), dim=1)
            taken = shifts.gather(1, index[:, :, None].expand(-1, -1, 4))
            boxes.append(decode_boxes(taken, cells[index], config.box_weights))
            scores.append(best)
            levels.append(torch.full_like(index[0], level))
        all_boxes, all_scores, level_of = torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(levels)
        finite = all_boxes.isfinite().all(dim=2) & all_scores.isfinite()
        if self.training and not finite.all():
            raise ZooError("a proposal is not finite: the training has diverged; lower the learning rate")
        proposals = []
        for image, size in enumerate(sizes):
            candidates = clip_boxes(all_boxes[image], size)
            keep = nonempty(candidates, config.min_size) & finite[image]
            candidates, values = candidates[keep], all_scores[image][keep]
            kept = batched_nms(candidates, values, level_of[keep], config.nms_threshold)
            kept = kept[: config.post_nms[evaluation]]
            proposals.append(Proposals(candidates[kept], values[kept]))
        return proposals
