"""The leaderboard's folder: complete, escaped, the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo import catalog
from zoo.claims import declaration
from zoo.command import show
from zoo.command.cli import main
from zoo.pages import leaderboard


def _texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_paper_has_a_page_with_all_that_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", "--html", str(tmp_path / "a")]) == 0
    assert "index.html" in capsys.readouterr().out
    pages = {name: content.decode() for name, content in _texts(tmp_path / "a").items()}
    assert set(pages) == {"index.html", *(f"{slug}.html" for slug in catalog.list_papers())}
    for slug in catalog.list_papers():
        card, page = catalog.paper(slug), pages[f"{slug}.html"]
        assert f'href="{slug}.html"' in pages["index.html"]
        for row in card.leaderboard:
            assert f'id="{row.id}"' in page
            assert f'href="{slug}.html#{row.id}"' in pages["index.html"]
        for name in (*(one.name for one in card.models), *(one.name for one in card.weights)):
            assert f"<code>{name}</code>" in page
        for name in catalog.list_recipes(f"{slug}/*"):
            assert f"zoo fit {name}" in page
        result = declaration.result(slug) if card.claim else None
        assert page.count("<svg") == (result is not None)
        assert ("Where paper, official code and zoo differ" in page) == bool(card.ledger)
    leaderboard.write(tmp_path / "b", show.leaderboard())
    assert _texts(tmp_path / "a") == _texts(tmp_path / "b")


def test_one_paper_with_own_results_and_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = next(row for row in catalog.paper("mae").leaderboard if row.recipe)
    Path("runs").mkdir()
    judged = {"row": f"mae:{row.id}", "verdict": "<i>better</i>", "measured": 99.5}
    Path("runs/result.json").write_text(json.dumps({"verdict": judged, "date": "2026-01-02"}))
    verdicts = [{"paper": "mae", "ok": ok} for ok in (True, True, False, None)]
    Path("parity.json").write_text(json.dumps(verdicts))
    assert main(["leaderboard", "mae", "--results", "runs", "--html", "out", "--parity", "parity.json"]) == 0
    assert set(_texts(Path("out"))) == {"index.html", "mae.html"}
    page = Path("out/mae.html").read_text()
    assert "99.5% (&lt;i&gt;better&lt;/i&gt;, 2026-01-02)" in page
    assert "2 outputs agree, 1 differ, 1 were skipped." in page
    assert "2 of 4" in Path("out/index.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--html", "board.html"], "a folder"),
        (["--html", "file"], "a folder"),
        (["--html", "site"], "another folder"),
        (["--parity", "p.json"], "--html"),
        (["--html", "out", "--parity", "none.json"], "none.json"),
        (["--html", "out", "--parity", "file"], "JSON"),
        (["--html", "out", "--parity", "odd.json"], "no verdicts"),
        (["maee", "--html", "out"], "did you mean 'mae'"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("site").mkdir()
    Path("site/index.html").write_text("<!doctype html><title>mine</title>")
    Path("odd.json").write_text("[7]")
    assert main(["leaderboard", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert [path.name for path in Path("site").iterdir()] == ["index.html"]
    assert "mine" in Path("site/index.html").read_text()
