"""Asym-Siam: the designs and their sides, the projector, the task, the published layouts."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import zoo
from tests.processes import in_processes
from zoo.data import ImageDataModule
from zoo.data.transforms import ContrastiveAugment
from zoo.data.views import Views
from zoo.errors import ZooError
from zoo.nn.batchnorm import GatheredBatchNorm1d, SplitBatchNorm1d
from zoo.ops.collective import world
from zoo.selfsup import asym_siam
from zoo.selfsup.asym_siam import AsymSiam, AsymSiamPretraining
from zoo.selfsup.moco import info_nce
from zoo.training import KNNProbe, Optim, ViewVariance

TRUNK: dict[str, Any] = {"arch": "resnet18", "layers": [1, 1, 1, 1], "width": 8}
SMALL: dict[str, Any] = {**TRUNK, "dim": 8, "queue_size": 16}
FAST = Optim(name="sgd", lr=0.05, weight_decay=1e-4, no_decay="none", schedule="constant")


def _network(**options: Any) -> AsymSiam:
    torch.manual_seed(0)
    return AsymSiam(**{**SMALL, **options})


def _views(count: int, size: int = 4) -> list[Tensor]:
    return list(torch.randn(count, size, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def _trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    few = {"max_epochs": 1, "enable_checkpointing": False, "limit_val_batches": 2, "limit_test_batches": 2}
    return L.Trainer(default_root_dir=tmp_path, **{**quiet, **few, **options})


# ----------------------------------------------------------------------------------------------------------- equations


def test_means_are_of_unscaled_outputs() -> None:
    first, second = torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]])
    torch.testing.assert_close(
        asym_siam.mean_encoding(torch.stack([first, second])), normalize(torch.tensor([[3.0, 1.0]]))
    )


def test_small_crops_count_as_much_as_the_large_one() -> None:
    large, *minis = torch.randn(4, 5, 9)
    wanted = info_nce(large) + torch.stack([info_nce(mini) for mini in minis]).mean()
    torch.testing.assert_close(asym_siam.multi_crop_loss([large], minis), wanted)
    torch.testing.assert_close(asym_siam.multi_crop_loss([large], []), info_nce(large))


# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize(
    ("options", "source", "target"),
    [
        ({}, nn.BatchNorm1d, nn.BatchNorm1d),
        ({"sync_bn": "target"}, nn.BatchNorm1d, GatheredBatchNorm1d),
        ({"sync_bn": "source", "bn_splits": 2}, GatheredBatchNorm1d, SplitBatchNorm1d),
        ({"sync_bn": "both"}, GatheredBatchNorm1d, GatheredBatchNorm1d),
        ({"bn_splits": 2}, SplitBatchNorm1d, SplitBatchNorm1d),
    ],
)
def test_each_side_has_its_batchnorm(options: dict[str, Any], source: type, target: type) -> None:
    network = _network(**options)
    assert [type(layer) for layer in network.encoder_q.fc] == [
        *(nn.Linear, source, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear)
    ]
    assert type(network.encoder_k.fc[1]) is target
    q, k = network.encoder_q.state_dict(), network.encoder_k.state_dict()
    assert all(torch.equal(q[name], k[name]) for name in q)
    assert not any(p.requires_grad for p in network.encoder_k.parameters())
    assert all(p.requires_grad for p in network.encoder_q.parameters())


def test_a_step_of_all_designs() -> None:
    network = _network(source_minis=2, target_views=2, target_minis=1).double()
    views = [view.double() for view in _views(6)]
    views[1], views[2], views[5] = (view[..., :24, :24] for view in (views[1], views[2], views[5]))
    by_hand, old = copy.deepcopy(network), network.queue.clone()
    large, small, keys = network.contrast(views, torch.arange(8).flip(0))
    query = normalize(by_hand.encoder_q(views[0]))
    minis = [normalize(by_hand.encoder_q(view)) for view in views[1:3]]
    both = by_hand.encoder_k(torch.cat(views[3:5]))
    wanted = normalize(both.view(2, 4, 8).mean(0))
    torch.testing.assert_close(keys, wanted)
    torch.testing.assert_close(large[0], network.logits(query, wanted))
    torch.testing.assert_close(small[1], network.logits(minis[1], wanted))
    own = normalize(by_hand.encoder_k(views[5]))
    torch.testing.assert_close(small[2][:, 0], (query * own).sum(1) / 0.2)
    torch.testing.assert_close(small[2][:, 1:], query @ old / 0.2)
    assert len(small) == 3
    mean = _network(source_views=2).source(views := _views(2))
    parts = [_network().encoder_q(view) for view in views]
    torch.testing.assert_close(mean, normalize((parts[0] + parts[1]) / 2))


@pytest.mark.parametrize(
    "options", [{"source_views": 0}, {"target_minis": -1}, {"sync_bn": "left"}, {"temperature": 0.0}]
)
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ZooError, match=r"wants|side"):
        _network(**options)


# ----------------------------------------------------------------------------------------------------------- BatchNorm


def test_split_batchnorm_of_features() -> None:
    split, parts = SplitBatchNorm1d(4, 2).double(), [nn.BatchNorm1d(4).double() for _ in range(2)]
    x = torch.randn(6, 4, dtype=torch.float64)
    y = split(x)
    for n, part in enumerate(parts):
        torch.testing.assert_close(y[n::2], part(x[n::2]))
    torch.testing.assert_close(split.running_var, (parts[0].running_var + parts[1].running_var) / 2)
    torch.testing.assert_close(split.eval()(x), nn.functional.batch_norm(x, split.running_mean, split.running_var))
    with pytest.raises(ZooError, match="cannot be split"):
        split.train()(x[:5])
    with pytest.raises(ZooError, match="one sample each"):
        split.train()(x[:2])


def _joined() -> tuple[int, int]:
    """(rank, number of processes), once they have found each other."""
    if "LOCAL_RANK" in os.environ:
        where = {"rank": int(os.environ["LOCAL_RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        torch.distributed.init_process_group("gloo", **where)
    return world()


def _normalised(group: int) -> dict[str, Tensor]:
    rank, size = _joined()
    torch.manual_seed(0)
    x = torch.randn(4 * 2, 3, dtype=torch.float64).chunk(size)[rank].requires_grad_()
    norm = GatheredBatchNorm1d(3, group).double()
    y = norm(x)
    y.pow(3).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "grad": x.grad, "mean": norm.running_mean}


def test_gathered_batchnorm_is_that_of_the_whole_batch() -> None:
    whole, (first, second) = _normalised(8), in_processes(2, _normalised, 8)
    for key in ("y", "grad"):
        torch.testing.assert_close(torch.cat([first[key], second[key]]), whole[key])
    torch.testing.assert_close(first["mean"], whole["mean"])
    torch.testing.assert_close(second["mean"], whole["mean"])
    with pytest.raises(ZooError, match="group_size"):
        GatheredBatchNorm1d(3, 0)


def _step_of_a_process() -> dict[str, Tensor]:
    """Two views of four images of this process's share of eight, as source and target have them, in eval mode."""
    rank, size = _joined()
    network = _network(target_views=2).double().eval()
    views = [view.double().chunk(size)[rank] for view in _views(3, 8)]
    large, _, keys = network.contrast(views)
    loss = info_nce(large[0])
    loss.backward()
    gradient = network.encoder_q.conv1.weight.grad
    assert gradient is not None
    return {"keys": keys, "gradient": gradient, "loss": loss.detach()}


def test_two_processes_see_the_keys_of_one() -> None:
    """Keys are shuffled among the processes and come back; the mean of losses and gradients is that of one process."""
    whole, parts = _step_of_a_process(), in_processes(2, _step_of_a_process)
    for part in parts:
        torch.testing.assert_close(part["keys"], whole["keys"])
    for key in ("gradient", "loss"):
        torch.testing.assert_close((parts[0][key] + parts[1][key]) / 2, whole[key])


# --------------------------------------------------------------------------------------------------------------- tasks


def test_from_pretraining_to_what_it_is_worth(tmp_path: Path) -> None:
    L.seed_everything(3, verbose=False)
    designs = {"source_minis": 1, "target_views": 2, "bn_splits": 2, "sync_bn": "target"}
    task = AsymSiamPretraining(**SMALL, **designs, optim=FAST)
    assert (task.network.temperature, task.views) == (0.2, 4)
    large, mini = ContrastiveAugment(), ContrastiveAugment(24, scale=(0.1, 0.3))
    data = ImageDataModule(
        *("shapes", None, 8),
        image_size=32,
        train_samples=48,
        seed=0,
        train_transform=Views([large, mini, large], [1, 1, 2]),
    )
    trainer = _trainer(tmp_path, callbacks=[KNNProbe(k=5), ViewVariance(images=8, repeats=3)])
    trainer.fit(task, datamodule=data)
    assert {"train/acc1", "val/spread", "knn_top1", "variance/target"} <= trainer.callback_metrics.keys()
    assert task.network.queue_ptr.item() == 48 % 16
    assert 0 < trainer.callback_metrics["variance/target"] < 2
    trainer.save_checkpoint(tmp_path / "pre.ckpt")
    again = AsymSiamPretraining.load_from_checkpoint(tmp_path / "pre.ckpt", weights_only=True)
    assert torch.equal(again.network.queue, task.network.queue)
    for kind in (asym_siam.AsymSiamLinearProbe, asym_siam.AsymSiamFineTuning):
        worth = kind(**TRUNK, num_classes=10, init_from=str(tmp_path / "pre.ckpt"))
        worth.setup("fit")
        assert torch.equal(worth.network.conv1.weight, task.network.encoder_q.conv1.weight)
    assert (worth.optim.lr, asym_siam.AsymSiamLinearProbe(**TRUNK).optim.peak_lr(4096)) == (0.025, 1.6)
    wrong = ImageDataModule("shapes", image_size=32, train_samples=16, batch_size=8)
    with pytest.raises(ZooError, match="4 of each image"):
        _trainer(tmp_path).fit(task, datamodule=wrong)


def test_a_mean_of_two_views_halves_the_variance_of_targets() -> None:
    """Of a network at its start, whose outputs are all but linear in small changes."""
    torch.manual_seed(0)
    network, images = _network().eval(), torch.randn(16, 3, 32, 32)
    outputs = torch.stack([network.key(images + 0.3 * torch.randn_like(images)) for _ in range(32)])
    single = normalize(outputs, dim=2).var(0).sum(1).mean()
    pairs = torch.stack([asym_siam.mean_encoding(outputs[k : k + 2]) for k in range(0, 32, 2)]).var(0).sum(1).mean()
    assert (pairs / single).item() == pytest.approx(0.5, abs=0.1)


def test_the_loss_at_the_start_is_that_of_guessing() -> None:
    network = _network(source_minis=1, temperature=100.0)
    large, small, _ = network.contrast(_views(3))
    assert asym_siam.multi_crop_loss(large, small).item() == pytest.approx(2 * math.log(17), abs=0.1)


# ------------------------------------------------------------------------------------------------------------- weights


def test_layouts_are_read_and_others_refused() -> None:
    state = _network(sync_bn="target").state_dict()
    for layout in (state, {f"module.{key}": value for key, value in state.items()}):
        assert asym_siam.convert_official(layout).keys() == state.keys()
        trunk = asym_siam.convert_trunk(layout)
        assert asym_siam.convert_trunk(trunk) == trunk
        assert not any(key.startswith("fc.") for key in trunk)
    for stray in ("module.encoder_q.fc.2.weight", "encoder.conv1.weight", "module.backbone.0"):
        with pytest.raises(ZooError, match=f"unknown key '{stray}'"):
            asym_siam.convert_official({**state, stray: torch.empty(1)})
    with pytest.raises(ZooError, match="no source encoder"):
        asym_siam.convert_trunk({"queue": torch.empty(1)})
    exported = asym_siam.EXPORTS["detectron2"](state)
    assert torch.equal(exported["model"]["stem.conv1.weight"], state["encoder_q.conv1.weight"])


def test_the_published_layout_at_full_size(shared: Path) -> None:
    keys = json.loads((shared / "statedicts" / "asym_siam" / "asym_siam_r50.json").read_text())["keys"]
    published = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    for options in ({}, {"sync_bn": "target"}):
        with torch.device("meta"):
            network = asym_siam.asym_siam_resnet50(**options)
        network.load_state_dict(asym_siam.convert_official(published), strict=True)
    assert zoo.list_weights("asym_siam")
