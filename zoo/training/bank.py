"""Samples kept of past batches, by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown

Dtype = Literal["float32", "float16", "uint8"]


class SampleBank:
    """The last so many samples of each class : a ring for each, on the CPU. A task keeps its
    :meth:`state` in its checkpoints; no part of it is a parameter or a buffer.

    Args:
        num_classes: rings.
        size: samples in each.
        dtype: in which they are kept; of "uint8", values in [-1, 1] in 255 steps.
    """

    def __init__(self, num_classes: int, size: int, dtype: Dtype = "float32") -> None:
        if dtype not in get_args(Dtype):
            raise unknown("dtype of a bank", dtype, get_args(Dtype))
        if min(num_classes, size) < 1:
            raise ZooError("a bank of samples wants one class and one sample at least")
        self.size, self.dtype = size, dtype
        self.samples: Tensor | None = None  # (K, size, ...)
        self.pointer, self.count = torch.zeros(2, num_classes, dtype=torch.long)

    def push(self, samples: Tensor, labels: Tensor) -> None:
        """Samples (B, ...) of classes (B,) take the place of the oldest, in their order.

        Raises:
            ZooError: one is not finite; it would stay.
        """
        if self.samples is None:
            kind = getattr(torch, self.dtype)
            self.samples = torch.zeros(len(self.count), self.size, *samples.shape[1:], dtype=kind)
        samples, labels = samples.detach().cpu(), labels.cpu()
        if not samples.isfinite().all():
            raise ZooError("an image is not finite; it does not enter the bank of samples")
        order = labels.argsort(stable=True)
        sorted_labels, new = labels[order], labels.bincount(minlength=len(self.count))
        nth = torch.arange(len(labels)) - (new.cumsum(0) - new)[sorted_labels]  # of those of its class
        place = (self.pointer[sorted_labels] + nth) % self.size
        kept = nth >= new[sorted_labels] - self.size
        if self.dtype == "uint8":
            samples = ((samples + 1) * 127.5).round_().clamp_(0, 255)
        self.samples[sorted_labels[kept], place[kept]] = samples[order[kept]].to(self.samples.dtype)
        self.pointer = (self.pointer + new) % self.size
        self.count = (self.count + new).clamp_max(self.size)

    def draw(self, labels: Tensor, count: int) -> Tensor:
        """`count` samples (B, count, ...) of each class of (B,), float32 at least: no sample twice, unless there are
        fewer. The draws are of the CPU's global generator.

        Raises:
            ZooError: nothing of a class was pushed yet.
        """
        rows = []
        for label in labels.tolist():
            if self.samples is None or not (there := int(self.count[label])):
                raise ZooError(f"the bank holds no sample of class {label} yet")
            rows.append(torch.randperm(there)[:count] if there >= count else torch.randint(there, (count,)))
        assert self.samples is not None
        found = self.samples[labels.cpu()[:, None], torch.stack(rows)]
        return (found.float() - 127.5) / 127.5 if self.dtype == "uint8" else found.float()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the samples that there are, one after another."""
        held = {} if self.samples is None else {"samples": self.samples[self._filled()]}
        return {**held, "pointer": self.pointer, "count": self.count, "size": torch.tensor(self.size)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes up a state.

        Raises:
            ZooError: it is of a bank of another size.
        """
        if len(state["count"]) != len(self.count) or int(state["size"]) != self.size:
            raise ZooError("the checkpoint's bank of samples is of another size: keep num_classes and model.banks")
        self.pointer, self.count = state["pointer"].clone(), state["count"].clone()
        if (samples := state.get("samples")) is not None:
            self.samples = samples.new_zeros(len(self.count), self.size, *samples.shape[1:])
            self.samples[self._filled()] = samples

    def _filled(self) -> Tensor:
        return torch.arange(self.size) < self.count[:, None]


@dataclass(frozen=True)
class Banks:
    """Samples that are kept of each class, and of all classes together.

    Args:
        size: of each class.
        unconditional: of all together.
        dtype: "float32", "float16", or for pictures in [-1, 1] "uint8", a quarter of the memory (exact where they were
            bytes).
    """

    size: int = 128
    unconditional: int = 1000
    dtype: Dtype = "float32"

    def make(self, num_classes: int) -> tuple[SampleBank, SampleBank]:
        """The bank of each class, and the one of all."""
        return SampleBank(num_classes, self.size, self.dtype), SampleBank(1, self.unconditional, self.dtype)
