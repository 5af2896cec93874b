"""FLIP: encoders, masks, loss, tasks, zero-shot classification, published layouts, t5x checkpoints."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo import catalog
from zoo.data import ImageTextDataModule
from zoo.errors import ZooError
from zoo.formats import t5x
from zoo.metrics import class_features
from zoo.multimodal import flip
from zoo.ops.contrastive import clip_loss
from zoo.training import Optim, param_groups
from zoo.weights.pretrained import create_model, read_state_dict

IMAGE = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
TEXT = {"vocab_size": 125, "context_length": 6, "text_embed_dim": 12, "text_depth": 2, "text_num_heads": 2}
SIZES: dict[str, Any] = {**IMAGE, **TEXT, "proj_dim": 8}


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


def test_without_masks_it_is_the_vit_of_whole_images() -> None:
    network, (images, _) = _network(), _pairs()
    visual = network.visual
    x = visual.patch_embed(images) + visual.pos_embed[:, 1:]  # the convolution
    x = torch.cat([visual.cls_token.expand(4, -1, -1), x], dim=1)
    for block in visual.blocks:
        x = block(x)
    torch.testing.assert_close(visual(images), visual.norm(x), rtol=1e-5, atol=1e-5)


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


def test_the_loss_is_the_mean_of_both_directions() -> None:
    network, (images, text) = _network(), _pairs()
    noise = torch.rand(4, 16)
    image, words = network(images, text, 0.5, noise)
    logits, target = network.scale * image @ words.T, torch.arange(4)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(network.loss(images, text, 0.5, noise), expected)
    with pytest.raises(ZooError, match="one shape"):
        clip_loss(image, words[:3], 1.0)


@pytest.mark.parametrize(
    "options", [{}, {"image_pool": "token", "text_pool": "avg", "proj_bias": True}], ids=["published", "other"]
)
def test_gradients_reach_every_parameter_that_trains(options: dict[str, Any]) -> None:
    network, (images, text) = _network(**options), _pairs()
    network.loss(images, text, 0.5).backward()
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (name != "visual.pos_embed")
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
    few = {"limit_val_batches": 2, "limit_test_batches": 2, "limit_predict_batches": 1}
    settings = {"accelerator": "cpu", "max_epochs": 1, "use_distributed_sampler": False, "enable_model_summary": False}
    return L.Trainer(**{**settings, **quiet, **few, **options})


def _task(**options: Any) -> flip.FLIPPretraining:
    L.seed_everything(0, verbose=False)
    return flip.FLIPPretraining(**SIZES, **{"optim": Optim(lr=1e-3), **options})


def test_it_trains_classifies_and_retrieves() -> None:
    module, data = _task(), _data()
    run = _trainer()
    run.fit(module, data)
    found = {key: float(value) for key, value in run.callback_metrics.items()}
    assert {"val/top1", "val/top5", "val/image_to_text_r1", "val/text_to_image_r10", "train/scale"} <= found.keys()
    assert found["val/top1"] <= found["val/top5"] <= 1
    assert found["val/text_to_image_r1"] <= found["val/text_to_image_r10"] <= 1
    run.test(module, data, verbose=False)
    assert "test/top1" in run.callback_metrics
    (first, *_) = run.predict(module, data)
    assert first["features"].shape == (8, 8)
    torch.testing.assert_close(first["probabilities"].sum(dim=1), torch.ones(8))
    assert module.features(torch.randn(2, 3, 32, 32)).shape == (2, 16)


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


def _official(network: flip.FLIP) -> dict[str, Tensor]:
    """The state of a network in the official layout, by "/"-joined paths."""
    state: dict[str, Tensor] = {}
    names = {"fc1": "MlpBlock_0/Dense_0", "fc2": "MlpBlock_0/Dense_1", "norm1": "LayerNorm_0", "norm2": "LayerNorm_1"}
    for key, value in network.state_dict().items():
        *parts, leaf = key.split(".")
        tower = {"visual": "img_encoder", "text": "txt_encoder"}.get(parts[0] if parts else "", "")
        if key == "logit_scale":
            state[key] = value
        elif parts[0].endswith("_proj"):
            state[f"{'img' if parts[0] == 'visual_proj' else 'txt'}_mlp1/kernel"] = value.T
        elif parts[1:] == ["patch_embed", "proj"]:
            state[f"{tower}/embedding/{'bias' if leaf == 'bias' else 'kernel'}"] = (
                value if leaf == "bias" else value.permute(2, 3, 1, 0)
            )
        elif parts[1:] == ["token_embed"]:
            state[f"{tower}/token_embedding/embedding"] = value
        elif leaf == "pos_embed":
            state[f"{tower}/posembed_encoder/pos_embedding"] = value
        elif leaf == "cls_token":
            state[f"{tower}/cls"] = value
        elif parts[1:] == ["norm"]:
            state[f"{tower}/Transformer/encoder_norm/{'scale' if leaf == 'weight' else 'bias'}"] = value
        else:
            base = f"{tower}/Transformer/encoderblock_{int(parts[2]):02d}"
            attention = f"{base}/MultiHeadDotProductAttention_0"
            linear = "kernel" if leaf == "weight" else "bias"
            if parts[-1] == "qkv":
                for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    state[f"{attention}/{name}/{linear}"] = part.T if part.ndim == 2 else part
            elif parts[-1] == "proj":
                state[f"{attention}/out/{linear}"] = value.T if value.ndim == 2 else value
            elif parts[-1] in ("fc1", "fc2"):
                state[f"{base}/{names[parts[-1]]}/{linear}"] = value.T if value.ndim == 2 else value
            else:
                state[f"{base}/{names[parts[-1]]}/{'scale' if leaf == 'weight' else 'bias'}"] = value
    return state


def test_the_official_layout_comes_back() -> None:
    network = _network()
    state = network.state_dict()
    for join in ("/", "."):
        converted = flip.convert_official({k.replace("/", join): v for k, v in _official(network).items()})
        assert converted.keys() == state.keys()
        assert all(torch.equal(converted[key], state[key]) for key in state)
    assert flip.convert_official(state) == state


def test_foreign_keys_are_refused() -> None:
    network = _network()
    official = _official(network)
    with pytest.raises(ZooError, match=r"img_encoder\.head\.kernel"):
        flip.convert_official({**official, "img_encoder/head/kernel": torch.zeros(2, 2)})
    with pytest.raises(ZooError, match=r"unknown keys, such as 'stray\.weight'"):
        flip.convert_official({**network.state_dict(), "stray.weight": torch.zeros(1)})
    missing = {key: value for key, value in official.items() if "encoderblock_01" not in key or "/key/bias" not in key}
    with pytest.raises(ZooError, match="query, key and value"):
        flip.convert_official(missing)


@pytest.mark.parametrize(
    ("file", "model"), [("large16", "flip_large_patch16"), ("huge14", "flip_huge_patch14")], ids=["large", "huge"]
)
def test_published_layouts_convert_key_for_key(shared: Path, file: str, model: str) -> None:
    published = json.loads((shared / "statedicts" / "flip" / f"flip_{file}_laion2b_v2.json").read_text())
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in published["keys"].items()}
        network = getattr(flip, model)()
    converted = flip.convert_official(state)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == published["params"]


def _write_t5x(folder: Path, target: dict[str, Tensor], driver: str = "file", small: str = "logit_scale") -> Path:
    """A checkpoint as t5x writes it: zarr arrays by tensorstore, `small` within the msgpack index, optimiser states."""
    msgpack, ts = pytest.importorskip("msgpack"), pytest.importorskip("tensorstore")

    def packed(array: Any) -> Any:
        data = (list(array.shape), array.dtype.name, array.tobytes())
        return msgpack.ExtType(1, msgpack.packb(data, use_bin_type=True))

    folder.mkdir(parents=True)
    tree: dict[str, Any] = {}
    states = {"state/step": torch.tensor(7), "state/param_states/0/mu": torch.ones(2)}
    for key, value in {**{f"target/{k}": v for k, v in target.items()}, **states}.items():
        array, place = value.contiguous().numpy(), tree
        *parents, leaf = key.split("/")
        for name in parents:
            place = place.setdefault(name, {})
        if leaf == small or not array.ndim:
            place[leaf] = packed(array)
            continue
        chunks = [max(1, -(-side // 2)) for side in array.shape]
        facts = {"compressor": {"id": "gzip"}, "shape": list(array.shape), "chunks": chunks}
        name = key.replace("/", ".")
        spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": facts}
        at = {"driver": "file", "path": str(folder / name)}
        ts.open({**spec, "kvstore": at}, create=True, open=True).result().write(array).result()
        written = {"driver": "file", "path": f"{name}/"}
        bucket = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
        place[leaf] = {**spec, **({"kvstore": written} if driver == "file" else {"kvstore": bucket, "path": name})}
    index = msgpack.packb({"version": 3, "optimizer": tree}, use_bin_type=True)
    (folder / "checkpoint").write_bytes(index)
    return folder


@pytest.mark.parametrize("driver", ["file", "gcs"])
def test_t5x_checkpoints_load_from_folder_and_zip(tmp_path: Path, driver: str) -> None:
    sizes = {**SIZES, "depth": 1, "text_depth": 1}
    network = _network(**sizes)
    folder = _write_t5x(tmp_path / "run" / "checkpoint_7", _official(network), driver)
    assert t5x.is_checkpoint(tmp_path / "run")
    state = read_state_dict(tmp_path / "run")
    assert state.keys() == _official(network).keys()
    with zipfile.ZipFile(tmp_path / "flip.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, Path("flip_v2") / path.relative_to(folder))
    other = create_model("flip_base_patch16", weights=tmp_path / "flip.zip", **sizes)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), network.parameters(), strict=True))
    tuned = flip.FLIPPretraining(**sizes, mask_ratio=0.0, init_from=str(tmp_path / "run"))
    tuned.setup("fit")
    assert torch.equal(tuned.network.logit_scale, network.logit_scale)


def test_t5x_checkpoints_that_are_none_are_refused(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack")
    folder = _write_t5x(tmp_path / "ckpt", {"a/kernel": torch.ones(2, 2)})
    whole = (folder / "checkpoint").read_bytes()
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": "../elsewhere"}}
    for content, message in (
        (whole[:-5], "not a whole msgpack"),
        (b"", "not a whole msgpack"),
        (msgpack.packb({"optimizer": {"target": {"a": {"kernel": spec}}}}), "outside the checkpoint"),
        (msgpack.packb({"optimizer": {"target": {"a": "text"}}}), "holds a str"),
        (msgpack.packb({"optimizer": {"target": {"a": {**spec, "kvstore": {"path": "absent"}}}}}), "ckpt: "),
    ):
        (folder / "checkpoint").write_bytes(content)
        with pytest.raises(ZooError, match=message):
            t5x.read_state_dict(folder)
    (tmp_path / "no.zip").write_bytes(b"PK nothing")
    with pytest.raises(ZooError, match="not a whole zip"):
        t5x.read_state_dict(tmp_path / "no.zip")
    assert not t5x.is_checkpoint(tmp_path / "no.zip")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").write_bytes(b"\x80")
    monkeypatch.setitem(__import__("sys").modules, "tensorstore", None)
    pytest.importorskip("msgpack")
    with pytest.raises(ZooError, match=r"pip install 'paperzoo\[jax\]'"):
        t5x.read_state_dict(tmp_path)


def test_the_card_counts_the_parameters_right() -> None:
    for entry in catalog.paper("flip").models:
        with torch.device("meta"):
            network = getattr(flip, entry.name)()
        assert sum(p.numel() for p in network.parameters()) == entry.params, entry.name


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
