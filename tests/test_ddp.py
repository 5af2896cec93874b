"""Two processes (gloo) compute what one computes: the same updates, the same metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT


def _run(what: str, devices: int, out: Path) -> Path:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ddp_mae", what, str(devices), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return out


def test_mae_updates_are_the_same_in_one_and_two_processes(tmp_path: Path) -> None:
    one = torch.load(_run("fit", 1, tmp_path / "one.pt"), weights_only=True)
    two = torch.load(_run("fit", 2, tmp_path / "two.pt"), weights_only=True)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def test_metrics_are_the_same_in_one_and_two_processes(tmp_path: Path) -> None:
    one = json.loads(_run("metric", 1, tmp_path / "one.json").read_text())
    two = json.loads(_run("metric", 2, tmp_path / "two.json").read_text())
    assert one == pytest.approx(two, rel=1e-6)
    assert any("top1" in name for name in one)
