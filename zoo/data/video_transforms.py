"""Which frames of a video make a clip, and what is done to them: PySlowFast's sampling as functions of explicit draws.

Every sampler gives frame numbers; what is random comes in as numbers in [0, 1). The transforms are modules from a clip
uint8 (T, H, W, 3) to float32 (3, T, h, w), still 0..255, with the boxes of its frames carried along; they draw from
torch's default generator, which the data module seeds for each sample. Boxes are x0, y0, x1, y1 in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from zoo.errors import ZooError

# ------------------------------------------------------------------------------------------------------- clip sampling


def clip_length(num_frames: int, sampling_rate: float, fps: float, target_fps: float = 30.0) -> float:
    """Native frames that a clip of `num_frames` at `sampling_rate`, meant for `target_fps`, covers at `fps`; at least
    1."""
    return max(1.0, num_frames * sampling_rate * fps / target_fps)


def clip_window(
    video_length: float,
    length: float,
    clip: int = 0,
    num_clips: int = 1,
    offset: bool = False,
    draw: float | None = None,
) -> tuple[float, float]:
    """First and last frame, as real numbers, of a clip of `length` frames.

    Args:
        video_length: frames of the video.
        length: of the clip, in native frames; see :func:`clip_length`.
        clip, num_clips: the number of the clip among those that testing takes from a video. They start at
            delta * clip / num_clips, for delta the frames that a clip leaves over, and so never reach the end.
        offset: the clips start at whole multiples of floor(delta / (num_clips - 1)) instead, a single one at
            floor(delta / 2), as MViT and MAE take them.
        draw: in [0, 1): a random start in [0, delta], for training; `clip` then counts for nothing.
    """
    delta = max(video_length - length, 0)
    if draw is not None:
        start = draw * delta
    elif not offset:
        start = delta * clip / num_clips
    else:
        start = float(clip * math.floor(delta / (num_clips - 1)) if num_clips > 1 else math.floor(delta / 2))
    return start, start + length - 1


def spread_indices(start: float, end: float, count: int, num_frames: int) -> Tensor:
    """(count,) int64 frames evenly from `start` to `end`, kept inside the video and truncated."""
    return torch.linspace(start, end, count, dtype=torch.float32).clamp_(0, num_frames - 1).long()


def segment_indices(num_frames: int, count: int, draws: Sequence[float] | None = None) -> Tensor:
    """(count,) int64, one frame out of each of `count` equal segments of the video (Something-Something).

    The bounds of a segment are rounded and both belong to it. `draws` choose within it, for training; else its middle.
    """
    size = (num_frames - 1) / count
    bounds = [round(size * k) for k in range(count + 1)]
    if draws is None:
        return torch.tensor([(a + b) // 2 for a, b in pairwise(bounds)])
    return torch.tensor([a + int(u * (b - a + 1)) for (a, b), u in zip(pairwise(bounds), draws, strict=True)])


def strided_indices(
    num_frames: int, count: int, stride: int, clip: int = 0, num_clips: int = 1, draw: float | None = None
) -> Tensor:
    """(count,) int64 frames `stride` apart, the ends repeated where the video is too short (Charades).

    With `draw` the start is a random whole number, below zero where the video is shorter than the clip. Without, the
    clips of testing start at round(clip * delta / (num_clips - 1)); a single one, which the official code leaves open,
    in the middle.
    """
    delta = num_frames - ((count - 1) * stride + 1)
    if draw is not None:
        start = min(delta, 0) + int(draw * (abs(delta) + 1))
    else:
        start = round(max(delta, 0) / (num_clips - 1) * clip) if num_clips > 1 else max(delta, 0) // 2
    return (start + stride * torch.arange(count)).clamp(0, num_frames - 1)


def centred_indices(centre: int, half: int, stride: int, num_frames: int) -> Tensor:
    """Frames from `centre` - `half` up to, not including, `centre` + `half`, `stride` apart, kept inside the video
    (AVA, where `half` is num_frames * sampling_rate // 2); int64."""
    return torch.arange(centre - half, centre + half, stride).clamp(0, num_frames - 1)


# ----------------------------------------------------------------------------------------------------- sizes and crops


def short_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) when the short side becomes `size` and the long one follows, rounded down."""
    if width < height:
        return math.floor(height / width * size), size
    return size, math.floor(width / height * size)


def jittered_size(draw: float, low: int, high: int, inverse: bool = False) -> int:
    """A short side of `low` to `high` pixels from a draw in [0, 1): uniform in it, or, `inverse`, in its reciprocal."""
    if inverse:
        return round(1 / (1 / high + draw * (1 / low - 1 / high)))
    return round(low + draw * (high - low))


def resize_clip(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames (..., H, W), float, to (..., *size): bilinear, corners not aligned, not antialiased."""
    if tuple(clip.shape[-2:]) == tuple(size):
        return clip
    flat = clip.reshape(-1, *clip.shape[-3:]) if clip.ndim != 4 else clip
    out = interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return out.reshape(*clip.shape[:-2], *size)


def uniform_crop_offset(height: int, width: int, size: int, which: int) -> tuple[int, int]:
    """(top, left) of crop 0, 1 or 2 of a square of `size`: the first, middle and last along the longer side, and the
    middle, rounded up, along the other."""
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if height > width:
        return (0, top, height - size)[which], left
    return top, (0, left, width - size)[which]


def random_crop_offset(height: int, width: int, size: int, draws: Sequence[float]) -> tuple[int, int]:
    """(top, left) of a random square of `size`. The end is exclusive, so that the last place never comes up: the
    official code draws from height - size places where there is one more."""
    return int(draws[0] * max(height - size, 0)), int(draws[1] * max(width - size, 0))


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (N, 4) with corners moved inside the frame, to width - 1 and height - 1 at most."""
    limit = boxes.new_tensor([width - 1, height - 1, width - 1, height - 1])
    return torch.minimum(boxes.clamp(min=0), limit)


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes (N, 4) of the mirrored frame: x becomes width - x - 1."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([width - x1 - 1, y0, width - x0 - 1, y1], -1)


# ----------------------------------------------------------------------------------------------------------- transforms


class VideoTransform(nn.Module):
    """Base of the transforms here: a clip and the boxes of its frames to a square crop of `size` pixels, or of the data
    module's `image_size` where it is None.

    Called with frames uint8 (T, H, W, 3), boxes (N, 4) or None, and which of the crops of testing is wanted; gives
    float32 (3, T, size, size) in 0..255 and the boxes in pixels of the crop.

    Attributes:
        random: False when the output is a function of the input alone.
    """

    random = True

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ZooError(f"size of a transform must be positive, got {size}")
        self.size = size

    def bind(self, size: int) -> None:
        """Take over the data module's size where none was given."""
        self.size = size if self.size is None else self.size

    @property
    def side(self) -> int:
        """The crop's side in pixels."""
        return 224 if self.size is None else self.size

    def forward(self, frames: Tensor, boxes: Tensor | None = None, crop: int = 1) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"size={self.size}"


class VideoTrain(VideoTransform):
    """Short side of a random length, random square crop, flip: the training of the SlowFast papers.

    Args:
        size: side of the crop in pixels.
        scale: bounds of the short side in units of the crop's side; 256/224 to 320/224 in the papers' Kinetics
            settings, up to 340/224 for Charades.
        inverse: draw the reciprocal of the short side uniformly, not itself.
        flip: chance to mirror a clip; 0 where left and right matter (Something-Something).
    """

    def __init__(
        self,
        size: int | None = None,
        scale: tuple[float, float] = (256 / 224, 320 / 224),
        inverse: bool = False,
        flip: float = 0.5,
    ) -> None:
        super().__init__(size)
        if not 1 <= scale[0] <= scale[1]:
            raise ZooError(f"scale must rise from 1 or more, as the crop must fit into the frame; got {scale}")
        if not 0 <= flip <= 1:
            raise ZooError(f"flip must lie in 0..1, got {flip}")
        self.scale, self.inverse, self.flip = scale, inverse, flip

    def forward(self, frames: Tensor, boxes: Tensor | None = None, crop: int = 1) -> tuple[Tensor, Tensor | None]:
        draws = torch.rand(4, dtype=torch.float64).tolist()
        low, high = (round(self.side * bound) for bound in self.scale)
        clip, boxes = _resized(frames, jittered_size(draws[0], low, high, self.inverse), boxes)
        offset = random_crop_offset(clip.shape[-2], clip.shape[-1], self.side, draws[1:3])
        clip, boxes = _cut(clip, offset, self.side, boxes)
        if draws[3] < self.flip:
            clip = clip.flip(-1)
            boxes = None if boxes is None else flip_boxes(boxes, self.side)
        return _finished(clip, boxes)


class VideoEval(VideoTransform):
    """Resize the short side, then cut a square at one of three places along the long side, or keep all.

    Args:
        size: side of the crop in pixels.
        short_side: of the frames, in units of the crop's side: 1 in the papers' three-crop testing at 256 pixels,
            256/224 for their single centre crop of 224.
        crop: False keeps the whole frame, so that batches take frames of one shape only (the papers' AVA testing).
    """

    random = False

    def __init__(self, size: int | None = None, short_side: float = 1.0, crop: bool = True) -> None:
        super().__init__(size)
        if short_side < 1:
            raise ZooError(f"short_side must be 1 or more, as the crop must fit into the frame; got {short_side}")
        self.short_side, self.crop = short_side, crop

    def forward(self, frames: Tensor, boxes: Tensor | None = None, crop: int = 1) -> tuple[Tensor, Tensor | None]:
        clip, boxes = _resized(frames, round(self.side * self.short_side), boxes)
        if self.crop:
            offset = uniform_crop_offset(clip.shape[-2], clip.shape[-1], self.side, crop)
            clip, boxes = _cut(clip, offset, self.side, boxes)
        return _finished(clip, boxes)


def _resized(frames: Tensor, short: int, boxes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """uint8 (T, H, W, 3) to float32 (T, 3, h, w) whose short side is `short`, and the boxes with it."""
    height, width = frames.shape[1:3]
    size = (height, width) if short == min(height, width) else short_side_size(height, width, short)
    clip = resize_clip(frames.permute(0, 3, 1, 2).to(torch.float32), size)
    if boxes is not None:  # scaled by the ratio of the long sides along both axes, as the official code does
        scale = size[0] / height if width < height else size[1] / width
        boxes = clip_boxes(boxes, height, width) * scale
    return clip, boxes


def _cut(clip: Tensor, offset: tuple[int, int], side: int, boxes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    top, left = offset
    if boxes is not None:
        boxes = boxes - boxes.new_tensor([left, top, left, top])
    return clip[..., top : top + side, left : left + side], boxes


def _finished(clip: Tensor, boxes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if boxes is not None:
        boxes = clip_boxes(boxes, clip.shape[-2], clip.shape[-1])
    return clip.transpose(0, 1), boxes
