"""3-D residual networks: convolutions over time, blocks, non-local blocks, stages, heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.resnet3d import (
    NonLocal3d,
    Pathway3d,
    PooledHead3d,
    ResidualBlock3d,
    RoIHead3d,
    Stem3d,
    TemporalConv3d,
    mean_probabilities,
)
from zoo.video import slowfast as sf


def _video(count: int = 2, frames: int = 8, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, frames, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (5, 4), (7, 2)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d])
def test_a_temporal_convolution_is_conv3d(kernel: int, stride: int, order: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = TemporalConv3d(3, 4, kernel, stride).double()
    x = torch.randn(2, 3, 8, 5, 6, dtype=torch.float64).contiguous(memory_format=order)
    torch.testing.assert_close(conv(x), nn.Conv3d.forward(conv, x))


@pytest.mark.parametrize("similarity", ["softmax", "dot_product"])
@pytest.mark.parametrize("inner", [2, 40])
def test_a_nonlocal_block_is_its_equation(similarity: str, inner: int) -> None:
    torch.manual_seed(0)
    block = NonLocal3d(6, inner, similarity, (1, 2, 2)).double().eval()
    x = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(block(x).detach(), x) is False
    pooled = nn.functional.max_pool3d(x, (1, 2, 2))
    theta, phi, g = block.theta(x).flatten(2), block.phi(pooled).flatten(2), block.g(pooled).flatten(2)
    scores = torch.einsum("nci,ncj->nij", theta, phi)
    weights = (scores / inner**0.5).softmax(-1) if similarity == "softmax" else scores / scores.shape[-1]
    y = torch.einsum("nij,ncj->nci", weights, g).view(2, inner, 3, 4, 4)
    torch.testing.assert_close(block(x), x + block.bn(block.out(y)))


def test_nonlocal_groups_see_their_own_part_of_time() -> None:
    torch.manual_seed(0)
    whole, grouped = NonLocal3d(4, 2), NonLocal3d(4, 2, groups=2)
    grouped.load_state_dict(whole.state_dict())
    whole, grouped = whole.eval(), grouped.eval()
    x = torch.randn(2, 4, 6, 4, 4)
    parts = torch.cat([whole(part) for part in x.chunk(2, dim=2)], dim=2)
    torch.testing.assert_close(grouped(x), parts)
    with pytest.raises(ZooError, match="5 frames cannot be split into 2"):
        grouped(x[:, :, :5])


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_a_bottleneck_on_one_frame_is_torchvisions(stride_in_1x1: bool) -> None:
    from torchvision.models.resnet import Bottleneck

    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    flat = Bottleneck(8, 4, 2, down, groups=2).eval()
    block = ResidualBlock3d(8, 8, 16, stride=2, groups=2, stride_in_1x1=stride_in_1x1).eval()
    if stride_in_1x1:
        flat.conv1.stride, flat.conv2.stride = (2, 2), (1, 1)
    pairs = [(f"conv{k}", f"conv_{p}") for k, p in enumerate("abc", 1)] + [("downsample.0", "shortcut_conv")]
    for theirs, ours in pairs:
        block.get_submodule(ours).weight.data = flat.get_submodule(theirs).weight.data.unsqueeze(2)
    x = torch.randn(2, 8, 1, 6, 6)
    torch.testing.assert_close(block(x), flat(x.squeeze(2)).unsqueeze(2))


def test_the_stem_pools_before_its_relu_to_the_same_numbers_and_gradients() -> None:
    torch.manual_seed(0)
    stem, x = Stem3d(3, 4, 5), _video(2, 6, 16)
    weight = torch.randn(2, 4, 6, 4, 4)
    got = stem(x)
    grads = torch.autograd.grad((got * weight).sum(), list(stem.parameters()))
    written = nn.functional.max_pool3d(stem.bn(stem.conv(x)).relu(), (1, 3, 3), (1, 2, 2), (0, 1, 1))
    torch.testing.assert_close(got, written)
    torch.testing.assert_close(torch.autograd.grad((written * weight).sum(), list(stem.parameters())), grads)


def test_stages_have_their_temporal_blocks_dilation_and_pooling() -> None:
    with torch.device("meta"):
        network = sf.slowfast_r101_8x8_50_101()
        slow, fast = ([b.conv_a.kernel_size[0] for b in path.stages[2].blocks] for path in (network.slow, network.fast))
        assert slow == [3] * 6 + [1] * 17
        assert fast == [3] * 23
        ava = sf.slowfast_r50_8x8_ava()
        assert {block.conv_b.dilation for block in ava.slow.stages[3].blocks} == {(1, 2, 2)}
        assert ava.forward_features(torch.empty(1, 3, 32, 224, 224))[0].shape[-1] == 14
        i3d = Pathway3d(temporal_kernels=(5, 3, (3, 1), (3, 1), (1, 3)), temporal_pool=2)
        assert [b.conv_a.kernel_size[0] for b in i3d.stages[2].blocks] == [3, 1, 3, 1, 3, 1]
        assert i3d(torch.empty(1, 3, 8, 64, 64)).shape == (1, 2048, 4, 2, 2)
    for wrong, message in (
        ({"depth": 33}, "depth must be one of"),
        ({"temporal_blocks": (1, 9, 1, 1)}, "a stage of 4 blocks cannot have 9 temporal ones"),
        ({"nonlocal_after": ((), (4,), (), ())}, "non-local blocks follow blocks 0 to 3"),
        ({"temporal_kernels": (1, 1)}, "temporal_kernels are five"),
        ({"block": "plain"}, "unknown block 'plain'"),
    ):
        with pytest.raises(ZooError, match=message), torch.device("meta"):
            Pathway3d(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_positions_of_a_larger_crop_are_averaged_as_probabilities(activation: str) -> None:
    logits = torch.randn(3, 2, 4, 4, 5, dtype=torch.float64)
    probabilities = logits.softmax(-1) if activation == "softmax" else logits.sigmoid()
    mean = mean_probabilities(logits, activation)  # type: ignore[arg-type]
    got = mean.softmax(-1) if activation == "softmax" else mean.sigmoid()
    torch.testing.assert_close(got, probabilities.mean((1, 2, 3)))
    far = mean_probabilities(torch.tensor([[[1000.0, -1000.0], [1000.0, -1000.0]]]), activation)  # type: ignore[arg-type]
    assert torch.isfinite(far).all()
    head = PooledHead3d([4], [(2, 1, 1)], 5, dropout=0.0, activation=activation).double()  # type: ignore[arg-type]
    x = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    assert head.position_logits([x]).shape == (3, 1, 3, 3, 5)
    torch.testing.assert_close(head.train()([x]), head.fc(x.mean((2, 3, 4))))
    torch.testing.assert_close(head.eval()([x]), mean_probabilities(head.position_logits([x]), activation))  # type: ignore[arg-type]


def test_boxes_are_pooled_from_the_mean_over_time() -> None:
    torch.manual_seed(0)
    head = RoIHead3d([4, 2], 3, dropout=0.0, spatial_stride=16)
    slow, fast = torch.zeros(2, 4, 2, 8, 8), torch.zeros(2, 2, 8, 8, 8)
    slow[1, :, 0, 2, 2], fast[1, :, 3, 2, 2] = 2.0, 8.0
    boxes = [
        torch.tensor([[0.0, 0.0, 127.0, 127.0]]),
        torch.tensor([[32.0, 32.0, 48.0, 48.0], [80.0, 80.0, 96.0, 96.0]]),
    ]
    features = head([slow, fast], boxes, pre_logits=True)
    assert features.shape == (3, 6)
    assert features[0].abs().max() == features[2].abs().max() == 0
    assert features[1, 0] == features[1, 5] > 0.5  # 2 / 2 frames, 8 / 8 frames
    assert head([slow, fast], [boxes[0][:0], boxes[1][:0]]).shape == (0, 3)
    with torch.device("meta"), pytest.raises(ZooError, match="wants the boxes"):
        sf.slow_r50_4x16_ava()(torch.empty(1, 3, 4, 64, 64))
