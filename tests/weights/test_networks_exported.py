"""Networks as files that run without the zoo: every pocket recipe's, compared, with any number of samples."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo import catalog
from zoo.command.cli import main
from zoo.errors import ZooError
from zoo.weights import export

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
onnx = pytest.mark.skipif(not ONNX, reason="wants the extra: pip install 'paperzoo[export]'")
# What a user gets of each, where it is not forward: an encoder, a backbone, a sampler of one step.
PARTS = {
    "mae": "forward_features",
    "mask_rcnn": "backbone",
    **dict.fromkeys(("moco", "moco_v2", "moco_v3", "simsiam", "asym_siam"), "features"),
    **dict.fromkeys(("meanflow", "imf", "pmf", "drifting"), "sample"),
}


def _network(recipe: str) -> tuple[nn.Module, int | None]:
    quiet = {"trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.logger": False}
    task, data, _ = zoo.load_recipe(recipe, quiet)
    network, size = task.get_submodule("network"), getattr(data, "image_size", None)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the start, where gates are 0
        for p in network.parameters():
            p += 0.02 * torch.randn(p.shape, generator=draw)
    return network, size if isinstance(size, int) else 64


@pytest.mark.parametrize("paper", sorted({name.partition("/")[0] for name in catalog.list_recipes("*/pocket")}))
def test_every_paper(paper: str) -> None:
    """torch.export takes it with any number of samples; what that writes and reads is tested below."""
    network, size = _network(f"{paper}/pocket")
    subject = export.subject(network, size)
    assert subject.part == PARTS.get(paper, "forward")
    program = export.trace(subject, subject.make(2), dynamic=True).module()
    for count in (1, 3):
        given = subject.make(count)
        with torch.no_grad():
            torch.testing.assert_close(program(**given), subject.module(**given))


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
        (["runs:last", "-o", "x.pt2"], "no last.ckpt under runs"),
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
