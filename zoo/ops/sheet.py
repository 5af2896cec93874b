"""Pictures beside each other, with a title above each column."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

LEAST_SIDE = 128  # pixels of a column


def titled_sheet(columns: Mapping[str, Tensor]) -> Tensor:
    """A uint8 sheet (3, H, W): a row an image, a column a title.

    Args:
        columns: for each title images (B, 1 or 3, h, w) in [0, 1]; what lies outside is clipped. All of one size; those
            under 128 pixels wide are enlarged by a whole number.
    """
    views = [view.detach().float().cpu().clamp(0, 1) for view in columns.values()]
    zoom = max(1, LEAST_SIDE // views[0].shape[-1])
    views = [view.expand(-1, 3, -1, -1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3) for view in views]
    width = views[0].shape[-1]
    gap = max(1, width // 32)
    framed = torch.cat([pad(view, (0, gap, 0, gap), value=1.0) for view in views], dim=3)
    sheet = (torch.cat(list(framed), dim=1)[:, :-gap, :-gap] * 255).round().to(torch.uint8)
    return torch.cat([_titles(list(columns), width, gap), sheet], dim=1)


def drawable(text: str) -> str:
    """`text` in letters that Pillow's own font has: without accents, and with ? for those of other scripts."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(letters).encode("ascii", "replace").decode()


def _titles(titles: list[str], width: int, gap: int) -> Tensor:
    """A white strip (3, h, W) with each title in the middle of its column, in the largest type that all fit in."""
    from PIL import Image, ImageDraw, ImageFont

    titles, size = [drawable(title) for title in titles], max(6, width // 9)
    font = ImageFont.load_default(size)
    while size > 6 and max(font.getlength(title) for title in titles) > width:
        font = ImageFont.load_default(size := size - 1)
    strip = Image.new("RGB", ((width + gap) * len(titles) - gap, round(1.6 * size)), "white")
    pen = ImageDraw.Draw(strip)
    for column, title in enumerate(titles):
        pen.text((column * (width + gap) + width / 2, strip.height / 2), title, fill="black", font=font, anchor="mm")
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)
