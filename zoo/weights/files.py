"""Files that someone else may have written: what they are, and checkpoints of runs, read without running anything."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.formats import flax, persistence, pickles, pytorch, t5x, torch7, zips
from zoo.weights.download import page, say

# Where files keep weights: those that an optimiser moved, and their averages. Of each the first that is there counts.
RAW = ("state_dict", "model", "model_state", "model_state_dict", "module", "params", "blobs")
AVERAGED = (
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema_params",
    "ema",
    "params_ema",
    "ema_model",
    "model_ema1",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "network.")  # of DataParallel, torch.compile, Lightning modules


def check_file(path: Path) -> None:
    """Refuses what cannot be a file of weights: nothing there, a folder, a FIFO or device, an empty file, a page.

    Raises:
        ZooError: one line that names the path and what lies there.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ZooError(f"{path}: is a folder, not a file")
        if not stat.S_ISREG(mode):
            raise ZooError(f"{path}: is no regular file (a pipe, socket or device)")
        with path.open("rb") as file:
            head = file.read(512)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ZooError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ZooError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not head:
        raise ZooError(f"{path}: not a whole file of weights: it is empty")
    if kind := page(head):
        raise ZooError(f"{path}: {kind}, not a whole file of weights")


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint of a run (Lightning's), always with ``weights_only``: nothing in it is executed.

    Raises:
        ZooError: one line that names the file and the reason: nothing there, a folder, a pipe, empty, a page, not
            whole, something in it that no checkpoint holds (named by place and type), weights without a run, or NaN
            among them.
    """
    path = Path(path)
    check_file(path)
    if not pytorch.is_checkpoint(path):
        raise ZooError(f"{path}: not a checkpoint of a run, or not a whole one")
    try:
        content = pytorch.read(path, map_location=map_location)
    except ZooError as error:
        raise ZooError(f"{path}: {error}") from error
    wanted = ("pytorch-lightning_version", "state_dict", "global_step")
    missing = [key for key in wanted if not isinstance(content, dict) or key not in content]
    if missing:
        raise ZooError(f"{path}: weights, not a checkpoint of a run: it holds no {missing[0]!r}")
    for part, state in content.items():
        if str(part).endswith("state_dict") and isinstance(state, Mapping):
            refuse_nan({key: value for key, value in state.items() if isinstance(value, Tensor)}, path)
    return content


def read_state_dict(path: str | os.PathLike[str], use_ema: bool | str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by name: safetensors, PyTorch, out of wrappers such as ``{"model": ...}``,
    pickled NumPy arrays of Caffe2, Detectron and detectron2 (``.pkl``), pickled modules of EDM and StyleGAN, ``.npz``,
    Torch7 (``.t7``), by place, a folder or zip of t5x, or flax (``.msgpack``, or a zip of ``checkpoint_<step>``), by
    path.

    A prefix that every key carries (``module.``, ``model.``) is taken off; of a checkpoint of ours, the network is
    taken (``network.``), not the metrics beside it. Nothing in the file is executed.

    Args:
        use_ema: of a file that holds raw weights and their average (``{"model": ..., "ema": ...}``, ``{"state_dict":
            ..., "state_dict_ema": ...}``, a checkpoint of ours), take the average; False: the raw ones; None: the
            average where there is one. Which was taken of two is told. A name takes the average of this name: the key
            under which it stands, without ``_state_dict`` in a checkpoint of ours.

    Raises:
        ZooError: not a file, not a whole checkpoint, no tensors in it, something that weights do not hold, NaN among
            the weights, or not the set that `use_ema` names.
    """
    path = Path(path)
    if not path.is_dir():
        check_file(path)
    try:
        state = _read(path, use_ema)
    except ZooError:
        raise
    except MemoryError as error:
        raise ZooError(f"{path}: not a whole file of weights: it declares more numbers than there is memory") from error
    except Exception as error:  # the readers' own errors are told above; a spoilt file makes libraries raise anything
        problem = pickles.short(str(error), 200) or type(error).__name__
        raise ZooError(f"{path}: not a whole file of weights ({problem})") from error
    refuse_nan(state, path)
    return state


def refuse_nan(state: Mapping[Any, Tensor], path: Path) -> None:
    """Raises a ZooError where there is NaN among the weights."""
    if spoilt := [key for key, value in state.items() if _has_nan(value)]:
        more = f" and {len(spoilt) - 1} more of {len(state)}" if spoilt[1:] else ""
        raise ZooError(f"{path}: not usable: {pickles.short(str(spoilt[0]))}{more} holds NaN")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ZooError: not a whole one.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, OSError, and of kinds of numbers that torch has not, KeyError
        raise ZooError(f"{path}: not a whole safetensors file ({pickles.short(str(error), 200)})") from error


def is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{" and head[2:8] == bytes(6))


def _read(path: Path, use_ema: bool | str | None) -> dict[str, Tensor]:
    if t5x.is_checkpoint(path):
        return _only(t5x.read_state_dict(path), path, use_ema)
    if flax.is_checkpoint(path):
        return flax.read_state_dict(path, use_ema)
    if path.is_dir():
        raise ZooError(f"{path}: is a folder without a checkpoint of t5x or flax")
    if is_safetensors(path):
        return _without_prefix(_only(read_safetensors(path), path, use_ema))
    if path.suffix == ".t7":
        return _only(torch7.read_state_dict(path), path, use_ema)
    if path.suffix == ".npz":
        return _only(_read_npz(path), path, use_ema)
    if persistence.is_persistent(path):
        return _unwrap(persistence.read(path), path, use_ema)
    if pickles.is_array_pickle(path):
        return _unwrap(pickles.read(path), path, use_ema)
    try:
        content = pytorch.read(path, mmap=True)
    except ZooError as error:
        raise ZooError(f"{path}: {error}") from error
    return _unwrap(content, path, use_ema)


def _read_npz(path: Path) -> dict[str, Tensor]:
    with zips.opened(path) as archive:
        zips.check(archive, path)
    arrays = {}
    with np.load(path, allow_pickle=False) as content:
        for key in content.files:
            try:
                arrays[key] = content[key]
            except ValueError as error:  # objects, which are pickles
                if "allow_pickle" not in str(error):
                    raise
                raise ZooError(f"{path}: {pickles.refusal((key,), 'numpy.ndarray of objects')}") from error
    state = _tensors(arrays)
    if not state:
        raise ZooError(f"{path}: holds no tensors by name")
    return state


def _unwrap(content: Any, path: Path, use_ema: bool | str | None) -> dict[str, Tensor]:
    """Descends from the top of a file to the dict whose values are tensors; entries beside tensors are left."""
    is_run = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    average: dict[str, Tensor] = {}
    named, top = "", list(content) if isinstance(content, Mapping) else []
    sets: dict[str, dict[str, Tensor]] = {}
    while isinstance(content, Mapping):
        if isinstance(use_ema, str):
            sets |= {key: found for key, found in _named_averages(content).items() if key not in sets}
        if not named and (named := next((key for key in _averages(content) if _below(content[key])), "")):
            average = _below(content[named])
        inner = next((key for key in RAW if _below(content.get(key))), None)
        if inner is None:
            break
        content = content[inner]
    raw = {} if isinstance(content, Mapping) and content.get(named) else _below(content)
    if not raw and not average:
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ZooError(f"{path}: holds no tensors by name (top: {pickles.short(keys, 200)})")
    raw, average = (_without_prefix(_network(state) if is_run else state) for state in (raw, average))
    if isinstance(use_ema, str):
        if use_ema not in sets:
            raise ZooError(f"{path}: {unknown('average', use_ema, sets)}" if sets else f"{path}: holds no averages")
        average, named = _without_prefix(_network(sets[use_ema]) if is_run else sets[use_ema]), use_ema
    if use_ema is True and not average:
        raise ZooError(f"{path}: use_ema: holds no averaged weights")
    if use_ema is False and not raw:
        raise ZooError(f"{path}: use_ema=False: holds averaged weights only ({named})")
    if not average and use_ema is None and (odd := next((key for key in AVERAGED if key in top), None)):
        say(f"{path.name}: the raw weights are taken, as {odd} holds no tensors by name")
    if not average or use_ema is False:
        return raw
    if raw:
        if not isinstance(use_ema, str):
            say(f"{path.name}: the averaged weights ({named}) are taken; use_ema=False takes the raw ones")
        if average.keys() < raw.keys():  # an average of parameters alone: buffers are those of the raw weights
            average = {**raw, **average}
    return average


def _averages(content: Mapping[Any, Any]) -> list[str]:
    """The keys of averages in a file, the first that counts in front; ours stand beside the count of their steps."""
    ours = [
        key for key in content if str(key).endswith("_state_dict") and f"{key[: -len('_state_dict')]}_steps" in content
    ]
    return [key for key in AVERAGED if key in content] + [key for key in ours if key not in AVERAGED]


def _named_averages(content: Mapping[Any, Any]) -> dict[str, dict[str, Tensor]]:
    """The averages at this place of a file by their names; those of ``{"ema": {"500": ..., "1000": ...}}`` too."""
    found = {}
    numbered = [key for key in content for name in AVERAGED if re.fullmatch(rf"{name}_?\d+", str(key))]
    for key in [*_averages(content), *numbered]:
        if state := _below(content[key]):
            found[str(key).removesuffix("_state_dict")] = state
        elif isinstance(content[key], Mapping):
            found |= {str(name): state for name, inner in content[key].items() if (state := _below(inner))}
    return found


def _below(content: Any) -> dict[str, Tensor]:
    """The tensors in a dict, or in the wrappers inside it."""
    for _ in range(len(RAW)):
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in RAW if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return _tensors(content)
        content = inner
    return {}


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    state = {}
    for key, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            state[str(key)] = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        elif isinstance(value, Tensor):
            state[str(key)] = value.detach()
    return state


def _network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a checkpoint of ours, the network alone."""
    return {key: value for key, value in state.items() if key.startswith("network.")} or state


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "n_averaged" in state and all(key.startswith("module.") for key in state if key != "n_averaged"):
        state = {key: value for key, value in state.items() if key != "n_averaged"}  # of torch's AveragedModel
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return _without_prefix({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def _only(state: dict[str, Tensor], path: Path, use_ema: bool | str | None) -> dict[str, Tensor]:
    """`state`, of a format that holds one set of weights."""
    if use_ema:
        raise ZooError(f"{path}: use_ema: this format holds one set of weights")
    return state


def _has_nan(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return False
    wide = value.float() if value.itemsize == 1 else value  # the eight-bit kinds have no minimum
    return bool(wide.amin().isnan())
