"""Where the declarations lie and where downloads go."""

from __future__ import annotations

import os
from pathlib import Path

from zoo.errors import ZooError

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
    from platformdirs import user_cache_path

    try:
        if home := os.environ.get("ZOO_HOME"):
            return Path(home).expanduser()
        return user_cache_path("zoo")
    except RuntimeError as error:  # no HOME, and no entry of this user
        raise ZooError("no home folder is known: set HOME, or ZOO_HOME to a folder for what is downloaded") from error
