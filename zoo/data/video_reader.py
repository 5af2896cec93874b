"""Videos that give any of their frames: files by PyAV or TorchCodec, folders of pictures, arrays.

A reader knows its length and rate, and decodes only what is asked for, so that a stretch of an hour costs no more than
one of a minute. Frames are numbered in the order in which they are shown, whatever their spacing in time. Sound will be
read from the same files, and find its place in a batch under `audio`.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

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


class PyAVReader:
    """A video file through PyAV, whose wheels bring FFmpeg along.

    The file's packets are listed first, without decoding, so that frames are counted truly, at whatever rate and
    however the file was cut off. To read frames it goes to the key frame before the first and decodes on from there;
    frames are turned as the file says they are to be shown.

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
        self.path, self._av = os.fspath(path), av
        if not os.path.isfile(self.path):
            raise VideoError(f"no such video {self.path}")
        try:
            self._container = av.open(self.path, metadata_errors="replace")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"cannot open {self.path}: {_reason(error)}") from error
        try:
            if not self._container.streams.video:
                raise VideoError(f"{self.path} has no video stream")
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_count = threads
            self._times, self._keys = self._list_packets()
        except BaseException:
            self.close()
            raise
        self.num_frames = len(self._times)
        if not self.num_frames:
            self.close()
            raise VideoError(f"{self.path} has no frames")
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else 30.0
        self.duration = self.num_frames / self.fps

    def _list_packets(self) -> tuple[list[int], list[int]]:
        """When each frame is shown, rising, and which of them are key frames."""
        shown: list[tuple[int, bool]] = []
        try:
            for packet in self._container.demux(self._stream):
                time = packet.pts if packet.pts is not None else packet.dts
                if time is not None and packet.size:
                    shown.append((time, packet.is_keyframe))
        except self._av.error.FFmpegError as error:
            if not shown:
                raise VideoError(f"cannot read {self.path}: {_reason(error)}") from error
        shown.sort()
        return [time for time, _ in shown], [k for k, (_, key) in enumerate(shown) if key]

    def frames_at(self, indices: Sequence[int] | Tensor) -> Tensor:
        """uint8 (T, H, W, 3) RGB of the frames with these numbers, in this order; they may repeat."""
        wanted = _checked(indices, self.num_frames, self.path)
        found: dict[int, np.ndarray] = {}
        try:
            self._decode(sorted(set(wanted)), found)
        except (self._av.error.FFmpegError, ValueError) as error:
            raise VideoError(f"cannot decode {self.path}: {_reason(error)}") from error
        if len({frame.shape for frame in found.values()}) > 1:
            raise VideoError(f"{self.path}: frames of different sizes")
        first = found[wanted[0]]
        out = torch.empty(len(wanted), *first.shape, dtype=torch.uint8)
        for place, k in zip(out.numpy(), wanted, strict=True):
            place[:] = found[k]
        return out

    def _decode(self, todo: list[int], found: dict[int, np.ndarray]) -> None:
        at = 0
        while at < len(todo):
            self._container.seek(self._times[todo[at]], stream=self._stream, backward=True)
            begin = at
            for frame in self._container.decode(self._stream):
                time = frame.pts if frame.pts is not None else frame.dts
                if time is None or time < self._times[todo[at]]:
                    continue
                picture = self._picture(frame)
                while at < len(todo) and self._times[todo[at]] <= time:  # a frame that was lost is the next one's
                    found[todo[at]] = picture
                    at += 1
                if at == len(todo) or self._better_seek(time, todo[at]):
                    break
            else:
                raise VideoError(f"{self.path} breaks off at frame {todo[at]} of {self.num_frames}")
            if at == begin:
                raise VideoError(f"{self.path}: frame {todo[at]} cannot be decoded")

    def _better_seek(self, time: int, target: int) -> bool:
        """Is there a key frame ahead from which the target is so much nearer that seeking pays?"""
        key = self._keys[bisect.bisect_right(self._keys, target) - 1] if self._keys else 0
        return key - bisect.bisect_right(self._times, time) > _SEEK

    def _picture(self, frame: Any) -> np.ndarray:
        picture = frame.to_ndarray(format="rgb24")
        quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4  # anticlockwise
        return np.rot90(picture, quarter_turns) if quarter_turns else picture

    def close(self) -> None:
        """Let go of the file."""
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
