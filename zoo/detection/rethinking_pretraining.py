"""Rethinking ImageNet Pre-training.

Kaiming He, Ross Girshick, Piotr Dollár. ICCV 2019, arXiv 1811.08883.

Mask R-CNN trained from random weights on COCO comes to the accuracy of one that starts from an ImageNet classifier. Two
things are needed: layers that normalise with few images a device (GroupNorm, or BatchNorm over all processes) in place
of frozen BatchNorm, and time. Pre-training makes training shorter; it does not regularise, and helps the result only
where there are very few images. There is no new network here: the recipe is the paper.

The recipe, part by part:

- every convolution of trunk, pyramid, box and mask head is normalised (that of the proposals is not), the box head has
  four convolutions, nothing is frozen, the stride is in the 3x3 convolutions;
- an "n x" schedule has n times 90,000 steps of 16 images. The rate is divided by ten for the last 60,000 steps and
  again for the last 20,000, however long the run is: :func:`milestones`;
- the arm that is pre-trained has the same network, so that only the weights it starts from differ
  (:class:`ClassifierPretraining` trains them, and `model.init_from` takes them);
- a fraction of the pictures is `data.subset` (section 5.2), which no seed of a run changes.

The network, its losses and its names are those of :mod:`zoo.detection.mask_rcnn`, and detectron2's numerics with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from zoo.detection import mask_rcnn
from zoo.detection.mask_rcnn import MaskRCNN, MaskRCNNDetection, merged
from zoo.detection.mask_rcnn import convert_official as convert_official
from zoo.detection.mask_rcnn import convert_trunk as convert_trunk
from zoo.errors import ZooError
from zoo.nn.detection import ResNetBackbone, ResNetConfig, configured
from zoo.training import Classification, Optim
from zoo.training.detection import MetricName
from zoo.training.tta import TTA

# ------------------------------------------------------------------------------------------------------- 1. functions

DROPS = (60_000, 20_000)
"""Before the end of a run, the steps of 16 images at which its rate is divided by ten (section 4)."""


class Schedule(NamedTuple):
    """The steps of a run, and those at which its rate is divided by ten."""

    steps: int
    milestones: tuple[int, ...]


def milestones(steps: int, drops: Sequence[int] = DROPS) -> tuple[int, ...]:
    """Where the rate is divided: so many steps before the end as `drops` say, whatever the length (section 4,
    "Learning rate scheduling"). In a run that is shorter than three times the first of them all come nearer to the end
    in proportion, so that 1x and 2x have theirs at 6/9 and 8/9.

    Raises:
        ZooError: drops that do not come nearer to the end.
    """
    if list(drops) != sorted(set(drops), reverse=True) or min(drops, default=1) < 1:
        raise ZooError(f"drops count down to the end of a run, such as {list(DROPS)}, not {list(drops)}")
    share = min(1.0, steps / (3 * drops[0])) if drops else 1.0
    return tuple(steps - round(drop * share) for drop in drops)


def schedule(multiple: float, batch: int = 16) -> Schedule:
    """The "n x" schedule for so many images a step: n times 90,000 steps of 16 images, and its :func:`milestones`.

    Raises:
        ZooError: no positive multiple or batch.
    """
    if multiple <= 0 or batch < 1:
        raise ZooError(f"a schedule wants a positive multiple and batch, not {multiple} and {batch}")
    steps = round(multiple * 90_000 * 16 / batch)
    return Schedule(steps, milestones(steps, [round(drop * 16 / batch) for drop in DROPS]))


# --------------------------------------------------------------------------------------------------------- 2. network


class ResNetClassifier(ResNetBackbone):
    """A detector's trunk as a classifier: global average pooling and a linear layer `fc`.

    Args:
        num_classes: K.
        resnet: the trunk.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        resnet: ResNetConfig = ResNetConfig(norm="gn", stride_in_1x1=False, freeze=0),  # noqa: B008
    ) -> None:
        resnet = configured(ResNetConfig, resnet)
        super().__init__(resnet, ("c5",))
        self.num_features = self.channels["c5"]
        self.fc = nn.Linear(self.num_features, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to the last map (B, C, S / 32, S / 32)."""
        return super().forward(images)["c5"]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to pooled features (B, C) or logits (B, K)."""
        pooled = x.mean(dim=(2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Images (B, 3, S, S) to logits (B, K)."""
        return self.forward_head(self.forward_features(images))


# ------------------------------------------------------------------------------------------------------------ 3. task


class RethinkingDetection(MaskRCNNDetection):
    """Training of a detector by the paper's recipe, from random weights or from those of `init_from`.

    Args:
        drops: so many steps before the end the rate is divided by ten: 60,000 and 20,000 of 16 images
            (:func:`milestones`). Those that `optim` names itself win, and another schedule than `step` has none.
        init_from, oks_sigmas, clip_each, metric, tta, optim: of :class:`~zoo.detection.mask_rcnn.MaskRCNNDetection`.
        network: of :class:`~zoo.detection.mask_rcnn.MaskRCNN`.

    Raises:
        ZooError: at the start of a run, one without `trainer.max_steps`, or a trunk whose random weights are frozen (it
            cost the authors 3.3 points of box AP, projects/GN/README of Detectron).
    """

    def __init__(
        self,
        drops: tuple[int, ...] = DROPS,
        init_from: str | None = None,
        oks_sigmas: list[float] | None = None,
        clip_each: float | None = None,
        metric: MetricName = "coco",
        tta: TTA | None = None,
        optim: Optim = Optim(  # noqa: B008
            name="sgd", base_lr=0.02, reference_batch=16, weight_decay=1e-4, no_decay="norm", schedule="step"
        ),
        **network: Any,
    ) -> None:
        super().__init__(init_from, oks_sigmas, clip_each, metric, tta, optim, **network)
        self.drops, self._random = tuple(drops), init_from is None
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Besides fetching `init_from`, refuses to freeze what is random."""
        resumed = self._trainer is not None and self.trainer.ckpt_path is not None
        frozen = self.network.options["resnet"].freeze
        if stage == "fit" and self._random and frozen and not resumed:
            raise ZooError(
                f"the first {frozen} stages of the trunk would keep their random weights: set model.resnet.freeze 0,"
                " or model.init_from"
            )
        super().setup(stage)

    def configure_optimizers(self) -> Any:
        optim = self.optim
        if optim.schedule == "step" and not (optim.milestone_steps or optim.milestones):
            if self.trainer.max_steps < 0:
                raise ZooError("the rate is divided so many steps before the end: set trainer.max_steps")
            self.optim = replace(optim, milestone_steps=milestones(self.trainer.max_steps, self.drops))
        return super().configure_optimizers()


class ClassifierPretraining(Classification):
    """Training of a trunk as a classifier, whose weights a detector then starts from (`model.init_from`).

    Args:
        num_classes: K.
        resnet: the trunk.
        mixup, cutmix, label_smoothing: of :class:`~zoo.training.Classification`.
        init_from: another classifier or trunk to start from.
        optim: optimiser and schedule.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        resnet: ResNetConfig = ResNetConfig(norm="gn", stride_in_1x1=False, freeze=0),  # noqa: B008
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        init_from: str | None = None,
        optim: Optim = Optim(  # noqa: B008
            name="sgd", base_lr=0.1, weight_decay=1e-4, no_decay="none", schedule="step", interval="epoch"
        ),
    ) -> None:
        network = ResNetClassifier(num_classes, resnet)
        super().__init__(network, optim, num_classes, mixup, cutmix, label_smoothing, init_from)
        self.save_hyperparameters()

    def load_initial(self, source: str) -> None:
        """Fill the trunk; the classifier stays fresh."""
        from zoo.weights.pretrained import fill, read_source

        fill(self.network, convert_trunk(read_source(source)), source, lambda key: not key.startswith("fc."))


# ---------------------------------------------------------------------------------------------------------- 4. models

_TRUNK: dict[str, Any] = {"stride_in_1x1": False, "freeze": 0}
_X152 = {"depth": 152, "groups": 32, "width_per_group": 8}


def _normalised(norm: str, overrides: Mapping[str, Any], **resnet: Any) -> dict[str, Any]:
    """A detector's options with `norm` in every convolution but that of the proposals, four of them in the box head."""
    parts: dict[str, Any] = {"fpn": {"norm": norm}, "box": {"convs": 4, "fcs": 1, "norm": norm}, "mask": {"norm": norm}}
    for head in ("mask", "box"):
        if overrides.get(head, parts) is None:
            del parts[head]
    return merged({"resnet": {**_TRUNK, "norm": norm, **resnet}, **parts}, overrides)


def mask_rcnn_r50_fpn_gn(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-50-FPN with GroupNorm everywhere."""
    return mask_rcnn.mask_rcnn_r50_fpn(**_normalised("gn", overrides))


def mask_rcnn_r50_fpn_syncbn(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-50-FPN with BatchNorm everywhere, over all processes (`trainer.sync_batchnorm`)."""
    return mask_rcnn.mask_rcnn_r50_fpn(**_normalised("bn", overrides))


def mask_rcnn_r101_fpn_gn(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNet-101-FPN with GroupNorm everywhere."""
    return mask_rcnn.mask_rcnn_r101_fpn(**_normalised("gn", overrides))


def mask_rcnn_x152_32x8d_fpn_gn(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN, ResNeXt-152-32x8d-FPN with GroupNorm everywhere (section 5.1)."""
    return mask_rcnn.mask_rcnn_x101_32x8d_fpn(**_normalised("gn", overrides, **_X152))


def cascade_mask_rcnn_x152_32x8d_fpn_gn(**overrides: Any) -> MaskRCNN:
    """Cascade Mask R-CNN with three stages, ResNeXt-152-32x8d-FPN with GroupNorm everywhere (section 5.1)."""
    return mask_rcnn.cascade_mask_rcnn_r50_fpn(**_normalised("gn", overrides, **_X152))


def keypoint_rcnn_r50_fpn_gn(**overrides: Any) -> MaskRCNN:
    """Keypoint R-CNN, ResNet-50-FPN with GroupNorm everywhere but in the keypoint head: 17 keypoints of persons."""
    return mask_rcnn.keypoint_rcnn_r50_fpn(**_normalised("gn", {"mask": None, **overrides}))


def faster_rcnn_r101_fpn_gn(**overrides: Any) -> MaskRCNN:
    """Faster R-CNN, ResNet-101-FPN with GroupNorm everywhere."""
    return mask_rcnn.faster_rcnn_r101_fpn(**_normalised("gn", {"mask": None, **overrides}))


def resnet50_gn_trunk(**overrides: Any) -> ResNetBackbone:
    """The ResNet-50 trunk with GroupNorm that detectors with GroupNorm start from."""
    return ResNetBackbone(configured(ResNetConfig, {**_TRUNK, "norm": "gn", **overrides}))


def resnet101_gn_trunk(**overrides: Any) -> ResNetBackbone:
    """The ResNet-101 trunk with GroupNorm that detectors with GroupNorm start from."""
    return ResNetBackbone(configured(ResNetConfig, {**_TRUNK, "norm": "gn", "depth": 101, **overrides}))
