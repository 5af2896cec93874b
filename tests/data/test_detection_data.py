"""Detection data: COCO-format sets on disk, transforms of pictures with their objects, samplers, batches."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from zoo.data.coco import CocoSource, find_coco, mirror_order, repeat_factors, to_rle
from zoo.data.detection import DetectionDataModule, Normalise
from zoo.data.loader import EpochSampler, GroupedSampler
from zoo.data.lvis import synset
from zoo.data.scenes import (
    FixedSizeCrop,
    RandomFlip,
    ResizeScale,
    ResizeShortestEdge,
    Scene,
    clip_polygon,
    crop_offset,
    fitted_size,
    rasterise,
    resize_pil,
    shortest_edge_size,
)
from zoo.data.shapes import hash64, render
from zoo.errors import ZooError

SIZES = [(40, 60), (60, 40), (48, 64), (64, 48), (40, 60), (50, 50)]
NAMES = ["nose", "left_eye", "right_eye"]


def content(count: int = 6, first: int = 0) -> dict[str, Any]:
    """A json of COCO's format: category ids with gaps; per picture a polygon, an ellipse's run lengths as a crowd, and
    on every second a second polygon of another class. Picture 5 holds a crowd alone."""
    images, annotations = [], []
    for n in range(first, first + count):
        height, width = SIZES[n % len(SIZES)]
        images.append({"id": 100 - n, "file_name": f"{n:03}.jpg", "height": height, "width": width})
        mask = np.zeros((height, width), np.uint8)
        mask[5:15, 20:35] = 1
        rle = coco_mask.encode(np.asfortranarray(mask))
        crowd = {"counts": rle["counts"].decode(), "size": rle["size"]}
        annotations.append(_annotation(n, 7, crowd, [20, 5, 15, 10], iscrowd=1))
        if n % 6 != 5:
            annotations.append(_annotation(n, 3, [[4, 4, 14.5, 4, 14.5, 20, 4, 20]], [4, 4, 10.5, 16]))
        if n % 2 == 0:
            annotations.append(_annotation(n, 7, [[20, 10, 30, 30, 10, 30], [1, 1, 3, 1, 3, 3]], [1, 1, 29, 29]))
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1
    categories = [
        {"id": 7, "name": "cat", "supercategory": "animal"},
        {"id": 3, "name": "person", "keypoints": NAMES, "skeleton": [[1, 2]]},
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(n: int, category: int, segmentation: Any, box: list[float], iscrowd: int = 0) -> dict[str, Any]:
    area = box[2] * box[3] / 2
    points = [5, 6, 2, 8, 6, 1, 12, 7, 2] if category == 3 else [0] * 9
    return {"image_id": 100 - n, "category_id": category, "segmentation": segmentation, "bbox": box, "area": area,
            "iscrowd": iscrowd, "keypoints": points, "num_keypoints": 3 * (category == 3)}  # fmt: skip


def write_set(folder: Path, what: dict[str, Any], file: str, images: str) -> Path:
    """The json and its pictures, in the true formats."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(what))
    (folder / images).mkdir(parents=True, exist_ok=True)
    for image in what["images"]:
        size = (image["height"], image["width"])
        drawn = render(0, "test", [image["id"]], 64, ("image",))["image"][0]
        pixels = resize_pil(drawn, *size).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / images / image["file_name"], quality=92)
    return folder


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """COCO's own layout, six pictures to train on and three to validate."""
    write_set(tmp_path, content(), "annotations/instances_train2017.json", "train2017")
    return write_set(tmp_path, content(3, first=6), "annotations/instances_val2017.json", "val2017")


def module(place: Path, **options: Any) -> DetectionDataModule:
    given = {"train_transforms": [], "eval_transforms": [], "num_workers": 0, "batch_size": 1, **options}
    return DetectionDataModule(str(place), **given)


# ---------------------------------------------------------------------------------------------------- sets on disk


def test_layouts_are_found(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def parts(place: Path, **words: Any) -> dict[str, str]:
        layout = find_coco(place, **words)
        for part in layout.parts:
            assert len(layout.open("predict" if part == "all" else part)[0]) > 0
        return {part: str(file.relative_to(place)) for part, file in layout.parts.items()}

    assert parts(coco) == {
        "train": "annotations/instances_train2017.json",
        "val": "annotations/instances_val2017.json",
    }
    roboflow = tmp_path_factory.mktemp("roboflow")
    for split in ("train", "valid", "test"):
        write_set(roboflow, content(), f"{split}/_annotations.coco.json", split)
    assert set(parts(roboflow)) == {"train", "val", "test"}
    flat = write_set(tmp_path_factory.mktemp("flat"), content(), "mine.json", "images")
    assert parts(flat) == {"all": "mine.json"}
    (flat / "captions.json").write_text("{}")
    (flat / "person_keypoints.json").write_text((flat / "mine.json").read_text())
    with pytest.raises(ZooError, match=r"several annotations of one split: mine.json, person_keypoints.json"):
        find_coco(flat)
    assert parts(flat, annotations="keypoints") == {"all": "person_keypoints.json"}
    # A set of one part holds back every tenth picture, here the last; all are predicted.
    layout = find_coco(flat / "mine.json")
    assert [layout.open(split)[1].tolist() for split in ("train", "val", "predict")] == [
        [0, 1, 2, 3, 4],
        [5],
        [0, 1, 2, 3, 4, 5],
    ]


def test_lvis_names_no_files(tmp_path: Path) -> None:
    what = content()
    write_set(tmp_path, what, "lvis_v1_train.json", "train2017")
    for image in what["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
    (tmp_path / "lvis_v1_train.json").write_text(json.dumps(what))
    (tmp_path / "instances_train2017.json").write_text(json.dumps(content(2)))
    data = DetectionDataModule("lvis_v1", str(tmp_path), num_workers=0)
    assert len(data.samples("predict")) == 6
    assert Path(data.samples("predict")[0]["path"][0]).parent.name == "train2017"


def lvis(count: int, first: int, version: str, folder: str) -> dict[str, Any]:
    """A json of LVIS's format: v0.5 names files of COCO 2014, v1 none."""
    what = content(count, first)
    for image in what["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/{folder}/{image['file_name']}"
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [9, 3], [7]
        image["file_name"] = f"COCO_train2014_{image['file_name']}"
        if version == "v1":
            del image["file_name"]
    what["annotations"] = [a for a in what["annotations"] if not a["iscrowd"]]
    for a in what["annotations"]:
        for name in ("iscrowd", "keypoints", "num_keypoints"):
            del a[name]
    named = (("cat", "cat.n.01", "f"), ("person", "person.n.01", "c"), ("sofa", "sofa.n.01", "r"))
    what["categories"] = [
        {"id": k, "name": name, "synset": synset, "frequency": often, "synonyms": [name], "def": "", "image_count": 1,
         "instance_count": 1}
        for k, (name, synset, often) in zip((7, 3, 9), named, strict=True)
    ]  # fmt: skip
    return what


@pytest.mark.parametrize("version", ["v0.5", "v1"])
def test_lvis_says_what_is_known_on_a_picture(tmp_path: Path, version: str) -> None:
    for file, folder, first in (("train", "train2017", 0), ("val", "val2017", 6)):
        write_set(tmp_path, content(4, first), "instances.json", folder)
        what = json.dumps(lvis(4, first, version, folder))
        (tmp_path / f"lvis_{version}_{file}.json").write_text(what)
    data = DetectionDataModule(f"lvis_{version}", str(tmp_path), num_workers=0, eval_transforms=[])
    assert data.class_names == ["person", "cat", "sofa"]
    assert data.class_image_counts().tolist() == [4, 2, 0]  # type: ignore[union-attr]
    batch = data.samples("val")[0]
    assert Path(batch["path"][0]).parent.name == "val2017"
    target = batch["target"][0]
    known = {name: target[name].tolist() for name in ("labels", "neg_labels", "not_exhaustive_labels", "frequency")}
    assert known == {"labels": [0], "neg_labels": [2, 0], "not_exhaustive_labels": [1], "frequency": [1]}
    assert "neg_labels" not in data.samples("train")[0]["target"][0]  # nothing to train on
    coco = DetectionDataModule(f"lvis_{version}", str(tmp_path), num_workers=0, options={"coco_classes": True})
    assert coco.class_names[15] == "cat"
    assert coco.num_classes == 80
    target = coco.samples("val")[1]["target"][0]
    known = {name: target[name].tolist() for name in ("labels", "neg_labels", "not_exhaustive_labels", "frequency")}
    assert known == {"labels": [0, 15], "neg_labels": [57, 0], "not_exhaustive_labels": [15], "frequency": [1, 2]}
    write_set(tmp_path, content(), "instances_train2017.json", "train2017")
    with pytest.raises(ZooError, match="synsets"):
        DetectionDataModule("coco", str(tmp_path), options={"coco_classes": True})


def test_every_class_of_coco_has_a_synset() -> None:
    from zoo.catalog import data_card

    synsets = [synset(name) for name in data_card("coco").class_names or []]
    assert len(set(synsets)) == 80
    assert all(re.fullmatch(r"[a-z_]+\.n\.0\d", s) for s in synsets)


def test_lvis_without_its_folder_is_known_by_its_card() -> None:
    assert (DetectionDataModule("lvis_v0.5").num_classes, DetectionDataModule("lvis_v1").num_classes) == (1230, 1203)
    assert DetectionDataModule("lvis_v0.5", options={"coco_classes": True}).num_classes == 80


def test_a_batch_to_train_on(coco: Path) -> None:
    data = module(coco, keypoints=True)
    assert (data.num_classes, data.class_names, data.keypoint_names) == (2, ["person", "cat"], NAMES)
    samples = data.samples("train")
    assert len(samples) == 5  # the picture with a crowd alone is left out
    batch = samples.__getitems__([4, 3])  # pictures 0 and 1: ids count down
    assert batch["image"].shape == (2, 3, 64, 64)
    assert batch["size"].tolist() == batch["original_size"].tolist() == [[40, 60], [60, 40]]
    assert batch["image"][0, :, 40:].abs().sum() == batch["image"][1, :, :, 40:].abs().sum() == 0
    first, second = batch["target"]
    assert first["labels"].tolist() == [0, 1]
    assert second["labels"].tolist() == [0]
    assert first["boxes"].tolist() == [[4, 4, 14.5, 20], [1, 1, 30, 30]]
    assert first["masks"].shape == (2, 40, 60)
    assert first["masks"].dtype == torch.bool
    assert first["keypoints"][0].tolist() == [[5.5, 6.5, 2], [8.5, 6.5, 1], [12.5, 7.5, 2]]
    assert first["keypoints"][1].abs().sum() == 0
    for rows, target in zip(content()["annotations"][1:3], first["masks"], strict=True):
        expected = coco_mask.decode(to_rle(rows["segmentation"], 40, 60))
        assert np.array_equal(target.numpy(), expected.astype(bool))
    assert int(first["image_id"]) == 100


def test_polygons_and_no_masks(coco: Path) -> None:
    target = module(coco, masks="polygon").samples("train")[4]["target"][0]
    assert [[ring.tolist() for ring in rings] for rings in target["polygons"]] == [
        [[4, 4, 14.5, 4, 14.5, 20, 4, 20]],
        [[20, 10, 30, 30, 10, 30], [1, 1, 3, 1, 3, 3]],
    ]
    assert "masks" not in target
    assert {"masks", "polygons"}.isdisjoint(module(coco, masks="none").samples("train")[4]["target"][0])


def test_the_truth_of_evaluation_is_the_file_s(coco: Path) -> None:
    data = module(coco, eval_transforms=[ResizeShortestEdge([80])], keypoints=True)
    assert len(data.samples("val")) == len(data.samples("test")) == 3
    batch = next(iter(data.val_dataloader()))
    assert batch["size"].tolist() == [[80, 107]]  # picture 8 comes first
    assert batch["original_size"].tolist() == [[48, 64]]
    truth = batch["target"][0]
    assert truth["iscrowd"].tolist() == [1, 0, 0]
    assert truth["labels"].tolist() == [1, 0, 1]
    assert truth["boxes"].dtype == torch.float64
    assert truth["boxes"].tolist() == [[20, 5, 35, 15], [4, 4, 14.5, 20], [1, 1, 30, 30]]
    assert truth["area"].tolist() == [75, 84, 420.5]
    assert int(coco_mask.area(truth["masks"][0])) == 150
    assert truth["keypoints"][1, 0].tolist() == [5.5, 6.5, 2]


def test_channels_and_statistics() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 3)
    batch = Normalise([1, 2, 3], [1, 2, 4], "bgr")([image], 4)
    assert batch.shape == (1, 3, 4, 4)
    assert batch[0, :, 0, 0].tolist() == [29, 9, 1.75]
    assert batch[0, :, 2:].abs().sum() == batch[0, :, :, 3:].abs().sum() == 0
    data = DetectionDataModule(channels="bgr")
    assert data.mean == (103.53, 116.28, 123.675)


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    what = content(1)
    write_set(tmp_path, what, "mine.json", "images")
    file = tmp_path / "images" / "000.jpg"
    with Image.open(file) as upright:
        lying = upright.rotate(90, expand=True)  # 40x60, to be turned by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(file, exif=exif, quality=95)
    assert module(tmp_path).samples("predict")[0]["original_size"].tolist() == [[40, 60]]


# ------------------------------------------------------------------------------------------------------ transforms


def test_sizes_and_offsets() -> None:
    assert shortest_edge_size(480, 640, 800, 1333) == (800, 1067)
    assert shortest_edge_size(640, 480, 800, 1333) == (1067, 800)
    assert shortest_edge_size(427, 1000, 800, 1333) == (569, 1333)
    assert shortest_edge_size(500, 500, 800) == (800, 800)
    assert fitted_size(480, 640, (1024, 1024), 1.0) == (768, 1024)
    assert fitted_size(480, 640, (1024, 1024), 0.1) == (77, 102)
    assert crop_offset(1500, 900, (1024, 1024), 0.5) == (238, 0)
    assert crop_offset(1500, 2048, (1024, 1024), 0.999) == (476, 1023)


@pytest.mark.parametrize("size", [(80, 120), (30, 41), (40, 60)])
def test_resizing_is_pillow_s(size: tuple[int, int]) -> None:
    image = render(0, "train", [3], 60, ("image",))["image"][0][:, :40]
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    assert np.array_equal(resize_pil(image, *size).permute(1, 2, 0).numpy(), np.array(expected))


def _scene(index: int = 0) -> Scene:
    """A drawn scene with exact boxes, masks and keypoints."""
    drawn = render(1, "train", [index], 64, ("image", "boxes", "masks", "shape", "keypoints"), min_objects=4)
    kept = (drawn["shape"][0] >= 0) & drawn["masks"][0].flatten(1).any(1)
    masks = list(drawn["masks"][0][kept].to(torch.uint8).numpy())
    boxes, points = (drawn[name][0][kept].double().numpy() for name in ("boxes", "keypoints"))
    order = mirror_order(["centre", "top", "right", "bottom", "left"])
    return Scene(drawn["image"][0], boxes, np.zeros(len(boxes), np.int64), masks, points, order)


def test_a_mirror_moves_everything_and_swaps_left_and_right() -> None:
    scene = _scene()
    flipped = scene.flipped()
    assert torch.equal(flipped.image, scene.image.flip(-1))
    assert np.array_equal(flipped.with_boxes_of_segments().boxes, flipped.boxes)
    assert flipped.keypoints is not None
    assert scene.keypoints is not None
    assert np.array_equal(flipped.keypoints[:, 2, 0], 64 - scene.keypoints[:, 4, 0])  # its right was the left
    assert np.array_equal(flipped.keypoints[:, 0, 1], scene.keypoints[:, 0, 1])
    twice = flipped.flipped()
    assert torch.equal(twice.image, scene.image)
    assert np.array_equal(twice.keypoints, scene.keypoints)
    assert np.array_equal(twice.boxes, scene.boxes)


@pytest.mark.parametrize("seed", range(4))
def test_objects_stay_on_their_pixels(seed: int) -> None:
    """After any chain, boxes recomputed from masks agree with moved boxes as far as nothing was cut off."""
    torch.manual_seed(seed)
    scene = _scene(seed)
    scene = RandomFlip()(ResizeScale(96, 0.8, 1.2)(scene))
    tight = scene.with_boxes_of_segments().boxes
    assert np.abs(tight - scene.boxes).max() <= 1.5  # masks take the nearest pixel
    cropped, _ = FixedSizeCrop(64)(scene).finished()
    assert cropped.size == (64, 64)
    assert cropped.segments is not None
    assert all(mask.shape == (64, 64) and mask.any() for mask in cropped.segments)  # type: ignore[union-attr]
    assert (cropped.boxes >= 0).all()
    assert (cropped.boxes <= 64).all()
    assert cropped.keypoints is not None
    seen = cropped.keypoints[..., 2] > 0
    assert ((cropped.keypoints[seen] >= 0) & (cropped.keypoints[seen] <= 64)).all()
    assert (cropped.keypoints[~seen] == 0).all()


def test_polygons_and_masks_move_alike() -> None:
    ring = np.array([[3.0, 5], [50, 9], [41, 38], [12, 30]])
    mask = rasterise([[ring]], 48, 64)[0].astype(np.uint8)
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    box = np.array([[3.0, 5, 50, 38]])
    for segment in ([ring], mask):
        scene = Scene(image, box, np.zeros(1, np.int64), [segment])
        moved = scene.resized(96, 128).flipped().cropped(16, 40, 64, 64)
        drawn = rasterise(moved.segments, 64, 64)[0]  # type: ignore[arg-type]
        if isinstance(segment, list):
            expected = drawn
            extent = moved.with_boxes_of_segments().boxes[0]
    assert (expected ^ drawn).mean() < 0.03
    rows, columns = expected.nonzero()
    tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(extent - tight).max() <= 1


def test_rasterising_a_window_is_rasterising_the_picture() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        rings = [random.uniform(-10, 70, (random.integers(3, 9), 2)) for _ in range(random.integers(1, 3))]
        expected = coco_mask.decode(to_rle([r.reshape(-1).tolist() for r in rings], 50, 60))
        assert np.array_equal(rasterise([rings], 50, 60)[0], expected.astype(bool))


CUTS: list[tuple[list[list[float]], list[list[list[float]]]]] = [
    ([[1, 1], [2, 1], [2, 3]], [[[1, 1], [2, 3], [2, 1]]]),  # inside: as it is
    ([[-5, -5], [5, -5], [5, 5], [-5, 5]], [[[0, 0], [0, 5], [5, 5], [5, 0]]]),
    ([[0, 0], [20, 0], [0, 20]], [[[0, 0], [0, 10], [10, 10], [10, 0]]]),
    ([[95, 95], [105, 95], [105, 105]], []),
    ([[-4, 2], [0, 5], [-4, 8]], []),  # touches the border
    ([[3, 3], [6, 6], [9, 9]], []),  # a line
    # Two teeth of a comb become two polygons, also when the back of the comb goes round a corner.
    ([[-3, 1], [4, 1], [4, 2], [-1, 2], [-1, 6], [4, 6], [4, 7], [-3, 7]],
     [[[0, 1], [0, 2], [4, 2], [4, 1]], [[0, 6], [0, 7], [4, 7], [4, 6]]]),
    ([[-2, -2], [9, -2], [9, 3], [8, 3], [8, -1], [-1, -1], [-1, 8], [3, 8], [3, 9], [-2, 9]],
     [[[0, 8], [0, 9], [3, 9], [3, 8]], [[8, 0], [8, 3], [9, 3], [9, 0]]]),
]  # fmt: skip


def _canonical(parts: list[np.ndarray]) -> list[list[list[float]]]:
    """Polygons from their first corner on, (x, y) in order, towards the larger of its neighbours' y; sorted."""
    made = []
    for part in parts:
        ring = np.roll(part, -int(np.lexsort(part.T[::-1])[0]), 0)
        made.append((ring if ring[1, 1] >= ring[-1, 1] else np.roll(ring[::-1], 1, 0)).tolist())
    return sorted(made)


@pytest.mark.parametrize(("polygon", "parts"), CUTS)
def test_polygons_are_cut_at_the_window_of_a_crop(polygon: list[list[float]], parts: list[list[list[float]]]) -> None:
    """As detectron2's crop cuts them (shapely gives the same): a part to each polygon, none of a line or a touch."""
    assert _canonical(clip_polygon(np.array(polygon, float), 10, 10)) == parts
    moved = np.array(polygon, float) + np.array([7, 3])
    scene = Scene(torch.zeros(3, 40, 50, dtype=torch.uint8), np.array([[0.0, 0, 50, 40]]), np.zeros(1, int), [[moved]])
    scene = scene.cropped(3, 7, 10, 10).with_boxes_of_segments()
    assert scene.segments is not None
    assert _canonical(list(scene.segments[0])) == parts
    points = np.concatenate(parts) if parts else np.zeros((1, 2))
    assert scene.boxes.tolist() == [[*points.min(0), *points.max(0)]]
    drawn = [rasterise(some, 10, 10)[0] for some in (scene.segments, [[np.array(polygon, float)]])]
    assert (drawn[0] ^ drawn[1]).sum() <= 1
    finished, kept = scene.finished()
    assert kept.tolist() == [bool(parts)]
    assert finished.segments == scene.segments[: len(parts[:1])]


def test_large_scale_jitter_cuts_polygons_at_its_window() -> None:
    """The window, not the picture: a polygon that leaves a small picture keeps what lies in the window beside it."""
    ring = np.array([[20.0, 10], [70, 10], [70, 30], [20, 30]])
    picture, box = torch.zeros(3, 40, 60, dtype=torch.uint8), np.array([[20.0, 10, 60, 30]])
    for pad in (True, False):
        scene = FixedSizeCrop(64, pad)(Scene(picture, box, np.zeros(1, np.int64), [[ring]]))
        assert scene.segments is not None
        assert _canonical(list(scene.segments[0])) == [[[20, 10], [20, 30], [64, 30], [64, 10]]]
        assert scene.boxes.tolist() == [[20, 10, 64, 30]]


def test_a_polygon_that_crosses_itself_is_cut_as_coco_draws_it() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        ring = random.integers(-12, 44, (random.integers(4, 9), 2)).astype(float)
        parts = clip_polygon(ring, 32, 32)
        both = [rasterise([rings], 32, 32)[0] for rings in ([ring], parts)]
        assert (both[0] ^ both[1]).mean() < 0.02


def test_what_a_crop_hides_is_gone() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [40, 40, 50, 50], [5, 5, 20, 20]])
    points = np.array([[[5.0, 5, 2], [40, 5, 2]]] * 3)
    scene = Scene(torch.zeros(3, 60, 60, dtype=torch.uint8), boxes, np.arange(3), None, points)
    out, kept = scene.cropped(0, 0, 16, 16).finished()
    assert kept.tolist() == [True, False, True]
    assert out.boxes.tolist() == [[0, 0, 10, 10], [5, 5, 16, 16]]
    assert out.labels.tolist() == [0, 2]
    assert out.keypoints is not None
    assert out.keypoints[0].tolist() == [[5, 5, 2], [0, 0, 0]]
    with pytest.raises(ZooError, match="boxes are to be taken from masks"):
        FixedSizeCrop(16)(scene)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResizeShortestEdge([]), "sizes must be positive"),
        (lambda: ResizeShortestEdge([800, 640], between=True), "two ends of a range"),
        (lambda: ResizeScale(0), "ResizeScale"),
        (lambda: FixedSizeCrop(-1), "FixedSizeCrop"),
        (lambda: RandomFlip(1.5), "prob"),
        (lambda: DetectionDataModule("cocoo"), "did you mean 'coco'"),
        (lambda: DetectionDataModule("coco").train_dataloader(), "set data.data_dir"),
        (lambda: DetectionDataModule(options={"min_visible": 2}).train_dataloader(), "min_visible"),
        (lambda: DetectionDataModule(options={"nois": 0.1}), "did you mean 'noise'"),
        (lambda: DetectionDataModule(masks="rle"), "unknown form of masks"),  # type: ignore[arg-type]
        (lambda: DetectionDataModule(batch_size=0), "batch_size"),
        (lambda: DetectionDataModule(repeat_threshold=0.0), "repeat_threshold"),
        (lambda: DetectionDataModule(pixel_std=[1, 0, 1]), "pixel_std"),
    ],
)
def test_settings_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        make()


# -------------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("world", [1, 2])
def test_global_batches_hold_one_group(world: int) -> None:
    groups = (torch.arange(103) % 3 == 0).long()
    seen: list[int] = []
    batches = []
    for rank in range(world):
        sampler = GroupedSampler(4, groups, seed=5, rank=rank, world=world)
        sampler.set_epoch(2)
        keys = list(sampler)
        assert len(keys) == len(sampler) == 103 // world
        seen += [index for index, _, _ in keys]
        batches.append([{int(groups[index]) for index, *_ in keys[at : at + 4]} for at in range(0, len(keys) - 3, 4)])
    assert len(set(seen)) == len(seen)
    mixed = [step for step, kinds in enumerate(zip(*batches, strict=True)) if len(set.union(*kinds)) > 1]
    assert len(mixed) <= 2
    assert mixed == list(range(len(batches[0]) - len(mixed), len(batches[0])))  # what is left over comes last
    again = GroupedSampler(4, groups, seed=5, world=world)
    again.set_epoch(3)
    assert [index for index, *_ in again] != seen[: len(again)]


def test_rare_classes_come_more_often_and_epochs_are_equally_long() -> None:
    labels = [np.array([0, 0, 1]) if n % 50 == 0 else np.array([0]) for n in range(200)]
    labels[7] = np.array([], dtype=np.int64)
    factors = repeat_factors(labels, 0.1)
    assert factors[0].item() == pytest.approx((0.1 / (4 / 200)) ** 0.5)
    assert factors[1].item() == factors[7].item() == 1
    counts = torch.zeros(200)
    for epoch in range(60):
        sampler = GroupedSampler(2, torch.zeros(200), factors, seed=1)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler) == int(factors.sum())
        assert len(set(keys)) == len(keys)  # a repetition is a key of its own, drawn anew
        counts += torch.bincount(torch.tensor([index for index, *_ in keys]), minlength=200)
    assert counts[0].item() / 60 == pytest.approx(factors[0].item(), abs=0.15)
    assert counts[1].item() / 60 == pytest.approx(1, abs=0.1)
    with pytest.raises(ZooError, match="repeat factors"):
        GroupedSampler(2, torch.zeros(3), torch.tensor([1.0, 0.5, 1.0]))


def test_the_common_sampler_is_as_it_was() -> None:
    """Its order may not move with the code: a resumed run depends on it."""
    sampler = EpochSampler(7, seed=3, repeats=2)
    sampler.set_epoch(1)
    generator = torch.Generator().manual_seed(int(hash64(3, 1)[0]))
    order = torch.randperm(7, generator=generator).tolist()
    assert list(sampler) == [(order[n // 2], 1, n % 2) for n in range(7)]


def test_training_goes_on_where_it_stopped(coco: Path) -> None:
    options: dict[str, Any] = {"train_transforms": [ResizeShortestEdge([32, 48, 64]), RandomFlip()], "batch_size": 2}

    def batches(data: DetectionDataModule, state: Any = None) -> tuple[list[Any], Any]:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        if state is not None:
            loader.load_state_dict(state)
        found, middle = [], None
        for batch in loader:
            found.append((batch["image"].sum().item(), batch["path"]))
            middle = middle or loader.state_dict()
        return found, middle

    whole, state = batches(module(coco, seed=1, **options))
    rest, _ = batches(module(coco, seed=1, **options), state)
    assert len(whole) == 2
    assert rest == whole[1:]
    workers, _ = batches(module(coco, seed=1, **{**options, "num_workers": 1}))
    assert workers == whole
    assert batches(module(coco, seed=2, **options))[0] != whole


def test_data_draw_nothing_of_the_run_s_randomness(coco: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    module(coco, train_transforms=None).samples("train").__getitems__([0, 1])
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------------------------------------------------- shapes


def test_the_embedded_world() -> None:
    options = {"size": 64, "min_visible": 0.5}
    data = DetectionDataModule(batch_size=8, keypoints=True, train_samples=32, options=options, num_workers=0, seed=0)
    assert (data.num_classes, len(data.keypoint_names)) == (10, 5)
    samples = data.samples("train")
    assert len(samples) == 32
    batch = samples.__getitems__(list(range(8)))
    assert batch["image"].shape == (8, 3, 64, 64)
    drawn = render(0, "train", range(8), 64)
    for n, target in enumerate(batch["target"]):
        expected = int(((drawn["visible"][n] >= 0.5) & (drawn["shape"][n] >= 0)).sum())
        assert 1 <= len(target["labels"]) == expected
        assert target["masks"].shape == (expected, 64, 64)
        rows = target["masks"].any(2)
        assert rows.byte().argmax(1).tolist() == target["boxes"][:, 1].int().tolist()
    hidden = (
        DetectionDataModule(options={"size": 64, "min_visible": 0.0}).samples("train").__getitems__(list(range(64)))
    )
    strict = (
        DetectionDataModule(options={"size": 64, "min_visible": 0.9}).samples("train").__getitems__(list(range(64)))
    )
    count = [sum(len(t["labels"]) for t in b["target"]) for b in (hidden, strict)]
    assert count[0] > count[1]
    truth = next(iter(data.val_dataloader()))["target"][0]
    assert truth["masks"][0]["size"] == [64, 64]
    assert truth["area"].tolist() == [int(coco_mask.area(rle)) for rle in truth["masks"]]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w["annotations"][1].update(category_id=99),
            "annotation 2 has category_id 99, which is none of the 2",
        ),
        (lambda w: w["annotations"][1].update(bbox=[1, 2]), r"annotation 2 has no box of four numbers, but \[1, 2\]"),
        (lambda w: w["annotations"][1].pop("bbox"), "annotation 2 has no box"),
        (lambda w: w["images"][0].pop("height"), "no height and width"),
        (lambda w: w["images"][1].update(id=100), "same id"),
        (lambda w: w.pop("categories"), "not in COCO's format: it needs the lists images, annotations, categories"),
        (lambda w: w.update(categories=[]), "no categories"),
        (lambda w: w.update(images=[]), "no images"),
    ],
)
def test_a_damaged_json_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    what = content()
    write_set(tmp_path, what, "mine.json", "images")
    change(what)
    (tmp_path / "mine.json").write_text(json.dumps(what))
    with pytest.raises(ZooError, match=message) as error:
        module(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no json of annotations"):
        module(tmp_path)
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ZooError, match="is no json"):
        module(tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps(content()))
    with pytest.raises(ZooError, match=r"the images of .*mine.json are not found"):
        module(tmp_path)
    write_set(tmp_path, content(), "mine.json", "images")
    (tmp_path / "images" / "002.jpg").unlink()
    (tmp_path / "images" / "005.jpg").unlink()
    with pytest.raises(ZooError, match=r"2 of the 6 images of .*mine.json are not in .*images, first: 005.jpg"):
        module(tmp_path)
    with pytest.raises(ZooError, match="no folder"):
        DetectionDataModule("coco", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ZooError, match=r"no annotations named 'stuff'; it has: mine.json"):
        module(tmp_path, options={"annotations": "stuff"})


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, content(), "mine.json", "images")
    file = tmp_path / "images" / "004.jpg"
    whole = file.read_bytes()
    file.write_bytes(whole[:300])
    samples = module(tmp_path).samples("predict")
    with pytest.raises(ZooError, match=r"cannot read .*004.jpg as an image"):
        [samples[n] for n in range(6)]
    Image.new("RGB", (20, 20)).save(file)
    with pytest.raises(ZooError, match=r"004.jpg is 20x20 pixels, but mine.json says 60x40"):
        [samples[n] for n in range(6)]


def test_odd_annotations_do_no_harm_and_are_counted(tmp_path: Path) -> None:
    what = content()
    what["annotations"][1]["bbox"] = [-30, -30, 50, 50]  # reaches outside
    what["annotations"][2]["segmentation"] = [[1, 1, 2, 2]]  # no outline
    what["annotations"] += [
        {**what["annotations"][1], "id": 90, "bbox": [5, 5, 0, 10]},
        {**what["annotations"][1], "id": 91, "bbox": [70, 70, 5, 5]},
        {**what["annotations"][1], "id": 92, "image_id": 12345},
    ]
    write_set(tmp_path, what, "mine.json", "images")
    samples = module(tmp_path).samples("predict", training=True)
    # The box stands for what is no outline.
    assert samples[len(samples) - 1]["target"][0]["boxes"].tolist() == [[0, 0, 20, 20], [1, 1, 30, 30]]
    source = find_coco(tmp_path).open("predict")[0]
    assert isinstance(source, CocoSource)
    assert dict(source.problems) == {
        "boxes that reach more than a pixel outside their image": 2,
        "boxes without area": 1,
        "outlines of fewer than three points": 1,
        "annotations of images that the json does not have": 1,
    }


def test_transforms_are_plain_modules() -> None:
    """A transform of one's own needs nothing but a forward from scene to scene."""

    class Gray(nn.Module):
        def forward(self, scene: Scene) -> Scene:
            scene.image = scene.image[:1].expand(3, -1, -1)
            return scene

    data = DetectionDataModule(train_transforms=[Gray()], pixel_mean=[0, 0, 0], pixel_std=[1, 1, 1], num_workers=0)
    image = data.samples("train")[0]["image"][0]
    assert torch.equal(image[0], image[2])
