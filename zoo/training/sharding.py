"""Training sharded over devices: each holds a share of weights, gradients and optimiser state (PyTorch's FSDP2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def shard(task: nn.Module, mesh: Any) -> None:
    """Shards a task over the devices of `mesh`, in place: each block of a list named `blocks` by itself, so that only
    one is whole at a time, and the rest together, which is whole during a step."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    blocks = [
        block
        for name, module in task.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "blocks"
        for block in module
    ]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(task, mesh=mesh)
    for name in _STEPS:
        register_fsdp_forward_method(task, name)


def is_sharded(value: Any) -> bool:
    """Whether this process holds a share of `value` only."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """`value` in full; call it on every process."""
    shared: Any = value
    return shared.full_tensor() if is_sharded(value) else value


def share_like(value: Tensor, like: Tensor) -> Tensor:
    """The share of a whole `value` that this process holds of `like`, on its device."""
    if not is_sharded(like) or is_sharded(value):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
