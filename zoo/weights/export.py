"""A network as one file that runs without the zoo: torch.export's ``.pt2``, or ``.onnx``.

What is exported is what a user would call: a classifier's forward, the sampler of a one-step generator, else one
evaluation of its network; and where a network says so by ``export_part``, a method or a module of it (the encoder of
self-supervision, the backbone of a detector). Its inputs are pictures of the size that its preprocessing makes, unless
the network gives others by ``example_inputs(count) -> dict[str, Tensor]``, the arguments of forward by name.

A file is loaded again and compared with the network before it takes its name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zoo import files
from zoo.errors import MissingPackage, ZooError

TOLERANCE = 1e-4
FORMATS = (".pt2", ".onnx")
_LARGE = 1_500_000_000  # bytes of weights; an .onnx holds less than two GB, and has the rest in a file beside it
_SCALARS = (int, float, bool, str, type(None))


class _Part(nn.Module):
    """A method of a network, or a module in it, as a module; it takes arguments of the same names."""

    def __init__(self, network: nn.Module, part: str) -> None:
        super().__init__()
        self.network = network
        self.forward = _callee(network, part)


@dataclass
class Subject:
    """What is exported: `module` called with the inputs that `make` gives for so many samples, by name; `part` says
    what of the network it is."""

    module: nn.Module
    make: Callable[[int], dict[str, Any]]
    part: str
    note: str = ""


def subject(
    network: nn.Module, size: int | None = None, channels: int = 3, part: str | None = None, refused: str = ""
) -> Subject:
    """What to export of `network`.

    Args:
        size: side in pixels of the pictures that it takes; None: what it says of itself, else 224.
        channels: of the pictures, where the network does not say.
        part: a method or a module of it, in place of the one that suits it.
        refused: why the whole of it cannot be exported, where it cannot; another part of it may be.

    Raises:
        ZooError: no such part, or one whose inputs nothing tells.
    """
    network = network.eval().requires_grad_(False)
    named, refused = part or getattr(network, "export_part", None), refused or getattr(network, "not_exported", "")
    if named is not None and not callable(getattr(network, named, None)):
        offered = [name for name, _ in network.named_children()]
        raise ZooError(f"{type(network).__name__} has no part {named!r}; it has {', '.join(offered)}, and its methods")
    if refused and named is None:
        raise ZooError(f"{type(network).__name__} cannot be exported: {refused}")
    side = size or getattr(network, "img_size", None) or 224
    chans = getattr(network, "in_chans", None) or channels

    def pictures(count: int) -> Tensor:
        return _noise(count, chans, side, side)

    note = f"the whole of it cannot be exported: it {refused}" if refused else ""
    if callable(getattr(network, "sample", None)) and named in (None, "sample", "forward"):
        return _generator(network, named)
    target = _Part(network, named) if named not in (None, "forward") else network
    wanted = _required(getattr(network, named or "forward"))
    given = getattr(network, "example_inputs", None)
    if callable(given):
        known = given(1)
        if all(name in known for name in wanted):
            takes = set(inspect.signature(_callee(network, named)).parameters)
            return Subject(
                target, lambda n: {k: v for k, v in given(n).items() if k in takes}, named or "forward", note
            )
    if len(wanted) == 1:
        return Subject(target, lambda n: {wanted[0]: pictures(n)}, named or "forward", note)
    raise ZooError(
        f"{type(network).__name__}.{named or 'forward'} cannot be exported: nothing tells what its inputs"
        f"{' ' * bool(wanted)}{', '.join(wanted)} look like (example_inputs of the network would)"
    )


def _callee(network: nn.Module, named: str | None) -> Any:
    found = getattr(network, named or "forward")
    return found.forward if isinstance(found, nn.Module) else found


def _required(callee: Any) -> list[str]:
    callee = callee.forward if isinstance(callee, nn.Module) else callee
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in inspect.signature(callee).parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in kinds
    ]


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class _Enough(Exception):
    pass


def _generator(network: Any, named: str | None) -> Subject:
    """The sampler where it evaluates the network once, else one evaluation, as the sampler calls it."""

    def start(count: int) -> dict[str, Any]:
        found: dict[str, Any] = {"noise": _noise(count, *network.noise_shape)}
        if network.num_classes:
            found["label"] = torch.arange(count) % network.num_classes
        return found

    def calls(count: int, most: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        seen: list[Any] = []

        def note(module: Any, inputs: Any, options: Any) -> None:
            seen.append((inputs, options))
            if len(seen) == most:
                raise _Enough

        inputs = start(count)
        hook = network.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with torch.no_grad(), contextlib.suppress(_Enough):
                network.sample(inputs["noise"], inputs.get("label"))
        finally:
            hook.remove()
        return seen

    several = len(calls(1, 2)) == 2
    if named == "sample" or (named is None and not several):
        return Subject(_Part(network, "sample"), start, "sample")

    def one(count: int) -> dict[str, Any]:
        inputs, options = calls(count, 1)[0]
        names = list(inspect.signature(network.forward).parameters)
        given = {**dict(zip(names, inputs, strict=False)), **options}
        return {name: _whole(value) for name, value in given.items() if value is not None}

    return Subject(network, one, "forward")


def _whole(value: Any) -> Any:
    """Tensors with memory of their own: an expanded one is traced as what it was expanded from."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(memory_format=torch.contiguous_format), value)


# ------------------------------------------------------------------------------------------------------------ writing


@dataclass
class Written:
    """What was written and how it compares: `inputs` and `outputs` by name with their axes, `difference` the largest
    one from the network's outputs, `eager_ms` and `file_ms` the medians of one sample (or of the fixed batch)."""

    path: Path
    part: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    difference: float
    eager_ms: float
    file_ms: float
    bytes: int
    runtime: str
    batch: int | None
    constant: bool
    threads: int
    note: str


def write(
    subject: Subject,
    path: str | os.PathLike[str],
    facts: Mapping[str, Any],
    batch: int | None = None,
) -> Written:
    """Exports, loads again, compares, and only then gives the file its name; `facts` (plain values) go inside it and
    as ``<path>.json`` beside it, with the names and axes of inputs and outputs.

    Args:
        batch: a fixed number of samples; None: any.

    Raises:
        ZooError: a name of another ending; a network that torch.export or the ONNX exporter cannot take, with their
            reason; outputs that differ by more than 1e-4 of their size. MissingPackage: the extra ``export``.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ZooError(f"an export is written as {' or '.join(FORMATS)}, not {str(path)!r}")
    if batch is not None and batch < 1:
        raise ZooError(f"a batch is 1 or more, not {batch}")
    if path.suffix == ".onnx":
        _want_onnx()
    traced = subject.make(batch or 2)
    with _quiet():
        program = trace(subject, traced, batch is None)
        with torch.no_grad():
            example = subject.module(**traced)
        inputs, outputs = _axes("", traced, batch), _axes("output", example, batch)
        text = json.dumps({**facts, "part": subject.part, "inputs": inputs, "outputs": outputs}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:60]}.", dir=path.parent))
        try:
            part = folder / path.name
            if path.suffix == ".pt2":
                torch.export.save(program, part, extra_files={"zoo.json": text})
                run, runtime = _of_torch(part), "torch.export"
            else:
                _save_onnx(program, part, list(inputs), list(outputs), text)
                run, runtime = _of_onnxruntime(part), "onnxruntime"
            worst, constant = 0.0, True
            for count in (1, 3) if batch is None else (batch,):
                given = subject.make(count)
                with torch.no_grad():
                    wanted = _tensors(subject.module(**given))
                worst = max(worst, _differ(wanted, run(given), path))
                constant &= all(float(x.float().std(correction=0)) == 0 for x in wanted)
            once = subject.make(batch or 1)
            with torch.no_grad():
                eager = _median_ms(lambda: subject.module(**once))
            ours = _median_ms(lambda: run(once))
            size = sum(file.stat().st_size for file in folder.iterdir())
            for file in sorted(folder.iterdir(), key=lambda file: file == part):
                files.rename(file, path.with_name(file.name))
            files.write_text(f"{path}.json", text + "\n")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return Written(
        path,
        subject.part,
        inputs,
        outputs,
        worst,
        eager,
        ours,
        size,
        runtime,
        batch,
        constant,
        torch.get_num_threads(),
        subject.note,
    )


def trace(subject: Subject, inputs: dict[str, Any], dynamic: bool) -> Any:
    """torch.export's program of a subject called with `inputs`, which are two samples where any number is wanted."""
    shapes = torch.export.ShapesCollection()
    for value in _tensors(inputs) if dynamic else []:
        if (axes := _of_batch(value, 2)) is not None:
            shapes[value] = axes
    try:
        with torch.no_grad():
            return torch.export.export(subject.module, (), inputs, dynamic_shapes=shapes if dynamic else None)
    except Exception as error:
        raise ZooError(f"torch.export cannot take {_called(subject)}: {_reason(error)}") from error


_BATCH = torch.export.Dim.DYNAMIC


def _of_batch(value: Tensor, count: int) -> dict[int, Any] | None:
    """The first axis is the batch's, where it counts its samples, once or (guided) twice."""
    return {0: _BATCH} if value.ndim and value.shape[0] in (count, 2 * count) else None


def _called(subject: Subject) -> str:
    network = subject.module.network if isinstance(subject.module, _Part) else subject.module
    return f"{type(network).__name__}.{subject.part}"


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines[:2]) if lines else type(error).__name__)[:300]


def _axes(name: str, tree: Any, batch: int | None) -> dict[str, str]:
    """The tensors of a tree by name, with type and axes: "float32 (batch, 3, 224, 224)"."""
    found = {}
    for path, value in pytree.tree_flatten_with_path(tree)[0]:
        if not isinstance(value, Tensor):
            continue
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        if name and not (keys and not keys[0].isdecimal()):
            keys = [name, *keys]
        sides = [str(side) for side in value.shape]
        if batch is None and sides and value.shape[0] in (2, 4):
            sides[0] = "batch" if value.shape[0] == 2 else "2 batch"
        found["_".join(keys)] = f"{str(value.dtype).removeprefix('torch.')} ({', '.join(sides)})"
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(tree) if isinstance(value, Tensor)]


def _differ(wanted: Sequence[Tensor], found: Sequence[Tensor], path: Path) -> float:
    if [x.shape for x in wanted] != [x.shape for x in found]:
        raise ZooError(f"{path}: not written: the file gives other shapes than the network")
    worst = 0.0
    for mine, theirs in zip(wanted, found, strict=True):
        mine, theirs = mine.double(), theirs.double()
        if not bool(torch.isfinite(mine).all()):
            raise ZooError(f"{path}: not written: the network gives numbers that are not finite")
        size = max(1.0, float(mine.abs().max())) if mine.numel() else 1.0
        off = float((mine - theirs).abs().max()) / size if mine.numel() else 0.0
        if not off <= TOLERANCE:
            raise ZooError(f"{path}: not written: its outputs differ from the network's by {off:.2g} of their size")
        worst = max(worst, off)
    return worst


def _median_ms(call: Callable[[], Any], repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
        if sum(times) > 10:
            break
    return 1000 * statistics.median(times)


def _of_torch(path: Path) -> Callable[[dict[str, Any]], list[Tensor]]:
    module = torch.export.load(path).module()

    def run(inputs: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            return _tensors(module(**inputs))

    return run


# --------------------------------------------------------------------------------------------------------------- onnx


def _want_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(f"an .onnx wants the package {name}: pip install 'paperzoo[export]'")


def _save_onnx(program: Any, path: Path, inputs: list[str], outputs: list[str], facts: str) -> None:
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    try:
        made = torch.onnx.export(program, (), input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    except Exception as error:
        raise ZooError(f"the ONNX exporter cannot take it: {_reason(error.__cause__ or error)}") from error
    assert made is not None
    made.model.metadata_props["zoo"] = facts
    made.save(str(path), external_data=size > _LARGE)


def _of_onnxruntime(path: Path) -> Callable[[dict[str, Any]], list[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise ZooError(f"onnxruntime cannot load what was written: {_reason(error)}") from error
    names = [one.name for one in session.get_inputs()]

    def run(inputs: dict[str, Any]) -> list[Tensor]:
        flat = dict(zip(_axes("", inputs, None), _tensors(inputs), strict=True))
        return [torch.as_tensor(x) for x in session.run(None, {name: flat[name].numpy() for name in names})]

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
