"""Views for siamese networks whose sides see different ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.data import ImageDataModule, batches
from zoo.data.transforms import ContrastiveAugment, ImageTransform, MAEPretrain, solarize
from zoo.data.views import RandAugmented, ScaleMix, Views, scale_mix, scale_mix_boxes
from zoo.errors import ZooError


def byol() -> Views:
    return Views([ContrastiveAugment(blur_prob=1.0), ContrastiveAugment(blur_prob=0.1, solarize_prob=0.2)])


def multi_crop() -> Views:
    large, small = ContrastiveAugment(scale=(0.14, 1.0)), ContrastiveAugment(12, scale=(0.05, 0.14))
    return Views([ScaleMix(large), small, large], [1, 3, 2])


def rows(transform: ImageTransform, count: int) -> Tensor:
    parts = np.stack([np.arange(count), np.zeros(count, int), np.zeros(count, int)], axis=1)
    return batches.uniforms(0, 0, parts, transform.draws or 0)


@pytest.mark.parametrize(("make", "sides"), [(byol, [24, 24]), (multi_crop, [24, 12, 12, 12, 24, 24])])
def test_views_one_by_one_and_a_batch_at_a_time(make: type[Views], sides: list[int]) -> None:
    data = ImageDataModule("shapes", image_size=24, batch_size=4, train_samples=8, train_transform=make(), seed=1)
    batch = next(iter(data.train_dataloader()))
    assert [view.shape for view in batch["views"]] == [(4, 3, side, side) for side in sides]
    assert len({view.mean().item() for view in batch["views"]}) == len(sides)
    transform = data.train_transform
    image = torch.randint(0, 256, (6, 3, 30, 30), dtype=torch.uint8)
    assert [view.shape[-1] for view in transform(image[0])] == sides
    draws = rows(transform, 6)
    together = transform.batch(image, draws)
    for whole, alone in zip(together, transform.batch(image[2:3], draws[2:3]), strict=True):
        assert torch.equal(whole[2], alone[0])


def test_the_sides_differ() -> None:
    """A solarized view of a bright picture is dark."""
    bright = torch.full((3, 24, 24), 200, dtype=torch.uint8)
    plain = {"jitter_prob": 0.0, "gray_prob": 0.0}
    views = Views([ContrastiveAugment(24, **plain), ContrastiveAugment(24, **plain, solarize_prob=1.0)])
    for first, second in (views(bright), [v[0] for v in views.batch(bright[None], rows(views, 1))]):
        assert torch.equal(first, bright)
        assert torch.equal(second, 255 - bright)
    assert solarize(torch.tensor([127, 128, 255], dtype=torch.uint8)).tolist() == [127, 127, 0]


def test_scale_mix_pastes_a_box_of_the_same_picture() -> None:
    boxes = scale_mix_boxes(12, 12, torch.tensor([0.4, 1.0, 0.0]), torch.tensor([[3.0, 9.0], [3.9, 9.9], [0.0, 6.0]]))
    assert boxes.tolist() == [[0, 5, 7, 12], [3, 9, 3, 9], [0, 0, 6, 12]]
    mixed = scale_mix(torch.zeros(3, 1, 12, 12), torch.ones(3, 1, 12, 12), boxes)
    assert mixed.sum((1, 2, 3)).tolist() == [49, 0, 72]
    assert bool(mixed[0, 0, :7, 5:].all())
    torch.manual_seed(0)
    pasted = ScaleMix(MAEPretrain(16))(torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8))
    assert pasted.shape == (3, 16, 16)
    transform, image = ScaleMix(MAEPretrain(32)), torch.arange(32 * 32).view(1, 32, 32).to(torch.uint8).repeat(3, 1, 1)
    shares = []
    for k in range(200):
        torch.manual_seed(k)
        first = transform.transform(image)
        torch.manual_seed(k)
        shares.append((transform(image) != first).any(0).float().mean().item())
    assert 0.15 < sum(shares) / 200 < 0.45  # half of the area, less what lies outside of the picture


def test_rand_augment_comes_after_the_view() -> None:
    transform = RandAugmented(ContrastiveAugment())
    assert transform.draws is None
    data = ImageDataModule(
        "shapes",
        image_size=16,
        batch_size=4,
        train_samples=8,
        seed=1,
        train_transform=Views([transform, MAEPretrain()]),
    )
    first, again = (next(iter(data.train_dataloader()))["views"] for _ in range(2))
    assert [view.shape for view in first] == [(4, 3, 16, 16)] * 2
    assert torch.equal(first[0], again[0])
    with pytest.raises(ZooError, match="no RandAugment policy"):
        RandAugmented(MAEPretrain(), "augment")


@pytest.mark.parametrize(("transforms", "counts"), [([], None), ([MAEPretrain()], [0]), ([MAEPretrain()], [1, 1])])
def test_nonsense_is_refused(transforms: list[ImageTransform], counts: list[int] | None) -> None:
    with pytest.raises(ZooError, match="Views wants"):
        Views(transforms, counts)
