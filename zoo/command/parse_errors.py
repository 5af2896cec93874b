"""What jsonargparse says of a wrong key or value, in one line that names it and the nearest valid one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

import zoo
from zoo.errors import ZooError

# What other programs call an option; the first that the recipe has, set ones before others.
_SYNONYMS = {
    "epochs|num_epochs|max_epoch|n_epochs": ["trainer.max_epochs"],
    "steps|num_steps|iterations|iters|max_iter|max_iters": ["trainer.max_steps"],
    "lr|learning_rate|base_lr|blr": ["model.optim.base_lr", "model.optim.lr"],
    "wd|weight_decay": ["model.optim.weight_decay"],
    "momentum": ["model.optim.momentum"],
    "optimizer|opt": ["model.optim.name"],
    "scheduler|sched|lr_scheduler": ["model.optim.schedule"],
    "warmup|warmup_epochs": ["model.optim.warmup_epochs", "model.optim.warmup_steps"],
    "batch_size|b|bs|batch": ["data.batch_size"],
    "workers|num_workers|j": ["data.num_workers"],
    "data_path|data_dir|data_root|root|dataset_path|data_folder": ["data.data_dir"],
    "dataset|data_name": ["data.dataset"],
    "image_size|img_size|input_size|resolution": ["data.image_size", "model.img_size"],
    "gpus|num_gpus|devices|nproc_per_node": ["trainer.devices"],
    "nodes|num_nodes": ["trainer.num_nodes"],
    "device|accelerator": ["trainer.accelerator"],
    "precision|amp|fp16|bf16|mixed_precision": ["trainer.precision"],
    "accum_iter|grad_accum|accumulate|gradient_accumulation_steps": ["trainer.accumulate_grad_batches"],
    "clip_grad|grad_clip|max_norm": ["trainer.gradient_clip_val"],
    "output_dir|out|output|save_dir|log_dir": ["trainer.default_root_dir"],
    "resume|checkpoint|ckpt|resume_from|ckpt_file": ["ckpt_path"],
    "seed|random_seed": ["seed_everything"],
    "pretrained|finetune|weights|init": ["model.init_from"],
}


def explain_parse_error(message: str, parser: Any, options: Mapping[str, bool] | None = None) -> str:
    """One line for a parse error of jsonargparse, naming the key and the valid one that is meant.

    `options` are all that there are, and whether the recipe states them.

    Its messages are trees of lines: ``Parser key "model"`` > ``Problem with given class_path 'X'`` > the cause. The
    chain of keys and the innermost class are kept, the branches of other members of a union are dropped.
    """
    keys: list[tuple[int, str]] = []
    owner: str | None = None
    wanted, given = "", ""
    if match := re.search(r"Importing '([^']+)' is not allowed", message):
        return f"{match[1]} is not imported: a class path names a class of an installed package, of zoo or of your own"
    for line in message.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        text = line.strip().removeprefix("- ")
        if match := re.match(r'Parser key "([^"]+)":\s*(.*)', text):
            keys = [*((at, key) for at, key in keys if at < indent), (indent, match[1])]
            text, wanted = match[2], ""
            if not text:
                continue
        path = ".".join(key for _, key in keys)
        if match := re.match(r"Problem with given class_path '([^']+)'", text):
            owner = match[1]
        elif match := re.match(r"Group '([^']*)' does not accept option '([^']+)'", text):
            prefix = ".".join(filter(None, [path, match[1]]))
            return _unknown_key(prefix, match[2], owner if path else None, parser, options)
        elif match := re.match(r"Option '([^']+)' is not accepted", text):
            return _unknown_key(path, match[1], owner, parser, options)
        elif match := re.match(r"unrecognized arguments: (.*)", text, re.IGNORECASE):
            first = match[1].split()[0]
            if not first.startswith("-"):
                return f"unexpected argument {first!r}; options look like --trainer.max_epochs 1"
            return _unknown_key(path, first.lstrip("-").split("=")[0], owner, parser, options)
        elif match := re.match(r"module '([^']+)' has no attribute '([^']+)'", text):
            return f"{path}: " + _no_attribute(match[1], match[2])
        elif text.startswith("No module named"):
            return f"{path or 'config'}: {text}"
        elif re.match(r"Not a valid subclass of|Import path .* does not correspond to a subclass", text) and not wanted:
            wanted = text
        elif match := re.match(r"Subtypes: \[(.*)\]", text):
            wanted = _types(match[1])
        elif match := re.match(r"Given value: (.*)", text):
            given = given or match[1]
            if wanted and (not owner or path.count(".") > 0):
                return f"{path}: expected {wanted}, got {_shown(given)}{_class_like(given)}"
        elif match := re.match(r"Expected (?:an? )?(.+?)\. Got value: (.*)", text):
            return f"{path}: expected {_types(match[1])}, got {_shown(match[2])}"
        elif match := re.match(r"Expected a dot import path string: (.*)", text):
            return f"{path}: expected a class path, got {_shown(match[1])}{_class_like(match[1])}"
        elif re.match(r"'\w+' object has no attribute 'keys'", text):
            return f"{path}.init_args: expected a mapping of arguments"
        elif match := re.match(r"Unable to load config '?\"?(.*?)\"?'?$", text):
            return f"{path}: expected a mapping or a file, got {_shown(match[1])}"
        elif match := re.search(r"File does not exist: '(.*)'", text):
            return f"{path or '--config'}: no file {os.path.relpath(match[1])!r}"
        elif text.startswith(("argument ", "Key ", "Problems parsing config")):
            break
        elif owner and not re.match(r"Expected a|Unexpected import path|Does not validate|Errors:", text):
            return f"{path}: {text[:300]}"
    return " ".join(message.split())[:500]


def innermost(error: BaseException) -> str:
    """What a class said when it was built; jsonargparse wraps it in the report of a union's members."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ZooError):
            return str(found)
        found = found.__cause__ or found.__context__
    match = re.search(r"^\s*Errors:\n\s*- (.*?)\n\s*- Expected", str(error), re.DOTALL | re.MULTILINE)
    return " ".join((match[1] if match else str(error)).split()) or type(error).__name__


def _shown(value: str) -> str:
    """A value as an error names it: a class by its path, a long one by its beginning."""
    if match := re.match(r"\{'class_path': '([^']*)'", value):
        return f"the class {match[1]!r}"
    return repr(value if len(value) <= 80 else value[:80] + "...")


def _class_like(name: str) -> str:
    """The hint at a class of ours whose name is like `name`."""
    known = re.findall(r"^class ([A-Z]\w+)", "\n".join(path.read_text() for path in class_files()), re.MULTILINE)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8) if name.isidentifier() else []
    return f"; did you mean {near[0]!r}?" if near else ""


def class_files() -> list[Path]:
    """The sources of ours in which a recipe's classes stand."""
    return sorted(Path(zoo.__file__).parent.glob("*/*.py"))


def _types(text: str) -> str:
    """``<class 'int'>, <class 'NoneType'>`` or ``typing.Literal['a', 'b']`` in words."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text).replace("typing.", "")
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    names = [re.sub(r"^Literal\[(.*)\]$", r"one of \1", part.strip()) for part in parts]
    return " or ".join(name for name in names if name and name != "NoneType") or text


def _unknown_key(
    prefix: str, key: str, owner: str | None, parser: Any, options: Mapping[str, bool] | None = None
) -> str:
    """The line for the key `prefix.key`, which `owner` (a class path; None: the parser itself) does not take."""
    key, options = key.replace("init_args.", ""), options or {}
    shown = f"{prefix}.{key}" if prefix else key
    near: list[str] = []
    if owner is None:
        known = sorted(set(parser.get_defaults().keys()) - {"config", "print_config"})
        near = difflib.get_close_matches(shown, known, n=1, cutoff=0.85)
        if not near and "." not in shown:
            near = _meant(shown, [*known, *options], options)
        if not near:
            groups = sorted({name.partition(".")[0] for name in known})
            first = shown.partition(".")[0]
            if first in groups:
                return f"unknown key {shown!r}; --help lists what {first} has"
            known = groups
            near = difflib.get_close_matches(first, known, n=1, cutoff=0.7)
    else:
        # The innermost class is known by name; of its dataclass arguments only the keys are, at the end of the prefix.
        base, words = prefix.split(".") if prefix else [], key.split(".")
        kind = _load(owner)
        for word in [base[-1]] * bool(base) + words[:-1]:
            if inner := _argument_class(kind, word):
                kind = inner
                if word == words[0]:
                    base.append(words.pop(0))
        owner, known = kind.__name__ if kind else owner, _parameters(kind)
        below = ".".join([*base, ""])
        handed_on = {name.removeprefix(below).partition(".")[0] for name in options if name.startswith(below)}
        known += sorted(handed_on - {*known, "class_path"})  # by **kwargs
        close = difflib.get_close_matches(words[0].lower(), known, n=1, cutoff=0.55)
        near = [".".join([*base, *close])] if close else _meant(shown, [*options], options)
        if close == words[:1]:  # right so far: a dataclass that is handed on, in which the key is wrong
            inside = [name for name in options if name.startswith(f"{below}{words[0]}.")]
            near = difflib.get_close_matches(shown, inside, n=1) or near
    where = f" of {owner}" if owner else ""
    if near:
        return f"unknown key {shown!r}{where}; did you mean {near[0]!r}?"
    more = [f"... ({len(known)} in all)"] if len(known) > 12 else []
    return f"unknown key {shown!r}{where}; known: {', '.join([*known[:12], *more])}"


def _meant(shown: str, known: Sequence[str], options: Mapping[str, bool]) -> list[str]:
    """The option among `known` that another program calls `shown`, or that ends in the same word, if there is one."""
    leaf = shown.rpartition(".")[2].replace("-", "_").lower()
    for words, meant in _SYNONYMS.items():
        if leaf in words.split("|"):
            there = [name for name in meant if name in known and name != shown]
            return sorted(there, key=lambda name: not options.get(name))[:1]
    same = sorted((name for name in known if name.rpartition(".")[2] == leaf), key=lambda name: name.count("."))
    if same:
        return same[:1]
    leaves = {name.rpartition(".")[2]: name for name in sorted(known, key=len, reverse=True)}
    return [leaves[one] for one in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.85)]


def _load(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        return getattr(importlib.import_module(module), name)
    return None


def _parameters(kind: Any) -> list[str]:
    """The arguments of a class, those that it hands on as ``**kwargs`` included."""
    if kind is None:
        return []
    found = ArgumentParser(exit_on_error=False).add_class_arguments(kind, "kind", fail_untyped=False)
    return list(dict.fromkeys(key.split(".")[1] for key in found))


def _argument_class(kind: Any, argument: str) -> Any:
    """The dataclass that the argument `argument` of the class `kind` takes, if it is one."""
    with contextlib.suppress(Exception):
        hint = typing.get_type_hints(kind.__init__).get(argument)
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                return option
    return None


def _no_attribute(module: str, name: str) -> str:
    with contextlib.suppress(ImportError):
        known = [key for key in dir(importlib.import_module(module)) if not key.startswith("_")]
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.3):
            return f"{module} has no {name!r}; did you mean {near[0]!r}?"
    return f"{module} has no {name!r}"
