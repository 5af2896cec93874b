"""The reader of Torch7 files, on files written here in the true format: whole, cut short, and hostile."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats import torch7
from zoo.formats.torch7 import Torch7Object
from zoo.weights.pretrained import read_state_dict

NAMES = {torch.float32: "Float", torch.float64: "Double", torch.int64: "Long", torch.uint8: "Byte"}


class Writer:
    """Writes values as torch.save of Torch7 does in binary mode on a 64-bit machine."""

    def __init__(self, cuda: bool = False) -> None:
        self.out = bytearray()
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no id is given twice
        self.cuda = cuda

    def ints(self, *values: int) -> None:
        self.out += struct.pack(f"<{len(values)}i", *values)

    def longs(self, *values: int) -> None:
        self.out += struct.pack(f"<{len(values)}q", *values)

    def text(self, text: str) -> None:
        self.ints(len(text))
        self.out += text.encode("latin-1")

    def head(self, kind: int, value: Any) -> bool:
        """Type and number of a value that may be met again; False where it has been written."""
        new = id(value) not in self.seen
        number = self.seen.setdefault(id(value), len(self.seen) + 1)
        self.kept.append(value)
        self.ints(kind, number)
        return new

    def value(self, value: Any) -> bytes:
        if value is None:
            self.ints(0)
        elif isinstance(value, bool):
            self.ints(5, int(value))
        elif isinstance(value, int | float):
            self.ints(1)
            self.out += struct.pack("<d", value)
        elif isinstance(value, str):
            self.ints(2)
            self.text(value)
        elif isinstance(value, bytes):  # stands for a Lua function
            if self.head(8, value):
                self.ints(len(value))
                self.out += value
                self.value({1.0: {"name": "_ENV"}})
        elif isinstance(value, dict):
            if self.head(3, value):
                self.ints(len(value))
                for key, entry in value.items():
                    self.value(key)
                    self.value(entry)
        elif isinstance(value, Tensor):
            self.tensor(value)
        elif self.head(4, value):
            self.text("V 1")
            self.text(value.kind)
            self.value(value.fields)
        return bytes(self.out)

    def tensor(self, tensor: Tensor) -> None:
        if not self.head(4, tensor):
            return
        name = "Cuda" if self.cuda and tensor.dtype is torch.float32 else NAMES[tensor.dtype]
        self.text("V 1")
        self.text(f"torch.{name}Tensor")
        self.ints(tensor.ndim)
        self.longs(*tensor.shape, *tensor.stride(), tensor.storage_offset() + 1)
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        new = key not in self.seen
        self.ints(4, self.seen.setdefault(key, len(self.seen) + 1))
        self.kept.append(storage)
        if new:
            content = bytes(storage)
            self.text("V 1")
            self.text(f"torch.{name}Storage")
            self.longs(len(content) // tensor.element_size())
            self.out += content


def write(path: Path, value: Any, cuda: bool = False) -> Path:
    path.write_bytes(Writer(cuda).value(value))
    return path


def module(kind: str, *parts: Torch7Object, **fields: Any) -> Torch7Object:
    """A module of nn, with those fields that any has and the reader is to pass over."""
    inner = {"modules": {float(i): part for i, part in enumerate(parts, 1)}} if parts else {}
    return Torch7Object(
        kind, {"train": False, "_type": "torch.FloatTensor", "output": torch.ones(1), **inner, **fields}
    )


def network() -> Torch7Object:
    flat = torch.randn(200)  # as getParameters leaves it: all weights in one storage
    conv = module(
        "cudnn.SpatialConvolution", weight=flat[:54].view(2, 3, 3, 3), gradWeight=flat[54:108].view(2, 3, 3, 3)
    )
    norm = module(
        "nn.SpatialBatchNormalization",
        weight=flat[110:112],
        bias=flat[112:114],
        running_mean=torch.zeros(2),
        running_var=torch.ones(2),
    )
    matrix = module("nn.SpatialConvolutionMM", weight=flat[120:156].view(2, 18), nInputPlane=2.0, kH=3.0, kW=3.0)
    linear = module("nn.Linear", weight=flat[160:170].view(5, 2), bias=flat[170:175])
    branch = module("nn.ConcatTable", matrix, module("nn.Identity"))
    return module("nn.Sequential", conv, module("nn.Sequential", norm, branch, closure=b"\x1bLua"), linear)


@pytest.mark.parametrize("cuda", [False, True])
def test_a_network_comes_out_by_places(tmp_path: Path, cuda: bool) -> None:
    source = network()
    state = read_state_dict(write(tmp_path / "net.t7", source, cuda))
    conv, inner, linear = (source.fields["modules"][i] for i in (1.0, 2.0, 3.0))
    assert state.keys() == {
        *("0.weight", "1.0.weight", "1.0.bias", "1.0.running_mean", "1.0.running_var", "1.1.0.weight"),
        *("2.weight", "2.bias"),
    }
    assert torch.equal(state["0.weight"], conv.fields["weight"])
    assert torch.equal(state["1.0.bias"], inner.fields["modules"][1.0].fields["bias"])
    assert state["1.1.0.weight"].shape == (2, 2, 3, 3)
    assert torch.equal(state["2.weight"], linear.fields["weight"])
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)


def test_plain_values_and_shared_tables(tmp_path: Path) -> None:
    shared = {"x": 1.5}
    shared["self"] = shared
    value = {
        "a": shared,
        "b": shared,
        1.0: True,
        "n": None,
        "s": "täxt",
        "t": torch.arange(6).view(2, 3).t(),
        "f": b"code",
    }
    read = torch7.load(write(tmp_path / "v.t7", value))
    assert read["a"] is read["b"] is read["a"]["self"]
    assert (read[1.0], read["n"], read["s"], read["f"]) == (True, None, "täxt", None)
    assert torch.equal(read["t"], value["t"])
    assert torch7.load(write(tmp_path / "e.t7", torch.empty(0))).numel() == 0


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = Writer().value(network())
    path = tmp_path / "cut.t7"
    for length in {0, 1, 4, 7, len(whole) - 1, *range(8, len(whole), 37)}:
        path.write_bytes(whole[:length])
        with pytest.raises(ZooError, match=re.escape(str(path))):
            torch7.read_state_dict(path)


def test_spoilt_bytes_never_do_more_than_raise(tmp_path: Path) -> None:
    whole = Writer().value(network())
    path = tmp_path / "spoilt.t7"

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.integers(0, len(whole) - 4), st.binary(min_size=1, max_size=4))
    def spoil(at: int, change: bytes) -> None:
        path.write_bytes(whole[:at] + change + whole[at + len(change) :])
        try:
            state = torch7.read_state_dict(path)
        except ZooError:
            return
        assert all(value.numel() <= 200 for value in state.values())

    spoil()


def _tensor(sizes: tuple, strides: tuple, offset: int, numbers: int = 4) -> bytes:
    writer = Writer()
    writer.ints(4, 1)
    writer.text("V 1")
    writer.text("torch.FloatTensor")
    writer.ints(len(sizes))
    writer.longs(*sizes, *strides, offset)
    writer.ints(4, 2)
    writer.text("V 1")
    writer.text("torch.FloatStorage")
    writer.longs(numbers)
    return bytes(writer.out) + bytes(16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_tensor((5,), (1,), 1), "exceeds its storage"),
        (_tensor((2, 2), (3, 1), 1), "exceeds its storage"),
        (_tensor((4,), (1,), 2), "exceeds its storage"),
        (_tensor((1 << 40, 1 << 40), (0, 0), 1), "exceeds its storage"),
        (_tensor((4,), (-1,), 4), "strides"),
        (_tensor((4,), (1,), 0), "strides"),
        (_tensor((-1,), (1,), 1), "strides"),
        (_tensor((4,), (1,), 1, numbers=1 << 40), "not a whole"),
        (_tensor((4,), (1,), 1, numbers=-4), "storage of -4"),
        (_tensor((1,) * 9, (1,) * 9, 1), "9 dimensions"),
        (struct.pack("<3i", 3, 1, 1 << 30), "table of"),
        (struct.pack("<3i", 3, 1, -1), "table of"),
        (struct.pack("<2i", 2, -5), "-5 bytes"),
        (struct.pack("<i", 77), "no type 77"),
        (b"".join(struct.pack("<4i2d", 3, k, 1, 1, 1, 0)[:-8] for k in range(1, 500)), "nested"),
        (b"PK\x03\x04 something else", "no type"),
    ],
)
def test_hostile_files_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "hostile.t7"
    path.write_bytes(content)
    with pytest.raises(ZooError, match=message) as caught:
        torch7.load(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_network(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="holds no network"):
        torch7.read_state_dict(write(tmp_path / "a.t7", {"weight": torch.ones(2)}))
    with pytest.raises(ZooError, match="has no fields"):
        torch7.read_state_dict(write(tmp_path / "b.t7", Torch7Object("nn.Sequential", None)))
    loop = module("nn.Sequential", module("nn.Linear", weight=torch.ones(1, 1)))
    loop.fields["modules"][2.0] = loop
    with pytest.raises(ZooError, match="holds itself"):
        torch7.read_state_dict(write(tmp_path / "c.t7", loop))
    wide = module("nn.Sequential")
    for _ in range(20):
        wide = module("nn.Sequential", wide, wide)
    with pytest.raises(ZooError, match="more modules"):
        torch7.read_state_dict(write(tmp_path / "w.t7", wide))
    bad = module("nn.SpatialConvolutionMM", weight=torch.ones(2, 5), nInputPlane=2.0, kH=3.0, kW=3.0)
    with pytest.raises(ZooError, match="none of"):
        torch7.read_state_dict(write(tmp_path / "d.t7", module("nn.Sequential", bad)))
    with pytest.raises(ZooError, match="No such file"):
        torch7.load(tmp_path / "absent.t7")
