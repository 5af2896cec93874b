"""What this machine can do, and what a measurement says about it. No names of hosts or users."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")

# How the names begin of what is logged of the machine and not of the training.
OF_THE_MACHINE = ("time/", "speed/", "memory/")


@cache
def cpu() -> dict[str, Any]:
    """The processor's kind, the cores this process may use and the vector instructions that decide its speed."""
    info = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "kind": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "instructions": [name for name in _INSTRUCTION_SETS if name in flags],
    }


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 numbers itself; without that, half precision is slower than float32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu()["instructions"])


def peak_memory(device: Any = "cpu") -> int | None:
    """The most bytes that this process has held so far: of a GPU's memory as torch gave it out, elsewhere of the
    machine's. None where the system does not tell (Windows)."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_of(name: str | None) -> Any:
    """The torch device of a name such as cpu, cuda or cuda:1; None or "auto": the GPU where there is one.

    Raises:
        ZooError: no such device here.
    """
    import torch

    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ZooError(f"--device is cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ZooError(f"--device {name}: torch sees no GPU here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ZooError(f"--device {name}: torch sees {torch.cuda.device_count()} of them here")
    return device


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def versions() -> dict[str, str]:
    """What a set of weights was made with: Python, zoo and the packages that compute."""
    import zoo

    names = ("torch", "torchvision", "lightning", "numpy")
    return {"zoo": zoo.__version__, "python": platform.python_version()} | {
        name: found for name in names if (found := package_version(name))
    }


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
