"""Panoptic truth: COCO's panoptic format, Cityscapes as it is downloaded, drawn scenes; labels in transforms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.detection import DetectionDataModule
from zoo.data.panoptic import PanopticClasses, coco_panoptic, colours_of, find_panoptic, ids_of
from zoo.data.scenes import ColorJitter, FixedSizeCrop, RandomCrop, RandomFlip, ResizeShortestEdge, Scene
from zoo.data.shapes import PANOPTIC_BASE, render
from zoo.errors import ZooError

CATEGORIES = [
    {"id": 2, "name": "cat", "isthing": 1},
    {"id": 5, "name": "sky", "isthing": 0},
    {"id": 7, "name": "dog", "isthing": 1},
    {"id": 9, "name": "sea", "isthing": 0},
]
SKY, CAT, DOGS = 1000, 70000, 9000001  # ids that fill one, two and three bytes


def panoptic_set(folder: Path, instances: bool = False, count: int = 3) -> Path:
    """Sky above, a cat and a crowd of dogs below, and a strip of nothing; the last picture is sky alone."""
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations" / "panoptic_val2017").mkdir(parents=True)
    images, annotations, objects = [], [], []
    for n in range(count):
        ids = np.full((20, 30), SKY)
        segments = [{"id": SKY, "category_id": 5, "area": 600, "iscrowd": 0, "bbox": [0, 0, 30, 20]}]
        if n < count - 1:
            ids[10:, :15], ids[10:, 15:25], ids[10:, 25:] = CAT, DOGS, 0
            segments[0] |= {"area": 300, "bbox": [0, 0, 30, 10]}
            segments.append({"id": CAT, "category_id": 2, "area": 150, "iscrowd": 0, "bbox": [0, 10, 15, 10]})
            segments.append({"id": DOGS, "category_id": 7, "area": 100, "iscrowd": 1, "bbox": [15, 10, 10, 10]})
            outline = [[0, 10, 15, 10, 15, 20, 0, 20]]
            objects.append({"id": n + 1, "image_id": n, "category_id": 2, "bbox": [0, 10, 15, 10], "area": 150})
            objects[-1] |= {"iscrowd": 0, "segmentation": outline}
        Image.fromarray(colours_of(ids)).save(folder / "annotations" / "panoptic_val2017" / f"{n}.png")
        Image.new("RGB", (30, 20), (9 * n, 50, 90)).save(folder / "val2017" / f"{n}.jpg")
        images.append({"id": n, "file_name": f"{n}.jpg", "height": 20, "width": 30})
        annotations.append({"image_id": n, "file_name": f"{n}.png", "segments_info": segments})
    whole = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "annotations" / "panoptic_val2017.json").write_text(json.dumps(whole))
    if instances:
        things = [c for c in CATEGORIES if c["isthing"]]
        found = {"images": images, "annotations": objects, "categories": things}
        (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(found))
    return folder


def data(folder: Path, **options: Any) -> DetectionDataModule:
    given = {"semantic": "separated", "num_workers": 0, "train_transforms": [], "eval_transforms": []}
    return DetectionDataModule(str(folder), **{**given, **options})


def test_coco_s_panoptic_format(tmp_path: Path) -> None:
    module = data(panoptic_set(tmp_path))
    assert module.class_names == ["cat", "dog"]
    assert module.panoptic is not None
    assert module.panoptic.semantic_names == ["things", "sky", "sea"]
    assert module.panoptic.thing_labels == (0,)
    truth = module.samples("val").__getitems__([0, 2])["target"]
    assert truth[0]["panoptic"]["segments"].tolist() == [
        [SKY, 0, 1, 0, 300], [CAT, 1, 0, 0, 150], [DOGS, 1, 1, 1, 100]
    ]  # fmt: skip
    assert truth[0]["semantic"][:, 29].tolist() == [1] * 10 + [255] * 10
    assert truth[0]["semantic"][15, :25].tolist() == [0] * 25
    assert truth[0]["iscrowd"].tolist() == [0, 1]
    assert truth[1]["panoptic"]["ids"].unique().tolist() == [SKY]
    trained = module.samples("val", training=True)
    assert len(trained) == 3  # pictures without objects have stuff
    target = trained.__getitems__([0])["target"][0]
    assert target["labels"].tolist() == [0]
    assert target["masks"][0].nonzero().amin(0).tolist() == [10, 0]
    assert target["semantic"].equal(truth[0]["semantic"])
    everything = data(tmp_path, semantic="all").panoptic
    assert everything is not None
    assert everything.semantic_names == ["cat", "sky", "dog", "sea"]
    assert everything.thing_labels == (0, 2)
    assert everything.labels().tolist() == [0, 1, 1, 3]


def test_polygons_of_the_instances_beside_it(tmp_path: Path) -> None:
    module = data(panoptic_set(tmp_path, instances=True), masks="polygon")
    target = module.samples("val", training=True).__getitems__([1])["target"][0]
    assert target["polygons"][0][0].tolist() == [0, 10, 15, 10, 15, 20, 0, 20]
    assert len(module.samples("val", training=True)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": [{"id": 2, "name": "cat"}]}, "lacks id, name or isthing"),
        ({"annotations": []}, "names no PNG"),
        ({"annotations": [{"image_id": 0, "file_name": "0.png"}]}, "no segments_info"),
        ({"annotations": [{"image_id": 0, "file_name": "../0.png", "segments_info": []}]}, "names no PNG"),
        (
            {"annotations": [{"image_id": n, "file_name": "0.png", "segments_info": [{"id": 3}]} for n in range(3)]},
            "without an id",
        ),
        ({"annotations": [{"image_id": 0, "file_name": "0.png", "segments_info": []}]}, "image 1 has no annotation"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = panoptic_set(tmp_path) / "annotations" / "panoptic_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ZooError, match=message):
        data(tmp_path)


def test_maps_of_another_size_are_named(tmp_path: Path) -> None:
    folder = panoptic_set(tmp_path)
    Image.new("RGB", (10, 20)).save(folder / "annotations" / "panoptic_val2017" / "1.png")
    with pytest.raises(ZooError, match="is 10x20 pixels"):
        data(folder).samples("val").__getitems__([1])


def test_a_written_set_is_read_again(tmp_path: Path) -> None:
    classes = PanopticClasses(("cat", "sky", "dog", "sea"), (True, False, True, False), "separated", (2, 5, 7, 9))
    assert PanopticClasses.of(classes.facts()) == classes
    with pytest.raises(ZooError, match="no names of panoptic"):
        PanopticClasses.of({"names": [3]})
    rows = [{"id": 1, "thing": True, "index": 1, "area": 5}, {"id": 2, "thing": False, "index": 2, "area": 7}]
    result = {"image": "x/17.jpg", "height": 3, "width": 4, "map": "out/17.png", "segments": rows}
    written = coco_panoptic([result, {"image": "y.jpg", "error": "no"}], classes)
    assert [one["category_id"] for one in written["annotations"][0]["segments_info"]] == [7, 9]
    assert (written["images"][0]["id"], written["annotations"][0]["file_name"]) == (17, "17.png")
    ids = np.array([[0, 300], [70000, 9000001]])
    assert (ids_of(colours_of(ids).transpose(2, 0, 1)) == ids).all()


def test_cityscapes_as_it_is_downloaded(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for kind in ("leftImg8bit", "gtFine"):
            (tmp_path / kind / part / "ulm").mkdir(parents=True)
        Image.new("RGB", (32, 16)).save(tmp_path / "leftImg8bit" / part / "ulm" / "ulm_0_leftImg8bit.png")
        ids = np.full((16, 32), 7, np.int32)  # road
        ids[:4], ids[4:8, :10], ids[4:8, 10:20], ids[12:] = 23, 26001, 26, 3  # sky, a car, cars, not evaluated
        Image.fromarray(ids).convert("I;16").save(tmp_path / "gtFine" / part / "ulm" / "ulm_0_gtFine_instanceIds.png")
    module = data(tmp_path, semantic="all")
    assert module.class_names == ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    truth = module.samples("val").__getitems__([0])["target"][0]
    assert truth["panoptic"]["segments"].tolist() == [
        [7, 0, 0, 0, 32 * 8 - 80], [23, 0, 10, 0, 128], [26, 1, 2, 1, 40], [26001, 1, 2, 0, 40]
    ]  # fmt: skip
    assert truth["semantic"].unique().tolist() == [0, 10, 13, 255]
    target = module.samples("train").__getitems__([0])["target"][0]
    assert target["boxes"].tolist() == [[0, 4, 10, 8]]
    assert module.panoptic is not None
    assert module.panoptic.thing_labels == tuple(range(11, 19))
    assert data(tmp_path, semantic="none", masks="bitmask").num_classes == 8
    (tmp_path / "gtFine" / "val" / "ulm" / "ulm_0_gtFine_instanceIds.png").unlink()
    with pytest.raises(ZooError, match=r"cannot read .*instanceIds"):
        data(tmp_path, semantic="all").samples("val").__getitems__([0])


def test_drawn_scenes_have_regions(tmp_path: Path) -> None:
    plain, parted = (render(0, "train", range(6), 48, ("image", "panoptic", "masks"), regions=r) for r in (1, 3))
    assert not plain["image"].equal(parted["image"])
    assert plain["masks"].equal(parted["masks"])  # the same objects
    for one, kinds in ((plain, {1}), (parted, {2, 3})):
        ground = [(p[p % PANOPTIC_BASE == 0] // PANOPTIC_BASE).unique() for p in one["panoptic"]]
        assert {len(g) for g in ground} <= kinds
        assert all(((g >= 10) & (g < 15)).all() for g in ground)
    with pytest.raises(ZooError, match="regions"):
        render(0, "train", [0], 48, regions=6)
    module = DetectionDataModule("shapes", semantic="separated", options={"size": 48, "regions": 3, "max_objects": 6})
    batch = module.samples("val").__getitems__(list(range(8)))
    for target in batch["target"]:
        ids, segments = target["panoptic"]["ids"], target["panoptic"]["segments"]
        assert segments[:, 4].sum() == (ids > 0).sum()
        assert ((ids == 0) == (target["semantic"] == 255)).all()
        assert len(target["labels"]) == int(segments[:, 1].sum())


def test_labels_move_with_the_picture() -> None:
    labels = np.arange(60 * 80).reshape(60, 80) % 200
    image = torch.from_numpy(labels.astype(np.uint8))[None].repeat(3, 1, 1)
    scene = Scene(image, np.zeros((0, 4)), np.zeros(0, np.int64), semantic=labels.astype(np.uint8))
    for transform in (RandomFlip(1.0), RandomCrop((40, 50)), FixedSizeCrop(64, recompute_boxes=False)):
        moved = transform(scene)
        height, width = (min(a, b) for a, b in zip(moved.size, scene.size, strict=True))
        inside = moved.semantic[:height, :width]
        assert (inside[inside < 255] == moved.image[0, :height, :width].numpy()[inside < 255]).all()
        assert (moved.semantic[60:] == 255).all()
    assert ResizeShortestEdge([30])(scene).semantic.shape == (30, 40)
    jittered = ColorJitter()(scene)
    assert jittered.semantic is scene.semantic
    assert jittered.image.shape == scene.image.shape


def test_no_label_fills_a_crop() -> None:
    labels = np.zeros((40, 400), np.uint8)
    labels[:, ::40] = 1
    labels[:, 200:] = 2
    image = torch.zeros(3, 40, 400, dtype=torch.uint8)
    scene = Scene(image, np.zeros((0, 4)), np.zeros(0, np.int64), semantic=labels)
    shares = []
    for seed in range(30):
        torch.manual_seed(seed)
        counts = np.bincount(RandomCrop((40, 100), 0.8)(scene).semantic.ravel())
        shares.append(counts.max() / counts.sum())
    assert sum(share < 0.8 for share in shares) > 24  # of ten windows one is so, nearly always
    with pytest.raises(ZooError, match="max_share wants labels"):
        RandomCrop((40, 100), 0.8)(Scene(image, np.zeros((0, 4)), np.zeros(0, np.int64)))


def test_the_sample_of_coco(shared: Path) -> None:
    layout = find_panoptic(shared / "data" / "coco_sample")
    source, _ = layout.open("predict")
    record = source.read(0)
    assert record.panoptic is not None
    ids, areas = np.unique(record.panoptic.ids, return_counts=True)
    stated = dict(record.panoptic.segments[:, [0, 3]].tolist())
    assert stated == {n: a for n, a in zip(ids.tolist(), areas.tolist(), strict=True) if n}
