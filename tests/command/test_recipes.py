"""Every recipe: it says what it reproduces, parses, and builds its full-size network (on the meta device)."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import zoo
from zoo import catalog
from zoo.command.reading import command_line, recipe_name
from zoo.command.recipes import RecipeCLI, newest_checkpoint
from zoo.nn.autoencoder import PIXELS
from zoo.paths import share
from zoo.weights.pretrained import Architecture, mismatch

RECIPES = catalog.list_recipes()
ROWS = {name: row for name in catalog.list_rows() if (row := catalog.row(name)[1]).recipe}


class _Parsed(RecipeCLI):
    """The command line of a recipe, with its parser, and nothing built."""

    def instantiate_classes(self) -> None:
        pass


@cache
def _parser(unlinked: frozenset[str]) -> Any:
    line = command_line("mae/pocket")
    line.unlinked = set(unlinked)
    return _Parsed(line, "test", rich=False).parser


@cache
def _published(weights: str) -> dict[str, torch.Tensor]:
    card, entry = catalog.weight(weights)
    with _NoInit():
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
def test_leaderboard_rows_and_recipes_know_each_other(name: str) -> None:
    rows = [row for slug in catalog.list_papers() for row in catalog.paper(slug).leaderboard if row.recipe]
    assert all(row.recipe in RECIPES for row in rows)
    assert all(row.then in RECIPES or row.then in ROWS for row in rows if row.then)
    first = re.search(r"pretrain|offline", name)  # a stage before the one that is measured
    assert "/pocket" in name or first or any(row.recipe == name for row in rows)


class _NoInit(TorchFunctionMode):
    """Parameters on the meta device have no values to draw."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_and_its_rows_build_at_full_size(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All options parse, and the networks are built on the meta device; a row's published weights fill its own."""
    monkeypatch.chdir(tmp_path)
    parsed: dict[str, Any] = {}  # many rows are two metrics of one run
    built: dict[str, Any] = {}
    for name, row in [(recipe, None), *((name, row) for name, row in ROWS.items() if row.recipe == recipe)]:
        options = json.dumps(row.options if row else {})
        if options not in parsed:
            line = command_line(name)
            parser = _parser(frozenset(line.unlinked))
            config = parser.parse_args(line.words)
            assert config.trainer.max_epochs > 0 or config.trainer.max_steps > 0
            key = repr((config["model"], config["data"]))
            if key not in built:
                with torch.device("meta"), _NoInit():
                    made = parser.instantiate_classes(config)
                built[key] = made.model
                _check(made.model, made.data)
            parsed[options] = built[key]
        if row and row.weights:
            network = getattr(parsed[options], "network", parsed[options])
            wanted = {key: value.shape for key, value in network.state_dict().items()}
            spare = catalog.weight(row.weights)[1].spare
            assert not mismatch(_published(row.weights), wanted, spare=spare), name
    assert not list(tmp_path.iterdir()), "building a recipe writes nothing"


def _check(module: Any, data: Any) -> None:
    parameters = list(module.parameters())
    assert parameters
    assert all(parameter.is_meta for parameter in parameters)
    assert any(parameter.requires_grad for parameter in parameters)
    network = getattr(module, "network", module)
    encoded = getattr(getattr(module, "autoencoder", None), "source", PIXELS) != PIXELS  # then it is of latents
    if hasattr(network, "patch_embed") and not encoded:
        assert network.patch_embed.img_size == data.image_size


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
