"""Gradient checkpointing for networks with batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.nn.batchnorm import BATCH_NORMS


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, whose inner activations are computed again in the backward pass instead of kept.

    Running statistics move once, in the forward pass, so that training goes on as without checkpointing.
    """
    if not torch.is_grad_enabled():
        return module(x)
    contexts: Callable = lambda: (nullcontext(), _frozen_statistics(module))  # noqa: E731
    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch normalisation in training mode still uses the batch's statistics, but moves none of its own."""
    norms = [part for part in module.modules() if isinstance(part, BATCH_NORMS)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
