"""Runs the kinds of cases taken from fb.resnet.torch and resnet-1k-layers, and those of the paper's ablation units."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.parity import Case, Official, dtype_of, filled_inputs, filled_state, gradients, load_filled, named, train
from zoo.recognition.preact_resnet import (
    PreActResNet,
    PreActResNetClassification,
    ResidualUnit,
    convert_official,
    preact_resnet_cifar,
    preact_resnet_imagenet,
)
from zoo.training import Optim

IMAGENET_EPOCHS_A_STEP, CIFAR_MILESTONES = 30, (80, 121)  # of train.lua, 0-based as our epochs are


def run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    return units(case) if "units" in config else train_run(case) if "train" in config else network(case)


def _create(model: dict[str, Any], case: Case) -> PreActResNet:
    """The network of an official file and its options; the number of classes is that of the case's last layer."""
    shapes = {key: entry["shape"] for key, entry in case["state"].items()}
    (classes,) = {shape[0] for shape in shapes.values() if len(shape) == 2}
    options: dict[str, Any] = {"num_classes": classes, "in_chans": shapes["0.weight"][1]}
    if model["file"].endswith("resnet-pre-act.lua"):  # it has no shortcut types
        return preact_resnet_cifar(model["depth"], "bottleneck", **options)
    options["shortcut_type"] = model.get("shortcutType") or "B"  # preresnet.lua's own default
    create = preact_resnet_imagenet if model["dataset"] == "imagenet" else preact_resnet_cifar
    return create(model["depth"], **options)


def network(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    net: Any = load_filled(_create(config, case), case, convert_official).train(config["mode"] == "train")
    logits = net(inputs["images"])
    loss = cross_entropy(logits, inputs["labels"])
    loss.backward()
    found = {"grad": gradients(net), "buffer": net.state_dict(), "after": net.state_dict()}
    stem = Official(case, convert_official).take("0.weight", found["grad"])
    return {"logits": logits, "loss": loss, "grad_stem": stem, **named(case, convert_official, **found)}


def units(case: Case) -> dict[str, Tensor]:
    config, state = case["config"], filled_state(case)
    x = filled_inputs(case)["x"]
    outputs = {}
    for row in config["units"]:
        name = f"{row['unit']}__{row['shortcut']}"
        unit = ResidualUnit(config["channels"], (config["channels"],) * 2, **row).to(x.device, dtype_of(case))
        own = {key.removeprefix(f"unit.{name}."): v for key, v in state.items() if key.startswith(f"unit.{name}.")}
        if "gate.bias" in own:  # the case adds the constant b_g to the filled bias; ours starts there
            own["gate.bias"] = own["gate.bias"] + unit.gate_bias
        report = unit.load_state_dict(own, strict=False)
        assert not report.unexpected_keys, report
        assert all(key.endswith("num_batches_tracked") for key in report.missing_keys), report
        outputs[name] = unit.train(config["mode"] == "train")(x)
    return outputs


def train_run(case: Case) -> dict[str, Tensor]:
    """The epochs of the case, each as if the run had been resumed there with its momentum."""
    model, settings = case["config"]["model"], case["config"]["train"]
    epochs = [epoch - 1 for epoch in settings["epochs"]]  # the case counts from 1
    steps = range(IMAGENET_EPOCHS_A_STEP, max(epochs) + 1, IMAGENET_EPOCHS_A_STEP)
    optim = Optim(
        name="sgd",
        lr=settings["lr"],
        momentum=settings["momentum"],
        nesterov=True,
        weight_decay=settings["weight_decay"],
        no_decay="none",
        schedule="step",
        interval="epoch",
        milestones=tuple(steps) if model["dataset"] == "imagenet" else CIFAR_MILESTONES,
    )
    net = _create(model, case)
    task = PreActResNetClassification(depths=[1], widths=[1], num_classes=net.num_classes, optim=optim)
    task.network = net

    def after() -> dict[str, Tensor]:
        return {"eval_logits": net(filled_inputs(case)["images_eval"])}

    return train(case, task, convert_official, {"images": "image", "labels": "label"}, epochs=epochs, after=after)
