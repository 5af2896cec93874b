"""Runs the kinds of cases that were taken from the official iMF code (JAX); everything else is read from the case."""

from __future__ import annotations

from torch import Tensor

from zoo.generation import imf
from zoo.parity import Case, by_entry, filled_inputs, shared

official = shared("imeanflow")


def _task(case: Case) -> imf.ImprovedMeanFlow:
    return official.task(case, imf.ImprovedMeanFlow, imf.convert_official, imf.TimePairs(equal=0.5))


def forward(case: Case) -> dict[str, Tensor]:
    return official.forward(case, _task(case).network)


def sample(case: Case) -> dict[str, Tensor]:
    return official.sample(case, _task(case))


def train_loss(case: Case) -> dict[str, Tensor]:
    task, batch = _task(case), official.batch(filled_inputs(case))
    errors = task.errors(batch)
    found = official.differentiated(case, task, imf.convert_official, task.total(batch, errors))
    return found | official.plain_means(errors)


run = by_entry(
    {
        "models.imfDiT.imfDiT.__call__": forward,
        "imf.iMeanFlow.sample_one_step": sample,
        "imf.iMeanFlow.forward": train_loss,
        "utils.lr_utils / utils.ema_util / sample_cfg_scale": official.schedules,
    }
)
