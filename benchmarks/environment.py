"""Where a benchmark's checkout lies, and the command it was started by."""

from __future__ import annotations

import sys
from pathlib import Path

from zoo.machine import environment, package_version

__all__ = ["ROOT", "command_line", "environment", "package_version"]
ROOT = Path(__file__).resolve().parents[1]


def command_line() -> str:
    """The command that was given, as a reader would type it from the root of a checkout; folders by their last name."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", name, *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])])
