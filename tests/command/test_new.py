"""`zoo new` writes a paper's files, which run; what a contributor reads is what the code says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ROOT
from zoo import catalog
from zoo.catalog import read_facts, validated
from zoo.claims.declaration import Declaration
from zoo.command import new
from zoo.command.cli import main
from zoo.files import module_from


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with nothing in it but what `zoo new` looks for."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "README.md").write_text("before\n<!-- papers -->\nold\n<!-- /papers -->\nafter\n")
    monkeypatch.setattr(new, "share", lambda kind: tmp_path / kind)
    return tmp_path


def test_the_files_of_a_paper(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", "my_paper", "--field", "recognition", "--title", 'My "Paper": #1']) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines() if line.endswith((".py", ".yaml"))]
    assert len(written) == 6
    assert all((checkout / path).is_file() for path in written)
    source = checkout / "zoo/recognition/my_paper.py"
    monkeypatch.setenv("ZOO_PAPERS", str(source.parent))
    (entry,) = catalog.paper("my_paper").models
    module = module_from(source, "my_paper")
    del sys.modules["my_paper"]
    with torch.device("meta"):
        assert sum(p.numel() for p in module.my_paper_small().parameters()) == entry.params
    recipe = yaml.safe_load((checkout / "recipes/my_paper/pocket.yaml").read_text())
    task = module.MyPaperClassification(**{**recipe["model"]["init_args"], "optim": module.Optim(), "num_classes": 10})
    loss = task.training_step({"image": torch.randn(2, 3, 32, 32), "label": torch.tensor([0, 1])}, 0)
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())
    claim = checkout / "benchmarks/claims/my_paper.yaml"
    assert validated(Declaration, claim, read_facts(claim)).plan("without")["run"].recipe == "my_paper/pocket"
    before = source.read_text()
    assert main(["new", "my_paper", "--field", "video"]) == 2
    assert source.read_text() == before
    assert "is here already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["My-Paper", "--field", "video"], "a paper's name is small letters"),
        (["../x", "--field", "video"], "a paper's name is small letters"),
        (["class", "--field", "video"], "a paper's name is small letters"),
        (["my_paper", "--field", "video", "--title", 'a"""'], "a paper's title is one line"),
        (["my_paper", "--field", "vidoe"], "unknown field 'vidoe'; did you mean 'video'?"),
        (["mae", "--field", "selfsup"], "the paper 'mae' is here already"),
        (["my_paper"], "zoo new my_paper --field recognition"),
    ],
)
def test_what_it_refuses(checkout: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (checkout / "zoo").exists()


def test_outside_a_checkout_it_says_what_to_do(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "pyproject.toml").unlink()
    assert main(["new", "my_paper", "--field", "video"]) == 2
    assert "ZOO_PAPERS" in capsys.readouterr().err


def test_readme_learns_of_the_paper(checkout: Path) -> None:
    new.refresh_readme(checkout / "README.md")
    text = (checkout / "README.md").read_text()
    assert text.startswith("before\n<!-- papers -->\n| paper |")
    assert text.endswith("<!-- /papers -->\nafter\n")
    assert "`mae`" in text


def test_contributing_tells_the_fields_of_a_card() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- card fields -->\n(.*)<!-- /card fields -->", text, re.DOTALL)
    assert found is not None
    assert found[1] == new.card_fields(), "run: zoo new --card_fields"
