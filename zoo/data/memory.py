"""Small sets in memory: their pictures stay as bytes once they are read, so that training never waits for a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.data.sources import ManyReader, MemorySource, Part, Source, file_of

SMALL = 64
"""Pixels: up to this side pictures are held in memory and changed a whole batch at a time."""
_ROOM = 1 << 30  # bytes that one split may take


class HeldSource:
    """A source whose samples are kept once they were read: all pictures of one size, uint8 (3, H, W)."""

    def __init__(self, source: Source, size: tuple[int, int]) -> None:
        self.source, self.class_names = source, source.class_names
        with torch.inference_mode(False):  # an evaluation may come first, and training writes into them too
            self._images = torch.empty(len(source), 3, *size, dtype=torch.uint8)  # takes no room before it is written
            self._known = torch.zeros(len(source), dtype=torch.bool)
        self._facts: list[dict[str, Any]] = [{} for _ in range(len(source))]

    def name(self, index: int) -> str | None:
        """The file of a sample, where it has one."""
        return file_of(self.source, index)

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {key: value[0] for key, value in self.read_many([index]).items()}
        return {**sample, "label": int(sample["label"])}

    def keep(self, index: int, image: Tensor, **facts: Any) -> None:
        """Take in a sample."""
        self._images[index], self._facts[index], self._known[index] = image, facts, True

    def read_many(self, indices: Sequence[int]) -> dict[str, Any]:
        """{"image": (n, 3, H, W), "label": (n,)} and what else the source tells, as lists."""
        at = torch.as_tensor(indices, dtype=torch.long)
        fresh = at[~self._known[at]].unique().tolist()
        if fresh:
            assert isinstance(self.source, ManyReader)
            many: dict[str, Any] = self.source.read_many(fresh)
            for place, index in enumerate(fresh):
                facts = {key: value[place] for key, value in many.items() if key != "image"}
                self.keep(index, many["image"][place], **facts)
        kept = [self._facts[index] for index in at.tolist()]
        facts = {key: [one[key] for one in kept] for key in kept[0]} if kept else {}
        return {"image": self._images[at], **facts, "label": torch.tensor([int(one["label"]) for one in kept])}


def hold(source: Source) -> Source:
    """The source, held in memory if its pictures are small, of one size and not too many.

    Files are decoded at once, in this process; what is drawn is kept as it comes.
    """
    inner = source.source if isinstance(source, Part) else source
    if isinstance(inner, MemorySource) or not len(source):
        return source
    first = source.read_many([0])["image"][0] if isinstance(source, ManyReader) else source[0]["image"]
    height, width = first.shape[-2:]
    if max(height, width) > SMALL or first.dtype != torch.uint8 or len(source) * 3 * height * width > _ROOM:
        return source
    held = HeldSource(source, (height, width))
    if not isinstance(source, ManyReader):
        for index in range(len(source)):
            sample = source[index]
            if sample["image"].shape[-2:] != first.shape[-2:]:
                return source
            held.keep(index, **sample)
    return held
