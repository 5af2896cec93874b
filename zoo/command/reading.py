"""What a recipe and its command line say, read with care before anything is built.

A recipe may come from anywhere: it is bounded in size and depth (:func:`zoo.catalog.read_facts`), and the class paths
in it are imported from installed packages, `zoo`, papers of ``ZOO_PAPERS`` or the file that it declares as
its `module`; never from the folder that the command happens to run in, nor from Python's own library.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch.cli  # noqa: F401  which lets configs be addresses; the settings below take it back
import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings

from zoo import catalog
from zoo.command.parse_errors import class_files
from zoo.command.runs import folder_name, safe_name
from zoo.command.verdict import row_words
from zoo.errors import ZooError
from zoo.files import module_from
from zoo.paths import share

# A dict with a `class_path` stays a dict where an argument takes anything, no value may name what runs code, and files
# of settings that values name are of this machine.
set_parsing_settings(
    instantiate_subclass_spec_in_any=False,
    import_path_denylist=sorted(sys.stdlib_module_names),
    config_read_mode_fsspec_enabled=False,
    config_read_mode_urls_enabled=False,
)
_load_yaml = get_loader("yaml")


def _bounded_yaml(text: str) -> Any:
    """What the parser reads: options, and the files of settings that options and recipes name."""
    _check_value(text, "an option")
    found = _load_yaml(text)
    _no_pipes(found)
    return found


set_loader("yaml", _bounded_yaml, (yaml.YAMLError,))


def _check_value(value: str, name: str) -> None:
    if any(mark in value for mark in "[{&*") or len(value) > 100:
        catalog.check_yaml(value, name)


def _no_pipes(value: Any) -> None:
    """Refuses a value that names a pipe or a socket, at which reading would wait for ever."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            _no_pipes(entry)
    elif isinstance(value, str):
        with contextlib.suppress(OSError, ValueError):
            mode = os.stat(value).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                raise ZooError(f"{value}: is no regular file (a pipe or socket)")


# Facts of the data module that the model takes over, where its class has such an argument and nobody set it.
LINKS = {"num_classes": "num_classes", "num_tasks": "num_tasks", "image_size": "img_size"}
# Settings of the data module that are about the recipe's own dataset.
_OF_DATASET = ("options", "train_samples", "data_dir", "mean", "std", "rearc_dir", "rearc_limit", "tasks")


@dataclass
class CommandLine:
    """A recipe or row with its options, ready for the parser.

    `words` are all that the parser reads: the recipe's file, the row's options (these two are `given`), and the user's
    `asked`. `unlinked` are model arguments that are set and therefore not taken from the data module. `module` is the
    Python file that the recipe declares. `notes` tell the user what another dataset changes. `own` are the settings of
    a run that stand in the recipe's place.
    """

    name: str
    given: list[str]
    words: list[str]
    asked: list[str]
    contents: list[Mapping[str, Any]]
    unlinked: set[str] = field(default_factory=set)
    module: Path | None = None
    notes: list[str] = field(default_factory=list)
    own: Mapping[str, Any] = field(default_factory=dict)

    def stated(self) -> set[str]:
        """The dotted keys that the recipe states."""

        def keys(tree: Any, prefix: str) -> Iterator[str]:
            for key, value in mapping(tree).items():
                inner = prefix if key == "init_args" else f"{prefix}.{key}"
                yield inner.removeprefix(".")
                yield from keys(value, inner)

        return set(keys(self.contents[0], ""))

    def class_of(self, part: str) -> str | None:
        """The class path of ``model`` or ``data`` as the recipe, then the command line states it."""
        found = None
        for content in self.contents:
            stated = content.get(part)
            found = stated if isinstance(stated, str) else (mapping(stated).get("class_path") or found)
        for key, value in _options(self.asked):
            if key in (part, f"{part}.class_path") and value and not value.startswith("{"):
                found = value
        return found


def recipe_name(path: Path) -> str:
    """The name of the recipe at `path`: relative to the recipes folder, as a saved config states it, or the stem.

    That of a leaderboard row is its address, ``paper:row``; :func:`run_name` makes a folder's name of it.
    """
    with contextlib.suppress(ValueError):
        return path.resolve().relative_to(share("recipes").resolve()).with_suffix("").as_posix()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        if match := re.match(r"# recipe: (\S+)", first):
            return safe_name(match[1], safe_name(path.stem, "recipe"))
    return safe_name(path.stem, "recipe")


def run_name(recipe: str) -> str:
    """Where the runs of a recipe, or of a row, lie under ``runs/``."""
    name = recipe if catalog.is_row(recipe) else recipe_name(catalog.recipe_path(recipe))
    return folder_name(name)


def read_recipe(path: Path) -> dict[str, Any]:
    """The content of the recipe at `path`; a ZooError where it is none."""
    content = catalog.read_facts(path, "recipe")
    if "model" not in content:
        raise ZooError(f"{path}: not a recipe; it has no `model`")
    if strange := next((key for key in content if not isinstance(key, str)), None):
        raise ZooError(f"{path}: unknown key {strange!r}")
    return content


def command_line(recipe: str | Path, argv: Sequence[str] = (), own: Mapping[str, Any] | None = None) -> CommandLine:
    """What the recipe or row `recipe` says together with the options `argv`; `own` are a run's settings in its place.

    Raises:
        ZooError: an unknown name, a file that is no recipe, a class path that may not be imported.
    """
    path = catalog.recipe_path(str(recipe))
    contents: list[Mapping[str, Any]] = [read_recipe(path)]
    if catalog.is_row(str(recipe)):
        name, row = str(recipe), row_words(catalog.row(str(recipe))[1])
    else:
        name, row = recipe_name(path), []
    for key, value in _options(argv):
        if key in ("config", "c"):
            contents.append(_read_config(value or ""))
        elif value:
            with contextlib.suppress(yaml.YAMLError):
                _check_value(value, f"--{key}")
            _no_pipes(value)
    _no_pipes(contents)
    given = ["--config", str(path), *_nested_nulls(row)]
    if own:
        contents[0], given = {**contents[0], **own}, [*given, "--config", json.dumps(own)]
    found = CommandLine(name, given, [], list(argv), contents, own=own or {})
    _prepare_imports(found, path)
    found.words = [*given, *_without_its_data(found, row), *_with_help(found, _nested_nulls(argv))]
    found.unlinked = {t for t in LINKS.values() if any(t in _init_args(one, "model") for one in contents)}
    for key, _ in _options([*row, *argv]):
        found.unlinked |= {t for t in LINKS.values() if key in (f"model.{t}", f"model.init_args.{t}")}
    return found


def _with_help(found: CommandLine, argv: Sequence[str]) -> list[str]:
    """`argv` in which ``--model.help`` without a class asks for the recipe's own; last, as the parser stops there."""
    words, last = [], []
    for position, word in enumerate(argv):
        follows = argv[position + 1] if position + 1 < len(argv) else "--"
        part = word.removeprefix("--").removesuffix(".help")
        if word in ("--model.help", "--data.help") and follows.startswith("-") and (own := found.class_of(part)):
            last.append(f"{word}={own}")
        elif (nested := re.fullmatch(r"--(model|data)\..+\.help", word)) and follows.startswith("-"):
            raise ZooError(f"{word}: --{nested[1]}.help lists what it takes")
        else:
            words.append(word)
    return [*words, *last]


def _read_config(value: str) -> Mapping[str, Any]:
    """A further config: a file, or YAML itself."""
    with contextlib.suppress(OSError, ValueError):
        if Path(value).exists():
            return catalog.read_facts(Path(value), "config")
    content = catalog.parse_yaml(value, "--config") if ":" in value else None
    if not isinstance(content, dict):
        raise ZooError(f"--config: no file {value!r}")
    return content


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The options among `argv`, without their dashes, with their values."""
    for position, word in enumerate(argv):
        if word.startswith("-"):
            key, equals, value = word.lstrip("-").partition("=")
            follows = argv[position + 1] if position + 1 < len(argv) else None
            yield key, value if equals else follows


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is a mapping, as a recipe's part should be; else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _init_args(content: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    return mapping(mapping(content.get(part)).get("init_args"))


# --------------------------------------------------------------------------------------------------- another dataset


def _without_its_data(found: CommandLine, row: Sequence[str]) -> list[str]:
    """The options that take back what a recipe, or its row, says about its dataset, where the user gives another one,
    and keep the size of its pictures."""
    own = {**_init_args(found.contents[0], "data"), **_row_settings(row)}
    user: dict[str, Any] = {}
    for content in found.contents[1:]:
        user |= _init_args(content, "data")
    user |= {key.removeprefix("data.").removeprefix("init_args."): value for key, value in _options(found.asked)}
    dataset = user.get("dataset")
    if dataset is None or dataset == own.get("dataset"):
        return []
    back = [key for key in _OF_DATASET if own.get(key) is not None]
    words = [f"--data.{key}=null" for key in back]
    left_out = [key for key in back if key not in user]
    notes = [f"{', '.join(left_out)} of {own.get('dataset')} left out"] if left_out else []
    size = _image_size(own)
    if size is not None and "image_size" not in user and _takes(found.class_of("data"), "image_size"):
        words.append(f"--data.image_size={size}")
        notes.append(f"image_size {size} kept")
    if notes:
        found.notes.append(f"dataset {dataset}: {'; '.join(notes)}")
    return words


def _row_settings(row: Sequence[str]) -> dict[str, Any]:
    prefix = "data."
    return {key.removeprefix(prefix).partition(".")[0]: value for key, value in _options(row) if key.startswith(prefix)}


def _image_size(own: Mapping[str, Any]) -> Any:
    """The side of the pictures of a recipe that does not state it as `image_size`."""
    dataset = own.get("dataset", "shapes")
    if own.get("image_size") is not None:
        return None
    if size := mapping(own.get("options")).get("size"):
        return size
    return catalog.data_card(dataset).image_size if dataset in catalog.list_datasets() else None


def _takes(class_path: str | None, argument: str) -> bool:
    """Whether a class of ours takes an argument."""
    module, _, name = (class_path or "").rpartition(".")
    if module.split(".")[0] != "zoo":
        return False
    with contextlib.suppress(ImportError, AttributeError, ValueError, TypeError):
        return argument in inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return False


def _nested_nulls(argv: Sequence[str]) -> list[str]:
    """`argv` with ``--model.optim.lr null`` as ``--model.optim={"lr": null}``: jsonargparse 4.53 hands a null that lies
    two levels deep on as the string "None"."""
    words, position = [], 0
    while position < len(argv):
        word = argv[position]
        key, equals, value = word.partition("=")
        if not equals and key.startswith("--") and position + 1 < len(argv):
            value = argv[position + 1]
        owner, _, leaf = key.rpartition(".")
        if value in ("null", "Null", "NULL", "~") and len([p for p in key.split(".") if p != "init_args"]) > 2:
            words.append(f"{owner.removesuffix('.init_args')}={json.dumps({leaf: None})}")
            position += 1 if equals else 2
        else:
            words.append(word)
            position += 1
    return words


# ------------------------------------------------------------------------------------------------------------ imports


def _prepare_imports(found: CommandLine, recipe: Path) -> None:
    """Loads what class paths may name beside installed packages: the declared module, papers of ``ZOO_PAPERS``, and the
    modules of ours in which classes named without a path are."""
    for content in found.contents:
        if (declared := content.get("module")) is not None:
            found.module = _load_declared(declared, recipe.parent)
    for key, value in _options(found.asked):
        if key == "module" and value:
            found.module = _load_declared(value, Path())
    own = {slug: card for slug in catalog.list_papers() if (card := catalog.paper(slug)).is_own}
    for class_path in {*_class_paths(found.contents), *_class_paths_of(found.asked)}:
        root, _, rest = class_path.partition(".")
        slug = root.removeprefix("zoo_papers_")
        if not rest:
            for module in _modules_with(class_path):
                importlib.import_module(module)
        elif slug in own:
            from zoo.weights.pretrained import paper_module

            sys.modules.setdefault(root, paper_module(own[slug]))


def _class_paths(value: Any, key: str = "") -> Iterator[str]:
    """The strings in `value` that stand where a class is named."""
    if key == "class_path" and not isinstance(value, str):
        raise ZooError(f"class_path: expected a class path, got {str(value)[:80]!r}")
    if isinstance(value, str) and key in ("class_path", "model", "data"):
        yield value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _class_paths(entry, name if name == "class_path" or not key else "inner")
    elif isinstance(value, list):
        for entry in value:
            yield from _class_paths(entry, key if not key else "inner")


def _class_paths_of(argv: Sequence[str]) -> Iterator[str]:
    for key, value in _options(argv):
        if value and (key in ("model", "data", "model.help", "data.help") or key.endswith("class_path")):
            yield value


def _modules_with(name: str) -> list[str]:
    """The modules of ours that define the class `name`, found in their sources."""
    if not name.isidentifier():
        return []
    pattern = re.compile(rf"^class {name}\b", re.MULTILINE)
    found = [path for path in class_files() if pattern.search(path.read_text(encoding="utf-8"))]
    return [".".join(["zoo", path.parent.name, path.stem]) for path in found]


def _load_declared(module: Any, folder: Path) -> Path:
    """Runs the file that a recipe declares as its `module`; its classes are named by the file's stem."""
    path = (folder / str(module)).resolve()
    if not isinstance(module, str) or path.suffix != ".py" or not path.is_file():
        raise ZooError(f"module: no Python file {str(module)!r} beside the recipe")
    name = path.stem
    if name in sys.modules:
        if getattr(sys.modules[name], "__file__", None) == str(path):
            return path
        raise ZooError(f"module: the name {name!r} is taken by another module; rename {path.name}")
    try:
        module_from(path, name)
    except Exception as error:
        raise ZooError(f"module {path.name}: {type(error).__name__}: {error}") from error
    return path


@contextlib.contextmanager
def installed_only() -> Iterator[None]:
    """Imports do not look into the working folder, unless ``PYTHONPATH`` names it in full."""
    here = Path.cwd()
    asked = {entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)}
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if entry in asked or (entry and Path(entry).resolve() != here)]
    try:
        yield
    finally:
        sys.path[:] = before
