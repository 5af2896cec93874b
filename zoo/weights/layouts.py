"""Layouts of published files that several papers have: keys checked and renamed, one of several networks taken out, and
a ResNet's trunk in the formats of detectors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.resnet import detectron2_trunk

# Patterns of keys: of what has scale and shift, of a BatchNorm, and of a ResNet in torchvision's names, without `fc`.
AFFINE = r"(?:weight|bias)"
BATCH_NORM = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
RESNET = (
    rf"(?:conv1\.weight|bn1\.{BATCH_NORM}"
    rf"|layer\d\.\d+\.(?:conv\d\.weight|bn\d\.{BATCH_NORM}|downsample\.(?:0\.weight|1\.{BATCH_NORM})))"
)

Trunk = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def renamed(state_dict: Mapping[str, Tensor], layout: re.Pattern[str], kind: str) -> dict[str, Tensor]:
    """A state dict each of whose keys matches `layout` as a whole, under the pattern's first group.

    Raises:
        ZooError: a key that does not; `kind` says what the file is not, such as "a SimSiam checkpoint".
    """
    found = {}
    for key, value in state_dict.items():
        match = layout.fullmatch(key)
        if match is None:
            raise ZooError(f"not {kind}: unknown key {key!r}")
        found[match[1]] = value
    return found


def one_network(
    state: Mapping[str, Tensor], name: str, lacking: str, sign: tuple[str, ...] = ("conv1.weight",)
) -> dict:
    """Of a state dict of several networks the one called `name`, without its head, `fc` or `head`; a state dict of one
    network is it itself.

    Args:
        state: in our names.
        name: such as "encoder_q".
        lacking: what is told of a state dict without it.
        sign: keys of which such a network has one.

    Raises:
        ZooError: there is no such network.
    """
    prefix = f"{name}."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not any(key in state for key in sign):
        raise ZooError(lacking)
    return {key: value for key, value in state.items() if not key.startswith(("fc.", "head."))}


def resnet_exports(author: str, trunk: Trunk) -> dict[str, Callable[[Mapping[str, Tensor]], dict[str, Any]]]:
    """Formats of `zoo weights convert NAME --to FORMAT` for a pre-trained ResNet: from our state dict to what the file
    holds. `trunk` takes the ResNet out of it."""

    def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"model": detectron2_trunk(trunk(state)), "__author__": author, "matching_heuristics": True}

    return {"detectron2": to_detectron2, "torchvision": trunk}
