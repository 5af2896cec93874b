"""What every pocket recipe keeps to, whatever its paper: found by name, nothing is named here.

:class:`Recipe` shrinks a recipe by options that all of them have. What one paper alone promises is tested in its own
file.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import zoo
from tests.processes import in_processes
from zoo import catalog
from zoo.data.loader import EpochSampler
from zoo.errors import ZooError
from zoo.machine import OF_THE_MACHINE
from zoo.training import EMA
from zoo.weights import export

POCKETS = catalog.list_recipes("*/pocket*")
EPOCHS, STEPS, BATCH = 2, 2, 4


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


class Recipe:
    """A recipe made small: module, data module and trainer."""

    def __init__(self, name: str, folder: Path, steps: int = STEPS, **options: Any) -> None:
        content = yaml.safe_load(catalog.recipe_path(name).read_text())
        known = inspect.signature(_class(content["data"]["class_path"])).parameters
        small = {"batch_size": BATCH, "eval_batch_size": 3, "train_samples": 8 * BATCH, "num_workers": 0}
        given: dict[str, Any] = {f"data.{key}": value for key, value in small.items() if key in known}
        if "batch_size" in known:
            given["model.optim.global_batch"] = None
        given |= {f"trainer.limit_{split}_batches": 2 for split in ("val", "test", "predict")}
        given |= {"trainer.limit_train_batches": steps, "trainer.max_epochs": EPOCHS, "trainer.accelerator": "cpu"}
        given |= {"trainer.num_sanity_val_steps": 0, "trainer.check_val_every_n_epoch": 1, "trainer.logger": False}
        given |= {"trainer.enable_progress_bar": False, "trainer.default_root_dir": str(folder)}
        given |= {key.replace("__", "."): value for key, value in options.items()}
        self.name = name
        self.module, self.data, self.trainer = zoo.load_recipe(name, given)
        self.trainer.callbacks = [c for c in self.trainer.callbacks if not isinstance(c, ModelCheckpoint)]
        for callback in self.trainer.callbacks:
            for what, much in (("num_samples", 12), ("count", 4), ("epochs", 2)):
                if hasattr(callback, what):
                    setattr(callback, what, much)

    def leave_out(self, *methods: str) -> None:
        """The callbacks that have one of these methods: probes "run", measures of samples "evaluate"."""
        kept = [c for c in self.trainer.callbacks if not any(callable(getattr(c, m, None)) for m in methods)]
        self.trainer.callbacks = kept

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(getattr(self.module, "stages", ("fit", "validate", "test", "predict")))

    def run(self, stage: str, **options: Any) -> Any:
        return getattr(self.trainer, stage)(self.module, datamodule=self.data, **options)

    def scores(self) -> dict[str, float]:
        """The numbers of validation and test."""
        found: dict[str, float] = {}
        for stage in ("validate", "test"):
            if stage in self.stages:
                found |= {key: float(value) for key, value in self.run(stage, verbose=False)[0].items()}
        return found


class Diary(L.Callback):
    """The losses of all batches, and the gradients of all updates."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        named = module.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def _state(recipe: Recipe) -> dict[str, Any]:
    """All that the rest of a run depends on, as a checkpoint holds it."""
    path = Path(recipe.trainer.default_root_dir) / "state.ckpt"
    recipe.trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)
    return {key: state[key] for key in state if key not in ("loops", "callbacks", "hyper_parameters")}


def _same(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two trees of tensors and plain values differ by a bit."""
    if isinstance(a, Tensor):
        return [] if isinstance(b, Tensor) and a.equal(b) else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if not str(key).startswith(OF_THE_MACHINE)]
        return [at for key in keys for at in _same(a.get(key), b.get(key), f"{place}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [at for n, (x, y) in enumerate(zip(a, b, strict=True)) for at in _same(x, y, f"{place}/{n}")]
    return [] if a == b or (a != a and b != b) else [place]


def _initial_loss(name: str) -> Any:
    card = catalog.paper(name.partition("/")[0])
    return card.initial_loss.get(name.partition("/")[2])


@pytest.mark.parametrize("name", POCKETS)
def test_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients reach every parameter, a checkpoint inside an epoch goes on to the same state, evaluation and
    prediction run, and the network can be exported."""
    monkeypatch.chdir(tmp_path)
    whole, diary = Recipe(name, tmp_path), Diary()
    if "fit" not in whole.stages:
        with pytest.raises(ZooError, match="zoo test"):
            whole.run("fit")
    else:
        saved = tmp_path / "inside.ckpt"
        every = {"every_n_train_steps": STEPS + 1, "save_top_k": -1, "dirpath": tmp_path, "filename": "inside"}
        whole.trainer.callbacks += [diary, ModelCheckpoint(**every)]
        whole.run("fit")
        reached = {key for some in diary.gradients for key, value in some.items() if bool(value.any())}
        trained = {key for key, p in whole.module.named_parameters() if p.requires_grad}
        assert len(diary.gradients) == EPOCHS * STEPS
        assert trained - reached == set()
        assert all(math.isfinite(loss) for loss in diary.losses)
        if (theory := _initial_loss(name)) is not None:
            assert diary.losses[0] == pytest.approx(theory.value, abs=theory.tolerance), theory.because
        resumed, rest = Recipe(name, tmp_path), Diary()
        resumed.trainer.callbacks += [rest, ModelCheckpoint(**every)]
        resumed.run("fit", ckpt_path=str(saved))
        assert rest.losses == diary.losses[STEPS + 1 :]
        assert _same(_state(resumed), _state(whole)) == []
    scores = whole.scores()
    assert any(math.isfinite(value) for value in scores.values()), scores
    assert len(whole.run("predict")) == 2
    _is_exported(whole)


def _is_exported(recipe: Recipe) -> None:
    """torch.export takes what `zoo export` writes of its network, with any number of samples."""
    network, size = recipe.module.network.float(), getattr(recipe.data, "image_size", None)
    chosen = {"size": size if isinstance(size, int) else 64, "refused": recipe.module.not_exported}
    if recipe.module.not_exported and not hasattr(network, "export_part"):
        with pytest.raises(ZooError, match="cannot be exported"):
            export.subject(network, **chosen)
        return
    subject = export.subject(network, **chosen)
    program = export.trace(subject, subject.make(2), dynamic=True).module()
    for count in (1, 3):
        inputs = subject.make(count)
        torch.testing.assert_close(program(**inputs), subject.module(**inputs))


class Dealt(EpochSampler):
    """Deals whole batches in turn: so many processes see in a step what one sees that accumulates as many batches."""

    def __iter__(self) -> Iterator[Any]:
        world, rank, self.num_replicas, self.rank = self.num_replicas, self.rank, 1, 0
        share, self.num_samples, first, self.first = self.num_samples, self.length, self.first, 0
        keys = list(super().__iter__())
        self.num_replicas, self.rank, self.num_samples, self.first = world, rank, share, first
        batches = [keys[n : n + BATCH] for n in range(0, len(keys), BATCH)]
        return iter([key for batch in batches[rank::world] for key in batch])


def _in_one_of(world: int, name: str) -> dict[str, Any]:
    """What one of so many processes finds: scores, and gradients and weights of two updates, each of two batches."""
    updates = 2
    options: dict[str, Any] = {"trainer__precision": "32-true", "trainer__max_epochs": 1}
    if world > 1:
        options |= {"trainer__devices": world, "trainer__strategy": "ddp"}
    else:
        options |= {"trainer__accumulate_grad_batches": 2}
    recipe = Recipe(name, Path.cwd(), steps=updates * 2 // world, **options)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the start, where much is 0
        for p in recipe.module.parameters():
            p += 0.02 * torch.randn(p.shape, generator=draw)
    limit, recipe.trainer.limit_train_batches = recipe.trainer.limit_train_batches, STEPS
    found: dict[str, Any] = {"scores": recipe.scores()}
    recipe.trainer.limit_train_batches = limit
    meets = getattr(recipe.module, "meets", False)
    if "fit" not in recipe.stages or (meets and world == 1):
        return found
    data, diary = recipe.data, Diary()
    data.train_sampler = lambda samples: Dealt(len(samples), data.seed, data.repeats, **data._place())
    recipe.trainer.limit_val_batches = 0
    recipe.leave_out("run")
    recipe.trainer.callbacks.append(diary)
    recipe.run("fit")
    assert len(diary.gradients) == updates
    weights = {key: p.detach() for key, p in recipe.module.named_parameters()}
    averages = [dict(c.weights) for c in recipe.trainer.callbacks if isinstance(c, EMA)]
    return found | {"gradients": diary.gradients, "weights": [weights, *averages], "meets": meets}


@pytest.mark.parametrize("name", POCKETS)
def test_two_processes_are_one(name: str, tmp_path: Path) -> None:
    """The same scores; the same gradients, weights and averages, or where samples of both meet in the loss, weights
    that agree."""
    for folder in ("one", "two"):  # what is kept between runs must not be
        (tmp_path / folder).mkdir()
    with chdir(tmp_path / "one"):
        one = _in_one_of(1, name)
    with chdir(tmp_path / "two"):
        first, second = in_processes(2, _in_one_of, 2, name)
    for scores in (first["scores"], second["scores"]):
        assert scores == pytest.approx(one["scores"], rel=1e-4, abs=1e-6, nan_ok=True)
    if "weights" not in first:
        return
    assert _same(first["weights"], second["weights"]) == []
    if not first["meets"]:
        torch.testing.assert_close(first["gradients"], one["gradients"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-5, atol=1e-8)


def _loaded(samples: Any, batches: list[list[int]], change: Callable[[Any], Any] = lambda batch: batch) -> DataLoader:
    return DataLoader(samples, batch_sampler=batches, collate_fn=change)


@pytest.mark.parametrize("name", POCKETS)
def test_batches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores depend neither on the order of samples nor on a last batch of one; what is missing or not finite is told
    in one line."""
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(name, tmp_path, trainer__precision="32-true")
    recipe.leave_out("run", "evaluate")
    data, trainer, found = recipe.data, recipe.trainer, []
    for stage, split in (("validate", "val"), ("test", "test")):
        if stage not in recipe.stages:
            continue
        data.setup(stage)
        samples = data.samples(split)
        count = min(len(samples), 7 if "fit" in recipe.stages else 3)
        for batches in ([[0, 1, 2], [3, 4, 5], [6]], [[5, 3, 6, 1], [4, 0, 2]]):
            batches = [kept for batch in batches if (kept := [n for n in batch if n < count])]
            monkeypatch.setattr(data, f"{split}_dataloader", lambda s=samples, b=batches: _loaded(s, b))
            setattr(trainer, f"limit_{split}_batches", 1.0)
            found.append({k: float(v) for k, v in recipe.run(stage, verbose=False)[0].items()})
        assert found[-1] == pytest.approx(found[-2], rel=1e-4, abs=1e-6, nan_ok=True), stage
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    if "fit" not in recipe.stages:
        return
    data.setup("fit")
    samples = data.samples("train")
    keys = list(range(BATCH))
    trainer.limit_val_batches = 0
    whole = samples.__getitems__(keys)

    def fit(change: Callable[[Any], Any], keys: list[int] = keys) -> str:
        trainer.fit_loop.epoch_progress.reset()
        monkeypatch.setattr(data, "train_dataloader", lambda: _loaded(samples, [keys], change))
        try:
            recipe.run("fit")
        except ZooError as error:
            return str(error)
        return ""

    told = {key: fit(lambda batch, key=key: {k: v for k, v in batch.items() if k != key}) for key in whole}
    assert any(told.values()), f"no key of {list(whole)} is wanted"
    for key, line in told.items():
        assert not line or (re.search(rf"\b{key}\b", line) and "\n" not in line)
    assert type(recipe.module).__name__ in fit(lambda batch: list(batch.items()))
    assert "\n" not in fit(lambda batch: batch, keys[:1])
    image = next(key for key in ("image", "views", "video", *whole) if key in whole)

    def poisoned(batch: Any) -> Any:
        spoil = lambda x: [spoil(y) for y in x] if isinstance(x, list) else torch.full_like(x, math.nan)  # noqa: E731
        return {**batch, image: spoil(batch[image])} if torch.is_floating_point(_first(batch[image])) else batch

    line = fit(poisoned)
    if torch.is_floating_point(_first(whole[image])):
        assert "not finite" in line, line


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value
