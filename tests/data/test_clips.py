"""The drawn world of clips: a function of its numbers, its motions as named, nothing given away by one frame."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.data import clips
from zoo.data.clips import MOTIONS, MOVERS, ClipsDataset, render_clips
from zoo.errors import ZooError


def test_a_clip_is_a_function_of_its_numbers() -> None:
    options = {"frames": 6, "max_objects": 3, "label": "motions", "clutter": 0.3, "backdrop": 1.0, "lighting": 0.5}
    whole = render_clips(3, "val", [7, 11, 2], None, 24, **options)
    for place, index in enumerate([7, 11, 2]):
        alone = render_clips(3, "val", [index], None, 24, **options)
        for name, value in alone.items():
            torch.testing.assert_close(value[0], whole[name][place], rtol=0, atol=0)
    some = render_clips(3, "val", [11], [5, 0], 24, **options)  # frames singly and in any order
    assert torch.equal(some["video"][0], whole["video"][1][[5, 0]])
    assert torch.equal(some["boxes"][0], whole["boxes"][1][[5, 0]])
    for seed, split in ((4, "val"), (3, "train")):
        assert not torch.equal(render_clips(seed, split, [7], None, 24, **options)["video"], whole["video"][:1])


def test_pixels_are_the_same_everywhere() -> None:
    video = render_clips(0, "train", range(4), range(8), 32, ("video",), max_objects=2, clutter=0.3)["video"]
    assert video.shape == (4, 8, 32, 32, 3)
    assert hashlib.sha256(video.contiguous().numpy()).hexdigest() == PIXELS


PIXELS = "06be5ef13e57aabd8c9df28fec9ea4dec6a517be8237af28429c862da4f71ca3"


def _ridge(features: Tensor, labels: Tensor, classes: int, train: int) -> float:
    """Accuracy of least squares on the samples that it was not fitted to."""
    x = torch.nn.functional.pad(features.flatten(1).double(), (0, 1), value=1.0)
    y = torch.nn.functional.one_hot(labels, classes).double()
    gram = x[:train].T @ x[:train] + 10 * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, x[:train].T @ y[:train])
    return float(((x[train:] @ weights).argmax(1) == labels[train:]).double().mean())


def test_no_single_frame_tells_the_motion() -> None:
    count, train = 6000, 4500
    drawn = render_clips(0, "train", range(count), [5, 6, 7], 16, ("video", "label"), noise=0.0)
    video, labels = drawn["video"].float() / 255, drawn["label"]
    grey = video.mean(-1)
    chance = 1 / len(MOTIONS)
    spread = (chance * (1 - chance) / (count - train)) ** 0.5
    for features in (grey[:, 0] - 0.5, (grey[:, 0] - grey[:, 0].mean((1, 2), keepdim=True)).abs()):
        assert abs(_ridge(features, labels, len(MOTIONS), train) - chance) < 4 * spread
    # The same means, given how much each pixel changes, do better: it is the frame that holds nothing.
    change = torch.cat([(grey[:, k + 1] - grey[:, k]).abs() for k in (0, 1)], 1)
    assert _ridge(change, labels, len(MOTIONS), train) > chance + 8 * spread


def test_what_shows_in_a_frame_is_distributed_alike_for_all_motions() -> None:
    """Place, turn and size at some moment, by Kolmogorov and Smirnov's distance between motions."""
    for moment in (0.0, 9.0):
        samples = {}
        for name in MOTIONS:
            world = clips._clips(1, "train", np.arange(4000), clips.make_knobs(motions=[name]))
            place, turn, radius = clips._moved(world, np.full((4000, 1), moment))
            samples[name] = [place[:, 0, 0, 0], place[:, 0, 0, 1], turn[:, 0, 0], radius[:, 0, 0]]
        for name in MOTIONS[1:]:
            # Each motion from the same draws of everything else would hide nothing: compare halves of different clips.
            for a, b in zip(samples["still"], samples[name], strict=True):
                a, b = np.sort(a[:2000]), np.sort(b[2000:])
                every = np.concatenate([a, b])
                distance = np.abs(np.searchsorted(a, every, "right") - np.searchsorted(b, every, "right")).max() / 2000
                assert distance < 1.95 * (2 / 2000) ** 0.5, (name, moment)  # p = 0.001


def _path(name: str, frames: int = 40, count: int = 3, speed: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    world = clips._clips(0, "train", np.arange(count), clips.make_knobs(motions=[name], speed=speed))
    place, turn, radius = clips._moved(world, np.broadcast_to(np.arange(frames), (count, frames)).astype(float))
    step = np.diff(place[:, :, 0], axis=1)
    step -= np.round(step)  # across the border
    return step, np.diff(turn[:, :, 0]) / clips.still._TURNS, np.diff(radius[:, :, 0])


@pytest.mark.parametrize("name", MOTIONS)
def test_motions_are_what_they_are_called(name: str) -> None:
    step, turn, swell = _path(name)
    turn -= np.round(turn)
    assert bool(np.abs(turn).max() > 1e-3) == name.startswith("spin")
    assert bool(np.abs(swell).max() > 1e-6) == (name == "pulse")
    straight = {"right": (0, 1), "left": (0, -1), "down": (1, 1), "up": (1, -1)}
    if name in straight:
        axis, sign = straight[name]
        assert (sign * step[..., axis] > 1 / 70).all()
        np.testing.assert_allclose(step[..., 1 - axis], 0, atol=1e-12)
        np.testing.assert_allclose(step, np.broadcast_to(step[:, :1], step.shape), atol=1e-9)
    elif name.startswith("orbit"):
        x, y = step[..., 0], step[..., 1]
        area = x[:, :-1] * y[:, 1:] - y[:, :-1] * x[:, 1:]  # y points down: clockwise is positive
        assert (np.sign(area) == (1 if name == "orbit clockwise" else -1)).mean() > 0.95
    elif name in ("sway", "bob"):
        axis = int(name == "bob")
        assert np.abs(step[..., axis]).max() > 0.02
        np.testing.assert_array_equal(step[..., 1 - axis], 0)
        assert (np.diff(np.sign(step[..., axis]), axis=1) != 0).any()
    else:
        np.testing.assert_array_equal(step, 0)
    if name.startswith("spin"):
        assert (np.sign(turn) == (1 if name == "spin clockwise" else -1)).all()
    faster, faster_turn, _ = _path(name, speed=1.5)
    if name in straight:
        np.testing.assert_allclose(faster, 1.5 * step, atol=1e-9)
    if name.startswith("spin"):
        assert np.abs(faster_turn - np.round(faster_turn)).mean() > 1.3 * np.abs(turn).mean()


def test_a_clip_that_stands_still_changes_by_noise_alone() -> None:
    quiet = render_clips(0, "train", range(3), [0, 9], 32, ("video",), motions=["still"], noise=0.0)["video"]
    assert torch.equal(quiet[:, 0], quiet[:, 1])
    noisy = render_clips(0, "train", range(3), [0, 9], 32, ("video",), motions=["still"], noise=0.05)["video"]
    assert not torch.equal(noisy[:, 0], noisy[:, 1])


def test_boxes_hold_what_moves() -> None:
    settings = {"motions": ["right", "down"], "noise": 0.0, "speed": 2.0}
    drawn = render_clips(0, "train", range(150), [0, 6], 48, ("video", "boxes", "visible"), **settings)
    assert bool(drawn["visible"].all())
    whole = 0
    for video, boxes in zip(drawn["video"], drawn["boxes"], strict=True):
        x0, y0, x1, y1 = boxes[:, 0].int().unbind(1)
        assert bool((x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 48).all() and (y1 <= 48).all())
        if min(*x0, *y0) <= 0 or max(*x1, *y1) >= 48:
            continue  # at a border there may be another piece
        changed = (video[0].int() - video[1].int()).abs().sum(-1) > 60
        for k in range(2):  # some slack for soft edges and thin tips
            changed[max(0, y0[k] - 3) : y1[k] + 3, max(0, x0[k] - 3) : x1[k] + 3] = False
        assert not changed.any()
        whole += 1
    assert whole > 5


def test_labels_and_kinds() -> None:
    one = render_clips(0, "train", range(50), [0], 16, label="shape_motion", motions=["left", "spin clockwise"])
    assert torch.equal(one["label"], one["shape"][:, 0] * 2 + one["motion"][:, 0])
    assert len(ClipsDataset(label="shape_motion", motions=["left", "right"]).class_names) == 2 * len(MOVERS)
    many = render_clips(0, "train", range(50), [0], 16, label="motions", min_objects=1, max_objects=3)
    for label, motion in zip(many["label"], many["motion"], strict=True):
        assert set(label.nonzero()[:, 0].tolist()) == set(motion[motion >= 0].tolist())
    assert {int(c) for c in many["count"]} == {1, 2, 3}
    boxes = ClipsDataset(length=5, size=32, label="boxes", min_objects=2, max_objects=2)
    assert boxes.kind == "boxes"
    key = boxes.keyframe(1)
    assert key["boxes"].shape[1] == 4
    assert torch.equal(key["labels"].argmax(1), key["true_labels"])
    reader = boxes.open(1)
    assert (reader.num_frames, reader.fps) == (32, 30.0)
    assert torch.equal(reader.frames_at([4, 0]), boxes.read_many([1], torch.tensor([[4, 0]]))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "moton"}, "did you mean 'motion'"),
        ({"motions": ["rigth"]}, "did you mean 'right'"),
        ({"motions": []}, "one or more different names"),
        ({"max_objects": 4}, "max_objects <= 3"),
        ({"speed": 0.0}, "must be positive"),
        ({"noise": 2.0}, "noise must lie in 0..1"),
        ({"frams": 3}, "did you mean 'frames'"),
    ],
)
def test_wrong_knobs_are_named(options: dict, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        render_clips(0, "train", [0], **options)


def test_wrong_numbers_are_named() -> None:
    for arguments, message in (
        ((0, "tain", [0]), "did you mean 'train'"),
        ((0, "train", [-1]), "must not be negative"),
        ((0, "train", [0], None, 8), "at least 16"),
        ((0, "train", [0], None, 16, ("vido",)), "did you mean 'video'"),
    ):
        with pytest.raises(ZooError, match=message):
            render_clips(*arguments)
