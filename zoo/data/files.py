"""Files that users bring: regular, of a sane size, in UTF-8; and the words for what in a set is left out."""

from __future__ import annotations

import json
import math
import os
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

MOST_BYTES = 1 << 30  # of a picture's file
MOST_CLASSES = 1 << 22
_MOST_TEXT = 1 << 36


def require_regular(path: str | os.PathLike[str], most: int = _MOST_TEXT) -> None:
    """Raises a :class:`ZooError` where opening a path could wait for ever (a pipe), never end (a device), or fill the
    memory (more than `most` bytes)."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError) as error:
        raise ZooError(f"cannot read {os.fspath(path)!r}: {reason(error)}") from error
    if stat.S_ISDIR(facts.st_mode):
        raise ZooError(f"cannot read {path}: it is a folder")
    if not stat.S_ISREG(facts.st_mode):
        raise ZooError(f"cannot read {path}: it is a pipe, a socket or a device, not a file")
    if facts.st_size > most:
        raise ZooError(f"cannot read {path}: it has {facts.st_size:,} bytes, more than {most:,}")


def read_bytes(path: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        ZooError: it is missing, too large, no regular file, or cannot be read.
    """
    require_regular(path, most)
    try:
        return Path(path).read_bytes()
    except (OSError, MemoryError) as error:
        raise ZooError(f"cannot read {path}: {reason(error)}") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """A text in UTF-8, without its byte-order mark.

    Raises:
        ZooError: as :func:`read_bytes`, or it is in another encoding; it names the line.
    """
    data = read_bytes(path, _MOST_TEXT)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ZooError(
            f"cannot read {path}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a json.

    Raises:
        ZooError: as :func:`read_bytes`, or it is no json.
    """
    data = read_bytes(path, _MOST_TEXT)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{path} is no json: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:200] or type(error).__name__


# ---------------------------------------------------------------------------------------------------- values in files


def whole_number(value: Any) -> int | None:
    """An int64 from a number or its text ("12", 12.0); None where it is none."""
    if isinstance(value, bool):
        return None
    try:
        number = int(value) if isinstance(value, int | str) else int(value) if float(value).is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and abs(number) < 1 << 63 else None


def finite_numbers(values: Any) -> list[float] | None:
    """A list of finite numbers or their texts; None where it is none."""
    if not isinstance(values, list):
        return None
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def numbered_classes(count: int, where: str) -> list[str]:
    """The names "0", "1", ... of classes that have none.

    Raises:
        ZooError: so many that the highest label can be no class.
    """
    if count > MOST_CLASSES:
        raise ZooError(f"{where}: the label {count - 1} would make {count:,} classes; labels number classes from 0")
    return [str(k) for k in range(count)]


# ----------------------------------------------------------------------------------------------------- what is left out


def in_words(counts: Mapping[str, int]) -> str:
    """ "3 boxes without area; 1 ..." of {"boxes without area": 3, ...}."""
    return "; ".join(f"{count} {what}" for what, count in counts.items())


def tell(name: str, *counts: Mapping[str, int]) -> None:
    """Warns once of what is odd in a set or left out of it."""
    if text := "; ".join(filter(None, map(in_words, counts))):
        warnings.warn(f"{name}: {text}", stacklevel=3)
