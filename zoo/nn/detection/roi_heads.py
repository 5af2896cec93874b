"""What an R-CNN does with each region: pooling, box, mask and keypoint heads, cascades; detectron2's numerics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate
from torchvision.ops import Conv2dNormActivation, batched_nms, roi_align, roi_pool

from zoo.errors import ZooError, unknown
from zoo.nn.detection.backbone import Norm, ResNetConfig, he_normal, lecun_uniform, norm_layer, resnet_stage
from zoo.nn.detection.rpn import Proposals, Sizes
from zoo.ops.boxes import (
    BoxLoss,
    Draws,
    Permute,
    SoftNMS,
    Weights,
    at_least_float32,
    box_loss,
    clip_boxes,
    decode_boxes,
    match,
    nonempty,
    pairwise_iou,
    pyramid_levels,
    sample_labels,
    soft_nms,
)
from zoo.ops.keypoints import heatmaps_to_keypoints, keypoint_cells
from zoo.ops.masks import crop_objects

Pooling = Literal["align", "align_unshifted", "pool", "warp"]
Detection = dict[str, Tensor]


@dataclass(frozen=True)
class RoIConfig:
    """Which regions are trained on, and which are reported.

    Args:
        levels: the maps that regions are pooled from; null for all that hold no second, coarser copy (p6).
        thresholds, labels: overlaps that part background, ignored and object regions.
        samples: regions an image, of which `positive_fraction` may be objects.
        append_truth: count the objects' own boxes among the proposals.
        score_threshold, nms_threshold, detections: reported are the best `detections` an image whose class has a higher
            score, after suppression within each class.
        soft_nms: lower the scores of what overlaps a better detection, instead of suppressing it; see
            :func:`zoo.ops.boxes.soft_nms`, whose threshold is `nms_threshold`.
        soft_nms_sigma: of its gaussian method.
    """

    levels: tuple[str, ...] | None = None
    thresholds: tuple[float, ...] = (0.5,)
    labels: tuple[int, ...] = (0, 1)
    samples: int = 512
    positive_fraction: float = 0.25
    append_truth: bool = True
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections: int = 100
    soft_nms: SoftNMS | None = None
    soft_nms_sigma: float = 0.5


@dataclass(frozen=True)
class PoolConfig:
    """How a region becomes a square of features.

    Args:
        size: its side in cells.
        sampling: samples a cell and axis; 0 for as many as it covers cells of the map.
        pooling: RoIAlign, RoIAlign without its shift of half a pixel, RoIPool, or RoIWarp: bilinear samples as
            RoIAlign's, of a region that is rounded to whole cells of the map before (section 3; Table 2c).
    """

    size: int = 7
    sampling: int = 0
    pooling: Pooling = "align"


@dataclass(frozen=True)
class BoxHeadConfig:
    """Classification and box regression of a region.

    Args:
        pool: the regions' features.
        convs, conv_channels, norm: 3x3 convolutions first.
        fcs, fc_channels: then linear layers.
        class_agnostic: one box a region instead of one a class.
        weights: of the deltas.
        loss, beta: see :func:`zoo.ops.boxes.box_loss`.
        loss_weight: factor of the box loss.
        sigmoid: a logistic loss for each class instead of softmax (its sum over classes, mean over regions).
        federated: with `sigmoid`, how many classes count in the loss of a batch (LVIS: 50): those of its regions, the
            background among them, and others drawn by :func:`federated_classes`; 0 for all.
        federated_power: others are drawn with a probability proportional to this power of the number of training
            pictures with the class.
        train_on_predictions: mask and keypoint heads are trained on the predicted boxes, not on the proposals.
        cascade_ious, cascade_weights: overlaps and delta weights of the stages of a cascade; empty for a single stage.
    """

    pool: PoolConfig = PoolConfig()
    convs: int = 0
    conv_channels: int = 256
    norm: Norm | None = None
    fcs: int = 2
    fc_channels: int = 1024
    class_agnostic: bool = False
    weights: Weights = (10.0, 10.0, 5.0, 5.0)
    loss: BoxLoss = "smooth_l1"
    beta: float = 0.0
    loss_weight: float = 1.0
    sigmoid: bool = False
    federated: int = 0
    federated_power: float = 0.5
    train_on_predictions: bool = False
    cascade_ious: tuple[float, ...] = ()
    cascade_weights: tuple[Weights, ...] = ()


@dataclass(frozen=True)
class MaskHeadConfig:
    """A mask of a region: `convs` 3x3 convolutions, an upsampling by 2, one map a class (or one for all).

    With `softmax` the classes and the background compete in each cell, as in fully convolutional segmentation, instead
    of one sigmoid a class (Table 2b); a mask is then that of its class against the background alone.
    """

    pool: PoolConfig = PoolConfig(14)
    convs: int = 4
    channels: int = 256
    norm: Norm | None = None
    class_agnostic: bool = False
    softmax: bool = False


@dataclass(frozen=True)
class KeypointHeadConfig:
    """A heat map a keypoint of a region.

    Args:
        pool: the regions' features; the maps have four times their side.
        keypoints: K.
        channels: outputs of the 3x3 convolutions.
        by_visible: divide the loss by the number of keypoints that count, not by that of the most there could be.
        loss_weight: factor of the loss.
    """

    pool: PoolConfig = PoolConfig(14)
    keypoints: int = 17
    channels: tuple[int, ...] = (512,) * 8
    by_visible: bool = True
    loss_weight: float = 1.0


class RoIPooler(nn.Module):
    """Pools regions from the level of a pyramid that suits their size.

    Args:
        strides: of the levels, each twice the one before.
        config: side and kind.
        canonical_size: side in pixels of a box that belongs to the level of stride 16.
    """

    def __init__(self, strides: Sequence[int], config: PoolConfig, canonical_size: float = 224.0) -> None:
        super().__init__()
        self.canonical_size = canonical_size
        if config.pooling not in get_args(Pooling):
            raise unknown("pooling", config.pooling, get_args(Pooling))
        self.strides, self.config = tuple(strides), config
        self.lowest = self.strides[0].bit_length() - 1
        if self.strides != tuple(2 ** (self.lowest + k) for k in range(len(self.strides))):
            raise ZooError(f"regions are pooled from levels whose strides double, not from {list(strides)}")

    def pool(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        """Features (R, C, S, S) of `rois` (R, 5) from one map (B, C, H, W)."""
        config, scale = self.config, 1.0 / stride
        rois = rois.to(features.dtype)
        if config.pooling == "pool":
            return roi_pool(features, rois, config.size, scale)
        if config.pooling == "warp":
            low, high = ((part * scale).round() * stride for part in (rois[:, 1:3], rois[:, 3:]))
            rois = torch.cat([rois[:, :1], low, high.maximum(low + stride)], dim=1)
        shifted = config.pooling != "align_unshifted"
        return roi_align(features, rois, config.size, scale, config.sampling, aligned=shifted)

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Features (R, C, S, S) of `rois` (R, 5): index of the image, box in its pixels."""
        if len(features) == 1:
            return self.pool(features[0], rois, self.strides[0])
        level = pyramid_levels(rois[:, 1:], self.lowest, self.lowest + len(features) - 1, self.canonical_size)
        order = level.argsort(stable=True)
        counts = level.bincount(minlength=len(features)).tolist()
        parts = [
            self.pool(x, part, stride)
            for x, part, stride in zip(features, rois[order].split(counts), self.strides, strict=True)
        ]
        return torch.cat(parts).index_select(0, order.argsort())


class BoxHead(nn.Sequential):
    """conv1, ..., flatten, fc1, ReLU, ...; `out_features` numbers a region."""

    def __init__(self, in_channels: int, config: BoxHeadConfig) -> None:
        super().__init__()
        for k in range(config.convs):
            layer = Conv2dNormActivation(in_channels, config.conv_channels, 3, norm_layer=norm_layer(config.norm))
            he_normal(layer[0])
            self.add_module(f"conv{k + 1}", layer)
            in_channels = config.conv_channels
        self.add_module("flatten", nn.Flatten())
        features = in_channels * config.pool.size**2
        for k in range(config.fcs):
            linear = nn.Linear(features, config.fc_channels)
            lecun_uniform(linear)
            self.add_module(f"fc{k + 1}", linear)
            self.add_module(f"relu{k + 1}", nn.ReLU(inplace=True))
            features = config.fc_channels
        self.out_features = features


def federated_classes(labels: Tensor, weights: Tensor, count: int, noise: Tensor) -> Tensor:
    """Which classes count in a federated loss (Zhou et al. 2021, arXiv 2103.07461, section 5.4): those of `labels` and,
    up to `count` in all, others drawn without replacement with probabilities proportional to `weights`.

    As in detectron2 the background takes one of the `count` places where it is among the labels.

    Args:
        labels: (R,) of the regions, K for the background.
        weights: (K,), not negative; a class of weight 0 is never drawn.
        count: at least so many, as far as there are.
        noise: (K,) uniform numbers in 0..1; drawn are the largest log(noise) / weight.

    Returns:
        bool (K,).
    """
    classes = len(weights)
    kept = torch.zeros(classes + 1, dtype=torch.bool, device=labels.device)
    kept[labels] = True
    missing = min(count - int(kept.sum()), classes)
    if missing > 0:
        keys = noise.to(weights.dtype).clamp(min=torch.finfo(weights.dtype).tiny).log() / weights
        keys = keys.masked_fill(kept[:-1] | (weights <= 0), -torch.inf)
        best, places = keys.topk(missing)
        kept[places[best > -torch.inf]] = True
    return kept[:-1]


class BoxPredictor(nn.Module):
    """Class logits (R, K + 1), the background last, and deltas (R, 4 K), or (R, 4) where they are class-agnostic.

    With a federated loss the buffer `fed_loss_cls_weights` (K,) holds the classes' weights, equal ones until
    :meth:`count_images`.

    Raises:
        ZooError: a federated loss without `sigmoid`.
    """

    fed_loss_cls_weights: Tensor

    def __init__(self, in_features: int, num_classes: int, config: BoxHeadConfig, weights: Weights) -> None:
        super().__init__()
        self.num_classes, self.config, self.weights = num_classes, config, weights
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 * (1 if config.class_agnostic else num_classes))
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        if config.federated:
            if not config.sigmoid:
                raise ZooError("a federated loss is of a logistic one for each class: set box.sigmoid")
            self.register_buffer("fed_loss_cls_weights", torch.ones(num_classes))

    def count_images(self, counts: Tensor) -> None:
        """Takes the numbers (K,) of training pictures with each class as the weights of a federated loss."""
        self.fed_loss_cls_weights.copy_(counts.to(self.fed_loss_cls_weights) ** self.config.federated_power)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities (R, K + 1)."""
        logits = at_least_float32(logits)
        return logits.sigmoid() if self.config.sigmoid else logits.softmax(dim=1)

    def boxes(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """The predicted boxes (R, K, 4) or (R, 1, 4) of regions `boxes` (R, 4)."""
        return decode_boxes(deltas.unflatten(1, (-1, 4)), boxes[:, None], self.weights)

    def losses(self, logits: Tensor, deltas: Tensor, regions: Regions, draws: Draws | None = None) -> dict[str, Tensor]:
        """`loss_cls` and `loss_box_reg`, both over all regions, of which only objects have a box; `draws` chooses the
        classes of a federated loss."""
        config, labels = self.config, regions.labels
        count = max(len(labels), 1)
        logits = at_least_float32(logits)
        if config.sigmoid:
            target = torch.zeros_like(logits)
            target[torch.arange(len(labels), device=labels.device), labels] = 1
            logits, target = logits[:, :-1], target[:, :-1]
            if config.federated:
                noise = (draws or Draws()).uniform(self.num_classes, logits.device)
                kept = federated_classes(labels, self.fed_loss_cls_weights, config.federated, noise)
                logits, target = logits[:, kept], target[:, kept]
            classes = binary_cross_entropy_with_logits(logits, target, reduction="sum")
        else:
            classes = cross_entropy(logits, labels, reduction="sum")
        objects = regions.objects(self.num_classes)
        chosen = deltas.unflatten(1, (-1, 4))[objects, 0 if config.class_agnostic else labels[objects]]
        truth, own = regions.truth[objects], regions.boxes[objects]
        boxes = box_loss(chosen, truth, own, self.weights, config.loss, config.beta)
        return {"loss_cls": classes / count, "loss_box_reg": boxes * (config.loss_weight / count)}


class MaskHead(nn.Sequential):
    """mask_fcn1, ..., deconv, ReLU, predictor: logits (R, K, 2 S, 2 S) (Mask R-CNN, figure 4), or (R, K + 1, 2 S, 2 S)
    with the background last under a softmax."""

    def __init__(self, in_channels: int, num_classes: int, config: MaskHeadConfig) -> None:
        super().__init__()
        if config.softmax and config.class_agnostic:
            raise ZooError("mask.softmax is over classes: it goes with class_agnostic false only")
        self.softmax = config.softmax
        for k in range(config.convs):
            layer = Conv2dNormActivation(in_channels, config.channels, 3, norm_layer=norm_layer(config.norm))
            he_normal(layer[0])
            self.add_module(f"mask_fcn{k + 1}", layer)
            in_channels = config.channels
        self.deconv = nn.ConvTranspose2d(in_channels, config.channels, 2, 2)
        he_normal(self.deconv)
        self.relu = nn.ReLU(inplace=True)
        maps = 1 if config.class_agnostic else num_classes + config.softmax
        self.predictor = nn.Conv2d(config.channels, maps, 1)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)  # type: ignore[arg-type]

    def of_class(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The maps (R, M, M) of classes `labels` (R,) out of `logits` (R, K, M, M); under a softmax, against the
        background."""
        if logits.shape[1] == 1:
            return logits[:, 0]
        chosen = logits[torch.arange(len(labels), device=labels.device), labels]
        return chosen - logits[:, -1] if self.softmax else chosen

    def loss(self, x: Tensor, regions: Regions, targets: Sequence[Mapping[str, Any]]) -> Tensor:
        """Binary cross-entropy of the true class's map alone, the mean over `regions` (all objects) and cells; under a
        softmax, cross-entropy over all maps."""
        logits = self(x)
        if not len(regions.labels):
            return logits.sum() * 0  # the parameters stay in the graph of every process
        inside = mask_targets(regions, targets, logits.shape[-1])
        if self.softmax:
            return cross_entropy(
                at_least_float32(logits), torch.where(inside, regions.labels[:, None, None], logits.shape[1] - 1)
            )
        chosen = at_least_float32(self.of_class(logits, regions.labels))
        return binary_cross_entropy_with_logits(chosen, inside.to(chosen.dtype))


class KeypointHead(nn.Sequential):
    """conv_fcn1, ReLU, ..., score_lowres: logits (R, K, 4 S, 4 S) after bilinear upsampling by 2."""

    def __init__(self, in_channels: int, config: KeypointHeadConfig) -> None:
        super().__init__()
        self.config = config
        for k, outputs in enumerate(config.channels):
            self.add_module(f"conv_fcn{k + 1}", nn.Conv2d(in_channels, outputs, 3, padding=1))
            self.add_module(f"relu{k + 1}", nn.ReLU(inplace=True))
            in_channels = outputs
        self.score_lowres = nn.ConvTranspose2d(in_channels, config.keypoints, 4, 2, 1)
        for module in self:
            if not isinstance(module, nn.ReLU):
                he_normal(module)

    def forward(self, x: Tensor) -> Tensor:
        return interpolate(super().forward(x), scale_factor=2.0, mode="bilinear", align_corners=False)

    def loss(self, x: Tensor, cells: Tensor, valid: Tensor, most: float) -> Tensor:
        """Cross-entropy over a map's cells, summed over the keypoints that count.

        Args:
            x: features (P, C, S, S).
            cells, valid: the keypoints' cells (P, K) and whether they count (P, K).
            most: what the sum is divided by, unless by the number of keypoints that count.
        """
        logits = self(x)
        if not valid.any():
            return logits.sum() * 0
        loss = cross_entropy(at_least_float32(logits).flatten(2)[valid], cells[valid], reduction="sum")
        return loss * self.config.loss_weight / (valid.sum() if self.config.by_visible else most)


class Regions(NamedTuple):
    """Labelled regions of a batch: R boxes, image after image.

    `matched` is the object of its image that a region is matched to, `truth` that object's box; both count for objects
    only, that is where `labels` is a class, not the background (K) nor -1.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    matched: Tensor
    truth: Tensor

    @property
    def rois(self) -> Tensor:
        """(R, 5): image, box."""
        return torch.cat([self.image[:, None].to(self.boxes.dtype), self.boxes], dim=1)

    def objects(self, num_classes: int) -> Tensor:
        """Places of the objects."""
        return ((self.labels >= 0) & (self.labels < num_classes)).nonzero()[:, 0]

    def at(self, places: Tensor) -> Regions:
        return Regions(*(field[places] for field in self))


def mask_targets(regions: Regions, targets: Sequence[Mapping[str, Any]], size: int) -> Tensor:
    """What `regions` (all objects) see of their objects' masks, bool (R, size, size)."""
    wanted = []
    for image, target in enumerate(targets):
        mine = regions.image == image
        wanted.append(crop_objects(target, regions.matched[mine], regions.boxes[mine], size))
    return torch.cat(wanted)


class ScaleGradient(torch.autograd.Function):
    """The identity, with a gradient `scale` times as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


class RoIHeads(nn.Module):
    """Box head, or a cascade of them, and mask and keypoint heads, each with its own pooling.

    Args:
        backbone: says of its maps their `channels` and `strides`.
        num_classes: K.
        roi, box, mask, keypoint: what stands here; null for no such head.

    Raises:
        ZooError: a cascade whose boxes are of a class each, or whose stages do not agree in number.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        roi: RoIConfig,
        box: BoxHeadConfig,
        mask: MaskHeadConfig | None = None,
        keypoint: KeypointHeadConfig | None = None,
    ) -> None:
        super().__init__()
        below: Any = backbone
        self.num_classes, self.config, self.box = num_classes, roi, box
        self.levels = tuple(roi.levels or below.channels)
        channels, strides = below.channels[self.levels[0]], [below.strides[name] for name in self.levels]
        self._build_box(channels, strides)
        self.mask_pooler: Any = None
        self.mask_head: Any = None
        self.keypoint_head = None
        if mask is not None:
            self.mask_pooler, self.mask_head = RoIPooler(strides, mask.pool), self._mask_head(channels, mask)
        if keypoint is not None:
            self.keypoint_pooler = RoIPooler(strides, keypoint.pool)
            self.keypoint_head = KeypointHead(channels, keypoint)

    def _mask_head(self, channels: int, mask: MaskHeadConfig) -> MaskHead:
        return MaskHead(channels, self.num_classes, mask)

    def replace_mask_head(self, head: nn.Module) -> None:
        """Puts in a mask head that pools for itself: `losses(maps, regions, targets, **further)` by name, and
        `probabilities(maps, rois, labels)` (R, M, M), of the maps by level."""
        self.mask_pooler, self.mask_head = None, head

    def _build_box(self, channels: int, strides: Sequence[int]) -> None:
        box = self.box
        self.box_pooler = RoIPooler(strides, box.pool)
        if box.cascade_ious and not box.class_agnostic:
            raise ZooError("a cascade wants class-agnostic boxes: set box.class_agnostic")
        if len(box.cascade_ious) != len(box.cascade_weights):
            raise ZooError("a cascade wants as many box.cascade_weights as box.cascade_ious")
        weights = box.cascade_weights or (box.weights,)
        heads = [BoxHead(channels, box) for _ in weights]
        self.box_heads = nn.ModuleList(heads)
        self.box_predictors = nn.ModuleList(
            BoxPredictor(head.out_features, self.num_classes, box, stage)
            for head, stage in zip(heads, weights, strict=True)
        )

    def _box_features(self, stage: int, maps: Sequence[Tensor], rois: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a stage's predictor sees of `rois` (R, 5), and features that other heads share with it, if any."""
        x, stages = self.box_pooler(maps, rois), len(self.box_heads)
        if stages > 1:
            # The stages' losses are summed, but the maps are to feel their mean.
            x = ScaleGradient.apply(x, 1.0 / stages)
        return self.box_heads[stage](x), None

    # -- training

    @torch.no_grad()
    def label(
        self,
        boxes: Sequence[Tensor],
        targets: Sequence[Mapping[str, Any]],
        thresholds: Sequence[float],
        labels: Sequence[int],
        permute: Permute | None,
    ) -> Regions:
        """Labels the `boxes` (N, 4) of each image by its `targets`; with `permute`, samples of them."""
        fields: list[Regions] = []
        for image, (found, target) in enumerate(zip(boxes, targets, strict=True)):
            truth = target["boxes"].to(found.dtype)
            index, matched = match(pairwise_iou(truth, found), thresholds, labels)
            classes = target["labels"][index] if len(truth) else torch.full_like(index, self.num_classes)
            classes = classes.masked_fill(matched == 0, self.num_classes).masked_fill(matched == -1, -1)
            if permute is not None:
                config = self.config
                parts = sample_labels(classes, config.samples, config.positive_fraction, self.num_classes, permute)
                taken = torch.cat(parts)
                found, classes, index = found[taken], classes[taken], index[taken]
            own = truth[index] if len(truth) else torch.zeros_like(found)
            fields.append(Regions(torch.full_like(index, image), found, classes, index, own))
        return Regions(*(torch.cat(parts) for parts in zip(*fields, strict=True)))

    def losses(
        self,
        features: Mapping[str, Tensor],
        proposals: Sequence[Proposals],
        sizes: Sizes,
        targets: Sequence[Mapping[str, Any]],
        permute: Permute,
        **further: Any,
    ) -> dict[str, Tensor]:
        """The losses of all heads, by detectron2's names.

        Args:
            features: the backbone's maps.
            proposals: of each image.
            sizes: (height, width) of each image inside the padding.
            targets: dicts with `boxes`, `labels`, and for such heads `masks` (or `polygons`) and `keypoints`.
            permute: draws the samples; for each image in turn, the objects' permutation, then the backgrounds'.
            further: random numbers for a mask head that pools for itself and draws some.
        """
        boxes = [found.boxes for found in proposals]
        if self.config.append_truth:
            boxes = [torch.cat([a, b["boxes"].to(a.dtype)]) for a, b in zip(boxes, targets, strict=True)]
        regions = self.label(boxes, targets, self.config.thresholds, self.config.labels, permute)
        maps = [features[name] for name in self.levels]
        draws = permute if isinstance(permute, Draws) else None
        losses, regions, shared = self._box_losses(maps, regions, sizes, targets, draws)
        objects = regions.objects(self.num_classes)
        regions = regions.at(objects)
        if self.mask_head is not None and self.mask_pooler is None:
            losses |= self.mask_head.losses(dict(zip(self.levels, maps, strict=True)), regions, targets, **further)
        elif self.mask_head is not None:
            x = self.mask_pooler(maps, regions.rois) if shared is None else shared[objects]
            losses["loss_mask"] = self.mask_head.loss(x, regions, targets)
        if self.keypoint_head is not None:
            losses["loss_keypoint"] = self._keypoint_loss(maps, regions, targets)
        return losses

    def _box_losses(
        self,
        maps: Sequence[Tensor],
        regions: Regions,
        sizes: Sizes,
        targets: Sequence[Mapping[str, Any]],
        draws: Draws | None = None,
    ) -> tuple[dict[str, Tensor], Regions, Tensor | None]:
        """The losses, the regions for the other heads, and features that these share with the box head, if any.

        Every later stage of a cascade refines all boxes of the one before, labelled anew (Cascade R-CNN, section 4).
        """
        losses: dict[str, Tensor] = {}
        current, predicted, stages = regions, regions.boxes[:, None], len(self.box_predictors)
        shared: Tensor | None = None
        predictor: Any
        for k, predictor in enumerate(self.box_predictors):
            if k:
                boxes = predicted[:, 0]
                refined = [clip_boxes(boxes[current.image == n], size) for n, size in enumerate(sizes)]
                refined = [found[nonempty(found)] for found in refined]
                current = self.label(refined, targets, (self.box.cascade_ious[k],), (0, 1), None)
            x, shared = self._box_features(k, maps, current.rois)
            logits, deltas = predictor(x)
            suffix = f"_stage{k}" if stages > 1 else ""
            found = predictor.losses(logits, deltas, current, draws)
            losses.update({f"{name}{suffix}": loss for name, loss in found.items()})
            with torch.no_grad():
                if stages > 1 or self.box.train_on_predictions:
                    predicted = predictor.boxes(deltas, current.boxes)
        if self.box.train_on_predictions and stages == 1:
            which = regions.labels.clamp(0, predicted.shape[1] - 1)
            regions = regions._replace(boxes=predicted[torch.arange(len(which), device=which.device), which])
        return losses, regions, shared

    def _keypoint_loss(self, maps: Sequence[Tensor], regions: Regions, targets: Sequence[Mapping[str, Any]]) -> Tensor:
        """Regions without a visible keypoint inside them are left out."""
        head: Any = self.keypoint_head
        config: KeypointHeadConfig = head.config
        per_image = [target["keypoints"][regions.matched[regions.image == n]] for n, target in enumerate(targets)]
        keypoints, boxes = torch.cat(per_image).to(regions.boxes.dtype), regions.boxes[:, None]
        places = keypoints[..., :2]
        inside = ((places >= boxes[..., :2]) & (places <= boxes[..., 2:])).all(dim=2)
        kept = (inside & (keypoints[..., 2] >= 1)).any(dim=1).nonzero()[:, 0]
        regions, keypoints = regions.at(kept), keypoints[kept]
        cells, valid = keypoint_cells(keypoints, regions.boxes, 4 * config.pool.size)
        most = len(targets) * config.keypoints * self.config.samples * self.config.positive_fraction
        return head.loss(self.keypoint_pooler(maps, regions.rois), cells, valid, most)

    # -- evaluation

    def detect(self, features: Mapping[str, Tensor], proposals: Sequence[Proposals], sizes: Sizes) -> list[Detection]:
        """What is reported of each image, in the pixels of the network's input.

        Returns:
            Dicts of `boxes` (N, 4), `scores` (N,), `labels` (N,), best first; where there are such heads
            `mask_probs` (N, M, M), `keypoints` (N, K, 3) with their scores, and `heatmaps` (N, K, S, S), logits.
        """
        detections = self.detect_boxes(features, proposals, sizes)
        self.complete([features[name] for name in self.levels], detections)
        return detections

    def detect_boxes(
        self, features: Mapping[str, Tensor], proposals: Sequence[Proposals], sizes: Sizes
    ) -> list[Detection]:
        """The boxes, scores and labels of :meth:`detect` alone."""
        maps = [features[name] for name in self.levels]
        counts = [len(found.boxes) for found in proposals]
        boxes, scores = self._predict(maps, proposals, sizes)
        chosen = zip(boxes.split(counts), scores.split(counts), sizes, strict=True)
        return [self._select(found, values, size) for found, values, size in chosen]

    def _predict(self, maps: Sequence[Tensor], proposals: Sequence[Proposals], sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Boxes (R, K or 1, 4) and probabilities (R, K + 1) of all proposals, image after image."""
        boxes, scores = [found.boxes for found in proposals], []
        counts, predicted = [len(found) for found in boxes], torch.cat(boxes)[:, None]
        predictor: Any
        for k, predictor in enumerate(self.box_predictors):
            if k:
                split = predicted[:, 0].split(counts)
                boxes = [clip_boxes(found, size) for found, size in zip(split, sizes, strict=True)]
            logits, deltas = predictor(self._box_features(k, maps, rois_of(boxes))[0])
            predicted = predictor.boxes(deltas, torch.cat(boxes))
            scores.append(predictor.probabilities(logits))
        return predicted, torch.stack(scores).mean(dim=0)

    def _select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detection:
        finite = boxes.flatten(1).isfinite().all(dim=1) & scores.isfinite().all(dim=1)
        boxes, scores = clip_boxes(boxes[finite], size), scores[finite, :-1]
        region, label = (scores > self.config.score_threshold).nonzero(as_tuple=True)
        found, values = boxes[region, label if boxes.shape[1] > 1 else 0], scores[region, label]
        return self.suppress(found, values, label)

    def suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Detection:
        """Of an image's detections (N, 4), (N,), (N,) those that are reported, best first."""
        config = self.config
        most = config.detections if config.detections >= 0 else None
        if config.soft_nms is not None:
            kept, scores = soft_nms(
                boxes, scores, labels, config.soft_nms, config.nms_threshold, config.soft_nms_sigma, most=most
            )
        else:
            kept = batched_nms(boxes, scores, labels, config.nms_threshold)[:most]
            scores = scores[kept]
        return {"boxes": boxes[kept], "scores": scores, "labels": labels[kept]}

    def complete(self, maps: Sequence[Tensor], detections: Sequence[Detection]) -> None:
        """Adds masks and keypoints to `detections`, pooled anew from the final boxes."""
        counts = [len(found["boxes"]) for found in detections]
        rois = rois_of([found["boxes"] for found in detections])
        if self.mask_head is not None:
            labels = torch.cat([found["labels"] for found in detections])
            if self.mask_pooler is None:
                probabilities = self.mask_head.probabilities(dict(zip(self.levels, maps, strict=True)), rois, labels)
            else:
                logits = self.mask_head(self._mask_features(maps, rois))
                probabilities = at_least_float32(self.mask_head.of_class(logits, labels)).sigmoid()
            for found, part in zip(detections, probabilities.split(counts), strict=True):
                found["mask_probs"] = part
        if self.keypoint_head is not None:
            heatmaps = self.keypoint_head(self.keypoint_pooler(maps, rois))
            points = heatmaps_to_keypoints(heatmaps, rois[:, 1:])[..., [0, 1, 3]]
            for found, part, logits in zip(detections, points.split(counts), heatmaps.split(counts), strict=True):
                found["keypoints"], found["heatmaps"] = part, logits

    def _mask_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        return self.mask_pooler(maps, rois)


def rois_of(boxes: Sequence[Tensor]) -> Tensor:
    """The boxes (N, 4) of each image as one tensor (R, 5): image, box; of no images, (0, 5)."""
    if not boxes:
        return torch.zeros(0, 5)
    counts = torch.tensor([len(found) for found in boxes], device=boxes[0].device)
    image = torch.arange(len(boxes), device=boxes[0].device).repeat_interleave(counts)
    joined = torch.cat(list(boxes))
    return torch.cat([image[:, None].to(joined.dtype), joined], dim=1)


class Res5RoIHeads(RoIHeads):
    """The heads of a C4 network: each region goes through the fifth stage of the ResNet, whose output box and mask
    predictors share (Mask R-CNN, section 3 and figure 4, left).

    Args:
        resnet: the network whose fifth stage it is; it never freezes.
        backbone, num_classes, roi, box, mask: as of :class:`RoIHeads`.
    """

    def __init__(
        self,
        resnet: ResNetConfig,
        backbone: nn.Module,
        num_classes: int,
        roi: RoIConfig,
        box: BoxHeadConfig,
        mask: MaskHeadConfig | None = None,
    ) -> None:
        self.resnet = resnet
        super().__init__(backbone, num_classes, roi, box, mask)

    def _build_box(self, channels: int, strides: Sequence[int]) -> None:
        if self.box.cascade_ious:
            raise ZooError("a C4 network has no cascade")
        self.box_pooler = RoIPooler(strides, self.box.pool)
        self.res5 = resnet_stage(self.resnet, 5, blocks=3)
        predictor = BoxPredictor(self.resnet.channels * 8, self.num_classes, self.box, self.box.weights)
        self.box_predictors = nn.ModuleList([predictor])

    def _mask_head(self, channels: int, mask: MaskHeadConfig) -> MaskHead:
        return MaskHead(self.resnet.channels * 8, self.num_classes, mask)

    def _box_features(self, stage: int, maps: Sequence[Tensor], rois: Tensor) -> tuple[Tensor, Tensor | None]:
        shared = self._mask_features(maps, rois)
        return shared.mean(dim=(2, 3)), shared

    def _mask_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        return self.res5(self.box_pooler(maps, rois))
