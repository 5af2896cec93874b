"""FLIP: encoders, masks, loss, tasks, zero-shot classification, published layouts, t5x checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor

from tests.formats.test_t5x import write_t5x
from zoo import create_preprocess
from zoo.catalog import recipe_path
from zoo.data import ImageTextDataModule
from zoo.data.transforms import IMAGENET_MEAN, IMAGENET_STD, EvalResizeCrop, MAEPretrain, resize
from zoo.errors import ZooError
from zoo.metrics import class_features
from zoo.multimodal import flip
from zoo.ops.contrastive import clip_loss
from zoo.training import Optim, param_groups
from zoo.weights.pretrained import create_model

SIZES: dict[str, Any] = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "vocab_size": 125},
    **{"context_length": 6, "text_embed_dim": 12, "text_depth": 2, "text_num_heads": 2, "proj_dim": 8},
}


def _network(**options: Any) -> flip.FLIP:
    torch.manual_seed(0)
    return flip.FLIP(**{**SIZES, **options})


def _pairs(count: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=draw), torch.randint(0, 125, (count, 6), generator=draw)


# --------------------------------------------------------------------------------------------------------- the network


def test_a_masked_encoder_sees_the_patches_of_smallest_noise_only() -> None:
    network, (images, _) = _network(), _pairs()
    noise = torch.rand(4, 16)
    tokens = network.visual(images, 0.75, noise)
    assert tokens.shape == (4, 1 + 4, 16)
    hidden = noise.argsort(dim=1)[:, 4:]
    changed = images.clone()
    for row, places in zip(changed, hidden, strict=True):
        for place in places.tolist():
            row[:, place // 4 * 8 : place // 4 * 8 + 8, place % 4 * 8 : place % 4 * 8 + 8] = 9.0
    torch.testing.assert_close(network.visual(changed, 0.75, noise), tokens)
    assert not torch.allclose(network.visual(changed), network.visual(images))


def test_the_order_of_the_kept_patches_says_nothing() -> None:
    network, (images, _) = _network(), _pairs()
    kept = (torch.rand(4, 16).argsort(dim=1).argsort(dim=1) < 8).float()
    one, other = (network.encode_image(images, 0.5, torch.rand(4, 16) - kept) for _ in range(2))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_first_token_alone_is_that_of_all() -> None:
    network, (_, text) = _network(), _pairs()
    torch.testing.assert_close(network.text.first(text), network.text(text)[:, 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ZooError, match=r"\(B, 6\) word pieces"):
        network.encode_text(text[:, :5])


def test_filling_is_attended_to() -> None:
    network, (_, text) = _network(), _pairs()
    other = text.clone()
    other[:, 3:] = 0
    assert not torch.allclose(network.encode_text(text), network.encode_text(other))


def test_it_starts_as_the_paper_says() -> None:
    network, (images, text) = _network(proj_dim=64), _pairs(16)
    assert network.scale.item() == pytest.approx(1 / 0.07)
    # q, k and v as one matrix: its bound is sqrt(6 / 4D).
    weight = network.visual.blocks[0].attn.qkv.weight
    assert 0.9 * math.sqrt(6 / 64) < weight.abs().max() <= math.sqrt(6 / 64)
    image, words = network(images, text)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(16))
    unrelated = clip_loss(torch.nn.functional.normalize(torch.randn(256, 4096)), _directions(256, 4096), 1.0)
    assert unrelated.item() == pytest.approx(math.log(256), abs=0.05)
    torch.testing.assert_close(words.norm(dim=1), torch.ones(16))


def _directions(count: int, dim: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(3)))


def test_the_scale_is_clipped_without_gradient() -> None:
    network = _network()
    for value, scale in ((-1.0, 1.0), (9.0, 100.0)):
        torch.nn.init.constant_(network.logit_scale, value)
        network.zero_grad()
        network.scale.backward()
        assert network.scale.item() == pytest.approx(scale)
        assert network.logit_scale.grad is not None
        assert network.logit_scale.grad.item() == 0
    fixed = _network(temperature=0.01)
    assert fixed.scale.item() == pytest.approx(100)
    assert "logit_scale" not in fixed.state_dict()


def test_gradients_reach_the_other_pools_too() -> None:
    network, (images, text) = _network(image_pool="token", text_pool="avg", proj_bias=True), _pairs()
    network.loss(images, text, 0.5).backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_what_is_decayed() -> None:
    network = _network(proj_bias=True)
    plain, decayed = param_groups(network, Optim(weight_decay=0.2))
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.2)
    assert {"logit_scale", "visual.cls_token", "text.token_embed.weight"} <= set(decayed["names"])
    assert {"text.pos_embed", "visual.norm.weight", "text_proj.bias"} <= set(plain["names"])
    assert "visual.pos_embed" not in {*plain["names"], *decayed["names"]}
    assert all(name.endswith(("bias", "pos_embed")) or "norm" in name for name in plain["names"])


def test_wrong_arguments_are_named() -> None:
    network, (images, text) = _network(), _pairs()
    for call, message in (
        (lambda: network(images, text, 0.5, torch.rand(4, 15)), r"mask noise must be \(4, 16\)"),
        (lambda: network(images, text, 1.0), "mask_ratio"),
        (lambda: network(images[..., :16], text), "images of shape"),
        (lambda: flip.FLIP(**SIZES, image_pool="max"), "image_pool"),
        (lambda: clip_loss(images[:, 0, 0], images[:3, 0, 0], 1.0), "one shape"),
        (lambda: flip.FLIPPretraining(**SIZES, mask_ratio=0.97), "at least one"),
        (lambda: flip.FLIPPretraining(**SIZES, micro_batch=0), "micro_batch"),
    ):
        with pytest.raises(ZooError, match=message):
            call()


# ------------------------------------------------------------------------------------------------------------ the task


def _data(**options: Any) -> ImageTextDataModule:
    settings = {"batch_size": 8, "image_size": 32, "train_samples": 32, "tokenizer": "shapes", "context_length": 6}
    return ImageTextDataModule("shapes", **{**settings, **options})


def _trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "use_distributed_sampler": False, "enable_model_summary": False}
    return L.Trainer(**{**settings, **quiet, **options})


def _task(**options: Any) -> flip.FLIPPretraining:
    L.seed_everything(0, verbose=False)
    return flip.FLIPPretraining(**SIZES, **{"optim": Optim(lr=1e-3), **options})


def test_zero_shot_is_the_mean_of_prompts() -> None:
    network = _network().eval()
    table = torch.randint(0, 125, (3, 5, 6), generator=torch.Generator().manual_seed(0))
    classes = class_features(network.encode_text, table, chunk=4)
    for k in range(3):
        mean = network.encode_text(table[k]).mean(dim=0)
        torch.testing.assert_close(classes[k], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_encoding_in_pieces_is_encoding_at_once() -> None:
    images, text = _pairs(5)
    batch = {"image": images.double(), "text": text, "mask_noise": torch.rand(5, 16)}
    gradients = []
    for micro_batch, ratio in ((None, 0.5), (2, 0.5), (None, 0.0), (2, 0.0)):
        module = _task(micro_batch=micro_batch, mask_ratio=ratio).double()
        clip_loss(*module.encode(batch), module.network.scale).backward()
        gradients.append({name: p.grad for name, p in module.network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[3], gradients[2])


def test_accumulated_batches_are_refused() -> None:
    with pytest.raises(ZooError, match=r"data\.batch_size to 16 / 1 process"):
        _trainer().fit(_task(optim=Optim(lr=1e-3, global_batch=16)), _data())


def test_a_vocabulary_larger_than_the_models_is_refused() -> None:
    L.seed_everything(0, verbose=False)
    module = flip.FLIPPretraining(**{**SIZES, "vocab_size": 100}, optim=Optim(lr=1e-3))
    with pytest.raises(ZooError, match=r"model\.vocab_size to 125"):
        _trainer().validate(module, _data(), verbose=False)


def test_unmasked_tuning_starts_from_a_checkpoint(tmp_path: Path) -> None:
    run, module = _trainer(limit_val_batches=0), _task()
    run.fit(module, _data())
    run.save_checkpoint(tmp_path / "pre.ckpt")
    tuned = _task(mask_ratio=0.0, init_from=str(tmp_path / "pre.ckpt"))
    tuned.setup("fit")
    for key, value in module.network.state_dict().items():
        assert torch.equal(tuned.network.state_dict()[key], value), key
    # Another resolution makes the fixed table anew.
    larger = flip.FLIPPretraining(**{**SIZES, "img_size": 40}, init_from=str(tmp_path / "pre.ckpt"))
    table = larger.network.visual.pos_embed.clone()
    larger.setup("fit")
    assert torch.equal(larger.network.visual.pos_embed, table)
    assert torch.equal(larger.network.visual.cls_token, module.network.visual.cls_token)
    narrow = flip.FLIPPretraining(**{**SIZES, "proj_dim": 4}, init_from=str(tmp_path / "pre.ckpt"))
    with pytest.raises(ZooError, match="visual_proj"):
        narrow.setup("fit")


# --------------------------------------------------------------------------------------- published layouts, t5x files

CASE = json.loads((Path(__file__).parents[1] / "parity" / "cases" / "flip" / "forward_loss_mask50.json").read_text())
OF_CASE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "vocab_size": 50}
OF_CASE |= {"context_length": 12, "text_embed_dim": 24, "text_depth": 2, "text_num_heads": 3, "proj_dim": 16}


def _official() -> dict[str, Tensor]:
    """A state of the official layout, by "/"-joined paths; that its values land right is what parity tests."""
    draw = torch.Generator().manual_seed(2)
    return {key.replace(".", "/"): torch.randn(facts["shape"], generator=draw) for key, facts in CASE["state"].items()}


def test_paths_may_be_joined_either_way_and_our_own_pass() -> None:
    converted = flip.convert_official(_official())
    dotted = flip.convert_official({key.replace("/", "."): value for key, value in _official().items()})
    assert {key: value.shape for key, value in flip.FLIP(**OF_CASE).state_dict().items()} == {
        key: value.shape for key, value in converted.items()
    }
    assert dotted.keys() == converted.keys()
    assert flip.convert_official(converted) == converted


def test_foreign_keys_are_refused() -> None:
    official = _official()
    with pytest.raises(ZooError, match=r"img_encoder\.head\.kernel"):
        flip.convert_official({**official, "img_encoder/head/kernel": torch.zeros(2, 2)})
    with pytest.raises(ZooError, match=r"unknown keys, such as 'stray\.weight'"):
        flip.convert_official({**_network().state_dict(), "stray.weight": torch.zeros(1)})
    missing = {key: value for key, value in official.items() if "encoderblock_01" not in key or "/key/bias" not in key}
    with pytest.raises(ZooError, match="query, key and value"):
        flip.convert_official(missing)


def test_published_files_load(tmp_path: Path) -> None:
    state = flip.convert_official(_official())
    folder = write_t5x(tmp_path / "run" / "checkpoint_7", _official())
    other = create_model("flip_base_patch16", weights=folder, **OF_CASE)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    tuned = flip.FLIPPretraining(**OF_CASE, mask_ratio=0.0, init_from=str(tmp_path / "run"))
    tuned.setup("fit")
    assert torch.equal(tuned.network.logit_scale, state["logit_scale"])


def test_pictures_are_seen_as_in_the_published_evaluation() -> None:
    photo = torch.randint(0, 256, (3, 300, 401), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    square = resize(photo[:, :, 51:351], (224, 224), kernel="tensorflow_v1")
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    torch.testing.assert_close(create_preprocess("flip_large_patch16.laion2b")(photo), (square / 255 - mean) / std)
    for name in ("pretrain_laion400m", "tune_laion400m"):
        content = yaml.safe_load(recipe_path(f"flip/{name}").read_text())["data"]["init_args"]
        assert torch.equal(EvalResizeCrop(**content["eval_transform"]["init_args"])(photo), square)
        train = MAEPretrain(**{**content["train_transform"]["init_args"], "scale": (1.0, 1.0)})(photo[..., :300])
        whole = resize(photo[..., :300], (224, 224), kernel="tensorflow")
        assert train.equal(whole) or train.equal(whole.flip(-1))


def test_photos_are_labelled_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file
    from torchvision.io import write_png

    from zoo.command.cli import main
    from zoo.data import text
    from zoo.weights.download import Published

    monkeypatch.chdir(tmp_path)
    # The published sizes are too big for a test: the card's function gives a small network of the same kind.
    small = {**SIZES, "img_size": 224, "patch_size": 56}
    monkeypatch.setattr(flip, "flip_large_patch16", lambda **overrides: flip.FLIP(**{**small, **overrides}))
    monkeypatch.setitem(text.PUBLISHED, "bert", ((str(text.vocabulary_path("shapes")),), Published()))
    save_file(flip.FLIP(**small).state_dict(), "small.safetensors")
    write_png(torch.randint(0, 255, (3, 30, 50), dtype=torch.uint8), "photo.png")
    words = ["predict", "flip_large_patch16.laion2b", "photo.png", "--weights", "small.safetensors"]
    assert main([*words, "--labels", "red ring, blue star,cat", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert {entry["label"] for entry in row["top"]} == {"red ring", "blue star", "cat"}
    assert sum(entry["probability"] for entry in row["top"]) == pytest.approx(1, abs=1e-5)
    assert main(words) == 0
    assert capsys.readouterr().out.count("%") == 5  # of ImageNet's thousand
    assert main([*words, "--labels", " ,"]) == 2
    assert "names nothing" in capsys.readouterr().err
