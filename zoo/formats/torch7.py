"""Reads the binary files of Torch7 (.t7): tensors by their place in a tree of nn modules. Nothing in them is executed.

A file is a tree of typed values: numbers, strings, tables, and Torch objects, among them the modules of a network,
whose fields are a table. Only what networks are made of is understood. Every length is checked against the file and
every tensor against its storage; Lua functions are passed over as bytes.

Of the readers on PyPI none is kept up and safe: torchfile (last released in 2017) maps tensors by sizes and strides
that it does not check, so that a spoilt file reads foreign memory.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError

LEAVES = ("weight", "bias", "running_mean", "running_var")
_NIL, _NUMBER, _STRING, _TABLE, _OBJECT, _BOOLEAN, _FUNCTION, _OLD_RECURSIVE, _RECURSIVE = range(9)
_MAX_DEPTH = 100
_MAX_DIMS = 8
_MAX_MODULES = 100_000
_DTYPES = {
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Half": torch.float16,
    "Float": torch.float32,
    "Double": torch.float64,
}
_ARRAY = re.compile(rf"torch\.(Cuda)?({'|'.join(_DTYPES)})?(Tensor|Storage)")


@dataclass
class Torch7Object:
    """An object of a Lua class, such as a module of nn: the name of its class and its fields."""

    kind: str
    fields: Any = None


class _Reader:
    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.at = data, 0
        self.known: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.at:
            raise ZooError(f"not a whole Torch7 file: {count} bytes wanted at byte {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self) -> int:
        return struct.unpack("<i", self.take(4))[0]

    def longs(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}q", self.take(8 * count))

    def text(self) -> str:
        return self.take(self.integer()).decode("latin-1")

    def value(self, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH:
            raise ZooError(f"not a Torch7 file of a network: values are nested more than {_MAX_DEPTH} deep")
        kind = self.integer()
        if kind == _NIL:
            return None
        if kind == _NUMBER:
            return struct.unpack("<d", self.take(8))[0]
        if kind == _BOOLEAN:
            return self.integer() == 1
        if kind == _STRING:
            return self.text()
        if kind == _FUNCTION:
            return self._function(depth)
        if kind not in (_TABLE, _OBJECT, _OLD_RECURSIVE, _RECURSIVE):
            raise ZooError(f"not a Torch7 file: there is no type {kind} (byte {self.at - 4})")
        index = self.integer()
        if index in self.known:
            return self.known[index]
        if kind == _TABLE:
            table: dict[Any, Any] = {}
            self.known[index] = table  # before its entries, which may refer to it
            for _ in range(self._count()):
                key = self.value(depth + 1)
                entry = self.value(depth + 1)
                if isinstance(key, str | float | bool):  # other keys are of no use here
                    table[key] = entry
            return table
        if kind == _OBJECT:
            return self._object(index, depth)
        self.known[index] = None
        return self._function(depth)

    def _count(self) -> int:
        """The number of a table's entries; each takes at least eight bytes."""
        count = self.integer()
        if not 0 <= count <= (len(self.data) - self.at) // 8:
            raise ZooError(f"not a whole Torch7 file: a table of {count} entries at byte {self.at}")
        return count

    def _function(self, depth: int) -> None:
        """Passes over a Lua function: its code and the values it has caught."""
        self.take(self.integer())
        self.value(depth + 1)

    def _object(self, index: int, depth: int) -> Any:
        name = self.text()
        if re.fullmatch(r"V \d+", name):
            name = self.text()
        array = _ARRAY.fullmatch(name)
        if array is None:
            found = Torch7Object(name)
            self.known[index] = found
            found.fields = self.value(depth + 1)
            return found
        dtype = _DTYPES[array[2] or "Float"]  # CudaTensor holds floats
        self.known[index] = None
        self.known[index] = result = self._storage(dtype) if array[3] == "Storage" else self._tensor(dtype, depth)
        return result

    def _storage(self, dtype: torch.dtype) -> Tensor:
        (count,) = self.longs(1)
        size = torch.empty((), dtype=dtype).element_size()
        if count < 0:
            raise ZooError(f"not a Torch7 file: a storage of {count} numbers at byte {self.at}")
        content = bytearray(self.take(count * size))
        return torch.frombuffer(content, dtype=dtype) if count else torch.empty(0, dtype=dtype)

    def _tensor(self, dtype: torch.dtype, depth: int) -> Tensor:
        dims = self.integer()
        if not 0 <= dims <= _MAX_DIMS:
            raise ZooError(f"not a Torch7 file: a tensor of {dims} dimensions at byte {self.at}")
        sizes, strides = self.longs(dims), self.longs(dims)
        offset = self.longs(1)[0] - 1
        storage = self.value(depth + 1)
        if storage is None or not dims:
            return torch.empty(0, dtype=dtype)
        if not isinstance(storage, Tensor) or storage.dtype is not dtype or storage.ndim != 1:
            raise ZooError(f"not a Torch7 file: a tensor without its storage at byte {self.at}")
        if min(sizes) < 0 or min(strides) < 0 or offset < 0:
            raise ZooError(f"not a Torch7 file: a tensor of sizes {sizes} and strides {strides} at byte {self.at}")
        count = 1
        for size in sizes:
            count *= size
        reach = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if count and (reach >= len(storage) or count > len(storage)):
            raise ZooError(
                f"not a Torch7 file: a tensor of sizes {sizes} exceeds its storage of {len(storage)} numbers"
            )
        return storage.as_strided(sizes, strides, offset) if count else torch.empty(sizes, dtype=dtype)


def load(path: str | os.PathLike[str]) -> Any:
    """The value in a Torch7 file: float, str, bool, None, dict, tensor, or :class:`Torch7Object`.

    Raises:
        ZooError: not a Torch7 file in binary form, or not a whole one.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise ZooError("not a whole Torch7 file: it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data).value()
    except ZooError as error:
        raise ZooError(f"{path}: {error}") from error
    except OSError as error:
        raise ZooError(f"{path}: {error.strerror or error}") from error


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The parameters and running statistics of the network in a Torch7 file, by their place.

    A key is the 0-based places of a module in its containers and the field's name: ``4.0.0.0.3.weight``. Convolutions
    that keep their weight as a matrix are unfolded to (out, in, height, width).

    Raises:
        ZooError: as of :func:`load`; no module, or no tensors in it.
    """
    content = load(path)
    if isinstance(content, dict) and isinstance(content.get("model"), Torch7Object):
        content = content["model"]
    state: dict[str, Tensor] = {}
    if isinstance(content, Torch7Object):
        room = 4 * Path(path).stat().st_size  # a tensor may be shared, but not so that a small file fills the memory
        for count, (prefix, module) in enumerate(_walk(content, "", frozenset())):
            for leaf, value in _own(module):
                state[f"{prefix}{leaf}"] = value
                room -= value.nbytes
            if count >= _MAX_MODULES or room < 0:
                raise ZooError(
                    f"{os.fspath(path)}: not a Torch7 network: more modules or numbers than the file can hold"
                )
    if not state:
        raise ZooError(f"{os.fspath(path)}: holds no network with parameters")
    return state


def _walk(module: Torch7Object, prefix: str, above: frozenset[int]) -> Iterator[tuple[str, Torch7Object]]:
    """A module and all below it, with their places."""
    if not isinstance(module.fields, dict):
        raise ZooError(f"not a Torch7 network: {module.kind} has no fields")
    if id(module) in above:
        raise ZooError(f"not a Torch7 network: {module.kind} holds itself")
    yield prefix, module
    parts: Any = module.fields.get("modules")
    places = [key for key in parts if isinstance(key, float) and key.is_integer()] if isinstance(parts, dict) else []
    for place in sorted(places):
        if isinstance(parts[place], Torch7Object):
            yield from _walk(parts[place], f"{prefix}{int(place) - 1}.", above | {id(module)})


def _own(module: Torch7Object) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors, each with a storage of its own."""
    for leaf in LEAVES:
        value = module.fields.get(leaf)
        if isinstance(value, Tensor) and value.numel():
            yield leaf, _unfolded(value, module) if leaf == "weight" else value.clone()


def _unfolded(weight: Tensor, module: Torch7Object) -> Tensor:
    sides = [module.fields.get(key) for key in ("nInputPlane", "kH", "kW")]
    if weight.ndim == 2 and "Convolution" in module.kind and all(isinstance(side, float) for side in sides):
        shape = (len(weight), *(int(side) for side in sides))
        if torch.Size(shape).numel() != weight.numel():
            raise ZooError(f"not a Torch7 network: a weight of {tuple(weight.shape)} is none of {shape}")
        return weight.reshape(shape).clone()
    return weight.clone(memory_format=torch.contiguous_format)
