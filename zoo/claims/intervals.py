"""Effects over seeds: their interval, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from zoo.claims.declaration import SubClaim

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with its 95 % interval by Student's t (none of one seed).

    Two arms are compared by the differences within each seed, so that what a seed does to both cancels.
    """
    n, middle = len(values), mean(values)
    if n < 2:
        return {"mean": middle, "low": None, "high": None, "n": n, "values": list(values)}
    deviation = math.sqrt(sum((value - middle) ** 2 for value in values) / (n - 1))
    half = _T95[min(n - 2, len(_T95) - 1)] * deviation / math.sqrt(n)  # beyond the table it is a little too wide
    return {"mean": middle, "low": middle - half, "high": middle + half, "sd": deviation, "n": n, "values": [*values]}


def judged(claim: SubClaim, values: Sequence[float]) -> dict[str, Any]:
    """The record of a sub-claim whose effect took these values over the seeds."""
    found = interval(values)
    low, high = found["low"], found["high"]
    held = low is not None and low > claim.bound
    return {
        "name": claim.name,
        "statement": claim.statement,
        "criterion": f"95 % interval above {claim.bound:g} {claim.unit}",
        "expression": claim.effect,
        "unit": claim.unit,
        "bound": claim.bound,
        "effect": found,
        "held": held,
        "verdict": "held" if held else "not held" if high is not None and high < claim.bound else "undecided",
    }
