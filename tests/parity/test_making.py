"""A stranger's way: the guide, the script, a case made by it, and the same numbers replayed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zoo import parity
from zoo.command.cli import main
from zoo.errors import ZooError
from zoo.parity import runner

OFFICIAL = {"repo": "owner/name", "commit": "a" * 40, "entry": "module.Class"}


def test_the_guide_names_every_rule_and_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--make"]) == 0
    shown = capsys.readouterr().out
    for word in ("fan_in_last_out", "randint:A:B", "keep", "grad:KEY", "weight_decay_per_group", "ZOO_PARITY_CASES"):
        assert word in shown


def test_the_script_makes_a_case_that_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "make_case.py"
    assert main(["parity", "--make", "toy", "-o", str(script)]) == 0
    assert main(["parity", "--make", "toy", "-o", str(script)]) == 2  # never over a stranger's work
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "cases")])
    runpy.run_path(str(script), run_name="__main__")
    assert "toy/toy: 6 outputs" in capsys.readouterr().out
    case = parity.load(tmp_path / "cases" / "toy" / "toy.json")

    def adapter(case: parity.Case) -> dict[str, torch.Tensor]:
        config, inputs = case["config"], parity.filled_inputs(case)
        sizes = (config["in_features"], config["hidden"], config["classes"])
        net: Any = nn.Sequential(nn.Linear(*sizes[:2]), nn.GELU(), nn.Linear(*sizes[1:]))
        parity.load_filled(net, case, lambda state: state)
        logits = net(inputs["x"])
        loss = nn.functional.cross_entropy(logits, inputs["labels"])
        loss.backward()
        found = parity.named(case, lambda state: state, grad=parity.gradients(net))
        return {"logits": logits, "loss": loss, **found}

    monkeypatch.setattr(runner, "adapter", lambda paper: adapter)
    verdicts = parity.run_case(case)
    assert [verdict.ok for verdict in verdicts] == [True] * 6
    assert verdicts[0].seconds > 0
    assert {verdict.seconds for verdict in verdicts[1:]} == {0.0}
    del case["config"]["hidden"]
    assert "does not say 'hidden'" in parity.run_case(case)[0].note


def test_make_takes_values_rules_and_kept_entries() -> None:
    norm = nn.BatchNorm1d(3)
    inputs = {"x": ([5, 3], "uniform"), "order": np.array([2, 0, 1]), "one": {"shape": [2], "rule": "ones"}}

    def compute(state: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        norm.load_state_dict(state, strict=False)
        return {"y": norm.double().eval()(inputs["x"])[:, inputs["order"]], "two": inputs["one"].sum().item()}

    rules = {"running_.*": "ones"}
    case = parity.make("p", "c", OFFICIAL, compute, state=norm.state_dict(), inputs=inputs, rules=rules, notes="n")
    found = {name: entry["rule"] for name, entry in case["state"].items()}
    assert found == {
        "weight": "one",
        "bias": "small",
        "running_mean": "ones",
        "running_var": "ones",
        "num_batches_tracked": "keep",
    }
    assert case["inputs"]["order"] == {"shape": [3], "rule": "values", "values": [2, 0, 1]}
    assert case["outputs"]["two"]["mean"] == 2.0
    assert case["outputs"]["y"]["shape"] == [5, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"official": {**OFFICIAL, "commit": "main"}}, "40 hex digits"),
        ({"compute": lambda state, inputs: {"y": torch.rand(3)}}, "'y' differs in a second call"),
        ({"compute": lambda state, inputs: {"y": torch.tensor(float("nan"))}}, "'y' is not finite"),
        ({"compute": lambda state, inputs: {}}, "no outputs"),
        ({"rules": {"weight": "one"}}, "a rule for no entry"),
        ({"inputs": {"x": ([2], "normall")}}, "did you mean 'normal'"),
        ({"inputs": {"x": "words"}}, "neither"),
    ],
)
def test_make_refuses(options: dict[str, Any], message: str) -> None:
    given = {"official": OFFICIAL, "compute": lambda state, inputs: {"y": torch.ones(2)}, **options}
    with pytest.raises(ZooError, match=message):
        parity.make("p", "c", **given)


@pytest.mark.parametrize("arguments", [["-o", "x.py"], ["--make", "-o", "x.py"], ["--make", "No Paper"]])
def test_the_command_says_what_it_wants(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
