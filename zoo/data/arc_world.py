"""An embedded world like ARC's: many small rules that turn one coloured grid into another.

A task is a rule with its own colours and directions; its pairs are drawn from a seed, a split and an index, so that the
world needs no download and is the same everywhere. Colour 0 is the ground.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zoo.data.shapes import hash64
from zoo.errors import ZooError, unknown

Grid = np.ndarray
Sampler = Callable[[np.random.Generator], tuple[Grid, Grid]]
SPLITS = ("training", "evaluation")


def _size(rng: np.random.Generator, side: int, low: int = 3) -> tuple[int, int]:
    height, width = rng.integers(low, side + 1, 2)
    return int(height), int(width)


def _speckle(rng: np.random.Generator, side: int, colors: Grid, density: float = 0.4, low: int = 3) -> Grid:
    """Coloured cells strewn over the ground; at least one."""
    shape = _size(rng, side, low)
    grid = np.where(rng.random(shape) < density, rng.choice(colors, shape), 0)
    if not grid.any():
        grid[rng.integers(shape[0]), rng.integers(shape[1])] = colors[0]
    return grid


def _boxes(rng: np.random.Generator, side: int, color: int, hollow: bool) -> Grid:
    """A rectangle of one colour, or its frame, at least 3 cells each way."""
    height, width = _size(rng, side, 5)
    h, w = int(rng.integers(3, height)), int(rng.integers(3, width))
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    grid = np.zeros((height, width), np.int64)
    grid[top : top + h, left : left + w] = color
    if hollow:
        grid[top + 1 : top + h - 1, left + 1 : left + w - 1] = 0
    return grid


def _geometric(change: Callable[[Grid], Grid]) -> Callable[[np.random.Generator, int], Sampler]:
    def make(task: np.random.Generator, side: int) -> Sampler:
        colors = _colors(task, 3)

        def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
            grid = _speckle(rng, side, colors)
            return grid, change(grid)

        return pair

    return make


def _colors(task: np.random.Generator, count: int) -> Grid:
    return task.permutation(9)[:count] + 1


def _recolor(task: np.random.Generator, side: int) -> Sampler:
    old, new = _colors(task, 3), task.permutation(9)[:3] + 1
    table = np.arange(10)
    table[old] = new

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _speckle(rng, side, old, 0.6)
        return grid, table[grid]

    return pair


def _shift(task: np.random.Generator, side: int) -> Sampler:
    colors, (down, right) = _colors(task, 2), task.permutation([(0, 1), (1, 0), (1, 1), (0, -1), (-1, 0)])[0]

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _speckle(rng, side, colors)
        return grid, np.roll(grid, (down, right), (0, 1))

    return pair


def _fall(task: np.random.Generator, side: int) -> Sampler:
    colors, turns = _colors(task, 2), int(task.integers(4))

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _speckle(rng, side, colors)
        turned = np.rot90(grid, turns)
        order = np.argsort(turned != 0, axis=0, kind="stable")
        return grid, np.rot90(np.take_along_axis(turned, order, 0), -turns)

    return pair


def _repeat(task: np.random.Generator, side: int) -> Sampler:
    colors, kind = _colors(task, 3), int(task.integers(4))
    changes: list[Callable[[Grid], Grid]] = [
        lambda g: np.tile(g, (1, 2)),
        lambda g: np.tile(g, (2, 1)),
        lambda g: np.concatenate([g, g[:, ::-1]], 1),
        lambda g: np.concatenate([g, g[::-1]], 0),
    ]

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _speckle(rng, side // 2, colors, low=2)
        return grid, changes[kind](grid)

    return pair


def _enlarge(task: np.random.Generator, side: int) -> Sampler:
    colors = _colors(task, 3)

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _speckle(rng, side // 2, colors, low=2)
        return grid, grid.repeat(2, 0).repeat(2, 1)

    return pair


def _crop(task: np.random.Generator, side: int) -> Sampler:
    color, mark = _colors(task, 2)

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _boxes(rng, side, color, hollow=False)
        rows, columns = np.nonzero(grid)
        inside = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        grid[inside] = np.where(rng.random(grid[inside].shape) < 0.3, mark, color)
        return grid, grid[inside].copy()

    return pair


def _frame(task: np.random.Generator, side: int) -> Sampler:
    *colors, edge = _colors(task, 3)

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _speckle(rng, side, np.array(colors))
        out = grid.copy()
        out[[0, -1]] = out[:, [0, -1]] = edge
        return grid, out

    return pair


def _halo(task: np.random.Generator, side: int) -> Sampler:
    (dot, halo), diagonal = _colors(task, 2), bool(task.integers(2))
    steps = [(-1, -1), (-1, 1), (1, -1), (1, 1)] if diagonal else [(-1, 0), (1, 0), (0, -1), (0, 1)]

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _speckle(rng, side, np.array([dot]), 0.08, low=4)
        out = np.pad(grid, 1)
        for down, right in steps:
            near = np.roll(np.pad(grid, 1), (down, right), (0, 1))
            out[(out == 0) & (near == dot)] = halo
        return grid, out[1:-1, 1:-1].copy()

    return pair


def _fill(task: np.random.Generator, side: int) -> Sampler:
    line, inner = _colors(task, 2)

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _boxes(rng, side, line, hollow=True)
        rows, columns = np.nonzero(grid)
        out = grid.copy()
        out[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()] = inner
        return grid, out

    return pair


def _lines(task: np.random.Generator, side: int) -> Sampler:
    color, across = _colors(task, 1)[0], bool(task.integers(2))

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _speckle(rng, side, np.array([color]), 0.06, low=4)
        hit = grid.any(axis=1 if across else 0, keepdims=True)
        return grid, np.where(hit, color, np.zeros_like(grid))

    return pair


def _keep(task: np.random.Generator, side: int) -> Sampler:
    colors = _colors(task, 3)

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = _speckle(rng, side, colors, 0.6)
        return grid, np.where(grid == colors[0], grid, 0)

    return pair


def _logic(task: np.random.Generator, side: int) -> Sampler:
    (left, right, wall, out), kind = _colors(task, 4), int(task.integers(3))
    rules: list[Callable[[Grid, Grid], Grid]] = [np.logical_and, np.logical_or, np.logical_xor]

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        height, width = int(rng.integers(3, side + 1)), int(rng.integers(2, max(3, (side - 1) // 2 + 1)))
        a, b = rng.random((2, height, width)) < 0.5
        middle = np.full((height, 1), wall)
        return np.concatenate([a * left, middle, b * right], 1), rules[kind](a, b) * out

    return pair


def _connect(task: np.random.Generator, side: int) -> Sampler:
    (end, line), upright = _colors(task, 2), bool(task.integers(2))

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = np.zeros(_size(rng, side, 4), np.int64)
        out = grid.copy()
        for row in rng.permutation(len(grid))[: int(rng.integers(1, 3))]:
            a, b = np.sort(rng.permutation(grid.shape[1])[:2])
            out[row, a : b + 1] = line
            grid[row, [a, b]] = out[row, [a, b]] = end
        return (grid.T.copy(), out.T.copy()) if upright else (grid, out)

    return pair


def _count(task: np.random.Generator, side: int) -> Sampler:
    color, bar = _colors(task, 2)

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        grid = np.zeros(_size(rng, side), np.int64)
        count = int(rng.integers(1, min(6, side) + 1))
        grid.reshape(-1)[rng.permutation(grid.size)[:count]] = color
        return grid, np.full((1, count), bar)

    return pair


def _complete(task: np.random.Generator, side: int) -> Sampler:
    colors, upright = _colors(task, 3), bool(task.integers(2))

    def pair(rng: np.random.Generator) -> tuple[Grid, Grid]:
        half = _speckle(rng, side // 2, colors, 0.6, low=2)
        out = np.concatenate([half, half[:, ::-1]], 1)
        grid = np.concatenate([half, np.zeros_like(half)], 1)
        return (grid.T.copy(), out.T.copy()) if upright else (grid, out)

    return pair


RULES: dict[str, Callable[[np.random.Generator, int], Sampler]] = {
    "recolor": _recolor,
    "keep": _keep,
    "frame": _frame,
    "flip_columns": _geometric(lambda g: g[:, ::-1]),
    "flip_rows": _geometric(lambda g: g[::-1]),
    "fill": _fill,
    "shift": _shift,
    "lines": _lines,
    "halo": _halo,
    "repeat": _repeat,
    "enlarge": _enlarge,
    "connect": _connect,
    "rotate_180": _geometric(lambda g: g[::-1, ::-1]),
    "transpose": _geometric(lambda g: g.T),
    "rotate_90": _geometric(np.rot90),
    "complete": _complete,
    "fall": _fall,
    "logic": _logic,
    "crop": _crop,
    "count": _count,
}


def make_task(
    split: str, index: int, pairs: int, test_pairs: int, side: int = 10, seed: int = 0, rules: list[str] | None = None
) -> tuple[str, list[tuple[Grid, Grid]]]:
    """Task number `index` of a split: its name, and `pairs` + `test_pairs` pairs of int64 grids (H, W) up to `side`.

    The rules take turns; what a rule leaves open (colours, directions) is drawn anew for every task. A pair depends on
    (seed, split, index, its number) alone. Outputs differ from their inputs, and tests from what comes before.

    Raises:
        ZooError: an unknown split or rule, or grids too small for the rules.
    """
    if split not in SPLITS:
        raise unknown("split of arc_like", split, SPLITS)
    if side < 5 or side > 30:
        raise ZooError(f"arc_like: max_side must lie in 5..30, got {side}")
    names = list(RULES) if rules is None else rules
    for name in names:
        if name not in RULES:
            raise unknown("rule of arc_like", name, RULES)
    rule = names[index % len(names)]
    words = (seed, SPLITS.index(split), index)
    sample = RULES[rule](np.random.default_rng(int(hash64(*words)[0])), side)
    found: list[tuple[Grid, Grid]] = []
    seen: set[bytes] = set()
    for number in range(20 * (pairs + test_pairs)):
        grid, out = sample(np.random.default_rng(int(hash64(*words, number + 1)[0])))
        key = bytes([*grid.shape]) + grid.astype(np.uint8).tobytes()
        late = number > 10 * (pairs + test_pairs)  # a rule may run out of different grids
        if (key not in seen and not np.array_equal(grid, out)) or late:
            seen.add(key)
            found.append((np.ascontiguousarray(grid), np.ascontiguousarray(out)))
        if len(found) == pairs + test_pairs:
            break
    return f"{split}_{index:03d}_{rule}", found
