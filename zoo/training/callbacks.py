"""Callbacks: times and throughput, the non-finite guard, pictures, precise statistics of batch normalisation."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from zoo import files
from zoo.errors import ZooError, unknown
from zoo.machine import peak_memory
from zoo.nn.batchnorm import BATCH_NORMS
from zoo.training.base import batch_length, seed_position
from zoo.training.ema import evaluation_weights


@dataclass(frozen=True)
class Throughput:
    """How fast training goes: `samples_per_s` over all processes, the `waiting` share of the time that goes by until
    the next batch is there, `seconds_left` of the run (None: it has no end) and the peak memory in MiB (None: not
    known here)."""

    samples_per_s: float
    waiting: float
    seconds_left: float | None
    peak_mib: float | None


class Timing(L.Callback):
    """Logs an epoch's `time/data` and `time/compute`, seconds that the loop waited for batches and spent on them;
    `speed/samples_per_s`, the samples of all processes over both; and `memory/peak_mib`, the most memory that the first
    process has held so far, of its GPU or else of the machine.

    As the host sees it: on a GPU the queue hides compute behind the next wait. Validation and the writing of
    checkpoints count in neither. A sample is a picture, a clip, a pair: an entry of a batch.
    """

    def __init__(self) -> None:
        self._data = self._compute = 0.0
        self._samples = 0
        self._begin = self._started = self._waited = 0.0
        self._idle: float | None = None
        self._batches = 0
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=50)  # waited, computed, samples

    def state_dict(self) -> dict[str, Any]:
        return {"data": self._data, "compute": self._compute, "samples": self._samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._data, self._compute = state_dict["data"], state_dict["compute"]
        self._samples = state_dict.get("samples", 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches, self._started = 0, time.monotonic()
        self._recent.clear()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._data = self._compute = 0.0
        self._samples = 0
        self._idle = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begin = time.perf_counter()
        self._waited = 0.0 if self._idle is None else self._begin - self._idle
        self._data += self._waited

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._idle = time.perf_counter()
        computed, samples = self._idle - self._begin, batch_length(batch) * trainer.world_size
        self._compute += computed
        self._samples += samples
        self._batches += 1
        self._recent.append((self._waited, computed, samples))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._idle = time.perf_counter()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._idle = None  # the next wait would count the writing

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = {"time/data": self._data, "time/compute": self._compute}
        if (seconds := self._data + self._compute) > 0:
            found["speed/samples_per_s"] = self._samples / seconds
        if (peak := peak_memory(pl_module.device)) is not None:
            found["memory/peak_mib"] = peak / 2**20
        pl_module.log_dict(found)

    def throughput(self, trainer: L.Trainer) -> Throughput | None:
        """Of the last fifty batches; None before the first one's end."""
        waited, computed, samples = (sum(one[k] for one in self._recent) for k in range(3))
        if not samples or waited + computed <= 0:
            return None
        left, peak = _batches_left(trainer), peak_memory(trainer.strategy.root_device)
        spent = time.monotonic() - self._started  # with validation and checkpoints, which come again
        return Throughput(
            samples / (waited + computed),
            waited / (waited + computed),
            None if left is None else left * spent / max(1, self._batches),
            None if peak is None else peak / 2**20,
        )


def _batches_left(trainer: L.Trainer) -> float | None:
    """Training batches that are still to come; None where the run has no end."""
    found: list[float] = []
    if trainer.max_steps not in (None, -1):
        found.append(float((trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches))
    per_epoch = trainer.num_training_batches
    if trainer.max_epochs not in (None, -1) and per_epoch != float("inf"):
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        found.append((trainer.max_epochs - trainer.current_epoch) * per_epoch - done)
    return max(0, min(found)) if found else None


class NonFiniteGuard(L.Callback):
    """Stops the run with a clear message when the loss is not finite, before a checkpoint can hold broken weights.

    A loss is noted on its device and looked at every `every_n_steps` micro-batches, at every checkpoint and at the end
    of an epoch, so that the device is not waited for at each step. Under several processes all stop together.

    Args:
        every_n_steps: micro-batches between two looks; default 1 on CPU, 50 on an accelerator.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ZooError(f"every_n_steps must be 1 or more, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._first_bad: Tensor | None = None  # optimiser step of the first non-finite loss, -1 for none
        self._count = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_bad, self._count = torch.tensor(-1, device=pl_module.device), 0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert self._first_bad is not None
        fresh = (self._first_bad < 0) & ~torch.isfinite(loss.detach()).all()
        self._first_bad = torch.where(fresh, trainer.global_step, self._first_bad)
        self._count += 1
        if self._count % (self.every_n_steps or (1 if loss.device.type == "cpu" else 50)) == 0:
            self.check(trainer)

    def check(self, trainer: L.Trainer) -> None:
        """Raises ZooError where a loss was not finite; call on every process."""
        if self._first_bad is None:
            return
        step = int(self._first_bad)
        if trainer.strategy.reduce_boolean_decision(step < 0, all=True):
            return
        where = f"at step {step}" if step >= 0 else "in another process"
        kept = trainer.checkpoint_callbacks
        paths = [getattr(one, name, "") for name in ("last_model_path", "best_model_path") for one in kept]
        path = next(filter(None, paths), "")
        raise ZooError(
            f"the loss is not finite {where} (epoch {trainer.current_epoch}); lower model.optim.base_lr, clip gradients"
            f" (trainer.gradient_clip_val) or use a wider trainer.precision; last good checkpoint: {path or 'none yet'}"
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check(trainer)


class Pictures(L.Callback):
    """Writes what the task draws of a few samples to <run>/pictures/*.png and prints the path: validation samples when
    training ends, those that are predicted in `zoo predict`.

    The task gives `picture(batch) -> uint8 (3, H, W)`.

    Args:
        out: the folder; default <log folder of the run>/pictures.
        count: samples shown.
        every_n_epochs: also draw during training, after every so many epochs.
    """

    def __init__(self, out: str | None = None, count: int = 8, every_n_epochs: int | None = None) -> None:
        if count < 1 or (every_n_epochs is not None and every_n_epochs < 1):
            raise ZooError("pictures want count and every_n_epochs of 1 or more")
        self.out, self.count, self.every_n_epochs = out, count, every_n_epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.draw(trainer, pl_module)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.draw(trainer, pl_module, "predict")

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str = "val") -> Path | None:
        """Draws and writes one picture; its path, on the first process. Call on every process."""
        # Imported here: torchvision and the probe's loader are wanted by runs with pictures only.
        from torchvision.io import write_png

        from zoo.training.probe import _loader

        folder = self.out or str(Path(trainer.log_dir or ".") / "pictures")  # log_dir is a collective call
        path = None
        if trainer.is_global_zero:
            if not callable(getattr(pl_module, "picture", None)):
                raise ZooError(f"{type(pl_module).__name__} draws no pictures: it has no method picture(batch)")
            batch = _first(next(iter(_loader(trainer, split))), self.count)
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), pl_module.device)
            seed_position(0)
            with (
                evaluation_weights(trainer, pl_module),
                torch.inference_mode(),
                trainer.precision_plugin.forward_context(),
            ):
                picture = pl_module.picture(batch)  # type: ignore[operator]
            path = Path(folder) / f"{type(pl_module).__name__}_step{trainer.global_step:07d}.png"
            with files.replacing(path) as part:
                write_png(picture.cpu(), str(part))
            print(f"picture: {path}", flush=True)
        trainer.strategy.barrier()
        return path


def _first(batch: Any, count: int) -> Any:
    """The first `count` samples of a batch: of its tensors, and of its lists of anything but tensors."""
    if isinstance(batch, Mapping):
        return {key: _first(value, count) for key, value in batch.items()}
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):  # several views
        return [_first(value, count) for value in batch]
    if isinstance(batch, list | tuple) or (isinstance(batch, Tensor) and batch.ndim):
        return batch[:count]
    return batch


class Freeze(L.Callback):
    """Trains some parts of a task's network only: all the others take no gradient and stay in evaluation mode, so that
    no running statistic of theirs moves.

    Args:
        but: the names of the parts that train, such as "head" or "roi_heads.box_predictor".

    Raises:
        ZooError: the network has no part of one of these names.
    """

    def __init__(self, but: list[str]) -> None:
        if not but:
            raise ZooError("Freeze wants the names of the parts that train")
        self.but = list(but)

    def _trains(self, name: str) -> bool:
        return any(f"{name}.".startswith(f"{part}.") for part in self.but)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        network = pl_module.get_submodule("network")
        known = [name for name, _ in network.named_modules()]
        if wrong := [part for part in self.but if part not in known]:
            raise unknown(f"part of {type(network).__name__}", wrong[0], known)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(self._trains(name) and parameter.requires_grad)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for name, part in pl_module.get_submodule("network").named_modules():
            inside = any(f"{kept}.".startswith(f"{name}.") for kept in self.but) or not name
            if part.training and not self._trains(name) and not inside:
                part.eval()


class PreciseBN(L.Callback):
    """Re-estimates the running statistics of batch normalisation with the weights held still, before each validation
    and at the end of the run (Wu & Johnson 2021, "Rethinking Batch in BatchNorm"): mean and variance over so many
    training batches together, instead of an average that trails behind moving weights.

    The task gives `statistics_pass(batch)`, which takes a batch through the network in training mode, or
    `predict_logits(batch)`. Under several processes each goes through its own share, and all take the statistics of
    everything. A layer counts the places that it sees: a head whose regions are few counts them only, and one that sees
    nothing at all keeps what it had. The statistics stay after the evaluation; random numbers are those of a run
    without the callback.

    Args:
        num_batches: training batches of each process, or as many as an epoch has.
    """

    def __init__(self, num_batches: int = 200) -> None:
        if num_batches < 1:
            raise ZooError(f"num_batches must be 1 or more, not {num_batches}")
        self.num_batches = num_batches
        self._done_at = -1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.estimate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs and self._done_at != trainer.global_step:
            self.estimate(trainer, pl_module)

    def estimate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do it now; call on every process."""
        norms = [m for m in pl_module.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
        if not norms or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        forward = next(
            (f for name in ("statistics_pass", "predict_logits") if callable(f := getattr(pl_module, name, None))), None
        )
        if forward is None:
            raise ZooError(
                f"{type(pl_module).__name__} has neither statistics_pass(batch) nor predict_logits(batch), one of which"
                " PreciseBN wants"
            )
        self._done_at = trainer.global_step
        modes = [(module, module.training) for module in pl_module.modules()]
        counts = [norm.num_batches_tracked.clone() for norm in norms]  # type: ignore[union-attr]
        sums = [torch.zeros(3, norm.num_features, dtype=torch.float64, device=pl_module.device) for norm in norms]
        kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]  # type: ignore[union-attr]

        def add(place: int, x: Tensor) -> None:
            if count := x.numel() // x.shape[1]:
                wide = x.to(torch.promote_types(x.dtype, torch.float32))
                var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
                var, mean = var.double(), mean.double()
                sums[place] += count * torch.stack([torch.ones_like(mean), mean, var + mean**2])

        hooks = []
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
                pl_module.train()
                for place, norm in enumerate(norms):
                    hooks.append(norm.register_forward_pre_hook(lambda _, x, place=place: add(place, x[0])))
                self._pass(trainer, pl_module, forward)
                for norm, count, before, total in zip(norms, counts, kept, sums, strict=True):
                    total = trainer.strategy.reduce(total, reduce_op="sum")
                    weight, mean, square = total.unbind()
                    mean, square = mean / weight, square / weight
                    seen = bool(weight[0])
                    norm.running_mean.copy_(mean if seen else before[0])  # type: ignore[union-attr]
                    norm.running_var.copy_(square - mean**2 if seen else before[1])  # type: ignore[union-attr]
                    norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes:
                module.training = mode

    def _pass(self, trainer: L.Trainer, pl_module: L.LightningModule, forward: Callable[[Any], Any]) -> None:
        """The first training batches of the epoch through the network."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        loader: Any = data.train_dataloader() if data is not None else trainer.train_dataloader
        if callable(getattr(getattr(loader, "sampler", None), "set_epoch", None)):
            loader.sampler.set_epoch(trainer.current_epoch)
        for batch in itertools.islice(loader, self.num_batches):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.strategy.batch_to_device(batch, pl_module.device)
            with trainer.precision_plugin.forward_context():
                forward(batch)


def default_callbacks() -> list[L.Callback]:
    """The callbacks of every run."""
    return [Timing(), NonFiniteGuard()]
