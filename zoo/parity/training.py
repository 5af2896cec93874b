"""Cases of whole runs: several optimiser steps on given batches, by Lightning's trainer, recorded under their names.

What the case asks for is found by the name of the output:

- ``loss``: of every micro-batch, not divided by the accumulation; ``loss:PART`` and any other name: what
  ``training_step`` returns or logs (without ``train/``) under it, or `values` says; ``NAME_3`` and ``NAME_step3``: the
  fourth entry of such a series.
- ``lr``: at every optimiser step, of the parameters whose rate is not scaled; ``lr_group_I``; ``weight_decay_per_group``;
  ``weight_decay_by_sorted_name`` and ``lr_factor_by_sorted_name`` of what trains, by official names; ``groups``, their
  number. Where the config's ``group_first_parameter`` names one parameter a group, these are the groups of those.
- ``grad_norm_before_clipping``: the global L2 norm at every optimiser step, over the parameters of the one that steps.
- ``param:KEY``, ``buffer:KEY``, ``ema:KEY``, any ``KIND:KEY``: the entry KEY of the official state after the last step;
  ``grad:KEY``: its gradient at the last step, before clipping. An average has the KIND, or the first part of the KEY,
  as its name.
"""  # noqa: E501

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.parity.cases import Case, Convert, Official, dtype_of, filled_inputs, filled_state, gradients, load_filled
from zoo.training.base import batch_length
from zoo.training.ema import EMA

_PRECISION: dict[str, Any] = {
    "float64": "64-true",
    "float32": "32-true",
    "bfloat16": "bf16-true",
    "float16": "16-true",
}
_NUMBERED = re.compile(r"(.+?)_(?:step)?(\d+)")
Batch = Callable[[dict[str, Tensor], int], Any]


def batch_inputs(case: Case) -> list[dict[str, Tensor]]:
    """The inputs ``NAME_K`` of a case, for every K = 0, 1, ... by NAME.

    Raises:
        ZooError: there are none, or a number is left out.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in filled_inputs(case).items():
        if match := _NUMBERED.fullmatch(name):
            found.setdefault(int(match[2]), {})[match[1]] = value
    if sorted(found) != list(range(len(found))) or not found:
        raise ZooError(f"a run's inputs are called NAME_0, NAME_1, ...; the case numbers {sorted(found)}")
    return [found[k] for k in range(len(found))]


def train(
    case: Case,
    task: L.LightningModule,
    convert: Convert,
    batches: Mapping[str, str] | Batch,
    *,
    network: nn.Module | None = None,
    epochs: int | Sequence[int] | None = None,
    averages: Mapping[str, EMA] | None = None,
    values: Mapping[str, str | Callable[[], Any]] | None = None,
    after: Callable[[], Mapping[str, Tensor]] | None = None,
    also: Iterable[L.Callback] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """Trains a task as a case says, and gives the outputs that the case asks for.

    The config's ``train`` may say ``iterations`` (micro-batches; else as many as there are inputs), ``iters_per_epoch``
    (else all are one epoch), ``epochs`` and ``batch_size`` (else that of the first batch).

    Args:
        case: the case.
        task: a fresh one.
        convert: from the official state dict to the network's.
        batches: what a batch of ours calls the inputs of one step; or makes a batch of them and the step's number.
        network: the part of the task whose official state the case holds; default `task.network`.
        epochs: how many the schedule spans; or, from 0, those that are run, one after another, as if the run had been
            resumed at each. Default: the config's.
        averages: of the weights, by the KIND of output or by the prefix of their own entries in the state, from which
            they are filled then; else they begin as copies of the network.
        values: a series by another name: the name under which the task returns or logs it, or a function that is called
            after every micro-batch.
        after: further outputs, once the run is over; called in eval mode, without gradients.
        also: further callbacks.
        options: further ones of the trainer, such as `accumulate_grad_batches`.

    Raises:
        ZooError: the case has fewer batches than it runs, or keys differ.
    """
    facts = case["config"].get("train", {})
    given = batch_inputs(case)
    count = facts.get("iterations", len(given))
    if count > len(given):
        raise ZooError(f"the case runs {count} iterations and has {len(given)} batches")
    make: Batch = batches if callable(batches) else _renamed(batches)
    made = [make(inputs, k) for k, inputs in enumerate(given[:count])]
    spans = facts.get("epochs", 1) if epochs is None else epochs
    visited = None if isinstance(spans, int) else list(spans)
    total = spans if isinstance(spans, int) else max(spans) + 1

    network = task.network if network is None else network  # type: ignore[assignment]
    assert isinstance(network, nn.Module)
    averages = averages or {}
    state = case["state"]
    sets = {name: _only(case, {key for key in state if key.startswith(f"{name}.")}) for name in averages}
    raw = _only(case, state.keys() - {key for part in sets.values() for key in part["state"]})
    load_filled(network, raw, convert)
    prefix = next(f"{name}." if name else "" for name, part in task.named_modules() if part is network)
    for name, part in sets.items():
        averages[name].start(task)
        if part["state"]:
            averages[name].weights |= {prefix + key: value for key, value in convert(filled_state(part)).items()}

    per_epoch = facts.get("iters_per_epoch", count)
    record = _Record(count, case, values or {}, network, visited, per_epoch)
    trainer = L.Trainer(
        accelerator=torch.device(case.get("device", "cpu")).type,
        devices=1,
        precision=_PRECISION[case.get("dtype", "float64")],
        max_epochs=total,
        callbacks=[record, *averages.values(), *also],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(task, datamodule=_Batches(made, per_epoch, facts.get("batch_size") or batch_length(made[0])))
    task.to(case.get("device", "cpu"), dtype_of(case)).eval()

    official = Official(raw, convert)
    outputs = record.outputs(trainer, official)
    for output in case["outputs"]:
        kind, _, name = output.partition(":")
        if not name or kind == "loss":
            continue
        average = kind if kind in averages else name.partition(".")[0]
        if kind == "grad":
            tensors, view = record.gradients, official
        elif average in averages and kind not in ("param", "buffer"):
            weights = averages[average].weights
            tensors = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            view = Official(sets[average], convert) if sets[average]["state"] else official
        else:
            tensors, view = network.state_dict(), official
        value = view.take(name, tensors) if name in view.names else None
        if value is not None:
            outputs[output] = value.clone()
    if after is not None:
        with torch.no_grad():
            outputs |= after()
    return outputs


def _renamed(names: Mapping[str, str]) -> Batch:
    def batch(inputs: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        if odd := inputs.keys() - names.keys():
            raise ZooError(f"inputs of step {k} that no batch holds: {', '.join(sorted(odd))}")
        return {names[name]: value for name, value in inputs.items()}

    return batch


def _only(case: Case, keys: set[str]) -> Case:
    return {**case, "state": {key: entry for key, entry in case["state"].items() if key in keys}}


class _Batches(L.LightningDataModule):
    """Batches in order, so many to an epoch."""

    def __init__(self, batches: list[Any], per_epoch: int, batch_size: int) -> None:
        super().__init__()
        self.batches, self.per_epoch, self.batch_size = batches, per_epoch, batch_size

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[Any]:
        first = self.trainer.current_epoch * self.per_epoch  # type: ignore[union-attr]
        yield from self.batches[first : first + self.per_epoch]

    def train_dataloader(self) -> _Batches:
        return self


class _Record(L.Callback):
    """Keeps what the case asks for, puts epochs where it has them, and ends the run after so many micro-batches."""

    def __init__(
        self,
        count: int,
        case: Case,
        values: Mapping[str, str | Callable[[], Any]],
        network: nn.Module,
        visited: list[int] | None,
        per_epoch: int,
    ) -> None:
        self.count, self.case, self.values, self.network = count, case, values, network
        self.visited, self.per_epoch = visited, per_epoch
        self.series: dict[str, list[Any]] = defaultdict(list)
        self.rates: dict[int, list[list[float]]] = defaultdict(list)  # of each optimiser's groups at its steps
        self.norms: dict[int, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.seen = 0

    def _asks(self, beginning: str) -> bool:
        return any(name.startswith(beginning) for name in self.case["outputs"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.visited is None:
            return
        windows = math.ceil(self.per_epoch / trainer.accumulate_grad_batches)
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            scheduler.last_epoch = self.visited[trainer.current_epoch] * windows - 1
            scheduler.step()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._asks("grad_norm_before_clipping"):
            return
        for i, optimizer in enumerate(trainer.optimizers):
            parts = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if parts:
                self.norms[i] = torch.stack([part.norm() for part in parts]).norm()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        index = next(i for i, one in enumerate(trainer.optimizers) if one is optimizer)
        self.rates[index].append([group["lr"] for group in optimizer.param_groups])
        if index in self.norms:
            self.series["grad_norm_before_clipping"].append(self.norms[index])
        if self._asks("grad:"):
            self.gradients |= {name: value.clone() for name, value in gradients(self.network).items()}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        found = dict(outputs) if isinstance(outputs, Mapping) else {"loss": outputs}
        if pl_module.automatic_optimization and found.get("loss") is not None:
            found["loss"] = found["loss"] * trainer.accumulate_grad_batches
        logged = {name.removeprefix("train/"): value for name, value in trainer.callback_metrics.items()}
        found = {**logged, **found, **{name: value() for name, value in self.values.items() if callable(value)}}
        for name, value in found.items():
            if value is not None:
                self.series[name].append(torch.as_tensor(value).detach().clone())
        self.seen += 1
        trainer.should_stop = self.seen >= self.count

    def outputs(self, trainer: L.Trainer, official: Official) -> dict[str, Tensor]:
        """What the run itself says of the case's outputs."""
        groups = [(i, j) for i, one in enumerate(trainer.optimizers) for j in range(len(one.param_groups))]
        of = {(i, j): trainer.optimizers[i].param_groups[j] for i, j in groups}
        place = {id(p): at for at in groups for p in of[at]["params"]}
        parameters = dict(self.network.named_parameters())
        trained = {
            name: place[id(parameters[ours])]
            for name in sorted(official.names)
            if (ours := official.find(name)) in parameters and id(parameters[ours]) in place
        }
        firsts = self.case["config"].get("group_first_parameter")
        order = groups if firsts is None else [trained[name] for name in firsts]

        def rate(at: tuple[int, int]) -> list[float]:
            return [rates[at[1]] for rates in self.rates[at[0]]]

        plain = next((at for at in groups if of[at].get("lr_scale", 1.0) == 1.0), groups[0])
        self.series |= {"lr": rate(plain), **{f"lr_group_{k}": rate(at) for k, at in enumerate(order)}}
        self.series["weight_decay_per_group"] = [of[at]["weight_decay"] for at in order]
        self.series["weight_decay_by_sorted_name"] = [of[at]["weight_decay"] for at in trained.values()]
        self.series["lr_factor_by_sorted_name"] = [of[at].get("lr_scale", 1.0) for at in trained.values()]
        self.series["groups"] = [len(groups)]
        found = {}
        for output in self.case["outputs"]:
            value = self._series(output)
            if value is not None:
                found[output] = value
        return found

    def _series(self, output: str) -> Tensor | None:
        name = self.values.get(output, output.removeprefix("loss:"))
        name = name if isinstance(name, str) else output
        if name in self.series:
            return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in self.series[name]])
        match = _NUMBERED.fullmatch(name)
        if match and len(self.series.get(match[1], [])) > int(match[2]):
            return torch.as_tensor(self.series[match[1]][int(match[2])])
        return None
