"""PointRend: Image Segmentation as Rendering.

Alexander Kirillov, Yuxin Wu, Kaiming He, Ross Girshick. CVPR 2020, arXiv 1912.08193.

A mask is rendered: a coarse one covers the object, and a small network that looks at single points, each with the
features of a fine map and the coarse prediction there, is asked only where it matters. In evaluation that is where the
mask is least certain: it is doubled in size again and again, and each time the most uncertain points are predicted anew
(adaptive subdivision, section 3.1). In training, points are drawn uniformly, but more of them where the coarse mask is
uncertain (section 3.2). The same head sharpens the label map of a semantic segmentation.

Conventions: points (x, y) in [0, 1] of a box, or of a padded image, whose pixel centres lie at half numbers; R regions,
image after image, P points of each, K classes, C channels. The numbers that points are drawn by may be given.

Sampling of points and their uncertainty are in :mod:`zoo.ops.points`.

Deviations from the official code (detectron2's projects/PointRend), none of which changes a value beyond rounding:
- Only the map of a region's own class is upsampled and refined, not those of all classes.
- All points of all regions go through the point head as one matrix.
- Labels of points are read from the objects' bit masks, without a copy of a mask for every region.
- Fine maps of several levels are joined along the channels in semantic evaluation too (there: along the batch).
- A batch without a labelled point has a point loss of 0 (there: nan).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, relu

from zoo.detection.mask_rcnn import MaskRCNN
from zoo.errors import ZooError, unknown
from zoo.nn.detection import FPN, BoxHeadConfig, FPNConfig, ResNetBackbone, ResNetConfig, Subsample, configured
from zoo.nn.detection.backbone import he_normal, lecun_uniform
from zoo.nn.detection.roi_heads import Regions, mask_targets
from zoo.nn.detection.semantic import (
    IGNORED,
    SemanticHead,
    SemanticHeadConfig,
    SemanticNetwork,
    doubled,
    file_logits,
    labels_of,
    padded_labels,
)
from zoo.ops.boxes import at_least_float32
from zoo.ops.points import (
    PointNoise,
    class_uncertainty,
    fine_features,
    grid_points,
    image_points,
    margin_uncertainty,
    of_class,
    sample_masks,
    sample_points,
    uncertain_cells,
    uncertain_points,
)
from zoo.training import Optim
from zoo.training.detection import Detection, MetricName
from zoo.training.segmentation import Segmentation
from zoo.training.tta import TTA
from zoo.weights import detectron2
from zoo.weights.pretrained import read_source

# --------------------------------------------------------------------------------------------------------- 1. network


@dataclass(frozen=True)
class PointHeadConfig:
    """What looks at points, which ones are trained on, and how a mask is subdivided. The defaults are those of
    instances; the published semantic heads differ (:func:`pointrend_semantic_r101_fpn`).

    Args:
        levels: fine maps, their channels beside each other.
        channels, layers: of the perceptron.
        coarse_each_layer: the coarse prediction joins the input of every layer, not of the first alone.
        class_agnostic: one mask for all classes.
        train_points: N, of each region or image.
        oversample, importance: k and beta; 1 and 0 draw uniformly.
        regular: train on a regular grid of N points instead (Table 4).
        steps: doublings in evaluation.
        points: those predicted anew after each.
    """

    levels: tuple[str, ...] = ("p2",)
    channels: int = 256
    layers: int = 3
    coarse_each_layer: bool = True
    class_agnostic: bool = False
    train_points: int = 196
    oversample: float = 3
    importance: float = 0.75
    regular: bool = False
    steps: int = 5
    points: int = 784

    def __post_init__(self) -> None:
        if self.oversample < 1 or not 0 <= self.importance <= 1:
            raise ZooError(
                f"oversample must be 1 or more and importance in [0, 1]; got {self.oversample}, {self.importance}"
            )
        if min(self.train_points, self.points, self.layers) < 1 or self.steps < 0:
            raise ZooError("train_points, points and layers must be 1 or more, and steps not negative")
        if self.regular and round(self.train_points**0.5) ** 2 != self.train_points:
            raise ZooError(f"a regular grid wants a square number of train_points, not {self.train_points}")


@dataclass(frozen=True)
class PointMaskConfig:
    """PointRend's mask head of a region.

    Args:
        levels: what the coarse head sees, always the same maps whatever the region's size.
        pool: side of its regular grid of points.
        channels: of its convolutions; a 1x1 convolution comes first where the maps have more.
        fcs, fc_channels: its linear layers.
        size: side of the coarse mask.
        head: what refines it; null: nothing.
    """

    levels: tuple[str, ...] = ("p2",)
    pool: int = 14
    channels: int = 256
    fcs: int = 2
    fc_channels: int = 1024
    size: int = 7
    head: PointHeadConfig | None = PointHeadConfig()


class CoarseHead(nn.Module):
    """Coarse masks (R, K, size, size) of features (R, C, pool, pool)."""

    def __init__(self, in_channels: int, num_classes: int, config: PointMaskConfig) -> None:
        super().__init__()
        self.shape, width = (num_classes, config.size, config.size), config.channels
        self.reduce_channel_dim_conv = nn.Conv2d(in_channels, width, 1) if in_channels > width else None
        self.reduce_spatial_dim_conv = nn.Conv2d(min(in_channels, width), width, 2, 2)
        he_normal(self.reduce_spatial_dim_conv)
        if self.reduce_channel_dim_conv is not None:
            he_normal(self.reduce_channel_dim_conv)
        features = width * (config.pool // 2) ** 2
        self.layers = [f"fc{k + 1}" for k in range(config.fcs)]
        for name in self.layers:
            layer = nn.Linear(features, config.fc_channels)
            lecun_uniform(layer)
            self.add_module(name, layer)
            features = config.fc_channels
        self.prediction = nn.Linear(features, num_classes * config.size**2)
        nn.init.normal_(self.prediction.weight, std=0.001)
        nn.init.zeros_(self.prediction.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.reduce_channel_dim_conv is not None:
            x = relu(self.reduce_channel_dim_conv(x))
        x = relu(self.reduce_spatial_dim_conv(x)).flatten(1)
        for name in self.layers:
            x = relu(self.get_submodule(name)(x))
        return self.prediction(x).view(-1, *self.shape)


class PointHead(nn.Module):
    """A perceptron shared by all points: logits (N, K, P), or (N, 1, P), of fine features (N, C, P) and coarse
    predictions (N, K, P) there (section 3.3)."""

    def __init__(self, in_channels: int, num_classes: int, config: PointHeadConfig) -> None:
        super().__init__()
        self.config = config
        channels = in_channels + num_classes
        self.layers = [f"fc{k + 1}" for k in range(config.layers)]
        for name in self.layers:
            layer = nn.Conv1d(channels, config.channels, 1)
            he_normal(layer)
            self.add_module(name, layer)
            channels = config.channels + (num_classes if config.coarse_each_layer else 0)
        self.predictor = nn.Conv1d(channels, 1 if config.class_agnostic else num_classes, 1)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)  # type: ignore[arg-type]

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        x = torch.cat([fine, coarse], dim=1)
        for name in self.layers:
            x = relu(self.get_submodule(name)(x))
            if self.config.coarse_each_layer:
                x = torch.cat([x, coarse], dim=1)
        return self.predictor(x)


class PointRendMaskHead(nn.Module):
    """Coarse masks and the point head that refines them (section 4.1).

    Args:
        backbone: says of its maps their `channels` and `strides`.
        num_classes: K.
        config: all the rest.

    Raises:
        ZooError: a level that the backbone does not have.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, config: PointMaskConfig) -> None:
        super().__init__()
        below: Any = backbone
        self.config, self.strides = config, dict(below.strides)
        for name in (*config.levels, *(config.head.levels if config.head else ())):
            if name not in below.channels:
                raise unknown("level of the mask head", name, below.channels)
        self.coarse_head = CoarseHead(sum(below.channels[name] for name in config.levels), num_classes, config)
        self.point_head = None
        if config.head is not None:
            channels = sum(below.channels[name] for name in config.head.levels)
            self.point_head = PointHead(channels, num_classes, config.head)

    def _fine(self, levels: Sequence[str], maps: Mapping[str, Tensor], rois: Tensor, points: Tensor) -> Tensor:
        """Features (C, R, P) at `points` (R, P, 2) of `rois` (R, 5)."""
        chosen = [maps[name] for name in levels]
        counts = rois[:, 0].long().bincount(minlength=len(chosen[0])).tolist()
        return fine_features(chosen, [self.strides[name] for name in levels], image_points(rois[:, 1:], points), counts)

    def coarse(self, maps: Mapping[str, Tensor], rois: Tensor) -> Tensor:
        """Coarse logits (R, K, size, size)."""
        side = self.config.pool
        points = grid_points(side, side, rois).expand(len(rois), -1, -1)
        x = self._fine(self.config.levels, maps, rois, points).transpose(0, 1)
        return self.coarse_head(x.unflatten(2, (side, side)))

    def at(self, maps: Mapping[str, Tensor], rois: Tensor, coarse: Tensor, points: Tensor) -> Tensor:
        """The point head's logits (R, K, P) at `points` (R, P, 2)."""
        head: Any = self.point_head
        fine = self._fine(head.config.levels, maps, rois, points)
        seen = sample_points(coarse, points).transpose(0, 1)
        return head(fine.flatten(1)[None], seen.flatten(1)[None])[0].unflatten(1, points.shape[:2]).transpose(0, 1)

    def losses(
        self,
        maps: Mapping[str, Tensor],
        regions: Regions,
        targets: Sequence[Mapping[str, Any]],
        points: PointNoise | None = None,
    ) -> dict[str, Tensor]:
        """`loss_mask`, of the coarse masks, and `loss_mask_point`: binary cross-entropy of the true class, the mean
        over regions (all objects) and cells or points.

        Args:
            maps: by level.
            regions: objects alone.
            targets: each with `masks` (G, h, w) bool.
            points: numbers that the points are drawn by.

        Raises:
            ZooError: polygons instead of bit masks.
        """
        if any("polygons" in target for target in targets):
            raise ZooError("PointRend is trained on bit masks, not on polygons: set data.masks to bitmask")
        labels, config = regions.labels, self.config.head
        if not len(labels):
            nothing = sum((p.sum() for p in self.parameters()), torch.zeros((), device=labels.device)) * 0
            return {"loss_mask": nothing, **({} if config is None else {"loss_mask_point": nothing})}
        rois = regions.rois
        coarse = self.coarse(maps, rois)
        cells = at_least_float32(of_class(coarse, labels))
        wanted = mask_targets(regions, targets, self.config.size).to(cells.dtype)
        losses = {"loss_mask": binary_cross_entropy_with_logits(cells, wanted)}
        if config is None:
            return losses
        chosen = _training_points(coarse, lambda logits: class_uncertainty(logits, labels), config, points)
        pixels = image_points(rois[:, 1:], chosen)
        truth = torch.cat(
            [
                sample_masks(target["masks"], regions.matched[mine], pixels[mine])
                for target, mine in ((target, regions.image == n) for n, target in enumerate(targets))
                if mine.any()
            ]
        )
        logits = at_least_float32(of_class(self.at(maps, rois, coarse, chosen), labels))
        return {**losses, "loss_mask_point": binary_cross_entropy_with_logits(logits, truth.to(logits.dtype))}

    def probabilities(self, maps: Mapping[str, Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Masks (R, M, M) of classes `labels` (R,) by adaptive subdivision (section 3.1, figure 4)."""
        coarse, config = self.coarse(maps, rois), self.config.head
        if config is None:
            return at_least_float32(of_class(coarse, labels)).sigmoid()
        side, steps = self.config.size, config.steps
        while steps and 4 * side**2 <= config.points:  # every point of the doubled mask would be predicted anew
            side, steps = 2 * side, steps - 1
        if not len(rois):
            return at_least_float32(coarse).new_zeros(0, side, side)

        def predicted(points: Tensor) -> Tensor:
            return at_least_float32(of_class(self.at(maps, rois, coarse, points), labels))

        start = predicted(grid_points(side, side, rois).expand(len(rois), -1, -1))
        logits = start.unflatten(1, (side, side))
        for _ in range(steps):
            logits = doubled(logits[:, None])[:, 0]
            places, points = uncertain_cells(-logits.abs(), config.points)
            logits = logits.flatten(1).scatter(1, places, predicted(points)).view_as(logits)
        return logits.sigmoid()


def _training_points(
    coarse: Tensor, uncertainty: Callable[[Tensor], Tensor], config: PointHeadConfig, noise: PointNoise | None
) -> Tensor:
    coarse = at_least_float32(coarse.detach())
    if config.regular:
        side = round(config.train_points**0.5)
        return grid_points(side, side, coarse).expand(len(coarse), -1, -1)
    return uncertain_points(coarse, uncertainty, config.train_points, config.oversample, config.importance, noise)


class PointRendSemanticHead(nn.Module):
    """A semantic branch and the point head that refines its label map (section 4.2).

    Args:
        backbone: says of its maps their `channels` and `strides`.
        coarse, point: its two parts; `point` null for the branch alone.
    """

    def __init__(self, backbone: nn.Module, coarse: SemanticHeadConfig, point: PointHeadConfig | None) -> None:
        super().__init__()
        below: Any = backbone
        self.config, self.point = coarse, point
        self.coarse_head = SemanticHead(backbone, coarse)
        self.point_head = None
        if point is not None:
            for name in point.levels:
                if name not in below.channels:
                    raise unknown("level of the point head", name, below.channels)
            self.point_head = PointHead(sum(below.channels[name] for name in point.levels), coarse.classes, point)

    def at(self, maps: Mapping[str, Tensor], coarse: Tensor, points: Tensor) -> Tensor:
        """The point head's logits (B, C, P) at `points` (B, P, 2) of the padded image."""
        head: Any = self.point_head
        fine = torch.cat([sample_points(maps[name], points) for name in head.config.levels], dim=1)
        return head(fine, sample_points(coarse, points))

    def losses(
        self, maps: Mapping[str, Tensor], semantic: Sequence[Tensor], points: PointNoise | None = None
    ) -> dict[str, Tensor]:
        """`loss_sem_seg` and `loss_sem_seg_point`: cross-entropy, the mean over pixels and points that have a label.

        Args:
            maps: by level.
            semantic: labels (h, w) of each image; 255 for pixels that do not count.
            points: numbers that the points are drawn by.
        """
        coarse, config = self.coarse_head(maps), self.point
        losses = {"loss_sem_seg": self.coarse_head.loss(coarse, semantic)}
        if config is None:
            return losses
        chosen = _training_points(coarse, margin_uncertainty, config, points)
        stride = self.coarse_head.config.stride
        labels = padded_labels(semantic, (coarse.shape[-2] * stride, coarse.shape[-1] * stride))
        truth = sample_points(labels[:, None].to(chosen.dtype), chosen, "nearest")[:, 0].long()
        logits = at_least_float32(self.at(maps, coarse, chosen))
        total = cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum")
        return {**losses, "loss_sem_seg_point": total / (truth != IGNORED).sum().clamp(min=1)}

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, C, H, W) in evaluation, doubled in each step."""
        coarse, config = self.coarse_head(maps), self.point
        if config is None:
            return self.coarse_head.upsampled(coarse)
        coarse = logits = at_least_float32(coarse)
        for _ in range(config.steps):
            logits = doubled(logits)
            places, points = uncertain_cells(margin_uncertainty(logits), config.points)
            fresh = at_least_float32(self.at(maps, coarse, points))
            places = places[:, None].expand(-1, logits.shape[1], -1)
            logits = logits.flatten(2).scatter(2, places, fresh).view_as(logits)
        return logits


_BOX = BoxHeadConfig(train_on_predictions=True)


class PointRend(MaskRCNN):
    """Mask R-CNN with PointRend's mask head, trained on the predicted boxes. As it stands R50-FPN for COCO.

    Args:
        point: the mask head; null: Mask R-CNN's own, which `mask` describes and which counts then alone.
        box: the box head.
        network: the rest of :class:`zoo.detection.mask_rcnn.MaskRCNN`.

    Raises:
        ZooError: parts that do not go together.
    """

    def __init__(
        self,
        point: PointMaskConfig | None = PointMaskConfig(),
        box: BoxHeadConfig = _BOX,
        **network: Any,
    ) -> None:
        if isinstance(box, Mapping):
            box = configured(BoxHeadConfig, {"train_on_predictions": True, **box})
        point = None if point is None else configured(PointMaskConfig, point)
        super().__init__(box=box, **network)
        self.options["point"] = point
        if point is not None:
            below: Any = self.backbone
            levels = {*point.levels, *(point.head.levels if point.head else ())}
            if missing := levels - set(self.roi_heads.levels):
                raise unknown("level of the mask head", min(missing), self.roi_heads.levels)
            self.roi_heads.replace_mask_head(PointRendMaskHead(below, self.num_classes, point))


class PointRendSemantic(SemanticNetwork):
    """Semantic FPN with PointRend: images to losses in training, and to label maps in evaluation. As it stands R101 for
    Cityscapes.

    Args:
        resnet, fpn: trunk and pyramid.
        head: the semantic branch.
        point: what refines it; null for the branch alone.

    Raises:
        ZooError: an unknown option or level.
    """

    def __init__(
        self,
        resnet: ResNetConfig = ResNetConfig(depth=101, stride_in_1x1=True, freeze=0),  # noqa: B008
        fpn: FPNConfig = FPNConfig(),  # noqa: B008
        head: SemanticHeadConfig = SemanticHeadConfig(classes=19, loss_weight=1.0),  # noqa: B008
        point: PointHeadConfig | None = PointHeadConfig(
            coarse_each_layer=False, train_points=2048, steps=2, points=8192
        ),
    ) -> None:
        super().__init__()
        resnet, fpn = configured(ResNetConfig, resnet), configured(FPNConfig, fpn)
        head = configured(SemanticHeadConfig, head)
        point = None if point is None else configured(PointHeadConfig, point)
        self.backbone = FPN(ResNetBackbone(resnet, fpn.inputs), fpn, Subsample())
        self.semantic_head = PointRendSemanticHead(self.backbone, head, point)
        self.options: dict[str, Any] = {"resnet": resnet, "fpn": fpn, "head": head, "point": point}

    def logits(self, batch: Mapping[str, Any]) -> Iterator[Tensor]:
        return file_logits(self.semantic_head(self.backbone(batch["image"])), batch)

    def losses(self, batch: Mapping[str, Any], points: PointNoise | None = None, **further: Any) -> dict[str, Tensor]:
        """Those of :class:`PointRendSemanticHead`; `points`: the numbers that its points are drawn by."""
        labels = labels_of(batch)
        return self.semantic_head.losses(self.backbone(batch["image"]), labels, points)


# ------------------------------------------------------------------------------------------------------------ 2. tasks


class PointRendDetection(Detection):
    """Training and evaluation of a :class:`PointRend`.

    Args:
        init_from: where :meth:`setup` takes weights from: the name of published weights, a file, or a checkpoint. Of a
            classifier the trunk is filled; of a detector everything but layers of another number of classes.
        clip_each: bound of the norm of each parameter's own gradient; null for none.
        metric: whose average precision is evaluated: `coco`, or `lvis` with what it says of each picture (AP*).
        tta: views of an image that are merged in evaluation; null for the image as it is.
        optim: optimiser and schedule.
        network: of :class:`PointRend`.
    """

    network: PointRend

    def __init__(
        self,
        init_from: str | None = None,
        clip_each: float | None = None,
        metric: MetricName = "coco",
        tta: TTA | None = None,
        optim: Optim = Optim(  # noqa: B008
            name="sgd", base_lr=0.02, reference_batch=16, weight_decay=1e-4, no_decay="norm", schedule="step"
        ),
        **network: Any,
    ) -> None:
        detector = PointRend(**network)
        super().__init__(detector, optim, detector.iou_types, None, clip_each, init_from, metric, tta)
        self.save_hyperparameters()

    def further(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"points": batch["point_noise"]} if "point_noise" in batch else {}

    def load_initial(self, source: str) -> None:
        load_weights(self.network, source)


class PointRendSegmentation(Segmentation):
    """Training and evaluation of a :class:`PointRendSemantic`. Logs `train/loss_sem_seg`, `train/loss_sem_seg_point`,
    and what :class:`~zoo.training.segmentation.Segmentation` does.

    Args:
        init_from: as of :class:`PointRendDetection`.
        optim: optimiser and schedule.
        network: of :class:`PointRendSemantic`.
    """

    network: PointRendSemantic

    def __init__(
        self,
        init_from: str | None = None,
        optim: Optim = Optim(  # noqa: B008
            name="sgd", base_lr=0.01, reference_batch=32, weight_decay=1e-4, no_decay="norm", schedule="step"
        ),
        **network: Any,
    ) -> None:
        made = PointRendSemantic(**network)
        super().__init__(made, made.semantic_head.config.classes, optim, init_from)
        self.save_hyperparameters()

    def further(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"points": batch["point_noise"]} if "point_noise" in batch else {}

    def load_initial(self, source: str) -> None:
        load_weights(self.network, source)


# ---------------------------------------------------------------------------------------------------------- 3. models

_X101 = {"depth": 101, "groups": 32, "width_per_group": 8, "stride_in_1x1": False}


def _msra(depth: int, overrides: Mapping[str, Any], **resnet: Any) -> dict[str, Any]:
    return {**overrides, "resnet": {"depth": depth, "stride_in_1x1": True, **resnet, **overrides.get("resnet", {})}}


def pointrend_rcnn_r50_fpn(**overrides: Any) -> PointRend:
    """PointRend, Mask R-CNN ResNet-50-FPN."""
    return PointRend(**_msra(50, overrides))


def pointrend_rcnn_r101_fpn(**overrides: Any) -> PointRend:
    """PointRend, Mask R-CNN ResNet-101-FPN."""
    return PointRend(**_msra(101, overrides))


def pointrend_rcnn_x101_32x8d_fpn(**overrides: Any) -> PointRend:
    """PointRend, Mask R-CNN ResNeXt-101-32x8d-FPN."""
    return PointRend(**{**overrides, "resnet": {**_X101, **overrides.get("resnet", {})}})


def pointrend_semantic_r101_fpn(**overrides: Any) -> PointRendSemantic:
    """PointRend, Semantic FPN ResNet-101, for the 19 classes of Cityscapes."""
    return PointRendSemantic(**_msra(101, overrides, freeze=0))


# ------------------------------------------------------------------------------------------------ 4. official weights

_OURS = re.compile(r"(?:backbone|rpn\.head|roi_heads|semantic_head)\..+")
_CLASS_LAYERS = re.compile(
    r"roi_heads\.(?:box_predictors\.\d\.\w+|mask_head\.predictor)\.(?:weight|bias)"
    r"|roi_heads\.mask_head\.(?:coarse_head\.prediction|point_head\.\w+)\.(?:weight|bias)"
    r"|semantic_head\.(?:coarse_head\.predictor|point_head\.\w+)\.(?:weight|bias)"
)
_RULES = (detectron2.point_name, detectron2.backbone_name, detectron2.rpn_name, detectron2.roi_name)


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network of detectron2's project PointRend in our names, of either generation of its files. Our own names are
    left as they are.

    Raises:
        ZooError: a key of no such network, or a mean or anchors that are not those of the published networks.
    """
    if any(key.startswith(("rpn.head.", "semantic_head.")) for key in state_dict):
        return detectron2.ours(state_dict, _OURS)
    return detectron2.rename(state_dict, _RULES, "detectron2's PointRend")


def load_weights(network: PointRend | PointRendSemantic, source: str | Path) -> None:
    """Fill `network` from one of its kind or from an ImageNet classifier, of which the trunk is filled.

    Layers whose size depends on the classes keep their fresh weights where their number differs; everything else must
    match.

    Args:
        network: any size.
        source: the name of published weights, a published file, or a checkpoint of ours.

    Raises:
        ZooError: the file is missing, or does not match.
    """
    state = read_source(source)
    if any(key.startswith(("rpn.head.", "proposal_generator.", "semantic_head.", "sem_seg_head.")) for key in state):
        detectron2.fill_detector(network, convert_official(state), source, _CLASS_LAYERS)
        return
    detectron2.fill_trunk(network, state, source)
