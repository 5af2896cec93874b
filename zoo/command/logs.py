"""The logs of a run, whatever number of times it was stopped and resumed: metrics.csv and TensorBoard's events."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from zoo import files


class MetricsFile(Logger):
    """Every row that is logged, as CSV with a column for each metric.

    A run that is resumed goes on in its file: rows behind the point where it goes on are dropped, and what is logged
    once more there takes the place of what stood there.

    Args:
        path: the file.
        steps: rows of fewer steps are kept; None: the file begins anew.
    """

    def __init__(self, path: Path, steps: int | None = None) -> None:
        super().__init__()
        self.path = path
        self._steps = steps
        self._rows: dict[tuple[int, frozenset[str]], dict[str, Any]] = {}
        self._columns = ["step", "epoch"]
        self._written: int | None = None  # rows in the file; None: write it anew
        self._read = steps is None

    @property
    def name(self) -> str:
        return self.path.parent.parent.name

    @property
    def version(self) -> str:
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *arguments: Any, **options: Any) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._take_up()
        self._add({"step": step or 0, **metrics})

    def _add(self, row: dict[str, Any]) -> None:
        key = (int(row["step"]), frozenset(row))
        if key in self._rows:
            self._written = None
        self._rows[key] = row
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._written = None

    def _take_up(self) -> None:
        if self._read:
            return
        self._read = True
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return
        whole = text[: text.rfind("\n") + 1]  # a last line that was cut off has no end
        for row in csv.DictReader(io.StringIO(whole, newline="")):
            found = {name: value for name, value in row.items() if name and value}
            if (found.get("step") or "").isdecimal() and int(found["step"]) < (self._steps or 0):
                self._add(found)
        self._written = None

    @rank_zero_only
    def save(self) -> None:
        self._take_up()
        rows = list(self._rows.values())
        if self._written is None:
            with files.replacing(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
                self._write(file, rows, header=True)
        elif self._written < len(rows):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                self._write(file, rows[self._written :], header=False)
        self._written = len(rows)

    def _write(self, file: Any, rows: list[dict[str, Any]], header: bool) -> None:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self._columns, lineterminator="\n")
        if header:
            table.writeheader()
        table.writerows(rows)
        file.write(text.getvalue())

    def finalize(self, status: str) -> None:
        if self._rows:
            self.save()


class Events(TensorBoardLogger):
    """TensorBoard's events, whose end may come twice: Ctrl-C amid the closing of the file makes Lightning end it anew,
    and the writer, half closed, then refuses to flush."""

    def finalize(self, status: str) -> None:
        try:
            super().finalize(status)
        except OSError as error:
            if "closed" not in str(error):
                raise
