"""Pickles of whole modules with their source code, as NVIDIA's projects publish them (StyleGAN, EDM), read for the
tensors alone.

Such a file means to compile the code in it and to make modules of it. Here its objects are stand-ins that keep their
state; of a module that is its state dict, of any other object the plain values. The bytes of a storage are a file of
torch.save inside the pickle, which is surveyed and read with ``weights_only`` as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats import pytorch
from zoo.formats.pickles import KNOWN, Foreign, Inert, Refused, StandIn, is_array_pickle, plain, short

_MARK = b"_reconstruct_persistent_obj"
_HEAD = 1 << 16  # bytes; the first object of a file is a persistent one, or near it
_DEPTH, _MOST = 64, 1_000_000


class _Object(StandIn):
    """Stands for an object; takes the state that the file gives it."""

    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Module(_Object):
    """Stands for one of torch.nn's own modules."""


class _Storage(StandIn):
    problem = "storage"

    def __init__(self, values: Tensor) -> None:
        self.values = values


def _persistent(facts: Any, *more: Any) -> _Object:
    if not isinstance(facts, Mapping) or facts.get("type") != "class":
        raise Refused("a persistent object that is none of a class")
    found = _Object()
    found.state = facts.get("state")
    return found


def _storage(content: Any) -> _Storage:
    if not isinstance(content, bytes):
        raise Refused("a storage that is no bytes")
    return _Storage(pytorch.read_storage(content))


def _tensor(storage: Any, offset: Any, size: Iterable[int], stride: Iterable[int], *more: Any) -> Tensor:
    size, stride = tuple(size), tuple(stride)
    if not isinstance(storage, _Storage) or len(size) != len(stride) or min(*size, *stride, offset, 0) < 0:
        raise Refused("a tensor without storage, size or stride")
    count, wanted = storage.values.numel(), 1
    for n in size:
        wanted *= n
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if wanted > count or (wanted and reach > count):
        raise Refused(f"a tensor of shape {size} in a storage of {count} numbers")
    return storage.values.as_strided(size, stride, offset)


def _first(value: Any, *more: Any) -> Any:
    return value


class _Reader(Inert):
    def __init__(self, content: bytes) -> None:
        torchs = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
            ("torch.storage", "_load_from_bytes"): _storage,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _first,
            ("dnnlib.util", "EasyDict"): dict,
            ("torch", "device"): lambda *words: ":".join(map(str, words)),
            **{("torch", str(d).removeprefix("torch.")): str(d) for d in vars(torch).values()
               if isinstance(d, torch.dtype)},
        }  # fmt: skip
        super().__init__(content, {**KNOWN, **torchs})

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if module.startswith("torch.nn.modules.") and isinstance(found, type) and issubclass(found, Foreign):
            return _Module
        return found


def is_persistent(path: Path) -> bool:
    """Whether a file is such a pickle, by its beginning."""
    if not is_array_pickle(path):
        return False
    with path.open("rb") as file:
        return _MARK in file.read(_HEAD)


def read(path: Path) -> Any:
    """The content of such a pickle: modules as state dicts, other objects as what they hold.

    Raises:
        ZooError: not a whole pickle, or one that holds what no module does; nothing in it was run.
    """
    try:
        return plain(_Opener().opened(_Reader(path.read_bytes()).load()), (Tensor,))
    except ZooError as error:
        raise ZooError(f"{path}: {error}") from error
    except Refused as error:
        raise ZooError(f"{path}: refused: {error}; a module holds tensors and plain values") from error
    except Exception as error:  # a broken pickle makes the unpickler raise anything
        raise ZooError(f"{path}: not a whole pickle ({short(str(error), 200) or type(error).__name__})") from error


class _Opener:
    """Objects as what they hold; counts what it visits, since a small file may hold the same thing many times."""

    def __init__(self) -> None:
        self.count = 0

    def _visit(self, depth: int) -> None:
        self.count += 1
        if depth > _DEPTH:
            raise Refused(f"objects within objects, more than {_DEPTH} deep")
        if self.count > _MOST:
            raise Refused(f"more than {_MOST:,} values, many of them the same")

    def opened(self, value: Any, depth: int = 0) -> Any:
        self._visit(depth)
        if isinstance(value, _Object):
            state = value.state
            is_module = isinstance(state, Mapping) and {"_parameters", "_buffers", "_modules"} <= state.keys()
            return self.state_dict(state, "", depth) if is_module else self.opened(state, depth + 1)
        if isinstance(value, dict):
            return {key: self.opened(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.opened(entry, depth + 1) for entry in value]
        return value

    def state_dict(self, state: Mapping[str, Any], prefix: str, depth: int) -> dict[str, Tensor]:
        """As torch.nn.Module.state_dict gives it."""
        self._visit(depth)
        hidden = state.get("_non_persistent_buffers_set", ())
        found: dict[str, Tensor] = {}
        for kind in ("_parameters", "_buffers"):
            for name, value in _entries(state, kind):
                if isinstance(value, Tensor) and not (kind == "_buffers" and name in hidden):
                    found[f"{prefix}{name}"] = value
                elif value is not None and not isinstance(value, Tensor):
                    raise Refused(f"{short(prefix + str(name))}, which is no tensor")
        for name, part in _entries(state, "_modules"):
            if part is None:
                continue
            if not isinstance(part, _Object) or not isinstance(part.state, Mapping):
                raise Refused(f"{short(prefix + str(name))}, which is no module")
            found |= self.state_dict(part.state, f"{prefix}{name}.", depth + 1)
        return found


def _entries(state: Mapping[str, Any], kind: str) -> Iterable[tuple[Any, Any]]:
    entries = state.get(kind)
    if not isinstance(entries, Mapping):
        raise Refused(f"a module without {kind}")
    return entries.items()
