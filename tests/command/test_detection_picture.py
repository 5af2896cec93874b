"""What a detector finds, drawn and told; a folder in COCO's format looked over and given to a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.io import read_image, write_png

import zoo
from tests.data.test_detection_data import content, write_set
from tests.papers.test_mask_rcnn import TINY
from zoo import catalog
from zoo.catalog import Preprocess
from zoo.command import drawing, picture
from zoo.command.cli import main
from zoo.data.detection import DetectionDataModule, ResizeShortestEdge
from zoo.data.shapes import render
from zoo.detection import mask_rcnn
from zoo.errors import ZooError
from zoo.weights import pretrained

PERSON = {"num_classes": 1, "mask": None, "keypoint": {"channels": (8,), "keypoints": 17}}
MSRA = {"size": 48, "longest": 80, "channels": "bgr", "mean": [0.406, 0.456, 0.485], "std": [1 / 255] * 3}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path


def _photo(path: Path, seed: int = 0, height: int = 60, width: int = 90) -> Path:
    drawn = render(0, "test", [seed], 96, ("image",))["image"][0]
    write_png(drawn[:, :height, :width].contiguous(), str(path))
    return path


@pytest.mark.parametrize(("name", "changes"), [("mask_rcnn_r50_fpn", {}), ("keypoint_rcnn_r50_fpn", PERSON)])
def test_predict_draws_what_is_found(
    name: str, changes: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    small = {**TINY, **changes}
    monkeypatch.setattr(mask_rcnn, name, lambda **overrides: mask_rcnn.MaskRCNN(**{**small, **overrides}))
    torch.manual_seed(0)
    save_file(mask_rcnn.MaskRCNN(**small).state_dict(), here / "small.safetensors")
    _photo(here / "one.png")
    _photo(here / "two.png", 1, 90, 60)
    words = ["predict", name, "one.png", "--weights", "small.safetensors", "--threshold", "0.06"]
    assert main([*words, "-o", "out.png", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)[0]
    assert result["picture"] == "out.png"
    assert 1 <= len(result["objects"]) <= 5
    scores = [row["score"] for row in result["objects"]]
    assert scores == sorted(scores, reverse=True)
    drawn, photo = read_image("out.png"), read_image("one.png")
    assert drawn.shape == photo.shape
    assert not drawn.equal(photo)
    for row in result["objects"]:
        x0, y0, x1, y1 = row["box"]
        assert 0 <= x0 < x1 <= 90
        assert 0 <= y0 < y1 <= 60
        assert row["label"] == ("person" if changes else f"class {row['index']}")
        assert len(row.get("keypoints", [])) == (17 if changes else 0)

    assert main([*words[:2], "one.png", "two.png", *words[3:], "-o", "out"]) == 0
    first = next(w.name for w in catalog.model(name)[0].weights if w.model == name)  # the first that the card lists
    assert sorted(path.name for path in (here / "out").iterdir()) == [f"one_{first}.png", f"two_{first}.png"]
    assert f"{scores[0]:.1%}" in capsys.readouterr().out
    assert main([*words, "-o", "found.json"]) == 0
    assert json.loads(Path("found.json").read_text())[0]["objects"] == result["objects"]
    assert main([*words[:-1], "1.0", "-o", "none.png"]) == 0
    assert read_image("none.png").equal(photo)
    capsys.readouterr()
    assert main([*words[:2], "one.png", "two.png", *words[3:], "-o", "out.png"]) == 2
    assert "2 images and one file 'out.png': give a folder with -o" in capsys.readouterr().err


class Recorder(torch.nn.Module):
    """Keeps the batch it was given and finds two fixed objects."""

    size_divisibility = 16

    def forward(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        self.batch = batch
        boxes = torch.tensor([[1.0, 2, 30, 20], [10, 10, 50, 40]])
        return [{"boxes": boxes, "scores": torch.tensor([0.6, 0.9]), "labels": torch.tensor([0, 1])}]


def test_preprocessing_is_that_of_evaluation(tmp_path: Path) -> None:
    """What zoo predict gives the network is what the data module gives it in evaluation, to the last bit."""
    write_set(tmp_path, content(4), "mine.json", "images")
    data = DetectionDataModule(
        str(tmp_path), channels="bgr", pixel_mean=[103.53, 116.28, 123.675], pixel_std=[1.0, 1.0, 1.0],
        eval_transforms=[ResizeShortestEdge([48], 80)], size_divisibility=16, num_workers=0,
    )  # fmt: skip
    prepare, net = pretrained._transform(Preprocess(**MSRA), 48), Recorder()  # type: ignore[arg-type]
    samples = data.samples("predict")
    for n in range(len(samples)):
        expected = samples[n]
        image = samples.source.read_many([n])[0].image
        found = picture.find_objects(net, image, prepare, threshold=0.7)
        assert found["scores"].tolist() == pytest.approx([0.9])
        torch.testing.assert_close(net.batch["image"], expected["image"], rtol=1e-5, atol=1e-4)
        assert torch.equal(net.batch["size"], expected["size"])
        assert torch.equal(net.batch["original_size"], expected["original_size"])


def test_drawing() -> None:
    image = torch.full((3, 120, 160), 128, dtype=torch.uint8)
    masks = torch.zeros(2, 120, 160, dtype=torch.bool)
    masks[0, 40:80, 40:100] = True
    found = {
        "boxes": torch.tensor([[40.0, 40, 100, 80], [110, 1, 158, 30]]),
        "scores": torch.tensor([0.97, 0.5]),
        "labels": torch.tensor([0, 1]),
        "masks": masks,
    }
    drawn = drawing.draw_objects(image, found, ["cat", "a very long name of a class"])
    assert drawn.shape == image.shape
    assert drawn.dtype == torch.uint8
    inside, outside = drawn[:, 60, 70], drawn[:, 100, 20]
    assert outside.tolist() == [128, 128, 128]
    assert inside.tolist() != [128, 128, 128]
    assert drawn[:, 60, 40].tolist() == list(drawing.colors_of(1)[0])  # the border of the box
    assert (drawn[:, 26:39, 45:60] != 128).any()  # the label above it
    assert image.eq(128).all()  # the picture given is untouched
    points = torch.tensor([[[50.0, 50, 0.9], [60, 60, 0.9], [70, 50, 0.01]]] * 2)
    with_points = drawing.draw_objects(image, {**found, "keypoints": points}, None)
    assert not with_points[:, 50, 50].equal(drawn[:, 50, 50])
    assert with_points[:, 50, 70].equal(drawn[:, 50, 70])  # too uncertain to draw
    nothing = {name: value[:0] for name, value in found.items()}
    assert drawing.draw_objects(image, nothing, None).equal(image)
    assert len(set(drawing.colors_of(40))) == 40


def test_a_detector_keeps_the_proportions_of_its_pictures() -> None:
    prepare = pretrained._transform(Preprocess(**MSRA), 48)  # type: ignore[arg-type]
    assert prepare(torch.zeros(3, 60, 90, dtype=torch.uint8)).shape == (3, 48, 72)
    assert prepare(torch.zeros(3, 60, 120, dtype=torch.uint8)).shape == (3, 40, 80)
    red = torch.zeros(3, 50, 50, dtype=torch.uint8)
    red[0] = 255
    torch.testing.assert_close(prepare(red)[:, 0, 0], torch.tensor([-103.53, -116.28, 255 - 123.675]))


def test_data_check_looks_over_a_coco_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(here / "mine", content(), "annotations/instances_train2017.json", "train2017")
    write_set(here / "mine", content(3, first=6), "annotations/instances_val2017.json", "val2017")
    assert main(["data", "check", "./mine", "--json"]) == 0
    good = json.loads(capsys.readouterr().out)
    assert good["classes"] == ["person", "cat"]
    assert {split: found["samples"] for split, found in good["splits"].items()} == {"train": 6, "val": 3, "test": 3}
    assert good["splits"]["train"]["per_class"] == {"0": 5, "1": 3}
    assert good["problems"] == []

    file = here / "mine" / "annotations" / "instances_train2017.json"
    what = json.loads(file.read_text())
    what["annotations"][1]["bbox"] = [50, 30, 40, 40]
    what["annotations"][4]["bbox"] = [5, 5, 0, 3]
    file.write_text(json.dumps(what))
    (here / "mine" / "train2017" / "003.jpg").write_bytes(b"no picture")
    assert main(["data", "check", "./mine", "--json"]) == 1
    bad = json.loads(capsys.readouterr().out)
    assert bad["splits"]["train"]["unreadable"] == 1
    assert bad["sha256"] != good["sha256"]
    told = " | ".join(bad["problems"])
    assert "train: 1 boxes that reach more than a pixel outside their image; 1 boxes without area" in told
    assert "003.jpg" in told
    assert main(["data", "check", "coco"]) == 2
    assert "--data_dir" in capsys.readouterr().err


def test_a_recipe_takes_one_s_own_coco_folder(tmp_path: Path) -> None:
    """The classes become the folder's; what belongs to the recipe's data goes, what belongs to its weights stays."""
    write_set(tmp_path, content(), "mine.json", "images")
    changes = {"data.dataset": str(tmp_path), "data.num_workers": 0, "trainer.accelerator": "cpu"}
    module, data, _ = zoo.load_recipe("mask_rcnn/pocket", changes)
    assert isinstance(data, DetectionDataModule)
    assert (data.num_classes, data.options, data.train_samples) == (2, {}, None)
    assert [one.sizes for one in (data.train_transforms[0], data.eval_transforms[0])] == [[96], [96]]
    assert module.network.num_classes == 2  # type: ignore[union-attr, operator]
    with pytest.raises(ZooError, match="has no json of annotations"):
        zoo.load_recipe("mask_rcnn/pocket", {"data.dataset": str(tmp_path / "images")})
