"""Random masking of token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError


class Masking(NamedTuple):
    """Which of L tokens stay. `ids_keep` followed by `ids_masked` is the shuffled order; `ids_restore` undoes it.

    Shapes (B, K), (B, L-K), (B, L); `mask` (B, L) is 1 at removed tokens, in the noise's dtype.
    """

    ids_keep: Tensor
    ids_masked: Tensor
    ids_restore: Tensor
    mask: Tensor


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Keep the int(L * (1 - mask_ratio)) tokens of smallest `noise` (B, L) in every sample, in the noise's order.

    Uniform noise gives each sample its own uniform random subset (MAE, section 3, "Simple implementation").

    Raises:
        ZooError: `mask_ratio` is not in [0, 1) or leaves no token.
    """
    length = noise.shape[1]
    keep = int(length * (1 - mask_ratio))
    if not 0 <= mask_ratio < 1 or keep < 1:
        raise ZooError(f"mask_ratio {mask_ratio} of {length} tokens leaves none; it must be in [0, 1)")
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :keep], ids_shuffle[:, keep:], ids_restore, (ids_restore >= keep).to(noise.dtype))


def centre_masking(grid: Sequence[int], count: int, share: float = 0.5) -> Masking:
    """Hide the middle of a `grid` (rows, columns), or of each moment of one (moments, rows, columns): round(share * n)
    of n rows and columns, alike for `count` samples. On the CPU, `mask` in float32.

    Raises:
        ZooError: the middle is nothing, or everything.
    """
    rows, columns = grid[-2:]
    tall, wide = round(rows * share), round(columns * share)
    top, left = (rows - tall) // 2, (columns - wide) // 2
    hidden = torch.zeros(rows, columns)
    hidden[top : top + tall, left : left + wide] = 1
    if not 0 < hidden.sum() < hidden.numel():
        raise ZooError(f"the middle {share} of {rows}x{columns} patches is none, or all of them")
    mask = hidden.expand(*grid).reshape(1, -1).repeat(count, 1)
    order = mask.argsort(dim=1, stable=True)
    keep = int((mask[0] == 0).sum())
    return Masking(order[:, :keep], order[:, keep:], order.argsort(dim=1), mask)


def put_tokens(tokens: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """`tokens` (B, L, D) with `values` (B, K, D) in their places at positions `ids` (B, K)."""
    return tokens.scatter(1, ids.unsqueeze(-1).expand_as(values), values.to(tokens.dtype))


def take_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Tokens (B, L, D) at positions `ids` (B, K) of their own sample: (B, K, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def tokens_at(table: Tensor, ids: Tensor) -> Tensor:
    """Rows (B, K, D) of a table (1, L, D) that all samples share, at positions `ids` (B, K)."""
    return torch.nn.functional.embedding(ids, table[0])
