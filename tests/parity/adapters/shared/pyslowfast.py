"""What the adapters of papers in PySlowFast share: its configuration as networks, optimisers and schedules of ours, and
the cases of its sampling and scores."""

from __future__ import annotations

from typing import Any

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
from zoo.errors import ZooError, unknown
from zoo.metrics.video import FrameMAP, MultiLabelMAP
from zoo.nn.resnet3d import ResNet3d, RoIHead3d, VideoNetwork
from zoo.parity import Case, Config, filled_inputs
from zoo.training import Optim
from zoo.video.slowfast import SLOW_KERNELS, SlowFast, slow_indices

# The temporal kernels of networks of one pathway, and the pooling over time behind res2.
ARCHS: dict[str, dict[str, Any]] = {
    "slow": {"temporal_kernels": SLOW_KERNELS},
    "c2d": {"temporal_kernels": (1, 1, 1, 1, 1), "temporal_pool": 2},
    "c2d_nopool": {"temporal_kernels": (1, 1, 1, 1, 1)},
    "i3d": {"temporal_kernels": (5, 3, (3, 1), (3, 1), (1, 3)), "temporal_pool": 2},
    "i3d_nopool": {"temporal_kernels": (5, 3, (3, 1), (3, 1), (1, 3))},
}


def settings(case: Case) -> Config:
    """The configuration flat, by dotted names: the values that count, then what was given."""
    flat: dict[str, Any] = {}
    for section, values in case["config"]["effective"].items():
        inner = {f"{section}.{key}": value for key, value in values.items()} if isinstance(values, dict) else None
        flat |= {section: values} if inner is None else inner
    return Config({**flat, **case["config"]["cfg"]})


def create(case: Case) -> Any:
    """The network that the official configuration describes; what a case leaves out is its defaults.py's."""
    given = settings(case)
    arch = given["MODEL.ARCH"]

    def of(pathway: int, key: str, default: Any = None) -> tuple[Any, ...]:
        rows = given[key] if default is None else given.get(key, [[default] * 2] * 4)
        return tuple(tuple(row[pathway]) if isinstance(row[pathway], list) else row[pathway] for row in rows)

    options: dict[str, Any] = {
        "depth": given["RESNET.DEPTH"],
        "width": given["RESNET.WIDTH_PER_GROUP"],
        "groups": given["RESNET.NUM_GROUPS"],
        "stride_in_1x1": given["RESNET.STRIDE_1X1"],
        "block": given["RESNET.TRANS_FUNC"].removesuffix("_transform"),
        "strides": of(0, "RESNET.SPATIAL_STRIDES"),
        "dilations": of(0, "RESNET.SPATIAL_DILATIONS"),
        "nonlocal_after": of(0, "NONLOCAL.LOCATION", []),
        "nonlocal_groups": of(0, "NONLOCAL.GROUP", 1),
        "nonlocal_pools": of(0, "NONLOCAL.POOL", [1, 2, 2]),
        "similarity": given.get("NONLOCAL.INSTANTIATION", "dot_product"),
        "num_frames": given["DATA.NUM_FRAMES"],
        "crop_size": given["DATA.TRAIN_CROP_SIZE"],
        "in_chans": given["DATA.INPUT_CHANNEL_NUM"][0],
        "num_classes": given["MODEL.NUM_CLASSES"],
        "dropout": given["MODEL.DROPOUT_RATE"],
        "detection": given.get("DETECTION.ENABLE", False),
        "aligned": given.get("DETECTION.ALIGNED", True),
        "activation": given.get("MODEL.HEAD_ACT", "softmax"),
    }
    if arch != "slowfast":
        if arch not in ARCHS:
            raise unknown("MODEL.ARCH", arch, ["slowfast", *ARCHS])
        net: VideoNetwork = ResNet3d(temporal_blocks=of(0, "RESNET.NUM_BLOCK_TEMP_KERNEL"), **ARCHS[arch], **options)
    else:
        same = ("RESNET.SPATIAL_STRIDES", "RESNET.SPATIAL_DILATIONS")
        if any(of(0, key) != of(1, key) for key in same) or any(of(1, "NONLOCAL.LOCATION", [])):
            raise ZooError("pathways of different strides or dilations, or non-local blocks of Fast, are not built")
        net = SlowFast(
            alpha=given["SLOWFAST.ALPHA"],
            beta_inv=given["SLOWFAST.BETA_INV"],
            fusion_ratio=given["SLOWFAST.FUSION_CONV_CHANNEL_RATIO"],
            fusion_kernel=given["SLOWFAST.FUSION_KERNEL_SZ"],
            slow_temporal_blocks=of(0, "RESNET.NUM_BLOCK_TEMP_KERNEL"),
            fast_temporal_blocks=of(1, "RESNET.NUM_BLOCK_TEMP_KERNEL"),
            **options,
        )
    if isinstance(net.head, RoIHead3d):
        net.head.spatial_stride = given["DETECTION.SPATIAL_SCALE_FACTOR"]
        net.head.resolution = given["DETECTION.ROI_XFORM_RESOLUTION"]
    return net


def probabilities(case: Case, logits: Tensor) -> Tensor:
    """What the head's activation makes of logits (N, K)."""
    act = settings(case).get("MODEL.HEAD_ACT", "softmax")
    if act not in ("softmax", "sigmoid"):
        raise unknown("MODEL.HEAD_ACT", act, ("softmax", "sigmoid"))
    return logits.sigmoid() if act == "sigmoid" else logits.softmax(-1)


# ----------------------------------------------------------------------------------------------- optimiser and schedule


def schedule(given: Config) -> dict[str, Any]:
    """The fields of :class:`Optim` that a schedule takes, from the SOLVER section."""
    policy = given["SOLVER.LR_POLICY"]
    if policy not in ("cosine", "steps_with_relative_lrs"):
        raise unknown("SOLVER.LR_POLICY", policy, ("cosine", "steps_with_relative_lrs"))
    warm = {"warmup_epochs": given["SOLVER.WARMUP_EPOCHS"], "warmup_start_lr": given["SOLVER.WARMUP_START_LR"]}
    if policy == "cosine":
        begin = "warmup" if given.get("SOLVER.COSINE_AFTER_WARMUP", False) else "start"
        floor = given.get("SOLVER.COSINE_END_LR", 0.0)
        return {**warm, "lr": given["SOLVER.BASE_LR"], "schedule": "cosine", "schedule_from": begin, "min_lr": floor}
    first, *factors = given["SOLVER.LRS"]  # one for each of STEPS, whose first is 0
    return {
        **warm,
        "lr": given["SOLVER.BASE_LR"] * first,
        "schedule": "step",
        "milestones": tuple(given["SOLVER.STEPS"][1:]),
        "factors": tuple(factor / first for factor in factors),
    }


def optim(given: Config) -> Optim:
    """The whole SOLVER section."""
    method = given["SOLVER.OPTIMIZING_METHOD"].removeprefix("mt_")
    if given.get("SOLVER.LARS_ON", False) or given.get("SOLVER.LAYER_DECAY", 1.0) != 1.0:
        raise ZooError("LARS_ON and LAYER_DECAY of PySlowFast are not built")
    own: dict[str, Any] = {"betas": tuple(given["SOLVER.BETAS"])}
    if method == "sgd":
        names = {"momentum": "MOMENTUM", "nesterov": "NESTEROV", "dampening": "DAMPENING"}
        own = {ours: given[f"SOLVER.{theirs}"] for ours, theirs in names.items()}
    return Optim(
        name=method,
        weight_decay=given["SOLVER.WEIGHT_DECAY"],
        norm_weight_decay=given["BN.WEIGHT_DECAY"],
        no_decay="1d" if given["SOLVER.ZERO_WD_1D_PARAM"] else "none",
        **own,
        **schedule(given),
    )


def clipping(given: Config) -> dict[str, Any]:
    """Options of the trainer: the value counts where both are set."""
    if given.get("SOLVER.CLIP_GRAD_VAL"):
        return {"gradient_clip_val": given["SOLVER.CLIP_GRAD_VAL"], "gradient_clip_algorithm": "value"}
    return {"gradient_clip_val": given.get("SOLVER.CLIP_GRAD_L2NORM") or None}


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
