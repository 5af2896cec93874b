"""Settings that every test shares: one thread a worker, no network, a cache of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads of a test land in its own folder, never in the user's cache."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path_factory.mktemp("zoo_home")))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and published layouts beside the checkout; a test that wants it skips without it."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared (real data, published layouts) is not here")
    return SHARED
