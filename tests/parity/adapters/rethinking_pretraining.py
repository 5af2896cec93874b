"""Runs the kinds of cases of from-scratch detectors: schedules here, networks by the adapter of Mask R-CNN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.detection.rethinking_pretraining import schedule
from zoo.errors import unknown
from zoo.parity import Case, adapter, dtype_of
from zoo.training import Optim, lr_at


def run(case: Case) -> dict[str, Tensor]:
    return schedules(case) if "fractions" in case["config"] else adapter("mask_rcnn")(case)


def rates(optim: Optim, steps: int, at: list[int], case: Case) -> Tensor:
    """The rates of a run of `steps` at some of them; a step counts as an epoch."""
    assert optim.lr is not None
    values = [
        lr_at(optim, k, steps, optim.lr, warmup_epochs=optim.warmup_steps, milestones=optim.milestone_steps) for k in at
    ]
    return torch.tensor(values, dtype=dtype_of(case))


def schedules(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    outputs = {}
    for multiple in config.get("lazy_num_X", []):
        plan = schedule(multiple)
        # Multipliers: the warm-up of these is 1000 steps from a thousandth, in both forms of detectron2's settings.
        optim = stepwise(1.0, plan.milestones, 0.1, 1000, 0.001)
        at = [int(fraction * 90_000 * multiple) for fraction in config["fractions"]]
        outputs[f"lazy_{multiple}x"] = rates(optim, plan.steps, at, case)
    for name in config.get("yaml_configs", []):
        solver = config["resolved"][name]
        for key, known in (("LR_SCHEDULER_NAME", ["WarmupMultiStepLR"]), ("WARMUP_METHOD", ["linear"])):
            if solver[key] not in known:
                raise unknown(key, solver[key], known)
        steps = solver["MAX_ITER"]
        rate, warmup = solver["BASE_LR"], solver["WARMUP_ITERS"]
        optim = stepwise(rate, tuple(solver["STEPS"]), solver["GAMMA"], warmup, rate * solver["WARMUP_FACTOR"])
        at = [int(fraction * steps) for fraction in config["fractions"]]
        outputs[f"yaml_{name.rpartition('/')[2].removesuffix('.yaml')}"] = rates(optim, steps, at, case)
    return outputs


def stepwise(lr: float, milestones: tuple[int, ...], gamma: float, warmup: int, start: float) -> Optim:
    own: dict[str, Any] = {"milestone_steps": milestones, "gamma": gamma, "warmup_steps": warmup}
    return Optim(name="sgd", lr=lr, schedule="step", warmup_start_lr=start, **own)
