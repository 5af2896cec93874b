"""Runs the kinds of cases that were taken from the two official MeanFlow codes, JAX and PyTorch; everything else is
read from the case. Arrays of the JAX code have the channels last."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zoo.generation.meanflow import (
    AVERAGES,
    ClassConditionalMeanFlow,
    Guidance,
    TimePairs,
    UnconditionalMeanFlow,
    convert_official,
    steps,
)
from zoo.nn.autoencoder import SD_SCALE
from zoo.parity import Case, dtype_of, filled_inputs, filled_state, fit, load_filled
from zoo.training import EMA, Optim


def run(case: Case) -> dict[str, Tensor]:
    return KINDS[case["official"]["entry"]](case)


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x))


# ----------------------------------------------------------------------------------------------------- transformer, JAX


def _transformer_task(case: Case, **options: Any) -> ClassConditionalMeanFlow:
    net, method = case["config"]["net"], case["config"].get("method", {})
    guided = method.get("guidance_eq", "cfg") == "cfg"
    guidance = {"omega": 1.0, "kappa": 0.5, "t_start": 0.0, "t_end": 1.0}
    task = ClassConditionalMeanFlow(
        model=None,
        img_size=net["input_size"],
        patch_size=net["patch_size"],
        in_chans=net["in_channels"],
        embed_dim=net["hidden_size"],
        depth=net["depth"],
        num_heads=net["num_heads"],
        mlp_ratio=net["mlp_ratio"],
        num_classes=net["num_classes"],
        guidance=Guidance(**{key: method.get(key, value) for key, value in guidance.items()}) if guided else None,
        label_dropout=method.get("class_dropout_prob", 0.1),
        pairs=TimePairs(
            distribution=method.get("noise_dist", "logit_normal"),
            mean=method.get("P_mean", -0.4),
            std=method.get("P_std", 1.0),
            equal=method.get("data_proportion", 0.75),
        ),
        loss_power=method.get("norm_p", 1.0),
        loss_eps=method.get("norm_eps", 0.01),
        **options,
    )
    load_filled(task.network, case, convert_official)
    return task


def _by_flax_name(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters or gradients of ours under the names, and in the layout, of the case's state."""
    found = {}
    for theirs, entry in case["state"].items():
        (ours,) = convert_official({theirs: torch.empty(entry["shape"])})
        value = tensors[ours]
        if theirs.endswith("kernel"):
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T
        found[theirs] = value
    return found


def dit_forward(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _transformer_task(case)
    with torch.no_grad():
        out = task.network(_channels_first(inputs["x"]), (inputs["t"], inputs["h"]), inputs["y"])
    return {"out": _channels_last(out)}


def sample_steps(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _transformer_task(case)
    with torch.no_grad():
        states = steps(task.network, _channels_first(inputs["z"]), inputs["labels"], case["config"]["t_steps"])
        return {f"z_{k}": _channels_last(z) for k, z in enumerate(states, start=1)}


def _pinned(inputs: dict[str, Tensor], suffix: str = "") -> dict[str, Tensor]:
    """The draws of a step, as a batch of ours names them."""
    return {
        "noise": _channels_first(inputs[f"noise_e{suffix}"]),
        "noise_t": _flat(inputs[f"noise_t{suffix}"]),
        "noise_r": _flat(inputs[f"noise_r{suffix}"]),
    }


def train_loss(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _transformer_task(case)
    batch = {"image": _channels_first(inputs["imgs"]), "label": inputs["labels"], "drop": inputs["drop_uniform"]}
    out = task.loss({**batch, **_pinned(inputs)})
    out.loss.backward()
    ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in task.network.named_parameters()}
    gradients = _by_flax_name(case, ours)
    return {
        "loss": out.loss,
        "v_loss": out.velocity_error,
        "grad_l2_all": torch.stack([g.norm() for g in gradients.values()]).norm(),
        **{f"grad:{name}": gradient for name, gradient in gradients.items()},
    }


# ------------------------------------------------------------------------------------------------------ U-Net, PyTorch


def _unet_options(case: Case) -> dict[str, Any]:
    config = case["config"]
    net, args = config["net"], config["args"]
    official = {"resample_filter": [1, 3, 3, 1], "channel_mult_noise": 2}
    official |= {"encoder_type": "standard", "decoder_type": "standard", "embedding_type": "positional"}
    if odd := [key for key, value in official.items() if net.get(key, value) != value]:
        raise ValueError(f"a network that MeanFlow does not have: {odd}")
    same = ("model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout")
    return {
        **{key: net[key] for key in same if key in net},
        "model": None,
        "img_size": net["img_resolution"],
        "in_chans": net["in_channels"],
        "augment_dim": net.get("augment_dim", 0),
        "augment": 0.0,
        "pairs": TimePairs(
            mean=args["P_mean_t"],
            std=args["P_std_t"],
            mean_r=args["P_mean_r"],
            std_r=args["P_std_r"],
            equal=1 - args["ratio"],
            equal_by="chance",
            order="sort" if args["tr_sampler"] == "v0" else "clamp",
        ),
        "loss_power": args["norm_p"],
        "loss_eps": args["norm_eps"],
    }


def _only(case: Case, name: str) -> Case:
    """The case with one of the sets of weights of its state, and not the count of updates."""
    return {**case, "state": {key: entry for key, entry in case["state"].items() if key.startswith(f"{name}.")}}


def _unet_task(case: Case, **options: Any) -> UnconditionalMeanFlow:
    task = UnconditionalMeanFlow(**_unet_options(case), **options)
    load_filled(task.network, _kept_in_our_names(_only(case, "net")), convert_official)
    return task


def _kept_in_our_names(case: Case) -> Case:
    """load_filled looks for the kept entries under our names."""
    kept = {key: entry for key, entry in case["state"].items() if entry["rule"] == "keep"}
    renamed = {next(iter(convert_official({key: torch.empty(0)}))): entry for key, entry in kept.items()}
    return {**case, "state": {**case["state"], **renamed}}


def unet_forward(case: Case) -> dict[str, Tensor]:
    inputs, network = filled_inputs(case), _unet_task(case).network.eval()
    with torch.no_grad():
        return {"u": network(inputs["x"], (inputs["t"], inputs["h"]), inputs.get("aug_cond"))}


def _chance(batch: dict[str, Tensor], inputs: dict[str, Tensor], suffix: str = "") -> dict[str, Tensor]:
    augment = {"augment": inputs[f"aug_cond{suffix}"]} if f"aug_cond{suffix}" in inputs else {}
    return {**batch, **_pinned_flat(inputs, suffix), **augment, "chance": inputs[f"ratio_uniform{suffix}"]}


def _pinned_flat(inputs: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {
        "noise": inputs[f"noise_e{suffix}"],
        "noise_t": inputs[f"noise_t{suffix}"],
        "noise_r": inputs[f"noise_r{suffix}"],
    }


def _official(name: str, prefix: str = "net") -> str:
    return f"{prefix}.{name}"


def unet_loss(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _unet_task(case).train()
    out = task.loss(_chance({"image": inputs["x"]}, inputs))
    out.loss.backward()
    gradients = {_official(name): p.grad for name, p in task.network.named_parameters() if p.grad is not None}
    return {"loss": out.loss, **{f"grad:{name}": gradient for name, gradient in gradients.items()}}


def _averages(case: Case) -> dict[str, EMA]:
    args = case["config"]["args"]
    decays = dict(zip(AVERAGES, [args["ema_decay"], *args["ema_decays"]], strict=False))
    return {name: EMA(decay, every_n_steps=16, per_step=True, name=name) for name, decay in decays.items()}


def unet_ema(case: Case) -> dict[str, Tensor]:
    inputs, task = filled_inputs(case), _unet_task(case)
    averages, outputs = _averages(case), {}
    for ema in averages.values():
        ema.start(task)
    wanted = [(key, *re.fullmatch(r"ema(\d*)_(\d+)", key).groups()) for key in case["outputs"]]  # type: ignore[union-attr]
    for step in range(1, 1 + max(int(step) for _, _, step in wanted)):
        with torch.no_grad():
            task.network.map_layer0.weight += inputs["delta"]
        for ema in averages.values():
            ema.step(task)
        for key, which, at in wanted:
            if int(at) == step:
                outputs[key] = averages[f"net_ema{which}"].weights["network.map_layer0.weight"].clone()
    return outputs


# ------------------------------------------------------------------------------------------- whole runs, by the trainer


class Batches(L.LightningDataModule):
    """The batches of a case in order, so many to an epoch."""

    def __init__(self, batches: list[dict[str, Tensor]], length: int) -> None:
        super().__init__()
        self.batches, self.length, self.batch_size = batches, length, len(batches[0]["image"])

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first = self.trainer.current_epoch * self.length  # type: ignore[union-attr]
        yield from self.batches[first : first + self.length]

    def train_dataloader(self) -> Batches:
        return self


class Record(L.Callback):
    """What every step gives and its learning rate; ends the run after so many."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.outputs: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.outputs.append({key: value.detach() for key, value in outputs.items()})
        trainer.should_stop = len(self.outputs) >= self.iterations

    def stacked(self, key: str) -> Tensor:
        return torch.stack([output[key] for output in self.outputs])


def _network_part(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): value for name, value in weights.items() if name.startswith("network.")}


def train_run(case: Case) -> dict[str, Tensor]:
    train, inputs = case["config"]["train"], filled_inputs(case)
    optim = Optim(
        lr=train["learning_rate"],
        betas=(train.get("adam_b1", 0.9), train["adam_b2"]),
        weight_decay=train.get("weight_decay", 0.0),
        no_decay="none",
        schedule="constant",
    )
    task = _transformer_task(case, optim=optim)
    batches = []
    for k in range(train["iterations"]):
        mean, std = _channels_first(inputs[f"cached_{k}"]).chunk(2, dim=1)
        latent = (mean + std * _channels_first(inputs[f"vae_noise_{k}"])) * SD_SCALE
        drawn = {**_pinned(inputs, f"_{k}"), "drop": inputs[f"drop_uniform_{k}"]}
        batches.append({"image": latent, "label": inputs[f"labels_{k}"], **drawn})
    ema, record = EMA(train["ema_val"]), Record(train["iterations"])
    fit(case, task, Batches(batches, len(batches)), record, 1, also=[ema])
    raw = _by_flax_name(case, dict(task.network.state_dict()))
    averaged = _network_part(ema.weights)
    outputs = {
        "loss": record.stacked("loss"),
        "v_loss": record.stacked("velocity_error"),
        "lr": torch.tensor(record.rates, dtype=torch.float64),
        **{f"param:{name}": value.detach().clone() for name, value in raw.items()},
        **{f"ema:{name}": value for name, value in _by_flax_name(case, averaged).items()},
    }
    network = task.network.to(case["device"], dtype_of(case))
    network.load_state_dict(averaged)
    one_step = network.sample(_channels_first(inputs["z_eval"]), inputs["labels_eval"])
    return {**outputs, "ema_sample_1step": _channels_last(one_step)}


def train_run_unet(case: Case) -> dict[str, Tensor]:
    train, inputs, state = case["config"]["train"], filled_inputs(case), filled_state(case)
    optim = Optim(
        lr=train["lr"],
        betas=tuple(train["betas"]),
        weight_decay=0.0,
        schedule="constant",
        warmup_epochs=train["warmup_epochs"],
    )
    task = _unet_task(case, optim=optim)
    averages = _averages(case)
    for name, ema in averages.items():
        ema.start(task)
        converted = convert_official({key: value for key, value in state.items() if key.startswith(f"{name}.")})
        ema.weights |= {f"network.{key}": value.clone() for key, value in converted.items()}
        ema.steps = int(state["num_updates"])
    batches = [_chance({"image": 2 * inputs[f"images_{k}"] - 1}, inputs, f"_{k}") for k in range(train["iterations"])]
    record = Record(train["iterations"])
    fit(case, task, Batches(batches, train["iters_per_epoch"]), record, train["epochs"], also=averages.values())
    raw = {_official(name): p.detach().clone() for name, p in task.network.named_parameters()}
    outputs = {
        "loss": record.stacked("loss"),
        "lr": torch.tensor(record.rates, dtype=torch.float64),
        "num_updates": torch.tensor(averages[AVERAGES[0]].steps),
        **{f"param:{name}": value for name, value in raw.items()},
        **{
            f"ema:{_official(name, average)}": value
            for average, ema in averages.items()
            for name, value in _network_part(ema.weights).items()
        },
    }
    network = task.network.to(case["device"], dtype_of(case)).eval()
    network.load_state_dict(_network_part(averages[AVERAGES[0]].weights))
    with torch.no_grad():
        times = (inputs["t_eval"], inputs["h_eval"])
        return {**outputs, "ema_u": network(inputs["x_eval"], times, inputs.get("aug_cond_eval"))}


KINDS = {
    "models.models_dit.DiT.__call__": dit_forward,
    "meanflow.MeanFlow.sample_one_step": sample_steps,
    "meanflow.MeanFlow.forward": train_loss,
    "train.train_step_with_vae (state as create_train_state builds it)": train_run,
    "models.unet.SongUNet.forward": unet_forward,
    "models.meanflow.MeanFlow.forward_with_loss": unet_loss,
    "models.ema.update_ema_net": unet_ema,
    "training.train_loop.train_one_epoch (as train.main sets it up)": train_run_unet,
}
