"""A pocket run killed at random steps and resumed ends with the same weights, to the bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.command.kill_and_resume import compare, killed, uninterrupted

TRIALS = 5


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    reference, _ = uninterrupted(tmp_path / "reference")
    draw, kills = random.Random(0), 0
    for trial in range(TRIALS):
        weights, count = killed(tmp_path / f"trial{trial}", draw)
        kills += count
        assert compare(reference, weights) == []
    assert kills >= TRIALS - 1, "the runs ended before they could be killed; the test no longer tests"
