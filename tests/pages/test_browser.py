"""The pages in a real browser: they search, sort and filter, fit a phone, fetch nothing and complain of nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, start
from tests.pages.test_report import make_run
from zoo.command import show
from zoo.pages import leaderboard, report

SIZES = [(1280, 900), (390, 844)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = start()
    yield found
    found.close()


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    rows = [row for row in show.leaderboard() if row["paper"] in ("mae", "mask_rcnn", "moco_v3")]
    leaderboard.write(folder, rows)
    return folder


def _well(browser: Browser, path: Path, width: int, height: int) -> None:
    browser.open(path, width, height)
    assert browser.errors == []
    assert [address for address in browser.asked if not address.startswith("data:")] == [path.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pages_fit_the_screen_and_fetch_nothing(
    browser: Browser, board: Path, tmp_path: Path, width: int, height: int
) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    pages = [board / "index.html", board / "mae.html", report.write(one)]
    for path in [*pages, report.write_comparison([one, two], tmp_path / "both.html")]:
        _well(browser, path, width, height)
    assert browser.run("document.querySelectorAll('svg.chart').length") >= 5


def test_the_index_searches_filters_and_sorts(browser: Browser, board: Path) -> None:
    browser.open(board / "index.html")
    papers = "[...document.querySelectorAll('#papers tbody tr:not([hidden])')].map(r => r.cells[0].textContent)"
    rows = "document.querySelectorAll('#rows tbody tr:not([hidden])').length"
    every = browser.run(rows)
    assert browser.run(papers) == ["mae", "mask_rcnn", "moco_v3"]

    def type_(text: str) -> None:
        browser.run(
            f"(s => {{ s.value = '{text}'; s.dispatchEvent(new Event('input')) }})(document.querySelector('input'))"
        )

    type_("Masked AUTO")
    assert browser.run(papers) == ["mae"]
    type_("keypoint/AP coco")
    assert 0 < browser.run(rows) < every
    assert browser.run("document.getElementById('rows-shown').textContent") == f"{browser.run(rows)} of {every}"
    type_("no such thing")
    assert (browser.run(papers), browser.run(rows)) == ([], 0)
    type_("")
    browser.run("document.querySelector('button[data-field=detection]').click()")
    assert browser.run(papers) == ["mask_rcnn"]
    browser.run("document.querySelector('button[data-field=\"\"]').click()")
    assert browser.run(rows) == every

    click = "document.querySelectorAll('#papers thead button')[{}].click()"
    years = "[...document.querySelectorAll('#papers tbody tr')].map(r => Number(r.cells[2].textContent))"
    browser.run(click.format(2))
    assert browser.run(years) == sorted(browser.run(years))
    browser.run(click.format(2))
    assert browser.run(years) == sorted(browser.run(years), reverse=True)
    values = "[...document.querySelectorAll('#rows tbody tr')].map(r => r.cells[4].textContent)"
    browser.run("document.querySelectorAll('#rows thead button')[4].click()")
    numbers = [float(text.rstrip("% APmIoU").split()[0]) for text in browser.run(values) if text]
    assert numbers == sorted(numbers)
    assert browser.errors == []


def test_a_row_of_the_index_leads_to_its_place(browser: Browser, board: Path) -> None:
    browser.open(board / "index.html")
    browser.run("document.querySelector('#rows tbody a').click()")
    browser.open(board / "mae.html")
    assert browser.run("document.querySelectorAll('#leaderboard tr[id]').length") > 50


def test_commands_are_copied(browser: Browser, tmp_path: Path) -> None:
    browser.open(report.write(make_run(tmp_path / "one")))
    browser.run("document.querySelector('button.copy').click()")
    said = browser.run("new Promise(r => setTimeout(() => r(document.querySelector('button.copy').textContent), 100))")
    assert said in ("copied", "selected")
    assert browser.errors == []
