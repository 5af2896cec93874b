"""Checkpoints of torch.save: what is read whole, and what is refused in one line, nothing of it run."""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from zoo.errors import ZooError
from zoo.weights.files import read_checkpoint, read_state_dict

RUN = {"pytorch-lightning_version": "2.6", "state_dict": {"w": torch.ones(3)}, "global_step": 3}
FORMATS = pytest.mark.parametrize("old_format", [False, True])


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def _loop() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["again"] = [loop]
    return loop


def _repeated() -> list[Any]:
    """2^40 values in 40 lists."""
    content: list[Any] = [0]
    for _ in range(40):
        content = [content, content]
    return content


def _nested(depth: int) -> list[Any]:
    content: list[Any] = []
    for _ in range(depth):
        content = [content]
    return content


def save(content: Any, path: Path, old_format: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    return path


@FORMATS
def test_plain_values_beside_the_weights_are_read(tmp_path: Path, old_format: bool) -> None:
    lists: defaultdict[str, list[int]] = defaultdict(list)
    lists["a"].append(1)
    beside = {
        "scalar": np.float64(2.5),
        "flag": np.bool_(True),
        "words": np.array(["a", "bc"]),
        "array": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "path": pathlib.PurePosixPath("/a/b"),
        "namespace": argparse.Namespace(lr=np.float32(0.5)),
        "simple": SimpleNamespace(a=1),
        "counter": Counter("aab"),
        "ordered": OrderedDict(a=(1, 2)),
        "times": [datetime.datetime(2026, 1, 2, 3), datetime.timedelta(1), range(3), slice(1, 2), np.dtype("f4")],
        "sets": [{1}, frozenset({2})],
        "bytes": [b"a", bytearray(b"b"), 1 + 2j, None, torch.float16, torch.Size([2])],
    }
    odd = {"lists": lists, "queue": deque([1, 2]), "version": torch.torch_version.TorchVersion("2.1")}
    found = read_checkpoint(save({**RUN, **beside, **odd}, tmp_path / "last.ckpt", old_format))
    for key, value in beside.items():
        assert type(found[key]) is type(value)
        assert np.array_equal(found[key], value) if key in ("words", "array") else found[key] == value
    assert [found[key] for key in odd] == [{"a": [1]}, [1, 2], "2.1"]
    assert type(found["version"]) is str
    assert torch.equal(found["state_dict"]["w"], torch.ones(3))


REFUSED = {
    "posix.system": lambda folder: Runs(folder / "ran"),
    "torch.nn.modules.linear.Linear": lambda folder: torch.nn.Linear(1, 1),
    "torch.nn.modules.activation.GELU": lambda folder: torch.nn.GELU,
    "numpy.ndarray of object": lambda folder: np.array([{}], dtype=object),
    "sparse tensor": lambda folder: torch.eye(2).to_sparse(),
    "quantised tensor": lambda folder: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "tensor without values": lambda folder: torch.empty(3, device="meta"),
    "nested tensor": lambda folder: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    "of more numbers than": lambda folder: torch.ones(1).expand(1 << 40),
    "storage": lambda folder: torch.ones(1).untyped_storage(),
    "holds itself": lambda folder: _loop(),
    "many of them the same": lambda folder: _repeated(),
    "nested more than 100 deep": lambda folder: _nested(200),
}


@FORMATS
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_is_named_by_place_and_type(tmp_path: Path, kind: str, old_format: bool) -> None:
    content = {**RUN, "callbacks": [{"best": REFUSED[kind](tmp_path)}]}
    path = save(content, tmp_path / "last.ckpt", old_format)
    with pytest.raises(ZooError, match=rf"last\.ckpt: (refused: )?callbacks\.0(\.best)?.* {kind}") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def _zip(path: Path, compression: int = zipfile.ZIP_STORED, size: int = 10) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", bytes(size))


def _damaged(path: Path) -> None:
    content = bytearray(save({**RUN, "x": torch.full((1000,), 7.0)}, path).read_bytes())
    content[content.index(b"\x00\x00\xe0\x40" * 10)] ^= 1
    path.write_bytes(content)


BROKEN = {
    "no such file": lambda path: None,
    "is a folder": lambda path: path.mkdir(),
    "is no regular file": os.mkfifo,
    "it is empty": lambda path: path.touch(),
    "an HTML page": lambda path: path.write_text("\n<!DOCTYPE html><html>429</html>"),
    "an XML page": lambda path: path.write_text("<?xml version='1.0'?><Error/>"),
    "a pointer of Git LFS": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "not a checkpoint of a run, or not a whole one": lambda path: path.write_bytes(bytes(100)),
    "it holds no 'pytorch-lightning_version'": lambda path: save({"state_dict": {}}, path),
    "it holds no": lambda path: save(torch.ones(3), path, True),
    "its zip is compressed": lambda path: _zip(path, zipfile.ZIP_DEFLATED, 1 << 24),
    "not a whole PyTorch checkpoint": lambda path: _zip(path),
    "is damaged": _damaged,
    "a TorchScript archive": lambda path: torch.jit.save(torch.jit.script(torch.nn.Identity()), path),
}


@pytest.mark.parametrize("reason", BROKEN)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_checkpoint_of_a_run_is_one_line(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "last.ckpt"
    BROKEN[reason](path)
    with pytest.raises(ZooError, match=rf"^{path}: .*{reason}") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@FORMATS
def test_a_truncated_checkpoint_is_one_line(tmp_path: Path, old_format: bool) -> None:
    whole = save({**RUN, "x": torch.ones(100)}, tmp_path / "whole.ckpt", old_format).read_bytes()
    path = tmp_path / "last.ckpt"
    for length in range(1, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ZooError, match=r"last\.ckpt: ") as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_an_averaged_model_of_torch_is_read_and_an_average_without_names_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = torch.nn.Linear(2, 3)
    torch.save(torch.optim.swa_utils.AveragedModel(net).state_dict(), tmp_path / "swa.pth")
    assert read_state_dict(tmp_path / "swa.pth").keys() == {"weight", "bias"}
    ema = {"shadow_params": list(net.parameters())}
    torch.save({"model": net.state_dict(), "ema": ema}, tmp_path / "shadow.pth")
    assert read_state_dict(tmp_path / "shadow.pth").keys() == {"weight", "bias"}
    assert "the raw weights are taken, as ema holds no tensors by name" in "".join(capsys.readouterr())
