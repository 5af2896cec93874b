"""Pictures with boxes, masks and keypoints: transforms that move all of them together, and the data module.

A transform is a module from one :class:`Scene` to another, named by class path in a recipe; what it draws comes from
torch's default generator, which the data set seeds for each sample, and the sizes and offsets are pure functions of the
draws. Resizing is Pillow's bilinear filter on bytes, to the last bit, as in the codebases whose numbers are published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.data.base import SALT, Batch, SeededDataModule, at_least_one, key_parts, own_randomness, sample_seeds
from zoo.data.coco import (
    CocoLayout,
    CocoSource,
    Record,
    Segment,
    box_outline,
    find_coco,
    mirror_order,
    repeat_factors,
    to_rle,
)
from zoo.data.loader import EpochSampler, GroupedSampler, Key
from zoo.data.shapes import KEYPOINTS, SHAPES, make_knobs, render
from zoo.errors import ZooError, unknown

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
_CHANNELS = ("rgb", "bgr")
_MASKS = ("bitmask", "polygon", "none")
_MIN_SIDE = 1e-5  # narrower boxes are empty


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
    """

    image: Tensor
    boxes: np.ndarray
    labels: np.ndarray
    segments: list[Segment] | None = None
    keypoints: np.ndarray | None = None
    flip_order: Sequence[int] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])

    def resized(self, height: int, width: int) -> Scene:
        """At another size; masks take the nearest pixel."""
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
        """Filled up to a size on the right and below."""
        h, w = self.size
        if (h, w) == (height, width):
            return self
        image = self.image.new_full((3, height, width), value)
        image[:, :h, :w] = self.image
        out = self._moved(np.ones(2), np.zeros(2), lambda mask: np.pad(mask, ((0, height - h), (0, width - w))))
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
        return replace(self, boxes=boxes, segments=segments, keypoints=keypoints)

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
    """

    def __init__(self, sizes: list[int], max_size: int | None = 1333) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1 or (max_size is not None and max_size < 1):
            raise ZooError(f"ResizeShortestEdge: sizes must be positive, got {sizes} and max_size {max_size}")
        self.sizes, self.max_size = sizes, max_size

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


# -------------------------------------------------------------------------------------------------------------- sources


class RecordSource(Protocol):
    """A split: pictures with their objects."""

    class_names: list[str]
    keypoint_names: list[str]
    flip_order: list[int]

    def __len__(self) -> int: ...

    def read_many(self, indices: Sequence[int]) -> list[Record]: ...


DRAWN_SIDE = 128  # pixels of a drawn scene, unless said otherwise


class ShapesScenes:
    """The embedded world as a detection set: every object with its exact box, mask and keypoints.

    Args:
        split: "train", "val" or "test".
        length: how many samples it has.
        size: side of the pictures in pixels.
        seed: which world.
        min_visible: objects of which others hide more leave no trace in the annotations.
        **knobs: see :class:`~zoo.data.shapes.Knobs`.
    """

    def __init__(
        self, split: str, length: int, size: int = DRAWN_SIDE, seed: int = 0, min_visible: float = 0.25, **knobs: Any
    ) -> None:
        if not 0 <= min_visible <= 1:
            raise ZooError(f"shapes: min_visible must lie in 0..1, got {min_visible}")
        make_knobs(**knobs)
        self.split, self.length, self.size, self.seed, self.knobs = split, length, size, seed, knobs
        self.min_visible = min_visible
        self.class_names, self.keypoint_names = list(SHAPES), list(KEYPOINTS)
        self.flip_order = mirror_order(KEYPOINTS)

    def __len__(self) -> int:
        return self.length

    def read_many(self, indices: Sequence[int]) -> list[Record]:
        """Several scenes, drawn together."""
        fields = ("image", "shape", "boxes", "masks", "visible", "keypoints")
        drawn = render(self.seed, self.split, indices, self.size, fields, **self.knobs)
        here = (drawn["shape"] >= 0) & (drawn["visible"] >= self.min_visible) & drawn["masks"].flatten(2).any(2)
        records = []
        for n, index in enumerate(indices):
            kept = here[n]
            masks = drawn["masks"][n][kept].to(torch.uint8).numpy()
            records.append(
                Record(
                    image=drawn["image"][n],
                    boxes=drawn["boxes"][n][kept].double().numpy(),
                    labels=drawn["shape"][n][kept].numpy(),
                    crowd=np.zeros(len(masks), dtype=bool),
                    area=masks.sum((1, 2)).astype(np.float64),
                    segments=list(masks),
                    keypoints=drawn["keypoints"][n][kept].double().numpy(),
                    image_id=int(index),
                )
            )
        return records


class DetectionSet(Dataset):
    """A split with its transforms, normalised, padded and batched; a sample is a function of (seed, salt, epoch, index,
    repeat).

    Args:
        source: the pictures.
        transforms: applied one after the other.
        indices: these of the source's pictures only.
        training: give targets to train on, in the coordinates of the picture that the network sees; else the stored
            truth in those of the file, crowds included.
        normalise: pictures to float.
        size_divisibility: what the padded sides are multiples of.
        masks: "bitmask", "polygon" or "none".
        keypoints: whether targets hold them.
        seed, salt: of the run, and to keep splits apart.
    """

    def __init__(
        self,
        source: RecordSource,
        transforms: Sequence[nn.Module],
        indices: np.ndarray,
        training: bool,
        normalise: Normalise,
        size_divisibility: int = 1,
        masks: str = "bitmask",
        keypoints: bool = False,
        seed: int = 0,
        salt: int = 0,
    ) -> None:
        self.source, self.transforms, self.indices = source, list(transforms), indices
        self.training, self.normalise, self.size_divisibility = training, normalise, size_divisibility
        self.masks, self.keypoints = masks, keypoints
        self.seed, self.salt = seed, salt

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        """The batch of some keys; see :class:`DetectionDataModule`."""
        parts = key_parts(keys)
        places = torch.from_numpy(parts[:, 0].copy())
        index = self.indices[parts[:, 0]]
        parts[:, 0] = index
        images: list[Tensor] = []
        targets: list[dict[str, Any]] = []
        original: list[tuple[int, int]] = []
        records = self.source.read_many(index.tolist())
        with own_randomness(foreign=False):
            for record, seed in zip(records, sample_seeds(self.seed, self.salt, parts), strict=True):
                torch.default_generator.manual_seed(seed)
                scene = self._scene(record)
                original.append(scene.size)
                for transform in self.transforms:
                    scene = transform(scene)
                images.append(scene.image)
                targets.append(self._target(*scene.finished(), record) if self.training else self._truth(record))
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        return {
            "image": self.normalise(images, self.size_divisibility),
            "size": torch.tensor(sizes).view(-1, 2),
            "original_size": torch.tensor(original).view(-1, 2),
            "target": targets,
            "path": [record.path for record in records],
            "index": places,
        }

    def _scene(self, record: Record) -> Scene:
        """The picture with what the transforms should move: in training the objects that are no crowd."""
        if not self.training:
            return Scene(record.image, np.zeros((0, 4)), np.zeros(0, np.int64))
        kept = ~record.crowd
        segments: list[Segment] | None = None
        if self.masks != "none":
            segments = [_outline(record, n) for n in np.flatnonzero(kept).tolist()]
        points = record.keypoints[kept] if self.keypoints and record.keypoints is not None else None
        return Scene(record.image, record.boxes[kept], record.labels[kept], segments, points, self.source.flip_order)

    def _target(self, scene: Scene, kept: np.ndarray, record: Record) -> dict[str, Any]:
        boxes = torch.from_numpy(scene.boxes).float()
        target: dict[str, Any] = {
            "boxes": boxes,
            "labels": torch.from_numpy(scene.labels),
            "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
            "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
            "image_id": torch.tensor(record.image_id),
        }
        if scene.segments is not None and self.masks == "bitmask":
            target["masks"] = torch.from_numpy(rasterise(scene.segments, *scene.size))
        elif scene.segments is not None:
            if any(isinstance(segment, np.ndarray) for segment in scene.segments):
                raise ZooError(f"{record.path or 'shapes'}: masks that are no polygons; set data.masks to bitmask")
            target["polygons"] = [[ring.reshape(-1) for ring in segment] for segment in scene.segments]
        if scene.keypoints is not None:
            target["keypoints"] = torch.from_numpy(scene.keypoints).float()
        return target

    def _truth(self, record: Record) -> dict[str, Any]:
        target: dict[str, Any] = {
            "boxes": torch.from_numpy(record.boxes),
            "labels": torch.from_numpy(record.labels),
            "area": torch.from_numpy(record.area),
            "iscrowd": torch.from_numpy(record.crowd.astype(np.int64)),
            "image_id": torch.tensor(record.image_id),
        }
        if self.masks != "none":
            height, width = int(record.image.shape[-2]), int(record.image.shape[-1])
            target["masks"] = [to_rle(_stored(record, n), height, width) for n in range(len(record.segments))]
        if self.keypoints and record.keypoints is not None:
            target["keypoints"] = torch.from_numpy(record.keypoints)
        for name in ("neg_labels", "not_exhaustive_labels", "frequency"):
            if (known := getattr(record, name)) is not None:
                target[name] = torch.from_numpy(known)
        return target


def _stored(record: Record, n: int) -> Any:
    """An object's segmentation in one of COCO's forms; its box where it has none."""
    segment = record.segments[n]
    if segment is not None:
        return segment
    return [ring.reshape(-1).tolist() for ring in box_outline(record.boxes[n], *record.image.shape[-2:])]


def _outline(record: Record, n: int) -> Segment:
    """What the transforms move of an object's stored segmentation."""
    segment = _stored(record, n)
    if isinstance(segment, np.ndarray):
        return segment
    if isinstance(segment, list):
        return [np.array(points, dtype=np.float64).reshape(-1, 2) for points in segment]
    return coco_mask.decode(to_rle(segment, *record.image.shape[-2:]))


class Normalise:
    """Bytes (3, H, W) to one float batch: channels in order, minus mean, over deviation, then zeros on the right and
    below.

    Args:
        mean, std: of the channels in their order, in units of 0..255.
        channels: "rgb" or "bgr", the order the network wants.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels: str = "rgb") -> None:
        if channels not in _CHANNELS:
            raise unknown("order of channels", channels, _CHANNELS)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ZooError(f"pixel_mean and pixel_std need three numbers each, std positive; got {mean} and {std}")
        self.mean, self.std = (np.asarray(x, dtype=np.float32).tolist() for x in (mean, std))
        self.order = (2, 1, 0) if channels == "bgr" else (0, 1, 2)

    def __call__(self, images: Sequence[Tensor], divisibility: int = 1) -> Tensor:
        """(B, 3, H, W) float32 of the pictures, H and W the largest, rounded up to multiples of `divisibility`."""
        sides = [max((int(i.shape[axis]) for i in images), default=0) for axis in (-2, -1)]
        height, width = (math.ceil(side / divisibility) * divisibility for side in sides)
        batch = torch.zeros(len(images), 3, height, width)
        for out, image in zip(batch, images, strict=True):
            # A channel at a time: all steps while it lies in the cache.
            for to, channel, mean, std in zip(out, self.order, self.mean, self.std, strict=True):
                to = to[: image.shape[-2], : image.shape[-1]].copy_(image[channel]).sub_(mean)
                if std != 1:
                    to.div_(std)
        return batch


# ---------------------------------------------------------------------------------------------------------- data module

_LENGTH = {"train": 50_000, "val": 1_000, "test": 1_000}
_COCO_OPTIONS = ("annotations", "images", "outside", "coco_classes")
_PHOTO_SIZES = [640, 672, 704, 736, 768, 800]


class DetectionDataModule(SeededDataModule):
    """Pictures with objects for training and evaluation; a set in COCO's format, or the embedded world.

    Batches: image (B, 3, H, W) float32, normalised, then padded with zeros on the right and below; size (B, 2) int64,
    height and width of each picture inside it; original_size (B, 2), those of the file; path, a list; and target, a
    list of B dicts. Of N objects a target for training holds, in the pixels of the picture as the network sees it:

    - boxes (N, 4) float32 x0, y0, x1, y1; labels (N,) int64 from 0; area (N,) of the boxes; iscrowd (N,); image_id ();
    - masks (N, h, w) bool (h, w = size) or, with ``masks: polygon``, polygons, N lists of flat float64 arrays;
    - keypoints (N, P, 3) float32 x, y, visibility.

    Crowds, pictures without objects and what a crop left nothing of are not trained on. For val, test and predict the
    target is the stored truth in pixels of the file, crowds included: boxes and area float64, masks as run lengths. It
    stays on the CPU, where the metric wants it. Of LVIS it also says what is known on the picture (neg_labels,
    not_exhaustive_labels, frequency; see :class:`~zoo.metrics.LvisAP`). Order, randomness, resuming and exact
    evaluation are :class:`~zoo.data.base.SeededDataModule`'s.

    Args:
        dataset: "shapes", a card's name (``coco``), a folder or a json; see :mod:`zoo.data.coco`.
        data_dir: where a carded set lies on this machine.
        batch_size: per device.
        eval_batch_size: per device. Padding to another picture's size changes what a network sees at the border, so
            that published numbers are those of 1.
        train_transforms: one after the other; None: the shorter side one of 640 to 800 pixels, the longer at most 1333,
            and a flip; for ``shapes`` a flip.
        eval_transforms: likewise; None: the shorter side 800, the longer at most 1333; for ``shapes`` none.
        pixel_mean, pixel_std: of the channels in their order, in units of 0..255; None: ImageNet's.
        channels: "rgb" or "bgr".
        size_divisibility: what the padded sides are multiples of; 32 for a pyramid.
        masks: "bitmask", "polygon" (what the official code crops and draws for each proposal) or "none".
        keypoints: whether targets hold keypoints; pictures without a labelled one are then not trained on.
        aspect_grouping: wide and high pictures in batches of their own.
        repeat_threshold: of LVIS's repeat factors; None: every picture once.
        num_workers: loading processes; None: none for ``shapes``, else what the machine's cores allow.
        train_samples: train on this many pictures only, drawn once with the seed; for ``shapes`` the split's length.
        seed: of order and augmentation; None: the one of ``seed_everything``, else 0.
        image_size: the shorter side where no transforms are given, the longer at most 5/3 of it; for ``shapes`` the
            side.
        options: further keywords of the source: for ``shapes`` size (side in pixels), min_visible and
            :class:`~zoo.data.shapes.Knobs`; else annotations, images, outside and coco_classes of
            :func:`~zoo.data.coco.find_coco`.

    Attributes:
        num_classes, class_names, keypoint_names: known as soon as the module is made; without data_dir, a carded set's
            classes are the card's.

    Raises:
        ZooError: an unknown set or option, a json that is missing or damaged, pictures that are not there.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        data_dir: str | None = None,
        batch_size: int = 2,
        eval_batch_size: int = 1,
        train_transforms: list[nn.Module] | None = None,
        eval_transforms: list[nn.Module] | None = None,
        pixel_mean: list[float] | None = None,
        pixel_std: list[float] | None = None,
        channels: Literal["rgb", "bgr"] = "rgb",
        size_divisibility: int = 32,
        masks: Literal["bitmask", "polygon", "none"] = "bitmask",
        keypoints: bool = False,
        aspect_grouping: bool = True,
        repeat_threshold: float | None = None,
        num_workers: int | None = None,
        train_samples: int | None = None,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, 1, seed, in_memory=dataset == "shapes")
        at_least_one(size_divisibility=size_divisibility, train_samples=train_samples, image_size=image_size)
        if masks not in _MASKS:
            raise unknown("form of masks", masks, _MASKS)
        if repeat_threshold is not None and not 0 < repeat_threshold <= 1:
            raise ZooError(f"data.repeat_threshold must lie in 0..1, got {repeat_threshold}")
        self.dataset, self.data_dir, self.options = dataset, data_dir, dict(options or {})
        drawn = dataset == "shapes"
        if drawn and image_size is not None:
            self.options.setdefault("size", image_size)
        mean, std = pixel_mean or PIXEL_MEAN, pixel_std or PIXEL_STD
        if channels == "bgr":
            mean, std = pixel_mean or PIXEL_MEAN[::-1], pixel_std or PIXEL_STD[::-1]
        self.normalise = Normalise(mean, std, channels)
        self.mean, self.std, self.channels = tuple(mean), tuple(std), channels
        self.size_divisibility, self.masks, self.keypoints = size_divisibility, masks, keypoints
        self.aspect_grouping, self.repeat_threshold, self.train_samples = (
            aspect_grouping, repeat_threshold, train_samples
        )  # fmt: skip
        flip = RandomFlip()
        sizes, longest = (_PHOTO_SIZES, 1333) if image_size is None else ([image_size], 5 * image_size // 3)
        self.train_transforms = train_transforms
        if train_transforms is None:
            self.train_transforms = [flip] if drawn else [ResizeShortestEdge(sizes, longest), flip]
        self.eval_transforms = eval_transforms
        if eval_transforms is None:
            self.eval_transforms = [] if drawn else [ResizeShortestEdge(sizes[-1:], longest)]
        self._layout = None if drawn else self._find()
        self.class_names, self.keypoint_names = self._names()
        self.num_classes = len(self.class_names)
        if keypoints and self._layout is not None and not self.keypoint_names:
            raise ZooError(f"{dataset} has no keypoints; for COCO set data.options.annotations to person_keypoints")

    def preprocess_facts(self) -> dict[str, Any] | None:
        """Those of a resize of the shorter side (`size`, at most `longest`), or of none (`size` null); of drawn scenes
        `size` is their side, so that photos come in the size that was learnt from. Mean and deviation in units of 1;
        `divisibility` of the padded sides."""
        shared = {
            "kind": "objects",
            "mean": [value / 255 for value in self.mean],
            "std": [value / 255 for value in self.std],
            "channels": self.channels,
            "divisibility": self.size_divisibility,
        }
        steps = self.eval_transforms or []
        if not steps:
            side = self.options.get("size", DRAWN_SIDE) if self.dataset == "shapes" else None
            return {**shared, "size": side, "longest": side and 5 * side // 3}
        if len(steps) == 1 and isinstance(steps[0], ResizeShortestEdge) and len(steps[0].sizes) == 1:
            return {**shared, "size": steps[0].sizes[0], "longest": steps[0].max_size}
        return {**shared, "transform": ", ".join(type(step).__qualname__ for step in steps)}

    def _find(self) -> CocoLayout | None:
        """Where the set lies; None where it has a card and nobody has said yet."""
        for name in self.options:
            if name not in _COCO_OPTIONS:
                raise unknown(f"option of {self.dataset}", name, _COCO_OPTIONS)
        if self.data_dir is None and not Path(self.dataset).expanduser().exists():
            from zoo import catalog

            known = [name for name in catalog.list_datasets() if "detection" in catalog.data_card(name).task]
            if self.dataset not in known:
                raise unknown("dataset", self.dataset, known)
            return None
        place = self.data_dir or self.dataset
        named = self.dataset if self.data_dir else "instances"
        flags = [bool(self.options.get(name, False)) for name in ("outside", "coco_classes")]
        return find_coco(place, self.options.get("annotations"), self.options.get("images"), named, *flags)

    def _names(self) -> tuple[list[str], list[str]]:
        """Of classes and keypoints: the set's own or, as long as nobody has said where it lies, the card's."""
        if self._layout is None and self.dataset != "shapes":
            from zoo import catalog

            card = catalog.data_card("coco" if self.options.get("coco_classes") else self.dataset)
            return card.class_names or [str(k) for k in range(card.num_classes or 0)], []
        first = "train" if self._layout is None or "train" in self._layout.parts else "val"
        source = self._open(first)[0]
        return source.class_names, source.keypoint_names

    def _open(self, split: str) -> tuple[RecordSource, np.ndarray]:
        if self._layout is not None:
            return self._layout.open(split)
        if self.dataset != "shapes":
            raise ZooError(f"{self.dataset} is read from a folder: set data.data_dir to where it lies")
        part = "test" if split == "predict" else split
        if part not in _LENGTH:
            raise unknown("split", split, (*_LENGTH, "predict"))
        length = self.train_samples if split == "train" and self.train_samples else _LENGTH[part]
        return ShapesScenes(part, length, **self.options), np.arange(length)

    def samples(self, split: str, training: bool | None = None) -> DetectionSet:
        """The transformed split; `training` chooses between the two sorts of targets and transforms, by default as the
        split asks."""
        training = split == "train" if training is None else training
        source, indices = self._open(split)
        if training and isinstance(source, CocoSource):
            indices = np.intersect1d(indices, source.trainable(self.keypoints))
            if not len(indices):
                raise ZooError(f"{source.file}: no picture has an object to train on")
        if split == "train" and self.train_samples is not None and self.dataset != "shapes":
            indices = indices[self.drawn_part(len(indices), self.train_samples).numpy()]
        transforms = self.train_transforms if training else self.eval_transforms
        return DetectionSet(
            source, transforms or [], indices, training, self.normalise, self.size_divisibility, self.masks,
            self.keypoints, self.seed, SALT[split],
        )  # fmt: skip

    def class_image_counts(self) -> Tensor | None:
        """(num_classes,) int64: on how many of the pictures to train on each class is; None where they are drawn."""
        source, _ = self._open("train")
        return torch.from_numpy(source.image_counts()) if isinstance(source, CocoSource) else None

    def train_sampler(self, samples: Any) -> EpochSampler:
        """Wide and high pictures apart, pictures with rare classes more often, as asked for."""
        source, indices = samples.source, samples.indices
        if not isinstance(source, CocoSource):
            return super().train_sampler(samples)
        sizes = source.sizes[indices]
        wide = (sizes[:, 1] > sizes[:, 0]).astype(np.int64) * self.aspect_grouping
        factors = None
        if self.repeat_threshold is not None:
            factors = repeat_factors([source.labels[n] for n in indices], self.repeat_threshold)
        return GroupedSampler(self.batch_size, torch.from_numpy(wide), factors, self.seed, **self._place())

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The truth of evaluation stays where it is."""
        stays = {}
        if self.trainer is not None and not self.trainer.training:
            stays = {"target": batch["target"]}
            batch = {key: value for key, value in batch.items() if key != "target"}
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), **stays}
