"""The benchmarks run, say what they measured, and the committed result files are whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.environment import ROOT, command_line, environment
from benchmarks.speed import harness, run
from benchmarks.speed import mae as speed
from zoo.errors import ZooError

SPEED_RESULTS = sorted((ROOT / "benchmarks/speed/results").glob("*.json"))

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


def test_a_figure_below_the_last_kept_one_is_marked(tmp_path: Path) -> None:
    kept = json.loads((ROOT / "benchmarks/speed/results/moco_data_cpu_t1.json").read_text())
    path = tmp_path / "moco_data_cpu_t1.json"
    run.write(kept, path)
    for factor, cpu, marked in ((1.05, None, False), (1.25, None, True), (1.25, "another", False)):
        record = json.loads(json.dumps(kept))
        record["data"]["contenders"][0]["processor_seconds"]["median"] *= factor
        record["environment"]["cpu"]["kind"] = cpu or record["environment"]["cpu"]["kind"]
        run.compare(record, path)
        mark = run.slower(record["data"])
        assert (mark is not None) == marked
        if marked:
            assert "20 % below" in str(mark)
            run.write(record, path)
            assert str(mark) in run.render(tmp_path)
            run.write(kept, path)


def test_every_paper_has_its_result() -> None:
    assert set(run.papers()) == {json.loads(p.read_text())["benchmark"] for p in SPEED_RESULTS}
