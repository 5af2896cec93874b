"""Reads files of torch.save, new (a zip) and old (joined pickles), without running anything in them.

A file is surveyed before torch.load sees it: its pickle is read with stand-ins (:mod:`zoo.formats.pickles`), every
tensor is checked against its storage and every storage against the file. So what is refused is named by its place and
type, and no file takes more memory than it is long. torch.load then reads it with ``weights_only``, always.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats import pickles
from zoo.formats.pickles import BESIDE, KNOWN, Inert, Refused, StandIn

_SLACK = 1 << 20  # bytes: small files may hold views of more numbers than they are long
_STORAGES = {f"{name}Storage": dtype.itemsize for name, dtype in {
    "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64,
    "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8, "QUInt8": torch.quint8, "QInt32": torch.qint32, "Untyped": torch.uint8,
}.items()}  # fmt: skip
_ODD = {
    "_rebuild_qtensor": "quantised tensor",
    "_rebuild_sparse_tensor": "sparse tensor",
    "_rebuild_meta_tensor_no_storage": "tensor without values (on the meta device)",
    "_rebuild_nested_tensor": "nested tensor",
    "_rebuild_wrapper_subclass": "tensor of a class of its own",
    "_rebuild_device_tensor_from_numpy": "tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "tensor of another device",
}


class _Storage(StandIn):
    problem = "storage"

    def __init__(self, count: int, itemsize: int) -> None:
        self.count, self.itemsize = count, itemsize


class _StorageKind(StandIn):
    """Stands for a class of storages."""

    problem = "storage type"

    def __init__(self, itemsize: int) -> None:
        self.itemsize = itemsize


class _Tensor(StandIn):
    """Stands for a tensor."""

    def __init__(self, problem: str | None = None) -> None:
        self.problem = problem

    def __setstate__(self, state: Any) -> None:
        pass


class _Survey(Inert):
    """Reads the pickle of a checkpoint with stand-ins; `size` is that of the file, `records` those of its storages."""

    def __init__(self, content: bytes, size: int, records: dict[str, int] | None) -> None:
        self.size, self.records = size, records
        self.storages: dict[str, _Storage] = {}
        self.held, self.room = 0, 4 * size + _SLACK
        super().__init__(content, {**KNOWN, **self._torch()})

    def _torch(self) -> dict[tuple[str, str], Any]:
        utils: dict[str, Any] = {name: self._odd(label) for name, label in _ODD.items()}
        utils |= {"_rebuild_tensor": self._view, "_rebuild_tensor_v2": self._view, "_rebuild_tensor_v3": self._view}
        utils |= {"_rebuild_parameter": self._first, "_rebuild_parameter_with_state": self._first}
        kinds = {("torch", name): _StorageKind(size) for name, size in _STORAGES.items()}
        dtypes = {("torch", str(d).removeprefix("torch.")): str(d) for d in vars(torch).values()
                  if isinstance(d, torch.dtype)}  # fmt: skip
        return {
            **kinds,
            **dtypes,
            **{("torch._utils", name): function for name, function in utils.items()},
            ("torch.storage", "UntypedStorage"): _StorageKind(1),
            ("torch.storage", "_LegacyStorage"): _StorageKind(1),
            ("torch._tensor", "_rebuild_from_type_v2"): self._of_type,
            ("torch.nn.parameter", "Parameter"): "torch.nn.Parameter",
            ("torch", "Tensor"): "torch.Tensor",
            ("torch", "Size"): lambda sizes=(): tuple(sizes),
            ("torch", "device"): lambda *words: ":".join(map(str, words)),
            ("torch.serialization", "_get_layout"): lambda name: name,
            **{("torch", name): name for name in ("per_tensor_affine", "per_channel_affine", "per_tensor_symmetric",
                                                  "per_channel_symmetric", "per_channel_affine_float_qparams")},
        }  # fmt: skip

    def _odd(self, label: str) -> Any:
        return lambda *args: _Tensor(label)

    def _first(self, value: Any, *args: Any) -> Any:
        return value

    def _of_type(self, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        if isinstance(kind, str) and callable(function):
            return function(*arguments)
        return _Tensor("tensor of a class of its own")

    def _view(self, storage: Any, offset: int, size: Iterable[int], stride: Iterable[int], *args: Any) -> _Tensor:
        size, stride = tuple(size), tuple(stride)
        if not isinstance(storage, _Storage) or len(size) != len(stride) or min(*size, *stride, offset, 0) < 0:
            raise Refused("a tensor without storage, size or stride")
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        # Of half-bytes and the like a storage is counted in bytes, so `itemsize` is the least that a number takes.
        if math.prod(size) and reach > storage.count:
            return _Tensor(f"tensor of shape {size} in a storage of {storage.count} numbers")
        self.room -= math.prod(size) * storage.itemsize
        if self.room < 0:
            return _Tensor(f"tensor of shape {size}, of more numbers than {self.size} bytes hold")
        return _Tensor()

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] in ("module", b"module"):
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
            raise Refused("the file refers to another one")
        _, kind, key, _, count, *view = pid
        if not isinstance(kind, _StorageKind) or not isinstance(count, int) or count < 0 or (view and view[0]):
            raise Refused("a storage that is none of torch's")
        if key not in self.storages:
            nbytes = count * kind.itemsize
            if self.records is not None and self.records.get(str(key)) != nbytes:
                raise Refused(f"storage {pickles.short(str(key))} of {nbytes} bytes, which the file does not hold")
            self.held += nbytes
            if self.held > self.size:
                raise Refused(f"storages of {self.held} bytes in a file of {self.size}")
            self.storages[key] = _Storage(count, kind.itemsize)
        return self.storages[key]


def is_checkpoint(path: Path) -> bool:
    """Whether a file is one of torch.save's, by its first bytes (and for a zip its records)."""
    with path.open("rb") as file:
        head = file.read(16)
    return pickles.is_torch_legacy(head) or (head[:2] == b"PK" and zipfile.is_zipfile(path))


def read(path: Path, mmap: bool = False, map_location: Any = "cpu") -> Any:
    """The content of a file of torch.save: tensors, plain values, NumPy arrays, paths, and containers of these.

    Args:
        mmap: leave the tensors in the file until they are used.

    Raises:
        ZooError: not a whole file of torch.save, or one that holds more than these; one line without the path.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
        is_zip = head[:2] == b"PK"
        content = _survey_zip(path) if is_zip else _survey_legacy(path)
        pickles.plain(content)
        del content
        allowed: list[Any] = [(standin, f"{module}.{name}") for (module, name), standin in BESIDE.items()]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*TypedStorage is deprecated.*")
            loaded = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and is_zip)
        return pickles.plain(loaded, (Tensor, torch.Size, torch.dtype, torch.device, torch.layout))
    except ZooError:
        raise
    except Refused as error:
        raise ZooError(f"not a whole PyTorch checkpoint ({pickles.short(str(error), 200)})") from error
    except Exception as error:  # torch and pickle raise whatever they meet: RuntimeError, EOFError, KeyError ...
        wanted = re.search(r"GLOBAL `?([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        problem = f"it names {wanted[1]}" if wanted else pickles.short(str(error), 200) or type(error).__name__
        raise ZooError(f"not a whole PyTorch checkpoint ({problem})") from error


def read_storage(content: bytes) -> Tensor:
    """The numbers (N,) of a storage that torch.save wrote into bytes, as pickles of tensors hold it.

    Raises:
        ZooError: something else.
    """
    try:
        surveyed = _survey_records(io.BytesIO(content), len(content))
        if not isinstance(surveyed, _Storage):
            raise Refused("no storage")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*TypedStorage is deprecated.*")
            storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            return torch.empty(0, dtype=storage.dtype).set_(storage)
    except Exception as error:  # torch and pickle raise whatever they meet
        raise ZooError(f"not a whole storage ({pickles.short(str(error), 200) or type(error).__name__})") from error


def _survey_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            size = path.stat().st_size
            if any(re.fullmatch(r"([^/]+/)?constants\.pkl", entry.filename) for entry in entries):
                raise ZooError("a TorchScript archive, which is a program; save its state dict instead")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ZooError("not a PyTorch checkpoint: its zip is compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries) > size:
                raise ZooError("not a PyTorch checkpoint: its zip declares more bytes than it has")
            roots = [entry.filename.removesuffix("data.pkl") for entry in entries
                     if re.fullmatch(r"([^/]+/)?data\.pkl", entry.filename)]  # fmt: skip
            if len(roots) != 1:
                raise ZooError("not a PyTorch checkpoint: its zip has no single data.pkl")
            root = roots[0]
            spoilt = _spoilt(archive, root)
            if spoilt:
                raise ZooError(f"not a whole PyTorch checkpoint: {pickles.short(spoilt)} is damaged")
            folder = f"{root}data/"
            records = {entry.filename.removeprefix(folder): entry.file_size for entry in entries
                       if entry.filename.startswith(folder)}  # fmt: skip
            return _Survey(archive.read(f"{root}data.pkl"), size, records).load()
    except zipfile.BadZipFile as error:
        raise ZooError(f"not a whole PyTorch checkpoint ({pickles.short(str(error), 200)})") from error


def _spoilt(archive: zipfile.ZipFile, root: str) -> str | None:
    """The first entry that does not agree with its checksum; None also where torch was told to write none."""
    try:
        archive.read(f"{root}version")
    except (KeyError, zipfile.BadZipFile):
        return None
    return archive.testzip()


def _survey_legacy(path: Path) -> Any:
    with path.open("rb") as file:
        return _survey_records(file, path.stat().st_size)


def _survey_records(file: IO[bytes], size: int) -> Any:
    """Four pickles in a row come before the numbers: a magic number, the version, the machine, and the content."""
    content = None
    for _ in range(4):
        start = file.tell()
        for _ in pickletools.genops(file):
            pass
        length = file.tell() - start
        file.seek(start)
        content = _Survey(file.read(length), size, None).load()
    return content
