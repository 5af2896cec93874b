"""Pickles of NumPy arrays, as Caffe2, Detectron and detectron2 publish weights, read without trusting them.

A pickle is a program. The unpickler here knows the few names that arrays by name need and gives each a stand-in of its
own, which takes what the file says and checks it; neither NumPy's nor anyone else's code is called by the file. Any
other name is refused before it runs. Python 2's strings are read as Latin-1, as its arrays need.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import ZooError

# What torch's own format of before 1.6 opens with: it is a pickle too, but torch.load's.
_TORCH_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _Refused(pickle.UnpicklingError):
    """What the file asks for is not given."""


class _Dtype:
    """Stands for ``numpy.dtype``: a kind of number, and in its state the byte order."""

    def __init__(self, code: str | bytes, *options: Any) -> None:
        self.kind = np.dtype(code.decode("ascii") if isinstance(code, bytes) else code).newbyteorder("<")
        if self.kind.kind not in "biufc":
            raise _Refused(f"an array of {self.kind}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in (">", b">"):
            self.kind = self.kind.newbyteorder(">")


class _Array:
    """Stands for ``numpy.ndarray``: made empty, then given (version, shape, dtype, Fortran order, bytes)."""

    def __init__(self, *sizes: Any) -> None:
        self.value = np.zeros(0)
        if sizes:
            raise _Refused("an array that is made otherwise than NumPy makes them")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.value = _values(data, kind, shape, "F" if fortran else "C")


def _values(data: bytes | bytearray | str, kind: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """An array in this machine's byte order that owns its memory; its size is that of the data."""
    content = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, _Dtype):
        raise _Refused("an array of other things than numbers")
    if len(content) != math.prod(shape) * kind.kind.itemsize:
        raise _Refused(f"an array of shape {shape} in {len(content)} bytes")
    given = np.frombuffer(content, kind.kind).reshape(shape, order="F" if order == "F" else "C")
    return np.array(given, dtype=kind.kind.newbyteorder("="), order="C")


def _reconstruct(kind: type, shape: Any, code: Any) -> _Array:
    if kind is not _Array:
        raise _Refused("an array that is made otherwise than NumPy makes them")
    return _Array()  # of whatever shape: the state brings its own


def _scalar(kind: _Dtype, content: bytes | str) -> Any:
    return _values(content, kind, (), "C")[()]


def _encode(text: str, codec: str = "latin1") -> bytes:
    if codec not in ("latin1", "latin-1"):
        raise _Refused(f"text in {codec}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _values for core in ("core", "_core")},
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _Refused(f"the file wants to run code ({module}.{name})")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("the file refers to another one")


def is_array_pickle(path: Path) -> bool:
    """Whether a file is a plain pickle, not one of torch's formats: by its first bytes, or by name (``.pkl``) for
    protocol 0, which is text."""
    with path.open("rb") as file:
        head = file.read(2 + len(_TORCH_LEGACY))
    if head[:2] == b"PK" or head[2:] == _TORCH_LEGACY:
        return False
    return head[:1] == b"\x80" or path.suffix == ".pkl"


def _plain(value: Any) -> Any:
    """The content with NumPy's arrays in place of the stand-ins."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.value if isinstance(value, _Array) else value


def read(path: Path) -> Any:
    """The content of a pickle that holds plain values and NumPy arrays, these in dicts.

    Raises:
        ZooError: not a whole pickle, or one that holds more; what it wanted is named, and was not run.
    """
    try:
        with path.open("rb") as file:
            return _plain(_Arrays(file, encoding="latin1").load())
    except _Refused as error:
        raise ZooError(f"{path}: refused: {error}; weights hold arrays and plain values only") from error
    except Exception as error:  # a broken pickle makes the unpickler raise anything: EOFError, IndexError, KeyError ...
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ZooError(f"{path}: not a whole pickle ({problem[:200]})") from error
