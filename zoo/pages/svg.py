"""Curves as SVG, small and without a library: lines over steps, with the values as hover titles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from zoo.pages.html import Markup, el, markup

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 380, 210, 46, 24, 8, 8
_POINTS = 240  # of a line; more is thinned
_TITLES = 48  # values of a line that the pointer finds

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers between two."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (m * step) - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _label(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def thinned(points: Points, most: int = _POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def curves(series: Mapping[str, Points], zero: bool = False, reach: tuple[float, float] | None = None) -> Markup:
    """Lines by name over steps, with axes and a legend where there are several; nothing where no line has a point.

    Args:
        series: (step, value) of each line; what is not finite is left out.
        zero: the scale begins at 0.
        reach: the first and the last step of the axis; None: those of the points.
    """
    finite = {
        name: sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
        for name, points in series.items()
    }
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return Markup()
    values = [y for points in finite.values() for _, y in points]
    steps = [x for points in finite.values() for x, _ in points]
    low, high = (min(values), max(values)) if not zero else (min(0.0, *values), max(values))
    rim = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low if zero and low == 0 else low - rim), high + rim
    first, last = reach or (min(steps), max(steps))
    if first == last:
        first, last = first - 1, last + 1

    def x_of(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (x - first) / (last - first)

    def y_of(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * (y - low) / (high - low)

    marks = []
    for value in ticks(low, high):
        height = y_of(value)
        marks.append(el("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{height:.1f}", y2=f"{height:.1f}"))
        marks.append(el("text", _label(value), x=_LEFT - 6, y=f"{height + 4:.1f}", text_anchor="end"))
    for step in ticks(first, last, 5):
        if step == round(step):
            marks.append(el("text", _label(step), x=f"{x_of(step):.1f}", y=_HEIGHT - 6, text_anchor="middle"))
    for n, (name, points) in enumerate(finite.items()):
        colour = f"s{n % 6}"
        line = thinned(points)
        places = [(f"{x_of(x):.1f}", f"{y_of(y):.1f}") for x, y in line]
        if len(line) > 1:
            marks.append(el("polyline", points=" ".join(f"{x},{y}" for x, y in places), class_=colour))
        else:
            marks.append(el("circle", cx=places[0][0], cy=places[0][1], r=3, class_=f"{colour} dot"))
        for (step, value), (x, y) in list(zip(line, places, strict=True))[:: max(1, math.ceil(len(line) / _TITLES))]:
            title = el("title", f"{name} {value:.4g} at step {step:g}")
            marks.append(el("circle", title, cx=x, cy=y, r=5, class_=colour))
    names = [el("li", el("span", name), class_=f"s{n % 6}") for n, name in enumerate(finite)]
    legend = el("ul", names, class_="legend") if len(finite) > 1 else None
    label = f"{', '.join(finite)} over {len(steps)} points"
    drawn = el("svg", marks, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", class_="chart", role="img", aria_label=label)
    return markup(drawn, legend)


def figure(
    title: str, series: Mapping[str, Points], zero: bool = False, reach: tuple[float, float] | None = None
) -> Markup:
    """:func:`curves` under a title; nothing where there is nothing to draw."""
    drawn = curves(series, zero, reach)
    return el("figure", el("h3", title), drawn) if drawn else Markup()
