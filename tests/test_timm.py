"""The zoo's classifiers under timm's names, driven as timm's users and timm's own tests drive models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
import torch.fx
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

import zoo.timm
from zoo import catalog
from zoo.errors import ZooError
from zoo.nn.vit import VisionTransformer
from zoo.weights.pretrained import Architecture

CARDS = [catalog.paper(slug) for slug in catalog.list_papers()]
CLASSIFIERS = [(card, model) for card in CARDS for model in card.models if model.classifier]
NAMES = [model.name for _, model in CLASSIFIERS]
TINY: dict[str, dict[str, Any]] = {
    "preact_resnet20_cifar": {"widths": (4, 8, 16), "stem_width": 4},
    "preact_resnet164_cifar": {"depths": (2, 2, 2), "widths": (4, 8, 16)},
    "preact_resnet18": {"widths": (8, 8, 16, 16), "stem_width": 8},
    "preact_resnet50": {"depths": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 8},
    "vit_base_patch16": {"embed_dim": 24, "depth": 3, "num_heads": 2},
}
CONVOLUTIONAL = [name for name in TINY if "resnet" in name]


def _create(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY[name], **options})


def _images(net: Any, count: int = 2) -> Tensor:
    channels, *sides = net.default_cfg["input_size"]
    sides = sides if net.default_cfg["fixed_input_size"] else [min(64, side) for side in sides]
    return torch.randn(count, channels, *sides, generator=torch.Generator().manual_seed(0))


def test_every_classifier_is_listed() -> None:
    assert set(timm.list_models(module="timm")) == set(zoo.timm.default_cfgs) == set(NAMES)
    assert set(NAMES) <= set(timm.list_models())
    published = {w.name for card in CARDS for w in card.weights if w.model in NAMES}
    assert published <= set(timm.list_pretrained())


def test_a_name_that_timm_has_is_left_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = timm.models.model_entrypoint("resnet18")
    facts = catalog.model("preact_resnet18")[1]
    paper = catalog.paper("preact_resnet").model_copy(
        update={"models": [facts.model_copy(update={"name": "resnet18"})], "weights": []}
    )
    monkeypatch.setattr(catalog, "list_papers", lambda: ["one"])
    monkeypatch.setattr(catalog, "paper", lambda slug: paper)
    zoo.timm._register()
    try:
        assert timm.models.model_entrypoint("resnet18") is entry
        assert timm.is_model("zoo_resnet18")
    finally:
        del zoo.timm.default_cfgs["zoo_resnet18"]
        from timm.models import _registry  # timm cannot unregister; other tests count the names

        _registry._clear_model_entries("zoo_resnet18")
        del _registry._model_entrypoints["zoo_resnet18"]


def test_importing_the_zoo_imports_neither_timm_nor_torch() -> None:
    code = "import sys, zoo; zoo.list_models(); sys.exit('timm' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("card", "model"), CLASSIFIERS, ids=NAMES)
def test_cfgs_are_true(card: catalog.PaperCard, model: catalog.ModelEntry) -> None:
    """What timm is told stands in the card; here it is held against the network."""
    tags = [weights.name.partition(".")[2] for weights in card.weights if weights.model == model.name]
    for tag in tags or [None]:
        cfg = get_pretrained_cfg(f"{model.name}.{tag}" if tag else model.name)
        overrides = catalog.weight(f"{model.name}.{tag}")[1].overrides if tag else {}
        net: Any = Architecture(card, model.name, overrides).on_meta()
        convolutions = [name for name, part in net.named_modules() if isinstance(part, nn.Conv2d)]
        assert cfg.first_conv == convolutions[0]
        assert net.get_submodule(cfg.classifier) is net.get_classifier()
        assert cfg.num_classes == net.num_classes
        assert cfg.input_size[0] == net.get_submodule(cfg.first_conv).in_channels
        assert bool(cfg.url) == bool(tag)
        if cfg.fixed_input_size:
            assert cfg.input_size[1] == net.patch_embed.img_size
        else:
            reduction = net.feature_info[-1]["reduction"]
            assert cfg.pool_size == (cfg.input_size[1] // reduction, cfg.input_size[2] // reduction)
        if tag:
            prep = catalog.weight(f"{model.name}.{tag}")[1].preprocess
            assert (cfg.crop_pct, cfg.interpolation) == (prep.crop_pct, prep.interpolation)
            assert (cfg.mean, cfg.std) == (tuple(prep.mean), tuple(prep.std))


def test_classifiers_are_those_models_that_have_the_protocol() -> None:
    for card in CARDS:
        for model in card.models:
            if "1001" not in model.name and "1202" not in model.name:
                net = Architecture(card, model.name, {}).on_meta()
                # A trunk alone does not classify, and timm's images are no videos.
                classifies = hasattr(net, "reset_classifier") and net.num_classes > 0 and card.field != "video"
                assert classifies == (model.classifier is not None), model.name


# ---- as timm's tests/test_models.py does ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_forward(name: str) -> None:
    net = _create(name).eval()
    logits = net(_images(net))
    assert logits.shape == (2, net.num_classes)
    assert not torch.isnan(logits).any()


@pytest.mark.parametrize("name", TINY)
def test_backward(name: str) -> None:
    net: Any = _create(name, num_classes=42)
    assert net.num_classes == 42
    assert all(parameter.grad is None for parameter in net.parameters())
    logits = net(_images(net))
    logits.mean().backward()
    assert logits.shape[-1] == 42
    for name_, parameter in net.named_parameters():
        assert parameter.grad is not None, name_


@pytest.mark.parametrize("name", TINY)
def test_default_cfg_and_heads(name: str) -> None:
    net: Any = _create(name).eval()
    cfg, images = net.default_cfg, _images(net)
    features = net.forward_features(images)
    if name in CONVOLUTIONAL:
        assert features.shape[1] == net.num_features
    else:
        assert features.shape[-1] == net.num_features
    assert net.forward_head(features, pre_logits=True).shape == (2, net.num_features)
    torch.testing.assert_close(net.forward_head(features), net(images))
    state = net.state_dict()
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['first_conv']}.weight" in state

    net.reset_classifier(0)
    assert net.num_classes == 0
    assert net(images).shape == (2, net.num_features)
    assert f"{cfg['classifier']}.weight" not in net.state_dict()
    net.reset_classifier(7)
    assert net(images).shape == (2, 7)
    assert _create(name, num_classes=0).eval()(images).shape == (2, net.num_features)
    assert net.head_hidden_size == net.num_features
    net.reset_classifier(0, "")
    assert net(images).shape == features.shape
    assert _create(name, num_classes=0, global_pool="").eval()(images).shape == features.shape


@pytest.mark.parametrize("name", TINY)
def test_features_only(name: str) -> None:
    net: Any = _create(name, features_only=True).eval()
    images = _images(net)
    outputs = net(images)
    info = net.feature_info
    assert len(outputs) == len(info.channels()) == (4 if "cifar" in name else 5 if name in CONVOLUTIONAL else 3)
    for output, channels, reduction in zip(outputs, info.channels(), info.reduction(), strict=True):
        assert output.shape == (2, channels, images.shape[2] // reduction, images.shape[3] // reduction)
    first = 1 if name in CONVOLUTIONAL else 0
    some: Any = _create(name, features_only=True, out_indices=(first, first + 1)).eval()
    assert [tuple(o.shape) for o in some(images)] == [tuple(o.shape) for o in outputs[first : first + 2]]
    assert sum(p.numel() for p in some.parameters()) < sum(p.numel() for p in net.parameters())
    whole: Any = _create(name).eval()
    final, intermediates = whole.forward_intermediates(images)
    assert len(intermediates) == len(outputs)
    torch.testing.assert_close(final, whole.forward_features(images))
    last = whole.forward_intermediates(images, indices=1, norm=True, stop_early=True, intermediates_only=True)
    if name in CONVOLUTIONAL:
        torch.testing.assert_close(last[0], final)
    else:
        torch.testing.assert_close(last[0].flatten(2).transpose(1, 2), final[:, 1:])
    stem = whole.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(stem[0], intermediates[0])
    assert (stem[0] >= 0).all() or "cifar" in name or name not in CONVOLUTIONAL


def test_features_of_a_network_without_intermediates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(VisionTransformer, "forward_intermediates")
    with pytest.raises(ZooError, match="no intermediate features"):
        _create("vit_base_patch16", features_only=True)


@pytest.mark.parametrize("name", TINY)
def test_other_channels_and_checkpointing(name: str) -> None:
    net: Any = _create(name, in_chans=1)
    images = _images(net)[:, :1]
    net.set_grad_checkpointing(True)
    net(images).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("name", TINY)
def test_layer_groups_hold_every_parameter(name: str) -> None:
    from timm.models import group_parameters

    net: Any = _create(name)
    for coarse in (False, True):
        groups = group_parameters(net, net.group_matcher(coarse=coarse))
        assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in net.named_parameters())
        assert len(groups) > (3 if name in CONVOLUTIONAL or not coarse else 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("name", CONVOLUTIONAL)
@pytest.mark.parametrize("unit", ["full_preact", "original"])
def test_scripted_and_traced_networks_compute_the_same(name: str, unit: str) -> None:
    net: Any = _create(name, unit=unit).eval()
    images = _images(net)
    expected = net(images)
    torch.testing.assert_close(torch.jit.script(net)(images), expected)
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(images), expected)
    torch.testing.assert_close(torch.jit.script(traced)(images), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:.*isinstance.treespec.*")
@pytest.mark.parametrize("pool", ["avg", "token", ""])
def test_a_transformer_is_scripted_traced_and_exported(pool: str) -> None:
    net: Any = _create("vit_base_patch16", global_pool=pool, img_size=32, num_classes=0 if not pool else 5).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = net(images)
    assert expected.shape == ((2, 5) if pool else (2, 5, 24))
    traced = torch.fx.symbolic_trace(net)
    for one in (torch.jit.script(net), traced, torch.jit.script(traced), torch.export.export(net, (images,)).module()):
        torch.testing.assert_close(one(images), expected)
    tokens, (pairs,) = net.forward_intermediates(images, indices=[-1], return_prefix_tokens=True, output_fmt="NLC")
    assert [tuple(part.shape) for part in pairs] == [(2, 4, 24), (2, 1, 24)]
    assert tokens.shape == (2, 5, 24)


@pytest.mark.parametrize("name", TINY)
def test_what_timm_s_train_script_passes_is_taken(name: str, tmp_path: Path) -> None:
    net: Any = _create(name, num_classes=5, drop_rate=0.9, drop_path_rate=0.5, dtype=torch.float64, device="cpu")
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}
    images = _images(net).double()
    net.train()
    assert not torch.allclose(net(images), net(images))
    plain: Any = _create(name, num_classes=5, drop_rate=0.0, drop_path_rate=0.0).double()
    assert plain.state_dict().keys() == net.state_dict().keys()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain.eval()(images), net.eval()(images))
    drops = [part.drop_prob for part in net.modules() if type(part).__name__ == "DropPath"]
    assert drops[-1] == 0.5
    assert drops == sorted(drops)
    assert next(iter(_create(name, device="meta").parameters())).device.type == "meta"

    torch.save(net.state_dict(), tmp_path / "mine.pth")
    overlay = {"file": str(tmp_path / "mine.pth")}
    again: Any = _create(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(again.eval()(images.float()), net(images).float(), rtol=1e-3, atol=1e-4)
    tuned: Any = _create(name, pretrained=True, num_classes=5, pretrained_cfg_overlay={**overlay, "num_classes": -1})
    head = f"{net.default_cfg['classifier']}.weight"
    same = {key for key, value in tuned.state_dict().items() if torch.equal(value, again.state_dict()[key])}
    assert tuned.state_dict().keys() - same <= {head, head.replace("weight", "bias")}
    assert head not in same


def test_optimizers_and_transforms_of_timm_take_them() -> None:
    from timm.optim import create_optimizer_v2

    net: Any = _create("preact_resnet20_cifar")
    create_optimizer_v2(net, "sgd", lr=0.1, layer_decay=0.9)
    config = timm.data.resolve_model_data_config(net)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.4914, 0.4822, 0.4465)
    assert config["crop_pct"] == 1.0


def test_pretrained_weights_come_by_the_zoo_s_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.formats.test_torch7 import write
    from tests.formats.torch7_resnets import official_tree, run_tree

    torch.manual_seed(0)
    tree = official_tree("imagenet", 2, "B", (4, 8, 16, 32), 1000)
    path = write(tmp_path / "resnet-200.t7", tree)
    card, entry = catalog.weight("preact_resnet200.fb_in1k")
    small = {"depths": (2, 2, 2, 2), "block": "basic", "widths": (4, 8, 16, 32), "stem_width": 4}
    entry = entry.model_copy(update={"urls": [path.as_uri()], "overrides": small})
    card = card.model_copy(update={"weights": [entry]})
    monkeypatch.setattr(catalog, "weight", lambda name: (card, entry))
    images = torch.randn(1, 3, 32, 32)
    for name in ("preact_resnet200.fb_in1k", "preact_resnet200"):
        net = timm.create_model(name, pretrained=True).eval()
        torch.testing.assert_close(net(images), run_tree(tree, images), rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="start anew"):
        net = timm.create_model("preact_resnet200", pretrained=True, num_classes=3).eval()
    assert net(images).shape == (1, 3)
    features: Any = timm.create_model("preact_resnet200", pretrained=True, features_only=True).eval()
    assert len(features(images)) == 5
