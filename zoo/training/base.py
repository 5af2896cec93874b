"""The base of every task: the optimiser from its declaration, pinned randomness, logging, safe checkpoints."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.training.optim import Optim, build


def seed_position(*position: int) -> None:
    """Seeds `random`, numpy and torch (all devices) from a position such as (seed, epoch, batch, rank)."""
    words = np.random.SeedSequence(position).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


def batch_length(batch: Any) -> int:
    """The number of samples of a batch: the first axis of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, Tensor | Mapping | list | tuple):
            return batch_length(value)
    return 1


class BaseModule(L.LightningModule):
    """A LightningModule with the house's optimiser, seeds and logs; a task adds its network and its steps.

    - Before every batch all random generators are seeded from (seed, epoch, batch index, rank), the seed being that of
      `seed_everything`: a step is a pure function of its position, so a resumed run repeats the uninterrupted one.
      Evaluation batches are seeded without the epoch, so that two epochs are compared on the same draws.
    - `train/loss` and `train/lr` are logged from what `training_step` returns.
    - A checkpoint with non-finite weights is refused, and holds plain types only (it loads with weights_only=True);
      `zoo_task` names the task's class.

    - A task with an attribute `init_from` starts from the weights named there, which it loads in :meth:`load_initial`.

    A subclass that overrides one of the hooks below calls super.

    Args:
        optim: the declaration; a mapping of its fields will do.
    """

    def __init__(self, optim: Optim) -> None:
        super().__init__()
        self.optim = optim if isinstance(optim, Optim) else Optim(**optim)

    init_from: str | None = None

    def load_initial(self, source: str) -> None:
        """Fill the network from pre-trained weights: a name, a file, a checkpoint. Tasks that can start so override it.

        Raises:
            ZooError: here always; elsewhere, a missing file or one that does not fit.
        """
        raise ZooError(f"{type(self).__name__} takes no pre-trained weights: leave init_from ({source}) out")

    def setup(self, stage: str) -> None:
        """Fetch the weights from `init_from`, once, unless a checkpoint of this task is about to be loaded."""
        if self.init_from is not None and (self._trainer is None or self.trainer.ckpt_path is None):
            self.load_initial(self.init_from)
            self.init_from = None

    def trainable(self) -> nn.Module:
        """The module whose parameters are optimised; its names are those that layer decay and exclusions see."""
        return self

    def configure_optimizers(self) -> Any:
        return build(self.trainable(), self.optim, self.trainer)

    def _seed_batch(self, stage: int, epoch: int, batch_idx: int, dataloader_idx: int = 0) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        seed_position(seed, stage, epoch, batch_idx, self.global_rank, dataloader_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._seed_batch(0, self.current_epoch, batch_idx)
        rates = [group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        self.log("train/lr", max(rates, default=0.0), on_step=True, on_epoch=False, batch_size=1)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._seed_batch(1, 0, batch_idx, dataloader_idx)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._seed_batch(2, 0, batch_idx, dataloader_idx)

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._seed_batch(3, 0, batch_idx, dataloader_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            return
        if self.automatic_optimization:  # Lightning hands the loss back divided by the accumulation
            loss = loss * self.trainer.accumulate_grad_batches
        size = batch_length(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        broken = [name for name, value in checkpoint["state_dict"].items() if not _finite(value)]
        if broken:
            raise ZooError(
                f"non-finite weights at step {self.trainer.global_step} ({broken[0]}, {len(broken)} tensors in all);"
                " nothing was saved and the last good checkpoint is kept"
            )
        checkpoint["zoo_task"] = f"{type(self).__module__}.{type(self).__qualname__}"
        for key in checkpoint:
            if key.endswith("hyper_parameters"):
                checkpoint[key] = _plain(checkpoint[key])


def _finite(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta or not value.numel():
        return True
    return bool(torch.isfinite(value).all())


def _plain(value: Any) -> Any:
    """`value` with dataclasses as dicts and mappings as plain dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(entry) for entry in value)
    return value
