"""Pictures that shake: frames of Slow tell nothing, all frames tell the band; captions made of labels."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from zoo.data import ImageTextDataModule, ShakenImageDataModule
from zoo.data.shaken import shake
from zoo.errors import ZooError

SMALL = {"dataset": "shapes", "image_size": 32, "batch_size": 8, "train_samples": 40}


def _turns(band: int, count: int) -> torch.Tensor:
    """(count, T) where on its circle a picture is, in turns, read off the clips of a picture with one bright pixel."""
    draw = torch.Generator().manual_seed(band)
    place, phase = torch.rand(2, count, generator=draw, dtype=torch.float64)
    sense = 2 * torch.randint(2, (count,), generator=draw) - 1
    picture = torch.zeros(count, 1, 32, 32)
    picture[:, :, 16, 16] = 1
    video = shake(picture, sense * ((0.02, 0.14, 0.26, 0.38)[band] + place / 9), phase, 3.0, torch.arange(28))
    at = video[:, 0].flatten(2).argmax(2)
    x, y = at % 32 - 16, at // 32 - 16
    assert bool((x.abs() <= 3).all() and (y.abs() <= 3).all())
    return torch.atan2(y.float(), x.float()) / (2 * torch.pi) % 1


def test_frames_a_band_apart_say_nothing_of_the_band() -> None:
    clips = [_turns(band, 1000) for band in range(4)]
    steps = [torch.stack([(c[:, 9 * k + 9] - c[:, 9 * k]) % 1 for k in range(3)], 1) for c in clips]
    for other in steps[1:]:
        for bins in (steps[0][:, 0], steps[0][:, 2]):
            expected = torch.histc(bins, 8, 0, 1) / len(bins)
            torch.testing.assert_close(torch.histc(other[:, 0], 8, 0, 1) / len(other), expected, atol=0.06, rtol=0)
    # From frame to frame they are told apart with ease, by the size of the step.
    step = [((c.diff(dim=1) + 0.5) % 1 - 0.5).abs().mean(1) for c in clips]
    for slower, faster in pairwise(step):
        assert slower.max() < faster.min() + 0.02
        assert (slower.mean() - faster.mean()).abs() > 0.08


def test_clips_are_functions_of_seed_and_position_whatever_frames_are_shown() -> None:
    whole = ShakenImageDataModule(seed=1, **SMALL)
    some = ShakenImageDataModule(seed=1, frames=[0, 9, 18, 27], **SMALL)
    other = ShakenImageDataModule(seed=2, **SMALL)
    assert whole.num_classes == 40
    first, again, moved = (next(iter(data.train_dataloader())) for data in (whole, some, other))
    assert first["video"].shape == (8, 3, 28, 32, 32)
    assert torch.equal(first["video"][:, :, [0, 9, 18, 27]], again["video"])
    assert torch.equal(first["label"], again["label"])
    assert not torch.equal(first["video"], moved["video"])
    held = next(iter(whole.val_dataloader()))
    assert (held["label"] % 4).tolist() == [0, 1, 2, 3] * 2
    assert {"video_id", "view", "index"} <= held.keys()
    with pytest.raises(ZooError, match="frames"):
        ShakenImageDataModule(frames=[], **SMALL)


def test_prompts_stand_in_for_captions() -> None:
    data = ImageTextDataModule(tokenizer="shapes", context_length=12, captions="prompts", **SMALL)
    batch = next(iter(data.train_dataloader()))
    names = [data.class_names[k] for k in batch["label"].tolist()]
    assert all(name in text for name, text in zip(names, batch["caption"], strict=True))
    assert len({text.replace(name, "") for name, text in zip(names, batch["caption"], strict=True)}) > 1
    assert "text" not in next(iter(data.val_dataloader()))
    assert data.class_prompts is not None
    assert data.class_prompts.shape == (10, 2, 12)
    with pytest.raises(ZooError, match="captions"):
        ImageTextDataModule(captions="prompt", **SMALL)  # type: ignore[arg-type]
