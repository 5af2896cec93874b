"""torchvision's own RetinaNets beside ours, filled with their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.detection import retinanet
from zoo.detection.retinanet import RetinaNet, convert_official


def _torchvision(version: int) -> tuple[Any, RetinaNet]:
    from torchvision.models import detection

    make = detection.retinanet_resnet50_fpn if version == 1 else detection.retinanet_resnet50_fpn_v2
    torch.manual_seed(0)
    theirs = make(weights=None, weights_backbone=None, min_size=128, max_size=160).eval()
    for name, value in theirs.named_buffers():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    for name, value in theirs.state_dict().items():
        if name.endswith("bn3.weight"):
            value.fill_(0.2)
        if "head" in name and value.ndim == 4:
            value.normal_(std=(2 / value[0].numel()) ** 0.5)
        if name.endswith("cls_logits.bias"):  # an id that is no class is never found
            value.view(9, 91)[:, [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]] = -100
    return theirs, getattr(retinanet, f"retinanet_r50_fpn_torchvision{'_v2' if version == 2 else ''}")()


@pytest.mark.parametrize("version", [1, 2])
def test_torchvision_s_weights_give_torchvision_s_boxes(version: int) -> None:
    theirs, ours = _torchvision(version)
    if version == 1:  # as its weights were trained
        for module in theirs.modules():
            if type(module).__name__ == "FrozenBatchNorm2d":
                module.eps = 0.0
    ours.load_state_dict(convert_official(theirs.state_dict()))
    image = torch.rand(3, 128, 160, generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        wanted = theirs([image])[0]
        batch = {"image": ((image - mean) / std)[None], "size": torch.tensor([[128, 160]])}
        found = ours.eval().detect(batch)[0]
    assert len(wanted["boxes"]) == len(found["boxes"]) > 50
    ids = torch.tensor(retinanet._COCO_IDS)
    torch.testing.assert_close(found["scores"], wanted["scores"], rtol=1e-4, atol=1e-5)
    same = ids[found["labels"]] == wanted["labels"]
    assert same.float().mean() > 0.95  # equal scores may change places
    torch.testing.assert_close(found["boxes"][same][:50], wanted["boxes"][same][:50], rtol=1e-3, atol=1e-2)
