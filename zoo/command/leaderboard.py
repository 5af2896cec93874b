"""``zoo leaderboard``: published and measured numbers side by side, on the terminal, as Markdown, as pages."""

from __future__ import annotations

import argparse
from typing import Any

from zoo import files
from zoo.command.common import print_json
from zoo.errors import ZooError

_HELP = "published and measured numbers side by side, also as pages"
_ABOUT = "Published and measured numbers side by side: on the terminal, as Markdown, or as pages of all that is known."
_EXAMPLE = "example: zoo leaderboard mae; zoo leaderboard --html board, then open board/index.html"


def add(commands: Any) -> None:
    """Adds the command to those of `zoo`."""
    one = commands.add_parser("leaderboard", help=_HELP, description=_ABOUT, epilog=_EXAMPLE)
    one.add_argument("paper", nargs="?", help="only this one's rows")
    one.add_argument("--results", metavar="FOLDER", help="show your own tests of rows that lie there too: runs")
    form = one.add_mutually_exclusive_group()
    form.add_argument("--markdown", metavar="FILE")
    form.add_argument("--html", metavar="FOLDER", help="an index with search, and a page a paper; needs no network")
    form.add_argument("--json", action="store_true")
    one.add_argument("--parity", metavar="FILE", help="--html: count the verdicts of zoo parity --json > FILE")
    one.set_defaults(do=run)


def run(arguments: argparse.Namespace, extra: list[str]) -> int:
    if arguments.parity and not arguments.html:
        raise ZooError("--parity goes with --html FOLDER")
    from zoo.command import show

    rows = show.leaderboard(arguments.paper, arguments.results)
    if arguments.json:
        return print_json(rows)
    if arguments.markdown:
        files.write_text(arguments.markdown, show.markdown(rows))
        print(f"{arguments.markdown}: {len(rows)} rows")
    elif arguments.html:
        from zoo.pages import leaderboard

        verdicts = leaderboard.read_verdicts(arguments.parity) if arguments.parity else None
        index, *papers = leaderboard.write(arguments.html, rows, verdicts)
        print(f"{index}: {len(rows)} rows of {len(papers)} papers")
    else:
        show.print_leaderboard(rows)
    return 0
