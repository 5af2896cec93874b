"""SlowFast: pathways, lateral connections, sizes, rows, published layouts, tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, conv3d, cross_entropy

import zoo
from zoo import catalog
from zoo.errors import ZooError
from zoo.nn.resnet3d import (
    NonLocal3d,
    ResidualBlock3d,
)
from zoo.training import Optim, param_groups
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
    if fusion != "none":
        with pytest.raises(ZooError, match="no multiple of alpha 4"):
            network(_video()[:, :, :7])
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
        network = getattr(sf, name)().eval()
        frames = network.head.windows[-1][0]
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, frames, 256, 256))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.02)


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


@pytest.mark.parametrize(
    ("row", "size", "start"),
    [
        ("ava22_ptv_slow_r50_4x16_map", 256, "slow_r50_4x16.k400_for_ava"),
        ("ava22_ptv_slowfast_r50_8x8_map", 224, "slowfast_r50_8x8.k400"),
        ("ava21_slowfast_r101_8x8_map", 256, "slowfast_r101_8x8_50_50_nl.k600_for_ava21"),
    ],
)
def test_rows_of_ava_are_those_of_their_configurations(row: str, size: int, start: str) -> None:
    with torch.device("meta"):
        module, data, _ = zoo.load_recipe(f"slowfast:{row}", {"trainer.accelerator": "cpu"})
    assert module.init_from == start
    assert data.train_transform.inverse, "1 / size is drawn uniformly"
    weights = catalog.row(f"slowfast:{row}")[1].weights
    assert data.eval_transform.size == size == catalog.weight(weights)[1].preprocess.size
    assert module.network.head.aligned == ("ptv" in row)


# --------------------------------------------------------------------------------------------------------------- tasks


def _task(kind: Any = sf.SlowFastClassification, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(**{**SMALL, "dropout": 0.0, "num_classes": 5, **options})


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
    task = _task(sf.SlowFastDetection, crop_size=64, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)).eval()
    assert task.network.slow.spatial_stride == 16
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
        fast = sf.SlowFastClassification("fast", width=16, num_frames=8).network
        assert fast.pathway.out_chans == [2, 8, 16, 32, 64]
        slow = sf.SlowFastClassification("slow", num_frames=4).network
        assert slow.head.windows == [(4, 7, 7)]
        for arch, options, message in (
            ("slow", {"alpha": 4}, "arch slow is one pathway: leave alpha out"),
            ("slow", {"beta_inv": 4}, "leave beta_inv out"),
            ("fast", {"fusion": "none"}, "leave fusion out"),
            ("both", {}, "unknown arch 'both'"),
        ):
            with pytest.raises(ZooError, match=message):
                sf.SlowFastClassification(arch, **options)


@pytest.mark.parametrize("nonlocals", [False, True])
def test_fine_tuning_takes_all_but_the_classifier_and_new_nonlocal_blocks(nonlocals: bool, tmp_path: Path) -> None:
    first = _task(num_classes=7)
    torch.save({"model_state": first.network.state_dict()}, tmp_path / "first.pth")
    after = {"nonlocal_after": ((), (1,), (), ())} if nonlocals else {}
    second = _task(sf.SlowFastMultiLabel, init_from=str(tmp_path / "first.pth"), **after)
    torch.nn.init.ones_(second.network.slow.stem.conv.weight)
    second.setup("fit")
    for name, value in second.network.state_dict().items():
        fresh = name.startswith("head.") or ".nonlocals." in name
        assert fresh or torch.equal(value, first.network.state_dict()[name]), name
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
