"""The page that a run ends in, and the page that compares several: one file each, everything inside."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from zoo import files
from zoo.machine import OF_THE_MACHINE
from zoo.pages import run as runs
from zoo.pages.html import Markup, bars, breakable, command, el, folded, markup, number, page, section, table, tiles
from zoo.pages.run import Run
from zoo.pages.svg import figure

NAME = "report.html"
_MATRIX = 20  # classes of a confusion matrix that is shown whole
_MAIN = 8  # curves that are not folded away
_IMAGE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+")


def write(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of the run in `folder`, by default into it; the path."""
    path = out or folder / NAME
    files.write_text(path, render(runs.read(folder)))
    return path


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Writes the page that compares the runs in `folders`; the path."""
    files.write_text(out, compare([runs.read(folder) for folder in folders]))
    return out


# ---------------------------------------------------------------------------------------------------------- one run


def render(run: Run) -> str:
    """The page of a run."""
    result = run.result
    kind = _kind(run)
    said = [kind, "" if result else "stopped before its end", result.get("date"), result.get("hardware")]
    return page(
        f"{run.name} · zoo",
        el("h1", breakable(run.recipe or run.folder.name)),
        el("p", " · ".join(str(part) for part in said if part), class_="faint"),
        command(result["command"]) if isinstance(result.get("command"), str) else None,
        _verdict(result.get("verdict")),
        tiles(_facts(run)),
        section("Curves", _curves({"": run})),
        section("Time and memory", _costs({"": run})),
        *(_errors(split, found) for split, found in run.errors.items()),
        section("Pictures", _pictures(run)),
        section("What was run", _what(run)),
        section("Go on", _commands(run)),
        scripts=["copy.js"],
    )


def _kind(run: Run) -> str:
    words = str(run.result.get("command", "")).split()
    return words[1] if len(words) > 1 and words[0] == "zoo" else "fit"


def _verdict(found: Any) -> Markup | None:
    if not isinstance(found, dict) or not isinstance(found.get("verdict"), str):
        return None
    good = found["verdict"] in ("within tolerance", "better")
    told = [f"{key} {number(found.get(key))}" for key in ("measured", "published") if found.get(key) is not None]
    text = f"{found.get('row')} {found.get('metric')}: {found['verdict']}"
    return el("p", f"{text} ({', '.join(told)})" if told else text, class_="good" if good else "bad")


def _facts(run: Run) -> list[tuple[str, Any]]:
    """The tiles: final numbers, then what they cost."""
    classes = run.protocol.get("num_classes")
    few = isinstance(classes, int) and classes <= 5  # then the top five are all
    told = {name: value for name, value in run.metrics.items() if not (few and name.endswith("top5"))}
    found = [(name, number(value)) for name, value in _telling(told).items()]
    if isinstance(seconds := run.result.get("seconds"), int | float):
        found.append(("time", duration(float(seconds))))
    data, compute = (sum(y for _, y in run.series.get(f"time/{one}", [])) for one in ("data", "compute"))
    if rates := sorted(y for _, y in run.series.get("speed/samples_per_s", [])):
        found.append(("samples/s", f"{rates[len(rates) // 2]:,.4g}"))
    if data + compute > 0:
        found.append(("waiting for data", f"{data / (data + compute):.0%}"))
    if peak := run.series.get("memory/peak_mib"):
        found.append(("peak memory", f"{max(y for _, y in peak) / 1024:.2f} GiB"))
    return found


def _telling(metrics: Mapping[str, float], most: int = 8) -> dict[str, float]:
    """The numbers that a reader looks for first."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    ranked = sorted(finite, key=lambda name: _rank(name))[:most]
    return {name: finite[name] for name in ranked}


def _rank(name: str) -> tuple[int, int]:
    """How early a metric comes: a loss, then accuracies and average precisions, then the details of those."""
    head, _, tail = name.rpartition("/")
    plain = tail.removesuffix("_step").removesuffix("_epoch")
    first = ("loss", "top1", "AP", "mAP", "exact_match", "probe_top1", "knn_top1")
    details = re.fullmatch(r"(AP|AR)(\d+|[sml])", plain) is not None
    return (first.index(plain) if plain in first else 20 if details else 10, len(head))


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


# -------------------------------------------------------------------------------------------------------------- curves


def _groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Metrics by the title of their curve: ``train/loss`` and ``val/loss`` share one."""
    found: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(OF_THE_MACHINE):
            continue
        plain = name.removesuffix("_step").removesuffix("_epoch")
        if name.endswith("_epoch") and f"{plain}_step" in names:
            continue
        title = "learning rate" if plain == "train/lr" or plain.startswith("lr-") else plain
        for split in ("train/", "val/", "test/"):
            title = title.removeprefix(split)
        found.setdefault(title, []).append(name)
    # Training comes first, and has the first colour.
    return {title: sorted(some, key=lambda name: not name.startswith("train/")) for title, some in found.items()}


def _curves(named: Mapping[str, Run]) -> Markup:
    """The curves of a run under the name "", or those of several over each other."""
    names = list(dict.fromkeys(name for run in named.values() for name in run.series))
    figures = []
    for title, metrics in sorted(_groups(names).items(), key=lambda item: _order(item[0])):
        lines = {}
        for label, run in named.items():
            for metric in metrics:
                points = run.series.get(metric, [])
                if len(points) < 2:  # a short run logs few steps
                    points = run.series.get(metric.removesuffix("_step") + "_epoch", []) or points
                if points:
                    split = metric.partition("/")[0] if "/" in metric else metric
                    lines[" ".join(filter(None, [label, split if len(metrics) > 1 or not label else ""]))] = points
        if all(len(points) < 2 for points in lines.values()):
            continue  # the number stands above
        if drawn := figure(title, lines, zero=title == "learning rate", reach=_reach(named)):
            figures.append(drawn)
    main, more = figures[:_MAIN], figures[_MAIN:]
    rest = folded(f"{len(more)} more curves", el("div", more, class_="charts")) if more else None
    told = el("p", "Over the optimiser's steps; the pointer tells values.", class_="faint")
    return markup(told, el("div", main, class_="charts"), rest) if main else Markup()


def _reach(named: Mapping[str, Run]) -> tuple[float, float]:
    """The first and the last step of all curves, so that they lie below each other."""
    steps = [x for run in named.values() for points in run.series.values() for x, _ in points]
    return min(steps, default=0.0), max(steps, default=0.0)


def _order(title: str) -> tuple[int, str]:
    rank = 5 if title == "learning rate" else _rank(title)[0]
    return (rank, title)


def _costs(named: Mapping[str, Run]) -> Markup:
    wanted = {
        "seconds an epoch": ("time/data", "time/compute"),
        "samples a second": ("speed/samples_per_s",),
        "peak memory, GiB": ("memory/peak_mib",),
    }
    figures = []
    for title, metrics in wanted.items():
        lines = {}
        for label, run in named.items():
            for metric in metrics:
                scale = 1 / 1024 if metric == "memory/peak_mib" else 1.0
                split = metric.partition("/")[2] if len(metrics) > 1 else ""
                points = [(x, y * scale) for x, y in run.series.get(metric, [])]
                lines[" ".join(filter(None, [label, split])) or title] = points
        if any(len(points) > 1 for points in lines.values()):
            figures.append(figure(title, lines, zero=True, reach=_reach(named)))
    return el("div", figures, class_="charts") if any(figures) else Markup()


# -------------------------------------------------------------------------------------------------------------- errors


def _errors(split: str, found: Mapping[str, Any]) -> Markup:
    """Confusion matrix or AP by class, and the worst samples, of a split."""
    stated = found.get("classes")
    names = [str(name) for name in stated] if isinstance(stated, list) else []
    parts = [_confusion(found.get("confusion"), names), _by_class(found.get("ap"))]
    worst = _worst(found.get("worst"))
    where = {"val": "validation", "test": "test"}[split]
    samples = found.get("samples")
    step = f", step {found['step']}" if found.get("step") else ""
    counted = el("p", f"{number(samples)} samples{step}", class_="faint") if samples else None
    return markup(
        section(f"Where it errs: {where}", counted, *parts) if any(parts) else None,
        section(f"Worst samples: {where}", worst),
    )


def _name(names: Sequence[str], k: int) -> str:
    return names[k] if 0 <= k < len(names) else f"class {k}"


def _triples(found: Any) -> list[tuple[int, int, int]]:
    """(truth, guess, count), as far as the file holds such."""
    if not isinstance(found, list):
        return []
    return [
        (one[0], one[1], one[2])
        for one in found
        if isinstance(one, list) and len(one) == 3 and all(isinstance(n, int) and n >= 0 for n in one) and one[2]
    ]


def _confusion(found: Any, names: Sequence[str]) -> Markup:
    triples = _triples(found)
    if not triples:
        return Markup()
    totals: dict[int, int] = {}
    right: dict[int, int] = {}
    for truth, guess, count in triples:
        totals[truth] = totals.get(truth, 0) + count
        right[truth] = right.get(truth, 0) + (count if truth == guess else 0)
    classes = sorted(
        {k for truth, guess, _ in triples for k in (truth, guess)} | set(range(min(len(names), _MATRIX + 1)))
    )
    parts = []
    if len(classes) <= _MATRIX:
        parts.append(_matrix(triples, classes, totals, names))
    mixed = sorted((t for t in triples if t[0] != t[1]), key=lambda t: (-t[2], t[:2]))[:10]
    if mixed:
        pairs = [(_name(names, a), _name(names, b), n, f"{n / totals[a]:.0%}") for a, b, n in mixed]
        listed = table(["truth", "guess", "times", "of the class"], pairs, ["times", "of the class"])
        parts += [el("h3", "Most often confused"), listed]
    worst = sorted(totals, key=lambda k: (right[k] / totals[k], k))[:10]
    if len(classes) > _MATRIX:
        rows = [(_name(names, k), f"{right[k] / totals[k]:.0%}", totals[k]) for k in worst]
        parts += [el("h3", "Weakest classes"), table(["class", "right", "samples"], rows, ["right", "samples"])]
    return markup(parts)


def _matrix(
    triples: Sequence[tuple[int, int, int]], classes: Sequence[int], totals: Mapping[int, int], names: Sequence[str]
) -> Markup:
    """Rows are the truth, columns the guess; a cell is the share of its row."""
    counts = {(truth, guess): count for truth, guess, count in triples}
    head = el("tr", el("th"), [el("th", el("span", _name(names, k)), scope="col") for k in classes])
    rows = []
    for truth in classes:
        cells = []
        for guess in classes:
            count = counts.get((truth, guess), 0)
            share = count / totals[truth] if totals.get(truth) else 0.0
            title = f"{_name(names, truth)} taken for {_name(names, guess)}: {count}"
            strong = "strong" if share > 0.55 else None
            cells.append(
                el("td", f"{share:.0%}" if count else "", style=f"--v:{share:.2f}", title=title, class_=strong)
            )
        rows.append(el("tr", el("th", _name(names, truth), scope="row"), cells))
    whole = el("table", el("thead", head), el("tbody", rows), class_="confusion")
    return markup(
        el("h3", "Confusion matrix"),
        el("p", "A row is a true class, a column what it was taken for.", class_="faint"),
        el("div", whole, class_="scroll", tabindex="0"),
    )


def _by_class(found: Any) -> Markup:
    """Bars of each kind's AP by class, the best first."""
    if not isinstance(found, dict):
        return Markup()
    parts = []
    for kind, scores in found.items():
        if not isinstance(scores, dict):
            continue
        known = {str(k): float(v) for k, v in scores.items() if isinstance(v, int | float) and math.isfinite(v)}
        if known:
            rows = sorted(known.items(), key=lambda item: (-item[1], item[0]))
            drawn = bars([(name, value, f"{value:.1f}") for name, value in rows], most=100)
            title = f"{kind} AP by class, %"
            parts.append(markup(el("h3", title), drawn) if len(rows) <= 40 else folded(title, drawn))
    return markup(parts)


def _worst(found: Any) -> Markup:
    if not isinstance(found, list):
        return Markup()
    cells = []
    for one in found:
        if not isinstance(one, dict):
            continue
        address = one.get("picture")
        image = None
        if isinstance(address, str) and _IMAGE.fullmatch(address):
            alt = f"truth {one.get('truth')}, guess {one.get('guess')}"
            image = el("img", src=address, alt=alt, class_="smooth" if one.get("large") else None)
        lines = []
        for key in ("truth", "guess"):
            if one.get(key) is not None:
                sure = one.get("probability")
                more = f" ({sure:.0%})" if key == "guess" and isinstance(sure, int | float) else ""
                lines += [f"{key} ", el("b", one[key]), more, el("br")]
        lines.append(f"{one.get('measure', 'loss')} {number(one.get('loss'))}")
        if one.get("file") or one.get("index") is not None:
            lines += [el("br"), one.get("file") or f"sample {one['index']}"]
        cells.append(el("figure", image, el("figcaption", lines)))
    return el("div", cells, class_="samples") if cells else Markup()


# --------------------------------------------------------------------------------------------------- pictures, settings


def _pictures(run: Run) -> Markup:
    cells = [
        el("figure", el("img", src=address, alt=name), el("figcaption", name)) for name, address in runs.pictures(run)
    ]
    return el("div", cells, class_="pictures") if cells else Markup()


def value_text(value: Any) -> str:
    """A setting as YAML would have it, on one line."""
    if isinstance(value, Mapping | list):
        return json.dumps(value, default=str)
    return "null" if value is None else number(value)


def _what(run: Run) -> Markup:
    """The difference from the named recipe, the resolved one, protocol and versions."""
    parts = []
    if differs := runs.changes(run):
        rows = [[el("code", key), value_text(named), value_text(here)] for key, named, here in differs]
        parts.append(el("p", f"It differs from {run.recipe} in:"))
        parts.append(table(["option", "recipe", "this run"], rows))
    elif run.config and differs is not None:
        parts.append(el("p", f"It is {run.recipe} as it stands."))
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        parts.append(folded("the resolved recipe (config.yaml)", el("pre", el("code", text))))
    if run.protocol:
        rows = [[el("code", key), value_text(value)] for key, value in run.protocol.items() if value is not None]
        parts.append(folded("protocol of the result", table(["", ""], rows)))
    if isinstance(versions := run.result.get("versions"), dict):
        parts.append(el("p", ", ".join(f"{name} {version}" for name, version in versions.items()), class_="faint"))
    return markup(parts)


def _commands(run: Run) -> Markup:
    """How to go on, test and predict; of a test, how to make its page."""
    folder = shlex.quote(short(run.folder))
    parts = [command(f"zoo report {folder}", "make this page anew:")]
    if (last := run.checkpoint()) is not None and run.recipe:
        name = shlex.quote(run.recipe)
        best = f"{folder}:best" if run.checkpoint("best") else folder
        parts = [
            command(f"zoo fit {name} --ckpt_path {shlex.quote(short(last))}", "resume:"),
            command(f"zoo test {best}", "test:"),
            command(f"zoo predict {best} FILE... -o OUT", "predict on files of your own:"),
            command(f"zoo predict {name} --ckpt_path {shlex.quote(short(last))}", "predict on the data's own split:"),
            *parts,
        ]
    return markup(parts)


def short(path: Path) -> str:
    """`path` as one types it here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


# ------------------------------------------------------------------------------------------------------- several runs


def compare(found: Sequence[Run]) -> str:
    """The page of several runs: results, options that differ, curves over each other."""
    named: dict[str, Run] = {}
    for run in found:
        label = run.name or run.folder.name
        named[f"{label} ({len(named) + 1})" if label in named else label] = run
    same = len({run.recipe for run in found}) == 1
    if same and found[0].recipe:  # the recipe need not stand in every legend
        named = {label.removeprefix(found[0].recipe).strip() or label: run for label, run in named.items()}
    recipes = list(dict.fromkeys(run.recipe for run in found if run.recipe))
    return page(
        "runs compared · zoo",
        el("h1", f"{len(found)} runs compared"),
        el("p", ", ".join(recipes), class_="faint"),
        section("Results", _results(named)),
        section("Options that differ", _differing(named)),
        section("Curves", _curves(named)),
        section("Time and memory", _costs(named)),
        section("Runs", _listed(named)),
        scripts=["table.js", "copy.js"],
    )


def _results(named: Mapping[str, Run]) -> Markup:
    metrics = list(dict.fromkeys(name for run in named.values() for name in run.metrics))
    rows: list[list[Any]] = [
        [name, *(number(run.metrics.get(name)) for run in named.values())] for name in sorted(metrics, key=_rank)
    ]
    costs = [dict(_facts(run)) for run in named.values()]
    for name in ("time", "samples/s", "waiting for data", "peak memory"):
        if any(name in one for one in costs):
            rows.append([name, *(one.get(name, "") for one in costs)])
    return table(["", *named], rows, list(named)) if rows else Markup()


def _differing(named: Mapping[str, Run]) -> Markup:
    settings = [flat_settings(run) for run in named.values()]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    rows = []
    for key in keys:
        values = [value_text(one[key]) if key in one else "" for one in settings]
        if len(set(values)) > 1:
            rows.append([el("code", key), *values])
    if not rows:
        return el("p", "None: they were run alike.") if all(settings) else Markup()
    return table(["option", *named], rows)


def flat_settings(run: Run) -> dict[str, Any]:
    """The settings of a run by dotted key: its config's, or of a test its protocol's."""
    if run.config:
        return {key: value for key, value in runs.flat(run.config).items() if key != "ckpt_path"}
    return run.protocol


def _listed(named: Mapping[str, Run]) -> Markup:
    rows = [
        [label, run.recipe, el("code", short(run.folder)), el("code", str(run.result.get("command", "")))]
        for label, run in named.items()
    ]
    return table(["run", "recipe", "folder", "command"], rows)
