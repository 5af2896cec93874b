"""Kill runs of the pocket recipes at random moments, resume them, and compare with runs that were never killed.

The suite does a few trials of one recipe; all: `python -m tests.command.kill_and_resume --trials 100`.

A trial starts a shrunken run, ends it one to three times (SIGKILL, SIGTERM, SIGINT, SIGKILL amid a write of a
checkpoint or amid its taking its name, SIGKILL of one of two ranks), resumes it with ``--ckpt_path last`` and compares
weights, averages, queues, optimisers, schedules, the state of callbacks, every row that was logged (a fingerprint of
each batch among them), the score and the best checkpoint: bit by bit. TMPDIR lies on another file system than the
runs. Processes are forked from one that has imported everything, so that a start costs a second.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from zoo import catalog, files
from zoo.machine import OF_THE_MACHINE

KINDS = ("kill", "term", "int", "writing", "naming")
HERE = "tests.command.kill_and_resume"


class Order(L.Callback):
    """Logs a fingerprint of each training batch."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("order", _fingerprint(batch), on_step=True, on_epoch=False, batch_size=1)


def _fingerprint(value: Any) -> float:
    if isinstance(value, torch.Tensor):
        return float(torch.nan_to_num(value.double()).sum())
    if isinstance(value, dict):
        return sum(_fingerprint(entry) for entry in value.values())
    return sum(_fingerprint(entry) for entry in value) if isinstance(value, list | tuple) else 0.0


def _callbacks(*more: str) -> str:
    last = "{class_path: zoo.training.LastCheckpoint, init_args: {every_n_train_steps: 2}}"
    return f"--trainer.callbacks=[{', '.join([*more, last, f'{{class_path: {HERE}.Order}}'])}]"


_PROBE = "{class_path: zoo.training.LinearProbe, init_args: {epochs: 2, warmup_epochs: 0}}"
_SAMPLING = (
    "{class_path: zoo.training.SamplingEvaluation, init_args: {num_samples: 16, extractor: random, reference: val,"
    " labels: balanced, every_n_epochs: 1, batch_size: 16}}"
)
_VIT = "--model.embed_dim=16 --model.depth=1 --model.num_heads=2"
_IMAGES = '--data.options={"max_objects":1,"length":40} --data.train_samples=40 --data.batch_size=8'
_MOCO = "--model.width=8 --model.dim=8 --model.queue_size=16"
# What makes each recipe small: five batches an epoch.
SMALL = {
    "mae/pocket": f"{_VIT} {_IMAGES} --model.decoder_embed_dim=16 --model.decoder_depth=1 --model.decoder_num_heads=2"
    " --model.optim.global_batch=8",
    "moco/pocket": f"{_MOCO} {_IMAGES} --model.optim.global_batch=8",
    "moco_v2/pocket": f"{_MOCO} {_IMAGES} --model.optim.global_batch=16",  # two batches a step
    "preact_resnet/pocket": f"{_IMAGES} --model.depths=[1,1,1] --model.widths=[8,8,8] --model.optim.global_batch=8",
    "flip/pocket": f"{_VIT} {_IMAGES} --model.text_embed_dim=16 --model.text_depth=1 --model.text_num_heads=2"
    " --model.proj_dim=8 --data.eval_batch_size=8 --model.optim.global_batch=8",
    "varc/pocket": f"{_VIT} --model.mlp_dim=16 --data.batch_size=4 --data.eval_batch_size=4"
    ' --data.options={"tasks":2,"pairs":12,"max_side":6} --trainer.limit_train_batches=5',
    "mask_rcnn/pocket": "--model.fpn.channels=8 --model.resnet.channels=8 --model.resnet.stem_channels=8"
    " --model.box.fc_channels=8 --model.mask.channels=8 --model.mask.convs=1 --data.train_samples=10"
    " --data.batch_size=2 --data.eval_batch_size=2 --model.optim.global_batch=2",
    "meanflow/pocket": f"{_VIT} {_IMAGES} --data.eval_batch_size=8 --model.optim.global_batch=8",
    "slowfast/pocket": "--model.width=8 --data.train_samples=20 --data.batch_size=4 --model.optim.global_batch=4",
}
MORE = {
    "mae/pocket": [_PROBE],
    "moco/pocket": ["{class_path: zoo.training.EMA, init_args: {decay: 0.9, name: slow}}"],
    "moco_v2/pocket": ["{class_path: zoo.training.EMA, init_args: {decay: 0.9}}"],
    "preact_resnet/pocket": [
        "{class_path: zoo.training.PreciseBN, init_args: {num_batches: 2}}",
        "{class_path: zoo.training.EMA, init_args: {decay: 0.9, every_n_steps: 2}}",
    ],
    "varc/pocket": ["{class_path: zoo.training.Pictures, init_args: {count: 2}}"],
    "meanflow/pocket": ["{class_path: zoo.training.EMA, init_args: {decay: 0.9}}", _SAMPLING],
}
# How an epoch can lie: validated at its end, in its middle, every second one; ended by epochs or by steps.
WAYS = (
    "--trainer.max_epochs=2 --trainer.check_val_every_n_epoch=1",
    "--trainer.max_epochs=-1 --trainer.max_steps=12 --trainer.check_val_every_n_epoch=2",
    "--trainer.max_epochs=2 --trainer.check_val_every_n_epoch=1 --trainer.val_check_interval=0.4",
)
COMMON = (
    "--trainer.limit_val_batches=2 --trainer.num_sanity_val_steps=1 --trainer.log_every_n_steps=1"
    " --trainer.precision=32-true --trainer.accelerator=cpu --trainer.enable_progress_bar=false"
)
# Test-time training keeps the answers to each task; a test begun again goes on with the tasks that are left.
TTT = "varc/pocket_ttt"
TTT_WORDS = (
    f"test {TTT} {_VIT} --model.mlp_dim=16 --model.permutations=2 --model.views=1 --data.limit=4"
    " --model.optim.warmup_epochs=0 --trainer.max_epochs=2 --trainer.precision=32-true --trainer.accelerator=cpu"
)
RECIPES = [*sorted(SMALL), TTT]


@dataclass(frozen=True)
class Setting:
    """One of the shrunken runs."""

    recipe: str
    way: int = 0
    ranks: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """How it can be ended; test-time training writes no checkpoints."""
        return KINDS[:3] if self.recipe == TTT else KINDS

    def words(self, resume: bool) -> list[str]:
        if self.recipe == TTT:
            return TTT_WORDS.split()
        words = ["fit", self.recipe, *SMALL[self.recipe].split(), *COMMON.split(), *WAYS[self.way].split()]
        words += [_callbacks(*MORE.get(self.recipe, []))]
        if self.ranks > 1:
            batch = int(re.findall(r"--data.batch_size=(\d+)", SMALL[self.recipe])[0])
            words += [f"--trainer.devices={self.ranks}", "--trainer.strategy=ddp"]
            words += [f"--data.batch_size={batch // self.ranks}"]
        return words + (["--ckpt_path", "last"] if resume else [])


def warm() -> None:
    """Imports what runs import, so that forked processes need not."""
    torch.set_num_threads(1)  # a fork keeps no threads

    for name in RECIPES:
        catalog.recipe_path(name)
    from zoo.beyond import varc  # noqa: F401
    from zoo.detection import mask_rcnn  # noqa: F401
    from zoo.generation import meanflow  # noqa: F401
    from zoo.metrics import generation  # noqa: F401
    from zoo.multimodal import flip  # noqa: F401
    from zoo.recognition import preact_resnet  # noqa: F401
    from zoo.selfsup import mae, moco  # noqa: F401
    from zoo.video import slowfast  # noqa: F401


def _fork(folder: Path, words: list[str], environment: dict[str, str], trap: Callable[[], None] | None = None) -> int:
    """Starts `zoo WORDS` in `folder`; its process id. `trap` is set in the child before."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        with (folder / "log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(folder)
        os.environ.update(environment)
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from lightning.pytorch.utilities import rank_zero_only

        from zoo.command.cli import main

        rank_zero_only.rank = int(environment.get("RANK", 0))  # type: ignore[attr-defined]
        if trap is not None:
            trap()
        code = main(words)
    except KeyboardInterrupt:  # it came before the command began
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _start(folder: Path, setting: Setting, other: str, trap: Callable[[], None] | None = None) -> list[int]:
    """Starts or resumes the run in `folder`; the ids of its processes."""
    resume = bool(list(folder.glob(f"runs/{setting.recipe}/*/checkpoints/[lp]*.ckpt")))
    environment = {"TMPDIR": other, "ZOO_HOME": str(Path(other) / "home")}
    words = setting.words(resume)
    if setting.ranks == 1:
        return [_fork(folder, words, environment, trap)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(setting.ranks)}
    environment |= {"TORCHELASTIC_RUN_ID": "kill", "LOCAL_WORLD_SIZE": str(setting.ranks), "GROUP_RANK": "0"}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(setting.ranks)]
    return [_fork(folder, words, environment | rank, trap if not int(rank["RANK"]) else None) for rank in ranks]


def _wait(children: list[int], seconds: float = 120) -> list[int]:
    """Exit codes, negative for a signal; after `seconds` what is left is killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    return [codes[child] for child in children]


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _trap_writing(at: int) -> Callable[[], None]:
    def trap() -> None:
        plain, count = files._Noting.write, 0

        def write(self: Any, data: Any) -> int:
            nonlocal count
            count += 1
            if count == at:
                plain(self, bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, data)

        files._Noting.write = write  # type: ignore[method-assign]

    return trap


def _trap_naming(at: int, before: bool) -> Callable[[], None]:
    def trap() -> None:
        plain, count = os.replace, 0

        def replace(source: Any, target: Any, **options: Any) -> None:
            nonlocal count
            count += str(target).endswith(".ckpt")
            if count == at and before:
                os.kill(os.getpid(), signal.SIGKILL)
            plain(source, target, **options)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace  # type: ignore[assignment]

    return trap


class Failed(Exception):
    """A run ended as it should not."""


def _log(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")[-3000:]


def uninterrupted(folder: Path, setting: Setting, other: str) -> tuple[dict[str, Any], int]:
    """What a run left alone ends with, and how many rows it logged."""
    folder.mkdir(parents=True)
    if any(_wait(_start(folder, setting, other))):
        raise Failed(_log(folder))
    return outcome(folder, setting), _rows(folder, setting)


def _rows(folder: Path, setting: Setting) -> int:
    """The rows that the newest run in `folder` has logged, or the tasks it has answered."""
    if setting.recipe == TTT:
        return len(list(folder.glob("runs/varc_ttt/**/*.json")))
    found = sorted(folder.glob(f"runs/{setting.recipe}/*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    return found[-1].read_text().count("\n") if found else 0


def killed(
    folder: Path, setting: Setting, other: str, draw: random.Random, rows: int, first: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """What a run ends with that was ended one to three times and resumed, and how it was ended.

    Args:
        rows: that the run left alone logged.
        first: how it is ended the first time; the rest is drawn.
    """
    folder.mkdir(parents=True)
    ends: list[str] = []
    for number in range(draw.choice([1, 2, 3])):
        kind = first if first and not number else draw.choice(setting.kinds)
        trap = None
        if kind == "writing":
            trap = _trap_writing(draw.randrange(1, 400))
        elif kind == "naming":
            trap = _trap_naming(draw.randrange(1, 8), draw.random() < 0.5)
        children = _start(folder, setting, other, trap)
        if trap is None:
            done = _rows(folder, setting)
            wanted_rows, pause = draw.randrange(done, max(rows, done + 1)), draw.random() * 0.3
            if not number:  # well before its end, so that every trial ends a run once
                wanted_rows, pause = min(wanted_rows, rows // 2), 0.0
            while _rows(folder, setting) < wanted_rows and not _ended(children[0]):
                time.sleep(0.002)
            time.sleep(pause)
            number_of = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[kind]
            targets = [draw.choice(children)] if kind == "kill" else children
            for child in targets:
                os.kill(child, number_of)
        codes = _wait(children, 10 if kind == "kill" else 120)  # as torchrun ends the ranks that are left
        if not any(codes):
            break
        wanted = {"term": (143, -signal.SIGTERM), "int": (130,)}.get(kind, (-signal.SIGKILL,))
        if setting.ranks == 1 and codes[0] not in wanted:
            raise Failed(f"{kind}: exit code {codes[0]}\n{_log(folder)}")
        ends.append(kind)
    else:
        codes = _wait(_start(folder, setting, other))
        if any(codes):
            raise Failed(f"exit codes {codes} after {ends}\n{_log(folder)}")
    return outcome(folder, setting), ends


def outcome(folder: Path, setting: Setting) -> dict[str, Any]:
    """All that a finished run ended with, but for times and paths."""
    runs = sorted(path.parent for path in folder.glob(f"runs/{setting.recipe}/*/result.json"))
    if not runs or (len(runs) > 1 and setting.recipe != TTT):
        raise Failed(f"{len(runs)} finished runs\n{_log(folder)}")
    run = runs[-1]
    found: dict[str, Any] = {}
    if setting.recipe == TTT:
        metrics = json.loads((run / "result.json").read_text())["metrics"]
        answers = {path.name: path.read_text() for path in folder.glob("runs/varc_ttt/**/*.json")}
        return metrics | {name: text for name, text in answers.items() if name != "settings.json"}
    for name in ("last", "best"):
        path = run / "checkpoints" / f"{name}.ckpt"
        if path.exists():
            content = torch.load(path, weights_only=True)
            content.get("callbacks", {}).pop("Timing", None)
            for key in ("loops", "zoo_run", "hparams_name"):
                content.pop(key, None)
            for place, value in _leaves(content, name):
                if not isinstance(value, str):
                    found[place] = value
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            values = {key: value for key, value in row.items() if value and not key.startswith(OF_THE_MACHINE)}
            if len(values) > 2:
                found[f"log {row['step']} {sorted(values)}"] = values
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    return found | {f"score {key}": value for key, value in metrics.items() if not key.startswith(OF_THE_MACHINE)}


def _leaves(value: Any, place: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        named = [(Path(key).name if str(key)[:1] == "/" else key, entry) for key, entry in value.items()]
        return [leaf for key, entry in named for leaf in _leaves(entry, f"{place}.{key}")]
    if isinstance(value, list | tuple):
        return [leaf for key, entry in enumerate(value) for leaf in _leaves(entry, f"{place}.{key}")]
    return [(place, value)]


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of what is not bit-identical."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return isinstance(y, torch.Tensor) and x.dtype == y.dtype and x.equal(y)
        return x == y or (x != x and y != y)

    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name]))


def trials(
    count: int, seed: int, folder: Path, recipes: list[str], report: Callable[[str], None], first: int = 0
) -> dict[str, int]:
    """Runs `count` trials over the recipes in turn, from number `first` on.

    Returns:
        how many of each recipe ended bit-identical, and under "ends" how often runs were ended.
    """
    draw = random.Random(seed)
    shared = Path("/dev/shm")
    other = tempfile.mkdtemp(dir=shared if shared.is_dir() else None)
    references: dict[Setting, tuple[dict[str, Any], int]] = {}
    good: dict[str, int] = {}
    try:
        for trial in range(first, first + count):
            recipe = recipes[trial % len(recipes)]
            turn = trial // len(recipes)
            setting = Setting(recipe, turn % len(WAYS), 2 if turn % 5 == 4 else 1)
            if recipe == TTT:
                setting = Setting(recipe)
            place = folder / f"trial{trial}"
            kind = "kill" if setting.ranks > 1 else setting.kinds[turn % len(setting.kinds)]
            try:
                if setting not in references:
                    references[setting] = uninterrupted(folder / f"alone{trial}", setting, other)
                reference, rows = references[setting]
                found, ends = killed(place, setting, other, draw, rows, kind)
                differing = compare(reference, found)
            except Failed as error:
                ends, differing = [], [str(error)]
            good[recipe] = good.get(recipe, 0) + (not differing)
            good["ends"] = good.get("ends", 0) + len(ends)
            ways = f"{WAYS[setting.way].split()[0][10:]}, {setting.ranks} rank{'s' * (setting.ranks > 1)}"
            report(f"trial {trial}: {recipe} ({ways}) ended by {' '.join(ends) or 'nothing'}: {len(differing)} differ")
            for line in differing[:4]:
                report(f"    {line}")
            if not differing:
                shutil.rmtree(place)
                shutil.rmtree(folder / f"alone{trial}", ignore_errors=True)
    finally:
        shutil.rmtree(other, ignore_errors=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the number of the first trial, which says its settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--keep", help="a folder for the runs; kept")
    arguments = parser.parse_args()
    warm()
    folder = Path(arguments.keep or tempfile.mkdtemp())
    good = trials(
        arguments.trials,
        arguments.seed,
        folder,
        arguments.recipes,
        lambda text: print(text, flush=True),
        arguments.first,
    )
    ends = good.pop("ends", 0)
    for recipe, count in good.items():
        print(f"{recipe}: {count}")
    total = sum(good.values())
    print(f"{total} of {arguments.trials} resumed runs ended bit-identical; runs were ended {ends} times")
    if not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return int(total < arguments.trials)


if __name__ == "__main__":
    sys.exit(main())
