"""Runs the kinds of cases that were taken from facebookresearch/detectron2; everything else is read from the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.detection import mask_rcnn
from zoo.detection.mask_rcnn import MaskRCNN, MaskRCNNDetection, convert_official
from zoo.nn.detection.roi_heads import PoolConfig, RoIPooler, rois_of
from zoo.nn.detection.rpn import AnchorGenerator
from zoo.ops.boxes import decode_boxes, encode_boxes, match, pairwise_iou, permutation, pyramid_levels, sample_labels
from zoo.ops.keypoints import heatmaps_to_keypoints
from zoo.ops.masks import crop_masks, crop_polygons, paste_masks
from zoo.parity import Case, filled_inputs, load_filled, shared, train

official = shared("detectron2")


def run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    return train_run(case) if "effective" in config else network(case) if "training" in config else box_ops(case)


def create(base: str | None, given: dict[str, Any]) -> MaskRCNN:
    """The network of a base config and settings."""
    return (MaskRCNN if base is None else getattr(mask_rcnn, base))(**official.options(given))


def network(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    base, given = official.settings(config)
    net: Any = load_filled(create(base, given), case, convert_official).train(config["training"])
    return official.network(case, net, given, net.size_divisibility, convert_official)


def train_run(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    model, effective = config["model"], config["effective"]
    solver = effective["SOLVER"]
    base, given = official.settings(model, {key: entry for key, entry in effective.items() if key.startswith("MODEL.")})
    clip_each, clipping = official.clipping(solver)
    with torch.device("meta"):
        options = create(base, given).options
    task = MaskRCNNDetection(**options, optim=official.optim(solver), clip_each=clip_each)
    net = task.network

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Any]:
        images = [step[f"image{n}"] for n in range(len(model["image_sizes"]))]
        made = official.batch(images, given, net.size_divisibility, case)
        return {**made, "target": official.targets(model, case, k), "noise": step["perm_uniform"]}

    def after() -> dict[str, Tensor]:
        features = net.backbone(official.batch([inputs["image_eval"]], given, net.size_divisibility, case)["image"])
        found = {f"eval_{name.replace('c', 'res')}": x for name, x in features.items()}
        heads = net.rpn.head([features[name] for name in net.rpn.levels])
        for name, scores, moves in zip(net.rpn.levels, *heads, strict=True):
            level = name.replace("c", "res")
            found |= {f"eval_logits_{level}": scores, f"eval_deltas_{level}": moves}
        return found

    run = {"iterations": solver["MAX_ITER"], **config.get("train", {})}
    whole = {**case, "config": {**config, "train": run}}
    return train(whole, task, convert_official, batch, epochs=1, after=after, **clipping)


def box_ops(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    height, width = config["image_size"]

    def boxes_from(uniform: Tensor, least: float) -> Tensor:
        side = uniform.new_tensor([width, height])
        corner = uniform[:, :2] * (side - least)
        return torch.cat([corner, (corner + least + uniform[:, 2:] * 0.6 * side).minimum(side)], dim=1)

    truth, proposals = boxes_from(inputs["gt_uniform"], 10), boxes_from(inputs["proposal_uniform"], 4)
    grids = [truth.new_zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in config["strides"]]
    generator = AnchorGenerator(config["strides"], config["sizes"], config["ratios"], config["offset"])
    anchors = torch.cat(generator(grids))
    iou = pairwise_iou(truth, anchors)
    index, labels = match(iou, config["thresholds"], config["labels"], low_quality=True)
    permute = permutation(inputs["perm_uniform"])
    positive, negative = sample_labels(labels, config["num_samples"], config["positive_fraction"], 0, permute)
    weights = tuple(config["weights"])
    maps = [inputs[f"feat{k}"] for k in range(sum(name.startswith("feat") for name in inputs))]
    lowest, canonical = official.lowest_level(case, maps), config["canonical_size"]
    side = case["outputs"]["roi_features"]["shape"][-1] if "roi_features" in case["outputs"] else 7
    pool = PoolConfig(side, config["sampling_ratio"], official.pooling(config["pooler"]))
    pooler = RoIPooler([2 ** (lowest + k) for k in range(len(maps))], pool, canonical)
    half = len(proposals) // 2
    logits, heatmaps = inputs["mask_logits"], inputs["heatmaps"]
    pasted = paste_masks((3 * logits[:, 0]).sigmoid(), proposals[: len(logits)], (height, width))
    polygon_boxes = truth.new_tensor(config["polygon_boxes"])
    deltas = inputs["random_deltas"].unflatten(1, (-1, 4))
    masks, everyone = official.ellipses(truth, height, width), torch.arange(len(truth))
    found = {"anchors": anchors, "gt_boxes": truth, "proposals": proposals, "iou": iou, "matched_gt": index}
    found |= {"match_labels": labels, "sampled_pos": positive, "sampled_neg": negative}
    found |= {"pasted_area": pasted.sum(dim=(1, 2)), "pasted_cols": pasted.sum(dim=1)}
    return found | {
        "deltas": encode_boxes(truth[index], anchors, weights),
        "decoded": decode_boxes(deltas, proposals[:, None], weights).flatten(1),
        "levels": pyramid_levels(proposals, lowest, lowest + len(maps) - 1, canonical),
        "roi_features": pooler(maps, rois_of([proposals[:half], proposals[half:]])),
        "keypoints": heatmaps_to_keypoints(heatmaps, proposals[: len(heatmaps)]),
        "mask_targets": crop_masks(masks, everyone, truth * 0.9 + 2, config["mask_size"]),
        "polygon_targets": crop_polygons([[one] for one in config["polygons"]], polygon_boxes, config["mask_size"]),
    }
