"""ResNets, and BatchNorm over parts of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import ZooError
from zoo.nn.batchnorm import SplitBatchNorm
from zoo.nn.resnet import detectron2_trunk, resnet


def test_split_batchnorm_is_one_layer_for_each_part() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    split, parts = SplitBatchNorm(4, 3).double(), [nn.BatchNorm2d(4).double() for _ in range(3)]
    out = split(x)
    for n, part in enumerate(parts):
        torch.testing.assert_close(out[n::3], part(x[n::3]))
    torch.testing.assert_close(split.running_var, torch.stack([p.running_var for p in parts]).mean(0))
    torch.testing.assert_close(split.eval()(x), nn.functional.batch_norm(x, split.running_mean, split.running_var))
    assert split.num_batches_tracked == 1
    with pytest.raises(ZooError, match="num_splits"):
        SplitBatchNorm(4, 0)


def test_resnet_starts_as_torchvisions() -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    ours, theirs = resnet("resnet50"), resnet50()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for name, value in theirs.state_dict().items():
        mine = ours.state_dict()[name]
        if value.ndim == 4:
            assert mine.std().item() == pytest.approx(value.std().item(), rel=0.1), name
        elif "bn" in name or "downsample.1" in name:
            assert torch.equal(mine, value), name
    bound = 2048**-0.5
    assert bound * 0.99 < ours.fc.weight.abs().max() <= bound
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


def test_resnet_for_small_images_keeps_their_size() -> None:
    network = resnet("resnet18", 0, small_images=True)
    assert network.forward_features(torch.randn(1, 3, 16, 16)).shape == (1, 512, 2, 2)
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 512)


def test_what_makes_no_resnet_is_named() -> None:
    with pytest.raises(ZooError, match="did you mean 'resnet50'"):
        resnet("resnet5")
    with pytest.raises(ZooError, match="four stages"):
        resnet("resnet18", layers=[1, 1])


# detectron2's names of a bottleneck stage's first block, as its model zoo has them.
_D2_BLOCK = [f"conv{n}.{part}" for n in (1, 2, 3) for part in ("weight", "norm.weight", "norm.running_mean")]


def test_detectron2s_names_come_back() -> None:
    state = resnet("resnet50", 0, layers=[1, 1, 1, 1]).state_dict()
    renamed = detectron2_trunk(state)
    assert len(renamed) == len(state)
    wanted = {"stem.conv1.weight", "stem.conv1.norm.weight", "stem.conv1.norm.bias", "stem.conv1.norm.running_var"}
    for stage in (2, 3, 4, 5):
        wanted |= {f"res{stage}.0.{name}" for name in _D2_BLOCK}
        wanted |= {f"res{stage}.0.shortcut.weight", f"res{stage}.0.shortcut.norm.bias"}
    assert wanted <= renamed.keys()
    assert not any(mark in key for key in renamed for mark in ("layer", "bn", "downsample", "fc"))

    back = {}
    for key, value in renamed.items():
        name = key.removeprefix("stem.").replace("shortcut.norm", "downsample.1").replace("shortcut.", "downsample.0.")
        for n in (1, 2, 3):
            name = name.replace(f"conv{n}.norm", f"bn{n}")
        back[f"layer{int(name[3]) - 1}{name[4:]}" if name.startswith("res") else name] = value
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
