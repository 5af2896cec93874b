"""What processes tell each other; with one process (or none declared) everything is the identity.

Only :func:`gather_with_grad` and :func:`sum_with_grad` carry a gradient.
"""

from __future__ import annotations

from typing import Any

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


def gather_objects(x: Any) -> list[Any]:
    """What each process has, in the order of the ranks, on every process; small things of plain types."""
    _, size = world()
    found = [x] * size
    if size > 1:
        dist.all_gather_object(found, x)
    return found


def gather_at_first(x: Any) -> list[Any] | None:
    """As :func:`gather_objects`, for large things: on rank 0 alone; None elsewhere."""
    rank, size = world()
    if size == 1:
        return [x]
    found: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(x, found)
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        rank, size = world()
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(size)[rank]


def gather_with_grad(x: Tensor) -> Tensor:
    """As :func:`gather`, with the gradient: a process's `x` gets the sum of what the losses of all processes send back.

    Where every process computes the same loss, or its own share of a mean, the gradient is R times that of the whole,
    which the mean over processes of data-parallel training makes right.
    """
    return x if world()[1] == 1 else _Gather.apply(x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0])


def sum_with_grad(x: Tensor) -> Tensor:
    """The sum of the tensors of all processes, on every process, with the gradient, which is the sum of what the losses
    of all send back (see :func:`gather_with_grad`)."""
    return x if world()[1] == 1 else _Sum.apply(x)


@torch.no_grad()
def sum_over(x: Tensor) -> Tensor:
    """The sum of the tensors of all processes, of one shape, on every process."""
    x = x.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


@torch.no_grad()
def from_first(x: Tensor) -> Tensor:
    """The tensor of rank 0, on every process."""
    if world()[1] > 1:
        x = x.contiguous()
        dist.broadcast(x, src=0)
    return x
