"""What official code was written for and its libraries have dropped since."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
from timm.models import vision_transformer
from torch import nn


@contextlib.contextmanager
def as_in_2021() -> Iterator[None]:
    """`qk_scale` of timm's Block, and `np.float`."""
    block = vision_transformer.Block

    def old(*sizes: Any, qk_scale: None = None, **options: Any) -> nn.Module:
        return block(*sizes, **options)

    with patch.object(vision_transformer, "Block", old), patch.object(np, "float", float, create=True):
        yield
