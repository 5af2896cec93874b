"""Every frame of a video file is the one that decoding the whole file gives, in any container, however it was cut."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from zoo.data.video_reader import PyAVReader, VideoError

av = pytest.importorskip("av")

COUNT, RATE = 70, 30
OPEN = {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal:scenecut=0:keyint=30:min-keyint=30"}
REFRESH = {"x264-params": "intra-refresh=1:bframes=0:keyint=30"}
HIDDEN = {"lag-in-frames": "16", "auto-alt-ref": "1"}
WRITTEN = [  # container, codec, B-frames, options
    *((end, "libx264", 2, {}) for end in ("mp4", "mov", "mkv", "ts", "avi", "flv")),
    *((end, "libx264", 3, OPEN) for end in ("mp4", "mkv", "ts", "avi")),
    *((end, "libx264", 0, REFRESH) for end in ("mp4", "ts")),
    *((end, "mpeg2video", 2, {}) for end in ("mpg", "ts", "avi")),
    *((end, "mpeg4", 2, {}) for end in ("avi", "mp4")),
    ("mpg", "mpeg1video", 2, {}),
    ("avi", "mpeg4", 0, {}),
    ("avi", "mjpeg", 0, {}),
    ("webm", "libvpx-vp9", 0, HIDDEN),
    ("webm", "libvpx", 0, HIDDEN),
]


def write(
    path: Path,
    codec: str = "libx264",
    b_frames: int = 2,
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    sound: str | None = None,
) -> Path:
    """Moving noise, a key frame every thirtieth; `times` in milliseconds."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    blocks = np.kron(np.random.default_rng(0).integers(0, 128, (6, 30, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 30
        stream.options = {"bf": str(b_frames), **(options or {})} if codec != "mjpeg" else {}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        other = container.add_stream(sound, rate=44100) if sound else None
        for k in range(COUNT):
            picture = np.ascontiguousarray(np.roll(blocks, -3 * k, 1)[:, :64]) + np.uint8(k)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (k, Fraction(1, RATE)) if times is None else (times[k], Fraction(1, 1000))
            container.mux(stream.encode(frame))
            if other is not None:
                noise = av.AudioFrame.from_ndarray(np.zeros((1, 1470), np.float32), format="fltp", layout="mono")
                noise.sample_rate, noise.pts, noise.time_base = 44100, 1470 * k, Fraction(1, 44100)
                container.mux(other.encode(noise))
        container.mux(stream.encode())
        if other is not None:
            container.mux(other.encode())
    return path


def cut(source: Path, to: Path, start: float, length: float, at_key: bool = True, shift: float = 0) -> Path:
    """Some of the packets as they are, as ``ffmpeg -ss START -i SOURCE -t LENGTH -c copy`` does; without `at_key` from
    the middle of a group of pictures."""
    with av.open(str(source)) as file, av.open(str(to), "w") as out:
        stream = file.streams.video[0]
        copy, first = out.add_stream_from_template(stream), round(start / stream.time_base) + (stream.start_time or 0)
        if at_key:
            file.seek(first, stream=stream)
        for packet in file.demux(stream):
            if not packet.size or packet.dts is None or (not at_key and packet.pts < first):
                continue
            if packet.dts >= first + length / stream.time_base:
                break
            packet.pts -= first - round(shift / stream.time_base)
            packet.dts -= first - round(shift / stream.time_base)
            packet.stream = copy
            out.mux(packet)
    return to


def decoded(path: Path) -> np.ndarray:
    """What decoding from beginning to end gives, passing over what cannot be decoded."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in list(container.demux(stream)):
            try:
                frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
            except av.error.FFmpegError:
                continue
    return np.stack(frames)


def check(path: Path, count: int | None = None) -> None:
    """Whole, alone in any order, and in stretches with gaps."""
    truth, reader = decoded(path), PyAVReader(path)
    assert reader.num_frames == len(truth) == (len(truth) if count is None else count)
    order = np.random.default_rng(1).permutation(len(truth)).tolist()
    wrong = [k for k in order[:24] if not np.array_equal(reader.frames_at([k])[0].numpy(), truth[k])]
    assert wrong == []
    for wanted in (range(len(truth)), [0, len(truth) - 1], sorted(order[:4])):
        assert np.array_equal(reader.frames_at(list(wanted)).numpy(), truth[list(wanted)])
    fresh = PyAVReader(path)
    last = len(truth) * 2 // 3
    assert np.array_equal(fresh.frames_at([last])[0].numpy(), truth[last])
    reader.close()
    fresh.close()


@pytest.mark.parametrize(("end", "codec", "b_frames", "options"), WRITTEN)
def test_frames_are_those_of_a_sequential_decode(
    tmp_path: Path, end: str, codec: str, b_frames: int, options: dict[str, str]
) -> None:
    check(write(tmp_path / f"a.{end}", codec, b_frames, options), COUNT)


@pytest.mark.parametrize("end", ["mp4", "ts", "mkv"])
def test_uneven_times_and_sound_beside(tmp_path: Path, end: str) -> None:
    times = np.cumsum([0, *(20 + (np.arange(COUNT - 1) * 37) % 90)]).tolist()
    check(write(tmp_path / f"uneven.{end}", times=times), COUNT)
    check(write(tmp_path / f"sound.{end}", sound="aac"), COUNT)


@pytest.mark.parametrize("options", [{}, OPEN], ids=["closed", "open"])
def test_files_cut_by_packets(tmp_path: Path, options: dict[str, str]) -> None:
    source = write(tmp_path / "a.mp4", options=options)
    for end in ("mp4", "mov"):  # an edit list hides the frames before the cut
        check(cut(source, tmp_path / f"cut.{end}", 1.5, 0.7), 23)
    check(cut(source, tmp_path / "late.mp4", 1, 1, shift=3.2))
    check(cut(source, tmp_path / "early.mkv", 1, 1, shift=-0.4))
    if options:
        return  # a decoder makes nothing of an open group without its beginning
    for end in ("mkv", "mp4", "ts"):
        check(cut(source, tmp_path / f"between.{end}", 0.5, 1.6, at_key=False))
    check(cut(source, tmp_path / "cut.mkv", 1.5, 0.7))
    source = write(tmp_path / "a.avi", "mpeg4")
    check(cut(source, tmp_path / "cut.avi", 1.5, 0.7))
    check(cut(source, tmp_path / "between.avi", 0.5, 1.6, at_key=False))


def test_joined_and_broken_files(tmp_path: Path) -> None:
    for end, codec in (("ts", "libx264"), ("mpg", "mpeg2video")):
        whole = write(tmp_path / f"a.{end}", codec).read_bytes()
        (tmp_path / f"twice.{end}").write_bytes(whole * 2)  # its times go back
        check(tmp_path / f"twice.{end}", 2 * COUNT)
    for end, codec in (("ts", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("mpg", "mpeg2video")):
        whole = write(tmp_path / f"a.{end}", codec).read_bytes()
        (tmp_path / f"cut.{end}").write_bytes(whole[: len(whole) * 7 // 10])
        check(tmp_path / f"cut.{end}")


def test_a_frame_that_is_lost_is_the_next_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", "mpeg4", 0)
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        victims, order = packets[40:43], sorted(p.pts for p in packets)
    data = bytearray(path.read_bytes())
    for victim in victims:
        data[victim.pos : victim.pos + 24] = bytes(24)
    path.write_bytes(data)
    truth, lost = decoded(path), {order.index(victim.pts) for victim in victims}
    place = np.cumsum([k not in lost for k in range(COUNT)]) - 1
    assert len(truth) == COUNT - len(lost)
    for wanted in (range(COUNT), [69], [50], [min(lost)], [20, 41, 65]):
        reader = PyAVReader(path)  # whatever was read before
        given = reader.frames_at(list(wanted)).numpy()
        assert reader.num_frames == COUNT
        assert all(np.array_equal(given[i], truth[place[k] + (k in lost)]) for i, k in enumerate(wanted))
    for packet in packets[-3:]:
        data[packet.pos : packet.pos + 24] = bytes(24)
    path.write_bytes(data)
    with pytest.raises(VideoError, match="breaks off at frame"):
        PyAVReader(path).frames_at([COUNT - 1])


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path)
    with av.open(str(path)) as file, av.open(str(tmp_path / "cover.mp4"), "w") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        copy = out.add_stream_from_template(file.streams.video[0])
        out.mux(cover.encode(av.VideoFrame(16, 16, "yuvj420p")))
        out.mux(cover.encode())
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
    reader = PyAVReader(tmp_path / "cover.mp4")
    assert reader.num_frames == COUNT
    assert reader.frames_at([3]).shape == (1, 48, 64, 3)
