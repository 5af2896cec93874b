"""What official code was written for and its libraries have dropped since."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
from timm.layers import to_2tuple
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


@contextlib.contextmanager
def as_in_timm_0_4() -> Iterator[None]:
    """`timm.models.layers.helpers`, and `num_tokens` of timm's VisionTransformer: those before the patches."""
    helpers: Any = ModuleType("timm.models.layers.helpers")
    helpers.to_2tuple = to_2tuple
    vit = vision_transformer.VisionTransformer
    with patch.dict(sys.modules, {helpers.__name__: helpers}), patch.object(vit, "num_tokens", 1, create=True):
        yield
