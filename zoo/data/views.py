"""Views of a picture for siamese networks whose sides see different ones; batches then hold `views` instead of `image`.

They are put together from the transforms of one view (:mod:`zoo.data.transforms`): :class:`Views` makes several of
them, :class:`ScaleMix` one of two, :class:`RandAugmented` a stronger one. Small pictures are changed a whole batch at a
time wherever all parts can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.data.transforms import ImageTransform
from zoo.errors import ZooError


class Views(ImageTransform):
    """One view, or several, by each of some transforms, in their order.

    Two views with different augmentations (BYOL, MoCo v3) are two transforms; MultiCrop is a transform of large crops
    and one of small ones with a `size` of its own, `counts` [1, 6] or [2, 6].

    Args:
        transforms: each makes one view of a picture.
        counts: how many views each makes; by default one.

    Raises:
        ZooError: no transform, or not one positive count for each.
    """

    def __init__(self, transforms: list[ImageTransform], counts: list[int] | None = None) -> None:
        super().__init__()
        self.counts = [1] * len(transforms) if counts is None else list(counts)
        if not transforms or len(self.counts) != len(transforms) or min(self.counts) < 1:
            raise ZooError(
                f"Views wants one transform or more, and one positive count for each; got {len(transforms)} and"
                f" {self.counts}"
            )
        self.transforms = nn.ModuleList(transforms)
        self.random = any(bool(getattr(one, "random", True)) for one in transforms)
        self.foreign_random = any(bool(getattr(one, "foreign_random", True)) for one in transforms)
        self._takes: list[Any] = [getattr(one, "draws", None) for one in self._each()]
        self.draws = None if None in self._takes else sum(self._takes)

    def _each(self) -> list[Any]:
        """The transform of every view."""
        return [one for one, count in zip(self.transforms, self.counts, strict=True) for _ in range(count)]

    def forward(self, image: Tensor) -> list[Tensor]:
        return [one(image) for one in self._each()]

    def batch(self, images: Tensor, draws: Tensor) -> list[Tensor]:
        parts = draws.split(self._takes, dim=1)
        return [one.batch(images, part) for one, part in zip(self._each(), parts, strict=True)]


def scale_mix_boxes(height: int, width: int, lam: Tensor, centre: Tensor) -> Tensor:
    """(B, 4) int64 (top, left, bottom, right) of the boxes that ScaleMix pastes, clipped to the picture.

    A box has the share 1 - lam of the area. The half of its height is floor(W sqrt(1 - lam)) // 2: height and width are
    swapped, as they stand in the official code; pictures are square in training.

    Args:
        lam: (B,) in [0, 1].
        centre: (B, 2) whole numbers, the row below `width` and the column below `height`.
    """
    cut = (1 - lam).sqrt()
    extent = cut.new_tensor([width, height])
    half = (extent * cut[:, None]).long() // 2
    ends = torch.cat([centre.long() - half, centre.long() + half], dim=1)
    return ends.clamp(min=0).minimum(ends.new_tensor([width, height, width, height]))


def scale_mix(first: Tensor, second: Tensor, boxes: Tensor) -> Tensor:
    """Views `first` (B, C, H, W) with the `boxes` (B, 4) of views `second` pasted in at the same place."""
    down, right = (torch.arange(extent, device=first.device) for extent in first.shape[-2:])
    top, left, bottom, end = (boxes[:, k, None] for k in range(4))
    inside = ((down >= top) & (down < bottom))[:, :, None] & ((right >= left) & (right < end))[:, None]
    return torch.where(inside[:, None], second, first)


class ScaleMix(ImageTransform):
    """One view made of two of the same picture (Asym-Siam, arXiv 2204.00613): a box of the second, of random place and
    of a share of the area uniform in [0, 1], is pasted into the first.

    Args:
        transform: makes each of the two.
    """

    foreign_random = False

    def __init__(self, transform: ImageTransform) -> None:
        super().__init__()
        self.transform = transform
        self.foreign_random = bool(getattr(transform, "foreign_random", True))
        self._takes: Any = getattr(transform, "draws", None)
        self.draws = None if self._takes is None else 2 * self._takes + 3

    def forward(self, image: Tensor) -> Tensor:
        views = [self.transform(image)[None] for _ in range(2)]
        return self._mixed(views[0], views[1], torch.rand(1, 3))[0]

    def batch(self, images: Tensor, draws: Tensor) -> Tensor:
        first, second, rest = draws.split([self._takes, self._takes, 3], dim=1)
        transform: Any = self.transform
        return self._mixed(transform.batch(images, first), transform.batch(images, second), rest)

    @staticmethod
    def _mixed(first: Tensor, second: Tensor, draws: Tensor) -> Tensor:
        height, width = first.shape[-2:]
        centre = draws[:, 1:] * draws.new_tensor([width, height])
        return scale_mix(first, second, scale_mix_boxes(height, width, draws[:, 0], centre))


class RandAugmented(ImageTransform):
    """A view that RandAugment (timm's) changes further: the source's augmentation of AsymAug (Asym-Siam).

    Args:
        transform: of the view.
        policy: timm's name; its default is Asym-Siam's: two operations of magnitude 10, deviation 0.5.
        translate: the largest shift, in pixels; None: timm's share of the picture.
    """

    foreign_random = True

    def __init__(
        self, transform: ImageTransform, policy: str = "rand-m10-n2-mstd0.5", translate: int | None = 100
    ) -> None:
        super().__init__()
        from timm.data.auto_augment import rand_augment_transform

        self.transform = transform
        options: dict[str, Any] = {} if translate is None else {"translate_const": translate}
        try:
            self._augment = rand_augment_transform(policy, options)
        except (AssertionError, ValueError) as error:
            raise ZooError(f"timm knows no RandAugment policy {policy!r}") from error

    def forward(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

        return pil_to_tensor(self._augment(to_pil_image(self.transform(image))))
