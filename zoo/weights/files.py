"""Files that someone else may have written: what they are, and checkpoints of runs, read without running anything."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.formats import pytorch


def check_file(path: Path) -> None:
    """Refuses what cannot be a file of weights: nothing there, a folder, a FIFO or device, an empty file, a page.

    Raises:
        ZooError: one line that names the path and what lies there.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ZooError(f"{path}: is a folder, not a file")
        if not stat.S_ISREG(mode):
            raise ZooError(f"{path}: is no regular file (a pipe, socket or device)")
        with path.open("rb") as file:
            head = file.read(512)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ZooError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ZooError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not head:
        raise ZooError(f"{path}: not a whole file of weights: it is empty")
    if kind := page(head):
        raise ZooError(f"{path}: not a file of weights but {kind}")


def page(head: bytes) -> str | None:
    """What a server gives in place of a file, told by the first bytes: a page, or a pointer to where the file lies."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<!--", b"<body")):
        return "an HTML page"
    if start.startswith((b"<?xml", b"<error")):
        return "an XML page"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    return None


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint of a run (Lightning's), always with ``weights_only``: nothing in it is executed.

    Raises:
        ZooError: one line that names the file and the reason: nothing there, a folder, a pipe, empty, a page, not
            whole, something in it that no checkpoint holds (named by place and type), or weights without a run.
    """
    path = Path(path)
    check_file(path)
    if not pytorch.is_checkpoint(path):
        raise ZooError(f"{path}: not a checkpoint of a run, or not a whole one")
    try:
        content = pytorch.read(path, map_location=map_location)
    except ZooError as error:
        raise ZooError(f"{path}: {error}") from error
    wanted = ("pytorch-lightning_version", "state_dict", "global_step")
    missing = [key for key in wanted if not isinstance(content, dict) or key not in content]
    if missing:
        raise ZooError(f"{path}: weights, not a checkpoint of a run: it holds no {missing[0]!r}")
    return content
