"""Videos that give any of their frames: files by PyAV or TorchCodec, folders of pictures, arrays.

A reader knows its length and rate, and decodes only what is asked for, so that a stretch of an hour costs no more than
one of a minute. Frames are numbered in the order in which they are shown, whatever their spacing in time. Sound will be
read from the same files, and find its place in a batch under `audio`.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from zoo.data.sources import EXTENSIONS as PICTURES
from zoo.data.sources import read_image
from zoo.errors import MissingPackage, ZooError, unknown

EXTENSIONS = (
    *(".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".ogv"),
)
BACKENDS = ("pyav", "torchcodec")
_SEEK = 12  # frames that are decoded and thrown away rather than seeking past them
_HIDDEN = ("vp8", "theora")  # have packets that show nothing


class VideoError(ZooError):
    """A video that cannot be read; a data module leaves it out and counts it."""


class VideoReader(Protocol):
    """A video: `num_frames`, frames a second `fps`, `duration` in seconds."""

    @property
    def num_frames(self) -> int: ...

    @property
    def fps(self) -> float: ...

    @property
    def duration(self) -> float: ...

    def frames_at(self, indices: Sequence[int] | Tensor) -> Tensor:
        """uint8 (T, H, W, 3) RGB of the frames with these numbers, in this order; they may repeat."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


def _checked(indices: Sequence[int] | Tensor, num_frames: int, name: str) -> list[int]:
    wanted = [int(k) for k in indices]
    if not wanted or min(wanted) < 0 or max(wanted) >= num_frames:
        raise ZooError(f"{name}: frames are numbered 0..{num_frames - 1}, asked for {wanted[:8]}")
    return wanted


class ArrayReader:
    """Frames held in memory, uint8 (N, H, W, 3)."""

    def __init__(self, frames: Tensor, fps: float = 30.0) -> None:
        self._frames, self.fps = frames, fps
        self.num_frames, self.duration = len(frames), len(frames) / fps

    def frames_at(self, indices: Sequence[int] | Tensor) -> Tensor:
        return self._frames[_checked(indices, self.num_frames, "array")]

    def close(self) -> None:
        """Nothing to close."""


class PicturesReader:
    """A video as picture files, one a frame.

    Args:
        paths: the files in order.
        fps: frames a second that they were taken at.

    Raises:
        VideoError: there are none; when frames are read, a file is missing, broken or of another size.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], fps: float = 30.0) -> None:
        if not len(paths):
            raise VideoError("a video without pictures")
        self.paths, self.fps = paths, fps
        self.num_frames, self.duration = len(paths), len(paths) / fps

    def frames_at(self, indices: Sequence[int] | Tensor) -> Tensor:
        wanted = _checked(indices, self.num_frames, os.path.dirname(self.paths[0]))
        try:
            once = {k: read_image(self.paths[k]) for k in set(wanted)}
        except ZooError as error:
            raise VideoError(str(error)) from error
        if len({image.shape for image in once.values()}) > 1:
            raise VideoError(f"{os.path.dirname(self.paths[0])}: pictures of different sizes")
        return torch.stack([once[k] for k in wanted]).permute(0, 2, 3, 1)

    def close(self) -> None:
        """Nothing to close."""


class _Packet(NamedTuple):
    """What a file says of a packet of its video; times in the stream's unit."""

    pts: int | None
    dts: int | None
    size: int
    key: bool
    discarded: bool
    corrupt: bool


class PyAVReader:
    """A video file through PyAV, whose wheels bring FFmpeg along; frame k is the k-th of decoding it from the start.

    The file's packets are listed first, without decoding, and numbered by the times at which they are shown. What an
    edit list cuts off is not counted, though decoding may begin there. Where times cannot tell (absent, doubled, going
    back, guessed as AVI's are with B-frames; a file that begins between key frames or is damaged), the file is decoded
    once and its frames are numbered as they come.

    To read frames it goes to the last key frame before them and decodes on from there. Containers seek to other places
    than they were asked for, so packets are known again by times and size, and every decoded frame has to be the one
    that is due; else decoding begins further back, and at last at the beginning. Frames are turned as the file says
    they are to be shown.

    Args:
        path: the file.
        threads: of the decoder; 1 leaves the cores to loading processes.

    Raises:
        VideoError: no such file, no video in it, or broken; also when frames are read.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        try:
            import av
        except ImportError as error:
            raise MissingPackage("reading videos needs PyAV: pip install av") from error
        self.path, self._av, self._threads = os.fspath(path), av, threads
        self._container: Any = None
        self._trouble = ""  # the last thing that demuxer or decoder complained of
        if not os.path.isfile(self.path):
            raise VideoError(f"no such video {self.path}")
        self._open()
        try:
            self._packets = [
                _Packet(p.pts, p.dts, p.size, p.is_keyframe, p.is_discard, p.is_corrupt) for p in self._demux()
            ]
            self._places: dict[Any, int | None] = {}  # None: several packets look like this
            for place, packet in enumerate(self._packets):
                self._places[packet[:3]] = None if packet[:3] in self._places else place
            if not self._number_by_times():
                self._number_by_decoding()
        except BaseException:
            self.close()
            raise
        if not self.num_frames:
            self.close()
            raise VideoError(f"{self.path} has no frames" + (f": {self._trouble}" if self._trouble else ""))
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else 30.0
        self.duration = self.num_frames / self.fps

    def _open(self) -> None:
        """Open the file, anew where it is open."""
        self.close()
        try:
            self._container = self._av.open(self.path, metadata_errors="replace")
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"cannot open {self.path}: {_reason(error)}") from error
        cover = self._av.stream.Disposition.attached_pic
        streams = [stream for stream in self._container.streams.video if not stream.disposition & cover]
        if not streams:
            self.close()
            raise VideoError(f"{self.path} has no video stream")
        self._stream = streams[0]
        self._stream.codec_context.thread_count = self._threads
        self._stream.codec_context.copy_opaque = True  # a frame names the packet that it came from

    # -------------------------------------------------------------------------------------------------------- numbering

    def _number_by_times(self) -> bool:
        """Number the frames by when they are shown; False where the times cannot be trusted with that."""
        packets, times = self._packets, [packet.pts for packet in self._packets if packet.pts is not None]
        decoded = [packet.dts for packet in packets if packet.dts is not None]
        if not packets or not packets[0].key or self._trouble or any(packet.corrupt for packet in packets):
            return False
        if len(set(times)) < len(packets) or any(b <= a for a, b in itertools.pairwise(decoded)):
            return False
        if "avi" in self._container.format.name.split(",") and any(p.pts != p.dts for p in packets):
            return False  # its times are those of decoding
        if self._stream.codec_context.name in _HIDDEN:
            return False
        shown = sorted((time, place) for place, time in enumerate(times) if not packets[place].discarded)
        at = [time for time, _ in shown]
        if not shown or (at[0] < times[0] and not packets[0].discarded):
            return False
        self._by_times, self._misnumbered = True, False
        self._take([place for _, place in shown], lambda place: bisect.bisect_left(at, times[place]))
        return True

    def _number_by_decoding(self) -> None:
        """Number the frames as decoding the whole file gives them."""
        self._open()
        self._by_times = self._misnumbered = damaged = False
        order, self._trouble = [], ""
        for frame in self._frames(enumerate(self._demux())):
            order.append(_place(frame))
            damaged |= frame.is_corrupt
        places = {place: k for k, place in enumerate(order)}
        seekable = not damaged and not self._trouble and None not in places and len(places) == len(order)
        self._take(order, lambda place: places.get(place) if seekable else None)

    def _take(self, order: list[int | None], first_from: Callable[[int], int | None]) -> None:
        """Frames 0, 1, ... are those of packets `order`; `first_from`: which frame comes first from a key packet."""
        self.num_frames = len(order)
        self._number = {place: k for k, place in enumerate(order)}
        keys = [place for place, packet in enumerate(self._packets) if packet.key and place]
        starts = [(first, place) for place in keys if (first := first_from(place)) is not None]
        self._starts = [(0, 0), *sorted(starts)]

    # ---------------------------------------------------------------------------------------------------------- reading

    def frames_at(self, indices: Sequence[int] | Tensor) -> Tensor:
        """uint8 (T, H, W, 3) RGB of the frames with these numbers, in this order; they may repeat."""
        wanted = _checked(indices, self.num_frames, self.path)
        found: dict[int, np.ndarray] = {}
        try:
            self._read(sorted(set(wanted)), found)
        except (self._av.error.FFmpegError, ValueError) as error:
            raise VideoError(f"cannot decode {self.path}: {_reason(error)}") from error
        if len({frame.shape for frame in found.values()}) > 1:
            raise VideoError(f"{self.path}: frames of different sizes")
        first = found[wanted[0]]
        out = torch.empty(len(wanted), *first.shape, dtype=torch.uint8)
        for place, k in zip(out.numpy(), wanted, strict=True):
            place[:] = found[k]
        return out

    def _read(self, todo: list[int], found: dict[int, np.ndarray]) -> None:
        while todo:
            end = self._start_before(todo[0]) + 1
            for first, place in dict.fromkeys([*self._starts[max(0, end - 2) : end][::-1], (0, 0)]):
                if self._decode(first, place, todo, found):
                    break
            else:
                if not self._misnumbered:
                    raise VideoError(f"{self.path} breaks off at frame {todo[0]} of {self.num_frames}")
                self._number_by_decoding()
                if todo[-1] >= self.num_frames:
                    raise VideoError(f"{self.path} has {self.num_frames} frames, fewer than its packets")
            todo = [k for k in todo if k not in found]

    def _decode(self, first: int, place: int, todo: list[int], found: dict[int, np.ndarray]) -> bool:
        """Decode from packet `place` on, whose first frame is `first`, and keep what is asked for; was anything found?

        Ends at the last one, before a key frame from which the next one is nearer, or where another frame comes than
        is due. After a seek a decoder may keep back frames until it has recovered; a frame that is missing even when
        decoding from the beginning is lost, and the next one stands for it.
        """
        due, at, self._trouble = first, 0, ""
        for frame in self._frames(self._packets_from(place)):
            number = self._number.get(_place(frame), -1) if place or self._by_times else due
            if place and number < first:
                continue  # shown before the key frame: what it is predicted from may be missing
            if place and (frame.is_corrupt or self._trouble or number > (todo[0] if due == first else due)):
                break
            if number < due:
                self._misnumbered = not place
                break
            if number >= todo[at]:
                picture = self._picture(frame)
                while at < len(todo) and todo[at] <= number:
                    found[todo[at]] = picture
                    at += 1
                if at == len(todo) or self._starts[self._start_before(todo[at])][0] - number > _SEEK:
                    break
            due = number + 1
        return at > 0

    def _start_before(self, number: int) -> int:
        """The last of the places to begin at from which frame `number` is reached."""
        return bisect.bisect_right(self._starts, (number, len(self._packets))) - 1

    def _packets_from(self, place: int) -> Iterator[tuple[int, Any]]:
        """The packets from number `place` on and their numbers, wherever the container's seek leads."""
        for _, key in [start for start in self._starts[1:] if start[1] <= place][:-3:-1]:
            time = self._packets[key].dts if self._packets[key].dts is not None else self._packets[key].pts
            try:
                self._container.seek(time, stream=self._stream, backward=True)
            except self._av.error.FFmpegError:
                continue
            packets = self._recognised()
            begin = next(packets, None)
            if begin is not None and begin[0] <= place:
                yield from itertools.dropwhile(lambda one: one[0] < place, itertools.chain([begin], packets))
                return
        self._open()
        yield from itertools.islice(enumerate(self._demux()), place, None)

    def _recognised(self) -> Iterator[tuple[int, Any]]:
        """The packets after a seek, from the first one that is known, with their numbers."""
        place: int | None = None
        for packet in self._demux():
            place = self._places.get((packet.pts, packet.dts, packet.size)) if place is None else place + 1
            if place is None:
                continue
            if place >= len(self._packets) or packet.size != self._packets[place].size:
                self._trouble = "packets come in another order"
                return
            yield place, packet

    def _demux(self) -> Iterator[Any]:
        """The video's packets from here on, up to the first that cannot be read."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:
                    yield packet
        except self._av.error.FFmpegError as error:
            self._trouble = _reason(error)

    def _frames(self, packets: Iterable[tuple[int, Any]]) -> Iterator[Any]:
        """What the decoder makes of numbered packets; those it cannot decode are passed over, as players do."""
        for place, packet in itertools.chain(packets, [(-1, None)]):
            if packet is not None:
                packet.opaque = (place,)  # an object of its own: PyAV tells them apart by identity
            try:
                yield from self._stream.codec_context.decode(packet)
            except self._av.error.FFmpegError as error:
                self._trouble = _reason(error)

    def _picture(self, frame: Any) -> np.ndarray:
        picture = frame.to_ndarray(format="rgb24")
        quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4  # anticlockwise
        return np.rot90(picture, quarter_turns) if quarter_turns else picture

    def close(self) -> None:
        """Let go of the file."""
        if self._container is not None:
            self._container.close()


class TorchCodecReader:
    """A video file through TorchCodec, which needs FFmpeg's libraries on the system.

    Raises:
        VideoError: the file cannot be read.
        ZooError: TorchCodec cannot be imported.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, RuntimeError, OSError) as error:
            raise ZooError(f"torchcodec cannot be used here: {_reason(error)}; take pyav") from error
        self.path = os.fspath(path)
        try:
            self._decoder = VideoDecoder(self.path, dimension_order="NHWC", num_ffmpeg_threads=threads)
        except (RuntimeError, ValueError, OSError) as error:
            raise VideoError(f"cannot open {self.path}: {_reason(error)}") from error
        self.num_frames = len(self._decoder)
        self.fps = float(self._decoder.metadata.average_fps or 30.0)
        self.duration = self.num_frames / self.fps
        if not self.num_frames:
            raise VideoError(f"{self.path} has no frames")

    def frames_at(self, indices: Sequence[int] | Tensor) -> Tensor:
        """uint8 (T, H, W, 3) RGB of the frames with these numbers, in this order; they may repeat."""
        wanted = _checked(indices, self.num_frames, self.path)
        try:
            return self._decoder.get_frames_at(wanted).data
        except (RuntimeError, IndexError) as error:
            raise VideoError(f"cannot decode {self.path}: {_reason(error)}") from error

    def close(self) -> None:
        """Nothing to close: the decoder closes with the object."""


def _place(frame: Any) -> int | None:
    """The number of the packet that a frame came from."""
    return None if frame.opaque is None else frame.opaque[0]


def _reason(error: BaseException) -> str:
    text = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return text[0] if text else type(error).__name__


def is_video(name: str) -> bool:
    """Does a file's name say that it is a video?"""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def pictures_in(folder: str | os.PathLike[str]) -> list[str]:
    """The picture files of a folder, in the order of their names."""
    with os.scandir(folder) as entries:
        return sorted(e.path for e in entries if e.name.lower().endswith(PICTURES) and not e.name.startswith("."))


def open_video(path: str | os.PathLike[str], backend: str | None = None, fps: float = 30.0) -> VideoReader:
    """A reader for a video file, or for a folder of pictures.

    Args:
        path: the file or folder.
        backend: "pyav" or "torchcodec"; None: PyAV.
        fps: at which a folder's pictures were taken.

    Raises:
        VideoError: it cannot be read.
        ZooError: an unknown backend, or one that is not installed.
    """
    if backend is not None and backend not in BACKENDS:
        raise unknown("video backend", backend, BACKENDS)
    if Path(path).is_dir():
        pictures = pictures_in(path)
        if not pictures:
            raise VideoError(f"{os.fspath(path)} holds no pictures")
        return PicturesReader(pictures, fps)
    return TorchCodecReader(path) if backend == "torchcodec" else PyAVReader(path)
