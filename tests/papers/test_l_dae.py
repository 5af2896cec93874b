"""l-DAE: its spaces and targets, the principal components in checkpoints, the exported encoder, probes, tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo.data import ImageDataModule
from zoo.errors import ZooError
from zoo.nn.patch_tokenizer import PatchTokenizer
from zoo.nn.vit import VisionTransformer
from zoo.ops.patches import patchify
from zoo.ops.pca import Moments
from zoo.selfsup import l_dae
from zoo.selfsup import l_dae_tokenizers as tokenizers
from zoo.training import Optim

FAST = Optim(lr=1e-3, weight_decay=0.0, schedule="constant")
SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "latent_dim": 6}
LATENT = {"input": "latent", "output": "latent"}
STEPS: dict[str, dict[str, Any]] = {  # the walk, by what its tasks differ in
    "pixels": {"tokenizer": False, "target": "noise", "noise": {"kind": "linear"}},
    "classes": {"tokenizer": False, "target": "noise", "noise": {"kind": "original"}, "num_classes": 5},
    "patch_pca": {**LATENT, "target": "noise", "noise": {"kind": "linear"}},
    "predict_clean": {**LATENT, "target": "latent", "noise": {"kind": "linear"}},
    "no_scaling": {**LATENT, "target": "latent"},
    "image_input": {"output": "latent", "target": "latent"},
    "image_output": {"target": "projection"},
    "l_dae": {},
    "whiten": {"latent_norm": "whiten"},
    "single": {"noise": {"kind": "single"}, "t": 0},
}


def _images(count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    smooth = torch.randn(count, 3, 4, 4, generator=draw, dtype=dtype)
    return smooth.repeat_interleave(4, 2).repeat_interleave(4, 3) + 0.3 * torch.randn(
        count, 3, 16, 16, generator=draw, dtype=dtype
    )


def _axes(images: Tensor, patch: int = 4) -> Any:
    moments = Moments(patch * patch * 3)
    moments.update(patchify(images, patch))
    return moments.axes()


def _task(step: str = "l_dae", stirred: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    task = l_dae.LDAEPretraining(**{**SIZES, **STEPS[step], "optim": FAST, **options})
    if stirred:  # without the zeros that adaLN-zero begins with
        for parameter in task.network.parameters():
            nn.init.normal_(parameter, std=0.1)
    if task.network.tokenizer is not None:
        task.network.tokenizer.take_axes(_axes(_images(40)))
    return task


def _batch(task: Any, count: int = 6) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    drawn = {"noise": torch.randn(count, *task.noise_shape, generator=draw), "t": torch.rand(count, generator=draw)}
    return {"image": _images(count), "label": torch.arange(count) % 5, "drop": torch.ones(count), **drawn}


# --------------------------------------------------------------------------------------------- principal components


def test_a_trained_linear_autoencoder_makes_centred_latents() -> None:
    images, moments = _images(40), Moments(48)
    moments.update(patchify(images, 4))
    net = tokenizers.PatchAutoencoder(4, 3, 6)
    tokenizer = PatchTokenizer(4, 3, 6)
    tokenizer.take_linear(net.patch_encoder.weight, net.patch_decoder.weight, moments)
    latents = tokenizer.latents(images)
    assert latents.flatten(0, 1).mean(0).abs().max() < 1e-4
    assert latents.square().mean().item() == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(tokenizer.pictures(latents), net(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ZooError, match="wants"):
        PatchTokenizer(4, 3, 5).take_linear(net.patch_encoder.weight, net.patch_decoder.weight, moments)


# ----------------------------------------------------------------------------------------------------------- the walk


@pytest.mark.parametrize("step", STEPS)
def test_every_step_of_the_walk_learns_draws_and_gives_features(step: str) -> None:
    task = _task(step, stirred=False).train()
    batch, optimizer = _batch(task), torch.optim.Adam(task.network.parameters(), 2e-3)
    losses = []
    for _ in range(30):
        losses.append(task.training_step(batch, 0))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    task.eval()
    assert task.features(batch["image"]).shape == (6, 32)
    views = task.predict_step(batch, 0)
    assert all(view.shape == batch["image"].shape and view.isfinite().all() for view in views.values())
    if task.noise.preserving:
        drawn = task.sample(torch.randn(2, *task.noise_shape), torch.zeros(2).long() if task.num_classes else None)
        assert drawn.shape == (2, 3, 16, 16)
        assert drawn.isfinite().all()
    else:
        with pytest.raises(ZooError, match="schedule"):
            task.sample(torch.randn(2, *task.noise_shape), None)


def test_the_first_loss_of_noise_is_its_dimension_and_targets_agree_where_all_components_count() -> None:
    task = _task("patch_pca", stirred=False).eval()
    batch = {**_batch(task, 64), "image": _images(64)}
    assert task.losses(batch).mean().item() == pytest.approx(6, rel=0.1)
    every = {"latent_dim": 48, "latent_norm": "none"}
    of_latent, original = _task("image_input", **every), _task("l_dae", **every)
    projected = _task("image_output", **every)
    for other in (original, projected):  # an orthonormal change of the output: (x - mean) V^T
        other.network.load_state_dict(of_latent.network.state_dict())
        tokenizer, last = other.network.tokenizer, other.network.final_layer.linear
        last.weight.data, last.bias.data = (
            tokenizer.basis.T @ last.weight,
            tokenizer.basis.T @ last.bias + tokenizer.mean,
        )
    batch = _batch(of_latent)
    wanted = of_latent.eval().losses(batch)
    for other in (original, projected):
        torch.testing.assert_close(other.eval().losses(batch), wanted, rtol=1e-4, atol=1e-4)


def test_options_that_do_not_go_together_are_told() -> None:
    for options, told in (
        ({"target": "noise"}, "model.output latent"),
        ({"output": "latent"}, "model.output image"),
        ({"tokenizer": False}, "wants a tokenizer"),
        ({"tokenizer": False, **LATENT}, "without it"),
        ({"noise": {"kind": "single"}}, "levels t = 0 to 0"),
        ({"noise": {"kind": "linear", "sigma": 1.0}}, "no sigma"),
        ({"latent_dim": 49}, "1 to 48"),
        ({"encoder_depth": 5}, "1 to 4"),
    ):
        with pytest.raises(ZooError, match=told):
            l_dae.LDAEPretraining(**{**SIZES, **options})


# ------------------------------------------------------------------------------------------------ the exported encoder


@pytest.mark.parametrize("clean", ["projected", "image"])
@pytest.mark.parametrize("step", ["l_dae", "whiten", "no_scaling", "patch_pca", "pixels", "classes", "single"])
def test_the_exported_encoder_is_an_ordinary_vit_with_the_same_features(step: str, clean: Any) -> None:
    task = _task(step, clean=clean).double().eval()
    images = _images(dtype=torch.float64)
    state = l_dae.export_encoder(task.network.state_dict(), task.t, clean=clean)
    vit = VisionTransformer(16, 4, 3, 0, 32, 2, 4, class_token=False, gelu="tanh", global_pool="").double()
    vit.norms_tokens = False
    del vit.norm
    vit.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(vit(images).mean(1), task.features(images), rtol=1e-8, atol=1e-8)
        of_timm = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0,
            class_token=False, global_pool="avg", fc_norm=False, final_norm=False, act_layer="gelu_tanh",
        )  # fmt: skip
        of_timm.load_state_dict(state)
        torch.testing.assert_close(of_timm.double().eval()(images), vit(images).mean(1), rtol=1e-8, atol=1e-8)


def _data(**options: Any) -> ImageDataModule:
    given = {"train_samples": 12, "batch_size": 4, "num_workers": 0, "image_size": 16}
    return ImageDataModule("shapes", **{**given, **options})


def _trainer(path: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    limits = {"limit_val_batches": 2, "limit_test_batches": 2, "num_sanity_val_steps": 0}
    return L.Trainer(default_root_dir=path, accelerator="cpu", **{"max_epochs": 1, **quiet, **limits, **options})


def test_components_are_found_once_and_probes_and_fine_tuning_start_from_a_checkpoint(tmp_path: Path) -> None:
    task, data = l_dae.LDAEPretraining(**SIZES, optim=FAST, fit_images=8), _data()
    trainer = _trainer(tmp_path)
    trainer.fit(task, datamodule=data)
    trainer.save_checkpoint(tmp_path / "pre.ckpt")
    basis = task.network.tokenizer.basis.clone()
    assert task.network.tokenizer.fitted()
    again = l_dae.LDAEPretraining(**SIZES, optim=FAST, fit_images=3)
    _trainer(tmp_path).validate(again, datamodule=data, ckpt_path=str(tmp_path / "pre.ckpt"), verbose=False)
    assert again.network.tokenizer.basis.equal(basis)  # not those of 3 pictures
    _trainer(tmp_path).validate(again, datamodule=_data(seed=5), verbose=False)
    assert again.network.tokenizer.basis.equal(basis)

    vit = {k: SIZES[k] for k in ("img_size", "patch_size", "embed_dim", "num_heads")}
    vit |= {"depth": 2, "num_classes": 10, "class_token": False, "gelu": "tanh"}
    images = _images()
    for noisy in (False, True):
        start = {"init_from": str(tmp_path / "pre.ckpt"), "noisy": noisy, "latent_dim": 6}
        probe = l_dae.LDAELinearProbe(**start, **vit, optim=FAST)
        _trainer(tmp_path).fit(probe, datamodule=data)
        torch.testing.assert_close(probe.features(images), task.eval().features(images), rtol=1e-4, atol=1e-5)
        score = _trainer(tmp_path).test(probe, datamodule=data, verbose=False)[0]
        assert 0 <= score["test/top1"] <= 1
    shown = probe.eval()._shown({"image": images, "index": torch.arange(6)})["image"]
    assert shown.shape == images.shape
    assert not shown.equal(images)
    tuned = l_dae.LDAEFineTuning(**{**vit, "img_size": 24}, init_from=str(tmp_path / "pre.ckpt"), optim=FAST)
    _trainer(tmp_path).fit(tuned, datamodule=_data(image_size=24))
    with pytest.raises(ZooError, match="latent_dim 5"):
        l_dae.LDAELinearProbe(**{**start, "latent_dim": 5}, **vit).load_initial(start["init_from"])
    with pytest.raises(ZooError, match="4 blocks"):
        l_dae.LDAEFineTuning(**{**vit, "depth": 9}).load_initial(start["init_from"])


def test_without_a_data_module_the_components_want_a_file(tmp_path: Path) -> None:
    samples = DataLoader([{"image": image} for image in _images()], 2)
    with pytest.raises(ZooError, match=r"model\.axes"):
        _trainer(tmp_path).fit(l_dae.LDAEPretraining(**SIZES, optim=FAST), samples)


def test_conversion_takes_the_networks_own_keys_only() -> None:
    state = _task("classes").network.state_dict() | _task().network.state_dict()
    assert l_dae.convert_official(state).keys() == state.keys()
    with pytest.raises(ZooError, match=r"decoder\.weight"):
        l_dae.convert_official({"decoder.weight": torch.zeros(1)})


# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", ["ae", "vae", "conv", "gan"])
def test_tokenizers_learn_and_both_sides_of_the_adversarial_loss_move(kind: str) -> None:
    torch.manual_seed(0)
    task: Any
    if kind in ("ae", "vae"):
        task = tokenizers.PatchTokenizerTraining(patch_size=4, latent_dim=6, variational=kind == "vae", optim=FAST)
    else:
        small = {"channels": 2, "width": 8, "channel_mult": (1, 2), "depth": 1, "scale": 1.0}
        weights = {"kl_weight": 1e-3, "adversarial_weight": 0.5, "discriminator_width": 4} if kind == "gan" else {}
        task = tokenizers.ConvTokenizerTraining(**small, **weights, optim=FAST)
    images = _images(16) if kind in ("ae", "vae") else _images(8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    batch = {"image": images}
    before = (images - task.network(images)).square().mean()
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    reached: set[str] = set()
    for _ in range(20):
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        reached |= {name for name, p in task.named_parameters() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    assert reached == {name for name, _ in task.named_parameters()}
    assert (images - task.network(images)).square().mean() < 0.9 * before


def test_kl_is_zero_for_the_unit_gaussian_and_closed_form_elsewhere() -> None:
    mean, std = torch.randn(3, 2, 4), torch.rand(3, 2, 4) + 0.5
    normal = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(tokenizers.kl_to_normal(mean, std), normal.flatten(1).sum(1))


def test_a_trained_tokenizer_becomes_the_latent_space_of_a_run(tmp_path: Path) -> None:
    tokenizer = tokenizers.PatchTokenizerTraining(patch_size=4, latent_dim=6, variational=True, optim=FAST)
    trainer = _trainer(tmp_path)
    trainer.fit(tokenizer, datamodule=_data())
    trainer.save_checkpoint(tmp_path / "vae.ckpt")
    task = l_dae.LDAEPretraining(**{**SIZES, **STEPS["patch_pca"]}, axes=str(tmp_path / "vae.ckpt"), optim=FAST)
    _trainer(tmp_path).fit(task, datamodule=_data())
    assert task.network.tokenizer.encoder.equal(tokenizer.network.patch_encoder.weight[:6])
