"""Sheets of pictures with titles."""

from __future__ import annotations

import torch

from zoo.ops.sheet import drawable, titled_sheet


def test_a_sheet_has_titles_above_whole_pictures() -> None:
    images = torch.rand(2, 3, 40, 64)
    sheet = titled_sheet({"one": images, "a title too long for the width of its column": 1 - images[:, :1]})
    assert sheet.dtype == torch.uint8
    height = sheet.shape[1] - (2 * 80 + 4)
    assert sheet.shape[2] == 2 * 128 + 4
    left, right = sheet[:, height:, :128], sheet[:, height:, 132:]
    pixels = (images * 255).round().to(torch.uint8)  # every one of them twice as wide and high
    assert torch.equal(left[:, :80:2, ::2], pixels[0])
    assert torch.equal(left[:, 85::2, 1::2], pixels[1])
    assert torch.equal(right[2, :80:2, ::2], ((1 - images[0, 0]) * 255).round().to(torch.uint8))
    titles = sheet[:, :height].float().mean(0) < 200
    assert titles[:, :128].any()
    assert titles[:, 132:].any()
    assert not titles[:, [0, 128, 129, 130, 131]].any()  # no title runs into the next


def test_letters_that_the_font_lacks_are_drawn_otherwise():
    assert drawable("Fréchet, naïve … 猫") == "Frechet, naive ... ?"
