"""What this machine can do."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


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
