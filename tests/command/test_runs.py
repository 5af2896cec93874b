"""Run folders, checkpoints and resuming: what is newest, what is taken up, and one line for every bad file."""

from __future__ import annotations

import contextlib
import csv
import datetime
import errno
import json
import os
import pickle
import re
import resource
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from tests.training.training_task import Classifier, trainer
from tests.training.training_task import Data as Blobs
from zoo import files
from zoo.command.cli import main
from zoo.command.logs import MetricsFile
from zoo.command.recipes import recipe_name
from zoo.command.runs import new_run_folder, newest_checkpoint, remember
from zoo.data.loader import EpochSampler, TrainLoader
from zoo.errors import ZooError
from zoo.machine import OF_THE_MACHINE
from zoo.paths import cache_dir
from zoo.training import LastCheckpoint


class Task(pl.LightningModule):
    """A linear regression whose validation is worst in the end."""

    monitor = ("val/loss", "min")

    def __init__(self, width: int = 3, lr: float = 0.1, bad_at: int = -1, momentum: float = 0) -> None:
        super().__init__()
        self.lr, self.bad_at, self.momentum = lr, bad_at, momentum
        self.layer = torch.nn.Linear(2, width)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.bad_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", float(abs(self.current_epoch - 1)))
        self.log("val/third", torch.tensor(1 / 3, dtype=torch.float64))

    test_step = validation_step

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, self.momentum)


class Set(torch.utils.data.Dataset):
    def __init__(self, length: int, fault: str) -> None:
        self.length, self.fault = length, fault

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.fault == "value":
            raise ValueError("picture 7 is torn")
        if self.fault == "zoo":
            raise ZooError("a.jpg: cannot be read")
        if self.fault == "memory":
            torch.empty(1 << 60)
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor([index, 1.0])


class Data(pl.LightningDataModule):
    def __init__(self, length: int = 12, fault: str = "") -> None:
        super().__init__()
        self.length, self.fault = length, fault

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(
            Set(self.length, self.fault), batch_size=4, num_workers=int(bool(self.fault))
        )

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Set(4, ""), batch_size=4)

    test_dataloader = predict_dataloader = val_dataloader


CONFIG = {
    "model": {"class_path": "tests.command.test_runs.Task"},
    "data": {"class_path": "tests.command.test_runs.Data"},
    "trainer": {"max_epochs": 4, "accelerator": "cpu", "log_every_n_steps": 1, "num_sanity_val_steps": 0},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def runs(here: Path) -> list[Path]:
    return sorted((here / "runs" / "toy").iterdir())


def step(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


# ------------------------------------------------------------------------------------------------------- last, best


def test_last_is_the_newest_state_and_best_the_best_over_all_parts(here: Path, capsys: Any) -> None:
    assert main(["fit", "toy.yaml", "--trainer.max_epochs", "3"]) == 0  # best in its second epoch
    (run,) = runs(here)
    kept = run / "checkpoints"
    assert (step(kept / "last.ckpt"), step(kept / "previous.ckpt"), step(kept / "best.ckpt")) == (9, 9, 6)
    assert main(["fit", "toy.yaml", "--ckpt_path", "last"]) == 0
    assert runs(here) == [run]
    assert (step(kept / "last.ckpt"), step(kept / "best.ckpt")) == (12, 6)
    with (run / "metrics.csv").open() as file:
        rows = [(int(row["step"]), row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert rows == [(2, "1.0"), (5, "0.0"), (8, "1.0"), (11, "2.0")]

    capsys.readouterr()
    before = sorted(here.rglob("*"))
    assert main(["fit", "toy.yaml", "--ckpt_path", "last"]) == 0
    assert "already at epoch 4 of 4; raise trainer.max_epochs" in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before

    words = ["--trainer.max_epochs", "5", "--new_run", "true"]
    assert main(["fit", "toy.yaml", "--ckpt_path", "last", *words]) == 0
    other = runs(here)[-1]
    assert other != run
    assert (step(other / "checkpoints" / "last.ckpt"), step(other / "checkpoints" / "best.ckpt")) == (15, 6)
    capsys.readouterr()
    assert main(["validate", "toy.yaml", "--ckpt_path", "best"]) == 0
    assert f"from runs/toy/{other.name}/checkpoints/best.ckpt" in capsys.readouterr().out


def test_a_run_stopped_before_its_result_was_written_writes_the_same(here: Path) -> None:
    assert main(["fit", "toy.yaml"]) == 0
    result = runs(here)[0] / "result.json"
    metrics = json.loads(result.read_text())["metrics"]
    assert metrics["val/third"] == 1 / 3
    result.unlink()
    assert main(["fit", "toy.yaml", "--ckpt_path", "last"]) == 0
    again = json.loads(result.read_text())["metrics"]
    assert {key: again[key] for key in again if not key.startswith(OF_THE_MACHINE)} == {
        key: metrics[key] for key in metrics if not key.startswith(OF_THE_MACHINE)
    }


@pytest.mark.parametrize("every", [["--trainer.check_val_every_n_epoch", "3"], ["--trainer.limit_val_batches", "0"]])
def test_last_needs_no_validation(here: Path, every: list[str]) -> None:
    assert main(["fit", "toy.yaml", *every]) == 0
    assert step(runs(here)[0] / "checkpoints" / "last.ckpt") == 12


def test_last_takes_the_settings_of_its_run(here: Path, capsys: Any) -> None:
    assert main(["fit", "toy.yaml", "--model.width", "5", "--data.length", "8", "--trainer.max_epochs", "1"]) == 0
    (run,) = runs(here)
    capsys.readouterr()
    assert main(["fit", "toy.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    assert f"model and data: as in runs/toy/{run.name}/config.yaml" in capsys.readouterr().out
    assert step(run / "checkpoints" / "last.ckpt") == 4
    assert main(["test", "toy.yaml", "--ckpt_path", "last"]) == 0
    capsys.readouterr()
    assert main(["fit", "toy.yaml", "--ckpt_path", "last", "--model.width", "4", "--trainer.max_epochs", "3"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "size mismatch" in err or "here" in err


def test_newest_is_no_matter_of_clocks_and_what_cannot_be_read_is_passed_over(here: Path, capsys: Any) -> None:
    root = here / "runs"
    for name in ("20260102-000000", "20260101-000000", "20260101-000000-2", "20260101-000000-10"):
        assert main(["fit", "toy.yaml", "--trainer.max_epochs", "1"]) == 0
        made = next(run for run in runs(here) if not re.match("202601", run.name))
        made.rename(root / "toy" / name)  # as the clock of another day would have called it
    os.utime(root / "toy" / "20260102-000000" / "checkpoints" / "last.ckpt", (2e9, 2e9))
    newest = root / "toy" / "20260101-000000-10" / "checkpoints"
    assert newest_checkpoint(root, "toy") == newest / "last.ckpt"
    remember(root / "toy" / "20260101-000000")
    assert newest_checkpoint(root, "toy").parent.parent.name == "20260101-000000"
    remember(newest.parent)
    (newest / "last.ckpt").write_bytes((newest / "last.ckpt").read_bytes()[:-100])
    assert newest_checkpoint(root, "toy") == newest / "previous.ckpt"
    assert f"passed over: {newest / 'last.ckpt'}" in capsys.readouterr().err
    (newest / "previous.ckpt").write_bytes(b"")
    assert newest_checkpoint(root, "toy").parent.parent.name == "20260101-000000"


def test_a_folder_is_claimed_and_its_name_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("zoo.command.runs.datetime.datetime", Clock)
    names = [new_run_folder(tmp_path, "a/b", claim=True).name for _ in range(3)]
    assert names == ["20260102-030405", "20260102-030405-2", "20260102-030405-3"]
    assert not new_run_folder(tmp_path, "a/b").exists()
    for head in ("/etc", "../../out", "a/../../b", "a//b", ".", "~", "a/.hidden", "a\\b", "x" * 300):
        (tmp_path / "mine.yaml").write_text(f"# recipe: {head}\nmodel: {{}}\n")
        assert recipe_name(tmp_path / "mine.yaml") == "mine"


# ---------------------------------------------------------------------------------------------------- bad checkpoints


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


def bad(kind: str, path: Path) -> None:
    good = {"pytorch-lightning_version": "2.5.0", "state_dict": {}, "global_step": 3, "epoch": 1}
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a truncated one":
        torch.save({**good, "loops": {}, "w": torch.zeros(999)}, path)
        path.write_bytes(path.read_bytes()[:-50])
    elif kind != "a missing one":
        content = {
            "an empty one": b"",
            "a page": b"<!DOCTYPE html><html></html>",
            "text": b"hello\n" * 99,
            "a pickle": pickle.dumps(Evil()),
        }
        if kind in content:
            path.write_bytes(content[kind])
        else:
            torch.save(
                {
                    "an evil one": {**good, "x": Evil()},
                    "a plain .pth": {"layer.weight": torch.zeros(3, 2)},
                    "weights only": good,
                    "a list": [1, 2],
                    "odd loops": {**good, "loops": 3, "optimizer_states": [], "lr_schedulers": []},
                }[kind],
                path,
            )


KINDS = ["a FIFO", "a folder", "a truncated one", "a missing one", "an empty one", "a page", "text", "a pickle"]
KINDS += ["an evil one", "a plain .pth", "weights only", "a list", "odd loops"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_checkpoint_is_one_line(kind: str, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    bad(kind, here / "bad.ckpt")
    assert main(["fit", "toy.yaml", "--ckpt_path", "bad.ckpt"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("zoo: ")
    assert err.count("\n") == 1
    assert "bad.ckpt" in err
    assert not (here / "executed").exists()
    assert not (here / "runs").exists()


@pytest.mark.parametrize("where", ["option", "yaml", "python"])
def test_no_address_is_opened_and_the_guard_stays_on(where: str, here: Path, capsys: Any) -> None:
    torch.save({"x": Evil()}, here / "evil.ckpt")
    for path, more in (("http://127.0.0.1:1/evil.ckpt", {}), ("evil.ckpt", {"weights_only": False})):
        if where == "python":
            import zoo

            module, data, trainer = zoo.load_recipe("toy.yaml")
            with pytest.raises(ZooError, match="evil"):
                trainer.fit(module, data, ckpt_path=path, **more)
        elif where == "yaml":
            (here / "own.yaml").write_text(yaml.safe_dump({**CONFIG, "ckpt_path": path, **more}))
            assert main(["test", "own.yaml"]) == 2
            assert capsys.readouterr().err.count("\n") == 1
        else:
            words = [f"--{key}={value}" for key, value in {"ckpt_path": path, **more}.items()]
            assert main(["fit", "toy.yaml", *words]) == 2
            assert capsys.readouterr().err.count("\n") == 1
    assert not (here / "executed").exists()


def test_another_recipes_checkpoint_is_one_line(here: Path, capsys: Any) -> None:
    trainer(max_epochs=1, callbacks=[LastCheckpoint(str(here))], enable_checkpointing=True).fit(Classifier(), Blobs())
    capsys.readouterr()
    for command in ("fit", "test"):
        assert main([command, "toy.yaml", "--ckpt_path", "last.ckpt"]) == 2
        err = capsys.readouterr().err
        assert "last.ckpt" in err.splitlines()[-1]


# ----------------------------------------------------------------------------------------- exact, wherever it was saved


class Ordered(Blobs):
    def train_dataloader(self) -> TrainLoader:
        data = super().train_dataloader().dataset
        sampler = EpochSampler(len(data))
        return TrainLoader(Keyed(data), batch_size=24, sampler=sampler)


class Keyed(torch.utils.data.Dataset):
    """A data set asked by the keys of the house's samplers."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        return self.data[key[0]]

    def __len__(self) -> int:
        return len(self.data)


class SaveAt(Checkpoint):
    """Saves `kept.ckpt` once, from a hook of this name at this optimiser step."""

    def __init__(self, hook: str, at: int, path: Path) -> None:
        def save(trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == at and not path.exists() and not trainer.sanity_checking:
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


HOOKS = ["on_train_batch_end", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end"]
WAYS: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_epochs": -1, "max_steps": 24},
    "seldom": {"max_epochs": 4, "check_val_every_n_epoch": 2},
    "halves": {"max_epochs": 2, "val_check_interval": 0.5},
}


@pytest.mark.parametrize("way", WAYS)
def test_resumed_twice_from_any_hook_equals_uninterrupted(way: str, tmp_path: Path) -> None:
    def fit(name: str, hook: str, at: int, ckpt_path: Path | None) -> tuple[Any, dict[str, Any], pl.Trainer]:
        pl.seed_everything(0, verbose=False)
        module, log = Classifier(noise=0.5), MetricsFile(tmp_path / name / "metrics.csv")
        last = LastCheckpoint(str(tmp_path / name))
        callbacks = [SaveAt(hook, at, tmp_path / f"{name}.ckpt"), last, ModelCheckpoint(tmp_path / name)]
        options = {"log_every_n_steps": 1, "enable_checkpointing": True, **WAYS[way]}
        run = trainer(callbacks=callbacks, logger=log, **options)
        run.fit(module, Ordered(), ckpt_path=ckpt_path)
        with log.path.open(newline="") as file:
            rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
        return module.state_dict(), {f"{row['step']} {sorted(row)}": row for row in rows if "time/data" not in row}, run

    weights, rows, run = fit("whole", "on_fit_end", -1, None)
    steps, total = run.global_step, run.num_training_batches
    places = [(hook, total) for hook in HOOKS[:-1]] + [("on_train_batch_end", total + 2), ("on_train_end", steps)]
    chosen = {"steps": [1, 3, 4], "seldom": [0, 5], "halves": [0, 1]}.get(way, range(len(places)))
    for number, (hook, at) in [(number, places[number]) for number in chosen]:
        first, second = f"{number}a", f"{number}b"
        fit(first, hook, at, None)
        kept = tmp_path / f"{first}.ckpt"
        if not kept.exists():
            assert hook.startswith("on_validation") or (way, hook) == ("halves", "on_validation_end")
            continue
        again = tmp_path / f"{second}.ckpt"
        if hook in ("on_train_batch_end", "on_train_epoch_end"):
            fit(second, "on_train_batch_end", min(2 * total, steps - 1), kept)
        found, logged, run = fit(f"{number}c", "on_fit_end", -1, again if again.exists() else kept)
        assert run.global_step == steps, hook
        assert all(found[name].equal(weights[name]) for name in weights), hook
        assert {key: row for key, row in rows.items() if key in logged} == logged, hook


def test_means_of_a_resumed_epoch_are_those_of_the_whole(tmp_path: Path) -> None:
    def fit(at: int, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(0, verbose=False)
        kept = SaveAt("on_train_batch_end", at, tmp_path / "kept.ckpt")
        run = trainer(max_epochs=1, callbacks=[kept], enable_checkpointing=True)
        run.fit(Classifier(noise=0.5), Ordered(), ckpt_path=ckpt_path)
        return run.callback_metrics

    whole = fit(4)
    resumed = fit(-1, tmp_path / "kept.ckpt")
    for name in ("train/loss", "train/loss_epoch", "train/loss_step"):
        assert whole[name].equal(resumed[name])


# ------------------------------------------------------------------------------------------ files, signals, loaders


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.json"
    files.write_json(path, {"a": 1})
    with contextlib.suppress(ZeroDivisionError), files.replacing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == {"a": 1}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match=re.escape(str(path))):
            files.save(torch.zeros(9999), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [one.name for one in path.parent.iterdir()] == ["x.json"]


def test_sigterm_keeps_the_state_and_says_how_to_go_on(here: Path, capsys: Any) -> None:
    assert main(["fit", "toy.yaml", "--model.bad_at", "4"]) == 143
    assert re.search(
        r"terminated; resume with: zoo fit toy.yaml .*--ckpt_path runs/\S+/last.ckpt", capsys.readouterr().err
    )
    (run,) = runs(here)
    assert step(run / "checkpoints" / "last.ckpt") == 5
    assert main(["fit", "toy.yaml", "--ckpt_path", "last"]) == 0
    assert step(run / "checkpoints" / "last.ckpt") == 12


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("value", "picture 7 is torn"),
        ("zoo", "zoo: toy: a.jpg: cannot be read"),
        ("killed", "a loader process"),
        ("memory", "zoo: toy: out of memory; a smaller data.batch_size"),
    ],
)
def test_an_error_in_a_loader_process_is_one_line(fault: str, line: str, here: Path, capsys: Any) -> None:
    assert main(["fit", "toy.yaml", "--data.fault", fault]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert not (here / "executed").exists()


def test_a_refused_resume_leaves_the_run_as_it_was(here: Path, capsys: Any) -> None:
    assert main(["fit", "toy.yaml", "--trainer.max_epochs", "1"]) == 0
    (run,) = runs(here)
    before = (run / "config.yaml").read_text()
    for option in ("--trainer.max_steps=2", "--model.width=5"):
        assert main(["fit", "toy.yaml", "--ckpt_path", "last", option]) in (0, 2)
        assert (run / "config.yaml").read_text() == before, option
    assert main(["fit", "toy.yaml", "--ckpt_path", "last", "--ckpt_path", "best"]) == 2
    assert "--ckpt_path is given twice" in capsys.readouterr().err
    assert main(["fit", "toy.yaml", "--ckpt_path", "last"]) == 0


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda c: c["state_dict"]["layer.weight"].fill_(torch.nan), "layer.weight holds NaN"),
        (lambda c: c["optimizer_states"].clear(), "0 optimisers"),
        (lambda c: c["optimizer_states"][0]["state"][0].update(momentum_buffer=torch.zeros(7)), "of another model"),
        (lambda c: c.update(loops=None), "it holds no 'loops'"),
    ],
)
def test_a_spoilt_state_is_not_gone_on_from(spoil: Any, line: str, here: Path, capsys: Any) -> None:
    assert main(["fit", "toy.yaml", "--trainer.max_epochs", "1", "--model.momentum", "0.9"]) == 0
    path = runs(here)[0] / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    spoil(content)
    torch.save(content, here / "odd.ckpt")
    capsys.readouterr()
    assert main(["fit", "toy.yaml", "--model.momentum", "0.9", "--ckpt_path", "odd.ckpt"]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_what_lightning_says_of_a_setting_is_one_line(here: Path, capsys: Any) -> None:
    callback = '[{"class_path": "EarlyStopping", "init_args": {"monitor": "val/none"}}]'
    assert main(["fit", "toy.yaml", "--trainer.callbacks", callback]) == 2
    err = capsys.readouterr().err
    assert "`val/none` which is not available" in err
    assert err.count("\n") == 1


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_a_full_disk_is_one_line(command: str, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.files.os.replace", full)
    assert main([command, "toy.yaml"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("zoo: No space left on device: ")


@pytest.mark.parametrize("root", ["n" * 300, "/proc/none", "toy.yaml"])
def test_a_folder_that_cannot_be_made_is_one_line(root: str, here: Path, capsys: Any) -> None:
    assert main(["fit", "toy.yaml", "--trainer.default_root_dir", root]) == 2
    err = capsys.readouterr().err
    assert root in err
    assert err.count("\n") == 1


def test_without_a_home_one_line_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ZOO_HOME")
    monkeypatch.setattr("platformdirs.user_cache_path", unknown)
    with pytest.raises(ZooError, match="ZOO_HOME"):
        cache_dir()


def test_events_half_closed_end_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C amid the closing of TensorBoard's file: its writer is closed, what holds it does not know."""
    from zoo.command.logs import Events

    events = Events(str(tmp_path), name="", version="1")
    events.log_metrics({"loss": 1.0}, 0)
    for writer in events.experiment.all_writers.values():
        writer.close()
    events.finalize("failed")

    def full(self: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(events.experiment), "flush", full)
    with pytest.raises(OSError, match="No space"):
        events.finalize("failed")
