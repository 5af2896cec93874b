"""Runs the kinds of cases that were taken from facebookresearch/mae; everything else is read from the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.data.transforms import one_draw_crop_params
from zoo.nn.vit import VisionTransformer
from zoo.ops.pos_embed import resize_pos_embed
from zoo.parity import Case, by_entry, filled_inputs, gradients, load_filled, named, train
from zoo.selfsup.mae import (
    MAEFineTuning,
    MAELinearProbe,
    MAEPretraining,
    MaskedAutoencoder,
    convert_official,
    patchify,
    unpatchify,
)
from zoo.training import LARS, BaseModule, Optim, lr_at, param_groups, probe_head

SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
DECODER = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss")
BATCH = {"imgs": "image", "labels": "label", "mask_noise": "mask_noise"}


def _pick(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """What the case gives of these; the rest are the official constructors' defaults, which are ours too."""
    return {name: config[name] for name in names if name in config}


def _classifier_options(config: dict[str, Any]) -> dict[str, Any]:
    pool = "avg" if config.get("global_pool", False) else "token"
    return {**_pick(config, *SIZES, "num_classes"), "global_pool": pool}


# ------------------------------------------------------------------------------------------------- functions, networks


def pretrain(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    network = MaskedAutoencoder(**_pick(config, *SIZES, *DECODER))
    load_filled(network, case, convert_official)
    images, noise, ratio = inputs["imgs"], inputs["mask_noise"], config["mask_ratio"]
    latent, mask, ids_restore = network.forward_encoder(images, ratio, noise)
    pred = network.forward_decoder(latent, ids_restore)
    loss = network.loss(images, ratio, noise)
    loss.backward()
    return {
        "loss": loss,
        "pred": pred,
        "mask": mask,
        "latent": latent,
        "ids_restore": ids_restore,
        "pos_embed": network.pos_embed,
        "decoder_pos_embed": network.decoder_pos_embed,
        "target": patchify(images, network.patch_size),
        "unpatchified_pred": unpatchify(pred, network.patch_size),
        **named(case, convert_official, grad=gradients(network)),
    }


def classifier(case: Case) -> dict[str, Tensor]:
    network = VisionTransformer(**_classifier_options(case["config"]))
    load_filled(network, case, convert_official).eval()
    tokens = network.forward_features(filled_inputs(case)["imgs"])
    logits = network.forward_head(tokens)
    logits.square().mean().backward()
    features = network.forward_head(tokens, pre_logits=True)
    return {"features": features, "logits": logits, **named(case, convert_official, grad=gradients(network))}


def interpolate_pos_embed(case: Case) -> dict[str, Tensor]:
    side = case["config"]["new_img_size"] // case["config"]["patch_size"]
    return {"pos_embed": resize_pos_embed(filled_inputs(case)["pos_embed"], (side, side))}


def layer_decay_groups(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    with torch.device("meta"):
        network = VisionTransformer(**_classifier_options(config))
    groups = param_groups(network, Optim(weight_decay=config["weight_decay"], layer_decay=config["layer_decay"]))
    of = {name: group for group in groups for name in group["names"]}
    rows = {key: torch.tensor([of[name][key] for name in config["names"]]) for key in ("lr_scale", "weight_decay")}
    return {**{key: value.double() for key, value in rows.items()}, "groups": torch.tensor([len(groups)])}


def lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    optim = Optim(**{name: config[name] for name in ("lr", "min_lr", "warmup_epochs")})
    epochs, iterations = config["epochs"], config["iters_per_epoch"]
    rates = [lr_at(optim, k / iterations, epochs, config["lr"]) for k in range(epochs * iterations)]
    return {"lr": torch.tensor(rates, dtype=torch.float64) * config.get("lr_scale", 1.0)}


def crop_params(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    boxes = [
        one_draw_crop_params(config["height"], config["width"], config["scale"], config["ratio"], draws)
        for draws in config["draws"]
    ]
    return {"i_j_h_w": torch.tensor(boxes)}


def linprobe_head(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    head = load_filled(probe_head(config["dim"], config["num_classes"]), case, lambda state: state)
    settings = {name: config[name] for name in ("lr", "weight_decay", "momentum", "trust_coefficient")}
    optimizer = LARS(head.parameters(), **settings)
    outputs = {}
    for step in range(config["steps"]):
        loss = cross_entropy(head(inputs[f"features_{step}"]), inputs[f"labels_{step}"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        outputs[f"loss_{step}"] = loss
    after = {f"{name.partition('.')[2]}_after": value.clone() for name, value in head.state_dict().items()}
    return {**outputs, **after, "eval_logits": head.eval()(inputs["features_0"])}


# ------------------------------------------------------------------------------------------- whole runs, by the trainer


def _run(case: Case, task: BaseModule, after: Any) -> dict[str, Tensor]:
    settings = case["config"]["train"]
    options = {"accumulate_grad_batches": settings["accum_iter"], "gradient_clip_val": settings.get("clip_grad")}
    return train(case, task, convert_official, BATCH, after=after, **options)


def _optim(case: Case, **facts: Any) -> Optim:
    settings = case["config"]["train"]
    given = _pick(settings, "layer_decay", "momentum", "trust_coefficient", "betas")
    given |= {name: settings[name] for name in ("warmup_epochs", "min_lr", "weight_decay")}
    return Optim(**{**facts, **given, "base_lr": settings["blr"]})


def train_pretrain(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    options = _pick(config["model"], *SIZES, *DECODER)
    task = MAEPretraining(**options, mask_ratio=config["mask_ratio"], optim=_optim(case))

    def after() -> dict[str, Tensor]:
        loss, pred, mask = task.network(inputs["imgs_eval"], config["mask_ratio"], inputs["mask_noise_eval"])
        return {"eval_loss": loss, "eval_pred": pred, "eval_mask": mask}

    return _run(case, task, after)


def train_finetune(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    task = MAEFineTuning(
        **_classifier_options(config["model"]),
        drop_path_rate=config["model"].get("drop_path_rate", 0.0),
        mixup=0.0,
        cutmix=0.0,
        label_smoothing=config["train"]["label_smoothing"],
        optim=_optim(case, betas=(0.9, 0.999)),
    )
    return _run(case, task, lambda: {"eval_logits": task.network(filled_inputs(case)["imgs_eval"])})


def train_linprobe(case: Case) -> dict[str, Tensor]:
    options = _classifier_options(case["config"]["model"])
    task = MAELinearProbe(**options, optim=_optim(case, name="lars"))
    return _run(case, task, lambda: {"eval_logits": task.network(filled_inputs(case)["imgs_eval"])})


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
