"""Pickles, read without trusting them: NumPy arrays as Caffe2, Detectron and detectron2 publish weights.

A pickle is a program. The unpickler here knows the few names that plain values and arrays need and gives each a
stand-in of its own, which takes what the file says and checks it; for every other name it puts an inert placeholder.
Neither NumPy's nor anyone else's code is called by the file. What then stands in the content but is no plain value is
refused by the place where it stands and its type. Python 2's strings are read as Latin-1, as its arrays need.
"""

from __future__ import annotations

import argparse
import datetime
import io
import math
import pickle
import pickletools
import types
from collections import Counter, OrderedDict
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from zoo.errors import ZooError

# What torch's own format of before 1.6 opens with: it is a pickle too, but torch.load's.
_TORCH_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_DEPTH = 100
_MOST = 10_000_000  # values, each counted as often as it is reached
_HELD = "biufcUS"  # kinds of NumPy's arrays: numbers and text


_TIMES = (datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone)


class Refused(pickle.UnpicklingError):
    """What the file asks for is not given."""


class StandIn:
    """What the unpickler puts for something that is not called; :func:`plain` takes `value` for it, or says why not."""

    value: Any = None
    problem: str | None = None  # what it is, where it is nothing that weights may hold


class _Dtype(StandIn):
    """Stands for ``numpy.dtype``: a kind of number or text, and in its state the byte order."""

    def __init__(self, code: str | bytes = "f8", *options: Any) -> None:
        name = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(name, str) or len(name) > 16:
            raise Refused("an array of other things than numbers")
        self.value = np.dtype(name).newbyteorder("<")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in (">", b">"):
            self.value = self.value.newbyteorder(">")


class _Array(StandIn):
    """Stands for ``numpy.ndarray``: made empty, then given (version, shape, dtype, Fortran order, bytes)."""

    def __init__(self, *sizes: Any) -> None:
        self.value = np.zeros(0)
        if sizes:
            raise Refused("an array that is made otherwise than NumPy makes them")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        if isinstance(kind, _Dtype) and isinstance(data, list):  # objects
            self.problem = f"numpy.ndarray of {kind.value}"
        else:
            self.value = _values(data, kind, shape, "F" if fortran else "C").value


class _Values(StandIn):
    def __init__(self, value: np.ndarray) -> None:
        self.value = value


def _values(data: bytes | bytearray | str, kind: _Dtype, shape: tuple[int, ...], order: str) -> StandIn:
    """An array in this machine's byte order that owns its memory; its size is that of the data."""
    content = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, _Dtype) or kind.value.kind == "O":
        raise Refused("an array of other things than numbers")
    if min(shape, default=0) < 0 or len(content) != math.prod(shape) * kind.value.itemsize:
        raise Refused(f"an array of shape {tuple(shape)} in {len(content)} bytes")
    if kind.value.kind not in _HELD:
        raise Refused(f"an array of {kind.value}")
    if not kind.value.itemsize:
        return _Values(np.zeros(shape, kind.value))
    given = np.frombuffer(content, kind.value).reshape(shape, order="F" if order == "F" else "C")
    return _Values(np.array(given, dtype=kind.value.newbyteorder("="), order="C"))


def _reconstruct(kind: type, shape: Any, code: Any) -> _Array:
    if kind is not _Array:
        raise Refused("an array that is made otherwise than NumPy makes them")
    return _Array()  # of whatever shape: the state brings its own


def _scalar(kind: _Dtype, content: bytes | str = b"") -> StandIn:
    return _Values(_values(content, kind, (), "C").value[()])


def _encode(text: str, codec: str = "latin1") -> bytes:
    if codec not in ("latin1", "latin-1"):
        raise Refused(f"text in {codec}")
    return text.encode("latin1")


def _bytes(*content: Any) -> bytes:
    """Stands for ``bytes`` and ``bytearray``, which a number would make that large."""
    if content and not isinstance(content[0], bytes | str | list):
        raise Refused(f"bytes made of a {type(content[0]).__name__}")
    return _encode(*content) if content and isinstance(content[0], str) else bytes(*content[:1])


def _empty_dict(*factory: Any) -> dict[Any, Any]:
    """Stands for ``collections.defaultdict``: what it makes of missing keys is code."""
    return {}


def _list(content: Any = (), *most: Any) -> list[Any]:
    """Stands for ``collections.deque``."""
    return list(content)


def _posix(*parts: str) -> PurePosixPath:
    return PurePosixPath(*parts)


def _windows(*parts: str) -> PureWindowsPath:
    return PureWindowsPath(*parts)


class Text(str):
    """Stands for classes of text, such as torch's version."""

    def __setstate__(self, state: Any) -> None:
        pass


def _factory(name: str) -> type:
    return type(name, (StandIn,), {"problem": f"builtins.{name}"})


# What is beside tensors in checkpoints of torch, and torch itself does not know.
BESIDE: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _values for core in ("core", "_core")},
    **{(module, name): _posix for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")},
    **{
        (module, name): _windows
        for module in ("pathlib", "pathlib._local")
        for name in ("WindowsPath", "PureWindowsPath")
    },
    ("collections", "defaultdict"): _empty_dict,
    ("collections", "deque"): _list,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "range"): range,
    ("builtins", "slice"): slice,
    **{("datetime", kind.__name__): kind for kind in _TIMES},
    ("torch.torch_version", "TorchVersion"): Text,
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    # Factories of a defaultdict; as values of their own they are refused.
    **{("builtins", name): _factory(name) for name in ("dict", "list", "int", "float", "str", "bool")},
}
KNOWN: dict[tuple[str, str], Any] = {
    **BESIDE,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytes,
    ("builtins", "set"): set,
    ("builtins", "xrange"): range,  # as the protocols up to 2 name it
    ("builtins", "complex"): complex,
}


class Foreign(StandIn):
    """Stands for a name that is not known: takes whatever a pickle does to an object, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Foreign:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Foreign:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def _take(self, *args: Any) -> None:
        pass

    __setstate__ = append = extend = add = update = _take


class Inert(pickle.Unpickler):
    """Reads a pickle with stand-ins only."""

    def __init__(self, content: bytes, known: dict[tuple[str, str], Any] = KNOWN) -> None:
        self.known = known
        _check_program(content)
        super().__init__(io.BytesIO(content), encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in self.known:
            return self.known[module, name]
        return type("Foreign", (Foreign,), {"problem": short(f"{module}.{name}")})

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("the file refers to another one")


def _check_program(content: bytes) -> None:
    """Refuses a program whose memory would be out of proportion to its length."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(content):
            raise Refused(f"place {argument} of a memo in {len(content)} bytes")


_ATOMS = (bool, int, float, complex, str, bytes, bytearray, range, slice, PurePath, np.generic, np.dtype, *_TIMES)


def plain(content: Any, leaves: tuple[type, ...] = ()) -> Any:
    """`content` with NumPy's arrays and plain values in place of the stand-ins, its containers changed in place.

    Args:
        leaves: further types that are kept as they stand.

    Raises:
        ZooError: something else in it, named with its place and type; a container that holds itself; too deep.
    """
    done: dict[int, tuple[Any, int]] = {}
    count = 0
    above: set[int] = set()

    def walk(value: Any, where: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        if count > _MOST:
            raise ZooError(f"{place(where[:3])} holds more than {_MOST:,} values, many of them the same")
        if isinstance(value, Text):
            return str(value)
        if value is None or isinstance(value, (*_ATOMS, *leaves)):
            return value
        if isinstance(value, StandIn) or (isinstance(value, type) and issubclass(value, StandIn)):
            if value.problem is not None or isinstance(value, type):
                raise ZooError(refusal(where, value.problem or "numpy type"))
            return value.value
        if id(value) in above:
            raise ZooError(f"{place(where)} holds itself")
        if id(value) in done:
            count += done[id(value)][1]
            return done[id(value)][0]
        if len(where) > _MAX_DEPTH:
            raise ZooError(f"{place(where[:3])} is nested more than {_MAX_DEPTH} deep")
        above.add(id(value))
        before, result = count, value
        if isinstance(value, dict | argparse.Namespace | types.SimpleNamespace):
            entries = value if isinstance(value, dict) else vars(value)
            for key, entry in entries.items():
                walk(key, (*where, "key"))
                entries[key] = walk(entry, (*where, key))
        elif isinstance(value, list):
            for at, entry in enumerate(value):
                value[at] = walk(entry, (*where, at))
        elif isinstance(value, tuple | set | frozenset):
            parts = [walk(entry, (*where, at)) for at, entry in enumerate(value)]
            result = tuple(parts) if type(value) is tuple else value
        elif isinstance(value, np.ndarray) and value.dtype.kind in _HELD:
            pass
        else:
            raise ZooError(refusal(where, f"{type(value).__module__}.{type(value).__qualname__}"))
        above.remove(id(value))
        done[id(value)] = result, count - before
        return result

    return walk(content, ())


def refusal(where: tuple[Any, ...], label: str) -> str:
    """What to say of an object that weights may not hold."""
    return (
        f"refused: {place(where)} is a {label}; read are tensors, arrays, numbers, text, paths and containers of these "
        "(save the state dict alone)"
    )


def place(where: tuple[Any, ...]) -> str:
    """The place of a value in a file: its keys, joined by dots."""
    return short(".".join(map(str, where))) if where else "the content"


def short(text: str, most: int = 120) -> str:
    line = " ".join("".join(c if c.isprintable() else "?" for c in text).split())
    return line if len(line) <= most else f"{line[:most]}..."


def is_array_pickle(path: Path) -> bool:
    """Whether a file is a plain pickle, not one of torch's formats: by its first bytes, or by name (``.pkl``) for
    protocol 0, which is text."""
    with path.open("rb") as file:
        head = file.read(2 + len(_TORCH_LEGACY))
    if head[:2] == b"PK" or is_torch_legacy(head):
        return False
    return head[:1] == b"\x80" or path.suffix == ".pkl"


def is_torch_legacy(head: bytes) -> bool:
    return head[2 : 2 + len(_TORCH_LEGACY)] == _TORCH_LEGACY


def read(path: Path) -> Any:
    """The content of a pickle that holds plain values and NumPy arrays.

    Raises:
        ZooError: not a whole pickle, or one that holds more; what it holds is named, and nothing was run.
    """
    try:
        return plain(Inert(path.read_bytes()).load())
    except ZooError as error:
        raise ZooError(f"{path}: {error}") from error
    except Refused as error:
        raise ZooError(f"{path}: refused: {error}; weights hold arrays and plain values only") from error
    except Exception as error:  # a broken pickle makes the unpickler raise anything: EOFError, IndexError, KeyError ...
        raise ZooError(f"{path}: not a whole pickle ({short(str(error), 200) or type(error).__name__})") from error
