"""Drifting Models: the field and its loss, banks, networks, tasks, published weights."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.processes import in_processes
from tests.training.training_task import trainer
from zoo.errors import ZooError
from zoo.generation import drifting as dr
from zoo.generation.drifting_encoder import FrozenFeatures, convnext_features
from zoo.metrics.energy import energy_score
from zoo.nn.perceptual import ConvNeXtV2Features
from zoo.nn.resnet_mae import FeatureSet, MAEResNet
from zoo.ops.pos_embed import apply_rope, rope_1d
from zoo.training import Optim
from zoo.training.bank import SampleBank

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 4}
SIZES |= {"num_classes": 5, "context_tokens": 2, "style_tokens": 3, "num_styles": 7}
ENCODER: dict[str, Any] = {"in_chans": 3, "width": 8, "layers": (1, 2, 1, 1), "num_classes": 5}
FAST = Optim(lr=1e-2, weight_decay=0.0, schedule="constant")


def _task(**options: Any) -> dr.Drifting:
    torch.manual_seed(0)
    sets = dr.Sets(labels=2, generated=4, positives=3, unconditional=2)
    return dr.Drifting(**{**SIZES, "sets": sets, "optim": FAST, **options})


def _stirred(network: Any) -> Any:
    """Without the zeros that adaLN-zero begins with."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def _batch(labels: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A step whose draws and real samples are pinned."""
    draw = torch.Generator().manual_seed(1)
    real = torch.randn(labels, 5, 3, 8, 8, generator=draw, dtype=dtype)
    batch = {"image": real[:, 0], "label": torch.arange(labels), "positives": real[:, :3], "unconditional": real[:, 3:]}
    batch |= {"noise": torch.randn(labels * 4, 3, 8, 8, generator=draw, dtype=dtype)}
    batch |= {"styles": torch.randint(0, 7, (labels * 4, 3), generator=draw)}
    uniform = torch.rand(2, labels, generator=draw, dtype=dtype)
    return {**batch, "alpha_uniform": uniform[0], "plain_uniform": uniform[1]}


# ----------------------------------------------------------------------------------------------------------- the field


def _forces(x: Tensor, y: Tensor, field: dr.Field = dr.Field()) -> dict[float, Tensor]:  # noqa: B008
    return dr.drift_loss(x[None], y[None], field=field).forces


def test_there_is_no_force_where_samples_are_the_data_and_it_points_to_the_data_where_not() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 2, generator=draw, dtype=torch.float64)
    same, other = torch.randn(2, 256, 2, generator=draw, dtype=torch.float64)
    wide = dr.Field(temperatures=(0.2,))
    assert _forces(x, same, wide)[0.2] < 0.02 * _forces(x, other + 3, wide)[0.2]
    x.requires_grad_()
    dr.drift_loss(x[None], other[None] + 3, field=wide).loss.sum().backward()
    assert x.grad is not None
    assert (x.grad.mean(0) < 0).all()  # down the gradient is towards the data


def test_the_loss_as_the_paper_writes_it() -> None:
    """Two softmaxes and their root, one temperature after the other."""
    draw = torch.Generator().manual_seed(0)
    gen, pos, neg = (torch.randn(3, n, 4, generator=draw, dtype=torch.float64) for n in (5, 6, 2))
    w_neg = torch.rand(3, 2, generator=draw, dtype=torch.float64)
    y, w = torch.cat([gen, neg, pos], 1), torch.cat([gen.new_ones(3, 5), w_neg, gen.new_ones(3, 6)], 1)
    distance = (gen[:, :, None] - y[:, None]).square().sum(3).clamp_min(1e-8).sqrt()
    scale = (distance * w[:, None]).mean() / w.mean()
    x, y = gen / (scale / 2), y / (scale / 2)
    apart = distance / scale + 100 * torch.eye(5, 13, dtype=torch.float64)
    total: Any = 0
    for t in (0.2, 0.05):
        kernel = (-apart / t).softmax(2) * (-apart / t).softmax(1)
        affinity = kernel.clamp_min(1e-6).sqrt() * w[:, None]
        minus, plus = affinity[:, :, :7], affinity[:, :, 7:]
        force = plus * minus.sum(2, keepdim=True) @ y[:, 7:] - minus * plus.sum(2, keepdim=True) @ y[:, :7]
        total = total + force / force.square().mean().sqrt()
    out = dr.drift_loss(gen, pos, neg, weight_neg=w_neg, field=dr.Field(temperatures=(0.2, 0.05)))
    torch.testing.assert_close(out.loss, total.square().mean((1, 2)))
    torch.testing.assert_close(out.scale, scale)
    del x


def test_without_anti_symmetry_the_data_itself_feel_a_force() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 256, 2, generator=draw, dtype=torch.float64)
    even = _forces(x, y, dr.Field((0.2,)))[0.2]
    for attraction, repulsion in ((1.0, 0.0), (2.0, 1.0), (1.0, 2.0)):
        assert _forces(x, y, dr.Field((0.2,), attraction, repulsion))[0.2] > 5 * even


def test_guidance_weighs_unconditional_samples() -> None:
    alpha = torch.tensor([1.0, 2.0, 4.0])
    weight = dr.unconditional_weight(alpha, 64, 16)
    torch.testing.assert_close((63 + 16 * weight) / 63, alpha)
    drawn = dr.AlphaDistribution(power=3.0, plain=0.5).draw(torch.rand(1000), torch.rand(1000))
    assert 0.4 < (drawn == 1).float().mean() < 0.6
    assert drawn.max() <= 4
    with pytest.raises(ZooError, match="alpha"):
        dr.AlphaDistribution(low=0.0)
    with pytest.raises(ZooError, match="temperatures"):
        dr.Field(temperatures=())


def test_the_energy_score_is_least_for_the_right_distribution() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, generator=draw)
    scores = [
        energy_score(x, std * torch.randn(4000, 4, 2, generator=draw) + mean).mean()
        for std, mean in ((1.0, 0.0), (0.2, 0.0), (2.0, 0.0), (1.0, 1.0))
    ]
    assert min(scores) == scores[0]


# --------------------------------------------------------------------------------------------------------------- banks


def test_a_bank_keeps_the_last_samples_of_each_class() -> None:
    bank = SampleBank(3, 4)
    bank.push(torch.arange(6.0)[:, None], torch.tensor([0, 0, 1, 0, 0, 0]))
    assert bank.count.tolist() == [4, 1, 0]
    assert sorted(bank.draw(torch.tensor([0]), 4).flatten().tolist()) == [1, 3, 4, 5]
    assert bank.draw(torch.tensor([1]), 3).flatten().tolist() == [2, 2, 2]
    with pytest.raises(ZooError, match="no sample of class 2"):
        bank.draw(torch.tensor([2]), 1)
    other = SampleBank(3, 4)
    other.load(bank.state())
    for some in (bank, other):
        some.push(torch.tensor([[7.0]]), torch.tensor([0]))
    assert bank.samples is not None
    assert torch.equal(bank.samples, other.samples)
    with pytest.raises(ZooError, match="not finite"):
        bank.push(torch.tensor([[torch.nan]]), torch.tensor([0]))
    with pytest.raises(ZooError, match="another size"):
        SampleBank(3, 5).load(bank.state())


def test_bytes_in_a_bank_are_the_same_pictures() -> None:
    pictures = (torch.arange(256.0) - 127.5) / 127.5
    bank = SampleBank(1, 256, "uint8")
    bank.push(pictures, torch.zeros(256, dtype=torch.long))
    assert torch.equal(bank.draw(torch.tensor([0]), 256).sort().values[0], pictures)
    assert bank.state()["samples"].dtype == torch.uint8
    with pytest.raises(ZooError, match="did you mean 'uint8'"):
        SampleBank(1, 1, "int8")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ networks


def test_a_new_generator_is_zero_and_styles_are_even() -> None:
    network = _task().network
    noise = torch.randn(4000, *network.noise_shape)
    assert network.sample(noise[:2], torch.tensor([0, 1])).abs().max() == 0
    picture, styles = network.split(noise)
    assert torch.equal(picture.flatten(1), noise[:, :192])
    counts = styles.flatten().bincount(minlength=7).float()
    assert counts.shape == (7,)
    assert (counts / counts.sum() * 7 - 1).abs().max() < 0.1
    _stirred(network)
    one, other = (network.sample(noise[:2], torch.tensor([0, 1]), alpha) for alpha in (1.0, 4.0))
    assert not torch.equal(one, other)
    with pytest.raises(ZooError, match="shape"):
        network(torch.zeros(1, 3, 4, 4), styles[:1], torch.tensor([0]), torch.ones(1))


def test_neighbouring_pairs_turn_as_halves_do() -> None:
    q, k = torch.randn(2, 1, 1, 5, 8)
    order = torch.arange(8).view(2, -1).T.flatten()
    ours = [apply_rope(x[..., order], *rope_1d(8, 5)) for x in (q, k)]
    theirs = [apply_rope(x, *rope_1d(8, 5, layout="half"), layout="half") for x in (q, k)]
    torch.testing.assert_close(ours[0] @ ours[1].mT, theirs[0] @ theirs[1].mT)


def test_grid_and_images_are_inverse_and_what_is_hidden_is_not_seen() -> None:
    network = MAEResNet(**ENCODER, input_patch=2)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(network.images(network.grid(images)), images)
    noise = torch.zeros(2, 4, 4)
    masked, pasted = network.reconstruct(images, noise, torch.ones(2))
    assert masked.abs().max() == 0
    assert not torch.equal(pasted, images)
    out, _ = network.loss(images, torch.tensor([0, 1]), noise, torch.ones(2), 0.25)
    torch.testing.assert_close(out.loss, 0.25 * out.classification + 0.75 * out.reconstruction)
    assert out.hidden.tolist() == [1, 1]
    with pytest.raises(ZooError, match="side that 2 divides"):
        network(torch.zeros(1, 3, 15, 15))


def test_convnext_features_are_standardised() -> None:
    net = ConvNeXtV2Features(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)).eval()
    found = convnext_features(net, torch.randn(2, 3, 32, 32))
    assert "convnext_stage_0" not in found
    assert found["convnext_stage_1"].shape == (2, 28 * 28, 16)
    assert found["convnext_stage_3"].mean(2).abs().max() < 1e-4
    assert found["global_mean"].shape == found["global_std"].shape == (2, 1, 32)
    with pytest.raises(ZooError, match="3 channels, not 4"):
        FrozenFeatures(None, FeatureSet(), 4, "published")


# --------------------------------------------------------------------------------------------------------------- tasks


def _loader(count: int = 16) -> DataLoader:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return DataLoader([{"image": images[i], "label": i % 5, "index": i} for i in range(count)], batch_size=8)


def test_banks_fill_and_a_checkpoint_samples_the_same(tmp_path: Path) -> None:
    task, run = _task(), trainer()
    run.fit(task, _loader())
    seen = task.positive_bank.count.sum()
    assert seen == task.unconditional_bank.count.sum() > 0
    run.save_checkpoint(tmp_path / "own.ckpt")
    reloaded = dr.Drifting.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    noise, label = torch.randn(2, *task.noise_shape), torch.tensor([0, 4])
    torch.testing.assert_close(reloaded.sample(noise, label), task.sample(noise, label))
    assert reloaded.positive_bank.samples is None  # wanted by training alone
    assert not torch.equal(task.sample(noise, label), task.sample(noise, label, alpha=3.0))
    kept = torch.load(tmp_path / "own.ckpt", weights_only=True)["banks"]["positive"]
    assert len(kept["samples"]) == seen


def test_the_encoder_of_a_pretraining_run_is_what_images_are_compared_in(tmp_path: Path) -> None:
    pretraining, run = dr.MAEResNetPretraining(**ENCODER, cls_steps=1, optim=FAST), trainer()
    run.fit(pretraining, _loader(), _loader())
    run.save_checkpoint(tmp_path / "encoder.ckpt")
    task = _task(encoder=str(tmp_path / "encoder.ckpt"))
    task.setup("fit")
    x = torch.randn(2, 3, 8, 8)
    found = task.features(x)
    torch.testing.assert_close(found["layer4_mean"][:, 0], pretraining.eval().features(x))
    assert {"global", "norm_x", "conv1_std_4", "layer2_blk2"} <= found.keys()
    drifts = task.drifts(_batch(dtype=torch.float32))
    assert drifts.keys() == found.keys()
    assert "layer4" in {name for name in drifts if math.isfinite(drifts[name].loss.sum())}
    with pytest.raises(ZooError, match="no file"):
        _task(encoder="absent.ckpt").setup("fit")
    (tmp_path / "other.ckpt").write_bytes((tmp_path / "encoder.ckpt").read_bytes())
    with pytest.raises(ZooError, match="not of images of 4 channels"):
        _task(encoder=str(tmp_path / "other.ckpt"), in_chans=4).setup("fit")


def test_the_classifier_joins_at_the_end() -> None:
    weights: list[float] = []

    class Watched(dr.MAEResNetPretraining):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            weights.append(self._weight())
            return super().training_step(batch, batch_idx)

    task = Watched(**ENCODER, cls_steps=3, cls_warmup=2, cls_weight=0.5, optim=FAST)
    trainer(max_epochs=3).fit(task, _loader())
    assert weights == [0.0, 0.0, 0.0, 0.0, 0.25, 0.5]
    with pytest.raises(ZooError, match="mask_ratio"):
        dr.MAEResNetPretraining(**ENCODER, mask_ratio=(0.5, 0.2))


def _step(rank: int | None) -> dict[str, Tensor]:
    """The gradients, and what the bank holds, of a step on all labels or on those of a rank of two."""
    task = _task()
    _stirred(task.network).double()
    batch, share = _batch(4), slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    cut = {k: v.unflatten(0, (4, -1))[share].flatten(0, 1) if len(v) == 16 else v[share] for k, v in batch.items()}
    loss = torch.stack([drift.loss.mean() for drift in task.drifts(cut).values()]).sum()
    loss.backward()
    task.drifts({"image": cut["image"], "label": cut["label"]})
    assert task.positive_bank.samples is not None
    found = {name: p.grad for name, p in task.network.named_parameters() if p.grad is not None}
    return {**found, "bank": task.positive_bank.samples}


def _step_of_two() -> dict[str, Tensor]:
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    return _step(rank)


def test_two_processes_compute_what_one_does() -> None:
    whole, (first, second) = _step(None), in_processes(2, _step_of_two)
    assert torch.equal(first.pop("bank"), whole["bank"])
    assert torch.equal(second.pop("bank"), whole.pop("bank"))
    for name, gradient in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, gradient)


# --------------------------------------------------------------------------------------------------- published weights


def test_foreign_and_missing_keys_are_named(shared: Path) -> None:
    published = json.loads((shared / "statedicts" / "drifting" / "gen_latent_B_sota.json").read_text())["keys"]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in published.items()}
    for key in ("LightningDiT_0/blocks_0/Attention_0/q_norm/weight", "noise_embeds_3/embedding"):
        with pytest.raises(ZooError, match="missing"):
            dr.convert_official({name: value for name, value in state.items() if name != key})
    with pytest.raises(ZooError, match="'LightningDiT_0/blocks_0/Mlp_0/kernel'"):
        dr.convert_official({**state, "LightningDiT_0/blocks_0/Mlp_0/kernel": torch.empty(1)})
    with pytest.raises(ZooError, match="'encoder/stem/kernel'"):
        dr.convert_official({"encoder/stem/kernel": torch.empty(1)})


def test_a_published_file_is_loaded_by_name_and_as_an_encoder(tmp_path: Path) -> None:
    """An encoder's msgpack file, as it is described, for a small network."""
    import re

    from tests.formats.test_flax import _msgpack, _tree
    from zoo import create_model

    net = MAEResNet(**ENCODER)
    arrays = {}
    for key, value in net.state_dict().items():
        path = re.sub(r"stages\.(\d)\.(\d)", r"stages_\1.layers_\2", key).replace(".", "/")
        if path.endswith("/weight"):
            leaf = "scale" if value.ndim == 1 else "kernel"
            path = path.removesuffix("weight") + leaf
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T if value.ndim == 2 else value
        arrays[path] = value.numpy()
    file = tmp_path / "ema_params.msgpack"
    file.write_bytes(_msgpack(_tree(arrays)))
    x = torch.randn(2, 3, 8, 8)
    loaded: Any = create_model("mae_resnet_256", weights=file, **ENCODER)
    assert torch.equal(loaded(x), net(x))
    found = FrozenFeatures(str(file), FeatureSet(every_blocks=0), 3)(x)
    assert torch.equal(found["layer4_mean"][:, 0], net.pooled(x))
