"""LPIPS and ConvNeXt V2 as frozen features. Their published weights are never fetched here."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn import perceptual
from zoo.nn.perceptual import (
    LPIPS,
    ConvNeXtV2Features,
    FrozenNetwork,
    GlobalResponseNorm,
    convert_convnextv2,
    load_convnextv2,
    load_lpips,
)

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


def pictures(count: int = 2, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_lpips_is_zero_for_equal_pictures_and_differentiable(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = LPIPS().requires_grad_(False)
    x, y = pictures(), pictures().flip(0).requires_grad_()
    distance = net(x, y)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    assert net(x, x).equal(torch.zeros(2))
    torch.testing.assert_close(net(x[:1], y[:1]), distance[:1])
    distance.sum().backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()
    # The published weights of the depths, and a file of VGG-16 with its classifier beside.
    torch.save({**net.features.state_dict(prefix="features."), "classifier.0.bias": torch.zeros(1)}, tmp_path / "v.pth")
    loaded = load_lpips(str(tmp_path / "v.pth"))
    assert all((weight >= 0).all() for weight in loaded.weights)
    assert loaded.features[0].weight.equal(net.features[0].weight)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_response_norm_has_a_gradient_at_zero() -> None:
    norm = GlobalResponseNorm(3)
    nn.init.ones_(norm.weight)
    x = torch.zeros(1, 2, 2, 3, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    x = torch.rand(1, 2, 2, 3)
    length = (x.square().sum((1, 2), keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), x + x * length / (length.mean(-1, keepdim=True) + 1e-6))


def test_convnext_gives_maps_and_pooled_features() -> None:
    net = ConvNeXtV2Features(**SMALL).eval()
    maps = net.maps(pictures(side=64))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 24, 4, 4), (2, 32, 2, 2)]
    mean = maps[-1].mean((2, 3))
    torch.testing.assert_close(net(pictures(side=64)), nn.functional.layer_norm(mean, (32,), eps=1e-6))


OFFICIAL = ((r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
            (r"\.blocks", ""), (r"conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"), (r"mlp\.grn\.weight", "grn.gamma"),
            (r"mlp\.grn\.bias", "grn.beta"), (r"^head\.norm", "norm"))  # fmt: skip
HUB = ((r"^stem\.0\.", "embeddings.patch_embeddings."), (r"^stem\.1\.", "embeddings.layernorm."),
       (r"\.downsample\.", ".downsampling_layer."), (r"\.blocks\.", ".layers."), (r"conv_dw", "dwconv"),
       (r"(\.layers\.\d+)\.norm\.", r"\1.layernorm."), (r"mlp\.fc", "pwconv"), (r"mlp\.grn", "grn"),
       (r"^head\.norm", "layernorm"), (r"^stages", "encoder.stages"), (r"^", "convnextv2."))  # fmt: skip


@pytest.mark.parametrize(
    ("renames", "head", "first"),
    [
        (OFFICIAL, "head", "downsample_layers.0.0.weight"),
        (HUB, "classifier", "convnextv2.embeddings.patch_embeddings.weight"),
        ((), "head.fc", "stem.0.weight"),
    ],
)
def test_every_layout_of_convnext_is_read(
    renames: tuple[tuple[str, str], ...], head: str, first: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = ConvNeXtV2Features(**SMALL)
    state = {f"{head}.weight": torch.zeros(2, 32), f"{head}.bias": torch.zeros(2)}
    for key, value in net.network.state_dict().items():
        name = key
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        state[name] = value[None, None, None] if renames and ".grn." in name else value
    assert first in state
    found = convert_convnextv2(state)
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        key: tuple(value.shape) for key, value in net.state_dict().items()
    }
    monkeypatch.setattr(perceptual, "ConvNeXtV2Features", partial(ConvNeXtV2Features, **SMALL))
    torch.save({"model": state}, tmp_path / "c.pt")
    x = pictures()
    assert load_convnextv2(str(tmp_path / "c.pt"))(x).equal(net.eval()(x))


def test_a_frozen_network_is_no_part_of_its_owner() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = FrozenNetwork(lambda: ConvNeXtV2Features(**SMALL))

    owner = Owner()
    owner.features.check()
    net = owner.features.net(torch.device("cpu"))
    assert not list(owner.parameters())
    assert not owner.state_dict()
    assert net is owner.features.net(torch.device("cpu"))
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(("load", "what"), [(load_lpips, "LPIPS"), (load_convnextv2, "ConvNeXt V2")])
def test_missing_weights_are_told_in_one_line(
    load: object, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert callable(load)
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    monkeypatch.setattr(perceptual, "cache_dir", lambda: tmp_path)
    with pytest.raises(ZooError, match=rf"^no weights of {what}: put .* in .*perceptual, or name a file") as error:
        load()
    assert "\n" not in str(error.value)
    with pytest.raises(ZooError, match=rf"no weights of {what} 'x.pth'"):
        load("x.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ZooError, match="not the weights of"):
        load(str(tmp_path / "x.pth"))
