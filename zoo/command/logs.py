"""The logs of a run, whatever number of times it was stopped and resumed: metrics.csv, and what ``--logger`` names:
TensorBoard's events, Weights & Biases, MLflow."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from zoo import files
from zoo.errors import MissingPackage, unknown

LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")


def check_loggers(names: Sequence[str]) -> None:
    """Raises a ZooError for a name that is none of `LOGGERS`, a MissingPackage for one whose package is not there."""
    for name in names:
        if name not in LOGGERS:
            raise unknown("logger", name, LOGGERS)
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise MissingPackage(f"--logger {name} wants the package {name}: pip install {name}")


def make_loggers(names: Sequence[str], folder: Path, recipe: str, steps: int | None = None) -> list[Logger]:
    """The loggers of a run in `folder`; metrics.csv is always among them.

    Args:
        names: of `LOGGERS`.
        recipe: the run's, by which W&B and MLflow group.
        steps: of a run that goes on: rows of fewer steps are kept, and what it has at W&B and MLflow goes on too.
    """
    found: list[Logger] = [MetricsFile(folder / "metrics.csv", steps)]
    if "tensorboard" in names:
        options: dict[str, Any] = {} if steps is None else {"purge_step": steps}
        found.insert(0, Events(str(folder.parent), name="", version=folder.name, **options))
    label = f"{recipe}/{folder.name}"
    if "wandb" in names:
        folder.mkdir(parents=True, exist_ok=True)
        found.append(
            WandbLogger(
                name=label,
                project=os.environ.get("WANDB_PROJECT", "zoo"),
                save_dir=str(folder),
                id=re.sub(r"[^\w-]", "-", label),
                resume="allow",
            )
        )
    if "mlflow" in names:
        found.append(MLflow(folder, recipe, label, goes_on=steps is not None))
    return found


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


class MLflow(MLFlowLogger):
    """MLflow's run of a run of ours: at ``MLFLOW_TRACKING_URI``, else in a database beside the runs; the note of its id
    in the run's folder lets it go on."""

    def __init__(self, folder: Path, recipe: str, label: str, goes_on: bool) -> None:
        self._note = folder / ".mlflow"
        known = self._note.read_text(encoding="utf-8").strip() if goes_on and self._note.is_file() else None
        root = folder.absolute().parents[len(Path(recipe).parts)]
        root.mkdir(parents=True, exist_ok=True)
        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
        artifacts = None if "MLFLOW_TRACKING_URI" in os.environ else (root / "mlartifacts").as_uri()
        super().__init__(recipe, label, where, run_id=known, artifact_location=artifacts)

    @rank_zero_only
    def save(self) -> None:
        if not self._note.is_file() and self.run_id is not None:
            files.write_text(self._note, f"{self.run_id}\n")


class Events(TensorBoardLogger):
    """TensorBoard's events, whose end may come twice: Ctrl-C amid the closing of the file makes Lightning end it anew,
    and the writer, half closed, then refuses to flush."""

    def finalize(self, status: str) -> None:
        try:
            super().finalize(status)
        except OSError as error:
            if "closed" not in str(error):
                raise
