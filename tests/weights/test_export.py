"""`zoo weights convert`: a checkpoint of ours in a format of others."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from zoo.command import cli
from zoo.nn.resnet import resnet
from zoo.selfsup import moco
from zoo.weights import pretrained


def test_a_checkpoint_of_ours_is_exported_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = moco.MoCoPretraining(arch="resnet18", layers=[1, 1, 1, 1], width=8, dim=8, queue_size=16, bn_splits=2)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, enable_checkpointing=False, **quiet)
    trainer.fit(task, DataLoader([{"views": list(torch.randn(2, 3, 32, 32))}] * 8, batch_size=8))
    trainer.save_checkpoint(tmp_path / "pre.ckpt")
    trunk = moco.convert_trunk(task.network.state_dict())

    command = ["weights", "convert", str(tmp_path / "pre.ckpt"), "--to"]
    assert cli.main([*command, "detectron2", "-o", str(tmp_path / "d2.pkl")]) == 0
    with (tmp_path / "d2.pkl").open("rb") as file:
        content = pickle.load(file)
    assert content["matching_heuristics"] is True
    assert content["__author__"]
    assert all(isinstance(value, np.ndarray) for value in content["model"].values())
    np.testing.assert_array_equal(content["model"]["res5.0.conv2.norm.bias"], trunk["layer4.0.bn2.bias"])

    assert cli.main([*command, "detectron2", "-o", str(tmp_path / "d2.pth")]) == 0
    loaded = torch.load(tmp_path / "d2.pth", weights_only=True)
    assert torch.equal(loaded["model"]["stem.conv1.weight"], trunk["conv1.weight"])

    assert cli.main([*command, "torchvision", "-o", str(tmp_path / "tv.safetensors")]) == 0
    plain = pretrained.read_state_dict(tmp_path / "tv.safetensors")
    resnet("resnet18", 0, layers=[1, 1, 1, 1], width=8).load_state_dict(plain)
    assert cli.main([*command, "detectron2", "-o", str(tmp_path / "d2.safetensors")]) == 2
    assert "more than tensors" in capsys.readouterr().err
    assert cli.main([*command, "detectron", "-o", str(tmp_path / "d2.pkl")]) == 2
    assert "did you mean 'detectron2'" in capsys.readouterr().err
    assert cli.main([*command, "detectron2"]) == 2
    torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
    assert cli.main(["weights", "convert", str(tmp_path / "foreign.pth"), "--to", "x", "-o", "x.pth"]) == 2
    assert "not a checkpoint of a task of the zoo" in capsys.readouterr().err
