"""Runs that were killed and resumed end as those left alone, to the bit (short; all: tests.command.kill_and_resume)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    # In a process of its own: it forks, which none with threads should.
    words = ["--trials", "3", "--seed", "3", "--recipes", "preact_resnet/pocket", "--keep", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.command.kill_and_resume", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 resumed runs ended bit-identical" in done.stdout
    ends = int(done.stdout.rsplit("runs were ended ", 1)[1].split()[0])
    assert ends >= 1, "the runs ended before they could be stopped; the test no longer tests"
