"""SlowFast: pathways, lateral connections, blocks and heads, sizes, published layouts, tasks, precise BN."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, conv3d, cross_entropy
from torch.utils.data import DataLoader

import zoo
from tests.conftest import ROOT
from zoo import catalog
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
from zoo.nn.video_names import from_published, layout_of, our_name
from zoo.training import Optim, PreciseBN, lr_at, param_groups
from zoo.training.video import ActionDetection
from zoo.video import slowfast as sf
from zoo.weights.pretrained import Architecture, mismatch, shapes

SMALL: dict[str, Any] = {"depth": 18, "width": 8, "alpha": 4, "beta_inv": 4, "num_frames": 8, "crop_size": 32}
FUSIONS = ("none", "time_to_channel_sum", "time_to_channel_concat", "time_strided_sample", "time_strided_conv")


def _video(count: int = 2, frames: int = 8, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, frames, side, side, generator=torch.Generator().manual_seed(seed))


def _woken(network: nn.Module) -> nn.Module:
    """With the scales that start at 0 set to 1, so that every branch counts."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.ones_(module.weight)
    return network


# ----------------------------------------------------------------------------------------------------------- pathways


def test_slow_takes_frames_from_the_first_to_the_last() -> None:
    assert sf.slow_indices(32, 8).tolist() == [0, 10, 20, 31]
    assert sf.slow_indices(32, 4).tolist() == [0, 4, 8, 13, 17, 22, 26, 31]
    slow, fast = sf.pack_pathways(torch.arange(32.0).view(1, 1, 32, 1, 1), 8)
    assert slow.flatten().tolist() == [0, 10, 20, 31]
    assert fast.shape[2] == 32
    with pytest.raises(ZooError, match="a clip of 3 frames is too short for alpha 4"):
        sf.pack_pathways(torch.zeros(1, 1, 3, 1, 1), 4)


def test_time_to_channel_packs_the_frames_of_one_slow_frame() -> None:
    fast = torch.arange(2 * 8.0).view(1, 2, 8, 1, 1)
    packed = sf.time_to_channel(fast, 4)
    assert packed.shape == (1, 8, 2, 1, 1)
    assert packed[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert packed[0, :, 1, 0, 0].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_every_parameter_and_fast_reaches_slow(fusion: str) -> None:
    torch.manual_seed(0)
    network = _woken(sf.SlowFast(**SMALL, fusion=fusion, num_classes=5, dropout=0.0))
    cross_entropy(network(_video(4)), torch.arange(4)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    slow, fast = sf.pack_pathways(_video(), 4)
    other = _video(seed=1)
    before, after = (network.eval().forward_features([slow, x]) for x in (fast, other))
    assert torch.equal(before[0], after[0]) == (fusion == "none")
    before, after = (network.forward_features([x, fast]) for x in (slow, sf.pack_pathways(other, 4)[0]))
    assert torch.equal(before[1], after[1]), "Fast never hears of Slow"


def test_a_lateral_connection_is_its_convolution() -> None:
    torch.manual_seed(0)
    lateral = sf.Lateral(8, 2, alpha=4, ratio=2, kernel=5).eval()
    slow, fast = torch.randn(1, 8, 2, 3, 3), torch.randn(1, 2, 8, 3, 3)
    got = lateral(slow, fast)
    wanted = torch.relu(conv3d(fast, lateral.conv.weight, None, (4, 1, 1), (2, 0, 0)) / math.sqrt(1 + 1e-5))
    torch.testing.assert_close(got, torch.cat([slow, wanted], 1))
    assert sf.Lateral(8, 2, 4, "time_strided_sample")(slow, fast)[:, 8:].equal(fast[:, :, ::4])
    with pytest.raises(ZooError, match="unknown fusion 'time_strided'"):
        sf.Lateral(8, 2, 4, "time_strided")  # type: ignore[arg-type]
    with pytest.raises(ZooError, match="wants alpha 8 equal to beta_inv 4"):
        sf.Lateral(8, 2, 8, "time_to_channel_sum")


def test_fast_is_thin_and_keeps_its_frames() -> None:
    with torch.device("meta"):
        network = sf.slowfast_r50_4x16()
        slow, fast = network.forward_features(torch.empty(2, 3, 32, 224, 224))
    assert slow.shape == (2, 2048, 4, 7, 7)
    assert fast.shape == (2, 256, 32, 7, 7)


@pytest.mark.parametrize(
    ("name", "gflops"),
    [
        ("slow_r50_4x16", 27.55),
        ("slow_r50_8x8", 54.52),
        ("slowfast_r50_4x16", 36.69),
        ("slowfast_r50_8x8", 65.71),
        ("slowfast_r101_8x8", 127.2),
        ("slowfast_r101_16x8_50_50", 215.61),
    ],
)
def test_flops_are_those_that_pytorchvideo_states(name: str, gflops: float) -> None:
    """Multiply-adds of one view of 256 pixels; theirs count the normalisations too, which are a percent."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = sf.MODELS[name]().eval()
        frames = network.head.windows[-1][0]
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, frames, 256, 256))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.02)


# --------------------------------------------------------------------------------------------------------- the floor


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


def test_a_network_starts_as_shortcuts_and_identities() -> None:
    network = sf.SlowFast(**SMALL, nonlocal_after=((), (1,), (0,), ()))
    blocks = [m for m in network.modules() if isinstance(m, ResidualBlock3d)]
    assert len(blocks) == 16
    assert all(block.last_bn.weight.abs().sum() == 0 for block in blocks)
    block = NonLocal3d(4, 2)
    zoo.nn.resnet3d.init_resnet3d(block)
    x = torch.randn(1, 4, 2, 4, 4)
    assert torch.equal(block(x), x)
    logits = network.eval()(_video(8))
    assert logits.abs().max() < 1, "no class is preferred at first"
    assert cross_entropy(logits, torch.arange(8)).item() == pytest.approx(math.log(400), abs=0.2)


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


def test_recomputing_changes_nothing() -> None:
    results = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = _woken(sf.SlowFast(**SMALL, dropout=0.0, nonlocal_after=((), (1,), (), ()), num_classes=5)).double()
        network.set_grad_checkpointing(recomputed)
        cross_entropy(network(_video().double()), torch.arange(2)).backward()
        results.append([p.grad for p in network.parameters()] + list(network.buffers()))
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_new_classifier_and_wrong_sizes() -> None:
    network = sf.SlowFast(**SMALL)
    network.reset_classifier(7)
    assert network(_video()).shape == (2, 7)
    assert network.num_classes == 7
    assert network.get_classifier() is network.head.fc
    network.reset_classifier(0)
    assert network(_video()).shape == (2, network.num_features)
    for wrong, message in (
        ({"width": 10}, "width 10 is no multiple of beta_inv 4"),
        ({"num_frames": 10}, "num_frames 10 is no multiple of alpha 4"),
        ({"crop_size": 16}, "crop_size 16 is smaller than the network's stride, 32"),
    ):
        with pytest.raises(ZooError, match=message), torch.device("meta"):
            sf.SlowFast(**{**SMALL, **wrong})


# -------------------------------------------------------------------------------------------------- published weights


def test_every_published_layout_matches_key_for_key(shared: Path) -> None:
    card = catalog.paper("slowfast")
    for weight in card.weights:
        paper, _, name = (weight.layout or "").rpartition("/")
        path = shared / "statedicts" / (paper or "slowfast") / name
        keys = json.loads(path.read_text())["keys"]
        state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
        wanted = shapes(Architecture(card, weight.model, dict(weight.overrides)).on_meta())
        assert not mismatch(sf.convert_official(state), wanted), weight.name


def test_layouts_are_told_apart_and_strangers_refused() -> None:
    one = torch.zeros(2)
    caffe2 = {"conv1_w": one, "res_conv1_bn_riv": one, "pred_w": torch.zeros(3, 2, 1, 1, 1), "lr": one}
    assert layout_of(caffe2) == "Caffe2"
    converted = sf.convert_official({**caffe2, "conv1_w_momentum": one, "model_iter": one})
    assert converted.keys() == {
        "pathway.stem.conv.weight",
        "pathway.stem.bn.running_var",
        "pathway.stem.bn.num_batches_tracked",
        "head.fc.weight",
    }
    assert converted["head.fc.weight"].shape == (3, 2)
    for layout, name, ours in (
        ("Caffe2", "t_res4_22_branch2c_bn_subsample_bn_s", "lateral.3.bn.weight"),
        ("Caffe2", "t_pool1_subsample_w", "lateral.0.conv.weight"),
        ("Caffe2", "nonlocal_conv4_13_bn_b", "slow.stages.2.nonlocals.13.bn.bias"),
        ("PySlowFast", "s3.pathway1_res0.branch1_bn.bias", "fast.stages.1.blocks.0.shortcut_bn.bias"),
        ("PySlowFast", "s4_fuse.conv_f2s.weight", "lateral.3.conv.weight"),
        ("PyTorchVideo", "model.blocks.1.multipathway_fusion.norm.weight", "lateral.1.bn.weight"),
        ("PyTorchVideo", "detection_head.proj.bias", "head.fc.bias"),
    ):
        assert our_name(name, layout, ("slow", "fast")) == ours
    network = sf.SlowFast(**SMALL)
    assert sf.convert_official(network.state_dict()).keys() == network.state_dict().keys()
    for wrong in ({"conv1_w": one, "res9_w": one}, {"s1.pathway0_stem.conv.weight": one, "s1.what": one}, {"fc": one}):
        with pytest.raises(ZooError, match="not a"):
            sf.convert_official(wrong)
    with pytest.raises(ZooError, match=r"1 pathway.*: 't_conv1_w'"):
        from_published({"conv1_w": one, "t_conv1_w": one}, ("pathway",))


# --------------------------------------------------------------------------------------------------- optimiser, BN


def test_the_warm_up_ends_on_the_cosine_that_counts_from_the_start() -> None:
    optim = Optim(name="sgd", lr=0.1, schedule_from="start", warmup_epochs=34, warmup_start_lr=0.01)
    rates = [lr_at(optim, epoch, 196, 0.1) for epoch in (0, 17, 33.999999, 34, 98, 196)]
    end = 0.05 * (1 + math.cos(math.pi * 34 / 196))
    assert rates == pytest.approx([0.01, (0.01 + end) / 2, end, end, 0.05, 0.0], abs=1e-7)
    steps = Optim(lr=1.0, schedule="step", schedule_from="start", milestones=(2, 4), factors=(0.5, 0.02))
    assert [lr_at(steps, epoch, 5, 1.0) for epoch in (0, 1.9, 2, 4)] == [1.0, 1.0, 0.5, 0.02]
    inside = Optim(lr=1.0, schedule="step", schedule_from="start", milestones=(2,), warmup_epochs=4)
    assert lr_at(inside, 2, 8, 1.0) == pytest.approx(0.05), "halfway up to the value behind the step"
    with pytest.raises(ZooError, match=r"optim.factors are 1, one a milestone would be 2"):
        Optim(milestones=(1, 2), factors=(0.1,))


def test_only_batch_normalisation_is_spared_from_decay() -> None:
    network = sf.SlowFast(**SMALL, nonlocal_after=((), (1,), (), ()))
    spared, decayed = param_groups(network, Optim(name="sgd", weight_decay=0.1, no_decay="norm"))
    norms = {n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm3d)}
    assert {name.rpartition(".")[0] for name in spared["names"]} == norms
    assert {"head.fc.bias", "slow.stages.1.nonlocals.1.theta.bias"} <= set(decayed["names"])
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)


class _Toy(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def predict_logits(self, batch: Tensor) -> Tensor:
        return self.norm(batch)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.predict_logits(batch).square().sum() * self.norm.weight.sum() * 0

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.seen = self.norm.running_mean.clone()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_precise_statistics_are_those_of_all_batches_together() -> None:
    data = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) * 3 + 5
    for batches in (5, 2):
        module = _Toy()
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[PreciseBN(batches)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4))
        used = data[: 4 * batches]
        torch.testing.assert_close(module.norm.running_mean, used.mean(0))
        torch.testing.assert_close(module.norm.running_var, used.var(0, correction=0))
        torch.testing.assert_close(module.seen, used.mean(0), msg="validation sees them already")
        assert module.norm.momentum == 0.1
        assert int(module.norm.num_batches_tracked) == 5


# --------------------------------------------------------------------------------------------------------------- tasks


def _task(kind: Any = sf.SlowFastClassification, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(None, **{**SMALL, "dropout": 0.0, "num_classes": 5, **options})


def test_views_are_joined_and_order_of_memory_changes_nothing() -> None:
    plain, ordered = _task().eval(), _task(channels_last=True).eval()
    video = _video(4)
    with torch.no_grad():
        torch.testing.assert_close(plain(video), ordered(video))
        batch = {"video": video, "label": torch.tensor([1, 1, 3, 3])}
        batch |= {"video_id": torch.tensor([0, 0, 1, 1]), "view": torch.tensor([0, 1, 0, 1])}
        plain.validation_step(batch, 0)
        scores = plain.val_metrics["score"].compute()
        summed = plain(video).softmax(-1).view(2, 2, 5).sum(1)
    assert scores["top1"].item() == pytest.approx((summed.argmax(1) == torch.tensor([1, 3])).float().mean().item())
    assert scores["top5"].item() == 1
    assert plain.val_metrics["loss"].compute().item() == pytest.approx(math.log(5), abs=0.3)
    with torch.no_grad():
        predicted = plain.predict_step(batch, 0)
    torch.testing.assert_close(predicted["probabilities"].sum(1), torch.ones(4))
    assert torch.equal(predicted["video_id"], batch["video_id"])
    assert torch.equal(predicted["view"], batch["view"])


def test_several_labels_are_scored_by_their_own_sigmoid() -> None:
    task = _task(sf.SlowFastMultiLabel).eval()
    assert task.network.head.activation == "sigmoid"
    video, label = _video(3), torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1.0]])
    wanted = binary_cross_entropy(task(video).sigmoid(), label)
    torch.testing.assert_close(task.training_step({"video": video, "label": label}, 0), wanted)
    task.test_step({"video": video, "label": label, "video_id": torch.arange(3), "view": torch.zeros(3).long()}, 0)
    assert 0 < task.test_metrics["score"].compute()["mAP"] <= 1


def test_boxes_are_scored_on_their_key_frames() -> None:
    task = _task(sf.SlowFastDetection, crop_size=64).eval()
    assert task.network.slow.spatial_stride == 16
    assert isinstance(task, ActionDetection)
    boxes = torch.tensor([[0.0, 0.0, 40.0, 40.0], [20.0, 10.0, 63.0, 63.0]])
    labels = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0.0]])
    truth = {"true_boxes": torch.cat([boxes, boxes[:1]]) / 64, "true_labels": torch.tensor([0, 1, 3])}
    own = {"boxes": boxes, "labels": labels, "original_boxes": boxes / 64, **truth}
    none = {key: value[:0] for key, value in own.items()}
    batch = {
        "video": _video(2, side=64),
        "target": [{**own, "video_id": 0, "second": 902}, {**none, "video_id": 1, "second": 903}],
    }
    logits = task.predict_logits(batch)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(task.training_step(batch, 0), binary_cross_entropy(logits.sigmoid(), labels))
    task.validation_step(batch, 0)
    assert task.val_metrics["score"].compute()["mAP"].item() > 0.5
    predicted = task.predict_step(batch, 0)
    assert [len(frame["probabilities"]) for frame in predicted] == [2, 0]
    assert [(frame["video_id"], frame["second"]) for frame in predicted] == [(0, 902), (1, 903)]
    torch.testing.assert_close(predicted[0]["probabilities"], logits.sigmoid())
    empty = {"video": _video(1, side=64), "target": [{**none, "video_id": 2, "second": 904}]}
    task.validation_step(empty, 1)


def test_what_a_task_is_built_from() -> None:
    with torch.device("meta"):
        assert isinstance(
            sf.SlowFastClassification(None, arch="fast", width=16, num_frames=8).network, zoo.nn.resnet3d.ResNet3d
        )
        assert sf.SlowFastClassification("slow_r50_8x8", num_frames=4).network.head.windows == [(4, 7, 7)]
        for kind, options, message in (
            (sf.SlowFastClassification, {"model": "slowfast_r50"}, "unknown model 'slowfast_r50'; did you mean"),
            (sf.SlowFastClassification, {"model": "slowfast_r50_8x8_ava"}, "is one for SlowFastDetection"),
            (sf.SlowFastDetection, {"model": "slowfast_r50_8x8"}, "is one for SlowFastClassification"),
            (sf.SlowFastClassification, {"model": "slow_r50_8x8", "alpha": 4}, "one pathway: leave alpha out"),
            (sf.SlowFastClassification, {"model": None, "arch": "slow", "fusion": "none"}, "leave fusion out"),
            (sf.SlowFastClassification, {"model": "slow_r50_8x8", "arch": "slow"}, "model: null to choose arch"),
        ):
            with pytest.raises(ZooError, match=message):
                kind(**options)


def test_fine_tuning_takes_all_but_the_classifier(tmp_path: Path) -> None:
    first = _task(num_classes=7)
    torch.save({"model_state": first.network.state_dict()}, tmp_path / "first.pth")
    second = _task(sf.SlowFastMultiLabel, init_from=str(tmp_path / "first.pth"))
    torch.nn.init.ones_(second.network.slow.stem.conv.weight)
    second.setup("fit")
    for name, value in second.network.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, first.network.state_dict()[name]), name
    assert second.network.head.fc.out_features == 5


def test_batch_normalisation_of_all_devices_is_one_setting_away() -> None:
    network = sf.SlowFast(**SMALL).eval()
    video = _video()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    norms = [m for m in synced.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 4 + 2 * (1 + 8 * 3 + 4)
    assert not any(isinstance(m, nn.BatchNorm3d) for m in synced.modules())
    assert synced(video).shape == (2, 400)
    spared, _ = param_groups(synced, Optim(name="sgd", no_decay="norm"))
    assert len(spared["params"]) == 2 * len(norms)


def test_two_processes_train_measure_and_score_as_one(tmp_path: Path) -> None:
    found = []
    for devices in (1, 2):
        out = tmp_path / f"{devices}.pt"
        command = [sys.executable, "-m", "tests.papers.ddp_slowfast", str(devices), str(out)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    one, two = found
    assert {"val/top1", "val/top5", "val/loss"} <= one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
