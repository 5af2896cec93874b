"""Zips that someone else may have written: opened and unpacked within bounds."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from zoo.errors import ZooError

# Weights hardly shrink; a zip that would grow by more than this is none of weights.
_GROWTH, _SLACK = 32, 64 << 20
_MOST = 200_000  # files


def bound(size: int) -> int:
    """The number of bytes that weights of `size` stored bytes may unpack to."""
    return _GROWTH * size + _SLACK


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever is wrong with it while it is used ends in one line.

    Raises:
        ZooError: not a whole zip, or one that cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except ZooError:
        raise
    except Exception as error:  # BadZipFile, OSError, zlib.error, EOFError, NotImplementedError, RuntimeError ...
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ZooError(f"{path}: not a whole zip ({reason})") from error


def names(path: Path) -> list[str]:
    """The files in a zip; none for what is no zip."""
    if not zipfile.is_zipfile(path):
        return []
    with opened(path) as archive:
        return archive.namelist()


def check(archive: zipfile.ZipFile, path: Path, wanted: Sequence[str] | None = None) -> None:
    """Refuses a zip whose files (`wanted`, default all) are too many or unpack to far more than it is long.

    Raises:
        ZooError: it says how many bytes it would take.
    """
    entries = archive.infolist() if wanted is None else [archive.getinfo(name) for name in wanted]
    total = sum(entry.file_size for entry in entries)
    if total > bound(path.stat().st_size) or len(entries) > _MOST:
        size = path.stat().st_size
        raise ZooError(
            f"{path}: refused: a zip of {size:,} bytes that unpacks to {len(entries)} files of {total:,} bytes"
        )


@contextmanager
def unpacked(path: Path, wanted: Callable[[list[str]], Sequence[str]] = lambda names: names) -> Iterator[Path]:
    """A folder with the files of a zip (those `wanted` of all names), which goes when it was used; "..", drives and the
    leading slash of names are left out. An error that names the folder names the zip instead.

    Raises:
        ZooError: as of :func:`opened` and :func:`check`.
    """
    with opened(path) as archive, tempfile.TemporaryDirectory(prefix="zoo-zip-") as name:
        names = list(wanted(archive.namelist()))
        check(archive, path, names)
        archive.extractall(name, names)
        try:
            yield Path(name)
        except ZooError as error:
            raise ZooError(str(error).replace(name, str(path))) from error
