"""Test-time augmentation of R-CNNs: an image at several sizes, and mirrored; detections merged, masks averaged.

As detectron2's `GeneralizedRCNNWithTTA` merges, with two differences. Its views are resized by Pillow from bytes, these
bilinearly (antialiased) from what the network would have seen, so that the option needs nothing of the data. And it
pads three views at a time to a common size, which GroupNorm sees; here each view is a batch of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from zoo.data.scenes import shortest_edge_size
from zoo.errors import ZooError
from zoo.nn.detection import RCNN
from zoo.nn.detection.roi_heads import Detection
from zoo.ops.boxes import clip_boxes


@dataclass(frozen=True)
class TTA:
    """The views of an image; detectron2's by default.

    Args:
        sizes: lengths of the shorter side in pixels.
        max_size: largest length of the longer side.
        flip: each also mirrored left to right.
    """

    sizes: tuple[int, ...] = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
    max_size: int = 4000
    flip: bool = True


class View(NamedTuple):
    """An image as a batch of one; `original` is its size in the file, whose boxes it takes and gives."""

    batch: dict[str, Tensor]
    size: tuple[int, int]
    original: tuple[int, int]
    mirrored: bool

    def _scale(self, boxes: Tensor) -> Tensor:
        return boxes.new_tensor([self.size[1] / self.original[1], self.size[0] / self.original[0]]).repeat(2)

    def _mirror(self, boxes: Tensor) -> Tensor:
        if not self.mirrored:
            return boxes
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        return torch.stack([self.size[1] - x2, y1, self.size[1] - x1, y2], dim=1)

    def seen(self, boxes: Tensor) -> Tensor:
        """Boxes (N, 4) of the file in the pixels of this view."""
        return self._mirror(boxes * self._scale(boxes))

    def stored(self, boxes: Tensor) -> Tensor:
        """Boxes (N, 4) of this view in the pixels of the file."""
        return self._mirror(boxes) / self._scale(boxes)


def views(image: Tensor, original: tuple[int, int], config: TTA, divisibility: int = 1) -> list[View]:
    """All views of an image (1, 3, h, w), padded with zeros on the right and below to multiples of `divisibility`."""
    height, width = int(image.shape[-2]), int(image.shape[-1])
    made = []
    for short in config.sizes:
        h, w = size = shortest_edge_size(height, width, short, config.max_size)
        resized = image
        if size != (height, width):
            resized = interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
        for mirrored in (False, True) if config.flip else (False,):
            x = pad(resized.flip(-1) if mirrored else resized, (0, -w % divisibility, 0, -h % divisibility))
            batch = {"image": x, "size": torch.tensor([size], device=x.device)}
            made.append(View(batch, size, original, mirrored))
    return made


def detect_augmented(network: RCNN, batch: Mapping[str, Any], config: TTA) -> list[Detection]:
    """What `network`, in evaluation mode, finds on all views of each image, in the pixels of its file.

    Boxes of all views are suppressed together, as those of one view are. Masks are predicted for the boxes left on
    every view, and averaged before they are drawn.

    Args:
        network: an R-CNN without a keypoint head.
        batch: as of :class:`zoo.nn.detection.RCNN`.
        config: the views.

    Returns:
        As :meth:`zoo.nn.detection.RCNN.postprocess`.
    """
    found = []
    sizes = batch["size"].tolist()
    originals = batch["original_size"].tolist() if "original_size" in batch else sizes
    for n, ((height, width), original) in enumerate(zip(sizes, originals, strict=True)):
        image = batch["image"][n : n + 1, :, :height, :width]
        found.append(_detect_one(network, image, (original[0], original[1]), config))
    return found


def _detect_one(network: RCNN, image: Tensor, original: tuple[int, int], config: TTA) -> Detection:
    heads: Any = network.roi_heads
    seen = views(image, original, config, getattr(network, "size_divisibility", 1))
    parts = []
    for view in seen:
        part = heads.detect_boxes(*network.propose(view.batch), [view.size])[0]
        parts.append((view.stored(part["boxes"]), part["scores"], part["labels"]))
    boxes, scores, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    merged = heads.suppress(clip_boxes(boxes, original), scores, labels)
    if heads.mask_head is not None:
        total: Any = 0
        for view in seen:
            features = network.backbone(view.batch["image"])
            detection = {**merged, "boxes": view.seen(merged["boxes"])}
            heads.complete([features[name] for name in heads.levels], [detection])
            masks = detection["mask_probs"]
            total = total + (masks.flip(-1) if view.mirrored else masks)
        merged["mask_probs"] = total / len(seen)
    return network.postprocess(merged, original, original)


def require_augmentable(network: Any, config: TTA) -> None:
    """Raises a :class:`ZooError` for a network or views that :func:`detect_augmented` does not take."""
    if not isinstance(network, RCNN) or network.roi_heads.keypoint_head is not None:
        raise ZooError("test-time augmentation merges the boxes and masks of an R-CNN; keypoints are not merged")
    if not config.sizes or min(*config.sizes, config.max_size) < 1:
        raise ZooError(f"tta.sizes and tta.max_size must be positive, got {config.sizes} and {config.max_size}")
