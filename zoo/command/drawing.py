"""What a model says of a picture, drawn on it: boxes, masks and keypoints, the likeliest classes, clips as strips."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.data.shown import name_of
from zoo.data.shown import strip as frames_beside
from zoo.ops.sheet import drawable

# Lines between COCO's 17 keypoints of a person.
_PERSON = (
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12), (11, 13),
    (13, 15), (12, 14), (14, 16),
)  # fmt: skip
_KEYPOINT_SCORE = 0.05  # a point of a lower score is not drawn

_LEAST = 320  # pixels of the side of a picture under which classes are written
_FRAMES = 8  # of a clip that a strip shows


def draw_objects(picture: Tensor, found: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
    """The picture (3, H, W) uint8 with boxes, masks, keypoints, and labels with scores, if any; as large."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    drawn = picture.contiguous()
    count = len(found["boxes"])
    if not count:
        return drawn
    line = max(2, round(min(picture.shape[-2:]) / 250))
    colors = colors_of(count)
    # Large objects first, so that small ones stay on top.
    sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
    order = sides.prod(1).argsort(descending=True).tolist()
    if "masks" in found:
        drawn = draw_segmentation_masks(drawn, found["masks"][order], alpha=0.45, colors=[colors[n] for n in order])
    drawn = draw_bounding_boxes(drawn, found["boxes"][order], colors=[colors[n] for n in order], width=line)
    if "keypoints" in found:
        drawn = _draw_keypoints(drawn, found["keypoints"], colors, line)
    labels = [name_of(names, int(k)) for k in found["labels"]]
    if "scores" in found:
        labels = [f"{label} {score:.0%}" for label, score in zip(labels, found["scores"], strict=True)]
    return _draw_labels(drawn, found["boxes"], labels, colors, order)


def colors_of(count: int) -> list[tuple[int, int, int]]:
    """Colours that lie far apart: hues by the golden ratio, two brightnesses in turn."""
    found = []
    for n in range(count):
        red, green, blue = colorsys.hsv_to_rgb(0.02 + n * 0.618034 % 1, 0.85, 1.0 if n % 2 == 0 else 0.8)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


def _draw_keypoints(drawn: Tensor, points: Tensor, colors: Sequence[tuple[int, int, int]], line: int) -> Tensor:
    from torchvision.utils import draw_keypoints

    lines = list(_PERSON) if points.shape[1] == 17 else None
    for place, color in zip(points, colors, strict=True):
        seen = place[:, 2] >= _KEYPOINT_SCORE
        drawn = draw_keypoints(
            drawn, place[None, :, :2], connectivity=lines, colors=color, radius=line + 1, width=line,
            visibility=seen[None],
        )  # fmt: skip
    return drawn


def _draw_labels(
    drawn: Tensor, boxes: Tensor, labels: Sequence[str], colors: Sequence[tuple[int, int, int]], order: Sequence[int]
) -> Tensor:
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.fromarray(drawn.permute(1, 2, 0).numpy())
    pen, size = ImageDraw.Draw(canvas), max(10, round(min(canvas.size) / 40))
    font, labels = ImageFont.load_default(size), [drawable(label) for label in labels]
    for n in order:
        x, y = boxes[n, :2].tolist()
        left, top, right, bottom = pen.textbbox((0, 0), labels[n], font=font)
        width, height = right - left + 4, bottom - top + 4
        # Above the box or, where there is no room, inside it; never beyond the border.
        x, y = min(max(x, 0), max(canvas.width - width, 0)), y - height if y >= height else y
        pen.rectangle((x, y, x + width, y + height), fill=colors[n])
        light = np.dot(colors[n], (0.299, 0.587, 0.114)) > 140
        pen.text((x + 2 - left, y + 2 - top), labels[n], fill="black" if light else "white", font=font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def draw_segments(picture: Tensor, ids: Tensor, numbers: Sequence[int], labels: Sequence[str]) -> Tensor:
    """The picture (3, H, W) uint8 under the segments of `ids` (H, W), each in a colour, parted by lines and, where it
    is large enough, with its label; what belongs to none of the `numbers` stays grey."""
    from PIL import Image, ImageDraw, ImageFont

    zoom = max(1, round(_LEAST / max(picture.shape[-2:])))
    picture = picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).float()
    ids = ids.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).cpu().long()
    colors = colors_of(len(numbers))
    drawn = picture.mean(dim=0, keepdim=True).expand(3, -1, -1) * 0.6
    for number, color in zip(numbers, colors, strict=True):
        paint = 0.45 * picture + 0.55 * torch.tensor(color, dtype=torch.float32)[:, None, None]
        drawn = torch.where(ids == number, paint, drawn)
    edge = torch.zeros_like(ids, dtype=torch.bool)
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edge[1:] |= ids[1:] != ids[:-1]
    drawn = torch.where(edge, drawn.new_tensor(255.0), drawn)
    canvas = Image.fromarray(drawn.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    pen, size = ImageDraw.Draw(canvas), max(10, round(min(canvas.size) / 40))
    font = ImageFont.load_default(size)
    for number, label in zip(numbers, labels, strict=True):
        y, x = (ids == number).nonzero(as_tuple=True)
        if len(y) < 8 * size * size:
            continue
        # The pixel of the segment that is nearest to its middle.
        at = int(((y - y.float().mean()) ** 2 + (x - x.float().mean()) ** 2).argmin())
        place, text = (int(x[at]), int(y[at])), drawable(label)
        pen.text(place, text, fill="white", stroke_fill="black", stroke_width=2, font=font, anchor="mm")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def draw_classes(picture: Tensor, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """The picture (3, H, W) uint8, small ones enlarged, and under it a bar for each of the `rows` {"label",
    "probability"}."""
    from PIL import Image, ImageDraw, ImageFont

    zoom = max(1, round(_LEAST / max(picture.shape[-2:])))
    shown = picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    width = max(shown.shape[-1], _LEAST)
    size = max(12, round(width / 28))
    font, line = ImageFont.load_default(size), round(1.7 * size)
    canvas = Image.new("RGB", (width, shown.shape[-2] + line * len(rows) + line // 3), "white")
    canvas.paste(Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy()), ((width - shown.shape[-1]) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    for n, row in enumerate(rows):
        top, share = shown.shape[-2] + line // 6 + n * line, float(row["probability"])
        pen.rectangle(
            (0, top + 1, round(width * share), top + line - 1), fill=(70, 130, 200) if n == 0 else (200, 215, 235)
        )
        text = f"{share:.1%}  {drawable(str(row['label']))}"
        while len(text) > 8 and font.getlength(text) > width - 12:
            text = f"{text[:-4]}..."
        light = n == 0 and font.getlength(text) < width * share
        pen.text((6, top + line / 2), text, fill="white" if light else "black", font=font, anchor="lm")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def strip(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Frames of a normalised clip (3, T, H, W) beside each other, uint8 (3, H, W')."""
    shift, scale = (torch.tensor(x)[:, None, None, None] for x in (mean, std))
    zoom = max(1, 96 // min(clip.shape[-2:]))
    frames = ((clip * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)
    return frames_beside(frames, min(_FRAMES, clip.shape[1])).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
