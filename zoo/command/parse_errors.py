"""What jsonargparse says of a wrong key or value, in one line that names it and the nearest valid one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import os
import re
import typing
from typing import Any

from jsonargparse import ArgumentParser

from zoo.errors import ZooError


def explain_parse_error(message: str, parser: Any) -> str:
    """One line for a parse error of jsonargparse, naming the key and the nearest valid one.

    Its messages are trees of lines: ``Parser key "model"`` > ``Problem with given class_path 'X'`` > the cause. The
    chain of keys and the innermost class are kept, the branches of other members of a union are dropped.
    """
    keys: list[tuple[int, str]] = []
    owner: str | None = None
    wanted, given = "", ""
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
            return _unknown_key(prefix, match[2], owner if path else None, parser)
        elif match := re.match(r"Option '([^']+)' is not accepted", text):
            return _unknown_key(path, match[1], owner, parser)
        elif match := re.match(r"unrecognized arguments: (.*)", text, re.IGNORECASE):
            first = match[1].split()[0]
            if not first.startswith("-"):
                return f"unexpected argument {first!r}; options look like --trainer.max_epochs 1"
            return _unknown_key(path, first.lstrip("-").split("=")[0], owner, parser)
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
                return f"{path}: expected {wanted}, got {given!r}"
        elif match := re.match(r"Expected (?:an? )?(.+?)\. Got value: (.*)", text):
            return f"{path}: expected {_types(match[1])}, got {match[2]!r}"
        elif match := re.search(r"File does not exist: '(.*)'", text):
            return f"{path or '--config'}: no file {os.path.relpath(match[1])!r}"
        elif text.startswith(("argument ", "Key ", "Problems parsing config")):
            break
    return " ".join(message.split())


def innermost(error: BaseException) -> str:
    """What a class said when it was built; jsonargparse wraps it in the report of a union's members."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ZooError):
            return str(found)
        found = found.__cause__ or found.__context__
    match = re.search(r"^\s*Errors:\n\s*- (.*?)\n\s*- Expected", str(error), re.DOTALL | re.MULTILINE)
    return " ".join((match[1] if match else str(error)).split()) or type(error).__name__


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


def _unknown_key(prefix: str, key: str, owner: str | None, parser: Any) -> str:
    """The line for the key `prefix.key`, which `owner` (a class path; None: the parser itself) does not take."""
    key = key.replace("init_args.", "")
    shown = f"{prefix}.{key}" if prefix else key
    if owner is None:
        known = sorted(set(parser.get_defaults().keys()) - {"config", "print_config"})
        near = difflib.get_close_matches(shown, known, n=1, cutoff=0.6)
        if not near:
            known = sorted({name.partition(".")[0] for name in known})
            near = difflib.get_close_matches(shown.partition(".")[0], known, n=1, cutoff=0.3)
    else:
        # The innermost class is known by name; of its dataclass arguments only the keys are, at the end of the prefix.
        base, words = prefix.split(".") if prefix else [], key.split(".")
        kind = _load(owner)
        for word in [base[-1]] * bool(base) + words[:-1]:
            if inner := _argument_class(kind, word):
                kind = inner
                if word == words[0]:
                    base.append(words.pop(0))
        owner, dotted = kind.__name__ if kind else owner, _parameters(kind)
        names = list(dict.fromkeys(name.partition(".")[0] for name in dotted))
        if len(base) > 1 and base[-1] in names:  # a dataclass among what is handed on as **kwargs
            words.insert(0, base.pop())
        within = [name for name in dotted if name.startswith(f"{words[0]}.")] if len(words) > 1 else []
        near = difflib.get_close_matches(".".join(words), within, n=1, cutoff=0.3)
        near = near or difflib.get_close_matches(words[0], names, n=1, cutoff=0.3)
        near = [".".join([*base, *near])] if near else []
        known = names
    where = f" of {owner}" if owner else ""
    if near:
        return f"unknown key {shown!r}{where}; did you mean {near[0]!r}?"
    return f"unknown key {shown!r}{where}; known: {', '.join(known)}"


def _load(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        return getattr(importlib.import_module(module), name)
    return None


def _parameters(kind: Any) -> list[str]:
    """The arguments of a class, those that it hands on as ``**kwargs`` included, and the dotted ones of dataclasses."""
    if kind is None:
        return []
    parser = ArgumentParser(exit_on_error=False)
    found = parser.add_class_arguments(kind, "kind", fail_untyped=False)
    return [key.removeprefix("kind.") for key in (*found, *parser.get_defaults().keys())]


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
