"""Augmentation and evaluation of convolutional networks: what is drawn, what is cut, what colours become."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.data import ImageDataModule
from zoo.data.transforms import (
    InceptionTrain,
    PadCropTrain,
    ScaleTrain,
    TenCrop,
    resize,
    short_side_to,
    squared_aspect_crop_params,
)
from zoo.errors import ZooError


def _picture(height: int = 40, width: int = 60) -> Tensor:
    """Red tells the row, green the column."""
    rows = torch.arange(height).view(-1, 1).expand(height, width)
    columns = torch.arange(width).expand(height, width)
    return torch.stack([rows, columns, torch.full((height, width), 7)]).to(torch.uint8)


def _draw(transform: Any, image: Tensor, count: int = 200) -> list[Any]:
    torch.manual_seed(0)
    return [transform(image) for _ in range(count)]


def test_padding_is_the_mean_and_every_place_comes() -> None:
    transform = PadCropTrain(32)
    transform.bind(32, (0.5, 0.25, 0.75))
    image = _picture(32, 32)
    seen = set()
    for out in _draw(transform, image, 600):
        assert out.shape == (3, 32, 32)
        assert out.dtype == torch.uint8
        inside = out[2] == 7
        assert torch.equal(out[:, ~inside], out.new_tensor([128, 64, 191])[:, None].expand(-1, int((~inside).sum())))
        rows, columns = out[0][inside], out[1][inside]
        flipped = bool(columns.view(-1)[0] > columns.view(-1)[1])
        seen.add((int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max()), flipped))
        expected = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert torch.equal(out[:, inside].view(expected.shape), expected.flip(-1) if flipped else expected)
    assert {rows[:2] for rows in seen} == {(max(0, k), min(31, 31 + k)) for k in range(-4, 5)}
    assert len(seen) > 140  # of 81 places, mirrored or not
    black = PadCropTrain(32, fill="zero")(image)
    assert set(black[2].unique().tolist()) <= {0, 7}


def test_the_padding_of_a_normalised_batch_is_zero() -> None:
    data = ImageDataModule("shapes", batch_size=8, image_size=32, train_samples=64, train_transform=PadCropTrain())
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    edge = batch["image"][:, :, 0, :].abs().amax(dim=(1, 2))
    assert edge.min() < 0.01  # at least one was shifted down: its first row is padding, 0 up to a byte's rounding
    assert batch["image"].std() > 0.5


def test_scale_augmentation_keeps_the_shape_of_things() -> None:
    image = _picture(100, 150)
    outs = _draw(ScaleTrain(64, (64, 128)), image)
    spans = []
    for out in outs:
        assert out.shape == (3, 64, 64)
        rows = int(out[0].max()) - int(out[0].min())
        columns = int(out[1].max()) - int(out[1].min())
        assert abs(rows - columns) <= 4  # not stretched
        spans.append(rows)
    # A short side of s shows 64 / s of the picture's 100 rows.
    assert 46 <= min(spans) <= 56
    assert 93 <= max(spans) <= 99
    assert sum(bool(out[1, 0, 0] > out[1, 0, -1]) for out in outs) in range(70, 130)
    with pytest.raises(ZooError, match="does not fit a short side of 32"):
        ScaleTrain(64, (32, 128))(image)
    with pytest.raises(ZooError, match="short_side"):
        ScaleTrain(64, (128, 64))


def test_crops_of_the_torch_code() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = []
    for _ in range(3000):
        rows = torch.rand(10, 5, generator=generator).tolist()
        box = squared_aspect_crop_params(400, 500, (0.08, 1.0), (3 / 4, 4 / 3), rows)
        assert box is not None
        top, left, height, width = box
        assert 0 <= top <= 400 - height
        assert 0 <= left <= 500 - width
        shapes.append((height * width / 200_000, width / height))
    areas, ratios = zip(*shapes, strict=True)
    assert 0.079 < min(areas) < 0.1
    assert max(areas) > 0.9
    assert 0.56 < min(ratios) < 0.58  # the square of 3/4
    assert 1.75 < max(ratios) < 1.79
    assert squared_aspect_crop_params(10, 1000, (0.9, 1.0), (1.0, 1.0), [[0.5] * 5] * 10) is None
    assert squared_aspect_crop_params(10, 10, (1.0, 1.0), (1.0, 1.0), [[0.5, 0.5, 0.5, 0.99, 0.99]]) == (0, 0, 10, 10)
    assert InceptionTrain(8)(_picture(10, 1000)).shape == (3, 8, 8)  # nothing fits: the middle


def test_colours_by_hand() -> None:
    transform = InceptionTrain(8)
    image = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    none, ones = torch.zeros(3), (1.0, 1.0, 1.0)
    assert torch.equal(transform.coloured(image, ones, none), image)

    def luma(pixels: Tensor) -> Tensor:
        return 0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]

    steps = (lambda p: 0.8 * p, lambda p: 0.6 * p + 0.4 * luma(p).mean(), lambda p: 1.2 * p - 0.2 * luma(p))
    got = transform.coloured(image, (0.8, 0.6, 1.2), none).double()
    for order in permutations(steps):  # the official code draws one
        pixels = image.double()
        for step in order:
            pixels = step(pixels)
        assert (got - pixels.clamp(0, 255)).abs().max() <= 0.501
    lit = transform.coloured(image.clamp(60, 190), ones, torch.tensor([0.1, 0.0, 0.0])).double()
    shift = (lit - image.clamp(60, 190)).mean((1, 2)) / 255
    torch.testing.assert_close(
        shift, torch.tensor([-0.5675, -0.5808, -0.5836], dtype=torch.float64) * 0.02175, rtol=0, atol=0.002
    )
    gray = transform.coloured(image, (1.0, 1.0, 0.0), none)
    assert torch.equal(gray[0], gray[1])


def test_jitter_and_lighting_are_drawn() -> None:
    image = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    means = torch.stack([out.float().mean((1, 2)) for out in _draw(InceptionTrain(16, lighting=0.0), image)])
    assert means.min() < 65
    assert means.max() > 135
    assert (means.std(dim=1) < 0.5).all()  # gray stays gray without lighting
    lit = torch.stack([out.float().mean((1, 2)) for out in _draw(InceptionTrain(16, jitter=0.0), image)])
    assert 3 < lit.std(dim=0).mean() < 6  # about 0.1 * 0.2175 * 0.58 * 255 along gray
    plain = _draw(InceptionTrain(16, jitter=0.0, lighting=0.0), image, 5)
    assert all(torch.equal(out, image) for out in plain)
    with pytest.raises(ZooError, match="jitter"):
        InceptionTrain(16, jitter=1.5)


def test_ten_crops_are_centre_and_corners_and_their_mirror_images() -> None:
    image = _picture(40, 60)
    views = TenCrop(32, crop_pct=0.8)(image)
    assert len(views) == 10
    places = [(4, 14), (0, 0), (0, 28), (8, 0), (8, 28)]
    for k, view in enumerate(views):
        assert view.shape == (3, 32, 32)
        whole = image if k < 5 else image.flip(-1)
        top, left = places[k % 5]
        assert torch.equal(view, whole[:, top : top + 32, left : left + 32])
    odd = TenCrop(32, crop_pct=32 / 33)(_picture(33, 33))
    assert int(odd[0][0, 0, 0]) == 1  # the centre is rounded up, as in the official code


def test_views_reach_the_batch() -> None:
    data = ImageDataModule("shapes", batch_size=4, image_size=32, train_samples=8, eval_transform=TenCrop(28, 1.0))
    batch = next(iter(data.test_dataloader()))
    assert "image" not in batch
    assert [tuple(view.shape) for view in batch["views"]] == [(4, 3, 28, 28)] * 10
    assert batch["views"][0].dtype == torch.float32
    assert batch["label"].shape == (4,)


def test_short_sides() -> None:
    assert short_side_to(100, 200, 50) == (50, 100)
    assert short_side_to(200, 100, 50) == (100, 50)
    assert short_side_to(333, 500, 256) == (256, 384)
    assert resize(_picture(), short_side_to(40, 60, 20)).shape == (3, 20, 30)
