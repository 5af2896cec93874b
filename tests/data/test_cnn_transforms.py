"""Augmentation and evaluation of convolutional networks: what is drawn, what is cut, what colours become."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.data import ImageDataModule
from zoo.data.transforms import (
    EvalResizeCrop,
    InceptionTrain,
    MAEPretrain,
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


def _cubic(row: list[float], size: int, kernel: str) -> list[float]:
    """A row resized pixel by pixel, as the libraries say it."""
    length, out = len(row), []
    for k in range(size):
        if kernel == "torch7":  # the polynomial through four points, those beyond the ends on a line
            at = k * (length - 1) / max(1, size - 1)
            i = min(int(at), length - 2)
            x, p1, p2 = at - i, row[i], row[i + 1]
            p0 = row[i - 1] if i > 0 else 2 * p1 - p2
            p3 = row[i + 2] if i + 2 < length else 2 * p2 - p1
            rest = 2 * p0 - 5 * p1 + 4 * p2 - p3 + x * (3 * (p1 - p2) + p3 - p0)
            out.append(p1 + 0.5 * x * (p2 - p0 + x * rest))
        else:
            at = k * length / size if kernel == "tensorflow_v1" else (k + 0.5) * length / size - 0.5
            a, begin, pairs = -0.75 if kernel == "tensorflow_v1" else -0.5, math.floor(at), []
            t = round((at - begin) * 1024) / 1024
            for i, d in zip(range(begin - 1, begin + 3), (1 + t, t, 1 - t, 2 - t), strict=True):
                near = ((a + 2) * d - (a + 3)) * d * d + 1
                weight = near if d <= 1 else ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
                if kernel == "tensorflow_v1" or 0 <= i < length:
                    pairs.append((row[min(max(i, 0), length - 1)], weight))
            out.append(sum(pixel * weight for pixel, weight in pairs) / sum(weight for _, weight in pairs))
    return out


@pytest.mark.parametrize("kernel", ["torch7", "tensorflow", "tensorflow_v1"])
@pytest.mark.parametrize("size", [(9, 7), (5, 30), (29, 40), (23, 12), (17, 2)])
def test_resizes_of_other_libraries(kernel: str, size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, 17, 23), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    across = torch.tensor([[_cubic(row, size[1], kernel) for row in plane] for plane in image.tolist()])
    expected = torch.tensor([[_cubic(column, size[0], kernel) for column in plane.T.tolist()] for plane in across])
    got = resize(image, size, "bicubic", kernel)
    assert got.dtype == torch.uint8
    assert (got - expected.transpose(1, 2).clamp(0, 255)).abs().max() <= 0.501
    assert torch.equal(resize(torch.stack([image, image]), size, "bicubic", kernel)[1], got)
    assert (got.float() - resize(image, size).float()).abs().max() > 10  # not what an antialiased one gives


def test_resizes_of_a_row_by_hand() -> None:
    row = torch.tensor([0, 100, 200, 30], dtype=torch.uint8).expand(1, 1, 4)
    # Halved, a pixel lies in the middle of two: weights -1, 9, 9, -1, of which those beyond the ends do not count:
    # (9 * 0 + 9 * 100 - 200) / 17 and (-100 + 9 * 200 + 9 * 30) / 17.
    assert resize(row, (1, 2), "bicubic", "tensorflow").flatten().tolist() == [41, 116]
    # Version 1 takes every other pixel; three of two lie at 0, 2/3 and 4/3, where a = -3/4 weighs -1/18, 10/27, 43/54
    # and -1/9, and the same from behind; the second pixel stands for all that follow: 100 * (43/54 - 1/9), 100 * 10/9.
    assert resize(row, (1, 2), "bicubic", "tensorflow_v1").flatten().tolist() == [0, 200]
    assert resize(row[..., :2], (1, 3), "bicubic", "tensorflow_v1").flatten().tolist() == [0, 69, 111]


def test_the_square_middle_is_cut_before_the_resize() -> None:
    noise = torch.randint(0, 256, (3, 65, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = resize(noise[..., 16:81], (20, 20), "bicubic", "tensorflow_v1")
    assert torch.equal(EvalResizeCrop(20, 1.0, crop_mode="square", kernel="tensorflow_v1")(noise), expected)
    assert torch.equal(
        EvalResizeCrop(20, 0.5, crop_mode="square")(noise.mT), resize(noise.mT[:, 32:64, 17:49], (20, 20))
    )


def test_transforms_take_another_librarys_resize() -> None:
    noise = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for kernel in ("torch7", "tensorflow"):
        expected = resize(noise, (20, 30), "bicubic", kernel)
        assert torch.equal(EvalResizeCrop(16, 0.8, kernel=kernel)(noise), expected[:, 2:18, 7:23])
        assert torch.equal(TenCrop(16, 0.8, kernel=kernel)(noise)[1], expected[:, :16, :16])
        square = noise[:, :, :64]
        whole = resize(square, (16, 16), "bicubic", kernel)
        cut = InceptionTrain(16, (1.0, 1.0), (1.0, 1.0), 0.0, 0.0, kernel=kernel)(square)
        assert torch.equal(cut, whole) or torch.equal(cut.flip(-1), whole)
        torch.manual_seed(0)
        one = MAEPretrain(16, kernel=kernel)
        alone = one(noise)
        torch.manual_seed(0)
        draws = torch.rand(1, 41)
        assert torch.equal(one.batch(noise[None], draws)[0], alone)
        assert not torch.equal(MAEPretrain(16).batch(noise[None], draws)[0], alone)
    with pytest.raises(ZooError, match="did you mean 'torch7'"):
        TenCrop(kernel="torch")
    with pytest.raises(ZooError, match="no interpolation bilinear"):
        EvalResizeCrop(interpolation="bilinear", kernel="torch7")


def test_ten_crops_truncate_the_long_side() -> None:
    assert int(TenCrop(8, 1.0)(_picture(30, 41))[2][1].max()) == int(resize(_picture(30, 41), (8, 10))[1].max())


def test_short_sides() -> None:
    assert short_side_to(100, 200, 50) == (50, 100)
    assert short_side_to(200, 100, 50) == (100, 50)
    assert short_side_to(333, 500, 256) == (256, 384)
    assert resize(_picture(), short_side_to(40, 60, 20)).shape == (3, 20, 30)
