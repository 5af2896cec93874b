"""Checkpoints: written whole, read without running anything, and taken at moments from which a run goes on exactly."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from zoo import files
from zoo.errors import ZooError
from zoo.weights.files import read_checkpoint
from zoo.weights.runs import read_sharded


class SafeCheckpointIO(CheckpointIO):
    """Checkpoints as files of this machine: there whole or not at all, and never more than tensors and plain types."""

    def __init__(self) -> None:
        self._read: tuple[Path, dict[str, Any]] | None = None

    def peek(self, path: Any) -> dict[str, Any]:
        """The content of a checkpoint that is about to be loaded; the loading does not read it again."""
        if self._read is None or self._read[0] != local(path):
            read = read_sharded if is_sharded(local(path)) else read_checkpoint
            self._read = (local(path), read(local(path)))
        return self._read[1]

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        files.save(checkpoint, local(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        found = self.peek(path)
        self._read = None
        return found

    def remove_checkpoint(self, path: Any) -> None:
        path = local(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_sharded(path: Path) -> bool:
    """Whether `path` is a folder that a strategy of several devices wrote its part files to."""
    return path.is_dir() and any((path / name).exists() for name in (".metadata", "latest", "meta.pt"))


def check_shards(path: Path) -> None:
    """As :func:`zoo.formats.shards.check`, whose imports take their time."""
    from zoo.formats import shards

    shards.check(path)


def local(path: Any) -> Path:
    """`path` as one of this machine; a ZooError for an address."""
    if "://" in str(path):
        raise ZooError(f"{path}: a checkpoint is a file of this machine; download it first")
    return Path(path)


# ------------------------------------------------------------------------------------------------ where a run stands


def settle(trainer: L.Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Makes the loops in `checkpoint` say that a whole batch or a whole epoch was done, whatever hook it is saved from.

    Lightning counts on along a batch (ready, started, processed, completed), and takes some of these states up wrongly:
    one saved behind an epoch's last batch trains the epoch again or leaves its validation and its end out. What is
    left to do is stated here in the two forms that it does take up: inside an epoch (behind the last batch too, the
    validation to come or done, the epoch's end to come), or between two epochs.

    Returns:
        {"epochs": how many are done, "whole": whether of the next one all batches are, "steps": rows that were logged
        have a lower number of steps}.
    """
    fit = checkpoint["loops"]["fit_loop"]
    epoch, batch = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
    counts = fit["epoch_loop.state_dict"]
    e, b = epoch["current"], batch["current"]
    evaluation = fit["epoch_loop.val_loop.batch_progress"]
    loaders = fit["state_dict"].get("combined_loader", [])
    ours = bool(loaders) and all(isinstance(state, dict) and "of" in state for state in loaders)
    steps = counts["_batches_that_stepped"]
    last = batch["is_last_batch"] or b["ready"] == trainer.num_training_batches
    due = b["ready"] > 0 and _validates(trainer, e["started"] - 1, b["ready"], batch["total"]["ready"])

    def nothing_left() -> None:  # of the epoch's batches
        for state in loaders:
            state["batches"] = state["of"]

    if b["ready"] == 0:
        pass
    elif e["ready"] > e["started"]:  # the next epoch was about to begin
        _shift(epoch, -1, "ready")
    elif e["processed"] == e["started"]:  # at or behind the epoch's end
        if last and not due and not ours:
            _shift(epoch, e["processed"] - e["completed"], "completed")
        else:  # the end of the epoch is gone through again
            _shift(epoch, -1, *(["processed", "completed"] if e["completed"] == e["processed"] else ["processed"]))
            _evaluated(evaluation, pending=False)
            if due:
                counts["_batches_that_stepped"] -= 1  # Lightning counts it again
            elif last:
                nothing_left()
    elif b["completed"] < b["processed"]:  # at a batch's end
        steps += 1
        if due or last:
            _shift(batch, 1, "completed")
        if due:
            _evaluated(evaluation, pending=True)
        elif last:
            counts["_batches_that_stepped"] += 1
            if ours:
                _evaluated(evaluation, pending=False)
                nothing_left()
            else:  # a loader that cannot be told to be at its end: the end of the epoch is left out
                _shift(epoch, 1, "processed", "completed")
    elif trainer.state.stage == RunningStage.VALIDATING:
        steps += 1
        whole = evaluation["is_last_batch"] and evaluation["current"]["completed"] == evaluation["current"]["ready"]
        _evaluated(evaluation, pending=not whole)
    return {"epochs": e["completed"], "whole": bool(last) and e["started"] > e["completed"], "steps": steps}


def _shift(progress: dict[str, Any], by: int, *keys: str) -> None:
    for part in ("current", "total"):
        for key in keys:
            progress[part][key] += by


def _evaluated(progress: dict[str, Any], pending: bool) -> None:
    """States that the validation behind this batch is still to come, or not."""
    for part in ("current", "total"):
        progress[part] = dict.fromkeys(progress[part], 0)
    if pending:  # as one stopped in its first batch
        progress["total"] |= {"ready": 1, "started": 1}
    progress["is_last_batch"] = False


def _validates(trainer: L.Trainer, epoch: int, batches: int, total: int) -> bool:
    """Whether a validation comes behind this many batches of the epoch (0, 1, ...), `total` of all epochs."""
    every, interval = trainer.check_val_every_n_epoch, getattr(trainer, "val_check_batch", None)
    if not trainer.enable_validation or not interval or (every is not None and (epoch + 1) % every):
        return False
    if interval == float("inf"):
        return batches == trainer.num_training_batches
    return (total if every is None else batches) % interval == 0


def take_up(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Under `max_steps` Lightning takes every state up as one inside an epoch: puts one between two epochs so. A state
    behind the last batch of an epoch is put between two where another number of processes goes on from it: an epoch
    has another number of batches there."""
    fit = (checkpoint.get("loops") or {}).get("fit_loop")
    if fit is None:
        return
    epoch, batch = fit["epoch_progress"]["current"], fit["epoch_loop.batch_progress"]
    between = len(set(epoch.values())) == 1 and batch["current"]["ready"] == batch["current"]["completed"] > 0
    loaders = [state for state in fit["state_dict"].get("combined_loader", []) if isinstance(state, dict)]
    others = any(state.get("processes", trainer.world_size) != trainer.world_size for state in loaders)
    if others and all(state.get("batches") == state.get("of") for state in loaders):
        for key in ("processed", "completed"):
            _shift(fit["epoch_progress"], epoch["started"] - epoch[key], key)
        batch["current"] = dict.fromkeys(batch["current"], 0)
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] = standing(checkpoint)["steps"]
    elif trainer.max_steps != -1 and between:
        _shift(batch, -1, "completed")  # so it starts the counts of the epoch anew
        batch["is_last_batch"] = False
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # and counts this one again


def standing(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run: {"epochs", "whole", "steps", "ended", "metrics"}."""
    fit = (checkpoint.get("loops") or {}).get("fit_loop") or {}
    epochs = ((fit.get("epoch_progress") or {}).get("current") or {}).get("completed", 0)
    step = checkpoint.get("global_step", 0)
    found = {"epochs": epochs, "whole": False, "steps": step, "ended": False, "metrics": {}}
    return found | (checkpoint.get("zoo_run") or {})


# --------------------------------------------------------------------------------------------------------- callbacks


class LastCheckpoint(Checkpoint):
    """Keeps the newest state of a run in `last.ckpt`, and the one before in `previous.ckpt`.

    Written behind the last batch of each epoch (before the validation, where one comes), every `every_n_train_steps`,
    every so many `minutes`, when the run is asked to stop, and when it ends. The file takes its name only when
    all that its last batch logged is in the logs too.

    Args:
        dirpath: the folder; default: `checkpoints` in the run's.
        every_n_train_steps: optimiser steps between two checkpoints inside an epoch.
        minutes: at most so many between two checkpoints.
    """

    def __init__(
        self, dirpath: str | None = None, every_n_train_steps: int | None = None, minutes: float | None = 15.0
    ) -> None:
        if (every_n_train_steps is not None and every_n_train_steps < 1) or (minutes is not None and minutes <= 0):
            raise ZooError("LastCheckpoint wants every_n_train_steps of 1 or more, and minutes above 0")
        self.dirpath, self.every_n_train_steps, self.minutes = dirpath, every_n_train_steps, minutes
        self.stop = False  # asked for: save behind the next optimiser step
        self.saved = False  # the state to stop at is kept
        self._steps = 0
        self._stamp = time.monotonic()
        self._pending = self._ended = self._due_between = False
        self._resumed: tuple[int, int] | None = None  # the optimisers and schedulers of the checkpoint taken up
        self.metrics: dict[str, float] = {}  # those of the checkpoint that was taken up

    @property
    def path(self) -> Path:
        return Path(self.dirpath or ".") / "last.ckpt"

    @property
    def last_model_path(self) -> str:
        return str(self.path) if self.path.exists() else ""

    @property
    def _new(self) -> Path:
        return self.path.with_name(".new.ckpt")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            folder = trainer.log_dir or trainer.default_root_dir  # log_dir is a collective call
            self.dirpath = trainer.strategy.broadcast(self.dirpath or str(Path(folder) / "checkpoints"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps, self._stamp = trainer.global_step, time.monotonic()
        self._pending = self._ended = self.saved = self.stop = False
        if self._resumed is not None:
            _refuse_other_optimizer(trainer, *self._resumed)
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.metrics.items()}
        trainer.callback_metrics.update(values)  # those of earlier epochs are part of the score
        if trainer.is_global_zero:
            for left in self.path.parent.glob(".*.part"):  # of a save that was killed
                left.unlink(missing_ok=True)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._due_between:
            self._due_between = False
            self._save(trainer)
            self.publish(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, before = trainer.global_step, self._steps
        last = batch_idx + 1 == trainer.num_training_batches
        if step == before and not last:  # gradients are being gathered, which no checkpoint holds
            return
        self._steps = step
        if trainer.max_steps != -1 and step >= trainer.max_steps:
            return  # the end of the run writes it
        every = self.every_n_train_steps
        wanted = self.stop or (every is not None and step // every > before // every) or self._late(trainer)
        validates = _validates(trainer, trainer.current_epoch, batch_idx + 1, trainer.fit_loop.total_batch_idx + 1)
        if last and not validates and not self.stop:
            self._due_between = True
        elif wanted or validates:
            self._save(trainer)
            self.saved = self.stop

    def _late(self, trainer: L.Trainer) -> bool:
        if self.minutes is None or trainer.global_step % 10:
            return False
        late = time.monotonic() - self._stamp > 60 * self.minutes
        return trainer.strategy.reduce_boolean_decision(late, all=False)

    def _save(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self._new)
            self._pending, self._stamp = True, time.monotonic()

    def publish(self, trainer: L.Trainer) -> None:
        """What was saved becomes `last.ckpt`."""
        if self._pending and trainer.is_global_zero:
            previous = self.path.with_name("previous.ckpt")
            if self._new.is_dir() or self.path.is_dir():  # shards
                shutil.rmtree(previous, ignore_errors=True)
                if self.path.exists():
                    os.replace(self.path, previous)
            elif self.path.exists():
                part = self.path.with_name(f".previous.{os.getpid()}.part")
                part.unlink(missing_ok=True)
                try:
                    os.link(self.path, part)  # so that there is a last.ckpt at every moment
                except OSError:  # a file system without links
                    os.replace(self.path, part)
                os.replace(part, previous)
            files.rename(self._new, self.path)
        self._pending = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.publish(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.publish(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.publish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = True
        self._save(trainer)
        self.publish(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(OSError):
            self.publish(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = {}
        for name, value in trainer.callback_metrics.items():
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                metrics[name] = float(value)
        checkpoint["zoo_run"] = {**settle(trainer, checkpoint), "ended": self._ended, "metrics": metrics}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.metrics = standing(checkpoint)["metrics"]
            if "optimizer_states" in checkpoint:  # those of a sharded one lie beside it
                self._resumed = len(checkpoint["optimizer_states"]), len(checkpoint["lr_schedulers"])
            take_up(trainer, checkpoint)


def _refuse_other_optimizer(trainer: L.Trainer, optimizers: int, schedulers: int) -> None:
    wanted = len(trainer.optimizers), len(trainer.lr_scheduler_configs)
    if (optimizers, schedulers) != wanted:
        raise ZooError(
            f"the checkpoint has {optimizers} optimisers and {schedulers} schedules, the model {wanted[0]} and "
            f"{wanted[1]}: keep model.optim"
        )
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "momentum", "square"):
                if isinstance(value := state.get(name), torch.Tensor) and value.numel() != parameter.numel():
                    raise ZooError(f"the checkpoint's optimiser is of another model: {name} of {tuple(value.shape)}")
        own = optimizer.defaults.keys() - {"differentiable"}  # which PyTorch adds to every optimiser when it loads
        odd = sorted(name for group in optimizer.param_groups for name in own if name not in group)
        if odd:
            kind = type(optimizer).__name__
            raise ZooError(f"the checkpoint's optimiser is no {kind}, it has no {odd[0]!r}: keep model.optim.name")


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights of the best validation in `best.ckpt`, over all parts of a run that was stopped and resumed.

    A run that goes on in another folder takes the best so far along.

    Args:
        monitor: the metric's name.
        mode: whether its "max" or "min" is best.
        dirpath: the folder; default: `checkpoints` in the run's.
    """

    def __init__(self, monitor: str, mode: str = "max", dirpath: str | Path | None = None) -> None:
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, here = state_dict.get("best_model_path"), self.dirpath
        if before and here and os.path.realpath(state_dict.get("dirpath") or "") != os.path.realpath(here):
            target = Path(here) / "best.ckpt"
            if Path(before).is_file():
                with files.replacing(target) as part:
                    shutil.copyfile(before, part)
            score = state_dict["best_model_score"]
            kept = {str(target): score} if target.is_file() else {}
            state_dict = {
                **state_dict,
                "dirpath": here,
                "best_model_path": str(target) if kept else "",
                "best_k_models": kept,
                "kth_best_model_path": str(target) if kept else "",
            }
        super().load_state_dict(state_dict)
        self.current_score = state_dict["current_score"]
