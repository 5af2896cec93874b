"""Pre-activation ResNet: the units, the networks, the task, the published layouts and files."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import zoo
from tests.formats.test_torch7 import module, write
from zoo import catalog
from zoo.errors import ZooError
from zoo.formats.torch7 import Torch7Object
from zoo.recognition import preact_resnet as pr
from zoo.training import Optim, lr_at
from zoo.weights.pretrained import read_state_dict

UNITS, SHORTCUTS = tuple(pr.UNITS), pr.SHORTCUTS
SMALL = {"widths": (4, 8, 16), "stem_width": 4}


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
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_gradients_reach_every_parameter(unit: str, block: str) -> None:
    for shortcut in SHORTCUTS if unit in ("original", "full_preact") else ("identity",):
        network = _small({"basic": 14, "bottleneck": 20}[block], block, unit=unit, shortcut=shortcut)
        cross_entropy(network(_images(8)), torch.arange(8)).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, (shortcut, name)


def test_imagenet_networks_of_all_units() -> None:
    for unit in UNITS:
        torch.manual_seed(0)
        network = pr.preact_resnet18(unit=unit, widths=(4, 8, 8, 8), stem_width=4, num_classes=3)
        network(_images(2, 64)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters()), unit
        assert (network.norm is None) == (unit != "full_preact")
    assert pr.preact_resnet18(widths=(4, 8, 8, 8)).eval()(_images(1, 80)).shape == (1, 1000)  # fully convolutional


def test_the_maximum_before_the_relu_changes_nothing() -> None:
    network, images = pr.preact_resnet18(widths=(4, 4, 4, 4), stem_width=4).double(), _images(2, 32).double()
    seen = network._stem(images)[1]
    expected = network.maxpool(torch.relu(network.bn1(network.conv1(images))))
    torch.testing.assert_close(seen, expected)
    weight = torch.randn_like(seen)
    for a, b in zip(
        torch.autograd.grad((seen * weight).sum(), network.conv1.weight),
        torch.autograd.grad((expected * weight).sum(), network.conv1.weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


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
    loss = cross_entropy(_small().eval()(_images(64)), torch.arange(64) % 10)
    assert loss.item() == pytest.approx(math.log(10), rel=0.5)


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


def test_channels_last_and_compilation_change_no_number() -> None:
    network, images = _small(20, "bottleneck").double(), _images().double()
    expected = network.eval()(images)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager", fullgraph=True)(images), expected)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images.contiguous(memory_format=torch.channels_last)), expected)


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
        (lambda: pr.PreActResNetClassification("preact_resnet21_cifar"), "did you mean 'preact_resnet"),
        (lambda: pr.PreActResNetClassification(None), "wants a depth"),
        (lambda: pr.PreActResNetClassification(depth=20), "has its own depth"),
    ):
        with pytest.raises(ZooError, match=message):
            call()


# --------------------------------------------------------------------------------------------- official layouts, files


def official_tree(layout: str, n: int, kind: str, widths: tuple[int, ...], classes: int) -> Torch7Object:
    """A Torch7 network with random weights, nested as the official files nest theirs."""

    def conv(a: int, b: int, k: int, stride: int = 1) -> Torch7Object:
        return module("cudnn.SpatialConvolution", weight=torch.randn(b, a, k, k) / math.sqrt(a * k * k), stride=stride)

    def norm(a: int) -> Torch7Object:
        facts = {"weight": torch.rand(a) + 0.5, "bias": torch.randn(a) / 10}
        facts |= {"running_mean": torch.randn(a) / 10, "running_var": torch.rand(a) + 0.5}
        return module("nn.SpatialBatchNormalization", **facts)

    def plain(name: str) -> Torch7Object:
        return module(f"nn.{name}")

    bottleneck = layout == "resnet-pre-act"
    imagenet = layout == "imagenet"
    kernels = (1, 3, 1) if bottleneck else (3, 3)

    def unit(a: int, width: int, stride: int, place: str) -> Torch7Object:
        outs = (width, width, 4 * width) if bottleneck else (width, width)
        shared = a != outs[-1] if bottleneck else place == "first" and not (imagenet and width == widths[0])
        bare = imagenet and width == widths[0] and place == "first"
        activation = [] if bare else [norm(a), plain("ReLU")]
        branch, channels = [], a
        for i, (out, kernel) in enumerate(zip(outs, kernels, strict=True)):
            branch += [norm(channels), plain("ReLU")] if i else []
            branch.append(conv(channels, out, kernel, stride if i == 0 else 1))
            channels = out
        if kind == "C" or (kind == "B" and a != channels):
            shortcut = module("nn.Sequential", conv(a, channels, 1, stride))
        elif a != channels:
            parts = module("nn.Concat", plain("Identity"), plain("MulConstant"))
            shortcut = module("nn.Sequential", module("nn.SpatialAveragePooling", stride=stride), parts)
        else:
            shortcut = plain("Identity")
        lead, inner = (activation, branch) if shared else ([], activation + branch)
        table = module("nn.ConcatTable", module("nn.Sequential", *inner), shortcut)
        return module("nn.Sequential", *lead, table, plain("CAddTable"))

    stem = [conv(3, widths[0], 7, 2), norm(widths[0]), plain("ReLU"), plain("SpatialMaxPooling")]
    parts = stem if imagenet else stem[:1]
    parts[0] = conv(3, widths[0], 7 if imagenet else 3, 2 if imagenet else 1)
    a = widths[0]
    for s, width in enumerate(widths):
        units = []
        for u in range(n):
            units.append(unit(a, width, 2 if s and not u else 1, "first" if not u else "other"))
            a = width * (4 if bottleneck else 1)
        parts.append(module("nn.Sequential", *units))
    head = module("nn.Linear", weight=torch.randn(classes, a) / math.sqrt(a), bias=torch.randn(classes))
    return module("nn.Sequential", *parts, norm(a), plain("ReLU"), plain("SpatialAveragePooling"), plain("View"), head)


def run_tree(node: Torch7Object, x: Tensor, imagenet: bool = False) -> Tensor:
    """What Torch7 computes from a tree in evaluation."""
    name, fields = node.kind.partition(".")[2], node.fields
    parts = [fields["modules"][float(i)] for i in range(1, len(fields["modules"]) + 1)] if "modules" in fields else []
    if name == "Sequential":
        for part in parts:
            x = run_tree(part, x)
        return x
    if name == "ConcatTable":
        return [run_tree(part, x) for part in parts]  # type: ignore[return-value]
    functional = nn.functional
    return {
        "Concat": lambda: torch.cat([run_tree(part, x) for part in parts], dim=1),
        "CAddTable": lambda: sum(x),
        "SpatialConvolution": lambda: functional.conv2d(
            x, fields["weight"], stride=fields["stride"], padding=fields["weight"].shape[-1] // 2
        ),
        "SpatialBatchNormalization": lambda: functional.batch_norm(
            x, fields["running_mean"], fields["running_var"], fields["weight"], fields["bias"]
        ),
        "ReLU": lambda: torch.relu(x),
        "Identity": lambda: x,
        "MulConstant": lambda: 0 * x,
        "SpatialMaxPooling": lambda: functional.max_pool2d(x, 3, 2, 1),
        "SpatialAveragePooling": lambda: (
            functional.avg_pool2d(x, 1, fields["stride"]) if "stride" in fields else x.mean((2, 3), keepdim=True)
        ),
        "View": lambda: x.flatten(1),
        "Linear": lambda: functional.linear(x, fields["weight"], fields["bias"]),
    }[name]()


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("cifar", "A"), ("cifar", "B"), ("cifar", "C"), ("imagenet", "A"), ("imagenet", "C"), ("resnet-pre-act", "B")],
)
def test_torch7_networks_compute_the_same(layout: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    widths = (4, 8, 16, 32) if layout == "imagenet" else (4, 8, 16)
    tree = official_tree(layout, 2, kind, widths, 5)
    options: dict[str, Any] = {"widths": widths, "stem_width": 4, "num_classes": 5, "shortcut_type": kind}
    if layout == "imagenet":
        name, network = "preact_resnet18", pr.preact_resnet18(**options)
    else:
        bottleneck = layout == "resnet-pre-act"
        network = pr.preact_resnet_cifar(20 if bottleneck else 14, "bottleneck" if bottleneck else "basic", **options)
    state = read_state_dict(write(tmp_path / "net.t7", tree, cuda=True))
    network.load_state_dict(pr.convert_official(state), strict=True)
    images = _images(2, 32)
    expected = run_tree(tree, images)
    torch.testing.assert_close(network.eval()(images), expected, rtol=1e-4, atol=1e-4)
    if layout == "imagenet":  # the same by the public face, and once more from our own names
        path = tmp_path / "net.t7"
        made = zoo.create_model(name, weights=path, **{**options, "num_classes": 5}).eval()
        torch.testing.assert_close(made(images), expected, rtol=1e-4, atol=1e-4)
    assert pr.convert_official(network.state_dict()).keys() == network.state_dict().keys()


def test_published_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from a .t7 file at an address to a network: the card's entry at a tiny size, from a local file."""
    from zoo.weights import pretrained

    torch.manual_seed(0)
    tree = official_tree("imagenet", 2, "B", (4, 8, 16, 32), 1000)
    path = write(tmp_path / "resnet-200.t7", tree, cuda=True)
    card, entry = catalog.weight("preact_resnet200.fb_in1k")
    small = {"depths": (2, 2, 2, 2), "block": "basic", "widths": (4, 8, 16, 32), "stem_width": 4}
    entry = entry.model_copy(update={"urls": [path.as_uri()], "overrides": small})
    monkeypatch.setattr(catalog, "weight", lambda name: (card, entry))
    network = zoo.create_model("preact_resnet200.fb_in1k", pretrained=True).eval()
    images = _images(1, 32)
    torch.testing.assert_close(network(images), run_tree(tree, images), rtol=1e-4, atol=1e-4)
    assert (pretrained.fetch_weights(entry.name)).name == "converted.safetensors"
    prepared = zoo.create_preprocess("preact_resnet200.fb_in1k")(torch.zeros(3, 300, 400, dtype=torch.uint8))
    assert prepared.shape == (3, 224, 224)


def test_the_published_layout_is_taken_whole(shared: Path) -> None:
    keys = json.loads((shared / "statedicts/preact_resnet/resnet-200.json").read_text())["keys"]
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    with torch.device("meta"):
        network = pr.preact_resnet200()
    converted = pr.convert_official(state)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in network.state_dict().items()}
    added = [key for key in converted if key.endswith("num_batches_tracked")]
    assert len(converted) - len(added) == len(keys)


@pytest.mark.parametrize(
    "key",
    ["9.weight", "4.0.weight", "8.0.0.0.0.weight", "4.1.0.0.1.weight", "4.1.3.0.0.weight", "4.1.0.0.2.gamma", "x"],
)
def test_foreign_keys_are_refused(key: str) -> None:
    tree = official_tree("imagenet", 2, "B", (2, 2, 2, 2), 2)
    state = {"12.weight": torch.ones(2, 2), "12.bias": torch.ones(2), key: torch.ones(2)}
    assert tree.kind == "nn.Sequential"
    with pytest.raises(ZooError, match=f"unknown key '{key}'"):
        pr.convert_official(state)
    with pytest.raises(ZooError, match="unknown keys, such as 'x'"):
        pr.convert_official({"conv1.weight": torch.ones(1), "x": torch.ones(1)})


# ---------------------------------------------------------------------------------------------------------------- task


def _data(views: int = 0, count: int = 8) -> DataLoader:
    images = _images(count)
    crops = {"views": [images[:, :, : 16 - k, : 16 - k] for k in range(views)]}
    samples = [
        {"label": i % 3, **({"views": [v[i] for v in crops["views"]]} if views else {"image": images[i]})}
        for i in range(count)
    ]
    return DataLoader(samples, batch_size=4)


def _trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, **options},
    )


def test_the_task_trains_evaluates_and_comes_back(tmp_path: Path) -> None:
    optim = Optim(name="sgd", lr=0.01, nesterov=True, weight_decay=1e-4, no_decay="none", schedule="constant")
    options: dict[str, Any] = {"model": None, "depth": 8, "widths": [4, 8, 16], "num_classes": 3, "optim": optim}
    task = pr.PreActResNetClassification(**options, label_smoothing=0.1, mixup=0.2, cutmix=1.0)
    trainer = _trainer(tmp_path)
    trainer.fit(task, _data(), _data())
    assert {"val/top1", "val/top5", "val/loss"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = pr.PreActResNetClassification.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).eval()
    images = _images()
    torch.testing.assert_close(again(images), task.eval()(images))
    assert again.features(images).shape == (4, 16)
    (optimizer,) = trainer.optimizers
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4]
    assert optimizer.param_groups[0]["nesterov"]
    state = read_state_dict(tmp_path / "x.ckpt")
    assert pr.convert_official(state).keys() == task.network.state_dict().keys()


def test_crops_are_averaged_by_their_logits(tmp_path: Path) -> None:
    task = pr.PreActResNetClassification(None, depth=8, widths=[4, 8, 16], num_classes=3).eval()
    (scores,) = _trainer(tmp_path).test(task, _data(views=3), verbose=False)
    images, labels = _images(8), torch.arange(8) % 3
    with torch.no_grad():
        logits = sum(task(images[:, :, : 16 - k, : 16 - k]) for k in range(3)) / 3
        whole = task(images)
    assert scores["test/loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores["test/top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    probabilities = torch.cat(_trainer(tmp_path).predict(task, _data(views=3)))
    torch.testing.assert_close(probabilities, logits.softmax(1))
    torch.testing.assert_close(torch.cat(_trainer(tmp_path).predict(task, _data())), whole.softmax(1))


def test_channels_last_is_only_an_order_in_memory() -> None:
    tasks = []
    for order in (True, False):
        torch.manual_seed(0)
        tasks.append(pr.PreActResNetClassification(None, depth=8, widths=[4, 8, 16], channels_last=order).eval())
    torch.testing.assert_close(tasks[0](_images()), tasks[1](_images()), rtol=1e-4, atol=1e-5)
    assert tasks[0].network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert tasks[1].network.conv1.weight.is_contiguous()


def test_the_schedules_of_paper_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cpu = {"trainer.accelerator": "cpu", "trainer.devices": 1}

    def optim(recipe: str) -> Optim:
        with torch.device("meta"):
            return zoo.load_recipe(f"preact_resnet/{recipe}", cpu)[0].optim

    paper, steps = optim("train_preact_resnet110_cifar10"), 50_000 // 128
    rates = {k: lr_at(paper, k / steps, 165, 0.1, 400 / steps) for k in (0, 399, 400, 31_999, 32_000, 47_999, 48_000)}
    assert list(rates.values()) == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001])
    code = optim("train_preact_resnet1001_batch64_cifar10")
    assert [lr_at(code, e - 1, 200, 0.1) for e in (80, 81, 121, 122)] == pytest.approx([0.1, 0.01, 0.01, 0.001])
    imagenet = optim("train_preact_resnet200_aspect_imagenet1k")
    assert [lr_at(imagenet, e - 1, 90, 0.1) for e in (30, 31, 60, 61)] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_every_row_s_options_build_the_network_it_speaks_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of an ablation names a recipe and one line of options: they must parse, and mean what the row says."""
    monkeypatch.chdir(tmp_path)
    rows = [row for row in catalog.paper("preact_resnet").leaderboard if "options" in row.protocol]
    assert len(rows) > 20
    # One row of each kind: the same options with another number parse alike.
    kinds = {(row.recipe, re.sub(r"-?[\d.]+( |$)", "# ", row.protocol["options"])): row for row in rows}
    for row in kinds.values():
        words = row.protocol["options"].split()
        overrides = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
        with torch.device("meta"):
            module_, data, _ = zoo.load_recipe(
                row.recipe, {"trainer.accelerator": "cpu", "trainer.devices": 1, **overrides}
            )
        unit = module_.network.stages[0][0]
        for key, value in overrides.items():
            option = key.rpartition(".")[2]
            if option in ("shortcut", "scale_x", "scale_f", "gate_bias", "dropout"):
                assert str(getattr(unit, option)).removesuffix(".0") == value.removesuffix(".0"), row.id
            elif option == "unit":
                assert unit.order == pr.UNITS[value], row.id
            elif option == "eval_transform":
                assert type(data.eval_transform).__name__ == "TenCrop"
