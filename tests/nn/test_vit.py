"""The Vision Transformer: classifier protocol and stochastic depth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.vit import Block, VisionTransformer

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}


def _images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_classifier_protocol(pool: str) -> None:
    network = VisionTransformer(**SIZES, num_classes=5, global_pool=pool, drop_path_rate=0.2)
    tokens = network.forward_features(_images())
    assert tokens.shape == (4, 17, 16)
    assert network.forward_head(tokens, pre_logits=True).shape == (4, 16)
    network(_images()).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert hasattr(network, "fc_norm") == (pool == "avg")
    assert hasattr(network, "norm") == (pool == "token")
    network.reset_classifier(0)
    assert network(_images()).shape == (4, 16)
    network.reset_classifier(7)
    assert network.get_classifier().out_features == 7
    ids = [network.layer_id(name) for name, _ in network.named_parameters()]
    assert set(ids) == set(range(network.num_layer_ids))
    with pytest.raises(ZooError, match="global_pool"):
        VisionTransformer(**SIZES, global_pool="max")
    with pytest.raises(ZooError, match="divisible"):
        Block(10, 3)


def test_drop_path_rises_with_depth_and_rests_in_evaluation() -> None:
    network = VisionTransformer(**SIZES, num_classes=2, drop_path_rate=0.4)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in network.blocks] == [0.0, 0.2, 0.4]
    network.eval()
    assert torch.equal(network(_images()), network(_images()))
