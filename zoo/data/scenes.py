"""A picture and its objects on their way to a network: scenes, and the transforms that move all of them together.

A transform is a module from one :class:`Scene` to another, named by class path in a recipe; what it draws comes from
torch's default generator, which the data set seeds for each sample, and the sizes and offsets are pure functions of the
draws. Resizing is Pillow's bilinear filter on bytes, to the last bit, as in the codebases whose numbers are published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from zoo.data.coco import Segment
from zoo.errors import ZooError

_MIN_SIDE = 1e-5  # narrower boxes are empty
IGNORED = 255  # label of a pixel that does not count


# --------------------------------------------------------------------------------------------------------------- scenes


@dataclass
class Scene:
    """A picture and its n objects on their way through the transforms.

    Attributes:
        image: (3, H, W) uint8.
        boxes: (n, 4) float64 x0, y0, x1, y1; they may reach outside until the end.
        labels: (n,) int64.
        segments: of each object polygons, each (points, 2) float64, or a (H, W) uint8 mask; None without masks.
        keypoints: (n, P, 3) float64, or None.
        flip_order: which keypoint each becomes in a mirror.
        semantic: (H, W) uint8 label of each pixel, 255 for those that do not count; or None.
    """

    image: Tensor
    boxes: np.ndarray
    labels: np.ndarray
    segments: list[Segment] | None = None
    keypoints: np.ndarray | None = None
    flip_order: Sequence[int] = ()
    semantic: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])

    def resized(self, height: int, width: int) -> Scene:
        """At another size; masks and labels take the nearest pixel."""
        h, w = self.size
        if (h, w) == (height, width):
            return self
        scale = np.array([width / w, height / h])
        out = self._moved(scale, np.zeros(2), lambda mask: _pil_resize(mask, height, width, nearest=True))
        return replace(out, image=resize_pil(self.image, height, width))

    def cropped(self, top: int, left: int, height: int, width: int) -> Scene:
        """What a window shows; it may be larger than the picture. Polygons are cut off at the window's border."""
        window = (slice(top, top + height), slice(left, left + width))
        out = self._moved(np.ones(2), np.array([-left, -top], dtype=float), lambda mask: mask[window])
        if out.segments is not None:
            out.segments = [
                s if isinstance(s, np.ndarray) else [part for ring in s for part in clip_polygon(ring, height, width)]
                for s in out.segments
            ]
        return replace(out, image=self.image[(slice(None), *window)])

    def padded(self, height: int, width: int, value: int) -> Scene:
        """Filled up to a size on the right and below; labels with 255."""
        h, w = self.size
        if (h, w) == (height, width):
            return self
        image = self.image.new_full((3, height, width), value)
        image[:, :h, :w] = self.image
        room = ((0, height - h), (0, width - w))
        out = self._moved(np.ones(2), np.zeros(2), lambda mask: np.pad(mask, room))
        if self.semantic is not None:
            out.semantic = np.pad(self.semantic, room, constant_values=IGNORED)
        return replace(out, image=image)

    def flipped(self) -> Scene:
        """Mirrored left to right; of two keypoints that are each other's mirror image the names are swapped."""
        width = self.size[1]
        out = self._moved(np.array([-1.0, 1.0]), np.array([width, 0.0]), lambda mask: mask[:, ::-1])
        if out.keypoints is not None:
            out.keypoints = out.keypoints[:, list(self.flip_order)]
        return replace(out, image=self.image.flip(-1))

    def _moved(self, scale: np.ndarray, shift: np.ndarray, of_mask: Any) -> Scene:
        corners = self.boxes.reshape(-1, 2, 2) * scale + shift
        boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
        segments = self.segments
        if segments is not None:
            segments = [
                of_mask(segment) if isinstance(segment, np.ndarray) else [ring * scale + shift for ring in segment]
                for segment in segments
            ]
        keypoints = self.keypoints
        if keypoints is not None:
            keypoints = np.concatenate([keypoints[..., :2] * scale + shift, keypoints[..., 2:]], -1)
        semantic = None if self.semantic is None else of_mask(self.semantic)
        return replace(self, boxes=boxes, segments=segments, keypoints=keypoints, semantic=semantic)

    def with_boxes_of_segments(self) -> Scene:
        """Boxes tight around the objects' masks."""
        if self.segments is None:
            raise ZooError("boxes are to be taken from masks, but the data set gives none")
        return replace(self, boxes=np.array([_extent(s) for s in self.segments]).reshape(-1, 4))

    def finished(self) -> tuple[Scene, np.ndarray]:
        """Boxes clipped to the picture, objects gone whose box or mask is empty, keypoints outside unlabelled; and
        which objects stayed."""
        height, width = self.size
        boxes = np.clip(self.boxes, 0, [width, height, width, height])
        kept = ((boxes[:, 2:] - boxes[:, :2]) > _MIN_SIDE).all(1)
        if self.segments is not None:
            kept &= np.array([np.any(s) if isinstance(s, np.ndarray) else len(s) > 0 for s in self.segments], bool)
        keypoints = self.keypoints
        if keypoints is not None:
            inside = ((keypoints[..., :2] >= 0) & (keypoints[..., :2] <= [width, height])).all(-1)
            keypoints = np.where(((keypoints[..., 2] > 0) & inside)[..., None], keypoints, 0)[kept]
        segments = None if self.segments is None else [s for s, keep in zip(self.segments, kept, strict=True) if keep]
        out = replace(self, boxes=boxes[kept], labels=self.labels[kept], segments=segments, keypoints=keypoints)
        return out, kept


def _pil_resize(array: np.ndarray, height: int, width: int, nearest: bool = False) -> np.ndarray:
    from PIL import Image

    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.ascontiguousarray(array)).resize((width, height), how))


def resize_pil(image: Tensor, height: int, width: int) -> Tensor:
    """A (3, H, W) uint8 picture at another size by Pillow's (antialiased) bilinear filter; (3, height, width) uint8."""
    return torch.from_numpy(_pil_resize(image.permute(1, 2, 0).numpy(), height, width).copy()).permute(2, 0, 1)


def _extent(segment: Segment) -> np.ndarray:
    """(4,) the box around an object; zeros where nothing of it is there."""
    if isinstance(segment, np.ndarray):
        rows, columns = np.flatnonzero(segment.any(1)), np.flatnonzero(segment.any(0))
        if not len(rows):
            return np.zeros(4)
        return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=float)
    if not segment:
        return np.zeros(4)
    points = np.concatenate(segment)
    return np.concatenate([points.min(0), points.max(0)])


def clip_polygon(points: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """What of a polygon (N, 2) lies in [0, width] x [0, height]: parts (M, 2), each with an area.

    As detectron2's crop cuts polygons. The inside of one that crosses itself is what COCO draws: the points that its
    border goes round an odd number of times.
    """
    parts = [points]
    for axis, bound, sign in ((0, 0.0, 1), (0, float(width), -1), (1, 0.0, 1), (1, float(height), -1)):
        parts = [part for whole in parts for part in _on_one_side(whole, axis, (whole[:, axis] - bound) * sign)]
    return [part for part in parts if _area(part) > 0]


def _area(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())) / 2


def _on_one_side(points: np.ndarray, axis: int, depth: np.ndarray) -> list[np.ndarray]:
    """The parts of a polygon (N, 2) on the side of a line across `axis` where `depth` (N,), its distance, is positive.

    What is left of the polygon's border are chains from the line to the line. Sorted along it their ends bound, two by
    two, the stretches of it that lie inside.
    """
    if (depth >= 0).all():
        return [points]
    inside = depth > 0
    after = np.roll(inside, -1)
    starts, ends = np.flatnonzero(~inside & after), np.flatnonzero(inside & ~after)
    if not len(starts):
        return []
    if ends[0] < starts[0]:  # the chain that passes the first point is the last one's
        ends = np.roll(ends, -1)
    count = len(points)
    first, last = ([_cut(points, depth, int(k), (int(k) + 1) % count) for k in ks] for ks in (starts, ends))
    chains = [
        np.array([cut, *points[np.arange(start + 1, end + 1 + (count if end < start else 0)) % count], other])
        for start, end, cut, other in zip(starts, ends, first, last, strict=True)
    ]
    along = np.array([(chain[0, 1 - axis], chain[-1, 1 - axis]) for chain in chains]).reshape(-1)
    order = along.argsort(kind="stable")  # of ends: 2 n is the first of chain n, 2 n + 1 the last
    partner = np.empty(len(order), dtype=int)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    parts, left = [], set(range(len(chains)))
    while left:
        end = 2 * min(left)
        pieces = []
        while end // 2 in left:
            left.remove(end // 2)
            pieces.append(chains[end // 2][:: -1 if end % 2 else 1])
            end = int(partner[end ^ 1])
        part = np.concatenate(pieces)
        parts.append(part[(part != np.roll(part, 1, 0)).any(1)])
    return parts


def _cut(points: np.ndarray, depth: np.ndarray, a: int, b: int) -> np.ndarray:
    """Where the side from point `a` to point `b` meets the line that they have the distances `depth` to."""
    return points[a] + depth[a] / (depth[a] - depth[b]) * (points[b] - points[a])


def rasterise(segments: Sequence[Segment], height: int, width: int) -> np.ndarray:
    """(n, height, width) bool masks of objects, polygons by COCO's rule of which pixels lie inside."""
    masks = np.zeros((len(segments), height, width), dtype=bool)
    for mask, segment in zip(masks, segments, strict=True):
        if isinstance(segment, np.ndarray):
            mask[:] = segment
            continue
        if not segment:
            continue
        # Only the window that the polygons touch is drawn: its corner lies on whole pixels, which changes nothing.
        points = np.concatenate(segment)
        left, top = np.maximum(np.floor(points.min(0)).astype(int), 0)
        right, bottom = np.minimum(np.ceil(points.max(0)).astype(int) + 1, [width, height])
        if left >= right or top >= bottom:
            continue
        rings = [(ring - [left, top]).reshape(-1).tolist() for ring in segment]
        drawn = coco_mask.frPyObjects(rings, int(bottom - top), int(right - left))
        mask[top:bottom, left:right] = coco_mask.decode(coco_mask.merge(drawn))
    return masks


# ----------------------------------------------------------------------------------------------------------- transforms


def shortest_edge_size(height: int, width: int, short: int, longest: int | None = None) -> tuple[int, int]:
    """(height, width) with the shorter side at `short` pixels, unless the longer one would exceed `longest`."""
    scale = short / min(height, width)
    h, w = (float(short), scale * width) if height < width else (scale * height, float(short))
    if longest is not None and max(h, w) > longest:
        shrink = longest / max(h, w)
        h, w = h * shrink, w * shrink
    return int(h + 0.5), int(w + 0.5)


def fitted_size(height: int, width: int, box: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) of the picture in its largest size that fits `scale` times the `box` (height, width)."""
    factor = min(box[0] * scale / height, box[1] * scale / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def crop_offset(height: int, width: int, crop: tuple[int, int], draw: float) -> tuple[int, int]:
    """(top, left) of a crop (height, width), by one number in [0, 1) for both axes; zeros where nothing is cut off."""
    return round(max(height - crop[0], 0) * draw), round(max(width - crop[1], 0) * draw)


class ResizeShortestEdge(nn.Module):
    """Resize so that the shorter side has one of some lengths, drawn uniformly, and the longer one at most `max_size`.

    Args:
        sizes: lengths of the shorter side in pixels.
        max_size: largest length of the longer side.
        between: `sizes` are two, the ends of a range that whole numbers are drawn from.
    """

    def __init__(self, sizes: list[int], max_size: int | None = 1333, between: bool = False) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1 or (max_size is not None and max_size < 1):
            raise ZooError(f"ResizeShortestEdge: sizes must be positive, got {sizes} and max_size {max_size}")
        if between and (len(sizes) != 2 or sizes[0] > sizes[1]):
            raise ZooError(f"ResizeShortestEdge: between wants the two ends of a range as sizes, got {sizes}")
        self.sizes, self.max_size = list(range(sizes[0], sizes[1] + 1)) if between else sizes, max_size

    def forward(self, scene: Scene) -> Scene:
        """A resized scene."""
        pick = int(torch.randint(len(self.sizes), ())) if len(self.sizes) > 1 else 0
        return scene.resized(*shortest_edge_size(*scene.size, self.sizes[pick], self.max_size))


class ResizeScale(nn.Module):
    """First half of large-scale jitter (Ghiasi et al. 2021): fit the picture into a square of `size` times a number
    drawn uniformly from `min_scale` to `max_scale`."""

    def __init__(self, size: int = 1024, min_scale: float = 0.1, max_scale: float = 2.0) -> None:
        super().__init__()
        if size < 1 or not 0 < min_scale <= max_scale:
            raise ZooError(f"ResizeScale: need a size and 0 < min_scale <= max_scale, got {size, min_scale, max_scale}")
        self.target, self.min_scale, self.max_scale = size, min_scale, max_scale

    def forward(self, scene: Scene) -> Scene:
        """A resized scene."""
        scale = self.min_scale + (self.max_scale - self.min_scale) * float(torch.rand((), dtype=torch.float64))
        return scene.resized(*fitted_size(*scene.size, (self.target, self.target), scale))


class FixedSizeCrop(nn.Module):
    """Second half of large-scale jitter: a window of `size`, its place drawn; smaller pictures are padded.

    Args:
        size: side of the window.
        pad: fill up with grey (128); without, a smaller picture stays as it is and the batch pads it with its mean
            colour.
        recompute_boxes: make boxes tight around what the window leaves of the masks, instead of cutting them off.
    """

    def __init__(self, size: int = 1024, pad: bool = True, recompute_boxes: bool = True) -> None:
        super().__init__()
        if size < 1:
            raise ZooError(f"FixedSizeCrop: size must be positive, got {size}")
        self.window, self.pad, self.recompute_boxes = size, pad, recompute_boxes

    def forward(self, scene: Scene) -> Scene:
        """A scene of at most `size` pixels a side."""
        height, width = scene.size
        draw = float(torch.rand((), dtype=torch.float64))
        top, left = crop_offset(height, width, (self.window, self.window), draw)
        scene = scene.cropped(top, left, self.window, self.window)
        if self.pad:
            scene = scene.padded(self.window, self.window, 128)
        return scene.with_boxes_of_segments() if self.recompute_boxes else scene


class RandomFlip(nn.Module):
    """Mirror left to right with a probability."""

    def __init__(self, prob: float = 0.5) -> None:
        super().__init__()
        if not 0 <= prob <= 1:
            raise ZooError(f"RandomFlip: prob must lie in 0..1, got {prob}")
        self.prob = prob

    def forward(self, scene: Scene) -> Scene:
        """The scene or its mirror image."""
        return scene.flipped() if float(torch.rand(())) < self.prob else scene


class RandomCrop(nn.Module):
    """A window of a size, its place drawn; of a smaller picture what is there.

    Args:
        size: height and width of the window.
        max_share: of the window's labelled pixels that one label may have; 10 windows are tried, and the last is taken
            if none is so. 1 for any.
    """

    def __init__(self, size: tuple[int, int], max_share: float = 1.0) -> None:
        super().__init__()
        if len(size) != 2 or min(size) < 1 or not 0 < max_share <= 1:
            raise ZooError(f"RandomCrop: need height and width, and max_share in 0..1; got {size} and {max_share}")
        self.window, self.max_share = (int(size[0]), int(size[1])), max_share

    def forward(self, scene: Scene) -> Scene:
        """A scene of at most `size`.

        Raises:
            ZooError: `max_share` of a scene without labels.
        """
        height, width = (min(side, most) for side, most in zip(scene.size, self.window, strict=True))
        for _ in range(10):
            top, left = (
                int(torch.randint(side - part + 1, ())) for side, part in zip(scene.size, (height, width), strict=True)
            )
            if self.max_share >= 1:
                break
            if scene.semantic is None:
                raise ZooError("RandomCrop: max_share wants labels of pixels; set data.semantic")
            labels = scene.semantic[top : top + height, left : left + width].reshape(-1)
            counts = np.bincount(labels, minlength=IGNORED + 1)[:IGNORED]
            if (counts > 0).sum() > 1 and counts.max() < counts.sum() * self.max_share:
                break
        return scene.cropped(top, left, height, width)


class ColorJitter(nn.Module):
    """Brightness, contrast, saturation and hue, each moved with an even chance (SSD, Liu et al. 2016, section 2.2, as
    its code does it).

    Args:
        brightness: largest shift, in bytes.
        contrast, saturation: smallest and largest factor.
        hue: largest turn, in degrees.
    """

    def __init__(
        self,
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 36.0,
    ) -> None:
        super().__init__()
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def forward(self, scene: Scene) -> Scene:
        """The scene in other colours."""
        draws = torch.rand(9).tolist()
        image = scene.image.permute(1, 2, 0).numpy()
        if draws[0] < 0.5:
            image = _bytes(image + np.float32((2 * draws[1] - 1) * self.brightness))
        first = draws[2] < 0.5
        for late in (False, True):
            if first != late and draws[3] < 0.5:
                image = _bytes(image * np.float32(_between(self.contrast, draws[4])))
            if not late:
                image = self._tinted(image, draws)
        return replace(scene, image=torch.from_numpy(image.copy()).permute(2, 0, 1))

    def _tinted(self, image: np.ndarray, draws: Sequence[float]) -> np.ndarray:
        from PIL import Image

        if draws[5] >= 0.5 and draws[7] >= 0.5:
            return image
        tints = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
        if draws[5] < 0.5:
            tints[..., 1] = _bytes(tints[..., 1] * np.float32(_between(self.saturation, draws[6])))
        if draws[7] < 0.5:
            tints[..., 0] += np.uint8(round((2 * draws[8] - 1) * self.hue / 360 * 256) % 256)  # a turn is 256
        return np.asarray(Image.fromarray(tints, "HSV").convert("RGB"))


def _bytes(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


def _between(ends: tuple[float, float], draw: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * draw
