"""The tasks of ARC: grids predicted on canvases, and the benchmark's protocol of two answers a test."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.data.arc import BACKGROUND, ARCTask, PseudoTask, Views, read_grid
from zoo.data.arc_predictions import Predictions, by_test, draw_grids
from zoo.errors import ZooError
from zoo.metrics.arc import ARCScore, pixel_scores, two_answers, vote
from zoo.training.base import BaseModule
from zoo.training.optim import Optim

Grids = list[list[np.ndarray]]  # by test of a task
_NO_FIT = "there is nothing to fit: run `zoo test RECIPE`, which solves each task by itself"


def _seen(module: BaseModule, score: ARCScore) -> bool:
    """Whether any process has scored a test: there may be no random views, and no answer may be known."""
    return module.trainer.strategy.reduce_boolean_decision(bool(score.updates), all=False)


def uncached_autocast(kind: str) -> torch.autocast:
    """The autocast around us without its cache: weights change between steps, the casts that it keeps would not."""
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


@torch.no_grad()
def predict_views(
    network: nn.Module,
    pseudos: Sequence[PseudoTask],
    views: Views,
    rng: random.Random,
    attempts: int,
    batch_size: int = 64,
) -> Grids:
    """For every test of a task, the grids that `network` sees, in the original task's terms: in `attempts` random views
    of each pseudo-task, attempt after attempt as VARC's code orders them; the order settles equal votes.

    A view is drawn as in training: so that the output fits, too, where the task holds it.
    """
    jobs = [
        (number, test, pair, views.draw(pair, rng))
        for _ in range(attempts)
        for number, pseudo in enumerate(pseudos)
        for test, pair in enumerate(pseudo.task.test)
    ]
    device = next(network.parameters()).device
    found: Grids = [[] for _ in pseudos[0].task.test]
    network.eval()
    for first in range(0, len(jobs), batch_size):
        numbers, tests, pairs, drawn = zip(*jobs[first : first + batch_size], strict=True)
        batch = views.place(pairs, drawn, device)
        with uncached_autocast(device.type):
            logits = network(batch["image"], torch.tensor(numbers, device=device), batch["mask"])
        canvases = logits.argmax(dim=1).cpu().numpy()
        for canvas, number, test, view in zip(canvases, numbers, tests, drawn, strict=True):
            found[test].append(read_grid(canvas, view, pseudos[number].suffix, pseudos[number].color_map))
    return found


class CanvasPrediction(BaseModule):
    """Grids on canvases, classified pixel by pixel, validated on the tasks' own tests. A method adds its training step.

    Batches are those of :class:`zoo.data.arc.CanvasSet`. Logs `val/exact_match`: all scored pixels of the fixed view
    right; `val/pixel_accuracy`; `val/loss`, cross-entropy. In test also `test/pass_at_1`, `pass_at_2` and `oracle` of
    the vote over the random views, where the data module gives any (`test_views`).

    Args:
        network: of canvases (B, S, S), tasks (B,) and masks (B, S, S), to logits (B, K, S, S).
        optim: optimiser and schedule.
    """

    monitor = ("val/exact_match", "max")
    batch_keys: Sequence[str] = ("image", "task", "mask", "target")

    def __init__(self, network: nn.Module, optim: Optim) -> None:
        super().__init__(optim)
        self.network: Any = network
        self.score = ARCScore()

    def trainable(self) -> nn.Module:
        return self.network

    def _evaluate(self, logits: Tensor, target: Tensor, split: str) -> None:
        exact, accuracy, scored = pixel_scores(logits, target, BACKGROUND)
        if scored:  # else no answer is known
            self.tally(f"{split}/exact_match", exact)
            self.tally(f"{split}/pixel_accuracy", accuracy, scored)
            self.tally(f"{split}/loss", cross_entropy(logits.float(), target, ignore_index=BACKGROUND), scored)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        logits = self.network(batch["image"], batch["task"], batch["mask"])
        self._evaluate(logits, batch["target"], "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        image, mask, target, task = batch["image"], batch["mask"], batch["target"], batch["task"]
        if image.ndim == 3:
            self._evaluate(self.network(image, task, mask), target, "test")
            return
        views = image.shape[1]
        logits = self.network(image.flatten(0, 1), task.repeat_interleave(views), mask.flatten(0, 1))
        logits = logits.unflatten(0, (-1, views))
        self._evaluate(logits[:, 0], target[:, 0], "test")
        seen = logits.argmax(dim=2).cpu().numpy()
        for canvases, pair, some, weight in zip(seen, batch["pair"], batch["view"], batch["weight"], strict=True):
            if pair.output is not None:
                grids = [read_grid(canvas, view) for canvas, view in zip(canvases[1:], some[1:], strict=True)]
                self.score.update(grids, pair.output, float(weight))

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if _seen(self, self.score):
            self.log_dict({f"test/{name}": value for name, value in self.score.compute().items()})
            self.score.reset()

    def _decoded(self, batch: Mapping[str, Any]) -> list[np.ndarray]:
        canvases = self.network(batch["image"], batch["task"], batch["mask"]).argmax(dim=1).cpu().numpy()
        return [read_grid(canvas, view) for canvas, view in zip(canvases, batch["view"], strict=True)]

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """For each test: number of the `task`, grids of the `input`, the `prediction`, and the `answer` or None."""
        return [
            {
                "task": int(task),
                "input": pair.input.tolist(),
                "prediction": grid.tolist(),
                "answer": None if pair.output is None else pair.output.tolist(),
            }
            for task, pair, grid in zip(batch["task"], batch["pair"], self._decoded(batch), strict=True)
        ]

    def picture(self, batch: Mapping[str, Any]) -> Tensor:
        """A uint8 sheet (3, H, W): a row a pair; columns input, prediction, answer."""
        rows = [(pair.input, grid, pair.output) for pair, grid in zip(batch["pair"], self._decoded(batch), strict=True)]
        return draw_grids(rows)


class ARCProtocol(BaseModule):
    """The benchmark's protocol: every task of the test loader is solved by itself, in `runs` runs, whose grids vote.

    It runs by `zoo test`. The grids of every task and run are kept in `work_dir`
    (:class:`zoo.data.arc_predictions.Predictions`): a run that was stopped goes on behind the last finished one.

    Logs the mean over runs of `test/pass_at_1`, `test/pass_at_2`, `test/oracle`, and `test/single_view` (pass@1 of the
    first grid alone); with several runs or `votes_with` also `test/ensemble_...`, of the common vote.
    Where no answer is known, nothing. `work_dir/submission.json` holds the two answers in Kaggle's form.

    A method gives :meth:`solve` and :meth:`settings`.

    Args:
        optim: optimiser and schedule.
        runs: independent solutions of every task; 0 lets `votes_with` vote alone.
        work_dir: where predictions are kept.
        votes_with: further folders that hold attempt_*/*_predictions.json, to vote with.
    """

    batch_keys: Sequence[str] = ("arc_task",)
    stages = ("test", "predict")

    def __init__(self, optim: Optim, runs: int, work_dir: str, votes_with: Sequence[str] | None) -> None:
        super().__init__(optim)
        self.runs, self.kept = runs, Predictions(work_dir)
        self.votes_with = [Predictions(folder) for folder in votes_with or ()]
        self.scores = nn.ModuleList(ARCScore() for _ in range(runs))
        self.single, self.ensemble = ARCScore(), ARCScore()

    def solve(self, task: ARCTask, run: int) -> Grids:
        """The grids that one run predicts for each test of a task."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """All that decides a prediction but the task and the run."""
        raise NotImplementedError

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        raise ZooError(_NO_FIT)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            raise ZooError(
                "test-time training needs no fit: run `zoo test RECIPE`, which trains on each task by itself"
            )
        if self.runs:
            self.kept.claim(self.settings(), write=self.trainer.is_global_zero)

    def _others(self, task: ARCTask) -> list[Grids]:
        return [run for folder in self.votes_with for run in folder.runs(task.name)]

    def _runs(self, task: ARCTask) -> list[Grids]:
        found = []
        for run in range(self.runs):
            grids = self.kept.read(task.name, run)
            if grids is None:
                grids = self.solve(task, run)
                self.kept.write(task.name, run, grids)
            found.append(grids)
        return found

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        for task in batch["arc_task"]:
            others, runs = self._others(task), self._runs(task)
            for test, (pair, together) in enumerate(zip(task.test, by_test([*others, *runs]), strict=True)):
                if pair.output is None:
                    continue
                weight = 1 / len(task.test)
                for score, grids in zip(self.scores, runs, strict=True):
                    score.update(grids[test], pair.output, weight)  # type: ignore[operator]
                    self.single.update(grids[test][:1], pair.output, weight)
                self.ensemble.update(together, pair.output, weight)
            if self.trainer.world_size == 1 and (seen := float(self.ensemble.weight)):
                solved = float(self.ensemble.hits[1])
                print(f"{task.name}: {solved:g} of {seen:g} tasks so far with two answers", flush=True)

    def on_test_epoch_end(self) -> None:
        mean: dict[str, Tensor] = {}
        known = _seen(self, self.ensemble)
        if self.runs and known:
            each = [score.compute() for score in self.scores]  # type: ignore[operator]
            mean = {f"test/{name}": torch.stack([one[name] for one in each]).mean() for name in each[0]}
            mean["test/single_view"] = self.single.compute()["pass_at_1"]
        if known and (self.runs > 1 or self.votes_with):
            mean |= {f"test/ensemble_{name}": value for name, value in self.ensemble.compute().items()}
        for score in (*self.scores, self.single, self.ensemble):
            score.reset()
        self.log_dict(mean)
        self.trainer.strategy.barrier()
        if self.runs and self.trainer.is_global_zero:
            self.kept.submit()

    def _voting(self, task: ARCTask) -> Grids:
        return by_test([*self._others(task), *self._runs(task)])

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """For each task its `name` and the two `answers` to each test, {"attempt_1", "attempt_2"}."""
        tasks = batch["arc_task"]
        return [{"name": task.name, "answers": [two_answers(some) for some in self._voting(task)]} for task in tasks]

    def picture(self, batch: Mapping[str, Any]) -> Tensor:
        """A uint8 sheet (3, H, W): a row a test; columns input, first and second answer, the answer's grid."""
        rows = []
        for task in batch["arc_task"]:
            for pair, grids in zip(task.test, self._voting(task), strict=True):
                ranked = [grid for grid, _ in vote(grids)]
                rows.append((pair.input, ranked[0], ranked[1] if len(ranked) > 1 else None, pair.output))
        return draw_grids(rows)
