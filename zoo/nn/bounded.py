"""A bound on the size of networks that someone else's settings describe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from zoo.errors import ZooError


@contextlib.contextmanager
def bounded_networks(most: int = 30_000) -> Iterator[None]:
    """A network of absurd size ends in a ZooError while it is built: of more parts than any real one (a ResNet-1001 has
    9,000 layers, parameters and buffers), or of more bytes than the machine has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count, size = 0, 0

    def one_more(module: torch.nn.Module, name: str, part: Any) -> None:
        nonlocal count, size
        count += 1
        if isinstance(part, torch.Tensor) and not part.is_meta:
            size += part.numel() * part.element_size()
        if count > most:
            raise ZooError(f"the network has more than {most:,} layers and parameters: see its depth and the like")
        if size > memory:
            raise ZooError(
                f"the network has more than {memory / 2**30:.0f} GB of parameters, more than this machine has"
            )

    made = torch.nn.modules.module
    hooks = [
        made.register_module_module_registration_hook(one_more),
        made.register_module_parameter_registration_hook(one_more),
        made.register_module_buffer_registration_hook(one_more),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
