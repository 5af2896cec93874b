"""What the zoo's metrics have in common beside torchmetrics' own."""

from __future__ import annotations

from collections.abc import Mapping
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

    def sync(self, *args: Any, **kwargs: Any) -> None:
        states = {name: getattr(self, name) for name in self._defaults if isinstance(self._defaults[name], list)}
        empty = {name: self._rows.get(name) for name, state in states.items() if isinstance(state, list) and not state}
        unknown = [name for name in states if name not in self._rows]
        if unknown and torch.distributed.is_available() and torch.distributed.is_initialized():
            mine = {name: (tuple(states[name][0].shape[1:]), states[name][0].dtype)
                    for name in unknown if len(states[name])}  # fmt: skip
            told: list[Any] = [None] * torch.distributed.get_world_size(self.process_group)
            torch.distributed.all_gather_object(told, mine, self.process_group)
            for name, (shape, dtype) in (item for one in told for item in one.items()):
                if name in empty and empty[name] is None:
                    empty[name] = torch.empty(0, *shape, dtype=dtype)
        for name, rows in empty.items():
            if rows is not None:
                setattr(self, name, [rows.to(self.device)])
        super().sync(*args, **kwargs)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """The values `val` (default: of `compute`) as a figure, in the way of torchmetrics: (figure, axes).

        Raises:
            MissingPackage: matplotlib is not installed.
        """
        try:
            return self._plot(val, ax)
        except ModuleNotFoundError as error:
            raise MissingPackage("metrics are plotted with matplotlib: pip install matplotlib") from error
