"""Reading videos, choosing clips, lists and folders, what cannot be read, order and seeds."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data import check
from zoo.data import video_transforms as V
from zoo.data.video import VideoDataModule, VideoSet, read_views
from zoo.data.video_reader import ArrayReader, PicturesReader, PyAVReader, TorchCodecReader, VideoError, open_video
from zoo.data.video_sources import open_layout, open_part, read_ava_boxes, read_frame_list, read_label_map
from zoo.errors import ZooError

av = pytest.importorskip("av")


def write_video(path: Path, frames: np.ndarray, fps: float = 30, times: Sequence[int] | None = None) -> Path:
    """Frames (N, H, W, 3) uint8 as H.264, a key frame every twelfth; `times` in hundredths of a second."""
    from fractions import Fraction

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"g": "12", "crf": "12"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        for k, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[k], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def grey(count: int, height: int = 32, width: int = 48, first: int = 0, step: int = 4) -> np.ndarray:
    """Frames whose number can be read off their grey."""
    level = (first + step * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(level[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: torch.Tensor, first: int = 0, step: int = 4) -> list[int]:
    """The numbers of frames (T, H, W, 3)."""
    return ((frames.float().mean((1, 2, 3)) - first) / step).round().int().tolist()


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six videos of 24 frames; class b is brighter."""
    root = tmp_path_factory.mktemp("videos")
    for label, name in enumerate("ab"):
        (root / name).mkdir()
        for k in range(6):
            write_video(root / name / f"{k}.mp4", grey(24, first=20 + 100 * label + k, step=4))
    return root


# -------------------------------------------------------------------------------------------------------------- readers


def test_frames_come_by_number(tmp_path: Path) -> None:
    reader = open_video(write_video(tmp_path / "a.mp4", grey(60)))
    assert (reader.num_frames, reader.fps, reader.duration) == (60, 30.0, 2.0)
    for wanted in ([0], [59], [37], [5, 3, 3, 59, 0, 24, 25], list(range(60)), [11, 12, 13], [58, 1]):
        assert numbers(reader.frames_at(wanted)) == wanted
    assert numbers(reader.frames_at(torch.tensor([7, 8]))) == [7, 8]
    with pytest.raises(ZooError, match=r"numbered 0\.\.59"):
        reader.frames_at([60])
    reader.close()


@pytest.mark.parametrize("fps", [12.5, 23.976, 60])
def test_rates_are_the_files_own(tmp_path: Path, fps: float) -> None:
    reader = PyAVReader(write_video(tmp_path / "a.mp4", grey(20), fps))
    assert reader.fps == pytest.approx(fps, abs=1e-3)
    assert numbers(reader.frames_at([19, 2])) == [19, 2]


def test_frames_are_counted_whatever_their_spacing(tmp_path: Path) -> None:
    times = np.cumsum([0, *(1 + (np.arange(39) * 7) % 9)]).tolist()
    reader = PyAVReader(write_video(tmp_path / "a.mkv", grey(40), times=times))
    assert reader.num_frames == 40
    assert numbers(reader.frames_at([0, 13, 14, 39])) == [0, 13, 14, 39]


def test_a_video_is_turned_as_it_is_to_be_shown(tmp_path: Path) -> None:
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[:, :, :16] = 250  # the left is bright
    upright = write_video(tmp_path / "a.mp4", frames).read_bytes()
    one, minus = b"\x00\x01\x00\x00", b"\xff\xff\x00\x00"
    none = bytes(4)
    plain = b"".join([one, none, none, none, one, none])
    at = upright.index(plain, upright.index(b"tkhd"))  # the matrix in the track's header
    turns = {  # a quarter clockwise, a half, a quarter anticlockwise; and where the bright part then is
        "top": [none, one, none, minus, none, none],
        "right": [minus, none, none, none, minus, none],
        "bottom": [none, minus, none, one, none, none],
    }
    for side, matrix in turns.items():
        turned = upright[:at] + b"".join(matrix) + upright[at + len(plain) :]
        (tmp_path / "turned.mp4").write_bytes(turned)
        shown = open_video(tmp_path / "turned.mp4").frames_at([1])[0, :, :, 0].float()
        assert shown.shape == ((32, 48) if side == "right" else (48, 32))
        edges = {"top": shown[:8], "bottom": shown[-8:], "left": shown[:, :8], "right": shown[:, -8:]}
        assert max(edges, key=lambda name: float(edges[name].mean())) == side


def test_a_file_that_breaks_off_gives_what_it_has(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", grey(60)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    reader = PyAVReader(tmp_path / "cut.mkv")
    assert 12 <= reader.num_frames < 60
    assert numbers(reader.frames_at([0, 10])) == [0, 10]
    whole = write_video(tmp_path / "a.mp4", grey(60)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its table stands at the end
    with pytest.raises(VideoError, match="cannot open"):
        open_video(tmp_path / "cut.mp4")


def test_what_is_no_video_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all\n" * 40)
    (tmp_path / "none").mkdir()
    for name, message in (
        ("empty.mp4", "cannot open"),
        ("text.mp4", "cannot open"),
        ("gone.mp4", "no such video"),
        ("none", "no pictures"),
    ):
        with pytest.raises(VideoError, match=message) as caught:
            open_video(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ZooError, match="did you mean 'pyav'"):
        open_video(tmp_path / "empty.mp4", "pyva")


def test_a_file_with_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        open_video(tmp_path / "a.mp4")


def test_pictures_are_a_video(tmp_path: Path) -> None:
    for k, picture in enumerate(grey(10)):
        Image.fromarray(picture).save(tmp_path / f"{k:03d}.png")
    reader = open_video(tmp_path, fps=24)
    assert (reader.num_frames, reader.fps) == (10, 24)
    assert numbers(reader.frames_at([9, 0, 0])) == [9, 0, 0]
    Image.new("RGB", (9, 9)).save(tmp_path / "003.png")
    with pytest.raises(VideoError, match="different sizes"):
        reader.frames_at([2, 3])
    (tmp_path / "004.png").write_bytes(b"no picture")
    for gone in (4, 5):
        (tmp_path / "005.png").unlink(missing_ok=True)
        with pytest.raises(VideoError, match=f"00{gone}.png"):
            reader.frames_at([gone])
    with pytest.raises(VideoError, match="without pictures"):
        PicturesReader([])
    assert numbers(ArrayReader(torch.from_numpy(grey(5))).frames_at([4, 1])) == [4, 1]


def test_torchcodec_reads_the_same(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", grey(30))
    try:
        reader = TorchCodecReader(path)
    except VideoError:
        raise
    except ZooError as error:
        pytest.skip(str(error))
    assert (reader.num_frames, reader.fps) == (30, 30.0)
    assert numbers(reader.frames_at([29, 3, 3])) == [29, 3, 3]


def test_real_videos(shared: Path) -> None:
    folder = shared / "data" / "videos"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/data/videos is not here")
    for name, frames, fps in (("asl/again.mp4", 77, 30), ("scenes/car_1.mp4", 100, 12.5)):
        reader = open_video(folder / name)
        assert (reader.num_frames, reader.fps) == (frames, fps)
        some = reader.frames_at([0, frames - 1, frames // 2])
        assert some.shape[1] == 240
        assert torch.equal(some[2], reader.frames_at(range(frames))[frames // 2])


# ------------------------------------------------------------------------------------------------------------- sampling


def test_windows_of_testing_and_training() -> None:
    assert V.clip_length(32, 2, 15.0) == 32
    assert V.clip_length(1, 1, 1.0) == 1  # never less than a frame
    assert [V.clip_window(300, 64, k, 10)[0] for k in (0, 9)] == [0, 236 * 9 / 10]  # never reaches the end
    assert V.clip_window(300, 64, 9, 10, offset=True) == (9 * (236 // 9), 9 * 26 + 63)
    assert V.clip_window(301, 64, 0, 1, offset=True)[0] == 118  # floor(237 / 2)
    assert V.clip_window(50, 64, 2, 3) == (0, 63)  # longer than the video
    for draw in (0.0, 0.5, 0.999):
        start, end = V.clip_window(300, 64, draw=draw)
        assert start == draw * 236
        assert V.spread_indices(start, end, 32, 300).tolist()[-1] == int(end)
    assert V.spread_indices(0, 63, 4, 40).tolist() == [0, 21, 39, 39]


def test_segments_hold_both_their_ends() -> None:
    assert V.segment_indices(33, 4).tolist() == [4, 12, 20, 28]
    low, high = V.segment_indices(33, 4, [0.0] * 4), V.segment_indices(33, 4, [0.999] * 4)
    assert (low.tolist(), high.tolist()) == ([0, 8, 16, 24], [8, 16, 24, 32])
    assert V.segment_indices(2, 4, [0.999] * 4).max() <= 1


def test_strides_of_short_and_long_videos() -> None:
    assert V.strided_indices(100, 4, 8, 1, 3).tolist() == [38, 46, 54, 62]  # round(75 / 2), to even
    assert V.strided_indices(100, 4, 8).tolist() == [37, 45, 53, 61]
    assert V.strided_indices(10, 4, 8, draw=0.999).tolist() == [0, 8, 9, 9]
    assert V.strided_indices(10, 4, 8, draw=0.0).tolist() == [0, 0, 1, 9]  # starts at -15
    starts = {int(V.strided_indices(30, 4, 8, draw=u)[0]) for u in np.linspace(0, 0.9999, 50)}
    assert starts == set(range(6))
    assert V.centred_indices(3, 8, 4, 100).tolist() == [0, 0, 3, 7]


def test_sizes_and_crops() -> None:
    assert V.short_side_size(240, 320, 256) == (256, 341)
    assert V.short_side_size(320, 240, 256) == (341, 256)
    assert {V.jittered_size(u, 256, 320) for u in (0.0, 0.99999)} == {256, 320}
    assert {V.jittered_size(u, 256, 320, inverse=True) for u in (0.0, 0.99999)} == {320, 256}
    assert V.jittered_size(0.5, 256, 320, inverse=True) == round(1 / ((1 / 256 + 1 / 320) / 2))
    assert V.random_crop_offset(10, 12, 8, (0.999, 0.999)) == (1, 3)  # the last place never comes up
    assert V.random_crop_offset(8, 8, 8, (0.9, 0.9)) == (0, 0)
    boxes = torch.tensor([[-3.0, 2.0, 50.0, 9.0]])
    assert V.clip_boxes(boxes, 10, 20).tolist() == [[0, 2, 19, 9]]
    assert V.flip_boxes(torch.tensor([[2.0, 1.0, 5.0, 9.0]]), 20).tolist() == [[14, 1, 17, 9]]


def _painted(height: int, width: int, box: tuple[int, int, int, int]) -> torch.Tensor:
    frames = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    frames[:, box[1] : box[3], box[0] : box[2]] = 255
    return frames


def _bright(video: torch.Tensor) -> list[int]:
    rows, columns = (torch.nonzero(video[0, 0].amax(axis) > 127)[:, 0] for axis in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])]


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (64, 64)])
def test_boxes_stay_on_what_they_enclose(height: int, width: int) -> None:
    inner = (width // 2 - 6, height // 2 - 8, width // 2 + 7, height // 2 + 5)
    frames, boxes = _painted(height, width, inner), torch.tensor([inner], dtype=torch.float32)
    torch.manual_seed(0)
    for transform in (V.VideoTrain(48, (1.0, 1.6)), V.VideoEval(48), V.VideoEval(40, 1.2), V.VideoEval(48, crop=False)):
        for crop in (0, 1, 2) * 3:
            video, moved = transform(frames, boxes, crop)
            assert video.shape[:2] == (3, 2)
            if transform.random or transform.crop:
                assert video.shape[2:] == (transform.side, transform.side)
            if float(video.max()) < 200 or min(_bright(video)) == 0 or max(_bright(video)) >= min(video.shape[2:]) - 1:
                continue  # cut
            x0, y0, x1, y1 = _bright(video)
            np.testing.assert_allclose(moved[0].tolist(), [x0, y0, x1 + 1, y1 + 1], atol=1.6)


def test_wrong_transforms_say_so() -> None:
    for make, message in (
        (lambda: V.VideoTrain(0), "must be positive"),
        (lambda: V.VideoTrain(8, (0.9, 1.2)), "from 1 or more"),
        (lambda: V.VideoTrain(8, flip=2.0), "flip must lie"),
        (lambda: V.VideoEval(8, 0.5), "1 or more"),
        (lambda: VideoDataModule(train_transform=torch.nn.Identity()), "is a zoo.data.video_transforms"),
    ):
        with pytest.raises(ZooError, match=message):
            make()


# ---------------------------------------------------------------------------------------------------- lists and folders


def small(dataset: object, **options: object) -> VideoDataModule:
    given = {
        "num_frames": 4, "sampling_rate": 2, "batch_size": 2, "image_size": 32, "num_workers": 0, "seed": 0,
        "train_transform": V.VideoTrain(32, (1.0, 1.2)),
    }  # fmt: skip
    return VideoDataModule(str(dataset), **{**given, **options})


def test_class_folders(classes: Path, tmp_path: Path) -> None:
    module = small(classes)
    assert (module.num_classes, module.class_names, module.kind) == (2, ["a", "b"], "label")
    assert [len(module.source(split)) for split in ("train", "val", "predict")] == [11, 1, 12]
    batch = next(iter(module.train_dataloader()))
    assert batch["video"].shape == (2, 3, 4, 32, 32)
    assert batch["video"].dtype == torch.float32
    assert set(batch) == {"video", "label", "video_id", "view", "index"}
    bright = batch["video"].mean((1, 2, 3, 4)) * 0.225 + 0.45 > 100 / 255
    assert bright.long().tolist() == batch["label"].tolist()
    for split in ("train", "val"):
        shutil.copytree(classes, tmp_path / split)
    shutil.rmtree(tmp_path / "val" / "a")
    parts = small(tmp_path)
    assert [len(parts.source(split)) for split in ("train", "val", "test")] == [12, 6, 6]
    assert {parts.source("val").label(k) for k in range(6)} == {1}
    (tmp_path / "val" / "c").mkdir()
    shutil.copy(classes / "a" / "0.mp4", tmp_path / "val" / "c")
    with pytest.raises(ZooError, match="no class of that name"):
        small(tmp_path).source("val")
    alone = small(classes / "a")
    assert (alone.num_classes, alone.source("train").label(0)) == (0, -1)


@pytest.mark.parametrize(("separator", "line"), [(" ", "{} {}"), (",", "{},{}"), ("\t", "{}\t{}"), (" ", "{} x {}")])
def test_video_lists(classes: Path, separator: str, line: str) -> None:
    for part, ids in (("train", range(5)), ("val", range(5, 6))):
        rows = [line.format(f"{name}/{k}.mp4", label) for label, name in enumerate("ab") for k in ids]
        (classes / f"{part}.csv").write_text("\n".join(rows) + "\n\n")
    try:
        module = small(classes)
        assert (module.num_classes, module.class_names) == (2, ["0", "1"])
        assert [len(module.source(split)) for split in ("train", "val", "test")] == [10, 2, 2]
        assert next(iter(module.val_dataloader()))["label"].tolist() == [0, 1]
        one = small(classes / "train.csv")  # a list alone
        assert [len(one.source(split)) for split in ("train", "val", "predict")] == [9, 1, 10]
        (classes / "classids.json").write_text(json.dumps({"walk": 1, "abseil": 0}))
        assert small(classes).class_names == ["abseil", "walk"]
        moved = small(classes, options={"prefix": "/somewhere", "separator": separator})
        assert moved.source("train").name(0) == "/somewhere/a/0.mp4"
    finally:
        for name in ("train.csv", "val.csv", "classids.json"):
            (classes / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 one\n", r"train.csv:1: the label 'one' is no whole number; data.options.separator"),
        ("a.mp4 1\nb.mp4 two\n", r"train.csv:2: the label 'two' is no whole number$"),
        ("a.mp4;1\n", "'a.mp4;1' is no video and has no label after ' '"),
        ("a.mp4 1 2 3\n", "got 4 columns"),
        ("a.mp4 -7\n", "negative"),
        ("\n\n", "lists no video"),
    ],
)
def test_lists_with_mistakes_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(ZooError, match=message) as caught:
        small(tmp_path)
    assert "\n" not in str(caught.value)


def test_labels_outside_the_classes_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 400\n")
    with pytest.raises(ZooError, match=r"the label 400 of .*b\.mp4 is outside the 400 classes"):
        small("kinetics400", data_dir=str(tmp_path))
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 399\n")
    assert small("kinetics400", data_dir=str(tmp_path)).num_classes == 400


def test_names_paths_and_options_with_mistakes(tmp_path: Path, classes: Path) -> None:
    for arguments, message in (
        ({"dataset": "kinetics40"}, "did you mean 'kinetics400'"),
        ({"dataset": "cifar10"}, "not of videos"),
        ({"dataset": str(tmp_path / "gone")}, "no such folder"),
        ({"dataset": str(tmp_path)}, "no known layout of videos"),
        ({"dataset": "hf://a/b"}, "on this machine"),
        ({"dataset": str(classes), "options": {"separater": ","}}, "did you mean 'separator'"),
        ({"dataset": "shapes", "options": {"moton": 1}}, "did you mean 'motions'"),
        ({"dataset": str(classes), "crops": 2}, "must be 1 or 3"),
        ({"dataset": str(classes), "sampling": "windo"}, "did you mean 'window'"),
        ({"dataset": str(classes), "sampling": "centred"}, "does not fit"),
        ({"dataset": "shapes", "options": {"label": "boxes"}, "crops": 3}, "a key frame has one view"),
        ({"dataset": str(classes), "num_frames": 0}, "num_frames must be at least 1"),
        ({"dataset": str(classes), "target_fps": 0}, "target_fps must be positive"),
        ({"dataset": str(classes), "std": [0.2, 0.2, 0.0]}, "std positive"),
    ):
        with pytest.raises(ZooError, match=message):
            small(**arguments)
    nowhere = small("kinetics400")  # known by its card, so that a recipe can be built
    assert (nowhere.num_classes, nowhere.kind, nowhere.sampling) == (400, "label", "window")
    with pytest.raises(ZooError, match="kinetics400 is read from a folder only: give its path as data_dir"):
        nowhere.source("train")
    with pytest.raises(ZooError, match="train_samples is 99"):
        small(classes, train_samples=99).source("train")
    assert len(small(classes, train_samples=3).source("train")) == 3


def _frame_rows(root: Path, labels: dict[str, list[str]]) -> list[str]:
    rows = ["original_vido_id video_id frame_id path labels"]
    for number, (video, each) in enumerate(labels.items()):
        (root / "frames" / video).mkdir(parents=True, exist_ok=True)
        for k, label in enumerate(each):
            Image.fromarray(grey(1, 16, 24, first=4 * k)[0]).save(root / "frames" / video / f"{k:06d}.png")
            rows.append(f'{video} {number} {k} frames/{video}/{k:06d}.png "{label}"')
    return rows


def test_charades_lists(tmp_path: Path) -> None:
    labels = {"x": ["0"] * 10 + ["0,2"] * 10 + [""] * 20, "y": ["156"] * 3}
    (tmp_path / "train.csv").write_text("\n".join(_frame_rows(tmp_path, labels)))
    shutil.copy(tmp_path / "train.csv", tmp_path / "val.csv")
    module = small("charades", data_dir=str(tmp_path), image_size=16, train_transform=V.VideoTrain(16, (1.0, 1.0)))
    assert (module.num_classes, module.kind, module.sampling) == (157, "labels", "strided")
    batch = next(iter(module.val_dataloader()))
    assert batch["label"].shape == (2, 157)
    assert batch["label"][0].nonzero()[:, 0].tolist() == [0, 2]  # of the whole video
    source = module.source("train")
    for first, last, expected in ((0, 9, [0]), (12, 15, [0, 2]), (30, 36, [])):
        spanned = source.label(0, torch.tensor([first, last]))
        assert spanned.nonzero()[:, 0].tolist() == expected
    (tmp_path / "train.csv").write_text('original_vido_id a b c d\nx 0 0 p.png "157"\n')
    with pytest.raises(ZooError, match="outside the 157 classes"):
        small("charades", data_dir=str(tmp_path)).source("train")
    for row, message in (("x 0 0 p.png", "train.csv:2: need 5 columns"), ('x 0 0 p.png "one"', "no whole numbers")):
        (tmp_path / "train.csv").write_text(f"original_vido_id a b c d\n{row}\n")
        with pytest.raises(ZooError, match=message):
            read_frame_list(tmp_path / "train.csv")


def test_something_something(tmp_path: Path) -> None:
    labels = {"101": [""] * 12, "102": [""] * 20, "103": [""] * 12}
    for part in ("train", "val"):
        (tmp_path / f"{part}.csv").write_text("\n".join(_frame_rows(tmp_path, labels)))
    ids = {"Pushing something": "1", "Holding something": "0"}
    (tmp_path / "something-something-v2-labels.json").write_text(json.dumps(ids))
    entries = [
        {"id": "102", "template": "Pushing [something]"}, {"id": "101", "template": "Holding [something]"},
        {"id": "999", "template": "Holding [something]"},
    ]  # fmt: skip
    for part in ("train", "validation"):
        (tmp_path / f"something-something-v2-{part}.json").write_text(json.dumps(entries))
    module = small(tmp_path, image_size=16, train_transform=V.VideoTrain(16, (1.0, 1.0), flip=0.0))
    assert (module.class_names, module.sampling, module.kind) == (list(ids)[::-1], "segment", "label")
    source = module.source("train")
    assert [(source.name(k), source.label(k)) for k in range(len(source))] == [("102", 1), ("101", 0)]
    batch = next(iter(module.val_dataloader()))
    frames = (batch["video"][0, 0].mean((1, 2)) * 0.225 + 0.45) * 255 / 4
    assert frames.round().int().tolist() == V.segment_indices(20, 4).tolist()
    entries[0]["template"] = "Pushng [something]"
    (tmp_path / "something-something-v2-train.json").write_text(json.dumps(entries))
    with pytest.raises(ZooError, match="did you mean 'Pushing something'"):
        small(tmp_path).source("train")


@pytest.fixture
def ava(tmp_path: Path) -> Path:
    """Two films with frames up to second 906, and a third without."""
    for folder in ("frame_lists", "annotations", "frames"):
        (tmp_path / folder).mkdir()
    rows = ["original_vido_id video_id frame_id path labels"]
    for number, video in enumerate(("v1", "v2")):
        (tmp_path / "frames" / video).mkdir()
        for k in range(185):
            if k % 2 == 0:
                Image.fromarray(grey(1, 24, 40, first=k, step=1)[0]).save(tmp_path / "frames" / video / f"{k}.png")
            rows.append(f'{video} {number} {k} {video}/{k - k % 2}.png ""')
    for part in ("train", "val"):
        (tmp_path / "frame_lists" / f"{part}.csv").write_text("\n".join(rows))
    notes = tmp_path / "annotations"
    truth = [
        "v1,0902,0.1,0.2,0.5,0.6,12,1", "v1,0902,0.1,0.2,0.5,0.6,80,1", "v1,0902,0.6,0.2,0.9,0.6,13,2",
        "v1,0904,0.1,0.2,0.5,0.6,12,1", "v2,0904,0.0,0.0,1.0,1.0,12,1", "v2,0906,0.0,0.0,1.0,1.0,12,1",
        "v9,0904,0.0,0.0,1.0,1.0,12,1", "v1,0899,0.0,0.0,1.0,1.0,12,1",
    ]  # fmt: skip
    for part in ("train", "val"):
        (notes / f"ava_{part}_v2.2.csv").write_text("\n".join(truth))
    (notes / "ava_val_excluded_timestamps_v2.2.csv").write_text("v2,0906\n")
    (notes / "ava_action_list_v2.2_for_activitynet_2018.pbtxt").write_text(
        'item {\n  name: "stand"\n  id: 12\n}\nlabel {\n  name: "walk"\n  label_id: 13\n}\n'
    )
    return tmp_path


def test_ava(ava: Path) -> None:
    module = small("ava", data_dir=str(ava), image_size=24, train_transform=V.VideoTrain(24, (1.0, 1.0), flip=0.0))
    with pytest.warns(UserWarning, match="1 annotated videos are not in train.csv, first: v9"):
        source = module.source("train")
    assert (module.num_classes, module.kind, module.sampling) == (80, "boxes", "centred")
    assert [source.name(k) for k in range(len(source))] == ["v1,0902", "v1,0904", "v2,0904", "v2,0906"]
    key = source.keyframe(0)
    assert key["frame"] == 60
    assert key["labels"].nonzero().tolist() == [[0, 11], [0, 79], [1, 12]]  # all classes train
    assert key["true_labels"].tolist() == [11, 12]  # those of the label map are scored
    batch = next(iter(module.train_dataloader()))
    assert set(batch) == {"video", "target", "video_id", "view", "index"}
    target = batch["target"][0]
    pixels = target["original_boxes"] * torch.tensor([40.0, 24.0, 40.0, 24.0])
    assert target["boxes"].shape == pixels.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [module.source("val").name(k) for k in range(2)] == ["v1,0904", "v2,0904"]  # every fourth second
        assert len(module.source("val")) == 2
        assert len(module.source("test")) == 3  # one is excluded
        (ava / "annotations" / "ava_val_predicted_boxes.csv").write_text(
            "v1,0902,0.1,0.2,0.5,0.6,,0.9\nv1,0902,0.1,0.2,0.5,0.7,-1,0.95\n"
            "v1,0903,0.1,0.2,0.5,0.6,,0.99\nv2,0904,0.1,0.2,0.5,0.6,,0.5\n"
        )
        module = small("ava", data_dir=str(ava), image_size=24, clips=1)
        test = module.source("test")
        names = {test.name(k): test.keyframe(k) for k in range(len(test))}
    assert list(names) == ["v1,0902", "v1,0903", "v1,0904", "v2,0904"]  # detected or true
    assert [len(names[n]["boxes"]) for n in names] == [2, 1, 0, 0]  # the last is below the threshold
    assert [len(names[n]["true_boxes"]) for n in names] == [2, 0, 1, 1]
    frames = next(iter(module.test_dataloader()))["video"][0, 0].mean((1, 2)) * 0.225 + 0.45
    picked = V.centred_indices(60, 4, 2, 185)
    assert (frames * 255).round().int().tolist() == (picked - picked % 2).tolist()


def test_ava_lists_with_mistakes(ava: Path) -> None:
    notes = ava / "annotations"
    for row, message in (
        ("v1,0902,0.1,0.2,0.5,0.6,81,1", "action 81 is outside 1..80"),
        ("v1,0902,0.1,0.2", "need video,second"),
        ("v1,0902,a,0.2,0.5,0.6,1,1", "need video,second"),
    ):
        (notes / "ava_train_v2.2.csv").write_text(row + "\n")
        with pytest.raises(ZooError, match=f"ava_train_v2.2.csv:1: .*{message}"):
            read_ava_boxes([notes / "ava_train_v2.2.csv"])
    (notes / "map.pbtxt").write_text('name: "x"\nid: two\n')
    with pytest.raises(ZooError, match=r"map.pbtxt:2: the number 'two' of 'x'"):
        read_label_map(notes / "map.pbtxt")
    (notes / "ava_train_v2.2.csv").write_text("v9,0904,0.0,0.0,1.0,1.0,12,1\n")
    with pytest.raises(ZooError, match="no key frame of split 'train'"), pytest.warns(UserWarning, match="v9"):
        open_part(open_layout("ava", str(ava)), "train")


# --------------------------------------------------------------------------------------------- what cannot be read


@pytest.fixture
def damaged(classes: Path, tmp_path: Path) -> Path:
    """The same two classes as a list, with a missing, an empty and a cut video."""
    shutil.copytree(classes, tmp_path / "set")
    root = tmp_path / "set"
    (root / "a" / "1.mp4").write_bytes(b"")
    whole = (root / "b" / "2.mp4").read_bytes()
    (root / "b" / "2.mp4").write_bytes(whole[:-200] + bytes(200))
    (root / "b" / "4.mp4").unlink()
    rows = [f"{name}/{k}.mp4 {label}" for label, name in enumerate("ab") for k in range(6)]
    for part in ("train", "val"):
        (root / f"{part}.csv").write_text("\n".join(rows))
    return root


BAD = {1, 8, 10}


def _epoch(module: VideoDataModule) -> dict[int, torch.Tensor]:
    batches = list(module.train_dataloader())
    return {int(i): video for batch in batches for i, video in zip(batch["index"], batch["video"], strict=True)}


def test_training_puts_others_in_the_place_of_what_cannot_be_read(classes: Path, damaged: Path) -> None:
    rows = [f"{name}/{k}.mp4 {label}" for label, name in enumerate("ab") for k in range(6)]
    (damaged / "whole.csv").write_text("\n".join(f"{classes}/{row}" for row in rows))
    (damaged / "broken.csv").write_text("\n".join(rows))
    whole = VideoSet(_all(damaged / "whole.csv"), *_SETTINGS)
    broken = VideoSet(_all(damaged / "broken.csv"), *_SETTINGS)
    keys = [(k, 3, 0) for k in range(12)]
    expected, found = whole.__getitems__(keys), broken.__getitems__(keys)
    assert found["index"].tolist() == list(range(12))
    assert len(found["lost"]) >= 3
    for k in range(12):
        assert torch.equal(expected["video"][k], found["video"][k]) == (k not in BAD)
    again = broken.__getitems__(keys[::-1])
    assert torch.equal(again["video"].flip(0), found["video"])
    module = small(damaged)
    with pytest.warns(UserWarning, match="3 videos could not be read, others took their place; first: .*mp4"):
        videos = _epoch(module)
    assert len(videos) == 12


_SETTINGS = (V.VideoTrain(32, (1.0, 1.2)), 4, 2, 30.0, "window", True, 1, 1, (0.45,) * 3, (0.225,) * 3)


def _all(path: Path) -> object:
    return open_part(open_layout(str(path)), "predict")


def test_evaluation_leaves_them_out(damaged: Path) -> None:
    module = small(damaged, clips=2, crops=3, eval_batch_size=6)
    with pytest.warns(UserWarning, match="3 videos could not be read, their views are left out"):
        batches = list(module.test_dataloader())
    assert all(len(batch["video"]) == len(batch["index"]) == 6 for batch in batches)
    assert {int(v) for batch in batches for v in batch["video_id"]} == set(range(12)) - BAD
    assert {int(v) for batch in batches for v in batch["view"]} == set(range(6))


def test_short_videos_can_be_asked_to_stay_out(classes: Path) -> None:
    write_video(classes / "a" / "short.mp4", grey(3))
    try:
        repeated = next(iter(small(classes / "a", batch_size=7).predict_dataloader()))
        assert len(repeated["video"]) == 7  # its frames repeat
        with pytest.warns(UserWarning, match="1 video could not be read"):
            assert (
                sum(len(b["index"]) for b in small(classes / "a", options={"min_frames": 8}).predict_dataloader()) == 6
            )
    finally:
        (classes / "a" / "short.mp4").unlink()


def test_a_set_that_is_not_there_stops_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("".join(f"{k}.mp4 0\n" for k in range(30)))
    with pytest.raises(ZooError, match="10 videos in a row cannot be read, the last: no such video"):
        small(tmp_path).samples("train").__getitems__([(0, 0, 0)])


def test_data_check_looks_at_videos(damaged: Path, classes: Path) -> None:
    report = check.check(str(damaged))
    assert report["splits"]["train"]["unreadable"] == 3
    assert any("3 unreadable samples" in line for line in report["problems"])
    report = check.check(str(classes))
    assert report["classes"] == ["a", "b"]
    assert not [line for line in report["problems"] if "unreadable" in line]
    assert report["sha256"]


def test_data_check_counts_several_labels(ava: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = check.check("ava", str(ava))
    assert report["splits"]["train"]["per_class"] == {"11": 4, "12": 1}


# ---------------------------------------------------------------------------------------------------- order and seeds


@pytest.mark.parametrize("dataset", ["files", "shapes"])
def test_workers_change_nothing(classes: Path, dataset: str) -> None:
    where = classes if dataset == "files" else "shapes"
    options = {} if dataset == "files" else {"train_samples": 12, "train_transform": V.VideoTrain(32, flip=0.0)}
    alone = list(small(where, **options).train_dataloader())
    shared = list(small(where, **options, num_workers=2).train_dataloader())
    assert len(alone) == len(shared) > 4
    for one, two in zip(alone, shared, strict=True):
        for name in one:
            assert torch.equal(one[name], two[name])
    other = next(iter(small(where, **options, seed=1).train_dataloader()))
    assert not torch.equal(other["video"], alone[0]["video"])


def test_a_resumed_epoch_goes_on(classes: Path) -> None:
    whole = list(small(classes).train_dataloader())
    loader = small(classes).train_dataloader()
    begun = iter(loader)
    first = [next(begun) for _ in range(2)]
    state = loader.state_dict()
    resumed = small(classes).train_dataloader()
    resumed.load_state_dict(state)
    for one, two in zip(whole, [*first, *resumed], strict=True):
        assert torch.equal(one["video"], two["video"])


def test_repeats_give_several_clips_of_a_video(classes: Path) -> None:
    module = small(classes, repeats=2, train_transform=V.VideoTrain(24, (1.0, 1.5)))
    batch = next(iter(module.train_dataloader()))
    assert batch["index"][0] == batch["index"][1]
    assert not torch.equal(batch["video"][0], batch["video"][1])


def test_drawing_leaves_the_global_generator_alone(classes: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for where in (classes, "shapes"):
        small(where).samples("train").__getitems__([(0, 0, 0)])
    assert torch.equal(before, torch.random.get_rng_state())


def test_ranks_share_the_views(classes: Path) -> None:
    from zoo.data.loader import ExactSampler

    views = small(classes, clips=2, crops=3).samples("predict")
    assert len(views) == 12 * 6
    parts = [list(ExactSampler(len(views), rank, 5)) for rank in range(5)]
    assert sorted(index for part in parts for index in part) == list(range(72))
    one = views.__getitems__([6 * 3 + 4])
    assert (int(one["video_id"]), int(one["view"])) == (3, 4)  # second clip, middle crop
    together = views.__getitems__(list(range(18, 24)))
    assert torch.equal(one["video"][0], together["video"][4])


def test_thirty_views_are_the_papers(tmp_path: Path) -> None:
    """10 clips of a video times 3 crops: which frames and columns each view holds."""
    wide = np.zeros((50, 32, 64, 3), np.uint8)
    wide[:] = 4 * np.arange(50, dtype=np.uint8)[:, None, None, None]
    wide[:, :, :8] = 250  # the left edge is bright
    write_video(tmp_path / "a.mp4", wide)
    views = read_views(tmp_path / "a.mp4", 4, 2, V.VideoEval(32), clips=10, crops=3)
    assert views.shape == (30, 3, 4, 32, 32)
    module = small(tmp_path, clips=10, crops=3, eval_batch_size=30)
    batch = next(iter(module.predict_dataloader()))
    for view, video in zip(batch["view"].tolist(), batch["video"], strict=True):
        clip, crop = divmod(view, 3)
        start, end = V.clip_window(50, 8, clip, 10)
        frames = ((video[0, :, :, 20:].mean((1, 2)) * 0.225 + 0.45) * 255 / 4).round().int()
        assert frames.tolist() == V.spread_indices(start, end, 4, 50).tolist()
        assert bool((video[0, 0, :, :6] * 0.225 + 0.45 > 0.9).all()) == (crop == 0)
    with pytest.raises(VideoError):
        read_views(tmp_path / "gone.mp4", 4, 2, V.VideoEval(32))


def test_shapes_options_reach_the_world() -> None:
    module = VideoDataModule(num_frames=8, sampling_rate=2, image_size=24, train_samples=6, batch_size=3)
    assert module.source("train").knobs.frames == 16
    assert (module.num_classes, module.image_size, len(module.source("val"))) == (12, 24, 1000)
    batch = next(iter(module.train_dataloader()))
    assert batch["video"].shape == (3, 3, 8, 24, 24)
    many = VideoDataModule(num_frames=4, image_size=24, options={"label": "motions", "max_objects": 3})
    assert next(iter(many.val_dataloader()))["label"].shape == (8, 12)
    boxes = VideoDataModule(num_frames=4, image_size=24, options={"label": "boxes", "max_objects": 3})
    batch = next(iter(boxes.val_dataloader()))
    for target in batch["target"]:
        assert len(target["boxes"]) == len(target["labels"]) == len(target["original_boxes"]) >= 1
        assert float(target["boxes"].max()) <= 24
