"""The score of the ARC benchmark: of two answers to each test, one must be right in every cell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.metrics.gathered import Gathered


def vote(grids: Iterable[np.ndarray]) -> list[tuple[np.ndarray, int]]:
    """The different grids (H, W) with the number of votes for each: most first, equals by first appearance."""
    ballots: dict[tuple[Any, bytes], tuple[np.ndarray, int]] = {}
    for grid in grids:
        grid = np.asarray(grid, dtype=np.int64)
        key = (grid.shape, grid.tobytes())
        ballots[key] = (grid, ballots.get(key, (grid, 0))[1] + 1)
    return sorted(ballots.values(), key=lambda ballot: -ballot[1])


def two_answers(grids: Iterable[np.ndarray]) -> dict[str, list[list[int]]]:
    """The two most voted grids in Kaggle's form, {"attempt_1", "attempt_2"}; the only one twice."""
    ranked = [grid.tolist() for grid, _ in vote(grids)]
    return {"attempt_1": ranked[0], "attempt_2": ranked[min(1, len(ranked) - 1)]}


def pixel_scores(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (B, K, S, S) for targets (B, S, S): whether all scored pixels are right (B,), the share of right ones
    over the batch, and the number of scored ones; pixels of `ignore_index` are not scored."""
    scored = target != ignore_index
    right = (logits.argmax(dim=1) == target) & scored
    exact = (right == scored).flatten(1).all(dim=1)
    return exact.float(), right.sum() / scored.sum().clamp_min(1), scored.sum()


class ARCScore(Gathered):
    """pass@1, pass@2 and the oracle over all voted grids, as fractions of the tasks.

    `update` takes the predicted grids for one test input. A task counts as one: each of its tests weighs 1 / their
    number. `compute` returns {"pass_at_1", "pass_at_2", "oracle"}; every process gives its share of the tests.
    """

    sample = "test"
    hits: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("hits", default=torch.zeros(3, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("weight", default=torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, grids: Iterable[np.ndarray], answer: np.ndarray, weight: float = 1.0) -> None:
        """Adds the grids predicted for a test input, its answer (H, W), and its weight."""
        self._count()
        ranked = [np.array_equal(grid, answer) for grid, _ in vote(grids)]
        hits = [any(ranked[:1]), any(ranked[:2]), any(ranked)]
        self.hits = self.hits + weight * torch.tensor(hits, dtype=torch.float32, device=self.hits.device)
        self.weight = self.weight + weight

    def compute(self) -> dict[str, Tensor]:
        self._require()
        scores = self.hits / self.weight.clamp_min(torch.finfo(torch.float32).tiny)
        return dict(zip(("pass_at_1", "pass_at_2", "oracle"), scores.unbind(), strict=True))
