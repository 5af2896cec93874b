"""ARC: reading, the embedded world, canvas and decoding, pseudo-tasks, data modules, score."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from zoo import catalog
from zoo.data import ARCDataModule, ARCTaskDataModule, check
from zoo.data.arc import (
    BACKGROUND,
    BORDER,
    ARCTask,
    Canvas,
    Pair,
    View,
    Views,
    draw_view,
    evaluation_view,
    permute_colors,
    place,
    pseudo_tasks,
    read_grid,
    read_pairs,
    read_tasks,
)
from zoo.data.arc_predictions import draw_grids
from zoo.data.arc_world import RULES, make_task
from zoo.errors import ZooError
from zoo.metrics import ARCScore, vote
from zoo.metrics.arc import pixel_scores

TASK = {"train": [{"input": [[1, 2], [0, 3]], "output": [[3]]}], "test": [{"input": [[4]], "output": [[0, 4]]}]}


def pair(height: int, width: int, out: tuple[int, int], seed: int = 0) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(rng.integers(0, 10, (height, width)), rng.integers(0, 10, out))


# ---- reading --------------------------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_tasks(tmp_path: Path) -> None:
    tasks = {"b2": TASK, "a1": {**TASK, "test": [TASK["test"][0], TASK["train"][0]]}}
    for name, content in tasks.items():
        for place_ in ("repo/data/training", "plain/training"):
            path = tmp_path / place_ / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    for folder in ("one", "kaggle", "hidden"):
        (tmp_path / folder).mkdir()
    (tmp_path / "one/training.json").write_text(json.dumps(tasks))
    solutions = {name: [test["output"] for test in content["test"]] for name, content in tasks.items()}
    bare = {n: {**c, "test": [{"input": test["input"]} for test in c["test"]]} for n, c in tasks.items()}
    for folder in ("kaggle", "hidden"):
        (tmp_path / folder / "arc-agi_training_challenges.json").write_text(json.dumps(bare))
    (tmp_path / "kaggle/arc-agi_training_solutions.json").write_text(json.dumps(solutions))
    found = {folder: read_tasks(str(tmp_path / folder), "training") for folder in ("repo", "plain", "one", "kaggle")}
    for read in found.values():
        assert [(task.name, task.index, len(task.train), len(task.test)) for task in read] == [
            ("a1", 0, 1, 2),
            ("b2", 1, 1, 1),
        ]
        assert read[1].test[0].output.tolist() == [[0, 4]]
    assert read_tasks(str(tmp_path / "hidden"), "training")[0].test[1].output is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"train": [{"input": [[1, 2], [3]]}]}}, "equally long rows"),
        ({"a": {"train": [{"input": [[12]]}]}}, "colours 0..9"),
        ({"a": {"train": [{"output": [[1]]}]}}, "a pair has"),
        ({"a": [1]}, "a task has 'train'"),
        ({}, "holds no ARC tasks"),
    ],
)
def test_what_is_no_task_is_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "training.json").write_text(json.dumps(content))
    with pytest.raises(ZooError, match=message):
        read_tasks(str(tmp_path), "training")


def test_missing_sets_and_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"give data\.data_dir, such as a checkout of https://github.com/fchollet"):
        read_tasks("arc_agi_1", "training")
    with pytest.raises(ZooError, match="did you mean 'arc_agi_1'"):
        read_tasks("arc_agi1", "training")
    with pytest.raises(ZooError, match="no split 'training'"):
        read_tasks(str(tmp_path), "training")
    with pytest.raises(ZooError, match="no such folder"):
        read_tasks("arc_agi_1", "training", tmp_path / "absent")
    with pytest.raises(ZooError, match=r"no data\.options"):
        read_tasks(str(tmp_path), "training", tasks=3)


def test_the_real_sets_and_their_cards(shared: Path) -> None:
    for name in ("arc_agi_1", "arc_agi_2"):
        report = check.check(name, str(shared / "data"))
        assert report["problems"] == []
        assert report["splits"]["training"]["samples"] in (400, 1000)
    module = ARCDataModule("arc_agi_1", str(shared / "data"), batch_size=8, num_workers=0)
    assert module.num_tasks == 400
    assert len(module.samples("train")) == sum(len(task.train) for task in module.tasks)
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (8, 64, 64)


# ---- the embedded world ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [5, 8])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_a_rule(rule: str, side: int) -> None:
    """Grids are grids, the same every time, never the same pair twice, and the output is another grid."""
    name, pairs = make_task("training", 3, 6, 2, side=side, rules=[rule])
    assert name == f"training_003_{rule}"
    again = make_task("training", 3, 6, 2, side=side, rules=[rule])[1]
    other = make_task("evaluation", 3, 6, 2, side=side, rules=[rule])[1]
    assert len(pairs) == 8
    for (grid, out), (same, too) in zip(pairs, again, strict=True):
        assert grid.ndim == out.ndim == 2
        assert grid.size
        assert out.size
        assert min(grid.min(), out.min()) >= 0
        assert max(grid.max(), out.max()) <= 9
        assert max(*grid.shape, *out.shape) <= side
        assert not np.array_equal(grid, out)
        assert np.array_equal(grid, same)
        assert np.array_equal(out, too)
    assert len({grid.tobytes() + bytes(grid.shape) for grid, _ in pairs}) == 8
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(pairs, other, strict=True))


def test_rules_do_what_they_say() -> None:
    for grid, out in make_task("training", 0, 5, 1, rules=["flip_columns"])[1]:
        assert np.array_equal(out, grid[:, ::-1])
    for grid, out in make_task("training", 0, 5, 1, rules=["count"])[1]:
        assert out.shape == (1, (grid > 0).sum())
    for grid, out in make_task("training", 0, 5, 1, rules=["fall"])[1]:
        assert sorted(grid.reshape(-1)) == sorted(out.reshape(-1))
    for wrong, message in (({"rules": ["flop"]}, "unknown rule"), ({"side": 3}, "5..30")):
        with pytest.raises(ZooError, match=message):
            make_task("training", 0, 1, 1, **wrong)  # type: ignore[arg-type]


# ---- canvas and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_what_is_placed_can_be_read_back(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        some = pair(*(rng.randint(1, 12) for _ in range(2)), (rng.randint(1, 12), rng.randint(1, 12)), seed)
        size = rng.randint(14, 40)
        view = draw_view(some, size, rng.randint)
        canvas, mask, target = place(some, size, view)
        assert np.array_equal(read_grid(target, view), some.output)
        inside = canvas[mask == 1].reshape([view.scale * side for side in some.input.shape])
        assert np.array_equal(inside[:: view.scale, :: view.scale], some.input)
        assert (canvas[mask == 0] == BACKGROUND).all()
        border = (view.scale * some.output.shape[0] + 1) + view.scale * some.output.shape[1]
        assert (target == BORDER).sum() == border
        assert (target != BACKGROUND).sum() == border + view.scale**2 * some.output.size


def test_views_stay_in_their_ranges() -> None:
    asked = []

    def lowest(low: int, high: int) -> int:
        asked.append((low, high))
        return low

    some = pair(4, 9, (5, 3))
    assert draw_view(some, 64, lowest) == View(1, 1, 1)
    assert asked == [(1, 62 // 9), (1, 62 - 9), (1, 62 - 5)]
    asked.clear()
    assert draw_view(some, 64, lowest, scale=2, translate=False) == View(2, 1, 1)
    assert asked == []
    assert draw_view(pair(30, 30, (1, 1)), 32, lowest) == View(1, 1, 1)
    assert asked == [(1, 1)]  # where nothing is left the corner is (1, 1), undrawn
    for size, options in ((10, {}), (20, {"scale": 3})):
        with pytest.raises(ZooError, match="do not fit"):
            draw_view(some, size, lowest, **options)
    assert evaluation_view(some, 64) == View(2, 1, 1)
    assert evaluation_view(some, 12) == View(1, 1, 1)


def test_odd_predictions_are_read_as_the_official_code_reads_them() -> None:
    canvas = np.full((8, 8), 3)
    assert read_grid(canvas, View(1, 2, 3)).shape == (5, 6)  # no border: to the end
    canvas[0, 0] = BORDER
    assert read_grid(canvas, View(1, 0, 0)).shape == (0, 0)
    assert read_grid(canvas, View(2, 0, 0), "rotate_90_augmented").shape == (0, 0)
    canvas = np.full((8, 8), 3)
    canvas[:2, :2] = [[1, 2], [2, 1]]
    canvas[:, 3], canvas[3] = BORDER, BORDER
    assert read_grid(canvas, View(2, 0, 0)).tolist() == [[1, 3], [3, 3]]  # equals: the smallest; blocks are cut off


def test_the_canvas_of_weights() -> None:
    seen = Canvas(16)([[1, 2, 3], [4, 5, 6]])
    assert seen["image"].shape == seen["mask"].shape == (1, 16, 16)
    assert seen["mask"].sum() == 4 * 6
    assert torch.equal(Canvas(16)(torch.tensor([[1, 2, 3], [4, 5, 6]]))["image"], seen["image"])
    with pytest.raises(ZooError, match="does not fit"):
        Canvas(16)(np.zeros((20, 3)))


# ---- pseudo-tasks ---------------------------------------------------------------------------------------------------


def task(tests: int = 2) -> ARCTask:
    pairs = tuple(pair(3, 4, (4, 2), seed) for seed in range(2 + tests))
    return ARCTask("1234abcd", 7, pairs[:2], pairs[2:])


def test_there_are_51_and_each_can_be_undone() -> None:
    found = pseudo_tasks(task())
    assert len(found) == 51
    assert len({pseudo.suffix for pseudo in found}) == 51
    assert [len(pseudo_tasks(task(), permutations)) for permutations in (0, 4)] == [6, 26]
    for pseudo in found:
        for changed, original in zip(pseudo.task.test, task().test, strict=True):
            view = View(1, 2, 1)
            target = place(changed, 16, view)[2]
            assert np.array_equal(read_grid(target, view, pseudo.suffix, pseudo.color_map), original.output)


def test_colours_are_permuted_as_in_the_published_files() -> None:
    """Maps that the official script drew for the first two tasks of a folder."""
    grids = [TASK["train"][0]["input"], [[1, 2, 3, 4, 5], [6, 7, 8, 0, 3]]]
    maps = {}
    for index, grid in enumerate(grids):
        train = (Pair(np.array(grid), np.array([[3]])),)
        tests = (Pair(np.array([[4]]), np.array([[0, 4]])),)
        maps |= {(index, p.suffix): p.color_map for p in pseudo_tasks(ARCTask("a", index, train, tests))}
    assert maps[0, "rotate_90_perm1_augmented"] == {0: 0, 1: 7, 2: 6, 3: 8, 4: 9}
    assert maps[0, "flip_1_perm9_augmented"] == {0: 0, 1: 9, 2: 6, 3: 7, 4: 8}
    turned = {0: 0, 1: 6, 3: 2, 2: 3, 7: 4, 4: 7, 8: 5, 5: 8, 6: 1}
    assert maps[1, "rotate_180_perm4_augmented"] == turned


def test_their_order_and_what_they_hide() -> None:
    found = pseudo_tasks(task())
    assert [pseudo.suffix for pseudo in found[:3]] == ["", "flip_0_augmented", "flip_0_perm1_augmented"]
    assert [pseudo.suffix for pseudo in found[-2:]] == ["rotate_90_perm8_augmented", "rotate_90_perm9_augmented"]
    assert found[1].color_map == {}
    for pseudo in found:
        assert pseudo.color_map.get(0, 0) == 0
        assert len(set(pseudo.color_map.values())) == len(pseudo.color_map)
    blind = task()._replace(test=tuple(Pair(p.input, None) for p in task().test))
    assert all(pseudo.task.test[0].output is None for pseudo in pseudo_tasks(blind))


@pytest.mark.parametrize("used", [{1}, {1, 5, 9}, set(range(1, 8)), set(range(10))])
def test_permutations_move_every_used_colour(used: set[int]) -> None:
    for seed in range(20):
        mapping = permute_colors(used, np.random.RandomState(seed))
        assert mapping[0] == 0
        assert used <= set(mapping)
        values = [mapping[color] for color in used]
        assert len(set(values)) == len(values)
        if len(used - {0}) <= 4:  # as many unused ones: none keeps company with the old ones
            assert not set(values) - {0} & used


# ---- data modules ---------------------------------------------------------------------------------------------------


def small(**options: Any) -> ARCDataModule:
    world = {"tasks": 4, "pairs": 6, "max_side": 6, "test_pairs": 4}
    return ARCDataModule(image_size=16, batch_size=8, seed=3, options=world, **options)


def test_training_batches_are_functions_of_the_seed_and_the_epoch() -> None:
    first, again = (list(small().train_dataloader()) for _ in range(2))
    assert len(first) == 3
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("image", "mask", "target", "task", "index"))
    samples = small().samples("train")
    one, other = (samples.__getitems__([(5, epoch, 0)]) for epoch in (0, 1))
    assert one["view"] != other["view"]
    assert one["image"].dtype == one["target"].dtype == torch.int64
    assert one["mask"].dtype == torch.bool


def test_evaluation_takes_the_fixed_view_and_test_further_ones() -> None:
    module = small(test_views=5)
    val = next(iter(module.val_dataloader()))
    assert {(view.x, view.y) for view in val["view"]} == {(1, 1)}
    test = next(iter(module.test_dataloader()))
    assert test["image"].shape == test["mask"].shape == (8, 6, 16, 16)
    assert [view[0] for view in test["view"]] == [evaluation_view(p, 16) for p in test["pair"]]
    for p, views, targets in zip(test["pair"], test["view"], test["target"], strict=True):
        assert all(np.array_equal(read_grid(t.numpy(), v), p.output) for v, t in zip(views, targets, strict=True))
    assert test["weight"].tolist() == [0.5] * 8
    # of the world's tests, validation has one half and test the other
    keys = {split: {k.pair.input.tobytes() for k in module.samples(split).pairs} for split in ("val", "test")}
    assert not keys["val"] & keys["test"]


def test_fewer_priors() -> None:
    views = small(scale=2, translate=False).samples("train").__getitems__([0, 1, 2])["view"]
    assert {(view.x, view.y) for view in views} == {(1, 1)}
    views = small(scale=1).samples("train").__getitems__(list(range(12)))["view"]
    assert {view.scale for view in views} == {1}
    assert len(set(views)) > 6


def test_further_pairs_join_their_tasks(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    names = [task.name for task in small().tasks]
    for name in names[:2]:
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps([TASK["train"][0]] * 5))
    plain, more = small(), small(rearc_dir=str(tmp_path), rearc_limit=3)
    assert len(more.samples("train")) == len(plain.samples("train")) + 6
    assert [known.task for known in more.samples("train").pairs[-6:]] == [0] * 3 + [1] * 3
    assert len(read_pairs(tmp_path)[names[0]]) == 5
    (tmp_path / "tasks" / "stranger.json").write_text(json.dumps([TASK["train"][0]]))
    with pytest.raises(ZooError, match="stranger is no task"):
        small(rearc_dir=str(tmp_path)).samples("train")
    with pytest.raises(ZooError, match="RE-ARC"):
        read_pairs(tmp_path / "absent")


def test_new_tasks_come_whole_and_one_at_a_time() -> None:
    module = ARCTaskDataModule(options={"tasks": 5, "max_side": 6}, limit=3)
    batches = list(module.test_dataloader())
    assert [batch["arc_task"][0].index for batch in batches] == [0, 1, 2]
    assert len(batches[0]["arc_task"][0].train) == 3
    chosen = ARCTaskDataModule(options={"tasks": 5}, tasks=["evaluation_004_flip_rows"])
    assert [task.name for task in chosen.samples("test").tasks] == ["evaluation_004_flip_rows"]
    with pytest.raises(ZooError, match="did you mean 'evaluation_004_flip_rows'"):
        ARCTaskDataModule(options={"tasks": 5}, tasks=["evaluation_004_flip_row"]).samples("test")
    with pytest.raises(ZooError, match="zoo test"):
        module.train_dataloader()


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ZooError, match=r"data\.image_size"):
        ARCDataModule(image_size=0)
    with pytest.raises(ZooError, match="test_views"):
        ARCDataModule(test_views=-1)
    with pytest.raises(ZooError, match="unknown split of arc_agi_1 'trainin'"):
        ARCDataModule("arc_agi_1", split="trainin")
    assert ARCDataModule("arc_agi_2").num_tasks == 1000  # from the card: the set is not at hand


# ---- score and picture ----------------------------------------------------------------------------------------------


def test_votes_rank_by_number_then_by_first_sight() -> None:
    a, b, c = np.array([[1]]), np.array([[1, 1]]), np.array([[2]])
    assert [(grid.tolist(), count) for grid, count in vote([c, a, b, b, a, a, np.zeros((0, 0))])] == [
        ([[1]], 3),
        ([[1, 1]], 2),
        ([[2]], 1),
        ([], 1),
    ]


def test_the_score_is_a_mean_over_tasks() -> None:
    right, wrong, other = np.array([[1]]), np.array([[2]]), np.array([[1, 1]])
    score = ARCScore()
    score.update([right, right, wrong], right)  # a task of one test, solved at once
    score.update([wrong, wrong, right], right, 0.5)  # a task of two: by the second answer,
    score.update([wrong, wrong, other, other, right], right, 0.5)  # and in one view only
    found = {name: float(value) for name, value in score.compute().items()}
    assert found == {"pass_at_1": 0.5, "pass_at_2": 0.75, "oracle": 1.0}


def test_two_shares_of_the_score_add_up() -> None:
    right, wrong = np.array([[1]]), np.array([[2]])
    whole, parts = ARCScore(), [ARCScore(), ARCScore()]
    for number in range(5):
        answer = right if number % 2 else wrong
        for score in (whole, parts[number % 2]):
            score.update([right, right, wrong], answer, 1 / (1 + number % 3))
    for name in ("hits", "weight"):  # what dist_reduce_fx "sum" does
        setattr(parts[0], name, getattr(parts[0], name) + getattr(parts[1], name))
    torch.testing.assert_close(parts[0].compute(), whole.compute())


def test_a_sheet_shows_every_grid_in_its_colours() -> None:
    sheet = draw_grids([[np.array([[1, 2]]), None], [np.array([[3]]), np.array([[4], [5]])]], cell=10)
    assert sheet.dtype == torch.uint8
    assert sheet.shape == (3, 10 + 20 + 3 * 20, 20 + 10 + 3 * 20)
    assert sheet[:, 25, 25].tolist() == [0, 116, 217]
    assert sheet[:, 25, 65].tolist() == [238, 238, 238]  # the gap


def test_exact_match_wants_every_scored_pixel() -> None:
    target = torch.tensor([[[3, 11], [11, 11]], [[BACKGROUND] * 2, [1, 2]]])
    logits = torch.nn.functional.one_hot(target.clamp_max(11), 12).permute(0, 3, 1, 2).float()
    logits[1, :, 1, 1] = 0
    logits[1, :, 0, 0] = torch.randn(12)  # off the output: whatever it is
    exact, share, scored = pixel_scores(logits, target, BACKGROUND)
    assert exact.tolist() == [1.0, 0.0]
    assert (share.item(), scored.item()) == (pytest.approx(5 / 6), 6)


@pytest.mark.parametrize("row", ["arc_agi_1_prior_c", "arc_agi_1_prior_d"])
def test_without_translation_every_view_is_the_same(row: str) -> None:
    """So that these rows take one of each of the 51 pseudo-tasks."""
    options = catalog.row(f"varc:{row}")[1].options
    views = Views(64, options["model.scale"], options["model.translate"])
    one = pair(3, 4, (2, 2))
    assert len({views.draw(one, random.Random(seed)) for seed in range(20)}) == 1
    assert options["model.views"] == 1


def test_published_weights_come_with_their_canvas() -> None:
    seen = zoo.create_preprocess("varc_vit_18m.arc1_rearc")([[1, 2], [3, 4]])
    assert seen["image"].shape == (1, 64, 64)
    assert seen["mask"].sum() == 16
