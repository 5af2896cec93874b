"""What `zoo predict RECIPE` keeps: one row a sample, from all processes, in the order of the split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from zoo import files
from zoo.ops.collective import gather_at_first
from zoo.training.base import batch_length
from zoo.training.callbacks import Pictures


def callbacks(task: LightningModule, given: list[Callback], folder: Path) -> list[Callback]:
    """What a run of `zoo predict` adds to the callbacks `given`: the file of predictions, and a picture if the task
    draws."""
    draws = callable(getattr(task, "picture", None)) and not any(isinstance(one, Pictures) for one in given)
    return [Predictions(folder / "predictions.pt"), *([Pictures()] if draws else [])]


class Predictions(Callback):
    """Writes a list of dicts, one a sample, to `path`, to be read by torch.load.

    Each has `index`, its place in the split, `file` where it has a name, and what the task predicts: the entries of a
    dict, else `prediction`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._rows: list[dict[str, Any]] = []
        self._seen = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows, self._seen = [], 0

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        stated = batch.get("index") if isinstance(batch, Mapping) else None
        count = batch_length(batch) if stated is None else len(stated)
        # Without an index, samples are taken as dealt in turn.
        dealt = [(self._seen + k) * trainer.world_size + trainer.global_rank for k in range(count)]
        self._seen += count
        indices = dealt if stated is None else stated.tolist()
        loaders: Any = trainer.predict_dataloaders
        names = _names(batch, getattr(loaders, "dataset", None), indices)
        for index, name, row in zip(indices, names, _rows(outputs, count), strict=True):
            self._rows.append({"index": index, **({} if name is None else {"file": name}), **row})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shares = gather_at_first(self._rows)
        if shares is not None:
            rows = {row["index"]: row for share in reversed(shares) for row in reversed(share)}
            self.count = len(rows)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.save([rows[index] for index in sorted(rows)], self.path)
        self._rows = []


def _names(batch: Any, samples: Any, indices: list[int]) -> list[str | None]:
    """The files that samples come from, as far as they are known."""
    if isinstance(batch, Mapping) and len(batch.get("path", ())) == len(indices):
        return [str(path) for path in batch["path"]]
    name = getattr(samples, "name", None)
    return [name(index) if callable(name) else None for index in indices]


def _rows(outputs: Any, count: int) -> list[dict[str, Any]]:
    """The predictions of a batch by sample."""
    outputs = _plain(outputs)
    if isinstance(outputs, Mapping):
        return [
            {key: value[n] if _each(value, count) else value for key, value in outputs.items()} for n in range(count)
        ]
    parts = outputs if _each(outputs, count) else [outputs] * count
    return [dict(part) if isinstance(part, Mapping) else {"prediction": part} for part in parts]


def _each(value: Any, count: int) -> bool:
    return (isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)) and len(value) == count


def _plain(value: Any) -> Any:
    """`value` in types that torch.load takes with weights_only, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
