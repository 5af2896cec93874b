"""TensorMask: A Foundation for Dense Object Segmentation.

Xinlei Chen, Ross Girshick, Kaiming He, Piotr Dollár. ICCV 2019, arXiv 1903.12174.

Instance segmentation without regions: at every cell of a feature pyramid, for each of two window sizes, a network
predicts class, box and mask of an object in the middle of the window. Masks are tensors of four axes, two of the map
and two of the mask, each pair with a unit of length; so they may be predicted where it suits (*aligned*: what lies at a
cell, said of every window over it) and read where they are needed (*natural*: a cell's own window). In the *tensor
bipyramid* the mask of a level l has 2^l times the pixels a side, since a window of that level is as much larger: all
masks are predicted on the finest map, and a swap of the two pairs' units brings them to their levels.

Conventions: boxes (x1, y1, x2, y2) in continuous pixels; K classes 0..K-1; maps p2..p7 of stride 4 to 128. The window
of cell (y, x) has its centre at (x, y) strides. The unit of a level is its stride; V is a window's side on the finest
level in units, and of as many pixels is its mask there (11 and 15 of 44 and 60 pixels). Numerics and training are
detectron2's, whose published weights load; where they differ from the paper, the card's ledger says so.

Where the parts are: operators on tensors of masks in :mod:`zoo.ops.tensor_masks`, subnets and all that dense detectors
share in :mod:`zoo.nn.detection.dense`, FL* in :mod:`zoo.ops.focal`.

Deviations from detectron2's code, none of which changes a value beyond rounding:
- No CUDA is needed. Nor are the tensors of all windows made: in training the masks of the positive windows are
  computed, in inference those of the detections; the swap is linear, so that the last layer's weights are interpolated.
- The finest map is fused with those levels alone that have such windows.
- FL* is summed with every pair of window and class as a negative, and the positives are put right.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from zoo.errors import ZooError
from zoo.nn.detection import (
    FPN,
    AnchorGenerator,
    ConvTop,
    DenseDetector,
    DenseInferenceConfig,
    FPNConfig,
    ResNetBackbone,
    ResNetConfig,
    configured,
)
from zoo.nn.detection.dense import ConvSubnet, flatten_level, prior_bias, select_dense, small_normal
from zoo.ops.boxes import Weights, at_least_float32, box_loss, clip_boxes, nonempty
from zoo.ops.focal import class_weights, focal_star_term
from zoo.ops.masks import crop_objects, paste_masks
from zoo.ops.tensor_masks import Interpolation, align2nat, aligned_windows, swap_align2nat, upscale_masks
from zoo.training import Optim
from zoo.training.detection import Detection
from zoo.weights import detectron2
from zoo.weights.pretrained import read_source

# ------------------------------------------------------------------------------------------------------- 1. functions


def assign_windows(
    boxes: Tensor,
    windows: Tensor,
    units: Tensor,
    least: float,
    scale: float = 2.0,
    distance: float = 1.0,
    unique: bool = True,
) -> tuple[Tensor, Tensor]:
    """Whose object is each window's to find (section 4.1); no overlap is measured.

    A window is an object's if it contains the whole of it; if, less one unit, it is no larger than `scale` times the
    object's longer side, nor than `least`; and if their centres are no more than `distance` units apart.

    Args:
        boxes: (N, 4) of the objects.
        windows: (R, 4).
        units: (R,) of length, the stride of each window's level.
        least: a bound that small objects have at least, in pixels.
        scale, distance: as above.
        unique: a window that is several objects' is negative; else it is ignored.

    Returns:
        The index of each window's object (R,), the first of several, and its label (R,): 1, 0, or -1 for ignored.
    """
    if not len(boxes):
        nothing = torch.zeros(len(windows), dtype=torch.int64, device=windows.device)
        return nothing, nothing
    contained = (boxes[:, None, :2] >= windows[:, :2]).all(dim=2) & (boxes[:, None, 2:] <= windows[:, 2:]).all(dim=2)
    largest = ((boxes[:, 2:] - boxes[:, :2]).amax(dim=1) * scale).clamp(min=least)
    fitting = (windows[:, 2:] - windows[:, :2]).amax(dim=1) - units <= largest[:, None]
    centre, middle = (boxes[:, :2] + boxes[:, 2:]) / 2, (windows[:, :2] + windows[:, 2:]) / 2
    apart = (centre[:, None] - middle) / units[:, None]
    owned = contained & fitting & (apart.square().sum(dim=2) <= distance**2)
    count = owned.sum(dim=0)
    labels = (count > 0).long()
    labels[count > 1] = 0 if unique else -1
    return owned.int().argmax(dim=0), labels


def given_windows(boxes: Tensor, windows: Tensor) -> Tensor:
    """Of `windows` (R, 4) the one to draw each of the `boxes` (N, 4) in: the smallest that contains it, of these the
    nearest; where none does, the largest, nearest. Indices (N,)."""
    sides = (windows[:, 2:] - windows[:, :2]).amax(dim=1)
    contained = (boxes[:, None, :2] >= windows[:, :2]).all(dim=2) & (boxes[:, None, 2:] <= windows[:, 2:]).all(dim=2)
    size = torch.where(contained, sides, 2 * sides.max() - sides + 1)
    apart = (boxes[:, None, :2] + boxes[:, None, 2:] - windows[:, :2] - windows[:, 2:]).square().sum(dim=2)
    smallest = size == size.amin(dim=1, keepdim=True)
    return apart.masked_fill(~smallest, torch.inf).argmin(dim=1)


# --------------------------------------------------------------------------------------------------------- 2. network


@dataclass(frozen=True)
class WindowConfig:
    """Sliding windows, and which of them are an object's.

    Args:
        levels: the maps they slide over.
        sizes: their sides in pixels, for each level; those of the first are V units long.
        scale, distance: see :func:`assign_windows`.
    """

    levels: tuple[str, ...] = ("p2", "p3", "p4", "p5", "p6", "p7")
    sizes: tuple[tuple[float, ...], ...] = ((44, 60), (88, 120), (176, 240), (352, 480), (704, 960), (1408, 1920))
    scale: float = 2.0
    distance: float = 1.0


@dataclass(frozen=True)
class HeadConfig:
    """Three subnets, of classes, boxes and masks (section 4).

    Args:
        convs: 3x3 convolutions of each, before the last.
        cls_channels, box_channels, mask_channels: of them.
        prior: probability of every class at the start.
        masks: whether there are masks.
        aligned: predict masks in the aligned representation, else in the natural one (figure 6).
        bipyramid: masks with more pixels on coarser levels; else V on all of them.
        upscale: without a bipyramid, how many times fewer pixels a side are predicted than a mask has (Table 2a).
        interpolation: of these.
    """

    convs: int = 4
    cls_channels: int = 256
    box_channels: int = 128
    mask_channels: int = 128
    prior: float = 0.01
    masks: bool = True
    aligned: bool = True
    bipyramid: bool = True
    upscale: float = 1.0
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.bipyramid and not (self.aligned and self.upscale == 1):
            raise ZooError("a tensor bipyramid has aligned masks and no further upscaling")


@dataclass(frozen=True)
class LossConfig:
    """Three losses, summed; each over the number of positive windows of the batch.

    Args:
        alpha, gamma: of FL*; alpha null for no weights.
        box_weights: of the deltas.
        mask_weight: of the masks' loss.
        positive_weight: of the pixels on an object.
    """

    alpha: float | None = 0.3
    gamma: float = 3.0
    box_weights: Weights = (1.5, 1.5, 0.75, 0.75)
    mask_weight: float = 2.0
    positive_weight: float = 1.5

    def __post_init__(self) -> None:
        if self.gamma <= 0 or not 0 <= (self.alpha or 0) <= 1:
            raise ZooError(f"gamma is more than 0, alpha null or from 0 to 1; got {self.gamma} and {self.alpha}")


class Cells(NamedTuple):
    """Windows by place, (P,) each."""

    level: Tensor
    image: Tensor
    row: Tensor
    column: Tensor
    window: Tensor

    def groups(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """For each level and window size that is there: these, which of the P, and their image, row, column (p, 3)."""
        found = torch.stack([self.level, self.window], dim=1)
        where = torch.stack([self.image, self.row, self.column], dim=1)
        for level, window in found.unique(dim=0).tolist():
            index = ((self.level == level) & (self.window == window)).nonzero()[:, 0]
            yield level, window, index, where[index]


class TensorMaskHead(nn.Module):
    """Classes, boxes and masks of all windows.

    Args:
        in_channels: of the levels.
        strides: of the levels, from fine to coarse.
        sides: V of each window size.
        num_classes: K.
        config: see :class:`HeadConfig`.
    """

    def __init__(
        self, in_channels: int, strides: Sequence[int], sides: Sequence[int], num_classes: int, config: HeadConfig
    ) -> None:
        super().__init__()
        self.config, self.sides, count = config, tuple(sides), len(sides)
        self.factors = [stride // strides[0] for stride in strides]
        self.cls_subnet = ConvSubnet(in_channels, config.convs, config.cls_channels)
        self.bbox_subnet = ConvSubnet(in_channels, config.convs, config.box_channels)
        self.cls_score = nn.Conv2d(self.cls_subnet.out_channels, count * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(self.bbox_subnet.out_channels, count * 4, 3, padding=1)
        made = [self.cls_score, self.bbox_pred]
        if config.masks:
            self.mask_subnet = ConvSubnet(in_channels, config.convs, config.mask_channels)
            channels = self.mask_subnet.out_channels
            if config.bipyramid:
                self.mask_fuse = nn.Conv2d(channels, channels, 3, padding=1)
                made.append(self.mask_fuse)
            predicted = {str(side): round(side / config.upscale) ** 2 for side in sides}
            if len(predicted) < count:
                raise ZooError(f"two windows have masks of one size: {self.sides}")
            self.mask_pred = nn.ModuleDict({side: nn.Conv2d(channels, n, 1) for side, n in predicted.items()})
            made += [self.mask_pred[side] for side in predicted]  # type: ignore[misc]
        for conv in made:
            small_normal(conv)
        prior_bias(self.cls_score, config.prior)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (B, A K, H, W) and deltas (B, A 4, H, W) of each level (B, C, H, W), of A windows a cell."""
        logits = [self.cls_score(x) for x in self.cls_subnet(features)]
        return logits, [self.bbox_pred(x) for x in self.bbox_subnet(features)]

    def size(self, level: int, window: int) -> int:
        """Pixels a side of the masks of a window on a level."""
        return self.sides[window] * (self.factors[level] if self.config.bipyramid else 1)

    def mask_maps(self, features: Sequence[Tensor], levels: Collection[int]) -> dict[int, Tensor]:
        """The maps that masks of some levels are predicted on: the levels' own (B, C, H, W), or, in a bipyramid, as
        large as the finest level."""
        if not self.config.bipyramid:
            return {level: self.mask_subnet([features[level]])[0] for level in levels}
        if not levels:
            return {}
        (finest,) = self.mask_subnet(features[:1])
        height, width = finest.shape[-2:]
        maps = {}
        for level in levels:
            x = finest if level == 0 else self.mask_subnet([features[level]])[0]
            if level:
                scale = float(self.factors[level])
                x = interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)[..., :height, :width]
            maps[level] = self.mask_fuse(x + finest).relu_()
        return maps

    def masks(self, mask_map: Tensor, level: int, window: int, cells: Tensor) -> Tensor:
        """Mask logits (P, S, S) of a window size at some `cells` (P, 3), image, row, column, of a level."""
        config, size = self.config, self.size(level, window)
        layer: Any = self.mask_pred[str(self.sides[window])]
        if config.aligned:
            stride = self.factors[level] if config.bipyramid else 1
            mode = config.interpolation
            return aligned_windows(mask_map, layer.weight, layer.bias, cells, size, stride, mode=mode)
        image, row, column = cells.T
        found = layer(at_least_float32(mask_map[image, :, row, column])[..., None, None])
        return upscale_masks(found, size, mode=config.interpolation).view(-1, size, size)

    def natural_masks(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors of all windows in the natural representation, (B, S * S, H, W) of each level and window size."""
        config, found = self.config, []
        for level, x in self.mask_maps(features, range(len(features))).items():
            tensors = []
            for window, side in enumerate(self.sides):
                masks = self.mask_pred[str(side)](x)
                if config.bipyramid:
                    masks = swap_align2nat(masks, self.factors[level])
                else:
                    masks = upscale_masks(masks, self.size(level, window), mode=config.interpolation)
                    masks = align2nat(masks) if config.aligned else masks
                tensors.append(masks)
            found.append(tensors)
        return found


class TensorMask(DenseDetector):
    """A ResNet with a feature pyramid and a :class:`TensorMaskHead`.

    As it stands TensorMask R50. Every part is a config; in Python a mapping of its fields will do.

    Args:
        num_classes: K, without the background.
        resnet: the trunk.
        fpn: the pyramid; its levels are averaged, not summed, with those above them.
        top: whether p6 and p7 are made, of c5.
        windows: sizes, and the assignment of objects to them.
        head: subnets and the representation of masks.
        loss: of training.
        inference: what is reported; `candidates` are those of all levels together.

    Attributes:
        options: all of these, as they came to be.

    Raises:
        ZooError: an unknown option or name, or parts that do not go together.
    """

    def __init__(
        self,
        num_classes: int = 80,
        resnet: ResNetConfig = ResNetConfig(),  # noqa: B008
        fpn: FPNConfig = FPNConfig(fuse="avg"),  # noqa: B008
        top: bool = True,
        windows: WindowConfig = WindowConfig(),
        head: HeadConfig = HeadConfig(),
        loss: LossConfig = LossConfig(),
        inference: DenseInferenceConfig = DenseInferenceConfig(candidates=6000),  # noqa: B008
    ) -> None:
        resnet, fpn = configured(ResNetConfig, resnet), configured(FPNConfig, fpn)
        windows, head = configured(WindowConfig, windows), configured(HeadConfig, head)
        loss, inference = configured(LossConfig, loss), configured(DenseInferenceConfig, inference)
        if inference.clip or inference.pixel_borders or inference.last_threshold is not None:
            raise ZooError("clip, pixel_borders and last_threshold are of other detectors: TensorMask has none of them")
        trunk = ResNetBackbone(resnet, fpn.inputs)
        backbone = FPN(trunk, fpn, ConvTop(fpn.channels, trunk.channels["c5"]) if top else None)
        super().__init__(backbone)
        if missing := [name for name in windows.levels if name not in backbone.strides]:
            raise ZooError(f"the pyramid has no level {missing[0]}; it has {', '.join(backbone.strides)}")
        if len({len(sizes) for sizes in windows.sizes}) != 1 or len(windows.sizes) != len(windows.levels):
            raise ZooError(f"windows.sizes must name as many windows for each of the {len(windows.levels)} levels")
        strides = [backbone.strides[name] for name in windows.levels]
        sides = [int(size // strides[0]) for size in windows.sizes[0]]
        self.anchors = AnchorGenerator(strides, windows.sizes, ((1.0,),))
        self.head = TensorMaskHead(fpn.channels, strides, sides, num_classes, head)
        self.num_classes, self.windows, self.loss, self.inference = num_classes, windows, loss, inference
        parts = {"resnet": resnet, "fpn": fpn, "top": top, "windows": windows, "head": head, "loss": loss}
        self.options: dict[str, Any] = {"num_classes": num_classes, **parts, "inference": inference}

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What COCO measures of it."""
        return ("bbox", "segm") if self.head.config.masks else ("bbox",)

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps that windows slide over."""
        maps = self.backbone(images)
        return [maps[name] for name in self.windows.levels]

    def cells(self, features: Sequence[Tensor], image: Tensor, index: Tensor) -> Cells:
        """Where windows are that have an `index` (P,) among those of all levels, by level, row, column and size."""
        count = len(self.head.sides)
        lengths = torch.tensor([count * x.shape[-2] * x.shape[-1] for x in features], device=index.device)
        widths = torch.tensor([x.shape[-1] for x in features], device=index.device)
        ends = lengths.cumsum(0)
        level = torch.bucketize(index, ends, right=True)
        place = index - (ends - lengths)[level]
        cell = place // count
        return Cells(level, image, cell // widths[level], cell % widths[level], place % count)

    @torch.no_grad()
    def assign(
        self, anchors: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The P positive windows of a batch: their image and index among all windows, (P,) each, image by image; and
        the objects of each image's."""
        windows, strides = torch.cat(list(anchors)), self.anchors.strides
        units = torch.cat([x.new_full((len(x),), stride) for x, stride in zip(anchors, strides, strict=True)])
        rules = min(self.windows.sizes[0]) - strides[0], self.windows.scale, self.windows.distance
        places, objects = [], []
        for target in targets:
            index, labels = assign_windows(target["boxes"].to(windows.dtype), windows, units, *rules)
            places.append((labels == 1).nonzero()[:, 0])
            objects.append(index[places[-1]])
        image = torch.cat([torch.full_like(place, n) for n, place in enumerate(places)])
        return image, torch.cat(places), objects

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss_cls`, `loss_box_reg` and `loss_mask` (section 4.1), each over the number of positive windows."""
        config, targets = self.loss, batch["target"]
        features = self.features(batch["image"])
        logits, deltas = self.head(features)
        anchors = self.anchors(features)
        image, index, objects = self.assign(anchors, targets)
        cells, windows, count = self.cells(features, image, index), torch.cat(anchors)[index], max(1, len(index))
        classes, boxes = (
            torch.cat([target[key][found] for target, found in zip(targets, objects, strict=True)])
            for key in ("labels", "boxes")
        )
        classification = torch.stack([self._negative(x) for x in logits]).sum()
        regression = at_least_float32(deltas[0]).sum() * 0
        for level in cells.level.unique().tolist():
            at = (cells.level == level).nonzero()[:, 0]
            where = cells.image[at], cells.window[at]
            values = logits[level].unflatten(1, (-1, self.num_classes))
            values = values[(*where, classes[at], cells.row[at], cells.column[at])]
            right = class_weights(config.alpha)[0] * focal_star_term(-values, config.gamma).sum()
            classification = classification + right - self._negative(values)
            moves = deltas[level].unflatten(1, (-1, 4))[(*where, slice(None), cells.row[at], cells.column[at])]
            regression = regression + box_loss(moves, boxes[at], windows[at], config.box_weights)
        found = {"loss_cls": classification / count, "loss_box_reg": regression / count}
        if self.head.config.masks:
            found["loss_mask"] = self._mask_loss(features, cells, windows, objects, targets) / count
        return found

    def _negative(self, logits: Tensor) -> Tensor:
        return class_weights(self.loss.alpha)[1] * focal_star_term(logits, self.loss.gamma).sum()

    def _mask_loss(
        self,
        features: Sequence[Tensor],
        cells: Cells,
        windows: Tensor,
        objects: Sequence[Tensor],
        targets: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """Twice the mean binary cross entropy of each positive window's mask, summed; an object's pixels count more."""
        total = features[0].new_zeros((), dtype=at_least_float32(features[0]).dtype)
        positive = total.new_tensor(self.loss.positive_weight)
        maps, owners = self.head.mask_maps(features, cells.level.unique().tolist()), torch.cat(list(objects))
        for level, window, at, where in cells.groups():
            logits = self.head.masks(maps[level], level, window, where)
            size, shares = logits.shape[-1], torch.bincount(where[:, 0], minlength=len(targets)).tolist()
            parts = zip(targets, owners[at].split(shares), windows[at].split(shares), strict=True)
            wanted = torch.cat([crop_objects(target, mine, seen, size) for target, mine, seen in parts if len(mine)])
            loss = binary_cross_entropy_with_logits(logits, wanted.to(logits), reduction="sum", pos_weight=positive)
            total = total + loss * (self.loss.mask_weight / size**2)
        # Every layer has its part in the graph, whichever windows are positive: processes wait for all gradients.
        idle = [p.sum() for name, p in self.head.named_parameters() if name.startswith("mask_")]
        return total + 0 * torch.stack(idle).sum()

    def detect(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Detections in the pixels of the network's input.

        Returns:
            Of each image a dict of `boxes` (N, 4), `scores`, `labels`, best first, `anchors` (N,), their windows'
            indices among all, `windows` (N, 4), and, with masks, `mask_probs`, N of (S, S), of the windows' pixels.
        """
        features = self.features(batch["image"])
        logits, deltas = self.head(features)
        windows = torch.cat(self.anchors(features))
        logits = torch.cat([flatten_level(x, self.num_classes) for x in logits], dim=1)
        deltas = torch.cat([flatten_level(x, 4) for x in deltas], dim=1)
        found: list[dict[str, Any]] = [
            select_dense([windows], [scores], [moves], self.inference, self.loss.box_weights)
            for scores, moves in zip(logits, deltas, strict=True)
        ]
        for detection in found:
            detection["windows"] = windows[detection["anchors"]]
        if self.head.config.masks:
            self._draw(features, found)
        return found

    def _draw(self, features: Sequence[Tensor], found: Sequence[dict[str, Any]]) -> None:
        """Adds `mask_probs` of the windows that have an index `anchors` among all."""
        index = torch.cat([detection["anchors"] for detection in found])
        image = torch.cat([torch.full_like(detection["anchors"], n) for n, detection in enumerate(found)])
        cells = self.cells(features, image, index)
        maps = self.head.mask_maps(features, cells.level.unique().tolist())
        masks: dict[int, Tensor] = {}
        for level, window, at, where in cells.groups():
            drawn = self.head.masks(maps[level], level, window, where).sigmoid()
            masks.update(zip(at.tolist(), drawn, strict=True))
        ordered = iter([masks[n] for n in range(len(index))])
        for detection in found:
            detection["mask_probs"] = [next(ordered) for _ in detection["anchors"]]

    def draw_given(self, batch: Mapping[str, Any], boxes: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Masks of objects whose `boxes` (N, 4) in each image are known: `windows` and `mask_probs`, as of
        :meth:`detect`, of the windows that suit them best (:func:`given_windows`)."""
        features = self.features(batch["image"])
        windows = torch.cat(self.anchors(features))
        found = [{"anchors": given_windows(given.to(windows), windows)} for given in boxes]
        for detection in found:
            detection["windows"] = windows[detection["anchors"]]
        self._draw(features, found)
        return found

    def postprocess(
        self, detection: Mapping[str, Any], size: tuple[int, int], original: tuple[int, int]
    ) -> dict[str, Tensor]:
        """A detection in an image of `size` (height, width) as one in the `original`: boxes scaled and cut off, empty
        ones dropped, masks drawn where their windows are.

        Returns:
            A dict of `boxes` (N, 4), `scores`, `labels`, and `masks` (N, H, W) bool.
        """
        factor = detection["boxes"].new_tensor([original[1] / size[1], original[0] / size[0]]).repeat(2)
        boxes = clip_boxes(detection["boxes"] * factor, (original[0], original[1]))
        keep = nonempty(boxes)
        result = {"boxes": boxes[keep], "scores": detection["scores"][keep], "labels": detection["labels"][keep]}
        if "mask_probs" in detection:
            kept = [detection["mask_probs"][n] for n in keep.nonzero()[:, 0].tolist()]
            result["masks"] = paste_masks(
                kept, detection["windows"][keep] * factor, (int(original[0]), int(original[1]))
            )
        return result


# ------------------------------------------------------------------------------------------------------------ 3. task


class TensorMaskDetection(Detection):
    """Training and evaluation of a :class:`TensorMask`.

    Args:
        init_from: where :meth:`setup` takes weights from: the name of published weights, a file, or a checkpoint. Of a
            classifier the trunk is filled; of a detector everything but layers of another number of classes.
        clip_each: bound of the norm of each parameter's own gradient; null for none.
        optim: optimiser and schedule.
        network: of :class:`TensorMask`.
    """

    network: TensorMask

    def __init__(
        self,
        init_from: str | None = None,
        clip_each: float | None = None,
        optim: Optim = Optim(  # noqa: B008
            name="sgd", base_lr=0.02, reference_batch=16, weight_decay=1e-4, no_decay="norm", schedule="step"
        ),
        **network: Any,
    ) -> None:
        detector = TensorMask(**network)
        super().__init__(detector, optim, detector.iou_types, None, clip_each, init_from)
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        load_weights(self.network, source)


# ---------------------------------------------------------------------------------------------------------- 4. models


def tensormask_r50_fpn(**overrides: Any) -> TensorMask:
    """TensorMask, ResNet-50-FPN, a tensor bipyramid with windows of 11 and 15 units."""
    return TensorMask(**{"resnet": {"depth": 50}, **overrides})


def tensormask_r101_fpn(**overrides: Any) -> TensorMask:
    """TensorMask, ResNet-101-FPN, a tensor bipyramid with windows of 11 and 15 units."""
    return TensorMask(**{"resnet": {"depth": 101}, **overrides})


# ------------------------------------------------------------------------------------------------ 5. official weights

_OURS = re.compile(r"(?:backbone|head)\..+")
_CLASS_LAYERS = re.compile(r"head\.cls_score\.(?:weight|bias)")
_SUBNET = re.compile(r"head\.(cls|bbox|mask)_subnet\.(\d+)\.(weight|bias)")
_LAYER = re.compile(r"head\.(?:cls_score|bbox_pred|mask_pred_(\d+)|mask_fuse\.0)\.(weight|bias)")


def _head_name(key: str) -> str | None:
    if match := _SUBNET.fullmatch(key):
        return f"head.{match[1]}_subnet.convs.{int(match[2]) // 2}.{match[3]}" if int(match[2]) % 2 == 0 else None
    if match := _LAYER.fullmatch(key):
        return f"head.mask_pred.{int(match[1])}.{match[2]}" if match[1] else key.replace("mask_fuse.0", "mask_fuse")
    return None


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of detectron2's TensorMask in our names. Our own names are left as they are.

    Raises:
        ZooError: a key of no such detector.
    """
    if any(key.startswith(("head.cls_subnet.convs.", "backbone.lateral.")) for key in state_dict):
        return detectron2.ours(state_dict, _OURS)
    return detectron2.rename(state_dict, (detectron2.backbone_name, _head_name), "detectron2's TensorMask")


def load_weights(network: TensorMask, source: str | Path) -> None:
    """Fill `network` from a detector or from an ImageNet classifier.

    Of a detector, the layer of classes keeps its fresh weights where their number differs; everything else must match.

    Args:
        network: any size.
        source: the name of published weights, a published file, or a checkpoint of ours.

    Raises:
        ZooError: the file is missing, or does not match.
    """
    state = read_source(source)
    if any(key.startswith("head.") for key in state):
        detectron2.fill_detector(network, convert_official(state), source, _CLASS_LAYERS)
        return
    detectron2.fill_trunk(network, state, source)
