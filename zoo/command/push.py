"""`zoo push`: a run as a model on a hub, or in a folder. Imports no torch until it works."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoo.command.common import use_ema_option

EXAMPLE = "example: zoo push runs:last hf://me/my-model --dry-run"


def add(commands: Any) -> None:
    """Adds the command to those of `zoo`."""
    one = commands.add_parser(
        "push",
        help="a run as a model on a hub: zoo push runs:last hf://org/name",
        description="Write a run's weights (safetensors), how it is loaded and a model card, to a hub or a folder."
        " zoo.create_model and zoo.create_preprocess read it by that name.",
        epilog=EXAMPLE,
    )
    one.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint, runs:last")
    one.add_argument("target", metavar="hf://ORG/NAME|FOLDER")
    one.add_argument("--dry-run", "--dry_run", action="store_true", help="show the card and the files; send nothing")
    one.add_argument("--private", action="store_true", help="a repository that is made is a private one")
    one.add_argument("--licence", help="such as apache-2.0 (default: that of the published weights it started from)")
    use_ema_option(one, "of the run")
    one.set_defaults(do=run)


def run(arguments: argparse.Namespace, extra: list[str]) -> int:
    import tempfile

    from zoo.errors import ZooError
    from zoo.weights.runs import is_pushed, is_run, open_run

    name, target = arguments.run, arguments.target
    if not is_run(name) or is_pushed(name):
        raise ZooError(f"zoo push takes a run of yours, such as runs:last or a checkpoint, not {name!r}")
    remote = target.startswith("hf://")
    if remote and (not is_pushed(target) or "@" in target):
        raise ZooError(f"a model on the hub is hf://org/name, not {target!r}")
    if arguments.private and not remote:
        raise ZooError("--private is of a repository on the hub")
    from zoo.weights import hub

    model = open_run(name, arguments.use_ema)
    if not remote and not arguments.dry_run:
        _say(hub.write(model, target, arguments.licence))
        print(f'load it: zoo.create_model("{target}")')
        return 0
    with tempfile.TemporaryDirectory(prefix="zoo-") as place:
        folder = hub.write(model, Path(place) / "model", arguments.licence, target)
        _say(folder, target)
        if arguments.dry_run:
            print(f"\n{(folder / hub.CARD).read_text(encoding='utf-8')}")
            print("nothing was sent")
            return 0
        print(hub.send(folder, target, arguments.private))
    print(f'load it: zoo.create_model("{target}")')
    return 0


def _say(folder: Path, where: Any = None) -> None:
    for path in sorted(folder.iterdir()):
        print(f"{where or folder}/{path.name}: {path.stat().st_size / 1e6:,.3f} MB")
