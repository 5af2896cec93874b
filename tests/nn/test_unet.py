"""The DDPM++ U-Net: the official forward pass and layout, its derivatives, what it starts as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import parity
from zoo.errors import ZooError
from zoo.nn.unet import DhariwalUNet, ResampleConv2d, SongUNet, sinusoid

CASES = Path(__file__).parents[1] / "parity" / "cases"
TINY: dict[str, Any] = {"img_resolution": 8, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
TINY |= {"attn_resolutions": (4,), "dropout": 0.0, "num_times": 2, "augment_dim": 6}


def _inputs(size: int = 2) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return torch.randn(size, 3, 8, 8), (torch.rand(size), torch.rand(size))


def _moved(network: SongUNet) -> SongUNet:
    """With weights that are nowhere near zero, as after training."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def test_the_official_forward_pass() -> None:
    """The network by itself; tests/parity goes by way of the task that wears it."""
    case = parity.load(CASES / "meanflow" / "cifar_unet_forward.json") | {"device": "cpu"}
    config = {key: value for key, value in case["config"]["net"].items() if not key.endswith("_type")}
    network = SongUNet(**config, num_times=2).double().eval()
    official = {key.removeprefix("net."): value for key, value in parity.filled_state(case).items()}
    network.load_state_dict({**network.state_dict(), **official})  # the filters are kept as they are built
    inputs = parity.filled_inputs(case)
    u = network(inputs["x"], (inputs["t"], inputs["h"]), inputs["aug_cond"])
    assert parity.compare(case["outputs"]["u"], u) is None


def test_the_published_layout(shared: Path) -> None:
    layout = json.loads((shared / "statedicts" / "meanflow" / "cifar10_unet.json").read_text())["keys"]
    with torch.device("meta"):
        network = SongUNet(dropout=0.2, channel_mult_noise=2, resample_filter=(1, 3, 3, 1), augment_dim=6, num_times=2)
    own = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert own == {key.removeprefix("net."): shape for key, shape in layout.items() if key.startswith("net.")}
    assert sum(p.numel() for p in network.parameters()) == 55_932_419


def test_gradients_reach_every_parameter() -> None:
    network = _moved(SongUNet(**TINY))
    x, times = _inputs()
    network(x, times, torch.randn(2, 6)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
def test_the_other_ways_down_and_up(encoder: Any, decoder: Any) -> None:
    options = {**TINY, "channel_mult": (1, 2, 2), "num_times": 1, "label_dim": 3, "resample_filter": (1, 3, 3, 1)}
    network = _moved(SongUNet(**options, encoder_type=encoder, decoder_type=decoder, embedding_type="fourier"))
    x, (t, _) = _inputs()
    label, augment = torch.tensor([0, 2]), torch.randn(2, 6)
    out = network(x, (t,), augment, label)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    without = network(x, None, augment, label)
    assert not torch.allclose(out, without)
    none = network(x, None, label=torch.full((2,), 3))  # the label that is none: of nothing known but its bias
    torch.testing.assert_close(none, network(x, None, torch.zeros(2, 6), torch.full((2,), 3)))


def test_adm_starts_at_nothing_and_has_heads_of_64_channels() -> None:
    network = DhariwalUNet(8, model_channels=64, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), label_dim=2)
    x, (t, _) = _inputs()
    assert not network(x, (t,), label=torch.tensor([0, 1])).any()
    assert network.dec["4x4_in0"].num_heads == 2
    assert network.enc["8x8_block0"].num_heads == 0
    assert not any(key.endswith("skip.weight") for key in network.state_dict() if "_down" in key or "_up" in key)
    with pytest.raises(ZooError, match="wants labels"):
        network(x, (t,))


def test_the_derivative_along_a_direction_is_the_difference_quotient() -> None:
    network = _moved(SongUNet(**TINY)).double()
    x, (t, h) = (v if isinstance(v, tuple) else v.double() for v in _inputs())
    t, h, dx = t.double(), h.double(), torch.randn_like(x)
    with torch.no_grad():
        _, slope = torch.func.jvp(lambda x, t: network(x, (t, h)), (x, t), (dx, torch.ones_like(t)))
        step = 1e-5
        ends = [network(x + s * dx, (t + s, h)) for s in (step, -step)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_it_starts_at_almost_nothing_and_without_a_label_nothing_is_added() -> None:
    network = SongUNet(**TINY).eval()
    x, times = _inputs()
    assert network(x, times).abs().max() < 1e-3
    torch.testing.assert_close(network(x, times), network(x, times, torch.zeros(2, 6)), rtol=0, atol=0)


def test_resampling_keeps_a_constant_image() -> None:
    """Away from the border, where zeros are seen."""
    image = torch.full((1, 4, 12, 12), 3.0)
    for way, inside in (("down", slice(1, -1)), ("up", slice(2, -2))):
        layer = ResampleConv2d(4, 4, 1, way, (1, 3, 3, 1))
        with torch.no_grad():
            layer.weight.copy_(torch.eye(4)[:, :, None, None])
        out = layer(image)[..., inside, inside]
        torch.testing.assert_close(out, torch.full_like(out, 3.0))


def test_times_are_embedded_in_their_own_unit() -> None:
    emb = sinusoid(torch.tensor([0.0, 0.5]), 8)
    frequencies = torch.tensor([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])
    torch.testing.assert_close(emb[1], torch.cat([(0.5 * frequencies).sin(), (0.5 * frequencies).cos()]))
    torch.testing.assert_close(emb[0], torch.tensor([0.0] * 4 + [1.0] * 4))


def test_mistakes_are_told() -> None:
    network = SongUNet(**TINY | {"augment_dim": 0})
    x, times = _inputs()
    with pytest.raises(ZooError, match="conditioned on 2 times, but got 1"):
        network(x, times[:1])
    with pytest.raises(ZooError, match="without augment_dim"):
        network(x, times, torch.zeros(2, 6))
    with pytest.raises(ZooError, match="cannot be halved"):
        SongUNet(img_resolution=6, channel_mult=(1, 1, 1))
    with pytest.raises(ZooError, match="even number of taps"):
        SongUNet(resample_filter=(1, 2, 1))
