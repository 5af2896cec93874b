"""Checkpoints that strategies of several devices write as folders, looked over before torch reads them.

torch.distributed.checkpoint reads its index (``.metadata``) and all that is no tensor by plain unpickling, so a folder
of someone else's could run anything. Here the index is read with nothing but the classes that it consists of, and every
part that is no tensor as a file of torch.save's is (:mod:`zoo.formats.pytorch`), in the bounds of the files beside it.
"""

from __future__ import annotations

import io
import pickle
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from zoo.errors import ZooError
from zoo.formats import pickles, pytorch

_INDEX = ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
          "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")  # fmt: skip
_MOST = 64 << 20  # bytes of one part that is no tensor


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == metadata.__name__ and name in _INDEX:
            return getattr(metadata, name)
        if module == filesystem.__name__ and name in ("_StorageInfo", "_StoragePrefix"):
            return getattr(filesystem, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in pickles.BESIDE and module.startswith("pathlib"):
            return pickles.BESIDE[module, name]
        raise pickles.Refused(f"it names {module}.{name}")


def _layout(name: str) -> Any:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise pickles.Refused(f"no layout {name!r}")
    return found


def check(folder: Path) -> None:
    """Looks a sharded checkpoint over.

    Raises:
        ZooError: one of DeepSpeed, which cannot be read without running what is in it; a damaged or missing index; a
            part that is more than tensors and plain values.
    """
    index = folder / ".metadata"
    if not index.is_file():
        raise ZooError(
            f"{folder}: a sharded checkpoint without {index.name}, or one of DeepSpeed, which runs what it reads; "
            "make one file of it with DeepSpeed's zero_to_fp32"
        )
    try:
        content = _Index(io.BytesIO(index.read_bytes())).load()
        for key, kind in content.state_dict_metadata.items():
            if not isinstance(kind, metadata.TensorStorageMetadata | metadata.BytesStorageMetadata):
                raise pickles.Refused(f"{key} is a {type(kind).__name__}")
        for where, info in content.storage_data.items():
            kind = content.state_dict_metadata.get(where.fqn)
            if not isinstance(kind, metadata.TensorStorageMetadata):
                _check_part(folder, where.fqn, info)
    except ZooError:
        raise
    except Exception as error:  # a spoilt pickle makes the unpickler raise anything
        reason = pickles.short(str(error), 200) or type(error).__name__
        raise ZooError(f"{folder}: not a whole sharded checkpoint ({reason})") from error


def _check_part(folder: Path, name: str, info: Any) -> None:
    path = (folder / info.relative_path).resolve()
    if folder.resolve() not in path.parents or getattr(info, "transform_descriptors", None):
        raise pickles.Refused(f"{name} lies outside the folder, or compressed")
    with path.open("rb") as file:
        file.seek(info.offset)
        content = file.read(min(info.length, _MOST + 1))
    if len(content) != info.length:
        raise pickles.Refused(f"{name} is said to be {info.length} bytes long")
    with tempfile.NamedTemporaryFile() as part:
        part.write(content)
        part.flush()
        try:
            pytorch.read(Path(part.name))
        except ZooError as error:
            raise ZooError(f"{folder}: {name}: {error}") from error
