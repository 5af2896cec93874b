"""Principal axes of patches, the latents on them, and the file that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.command.cli import main
from zoo.data.patch_pca import read_patch_pca
from zoo.errors import ZooError
from zoo.nn.patch_tokenizer import PatchTokenizer
from zoo.ops.patches import patchify
from zoo.ops.pca import Moments, PrincipalAxes


def _images(count: int = 40) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    smooth = torch.randn(count, 3, 4, 4, generator=draw)
    noise = torch.randn(count, 3, 16, 16, generator=draw)
    return smooth.repeat_interleave(4, 2).repeat_interleave(4, 3) + 0.3 * noise


def _axes(images: Tensor) -> PrincipalAxes:
    moments = Moments(48)
    moments.update(patchify(images, 4))
    return moments.axes()


def test_moments_of_parts_add_up_and_axes_explain_falling_shares() -> None:
    vectors = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3
    whole, first, second = (Moments(12) for _ in range(3))
    whole.update(vectors)
    first.update(vectors[:77])
    second.update(vectors[77:].reshape(9, 47, 12))
    axes = whole.axes()
    for value, other in zip(axes, (first + second).axes(), strict=True):
        torch.testing.assert_close(value, other)
    torch.testing.assert_close(axes.basis @ axes.basis.T, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(axes.variances, torch.linalg.svdvals(vectors - vectors.mean(0)).square() / 500)
    with pytest.raises(ZooError, match="none"):
        Moments(3).axes()


@pytest.mark.parametrize("norm", ["global", "whiten", "none"])
def test_latents_have_the_variance_that_their_norm_says_and_map_back(norm: Any) -> None:
    images = _images()
    tokenizer = PatchTokenizer(4, 3, 6, norm)
    tokenizer.take_axes(_axes(images))
    latents = tokenizer.latents(images)
    variance = latents.flatten(0, 1).var(0, correction=0)
    wanted = {"global": variance / variance.mean(), "whiten": torch.ones(6), "none": tokenizer.variances[:6]}[norm]
    torch.testing.assert_close(variance, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tokenizer.latents(tokenizer.pictures(latents)), latents, rtol=1e-4, atol=1e-4)
    whole = PatchTokenizer(4, 3, 48, norm)
    whole.take_axes(_axes(images))
    torch.testing.assert_close(whole.pictures(whole.latents(images)), images, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["global", "whiten"])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.7])
def test_pictures_of_one_colour_have_no_variance_to_normalise(norm: Any, value: float) -> None:
    with pytest.raises(ZooError, match="without variance"):
        PatchTokenizer(4, 3, 6, norm).take_axes(_axes(torch.full((40, 3, 16, 16), value)))


def test_axes_of_fewer_patches_than_components_are_not_whitened() -> None:
    axes = _axes(_images(1)[..., :8, :8])  # 4 patches, 3 axes
    with pytest.raises(ZooError, match="without variance"):
        PatchTokenizer(4, 3, 4, "whiten").take_axes(axes)
    tokenizer = PatchTokenizer(4, 3, 3, "whiten")
    tokenizer.take_axes(axes)
    assert tokenizer.gain.max() < 100


def test_a_file_of_axes_is_written_read_and_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "axes.safetensors"
    sizes = ["--image_size", "32", "--patch_size", "8", "--images", "20", "--num_workers", "0"]
    assert main(["data", "patch_pca", "shapes", *sizes, "-o", str(path)]) == 0
    axes, header = read_patch_pca(path)
    assert (header["patches"], header["patch_size"]) == (20 * 16, 8)
    assert axes.basis.shape == (192, 192)
    with pytest.raises(ZooError, match="48"):
        PatchTokenizer(4, 3, 6).take_axes(axes)
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(ZooError, match="not a file of principal axes"):
        read_patch_pca(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--patch_size", "7"], "cannot be cut"),
        (["--patch_size", "0"], "patch_size must be at least 1"),
        (["--images", "0"], "images must be at least 1"),
        (["--device", "potato"], "not 'potato'"),
        (["--out", "nowhere/axes.safetensors"], "its folder does not exist"),
        (["--out", "."], "it is a folder"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = [
        "--image_size",
        "32",
        "--patch_size",
        "8",
        "--images",
        "4",
        "--num_workers",
        "0",
        "--out",
        "axes.safetensors",
    ]
    assert main(["data", "patch_pca", "shapes", *sizes, *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
