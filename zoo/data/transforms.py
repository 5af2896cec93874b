"""Image transforms: modules from one uint8 (C, H, W) picture to another, named by class path in a recipe.

They draw from torch's default generator (RandAugment and erasing also from Python's and NumPy's), which the data module
seeds for each sample; the crops themselves are pure functions of their draws. ``size=None`` is the data module's
`image_size`; a transform used alone then takes 224. The data module normalises after the transform; what must come
after that (random erasing) a transform offers as ``after_normalize``. Any torchvision v2 transform on uint8 tensors
serves too.

Small pictures of one size are changed a whole batch at a time: a transform says in `draws` how many numbers it takes
for each, and its :meth:`~ImageTransform.batch` does to many what it does to one (:mod:`zoo.data.batches`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from zoo.data import batches
from zoo.errors import ZooError, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
_KERNELS = ("pillow", "torch7", "tensorflow", "tensorflow_v1")
_CROP_MODES = ("center", "squash", "border", "square")


# ------------------------------------------------------------------------------------------------------- pure functions


def resize(image: Tensor, size: tuple[int, int], interpolation: str = "bicubic", kernel: str = "pillow") -> Tensor:
    """Resize uint8 (..., C, H, W) pictures to (height, width); (..., C, *size) uint8.

    Args:
        kernel: whose resize it is. "pillow" is antialiased; "torch7", "tensorflow" and "tensorflow_v1" are bicubic
            without antialiasing (:func:`cubic_taps`).
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if kernel == "pillow":
        antialias, several = interpolation != "nearest", image.ndim > 3
        resized = interpolate(image if several else image[None], size=size, mode=interpolation, antialias=antialias)
        return resized if several else resized[0]
    pixels = image.to(torch.float32)
    for length in size:  # rows, which lie in one piece; then the columns as rows
        if pixels.shape[-2] != length:
            places, weights = cubic_taps(pixels.shape[-2], length, kernel)
            taps = [pixels.index_select(-2, at) for at in places.unbind(1)]
            pixels = taps[0].mul_(weights[:, :1])
            for k in (1, 2, 3):
                pixels.addcmul_(taps[k], weights[:, k : k + 1])
        pixels = pixels.transpose(-1, -2).contiguous()
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def cubic_taps(length: int, size: int, kernel: str) -> tuple[Tensor, Tensor]:
    """Which four pixels of a row of `length` make each of `size` pixels, (size, 4), and their weights, (size, 4).

    Keys' cubic convolution (1981), not widened where the picture shrinks. "torch7" is Torch7's ``image.scale``: the
    middles of the outermost pixels stay where they are, a row goes on linearly beyond its ends, a = -1/2. "tensorflow"
    is ``tf.image.resize``: the edges stay where they are, what lies beyond has no weight, a = -1/2. "tensorflow_v1" is
    ``tf.compat.v1.image.resize_bicubic``: the middle of the first pixel stays where it is, the outermost pixels are
    repeated, a = -3/4. Both read their weights from a table of 1,024 steps between pixels.
    """
    steps = torch.arange(size, dtype=torch.float64)
    if kernel == "torch7":
        at = steps * ((length - 1) / max(1, size - 1))
        at[-1] = length - 1
        first = at.floor().clamp(max=max(0, length - 2))
    else:
        at = (steps + 0.5) * (length / size) - 0.5 if kernel == "tensorflow" else steps * (length / size)
        first = at.floor()
        at = first + ((at - first) * 1024).round() / 1024
    places = first[:, None].long() + torch.arange(-1, 3)
    away, a = (at[:, None] - places).abs(), -0.75 if kernel == "tensorflow_v1" else -0.5
    near, far = ((a + 2) * away - (a + 3)) * away * away + 1, a * (((away - 5) * away + 8) * away - 4)
    weights = torch.where(away < 1, near, far)
    outside = (places < 0) | (places >= length)
    if kernel == "torch7":
        before, behind = weights[:, 0] * outside[:, 0], weights[:, 3] * outside[:, 3]
        weights[:, 1] += 2 * before - behind
        weights[:, 2] += 2 * behind - before
    if kernel != "tensorflow_v1":
        weights = weights.masked_fill(outside, 0)
        weights = weights / weights.sum(dim=1, keepdim=True)
    return places.clamp(0, length - 1), weights.to(torch.float32)


def crop_resize(
    image: Tensor, box: Sequence[int], size: int, interpolation: str = "bicubic", kernel: str = "pillow"
) -> Tensor:
    """Cut (top, left, height, width) out of a (C, H, W) picture and resize it to a square; (C, size, size)."""
    i, j, h, w = box
    return resize(image[..., i : i + h, j : j + w], (size, size), interpolation, kernel)


def random_resized_crop_params(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], draws: Sequence[Sequence[float]]
) -> tuple[int, int, int, int]:
    """The usual (Inception) random crop: try each row of draws in turn, take the first box that fits, else a centre
    crop.

    Args:
        height, width: the picture's, in pixels.
        scale: bounds of the crop's share of the area.
        ratio: bounds of its width / height, drawn uniformly in the logarithm.
        draws: rows of four numbers in [0, 1): area, log-ratio, top, left; ten rows in the field's practice.

    Returns:
        (top, left, height, width) in pixels.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for area, shape, top, left in draws:
        target = height * width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(log_ratio[0] + shape * (log_ratio[1] - log_ratio[0]))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def one_draw_crop_params(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], draws: Sequence[float]
) -> tuple[int, int, int, int]:
    """MAE's crop for linear probing: one draw, no rejection, clamped to the picture.

    Args:
        height, width: the picture's, in pixels.
        scale: bounds of the crop's share of the area.
        ratio: bounds of its width / height, drawn uniformly in the logarithm.
        draws: four numbers in [0, 1): area, log-ratio, top, left.

    Returns:
        (top, left, height, width) in pixels.
    """
    area, shape, top, left = draws
    target = height * width * (scale[0] + area * (scale[1] - scale[0]))
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    aspect = math.exp(log_ratio[0] + shape * (log_ratio[1] - log_ratio[0]))
    w = min(max(round(math.sqrt(target * aspect)), 1), width)
    h = min(max(round(math.sqrt(target / aspect)), 1), height)
    return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w


# -------------------------------------------------------------------------------------------------------------- modules


class ImageTransform(nn.Module):
    """Base of the transforms here: a square output of `size` pixels, or of what :meth:`bind` sets where it is None.

    `kernel` is whose resize it is, as of :func:`resize`.

    Attributes:
        random: False when the output is a function of the picture alone.
        foreign_random: True when it also draws from Python's or NumPy's generators.
        draws: how many random numbers :meth:`batch` takes for each picture; None: pictures go one by one.
    """

    random = True
    foreign_random = False
    draws: int | None = None

    def __init__(self, size: int | None = None, interpolation: str = "bicubic", kernel: str = "pillow") -> None:
        super().__init__()
        if interpolation not in _INTERPOLATIONS:
            raise unknown("interpolation", interpolation, _INTERPOLATIONS)
        if kernel not in _KERNELS:
            raise unknown("kernel", kernel, _KERNELS)
        if kernel != "pillow" and interpolation != "bicubic":
            raise ZooError(f"kernel {kernel} is bicubic: it has no interpolation {interpolation}")
        if size is not None and size < 1:
            raise ZooError(f"size of a transform must be positive, got {size}")
        self.size = size
        self.interpolation, self.kernel = interpolation, kernel
        self.mean: Sequence[float] = IMAGENET_MEAN

    def bind(self, size: int, mean: Sequence[float]) -> None:
        """Take over the data set's size, where none was given, and its mean colour."""
        self.size = size if self.size is None else self.size
        self.mean = tuple(mean)

    @property
    def side(self) -> int:
        """The output's side in pixels."""
        return 224 if self.size is None else self.size

    def batch(self, images: Tensor, draws: Tensor) -> Tensor | list[Tensor]:
        """The transform of many pictures of one size: uint8 (B, C, H, W) to uint8 (B, C, S, S), or a list of views.

        Each is a function of its own picture and row of `draws` (B, `draws`), float64 in [0, 1), and follows the same
        law as :meth:`forward`. `images` stay as they are.
        """
        raise NotImplementedError

    @property
    def after_normalize(self) -> Callable[[Tensor], Tensor] | None:
        """What to do to the normalised float picture, if anything."""
        return None

    def facts(self) -> dict[str, Any] | None:
        """What the transform does in the words of :class:`zoo.catalog.Preprocess`, of those that evaluate; else None.
        :func:`evaluation_transform` takes them."""
        return None

    def extra_repr(self) -> str:
        return f"size={self.size}, interpolation={self.interpolation!r}, kernel={self.kernel!r}"


class MAEPretrain(ImageTransform):
    """Random resized crop and flip: all the augmentation MAE's pre-training has (paper, Appendix A.1)."""

    draws = 41

    def __init__(
        self,
        size: int | None = None,
        scale: tuple[float, float] = (0.2, 1.0),
        interpolation: str = "bicubic",
        kernel: str = "pillow",
    ) -> None:
        super().__init__(size, interpolation, kernel)
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        draws = torch.rand(41).tolist()
        rows = [draws[k : k + 4] for k in range(0, 40, 4)]
        box = random_resized_crop_params(image.shape[-2], image.shape[-1], self.scale, (3 / 4, 4 / 3), rows)
        image = crop_resize(image, box, self.side, self.interpolation, self.kernel)
        return image.flip(-1) if draws[40] < 0.5 else image

    def batch(self, images: Tensor, draws: Tensor) -> Tensor:
        rows, (height, width) = draws[:, :40].reshape(-1, 10, 4), images.shape[-2:]
        boxes = batches.resized_crop_boxes(height, width, self.scale, (3 / 4, 4 / 3), rows)
        if self.kernel == "pillow":
            crops = batches.crop_resize(images, boxes, self.side, self.interpolation)
        else:
            cuts = zip(images, boxes.tolist(), strict=True)
            crops = torch.stack([crop_resize(one, box, self.side, kernel=self.kernel) for one, box in cuts])
        return batches.flip(crops, draws[:, 40] < 0.5)


class LinearProbeTrain(ImageTransform):
    """One-draw random crop and flip, as MAE's linear probing does (paper, Appendix A.1)."""

    draws = 5

    def __init__(
        self, size: int | None = None, scale: tuple[float, float] = (0.08, 1.0), interpolation: str = "bicubic"
    ) -> None:
        super().__init__(size, interpolation)
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        draws = torch.rand(5).tolist()
        box = one_draw_crop_params(image.shape[-2], image.shape[-1], self.scale, (3 / 4, 4 / 3), draws[:4])
        image = crop_resize(image, box, self.side, self.interpolation)
        return image.flip(-1) if draws[4] < 0.5 else image

    def batch(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        boxes = batches.one_draw_boxes(height, width, self.scale, (3 / 4, 4 / 3), draws)
        return batches.flip(batches.crop_resize(images, boxes, self.side, self.interpolation), draws[:, 4] < 0.5)


class FineTuneTrain(ImageTransform):
    """The field's fine-tuning augmentation: random resized crop, flip, timm's RandAugment, random erasing.

    Args:
        size: side of the output in pixels.
        auto_augment: timm's name of the policy ("rand-m9-mstd0.5-inc1"), None for none.
        random_erase: chance to overwrite a random box with normal noise, after normalisation.
        interpolation: of the crop and of RandAugment's warps.
        scale: bounds of the crop's share of the area.
    """

    foreign_random = True

    def __init__(
        self,
        size: int | None = None,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        random_erase: float = 0.25,
        interpolation: str = "bicubic",
        scale: tuple[float, float] = (0.08, 1.0),
    ) -> None:
        super().__init__(size, interpolation)
        if auto_augment is not None and not auto_augment.startswith("rand"):
            raise ZooError(
                f"auto_augment must be a RandAugment policy of timm ('rand-m9-mstd0.5-inc1'), got {auto_augment!r}"
            )
        self.crop = MAEPretrain(size, scale, interpolation)
        self.auto_augment = auto_augment
        self.random_erase = random_erase
        self._augment: Callable[[Any], Any] | None = None
        self._erase: Callable[[Tensor], Tensor] | None = None

    def bind(self, size: int, mean: Sequence[float]) -> None:
        super().bind(size, mean)
        self.crop.bind(self.side, mean)
        self._augment = None

    def _policy(self) -> Callable[[Any], Any]:
        if self._augment is None:
            import PIL.Image
            from timm.data.auto_augment import rand_augment_transform

            parameters = {
                "translate_const": int(self.side * 0.45),
                "img_mean": tuple(min(255, round(255 * m)) for m in self.mean),
                "interpolation": getattr(PIL.Image.Resampling, self.interpolation.upper()),
            }
            self._augment = rand_augment_transform(str(self.auto_augment), parameters)
        return self._augment

    def forward(self, image: Tensor) -> Tensor:
        image = self.crop(image)
        if self.auto_augment is None:
            return image
        from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

        return pil_to_tensor(self._policy()(to_pil_image(image)))

    @property
    def after_normalize(self) -> Callable[[Tensor], Tensor] | None:
        if not self.random_erase:
            return None
        if self._erase is None:
            from timm.data.random_erasing import RandomErasing

            self._erase = RandomErasing(self.random_erase, mode="pixel", max_count=1, device="cpu")
        return self._erase


class EvalResizeCrop(ImageTransform):
    """Resize, then cut out the middle: the field's evaluation.

    Args:
        size: side of the output in pixels.
        crop_pct: share of the resized picture's side that is kept; 224/256 by habit, 1.0 at larger sizes.
        interpolation, kernel: of the resize.
        crop_mode: "center": the short side becomes size / crop_pct; "squash": both sides do, whatever the shape;
            "border": the long side does, and the rest is filled with the mean colour. As timm names them. "square": the
            middle is cut out before the resize, a square of crop_pct of the short side, as TensorFlow's pipelines do.
    """

    random = False
    draws = 0

    def __init__(
        self,
        size: int | None = None,
        crop_pct: float = 224 / 256,
        interpolation: str = "bicubic",
        crop_mode: str = "center",
        kernel: str = "pillow",
    ) -> None:
        super().__init__(size, interpolation, kernel)
        if crop_mode not in _CROP_MODES:
            raise unknown("crop_mode", crop_mode, _CROP_MODES)
        if not 0 < crop_pct <= 1:
            raise ZooError(f"crop_pct must lie in (0, 1], got {crop_pct}")
        self.crop_pct, self.crop_mode = crop_pct, crop_mode

    def forward(self, image: Tensor) -> Tensor:
        side, (height, width) = self.side, image.shape[-2:]
        if self.crop_mode == "square":
            length = max(1, int(self.crop_pct * min(height, width)))
            box = ((height - length + 1) // 2, (width - length + 1) // 2, length, length)
            return crop_resize(image, box, side, self.interpolation, self.kernel)
        target = int(side / self.crop_pct)
        if self.crop_mode == "squash":
            new = (target, target)
        elif (self.crop_mode == "center") == (height <= width):  # the height becomes the target
            new = (target, max(1, int(target * width / height)))
        else:
            new = (max(1, int(target * height / width)), target)
        image = resize(image, new, self.interpolation, self.kernel)
        short = (max(0, side - new[0]), max(0, side - new[1]))
        if any(short):
            top, left = short[0] // 2, short[1] // 2
            height, width = image.shape[-2:]
            whole = image.new_tensor([min(255, round(255 * m)) for m in self.mean])[:, None, None]
            whole = whole.repeat(*image.shape[:-3], 1, height + short[0], width + short[1])
            whole[..., top : top + height, left : left + width] = image
            image = whole
        top, left = round((image.shape[-2] - side) / 2), round((image.shape[-1] - side) / 2)
        return image[..., top : top + side, left : left + side]

    def batch(self, images: Tensor, draws: Tensor) -> Tensor:
        return self.forward(images)

    def facts(self) -> dict[str, Any]:
        names = ("crop_pct", "interpolation", "kernel", "crop_mode")
        return {"size": self.side, **{name: getattr(self, name) for name in names}}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, crop_pct={self.crop_pct:g}, crop_mode={self.crop_mode!r}"


class ADMCrop(ImageTransform):
    """The square middle of a picture as the field of generation takes it (guided-diffusion, "ADM"): halved by a box
    filter as long as it stays large enough, then Pillow's bicubic resize of the short side, then the centre crop.

    Args:
        size: side of the output in pixels.
        flip: chance of a horizontal flip.
    """

    def __init__(self, size: int | None = None, flip: float = 0.0) -> None:
        super().__init__(size)
        if not 0 <= flip <= 1:
            raise ZooError(f"the chance of a flip must lie in [0, 1], got {flip}")
        self.flip = flip
        self.random = flip > 0
        self.draws = int(self.random)

    def forward(self, image: Tensor) -> Tensor:
        image = self.middle(image)
        return image.flip(-1) if self.flip and torch.rand(()) < self.flip else image

    def batch(self, images: Tensor, draws: Tensor) -> Tensor:
        same = images.shape[-2:] == (self.side, self.side)
        images = images.clone() if same else torch.stack([self.middle(image) for image in images])
        return batches.flip(images, draws[:, 0] < self.flip) if self.flip else images

    def facts(self) -> dict[str, Any]:
        return {"size": self.side, "crop_pct": 1.0, "interpolation": self.interpolation, "crop_mode": "adm"}

    def middle(self, image: Tensor) -> Tensor:
        """The square middle of a uint8 (3, H, W) picture, (3, S, S)."""
        from PIL.Image import Resampling
        from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

        side, picture = self.side, to_pil_image(image)
        while min(picture.size) >= 2 * side:
            picture = picture.resize((picture.width // 2, picture.height // 2), Resampling.BOX)
        scale = side / min(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Resampling.BICUBIC)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return pil_to_tensor(picture.crop((left, top, left + side, top + side)))


# ------------------------------------------------------------------------------------------- views for self-supervision


class ContrastiveAugment(ImageTransform):
    """The augmentation of contrastive learning: random resized crop, colour jitter, grayscale, blur, flip.

    The defaults are those of MoCo v2 and SimSiam. Colours are jittered as torchvision does on uint8 tensors; the blur
    is Pillow's (a few box filters). The official codes jitter Pillow's pictures: brightness, contrast and saturation
    are the same there to a level, but Pillow turns the hue in bytes (256 hues, whole saturations), which leaves a
    channel up to 15 levels aside (0.8 on average over an even grid of colours) for shifts up to 0.1, up to 18 (0.9) for
    shifts up to 0.4.

    Args:
        size: side of the output in pixels.
        scale: bounds of the crop's share of the area.
        jitter: strength of brightness, contrast, saturation and hue.
        jitter_prob: chance that the colours are jittered.
        gray_prob: chance that the picture turns gray.
        gray_first: turn gray before the jitter, as MoCo v1 does, not after it.
        blur_prob: chance of a Gaussian blur.
        blur_sigma: bounds of its radius in pixels.
        interpolation: of the crop.
        solarize_prob: chance that what is brighter than half is inverted, as BYOL does to its second view.
    """

    def __init__(
        self,
        size: int | None = None,
        scale: tuple[float, float] = (0.2, 1.0),
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
        jitter_prob: float = 0.8,
        gray_prob: float = 0.2,
        gray_first: bool = False,
        blur_prob: float = 0.5,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        interpolation: str = "bilinear",
        solarize_prob: float = 0.0,
    ) -> None:
        super().__init__(size, interpolation)
        chances = (jitter_prob, gray_prob, blur_prob, solarize_prob)
        if not 0 < scale[0] <= scale[1] or min(*jitter, *chances) < 0 or jitter[3] > 0.5:
            raise ZooError(
                "scale must rise and be positive, jitter and chances must not be negative, and hue at most 0.5; got"
                f" scale {scale}, jitter {jitter}, chances {', '.join(map(str, chances))}"
            )
        self.scale, self.jitter, self.blur_sigma = scale, jitter, blur_sigma
        self.jitter_prob, self.gray_prob, self.blur_prob, self.gray_first = (
            jitter_prob,
            gray_prob,
            blur_prob,
            gray_first,
        )
        self.solarize_prob = solarize_prob
        self.draws = 51 if solarize_prob else 50

    def forward(self, image: Tensor) -> Tensor:
        draws = torch.rand(45).tolist()
        rows = [draws[k : k + 4] for k in range(0, 40, 4)]
        box = random_resized_crop_params(image.shape[-2], image.shape[-1], self.scale, (3 / 4, 4 / 3), rows)
        image = crop_resize(image, box, self.side, self.interpolation)
        flip, jitter, gray, blur, radius = draws[40:]
        gray_now = gray < self.gray_prob
        if gray_now and self.gray_first:
            image = _grayscale(image)
        if jitter < self.jitter_prob:
            image = color_jitter(image, self.jitter)
        if gray_now and not self.gray_first:
            image = _grayscale(image)
        if blur < self.blur_prob:
            image = box_blur(image, self.blur_sigma[0] + radius * (self.blur_sigma[1] - self.blur_sigma[0]))
        if self.solarize_prob and torch.rand(()) < self.solarize_prob:
            image = solarize(image)
        return image.flip(-1) if flip < 0.5 else image

    def batch(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        boxes = batches.resized_crop_boxes(height, width, self.scale, (3 / 4, 4 / 3), draws[:, :40].reshape(-1, 10, 4))
        images = batches.crop_resize(images, boxes, self.side, self.interpolation)
        planes = images.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        flip, jitter, gray, blur, radius = draws[:, 40:45].unbind(1)
        grayed = (gray < self.gray_prob).nonzero()[:, 0]
        if self.gray_first:
            batches.gray(planes, grayed)
        strength = torch.tensor(self.jitter, dtype=torch.float64)
        low = torch.cat([(1 - strength[:3]).clamp(min=0), -strength[3:]])
        high = torch.cat([1 + strength[:3], strength[3:]])
        order = batches.ORDERS[(24 * draws[:, 49]).long()]
        order = order.masked_fill((jitter >= self.jitter_prob)[:, None] | (strength == 0)[order], -1)
        batches.jitter(planes, low + draws[:, 45:49] * (high - low), order)
        if not self.gray_first:
            batches.gray(planes, grayed)
        sigma = self.blur_sigma[0] + radius * (self.blur_sigma[1] - self.blur_sigma[0])
        batches.blur(planes, (blur < self.blur_prob).nonzero()[:, 0], sigma)
        if self.solarize_prob:
            batches.solarize(planes, (draws[:, 50] < self.solarize_prob).nonzero()[:, 0])
        images = planes.to(torch.uint8).transpose(0, 1).contiguous()
        return batches.flip(images, flip < 0.5)


class TwoViews(ImageTransform):
    """Two views of a picture, each by the same random transform; batches then hold `views` instead of `image`."""

    def __init__(self, transform: ImageTransform) -> None:
        super().__init__()
        self.transform = transform
        self.random = bool(getattr(transform, "random", True))
        self.foreign_random = bool(getattr(transform, "foreign_random", True))
        one = getattr(transform, "draws", None)
        self.draws = None if one is None else 2 * one

    def forward(self, image: Tensor) -> list[Tensor]:
        return [self.transform(image), self.transform(image)]

    def batch(self, images: Tensor, draws: Tensor) -> list[Tensor]:
        return [self.transform.batch(images, half) for half in draws.chunk(2, dim=1)]  # type: ignore[misc]


def color_jitter(image: Tensor, strength: Sequence[float]) -> Tensor:
    """Jitters brightness, contrast, saturation and hue of a uint8 (3, H, W) picture, in random order.

    The first three factors are uniform in [max(0, 1 - s), 1 + s], the shift of the hue in [-s, s]; a strength of 0
    leaves that property alone.
    """
    draws, steps = torch.rand(4).tolist(), []
    for which in torch.randperm(4).tolist():
        s = strength[which]
        if s:
            low = -s if which == 3 else max(0.0, 1 - s)
            high = s if which == 3 else 1 + s
            steps.append((which, low + draws[which] * (high - low)))
    return batches.jitter_one(image, steps) if steps else image


def _grayscale(image: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    return rgb_to_grayscale(image, num_output_channels=3)


def solarize(image: Tensor, threshold: int = 128) -> Tensor:
    """Inverts what is as bright as `threshold` in a uint8 (3, H, W) picture, channel by channel."""
    return torch.where(image >= threshold, 255 - image, image)


def box_blur(image: Tensor, sigma: float) -> Tensor:
    """Blurs a uint8 (3, H, W) picture as Pillow's GaussianBlur does: by box filters that approach the Gaussian."""
    pixels = batches.boxes_thrice(image[:, None].numpy(), torch.tensor([sigma], dtype=torch.float64))
    return torch.from_numpy(pixels[:, 0].astype(np.uint8, order="C"))


# --------------------------------------------------------------------------------------------------------------- mixing


class Mixing:
    """Mixup and CutMix on a batch, by timm; draws from NumPy's generator, which the task seeds for each step.

    Args:
        mixup: Beta parameter of mixup, 0 for none.
        cutmix: Beta parameter of CutMix, 0 for none.
        prob: chance that a batch is mixed at all.
        switch_prob: chance of CutMix when both are on.
        label_smoothing: spread evenly over the classes.
        num_classes: K.
    """

    def __init__(
        self,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
    ) -> None:
        from timm.data.mixup import Mixup

        if num_classes < 1:
            raise ZooError(f"Mixing needs at least one class, got {num_classes}")
        self._mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=prob if mixup or cutmix else 0.0,
            switch_prob=switch_prob,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with mixed `image` (B, C, H, W) and soft `label` (B, K) float32; the one given stays as it is."""
        image, label = batch["image"], batch["label"]
        if len(image) % 2:
            raise ZooError(f"mixup and cutmix pair the samples of a batch: its size must be even, got {len(image)}")
        mixed, soft = self._mix(image.clone(), label)
        return {**batch, "image": mixed, "label": soft}


# ------------------------------------------------------------------------------------------------ supervised training


def short_side_to(height: int, width: int, side: int) -> tuple[int, int]:
    """The size (height, width) of a picture resized so that its short side becomes `side`."""
    if height <= width:
        return side, max(side, round(side * width / height))
    return max(side, round(side * height / width)), side


def squared_aspect_crop_params(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], draws: Sequence[Sequence[float]]
) -> tuple[int, int, int, int] | None:
    """The random crop of fb.resnet.torch: `ratio` bounds a uniform r, and width / height is r * r or its inverse.

    Args:
        height, width: the picture's, in pixels.
        scale: bounds of the crop's share of the area.
        ratio: bounds of r.
        draws: rows of five numbers in [0, 1): area, r, whether the sides are swapped, top, left; each is tried in turn.

    Returns:
        (top, left, height, width) in pixels, or None where no box fits.
    """
    for area, shape, swap, top, left in draws:
        root = math.sqrt(height * width * (scale[0] + area * (scale[1] - scale[0])))
        r = ratio[0] + shape * (ratio[1] - ratio[0])
        w, h = math.floor(root * r + 0.5), math.floor(root / r + 0.5)
        if swap < 0.5:
            w, h = h, w
        if 0 < h <= height and 0 < w <= width:
            return int(top * (height - h + 0.99)), int(left * (width - w + 0.99)), h, w
    return None


class PadCropTrain(ImageTransform):
    """Pad, cut out a random square of the picture's own size, flip: the augmentation of CIFAR.

    Args:
        size: side of the output in pixels.
        padding: pixels on each side.
        fill: "mean" pads with the mean colour, which is 0 once normalised; "zero" with black.
        cutout: side in pixels of a square that takes the same colour, around a random pixel (DeVries and Taylor 2017,
            arXiv 1708.04552: 16 on CIFAR-10, 8 on CIFAR-100); 0 for none.
    """

    def __init__(self, size: int | None = None, padding: int = 4, fill: str = "mean", cutout: int = 0) -> None:
        super().__init__(size)
        if fill not in ("mean", "zero"):
            raise unknown("fill", fill, ("mean", "zero"))
        if padding < 0:
            raise ZooError(f"padding must not be negative, got {padding}")
        if cutout < 0:
            raise ZooError(f"cutout must not be negative, got {cutout}")
        self.padding, self.fill, self.cutout = padding, fill, cutout
        self.draws = 5 if cutout else 3

    @property
    def colour(self) -> list[int]:
        """What stands where the picture does not."""
        return [round(255 * m) if self.fill == "mean" else 0 for m in self.mean]

    def forward(self, image: Tensor) -> Tensor:
        side, p = self.side, self.padding
        draws = torch.rand(3).tolist()
        image = resize(image, (side, side), self.interpolation)
        padded = image.new_tensor(self.colour)[:, None, None].repeat(1, side + 2 * p, side + 2 * p)
        padded[:, p : p + side, p : p + side] = image
        top, left = int(draws[0] * (2 * p + 1)), int(draws[1] * (2 * p + 1))
        image = padded[:, top : top + side, left : left + side]
        image = image.flip(-1) if draws[2] < 0.5 else image
        return self._cut(image[None], torch.rand(1, 2))[0] if self.cutout else image

    def batch(self, images: Tensor, draws: Tensor) -> Tensor:
        images = resize(images, (self.side, self.side), self.interpolation)
        top, left = (draws[:, :2] * (2 * self.padding + 1)).long().unbind(1)
        images = batches.flip(batches.pad_crop(images, self.padding, self.colour, top, left), draws[:, 2] < 0.5)
        return self._cut(images, draws[:, 3:]) if self.cutout else images

    def _cut(self, images: Tensor, draws: Tensor) -> Tensor:
        row, column = (draws * self.side).long().unbind(1)
        return batches.cut_out(images, self.cutout, self.colour, row, column)


class ScaleTrain(ImageTransform):
    """Scale augmentation (VGG, ResNet): the short side is drawn from a range, then a random square and flip.

    Args:
        size: side of the output in pixels.
        short_side: bounds of the short side in pixels, both included.
        interpolation: of the resize.
    """

    def __init__(
        self, size: int | None = None, short_side: tuple[int, int] = (256, 480), interpolation: str = "bicubic"
    ) -> None:
        super().__init__(size, interpolation)
        if not 0 < short_side[0] <= short_side[1]:
            raise ZooError(f"short_side must rise and be positive, got {tuple(short_side)}")
        self.short_side = short_side

    def forward(self, image: Tensor) -> Tensor:
        scale, top, left, flip = torch.rand(4).tolist()
        side, (low, high) = self.side, self.short_side
        if side > low:
            raise ZooError(f"a crop of {side} pixels does not fit a short side of {low}: raise short_side")
        target = low + int(scale * (high - low + 1))
        height, width = short_side_to(image.shape[-2], image.shape[-1], target)
        # The crop alone is resized: the same pixels as a crop of the resized picture, up to half a pixel at its edges.
        factor = image.shape[-2] / height, image.shape[-1] / width
        at = int(top * (height - side + 1)), int(left * (width - side + 1))
        box = [round(at[0] * factor[0]), round(at[1] * factor[1]), round(side * factor[0]), round(side * factor[1])]
        image = crop_resize(image, [box[0], box[1], max(1, box[2]), max(1, box[3])], side, self.interpolation)
        return image.flip(-1) if flip < 0.5 else image


class InceptionTrain(ImageTransform):
    """Scale and aspect-ratio crop, colour jitter, lighting noise, flip: fb.resnet.torch's augmentation on ImageNet.

    Args:
        size: side of the output in pixels.
        scale: bounds of the crop's share of the area.
        ratio: bounds of the root of its width / height, or of the inverse.
        jitter: brightness, contrast and saturation are blended by factors in [1 - jitter, 1 + jitter].
        lighting: standard deviation of the noise along the principal components of colour (AlexNet).
        interpolation, kernel: of the crop.
    """

    # Of ImageNet's colours: eigenvalues and, in columns, eigenvectors of RGB in [0, 1].
    _VALUES = (0.2175, 0.0188, 0.0045)
    _VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
    _LUMA = (0.299, 0.587, 0.114)

    def __init__(
        self,
        size: int | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        jitter: float = 0.4,
        lighting: float = 0.1,
        interpolation: str = "bicubic",
        kernel: str = "pillow",
    ) -> None:
        super().__init__(size, interpolation, kernel)
        if not 0 <= jitter <= 1 or lighting < 0:
            raise ZooError(f"jitter must lie in [0, 1] and lighting must not be negative, got {jitter} and {lighting}")
        self.scale, self.ratio, self.jitter, self.lighting = scale, ratio, jitter, lighting

    def forward(self, image: Tensor) -> Tensor:
        draws = torch.rand(54).tolist()
        rows = [draws[k : k + 5] for k in range(0, 50, 5)]
        height, width = image.shape[-2:]
        box = squared_aspect_crop_params(height, width, self.scale, self.ratio, rows)
        if box is None:
            short = min(height, width)
            box = ((height - short) // 2, (width - short) // 2, short, short)
        image = crop_resize(image, box, self.side, self.interpolation, self.kernel)
        factors = [1 + self.jitter * (2 * draw - 1) for draw in draws[50:53]]
        if self.jitter or self.lighting:
            image = self.coloured(image, factors, torch.randn(3) * self.lighting)
        return image.flip(-1) if draws[53] < 0.5 else image

    def coloured(self, image: Tensor, factors: Sequence[float], alpha: Tensor) -> Tensor:
        """Jitter and lighting of a uint8 (3, H, W) picture as a function of their draws.

        By the three factors, brightness blends with black, contrast with the mean luma and saturation with the luma of
        each pixel; as nothing is clamped in between they commute, and no order need be drawn. Then the colour
        `vectors @ (alpha * values)` is added, and the result is clamped.
        """
        brightness, contrast, saturation = factors
        pixels = image.to(torch.float32)
        luma = torch.einsum("c,chw->hw", torch.tensor(self._LUMA), pixels)
        pixels = torch.lerp(luma, pixels, saturation)
        pixels = torch.lerp(luma.mean(), pixels, contrast).mul_(brightness)
        shift = torch.tensor(self._VECTORS) @ (alpha * torch.tensor(self._VALUES)) * 255
        return pixels.add_(shift[:, None, None]).round_().clamp_(0, 255).to(torch.uint8)


class TenCrop(ImageTransform):
    """Ten views of a picture for evaluation: centre and corners, and those of its mirror image.

    Args:
        size: side of the views in pixels.
        crop_pct: `size` over the short side of the resized picture.
        interpolation, kernel: of the resize.
    """

    random = False

    def __init__(
        self,
        size: int | None = None,
        crop_pct: float = 224 / 256,
        interpolation: str = "bicubic",
        kernel: str = "pillow",
    ) -> None:
        super().__init__(size, interpolation, kernel)
        if not 0 < crop_pct <= 1:
            raise ZooError(f"crop_pct must lie in (0, 1], got {crop_pct}")
        self.crop_pct = crop_pct

    def forward(self, image: Tensor) -> list[Tensor]:
        side = self.side
        scale = int(side / self.crop_pct) / min(image.shape[-2:])
        height, width = (int(length * scale + 1e-6) for length in image.shape[-2:])
        image = resize(image, (height, width), self.interpolation, self.kernel)
        down, right = height - side, width - side
        places = ((math.ceil(down / 2), math.ceil(right / 2)), (0, 0), (0, right), (down, 0), (down, right))
        both = (image, image.flip(-1))
        return [view[..., top : top + side, left : left + side] for view in both for top, left in places]

    def facts(self) -> dict[str, Any]:
        """Those of its middle view: the other nine are to better a number."""
        names = ("crop_pct", "interpolation", "kernel")
        return {"size": self.side, **{name: getattr(self, name) for name in names}, "crop_mode": "center", "views": 10}


def evaluation_transform(facts: Mapping[str, Any], size: int | None = None) -> ImageTransform:
    """The transform of which :meth:`ImageTransform.facts` are `facts`, at its own or another `size`.

    Raises:
        ZooError: settings that no transform has.
    """
    side = int(size or facts["size"])
    if facts.get("crop_mode") == "adm":
        return ADMCrop(side)
    names = ("crop_pct", "interpolation", "crop_mode", "kernel")
    return EvalResizeCrop(side, **{name: facts[name] for name in names if name in facts})
