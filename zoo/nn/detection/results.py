"""What detectors of every kind do with what they found."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.boxes import clip_boxes, nonempty
from zoo.ops.masks import paste_masks


def postprocess(
    detection: dict[str, Tensor], size: tuple[int, int], original: tuple[int, int], pixel_borders: bool = False
) -> dict[str, Tensor]:
    """A detection in an image of `size` (height, width) as one in the `original`: boxes scaled and cut off, empty
    ones dropped, masks drawn.

    Args:
        detection: `boxes` (N, 4), `scores` (N,), `labels` (N,), and what the heads gave.
        size: of the network's input.
        original: of the file.
        pixel_borders: scale the right and bottom border as the last pixel inside, as Caffe2's detectors did: x to
            (x - 1) f + 1.

    Returns:
        A dict of `boxes` (N, 4), `scores`, `labels`, and `masks` (N, H, W) bool and `keypoints` (N, K, 3) with
        their scores where the network has such heads.
    """
    factor = detection["boxes"].new_tensor([original[1] / size[1], original[0] / size[0]])
    boxes = detection["boxes"] * factor.repeat(2)
    if pixel_borders:
        boxes = boxes + torch.cat([torch.zeros_like(factor), 1 - factor])
    boxes = clip_boxes(boxes, (original[0], original[1]))
    keep = nonempty(boxes)
    result = {"boxes": boxes[keep], "scores": detection["scores"][keep], "labels": detection["labels"][keep]}
    if "mask_probs" in detection:
        height, width = original
        result["masks"] = paste_masks(detection["mask_probs"][keep], boxes[keep], (height, width))
    if "keypoints" in detection:
        points = detection["keypoints"][keep]
        result["keypoints"] = torch.cat([points[..., :2] * factor, points[..., 2:]], dim=-1)
    return result
