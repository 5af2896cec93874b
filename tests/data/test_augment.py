"""EDM's augmentation: what its labels say is what was done."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.data.augment import PARTS, EDMAugment, edm_affine, edm_augment, edm_draws, edm_labels, wavelet_warp
from zoo.errors import ZooError

SIDE = 32


def _smooth(count: int = 2) -> Tensor:
    """Pictures whose waves are long against a pixel, so that interpolation costs little."""
    torch.manual_seed(0)
    x = torch.arange(SIDE) / SIDE
    phase = torch.rand(count, 3, 1, 1)
    return torch.sin(2 * math.pi * (x[:, None] + phase)) + torch.cos(2 * math.pi * (x[None, :] + 2 * phase))


def _draws(**values: list) -> dict[str, Tensor]:
    return {part: torch.tensor(value, dtype=torch.float32) for part, value in values.items()}


def test_what_does_not_move_does_not_change() -> None:
    images = torch.randn(3, 3, SIDE, SIDE)
    still = torch.eye(2, 3).repeat(3, 1, 1)
    torch.testing.assert_close(wavelet_warp(images, still), images, rtol=0, atol=1e-5)
    nothing = {part: torch.zeros(3, 2) if part in ("aniso", "translate") else torch.zeros(3) for part in PARTS}
    same, label = edm_augment(images, nothing)
    assert torch.equal(same, images)
    assert torch.equal(label, torch.zeros(3, sum(PARTS.values())))


def test_flips_are_exact_and_turns_by_a_quarter_almost() -> None:
    images = _smooth()
    flipped, label = edm_augment(images, _draws(xflip=[1, 0], yflip=[0, 1]))
    assert torch.equal(flipped[0], images[0].flip(2))
    assert torch.equal(flipped[1], images[1].flip(1))
    assert label.tolist() == [[1, 0], [0, 1]]
    turned, label = edm_augment(images, _draws(rotate=[math.pi / 2, 0]))
    ways = [images[0].rot90(k, (1, 2)) for k in (1, 3)]
    assert min((turned[0] - way)[:, 2:-2, 2:-2].abs().max() for way in ways) < 0.05
    assert torch.equal(turned[1], images[1])
    torch.testing.assert_close(label[0], torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-6)


def test_a_shift_by_whole_pixels_moves_them() -> None:
    """One unit of the label is an eighth of the side; what comes in is reflected."""
    images = _smooth(1)
    moved, label = edm_augment(images, _draws(translate=[[1.0, -0.5]]))
    across, down = SIDE // 8, -SIDE // 16
    padded = torch.nn.functional.pad(images, (8,) * 4, mode="reflect")
    wanted = padded[..., 8 - down : 8 - down + SIDE, 8 - across : 8 - across + SIDE]
    torch.testing.assert_close(moved, wanted, rtol=0, atol=2e-3)
    assert label.tolist() == [[1.0, -0.5]]


def test_scaling_and_stretching_are_about_the_middle() -> None:
    affine = edm_affine(_draws(scale=[5.0, 0.0, 0.0], aniso=[[0, 0], [5.0, 0], [5.0, math.pi / 2]]), SIDE, 3, "cpu")
    # exp2(0.2 * 5) = 2: the result's pixels come from half as far away, or along one axis half, along the other twice.
    wanted = torch.tensor([[0.5, 0, 0, 0.5], [0.5, 0, 0, 2.0], [2.0, 0, 0, 0.5]])
    torch.testing.assert_close(affine[:, :, :2].flatten(1), wanted, rtol=1e-5, atol=1e-5)
    assert not affine[:, :, 2].any()
    grown, _ = edm_augment(torch.nn.functional.pad(torch.ones(1, 1, 16, 16), (8,) * 4), _draws(scale=[5.0]))
    assert grown.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.allclose(grown[..., 4:-4, 4:-4], torch.ones(()), atol=0.02)


def test_chances_and_labels() -> None:
    torch.manual_seed(0)
    augment = EDMAugment(p=0.25)
    assert augment.label_dim == 6
    draws = edm_draws(4000, 0.25, augment.parts)
    for part, share in {"xflip": 0.5, "scale": 0.25, "aniso": 0.25, "translate": 0.25}.items():
        value = draws[part][:, 0] if draws[part].ndim == 2 else draws[part]
        assert (value != 0).float().mean().item() == pytest.approx(share, abs=0.03), part
    assert edm_labels(draws).shape == (4000, 6)
    assert EDMAugment(parts=list(PARTS)).label_dim == 9


def test_a_batch_is_a_function_of_the_seed() -> None:
    batch = {"image": torch.randn(8, 3, 16, 16), "label": torch.arange(8)}
    before = batch["image"].clone()
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(EDMAugment(p=0.8)(batch))
    assert torch.equal(results[0]["image"], results[1]["image"])
    assert torch.equal(batch["image"], before)
    assert not torch.equal(results[0]["image"], before)
    assert results[0]["augment"].shape == (8, 6)
    assert results[0]["label"] is batch["label"]
    assert torch.isfinite(results[0]["image"]).all()


def test_mistakes_are_told() -> None:
    with pytest.raises(ZooError, match="unknown augmentation 'flip'"):
        EDMAugment(parts=["flip"])
    with pytest.raises(ZooError, match=r"must lie in \[0, 1\]"):
        EDMAugment(p=1.5)
    with pytest.raises(ZooError, match="square pictures"):
        EDMAugment()({"image": torch.zeros(1, 3, 8, 10)})
