"""MoCo's claims and its speed comparison run and say what they measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from benchmarks.claims import common
from benchmarks.claims import moco as claim
from benchmarks.claims import moco_v2 as claim_v2
from benchmarks.speed import run

FAKE_OFFICIAL = """
import torch

class MoCo(torch.nn.Module):
    def __init__(self, base_encoder, dim, K, m, T, mlp):
        super().__init__()
        self.encoder_q = base_encoder(num_classes=dim)

    def forward(self, im_q, im_k):
        assert torch.distributed.get_world_size() == 1
        labels = torch.zeros(len(im_q), dtype=torch.long).cuda()
        return self.encoder_q(im_q) + self.encoder_q(im_k), labels
"""


@pytest.mark.parametrize(
    ("module", "arms", "score"),
    [
        (claim, {"queue", "no_momentum", "one_batch"}, "knn_top1"),
        (claim_v2, {"v1", "mlp", "mlp_aug_plus"}, "probe_top1"),
    ],
)
def test_claim_quick_runs_and_resumes(
    module: ModuleType, arms: set[str], score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "result.json"
    arguments = ["--quick", "--data", "shapes", "--seeds", "2", "--work", str(tmp_path), "--out", str(out)]
    assert module.main(arguments) == 0
    record = json.loads(out.read_text())
    assert set(record["arms"]) == arms
    assert len(record["claims"]) == 2
    for arm in record["arms"].values():
        assert len(arm[score]) == 2
        assert all(0 <= value <= 1 for value in arm[score] + arm[f"{score}_untrained"])
        assert all(loss > 0 for loss in arm["final_loss"])

    def never(*arguments: object) -> None:
        raise AssertionError("a finished part is not computed again")

    monkeypatch.setattr(claim, "pretrain", never)
    monkeypatch.setattr(claim_v2, "pretrain", never)
    assert module.main(arguments) == 0
    assert json.loads(out.read_text())["arms"] == record["arms"]


def test_claim_views_are_a_function_of_seed_and_step() -> None:
    world = common.open_world("shapes", None, 32, 40, 8)
    first, again, other = (claim.Views(*world.train, world, 9, 16, seed=seed) for seed in (1, 1, 2))
    one, two = first[3]["views"]
    assert one.shape == (16, 3, 32, 32)
    assert not torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip((one, two), again[3]["views"], strict=True))
    assert not torch.equal(first[3]["index"], other[3]["index"])


def test_claim_augmentation_keeps_to_its_bounds() -> None:
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for augmentation in (claim.Augmentation(), claim_v2.V2):
        views = augmentation(images, torch.Generator().manual_seed(1))
        assert views.shape == images.shape
        assert 0 <= views.min() <= views.max() <= 1.0001
        gray = (views - views.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-4
        assert 4 <= gray.sum() <= 24  # a fifth of 64
    still = claim.Augmentation(jitter=0.0, blur=1.0, sigma=(1e-2, 2e-2))
    assert torch.allclose(
        still(images, torch.Generator().manual_seed(2)).mean(), images.float().mean() / 255, atol=0.05
    )


def test_speed_compares_whole_steps_and_pipelines(tmp_path: Path) -> None:
    (tmp_path / "checkout" / "moco").mkdir(parents=True)
    (tmp_path / "checkout" / "moco" / "builder.py").write_text(FAKE_OFFICIAL)
    out, cuda = tmp_path / "results", torch.Tensor.cuda
    arguments = ["moco", "--model", "tiny", "--batch", "4", "--repeats", "2", "--warmup", "1", "--out", str(out)]
    try:
        assert run.main([*arguments, "--official", str(tmp_path / "checkout")]) == 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert torch.Tensor.cuda is cuda
    record = json.loads((out / "moco_tiny_float32_b4_cpu_t1.json").read_text())
    assert [row["name"] for row in record["step"]["contenders"]][:2] == ["zoo", "official"]
    assert [row["name"] for row in record["data"]["contenders"]] == ["zoo", "official"]
    assert record["step"]["work"]["flops"] > 0
    assert "tokens/s" not in (out / "RESULTS.md").read_text()
    assert run.main([*arguments, "--only", "step", "--official", str(tmp_path)]) == 2
