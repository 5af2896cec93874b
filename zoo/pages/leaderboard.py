"""The leaderboard as a folder of pages: an index, and a page a paper. From cards, declarations and kept results alone,
so that the same input gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo import catalog, files
from zoo.claims import declaration, picture
from zoo.errors import ZooError
from zoo.pages.html import (
    Markup,
    bars,
    command,
    el,
    folded,
    is_ours,
    link,
    markup,
    number,
    page,
    prose,
    section,
    table,
    tiles,
)
from zoo.paths import FIELDS, share

_STATUS = {"verified": "good"}


def write(
    folder: str | Path, rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]] | None = None
) -> list[Path]:
    """Writes ``index.html`` and ``<paper>.html`` of the papers that have rows; the paths.

    Args:
        folder: made where it is missing; files of other names in it stay, and so do files of these names that are not
            pages of ours.
        rows: as :func:`zoo.command.show.leaderboard` gives them.
        verdicts: what ``zoo parity --json`` said, to count; None: the cases are counted, and nothing is said of them.

    Raises:
        ZooError: `folder` is a file, or holds a file of such a name that is no page of ours.
    """
    folder = Path(folder)
    if folder.is_file() or folder.suffix.lower() in (".html", ".htm"):
        raise ZooError(f"--html wants a folder, to which it writes index.html and a page a paper, not {str(folder)!r}")
    slugs = sorted({str(row["paper"]) for row in rows})
    judged = None if verdicts is None else _verdicts(verdicts)
    written = [folder / "index.html", *(folder / f"{slug}.html" for slug in slugs)]
    for path in written:
        if path.exists() and not is_ours(path):
            raise ZooError(f"{path} is there already and is no page of the leaderboard; give another folder")
    files.write_text(written[0], _index(slugs, rows, judged))
    for slug, path in zip(slugs, written[1:], strict=True):
        files.write_text(path, _paper(slug, [row for row in rows if row["paper"] == slug], judged))
    return written


def read_verdicts(path: str | Path) -> list[dict[str, Any]]:
    """What ``zoo parity --json`` printed into a file.

    Raises:
        ZooError: it holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZooError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) and {"paper", "ok"} <= one.keys() for one in found):
        raise ZooError(f"{path}: no verdicts; zoo parity --json > FILE writes them")
    return found


def _verdicts(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """By paper how many outputs agree, differ and were skipped."""
    counts: dict[str, dict[str, int]] = {}
    for one in found:
        mine = counts.setdefault(str(one["paper"]), {"agree": 0, "differ": 0, "skipped": 0})
        mine["skipped" if one["ok"] is None else "agree" if one["ok"] else "differ"] += 1
    return counts


# --------------------------------------------------------------------------------------------------------------- index


def _index(slugs: Sequence[str], rows: Sequence[Mapping[str, Any]], judged: Mapping[str, Any] | None) -> str:
    cards = [catalog.paper(slug) for slug in slugs]
    fields = [field for field in FIELDS if any(card.field == field for card in cards)]
    buttons = [
        el("button", name, type="button", data_field=field, aria_pressed="true" if not field else "false")
        for name, field in [("all fields", ""), *((field, field) for field in fields)]
    ]
    search = el("input", type="search", placeholder="search papers, models, data sets, metrics", aria_label="search")
    verified = sum(row["status"] == "verified" for row in rows)
    facts = [
        ("papers", len(cards)),
        ("published sizes", sum(len(card.models) for card in cards)),
        ("published weights", sum(len(card.weights) for card in cards)),
        ("rows of leaderboards", f"{len(rows):,}"),
        ("rows verified", verified),
    ]
    return page(
        "zoo leaderboard",
        el("h1", "zoo leaderboard"),
        el(
            "p",
            "What the papers published, and what this zoo measured. A row is a command: zoo fit or test PAPER:ROW.",
            " Parity counts cases replayed from the official code, claims the sub-claims that held in miniature.",
        ),
        tiles(facts),
        el("div", search, buttons, class_="filters", role="search"),
        _heading("Papers", "papers-shown"),
        _papers(cards, rows, judged),
        _heading("Rows", "rows-shown"),
        _all_rows(rows),
        scripts=["table.js"],
    )


def _heading(title: str, counter: str) -> Markup:
    return el("h2", title, " ", el("span", class_="faint", id=counter))


def _papers(cards: Sequence[catalog.PaperCard], rows: Sequence[Mapping[str, Any]], judged: Any) -> Markup:
    columns = [
        "paper",
        "title",
        "year",
        "field",
        "models",
        "weights",
        "rows",
        "verified",
        "parity",
        "claims",
    ]
    body = []
    for card in cards:
        mine = [row for row in rows if row["paper"] == card.slug]
        body.append(
            [
                link(f"{card.slug}.html", card.slug),
                el("p", card.title),
                card.year,
                card.field,
                len(card.models),
                len(card.weights),
                len(mine),
                sum(row["status"] == "verified" for row in mine),
                len(_cases(card.slug)),
                _held(declaration.result(card.slug) if card.claim else None),
            ]
        )
        if judged is not None:
            body[-1].insert(9, _counts(judged.get(card.slug)))
    if judged is not None:
        columns.insert(9, "agree")
    numbers = [name for name in columns if name not in ("paper", "title", "field")]
    attributes = [{"data_field": card.field} for card in cards]
    return table(columns, body, numbers, attributes, sortable=True, id="papers", data_searched="papers-shown")


def _counts(found: Mapping[str, int] | None) -> str:
    return "" if found is None else f"{found['agree']} of {sum(found.values())}"


def _held(result: Mapping[str, Any] | None) -> str:
    held = [] if result is None else [part["held"] for part in result["claims"]]
    return f"{sum(held)} of {len(held)}" if held else ""


def _cases(slug: str) -> list[Path]:
    return sorted((share("parity/cases") / slug).glob("*.json"))


def _all_rows(rows: Sequence[Mapping[str, Any]]) -> Markup:
    columns = ["row", "dataset", "metric", "model", "published", "measured", "status"]
    field = {slug: catalog.paper(slug).field for slug in {row["paper"] for row in rows}}
    body = [
        [
            link(f"{row['paper']}.html#{row['id']}", f"{row['paper']}:{row['id']}"),
            row["dataset"],
            row["metric"],
            row["model"],
            _value(row, row["value"]),
            _value(row, (row["measured"] or {}).get("value")),
            el("span", row["status"], class_=_STATUS.get(row["status"], "faint")),
        ]
        for row in rows
    ]
    attributes = [{"data_field": field[row["paper"]]} for row in rows]
    numbers = ["published", "measured"]
    return table(columns, body, numbers, attributes, sortable=True, id="rows", data_searched="rows-shown")


def _value(row: Mapping[str, Any], value: float | None) -> str:
    unit = row["unit"] or ""
    return "" if value is None else f"{value:g}{' ' if unit and unit != '%' else ''}{unit}"


# --------------------------------------------------------------------------------------------------------------- paper


def _paper(slug: str, rows: Sequence[Mapping[str, Any]], judged: Mapping[str, Any] | None) -> str:
    card = catalog.paper(slug)
    arxiv = link(f"https://arxiv.org/abs/{card.arxiv}", f"arXiv {card.arxiv}") if card.arxiv else None
    where = [card.venue or str(card.year), arxiv, link(card.code, "official code") if card.code else None]
    sections = [
        section("Leaderboard", _rows(rows), id_="leaderboard"),
        section("Models", _models(card), id_="models"),
        section("Weights", _weights(card), id_="weights"),
        section("Recipes", _recipes(slug), id_="recipes"),
        section("Claim in miniature", _claim(card), id_="claim"),
        section(
            "Parity with the official code", _parity(slug, None if judged is None else judged.get(slug)), id_="parity"
        ),
        section("Speed", _speed(slug), id_="speed"),
        section("Where paper, official code and zoo differ", _ledger(card), id_="ledger"),
    ]
    names = ("leaderboard", "models", "weights", "recipes", "claim", "parity", "speed", "ledger")
    there = [link(f"#{name}", name) for name, part in zip(names, sections, strict=True) if part]
    return page(
        f"{card.title} · zoo",
        el("nav", link("index.html", "← all papers")),
        el("h1", card.title),
        el("p", ", ".join(card.authors), class_="faint"),
        el("p", _dotted(where)),
        el("p", prose(card.summary.strip())),
        el("nav", _dotted(there)),
        *sections,
        scripts=["table.js", "copy.js"],
    )


def _dotted(parts: Sequence[Any]) -> Markup:
    """What there is of `parts`, with points between."""
    return markup([[" · " if n else "", part] for n, part in enumerate(filter(None, parts))])


def _rows(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """A table a data set and metric; published beside measured, and the protocol behind both."""
    if not rows:
        return Markup()
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["metric"]), []).append(row)
    own = any("results" in row for row in rows)
    columns = ["row", "published", "measured", *(["yours"] if own else []), "status", "protocol"]
    found = []
    # First what a command runs here.
    for (dataset, metric), mine in sorted(groups.items(), key=lambda item: not any(row["command"] for row in item[1])):
        shared = {
            key: value for key, value in mine[0]["protocol"].items() if all(_shares(row, key, value) for row in mine)
        }
        shared = shared if len(mine) > 1 else {}
        found.append(el("h3", f"{metric} on {dataset}"))
        found += [el("p", f"All: {_protocol(shared)}", class_="faint")] if shared else []
        body = []
        for row in mine:
            measured = row["measured"] or {}
            on = ", ".join(filter(None, [measured.get("hardware"), measured.get("date")]))
            yours = "; ".join(
                f"{_value(row, entry['measured'])} ({entry['verdict']}, {entry['date']})"
                for entry in row.get("results") or []
            )
            own_protocol = _protocol({key: value for key, value in row["protocol"].items() if key not in shared})
            cost = f"cost: {row['cost']}" if row["cost"] else ""
            more = el("p", " · ".join(filter(None, [row["where"], own_protocol, cost])), class_="faint wide")
            status = el("span", row["status"], class_=_STATUS.get(row["status"], "faint nowrap"))
            value = markup(_value(row, measured.get("value")), el("br") if on else None, el("span", on, class_="faint"))
            runs = [el("br"), el("code", row["command"])] if row["command"] else []
            name = el("div", el("b", row["id"]), el("br"), row["model"], runs, class_="row")
            body.append([name, _value(row, row["value"]), value, *([yours] if own else []), status, more])
        attributes = [{"id": row["id"]} for row in mine]
        found.append(table(columns, body, ["published"], attributes, sortable=True))
    return markup(found)


def _shares(row: Mapping[str, Any], key: str, value: Any) -> bool:
    return key in row["protocol"] and row["protocol"][key] == value


def _protocol(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in facts.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key} {_plain(one)}' for key, one in value.items())})"
    return ", ".join(_plain(one) for one in value) if isinstance(value, list) else number(value)


def _models(card: catalog.PaperCard) -> Markup:
    if not card.models:
        return Markup()
    body = [[el("code", one.name), f"{one.params / 1e6:,.1f} M", one.summary] for one in card.models]
    return table(["model", "parameters", ""], body, ["parameters"], sortable=True)


def _weights(card: catalog.PaperCard) -> Markup:
    if not card.weights:
        return Markup()
    body = []
    for one in card.weights:
        size = "" if one.size is None else f"{one.size / 1e6:,.0f} MB"
        scores = "; ".join(f"{m.dataset} {m.metric} {m.value:g} ({m.where})" for m in one.metrics)
        facts = one.preprocess
        side = f"{facts.size} px" + (f", at most {facts.longest}" if facts.longest else "")
        crop = f", crop {facts.crop_pct:g}" if facts.crop_pct != 1 else ""
        body.append(
            [el("code", one.name), one.kind, size, one.licence, f"{side}{crop}, {facts.interpolation}", el("p", scores)]
        )
    columns = ["weights", "kind", "size", "licence", "preprocessing", "published"]
    get = command(f"zoo weights get {card.weights[0].name}", "fetch, check and convert, once:")
    return markup(table(columns, body, ["size"], sortable=True), get)


def _recipes(slug: str) -> Markup:
    parts = []
    for name in catalog.list_recipes(f"{slug}/*"):
        first, _, rest = catalog.recipe_header(name).partition("\n")
        parts += [el("h3", name), el("p", prose(first)), command(f"zoo fit {name}")]
        if rest.strip():
            parts.append(folded("expected, hardware, cost", el("p", prose(rest.strip()), class_="note")))
    return markup(parts)


def _claim(card: catalog.PaperCard) -> Markup:
    if card.claim is None:
        return Markup()
    result = declaration.result(card.slug)
    told = [el("p", card.claim.statement)]
    if result is None:
        told.append(el("p", "Not run yet.", class_="faint"))
    else:
        told.append(
            el("div", el("div", Markup(picture.draw(result).svg()), class_="plot"), class_="scroll", tabindex="0")
        )
        env = result["environment"]
        on = f"{result['seconds'] / 60:.0f} min, {env['cpu']['kind']}, {env['date']}"
        told.append(el("p", f"Measured over {result['settings']['seeds']} seed(s): {on}.", class_="faint"))
    return markup(told, command(f"zoo claim {card.slug} --run", "run it anew:"))


def _parity(slug: str, judged: Mapping[str, int] | None) -> Markup:
    """How many outputs of the official code are replayed, by what was called; and the verdicts that were handed in."""
    groups: dict[str, list[int]] = {}
    for path in _cases(slug):
        case = json.loads(path.read_text(encoding="utf-8"))
        entry = str((case.get("official") or {}).get("entry") or case.get("case"))
        one = groups.setdefault(entry, [0, 0])
        one[0], one[1] = one[0] + 1, one[1] + len(case.get("outputs") or ())
    if not groups:
        return Markup()
    cases, outputs = (sum(one[n] for one in groups.values()) for n in (0, 1))
    told = f"{cases} cases with {outputs:,} outputs recorded from the official code are replayed by one command."
    verdict = None
    if judged is not None:
        good = not judged["differ"]
        text = f"{judged['agree']} outputs agree, {judged['differ']} differ, {judged['skipped']} were skipped."
        verdict = el("p", text, class_="good" if good else "bad")
    body = [[el("code", entry), *one] for entry, one in groups.items()]
    listed = table(["called", "cases", "outputs"], body, ["cases", "outputs"], sortable=True)
    return markup(el("p", told), verdict, command(f"zoo parity {slug}"), folded("what is replayed", listed))


def _speed(slug: str) -> Markup:
    """A bar a contender: the median time over ours within each round; shorter is faster."""
    parts = []
    for path in sorted((share("benchmarks") / "speed" / "results").glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("benchmark") != slug:
            continue
        setting, env = kept["setting"], kept["environment"]
        for what, title in (("step", "training step"), ("data", "files to batch")):
            found = (kept.get(what) or {}).get("contenders")
            if not found:
                continue
            rows = [(one["name"], one["times_ours"]["median"], _times(one)) for one in found]
            about = f"{setting['model']}, {setting['dtype']}, batch {setting['batch']}" if what == "step" else ""
            parts.append(el("h3", ": ".join(filter(None, [title, about]))))
            parts.append(bars(rows, ours="zoo"))
            notes = [el("p", f"{one['name']}: {one['about']}", class_="note") for one in found]
            machine = (
                f"{env['cpu']['kind']}, {setting['threads']} thread(s), torch {env['versions']['torch']}, {env['date']}"
            )
            parts.append(
                folded("contenders, machine", notes, el("p", machine, class_="note"), command(kept["command"]))
            )
    if not parts:
        return Markup()
    return markup(el("p", "Time over ours, within each round; a longer bar is slower.", class_="faint"), parts)


def _times(one: Mapping[str, Any]) -> str:
    return f"{one['times_ours']['median']:.2f}× · {one['seconds']['median']:.3g} s"


def _ledger(card: catalog.PaperCard) -> Markup:
    if not card.ledger:
        return Markup()
    body = [[one.topic, el("p", one.paper), el("p", one.code), el("p", one.zoo)] for one in card.ledger]
    return table(["topic", "paper", "official code", "zoo"], body)
