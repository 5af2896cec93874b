"""ARC (the Abstraction and Reasoning Corpus): tasks, the canvas they are drawn on, pseudo-tasks, data modules.

A grid is an integer array (H, W) of colours 0..9, sides 1..30. A task has demonstrations and tests, pairs of input and
output; the rule between them is the task's own. Layouts on disk, found by themselves:

- a folder of one json a task, ``<dir>[/data]/<split>/*.json``: the ARC-AGI and ARC-AGI-2 repositories;
- one json a split, ``<dir>/<split>.json``: {task: {"train": [...], "test": [...]}};
- Kaggle's, ``<dir>/arc-agi_<split>_challenges.json`` with ``..._solutions.json`` beside it (none: answers unknown);
- further pairs of known tasks, ``<dir>/tasks/*.json``: RE-ARC, each file a list of pairs.

``arc_like`` is the embedded world of :mod:`zoo.data.arc_world`. Splits are "training" and "evaluation". On a canvas,
10 is the background, which as a target is not scored, and 11 the border that ends an output on the right and below.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.data import files
from zoo.data.arc_world import Grid, make_task
from zoo.data.base import SALT, Batch, SeededDataModule, at_least_one, key_parts, sample_seeds
from zoo.data.loader import Key
from zoo.errors import ZooError, unknown

BACKGROUND, BORDER = 10, 11
NUM_COLORS = 12  # 0..9, background, border
MAX_SIDE = 30
WORLD = "arc_like"


class Pair(NamedTuple):
    """An input grid and its output, None where the answer is not known."""

    input: Grid
    output: Grid | None


class ARCTask(NamedTuple):
    """A task: its name, its place among the tasks of its split, demonstrations and tests."""

    name: str
    index: int  # type: ignore[assignment]  # as a field, not tuple's method
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


# ------------------------------------------------------------------------------------------------------------- reading


def read_tasks(dataset: str, split: str, data_dir: str | Path | None = None, **options: Any) -> list[ARCTask]:
    """The tasks of a split, in the order of their names.

    Args:
        dataset: ``arc_like``, the name of a data card (then `data_dir` says where it lies), or a folder.
        split: "training", "evaluation", or what else the folder has ("test" on Kaggle).
        data_dir: the folder of a carded set.
        **options: of ``arc_like``: `tasks`, `pairs`, `test_pairs`, `max_side`, `seed`, `rules`.

    Raises:
        ZooError: no such set or split, an unknown layout, or a file that holds no tasks.
    """
    if dataset == WORLD:
        return _world(split, **options)
    if options:
        raise ZooError(f"{dataset} takes no data.options ({', '.join(options)}); they are {WORLD}'s")
    folder = _folder(dataset, data_dir)
    contents = _contents(folder, split)
    return [_task(name, index, contents[name], f"{folder}: {name}") for index, name in enumerate(sorted(contents))]


def read_task_file(path: str | Path) -> list[ARCTask]:
    """The tasks of one json: a single task, named by the file, or many by their names."""
    content = _json(Path(path), dict)
    if "train" in content and "test" in content:
        content = {Path(path).stem: content}
    return [_task(str(name), index, content[name], f"{path}: {name}") for index, name in enumerate(sorted(content))]


def read_pairs(folder: str | Path) -> dict[str, list[Pair]]:
    """Further pairs by task, from ``<folder>/tasks/*.json`` (RE-ARC) or the files in the folder itself."""
    root = Path(folder).expanduser()
    root = root / "tasks" if (root / "tasks").is_dir() else root
    paths = sorted(root.glob("[!.]*.json"))
    if not paths:
        raise ZooError(f"{folder}: no tasks/*.json with further pairs (RE-ARC's layout)")
    return {path.stem: [_pair(entry, str(path)) for entry in _json(path, list)] for path in paths}


def _world(split: str, tasks: int = 40, pairs: int | None = None, test_pairs: int | None = None, max_side: int = 10,
           seed: int = 0, rules: list[str] | None = None) -> list[ARCTask]:  # fmt: skip
    at_least_one(tasks=tasks, pairs=pairs, test_pairs=test_pairs)
    # Known tasks come with many pairs, as with RE-ARC; new ones with three, as in ARC.
    count = pairs or (100 if split == "training" else 3)
    tests = test_pairs or (8 if split == "training" else 1)
    found = []
    for index in range(tasks):
        name, drawn = make_task(split, index, count, tests, max_side, seed, rules)
        both = tuple(Pair(*pair) for pair in drawn)
        found.append(ARCTask(name, index, both[:count], both[count:]))
    return found


def _folder(dataset: str, data_dir: str | Path | None) -> Path:
    from zoo.catalog import data_card, list_datasets

    if dataset in list_datasets():
        if data_dir is None:
            home = data_card(dataset).home
            raise ZooError(f"{dataset} is read from a folder: give data.data_dir, such as a checkout of {home}")
        root = Path(data_dir).expanduser()
        root = root / dataset if (root / dataset).is_dir() else root
    else:
        root = Path(dataset).expanduser()
        if not root.exists() and "/" not in dataset:
            raise unknown("dataset", dataset, [WORLD, *(name for name in list_datasets() if name.startswith("arc"))])
    if not root.is_dir():
        raise ZooError(f"no such folder {str(root)!r}")
    return root


def _contents(folder: Path, split: str) -> dict[str, Any]:
    """{task: {"train", "test"}} of a split, whatever the layout."""
    for place in (folder / "data" / split, folder / split):
        paths = sorted(place.glob("[!.]*.json")) if place.is_dir() else []
        if paths:
            return {path.stem: _json(path, dict) for path in paths}
    if (folder / f"{split}.json").is_file():
        return _json(folder / f"{split}.json", dict)
    challenges = folder / f"arc-agi_{split}_challenges.json"
    if challenges.is_file():
        found = _json(challenges, dict)
        solutions = folder / f"arc-agi_{split}_solutions.json"
        for name, answers in (_json(solutions, dict) if solutions.is_file() else {}).items():
            tests = found[name].get("test") if isinstance(found.get(name), dict) else None
            if not isinstance(tests, list) or not isinstance(answers, list):
                raise ZooError(f"{solutions}: {name} is no list of answers to the tests in {challenges.name}")
            for test, answer in zip(tests, answers, strict=False):
                if isinstance(test, dict):
                    test["output"] = answer
        return found
    raise ZooError(
        f"{folder}: no split {split!r}; need {split}/*.json, {split}.json or arc-agi_{split}_challenges.json"
    )


def splits_in(folder: Path) -> list[str]:
    """The splits of ARC tasks in a folder, told by the names there and, where others use them too, a first task."""
    found = {path.name[len("arc-agi_") : -len("_challenges.json")] for path in folder.glob("arc-agi_*_challenges.json")}
    for split in ("training", "evaluation", "test"):
        places = [p for place in (folder / "data" / split, folder / split) for p in place.glob("[!.]*.json")]
        whole = folder / f"{split}.json"
        if places or whole.is_file():
            content = files.read_json(sorted(places)[0] if places else whole)
            first = content if places else next(iter(content.values()), None) if isinstance(content, dict) else None
            if isinstance(first, dict) and "train" in first:
                found.add(split)
    return sorted(found, reverse=True)


def _json(path: Path, kind: type) -> Any:
    content = files.read_json(path)
    if not isinstance(content, kind) or not content:
        raise ZooError(f"{path}: holds no ARC tasks")
    return content


def _task(name: str, index: int, content: Any, where: str) -> ARCTask:
    parts = [content.get(part) for part in ("train", "test")] if isinstance(content, dict) else [None]
    # null: the tests are not known
    if not isinstance(parts[0], list) or not isinstance(parts[1], list | None):
        raise ZooError(f"{where}: a task has 'train' and 'test', lists of pairs")
    return ARCTask(name, index, *(tuple(_pair(entry, where) for entry in part or ()) for part in parts))


def _pair(entry: Any, where: str) -> Pair:
    if not isinstance(entry, dict) or "input" not in entry:
        raise ZooError(f"{where}: a pair has 'input' and 'output'")
    output = entry.get("output")
    return Pair(_grid(entry["input"], where), None if output is None else _grid(output, where))


def _grid(rows: Any, where: str) -> Grid:
    try:
        grid = np.array(rows)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ZooError(f"{where}: a grid is a list of equally long rows of colours") from error
    whole = grid.dtype.kind in "iu" or (grid.dtype.kind == "f" and bool((grid % 1 == 0).all()))
    if grid.ndim != 2 or not grid.size or not whole or grid.min() < 0 or grid.max() > 9:
        raise ZooError(f"{where}: a grid is a list of equally long rows of colours 0..9")
    return grid.astype(np.uint8)  # RE-ARC has 800 000 of them


# -------------------------------------------------------------------------------------------------------------- canvas


class View(NamedTuple):
    """How a pair lies on a canvas: each cell `scale` x `scale` pixels, the upper left corner at column x and row y."""

    scale: int
    x: int
    y: int


def _extent(pair: Pair) -> tuple[int, int]:
    """The larger height and the larger width of both grids."""
    grids = [pair.input] if pair.output is None else [pair.input, pair.output]
    return max(g.shape[0] for g in grids), max(g.shape[1] for g in grids)


def draw_view(
    pair: Pair, size: int, draw: Callable[[int, int], int], scale: int | None = None, translate: bool = True
) -> View:
    """A view of `pair` on a canvas of `size` x `size`, drawn in the order scale, x, y.

    Args:
        draw: gives an integer from low to high, both included.
        scale: a fixed one instead of one from 1 to floor((size - 2) / longest side).
        translate: draw the place, from 1 to size - 2 - extent; else the corner lies at (1, 1).

    Raises:
        ZooError: the grids do not fit.
    """
    height, width = _extent(pair)
    largest = (size - 2) // max(height, width)
    if largest < 1 or (scale is not None and not 1 <= scale <= largest):
        raise ZooError(f"grids of up to {height} x {width} cells at scale {scale or 1} do not fit a canvas of {size}")
    scale = draw(1, largest) if scale is None else scale
    x, y = (
        draw(1, size - 2 - scale * side) if translate and size - 2 > scale * side else 1 for side in (width, height)
    )
    return View(scale, x, y)


def place(pair: Pair, size: int, view: View) -> tuple[Grid, Grid, Grid]:
    """The canvases (size, size), uint8, of input, mask (1 on the input grid) and target.

    The target is the output with its border; all background, where there is no output.
    """
    canvas, target = np.full((2, size, size), BACKGROUND, np.uint8)
    mask = np.zeros((size, size), np.uint8)
    scale, x, y = view
    height, width = scale * pair.input.shape[0], scale * pair.input.shape[1]
    canvas[y : y + height, x : x + width] = pair.input.repeat(scale, 0).repeat(scale, 1)
    mask[y : y + height, x : x + width] = 1
    if pair.output is not None:
        height, width = scale * pair.output.shape[0], scale * pair.output.shape[1]
        target[y : y + height + 1, x : x + width + 1] = BORDER
        target[y : y + height, x : x + width] = pair.output.repeat(scale, 0).repeat(scale, 1)
    return canvas, mask, target


def evaluation_view(pair: Pair, size: int, scale: int = 2) -> View:
    """The fixed view of evaluation: `scale`, or the largest that fits, with the corner at (1, 1)."""
    return View(max(1, min(scale, (size - 2) // max(_extent(pair)))), 1, 1)


def stack(placed: Sequence[tuple[Grid, Grid, Grid]]) -> dict[str, Tensor]:
    """Placed pairs as {"image", "mask", "target"}: (B, S, S) int64, bool, int64."""
    image, mask, target = (torch.from_numpy(np.stack(part)) for part in zip(*placed, strict=True))
    return {"image": image.long(), "mask": mask.bool(), "target": target.long()}


def read_grid(canvas: Grid, view: View, suffix: str = "", color_map: dict[int, int] | None = None) -> Grid:
    """The grid (H, W) that a predicted canvas (S, S) shows at a view, in the original task's terms.

    Cropped at the corner: as wide as the first row is before its first border, as high as the first column; then the
    geometric change that `suffix` names is undone, each block of scale x scale becomes its most frequent colour (the
    smallest of equals; blocks may be cut off at the end), and `color_map` is inverted. A grid may be empty: (0, 0).
    """
    canvas = np.asarray(canvas)[view.y :, view.x :]
    width, height = (
        int(np.argmax(line == BORDER)) if (line == BORDER).any() else len(line) for line in (canvas[0], canvas[:, 0])
    )
    grid = canvas[:height, :width]
    if grid.size:
        grid = undo(grid, suffix)
    if not len(grid):
        return np.zeros((0, 0), np.int64)
    grid = _shrink(grid, view.scale)
    if color_map:
        table = np.arange(NUM_COLORS)
        for color, new in color_map.items():
            table[new] = color
        grid = table[grid]
    return grid.astype(np.int64)


def _shrink(grid: Grid, scale: int) -> Grid:
    if scale == 1:
        return grid
    rows, columns = (-(-side // scale) for side in grid.shape)
    votes = np.zeros((rows * scale, columns * scale, NUM_COLORS), np.int64)
    votes[: grid.shape[0], : grid.shape[1]] = grid[..., None] == np.arange(NUM_COLORS)
    return votes.reshape(rows, scale, columns, scale, NUM_COLORS).sum((1, 3)).argmax(-1)


@dataclass(frozen=True)
class Views:
    """How views on a canvas of `size` x `size` are drawn; `scale` and `translate` as of :func:`draw_view`."""

    size: int
    scale: int | None = None
    translate: bool = True

    def draw(self, pair: Pair, rng: random.Random) -> View:
        return draw_view(pair, self.size, rng.randint, self.scale, self.translate)

    def place(self, pairs: Sequence[Pair], views: Sequence[View], device: torch.device) -> dict[str, Tensor]:
        """Pairs at their views as :func:`stack` gives them, on `device`."""
        placed = stack([place(pair, self.size, view) for pair, view in zip(pairs, views, strict=True)])
        return {key: value.to(device, non_blocking=True) for key, value in placed.items()}


class Canvas(nn.Module):
    """A grid (H, W) on the canvas as weights expect it at evaluation: {"image", "mask"}, (1, size, size)."""

    def __init__(self, size: int, scale: int = 2) -> None:
        super().__init__()
        self.size, self.scale = size, scale

    def forward(self, grid: Any) -> dict[str, Tensor]:
        pair = Pair(_grid(grid.tolist() if hasattr(grid, "tolist") else grid, "grid"), None)
        if max(pair.input.shape) > self.size - 2:
            raise ZooError(f"a grid of {pair.input.shape} does not fit a canvas of {self.size}")
        placed = stack([place(pair, self.size, evaluation_view(pair, self.size, self.scale))])
        return {"image": placed["image"], "mask": placed["mask"]}


# -------------------------------------------------------------------------------------------------------- pseudo-tasks

# In the order of the official augmenters, which seeds count.
VARIANTS: dict[str, Callable[[Grid], Grid]] = {
    "rotate_90": lambda g: np.rot90(g, 1),
    "rotate_270": lambda g: np.rot90(g, 3),
    "rotate_180": lambda g: np.rot90(g, 2),
    "flip_0": np.flipud,
    "flip_1": np.fliplr,
}
_INVERSE = {"rotate_90": "rotate_270", "rotate_270": "rotate_90"}


def undo(grid: Grid, suffix: str) -> Grid:
    """`grid` without the variant that a pseudo-task's suffix begins with (none: as it is)."""
    for name in VARIANTS:
        if f"{name}_" in f"{suffix}_":
            return VARIANTS[_INVERSE.get(name, name)](grid)
    return grid


class PseudoTask(NamedTuple):
    """A task changed as a whole: the change by name ("" for none) and colour a became color_map[a]."""

    suffix: str
    color_map: dict[int, int]
    task: ARCTask


def permute_colors(used: Iterable[int], rng: np.random.RandomState) -> dict[int, int]:
    """A map of colours that keeps 0: every used colour takes an unused one, in shuffled order, as long as there are
    any; the others swap with shuffled used ones."""
    # Sets of small integers have one order in CPython; the published files were drawn along it.
    colors = set(used) - {0}
    free = list(set(range(1, 10)) - colors)
    rng.shuffle(free)
    swaps = rng.permutation(list(colors)).tolist()
    mapping = {0: 0}
    for color in colors:
        if color in mapping:
            continue
        if free:
            mapping[color] = free.pop()
            continue
        other = swaps.pop()
        mapping[other] = color
        if color in swaps:
            swaps.remove(color)
        mapping[color] = other
    return mapping


def _changed(task: ARCTask, change: Callable[[Grid], Grid]) -> ARCTask:
    def both(pair: Pair) -> Pair:
        output = None if pair.output is None else np.ascontiguousarray(change(pair.output))
        return Pair(np.ascontiguousarray(change(pair.input)), output)

    return task._replace(train=tuple(map(both, task.train)), test=tuple(map(both, task.test)))


def pseudo_tasks(task: ARCTask, permutations: int = 9, seed: int = 0) -> list[PseudoTask]:
    """The task itself, its five rotations and flips, and `permutations` colour permutations of each of these five.

    In the order of the official file names, by which task tokens are numbered; 51 by default. Colours are drawn by
    NumPy's RandomState at seed * 1000003 + 97 * task.index + variant + 1048583 * (permutation + 1), from the colours of
    all demonstrations and of the first test, its output included where it is known.
    """
    found = [PseudoTask("", {}, task)]
    for number, (name, change) in enumerate(VARIANTS.items()):
        turned = _changed(task, change)
        found.append(PseudoTask(f"{name}_augmented", {}, turned))
        grids = [g for pair in (*turned.train, *turned.test[:1]) for g in pair if g is not None]
        # Colours go into the set in the order of their first sight, which decides the order of equal hashes.
        used = [int(color) for grid in grids for color in grid.reshape(-1)]
        for permutation in range(permutations):
            start = seed * 1_000_003 + 97 * task.index + number + 1_048_583 * (permutation + 1)
            mapping = permute_colors(used, np.random.RandomState(start & 0xFFFFFFFF))
            table = np.array([mapping.get(color, color) for color in range(10)])
            permuted = _changed(turned, table.__getitem__)
            found.append(PseudoTask(f"{name}_perm{permutation + 1}_augmented", mapping, permuted))
    return sorted(found, key=lambda pseudo: f"{task.name}_{pseudo.suffix}" if pseudo.suffix else f"{task.name}.")


# -------------------------------------------------------------------------------------------------------- data modules


class _Known(NamedTuple):
    """A pair of a known task: the number of its task, and how much its answer weighs (1 / tests of the task)."""

    pair: Pair
    task: int
    weight: float


class CanvasSet(Dataset):
    """Pairs on canvases: in training at views that are functions of (seed, epoch, index), else at the fixed one.

    Batches: image, mask, target (B, S, S), task (B,) number of the task, weight (B,), index (B,), pair (list of
    :class:`Pair`), view (list of :class:`View`). With `views`, image, mask and target have an axis more, (B, 1 + views,
    S, S), the fixed view first and random ones behind it, and view is a list of such lists.
    """

    def __init__(self, pairs: list[_Known], size: int, seed: int, salt: int, random_views: bool = False, views: int = 0,
                 scale: int | None = None, translate: bool = True, eval_scale: int = 2) -> None:  # fmt: skip
        self.pairs, self.size, self.seed, self.salt = pairs, size, seed, salt
        self.random_views, self.views, self.scale, self.translate = random_views, views, scale, translate
        self.eval_scale = eval_scale

    def __len__(self) -> int:
        return len(self.pairs)

    def _drawn(self, pair: Pair, rng: random.Random) -> View:
        scale = self.scale if self.scale is None else evaluation_view(pair, self.size, self.scale).scale
        return draw_view(pair, self.size, rng.randint, scale, self.translate)

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        parts = key_parts(keys)
        known = [self.pairs[index] for index in parts[:, 0]]
        views: list[list[View]] = []
        for entry, start in zip(known, sample_seeds(self.seed, self.salt, parts), strict=True):
            rng = random.Random(start)
            if self.random_views:
                views.append([self._drawn(entry.pair, rng)])
            else:
                fixed = evaluation_view(entry.pair, self.size, self.eval_scale)
                # What training does not vary is not varied here.
                views.append([fixed, *(self._drawn(entry.pair, rng) for _ in range(self.views))])
        placed = [place(entry.pair, self.size, view) for entry, some in zip(known, views, strict=True) for view in some]
        batch: Batch = stack(placed)
        if self.views and not self.random_views:
            batch = {key: value.unflatten(0, (len(known), -1)) for key, value in batch.items()}
        return {
            **batch,
            "task": torch.tensor([entry.task for entry in known]),
            "weight": torch.tensor([entry.weight for entry in known]),
            "index": torch.from_numpy(parts[:, 0].copy()),
            "pair": [entry.pair for entry in known],
            "view": views if self.views and not self.random_views else [some[0] for some in views],
        }

    def __getitem__(self, key: int | Key) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}


class ARCDataModule(SeededDataModule):
    """Pairs of known tasks on canvases, for offline training. Batches as of :class:`CanvasSet`.

    Training sees the demonstrations of the training tasks (and RE-ARC's pairs), validation their tests. `test` and
    `predict` show the tests again, in several views; of ``arc_like``, whose tasks have tests enough, other ones.

    Args:
        dataset: ``arc_like``, a card's name (``arc_agi_1``) or a folder; see :mod:`zoo.data.arc`.
        data_dir: where a carded set lies on this machine.
        image_size: side of the canvas.
        batch_size: per device.
        eval_batch_size: per device; None: as `batch_size`.
        test_views: random views of each test pair beside the fixed one, to vote.
        scale: a fixed one in training instead of random ones (Fig. 7 d, e of arXiv 2511.14761).
        translate: place grids at random in training.
        eval_scale: of validation and of the fixed view.
        max_side: pairs with a longer side are left out.
        split: whose tasks are trained.
        rearc_dir: folder of further pairs (RE-ARC).
        rearc_limit: at most so many of them a task, chosen by the seed.
        num_workers: loading processes.
        seed: of order and views; None: the one of ``seed_everything``, else 0.
        options: of ``arc_like``: tasks, pairs, test_pairs, max_side, seed, rules.

    Attributes:
        num_tasks, image_size: known as soon as the module is made.

    Raises:
        ZooError: an unknown data set or option, a missing folder, a size or count that makes no sense.
    """

    def __init__(
        self,
        dataset: str = WORLD,
        data_dir: str | None = None,
        image_size: int = 64,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        test_views: int = 0,
        scale: int | None = None,
        translate: bool = True,
        eval_scale: int = 2,
        max_side: int = MAX_SIDE,
        split: str = "training",
        rearc_dir: str | None = None,
        rearc_limit: int | None = None,
        num_workers: int | None = None,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed=seed, in_memory=True)
        at_least_one(image_size=image_size, scale=scale, eval_scale=eval_scale, rearc_limit=rearc_limit)
        if test_views < 0:
            raise ZooError(f"data.test_views must not be negative, got {test_views}")
        self.dataset, self.data_dir, self.options = dataset, data_dir, dict(options or {})
        self.image_size, self.test_views, self.scale, self.translate = image_size, test_views, scale, translate
        self.eval_scale, self.max_side, self.split = eval_scale, max_side, split
        self.rearc_dir, self.rearc_limit = rearc_dir, rearc_limit
        self._tasks: list[ARCTask] | None = None
        self._pairs: dict[str, list[_Known]] = {}
        self.num_tasks = _number_of_tasks(self)

    def preprocess_facts(self) -> dict[str, Any]:
        """The canvas of validation; `tasks` are the names of those that the network knows, in their order."""
        names = [task.name for task in self.tasks]
        return {"kind": "grid", "size": self.image_size, "canvas": True, "scale": self.eval_scale, "tasks": names}

    @property
    def tasks(self) -> list[ARCTask]:
        """The known tasks in order; a task's place is its number."""
        if self._tasks is None:
            self._tasks = read_tasks(self.dataset, self.split, self.data_dir, **self.options)
        return self._tasks

    def _fits(self, pair: Pair) -> bool:
        return max(_extent(pair)) <= min(self.max_side, self.image_size - 2)

    def _training(self) -> list[_Known]:
        pairs = [_Known(pair, task.index, 1.0) for task in self.tasks for pair in task.train if self._fits(pair)]
        if self.rearc_dir is not None:
            numbers = {task.name: task.index for task in self.tasks}
            for name, more in read_pairs(self.rearc_dir).items():
                if name not in numbers:
                    raise ZooError(f"{self.rearc_dir}: {name} is no task of {self.dataset}'s {self.split} split")
                fitting = [pair for pair in more if self._fits(pair)]
                if self.rearc_limit is not None:
                    random.Random(f"{self.seed} {name}").shuffle(fitting)
                pairs += [_Known(pair, numbers[name], 1.0) for pair in fitting[: self.rearc_limit]]
        return pairs

    def _tests(self, split: str) -> list[_Known]:
        """The first test of every task, then the second ones, ..."""
        found = []
        for task in self.tasks:
            tests = task.test
            if self.dataset == WORLD and len(tests) > 1:
                tests = tests[::2] if split == "val" else tests[1::2]
            known = [_Known(pair, task.index, 1 / len(tests)) for pair in tests]
            found += [(number, entry) for number, entry in enumerate(known) if self._fits(entry.pair)]
        return [entry for _, entry in sorted(found, key=lambda both: both[0])]

    def samples(self, split: str) -> CanvasSet:
        """The pairs of "train", "val", "test" or "predict" on their canvases."""
        if split not in self._pairs:
            self._pairs[split] = self._training() if split == "train" else self._tests(split)
        pairs = self._pairs[split]
        if not pairs:
            raise ZooError(f"{self.dataset}: no pairs for {split} that fit a canvas of {self.image_size}")
        return CanvasSet(
            pairs,
            self.image_size,
            self.seed,
            SALT[split],
            random_views=split == "train",
            views=self.test_views if split == "test" else 0,
            scale=self.scale,
            translate=self.translate,
            eval_scale=self.eval_scale,
        )


def _number_of_tasks(module: ARCDataModule) -> int:
    """From the world's options, from the folder, or from the card of a set that is not at hand yet."""
    from zoo.catalog import data_card, list_datasets

    if module.dataset == WORLD or module.data_dir is not None or module.dataset not in list_datasets():
        return len(module.tasks)
    count = data_card(module.dataset).splits.get(module.split)
    if count is None:
        raise unknown(f"split of {module.dataset}", module.split, data_card(module.dataset).splits)
    return count


class TaskSet(Dataset):
    """Whole tasks; a batch is {"arc_task": list of :class:`ARCTask`, "index" (B,)}."""

    def __init__(self, tasks: list[ARCTask]) -> None:
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        index = key_parts(keys)[:, 0]
        return {"arc_task": [self.tasks[i] for i in index], "index": torch.from_numpy(index.copy())}


class ARCTaskDataModule(SeededDataModule):
    """New tasks one at a time, for test-time training in ``zoo test``; there is nothing to fit.

    Args:
        dataset: ``arc_like``, a card's name (``arc_agi_1``) or a folder; see :mod:`zoo.data.arc`.
        data_dir: where a carded set lies on this machine.
        image_size: side of the canvas.
        split: "evaluation", or what else the folder has.
        tasks: only these, by name.
        limit: only the first so many.
        seed: as of :class:`ARCDataModule`.
        options: of ``arc_like``, as of :class:`ARCDataModule`.

    Raises:
        ZooError: an unknown data set, task or option, or a missing folder.
    """

    def __init__(
        self,
        dataset: str = WORLD,
        data_dir: str | None = None,
        image_size: int = 64,
        split: str = "evaluation",
        tasks: list[str] | None = None,
        limit: int | None = None,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(1, num_workers=0, seed=seed)
        at_least_one(image_size=image_size, limit=limit)
        self.dataset, self.data_dir, self.options = dataset, data_dir, dict(options or {})
        self.image_size, self.split, self.tasks, self.limit = image_size, split, tasks, limit

    def samples(self, split: str) -> TaskSet:
        """The chosen tasks, whatever the split asked for."""
        found = read_tasks(self.dataset, self.split, self.data_dir, **self.options)
        for name in self.tasks or ():
            if name not in {task.name for task in found}:
                raise unknown(f"task of {self.dataset}", name, [task.name for task in found])
        chosen = [task for task in found if self.tasks is None or task.name in self.tasks]
        return TaskSet(chosen[: self.limit])

    def train_dataloader(self) -> Any:
        raise ZooError("test-time training needs no fit: run `zoo test RECIPE`, which trains on each task by itself")
