"""One data module for videos: clips for training, views for evaluation, boxes on key frames."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.base import SALT, Batch, SeededDataModule, at_least_one, key_parts, own_randomness, sample_seeds
from zoo.data.clips import FPS, ClipsDataset
from zoo.data.loader import EvalLoader, Key, TrainLoader
from zoo.data.shapes import hash64
from zoo.data.video_reader import VideoError, VideoReader
from zoo.data.video_sources import VideoPart, open_layout, open_part
from zoo.data.video_transforms import (
    VideoEval,
    VideoTrain,
    VideoTransform,
    centred_indices,
    clip_length,
    clip_window,
    segment_indices,
    spread_indices,
    strided_indices,
)
from zoo.errors import ZooError, unknown

SAMPLINGS = ("window", "window_offset", "segment", "strided", "centred")
_REPLACEMENTS = 10
_LOST = "lost"  # a batch's videos that could not be read; the loader takes the key out again


class VideoSet(Dataset):
    """A split as batches of clips; a clip is a function of (seed, salt, epoch, index, repeat).

    A video that cannot be read is replaced in training by one that its key draws, so that no other sample changes; in
    evaluation its views are left out.

    Args:
        source: the videos, see :mod:`zoo.data.video_sources`.
        transform: see :class:`~zoo.data.video_transforms.VideoTransform`.
        num_frames: frames of a clip, T.
        sampling_rate: one frame in so many, of a video at `target_fps`.
        target_fps: the rate that `sampling_rate` is meant for; only of the windows.
        sampling: how frames are chosen, one of SAMPLINGS.
        train: draw clips at random.
        clips, crops: views of a video otherwise.
        mean, std: of the channels in units of the full range.
        seed: of the run.
        salt: keeps the randomness of several splits apart.
        min_frames: a video with fewer counts as one that cannot be read.
    """

    def __init__(
        self,
        source: Any,
        transform: VideoTransform,
        num_frames: int,
        sampling_rate: int,
        target_fps: float,
        sampling: str,
        train: bool,
        clips: int,
        crops: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        salt: int = 0,
        min_frames: int = 1,
    ) -> None:
        self.source, self.transform, self.train, self.seed, self.salt = source, transform, train, seed, salt
        self.num_frames, self.sampling_rate, self.target_fps = num_frames, sampling_rate, target_fps
        self.sampling, self.clips, self.crops, self.min_frames = sampling, clips, crops, min_frames
        self.views = 1 if train else clips * crops
        self._mean255, self._std255 = (255 * torch.tensor(x)[:, None, None, None] for x in (mean, std))

    def __len__(self) -> int:
        return len(self.source) * self.views

    def __getitem__(self, key: int | Key) -> Batch:
        batch = self.__getitems__([key])
        if not len(batch["index"]):
            raise VideoError(batch[_LOST][0])
        return {name: value[0] for name, value in batch.items() if name != _LOST}

    def frame_numbers(self, num_frames: int, fps: float, clip: int = 0, centre: int | None = None) -> Tensor:
        """(T,) int64: the frames of a clip of a video with so many frames; in training drawn from torch's generator,
        else those of clip `clip`. `centre` is the key frame, where there is one."""
        count, rate, total = self.num_frames, self.sampling_rate, num_frames
        if self.sampling == "centred":
            return centred_indices(total // 2 if centre is None else centre, count * rate // 2, rate, total)[:count]
        draws = (
            torch.rand(count if self.sampling == "segment" else 1, dtype=torch.float64).tolist() if self.train else None
        )
        if self.sampling == "segment":
            return segment_indices(total, count, draws)
        draw = None if draws is None else draws[0]
        if self.sampling == "strided":
            return strided_indices(total, count, rate, clip, self.clips, draw)
        length = clip_length(count, rate, fps, self.target_fps)
        start, end = clip_window(total, length, clip, self.clips, self.sampling == "window_offset", draw)
        return spread_indices(start, end, count, total)

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        """The batch of some keys: "video" float32 (B, 3, T, S, S), "video_id", "view", "index" (B,) int64, and "label"
        (B,) int64 or (B, K) float32, or "target", a list of dicts."""
        parts = key_parts(keys)
        seeds = sample_seeds(self.seed, self.salt, parts)
        lost: list[str] = []
        samples: list[dict[str, Any]] = []
        with own_randomness(False), _Readers(self) as readers:
            if isinstance(self.source, ClipsDataset) and self.source.kind != "boxes":
                samples = self._drawn(parts[:, 0].tolist(), seeds)
            else:
                for index, seed in zip(parts[:, 0].tolist(), seeds, strict=True):
                    sample = self._sample(index, seed, readers, lost)
                    samples += [] if sample is None else [sample]
        return {**self._batch(samples), _LOST: lost}

    def name(self, index: int) -> str | None:
        """The file or the name of the video that a view is of, where it has one."""
        name = getattr(self.source, "name", None)
        return name(index // self.views) if callable(name) else None

    def _drawn(self, indices: list[int], seeds: list[int]) -> list[dict[str, Any]]:
        """Clips of the drawn world, all in one go."""
        numbers, states = [], []
        for index, seed in zip(indices, seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            clip = index % self.views // self.crops
            numbers.append(self.frame_numbers(self.source.knobs.frames, FPS, clip))
            states.append(torch.default_generator.get_state())
        videos = [index // self.views for index in indices]
        clips, labels = self.source.read_many(videos, torch.stack(numbers)), self.source.labels(videos)
        samples = []
        for index, state, clip, label in zip(indices, states, clips, labels, strict=True):
            torch.default_generator.set_state(state)
            video, _ = self.transform(clip, None, self._crop(index))
            samples.append({"index": index, "video": video, "label": label})
        return samples

    def _crop(self, index: int) -> int:
        """Which of the three crops a view takes: the middle one where it is the only one."""
        return index % self.crops if self.crops > 1 else 1

    def _sample(self, index: int, seed: int, readers: _Readers, lost: list[str]) -> dict[str, Any] | None:
        """One clip, or what stands in for it; None where a view of evaluation cannot be had."""
        number = index // self.views
        for attempt in range(_REPLACEMENTS if self.train else 1):
            torch.default_generator.manual_seed(seed)
            try:
                return {"index": index, **self._read(number, index, readers)}
            except VideoError as error:
                readers.forget()
                lost.append(str(error))
            number = int(hash64(seed, attempt)[0] % len(self.source))
        if self.train:
            raise ZooError(f"{_REPLACEMENTS} videos in a row cannot be read, the last: {lost[-1]}")
        return None

    def _read(self, number: int, index: int, readers: _Readers) -> dict[str, Any]:
        clip, kind = index % self.views // self.crops, self.source.kind
        key = self.source.keyframe(number) if kind == "boxes" else {}
        reader = readers.open(number)
        if reader.num_frames < self.min_frames:
            raise VideoError(f"{self.source.name(number)} has {reader.num_frames} frames, fewer than {self.min_frames}")
        numbers = self.frame_numbers(reader.num_frames, reader.fps, clip, key.get("frame"))
        frames = readers.frames(reader, (number, clip), numbers)
        if kind != "boxes":
            video, _ = self.transform(frames, None, self._crop(index))
            return {
                "video": video,
                "label": torch.as_tensor(self.source.label(number, numbers if self.train else None)),
            }
        height, width = frames.shape[1:3]
        video, boxes = self.transform(frames, key["boxes"] * torch.tensor([width, height] * 2), self._crop(index))
        told = {name: value for name, value in key.items() if name not in ("frame", "boxes")}
        return {"video": video, "target": {"boxes": boxes, "original_boxes": key["boxes"], **told}}

    def _batch(self, samples: list[dict[str, Any]]) -> Batch:
        index = torch.tensor([sample["index"] for sample in samples], dtype=torch.long)
        shapes = {tuple(sample["video"].shape) for sample in samples}
        if len(shapes) > 1:
            raise ZooError(
                f"the transform leaves clips of different sizes in a batch: {', '.join(map(str, sorted(shapes)[:3]))};"
                " cut a crop, or take data.eval_batch_size 1"
            )
        video = torch.empty(len(samples), *(next(iter(shapes)) if shapes else (3, self.num_frames, 0, 0)))
        for to, sample in zip(video, samples, strict=True):
            torch.sub(sample["video"], self._mean255, out=to).div_(self._std255)
        batch: Batch = {"video": video, "video_id": index // self.views, "view": index % self.views, "index": index}
        if self.source.kind == "boxes":
            batch["target"] = [sample["target"] for sample in samples]
        else:
            empty = (0, len(self.source.class_names)) if self.source.kind == "labels" else (0,)
            batch["label"] = torch.stack([s["label"] for s in samples]) if samples else torch.empty(empty)
        return batch


class _Readers:
    """The videos open while a batch is made: neighbouring views are of one video, and often of one clip of it."""

    def __init__(self, samples: VideoSet) -> None:
        self._samples, self._number = samples, -1
        self._reader: VideoReader | None = None
        self._clip: tuple[Any, Tensor] | None = None

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.forget()

    def forget(self) -> None:
        """Close the video."""
        if self._reader is not None:
            self._reader.close()
        self._reader, self._clip, self._number = None, None, -1

    def open(self, number: int) -> VideoReader:
        """The video, open already or not."""
        if self._reader is None or number != self._number:
            self.forget()
            self._reader, self._number = self._samples.source.open(number), number
        return self._reader

    def frames(self, reader: VideoReader, clip: tuple[int, int], numbers: Tensor) -> Tensor:
        """uint8 (T, H, W, 3); in evaluation read once for all crops of a clip."""
        if self._samples.train:
            return reader.frames_at(numbers)
        if self._clip is None or self._clip[0] != clip:
            self._clip = clip, reader.frames_at(numbers)
        return self._clip[1]


class _Counting(DataLoader):
    """Counts the videos that could not be read and tells at the end of the epoch; batches without any are left out."""

    told = "their views are left out"

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        lost: list[str] = []
        try:
            for batch in super().__iter__():
                lost += batch.pop(_LOST)
                if len(batch["index"]):
                    yield batch
        finally:
            if lost:
                count = len(set(lost))
                many = "1 video" if count == 1 else f"{count} videos"
                warnings.warn(f"{many} could not be read, {self.told}; first: {lost[0]}", stacklevel=2)


class VideoTrainLoader(_Counting, TrainLoader):
    """The training loader of videos."""

    told = "others took their place"


class VideoEvalLoader(_Counting, EvalLoader):
    """The loader of views for evaluation."""


class VideoDataModule(SeededDataModule):
    """Videos for training and evaluation. Batches: `video` (B, 3, T, S, S) float32, normalised; `video_id`, `view` and
    `index` (B,) int64; and `label`, (B,) int64 or, of sets with several labels a video, (B, K) float32 of 0 and 1.

    Of sets with boxes there is `target` instead of `label`, a list of dicts: `boxes` (N, 4) in pixels of the crop,
    `labels` (N, K) float32 of 0 and 1, `original_boxes` (N, 4) normalised, `true_boxes` (G, 4) normalised with
    `true_labels` (G,), `video_id` and `second`.

    Training takes a random clip of each video. Validation takes one in the middle, testing and predicting `clips` times
    `crops` views, which the metrics of :mod:`zoo.metrics.video` join. A video that cannot be read stops nothing:
    training puts another in its place without touching any other sample, evaluation leaves it out, and a warning at the
    end of the epoch says how many there were. Order, randomness, resuming and evaluation are
    :class:`~zoo.data.base.SeededDataModule`'s; `repeats` gives several clips of each video in a row.

    Args:
        dataset: a card's name (``zoo list datasets``), a list, a folder, or ``shapes``: see
            :mod:`zoo.data.video_sources` and :mod:`zoo.data.clips`.
        data_dir: where a carded set lies on this machine.
        batch_size: per device.
        eval_batch_size: per device, in views; None: as `batch_size`.
        num_frames: frames of a clip.
        sampling_rate: one frame in so many of a video at `target_fps`.
        target_fps: the rate that `sampling_rate` is meant for; videos with another one are strode through accordingly.
        sampling: how frames are chosen: "window" (from a real-valued start), "window_offset" (testing at whole frames
            up to the end), "segment" (one from each equal part), "strided" (whole frames, of the file's own rate) or
            "centred" (around a key frame); None: the set's own.
        clips: views in time that testing takes.
        crops: views in space, 1 or 3.
        image_size: side in pixels that a transform without a size takes; None: the card's, else 224 (``shapes``: 64).
        train_transform: None: :class:`~zoo.data.video_transforms.VideoTrain`, for ``shapes`` no change.
        eval_transform: None: :class:`~zoo.data.video_transforms.VideoEval`.
        num_workers: loading processes; None: none for ``shapes``, else what the machine's cores allow.
        train_samples: train on this many videos only, drawn once with the seed; for ``shapes`` the split's length.
        repeats: repeated augmentation: how often in a row a video comes.
        seed: of order and augmentation; None: the one of ``seed_everything``, else 0.
        options: of the source, see :func:`zoo.data.video_sources.open_layout`.
        mean, std: of the channels in units of the full range; None: the papers' 0.45 and 0.225.

    Attributes:
        num_classes, class_names, image_size, mean, std, kind: known as soon as the module is made.

    Raises:
        ZooError: an unknown data set or option, a missing folder, lists that cannot be read, settings without sense.
    """

    train_loader, eval_loader = VideoTrainLoader, VideoEvalLoader

    def __init__(
        self,
        dataset: str = "shapes",
        data_dir: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_frames: int = 32,
        sampling_rate: int = 2,
        target_fps: float = 30.0,
        sampling: str | None = None,
        clips: int = 1,
        crops: int = 1,
        image_size: int | None = None,
        train_transform: VideoTransform | None = None,
        eval_transform: VideoTransform | None = None,
        num_workers: int | None = None,
        train_samples: int | None = None,
        repeats: int = 1,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        at_least_one(image_size=image_size, train_samples=train_samples, num_frames=num_frames)
        at_least_one(sampling_rate=sampling_rate, clips=clips)
        super().__init__(batch_size, eval_batch_size, num_workers, repeats, seed, in_memory=dataset == "shapes")
        if crops not in (1, 3):
            raise ZooError(f"data.crops must be 1 or 3, got {crops}")
        if target_fps <= 0:
            raise ZooError(f"data.target_fps must be positive, got {target_fps}")
        self.dataset, self.data_dir, self.options = dataset, data_dir, dict(options or {})
        self.image_size = image_size or _card_size(dataset) or (64 if dataset == "shapes" else 224)
        drawn = {"size": self.image_size, "length": train_samples, "frames": num_frames * sampling_rate}
        given = drawn if dataset == "shapes" else {}
        self.layout = open_layout(dataset, data_dir, **{**given, **self.options})
        self.class_names, self.num_classes = self.layout.class_names, len(self.layout.class_names)
        self.kind = self.layout.kind
        self.sampling = sampling or self.layout.sampling
        if self.sampling not in SAMPLINGS:
            raise unknown("sampling", self.sampling, SAMPLINGS)
        if (self.sampling == "centred") != (self.kind == "boxes"):
            raise ZooError(f"{dataset}: sampling {self.sampling!r} does not fit {self.kind!r} data")
        if self.kind == "boxes" and clips * crops > 1:
            raise ZooError(f"{dataset}: a key frame has one view; data.clips and data.crops must be 1")
        self.num_frames, self.sampling_rate, self.target_fps = num_frames, sampling_rate, target_fps
        self.clips, self.crops, self.train_samples = clips, crops, train_samples
        self.mean, self.std = tuple(mean or (0.45,) * 3), tuple(std or (0.225,) * 3)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ZooError(f"mean and std need three numbers each, std positive; got {self.mean} and {self.std}")
        own: VideoTransform = (
            VideoEval() if dataset == "shapes" else VideoTrain()
        )  # its motions have a left and a right
        self.train_transform, self.eval_transform = train_transform or own, eval_transform or VideoEval()
        for transform in (self.train_transform, self.eval_transform):
            if not isinstance(transform, VideoTransform):
                raise ZooError(f"a transform of videos is a zoo.data.video_transforms.VideoTransform, got {transform}")
            transform.bind(self.image_size)
        self._sources: dict[str, Any] = {}

    def preprocess_facts(self) -> dict[str, Any]:
        """Those of the views that testing takes: how frames are chosen and cut."""
        transform = self.eval_transform
        kind = type(transform)
        cut: dict[str, Any] = {"transform": f"{kind.__module__}.{kind.__qualname__}"}
        if isinstance(transform, VideoEval):
            cut = {"size": transform.side, "short_side": transform.short_side, "crop": transform.crop}
        names = ("num_frames", "sampling_rate", "target_fps", "sampling", "clips", "crops")
        settings = {name: getattr(self, name) for name in names}
        return {"kind": "clip", **cut, **settings, "mean": list(self.mean), "std": list(self.std), "channels": "rgb"}

    def source(self, split: str) -> Any:
        """The videos behind a split ("train", "val", "test", "predict"), before any transform; opened once."""
        if split not in self._sources:
            source = open_part(self.layout, split)
            if split == "train" and self.train_samples is not None and self.dataset != "shapes":
                source = VideoPart(source, self.drawn_part(len(source), self.train_samples))
            self._sources[split] = source
        return self._sources[split]

    def samples(self, split: str) -> VideoSet:
        """The clips or views of a split."""
        train, many = split == "train", split in ("test", "predict")
        sampling = "window_offset" if split == "val" and self.sampling == "window" else self.sampling
        return VideoSet(
            self.source(split),
            self.train_transform if train else self.eval_transform,
            self.num_frames,
            self.sampling_rate,
            self.target_fps,
            sampling,
            train,
            self.clips if many else 1,
            self.crops if many else 1,
            self.mean,
            self.std,
            self.seed,
            SALT[split],
            int(self.options.get("min_frames") or 1),
        )


def _card_size(dataset: str) -> int | None:
    from zoo.catalog import data_card, list_datasets

    return data_card(dataset).image_size if dataset in list_datasets() and dataset != "shapes" else None


def read_views(
    path: str | Path,
    num_frames: int,
    sampling_rate: int,
    transform: VideoTransform,
    clips: int = 1,
    crops: int = 1,
    mean: Sequence[float] = (0.45,) * 3,
    std: Sequence[float] = (0.225,) * 3,
    target_fps: float = 30.0,
    sampling: str = "window_offset",
) -> Tensor:
    """One video file or folder of pictures as the views that testing takes, (clips * crops, 3, T, S, S) float32.

    The settings are those of :class:`VideoDataModule`.

    Raises:
        VideoError: it cannot be read.
    """
    from zoo.data.video_sources import VideoList

    source = VideoList([str(path)], [-1], [])
    views = VideoSet(source, transform, num_frames, sampling_rate, target_fps, sampling, False, clips, crops, mean, std)
    batch = views.__getitems__(list(range(len(views))))
    if batch[_LOST]:
        raise VideoError(batch[_LOST][0])
    return batch["video"]
