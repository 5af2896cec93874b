"""Pre-activation ResNet: the units, the networks, the task; its files are in tests/formats/test_torch7_resnets.py."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import zoo
from zoo import catalog
from zoo.errors import ZooError
from zoo.recognition import preact_resnet as pr
from zoo.training import Optim, lr_at

UNITS, SHORTCUTS = tuple(pr.UNITS), pr.SHORTCUTS
SMALL = {"widths": (4, 8, 16)}


def _images(count: int = 4, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def _small(depth: int = 14, block: str = "basic", **options: Any) -> pr.PreActResNet:
    torch.manual_seed(0)
    return pr.preact_resnet_cifar(depth, block, **{**SMALL, **options})


# --------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("convs", [2, 3])
def test_a_unit_is_its_figure(unit: str, convs: int) -> None:
    """Fig. 4, written out op by op on the unit's own layers."""
    torch.manual_seed(0)
    made = pr.ResidualUnit(6, (6,) * convs, (3,) * convs, unit=unit).double().eval()
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    norms, layers = ([getattr(made, f"{kind}{i}") for i in range(1, convs + 1)] for kind in ("bn", "conv"))
    relu = torch.relu
    f = x
    for i, (norm, conv) in enumerate(zip(norms, layers, strict=True)):
        last = i == convs - 1
        if unit == "full_preact":
            f = conv(relu(norm(f)))
        elif unit == "relu_only_preact":
            f = norm(conv(relu(f)))
        elif unit == "bn_after_add":
            f = conv(f) if last else relu(norm(conv(f)))
        else:
            f = norm(conv(f))
            f = f if last and unit == "original" else relu(f)
    expected = x + f
    if unit == "bn_after_add":
        expected = relu(norms[-1](expected))
    elif unit == "original":
        expected = relu(expected)
    torch.testing.assert_close(made(x), expected)


def test_shortcuts_are_their_figure() -> None:
    x, f, logit = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64).unbind()
    g = logit.sigmoid()
    for kind, expected in (
        ("identity", (x, f)),
        ("constant_scaling", (0.5 * x, 0.25 * f)),
        ("exclusive_gating", ((1 - g) * x, g * f)),
        ("shortcut_only_gating", ((1 - g) * x, f)),
    ):
        for got, wanted in zip(pr.shortcut_and_branch(x, f, kind, logit, 0.5, 0.25), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_a_closed_gate_is_the_identity_and_an_open_one_the_branch() -> None:
    x = _images(2, 8)[:, :3]
    torch.manual_seed(0)
    plain = pr.ResidualUnit(3, (3, 3)).eval()
    for kind, bias, parts in (("shortcut_only_gating", -40.0, (1, 1)), ("exclusive_gating", -40.0, (1, 0))):
        gated = pr.ResidualUnit(3, (3, 3), shortcut=kind, gate_bias=bias).eval()
        assert gated.gate.bias.tolist() != [bias] * 3  # a lone unit is not initialised; a network is
        nn.init.constant_(gated.gate.bias, bias)
        gated.load_state_dict(plain.state_dict(), strict=False)
        torch.testing.assert_close(gated(x), parts[0] * x + parts[1] * (plain(x) - x))
    network = _small(shortcut="exclusive_gating", gate_bias=-6.0)
    gates = [unit.gate for stage in network.stages for unit in stage]
    assert all(gate.bias.tolist() == [-6.0] * len(gate.bias) for gate in gates)


def test_dropout_acts_on_the_shortcut_in_training_only() -> None:
    unit, x = pr.ResidualUnit(3, (3, 3), shortcut="dropout", dropout=0.5).eval(), torch.ones(64, 3, 8, 8)
    nn.init.zeros_(unit.conv2.weight)
    assert torch.equal(unit(x), x)
    kept = unit.train()(x)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert kept.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["A", "B", "C"])
def test_shortcut_types_where_the_shape_changes_and_where_not(kind: str) -> None:
    x = _images(2, 8)
    wider = pr.ResidualUnit(3, (6, 6), strides=(2, 1), shortcut_type=kind)
    same = pr.ResidualUnit(3, (3, 3), shortcut_type=kind)
    nn.init.zeros_(wider.conv2.weight)
    nn.init.zeros_(same.conv2.weight)
    assert (wider.shortcut_conv is None, same.shortcut_conv is None) == (kind == "A", kind != "C")
    got = wider(x)
    assert got.shape == (2, 6, 4, 4)
    if kind == "A":
        assert torch.equal(got, torch.cat([x[:, :, ::2, ::2], 0 * x[:, :, ::2, ::2]], dim=1))
    else:
        torch.testing.assert_close(got, wider.shortcut_conv(x))
    if kind != "C":
        assert torch.equal(same(x), x)


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_reach_every_parameter(unit: str) -> None:
    imagenet = pr.preact_resnet18(unit=unit, widths=(4, 8, 8, 8), num_classes=10)
    assert (imagenet.norm is None) == (unit != "full_preact")
    networks = [("imagenet", imagenet, 64)]
    for shortcut in SHORTCUTS if unit in ("original", "full_preact") else ("identity",):
        for depth, block in ((14, "basic"), (20, "bottleneck")):
            networks.append((f"{block}, {shortcut}", _small(depth, block, unit=unit, shortcut=shortcut), 16))
    for name, network, side in networks:
        cross_entropy(network(_images(8, side)), torch.arange(8)).backward()
        assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == [], name


def test_imagenet_networks_are_fully_convolutional() -> None:
    assert pr.preact_resnet18(widths=(4, 8, 8, 8)).eval()(_images(1, 80)).shape == (1, 1000)


def test_the_maximum_before_the_relu_changes_nothing() -> None:
    network, images = pr.preact_resnet18(widths=(4, 4, 4, 4), stem_width=4).double(), _images(2, 32).double()
    seen = network._stem(images)[1]
    expected = network.maxpool(torch.relu(network.bn1(network.conv1(images))))
    torch.testing.assert_close(seen, expected)
    weight = torch.randn_like(seen)
    grads = [torch.autograd.grad((x * weight).sum(), network.conv1.weight)[0] for x in (seen, expected)]
    torch.testing.assert_close(*grads)


def test_initial_weights_are_the_papers() -> None:
    network = pr.preact_resnet_cifar(20, "bottleneck")
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:
            out, _, k, _ = parameter.shape
            std = math.sqrt(2 / (k * k * out))
            assert parameter.std().item() == pytest.approx(std, rel=0.25), name
        elif name.endswith("weight") and parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
    bound = 1 / math.sqrt(256)
    assert 0.95 * bound < network.fc.weight.abs().max() <= bound


def test_a_signal_passes_identity_shortcuts_as_a_sum() -> None:
    """Equations 3 to 5: behind a stage's first unit, x_L = x_l + the sum of F, and the gradient has the term 1."""
    network, images = _small(32), _images()
    stage = network.stages[0]
    seen: list[Tensor] = []
    for unit in stage:
        unit.register_forward_hook(lambda _, args, out: seen.append(out))
    _, x = network._stem(images)
    end = stage(x)
    branches = [b - a for a, b in pairwise(seen)]
    torch.testing.assert_close(end, seen[0] + sum(branches))
    for unit in list(stage)[1:]:
        nn.init.zeros_(unit.conv2.weight)
    x = _images(2)[:, :1].repeat(1, 4, 1, 1).requires_grad_()
    for kind, factor in (("identity", 1.0), ("constant_scaling", 0.5**4)):
        for unit in stage:
            unit.shortcut, unit.scale_x = kind, 0.5
        out = x
        for unit in list(stage)[1:]:
            out = unit(out)
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad, torch.full_like(grad, factor))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_checkpointing_changes_neither_gradients_nor_statistics(block: str) -> None:
    results = []
    for enable in (False, True):
        network = _small({"basic": 14, "bottleneck": 11}[block], block).double()
        network.set_grad_checkpointing(enable)
        cross_entropy(network(_images().double()), torch.arange(4)).backward()
        results.append(({n: p.grad for n, p in network.named_parameters()}, network.state_dict()))
    for one, two in zip(*results, strict=True):
        for name in one:
            torch.testing.assert_close(two[name], one[name], msg=lambda m, name=name: f"{name}: {m}")
    assert all(norm.momentum == 0.1 for norm in network.modules() if isinstance(norm, nn.BatchNorm2d))


def test_mistakes_are_named() -> None:
    for call, message in (
        (lambda: pr.preact_resnet_cifar(111), "6n.*nearest is 110"),
        (lambda: pr.preact_resnet_cifar(160, "bottleneck"), r"9n \+ 2; the nearest is 164"),
        (lambda: pr.preact_resnet_imagenet(51), "18, 34, 50"),
        (lambda: _small(unit="full_preakt"), "did you mean 'full_preact'"),
        (lambda: _small(shortcut="gating"), "unknown shortcut"),
        (lambda: _small(shortcut_type="D"), "unknown shortcut_type"),
        (lambda: _small(block="bottel"), "unknown block"),
        (lambda: pr.PreActResNet((1, 1), (4,)), "one a stage"),
        (lambda: _small().reset_classifier(3, "max"), "global_pool"),
        (lambda: _small(global_pool=""), "wants global_pool 'avg'"),
        (lambda: _small().forward_intermediates(_images(), [9]), "intermediates 0 to 3"),
        (lambda: pr.PreActResNetClassification(depths=[1], widths=[4, 8]), "one a stage"),
    ):
        with pytest.raises(ZooError, match=message):
            call()


# ---------------------------------------------------------------------------------------------------------------- task


def _written(recipe: str) -> tuple[dict[str, Any], dict[str, Any], Optim]:
    """The network's options, the data module's, and the optimiser of a recipe."""
    content = yaml.safe_load(catalog.recipe_path(recipe).read_text())
    network = content["model"]["init_args"]
    return network, content["data"]["init_args"], Optim(**network.pop("optim"))


def test_the_task_hands_its_options_to_the_network() -> None:
    sizes: dict[str, Any] = {"depths": [1, 1, 1], "widths": [4, 8, 16], "num_classes": 3, "unit": "original"}
    task = pr.PreActResNetClassification(label_smoothing=0.1, channels_last=False, **sizes)
    again = pr.PreActResNetClassification(**task.hparams)
    again.load_state_dict(task.state_dict())
    assert again.label_smoothing == 0.1
    torch.testing.assert_close(again.eval()(_images()), task.eval()(_images()))
    assert again.features(_images()).shape == (4, 16)
    assert pr.convert_official(task.network.state_dict()).keys() == task.network.state_dict().keys()
    with pytest.raises(TypeError, match="depth"):
        pr.PreActResNetClassification(depth=20)


def test_the_schedules_of_paper_and_code() -> None:
    (*_, paper), steps = _written("preact_resnet/train_cifar10"), 50_000 // 128
    rates = {k: lr_at(paper, k / steps, 165, 0.1, 400 / steps) for k in (0, 399, 400, 31_999, 32_000, 47_999, 48_000)}
    assert list(rates.values()) == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001])
    for name, epochs in (("batch64_cifar10", (80, 121)), ("imagenet1k", (30, 60)), ("aspect_imagenet1k", (30, 60))):
        *_, code = _written(f"preact_resnet/train_{name}")
        at = [lr_at(code, e - 1 + k, 200, 0.1) for e in epochs for k in (0, 1)]
        assert at == pytest.approx([0.1, 0.01, 0.01, 0.001])
        assert code.nesterov == (name != "imagenet1k")
        assert code.no_decay == "none"


def test_rows_are_what_they_speak_of() -> None:
    """The published size or the ablation of it, the row's data, and the kernel of the released weights' resize."""
    rows = [row for row in catalog.paper("preact_resnet").leaderboard if row.recipe is not None]
    assert len(rows) == 42
    seen = set()
    for row in rows:
        network, data, _ = _written(row.recipe)
        for key, value in row.options.items():
            *place, leaf = key.split(".")
            part = network if place == ["model"] else data
            for name in place[1:]:
                part = part[name]["init_args"]
            part[leaf] = value
        assert data["dataset"] == row.dataset
        released = row.weights is not None
        assert ("Torch7" in row.protocol.get("resize", "")) == released
        for name in ("train_transform", "eval_transform"):
            assert data.get(name, {}).get("init_args", {}).get("kernel", "pillow") == (
                "torch7" if released else "pillow"
            )
        if row.dataset == "imagenet1k":
            assert data["eval_transform"]["init_args"].get("size", 224) == row.protocol["test_crop"]
            assert data["eval_transform"]["class_path"].endswith("TenCrop") == (row.protocol["crops"] == 10)
        plain = (
            network.get("unit", "full_preact") == "full_preact" and network.get("shortcut", "identity") == "identity"
        )
        if "1001" in row.model:
            assert (network["depths"], network["block"]) == ([111] * 3, "bottleneck")
        elif plain and (row.recipe, row.model) not in seen:
            seen.add((row.recipe, row.model))
            with torch.device("meta"):
                made, published = pr.PreActResNet(**network, num_classes=7), zoo.create_model(row.model, num_classes=7)
            shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (made, published)]
            assert shapes[0] == shapes[1], row.id
            assert str(made) == str(published), row.id
        elif not plain:
            assert row.protocol.get("unit", network["unit"]) == network["unit"]
