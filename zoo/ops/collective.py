"""What processes tell each other; with one process (or none declared) everything is the identity. No gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Tensors (N, ...) of all processes, of one shape, to (R * N, ...) in the order of the ranks, on every process."""
    _, size = world()
    if size == 1:
        return x.detach()
    out = x.new_empty(size * len(x), *x.shape[1:])
    dist.all_gather(list(out.chunk(size)), x.detach().contiguous())
    return out


@torch.no_grad()
def from_first(x: Tensor) -> Tensor:
    """The tensor of rank 0, on every process."""
    if world()[1] > 1:
        x = x.contiguous()
        dist.broadcast(x, src=0)
    return x
