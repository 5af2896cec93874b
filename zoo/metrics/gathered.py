"""What the zoo's metrics have in common beside torchmetrics' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from zoo.errors import MissingPackage, ZooError


class Gathered(torchmetrics.Metric):
    """A metric whose states are gathered before they are looked at; a process that saw nothing gives none of them,
    instead of leaving the others waiting.

    A subclass adds its states, counts its updates by :meth:`_count`, and begins `compute` with :meth:`_require`, which
    refuses to compute what no process has updated.

    Args:
        rows: an empty tensor of the shape and type of a list state's rows, by its name, where they are known
            beforehand; of the others the processes tell each other.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: Any = True
    sample = "sample"  # what an update brings some of
    updates: Tensor

    def __init__(self, rows: Mapping[str, Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rows = dict(rows or {})
        self.add_state("updates", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _count(self) -> None:
        self.updates = self.updates + 1

    def _require(self) -> None:
        if not self.updates:
            name, sample = type(self).__name__, self.sample
            raise ZooError(f"{name} has seen no {sample}: it needs {sample}s before compute (update comes first)")

    def sync(
        self,
        dist_sync_fn: Callable | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable | None = None,
    ) -> None:
        available = distributed_available or self.distributed_available_fn
        if should_sync and callable(available) and available() and not self._is_synced:
            self._agree(process_group or self.process_group)
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def _agree(self, group: Any) -> None:
        """Puts rows of the right shape and type, none of them, where this process has no rows of a state."""
        states = {name: getattr(self, name) for name, default in self._defaults.items() if isinstance(default, list)}
        rows = dict(self._rows)
        if unknown := [name for name in states if name not in rows]:
            mine = {name: states[name][0][:0].cpu() for name in unknown if len(states[name])}
            told: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(told, mine, group)
            for one in told:
                rows |= one
        for name, state in states.items():
            if isinstance(state, list) and not state and name in rows:
                setattr(self, name, [rows[name].to(self.device)])

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """The values `val` (default: of `compute`) as a figure, in the way of torchmetrics: (figure, axes).

        Raises:
            MissingPackage: matplotlib is not installed.
        """
        try:
            return self._plot(val, ax)
        except ModuleNotFoundError as error:
            raise MissingPackage("metrics are plotted with matplotlib: pip install matplotlib") from error
