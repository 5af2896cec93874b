"""Runs the kinds of cases that were taken from facebookresearch/mae; everything else is read from the case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.data.transforms import one_draw_crop_params
from zoo.nn.vit import VisionTransformer
from zoo.ops.pos_embed import resize_pos_embed
from zoo.parity import Case, dtype_of, filled_inputs, fit, load_filled
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
BATCH_NAMES = {"imgs": "image", "labels": "label", "mask_noise": "mask_noise"}


def run(case: Case) -> dict[str, Tensor]:
    return KINDS[case["official"]["entry"]](case)


def _pick(config: dict[str, Any], *names: str) -> dict[str, Any]:
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
        **_gradients(network),
    }


def classifier(case: Case) -> dict[str, Tensor]:
    network = VisionTransformer(**_classifier_options(case["config"]))
    load_filled(network, case, convert_official).eval()
    tokens = network.forward_features(filled_inputs(case)["imgs"])
    logits = network.forward_head(tokens)
    logits.square().mean().backward()
    features = network.forward_head(tokens, pre_logits=True)
    return {"features": features, "logits": logits, **_gradients(network)}


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {f"grad:{name}": p.grad for name, p in network.named_parameters() if p.grad is not None}


def interpolate_pos_embed(case: Case) -> dict[str, Tensor]:
    side = case["config"]["new_img_size"] // case["config"]["patch_size"]
    return {"pos_embed": resize_pos_embed(filled_inputs(case)["pos_embed"], (side, side))}


def layer_decay_groups(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    with torch.device("meta"):
        network = VisionTransformer(**_classifier_options(config))
    groups = param_groups(network, Optim(**_pick(config, "weight_decay", "layer_decay")))
    of = {name: group for group in groups for name in group["names"]}
    rows = {key: torch.tensor([of[name][key] for name in config["names"]]) for key in ("lr_scale", "weight_decay")}
    return {**{key: value.double() for key, value in rows.items()}, "groups": torch.tensor([len(groups)])}


def lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    optim = Optim(**_pick(config, "lr", "min_lr", "warmup_epochs"))
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
    optimizer = LARS(head.parameters(), **_pick(config, "lr", "weight_decay", "momentum", "trust_coefficient"))
    outputs = {}
    for step in range(config["steps"]):
        loss = cross_entropy(head(inputs[f"features_{step}"]), inputs[f"labels_{step}"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        outputs[f"loss_{step}"] = loss
    after = head.state_dict()
    return {
        **outputs,
        "eval_logits": head.eval()(inputs["features_0"]),
        "weight_after": after["1.weight"],
        "bias_after": after["1.bias"],
        "running_mean_after": after["0.running_mean"],
        "running_var_after": after["0.running_var"],
    }


# ------------------------------------------------------------------------------------------- whole runs, by the trainer


class Batches(L.LightningDataModule):
    """The batches of a case in order, `iters_per_epoch` to an epoch, under the names of our batches."""

    def __init__(self, inputs: dict[str, Tensor], train: dict[str, Any]) -> None:
        super().__init__()
        self.inputs, self.length = inputs, train["iters_per_epoch"]
        self.batch_size = train["batch_size"]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first = self.trainer.current_epoch * self.length
        for k in range(first, first + self.length):
            yield {name: self.inputs[f"{key}_{k}"] for key, name in BATCH_NAMES.items() if f"{key}_{k}" in self.inputs}

    def train_dataloader(self) -> Batches:
        return self


class Record(L.Callback):
    """What the official engine would have logged; ends the run after so many batches."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.losses: list[Tensor] = []
        self.rates: list[list[float]] = []
        self.norms: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        trainer.should_stop = len(self.losses) >= self.iterations

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms.append(torch.stack([g.norm() for g in gradients]).norm())


def _fit(case: Case, module: BaseModule) -> tuple[dict[str, Tensor], Any]:
    """Trains a task on the case's batches with Lightning's trainer; the record's outputs and the network."""
    train, inputs = case["config"]["train"], filled_inputs(case)
    network: Any = module.network
    load_filled(network, case, convert_official)
    record = Record(train["iterations"])
    clipping = {"accumulate_grad_batches": train["accum_iter"], "gradient_clip_val": train.get("clip_grad")}
    trainer = fit(case, module, Batches(inputs, train), record, train["epochs"], **clipping)
    rates = torch.tensor(record.rates, dtype=torch.float64)
    (optimizer,) = trainer.optimizers
    network.to(case["device"], dtype_of(case)).eval()
    return {
        "loss": torch.stack(record.losses),
        "lr": rates[:, 0],
        **{f"lr_group_{i}": rates[:, i] for i in range(rates.shape[1])},
        "weight_decay_per_group": torch.tensor([group["weight_decay"] for group in optimizer.param_groups]).double(),
        "grad_norm_before_clipping": torch.stack(record.norms),
        **{f"param:{name}": p.detach() for name, p in network.named_parameters()},
        **{f"buffer:{name}": b for name, b in network.named_buffers()},
    }, network


def _optim(case: Case, **facts: Any) -> Optim:
    train = case["config"]["train"]
    declared = _pick(train, "warmup_epochs", "min_lr", "weight_decay", "layer_decay", "momentum", "trust_coefficient")
    if "betas" in train:
        declared["betas"] = tuple(train["betas"])
    return Optim(**{**facts, **declared, "base_lr": train["blr"]})


def train_pretrain(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    options = _pick(config["model"], *SIZES, *DECODER)
    module = MAEPretraining(**options, mask_ratio=config["mask_ratio"], optim=_optim(case))
    outputs, network = _fit(case, module)
    with torch.no_grad():
        loss, pred, _ = network(inputs["imgs_eval"], config["mask_ratio"], inputs["mask_noise_eval"])
    return {**outputs, "eval_loss": loss, "eval_pred": pred}


def train_finetune(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    module = MAEFineTuning(
        **_classifier_options(config["model"]),
        drop_path_rate=config["model"].get("drop_path_rate", 0.0),
        mixup=0.0,
        cutmix=0.0,
        label_smoothing=config["train"].get("label_smoothing", 0.0),
        optim=_optim(case, betas=(0.9, 0.999)),
    )
    return _with_eval_logits(case, *_fit(case, module))


def train_linprobe(case: Case) -> dict[str, Tensor]:
    options = _classifier_options(case["config"]["model"])
    module = MAELinearProbe(**options, optim=_optim(case, name="lars"))
    return _with_eval_logits(case, *_fit(case, module))


def _with_eval_logits(case: Case, outputs: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {**outputs, "eval_logits": network(filled_inputs(case)["imgs_eval"])}


KINDS = {
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
