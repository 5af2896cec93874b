"""Models by name, with the published weights: fetched, checked, converted strictly, cached as safetensors.

    net = zoo.create_model("mae_vit_base_patch16.in1k_1600ep", pretrained=True)
    transform = zoo.create_preprocess("mae_vit_base_patch16.in1k_1600ep")

Files are untrusted: only tensors and plain values are unpickled, and a file that does not match the model key for key
is refused with a report. What is kept, in ``weights/<paper>/<weights>/`` of the cache folder: the published file with
the record of its checksum, and ``converted.safetensors`` with the record of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import hashlib
import importlib
import inspect
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo import __version__, catalog
from zoo.catalog import PaperCard, Preprocess, Weight
from zoo.errors import ZooError, unknown
from zoo.files import module_from
from zoo.formats import pytorch
from zoo.paths import cache_dir
from zoo.weights import download
from zoo.weights.files import read_checkpoint, read_safetensors, read_state_dict
from zoo.weights.runs import is_run, open_run

if TYPE_CHECKING:
    from torchvision.transforms import v2

ADAPTABLE = ("img_size", "num_classes", "in_chans")  # overrides that weights of another value are adapted to


def create_model(
    name: str,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    use_ema: bool | str | None = None,
    **overrides: Any,
) -> nn.Module:
    """A model of the catalog, or of a run.

    Args:
        name: a model (``vit_base_patch16``), or a model with the tag of published weights
            (``vit_base_patch16.mae_in1k_1600ep_ft_in1k``); or a run of yours with its weights: its folder, a
            checkpoint, ``runs:last``, ``runs:mae/pocket:best`` (:mod:`zoo.weights.runs`).
        pretrained: load the published weights; without a tag, the model must have exactly one set of them.
        weights: load these instead: the name of published weights, a path, an http(s) address or a hub id
            (``hf://org/repo/file``), in the official layout or in ours.
        use_ema: of a file given by `weights` that holds raw weights and their average, take the average; False: the
            raw ones. None: what the paper's card says of its files, else the average where there is one. Of several
            averages, the name of one.
        overrides: further arguments of the model. With weights, ``num_classes`` and ``in_chans`` start anew just the
            parameters whose shape they change (a warning names them), and ``img_size`` resizes position tables.

    Raises:
        ZooError: unknown names or options; weights that cannot be had, are not what was published, or do not match.
    """
    if is_run(name):
        if weights is not None or overrides:
            given = "other weights" if weights is not None else f"an option {next(iter(overrides))!r}"
            raise ZooError(f"{name} is a run, whose network is taken as it was trained: it takes not {given}")
        return open_run(name, use_ema).network
    if weights is not None and os.fspath(weights) in catalog.list_weights():
        if catalog.weight(os.fspath(weights))[1].model != catalog.model(name)[1].name:
            raise ZooError(f"weights {os.fspath(weights)!r} are of another model than {name!r}")
        name, weights, pretrained = os.fspath(weights), None, True
    card, model = catalog.model(name)
    entry = catalog.weight(name)[1] if "." in name else None
    if pretrained and weights is None and entry is None:
        entry = _only_weights(card, model.name)
    architecture = Architecture(card, model.name, dict(entry.overrides) if entry else {})
    net = architecture.build(**overrides)
    if weights is not None:
        known = [entry for entry in card.weights if entry.model == model.name]
        converter = known[0].converter if known else "convert_official"
        if use_ema is None and known and not isinstance(known[0].use_ema, str):
            use_ema = known[0].use_ema
        state = _convert(card, read_state_dict(_file_of(weights), use_ema), os.fspath(weights), converter)
        fresh, spare = [key for e in known for key in e.fresh], [key for e in known for key in e.spare]
        _load(net, state, architecture, overrides, os.fspath(weights), fresh, spare)
    elif pretrained and entry is not None:
        if use_ema is not None:
            raise ZooError(f"use_ema chooses within a file given by `weights`; {entry.name} is one set")
        path = fetch_weights(entry.name)
        try:
            _load(net, read_safetensors(path), architecture, overrides, entry.name, entry.fresh, entry.spare)
        except ZooError:
            if not entry.sha256 and not (overrides.keys() - set(ADAPTABLE)):
                forget_weights(entry.name)  # the address gave something else than what the card says
            raise
    return net


def create_preprocess(name: str, size: int | None = None) -> Callable[[Any], Any]:
    """The transform that weights expect: a picture to float (..., 3, size, size). It takes the path of a file, its
    bytes, a PIL image, or a uint8 tensor (..., 3, H, W); pictures are turned upright as their EXIF orientation says.

    A detector's keeps the picture's proportions: (3, H, W) to (3, h, w). `size` replaces the published size, for a
    model created with another ``img_size``. For a model named without tag, all its weights must agree. For a run it is
    that of its evaluation (:meth:`zoo.weights.runs.RunModel.preprocess`).
    """
    if is_run(name):
        return open_run(name).preprocess(size)
    if "." in name:
        facts = catalog.weight(name)[1].preprocess
    else:
        card, model = catalog.model(name)
        published = [entry for entry in card.weights if entry.model == model.name]
        if not published:
            raise ZooError(f"{name!r} has no published weights, and so no preprocessing of their own")
        facts = published[0].preprocess
        if any(entry.preprocess != facts for entry in published):
            raise ZooError(f"the weights of {name!r} differ in preprocessing; name one of {_names(published)}")
    return _transform(facts, size or facts.size)


def _transform(facts: Preprocess, size: int) -> v2.Compose:
    from torchvision.transforms import v2

    if facts.canvas:
        from zoo.data.arc import Canvas

        return v2.Compose([Canvas(size)])
    if facts.longest is not None:
        sized: list[Any] = [_ShortestEdge(size, facts.longest)]
    elif facts.kernel != "pillow" or facts.crop_mode != "center":
        from zoo.data.transforms import EvalResizeCrop

        sized = [EvalResizeCrop(size, facts.crop_pct, facts.interpolation, facts.crop_mode, facts.kernel)]
    else:
        short_side = int(size / facts.crop_pct + 1e-6)
        sized = [v2.Resize(short_side, v2.InterpolationMode(facts.interpolation), antialias=True), v2.CenterCrop(size)]
    steps: list[Any] = [Picture(), *sized, v2.ToDtype(torch.float32, scale=True)]
    if facts.channels == "bgr":
        steps.append(_FlipChannels())
    return v2.Compose([*steps, v2.Normalize(facts.mean, facts.std), v2.ToPureTensor()])


class Picture(nn.Module):
    """What users have at hand as an image tensor, RGB."""

    def forward(self, picture: Any) -> Tensor:
        from PIL import Image, ImageOps
        from torchvision.transforms.v2 import functional

        from zoo.data.sources import decode_image, read_image

        if isinstance(picture, Image.Image):
            picture = ImageOps.exif_transpose(picture)
            picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        elif isinstance(picture, str | os.PathLike):
            picture = read_image(picture, upright=True)
        elif isinstance(picture, bytes):
            picture = decode_image(picture, upright=True)
        elif not isinstance(picture, Tensor) or picture.ndim < 3 or picture.shape[-3] != 3:
            kind = f"a tensor {tuple(picture.shape)}" if isinstance(picture, Tensor) else f"a {type(picture).__name__}"
            raise ZooError(f"preprocessing takes a path, a PIL image or a uint8 tensor (..., 3, H, W), not {kind}")
        return functional.to_image(picture)


class _ShortestEdge(nn.Module):
    """Resizes a (3, H, W) uint8 picture as the detection data do."""

    def __init__(self, short: int, longest: int) -> None:
        super().__init__()
        self.short, self.longest = short, longest

    def forward(self, image: Tensor) -> Tensor:
        from zoo.data.scenes import resize_pil, shortest_edge_size

        height, width = image.shape[-2:]
        return resize_pil(image.as_subclass(Tensor), *shortest_edge_size(height, width, self.short, self.longest))


class _FlipChannels(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.flip(-3)


# ---- published weights ----------------------------------------------------------------------------------------------


def fetch_weights(name: str) -> Path:
    """The converted copy (safetensors) of published weights; fetched and converted at first use, checked at each."""
    card, entry = catalog.weight(name)
    _tell_licence(name, entry.licence, card.title)
    folder = _folder(card, entry)
    converted = folder / "converted.safetensors"
    if _is_right(converted, card, entry):  # before the lock: a cache may be shared read-only
        return converted
    if not download.writable(folder) and (held := download.held(folder / _file_name(entry), _published(entry))):
        copy = _scratch() / name / converted.name  # the cache cannot take it, and is served as it is
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            state = _convert(card, read_state_dict(held.path, entry.use_ema), name, entry.converter)
            write_safetensors(state, copy)
        return copy
    with download.lock(converted):
        if _is_right(converted, card, entry):  # another process was first
            return converted
        if converted.exists():
            download.say(f"{converted} is older than the code, or was changed since it was stored; converting anew")
        original = download.fetch(entry.urls, folder / _file_name(entry), _published(entry))
        try:
            state = _convert(card, read_state_dict(original.path, entry.use_ema), name, entry.converter)
        except ZooError:
            if not entry.sha256:  # what was recorded at first use is no checkpoint: do not hold on to it
                download.forget(folder / _file_name(entry))
            raise
        write_safetensors(state, converted)
        with download.replacing(folder / "converted.json") as file:
            facts = {"source_sha256": original.sha256, "converter": _converter(card), "sha256": _sha256(converted)}
            file.write_text(json.dumps(facts, indent=1))
    return converted


@cache
def _scratch() -> Path:
    """A folder that goes with this process."""
    folder = tempfile.mkdtemp(prefix="zoo-weights-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _is_right(converted: Path, card: PaperCard, entry: Weight) -> bool:
    """Whether the converted copy is there, unchanged, from the published file, and by the present code."""
    record = download.read_json(converted.with_suffix(".json"))
    return (
        converted.is_file()
        and record.get("converter") == _converter(card)
        and _is_published(record, entry)
        and _sha256(converted) == record.get("sha256")
    )


def verify_weights(name: str) -> str:
    """Checks the cached files of published weights against their checksums, and the weights against the model.

    Returns a sentence that says what was checked; raises ZooError if the files are not there or not right.
    """
    card, entry = catalog.weight(name)
    folder = _folder(card, entry)
    original, converted = folder / _file_name(entry), folder / "converted.safetensors"
    record = download.read_json(folder / "converted.json")
    if not converted.is_file():
        raise ZooError(f"{name}: not in the cache ({folder}); `zoo weights get {name}` fetches it")
    if original.is_file():
        sha256, problem = download.check(original, _published(entry))
        if problem or sha256 != record.get("source_sha256"):
            raise ZooError(f"{original}: {problem or 'not the file that was recorded at first use'}")
    elif not _is_published(record, entry):
        raise ZooError(f"{name}: the cached copy does not come from the published file; `zoo weights get` mends it")
    if _sha256(converted) != record.get("sha256"):
        raise ZooError(f"{converted}: changed since it was stored; `zoo weights get {name}` mends it")
    state = read_safetensors(converted)
    architecture = Architecture(card, entry.model, dict(entry.overrides))
    if report := mismatch(state, shapes(architecture.on_meta())):
        raise ZooError(f"{name} does not match {entry.model}: {report}")
    against = "published" if entry.sha256 else "recorded at first use"
    return f"sha256 {record['source_sha256']} as {against}; {len(state)} tensors match {entry.model} key for key"


def convert_weights(
    name: str, out: str | os.PathLike[str], to: str | None = None, use_ema: bool | str | None = None
) -> Path:
    """Writes published weights, or those of a checkpoint of a task of ours, for use elsewhere; returns the path.

    Args:
        name: published weights, or a run or checkpoint of ours, whose task tells the paper.
        out: the file, ``.safetensors``. With `to` also ``.pth``, or ``.pkl`` with NumPy arrays, as in detectron2's
            model zoo; these two can hold more than tensors by name.
        to: a format among the EXPORTS of the paper's module; None: our own layout.
        use_ema: of a checkpoint of ours, take the averaged weights; False: the raw ones; None: the average if it holds
            one. Of several averages, the name of one.

    Raises:
        ZooError: unknown weights or format, or a file that cannot hold it.
    """
    path = Path(out).expanduser()
    if path.suffix not in (".safetensors", ".pth", ".pkl")[: None if to else 1]:
        kinds = ".safetensors, .pth or .pkl" if to else ".safetensors"
        raise ZooError(f"{os.fspath(out)!r}: converted weights are written as {kinds}")
    if is_run(name):
        model = open_run(name, use_ema)
        prefix = "network."
        whole = model.state()
        state = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)} or whole
        module = importlib.import_module(model.task_class.__module__)
    elif Path(name).is_file():
        module, state = _module_of_checkpoint(Path(name)), read_state_dict(name, use_ema)
    else:
        if use_ema is not None:
            raise ZooError(f"use_ema chooses within a checkpoint file; {name!r} is none")
        module, state = paper_module(catalog.weight(name)[0]), read_safetensors(fetch_weights(name))
    content: dict[str, Any] = state
    if to is not None:
        exports = getattr(module, "EXPORTS", {})
        if to not in exports:
            raise unknown("export format", to, exports)
        content = exports[to](state)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_content(content, path)
    return path


def _module_of_checkpoint(path: Path) -> ModuleType:
    """The module that defines the task which a checkpoint of ours was saved from."""
    content: Any = {}
    if pytorch.is_checkpoint(path):
        try:
            content = pytorch.read(path, mmap=True)
        except ZooError as error:
            raise ZooError(f"{path}: {error}") from error
    kind = str(content.get("zoo_task", "")) if isinstance(content, Mapping) else ""
    if not kind.startswith("zoo."):
        raise ZooError(f"{path}: not a checkpoint of a task of the zoo; name published weights instead")
    return importlib.import_module(kind.rpartition(".")[0])


def _write_content(content: Mapping[str, Any], path: Path) -> None:
    if path.suffix == ".safetensors":
        if not all(isinstance(value, Tensor) for value in content.values()):
            raise ZooError(f"{path}: this format holds more than tensors by name; write .pkl or .pth")
        write_safetensors(content, path)
        return
    with download.replacing(path) as file:
        if path.suffix == ".pth":
            torch.save(dict(content), file)
        else:
            file.write_bytes(pickle.dumps(_as_numpy(content)))


def _as_numpy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_numpy(entry) for key, entry in value.items()}
    return value.numpy() if isinstance(value, Tensor) else value


def forget_weights(name: str) -> None:
    """Removes the cached files of published weights."""
    card, entry = catalog.weight(name)
    folder = _folder(card, entry)
    download.forget(folder / _file_name(entry))
    for path in (folder / "converted.safetensors", folder / "converted.json"):
        path.unlink(missing_ok=True)


def _folder(card: PaperCard, entry: Weight) -> Path:
    return cache_dir() / "weights" / card.slug / entry.name


def _file_name(entry: Weight) -> str:
    return _base_name(entry.urls[0])


def _base_name(source: str) -> str:
    return re.sub(r"[^\w.-]", "_", source.split("?")[0].split("#")[0].rstrip("/").rpartition("/")[2]) or "weights"


def _published(entry: Weight) -> download.Published:
    return download.Published(entry.sha256, entry.md5_prefix, entry.size)


def _is_published(record: Mapping[str, str], entry: Weight) -> bool:
    """Whether a converted copy was made from the very file that the card names."""
    return entry.sha256 is None or record.get("source_sha256") == entry.sha256


def _converter(card: PaperCard) -> str:
    """Changes with the code that converts, so that copies made by older code are not used."""
    source = card.source.read_bytes()
    return f"{__version__}-{hashlib.sha256(source).hexdigest()[:16]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _tell_licence(name: str, licence: str, title: str) -> None:
    download.say(f"weights {name}: licence {licence} ({title})")


def _only_weights(card: PaperCard, model: str) -> Weight:
    published = [entry for entry in card.weights if entry.model == model]
    if not published:
        raise ZooError(f"{model!r} has no published weights")
    if len(published) > 1:
        raise ZooError(f"{model!r} has several published weights; name one of {_names(published)}")
    return published[0]


def _names(entries: list[Weight]) -> str:
    return ", ".join(entry.name for entry in entries)


# ---- models ---------------------------------------------------------------------------------------------------------


def paper_module(card: PaperCard) -> ModuleType:
    """The paper's Python module, beside its card."""
    if not card.is_own:
        return importlib.import_module(card.import_name)
    name, path = f"zoo_papers_{card.source.stem}", card.source
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    if not path.is_file():
        raise ZooError(f"{card.path}: the paper's code {path.name} must lie beside its card")
    return module_from(path, name)


@dataclass(frozen=True)
class Architecture:
    """A model's function with the arguments that belong to a set of weights."""

    card: PaperCard
    model: str
    arguments: dict[str, Any]

    def build(self, **overrides: Any) -> nn.Module:
        """The network, with fresh parameters."""
        function = getattr(paper_module(self.card), self.model)
        try:
            net: nn.Module = function(**{**self.arguments, **overrides})
        except TypeError as error:
            found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if found is None or found[1] not in overrides:
                raise
            raise unknown(f"option of {self.model}", found[1], _options(function)) from error
        return net

    def on_meta(self, **overrides: Any) -> nn.Module:
        """The network without memory: names and shapes only."""
        with torch.device("meta"):
            return self.build(**overrides)


def _options(function: Any) -> list[str]:
    """The keyword arguments of a model's function, or of the class that it says it returns."""
    known = set(inspect.signature(function).parameters)
    kind = getattr(sys.modules[function.__module__], str(inspect.signature(function).return_annotation), None)
    if inspect.isclass(kind):
        known |= set(inspect.signature(kind).parameters)
    return sorted(known - {"overrides", "kwargs", "self"})


def shapes(net: nn.Module) -> dict[str, torch.Size]:
    """The shape of each entry of the state dict."""
    return {key: value.shape for key, value in net.state_dict().items()}


# ---- files ----------------------------------------------------------------------------------------------------------


def read_source(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors that a task is to be initialised from, before conversion: a checkpoint of ours (.ckpt), a published
    file, or the converted copy of published weights given by name.

    Raises:
        ZooError: no such file or name, or nothing that can be read.
    """
    path = Path(source)
    if not path.exists():
        if path.suffix in (".ckpt", ".pth", ".pt", ".pkl", ".safetensors") or len(path.parts) > 1:
            raise ZooError(f"init_from: no file {os.fspath(source)!r}")
        path = fetch_weights(os.fspath(source))
    return read_state_dict(path)


def fill(
    net: nn.Module, state: Mapping[str, Tensor], source: str | os.PathLike[str], wanted: Callable[[str], bool]
) -> None:
    """Loads `state` into the entries of `net` whose names are `wanted`: into all of these, and with nothing left over.

    Raises:
        ZooError: a key or shape differs; the first differences are named, and the sizes that a checkpoint of ours
            was trained with.
    """
    from lightning.pytorch.utilities import rank_zero_info

    own = {key: value.shape for key, value in net.state_dict().items() if wanted(key)}
    if report := mismatch(state, own):
        raise ZooError(f"init_from: {os.fspath(source)} does not fit the model: {report}{_trained_with(source)}")
    net.load_state_dict(state, strict=False)
    rank_zero_info(f"encoder from {os.fspath(source)}: {len(state)} tensors")


# Options of encoders by which a checkpoint and a model may differ in shape.
_SIZES = ("arch", "layers", "width", "small_images", "img_size", "patch_size", "embed_dim", "depth", "num_heads")


def _trained_with(source: str | os.PathLike[str]) -> str:
    if Path(source).suffix != ".ckpt":
        return ""
    options = read_checkpoint(source).get("hyper_parameters", {})
    told = [f"model.{name} {options[name]}" for name in _SIZES if options.get(name) is not None]
    return f"; it was trained with {', '.join(told)}" if told else ""


def load_published(
    task: nn.Module, source: str | os.PathLike[str], card: PaperCard, data: Any = None, average: str | None = None
) -> dict[str, str | None]:
    """Loads published weights into the network of a task that is to be evaluated: every entry, with nothing fresh.

    Args:
        task: whose `network` is filled; its `init_from` is then left alone.
        source: the name of published weights, or a file, address or hub id in the official layout or in ours.
        card: the paper whose converters read a file.
        data: the data module; weights are refused where it states another image size, mean or deviation than theirs.
        average: of a file that holds several averages, the name of one.

    Returns:
        {name, sha256 of the file, licence}.

    Raises:
        ZooError: weights that cannot be had, do not match key for key, or are made for other pictures.
    """
    network = getattr(task, "network", task)
    name = os.fspath(source)
    wanted = shapes(network)
    if name in catalog.list_weights():
        card, entry = catalog.weight(name)
        _check_pictures(entry, data)
        path = fetch_weights(name)
        state, candidates = read_safetensors(path), [entry]
        sha256 = download.read_json(path.with_suffix(".json")).get("source_sha256")
    else:
        path = _file_of(source)
        raw, sha256 = read_state_dict(path, average), _sha256(path) if path.is_file() else None
        converters = dict.fromkeys(entry.converter for entry in card.weights) or ["convert_official"]
        state, candidates = _first_that_reads(card, raw, name, list(converters)), list(card.weights)
    spare = [key for entry in candidates for key in entry.spare]
    state = {key: value for key, value in state.items() if key in wanted or not _in(key, spare)}
    if report := mismatch(state, wanted):
        raise ZooError(f"{name} does not match the recipe's {type(network).__name__}: {report}")
    network.load_state_dict(state, strict=True)
    if getattr(task, "init_from", None) is not None:
        task.init_from = None  # type: ignore[assignment]
    return {"name": name, "sha256": sha256, "licence": candidates[0].licence if len(candidates) == 1 else None}


def _first_that_reads(
    card: PaperCard, raw: dict[str, Tensor], name: str, converters: Sequence[str]
) -> dict[str, Tensor]:
    for converter in converters[:-1]:
        with contextlib.suppress(ZooError):
            return _convert(card, raw, name, converter)
    return _convert(card, raw, name, converters[-1])


def _check_pictures(entry: Weight, data: Any) -> None:
    from zoo.data import LatentDataModule

    facts = entry.preprocess
    if facts.canvas or facts.longest is not None:  # neither crop nor mean are the data module's
        return
    if isinstance(data, LatentDataModule):  # its side is that of latents
        return
    for key, theirs in (("image_size", facts.size), ("mean", facts.mean), ("std", facts.std)):
        given = getattr(data, key, None)
        if key == "image_size":  # evaluation may take pictures of another size than training
            given = getattr(getattr(data, "eval_transform", None), "size", None) or given
        if given is None:
            continue
        same = np.shape(given) == np.shape(theirs) and np.allclose(np.asarray(given, float), theirs, atol=1e-3)
        if not same:
            raise ZooError(f"{entry.name} expects pictures of {key} {theirs}; the recipe's data give {given}")


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for key, value in state.items():
        storage = value.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != value.numel() * value.element_size()
        seen.add(storage.data_ptr())
        own[key] = value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
    with download.replacing(path) as file:
        save_file(own, file)


def _file_of(weights: str | os.PathLike[str]) -> Path:
    """The local file of weights given by path, address or hub id."""
    source = os.fspath(weights)
    if not re.match(r"(https?|hf|file)://", source):
        path = Path(source).expanduser()
        if not path.exists():  # what else lies there is told when it is read
            if path.suffix or os.sep in source:
                raise ZooError(f"no weights file {source!r}")
            raise unknown("weights", source, catalog.list_weights())
        return path
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return download.fetch([source], cache_dir() / "weights" / "others" / digest / _base_name(source)).path


def _convert(card: PaperCard, state: dict[str, Tensor], name: str, converter: str) -> dict[str, Tensor]:
    try:
        converted: dict[str, Tensor] = getattr(paper_module(card), converter)(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ZooError(f"{name}: not a layout of {card.slug}'s checkpoints ({_one_line(error)})") from error
    return converted


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- loading --------------------------------------------------------------------------------------------------------


def _load(
    net: nn.Module,
    state: dict[str, Tensor],
    architecture: Architecture,
    overrides: Mapping[str, Any],
    name: str,
    fresh: Sequence[str],
    spare: Sequence[str],
) -> None:
    """Loads `state` into `net`, adapted to the overrides that may change shapes."""
    wanted = shapes(net)
    if shapes_of(state) != wanted:
        head = _governed("num_classes", architecture, overrides, wanted)
        free = head | _governed("in_chans", architecture, overrides, wanted)
        if "img_size" in overrides:
            free |= {key for key in wanted if key.endswith("pos_embed")}
        report = mismatch(state, wanted, [*fresh, *head], [*spare, *head], free)
        if report:
            others = _fitting(state, architecture, overrides)
            hint = f"; these are weights of {' or '.join(map(repr, others))}" if others else ""
            raise ZooError(f"{name} does not match {architecture.model}: {report}{hint}")
        state = adapt(state, net, name)
    if spoilt := [key for key, _ in net.named_parameters() if not state[key].isfinite().all()]:
        raise ZooError(f"{name}: not usable: {_few(spoilt)} {'is' if len(spoilt) == 1 else 'are'} not finite")
    net.load_state_dict(state, strict=True)


def _governed(
    option: str, architecture: Architecture, overrides: Mapping[str, Any], wanted: Mapping[str, torch.Size]
) -> set[str]:
    """The entries of a state dict whose presence or shape depends on `option`, if that is among the overrides."""
    if option not in overrides:
        return set()
    other = shapes(architecture.on_meta(**{**overrides, option: overrides[option] + 1}))
    return {key for key in {*wanted, *other} if wanted.get(key) != other.get(key)}


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def adapt(state: Mapping[str, Tensor], net: nn.Module, name: str) -> dict[str, Tensor]:
    """`state` with the names and shapes of `net`: position tables resized, what does not fit taken fresh from `net`.

    A warning names what starts anew and what of `state` is not used.
    """
    adapted: dict[str, Tensor] = {}
    anew, resized = [], []
    for key, own in net.state_dict().items():
        given = state.get(key)
        if given is not None and given.shape == own.shape:
            adapted[key] = given
        elif given is not None and _is_position_table(key, given, own):
            adapted[key] = _resized(key, given, own, net)
            resized.append(f"{key} {tuple(given.shape)} to {tuple(own.shape)}")
        else:
            adapted[key] = own
            anew.append(f"{key} {tuple(own.shape)}")
    unused = sorted(state.keys() - adapted.keys())
    notes = [f"start anew: {', '.join(anew)}"] if anew else []
    notes += [f"resized: {', '.join(resized)}"] if resized else []
    notes += [f"not used: {', '.join(unused)}"] if unused else []
    if notes:
        warnings.warn(f"{name}: {'; '.join(notes)}", stacklevel=4)
    return adapted


def _is_position_table(key: str, given: Tensor, own: Tensor) -> bool:
    return key.endswith("pos_embed") and given.ndim == own.ndim == 3 and given.shape[-1] == own.shape[-1]


def _resized(key: str, given: Tensor, own: Tensor, net: nn.Module) -> Tensor:
    from zoo.ops.pos_embed import resize_pos_embed

    owner = key.rpartition(".")[0]
    grid: Any = net.get_submodule(f"{owner}.patch_embed" if owner else "patch_embed").grid
    return resize_pos_embed(given, grid, num_prefix=own.shape[1] - grid[0] * grid[1])


def mismatch(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, torch.Size],
    fresh: Sequence[str] = (),
    spare: Sequence[str] = (),
    free: Container[str] = (),
) -> str:
    """What keeps `state` from matching the names and shapes `wanted`, in a line; empty if nothing does.

    Patterns `fresh` may be missing, `spare` may be left over, and the entries `free` may be of another shape.
    """
    missing = [key for key in wanted if key not in state and not _in(key, fresh)]
    left = [key for key in state if key not in wanted and not _in(key, spare)]
    wrong = [
        f"{key} {tuple(state[key].shape)} for {tuple(shape)}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape and key not in free
    ]
    parts = (("missing", missing), ("unexpected", left), ("other shape", wrong))
    return "; ".join(f"{len(keys)} {kind} ({_few(keys)})" for kind, keys in parts if keys)


def _few(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


def _in(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _fitting(state: Mapping[str, Tensor], architecture: Architecture, overrides: Mapping[str, Any]) -> list[str]:
    """The paper's other models and weights that `state` does match, with those of the overrides that they take."""
    card = architecture.card
    candidates: list[tuple[str, str, dict[str, Any]]] = [(model.name, model.name, {}) for model in card.models]
    candidates += [(entry.name, entry.model, entry.overrides) for entry in card.weights]
    found: dict[str, str] = {}
    for name, model, arguments in candidates:
        if model == architecture.model or model in found:
            continue
        known = _options(getattr(paper_module(card), model))
        taken = {key: value for key, value in overrides.items() if key in known}
        try:
            wanted = shapes(Architecture(card, model, arguments).on_meta(**taken))
        except ZooError:  # the overrides do not suit this model
            continue
        if not mismatch(state, wanted):
            found[model] = name
    return sorted(found.values())
