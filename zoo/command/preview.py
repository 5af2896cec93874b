"""``zoo preview``: what the model of a recipe will see, drawn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

_HELP = "draw what a model will see, before and after augmentation"
_ABOUT = (
    "Draws samples of a recipe's data as they are stored, as training changes them and as evaluation takes them, with"
    " labels, boxes, masks, keypoints and captions; views, clips and grids too. Seeded; no model is built."
)
_EXAMPLE = "example: zoo preview mae/pocket --data.dataset ./my_folder -o seen.png"


def add(commands: Any) -> None:
    """Adds the command to those of `zoo`."""
    one = commands.add_parser("preview", help=_HELP, description=_ABOUT, epilog=_EXAMPLE)
    one.add_argument("recipe", metavar="RECIPE", help="a recipe or row; its options may follow (zoo fit RECIPE --help)")
    one.add_argument("-o", "--out", metavar="FILE", type=Path, help="a .png; default: preview_RECIPE.png here")
    one.add_argument("--count", type=int, default=6, help="samples (6)")
    one.add_argument("--split", default="train", choices=["train", "val", "test", "predict"], help="of which split")
    one.set_defaults(do=run)


def run(arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Draws the recipe with its `options` as on the command line of a fit."""
    if not 1 <= arguments.count <= 64:
        raise ZooError(f"--count: 1 to 64 samples, not {arguments.count}")
    from zoo import catalog

    catalog.recipe_path(arguments.recipe)  # an unknown name must not wait for torch
    name = arguments.recipe.replace("/", "_").replace(":", "_").removesuffix(".yaml")
    out: Path = arguments.out or Path(f"preview_{name.lstrip('._')}.png")
    if out.suffix.lower() != ".png":
        raise ZooError(f"a preview is a .png, not {str(out)!r}")
    from torchvision.io import write_png

    from zoo import files
    from zoo.command import seen

    data = seen.data_of(arguments.recipe, options)
    sheet, said = seen.draw(data, arguments.split, arguments.count)
    with files.replacing(out) as part:
        write_png(sheet, str(part))
    print(f"{out}: {said}")
    return 0
