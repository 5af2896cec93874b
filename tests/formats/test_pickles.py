"""Pickled arrays of Caffe2 and detectron2: read whole, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoo.errors import ZooError
from zoo.formats.pickles import is_array_pickle, read
from zoo.weights.pretrained import read_state_dict

ARRAYS = {
    "backbone.conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "foreign": np.arange(4, dtype=">i4"),
    "half": np.ones((1, 2), np.float16),
    "none": np.zeros((0, 3), np.int64),
    "scalar": np.array(3.5),
}
# What Python 2 wrote: protocol 2, bytes as short strings.
PYTHON_2 = (
    b"\x80\x02}U\x05blobs}U\x07conv1_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"U\x08" + struct.pack("<2f", 1.5, -2.0) + b"tbss."
)


def assert_arrays(state: dict[str, torch.Tensor]) -> None:
    assert state.keys() == ARRAYS.keys()
    for key, value in ARRAYS.items():
        assert state[key].shape == value.shape
        assert torch.equal(state[key].double(), torch.from_numpy(value.astype(np.float64)))
        state[key].add_(0)  # owns its memory, writable


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrapper", ["model", "blobs", None])
def test_arrays_come_back_whole(tmp_path: Path, protocol: int, wrapper: str | None) -> None:
    content: dict[str, Any] = dict(ARRAYS)
    if wrapper:
        content = {wrapper: OrderedDict(ARRAYS), "__author__": "the zoo", "matching_heuristics": True}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    assert is_array_pickle(path)
    assert_arrays(read_state_dict(path))


def test_python_2_s_strings_are_bytes(tmp_path: Path) -> None:
    path = tmp_path / "SLOWONLY.pkl"
    path.write_bytes(PYTHON_2)
    assert read_state_dict(path)["conv1_w"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("old_format", [True, False])
def test_torch_s_own_files_named_pkl_go_to_torch(tmp_path: Path, old_format: bool) -> None:
    path = tmp_path / "SLOWFAST_8x8_R50_multigrid.pkl"
    state = {"head.weight": torch.ones(2)}
    torch.save({"model_state": state, "cfg": "A: 1"}, path, _use_new_zipfile_serialization=not old_format)
    assert not is_array_pickle(path)
    assert read_state_dict(path).keys() == state.keys()


class _Runs:
    def __init__(self, call: Any, *words: Any) -> None:
        self.call, self.words = call, words

    def __reduce__(self) -> Any:
        return self.call, self.words


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_refused_before_it_runs(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "pwned"
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"model": {}, "x": _Runs(os.system, f"touch {marker}")}, protocol))
    with pytest.raises(ZooError, match=r"refused: x is a (posix|nt)\.system; read are") as caught:
        read_state_dict(path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        _Runs(np.ndarray, (1 << 40,)),  # would take a terabyte
        _Runs(np.zeros(3).__reduce_ex__(5)[0], bytes(8), np.dtype("f8"), (1 << 40,), "C"),
        np.array([{"an": "object"}], dtype=object),
    ],
)
def test_an_array_of_unbelievable_size_or_kind_is_refused(tmp_path: Path, bad: Any) -> None:
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": bad}}, 2))
    with pytest.raises(ZooError, match=r"refused: (an array|model\.w is a numpy\.ndarray of object)"):
        read(path)


@pytest.mark.parametrize("content", [b"\x80\x02", b"\x80\x02}", b"\x80\x02]q\x00.", PYTHON_2[:-30], b"<html>", b""])
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cut.pkl"
    path.write_bytes(content)
    with pytest.raises(ZooError, match=r"not a whole|holds no tensors|refused") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)
