"""Numerical parity: what the official implementations compute, replayed on our code.

A case is a JSON file. It names every tensor of an official state dict and every input by a shape and a fill rule, and
holds digests of the outputs that the official code produced from them. No weights are stored: a tensor is drawn anew
from its own name. A paper's adapter, ``parity/adapters/<paper>.py``, has ``run(case) -> dict[str, Tensor]``; it says
how a kind of case maps onto public code of the zoo. Cases of whole runs go through :func:`train`.

:func:`run_cases` is what ``zoo parity`` and ``tests/parity`` do; further cases come from the folders in
``ZOO_PARITY_CASES``. How a case is made from official code is told by :mod:`zoo.parity.making` (``zoo parity --make``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.parity.cases import (
    Case,
    Config,
    Convert,
    Official,
    compare,
    digest,
    dtype_of,
    fill,
    filled_inputs,
    filled_state,
    gradients,
    load_filled,
    named,
)
from zoo.parity.making import GUIDE, make, rule_for, template
from zoo.parity.runner import (
    TOLERANCES,
    Adapter,
    Verdict,
    adapter,
    by_entry,
    find_cases,
    load,
    run_case,
    run_cases,
    shared,
)

if TYPE_CHECKING:
    from zoo.parity.training import batch_inputs, train

__all__ = [
    "GUIDE",
    "TOLERANCES",
    "Adapter",
    "Case",
    "Config",
    "Convert",
    "Official",
    "Verdict",
    "adapter",
    "batch_inputs",
    "by_entry",
    "compare",
    "digest",
    "dtype_of",
    "fill",
    "filled_inputs",
    "filled_state",
    "find_cases",
    "gradients",
    "load",
    "load_filled",
    "make",
    "named",
    "rule_for",
    "run_case",
    "run_cases",
    "shared",
    "template",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in ("batch_inputs", "train"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zoo.parity import training  # Lightning takes seconds to import

    return getattr(training, name)
