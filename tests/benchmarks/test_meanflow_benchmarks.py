"""MeanFlow's claim and its speed comparison run and say what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.claims import meanflow as claim
from benchmarks.speed import run

FAKE_DIT = """
import torch

class DiT(torch.nn.Module):
    def __init__(self, input_size, patch_size, hidden_size, depth, num_heads, learn_sigma):
        super().__init__()
        assert not learn_sigma
        self.layer = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x, t, y):
        return self.layer(x) * t[:, None, None, None]
"""


def test_claim_quick_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    arguments = ["--quick", "--data", "shapes", "--seeds", "2", "--work", str(tmp_path), "--out", str(out)]
    assert claim.main(arguments) == 0
    record = json.loads(out.read_text())
    assert set(record["arms"]) == {"meanflow", "flow_matching", "wrong_tangent"}
    assert [part["name"] for part in record["claims"]] == ["flow_matching", "tangent"]
    for arm in record["arms"].values():
        assert all(value > 0 for value in arm["frechet_1_step"] + arm["one_to_long"])
        assert all(0 <= value <= 1 for value in arm["recognised_1_step"])
        assert len(set(arm["judge_top1"])) == 1  # one judge for all

    def never(*arguments: object) -> None:
        raise AssertionError("a finished part is not computed again")

    monkeypatch.setattr(claim, "train", never)
    assert claim.main(arguments) == 0
    assert json.loads(out.read_text())["arms"] == record["arms"]


@pytest.mark.parametrize("model", ["tiny", "tiny_unet"])
def test_speed_compares_whole_steps(tmp_path: Path, model: str) -> None:
    checkout = tmp_path / "official" / "DiT"
    (checkout / "diffusion").mkdir(parents=True)
    (checkout / "diffusion" / "gaussian_diffusion.py").touch()
    (checkout / "models.py").write_text(FAKE_DIT)
    out = tmp_path / "results"
    arguments = ["meanflow", "--model", model, "--batch", "4", "--repeats", "1", "--warmup", "1", "--out", str(out)]
    assert run.main([*arguments, "--only", "step", "--official", str(tmp_path / "official")]) == 0
    record = json.loads((out / f"meanflow_{model}_float32_b4_cpu_t1.json").read_text())
    names = [row["name"] for row in record["step"]["contenders"]]
    assert names[:2] == (["zoo", "DiT"] if model == "tiny" else ["zoo"])
    assert record["step"]["work"]["flops"] > 0
    assert run.main([*arguments, "--only", "step", "--official", str(out)]) == 2
