"""Zero-shot classification by a model of images and texts (Radford et al. 2021, CLIP, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def unit(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x / (|x| + eps) along the last axis."""
    return x / (x.norm(dim=-1, keepdim=True) + eps)


@torch.no_grad()
def class_features(encode: Callable[[Tensor], Tensor], prompts: Tensor, chunk: int = 256) -> Tensor:
    """One unit vector (K, D) a class: the mean over its templates' features, normalised again.

    Args:
        encode: token numbers (N, L) to unit features (N, D).
        prompts: token numbers (K, T, L) of T templates for each of K classes.
        chunk: texts encoded at a time.
    """
    classes, templates, length = prompts.shape
    features = torch.cat([encode(part) for part in prompts.reshape(-1, length).split(chunk)])
    return unit(features.reshape(classes, templates, -1).mean(dim=1))
