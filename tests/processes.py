"""Several processes of one run, forked from the test's, which has imported all that they need."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _one(rank: int, world: int, port: int, out: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        found: Any = work(*arguments)
    except BaseException:
        (out / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # the others would wait for this one
    torch.save(found, out / f"{rank}.pt")
    os._exit(0)


def in_processes(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of `world` processes, tensors and plain types, in the order of the ranks.

    Lightning takes them for the processes of one run: trainers want `devices=world, strategy="ddp"` on the CPU.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(folder)
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_one, args=(rank, world, port, out, work, arguments)) for rank in range(world)]
        for process in ranks:
            process.start()
        try:
            while any(process.is_alive() for process in ranks):
                for process in ranks:
                    process.join(0.05 if process.is_alive() else 0)
                if any(process.exitcode for process in ranks):
                    break
        finally:
            for process in ranks:
                process.kill()
                process.join()
        errors = [path.read_text() for path in sorted(out.glob("*.error"))]
        assert not errors, "\n".join(errors)
        assert not any(process.exitcode for process in ranks), "a process died"
        return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world)]
