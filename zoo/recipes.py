"""Recipes: a YAML of LightningCLI (seed_everything, model, data, trainer) with a name, a run folder and clear errors.

`run` is what ``zoo fit|validate|test|predict RECIPE`` does, `load_recipe` hands the same three objects to Python.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import importlib
import inspect
import json
import logging
import os
import platform
import re
import shlex
import signal
import sys
import time
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import zoo
from zoo import catalog
from zoo.datacheck import checked_hash
from zoo.errors import ZooError
from zoo.machine import cpu_has_bfloat16
from zoo.paths import share

SUBCOMMANDS = ("fit", "validate", "test", "predict")
# Facts of the data module that the model takes over, where its class has such an argument and nobody set it.
LINKS = {"num_classes": "num_classes", "num_tasks": "num_tasks", "image_size": "img_size"}
_NOT_OPTIONS = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}


# ---------------------------------------------------------------------------------------------- names and run folders


def recipe_name(path: Path) -> str:
    """The name of the recipe at `path`: relative to the recipes folder, as a saved config states it, or the stem."""
    with contextlib.suppress(ValueError):
        return path.resolve().relative_to(share("recipes").resolve()).with_suffix("").as_posix()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        first = path.read_text().partition("\n")[0]
        if match := re.match(r"# recipe: (\S+)", first):
            return match[1]
    return path.stem


def newest_checkpoint(root: Path, name: str, which: str = "last") -> Path:
    """``last`` or ``best`` of the newest run of the recipe `name` under `root`; a ZooError where there is none."""
    pattern = {"last": "last.ckpt", "best": "best*.ckpt"}[which]
    found = sorted(root.glob(f"{name}/*/checkpoints/{pattern}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ZooError(f"no {pattern} of {name} under {root}/{name}; run `zoo fit {name}` first or give a path")
    return found[-1]


def _new_run_folder(root: Path, name: str) -> Path:
    # Lightning starts the other ranks with our command line a little later: they must not take a later second.
    if "LOCAL_RANK" in os.environ and "ZOO_RUN_DIR" in os.environ:
        return Path(os.environ["ZOO_RUN_DIR"])
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, count = root / name / stamp, 1
    while folder.exists():
        count += 1
        folder = root / name / f"{stamp}-{count}"
    return folder


# --------------------------------------------------------------------------------------------------------- callbacks


class PlainProgress(ProgressBar):
    """Progress for logs and pipes: a line every `seconds` seconds, and at the end of epochs longer than a second."""

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._last = time.monotonic()

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _say(self, what: str, batch: int, total: float, metrics: Mapping[str, Any], always: bool = False) -> None:
        now = time.monotonic()
        if not self._enabled or now - self._last < (min(1.0, self.seconds) if always else self.seconds):
            return
        self._last = now
        of = f"/{int(total)}" if total != float("inf") else ""
        print(" ".join([what, f"batch {batch}{of}", *_numbers(_scalars(metrics, latest=True))]), flush=True)

    def _epoch(self, trainer: Trainer) -> str:
        last = f"/{trainer.max_epochs}" if trainer.max_epochs not in (None, -1) else ""
        return f"epoch {trainer.current_epoch + 1}{last}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1 == self.total_train_batches
        metrics = self.get_metrics(trainer, pl_module)
        self._say(self._epoch(trainer), batch_idx + 1, self.total_train_batches, metrics, always=done)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._say("validation", batch_idx + 1, trainer.num_val_batches[dataloader_idx], {})

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._say("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx], {})

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._say("predict", batch_idx + 1, trainer.num_predict_batches[dataloader_idx], {})


class Interrupt(Callback):
    """Ctrl-C ends a training batch, saves `last.ckpt` and stops; a second one stops at once.

    In the loops an exception from a signal may come anywhere, in a finaliser that swallows it or while a file is
    written; there the request is noted and honoured between batches.
    """

    def __init__(self, checkpoint: ModelCheckpoint | None) -> None:
        self.checkpoint = checkpoint
        self._asked = self._looping = False
        self._before: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Ranks would leave at different batches and wait for each other in the save; there Ctrl-C stops at once.
        if trainer.world_size == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with contextlib.suppress(ValueError):  # not in the main thread
                self._before = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._asked or not self._looping:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping after this batch; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._asked:
            if self.checkpoint is not None and self.checkpoint.dirpath:
                trainer.save_checkpoint(Path(self.checkpoint.dirpath) / "last.ckpt")
            raise KeyboardInterrupt

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looping = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config of a fit into the run folder; it is a recipe again."""

    def __init__(self, parser: Any, config: Any, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(self.folder / "config.yaml"), skip_none=False, overwrite=True)


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    """`name value` texts of the scalars in `metrics`."""
    return [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in metrics.items()]


def _scalars(metrics: Mapping[str, Any], latest: bool = False) -> dict[str, Any]:
    """`metrics` as numbers, once each: of those that Lightning keeps as `_step` and `_epoch` the mean of the epoch, or
    the `latest` step's."""
    found: dict[str, Any] = {}
    for key in sorted(metrics, key=lambda key: key.endswith("_step") == latest):  # the wanted one comes last
        name = key.removesuffix("_step").removesuffix("_epoch")
        if key != "v_num" and not key.startswith(("lr-", "time/", "train/lr")):
            value = metrics[key]
            found[name] = value.item() if isinstance(value, torch.Tensor) else value
    return {name: found[name] for key in metrics if (name := key.removesuffix("_step").removesuffix("_epoch")) in found}


# ------------------------------------------------------------------------------------------------------- the command


class RecipeCLI(LightningCLI):
    """LightningCLI in subclass mode for one recipe and one subcommand, with a flat config.

    Args:
        name: the recipe's name, which names the run folder.
        subcommand: whose options (`--ckpt_path`, ...) the parser takes.
        args: the command line, the recipe itself included as `--config`.
        unlinked: model arguments that the user set and which are therefore not taken from the data module.
        rich: a progress bar instead of plain lines.
    """

    def __init__(self, name: str, subcommand: str, args: list[str], unlinked: set[str], rich: bool) -> None:
        self.recipe, self.what, self.unlinked, self.rich = name, subcommand, unlinked, rich
        self.words = args
        self.folder = Path()
        self.checkpoint: ModelCheckpoint | None = None
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            trainer_defaults={"use_distributed_sampler": False},
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"zoo {subcommand} {name}",
                "description": f"Every option of the recipe {name}; all of them stand in its YAML too.",
                "dump_header": [f"recipe: {name}", f"zoo=={zoo.__version__}"],
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            run=False,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        added = parser.add_method_arguments(Trainer, self.what, skip=_NOT_OPTIONS)
        if "verbose" in added:
            parser.set_defaults({"verbose": False})  # the score line says it
        for source, target in LINKS.items():
            if target not in self.unlinked:
                parser.link_arguments(f"data.{source}", f"model.init_args.{target}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            raise ZooError(explain_parse_error(str(error), parser)) from error

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, AssertionError, KeyError, MisconfigurationException) as error:
            raise ZooError(f"{self.recipe}: {_innermost(error)}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init["trainer"]
        root = Path(config["default_root_dir"] or "runs")
        self.folder = _new_run_folder(root, self.recipe)
        callbacks = config["callbacks"] or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        if self.what == "fit":
            callbacks += self._fit_callbacks(config, callbacks)
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar(leave=False) if self.rich else PlainProgress())
        logger = config["logger"]
        if logger is None or logger is True:
            logger = self._loggers() if self.what == "fit" and not config["fast_dev_run"] else False
        return super().instantiate_trainer(
            **kwargs,
            callbacks=callbacks,
            logger=logger,
            precision=self._precision(config),
            default_root_dir=str(self.folder),
            enable_model_summary=False,
        )

    def _precision(self, config: Mapping[str, Any]) -> Any:
        """A recipe's bf16-mixed is float32 on a CPU that would have to emulate it, unless the user asks for it."""
        asked = any(word.partition("=")[0] == "--trainer.precision" for word in self.words)
        on_cpu = config["accelerator"] == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
        if config["precision"] == "bf16-mixed" and on_cpu and not asked and not cpu_has_bfloat16():
            return "32-true"
        return config["precision"]

    def _fit_callbacks(self, config: Mapping[str, Any], given: list[Callback]) -> list[Callback]:
        from zoo.training.callbacks import default_callbacks

        kinds = {type(callback) for callback in given}
        added = [callback for callback in default_callbacks() if type(callback) not in kinds]
        own = [callback for callback in [*given, *added] if isinstance(callback, ModelCheckpoint)]
        self.checkpoint = own[0] if own else None
        if not own and config["enable_checkpointing"] is not False:
            self.checkpoint = self._checkpoint()
            added.append(self.checkpoint)
        added.append(Interrupt(self.checkpoint))
        if not config["fast_dev_run"]:
            added.append(SaveConfig(self.parser, self.config, self.folder))
        return added

    def _checkpoint(self) -> ModelCheckpoint:
        monitor = getattr(self.model, "monitor", None)
        metric, mode = monitor if isinstance(monitor, tuple) else (monitor, "max")
        return ModelCheckpoint(
            dirpath=self.folder / "checkpoints",
            filename="best" if metric else "recent",
            monitor=metric,
            mode=mode,
            save_top_k=1,  # with 0, Lightning writes last.ckpt only when training ends
            save_last=True,
            enable_version_counter=False,
        )

    def _loggers(self) -> list[Logger]:
        parent, version = self.folder.parent, self.folder.name
        return [
            TensorBoardLogger(str(parent), name="", version=version),
            CSVLogger(str(parent), name="", version=version),
        ]


def _build(subcommand: str, recipe: str | Path, argv: Sequence[str], rich: bool) -> RecipeCLI:
    path = catalog.recipe_path(str(recipe))
    content = _check_recipe(path)
    name = recipe_name(path)
    args = ["--config", str(path), *_without_its_data(content, argv), *_nested_nulls(argv)]
    return RecipeCLI(name, subcommand, args, _set_by_hand(args), rich)


# Settings of the data module that are about the recipe's own dataset.
_OF_DATASET = ("options", "train_samples", "data_dir", "mean", "std", "rearc_dir", "rearc_limit", "tasks")


def _without_its_data(content: Mapping[str, Any], argv: Sequence[str]) -> list[str]:
    """The options that take back what a recipe says about its dataset, where the user gives another one."""
    if not any(word.partition("=")[0] in ("--data.dataset", "--data.init_args.dataset") for word in argv):
        return []
    stated = (content.get("data") or {}).get("init_args") or {}
    return [f"--data.{key}=null" for key in _OF_DATASET if stated.get(key) is not None]


def _nested_nulls(argv: Sequence[str]) -> list[str]:
    """`argv` with ``--model.optim.lr null`` as ``--model.optim={"lr": null}``: jsonargparse 4.53 hands a null that lies
    two levels deep on as the string "None"."""
    words, position = [], 0
    while position < len(argv):
        word = argv[position]
        key, equals, value = word.partition("=")
        if not equals and key.startswith("--") and position + 1 < len(argv):
            value = argv[position + 1]
        owner, _, leaf = key.rpartition(".")
        if value in ("null", "Null", "NULL", "~") and len([p for p in key.split(".") if p != "init_args"]) > 2:
            words.append(f"{owner.removesuffix('.init_args')}={json.dumps({leaf: None})}")
            position += 1 if equals else 2
        else:
            words.append(word)
            position += 1
    return words


def _check_recipe(path: Path) -> dict[str, Any]:
    """The content of the recipe at `path`; a ZooError where it is none."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ZooError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ZooError(f"{path}: not a recipe; it has no `model`")
    return content


def _set_by_hand(args: Sequence[str]) -> set[str]:
    """Which link targets the configs or options among `args` set themselves."""
    found: set[str] = set()
    for position, word in enumerate(args):
        key, _, value = word.partition("=")
        if key in ("--config", "-c"):
            value = value or (args[position + 1] if position + 1 < len(args) else "")
            with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
                model = (yaml.safe_load(Path(value).read_text()) or {}).get("model") or {}
                found |= {target for target in LINKS.values() if target in (model.get("init_args") or {})}
        else:
            found |= {t for t in LINKS.values() if key in (f"--model.{t}", f"--model.init_args.{t}")}
    return found


def load_recipe(
    name: str | Path, overrides: Mapping[str, Any] | None = None
) -> tuple[LightningModule, LightningDataModule, Trainer]:
    """The module, data module and trainer of a recipe, ready for ``trainer.fit(module, datamodule)``.

    Args:
        name: a recipe's name (``mae/pocket``), a unique prefix of it, or the path of a YAML file.
        overrides: dotted keys and their values, as on the command line: ``{"trainer.max_epochs": 1}``.

    Raises:
        ZooError: unknown recipe or key, a value of a wrong type.
    """
    argv = []
    for key, value in (overrides or {}).items():
        argv.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    with _quiet():
        cli = _build("fit", name, argv, rich=sys.stdout.isatty())
    return cli.model, cli.datamodule, cli.trainer


def run(subcommand: str, recipe: str, argv: Sequence[str], debug: bool = False) -> int:
    """``zoo SUBCOMMAND RECIPE ARGV``; returns the exit code (130 after Ctrl-C)."""
    if subcommand not in SUBCOMMANDS:
        raise ValueError(subcommand)
    begin = time.monotonic()
    with _quiet(debug):
        cli = _build(subcommand, recipe, _last_to_path(recipe, argv), rich=sys.stdout.isatty())
        trainer, options = cli.trainer, _options(cli)
        _announce(cli, options)
        before = signal.getsignal(signal.SIGINT)
        os.environ["ZOO_RUN_DIR"] = str(cli.folder)
        try:
            outputs = getattr(trainer, subcommand)(cli.model, datamodule=cli.datamodule, **options)
        except SystemExit:
            # Lightning turns Ctrl-C into exit code 1.
            if trainer.state.status != "interrupted":
                raise
            return _interrupted(cli, [recipe, *argv])
        except KeyboardInterrupt:
            return _interrupted(cli, [recipe, *argv])
        except MisconfigurationException as error:
            raise ZooError(f"{cli.recipe}: {' '.join(str(error).split())}") from error
        finally:
            os.environ.pop("ZOO_RUN_DIR", None)
            if signal.getsignal(signal.SIGINT) != before:
                signal.signal(signal.SIGINT, before)
    if trainer.is_global_zero:
        _finish(cli, outputs, [subcommand, recipe, *argv], time.monotonic() - begin)
    return 0


def _options(cli: RecipeCLI) -> dict[str, Any]:
    known = set(inspect.signature(getattr(Trainer, cli.what)).parameters) - _NOT_OPTIONS - {"self"}
    return {key: cli.config_init[key] for key in known if key in cli.config_init}


def _last_to_path(recipe: str, argv: Sequence[str]) -> list[str]:
    """`argv` with ``--ckpt_path last`` (or ``best``) turned into the path in the newest run of this recipe."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--ckpt_path=") else [word])]
    if "--ckpt_path" in words[:-1]:
        at = words.index("--ckpt_path") + 1
        if words[at] in ("last", "best"):
            root = _value_of(words, "--trainer.default_root_dir") or "runs"
            found = newest_checkpoint(Path(root), recipe_name(catalog.recipe_path(recipe)), words[at])
            words[at] = str(found)
        elif words[at] not in ("null", "hpc", "registry") and "://" not in words[at] and not Path(words[at]).exists():
            raise ZooError(f"--ckpt_path: no file {words[at]!r}")
    return words


def _value_of(words: Sequence[str], key: str) -> str | None:
    for position, word in enumerate(words):
        if word == key and position + 1 < len(words):
            return words[position + 1]
        if word.startswith(key + "="):
            return word.partition("=")[2]
    return None


def _announce(cli: RecipeCLI, options: Mapping[str, Any]) -> None:
    if not cli.trainer.is_global_zero:
        return
    count = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    data = getattr(cli.datamodule, "dataset", type(cli.datamodule).__name__)
    device = type(cli.trainer.accelerator).__name__.removesuffix("Accelerator").lower()
    parts = [
        cli.recipe,
        f"{type(cli.model).__name__} {count / 1e6:.2f} M parameters",
        f"{data}",
        f"{cli.trainer.world_size} × {device} {cli.trainer.precision}",
    ]
    print(" · ".join(parts))
    if ckpt := options.get("ckpt_path"):
        print(f"from {ckpt}")
    elif cli.what != "fit":
        print("no --ckpt_path: the weights are those the recipe starts from", file=sys.stderr)
    sys.stdout.flush()


def _interrupted(cli: RecipeCLI, words: list[str]) -> int:
    last = cli.folder / "checkpoints" / "last.ckpt"
    if cli.checkpoint is not None and cli.checkpoint.dirpath:
        last = Path(cli.checkpoint.dirpath) / "last.ckpt"
    if cli.what == "fit" and last.exists():
        kept = [part for word in words for part in (word.split("=", 1) if word.startswith("--ckpt_path=") else [word])]
        if "--ckpt_path" in kept:
            at = kept.index("--ckpt_path")
            del kept[at : at + 2]
        command = shlex.join([*kept, "--ckpt_path", str(_short(last))])
        print(f"\ninterrupted; resume with: zoo fit {command}", file=sys.stderr)
    else:
        print("\ninterrupted" + (" before a checkpoint was written" if cli.what == "fit" else ""), file=sys.stderr)
    return 130


def _finish(cli: RecipeCLI, outputs: Any, command: list[str], seconds: float) -> None:
    if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    metrics = {key: float(value) for key, value in _scalars(cli.trainer.callback_metrics).items()}
    cli.folder.mkdir(parents=True, exist_ok=True)
    if cli.what == "predict":
        torch.save(outputs, cli.folder / "predictions.pt")
        print(f"predictions: {cli.folder / 'predictions.pt'}")
    else:
        print("score: " + (" · ".join(_numbers(metrics)) or "no metric was logged"))
    (cli.folder / "result.json").write_text(json.dumps(_result(cli, metrics, command, seconds), indent=1) + "\n")
    if cli.checkpoint is not None:
        for path in (cli.checkpoint.last_model_path, cli.checkpoint.best_model_path):
            if path and Path(path).stem != "recent":
                print(f"checkpoint: {_short(path)}")
    print(f"run: {_short(cli.folder)} ({seconds:.0f} s)")


def _short(path: str | Path) -> str:
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else str(path)


def _result(cli: RecipeCLI, metrics: dict[str, float], command: list[str], seconds: float) -> dict[str, Any]:
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
        "seconds": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()} {os.cpu_count()} cores, {_device()}",
        "versions": {"zoo": zoo.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


_PROTOCOL_OF_TRAINER = (
    *("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "deterministic", "sync_batchnorm"),
)


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


@contextlib.contextmanager
def _quiet(debug: bool = False) -> Iterator[None]:
    """Without Lightning's announcements and the warnings that call for nothing; all of them under `debug`."""
    if debug:
        yield
        return
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in (*names, "lightning.fabric.utilities.seed")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for text in (
                ".*does not have many workers.*",
                ".*num_workers.*",
                ".*number of training batches .* is smaller than the logging interval.*",
                ".*Checkpoint directory .* exists and is not empty.*",
                ".*dirpath has changed.*",
                ".*Experiment logs directory.*",
                ".*callbacks used to create the checkpoint need to be provided.*",
                ".*treespec.*",
                ".*in eval mode at the start of training.*",
                ".*is not supported by the `ModelSummary`.*",
                ".*`LightningCLI`.*args.*",
            ):
                warnings.filterwarnings("ignore", message=text)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------ parse errors


def explain_parse_error(message: str, parser: Any) -> str:
    """One line for a parse error of jsonargparse, naming the key and the nearest valid one.

    Its messages are trees of lines: ``Parser key "model"`` > ``Problem with given class_path 'X'`` > the cause. The
    chain of keys and the innermost class are kept, the branches of other members of a union are dropped.
    """
    keys: list[tuple[int, str]] = []
    owner: str | None = None
    wanted, given = "", ""
    for line in message.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        text = line.strip().removeprefix("- ")
        if match := re.match(r'Parser key "([^"]+)":\s*(.*)', text):
            keys = [*((at, key) for at, key in keys if at < indent), (indent, match[1])]
            text, wanted = match[2], ""
            if not text:
                continue
        path = ".".join(key for _, key in keys)
        if match := re.match(r"Problem with given class_path '([^']+)'", text):
            owner = match[1]
        elif match := re.match(r"Group '([^']*)' does not accept option '([^']+)'", text):
            prefix = ".".join(filter(None, [path, match[1]]))
            return _unknown_key(prefix, match[2], owner if path else None, parser)
        elif match := re.match(r"Option '([^']+)' is not accepted", text):
            return _unknown_key(path, match[1], owner, parser)
        elif match := re.match(r"unrecognized arguments: (.*)", text, re.IGNORECASE):
            first = match[1].split()[0]
            if not first.startswith("-"):
                return f"unexpected argument {first!r}; options look like --trainer.max_epochs 1"
            return _unknown_key(path, first.lstrip("-").split("=")[0], owner, parser)
        elif match := re.match(r"module '([^']+)' has no attribute '([^']+)'", text):
            return f"{path}: " + _no_attribute(match[1], match[2])
        elif text.startswith("No module named"):
            return f"{path or 'config'}: {text}"
        elif re.match(r"Not a valid subclass of|Import path .* does not correspond to a subclass", text) and not wanted:
            wanted = text
        elif match := re.match(r"Subtypes: \[(.*)\]", text):
            wanted = _types(match[1])
        elif match := re.match(r"Given value: (.*)", text):
            given = given or match[1]
            if wanted and (not owner or path.count(".") > 0):
                return f"{path}: expected {wanted}, got {given!r}"
        elif match := re.match(r"Expected (?:an? )?(.+?)\. Got value: (.*)", text):
            return f"{path}: expected {_types(match[1])}, got {match[2]!r}"
        elif match := re.search(r"File does not exist: '(.*)'", text):
            return f"{path or '--config'}: no file {os.path.relpath(match[1])!r}"
        elif text.startswith(("argument ", "Key ", "Problems parsing config")):
            break
    return " ".join(message.split())


def _innermost(error: BaseException) -> str:
    """What a class said when it was built; jsonargparse wraps it in the report of a union's members."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ZooError):
            return str(found)
        found = found.__cause__ or found.__context__
    match = re.search(r"^\s*Errors:\n\s*- (.*?)\n\s*- Expected", str(error), re.DOTALL | re.MULTILINE)
    return " ".join((match[1] if match else str(error)).split()) or type(error).__name__


def _types(text: str) -> str:
    """``<class 'int'>, <class 'NoneType'>`` or ``typing.Literal['a', 'b']`` in words."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text).replace("typing.", "")
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    names = [re.sub(r"^Literal\[(.*)\]$", r"one of \1", part.strip()) for part in parts]
    return " or ".join(name for name in names if name and name != "NoneType") or text


def _unknown_key(prefix: str, key: str, owner: str | None, parser: Any) -> str:
    """The line for the key `prefix.key`, which `owner` (a class path; None: the parser itself) does not take."""
    key = key.replace("init_args.", "")
    shown = f"{prefix}.{key}" if prefix else key
    if owner is None:
        known = sorted(set(parser.get_defaults().keys()) - {"config", "print_config"})
        near = difflib.get_close_matches(shown, known, n=1, cutoff=0.6)
        if not near:
            known = sorted({name.partition(".")[0] for name in known})
            near = difflib.get_close_matches(shown.partition(".")[0], known, n=1, cutoff=0.3)
    else:
        # The innermost class is known by name; of its dataclass arguments only the keys are, at the end of the prefix.
        base, words = prefix.split(".") if prefix else [], key.split(".")
        kind = _load(owner)
        for word in [base[-1]] * bool(base) + words[:-1]:
            if inner := _argument_class(kind, word):
                kind = inner
                if word == words[0]:
                    base.append(words.pop(0))
        owner, names = kind.__name__ if kind else owner, _parameters(kind)
        near = difflib.get_close_matches(words[0], names, n=1, cutoff=0.3)
        near = [".".join([*base, *near])] if near else []
        known = names
    where = f" of {owner}" if owner else ""
    if near:
        return f"unknown key {shown!r}{where}; did you mean {near[0]!r}?"
    return f"unknown key {shown!r}{where}; known: {', '.join(known)}"


def _load(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        return getattr(importlib.import_module(module), name)
    return None


def _parameters(kind: Any) -> list[str]:
    if kind is None:
        return []
    found = inspect.signature(kind).parameters
    return [key for key, value in found.items() if value.kind not in (value.VAR_KEYWORD, value.VAR_POSITIONAL)]


def _argument_class(kind: Any, argument: str) -> Any:
    """The dataclass that the argument `argument` of the class `kind` takes, if it is one."""
    with contextlib.suppress(Exception):
        hint = typing.get_type_hints(kind.__init__).get(argument)
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                return option
    return None


def _no_attribute(module: str, name: str) -> str:
    with contextlib.suppress(ImportError):
        known = [key for key in dir(importlib.import_module(module)) if not key.startswith("_")]
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.3):
            return f"{module} has no {name!r}; did you mean {near[0]!r}?"
    return f"{module} has no {name!r}"
