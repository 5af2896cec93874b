"""Runs the kinds of cases taken from fb.resnet.torch and resnet-1k-layers, and those of the paper's ablation units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.parity import Case, dtype_of, filled_inputs, filled_state, fit, load_filled
from zoo.recognition.preact_resnet import (
    PreActResNet,
    PreActResNetClassification,
    ResidualUnit,
    convert_official,
    preact_resnet_cifar,
    preact_resnet_imagenet,
)
from zoo.training import Optim

IMAGENET_EPOCHS_A_STEP, CIFAR_MILESTONES = 30, (80, 121)  # 0-based, as our epochs are


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
    options["shortcut_type"] = model.get("shortcutType") or "B"
    create = preact_resnet_imagenet if model["dataset"] == "imagenet" else preact_resnet_cifar
    return create(model["depth"], **options)


def network(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    net = load_filled(_create(config, case), case, convert_official).train(config.get("mode") == "train")
    logits = net(inputs["images"])  # type: ignore[operator]
    loss = cross_entropy(logits, inputs["labels"])
    loss.backward()
    return {"logits": logits, "loss": loss, "grad_stem": net.get_parameter("conv1.weight").grad}


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
        outputs[name] = unit.train(config.get("mode") == "train")(x)
    return outputs


class Batches(L.LightningDataModule):
    """The batches of a case in order; the same number to each of the epochs that are run."""

    def __init__(self, inputs: dict[str, Tensor], train: dict[str, Any]) -> None:
        super().__init__()
        self.inputs, self.train = inputs, train
        self.batch_size = train["batch_size"]

    def __len__(self) -> int:
        return self.train["iters_per_epoch"]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first = self.trainer.current_epoch * len(self)
        for k in range(first, first + len(self)):
            yield {"image": self.inputs[f"images_{k}"], "label": self.inputs[f"labels_{k}"]}

    def train_dataloader(self) -> Batches:
        return self


class Resumed(L.Callback):
    """Puts each epoch of the run where the case has it, and keeps the loss and the learning rate of each step."""

    def __init__(self, train: dict[str, Any]) -> None:
        self.epochs, self.length = train["epochs"], train["iters_per_epoch"]
        self.losses: list[Tensor] = []
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        scheduler.last_epoch = (self.epochs[trainer.current_epoch] - 1) * self.length - 1  # the case counts from 1
        scheduler.step()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def train_run(case: Case) -> dict[str, Tensor]:
    """The epochs of the case, each as if the run had been resumed there with its momentum."""
    config, inputs = case["config"], filled_inputs(case)
    model, train = config["model"], config["train"]
    last = max(train["epochs"])
    imagenet = model["dataset"] == "imagenet"
    steps = tuple(range(IMAGENET_EPOCHS_A_STEP, last, IMAGENET_EPOCHS_A_STEP)) if imagenet else CIFAR_MILESTONES
    optim = Optim(
        name="sgd",
        lr=train["lr"],
        momentum=train["momentum"],
        nesterov=True,
        weight_decay=train["weight_decay"],
        no_decay="none",
        schedule="step",
        interval="epoch",
        milestones=steps,
    )
    net = _create(model, case)
    module = PreActResNetClassification(num_classes=net.num_classes, optim=optim)
    module.network = net
    load_filled(net, case, convert_official)
    record = Resumed(train)
    fit(case, module, Batches(inputs, train), record, len(train["epochs"]))
    net.to(case["device"], dtype_of(case)).eval()
    tracked = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    ours = {official: _ours(official, case) for official in (*config["track"], *config["track_buffers"])}
    with torch.no_grad():
        logits = net(inputs["images_eval"])
    return {
        "loss": torch.stack(record.losses),
        "lr": torch.tensor(record.rates, dtype=torch.float64),
        **{f"param:{name}": tracked[ours[name]].detach() for name in config["track"]},
        **{f"buffer:{name}": tracked[ours[name]] for name in config["track_buffers"]},
        "eval_logits": logits,
    }


def _ours(official: str, case: Case) -> str:
    """Our name of an official key: where its tensor lands in the conversion of the whole state."""
    state = filled_state(case)
    (name,) = [key for key, value in convert_official(state).items() if value is state[official]]
    return name
