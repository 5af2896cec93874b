"""Exponential moving average of the weights, a second named set beside the raw ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from zoo.errors import ZooError, unknown
from zoo.training.optim import Optim, effective_batch
from zoo.training.sharding import is_sharded, share_like, whole

RAW = "raw"  # what the weights themselves are called where an average is chosen by name


class EMA(L.Callback):
    """Keeps ema <- decay * ema + (1 - decay) * weights after every optimiser step.

    Floating-point buffers (running statistics) are averaged with the parameters, other buffers are copied. The average
    of half-precision weights is kept in float32, where a small step does not vanish. A checkpoint holds the raw weights
    in `state_dict` and the averaged ones in `ema_state_dict`; a resumed run takes both up. For the strategies that keep
    whole weights on every device (one device, ddp).

    Several averages of one run are several of these callbacks with different `name`; the first with `evaluate` is used,
    or the one that :func:`choose_average` names (``--average NAME`` on the command line).

    Args:
        decay: in [0, 1).
        half_life: where given, the decay is that of :func:`half_life_decay`, in images, at every optimiser step;
            `decay` is not used then. The images of a step are those of the effective batch.
        ramp: of the half-life, see there.
        every_n_steps: optimiser steps between two updates.
        evaluate: validate, test and predict with the averaged weights; also those of a loaded checkpoint.
        per_step: `decay` is that of one optimiser step, so that an update takes decay ** every_n_steps.
        name: of the set of weights in a checkpoint, ``<name>_state_dict``.

    Attributes:
        weights: the averaged weights by name.
        steps: optimiser steps counted; an update comes where `every_n_steps` divides them.
    """

    def __init__(
        self,
        decay: float = 0.9999,
        every_n_steps: int = 1,
        evaluate: bool = True,
        per_step: bool = False,
        name: str = "ema",
        half_life: float | None = None,
        ramp: float | None = 0.05,
    ) -> None:
        if not 0 <= decay < 1 or every_n_steps < 1:
            raise ZooError(f"EMA wants 0 <= decay < 1 and every_n_steps >= 1, not {decay} and {every_n_steps}")
        if half_life is not None and (half_life <= 0 or (ramp is not None and ramp <= 0) or every_n_steps > 1):
            raise ZooError(
                f"EMA with a half-life wants it and its ramp positive and every_n_steps 1, not {half_life}, {ramp} and"
                f" {every_n_steps}"
            )
        if name == RAW or not name:
            raise ZooError(f"an average cannot be named {name!r}")
        self.decay, self.every_n_steps, self.evaluate, self.name = decay, every_n_steps, evaluate, name
        self.half_life, self.ramp = half_life, ramp
        self.batch = 0  # images of an optimiser step, for the half-life
        self.chosen: bool | None = None  # by choose_average: to evaluate with, or not; None: as `evaluate` says
        self.key = f"{name}_state_dict"
        self.weights: dict[str, Tensor] = {}
        self.steps = 0
        self._average = get_ema_multi_avg_fn(decay**every_n_steps if per_step else decay)
        self._seen = 0
        self._absent = False  # from the checkpoint that was loaded
        self._raw: dict[str, Tensor] | None = None  # the module's own weights while it holds the averaged ones

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen = trainer.global_step
        if self.half_life is not None:
            optim = getattr(pl_module, "optim", None)
            self.batch = effective_batch(optim if isinstance(optim, Optim) else Optim(), trainer)
        self.start(pl_module)

    def start(self, pl_module: L.LightningModule) -> None:
        """The average begins as a copy of the module's weights, unless it is there already."""
        if not self.weights:
            self.weights = {name: _wide(value.detach()).clone() for name, value in pl_module.state_dict().items()}
        self._to(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen = trainer.global_step
        self.start(pl_module)  # once more: sharded training takes checkpoints up after the fit's start

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen:  # still accumulating
            return
        self._seen = step
        self.step(pl_module)

    def step(self, pl_module: L.LightningModule) -> None:
        """Counts an optimiser step, and updates where one is due."""
        self.steps += 1
        if self.half_life is not None:
            self._average = get_ema_multi_avg_fn(half_life_decay(self.steps, self.half_life, self.batch, self.ramp))
        if self.steps % self.every_n_steps == 0:
            self.update(pl_module)

    @torch.no_grad()
    def update(self, pl_module: L.LightningModule) -> None:
        """Moves the average one step towards the module's weights."""
        groups: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
        for name, value in pl_module.state_dict().items():
            average = self.weights[name]
            if value.is_floating_point():
                averages, values = groups.setdefault((average.dtype, is_sharded(average)), ([], []))
                averages.append(average)
                values.append(value.detach().to(average.dtype))
            else:
                average.copy_(value)
        for averages, values in groups.values():
            self._average(averages, values, None)

    @contextmanager
    def applied(self, pl_module: L.LightningModule) -> Iterator[None]:
        """The module holds the averaged weights inside."""
        mine = self._swap_in(pl_module)
        try:
            yield
        finally:
            if mine:
                self._swap_out(pl_module)

    @torch.no_grad()
    def _swap_in(self, pl_module: L.LightningModule) -> bool:
        if self._raw is not None or not self.weights:
            return False
        self._to(pl_module)
        state = pl_module.state_dict()
        self._raw = {name: value.detach().clone() for name, value in state.items()}
        for name, value in state.items():
            value.copy_(self.weights[name])
        return True

    @torch.no_grad()
    def _swap_out(self, pl_module: L.LightningModule) -> None:
        if self._raw is not None:
            for name, value in pl_module.state_dict().items():
                value.copy_(self._raw[name])
            self._raw = None

    def _to(self, pl_module: L.LightningModule) -> None:
        state = pl_module.state_dict()
        if state.keys() != self.weights.keys():
            odd = sorted(state.keys() ^ self.weights.keys())
            raise ZooError(f"the averaged weights do not belong to this model: {odd[0]!r} is in one of them only")
        self.weights = {name: share_like(self.weights[name], value) for name, value in state.items()}

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _evaluated(trainer) is self:
            if self.chosen:
                self.require()
            self._swap_in(pl_module)

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_out(pl_module)

    on_validation_start = on_test_start = on_predict_start = _start
    on_validation_end = on_test_end = on_predict_end = _end

    def require(self) -> None:
        """Raises ZooError where a checkpoint was loaded that does not hold this average. Without a checkpoint it is yet
        to begin, as the weights themselves."""
        if self._absent:
            raise ZooError(f"there is no average {self.name!r}: the checkpoint holds none of this name")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._swap_out(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.weights:
            return
        checkpoint[self.key] = {name: whole(value) for name, value in self.weights.items()}
        checkpoint[f"{self.name}_steps"] = self.steps
        if self._raw is not None:  # saved from within an evaluation
            checkpoint["state_dict"] = dict(self._raw)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Checkpoints without the count were written when it was the trainer's.
        self.steps = int(checkpoint.get(f"{self.name}_steps", checkpoint.get("global_step", 0)))
        self._absent = self.key not in checkpoint
        if not self._absent:
            self.weights = {name: value.clone() for name, value in checkpoint[self.key].items()}
        else:
            self.weights = {}
            rank_zero_warn(f"the checkpoint holds no averaged weights ({self.key}); its raw weights are used")


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def half_life_decay(step: int, half_life: float, batch: int, ramp: float | None = 0.05) -> float:
    """The decay at which an average forgets half in so many images (Karras et al. 2022, arXiv 2206.00364; 2024,
    arXiv 2312.02696): 0.5 ** (batch / min(half_life, ramp * images so far)).

    Args:
        step: optimiser steps, this one included.
        half_life: in images.
        batch: images of a step.
        ramp: a half-life is at most this share of the run so far, so that early weights are forgotten; None: never.
    """
    images = half_life if ramp is None else min(half_life, step * batch * ramp)
    return 0.5 ** (batch / max(images, 1e-8))


def averages(callbacks: Iterable[Any]) -> list[EMA]:
    """The averages among callbacks."""
    return [callback for callback in callbacks if isinstance(callback, EMA)]


def check_average(callbacks: Iterable[Any], name: str) -> None:
    """Raises ZooError unless `name` is that of an average among callbacks, or "raw"."""
    known = [ema.name for ema in averages(callbacks)]
    if name not in (*known, RAW):
        raise unknown("average", str(name), (*known, RAW))


def choose_average(callbacks: Iterable[Any], name: str | None) -> None:
    """Evaluation takes the average of this name; of "raw", the weights themselves; of None, what the callbacks say.

    Raises:
        ZooError: there is no average of this name.
    """
    found = averages(callbacks)
    if name is not None:
        check_average(found, name)
    for ema in found:
        ema.chosen = None if name is None else ema.name == name


def _evaluated(trainer: L.Trainer) -> EMA | None:
    """The average that evaluation takes."""
    found = averages(trainer.callbacks)  # type: ignore[attr-defined]
    return next((ema for ema in found if (ema.evaluate if ema.chosen is None else ema.chosen)), None)


@contextmanager
def evaluation_weights(trainer: L.Trainer, pl_module: L.LightningModule, average: str | None = None) -> Iterator[None]:
    """The module as it is evaluated: with averaged weights where an :class:`EMA` callback says so, in eval mode.

    Args:
        trainer: whose callbacks the averages are.
        pl_module: the module.
        average: the name of another average than evaluation takes anyway, or "raw".

    Raises:
        ZooError: there is no average of this name, or none yet.
    """
    found = averages(trainer.callbacks)  # type: ignore[attr-defined]
    ema = _evaluated(trainer)
    if average is not None:
        check_average(found, average)
        ema = next((one for one in found if one.name == average), None)
        if ema is not None:
            ema.require()
    held = next((one for one in found if one._raw is not None and one is not ema), None)
    if held is not None:
        held._swap_out(pl_module)
    modes = {module: module.training for module in pl_module.modules()}
    pl_module.eval()
    try:
        if ema is None:
            yield
        else:
            with ema.applied(pl_module):
                yield
    finally:
        if held is not None:
            held._swap_in(pl_module)
        for module, mode in modes.items():
            module.training = mode
