"""Progress in plain lines, metrics as text, and Ctrl-C between batches."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from zoo.machine import OF_THE_MACHINE
from zoo.training.callbacks import Throughput, Timing
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
        if key != "v_num" and not key.startswith(("lr-", "train/lr", *OF_THE_MACHINE)):
            value = metrics[key]
            found[name] = value.item() if isinstance(value, torch.Tensor) else value
    return {name: found[name] for key in metrics if (name := key.removesuffix("_step").removesuffix("_epoch")) in found}


def telling(metrics: Mapping[str, float], num_classes: int | None = None) -> dict[str, float]:
    """`metrics` without those that say nothing: undefined ones (an AP of objects that there are none of), and the top-5
    accuracy among five classes or fewer."""
    few = num_classes is not None and num_classes <= 5
    return {key: value for key, value in metrics.items() if math.isfinite(value) and not (few and key.endswith("top5"))}


_SAMPLES = {"video": "clips", "views": "images", "image": "images", "latent": "latents"}


def throughput(trainer: Trainer) -> Throughput | None:
    """How fast `trainer` trains, as its Timing sees it."""
    timing = next((c for c in trainer.callbacks if isinstance(c, Timing)), None)  # type: ignore[attr-defined]
    return None if timing is None else timing.throughput(trainer)


def samples_of(batch: Any) -> str:
    """What the entries of a batch are: clips, images, else samples."""
    known = batch if isinstance(batch, Mapping) else {}
    return next((name for key, name in _SAMPLES.items() if key in known), "samples")


def duration(seconds: float) -> str:
    """`seconds` as 1:02:03, or 2:03 below an hour; days stand before it."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours or days else f"{minutes}:{seconds:02d}"
    return f"{days} d {clock}" if days else clock


def throughput_parts(found: Throughput, what: str = "samples") -> dict[str, str]:
    """Throughput as texts by what they tell."""
    parts = {f"{what}/s": f"{found.samples_per_s:.3g}", "waiting for data": f"{found.waiting:.0%}"}
    if found.seconds_left is not None:
        parts["left"] = duration(found.seconds_left)
    if found.peak_mib is not None:
        parts["memory"] = f"{found.peak_mib / 1024:.1f} GiB"
    return parts


class BarProgress(RichProgressBar):
    """A progress bar whose numbers are all of the training, with its throughput; `v_num` is a name of Lightning's for
    the run's folder."""

    _what = "samples"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._what = samples_of(batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = {key: value for key, value in super().get_metrics(trainer, pl_module).items() if key != "v_num"}
        found = throughput(trainer) if trainer.training else None
        return metrics if found is None else {**metrics, **throughput_parts(found, self._what)}


def _speed(trainer: Trainer, batch: Any) -> str:
    found, what = throughput(trainer), samples_of(batch)
    if found is None:
        return ""
    return " · " + ", ".join(f"{v} {k}" if k != "memory" else v for k, v in throughput_parts(found, what).items())


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

    def _say(
        self,
        what: str,
        batch: int,
        total: float,
        metrics: Mapping[str, Any],
        always: bool = False,
        speed: Callable[[], str] | None = None,
    ) -> None:
        now = time.monotonic()
        if not self._enabled or now - self._last < (min(1.0, self.seconds) if always else self.seconds):
            return
        self._last = now
        of = f"/{int(total)}" if total != float("inf") else ""
        line = " ".join([what, f"batch {batch}{of}", *numbers(scalars(metrics, latest=True))])
        print(line + (speed() if speed else ""), flush=True)

    def _epoch(self, trainer: Trainer) -> str:
        last = f"/{trainer.max_epochs}" if trainer.max_epochs not in (None, -1) else ""
        return f"epoch {trainer.current_epoch + 1}{last}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1 == self.total_train_batches
        metrics = self.get_metrics(trainer, pl_module)
        self._say(
            self._epoch(trainer), batch_idx + 1, self.total_train_batches, metrics, done, lambda: _speed(trainer, batch)
        )

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
