"""Images and clips as sequences of patches and back."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import ZooError


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, L, p*p*C), row by row; within a patch (row, column, channel).

    Raises:
        ZooError: H or W is no multiple of `patch_size`.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ZooError(f"images of {height}x{width} pixels cannot be cut into patches of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    blocks = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int] | None = None) -> Tensor:
    """The inverse of :func:`patchify`: patches (B, L, p*p*C) to images (B, C, H, W).

    `grid` is (rows, columns) of patches; a square one where it is left out.

    Raises:
        ZooError: the patches do not fill the grid.
    """
    batch, length, size = patches.shape
    rows, columns = grid or (round(length**0.5),) * 2
    if rows * columns != length or size % patch_size**2:
        raise ZooError(
            f"{length} patches of {size} numbers do not fill a grid of {rows}x{columns} patches of {patch_size}"
        )
    blocks = patches.reshape(batch, rows, columns, patch_size, patch_size, size // patch_size**2)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch_size, columns * patch_size)


def patchify_video(videos: Tensor, patch_size: int, tubelet_size: int) -> Tensor:
    """Cut clips (B, C, T, H, W) into space-time patches (B, L, u*p*p*C), u = `tubelet_size` frames long, p =
    `patch_size` wide: one moment after the other, row by row; within a patch (frame, row, column, channel).

    Raises:
        ZooError: T is no multiple of `tubelet_size`, or H or W of `patch_size`.
    """
    batch, channels, frames, height, width = videos.shape
    if frames % tubelet_size or height % patch_size or width % patch_size:
        raise ZooError(
            f"clips of {frames} frames of {height}x{width} pixels cannot be cut into patches of {tubelet_size} frames"
            f" and {patch_size} pixels"
        )
    moments, rows, columns = frames // tubelet_size, height // patch_size, width // patch_size
    blocks = videos.reshape(batch, channels, moments, tubelet_size, rows, patch_size, columns, patch_size)
    return blocks.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, moments * rows * columns, -1)


def unpatchify_video(patches: Tensor, patch_size: int, tubelet_size: int, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`patchify_video`: patches (B, L, u*p*p*C) of a `grid` (moments, rows, columns) to clips
    (B, C, T, H, W).

    Raises:
        ZooError: the patches do not fill the grid.
    """
    batch, length, size = patches.shape
    moments, rows, columns = grid
    if moments * rows * columns != length or size % (patch_size**2 * tubelet_size):
        raise ZooError(
            f"{length} patches of {size} numbers do not fill a grid of {moments}x{rows}x{columns} patches of"
            f" {tubelet_size} frames and {patch_size} pixels"
        )
    blocks = patches.reshape(batch, moments, rows, columns, tubelet_size, patch_size, patch_size, -1)
    blocks = blocks.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return blocks.reshape(batch, -1, moments * tubelet_size, rows * patch_size, columns * patch_size)
