"""Windows of a map of tokens."""

from __future__ import annotations

import pytest
import torch

from zoo.ops.windows import joined, windows


@pytest.mark.parametrize(("size", "side"), [((6, 9), 3), ((5, 7), 3), ((2, 2), 4)])
def test_windows_and_back(size: tuple[int, int], side: int) -> None:
    x = torch.randn(2, *size, 5)
    cut = windows(x, side)
    rows, columns = (-(-n // side) for n in size)
    assert cut.shape == (2 * rows * columns, side, side, 5)
    assert torch.equal(cut[0][: size[0], : size[1]], x[0, :side, :side])
    assert torch.equal(joined(cut, size), x)
    assert cut.sum() == pytest.approx(float(x.sum()), abs=1e-4)  # what is filled up is zeros
