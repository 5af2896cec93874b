"""Sets in PASCAL VOC's format, on a folder of the true layout, and named subsets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.detection import DetectionDataModule, subset
from zoo.data.voc import CLASSES, find_voc, read_annotation
from zoo.errors import ZooError

OBJECT = """
    <object>
        <name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>
        <bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>{part}
    </object>"""
PART = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>"


def picture(folder: Path, name: str, size: tuple[int, int], objects: list[tuple[str, list[Any], int]]) -> None:
    for place in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    height, width = size
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg")
    said = "".join(OBJECT.format(*box, name=kind, difficult=hard, part=PART) for kind, box, hard in objects)
    head = f"<folder>VOC</folder><filename>{name}.jpg</filename><source><database>The VOC Database</database></source>"
    shape = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size><segmented>0</segmented>"
    (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{head}{shape}{said}\n</annotation>")


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """VOCdevkit with a few pictures of both years."""
    old, new = (tmp_path / "VOCdevkit" / f"VOC{year}" for year in (2007, 2012))
    picture(old, "000005", (40, 60), [("dog", [1, 1, 60, 40], 0), ("person", [11, 6, 20, 25], 1)])
    picture(old, "000007", (60, 40), [("car", [5, 5, 30, 50], 0)])
    picture(new, "2008_000008", (50, 50), [("cat", ["5.7", 8, 20, "30.2"], 0)])
    picture(new, "2008_000015", (40, 60), [])
    picture(new, "2011_000003", (40, 50), [("person", [3, 4, 40, 30], 1), ("tvmonitor", [10, 10, 30, 30], 0)])
    lists = {old: {"trainval": "000005\n000007\n", "test": "000007\n"}}
    lists[new] = {"train": "2008_000008  1\n2008_000015 -1\n", "val": "2011_000003\n"}
    for folder, named in lists.items():
        for name, text in named.items():
            (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    return tmp_path


def module(place: Path, **options: Any) -> DetectionDataModule:
    plain: dict[str, Any] = {"masks": "none", "num_workers": 0, "train_transforms": [], "eval_transforms": []}
    return DetectionDataModule("voc", str(place), **{**plain, **options})


def test_voc_s_own_folder_is_read_as_the_paper_splits_it(devkit: Path) -> None:
    for place in (devkit, devkit / "VOCdevkit"):
        data = module(place)
        train, val = data.samples("train"), data.samples("val")
        assert data.class_names == list(CLASSES)
        assert [Path(train.source.path(n)).stem for n in train.indices] == ["000005", "000007", "2008_000008"]
        assert len(val) == 1
    batch = train.__getitems__([0, 2])
    first, second = batch["target"]
    assert first["boxes"].tolist() == [[0, 0, 60, 40], [10, 5, 20, 25]]  # pixels from 1, the last one included
    assert first["labels"].tolist() == [CLASSES.index("dog"), CLASSES.index("person")]
    np.testing.assert_allclose(second["boxes"], [[4.7, 7, 20, 30.2]], rtol=1e-6)
    truth = val[0]["target"][0]
    assert truth["difficult"].tolist() == [1, 0]
    assert truth["image_id"] == 2011000003
    assert data.samples("test")[0]["target"][0]["image_id"] == 2011000003


def test_other_lists_and_other_folders(devkit: Path) -> None:
    other = module(devkit, options={"train": ["voc_2012_val"], "test": "voc_2007_test"})
    assert [len(other.samples(split)) for split in ("train", "test", "val")] == [1, 1, 1]
    own = devkit / "mine"
    picture(own, "b x", (30, 30), [("zebra", [1, 1, 9, 9], 0), ("ant", [40, 1, 50, 9], 0)])
    picture(own, "a", (30, 30), [("ant", [1, 1, 9, 9], 0)])
    for name, text in (("train", "a\n"), ("val", "a\n")):
        (own / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    data = DetectionDataModule(str(own), masks="none", num_workers=0)
    assert (data.class_names, len(data.samples("train"))) == (["ant"], 1)
    year = DetectionDataModule(str(devkit / "VOCdevkit" / "VOC2012"), masks="none", num_workers=0)
    assert (year.num_classes, len(year.samples("train")), len(year.samples("val"))) == (20, 1, 1)
    assert DetectionDataModule("voc", masks="none").num_classes == 20  # the card's, before anybody said where


def test_what_is_wrong_is_one_line(devkit: Path) -> None:
    old = devkit / "VOCdevkit" / "VOC2007"
    xml = old / "Annotations" / "000005.xml"
    good = xml.read_text()
    for text, said in (
        (good.replace("<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', 1), "declares a document type"),
        (good[:80], "is no XML"),
        (good.replace("<xmin>11</xmin>", ""), "the box of person has no number xmin"),
        (good.replace("dog", ""), "object number 0 has no name"),
        (good.replace("<width>60", "<width>0"), "states 40x0 pixels"),
    ):
        xml.write_text(text)
        with pytest.raises(ZooError, match=said):
            read_annotation(xml)
    entity = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "c">]>' + good
    xml.write_bytes(entity.encode("utf-16"))
    with pytest.raises(ZooError, match="declares a document type"):
        read_annotation(xml)
    xml.write_text(good.replace("dog", "dgo"))
    with pytest.raises(ZooError, match="'dgo'; did you mean 'dog'"):
        module(devkit).samples("train")
    xml.write_text(good.replace("<width>60", "<width>61"))
    with pytest.raises(ZooError, match="60x40 pixels, but its XML says 61x40"):
        module(devkit).samples("train")[0]
    xml.write_text(good.replace("<xmin>11</xmin>", "<xmin>90</xmin>").replace("<xmax>20", "<xmax>95"))
    with pytest.warns(UserWarning, match="boxes that show nothing"):
        source = module(devkit).samples("train").source
    assert len(source.labels[0]) == 1
    (old / "JPEGImages" / "000007.jpg").unlink()
    for make, said in (
        (lambda: module(devkit).samples("train"), "no picture '000007'"),
        (lambda: module(devkit, options={"train": ["voc_2007_trainvla"]}).samples("train"), "did you mean 'trainval'"),
        (lambda: module(devkit, options={"train": ["voc_2010_train"]}), "year of VOC"),
        (lambda: module(devkit, options={"annotations": "x"}), "unknown option of voc 'annotations'"),
        (lambda: find_voc(devkit / "VOCdevkit" / "VOC2007" / "JPEGImages"), "holds no ImageSets/Main"),
    ):
        with pytest.raises(ZooError, match=said):
            make()


def test_a_named_subset_is_the_same_for_every_run() -> None:
    ids = np.random.default_rng(0).permutation(120_000)[:5000]
    some, more = set(ids[subset(ids, "1k")]), set(ids[subset(ids, "3.5k")])
    assert (len(some), len(more)) == (1000, 3500)
    assert some < more
    assert set(np.sort(ids)[subset(np.sort(ids), "1k")]) == some  # whatever the order
    assert set(ids[subset(ids, "1000@1")]) != some == set(ids[subset(ids, "1k@0")])
    for wrong in ("10kk", "0", "1.0005k", "6k", "-1"):
        with pytest.raises(ZooError, match="subset"):
            subset(ids, wrong)


def test_the_data_module_trains_on_a_subset() -> None:
    found = []
    for seed in (0, 1):
        data = DetectionDataModule("shapes", train_samples=50, subset="10", seed=seed, num_workers=0)
        found.append(data.samples("train").indices)
        assert len(data.samples("val")) > 50
    assert len(found[0]) == 10
    torch.testing.assert_close(*map(torch.from_numpy, found))
