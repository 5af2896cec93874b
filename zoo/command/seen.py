"""What a data module gives a model, as a sheet: samples as they are stored, as training changes them, as evaluation
takes them, with their labels, boxes, masks, keypoints and captions."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from zoo.command.drawing import draw_objects
from zoo.command.parse_errors import innermost
from zoo.command.reading import command_line, installed_only
from zoo.command.recipes import RecipeCLI, quiet
from zoo.data.arc_predictions import PALETTE
from zoo.data.datamodule import SampleSet
from zoo.data.detection import DetectionSet
from zoo.data.shown import name_of, pixels, strip
from zoo.data.video import VideoSet
from zoo.errors import ZooError
from zoo.ops.sheet import drawable, titled_sheet

_SIDE = 192  # pixels of a cell, at least
_MOST = 448  # of a large picture
_FRAMES = 4  # of a clip
_LINE = 15  # pixels of a line of text

Cell = tuple[Tensor, str]  # a uint8 picture (3, H, W), and what is written below it


class _DataCLI(RecipeCLI):
    """The command line of a recipe of which the data module alone is made."""

    def instantiate_classes(self) -> None:
        from lightning.pytorch import LightningDataModule
        from lightning.pytorch.cli import LightningArgumentParser

        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        self.datamodule = parser.instantiate_classes(parser.parse_object({"data": self.config["data"]})).data


def data_of(recipe: str, options: Sequence[str] = ()) -> Any:
    """The data module of a recipe with options, its seed set; no model is built.

    Raises:
        ZooError: unknown names, options or values; data that is not there.
    """
    with quiet(), installed_only():
        line = command_line(recipe, options)
        try:
            data = _DataCLI(line, "fit", rich=False, dry=True).datamodule
        except ZooError:
            raise
        except Exception as error:
            raise ZooError(f"{line.name}: {innermost(error)}") from error
    if data is None:
        raise ZooError(f"{line.name}: names no data")
    return data


def draw(data: Any, split: str = "train", count: int = 6) -> tuple[Tensor, str]:
    """A uint8 sheet (3, H, W) of `count` samples of a split, drawn with the run's seed; and what it shows, in words.

    Raises:
        ZooError: the data cannot be read, or gives nothing that can be drawn.
    """
    if not callable(getattr(data, "samples", None)):
        raise ZooError(f"{type(data).__name__} has no samples(split), which a preview wants")
    data.prepare_data()
    samples = data.samples(split)
    if not len(samples):
        raise ZooError(f"{getattr(data, 'dataset', data)}: no samples of {split}")
    chosen = sorted(random.Random(data.seed).sample(range(len(samples)), min(count, len(samples))))
    batch = samples.__getitems__(chosen[:1])
    if "arc_task" in batch:
        return _tasks(samples, chosen)
    if "pair" in batch:
        return _canvases(samples, chosen)
    image = batch.get("image")
    if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1:] == (2, 1, 1):
        return _points(samples)
    rows = [dict(_cells(data, samples, index, split)) for index in chosen]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    return _sheet(rows, titles), f"{len(rows)} samples of {split}; {', '.join(titles)}"


# ------------------------------------------------------------------------------------------------------------- samples


def _cells(data: Any, samples: Any, index: int, split: str) -> Iterator[tuple[str, Cell]]:
    """The columns of a sample, each with its title."""
    train = split == "train"
    again = [0, 1] if train else [0]
    batches = [samples.__getitems__([(index, epoch, 0)]) for epoch in again]
    if isinstance(samples, DetectionSet):
        yield from _scenes(data, samples, index, batches, train)
        return
    if isinstance(samples, SampleSet):
        stored = samples.source[index]
        yield "as stored", (stored["image"], _labels(data, batches[0], samples.name(index)))
    titles = ["trained on", "in another epoch"] if train else ["evaluated"]
    for title, batch in zip(titles, batches, strict=True):
        text = _text(batch)
        if "views" in batch:
            for n, view in enumerate(batch["views"], 1):
                yield f"view {n}", (_of(data, view), text)
            break  # the views are unlike each other already
        picture, word = _picture(data, batch)
        yield f"{title}{word}", (picture, text or ("" if isinstance(samples, SampleSet) else _labels(data, batch)))
    if train:
        yield from _evaluated(data, samples, index)


def _evaluated(data: Any, samples: Any, index: int) -> Iterator[tuple[str, Cell]]:
    """The same training sample as evaluation would take it."""
    if isinstance(samples, VideoSet):
        other = VideoSet(
            samples.source, data.eval_transform, samples.num_frames, samples.sampling_rate, samples.target_fps,
            samples.sampling, False, 1, 1, data.mean, data.std, samples.seed, samples.salt, samples.min_frames,
        )  # fmt: skip
    elif isinstance(samples, SampleSet):
        other = data.samples("train", train_transform=False)
    else:
        return
    batch = other.__getitems__([index])
    if "views" in batch:
        for n, view in enumerate(batch["views"][:3], 1):
            yield f"evaluated, crop {n}", (_of(data, view), "")
    else:
        picture, word = _picture(data, batch)
        yield f"evaluated{word}", (picture, "")


def _of(data: Any, image: Tensor) -> Tensor:
    """The only picture of a batch of one, as pixels; of latents their first channels."""
    shown = pixels(data, image)
    if shown is not None:
        return shown[0]
    values = image[0].detach().float()
    if values.ndim != 3:
        raise ZooError(f"samples of shape {tuple(image.shape)} cannot be drawn")
    values = values[:3] if len(values) >= 3 else values[:1].expand(3, -1, -1)
    low, high = values.amin(), values.amax()
    return (255 * (values - low) / (high - low).clamp(min=1e-12)).round().to(torch.uint8)


def _picture(data: Any, batch: Mapping[str, Any]) -> tuple[Tensor, str]:
    """A sample as a picture, and what a title must say of it."""
    if "video" in batch:
        if not len(batch["video"]):
            raise ZooError("a video cannot be read; zoo data check names it")
        shown = pixels(data, batch["video"])
        if shown is None:
            raise ZooError("the clips cannot be drawn: their data module states no mean and std")
        if "target" in batch:
            return _key_frame(data, shown[0], batch["target"][0]), ", boxes on the key frame"
        return strip(
            shown[0], min(_FRAMES, shown.shape[2])
        ), f", {min(_FRAMES, shown.shape[2])} of {shown.shape[2]} frames"
    if "image" not in batch:
        raise ZooError(f"samples with {', '.join(batch)} cannot be drawn")
    if pixels(data, batch["image"]) is None:
        return _of(data, batch["image"]), f" (latents of {batch['image'].shape[1]} channels, the first as colours)"
    return _of(data, batch["image"]), ""


def _key_frame(data: Any, clip: Tensor, target: Mapping[str, Any]) -> Tensor:
    """The first frame of a clip (3, T, H, W), the middle one with its boxes and the first action of each, the last."""
    middle, boxes, labels = clip.shape[1] // 2, target["boxes"].float(), target["labels"]
    found = {"boxes": boxes, "labels": labels.long().argmax(1) if labels.ndim == 2 else labels}
    drawn = draw_objects(clip[:, middle], found, getattr(data, "class_names", None))
    return strip(torch.stack([clip[:, 0], drawn, clip[:, -1]], dim=1), 3)


def _labels(data: Any, batch: Mapping[str, Any], file: str | None = None) -> str:
    names = getattr(data, "class_names", None)
    told = []
    label = batch.get("label")
    if isinstance(label, Tensor) and len(label):
        if label.ndim == 1:
            told.append(name_of(names, int(label[0])))
        else:
            told.append(", ".join(name_of(names, k) for k in label[0].nonzero()[:, 0].tolist()) or "no label")
    for target in batch.get("target") or ():
        told += [name_of(names, k) for k in _columns(target)]
    if file:
        told.append(str(file).rpartition("/")[2])
    return "\n".join(told)


def _columns(target: Mapping[str, Any]) -> list[int]:
    """The actions of a clip's boxes."""
    labels = target["labels"]
    return sorted(set((labels.nonzero()[:, 1] if labels.ndim == 2 else labels).tolist()))


def _text(batch: Mapping[str, Any]) -> str:
    return "\n".join(batch.get("caption") or ())


# ------------------------------------------------------------------------------------------------------------- objects


def _scenes(
    data: Any, samples: DetectionSet, index: int, batches: Sequence[Mapping[str, Any]], train: bool
) -> Iterator[tuple[str, Cell]]:
    truth = data.samples("train" if train else "val", training=False)
    truth.source, truth.indices = samples.source, samples.indices
    record = samples.source.read_many([int(samples.indices[index])])[0]
    stored = truth.__getitems__([index])
    yield "as stored", (_objects(data, record.image, stored["target"][0]), record.path.rpartition("/")[2])
    titles = ["trained on", "in another epoch"] if train else []
    for title, batch in zip(titles, batches, strict=False):
        height, width = batch["size"][0].tolist()
        image = _of(data, batch["image"])[:, :height, :width]
        yield title, (_objects(data, image, batch["target"][0]), f"{width} x {height}")
    height, width = stored["size"][0].tolist()
    yield "evaluated", (_of(data, stored["image"])[:, :height, :width], f"{width} x {height}")


def _objects(data: Any, picture: Tensor, target: Mapping[str, Any]) -> Tensor:
    """A picture with its objects; a small one enlarged first, so that they can be told apart."""
    zoom = max(1, -(-_SIDE // min(picture.shape[-2:])))
    height, width = (int(side) for side in picture.shape[-2:])
    picture = picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    found: dict[str, Tensor] = {"boxes": target["boxes"].float() * zoom, "labels": target["labels"]}
    masks = _masks(target, height, width)
    if masks is not None and len(masks):
        found["masks"] = masks.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    if "keypoints" in target and len(target["keypoints"]):
        points = target["keypoints"].float().clone()
        points[..., :2] *= zoom
        found["keypoints"] = points
    return draw_objects(picture, found, getattr(data, "class_names", None))


def _masks(target: Mapping[str, Any], height: int, width: int) -> Tensor | None:
    from pycocotools import mask as coco

    if "polygons" in target:
        runs = [
            coco.merge(coco.frPyObjects([list(map(float, ring)) for ring in rings], height, width))
            for rings in target["polygons"]
        ]
    elif isinstance(target.get("masks"), list):
        runs = target["masks"]
    else:
        return target.get("masks")
    if not runs:
        return None
    return torch.from_numpy(coco.decode(runs)).permute(2, 0, 1).bool()


# ---------------------------------------------------------------------------------------------------- grids and points


def _grid(grid: np.ndarray | None, cell: int = 0) -> Tensor:
    """A grid of colours as a picture with lines between its cells; what is not known is white."""
    if grid is None:
        return torch.full((3, _SIDE, _SIDE), 255, dtype=torch.uint8)
    palette = np.array(PALETTE, np.uint8)
    cell = cell or max(2, _SIDE // max(grid.shape))
    shown = palette[np.clip(grid, 0, len(PALETTE) - 1)].repeat(cell, 0).repeat(cell, 1)
    if cell > 3:
        shown[::cell], shown[:, ::cell] = 96, 96
    return torch.from_numpy(shown.copy()).permute(2, 0, 1)


def _canvases(samples: Any, chosen: Sequence[int]) -> tuple[Tensor, str]:
    """Pairs of ARC, and the canvases they are laid on."""
    rows: list[dict[str, Cell]] = []
    for index in chosen:
        row: dict[str, Cell] = {}
        for epoch in (0, 1):
            batch = samples.__getitems__([(index, epoch, 0)])
            image, target = (batch[key].flatten(0, batch[key].ndim - 3)[0].numpy() for key in ("image", "target"))
            if not epoch:
                pair, task = batch["pair"][0], f"task {int(batch['task'][0])}"
                row |= {"input": (_grid(pair.input), task), "output": (_grid(pair.output), "")}
            title = "its canvas" if not epoch else "in another epoch"
            row |= {title: (_grid(image, 2 * _SIDE // max(image.shape)), "")}
            if not epoch:
                row["the answer's canvas"] = (_grid(target, 2 * _SIDE // max(target.shape)), "")
        rows.append(row)
    return _sheet(rows, list(rows[0])), f"{len(rows)} pairs and their canvases"


def _tasks(samples: Any, chosen: Sequence[int]) -> tuple[Tensor, str]:
    """Whole tasks of ARC: demonstrations and the first test."""
    rows: list[dict[str, Cell]] = []
    for task in samples.__getitems__(list(chosen))["arc_task"]:
        row: dict[str, Cell] = {}
        for n, pair in enumerate(task.train[:3], 1):
            row[f"input {n}"], row[f"output {n}"] = (
                (_grid(pair.input), task.name if n == 1 else ""),
                (_grid(pair.output), ""),
            )
        row["test"] = (_grid(task.test[0].input), "")
        rows.append(row)
    titles = list(dict.fromkeys(title for row in rows for title in row))
    return _sheet(rows, titles), f"{len(rows)} tasks: demonstrations and test"


def _points(samples: Any, count: int = 4000) -> tuple[Tensor, str]:
    """Points in the plane, all of them on one picture."""
    points = samples.__getitems__(list(range(min(count, len(samples)))))["image"].flatten(1)
    low, high = points.amin(0), points.amax(0)
    centre, reach = (low + high) / 2, float((high - low).max()) / 2 * 1.1 or 1.0
    side = 2 * _SIDE
    place = ((points - centre) / reach / 2 + 0.5).clamp(0, 1) * (side - 2)
    shown = torch.full((3, side, side), 255, dtype=torch.uint8)
    x, y = place[:, 0].long(), side - 2 - place[:, 1].long()
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        shown[:, y + down, x + right] = torch.tensor([[36], [99], [168]], dtype=torch.uint8)
    bounds = f"{low[0]:.2f} to {high[0]:.2f} by {low[1]:.2f} to {high[1]:.2f}"
    row: dict[str, Cell] = {f"{len(points)} points": (shown, bounds)}
    return _sheet([row], list(row)), f"{len(points)} points in the plane"


# --------------------------------------------------------------------------------------------------------------- sheet


def _sheet(rows: Sequence[Mapping[str, Cell]], titles: Sequence[str]) -> Tensor:
    """Rows of cells under titles, all cells of one size; one that a row lacks is white."""
    fitted = [{title: (_fitted(picture), text) for title, (picture, text) in row.items()} for row in rows]
    cells = [cell for row in fitted for cell in row.values()]
    height, width = (max(int(picture.shape[k]) for picture, _ in cells) for k in (-2, -1))
    letters = max(8, width // 7)
    lines = {text: [part for line in text.split("\n") for part in textwrap.wrap(line, letters)] for _, text in cells}
    most = min(4, max(len(found) for found in lines.values()))
    white = torch.full((3, height + most * _LINE, width), 255, dtype=torch.uint8)
    columns = {}
    for title in titles:
        column = []
        for row in fitted:
            cell = white.clone()
            if title in row:
                picture, text = row[title]
                left = (width - picture.shape[-1]) // 2
                cell[:, : picture.shape[-2], left : left + picture.shape[-1]] = picture
                _write(cell, lines[text][:most], int(picture.shape[-2]))
            column.append(cell)
        columns[title] = torch.stack(column).float() / 255
    return titled_sheet(columns)


def _fitted(picture: Tensor) -> Tensor:
    """A picture (3, H, W) in a cell: a small one enlarged by a whole number, a large one made smaller."""
    picture = picture[:3] if picture.shape[0] >= 3 else picture.expand(3, -1, -1)
    height, width = (int(side) for side in picture.shape[-2:])
    wide = width >= 2 * height  # a strip
    zoom = _SIDE // 2 // height if wide else _SIDE // max(height, width)
    if zoom > 1:
        return picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    scale = (_MOST if not wide else 2 * _MOST) / max(height, width)
    if scale >= 1:
        return picture
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return interpolate(picture[None].float(), size=size, mode="bilinear", antialias=True)[0].round().to(torch.uint8)


def _write(cell: Tensor, lines: Sequence[str], top: int) -> None:
    """Writes lines of text into a cell, below its picture, which ends at `top`."""
    from PIL import Image, ImageDraw, ImageFont

    if not lines:
        return
    area = Image.new("RGB", (cell.shape[-1], cell.shape[-2] - top), "white")
    pen, font = ImageDraw.Draw(area), ImageFont.load_default(12)
    for n, line in enumerate(lines):
        pen.text((area.width / 2, n * _LINE + _LINE / 2 + 1), drawable(line), fill="#333333", font=font, anchor="mm")
    cell[:, top:] = torch.from_numpy(np.array(area)).permute(2, 0, 1)
