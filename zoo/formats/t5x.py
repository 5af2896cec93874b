"""Reads the parameters of t5x checkpoints (JAX): an index in msgpack beside one zarr array a parameter.

A checkpoint is a folder, or a zip of one: the file ``checkpoint`` holds the tree of names, small arrays themselves, and
of the others where they lie, ``target.<path>``. Optimiser states are not touched. Nothing in the files is executed, and
no array is read from elsewhere than the checkpoint's own folder, whatever the index says.

Wants the extra ``jax`` (tensorstore, msgpack).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats import zips
from zoo.formats.flax import leaves, missing, read_arrays, unpack

INDEX = "checkpoint"


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder or a zip that holds a t5x checkpoint."""
    path = Path(path)
    if path.is_dir():
        return _index_below(path) is not None
    return path.is_file() and _index_in(zips.names(path)) is not None


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The parameters of a checkpoint, by their paths in the tree joined with "/".

    Raises:
        ZooError: no checkpoint, a damaged one, or one that points outside itself; tensorstore or msgpack is missing.
    """
    path = Path(path)
    if path.is_dir():
        index = _index_below(path)
        if index is None:
            raise ZooError(f"{path}: no t5x checkpoint, it has no file {INDEX!r}")
        return _read(index)
    inside = _index_in(zips.names(path))
    if inside is None:
        with zips.opened(path):  # says so where it is no zip
            raise ZooError(f"{path}: no t5x checkpoint, it has no file {INDEX!r}")
    base = str(PurePosixPath(inside).parent)
    start = "" if base == "." else f"{base}/"
    with zips.unpacked(
        path, lambda names: [m for m in names if m == inside or m.startswith(f"{start}target.")]
    ) as folder:
        return _read(folder / inside)


def _index_below(folder: Path) -> Path | None:
    found = [path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}{INDEX}") if path.is_file()]
    return found[0] if found else None


def _index_in(names: Sequence[str]) -> str | None:
    return min((name for name in sorted(names) if PurePosixPath(name).name == INDEX), key=len, default=None)


def _read(index: Path) -> dict[str, Tensor]:
    try:
        import tensorstore
    except ImportError as error:
        raise missing(error) from error
    tree = unpack(index)
    try:
        target = tree["optimizer"]["target"]
        found = dict(leaves(target["params"] if set(target) == {"params"} else target, _lies_elsewhere))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ZooError(f"{index}: not the index of a t5x checkpoint ({' '.join(str(error).split())[:200]})") from error
    opened: dict[str, Any] = {}
    try:
        for key, leaf in found.items():
            if isinstance(leaf, Mapping):
                where = {"driver": "file", "path": str(_place(index.parent, leaf, key))}
                opened[key] = tensorstore.open({"driver": "zarr", "kvstore": where}, open=True, read=True)
        state = found | read_arrays({key: array.result() for key, array in opened.items()}, index.parent)
    except ValueError as error:  # tensorstore's only kind
        raise ZooError(f"{index.parent}: {' '.join(str(error).split())[:300]}") from error
    return {key: _tensor(value) for key, value in state.items()}


def _lies_elsewhere(node: Any) -> bool:
    """Whether a node of the index says where an array lies instead of holding it."""
    if not isinstance(node, Mapping | None):
        raise ValueError(f"the tree holds a {type(node).__name__}")
    return node is not None and "driver" in node and "kvstore" in node


def _place(folder: Path, spec: Mapping[str, Any], key: str) -> Path:
    """Where the array of a spec lies in `folder`; buckets and drivers that it names are those it was written to."""
    name = spec.get("path") or spec["kvstore"].get("path") or ""
    place = (folder / name).resolve()
    if not name or folder.resolve() not in place.parents:
        raise ZooError(f"{folder}: {key} is said to lie at {name!r}, outside the checkpoint")
    return place


def _tensor(value: np.ndarray) -> Tensor:
    if value.dtype.kind not in "biuf":  # bfloat16, which numpy does not know
        value = value.astype(np.float32)
    return torch.from_numpy(np.array(value, order="C"))
