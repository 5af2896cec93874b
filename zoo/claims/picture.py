"""The picture of a claim's result: arms with their intervals, sub-claims as a forest plot. SVG, or PNG by Pillow."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.claims.intervals import interval
from zoo.errors import ZooError

_WIDTH, _MARGIN, _ROW = 960, 24, 22
_INK, _FAINT, _ARM = "#222222", "#999999", "#2f6db3"
_VERDICTS = {"held": "#2a7d46", "not held": "#b3382c", "undecided": "#946c00"}
# Of results that do not say which of an arm's numbers were measured for the claim.
_ASIDE = ("seconds", "loss_at_", "parameters", "objects", "tests")


class _Sheet:
    """Lines, dots and words at places in pixels, y downwards; written as SVG or PNG."""

    def __init__(self) -> None:
        self.marks: list[tuple[Any, ...]] = []
        self.height = 0.0

    def line(
        self, x0: float, y0: float, x1: float, y1: float, colour: str, width: float = 1, dashed: bool = False
    ) -> None:
        self.marks.append(("line", x0, y0, x1, y1, colour, width, dashed))

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        self.marks.append(("dot", x, y, radius, colour))

    def word(self, x: float, y: float, text: str, size: int = 12, colour: str = _INK, anchor: str = "start") -> None:
        """`text`, its middle at height y, and its "start", "middle" or "end" at x."""
        self.marks.append(("word", x, y, text, size, colour, anchor))

    def svg(self) -> str:
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {self.height:.0f}" width="{_WIDTH}"'
            ' font-family="system-ui, sans-serif">',
            f'<rect width="{_WIDTH}" height="{self.height:.0f}" fill="#ffffff"/>',
        ]
        for kind, *mark in self.marks:
            if kind == "line":
                x0, y0, x1, y1, colour, width, dashed = mark
                dash = ' stroke-dasharray="4 3"' if dashed else ""
                place = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
                out.append(f'<line {place} stroke="{colour}" stroke-width="{width}"{dash}/>')
            elif kind == "dot":
                x, y, radius, colour = mark
                out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')
            else:
                x, y, text, size, colour, anchor = mark
                look = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}" dominant-baseline="central"'
                out.append(f'<text x="{x:.1f}" y="{y:.1f}" {look}>{html.escape(text)}</text>')
        return "\n".join([*out, "</svg>\n"])

    def png(self, path: Path, scale: int = 2) -> None:
        from PIL import Image, ImageDraw, ImageFont

        from zoo.ops.sheet import drawable

        sheet = Image.new("RGB", (_WIDTH * scale, math.ceil(self.height) * scale), "#ffffff")
        draw = ImageDraw.Draw(sheet)
        for kind, *mark in self.marks:
            if kind == "line":
                x0, y0, x1, y1, colour, width, dashed = mark
                parts = max(1, round(math.hypot(x1 - x0, y1 - y0) / 7)) if dashed else 1
                for n in range(parts):
                    ends = (n / parts, (n + 0.57) / parts if dashed else 1)
                    points = [(scale * (x0 + (x1 - x0) * t), scale * (y0 + (y1 - y0) * t)) for t in ends]
                    draw.line(points, fill=colour, width=round(scale * width))
            elif kind == "dot":
                x, y, radius, colour = (scale * value if isinstance(value, float | int) else value for value in mark)
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            else:
                x, y, text, size, colour, anchor = mark
                font = ImageFont.load_default(size=scale * size)
                side = {"start": "l", "middle": "m", "end": "r"}[anchor]
                draw.text((scale * x, scale * y), drawable(text), fill=colour, font=font, anchor=f"{side}m")
        sheet.save(path)


class _Axis:
    """A scale from x0 to x1 that holds all `values`."""

    def __init__(self, x0: float, x1: float, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        rim = 0.06 * (high - low) or 0.1 * (abs(high) or 1.0)
        self.x0, self.x1, self.low, self.high = x0, x1, low - rim, high + rim
        step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
        step *= next(m for m in (5, 2, 1) if (self.high - self.low) / (m * step) >= 2)
        first = math.ceil(self.low / step)
        self.ticks = [n * step for n in range(first, math.floor(self.high / step) + 1)]

    def at(self, value: float) -> float:
        return self.x0 + (self.x1 - self.x0) * (value - self.low) / (self.high - self.low)

    def draw(self, sheet: _Sheet, y: float) -> None:
        sheet.line(self.x0, y, self.x1, y, _FAINT)
        for tick in self.ticks:
            sheet.line(self.at(tick), y, self.at(tick), y + 3, _FAINT)
            sheet.word(self.at(tick), y + 11, f"{tick:.4g}", 10, _FAINT, "middle")


def _bar(sheet: _Sheet, axis: _Axis, y: float, found: Mapping[str, Any], colour: str) -> None:
    """Interval, seeds and mean."""
    if found["low"] is not None:
        sheet.line(axis.at(found["low"]), y, axis.at(found["high"]), y, colour, 2)
        for end in (found["low"], found["high"]):
            sheet.line(axis.at(end), y - 4, axis.at(end), y + 4, colour, 1.5)
    for value in found["values"]:
        sheet.dot(axis.at(value), y, 2, _FAINT)
    sheet.dot(axis.at(found["mean"]), y, 4, colour)


def _reach(found: Mapping[str, Any]) -> list[float]:
    return [value for value in (found["low"], found["high"], *found["values"]) if value is not None]


def _measured(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """{metric: {arm: values over the seeds}} of what was measured for the claim."""
    metrics: dict[str, dict[str, list[float]]] = {}
    for arm, facts in arms.items():
        names = facts.get("measured") or [
            name for name, values in facts.items() if isinstance(values, list) and not any(a in name for a in _ASIDE)
        ]
        for name in names:
            values = facts[name]
            if all(isinstance(value, float | int) for value in values):
                metrics.setdefault(name, {})[arm] = values
    return metrics


def draw(result: Mapping[str, Any]) -> _Sheet:
    """The picture of a result file's content."""
    sheet, y = _Sheet(), 26.0
    for n, line in enumerate(textwrap.wrap(f"{result['claim']}: {result['statement']}", 118)):
        sheet.word(_MARGIN, y + 20 * n, line, 15)
        y += 20 * (n > 0)
    settings = result["settings"]
    plural = "s" * (settings["seeds"] != 1)
    where = f"{settings['seeds']} seed{plural} on {settings.get('dataset', 'drawn scenes')}; bars are 95 % intervals"
    marks = [name for name in ("quick", "pilot") if settings.get(name)]
    sheet.word(_MARGIN, y + 24, where + "".join(f"; a {name} run, no result" for name in marks), 11, _FAINT)
    y += 56
    y = _forest(sheet, y, result["claims"])
    y = _arms(sheet, y + 20, _measured(result["arms"]))
    sheet.height = y
    return sheet


def _forest(sheet: _Sheet, y: float, claims: Sequence[Mapping[str, Any]]) -> float:
    """The sub-claims, a row each; the dashed line is the bound that the whole interval must pass."""
    for claim in claims:
        found, colour = claim["effect"], _VERDICTS[claim["verdict"]]
        bound = claim["bound"] if "bound" in claim else float(claim["criterion"].split("above ")[1].split()[0])
        lines = textwrap.wrap(claim["statement"], 62)
        middle = y + 8 * (len(lines) - 1)
        sheet.word(_MARGIN, middle, claim["verdict"], 12, colour)
        for n, line in enumerate(lines):
            sheet.word(_MARGIN + 76, y + 16 * n, line, 12)
        axis = _Axis(500, 800, [*_reach(found), bound])
        sheet.line(axis.at(bound), middle - 14, axis.at(bound), middle + 14, _INK, 1, dashed=True)
        _bar(sheet, axis, middle, found, colour)
        axis.draw(sheet, middle + 16)
        sheet.word(812, middle, f"{found['mean']:.3g}", 12)
        for n, line in enumerate(textwrap.wrap(claim["unit"], 18)):
            sheet.word(856, middle + 12 * n, line, 10, _FAINT)
        y = middle + 8 * (len(lines) - 1) + 48
    return y


def _arms(sheet: _Sheet, y: float, metrics: Mapping[str, Mapping[str, list[float]]]) -> float:
    """A panel for each metric, two side by side; a row for each arm."""
    half = (_WIDTH - 2 * _MARGIN) / 2
    for first in range(0, len(metrics), 2):
        below = y
        for place, (metric, arms) in enumerate(list(metrics.items())[first : first + 2]):
            left, row = _MARGIN + place * half, y
            sheet.word(left, row, metric, 12)
            found = {arm: interval(values) for arm, values in arms.items()}
            axis = _Axis(left + 140, left + half - 84, [value for one in found.values() for value in _reach(one)])
            for arm, one in found.items():
                row += _ROW
                sheet.word(left + 130, row, arm, 11, _INK, "end")
                _bar(sheet, axis, row, one, _ARM)
                sheet.word(left + half - 76, row, f"{one['mean']:.4g}", 11)
            axis.draw(sheet, row + 13)
            below = max(below, row + 52)
        y = below
    return y


def save(result: Mapping[str, Any], path: str | Path) -> Path:
    """Writes the picture of a result as ``.svg`` or ``.png``; the path. Raises ZooError for another suffix."""
    path, sheet = Path(path), draw(result)
    if path.suffix not in (".svg", ".png"):
        raise ZooError(f"a claim is drawn as .svg or .png, not {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(sheet.svg(), encoding="utf-8")
    else:
        sheet.png(path)
    return path
