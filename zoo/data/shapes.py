"""The embedded world: small drawn scenes with exact ground truth, made from numbers alone, no download.

A scene is a textured background under a slanting light, one large object and up to five smaller ones around it, each
with a shape, a colour, a texture, a place, a size, a turn and a depth; nearer objects hide farther ones. The usual task
is to name the *shape of the large object*: its colour, place, turn and light say nothing about it, so neither the mean
colour nor a template solves it, and a small network learns it in minutes.

Sample `index` of a split is a pure function of (seed, split, index): parameters come from a counter-based hash
(splitmix64), trigonometry from one table, and everything else is exact IEEE arithmetic one pixel at a time, so that the
batch a sample is drawn in, its size and the number of threads change no bit of it. Splits hash to different streams.

Conventions: images are (3, H, W) uint8 RGB, y points down, boxes are (x0, y0, x1, y1) in pixels with exclusive ends,
depth runs from 0 (near) to 1 (the back of the scene). Object 0 is the large one; slots beyond the scene's count are
empty.

Speed on one core: ``python -m zoo.data.shapes`` (``--sheet FILE.png`` also draws a sheet of samples).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError, unknown

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "arrow", "hourglass")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
TEXTURES = ("plain", "striped", "checked", "dotted", "speckled")
SCENES = ("plain", "striped", "checked", "cloudy", "grainy")
KEYPOINTS = ("centre", "top", "right", "bottom", "left")
SPLITS = ("train", "val", "test")
FIELDS = (
    "image", "label", "count", "shape", "color", "texture", "scene", "boxes", "visible", "masks", "panoptic",
    "keypoints", "depth", "caption",
)  # fmt: skip
PANOPTIC_BASE = 256

_RGB = np.array(
    [[0.90, 0.12, 0.12], [0.98, 0.55, 0.08], [0.95, 0.90, 0.15], [0.15, 0.72, 0.20],
     [0.10, 0.82, 0.85], [0.15, 0.25, 0.92], [0.62, 0.15, 0.80], [0.93, 0.93, 0.93]],
    dtype=np.float32,
)  # fmt: skip
_ATLAS = 128  # cells a side of the shape and texture tables
_EXTENT = 1.5  # half the side of the tables, in object radii
_REACH = 1.3  # no shape is farther than this from its centre, in object radii
_TILE = 128  # cells a side of a background tile
_TURNS = 4096  # entries of the sine table
_CHUNK_PIXELS = 128 * 64 * 64  # drawn together: fewer spend the time on calls, more on memory
_SCENE_SLOTS, _OBJECT_SLOTS = 24, 12


@dataclass(frozen=True)
class Knobs:
    """How hard the world is.

    Args:
        label: what `label` names: "shape", "color" or "texture" of the large object, "count" (of objects, from
            `min_objects`), "scene" (the background).
        min_objects: objects in the sparsest scene.
        max_objects: objects in the fullest, at most 6.
        noise: standard deviation of pixel noise, in units of the full range.
        occlusion: chance of each small object to stand in front of the large one instead of behind it.
        clutter: contrast of the textures of background and objects, 0 to 1.
        rotation: how far objects are turned, as a share of a full turn; 1 is any way round.
        lighting: strength of the slanting light, 0 to 1.
        regions: parts of the background, each of another kind: the cells of a Voronoi diagram; at most 5.
    """

    label: str = "shape"
    min_objects: int = 1
    max_objects: int = 6
    noise: float = 0.03
    occlusion: float = 0.4
    clutter: float = 0.3
    rotation: float = 0.25
    lighting: float = 0.5
    regions: int = 1

    def __post_init__(self) -> None:
        if self.label not in _LABELS:
            raise unknown("label of shapes", self.label, _LABELS)
        if not 1 <= self.min_objects <= self.max_objects <= 6:
            raise ZooError(
                f"shapes: need 1 <= min_objects <= max_objects <= 6, got {self.min_objects} and {self.max_objects}"
            )
        for name in ("noise", "occlusion", "clutter", "rotation", "lighting"):
            if not 0 <= getattr(self, name) <= 1:
                raise ZooError(f"shapes: {name} must lie in 0..1, got {getattr(self, name)}")
        if not 1 <= self.regions <= len(SCENES):
            raise ZooError(f"shapes: regions must lie in 1..{len(SCENES)}, got {self.regions}")

    @property
    def class_names(self) -> list[str]:
        """The names behind `label`, in order."""
        if self.label == "count":
            return [str(n) for n in range(self.min_objects, self.max_objects + 1)]
        return list(_LABELS[self.label])


_LABELS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES, "color": COLORS, "texture": TEXTURES, "scene": SCENES, "count": ()
}  # fmt: skip


def make_knobs(**knobs: Any) -> Knobs:
    """:class:`Knobs` from keywords; an unknown one is a :class:`ZooError` that names the nearest."""
    known = set(Knobs.__dataclass_fields__)
    for name in knobs:
        if name not in known:
            raise unknown("option of shapes", name, known)
    return Knobs(**knobs)


# ------------------------------------------------------------------------------------------------ numbers from counters


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on a uint64 array: a bijection that mixes every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """One 64-bit hash of several integers or integer arrays, order mattering; uint64 of the broadcast shape."""
    state = np.zeros(1, np.uint64)
    for word in words:
        word = np.asarray(word)
        if word.dtype != np.uint64:
            word = np.atleast_1d(word).astype(np.int64).view(np.uint64)
        state = splitmix64((state ^ word) + _GOLDEN)
    return state


def _uniforms(seed: int, split: str, indices: np.ndarray, count: int, *stream: int) -> np.ndarray:
    """(n, count) float64 numbers in [0, 1), row i a function of (seed, split, indices[i]) and of the stream."""
    key = hash64(seed, SPLITS.index(split), indices, *stream)[:, None]
    counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (splitmix64(key + counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


# ---------------------------------------------------------------------------------------------------- tables, made once


def _polygon(x: np.ndarray, y: np.ndarray, corners: Sequence[tuple[float, float]]) -> np.ndarray:
    """Signed distance to a polygon (negative inside, even-odd rule)."""
    distance = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.hypot(wx - t * ex, wy - t * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / (by - ay) + ax)
    return np.where(inside, -distance, distance)


def _grid(cells: int, extent: float) -> tuple[np.ndarray, np.ndarray]:
    centre = ((np.arange(cells) + 0.5) / cells * 2 - 1) * extent
    return np.meshgrid(centre, centre)


def _signed_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(len(SHAPES), *x.shape): signed distance of points to every shape, in object radii; areas roughly equal."""
    radius = np.hypot(x, y)
    star = [
        (r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5))
        for k, r in enumerate([1.2, 0.52] * 5)
    ]  # fmt: skip
    angle = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    heart = list(
        zip(
            (1.0 * np.sin(angle) ** 3).tolist(),
            (-(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)) / 16).tolist(),
            strict=True,
        )
    )
    arrow = [(0, -1.15), (0.85, -0.2), (0.34, -0.2), (0.34, 1.0), (-0.34, 1.0), (-0.34, -0.2), (-0.85, -0.2)]
    bar, long = 0.33, 1.0
    cross = np.minimum(np.maximum(np.abs(x) - bar, np.abs(y) - long), np.maximum(np.abs(x) - long, np.abs(y) - bar))
    return np.stack([
        radius - 0.85,
        np.maximum(np.abs(x), np.abs(y)) - 0.76,
        _polygon(x, y, [(0, -1.15), (1.0, 0.6), (-1.0, 0.6)]),
        _polygon(x, y, star),
        cross,
        np.abs(radius - 0.76) - 0.24,
        np.maximum(radius - 1.05, 0.8 - np.hypot(x - 0.55, y)),
        _polygon(x, y, heart),
        _polygon(x, y, arrow),
        _polygon(x, y, [(-0.8, -0.95), (0.8, -0.95), (0.12, 0), (0.8, 0.95), (-0.8, 0.95), (-0.12, 0)]),
    ])  # fmt: skip


@functools.lru_cache(1)
def _shape_table() -> Tensor:
    return torch.from_numpy(_signed_distances(*_grid(_ATLAS, _EXTENT)).astype(np.float32)).flatten()


@functools.lru_cache(1)
def _texture_table() -> Tensor:
    """Brightness of each object texture over the same cells, 0 (dark) or 1."""
    x, y = _grid(_ATLAS, _EXTENT)
    # RandomState's streams are frozen by NumPy's policy, the newer generators' are not.
    speckle = np.random.RandomState(1).rand(16, 16).repeat(_ATLAS // 16, 0).repeat(_ATLAS // 16, 1)
    tables = [
        np.ones_like(x),
        (x * 2.2) % 1 < 0.5,
        ((x * 1.7) % 1 < 0.5) ^ ((y * 1.7) % 1 < 0.5),
        np.hypot((x * 2.0) % 1 - 0.5, (y * 2.0) % 1 - 0.5) > 0.3,
        speckle > 0.4,
    ]
    return torch.from_numpy(np.stack([t.astype(np.float32) for t in tables])).flatten()


@functools.lru_cache(1)
def _scene_table() -> Tensor:
    """(len(SCENES) * tile * tile) background textures in 0..1, each repeating seamlessly."""
    grid = np.arange(_TILE) / _TILE
    x, y = np.meshgrid(grid, grid)
    random = np.random.RandomState(2)

    def clouds(waves: int, falloff: float) -> np.ndarray:
        total = np.zeros((_TILE, _TILE))
        for _ in range(40):
            fx, fy = random.randint(-waves, waves + 1, 2)
            total += np.cos(2 * math.pi * (fx * x + fy * y + random.rand())) / (1 + np.hypot(fx, fy)) ** falloff
        return (total - total.min()) / (total.max() - total.min())

    tables = [
        0.5 + 0.5 * np.cos(2 * math.pi * x) * 0.3,
        0.5 + 0.5 * np.cos(2 * math.pi * 8 * x),
        ((x * 6) % 1 < 0.5) ^ ((y * 6) % 1 < 0.5),
        clouds(4, 1.0),
        clouds(24, 0.0),
    ]
    return torch.from_numpy(np.stack([np.asarray(t, np.float32) for t in tables])).flatten()


@functools.lru_cache(4)
def _noise_table(length: int, scale: float) -> Tensor:
    """Normal numbers of standard deviation `scale`, from which 2**16 different strips of `length` can be cut."""
    table = np.random.RandomState(3).standard_normal((1 << 16) + length) * scale
    return torch.from_numpy(table.astype(np.float32))


@functools.lru_cache(1)
def _sine_table() -> np.ndarray:
    """(2, turns): cosine and sine, the only trigonometry of the renderer, so that it is the same on every machine."""
    angle = np.arange(_TURNS) * (2 * math.pi / _TURNS)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)


@functools.lru_cache(1)
def _keypoint_table() -> np.ndarray:
    """(shapes, keypoints, 2) x, y in object radii: the centre, and the outermost points up, right, down and left."""
    reach = np.linspace(_REACH, 0, 261)
    points = np.zeros((len(SHAPES), len(KEYPOINTS), 2))
    for k, (dx, dy) in enumerate([(0, -1), (1, 0), (0, 1), (-1, 0)], start=1):
        inside = _signed_distances(dx * reach, dy * reach) <= -0.1
        outermost = np.where(inside.any(1), reach[inside.argmax(1)], 0)
        points[:, k] = outermost[:, None] * np.array([dx, dy])
    return points.astype(np.float32)


# --------------------------------------------------------------------------------------------------------- the renderer


@dataclass
class _Scenes:
    """Parameters of n scenes with room for m objects; float32 arrays, lengths in units of the image side."""

    count: np.ndarray  # (n,)
    site: np.ndarray  # (n, r, 2) x, y around which a region of the background lies
    scene: np.ndarray  # (n, r)
    scene_colors: np.ndarray  # (n, r, 2, 3)
    scene_turn: np.ndarray  # (n, r)
    scene_scale: np.ndarray  # (n, r)
    scene_offset: np.ndarray  # (n, r, 2)
    light: np.ndarray  # (n, 2) brightness gained from one side to the other
    noise: np.ndarray  # (n,) row of the noise table
    shape: np.ndarray  # (n, m) and so on
    color: np.ndarray
    texture: np.ndarray
    rgb: np.ndarray  # (n, m, 3)
    radius: np.ndarray
    place: np.ndarray  # (n, m, 2) x, y
    turn: np.ndarray
    depth: np.ndarray


def _scenes(seed: int, split: str, indices: np.ndarray, knobs: Knobs) -> _Scenes:
    n, m = len(indices), 6  # always six, so that max_objects changes only how many are drawn
    u = _uniforms(seed, split, indices, _SCENE_SLOTS + m * _OBJECT_SLOTS)
    s, o = u[:, :_SCENE_SLOTS], u[:, _SCENE_SLOTS:].reshape(n, m, _OBJECT_SLOTS)
    cosine, sine = _sine_table()

    count = knobs.min_objects + (s[:, 0] * (knobs.max_objects - knobs.min_objects + 1)).astype(np.int64)
    # The background's regions: the first from the scene's own numbers, the others from a stream of theirs.
    more = _uniforms(seed, split, indices, (len(SCENES) - 1) * _SCENE_SLOTS + 16, 1) if knobs.regions > 1 else None
    b = s[:, None] if more is None else np.concatenate([s[:, None], more[:, 16:].reshape(n, -1, _SCENE_SLOTS)], 1)
    b = b[:, : knobs.regions]
    kind = (b[..., 1] * len(SCENES)).astype(np.int64)
    site = np.zeros((n, knobs.regions, 2))
    if more is not None:  # kinds in turn, in an order of their own
        others = more[:, : len(SCENES) - 1].argsort(1, kind="stable")[:, : knobs.regions - 1]
        kind[:, 1:] = (kind[:, :1] + 1 + others) % len(SCENES)
        site = more[:, 4 : 4 + 2 * knobs.regions].reshape(n, -1, 2)
    base = 0.2 + 0.6 * b[..., 2:5]
    contrast = np.where(b[..., 5:6] < 0.5, -1, 1) * (0.25 + 0.75 * b[..., 6:7]) * knobs.clutter
    scene_colors = np.stack([base, base + contrast * (0.3 + 0.4 * b[..., 7:10])], 2).clip(0.03, 0.97)
    light_turn = (s[:, 10] * _TURNS).astype(np.int64)
    strength = s[:, 11] * knobs.lighting
    light = np.stack([cosine[light_turn] * strength, sine[light_turn] * strength], 1)

    color = (o[..., 1] * len(COLORS)).astype(np.int64)
    rgb = (_RGB[color] + (o[..., 8:11] - 0.5) * 0.2).clip(0.02, 1)
    radius = np.where(np.arange(m) == 0, 0.24 + 0.10 * o[..., 3], 0.06 + 0.06 * o[..., 3])
    # The small objects stand on a ring around the large one, a sixth of a turn from each other and jittered, at a
    # distance at which they may overlap it or each other but never vanish behind it.
    around = ((s[:, 12:13] + (np.arange(m) + 0.5 * o[..., 4]) / (m - 1)) * _TURNS).astype(np.int64) % _TURNS
    far = (radius[:, :1] + radius) * (0.75 + 0.45 * o[..., 5])
    place = 0.39 + 0.22 * s[:, None, 13:15] + far[..., None] * np.stack([cosine[around], sine[around]], -1)
    place[:, 0] = 0.39 + 0.22 * s[:, 13:15]
    # Depth: the large object stands at the middle, the others in front of or behind it.
    before = o[..., 6] < knobs.occlusion
    depth = np.where(before, 0.1 + 0.3 * o[..., 7], 0.6 + 0.3 * o[..., 7])
    depth[:, 0] = 0.5

    def f32(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)

    return _Scenes(
        count=count,
        site=f32(site),
        scene=kind,
        scene_colors=f32(scene_colors),
        scene_turn=(b[..., 15] * _TURNS).astype(np.int64),
        scene_scale=f32(0.5 + 0.8 * b[..., 16]),
        scene_offset=f32(b[..., 17:19] * _TILE),
        light=f32(light),
        noise=(s[:, 19] * (1 << 16)).astype(np.int64),
        shape=(o[..., 0] * len(SHAPES)).astype(np.int64),
        color=color,
        texture=(o[..., 2] * len(TEXTURES)).astype(np.int64),
        rgb=f32(rgb),
        radius=f32(radius),
        place=f32(place.clip(0.05, 0.95)),
        turn=((o[..., 11] - 0.5) * (knobs.rotation * _TURNS)).astype(np.int64) % _TURNS,
        depth=f32(depth),
    )


def _regions(scenes: _Scenes, size: int) -> Tensor:
    """(n, size * size) int64, the region of the background that each pixel belongs to: that of the nearest site."""
    n, count = scenes.scene.shape
    if count == 1:
        return torch.zeros(n, size * size, dtype=torch.int64)
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    across, down = ((axis - scenes.site[..., k : k + 1]) ** 2 for k in (0, 1))
    far = torch.from_numpy(down)[..., :, None] + torch.from_numpy(across)[..., None, :]
    return far.view(n, count, size * size).argmin(1)


def _draw(
    scenes: _Scenes,
    knobs: Knobs,
    out: Tensor,
    scratch: Tensor,
    owner: Tensor | None = None,
    depth: Tensor | None = None,
) -> None:
    """Fill `out` (n, 3, size, size) uint8, and, if given, `owner` (n, size*size) uint8 with 1 + object and `depth`.

    `scratch` is room for as many floats as `out` has bytes: fresh memory for each chunk would cost a fifth of the time.
    """
    n, size, dark = len(scenes.count), out.shape[-1], 0.9 * knobs.clutter
    pixels = size * size
    cosine, sine = _sine_table()
    t = torch.from_numpy
    axis = np.arange(size, dtype=np.float32) + np.float32(0.5)

    # Background: a tile, turned, scaled and shifted; two colours between which its value moves.
    canvas = scratch[: n * 3 * pixels].view(n, 3, pixels)
    region = _regions(scenes, size)
    for r in range(scenes.scene.shape[1]):
        step = (scenes.scene_scale[:, r] * np.float32(_TILE / size))[:, None]
        turn, offset = scenes.scene_turn[:, r], scenes.scene_offset[:, r]
        c, s = cosine[turn][:, None] * step, sine[turn][:, None] * step
        columns = (t(c * axis + offset[:, :1]), t(-s * axis + offset[:, 1:]))
        rows = (t(s * axis), t(c * axis))
        cell = [
            (col[:, None, :] + row[:, :, None]).add_(4.0 * _TILE).to(torch.int32).bitwise_and_(_TILE - 1)
            for col, row in zip(columns, rows, strict=True)
        ]
        cell[1].mul_(_TILE).add_(cell[0]).add_(t((scenes.scene[:, r] * _TILE * _TILE).astype(np.int32))[:, None, None])
        value = _scene_table().index_select(0, cell[1].view(-1)).view(n, 1, pixels)
        start, end = t(scenes.scene_colors[:, r, 0, :, None]), t(scenes.scene_colors[:, r, 1, :, None])
        if r == 0:
            torch.mul(value, end - start, out=canvas).add_(start)
        else:
            torch.where((region == r).view(n, 1, pixels), (value * (end - start)).add_(start), canvas, out=canvas)
    flat = canvas.view(-1)

    # Objects, farthest first: one layer of all scenes at a time, in windows as large as the layer's largest object.
    # Layers count from the large objects, which so make up layer 0 alone.
    present = np.arange(scenes.depth.shape[1]) < scenes.count[:, None]
    order = np.argsort(np.where(present, -scenes.depth, np.inf), axis=1, kind="stable")
    rank = np.argsort(order, axis=1)
    layers = rank - rank[:, :1]
    for layer in range(-layers.shape[1] + 1, layers.shape[1]):
        row, obj = np.nonzero((layers == layer) & present)
        if not len(row):
            continue
        radius = scenes.radius[row, obj] * np.float32(size)
        window = 2 * int(np.ceil(radius.max() * np.float32(_REACH))) + 2
        centre = scenes.place[row, obj] * np.float32(size)
        corner = np.floor(centre).astype(np.int64) - window // 2
        grid = corner[:, :, None] + np.arange(window)  # (k, xy, window) pixel numbers
        delta = grid.astype(np.float32) + np.float32(0.5) - centre[:, :, None]
        # Pixels outside the picture are sent to the table's rim, where every shape is far away.
        delta_rim = np.where((grid >= 0) & (grid < size), np.float32(0), np.float32(1e6))
        unit = np.float32(_ATLAS / (2 * _EXTENT)) / radius
        c, s = (cosine[scenes.turn[row, obj]] * unit)[:, None], (sine[scenes.turn[row, obj]] * unit)[:, None]
        middle = np.float32(_ATLAS / 2)
        u = t(c * delta[:, 0] + middle + delta_rim[:, 0])[:, None, :] + t(s * delta[:, 1] + delta_rim[:, 1])[:, :, None]
        v = t(-s * delta[:, 0] + middle)[:, None, :] + t(c * delta[:, 1])[:, :, None]
        # Of an object of a few pixels the rim is not far enough away to stand for everything beyond it.
        tiny = radius.min() * (_EXTENT - _REACH) < 1
        beyond = torch.maximum((u - _ATLAS / 2).abs(), (v - _ATLAS / 2).abs()) > _ATLAS / 2 - 1 if tiny else None
        at = v.clamp_(0, _ATLAS - 1).to(torch.int32).mul_(_ATLAS).add_(u.clamp_(0, _ATLAS - 1).to(torch.int32))
        shape = scenes.shape[row, obj] * _ATLAS * _ATLAS
        at.add_(t(shape.astype(np.int32))[:, None, None])
        alpha = _shape_table().index_select(0, at.view(-1)).view(at.shape)
        alpha.mul_(t(-radius)[:, None, None]).add_(0.5).clamp_(0, 1)
        if beyond is not None:
            alpha.masked_fill_(beyond, 0)

        # Only the pixels an object touches go on.
        where = alpha.view(-1).nonzero()[:, 0]
        k = where.div(window * window, rounding_mode="floor").to(torch.int32)
        a = alpha.view(-1).index_select(0, where)
        grid = grid.astype(np.int32)
        first = (row * 3 * pixels).astype(np.int32)[:, None]
        place = t(grid[:, 1] * np.int32(size) + first)[:, :, None] + t(grid[:, 0])[:, None, :]
        place = place.view(-1).index_select(0, where)
        at.add_(t(((scenes.texture[row, obj] * _ATLAS * _ATLAS) - shape).astype(np.int32))[:, None, None])
        shade = _texture_table().index_select(0, at.view(-1).index_select(0, where)).mul_(dark).add_(1 - dark)
        paint = t(scenes.rgb[row, obj].T.copy())
        if owner is not None or depth is not None:
            solid = a > 0.5
            ks, target = k[solid], (place[solid] - t(first[:, 0] - (row * pixels).astype(np.int32))[k[solid]]).long()
            if owner is not None:
                owner.view(-1)[target] = t((obj + 1).astype(np.uint8))[ks]
            if depth is not None:
                depth.view(-1)[target] = t(scenes.depth[row, obj])[ks]
        for channel in range(3):
            under = flat.index_select(0, place)
            color = paint[channel].index_select(0, k).mul_(shade).sub_(under).mul_(a).add_(under)
            flat.index_copy_(0, place.long(), color)
            place.add_(pixels)

    # Light and noise over all, then bytes.
    across = (axis / np.float32(size) - np.float32(0.5)) * np.float32(1.2)
    light = t(1 + scenes.light[:, :1] * across)[:, None, :] + t(scenes.light[:, 1:] * across)[:, :, None]
    canvas.mul_(light.view(n, 1, pixels))
    if knobs.noise:
        table = _noise_table(3 * pixels, knobs.noise)
        for picture, start_at in zip(canvas.view(n, 3 * pixels), scenes.noise.tolist(), strict=True):
            picture.add_(table[start_at : start_at + 3 * pixels])
    canvas.mul_(255).add_(0.5).clamp_(0, 255)
    out.copy_(canvas.view(n, 3, size, size))


def _caption(scenes: _Scenes, i: int) -> str:
    def article(text: str) -> str:
        return f"an {text}" if text[0] in "aeiou" else f"a {text}"

    objects = [
        article(f"{'small' if k else 'large'} {TEXTURES[t]} {COLORS[c]} {SHAPES[s]}")
        for k, (t, c, s) in enumerate(zip(scenes.texture[i], scenes.color[i], scenes.shape[i], strict=True))
        if k < scenes.count[i]
    ]
    listed = objects[0] if len(objects) == 1 else f"{', '.join(objects[:-1])} and {objects[-1]}"
    return f"{listed} on {article(SCENES[scenes.scene[i, 0]])} background"


def requested(
    world: str,
    split: str,
    indices: Iterable[int] | np.ndarray | Tensor,
    size: int,
    fields: Sequence[str],
    known: Sequence[str],
) -> np.ndarray:
    """The sample numbers (n,) int64 of a request to a drawn `world`; a :class:`ZooError` where it cannot be met."""
    if split not in SPLITS:
        raise unknown(f"split of {world}", split, SPLITS)
    for field in fields:
        if field not in known:
            raise unknown(f"field of {world}", field, known)
    if size < 16:
        raise ZooError(f"{world}: size must be at least 16 pixels, got {size}")
    number = np.asarray(indices if isinstance(indices, (np.ndarray, Tensor)) else list(indices), dtype=np.int64)
    if number.size and number.min() < 0:
        raise ZooError(f"{world}: sample numbers must not be negative")
    return number


def render(
    seed: int,
    split: str,
    indices: Iterable[int] | np.ndarray | Tensor,
    size: int = 64,
    fields: Sequence[str] = FIELDS,
    **knobs: Any,
) -> dict[str, Any]:
    """Draw samples of a split and what is true of them.

    Args:
        seed: which world.
        split: "train", "val" or "test".
        indices: sample numbers, any non-negative integers; n of them.
        size: side of the pictures in pixels, at least 16.
        fields: which entries to make; pictures and labels alone are about twice as fast as everything.
        **knobs: see :class:`Knobs`.

    Returns:
        A dict with, for m = `max_objects` slots (object 0 the large one; -1 or zeros in empty slots):

        - image (n, 3, size, size) uint8; label (n,) int64; caption, a list of n sentences;
        - count (n,) of objects, scene (n,) kind of the background (of its first region); shape, color, texture (n, m)
          int64;
        - boxes (n, m, 4) float32, tight around the visible part; masks (n, m, size, size) bool, the visible part;
        - visible (n, m) float32, the share of an object's pixels in the picture that no other hides;
        - panoptic (n, size, size) int64, category * 256 + instance: categories 0..9 are the shapes (instance 1..m),
          10.. the kinds of background (instance 0);
        - keypoints (n, m, 5, 3) float32 x, y, v in the order of KEYPOINTS: v is 2 visible, 1 hidden, 0 off the picture;
        - depth (n, 1, size, size) float32.

    Raises:
        ZooError: for an unknown split, field or knob, or a size below 16.
    """
    number = requested("shapes", split, indices, size, fields, FIELDS)
    settings = make_knobs(**knobs)
    chunk = max(1, _CHUNK_PIXELS // size**2)
    image = torch.empty(len(number), 3, size, size, dtype=torch.uint8)
    scratch = torch.empty(min(chunk, len(number)) * 3 * size * size)
    parts = [
        _render(seed, split, number[at : at + chunk], image[at : at + chunk], scratch, frozenset(fields), settings)
        for at in range(0, max(1, len(number)), chunk)
    ]
    joined: dict[str, Any] = {"image": image} if "image" in fields else {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        joined[key] = [text for texts in values for text in texts] if key == "caption" else torch.cat(values)
    return {key: joined[key] for key in FIELDS if key in joined}


def _render(
    seed: int, split: str, indices: np.ndarray, image: Tensor, scratch: Tensor, fields: frozenset[str], knobs: Knobs
) -> dict[str, Any]:
    """All fields but the image, which is drawn in place."""
    size = image.shape[-1]
    scenes = _scenes(seed, split, indices, knobs)
    n, m = len(indices), knobs.max_objects
    mapped = bool(fields & {"boxes", "visible", "masks", "panoptic", "keypoints"})
    owner = torch.zeros(n, size * size, dtype=torch.uint8) if mapped else None
    depth = torch.ones(n, size * size) if "depth" in fields else None
    _draw(scenes, knobs, image, scratch, owner, depth)
    present = torch.from_numpy(np.arange(m) < scenes.count[:, None])
    out: dict[str, Any] = {}
    for name in ("shape", "color", "texture"):
        out[name] = torch.from_numpy(getattr(scenes, name)[:, :m]).where(present, -1)
    out["scene"], out["count"] = torch.from_numpy(scenes.scene[:, 0]), torch.from_numpy(scenes.count)
    if knobs.label == "scene":
        out["label"] = out["scene"]
    elif knobs.label == "count":
        out["label"] = out["count"] - knobs.min_objects
    else:
        out["label"] = out[knobs.label][:, 0].clone()
    if depth is not None:
        out["depth"] = depth.view(n, 1, size, size)
    if owner is not None:
        owner = owner.view(n, size, size)
        masks = owner[:, None] == torch.arange(1, m + 1, dtype=torch.uint8)[:, None, None]
        out |= {"masks": masks, "boxes": _boxes(masks)}
        instance = owner.long()
        if "panoptic" in fields:
            ground = torch.from_numpy(scenes.scene).gather(1, _regions(scenes, size)) + len(SHAPES)
            category = out["shape"].gather(1, (instance.view(n, size * size) - 1).clamp(min=0))
            category = torch.where(instance.view(n, size * size) > 0, category, ground)
            out["panoptic"] = category.view(n, size, size) * PANOPTIC_BASE + instance
        if "visible" in fields:
            out["visible"] = masks.flatten(2).sum(2) / _whole(scenes, m, image, scratch).clamp(min=1)
        if "keypoints" in fields:
            out["keypoints"] = _keypoints(scenes, m, owner)
    if "caption" in fields:
        out["caption"] = [_caption(scenes, i) for i in range(n)]
    return {key: value for key, value in out.items() if key in fields}


def _boxes(masks: Tensor) -> Tensor:
    """(n, m, H, W) bool -> (n, m, 4) float32 tight boxes with exclusive ends; zeros where a mask is empty."""
    ends = []
    for line in (masks.any(2), masks.any(3)):  # over columns: x; over rows: y
        length = line.shape[-1]
        first = line.byte().argmax(-1)
        last = length - line.flip(-1).byte().argmax(-1)
        ends.append((first, last))
    (x0, x1), (y0, y1) = ends
    boxes = torch.stack([x0, y0, x1, y1], -1).float()
    return boxes * masks.flatten(2).any(2)[..., None]


def _whole(scenes: _Scenes, m: int, image: Tensor, scratch: Tensor) -> Tensor:
    """(n, m) pixels each object has in the picture when it stands there alone."""
    n, size = len(scenes.count), image.shape[-1]
    unused = torch.empty_like(image)
    total = torch.zeros(n, m)
    of_objects = ("shape", "color", "texture", "rgb", "radius", "place", "turn", "depth")
    for k in range(m):
        facts = {name: value[:, k : k + 1] if name in of_objects else value for name, value in vars(scenes).items()}
        alone = _Scenes(**facts)
        alone.count = (scenes.count > k).astype(np.int64)
        owner = torch.zeros(n, size * size, dtype=torch.uint8)
        _draw(alone, Knobs(noise=0), unused, scratch, owner)
        total[:, k] = owner.sum(1)
    return total


def _keypoints(scenes: _Scenes, m: int, owner: Tensor) -> Tensor:
    """(n, m, K, 3) x, y in pixels and visibility."""
    n, size = len(owner), owner.shape[-1]
    cosine, sine = _sine_table()
    local = _keypoint_table()[scenes.shape[:, :m]] * scenes.radius[:, :m, None, None]
    c, s = cosine[scenes.turn[:, :m]][..., None], sine[scenes.turn[:, :m]][..., None]
    x = (scenes.place[:, :m, None, 0] + c * local[..., 0] - s * local[..., 1]) * np.float32(size)
    y = (scenes.place[:, :m, None, 1] + s * local[..., 0] + c * local[..., 1]) * np.float32(size)
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    column, row = x.astype(np.int64).clip(0, size - 1), y.astype(np.int64).clip(0, size - 1)
    seen = owner.numpy()[np.arange(n)[:, None, None], row, column] == np.arange(1, m + 1)[:, None]
    points = np.stack([x, y, np.where(inside, np.where(seen, 2, 1), 0)], -1).astype(np.float32)
    points[np.arange(m) >= scenes.count[:, None]] = 0
    return torch.from_numpy(points)


# ---------------------------------------------------------------------------------------------------------- the dataset


class ShapesDataset:
    """A split of the world as a map-style set of {"image": (3, size, size) uint8, "label": int}.

    Args:
        split: "train", "val" or "test".
        length: how many samples it has (the world itself has no end).
        size: side of the pictures in pixels.
        seed: which world.
        cache: a folder: the split is drawn once into a memory-mapped file there, named by a hash of all parameters and
            written under a temporary name first. None draws anew each time.
        **knobs: see :class:`Knobs`.
    """

    def __init__(
        self,
        split: str = "train",
        length: int = 50_000,
        size: int = 64,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
        **knobs: Any,
    ) -> None:
        if length < 0:
            raise ZooError(f"shapes: length must not be negative, got {length}")
        if split not in SPLITS:
            raise unknown("split of shapes", split, SPLITS)
        self.split, self.length, self.size, self.seed, self.knobs = split, length, size, seed, knobs
        self.class_names = make_knobs(**knobs).class_names
        self._images: np.ndarray | None = None
        self._labels: np.ndarray | None = None
        if cache is not None:
            self._open_cache(Path(cache).expanduser())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        batch = self.read_many([index])
        return {"image": batch["image"][0], "label": int(batch["label"][0])}

    def read_many(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """{"image": (n, 3, size, size) uint8, "label": (n,) int64}, much faster than one at a time."""
        if self._images is not None and self._labels is not None:
            at = np.asarray(indices, dtype=np.int64)
            return {"image": torch.from_numpy(self._images[at]), "label": torch.from_numpy(self._labels[at])}
        return render(self.seed, self.split, indices, self.size, ("image", "label"), **self.knobs)

    def _open_cache(self, folder: Path) -> None:
        key = [2, self.split, self.length, self.size, self.seed, vars(make_knobs(**self.knobs))]
        stem = "shapes-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        labels, images = folder / f"{stem}-label.npy", folder / f"{stem}-image.npy"
        if not images.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = [path.with_name(f"{path.name}.{os.getpid()}.part") for path in (labels, images)]
            shape = (self.length, 3, self.size, self.size)
            image = np.lib.format.open_memmap(temporary[1], mode="w+", dtype=np.uint8, shape=shape)
            label = np.lib.format.open_memmap(temporary[0], mode="w+", dtype=np.int64, shape=(self.length,))
            for at in range(0, self.length, 1024):
                part = render(
                    self.seed, self.split, np.arange(at, min(at + 1024, self.length)), self.size, ("image", "label"),
                    **self.knobs,
                )  # fmt: skip
                image[at : at + 1024], label[at : at + 1024] = part["image"].numpy(), part["label"].numpy()
            image.flush()
            label.flush()
            del image, label
            for part_file, path in zip(temporary, (labels, images), strict=True):  # the image file last: it is the sign
                os.replace(part_file, path)
        self._images, self._labels = np.load(images, mmap_mode="r"), np.load(labels, mmap_mode="r")


def main() -> None:
    """Print samples a second on one core, for pictures with labels and for everything."""
    import argparse
    import time

    parser = argparse.ArgumentParser(prog="python -m zoo.data.shapes", description=main.__doc__)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--sheet", default=None, help="also write a sheet of 8 x 12 samples as PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, fields, samples in (("image+label", ("image", "label"), options.samples), ("all", FIELDS, 512)):
        render(0, "train", range(64), options.size, fields)
        start = time.perf_counter()
        render(0, "train", range(samples), options.size, fields)
        print(f"{name:12} {samples / (time.perf_counter() - start):8.0f} samples/s at {options.size} px, one core")
    if options.sheet:
        from torchvision.io import write_png
        from torchvision.utils import make_grid

        write_png(make_grid(render(0, "train", range(96), options.size, ("image",))["image"], nrow=12), options.sheet)


if __name__ == "__main__":
    main()
