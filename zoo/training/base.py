"""The base of every task: the optimiser from its declaration, pinned randomness, logging, safe checkpoints."""

from __future__ import annotations

import dataclasses
import os
import random
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from zoo.data.base import SeededDataModule
from zoo.data.shapes import hash64
from zoo.errors import ZooError
from zoo.machine import versions
from zoo.ops.collective import gather, gather_objects
from zoo.training.checkpoints import settle, take_up
from zoo.training.optim import Optim, build
from zoo.training.sharding import shard

# Lightning says of every run with a data module that the hooks which read batches are the module's own.
warnings.filterwarnings("ignore", message="You have overridden `on_(before|after)_batch_transfer` in `LightningModule`")


def seed_position(*position: int) -> None:
    """Seeds `random`, numpy and torch (all devices) from a position such as (seed, epoch, batch, rank)."""
    words = np.random.SeedSequence(position).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


def _seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def batch_length(batch: Any) -> int:
    """The number of samples of a batch: the first axis of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, Tensor | Mapping | list | tuple):
            return batch_length(value)
    return 1


class Batch(dict):
    """A batch by keys; one that is missing is named in one line."""

    def __init__(self, entries: Mapping[str, Any], reader: str = "the task", place: str = "a batch") -> None:
        super().__init__(entries)
        self.reader, self.place = reader, place

    def __missing__(self, key: str) -> Any:
        has = ", ".join(map(str, self)) or "no key"
        raise ZooError(f"{self.reader} wants {key!r} in {self.place}, which has {has}")


def read_batch(batch: Any, reader: str, keys: Sequence[str]) -> Batch:
    """A batch as a :class:`Batch`. Pictures (B, C, H, W) alone, and (pictures, labels (B,)), as torchvision's data sets
    give them, are taken as `image` and `label`; videos (B, C, T, H, W) as `video`.

    Args:
        batch: as the loader gives it.
        reader, keys: who wants which keys, for the message.

    Raises:
        ZooError: anything else that is not a mapping.
    """
    if isinstance(batch, Batch) and batch.reader == reader:
        return batch
    if isinstance(batch, Mapping):
        nested = {
            key: [Batch(one, reader, f"{key} of a batch") if isinstance(one, Mapping) else one for one in value]
            for key, value in batch.items()
            if isinstance(value, list) and any(isinstance(one, Mapping) for one in value)
        }
        return Batch({**batch, **nested}, reader)
    parts = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, list | tuple) else []
    kinds = {4: "image", 5: "video"}
    if parts and isinstance(parts[0], Tensor) and (name := kinds.get(parts[0].ndim)):
        x, *rest = parts
        if not rest:
            return Batch({name: x}, reader)
        label = rest[0]
        whole = isinstance(label, Tensor) and label.shape == x.shape[:1] and not label.is_floating_point()
        if len(rest) == 1 and whole:
            return Batch({name: x, "label": label}, reader)
    inside = ", ".join(type(part).__name__ for part in parts)
    raise ZooError(
        f"{reader} reads batches that are dicts with keys such as {', '.join(keys)}, or (image, label); got a"
        f" {type(batch).__name__}{f' of {inside}' if inside else ''}"
    )


class BaseModule(L.LightningModule):
    """A LightningModule with the house's optimiser, seeds and logs; a task adds its network and its steps.

    - Before every batch all random generators are seeded from (seed, epoch, update, batch of the update), the seed
      being that of `seed_everything`: a step is a pure function of its position, so a resumed run repeats the
      uninterrupted one. Evaluation batches are seeded without the epoch, so that two epochs are compared on the same
      draws; and what :meth:`draws` gives there depends on the sample alone, not on the batch or the process it is in.
    - :meth:`tally` takes the values of an evaluation's samples; their means are logged when it ends, the same for any
      number of processes.
    - With `batch_keys`, batches are read by :func:`read_batch`: a key that a step misses is named.
    - `train/loss` and `train/lr` are logged from what `training_step` returns.
    - A checkpoint with non-finite weights is refused, and holds plain types only (it loads with weights_only=True);
      `zoo_task` names the task's class, `zoo_model` says what a user of the weights must know (:meth:`model_facts`).

    - A task with an attribute `init_from` starts from the weights named there, which it loads in :meth:`load_initial`.

    - The sums behind the training metrics that are logged with ``on_epoch=True`` are kept here and saved, so that a run
      resumed inside an epoch logs the means of the whole epoch.

    A subclass that overrides one of the hooks below calls super.

    Args:
        optim: the declaration; a mapping of its fields will do.
    """

    def __init__(self, optim: Optim) -> None:
        super().__init__()
        self.optim = optim if isinstance(optim, Optim) else Optim(**optim)
        self._tallies: dict[str, Tensor] = {}
        self._means: dict[str, _Mean] = {}
        self._in_batch = False

    init_from: str | None = None

    # The name and the settings of the recipe that is run, in plain types; the command line sets it.
    recipe: Mapping[str, Any] | None = None

    # Keys of the batches that the task reads; without any it takes batches as they come.
    batch_keys: Sequence[str] = ()

    # What a trainer can do with the task.
    stages: Sequence[str] = ("fit", "validate", "test", "predict")

    # Why torch.export cannot take the network, where it cannot.
    not_exported: str = ""

    # Whether samples of several processes meet in the loss, as in contrastive learning. Where they do not, so many
    # processes compute what one computes that accumulates as many batches.
    meets: bool = False

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

    def configure_model(self) -> None:
        """Shards the task where the strategy has a mesh of devices (``--trainer.strategy fsdp2``)."""
        if self._trainer is not None and self.device_mesh is not None:
            shard(self, self.device_mesh["data_parallel"])

    def trainable(self) -> nn.Module:
        """The module whose parameters are optimised; its names are those that layer decay and exclusions see."""
        return self

    def configure_optimizers(self) -> Any:
        return build(self.trainable(), self.optim, self.trainer)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return read_batch(batch, type(self).__name__, self.batch_keys) if self.batch_keys else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # on its way it may become a plain dict
        return self.on_before_batch_transfer(batch, dataloader_idx)

    def draws(self, batch: Mapping[str, Any], name: str, *shape: int, normal: bool = False) -> Tensor:
        """Random numbers (B, *shape) for the samples of a batch: uniform in [0, 1), or standard normal.

        Those that the batch pins under `name`; else in training fresh ones, and in evaluation a function of (seed,
        name, index of the sample) where the batch holds `index`.
        """
        if name in batch:
            return batch[name]
        draw, count = (torch.randn if normal else torch.rand), batch_length(batch)
        if self.training or "index" not in batch:
            return draw(count, *shape, device=self.device)
        generator = torch.Generator()
        rows = []
        for seed in hash64(_seed(), zlib.crc32(name.encode()), batch["index"].cpu().numpy()).tolist():
            generator.manual_seed(seed)
            rows.append(draw(shape, generator=generator, dtype=torch.float32))
        return torch.stack(rows).to(self.device)

    @torch.no_grad()
    def tally(self, name: str, values: Tensor, weights: Tensor | float = 1.0) -> None:
        """Takes `values` (any shape; one a sample, mostly) into the mean that is logged as `name` when the evaluation
        ends. A `weight` says how much a value counts, such as of how many samples it is the mean."""
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        values = values.to(wide)
        counts = torch.as_tensor(weights, dtype=wide, device=values.device).expand_as(values)
        sums = torch.stack([(values * counts).sum(), counts.sum()])
        self._tallies[name] = self._tallies[name] + sums if name in self._tallies else sums

    def _log_tallies(self) -> None:
        names = sorted({name for some in gather_objects(list(self._tallies)) for name in some})
        for name in names:  # of all processes: one without samples must join the others
            mine = self._tallies.get(name)
            mine = torch.zeros(2, dtype=torch.float64, device=self.device) if mine is None else mine
            total, count = gather(mine).view(-1, 2).sum(dim=0)
            self.log(name, (total / count).float(), prog_bar=name.startswith("val/"))
        self._tallies.clear()

    def on_validation_epoch_end(self) -> None:
        self._log_tallies()

    def on_test_epoch_end(self) -> None:
        self._log_tallies()

    def _seed_batch(self, stage: int, epoch: int, batch_idx: int, dataloader_idx: int = 0) -> None:
        step, place = batch_idx, self.global_rank
        if not stage and self._trainer is not None:
            # The batches of an update are numbered alike, be they of several processes or accumulated by one.
            step, place = divmod(batch_idx, self.trainer.accumulate_grad_batches)
            place = place * self.trainer.world_size + self.global_rank
        seed_position(_seed(), stage, epoch, step, place, dataloader_idx)
        if stage and not batch_idx and not dataloader_idx:
            self._tallies.clear()  # of an evaluation that was interrupted

    def configure_callbacks(self) -> list[L.Callback]:
        return [_Losses()]

    def on_train_epoch_start(self) -> None:
        self._means = {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._in_batch = True
        self._seed_batch(0, self.current_epoch, batch_idx)
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        moving = [group["lr"] for group in groups if not group.get("constant")]
        self.log("train/lr", max(moving, default=0.0), on_step=True, on_epoch=False, batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._in_batch = False

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's means, under the names that Lightning gives them."""
        for name, mean in self._means.items():
            value = mean.value(self.trainer)
            options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1}
            if mean.steps:
                super().log(name, value, logger=False, **options)
                name += "_epoch"
            super().log(name, value, prog_bar=mean.prog_bar, **options)

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """As in Lightning; means over a training epoch are :class:`BaseModule`'s own."""
        mean = options.get("on_epoch") and options.get("reduce_fx", "mean") == "mean" and options.get("logger", True)
        if not (self._in_batch and mean) or args or not isinstance(value, Tensor | float | int):
            super().log(name, value, *args, **options)
            return
        steps, sync = options.get("on_step") is not False, bool(options.get("sync_dist"))
        value = torch.as_tensor(value, device=self.device).detach()
        value = value if value.dtype == torch.float64 else value.float()
        kept = self._means.setdefault(name, _Mean(steps, sync, bool(options.get("prog_bar"))))
        kept.add(value, options.get("batch_size") or 1)
        if steps:
            options |= {"on_epoch": False, "on_step": True}
            super().log(f"{name}_step", value, **options)
            super().log(name, value, **options | {"logger": False, "prog_bar": False})

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._seed_batch(1, 0, batch_idx, dataloader_idx)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._seed_batch(2, 0, batch_idx, dataloader_idx)

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._seed_batch(3, 0, batch_idx, dataloader_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        broken = [name for name, value in checkpoint["state_dict"].items() if not _finite(value)]
        if broken:
            raise ZooError(
                f"non-finite weights at step {self.trainer.global_step} ({broken[0]}, {len(broken)} tensors in all);"
                " nothing was saved and the last good checkpoint is kept"
            )
        kind = next(
            one for one in type(self).__mro__ if not one.__module__.startswith("torch.")
        )  # a shard's is torch's
        checkpoint["zoo_task"] = f"{kind.__module__}.{kind.__qualname__}"
        checkpoint["zoo_model"] = _plain(self.model_facts())
        if self.trainer.state.fn == TrainerFn.FITTING:
            if "zoo_run" not in checkpoint:
                checkpoint["zoo_run"] = settle(self.trainer, checkpoint)
            if self._means:
                checkpoint["zoo_means"] = {name: mean.state(self.trainer) for name, mean in self._means.items()}
        for key in checkpoint:
            if key.endswith("hyper_parameters"):
                checkpoint[key] = _plain(checkpoint[key])

    def model_facts(self) -> dict[str, Any]:
        """What a checkpoint says beside its weights, so that it can be used as a model: {"classes", "preprocess",
        "data"} of the data module (:meth:`zoo.data.base.SeededDataModule.facts`), {"recipe", "versions"}."""
        data = getattr(self._trainer, "datamodule", None)
        facts = data.facts() if isinstance(data, SeededDataModule) else {}
        return {"classes": None, "preprocess": None, "data": None, **facts, "recipe": self.recipe} | {
            "versions": dict(versions())
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the sums of the epoch begun.

        Raises:
            ZooError: the checkpoint's weights are not of this network; one line names what differs.
        """
        if self._trainer is None:  # load_from_checkpoint
            return
        state: Any = checkpoint.get("state_dict")
        whole = not self.trainer.strategy.restore_checkpoint_after_setup  # else this process holds a part of them
        if self.strict_loading and whole and isinstance(state, Mapping):
            _refuse_other_weights(state, self.state_dict(), str(checkpoint.get("zoo_task", "")), self)
        if self.trainer.state.fn == TrainerFn.FITTING:
            take_up(self.trainer, checkpoint)
            means = checkpoint.get("zoo_means", {}).items()
            self._means = {name: _Mean.of(kept, self.trainer, self.device) for name, kept in means}


class _Losses(L.Callback):
    """Logs the loss of a batch before a checkpoint can be written behind it."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            return
        if pl_module.automatic_optimization:  # Lightning hands the loss back divided by the accumulation
            loss = loss * trainer.accumulate_grad_batches
        size = batch_length(batch)
        pl_module.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)


class _Mean:
    """A mean over an epoch, weighted by the sizes of the batches; each process keeps its own sums."""

    def __init__(self, steps: bool, sync: bool, prog_bar: bool) -> None:
        self.steps, self.sync, self.prog_bar = steps, sync, prog_bar
        self.sums: Tensor | None = None  # of the values, of the weights

    def add(self, value: Tensor, weight: int) -> None:
        fresh = torch.stack([value.mean() * weight, value.new_tensor(float(weight))])
        self.sums = fresh if self.sums is None else self.sums.to(fresh.device) + fresh

    def value(self, trainer: L.Trainer) -> Tensor:
        assert self.sums is not None
        # A reduction writes into what it is given, and the sums are this process's own.
        sums = trainer.strategy.reduce(self.sums.clone(), reduce_op="sum") if self.sync else self.sums
        total, weight = sums.unbind()
        return total / weight

    def state(self, trainer: L.Trainer) -> dict[str, Any]:
        """Call on every process."""
        assert self.sums is not None
        sums = trainer.strategy.all_gather(self.sums)
        facts = {"steps": self.steps, "sync": self.sync, "prog_bar": self.prog_bar}
        return {**facts, "sums": sums.reshape(-1, 2).tolist()}

    @classmethod
    def of(cls, state: Mapping[str, Any], trainer: L.Trainer, device: torch.device) -> _Mean:
        mean = cls(state["steps"], state["sync"], state["prog_bar"])
        sums = torch.tensor(state["sums"], device=device)
        if len(sums) != trainer.world_size:  # the first process takes the sums of all
            sums = torch.cat([sums.sum(0, keepdim=True), sums.new_zeros(trainer.world_size - 1, 2)])
        mean.sums = sums[trainer.global_rank]
        return mean


def _refuse_other_weights(
    state: Mapping[str, Any], own: Mapping[str, Any], task: str, module: L.LightningModule
) -> None:
    mine = f"{type(module).__module__}.{type(module).__qualname__}"
    other = f"; it is of {task.rpartition('.')[2]}, this of {type(module).__name__}" if task and task != mine else ""
    missing, odd = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or odd:
        name, where = (missing[0], "in the model only") if missing else (odd[0], "in the checkpoint only")
        raise ZooError(
            f"the checkpoint's weights are not of this model: {name!r} is {where}"
            f" ({len(missing)} and {len(odd)} such{other})"
        )
    for name, value in own.items():
        theirs = state[name]
        if isinstance(value, Tensor) and isinstance(theirs, Tensor) and value.shape != theirs.shape:
            raise ZooError(
                f"the checkpoint's weights are not of this model: {name!r} is {tuple(theirs.shape)} there and"
                f" {tuple(value.shape)} here{other}; give the options that it was trained with"
            )


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
