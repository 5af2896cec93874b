"""Run folders: where a run lies, its checkpoints, its resolved config, and the record of its result."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

import zoo
from zoo.data.check import checked_hash
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.command.recipes import RecipeCLI


def newest_checkpoint(root: Path, name: str, which: str = "last") -> Path:
    """``last`` or ``best`` of the newest run of the recipe `name` under `root`; a ZooError where there is none."""
    pattern = {"last": "last.ckpt", "best": "best*.ckpt"}[which]
    found = sorted(root.glob(f"{name}/*/checkpoints/{pattern}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ZooError(f"no {pattern} of {name} under {root}/{name}; run `zoo fit {name}` first or give a path")
    return found[-1]


def new_run_folder(root: Path, name: str) -> Path:
    # Lightning starts the other ranks with our command line a little later: they must not take a later second.
    if "LOCAL_RANK" in os.environ and "ZOO_RUN_DIR" in os.environ:
        return Path(os.environ["ZOO_RUN_DIR"])
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, count = root / name / stamp, 1
    while folder.exists():
        count += 1
        folder = root / name / f"{stamp}-{count}"
    return folder


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config of a fit into the run folder; it is a recipe again."""

    def __init__(self, parser: Any, config: Any, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(self.folder / "config.yaml"), skip_none=False, overwrite=True)


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
    return {
        "recipe": cli.recipe,
        "command": "zoo " + shlex.join(command),
        "metrics": metrics,
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
