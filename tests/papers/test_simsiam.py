"""SimSiam: the equations, the network and its ablations, the tasks, the published layouts, the exports."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import zoo
from zoo.data import ImageDataModule
from zoo.data.transforms import ContrastiveAugment, TwoViews
from zoo.data.views import Views
from zoo.errors import ZooError
from zoo.selfsup import simsiam
from zoo.selfsup.simsiam import SimSiam, SimSiamPretraining
from zoo.training import LARC, KNNProbe, Optim, param_groups
from zoo.training.base import Batch

TRUNK: dict[str, Any] = {"arch": "resnet18", "layers": [1, 1, 1, 1], "width": 8}
SMALL: dict[str, Any] = {**TRUNK, "dim": 16, "pred_dim": 4}
FAST = Optim(name="sgd", lr=0.05, weight_decay=1e-4, no_decay="none", schedule="constant")


def _network(**options: Any) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(**{**SMALL, **options})


def _task(**options: Any) -> SimSiamPretraining:
    L.seed_everything(3, verbose=False)
    return SimSiamPretraining(**{**SMALL, "optim": FAST, **options})


def _views(count: int = 2, size: int = 4) -> list[Tensor]:
    return list(torch.randn(count, size, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def _data(views: int = 2, samples: int = 32) -> ImageDataModule:
    transform = TwoViews(ContrastiveAugment()) if views == 2 else Views([ContrastiveAugment()], [views])
    return ImageDataModule(
        "shapes", image_size=32, train_samples=samples, train_transform=transform, batch_size=8, seed=0
    )


def _trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    few = {"max_epochs": 1, "enable_checkpointing": False, "limit_val_batches": 0, "limit_test_batches": 2}
    return L.Trainer(default_root_dir=tmp_path, **{**quiet, **few, "limit_predict_batches": 1, **options})


# ----------------------------------------------------------------------------------------------------------- equations


def test_the_loss_compares_each_prediction_with_the_other_view() -> None:
    p1, p2, z1, z2 = torch.randn(4, 3, 5, dtype=torch.float64)
    wanted = -(cosine_similarity(p1, z2) + cosine_similarity(p2, z1)).mean() / 2
    torch.testing.assert_close(simsiam.siamese_loss([p1, p2], [z1, z2]), wanted)
    torch.testing.assert_close(simsiam.siamese_loss([p1], [z1, z2]), -cosine_similarity(p1, z2).mean())
    assert simsiam.negative_cosine(z1, 3 * z1) == pytest.approx(-1)
    by_hand = -(z2.softmax(1) * p1.softmax(1).log()).sum(1).mean()
    torch.testing.assert_close(simsiam.siamese_loss([p1], [z1, z2], "cross_entropy"), by_hand)


def test_moving_targets_begin_with_the_first_embedding() -> None:
    old, new = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[2.0, 4.0], [2.0, 4.0]])
    torch.testing.assert_close(simsiam.moving_targets(old, new, 0.75), torch.tensor([[2.0, 4.0], [1.25, 3.25]]))


# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize(
    ("options", "projector", "predictor", "frozen"),
    [
        ({}, "LBRLBRLB", "LBRL", {"encoder.fc.6.bias"}),
        ({"projector_layers": 2}, "LBRLB", "LBRL", {"encoder.fc.3.bias"}),
        ({"norms": "none"}, "LRLRL", "LRL", set()),
        ({"norms": "hidden"}, "LBRLBRL", "LBRL", set()),
        ({"norms": "all"}, "LBRLBRLB", "LBRLB", {"encoder.fc.6.bias"}),
        ({"predictor": "none"}, "LBRLBRLB", "", {"encoder.fc.6.bias"}),
        ({"predictor": "fixed"}, "LBRLBRLB", "LBRL", {"encoder.fc.6.bias", "predictor"}),
    ],
)
def test_heads(options: dict[str, Any], projector: str, predictor: str, frozen: set[str]) -> None:
    network, letter = _network(**options), {nn.Linear: "L", nn.BatchNorm1d: "B", nn.ReLU: "R", nn.Identity: ""}
    assert "".join(letter[type(layer)] for layer in network.encoder.fc) == projector
    parts = network.predictor if isinstance(network.predictor, nn.Sequential) else [network.predictor]
    assert "".join(letter[type(layer)] for layer in parts) == predictor
    still = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert {"predictor" if name.startswith("predictor") else name for name in still} == frozen
    assert network.encoder.layer1[0].bn2.weight.abs().max() == 0
    assert network(_views()[0]).shape == (4, 16)
    assert network.features(_views()[0]).shape == (4, 64)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dim": 0}, "SimSiam wants"),
        ({"norms": "some"}, "choice of norms"),
        ({"predictor": "no"}, "predictor"),
        ({"similarity": "l2"}, "similarity"),
        ({"alternation": 0}, "alternation must"),
        ({"target_momentum": 1.0}, "target_momentum in"),
        ({"alternation": 2, "target_momentum": 0.8}, "choose one"),
        ({"stop_gradient": False, "alternation": 2}, "choose one"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ZooError, match=told):
        _task(**options)


# --------------------------------------------------------------------------------------------------------------- tasks


def _gradient(task: SimSiamPretraining, views: list[Tensor]) -> tuple[Tensor, Tensor]:
    task.zero_grad()
    loss = task.training_step({"views": views}, 0)
    loss.backward()
    gradient = task.network.encoder.conv1.weight.grad
    assert gradient is not None
    return loss.detach(), gradient.clone()


def test_the_stop_gradient_changes_the_gradient_alone() -> None:
    (loss, with_stop), (same, without) = (_gradient(_task(stop_gradient=stop), _views()) for stop in (True, False))
    assert loss == same
    assert not torch.allclose(with_stop, without)


def test_one_sided_losses_and_pairs_of_views() -> None:
    views = _views(4)
    both, first = _gradient(_task(), views[:2])[0], _gradient(_task(symmetric=False), views[:2])[0]
    reverse = _gradient(_task(symmetric=False), views[1::-1])[0]
    torch.testing.assert_close(both, (first + reverse) / 2)
    twice, second = _gradient(_task(symmetric=False), views)[0], _gradient(_task(symmetric=False), views[2:])[0]
    torch.testing.assert_close(twice, (first + second) / 2)


def test_alternation_keeps_the_encoder_of_its_targets(tmp_path: Path) -> None:
    """Two updates with one encoder of targets: it is the trained one again every other update."""
    task, equal = _task(alternation=2), []
    assert torch.equal(*_gradient_of_target(task))

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            pair = zip(module.network.encoder.parameters(), module.target.parameters(), strict=True)
            equal.append(all(torch.equal(a, b) for a, b in pair))

    _trainer(tmp_path, callbacks=[Watch()]).fit(task, datamodule=_data())
    assert equal == [True, False, True, False]
    assert task.hparams["alternation"] == 2
    epochs = _task(alternation="epoch")
    before = copy.deepcopy(epochs.network.encoder.state_dict())
    equal.clear()
    _trainer(tmp_path, callbacks=[Watch()]).fit(epochs, datamodule=_data())
    assert equal == [True, False, False, False]
    assert epochs.target is not None
    assert torch.equal(epochs.target.conv1.weight, before["conv1.weight"])


def _gradient_of_target(task: SimSiamPretraining) -> tuple[Tensor, Tensor]:
    """Of a first step, when the target's encoder is the encoder itself; and of SimSiam."""
    return _gradient(task, _views())[1], _gradient(_task(), _views())[1]


def test_moving_average_targets_are_kept_for_each_image(tmp_path: Path) -> None:
    task = _task(target_momentum=0.8, predictor="none")
    trainer = _trainer(tmp_path, max_epochs=2)
    trainer.fit(task, datamodule=_data())
    assert task.memory.shape == (32, 16)
    assert bool((task.memory != 0).any(dim=1).all())
    trainer.save_checkpoint(tmp_path / "memory.ckpt")
    again = SimSiamPretraining.load_from_checkpoint(tmp_path / "memory.ckpt", weights_only=True)
    assert torch.equal(again.memory, task.memory)
    old = task.memory[[5, 7]].clone()
    z = torch.randn(2, 16), torch.randn(2, 16)
    targets = task.targets(tuple(_views(2, 2)), z, {"index": torch.tensor([5, 7])})
    torch.testing.assert_close(targets[1], 0.8 * old + 0.2 * z[1])
    torch.testing.assert_close(task.memory[[5, 7]], 0.8 * old + 0.1 * (z[0] + z[1]))
    with pytest.raises(ZooError, match="wants 'index'"):
        task.targets(tuple(_views(2, 2)), z, Batch({"views": []}))


def test_from_pretraining_to_what_it_is_worth(tmp_path: Path) -> None:
    task, data = _task(optim=Optim(name="sgd", lr=0.05, constant_lr=("predictor",))), _data()
    trainer = _trainer(tmp_path, callbacks=[KNNProbe(k=5)], limit_val_batches=2)
    trainer.fit(task, datamodule=data)
    assert {"train/loss", "train/spread", "val/spread", "knn_top1"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "pre.ckpt")
    (test,) = trainer.test(task, datamodule=data, verbose=False)
    assert 0 < test["test/spread"] < 2
    prediction = trainer.predict(task, datamodule=data)[0]
    assert prediction["features"].shape == (8, 64)
    torch.testing.assert_close(prediction["embedding"].norm(dim=1), torch.ones(8))
    assert {key: value.shape for key, value in task.eval().sides(_views()).items()} == dict.fromkeys(
        ("source", "target"), (4, 16)
    )
    plain = ImageDataModule("shapes", image_size=32, train_samples=16, batch_size=8, seed=0)
    for kind, moved in ((simsiam.SimSiamLinearProbe, {"fc.weight", "fc.bias"}), (simsiam.SimSiamFineTuning, None)):
        worth = kind(**TRUNK, num_classes=10, init_from=str(tmp_path / "pre.ckpt"), optim=FAST)
        worth.setup("fit")
        before = copy.deepcopy(worth.network.state_dict())
        for name, value in task.network.encoder.state_dict().items():
            assert name.startswith("fc.") or torch.equal(before[name], value), name
        _trainer(tmp_path).fit(worth, datamodule=plain)
        changed = {name for name, value in worth.network.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == moved if moved else {"conv1.weight", "bn1.running_mean", "fc.bias"} <= changed
    with pytest.raises(ZooError, match="TwoViews"):
        _trainer(tmp_path).fit(_task(), datamodule=plain)


def test_published_optimisers() -> None:
    encoder, predictor = param_groups(SimSiam(**SMALL), SimSiamPretraining(**SMALL).optim)
    assert (encoder["weight_decay"], predictor["weight_decay"]) == (1e-4, 1e-4)
    assert {name.partition(".")[0] for name in predictor["names"]} == {"predictor"}
    assert "encoder.fc.6.bias" not in encoder["names"]
    assert SimSiamPretraining(**SMALL).optim.peak_lr(512) == pytest.approx(0.1)
    probe = simsiam.SimSiamLinearProbe(**TRUNK)
    assert probe.optim.peak_lr(4096) == pytest.approx(1.6)
    from zoo.training.optim import make_optimizer

    assert isinstance(make_optimizer(param_groups(probe.trainable(), probe.optim), probe.optim, 1.6), LARC)


# ------------------------------------------------------------------------------------------------------------- weights


def test_layouts_are_read_and_others_refused() -> None:
    state = _network().state_dict()
    for layout in (state, {f"module.{key}": value for key, value in state.items()}):
        assert simsiam.convert_official(layout).keys() == state.keys()
        trunk = simsiam.convert_trunk(layout)
        assert trunk.keys() == {k for k in _network().encoder.state_dict() if not k.startswith("fc.")}
        assert simsiam.convert_trunk(trunk) == trunk
    for stray in ("module.encoder.fc.weight", "encoder_q.conv1.weight", "predictor.weight", "backbone.0"):
        with pytest.raises(ZooError, match=f"unknown key '{stray}'"):
            simsiam.convert_official({**state, stray: torch.empty(1)})
    with pytest.raises(ZooError, match="no encoder"):
        simsiam.convert_trunk({"predictor.0.weight": torch.empty(1)})


@pytest.mark.parametrize(("name", "classes"), [("simsiam_r50_pretrain", 0), ("simsiam_r50_linear", 1000)])
def test_published_files_at_full_size(name: str, classes: int, shared: Path) -> None:
    keys = json.loads((shared / "statedicts" / "simsiam" / f"{name}.json").read_text())["keys"]
    published = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    with torch.device("meta"):
        network = simsiam.simsiam_resnet50_trunk(classes) if classes else simsiam.simsiam_resnet50()
    network.load_state_dict(simsiam.convert_official(published), strict=True)


def test_a_published_file_becomes_the_whole_the_trunk_or_a_detector_backbone(tmp_path: Path) -> None:
    sizes = {"layers": [1, 1, 1, 1]}
    state = _network(arch="resnet50", width=64, dim=2048, pred_dim=512).state_dict()
    torch.save({"epoch": 100, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pth.tar")
    whole = zoo.create_model("simsiam_resnet50", weights=tmp_path / "a.pth.tar", **sizes)
    trunk = zoo.create_model("simsiam_resnet50_trunk", weights=tmp_path / "a.pth.tar", **sizes)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(trunk.eval()(x), whole.eval().features(x))
    exported = simsiam.EXPORTS["detectron2"](state)
    assert torch.equal(exported["model"]["stem.conv1.weight"], state["encoder.conv1.weight"])
    assert not any("fc" in key or "predictor" in key for key in exported["model"])
