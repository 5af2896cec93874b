"""Checkpoints of t5x: zarr arrays beside a msgpack index, in a folder or zipped."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats import t5x
from zoo.weights.pretrained import read_state_dict


def write_t5x(folder: Path, target: dict[str, Tensor], driver: str = "file", small: str = "logit_scale") -> Path:
    """A checkpoint as t5x writes it: zarr arrays by tensorstore, `small` within the msgpack index, optimiser states."""
    msgpack, ts = pytest.importorskip("msgpack"), pytest.importorskip("tensorstore")

    def packed(array: Any) -> Any:
        data = (list(array.shape), array.dtype.name, array.tobytes())
        return msgpack.ExtType(1, msgpack.packb(data, use_bin_type=True))

    folder.mkdir(parents=True)
    tree: dict[str, Any] = {}
    states = {"state/step": torch.tensor(7), "state/param_states/0/mu": torch.ones(2)}
    for key, value in {**{f"target/{k}": v for k, v in target.items()}, **states}.items():
        array, place = value.contiguous().numpy(), tree
        *parents, leaf = key.split("/")
        for name in parents:
            place = place.setdefault(name, {})
        if leaf == small or not array.ndim:
            place[leaf] = packed(array)
            continue
        chunks = [max(1, -(-side // 2)) for side in array.shape]
        facts = {"compressor": {"id": "gzip"}, "shape": list(array.shape), "chunks": chunks}
        name = key.replace("/", ".")
        spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": facts}
        at = {"driver": "file", "path": str(folder / name)}
        ts.open({**spec, "kvstore": at}, create=True, open=True).result().write(array).result()
        written = {"driver": "file", "path": f"{name}/"}
        bucket = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
        place[leaf] = {**spec, **({"kvstore": written} if driver == "file" else {"kvstore": bucket, "path": name})}
    index = msgpack.packb({"version": 3, "optimizer": tree}, use_bin_type=True)
    (folder / "checkpoint").write_bytes(index)
    return folder


@pytest.mark.parametrize("driver", ["file", "gcs"])
def test_folders_and_zips_are_read(tmp_path: Path, driver: str) -> None:
    target = {"a/kernel": torch.randn(3, 4), "a/bias": torch.randn(5), "b/c/kernel": torch.randn(2, 3, 4)}
    target["logit_scale"] = torch.randn(1)
    folder = write_t5x(tmp_path / "run" / "checkpoint_7", target, driver)
    assert t5x.is_checkpoint(tmp_path / "run")
    with zipfile.ZipFile(tmp_path / "flip.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, Path("flip_v2") / path.relative_to(folder))
    for place in (tmp_path / "run", tmp_path / "flip.zip"):
        state = read_state_dict(place)
        assert state.keys() == target.keys()
        assert all(torch.equal(state[key], target[key]) for key in target)


def test_what_is_none_is_refused(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack")
    folder = write_t5x(tmp_path / "ckpt", {"a/kernel": torch.ones(2, 2)})
    whole = (folder / "checkpoint").read_bytes()
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": "../elsewhere"}}
    for content, message in (
        (whole[:-5], "not a whole msgpack"),
        (b"", "not a whole msgpack"),
        (msgpack.packb({"optimizer": {"target": {"a": {"kernel": spec}}}}), "outside the checkpoint"),
        (msgpack.packb({"optimizer": {"target": {"a": "text"}}}), "holds a str"),
        (msgpack.packb({"optimizer": {"target": {"a": {**spec, "kvstore": {"path": "absent"}}}}}), "ckpt: "),
    ):
        (folder / "checkpoint").write_bytes(content)
        with pytest.raises(ZooError, match=message):
            t5x.read_state_dict(folder)
    (tmp_path / "no.zip").write_bytes(b"PK nothing")
    with pytest.raises(ZooError, match="not a whole zip"):
        t5x.read_state_dict(tmp_path / "no.zip")
    assert not t5x.is_checkpoint(tmp_path / "no.zip")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").write_bytes(b"\x80")
    monkeypatch.setitem(__import__("sys").modules, "tensorstore", None)
    pytest.importorskip("msgpack")
    with pytest.raises(ZooError, match=r"pip install 'paperzoo\[jax\]'"):
        t5x.read_state_dict(tmp_path)
