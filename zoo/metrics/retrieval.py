"""Image-text retrieval in both directions, with any number of captions an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from zoo.errors import ZooError
from zoo.metrics.gathered import Gathered


def ranks(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Where each query's best true item stands among M: how many wrong ones are above it, how many tie with it, (N,).

    True items do not stand in each other's way. `scores` (N, M), `positive` (N, M) bool.
    """
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    wrong = ~positive
    return ((scores > best) & wrong).sum(dim=1), ((scores == best) & wrong).sum(dim=1)


def recall(above: Tensor, level: Tensor, k: int) -> Tensor:
    """The chance (N,) that each best true item is among the first `k`, any order of those that tie being as likely: so
    equal scores are chance and not a hit."""
    return ((k - above) / (level + 1)).clamp(0, 1)


class ImageTextRetrieval(Gathered):
    """R@k (fractions) and the median rank (from 1), from images to texts and back.

    An image finds any of its texts, a text its one image. Every process gives its share; features are gathered before
    they meet, and an image or text that came twice (by number) counts once.

    Args:
        k: the depths of R@k.
        chunk: queries ranked at a time.

    Returns (compute): {"image_to_text_r1", ..., "image_to_text_median", "text_to_image_r1", ...}.
    """

    higher_is_better = None  # R@k is, the median rank is not
    sample = "image"
    image_features: list[Tensor]
    image_numbers: list[Tensor]
    text_features: list[Tensor]
    text_owners: list[Tensor]
    text_places: list[Tensor]

    def __init__(self, k: tuple[int, ...] = (1, 5, 10), chunk: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not k or min(k) < 1 or chunk < 1:
            raise ZooError(f"retrieval wants depths k and a chunk of 1 or more, got {k} and {chunk}")
        self.k, self.chunk = tuple(k), chunk
        for name in ("image_features", "image_numbers", "text_features", "text_owners", "text_places"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, numbers: Tensor, texts: Tensor, owners: Tensor) -> None:
        """Adds images (B, D) with their `numbers` (B,), and texts (M, D) with the number of each one's image (M,).

        All texts of an image must come in one update.
        """
        self._count()
        self.image_features.append(images)
        self.image_numbers.append(numbers)
        self.text_features.append(texts)
        self.text_owners.append(owners)
        # The place of a text among those of its image tells it from them.
        same = owners[:, None] == owners
        self.text_places.append(same.tril(-1).sum(dim=1))

    def compute(self) -> dict[str, Tensor]:
        self._require()
        numbers, owners = dim_zero_cat(self.image_numbers), dim_zero_cat(self.text_owners)
        places = dim_zero_cat(self.text_places)
        image_once = _first_of_each(numbers)
        text_once = _first_of_each(owners * (int(places.max()) + 1) + places)
        images, numbers = dim_zero_cat(self.image_features)[image_once], numbers[image_once]
        texts, owners = dim_zero_cat(self.text_features)[text_once], owners[text_once]
        if images.isnan().any() or texts.isnan().any():
            raise ZooError("retrieval got features that are not numbers (NaN)")
        if not torch.isin(owners, numbers).all() or not torch.isin(numbers, owners).all():
            raise ZooError("retrieval wants a text for every image and an image for every text")
        found: dict[str, Tensor] = {}
        for name, query, query_of, item, item_of in (
            ("image_to_text", images, numbers, texts, owners),
            ("text_to_image", texts, owners, images, numbers),
        ):
            parts = [
                ranks(part @ item.T, of[:, None] == item_of)
                for part, of in zip(query.split(self.chunk), query_of.split(self.chunk), strict=True)
            ]
            above, level = (torch.cat(part) for part in zip(*parts, strict=True))
            found |= {f"{name}_r{k}": recall(above, level, k).mean() for k in self.k}
            found[f"{name}_median"] = (above + level / 2).median() + 1  # a tie counts half, its expected place
        return found


def _first_of_each(numbers: Tensor) -> Tensor:
    """Where each number occurs first, in ascending order of the numbers."""
    order = numbers.argsort(stable=True)
    ascending = numbers[order]
    fresh = torch.ones_like(ascending, dtype=torch.bool)
    fresh[1:] = ascending[1:] != ascending[:-1]
    return order[fresh]
