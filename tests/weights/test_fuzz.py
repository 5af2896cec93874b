"""The fuzz of weight files, in short; tests/weights/fuzz_weights.py --count 300 is the whole of it."""

from __future__ import annotations

import sys

import pytest

from tests.weights import fuzz_weights


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds the memory of a child process by its pages")
def test_spoilt_files_of_every_format_end_in_a_line_or_a_network() -> None:
    for package in ("msgpack", "tensorstore"):
        pytest.importorskip(package, reason="half of the formats are JAX's")
    assert fuzz_weights.run(range(30)) == []
