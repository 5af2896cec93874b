"""A run as a model: found by its names, opened from what its checkpoint says, used wherever a model's name is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.distributed import checkpoint as distributed_checkpoint
from torchvision.io import read_image, write_png

import zoo
from tests.command.runs_of_all import folder_with
from tests.data.test_video_data import write_video
from zoo.command.cli import main
from zoo.data import ImageDataModule, VideoDataModule
from zoo.data.arc import read_tasks
from zoo.data.detection import DetectionDataModule
from zoo.errors import ZooError
from zoo.video import slowfast
from zoo.weights.runs import find_checkpoint, is_run, open_run

KINDS = ("preact_resnet", "mae", "moco", "mask_rcnn", "slowfast", "flip", "meanflow", "varc")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    for place in folder_with(tmp_path_factory, *(f"{kind}/pocket" for kind in KINDS)):
        source = ImageDataModule("shapes", image_size=32).source("test")
        for n in range(3):
            (place / "photos" / "more").mkdir(parents=True, exist_ok=True)
            where = place / "photos" / ("more" if n == 2 else ".") / f"{n}.png"
            write_png(source[n]["image"], str(where))
        yield place


def _said(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return json.loads(capsys.readouterr().out)


def _line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1, err
    return err[0]


# ------------------------------------------------------------------------------------------------------------- finding


def test_names_of_runs(here: Path) -> None:
    run = max((here / "runs" / "mae" / "pocket").iterdir())
    name = str(run.relative_to(here))
    last = run / "checkpoints" / "last.ckpt"
    for one in (name, f"{name}:last", str(last), "runs:mae/pocket", "runs:mae", "runs/mae/pocket", "runs:mae/po"):
        assert is_run(one)
        assert find_checkpoint(one).resolve() == last
    assert find_checkpoint("runs:preact_resnet:best").name == "best.ckpt"
    assert "varc" in str(find_checkpoint("runs:last"))  # the newest of all
    assert open_run(name).folder is not None
    for one in ("mae/pocket", "mae", "mae:finetune_vit_b", "photo.jpg", "photos", "recipes/mae/pocket.yaml"):
        assert not is_run(one)
    for one, line in {"runs:nix": "no last.ckpt of nix", "runs/nix": "no run", "nix.ckpt": "no run"}.items():
        with pytest.raises(ZooError, match=line):
            find_checkpoint(one)


def test_a_run_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("1", "2", "empty"):
        (Path("runs/mae/pocket") / run / "checkpoints").mkdir(parents=True)
    for run in ("1", "2"):
        (Path("runs/mae/pocket") / run / "checkpoints" / "last.ckpt").touch()
    assert find_checkpoint("runs:mae/pocket/1") == Path("runs/mae/pocket/1/checkpoints/last.ckpt")
    assert find_checkpoint("runs:mae/pocket").parts[3] == "2"
    for one in ("runs:mae/pocket/1:best", "runs:mae/pocket/empty"):  # no other run stands in
        with pytest.raises(ZooError, match="nothing was saved"):
            find_checkpoint(one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_enough(kind: str, here: Path) -> None:
    """Its task with its weights, the names of its classes, the recipe, and how it prepares samples."""
    run = open_run(f"runs:{kind}")
    saved = torch.load(run.checkpoint, weights_only=True)
    assert not run.task.training
    wanted = saved["ema_state_dict"] if kind == "meanflow" else saved["state_dict"]
    assert all(value.equal(wanted[key]) for key, value in run.task.state_dict().items())
    facts = run.facts
    assert facts["recipe"]["name"] == f"{kind}/pocket"
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["steps"] == 2
    if kind != "varc":
        assert len(run.classes or []) == facts["data"]["num_classes"]
    zoo_model = saved["zoo_model"]
    assert json.loads(json.dumps(zoo_model)) == zoo_model  # plain types
    assert isinstance(zoo.create_model(f"runs:{kind}"), type(run.network))
    if kind == "meanflow":
        raw = open_run("runs:meanflow", use_ema=False).task.state_dict()
        assert all(value.equal(saved["state_dict"][key]) for key, value in raw.items())
        with pytest.raises(ZooError, match="unknown average"):
            open_run("runs:meanflow", "nix").state()


def test_samples_are_prepared_as_in_evaluation(here: Path, tmp_path: Path) -> None:
    run = open_run("runs:preact_resnet")
    data = ImageDataModule(str(here / "photos"), image_size=16, mean=run.facts["preprocess"]["mean"],
                           std=run.facts["preprocess"]["std"])  # fmt: skip
    samples = data.samples("predict")
    picture = samples.name(0)
    assert zoo.create_preprocess("runs:preact_resnet")(picture).equal(samples[0]["image"])
    assert run.preprocess(24)(read_image(str(picture))).shape == (3, 24, 24)
    scenes = DetectionDataModule(options={"size": 64, "max_objects": 3, "clutter": 0.2}).samples("test")
    facts = open_run("runs:mask_rcnn").facts["preprocess"]
    assert (facts["size"], facts["longest"]) == (64, 106)  # a photo of any size comes as the drawn ones
    prepared = open_run("runs:mask_rcnn").preprocess()(scenes.source.read_many([0])[0].image)
    assert prepared.equal(scenes[0]["image"][0])
    frames = tmp_path / "films" / "film"
    frames.mkdir(parents=True)
    for n in range(6):
        write_png(torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8), str(frames / f"{n}.png"))
    videos = VideoDataModule(str(frames.parent), num_frames=4, sampling_rate=1, image_size=32, num_workers=0)
    found = open_run("runs:slowfast").preprocess()(frames)
    assert found[0].equal(videos.samples("predict")[0]["video"])


def test_what_is_refused(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task from elsewhere is never imported; weights that do not match, and an older file, are told."""
    path = find_checkpoint("runs:preact_resnet")
    content = torch.load(path, weights_only=True)
    for task in (
        "os.path.join",
        "zoo.data.base.SeededDataModule",
        "zoo.selfsup.mae.convert_official",
        "tests.Task",
        "",
    ):
        torch.save({**content, "zoo_task": task}, tmp_path / "foreign.ckpt")
        assert main(["predict", str(tmp_path / "foreign.ckpt"), "photos/0.png"]) == 2
        assert "not a checkpoint of a task of the zoo" in _line(capsys)
    other = {key: value for key, value in content["state_dict"].items() if "fc" not in key}
    torch.save({**content, "state_dict": other}, tmp_path / "short.ckpt")
    with pytest.raises(ZooError, match=r"does not match.*fc"):
        open_run(str(tmp_path / "short.ckpt")).task  # noqa: B018
    old = {key: value for key, value in content.items() if key != "zoo_model"}
    torch.save(old, tmp_path / "old.ckpt")
    recipe = content["zoo_model"]["recipe"]
    spoilt = {**recipe, "data": {**recipe["data"], "init_args": {"train_transform": {"class_path": "os.system"}}}}
    torch.save({**content, "zoo_model": {**content["zoo_model"], "recipe": spoilt}}, tmp_path / "spoilt.ckpt")
    for words in (["test", str(tmp_path / "spoilt.ckpt")], ["finetune", str(tmp_path / "spoilt.ckpt"), "photos"]):
        assert main(words) == 2
        assert "os.system" in _line(capsys)
    bare = open_run(str(tmp_path / "old.ckpt"))
    assert type(bare.task).__name__ == "PreActResNetClassification"
    with pytest.raises(ZooError, match="written by an older zoo"):
        bare.preprocess()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save(old, run / "checkpoints" / "last.ckpt")
    shutil.copy(path.parent.parent / "config.yaml", run)
    known = open_run(str(run))  # of which its config tells
    assert known.classes == open_run("runs:preact_resnet").classes
    assert known.facts["preprocess"] == open_run("runs:preact_resnet").facts["preprocess"]
    with pytest.raises(ZooError, match="takes not an option"):
        zoo.create_model("runs:preact_resnet", num_classes=3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.init_args.train_transform", "foreign.Transform"),  # a string is a class path too
        ("data.init_args.train_transform", "settings.yaml"),
        ("data", "foreign.Transform"),
        ("trainer.callbacks", ["foreign.Transform"]),
        ("module", "foreign.py"),
    ],
)
def test_a_strangers_settings_import_nothing(
    key: str,
    value: Any,
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, run, done = find_checkpoint("runs:preact_resnet"), tmp_path / "run", tmp_path / "done"
    (run / "checkpoints").mkdir(parents=True)
    code = f"import pathlib, torch\npathlib.Path({str(done)!r}).touch()\nclass Transform(torch.nn.Module):\n    pass\n"
    for folder in (tmp_path, run):
        (folder / "foreign.py").write_text(code)
    (tmp_path / "settings.yaml").write_text("class_path: foreign.Transform\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = config = yaml.safe_load((path.parent.parent / "config.yaml").read_text())
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[last] = str(tmp_path / value) if value == "settings.yaml" else value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    content = torch.load(path, weights_only=True)
    bare = {name: part for name, part in content.items() if name != "zoo_model"}  # whose config is asked
    torch.save(bare, run / "checkpoints" / "last.ckpt")
    recipe = {**content["zoo_model"]["recipe"], "data": config["data"]}
    torch.save({**content, "zoo_model": {**content["zoo_model"], "recipe": recipe}}, tmp_path / "other.ckpt")
    refused = [["test", str(run)], ["fit", str(run)], ["benchmark", str(run), "train"]]
    refused += [["test", str(tmp_path / "other.ckpt")]] if parents[:1] == ["data"] else []
    for words in refused:
        assert main(words) == 2
        assert ("names a file of Python" if key == "module" else "foreign.Transform") in _line(capsys)
    main(["finetune", str(tmp_path / "other.ckpt"), "photos"])
    assert main(["show", str(run)]) == 0
    assert not done.exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("zoo_model", "x", "zoo_model is 'x'"),
        ("zoo_model.recipe", "x", "zoo_model.recipe is 'x'"),
        ("zoo_model.recipe.data", "x", "zoo_model.recipe.data is 'x'"),
        ("zoo_model.recipe.name", 7, "zoo_model.recipe.name is '7'"),
        ("zoo_model.classes", [{}, 2], "a name of zoo_model.classes"),
        ("zoo_model.preprocess.size", 10**9, "at a size of 1000000000"),
        ("zoo_model.preprocess.crop_pct", 1e-9, "at a size / crop_pct of"),
        ("zoo_model.preprocess.mean", ["x"], "not told as it should be"),
        ("zoo_model.preprocess.std", [0.0, 0.0, 0.0], "deviations are above 0"),
        ("zoo_model.versions", {"zoo": {}}, "versions.zoo: "),
        ("hyper_parameters", "x", "hyper_parameters is 'x'"),
    ],
)
def test_facts_that_the_zoo_does_not_write(
    key: str, value: Any, said: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(find_checkpoint("runs:preact_resnet"), weights_only=True)
    *parents, last = key.split(".")
    tree = content
    for parent in parents:
        tree = tree[parent]
    tree[last] = value
    torch.save(content, tmp_path / "odd.ckpt")
    command = ["push", str(tmp_path / "folder")] if last == "versions" else ["predict", "photos/0.png"]
    assert main([command[0], str(tmp_path / "odd.ckpt"), command[1]]) == 2
    assert said in _line(capsys)


def test_fewer_names_than_classes(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(find_checkpoint("runs:preact_resnet"), weights_only=True)
    content["zoo_model"]["classes"] = ["only\x1b[2J"]
    torch.save(content, tmp_path / "odd.ckpt")
    assert main(["predict", str(tmp_path / "odd.ckpt"), "photos/0.png", "--top=10"]) == 0
    out = capsys.readouterr().out
    assert "class 9" in out
    assert "only [2J" in out


def test_photos_are_turned_upright_as_in_the_data(here: Path, tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    shade = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    for n in range(20):
        (tmp_path / "set" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        shade.save(tmp_path / "set" / "ab"[n % 2] / f"{n}.jpg", exif=exif)
    samples: Any = ImageDataModule(str(tmp_path / "set"), image_size=32).samples("val")
    batch = samples.__getitems__([0])["image"][0]
    assert batch.std(dim=-1).mean() > 10 * batch.std(dim=-2).mean()  # the gradient lies on its side


def test_to_look_at_a_strangers_run_fetches_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((find_checkpoint("runs:preact_resnet").parent.parent / "config.yaml").read_text())
    config["data"]["init_args"]["dataset"] = "hf://someone/set"
    asked: list[Any] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *words, **named: asked.append(words))
    run = Path("fetching/checkpoints")
    run.mkdir(parents=True)
    Path("fetching/config.yaml").write_text(yaml.safe_dump(config))
    content = torch.load(find_checkpoint("runs:preact_resnet"), weights_only=True)
    torch.save({name: part for name, part in content.items() if name != "zoo_model"}, run / "last.ckpt")
    assert open_run("fetching").facts["data"] is None
    assert not asked


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["state_dict", "model"])  # as strategies of several devices name it
def test_a_sharded_checkpoint(name: str, here: Path, tmp_path: Path) -> None:
    content = torch.load(find_checkpoint("runs:mae"), weights_only=True)
    folder = tmp_path / "last.ckpt"
    distributed_checkpoint.save({name: content["state_dict"]}, checkpoint_id=folder, no_dist=True)
    rest = {key: value for key, value in content.items() if key not in ("state_dict", "optimizer_states")}
    torch.save(rest, folder / "meta.pt")
    run = open_run(str(folder))
    assert all(value.equal(content["state_dict"][key]) for key, value in run.task.state_dict().items())
    assert run.classes == open_run("runs:mae").classes


# ---------------------------------------------------------------------------------------------------------- predicting


def test_classes_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run("runs:preact_resnet")
    assert main(["predict", "runs:preact_resnet", "photos", "--json", "--top", "3"]) == 0
    rows = _said(capsys)
    assert [row["image"] for row in rows] == ["photos/0.png", "photos/1.png", "photos/more/2.png"]
    images = torch.stack([run.preprocess()(row["image"]) for row in rows])
    with torch.inference_mode():
        likely = run.network(images).softmax(1)
    for row, values in zip(rows, likely, strict=True):
        assert row["top"][0]["label"] == (run.classes or [])[int(values.argmax())]
        assert row["top"][0]["probability"] == pytest.approx(float(values.max()), abs=1e-5)
    assert main(["predict", "preact_resnet/pocket", "photos/*.png", "--ckpt_path", "last", "-o", "drawn"]) == 0
    assert capsys.readouterr().out.count("%") == 10
    assert len(list(Path("drawn").iterdir())) == 2
    assert main(["predict", "runs:preact_resnet", "photos/0.png", "-o", "one.png"]) == 0
    assert read_image("one.png").shape[1] > 320  # the picture, and bars under it
    Path("photos/more/bad.png").write_text("no picture")
    assert main(["predict", "runs:preact_resnet", "photos"]) == 1
    said = capsys.readouterr()
    assert "photos/more/bad.png" in said.err
    assert "1 of 4 files" in said.err
    assert "photos/more/2.png" in said.out
    Path("photos/more/bad.png").unlink()
    assert main(["predict", "runs:preact_resnet", "nix.png"]) == 2
    assert "nix.png" in _line(capsys)


def test_every_field_draws_what_it_makes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_png(torch.randint(0, 255, (3, 70, 90), dtype=torch.uint8), "scene.png")
    assert main(["predict", "runs:mask_rcnn", "scene.png", "-o", "found.png", "--threshold", "0", "--json"]) == 0
    objects = _said(capsys)[0]["objects"]
    assert 1 <= len(objects) <= 3
    assert {row["label"] for row in objects} <= set(open_run("runs:mask_rcnn").classes or [])
    assert read_image("found.png").shape == (3, 70, 90)
    assert main(["predict", "runs:mask_rcnn", "scene.png", "--threshold", "1.0"]) == 0  # a table alone
    assert "nothing found" in capsys.readouterr().out

    assert main(["predict", "runs:mae", "photos", "-o", "sheet.png"]) == 0
    assert read_image("sheet.png").shape[2] > 4 * 120
    write_video(Path("film.mp4"), np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), np.uint8))
    capsys.readouterr()
    assert main(["predict", "runs:slowfast", "film.mp4", "-o", "clip.png", "--json"]) == 0
    top = _said(capsys)[0]["top"]
    assert sum(row["probability"] for row in top) <= 1.0001
    assert top[0]["label"] in (open_run("runs:slowfast").classes or [])
    assert main(["predict", "runs:flip", "photos/0.png", "--labels", "red,blue,no colour", "--json"]) == 0
    rows = _said(capsys)[0]["top"]
    assert {row["label"] for row in rows} == {"red", "blue", "no colour"}
    assert sum(row["probability"] for row in rows) == pytest.approx(1, abs=1e-4)
    assert main(["predict", "runs:meanflow", "-o", "samples.png", "--count", "4", "--classes", "star", "circle"]) == 0
    assert main(["predict", "runs:meanflow", "-o", "same.png", "--count", "4", "--classes", "3", "0"]) == 0
    assert read_image("samples.png").equal(read_image("same.png"))
    capsys.readouterr()
    assert main(["predict", "runs:meanflow", "-o", "no.png", "--classes", "cat"]) == 2
    assert "unknown class 'cat'" in _line(capsys)
    assert main(["predict", "runs:moco", "photos/0.png"]) == 2
    assert "zoo embed" in _line(capsys)
    assert main(["predict", "runs:preact_resnet", "photos/0.png", "--labels", "a,b"]) == 2
    assert "classes of its own" in _line(capsys)


def test_a_published_model_of_clips(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes the views that its own row is tested with: here 10 clips of 8 frames at 3 places."""
    from safetensors.torch import save_file

    from zoo.command import finetune, picture

    small = {"depth": 18, "width": 4, "crop_size": 32}
    save_file(slowfast.slow_r50_8x8(**small).state_dict(), tmp_path / "small.safetensors")
    start = finetune.from_card("slow_r50_8x8.k400", None)
    assert (start.data["num_frames"], start.data["clips"], start.data["crops"]) == (8, 10, 3)
    start.data |= {"image_size": 32, "eval_transform": None, "clips": 2}
    monkeypatch.setattr(finetune, "from_card", lambda name, weights: start)
    built = slowfast.slow_r50_8x8
    monkeypatch.setattr(slowfast, "slow_r50_8x8", lambda **options: built(**{**small, **options}))
    seen: list[tuple[int, ...]] = []
    ask = picture._over_views
    monkeypatch.setattr(picture, "_over_views", lambda f: lambda x: (seen.append(tuple(x.shape)), ask(f)(x))[1])
    write_video(tmp_path / "film.mp4", np.random.default_rng(0).integers(0, 255, (70, 24, 32, 3), np.uint8))
    words = ["predict", "slow_r50_8x8", str(tmp_path / "film.mp4"), "--weights", str(tmp_path / "small.safetensors")]
    assert main([*words, "--top", "2", "--json"]) == 0
    assert [row["label"][:6] for row in _said(capsys)[0]["top"]] == ["class "] * 2
    assert seen == [(6, 3, 8, 32, 32)]


def test_grids(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = read_tasks("arc_like", "training", tasks=2, pairs=4, max_side=5)[0]
    pairs = [{"input": p.input.tolist(), "output": p.output.tolist()} for p in (*task.train, *task.test)]
    Path("puzzles.json").write_text(json.dumps({task.name: {"train": pairs[:2], "test": pairs[2:4]}}))
    assert main(["predict", "runs:varc", "puzzles.json", "-o", "grids.png", "--json"]) == 0
    grids = _said(capsys)[0]["grids"]
    assert [(row["task"], row["test"], type(row["right"])) for row in grids] == [(task.name, n, bool) for n in (0, 1)]
    assert read_image("grids.png").shape[0] == 3
    Path("new.json").write_text(json.dumps({"train": pairs[:2], "test": pairs[2:4]}))
    assert main(["predict", "runs:varc", "new.json"]) == 2
    assert "has not learnt the task new" in _line(capsys)


# ----------------------------------------------------------------------------------------------------- other commands


def test_a_run_is_tested_shown_and_converted(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--trainer.limit_test_batches=1", "--trainer.enable_progress_bar=false"]
    assert main(["test", "runs:preact_resnet", *few]) == 0
    out = capsys.readouterr().out
    assert "score: test/loss" in out
    moved = tmp_path / "moved.ckpt"  # without its folder the checkpoint knows its recipe
    shutil.copy(find_checkpoint("runs:preact_resnet"), moved)
    assert main(["test", str(moved), *few]) == 0
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if "score" in line] == [x for x in out.splitlines() if "score" in x]
    assert main(["fit", "runs:preact_resnet"]) == 0  # it goes on, and there is nothing left
    assert "already at epoch 1 of 1" in capsys.readouterr().err
    assert main(["show", "runs:slowfast"]) == 0
    shown = capsys.readouterr().out
    assert "orbit clockwise" in shown
    assert "zoo predict runs/slowfast/pocket" in shown
    assert main(["show", "runs:mae", "--json"]) == 0
    assert _said(capsys)["recipe"] == "mae/pocket"  # type: ignore[call-overload]
    assert main(["weights", "convert", "runs:preact_resnet", "-o", str(tmp_path / "w.safetensors")]) == 0
    from safetensors.torch import load_file

    state = zoo.create_model("runs:preact_resnet").state_dict()
    assert all(value.equal(state[key]) for key, value in load_file(tmp_path / "w.safetensors").items())
    config = yaml.safe_load((find_checkpoint("runs:mae").parent.parent / "config.yaml").read_text())
    assert config["model"]["class_path"].endswith("MAEPretraining")
