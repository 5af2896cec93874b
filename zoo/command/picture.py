"""What a published model makes of pictures: a sheet of its own drawing, the objects it finds, or the five likeliest
classes, its own or any that are named; and what one makes of noise."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo import catalog, files
from zoo.data.sources import read_image
from zoo.data.text import prompts
from zoo.errors import ZooError
from zoo.weights.pretrained import create_model, create_preprocess


def predict(
    model: str,
    images: Sequence[Path],
    out: Path | None = None,
    weights: str | None = None,
    seed: int = 0,
    top: int = 5,
    threshold: float = 0.5,
    labels: Sequence[str] | None = None,
    use_ema: bool | None = None,
) -> list[dict[str, Any]]:
    """Runs a model of the catalog on picture files.

    A model with a method ``picture(images, mean=, std=) -> uint8 (3, H, W)`` draws, one with a method ``detect`` finds
    objects, one with ``zero_shot(images, names) -> (B, K)`` tells which of any names is likely, one that gives logits
    (B, K) classifies.

    Args:
        model: a model, with or without the tag of its weights; without, the first that its card lists are taken.
        images: picture files.
        out: of a model that draws: a ``.png`` for one sheet of all images, or a folder (default: this one) for one
            file an image. Of a detector: a ``.png`` (of one image), a folder, or a ``.json`` for the result alone. Of a
            classifier: a ``.json`` for the result, nothing by default.
        weights: load these instead of the published ones: a path, an address, or the name of other weights.
        use_ema: of a file that holds raw weights and their average, take the average; False: the raw ones.
        seed: of what a model draws at random, such as masks.
        top: classes named an image.
        threshold: objects of a lower score are left out.
        labels: what a zero-shot model is to choose from; ImageNet's 1000 names by default.

    Returns:
        One dict an image: {"image", "picture"}, {"image", "top": [{"label", "index", "probability"}]}, or {"image",
        "picture", "objects": [{"label", "index", "score", "box", "keypoints"}]} with boxes x0, y0, x1, y1 and keypoints
        x, y in pixels of the file, the best first.

    Raises:
        ZooError: a missing or broken picture, unknown names, weights that do not match.
    """
    pictures = [read_image(path, upright=True) for path in images]
    published = _entry(model)
    kind = published.kind
    if kind == "full":
        model = published.name
    if kind == "encoder" and ("." in model and weights is None):
        raise ZooError(f"{model} is an encoder without a head: it neither draws nor classifies")
    prepare = create_preprocess(model)
    net = create_model(model, pretrained=weights is None, weights=weights, use_ema=use_ema).eval()
    draws, free = (callable(getattr(net, name, None)) for name in ("picture", "zero_shot"))
    if labels is not None and not free:
        raise ZooError(f"{model} has classes of its own, or none: labels are for models that take any names")
    if callable(getattr(net, "detect", None)):
        return _detect(net, model, prepare, pictures, images, out, threshold)
    if kind == "full" and not (draws or free):
        raise ZooError(f"{model} neither draws nor classifies; use it from Python: zoo.create_model({model!r})")
    batch = torch.stack([prepare(picture) for picture in pictures])
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if draws:
            return _draw(net, model, batch, images, out)
        if free:
            names = list(labels) if labels is not None else prompts("imagenet1k")[0]
            return _named(net.zero_shot(batch, names), names, model, images, out, top)  # type: ignore[operator]
        return _classify(net, model, batch, images, out, top)


class _Decoded:
    """A network that samples latents, with the autoencoder that makes pictures of them."""

    def __init__(self, net: Any) -> None:
        from zoo.nn.autoencoder import PIXELS, FrozenAutoencoder

        self.net, self.noise_shape, self.num_classes = net, net.noise_shape, net.num_classes
        self.autoencoder = FrozenAutoencoder(getattr(net, "autoencoder", PIXELS))

    def sample(self, noise: Tensor, label: Tensor | None) -> Tensor:
        return self.autoencoder.decode(self.net.sample(noise, label))


def sample(
    model: str,
    out: Path | None = None,
    weights: str | None = None,
    count: int = 16,
    classes: list[int] | None = None,
    seed: int = 0,
    use_ema: bool | None = None,
) -> list[dict[str, Any]]:
    """A sheet of what a generative model of the catalog samples, a row a class.

    Args:
        model: as in :func:`predict`; it gives ``sample``, ``noise_shape`` and ``num_classes``
            (:mod:`zoo.training.sampling`), and ``autoencoder`` where it samples latents.
        out: the ``.png``; default ``<model>.png`` here.
        weights, use_ema: as in :func:`predict`.
        count: pictures.
        classes: labels of the rows; default the first ones.
        seed: of the noise.

    Returns:
        [{"picture"}].

    Raises:
        ZooError: the model does not sample; unknown names; weights that do not match.
    """
    from torchvision.io import write_png

    from zoo.training.sampling import SampleGrid, check_samples

    path = out or Path(f"{model}.png")
    if path.suffix != ".png":
        raise ZooError(f"samples are drawn into a .png, not {str(path)!r}")
    net = create_model(model, pretrained=weights is None, weights=weights, use_ema=use_ema).eval()
    if not callable(getattr(net, "sample", None)):
        raise ZooError(f"{model} makes nothing without pictures: zoo predict {model} IMAGE...")
    check_samples(net)
    with torch.inference_mode():
        sheet = SampleGrid(count, classes=classes, seed=seed).sheet(_Decoded(net), "cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(sheet, str(path))
    return [{"picture": str(path)}]


def _draw(net: nn.Module, model: str, batch: Tensor, images: Sequence[Path], out: Path | None) -> list[dict[str, Any]]:
    from torchvision.io import write_png

    facts = _entry(model).preprocess
    if out is not None and out.suffix == ".png":
        groups, paths = [batch], [out]
    else:
        groups, paths = list(batch.split(1)), _one_file_each(model, images, out)
    for group, path in zip(groups, paths, strict=True):
        sheet = net.picture(group, mean=facts.mean, std=facts.std)  # type: ignore[operator]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(sheet.contiguous().cpu(), str(path))
    if len(groups) == 1:
        paths *= len(images)
    return [{"image": str(image), "picture": str(path)} for image, path in zip(images, paths, strict=True)]


def _one_file_each(model: str, images: Sequence[Path], folder: Path | None) -> list[Path]:
    names = [f"{image.stem}_{model}" for image in images]
    names = [f"{name}_{n}" if name in names[:n] else name for n, name in enumerate(names)]
    return [(folder or Path()) / f"{name}.png" for name in names]


def _write_json(results: list[dict[str, Any]], out: Path) -> None:
    files.write_json(out, results)


def _classify(
    net: nn.Module, model: str, batch: Tensor, images: Sequence[Path], out: Path | None, top: int
) -> list[dict[str, Any]]:
    logits = net(batch)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ZooError(f"{model} neither draws nor classifies; use it from Python: zoo.create_model({model!r})")
    return _named(logits.float().softmax(dim=1), _class_names(logits.shape[1]), model, images, out, top)


def _named(
    likely: Tensor, names: list[str] | None, model: str, images: Sequence[Path], out: Path | None, top: int
) -> list[dict[str, Any]]:
    """The `top` of the probabilities (B, K) by name."""
    best = likely.topk(min(top, likely.shape[1]))
    results = []
    for image, probabilities, indices in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
        rows = [
            {"label": names[k] if names else f"class {k}", "index": k, "probability": p}
            for p, k in zip(probabilities, indices, strict=True)
        ]
        results.append({"image": str(image), "top": rows})
    if out is not None:
        if out.suffix != ".json":
            raise ZooError(f"{model} is a classifier: its result is a .json, not {str(out)!r}")
        _write_json(results, out)
    return results


# ------------------------------------------------------------------------------------------------------------- objects

# Lines between COCO's 17 keypoints of a person.
_PERSON = (
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12), (11, 13),
    (13, 15), (12, 14), (14, 16),
)  # fmt: skip
_KEYPOINT_SCORE = 0.05  # a point of a lower score is not drawn


def _detect(
    net: nn.Module,
    model: str,
    prepare: Any,
    pictures: Sequence[Tensor],
    images: Sequence[Path],
    out: Path | None,
    threshold: float,
) -> list[dict[str, Any]]:
    from torchvision.io import write_png

    if out is not None and out.suffix == ".png" and len(images) > 1:
        raise ZooError(f"{len(images)} images and one file {str(out)!r}: give a folder with -o")
    to_json = out is not None and out.suffix == ".json"
    paths = [out] if out is not None and out.suffix == ".png" else _one_file_each(model, images, out)
    names = _object_names(net)
    results: list[dict[str, Any]] = []
    for picture, image, path in zip(pictures, images, paths, strict=True):
        found = find_objects(net, picture, prepare, threshold)
        result: dict[str, Any] = {"image": str(image)}
        if not to_json and path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(draw_objects(picture, found, names), str(path))
            result["picture"] = str(path)
        results.append({**result, "objects": _objects(found, names)})
    if to_json and out is not None:
        _write_json(results, out)
    return results


def find_objects(net: nn.Module, picture: Tensor, prepare: Any, threshold: float = 0.5) -> dict[str, Tensor]:
    """What a detector finds on a picture (3, H, W) uint8, in its pixels, the best first: boxes (N, 4), scores (N,),
    labels (N,), and masks (N, H, W) and keypoints (N, P, 3) where it gives them. `prepare` is its preprocessing."""
    image = prepare(picture)
    height, width = image.shape[-2:]
    step = getattr(net, "size_divisibility", 32) or 1
    padded = image.new_zeros(1, 3, -(-height // step) * step, -(-width // step) * step)
    padded[..., :height, :width] = image
    sizes = {"size": torch.tensor([[height, width]]), "original_size": torch.tensor([picture.shape[-2:]])}
    with torch.inference_mode():
        found = net({"image": padded, **sizes})[0]
    order = found["scores"].argsort(descending=True)
    order = order[found["scores"][order] >= threshold]
    return {name: value[order] for name, value in found.items()}


def draw_objects(picture: Tensor, found: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
    """The picture (3, H, W) uint8 with boxes, masks, keypoints, and labels with scores, if any; as large."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    drawn = picture.contiguous()
    count = len(found["boxes"])
    if not count:
        return drawn
    line = max(2, round(min(picture.shape[-2:]) / 250))
    colors = _colors(count)
    # Large objects first, so that small ones stay on top.
    sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
    order = sides.prod(1).argsort(descending=True).tolist()
    if "masks" in found:
        drawn = draw_segmentation_masks(drawn, found["masks"][order], alpha=0.45, colors=[colors[n] for n in order])
    drawn = draw_bounding_boxes(drawn, found["boxes"][order], colors=[colors[n] for n in order], width=line)
    if "keypoints" in found:
        drawn = _draw_keypoints(drawn, found["keypoints"], colors, line)
    labels = [_name(names, int(k)) for k in found["labels"]]
    if "scores" in found:
        labels = [f"{label} {score:.0%}" for label, score in zip(labels, found["scores"], strict=True)]
    return _draw_labels(drawn, found["boxes"], labels, colors, order)


def _colors(count: int) -> list[tuple[int, int, int]]:
    """Colours that lie far apart: hues by the golden ratio, two brightnesses in turn."""
    found = []
    for n in range(count):
        red, green, blue = colorsys.hsv_to_rgb(0.02 + n * 0.618034 % 1, 0.85, 1.0 if n % 2 == 0 else 0.8)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


def _draw_keypoints(drawn: Tensor, points: Tensor, colors: Sequence[tuple[int, int, int]], line: int) -> Tensor:
    from torchvision.utils import draw_keypoints

    lines = list(_PERSON) if points.shape[1] == 17 else None
    for place, color in zip(points, colors, strict=True):
        seen = place[:, 2] >= _KEYPOINT_SCORE
        drawn = draw_keypoints(
            drawn, place[None, :, :2], connectivity=lines, colors=color, radius=line + 1, width=line,
            visibility=seen[None],
        )  # fmt: skip
    return drawn


def _draw_labels(
    drawn: Tensor, boxes: Tensor, labels: Sequence[str], colors: Sequence[tuple[int, int, int]], order: Sequence[int]
) -> Tensor:
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.fromarray(drawn.permute(1, 2, 0).numpy())
    pen, size = ImageDraw.Draw(canvas), max(10, round(min(canvas.size) / 40))
    font = ImageFont.load_default(size)
    for n in order:
        x, y = boxes[n, :2].tolist()
        left, top, right, bottom = pen.textbbox((0, 0), labels[n], font=font)
        width, height = right - left + 4, bottom - top + 4
        # Above the box or, where there is no room, inside it; never beyond the border.
        x, y = min(max(x, 0), max(canvas.width - width, 0)), y - height if y >= height else y
        pen.rectangle((x, y, x + width, y + height), fill=colors[n])
        light = np.dot(colors[n], (0.299, 0.587, 0.114)) > 140
        pen.text((x + 2 - left, y + 2 - top), labels[n], fill="black" if light else "white", font=font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def _objects(found: Mapping[str, Tensor], names: Sequence[str] | None) -> list[dict[str, Any]]:
    rows = []
    for n, (label, score, box) in enumerate(zip(found["labels"], found["scores"], found["boxes"], strict=True)):
        row: dict[str, Any] = {"label": _name(names, int(label)), "index": int(label), "score": float(score)}
        row["box"] = [round(value, 2) for value in box.tolist()]
        if "keypoints" in found:
            row["keypoints"] = [[round(v, 2) for v in point] for point in found["keypoints"][n, :, :2].tolist()]
        rows.append(row)
    return rows


def _name(names: Sequence[str] | None, label: int) -> str:
    return names[label] if names is not None else f"class {label}"


def _object_names(net: nn.Module) -> list[str] | None:
    """The names of a detector's classes: those of the set of its number of classes, "person" for the only one."""
    count = getattr(net, "num_classes", None)
    if count == 1:
        return ["person"]
    cards = [catalog.data_card(name) for name in catalog.list_datasets()]
    named = [card.class_names for card in cards if "detection" in card.task and card.num_classes == count]
    return next((names for names in named if names), None)


# --------------------------------------------------------------------------------------------------------------- names


def _entry(model: str) -> catalog.Weight:
    """The published weights named, or the first of a model named without tag."""
    if "." in model:
        return catalog.weight(model)[1]
    card, entry = catalog.model(model)
    published = [weight for weight in card.weights if weight.model == entry.name]
    if not published:
        raise ZooError(f"{model!r} has no published weights, and so no preprocessing of their own")
    return published[0]


def _class_names(count: int) -> list[str] | None:
    if count != 1000:
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(k) for k in range(count)]
