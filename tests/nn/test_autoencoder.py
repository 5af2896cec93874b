"""Autoencoders: published layouts, agreement with diffusers, the interface."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoo.errors import ZooError
from zoo.nn.autoencoder import (
    Autoencoder,
    AutoencoderKL,
    FrozenAutoencoder,
    Pixels,
    convert_autoencoder,
    load_autoencoder,
    sd_vae,
)

TINY = {"width": 32, "channel_mult": (1, 1, 2), "depth": 1}
KL16 = {"channels": 16, "channel_mult": (1, 1, 2, 2, 4), "attn_levels": (4,), "scale": 0.2325}


def _tiny() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**TINY).eval()


@pytest.mark.parametrize(
    ("layout", "options", "params"),
    [
        ("_generation_common/sd-vae-ft-ema", {}, 83_653_863),
        ("_generation_common/sd-vae-ft-mse", {}, 83_653_863),
        ("mar/kl16", KL16, 66_456_019),
    ],
)
def test_published_layouts_convert_key_for_key(shared: Path, layout: str, options: dict, params: int) -> None:
    keys = json.loads((shared / "statedicts" / f"{layout}.json").read_text())["keys"]
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    with torch.device("meta"):
        net = sd_vae(**options)
    converted = {key: value.shape for key, value in convert_autoencoder(state).items()}
    assert converted == {key: value.shape for key, value in net.state_dict().items()}
    assert len(converted) == len(keys)
    assert sum(p.numel() for p in net.parameters()) == params


def test_it_computes_what_diffusers_computes() -> None:
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers")
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    theirs = diffusers.AutoencoderKL(**blocks, block_out_channels=(32, 32, 64), layers_per_block=1).double().eval()
    ours = _tiny().double()
    ours.load_state_dict(convert_autoencoder(theirs.state_dict()))
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs.encode(images).latent_dist
        mean, std = ours.encode(images)
        torch.testing.assert_close(mean, wanted.mean)
        torch.testing.assert_close(std, wanted.std)
        torch.testing.assert_close(ours.decode(mean * ours.scale), theirs.decode(wanted.mean).sample)


def test_latents_are_scaled_draws() -> None:
    net, images = _tiny(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        mean, std = net.encode(images)
        noise = torch.randn_like(mean)
        assert mean.shape == (2, 4, 4, 4)
        assert net.factor == 4
        torch.testing.assert_close(net.latents(images, noise), (mean + std * noise) * 0.18215)
        torch.testing.assert_close(net(images), net.decode(mean * 0.18215))
        sheet = net.picture(images)
    assert sheet.dtype == torch.uint8
    assert sheet.shape == (3, 22 + 2 * 128 + 4, 2 * 128 + 4)  # a line of titles, small images enlarged


def test_pixels_are_their_own_latents() -> None:
    net, images = load_autoencoder("pixels"), torch.randn(2, 3, 5, 5)
    assert isinstance(net, Pixels)
    torch.testing.assert_close(net.latents(images, torch.randn(2, 3, 5, 5)), images)
    torch.testing.assert_close(net.decode(images), images)


def test_a_file_says_its_sizes(tmp_path: Path) -> None:
    net = AutoencoderKL(**{**TINY, "attn_levels": (2,), "channels": 8})
    path = tmp_path / "tiny.pth"
    torch.save({"model": net.state_dict()}, path)
    loaded = load_autoencoder(str(path), scale=0.5)
    assert isinstance(loaded, Autoencoder)
    assert (loaded.channels, loaded.factor, loaded.scale, loaded.training) == (8, 4, 0.5, False)
    assert not any(p.requires_grad for p in loaded.parameters())
    images = torch.randn(3, 3, 8, 8)
    frozen = FrozenAutoencoder(str(path), batch_size=2)
    mean, std = frozen.encode(images)
    with torch.no_grad():
        torch.testing.assert_close((mean, std), loaded.encode(images))
        torch.testing.assert_close(frozen.decode(mean * 0.18215), net.eval().decode(mean * 0.18215))


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="sides divisible by 4"):
        _tiny().encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ZooError, match="not the weights of a convolutional autoencoder"):
        convert_autoencoder({"weight": torch.zeros(1)})
    state = _tiny().state_dict()
    del state["decoder.conv_out.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ZooError, match=r"1 missing \(decoder.conv_out.bias\)"):
        load_autoencoder(str(tmp_path / "part.pth"))
    with pytest.raises(ZooError, match="no file"):
        load_autoencoder(str(tmp_path / "none.pth"))
