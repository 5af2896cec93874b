"""`zoo embed MODEL FOLDER -o FILE`: what a network makes of every file of a folder, in one file, with their names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo import files
from zoo.command.common import Parser, files_in, progress, use_ema_option
from zoo.data.files import read_text
from zoo.data.sources import EXTENSIONS as PICTURES
from zoo.data.video_reader import EXTENSIONS as VIDEOS
from zoo.errors import MissingPackage, ZooError
from zoo.machine import device_of
from zoo.weights.pretrained import create_model, create_preprocess, fetch_weights
from zoo.weights.runs import RunModel, is_run, open_run

FORMATS = (".npz", ".parquet", ".safetensors")
_PART = {"pictures": 64, "videos": 8, "texts": 256}  # files of a part, after which a run goes on that was stopped
_SHARE = "ZOO_EMBED_SHARE"  # "K/N" of a process that another one started


def parser() -> Parser:
    found = Parser(
        prog="zoo embed",
        description="Features of pictures, videos or texts, with the names of their files.",
        epilog="zoo embed runs:mae photos -o photos.npz; zoo embed moco_resnet50_trunk.in1k_200ep photos -o p.parquet."
        " The file holds `features` (N, D) float32 and `files`. A run that was stopped goes on where it was.",
    )
    found.add_argument("model", help="published weights, or a run: runs/..., runs:RECIPE, a checkpoint")
    found.add_argument(
        "folder", type=Path, help="all pictures (videos, .txt files) in it and below; or a .txt, by lines"
    )
    found.add_argument("-o", "--out", required=True, type=Path, help="FILE.npz, FILE.parquet or FILE.safetensors")
    found.add_argument("--texts", action="store_true", help="of a model of images and texts: the texts")
    found.add_argument("--batch", type=int, default=32, help="files that go through the network together (32)")
    found.add_argument("--processes", type=int, default=1, help="so many at once; under torchrun as many as that says")
    found.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU where there is one")
    use_ema_option(found, "of a run")
    return found


def main(words: Sequence[str]) -> int:
    """Runs ``zoo embed WORDS``."""
    given = parser().parse_args(list(words))
    if given.out.suffix not in FORMATS:
        raise ZooError(f"-o is a file that ends in {', '.join(FORMATS)}, not {str(given.out)!r}")
    if given.batch < 1 or given.processes < 1:
        raise ZooError("--batch and --processes are 1 or more")
    if given.out.suffix == ".parquet":
        _arrow()
    device_of(given.device)
    rank, world = _place()
    if given.processes > 1 and world > 1 and _SHARE not in os.environ:
        raise ZooError("torchrun says how many processes there are: leave --processes out")
    job = _Job(given)
    try:
        if given.processes > 1 and _SHARE not in os.environ:
            _start_others(list(words), given.processes)
        else:
            job.run(rank, world)
    except ZooError:
        job.drop_empty()
        raise
    if rank != 0 or _SHARE in os.environ:
        return 0
    if given.processes == 1:
        job.wait(world)
    count, failed = job.finish()
    print(f"{given.out}: {count[0]} x {count[1]} features")
    for line in failed:
        print(f"zoo: {line}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(job.names)} files are left out", file=sys.stderr)
    return int(bool(failed))


def _place() -> tuple[int, int]:
    """This process's number and how many there are: torchrun's, or those of the process that started it."""
    if share := os.environ.get(_SHARE):
        k, _, n = share.partition("/")
        return int(k), int(n)
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _launch() -> str:
    """What all processes of one launch share, and no other launch does."""
    return " ".join(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"))


def _start_others(words: list[str], count: int) -> None:
    """Runs the command in `count` processes, each with its share; all end before this returns.

    Raises:
        ZooError: one of them failed.
    """
    threads = str(max(1, torch.get_num_threads() // count))
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "zoo", "embed", *words],
            env={**os.environ, _SHARE: f"{k}/{count}", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(count)
    ]
    try:
        ended = [(process.communicate()[1], process.returncode) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
    for said, code in ended:
        if code:
            lines = [line for line in said.splitlines() if line.strip()] or [f"a process ended with {code}"]
            raise ZooError(lines[-1].removeprefix("zoo: "))


class _Job:
    """One command: the files, the parts that are done, and what is left to do."""

    def __init__(self, given: Any) -> None:
        self.given, self.out = given, Path(given.out)
        self.model = _Features(given.model, given.use_ema, given.texts, given.folder)
        self.names, self.items = self.model.listed(given.folder)
        self.size = _PART[self.model.what]
        self.place = self.out.with_name(f"{self.out.name}.parts")
        listing = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()
        facts = {"model": given.model, "weights": self.model.fingerprint, "what": self.model.what}
        self.facts = {**facts, "files": listing, "count": len(self.names), "batch": given.batch}
        self._claim()

    def _claim(self) -> None:
        """The folder of the parts is this job's; it may hold some already."""
        note = self.place / "job.json"
        if note.is_file():
            found = None
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(note.read_text(encoding="utf-8"))
            if found != self.facts:
                raise ZooError(
                    f"{self.place} holds parts of another job (another model, folder or batch); remove it, or give"
                    " another -o"
                )
        else:
            files.write_json(note, self.facts)

    def _part(self, number: int) -> Path:
        return self.place / f"{number:06d}.safetensors"

    def drop_empty(self) -> None:
        """Takes the folder of the parts away where there is none."""
        if not list(self.place.glob("*.safetensors")):
            shutil.rmtree(self.place, ignore_errors=True)

    @property
    def parts(self) -> range:
        return range(-(-len(self.names) // self.size))

    def run(self, rank: int, world: int) -> None:
        """Makes the parts of one process that are not there."""
        mine = [n for n in self.parts if n % world == rank and not self._part(n).is_file()]
        total = sum(len(self.items[n * self.size : (n + 1) * self.size]) for n in mine)
        if mine:
            self._make_all(mine, total)
        if world > 1 and _SHARE not in os.environ:
            files.write_text(self.place / f"{rank}.done", _launch())

    def _make_all(self, mine: Sequence[int], total: int) -> None:
        self.model.load(device_of(self.given.device))
        with progress(total, "embed") as bar:
            for n in mine:
                self._make(n)
                bar.advance(bar.task_ids[0], self.size)

    def _make(self, number: int) -> None:
        from safetensors.torch import save_file

        some = slice(number * self.size, (number + 1) * self.size)
        rows, kept, failed = [], [], []
        waiting: list[Tensor] = []

        def through() -> None:
            if waiting:
                rows.append(self.model(torch.stack(waiting)))
                waiting.clear()

        for index, x in enumerate(self.model.read(self.items[some])):
            if isinstance(x, ZooError):
                failed.append(str(x))
                continue
            if waiting and (len(waiting) == self.given.batch or waiting[0].shape != x.shape):
                through()
            waiting.append(x)
            kept.append(number * self.size + index)
        through()
        features = torch.cat(rows) if rows else torch.empty(0, 0)
        note = {"failed": json.dumps(failed)}
        tensors = {"features": features.contiguous(), "index": torch.tensor(kept, dtype=torch.long)}
        with files.replacing(self._part(number)) as part:
            save_file(tensors, part, note)

    def wait(self, world: int) -> None:
        """Until the other processes that torchrun started are done."""

        def done(rank: int) -> bool:
            with contextlib.suppress(OSError):
                return (self.place / f"{rank}.done").read_text(encoding="utf-8") == _launch()
            return False

        while not all(done(rank) for rank in range(1, world)):
            time.sleep(0.1)

    def finish(self) -> tuple[tuple[int, int], list[str]]:
        """Joins the parts in the file that was asked for; ((N, D), what could not be read)."""
        from safetensors import safe_open

        rows, index, failed = [], [], []
        for number in self.parts:
            with safe_open(self._part(number), "pt") as part:
                failed += json.loads(part.metadata()["failed"])
                if len(some := part.get_tensor("index")):
                    rows.append(part.get_tensor("features"))
                    index += some.tolist()
        if not rows:
            shutil.rmtree(self.place, ignore_errors=True)
            raise ZooError(failed[0] if failed else f"{self.given.folder}: nothing to embed")
        features, names = torch.cat(rows).numpy(), [self.names[k] for k in index]
        facts = {key: self.facts[key] for key in ("model", "weights", "what")}
        write = {".npz": _write_npz, ".parquet": _write_parquet, ".safetensors": _write_safetensors}[self.out.suffix]
        with files.replacing(self.out) as part:
            write(part, features, names, facts)
        shutil.rmtree(self.place, ignore_errors=True)
        return features.shape, failed


# ------------------------------------------------------------------------------------------------------------ the model


class _Features:
    """A model as a function of files.

    Attributes:
        what: "pictures", "videos" or "texts".
        fingerprint: changes with the weights.
    """

    def __init__(self, name: str, use_ema: bool | None, texts: bool, folder: Path) -> None:
        self.name, self.use_ema = name, use_ema
        self.run: RunModel | None = open_run(name, use_ema) if is_run(name) else None
        if self.run is None and use_ema is not None:
            raise ZooError("--use-ema chooses within a run; published weights are one set")
        facts = (self.run.facts["preprocess"] or {}) if self.run is not None else {}
        self.what = "videos" if facts.get("kind") == "clip" else "pictures"
        if facts.get("kind") in ("objects", "grid") or (self.run is not None and not facts):
            raise ZooError(f"{name}: gives no features of a whole picture, video or text")
        self.words = facts
        if texts or (folder.suffix == ".txt" and folder.is_file()):
            self.what = "texts"
        source = self.run.checkpoint if self.run is not None else fetch_weights(name)
        self.fingerprint = f"{_digest(source)}{'' if use_ema is None else f' ema {use_ema}'}"
        self._call: Callable[[Any], Tensor] | None = None
        self._prepare: Callable[[Any], Any] | None = None
        self.device = torch.device("cpu")

    def listed(self, folder: Path) -> tuple[list[str], list[Any]]:
        """The names of what is embedded, relative to the folder, and what is read of each."""
        if self.what == "texts" and folder.is_file():
            lines = [line.strip() for line in read_text(folder).splitlines()]
            numbered = [(f"{folder.name}:{n}", line) for n, line in enumerate(lines, 1) if line]
            return [name for name, _ in numbered], [line for _, line in numbered]
        if not folder.is_dir():
            raise ZooError(f"no folder {str(folder)!r}")
        endings = {"pictures": PICTURES, "videos": VIDEOS, "texts": (".txt",)}[self.what]
        found = list(files_in(folder, endings))
        if not found:
            raise ZooError(f"{folder}: holds no {self.what} ({', '.join(endings[:5])})")
        return [path.relative_to(folder).as_posix() for path in found], found

    def load(self, device: torch.device) -> None:
        """Makes the network ready on a device."""
        self.device = device
        if self.run is None:
            net: Any = create_model(self.name, pretrained=True).eval()
            task: Any = net
            self._prepare = create_preprocess(self.name)
        else:
            task, net = self.run.task, self.run.network
            self._prepare = None if self.what == "texts" else self.run.preprocess()
        task.to(device)
        if self.what == "texts":
            if not callable(getattr(net, "encode_text", None)):
                raise ZooError(f"{self.name}: reads no texts")
            from zoo.data.text import WordPiece

            length = self.words.get("context_length") or net.text.pos_embed.shape[1]
            cut = WordPiece(self.words.get("tokenizer", "bert"), length)
            self._prepare, self._call = lambda text: cut([text])[0], net.encode_text
        else:
            self._call = _features_of(task, net, self.name, self.what)

    def read(self, items: Sequence[Any]) -> Any:
        """Each item as the network takes it, in order, or the ZooError that says why not."""

        def one(item: Any) -> Any:
            assert self._prepare is not None
            try:
                if self.what == "texts" and isinstance(item, Path):
                    item = " ".join(read_text(item).split())
                return self._prepare(item)
            except ZooError as error:
                return error

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if cores == 1 or self.what != "pictures":
            return map(one, items)
        with ThreadPoolExecutor(min(4, cores)) as pool:
            return list(pool.map(one, items))

    def __call__(self, batch: Tensor) -> Tensor:
        assert self._call is not None
        with torch.inference_mode():
            return self._call(batch.to(self.device)).float().cpu()


def _features_of(task: Any, net: Any, name: str, what: str) -> Callable[[Tensor], Tensor]:
    """Of a batch of prepared pictures, or of the views of videos (B, V, C, T, H, W), features (B, D)."""
    if what == "videos":
        if not callable(getattr(net, "forward_head", None)):
            raise ZooError(f"{name}: gives no features of a video")

        def of_views(views: Tensor) -> Tensor:
            pooled = net.forward_head(net.forward_features(views.flatten(0, 1)), pre_logits=True)
            return pooled.flatten(1).unflatten(0, views.shape[:2]).mean(dim=1)

        return of_views
    if callable(getattr(net, "encode_image", None)):  # comparable with those of texts
        return net.encode_image
    for one in (task, net):
        if callable(getattr(one, "features", None)):
            return one.features
    if callable(getattr(net, "forward_head", None)):
        return lambda images: net.forward_head(net.forward_features(images), pre_logits=True)
    if callable(getattr(net, "forward_features", None)):
        return lambda images: net.forward_features(images)[:, 0]  # the class token
    raise ZooError(f"{name}: gives no features of a picture")


def _digest(path: Path) -> str:
    if path.is_dir():
        inside = [f"{one.name} {one.stat().st_size} {one.stat().st_mtime_ns}" for one in sorted(path.iterdir())]
        return hashlib.sha256("\n".join(inside).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------- the file


def _write_npz(path: Path, features: np.ndarray, names: Sequence[str], facts: Mapping[str, Any]) -> None:
    with path.open("wb") as file:  # a name would get an ending
        np.savez(file, features=features, files=np.array(names), facts=np.array(json.dumps(facts)))


def _write_safetensors(path: Path, features: np.ndarray, names: Sequence[str], facts: Mapping[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file({"features": features}, path, {"files": json.dumps(list(names)), "facts": json.dumps(facts)})


def _write_parquet(path: Path, features: np.ndarray, names: Sequence[str], facts: Mapping[str, Any]) -> None:
    pa, pq = _arrow()
    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    table = pa.table({"file": pa.array(list(names)), "features": column})
    pq.write_table(table.replace_schema_metadata({"facts": json.dumps(facts)}), path)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingPackage("parquet wants pyarrow: pip install pyarrow; or take .npz, .safetensors") from error
    return pyarrow, pyarrow.parquet
