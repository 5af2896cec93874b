"""Two processes (gloo) compute what one computes: the same updates, the same metrics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.papers import ddp_siamese
from tests.processes import in_processes


def _run(what: str, devices: int, out: Path, script: str) -> Path:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", script, what, str(devices), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return out


def test_moco_in_two_processes_is_what_its_equations_say(tmp_path: Path) -> None:
    """One permutation for all ranks, keys back in their order, equal queues, averaged gradients, BatchNorm apart."""
    done = [_run(what, 2, tmp_path / what, "tests.papers.ddp_moco") for what in ("fit", "replay")]
    ranks, expected = ([torch.load(f"{out}.{rank}", weights_only=True) for rank in range(2)] for out in done)
    assert torch.equal(ranks[0]["state"]["queue"], ranks[1]["state"]["queue"])
    assert torch.equal(ranks[0]["state"]["queue_ptr"], ranks[1]["state"]["queue_ptr"])
    assert ranks[0]["state"]["queue_ptr"].item() == 5 * 8 % 24
    for rank, wanted in zip(ranks, expected, strict=True):
        assert len(rank["gradients"]) == len(rank["losses"]) == 5
        torch.testing.assert_close(rank, wanted, rtol=1e-7, atol=1e-9)
    for name, value in ranks[0]["state"].items():
        apart = "running_" in name
        assert torch.equal(value, ranks[1]["state"][name]) != apart, name


def test_flip_gradients_are_the_same_in_one_and_two_processes(tmp_path: Path) -> None:
    """Pairs are contrasted over both, and gradients flow through the gathered features; encoding in pieces changes
    nothing."""
    runs = [("fit", 1), ("fit", 2), ("fit_in_pieces", 2)]
    one, *others = (
        torch.load(_run(what, n, tmp_path / f"{what}{n}", "tests.papers.ddp_flip"), weights_only=True)
        for what, n in runs
    )
    assert len(one["gradients"]) == 3
    assert {name for step in one["gradients"] for name in step} == one["state"].keys() - {"visual.pos_embed"}
    for other in others:
        torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("paper", sorted(ddp_siamese.TASKS))
def test_siamese_gradients_are_the_same_in_one_and_two_processes(paper: str) -> None:
    """BatchNorm sees both batches, and queries meet the keys of both, however they were shuffled."""
    one, two = ddp_siamese.fit(paper, 1), in_processes(2, ddp_siamese.fit, paper, 2)[0]
    assert len(one["gradients"]) == 3
    assert all(gradient.abs().max() > 0 for gradient in one["gradients"][-1].values())
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9)
