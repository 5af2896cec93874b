"""A run as a model: its network with its weights, the names of its classes, and how it wants its samples prepared.

    model = open_run("runs/mae/pocket/20261130-120000")     # or a checkpoint, "runs:last", "runs:mae/pocket:best"
    model.network(model.preprocess()("photo.jpg")[None])

A checkpoint says all of that itself (`zoo_task`, `hyper_parameters` and `zoo_model`, plain types); of an older one the
run's `config.yaml` is asked. It is read as files of strangers are: nothing in it is executed, and the task that it
names must be one of the zoo's.

Finding a run imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError, unknown
from zoo.paths import FIELDS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from zoo.training import BaseModule

ORDER = ".order"  # in a run's folder: the how-manieth run of its recipe it is, counting each time one is gone on with
_ROOT = "runs"
_LARGEST = 1 << 14  # pixels of a side that samples are prepared at
_LINKED = {"num_classes", "num_tasks", "img_size"}
_WHICH = {"last": ("last.ckpt", "previous.ckpt"), "best": ("best.ckpt", "best*.ckpt")}


# ------------------------------------------------------------------------------------------------------------- finding


def folder_name(name: str) -> str:
    """Where the runs of a recipe, or of a leaderboard row, lie under ``runs/``."""
    return name.replace(":", "/")


def runs_of(root: Path, name: str) -> list[Path]:
    """The run folders of the recipe `name` under `root` that hold checkpoints, the newest last, whatever a clock said.

    Those without a number come first, in the order of their names.
    """

    def key(run: Path) -> tuple[int, list[tuple[int, str]]]:
        return order(run), [(int(word), "") if word.isdecimal() else (0, word) for word in run.name.split("-")]

    with contextlib.suppress(OSError):
        return sorted((run for run in (root / name).iterdir() if (run / "checkpoints").is_dir()), key=key)
    return []


def order(run: Path) -> int:
    """The number of a run among those of its recipe; -1 where it has none."""
    with contextlib.suppress(OSError, ValueError):
        return int((run / ORDER).read_text(encoding="utf-8")[:18])
    return -1


def is_run(name: str) -> bool:
    """Whether `name` means a run: ``runs:last``, ``runs:RECIPE``, ``runs:RECIPE/RUN``, a run's folder, a checkpoint
    (a file or the folder of a sharded one), with ``:last`` or ``:best`` behind it where wanted, or what ``zoo push``
    wrote (:func:`is_pushed`). A path under ``runs/``, and a ``.ckpt``, need not be there: what opens it says so."""
    base, _ = _split(name)
    if base.startswith(f"{_ROOT}:") or base.endswith(".ckpt") or is_pushed(name):
        return True
    path = Path(base).expanduser()
    with contextlib.suppress(OSError, ValueError):
        if path.is_dir():
            return _is_sharded(path) or (path / "checkpoints").is_dir() or bool(runs_of(path.parent, path.name))
        return path.parts[:1] == (_ROOT,) and not path.is_file()
    return False


def _split(name: str) -> tuple[str, str]:
    """A name without the ``:last`` or ``:best`` behind it, and that."""
    base, colon, which = name.rpartition(":")
    if colon and which in _WHICH:
        return (f"{_ROOT}:" if base == _ROOT else base), which
    return name, "last"


def _is_sharded(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in (".metadata", "latest", "meta.pt"))


def find_checkpoint(name: str) -> Path:
    """The checkpoint that `name` means, as of :func:`is_run`.

    Raises:
        ZooError: there is none.
    """
    base, which = _split(name)
    if base.startswith(f"{_ROOT}:"):
        return _newest(base.removeprefix(f"{_ROOT}:"), which)
    path = Path(base).expanduser()
    if path.is_file() or _is_sharded(path):
        return path
    if path.is_dir():
        found = _in_folder(path, which)
        for run in reversed(runs_of(path.parent, path.name)):  # the folder of a recipe
            found = found or _in_folder(run, which)
        if found:
            return found
        raise ZooError(f"{base}: holds no {_WHICH[which][0]}; it is not the folder of a run, or nothing was saved yet")
    raise ZooError(f"no run or checkpoint {base!r}")


def _in_folder(run: Path, which: str) -> Path | None:
    for pattern in _WHICH[which]:
        for path in sorted((run / "checkpoints").glob(pattern), reverse=True):
            return path
    return None


def _newest(recipe: str, which: str) -> Path:
    """Of the newest run of a recipe, of those below a folder such as ``mae``, or (of "") of all; of a run that is named
    (``mae/pocket/20261130-120000``) that run's."""
    from zoo import catalog

    name = folder_name(recipe)
    if recipe and not (Path(_ROOT) / name).is_dir():
        known = catalog.list_recipes()  # the beginning of a name will do
        name = next((one for one in known if one.startswith(recipe)), name)
    under = Path(_ROOT) / name
    if (under / "checkpoints").is_dir():  # one run, by its folder
        if named := _in_folder(under, which):
            return named
        raise ZooError(f"{under}: holds no {_WHICH[which][0]}; nothing was saved yet")
    places = [place.parent for depth in range(5) for place in under.glob("*/" * depth + "checkpoints")]
    newest = []
    for folder in {run.parent for run in places if run.parts[1:2] != ("claims",)}:
        found = (_in_folder(run, which) for run in reversed(runs_of(folder.parent, folder.name)))
        newest += [path for path in (next(filter(None, found), None),) if path is not None]
    if newest:
        return max(newest, key=lambda path: path.stat().st_mtime)
    of, first = f" of {recipe}" if recipe else "", ""
    if not recipe or any(one.startswith(recipe) for one in [*catalog.list_recipes("*"), *catalog.list_rows()]):
        first = f"; run `zoo fit {recipe or 'RECIPE'}` first"
    raise ZooError(f"no {_WHICH[which][0]}{of} under {under}{first}")


# ------------------------------------------------------------------------------------------------------------- opening


def open_run(name: str, use_ema: bool | str | None = None) -> RunModel:
    """The model that a run left.

    Args:
        name: as of :func:`is_run`.
        use_ema: take the averaged weights (of several averages the one by this name); False: the raw ones; None: what
            the run itself is evaluated with, the average where it has one.

    Raises:
        ZooError: no such run or checkpoint, or one that cannot be read.
    """
    if is_pushed(name):
        from zoo.weights.hub import open_pushed

        if use_ema is not None:
            raise ZooError(f"use_ema chooses within a checkpoint; {name} is one set of weights")
        return open_pushed(name)
    return RunModel(name, find_checkpoint(name), use_ema)


def is_pushed(name: str) -> bool:
    """Whether `name` is what ``zoo push`` wrote: on a hub, ``hf://org/name`` or ``hf://org/name@revision``, or a
    folder."""
    if name.startswith("hf://"):
        return re.fullmatch(r"hf://[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None
    with contextlib.suppress(OSError, ValueError):
        folder = Path(name).expanduser()
        return (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
    return False


class RunModel:
    """A run's checkpoint as a model; the parts are made as they are asked for.

    Attributes:
        name: by which it was opened.
        checkpoint: the file, or the folder of a sharded one.
        folder: the run's, None where the checkpoint does not lie in one.
    """

    def __init__(self, name: str, checkpoint: Path, use_ema: bool | str | None = None) -> None:
        self.name, self.checkpoint, self.use_ema = name, checkpoint, use_ema
        run = checkpoint.absolute().parent.parent
        inside = checkpoint.absolute().parent.name == "checkpoints"
        self.folder = (checkpoint.parent.parent if checkpoint.parent.parent != checkpoint else run) if inside else None

    def __str__(self) -> str:
        return str(self.checkpoint)

    @cached_property
    def _content(self) -> dict[str, Any]:
        from zoo.weights.files import read_checkpoint

        if not _is_sharded(self.checkpoint):
            return read_checkpoint(self.checkpoint)
        return read_sharded(self.checkpoint)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is known of it, in plain types:

        "task" (the path of its class) and its "options"; "classes", the names in order, or None; "preprocess", how a
        sample is prepared (in the words of :class:`zoo.catalog.Preprocess`, with `kind` "image", "objects", "clip" or
        "grid"), or None; "data" {"module", "dataset", "data_dir", "num_classes", "sha256"}; "recipe" {"name", "model",
        "data", "average"}; "versions"; "steps", "epochs", "metrics", and "averages", the names of averaged weights.
        """
        self._check_plain()
        content, known = self._content, dict(self._content.get("zoo_model") or {})
        if not known.get("data") and self.folder is not None:
            known |= _of_config(self.folder / "config.yaml")
        standing = content.get("zoo_run") or {}
        return {
            "task": str(content.get("zoo_task", "")),
            "options": {str(key): value for key, value in (content.get("hyper_parameters") or {}).items()},
            **{key: known.get(key) for key in ("classes", "preprocess", "data", "recipe", "versions")},
            "steps": content.get("global_step"),
            "epochs": (standing.get("epochs", content.get("epoch")) or 0)
            + bool(standing.get("ended") and standing.get("whole")),
            "metrics": dict(standing.get("metrics") or {}),
            "averages": [key.removesuffix("_steps") for key in content if self._is_average(str(key))],
        }

    def _check_plain(self) -> None:
        """Refuses facts of other types than those that the zoo writes."""

        def check(where: str, found: Any, kind: Any) -> Any:
            if not isinstance(found, kind | None):
                raise ZooError(f"{self.checkpoint}: {where} is {str(found)[:80]!r}, which is not what the zoo writes")
            return found or {}

        check("hyper_parameters", self._content.get("hyper_parameters"), Mapping)
        standing = check("zoo_run", self._content.get("zoo_run"), Mapping)
        check("zoo_run.metrics", standing.get("metrics"), Mapping)
        check("zoo_run.epochs", standing.get("epochs"), int)
        known = check("zoo_model", self._content.get("zoo_model"), Mapping)
        for name in check("zoo_model.classes", known.get("classes"), list):
            check("a name of zoo_model.classes", name, str)
        for key in ("preprocess", "data", "recipe", "versions"):
            check(f"zoo_model.{key}", known.get(key), Mapping)
        for key, kind in (("name", str), ("model", Mapping), ("data", Mapping)):
            check(f"zoo_model.recipe.{key}", (known.get("recipe") or {}).get(key), kind)

    def _is_average(self, key: str) -> bool:
        return key.endswith("_steps") and f"{key.removesuffix('_steps')}_state_dict" in self._content

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes in order; None where there are none, or numbers only."""
        names = self.facts["classes"]
        return None if not names or names == [str(k) for k in range(len(names))] else [_one_line(n) for n in names]

    @property
    def task_class(self) -> type[BaseModule]:
        """The class of its task; a ZooError where it is none of the zoo's."""
        return task_class(self.facts["task"], self.checkpoint)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of its task. Lightning notes facts of the data (`num_classes`, `img_size`) whether or not the
        task takes them; those that it does not take are left out."""
        from jsonargparse import ArgumentParser

        options = {key: value for key, value in self.facts["options"].items() if not key.startswith("_")}
        if not _LINKED.isdisjoint(options):
            parser = ArgumentParser(exit_on_error=False)
            parser.add_class_arguments(self.task_class, "task", fail_untyped=False)
            known = vars(parser.get_defaults().task)
            options = {key: value for key, value in options.items() if key in known or key not in _LINKED}
        return options

    @cached_property
    def task(self) -> BaseModule:
        """The task with the weights, key for key, in evaluation mode, on the CPU.

        Raises:
            ZooError: a task from elsewhere, options that it does not take, weights that do not match it.
        """
        from zoo.nn.bounded import bounded_networks

        kind, options = self.task_class, self.options
        if "init_from" in options:
            options["init_from"] = None
        try:
            with bounded_networks():
                task = kind(**options)
        except ZooError as error:
            raise ZooError(f"{self}: {error}") from error
        except Exception as error:  # options that some class cannot live with
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ZooError(f"{self.checkpoint}: {kind.__name__} cannot be made of its options: {reason}") from error
        self.fill(task)
        return task.eval()

    def fill(self, task: BaseModule) -> None:
        """Loads the weights, key for key, into a task as it was made anew."""
        from zoo.weights.pretrained import shapes

        state = self.state()
        self.match(state, shapes(task))
        task.load_state_dict(state, strict=True)

    def match(self, state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> None:
        """Raises a ZooError where names or shapes of `state` are not those `wanted`."""
        from zoo.weights.pretrained import mismatch

        if report := mismatch(state, wanted):
            raise ZooError(f"{self}: does not match {self.task_class.__name__}: {report}")

    @property
    def network(self) -> nn.Module:
        """The task's network."""
        return self.task.get_submodule("network")

    def state(self) -> dict[str, Tensor]:
        """The weights of the task by name, raw or averaged as the run was opened.

        Raises:
            ZooError: an average that the checkpoint does not hold.
        """
        import torch

        raw, averages = self._content["state_dict"], self.facts["averages"]
        wanted = self.use_ema
        if wanted is None:
            wanted = (self.facts["recipe"] or {}).get("average") or bool(averages)
        if wanted in (False, "raw"):
            found = raw
        elif wanted is True or (wanted not in averages and self.use_ema is None):
            if self.use_ema and not averages:
                raise ZooError(f"{self.checkpoint}: use_ema: holds no averaged weights")
            found = self._content[f"{averages[0]}_state_dict"] if averages else raw
        elif wanted in averages:
            found = self._content[f"{wanted}_state_dict"]
        else:
            raise unknown(f"average in {self.checkpoint}", str(wanted), [*averages, "raw"])
        if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise ZooError(f"{self.checkpoint}: holds no tensors by name")
        return dict(found)

    def preprocess(self, size: int | None = None) -> Callable[[Any], Any]:
        """What prepares a sample as the run's evaluation does; `size` replaces its side.

        Pictures (a path, bytes, a PIL image, or uint8 (3, H, W)) become float (3, S, S), for detectors (3, h, w); a
        video's path (views, 3, T, S, S); a grid {"image", "mask"}.

        Raises:
            ZooError: nobody has said how, or the run prepared them by a transform that is not the zoo's.
        """
        facts = self.facts["preprocess"]
        if facts is None:
            raise ZooError(f"{self.checkpoint}: how its samples are prepared is not known: {self._why_unknown()}")
        return preparation(facts, size, str(self.checkpoint))

    def _why_unknown(self) -> str:
        if self.facts["data"] is None:
            return "it was written by an older zoo, and no config.yaml that tells lies beside it"
        return f"{str(self.facts['data']['module']).rpartition('.')[2]} takes no files"


def _one_line(text: str) -> str:
    """What a stranger may have written, without what moves a terminal's cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def task_class(path: str, where: Any) -> type[BaseModule]:
    """The class of a task by its path, which someone else may have written.

    Raises:
        ZooError: no task of the zoo, nor of a paper in ``ZOO_PAPERS``.
    """
    from zoo import catalog
    from zoo.training import BaseModule
    from zoo.weights.pretrained import paper_module

    module, _, name = path.rpartition(".")
    found: Any = None
    parts = module.split(".")
    if len(parts) == 3 and parts[0] == "zoo" and parts[1] in FIELDS and all(re.fullmatch(r"\w+", p) for p in parts):
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(module), name, None)
    elif module.startswith("zoo_papers_"):
        slug = module.removeprefix("zoo_papers_")
        cards = {one: catalog.paper(one) for one in catalog.list_papers()}
        if slug in cards and cards[slug].is_own:
            found = getattr(paper_module(cards[slug]), name, None)
    if not (isinstance(found, type) and issubclass(found, BaseModule)):
        said = f"its task is {path!r}, which is none of the zoo's" if path else "it names no task"
        raise ZooError(f"{where}: not a checkpoint of a task of the zoo: {said}")
    return found


_LIBRARIES = r"torchvision\.transforms|lightning\.pytorch\.callbacks"
_OURS = rf"(zoo(?!\.(weights|command|claims)\.)|zoo_papers_\w+|{_LIBRARIES})(\.\w+)+"
# Settings that no class takes.
_PLAIN = {"dataset", "data_dir", "init_from", "autoencoder", "default_root_dir", "ckpt_path"}
_MOST = 1 << 20  # bytes of a file of settings


def check_class_paths(settings: Any, where: Any, key: str = "") -> None:
    """Refuses settings out of a checkpoint, or of the run's config `where`, that name classes of others, which would be
    imported and called: as a `class_path`, as a string, or in a file that a string names. Addresses are refused too.

    Raises:
        ZooError: a class path that is neither the zoo's, nor of Lightning's callbacks or torchvision's transforms.
    """
    if isinstance(settings, Mapping):
        path = settings.get("class_path")
        if path is not None and not re.fullmatch(_OURS, str(path)):
            raise ZooError(f"{where}: its settings name the class {str(path)[:80]!r}, which is none of the zoo's")
        for name, value in settings.items():
            check_class_paths(value, where, str(name))
    elif isinstance(settings, list | tuple):
        for entry in settings:
            check_class_paths(entry, where, key)
    elif isinstance(settings, str) and key not in _PLAIN:
        _check_text(settings, where, key)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # as of __main__
        return True


def _check_text(text: str, where: Any, key: str) -> None:
    from zoo import catalog

    if "://" in text:
        raise ZooError(f"{where}: its settings name an address, {text[:80]!r}")
    dotted = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", text) and not re.fullmatch(_OURS, text)
    if dotted and _is_module(text.partition(".")[0]):
        raise ZooError(f"{where}: its settings name the class {text[:80]!r}, which is none of the zoo's")
    for folder in (Path(), Path(str(where)).parent):
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            path = (folder / text).expanduser()
            if path.is_file():
                if path.stat().st_size > _MOST:
                    raise ZooError(f"{where}: its settings name {text[:80]!r}, a file too large for settings")
                content, written = None, path.read_text(encoding="utf-8")
                with contextlib.suppress(ZooError):  # no settings then
                    content = catalog.parse_yaml(written, text)
                if content != text:
                    check_class_paths(content, where, key)


def read_sharded(folder: Path) -> dict[str, Any]:
    """The content of a sharded checkpoint, whole.

    Raises:
        ZooError: it cannot be read, or holds more than tensors and plain values.
    """
    from zoo.weights.files import read_checkpoint

    with _joined(folder) as path:
        return read_checkpoint(path)


@contextlib.contextmanager
def _joined(folder: Path) -> Iterator[Path]:
    """A sharded checkpoint as one file, as long as the block lasts."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from zoo.formats import shards
    from zoo.weights.files import check_file

    shards.check(folder)
    with tempfile.TemporaryDirectory(prefix="zoo-") as place:
        path, rest = Path(place) / "whole.ckpt", folder / "meta.pt"
        dcp_to_torch_save(folder, path)
        content = torch.load(path, weights_only=True)
        if rest.is_file():  # what Lightning keeps beside the shards
            check_file(rest)
            from zoo.formats import pytorch

            content = {**pytorch.read(rest), **content}
        if "state_dict" not in content and isinstance(content.get("model"), Mapping):
            content["state_dict"] = content.pop("model")
        torch.save(content, path)
        yield path


def data_module(settings: Mapping[str, Any]) -> Any:
    """The data module of a recipe's `data`, {"class_path", "init_args"}."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate_classes(parser.parse_object({"data": dict(settings)})).data


def _of_config(path: Path) -> dict[str, Any]:
    """What the config of a run tells of one whose checkpoint says nothing; empty where its data cannot be had."""
    import yaml

    from zoo.data.base import SeededDataModule

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        data = content["data"]
        check_class_paths(data, path)
        if "://" in str(data["init_args"].get("dataset")):  # to look at a run fetches nothing
            return {}
        module = data_module(data)
    except Exception:  # no config, a set that has gone, settings of another version: it is only asked
        return {}
    facts = module.facts() if isinstance(module, SeededDataModule) else {}
    recipe = {"name": None, **{key: content.get(key) for key in ("model", "data", "average")}}
    return {**facts, "recipe": recipe}


# ----------------------------------------------------------------------------------------------------------- preparing


def preparation(facts: Mapping[str, Any], size: int | None = None, where: str = "the run") -> Callable[[Any], Any]:
    """What prepares a sample as :meth:`zoo.data.base.SeededDataModule.preprocess_facts` say.

    Raises:
        ZooError: the transform is not the zoo's, or the facts are of another kind.
    """
    if name := facts.get("transform"):
        raise ZooError(f"{where}: its samples were prepared by {name}, which only its own recipe knows")
    kinds: dict[str, Any] = {"image": _Image, "objects": _Objects, "clip": _Clip, "grid": _grid}
    if facts.get("kind") not in [*kinds]:
        raise ZooError(f"{where}: prepares its samples in a way that is not known ({str(facts.get('kind'))[:80]!r})")
    sides = {name: facts.get(name) or 1 for name in ("size", "longest")} | ({"size": size} if size else {})
    sides["size / crop_pct"] = sides["size"]
    if isinstance(sides["size"], int) and isinstance(crop := facts.get("crop_pct", 1.0), int | float) and crop > 0:
        sides["size / crop_pct"] = int(min(sides["size"] / crop, 1 << 40))
    for name, side in sides.items():
        if not isinstance(side, int) or not 1 <= side <= _LARGEST:
            said = str(side)[:80]
            raise ZooError(f"{where}: prepares its samples at a {name} of {said}; 1 to {_LARGEST} pixels make sense")
    if not all(isinstance(value, int | float) and value > 0 for value in facts.get("std") or ()):
        raise ZooError(f"{where}: normalises its samples by {str(facts['std'])[:80]}; deviations are above 0")
    try:
        return kinds[facts["kind"]](facts, size)
    except ZooError:
        raise
    except Exception as error:  # facts that someone else wrote
        reason = " ".join(str(error).split()) or "nothing"
        said = f"{type(error).__name__}: {reason[:200]}"
        raise ZooError(f"{where}: how its samples are prepared is not told as it should be ({said})") from error


class _Image:
    def __init__(self, facts: Mapping[str, Any], size: int | None) -> None:
        import torch

        from zoo.data.transforms import evaluation_transform
        from zoo.weights.pretrained import Picture

        self.read, self.transform = Picture(), evaluation_transform(facts, size)
        self.transform.bind(self.transform.side, facts["mean"])
        self.mean, self.std = (255 * torch.tensor(facts[key])[:, None, None] for key in ("mean", "std"))

    def __call__(self, picture: Any) -> Tensor:
        from torch import Tensor

        image = self.transform(self.read(picture).as_subclass(Tensor))
        return (image.float() - self.mean) / self.std


class _Objects:
    def __init__(self, facts: Mapping[str, Any], size: int | None) -> None:
        from zoo.data.detection import Normalise
        from zoo.weights.pretrained import Picture

        self.read, self.short, self.longest = Picture(), size or facts["size"], facts["longest"]
        mean, std = ([255 * value for value in facts[key]] for key in ("mean", "std"))
        self.normalise = Normalise(mean, std, facts["channels"])

    def __call__(self, picture: Any) -> Tensor:
        from torch import Tensor

        from zoo.data.scenes import resize_pil, shortest_edge_size

        image = self.read(picture).as_subclass(Tensor)
        if self.short is not None:
            height, width = image.shape[-2:]
            image = resize_pil(image, *shortest_edge_size(height, width, self.short, self.longest))
        return self.normalise([image])[0]


class _Clip:
    def __init__(self, facts: Mapping[str, Any], size: int | None) -> None:
        from zoo.data.video_transforms import VideoEval

        side = int(size or facts["size"])
        self.transform = VideoEval(side, facts["short_side"], facts["crop"])
        self.transform.bind(side)
        names = ("num_frames", "sampling_rate", "target_fps", "sampling", "clips", "crops", "mean", "std")
        self.settings = {name: facts[name] for name in names}

    def __call__(self, path: Any) -> Tensor:
        from zoo.data.video import read_views

        return read_views(path, transform=self.transform, **self.settings)


def _grid(facts: Mapping[str, Any], size: int | None) -> Any:
    from zoo.data.arc import Canvas

    return Canvas(int(size or facts["size"]), int(facts["scale"]))
