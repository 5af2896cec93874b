"""The U-Nets that EDM trains (Karras et al. 2022, arXiv 2206.00364): DDPM++ and NCSN++ (Song et al. 2021, arXiv
2011.13456), and ADM (Dhariwal and Nichol 2021, arXiv 2105.05233).

Parameter names are those of EDM's releases and of what descends from them (`enc.32x32_block0.conv0.weight`). In DDPM++
and NCSN++ residual blocks are scaled by sqrt(1/2), the condition is added to their middle, and attention has one head;
in ADM the condition scales and shifts. Every operation has a forward-mode derivative, so that `torch.func.jvp` runs
through the network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, one_hot, silu

from zoo.errors import ZooError, unknown

TINY = 1e-5  # gain of the layers that begin at almost nothing
MAX_PERIOD = 10_000


@dataclass(frozen=True)
class BlockStyle:
    """What the two families of residual blocks differ in.

    Args:
        skip_scale: of a sum with what was skipped.
        eps: of the norms.
        head_channels: channels of an attention head; None: one head of all.
        adaptive: the condition scales and shifts what is normalised, instead of being added before.
        project: what is skipped is projected wherever it is resampled, not just where its width changes.
    """

    skip_scale: float
    eps: float
    head_channels: int | None
    adaptive: bool
    project: bool


SONG = BlockStyle(math.sqrt(0.5), 1e-6, None, False, True)
ADM = BlockStyle(1.0, 1e-5, 64, True, False)


def sinusoid(t: Tensor, channels: int, endpoint: bool = True) -> Tensor:
    """The embedding (B, channels) of times (B,), in their own unit: sines first, then cosines.

    Frequencies fall geometrically from 1 to 1/10000, the last included or, without `endpoint`, just not.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / max(1, half - endpoint)
    angle = t[:, None] * (1 / MAX_PERIOD) ** exponent.to(t.dtype)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Fourier(nn.Module):
    """The embedding (B, channels) of times (B,) by fixed random frequencies of NCSN++: sines first, then cosines."""

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None] * (2 * math.pi * self.get_buffer("freqs")).to(t.dtype)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Resample(nn.Module):
    """Halves ("down") or doubles ("up") the side of (B, C, H, W) by a separable low-pass filter."""

    def __init__(self, way: str, resample_filter: Sequence[float] = (1, 1)) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("resample_filter", _taps(resample_filter))

    def forward(self, x: Tensor) -> Tensor:
        return _resampled(x, self.get_buffer("resample_filter"), self.way)


class ResampleConv2d(nn.Conv2d):
    """A convolution with bias, after halving ("down") or doubling ("up") the side by a separable low-pass filter.

    With `fused`, which is of "down", the filter comes after the convolution, and both see one border of zeros.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        resample: str = "",
        resample_filter: Sequence[float] = (1, 1),
        gain: float = 1.0,
        fused: bool = False,
    ) -> None:
        border = (len(resample_filter) - 1) // 2 if fused else 0
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2 + border)
        self.resample, self.fused = resample, fused
        if resample:
            self.register_buffer("resample_filter", _taps(resample_filter))
        _init(self, gain)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out_channels, H', W'), H' being H, H / 2 or 2 H."""
        if not self.resample:
            return super().forward(x)
        taps = self.get_buffer("resample_filter")
        if self.fused:
            return _resampled(super().forward(x), taps, self.resample, border=False)
        return super().forward(_resampled(x, taps, self.resample))


def _taps(resample_filter: Sequence[float]) -> Tensor:
    taps = torch.as_tensor(resample_filter, dtype=torch.float32)
    return (taps.outer(taps) / taps.sum().square())[None, None]


def _resampled(x: Tensor, taps: Tensor, way: str, border: bool = True) -> Tensor:
    taps = taps.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    padding = (taps.shape[-1] - 1) // 2 if border else 0
    if way == "up":
        return conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=x.shape[1])
    return conv2d(x, taps, stride=2, padding=padding, groups=x.shape[1])


def _init(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> None:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias)
    _init(layer)
    return layer


def _norm(channels: int, eps: float = SONG.eps) -> nn.GroupNorm:
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise ZooError(f"{channels} channels do not make {groups} groups: set model_channels to a multiple of 32")
    return nn.GroupNorm(groups, channels, eps=eps)


class UNetBlock(nn.Module):
    """Residual block: norm, SiLU, convolution, condition, norm, SiLU, dropout, convolution; then attention, if any."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        resample: str = "",
        attention: bool = False,
        dropout: float = 0.0,
        resample_filter: Sequence[float] = (1, 1),
        style: BlockStyle = SONG,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.style = in_channels, out_channels, style
        self.norm0 = _norm(in_channels, style.eps)
        self.conv0 = ResampleConv2d(in_channels, out_channels, 3, resample, resample_filter)
        self.affine = _linear(emb_channels, out_channels * (2 if style.adaptive else 1))
        self.norm1 = _norm(out_channels, style.eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = ResampleConv2d(out_channels, out_channels, 3, gain=TINY)
        self.skip: nn.Module = nn.Identity()
        if in_channels != out_channels or (resample and style.project):
            self.skip = ResampleConv2d(in_channels, out_channels, 1, resample, resample_filter)
        elif resample:
            self.skip = Resample(resample, resample_filter)
        self.num_heads = 0 if not attention else out_channels // (style.head_channels or out_channels)
        if self.num_heads:
            self.norm2 = _norm(out_channels, style.eps)
            self.qkv = ResampleConv2d(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = ResampleConv2d(out_channels, out_channels, 1, gain=TINY)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W) under the condition (B, E) to (B, out_channels, H', W')."""
        inner, condition = self.conv0(silu(self.norm0(x))), self.affine(emb)[:, :, None, None]
        if self.style.adaptive:
            scale, shift = condition.chunk(2, dim=1)
            inner = self.norm1(inner) * (1 + scale) + shift
        else:
            inner = self.norm1(inner + condition)
        x = (self.conv1(self.dropout(silu(inner))) + self.skip(x)) * self.style.skip_scale
        return (self.attend(x) + x) * self.style.skip_scale if self.num_heads else x

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention of the places of (B, C, H, W); written out, since the fused kernels have no forward-mode
        derivative. The softmax is taken in float32 at least."""
        q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (3 * self.num_heads, -1)).chunk(3, dim=1)
        scores = (q * q.shape[2] ** -0.5).transpose(2, 3) @ k  # of (B, heads, C / heads, N) each
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1).to(v.dtype)
        return self.proj((v @ weights.transpose(2, 3)).reshape(x.shape))


class _UNet(nn.Module):
    """What the U-Nets share: the way down, the way up, and what they are conditioned on."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    in_channels: int
    img_resolution: int
    num_classes: int
    augment_dim: int
    num_times: int

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of what a sample starts from."""
        return self.in_channels, self.img_resolution, self.img_resolution

    def _check(self, times: Sequence[Tensor] | None, augment: Tensor | None, label: Tensor | None) -> None:
        if times is not None and len(times) != self.num_times:
            raise ZooError(f"the network is conditioned on {self.num_times} times, but got {len(times)}")
        if augment is not None and not self.augment_dim:
            raise ZooError("augmentation labels came for a network without augment_dim")
        if (label is not None) != (self.num_classes > 0):
            wants = "wants labels" if label is None else "has no classes, but got labels"
            raise ZooError(f"the network {wants} (label_dim is {self.num_classes})")

    def _one_hot(self, label: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, num_classes) of labels (B,), all 0 for the label `num_classes`, which is none."""
        return one_hot(label, self.num_classes + 1)[:, :-1].to(dtype)

    def condition(
        self, times: Sequence[Tensor] | None, augment: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """The condition (B, E) of all blocks."""
        raise NotImplementedError


class SongUNet(_UNet):
    """DDPM++ and NCSN++; the defaults are EDM's DDPM++ for unconditional CIFAR-10 (55.7M parameters).

    EDM's NCSN++ has `embedding_type` "fourier", `encoder_type` "residual", `channel_mult_noise` 2 and the
    `resample_filter` 1 3 3 1.

    Args:
        img_resolution: side of the square images.
        in_channels, out_channels: of the images.
        model_channels: width of the first level.
        channel_mult: width of each level, in units of `model_channels`; the side halves from level to level.
        channel_mult_emb: width of the condition, likewise.
        num_blocks: residual blocks a level; one more on the way up.
        attn_resolutions: sides at which blocks attend: all of them on the way down, the last on the way up.
        dropout: in the middle of each block.
        channel_mult_noise: width of a time's embedding, in units of `model_channels`.
        resample_filter: taps of the low-pass filter before halving and after doubling.
        augment_dim: length of the label that says how the image was augmented (section 5, "Augmentation
            regularization", of EDM); 0 for none.
        num_times: times the network is conditioned on; their embeddings are concatenated.
        label_dim: number of classes it is conditioned on; 0 for none. The label `label_dim` is "no label".
        embedding_type: of times: sinusoids, or fixed random frequencies.
        encoder_type: "residual" and "skip" bring the image to each level, halved so often.
        decoder_type: "skip" sums pictures of all levels.
    """

    def __init__(
        self,
        img_resolution: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        channel_mult_noise: int = 1,
        resample_filter: Sequence[float] = (1, 1),
        augment_dim: int = 0,
        num_times: int = 1,
        label_dim: int = 0,
        embedding_type: Literal["positional", "fourier"] = "positional",
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        _check_sizes(img_resolution, levels)
        if len(resample_filter) % 2:
            raise ZooError(f"resample_filter must have an even number of taps, not {len(resample_filter)}")
        for kind, word, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if word not in known:
                raise unknown(kind, word, known)
        self.img_resolution, self.in_channels, self.num_times = img_resolution, in_channels, num_times
        self.noise_channels, self.num_classes = model_channels * channel_mult_noise, label_dim
        emb_channels, width = model_channels * channel_mult_emb, self.noise_channels * num_times

        if embedding_type == "fourier":
            self.map_noise = Fourier(self.noise_channels)
        if label_dim:
            self.map_label = _linear(label_dim, width)
        if augment_dim:
            self.map_augment = _linear(augment_dim, width, bias=False)
        self.augment_dim, self.embedding_type = augment_dim, embedding_type
        self.map_layer0 = _linear(width, emb_channels)
        self.map_layer1 = _linear(emb_channels, emb_channels)

        def block(inputs: int, outputs: int, resample: str = "", attention: bool = False) -> UNetBlock:
            return UNetBlock(inputs, outputs, emb_channels, resample, attention, dropout, resample_filter)

        sides = [img_resolution >> level for level in range(levels)]
        widths = [model_channels * mult for mult in channel_mult]
        self.enc = nn.ModuleDict()
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = ResampleConv2d(in_channels, model_channels, 3)
        width, skips, side_width = model_channels, [model_channels], in_channels
        for level, (side, wider) in enumerate(zip(sides, widths, strict=True)):
            if level:
                self.enc[f"{side}x{side}_down"] = block(width, width, "down")
                skips.append(width)
            if level and encoder_type == "skip":
                self.enc[f"{side}x{side}_aux_down"] = Resample("down", resample_filter)
                self.enc[f"{side}x{side}_aux_skip"] = ResampleConv2d(in_channels, width, 1)
            if level and encoder_type == "residual":
                beside = ResampleConv2d(side_width, width, 3, "down", resample_filter, fused=True)
                self.enc[f"{side}x{side}_aux_residual"], side_width = beside, width
            for n in range(num_blocks):
                self.enc[f"{side}x{side}_block{n}"] = block(width, wider, attention=side in attn_resolutions)
                width = wider
                skips.append(width)

        self.dec = nn.ModuleDict()
        self.dec[f"{sides[-1]}x{sides[-1]}_in0"] = block(width, width, attention=True)
        self.dec[f"{sides[-1]}x{sides[-1]}_in1"] = block(width, width)
        for level in reversed(range(levels)):
            side, wider = sides[level], widths[level]
            if level < levels - 1:
                self.dec[f"{side}x{side}_up"] = block(width, width, "up")
            for n in range(num_blocks + 1):
                attends = n == num_blocks and side in attn_resolutions
                self.dec[f"{side}x{side}_block{n}"] = block(width + skips.pop(), wider, attention=attends)
                width = wider
            if decoder_type == "skip" and level < levels - 1:
                self.dec[f"{side}x{side}_aux_up"] = Resample("up", resample_filter)
            if decoder_type == "skip" or not level:
                self.dec[f"{side}x{side}_aux_norm"] = _norm(width)
                self.dec[f"{side}x{side}_aux_conv"] = ResampleConv2d(width, out_channels, 3, gain=TINY)

    def condition(
        self, times: Sequence[Tensor] | None, augment: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """The condition (B, E) of all blocks, of `num_times` times (B,), augmentation labels (B, augment_dim) and
        labels (B,). Without times their embedding is 0; of what is not given at all, (1, E)."""
        self._check(times, augment, label)
        layer = self.map_layer0
        if times is None:
            emb = layer.weight.new_zeros(1, layer.in_features)
        elif self.embedding_type == "fourier":
            emb = torch.cat([self.map_noise(t) for t in times], dim=1).to(layer.weight.dtype)
        else:
            emb = torch.cat([sinusoid(t, self.noise_channels) for t in times], dim=1).to(layer.weight.dtype)
        if label is not None:
            emb = emb + self.map_label(self._one_hot(label, emb.dtype) * math.sqrt(self.num_classes))
        if augment is not None:
            emb = emb + self.map_augment(augment)
        return silu(self.map_layer1(silu(layer(emb))))

    def forward(
        self,
        x: Tensor,
        times: Sequence[Tensor] | None,
        augment: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Images (B, C, S, S) at times (B,) each to (B, out_channels, S, S).

        `augment` (B, augment_dim) tells how the images were augmented; None, as in sampling, means not at all. Without
        `times` the network does not know them. `label` (B,) is of a network with classes.
        """
        emb = self.condition(times, augment, label)
        skips: list[Tensor] = []
        beside = x
        for name, block in self.enc.items():
            if "_aux_down" in name:
                beside = block(beside)
            elif "_aux_skip" in name:
                x = skips[-1] = x + block(beside)
            elif "_aux_residual" in name:
                x = skips[-1] = beside = (x + block(beside)) * SONG.skip_scale
            else:
                x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
                skips.append(x)
        picture: Tensor | None = None
        normed = x
        for name, block in self.dec.items():
            if "_aux_up" in name:
                picture = block(picture)
            elif "_aux_norm" in name:
                normed = block(x)
            elif "_aux_conv" in name:
                found = block(silu(normed))
                picture = found if picture is None else picture + found
            else:
                if block.in_channels != x.shape[1]:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, emb)
        assert picture is not None
        return picture


class DhariwalUNet(_UNet):
    """ADM; the defaults are EDM's for ImageNet in 64 x 64 pixels (without its classes).

    Args:
        attn_resolutions: sides at which all blocks attend.
        img_resolution, in_channels, out_channels, model_channels, channel_mult, channel_mult_emb, num_blocks, dropout,
            augment_dim, label_dim: as in :class:`SongUNet`.
    """

    num_times = 1

    def __init__(
        self,
        img_resolution: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        augment_dim: int = 0,
        label_dim: int = 0,
    ) -> None:
        super().__init__()
        levels, self.num_classes, self.augment_dim = len(channel_mult), label_dim, augment_dim
        _check_sizes(img_resolution, levels)
        self.img_resolution, self.in_channels = img_resolution, in_channels
        emb_channels = model_channels * channel_mult_emb
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, model_channels, bias=False)
        if label_dim:
            self.map_label = nn.Linear(label_dim, emb_channels, bias=False)

        def block(inputs: int, outputs: int, resample: str = "", attention: bool = False) -> UNetBlock:
            return UNetBlock(inputs, outputs, emb_channels, resample, attention, dropout, style=ADM)

        sides = [img_resolution >> level for level in range(levels)]
        widths = [model_channels * mult for mult in channel_mult]
        self.enc = nn.ModuleDict()
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = ResampleConv2d(in_channels, widths[0], 3)
        width = widths[0]
        skips = [width]
        for level, (side, wider) in enumerate(zip(sides, widths, strict=True)):
            if level:
                self.enc[f"{side}x{side}_down"] = block(width, width, "down")
                skips.append(width)
            for n in range(num_blocks):
                self.enc[f"{side}x{side}_block{n}"] = block(width, wider, attention=side in attn_resolutions)
                width = wider
                skips.append(width)
        self.dec = nn.ModuleDict()
        self.dec[f"{sides[-1]}x{sides[-1]}_in0"] = block(width, width, attention=True)
        self.dec[f"{sides[-1]}x{sides[-1]}_in1"] = block(width, width)
        for level in reversed(range(levels)):
            side, wider = sides[level], widths[level]
            if level < levels - 1:
                self.dec[f"{side}x{side}_up"] = block(width, width, "up")
            for n in range(num_blocks + 1):
                attends = side in attn_resolutions
                self.dec[f"{side}x{side}_block{n}"] = block(width + skips.pop(), wider, attention=attends)
                width = wider
        self.out_norm = _norm(width, ADM.eps)
        self.out_conv = ResampleConv2d(width, out_channels, 3)
        self._start()

    def _start(self) -> None:
        """Uniform within 1 / sqrt(fan-in), weights and biases, as torch's layers are; the last of each branch 0."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.reset_parameters()
                if name.rpartition(".")[2] in ("conv1", "proj", "out_conv", "map_augment"):
                    nn.init.zeros_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        if self.num_classes:
            nn.init.normal_(self.map_label.weight)

    def condition(
        self, times: Sequence[Tensor] | None, augment: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """As :meth:`SongUNet.condition`, but that the label joins behind the two layers."""
        self._check(times, augment, label)
        layer = self.map_layer0
        if times is None:
            emb = layer.weight.new_zeros(1, layer.in_features)
        else:
            emb = sinusoid(times[0], layer.in_features, endpoint=False).to(layer.weight.dtype)
            emb = emb.roll(layer.in_features // 2, 1)  # cosines first
        if augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(silu(layer(emb)))
        if label is not None:
            emb = emb + self.map_label(self._one_hot(label, emb.dtype))
        return silu(emb)

    def forward(
        self,
        x: Tensor,
        times: Sequence[Tensor] | None,
        augment: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`SongUNet.forward`."""
        emb = self.condition(times, augment, label)
        skips: list[Tensor] = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for block in self.dec.values():
            if block.in_channels != x.shape[1]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return self.out_conv(silu(self.out_norm(x)))


def _check_sizes(side: int, levels: int) -> None:
    if not levels or side % 2 ** (levels - 1):
        raise ZooError(f"a side of {side} cannot be halved {levels - 1} times: shorten channel_mult")


_AFFINE = r"\.(?:weight|bias)"
_OFFICIAL = re.compile(
    rf"map_augment\.weight|map_(?:layer[01]|label){_AFFINE}|map_noise\.freqs|out_(?:norm|conv){_AFFINE}"
    rf"|(?:enc|dec)\.\d+x\d+_(?:conv|aux_norm|aux_conv|aux_skip){_AFFINE}"
    r"|(?:enc|dec)\.\d+x\d+_(?:aux_down|aux_up)\.resample_filter"
    r"|enc\.\d+x\d+_aux_residual\.(?:weight|bias|resample_filter)"
    rf"|(?:enc|dec)\.\d+x\d+_(?:block\d+|down|up|in[01])"
    rf"\.(?:norm[012]{_AFFINE}|affine{_AFFINE}|qkv{_AFFINE}|proj{_AFFINE}"
    r"|(?:conv[01]|skip)\.(?:weight|bias|resample_filter))"
)


def convert_edm(state_dict: Mapping[str, Tensor], head_channels: int | None = None) -> dict[str, Tensor]:
    """A state dict in the names of EDM's releases, which are those of the U-Nets here.

    Args:
        head_channels: of an attention head, where the file's rows of queries, keys and values alternate within a head,
            as EDM's own do; 0: there is one head. None: rows come as here (MeanFlow's PyTorch code).

    Raises:
        ZooError: a key of another layout.
    """
    if foreign := [key for key in state_dict if not _OFFICIAL.fullmatch(key)]:
        raise ZooError(f"not a checkpoint of this U-Net: {len(foreign)} unknown keys, such as {foreign[0]!r}")
    state = dict(state_dict)
    for key, value in state.items() if head_channels is not None else ():
        if ".qkv." in key:
            channels = len(value) // 3
            parts = value.unflatten(0, (channels // (head_channels or channels), -1, 3))
            state[key] = parts.movedim(2, 0).reshape(value.shape)
    return state
