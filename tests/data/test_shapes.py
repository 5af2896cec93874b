"""The embedded world: purity, exactness of its labels, knobs, cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data import shapes
from zoo.data.shapes import FIELDS, ShapesDataset, render
from zoo.errors import ZooError


@given(
    indices=st.lists(st.integers(0, 10**9), min_size=1, max_size=80),
    pick=st.integers(0, 79),
    seed=st.integers(0, 2**31),
    split=st.sampled_from(shapes.SPLITS),
)
@settings(max_examples=15, deadline=None)
def test_a_sample_does_not_depend_on_its_batch(indices, pick, seed, split):
    index = indices[pick % len(indices)]
    together, alone = render(seed, split, indices, 32), render(seed, split, [index], 32)
    for field in FIELDS:
        a, b = together[field][pick % len(indices)], alone[field][0]
        assert a == b if field == "caption" else torch.equal(a, b), field


def test_threads_do_not_change_a_bit():
    before = torch.get_num_threads()
    pictures = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pictures.append(render(3, "train", range(70), fields=("image",))["image"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*pictures)


def test_splits_and_seeds_are_different_worlds():
    worlds = {(seed, split): render(seed, split, range(64), 32) for seed in (0, 1) for split in shapes.SPLITS}
    seen = {image.numpy().tobytes() for world in worlds.values() for image in world["image"]}
    assert len(seen) == 64 * len(worlds)


def test_splitmix64_gives_the_published_stream():
    # First outputs of SplitMix64 for seed 1234567, as in the reference implementation's test vector.
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert shapes.splitmix64(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_labels_agree_with_each_other():
    n, m, size = 200, 6, 64
    world = render(0, "val", range(n), size)
    present = torch.arange(m) < world["count"][:, None]
    assert torch.equal(world["shape"] >= 0, present)
    assert torch.equal(world["label"], world["shape"][:, 0])
    assert world["masks"].sum(1).max() == 1  # visible parts never overlap
    assert not world["masks"][~present].any()
    assert not world["boxes"][~present].any()

    # panoptic: category and instance of every object's pixels, background elsewhere
    category, instance = world["panoptic"] // shapes.PANOPTIC_BASE, world["panoptic"] % shapes.PANOPTIC_BASE
    assert torch.equal(instance > 0, world["masks"].any(1))
    for k in range(m):
        where = world["masks"][:, k]
        assert torch.equal(instance[where], torch.full_like(instance[where], k + 1))
        assert torch.equal(category[where], world["shape"][:, k, None, None].expand_as(where)[where])
    outside = instance == 0
    assert torch.equal(
        category[outside] - len(shapes.SHAPES), world["scene"][:, None, None].expand_as(outside)[outside]
    )

    # boxes: exactly the mask's extent
    for i, k in zip(*torch.where(world["masks"].flatten(2).any(2)), strict=True):
        y, x = torch.where(world["masks"][i, k])
        assert world["boxes"][i, k].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]

    # depth: nearer objects hide farther ones, so where the large one shows, depth is its own
    where = world["masks"][:, 0]
    assert torch.all(world["depth"][:, 0][where] == 0.5)
    assert torch.all(world["depth"][:, 0][outside] == 1)
    assert world["visible"].min() >= 0
    assert world["visible"].max() == 1
    assert torch.all(world["visible"][:, 0] > 0.3)  # the object that is asked for is there to be seen

    # keypoints: visible ones lie on the object's mask
    x, y, v = world["keypoints"].unbind(-1)
    i, k, j = torch.where(v == 2)
    assert torch.all(world["masks"][i, k, y[i, k, j].long(), x[i, k, j].long()])
    assert len(i) > n
    assert torch.all(v[~present] == 0)

    for text, count, shape in zip(world["caption"], world["count"], world["label"], strict=True):
        assert text.startswith("a large ")
        assert text.count("small") == count - 1
        assert shapes.SHAPES[shape] in text.split(",")[0].split(" and ")[0]


def test_classes_are_balanced_and_mean_colour_tells_nothing():
    fields = ("image", "label")
    train, test = render(0, "train", range(2000), 32, fields), render(0, "test", range(500), 32, fields)
    share = torch.bincount(train["label"], minlength=10) / 2000
    assert share.min() > 0.07
    assert share.max() < 0.13

    def features(world):
        x = world["image"].float().flatten(2) / 255
        return torch.cat([x.mean(2), x.std(2), torch.ones(len(x), 1)], 1)

    weights = torch.linalg.lstsq(features(train), torch.eye(10)[train["label"]]).solution
    assert (features(test) @ weights).argmax(1).eq(test["label"]).float().mean() < 0.2


@pytest.mark.parametrize(
    ("label", "classes"), [("shape", 10), ("color", 8), ("texture", 5), ("scene", 5), ("count", 3)]
)
def test_label_knob(label, classes):
    dataset = ShapesDataset("train", 300, 32, label=label, max_objects=3)
    assert len(dataset.class_names) == classes
    labels = dataset.read_many(range(300))["label"]
    assert sorted(labels.unique().tolist()) == list(range(classes))


def test_difficulty_knobs():
    plain = render(0, "train", range(40), max_objects=1, noise=0, clutter=0, lighting=0)
    assert plain["count"].max() == 1
    corner = plain["image"][:, :, :4, :4].float().flatten(2)
    assert corner.std(2).max() < 1  # nothing but flat background in a corner
    hidden = render(0, "train", range(100), occlusion=1.0)["visible"][:, 0].mean()
    assert hidden < render(0, "train", range(100), occlusion=0.0)["visible"][:, 0].mean() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noize": 0.1}, "noise"),
        ({"label": "shap"}, "shape"),
        ({"max_objects": 9}, "max_objects"),
        ({"clutter": 2.0}, "clutter"),
        ({"size": 8}, "16"),
        ({"split": "trian"}, "train"),
        ({"fields": ["mask"]}, "masks"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ZooError, match=message):
        render(**{"seed": 0, "split": "train", "indices": [0], **arguments})


def test_size_scales_the_scene():
    small, large = render(0, "train", range(20), 32), render(0, "train", range(20), 128)
    assert torch.equal(small["label"], large["label"])
    there = small["masks"].flatten(2).sum(2) > 30
    assert torch.allclose(small["boxes"][there] * 4, large["boxes"][there], atol=8)


def test_cache_holds_the_same_samples(tmp_path):
    live = ShapesDataset("val", 50, 32)
    cached = ShapesDataset("val", 50, 32, cache=tmp_path)
    again = ShapesDataset("val", 50, 32, cache=tmp_path)
    other = ShapesDataset("val", 50, 32, cache=tmp_path, noise=0.1)
    for dataset in (cached, again):
        assert torch.equal(dataset.read_many([3, 40])["image"], live.read_many([3, 40])["image"])
        assert dataset[7]["label"] == live[7]["label"]
    assert not torch.equal(other[3]["image"], live[3]["image"])
    assert len(list(tmp_path.glob("*.npy"))) == 4
    assert not list(tmp_path.glob("*.part"))


def test_no_samples_is_no_error():
    world = render(0, "train", [])
    assert world["image"].shape == (0, 3, 64, 64)
    assert world["caption"] == []


@pytest.mark.parametrize("size", [16, 17, 24])
def test_tiny_pictures_are_drawn_within_their_borders(size: int) -> None:
    """Objects of a pixel or two: what lies beyond the border is painted nowhere, not even in the next row."""
    for first in range(0, 1000, 250):
        drawn = render(0, "train", range(first, first + 250), size, ("image", "boxes"))
        alone = render(0, "train", [first + 249], size, ("image", "boxes"))
        assert torch.equal(drawn["image"][-1], alone["image"][0])
        assert drawn["boxes"].min() >= 0
        assert drawn["boxes"].max() <= size
