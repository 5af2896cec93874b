"""What `zoo list` shows, from an index kept in the cache folder, and tables on the terminal.

The index is made from the cards by :mod:`zoo.command.show` and holds until a file of theirs changes; while it does,
listing reads no card and imports neither YAML nor the schema.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zoo import __version__
from zoo.errors import unknown
from zoo.paths import cache_dir, card_files, matching, share, stamp


def rows_of(kind: str, pattern: str = "*", licence: str | None = None) -> list[dict[str, Any]]:
    """What ``zoo list KIND PATTERN`` shows: a dict of facts for each name, weights of a `licence` (a pattern) only."""
    rows = _index(kind)
    names = set(matching((row["name"] for row in rows), pattern))
    licences = set(matching((row["licence"] for row in rows), licence)) if licence is not None else None
    return [row for row in rows if row["name"] in names and (licences is None or row["licence"] in licences)]


def _index(kind: str) -> list[dict[str, Any]]:
    """All rows of a kind, kept until a file changes that they are made from."""
    files = [path for path, _ in card_files()]
    files += [*sorted(share("recipes").glob("*/*.yaml")), *sorted(share("data").glob("*.yaml"))]
    state = hashlib.sha256("\n".join([__version__, *(f"{path} {stamp(path)}" for path in files)]).encode()).hexdigest()
    store = cache_dir() / "listing.json"
    try:
        kept = json.loads(store.read_bytes())
        kept = kept["rows"] if kept["state"] == state else {}
        if kind in kept:
            rows: list[dict[str, Any]] = kept[kind]
            return rows
    except (OSError, ValueError, LookupError, TypeError):
        kept = {}
    from zoo.command import show

    rows = show.listing(kind)
    temporary = store.with_name(f"{store.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # a cache folder that cannot be written costs time, nothing else
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"state": state, "rows": {**kept, kind: rows}}), encoding="utf-8")
        os.replace(temporary, store)
    return rows


def print_listing(kind: str, rows: list[dict[str, Any]], pattern: str = "*") -> None:
    """The rows of :func:`rows_of` as a table. Raises ZooError where a `pattern` found nothing."""
    if not rows:
        known = [row["name"] for row in rows_of(kind)]
        if known and pattern != "*":
            raise unknown(kind.removesuffix("s"), pattern, known)
        print(f"no {kind}")
        return
    columns = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)]
    show = {"parameters": millions, "size": size_text, "samples": lambda n: "" if n is None else f"{n:,}"}
    body = [[show[key](row[key]) if key in show else row[key] for key in columns] for row in rows]
    print_table(
        columns, body, numbers=("parameters", "size", "samples", "classes", "models", "weights", "rows", "verified")
    )


def stdout_console() -> Console:
    """What tables are printed to."""
    console = Console(highlight=False)
    # A pipe has no width: rows must not be folded at 80 there.
    return console if console.is_terminal else Console(highlight=False, width=200, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[str] = ()) -> None:
    """A table on stdout: words left, the columns in `numbers` right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell_text(cell)) for cell in row))
    stdout_console().print(table)


def cell_text(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def size_text(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f} MB"


def heading(text: str) -> None:
    """An underlined line between tables."""
    stdout_console().print(Text(f"\n{text}", style="bold underline"))
