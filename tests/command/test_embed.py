"""`zoo embed`: the features of a folder with the names of its files, in one go, in parts, by several processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import write_png

from tests.command.runs_of_all import folder_with
from tests.data.test_video_data import write_video
from zoo.command import embed
from zoo.command.cli import main
from zoo.data import ImageDataModule
from zoo.weights.runs import open_run


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    for place in folder_with(tmp_path_factory, "mae/pocket", "flip/pocket", "slowfast/pocket", "mask_rcnn/pocket"):
        source = ImageDataModule("shapes", image_size=32).source("test")
        for n in range(7):
            where = place / "photos" / f"set {n % 2}" / f"{n}.png"
            where.parent.mkdir(parents=True, exist_ok=True)
            write_png(source[n]["image"], str(where))
        yield place


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(embed._PART, "pictures", 2)


NAMES = ["set 0/0.png", "set 0/2.png", "set 0/4.png", "set 0/6.png", "set 1/1.png", "set 1/3.png", "set 1/5.png"]


def test_the_features_are_the_task_s_in_every_format(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq
    from safetensors import safe_open

    run = open_run("runs:mae")
    with torch.inference_mode():
        images = torch.stack([run.preprocess()(Path("photos") / name) for name in NAMES])
        wanted = run.task.features(images).numpy()  # type: ignore[operator]
    for kind in ("npz", "parquet", "safetensors"):
        assert main(["embed", "runs:mae", "photos", "-o", f"all.{kind}"]) == 0
        assert f"all.{kind}: 7 x 16 features" in capsys.readouterr().out
    with np.load("all.npz") as found:
        assert found["files"].tolist() == NAMES
        np.testing.assert_allclose(found["features"], wanted, rtol=1e-4, atol=1e-5)
        features = found["features"]
    table = pq.read_table("all.parquet").to_pydict()
    assert table["file"] == NAMES
    assert np.array_equal(np.array(table["features"], np.float32), features)
    with safe_open("all.safetensors", "np") as found:
        assert json.loads(found.metadata()["files"]) == NAMES
        assert np.array_equal(found.get_tensor("features"), features)
    assert not list(here.glob("*.parts"))


def test_a_stopped_one_goes_on_and_processes_share(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["embed", "runs:mae", "photos", "-o"]
    assert main([*words, "whole.npz"]) == 0
    made: list[int] = []
    make = embed._Job._make

    def stopped(job: embed._Job, number: int) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        make(job, number)

    monkeypatch.setattr(embed._Job, "_make", stopped)
    assert main([*words, "again.npz"]) == 130
    assert not Path("again.npz").exists()
    made.clear()
    monkeypatch.setattr(embed._Job, "_make", lambda job, number: (made.append(number), make(job, number)))
    assert main([*words, "again.npz"]) == 0
    assert made == [2, 3]
    assert Path("again.npz").read_bytes() == Path("whole.npz").read_bytes()

    for share in ("0/2", "1/2"):  # what `--processes 2` starts
        made.clear()
        monkeypatch.setenv(embed._SHARE, share)
        assert main([*words, "shared.npz", "--processes", "2"]) == 0
        assert made == [int(share[0]), int(share[0]) + 2]
    monkeypatch.delenv(embed._SHARE)
    assert main([*words, "shared.npz"]) == 0
    assert Path("shared.npz").read_bytes() == Path("whole.npz").read_bytes()

    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun says it
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main([*words, "torchrun.npz"]) == 0
    assert Path("torchrun.npz").read_bytes() == Path("whole.npz").read_bytes()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "0")

    Path("other.npz.parts").mkdir()
    Path("other.npz.parts/job.json").write_text("{}")
    capsys.readouterr()
    assert main([*words, "other.npz"]) == 2
    assert "parts of another job" in capsys.readouterr().err


def test_texts_clips_and_what_cannot_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("words.txt").write_text("a red circle\n\na blue square\n")
    assert main(["embed", "runs:flip", "words.txt", "-o", "words.npz"]) == 0
    assert main(["embed", "runs:flip", "photos", "-o", "pictures.npz"]) == 0
    with np.load("words.npz") as texts, np.load("pictures.npz") as pictures:
        assert texts["files"].tolist() == ["words.txt:1", "words.txt:3"]
        assert texts["features"].shape[1] == pictures["features"].shape[1]  # one space for both
        np.testing.assert_allclose(np.linalg.norm(texts["features"], axis=1), 1, rtol=1e-5)
    Path("films").mkdir()
    write_video(Path("films/a.mp4"), np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), np.uint8))
    assert main(["embed", "runs:slowfast", "films", "-o", "films.npz"]) == 0
    Path("photos/bad.png").write_text("no picture")
    capsys.readouterr()
    assert main(["embed", "runs:mae", "photos", "-o", "most.npz"]) == 1
    said = capsys.readouterr()
    assert "7 x 16 features" in said.out
    assert "bad.png" in said.err
    Path("photos/bad.png").unlink()
    for words, line in (
        (["runs:mask_rcnn", "photos", "-o", "x.npz"], "no features of a whole picture"),
        (["runs:mae", "films", "-o", "x.npz"], "holds no pictures"),
        (["runs:mae", "words.txt", "-o", "x.npz"], "reads no texts"),
        (["runs:mae", "nowhere", "-o", "x.npz"], "no folder 'nowhere'"),
        (["runs:mae", "photos", "-o", "x.csv"], "a file that ends in"),
        (["runs:mae", "photos", "-o", "x.npz", "--batch", "0"], "1 or more"),
    ):
        assert main(["embed", *words]) == 2
        assert line in capsys.readouterr().err
    assert not list(here.glob("x.npz*"))


def test_no_such_device_and_a_spoilt_note_are_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("foo", "meta", f"cuda:{torch.cuda.device_count() + 7}"):
        assert main(["embed", "runs:mae", "photos", "-o", "none.npz", "--device", device]) == 2
        assert capsys.readouterr().err.startswith("zoo: --device")
    assert not Path("none.npz.parts").exists()
    Path("spoilt.npz.parts").mkdir()
    Path("spoilt.npz.parts/job.json").write_text("{")
    assert main(["embed", "runs:mae", "photos", "-o", "spoilt.npz"]) == 2
    assert "holds parts of another job" in capsys.readouterr().err
