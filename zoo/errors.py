"""Errors that end in one clear line.

Everything a user can get wrong (names, keys, paths, files, optional packages) raises a :class:`ZooError`; the command
line prints its message and exits with code 2, Python callers catch one type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """A mistake the user can mend; its message is one line that says what and how."""


class MissingPackage(ZooError):
    """An optional package is not installed; the message says how to get it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> ZooError:
    """The error for a `name` that is none of the `known` ones of this `kind`; names the nearest valid one."""
    known = sorted(set(known))
    near = max(known, key=lambda one: _likeness(name, one), default="")
    if _likeness(name, near) >= 0.3:
        return ZooError(f"unknown {kind} {name!r}; did you mean {near!r}?")
    shown = known if len(known) <= 20 else [*known[:20], f"... ({len(known)} in all)"]
    return ZooError(f"unknown {kind} {name!r}; known: {', '.join(shown) or 'none'}")


def _likeness(name: str, known: str) -> float:
    """How alike two names are, 0 to 1; a long name's beginning counts as much as the whole."""
    return max(difflib.SequenceMatcher(None, one, name).ratio() for one in (known, known[: len(name)]))
