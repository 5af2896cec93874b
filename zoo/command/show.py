"""The catalog, leaderboards and verdicts as rich tables, Markdown and plain data for JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from zoo import catalog
from zoo.claims import declaration
from zoo.command.listing import cell_text, heading, millions, print_table, size_text, stdout_console
from zoo.command.verdict import results_of, row_commands, tolerance_of
from zoo.errors import ZooError, unknown
from zoo.paths import share
from zoo.weights.runs import is_run

_STATUS = {"verified": "green", "partly": "yellow", "not run": "dim"}


# ----------------------------------------------------------------------------------------------------------- listings


def listing(kind: str) -> list[dict[str, Any]]:
    """All that ``zoo list KIND`` shows: a dict of facts for each name."""
    if kind == "papers":
        return [_paper_line(catalog.paper(slug)) for slug in catalog.list_papers()]
    if kind == "models":
        found = [catalog.model(name) for name in catalog.list_models()]
        return [{"name": m.name, "parameters": m.params, "paper": card.slug, "summary": m.summary} for card, m in found]
    if kind == "weights":
        weights = [catalog.weight(name) for name in catalog.list_weights()]
        return [
            {"name": w.name, "model": w.model, "kind": w.kind, "licence": w.licence, "size": w.size, "paper": card.slug}
            for card, w in weights
        ]
    if kind == "recipes":
        names = catalog.list_recipes()
        return [{"name": name, "summary": catalog.recipe_header(name).partition("\n")[0]} for name in names]
    if kind == "datasets":
        cards = [catalog.data_card(name) for name in catalog.list_datasets()]
        return [
            {"name": c.name, "title": c.title, "task": c.task, "classes": c.num_classes, "licence": c.licence}
            | {"samples": sum(n or 0 for n in c.splits.values()) or None}
            for c in cards
        ]
    raise ZooError(f"unknown kind {kind!r}")


def _paper_line(card: catalog.PaperCard) -> dict[str, Any]:
    return {
        "name": card.slug,
        "title": card.title,
        "year": card.year,
        "field": card.field,
        "models": len(card.models),
        "weights": len(card.weights),
        "rows": len(card.leaderboard),
        "verified": sum(row.status == "verified" for row in card.leaderboard),
    }


def papers_markdown() -> str:
    """The papers as the Markdown table that README shows, every cell from a card, a case folder or a result file."""
    columns = ("paper", "title", "field", "models", "weights", "parity cases", "claims held", "leaderboard rows")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for slug in catalog.list_papers():
        card = catalog.paper(slug)
        title = f"[{card.title}](https://arxiv.org/abs/{card.arxiv}), {card.year}" if card.arxiv else card.title
        cases = len(list((share("parity/cases") / slug).glob("*.json")))
        result = declaration.result(slug) if card.claim else None
        held = [] if result is None else [part["held"] for part in result["claims"]]
        claim = f"{sum(held)} of {len(held)}" if held else ""
        cells = [f"`{slug}`", title, card.field, len(card.models), len(card.weights), cases, claim]
        lines.append("| " + " | ".join(str(cell) for cell in [*cells, len(card.leaderboard)]) + " |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------- one thing


def _resolve(name: str) -> tuple[str, str]:
    """(kind, name) of what `name` names; a path to a YAML file is a recipe, a folder or checkpoint a run."""
    if is_run(name):
        return "run", name
    kinds = {
        "paper": catalog.list_papers(),
        "model": catalog.list_models(),
        "weight": catalog.list_weights(),
        "dataset": catalog.list_datasets(),
        "recipe": catalog.list_recipes(),
    }
    for kind, names in kinds.items():
        if name in names:
            return kind, name
    if catalog.is_row(name):
        catalog.row(name)
        return "row", name
    if "/" in name or name.endswith((".yaml", ".yml")):
        catalog.recipe_path(name)
        return "recipe", name
    raise unknown(
        "paper, model, weights, dataset, recipe, row or run",
        name,
        [known for names in kinds.values() for known in names],
    )


def describe(name: str) -> dict[str, Any]:
    """All that the cards know about a paper, model, set of weights, data set or recipe, or a checkpoint about its run,
    as plain data."""
    kind, name = _resolve(name)
    if kind == "run":
        return _describe_run(name)
    if kind == "paper":
        return {"kind": kind, **catalog.paper(name).model_dump(mode="json")}
    if kind == "model":
        card, entry = catalog.model(name)
        weights = [w.model_dump(mode="json") for w in card.weights if w.model == name]
        return {"kind": kind, "paper": card.slug, **entry.model_dump(mode="json"), "weights": weights}
    if kind == "weight":
        card, weight = catalog.weight(name)
        return {"kind": kind, "paper": card.slug, **weight.model_dump(mode="json")}
    if kind == "dataset":
        return {"kind": kind, **catalog.data_card(name).model_dump(mode="json")}
    if kind == "row":
        card, row = catalog.row(name)
        facts = {"kind": kind, "paper": card.slug, **row.model_dump(mode="json"), "tolerance": tolerance_of(row)}
        return facts | {"commands": row_commands(name)}
    import yaml

    path = catalog.recipe_path(name)
    header, config = catalog.recipe_header(path), yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = [{"paper": slug, **row} for slug, row in _rows_of_recipe(name)]
    return {"kind": kind, "name": name, "path": str(path), "header": header, "config": config, "leaderboard": rows}


def _describe_run(name: str) -> dict[str, Any]:
    from zoo.weights.runs import open_run

    run = open_run(name)
    facts, place = dict(run.facts), shlex.quote(str(run.folder or run))
    recipe, task = facts.pop("recipe") or {}, run.task_class
    kind, options = (facts["preprocess"] or {}).get("kind"), facts.pop("options")
    config = run.folder is not None and (run.folder / "config.yaml").is_file()
    file = {"clip": "VIDEO", "grid": "TASK.json"}.get(str(kind), "PICTURE")
    commands = [f"zoo predict {place} {file} -o OUT.png"]
    if hasattr(task, "sample"):
        commands = [f"zoo predict {place} -o OUT.png"]
    elif run.classes is None and not hasattr(task, "picture") and kind != "grid":
        commands = []
    commands += [f"zoo embed {place} FOLDER -o FEATURES.npz"] if hasattr(task, "features") else []
    tested = config or (recipe.get("model") and recipe.get("data"))
    commands += [f"zoo {verb} {place}" for verb in ("test", "fit") if (tested if verb == "test" else config)]
    return {
        "kind": "run",
        "name": name,
        "recipe": recipe.get("name"),
        "checkpoint": str(run.checkpoint),
        "config": str(run.folder / "config.yaml") if run.folder is not None and config else None,
        "weights": sum(value.numel() for value in run.state().values()),
        **facts,
        "options": {key: options[key] for key in run.options if key not in ("optim",)},
        "commands": commands,
    }


def _rows_of_recipe(name: str) -> list[tuple[str, dict[str, Any]]]:
    cards = [catalog.paper(slug) for slug in catalog.list_papers()]
    return [(c.slug, row.model_dump(mode="json")) for c in cards for row in c.leaderboard if row.recipe == name]


def print_description(name: str) -> None:
    facts = describe(name)
    printer = {"paper": _print_paper, "recipe": _print_recipe, "row": _print_row}.get(facts["kind"], _print_facts)
    printer(facts)


def _print_facts(facts: Mapping[str, Any]) -> None:
    console = stdout_console()
    for key, value in facts.items():
        if value in (None, "", [], {}):
            continue
        if key == "commands":
            for command in value:
                console.print(Text(f"  {command}"), soft_wrap=True)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            console.print(Text(f"{key}:", style="bold"))
            for entry in value:
                console.print(
                    Text("  " + ", ".join(f"{k} {_short(v)}" for k, v in entry.items() if v not in (None, "", [], {})))
                )
        elif isinstance(value, Mapping):
            console.print(Text(f"{key}:", style="bold"))
            for inner, entry in value.items():
                if entry not in (None, "", [], {}):
                    console.print(Text(f"  {inner}: {_short(entry)}"))
        else:
            console.print(Text.assemble((f"{key}: ", "bold"), _short(value)))


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = [f"{key} {_short(entry)}" for key, entry in value.items() if entry not in (None, "", [], {})]
        return f"({', '.join(parts)})"
    if isinstance(value, list):
        shown = ", ".join(_short(entry) for entry in value[:20])
        return shown + (f", … ({len(value)})" if len(value) > 20 else "")
    return cell_text(value)


def _print_paper(facts: Mapping[str, Any]) -> None:
    card = catalog.paper(facts["slug"])
    console = stdout_console()
    console.print(Text(card.title, style="bold"))
    where = [card.venue or str(card.year), f"arXiv {card.arxiv}" if card.arxiv else "", card.code or ""]
    console.print(Text(", ".join(card.authors)))
    console.print(Text(" · ".join(part for part in where if part)))
    console.print(Text("\n" + card.summary.strip()))
    if card.models:
        heading("Models")
        print_table(
            ["model", "parameters", ""], [[m.name, millions(m.params), m.summary] for m in card.models], ["parameters"]
        )
    if card.weights:
        heading("Weights (zoo weights get NAME)")
        print_table(
            ["weights", "kind", "target", "size", "licence"],
            [[w.name, w.kind, w.target, size_text(w.size), w.licence] for w in card.weights],
            ["size"],
        )
    recipes = catalog.list_recipes(f"{card.slug}/*")
    if recipes:
        heading("Recipes (zoo fit NAME)")
        print_table(["recipe", ""], [[name, catalog.recipe_header(name).partition("\n")[0]] for name in recipes])
    if card.leaderboard:
        heading(f"Leaderboard (zoo leaderboard {card.slug})")
        print_leaderboard(leaderboard(card.slug), paper=False)
    if card.ledger:
        heading("Where paper, official code and zoo differ")
        print_table(["topic", "paper", "code", "zoo"], [[e.topic, e.paper, e.code, e.zoo] for e in card.ledger])
    if card.claim:
        heading(f"Claim in miniature (zoo claim {card.slug})")
        console.print(Text(card.claim.statement))
        console.print(Text("arms: " + ", ".join(card.claim.arms)))
        for line in claim_lines(declaration.result(card.slug)):
            console.print(Text(line))


def print_claim(paper: str, claim: declaration.Declaration, result: Mapping[str, Any] | None) -> None:
    """A claim's statement, arms and sub-claims, and what came out."""
    console = stdout_console()
    console.print(Text(claim.statement, style="bold"))
    if claim.tried:
        console.print(Text(f"tried before: {claim.tried}"))
    stages = [f"{name}: {stage.recipe} ({', '.join(stage.run)})" for name, stage in claim.steps.items()]
    console.print(Text("; ".join(stages)))
    heading("Arms")
    print_table(["arm", "differs in"], [[arm, _differences(options)] for arm, options in claim.arms.items()])
    heading("Sub-claims, held where the whole 95 % interval lies above the bound")
    print_table(
        ["name", "statement", "effect", "bound"],
        [[one.name, one.statement, one.effect, f"{one.bound:g} {one.unit}"] for one in claim.claims],
    )
    heading(f"Result (zoo claim {paper} --run)")
    for line in claim_lines(result):
        console.print(Text(line))
    if result is not None and result["settings"].get("declaration") != claim.digest:
        console.print(Text("Measured under another declaration than today's: run it anew.", style="yellow"))


def _differences(options: Mapping[str, Any]) -> str:
    """The options of an arm, or those of each of its stages; null for one that is left out."""
    told = []
    for name, value in options.items():
        if "." in name or isinstance(value, str):
            told.append(f"{name} {'null' if value is None else _short(value)}")
        else:
            told.append(f"without {name}" if value is None else f"{name}: {_differences(value)}")
    return ", ".join(told) or "nothing"


def claim_lines(result: Mapping[str, Any] | None) -> list[str]:
    """A line for each sub-claim with its effect and 95 % interval, and how it was measured."""
    if result is None:
        return ["not run yet"]
    lines = []
    for part in result["claims"]:
        effect = part["effect"]
        interval = "" if effect["low"] is None else f" [{effect['low']:.3g}, {effect['high']:.3g}]"
        lines.append(f"{part['verdict']}: {part['statement']}: {effect['mean']:.3g}{interval} {part['unit']}")
    settings, environment = result["settings"], result["environment"]
    lines.append(
        f"measured over {settings['seeds']} seed(s) on {settings.get('dataset', 'embedded data')} in"
        f" {result['seconds'] / 60:.0f} min, {environment['cpu']['kind']}, {environment['date']}: {result['command']}"
    )
    return lines


def _print_recipe(facts: Mapping[str, Any]) -> None:
    console = stdout_console()
    console.print(Text(facts["name"], style="bold"), Text(facts["path"], style="dim"))
    console.print(Text(facts["header"]))
    for row in facts["leaderboard"]:
        console.print(
            Text(f"row {row['paper']}:{row['id']}: {row['dataset']} {row['metric']} {cell_text(row['value'])}")
        )
    console.print()
    text = Path(facts["path"]).read_text(encoding="utf-8")
    console.print(Text("\n".join(line for line in text.splitlines() if not line.startswith("#")).strip()))


def _print_row(facts: Mapping[str, Any]) -> None:
    console = stdout_console()
    name = f"{facts['paper']}:{facts['id']}"
    console.print(Text(name, style="bold"), Text(f"{facts['dataset']} {facts['metric']} of {facts['model']}"))
    cells = dict(zip(_COLUMNS, _cells({**facts, "results": []}), strict=True))
    tolerance = "" if facts["tolerance"] is None else f" (tolerance {facts['tolerance']:.2g})"
    measured = f"{cells['measured']} on {cells['on']}" if facts["measured"] else "not yet"
    lines = {
        "published": f"{cells['published'] or 'no value'}, {facts['where']}{tolerance}",
        "measured": f"{measured}, {facts['status']}",
        "protocol": cells["protocol"],
        "cost": facts["cost"],
        "recipe": facts["recipe"],
        "options": ", ".join(f"{key} {json.dumps(value)}" for key, value in facts["options"].items()),
        "weights": facts["weights"],
    }
    for key, value in lines.items():
        if value:
            console.print(Text.assemble((f"{key}: ", "bold"), value))
    for command in facts["commands"] or ["no recipe runs this row"]:
        console.print(Text(f"  {command}"), soft_wrap=True)


# -------------------------------------------------------------------------------------------------------- leaderboards


def leaderboard(paper: str | None = None, results: str | None = None) -> list[dict[str, Any]]:
    """The rows of one paper or of all, grouped by dataset and metric, the best published value first.

    Each has the `command` that runs it, and with a folder of runs the `results` of one's own tests of it.
    """
    cards = [catalog.paper(slug) for slug in ([paper] if paper else catalog.list_papers())]
    own = results_of(results) if results is not None else {}
    rows = []
    for card in cards:
        for row in card.leaderboard:
            name = f"{card.slug}:{row.id}"
            command = f"zoo {'test' if row.weights else 'fit'} {name}" if row.recipe else None
            facts = {"paper": card.slug, **row.model_dump(mode="json"), "command": command}
            rows.append(facts | ({"results": own.get(name, [])} if results is not None else {}))

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        best = float("inf") if row["value"] is None else row["value"] * (-1 if row["higher_is_better"] else 1)
        return (row["paper"], row["dataset"], row["metric"], _protocol(row), best)

    return sorted(rows, key=order)


def _protocol(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in row["protocol"].items())


_COLUMNS = (
    *("id", "dataset", "metric", "model", "published", "where", "measured", "on", "status", "yours", "command"),
    "protocol",
)


def _cells(row: Mapping[str, Any]) -> list[str]:
    measured = row["measured"] or {}
    unit = row["unit"] or ""
    number = lambda value: "" if value is None else f"{value:g}{' ' if unit and unit != '%' else ''}{unit}"  # noqa: E731
    return [
        f"{row['paper']}:{row['id']}",
        row["dataset"],
        row["metric"],
        row["model"],
        number(row["value"]),
        row["where"],
        number(measured.get("value")),
        ", ".join(filter(None, [measured.get("hardware", ""), measured.get("date", "")])),
        row["status"],
        "; ".join(
            f"{number(entry['measured'])} ({entry['verdict']}, {entry['date']})" for entry in row.get("results") or []
        ),
        row.get("command") or "",
        _protocol(row),
    ]


def _hidden(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    return set() if any("results" in row for row in rows) else {"yours"}


def print_leaderboard(rows: list[dict[str, Any]], paper: bool = True) -> None:
    """Rows as a table; rows of unlike protocols stand apart and are told by the last column."""
    if not rows:
        print("no leaderboard rows")
        return
    hidden = {"protocol", "command", "on"} if not paper else {"on"}
    hidden |= _hidden(rows)
    kept = [i for i, name in enumerate(_COLUMNS) if name not in hidden]
    body = []
    for row in rows:
        cells: list[Any] = _cells(row)
        cells[8] = Text(cells[8], style=_STATUS[row["status"]])
        body.append([cells[i] for i in kept])
    print_table([_COLUMNS[i] for i in kept], body, numbers=("published", "measured"))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    hidden = _hidden(rows)
    columns = [name for name in _COLUMNS if name not in hidden]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [cell for name, cell in zip(_COLUMNS, _cells(row), strict=True) if name not in hidden]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------- explain A B

# Causes in the order of how much they are known to move a number; the first prefix that fits a key ranks it.
_CAUSES = (
    ("data", ("dataset", "data_hash", "data.data_dir", "data.options", "split", "classes", "num_classes")),
    ("amount of data", ("data.train_samples", "trainer.limit_", "samples", "fold")),
    ("weights", ("ckpt_path", "model.init_from", "weights", "pretrain", "task", "model.model", "ema")),
    (
        "evaluation",
        ("resize", "crop", "image_size", "model.img_size", "data.eval_transform", "data.image_size", "views"),
    ),
    ("length of training", ("trainer.max_", "epochs", "steps", "model.optim.warmup")),
    ("optimiser", ("model.optim", "optim", "lr", "batch", "data.batch_size", "trainer.accumulate", "trainer.gradient")),
    ("augmentation", ("data.train_transform", "augment", "mixup", "cutmix", "drop_path", "data.repeats")),
    ("model", ("model.",)),
    ("normalisation", ("mean", "std", "data.mean", "data.std")),
    ("precision", ("precision", "trainer.precision", "dtype")),
    ("seed", ("seed",)),
)
_MINOR = "machine and versions"


def _side(name: str) -> dict[str, Any]:
    """{name, values, protocol, minor} of a leaderboard row (``mae:id`` or a unique id), a run folder or result file."""
    path = Path(name)
    if path.is_dir():
        path = path / "result.json"
    if path.suffix == ".json" or path.exists():
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ZooError(f"no result file {str(path)!r}") from None
        except ValueError as error:
            raise ZooError(f"{path}: not JSON: {error}") from error
        if not isinstance(result, dict) or not isinstance(result.get("protocol"), dict):
            raise ZooError(f"{path}: states no protocol; only results that zoo wrote can be compared")
        minor = {"hardware": result.get("hardware"), "date": result.get("date"), **(result.get("versions") or {})}
        values = result.get("metrics") or {}
        return {"name": name, "values": values, "protocol": result["protocol"], "minor": minor}
    rows = leaderboard()
    found = [row for row in rows if name in (f"{row['paper']}:{row['id']}", row["id"])]
    if len(found) != 1:
        names = [f"{row['paper']}:{row['id']}" for row in rows]
        if found:
            raise ZooError(f"row {name!r} stands in several papers; write PAPER:{name}")
        raise unknown("leaderboard row, run folder or result file", name, names)
    row = found[0]
    protocol = {"dataset": row["dataset"], "metric": row["metric"], "model": row["model"], **row["protocol"]}
    return {"name": name, "values": {row["metric"]: row["value"]}, "protocol": protocol, "minor": {}}


def explain(a: str, b: str) -> dict[str, Any]:
    """What differs between two results' protocols, the likeliest causes of a different number first.

    Returns {"a", "b", "values": {metric: [a, b]}, "differences": [{cause, key, a, b}], "unknown": [{key, side}]}: a key
    that only one side states is no difference, but it is no agreement either.
    """
    left, right = _side(a), _side(b)
    differences, silent = [], []
    for part in ("protocol", "minor"):
        one, two = left[part], right[part]
        for key in sorted(one.keys() | two.keys()):
            if key in one and key in two:
                if one[key] != two[key]:
                    cause = _MINOR if part == "minor" else _cause(key)
                    differences.append({"cause": cause, "key": key, "a": one[key], "b": two[key]})
            elif part == "protocol":
                stated = one if key in one else two
                if stated[key] is not None:
                    silent.append({"key": key, "stated by": a if key in one else b, "value": stated[key]})
    ranks = [name for name, _ in _CAUSES] + ["other", _MINOR]
    differences.sort(key=lambda entry: ranks.index(entry["cause"]))
    values = {k: [left["values"].get(k), right["values"].get(k)] for k in {**left["values"], **right["values"]}}
    return {"a": a, "b": b, "values": values, "differences": differences, "unknown": silent}


def _cause(key: str) -> str:
    for name, prefixes in _CAUSES:
        if key.startswith(prefixes):
            return name
    return "other"


def print_explanation(found: Mapping[str, Any]) -> None:
    print_table(["metric", found["a"], found["b"]], [[key, *pair] for key, pair in found["values"].items()])
    if found["differences"]:
        heading("Stated differences, the likeliest cause first")
        body = [[d["cause"], d["key"], _short(d["a"]), _short(d["b"])] for d in found["differences"]]
        print_table(["cause", "key", found["a"], found["b"]], body)
    else:
        print("the stated protocols agree")
    if found["unknown"]:
        heading("Stated by one side only")
        print_table(["key", "by", "value"], [[u["key"], u["stated by"], _short(u["value"])] for u in found["unknown"]])


# ------------------------------------------------------------------------------------------------------------- parity


def verdicts(found: Iterable[Any]) -> list[dict[str, Any]]:
    """Verdicts of :func:`zoo.parity.run_cases` (dataclasses) as plain data."""
    import dataclasses

    return [dataclasses.asdict(verdict) for verdict in found]


def print_verdicts(rows: list[dict[str, Any]]) -> None:
    """One line a function with the number of outputs that agree, then the disagreements."""
    if not rows:
        print("no parity cases")
        return
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["paper"], row["function"]), []).append(row)
    body = []
    for (paper, function), found in groups.items():
        agreeing, skipped = (sum(row["ok"] is state for row in found) for state in (True, None))
        verdict = Text("DIFFERS", style="bold red")
        if agreeing + skipped == len(found):
            verdict = Text("skipped", style="yellow") if skipped else Text("agrees", style="green")
        cases: dict[str, float] = {}  # a case's seconds stand with its first output
        for row in found:
            cases[row["case"]] = max(cases.get(row["case"], 0.0), row["seconds"])
        body.append([paper, function, verdict, f"{agreeing}/{len(found)}", f"{sum(cases.values()):.2f} s"])
    print_table(["paper", "function", "verdict", "outputs", "time"], body, numbers=("outputs", "time"))
    for row in rows:
        if not row["ok"]:
            print(f"{row['paper']}/{row['case']} {row['output']}: {row['note']}")
