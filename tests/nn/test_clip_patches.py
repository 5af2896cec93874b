"""A CLIP's image tower as a teacher of patches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm import create_model

from zoo.errors import ZooError
from zoo.nn.clip_patches import load_clip_patches


def test_clips_tower_by_timm_sees_as_many_patches(tmp_path: Path) -> None:
    small = "vit_tiny_patch16_224"  # any ViT of timm reads so; CLIP's own is 86 M parameters
    torch.save(create_model(small, pretrained=False).state_dict(), tmp_path / "tower.pth")
    tower = load_clip_patches(small, 3, str(tmp_path / "tower.pth")).eval()
    assert tower.size == 48
    assert tower(torch.rand(2, 3, 24, 24)).shape == (2, 9, 192)
    with pytest.raises(ZooError, match="vit_base_patch16_clip_224"):
        load_clip_patches("vit_base_patch16_clip_22", 3)
