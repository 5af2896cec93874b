"""MAE: the equations, the network, the tasks, the published layouts."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from zoo.errors import ZooError
from zoo.selfsup import mae
from zoo.training import Optim

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2}


def _autoencoder(**options) -> mae.MaskedAutoencoder:
    torch.manual_seed(0)
    return mae.MaskedAutoencoder(**{**SIZES, **DECODER, **options})


def _images(count: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 16, 16, generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------------------- equations


def test_normalized_patches_have_mean_zero_and_unbiased_variance_one() -> None:
    x = mae.normalize_patches(torch.randn(2, 5, 48, dtype=torch.float64) * 7 + 3)
    torch.testing.assert_close(x.mean(-1), torch.zeros(2, 5, dtype=torch.float64))
    torch.testing.assert_close(x.var(-1), torch.ones(2, 5, dtype=torch.float64), rtol=1e-5, atol=0)
    assert mae.normalize_patches(torch.ones(1, 1, 48)).abs().max() == 0


def test_the_loss_counts_hidden_patches_only() -> None:
    target = torch.randn(2, 4, 6)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    pred = target + torch.where(mask.bool(), 2.0, 100.0)[..., None]
    assert mae.reconstruction_loss(pred, target, mask).item() == pytest.approx(4.0)


# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(("ratio", "depth"), [(0.75, 2), (0.5, 1), (0.9, 0)])
def test_the_training_loss_equals_the_loss_of_all_predictions(norm_pix_loss: bool, ratio: float, depth: int) -> None:
    network = _autoencoder(norm_pix_loss=norm_pix_loss, decoder_depth=depth).double()
    images, noise = _images().double(), torch.rand(4, 16).double()
    slow, _, mask = network(images, ratio, noise)
    fast = network.loss(images, ratio, noise)
    torch.testing.assert_close(fast, slow)
    assert mask.sum(1).tolist() == [16 - int(16 * (1 - ratio))] * 4
    trained = [p for p in network.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(fast, trained), torch.autograd.grad(slow, trained), strict=True):
        torch.testing.assert_close(a, b)


def test_the_encoder_sees_only_visible_tokens() -> None:
    network, seen = _autoencoder(), []
    for block in (*network.blocks, *network.decoder_blocks):
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    network.loss(_images(), 0.75)
    assert seen == [5, 5, 5, 17, 17]


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    network, images, noise = _autoencoder(), _images(), torch.rand(4, 16)
    _, pred, mask = network(images, 0.75, noise)
    hidden = mae.unpatchify(mask[..., None].expand(-1, -1, 48), 4)
    _, other, _ = network(images + 5 * hidden, 0.75, noise)
    torch.testing.assert_close(other, pred)
    _, other, _ = network(images + 5 * (1 - hidden), 0.75, noise)
    assert (other - pred).abs().max() > 1e-3


def test_whole_images_are_encoded_in_the_order_of_the_grid() -> None:
    network, images = _autoencoder().eval(), _images()
    latent, _, ids_restore = network.forward_encoder(images, 0.0, torch.rand(4, 16))
    tokens = network.forward_features(images)
    torch.testing.assert_close(tokens[:, :1], latent[:, :1], rtol=1e-4, atol=1e-5)
    unshuffled = latent[:, 1:].gather(1, ids_restore[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(tokens[:, 1:], unshuffled, rtol=1e-4, atol=1e-5)


def test_checkpointing_compiling_and_memory_order_change_no_number() -> None:
    network, images, noise = _autoencoder().double(), _images().double(), torch.rand(4, 16).double()
    plain = torch.autograd.grad(network.loss(images, 0.75, noise), network.mask_token)[0]
    network.set_grad_checkpointing()
    saved = torch.autograd.grad(network.loss(images, 0.75, noise), network.mask_token)[0]
    torch.testing.assert_close(saved, plain)
    network.set_grad_checkpointing(False)
    graph = torch.compile(network.loss, backend="aot_eager", fullgraph=True)  # no graph breaks
    loss = network.loss(images, 0.75, noise)
    torch.testing.assert_close(graph(images, 0.75, noise), loss)
    torch.testing.assert_close(network.loss(images.to(memory_format=torch.channels_last), 0.75, noise), loss)


def test_the_loss_at_the_start_is_the_variance_of_the_target() -> None:
    """A decoder that knows nothing: standardised targets (variance 1) cost 1 plus the variance of its guesses."""
    torch.manual_seed(0)
    network = mae.MaskedAutoencoder(img_size=64, patch_size=8, embed_dim=96, depth=2, num_heads=3, decoder_depth=1)
    images = torch.randn(8, 3, 64, 64)
    loss, pred, _ = network(images)
    expected = (191 / 192) + pred.square().mean()  # the variance is unbiased, the error is averaged over 192 numbers
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    with torch.no_grad():
        network.decoder_pred.weight.zero_()
    assert network.loss(images).item() == pytest.approx(191 / 192, rel=1e-4)


def test_initial_weights_are_the_papers() -> None:
    network = mae.MaskedAutoencoder(img_size=32, patch_size=16, embed_dim=192, depth=1, num_heads=3)
    patches = network.patch_embed.proj.weight
    bound = (6 / (192 + 768)) ** 0.5
    assert bound * 0.99 < patches.abs().max() <= bound
    assert network.blocks[0].attn.qkv.bias.abs().max() == 0
    assert network.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert network.pos_embed[:, 0].abs().max() == 0


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels: int) -> None:
    network = _autoencoder(in_chans=channels)
    loss, pred, _ = network(_images(channels=channels))
    assert pred.shape == (4, 16, 16 * channels)
    assert loss.isfinite()


def test_wrong_shapes_and_ratios_are_named() -> None:
    network = _autoencoder()
    with pytest.raises(ZooError, match=r"\(3, 16, 16\).*not \(3, 8, 16\)"):
        network(torch.randn(1, 3, 8, 16))
    with pytest.raises(ZooError, match="leaves none"):
        network.loss(_images(), 0.99)
    with pytest.raises(ZooError, match="hides none"):
        network.loss(_images(), 0.0)
    with pytest.raises(ZooError, match="noise"):
        network.loss(_images(), 0.75, torch.rand(4, 15))


def test_a_reconstruction_keeps_what_is_visible_and_undoes_the_standardisation() -> None:
    network, images, noise = _autoencoder(norm_pix_loss=True), _images() * 3 + 2, torch.rand(4, 16)
    seen, predicted, pasted = network.reconstruct(images, 0.75, noise)
    visible = seen != 0
    assert 0.2 < visible.float().mean() < 0.3
    assert torch.equal(pasted[visible], images[visible])
    patches = mae.patchify(predicted, 4)
    _, pred, _ = network(images, 0.75, noise)
    own = mae.patchify(images, 4)
    torch.testing.assert_close(
        patches, pred * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True), rtol=1e-4, atol=1e-4
    )
    sheet = network.picture(images, 0.75, noise, mean=[0.5] * 3, std=[0.1] * 3)
    assert sheet.shape[2] == 4 * 128 + 3 * 4
    columns = [sheet[:, -(4 * 128 + 3 * 4) :: 8, x : x + 128 : 8][:, :16] for x in range(0, 4 * 132, 132)]
    views = [(view[0] * 0.1 + 0.5).clamp(0, 1).mul(255).round() for view in (images, seen, predicted, pasted)]
    views[1] = torch.where(visible[0], views[1], 128.0)  # hidden patches are gray
    for column, view in zip(columns, views, strict=True):
        assert torch.equal(column, view.to(torch.uint8))


# --------------------------------------------------------------------------------------------------------------- tasks


def _loader(count: int = 8) -> DataLoader:
    images = _images(count)
    samples = [{"image": images[i], "label": i % 3, "index": i} for i in range(count)]
    return DataLoader(samples, batch_size=4)


def _trainer(tmp_path: Path) -> L.Trainer:
    quiet = {f"enable_{what}": False for what in ("progress_bar", "model_summary", "checkpointing")}
    return L.Trainer(max_epochs=1, default_root_dir=tmp_path, accelerator="cpu", logger=False, **quiet)


FAST = {"base_lr": 0.1, "warmup_epochs": 0.0}


def test_from_pretraining_to_fine_tuning_and_probing(tmp_path: Path) -> None:
    pretraining = mae.MAEPretraining(**SIZES, **DECODER, optim=Optim(**FAST))
    trainer = _trainer(tmp_path)
    trainer.fit(pretraining, _loader(), _loader())
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "pre.ckpt")
    encoder = pretraining.network

    tuning = mae.MAEFineTuning(
        **SIZES, num_classes=3, init_from=str(tmp_path / "pre.ckpt"), optim=Optim(**FAST, layer_decay=0.5)
    )
    tuning.setup("fit")
    for name, value in tuning.network.state_dict().items():
        if name.startswith(("blocks.", "patch_embed.", "cls_token", "pos_embed")):
            assert torch.equal(value, encoder.state_dict()[name]), name
    assert tuning.network.head.weight.abs().max() < 1e-4
    assert tuning.network.pos_embed.requires_grad
    loss = cross_entropy(tuning.eval()(_images()), torch.tensor([0, 1, 2, 0]))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(3.0)).item(), rel=1e-3)
    trainer = _trainer(tmp_path)
    trainer.fit(tuning.train(), _loader(), _loader())
    assert {"val/top1", "val/top5", "val/loss"} <= trainer.callback_metrics.keys()
    assert trainer.callback_metrics["val/top5"] == 1
    (test,) = trainer.test(tuning, _loader(), verbose=False)
    assert test.keys() == {"test/top1", "test/top5", "test/loss"}

    probe = mae.MAELinearProbe(
        **SIZES, num_classes=3, init_from=str(tmp_path / "pre.ckpt"), optim=Optim(name="lars", **FAST)
    )
    probe.setup("fit")
    before = {name: value.clone() for name, value in probe.network.state_dict().items()}
    trained = {"head.1.weight", "head.1.bias"}
    assert {n for n, p in probe.network.named_parameters() if p.requires_grad} == trained
    _trainer(tmp_path).fit(probe, _loader())
    changed = {n for n, value in probe.network.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == trained | {f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    probabilities = torch.cat(_trainer(tmp_path).predict(probe, _loader()))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(8))

    reloaded = mae.MAEPretraining.load_from_checkpoint(tmp_path / "pre.ckpt", weights_only=True)
    torch.testing.assert_close(reloaded.features(_images()), pretraining.features(_images()))


def test_fine_tuning_at_another_size_resizes_the_positions(tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    torch.save({"model": _autoencoder().state_dict()}, path)
    options = {**SIZES, "img_size": 24, "num_classes": 3, "mixup": 0.0, "cutmix": 0.0}
    tuning = mae.MAEFineTuning(**options, init_from=str(path))
    tuning.setup("fit")
    assert tuning.network.pos_embed.shape == (1, 37, 16)
    assert tuning(torch.randn(2, 3, 24, 24)).shape == (2, 3)
    with pytest.raises(ZooError, match="does not fit the model"):
        mae.MAEFineTuning(**{**options, "embed_dim": 32}, init_from=str(path)).setup("fit")
    with pytest.raises(ZooError, match="no file"):
        mae.MAEFineTuning(**options, init_from=str(tmp_path / "absent.ckpt")).setup("fit")


def test_features_and_pictures_of_the_pretraining_task() -> None:
    batch = {"image": _images()}
    token = mae.MAEPretraining(**SIZES, **DECODER)
    assert token.features(batch["image"]).shape == (4, 16)
    mean = mae.MAEPretraining(**SIZES, **DECODER, feature="avg")
    mean.load_state_dict(token.state_dict())
    tokens = token.network.forward_features(batch["image"])
    torch.testing.assert_close(mean.features(batch["image"]), tokens[:, 1:].mean(1))
    assert token.picture(batch).shape[0] == 3


def test_wrong_arguments_of_tasks_are_named() -> None:
    with pytest.raises(TypeError, match="embed_dimm"):
        mae.MAEPretraining(**SIZES, embed_dimm=16)
    with pytest.raises(ZooError, match="mask_ratio"):
        mae.MAEPretraining(**SIZES, mask_ratio=0.97)


# ------------------------------------------------------------------------------------------------- published layouts


@pytest.mark.parametrize("size", ["base_patch16", "large_patch16", "huge_patch14"])
def test_hugging_faces_layout_converts_key_for_key(shared: Path, size: str) -> None:
    path = shared / "statedicts" / "mae" / f"hf_vit-mae-{size.partition('_')[0]}.json"
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in json.loads(path.read_text())["keys"].items()}
        network = getattr(mae, f"mae_vit_{size}")()
    converted = mae.convert_official(state)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_split_attention_of_hugging_face_is_joined_in_order() -> None:
    network = _autoencoder()
    state = network.state_dict()
    for old in (False, True):
        foreign = {"vit.embeddings.cls_token": state["cls_token"]}
        for leaf in ("weight", "bias"):
            for part, value in zip("qkv", state[f"blocks.1.attn.qkv.{leaf}"].chunk(3), strict=True):
                word = {"q": "query", "k": "key", "v": "value"}[part]
                key = f"encoder.layer.1.attention.attention.{word}" if old else f"layers.1.attention.{part}_proj"
                foreign[f"vit.{key}.{leaf}"] = value
        converted = mae.convert_official(foreign)
        assert converted.keys() == {"cls_token", "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.bias"}
        for key, value in converted.items():
            assert torch.equal(value, state[key])


def test_foreign_keys_are_refused() -> None:
    state = _autoencoder().state_dict()
    assert mae.convert_official(state).keys() == state.keys()
    with pytest.raises(ZooError, match=r"layer1\.0\.conv1\.weight"):
        mae.convert_official({**state, "layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(ZooError, match="q, k and v"):
        mae.convert_official({"vit.layers.0.attention.q_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(ZooError, match="unknown key"):
        mae.convert_official({"vit.pooler.weight": torch.zeros(1)})
