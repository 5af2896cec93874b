"""Heads of siamese networks: the layers and names of the official ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zoo.errors import ZooError
from zoo.nn.projector import mlp_head

KINDS = {nn.Linear: "L", nn.BatchNorm1d: "B", nn.ReLU: "R"}


@pytest.mark.parametrize(
    ("widths", "options", "layers", "biases"),
    [
        ([8, 8, 8, 4], {"output_norm": "plain", "output_bias": True}, "LBRLBRLB", [0, 0, 1]),  # SimSiam
        ([8, 2, 8], {"output_bias": True}, "LBRL", [0, 1]),
        ([8, 6, 6, 4], {"output_norm": "plain"}, "LBRLBRLB", [0, 0, 0]),  # MoCo v3
        ([8, 6, 4], {}, "LBRL", [0, 0]),
        ([8, 8, 8, 4], {"norm": [True, False], "bias": True}, "LBRLRL", [1, 1, 1]),  # Asym-Siam
        ([8, 8, 4], {"norm": False}, "LRL", [1, 0]),
        ([8, 4], {"output_norm": "affine"}, "LB", [0]),
        ([8, 4], {}, "L", [1]),
    ],
)
def test_layers_and_biases(widths: list[int], options: dict[str, Any], layers: str, biases: list[int]) -> None:
    head = mlp_head(widths, **options)
    assert "".join(KINDS[type(layer)] for layer in head) == layers
    assert [layer.bias is not None for layer in head if isinstance(layer, nn.Linear)] == biases
    if isinstance(head[-1], nn.BatchNorm1d):
        assert head[-1].affine == (options["output_norm"] == "affine")
    assert head(torch.randn(5, widths[0])).shape == (5, widths[-1])


@pytest.mark.parametrize(("widths", "norm"), [([8], True), ([8, 8, 4], [True, True]), ([8, 0, 4], True)])
def test_nonsense_is_refused(widths: list[int], norm: Any) -> None:
    with pytest.raises(ZooError, match="a head wants"):
        mlp_head(widths, norm)
