"""FSDP2 (``--trainer.strategy fsdp2``): two processes compute what one does, and their sharded checkpoint goes on in
one process, is evaluated and is opened as a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from tests.processes import in_processes
from tests.test_contract import Dealt
from zoo.errors import ZooError
from zoo.training import EMA, LastCheckpoint
from zoo.training.sharding import whole
from zoo.weights.runs import open_run


def _fit(folder: str, world: int, epochs: int, strategy: str, ckpt_path: str | None = None) -> dict[str, Tensor]:
    """Weights and averages after training, as one process holds them."""
    options = {
        "data.batch_size": 4,
        "data.train_samples": 16,
        "data.num_workers": 0,
        "model.optim.global_batch": 8,
        "model.optim.lr": 1e-3,
        "model.optim.schedule": "constant",
        "model.optim.warmup_epochs": 0,
        "trainer.max_epochs": epochs,
        "trainer.limit_val_batches": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.devices": world,
        "trainer.strategy": strategy,
        "trainer.logger": False,
        "trainer.enable_progress_bar": False,
        "trainer.enable_checkpointing": False,
        "trainer.callbacks": None,
        "trainer.gradient_clip_val": 1.0,
    }
    task, data, trainer = zoo.load_recipe("meanflow/pocket", options)
    if ckpt_path is None:
        data.train_sampler = lambda samples: Dealt(len(samples), data.seed, data.repeats, **data._place())
    ema = EMA(0.5)
    trainer.callbacks += [ema, LastCheckpoint(folder)]  # type: ignore[attr-defined]
    trainer.fit(task, datamodule=data, ckpt_path=ckpt_path)
    weights = {name: whole(value).detach().clone() for name, value in task.state_dict().items()}
    averages = {f"ema {name}": whole(value).clone() for name, value in ema.weights.items()}
    last = Path(folder, "last.ckpt")
    content = torch.load(last / "meta.pt" if last.is_dir() else last, weights_only=True)
    return {**weights, **averages, "steps": torch.tensor([trainer.global_step, content["zoo_run"]["steps"]])}


def _close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            other[name], value, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_two_processes_to_one(tmp_path: Path) -> None:
    plain = _fit(str(tmp_path / "plain"), 1, 1, "auto")
    first, second = in_processes(2, _fit, str(tmp_path / "two"), 2, 1, "fsdp2")
    _close(first, second)
    _close(plain, first)
    shards = tmp_path / "two" / "last.ckpt"
    assert len(list(shards.glob("*.distcp"))) == 2

    model = open_run(str(shards))  # its average
    state = model.network.state_dict()
    _close(
        {name.removeprefix("ema network."): value for name, value in first.items() if name.startswith("ema network.")},
        state,
    )

    (resumed,) = in_processes(1, _fit, str(tmp_path / "one"), 1, 2, "fsdp2", str(shards))
    _close(_fit(str(tmp_path / "more"), 1, 2, "auto", str(tmp_path / "plain" / "last.ckpt")), resumed)
    assert resumed["steps"].tolist() == [4, 4]
    assert list((tmp_path / "one" / "last.ckpt").glob("*.distcp"))


def test_without_fsdp2_a_sharded_checkpoint_is_not_gone_on_from(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shards = tmp_path / "last.ckpt"
    shards.mkdir()
    torch.save({"loops": {}, "lr_schedulers": [], "global_step": 1}, shards / "meta.pt")
    monkeypatch.setattr("zoo.command.recipes.check_shards", lambda path: None)
    (shards / ".metadata").touch()
    from zoo.command.recipes import run

    with pytest.raises(ZooError, match="a sharded checkpoint goes on with"):
        run("fit", "meanflow/pocket", ["--ckpt_path", str(shards)])
