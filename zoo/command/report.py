"""``zoo report``: the page of a run made anew, or several runs compared."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "a run's page made anew, or several runs compared on a page"
EXAMPLE = "example: zoo report runs:last; zoo report runs/mae/pocket/A runs/mae/pocket/B -o compared.html"


def add_options(one: argparse.ArgumentParser) -> None:
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
