"""Sharded checkpoints of torch: read whole, and refused where reading them would run something."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

from zoo.command.cli import main
from zoo.errors import ZooError
from zoo.formats import shards


class Trap:
    def __reduce__(self) -> Any:
        return (open, ("pwned", "w"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "last.ckpt"


def _save(folder: Path, **odd: Any) -> None:
    net = torch.nn.Linear(3, 2)
    optimizer = {"state": {"weight": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}
    content = {"model": net.state_dict(), "optimizer_0": optimizer, **odd}
    checkpoint.save(content, checkpoint_id=folder, no_dist=True)


def test_what_torch_writes_is_taken(folder: Path) -> None:
    _save(folder)
    shards.check(folder)


@pytest.mark.parametrize("at", ["index", "part", "deepspeed", "cut"])
def test_what_would_run_is_refused(at: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if at == "deepspeed":
        folder.mkdir()
        (folder / "latest").write_text("x")
    else:
        _save(folder, **({"odd": Trap()} if at == "part" else {}))
    index = folder / ".metadata"
    if at == "index":
        index.write_bytes(pickle.dumps({"a": Trap()}))
    elif at == "cut":
        index.write_bytes(index.read_bytes()[:-20])
    with pytest.raises(ZooError, match=str(folder)):
        shards.check(folder)
    assert main(["fit", "mae/pocket", "--ckpt_path", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("pwned").exists()
