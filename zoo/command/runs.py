"""Run folders: where a run lies, its checkpoints, its resolved config, and the record of its result."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

import zoo
from zoo import catalog, files
from zoo.data.check import checked_hash
from zoo.errors import ZooError
from zoo.training.checkpoints import check_shards, is_sharded
from zoo.weights.files import read_checkpoint
from zoo.weights.runs import ORDER, check_class_paths, folder_name, order, runs_of

if TYPE_CHECKING:
    from zoo.command.recipes import RecipeCLI
    from zoo.weights.runs import RunModel


def safe_name(name: str, otherwise: str) -> str:
    """`name` where it can name a folder under runs/, as mae/pocket does: relative, and no step up."""
    parts = name.split("/")
    if len(name) <= 200 and all(re.fullmatch(r"[\w+=@-][\w.+=@:-]*", part) for part in parts):
        return name
    return otherwise


def remember(run: Path) -> None:
    """Notes that `run` is the newest of its recipe."""
    highest = max((order(other) for other in run.parent.iterdir() if other != run), default=-1)
    if order(run) <= highest:
        files.write_text(run / ORDER, f"{highest + 1}\n")


def newest_checkpoint(
    root: Path, name: str, which: str = "last", read: Callable[[Path], Any] = read_checkpoint
) -> Path:
    """``last`` or ``best`` of the newest run of the recipe `name` under `root`.

    One that `read` refuses is passed over, with a line, for the next older one, if there is any that it takes.

    Raises:
        ZooError: there is none.
    """
    patterns = {"last": ("last.ckpt", "previous.ckpt"), "best": ("best*.ckpt",)}[which]
    found = [
        path
        for run in reversed(runs_of(root, name))
        for pattern in patterns
        for path in sorted((run / "checkpoints").glob(pattern), reverse=True)
    ]
    if not found:
        raise ZooError(f"no {patterns[0]} of {name} under {root}/{name}; run `zoo fit {name}` first or give a path")
    lines = []
    for path in found:
        try:
            if is_sharded(path):
                check_shards(path)
            else:
                read(path)
        except ZooError as error:
            lines.append(f"passed over: {error}")
            continue
        if lines and first_process():
            print("\n".join(lines), file=sys.stderr)
        return path
    return found[0]


def run_of(checkpoint: Path, name: str) -> Path | None:
    """The run folder in which `checkpoint` lies, if it is one of the recipe `name`."""
    folder = checkpoint.absolute().parent
    config = folder.parent / "config.yaml"
    if folder.name != "checkpoints" or not config.is_file():
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError), config.open(encoding="utf-8") as file:
        if folder_name(file.readline().strip().removeprefix("# recipe: ")) == folder_name(name):
            return folder.parent
    return None


@contextlib.contextmanager
def recipe_of(model: RunModel) -> Iterator[Path]:
    """The recipe of a run: its ``config.yaml``, or of a checkpoint that lies elsewhere what it says of it, in a file
    for as long as the block lasts. All that it names is the zoo's.

    Raises:
        ZooError: neither is there.
    """
    if model.folder is not None and (path := model.folder / "config.yaml").is_file():
        content = catalog.read_facts(path, "recipe")
        if content.get("module") is not None:
            raise ZooError(f"{path}: names a file of Python to run: zoo test {path} --ckpt_path FILE, if you know it")
        check_class_paths(content, path)
        yield path
        return
    recipe = model.facts["recipe"]
    if not recipe or not recipe.get("model") or not recipe.get("data"):
        raise ZooError(f"{model.checkpoint}: says nothing of its recipe; give that: zoo test RECIPE --ckpt_path FILE")
    check_class_paths(recipe, model.checkpoint)
    with tempfile.TemporaryDirectory(prefix="zoo-") as place:
        path = Path(place) / "recipe.yaml"
        settings = yaml.safe_dump({key: recipe[key] for key in ("model", "data", "average") if recipe.get(key)})
        path.write_text(f"# recipe: {safe_name(str(recipe.get('name')), 'recipe')}\n{settings}", encoding="utf-8")
        yield path


def first_process() -> bool:
    """Whether this process is the one of a run that writes."""
    return not getattr(rank_zero_only, "rank", 0)


def new_run_folder(root: Path, name: str, claim: bool = False) -> Path:
    """The folder of a new run, named by the time.

    Args:
        claim: make it, so that no run begun in the same second takes it. Otherwise nothing is written, and the name
            holds the process' number.
    """
    # Lightning starts the other ranks with our command line a little later: they must not take a later second.
    if "LOCAL_RANK" in os.environ and "ZOO_RUN_DIR" in os.environ:
        return Path(os.environ["ZOO_RUN_DIR"])
    stamp, count = datetime.datetime.now().strftime("%Y%m%d-%H%M%S"), 1
    first = first_process()
    if not claim or not first:  # the first process tells the others where to write
        stamp += f"-{os.getpid()}"
    folder = root / name / stamp
    while True:
        try:
            if claim and first:
                folder.mkdir(parents=True)
                return folder
            if not folder.exists():
                return folder
        except FileExistsError:
            if not folder.exists():  # a file stands where a folder should
                raise
        count += 1
        folder = root / name / f"{stamp}-{count}"


def drop_empty(run: Path) -> None:
    """Takes away a run folder in which nothing was written, and what was made to hold it."""
    with contextlib.suppress(OSError):
        for folder in (run, *list(run.parents)[:3]):
            if folder != Path("."):
                folder.rmdir()  # fails where something is in it


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config of a fit into the run folder; it is a recipe again.

    Only when training begins: a resume that is refused leaves that of the run it would have gone on with.
    """

    def __init__(self, parser: Any, config: Any, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.already_saved:
            super().setup(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.already_saved:  # nothing was left to train
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = self.config.clone()
        config["ckpt_path"] = None  # it is of this part of the run only
        config.pop("new_run", None)
        config.pop("logger", None)
        # Not parser.save, which changes the working folder for a moment, under the feet of what writes logs.
        files.write_text(self.folder / "config.yaml", self.parser.dump(config, skip_none=False))
        remember(self.folder)


def of_a_loader(error: BaseException) -> str | None:
    """What went wrong in a loader process, in one line; None for an error of another kind."""
    text = str(error)
    if killed := re.search(r"DataLoader worker \(pid\(?s?\)? ?[\d, ]+\) ([^.\n]*)", text):
        return f"a loader process {killed[1].strip()}; is memory short? fewer are started by --data.num_workers"
    if caught := re.match(r"Caught (\w+) in DataLoader worker process \d+", text):
        last = [line for line in text.splitlines() if line.strip()][-1].strip()
        kind, colon, message = last.partition(": ")
        plain = colon and kind.rpartition(".")[2] in ("ZooError", "MissingPackage")
        return message if plain else of_memory(error) or f"in a loader process: {last if colon else caught[1]}"
    return None


def of_memory(error: BaseException) -> str | None:
    """That there is too little memory, in one line; None for an error of another kind."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        said = " ".join(str(error).splitlines()[-1].partition(" Error code")[0].split())[-160:] if str(error) else ""
        return f"out of memory; a smaller data.batch_size or image_size takes less ({said or type(error).__name__})"
    return None


def short_path(path: str | Path) -> str:
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else str(path)


def result_record(cli: RecipeCLI, metrics: dict[str, float], command: list[str], seconds: float) -> dict[str, Any]:
    """What a result needs to be compared with another: numbers, protocol, versions, machine."""
    dump = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    data = {**((dump.get("data") or {}).get("init_args") or {})}
    module = cli.datamodule
    protocol = {
        "dataset": data.get("dataset"),
        "data_hash": checked_hash(str(data.get("dataset")), data.get("data_dir")),
        **_counts(cli.trainer),
        "image_size": getattr(module, "image_size", None),
        "num_classes": getattr(module, "num_classes", None),
        "mean": _plain(getattr(module, "mean", None)),
        "std": _plain(getattr(module, "std", None)),
        **{f"data.{key}": value for key, value in data.items() if key not in ("dataset", "image_size", "mean", "std")},
        "task": dump["model"]["class_path"],
        **{f"model.{key}": value for key, value in _flat(dump["model"].get("init_args") or {})},
        "ckpt_path": dump.get("ckpt_path"),
        "average": dump.get("average"),
        "weights": weights["name"] if (weights := cli.weights or _checkpoint(dump.get("ckpt_path"))) else None,
        "steps": cli.trainer.global_step,
        **{f"trainer.{key}": dump["trainer"].get(key) for key in _PROTOCOL_OF_TRAINER},
        "precision": cli.trainer.precision,
        "world_size": cli.trainer.world_size,
        "seed": dump.get("seed_everything"),
    }
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if callable(facts := getattr(callback, "protocol", None)):  # how a callback measures
            protocol |= {f"{type(callback).__name__}.{key}": value for key, value in facts().items()}
    further: dict[str, Any] = {}
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if callable(found := getattr(callback, "results", None)):  # what it found beside metrics
            further |= found()
    return {
        "recipe": cli.recipe,
        "command": "zoo " + shlex.join(command),
        "metrics": metrics,
        **further,
        "protocol": protocol,
        "weights": weights or None,
        "seconds": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()} {os.cpu_count()} cores, {_device()}",
        "versions": {
            "zoo": zoo.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "torchvision", "lightning", "numpy")},
        },
    }


_PROTOCOL_OF_TRAINER = (
    *("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "deterministic", "sync_batchnorm"),
)


def _checkpoint(path: str | None) -> dict[str, Any]:
    """Which weights a run started from: the file and its checksum."""
    if path is None or not Path(path).is_file():
        return {}
    with Path(path).open("rb") as file:
        return {"name": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _counts(trainer: Trainer) -> dict[str, int]:
    """How many samples each loader of this run drew from."""
    found = {}
    for name, loader in (
        ("train", trainer.train_dataloader),
        ("val", trainer.val_dataloaders),
        ("test", trainer.test_dataloaders),
    ):
        with contextlib.suppress(AttributeError, TypeError):
            found[f"samples.{name}"] = len(loader.dataset)  # type: ignore[union-attr]
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    return [float(x) for x in value] if isinstance(value, Sequence | torch.Tensor) else value


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
