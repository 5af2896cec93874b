"""What a claim in miniature declares: ``benchmarks/claims/<paper>.yaml``, or ``claims/<slug>.yaml`` beside a card of
one's own. Reading it needs no torch.

A claim compares arms. Each goes through the same stages; a stage is a recipe with dotted options, as on the command
line, and what is measured of it. Sub-claims are effects, arithmetic over ``ARM.METRIC``, held where the whole 95 %
interval over seeds lies above a bound.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from zoo import catalog
from zoo.catalog import Facts, read_facts, validated
from zoo.errors import ZooError, unknown
from zoo.paths import share

# What the driver itself measures of a stage that trains. `last_loss` is the mean over the last tenth of the steps,
# `loss_at_N` that over the ten steps up to step N.
OWN = ("last_loss", "loss_at_100", "loss_at_1000", "step_seconds", "step_processor_seconds")

Run = Literal["fit", "validate", "test"]

# ---------------------------------------------------------------------------------------------------------- expressions

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max, "abs": abs, "log": math.log, "exp": math.exp}


def names_in(expression: str) -> list[tuple[str, str]]:
    """The (arm, metric) pairs of an expression.

    Raises:
        ZooError: anything but numbers, ``ARM.METRIC``, + - * /, parentheses, min, max, abs, log and exp.
    """
    found: list[tuple[str, str]] = []

    def note(arm: str, metric: str) -> float:
        found.append((arm, metric))
        return 1.0

    _walked(expression, note, dry=True)
    return found


def evaluate(expression: str, arms: Mapping[str, Mapping[str, float]]) -> float:
    """The value of an expression, `arms` giving each arm's metrics.

    Raises:
        ZooError: as :func:`names_in`; an unknown arm or metric, or no finite value.
    """

    def look_up(arm: str, metric: str) -> float:
        if arm not in arms:
            raise unknown("arm", arm, arms)
        if metric not in arms[arm]:
            raise unknown(f"metric of {arm}", metric, arms[arm])
        return arms[arm][metric]

    value = _walked(expression, look_up)
    if not math.isfinite(value):
        raise ZooError(f"{expression!r} is {value}")
    return value


def _walked(expression: str, look_up: Callable[[str, str], float], dry: bool = False) -> float:
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body, look_up, expression, dry)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ZooError(f"{expression[:80]!r} is no expression, or too long a one") from error
    except (ArithmeticError, ValueError) as error:
        raise ZooError(f"{expression!r} has no value: {error}") from error


def _value(node: ast.expr, look_up: Callable[[str, str], float], text: str, dry: bool = False) -> float:
    """The value of a node; `dry` visits every part and computes nothing."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.Attribute(value=ast.Name(id=arm), attr=metric):
            return look_up(arm, metric)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            value = _value(node.operand, look_up, text, dry)
            return -value if isinstance(node.op, ast.USub) else value
        case ast.BinOp(op=op) if type(op) in _BINARY:
            sides = [_value(side, look_up, text, dry) for side in (node.left, node.right)]
            return 1.0 if dry else _BINARY[type(op)](*sides)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS and arguments:
            values = [_value(argument, look_up, text, dry) for argument in arguments]
            if (len(values) == 1) != (name in ("abs", "log", "exp")):
                raise ZooError(f"{text!r}: {name} of {len(values)} numbers")
            return 1.0 if dry else float(_FUNCTIONS[name](*values))
    raise ZooError(f"{text!r}: {ast.unparse(node)!r} is none of numbers, ARM.METRIC, + - * /, {', '.join(_FUNCTIONS)}")


# --------------------------------------------------------------------------------------------------------------- schema


def _identifiers(table: dict[str, Any]) -> dict[str, Any]:
    for name in table:
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"{name!r} cannot stand in an expression: letters, digits and _ only")
    return table


def _dotted(options: dict[str, Any]) -> dict[str, Any]:
    for key in options:
        if not re.fullmatch(r"recipe|(model|data|trainer)(\.\w+)*", key):
            raise ValueError(f"{key!r} is no option of a recipe; they look like trainer.max_steps")
    return options


Options = Annotated[dict[str, Any], AfterValidator(_dotted)]
Measures = Annotated[dict[str, str], AfterValidator(_identifiers)]


class Stage(Facts):
    """One run of an arm: a recipe with options, which of the commands, and what is measured by which logged name.

    It starts from the checkpoint of the stage `after` (the one before it, where that is left out), whose path goes to
    the option `start`, such as ``model.init_from``, or ``ckpt_path`` for a stage that only evaluates. `quick` are the
    options of a run that tries the program.
    """

    recipe: str
    options: Options = Field({})
    run: list[Run] = Field(["fit", "validate"])
    after: str | None = None
    start: str = Field("model.init_from", pattern=r"^(ckpt_path|(model|data)(\.\w+)+)$")
    measure: Measures = Field({})
    quick: Options = Field({})


class Data(Facts):
    """A real data set by its card's name, and the options with which the embedded world stands in where it is not."""

    dataset: str
    otherwise: Options = Field({})

    @model_validator(mode="after")
    def _another(self) -> Data:
        if self.otherwise and "data.dataset" not in self.otherwise:
            raise ValueError("otherwise: names no data.dataset")
        return self


class SubClaim(Facts):
    """One thing that can hold or not: `effect` in `unit`, held where its whole 95 % interval lies above `bound`."""

    name: str
    statement: str
    effect: str
    unit: str
    bound: float = 0.0


class Declaration(Facts):
    """A claim in miniature.

    Args:
        statement: what is claimed.
        tried: what was tried before the run on pilot seeds, and what this scale cannot show.
        data: what all stages train on; null: what their recipes say.
        recipe, options, run, measure, quick: of a claim with a single stage; see :class:`Stage`.
        stages: of one with several, by name, in order.
        arms: by name the options in which an arm differs; with several stages by stage, null for a stage left out.
        claims: the sub-claims, the paper's central one first.
        seeds: of the run; a count n stands for 0 to n - 1.
        pilot_seeds: on which settings are explored.
    """

    statement: str
    tried: str = ""
    data: Data | None = None
    recipe: str | None = None
    options: Options = Field({})
    run: list[Run] = Field(["fit", "validate"])
    measure: Measures = Field({})
    quick: Options = Field({})
    stages: dict[str, Stage] = Field({})
    arms: dict[str, dict[str, Any]]
    claims: list[SubClaim] = Field(min_length=1)
    seeds: int | list[int] = 3
    pilot_seeds: list[int] = Field([100], min_length=1)

    @model_validator(mode="after")
    def _is_whole(self) -> Declaration:
        if (self.recipe is None) == (not self.stages):
            raise ValueError("a claim has a recipe, or stages that have one each")
        _identifiers(self.arms)
        _identifiers(self.stages)
        if len(self.arms) < 2:
            raise ValueError("arms: a claim compares two or more")
        for name, stage in self.stages.items():
            before = list(self.stages)[: list(self.stages).index(name)]
            if stage.after is not None and stage.after not in before:
                raise ValueError(f"stages.{name}.after: no stage {stage.after!r} before it")
        metrics = [metric for stage in self.steps.values() for metric in stage.measure]
        if twice := sorted({metric for metric in metrics if metrics.count(metric) > 1}):
            raise ValueError(f"{twice[0]!r} is measured in two stages; give it two names")
        for arm, options in self.arms.items():
            for name in options if self.stages else ():
                if name not in self.stages:
                    raise ValueError(f"arms.{arm}: no stage {name!r}; it has {', '.join(self.stages)}")
                _dotted(options[name] or {})
            if not self.stages:
                _dotted(options)
        measured = {arm: {metric for stage in self.plan(arm).values() for metric in stage.measure} for arm in self.arms}
        for claim in self.claims:
            try:
                for arm, metric in names_in(claim.effect):
                    if arm not in measured:
                        raise unknown("arm", arm, measured)
                    if metric not in measured[arm]:
                        raise unknown(f"metric of {arm}", metric, measured[arm])
            except ZooError as error:
                raise ValueError(f"claims: {claim.name}: {error}") from error
        if len(set(self.seed_list)) < 3:
            raise ValueError("seeds: a claim is run over three or more")
        return self

    @cached_property
    def steps(self) -> dict[str, Stage]:
        """The stages by name; a claim without `stages` has the single one "run"."""
        if self.stages:
            return self.stages
        assert self.recipe is not None
        names = ("recipe", "options", "run", "measure", "quick")
        return {"run": Stage(**{name: getattr(self, name) for name in names})}

    @property
    def seed_list(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def plan(self, arm: str, options: Mapping[str, Any] | None = None) -> dict[str, Stage]:
        """The stages that an arm goes through, each with the arm's options and, in `after`, whom it starts from.

        `options` come between those of the stages and those of the arm.
        """
        found: dict[str, Stage] = {}
        for name, stage in self.steps.items():
            own = self.arms[arm].get(name, {}) if self.stages else self.arms[arm]
            if own is None:
                continue
            chosen = {**stage.options, **(options or {}), **own}
            recipe = chosen.pop("recipe", stage.recipe)
            # What follows a stage that is left out starts from scratch.
            after = stage.after or next(reversed(list(self.steps)[: list(self.steps).index(name)]), None)
            told = {"recipe": recipe, "options": chosen, "after": after if after in found else None}
            found[name] = stage.model_copy(update=told)
        return found

    @property
    def digest(self) -> str:
        """Changes when anything of the declaration does that a result depends on."""
        facts = self.model_dump(mode="json", exclude={"tried", "quick", "pilot_seeds"})
        for stage in facts["stages"].values():
            stage.pop("quick")
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


# -------------------------------------------------------------------------------------------------------------- reading


def folder(paper: str) -> Path:
    """Where the paper's claim lies and, in ``results``, its result.

    Raises:
        ZooError: no such paper.
    """
    card = catalog.paper(paper)
    return card.path.parent / "claims" if card.is_own else share("benchmarks") / "claims"


def read(paper: str) -> Declaration:
    """The paper's claim.

    Raises:
        ZooError: no such paper, no claim, or a file that does not fit the schema.
    """
    path = folder(paper) / f"{paper}.yaml"
    if not path.is_file():
        raise ZooError(f"the paper {paper!r} has no claim: there is no {path.name} in {path.parent}")
    return validated(Declaration, path, read_facts(path))


def result(paper: str) -> dict[str, Any] | None:
    """The kept result of the paper's claim, None where it has not been run."""
    path = folder(paper) / "results" / f"{paper}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
