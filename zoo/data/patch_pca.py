"""Principal axes of the patches of a data set, computed once and kept.

    zoo data patch_pca imagenet1k --data_dir /data/imagenet --image_size 256 --patch_size 16 -o patches.safetensors

The file holds ``basis`` (D, D), ``mean`` (D,) and ``variances`` (D,) in float64, and in its header what they are of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from zoo.data.base import at_least_one
from zoo.errors import ZooError
from zoo.nn.patch_tokenizer import PatchTokenizer
from zoo.ops.patches import patchify
from zoo.ops.pca import Moments, PrincipalAxes


def _as_read(batch: Any) -> Any:
    return batch


def patch_moments(
    samples: Any,
    patch_size: int,
    images: int,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Moments:
    """Moments of all patches of `images` pictures, or of as many as there are, evenly spread over a split.

    Args:
        samples: gives {"image" (B, C, S, S)} for a list of indices, as those of a data module.
        num_workers: processes that read pictures.
        device: where the sums are made; it must know float64.
    """
    at_least_one(images=images, batch_size=batch_size, patch_size=patch_size)
    count = min(images, len(samples))
    chosen = np.linspace(0, len(samples) - 1, count).round().astype(int).tolist()
    batches = [chosen[n : n + batch_size] for n in range(0, count, batch_size)]
    moments = None
    for batch in DataLoader(samples, batch_sampler=batches, collate_fn=_as_read, num_workers=num_workers):
        patches = patchify(batch["image"], patch_size)
        moments = Moments(patches.shape[-1], device) if moments is None else moments
        moments.update(patches)
    if moments is None:
        raise ZooError("principal axes of patches want pictures, and there are none")
    return moments


def fit_patch_pca(
    dataset: str,
    out: str | Path,
    image_size: int = 256,
    patch_size: int = 16,
    images: int = 10_000,
    center: bool = True,
    data_dir: str | None = None,
    split: str = "train",
    batch_size: int = 64,
    num_workers: int | None = None,
    device: torch.device | str = "cpu",
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the principal axes of the patches of a data set's middle crops, normalised as its card says.

    Args:
        dataset, data_dir, options: as in :class:`~zoo.data.ImageDataModule`.
        images: pictures that are read, evenly spread over the split; all of their patches count.
        center: take the mean off first.
        num_workers: processes that read pictures; None: what the machine's cores allow.

    Returns:
        What the header says, with the share of variance of the first 16 axes as `explained_16`.

    Raises:
        ZooError: no such data set, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from zoo.data.datamodule import ImageDataModule
    from zoo.weights.download import replacing

    out = Path(out).expanduser()
    if out.is_dir() or not out.absolute().parent.is_dir():  # told before all is read
        raise ZooError(f"cannot write {out}: {'it is a folder' if out.is_dir() else 'its folder does not exist'}")
    data = ImageDataModule(
        dataset, data_dir, batch_size, image_size=image_size, num_workers=num_workers, options=options
    )
    samples = data.samples(split, train_transform=False)
    moments = patch_moments(samples, patch_size, images, batch_size, data.num_workers or 0, device)
    axes = PrincipalAxes(*(value.cpu().contiguous() for value in moments.axes(center)))
    facts = {
        "dataset": dataset, "split": split, "image_size": image_size, "patch_size": patch_size, "center": center,
        "images": min(images, len(samples)), "patches": moments.count, "mean": list(data.mean), "std": list(data.std),
    }  # fmt: skip
    with replacing(out) as file:
        try:
            save_file(axes._asdict(), file, {"patch_pca": json.dumps(facts)})
        except SafetensorError as error:
            raise ZooError(f"cannot write {out}: {error}") from error
    return {**facts, "explained_16": float(axes.explained(16))}


def read_patch_pca(path: str | Path) -> tuple[PrincipalAxes, dict[str, Any]]:
    """The axes of a file of :func:`fit_patch_pca`, and what its header says.

    Raises:
        ZooError: no such file, or none of principal axes.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ZooError(f"no file {str(path)!r} of principal axes (zoo data patch_pca makes one)")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["patch_pca"])
            axes = PrincipalAxes(*(file.get_tensor(name) for name in PrincipalAxes._fields))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ZooError(f"{path}: not a file of principal axes (zoo data patch_pca makes one)") from error
    dim = len(axes.mean)
    if not isinstance(facts, dict) or axes.basis.shape != (dim, dim) or axes.variances.shape != (dim,):
        raise ZooError(f"{path}: not a whole file of principal axes")
    return axes, facts


def fill_tokenizer(tokenizer: PatchTokenizer, axes: str, data: Any, images: int = 10_000, center: bool = True) -> None:
    """Fills a tokenizer.

    Args:
        axes: "fit": from pictures of the training split; a file of :func:`fit_patch_pca`; or a checkpoint of a linear
            autoencoder of patches, with `patch_encoder` (d or more, D) and `patch_decoder` (D, d).
        data: the data module, or None.
        images: pictures that are read, but for a file of axes.
        center: take the mean off before axes are found.

    Raises:
        ZooError: a file that does not fit, or pictures are wanted and `data` is no data module of the zoo.
    """
    if axes.endswith(".safetensors"):
        found, facts = read_patch_pca(axes)
        for name in ("mean", "std"):
            if (there := getattr(data, name, None)) is not None and list(there) != facts[name]:
                raise ZooError(f"{axes} is of pictures normalised by {name} {facts[name]}, the data by {list(there)}")
        tokenizer.take_axes(found)
        return
    if not callable(getattr(data, "samples", None)):
        raise ZooError("the tokenizer is fitted to a data module of the zoo; else give model.axes a file of axes")
    moments = patch_moments(data.samples("train", train_transform=False), tokenizer.patch_size, images)
    if axes == "fit":
        tokenizer.take_axes(moments.axes(center))
        return
    from zoo.weights.pretrained import read_source

    state = read_source(axes)
    if not {"patch_encoder.weight", "patch_decoder.weight"} <= state.keys():
        raise ZooError(f"model.axes: {axes} holds no linear autoencoder of patches")
    # Rows of log variances stand below the means of a variational one.
    encoder = state["patch_encoder.weight"][: tokenizer.latent_dim]
    tokenizer.take_linear(encoder, state["patch_decoder.weight"], moments)
