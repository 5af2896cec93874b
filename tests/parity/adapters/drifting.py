"""Runs the kinds of cases that were taken from the official Drifting code (JAX), whose arrays have the channels last;
everything else is read from the case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.generation import drifting as dr
from zoo.generation.drifting_encoder import FrozenFeatures
from zoo.nn.resnet_mae import FeatureSet, MAEResNet
from zoo.parity import Case, by_entry, filled_inputs, gradients, load_filled, named, train
from zoo.training import EMA, Optim
from zoo.training.bank import SampleBank
from zoo.training.optim import lr_at, make_optimizer, param_groups

GENERATOR = {"input_size": "img_size", "in_channels": "in_chans", "hidden_size": "embed_dim"}
GENERATOR |= {"n_cls_tokens": "context_tokens", "noise_coords": "style_tokens", "noise_classes": "num_styles"}
GENERATOR |= {name: name for name in ("patch_size", "depth", "num_heads", "mlp_ratio", "num_classes")}
SCHEDULE = "utils.model_builder.create_learning_rate_fn"
# What the official generator could be, and the published ones are.
FIXED = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
ENCODER = {"in_channels": "in_chans", "base_channels": "width", "patch_size": "mask_patch", "layers": "layers"}
ENCODER |= {"num_classes": "num_classes", "input_patch_size": "input_patch"}


def _first(x: Tensor) -> Tensor:
    return x.movedim(-1, -3).contiguous()


def _last(x: Tensor) -> Tensor:
    return x.movedim(-3, -1)


def _renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: given[theirs] for theirs, ours in names.items()}


def _part(case: Case, part: str) -> Case:
    """The case with the state of a part alone; without parts, whole."""
    state = case["state"]
    if not any(key.startswith(("gen/", "mae/")) for key in state):
        return case
    return {**case, "state": {key: entry for key, entry in state.items() if key.startswith(f"{part}/")}}


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dr.convert_official({key.removeprefix("gen/").removeprefix("mae/"): value for key, value in state.items()})


def _network(net: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {**FIXED, "cond_dim": net["hidden_size"], "out_channels": net["in_channels"]}
    if odd := [name for name, value in fixed.items() if net[name] != value]:
        raise ZooError(f"a generator that Drifting does not have: {odd}")
    styles = {} if net["noise_classes"] else {"style_tokens": 0}  # none are drawn, whatever their number
    return _renamed(net, GENERATOR) | styles


def _feature_set(given: Mapping[str, Any]) -> FeatureSet:
    """What is not said is a default of the official function, which are ours."""
    every = given.get("every_k_block", 2)
    sides = {f"patch_{kind}s": tuple(given.get(f"patch_{kind}_size", (2, 4)) or ()) for kind in ("mean", "std")}
    whole = {kind: given.get(f"use_{kind}", True) for kind in ("mean", "std")}
    return FeatureSet(**whole, **sides, every_blocks=int(every) if every and 1 <= every < float("inf") else 0)


def _encoder(case: Case, net: Mapping[str, Any]) -> MAEResNet:
    if net.get("dropout_prob", 0.0):
        raise ZooError("an encoder that Drifting does not have: it drops out")
    network = MAEResNet(**_renamed(net, ENCODER))
    load_filled(network, _part(case, "mae"), _convert)
    return network


# ------------------------------------------------------------------------------------------------------------ functions


def bank_and_schedules(case: Case) -> dict[str, Tensor]:
    inputs, config = filled_inputs(case), case["config"]
    bank = SampleBank(config["num_classes"], config["max_size"])
    for samples, labels in zip(inputs["samples"], config["labels"], strict=True):
        bank.push(samples, torch.tensor(labels))
    assert bank.samples is not None
    outputs = {"bank": bank.samples, "ptr": bank.pointer, "count": bank.count}
    optim = Optim(lr=config["lr"], schedule="constant", warmup_start_lr=1e-6)
    rates = [lr_at(optim, step, max(config["steps"]), config["lr"], config["warmup"]) for step in config["steps"]]
    outputs["lr"] = torch.tensor(rates)
    uniform = inputs["cfg_uniform"]
    for power in config["neg_cfg_pw"]:
        drawn = dr.AlphaDistribution(config.get("cfg_min", 1.0), config.get("cfg_max", 4.0), power).draw(
            uniform, torch.ones_like(uniform)
        )
        outputs[f"alpha_pw{power}"] = drawn
    return outputs


def drift_loss(case: Case) -> dict[str, Tensor]:
    inputs = filled_inputs(case)
    gen = inputs["gen"].requires_grad_()
    others = [inputs.get(name) for name in ("pos", "neg", "weight_gen", "weight_pos", "weight_neg")]
    field = dr.Field(temperatures=tuple(case["config"]["R_list"]))
    drift = dr.drift_loss(gen, *others, field=field)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(drift.loss.sum(), gen)
    forces = {f"info:loss_{t}": size for t, size in drift.forces.items()}
    return {"loss": drift.loss, "grad_gen": gradient, "info:scale": drift.scale, **forces}


# ------------------------------------------------------------------------------------------------------------- networks


def generator(case: Case) -> dict[str, Tensor]:
    inputs, config = filled_inputs(case), case["config"]
    network = dr.DriftingGenerator(**_network(config["net"]))
    load_filled(network, case, _convert)
    with torch.no_grad():
        noise = _first(inputs["noise"]) * config["temp"]
        return {"samples": _last(network(noise, inputs.get("style"), inputs["c"], inputs["cfg_scale"]))}


def mae_features(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    network = _encoder(case, config["net"])
    with torch.no_grad():
        which = _feature_set(config["activation_kwargs"])
        return network.features(_first(filled_inputs(case)["x"]), which)


def mae_loss(case: Case) -> dict[str, Tensor]:
    inputs, config = filled_inputs(case), case["config"]
    network, forward = _encoder(case, config["net"]), config["forward"]
    low, high = forward["mask_ratio_min"], forward["mask_ratio_max"]
    ratio = low + (high - low) * inputs["ratio_uniform"]
    images = _first(inputs["x"])
    out, _ = network.loss(images, inputs["labels"], inputs["mask_uniform"], ratio, forward["lambda_cls"])
    out.loss.mean().backward()
    values = {"loss": out.loss, "recon_loss": out.reconstruction, "cls_loss": out.classification}
    values |= {"mask_ratio": out.hidden, "accuracy": out.correct.double()}
    return values | named(_part(case, "mae"), _convert, grad=gradients(network))


# ------------------------------------------------------------------------------------------------------------- training


def _task(case: Case, optim: Optim, temperatures: Any) -> dr.Drifting:
    config = case["config"]
    forward, which = config["forward_dict"], _feature_set(config["activation_kwargs"])
    alpha = dr.AlphaDistribution(
        forward["cfg_min"], forward["cfg_max"], forward["neg_cfg_pw"], forward.get("no_cfg_frac", 0.0)
    )
    sets, field = dr.Sets(generated=forward["gen_per_label"]), dr.Field(temperatures=tuple(temperatures))
    options: dict[str, Any] = {"field": field, "alpha": alpha, "sets": sets, "features": which, "optim": optim}
    task = dr.Drifting(**options, **_network(config["net"]))
    load_filled(task.network, _part(case, "gen"), _convert)
    encoder = _encoder(case, config["mae"])
    task.features = FrozenFeatures(encoder, which, encoder.in_chans)
    return task


def _batch(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    real = {"positives": _first(inputs["positives"]), "unconditional": _first(inputs["negatives"])}
    drawn = {"alpha_uniform": inputs["cfg_uniform"], "plain_uniform": inputs["nocfg_uniform"]}
    drawn |= {"noise": _first(inputs["noise"]), "styles": inputs["style"]}
    return {"image": real["positives"][:, 0], "label": inputs["labels"], **real, **drawn}


def _optim(settings: Mapping[str, Any], schedule: Any = "constant", **options: Any) -> Optim:
    return Optim(weight_decay=settings["weight_decay"], no_decay="none", schedule=schedule, **options)


def train_step(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    task = _task(case, _optim(config, lr=config["lr"]), config["R_list"])
    optimizer = make_optimizer(param_groups(task.network, task.optim), task.optim, config["lr"])
    ema = EMA(config["ema_decay"])
    ema.start(task)
    drifts = task.drifts(_batch(filled_inputs(case)))
    loss = torch.stack([drift.loss.mean() for drift in drifts.values()]).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(task.network.parameters(), config["max_grad_norm"])
    optimizer.step()
    ema.step(task)
    outputs = {"loss": loss, "g_norm": norm}
    for name, drift in drifts.items():
        outputs[f"metric:scale/{name}"] = drift.scale
        outputs |= {f"metric:loss_{t}/{name}": size for t, size in drift.forces.items()}
    average = {name.removeprefix("network."): value for name, value in ema.weights.items()}
    return outputs | named(_part(case, "gen"), _convert, param=dict(task.network.named_parameters()), ema=average)


def train_run(case: Case) -> dict[str, Tensor]:
    settings, inputs = case["config"]["train"], filled_inputs(case)
    schedule, kinds = settings["lr_schedule"], {"const": "constant", "cosine": "cosine", "cos": "cosine"}
    if (kind := schedule["lr_schedule"]) not in kinds:
        raise unknown("schedule", kind, kinds)
    lr = schedule["learning_rate"]
    warm = {"lr": lr, "warmup_steps": schedule["warmup_steps"], "warmup_start_lr": 1e-6, "min_lr": 1e-6 * lr}
    optim = _optim(settings, kinds[kind], betas=(settings["adam_b1"], settings["adam_b2"]), **warm)
    task, ema = _task(case, optim, settings["R_list"]), EMA(settings["ema_decay"])

    def after() -> dict[str, Tensor]:
        with ema.applied(task):
            labels = inputs["labels_eval"]
            alpha = torch.full(labels.shape, 1.5, dtype=inputs["noise_eval"].dtype)
            return {
                "ema_samples": _last(task.network(_first(inputs["noise_eval"]), inputs["style_eval"], labels, alpha))
            }

    # The schedule's length is in steps: an epoch is one.
    options: dict[str, Any] = {"averages": {"ema": ema}, "after": after, "epochs": schedule["total_steps"]}
    options["gradient_clip_val"] = settings["max_grad_norm"]
    stepwise = {**case, "config": {**case["config"], "train": {**settings, "iters_per_epoch": 1}}}
    return train(_part(stepwise, "gen"), task, _convert, lambda step, k: _batch(step), **options)


run = by_entry(
    {
        f"memory_bank.ArrayMemoryBank.add; {SCHEDULE}; train.train_step (guidance scale)": bank_and_schedules,
        "drift_loss.drift_loss": drift_loss,
        "models.generator.DitGen.__call__": generator,
        "models.mae_model.MAEResNetJAX.get_activations": mae_features,
        "models.mae_model.MAEResNetJAX.__call__": mae_loss,
        "train.train_step": train_step,
        f"train.train_step, {SCHEDULE}": train_run,
    }
)
