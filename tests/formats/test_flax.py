"""Checkpoints of flax: msgpack and orbax, in the ways that they lie about."""

from __future__ import annotations

import json
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoo.errors import ZooError
from zoo.formats import flax
from zoo.weights.pretrained import read_state_dict

ARRAYS = {
    "net/a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "net/layers_0/bias": np.arange(3, dtype=np.float32),
}


def _tree(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in arrays.items():
        *parts, leaf = path.split("/")
        inner = tree
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[leaf] = value
    return tree


def _msgpack(content: Any) -> bytes:
    msgpack = pytest.importorskip("msgpack", reason="flax checkpoints are msgpack")

    def array(value: Any) -> Any:
        facts = (value.shape, value.dtype.name, value.tobytes())
        return msgpack.ExtType(1, msgpack.packb(facts, use_bin_type=True))

    return msgpack.packb(content, default=array, strict_types=True)


def _state(arrays: dict[str, np.ndarray] = ARRAYS) -> bytes:
    raw = {key: value + 1 for key, value in arrays.items()}
    state = {"step": 7, "params": _tree(raw), "ema_params": _tree(arrays), "opt_state": {"0": {"mu": _tree(raw)}}}
    return _msgpack(state)


def _is_arrays(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == ARRAYS.keys() and all(np.array_equal(state[key], value) for key, value in ARRAYS.items())


def test_the_averaged_parameters_of_a_training_state_are_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_7").write_bytes(_state())
    assert _is_arrays(read_state_dict(tmp_path / "checkpoint_7"))
    assert _is_arrays(read_state_dict(tmp_path))
    with zipfile.ZipFile(tmp_path / "published.zip", "w") as archive:
        archive.write(tmp_path / "checkpoint_7", "MF-B-4/checkpoint_7")
    assert _is_arrays(read_state_dict(tmp_path / "published.zip"))


def test_the_last_step_is_taken(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_9").write_bytes(_state({key: value - 1 for key, value in ARRAYS.items()}))
    (tmp_path / "checkpoint_10").write_bytes(_state())
    assert _is_arrays(read_state_dict(tmp_path))


def test_bare_parameters_chunks_and_bfloat16(tmp_path: Path) -> None:
    halves = (np.float32([1.0, -2.5]).view(np.uint32) >> 16).astype(np.uint16)
    msgpack = pytest.importorskip("msgpack")
    half = msgpack.ExtType(1, msgpack.packb(((2,), "bfloat16", halves.tobytes()), use_bin_type=True))
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2, "1": 3},
        "chunks": {"0": np.arange(4, dtype=np.float32), "1": np.arange(4, 6, dtype=np.float32)},
    }
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(_msgpack({"params": {"a": chunked, "b": half}}))
    state = read_state_dict(path)
    assert torch.equal(state["a"], torch.arange(6.0).view(2, 3))
    assert state["b"].tolist() == [1.0, -2.5]


@pytest.mark.parametrize("ocdbt", [False, True])
def test_orbax_folders(tmp_path: Path, ocdbt: bool) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="orbax checkpoints are read with tensorstore")
    folder = tmp_path / "checkpoint_3"
    folder.mkdir()
    base = {"driver": "file", "path": f"{folder}/"}
    for name, arrays in (("ema_params", ARRAYS), ("params", {k: v + 1 for k, v in ARRAYS.items()})):
        for key, value in arrays.items():
            place = f"{name}.{key.replace('/', '.')}/"
            store = {"driver": "ocdbt", "base": base, "path": place} if ocdbt else {**base, "path": f"{folder}/{place}"}
            spec = {"driver": "zarr", "kvstore": store, "metadata": {"shape": list(value.shape), "dtype": "<f4"}}
            tensorstore.open(spec, create=True).result().write(value).result()
    assert _is_arrays(read_state_dict(tmp_path))


def test_what_is_no_flax_checkpoint(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "checkpoint_3.pt")  # a zip whose root is checkpoint_3
    assert not flax.is_checkpoint(tmp_path / "checkpoint_3.pt")
    assert read_state_dict(tmp_path / "checkpoint_3.pt").keys() == {"w"}
    (tmp_path / "broken.msgpack").write_bytes(_state()[:-5])
    with pytest.raises(ZooError, match=r"broken\.msgpack: not a whole msgpack file of flax"):
        read_state_dict(tmp_path / "broken.msgpack")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match="no flax checkpoint"):
        flax.read_state_dict(tmp_path / "empty")


@pytest.mark.parametrize("facts", [{"shape": [1 << 40]}, {"chunks": [1 << 40]}, {"shape": [1 << 40], "chunks": [1]}])
def test_an_array_that_says_it_is_huge_is_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    """Reading it would end the process."""
    pytest.importorskip("tensorstore", reason="orbax checkpoints are read with tensorstore")
    folder = tmp_path / "checkpoint_3" / "params.a"
    folder.mkdir(parents=True)
    plain = {"zarr_format": 2, "dtype": "<f4", "compressor": None, "fill_value": 0, "order": "C", "filters": None}
    (folder / ".zarray").write_text(json.dumps({**plain, "shape": [2], "chunks": [2], **facts}))
    (folder / "0").write_bytes(bytes(8))
    with pytest.raises(
        ZooError, match=r"checkpoint_3: not a whole checkpoint: a is said to be of shape .* more numbers"
    ):
        read_state_dict(tmp_path)


def test_a_zip_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    for inside, name in (("checkpoint_3", "flax.zip"), ("run/checkpoint", "t5x.zip"), ("w.npy", "w.npz")):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(inside, bytes(80 << 20))
        with pytest.raises(
            ZooError, match=rf"{name}: refused: a zip of [\d,]+ bytes that unpacks to 1 files of 83,886,080"
        ):
            read_state_dict(tmp_path / name)


def test_one_of_several_averages_is_read_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_7"
    sets = {"500": {key: value + 1 for key, value in ARRAYS.items()}, "2000": ARRAYS}
    path.write_bytes(
        _msgpack({"params": _tree(ARRAYS), "ema_params": {name: _tree(one) for name, one in sets.items()}})
    )
    assert _is_arrays(read_state_dict(path, use_ema="2000"))
    assert _is_arrays({key: value - 1 for key, value in read_state_dict(path, use_ema="500").items()})
    assert _is_arrays(read_state_dict(path, use_ema=False))
    for which, message in ((None, "several averages: name one of 2000, 500"), ("1000", "unknown average '1000'")):
        with pytest.raises(ZooError, match=message):
            read_state_dict(path, use_ema=which)
    path.write_bytes(_state())
    with pytest.raises(ZooError, match="holds one average"):
        read_state_dict(path, use_ema="500")


def test_which_parameters_of_a_training_state_are_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_7"
    path.write_bytes(_state())
    assert _is_arrays(read_state_dict(path, use_ema=True))
    assert _is_arrays({key: value - 1 for key, value in read_state_dict(path, use_ema=False).items()})
    path.write_bytes(_msgpack({"params": _tree(ARRAYS)}))
    with pytest.raises(ZooError, match="use_ema: holds no averaged parameters"):
        read_state_dict(path, use_ema=True)


def test_a_chunk_that_unpacks_to_far_more_is_refused_unread(tmp_path: Path) -> None:
    """Two gigabytes in 64 kB: tensorstore reads no further than what the chunk is said to hold."""
    pytest.importorskip("tensorstore", reason="orbax checkpoints are read with tensorstore")
    folder = tmp_path / "checkpoint_3" / "params.a"
    folder.mkdir(parents=True)
    facts = {"zarr_format": 2, "dtype": "<f4", "fill_value": 0, "order": "C", "filters": None, "shape": [2]}
    (folder / ".zarray").write_text(json.dumps({**facts, "chunks": [2], "compressor": {"id": "zstd", "level": 1}}))
    block = (1 << 1 | (128 << 10) << 3).to_bytes(3, "little") + b"\0"  # 128 kB of one byte
    last = (1 | 1 << 1 | (128 << 10) << 3).to_bytes(3, "little") + b"\0"
    (folder / "0").write_bytes(b"\x28\xb5\x2f\xfd\x00\x58" + block * 16383 + last)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ZooError, match="End of data expected"):
        read_state_dict(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
