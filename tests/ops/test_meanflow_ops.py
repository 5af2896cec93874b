"""What the MeanFlow family shares: orders of time pairs, the derivative, the sampler."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ZooError
from zoo.ops.flow import logit_normal
from zoo.ops.meanflow import TimePairs, flow_steps, forward_derivative


def test_pairs_made_equal_before_they_are_sorted_keep_the_distribution_of_t() -> None:
    noise_t, noise_r = torch.randn(2, 1000)
    t, r = TimePairs(equal=0.5, order="equal_first").pairs(noise_t, noise_r)
    torch.testing.assert_close(t[:500], logit_normal(noise_t, -0.4, 1.0)[:500])
    assert torch.equal(t[:500], r[:500])
    later = TimePairs(equal=0.5).pairs(noise_t, noise_r)
    assert torch.equal(t[500:], later[0][500:])
    assert torch.equal(r[500:], later[1][500:])
    assert torch.all(later[0] >= t)


def test_a_share_of_pairs_is_uniform() -> None:
    noise_t, noise_r = torch.randn(2, 4)
    mix = torch.tensor([0.05, 0.5, 0.05, 0.5])
    new_t, new_r = torch.tensor([0.2, 0.2, 0.9, 0.9]), torch.tensor([0.6, 0.6, 0.1, 0.1])
    pairs = TimePairs(equal=0.0, uniform=0.1)
    t, r = pairs.pairs(noise_t, noise_r, uniform=(mix, new_t, new_r))
    plain = TimePairs(equal=0.0).pairs(noise_t, noise_r)
    torch.testing.assert_close(t, torch.where(mix < 0.1, torch.tensor([0.6, 0.6, 0.9, 0.9]), plain[0]))
    torch.testing.assert_close(r, torch.where(mix < 0.1, torch.tensor([0.2, 0.2, 0.1, 0.1]), plain[1]))
    with pytest.raises(ZooError, match="uniform want the draws"):
        pairs.pairs(noise_t, noise_r)
    with pytest.raises(ZooError, match="uniform times"):
        TimePairs(uniform=2.0)


def test_the_derivative_can_be_taken_beside_a_gradient_and_other_outputs() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor([2.0, 5.0])
    value, derivative, other = forward_derivative(
        lambda x: (weight * x**2, weight * x), (x,), (torch.ones(2),), has_aux=True
    )
    torch.testing.assert_close(derivative, 6 * x)
    for output, expected in ((value, x**2), (other, x)):
        assert torch.autograd.grad(output.sum(), weight, retain_graph=True)[0] == expected.sum()


def test_steps_go_from_noise_to_data() -> None:
    states = list(flow_steps(lambda z, t, r: torch.ones_like(z) * t.view(-1, 1), torch.zeros(2, 3), (1.0, 0.25, 0.0)))
    torch.testing.assert_close(torch.stack(states)[:, 0, 0], torch.tensor([-0.75, -0.75 - 0.0625]))
