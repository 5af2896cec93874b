"""Runs the kinds of cases taken from PySlowFast: networks, heads, layouts, runs, schedules, sampling, scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zoo.data.video_transforms import (
    centred_indices,
    clip_window,
    resize_clip,
    short_side_size,
    spread_indices,
    uniform_crop_offset,
)
from zoo.metrics.video import FrameMAP, MultiLabelMAP
from zoo.nn.resnet3d import RoIHead3d, VideoNetwork
from zoo.nn.video_names import layout_of, our_name
from zoo.parity import Case, dtype_of, filled_inputs, fit, load_filled
from zoo.training import Optim, lr_at
from zoo.video.slowfast import (
    SlowFast,
    SlowFastClassification,
    SlowFastDetection,
    SlowFastMultiLabel,
    convert_official,
    slow_indices,
    slow_only,
)


def run(case: Case) -> dict[str, Tensor]:
    config, entry = case["config"], case["official"]["entry"]
    if "train" in config:
        return train_run(case)
    if case["state"]:
        return network(case)
    if "windows" in config:
        return sampling(case)
    if "groundtruth" in config:
        return frame_map(case)
    return multi_label(case) if "meters" in entry else schedule(case)


# ----------------------------------------------------------------------------------------------------------- networks


def _settings(case: Case) -> dict[str, Any]:
    """The configuration flat, by dotted names: the values that count, then what was given."""
    flat: dict[str, Any] = {}
    for section, values in case["config"]["effective"].items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return {**flat, **case["config"]["cfg"]}


def _of_pathway(rows: list[list[Any]], pathway: int) -> tuple[Any, ...]:
    """What stands for one pathway in a setting of a row a stage."""
    return tuple(tuple(row[pathway]) if isinstance(row[pathway], list) else row[pathway] for row in rows)


def _create(case: Case) -> VideoNetwork:
    """The network that the official configuration describes."""
    given = _settings(case)
    two = given["MODEL.ARCH"] == "slowfast"
    blocks = given["RESNET.NUM_BLOCK_TEMP_KERNEL"]
    options: dict[str, Any] = {
        "depth": given["RESNET.DEPTH"],
        "width": given["RESNET.WIDTH_PER_GROUP"],
        "block": given.get("RESNET.TRANS_FUNC", "bottleneck_transform").removesuffix("_transform"),
        "num_frames": given["DATA.NUM_FRAMES"],
        "crop_size": given["DATA.TRAIN_CROP_SIZE"],
        "in_chans": given["DATA.INPUT_CHANNEL_NUM"][0],
        "num_classes": given["MODEL.NUM_CLASSES"],
        "dropout": given["MODEL.DROPOUT_RATE"],
        "detection": given.get("DETECTION.ENABLE", False),
        "aligned": given.get("DETECTION.ALIGNED", True),
        "activation": given.get("MODEL.HEAD_ACT", "softmax"),
        "similarity": given.get("NONLOCAL.INSTANTIATION", "dot_product"),
    }
    for key, name in (
        ("RESNET.SPATIAL_STRIDES", "strides"),
        ("RESNET.SPATIAL_DILATIONS", "dilations"),
        ("NONLOCAL.LOCATION", "nonlocal_after"),
        ("NONLOCAL.GROUP", "nonlocal_groups"),
        ("NONLOCAL.POOL", "nonlocal_pools"),
    ):
        if key in given:
            options[name] = _of_pathway(given[key], 0)
    if not two:
        return slow_only(temporal_blocks=_of_pathway(blocks, 0), **options)
    return SlowFast(
        alpha=given["SLOWFAST.ALPHA"],
        beta_inv=given["SLOWFAST.BETA_INV"],
        fusion_ratio=given["SLOWFAST.FUSION_CONV_CHANNEL_RATIO"],
        fusion_kernel=given["SLOWFAST.FUSION_KERNEL_SZ"],
        slow_temporal_blocks=_of_pathway(blocks, 0),
        fast_temporal_blocks=_of_pathway(blocks, 1),
        **options,
    )


def _video(inputs: dict[str, Tensor], suffix: str = "") -> Any:
    """What the network takes: both pathways' frames, or those of the only one."""
    found = [inputs[f"{name}{suffix}"] for name in ("slow", "fast") if f"{name}{suffix}" in inputs]
    if not found:
        found = [inputs[name] for name in inputs if name.endswith(suffix) and inputs[name].ndim == 5][:1]
    return found if len(found) > 1 else found[0]


def _probabilities(net: VideoNetwork, logits: Tensor) -> Tensor:
    sigmoid = isinstance(net.head, RoIHead3d) or net.head.activation == "sigmoid"
    return logits.sigmoid() if sigmoid else logits.softmax(-1)


def network(case: Case) -> dict[str, Tensor]:
    inputs = filled_inputs(case)
    net: Any = load_filled(_create(case), case, convert_official)
    outputs: dict[str, Tensor] = {}
    if isinstance(net.head, RoIHead3d):
        rois = inputs["boxes"].to(dtype_of(case))
        video = _video(inputs)
        count = len(video[0] if isinstance(video, list) else video)
        order = torch.cat([(rois[:, 0] == i).nonzero()[:, 0] for i in range(count)]).argsort()
        boxes = [rois[rois[:, 0] == i, 1:] for i in range(count)]
        for mode in ("eval", "train"):
            logits = net.train(mode == "train")(video, boxes)[order]
            outputs |= {f"{mode}_logits": logits, f"{mode}_scores": logits.sigmoid()}
        return outputs
    with torch.no_grad():
        net.eval()
        for name, suffix in (("", ""), ("_fullconv", "_large")):
            if suffix and not any(key.endswith(suffix) for key in inputs):
                continue
            features = net.forward_features(_video(inputs, suffix))
            outputs[f"eval_logits{name}"] = net.head.position_logits(features)
            outputs[f"eval_probs{name}"] = _probabilities(net, net.forward_head(features))
        outputs["train_logits"] = net.train()(_video(inputs))
    if isinstance(net, SlowFast):
        outputs["fuse_bn_mean_after"] = net.lateral[0].bn.running_mean
    return outputs


# ------------------------------------------------------------------------------------------- whole runs, by the trainer


def _optim(given: dict[str, Any]) -> Optim:
    """The official SOLVER section in our declaration."""
    steps = given["SOLVER.LR_POLICY"] != "cosine"
    factors = given.get("SOLVER.LRS") or [1.0]
    milestones = tuple(given.get("SOLVER.STEPS") or ())[1:] if steps else ()
    own = given.get("BN.WEIGHT_DECAY", 0.0) == given["SOLVER.WEIGHT_DECAY"]
    return Optim(
        name="sgd",
        lr=given["SOLVER.BASE_LR"] * (factors[0] if steps else 1.0),
        momentum=given.get("SOLVER.MOMENTUM", 0.9),
        nesterov=given.get("SOLVER.NESTEROV", True),
        weight_decay=given["SOLVER.WEIGHT_DECAY"],
        no_decay="none" if own else "1d" if given.get("SOLVER.ZERO_WD_1D_PARAM") else "norm",
        schedule="step" if steps else "cosine",
        schedule_from="warmup" if given.get("SOLVER.COSINE_AFTER_WARMUP") else "start",
        warmup_epochs=given["SOLVER.WARMUP_EPOCHS"],
        warmup_start_lr=given["SOLVER.WARMUP_START_LR"],
        min_lr=given.get("SOLVER.COSINE_END_LR", 0.0),
        milestones=milestones,
        factors=tuple(factor / factors[0] for factor in factors[1 : 1 + len(milestones)]),
    )


def schedule(case: Case) -> dict[str, Tensor]:
    given = _settings(case)
    optim = _optim(given)
    total, peak = given["SOLVER.MAX_EPOCH"], optim.peak_lr(1)
    return {"lr": torch.tensor([lr_at(optim, epoch, total, peak) for epoch in case["config"]["epochs"]]).double()}


class Batches(L.LightningDataModule):
    """The batches of a case in order, under the names of ours."""

    def __init__(self, inputs: dict[str, Tensor], train: dict[str, Any]) -> None:
        super().__init__()
        self.inputs, self.length = inputs, train["iters_per_epoch"]
        self.batch_size = train["batch_size"]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = self.trainer.current_epoch * self.length
        for k in range(first, first + self.length):
            yield {"video": _video(self.inputs, f"_{k}"), "label": self.inputs[f"labels_{k}"]}

    def train_dataloader(self) -> Batches:
        return self


class Record(L.Callback):
    """Loss, learning rate and gradient norm of each step; ends the run after so many of them."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.losses: list[Tensor] = []
        self.rates: list[float] = []
        self.norms: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        trainer.should_stop = len(self.losses) >= self.iterations

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.norms.append(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm())


def train_run(case: Case) -> dict[str, Tensor]:
    config, given, inputs = case["config"], _settings(case), filled_inputs(case)
    net = load_filled(_create(case), case, convert_official)
    task = {"cross_entropy": SlowFastClassification, "bce_logit": SlowFastMultiLabel, "bce": SlowFastDetection}
    classes, loss = given["MODEL.NUM_CLASSES"], given.get("MODEL.LOSS_FUNC", "cross_entropy")
    with torch.device("meta"):  # its network gives way to the case's
        module: Any = task[loss](model=None, width=8, num_classes=classes, channels_last=False, optim=_optim(given))
    module.network = net
    for metrics in (module.val_metrics, module.test_metrics):
        metrics.to_empty(device=case["device"])
    record = Record(config["train"]["iterations"])
    clipping: dict[str, Any] = {}
    if given.get("SOLVER.CLIP_GRAD_VAL"):
        clipping = {"gradient_clip_val": given["SOLVER.CLIP_GRAD_VAL"], "gradient_clip_algorithm": "value"}
    elif given.get("SOLVER.CLIP_GRAD_L2NORM"):
        clipping = {"gradient_clip_val": given["SOLVER.CLIP_GRAD_L2NORM"]}
    trainer = fit(case, module, Batches(inputs, config["train"]), record, given["SOLVER.MAX_EPOCH"], **clipping)
    (optimizer,) = trainer.optimizers
    net.to(case["device"], dtype_of(case)).eval()
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    pathways = ("slow", "fast") if isinstance(net, SlowFast) else ("pathway",)
    layout = layout_of({key: torch.empty(0) for key in case["state"]}) or ""
    with torch.no_grad():
        probabilities = _probabilities(net, net(_video(inputs, "_eval")))
    return {
        "loss": torch.stack(record.losses),
        "lr": torch.tensor(record.rates, dtype=torch.float64),
        "grad_norm_before_clipping": torch.stack(record.norms),
        "weight_decay_per_group": torch.tensor([group["weight_decay"] for group in optimizer.param_groups]).double(),
        **{
            f"{kind}:{name}": state[our_name(name, layout, pathways)].detach()
            for kind, names in (("param", config["track"]), ("buffer", config["track_buffers"]))
            for name in names
        },
        "eval_probs": probabilities,
    }


# --------------------------------------------------------------------------------------------- data and scores


def sampling(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    windows = []
    for frames, length, clips, offset in config["windows"]:
        delta = max(frames - length, 0)
        for clip in range(clips):
            start, end = clip_window(frames, length, clip, clips, offset)
            windows.append([start, end, start / delta if delta else 0.0])
    crops = [
        uniform_crop_offset(height, width, size, which) for height, width, size in config["crops"] for which in range(3)
    ]
    clip = inputs["frames"]  # (C, T, H, W)
    size = short_side_size(*clip.shape[2:], config["short_side"])
    return {
        "clip_windows": torch.tensor(windows, dtype=torch.float64),
        "temporal_indices": torch.cat(
            [spread_indices(a, b, n, frames) for frames, a, b, n in config["temporal_sampling"]]
        ),
        "slow_indices": torch.cat([slow_indices(frames, alpha) for frames, alpha in config["pack"]]),
        "crop_offsets_yx": torch.tensor(crops),
        "resized": resize_clip(clip, size),
        "ava_sequence": torch.cat(
            [centred_indices(centre, half, rate, frames) for centre, half, rate, frames in config["ava_sequence"]]
        ),
    }


def multi_label(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    clips = torch.arange(len(inputs["preds"]))
    labels = (inputs["labels"] > config["threshold"]).long()
    videos = clips // config["num_clips"]
    metric = MultiLabelMAP(config["num_classes"])
    metric.update(inputs["preds"], labels[videos], videos, clips % config["num_clips"])
    return {"map_max": metric.compute()["mAP"][None], "video_preds_max": metric.videos()[1]}


def frame_map(case: Case) -> dict[str, Tensor]:
    config, scores = case["config"], filled_inputs(case)["scores"]
    names, boxes = config["video_names"], torch.tensor(config["det_boxes"], dtype=torch.float64)[:, 1:]
    excluded = set(config["excluded"])
    found: dict[str, list[int]] = {}
    for i, (video, second) in enumerate(config["det_meta"]):
        found.setdefault(f"{names[video]},{second:04d}", []).append(i)
    true: dict[str, list[tuple[list[float], int]]] = {}
    for key, box, label in config["groundtruth"]:
        true.setdefault(key, []).append((box, label))
    metric = FrameMAP(scores.shape[1], [label - 1 for label in config["class_ids"]])
    for key in sorted({*found, *true} - excluded):
        here, there = found.get(key, []), true.get(key, [])
        video, _, second = key.rpartition(",")
        metric.update(
            scores[here],
            boxes[here],
            torch.tensor([box for box, _ in there], dtype=torch.float64).reshape(-1, 4),
            torch.tensor([label - 1 for _, label in there], dtype=torch.long),
            names.index(video),
            int(second),
        )
    per_class = metric.per_class()
    return {"map": metric.compute()["mAP"][None], "ap_per_class_nan_as_-1": per_class.nan_to_num(-1.0)}
