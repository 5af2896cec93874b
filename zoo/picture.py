"""What a published model makes of pictures: a sheet of its own drawing, or its five likeliest classes; and what one
makes of noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import catalog
from zoo.data.sources import read_image
from zoo.errors import ZooError
from zoo.pretrained import create_model, create_preprocess


def predict(
    model: str,
    images: Sequence[Path],
    out: Path | None = None,
    weights: str | None = None,
    seed: int = 0,
    top: int = 5,
) -> list[dict[str, Any]]:
    """Runs a model of the catalog on picture files.

    A model with a method ``picture(images, mean=, std=) -> uint8 (3, H, W)`` draws, one that gives logits (B, K)
    classifies.

    Args:
        model: a model, with the tag of its weights where it has several.
        images: picture files.
        out: of a model that draws: a ``.png`` for one sheet of all images, or a folder (default: this one) for one
            file an image. Of a classifier: a ``.json`` for the result, nothing by default.
        weights: load these instead of the published ones: a path, an address, or the name of other weights.
        seed: of what a model draws at random, such as masks.
        top: classes named an image.

    Returns:
        One dict an image: {"image", "picture"} or {"image", "top": [{"label", "index", "probability"}]}.

    Raises:
        ZooError: a missing or broken picture, unknown names, weights that do not match.
    """
    pictures = [read_image(path) for path in images]
    kind = _entry(model).kind
    if kind == "encoder" and ("." in model and weights is None):
        raise ZooError(f"{model} is an encoder without a head: it neither draws nor classifies")
    prepare = create_preprocess(model)
    net = create_model(model, pretrained=weights is None, weights=weights).eval()
    if kind == "full" and not callable(getattr(net, "picture", None)):
        raise ZooError(f"{model} neither draws nor classifies; use it from Python: zoo.create_model({model!r})")
    batch = torch.stack([prepare(picture) for picture in pictures])
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if callable(getattr(net, "picture", None)):
            return _draw(net, model, batch, images, out)
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
) -> list[dict[str, Any]]:
    """A sheet of what a generative model of the catalog samples, a row a class.

    Args:
        model: as in :func:`predict`; it gives ``sample``, ``noise_shape`` and ``num_classes``
            (:mod:`zoo.training.sampling`), and ``autoencoder`` where it samples latents.
        out: the ``.png``; default ``<model>.png`` here.
        weights: as in :func:`predict`.
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
    net = create_model(model, pretrained=weights is None, weights=weights).eval()
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
        names = [f"{image.stem}_{model}" for image in images]
        names = [f"{name}_{n}" if name in names[:n] else name for n, name in enumerate(names)]
        groups, paths = list(batch.split(1)), [(out or Path()) / f"{name}.png" for name in names]
    for group, path in zip(groups, paths, strict=True):
        sheet = net.picture(group, mean=facts.mean, std=facts.std)  # type: ignore[operator]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(sheet.contiguous().cpu(), str(path))
    if len(groups) == 1:
        paths *= len(images)
    return [{"image": str(image), "picture": str(path)} for image, path in zip(images, paths, strict=True)]


def _classify(
    net: nn.Module, model: str, batch: Tensor, images: Sequence[Path], out: Path | None, top: int
) -> list[dict[str, Any]]:
    logits = net(batch)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ZooError(f"{model} neither draws nor classifies; use it from Python: zoo.create_model({model!r})")
    names = _class_names(logits.shape[1])
    best = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]))
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
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    return results


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
