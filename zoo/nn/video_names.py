"""Published layouts of 3-D ResNets (Caffe2, PySlowFast, PyTorchVideo) in the names of :mod:`zoo.nn.resnet3d`.

    Caffe2                             PySlowFast                              PyTorchVideo
    conv1_w, res_conv1_bn_s            s1.pathway0_stem.{conv,bn}              blocks.0.multipathway_blocks.0.{conv,norm}
    res4_0_branch1_w, ..._bn_rm        s4.pathway0_res0.branch1{,_bn}          blocks.3....res_blocks.0.branch1_{conv,norm}
    res4_5_branch2a_w, ..._bn_riv      s4.pathway0_res5.branch2.a{,_bn}        blocks.3....res_blocks.5.branch2.{conv,norm}_a
    nonlocal_conv4_5_theta_b           s4.pathway0_nonlocal5.conv_theta        -
    t_conv1_w, t_res4_5_branch2a_w     s1.pathway1_stem, s4.pathway1_res5      blocks....multipathway_blocks.1
    t_pool1_subsample_w, ..._bn_s      s1_fuse.{conv_f2s,bn}                   blocks.0.multipathway_fusion.{conv_fast_to_slow,norm}
    t_res2_2_branch2c_bn_subsample_w   s2_fuse.conv_f2s                        blocks.1.multipathway_fusion.conv_fast_to_slow
    pred_w                             head.projection                         blocks.6.proj, blocks.5.proj, detection_head.proj

Caffe2's `_riv` is the running variance as it stands. PyTorchVideo's networks of one pathway have no
`multipathway_blocks.0`, and those that classify boxes begin with `model.`.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.errors import ZooError

_LEAF = {
    "w": "weight",
    "b": "bias",
    "bn_s": "weight",
    "bn_b": "bias",
    "bn_rm": "running_mean",
    "bn_riv": "running_var",
}
_SOLVER = re.compile(r".*_momentum|lr|model_iter")  # what Caffe2's solver left beside the weights
_END = rf"(?P<leaf>{'|'.join(_LEAF)})"
_PARAM = r"(?P<leaf>weight|bias|running_mean|running_var|num_batches_tracked)"

# A pattern, and the name of the layer it is about: {path} of a pathway, {kind} conv or bn. Stages count from res2 = 0.
_CAFFE2 = (
    (rf"(?P<fast>t_)?(?:res_)?conv1_{_END}", "{path}.stem.{kind}"),
    (
        rf"(?P<fast>t_)?res(?P<stage>\d)_(?P<unit>\d+)_branch1_{_END}",
        "{path}.stages.{stage}.blocks.{unit}.shortcut_{kind}",
    ),
    (
        rf"(?P<fast>t_)?res(?P<stage>\d)_(?P<unit>\d+)_branch2(?P<part>[a-c])_{_END}",
        "{path}.stages.{stage}.blocks.{unit}.{kind}_{part}",
    ),
    (
        rf"nonlocal_conv(?P<stage>\d)_(?P<unit>\d+)_(?P<part>theta|phi|g|out)_{_END}",
        "{path}.stages.{stage}.nonlocals.{unit}.{part}",
    ),
    (rf"nonlocal_conv(?P<stage>\d)_(?P<unit>\d+)_{_END}", "{path}.stages.{stage}.nonlocals.{unit}.bn"),
    (rf"t_pool1_subsample_{_END}", "lateral.0.{kind}"),
    (rf"t_res(?P<fuse>\d)_\d+_branch2[a-c]_bn_subsample_{_END}", "lateral.{fuse}.{kind}"),
    (rf"pred_{_END}", "head.fc"),
)
_PYSLOWFAST = (
    (rf"s1\.pathway(?P<p>\d)_stem\.(?P<kind>conv|bn)\.{_PARAM}", "{path}.stem.{kind}"),
    (
        rf"s(?P<stage>\d)\.pathway(?P<p>\d)_res(?P<unit>\d+)\.branch1(?P<norm>_bn)?\.{_PARAM}",
        "{path}.stages.{stage}.blocks.{unit}.shortcut_{kind}",
    ),
    (
        rf"s(?P<stage>\d)\.pathway(?P<p>\d)_res(?P<unit>\d+)\.branch2\.(?P<part>[a-c])(?P<norm>_bn)?\.{_PARAM}",
        "{path}.stages.{stage}.blocks.{unit}.{kind}_{part}",
    ),
    (
        rf"s(?P<stage>\d)\.pathway(?P<p>\d)_nonlocal(?P<unit>\d+)\.(?:conv_)?(?P<part>theta|phi|g|out|bn)\.{_PARAM}",
        "{path}.stages.{stage}.nonlocals.{unit}.{part}",
    ),
    (rf"s(?P<fuse>\d)_fuse\.(?:conv_f2s|(?P<norm>bn))\.{_PARAM}", "lateral.{fuse}.{kind}"),
    (rf"head\.projection\.{_PARAM}", "head.fc"),
)
_P = r"(?:multipathway_blocks\.(?P<p>\d)\.)?"
_PYTORCHVIDEO = (
    (rf"blocks\.0\.{_P}(?:conv|(?P<norm>norm))\.{_PARAM}", "{path}.stem.{kind}"),
    (
        rf"blocks\.(?P<stage1>\d)\.{_P}res_blocks\.(?P<unit>\d+)\.branch1_(?:conv|(?P<norm>norm))\.{_PARAM}",
        "{path}.stages.{stage}.blocks.{unit}.shortcut_{kind}",
    ),
    (
        rf"blocks\.(?P<stage1>\d)\.{_P}res_blocks\.(?P<unit>\d+)\.branch2\.(?:conv|(?P<norm>norm))_(?P<part>[a-c])\.{_PARAM}",
        "{path}.stages.{stage}.blocks.{unit}.{kind}_{part}",
    ),
    (
        rf"blocks\.(?P<fuse0>\d)\.multipathway_fusion\.(?:conv_fast_to_slow|(?P<norm>norm))\.{_PARAM}",
        "lateral.{fuse}.{kind}",
    ),
    (rf"(?:blocks\.[56]|detection_head)\.proj\.{_PARAM}", "head.fc"),
)
_LAYOUTS = {
    name: tuple((re.compile(pattern), layer) for pattern, layer in rules)
    for name, rules in (("Caffe2", _CAFFE2), ("PySlowFast", _PYSLOWFAST), ("PyTorchVideo", _PYTORCHVIDEO))
}


def layout_of(names: Mapping[str, Tensor]) -> str | None:
    """The layout that these names are of: "Caffe2", "PySlowFast" or "PyTorchVideo"; None: of none of them."""
    for layout, mark in (
        ("Caffe2", r"conv1_w"),
        ("PySlowFast", r"s1\.path.*"),
        ("PyTorchVideo", r"(model\.)?blocks\..*"),
    ):
        if any(re.fullmatch(mark, name) for name in names):
            return layout
    return None


def our_name(name: str, layout: str, pathways: tuple[str, ...]) -> str:
    """Our name of a published one.

    Args:
        name: the published one.
        layout: which of the three.
        pathways: what the network here calls its pathways, the slow one first.

    Raises:
        ZooError: no such name in this layout.
    """
    for rule, layer in _LAYOUTS[layout]:
        found = rule.fullmatch(name.removeprefix("model.") if layout == "PyTorchVideo" else name)
        if found is None:
            continue
        parts = found.groupdict()
        leaf, place = parts["leaf"], int(parts.get("p") or bool(parts.get("fast")))
        norm = bool(parts.get("norm")) or leaf.startswith("bn_")
        if place >= len(pathways):
            break
        if parts.get("stage1"):
            stage = int(parts["stage1"]) - 1
        else:
            stage = int(parts.get("stage") or 2) - 2
        fuse = int(parts["fuse0"]) if parts.get("fuse0") else int(parts.get("fuse") or 1) - 1
        named = {**parts, "path": pathways[place], "stage": stage, "fuse": fuse}
        named["kind"] = parts.get("kind") or ("bn" if norm else "conv")
        return f"{layer.format(**named)}.{_LEAF.get(leaf, leaf)}"
    raise ZooError(f"not a name of {layout}'s video networks of {len(pathways)} pathway(s): {name!r}")


def from_published(state_dict: Mapping[str, Tensor], pathways: tuple[str, ...]) -> dict[str, Tensor]:
    """A state dict of any of the three layouts under our names; one under our names passes unchanged.

    What Caffe2's solver left beside the weights (`*_momentum`, `lr`, `model_iter`) is dropped, the counters
    `num_batches_tracked`, which Caffe2 does not have, are added as 0, and its classifier is made a matrix.

    Raises:
        ZooError: a name that belongs to no layout.
    """
    layout = layout_of(state_dict)
    if layout is None:
        if foreign := [name for name in state_dict if not name.startswith((*pathways, "lateral.", "head."))]:
            raise ZooError(f"not a 3-D ResNet: {len(foreign)} unknown keys, such as {foreign[0]!r}")
        return dict(state_dict)
    converted: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if layout == "Caffe2" and _SOLVER.fullmatch(name):
            continue
        ours = our_name(name, layout, pathways)
        converted[ours] = value.flatten(1) if name == "pred_w" else value
        if layout == "Caffe2" and ours.endswith("running_var"):
            counter = torch.zeros((), dtype=torch.long, device=value.device)
            converted[ours.removesuffix("running_var") + "num_batches_tracked"] = counter
    return converted
