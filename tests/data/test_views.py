"""Views for self-supervised learning: their transform, and how the data module hands them on."""

from __future__ import annotations

import pytest
import torch
from PIL import ImageFilter
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from zoo.data import ImageDataModule
from zoo.data.transforms import ContrastiveAugment, TwoViews, box_blur, color_jitter
from zoo.errors import ZooError

V1 = {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_prob": 1.0, "gray_first": True, "blur_prob": 0.0}
OFF = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0}


def _picture(size: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size + 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, V1, OFF])
def test_a_view_is_a_picture_and_a_function_of_the_seed(options: dict) -> None:
    transform, picture = ContrastiveAugment(24, **options), _picture()
    torch.manual_seed(1)
    first = transform(picture)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 24, 24)
    assert not torch.equal(transform(picture), first)
    torch.manual_seed(1)
    assert torch.equal(transform(picture), first)


def test_chances_are_kept() -> None:
    torch.manual_seed(0)
    transform, picture = ContrastiveAugment(8, jitter_prob=0.0, gray_prob=0.3, blur_prob=0.0), _picture()
    gray = [bool((view[0] == view[1]).all() and (view[1] == view[2]).all()) for view in map(transform, [picture] * 400)]
    assert sum(gray) / 400 == pytest.approx(0.3, abs=0.07)


def test_gray_before_or_after_the_jitter() -> None:
    """A gray picture has neither hue nor saturation to jitter: with gray first the order of colours shows."""
    options = {"jitter": (0.0, 0.0, 0.0, 0.5), "jitter_prob": 1.0, "gray_prob": 1.0, "blur_prob": 0.0}
    views = []
    for first in (True, False):
        torch.manual_seed(2)
        views.append(ContrastiveAugment(40, gray_first=first, **options)(_picture()).float())
    torch.manual_seed(2)
    plain = ContrastiveAugment(40, **{**options, "jitter_prob": 0.0})(_picture()).float()
    torch.testing.assert_close(views[0], plain, atol=1.0, rtol=0)
    assert (views[1] - plain).abs().mean() > 2


def test_the_blur_is_pillows() -> None:
    picture = _picture()
    wanted = pil_to_tensor(to_pil_image(picture).filter(ImageFilter.GaussianBlur(1.3)))
    assert torch.equal(box_blur(picture, 1.3), wanted)


def test_jitter_moves_each_property_within_its_bounds() -> None:
    picture = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    levels = torch.stack([color_jitter(picture, (0.4, 0, 0, 0))[0, 0, 0] for _ in range(300)])
    assert 59 <= levels.min() <= 65
    assert 135 <= levels.max() <= 140
    assert torch.equal(color_jitter(picture, (0, 0, 0, 0)), picture)
    with pytest.raises(ZooError, match="hue at most"):
        ContrastiveAugment(jitter=(0.4, 0.4, 0.4, 0.6))
    with pytest.raises(ZooError, match="must rise"):
        ContrastiveAugment(scale=(1.0, 0.2))


def test_the_data_module_hands_on_views() -> None:
    def data(**options: int) -> ImageDataModule:
        transform = TwoViews(ContrastiveAugment())
        return ImageDataModule(
            "shapes", image_size=16, batch_size=4, train_samples=16, train_transform=transform, seed=5, **options
        )

    batch = next(iter(data().train_dataloader()))
    assert batch.keys() == {"views", "label", "index"}
    assert [view.shape for view in batch["views"]] == [(4, 3, 16, 16)] * 2
    assert all(view.dtype == torch.float32 and abs(view.mean()) < 1 for view in batch["views"])
    assert not torch.equal(*batch["views"])
    again = next(iter(data(num_workers=1).train_dataloader()))
    assert all(torch.equal(a, b) for a, b in zip(batch["views"], again["views"], strict=True))
    samples = data().samples("train")
    one, several = samples[3], samples.__getitems__([(3, 0, 0), (5, 0, 0)])
    assert torch.equal(one["views"][1], several["views"][1][0])
    assert next(iter(data().val_dataloader()))["image"].shape == (4, 3, 16, 16)
