"""The short form of ``python tests/data/fuzz_data.py --count 200``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.fuzz_data import KINDS, look_in_time, make


@pytest.mark.parametrize("kind", KINDS)
def test_sets_with_something_wrong_are_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    for seed in range(list(KINDS).index(kind), 8 * len(KINDS), len(KINDS)):
        look_in_time(*make(seed, tmp_path))
