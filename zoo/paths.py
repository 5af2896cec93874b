"""Where the declarations lie and where downloads go. Nothing here reads a file, so that `zoo list` can look at once."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from zoo.errors import ZooError

FIELDS = ("recognition", "selfsup", "detection", "video", "multimodal", "generation", "beyond")

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


def card_files() -> Iterator[tuple[Path, bool]]:
    """The files of the papers' cards, and whether each is one of the user's own."""
    for field in FIELDS:
        yield from ((path, False) for path in sorted((_PACKAGE / field).glob("*.yaml")))
    for folder in filter(None, os.environ.get("ZOO_PAPERS", "").split(os.pathsep)):
        if not Path(folder).is_dir():
            raise ZooError(f"ZOO_PAPERS: no folder {folder!r}")
        yield from ((path.resolve(), True) for path in sorted(Path(folder).glob("*.yaml")))


def stamp(path: Path) -> str:
    """Changes when the file does."""
    facts = path.stat()
    return f"{facts.st_mtime_ns} {facts.st_size}"


def matching(names: Iterable[str], pattern: str | Sequence[str]) -> list[str]:
    """The `names` that match a shell `pattern` (or one of several), or contain it where it has no wildcard; sorted,
    each once."""
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not all(isinstance(one, str) for one in patterns):
        raise ZooError(f"a pattern is text such as 'mae*', or a list of such, not {pattern!r}")
    whole = [one if any(mark in one for mark in "*?[") else f"*{one}*" for one in patterns]
    return sorted({name for name in names if any(fnmatch.fnmatchcase(name, one) for one in whole)})
