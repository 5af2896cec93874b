"""A residual network that is pre-trained as a masked autoencoder, and the features that Drifting Models compare images
in (Deng et al. 2026, arXiv 2602.04770, appendix A).

The encoder is a ResNet of basic blocks with GroupNorm on a grid of h x h places: a latent as it is, or a picture whose
patches of `input_patch` pixels are the channels of a place. A U-Net decoder predicts the places that were set to zero.

Conventions: images (B, C, S, S), the grid (B, C p^2, h, w) with a patch's numbers in the order (row, column, channel);
stage n has width * 2^(n-1) channels and 1 / 2^(n-1) of the grid's side. GroupNorm with eps 1e-6 in as many groups as
divide the channels, 32 at most. The norm that ends a stage is what the next stage sees, but no part of the features of
single blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, relu

from zoo.errors import ZooError

NORM_EPS = STD_EPS = 1e-6
SKIPS = ("layer3", "layer2", "layer1", "conv1")


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm in the largest number of groups up to 32 that divides the channels."""
    groups = next(n for n in range(min(32, channels), 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def _conv(in_chans: int, out_chans: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, bias=False)


# ----------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class FeatureSet:
    """Which features of the encoder's maps are compared (appendix A); those of single places always are.

    Args:
        mean: the mean of a map over all places.
        std: its standard deviation.
        patch_means: sides of the patches of places whose means are taken, where they divide the map.
        patch_stds: likewise, whose deviations are taken.
        every_blocks: the maps behind every so many blocks of a stage too; 0 for none.
    """

    mean: bool = True
    std: bool = True
    patch_means: tuple[int, ...] = (2, 4)
    patch_stds: tuple[int, ...] = (2, 4)
    every_blocks: int = 2

    def __post_init__(self) -> None:
        if self.every_blocks < 0 or any(side < 1 for side in (*self.patch_means, *self.patch_stds)):
            raise ZooError("features want patches of a side of 1 or more, and every_blocks of 0 or more")

    def of(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """The features (B, T, C) of a map (B, C, h, w), by their names."""
        found = {name: x.flatten(2).transpose(1, 2)}
        if self.mean:
            found[f"{name}_mean"] = x.mean((2, 3))[:, None]
        if self.std:
            found[f"{name}_std"] = deviation(x.flatten(2), 2)[:, None]
        for kind, sides in (("mean", self.patch_means), ("std", self.patch_stds)):
            for side in sides:
                if x.shape[2] % side == 0 and x.shape[3] % side == 0:
                    patches = x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4).flatten(4)
                    value = patches.mean(4) if kind == "mean" else deviation(patches, 4)
                    found[f"{name}_{kind}_{side}"] = value.flatten(2).transpose(1, 2)
        return found


def deviation(x: Tensor, dim: int) -> Tensor:
    """sqrt(variance + 1e-6) along an axis, the variance that of a population; in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x.var(dim, correction=0) + STD_EPS).sqrt()


# ------------------------------------------------------------------------------------------------------------ network


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each with its norm, added to what came in."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.gn1 = _conv(in_chans, out_chans, 3, stride), group_norm(out_chans)
        self.conv2, self.gn2 = _conv(out_chans, out_chans), group_norm(out_chans)
        self.changes = stride != 1 or in_chans != out_chans
        if self.changes:
            self.proj_conv, self.proj_gn = _conv(in_chans, out_chans, 1, stride), group_norm(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gn2(self.conv2(relu(self.gn1(self.conv1(x)))))
        return relu(y + (self.proj_gn(self.proj_conv(x)) if self.changes else x))


class ConvNormReLU(nn.Module):
    """A 3 x 3 convolution with its norm and ReLU."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.conv, self.gn = _conv(in_chans, out_chans), group_norm(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.gn(self.conv(x)))


class Encoder(nn.Module):
    """The ResNet.

    Args:
        in_chans: channels of the grid.
        width: channels of the first stage.
        layers: blocks of the stages.
    """

    def __init__(self, in_chans: int, width: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.conv1, self.gn1 = _conv(in_chans, width), group_norm(width)
        self.stages = nn.ModuleList()
        before = width
        for stage, count in enumerate(layers):
            after = width * 2**stage
            blocks = [
                BasicBlock(before if n == 0 else after, after, 2 if stage and n == 0 else 1) for n in range(count)
            ]
            self.stages.append(nn.ModuleList(blocks))
            setattr(self, f"layer{stage + 1}_norm", group_norm(after))
            before = after

    def forward(self, x: Tensor, every_blocks: int = 0) -> dict[str, Tensor]:
        """The maps conv1, layer1, ... of a grid (B, C, h, w), and those behind every so many blocks of a stage as
        layer1_blk2, ..."""
        x = relu(self.gn1(self.conv1(x)))
        maps, blocks = {"conv1": x}, {}
        for stage, parts in enumerate(self.stages, start=1):
            assert isinstance(parts, nn.ModuleList)
            for place, block in enumerate(parts, start=1):
                x = block(x)
                if every_blocks and place % every_blocks == 0:
                    blocks[f"layer{stage}_blk{place}"] = x
            x = maps[f"layer{stage}"] = self.get_submodule(f"layer{stage}_norm")(x)
        return maps | blocks


class UpBlock(nn.Module):
    """Enlarges a map bilinearly to the size of an earlier one, and joins the two."""

    def __init__(self, in_chans: int, skip_chans: int, out_chans: int) -> None:
        super().__init__()
        self.concat_norm_fn = group_norm(in_chans + skip_chans)
        self.proj = ConvNormReLU(in_chans + skip_chans, out_chans)
        self.refine = ConvNormReLU(out_chans, out_chans)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
        return self.refine(self.proj(self.concat_norm_fn(torch.cat([x, skip], dim=1))))


class Decoder(nn.Module):
    """The U-Net's way up, to the grid (B, out_chans, h, w)."""

    def __init__(self, width: int, out_chans: int) -> None:
        super().__init__()
        self.bridge = ConvNormReLU(8 * width, 8 * width)
        self.up43 = UpBlock(8 * width, 4 * width, 4 * width)
        self.up32 = UpBlock(4 * width, 2 * width, 2 * width)
        self.up21 = UpBlock(2 * width, width, width)
        self.up10 = UpBlock(width, width, width)
        self.head = nn.Conv2d(width, out_chans, 1)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        x = self.bridge(maps["layer4"])
        for up, skip in zip((self.up43, self.up32, self.up21, self.up10), SKIPS, strict=True):
            x = up(x, maps[skip])
        return self.head(x)


class MaskedLoss(NamedTuple):
    """Of each image (B,): the `loss`, its parts, whether the class was named, and the share of the grid hidden."""

    loss: Tensor
    reconstruction: Tensor
    classification: Tensor
    correct: Tensor
    hidden: Tensor


class MAEResNet(nn.Module):
    """Encoder, decoder and a linear classifier on the encoder's pooled last map.

    Args:
        in_chans: channels of the images.
        width: channels of the first stage; 256 and 640 in the paper.
        layers: blocks of the four stages.
        num_classes: of the classifier.
        input_patch: side of the patches that are a place of the grid; 1 for latents, 8 for pictures of 256 pixels.
        mask_patch: side of the squares of places that are hidden together.

    Raises:
        ZooError: no four stages, or a size below 1.
    """

    def __init__(
        self,
        in_chans: int = 4,
        width: int = 256,
        layers: Sequence[int] = (3, 4, 6, 3),
        num_classes: int = 1000,
        input_patch: int = 1,
        mask_patch: int = 2,
    ) -> None:
        super().__init__()
        if len(layers) != 4 or min(*layers, in_chans, width, num_classes, input_patch, mask_patch) < 1:
            raise ZooError("a MAE-ResNet wants four stages, and sizes of 1 or more")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.input_patch, self.mask_patch, self.width = input_patch, mask_patch, width
        channels = in_chans * input_patch**2
        self.encoder = Encoder(channels, width, layers)
        self.decoder = Decoder(width, channels)
        self.fc = nn.Linear(8 * width, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        """Normal weights of variance 1 / fan-in, cut at two deviations, as flax begins with."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                std = 1 / math.sqrt(module.weight[0].numel()) / 0.87962566103423978  # the cut makes it smaller
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def grid(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) as the grid (B, p*p*C, S/p, S/p).

        Raises:
            ZooError: other channels, or a side that the patches do not divide.
        """
        p = self.input_patch
        if images.shape[1] != self.in_chans or images.shape[2] % p or images.shape[3] % p:
            raise ZooError(
                f"this encoder takes images of {self.in_chans} channels and of a side that {p} divides, not "
                f"{tuple(images.shape[1:])}"
            )
        if p == 1:
            return images
        blocks = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B, C, h, p, w, p
        return blocks.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def images(self, grid: Tensor) -> Tensor:
        """The inverse of :meth:`grid`."""
        p = self.input_patch
        blocks = grid.unflatten(1, (p, p, self.in_chans))
        return blocks.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)

    def hidden(self, size: tuple[int, int], noise: Tensor, ratio: Tensor) -> Tensor:
        """The mask (B, 1, h, w) of a grid of this size, 1 where hidden: squares whose uniform `noise`
        (B, h / mask_patch, w / mask_patch) is below the sample's `ratio` (B,)."""
        side = self.mask_patch
        if noise.shape[1:] != (size[0] // side, size[1] // side):
            raise ZooError(f"mask noise of a grid {size} must be (B, {size[0] // side}, {size[1] // side})")
        mask = (noise < ratio[:, None, None]).to(noise.dtype)
        return mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of whole images (B, C, S, S)."""
        return self.fc(self.pooled(images))

    def pooled(self, images: Tensor) -> Tensor:
        """The last map, averaged over its places: (B, 8 * width)."""
        return self.encoder(self.grid(images))["layer4"].mean((2, 3))

    def features(self, images: Tensor, which: FeatureSet = FeatureSet()) -> dict[str, Tensor]:
        """Features (B, T, C) of images (B, C, S, S) by name: norm_x, the root mean square of each channel of the grid,
        and those of the encoder's maps."""
        x = self.grid(images)
        found = {"norm_x": (x.square().mean((2, 3)) + STD_EPS).sqrt()[:, None]}
        for name, value in self.encoder(x, which.every_blocks).items():
            found |= which.of(name, value)
        return found

    def loss(
        self, images: Tensor, label: Tensor, noise: Tensor, ratio: Tensor, cls_weight: float = 0.0
    ) -> tuple[MaskedLoss, Tensor]:
        """The losses of images whose masks :meth:`hidden` makes, and the predicted grid.

        The reconstruction's is the squared error summed over the channels of a place, mean over the hidden ones; the
        classifier, which sees what is not hidden, has `cls_weight` of the sum and the reconstruction the rest.
        """
        x = self.grid(images)
        mask = self.hidden((x.shape[2], x.shape[3]), noise, ratio).to(x.dtype)
        maps = self.encoder(x * (1 - mask))
        logits, predicted = self.fc(maps["layer4"].mean((2, 3))), self.decoder(maps)
        error = ((predicted - x).square() * mask).sum((1, 2, 3)) / (mask.sum((1, 2, 3)) + 1e-8)
        named = cross_entropy(logits, label, reduction="none")
        loss = cls_weight * named + (1 - cls_weight) * error
        return MaskedLoss(loss, error, named, logits.argmax(1) == label, mask.mean((1, 2, 3))), predicted

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Images as the encoder saw them, hidden places 0, and with the prediction pasted in there."""
        x = self.grid(images)
        mask = self.hidden((x.shape[2], x.shape[3]), noise, ratio).to(x.dtype)
        predicted = self.decoder(self.encoder(x * (1 - mask))).to(x.dtype)
        return self.images(x * (1 - mask)), self.images(x * (1 - mask) + predicted * mask)


def sizes_of(state: Mapping[str, Tensor], in_chans: int) -> dict[str, Any]:
    """The arguments of the :class:`MAEResNet` whose weights these are; its images have `in_chans` channels.

    Raises:
        ZooError: they are not of one.
    """
    blocks = [re.match(r"encoder\.stages\.(\d+)\.(\d+)\.", key) for key in state]
    counts = [len({found[2] for found in blocks if found and int(found[1]) == stage}) for stage in range(4)]
    if "encoder.conv1.weight" not in state or "fc.weight" not in state or not all(counts):
        raise ZooError("not the weights of a MAE-ResNet: it has encoder.conv1, four stages and fc")
    width, channels = state["encoder.conv1.weight"].shape[:2]
    patch = math.isqrt(channels // in_chans)
    if patch**2 * in_chans != channels:
        raise ZooError(f"an encoder of {channels} channels a place is not of images of {in_chans} channels")
    return {
        "in_chans": in_chans,
        "width": width,
        "layers": tuple(counts),
        "num_classes": len(state["fc.weight"]),
        "input_patch": patch,
    }


# -------------------------------------------------------------------------------------------------- published weights

_CONV, _NORM = r"(?:conv1|conv2|proj_conv|conv)/kernel", r"(?:gn1|gn2|proj_gn|gn)/(?:scale|bias)"
_OFFICIAL = re.compile(
    rf"encoder/(?:conv1/kernel|gn1/(?:scale|bias)|layer\d_norm/(?:scale|bias)|stages_\d/layers_\d+/(?:{_CONV}|{_NORM}))"
    rf"|decoder/(?:bridge/(?:{_CONV}|{_NORM})|up\d\d/(?:concat_norm_fn/(?:scale|bias)|(?:proj|refine)/(?:{_CONV}|{_NORM})))"
    r"|decoder/head/(?:kernel|bias)|fc/(?:kernel|bias)"
)


def convert_mae_resnet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published parameters (flax, by path) in our names and layouts; ours stay as they are.

    Raises:
        ZooError: a key of another network.
    """
    if not any("/" in key for key in state_dict):
        return dict(state_dict)
    converted = {}
    for key, value in state_dict.items():
        if not _OFFICIAL.fullmatch(key):
            raise ZooError(f"not a checkpoint of a MAE-ResNet: unknown key {key!r}")
        name = re.sub(r"stages_(\d+)/layers_(\d+)", r"stages/\1/\2", key).replace("/", ".")
        if name.endswith(".kernel"):
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        name = re.sub(r"\.(?:kernel|scale)$", ".weight", name)
        converted[name] = value
    return converted
