"""Networks as files that run without the zoo; tests/test_contract.py exports those of all pocket recipes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import catalog
from zoo.command.cli import main
from zoo.errors import ZooError
from zoo.weights import export
from zoo.weights.pretrained import Architecture

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
onnx = pytest.mark.skipif(not ONNX, reason="wants the extra: pip install 'paperzoo[export]'")


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("vit_base_patch16", "forward"),
        ("mae_vit_base_patch16", "forward_features"),
        ("moco_v2_resnet50", "features"),
        ("mask_rcnn_r50_fpn", "backbone"),
        ("slowfast_r50_8x8", "forward"),
        ("slowfast_r50_8x8_ava", "forward_features"),
        ("flip_base_patch16", "forward"),
        ("varc_vit_6m", "forward"),
        ("sit_s2", "forward"),
    ],
)
def test_what_is_exported_of_a_model(model: str, part: str) -> None:
    """On the meta device: what can be exported is tested with the pocket recipes' networks."""
    card, entry = catalog.model(model)
    found = export.subject(Architecture(card, entry.name, {}).on_meta())
    assert found.part == part
    assert all(value.shape[0] == 3 for value in found.make(3).values())


class _Two(nn.Module):
    """Two outputs by name; its branch depends on what is in the input, or not."""

    def __init__(self, branch: bool = False, noisy: bool = False) -> None:
        super().__init__()
        self.layer, self.branch, self.noisy = nn.Linear(8 * 8 * 3, 4), branch, noisy

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.branch and images.mean() > 0:
            images = -images
        found = self.layer(images.flatten(1))
        return {"logits": found + torch.rand_like(found) if self.noisy else found, "half": found / 2}


@pytest.mark.parametrize("ending", [".pt2", pytest.param(".onnx", marks=onnx)])
@pytest.mark.parametrize("batch", [None, 2])
def test_a_file_says_how_it_is_used(ending: str, batch: int | None, tmp_path: Path) -> None:
    path = tmp_path / "folder" / f"two{ending}"
    written = export.write(export.subject(_Two(), 8), path, {"classes": ["a", "b"]}, batch)
    assert written.difference <= 1e-6
    assert not written.constant
    sides = "batch" if batch is None else "2"
    assert written.inputs == {"images": f"float32 ({sides}, 3, 8, 8)"}
    assert written.outputs == dict.fromkeys(("logits", "half"), f"float32 ({sides}, 4)")
    facts = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert facts["classes"] == ["a", "b"]
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.json"]
    if ending == ".pt2":
        inside = {"zoo.json": ""}
        torch.export.load(path, extra_files=inside)
        held = inside["zoo.json"]
    else:
        import onnx

        held = {entry.key: entry.value for entry in onnx.load(path).metadata_props}["zoo"]
    assert json.loads(held) == facts


@pytest.mark.parametrize(
    ("network", "line"),
    [
        (_Two(branch=True), "torch.export cannot take _Two.forward: "),
        (_Two(noisy=True), "its outputs differ from the network's by"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(network: nn.Module, line: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=line) as told:
        export.write(export.subject(network, 8), tmp_path / "two.pt2", {})
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.weights.export.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ZooError, match=r"wants the package onnx: pip install 'paperzoo\[export\]'"):
        export.write(export.subject(_Two(), 8), tmp_path / "two.onnx", {})


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["mask_rcnn_r50_fpn", "-o", "x.tflite", "--untrained"], "-o writes .pt2 or .onnx"),
        (["preact_resnet18", "-o", "x.pt2"], "name the weights"),
        (["preact_resnet20_cifar", "-o", "x.pt2", "--untrained", "--batch", "0"], "a batch is 1 or more"),
        (["preact_resnet20_cifar", "-o", "x.pt2", "--untrained", "--part", "tail"], "no part 'tail'; it has"),
        (["preact_resnet20_cifar", "-o", "x.pt2", "--untrained", "--size", "-5"], "--size is 1 or more"),
        (["runs:last", "-o", "x.pt2"], "`zoo fit RECIPE` first"),
        (["preact_resnet20", "-o", "x.pt2"], "unknown model"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_says_no_is_believed() -> None:
    with pytest.raises(ZooError, match="_Two cannot be exported: because"):
        export.subject(_Two(), 8, refused="because")
