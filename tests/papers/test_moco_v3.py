"""MoCo v3: the equations, the networks and their variants, the tasks, the published layouts, the exports."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import zoo
from zoo.data import ImageDataModule
from zoo.data.transforms import ContrastiveAugment
from zoo.data.views import Views
from zoo.errors import ZooError
from zoo.ops.pos_embed import sincos_2d
from zoo.selfsup import moco_v3
from zoo.selfsup.moco_v3 import MoCoV3, MoCoV3Pretraining, MoCoV3ViT
from zoo.training import LARS, Instability, KNNProbe, Optim, param_groups
from zoo.training.optim import make_optimizer

VIT: dict[str, Any] = {
    **{"arch": "vit_small", "img_size": 32, "patch_size": 16},
    **{"embed_dim": 32, "depth": 2, "num_heads": 4},
}
RESNET: dict[str, Any] = {"arch": "resnet18", "layers": [1, 1, 1, 1], "width": 8}
HEADS: dict[str, Any] = {"dim": 16, "mlp_dim": 24}
FAST = Optim(lr=1e-3, schedule="constant")


def _network(**options: Any) -> MoCoV3:
    torch.manual_seed(0)
    return MoCoV3(**{**VIT, **HEADS, **options})


def _task(**options: Any) -> MoCoV3Pretraining:
    L.seed_everything(3, verbose=False)
    return MoCoV3Pretraining(**{**VIT, **HEADS, "optim": FAST, **options})


def _views(size: int = 6) -> list[Tensor]:
    return list(torch.randn(2, size, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def _data(views: bool = True) -> ImageDataModule:
    transform = Views([ContrastiveAugment(blur_prob=1.0), ContrastiveAugment(solarize_prob=0.2)]) if views else None
    return ImageDataModule("shapes", image_size=32, train_samples=32, train_transform=transform, batch_size=8, seed=0)


def _trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    few = {"max_epochs": 1, "enable_checkpointing": False, "limit_val_batches": 0, "limit_test_batches": 2}
    return L.Trainer(default_root_dir=tmp_path, **{**quiet, **few, "limit_predict_batches": 1, **options})


# ----------------------------------------------------------------------------------------------------------- equations


def test_the_loss_is_2t_times_the_cross_entropy_of_own_keys() -> None:
    q1, q2, k1, k2 = torch.randn(4, 5, 7, dtype=torch.float64).unbind()
    by_hand = [
        2 * 0.3 * cross_entropy(normalize(q, dim=1) @ normalize(k, dim=1).T / 0.3, torch.arange(5))
        for q, k in ((q1, k2), (q2, k1))
    ]
    torch.testing.assert_close(moco_v3.symmetric_loss([q1, q2], [k1, k2], 0.3), sum(by_hand))
    keys = k2.requires_grad_(True)
    assert not moco_v3.contrastive_loss(q1, keys, 0.3).requires_grad


def test_shares_of_two_processes_are_the_loss_and_the_gradient_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 6, 4, dtype=torch.float64).unbind()
    query.requires_grad_(True)
    whole = moco_v3.contrastive_loss(query, key, 0.2)
    (wanted,) = torch.autograd.grad(whole, query)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(moco_v3, "world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(moco_v3, "gather", lambda own: normalize(key, dim=1))
        shares.append(moco_v3.contrastive_loss(query.chunk(2)[rank], key.chunk(2)[rank], 0.2))
    mean = torch.stack(shares).mean()
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, query)[0], wanted)


# ------------------------------------------------------------------------------------------------------------- network

LETTER = {nn.Linear: "L", nn.BatchNorm1d: "B", nn.ReLU: "R"}


@pytest.mark.parametrize(
    ("options", "projector", "predictor"),
    [
        ({}, "LBRLBRLB", "LBRLB"),
        ({"head_norm": False}, "LRLRL", "LRL"),
        ({"predictor": False}, "LBRLBRLB", ""),
        ({"stem": "conv"}, "LBRLBRLB", "LBRLB"),
    ],
)
def test_heads(options: dict[str, Any], projector: str, predictor: str) -> None:
    network = _network(**options)
    heads = [network.base_encoder.head, network.predictor]
    letters = ["".join(LETTER[type(layer)] for layer in head.children()) for head in heads]
    assert letters == [projector, predictor]
    assert not any(layer.bias is not None for head in heads for layer in head.modules() if isinstance(layer, nn.Linear))
    assert network.query(_views()[0]).shape == (6, 16)
    assert network.features(_views()[0]).shape == (6, 32)


def test_heads_of_a_resnet() -> None:
    network = MoCoV3(**RESNET, **HEADS, temperature=1.0)
    heads = [network.base_encoder.fc, network.predictor]
    assert ["".join(LETTER[type(layer)] for layer in head.children()) for head in heads] == ["LBRLB", "LBRL"]
    assert network.base_encoder.layer1[0].bn2.weight.abs().max() == 0
    assert network.features(_views()[0]).shape == (6, 64)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}),
        ({"stop_grad_conv1": False}, {"pos_embed"}),
        ({"positions": "learned", "stop_grad_conv1": False}, set()),
        ({"stem": "conv", "positions": "none"}, {"pos_embed"}),
    ],
)
def test_what_a_vit_keeps_as_it_starts(options: dict[str, Any], frozen: set[str]) -> None:
    encoder = MoCoV3ViT(**{**VIT, **options})
    assert {name for name, p in encoder.named_parameters() if not p.requires_grad} == frozen
    qkv, proj = encoder.blocks[0].attn.qkv, encoder.blocks[0].attn.proj
    assert qkv.weight.abs().max() <= (6 / 64) ** 0.5
    spreads = [part.weight.std().item() for part in (qkv, proj)]  # q, k and v are matrices of their own
    assert spreads[0] == pytest.approx(spreads[1], rel=0.1)
    assert encoder.cls_token.abs().max() < 1e-5
    if options.get("positions") == "none":
        assert not encoder.pos_embed.any()


def test_positions_have_the_row_first() -> None:
    table, other = sincos_2d(8, (2, 3), 1, rows_first=True), sincos_2d(8, (2, 3), 1)
    torch.testing.assert_close(table, torch.cat([other[..., 4:], other[..., :4]], dim=-1))
    rows = table[0, 1:, :4].view(2, 3, 4)
    assert torch.equal(rows[:, 0], rows[:, 2])
    assert rows[1, 0, 0] == pytest.approx(0.841471, abs=1e-6)


@pytest.mark.parametrize("pool", ["token", "avg", "norm_avg"])
def test_pools_and_batch_norm_in_the_mlps(pool: Any) -> None:
    encoder = MoCoV3ViT(**VIT, pool=pool, mlp_norm="batch")
    images, raw = _views()[0], []
    encoder.blocks[-1].register_forward_hook(lambda module, inputs, output: raw.append(output))
    found = encoder(images)
    tokens = raw[0] if pool == "avg" else encoder.norm(raw[0])
    torch.testing.assert_close(found, tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(dim=1))
    assert encoder.blocks[1].norm2.norm.num_batches_tracked == 1
    normed = encoder.blocks[0].norm2(torch.randn(4, 5, 32) * 3 + 1)
    torch.testing.assert_close(normed.mean(dim=(0, 1)), torch.zeros(32), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dim": 0}, "MoCo v3 wants"),
        ({"arch": "vit_tiny"}, "architecture"),
        ({"stem": "conv", "patch_size": 8}, "convolutional stem"),
        ({"positions": "rope"}, "kind of positions"),
        ({"pool": "max"}, "pool"),
        ({"layers": [1]}, "no option 'layers'"),
        ({"momentum": 2.0}, "momentum must"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ZooError, match=told):
        _task(**options)


# --------------------------------------------------------------------------------------------------------------- tasks


def test_a_step_moves_the_momentum_encoder_between_queries_and_keys() -> None:
    task, (x1, x2) = _task(momentum=0.75), _views()
    before, reference = copy.deepcopy(task.network.momentum_encoder), copy.deepcopy(task.network)
    with torch.no_grad():
        for p in task.network.base_encoder.parameters():
            p.add_(0.01)
    reference.load_state_dict(task.network.state_dict())
    loss = task.training_step({"views": [x1, x2]}, 0)
    pairs = zip(*(net.parameters() for net in (task.network.momentum_encoder, before)), strict=True)
    for (new, old), now in zip(pairs, task.network.base_encoder.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * now)
    reference.momentum_encoder.load_state_dict(
        {**reference.momentum_encoder.state_dict(), **dict(task.network.momentum_encoder.named_parameters())}
    )
    queries, keys = reference.step(x1, x2, None)
    torch.testing.assert_close(moco_v3.symmetric_loss(queries, keys, 0.2), loss)


def test_from_pretraining_to_what_it_is_worth(tmp_path: Path) -> None:
    task, data = _task(momentum=0.9), _data()
    momenta: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            momenta.append(float(trainer.callback_metrics["train/momentum"]))

    patch = task.network.base_encoder.patch_embed.proj.weight.clone()
    watched = [Watch(), KNNProbe(k=5), Instability(every_n_steps=2, k=5, train_samples=16)]
    trainer = _trainer(tmp_path, callbacks=watched, limit_val_batches=1)
    trainer.fit(task, datamodule=data)
    assert momenta == pytest.approx([0.9, 0.9146447, 0.95, 0.9853553])
    assert torch.equal(patch, task.network.base_encoder.patch_embed.proj.weight)
    logged = {"train/loss", "train/spread", "val/spread", "knn_top1", "gradient/first", "gradient/last_max", "knn_dips"}
    assert logged <= trainer.callback_metrics.keys()
    assert len(watched[-1].curve) == 2
    trainer.save_checkpoint(tmp_path / "pre.ckpt")
    (test,) = trainer.test(task, datamodule=data, verbose=False)
    assert 0 < test["test/spread"] < 2
    prediction = trainer.predict(task, datamodule=data)[0]
    assert prediction["features"].shape == (8, 32)
    torch.testing.assert_close(prediction["embedding"].norm(dim=1), torch.ones(8))
    assert {key: value.shape for key, value in task.eval().sides(_views()).items()} == dict.fromkeys(
        ("source", "target"), (6, 16)
    )
    for kind, moved in ((moco_v3.MoCoV3LinearProbe, {"head.weight", "head.bias"}), (moco_v3.MoCoV3FineTuning, None)):
        worth = kind(**VIT, num_classes=10, init_from=str(tmp_path / "pre.ckpt"), optim=FAST)
        worth.setup("fit")
        before = copy.deepcopy(worth.network.state_dict())
        for name, value in task.network.base_encoder.state_dict().items():
            assert name.startswith("head.") or torch.equal(before[name], value), name
        _trainer(tmp_path).fit(worth, datamodule=_data(views=False))
        changed = {name for name, value in worth.network.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == moved if moved else changed == before.keys()
    with pytest.raises(ZooError, match="TwoViews"):
        _trainer(tmp_path).fit(_task(), datamodule=_data(views=False))


@pytest.mark.parametrize("kind", [moco_v3.MoCoV3ResNetLinearProbe, moco_v3.MoCoV3ResNetFineTuning])
def test_resnets_are_probed_and_tuned_too(kind: Any, tmp_path: Path) -> None:
    network = MoCoV3(**RESNET, **HEADS)
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "r.pth.tar")
    task = kind(**RESNET, num_classes=10, init_from=str(tmp_path / "r.pth.tar"))
    task.setup("fit")
    assert torch.equal(task.network.conv1.weight, network.base_encoder.conv1.weight)


def test_published_optimisers() -> None:
    (decayed,) = param_groups(_network(), MoCoV3Pretraining(**VIT, **HEADS).optim)
    assert decayed["weight_decay"] == 0.1
    assert {"base_encoder.cls_token", "base_encoder.norm.bias", "predictor.1.weight"} <= set(decayed["names"])
    assert not any("momentum_encoder" in name or "patch_embed" in name for name in decayed["names"])
    assert MoCoV3Pretraining(**VIT).optim.peak_lr(4096) == pytest.approx(2.4e-3)
    assert moco_v3.MoCoV3LinearProbe(**VIT).optim.peak_lr(1024) == pytest.approx(12.0)
    tuned = param_groups(moco_v3.MoCoV3FineTuning(**VIT).network, moco_v3.MoCoV3FineTuning(**VIT).optim)
    spared = next(group["names"] for group in tuned if not group["weight_decay"])
    assert {"cls_token", "pos_embed", "norm.weight"} <= set(spared)
    task, _, run = zoo.load_recipe(
        "moco_v3:linear_r50_1000ep", {"model.arch": "resnet18", "trainer.accelerator": "cpu"}
    )
    assert (run.max_epochs, task.momentum, task.network.temperature) == (1000, 0.996, 1.0)
    optimizer = make_optimizer(param_groups(task.network, task.optim), task.optim, task.optim.peak_lr(4096))
    assert isinstance(optimizer, LARS)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(4.8)


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("sizes", [VIT, RESNET, {**VIT, "stem": "conv"}, {**VIT, "mlp_norm": "batch"}])
def test_layouts_are_read_and_others_refused(sizes: dict[str, Any]) -> None:
    network = MoCoV3(**sizes, **HEADS)
    state = network.state_dict()
    for layout in (state, {f"module.{key}": value for key, value in state.items()}):
        assert moco_v3.convert_official(layout).keys() == state.keys()
        trunk = moco_v3.convert_trunk(layout)
        assert trunk.keys() == {k for k in network.base_encoder.state_dict() if not k.startswith(("fc.", "head."))}
        assert moco_v3.convert_trunk(trunk) == trunk
    for stray in ("module.base_encoder.head.weight", "encoder_q.conv1.weight", "predictor.weight", "mask_token"):
        with pytest.raises(ZooError, match=f"unknown key '{stray}'"):
            moco_v3.convert_official({**state, stray: torch.empty(1)})
    with pytest.raises(ZooError, match="no query encoder"):
        moco_v3.convert_trunk({"predictor.0.weight": torch.empty(1)})
    right, wrong = ("torchvision", "deit") if sizes is RESNET else ("deit", "detectron2")
    assert moco_v3.EXPORTS[right](state)
    with pytest.raises(ZooError, match="this format is for"):
        moco_v3.EXPORTS[wrong](state)


@pytest.mark.parametrize("name", ["vit_small", "vit_base", "r50"])
def test_published_files_at_full_size(name: str, shared: Path) -> None:
    model = "moco_v3_resnet50" if name == "r50" else f"moco_v3_{name}"
    for suffix, options in (("", {}), ("_linear", {"num_classes": 1000})):
        keys = json.loads((shared / "statedicts" / "moco_v3" / f"{name}{suffix}.json").read_text())["keys"]
        published = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
        with torch.device("meta"):
            network = getattr(moco_v3, f"{model}_trunk" if options else model)(**options)
        network.load_state_dict(moco_v3.convert_official(published), strict=True)
