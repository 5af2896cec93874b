"""The speed benchmark of JiT, and what it brought to the harness: memory of a step, drawing of samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.speed import harness, jit, run

FAKE_OFFICIAL = """
import torch


class JiT(torch.nn.Module):
    def __init__(self, hidden_size, **options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size).cuda())

    @torch.compile
    def forward(self, x):
        return x * self.weight.sum().cuda()


JiT_models = {"JiT-B/16": lambda **options: JiT(**options)}


class Denoiser(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.net = JiT_models[args.model](proj_drop=args.proj_dropout, img_size=args.img_size)

    def forward(self, images, labels):
        return (self.net(images) - 1).square().mean()

    def generate(self, labels):
        return self.net(torch.randn(len(labels), 3, 8, 8))
"""


def test_jit_speed_runs_with_its_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "denoiser.py").write_text(FAKE_OFFICIAL)
    monkeypatch.setattr(jit, "package_version", lambda name: "1" if name == "einops" else None)
    given = ["jit", "--model", "tiny", "--batch", "2", "--repeats", "1", "--warmup", "0", "--out", str(tmp_path)]
    given += ["--official", str(tmp_path)]
    monkeypatch.setattr(jit, "STEPS", 2)
    assert run.main([*given, "--only", "step", "--memory"]) == 0
    record = json.loads((tmp_path / "jit_tiny_float32_b2_cpu_t1.json").read_text())
    contenders = record["step"]["contenders"]
    assert [row["name"] for row in contenders] == ["zoo", "zoo, checkpointed", "official"]
    assert all(row["peak_bytes"] >= 0 for row in contenders)
    assert contenders[0]["peak_bytes"] > 0
    assert record["step"]["work"]["flops"] > 0
    assert run.main([*given, "--only", "sample"]) == 0
    record = json.loads((tmp_path / "jit_tiny_float32_b2_sample_cpu_t1.json").read_text())
    assert [row["name"] for row in record["sample"]["contenders"]] == ["zoo", "official"]
    page = (tmp_path / "RESULTS.md").read_text()
    assert "peak memory without weights" in page
    assert "2-step Heun, tiny, float32" in page


def test_a_paper_that_draws_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["mae", "--only", "sample"]) == 2
    assert "mae does not sample" in capsys.readouterr().err


def test_the_memory_of_a_step_is_that_of_its_tensors() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    trainer = harness.Trainer("one", "1", lambda x: (x * weight).exp().sum(), torch.optim.SGD([weight], 0.0), "")
    small, large = (harness.peak_memory(trainer, torch.ones(n << 20), harness.Setting()) for n in (1, 33))
    assert large - small > 100 * 2**20  # a product and its exponential at least, 4 bytes each
