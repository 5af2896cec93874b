"""Runs the kinds of cases that were taken from facebookresearch/moco; everything else is read from the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.metrics.knn import knn_scores
from zoo.nn.batchnorm import SplitBatchNorm
from zoo.parity import Case, Official, by_entry, filled_inputs, filled_state, gradients, load_filled, named, train
from zoo.selfsup import moco
from zoo.selfsup.moco import convert_official
from zoo.training import Optim, lr_at

BLOCKS = {"BasicBlock": "resnet18", "Bottleneck": "resnet50"}


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the network that a case's config describes."""
    names = {"dim": "dim", "K": "queue_size", "m": "momentum", "T": "temperature"}
    options = {ours: config[theirs] for theirs, ours in names.items()}
    if "base_encoder" in config:
        base = config["base_encoder"]
        return {**options, "arch": BLOCKS[base["block"]], "layers": list(base["layers"])}
    return {**options, "arch": config["arch"], "small_images": True, "bn_splits": config["bn_splits"]}  # the CIFAR demo


def _network(case: Case) -> Any:
    config = case["config"]
    kind = moco.MoCoV2 if config.get("mlp") else moco.MoCo
    return load_filled(kind(**_options(config)), case, convert_official).train()


def _after(network: moco.MoCo, case: Case) -> dict[str, Tensor]:
    return named(case, convert_official, after=network.state_dict(), grad=gradients(network))


def step(case: Case) -> dict[str, Tensor]:
    if case["config"].get("world_size", 1) > 1:
        return several_ranks(case)
    inputs, network = filled_inputs(case), _network(case)
    logits = network.step(inputs["im_q"], inputs["im_k"], inputs["idx_shuffle"])
    loss = moco.info_nce(logits)
    loss.backward()
    return {"logits": logits, "labels": logits.new_zeros(len(logits)), "loss": loss, **_after(network, case)}


def several_ranks(case: Case) -> dict[str, Tensor]:
    """Every rank's own copy in turn, and what they would gather in between."""
    inputs, size = filled_inputs(case), case["config"]["world_size"]
    permutation, everyone = inputs["idx_shuffle"], range(size)
    networks = [_network(case) for _ in everyone]
    images = torch.cat([inputs[f"im_k_rank{rank}"] for rank in everyone])
    encoded = []
    for rank, network in enumerate(networks):
        network.update_key_encoder()
        encoded.append(network.key(images[moco.rank_rows(permutation, rank, size)]))
    keys = moco.unshuffled(torch.cat(encoded), permutation)
    official, outputs = Official(case, convert_official), {}
    for rank, (network, own) in enumerate(zip(networks, keys.chunk(size), strict=True)):
        logits = network.logits(network.query(inputs[f"im_q_rank{rank}"]), own)
        network.enqueue(keys)
        loss = moco.info_nce(logits)
        loss.backward()
        own_state, own_gradients = network.state_dict(), gradients(network)
        outputs |= {f"logits_rank{rank}": logits, f"loss_rank{rank}": loss}
        for output in (name for name in case["outputs"] if name.endswith(f"_rank{rank}") and name not in outputs):
            kind, _, name = output.removesuffix(f"_rank{rank}").rpartition(":")
            outputs[output] = official.take(name, own_gradients if kind == "grad" else own_state)
    return {**outputs, **_after(networks[0], case)}


def demo(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    task = moco.MoCoPretraining(**_options(config), symmetric=config["symmetric"])
    load_filled(task.network, case, convert_official)
    names = sorted(name for name in inputs if name.startswith("idx_shuffle"))
    permutation = torch.cat([inputs[name] for name in names[: 1 + config["symmetric"]]])
    loss = task.training_step({"views": [inputs["im1"], inputs["im2"]], "permutation": permutation}, 0)
    loss.backward()
    return {"loss": loss, **_after(task.network, case)}


def queue_cycle(case: Case) -> dict[str, Tensor]:
    state, inputs, outputs = filled_state(case), filled_inputs(case), {}
    for k in range(case["config"]["enqueues"]):
        moco.enqueue(state["queue"], state["queue_ptr"], inputs[f"keys_{k}"])
        outputs |= {f"queue_{k}": state["queue"].clone(), f"ptr_{k}": state["queue_ptr"].clone()}
    return outputs


def split_batchnorm(case: Case) -> dict[str, Tensor]:
    config, x = case["config"], filled_inputs(case)["x"]
    layer: Any = load_filled(SplitBatchNorm(config["num_features"], config["num_splits"]), case, lambda state: state)
    trained = layer.train()(x)
    after = {f"{name}_after": value.clone() for name, value in layer.state_dict().items()}
    return {"train_output": trained, "eval_output": layer.eval()(x), **after}


def knn_predict(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    arguments = (inputs[name] for name in ("feature", "feature_bank", "feature_labels"))
    scores = knn_scores(*arguments, config["classes"], config["knn_k"], config["knn_t"])
    ranking = scores.argsort(dim=1, descending=True, stable=True)
    return {"top1": ranking[:, 0], **{f"top{k}": ranking[:, :k] for k in range(2, config["classes"] + 1)}}


def _optim(settings: dict[str, Any]) -> Optim:
    schedule: dict[str, Any] = {"schedule": "cosine"}
    if not settings["cos"]:
        schedule = {"schedule": "step", "milestones": tuple(settings["schedule"])}
    own = {"momentum": 0.9, "weight_decay": 1e-4}  # of main_moco.py
    schedule |= {name: settings.get(name, value) for name, value in own.items()}
    return Optim(name="sgd", lr=settings["lr"], no_decay="none", interval="epoch", **schedule)


def lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    rates = [lr_at(_optim(config), epoch, config["epochs"], config["lr"]) for epoch in range(config["epochs"])]
    return {"lr_per_epoch": torch.tensor(rates, dtype=torch.float64)}


def _pair(inputs: dict[str, Tensor], k: int) -> dict[str, Any]:
    return {"views": [inputs["im_q"], inputs["im_k"]], "permutation": inputs["idx_shuffle"]}


def train_run(case: Case) -> dict[str, Tensor]:
    model = case["config"]["model"]
    kind = moco.MoCoV2Pretraining if model.get("mlp") else moco.MoCoPretraining
    task = kind(**_options(model), optim=_optim(case["config"]["train"]))
    evaluated = filled_inputs(case)["im_eval"]
    return train(case, task, convert_official, _pair, after=lambda: {"eval_query": task.network(evaluated)})


run = by_entry(
    {
        "moco.builder.MoCo": step,
        "moco.builder.MoCo._dequeue_and_enqueue": queue_cycle,
        "main_moco.adjust_learning_rate": lr_schedule,
        "main_moco.train + main_moco.adjust_learning_rate": train_run,
        "colab/moco_cifar10_demo.ipynb:ModelMoCo": demo,
        "colab/moco_cifar10_demo.ipynb:SplitBatchNorm": split_batchnorm,
        "colab/moco_cifar10_demo.ipynb:knn_predict": knn_predict,
    }
)
