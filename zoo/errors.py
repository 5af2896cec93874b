"""Errors that end in one clear line.

Everything a user can get wrong (names, keys, paths, files, optional packages) raises a :class:`ZooError`; the command
line prints its message and exits with code 2, Python callers catch one type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """A mistake the user can mend; its message is one line that says what and how."""


def unknown(kind: str, name: str, known: Iterable[str]) -> ZooError:
    """The error for a `name` that is none of the `known` ones of this `kind`; names the nearest valid one."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    if near:
        return ZooError(f"unknown {kind} {name!r}; did you mean {near[0]!r}?")
    shown = known if len(known) <= 20 else [*known[:20], f"... ({len(known)} in all)"]
    return ZooError(f"unknown {kind} {name!r}; known: {', '.join(shown) or 'none'}")
