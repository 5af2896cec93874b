"""How well a task fills in what it masks: a callback for masked autoencoders of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError

from zoo.errors import ZooError
from zoo.metrics.sharpness import GradientRatio
from zoo.nn.perceptual import FrozenNetwork, load_lpips


class Inpainting(L.Callback):
    """Logs of what the task fills in for the first `num_samples` evaluation samples: `{val,test}/inpaint_mse`, the mean
    squared error of hidden pixels, in the units of the normalised input; `/inpaint_gradients`, their
    :class:`~zoo.metrics.sharpness.GradientRatio`; and with `lpips` `/inpaint_lpips`, of whole images.

    For tasks whose `predict_step` gives {"masked", "reconstruction"}, both like the input `image` or `video`; hidden is
    what `masked` does not share with it. Each sample counts once on any number of processes.

    Args:
        num_samples: those with a smaller index are filled in.
        every_n_epochs: epochs of training between two measurements.
        lpips: also LPIPS on VGG-16, of images.
        vgg: the file of VGG-16; null: from the cache, or downloaded.

    Raises:
        ZooError: numbers below 1; a task or input that does not fit; missing weights of LPIPS.
    """

    def __init__(
        self, num_samples: int = 256, every_n_epochs: int = 1, lpips: bool = False, vgg: str | None = None
    ) -> None:
        if num_samples < 1 or every_n_epochs < 1:
            raise ZooError(f"num_samples and every_n_epochs must be 1 or more, got {num_samples} and {every_n_epochs}")
        self.num_samples, self.every_n_epochs = num_samples, every_n_epochs
        self.lpips = FrozenNetwork(partial(load_lpips, vgg)) if lpips else None
        self._metrics: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.lpips is not None and stage != "predict":
            self.lpips.check()

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        skipped = trainer.sanity_checking or (fitting and (trainer.current_epoch + 1) % self.every_n_epochs)
        metrics: dict[str, Any] = {"mse": MeanSquaredError(), "gradients": GradientRatio()}
        if self.lpips is not None:
            metrics["lpips"] = MeanMetric()
        self._metrics = None if skipped else {name: metric.to(pl_module.device) for name, metric in metrics.items()}

    on_validation_epoch_start = on_test_epoch_start = _start

    def _update(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._metrics is None or "index" not in batch:
            return
        chosen = batch["index"] < self.num_samples
        if not chosen.any():
            return
        some = {key: value[chosen] for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            filled = pl_module.predict_step(some, batch_idx)
        if not (isinstance(filled, Mapping) and {"masked", "reconstruction"} <= filled.keys()):
            raise ZooError(f"{type(pl_module).__name__} fills nothing in: its predict_step gives no reconstruction")
        true = some["image" if "image" in some else "video"]
        guess = filled["reconstruction"].to(true.dtype)
        hidden = (filled["masked"] != true).any(dim=1, keepdim=True)
        everywhere = hidden.expand_as(true)
        self._metrics["mse"].update(guess[everywhere], true[everywhere])
        self._metrics["gradients"].update(guess, true, hidden)
        if self.lpips is not None:
            if true.ndim != 4:
                raise ZooError("inpaint_lpips is of images; leave lpips out for clips")
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            mean, std = (true.new_tensor(v)[:, None, None] for v in (data.mean, data.std))
            pair = ((x * std + mean) * 2 - 1 for x in (guess, true))
            self._metrics["lpips"].update(self.lpips.net(true.device)(*pair))

    on_validation_batch_end = on_test_batch_end = _update

    def _log(self, pl_module: L.LightningModule, split: str) -> None:
        for name, metric in (self._metrics or {}).items():
            pl_module.log(f"{split}/inpaint_{name}", metric.compute().float())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module, "test")
