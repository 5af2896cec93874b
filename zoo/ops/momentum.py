"""Encoders that follow others as moving averages."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def move_towards(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q for the parameters, not the buffers, in place (MoCo, arXiv 1911.05722,
    Eq. 2)."""
    get_ema_multi_avg_fn(momentum)(list(target.parameters()), list(source.parameters()), None)


def cosine_momentum(epoch: float, total_epochs: float, momentum: float) -> float:
    """The momentum at a fractional `epoch`: from `momentum` at 0 to 1 at `total_epochs` by half a cosine (BYOL, arXiv
    2006.07733, section 3.3): 1 - (1 - m) (1 + cos(pi * epoch / total)) / 2."""
    return 1 - (1 - momentum) * 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / total_epochs)))
