"""Pickled modules of NVIDIA's projects: their tensors are read, their code is not run."""

from __future__ import annotations

import copyreg
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zoo.errors import ZooError
from zoo.formats import persistence
from zoo.weights.files import read_state_dict


@pytest.fixture(autouse=True)
def _writer() -> Iterator[None]:
    """The function by whose name such files are made, as pickle wants to find it."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    _reconstruct.__module__, _reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct  # type: ignore[attr-defined]
    sys.modules |= {"torch_utils": package, "torch_utils.persistence": module}
    yield
    for name in ("torch_utils", "torch_utils.persistence"):
        del sys.modules[name]


def _reconstruct(facts: Any) -> Any:
    raise AssertionError("it was called")


class _Persistent:
    """Pickled with source code, which writes a file."""

    code = ""

    def __reduce__(self) -> Any:
        facts = {"type": "class", "version": 6, "module_src": self.code, "class_name": "X", "state": self.__dict__}
        return _reconstruct, (facts,)


class Linear(_Persistent, nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.bias = None
        self.register_buffer("filter", torch.arange(4.0).view(2, 2).T)
        self.register_buffer("hidden", torch.zeros(1), persistent=False)


class Net(_Persistent, nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleDict({"a": Linear(), "b": Linear()})
        self.gain = nn.Parameter(torch.ones(3, dtype=torch.float16))
        self.nothing = None


class Loss(_Persistent):
    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)


def _write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_come_back_and_no_code_runs(tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Persistent, "code", f"open({str(tmp_path / 'ran')!r}, 'w')")
    net = Net()
    content = {"ema": net, "loss_fn": Loss(sigma_data=0.5), "augment_pipe": None, "dataset_kwargs": {"path": "x.zip"}}
    path = _write(tmp_path / "net.pkl", content, protocol)
    assert persistence.is_persistent(path)
    found = persistence.read(path)
    assert found["loss_fn"] == {"sigma_data": 0.5}
    assert found["dataset_kwargs"] == {"path": "x.zip"}
    state = read_state_dict(path)
    wanted = net.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in wanted.items())
    assert not (tmp_path / "ran").exists()


class _Reduced:
    def __init__(self, *how: Any) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return self.how


def _rebuilt(size: Any, stride: Any, offset: Any = 0) -> Any:
    storage = torch.zeros(4).untyped_storage()
    return _Reduced(torch._utils._rebuild_tensor_v2, (torch.storage.TypedStorage(
        wrap_storage=storage, dtype=torch.float32, _internal=True), offset, size, stride, False, None))  # fmt: skip


def _module(**parts: Any) -> Loss:
    return Loss(**{"_parameters": {}, "_buffers": {}, "_modules": {}, **parts})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (_module(_parameters={"w": _rebuilt((1 << 40,), (0,))}), "a tensor of shape"),
        (_module(_parameters={"w": _rebuilt((4,), (2,))}), "a tensor of shape"),
        (_module(_parameters={"w": _rebuilt((4,), (1,), -1)}), "without storage, size or stride"),
        (_module(_parameters={"w": 3}), "w, which is no tensor"),
        (_module(_modules={"m": [1]}), "m, which is no module"),
        (_module(_modules=None), "a module without _modules"),
        (Loss(x=_Reduced(copyreg._reconstructor, (Path, object, None))), "refused"),  # type: ignore[attr-defined]
        (Loss(x=_Reduced(torch.storage._load_from_bytes, (b"nothing",))), "not a whole storage"),  # type: ignore[attr-defined]
    ],
)
def test_what_no_module_holds_is_refused(tmp_path: Path, content: Any, told: str) -> None:
    path = _write(tmp_path / "bad.pkl", {"ema": content})
    with pytest.raises(ZooError, match=told) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    path = _write(tmp_path / "net.pkl", {"ema": Net()})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ZooError, match="not a whole pickle"):
        read_state_dict(path)


def test_modules_within_modules_and_the_same_again_end(tmp_path: Path) -> None:
    deep: Any = _module()
    for _ in range(80):
        deep = _module(_modules={"m": deep})
    with pytest.raises(ZooError, match="64 deep"):
        read_state_dict(_write(tmp_path / "deep.pkl", {"ema": deep}))
    many: Any = []
    for _ in range(40):
        many = [many, many]
    with pytest.raises(ZooError, match="many of them the same"):
        read_state_dict(_write(tmp_path / "many.pkl", {"ema": Loss(x=many)}))
