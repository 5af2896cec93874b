"""Spoils weight files of every format, by seed, and loads them: a one-line ZooError or a network of finite numbers.

    python -m tests.weights.fuzz_weights --count 300        # all formats in turn; prints the seed of each fault

Each case runs in a child process with bounded memory and time, so that an abort, a hang or a bomb is a fault of that
case alone. A file that runs anything leaves a mark, which is a fault too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from tests.formats.test_torch7 import module, write
from zoo.errors import ZooError

SECONDS = 20  # for one case on a busy machine
MEMORY = 3 << 30  # bytes that a case may take beside what the process has at its start
CODE = """
from __future__ import annotations
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.b = nn.Linear(5, num_classes)


def fuzz_net(**overrides) -> Net:
    return Net(**overrides)


def convert_official(state):
    names = {"0": "a", "1": "b"}
    state = {key.replace("/", "."): value for key, value in state.items()}
    return {names.get(key.partition(".")[0], key.partition(".")[0]) + "." + key.partition(".")[2]: value
            for key, value in state.items()}
"""
State = dict[str, Any]


def state(rng: random.Random) -> State:
    torch.manual_seed(rng.getrandbits(32))
    shapes = {"a.weight": (5, 6), "a.bias": (5,), "b.weight": (4, 5), "b.bias": (4,)}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


# ---- what stands in the files ---------------------------------------------------------------------------------------


class Runs:
    """Leaves a mark in the working folder when it is unpickled by something that runs it."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def _renamed(content: State, rng: random.Random) -> State:
    key = rng.choice(sorted(content))
    return {(f"{rng.choice(['module.', 'x.', '../', ''])}{k}s" if k == key else k): v for k, v in content.items()}


def _dropped(content: State, rng: random.Random) -> State:
    key = rng.choice(sorted(content))
    return {k: v for k, v in content.items() if k != key}


def _duplicated(content: State, rng: random.Random) -> State:
    key = rng.choice(sorted(content))
    return {**content, f"module.{key}": content[key], f"{key}.copy": content[key]}


def _shaped(content: State, rng: random.Random) -> State:
    key = rng.choice(sorted(content))
    value = content[key]
    shapes = [value[:1], value[None], torch.zeros(0), torch.tensor(1.0), torch.cat([value, value])]
    return {**content, key: rng.choice(shapes)}


def _typed(content: State, rng: random.Random) -> State:
    key = rng.choice(sorted(content))
    return {**content, key: content[key].to(rng.choice([torch.int64, torch.float64, torch.float16, torch.bool]))}


def _nan(content: State, rng: random.Random) -> State:
    key = rng.choice(sorted(content))
    value = content[key].clone()
    value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf"), float("-inf")])
    return {**content, key: value}


CONTENTS = {
    "whole": lambda content, rng: content,
    "renamed": _renamed,
    "dropped": _dropped,
    "duplicated": _duplicated,
    "shaped": _shaped,
    "typed": _typed,
    "nan": _nan,
}


def _loop() -> Any:
    loop: dict[str, Any] = {}
    loop["again"] = [loop]
    return loop


def _repeated() -> Any:
    content: list[Any] = [0]
    for _ in range(40):
        content = [content, content]
    return content


ODD: dict[str, Callable[[], Any]] = {
    "runs": Runs,
    "loop": _loop,
    "repeated": _repeated,
    "objects": lambda: np.array([{}], dtype=object),
    "scalar": lambda: np.float64(1),
    "path": lambda: Path("a"),
    "module": lambda: torch.nn.GELU,
}
ODD_TENSORS: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(5, 6).to_sparse(),
    "meta": lambda: torch.empty(5, 6, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(5, 6), 0.1, 0, torch.qint8),
    "expanded": lambda: torch.ones(1).expand(1 << 40),
}


def _odd(wrapped: Any, key: str | None, content: State, rng: random.Random, tensors: bool) -> str:
    """Puts something among the weights or beside them; says what."""
    kinds = {**ODD, **ODD_TENSORS} if tensors else ODD
    kind = rng.choice(sorted(kinds))
    target = content if key is None or rng.random() < 0.5 else wrapped
    target[rng.choice(["a.weight", "extra", "args"])] = kinds[kind]()
    return kind


# ---- the formats ----------------------------------------------------------------------------------------------------


def _wrapped(content: State, rng: random.Random) -> tuple[Any, str | None]:
    key = rng.choice([None, "model", "state_dict", "ema", "params"])
    if key is None:
        return content, None
    return {key: content, "epoch": 3, "ema": rng.choice([None, {}, dict(content)])} if key == "model" else {
        key: content
    }, key


def _torch(content: State, folder: Path, rng: random.Random, odd: bool, legacy: bool) -> Path:
    wrapped, key = _wrapped(content, rng)
    if odd:
        _odd(wrapped, key, content, rng, tensors=True)
    torch.save(wrapped, folder / "w.pth", _use_new_zipfile_serialization=not legacy)
    return folder / "w.pth"


def _safetensors(content: State, folder: Path, rng: random.Random, odd: bool) -> Path:
    from safetensors.torch import save

    data = save({key: value.clone().contiguous() for key, value in content.items()})
    if odd:  # another header: huge or overlapping places, unknown kinds, metadata, duplicates
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        entry = header[rng.choice(sorted(header))]
        entry.update(rng.choice([
            {"shape": [1 << 40]}, {"data_offsets": [0, 1 << 50]}, {"data_offsets": [8, 4]}, {"dtype": "F4"},
            {"dtype": "BOOL"}, {"shape": [-1]}, {"shape": []}, {"dtype": 7}, {"extra": {"a": [1] * 100}},
        ]))  # fmt: skip
        text = json.dumps(header).encode()
        size = rng.choice([len(text), 1 << 60, len(text) - 3])
        data = struct.pack("<Q", size) + text + data[8 + length :]
    (folder / "w.safetensors").write_bytes(data)
    return folder / "w.safetensors"


def _arrays(content: State) -> dict[str, Any]:
    return {key: value.numpy() if isinstance(value, Tensor) else value for key, value in content.items()}


def _pkl(content: State, folder: Path, rng: random.Random, odd: bool) -> Path:
    arrays = _arrays(content)
    wrapped = {rng.choice(["model", "blobs"]): arrays, "__author__": "x"}
    if odd:
        _odd(wrapped, "model", arrays, rng, tensors=False)
    (folder / "w.pkl").write_bytes(pickle.dumps(wrapped, rng.choice([0, 2, 4, 5])))
    return folder / "w.pkl"


def _npz(content: State, folder: Path, rng: random.Random, odd: bool) -> Path:
    arrays = _arrays(content)
    if odd:
        arrays["extra"] = rng.choice([np.array([Runs()], dtype=object), np.array(["text"]), np.ones(2, "c8")])
    (np.savez_compressed if rng.random() < 0.5 else np.savez)(folder / "w.npz", **arrays)
    return folder / "w.npz"


def _t7(content: State, folder: Path, rng: random.Random, odd: bool) -> Path:
    parts = []
    for name in ("a", "b"):
        fields = {key.partition(".")[2]: value for key, value in content.items() if key.startswith(name)}
        fields = {key: value for key, value in fields.items() if value.dtype in (torch.float32, torch.float64)}
        parts.append(module("nn.Linear", **fields))
    if odd:
        parts[0].fields["modules"] = {1.0: parts[rng.randrange(2)]}  # may hold itself
        if rng.random() < 0.5:
            parts[1].fields["weight"] = torch.zeros(1).expand(1 << 20, 1 << 15)
    return write(folder / "w.t7", module("nn.Sequential", *parts))


def _packed(array: Any) -> Any:
    import msgpack

    facts = (list(array.shape), array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(facts, use_bin_type=True))


def _tree(content: State, leaf: Callable[[str, Any], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in content.items():
        *parts, name = path.replace("..", "").split(".")
        inner = tree
        for part in parts:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                return tree
        inner[name] = leaf(path, value.numpy())
    return tree


def _msgpack(content: State, folder: Path, rng: random.Random, odd: bool) -> Path:
    import msgpack

    tree: Any = {"params": _tree(content, lambda path, value: _packed(value))}
    if rng.random() < 0.3:
        tree["ema_params"] = tree["params"]
    if odd:
        tree["params"]["a"] = rng.choice([
            msgpack.ExtType(1, msgpack.packb(([1 << 40], "float32", b""))), msgpack.ExtType(9, b""), [1], "text",
            msgpack.ExtType(1, msgpack.packb(([2], "object", bytes(16)))),
            {"__msgpack_chunked_array__": True, "shape": {"0": 1 << 40}, "chunks": {"0": "text"}},
            {"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}}, _packed(np.ones((), "c8")),
        ])  # fmt: skip
    (folder / "w.msgpack").write_bytes(msgpack.packb(tree))
    return folder / "w.msgpack"


def _zarr(folder: Path, value: Any, rng: random.Random, odd: bool) -> None:
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {
        "zarr_format": 2, "shape": list(value.shape), "chunks": [max(1, side) for side in value.shape],
        "dtype": value.dtype.str, "compressor": None, "fill_value": None, "order": "C", "filters": None,
    }  # fmt: skip
    if odd:
        facts.update(rng.choice([
            {"shape": [1 << 40] * len(value.shape)}, {"chunks": [1 << 40] * len(value.shape)}, {"dtype": "|O"},
            {"compressor": {"id": "gzip"}}, {"compressor": {"id": "blosc"}}, {"shape": [-1]}, {"chunks": [0]},
            {"fill_value": "NaN"}, {"shape": None}, {"dtype": [["a", "<f4"]]}, {"shape": [1 << 62] * 3},
        ]))  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(facts))
    if rng.random() > 0.1 or not odd:
        (folder / (".".join("0" * value.ndim) or "0")).write_bytes(value.tobytes())


def _orbax(content: State, folder: Path, rng: random.Random, odd: bool) -> Path:
    spoilt = rng.choice(sorted(content))
    for key, value in content.items():
        name = key.replace("/", "").replace("..", "")
        _zarr(folder / "checkpoint_3" / f"params.{name}", value.numpy(), rng, odd and key == spoilt)
    return folder


def _t5x(content: State, folder: Path, rng: random.Random, odd: bool, packed: bool) -> Path:
    import msgpack

    spoilt, inner = rng.choice(sorted(content)), folder / "t5x"

    def leaf(key: str, value: Any) -> Any:
        name = f"target.{key.replace('/', '')}"
        _zarr(inner / name, value, rng, odd and key == spoilt and rng.random() < 0.6)
        path = (
            rng.choice(["../elsewhere", "/etc", "absent", ""]) if odd and key == spoilt and rng.random() < 0.5 else name
        )
        return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}

    index = {"version": 3, "optimizer": {"target": _tree(content, leaf)}}
    inner.mkdir(exist_ok=True)
    (inner / "checkpoint").write_bytes(msgpack.packb(index))
    if not packed:
        return folder
    with zipfile.ZipFile(folder / "w.zip", "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for path in sorted(inner.rglob("*")):
            archive.write(path, path.relative_to(folder))
        if odd and rng.random() < 0.3:
            archive.writestr("t5x/target.bomb", bytes(100 << 20), zipfile.ZIP_DEFLATED)
    return folder / "w.zip"


Make = Callable[[State, Path, random.Random, bool], Path]
FORMATS: dict[str, Make] = {
    "torch": lambda *arguments: _torch(*arguments, legacy=False),
    "legacy": lambda *arguments: _torch(*arguments, legacy=True),
    "safetensors": _safetensors,
    "pkl": _pkl,
    "npz": _npz,
    "t7": _t7,
    "msgpack": _msgpack,
    "orbax": _orbax,
    "t5x": lambda *arguments: _t5x(*arguments, packed=False),
    "t5x zip": lambda *arguments: _t5x(*arguments, packed=True),
}


# ---- spoilt bytes ---------------------------------------------------------------------------------------------------


def _spoilt(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(max(1, len(data)))
        kind = rng.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 50)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 50)]
        elif kind == 4:
            data[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, struct.pack("<Q", 1 << 40)])
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 30))
    return bytes(data)


def make(seed: int, folder: Path) -> tuple[str, Path]:
    """The file of a case, and what was done to it."""
    rng = random.Random(seed)
    name = list(FORMATS)[seed % len(FORMATS)]
    content = rng.choice(sorted(CONTENTS))
    odd, spoilt = rng.random() < 0.4, rng.random() < 0.5
    path = FORMATS[name](CONTENTS[content](state(rng), rng), folder, rng, odd)
    if spoilt:
        files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        target = rng.choice(files)
        target.write_bytes(_spoilt(target.read_bytes(), rng))
    return f"{name}, {content}{', odd' if odd else ''}{', spoilt bytes' if spoilt else ''}", path


def check(seed: int) -> str | None:
    """What is wrong with how a case ends; None if nothing is."""
    from zoo import create_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            (folder / "files").mkdir()
            what, path = make(seed, folder / "files")
            (folder / "ran").unlink(missing_ok=True)
            problem = None
            try:
                net = create_model("fuzz_net", weights=path)
                if not all(value.isfinite().all() for value in net.state_dict().values()):
                    problem = "loaded numbers that are not finite"
            except ZooError as error:
                message = str(error)
                if "\n" in message or len(message) > 1500 or not message.strip():
                    problem = f"a message of more than a line: {message[:300]!r}"
            except Exception as error:
                problem = f"{type(error).__name__}: {str(error)[:300]}"
            if (folder / "ran").exists():
                problem = "the file was run"
        os.chdir("/")
    return f"{what}: {problem}" if problem else None


# ---- processes ------------------------------------------------------------------------------------------------------


def _work(seeds: range) -> None:
    """In the child: a line before each case and one after it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
    for seed in seeds:
        print(json.dumps([seed]), flush=True)
        print(json.dumps([seed, check(seed)]), flush=True)


def run(seeds: range) -> list[str]:
    """The faults of these cases, each a line with its seed."""
    faults = []
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "fuzz.py").write_text(CODE)
        facts = {"slug": "fuzz", "field": "selfsup", "title": "Fuzz", "authors": ["A. Uthor"], "year": 2026}
        card = {**facts, "summary": "A test's paper.", "models": [{"name": "fuzz_net", "params": 59}]}
        (Path(home) / "fuzz.yaml").write_text(yaml.safe_dump(card))
        environment = {**os.environ, "ZOO_PAPERS": home, "ZOO_HOME": f"{home}/cache", "PYTHONPATH": str(root)}
        at = seeds.start
        while at < seeds.stop:
            with (Path(home) / "log").open("w+") as log, (Path(home) / "errors").open("w+") as errors:
                command = [sys.executable, "-m", "tests.weights.fuzz_weights", "--work", f"{at}:{seeds.stop}"]
                child = subprocess.Popen(command, env=environment, stdout=log, stderr=errors)
                length, since = 0, time.monotonic() + 60  # a minute to import torch
                while child.poll() is None:
                    time.sleep(0.02)
                    if (size := os.fstat(log.fileno()).st_size) > length:
                        length, since = size, time.monotonic()
                    if time.monotonic() > since + SECONDS:
                        child.kill()
                log.seek(0)
                errors.seek(0)
                running = at
                for seed, *ended in map(json.loads, log):
                    running = seed
                    if ended:
                        at = seed + 1
                        faults += [f"{seed}: {ended[0]}"] if ended[0] else []
                if at < seeds.stop:
                    end = "hangs" if child.returncode == -9 else f"ends the process ({child.returncode})"
                    faults.append(f"{running}: {end} {' '.join(errors.read().split())[-300:]}")
                    at = running + 1
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description="Spoil weight files by seed and load them.")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        first, last = map(int, arguments.work.split(":"))
        _work(range(first, last))
        return 0
    faults = run(range(arguments.first, arguments.first + arguments.count))
    print("\n".join([*faults, f"{arguments.count} cases, {len(faults)} faults"]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
