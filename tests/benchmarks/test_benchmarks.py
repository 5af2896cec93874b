"""The benchmarks run, say what they measured, and the committed result files are whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.claims import common
from benchmarks.claims import mae as claim
from benchmarks.claims import preact_resnet as preact_claim
from benchmarks.environment import ROOT, command_line, environment
from benchmarks.speed import harness, run
from benchmarks.speed import mae as speed
from zoo.errors import ZooError

SPEED_RESULTS = sorted((ROOT / "benchmarks/speed/results").glob("*.json"))
CLAIM_RESULTS = sorted((ROOT / "benchmarks/claims/results").glob("*.json"))

FAKE_OFFICIAL = """
import numpy as np
import torch
from timm.models.vision_transformer import Block
from util.helper import WIDTH

class MaskedAutoencoderViT(torch.nn.Module):
    def __init__(self, embed_dim, num_heads, norm_layer, **sizes):
        super().__init__()
        self.start = np.zeros(3, dtype=np.float)
        self.block = Block(embed_dim, num_heads, 4, qkv_bias=True, qk_scale=None, norm_layer=norm_layer)
        self.inner = torch.nn.Linear(3, embed_dim * WIDTH)

    def forward(self, images, mask_ratio):
        tokens = self.block(self.inner(images.flatten(2).transpose(1, 2)))
        return tokens.square().mean(), tokens, mask_ratio
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that wants of timm and NumPy what the official code wants."""
    folder = tmp_path / "checkout"
    (folder / "util").mkdir(parents=True)
    (folder / "models_mae.py").write_text(FAKE_OFFICIAL)
    (folder / "util" / "helper.py").write_text("WIDTH = 1\n")
    return folder


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name) or {"seconds": 1.0}) for name in "abc"}
    records = harness.interleave(steps, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(runs) for name, runs in records.items()} == {"a": 3, "b": 3, "c": 3}


def test_step_reports_its_parts_and_trains() -> None:
    network = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    trainer = harness.Trainer("one", "1", lambda x: network(x).square().mean(), optimizer, "")
    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    runs = [harness.training_step(trainer, batch, harness.Setting()) for _ in range(5)]
    assert runs[-1]["loss"] < runs[0]["loss"]
    for found in runs:
        assert found["seconds"] == pytest.approx(found["forward"] + found["backward"] + found["update"])


def test_non_finite_loss_is_no_measurement() -> None:
    weight = torch.nn.Parameter(torch.tensor(float("nan")))
    trainer = harness.Trainer("one", "1", lambda x: weight * x.sum(), torch.optim.SGD([weight], 0.1), "")
    with pytest.raises(ZooError, match="one: the loss is not finite"):
        harness.time_training([trainer], torch.ones(1), harness.Work(1), harness.Setting(repeats=1))


def test_flops_of_a_product() -> None:
    a = torch.empty(3, 5, device="meta", requires_grad=True)
    b = torch.empty(5, 7, device="meta", requires_grad=True)
    assert harness.count_flops(lambda: (a @ b).sum()) == 3 * (2 * 3 * 5 * 7)


def test_work_counts_the_visible_quarter() -> None:
    work = speed.work(harness.Setting(model="vit_base_patch16", batch=2))
    assert work.detail["encoder_tokens"] == 50
    assert work.detail["decoder_tokens"] == 197
    assert work.tokens == 2 * 247
    # 85.1 M and 25.2 M weights of products in blocks, two operations each, three passes, and the attention on top
    products = 2 * 3 * (85.1e6 * 50 + 25.2e6 * 197) * 2
    assert products * 0.95 < work.flops < products * 1.2


def test_official_gets_what_it_expects_and_leaves_no_trace(checkout: Path) -> None:
    from timm.models import vision_transformer

    block, had_float = vision_transformer.Block, "float" in vars(np)
    setting = harness.Setting(model="tiny", official=checkout)
    for fused in (True, False):
        trainer = speed.official(speed.MODELS["tiny"], setting, fused_attention=fused)
        assert torch.isfinite(trainer.loss(torch.randn(2, 3, 4, 4)))
    assert vision_transformer.Block is block
    assert ("float" in vars(np)) == had_float
    assert "util" not in __import__("sys").modules


def test_a_folder_that_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["mae", "--model", "tiny", "--only", "step", "--official", str(tmp_path), "--out", str(tmp_path)]
    assert run.main(arguments) == 2
    assert "models_mae.py" in capsys.readouterr().err


def test_speed_harness_writes_json_and_table(checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    arguments = ["mae", "--model", "tiny", "--batch", "4", "--repeats", "2", "--warmup", "1", "--out", str(out)]
    assert run.main([*arguments, "--official", str(checkout)]) == 0
    record = json.loads((out / "mae_tiny_float32_b4_cpu_t1.json").read_text())
    names = [row["name"] for row in record["step"]["contenders"]]
    assert names[:3] == ["zoo", "official", "official, 2021 attention"]
    for section in ("step", "data"):
        rows = record[section]["contenders"]
        assert rows[0]["times_ours"]["median"] == 1.0
        for row in rows:
            assert len(row["seconds"]["all"]) == 2
            assert row["seconds"]["q25"] <= row["seconds"]["median"] <= row["seconds"]["q75"]
            assert row["images_per_second"] > 0
            assert row["processor_seconds"]["median"] > 0
    page = (out / "RESULTS.md").read_text()
    assert "training step, tiny, float32, batch 4" in page
    assert "JPEG to batch" in page


def test_environment_names_no_machine() -> None:
    import platform

    text = json.dumps(environment())
    assert platform.node() not in text or len(platform.node()) < 4
    assert environment()["cpu"]["cores"] >= 1


def test_command_line_shows_no_absolute_path(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "benchmarks/speed/run.py"
    monkeypatch.setattr("sys.argv", [str(script), "mae", "--official", str(ROOT / "somewhere"), "--batch", "8"])
    assert command_line() == "python benchmarks/speed/run.py mae --official somewhere --batch 8"


def test_interval_is_students() -> None:
    found = common.interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    # t(0.975, 2) = 4.303, sd 1, n 3
    assert found["high"] - 2.0 == pytest.approx(4.303 / math.sqrt(3))
    assert common.interval([1.0])["low"] is None


@pytest.mark.parametrize(
    ("effect", "verdict"),
    [([1.0, 1.1, 0.9], "held"), ([-1.0, -1.1, -0.9], "not held"), ([1.0, -1.0, 0.1], "undecided")],
)
def test_verdict_needs_the_whole_interval(effect: list[float], verdict: str) -> None:
    record = common.SubClaim("x", "x", "points", 0.0, effect).record()
    assert record["verdict"] == verdict
    assert record["held"] == (verdict == "held")


def test_store_computes_a_part_once(tmp_path: Path) -> None:
    calls: list[int] = []
    for settings in ({"a": 1}, {"a": 1}, {"a": 2}):
        store = common.Store(tmp_path, settings)
        assert store.part("x", lambda: calls.append(1) or {"value": 5})["value"] == 5
    assert len(calls) == 2


def test_claim_batches_are_a_function_of_seed_and_step() -> None:
    world = common.open_world("shapes", None, 32, 40, 8)
    images, labels = world.train
    first = common.Batches(images, labels, world, 9, 16, seed=1)
    again = common.Batches(images, labels, world, 9, 16, seed=1)
    other = common.Batches(images, labels, world, 9, 16, seed=2)
    assert first[0]["image"].shape == (16, 3, 32, 32)
    assert torch.equal(first[7]["image"], again[7]["image"])
    assert not torch.equal(first[7]["index"], other[7]["index"])
    both = torch.cat([first[0]["index"], first[1]["index"]])
    assert len(both.unique()) == 32  # no image twice in an epoch
    assert abs(float(first[0]["image"].mean())) < 0.7


def test_claim_quick_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mae.json"
    arguments = ["--quick", "--data", "shapes", "--seeds", "2", "--work", str(tmp_path), "--out", str(out)]
    assert claim.main(arguments) == 0
    record = json.loads(out.read_text())
    assert [c["name"] for c in record["claims"]] == ["few_labels", "high_ratio_probe", "high_ratio_speed"]
    assert set(record["arms"]) == {"scratch", "mae_25", "mae_75"}
    assert record["arms"]["mae_75"]["encoder_tokens"] == [17, 17]
    assert record["arms"]["mae_25"]["encoder_tokens"] == [49, 49]
    for arm in record["arms"].values():
        assert all(0 <= value <= 1 for value in arm["finetune_top1"] + arm["probe_top1"])

    def never(*arguments: object) -> None:
        raise AssertionError("a finished part is not computed again")

    for name in ("pretrain", "finetune", "probe"):
        monkeypatch.setattr(claim, name, never)
    assert claim.main(arguments) == 0
    assert json.loads(out.read_text())["arms"] == record["arms"]


def test_pretraining_reaches_the_fine_tuned_network(tmp_path: Path) -> None:
    settings = claim.replace(claim.Settings(dataset="shapes"), **claim.QUICK)
    world = common.open_world("shapes", None, settings.img_size, settings.pretrain_images, settings.test_images)
    checkpoint = tmp_path / "pre.ckpt"
    claim.pretrain(settings, world, 0, 0.75, checkpoint)
    task = claim.finetuning_task(settings, world.classes, claim.Optim(lr=1e-3), checkpoint)
    task.setup("fit")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    mine = task.network.state_dict()
    key = next(k for k in mine if k.endswith("blocks.0.attn.qkv.weight"))
    theirs = next(v for k, v in saved.items() if k.endswith("blocks.0.attn.qkv.weight") and "decoder" not in k)
    assert torch.equal(mine[key], theirs)


def test_preact_claim_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "preact.json"
    arguments = ["--quick", "--data", "shapes", "--seeds", "2", "--work", str(tmp_path), "--out", str(out)]
    assert preact_claim.main(arguments) == 0
    record = json.loads(out.read_text())
    assert len(record["claims"]) == 5
    assert set(record["arms"]) == {"full_preact", "original", "scaling", "gating"}
    for arm in record["arms"].values():
        assert all(0 <= value <= 1 for value in arm["test_error"])
        assert all(value > 0 for value in arm["gradient_spread"])

    def never(*arguments: object) -> None:
        raise AssertionError("a finished part is not computed again")

    monkeypatch.setattr(preact_claim, "run_arm", never)
    assert preact_claim.main(arguments) == 0
    assert json.loads(out.read_text())["arms"] == record["arms"]


def test_preact_companions_measure_what_they_say() -> None:
    settings = preact_claim.replace(preact_claim.Settings(), depth=38, widths=(4, 4, 4))
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    spreads = {
        arm: preact_claim.gradient_spread(preact_claim.make_task(settings, 10, arm).network, images, labels)
        for arm in ("full_preact", "scaling")
    }
    assert spreads["scaling"] > spreads["full_preact"]
    network = preact_claim.make_task(settings, 10, "full_preact").network
    for stage in network.stages:
        for unit in list(stage)[2:]:
            torch.nn.init.zeros_(unit.conv2.weight)
    before = [id(unit) for stage in network.stages for unit in stage]
    growth = preact_claim.deletions(network, images, labels)
    assert len(growth) == 3 * 5
    assert [k for k, value in enumerate(growth) if value != 0] == [0, 5, 10]  # those that do nothing cost nothing
    assert [id(unit) for stage in network.stages for unit in stage] == before


def test_preact_speed_runs_with_its_peers(tmp_path: Path) -> None:
    out = tmp_path / "results"
    arguments = [
        "preact_resnet",
        "--model",
        "tiny",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--warmup",
        "0",
        "--only",
        "step",
    ]
    assert run.main([*arguments, "--out", str(out)]) == 0
    (path,) = out.glob("*.json")
    record = json.loads(path.read_text())["step"]
    assert [row["name"] for row in record["contenders"]] == ["zoo", "timm", "torchvision"]
    flops, parameters = (list(record["work"]["detail"][key].values()) for key in ("flops", "parameters"))
    assert max(flops) / min(flops) < 1.01
    assert max(parameters) / min(parameters) < 1.01
    assert "training step, tiny" in (out / "RESULTS.md").read_text()


@pytest.mark.parametrize("path", SPEED_RESULTS, ids=lambda p: p.stem)
def test_committed_speed_results(path: Path) -> None:
    text = path.read_text()
    record = json.loads(text)
    assert record["command"].startswith("python benchmarks/speed/run.py")
    assert not {"/work", "/tmp", "/home"} & {text[i : i + 5] for i in range(len(text)) if text[i] == "/"}
    assert record["setting"]["repeats"] >= 5
    for section in ("step", "data"):
        if section in record:
            assert record[section]["contenders"][0]["name"] == "zoo"


def test_speed_page_is_that_of_the_results() -> None:
    page = ROOT / "benchmarks/speed/RESULTS.md"
    assert page.read_text() == run.render(ROOT / "benchmarks/speed/results")


@pytest.mark.parametrize("path", CLAIM_RESULTS, ids=lambda p: p.stem)
def test_committed_claims(path: Path) -> None:
    record = json.loads(path.read_text())
    assert record["claim"] == path.stem
    assert record["settings"]["seeds"] >= 3
    assert not record["settings"].get("quick")
    assert record["held"] == all(c["held"] for c in record["claims"])
    for part in record["claims"]:
        effect = part["effect"]
        assert effect["n"] == record["settings"]["seeds"]
        assert effect["low"] <= effect["mean"] <= effect["high"]
    assert record["seconds"] > 0
    assert record["environment"]["cpu"]["kind"]


def test_every_claim_and_paper_has_its_result() -> None:
    claims = {p.stem for p in (ROOT / "benchmarks/claims").glob("*.py")} - {"common"}
    assert claims == {p.stem for p in CLAIM_RESULTS}
    assert set(run.papers()) == {json.loads(p.read_text())["benchmark"] for p in SPEED_RESULTS}
