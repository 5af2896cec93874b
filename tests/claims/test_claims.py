"""Claims: what may be declared, how effects are judged, that runs resume, start from each other and are drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from PIL import Image

import zoo
from zoo import catalog
from zoo.claims import declaration, picture, run
from zoo.claims.declaration import Declaration, SubClaim, evaluate
from zoo.claims.intervals import interval, judged
from zoo.command.cli import main
from zoo.errors import ZooError
from zoo.paths import share

CLAIMS = sorted(path.stem for path in (share("benchmarks") / "claims").glob("*.yaml"))
ARMS = {"a": {"x": 3.0, "y": 0.5}, "b": {"x": 1.0}}


# --------------------------------------------------------------------------------------------------------- expressions


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100 * (a.x - b.x)", 200.0),
        ("-a.x / 2 + max(b.x, 7, a.y)", 5.5),
        ("min(a.x, b.x) - abs(-2)", -1.0),
        ("log(exp(a.y))", 0.5),
    ],
)
def test_effects_are_arithmetic_over_arms(text: str, value: float) -> None:
    assert evaluate(text, ARMS) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "__import__('os')",
            "a.x.real",
            "a.x ** 9",
            "a.x if 1 else 2",
            "[1][0]",
            "'a' * 3",
            "True",
            "a",
            "x",
            "1 +",
            "",
        ),
        *("abs(1, 2)", "min(1)", "max()", "exp(x=1)", "(lambda: 1)()", "a.x < 1", "sum(a.x, 1)", "~3", "c.x", "b.y"),
        *("a.x / (b.x - 1)", "log(0)", "exp(1000)", "1e308 * 10", "(" * 300 + "1" + ")" * 300, "+".join("1" * 9000)),
    ],
)
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ZooError) as problem:
        evaluate(text, ARMS)
    assert "\n" not in str(problem.value)


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["high"] - 2.0 == pytest.approx(4.303 / math.sqrt(3))  # t(0.975, 2) = 4.303, sd 1, n 3
    assert interval([1.0])["low"] is None


@pytest.mark.parametrize(
    ("effect", "verdict"),
    [
        ([1.0, 1.1, 0.9], "held"),
        ([-1.0, -1.1, -0.9], "not held"),
        ([1.0, -1.0, 0.1], "undecided"),
        ([9.0], "undecided"),
    ],
)
def test_verdict_needs_the_whole_interval(effect: list[float], verdict: str) -> None:
    record = judged(SubClaim(name="x", statement="x", effect="1", unit="points"), effect)
    assert record["verdict"] == verdict
    assert record["held"] == (verdict == "held")


# -------------------------------------------------------------------------------------------------------- declarations

TOY: dict[str, Any] = {
    "statement": "a wider network learns faster",
    "stages": {
        "train": {
            "recipe": "preact_resnet/pocket",
            "options": {
                **{"model.depths": [1, 1, 1], "model.widths": [4, 4, 4], "data.train_samples": 32},
                **{"data.batch_size": 8, "data.eval_batch_size": 8},
                **{"trainer.limit_val_batches": 1, "trainer.max_steps": 4},
                "model.optim": {"global_batch": 8},
            },
            "measure": {"loss": "last_loss", "top1": "val/top1", "step": "step_processor_seconds"},
        },
        "again": {
            "recipe": "preact_resnet/pocket",
            "options": {
                **{"model.depths": [1, 1, 1], "model.widths": [4, 4, 4], "data.eval_batch_size": 8},
                "trainer.limit_val_batches": 1,
            },
            "run": ["validate"],
            "start": "ckpt_path",
            "measure": {"again_loss": "val/loss", "again_top1": "val/top1"},
        },
    },
    "arms": {"thin": {}, "flat": {"train": {"model.unit": "original"}, "again": None}},
    "claims": [{"name": "one", "statement": "it does", "effect": "thin.loss - flat.loss", "unit": "nats"}],
    "pilot_seeds": [100, 101],
}
CARD = "{slug: toy, field: recognition, title: A toy, authors: [A B], year: 2026, summary: A toy.}"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The claim of a paper of one's own, which lies in ``claims`` beside the card."""
    (tmp_path / "papers" / "claims").mkdir(parents=True)
    (tmp_path / "papers" / "toy.yaml").write_text(CARD)
    (tmp_path / "papers" / "claims" / "toy.yaml").write_text(yaml.safe_dump(TOY, sort_keys=False))
    monkeypatch.setenv("ZOO_PAPERS", str(tmp_path / "papers"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "papers" / "claims" / "toy.yaml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claim": []}, "claim: unknown key; did you mean 'claims'?"),
        ({"recipe": "mae/pocket"}, "a claim has a recipe, or stages"),
        ({"arms": {"thin": {}}}, "two or more"),
        ({"arms": {"thin": {"trian": {}}, "flat": {}}}, "no stage 'trian'"),
        ({"arms": {"thin": {"train": {"depths": 8}}, "flat": {}}}, "'depths' is no option"),
        ({"claims": [{**TOY["claims"][0], "effect": "thin.los - flat.loss"}]}, "did you mean 'loss'?"),
        ({"claims": [{**TOY["claims"][0], "effect": "fat.loss"}]}, "did you mean 'flat'?"),
        ({"claims": [{**TOY["claims"][0], "effect": "flat.again_loss"}]}, "unknown metric of flat"),
        ({"claims": [{**TOY["claims"][0], "bound": "much"}]}, r"claims\[0\].bound"),
        ({"claims": []}, "claims"),
        ({"seeds": 2}, "three or more"),
        ({"stages": {"train": {"recipe": "x", "optoins": {}}}}, "did you mean 'options'?"),
        ({"stages": {**TOY["stages"], "more": {"recipe": "x", "after": "later"}}}, "no stage 'later' before it"),
    ],
)
def test_a_mistake_in_a_declaration_is_told_in_one_line(toy: Path, change: dict[str, Any], message: str) -> None:
    toy.write_text(yaml.safe_dump({**TOY, **change}, sort_keys=False))
    with pytest.raises(ZooError, match=message) as problem:
        declaration.read("toy")
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("paper", CLAIMS)
def test_every_arm_of_every_claim_builds(paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (share("benchmarks") / "claims" / f"{paper}.yaml").read_text()
    assert text.count("\n") < 80
    claim = declaration.read(paper)
    if (card := catalog.paper(paper)).claim is not None:
        assert list(claim.arms) == card.claim.arms
    options = dict(claim.data.otherwise) if claim.data else {}
    built: list[Any] = []
    for arm in claim.arms:
        for part in run.parts_of(claim, arm, 0, options).values():
            if (part.stage.recipe, part.options) in built:
                continue
            built.append((part.stage.recipe, part.options))
            with torch.device("meta"):
                module, data, trainer = zoo.load_recipe(part.stage.recipe, part.options)
            assert "fit" not in part.stage.run or (trainer.max_steps > 0 or trainer.max_epochs > 0), part.name
            assert data.batch_size > 0
            if part.before is not None and part.stage.start == "model.init_from":
                assert hasattr(module, "init_from"), part.name


def test_claim_of_flip_spends_the_same_encoder_tokens_or_pictures() -> None:
    claim = declaration.read("flip")
    none, half, most = (claim.plan(arm)["pretrain"].options for arm in claim.arms)
    tokens = [s["trainer.max_steps"] * (1 + int(64 * (1 - s["model.mask_ratio"]))) for s in (none, half)]
    assert max(tokens) / min(tokens) < 1.01
    assert half["trainer.max_steps"] == most["trainer.max_steps"]


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_run_is_kept_resumed_and_started_anew_where_it_changed(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, path = run.run("toy", quick=True, seeds=[0, 1], say=lambda line: None)
    assert path == Path("runs/claims/toy/quick.json")
    assert json.loads(path.read_text()) == record
    arm = record["arms"]["thin"]
    assert arm["again_top1"] == arm["top1"]  # the second stage has the weights of the first
    assert "again_top1" not in record["arms"]["flat"]
    values = [a - b for a, b in zip(arm["loss"], record["arms"]["flat"]["loss"], strict=True)]
    assert record["claims"][0]["effect"]["values"] == pytest.approx(values)
    assert record["seconds"] > 0
    assert record["environment"]["cpu"]["kind"]

    compute, done = run._computed, []

    def counted(part: run.Part, *rest: Any) -> dict[str, Any]:
        done.append(part.name)
        if part.seed == 1:
            raise MemoryError("killed")
        return compute(part, *rest)

    monkeypatch.setattr(run, "_computed", counted)
    again, _ = run.run("toy", quick=True, seeds=[0, 1], say=lambda line: None)
    assert not done
    assert again["arms"] == record["arms"]
    changed = {**TOY, "arms": {**TOY["arms"], "flat": {"train": {"model.shortcut": "dropout"}, "again": None}}}
    toy.write_text(yaml.safe_dump(changed, sort_keys=False))
    for _ in range(2):  # a part that was killed leaves nothing behind, and the finished ones stay
        with pytest.raises(MemoryError):
            run.run("toy", quick=True, seeds=[0, 1], say=lambda line: None)
    assert done == ["seed0_flat_train", "seed1_flat_train", "seed1_flat_train"]


def test_ctrl_c_stops_a_run(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Diary, "on_train_batch_end", stop)
    assert main(["claim", "toy", "--run", "--quick"]) == 130
    assert not list(Path("runs/claims/toy").glob("*.json"))


def test_only_a_whole_run_becomes_the_kept_result(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = toy.parent / "results" / "toy.json"
    for words in (["--pilot", "--seeds", "2"], ["--arms", "thin"], ["--seeds", "0", "1"]):
        assert main(["claim", "toy", "--run", *words]) == 0
        assert not kept.exists()
    assert json.loads(Path("runs/claims/toy/pilot.json").read_text())["settings"]["seed_values"] == [100, 101]
    assert main(["claim", "toy", "--run", "-o", "whole.svg"]) == 0
    record = json.loads(kept.read_text())
    assert record["settings"]["seed_values"] == [0, 1, 2]
    assert record["command"] == "zoo claim toy --run"
    assert ElementTree.parse("whole.svg").getroot().tag.endswith("svg")
    capsys.readouterr()
    assert main(["claim", "toy"]) == 0
    text = capsys.readouterr().out
    assert "measured over 3 seed(s)" in text
    assert "another declaration" not in text
    toy.write_text(yaml.safe_dump({**TOY, "claims": [{**TOY["claims"][0], "bound": 0.5}]}, sort_keys=False))
    assert main(["claim", "toy"]) == 0
    assert "another declaration" in capsys.readouterr().out
    assert main(["claim", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == record


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "3"], "--seeds goes with --run"),
        (["--quick"], "--quick goes with --run"),
        (["-o", "x.png"], "no result to draw"),
        (["-o", "x.json"], "-o writes .png, .svg, not 'x.json'"),
        (["--run", "-o", "x.pdf"], "-o writes"),
        (["--run", "--threads", "0"], "1 or more"),
        (["--run", "--seeds", "0"], "a count, 1 or more"),
        (["--run", "--seeds", "1", "1"], "different numbers"),
        (["--run", "--arms", "thim"], "did you mean 'thin'"),
        (["--run", "--data", "cifar10"], "takes no --data"),
        (["--run", "--data_dir", "nowhere"], "no folder"),
        (["--ruin"], "no option '--ruin'"),
    ],
)
def test_mistakes_on_the_command_line(
    toy: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claim", "toy", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_metric_that_nobody_logged_is_named(toy: Path) -> None:
    stages = {"train": {**TOY["stages"]["train"], "measure": {"loss": "last_loss", "top1": "val/top2"}}}
    arms = {"thin": {}, "flat": {}}
    toy.write_text(yaml.safe_dump({**TOY, "stages": stages, "arms": arms}, sort_keys=False))
    with pytest.raises(ZooError, match="'val/top2'; did you mean 'val/top1'"):
        run.run("toy", quick=True, seeds=[0], say=lambda line: None)
    stages["train"]["measure"]["top1"] = "loss_at_1000"
    toy.write_text(yaml.safe_dump({**TOY, "stages": stages, "arms": arms}, sort_keys=False))
    with pytest.raises(ZooError, match="longer training"):
        run.run("toy", quick=True, seeds=[0], say=lambda line: None)


def test_data_is_the_real_set_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = declaration.read("moco").data
    monkeypatch.setattr(run, "checkout", lambda: tmp_path / "main")
    world = data.otherwise  # type: ignore[union-attr]
    assert run.data_options(data, None, None) == world
    assert run.data_options(data, "shapes", None) == world
    assert run.data_options(data, "./pets", None) == {"data.dataset": "./pets"}
    place = tmp_path / "shared" / "data" / "cifar10"
    place.mkdir(parents=True)
    assert run.data_options(data, None, None) == {"data.dataset": "cifar10", "data.data_dir": str(place)}
    assert run.data_options(data, "cifar10", tmp_path)["data.data_dir"] == str(tmp_path)


# -------------------------------------------------------------------------------------------------------- kept results


@pytest.mark.parametrize("paper", [paper for paper in CLAIMS if declaration.result(paper)])
def test_kept_results_are_whole_and_drawn(paper: str, tmp_path: Path) -> None:
    record: Any = declaration.result(paper)
    assert record["claim"] == paper
    assert record["settings"]["seeds"] >= 3
    assert not record["settings"].get("quick")
    assert not record["settings"].get("pilot")
    assert record["held"] == all(part["held"] for part in record["claims"])
    assert [part["name"] for part in record["claims"]] == [one.name for one in declaration.read(paper).claims]
    for part in record["claims"]:
        effect = part["effect"]
        assert effect["n"] == record["settings"]["seeds"]
        assert effect["low"] <= effect["mean"] <= effect["high"]
    assert record["seconds"] > 0
    assert record["environment"]["cpu"]["kind"]
    text = picture.draw(record).svg()
    words = " ".join(node.text or "" for node in ElementTree.fromstring(text).iter() if node.tag.endswith("text"))
    for part in record["claims"]:
        assert part["verdict"] in words
    assert set(record["arms"]) <= set(words.split())
    with Image.open(picture.save(record, tmp_path / "claim.png")) as sheet:
        assert sheet.width == 1920
        assert len(sheet.convert("L").getcolors() or []) > 10


def test_pictures_of_one_seed_and_of_equal_values(tmp_path: Path) -> None:
    claim = Declaration.model_validate(TOY)
    arms = {arm: {"measured": ["loss"], "loss": [0.0]} for arm in claim.arms}
    record = {"claim": "toy", "statement": claim.statement, "arms": arms, "settings": {"seeds": 1, "quick": True}}
    record["claims"] = [judged(claim.claims[0], [0.0])]
    assert "a quick run, no result" in picture.draw(record).svg()
    picture.save(record, tmp_path / "x.png")
    with pytest.raises(ZooError, match=r"\.svg or \.png"):
        picture.save(record, tmp_path / "x.pdf")
