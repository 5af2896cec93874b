"""The page of a run: made at its end, made anew, several compared; whatever its files hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.command.test_runs import CONFIG
from zoo.command.cli import main
from zoo.errors import ZooError
from zoo.pages import report
from zoo.pages import run as runs
from zoo.pages.svg import curves, thinned, ticks

TASK = "zoo.recognition.preact_resnet.PreActResNetClassification"
EVIL = "<script>alert(1)</script>"
RESULT = {
    "recipe": "preact_resnet/pocket",
    "command": "zoo fit preact_resnet/pocket --trainer.max_epochs 2",
    "metrics": {"train/loss": 0.5, "val/top1": 0.75},
    "protocol": {"dataset": EVIL, "samples.train": 100},
    "seconds": 61.0,
    "date": "2026-01-02",
    "hardware": EVIL,
    "versions": {"zoo": "0"},
}
METRICS = """step,epoch,train/loss_step,train/lr,val/top1,time/data,time/compute,speed/samples_per_s,memory/peak_mib
9,0,2.0,0.1,,,,,
9,0,,,0.5,1.0,3.0,25.0,2048
19,1,1.0,0.05,,,,,
19,1,,,0.75,1.0,3.0,25.0,3072
"""
ERRORS = {
    "samples": 8,
    "step": 20,
    "classes": ["cat", EVIL],
    "confusion": [[0, 0, 3], [0, 1, 1], [1, 1, 4]],
    "ap": {"box": {EVIL: 41.5}},
    "worst": [
        {"loss": 3.2, "truth": "cat", "guess": EVIL, "probability": 0.9, "index": 7, "file": "a/b.png",
         "picture": "data:image/png;base64,iVBORw0KGgo="},
        {"loss": None, "truth": "cat", "picture": 'x" onerror="alert(1)'},
    ],
}  # fmt: skip


class _Reader(HTMLParser):
    """Tags with their attributes, and the text beside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._inside = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def make_run(folder: Path, **changes: Any) -> Path:
    """A run's folder as `zoo fit` leaves it, with names that are no good."""
    folder.mkdir(parents=True)
    config = {
        "seed_everything": 0,
        "model": {"class_path": TASK, "init_args": {"depths": [3, 3, 3], "optim": {"lr": 0.2}}},
        "data": {"class_path": "zoo.data.ImageDataModule", "init_args": {"dataset": "shapes", "batch_size": 64}},
        "trainer": {"max_epochs": 2, "limit_val_batches": None},
    }
    (folder / "config.yaml").write_text("# recipe: preact_resnet/pocket\n" + yaml.safe_dump(config))
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "result.json").write_text(json.dumps(RESULT | changes))
    (folder / "errors_val.json").write_text(json.dumps(ERRORS))
    for name in ("Task_step0000010.png", "Task_step0000020.png", "samples.png"):
        path = folder / "pictures" / name
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((8, 8), 90).convert("RGB").save(path)
    (folder / "checkpoints").mkdir()
    for name in ("last.ckpt", "best.ckpt"):
        (folder / "checkpoints" / name).write_bytes(b"")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def test_the_page_tells_all_and_escapes_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(here / "runs" / "preact_resnet" / "pocket" / "20260102-030405")
    Image.effect_noise((1500, 900), 90).save(folder / "pictures" / "samples.png")  # too large to be shown as it is
    for name in (str(folder), str(folder / "checkpoints" / "last.ckpt"), "runs:last"):
        assert main(["report", name]) == 0
        assert capsys.readouterr().out.strip().endswith("report.html")
    page = (folder / "report.html").read_text()
    assert EVIL not in page
    read = _Reader(page)
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    sources = [attributes["src"] for tag, attributes in read.tags if tag == "img"]
    assert len(sources) == 3  # the worst sample with a picture, the newest of the task's, the samples
    assert all(str(source).startswith("data:image/") for source in sources)
    assert len(page) < 900_000
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", page)
    wanted = ["val/top1", "0.75", "61 s", "25%", "3.00 GiB", EVIL, "41.5", "3.2", "a/b.png"]
    wanted += ["differs from preact_resnet/pocket", "trainer.max_epochs", "model.optim.lr"]
    wanted += [
        "zoo fit preact_resnet/pocket --ckpt_path runs/preact_resnet/pocket/20260102-030405/checkpoints/last.ckpt"
    ]
    wanted += ["zoo test runs/preact_resnet/pocket/20260102-030405:best", "learning rate"]
    for text in wanted:
        assert text in read.text, text
    rows = {key: (named, now) for key, named, now in runs.changes(runs.read(folder)) or ()}
    assert rows == {"trainer.max_epochs": (5, 2), "model.optim.lr": (0.1, 0.2)}
    assert report.render(runs.read(folder)) == page


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.csv", "result.json", "errors_val.json", "pictures/samples.png"]
)
@pytest.mark.parametrize("spoil", [_cut, Path.unlink, lambda path: path.write_bytes(b"\xff\x00[7]")])
def test_what_is_broken_or_missing_is_left_out(name: str, spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    spoil(folder / name)
    assert "zoo report" in _Reader(report.write(folder).read_text()).text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", {"metrics": [1], "protocol": 7, "command": 3, "verdict": {"verdict": 1}, "versions": []}),
        ("result.json", {"verdict": {"verdict": "worse", "row": EVIL, "measured": "x"}}),
        ("config.yaml", {"model": 7, "trainer": [EVIL], "data": None}),
        ("errors_val.json", {"confusion": [[0, 1, 0], [1, "x", 2], 3], "ap": {"box": {"a": None}}, "worst": [1, {}]}),
        ("errors_val.json", {"classes": 5, "confusion": [[0, 1, 2]]}),
        ("errors_val.json", {"ap": {"box": [1]}}),
    ],
)
def test_odd_contents_break_no_page(name: str, content: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(json.dumps(content))
    assert EVIL not in report.write(folder).read_text()


def test_runs_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_run(here / "runs" / "a" / "1")
    two = make_run(here / "runs" / "a" / "2", metrics={"val/top1": 0.8125})
    (two / "config.yaml").write_text((one / "config.yaml").read_text().replace("lr: 0.2", "lr: 0.4"))
    assert main(["report", str(one), str(two)]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    page = (here / "comparison.html").read_text()
    text = _Reader(page).text
    assert EVIL not in page
    assert all(part in text for part in ("2 runs compared", "0.75", "0.8125", "model.optim.lr", "0.2", "0.4"))
    assert "data.batch_size" not in text  # alike
    assert page.count("<polyline") >= 4
    assert main(["report", str(one), str(one), "-o", "twice.html"]) == 0
    assert "None: they were run alike." in (here / "twice.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no run 'nowhere'"),
        (["runs:last"], "under runs"),
        (["toy.yaml"], "not a run's folder"),
        (["."], "not a run's folder"),
        (["run", "-o", "x.pdf"], "-o FILE.html"),
        ([], "required"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_fits_and_tests_end_in_a_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "toy.yaml"]) == 0
    assert "report: runs/toy/" in capsys.readouterr().out
    (run,) = (here / "runs" / "toy").iterdir()
    text = _Reader((run / "report.html").read_text()).text
    assert all(part in text for part in ("zoo fit toy.yaml", "val/loss", "resume:"))
    assert "as it stands" not in text  # a recipe of one's own is not known by its name
    assert main(["test", "toy.yaml", "--ckpt_path", "last"]) == 0
    assert len(list(here.glob("runs/toy/*/report.html"))) == 2
    capsys.readouterr()
    assert main(["fit", "toy.yaml", "--report", "false"]) == 0
    assert "report:" not in capsys.readouterr().out
    assert len(list(here.rglob("report.html"))) == 2


def test_a_page_that_cannot_be_written_harms_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write", full)
    assert main(["fit", "toy.yaml"]) == 0
    said = capsys.readouterr()
    assert said.err.count("no report of this run") == 1
    assert "run: runs/toy/" in said.out


def test_curves() -> None:
    assert not curves({"a": [], "b": [(0, float("nan"))]})
    one = curves({"a": [(3, 1.0)]})
    assert one.count("<circle") == 2
    assert "<polyline" not in one
    peak = [(x, 5.0 if x == 777 else 0.0) for x in range(1000)]
    assert len(thinned(peak)) <= 260
    assert (777, 5.0) in thinned(peak)
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(2, 2) == [2]
    assert "&lt;b&gt; 1 at step 0" in curves({"<b>": [(0, 1.0), (1, 2.0)]})


def test_find_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no run"):
        runs.find(str(tmp_path / "x"))
