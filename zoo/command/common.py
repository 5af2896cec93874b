"""What the commands share: a parser whose errors are a ZooError, JSON on stdout, and the files that words name."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from zoo.errors import ZooError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a ZooError."""

    def error(self, message: str) -> NoReturn:
        raise ZooError(f"{message} (see {self.prog} --help)")


def is_unicode(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def print_json(value: Any) -> int:
    print(json.dumps(value, indent=1, ensure_ascii=not is_unicode(sys.stdout), default=str))
    return 0


def use_ema_option(parser: argparse.ArgumentParser, where: str) -> None:
    text = f"{where}: the averaged weights, or the raw ones; default: the average where there is one"
    parser.add_argument("--use-ema", "--use_ema", action=argparse.BooleanOptionalAction, help=text)


def expand(words: Iterable[str | Path], endings: Sequence[str]) -> list[Path]:
    """The files that `words` name: files as they are, folders with all inside that end so, patterns such as *.jpg.

    Raises:
        ZooError: a folder or pattern with nothing in it.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            inside = list(files_in(path, endings))
            if not inside:
                raise ZooError(f"{word}: a folder without files that end in {', '.join(endings[:4])}, ...")
            found += inside
        elif any(mark in str(word) for mark in "*?[") and not path.exists():
            matched = [Path(one) for one in sorted(glob.glob(str(path), recursive=True)) if Path(one).is_file()]
            if not matched:
                raise ZooError(f"{word}: no file is named so")
            found += matched
        else:
            found.append(path)
    return found


def files_in(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    """All files below a folder that end so, in the order of their names; hidden ones are left out."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).parts
        if path.suffix.lower() in endings and path.is_file() and not any(part.startswith(".") for part in inner):
            yield path


def progress(total: int, what: str, least: int = 17) -> Any:
    """A bar on a terminal's stderr for `total` things, as a context that gives ``advance(count)``; nothing for few."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True,
        disable=total < least or not console.is_terminal,
    )  # fmt: skip
    bar.add_task(what, total=total)
    return bar
