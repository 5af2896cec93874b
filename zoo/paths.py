"""Where the declarations lie and where downloads go."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def share(kind: str) -> Path:
    """The folder of a kind of declaration: recipes, data, benchmarks, parity/cases or parity/adapters.

    In a checkout it stands beside the package, so that an edit counts at once; in a wheel inside it.
    """
    inside = _PACKAGE / "share" / kind
    if inside.is_dir():
        return inside
    return _PACKAGE.parent / ("tests/" + kind if kind.startswith("parity/") else kind)


def cache_dir() -> Path:
    """The folder for downloaded weights and data: ``$ZOO_HOME``, else the platform's cache folder."""
    if home := os.environ.get("ZOO_HOME"):
        return Path(home).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("zoo")
