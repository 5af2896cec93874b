"""Names of published video networks: layouts are told apart, and names of strangers refused."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ZooError
from zoo.nn.video_names import from_published, layout_of, our_name
from zoo.video import slowfast as sf


def test_layouts_are_told_apart_and_strangers_refused() -> None:
    one = torch.zeros(2)
    caffe2 = {"conv1_w": one, "res_conv1_bn_riv": one, "pred_w": torch.zeros(3, 2, 1, 1, 1), "lr": one}
    assert layout_of(caffe2) == "Caffe2"
    converted = sf.convert_official({**caffe2, "conv1_w_momentum": one, "model_iter": one})
    assert converted.keys() == {
        "pathway.stem.conv.weight",
        "pathway.stem.bn.running_var",
        "pathway.stem.bn.num_batches_tracked",
        "head.fc.weight",
    }
    assert converted["head.fc.weight"].shape == (3, 2)
    for layout, name, ours in (
        ("Caffe2", "t_res4_22_branch2c_bn_subsample_bn_s", "lateral.3.bn.weight"),
        ("Caffe2", "t_pool1_subsample_w", "lateral.0.conv.weight"),
        ("Caffe2", "nonlocal_conv4_13_bn_b", "slow.stages.2.nonlocals.13.bn.bias"),
        ("PySlowFast", "s3.pathway1_res0.branch1_bn.bias", "fast.stages.1.blocks.0.shortcut_bn.bias"),
        ("PySlowFast", "s4_fuse.conv_f2s.weight", "lateral.3.conv.weight"),
        ("PyTorchVideo", "model.blocks.1.multipathway_fusion.norm.weight", "lateral.1.bn.weight"),
        ("PyTorchVideo", "detection_head.proj.bias", "head.fc.bias"),
    ):
        assert our_name(name, layout, ("slow", "fast")) == ours
    network = sf.SlowFast(depth=18, width=8)
    assert sf.convert_official(network.state_dict()).keys() == network.state_dict().keys()
    for wrong in ({"conv1_w": one, "res9_w": one}, {"s1.pathway0_stem.conv.weight": one, "s1.what": one}, {"fc": one}):
        with pytest.raises(ZooError, match="not a"):
            sf.convert_official(wrong)
    with pytest.raises(ZooError, match=r"1 pathway.*: 't_conv1_w'"):
        from_published({"conv1_w": one, "t_conv1_w": one}, ("pathway",))
