"""Batch normalisation over processes without a GPU."""

from __future__ import annotations

from lightning.pytorch.plugins import LayerSync
from torch import nn

from zoo.nn.batchnorm import reduce_batch_norms, restore_batch_norms


class SyncBatchNorm(LayerSync):
    """What `trainer.sync_batchnorm: true` does on GPUs, on any device: `--trainer.sync_batchnorm false
    --trainer.plugins zoo.training.SyncBatchNorm`. Several processes then train as one does that sees all their batches.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        reduce_batch_norms(model)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        restore_batch_norms(model)
        return model
