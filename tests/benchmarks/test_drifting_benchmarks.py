"""Drifting's speed comparison runs, and its plain loss is the same loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.speed import drifting, run
from zoo.generation.drifting import drift_loss


@pytest.mark.parametrize("model", ["step_tiny", "loss_tiny"])
def test_speed_compares_whole_steps(tmp_path: Path, model: str) -> None:
    arguments = ["drifting", "--model", model, "--batch", "4", "--repeats", "1", "--warmup", "1", "--only", "step"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / f"drifting_{model}_float32_b4_cpu_t1.json").read_text())
    names = [row["name"] for row in record["step"]["contenders"]]
    assert names == (["zoo", "plain"] if model == "loss_tiny" else ["zoo", "diffusers"])
    assert record["step"]["work"]["flops"] > 0


def test_the_plain_loss_is_ours() -> None:
    gen, real = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 6, 8)
    values = [drift_loss(gen, real).loss, drifting.plain_loss(gen, real)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), gen) for value in values))
