"""A two-stage detector: backbone, region proposals, region heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from zoo.errors import ZooError, unknown
from zoo.nn.detection.results import postprocess
from zoo.nn.detection.roi_heads import Detection, RoIHeads
from zoo.nn.detection.rpn import RPN, Proposals, Sizes
from zoo.ops.boxes import permutation

Config = TypeVar("Config")


def configured(kind: type[Config], value: Config | Mapping[str, Any]) -> Config:
    """A dataclass `kind` from a mapping of its fields, mappings within included; as it is where it is one already.

    Raises:
        ZooError: a name that is no field.
    """
    if not isinstance(value, Mapping):
        return value
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given = {}
    for name, entry in value.items():
        if name not in fields:
            raise unknown(f"option of {kind.__name__}", name, fields)
        default = fields[name].default
        if dataclasses.is_dataclass(default):
            entry = configured(type(default), entry)
        given[name] = _tuples(entry)
    return kind(**given)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


class RCNN(nn.Module):
    """Images to losses in training, and to detections in evaluation.

    Args:
        backbone: images to maps; see :mod:`zoo.nn.detection.backbone`.
        rpn: maps to proposals.
        roi_heads: maps and proposals to detections.
    """

    export_part = "backbone"
    not_exported = "gives as many detections as it finds"

    def __init__(self, backbone: nn.Module, rpn: RPN, roi_heads: RoIHeads) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads

    def forward(self, batch: Mapping[str, Any], noise: Tensor | None = None, **further: Any) -> Any:
        """Losses by name in training mode, else a list of detections (see :meth:`detect` and :meth:`postprocess`).

        Args:
            batch: `image` (B, 3, H, W), normalised, then padded at the right and bottom; `size` (B, 2), height and
                width of each image inside the padding; in training `target`, a list of dicts with `boxes` (N, 4) and
                `labels` (N,), and for those heads `masks` (N, h, w) or `polygons`, `keypoints` (N, K, 3); in evaluation
                `original_size` (B, 2), whose pixels the detections are in (default: `size`).
            noise: uniform numbers, as many as the largest set that samples are drawn from; the n first, sorted, are
                every permutation of n. From torch's global generator where it is not given.
            further: random numbers for heads that draw more.

        Raises:
            ZooError: training without targets, or proposals that are not finite.
        """
        if not self.training:
            sizes = batch["size"].tolist()
            originals = batch["original_size"].tolist() if "original_size" in batch else sizes
            found = zip(self.detect(batch), sizes, originals, strict=True)
            return [self.postprocess(detection, size, original) for detection, size, original in found]
        if "target" not in batch:
            raise ZooError("a detector trains on batches with `target`, a list of dicts of boxes and labels")
        features, sizes, permute = self.backbone(batch["image"]), _pairs(batch["size"]), permutation(noise)
        proposals, losses = self.rpn(features, sizes, batch["target"], permute)
        return losses | self.roi_heads.losses(features, proposals, sizes, batch["target"], permute, **further)

    def propose(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[Proposals]]:
        """The backbone's maps and each image's proposals."""
        features = self.backbone(batch["image"])
        proposals, _ = self.rpn(features, _pairs(batch["size"]), None, permutation(None))
        return features, proposals

    def detect(self, batch: Mapping[str, Any]) -> list[Detection]:
        """Detections in the pixels of the network's input; see :meth:`zoo.nn.detection.roi_heads.RoIHeads.detect`."""
        features, proposals = self.propose(batch)
        return self.roi_heads.detect(features, proposals, _pairs(batch["size"]))

    @staticmethod
    def postprocess(detection: Detection, size: tuple[int, int], original: tuple[int, int]) -> Detection:
        """A detection in the network's input as one in the file; see :func:`zoo.nn.detection.results.postprocess`."""
        return postprocess(detection, size, original)


def _pairs(sizes: Tensor) -> Sizes:
    return [(height, width) for height, width in sizes.tolist()]
