"""Runs the kinds of cases that were taken from detectron2's Panoptic FPN and from panopticapi; everything else is read
from the case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.detection.panoptic_fpn import CombineConfig, PanopticFPN, combine, convert_official
from zoo.metrics.panoptic import PanopticQuality
from zoo.nn.detection.semantic import resize_logits
from zoo.parity import Case, filled_inputs, gradients, load_filled, named, shared

official = shared("detectron2")
_SAME = lambda value: value  # noqa: E731
FIELDS = official.semantic_fields("semantic") | {
    "PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": ("combine.overlap", _SAME),
    "PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": ("combine.stuff_area", _SAME),
    "PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": ("combine.score", _SAME),
}
ELSEWHERE = {"META_ARCHITECTURE": ("PanopticFPN",), "SEM_SEG_HEAD.NAME": ("SemSegFPNHead",)}


def run(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    if "num_categories" in config:
        return quality(case)
    return network(case) if "training" in config else combination(case)


def network(case: Case) -> dict[str, Tensor]:
    """Losses and gradients of a batch, or detections, logits and segments."""
    config, inputs = case["config"], filled_inputs(case)
    _, given = official.settings(config)
    options = official.options(given, FIELDS, ELSEWHERE)
    net: Any = load_filled(PanopticFPN(**options), case, convert_official).train(config["training"])
    images = [inputs[f"image{n}"] for n in range(len(config["image_sizes"]))]
    batch = official.batch(images, given, net.size_divisibility, case)
    if not config["training"]:
        with torch.no_grad():
            return evaluate(case, net, batch)
    targets = official.targets(config, case)
    for target, labels in zip(targets, official.semantic_targets(len(images), given, inputs), strict=True):
        target["semantic"] = labels
    losses = net({**batch, "target": targets}, inputs["perm_uniform"])
    weight = given.get("PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", 1.0)  # there not of the classification (ledger)
    losses |= {name: losses[name] * weight for name in ("loss_box_reg", "loss_mask") if name in losses}
    total = sum(losses.values())
    total.backward()
    return {**losses, "total": total, **named(case, convert_official, grad=gradients(net))}


def evaluate(case: Case, net: PanopticFPN, batch: dict[str, Any]) -> dict[str, Tensor]:
    config = case["config"]
    detections, logits = net.raw(batch)
    whole = net.semantic_head.upsampled(logits)
    outputs = {"sem_head_layers": logits, "sem_logits_padded": whole}
    originals = [tuple(size) for size in config["output_sizes"]]
    segmented = net.segment({**batch, "original_size": torch.tensor(originals)})
    for n, (size, original) in enumerate(zip(config["image_sizes"], originals, strict=True)):
        final = net.postprocess(detections[n], size, original)
        found = {"boxes": final["boxes"], "scores": final["scores"], "classes": final["labels"]}
        found |= {"mask_area": final["masks"].sum(dim=(1, 2)), "sem_logits": resize_logits(whole[n], size, original)}
        found |= {"sem_argmax": segmented[n]["semantic"], "panoptic": segmented[n]["panoptic"]}
        found["segments"] = segmented[n]["segments"][:, :3]
        outputs |= {f"{key}{n}": value for key, value in found.items()}
    return outputs


def combination(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    height, width = config["image_size"]
    uniform = inputs["boxes_uniform"]
    corner = uniform[:, :2] * uniform.new_tensor([width - 12, height - 12])
    far = corner + 12 + uniform[:, 2:] * 0.5 * uniform.new_tensor([width, height])
    masks = official.ellipses(torch.cat([corner, far], dim=1), height, width)
    block = config["semantic_block"]
    semantic = inputs["semantic"].long().repeat_interleave(block, 0).repeat_interleave(block, 1)[:height, :width]
    rule = CombineConfig(
        score=config["score_threshold"], overlap=config["overlap_threshold"], stuff_area=config["stuff_area_limit"]
    )
    found = combine(masks, inputs["scores"], inputs["classes"].long(), semantic, rule)
    return {"panoptic": found["panoptic"], "segments": found["segments"][:, :3]}


def quality(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    categories, things = config["num_categories"], config["num_things"]

    def segments(ids: Tensor, crowds: list[int]) -> Tensor:
        rows = []
        for number in ids.unique().tolist():
            category = number % categories
            thing = category < things
            label, crowd = category if thing else category - things, int(number in crowds)
            rows += [(number, int(thing), label, crowd, int((ids == number).sum()))] if number else []
        return torch.tensor(rows).view(-1, 5)

    metric = PanopticQuality(things, categories - things)
    for n in range(config["num_images"]):
        block = config["block"]
        true, found = (
            inputs[f"{kind}{n}"].long().repeat_interleave(block, 0).repeat_interleave(block, 1)
            for kind in ("gt", "pred")
        )
        found = found.roll((config["shift"], config["shift"]), (0, 1))
        truth = {"ids": true, "segments": segments(true, config["crowd_ids"])}
        metric.update(
            [{"panoptic": found, "segments": segments(found, [])}], [{"image_id": torch.tensor(n), "panoptic": truth}]
        )
    numbers = metric.compute()
    counts = torch.from_numpy(metric.by_class)
    iou, right, wrong, missed = counts.T
    half = (right + wrong / 2 + missed / 2).clamp(min=0.5)
    there = counts[:, 1:].any(dim=1)
    outputs = {"counts": counts, "per_category": torch.stack([iou / half, iou / right.clamp(min=1), right / half], 1)}
    parts = {"all": ("", there), "things": ("_th", there[:things]), "stuff": ("_st", there[things:])}
    for name, (ending, some) in parts.items():
        values = [numbers[f"{kind}{ending}"] / 100 for kind in ("PQ", "SQ", "RQ")]
        outputs[name] = torch.stack([*values, some.sum().to(values[0].dtype)])
    return outputs
