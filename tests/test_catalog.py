"""Cards: their schema, their errors, the names, and what they say held against the code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import zoo
from tests.conftest import ROOT
from zoo import catalog
from zoo.claims import declaration
from zoo.errors import ZooError
from zoo.paths import cache_dir, share

FACTS: dict[str, Any] = {
    "slug": "mine",
    "field": "selfsup",
    "title": "Mine",
    "authors": ["A. Uthor"],
    "year": 2026,
    "summary": "A test's paper.",
    "models": [{"name": "mine_small", "params": 1}],
}
WEIGHT: dict[str, Any] = {
    "name": "mine_small.a",
    "urls": ["https://example.org/a.pth"],
    "licence": "MIT",
    "kind": "full",
    "preprocess": {"size": 32},
}
ROW: dict[str, Any] = {
    "id": "a",
    "dataset": "d",
    "metric": "top-1",
    "model": "mine_small",
    "value": 1.0,
    "where": "T. 1",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a card of one's own, ``mine.yaml``: FACTS with changes, or a text."""
    monkeypatch.setenv("ZOO_PAPERS", str(tmp_path))

    def write(text: str | None = None, name: str = "mine", **changes: Any) -> None:
        (tmp_path / f"{name}.yaml").write_text(text if text is not None else yaml.safe_dump({**FACTS, **changes}))

    return write


# ---- names ----------------------------------------------------------------------------------------------------------


def test_own_papers_join_the_catalog(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own(weights=[WEIGHT, {**WEIGHT, "name": "mine_small.b", "licence": "CC-BY-NC-4.0"}])
    assert "mine" in zoo.list_papers("selfsup")
    assert "mine" not in zoo.list_papers("video")
    assert zoo.list_models("mine*") == ["mine_small"]
    assert zoo.list_models("mine*", pretrained=True) == zoo.list_weights("mine") == ["mine_small.a", "mine_small.b"]
    assert catalog.list_weights("mine*", licence="CC-BY*") == ["mine_small.b"]
    assert catalog.weight("mine_small.a")[1].model == "mine_small"
    assert catalog.model("mine_small.a")[1] == catalog.model("mine_small")[1]
    assert catalog.paper("mine").is_own
    monkeypatch.delenv("ZOO_PAPERS")
    assert "mine" not in zoo.list_papers()


def test_patterns() -> None:
    names = ["mae_vit_base", "mae_vit_large", "vit_base"]
    assert catalog._matching(names, "*") == names
    assert catalog._matching(names, "mae*") == names[:2]
    assert catalog._matching(names, "vit_b") == ["mae_vit_base", "vit_base"]
    assert catalog._matching(names, "vit_?ase") == ["vit_base"]
    assert catalog._matching(names, "swin") == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: catalog.paper("minee"), "unknown paper 'minee'; did you mean 'mine'"),
        (lambda: catalog.model("mine_smal"), "unknown model 'mine_smal'; did you mean 'mine_small'"),
        (lambda: catalog.weight("mine_small.x"), "unknown weights 'mine_small.x'; did you mean 'mine_small.a'"),
        (lambda: catalog.list_papers("selfsub"), "unknown field 'selfsub'; did you mean 'selfsup'"),
        (lambda: catalog.data_card("shape"), "unknown dataset 'shape'; did you mean 'shapes'"),
        (lambda: catalog.data_card("../recipes/mae/pocket"), "unknown dataset"),
    ],
)
def test_unknown_names(own: Any, call: Any, message: str) -> None:
    own(weights=[WEIGHT])
    with pytest.raises(ZooError, match=message):
        call()


def test_recipes_by_name_beginning_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mae/pocket", "mae/pretrain_a", "mae/pretrain_b"):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n#\n# zoo fit {name}\nmodel: {{}}\n# not the head\n")
    monkeypatch.setattr(catalog, "share", lambda kind: tmp_path)
    assert catalog.list_recipes() == ["mae/pocket", "mae/pretrain_a", "mae/pretrain_b"]
    pocket = tmp_path / "mae/pocket.yaml"
    assert catalog.recipe_path("mae/pocket") == catalog.recipe_path("mae/po") == catalog.recipe_path(pocket) == pocket
    assert catalog.recipe_header("mae/pocket") == "mae/pocket\n\nzoo fit mae/pocket"
    for name, message in (
        ("mae/pre", "may mean mae/pretrain_a, mae/pretrain_b"),
        ("mae/pokcet", "did you mean 'mae/pocket'"),
        ("", "unknown recipe"),
        ("no/such.yaml", "no recipe file 'no/such.yaml'"),
    ):
        with pytest.raises(ZooError, match=message):
            catalog.recipe_path(name)


# ---- wrong cards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autors": ["x"]}, r"autors: unknown key; did you mean 'authors'\?"),
        ({"models": [{"name": "m", "parms": 3}]}, r"models\[0\].params: Field required \(and 1 more\)"),
        ({"weights": [{**WEIGHT, "url": "x"}]}, r"weights\[0\].url: unknown key; did you mean 'urls'\?"),
        (
            {"weights": [{**WEIGHT, "preprocess": {"size": 1, "crop": 1}}]},
            r"weights\[0\].preprocess.crop: unknown key; did you mean 'crop_pct'",
        ),
        ({"weights": [{**WEIGHT, "sha256": "12"}]}, r"weights\[0\].sha256: "),
        ({"weights": [{**WEIGHT, "kind": "half"}]}, r"weights\[0\].kind: Input should be 'encoder'"),
        ({"weights": [{**WEIGHT, "name": "other.a"}]}, "weights 'other.a' name 'other', which is none of"),
        ({"weights": [WEIGHT, WEIGHT]}, "weights 'mine_small.a' stands here twice"),
        ({"arxiv": 2111.0637}, "arxiv: Input should be a valid string"),
        ({"year": "soon"}, "year: Input should be a valid integer"),
        ({"slug": "yours"}, "slug is 'yours'; it must be the file's name, 'mine'"),
        ({"leaderboard": [{**ROW, "status": "verified"}]}, r"leaderboard\[0\]: row 'a': status 'verified' and"),
        ({"leaderboard": [ROW, ROW]}, "leaderboard id 'a' stands here twice"),
    ],
)
def test_a_wrong_card_is_one_line_naming_file_and_key(own: Any, changes: dict[str, Any], message: str) -> None:
    own(**changes)
    with pytest.raises(ZooError, match=f"mine.yaml: {message}") as caught:
        catalog.list_papers()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slug: [", "mine.yaml: while parsing .*line 2"),
        ("- 1", "a card is a mapping of keys, not list"),
        ("", "a card is a mapping of keys, not NoneType"),
        ("year: 2020\nyear: 2021", "the key 'year' stands twice"),
        ("title: !!python/object/apply:os.system [true]", "mine.yaml: could not determine a constructor"),
    ],
)
def test_a_card_that_is_no_card(own: Any, text: str, message: str) -> None:
    own(text)
    with pytest.raises(ZooError, match=message) as caught:
        catalog.list_papers()
    assert "\n" not in str(caught.value)


def test_names_belong_to_one_paper(own: Any) -> None:
    own()
    own(name="zweit", slug="zweit")
    with pytest.raises(ZooError, match=r"zweit.yaml: the name 'mine_small' is taken by .*mine.yaml"):
        catalog.list_models()


def test_code_in_the_file_of_another_paper_and_a_converter_of_its_own(own: Any, tmp_path: Path) -> None:
    import torch

    from zoo.weights.pretrained import convert_weights, create_model

    own()
    (tmp_path / "mine.py").write_text(
        "import torch\nmine_small = zweit_small = lambda: torch.nn.Linear(1, 1, bias=False)\n"
        "def convert_official(state):\n    return state\n"
        "def convert_half(state):\n    return {'weight': state['whole'] / 2}\n"
        "EXPORTS = {'double': lambda state: {'w': 2 * state['weight']}}\n"
    )
    torch.save({"whole": torch.tensor([[6.0]])}, tmp_path / "file.pth")
    weight = {**WEIGHT, "name": "zweit_small.a", "urls": [str(tmp_path / "file.pth")], "converter": "convert_half"}
    own(name="zweit", slug="zweit", module="mine", models=[{"name": "zweit_small", "params": 1}], weights=[weight])
    card = catalog.paper("zweit")
    assert card.source == (tmp_path / "mine.py").resolve()
    assert card.import_name == "zoo.selfsup.mine"
    assert create_model("zweit_small.a", pretrained=True).weight.item() == 3
    assert create_model("zweit_small", weights=tmp_path / "file.pth").weight.item() == 3
    out = convert_weights("zweit_small.a", tmp_path / "out.pth", to="double")
    assert torch.load(out, weights_only=True)["w"].item() == 6
    with pytest.raises(ZooError, match="unknown export format 'doubel'; did you mean 'double'"):
        convert_weights("zweit_small.a", tmp_path / "out.pth", to="doubel")


def test_an_edit_counts_at_once(own: Any, tmp_path: Path) -> None:
    own()
    assert catalog.paper("mine").title == "Mine"
    own(title="Ours")
    os.utime(tmp_path / "mine.yaml", ns=(1, 1))
    assert catalog.paper("mine").title == "Ours"


@pytest.mark.parametrize("spoilt", ["", "[]", "{", '{"%s": 3}', '{"%s": ["%s", 4]}'])
def test_kept_contents_are_used_and_a_spoilt_store_is_not(own: Any, tmp_path: Path, spoilt: str) -> None:
    own(leaderboard=[{**ROW, "protocol": {"date": "2026-01-02"}}])
    first = catalog.paper("mine")
    store = cache_dir() / "cards.json"
    kept = store.read_text()
    catalog._index.cache_clear()
    store.write_text(kept.replace('"Mine"', '"From the store"'))
    assert catalog.paper("mine").title == "From the store"
    catalog._index.cache_clear()
    path = (tmp_path / "mine.yaml").resolve()
    store.write_text(spoilt.replace("%s", str(path), 1).replace("%s", "another stamp"))
    assert catalog.paper("mine") == first
    assert store.read_text() == kept


def test_a_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_PAPERS", "/no/such/folder")
    with pytest.raises(ZooError, match="ZOO_PAPERS: no folder '/no/such/folder'"):
        catalog.list_papers()


# ---- the cards that are here ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["list"], ["list", "weights"], ["list", "recipes", "mae"], ["list", "datasets", "--json"]]
)
def test_listing_imports_little(words: list[str], tmp_path: Path) -> None:
    """The first time makes the index; after that neither cards nor their schema are touched. An edit counts at once."""
    script = (
        f"import sys; from zoo.command.cli import main\nassert main({words}) == 0\nprint(*sys.modules, file=sys.stderr)"
    )

    def run() -> tuple[str, set[str]]:
        environment = {**os.environ, "ZOO_HOME": str(tmp_path / "home"), "ZOO_PAPERS": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", script], check=True, cwd=ROOT, env=environment, capture_output=True, text=True
        )
        return done.stdout, set(done.stderr.split())

    first, _ = run()
    again, modules = run()
    assert again == first
    assert not modules & {"torch", "lightning", "numpy", "pydantic", "yaml", "zoo.catalog", "zoo.command.show"}
    assert len(modules) < 450
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(FACTS))
    third, modules = run()
    assert "pydantic" in modules
    assert ("mine" in third) == (words == ["list"])


def test_the_catalog_imports_no_torch() -> None:
    script = (
        "import sys, zoo; zoo.list_papers(); zoo.list_models(); zoo.list_recipes(); zoo.list_datasets();"
        "sys.exit(bool({'torch', 'lightning', 'numpy', 'rich'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_own_papers_do_not_leak_into_these_tests() -> None:
    assert not any(catalog.paper(slug).is_own for slug in catalog.list_papers())


@pytest.mark.parametrize("slug", catalog.list_papers())
class TestPaper:
    """What a card says, held against the code beside it."""

    def test_models_exist_and_have_the_stated_parameters(self, slug: str) -> None:
        from zoo.weights.pretrained import Architecture

        card = catalog.paper(slug)
        assert card.models
        for model in card.models:
            net = Architecture(card, model.name, {}).on_meta()
            assert sum(parameter.numel() for parameter in net.parameters()) == model.params, model.name

    def test_weights_load_into_real_models_with_known_options(self, slug: str) -> None:
        from zoo.weights.pretrained import Architecture, create_preprocess

        card = catalog.paper(slug)
        for weight in card.weights:
            assert Architecture(card, weight.model, weight.overrides).on_meta().state_dict()
            assert weight.name.partition(".")[0] == weight.model
            assert all(url.startswith(("https://", "hf://")) for url in weight.urls), weight.name
            assert create_preprocess(weight.name).transforms

    def test_published_layouts_match_key_for_key(self, slug: str, shared: Path) -> None:
        """The manifest named by `layout` (every key and shape of the published file), on the meta device."""
        import json

        import torch

        from zoo.weights.pretrained import Architecture, mismatch, paper_module, shapes

        card = catalog.paper(slug)
        checked = 0
        for weight in card.weights:
            manifest = shared / "statedicts" / slug / f"{Path(weight.layout or '').stem}.json"
            if not manifest.is_file():
                continue
            keys = json.loads(manifest.read_text())["keys"]
            state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
            converted = getattr(paper_module(card), weight.converter)(state)
            wanted = shapes(Architecture(card, weight.model, weight.overrides).on_meta())
            assert not mismatch(converted, wanted), weight.name
            checked += 1
        if not checked:
            pytest.skip("no manifest of this paper's checkpoints is here")

    def test_rows_name_real_models_and_recipes(self, slug: str) -> None:
        card = catalog.paper(slug)
        recipes = catalog.list_recipes()
        for row in card.leaderboard:
            assert row.recipe is None or row.recipe in recipes, row.id

    def test_the_claim_is_declared_and_has_its_result(self, slug: str) -> None:
        claim = catalog.paper(slug).claim
        if claim is None:
            pytest.skip("the card makes no claim")
        assert (share("benchmarks") / "claims" / f"{slug}.yaml").is_file()
        kept = (share("benchmarks") / "claims" / "results" / Path(claim.result).name).is_file()
        assert kept or declaration.read(slug).tried, "a claim without a result says why"
        assert len(claim.arms) >= 2


@pytest.mark.parametrize("name", catalog.list_datasets())
def test_data_cards(name: str) -> None:
    card = catalog.data_card(name)
    assert card.splits
    assert card.layouts
    assert card.num_classes is None or card.num_classes > 1


def test_every_recipe_belongs_to_a_paper() -> None:
    recipes = catalog.list_recipes()
    assert recipes
    assert {name.partition("/")[0] for name in recipes} <= set(catalog.list_papers())


def test_several_patterns_match_what_each_of_them_does() -> None:
    assert zoo.list_models(["mae*", "moco*"]) == sorted({*zoo.list_models("mae*"), *zoo.list_models("moco*")})
    assert zoo.list_models(["mae*"], pretrained=True) == zoo.list_models("mae*", pretrained=True)
    assert zoo.list_models([]) == []
    with pytest.raises(ZooError, match="a pattern is text"):
        zoo.list_models([3])  # type: ignore[list-item]
