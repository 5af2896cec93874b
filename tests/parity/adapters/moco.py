"""Runs the kinds of cases that were taken from facebookresearch/moco; everything else is read from the case."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zoo.metrics.knn import knn_scores
from zoo.nn.batchnorm import SplitBatchNorm
from zoo.parity import Case, dtype_of, filled_inputs, filled_state, fit, load_filled
from zoo.selfsup.moco import (
    MoCo,
    MoCoPretraining,
    MoCoV2,
    MoCoV2Pretraining,
    convert_official,
    enqueue,
    info_nce,
    rank_rows,
    unshuffled,
)
from zoo.training import Optim, lr_at

BLOCKS = {"BasicBlock": "resnet18", "Bottleneck": "resnet50"}


def run(case: Case) -> dict[str, Tensor]:
    entry = case["official"]["entry"]
    if entry == "moco.builder.MoCo" and case["config"].get("world_size", 1) > 1:
        return several_ranks(case)
    return KINDS[entry](case)


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the network that a case's config describes."""
    options: dict[str, Any] = {
        "dim": config["dim"],
        "queue_size": config["K"],
        "momentum": config["m"],
        "temperature": config["T"],
    }
    if "arch" in config:  # the CIFAR-10 demo
        return {**options, "arch": config["arch"], "small_images": True, "bn_splits": config["bn_splits"]}
    base = config["base_encoder"]
    return {**options, "arch": BLOCKS[base["block"]], "layers": list(base["layers"])}


def _network(case: Case) -> Any:
    config = case["config"]
    network = (MoCoV2 if config.get("mlp") else MoCo)(**_options(config))
    return load_filled(network, case, convert_official)


def _after(network: MoCo, case: Case) -> dict[str, Tensor]:
    """State dict entries and gradients under the names of the case's own state dict."""
    names = {ours: theirs for theirs in case["state"] for ours in convert_official({theirs: torch.empty(0)})}
    state = {names[key]: value for key, value in network.state_dict().items() if key in names}
    gradients = {names[key]: p.grad for key, p in network.named_parameters() if p.grad is not None}
    return {
        **{f"after:{name}": value for name, value in state.items()},
        **{f"grad:{name}": value for name, value in gradients.items()},
    }


def step(case: Case) -> dict[str, Tensor]:
    inputs, network = filled_inputs(case), _network(case).train()
    logits = network.step(inputs["im_q"], inputs["im_k"], inputs["idx_shuffle"])
    loss = info_nce(logits)
    loss.backward()
    return {"logits": logits, "labels": logits.new_zeros(len(logits)), "loss": loss, **_after(network, case)}


def several_ranks(case: Case) -> dict[str, Tensor]:
    """Every rank's own copy in turn, and what they would gather in between."""
    inputs, size = filled_inputs(case), case["config"]["world_size"]
    networks = [_network(case).train()]
    networks += [copy.deepcopy(networks[0]) for _ in range(size - 1)]
    permutation, everyone = inputs["idx_shuffle"], range(size)
    images = torch.cat([inputs[f"im_k_rank{rank}"] for rank in everyone])
    encoded = []
    for rank, network in enumerate(networks):
        network.update_key_encoder()
        encoded.append(network.key(images[rank_rows(permutation, rank, size)]))
    keys = unshuffled(torch.cat(encoded), permutation)
    outputs: dict[str, Tensor] = {}
    for rank, (network, own) in enumerate(zip(networks, keys.chunk(size), strict=True)):
        logits = network.logits(network.query(inputs[f"im_q_rank{rank}"]), own)
        network.enqueue(keys)
        loss = info_nce(logits)
        loss.backward()
        after = _after(network, case)
        outputs |= {f"logits_rank{rank}": logits, f"loss_rank{rank}": loss}
        outputs |= {f"{name.removeprefix('after:')}_rank{rank}": value for name, value in after.items()}
        if rank == 0:
            outputs |= after
    return outputs


def demo(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    task = MoCoPretraining(**_options(config), symmetric=config["symmetric"])
    load_filled(task.network, case, convert_official)
    names = sorted(name for name in inputs if name.startswith("idx_shuffle"))
    permutation = torch.cat([inputs[name] for name in names[: 1 + config["symmetric"]]])
    loss = task.training_step({"views": [inputs["im1"], inputs["im2"]], "permutation": permutation}, 0)
    loss.backward()
    return {"loss": loss, **_after(task.network, case)}


def queue_cycle(case: Case) -> dict[str, Tensor]:
    state, inputs, outputs = filled_state(case), filled_inputs(case), {}
    for k in range(case["config"]["enqueues"]):
        enqueue(state["queue"], state["queue_ptr"], inputs[f"keys_{k}"])
        outputs |= {f"queue_{k}": state["queue"].clone(), f"ptr_{k}": state["queue_ptr"].clone()}
    return outputs


def split_batchnorm(case: Case) -> dict[str, Tensor]:
    config, x = case["config"], filled_inputs(case)["x"]
    layer: Any = load_filled(SplitBatchNorm(config["num_features"], config["num_splits"]), case, lambda state: state)
    trained = layer.train()(x)
    return {
        "train_output": trained,
        "running_mean_after": layer.running_mean.clone(),
        "running_var_after": layer.running_var.clone(),
        "eval_output": layer.eval()(x),
    }


def knn_predict(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    scores = knn_scores(
        inputs["feature"],
        inputs["feature_bank"],
        inputs["feature_labels"],
        config["classes"],
        config["knn_k"],
        config["knn_t"],
    )
    ranking = scores.argsort(dim=1, descending=True, stable=True)
    return {"top1": ranking[:, 0], **{f"top{k}": ranking[:, :k] for k in range(2, config["classes"] + 1)}}


def _optim(train: dict[str, Any]) -> Optim:
    return Optim(
        name="sgd",
        lr=train["lr"],
        momentum=train.get("momentum", 0.9),
        weight_decay=train.get("weight_decay", 1e-4),
        no_decay="none",
        schedule="cosine" if train["cos"] else "step",
        interval="epoch",
        milestones=tuple(train["schedule"]),
    )


def lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    rates = [lr_at(_optim(config), epoch, config["epochs"], config["lr"]) for epoch in range(config["epochs"])]
    return {"lr_per_epoch": torch.tensor(rates, dtype=torch.float64)}


# ------------------------------------------------------------------------------------------- whole runs, by the trainer


class Batches(L.LightningDataModule):
    """The batches of a case in order, `iters_per_epoch` to an epoch, under the names of our batches."""

    def __init__(self, inputs: dict[str, Tensor], train: dict[str, Any]) -> None:
        super().__init__()
        self.inputs, self.length, self.batch_size = inputs, train["iters_per_epoch"], train["batch_size"]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = self.trainer.current_epoch * self.length
        for k in range(first, first + self.length):
            views = [self.inputs[f"im_q_{k}"], self.inputs[f"im_k_{k}"]]
            yield {"views": views, "permutation": self.inputs[f"idx_shuffle_{k}"]}

    def train_dataloader(self) -> Batches:
        return self


class Record(L.Callback):
    """The loss and the learning rate of every step; ends the run after so many."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.losses: list[Tensor] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        trainer.should_stop = len(self.losses) >= self.iterations


def train_run(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    train = config["train"]
    kind = MoCoV2Pretraining if config["model"].get("mlp") else MoCoPretraining
    task = kind(**_options(config["model"]), optim=_optim(train))
    load_filled(task.network, case, convert_official)
    record = Record(train["iterations"])
    fit(case, task, Batches(inputs, train), record, train["epochs"])
    network = task.network.to(case["device"], dtype_of(case)).eval()
    after = {name.removeprefix("after:"): value for name, value in _after(network, case).items()}
    with torch.no_grad():
        query = network(inputs["im_eval"])
    return {
        "loss": torch.stack(record.losses),
        "lr": torch.tensor(record.rates, dtype=torch.float64),
        "eval_query": query,
        **{f"{kind}:{name}": value for name, value in after.items() for kind in ("param", "ema", "buffer")},
    }


KINDS = {
    "moco.builder.MoCo": step,
    "moco.builder.MoCo._dequeue_and_enqueue": queue_cycle,
    "main_moco.adjust_learning_rate": lr_schedule,
    "main_moco.train + main_moco.adjust_learning_rate": train_run,
    "colab/moco_cifar10_demo.ipynb:ModelMoCo": demo,
    "colab/moco_cifar10_demo.ipynb:SplitBatchNorm": split_batchnorm,
    "colab/moco_cifar10_demo.ipynb:knn_predict": knn_predict,
}
