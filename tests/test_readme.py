"""README tells the truth: its table is generated, its pictures exist, its commands run."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import zoo
from tests.conftest import ROOT
from zoo.command import show
from zoo.command.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line.partition("  #")[0] for block in BLOCKS[2:] for line in block.splitlines() if line.startswith("zoo ")]
RUNS = [words for command in COMMANDS if (words := shlex.split(command)[1:])[0] in ("fit", "validate", "test")]
PREDICTIONS = [words for command in COMMANDS if (words := shlex.split(command)[1:])[0] == "predict"]
_OF_RUNS = ("preview", "finetune", "embed", "report", "export", "push", "benchmark")  # tests/command drives them
JOURNEY = [words for command in COMMANDS if (words := shlex.split(command)[1:])[0] in _OF_RUNS]
_OTHERS = ("fit", "validate", "test", "predict", "parity", *_OF_RUNS)
LOOKS = [words for command in COMMANDS if (words := shlex.split(command)[1:])[0] not in _OTHERS]


def test_the_two_commands_set_everything_up() -> None:
    """CI runs these blocks as they stand (see .ci/run); each is one line from nothing to the result."""
    job, tests = (block.strip() for block in BLOCKS[:2])
    assert "\n" not in job + tests
    assert all(command.startswith("python3 -m venv .venv && ") for command in (job, tests))
    assert job.endswith("zoo fit mae/pocket")
    assert "pytest" in tests


def test_the_table_of_papers_is_the_catalogs() -> None:
    table = re.search(r"<!-- papers -->\n(.*?)<!-- /papers -->", README, re.DOTALL)
    assert table is not None
    assert table[1].strip() == show.papers_markdown().strip(), "run: zoo list papers --markdown"


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert any(link.endswith(".png") for link in links)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_weights_it_loads_are_known() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} == {"zoo.create_model", "zoo.create_preprocess"}
    names = {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert names
    assert names <= set(zoo.list_weights())


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_a_run_takes_its_options(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "runs" / words[1] / "1" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    parts = ("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers")
    torch.save(
        {"pytorch-lightning_version": "2.6.0", "global_step": 0, "epoch": 0} | {part: {} for part in parts}, last
    )
    for label in ("cat", "dog"):
        (tmp_path / "my_folder" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "my_folder" / label / "1.png")
    with pytest.raises(SystemExit) as end:
        main([*words, *["--print_config"] * ("--print_config" not in words)])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    for key, value in zip(words[2::2], words[3::2], strict=False):
        if key.startswith("--trainer."):
            assert str(config["trainer"][key.removeprefix("--trainer.")]) == value


@pytest.mark.parametrize("words", PREDICTIONS, ids=" ".join)
def test_a_prediction_names_weights_and_asks_for_its_picture(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words[1].startswith("runs:") or {words[1]} & {*zoo.list_models(), *zoo.list_weights()}
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert words[2] in capsys.readouterr().err


@pytest.mark.parametrize("words", JOURNEY, ids=" ".join)
def test_a_step_of_the_journey_is_read(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no run and no folder there, the first thing that is missing is named."""
    monkeypatch.chdir(tmp_path)
    if words[0] == "benchmark":
        words = [*words, "--batch", "2", "--repeats", "1", "--warmup", "0", "--json"]
        assert main(words) == 0
        return
    assert main(words) == 2
    assert re.search(r"no (run|last\.ckpt)|flowers", capsys.readouterr().err)


@pytest.mark.parametrize("words", LOOKS, ids=" ".join)
def test_a_look_around_works(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--quick"] if words[0] == "data" else []
    assert main([*words, *quick]) == 0
    assert capsys.readouterr().out.strip()
