"""What a measurement has to say about the machine and the libraries it ran on. No names of hosts or users."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zoo.machine import cpu

ROOT = Path(__file__).resolve().parents[1]


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment(*packages: str) -> dict[str, Any]:
    """Machine, versions and load: everything a reader needs to judge a number, nothing that names the machine.

    `load` is the one-minute load average per core before the measurement; above about 1.0 others were computing too.
    """
    import torch

    import zoo

    names = ("torch", "torchvision", "lightning", "timm", "numpy", *packages)
    load = round(os.getloadavg()[0] / (os.cpu_count() or 1), 2) if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "system": platform.system(),
        "cpu": cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": load,
        "versions": {"zoo": zoo.__version__, **{name: v for name in names if (v := package_version(name))}},
    }


def command_line() -> str:
    """The command that was given, as a reader would type it from the root of a checkout; folders by their last name."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", name, *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])])
