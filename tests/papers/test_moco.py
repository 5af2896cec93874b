"""MoCo and MoCo v2: the equations, the network, the tasks, the published layouts, the exports."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

import zoo
from zoo.command import cli
from zoo.data import ImageDataModule
from zoo.data.transforms import ContrastiveAugment, TwoViews
from zoo.errors import ZooError
from zoo.nn.batchnorm import SplitBatchNorm
from zoo.nn.resnet import detectron2_trunk, resnet
from zoo.selfsup import moco
from zoo.training import KNNProbe, Optim
from zoo.weights import pretrained

SMALL: dict[str, Any] = {"arch": "resnet18", "layers": [1, 1, 1, 1], "width": 8, "dim": 8, "queue_size": 16}
FAST = Optim(name="sgd", lr=0.05, weight_decay=1e-4, no_decay="none", schedule="constant")


def _network(kind: type[moco.MoCo] = moco.MoCo, **options: Any) -> moco.MoCo:
    torch.manual_seed(0)
    return kind(**{**SMALL, **options})


def _views(count: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return first, second


# ----------------------------------------------------------------------------------------------------------- equations


def test_the_match_is_the_first_of_the_logits() -> None:
    query, key, queue = (
        normalize(torch.randn(shape), dim=dim) for shape, dim in (((3, 5), 1), ((3, 5), 1), ((5, 7), 0))
    )
    logits = moco.info_nce_logits(query, key, queue, 0.5)
    assert logits.shape == (3, 8)
    torch.testing.assert_close(logits[1, 0], query[1] @ key[1] / 0.5)
    torch.testing.assert_close(logits[2, 4], query[2] @ queue[:, 3] / 0.5)
    expected = -torch.log(logits.exp()[:, 0] / logits.exp().sum(1)).mean()
    torch.testing.assert_close(moco.info_nce(logits), expected)


def test_unrelated_queries_and_keys_cost_log_of_the_dictionary() -> None:
    torch.manual_seed(0)
    query, key, queue = (
        normalize(torch.randn(*s), dim=d) for s, d in (((64, 128), 1), ((64, 128), 1), ((128, 4096), 0))
    )
    loss = moco.info_nce(moco.info_nce_logits(query, key, queue, 1.0))
    assert loss.item() == pytest.approx(math.log(4097), abs=0.05)


def test_the_queue_is_a_ring() -> None:
    queue, pointer = torch.zeros(2, 6), torch.tensor([3])
    for k in range(1, 4):
        moco.enqueue(queue, pointer, torch.full((3, 2), float(k)))
    assert queue[0].tolist() == [2, 2, 2, 3, 3, 3]
    assert pointer.tolist() == [0]
    with pytest.raises(ZooError, match="queue_size 6 is no multiple of the 4 keys"):
        moco.enqueue(queue, pointer, torch.ones(4, 2))


def test_only_parameters_are_averaged() -> None:
    slow, fast = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    nn.init.constant_(fast.weight, 3.0)
    fast.running_mean.fill_(5.0)
    moco.move_towards(slow, fast, 0.75)
    assert slow.weight.tolist() == [1.5, 1.5]
    assert slow.running_mean.tolist() == [0, 0]
    moco.move_towards(slow, fast, 0.0)
    assert torch.equal(slow.weight, fast.weight)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shuffling_gives_every_row_to_one_rank_and_comes_back(size: int) -> None:
    rows, order = torch.arange(8.0)[:, None], torch.randperm(8)
    shares = [rows[moco.rank_rows(order, rank, size)] for rank in range(size)]
    assert torch.equal(moco.unshuffled(torch.cat(shares), order), rows)


# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("kind", [moco.MoCo, moco.MoCoV2])
def test_step_0(kind: type[moco.MoCo]) -> None:
    network = _network(kind)
    q, k = network.encoder_q.state_dict(), network.encoder_k.state_dict()
    assert all(torch.equal(q[name], k[name]) for name in q)
    assert not any(p.requires_grad for p in network.encoder_k.parameters())
    torch.testing.assert_close(network.queue.norm(dim=0), torch.ones(16))
    assert network.queue_ptr.tolist() == [0]
    assert network.queue_ptr.dtype == torch.long
    im_q, im_k = _views()
    network.temperature = 100.0  # all but uniform
    assert moco.info_nce(network.step(im_q, im_k)).item() == pytest.approx(math.log(17), abs=0.03)
    assert network.queue_ptr.tolist() == [4]
    torch.testing.assert_close(network.queue.norm(dim=0), torch.ones(16))


def test_the_two_versions_differ_in_head_and_temperature() -> None:
    one, two = _network(), _network(moco.MoCoV2)
    assert (one.temperature, two.temperature) == (0.07, 0.2)
    assert isinstance(one.encoder_q.fc, nn.Linear)
    assert [type(part) for part in two.encoder_q.fc] == [nn.Linear, nn.ReLU, nn.Linear]
    assert two.encoder_q.fc[0].weight.shape == (64, 64)
    assert two.encoder_q.fc[2].weight.shape == (8, 64)
    bound = 64**-0.5  # of a linear layer as torch initialises it
    assert bound * 0.9 < two.encoder_q.fc[2].weight.abs().max() <= bound


@pytest.mark.parametrize("kind", [moco.MoCo, moco.MoCoV2])
def test_gradients_reach_the_whole_query_encoder_and_nothing_else(kind: type[moco.MoCo]) -> None:
    network = _network(kind)
    moco.info_nce(network.step(*_views())).backward()
    for name, parameter in network.named_parameters():
        if name.startswith("encoder_k."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_the_order_of_a_step() -> None:
    """The key encoder moves first, from the query weights as they are; the loss sees the old queue; the keys enter."""
    network = _network().double()
    with torch.no_grad():
        for parameter in network.encoder_q.parameters():
            parameter.add_(0.1)
    im_q, im_k = (view.double() for view in _views())
    by_hand = copy.deepcopy(network)
    moco.move_towards(by_hand.encoder_k, by_hand.encoder_q, 0.999)
    keys, old = by_hand.key(im_k), network.queue.clone()
    expected = moco.info_nce_logits(by_hand.query(im_q), keys, old, 0.07)
    torch.testing.assert_close(network.step(im_q, im_k), expected)  # shuffling alone changes no statistics of one batch
    torch.testing.assert_close(network.queue[:, :4], keys.T)
    assert torch.equal(network.queue[:, 4:], old[:, 4:])
    for name, parameter in network.encoder_k.named_parameters():
        assert torch.equal(parameter, by_hand.encoder_k.get_parameter(name))
    assert network.encoder_k.bn1.num_batches_tracked == 1


def test_with_split_batchnorm_the_permutation_matters() -> None:
    network = _network(bn_splits=2)
    assert isinstance(network.encoder_k.layer1[0].bn1, SplitBatchNorm)
    _, im_k = _views()
    same = network.keys(im_k, torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(network.keys(im_k, torch.tensor([2, 3, 0, 1])), same)  # the same two halves
    other = network.keys(im_k, torch.tensor([0, 2, 1, 3]))
    assert (other - same).abs().max() > 1e-3
    with pytest.raises(ZooError, match="permutation must have 4"):
        network.keys(im_k, torch.arange(5))
    with pytest.raises(ZooError, match="cannot be split"):
        network.keys(im_k[:3])


def test_the_queue_stays_in_float32_under_autocast() -> None:
    network = _network()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network.step(*_views())
    assert logits.dtype == network.queue.dtype == torch.float32
    torch.testing.assert_close(network.queue.norm(dim=0), torch.ones(16))
    moco.info_nce(logits).backward()


def test_wrong_numbers_are_named() -> None:
    for wrong in ({"temperature": 0.0}, {"momentum": 1.5}, {"queue_size": 0}, {"dim": 0}):
        with pytest.raises(ZooError, match="MoCo wants"):
            _network(**wrong)
    with pytest.raises(ZooError, match="did you mean 'resnet50'"):
        _network(arch="resnet5")
    with pytest.raises(ZooError, match="four stages"):
        _network(layers=[1, 1])


# -------------------------------------------------------------------------------------------------------- the floor


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


# --------------------------------------------------------------------------------------------------------------- tasks


class Data(ImageDataModule):
    """Six batches of eight pairs of views, and a few images to evaluate on."""

    def __init__(self, **options: Any) -> None:
        transform = TwoViews(ContrastiveAugment())
        super().__init__("shapes", image_size=32, train_samples=48, train_transform=transform, seed=0, **options)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(
            torch.utils.data.Subset(self.samples("val"), range(24)), batch_size=8, collate_fn=lambda batch: batch
        )

    test_dataloader = predict_dataloader = val_dataloader


def _task(kind: type[moco.MoCoPretraining] = moco.MoCoV2Pretraining, **options: Any) -> moco.MoCoPretraining:
    L.seed_everything(3, verbose=False)
    return kind(**{**SMALL, "bn_splits": 2, "optim": FAST, **options})


def _trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, **options},
    )


def test_from_pretraining_to_the_linear_probe(tmp_path: Path) -> None:
    task, data = _task(), Data(batch_size=8)
    trainer = _trainer(tmp_path, max_epochs=2, callbacks=[KNNProbe(k=5)])
    trainer.fit(task, datamodule=data)
    assert {"train/loss", "train/acc1", "val/spread", "knn_top1"} <= trainer.callback_metrics.keys()
    assert task.network.queue_ptr.item() == 2 * 48 % 16
    trainer.save_checkpoint(tmp_path / "pre.ckpt")
    (test,) = trainer.test(task, datamodule=data, verbose=False)
    assert 0 < test["test/spread"] < 2
    prediction = trainer.predict(task, datamodule=data)[0]
    assert prediction["features"].shape == (8, 64)
    torch.testing.assert_close(prediction["embedding"].norm(dim=1), torch.ones(8))
    again = moco.MoCoV2Pretraining.load_from_checkpoint(tmp_path / "pre.ckpt", weights_only=True)
    assert again.network.temperature == 0.2
    assert torch.equal(again.network.queue, task.network.queue)

    sizes = {key: SMALL[key] for key in ("arch", "layers", "width")}
    probe = moco.MoCoLinearProbe(**sizes, num_classes=10, init_from=str(tmp_path / "pre.ckpt"), optim=FAST)
    assert probe.network.fc.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert probe.network.fc.bias.abs().max() == 0
    probe.setup("fit")
    for name, value in task.network.encoder_q.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(probe.network.state_dict()[name], value), name
    before = copy.deepcopy(probe.network.state_dict())
    plain = ImageDataModule("shapes", image_size=32, train_samples=16, batch_size=8, seed=0)
    _trainer(tmp_path, limit_val_batches=0).fit(probe, datamodule=plain)
    changed = {name for name, value in probe.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}

    with pytest.raises(ZooError, match="does not fit the model"):
        moco.MoCoLinearProbe(**{**sizes, "width": 16}, init_from=str(tmp_path / "pre.ckpt")).setup("fit")


def test_under_accumulation_the_key_encoder_and_the_queue_move_once_an_update(tmp_path: Path) -> None:
    task = _task(optim=Optim(name="sgd", lr=0.05, schedule="constant", global_batch=16), bn_splits=2)
    moves, entries = [], []
    task.network.update_key_encoder = lambda move=task.network.update_key_encoder: (moves.append(1), move())  # type: ignore[method-assign]
    task.network.enqueue = lambda keys, put=task.network.enqueue: (entries.append(len(keys)), put(keys))  # type: ignore[method-assign]
    _trainer(tmp_path, limit_val_batches=0).fit(task, datamodule=Data(batch_size=8))
    assert len(moves) == 3
    assert entries == [16, 16, 16]


def test_the_symmetric_loss_is_the_sum_of_both_directions() -> None:
    one, two = _views()
    task = _task(moco.MoCoPretraining, symmetric=True).double()
    views, orders = [one.double(), two.double()], torch.stack([torch.randperm(4), torch.randperm(4)])
    alone = copy.deepcopy(task.network)
    alone.update_key_encoder()
    forward = moco.info_nce(alone.logits(alone.query(views[0]), keys_two := alone.keys(views[1], orders[0])))
    backward = moco.info_nce(alone.logits(alone.query(views[1]), keys_one := alone.keys(views[0], orders[1])))
    loss = task.training_step({"views": views, "permutation": orders}, 0)
    torch.testing.assert_close(loss, forward + backward)
    torch.testing.assert_close(task.network.queue[:, :8], torch.cat([keys_one, keys_two]).T)


def test_mistakes_are_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="queue_size 24 is no multiple of the 16"):
        _trainer(tmp_path).fit(_task(queue_size=24, symmetric=True), datamodule=Data(batch_size=8))
    plain = ImageDataModule("shapes", image_size=32, train_samples=16, batch_size=8)
    with pytest.raises(ZooError, match="TwoViews"):
        _trainer(tmp_path, limit_val_batches=0).fit(_task(), datamodule=plain)
    with pytest.warns(UserWarning, match="share their BatchNorm statistics"):
        _trainer(tmp_path, limit_val_batches=0).fit(_task(bn_splits=1), datamodule=Data(batch_size=8))


def test_published_optimisers_decay_everything() -> None:
    for kind, schedule in ((moco.MoCoPretraining, "step"), (moco.MoCoV2Pretraining, "cosine")):
        task = kind(**SMALL)
        optim = task.optim
        assert (optim.name, optim.lr, optim.weight_decay, optim.no_decay) == ("sgd", 0.03, 1e-4, "none")
        assert (optim.schedule, optim.interval) == (schedule, "epoch")
        assert not any(name.startswith("encoder_k") for name, _ in task.trainable().named_parameters())
    probe = moco.MoCoLinearProbe().optim
    assert (probe.lr, probe.weight_decay, probe.milestones) == (30.0, 0.0, (60, 80))


# ------------------------------------------------------------------------------------------------------------- weights


def _demo_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    places = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6, "fc": 9}
    renamed = {}
    for key, value in state.items():
        side, _, rest = key.partition(".")
        part, _, leaf = rest.partition(".")
        renamed[f"{side}.net.{places[part]}.{leaf}" if part in places else key] = value
    return renamed


@pytest.mark.parametrize("kind", [moco.MoCo, moco.MoCoV2])
def test_three_layouts_are_read_and_others_refused(kind: type[moco.MoCo]) -> None:
    state = _network(kind).state_dict()
    layouts = [state, {f"module.{key}": value for key, value in state.items()}, _demo_layout(state)]
    for layout in layouts:
        converted = moco.convert_official(layout)
        assert converted.keys() == state.keys()
        assert all(converted[key] is state[key] for key in state)
    trunk = moco.convert_trunk(layouts[1])
    assert trunk.keys() == {k for k in _network().encoder_q.state_dict() if not k.startswith("fc.")}
    assert moco.convert_trunk(trunk) == trunk
    for stray in (
        "module.encoder_q.fc.1.weight",
        "encoder_x.conv1.weight",
        "net.2.weight",
        "encoder_q.queue",
        "backbone.0",
    ):
        with pytest.raises(ZooError, match=f"unknown key '{stray}'"):
            moco.convert_official({**state, stray: torch.empty(1)})
    with pytest.raises(ZooError, match="no query encoder"):
        moco.convert_trunk({"queue": torch.empty(1)})


def _official_file(path: Path, kind: type[moco.MoCo] = moco.MoCoV2) -> dict[str, Tensor]:
    """A file as the official script writes it, of a ResNet-50 with one block a stage and a short queue."""
    state = _network(kind, arch="resnet50", width=64, dim=128).state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": wrapped}, path)
    return state


def test_a_published_file_becomes_the_whole_or_the_trunk(tmp_path: Path) -> None:
    state = _official_file(tmp_path / "v2.pth.tar")
    sizes = {"layers": [1, 1, 1, 1]}
    whole = zoo.create_model("moco_v2_resnet50", weights=tmp_path / "v2.pth.tar", queue_size=16, **sizes)
    assert torch.equal(whole.queue, state["queue"])
    trunk = zoo.create_model("moco_v2_resnet50_trunk", weights=tmp_path / "v2.pth.tar", **sizes)
    assert torch.equal(trunk.layer4[0].conv3.weight, state["encoder_q.layer4.0.conv3.weight"])
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(trunk.eval()(x), whole.eval().features(x))
    with pytest.warns(UserWarning, match="start anew: fc.weight"):
        classifier = zoo.create_model("moco_v2_resnet50_trunk", weights=tmp_path / "v2.pth.tar", num_classes=3, **sizes)
    assert classifier(x).shape == (2, 3)
    with pytest.raises(ZooError, match="does not match moco_resnet50"):
        zoo.create_model("moco_resnet50", weights=tmp_path / "v2.pth.tar", queue_size=16, **sizes)


# detectron2's names of a bottleneck stage's first block, as its model zoo has them.
_D2_BLOCK = [f"conv{n}.{part}" for n in (1, 2, 3) for part in ("weight", "norm.weight", "norm.running_mean")]


def test_exports_have_detectron2s_names_and_come_back() -> None:
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


def test_a_checkpoint_of_ours_is_exported_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = _task()
    trainer = _trainer(tmp_path, limit_val_batches=0, max_steps=1)
    trainer.fit(task, datamodule=Data(batch_size=8))
    trainer.save_checkpoint(tmp_path / "pre.ckpt")
    trunk = moco.convert_trunk(task.network.state_dict())

    command = ["weights", "convert", str(tmp_path / "pre.ckpt"), "--to"]
    assert cli.main([*command, "detectron2", "-o", str(tmp_path / "d2.pkl")]) == 0
    with (tmp_path / "d2.pkl").open("rb") as file:
        content = pickle.load(file)
    assert content["matching_heuristics"] is True
    assert content["__author__"]
    assert all(isinstance(value, np.ndarray) for value in content["model"].values())
    np.testing.assert_array_equal(content["model"]["res5.0.conv2.norm.bias"], trunk["layer4.0.bn2.bias"])

    assert cli.main([*command, "detectron2", "-o", str(tmp_path / "d2.pth")]) == 0
    loaded = torch.load(tmp_path / "d2.pth", weights_only=True)
    assert torch.equal(loaded["model"]["stem.conv1.weight"], trunk["conv1.weight"])

    assert cli.main([*command, "torchvision", "-o", str(tmp_path / "tv.safetensors")]) == 0
    plain = pretrained.read_state_dict(tmp_path / "tv.safetensors")
    resnet("resnet18", 0, layers=[1, 1, 1, 1], width=8).load_state_dict(plain)
    assert cli.main([*command, "detectron2", "-o", str(tmp_path / "d2.safetensors")]) == 2
    assert "more than tensors" in capsys.readouterr().err
    assert cli.main([*command, "detectron", "-o", str(tmp_path / "d2.pkl")]) == 2
    assert "did you mean 'detectron2'" in capsys.readouterr().err
    assert cli.main([*command, "detectron2"]) == 2
    torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
    assert cli.main(["weights", "convert", str(tmp_path / "foreign.pth"), "--to", "x", "-o", "x.pth"]) == 2
    assert "not a checkpoint of a task of the zoo" in capsys.readouterr().err
