"""Sets as other tools and other people leave them: read rightly, counted, or refused in one line; never a hang."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from pycocotools import mask as coco_mask

from zoo.data.arc import read_tasks
from zoo.data.base import as_batch
from zoo.data.check import check, checked_hash
from zoo.data.coco import find_coco
from zoo.data.detection import DetectionDataModule
from zoo.data.files import whole_number
from zoo.data.image_text import open_pairs
from zoo.data.sources import MOST_PIXELS, decode_image, describe, open_source, read_idx, read_image
from zoo.data.video_reader import PicturesReader, VideoError
from zoo.data.video_sources import open_layout, open_part
from zoo.errors import ZooError
from zoo.metrics.coco import CocoAP
from zoo.ops.masks import run_lengths

RAMP = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def png(value: int = 7) -> bytes:
    return encoded(np.full((8, 8, 3), value, np.uint8))


def write(place: Path, data: bytes | str) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data if isinstance(data, bytes) else data.encode())
    return place


def saved(place: Path, file: str) -> Path:
    """What ``save_to_disk`` writes, beside its data."""
    write(place / "dataset_info.json", "{}")
    write(place / "state.json", json.dumps({"_data_files": [{"filename": file}]}))
    return place


def refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ZooError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (RAMP, "PNG"),
        (RAMP, "TIFF"),
        (RAMP, "PPM"),
        (RAMP.astype(np.int32), "TIFF"),
        ((RAMP >> 8).astype(np.int32), "TIFF"),
        (RAMP.astype(np.int32) << 15, "TIFF"),
        ((RAMP >> 8).astype(np.float32) / 255, "TIFF"),
    ],
)
def test_wide_pictures_are_scaled_by_their_range(pixels: np.ndarray, kind: str) -> None:
    image = decode_image(encoded(pixels, kind))
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert all(channel.equal(torch.from_numpy((RAMP >> 8).astype(np.uint8))) for channel in image)


def test_every_reader_scales_alike(tmp_path: Path) -> None:
    data = encoded(RAMP)
    write(tmp_path / "folder" / "a" / "0.png", data)
    write(tmp_path / "table" / "0.png", data)
    write(tmp_path / "table" / "train.csv", "filepath,title\n0.png,a ramp\n")
    seen = [
        open_source(str(tmp_path / "folder"), "predict")[0]["image"],
        open_pairs(str(tmp_path / "table"), "predict")[0]["image"],
        PicturesReader([tmp_path / "table" / "0.png"]).frames_at([0])[0].permute(2, 0, 1),
        read_image(tmp_path / "table" / "0.png", upright=True),
    ]
    assert all(image.equal(decode_image(data)) for image in seen)


@pytest.mark.parametrize("value", [-0.1, 1.5, 255.0, float("nan"), float("inf")])
def test_floats_outside_0_to_1_are_refused(value: float) -> None:
    data = encoded(np.full((4, 4), value, np.float32), "TIFF")
    refused(lambda: decode_image(data, "a.tif"), r"cannot read a\.tif .*floats from .*0 to 1")


def test_damaged_png_files_do_not_end_the_process() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (12).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    for data in (zlib.compress(bytes([9]) * 37 * 12), b"x\x9cjunk"):
        damaged = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
        refused(lambda damaged=damaged: decode_image(damaged, "a.png"), r"cannot read a\.png as an image")
    frames = [Image.new("RGB", (8, 6), (n, 0, 0)) for n in (200, 100)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(out.getvalue()).shape == (3, 6, 8)  # the first


def test_absurd_sizes_and_special_files_are_refused_at_once(tmp_path: Path) -> None:
    side = (60_000).to_bytes(4, "big")
    for data in (
        png()[:16] + side * 2 + png()[24:],
        encoded(np.zeros((8, 8, 3), np.uint8), "JPEG").replace(b"\x00\x08\x00\x08", b"\xff\xff\xff\xff", 1),
    ):
        refused(lambda data=data: decode_image(data, "a"), f"pixels are more than {MOST_PIXELS:,}")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        refused(lambda name=name: read_image(tmp_path / f"{name}.png"), "pipe, a socket or a device")
        with pytest.raises(VideoError, match="pipe, a socket or a device"):
            PicturesReader([tmp_path / f"{name}.png"]).frames_at([0])
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)
    refused(lambda: read_image(tmp_path / "huge.png"), "1,099,511,627,776 bytes")
    for make, words in (
        (lambda p: os.mkfifo(write(p / "a" / "0.png", png()).with_name("1.png")), "pipe"),
        (lambda p: os.mkfifo(p / "train.parquet"), "pipe"),
        (lambda p: os.mkfifo(p / "x-train.json"), "pipe"),
        (lambda p: os.mkfifo(p / "train.csv"), "pipe"),
        (lambda p: os.mkfifo(p / "0.tar"), "pipe"),
        (lambda p: os.mkfifo(saved(p, "a.arrow") / "a.arrow"), "pipe"),
        (lambda p: saved(p, "/dev/zero"), "its own folder"),
    ):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        make(place)
        refused(lambda place=place: check(str(place)), words)
    for data, words in (
        (b"\0\0\x08\x03" + b"\xff" * 12, "damaged"),
        (b"\0\0\x08\x09", "damaged"),
        (b"\0\0\x0d\x01" + b"\0\0\0\1" * 2, "no idx"),
    ):
        refused(lambda data=data: read_idx(write(tmp_path / "t10k", data)), words)


# ------------------------------------------------------------------------------------------------------ columns on disk


def table(place: Path, part: str = "train", **columns: list[Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place.mkdir(exist_ok=True)
    count = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [png(n) for n in range(count)], **columns}), place / f"{part}.parquet")
    return place


def classed(place: Path, part: str, names: list[str], labels: list[int]) -> None:
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(len(labels))], "label": labels}
    place.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(place / f"{part}.parquet")


def test_class_names_in_another_order_are_mapped_by_name(tmp_path: Path) -> None:
    classed(tmp_path / "a", "train", ["cat", "dog", "owl"], [0, 1, 2, 1])
    classed(tmp_path / "a", "test", ["owl", "cat"], [0, 1, 0])
    source = open_source(str(tmp_path / "a"), "test")
    assert [source.class_names[source[n]["label"]] for n in range(3)] == ["owl", "cat", "owl"]
    classed(tmp_path / "a", "test", ["owl", "bat"], [0, 1, 0])
    refused(lambda: open_source(str(tmp_path / "a"), "test"), "the class 'bat', which split 'train' has not")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [0, -1, 1]}, "1 of 3 labels .* are None or -1, first: number 1"),
        ({"label": [-1, -1, -1]}, "3 of 3 labels"),
        ({"label": [0, None, 1]}, "1 of 3 labels"),
        ({"label": [0.0, float("nan"), 1.0]}, "1 of 3 labels"),
        ({"label": [None, None, None]}, "3 of 3 labels"),
        ({"label": [[0], [0, 1], []]}, "lists"),
        ({"label": [0.5, 1.0, 2.0]}, "not whole numbers"),
        ({"label": ["cat", "dog", "cat"]}, "not whole numbers"),
        ({"target": [0, 1, 0]}, "'target' holds the labels"),
    ],
)
def test_labels_that_are_none_name_the_option(tmp_path: Path, columns: dict[str, list[Any]], words: str) -> None:
    place = str(table(tmp_path / "a", **columns))
    refused(lambda: open_source(place, "train"), rf"{words}.*data\.options\.label_column")
    plain = open_source(place, "predict", label_column=None)
    assert (len(plain), plain[1]["label"], describe(place, label_column=None).num_classes) == (3, -1, 0)


def test_another_column_and_a_split_without_labels(tmp_path: Path) -> None:
    place = str(table(tmp_path / "a", target=[0, 2, 0]))
    assert describe(place, label_column="target").num_classes == 3
    table(tmp_path / "a", "test", other=[1, 2, 3])
    refused(lambda: open_source(place, "test", label_column="target"), "split 'test' has no column 'target'")
    assert open_source(place, "predict", label_column="target")[0]["label"] == -1
    refused(lambda: describe(str(table(tmp_path / "b", label=[0, 2**40]))), "label 1099511627776 would make")


@pytest.mark.parametrize("kind", ["stream", "file", "bytes", "struct"])
def test_bare_arrow_and_pandas_files(tmp_path: Path, kind: str) -> None:
    import pandas as pd
    import pyarrow as pa

    pictures: list[Any] = [png(n) for n in range(3)]
    if kind == "struct":
        pictures = [{"bytes": one, "path": "x.png"} for one in pictures]
    data = {"image": pictures, "label": [1, 0, 1]}
    if kind in ("bytes", "struct"):
        pd.DataFrame(data).to_parquet(tmp_path / "some.parquet")
    else:
        rows = pa.table(data)
        make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with pa.OSFile(str(tmp_path / "some.arrow"), "wb") as sink, make(sink, rows.schema) as writer:
            writer.write_table(rows)
    source = open_source(str(tmp_path), "predict")
    assert [(int(source[n]["image"][0, 0, 0]), source[n]["label"]) for n in range(3)] == [(0, 1), (1, 0), (2, 1)]


def test_parquet_is_read_where_the_cache_of_datasets_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "file", b"")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "below"))
    classed(tmp_path / "a", "train", ["cat", "dog"], [1, 0, 1])
    source = open_source(str(tmp_path / "a"), "predict")
    assert [(int(source[n]["image"][0, 0, 0]), source[n]["label"]) for n in range(3)] == [(0, 1), (1, 0), (2, 1)]


def test_missing_pictures_are_counted_and_named(tmp_path: Path) -> None:
    place = str(table(tmp_path / "a", image=[png(0), None, png(2), png(3)], label=[0, 1, 0, 1]))
    with pytest.warns(UserWarning, match="1 rows without a picture, first: number 1"):
        source = open_source(place, "predict")
    assert [(int(source[n]["image"][0, 0, 0]), source[n]["label"]) for n in range(3)] == [(0, 0), (2, 0), (3, 1)]
    assert any("1 rows without a picture, first: number 1" in line for line in check(place)["problems"])
    empty = {"bytes": None, "path": None}
    struct = table(tmp_path / "b", image=[{"bytes": png(), "path": None}, empty], label=[0, 1])
    with pytest.warns(UserWarning, match="1 rows without a picture"):
        assert len(open_source(str(struct), "predict")) == 1


# ------------------------------------------------------------------------------------------------------- class folders


@pytest.mark.parametrize("word", ["train", "test", "Val", "dev"])
def test_a_class_may_be_called_as_a_split(tmp_path: Path, word: str) -> None:
    for name in ("car", word):
        for n in range(10):
            write(tmp_path / name / f"{n}.png", png())
    assert describe(str(tmp_path)).class_names == sorted(["car", word])
    assert len(open_source(str(tmp_path), "train")) == 18
    write(tmp_path / word / "a" / "0.png", png())  # class folders below: a split
    assert describe(str(tmp_path)).class_names == ["a"]
    with pytest.warns(UserWarning, match=r"10 pictures in .*car, which is no split"):
        open_source(str(tmp_path), "predict")


def test_links_and_rare_endings_are_read_and_the_rest_is_told(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "deep" / "0.png", png())
    place = tmp_path / "set"
    for name, kind in (("0.pgm", "PPM"), ("1.jfif", "JPEG"), ("2.avif", "AVIF")):
        if kind != "AVIF" or features.check("avif"):
            write(place / "a" / name, encoded(np.zeros((8, 8), np.uint8), kind))
    count = len(list((place / "a").iterdir()))
    (place / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (place / "a" / "loop").symlink_to(place)
    (place / "b").symlink_to(tmp_path / "elsewhere")
    write(place / "a" / "photo.heic", b"x")
    for name in ("a/.hidden", "README.md"):
        write(place / name, b"x")
    with pytest.warns(UserWarning, match=r"1 files ending in \.heic"):
        source = open_source(str(place), "predict")
    assert len(source) == count + 2
    report = check(str(place))
    assert report["splits"]["train"]["skipped"] == {"files ending in .heic": 1, "links to a folder above them": 1}


# ---------------------------------------------------------------------------------------------------------- COCO's json

SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


def objects(count: int = 2) -> dict[str, Any]:
    """Two pictures of 10 x 12 pixels with one square each."""
    images = [{"id": n + 1, "file_name": f"{n}.png", "height": 10, "width": 12} for n in range(count)]
    told = [{"id": n + 1, "image_id": n + 1, "category_id": 3, "bbox": [2, 2, 6, 6], "area": 36, "iscrowd": 0,
             "segmentation": SQUARE} for n in range(count)]  # fmt: skip
    return {"images": images, "annotations": told, "categories": [{"id": 3, "name": "box"}]}


def coco(place: Path, what: dict[str, Any], images: str = "images") -> Path:
    for n in range(len(what["images"])):
        write(place / images / f"{n}.png", encoded(np.zeros((10, 12, 3), np.uint8)))
    write(place / "instances.json", json.dumps(what))
    return place


def masks(place: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The masks of all objects as training and as evaluation have them."""
    module = DetectionDataModule(str(place), train_transforms=[], eval_transforms=[], num_workers=0)
    trained = module.samples("predict", training=True)
    told = module.samples("predict")
    first = [mask.numpy() for n in range(len(trained)) for mask in trained[n]["target"][0]["masks"]]
    second = [coco_mask.decode(rle).astype(bool) for n in range(len(told)) for rle in told[n]["target"][0]["masks"]]
    return first, second


def test_ids_may_be_text(tmp_path: Path) -> None:
    what = objects()
    for n, (image, annotation) in enumerate(zip(what["images"], what["annotations"], strict=True)):
        image["id"], annotation["image_id"], annotation["category_id"] = str(n + 1), f"{n + 1}", 3.0
    assert [len(part) for part in masks(coco(tmp_path / "a", what))] == [2, 2]
    for n, (image, annotation) in enumerate(zip(what["images"], what["annotations"], strict=True)):
        image["id"] = annotation["image_id"] = f"img_{n}"
        what["categories"][0]["id"] = annotation["category_id"] = "box"
        image["height"], annotation["bbox"], annotation["iscrowd"] = "10", ["2", "2", "6", "6.0"], "0"
    assert [len(part) for part in masks(coco(tmp_path / "b", what))] == [2, 2]
    source = find_coco(tmp_path / "b").open("predict")[0]
    assert (source.image_ids.tolist(), dict(source.problems)) == ([0, 1], {})


@pytest.mark.parametrize(
    ("segment", "problem"),
    [
        ([[2, 2, 8, 8]], "outlines of fewer than three points"),
        ([[2, 2, 8, 2, 8, 8, 2]], "outlines of fewer than three points"),
        ([[2, 2, 5, 5, 8, 8]], "outlines without area"),
        ([[2, 2, 2, 2, 2, 2]], "outlines without area"),
        ([[]], "outlines that are no numbers"),
        ([[2, None, 8, 2, 8, 8]], "outlines that are no numbers"),
        ([[2, 2, float("nan"), 2, 8, 8]], "outlines that are no numbers"),
        ([[2, 2, 1e18, 2, 8, 8]], "outlines far outside their image"),
        ([], "objects without an outline"),
        (None, "objects without an outline"),
        ("junk", "outlines of an unknown kind"),
        ({"size": [12, 10], "counts": [0, 120]}, "run lengths of another size than their image"),
        ({"size": None, "counts": [0, 120]}, "run lengths of another size than their image"),
        ({"size": [10, 12], "counts": [0, 119]}, "run lengths that cannot be read"),
        ({"size": [10, 12], "counts": [-5, 125]}, "run lengths that cannot be read"),
        ({"size": [10, 12], "counts": "~~~~junk"}, "run lengths that cannot be read"),
        ({"size": [10, 12], "counts": "oooooooooooo"}, "run lengths that cannot be read"),
        ({"size": [10, 12], "counts": ""}, "run lengths that cannot be read"),
        ({"size": [10, 12]}, "run lengths that cannot be read"),
        ({"size": [10, 12], "counts": [120]}, "outlines without area"),
    ],
)
def test_the_box_stands_for_what_is_no_outline(tmp_path: Path, segment: Any, problem: str) -> None:
    what = objects()
    what["annotations"][0]["segmentation"] = segment
    coco(tmp_path, what)
    trained, told = masks(tmp_path)
    square = np.zeros((10, 12), bool)
    square[2:8, 2:8] = True
    for mask in (*trained, *told):
        assert (mask == square).all()
    assert [len(trained), len(told)] == [2, 2]
    assert f"train: 1 {problem}" in check(str(tmp_path))["problems"]


def test_what_shows_nothing_is_left_out_of_training_and_evaluation(tmp_path: Path) -> None:
    what = objects()
    what["annotations"] += [
        {**what["annotations"][0], "bbox": [3, 3, 0, 5]},
        {**what["annotations"][0], "bbox": [30, 3, 5, 5]},
        {**what["annotations"][0], "image_id": None},
    ]
    assert [len(part) for part in masks(coco(tmp_path, what))] == [2, 2]
    assert sum(find_coco(tmp_path).open("predict")[0].problems.values()) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w["annotations"][0].update(bbox=[None, 1, 2, 3]), "no box of four numbers"),
        (lambda w: w["images"][0].update(id=None), "image number 0 has no id"),
        (lambda w: w["images"][0].update(height=None), "no height and width"),
        (lambda w: w["images"][0].update(height=2**40), "an image states"),
        (lambda w: w["images"].append(7), "image number 2 has no id"),
        (lambda w: w["annotations"].append("x"), "annotation number 2 is no object"),
        (lambda w: w["categories"].append({"id": "3", "name": "again"}), "several categories have the same id"),
        (lambda w: w["categories"][0].pop("name"), "a category has no name"),
        (lambda w: w["images"][0].update(file_name="../../secret.png"), "leads out of .*data.options.outside"),
        (lambda w: w["images"][0].update(file_name="/etc/hostname"), "leads out of"),
        (lambda w: w["images"][0].update(file_name="a\0.png"), "no file_name"),
        (lambda w: w["images"][0].update(file_name="a" * 5000), "are not in|not found"),
    ],
)
def test_what_a_json_cannot_mean_is_one_line(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    write(tmp_path / "secret.png", png())
    what = objects()
    place = coco(tmp_path / "in" / "set", what)
    change(what)
    write(place / "instances.json", json.dumps(what))
    refused(lambda: find_coco(place).open("train"), words)


def test_pictures_in_folders_of_another_name(tmp_path: Path) -> None:
    what = objects()
    what["images"][0]["file_name"], what["images"][1]["file_name"] = "C:\\data\\0.png", "/home/me/train2017/1.png"
    source = find_coco(coco(tmp_path / "a", what)).open("predict")[0]
    assert [os.path.basename(source.path(n)) for n in range(2)] == ["0.png", "1.png"]
    assert source.read(1).image.shape == (3, 10, 12)
    write(tmp_path / "out.png", encoded(np.zeros((10, 12, 3), np.uint8)))
    what["images"][0]["file_name"] = "../../out.png"
    coco(tmp_path / "b", what)
    refused(lambda: find_coco(tmp_path / "b").open("train"), "leads out of")
    assert find_coco(tmp_path / "b", outside=True).open("predict")[0].read(0).image.shape == (3, 10, 12)


def test_photos_are_turned_unless_the_json_means_them_as_stored(tmp_path: Path) -> None:
    what = objects()
    place = coco(tmp_path, what)
    turned = Image.Exif()
    turned[0x0112] = 6
    pixels = np.zeros((10, 12, 3), np.uint8)
    pixels[:5] = 200
    Image.fromarray(pixels).save(place / "images" / "0.png", exif=turned)
    assert find_coco(place).open("predict")[0].read(0).image.shape == (3, 10, 12)
    what["images"][0].update(height=12, width=10)
    write(place / "instances.json", json.dumps(what))
    assert find_coco(place).open("predict")[0].read(0).image[0, 0].tolist() == [0] * 5 + [200] * 5


def test_run_lengths_are_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = (rng.random(rng.integers(1, 90, 2)) < rng.random()).astype(np.uint8)
        runs = run_lengths(coco_mask.encode(np.asfortranarray(mask))["counts"].decode())
        assert runs is not None
        assert (np.repeat(np.arange(len(runs)) % 2, runs) == mask.reshape(-1, order="F")).all()


def test_the_metric_refuses_masks_of_the_truth_that_are_none() -> None:
    true = {"boxes": torch.tensor([[1.0, 1, 3, 3]]), "labels": torch.tensor([0]), "area": torch.tensor([4.0]),
            "iscrowd": torch.tensor([0]), "image_id": torch.tensor(3)}  # fmt: skip
    for counts in ("~~~", "oooooooo", [5, 5], ""):
        masks = [{"size": [4, 4], "counts": counts}]
        found = {**true, "masks": torch.zeros(1, 4, 4, dtype=torch.bool), "scores": torch.tensor([1.0])}
        update = CocoAP().update
        refused(lambda: update([found], [{**true, "masks": masks}]), "picture 3: the mask")  # noqa: B023


# ------------------------------------------------------------------------------------------------------------- captions


def captioned(place: Path, text: bytes | str, name: str = "train.csv", count: int = 20) -> str:
    for n in range(count):
        write(place / f"{n}.png", png(n))
    write(place / name, text)
    return str(place)


@pytest.mark.parametrize(("mark", "last"), [(",", True), ("\t", True), (",", False)])
def test_an_unmatched_quote_swallows_no_row(tmp_path: Path, mark: str, last: bool) -> None:
    texts = [f"picture {n}" for n in range(20)]
    texts[3], texts[9], texts[12] = '"an open, long quote', 'a 5" pipe', 'closed again"'
    rows = [("filepath", "title"), *((f"{n}.png", text) for n, text in enumerate(texts))]
    lines = "".join(mark.join(row if last else row[::-1]) + "\n" for row in rows)
    place = captioned(tmp_path, lines, "train.csv" if mark == "," else "train.tsv")
    with pytest.warns(UserWarning, match="1 rows with an unmatched quote"):
        source = open_pairs(place, "predict")
    assert [source[n]["captions"] for n in range(20)] == [[text] for text in texts]


def test_rows_that_are_quoted_well_may_reach_over_lines(tmp_path: Path) -> None:
    place = captioned(tmp_path, 'filepath,title\n0.png,"two\nlines, and a ""word"""\n1.png,one\n')
    source = open_pairs(place, "predict")
    assert [source[n]["captions"] for n in range(2)] == [['two lines, and a "word"'], ["one"]]
    refused(lambda: open_pairs(captioned(tmp_path, 'filepath,title\n0.png,"two\nlines\n'), "train"), "unmatched quote")


def test_captions_that_are_missing_are_counted_and_encodings_named(tmp_path: Path) -> None:
    place = captioned(tmp_path / "a", "\ufefffilepath,title\n0.png,one\n1.png,\n2.png\n,three\n")
    with pytest.warns(UserWarning, match="1 rows without a path; 2 pictures without a caption"):
        assert len(open_pairs(place, "predict")) == 1
    place = captioned(tmp_path / "b", "filepath,title\n0.png,caf\xe9\n".encode("latin-1"))
    refused(lambda: open_pairs(place, "train"), r"line 2 is not UTF-8 \(byte 0xe9\)")
    place = str(table(tmp_path / "c", caption=["one", None, " ", "four"]))
    with pytest.warns(UserWarning, match="2 rows without a caption, first: number 1"):
        assert [open_pairs(place, "predict")[n]["captions"] for n in range(2)] == [["one"], ["four"]]
    place = str(table(tmp_path / "d", captions=[["one"], [None, "two"], [], None]))
    assert [open_pairs(place, "predict")[n]["captions"] for n in range(2)] == [["one"], ["two"]]
    told = [{"image_id": "0", "caption": "zero"}, {"image_id": 1, "caption": None}, {"image_id": 9, "caption": "nine"}]
    what = {"images": [{"id": n, "file_name": f"{n}.png"} for n in range(2)], "annotations": told}
    place = captioned(tmp_path / "e", json.dumps(what), "captions_train.json")
    with pytest.warns(UserWarning, match="1 captions that are empty .*1 captions of images .*1 pictures without"):
        assert open_pairs(place, "predict")[0]["captions"] == ["zero"]
    what["images"][0]["file_name"] = "../a/0.png"
    write(tmp_path / "e" / "captions_train.json", json.dumps(what))
    refused(lambda: open_pairs(place, "train"), "leads out of the folder")


def shard(path: Path, names: list[str]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for n, name in enumerate(names):
            data = png(n) if name.endswith(".png") else name.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path.read_bytes()


def test_shards_tell_what_they_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{n}.{kind}" for n in range(3) for kind in ("png", "txt", "json")]
    whole = shard(tmp_path / "x.tar", names)
    for data, count, problem in (
        (whole + whole, 6, None),
        (whole[: len(whole) // 512 * 512 // 4], 1, "1 shards that break off or are damaged"),
        (whole[: 9 * 1024], 3, "1 shards that break off or are damaged"),
        (whole.rstrip(b"\0") + b"\0" * 2048 + b"junk" * 300, 3, "1 shards that break off or are damaged"),
        (shard(tmp_path / "y.tar", [*names, "0.png", "3.png", "4.heic", "5.txt"]), 3,
         "1 members of a name that came before; 1 pictures without a .txt; 1 texts without a picture"),
    ):  # fmt: skip
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        write(place / "0.tar", data)
        for _ in range(2):  # from the tar, then from the kept index
            report = check(str(place))
            assert [line for line in report["problems"] if "shard" in line or "member" in line] == (
                [f"train: {problem}"] if problem else []
            )
            assert sum(found["samples"] for found in report["splits"].values()) >= count
        assert len(open_pairs(str(place), "predict")) == count
    assert report["splits"]["train"]["skipped"] == {"members ending in .heic": 1}
    write(tmp_path / "file", b"")
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "file" / "below"))  # a cache that cannot be written
    assert len(open_pairs(str(tmp_path), "predict")) == 3


# -------------------------------------------------------------------------------------------------------- data check


def test_check_takes_what_fit_takes_and_never_loses_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    grid = {"input": [[1]], "output": [[2]]}
    write(tmp_path / "arc" / "training" / "a.json", json.dumps({"train": [grid], "test": [grid]}))
    write(tmp_path / "arc" / "training" / "._a.json", b"\0\5\x16\7")
    captioned(tmp_path / "pairs", "filepath,title\n" + "".join(f"{n}.png,text {n}\n" for n in range(20)))
    write(tmp_path / "pairs" / "3.png", b"broken")
    assert check(str(tmp_path / "arc"))["splits"]["training"]["samples"] == 1
    report = check(str(tmp_path / "pairs"))
    assert (report["splits"]["train"]["samples"], report["splits"]["train"]["unreadable"]) == (18, 1)
    assert "3.png" in report["problems"][0]
    hashes = check(str(tmp_path / "arc"))["sha256"]
    assert checked_hash(str(tmp_path / "arc")) == hashes
    write(tmp_path / "file", b"")
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "file" / "below"))
    assert check(str(tmp_path / "arc"))["sha256"] == hashes
    assert "cannot be written" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------- lists of videos and ARC


def test_paths_of_lists_may_hold_spaces_and_lists_a_mark(tmp_path: Path) -> None:
    (tmp_path / "my frames").mkdir()
    write(tmp_path / "train.csv", "\ufeffa.mp4 0\nmy clip.mp4 1\nsome long name.mp4 2\nmy frames 3\nb.mp4 x 4\n")
    write(tmp_path / "val.csv", "my clip.mp4\r\n")
    layout = open_layout(str(tmp_path))
    source = open_part(layout, "train")
    names = ["a.mp4", "my clip.mp4", "some long name.mp4", "my frames", "b.mp4"]
    assert [(os.path.relpath(source.name(n), tmp_path), source.label(n)) for n in range(5)] == [
        (name, n) for n, name in enumerate(names)
    ]
    assert len(layout.class_names) == 5
    assert open_part(layout, "val").name(0).endswith("my clip.mp4")
    write(tmp_path / "val.csv", f"a.mp4 {2**40}\n")
    refused(lambda: open_layout(str(tmp_path)), f"label {2**40} would make")


def test_a_class_of_videos_may_be_called_test(tmp_path: Path) -> None:
    for name in ("run", "test"):
        write(tmp_path / name / "a.mp4", b"x")
    write(tmp_path / "run" / "notes.txt", b"x")
    layout = open_layout(str(tmp_path))
    assert layout.class_names == ["run", "test"]
    with pytest.warns(UserWarning, match=r"1 files ending in \.txt"):
        assert open_part(layout, "predict").name(1).endswith("test/a.mp4")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"train": [{"input": [[1]], "output": [[1]]}], "test": None}, None),
        ({"train": [{"input": [[1.0]], "output": None}]}, None),
        ({"train": None, "test": []}, "a task has 'train' and 'test'"),
        ({"train": [], "test": 7}, "a task has 'train' and 'test'"),
        ({"train": [None]}, "a pair has"),
        ({"train": [{"input": [[1.5]]}]}, "colours 0..9"),
        ({"train": [{"input": [["1"]]}]}, "colours 0..9"),
        ({"train": [{"input": [[2**80]]}]}, "colours"),
        ({"train": [{"input": []}]}, "colours 0..9"),
    ],
)
def test_arc_tasks_with_nulls(tmp_path: Path, task: Any, words: str | None) -> None:
    write(tmp_path / "training" / "a.json", json.dumps(task))
    if words is None:
        assert [found.test for found in read_tasks(str(tmp_path), "training")] == [()]
    else:
        refused(lambda: read_tasks(str(tmp_path), "training"), words)


def test_batches_name_the_keys_wanted() -> None:
    image, label = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    assert as_batch([image, label], "image", "label")["label"] is label
    assert as_batch({"image": image}, "image")["image"] is image
    refused(lambda: as_batch({"image": image, "x": 1}, "image", "label"), "no label; its keys are: image, x")
    refused(lambda: as_batch((image, label, label), "image"), re.escape("a pair (image, label); got a tuple"))
    refused(lambda: as_batch([image, image], "image"), "got a list")  # two views, perhaps
    refused(lambda: as_batch(image, "image"), "got a Tensor")


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3), ("3", 3), (3.0, 3), (" 4 ", 4), (True, None), (3.5, None), (None, None), ("x", None), (2**70, None),
     ("9" * 5000, None), (float("inf"), None), ([1], None)],
)  # fmt: skip
def test_whole_numbers(value: Any, number: int | None) -> None:
    assert whole_number(value) == number
