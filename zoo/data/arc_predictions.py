"""Answers to ARC tasks: folders of predicted grids, Kaggle's file, and pictures of grids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo import files
from zoo.data.arc_world import Grid
from zoo.errors import ZooError
from zoo.metrics.arc import two_answers

# The benchmark's own colours, then background and border.
PALETTE = (
    (0, 0, 0), (0, 116, 217), (255, 65, 54), (46, 204, 64), (255, 220, 0), (170, 170, 170), (240, 18, 190),
    (255, 133, 27), (127, 219, 255), (135, 12, 37), (255, 255, 255), (90, 90, 90),
)  # fmt: skip


def by_test(runs: Sequence[Sequence[Sequence[Grid]]]) -> list[list[Grid]]:
    """The grids for each test of a task, those of all runs together, run after run."""
    return [[grid for grids in some for grid in grids] for some in zip(*runs, strict=True)]


class Predictions:
    """A folder of grids predicted in several runs, ``attempt_<run>/<task>_predictions.json``: {test: [grid, ...]}, the
    layout of VARC's published predictions. Files are written whole or not at all."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def _path(self, task: str, run: int | str) -> str:
        return f"attempt_{run}/{task}_predictions.json"

    def claim(self, settings: Mapping[str, Any], write: bool = True) -> None:
        """Note the `settings` that decide the predictions, if `write`.

        Raises:
            ZooError: the folder holds predictions of other settings.
        """
        path, given = self.folder / "settings.json", json.loads(json.dumps(settings, default=str))
        if path.is_file():
            kept = json.loads(path.read_text())
            if changed := sorted(key for key in {**kept, **given} if kept.get(key) != given.get(key)):
                raise ZooError(
                    f"{self.folder} holds predictions of other settings ({', '.join(changed[:4])}); give another"
                    " model.work_dir, or remove it"
                )
        elif write:
            files.write_json(path, given, indent=None)

    def read(self, task: str, run: int) -> list[list[Grid]] | None:
        """The grids for each test of a task in a run; None where there are none."""
        path = self.folder / self._path(task, run)
        return _read(path) if path.is_file() else None

    def write(self, task: str, run: int, grids: Sequence[Sequence[Grid]]) -> None:
        content = {str(test): [grid.tolist() for grid in some] for test, some in enumerate(grids)}
        files.write_json(self.folder / self._path(task, run), content, indent=None)

    def runs(self, task: str) -> list[list[list[Grid]]]:
        """The grids of all runs of a task.

        Raises:
            ZooError: there are none.
        """
        paths = sorted(self.folder.glob(self._path(task, "*")))
        if not paths:
            raise ZooError(f"{self.folder} has no {self._path(task, '*')}")
        return [_read(path) for path in paths]

    def submit(self) -> None:
        """Writes ``submission.json``, Kaggle's file, of every task of the first run: the two answers of all runs."""
        names = [path.name for path in sorted(self.folder.glob(self._path("*", 0)))]
        tasks = [name.removesuffix("_predictions.json") for name in names]
        answers = {task: [two_answers(grids) for grids in by_test(self.runs(task))] for task in tasks}
        files.write_json(self.folder / "submission.json", answers, indent=None)


def _read(path: Path) -> list[list[Grid]]:
    """The grids of a file, by test; an empty grid, [], is (0, 0)."""
    content = json.loads(path.read_text())
    tests = sorted((key for key in content if key.isdigit()), key=int)
    return [
        [np.array(rows, dtype=np.int64).reshape(len(rows), len(rows[0]) if rows else 0) for rows in content[key]]
        for key in tests
    ]


def draw_grids(rows: Sequence[Sequence[Grid | None]], cell: int = 10) -> Tensor:
    """A uint8 sheet (3, H, W) of grids in the benchmark's colours, a row of them each; None leaves a gap."""
    palette = np.array(PALETTE, np.uint8)
    gap, ground = 2 * cell, 238
    tiles = [[np.zeros((1, 1), np.int64) if grid is None or not grid.size else grid for grid in row] for row in rows]
    widths = [max(row[column].shape[1] for row in tiles) for column in range(len(tiles[0]))]
    heights = [max(grid.shape[0] for grid in row) for row in tiles]
    shape = (sum(heights) * cell + gap * (len(rows) + 1), sum(widths) * cell + gap * (len(widths) + 1), 3)
    sheet = np.full(shape, ground, np.uint8)
    top = gap
    for row, given, height in zip(tiles, rows, heights, strict=True):
        left = gap
        for grid, original, width in zip(row, given, widths, strict=True):
            if original is not None and original.size:
                picture = palette[grid].repeat(cell, 0).repeat(cell, 1)
                picture[::cell] = picture[:, ::cell] = 70  # lines between the cells
                sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
            left += width * cell + gap
        top += height * cell + gap
    return torch.from_numpy(sheet).permute(2, 0, 1).contiguous()
