"""Runs a declared claim: every arm and seed through its recipes, parts kept so that a killed run goes on.

A part is a stage of an arm at a seed. It is kept under a name made of all that decides it (the recipe's content, the
options, the seed, the part it starts from, versions): a finished one is not computed again, a changed one starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning as L
import torch
import yaml

import zoo
from zoo import catalog, files
from zoo.claims.declaration import OWN, Data, Declaration, Stage, evaluate, folder, names_in, read
from zoo.claims.intervals import judged
from zoo.errors import ZooError, unknown
from zoo.machine import environment

# One device, no files but the parts' own, no validation between the epochs.
_PLAIN = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.logger": False,
    "trainer.enable_checkpointing": False,
    "trainer.enable_progress_bar": False,
    "trainer.num_sanity_val_steps": 0,
    "trainer.check_val_every_n_epoch": 1_000_000,
}
_QUICK = {"trainer.limit_val_batches": 1, "trainer.limit_test_batches": 1}


# --------------------------------------------------------------------------------------------------------------- parts


class Diary(L.Callback):
    """The loss of every step, and the wall and processor seconds of every step after the first ten.

    Processor time is what the comparison of arms takes: other programs on the machine hardly touch it.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.processor: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        self.losses.append(float(loss) * trainer.accumulate_grad_batches)
        if len(self.losses) > min(10, trainer.max_steps // 2):
            self.seconds.append(time.perf_counter() - self._start[0])
            self.processor.append(time.process_time() - self._start[1])

    def loss_at(self, step: int) -> float | None:
        """Mean loss of the ten steps that end with `step` (from 1); None where the run was shorter."""
        return None if len(self.losses) < step else mean(self.losses[step - 10 : step])

    def numbers(self) -> dict[str, float | None]:
        """:data:`~zoo.claims.declaration.OWN`."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        found = (mean(last) if last else None, self.loss_at(100), self.loss_at(1000))
        times = (median(times) if times else None for times in (self.seconds, self.processor))
        return dict(zip(OWN, (*found, *times), strict=True))


@dataclass(frozen=True)
class Part:
    """A stage of an arm at a seed. `before` is the part whose checkpoint it starts from."""

    name: str
    stage: Stage
    options: dict[str, Any]
    seed: int
    threads: int
    before: Part | None

    @property
    def key(self) -> str:
        """Changes when anything does that decides the part's numbers."""
        facts = {
            "recipe": _content(self.stage.recipe),
            "options": self.options,
            "run": self.stage.run,
            "start": self.stage.start,
            "measure": self.stage.measure,
            "seed": self.seed,
            "threads": self.threads,
            "before": self.before.key if self.before else None,
            "versions": [zoo.__version__, torch.__version__],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def files(self, work: Path) -> tuple[Path, Path]:
        """The record and the checkpoint."""
        stem = f"{self.name}_{self.key}"
        return work / f"{stem}.json", work / f"{stem}.ckpt"


def _content(recipe: str) -> Any:
    """What a recipe, or a row with its options, says."""
    if catalog.is_row(recipe):
        row = catalog.row(recipe)[1]
        return [_content(row.recipe) if row.recipe else None, row.options]
    return yaml.safe_load(catalog.recipe_path(recipe).read_text(encoding="utf-8"))


def finished(part: Part, work: Path, keep: bool) -> dict[str, Any]:
    """The record of a part, computed unless it is kept: `metrics` by their own names, `seconds`, `steps`, `precision`.
    With `keep`, the checkpoint is written for a later part."""
    record_file, checkpoint = part.files(work)
    if record_file.is_file() and (checkpoint.is_file() or not keep):
        return json.loads(record_file.read_text(encoding="utf-8"))
    start = time.perf_counter(), time.process_time()
    record = _computed(part, work, checkpoint if keep else None)
    record["seconds"], record["processor_seconds"] = (
        time.perf_counter() - start[0],
        time.process_time() - start[1],
    )
    write(record, record_file)
    return record


def _computed(part: Part, work: Path, checkpoint: Path | None) -> dict[str, Any]:
    from zoo import load_recipe

    options, stage = dict(part.options), part.stage
    evaluated: dict[str, Any] = {}
    if part.before is not None:
        source = str(part.before.files(work)[1])
        if stage.start == "ckpt_path":
            evaluated["ckpt_path"] = source
        else:
            options[stage.start] = source
    with _silent():
        module, data, trainer = load_recipe(stage.recipe, {**options, "trainer.default_root_dir": str(work / "runs")})
    diary = Diary()
    trainer.callbacks.append(diary)  # type: ignore[attr-defined]
    logged: dict[str, float] = {}
    for command in stage.run:
        told = evaluated if command == "fit" else {**evaluated, "verbose": False}
        with _silent(), _interruptible(trainer):
            getattr(trainer, command)(module, datamodule=data, **told)
        logged |= {key: float(value) for key, value in trainer.callback_metrics.items()}
        if command == "fit":
            evaluated = {}  # what it has learnt counts from here on
    own = diary.numbers()
    metrics = {name: _found(logged, own, key, part) for name, key in stage.measure.items()}
    if checkpoint is not None:
        unfinished = checkpoint.with_suffix(".part")
        with _silent():
            trainer.save_checkpoint(unfinished)
        unfinished.replace(checkpoint)
    losses = {name: own[name] for name in OWN if name.startswith("loss_at") and "fit" in stage.run}
    return {
        "metrics": metrics,
        "losses": losses,
        "steps": trainer.global_step,
        "precision": str(trainer.precision),
        "logged": logged,
    }


def _found(logged: Mapping[str, float], own: Mapping[str, float | None], key: str, part: Part) -> float:
    """The number called `key`; of what Lightning keeps as `_step` and `_epoch`, the mean of the epoch."""
    for name in (key, f"{key}_epoch", f"{key}_step"):
        if name in logged:
            return logged[name]
    value = own.get(key)
    if value is None:
        if key in own:
            raise ZooError(f"{part.name}: {key} wants a longer training than {part.stage.recipe} had")
        raise unknown(f"metric of {part.name}", key, [*logged, *own])
    return value


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without announcements, warnings and printed lines, which a claim would repeat for every part."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _interruptible(trainer: L.Trainer) -> Iterator[None]:
    """Ctrl-C arrives as KeyboardInterrupt, which Lightning turns into an exit."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if trainer.state.status == "interrupted":
            raise KeyboardInterrupt from None
        raise
    finally:
        if signal.getsignal(signal.SIGINT) != before:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGINT, before)


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    files.write_json(path, record)


# ----------------------------------------------------------------------------------------------------------- the whole


def data_options(data: Data | None, dataset: str | None, data_dir: str | Path | None) -> dict[str, Any]:
    """The options that say what is trained on: `dataset` where it is given; else the claim's own set where it lies
    (`data_dir`, or shared/data beside the checkout), and where it does not, what stands in for it.

    Raises:
        ZooError: `data_dir` for a claim that names no data set, or one that is not there.
    """
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise ZooError(f"no folder {str(data_dir)!r}")
    place = {} if data_dir is None else {"data.data_dir": str(Path(data_dir).expanduser())}
    if data is None:
        if dataset is not None or data_dir is not None:
            raise ZooError("this claim's data is that of its recipes: it takes no --data and no --data_dir")
        return {}
    if dataset is not None and dataset == data.otherwise.get("data.dataset"):
        return dict(data.otherwise)
    if dataset not in (None, data.dataset):
        return {"data.dataset": dataset, **place}
    if not place and data.otherwise:
        beside = checkout().parent / "shared" / "data" / data.dataset
        if not beside.is_dir():
            if dataset is not None:
                raise ZooError(f"{dataset} is not beside the checkout: say where it lies, --data_dir FOLDER")
            return dict(data.otherwise)
        place = {"data.data_dir": str(beside)}
    return {"data.dataset": data.dataset, **place}


def checkout() -> Path:
    """The checkout, or the folder that the package is installed in."""
    return Path(zoo.__file__).resolve().parents[1]


def parts_of(
    claim: Declaration, arm: str, seed: int, options: Mapping[str, Any], quick: bool = False, threads: int = 1
) -> dict[str, Part]:
    """The parts of an arm at a seed by stage; `options` go to every recipe."""
    found: dict[str, Part] = {}
    for name, stage in claim.plan(arm, options).items():
        chosen = {**_PLAIN, **stage.options}
        if quick:
            steps = 0 if chosen.get("trainer.max_steps") == 0 else 2
            chosen |= {**_QUICK, "trainer.max_steps": steps, **stage.quick}
        if "trainer.max_steps" in chosen:
            chosen.setdefault("trainer.max_epochs", -1)
        label = f"seed{seed}_{arm}" + (f"_{name}" if claim.stages else "")
        before = found.get(stage.after) if stage.after else None
        found[name] = Part(label, stage, {**chosen, "seed_everything": seed}, seed, threads, before)
    return found


def run(
    paper: str,
    seeds: Sequence[int] | None = None,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    arms: Sequence[str] | None = None,
    quick: bool = False,
    pilot: bool = False,
    threads: int = 1,
    work: str | Path = "runs/claims",
    out: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> tuple[dict[str, Any], Path]:
    """Runs the paper's claim, or takes up a run where it stopped; its result and the file that holds it.

    Args:
        paper: whose claim.
        seeds: instead of the declared ones (of a pilot: of its pilot seeds).
        dataset, data_dir: what is trained on, see :func:`data_options`.
        arms: only these, and the sub-claims that want no other.
        quick: a few steps of everything, which tries the program and says nothing.
        pilot: explore settings on the pilot seeds.
        threads: of the process.
        work: where parts are kept.
        out: the result file. By default ``results/`` beside the declaration for a whole run in a checkout, else a file
            in `work`.
        say: takes a line for each part.

    Raises:
        ZooError: an unknown paper, arm or metric, a recipe or option that does not fit, no data.
    """
    claim = read(paper)
    if threads < 1:
        raise ZooError(f"--threads must be 1 or more, not {threads}")
    for arm in arms or ():
        if arm not in claim.arms:
            raise unknown("arm", arm, claim.arms)
    chosen = [arm for arm in claim.arms if arms is None or arm in arms]
    seeds = list(seeds) if seeds is not None else claim.pilot_seeds if pilot else claim.seed_list
    if len(set(seeds)) != max(1, len(seeds)):
        raise ZooError(f"the seeds must be one or more different numbers, not {list(seeds)}")
    options = data_options(claim.data, dataset, data_dir)
    place = Path(work) / paper
    before, position = torch.get_num_threads(), os.environ.get("PL_GLOBAL_SEED")
    torch.set_num_threads(threads)
    records: dict[str, list[dict[str, dict[str, Any]]]] = {arm: [] for arm in chosen}
    try:
        for seed in seeds:
            for arm in chosen:
                parts = parts_of(claim, arm, seed, options, quick, threads)
                wanted = {part.before.name for part in parts.values() if part.before}
                found = {name: finished(part, place, part.name in wanted) for name, part in parts.items()}
                records[arm].append(found)
                say(f"seed {seed} {arm}: " + ", ".join(f"{k} {v:.4g}" for k, v in _numbers(found).items()))
    finally:
        torch.set_num_threads(before)
        os.environ.pop("PL_GLOBAL_SEED", None)
        if position is not None:
            os.environ["PL_GLOBAL_SEED"] = position
    whole = not (quick or pilot or arms) and seeds == claim.seed_list
    settings = {
        **{"seeds": len(seeds), "seed_values": seeds, "threads": threads, "quick": quick, "pilot": pilot},
        **({"dataset": options["data.dataset"]} if options else {}),
        "declaration": claim.digest,
        "stages": {n: stage.model_dump(mode="json", exclude={"quick"}) for n, stage in claim.steps.items()},
    }
    words = ["--pilot"] * pilot + ["--quick"] * quick + (["--arms", *chosen] if arms else [])
    words += ["--seeds", *map(str, seeds)] if seeds != (claim.pilot_seeds if pilot else claim.seed_list) else []
    words += ["--threads", str(threads)] * (threads != 1) + (["--data", dataset] if dataset else [])
    record = _result(paper, claim, records, settings, " ".join(["zoo claim", paper, "--run", *words]))
    kept = folder(paper) / "results" / f"{paper}.json"
    in_checkout = (checkout() / "pyproject.toml").is_file() or catalog.paper(paper).is_own
    kind = "quick" if quick else "pilot" if pilot else "result"
    path = Path(out) if out is not None else kept if whole and in_checkout else place / f"{kind}.json"
    write(record, path)
    return record, path


def _numbers(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of an arm at a seed, of all its stages."""
    return {name: value for part in found.values() for name, value in part["metrics"].items()}


def _result(
    paper: str,
    claim: Declaration,
    records: Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]],
    settings: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """The record of a finished run; `held` is true where every sub-claim holds."""
    numbers = {arm: [_numbers(found) for found in seeds] for arm, seeds in records.items()}
    told: dict[str, Any] = {}
    for arm, seeds in records.items():
        told[arm] = {"options": claim.arms[arm], "measured": list(numbers[arm][0])}
        told[arm] |= {name: [seed[name] for seed in numbers[arm]] for name in numbers[arm][0]}
        for stage, part in seeds[0].items():
            prefix = f"{stage}_" if claim.stages else ""
            told[arm] |= {f"{prefix}{name}": [seed[stage]["losses"][name] for seed in seeds] for name in part["losses"]}
            told[arm] |= {f"{prefix}{name}": part[name] for name in ("steps", "precision")}
    claims = [
        judged(
            one, [evaluate(one.effect, {arm: found[n] for arm, found in numbers.items()}) for n in range(len(seeds))]
        )
        for one in claim.claims
        if {arm for arm, _ in names_in(one.effect)} <= set(records)
    ]
    parts = [part for seeds in records.values() for found in seeds for part in found.values()]
    return {
        "claim": paper,
        "statement": claim.statement,
        "held": bool(claims) and all(one["held"] for one in claims),
        "claims": claims,
        "arms": told,
        "settings": settings,
        "seconds": round(sum(part["seconds"] for part in parts), 1),
        "processor_seconds": round(sum(part["processor_seconds"] for part in parts), 1),
        "command": command,
        "environment": environment(),
    }
