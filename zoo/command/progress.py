"""Progress in plain lines, metrics as text, and Ctrl-C between batches."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
import types
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from zoo.training.checkpoints import LastCheckpoint


def numbers(metrics: Mapping[str, Any]) -> list[str]:
    """`name value` texts of the scalars in `metrics`."""
    return [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in metrics.items()]


def scalars(metrics: Mapping[str, Any], latest: bool = False) -> dict[str, Any]:
    """`metrics` as numbers, once each: of those that Lightning keeps as `_step` and `_epoch` the mean of the epoch, or
    the `latest` step's."""
    found: dict[str, Any] = {}
    for key in sorted(metrics, key=lambda key: key.endswith("_step") == latest):  # the wanted one comes last
        name = key.removesuffix("_step").removesuffix("_epoch")
        if key != "v_num" and not key.startswith(("lr-", "time/", "train/lr")):
            value = metrics[key]
            found[name] = value.item() if isinstance(value, torch.Tensor) else value
    return {name: found[name] for key in metrics if (name := key.removesuffix("_step").removesuffix("_epoch")) in found}


def telling(metrics: Mapping[str, float], num_classes: int | None = None) -> dict[str, float]:
    """`metrics` without those that say nothing: undefined ones (an AP of objects that there are none of), and the top-5
    accuracy among five classes or fewer."""
    few = num_classes is not None and num_classes <= 5
    return {key: value for key, value in metrics.items() if math.isfinite(value) and not (few and key.endswith("top5"))}


class BarProgress(RichProgressBar):
    """A progress bar whose numbers are all of the training; `v_num` is a name of Lightning's for the run's folder."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {key: value for key, value in super().get_metrics(trainer, pl_module).items() if key != "v_num"}


class PlainProgress(ProgressBar):
    """Progress for logs and pipes: a line every `seconds` seconds, and at the end of epochs longer than a second."""

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._last = time.monotonic()

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _say(self, what: str, batch: int, total: float, metrics: Mapping[str, Any], always: bool = False) -> None:
        now = time.monotonic()
        if not self._enabled or now - self._last < (min(1.0, self.seconds) if always else self.seconds):
            return
        self._last = now
        of = f"/{int(total)}" if total != float("inf") else ""
        print(" ".join([what, f"batch {batch}{of}", *numbers(scalars(metrics, latest=True))]), flush=True)

    def _epoch(self, trainer: Trainer) -> str:
        last = f"/{trainer.max_epochs}" if trainer.max_epochs not in (None, -1) else ""
        return f"epoch {trainer.current_epoch + 1}{last}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1 == self.total_train_batches
        metrics = self.get_metrics(trainer, pl_module)
        self._say(self._epoch(trainer), batch_idx + 1, self.total_train_batches, metrics, always=done)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._say("validation", batch_idx + 1, trainer.num_val_batches[dataloader_idx], {})

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._say("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx], {})

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._say("predict", batch_idx + 1, trainer.num_predict_batches[dataloader_idx], {})


class Interrupt(Callback):
    """Ctrl-C and SIGTERM end a training batch, keep the state in `last.ckpt` and stop; a second Ctrl-C stops at once.

    In the loops an exception from a signal may come anywhere, in a finaliser that swallows it or while a file is
    written; there the request is noted and honoured between batches, by all processes behind the same batch. It stands
    before the other callbacks.

    Args:
        last: what keeps the state; None: nothing is kept.

    Attributes:
        signal: the signal's number, 0 before it came.
        begun: whether the loops were reached; before that a checkpoint is taken up.
    """

    def __init__(self, last: LastCheckpoint | None = None) -> None:
        self.last = last
        self.signal = 0
        self.begun = False
        self._agreed = False
        self._before: dict[int, Any] = {}

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = True

    on_sanity_check_start = on_test_start = on_predict_start = _begin

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = True
        self.signal, self._agreed = 0, False
        for number in (signal.SIGINT, signal.SIGTERM):
            if number == signal.SIGINT and signal.getsignal(number) is not signal.default_int_handler:
                continue  # a notebook's, or ignored in the background
            with contextlib.suppress(ValueError):  # not in the main thread
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal:
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            os.write(2, f"\nstopping after this batch{again}\n".encode())  # print is not for handlers
        self.signal = self.signal or number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._agreed = self._agreed or trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False)
        if self.last is not None:
            self.last.stop = self._agreed

    def _leave(self, trainer: Trainer) -> None:
        if self._agreed and (self.last is None or self.last.saved):
            if self.last is not None:
                self.last.publish(trainer)
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = True
        self._leave(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # `last.ckpt` was written before the validation. Processes may see different numbers of batches here.
        if self.signal and trainer.world_size == 1 and trainer.state.fn == TrainerFn.FITTING:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
