"""Every recipe: it says what it reproduces, parses, and builds its full-size network (on the meta device)."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo import catalog
from zoo.command.recipes import RecipeCLI, command_line, newest_checkpoint, recipe_name, set_by_hand
from zoo.paths import share
from zoo.weights.pretrained import Architecture, mismatch

RECIPES = catalog.list_recipes()
ROWS = {name: row for name in catalog.list_rows() if (row := catalog.row(name)[1]).recipe}


class _Parsed(RecipeCLI):
    """The command line of a recipe, with its parser, and nothing built."""

    def instantiate_classes(self) -> None:
        pass


@cache
def _parser(recipe: str, unlinked: frozenset[str]) -> Any:
    return _Parsed(recipe, "test", command_line(recipe)[1], (), set(unlinked), False).parser


@cache
def _published(weights: str) -> dict[str, torch.Tensor]:
    card, entry = catalog.weight(weights)
    return Architecture(card, entry.model, entry.overrides).on_meta().state_dict()


def test_there_are_recipes_and_every_paper_has_a_pocket_one() -> None:
    assert RECIPES
    papers = {name.partition("/")[0] for name in RECIPES}
    assert papers <= set(catalog.list_papers())
    assert {f"{paper}/pocket" for paper in papers} <= set(RECIPES)
    assert len(list(share("recipes").rglob("*.y*ml"))) == len(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_header_says_what_cost_and_command(name: str) -> None:
    header = catalog.recipe_header(name)
    assert re.search(rf"zoo (fit|test) {re.escape(name)}\b", header), "the one command that runs it"
    first = header.partition("\n")[0]
    assert len(first) > 20, "what it reproduces"
    if "/pocket" not in name:
        assert re.search(r"Table \d|Tab\. \d|section|appendix", header, re.IGNORECASE), "where the number stands"
        assert re.search(r"\d+(\.\d+)?\s*%|zoo leaderboard", header), "the number, or where it stands"
    assert re.search(r"V100|A100|H100|H200|TPU|core|GPU|CPU", header), "hardware and cost"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_at_full_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = {"trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"}
    with torch.device("meta"):
        module, data, trainer = zoo.load_recipe(name, overrides)
    assert trainer.max_epochs > 0 or trainer.max_steps > 0
    parameters = list(module.parameters())
    assert parameters
    assert all(parameter.is_meta for parameter in parameters)
    assert any(parameter.requires_grad for parameter in parameters)
    network = getattr(module, "network", module)
    if hasattr(network, "patch_embed"):
        assert network.patch_embed.img_size == data.image_size
    assert not list(tmp_path.iterdir()), "building a recipe writes nothing"


@pytest.mark.parametrize("name", RECIPES)
def test_leaderboard_rows_and_recipes_know_each_other(name: str) -> None:
    rows = [row for slug in catalog.list_papers() for row in catalog.paper(slug).leaderboard if row.recipe]
    assert all(row.recipe in RECIPES for row in rows)
    first = re.search(r"pretrain|offline", name)  # a stage before the one that is measured
    assert "/pocket" in name or first or any(row.recipe == name for row in rows)


@pytest.mark.parametrize("recipe", sorted({str(row.recipe) for row in ROWS.values()}))
def test_rows_build_at_full_size(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row's options parse, and its network is built on the meta device; published weights fill it."""
    monkeypatch.chdir(tmp_path)
    parsed: dict[str, Any] = {}  # many rows are two metrics of one run
    built: dict[str, Any] = {}
    for name, row in ROWS.items():
        if row.recipe != recipe:
            continue
        options = json.dumps(row.options)
        if options not in parsed:
            words = command_line(name)[1]
            parser = _parser(recipe, frozenset(set_by_hand(words)))
            config = parser.parse_args(words)
            key = repr((config["model"], config["data"]))
            if key not in built:
                with torch.device("meta"):
                    built[key] = parser.instantiate_classes(config).model
            parsed[options] = built[key]
        module = parsed[options]
        assert all(parameter.is_meta for parameter in module.parameters())
        if row.weights:
            network = getattr(module, "network", module)
            wanted = {key: value.shape for key, value in network.state_dict().items()}
            spare = catalog.weight(row.weights)[1].spare
            assert not mismatch(_published(row.weights), wanted, spare=spare), name
    assert not list(tmp_path.iterdir())


def test_rows_and_recipes_have_names_of_their_own() -> None:
    assert not {name.replace(":", "/") for name in ROWS} & set(RECIPES)  # the names of run folders


def test_names_of_recipes(tmp_path: Path) -> None:
    assert recipe_name(catalog.recipe_path("mae/pocket")) == "mae/pocket"
    (tmp_path / "mine.yaml").write_text("model: {}\n")
    assert recipe_name(tmp_path / "mine.yaml") == "mine"
    (tmp_path / "config.yaml").write_text("# recipe: mae/pocket\nmodel: {}\n")
    assert recipe_name(tmp_path / "config.yaml") == "mae/pocket"


def test_newest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(zoo.ZooError, match="zoo fit toy"):
        newest_checkpoint(tmp_path, "toy")
    for run in ("a", "b"):
        (tmp_path / "toy" / run / "checkpoints").mkdir(parents=True)
    (tmp_path / "toy" / "a" / "checkpoints" / "last.ckpt").touch()
    assert newest_checkpoint(tmp_path, "toy").parent.parent.name == "a"  # b stopped before its first
