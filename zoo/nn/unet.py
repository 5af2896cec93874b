"""The DDPM++ U-Net (Song et al. 2021, arXiv 2011.13456) as EDM trains it (Karras et al. 2022, arXiv 2206.00364).

Parameter names are those of EDM's releases and of what descends from them (`enc.32x32_block0.conv0.weight`). Residual
blocks are scaled by sqrt(1/2); the condition is added to their middle; attention has one head. Every operation has a
forward-mode derivative, so that `torch.func.jvp` runs through the network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, silu

from zoo.errors import ZooError

SKIP_SCALE = math.sqrt(0.5)
NORM_EPS = 1e-6
TINY = 1e-5  # gain of the layers that begin at almost nothing
MAX_PERIOD = 10_000


def sinusoid(t: Tensor, channels: int) -> Tensor:
    """The embedding (B, channels) of times (B,), in their own unit: sines first, then cosines.

    Frequencies fall geometrically from 1 to 1/10000, both included.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / max(1, half - 1)
    angle = t[:, None] * (1 / MAX_PERIOD) ** exponent.to(t.dtype)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResampleConv2d(nn.Conv2d):
    """A convolution with bias, after halving ("down") or doubling ("up") the side by a separable low-pass filter."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        resample: str = "",
        resample_filter: Sequence[float] = (1, 1),
        gain: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.resample = resample
        if resample:
            taps = torch.as_tensor(resample_filter, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum().square())[None, None])
        _init(self, gain)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out_channels, H', W'), H' being H, H / 2 or 2 H."""
        if self.resample:
            taps: Tensor = self.get_buffer("resample_filter").to(x.dtype).expand(x.shape[1], -1, -1, -1)
            padding = (taps.shape[-1] - 1) // 2
            if self.resample == "up":
                x = conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=x.shape[1])
            else:
                x = conv2d(x, taps, stride=2, padding=padding, groups=x.shape[1])
        return super().forward(x)


def _init(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> None:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias)
    _init(layer)
    return layer


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=NORM_EPS)


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
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm0 = _norm(in_channels)
        self.conv0 = ResampleConv2d(in_channels, out_channels, 3, resample, resample_filter)
        self.affine = _linear(emb_channels, out_channels)
        self.norm1 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = ResampleConv2d(out_channels, out_channels, 3, gain=TINY)
        self.skip: nn.Module = nn.Identity()
        if resample or in_channels != out_channels:
            self.skip = ResampleConv2d(in_channels, out_channels, 1, resample, resample_filter)
        self.attention = attention
        if attention:
            self.norm2 = _norm(out_channels)
            self.qkv = ResampleConv2d(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = ResampleConv2d(out_channels, out_channels, 1, gain=TINY)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W) under the condition (B, E) to (B, out_channels, H', W')."""
        inner = self.conv0(silu(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        inner = self.conv1(self.dropout(silu(self.norm1(inner))))
        x = (inner + self.skip(x)) * SKIP_SCALE
        return (self.attend(x) + x) * SKIP_SCALE if self.attention else x

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention of the places of (B, C, H, W), in one head; written out, since the fused kernels have no
        forward-mode derivative. The softmax is taken in float32 at least."""
        q, k, v = self.qkv(self.norm2(x)).flatten(2).chunk(3, dim=1)  # (B, C, N) each
        scores = (q * q.shape[1] ** -0.5).transpose(1, 2) @ k
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1).to(v.dtype)
        return self.proj((v @ weights.transpose(1, 2)).reshape(x.shape))


class SongUNet(nn.Module):
    """The U-Net; the defaults are EDM's for unconditional CIFAR-10 (DDPM++, 55.7M parameters).

    Args:
        img_resolution: side of the square images.
        in_channels, out_channels: of the images.
        model_channels: width of the first level.
        channel_mult: width of each level, in units of `model_channels`; the side halves from level to level.
        channel_mult_emb: width of the condition, likewise.
        num_blocks: residual blocks a level; one more on the way up.
        attn_resolutions: sides at which blocks attend: all of them on the way down, the last on the way up.
        dropout: in the middle of each block.
        channel_mult_noise: width of a time's sinusoid, in units of `model_channels`.
        resample_filter: taps of the low-pass filter before halving and after doubling.
        augment_dim: length of the label that says how the image was augmented (section 5, "Augmentation
            regularization", of EDM); 0 for none.
        num_times: times the network is conditioned on; their sinusoids are concatenated.
    """

    num_classes = 0

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
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        if not levels or img_resolution % 2 ** (levels - 1):
            raise ZooError(f"a side of {img_resolution} cannot be halved {levels - 1} times: shorten channel_mult")
        if len(resample_filter) % 2:
            raise ZooError(f"resample_filter must have an even number of taps, not {len(resample_filter)}")
        self.img_resolution, self.in_channels, self.num_times = img_resolution, in_channels, num_times
        self.noise_channels = model_channels * channel_mult_noise
        emb_channels = model_channels * channel_mult_emb

        if augment_dim:
            self.map_augment = _linear(augment_dim, self.noise_channels * num_times, bias=False)
        self.augment_dim = augment_dim
        self.map_layer0 = _linear(self.noise_channels * num_times, emb_channels)
        self.map_layer1 = _linear(emb_channels, emb_channels)

        def block(inputs: int, outputs: int, resample: str = "", attention: bool = False) -> UNetBlock:
            return UNetBlock(inputs, outputs, emb_channels, resample, attention, dropout, resample_filter)

        sides = [img_resolution >> level for level in range(levels)]
        widths = [model_channels * mult for mult in channel_mult]
        self.enc = nn.ModuleDict()
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = ResampleConv2d(in_channels, model_channels, 3)
        width, skips = model_channels, [model_channels]
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
                attends = n == num_blocks and side in attn_resolutions
                self.dec[f"{side}x{side}_block{n}"] = block(width + skips.pop(), wider, attention=attends)
                width = wider
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = _norm(width)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = ResampleConv2d(width, out_channels, 3, gain=TINY)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of what a sample starts from."""
        return self.in_channels, self.img_resolution, self.img_resolution

    def condition(self, times: Sequence[Tensor], augment: Tensor | None = None) -> Tensor:
        """The condition (B, E) of all blocks, of `num_times` times (B,) and augmentation labels (B, augment_dim)."""
        if len(times) != self.num_times:
            raise ZooError(f"the network is conditioned on {self.num_times} times, but got {len(times)}")
        emb = torch.cat([sinusoid(t, self.noise_channels) for t in times], dim=1)
        if augment is not None:
            if not self.augment_dim:
                raise ZooError("augmentation labels came for a network without augment_dim")
            emb = emb + self.map_augment(augment)
        return silu(self.map_layer1(silu(self.map_layer0(emb))))

    def forward(self, x: Tensor, times: Sequence[Tensor], augment: Tensor | None = None) -> Tensor:
        """Images (B, C, S, S) at times (B,) each to (B, out_channels, S, S).

        `augment` (B, augment_dim) tells how the images were augmented; None, as in sampling, means not at all.
        """
        emb = self.condition(times, augment)
        skips: list[Tensor] = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        *blocks, norm, conv = self.dec.values()
        for block in blocks:
            if block.in_channels != x.shape[1]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return conv(silu(norm(x)))


_AFFINE = r"\.(?:weight|bias)"
_OFFICIAL = re.compile(
    rf"map_augment\.weight|map_layer[01]{_AFFINE}|(?:enc|dec)\.\d+x\d+_(?:conv|aux_norm|aux_conv){_AFFINE}"
    rf"|(?:enc|dec)\.\d+x\d+_(?:block\d+|down|up|in[01])"
    rf"\.(?:norm[012]{_AFFINE}|affine{_AFFINE}|qkv{_AFFINE}|proj{_AFFINE}"
    r"|(?:conv[01]|skip)\.(?:weight|bias|resample_filter))"
)


def convert_edm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the names of EDM's releases, which are those of :class:`SongUNet`.

    Raises:
        ZooError: a key of another layout.
    """
    if foreign := [key for key in state_dict if not _OFFICIAL.fullmatch(key)]:
        raise ZooError(f"not a checkpoint of this U-Net: {len(foreign)} unknown keys, such as {foreign[0]!r}")
    return dict(state_dict)
