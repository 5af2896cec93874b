"""SiT's transport: every sampler ends at the data, along every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.ops.transport import Sampler, Transport


@pytest.mark.parametrize("transport", [Transport(), Transport("gvp", "noise"), Transport("vp", "score")])
def test_an_exact_network_samples_its_data(transport: Transport) -> None:
    """Of normal data each prediction is known. The ODE maps noise e to mean + std e, the SDE has the same mean, std."""
    path, mean, std = transport.interpolant, 0.7, 0.5
    z = torch.randn(4000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def exact(z: Tensor, t: Tensor) -> Tensor:
        s = t.view(-1, 1, 1, 1)
        one = torch.ones_like(s)
        alpha, sigma = (path.interpolate(one * a, one * b, t) for a, b in ((1, 0), (0, 1)))
        score = -(z - alpha * mean) / (alpha.square() * std**2 + sigma.square())
        noise, x = -sigma * score, mean - alpha * std**2 * score
        return {"velocity": path.velocity(x, noise, t), "score": score, "noise": noise}[transport.prediction]

    for method in ("euler", "midpoint", "heun", "rk4", "dopri5", "sde_euler", "sde_heun"):
        sampler = Sampler(method, steps=100, form="sigma")  # type: ignore[arg-type]
        draws = [torch.randn_like(z) for _ in range(sampler.kicks)]
        *_, end = sampler.states(exact, z, transport, draws)
        assert end.mean().item() == pytest.approx(mean, abs=0.03), method
        assert end.std().item() == pytest.approx(std, abs=0.05), method
        if not draws:
            assert (end - mean - std * z).abs().max() < 0.2, method


def test_wrong_samplers_are_named() -> None:
    for options, words in (
        ({"method": "eulr"}, "did you mean 'euler'"),
        ({"method": "sde_euler", "steps": 1}, "2 steps"),
    ):
        with pytest.raises(ZooError, match=words):
            Sampler(**options)
    with pytest.raises(ZooError, match="did you mean 'linear'"):
        Transport(path="liner")  # type: ignore[arg-type]
