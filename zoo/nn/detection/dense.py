"""What single-stage detectors share: subnets over all levels of a pyramid, anchors, their matching, and inference.

R anchors of all levels are ordered by level, row, column, anchor of the cell; K classes 0..K-1, the background is K.
Numerics are detectron2's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from zoo.errors import ZooError, unknown
from zoo.nn.detection.backbone import Norm, norm_layer
from zoo.nn.detection.results import postprocess
from zoo.nn.detection.rpn import AnchorGenerator, Sizes
from zoo.ops.boxes import (
    Weights,
    at_least_float32,
    cell_anchors,
    clip_boxes,
    decode_boxes,
    grid_anchors,
    match,
    pairwise_iou,
)

Detection = dict[str, Tensor]
Convention = Literal["exact", "torchvision", "detectron"]

# --------------------------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class DenseHeadConfig:
    """Two subnets, of classes and of boxes.

    Args:
        convs: 3x3 convolutions of each, before the last.
        channels: of them; -1 for as many as the pyramid's.
        norm: after each; `bn` keeps statistics of its own for each level; null for none.
        bias: of convolutions that a norm follows.
        prior: probability of every class at the start.
    """

    convs: int = 4
    channels: int = -1
    norm: Norm | None = None
    bias: bool = True
    prior: float = 0.01


class LevelBatchNorm(nn.Module):
    """BatchNorm whose statistics are each level's own, and whose weight and bias are all levels'."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.BatchNorm2d(channels, affine=False) for _ in range(levels)])
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, level: int) -> Tensor:
        return self.levels[level](x) * self.weight[:, None, None] + self.bias[:, None, None]


class ConvSubnet(nn.Module):
    """3x3 convolutions with norm and ReLU, applied to every level (RetinaNet, section 4).

    Args:
        in_channels: of the levels.
        convs, channels, norm, bias: see :class:`DenseHeadConfig`.
        levels: their number.

    Attributes:
        out_channels: of what it gives.
    """

    def __init__(
        self,
        in_channels: int,
        convs: int = 4,
        channels: int = -1,
        norm: Norm | None = None,
        bias: bool = True,
        levels: int = 5,
    ) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        make: Any = norm_layer(norm)
        for _ in range(convs):
            outputs = in_channels if channels == -1 else channels
            self.convs.append(nn.Conv2d(in_channels, outputs, 3, padding=1, bias=bias or norm is None))
            if norm is not None:
                self.norms.append(LevelBatchNorm(outputs, levels) if norm == "bn" else make(outputs))
            in_channels = outputs
        self.out_channels = in_channels
        for conv in self.convs:
            small_normal(conv)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C', H, W) of the levels' (B, C, H, W)."""
        found = []
        for level, x in enumerate(features):
            for k, conv in enumerate(self.convs):
                x = conv(x)
                if len(self.norms):
                    norm = self.norms[k]
                    x = norm(x, level) if isinstance(norm, LevelBatchNorm) else norm(x)
                x = x.relu_()
            found.append(x)
        return found


def small_normal(conv: nn.Module, std: float = 0.01) -> None:
    """Initialises a convolution from N(0, std^2), and its bias from 0 (RetinaNet, section 4.1)."""
    nn.init.normal_(conv.weight, std=std)  # type: ignore[arg-type]
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


def prior_bias(conv: nn.Conv2d, prior: float) -> None:
    """Sets a convolution's bias so that its sigmoid starts at `prior`: -log((1 - pi) / pi) (section 3.3).

    Raises:
        ZooError: a prior that is not between 0 and 1.
    """
    if not 0 < prior < 1:
        raise ZooError(f"the prior is a probability between 0 and 1, not {prior}")
    nn.init.constant_(conv.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]


class DenseHead(nn.Module):
    """K logits and 4 deltas for each anchor of a cell, by two subnets that share nothing (RetinaNet, figure 3).

    Args:
        in_channels: of the levels.
        levels: their number.
        anchors: a cell's.
        num_classes: K.
        config: see :class:`DenseHeadConfig`.
    """

    def __init__(self, in_channels: int, levels: int, anchors: int, num_classes: int, config: DenseHeadConfig) -> None:
        super().__init__()
        self.cls_subnet, self.bbox_subnet = (
            ConvSubnet(in_channels, config.convs, config.channels, config.norm, config.bias, levels) for _ in range(2)
        )
        self.cls_score = nn.Conv2d(self.cls_subnet.out_channels, anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(self.bbox_subnet.out_channels, anchors * 4, 3, padding=1)
        small_normal(self.cls_score)
        small_normal(self.bbox_pred)
        prior_bias(self.cls_score, config.prior)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (B, A K, H, W) and deltas (B, A 4, H, W) of each level (B, C, H, W), anchors before classes."""
        logits = [self.cls_score(x) for x in self.cls_subnet(features)]
        return logits, [self.bbox_pred(x) for x in self.bbox_subnet(features)]


def flatten_level(x: Tensor, values: int) -> Tensor:
    """Predictions (B, A V, H, W) of one level as (B, H W A, V): `values` V for each anchor, in the anchors' order."""
    return x.unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def take_anchors(maps: Sequence[Tensor], values: int, image: Tensor, anchor: Tensor) -> Tensor:
    """Predictions (P, V) at some anchors of all levels, without a copy of the rest.

    Args:
        maps: (B, A V, H, W) of each level.
        values: V.
        image, anchor: (P,) which; `anchor` counts those of all levels.
    """
    found, places, start = [], [], 0
    for x in maps:
        x = x.unflatten(1, (-1, values))
        per_cell, width = x.shape[1], x.shape[-1]
        count = per_cell * x.shape[-2] * width
        place = ((anchor >= start) & (anchor < start + count)).nonzero()[:, 0]
        inside = anchor[place] - start
        cell = inside // per_cell
        found.append(x[image[place], inside % per_cell, :, cell // width, cell % width])
        places.append(place)
        start += count
    return torch.cat(found)[torch.cat(places).argsort()]


# ------------------------------------------------------------------------------------------------------------- anchors


@dataclass(frozen=True)
class DenseAnchorConfig:
    """Anchors.

    Args:
        sizes: sides in pixels, for each level or once for all.
        scales_per_octave: n; each size s gives s 2^(k/n), k = 0..n-1.
        ratios: their heights over widths, for each level or once for all.
        offset: the place of a cell's centre in strides.
        convention: `exact`, or as others' published networks have it: `torchvision` cuts sizes to integers, rounds
            corners, and takes the image's side // cells for a level's stride; `detectron` rounds the width and height
            that a ratio has at the level's stride, before they are scaled (its anchors have an offset of 0.5).

    Raises:
        ZooError: an unknown convention, or numbers out of range.
    """

    sizes: tuple[tuple[float, ...], ...] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    scales_per_octave: int = 3
    ratios: tuple[tuple[float, ...], ...] = ((0.5, 1.0, 2.0),)
    offset: float = 0.0
    convention: Convention = "exact"

    def __post_init__(self) -> None:
        if self.convention not in get_args(Convention):
            raise unknown("convention of anchors", self.convention, get_args(Convention))
        if self.scales_per_octave < 1:
            raise ZooError(f"anchors want one scale an octave or more, not {self.scales_per_octave}")
        if not all(value > 0 for given in (*self.sizes, *self.ratios) for value in given):
            raise ZooError("sizes and ratios of anchors are more than 0")


class DenseAnchors(AnchorGenerator):
    """Anchors of several scales an octave.

    Args:
        strides: of the levels.
        config: all the rest.
    """

    def __init__(self, strides: Sequence[int], config: DenseAnchorConfig) -> None:
        count = config.scales_per_octave
        sizes = [[size * 2 ** (k / count) for size in level for k in range(count)] for level in config.sizes]
        if config.convention == "torchvision":
            sizes = [[float(int(size)) for size in level] for level in sizes]
        super().__init__(strides, sizes, config.ratios, config.offset)
        self.convention = config.convention

    def _cells(self, level: int, device: torch.device) -> Tensor:
        sizes, ratios, stride = self.sizes[level], self.ratios[level], self.strides[level]
        if self.convention == "torchvision":
            return cell_anchors(sizes, ratios, device).round()
        if self.convention == "detectron":
            sides = torch.tensor([round(math.sqrt(stride**2 / ratio)) for ratio in ratios], dtype=torch.float64)
            heights = (sides * torch.tensor(ratios, dtype=torch.float64)).round()
            scale = torch.tensor(sizes, dtype=torch.float64)[:, None] / stride / 2
            half = torch.stack([scale * sides, scale * heights], dim=-1).flatten(0, 1)
            return torch.cat([-half, half], dim=1).to(device, torch.float32)
        return cell_anchors(sizes, ratios, device)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Anchors (H * W * A, 4) of each feature map (B, C, H, W), in at least float32."""
        made = []
        for level, (x, stride) in enumerate(zip(features, self.strides, strict=True)):
            cells = self._cells(level, x.device).to(torch.promote_types(x.dtype, torch.float32))
            steps: tuple[int, int] = (stride, stride)
            if self.convention == "torchvision":  # the first level's stride divides the image
                whole = [side * self.strides[0] for side in features[0].shape[-2:]]
                steps = (whole[0] // x.shape[-2], whole[1] // x.shape[-1])
            made.append(grid_anchors(cells, x.shape[-2:], steps, self.offset))
        return made


# ------------------------------------------------------------------------------------------------------------ matching


class Assigned(NamedTuple):
    """What each of R anchors of B images is to become.

    labels: (B, R) its class; K for background, -1 for ignored.
    objects: (B, R) the index of the object that it overlaps most.
    """

    labels: Tensor
    objects: Tensor

    def positives(self, num_classes: int) -> tuple[Tensor, Tensor]:
        """(image, anchor) of the P positives, (P,) each."""
        image, anchor = ((self.labels >= 0) & (self.labels < num_classes)).nonzero(as_tuple=True)
        return image, anchor

    def boxes(self, targets: Sequence[Mapping[str, Any]], image: Tensor, anchor: Tensor) -> Tensor:
        """The boxes (P, 4) that the anchors at (`image`, `anchor`), in this order of the images, are to become."""
        counts = torch.bincount(image, minlength=len(targets)).tolist()
        taken = self.objects[image, anchor].split(counts)
        return torch.cat([target["boxes"][index] for target, index in zip(targets, taken, strict=True)])


@torch.no_grad()
def assign_anchors(
    anchors: Tensor,
    targets: Sequence[Mapping[str, Any]],
    num_classes: int,
    thresholds: Sequence[float] = (0.4, 0.5),
    labels: Sequence[int] = (0, -1, 1),
    low_quality: bool = True,
) -> Assigned:
    """Matches anchors (R, 4) to each image's objects; see :func:`zoo.ops.boxes.match`.

    Args:
        anchors: of all levels.
        targets: dicts of `boxes` (N, 4) and `labels` (N,).
        num_classes: K.
        thresholds, labels, low_quality: as of `match`.
    """
    classes, objects = [], []
    for target in targets:
        iou = pairwise_iou(target["boxes"].float(), anchors.float())  # as in detectron2: rounding decides among equals
        index, label = match(iou, thresholds, labels, low_quality)
        found = target["labels"][index] if len(target["labels"]) else torch.full_like(index, num_classes)
        classes.append(found.masked_fill(label == 0, num_classes).masked_fill(label == -1, -1))
        objects.append(index)
    return Assigned(torch.stack(classes), torch.stack(objects))


# ----------------------------------------------------------------------------------------------------------- inference


@dataclass(frozen=True)
class DenseInferenceConfig:
    """What is reported.

    Args:
        score_threshold: of a class.
        candidates: best pairs of anchor and class, of each level.
        nms_threshold: overlap within a class above which the lower is dropped.
        detections: best of an image.
        last_threshold: of the last level instead of `score_threshold`; null for the same (Detectron: 0).
        clip: cut boxes off at the image before the suppression instead of after it (torchvision, Detectron).
        pixel_borders: see :func:`zoo.nn.detection.results.postprocess` (Detectron).
    """

    score_threshold: float = 0.05
    candidates: int = 1000
    nms_threshold: float = 0.5
    detections: int = 100
    last_threshold: float | None = None
    clip: bool = False
    pixel_borders: bool = False


def _logit(probability: float) -> float:
    if not 0 < probability < 1:
        return -math.inf if probability <= 0 else math.inf
    return math.log(probability / (1 - probability))


def candidates(logits: Tensor, threshold: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of anchor and class of logits (R, K), those above a `threshold` of the probability.

    Returns:
        Their scores, best first, anchors and classes, (N,) each, N <= `most`.
    """
    flat = logits.flatten()
    above = (flat > _logit(threshold)).nonzero()[:, 0]
    best, place = at_least_float32(flat[above]).topk(min(most, len(above)))
    pair = above[place]
    return best.sigmoid(), pair // logits.shape[1], pair % logits.shape[1]


def select_dense(
    anchors: Sequence[Tensor],
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    config: DenseInferenceConfig,
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
    size: tuple[int, int] | None = None,
) -> Detection:
    """One image's detections: the candidates of each level decoded, all suppressed within their class, the best kept.

    Args:
        anchors: (R_l, 4) of each level l.
        logits: (R_l, K).
        deltas: (R_l, 4).
        config: how many.
        weights: of the deltas.
        size: (height, width) to cut boxes off at; None for not at all.

    Returns:
        A dict of `boxes` (N, 4), `scores`, `labels`, best first, and `anchors` (N,), the index of
        each among all anchors.
    """
    boxes, scores, labels, places, start = [], [], [], [], 0
    for level, (cells, values, shifts) in enumerate(zip(anchors, logits, deltas, strict=True)):
        last = level == len(anchors) - 1 and config.last_threshold is not None
        threshold = config.last_threshold if last else config.score_threshold
        best, anchor, label = candidates(values, threshold, config.candidates)  # type: ignore[arg-type]
        found = decode_boxes(shifts[anchor], cells[anchor], weights)
        boxes.append(found if size is None else clip_boxes(found, size))
        scores.append(best)
        labels.append(label)
        places.append(anchor + start)
        start += len(cells)
    found, values, label, place = torch.cat(boxes), torch.cat(scores), torch.cat(labels), torch.cat(places)
    kept = batched_nms(found, values, label, config.nms_threshold)[: config.detections]
    return {"boxes": found[kept], "scores": values[kept], "labels": label[kept], "anchors": place[kept]}


class DenseDetector(nn.Module):
    """Images to losses in training, and to detections in evaluation, as :class:`zoo.nn.detection.rcnn.RCNN`.

    A subclass gives :meth:`losses` and :meth:`detect`.

    Args:
        backbone: images to maps; see :mod:`zoo.nn.detection.backbone`.
        pixel_borders: see :func:`zoo.nn.detection.results.postprocess`.
    """

    export_part = "backbone"
    not_exported = "gives as many detections as it finds"

    def __init__(self, backbone: nn.Module, pixel_borders: bool = False) -> None:
        super().__init__()
        self.backbone, self.pixel_borders = backbone, pixel_borders

    @property
    def size_divisibility(self) -> int:
        """What the sides of a padded batch must be multiples of."""
        below: Any = self.backbone
        return max(below.bottom_up.strides.values())

    def forward(self, batch: Mapping[str, Any], noise: Tensor | None = None) -> Any:
        """Losses by name in training mode, else a list of detections in the pixels of `original_size`.

        Args:
            batch: as of :meth:`zoo.nn.detection.rcnn.RCNN.forward`.
            noise: not used: no samples are drawn.

        Raises:
            ZooError: training without targets.
        """
        if not self.training:
            sizes = batch["size"].tolist()
            originals = batch["original_size"].tolist() if "original_size" in batch else sizes
            found = zip(self.detect(batch), sizes, originals, strict=True)
            return [self.postprocess(detection, size, original) for detection, size, original in found]
        if "target" not in batch:
            raise ZooError("a detector trains on batches with `target`, a list of dicts of boxes and labels")
        return self.losses(batch)

    def postprocess(self, detection: Detection, size: tuple[int, int], original: tuple[int, int]) -> Detection:
        """A detection in the network's input as one in the file; see :func:`zoo.nn.detection.results.postprocess`."""
        return postprocess(detection, size, original, self.pixel_borders)

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses by name of a batch with targets."""
        raise NotImplementedError

    def detect(self, batch: Mapping[str, Any]) -> list[Detection]:
        """Detections of each image in the pixels of the network's input."""
        raise NotImplementedError


def pairs(sizes: Tensor) -> Sizes:
    """(height, width) of each image, of sizes (B, 2)."""
    return [(height, width) for height, width in sizes.tolist()]
