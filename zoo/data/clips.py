"""The embedded world in motion: drawn clips whose label no single frame gives away, with exact ground truth.

Objects of :mod:`zoo.data.shapes` move over a textured background, each with one of twelve motions. The plane they move
on closes on itself: what leaves at one side comes back at the other. So wherever an object is at some moment, it may
have come from anywhere; start, phase, turn, size, speed and looks are drawn independently of the motion, and **every
single frame is distributed alike for all motions**. What tells them apart is how frames follow each other. Circles and
rings, which look the same however they are turned, take no part.

A clip is a pure function of (seed, split, index) and of the numbers of its frames, exact to the bit, as in
:mod:`zoo.data.shapes`, whose renderer draws each frame. Frames can be asked for singly and in any order.

Conventions: frames are (H, W, 3) uint8 RGB at 30 a second, y points down, boxes are x0, y0, x1, y1 in pixels with
exclusive ends. Object 0 is the one that the clip is about. ``python -m zoo.data.clips`` prints the speed on one core
(``--sheet FILE.png`` also draws a clip a row).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.data import shapes as still
from zoo.data.shapes import COLORS, SCENES, SHAPES, SPLITS, TEXTURES, hash64
from zoo.errors import ZooError, unknown

MOTIONS = (
    "still", "right", "left", "down", "up", "orbit clockwise", "orbit anticlockwise", "sway", "bob", "spin clockwise",
    "spin anticlockwise", "pulse",
)  # fmt: skip
MOVERS = tuple(shape for shape in SHAPES if shape not in ("circle", "ring"))
LABELS = ("motion", "shape", "shape_motion", "motions", "boxes")
FIELDS = ("video", "label", "motion", "shape", "color", "texture", "speed", "count", "boxes", "visible")
FPS = 30.0
LENGTHS = {"train": 10_000, "val": 1_000, "test": 1_000}

_OBJECTS = 3
_COPIES = 4  # of an object that crosses borders
_SCENE_SLOTS, _OBJECT_SLOTS = 20, 16
_SWING = 0.15  # how far an object moves from its middle in orbit, sway and bob, in units of the side
_GREY = 0.5  # what backgrounds vary around
_FRAMES_AT_ONCE = 256 * 32 * 32


@dataclass(frozen=True)
class Knobs:
    """What the clips show and how hard they are.

    Args:
        label: what is asked. "motion" or "shape" of object 0, "shape_motion" both at once (a class for each pair);
            "motions": which motions occur, several labels a clip; "boxes": the motion of each object, with its box.
        motions: those that occur, names of MOTIONS; None: all. They are the classes, in this order.
        frames: length of a clip.
        min_objects, max_objects: moving objects in a clip, 3 at most.
        speed: factor on all speeds. At 1, straight motion takes 16 to 64 frames to cross the picture, a spin as many
            for a turn, and orbits, swings and pulses 5 to 20.
        noise: standard deviation of pixel noise, fresh in each frame, in units of the full range.
        clutter: contrast of the textures of background and objects, 0 to 1.
        backdrop: how far backgrounds differ in colour, from 0 (all of one grey) to 1. Before plain ones a small network
            takes to the motions in a few hundred steps; motley, textured or slantingly lit ones, which outweigh the
            little that moves, keep it at chance for much longer.
        lighting: strength of the slanting light, 0 to 1.
    """

    label: str = "motion"
    motions: Sequence[str] | None = None
    frames: int = 32
    min_objects: int = 1
    max_objects: int = 1
    speed: float = 1.0
    noise: float = 0.03
    clutter: float = 0.0
    backdrop: float = 0.0
    lighting: float = 0.0

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise unknown("label of shapes (clips)", self.label, LABELS)
        for name in self.motions or ():
            if name not in MOTIONS:
                raise unknown("motion", name, MOTIONS)
        if self.motions is not None and len(set(self.motions)) != max(1, len(self.motions)):
            raise ZooError(f"shapes (clips): motions must be one or more different names, got {list(self.motions)}")
        if not 1 <= self.min_objects <= self.max_objects <= _OBJECTS:
            raise ZooError(
                f"shapes (clips): need 1 <= min_objects <= max_objects <= {_OBJECTS},"
                f" got {self.min_objects} and {self.max_objects}"
            )
        if self.frames < 1 or self.speed <= 0:
            raise ZooError(f"shapes (clips): frames and speed must be positive, got {self.frames} and {self.speed}")
        for name in ("noise", "clutter", "backdrop", "lighting"):
            if not 0 <= getattr(self, name) <= 1:
                raise ZooError(f"shapes (clips): {name} must lie in 0..1, got {getattr(self, name)}")

    @property
    def motion_names(self) -> tuple[str, ...]:
        """The motions that occur."""
        return MOTIONS if self.motions is None else tuple(self.motions)

    @property
    def class_names(self) -> list[str]:
        """The names behind `label`, in order."""
        if self.label == "shape":
            return list(MOVERS)
        if self.label == "shape_motion":
            return [f"{shape}, {motion}" for shape in MOVERS for motion in self.motion_names]
        return list(self.motion_names)


def make_knobs(**knobs: Any) -> Knobs:
    """:class:`Knobs` from keywords; an unknown one is a :class:`ZooError` that names the nearest."""
    for name in knobs:
        if name not in Knobs.__dataclass_fields__:
            raise unknown("option of shapes (clips)", name, Knobs.__dataclass_fields__)
    return Knobs(**knobs)


# ------------------------------------------------------------------------------------------------------ what there is


@dataclass
class _Clips:
    """Parameters of n clips with up to m objects."""

    scene: np.ndarray  # (n, slots) uniform numbers
    count: np.ndarray  # (n,)
    motion: np.ndarray  # (n, m) numbers in MOTIONS
    choice: np.ndarray  # (n, m) numbers among the motions that occur
    shape: np.ndarray  # (n, m) numbers in SHAPES
    color: np.ndarray
    texture: np.ndarray
    rgb: np.ndarray  # (n, m, 3)
    radius: np.ndarray
    place: np.ndarray  # (n, m, 2)
    phase: np.ndarray  # (n, m) of a turn
    turn: np.ndarray  # (n, m) of a turn
    swell: np.ndarray  # (n, m) of a turn
    speed: np.ndarray  # (n, m) factor


def _clips(seed: int, split: str, indices: np.ndarray, knobs: Knobs) -> _Clips:
    n, m = len(indices), _OBJECTS  # always three, so that max_objects changes only how many are drawn
    # Another world than that of the still pictures.
    u = still._uniforms(int(hash64(seed, 0xC11B)[0] >> np.uint64(1)), split, indices, _SCENE_SLOTS + m * _OBJECT_SLOTS)
    s, o = u[:, :_SCENE_SLOTS], u[:, _SCENE_SLOTS:].reshape(n, m, _OBJECT_SLOTS)
    movers = np.array([SHAPES.index(name) for name in MOVERS])
    motions = np.array([MOTIONS.index(name) for name in knobs.motion_names])
    choice = (o[..., 0] * len(motions)).astype(np.int64)
    color = (o[..., 2] * len(COLORS)).astype(np.int64)
    large = np.arange(m) == 0
    return _Clips(
        scene=s,
        count=knobs.min_objects + (s[:, 0] * (knobs.max_objects - knobs.min_objects + 1)).astype(np.int64),
        motion=motions[choice],
        choice=choice,
        shape=movers[(o[..., 1] * len(movers)).astype(np.int64)],
        color=color,
        texture=(o[..., 3] * len(TEXTURES)).astype(np.int64),
        rgb=(still._RGB[color] + (o[..., 4:7] - 0.5) * 0.2).clip(0.02, 1),
        radius=np.where(large, 0.20 + 0.08 * o[..., 7], 0.10 + 0.06 * o[..., 7]),
        place=o[..., 8:10],
        phase=o[..., 10],
        turn=o[..., 11],
        swell=o[..., 12],
        speed=(0.5 + 1.5 * o[..., 13] ** 2) * knobs.speed,
    )


def _moved(clips: _Clips, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the objects are at `time` (n, t) in frames: place (n, t, m, 2) on the closed plane, turn (n, t, m) as a
    number of the sine table, radius (n, t, m)."""
    turns, (cosine, sine) = still._TURNS, still._sine_table()
    motion = clips.motion[:, None]  # (n, 1, m)
    elapsed = time[:, :, None] * clips.speed[:, None]  # (n, t, m)

    def one(*names: str) -> np.ndarray:
        return np.isin(motion, [MOTIONS.index(name) for name in names])

    def angle(turn: np.ndarray) -> np.ndarray:
        return np.floor(turn * turns).astype(np.int64) % turns

    straight = elapsed / 32
    clockwise = np.where(one("orbit anticlockwise"), -1, 1)
    cycle = angle(clips.phase[:, None] + clockwise * elapsed / 10)
    swing_x = np.where(one("orbit clockwise", "orbit anticlockwise", "sway"), _SWING * cosine[cycle], 0)
    swing_y = np.where(one("orbit clockwise", "orbit anticlockwise", "bob"), _SWING * sine[cycle], 0)
    x = clips.place[:, None, :, 0] + swing_x + straight * (one("right") * 1.0 - one("left"))
    y = clips.place[:, None, :, 1] + swing_y + straight * (one("down") * 1.0 - one("up"))
    spin = elapsed / 32 * (one("spin clockwise") * 1.0 - one("spin anticlockwise"))
    swell = cosine[angle(clips.swell[:, None] + one("pulse") * elapsed / 10)]
    place = np.stack([x, y], -1)
    return place - np.floor(place), angle(clips.turn[:, None] + spin), clips.radius[:, None] * (0.8 + 0.2 * swell)


def _frames(clips: _Clips, time: np.ndarray, knobs: Knobs) -> tuple[still._Scenes, np.ndarray]:
    """The n * t frames as scenes for the renderer of still pictures, which knows no closed plane: an object near a
    border stands there again, as many copies as show. Also (n * t, slots): whose copy a slot holds."""
    n, t = time.shape
    m = knobs.max_objects
    place, turn, radius = (value[:, :, :m] for value in _moved(clips, time))
    s = np.repeat(clips.scene, t, 0)
    count = np.repeat(clips.count, t, 0)
    rows = n * t

    def each(value: np.ndarray) -> np.ndarray:  # (n, m, ...) of the clips to (rows, m, ...)
        return np.repeat(value[:, :m], t, 0)

    place, turn, radius = place.reshape(rows, m, 2), turn.reshape(rows, m), radius.reshape(rows, m)
    beyond = np.where(place < 0.5, place + 1, place - 1)
    x = np.stack([place[..., 0], beyond[..., 0], place[..., 0], beyond[..., 0]], -1)
    y = np.stack([place[..., 1], place[..., 1], beyond[..., 1], beyond[..., 1]], -1)
    reach = (radius * still._REACH)[..., None]
    shows = (x > -reach) & (x < 1 + reach) & (y > -reach) & (y < 1 + reach)
    shows &= (np.arange(m) < count[:, None])[..., None]
    owner = np.arange(m * _COPIES) // _COPIES
    slots = int(max(1, shows.reshape(rows, -1).sum(1).max(initial=1)))
    order = np.argsort(~shows.reshape(rows, -1), axis=1, kind="stable")[:, :slots]
    whose = owner[order]

    def slot(value: np.ndarray) -> np.ndarray:  # (rows, m, ...) to (rows, slots, ...)
        return np.take_along_axis(value, whose.reshape(*whose.shape, *(1,) * (value.ndim - 2)), 1)

    def f32(value: np.ndarray) -> np.ndarray:
        return value.astype(np.float32)

    base = _GREY + (0.6 * s[:, 2:5] - 0.3) * knobs.backdrop
    contrast = np.where(s[:, 5:6] < 0.5, -1, 1) * (0.25 + 0.75 * s[:, 6:7]) * knobs.clutter
    light_turn = (s[:, 10] * still._TURNS).astype(np.int64)
    strength = s[:, 11] * knobs.lighting
    cosine, sine = still._sine_table()
    copies = np.stack([x.reshape(rows, -1), y.reshape(rows, -1)], -1)
    grain = hash64((s[:, 19] * 2.0**53).astype(np.int64), np.floor(time * 4096).astype(np.int64).reshape(-1))
    scenes = still._Scenes(
        count=shows.reshape(rows, -1).sum(1),
        site=np.zeros((rows, 1, 2), np.float32),
        scene=(s[:, 1:2] * len(SCENES)).astype(np.int64),
        scene_colors=f32(np.stack([base, base + contrast * (0.3 + 0.4 * s[:, 7:10])], 1).clip(0.03, 0.97))[:, None],
        scene_turn=(s[:, 15:16] * still._TURNS).astype(np.int64),
        scene_scale=f32(0.5 + 0.8 * s[:, 16:17]),
        scene_offset=f32(s[:, None, 17:19] * still._TILE),
        light=f32(np.stack([cosine[light_turn] * strength, sine[light_turn] * strength], 1)),
        noise=(grain >> np.uint64(48)).astype(np.int64),
        shape=slot(each(clips.shape)),
        color=slot(each(clips.color)),
        texture=slot(each(clips.texture)),
        rgb=f32(slot(each(clips.rgb))),
        radius=f32(slot(radius)),
        place=f32(np.take_along_axis(copies, order[..., None], 1)),
        turn=slot(turn),
        depth=f32(0.5 - 0.1 * whose),  # the later objects, which are smaller, in front
    )
    return scenes, whose


# ------------------------------------------------------------------------------------------------------------- drawing


def render_clips(
    seed: int,
    split: str,
    indices: Iterable[int] | np.ndarray | Tensor,
    time: Sequence[float] | np.ndarray | Tensor | None = None,
    size: int = 64,
    fields: Sequence[str] = FIELDS,
    **knobs: Any,
) -> dict[str, Any]:
    """Draw clips of a split and what is true of them.

    Args:
        seed: which world.
        split: "train", "val" or "test".
        indices: numbers of clips, any non-negative integers; n of them.
        time: numbers of the frames wanted, (T,) for all clips or (n, T); None: all of `knobs.frames`. Fractions are
            moments between frames.
        size: side of the frames in pixels, at least 16.
        fields: which entries to make.
        **knobs: see :class:`Knobs`.

    Returns:
        A dict with, for m = `max_objects` slots (-1 or zeros in empty ones):

        - video (n, T, size, size, 3) uint8;
        - label (n,) int64, or (n, K) float32 of 0 and 1 under the labels "motions" and "boxes";
        - motion, shape, color, texture (n, m) int64: numbers among the motions that occur, MOVERS, COLORS, TEXTURES;
        - speed (n, m) float32, the factor on the speeds of :class:`Knobs`; count (n,) of objects;
        - boxes (n, T, m, 4) float32, tight around what shows of an object; of one that crosses a border, around the
          largest piece; visible (n, T, m) bool, whether anything of it shows.

    Raises:
        ZooError: for an unknown split, field or knob, or a size below 16.
    """
    number = still.requested("shapes (clips)", split, indices, size, fields, FIELDS)
    settings = make_knobs(**knobs)
    moments = np.arange(settings.frames) if time is None else np.asarray(time)
    moments = np.broadcast_to(moments, (len(number), moments.shape[-1])).astype(np.float64)
    clips = _clips(seed, split, number, settings)
    out = _facts(clips, settings)
    if {"video", "boxes", "visible"} & set(fields):
        out |= _drawn(clips, moments, size, settings, bool({"boxes", "visible"} & set(fields)))
    return {key: out[key] for key in FIELDS if key in fields}


def _facts(clips: _Clips, knobs: Knobs) -> dict[str, Tensor]:
    m = knobs.max_objects
    present = torch.from_numpy(np.arange(m) < clips.count[:, None])
    mover = np.array([MOVERS.index(name) if name in MOVERS else -1 for name in SHAPES])[clips.shape]
    facts = {"motion": clips.choice, "shape": mover, "color": clips.color, "texture": clips.texture}
    out = {name: torch.from_numpy(value[:, :m].copy()).where(present, -1) for name, value in facts.items()}
    out["speed"] = torch.from_numpy(clips.speed[:, :m].astype(np.float32)).where(present, 0.0)
    out["count"] = torch.from_numpy(clips.count)
    if knobs.label in ("motions", "boxes"):
        each = torch.nn.functional.one_hot(out["motion"].clamp(min=0), len(knobs.motion_names)).bool()
        out["label"] = (each & present[..., None]).any(1).float()
    elif knobs.label == "shape_motion":
        out["label"] = out["shape"][:, 0] * len(knobs.motion_names) + out["motion"][:, 0]
    else:
        out["label"] = out[knobs.label][:, 0].clone()
    return out


def _drawn(clips: _Clips, time: np.ndarray, size: int, knobs: Knobs, mapped: bool) -> dict[str, Tensor]:
    n, t = time.shape
    m = knobs.max_objects
    scenes, whose = _frames(clips, time, knobs)
    image = torch.empty(n * t, 3, size, size, dtype=torch.uint8)
    chunk = max(1, _FRAMES_AT_ONCE // size**2)
    scratch = torch.empty(min(chunk, n * t) * 3 * size * size)
    settings = still.Knobs(noise=knobs.noise, clutter=knobs.clutter)
    boxes, visible = torch.zeros(n * t, m, 4), torch.zeros(n * t, m, dtype=torch.bool)
    for at in range(0, n * t, chunk):
        rows = slice(at, at + chunk)
        part = still._Scenes(**{name: value[rows] for name, value in vars(scenes).items()})
        here = len(part.count)
        owner = torch.zeros(here, size * size, dtype=torch.uint8) if mapped else None
        still._draw(part, settings, image[rows], scratch, owner)
        if owner is not None:
            boxes[rows], visible[rows] = _largest_pieces(owner.view(here, size, size), whose[rows], m)
    video = image.view(n, t, 3, size, size).permute(0, 1, 3, 4, 2)
    return {"video": video, "boxes": boxes.view(n, t, m, 4), "visible": visible.view(n, t, m)}


def _largest_pieces(owner: Tensor, whose: np.ndarray, objects: int) -> tuple[Tensor, Tensor]:
    """From a map (n, H, W) of 1 + slot, the box (n, m, 4) of the largest copy of each object, and whether it shows."""
    slots = whose.shape[1]
    masks = owner[:, None] == torch.arange(1, slots + 1, dtype=torch.uint8)[:, None, None]
    pieces, area = still._boxes(masks), masks.flatten(2).sum(2)
    mine = torch.from_numpy(whose)[:, None] == torch.arange(objects)[:, None]  # (n, m, slots)
    size, best = (area[:, None] * mine).max(2)
    return pieces.gather(1, best[..., None].expand(-1, -1, 4)), size > 0


# ---------------------------------------------------------------------------------------------------------- the source


class ClipReader:
    """One clip of the world as a video that gives any of its frames."""

    fps = FPS

    def __init__(self, world: ClipsDataset, index: int) -> None:
        self._world, self._index = world, index
        self.num_frames = world.knobs.frames
        self.duration = self.num_frames / self.fps

    def frames_at(self, indices: Sequence[int] | Tensor) -> Tensor:
        """uint8 (T, H, W, 3)."""
        return self._world.read_many([self._index], torch.as_tensor(indices)[None])[0]

    def close(self) -> None:
        """Nothing to close."""


class ClipsDataset:
    """A split of the world as a set of videos with labels.

    Args:
        split: "train", "val" or "test".
        length: how many clips it has (the world itself has no end).
        size: side of the frames in pixels.
        seed: which world.
        **knobs: see :class:`Knobs`.

    Attributes:
        kind: "label", "labels" (several a clip) or "boxes", as `label` of the knobs asks.
    """

    def __init__(self, split: str = "train", length: int = 10_000, size: int = 64, seed: int = 0, **knobs: Any) -> None:
        if length < 0:
            raise ZooError(f"shapes (clips): length must not be negative, got {length}")
        if split not in SPLITS:
            raise unknown("split of shapes (clips)", split, SPLITS)
        self.split, self.length, self.size, self.seed, self.knobs = split, length, size, seed, make_knobs(**knobs)
        self.class_names = self.knobs.class_names
        self.kind = {"motions": "labels", "boxes": "boxes"}.get(self.knobs.label, "label")

    def __len__(self) -> int:
        return self.length

    def _render(self, indices: Sequence[int], time: Any, *fields: str) -> dict[str, Any]:
        return render_clips(self.seed, self.split, indices, time, self.size, fields, **vars(self.knobs))

    def name(self, index: int) -> str:
        """What a message calls the clip."""
        return f"clip {index} of shapes"

    def open(self, index: int) -> ClipReader:
        """The clip as a video."""
        return ClipReader(self, index)

    def label(self, index: int, frames: Tensor | None = None) -> int | Tensor:
        """Its class, or (K,) float32 of 0 and 1."""
        label = self._render([index], [0], "label")["label"][0]
        return int(label) if self.kind == "label" else label

    def read_many(self, indices: Sequence[int], frames: Tensor) -> Tensor:
        """uint8 (n, T, H, W, 3) of the frames (n, T) of some clips, much faster than one clip at a time."""
        return self._render(indices, frames, "video")["video"]

    def labels(self, indices: Sequence[int]) -> Tensor:
        """The labels of some clips, (n,) or (n, K)."""
        return self._render(indices, [0], "label")["label"]

    def keyframe(self, index: int) -> dict[str, Any]:
        """What is true of the middle frame of a clip, as :class:`zoo.data.video_sources.AVASource` tells it."""
        middle = self.knobs.frames // 2
        facts = self._render([index], [middle], "boxes", "visible", "motion")
        shown = facts["visible"][0, 0]
        boxes, labels = facts["boxes"][0, 0][shown] / self.size, facts["motion"][0][shown]
        each = torch.nn.functional.one_hot(labels, len(self.class_names)).float()
        truth = {"true_boxes": boxes, "true_labels": labels}
        return {"frame": middle, "boxes": boxes, "labels": each, **truth, "video_id": index, "second": 0}


def main() -> None:
    """Print clips a second on one core."""
    import argparse
    import time

    parser = argparse.ArgumentParser(prog="python -m zoo.data.clips", description=main.__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--objects", type=int, default=1)
    parser.add_argument("--sheet", default=None, help="also write a clip of each motion as a row of a PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"frames": options.frames, "max_objects": options.objects, "min_objects": options.objects}
    for name, fields in (("video+label", ("video", "label")), ("all", FIELDS)):
        render_clips(0, "train", range(16), None, options.size, fields, **settings)
        start = time.perf_counter()
        for at in range(0, options.clips, 16):
            render_clips(0, "train", range(at, at + 16), None, options.size, fields, **settings)
        speed = options.clips / (time.perf_counter() - start)
        print(f"{name:12} {speed:8.0f} clips/s of {options.frames} frames at {options.size} px, one core")
    if options.sheet:
        from torchvision.io import write_png
        from torchvision.utils import make_grid

        rows = [
            render_clips(0, "train", [k], None, options.size, ("video",), motions=[name], **settings)["video"][0]
            for k, name in enumerate(MOTIONS)
        ]
        write_png(make_grid(torch.cat(rows).permute(0, 3, 1, 2), nrow=options.frames), options.sheet)


if __name__ == "__main__":
    main()
