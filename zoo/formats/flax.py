"""Reads checkpoints of flax (JAX): ``.msgpack`` files, and what ``flax.training.checkpoints`` writes, a file or an
orbax folder ``checkpoint_<step>``, alone, in a folder or in a zip.

Names are the paths of the tree joined with "/". Of a training state the averaged parameters are taken (``ema_params``)
or the parameters. Nothing in the files is executed. Wants msgpack, and for orbax tensorstore.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import MissingPackage, ZooError, unknown
from zoo.formats import zips
from zoo.weights.download import say

AVERAGED, RAW = "ema_params", "params"  # of a training state, what is read: the first that is there
_STEP = re.compile(r"checkpoint_\d+")
_ARRAY, _SCALAR = 1, 3  # flax's msgpack extensions: an array, and one without axes
_CHUNKED = "__msgpack_chunked_array__"


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a msgpack file, or a folder or zip that holds ``checkpoint_<step>``."""
    if path.is_dir():
        return _below(path) is not None
    if not path.is_file():
        return False
    if names := zips.names(path):
        if any(name.endswith("/data.pkl") for name in names):  # torch's own format, named after its file
            return False
        return any(_STEP.fullmatch(part) for name in names for part in PurePosixPath(name).parts)
    return path.suffix == ".msgpack" or _STEP.fullmatch(path.name) is not None


def read_state_dict(path: Path, use_ema: bool | str | None = None) -> dict[str, Tensor]:
    """The parameters of a checkpoint by their paths; of several steps, the last.

    Args:
        use_ema: of a training state, take the averaged parameters; False: the raw ones; None: the average where there
            is one. Of several averages (``ema_params/500``, ``ema_params/1000``, ...), the name of one.

    Raises:
        ZooError: no checkpoint, or a damaged one; not the set that `use_ema` names; msgpack or tensorstore is missing.
    """
    if path.is_dir():
        found = _below(path)
        if found is None:
            raise ZooError(f"{path}: no flax checkpoint, it has no checkpoint_<step>")
        if found.is_dir():
            return _read_orbax(found, use_ema)
        if not found.is_file():
            raise ZooError(f"{found}: is no regular file (a pipe, socket or device)")
        return _read_msgpack(found, use_ema)
    if not zipfile.is_zipfile(path):
        return _read_msgpack(path, use_ema)
    with zips.unpacked(path) as folder:
        return read_state_dict(folder, use_ema)


def _below(folder: Path) -> Path | None:
    """The checkpoint of the last step in `folder` or in one of its folders."""
    if _STEP.fullmatch(folder.name):
        return folder
    found = [path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}checkpoint_*")]
    steps = [path for path in found if _STEP.fullmatch(path.name)]
    return max(steps, key=lambda path: int(path.name.rpartition("_")[2]), default=None)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def missing(error: ImportError) -> MissingPackage:
    """The error for a package that JAX's checkpoints are read with and that is not there."""
    return MissingPackage(
        f"checkpoints of JAX are read with {error.name}, which is not installed: pip install 'paperzoo[jax]'"
    )


def _chosen(names: Mapping[str, Any] | set[str], path: Path, use_ema: bool | str | None) -> str | None:
    """The part of a training state that is read; None for what is no training state."""
    if use_ema is False and AVERAGED in names and RAW not in names:
        raise ZooError(f"{path}: use_ema=False: holds averaged parameters only ({AVERAGED})")
    if AVERAGED in names and RAW in names and use_ema is None:
        say(f"{path.name}: the averaged parameters ({AVERAGED}) are taken; use_ema=False takes the raw ones")
    order = (RAW, AVERAGED) if use_ema is False else (AVERAGED, RAW)
    return next((name for name in order if name in names), None)


def _one_average(keys: Iterable[str], mark: str, path: Path, use_ema: bool | str | None) -> str:
    """The beginning of the keys of the average named by `use_ema`, of those of averaged parameters; empty where there
    is one average alone."""
    sets: dict[str, set[str]] = {}
    for key in keys:
        name, _, rest = key.partition(mark)
        sets.setdefault(name, set()).add(rest)
    trees = list(sets.values())
    several = len(trees) > 1 and len(trees[0]) > 1 and all(tree == trees[0] for tree in trees)
    if not several:
        if isinstance(use_ema, str):
            raise ZooError(f"{path}: holds one average ({AVERAGED}), and none named {use_ema!r}")
        return ""
    if not isinstance(use_ema, str):
        raise ZooError(f"{path}: holds several averages: name one of {', '.join(sorted(sets))} (use_ema, or --average)")
    if use_ema not in sets:
        raise ZooError(f"{path}: {unknown('average', use_ema, sets)}")
    return f"{use_ema}{mark}"


# ------------------------------------------------------------------------------------------------------------- msgpack


def unpack(path: Path) -> Any:
    """The tree of names in a msgpack file of flax, its leaves NumPy arrays (bfloat16 widened) and plain values.

    Raises:
        ZooError: msgpack is missing, the file is damaged, or holds arrays of other things than numbers.
    """
    try:
        import msgpack
    except ImportError as error:
        raise missing(error) from error

    def array(code: int, data: bytes) -> Any:
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"an extension of kind {code}")
        shape, kind, values = msgpack.unpackb(data, raw=True)
        dtype = kind.decode("ascii")
        if dtype == "bfloat16":  # numpy has none: the upper half of a float32
            halves = np.frombuffer(values, np.uint16).astype(np.uint32) << 16
            return halves.view(np.float32).reshape(shape)
        if np.dtype(dtype).kind not in "biuf":
            raise ValueError(f"an array of {dtype}")
        return np.frombuffer(values, np.dtype(dtype)).reshape(shape)

    try:
        return msgpack.unpackb(path.read_bytes(), ext_hook=array, raw=False, strict_map_key=False)
    except Exception as error:  # msgpack raises whatever it meets
        raise ZooError(f"{path}: not a whole msgpack file of flax ({_line(error)})") from error


def leaves(
    tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """The arrays of a tree, and what `is_leaf` takes for one, by their paths joined with "/"; other values are left."""
    if isinstance(tree, np.ndarray) or is_leaf(tree):
        yield "/".join(path), tree
    elif isinstance(tree, Mapping) and tree.get(_CHUNKED):
        parts = [tree["chunks"][str(k)] for k in range(len(tree["chunks"]))]
        yield "/".join(path), np.concatenate(parts).reshape([tree["shape"][str(k)] for k in range(len(tree["shape"]))])
    elif isinstance(tree, Mapping):
        for name, below in tree.items():
            yield from leaves(below, is_leaf, (*path, str(name)))


def _read_msgpack(path: Path, use_ema: bool | str | None) -> dict[str, Tensor]:
    tree, averaged = unpack(path), False
    try:
        while isinstance(tree, Mapping) and (name := _chosen(tree, path, use_ema)) is not None:
            tree, averaged = tree[name], averaged or name == AVERAGED
        state = {key: torch.from_numpy(np.array(value, order="C")) for key, value in leaves(tree)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ZooError(f"{path}: not a whole flax checkpoint ({_line(error)})") from error
    if use_ema and not averaged:
        raise ZooError(f"{path}: use_ema: holds no averaged parameters ({AVERAGED})")
    if not state:
        raise ZooError(f"{path}: holds no parameters")
    if averaged and (prefix := _one_average(state, "/", path, use_ema)):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


# --------------------------------------------------------------------------------------------------------------- orbax


def read_arrays(opened: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """The values of opened arrays of a checkpoint in `folder`.

    Raises:
        ZooError: their metadata declare more numbers than the folder can hold: tensorstore would end the process.
    """
    room = zips.bound(sum(path.lstat().st_size for path in folder.rglob("*")))
    declared = 0
    for name, array in opened.items():
        shape, chunk = array.domain.shape, array.chunk_layout.read_chunk.shape
        declared += math.prod(shape) * array.dtype.numpy_dtype.itemsize
        if max(declared, math.prod(chunk) * array.dtype.numpy_dtype.itemsize) > room:
            raise ZooError(
                f"{folder}: not a whole checkpoint: {name} is said to be of shape {shape} in chunks of {chunk}, more "
                "numbers than the folder holds"
            )
    reads = {name: array.read() for name, array in opened.items()}  # all at once, so that the waits overlap
    return {name: read.result() for name, read in reads.items()}


def _read_orbax(folder: Path, use_ema: bool | str | None) -> dict[str, Tensor]:
    """Arrays lie as zarr under their dotted paths, each in its folder or all in one store (OCDBT)."""
    try:
        import tensorstore
    except ImportError as error:
        raise missing(error) from error
    base = {"driver": "file", "path": f"{folder}/"}
    store: dict[str, Any] = {"driver": "ocdbt", "base": base} if (folder / "manifest.ocdbt").is_file() else base
    try:
        keys = tensorstore.KvStore.open(store).result().list().result()
        metadata = ("/.zarray", "/zarr.json")
        names = {name.removesuffix(end) for name in (key.decode() for key in keys) for end in metadata
                 if name.endswith(end)}  # fmt: skip
        chosen = _chosen({name.partition(".")[0] for name in names}, folder, use_ema)
        if use_ema and chosen != AVERAGED:
            raise ZooError(f"{folder}: use_ema: holds no averaged parameters ({AVERAGED})")
        prefix = f"{chosen}." if chosen else ""
        if chosen == AVERAGED:
            below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            prefix += _one_average(below, ".", folder, use_ema)
        version = "zarr3" if any(key.endswith(b"/zarr.json") for key in keys) else "zarr"
        opened = {}
        for name in sorted(names):
            if name.startswith(prefix):
                where = {**store, "path": f"{store.get('path', '')}{name}/"}
                spec = {"driver": version, "kvstore": where}
                opened[name.removeprefix(prefix)] = tensorstore.open(spec, open=True, read=True)
        arrays = read_arrays({name: array.result() for name, array in opened.items()}, folder)
    except ValueError as error:  # tensorstore's only kind
        raise ZooError(f"{folder}: not a whole orbax checkpoint ({_line(error)})") from error
    if not arrays:
        raise ZooError(f"{folder}: holds no parameters")
    state = {}
    for name, value in arrays.items():
        wide = value if value.dtype.kind in "biuf" else value.astype(np.float32)  # bfloat16
        state[name.removeprefix("params.").replace(".", "/")] = torch.from_numpy(np.array(wide, order="C"))
    return state
