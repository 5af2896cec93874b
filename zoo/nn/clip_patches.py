"""What the image tower of a CLIP (Radford et al. 2021, arXiv 2103.00020) says of each patch of a picture, by timm. A
frozen target: hold it in a :class:`~zoo.nn.perceptual.FrozenNetwork`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from zoo.errors import ZooError, unknown

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPPatches(nn.Module):
    """A timm ViT that is shown pictures of such a size that it has `grid` x `grid` patches.

    Args:
        network: for pictures of that size.
    """

    def __init__(self, network: Any, grid: int) -> None:
        super().__init__()
        self.network, self.size = network, grid * network.patch_embed.patch_size[0]

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [0, 1] to features (B, grid * grid, F) of their patches, row by row."""
        if pixels.shape[-1] != self.size:
            pixels = interpolate(pixels, size=self.size, mode="bicubic", align_corners=False, antialias=True)
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        tokens = self.network.forward_features((pixels - mean) / std)
        return tokens[:, self.network.num_prefix_tokens :]


def _known(name: str) -> None:
    from timm import is_model, list_models

    if not is_model(name.partition(".")[0]):
        raise unknown("CLIP tower of timm", name, list_models("*_clip_*"))


def clip_width(name: str) -> int:
    """F, the channels of the tower that timm calls `name`.

    Raises:
        ZooError: timm has no such network.
    """
    from timm import create_model

    _known(name)
    with torch.device("meta"):
        network: Any = create_model(name.partition(".")[0], pretrained=False, num_classes=0)
    return int(network.num_features)


def load_clip_patches(name: str, grid: int, file: str | None = None) -> CLIPPatches:
    """The tower that timm calls `name`, with its weights.

    Args:
        grid: patches along a side.
        file: of weights, as timm reads them; None: what timm has in its cache or downloads.

    Raises:
        ZooError: an unknown name, or weights that cannot be had.
    """
    from timm import create_model

    _known(name)
    if file is not None and not Path(file).expanduser().is_file():
        raise ZooError(f"no weights of CLIP's {name}: there is no file {file!r}")
    with torch.device("meta"):
        plain: Any = create_model(name.partition(".")[0], pretrained=False)
    side = plain.patch_embed.patch_size[0] * grid
    overlay = None if file is None else {"file": str(Path(file).expanduser())}
    try:
        network = create_model(name, pretrained=True, num_classes=0, img_size=side, pretrained_cfg_overlay=overlay)
    except Exception as error:  # whatever a hub, a network or a file may raise
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ZooError(f"no weights of CLIP's {name}: name their file (model.teacher_file) ({line})") from error
    return CLIPPatches(network, grid)
