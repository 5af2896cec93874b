"""Seeded mutations of recipes through the real path, up to the built objects.

Each must end within a time limit in acceptance or in one line (a ZooError); nothing else is raised, nothing is run or
imported from the working folder. ``python -m tests.command.fuzz_recipes --count 300 [--seed 0]`` prints what
does not; test_fuzz_recipes.py runs a few.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from zoo import catalog
from zoo.command.recipes import RecipeCLI, build_dry
from zoo.errors import ZooError

SECONDS = 20  # a mutation may take; most take 0.1 s
BASES = ("mae/pocket", "mask_rcnn/train_coco", "moco/pocket", "varc/pocket", "slowfast/pocket", "meanflow/pocket")
TRAP = """
from pathlib import Path
Path(__file__).with_name("pwned").write_text("imported")
import lightning.pytorch as pl
class Task(pl.LightningModule):
    pass
"""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3.5, 1e30, -1e-30, float("nan"), float("inf"), 10**18, 10**30, -(10**40), 2**31),
    *("", "null", "x", "a.b.C", "evil.Task", "evil", "os.system", "subprocess.Popen", "../..", "/dev/zero", "1e400"),
    *("é\u202e\U0001f600", "\x00", "A" * 5000, "9" * 5000, "${oc.env:HOME}", "!!python/object/apply:os.system [touch]"),
    *(
        [],
        {},
        [1, [2, [3]]],
        {"a": {"b": {"c": 1}}},
        {"class_path": "evil.Task"},
        [{"class_path": "os.system"}],
        [None],
    ),
    *({"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "pwned"]}}, {"class_path": 3}, {1: 2}),
    *({"class_path": "torch.nn.Identity"}, {"class_path": "zoo.nothing.Here"}, {"init_args": {"x": 1}}, "zoo", "torch"),
)


def paths(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a tree of dicts and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*at, key)
        yield from paths(value, (*at, key))


def owner(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _value(tree: dict[str, Any], draw: random.Random) -> None:
    path = draw.choice(list(paths(tree)))
    owner(tree, path)[path[-1]] = copy.deepcopy(draw.choice(VALUES))


def _drop(tree: dict[str, Any], draw: random.Random) -> None:
    path = draw.choice(list(paths(tree)))
    del owner(tree, path)[path[-1]]


def _rename(tree: dict[str, Any], draw: random.Random) -> None:
    path = draw.choice([path for path in paths(tree) if isinstance(path[-1], str)])
    parent, key = owner(tree, path), path[-1]
    parent[draw.choice([key[:-1], key + "s", key[::-1], key.upper(), "-" + key, key + ".x", "", "class_path"])] = (
        parent.pop(key)
    )


def _unknown(tree: dict[str, Any], draw: random.Random) -> None:
    path = draw.choice([(), *(path for path in paths(tree))])
    place = owner(tree, (*path, None)) if path else tree
    if isinstance(place, dict):
        place[draw.choice(["x", "__class__", "self", "kwargs", "network", "optimizer"])] = copy.deepcopy(
            draw.choice(VALUES)
        )


def _swap(tree: dict[str, Any], draw: random.Random) -> None:
    one, two = draw.choice(list(paths(tree))), draw.choice(list(paths(tree)))
    value = copy.deepcopy(owner(tree, two)[two[-1]])
    owner(tree, one)[one[-1]] = value


def _class(tree: dict[str, Any], draw: random.Random) -> None:
    found = [path for path in paths(tree) if path[-1] == "class_path"]
    path = draw.choice(found)
    named = [
        "evil.Task",
        "MAEFineTuning",
        "zoo.selfsup.mae.MAEFineTuning",
        "os.system",
        "builtins.exec",
        "torch.nn.Linear",
    ]
    named += [
        "zoo.data.ImageDataModule",
        "zoo.selfsup.mae",
        "antigravity.fly",
        "this.s",
        "torch.load",
        ".",
        "zoo..mae",
        "evil",
    ]
    owner(tree, path)[path[-1]] = draw.choice(named)


TREES: tuple[Callable[[dict[str, Any], random.Random], None], ...] = (
    _value,
    _value,
    _drop,
    _rename,
    _unknown,
    _swap,
    _class,
)


def _bomb(text: str, draw: random.Random) -> str:
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, draw.choice([3, 9])))
    return f"a0: &a0 [x, x]\n{levels}\n{text}"


TEXTS: tuple[Callable[[str, random.Random], str | bytes], ...] = (
    _bomb,
    lambda text, draw: text.replace("trainer:", "x: &x {a: *x}\ntrainer:"),
    lambda text, draw: text.replace(
        "model:", draw.choice(["model: &m", "model: *m", "model: !!python/name:os.system"])
    ),
    lambda text, draw: (
        text + draw.choice(["model: 3\n", "trainer: {}\n", "seed_everything: 1\n", "<<: {a: 1}\n", "? [1]\n: 2\n"])
    ),
    lambda text, draw: text + "deep: " + "[" * draw.choice([50, 5000]) + "]" * draw.choice([50, 5000]) + "\n",
    lambda text, draw: text.replace("trainer:", "trainer:\n  max_steps: " + "9" * draw.choice([30, 5000])),
    lambda text, draw: text.encode(draw.choice(["utf-16", "utf-8-sig", "utf-32"])),
    lambda text, draw: text.replace("#", "# é").encode("latin-1", "replace"),
    lambda text, draw: bytes(draw.randrange(256) for _ in range(200)),
    lambda text, draw: text[: draw.randrange(len(text))],
    lambda text, draw: text.replace("\n", draw.choice(["\r\n", "\r", "\n\t", "\x85"])),
    lambda text, draw: draw.choice(
        ["", "[]", "model", "model: []", "model: zoo.selfsup.mae.MAEPretraining", "model: {}", "--- 1\n--- 2"]
    ),
    lambda text, draw: "".join(draw.sample(text.splitlines(keepends=True), len(text.splitlines()))),
    lambda text, draw: text.replace(draw.choice(":-[{ "), draw.choice(":-[{ &*!|>%@`"), draw.randrange(1, 4)),
)
OPTIONS = (
    *("--model=3", "--model=[]", "--data=evil.Task", "--model=evil.Task", "--data.options={a: *b}", "--trainer=null"),
    *(
        "--config=evil.py",
        "--config=.",
        "--config=/dev/zero",
        "--trainer.callbacks=[{class_path: evil.Task}]",
        "--lr=1",
    ),
    *(
        "--model.optim={}",
        "--seed_everything=" + "9" * 40,
        "--trainer.max_epochs=1e999",
        "--data.dataset=.",
        "--x.y.z=1",
    ),
    *("--data.dataset=\x00", "--model.init_args=3", "--model.class_path=os.system", "--trainer.devices=[" * 3, "--=3"),
)


def mutation(seed: int) -> tuple[str, bytes, list[str]]:
    """The recipe's name, the bytes of a mutated file, and options, all drawn from `seed`."""
    draw = random.Random(seed)
    base = draw.choice(BASES)
    text = catalog.recipe_path(base).read_text(encoding="utf-8")
    content: str | bytes = text
    kind = draw.random()
    if kind < 0.6:
        tree = yaml.safe_load(text)
        for _ in range(draw.choice([1, 1, 2, 4])):
            draw.choice(TREES)(tree, draw)
        content = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
    elif kind < 0.9:
        content = draw.choice(TEXTS)(text, draw)
    options = [draw.choice(OPTIONS)] if kind >= 0.9 or draw.random() < 0.1 else []
    return base, content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"), options


class TooLong(BaseException):
    """A mutation that went on beyond SECONDS."""


def _alarm(number: int, frame: Any) -> None:
    raise TooLong


def outcome(seed: int, folder: Path) -> tuple[str, str]:
    """("accepted" | "refused" | "traceback" | "hang" | "executed", detail) of one mutation, tried in `folder`."""
    _, content, options = mutation(seed)
    path = folder / f"{seed}.yaml"
    path.write_bytes(content)
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        built = build_dry("fit", path, options)
        assert isinstance(built, RecipeCLI)
        found = ("accepted", "")
    except ZooError as error:
        line = str(error)
        found = ("refused", line) if line and "\n" not in line and len(line) < 2000 else ("traceback", repr(line)[:300])
    except TooLong:
        found = ("hang", "".join(traceback.format_exc().splitlines(keepends=True)[-8:]))
    except BaseException:
        found = ("traceback", "".join(traceback.format_exc().splitlines(keepends=True)[-8:]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if (folder / "pwned").exists():
        (folder / "pwned").unlink()
        return "executed", "a file of the working folder was imported"
    return found


def run(seeds: range, folder: Path, show: bool = False) -> list[tuple[int, str, str]]:
    """The outcomes of mutations in an empty working folder with a trap; with `show`, what is wrong is printed."""
    (folder / "evil.py").write_text(TRAP)
    before, stdout = os.getcwd(), sys.stdout
    os.chdir(folder)
    sys.path.insert(0, "")
    found = []
    try:
        for seed in seeds:
            begin = time.monotonic()
            with torch.device("meta"):
                kind, detail = outcome(seed, folder)
            found.append((seed, kind, detail))
            if show and (kind not in ("accepted", "refused") or time.monotonic() - begin > 5):
                print(f"{seed} {kind} {time.monotonic() - begin:.1f} s\n{detail}", file=stdout, flush=True)
    finally:
        sys.path.remove("")
        os.chdir(before)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--lines", action="store_true", help="print each line of refusal")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(range(arguments.seed, arguments.seed + arguments.count), Path(folder), show=True)
    if arguments.lines:
        for seed, kind, detail in found:
            print(seed, kind, detail[:250])
    counts = Counter(kind for _, kind, _ in found)
    print(", ".join(f"{number} {kind}" for kind, number in counts.most_common()))
    return int(bool(counts.keys() - {"accepted", "refused"}))


if __name__ == "__main__":
    sys.exit(main())
