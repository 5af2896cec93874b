"""Recipes: a YAML of LightningCLI (seed_everything, model, data, trainer) with a name, a run folder and clear errors.

`run` is what ``zoo fit|validate|test|predict RECIPE`` does, `load_recipe` hands the same three objects to Python.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import logging
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import zoo
from zoo import catalog, files
from zoo.command import predictions
from zoo.command.logs import LOGGERS, check_loggers, make_loggers
from zoo.command.parse_errors import explain_parse_error, innermost
from zoo.command.progress import BarProgress, Interrupt, PlainProgress, numbers, scalars, telling
from zoo.command.reading import (
    LINKS,
    CommandLine,
    command_line,
    installed_only,
    mapping,
    read_recipe,
    recipe_name,
    run_name,
)
from zoo.command.runs import (
    SaveConfig,
    drop_empty,
    first_process,
    folder_name,
    new_run_folder,
    newest_checkpoint,
    of_a_loader,
    of_memory,
    result_record,
    run_of,
    short_path,
)
from zoo.command.verdict import second_stage, verdict, verdict_line
from zoo.errors import ZooError
from zoo.formats import pytorch
from zoo.machine import cpu_has_bfloat16
from zoo.nn.bounded import bounded_networks
from zoo.training import ErrorAnalysis, choose_average
from zoo.training.checkpoints import (
    BestCheckpoint,
    LastCheckpoint,
    SafeCheckpointIO,
    check_shards,
    is_sharded,
    local,
    standing,
)
from zoo.weights.pretrained import load_published

SUBCOMMANDS = ("fit", "validate", "test", "predict")
_NOT_OPTIONS = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}


# ------------------------------------------------------------------------------------------------------- the command


class Finished(ZooError):
    """There is nothing left to train."""


class RecipeCLI(LightningCLI):
    """LightningCLI in subclass mode for one recipe and one subcommand, with a flat config.

    Args:
        line: what the recipe and the user say.
        subcommand: whose options (`--ckpt_path`, ...) the parser takes.
        rich: a progress bar instead of plain lines.
        dry: build model, data and callbacks, but no trainer.
        claim: make the run's folder; otherwise it is only named.
        checkpoints: what reads and writes them.
        weights_given: published weights are evaluated, and no averages of a run.
    """

    def __init__(
        self,
        line: CommandLine,
        subcommand: str,
        rich: bool,
        dry: bool = False,
        claim: bool = False,
        checkpoints: SafeCheckpointIO | None = None,
        weights_given: bool = False,
    ) -> None:
        self.recipe, self.what, self.line, self.rich = line.name, subcommand, line, rich
        self.dry, self.claim, self.weights_given = dry, claim, weights_given
        self.folder = Path()
        self.weights: dict[str, Any] = {}
        self.checkpoints = checkpoints or SafeCheckpointIO()
        self.standing: dict[str, Any] | None = None  # of the checkpoint that is taken up
        self.interrupt = Interrupt()
        self.last: LastCheckpoint | None = None
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            trainer_defaults={"use_distributed_sampler": False},
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"zoo {subcommand} {line.name}",
                "description": f"Every option of the recipe {line.name}; all of them stand in its YAML too.",
                "dump_header": [f"recipe: {line.name}", f"zoo=={zoo.__version__}"],
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=line.words,
            run=False,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        added = parser.add_method_arguments(Trainer, self.what, skip={*_NOT_OPTIONS, "ckpt_path"})
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="last or best (of the newest run of this recipe), or the path of a checkpoint",
        )
        parser.add_argument(
            "--average",
            type=str | None,
            help="evaluate with the average (zoo.training.EMA) of this name; raw: with none",
        )
        if self.what in ("validate", "test"):
            parser.add_argument(
                "--sweep",
                type=dict | None,
                help="settings of sampling to compare first, on fewer samples: {samples: 5000, guidance: [6, 7], ...}",
            )
        parser.add_argument(
            "--report",
            type=bool,
            default=True,
            help="end a fit, validation or test in a page, <run>/report.html, with what errs most; false: without",
        )
        if "verbose" in added:
            parser.set_defaults({"verbose": False})  # the score line says it
        if self.line.module is not None:
            parser.add_argument("--module", type=str | None, help="a Python file beside the recipe with its classes")
        if self.what == "fit":
            parser.add_argument("--new_run", type=bool, default=False, help="resume in a run folder of its own")
            parser.add_argument(
                "--logger",
                type=list[str] | None,
                help=f"beside metrics.csv, one or several of {', '.join(LOGGERS)} (default: tensorboard)",
            )
        for source, target in LINKS.items():
            if target not in self.line.unlinked:
                parser.link_arguments(f"data.{source}", f"model.init_args.{target}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            raise ZooError(explain_parse_error(str(error), parser, self._known(parser))) from error
        if self.line.module is not None:
            self.config["module"] = str(self.line.module)  # a saved config lies elsewhere

    def _known(self, parser: LightningArgumentParser) -> dict[str, bool]:
        """The options that there are, and whether the recipe states them; none where the recipe is at fault itself."""
        stated = self.line.stated()
        with contextlib.suppress(argparse.ArgumentError):
            keys = [key.replace("init_args.", "") for key in parser.parse_args(self.line.given).keys()]  # noqa: SIM118
            return {key: key in stated for key in keys}
        return {}

    def before_instantiate_classes(self) -> None:
        """Reads the checkpoint, so that one that is of no use ends here."""
        if self.what == "fit":
            check_loggers(self.config["logger"] or [])
        if (path := self.config.get("ckpt_path")) is None:
            return
        if self.config.get("weights_only") is False:
            raise ZooError("weights_only: checkpoints hold tensors and plain types, and nothing else is ever loaded")
        if path in ("last", "best", "hpc") or str(path).startswith("registry"):
            raise ZooError(f"ckpt_path: write --ckpt_path last or best, or the path of a file, not {str(path)!r}")
        if is_sharded(local(path)):
            check_shards(local(path))
            if self.what != "fit" or not (local(path) / "meta.pt").is_file():
                return
            if str(self.config["trainer"]["strategy"]).startswith(("auto", "ddp")):
                raise ZooError(f"{path}: a sharded checkpoint goes on with --trainer.strategy fsdp2, on any devices")
            found = {"optimizer_states": [], **pytorch.read(local(path) / "meta.pt")}  # which lie beside it
        else:
            found = self.checkpoints.peek(path)
        if self.what == "fit":
            wanted = ("loops", "optimizer_states", "lr_schedulers")
            if missing := [key for key in wanted if found.get(key) is None]:
                raise ZooError(f"{path}: weights only, which cannot be resumed: it holds no {missing[0]!r}")
            try:
                self.standing = standing(found)
                self._refuse_finished(int(found["global_step"]), path)
            except (AttributeError, TypeError, ValueError, KeyError) as error:
                raise ZooError(f"{path}: not a checkpoint of a run: its loops are odd ({innermost(error)})") from error

    def _refuse_finished(self, step: int, path: Any) -> None:
        assert self.standing is not None
        run = run_of(Path(path), self.recipe)
        if self.standing["ended"] and run is not None and not (run / "result.json").exists():
            return  # it was stopped before its result was written
        epochs = self.standing["epochs"] + (self.standing["ended"] and self.standing["whole"])
        most_epochs, most_steps = self.config["trainer"]["max_epochs"], self.config["trainer"]["max_steps"]
        if most_epochs is None and most_steps == -1:
            most_epochs = 1000  # Lightning's own
        if most_steps not in (None, -1) and step >= most_steps:
            raise Finished(f"{path}: already at step {step} of {most_steps}; raise trainer.max_steps")
        if most_epochs not in (None, -1) and epochs >= most_epochs:
            raise Finished(f"{path}: already at epoch {epochs} of {most_epochs}; raise trainer.max_epochs")

    def instantiate_classes(self) -> None:
        with bounded_networks():
            if self.dry:
                self.parser.instantiate_classes(self.config)
            else:
                super().instantiate_classes()
        if self.what == "fit" and not self.dry:
            dump = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            settings = {key: dump.get(key) for key in ("model", "data", "average")}
            self.model.recipe = {"name": self.recipe, **settings}  # which its checkpoints carry on

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init["trainer"]
        devices, cores = str(config["devices"]), os.cpu_count() or 1
        if self._on_cpu(config) and devices.isdecimal() and int(devices) > max(64, 8 * cores):
            raise ZooError(f"trainer.devices: {devices} processes on a machine of {cores} cores")
        self.folder = self._folder(Path(config["default_root_dir"] or "runs"))
        callbacks = config["callbacks"] or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        if self.what == "fit":
            callbacks += self._fit_callbacks(config, callbacks)
        if (sweep := self.config.get("sweep")) is not None:
            _set_sweep(callbacks, sweep)
        if not self.weights_given:
            choose_average(callbacks, self.config["average"])
        if self.claim and self.config["report"] and self.what != "predict" and not config["fast_dev_run"]:
            callbacks.append(ErrorAnalysis())
        if self.what == "predict":
            callbacks += predictions.callbacks(self.model, callbacks, self.folder)
        callbacks = [self.interrupt, *callbacks]
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(BarProgress(leave=False) if self.rich else PlainProgress())
        logger = config["logger"]
        if logger is None or logger is True or (self.what == "fit" and self.config["logger"] is not None):
            logger = self._loggers() if self.what == "fit" and not config["fast_dev_run"] else False
        if config["strategy"] == "fsdp2":
            kwargs["strategy"] = self._sharded(config)
        plugins = config["plugins"] or []
        plugins = [*plugins] if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(self.checkpoints)
        try:
            return super().instantiate_trainer(
                **kwargs,
                callbacks=callbacks,
                logger=logger,
                plugins=plugins,
                precision=self._precision(config),
                default_root_dir=str(self.folder),
                enable_model_summary=False,
            )
        except BaseException:
            drop_empty(self.folder)
            raise

    def _sharded(self, config: Mapping[str, Any]) -> Any:
        """PyTorch's FSDP2 over all devices of the run."""
        from lightning.pytorch.strategies import ModelParallelStrategy

        devices = config["devices"]
        if isinstance(devices, str):
            devices = int(devices) if devices.lstrip("-").isdecimal() else devices.split(",")
            devices = -1 if devices == ["auto"] else devices
        count = len(devices) if isinstance(devices, list) else devices
        if count == -1:
            count = 1 if self._on_cpu(config) else torch.cuda.device_count()
        nodes = config["num_nodes"]
        return ModelParallelStrategy(data_parallel_size=count * nodes, tensor_parallel_size=1)

    def _on_cpu(self, config: Mapping[str, Any]) -> bool:
        return config["accelerator"] == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())

    def _precision(self, config: Mapping[str, Any]) -> Any:
        """A recipe's mixed precision is float32 on a CPU that would have to emulate it, unless the user asks for it."""
        asked = any(word.partition("=")[0] == "--trainer.precision" for word in self.line.asked)
        on_cpu = self._on_cpu(config)
        # Lightning takes bf16 for a 16-mixed on a CPU too.
        if config["precision"] in ("bf16-mixed", "16-mixed") and on_cpu and not asked and not cpu_has_bfloat16():
            return "32-true"
        return config["precision"]

    def _folder(self, root: Path) -> Path:
        """The run's: that of the checkpoint it goes on from, unless another is asked for, or a new one."""
        if self.standing is not None and not self.config["new_run"]:
            run = run_of(Path(self.config["ckpt_path"]), self.recipe)
            elsewhere = any(word.partition("=")[0] == "--trainer.default_root_dir" for word in self.line.asked)
            if run is not None and not (elsewhere and run.parent != (root / folder_name(self.recipe)).absolute()):
                return Path(short_path(run))
        return new_run_folder(root, folder_name(self.recipe), self.claim)

    def _fit_callbacks(self, config: Mapping[str, Any], given: list[Callback]) -> list[Callback]:
        from zoo.training.callbacks import default_callbacks

        folder = str(self.folder / "checkpoints")
        kinds = {type(callback) for callback in given}
        added = [callback for callback in default_callbacks() if type(callback) not in kinds]
        if config["enable_checkpointing"] is not False:
            monitor = getattr(self.model, "monitor", None)
            if monitor and not any(isinstance(callback, ModelCheckpoint) for callback in given):
                metric, mode = monitor if isinstance(monitor, tuple) else (monitor, "max")
                added.append(BestCheckpoint(metric, mode, folder))
            self.last = next((one for one in given if isinstance(one, LastCheckpoint)), None)
            if self.last is None:
                self.last = LastCheckpoint()
                added.append(self.last)
            self.last.dirpath = self.last.dirpath or folder
            self.interrupt.last = self.last
        if not config["fast_dev_run"]:
            added.append(SaveConfig(self.parser, self.config, self.folder))
        return added

    def _loggers(self) -> list[Logger]:
        goes_on = self.standing is not None and (self.folder / "config.yaml").exists()
        steps = self.standing["steps"] if self.standing is not None and goes_on else None
        names = ["tensorboard"] if self.config["logger"] is None else self.config["logger"]
        return make_loggers(names, self.folder, folder_name(self.recipe), steps)


def _set_sweep(callbacks: Sequence[Callback], sweep: Mapping[str, Any]) -> None:
    from zoo.training.sampling import SamplingEvaluation, Sweep

    evaluations = [callback for callback in callbacks if isinstance(callback, SamplingEvaluation)]
    if not evaluations:
        raise ZooError("--sweep wants a recipe whose callbacks evaluate by sampling (zoo.training.SamplingEvaluation)")
    for callback in evaluations:
        callback.sweep = Sweep.of(sweep)


def _build(
    subcommand: str,
    recipe: str | Path,
    argv: Sequence[str],
    rich: bool,
    dry: bool = False,
    claim: bool = False,
    weights_given: bool = False,
) -> RecipeCLI:
    printed = [word for word in argv if word.partition("=")[0] == "--print_config"]
    if printed:  # only what can be built; the parser then prints it and exits
        build_dry(subcommand, recipe, [word for word in argv if word not in printed])
    checkpoints = SafeCheckpointIO()
    argv, own = _find_checkpoint(str(recipe), argv, checkpoints)
    with installed_only():
        line = command_line(recipe, argv, own)
        try:
            return RecipeCLI(line, subcommand, rich, dry, claim, checkpoints, weights_given)
        except ZooError:
            raise
        except Exception as error:  # a value of the user's that some class cannot live with
            raise ZooError(f"{line.name}: {innermost(error)}") from error


def build_dry(subcommand: str, recipe: str | Path, argv: Sequence[str] = ()) -> RecipeCLI:
    """The command line of a recipe, with its network on the meta device, its data module and callbacks; no trainer."""
    with torch.device("meta"):
        return _build(subcommand, recipe, argv, rich=False, dry=True)


def load_recipe(
    name: str | Path, overrides: Mapping[str, Any] | None = None
) -> tuple[LightningModule, LightningDataModule, Trainer]:
    """The module, data module and trainer of a recipe, ready for ``trainer.fit(module, datamodule)``.

    Args:
        name: a recipe's name (``mae/pocket``), a unique prefix of it, the path of a YAML file, or a leaderboard row
            (``mae:finetune_vit_b``): its recipe with its options.
        overrides: dotted keys and their values, as on the command line: ``{"trainer.max_epochs": 1}``.

    Raises:
        ZooError: unknown recipe or key, a value of a wrong type.
    """
    argv = []
    for key, value in (overrides or {}).items():
        argv.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    with quiet():
        cli = _build("fit", name, argv, rich=sys.stdout.isatty())
    return cli.model, cli.datamodule, cli.trainer


def run(subcommand: str, recipe: str, argv: Sequence[str], debug: bool = False) -> int:
    """``zoo SUBCOMMAND RECIPE ARGV``; returns the exit code (130 after Ctrl-C)."""
    if subcommand not in SUBCOMMANDS:
        raise ValueError(subcommand)
    begin = time.monotonic()
    with quiet(debug):
        source, words = _published_weights(subcommand, recipe, _one_list("--logger", argv))
        try:
            given = source is not None
            cli = _build(subcommand, recipe, words, rich=sys.stdout.isatty(), claim=True, weights_given=given)
        except Finished as error:
            print(f"zoo: {error}", file=sys.stderr)
            return 0
        try:
            if source is not None:
                average = _average_of_file(cli, source)
                cli.weights = load_published(cli.model, source, _card_of(recipe), cli.datamodule, average)
            outputs = _train(cli, [recipe, *argv], debug)
        finally:
            drop_empty(cli.folder)
    if isinstance(outputs, Stopped):
        return outputs.code
    if cli.trainer.is_global_zero:
        _finish(cli, outputs, [subcommand, recipe, *argv], time.monotonic() - begin)
    return 0


class Stopped:
    """A run that a signal ended; `code` is the command's exit code, 130 for Ctrl-C and 143 for SIGTERM."""

    def __init__(self, code: int) -> None:
        self.code = code


def _train(cli: RecipeCLI, words: list[str], debug: bool) -> Any:
    """What the trainer returns, or a Stopped."""
    trainer, options = cli.trainer, _options(cli)
    _announce(cli, options)
    before = signal.getsignal(signal.SIGINT)
    os.environ["ZOO_RUN_DIR"] = str(cli.folder)
    try:
        return getattr(trainer, cli.what)(cli.model, datamodule=cli.datamodule, **options)
    except SystemExit:
        # Lightning turns Ctrl-C into exit code 1.
        if trainer.state.status != "interrupted":
            raise
        return _interrupted(cli, words)
    except KeyboardInterrupt:
        return _interrupted(cli, words)
    except MisconfigurationException as error:
        raise ZooError(f"{cli.recipe}: {' '.join(str(error).split())}") from error
    except Exception as error:
        if debug:
            raise
        if text := of_a_loader(error) or of_memory(error) or _of_lightning(error):
            raise ZooError(f"{cli.recipe}: {text}") from error
        path = options.get("ckpt_path")
        if path and not cli.interrupt.begun and not isinstance(error, OSError | ImportError):
            reason = f"it lacks {error}" if isinstance(error, KeyError) else innermost(error)
            raise ZooError(f"{path}: {' '.join(reason.split())}") from error
        raise
    finally:
        os.environ.pop("ZOO_RUN_DIR", None)
        if signal.getsignal(signal.SIGINT) != before:
            signal.signal(signal.SIGINT, before)


def _of_lightning(error: BaseException) -> str | None:
    """What Lightning itself, such as a callback of its, says of a setting; None where another's code failed."""
    frames = list(traceback.walk_tb(error.__traceback__))
    own = bool(frames) and frames[-1][0].f_globals.get("__name__", "").startswith("lightning.")
    return innermost(error) if own and isinstance(error, RuntimeError | ValueError) else None


def _options(cli: RecipeCLI) -> dict[str, Any]:
    known = set(inspect.signature(getattr(Trainer, cli.what)).parameters) - _NOT_OPTIONS - {"self"}
    options = {key: cli.config_init[key] for key in known if key in cli.config_init}
    return options | ({"weights_only": True} if "weights_only" in known else {})


def _published_weights(subcommand: str, recipe: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The published weights that an evaluation starts from, and `argv` without the option that names them.

    Without `--weights`, a row is evaluated with those that it names, unless a checkpoint is given.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--weights=") else [word])]
    if "--weights" not in words:
        own = catalog.row(recipe)[1].weights if catalog.is_row(recipe) and subcommand != "fit" else None
        checkpoint = any(word.partition("=")[0] == "--ckpt_path" for word in words)
        return (None if checkpoint else own), words
    at = words.index("--weights")
    if subcommand == "fit":
        raise ZooError("--weights goes with validate, test and predict; a fit starts from --model.init_from")
    if at + 1 == len(words):
        raise ZooError("--weights wants the name of published weights or a file")
    return words[at + 1], words[:at] + words[at + 2 :]


def _average_of_file(cli: RecipeCLI, source: str) -> str | None:
    """The average that `--average` names within a file of weights. Published weights by name are one set, and a row
    may name the average that a run of it evaluates beside them."""
    if source not in catalog.list_weights():
        return cli.config["average"]
    if any(word.partition("=")[0] == "--average" for word in cli.line.asked):
        raise ZooError(f"--average chooses within a checkpoint or a file; {source} is one set of weights")
    return None


def _card_of(recipe: str) -> catalog.PaperCard:
    """The paper whose converters read weights for `recipe`."""
    if catalog.is_row(recipe):
        return catalog.row(recipe)[0]
    return catalog.paper(recipe_name(catalog.recipe_path(recipe)).partition("/")[0])


def _find_checkpoint(
    recipe: str, argv: Sequence[str], checkpoints: SafeCheckpointIO
) -> tuple[list[str], dict[str, Any]]:
    """`argv` with ``--ckpt_path last`` or ``best`` as the path in the newest run of this recipe, and the settings of
    that run: its seed, model and data."""
    words, content = _split_path(argv), read_recipe(catalog.recipe_path(recipe))
    if words.count("--ckpt_path") > 1:
        raise ZooError("--ckpt_path is given twice")
    if "--ckpt_path" not in words[:-1]:
        if content.get("ckpt_path") not in ("last", "best"):
            return words, {}
        words += ["--ckpt_path", content["ckpt_path"]]
    at = words.index("--ckpt_path") + 1
    if words[at] not in ("last", "best"):
        return words, {}
    root = _value_of(words, "--trainer.default_root_dir") or mapping(content.get("trainer")).get("default_root_dir")
    path = newest_checkpoint(Path(root or "runs"), run_name(recipe), words[at], checkpoints.peek)
    words[at] = str(path)
    if (run := run_of(path, run_name(recipe))) is None:
        return words, {}
    if first_process():
        print(f"model and data: as in {short_path(run / 'config.yaml')}, but for what the command line says")
    stated = read_recipe(run / "config.yaml")
    return words, {key: stated[key] for key in ("seed_everything", "model", "data") if stated.get(key) is not None}


def _split_path(words: Sequence[str]) -> list[str]:
    """`words` with ``--ckpt_path=X`` as two."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--ckpt_path=") else [word])]


def _one_list(key: str, words: Sequence[str]) -> list[str]:
    """`words` with all values of the option `key`, which may be given several times, in one list behind them."""
    kept: list[str] = []
    values: list[str] = []
    rest = iter(words)
    for word in rest:
        name, given, value = word.partition("=")
        if name != key:
            kept.append(word)
        elif (value := value if given else next(rest, "")) and not value.startswith("-"):
            values += [value] if not value.startswith("[") else yaml.safe_load(value)
        else:
            raise ZooError(f"{key} wants a name")
    return [*kept, f"{key}={json.dumps(values)}"] if values else kept


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
    for note in cli.line.notes:
        print(note)
    if ckpt := options.get("ckpt_path"):
        print(f"from {ckpt}")
    elif cli.weights:
        print(f"weights {cli.weights['name']}")
    elif cli.what != "fit":
        print("no --ckpt_path: the weights are those the recipe starts from", file=sys.stderr)
    sys.stdout.flush()


def _interrupted(cli: RecipeCLI, words: list[str]) -> Stopped:
    # Before the first batch SIGTERM is Lightning's to note.
    terminated = cli.interrupt.signal == signal.SIGTERM or cli.trainer.received_sigterm
    what = "terminated" if terminated else "interrupted"
    if cli.trainer.is_global_zero:
        if cli.last is not None and cli.last.path.exists():
            kept = _split_path(words)
            if "--ckpt_path" in kept:
                at = kept.index("--ckpt_path")
                del kept[at : at + 2]
            command = shlex.join([*kept, "--ckpt_path", str(short_path(cli.last.path))])
            print(f"\n{what}; resume with: zoo fit {command}", file=sys.stderr)
        else:
            print(f"\n{what}" + (" before a checkpoint was written" if cli.what == "fit" else ""), file=sys.stderr)
    return Stopped(143 if terminated else 130)


def _finish(cli: RecipeCLI, outputs: Any, command: list[str], seconds: float) -> None:
    if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    known = cli.last.metrics if cli.last is not None else {}  # where nothing was left to train
    metrics = {key: float(value) for key, value in scalars({**known, **cli.trainer.callback_metrics}).items()}
    cli.folder.mkdir(parents=True, exist_ok=True)
    if cli.what == "predict":
        print(f"predictions: {cli.folder / 'predictions.pt'}")
    else:
        said = telling(metrics, getattr(cli.datamodule, "num_classes", None))
        print("score: " + (" · ".join(numbers(said)) or "no metric was logged"))
    record = result_record(cli, metrics, command, seconds)
    if cli.what == "test" and catalog.is_row(cli.recipe):
        record["verdict"] = verdict(cli.recipe, metrics, [*cli.line.asked, *_set_by_its_run(cli)])
        print(verdict_line(record["verdict"]))
    files.write_json(cli.folder / "result.json", record)
    paths = [cli.last.last_model_path] if cli.last is not None else []
    paths += [getattr(callback, "best_model_path", "") for callback in cli.trainer.checkpoint_callbacks]
    for path in dict.fromkeys(short_path(path) for path in paths if path):
        print(f"checkpoint: {path}")
    if cli.what != "predict" and cli.config["report"]:
        _write_report(cli.folder)
    print(f"run: {short_path(cli.folder)} ({seconds:.0f} s)")
    if cli.what == "fit" and catalog.is_row(cli.recipe) and (row := catalog.row(cli.recipe)[1]).then:
        last = next(filter(None, paths), "CHECKPOINT")
        print(f"the row's {row.metric} comes of a second stage: {second_stage(row, short_path(last))}")


def _write_report(folder: Path) -> None:
    """The run's page; a run whose page cannot be written has ended well all the same."""
    try:
        from zoo.pages import report

        print(f"report: {short_path(report.write(folder))}")
    except Exception as error:
        print(f"zoo: no report of this run: {innermost(error)}", file=sys.stderr)


def _set_by_its_run(cli: RecipeCLI) -> list[str]:
    """The options by which the settings of the run that a test takes up differ from those of its row."""
    if not cli.line.own:
        return []

    def settings(one: RecipeCLI) -> dict[str, Any]:
        parts = yaml.safe_load(one.parser.dump(one.config, skip_none=False))
        return {
            f"{part}.{key}": value
            for part in ("model", "data")
            for key, value in {"class_path": parts[part]["class_path"], **(parts[part].get("init_args") or {})}.items()
        }

    of_row, here = settings(build_dry(cli.what, cli.recipe)), settings(cli)
    return [f"--{key}" for key in {**of_row, **here} if of_row.get(key) != here.get(key)]


@contextlib.contextmanager
def quiet(debug: bool = False) -> Iterator[None]:
    """Without Lightning's announcements and the warnings that call for nothing; all of them under `debug`."""
    if debug:
        yield
        return
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in (*names, "lightning.fabric.utilities.seed")]
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, category, file, *where, **line: (
        f"{message}\n"
        if Path(file).is_relative_to(Path(zoo.__file__).parent)
        else before(message, category, file, *where, **line)
    )
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for text in (
                ".*does not have many workers.*",
                ".*num_workers.*",
                ".*number of training batches .* is smaller than the logging interval.*",
                ".*could not find the monitored key.*",  # it raises where there was a validation
                ".*Checkpoint directory .* exists and is not empty.*",
                ".*dirpath has changed.*",
                ".*Experiment logs directory.*",
                ".*callbacks used to create the checkpoint need to be provided.*",
                ".*treespec.*",
                ".*sync_dist=True.*",  # what is logged without it is the first process's, or the same in all
                ".*all_gather is deprecated.*",
                ".*in eval mode at the start of training.*",
                ".*is not supported by the `ModelSummary`.*",
                ".*`LightningCLI`.*args.*",
                ".*LightningCLI's args parameter.*",
                ".*AMP with fp16 is not supported on CPU.*",
            ):
                warnings.filterwarnings("ignore", message=text)
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")
            yield
    finally:
        warnings.formatwarning = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
