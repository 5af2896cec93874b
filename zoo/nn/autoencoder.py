"""Autoencoders between pictures and the latents that a generative model lives in.

:class:`Autoencoder` is the interface: pictures in [-1, 1] to the moments of a Gaussian, and scaled latents back to
pictures. :class:`AutoencoderKL` is the convolutional one of latent diffusion (Rombach et al. 2022, arXiv 2112.10752,
appendix G) with the names of its first release; :func:`convert_autoencoder` also takes those of diffusers.
:class:`Pixels` is the identity, for models of pictures themselves.

Latents are scaled: a model sees `(mean + std * noise) * scale`, and :meth:`Autoencoder.decode` takes what it makes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu

from zoo.errors import ZooError
from zoo.ops.attention import attention
from zoo.ops.sheet import titled_sheet

SD_SCALE = 0.18215
NORM_EPS = 1e-6
PIXELS = "pixels"


class Autoencoder(nn.Module):
    """The interface.

    Attributes:
        channels: of the latents.
        factor: side of a picture over the side of its latents.
        scale: what latents are multiplied by, to have a deviation of about 1.
    """

    channels: int = 3
    factor: int = 1
    scale: float = 1.0

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] to mean and standard deviation (B, channels, H / factor, W / factor) of
        their latents, not scaled."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, channels, h, w) to pictures (B, 3, h * factor, w * factor), about in [-1, 1]."""
        raise NotImplementedError

    def latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents of pictures: drawn with standard normal `noise`, or the mean where there is none."""
        mean, std = self.encode(images)
        return (mean if noise is None else mean + std * noise) * self.scale

    def check(self, images: Tensor) -> None:
        """Raises ZooError unless pictures (B, 3, H, W) have sides that `factor` divides."""
        height, width = images.shape[-2:]
        if images.shape[-3] != 3 or height % self.factor or width % self.factor:
            raise ZooError(
                f"the autoencoder takes pictures of 3 channels and sides divisible by {self.factor}, not"
                f" {tuple(images.shape[1:])}"
            )


class Pixels(Autoencoder):
    """No autoencoder: a picture is its own latent, with no deviation."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.check(images)
        return images, torch.zeros_like(images)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


# ------------------------------------------------------------------------------------------------------- convolutional


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution on the way past where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)
        self.wider = inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if self.wider else x) + inner


class AttnBlock(nn.Module):
    """x plus the self-attention of its places, in one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        out = attention(q, k, v)[:, 0].transpose(1, 2)  # (B, C, H * W)
        return x + self.proj_out(out.reshape(x.shape))


class Downsample(nn.Module):
    """Halves the side; padded at the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the side by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """The blocks of one side of the picture, and the step to the next ("downsample", "upsample" or none)."""

    def __init__(self, inputs: int, outputs: int, depth: int, attend: bool, step: str = "") -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(inputs if n == 0 else outputs, outputs) for n in range(depth))
        self.attn = nn.ModuleList(AttnBlock(outputs) for _ in range(depth if attend else 0))
        self.step = step
        if step:
            self.add_module(step, Downsample(outputs) if step == "downsample" else Upsample(outputs))

    def forward(self, x: Tensor) -> Tensor:
        for n, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[n](x)
        return self.get_submodule(self.step)(x) if self.step else x


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) to (B, 2 * latent channels, H / factor, W / factor)."""

    def __init__(self, widths: Sequence[int], depth: int, channels: int, attn_levels: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            step = "downsample" if level < len(widths) - 1 else ""
            self.down.append(_Level(widths[max(0, level - 1)], width, depth, level in attn_levels, step))
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, channels, h, w) to pictures (B, 3, h * factor, w * factor); `up` counts from the full size."""

    def __init__(self, widths: Sequence[int], depth: int, channels: int, attn_levels: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[min(len(widths) - 1, level + 1)]
            step = "upsample" if level else ""
            self.up.append(_Level(before, width, depth + 1, level in attn_levels, step))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(silu(self.norm_out(x)))


class AutoencoderKL(Autoencoder):
    """The convolutional autoencoder of latent diffusion; the defaults are Stable Diffusion's (f 8, 83.7M parameters).

    Args:
        channels: of the latents.
        width: of the first level.
        channel_mult: width of each level, in units of `width`; the side halves from level to level.
        depth: residual blocks a level; the decoder has one more.
        attn_levels: levels of the encoder whose blocks attend; 0 is the full size.
        decoder_attn_levels: likewise of the decoder.
        scale: what the latents are multiplied by.
    """

    def __init__(
        self,
        channels: int = 4,
        width: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        depth: int = 2,
        attn_levels: Sequence[int] = (),
        decoder_attn_levels: Sequence[int] = (),
        scale: float = SD_SCALE,
    ) -> None:
        super().__init__()
        self.channels, self.factor, self.scale = channels, 2 ** (len(channel_mult) - 1), scale
        widths = [width * mult for mult in channel_mult]
        self.encoder = Encoder(widths, depth, channels, attn_levels)
        self.decoder = Decoder(widths, depth, channels, decoder_attn_levels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.check(images)
        mean, log_var = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, (0.5 * log_var.clamp(-30, 20)).exp()

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents / self.scale))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) as they come back from the mean of their latents."""
        return self.decode(self.latents(images))

    @torch.no_grad()
    def picture(self, images: Tensor, mean: Any = (0.5,) * 3, std: Any = (0.5,) * 3) -> Tensor:
        """A uint8 sheet (3, H, W): a row an image; titled columns original and reconstruction. `mean` and `std` are
        those by which `images` were normalised."""
        shift, scale = (
            torch.as_tensor(v, dtype=images.dtype, device=images.device)[:, None, None] for v in (mean, std)
        )
        pixels = images * scale + shift  # in [0, 1]
        back = (self(pixels * 2 - 1) + 1) / 2
        return titled_sheet({"original": pixels, "reconstruction": back})


def sd_vae(**overrides: Any) -> AutoencoderKL:
    """The autoencoder of Stable Diffusion: 4 channels, factor 8, latents times 0.18215."""
    return AutoencoderKL(**overrides)


# ------------------------------------------------------------------------------------------------------------- weights

# diffusers' names of an attention's parts, those of its first versions and those of today.
_ATTENTION = {
    "group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def convert_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights in our names: those of diffusers (old or new) are translated, latent diffusion's are ours.

    Total: every key is kept, under one name or another.

    Raises:
        ZooError: the keys are of neither layout.
    """
    if not any("down_blocks." in key for key in state):
        if "encoder.down.0.block.0.norm1.weight" not in state:
            raise ZooError("not the weights of a convolutional autoencoder: no encoder.down.0 and no down_blocks")
        return dict(state)
    levels = 1 + max(int(match[1]) for key in state if (match := re.search(r"down_blocks\.(\d+)\.", key)))
    converted = {}
    for key, value in state.items():
        name = _from_diffusers(key, levels)
        if re.search(r"\.(q|k|v|proj_out)\.weight$", name) and value.ndim == 2:
            value = value[:, :, None, None]
        converted[name] = value
    return converted


def _from_diffusers(key: str, levels: int) -> str:
    half, _, rest = key.partition(".")
    if half not in ("encoder", "decoder"):
        return key
    rest = re.sub(r"^down_blocks\.", "down.", rest)
    rest = re.sub(r"^up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", rest)
    rest = re.sub(r"^mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", rest)
    rest = re.sub(r"^mid_block\.attentions\.(\d+)", lambda match: f"mid.attn_{int(match[1]) + 1}", rest)
    rest = rest.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
    rest = rest.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    rest = rest.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
    if ".attn" in rest:
        for theirs, ours in _ATTENTION.items():
            rest = re.sub(rf"\.{re.escape(theirs)}\.(weight|bias)$", rf".{ours}.\1", rest)
    return f"{half}.{rest}"


def load_autoencoder(source: str, scale: float | None = None) -> Autoencoder:
    """An autoencoder in evaluation mode whose weights take no gradient.

    Args:
        source: "pixels" for none; or the weights of an :class:`AutoencoderKL`: a name of the catalog
            (``sd_vae.ft_mse``) or a file, in the layout of diffusers or of latent diffusion. Sizes are read off them.
        scale: of the latents; None: Stable Diffusion's 0.18215.

    Raises:
        ZooError: nothing by that name, or not the weights of such an autoencoder.
    """
    if source == PIXELS:
        return Pixels()
    from zoo.weights.pretrained import mismatch, read_source, shapes

    state = convert_autoencoder(read_source(source))
    with torch.device("meta"):
        net = AutoencoderKL(**_sizes(state, source))
    if report := mismatch(state, shapes(net)):
        raise ZooError(f"{source} does not fit an autoencoder: {report}")
    net.load_state_dict(dict(state), assign=True)
    if scale is not None:
        net.scale = scale
    return net.eval().requires_grad_(False)


def _sizes(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The arguments of the :class:`AutoencoderKL` that weights belong to."""
    try:
        width = state["encoder.conv_in.weight"].shape[0]
        levels = 1 + max(int(match[1]) for key in state if (match := re.match(r"encoder\.down\.(\d+)\.", key)))
        return {
            "channels": state["post_quant_conv.weight"].shape[0],
            "width": width,
            "channel_mult": [
                state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] // width for level in range(levels)
            ],
            "depth": sum(bool(re.match(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", key)) for key in state),
            "attn_levels": [level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in state],
            "decoder_attn_levels": [level for level in range(levels) if f"decoder.up.{level}.attn.0.q.weight" in state],
        }
    except (KeyError, ValueError) as error:
        raise ZooError(f"{source} does not fit an autoencoder: no {error}") from error


class FrozenAutoencoder:
    """An autoencoder that a task decodes with and does not own: loaded at first use, on the device of what it is given,
    and no part of the task's parameters, checkpoints and averages.

    Args:
        source, scale: as in :func:`load_autoencoder`.
        batch_size: pictures or latents taken at a time.
    """

    def __init__(self, source: str = PIXELS, scale: float | None = None, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ZooError(f"an autoencoder's batch_size must be at least 1, not {batch_size}")
        self.source, self.scale, self.batch_size = source, scale, batch_size
        self._net: Autoencoder | None = None

    def net(self, device: torch.device) -> Autoencoder:
        """The network on `device`, in float32."""
        if self._net is None:
            self._net = load_autoencoder(self.source, self.scale).float()
        return self._net.to(device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, channels, h, w) to pictures (B, 3, H, W); computed in float32."""
        if self.source == PIXELS:
            return latents
        net = self.net(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([net.decode(part.float()) for part in latents.split(self.batch_size)])

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] to the mean and the deviation of their latents; computed in float32."""
        net = self.net(images.device)
        with torch.autocast(images.device.type, enabled=False):
            parts = [net.encode(part.float()) for part in images.split(self.batch_size)]
        mean, std = (torch.cat(moments) for moments in zip(*parts, strict=True))
        return mean, std
