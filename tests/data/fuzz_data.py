"""Data sets with something wrong in them: each must be read, or refused in one line; never hang, never run anything.

    python tests/data/fuzz_data.py --count 200 --seed 0

:func:`make` writes a small set of one of the layouts and changes it at random, as a function of its seed; :func:`look`
opens, checks and reads it as ``zoo data check`` and ``zoo fit`` do. The suite runs some (test_fuzz.py).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import pickle
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SECONDS = 30  # of a processor for one set; on a busy machine the clock may show WAIT
WAIT = 240
CANARY = "zoo_fuzz_canary"
_SIDE = 12


class _Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


# ----------------------------------------------------------------------------------------------------------- valid sets


def picture(rng: random.Random, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded picture of some mode."""
    draw = np.random.default_rng(rng.getrandbits(32))
    pixels: Any = draw.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    if mode == "I;16":
        pixels = draw.integers(0, 65536, (_SIDE, _SIDE), dtype=np.uint16)
    elif mode == "I":
        pixels = draw.integers(-5 if rng.random() < 0.3 else 0, 70000, (_SIDE, _SIDE), dtype=np.int32)
    elif mode == "F":
        pixels = (draw.random((_SIDE, _SIDE)) * rng.choice([1, 1, 300])).astype(np.float32)
    elif mode == "L":
        pixels = pixels[..., 0]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def _folder(place: Path, rng: random.Random) -> Path:
    for part in ("train", "val") if rng.random() < 0.5 else ("",):
        for name in ("cat", "dog", "train"):
            (place / part / name).mkdir(parents=True)
            for n in range(4):
                (place / part / name / f"{n}.png").write_bytes(picture(rng))
    return place


def _labels(rng: random.Random, count: int) -> list[Any]:
    labels: list[Any] = [n % 2 for n in range(count)]
    strange = [None, -1, 2**40, -7, 1.5, 2.0, float("nan"), "cat", [0, 1], 2**63 - 1, True]
    kind = rng.randrange(4)
    if kind == 0:
        labels[rng.randrange(count)] = rng.choice(strange[:3])
    elif kind == 1:
        labels = [rng.choice(strange)] * count
    return labels


def _columns(place: Path, rng: random.Random) -> Path:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.feather as feather
    import pyarrow.parquet as pq

    pictures: list[Any] = [picture(rng) for _ in range(8)]
    if rng.random() < 0.4:
        pictures = [{"bytes": one, "path": rng.choice([None, "a.png", "/dev/zero"])} for one in pictures]
        if rng.random() < 0.3:
            pictures[2] = {"bytes": None, "path": rng.choice([None, "/dev/zero", "../x.png"])}
    for _ in range(rng.randrange(3)):
        pictures[rng.randrange(8)] = rng.choice([None, None, pictures[0]])
    table = {
        rng.choice(["image", "image", "img", "x"]): pictures,
        rng.choice(["label", "label", "target", "fine_label", "caption"]): _labels(rng, 8),
    }
    place.mkdir(parents=True)
    try:
        if rng.random() < 0.5:
            pd.DataFrame(table).to_parquet(place / "train.parquet")
        elif rng.random() < 0.5:
            pq.write_table(pa.table(table), place / rng.choice(["train.parquet", "data.parquet"]))
        else:
            feather.write_feather(pa.table(table), place / "data.arrow", compression="uncompressed")
    except (pa.ArrowException, OverflowError, TypeError, ValueError):  # a table that cannot be written
        pq.write_table(pa.table({"image": [picture(rng)] * 8, "label": [0] * 8}), place / "train.parquet")
    if rng.random() < 0.3:
        pq.write_table(pa.table({"image": [picture(rng)] * 3}), place / "test.parquet")
    return place


def _coco(place: Path, rng: random.Random) -> Path:
    (place / "images").mkdir(parents=True)
    images, annotations = [], []
    for n in range(4):
        (place / "images" / f"{n}.png").write_bytes(picture(rng))
        images.append({"id": n, "file_name": f"{n}.png", "height": _SIDE, "width": _SIDE})
        for _ in range(2):
            x, y = rng.randrange(6), rng.randrange(6)
            outline: Any = [[x, y, x + 5, y, x + 5, y + 4, x, y + 4]]
            if rng.random() < 0.3:
                outline = {
                    "size": [_SIDE, _SIDE],
                    "counts": rng.choice([[20, 10, 114], "`4", "d0:[3", "\x7f~", "", [1]]),
                }
            annotations.append(
                {"id": len(annotations) + 1, "image_id": n, "category_id": 1 + n % 2, "bbox": [x, y, 5, 4],
                 "area": 20, "iscrowd": 0, "segmentation": outline, "keypoints": [x, y, 2, 0, 0, 0]}
            )  # fmt: skip
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "keypoints": ["nose", "tail"]}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (place / "instances_train.json").write_text(json.dumps(content))
    return place


def _shards(place: Path, rng: random.Random) -> Path:
    place.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(place / f"{number}.tar", "w") as tar:
            for n in range(4):
                for ending, data in ((".png", picture(rng)), (".txt", f"a cat {n}".encode()), (".json", b"{}")):
                    member = tarfile.TarInfo(f"{n:05}{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return place


def _table(place: Path, rng: random.Random) -> Path:
    place.mkdir(parents=True)
    kind = rng.choice(["csv", "tsv"])
    rows = []
    for n in range(8):
        (place / f"{n}.png").write_bytes(picture(rng))
        rows.append([f"{n}.png", rng.choice(["a cat", 'a "cat", black', "", "NULL", "a\nb", 'x"'])])
    with (place / f"train.{kind}").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
        writer.writerows([["filepath", "title"], *rows])
    return place


def _captions(place: Path, rng: random.Random) -> Path:
    (place / "train").mkdir(parents=True)
    for n in range(4):
        (place / "train" / f"{n}.png").write_bytes(picture(rng))
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(4)]
    told = [{"id": n, "image_id": n % 4, "caption": rng.choice(["a cat", None, "", 7])} for n in range(8)]
    (place / "captions_train.json").write_text(json.dumps({"images": images, "annotations": told}))
    return place


def _kinetics(place: Path, rng: random.Random) -> Path:
    names = ["a", "my clip", "c,d", "e"]
    for name in names:
        (place / name).mkdir(parents=True)
        for n in range(3):
            (place / name / f"{n}.png").write_bytes(picture(rng))
    mark = rng.choice([" ", ",", "\t"])
    lines = [f"{name}{mark}{rng.choice([0, 1, 1, 2**40 if rng.random() < 0.1 else 2])}" for name in names]
    for part in ("train", "val"):
        (place / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return place


def _arc(place: Path, rng: random.Random) -> Path:
    def grid() -> list[list[int]]:
        return [[rng.randrange(10) for _ in range(3)] for _ in range(3)]

    def pairs(count: int) -> list[dict[str, Any]]:
        return [{"input": grid(), "output": grid()} for _ in range(count)]

    for part in ("training", "evaluation"):
        (place / part).mkdir(parents=True)
        for n in range(3):
            (place / part / f"{n}.json").write_text(json.dumps({"train": pairs(2), "test": pairs(1)}))
    return place


def _saved(place: Path, rng: random.Random) -> Path:
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": picture(rng), "path": None} for _ in range(6)], "label": [0, 1] * 3}
    split = datasets.Dataset.from_dict(rows, features=kinds)
    parts = datasets.DatasetDict({"train": split, "test": split}) if rng.random() < 0.5 else split
    parts.save_to_disk(str(place))
    return place


def _idx(place: Path, rng: random.Random) -> Path:
    place.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = bytes(rng.randrange(256) for _ in range(8 * 36))
        head = b"\0\0\x08\x03" + b"".join(side.to_bytes(4, "big") for side in (8, 6, 6))
        (place / f"{part}-images-idx3-ubyte").write_bytes(head + images)
        labels = b"\0\0\x08\x01" + (8).to_bytes(4, "big") + bytes(n % 3 for n in range(8))
        (place / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return place


def _karpathy(place: Path, rng: random.Random) -> Path:
    (place / "images").mkdir(parents=True)
    images = []
    for n in range(6):
        (place / "images" / f"{n}.png").write_bytes(picture(rng))
        told = [{"raw": "a cat"}, {"raw": "a dog"}][: 1 + n % 2]
        images.append({"filename": f"{n}.png", "split": ["train", "val", "restval"][n % 3], "sentences": told})
    (place / "dataset_small.json").write_text(json.dumps({"images": images}))
    return place


def _frames(place: Path, rng: random.Random) -> Path:
    lines = ["original_vido_id video_id frame_id path labels"]
    for number, name in enumerate(("a", "b", "c")):
        (place / name).mkdir(parents=True)
        for n in range(4):
            (place / name / f"{n}.png").write_bytes(picture(rng))
            lines.append(f'{name} {number} {n} {name}/{n}.png "{rng.choice(["", "0", "1,2"])}"')
    for part in ("train", "val"):
        (place / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return place


KINDS: dict[str, Callable[[Path, random.Random], Path]] = {
    "folder": _folder,
    "columns": _columns,
    "coco": _coco,
    "shards": _shards,
    "table": _table,
    "captions": _captions,
    "kinetics": _kinetics,
    "arc": _arc,
    "saved": _saved,
    "idx": _idx,
    "karpathy": _karpathy,
    "frames": _frames,
}


# -------------------------------------------------------------------------------------------------------------- changes


def _strange(rng: random.Random) -> Any:
    deep: Any = 0
    for _ in range(rng.choice([3, 200])):
        deep = [deep]
    return rng.choice(
        [None, "12", -1, 2**40, 2**70, 1e308, float("nan"), float("inf"), [], {}, [None], deep, "../../etc/passwd",
         "/dev/zero", True, "", "\0", f"$(mkdir {CANARY})", "1" * 5000, [[0, 0, 1, 1]],
         [["0", "0", "4", "0", "4", "4"]], 0.5]
    )  # fmt: skip


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _nodes(tree[key])


def _change_json(file: Path, rng: random.Random, mark: str) -> None:
    tree = json.loads(file.read_text())
    for _ in range(rng.choice([1, 1, 3, 8])):
        if not (nodes := list(_nodes(tree))):
            break
        owner, key = rng.choice(nodes)
        if rng.random() < 0.25:
            del owner[key]
        else:
            owner[key] = _strange(rng)
    text = json.dumps(tree)
    if rng.random() < 0.05:
        text = "[" * 100_000
    file.write_text(text)


def _change_text(file: Path, rng: random.Random, mark: str) -> None:
    lines = file.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    line = lines[at]
    lines[at] = rng.choice(
        [b'"' + line, line + b'"', line.replace(b",", b',"'), line.replace(b"\t", b'\t"'), b"\xef\xbb\xbf" + line,
         b"caf\xe9 " + line, line[: len(line) // 2], line + b" " + str(2**40).encode(), line + b"\0", b"", line * 50,
         line.replace(b".png", b"\xc3\xa9.png"), b"-7", line + b" -7", line + b" 1e9", b"/dev/zero 0", b"../../x.mp4 0"]
    )  # fmt: skip
    file.write_bytes(b"\n".join(lines))


def _change_bytes(file: Path, rng: random.Random, mark: str) -> None:
    data = file.read_bytes()
    kind = rng.randrange(8)
    if kind == 0:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind in (1, 2):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 5, 50])):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        data = bytes(changed)
    elif kind == 3:
        data += data
    elif kind == 4:
        data = rng.choice([b"", b"<!DOCTYPE html><html>", b"\x1f\x8b" + data, b"\0" * 4096])
    elif kind == 5:
        data = pickle.dumps(_Bomb(mark))
    elif kind == 6:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + os.urandom(0) + b"\xff" * 7 + data[at:]
    else:
        data = data[: len(data) // 2] + data
    file.write_bytes(data)


def _change_place(file: Path, rng: random.Random, mark: str) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        file.unlink()
        os.mkfifo(file)
    elif kind == 1:
        file.unlink()
        file.symlink_to("/dev/zero")
    elif kind == 2:
        file.unlink()
        file.symlink_to("nowhere")
    elif kind == 3:
        (file.parent / "again").symlink_to(file.parent, target_is_directory=True)
    elif kind == 4:
        file.rename(file.with_name(rng.choice(["._x.json", "x.heic", f"$(mkdir {CANARY}).png", "a b.png"])))
    else:
        file.unlink()
        file.mkdir()


def _change_picture(file: Path, rng: random.Random, mark: str) -> None:
    kind, mode = rng.choice(
        [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I"), ("TIFF", "F"), ("PPM", "I"), ("PPM", "L"), ("GIF", "L"),
         ("JPEG", "RGB")]
    )  # fmt: skip
    data = picture(rng, kind, mode)
    if rng.random() < 0.3:  # it says that it is huge
        data = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0" + data[29:]
    file.write_bytes(data)


def make(seed: int, folder: Path) -> tuple[str, Path, str]:
    """Writes the set number `seed` below `folder`: (its kind, its place, a path that must not come to be)."""
    rng = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    mark = str(folder / CANARY)
    place = KINDS[kind](folder / f"{kind}_{seed}", rng)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = sorted(p for p in place.rglob("*") if p.is_file() and not p.is_symlink())
        if not files:
            break
        told = [file for file in files if file.suffix in (".json", ".csv", ".tsv", ".parquet", ".arrow", ".tar")]
        file = rng.choice(told if told and rng.random() < 0.7 else files)
        if file.suffix == ".json" and rng.random() < 0.8:
            try:
                _change_json(file, rng, mark)
                continue
            except (ValueError, RecursionError):
                pass
        if file.suffix in (".csv", ".tsv") and rng.random() < 0.8:
            _change_text(file, rng, mark)
        elif file.suffix == ".png" and rng.random() < 0.5:
            _change_picture(file, rng, mark)
        elif rng.random() < 0.25:
            _change_place(file, rng, mark)
        else:
            _change_bytes(file, rng, mark)
    return kind, place, mark


# -------------------------------------------------------------------------------------------------------------- looking


def _some(loader: Any) -> None:
    for number, _ in enumerate(loader):
        if number == 2:
            break


def _fit(module: Any) -> None:
    _some(module.train_dataloader())
    _some(module.val_dataloader())


def _fit_pictures(place: Path) -> None:
    from zoo.data import ImageDataModule

    _fit(ImageDataModule(str(place), batch_size=3, image_size=8, num_workers=0))


def _fit_objects(place: Path) -> None:
    from zoo.data.detection import DetectionDataModule
    from zoo.metrics.coco import CocoAP

    module = DetectionDataModule(
        str(place), train_transforms=[], eval_transforms=[], keypoints=True, batch_size=1, num_workers=0
    )
    _some(module.train_dataloader())
    metric = CocoAP(("bbox", "segm"))
    for batch in module.val_dataloader():
        found = [{**true, "scores": true["area"]} for true in batch["target"]]
        metric.update(found, batch["target"])
    metric.compute()


def _fit_captions(place: Path) -> None:
    from zoo.data import ImageTextDataModule

    _fit(ImageTextDataModule(str(place), batch_size=3, image_size=8, tokenizer="shapes", num_workers=0))


def _fit_videos(place: Path) -> None:
    from zoo.data import VideoDataModule

    _fit(VideoDataModule(str(place), batch_size=2, num_frames=2, sampling_rate=1, image_size=8, num_workers=0))


def _fit_tasks(place: Path) -> None:
    from zoo.data import ARCDataModule

    _fit(ARCDataModule(str(place), image_size=16, batch_size=2, num_workers=0))


_FITS: dict[str, Callable[[Path], None]] = {
    "folder": _fit_pictures,
    "columns": _fit_pictures,
    "coco": _fit_objects,
    "shards": _fit_captions,
    "table": _fit_captions,
    "captions": _fit_captions,
    "kinetics": _fit_videos,
    "arc": _fit_tasks,
    "saved": _fit_pictures,
    "idx": _fit_pictures,
    "karpathy": _fit_captions,
    "frames": _fit_videos,
}


def look(kind: str, place: Path, mark: str) -> list[str]:
    """What `zoo data check` and a run say of a set: "read", or the line of a refusal.

    Raises:
        AssertionError: a refusal of several lines, or something was run; any other exception is a fault as well.
    """
    from zoo.data.check import check
    from zoo.errors import ZooError

    said = []
    for use in (lambda place: check(str(place)), _FITS[kind]):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use(place)
            said.append("read")
        except ZooError as error:
            said.append(str(error))
    for line in said:
        assert line.strip(), "an empty refusal"
        assert "\n" not in line, f"a refusal of several lines: {line}"
        assert len(line) < 2000, f"a refusal of {len(line)} letters: {line[:300]}"
    assert not os.path.exists(mark), "something was run"
    assert not os.path.exists(CANARY), "a name was run"
    return said


class TookTooLong(BaseException):
    """No answer within the time."""


def look_in_time(kind: str, place: Path, mark: str, seconds: float = WAIT) -> list[str]:
    """As :func:`look`; :class:`TookTooLong` after so many seconds (code in C is not interrupted: see :func:`main`)."""

    def stop(*_: Any) -> None:
        raise TookTooLong(f"{kind}: no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return look(kind, place, mark)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _apart(seed: int, folder: Path, log: Path) -> str:
    """One set looked at in a process of its own: "" or what went wrong."""
    child = os.fork()
    if child == 0:
        code = 1
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        try:
            kind, place, mark = make(seed, folder)
            log.write_text(f"{kind}: " + " | ".join(look(kind, place, mark)))
            code = 0
        except BaseException:
            log.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            told = log.read_text() if log.is_file() else ""
            return "" if status == 0 else f"status {status}: {told}"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"no answer within {WAIT:g} s"


def main() -> int:
    """Looks at `--count` sets, each in a process of its own; tells the faults and how many sets were read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every answer")
    arguments = parser.parse_args()
    import datasets  # all of it once, before the processes part
    import faster_coco_eval  # noqa: F401

    import zoo.data.check
    import zoo.data.detection
    import zoo.metrics.coco  # noqa: F401

    datasets.disable_progress_bars()
    faults, answers = 0, Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ZOO_HOME"] = f"{folder}/home"
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            (place := Path(folder) / str(seed)).mkdir()
            log = place / "log"
            if problem := _apart(seed, place, log):
                faults += 1
                print(f"seed {seed} ({list(KINDS)[seed % len(KINDS)]}): {problem}", flush=True)
            else:
                if arguments.show:
                    print(f"seed {seed} {log.read_text()}")
                for answer in log.read_text().partition(": ")[2].split(" | "):
                    answers["read" if answer == "read" else "refused"] += 1
    print(f"{arguments.count} data sets, {faults} faults; of two looks each: {dict(answers)}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
