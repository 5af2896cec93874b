"""Files that are there whole or not at all, on any file system, whatever kills the process; and modules from files."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; when the block ends well the file takes its place, else it vanishes.

    The bytes are on the disk before the name points to them, so that not even a power cut leaves half a file. The
    folder is made where it is missing.

    Raises:
        OSError: naming `path` and not the file beside it.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    part = path.with_name(f".{path.name[:80]}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        rename(part, path)
    except OSError as error:
        if error.filename is None or error.filename == str(part):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def rename(part: Path, path: Path) -> None:
    """`part` takes the place of `path`, its bytes and its name both on the disk."""
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        with contextlib.suppress(OSError):  # some file systems sync no folders
            os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """`text` as the UTF-8 file `path`, as :func:`replacing` does it."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """`value` as JSON in the file `path`, as :func:`replacing` does it."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def save(value: Any, path: str | Path) -> None:
    """`torch.save`, as :func:`replacing` does it; a full disk is an OSError here."""
    import torch

    with replacing(path) as part, open(part, "wb") as file:
        failed: list[OSError] = []
        try:
            torch.save(value, _Noting(file, failed))  # type: ignore[arg-type]
        except Exception as error:
            if failed:  # torch hides the cause behind an error of its own
                raise failed[0] from error
            raise


class _Noting:
    """A file that notes the error of a write that failed."""

    def __init__(self, file: Any, failed: list[OSError]) -> None:
        self._file, self._failed = file, failed

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._failed.append(error)
            raise

    def flush(self) -> None:
        self._file.flush()


def module_from(path: Path, name: str) -> ModuleType:
    """The module of the Python file at `path`, which runs now; `sys.modules` has it as `name`, unless it fails."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
