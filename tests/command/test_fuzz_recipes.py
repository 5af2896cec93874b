"""A few seeded mutations of recipes; fuzz_recipes.py runs hundreds."""

from __future__ import annotations

from pathlib import Path

from tests.command.fuzz_recipes import run


def test_a_mutated_recipe_is_accepted_or_refused_in_one_line(tmp_path: Path) -> None:
    found = run(range(1000, 1030), tmp_path)
    assert not [entry for entry in found if entry[1] not in ("accepted", "refused")]
    assert {"accepted", "refused"} == {kind for _, kind, _ in found}
