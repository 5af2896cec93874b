"""The contrastive loss of pairs, over all processes."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.errors import ZooError
from zoo.ops.collective import gather, gather_with_grad, world


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor | float, local_loss: bool = True, gather_grad: bool = True
) -> Tensor:
    """Symmetric InfoNCE of N pairs a process over the R * N pairs of all: the mean of both directions (CLIP, figure 3).

    With the defaults a process computes its own rows of the R*N x R*N matrix only, and features are gathered with their
    gradient; averaged over processes, as data-parallel training does, loss and gradient are exactly those of one
    process that holds the whole batch. The other three combinations are those that open_clip has: `gather_grad=False`
    with the whole matrix makes every gradient R times too small, with local rows it also changes its direction.

    Args:
        image, text: features (N, D) of this process's pairs, normalised; N is the same on every process.
        scale: the inverse temperature that their products are multiplied by.
        local_loss: this process's rows of the matrix, or on every process the whole of it.
        gather_grad: whether gradients flow to the other processes' features.

    Returns:
        A scalar, in float32 or the features' own precision where that is higher.

    Raises:
        ZooError: features of different shapes.
    """
    if image.shape != text.shape:
        raise ZooError(f"pairs want features of one shape, not {tuple(image.shape)} and {tuple(text.shape)}")
    rank, size = world()
    count = len(image)
    kind = image.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        dtype = torch.promote_types(image.dtype, torch.float32)
        image, text = image.to(dtype), text.to(dtype)
        all_image, all_text = (_gathered(x, rank, size, local_loss, gather_grad) for x in (image, text))
        if local_loss and size > 1:
            target = torch.arange(count, device=image.device) + rank * count
            by_image, by_text = scale * image @ all_text.T, scale * text @ all_image.T
        else:
            target = torch.arange(len(all_image), device=image.device)
            by_image = scale * all_image @ all_text.T
            by_text = by_image.T
        return (cross_entropy(by_image, target) + cross_entropy(by_text, target)) / 2


def _gathered(x: Tensor, rank: int, size: int, local_loss: bool, gather_grad: bool) -> Tensor:
    if gather_grad or size == 1:
        return gather_with_grad(x)
    everyone = gather(x)
    if local_loss:
        return everyone
    parts = list(everyone.chunk(size))
    parts[rank] = x
    return torch.cat(parts)
