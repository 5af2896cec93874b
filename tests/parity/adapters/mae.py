"""Runs the kinds of cases that were taken from facebookresearch/mae; everything else is read from the case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.data.transforms import one_draw_crop_params
from zoo.nn.vit import VisionTransformer
from zoo.ops.pos_embed import resize_pos_embed
from zoo.parity import Case, by_entry, filled_inputs, gradients, load_filled, named, train
from zoo.selfsup import mae
from zoo.selfsup.mae import convert_official
from zoo.training import LARS, BaseModule, Optim, lr_at, param_groups, probe_head

SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
DECODER = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss")
BATCH = {"imgs": "image", "labels": "label", "mask_noise": "mask_noise"}


def _given(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """What the case gives of these; the rest are the official constructors' defaults, which are ours too."""
    return {name: config[name] for name in names if name in config}


def _classifier(config: dict[str, Any]) -> dict[str, Any]:
    given = _given(config, *SIZES, "num_classes", "drop_path_rate")
    return {**given, "global_pool": "avg" if config["global_pool"] else "token"}


def pretrain(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    network = mae.MaskedAutoencoder(**_given(config, *SIZES, *DECODER))
    load_filled(network, case, convert_official)
    images, *drawn = inputs["imgs"], config["mask_ratio"], inputs["mask_noise"]
    found = dict(zip(("latent", "mask", "ids_restore"), network.forward_encoder(images, *drawn), strict=True))
    found["pred"] = network.forward_decoder(found["latent"], found["ids_restore"])
    found["unpatchified_pred"] = mae.unpatchify(found["pred"], network.patch_size)
    found["target"] = mae.patchify(images, network.patch_size)
    found["loss"] = network.loss(images, *drawn)
    found["loss"].backward()
    found |= {name: getattr(network, name) for name in ("pos_embed", "decoder_pos_embed")}
    return {**found, **named(case, convert_official, grad=gradients(network))}


def classifier(case: Case) -> dict[str, Tensor]:
    network = VisionTransformer(**_classifier(case["config"]))
    load_filled(network, case, convert_official).eval()
    tokens = network.forward_features(filled_inputs(case)["imgs"])
    found = {"logits": network.forward_head(tokens), "features": network.forward_head(tokens, pre_logits=True)}
    found["logits"].square().mean().backward()
    return {**found, **named(case, convert_official, grad=gradients(network))}


def interpolate_pos_embed(case: Case) -> dict[str, Tensor]:
    grid = (case["config"]["new_img_size"] // case["config"]["patch_size"],) * 2
    return {"pos_embed": resize_pos_embed(filled_inputs(case)["pos_embed"], grid)}


def layer_decay_groups(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    with torch.device("meta"):
        network = VisionTransformer(**_classifier(config))
    groups = param_groups(network, Optim(weight_decay=config["weight_decay"], layer_decay=config["layer_decay"]))
    of = {name: group for group in groups for name in group["names"]}
    rows = {key: torch.tensor([of[n][key] for n in config["names"]]).double() for key in ("lr_scale", "weight_decay")}
    return {**rows, "groups": torch.tensor([len(groups)])}


def lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    optim = Optim(**{name: config[name] for name in ("lr", "min_lr", "warmup_epochs")})
    epochs, pace = config["epochs"], config["iters_per_epoch"]
    rates = [lr_at(optim, k / pace, epochs, config["lr"]) for k in range(epochs * pace)]
    return {"lr": torch.tensor(rates, dtype=torch.float64) * config.get("lr_scale", 1.0)}


def crop_params(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    facts = [config[name] for name in ("height", "width", "scale", "ratio")]
    return {"i_j_h_w": torch.tensor([one_draw_crop_params(*facts, draws) for draws in config["draws"]])}


def linprobe_head(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    head = load_filled(probe_head(config["dim"], config["num_classes"]), case, lambda state: state)
    settings = {name: config[name] for name in ("lr", "weight_decay", "momentum", "trust_coefficient")}
    optimizer, outputs = LARS(head.parameters(), **settings), {}
    for step in range(config["steps"]):
        outputs[f"loss_{step}"] = loss = cross_entropy(head(inputs[f"features_{step}"]), inputs[f"labels_{step}"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = {f"{name.partition('.')[2]}_after": value.clone() for name, value in head.state_dict().items()}
    return {**outputs, **after, "eval_logits": head.eval()(inputs["features_0"])}


def _run(case: Case, kind: type[BaseModule], evaluate: Callable[[Any], dict[str, Tensor]], **options: Any) -> Any:
    """A run of a task with the optimiser that the case says, and what it computes in the end."""
    settings = case["config"]["train"]
    facts = {name: settings[name] for name in ("warmup_epochs", "min_lr", "weight_decay")} | options.pop("optim", {})
    facts |= _given(settings, "layer_decay", "momentum", "trust_coefficient", "betas") | {"base_lr": settings["blr"]}
    trainer = {"accumulate_grad_batches": settings["accum_iter"], "gradient_clip_val": settings.get("clip_grad")}
    task: Any = kind(**options, optim=Optim(**facts))
    return train(case, task, convert_official, BATCH, after=lambda: evaluate(task.network), **trainer)


def train_pretrain(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    options = {"mask_ratio": config["mask_ratio"], **_given(config["model"], *SIZES, *DECODER)}

    def evaluate(network: Any) -> dict[str, Tensor]:
        found = network(inputs["imgs_eval"], options["mask_ratio"], inputs["mask_noise_eval"])
        return dict(zip(("eval_loss", "eval_pred", "eval_mask"), found, strict=True))

    return _run(case, mae.MAEPretraining, evaluate, **options)


def _train_classifier(case: Case, kind: type[BaseModule], **options: Any) -> dict[str, Tensor]:
    images, sizes = filled_inputs(case)["imgs_eval"], _classifier(case["config"]["model"])
    return _run(case, kind, lambda network: {"eval_logits": network(images)}, **options, **sizes)


def train_finetune(case: Case) -> dict[str, Tensor]:
    own = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": case["config"]["train"]["label_smoothing"]}
    return _train_classifier(case, mae.MAEFineTuning, **own, optim={"betas": (0.9, 0.999)})


def train_linprobe(case: Case) -> dict[str, Tensor]:
    return _train_classifier(case, mae.MAELinearProbe, optim={"name": "lars"})


run = by_entry(
    {
        "models_mae.MaskedAutoencoderViT": pretrain,
        "models_vit.VisionTransformer": classifier,
        "util.pos_embed.interpolate_pos_embed": interpolate_pos_embed,
        "util.lr_decay.param_groups_lrd": layer_decay_groups,
        "util.lr_sched.adjust_learning_rate": lr_schedule,
        "util.crop.RandomResizedCrop.get_params": crop_params,
        "main_linprobe head + util.lars.LARS": linprobe_head,
        "engine_pretrain.train_one_epoch (as main_pretrain sets it up)": train_pretrain,
        "engine_finetune.train_one_epoch (as main_finetune sets it up)": train_finetune,
        "engine_finetune.train_one_epoch (as main_linprobe sets it up)": train_linprobe,
    }
)
