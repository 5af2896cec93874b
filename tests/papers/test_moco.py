"""MoCo and MoCo v2: the equations, the network, the tasks, the published layouts, the exports."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

import zoo
from zoo.command.verdict import verdict
from zoo.data import ImageDataModule
from zoo.data.transforms import ContrastiveAugment, TwoViews
from zoo.errors import ZooError
from zoo.nn.batchnorm import SplitBatchNorm
from zoo.selfsup import moco
from zoo.training import KNNProbe, Optim, lr_at

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


def test_only_parameters_are_averaged() -> None:
    slow, fast = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    nn.init.constant_(fast.weight, 3.0)
    fast.running_mean.fill_(5.0)
    moco.move_towards(slow, fast, 0.75)
    assert slow.weight.tolist() == [1.5, 1.5]
    assert slow.running_mean.tolist() == [0, 0]
    moco.move_towards(slow, fast, 0.0)
    assert torch.equal(slow.weight, fast.weight)


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
    assert 0 < verdict("moco:cifar10_demo_200ep", test, [])["measured"] == 100 * test["knn_top1"] <= 100
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


def test_the_demo_counts_its_epochs_from_1(tmp_path: Path) -> None:
    """The rates that the log of the official notebook prints."""
    printed = {1: 0.059996, 2: 0.059985, 3: 0.059967, 11: 0.059553, 197: 0.000033, 198: 0.000015, 199: 0.000004, 200: 0}
    task, _, trainer = zoo.load_recipe("moco:cifar10_demo_200ep", {"trainer.default_root_dir": str(tmp_path)})
    rates = {epoch: lr_at(task.optim, epoch - 1, trainer.max_epochs, task.optim.peak_lr(512)) for epoch in printed}
    assert rates == pytest.approx(printed, abs=5e-7)


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


@pytest.mark.parametrize("kind", [moco.MoCo, moco.MoCoV2])
def test_layouts_are_read_and_others_refused(kind: type[moco.MoCo]) -> None:
    state = _network(kind).state_dict()
    layouts = [state, {f"module.{key}": value for key, value in state.items()}]
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
