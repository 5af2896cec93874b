"""ARC's protocol: scores of runs and of their common vote, folders of predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest

from zoo.data import ARCTaskDataModule
from zoo.data.arc import ARCTask
from zoo.errors import ZooError
from zoo.training import Optim
from zoo.training.arc import ARCProtocol

NAMES = ["evaluation_000_recolor", "evaluation_001_keep"]


class Guesses(ARCProtocol):
    """The right grid comes first in run 0, and last and outvoted in run 1."""

    def __init__(self, folder: Path, runs: int = 2, others: list[str] | None = None, kind: str = "a") -> None:
        super().__init__(Optim(lr=1.0), runs, str(folder), others)
        self.kind, self.solved = kind, list[tuple[str, int]]()

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def solve(self, task: ARCTask, run: int) -> list[list[np.ndarray]]:
        self.solved.append((task.name, run))
        wrong, other = np.full((1, 31), 1), np.zeros((0, 0), dtype=np.int64)
        orders = [[pair.output, wrong, other] if run == 0 else [wrong, wrong, pair.output] for pair in task.test]
        return [[np.asarray(grid) for grid in grids] for grids in orders]


def run(stage: str, module: ARCProtocol) -> Any:
    data = ARCTaskDataModule(image_size=12, options={"tasks": 2, "max_side": 5, "test_pairs": 2})
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet)
    return trainer.test(module, data, verbose=False)[0] if stage == "test" else getattr(trainer, stage)(module, data)


def test_the_protocol_scores_resumes_and_votes_with_others(tmp_path: Path) -> None:
    module = Guesses(tmp_path / "a")
    scores = run("test", module)
    assert module.solved == [(name, number) for name in NAMES for number in (0, 1)]
    assert scores == {
        "test/pass_at_1": 0.5,
        "test/pass_at_2": 1.0,
        "test/oracle": 1.0,
        "test/single_view": 0.5,
        "test/ensemble_pass_at_1": 0.0,
        "test/ensemble_pass_at_2": 1.0,
        "test/ensemble_oracle": 1.0,
    }
    answers = json.loads((tmp_path / "a" / "submission.json").read_text())
    assert {name: len(tests) for name, tests in answers.items()} == dict.fromkeys(NAMES, 2)
    assert answers[NAMES[0]][0]["attempt_1"] == [[1] * 31]
    # a lost one is done again, the finished ones are not
    (tmp_path / "a" / "attempt_1" / f"{NAMES[1]}_predictions.json").unlink()
    module = Guesses(tmp_path / "a")
    assert run("test", module) == scores
    assert module.solved == [(NAMES[1], 1)]
    with pytest.raises(ZooError, match=r"other settings \(kind\)"):
        run("test", Guesses(tmp_path / "a", kind="b"))
    # predictions of others vote, alone too
    voted = run("test", Guesses(tmp_path / "b", runs=0, others=[str(tmp_path / "a")]))
    assert voted == {key: value for key, value in scores.items() if "ensemble" in key}
    with pytest.raises(ZooError, match=r"has no attempt_\*"):
        run("test", Guesses(tmp_path / "c", others=[str(tmp_path)]))
    found = run("predict", Guesses(tmp_path / "a"))
    assert [{part["name"]: part["answers"]} for (part,) in found] == [{name: answers[name]} for name in NAMES]
    with pytest.raises(ZooError, match="zoo test"):
        run("fit", Guesses(tmp_path / "a"))
