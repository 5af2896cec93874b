"""VARC: networks, losses, both stages of training, official weights."""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from zoo.beyond.varc import (
    VARCTestTimeTraining,
    VARCTraining,
    VARCUNet,
    VARCViT,
    convert_official,
    load_offline,
    pixel_loss,
    train_on_task,
)
from zoo.data import ARCDataModule, ARCTaskDataModule
from zoo.data.arc import BACKGROUND, ARCTask, Pair, View, Views, place, pseudo_tasks, read_tasks
from zoo.errors import ZooError
from zoo.ops.pos_embed import rope_2d
from zoo.training import Optim
from zoo.training.arc import predict_views

TINY: dict[str, Any] = {"img_size": 12, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_dim": 20}
WORLD = {"tasks": 3, "pairs": 8, "max_side": 5}


def tiny(**options: Any) -> VARCViT:
    torch.manual_seed(0)
    return VARCViT(**{"num_tasks": 5, **TINY, **options})


def batch(seed: int = 0, size: int = 12, count: int = 4) -> dict[str, Tensor]:
    module = ARCDataModule(image_size=size, batch_size=count, seed=seed, options=WORLD)
    return next(iter(module.train_dataloader()))


def trainer(**options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return L.Trainer(**{**quiet, "accelerator": "cpu", "devices": 1, "max_epochs": 1, **options})


# ---- networks, offline training -------------------------------------------------------------------------------------


def test_the_tables_are_the_convolution() -> None:
    net = tiny().double()
    canvas = torch.randint(0, 12, (3, 12, 12))
    convolved = net.patch_embed(net.color_embed(canvas).permute(0, 3, 1, 2))
    assert torch.allclose(net._embed(net._patches(canvas)), convolved)


@pytest.mark.parametrize("options", [{}, {"patch_size": 3}, {"num_task_tokens": 2}, {"patch_size": 1}])
def test_the_loss_of_the_kept_patches_is_the_loss(options: dict[str, Any]) -> None:
    """Value and gradients, though most patches are left out of the sequence."""
    net = tiny(**options).double().eval()
    data = batch(size=12)
    data["mask"][0, :4, :4] = True
    whole = pixel_loss(net(data["image"], data["task"], data["mask"]), data["target"])
    grads = torch.autograd.grad(whole, list(net.parameters()))
    part = net.loss(data["image"], data["task"], data["mask"], data["target"])
    assert torch.allclose(part, whole, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(part, list(net.parameters())), grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    lengths = []
    wide = tiny(img_size=32).eval()
    wide.blocks[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    few = batch(size=32, count=2)
    few["mask"][:], few["target"][:] = False, BACKGROUND
    few["mask"][:, :2, :2], few["target"][:, :2, :2] = True, 3
    wide.loss(few["image"], few["task"], few["mask"], few["target"])
    assert lengths == [1 + 16]  # of 256 patches


def test_a_patch_off_the_input_is_no_key() -> None:
    net, data = tiny().eval(), batch()
    changed = data["image"].clone()
    off = ~data["mask"]
    # A patch that holds a pixel of the input is one: only whole patches off it may change.
    off = off.reshape(-1, 6, 2, 6, 2).all(4).all(2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert off.any()
    changed[off] = 5
    a, b = (net(image, data["task"], data["mask"]) for image in (data["image"], changed))
    kept = ~off[:, None].expand_as(a)
    assert torch.allclose(a[kept], b[kept], atol=1e-5)
    assert not torch.allclose(a, b)
    assert not torch.allclose(net(data["image"], data["task"]), a)


def test_tasks_have_their_own_token_and_nothing_else() -> None:
    net, data = tiny().eval(), batch()
    other = (data["task"] + 1) % 5
    assert not torch.allclose(*(net(data["image"], t, data["mask"]) for t in (data["task"], other)))
    net.task_embed.weight.data[:] = net.task_embed.weight[:1]
    assert torch.equal(*(net(data["image"], t, data["mask"]) for t in (data["task"], other)))
    weight = net.task_embed.weight.clone()
    net.reset_tasks(5)
    assert not torch.equal(net.task_embed.weight, weight)
    net.reset_tasks(51)
    assert net.task_embed.weight.shape == (51, 24)
    assert net.task_embed.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_gradients_reach_every_parameter_of_the_unet() -> None:
    pytest.importorskip("diffusers", reason="the U-Net wants diffusers")
    net = VARCUNet(num_tasks=5, img_size=12, embed_dim=20, depth=1, num_heads=1, mid_block=False)
    data = batch(count=8)
    net.loss(data["image"], torch.arange(8) % 5, data["mask"], data["target"]).backward()
    without = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9}
    # With one token of context its weight is 1, whatever the queries and keys are.
    assert all(re.search(r"attn2\.to_[qk]|norm2", name) for name in without), without


def test_wrong_sizes_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZooError, match="canvases of 12 x 12, not"):
        tiny()(torch.zeros(1, 8, 8, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ZooError, match="not divisible"):
        tiny(num_heads=5)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ZooError, match=r"paperzoo\[beyond\]"):
        VARCUNet()
    monkeypatch.undo()
    pytest.importorskip("diffusers", reason="the U-Net wants diffusers")
    with pytest.raises(ZooError, match="multiple of 4"):
        VARCUNet(img_size=10)


def test_offline_training_learns_and_scores() -> None:
    world = {"tasks": 2, "pairs": 24, "max_side": 5, "rules": ["keep"]}
    data = ARCDataModule(image_size=12, batch_size=8, test_views=3, seed=0, options=world)
    optim = Optim(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant")
    L.seed_everything(0, verbose=False)
    task = VARCTraining(num_tasks=data.num_tasks, dropout=0.0, optim=optim, **TINY)
    run = trainer(max_epochs=12, gradient_clip_val=1.0, inference_mode=False)  # metrics are validated, then fitted
    before = run.validate(task, data, verbose=False)[0]
    run.fit(task, data)
    after = run.validate(task, data, verbose=False)[0]
    assert after["val/loss"] < 0.6 * before["val/loss"]
    assert after["val/pixel_accuracy"] > before["val/pixel_accuracy"] + 0.2
    test = run.test(task, data, verbose=False)[0]
    assert {"test/exact_match", "test/pixel_accuracy", "test/pass_at_1", "test/pass_at_2", "test/oracle"} <= set(test)
    assert test["test/oracle"] >= test["test/pass_at_2"] >= test["test/pass_at_1"]
    assert {"task", "input", "prediction", "answer"} == set(run.predict(task, data)[0][0])


# ---- test-time training ---------------------------------------------------------------------------------------------


def one_task() -> ARCTask:
    return read_tasks("arc_like", "evaluation", tasks=1, max_side=5, rules=["recolor"])[0]


def test_training_on_a_task_lowers_its_loss_and_follows_the_schedule() -> None:
    pseudos = pseudo_tasks(one_task(), permutations=0)
    optim = Optim(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0, interval="epoch", warmup_epochs=2)
    net = tiny(num_tasks=6, dropout=0.0)
    start = copy.deepcopy(net.state_dict())
    losses = train_on_task(net, pseudos, Views(12), random.Random(0), 12, 4, optim)
    assert len(losses) == 12
    assert losses[-1] < 0.75 * losses[0]
    again = tiny(num_tasks=6, dropout=0.0)
    assert train_on_task(again, pseudos, Views(12), random.Random(0), 12, 4, optim) == losses
    still = tiny(num_tasks=6, dropout=0.0)
    train_on_task(still, pseudos, Views(12), random.Random(0), 1, 4, optim)  # the first epoch's rate is 0
    assert all(torch.equal(value, start[key]) for key, value in still.state_dict().items())


def test_every_view_is_decoded_into_the_task_s_own_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that knows the answers: each of the 51 x 3 views gives the right grid."""
    task = one_task()._replace(test=(one_task().test[0], one_task().train[0]))
    pseudos = pseudo_tasks(task)
    net = tiny(num_tasks=51)
    answers: dict[tuple[int, bytes], Pair] = {}
    for number, pseudo in enumerate(pseudos):
        answers |= {(number, pair.input.tobytes()): pair for pair in pseudo.task.test}

    def oracle(canvas: Tensor, number: Tensor, mask: Tensor) -> Tensor:
        logits = torch.zeros(len(canvas), 12, 12, 12)
        for n in range(len(canvas)):
            rows, columns = np.nonzero(mask[n].numpy())
            grid = canvas[n].numpy()[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            for scale in range(1, 12):
                small = grid[::scale, ::scale]
                pair = answers.get((int(number[n]), small.astype(np.int64).tobytes()))
                if pair is not None and pair.input.shape == small.shape and len(grid) == scale * len(small):
                    target = place(pair, 12, View(scale, int(columns.min()), int(rows.min())))[2]
                    logits[n] = torch.nn.functional.one_hot(torch.from_numpy(target).long(), 12).permute(2, 0, 1)
        return logits

    monkeypatch.setattr(net, "forward", oracle)
    found = predict_views(net, pseudos, Views(12), random.Random(0), 3, batch_size=20)
    assert [len(grids) for grids in found] == [153, 153]
    for grids, pair in zip(found, task.test, strict=True):
        assert all(np.array_equal(grid, pair.output) for grid in grids)


def protocol(work: Path, **options: Any) -> VARCTestTimeTraining:
    optim = Optim(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, interval="epoch", warmup_epochs=1)
    given = {"permutations": 0, "views": 2, "runs": 2, "work_dir": str(work), "optim": optim, **TINY, **options}
    L.seed_everything(0, verbose=False)
    return VARCTestTimeTraining(**given)


def tasks(count: int = 2) -> ARCTaskDataModule:
    return ARCTaskDataModule(image_size=12, options={"tasks": count, "max_side": 5, "test_pairs": 2})


def test_a_lost_run_is_done_again_to_the_same_grids(tmp_path: Path) -> None:
    mixed: dict[str, Any] = {"max_epochs": 2, "precision": "bf16-mixed"}
    first = trainer(**mixed).test(protocol(tmp_path), tasks(), verbose=False)[0]
    path = tmp_path / "attempt_1" / "evaluation_000_recolor_predictions.json"
    kept = json.loads(path.read_text())
    assert {key: len(grids) for key, grids in kept.items()} == {"0": 12, "1": 12}
    path.unlink()
    assert trainer(**mixed).test(protocol(tmp_path), tasks(), verbose=False)[0] == first
    assert json.loads(path.read_text()) == kept
    with pytest.raises(ZooError, match=r"other settings \(epochs\)"):
        trainer(**{**mixed, "max_epochs": 3}).test(protocol(tmp_path), tasks(), verbose=False)


def test_a_blind_protocol_never_sees_the_answers(tmp_path: Path) -> None:
    module = protocol(tmp_path / "a", runs=1, blind=True, permutations=1)
    trainer(max_epochs=1).test(module, tasks(1), verbose=False)
    data = tasks(1)
    sample = data.samples("test").tasks[0]
    hidden = sample._replace(test=tuple(Pair(pair.input, None) for pair in sample.test))
    monkey = protocol(tmp_path / "b", runs=1, permutations=1)
    data.samples = lambda split: type(tasks().samples("test"))([hidden])  # type: ignore[method-assign]
    found = trainer(max_epochs=1).test(monkey, data, verbose=False)[0]
    assert not found  # nothing to score
    name = f"attempt_0/{sample.name}_predictions.json"
    assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_a_task_starts_from_the_offline_weights_each_time(tmp_path: Path) -> None:
    offline = VARCTraining(num_tasks=3, **TINY)
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(offline, ARCDataModule(image_size=12, batch_size=8, seed=0, options=WORLD))
    run.save_checkpoint(tmp_path / "a.ckpt")
    module = protocol(tmp_path / "w", init_from=str(tmp_path / "a.ckpt"), runs=1)
    test = trainer(max_epochs=1)  # one epoch at rate 0: the weights stay, but for the fresh tokens
    test.test(module, tasks(), verbose=False)
    ours, theirs = module.network.state_dict(), offline.network.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != "task_embed.weight")
    assert ours["task_embed.weight"].shape[0] == 6


# ---- official weights -----------------------------------------------------------------------------------------------


def official(net: VARCViT) -> dict[str, Tensor]:
    """The state of `net` under the official names, as torch.compile saves it."""
    cos, sin = rope_2d(TINY["embed_dim"] // TINY["num_heads"], net.patch_embed.grid)
    found = {}
    for key, value in net.state_dict().items():
        key = {"pos_embed": "positional_embed", "task_embed.weight": "task_token_embed.weight"}.get(key, key)
        key = re.sub(r"^blocks", "encoder.layers", key).replace(".attn.", ".self_attn.")
        found[key.replace(".mlp.fc", ".linear")] = value
    for layer in range(len(net.blocks)):
        place = f"encoder.layers.{layer}.self_attn.rotary"
        found |= {f"{place}.freqs_cos": cos, f"{place}.freqs_sin": sin}
    return {f"_orig_mod.{key}": value for key, value in found.items()}


def test_official_weights_load_key_for_key(tmp_path: Path) -> None:
    net = tiny()
    content = {"model_state": official(net), "config": vars(argparse.Namespace(epochs=100)), "epoch": 7}
    torch.save({**content, "args": argparse.Namespace(depth=2)}, tmp_path / "checkpoint_best.pt")
    other = zoo.create_model("varc_vit_18m", weights=tmp_path / "checkpoint_best.pt", num_tasks=5, **TINY)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in other.state_dict().items())
    fresh = VARCViT(num_tasks=51, **TINY)
    tokens = fresh.task_embed.weight.clone()
    load_offline(fresh, tmp_path / "checkpoint_best.pt")
    assert torch.equal(fresh.pos_embed, net.pos_embed)
    assert torch.equal(fresh.task_embed.weight, tokens)
    with pytest.raises(ZooError, match="does not fit"):
        load_offline(VARCViT(**{**TINY, "depth": 3}), tmp_path / "checkpoint_best.pt")
    state = official(net)
    with pytest.raises(ZooError, match=r"unknown key '_orig_mod\.stranger'"):
        convert_official({**state, "_orig_mod.stranger": torch.zeros(1)})
    rotary = "_orig_mod.encoder.layers.0.self_attn.rotary.freqs_cos"
    with pytest.raises(ZooError, match="another rotary embedding"):
        convert_official({**state, rotary: state[rotary] + 1})
    with pytest.raises(ZooError, match="no square grid"):
        convert_official({**state, rotary: state[rotary][:-1]})
