"""``zoo report``: the page of a run made anew, or several runs compared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_HELP = "a run's page made anew, or several runs compared on a page"
_ABOUT = (
    "Writes the page that a fit or test ends in: curves, costs, what errs most, pictures, settings, commands. Several"
    " runs are compared on one page. One file, no network."
)
_EXAMPLE = "example: zoo report runs:last; zoo report runs/mae/pocket/A runs/mae/pocket/B -o compared.html"


def add(commands: Any) -> None:
    """Adds the command to those of `zoo`."""
    one = commands.add_parser("report", help=_HELP, description=_ABOUT, epilog=_EXAMPLE)
    one.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, a checkpoint in it, or runs:last")
    one.add_argument(
        "-o", "--out", metavar="FILE", type=Path, help="default: RUN/report.html; several: comparison.html"
    )
    one.set_defaults(do=run)


def run(arguments: argparse.Namespace, extra: list[str]) -> int:
    from zoo.errors import ZooError
    from zoo.pages import report
    from zoo.pages.run import find

    out: Path | None = arguments.out
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise ZooError(f"a report is a page: -o FILE.html, not {str(out)!r}")
    folders = [find(name) for name in arguments.runs]
    if len(folders) == 1:
        print(report.write(folders[0], out))
    else:
        print(report.write_comparison(folders, out or Path("comparison.html")))
    return 0
