"""The semantic branch on a feature pyramid (Panoptic Feature Pyramid Networks, section 3.1 and figure 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad, relu

from zoo.errors import ZooError, unknown
from zoo.nn.detection.backbone import Norm, he_normal, norm_layer
from zoo.ops.boxes import at_least_float32

IGNORED = 255  # label of a pixel that does not count


@dataclass(frozen=True)
class SemanticHeadConfig:
    """A semantic branch.

    Args:
        levels: the maps it takes.
        classes: C, of its logits.
        channels: of its convolutions.
        norm: after each of them; null for none, and biases instead.
        stride: of its logits; the finest map's, or a finer one.
        fuse: how the levels are joined, added up or as channels beside each other (Table 1d).
        loss_weight: lambda_s of equation 1.
        init_std: deviation of the initial weights of the last layer; null: He-normal (fan out), as the official code
            has it, which for few classes are so large that training begins by making them smaller.
    """

    levels: tuple[str, ...] = ("p2", "p3", "p4", "p5")
    classes: int = 54
    channels: int = 128
    norm: Norm | None = "gn"
    stride: int = 4
    fuse: Literal["sum", "concat"] = "sum"
    loss_weight: float = 0.5
    init_std: float | None = None

    def __post_init__(self) -> None:
        if self.fuse not in ("sum", "concat"):
            raise unknown("fuse", self.fuse, ("sum", "concat"))
        if self.norm is not None and self.norm not in get_args(Norm):
            raise unknown("norm", str(self.norm), get_args(Norm))
        if not self.levels or not 1 <= self.classes <= IGNORED or self.stride < 1:
            raise ZooError(f"a semantic head wants levels, 1 to {IGNORED} classes and a stride, not {self}")


class SemanticHead(nn.Module):
    """Logits of every class for every cell of `stride` pixels.

    A map of stride s goes through log2(s / stride) stages (one at least) of a 3x3 convolution, a normalisation, ReLU
    and, unless s is `stride`, bilinear upsampling to twice the size; what comes out is added up, and a 1x1 convolution
    makes logits of it. The last upsampling, alike for all, is done once, after they are added up.

    Args:
        backbone: says of its maps their `channels` and `strides`.
        config: all the rest.

    Raises:
        ZooError: a level that the backbone does not have, or one of a stride that is no power of two of `stride`.
    """

    def __init__(self, backbone: nn.Module, config: SemanticHeadConfig) -> None:
        super().__init__()
        below: Any = backbone
        self.config = config
        norm = norm_layer(config.norm)
        self.branches = nn.ModuleDict()
        for name in sorted(config.levels, key=lambda name: below.strides.get(name, 0)):
            if name not in below.channels:
                raise unknown("level of the semantic head", name, below.channels)
            times = below.strides[name] / config.stride
            if times < 1 or times != 2 ** (int(times).bit_length() - 1):
                raise ZooError(
                    f"{name} has stride {below.strides[name]}, which is no power of two times {config.stride}"
                )
            stages: list[nn.Module] = []
            channels = below.channels[name]
            for _ in range(max(1, int(times).bit_length() - 1)):
                conv = nn.Conv2d(channels, config.channels, 3, padding=1, bias=norm is None)
                he_normal(conv)
                stages.append(nn.Sequential(conv, *([norm(config.channels)] if norm else [])))
                channels = config.channels
            self.branches[name] = nn.ModuleList(stages)
        self.finest = tuple(name for name in self.branches if below.strides[name] == config.stride)
        joined = config.channels * (len(self.branches) if config.fuse == "concat" else 1)
        self.predictor = nn.Conv2d(joined, config.classes, 1)
        he_normal(self.predictor)
        if config.init_std is not None:
            nn.init.normal_(self.predictor.weight, std=config.init_std)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, C, H / stride, W / stride) of the backbone's maps."""
        fine: list[Tensor] = []
        coarse: list[Tensor] = []  # half as fine
        for name, stages in self.branches.items():
            x = features[name]
            for n, stage in enumerate(stages.children()):
                x = relu(stage(doubled(x) if n else x))
            (fine if name in self.finest else coarse).append(x)
        if self.config.fuse == "concat":
            return self.predictor(torch.cat([*fine, *([doubled(torch.cat(coarse, 1))] if coarse else [])], 1))
        if coarse:
            fine.append(doubled(_total(coarse)))
        return self.predictor(_total(fine))

    def upsampled(self, logits: Tensor) -> Tensor:
        """Logits (B, C, H, W) for every pixel, bilinear, in at least float32."""
        return interpolate(
            at_least_float32(logits), scale_factor=float(self.config.stride), mode="bilinear", align_corners=False
        )

    def loss(self, logits: Tensor, semantic: Sequence[Tensor]) -> Tensor:
        """Cross-entropy (), the mean over the labelled pixels of all images, times `loss_weight`.

        Args:
            logits: of :meth:`forward`.
            semantic: (h, w) labels of each image inside the padding; 255 for pixels that do not count.
        """
        whole = self.upsampled(logits)
        labels = padded_labels(semantic, (int(whole.shape[2]), int(whole.shape[3])))
        total = cross_entropy(whole, labels, ignore_index=IGNORED, reduction="sum")
        return total * (self.config.loss_weight / (labels != IGNORED).sum().clamp(min=1))


def doubled(x: Tensor) -> Tensor:
    """A map (B, C, H, W) of twice the size, bilinear."""
    return interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _total(maps: Sequence[Tensor]) -> Tensor:
    total = maps[0]
    for x in maps[1:]:
        total = total + x
    return total


def padded_labels(semantic: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """(B, H, W) int64 of label maps (h, w), filled up with 255 on the right and below."""
    return torch.stack(
        [pad(x.long(), (0, size[1] - x.shape[1], 0, size[0] - x.shape[0]), value=IGNORED) for x in semantic]
    )


def resize_logits(logits: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Logits (C, H, W) of a padded image, cut to its `size` (height, width), then bilinear at the `original` size."""
    cut = logits[:, : size[0], : size[1]]
    return interpolate(cut[None], size=original, mode="bilinear", align_corners=False)[0]


def labels_of(batch: Mapping[str, Any]) -> list[Tensor]:
    """The label maps (h, w) of a batch.

    Raises:
        ZooError: it has none.
    """
    if "target" not in batch or any("semantic" not in target for target in batch["target"]):
        raise ZooError(
            "semantic segmentation takes batches with `target` whose dicts hold `semantic`: set data.semantic"
        )
    return [target["semantic"] for target in batch["target"]]


def file_logits(logits: Iterable[Tensor], batch: Mapping[str, Any]) -> Iterator[Tensor]:
    """Logits (C, H, W) of each picture in its file's pixels, of those (C, h, w) of the padded images, one by one."""
    for x, (size, original) in zip(logits, sizes_of(batch), strict=True):
        yield resize_logits(x, size, original)


def sizes_of(batch: Mapping[str, Any]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Height and width of each image inside the padding, and of its file (default: the same)."""
    found = zip(batch["size"].tolist(), batch.get("original_size", batch["size"]).tolist(), strict=True)
    return [((size[0], size[1]), (original[0], original[1])) for size, original in found]


class SemanticNetwork(nn.Module):
    """Images to losses in training, and to label maps in evaluation. A subclass has `backbone`, a pyramid, `logits` and
    `losses`."""

    export_part = "backbone"
    not_exported = "takes a whole batch"
    backbone: nn.Module

    @property
    def size_divisibility(self) -> int:
        """What the sides of a padded batch must be multiples of."""
        return max(self.backbone.bottom_up.strides.values())  # type: ignore[union-attr, operator]

    def logits(self, batch: Mapping[str, Any]) -> Iterable[Tensor]:
        """Logits (C, H, W) of each picture in its file's pixels; of `image`, `size` and, if any, `original_size`."""
        raise NotImplementedError

    def losses(self, batch: Mapping[str, Any], **further: Any) -> dict[str, Tensor]:
        """Losses by name; each `target` of the batch holds `semantic` (h, w). `further` is a paper's own.

        Raises:
            ZooError: no label maps.
        """
        raise NotImplementedError

    def segment(self, batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """{"semantic": (H, W) uint8}, the label map of each picture in its file's pixels."""
        return [{"semantic": x.argmax(0).to(torch.uint8)} for x in self.logits(batch)]

    def forward(self, batch: Mapping[str, Any], **further: Any) -> Any:
        """:meth:`losses` in training mode, else what :meth:`segment` gives."""
        return self.losses(batch, **further) if self.training else self.segment(batch)
