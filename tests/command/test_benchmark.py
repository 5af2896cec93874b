"""`zoo benchmark`, the throughput in the progress line, and `zoo fit --logger`."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.command import throughput
from zoo.command.cli import main
from zoo.command.progress import duration, samples_of
from zoo.errors import ZooError

FEW = ["--batch", "4", "--repeats", "3", "--warmup", "1", "--device", "cpu"]
SMALL = ["--data.train_samples", "64", "--data.batch_size", "32", "--model.optim.global_batch", "null"]
SMALL += ["--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu"]
SMALL += ["--model.depths", "[1, 1, 1]"]


@pytest.mark.parametrize(
    ("words", "what", "samples"),
    [
        (["preact_resnet20_cifar"], "forward", "images"),
        (["preact_resnet/pocket", "forward", "--channels_last", "--dtype", "bfloat16"], "forward", "images"),
        (["preact_resnet/pocket", "--threads", "1"], "train", "images"),
        (["slowfast/pocket", "data"], "data", "clips"),
        (["meanflow/pocket", "forward"], "forward", "samples"),
    ],
)
def test_a_measurement(
    words: list[str], what: str, samples: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *words, *FEW, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["what"], found["samples"], found["batch"], found["repeats"]) == (what, samples, 4, 3)
    assert len(found["seconds"]["all"]) == 3
    assert found["seconds"]["q25"] <= found["seconds"]["median"] <= found["seconds"]["q75"]
    assert found["samples_per_s"] == pytest.approx(4 / found["seconds"]["median"])
    assert found["peak_mib"] > 10
    assert found["device"]
    assert list(tmp_path.iterdir()) == []


def test_a_batch_is_doubled_while_it_pays_and_fits(monkeypatch: Any) -> None:
    def passes(batch: int) -> throughput.Measured:
        if batch == 32:
            raise torch.OutOfMemoryError
        return throughput.Measured([1.0], batch)

    def none(batch: int) -> throughput.Measured:
        raise torch.OutOfMemoryError

    def slower(batch: int) -> throughput.Measured:
        return throughput.Measured([max(1.0, batch / 4)], batch)

    auto, cpu = throughput.Setting(batch=None), torch.device("cpu")
    batch, _, tried = throughput.find_batch(passes, auto, cpu)
    assert (batch, [row["batch"] for row in tried]) == (16, [1, 2, 4, 8, 16])
    batch, _, tried = throughput.find_batch(slower, auto, cpu)
    assert (batch, [row["batch"] for row in tried]) == (4, [1, 2, 4, 8])
    with pytest.raises(ZooError, match="not even a batch of 1"):
        throughput.find_batch(none, auto, cpu)
    with pytest.raises(ZooError, match="--batch auto finds one"):
        throughput.find_batch(none, throughput.Setting(batch=8), cpu)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["preact_resnet20_cifar", "train"], "has no training data of its own"),
        (["preact_resnt"], "did you mean"),
        (["preact_resnet20_cifar", "--batch", "some"], "--batch is a number of samples or auto"),
        (["preact_resnet20_cifar", "--repeats", "0"], "--repeats is 1 or more"),
        (["preact_resnet20_cifar", "--device", "abacus"], "--device is cpu, cuda"),
        (["preact_resnet20_cifar", "backward"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, capsys: Any) -> None:
    assert main(["benchmark", *words]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1


def test_units() -> None:
    assert [duration(s) for s in (0.4, 61, 3661, 90_000)] == ["0:00", "1:01", "1:01:01", "1 d 1:00:00"]
    assert [samples_of(b) for b in ({"video": 1}, {"views": 1}, {"image": 1, "label": 2}, [1])] == [
        "clips",
        "images",
        "images",
        "samples",
    ]


# ------------------------------------------------------------------------------------------------ the line, the loggers


def _rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("runs/*/*/*/metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_line_tells_throughput_and_csv_alone_is_a_logger(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "[{class_path: zoo.command.progress.PlainProgress, init_args: {seconds: 0}}]"
    assert main(["fit", "preact_resnet/pocket", *SMALL, "--logger", "csv", "--trainer.callbacks", lines]) == 0
    told = capsys.readouterr().out
    number = r"[\d.e+]+"
    said = rf"epoch 1/1 batch 2/2 .* · {number} images/s, \d+% waiting for data, 0:\d\d left, {number} GiB\n"
    assert re.search(said, told), told
    (row,) = [row for row in _rows(tmp_path) if row.get("speed/samples_per_s")]
    seconds = float(row["time/data"]) + float(row["time/compute"])
    assert float(row["speed/samples_per_s"]) == pytest.approx(64 / seconds, rel=1e-3)
    assert float(row["memory/peak_mib"]) > 10
    assert "speed" not in told.partition("score:")[2]
    assert not list(tmp_path.rglob("events.*"))


@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "mlflow"])
def test_a_logger_goes_on_with_its_run(logger: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    if logger != "tensorboard" and importlib.util.find_spec(logger) is None:
        pytest.skip(f"wants pip install {logger}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for epochs, more in (("1", []), ("2", ["--ckpt_path", "last"])):
        words = ["fit", "preact_resnet/pocket", *SMALL, "--logger", logger, "--trainer.max_epochs", epochs, *more]
        assert main(words) == 0
        if logger == "wandb":
            importlib.import_module("wandb").finish()  # as the end of a process does
    assert _rows(tmp_path)
    (run,) = tmp_path.glob("runs/preact_resnet/pocket/*")
    if logger == "tensorboard":
        assert len(list(run.glob("events.*"))) == 2
    elif logger == "wandb":
        names = [path.name.rpartition("-preact")[2] for path in run.glob("wandb/offline-run-*")]
        assert len(names) == 2
        assert len(set(names)) == 1
    else:
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("preact_resnet/pocket")
        (found,) = client.search_runs([experiment.experiment_id])
        steps = {one.step for one in client.get_metric_history(found.info.run_id, "speed/samples_per_s")}
        assert steps == {1, 3}
        assert found.info.run_name == f"preact_resnet/pocket/{run.name}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--logger", "tb"], "unknown logger 'tb'; did you mean 'tensorboard'?"),
        (["--logger"], "--logger wants a name"),
        (["--logger", "csv", "--logger", "wandb"], "--logger wandb wants the package wandb: pip install wandb"),
    ],
)
def test_a_logger_that_is_not_there(words: list[str], line: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("zoo.command.logs.importlib.util.find_spec", lambda name: None)
    assert main(["fit", "preact_resnet/pocket", *words]) == 2
    assert line in capsys.readouterr().err
