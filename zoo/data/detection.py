"""Pictures with boxes, masks and keypoints: their sources, the data set and the data module.

The transforms of :mod:`zoo.data.scenes` go by this module's name in recipes too.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.data.base import SALT, Batch, SeededDataModule, at_least_one, key_parts, own_randomness, sample_seeds
from zoo.data.coco import (
    CocoLayout,
    CocoSource,
    Record,
    Segment,
    box_outline,
    find_coco,
    mirror_order,
    repeat_factors,
    to_rle,
)
from zoo.data.loader import EpochSampler, GroupedSampler, Key
from zoo.data.panoptic import (
    SCHEMES,
    CityscapesLayout,
    Panoptic,
    PanopticClasses,
    find_cityscapes,
    find_panoptic,
    is_cityscapes,
)
from zoo.data.scenes import ColorJitter as ColorJitter
from zoo.data.scenes import FixedSizeCrop as FixedSizeCrop
from zoo.data.scenes import RandomCrop as RandomCrop
from zoo.data.scenes import RandomFlip, ResizeShortestEdge, Scene, rasterise
from zoo.data.scenes import ResizeScale as ResizeScale
from zoo.data.shapes import KEYPOINTS, PANOPTIC_BASE, SCENES, SHAPES, hash64, make_knobs, render
from zoo.data.voc import VocLayout, VocSource, find_voc, is_voc
from zoo.errors import ZooError, unknown

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
_CHANNELS = ("rgb", "bgr")
_MASKS = ("bitmask", "polygon", "none")


# -------------------------------------------------------------------------------------------------------------- sources


class RecordSource(Protocol):
    """A split: pictures with their objects."""

    class_names: list[str]
    keypoint_names: list[str]
    flip_order: list[int]

    def __len__(self) -> int: ...

    def read_many(self, indices: Sequence[int]) -> list[Record]: ...


DRAWN_SIDE = 128  # pixels of a drawn scene, unless said otherwise


class ShapesScenes:
    """The embedded world as a detection set: every object with its exact box, mask and keypoints.

    Args:
        split: "train", "val" or "test".
        length: how many samples it has.
        size: side of the pictures in pixels.
        seed: which world.
        min_visible: objects of which others hide more leave no trace in the annotations; their pixels are nothing.
        panoptic: whether records say what every pixel belongs to: an object, or a kind of background.
        **knobs: see :class:`~zoo.data.shapes.Knobs`.
    """

    category_names, things = (*SHAPES, *SCENES), (True,) * len(SHAPES) + (False,) * len(SCENES)

    def __init__(
        self,
        split: str,
        length: int,
        size: int = DRAWN_SIDE,
        seed: int = 0,
        min_visible: float = 0.25,
        panoptic: bool = False,
        **knobs: Any,
    ) -> None:
        if not 0 <= min_visible <= 1:
            raise ZooError(f"shapes: min_visible must lie in 0..1, got {min_visible}")
        make_knobs(**knobs)
        self.split, self.length, self.size, self.seed, self.knobs = split, length, size, seed, knobs
        self.min_visible, self.panoptic = min_visible, panoptic
        self.class_names, self.keypoint_names = list(SHAPES), list(KEYPOINTS)
        self.flip_order = mirror_order(KEYPOINTS)

    def __len__(self) -> int:
        return self.length

    def read_many(self, indices: Sequence[int]) -> list[Record]:
        """Several scenes, drawn together."""
        fields = ["image", "shape", "boxes", "masks", "visible", "keypoints"]
        fields += ["panoptic"] * self.panoptic
        drawn = render(self.seed, self.split, indices, self.size, fields, **self.knobs)
        here = (drawn["shape"] >= 0) & (drawn["visible"] >= self.min_visible) & drawn["masks"].flatten(2).any(2)
        records = []
        for n, index in enumerate(indices):
            kept = here[n]
            masks = drawn["masks"][n][kept].to(torch.uint8).numpy()
            records.append(
                Record(
                    image=drawn["image"][n],
                    boxes=drawn["boxes"][n][kept].double().numpy(),
                    labels=drawn["shape"][n][kept].numpy(),
                    crowd=np.zeros(len(masks), dtype=bool),
                    area=masks.sum((1, 2)).astype(np.float64),
                    segments=list(masks),
                    keypoints=drawn["keypoints"][n][kept].double().numpy(),
                    image_id=int(index),
                    panoptic=_drawn_segments(drawn["panoptic"][n].numpy(), kept.numpy()) if self.panoptic else None,
                )
            )
        return records


def _drawn_segments(drawn: np.ndarray, kept: np.ndarray) -> Panoptic:
    """The segments of a drawn scene (H, W), in :func:`~zoo.data.shapes.render`'s numbers, of which the `kept` (m,)
    objects are annotated. Ids are those numbers + 1."""
    instance = drawn % PANOPTIC_BASE
    known = np.concatenate([[True], kept])[instance]
    ids = np.where(known, drawn + 1, 0).astype(np.int32)
    numbers, areas = np.unique(ids[known], return_counts=True)
    rows = [numbers, (numbers - 1) // PANOPTIC_BASE, np.zeros_like(numbers), areas]
    return Panoptic(ids, np.stack(rows, 1).astype(np.int64))


class DetectionSet(Dataset):
    """A split with its transforms, normalised, padded and batched; a sample is a function of (seed, salt, epoch, index,
    repeat).

    Args:
        source: the pictures.
        transforms: applied one after the other.
        indices: these of the source's pictures only.
        training: give targets to train on, in the coordinates of the picture that the network sees; else the stored
            truth in those of the file, crowds included.
        normalise: pictures to float.
        size_divisibility: what the padded sides are multiples of.
        masks: "bitmask", "polygon" or "none".
        keypoints: whether targets hold them.
        seed, salt: of the run, and to keep splits apart.
        panoptic: the categories of semantic and panoptic truth, which targets then hold.
    """

    def __init__(
        self,
        source: RecordSource,
        transforms: Sequence[nn.Module],
        indices: np.ndarray,
        training: bool,
        normalise: Normalise,
        size_divisibility: int = 1,
        masks: str = "bitmask",
        keypoints: bool = False,
        seed: int = 0,
        salt: int = 0,
        panoptic: PanopticClasses | None = None,
    ) -> None:
        self.source, self.transforms, self.indices = source, list(transforms), indices
        self.training, self.normalise, self.size_divisibility = training, normalise, size_divisibility
        self.masks, self.keypoints = masks, keypoints
        self.seed, self.salt, self.panoptic = seed, salt, panoptic

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        """The batch of some keys; see :class:`DetectionDataModule`."""
        parts = key_parts(keys)
        places = torch.from_numpy(parts[:, 0].copy())
        index = self.indices[parts[:, 0]]
        parts[:, 0] = index
        images: list[Tensor] = []
        targets: list[dict[str, Any]] = []
        original: list[tuple[int, int]] = []
        records = self.source.read_many(index.tolist())
        with own_randomness(foreign=False):
            for record, seed in zip(records, sample_seeds(self.seed, self.salt, parts), strict=True):
                torch.default_generator.manual_seed(seed)
                scene = self._scene(record)
                original.append(scene.size)
                for transform in self.transforms:
                    scene = transform(scene)
                images.append(scene.image)
                targets.append(self._target(*scene.finished(), record) if self.training else self._truth(record))
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        return {
            "image": self.normalise(images, self.size_divisibility),
            "size": torch.tensor(sizes).view(-1, 2),
            "original_size": torch.tensor(original).view(-1, 2),
            "target": targets,
            "path": [record.path for record in records],
            "index": places,
        }

    def _scene(self, record: Record) -> Scene:
        """The picture with what the transforms should move: in training the objects that are no crowd."""
        if not self.training:
            return Scene(record.image, np.zeros((0, 4)), np.zeros(0, np.int64))
        kept = ~record.crowd
        segments: list[Segment] | None = None
        if self.masks != "none":
            segments = [_outline(record, n) for n in np.flatnonzero(kept).tolist()]
        points = record.keypoints[kept] if self.keypoints and record.keypoints is not None else None
        labels = None if self.panoptic is None else record.panoptic.semantic(self.panoptic)
        order = self.source.flip_order
        return Scene(record.image, record.boxes[kept], record.labels[kept], segments, points, order, labels)

    def _target(self, scene: Scene, kept: np.ndarray, record: Record) -> dict[str, Any]:
        boxes = torch.from_numpy(scene.boxes).float()
        target: dict[str, Any] = {
            "boxes": boxes,
            "labels": torch.from_numpy(scene.labels),
            "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
            "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
            "image_id": torch.tensor(record.image_id),
        }
        if scene.segments is not None and self.masks == "bitmask":
            target["masks"] = torch.from_numpy(rasterise(scene.segments, *scene.size))
        elif scene.segments is not None:
            if any(isinstance(segment, np.ndarray) for segment in scene.segments):
                raise ZooError(f"{record.path or 'shapes'}: masks that are no polygons; set data.masks to bitmask")
            target["polygons"] = [[ring.reshape(-1) for ring in segment] for segment in scene.segments]
        if scene.keypoints is not None:
            target["keypoints"] = torch.from_numpy(scene.keypoints).float()
        if scene.semantic is not None:
            target["semantic"] = torch.from_numpy(np.ascontiguousarray(scene.semantic))
        return target

    def _truth(self, record: Record) -> dict[str, Any]:
        target: dict[str, Any] = {
            "boxes": torch.from_numpy(record.boxes),
            "labels": torch.from_numpy(record.labels),
            "area": torch.from_numpy(record.area),
            "iscrowd": torch.from_numpy(record.crowd.astype(np.int64)),
            "image_id": torch.tensor(record.image_id),
        }
        if record.difficult is not None:
            target["difficult"] = torch.from_numpy(record.difficult.astype(np.int64))
        if self.masks != "none":
            height, width = int(record.image.shape[-2]), int(record.image.shape[-1])
            target["masks"] = [to_rle(_stored(record, n), height, width) for n in range(len(record.segments))]
        if self.keypoints and record.keypoints is not None:
            target["keypoints"] = torch.from_numpy(record.keypoints)
        if self.panoptic is not None:
            target["panoptic"] = record.panoptic.truth(self.panoptic)
            target["semantic"] = torch.from_numpy(record.panoptic.semantic(self.panoptic))
        for name in ("neg_labels", "not_exhaustive_labels", "frequency"):
            if (known := getattr(record, name)) is not None:
                target[name] = torch.from_numpy(known)
        return target


def _stored(record: Record, n: int) -> Any:
    """An object's segmentation in one of COCO's forms; its box where it has none."""
    segment = record.segments[n]
    if segment is not None:
        return segment
    return [ring.reshape(-1).tolist() for ring in box_outline(record.boxes[n], *record.image.shape[-2:])]


def _outline(record: Record, n: int) -> Segment:
    """What the transforms move of an object's stored segmentation."""
    segment = _stored(record, n)
    if isinstance(segment, np.ndarray):
        return segment
    if isinstance(segment, list):
        return [np.array(points, dtype=np.float64).reshape(-1, 2) for points in segment]
    return coco_mask.decode(to_rle(segment, *record.image.shape[-2:]))


class Normalise:
    """Bytes (3, H, W) to one float batch: channels in order, minus mean, over deviation, then zeros on the right and
    below.

    Args:
        mean, std: of the channels in their order, in units of 0..255.
        channels: "rgb" or "bgr", the order the network wants.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels: str = "rgb") -> None:
        if channels not in _CHANNELS:
            raise unknown("order of channels", channels, _CHANNELS)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ZooError(f"pixel_mean and pixel_std need three numbers each, std positive; got {mean} and {std}")
        self.mean, self.std = (np.asarray(x, dtype=np.float32).tolist() for x in (mean, std))
        self.order = (2, 1, 0) if channels == "bgr" else (0, 1, 2)

    def __call__(self, images: Sequence[Tensor], divisibility: int = 1) -> Tensor:
        """(B, 3, H, W) float32 of the pictures, H and W the largest, rounded up to multiples of `divisibility`."""
        sides = [max((int(i.shape[axis]) for i in images), default=0) for axis in (-2, -1)]
        height, width = (math.ceil(side / divisibility) * divisibility for side in sides)
        batch = torch.zeros(len(images), 3, height, width)
        for out, image in zip(batch, images, strict=True):
            # A channel at a time: all steps while it lies in the cache.
            for to, channel, mean, std in zip(out, self.order, self.mean, self.std, strict=True):
                to = to[: image.shape[-2], : image.shape[-1]].copy_(image[channel]).sub_(mean)
                if std != 1:
                    to.div_(std)
        return batch


# ---------------------------------------------------------------------------------------------------------- data module

_LENGTH = {"train": 50_000, "val": 1_000, "test": 1_000}
_COCO_OPTIONS = ("annotations", "images", "outside", "coco_classes")
_VOC_OPTIONS = ("train", "val", "test", "class_names")
_FROM_FILES = (CocoSource, VocSource)
_PHOTO_SIZES = [640, 672, 704, 736, 768, 800]


def subset(ids: np.ndarray, name: str) -> np.ndarray:
    """Which of some pictures a named subset has: so many, such as "10k", "3.5k" or "1000", chosen by their `ids` (N,)
    alone, or another choice of as many, "10k@1" (the first is "10k@0"). A smaller one is part of a larger.

    Returns:
        (M,) their places in order.

    Raises:
        ZooError: no such name, or more pictures than there are.
    """
    said = re.fullmatch(r"(\d+(?:\.\d+)?)(k?)(?:@(\d+))?", name)
    count = float(said[1]) * (1000 if said[2] else 1) if said else 0.0
    if said is None or count < 1 or count != int(count):
        raise ZooError(f'a subset is a number of pictures, such as "10k" or "10k@1", not {name!r}')
    if count > len(ids):
        raise ZooError(f"the subset {name} wants {int(count):,} pictures, of which there are {len(ids):,}")
    rank = hash64(int(said[3] or 0), zlib.crc32(b"subset"), ids.astype(np.int64))
    return np.sort(np.argsort(rank, kind="stable")[: int(count)])


class DetectionDataModule(SeededDataModule):
    """Pictures with objects for training and evaluation; a set in COCO's or VOC's format, or the embedded world.

    Batches: image (B, 3, H, W) float32, normalised, then padded with zeros on the right and below; size (B, 2) int64,
    height and width of each picture inside it; original_size (B, 2), those of the file; path, a list; and target, a
    list of B dicts. Of N objects a target for training holds, in the pixels of the picture as the network sees it:

    - boxes (N, 4) float32 x0, y0, x1, y1; labels (N,) int64 from 0; area (N,) of the boxes; iscrowd (N,); image_id ();
    - masks (N, h, w) bool (h, w = size) or, with ``masks: polygon``, polygons, N lists of flat float64 arrays;
    - keypoints (N, P, 3) float32 x, y, visibility;
    - semantic (h, w) uint8, the label of each pixel, 255 for those that do not count.

    Crowds, pictures without objects (unless pixels have labels) and what a crop left nothing of are not trained on. For
    val, test and predict the target is the stored truth in pixels of the file, crowds included: boxes and area float64,
    masks as run lengths, panoptic {ids (H, W) int32, segments (n, 5) int64} (:mod:`zoo.data.panoptic`). It stays on the
    CPU, where the metric wants it. Of LVIS it also says what is known on the picture (neg_labels,
    not_exhaustive_labels, frequency; see :class:`~zoo.metrics.LvisAP`), of VOC which objects are difficult (N,) int64
    (:class:`~zoo.metrics.VocAP`). Order, randomness, resuming and exact
    evaluation are :class:`~zoo.data.base.SeededDataModule`'s.

    Args:
        dataset: "shapes", a card's name (``coco``, ``voc``), a folder or a json; see :mod:`zoo.data.coco` and
            :mod:`zoo.data.voc`.
        data_dir: where a carded set lies on this machine.
        batch_size: per device.
        eval_batch_size: per device. Padding to another picture's size changes what a network sees at the border, so
            that published numbers are those of 1.
        train_transforms: one after the other; None: the shorter side one of 640 to 800 pixels, the longer at most 1333,
            and a flip; for ``shapes`` a flip.
        eval_transforms: likewise; None: the shorter side 800, the longer at most 1333; for ``shapes`` none.
        pixel_mean, pixel_std: of the channels in their order, in units of 0..255; None: ImageNet's.
        channels: "rgb" or "bgr".
        size_divisibility: what the padded sides are multiples of; 32 for a pyramid.
        masks: "bitmask", "polygon" (what the official code crops and draws for each proposal) or "none".
        keypoints: whether targets hold keypoints; pictures without a labelled one are then not trained on.
        aspect_grouping: wide and high pictures in batches of their own.
        repeat_threshold: of LVIS's repeat factors; None: every picture once.
        num_workers: loading processes; None: none for ``shapes``, else what the machine's cores allow.
        train_samples: train on this many pictures only, drawn once with the seed; for ``shapes`` the split's length.
        subset: train on a named subset of the pictures, the same whatever the seed, such as "10k"; see :func:`subset`.
        seed: of order and augmentation; None: the one of ``seed_everything``, else 0.
        image_size: the shorter side where no transforms are given, the longer at most 5/3 of it; for ``shapes`` the
            side.
        options: further keywords of the source: for ``shapes`` size (side in pixels), min_visible and
            :class:`~zoo.data.shapes.Knobs`; for COCO's format annotations, images, outside and coco_classes of
            :func:`~zoo.data.coco.find_coco`; for VOC's class_names, and of train, val and test the lists of pictures
            (:func:`~zoo.data.voc.find_voc`).
        semantic: whether targets hold semantic and panoptic truth, and what a pixel's label is: "separated", 0 for
            every thing, then the kinds of stuff; "all", the categories in the order of their ids; "none".

    Attributes:
        num_classes, class_names, keypoint_names: known as soon as the module is made; without data_dir, a carded set's
            classes are the card's.
        panoptic: the categories of semantic and panoptic truth (:class:`~zoo.data.panoptic.PanopticClasses`); None
            without them, or as long as nobody has said where a carded set lies.

    Raises:
        ZooError: an unknown set or option, a json that is missing or damaged, pictures that are not there.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        data_dir: str | None = None,
        batch_size: int = 2,
        eval_batch_size: int = 1,
        train_transforms: list[nn.Module] | None = None,
        eval_transforms: list[nn.Module] | None = None,
        pixel_mean: list[float] | None = None,
        pixel_std: list[float] | None = None,
        channels: Literal["rgb", "bgr"] = "rgb",
        size_divisibility: int = 32,
        masks: Literal["bitmask", "polygon", "none"] = "bitmask",
        keypoints: bool = False,
        aspect_grouping: bool = True,
        repeat_threshold: float | None = None,
        num_workers: int | None = None,
        train_samples: int | None = None,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        image_size: int | None = None,
        semantic: Literal["none", "separated", "all"] = "none",
        subset: str | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, 1, seed, in_memory=dataset == "shapes")
        at_least_one(size_divisibility=size_divisibility, train_samples=train_samples, image_size=image_size)
        if masks not in _MASKS:
            raise unknown("form of masks", masks, _MASKS)
        if semantic not in ("none", *SCHEMES):
            raise unknown("scheme of semantic labels", semantic, ("none", *SCHEMES))
        if repeat_threshold is not None and not 0 < repeat_threshold <= 1:
            raise ZooError(f"data.repeat_threshold must lie in 0..1, got {repeat_threshold}")
        self.dataset, self.data_dir, self.options = dataset, data_dir, dict(options or {})
        self.semantic = semantic
        self.subset = subset
        drawn = dataset == "shapes"
        if drawn and image_size is not None:
            self.options.setdefault("size", image_size)
        mean, std = pixel_mean or PIXEL_MEAN, pixel_std or PIXEL_STD
        if channels == "bgr":
            mean, std = pixel_mean or PIXEL_MEAN[::-1], pixel_std or PIXEL_STD[::-1]
        self.normalise = Normalise(mean, std, channels)
        self.mean, self.std, self.channels = tuple(mean), tuple(std), channels
        self.size_divisibility, self.masks, self.keypoints = size_divisibility, masks, keypoints
        self.aspect_grouping, self.repeat_threshold, self.train_samples = (
            aspect_grouping, repeat_threshold, train_samples
        )  # fmt: skip
        flip = RandomFlip()
        sizes, longest = (_PHOTO_SIZES, 1333) if image_size is None else ([image_size], 5 * image_size // 3)
        self.train_transforms = train_transforms
        if train_transforms is None:
            self.train_transforms = [flip] if drawn else [ResizeShortestEdge(sizes, longest), flip]
        self.eval_transforms = eval_transforms
        if eval_transforms is None:
            self.eval_transforms = [] if drawn else [ResizeShortestEdge(sizes[-1:], longest)]
        self._layout = None if drawn else self._find()
        self.panoptic: PanopticClasses | None = None
        self.class_names, self.keypoint_names = self._names()
        self.num_classes = len(self.class_names)
        if keypoints and self._layout is not None and not self.keypoint_names:
            raise ZooError(f"{dataset} has no keypoints; for COCO set data.options.annotations to person_keypoints")

    def preprocess_facts(self) -> dict[str, Any] | None:
        """Those of a resize of the shorter side (`size`, at most `longest`), or of none (`size` null); of drawn scenes
        `size` is their side, so that photos come in the size that was learnt from. Mean and deviation in units of 1;
        `divisibility` of the padded sides; `panoptic` are the categories of panoptic truth."""
        shared = {
            "kind": "objects",
            "mean": [value / 255 for value in self.mean],
            "std": [value / 255 for value in self.std],
            "channels": self.channels,
            "divisibility": self.size_divisibility,
            **({} if self.panoptic is None else {"panoptic": self.panoptic.facts()}),
        }
        steps = self.eval_transforms or []
        if not steps:
            side = self.options.get("size", DRAWN_SIDE) if self.dataset == "shapes" else None
            return {**shared, "size": side, "longest": side and 5 * side // 3}
        if len(steps) == 1 and isinstance(steps[0], ResizeShortestEdge) and len(steps[0].sizes) == 1:
            return {**shared, "size": steps[0].sizes[0], "longest": steps[0].max_size}
        return {**shared, "transform": ", ".join(type(step).__qualname__ for step in steps)}

    def _find(self) -> CocoLayout | CityscapesLayout | VocLayout | None:
        """Where the set lies; None where it has a card and nobody has said yet."""
        from zoo import catalog

        known = [name for name in catalog.list_datasets() if "detection" in catalog.data_card(name).task]
        place = Path(self.data_dir or self.dataset).expanduser()
        if self.data_dir is None and not place.exists() and self.dataset not in known:
            raise unknown("dataset", self.dataset, known)
        layouts = catalog.data_card(self.dataset).layouts if self.dataset in known else []
        voc = "voc" in layouts if layouts else is_voc(place)
        for name in self.options:
            if name not in (allowed := _VOC_OPTIONS if voc else _COCO_OPTIONS):
                raise unknown(f"option of {self.dataset}", name, allowed)
        if self.data_dir is None and not place.exists():
            return None
        if voc:
            splits: dict[str, Any] = {k: v for k, v in self.options.items() if k != "class_names"}
            names = self.options.get("class_names")
            return find_voc(place, splits or None, names or (self._carded() if layouts else None))
        named = self.dataset if self.data_dir else "instances"
        flags = [bool(self.options.get(name, False)) for name in ("outside", "coco_classes")]
        if is_cityscapes(place):
            return find_cityscapes(place)
        if self.semantic != "none":
            return find_panoptic(place, self.options.get("annotations"), self.options.get("images"), flags[0])
        return find_coco(place, self.options.get("annotations"), self.options.get("images"), named, *flags)

    def _carded(self) -> list[str]:
        """The classes of the set's card."""
        from zoo import catalog

        card = catalog.data_card("coco" if self.options.get("coco_classes") else self.dataset)
        return card.class_names or [str(k) for k in range(card.num_classes or 0)]

    def _names(self) -> tuple[list[str], list[str]]:
        """Of classes and keypoints: the set's own or, as long as nobody has said where it lies, the card's."""
        if self._layout is None and self.dataset != "shapes":
            return self._carded(), []
        if isinstance(self._layout, VocLayout) and self._layout.class_names is not None:
            return list(self._layout.class_names), []
        first = "train" if self._layout is None or "train" in self._layout.parts else "val"
        source: Any = self._open(first)[0]
        if self.semantic != "none":
            ids = tuple(getattr(source, "panoptic_ids", ()))
            self.panoptic = PanopticClasses(tuple(source.category_names), tuple(source.things), self.semantic, ids)
        return source.class_names, source.keypoint_names

    def _open(self, split: str) -> tuple[RecordSource, np.ndarray]:
        if self._layout is not None:
            return self._layout.open(split)
        if self.dataset != "shapes":
            raise ZooError(f"{self.dataset} is read from a folder: set data.data_dir to where it lies")
        part = "test" if split == "predict" else split
        if part not in _LENGTH:
            raise unknown("split", split, (*_LENGTH, "predict"))
        length = self.train_samples if split == "train" and self.train_samples else _LENGTH[part]
        options = {**self.options, "panoptic": self.semantic != "none"}
        return ShapesScenes(part, length, **options), np.arange(length)

    def samples(self, split: str, training: bool | None = None) -> DetectionSet:
        """The transformed split; `training` chooses between the two sorts of targets and transforms, by default as the
        split asks."""
        training = split == "train" if training is None else training
        source, indices = self._open(split)
        if training and isinstance(source, _FROM_FILES):
            indices = np.intersect1d(indices, source.trainable(self.keypoints))
            if not len(indices):
                raise ZooError(f"{source.file}: no picture has an object to train on")
        if split == "train" and self.subset is not None:
            ids = source.image_ids[indices] if isinstance(source, _FROM_FILES) else indices
            indices = indices[subset(ids, self.subset)]
        if split == "train" and self.train_samples is not None and self.dataset != "shapes":
            indices = indices[self.drawn_part(len(indices), self.train_samples).numpy()]
        transforms = self.train_transforms if training else self.eval_transforms
        return DetectionSet(
            source, transforms or [], indices, training, self.normalise, self.size_divisibility, self.masks,
            self.keypoints, self.seed, SALT[split], self.panoptic,
        )  # fmt: skip

    def class_image_counts(self) -> Tensor | None:
        """(num_classes,) int64: on how many pictures of the training split each class is, all of them also where a part
        is trained on, as in detectron2's fixed table; None where they are drawn."""
        source, _ = self._open("train")
        return torch.from_numpy(source.image_counts()) if isinstance(source, CocoSource) else None

    def train_sampler(self, samples: Any) -> EpochSampler:
        """Wide and high pictures apart, pictures with rare classes more often, as asked for."""
        source, indices = samples.source, samples.indices
        if not isinstance(source, _FROM_FILES):
            return super().train_sampler(samples)
        sizes = source.sizes[indices]
        wide = (sizes[:, 1] > sizes[:, 0]).astype(np.int64) * self.aspect_grouping
        factors = None
        if self.repeat_threshold is not None:
            factors = repeat_factors([source.labels[n] for n in indices], self.repeat_threshold)
        return GroupedSampler(self.batch_size, torch.from_numpy(wide), factors, self.seed, **self._place())

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The truth of evaluation stays where it is."""
        stays = {}
        if self.trainer is not None and not self.trainer.training:
            stays = {"target": batch["target"]}
            batch = {key: value for key, value in batch.items() if key != "target"}
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), **stays}
