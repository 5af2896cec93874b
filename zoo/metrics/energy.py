"""The energy score of samples: how well a distribution, known by samples alone, foretells an observation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.errors import ZooError


def energy_score(x: Tensor, samples: Tensor) -> Tensor:
    """The energy score (B,) of observations (B, D), each with samples (B, M, D) of what should be its distribution:
    the mean of |x - y| less half the mean of |y - y'|, over sqrt(D).

    Strictly proper (Gneiting and Raftery 2007, section 4.3): its mean over observations is least where their
    distribution is that of the samples. It is lower the better, and its floor is that of the data, not 0.

    Raises:
        ZooError: fewer than two samples of an observation.
    """
    count = samples.shape[1]
    if count < 2:
        raise ZooError(f"the energy score wants two samples of each observation or more, not {count}")
    between = torch.cdist(samples, samples, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2))
    score = (samples - x[:, None]).norm(dim=2).mean(1) - between / (2 * count * (count - 1))
    return score / math.sqrt(x.shape[1])
