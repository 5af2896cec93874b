"""Batch normalisation whose statistics are those of a part of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from zoo.errors import ZooError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that normalises `num_splits` interleaved parts of a batch apart, as so many devices would.

    Sample n belongs to split n mod S. Running statistics become the mean of what each split alone would make of them;
    in evaluation it is an ordinary BatchNorm2d, whose parameter names it has (colab demo of the official MoCo code).

    Args:
        num_features: channels C.
        num_splits: S; the batch must be a multiple of it.
        eps, momentum: as of BatchNorm2d.
        device, dtype: of the parameters.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_splits: int = 8,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)
        if num_splits < 1:
            raise ZooError(f"SplitBatchNorm wants num_splits of 1 or more, not {num_splits}")
        self.num_splits = num_splits

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W), normalised.

        Raises:
            ZooError: in training, a batch that cannot be split evenly.
        """
        if not self.training:
            return super().forward(x)
        splits, (batch, channels, height, width) = self.num_splits, x.shape
        if batch % splits:
            raise ZooError(f"a batch of {batch} cannot be split into {splits} parts: choose bn_splits that divides it")
        mean, var = self.running_mean.repeat(splits), self.running_var.repeat(splits)
        parts = x.reshape(batch // splits, splits * channels, height, width)
        weight, bias = self.weight.repeat(splits), self.bias.repeat(splits)
        y = batch_norm(parts, mean, var, weight, bias, True, self.momentum or 0.0, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(mean.view(splits, channels).mean(dim=0))
            self.running_var.copy_(var.view(splits, channels).mean(dim=0))
            self.num_batches_tracked.add_(1)
        return y.view(batch, channels, height, width)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}"
