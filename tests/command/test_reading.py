"""Recipes and options as input: bad files, imports, suggestions, another dataset; each mistake is one line."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from PIL import Image

import zoo
from tests.command.fuzz_recipes import TRAP
from tests.command.test_cli import CONFIG, Task
from zoo import catalog
from zoo.command.cli import main
from zoo.command.progress import BarProgress, telling
from zoo.command.reading import command_line


class Deep(Task):
    def __init__(self, depth: int = 1, width: int = 2, anything: Any = None) -> None:
        super().__init__(optim={"name": "sgd"}, num_classes=2)  # type: ignore[arg-type]
        self.anything = anything
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(1, width) for _ in range(depth)))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with toy.yaml and a module that must not be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    (tmp_path / "toy.yaml").write_text("# A toy.\n" + yaml.safe_dump(CONFIG))
    (tmp_path / "evil.py").write_text(TRAP)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "pets" / name / "a.png")
    return tmp_path


def _line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("zoo: "), err
    assert err.count("\n") == 1, err
    return err


BOMB = "a0: &a0 [x, x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("# é\nmodel: {}\n".encode("latin-1"), "not UTF-8 text (line 1)"),
        ("model: {}\n".encode("utf-16"), "not UTF-8"),
        (b"model: \x00\n", "not YAML"),
        (b"", "not NoneType"),
        (b"- model\n", "not list"),
        (b"model\n", "not str"),
        (b"model: {}\nmodel: {}\n", "the key 'model' stands twice"),
        (b"model: {class_path: a.B, init_args: {x: 1, x: 2}}\n", "the key 'x' stands twice"),
        (b"model: &m {init_args: *m}\n", "the alias *m stands in what it names"),
        (f"{BOMB}\nmodel: *a8\n".encode(), "values once its aliases are expanded"),
        (b"model: " + b"[" * 5000 + b"]" * 5000, "nesting depth"),
        (b"model: " + b"[" * 150 + b"]" * 150, "more than 100 levels deep"),
        (b"model: " + b"9" * 5000, "a number of 5000 digits"),
        (b"model: {}\n" + b"#" * (5 << 20), "more than 4 MB"),
        (b"? [1]\n: 2\nmodel: {}\n", "a key must be a word"),
        (b"1: 2\nmodel: {}\n", "unknown key 1"),
        (b"model: []\n", "model: expected LightningModule"),
        (b"model: {class_path: 3}\n", "class_path: expected a class path, got '3'"),
        (b"model: {class_path: MAEFineTunin}\n", "did you mean 'MAEFineTuning'?"),
        (b"model: {class_path: zoo.selfsup.mae.Nothing}\n", "zoo.selfsup.mae has no 'Nothing'"),
        (b"model: {class_path: evil.Task}\n", "No module named 'evil'"),
        (b"model: {class_path: subprocess.Popen, init_args: {args: [touch, x]}}\n", "subprocess.Popen is not imported"),
        (b"model: !!python/object/apply:os.system [touch pwned]\n", "not YAML"),
        (b"module: none.py\nmodel: {}\n", "module: no Python file 'none.py'"),
        (b"module: toy.yaml\nmodel: {}\n", "module: no Python file 'toy.yaml'"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_one_line(content: bytes, line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bad.yaml").write_bytes(content)
    assert main(["fit", "bad.yaml"]) == 2
    assert line in _line(capsys)
    assert main(["fit", "toy.yaml", "--config", "bad.yaml"]) == 2  # a second config is read with the same care
    assert not (here / "pwned").exists()


def test_a_fifo_is_no_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(here / "fifo.yaml")
    for words in (
        ["fit", "fifo.yaml"],
        ["fit", "toy.yaml", "--config", "fifo.yaml"],
        ["fit", "toy.yaml", "--config=."],
        ["fit", "toy.yaml", "--model.optim=fifo.yaml"],
        ["fit", "inner.yaml"],
        ["fit", "toy.yaml", "--trainer", "inner.yaml"],
    ):
        (here / "inner.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": {"plugins": "fifo.yaml"}}))
        assert main(words) == 2
        _line(capsys)


@pytest.mark.parametrize("key", ["model", "data", "trainer", "model.optim", "trainer.logger"])
def test_files_of_settings_are_bounded_and_of_this_machine(
    key: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "bomb.yaml").write_text(BOMB)
    assert main(["fit", "toy.yaml", f"--{key}", "bomb.yaml"]) == 2
    assert ("values once its aliases are expanded" in _line(capsys)) == (key != "model.optim")  # which tells its type
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("an address was asked"))
    assert main(["fit", "toy.yaml", f"--{key}", "http://127.0.0.1:9/x.yaml"]) == 2
    _line(capsys)


@pytest.mark.parametrize("option", ["--data.num_workers=1000000", "--data.num_workers=-1", "--trainer.devices=100000"])
def test_absurd_numbers_of_processes_are_refused(option: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "preact_resnet/pocket", "--trainer.accelerator", "cpu", option]) == 2
    assert "processes" in _line(capsys)


def test_a_recipe_with_a_byte_order_mark(here: Path) -> None:
    (here / "bom.yaml").write_bytes((here / "toy.yaml").read_text().encode("utf-8-sig"))
    assert isinstance(zoo.load_recipe("bom.yaml")[0], Task)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--epochs=3", "unknown key 'epochs'; did you mean 'trainer.max_epochs'?"),
        ("--lr=3", "unknown key 'lr'; did you mean 'model.optim.base_lr'?"),
        ("--batch-size=3", "did you mean 'data.batch_size'?"),
        ("--mask_ratio=3", "did you mean 'model.mask_ratio'?"),
        ("--gpus=3", "did you mean 'trainer.devices'?"),
        ("--resume=x", "did you mean 'ckpt_path'?"),
        ("--model.lr=3", "did you mean 'model.optim.base_lr'?"),
        ("--model.dept=3", "did you mean 'model.depth'?"),
        ("--quux=3", "unknown key 'quux'; known: average, ckpt_path"),
        ("--trainer.quux=3", "unknown key 'trainer.quux'; --help lists what trainer has"),
        ("--model=evil.Task", "No module named 'evil'"),
        ("--model=os.popen", "os.popen is not imported"),
        ("'--trainer.callbacks=[{class_path: evil.Task}]'", "No module named 'evil'"),
        ("--data.options=" + "9" * 500, "a number of 500 digits"),
        ("--model.patch_size=7 --print_config", "no multiple of patch_size 7"),
    ],
)
def test_a_wrong_option_names_what_is_meant(
    option: str, line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "mae/pocket", *shlex.split(option)]) == 2
    assert line in _line(capsys)
    assert not (here / "pwned").exists()


def test_lr_is_called_as_the_recipe_calls_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "mask_rcnn/pocket", "--lr=1"]) == 2
    assert "did you mean 'model.optim.lr'?" in _line(capsys)


def test_print_config_and_help_of_the_recipes_own_classes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def output(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["fit", "mae/pocket", *words])
        assert end.value.code in (0, None)
        return capsys.readouterr().out

    assert "class_path: zoo.selfsup.mae.MAEFineTuning" in output("--model=MAEFineTuning", "--print_config")
    assert "--model.mask_ratio" in output("--model.help")
    assert "--data.train_samples" in output("--data.help", "--trainer.max_epochs=1")
    assert "--model.drop_path_rate" in output("--model=MAEFineTuning", "--model.help")
    assert "last or best" in output("--help")
    assert main(["fit", "mae/pocket", "--model.optim.help"]) == 2
    assert "--model.optim.help: --model.help lists what it takes" in _line(capsys)
    assert not (here / "runs").exists()


def test_short_class_names_in_a_recipe(here: Path) -> None:
    config = {
        "model": {"class_path": "MAEFineTuning", "init_args": {"depth": 1}},
        "data": {"class_path": "ImageDataModule"},
    }
    (here / "short.yaml").write_text(yaml.safe_dump(config))
    module, data, _ = zoo.load_recipe("short.yaml")
    assert (type(module).__name__, type(data).__name__) == ("MAEFineTuning", "ImageDataModule")


def test_a_declared_module_and_papers_of_ones_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to bring classes that are not installed; a saved config finds the file from its run folder."""
    (here / "own").mkdir()
    code = "from tests.command.test_cli import Task\nclass Mine(Task):\n    pass\n"
    (here / "own" / "declared_task.py").write_text(code)
    config = {**CONFIG, "module": "declared_task.py", "trainer": {**CONFIG["trainer"], "max_epochs": 1}}
    config["model"] = {**CONFIG["model"], "class_path": "declared_task.Mine"}
    (here / "own" / "mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "own/mine.yaml"]) == 0
    (saved,) = here.glob("runs/mine/*/config.yaml")
    del sys.modules["declared_task"]
    assert type(zoo.load_recipe(saved)[0]).__module__ == "declared_task"
    (here / "papers").mkdir()
    (here / "papers" / "ownpaper.py").write_text(code)
    facts = {"slug": "ownpaper", "field": "selfsup", "title": "Own", "authors": ["A"], "year": 2026, "summary": "s"}
    (here / "papers" / "ownpaper.yaml").write_text(yaml.safe_dump(facts))
    monkeypatch.setenv("ZOO_PAPERS", str(here / "papers"))
    module, _, _ = zoo.load_recipe("toy.yaml", {"model": "ownpaper.Mine"})
    assert type(module).__name__ == "Mine"


def test_a_class_in_an_argument_of_any_type_is_not_built(here: Path) -> None:
    spec = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}
    overrides = {"model": f"{__name__}.Deep", "model.anything": spec}
    assert not isinstance(zoo.load_recipe("toy.yaml", overrides)[0].anything, torch.nn.Module)


@pytest.mark.parametrize(("option", "line"), [("depth", "layers"), ("width", "GB of parameters")])
def test_a_network_of_absurd_size_ends_in_a_line(
    option: str, line: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 10_000)
    with pytest.raises(zoo.ZooError, match=line):
        zoo.load_recipe("toy.yaml", {"model": f"{__name__}.Deep", f"model.{option}": 10**8})


@pytest.mark.parametrize("how", ["option", "config"])
def test_another_dataset_keeps_the_recipes_image_size_and_says_so(
    how: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "pets.yaml").write_text("data: {init_args: {dataset: ./pets}}\n")
    words = ["--data.dataset", "./pets"] if how == "option" else ["--config", "pets.yaml"]
    line = command_line("mae/pocket", words)
    assert line.notes == ["dataset ./pets: options, train_samples of shapes left out; image_size 64 kept"]
    from zoo.command.recipes import build_dry

    built = build_dry("fit", "mae/pocket", words)
    data = built.config["data"]["init_args"]
    assert (data["image_size"], data["options"], data["train_samples"]) == (64, None, None)
    assert not command_line("mae/pocket", ["--data.dataset", "shapes"]).notes
    line = command_line("mae/pocket", [*words, "--data.image_size=32"])
    assert "--data.image_size=64" not in line.words


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    from zoo.data.sources import hub_splits

    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError("no")

    def no_session() -> Any:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "get_session", no_session)
    with pytest.raises(zoo.ZooError, match=r"hf://a/b: no connection to the hub.*--data\.data_dir"):
        hub_splits("a/b", None, None)
    assert asked == [(True, True)]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_the_score_line_and_the_bar_say_what_tells(here: Path) -> None:
    metrics = {"val/top1": 0.5, "val/top5": 1.0, "val/box/APs": float("nan")}
    assert telling(metrics, 3) == {"val/top1": 0.5}
    assert telling(metrics, 10) == {"val/top1": 0.5, "val/top5": 1.0}
    _, _, trainer = zoo.load_recipe("toy.yaml", {"trainer.enable_progress_bar": False})
    assert trainer.logger.version is not None
    assert "v_num" not in BarProgress().get_metrics(trainer, pl.LightningModule())


def test_load_recipe_says_nothing(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.load_recipe("toy.yaml")
        zoo.load_recipe("mae/pocket", {"trainer.precision": "16-mixed"})
    assert capfd.readouterr() == ("", "")


def test_list_of_a_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "mae", "--json"]) == 0
    assert '"name": "mae"' in capsys.readouterr().out
    assert "mae" in catalog.list_papers()


def test_a_row_of_another_dataset_takes_back_its_own(here: Path) -> None:
    line = command_line("mask_rcnn:keypoint_rcnn_r50_fpn_coco_1x_box_ap", ["--data.dataset", "shapes"])
    assert "--data.options=null" in line.words
