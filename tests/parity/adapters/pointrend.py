"""Runs the kinds of cases that were taken from detectron2's projects/PointRend; the rest is read from the case."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.detection import pointrend
from zoo.detection.pointrend import PointRend, PointRendSemantic, convert_official
from zoo.nn.detection.roi_heads import rois_of
from zoo.ops import points
from zoo.parity import Case, filled_inputs, gradients, load_filled, named, shared, train

official = shared("detectron2")

# Our fields by detectron2's settings, as pairs of words.
_HEAD = """IN_FEATURES levels FC_DIM channels NUM_FC layers COARSE_PRED_EACH_LAYER coarse_each_layer TRAIN_NUM_POINTS
    train_points CLS_AGNOSTIC_MASK class_agnostic OVERSAMPLE_RATIO oversample IMPORTANCE_SAMPLE_RATIO importance
    SUBDIVISION_STEPS steps SUBDIVISION_NUM_POINTS points"""
_MASK = """IN_FEATURES levels POOLER_RESOLUTION pool CONV_DIM channels FC_DIM fc_channels NUM_FC fcs
    OUTPUT_SIDE_RESOLUTION size"""


def _fields(section: str, part: str, words: str) -> dict[str, Any]:
    names = words.split()
    return {f"{section}.{a}": (f"{part}.{b}", lambda x: x) for a, b in zip(names[::2], names[1::2], strict=True)}


INSTANCES = _fields("POINT_HEAD", "point.head", _HEAD) | _fields("ROI_MASK_HEAD", "point", _MASK)
PIXELS = _fields("POINT_HEAD", "point", _HEAD) | official.semantic_fields("head")
ELSEWHERE = {
    "POINT_HEAD.NAME": ("StandardPointHead",),
    "ROI_MASK_HEAD.NAME": ("PointRendMaskHead", "CoarseMaskHead"),
    "POINT_HEAD.COARSE_SEM_SEG_HEAD_NAME": ("SemSegFPNHead",),
    "SEM_SEG_HEAD.NAME": ("SemSegFPNHead", "PointRendSemSegHead"),
    "META_ARCHITECTURE": ("GeneralizedRCNN", "SemanticSegmentor"),
}


def run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    if "num_points" in config:
        return points_alone(case)
    if "effective" in config:
        return train_run(case)
    given = official.settings(config)[1]
    semantic, inputs = given["META_ARCHITECTURE"] == "SemanticSegmentor", filled_inputs(case)
    net: Any = load_filled(create(given), case, convert_official).train(config["training"])
    images = [inputs[f"image{n}"] for n in range(len(config["image_sizes"]))]
    batch = official.batch(images, given, net.size_divisibility, case)
    if config["training"]:
        noise, whole = noise_of(inputs), {**batch, "target": targets(given, config, case, inputs)}
        losses = net(whole, **({} if semantic else {"noise": inputs["perm_uniform"]}), points=noise)
        total = sum(losses.values())
        total.backward()
        return {**losses, "total": total, **named(case, convert_official, grad=gradients(net))}
    with torch.no_grad():
        return (label_maps if semantic else masks)(config, net, batch)


def create(given: Mapping[str, Any]) -> PointRend | PointRendSemantic:
    """The network of flat settings."""
    if given["META_ARCHITECTURE"] == "SemanticSegmentor":
        found = official.options(given, PIXELS, ELSEWHERE)
        return PointRendSemantic(**{name: found[name] for name in ("resnet", "fpn", "head", "point")})
    known = {name: value for name, value in given.items() if "ROI_MASK_HEAD." not in name or name in INSTANCES}
    found = official.options(known, INSTANCES, ELSEWHERE)
    if not given.get("ROI_MASK_HEAD.POINT_HEAD_ON", True):
        found["point"]["head"] = None
    return PointRend(**found)


def noise_of(inputs: Mapping[str, Tensor]) -> points.PointNoise:
    return points.PointNoise(inputs["points_oversampled"], inputs["points_random"])


def targets(given: Any, config: Any, case: Case, inputs: Mapping[str, Tensor], at: Any = None) -> Any:
    """Objects, or label maps."""
    if given["META_ARCHITECTURE"] != "SemanticSegmentor":
        return official.targets(config, case, at)
    return [{"semantic": x} for x in official.semantic_targets(len(config["image_sizes"]), given, inputs)]


def masks(config: Mapping[str, Any], net: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    features, proposals = net.propose(batch)
    sizes = [(height, width) for height, width in batch["size"].tolist()]
    found = net.roi_heads.detect(features, proposals, sizes)
    outputs = {"coarse_mask": net.roi_heads.mask_head.coarse(features, rois_of([one["boxes"] for one in found]))}
    for n, (one, size, original) in enumerate(zip(found, sizes, config["output_sizes"], strict=True)):
        outputs |= {f"boxes{n}": one["boxes"], f"scores{n}": one["scores"], f"classes{n}": one["labels"]}
        outputs[f"mask_probs{n}"] = one["mask_probs"][:, None]
        outputs[f"final_mask_area{n}"] = net.postprocess(one, size, original)["masks"].sum(dim=(1, 2))
    return outputs


def label_maps(config: Mapping[str, Any], net: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    maps, head = net.backbone(batch["image"]), net.semantic_head
    outputs = {"coarse_logits": head.coarse_head(maps), "refined_logits": head(maps)}
    for n, x in enumerate(net.logits({**batch, "original_size": torch.tensor(config["output_sizes"])})):
        outputs |= {f"sem_seg{n}": x, f"argmax{n}": x.argmax(0)}
    return outputs


def train_run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    model, effective = config["model"], config["effective"]
    given = official.settings(model, {key: entry for key, entry in effective.items() if key.startswith("MODEL.")})[1]
    semantic, solver = given["META_ARCHITECTURE"] == "SemanticSegmentor", effective["SOLVER"]
    clip_each, clipping = official.clipping(solver)
    with torch.device("meta"):
        options = create(given).options
    kind: Any = pointrend.PointRendSegmentation if semantic else pointrend.PointRendDetection
    task = kind(**options, optim=official.optim(solver), **({} if semantic else {"clip_each": clip_each}))

    def batch(step: dict[str, Tensor], k: int) -> dict[str, Any]:
        images = [step[f"image{n}"] for n in range(len(model["image_sizes"]))]
        made = official.batch(images, given, task.network.size_divisibility, case)
        made |= {"noise": step["perm_uniform"]} if "perm_uniform" in step else {}
        return {**made, "target": targets(given, model, case, step, k), "point_noise": noise_of(step)}

    whole = {**case, "config": {**config, "train": {"iterations": solver["MAX_ITER"], **config.get("train", {})}}}
    return train(whole, task, convert_official, batch, epochs=1, **clipping)


def points_alone(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    coarse, classes, coords = inputs["coarse"], inputs["classes"].long(), inputs["coords"]
    boxes, first, side = coords.new_tensor(config["boxes"]), config["boxes_image0"], config["grid_side"]
    maps = [inputs[name] for name in sorted(inputs) if name.startswith("feat")]
    pixels, instance = points.image_points(boxes, coords), points.class_uncertainty(coarse, classes)
    places, centres = points.uncertain_cells(instance, config["grid_points"])
    share = config["num_points"], config["oversample_ratio"], config["importance_ratio"]
    uncertainty = partial(points.class_uncertainty, labels=classes)
    counts, strides = [first, len(boxes) - first], [4 * 2**k for k in range(len(maps))]

    return {
        "fine_features": points.fine_features(maps, strides, pixels, counts).transpose(0, 1),
        "train_points": points.uncertain_points(coarse, uncertainty, *share, noise_of(inputs)),
        "grid_indices": places,
        "grid_coords": centres,
        "regular_grid": points.grid_points(side, side, coords).expand(2, -1, -1),
        "uncertainty_instance": instance[:, None],
        "uncertainty_semantic": points.margin_uncertainty(coarse)[:, None],
        "sampled": points.sample_points(coarse, coords),
        "coords_wrt_image": pixels,
    }
