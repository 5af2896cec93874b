"""Progress in plain lines, metrics as text, and Ctrl-C between batches."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar


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
    """Ctrl-C ends a training batch, saves `last.ckpt` and stops; a second one stops at once.

    In the loops an exception from a signal may come anywhere, in a finaliser that swallows it or while a file is
    written; there the request is noted and honoured between batches.
    """

    def __init__(self, checkpoint: ModelCheckpoint | None) -> None:
        self.checkpoint = checkpoint
        self._asked = self._looping = False
        self._before: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Ranks would leave at different batches and wait for each other in the save; there Ctrl-C stops at once.
        if trainer.world_size == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with contextlib.suppress(ValueError):  # not in the main thread
                self._before = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._asked or not self._looping:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping after this batch; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._asked:
            if self.checkpoint is not None and self.checkpoint.dirpath:
                trainer.save_checkpoint(Path(self.checkpoint.dirpath) / "last.ckpt")
            raise KeyboardInterrupt

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looping = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
