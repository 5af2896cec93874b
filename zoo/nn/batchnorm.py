"""Batch normalisation whose statistics are those of a part of the batch, or of the batches of several processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from zoo.errors import ZooError
from zoo.ops.collective import gather_with_grad, sum_with_grad, world

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _in_splits(norm: nn.BatchNorm1d | nn.BatchNorm2d, splits: int, x: Tensor) -> Tensor:
    """Training's BatchNorm of features (N, C, ...), sample n with those of its split n mod S."""
    batch, channels, *places = x.shape
    if batch % splits:
        raise ZooError(f"a batch of {batch} cannot be split into {splits} parts: choose bn_splits that divides it")
    if batch == splits and not places:
        raise ZooError(
            f"{splits} parts of a batch of {batch} hold one sample each, which has no variance: lower bn_splits"
        )
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    mean, var = norm.running_mean.repeat(splits), norm.running_var.repeat(splits)
    parts = x.reshape(batch // splits, splits * channels, *places)
    weight, bias = norm.weight.repeat(splits), norm.bias.repeat(splits)
    y = batch_norm(parts, mean, var, weight, bias, True, norm.momentum or 0.0, norm.eps)
    with torch.no_grad():
        norm.running_mean.copy_(mean.view(splits, channels).mean(dim=0))
        norm.running_var.copy_(var.view(splits, channels).mean(dim=0))
        norm.num_batches_tracked.add_(1)
    return y.view(x.shape)


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
        return _in_splits(self, self.num_splits, x) if self.training else super().forward(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}"


class SplitBatchNorm1d(nn.BatchNorm1d):
    """As :class:`SplitBatchNorm`, of features (N, C).

    Args:
        num_features: channels C.
        num_splits: S; the batch must be a multiple of it.
    """

    def __init__(self, num_features: int, num_splits: int = 8) -> None:
        super().__init__(num_features)
        if num_splits < 1:
            raise ZooError(f"SplitBatchNorm1d wants num_splits of 1 or more, not {num_splits}")
        self.num_splits = num_splits

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C), normalised; raises as :meth:`SplitBatchNorm.forward`."""
        return _in_splits(self, self.num_splits, x) if self.training else super().forward(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}"


class GatheredBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d of features (N, C) over the batches of several processes, on any device; one process alone has an
    ordinary BatchNorm1d, whose parameter names it has. Features are gathered whole, so it is for heads, not for trunks
    (torch's SyncBatchNorm).

    Args:
        num_features: channels C.
        group_size: processes whose batches are one, ranks 0 to G - 1, G to 2 G - 1, ...; at most all of them.
    """

    def __init__(self, num_features: int, group_size: int = 8) -> None:
        super().__init__(num_features)
        if group_size < 1:
            raise ZooError(f"GatheredBatchNorm1d wants group_size of 1 or more, not {group_size}")
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C), normalised.

        Raises:
            ZooError: in training, processes that do not make whole groups.
        """
        rank, size = world()
        group = min(self.group_size, size)
        if not self.training or size == 1:
            return super().forward(x)
        if size % group:
            raise ZooError(f"{size} processes do not make groups of {group}: take a multiple")
        rows = gather_with_grad(x).chunk(size // group)[rank // group]
        return super().forward(rows).chunk(group)[rank % group]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def _over_processes(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> Tensor:
    """Training's BatchNorm of features (N, C, ...) over the batches of all processes, which may differ in length; with
    none at all the statistics stay as they are."""
    axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = sum_with_grad(torch.cat([wide.sum(axes), wide.new_tensor([x.numel() / x.shape[1]])]))
    count = sums[-1].detach()
    mean = sums[:-1] / count.clamp(min=1)
    centred = wide - mean.view(shape)
    var = sum_with_grad(centred.square().sum(axes)) / count.clamp(min=1)
    y = centred * (var + norm.eps).rsqrt().view(shape)
    if norm.affine:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            share *= bool(count)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
            norm.running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(norm.running_var.dtype), share)
    return y.to(x.dtype)


class ReducedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over the batches of all processes, on any device: what torch's SyncBatchNorm is on GPUs. Two sums are
    exchanged, of the features and of their squared distances to the mean."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, ...), normalised."""
        return _over_processes(self, x) if self.training and world()[1] > 1 else super().forward(x)


class ReducedBatchNorm2d(nn.BatchNorm2d):
    """As :class:`ReducedBatchNorm1d`, of maps (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W), normalised."""
        return _over_processes(self, x) if self.training and world()[1] > 1 else super().forward(x)


_REDUCED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: ReducedBatchNorm1d,
    nn.BatchNorm2d: ReducedBatchNorm2d,
}


def reduce_batch_norms(network: nn.Module) -> None:
    """Makes every BatchNorm1d and 2d inside `network` one over all processes, in place: the same module under another
    class. Those of a part of the batch (:class:`SplitBatchNorm`, :class:`GatheredBatchNorm1d`) stay."""
    for module in network.modules():
        module.__class__ = _REDUCED.get(type(module), type(module))


def restore_batch_norms(network: nn.Module) -> None:
    """Takes :func:`reduce_batch_norms` back."""
    plain = {reduced: kind for kind, reduced in _REDUCED.items()}
    for module in network.modules():
        module.__class__ = plain.get(type(module), type(module))
