"""`zoo preview`: every pocket recipe is drawn, seeded, and without its model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import catalog
from zoo.command import seen
from zoo.command.cli import main

POCKETS = [name for name in catalog.list_recipes("*") if "/pocket" in name]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any layer that is made fails the test."""
    monkeypatch.chdir(tmp_path)

    def refused(*arguments: object) -> None:
        raise AssertionError("a layer was made")

    for kind in (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Conv3d, torch.nn.Embedding):
        monkeypatch.setattr(kind, "__init__", refused)


@pytest.mark.parametrize("recipe", POCKETS)
def test_every_pocket_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", recipe, "--count", "2", "-o", "seen.png"]) == 0
    assert capsys.readouterr().out.startswith("seen.png: ")
    with Image.open("seen.png") as sheet:
        assert min(sheet.size) >= 192
        assert len(np.unique(np.array(sheet.convert("L")))) > 8 or "plane" in recipe


def test_it_is_seeded_and_takes_the_recipes_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preview", "preact_resnet/pocket", "--count", "2"]
    sheets = []
    for more in ([], [], ["--seed_everything", "1"], ["--data.image_size", "48"], ["--split", "val"]):
        assert main([*words, *more]) == 0
        said = capsys.readouterr().out
        sheets.append(Path("preview_preact_resnet_pocket.png").read_bytes())
        assert said.startswith("preview_preact_resnet_pocket.png: 2 samples of ")
    assert sheets[0] == sheets[1]
    assert len(set(sheets)) == 4


def test_a_folder_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            folder = tmp_path / "mine" / split / label
            folder.mkdir(parents=True)
            for n in range(2):
                Image.effect_noise((70, 50), 60).convert("RGB").save(folder / f"{n}.jpg")
    assert main(["preview", "simsiam/pocket", "--data.dataset", "mine", "-o", "a/b.png"]) == 0
    assert "4 samples of train; as stored, view 1, view 2" in capsys.readouterr().out
    assert Path("a/b.png").exists()


def test_latents_are_said_to_be_latents() -> None:
    data = seen.data_of("preact_resnet/pocket")

    class Latents(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitems__(self, keys: list[object]) -> dict[str, torch.Tensor]:
            return {"image": torch.randn(len(keys), 4, 8, 8), "label": torch.tensor([1] * len(keys))}

    data.samples = lambda split: Latents()
    sheet, said = seen.draw(data, "train", 2)
    assert sheet.dtype == torch.uint8
    assert "latents of 4 channels" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["preact_resnet/poket"], "preact_resnet/pocket"),
        (["preact_resnet/pocket", "--data.datset", "x"], "data.dataset"),
        (["preact_resnet/pocket", "--data.dataset", "./nowhere"], "nowhere"),
        (["preact_resnet/pocket", "-o", "x.jpg"], ".png"),
        (["preact_resnet/pocket", "--count", "0"], "1 to 64"),
        (["mask_rcnn/train_coco"], "data.data_dir"),
        (["varc/pocket", "more"], "more"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(Path().glob("*.png"))
