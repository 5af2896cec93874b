"""Elements of HTML that escape what they are given, and the frame of a page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any


class Markup(str):
    """Text that is HTML already; all other text is escaped where it enters a page."""


_EMPTY = ("br", "img", "input", "meta")


def markup(*content: Any) -> Markup:
    """`content` one after the other: :class:`Markup` as it is, None not at all, lists likewise, all else escaped."""
    parts = []
    for one in content:
        if isinstance(one, Markup):
            parts.append(str(one))
        elif isinstance(one, list | tuple):
            parts.append(markup(*one))
        elif one is not None:
            parts.append(html.escape(str(one)))
    return Markup("".join(parts))


def el(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """``<name attributes>content</name>``. Of an attribute's name a last ``_`` falls away and others become ``-``; one
    that is None or False is left out, one that is True stands alone."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    start = f"<{' '.join(words)}>"
    return Markup(start if name in _EMPTY else f"{start}{markup(*content)}</{name}>")


@cache
def asset(name: str) -> str:
    """The text of a file beside this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


GENERATOR = "zoo"


def is_ours(path: Path) -> bool:
    """Is a file a page that :func:`page` made?"""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(2000)


def page(title: str, *body: Any, scripts: Sequence[str] = ()) -> str:
    """A whole page, with the house's style and the named scripts inside.

    The policy in its head forbids it to fetch anything, whatever stands in it.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    head = [
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content=GENERATOR),
        el("title", title),
        el("style", Markup(asset("style.css"))),
    ]
    code = [el("script", Markup(asset(name))) for name in scripts]
    whole = el("html", "\n", el("head", head), "\n", el("body", el("main", *body), *code), "\n", lang="en")
    return f"<!doctype html>\n{whole}\n"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    numbers: Sequence[str] = (),
    attributes: Sequence[dict[str, Any]] = (),
    sortable: bool = False,
    **table_attributes: Any,
) -> Markup:
    """A table that scrolls in a box of its own where the screen is narrow.

    Args:
        columns: names.
        rows: cells; a :class:`Markup` stands as it is.
        numbers: the columns on the right.
        attributes: of each row.
        sortable: a click on a column's name sorts by it (``table.js``).
    """
    side = ["num" if name in numbers else None for name in columns]

    def title(name: str, number: str | None) -> Markup:
        return el("th", el("button", name, type="button") if sortable else name, class_=number, scope="col")

    head = el("tr", [title(name, number) for name, number in zip(columns, side, strict=True)])
    lines = []
    for at, row in enumerate(rows):
        cells = [el("td", cell, class_=number) for cell, number in zip(row, side, strict=True)]
        lines.append(markup(el("tr", cells, **(attributes[at] if attributes else {})), "\n"))
    whole = el("table", el("thead", head), "\n", el("tbody", lines), **table_attributes)
    return el("div", whole, class_="scroll", tabindex="0")


def section(title: str, *content: Any, id_: str | None = None) -> Markup:
    """A part of a page; nothing where there is nothing in it."""
    inside = markup(*content)
    return el("section", el("h2", title), inside, id_=id_) if inside else Markup()


def folded(title: str, *content: Any) -> Markup:
    """What a click shows."""
    inside = markup(*content)
    return el("details", el("summary", title), inside) if inside else Markup()


def tiles(facts: Iterable[tuple[str, Any]]) -> Markup:
    """Small facts beside each other: a name, and a value in large type."""
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in facts], class_="tiles")


def command(text: str, says: str = "") -> Markup:
    """A command to copy (``copy.js``), and what it does."""
    button = el("button", "copy", type="button", class_="copy", aria_label=f"copy: {text}")
    return el("div", el("p", says) if says else None, el("pre", el("code", text), button), class_="command")


def bars(rows: Sequence[tuple[str, float, str]], most: float | None = None, ours: str | None = None) -> Markup:
    """A bar for each (name, length, text); `ours` is the name of the one that stands out."""
    top = most or max((length for _, length, _ in rows), default=1.0) or 1.0
    lines = []
    for name, length, text in rows:
        share = max(0.0, min(100.0, 100 * length / top))
        bar = el("span", style=f"width:{share:.1f}%", class_="ours" if name == ours else None)
        lines.append(el("tr", el("th", name, scope="row"), el("td", el("div", bar, class_="bar")), el("td", text)))
    return el("table", lines, class_="bars")


def prose(text: str) -> Markup:
    """Plain text with its addresses as links."""
    parts = re.split(r"(https?://[^\s<>()]+[\w/])", text)
    return markup(*(link(part) if n % 2 else part for n, part in enumerate(parts)))


def link(address: str, text: str | None = None) -> Markup:
    """A link to an address of the web, or to another page of ours."""
    return el("a", text or address.removeprefix("https://"), href=address, rel="noopener")


def breakable(text: str) -> Markup:
    """A name that may go on in another line behind its slashes, underscores and the like."""
    return markup(*(part for piece in re.split(r"(?<=[/_:.])", text) for part in (piece, Markup("<wbr>"))))


def number(value: Any) -> str:
    """A value as a page shows it; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
