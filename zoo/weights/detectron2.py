"""Checkpoints of detectron2 (and of Caffe2's Detectron before it) in the names that detectors have here.

A paper's `convert_official` is the rules of the parts its network has, and its own:

    detectron2.rename(state_dict, (detectron2.backbone_name, detectron2.rpn_name, my_head_name), "detectron2's ...")

A rule turns an official key into ours, or gives None for a key that is none of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.ops.boxes import cell_anchors
from zoo.weights.pretrained import fill

Rule = Callable[[str], str | None]

LEAF = r"(?:(norm)\.)?(weight|bias|running_mean|running_var|num_batches_tracked)"
_STEM = re.compile(rf"stem\.conv1\.{LEAF}")
_OFFSET = re.compile(r"res([2-5])\.(\d+)\.(conv2_offset\.(?:weight|bias))")
_BLOCK = re.compile(rf"res([2-5])\.(\d+)\.(?:conv([123])|shortcut)\.{LEAF}")
_PYRAMID = re.compile(rf"backbone\.fpn_(lateral|output)(\d)\.{LEAF}")
_TOP = re.compile(r"backbone\.top_block\.(p[67]\.(?:weight|bias))")
_CONV_NORM = re.compile(rf"roi_heads\.(?:box_head(?:\.(\d))?\.(conv\d)|(mask_head\.mask_fcn\d))\.{LEAF}")
_RPN = re.compile(
    r"proposal_generator\.rpn_head\.(?:(conv)(?:\.conv(\d))?|(objectness_logits|anchor_deltas))\.(weight|bias)"
)
_BOX = re.compile(
    r"roi_heads\.(box_head|box_predictor)(?:\.(\d))?"
    r"\.((?:fc\d|cls_score|bbox_pred)\.(?:weight|bias)|fed_loss_cls_weights)"
)
_SAME = re.compile(
    r"roi_heads\.(?:mask_head\.(?:deconv|predictor)|keypoint_head\.(?:conv_fcn\d+|score_lowres))\.(?:weight|bias)"
)
_SEMANTIC = re.compile(rf"sem_seg_head\.(?:(p\d)\.(\d)\.{LEAF}|(predictor\.(?:weight|bias)))")
_COARSE = re.compile(
    r"roi_heads\.(?:mask_head\.coarse_head|mask_coarse_head)\."
    r"(?:coarse_mask_)?(reduce_(?:channel|spatial)_dim_conv|fc\d+|prediction)\.(weight|bias)"
)
_POINT = re.compile(
    r"(?:roi_heads\.(mask_head\.point_head|mask_point_head)|sem_seg_head\.point_head)\."
    r"(fc\d+|predictor)\.(weight|bias)"
)
_NOT_WEIGHTS = re.compile(r"pixel_(?:mean|std)|(?:proposal_generator\.)?anchor_generator\.cell_anchors\.\d")

_BGR_MEAN = (103.53, 116.28, 123.675)
_ANCHOR_SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)


def rename(state_dict: Mapping[str, Tensor], rules: Sequence[Rule], what: str) -> dict[str, Tensor]:
    """A state dict in our names: each key by the first of the `rules` that knows it.

    Early files also hold the pixels' mean and deviation and the anchors of R-CNNs; they are compared with what the
    published networks take, and left out.

    Raises:
        ZooError: a key that no rule knows (`what` says what it should have been), two keys of one name, or a mean or
            anchors that are not those of the published networks.
    """
    _check_constants({key: value for key, value in state_dict.items() if _NOT_WEIGHTS.fullmatch(key)})
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if _NOT_WEIGHTS.fullmatch(key):
            continue
        name = next((found for rule in rules if (found := rule(key)) is not None), None)
        if name is None:
            raise ZooError(f"not a checkpoint of {what}: unknown key {key!r}")
        if name in renamed:
            raise ZooError(f"not a checkpoint of {what}: {key!r} and another key both mean {name!r}")
        renamed[name] = value
    return renamed


def ours(state_dict: Mapping[str, Tensor], known: re.Pattern[str]) -> dict[str, Tensor]:
    """A state dict in our own names as it is.

    Raises:
        ZooError: keys that are not `known`.
    """
    if foreign := [key for key in state_dict if not known.fullmatch(key)]:
        raise ZooError(f"not a checkpoint of a detector: {len(foreign)} unknown keys, such as {foreign[0]!r}")
    return dict(state_dict)


def trunk_name(key: str) -> str | None:
    """torchvision's name of a parameter of detectron2's ResNet."""
    if match := _STEM.fullmatch(key):
        return f"{'bn1' if match[1] else 'conv1'}.{match[2]}"
    if match := _BLOCK.fullmatch(key):
        stage, block, conv, norm, leaf = match.groups()
        part = f"{'bn' if norm else 'conv'}{conv}" if conv else f"downsample.{int(bool(norm))}"
        return f"layer{int(stage) - 1}.{block}.{part}.{leaf}"
    if match := _OFFSET.fullmatch(key):
        return f"layer{int(match[1]) - 1}.{match[2]}.{match[3]}"
    return None


def backbone_name(key: str) -> str | None:
    """A ResNet (`backbone.` or `backbone.bottom_up.`), the pyramid on it, and its p6 and p7."""
    if match := re.fullmatch(r"(backbone(?:\.bottom_up)?)\.((?:stem|res\d)\..+)", key):
        name = trunk_name(match[2])
        return name and f"{match[1]}.{name}"
    if match := _PYRAMID.fullmatch(key):
        kind, level, norm, leaf = match.groups()
        return f"backbone.{kind}.{'c' if kind == 'lateral' else 'p'}{level}.{int(bool(norm))}.{leaf}"
    if match := _TOP.fullmatch(key):
        return f"backbone.top.{match[1]}"
    return None


def rpn_name(key: str) -> str | None:
    """The head of a region proposal network."""
    if match := _RPN.fullmatch(key):
        conv, index, layer, leaf = match.groups()
        return f"rpn.head.conv.{2 * int(index or 0)}.{leaf}" if conv else f"rpn.head.{layer}.{leaf}"
    return None


def roi_name(key: str) -> str | None:
    """Box heads, cascades of them, mask and keypoint heads, and the fifth stage as a head."""
    if match := re.fullmatch(r"roi_heads\.(res5\..+)", key):
        name = trunk_name(match[1])
        return name and f"roi_heads.{name.replace('layer4', 'res5', 1)}"
    if match := _CONV_NORM.fullmatch(key):
        stage, conv, mask, norm, leaf = match.groups()
        return f"roi_heads.{mask or f'box_heads.{stage or 0}.{conv}'}.{int(bool(norm))}.{leaf}"
    if match := _BOX.fullmatch(key):
        return f"roi_heads.{match[1]}s.{match[2] or 0}.{match[3]}"
    return key if _SAME.fullmatch(key) else None


def semantic_name(key: str) -> str | None:
    """The semantic branch on a pyramid; upsampling layers count there, so that stages are 0, 2, 4."""
    if match := _SEMANTIC.fullmatch(key):
        level, stage, norm, leaf, predictor = match.groups()
        if predictor:
            return f"semantic_head.{predictor}"
        return None if int(stage) % 2 else f"semantic_head.branches.{level}.{int(stage) // 2}.{int(bool(norm))}.{leaf}"
    return None


def point_name(key: str) -> str | None:
    """The heads of projects/PointRend, in the names of either time: coarse masks, points, and the semantic branch that
    points refine."""
    if match := _COARSE.fullmatch(key):
        return f"roi_heads.mask_head.coarse_head.{match[1]}.{match[2]}"
    if match := _POINT.fullmatch(key):
        return f"{'roi_heads.mask_head' if match[1] else 'semantic_head'}.point_head.{match[2]}.{match[3]}"
    if key.startswith(place := "sem_seg_head.coarse_sem_seg_head."):
        name = semantic_name(f"sem_seg_head.{key.removeprefix(place)}")
        return name and name.replace("semantic_head.", "semantic_head.coarse_head.", 1)
    return None


def _check_constants(given: Mapping[str, Tensor]) -> None:
    anchors = {}
    for key, value in given.items():
        if value.is_meta:
            continue
        if key == "pixel_mean" and not torch.allclose(value.flatten().float(), torch.tensor(_BGR_MEAN), atol=1e-3):
            raise ZooError(f"the file's pixel_mean is {value.flatten().tolist()}; the published networks' {_BGR_MEAN}")
        if "cell_anchors" in key:
            anchors[int(key.rpartition(".")[2])] = value.float()
    if anchors:
        levels = [_ANCHOR_SIZES] if len(anchors) == 1 else [(size,) for size in _ANCHOR_SIZES]
        wanted = [cell_anchors(sizes, (0.5, 1.0, 2.0), torch.device("cpu")) for sizes in levels]
        found = [anchors[level] for level in sorted(anchors)]
        same = [a.shape == b.shape and torch.allclose(a, b, atol=1e-2) for a, b in zip(found, wanted, strict=False)]
        if len(found) != len(wanted) or not all(same):
            raise ZooError("the file's anchors are not those of the published networks (32 to 512 pixels, 3 ratios)")


_CAFFE2 = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_CAFFE2_BLOCK = re.compile(r"res([2-5])_(\d+)_(branch1|branch2[abc])_(?:(bn|gn)_)?(w|s|b|rm|riv)")
_CAFFE2_STEM = re.compile(r"(?:res_)?conv1_(?:(bn|gn)_)?(w|s|b|rm|riv)")
_CLASSIFIER = re.compile(r"(?:(?:stem\.)?fc|linear)\.(?:weight|bias)|(?:pred|fc1000)_[wb]|conv1_b|.+_momentum|lr")


def convert_trunk(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An ImageNet classifier's trunk in torchvision's names: of detectron2's copies, of Caffe2's pickles, or of
    torchvision's own layout. The classifier itself, momenta and the like are left out.

    A BatchNorm of Caffe2 without statistics is an affine layer: mean 0, variance 1.

    Raises:
        ZooError: a key of no such network.
    """
    converted: dict[str, Tensor] = {}
    affine: set[str] = set()
    for key, value in state_dict.items():
        if re.fullmatch(r"(?:conv1|bn1|layer[1-4])\..+", key):
            converted[key] = value
            continue
        if _CLASSIFIER.fullmatch(key):
            continue
        official, norm = key, None
        if match := _CAFFE2_STEM.fullmatch(key):
            norm, leaf = match.groups()
            official = f"stem.conv1.{_caffe2_leaf(norm, leaf)}"
        elif match := _CAFFE2_BLOCK.fullmatch(key):
            stage, block, branch, norm, leaf = match.groups()
            official = f"res{stage}.{block}.{_CAFFE2[branch]}.{_caffe2_leaf(norm, leaf)}"
        name = trunk_name(official)
        if name is None:
            raise ZooError(f"not a ResNet of detectron2: unknown key {key!r}")
        converted[name] = value
        if norm == "bn":
            affine.add(name.rpartition(".")[0])
    for name in affine:
        weight = converted[f"{name}.weight"]
        converted.setdefault(f"{name}.running_mean", torch.zeros_like(weight))
        converted.setdefault(f"{name}.running_var", torch.full_like(weight, 1 - 1e-5))  # the layer adds its eps of 1e-5
    return converted


def _caffe2_leaf(norm: str | None, leaf: str) -> str:
    names = {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
    return f"norm.{names[leaf]}" if norm else names[leaf]


def fill_detector(
    network: nn.Module, state: Mapping[str, Tensor], source: str | Path, class_layers: re.Pattern[str]
) -> None:
    """Fill a detector from another's `state`, in our names. Of the layers named by `class_layers` those of another
    shape (of another number of classes) keep their fresh weights; everything else must match.

    Raises:
        ZooError: it does not match.
    """
    own = network.state_dict()
    other = {
        key
        for key, value in state.items()
        if class_layers.fullmatch(key) and key in own and own[key].shape != value.shape
    }
    fill(
        network, {key: value for key, value in state.items() if key not in other}, source, lambda key: key not in other
    )


def fill_trunk(
    network: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    prefix: str = "backbone.bottom_up.",
    res5: str | None = None,
) -> None:
    """Fill a detector's ResNet from an ImageNet classifier of any layout that :func:`convert_trunk` reads.

    Args:
        network: the detector.
        state: the classifier's.
        source: where it comes from, for messages.
        prefix: what the ResNet's names begin with.
        res5: likewise those of the fifth stage where it stands elsewhere; null: where the others are.

    Raises:
        ZooError: no such classifier, or one of another size.
    """
    own = network.state_dict()
    named = {
        f"{res5}{key.removeprefix('layer4.')}" if res5 and key.startswith("layer4.") else f"{prefix}{key}": value
        for key, value in convert_trunk(state).items()
    }
    # A frozen BatchNorm counts no batches.
    named = {key: value for key, value in named.items() if key in own or not key.endswith("num_batches_tracked")}
    parts = (f"{prefix}conv1.", f"{prefix}bn1.", f"{prefix}layer", *([res5] if res5 else []))

    def wanted(key: str) -> bool:  # a BatchNorm that trains counts from 0 where the classifier's did not count
        return key.startswith(parts) and (key in named or not key.endswith("num_batches_tracked"))

    fill(network, named, source, wanted)
