"""Panoptic quality against panopticapi's digits, in one process and in two; mIoU against a count by hand."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import in_processes
from zoo.errors import ZooError
from zoo.metrics import PanopticQuality, SemanticIoU

THINGS, STUFF = 3, 2


def random_set(seed: int, pictures: int = 6) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Predictions and truth with crowds, nothing, ties of one half and pictures where all is right or nothing there."""
    draw = np.random.RandomState(seed)
    found, true = [], []
    for n in range(pictures):
        ids = draw.randint(0, 9, (5, 6)).repeat(4, 0).repeat(4, 1)
        other = np.roll(ids, draw.randint(0, 3), draw.randint(0, 2))
        noise = draw.randint(0, 9, (5, 6)).repeat(4, 0).repeat(4, 1)
        other = np.where(draw.rand(5, 6).repeat(4, 0).repeat(4, 1) < 0.3, noise, other)
        if n == 0:
            other = ids.copy()
        if n == 1:
            ids = np.zeros_like(ids)
        if n == 2:
            other = np.zeros_like(other)
        rows: list[list[list[int]]] = []
        for kind in (ids, other):
            some = []
            for number in np.unique(kind[kind > 0]).tolist():
                label = number % (THINGS + STUFF)
                thing = int(label < THINGS)
                crowd = int(kind is ids and bool(thing) and number in (3, 6) and n % 2 == 0)
                some.append([number, thing, label if thing else label - THINGS, crowd, int((kind == number).sum())])
            rows.append(some)
        tables = [np.array(some, dtype=np.int64).reshape(-1, 5) for some in rows]
        found.append({"panoptic": torch.from_numpy(other.astype(np.int32)), "segments": torch.from_numpy(tables[1])})
        truth = {"ids": torch.from_numpy(ids.astype(np.int32)), "segments": torch.from_numpy(tables[0])}
        true.append({"image_id": torch.tensor(10 + n), "panoptic": truth})
    return found, true


# Of panopticapi @ 7bb4655 (evaluation.pq_compute_single_core and PQStat.pq_average): PQ, SQ, RQ of all, things, stuff.
OFFICIAL: dict[int, tuple[tuple[float, ...], ...]] = {
    0: (
        (0.32499391617038675, 0.8475482166658637, 0.3919808949220714),
        (0.36068009597421363, 0.7863177348471465, 0.4588570470923412),
        (0.27146464646464646, 0.9393939393939394, 0.29166666666666663),
    ),
    1: (
        (0.4632437932437933, 0.8978571428571428, 0.5230769230769231),
        (0.4905915072581739, 0.851984126984127, 0.5754985754985755),
        (0.4222222222222222, 0.9666666666666666, 0.4444444444444444),
    ),
    2: (
        (0.352061337355455, 0.913888888888889, 0.3987933634992459),
        (0.40811965811965806, 0.8935185185185185, 0.4729344729344729),
        (0.2679738562091503, 0.9444444444444444, 0.2875816993464052),
    ),
    3: (
        (0.4417663817663818, 0.885, 0.5008547008547009),
        (0.46343779677113006, 0.9305555555555555, 0.5014245014245015),
        (0.4092592592592592, 0.8166666666666667, 0.5),
    ),
    4: (
        (0.5020757020757021, 0.9130952380952382, 0.5594017094017094),
        (0.4452584452584453, 0.9345238095238096, 0.48789173789173784),
        (0.5873015873015872, 0.8809523809523809, 0.6666666666666666),
    ),
}


def numbers(metric: PanopticQuality) -> list[float]:
    computed = metric.compute()
    return [float(computed[f"{kind}{part}"]) / 100 for part in ("", "_th", "_st") for kind in ("PQ", "SQ", "RQ")]


@pytest.mark.parametrize("seed", OFFICIAL)
def test_digits_are_panopticapi_s(seed: int) -> None:
    metric = PanopticQuality(THINGS, STUFF)
    metric.update(*random_set(seed))
    assert numbers(metric) == pytest.approx([x for row in OFFICIAL[seed] for x in row], rel=1e-14)


def _share() -> list[float]:
    """Of the second set, of a rank's share: the first picture comes in all, the last process may have no other."""
    import torch.distributed as dist

    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found, true = random_set(1)
    metric = PanopticQuality(THINGS, STUFF)
    for n in (range(6), [0])[rank]:
        metric.update(found[n : n + 1], true[n : n + 1])
    result = numbers(metric)
    dist.destroy_process_group()
    return result


def test_order_and_repetition_change_no_bit() -> None:
    found, true = random_set(1)
    whole, other = (PanopticQuality(THINGS, STUFF) for _ in range(2))
    whole.update(found, true)
    for n in (3, 0, 5, 1, 4, 2, 0):
        other.update(found[n : n + 1], true[n : n + 1])
    assert numbers(whole) == numbers(other)
    assert whole.by_class.tolist() == other.by_class.tolist()


def test_no_class_is_not_a_number_and_mistakes_are_named() -> None:
    metric = PanopticQuality(THINGS, STUFF)
    with pytest.raises(ZooError, match="has seen no picture"):
        metric.compute()
    nothing = {"ids": torch.zeros(4, 4, dtype=torch.int32), "segments": torch.zeros(0, 5, dtype=torch.int64)}
    empty = PanopticQuality(THINGS, STUFF)
    blank = {"panoptic": nothing["ids"], "segments": nothing["segments"]}
    empty.update([blank], [{"image_id": torch.tensor(0), "panoptic": nothing}])
    assert empty.compute()["PQ"].isnan()
    for wrong, message in (
        ({**blank, "segments": torch.tensor([[7, 1, 0, 0, 3]])}, "not those of the predicted map"),
        ({**blank, "panoptic": torch.ones(4, 4, dtype=torch.int32)}, "not those of the predicted map"),
        ({**blank, "segments": torch.tensor([[7, 1, 9, 0, 3]])}, "a label beyond"),
        ({**blank, "panoptic": torch.zeros(4, 5)}, "for a picture of"),
    ):
        with pytest.raises(ZooError, match=message):
            empty.update([wrong], [{"image_id": torch.tensor(0), "panoptic": nothing}])


def test_iou_of_labels() -> None:
    metric = SemanticIoU(4)
    true = torch.tensor([[0, 0, 1, 1], [1, 2, 255, 255]])
    found = torch.tensor([[0, 1, 1, 1], [3, 2, 0, 3]])
    metric.update([found], [true])
    computed = {name: float(value) for name, value in metric.compute().items()}
    ious = [1 / 2, 2 / 4, 1 / 1]  # the fourth class does not occur in the truth
    assert computed["mIoU"] == pytest.approx(100 * sum(ious) / 3)
    assert computed["fIoU"] == pytest.approx(100 * (ious[0] * 2 + ious[1] * 3 + ious[2]) / 6)
    assert computed["mACC"] == pytest.approx(100 * (1 / 2 + 2 / 3 + 1) / 3)
    assert computed["pACC"] == pytest.approx(100 * 4 / 6)
    assert metric.by_class[:3].tolist() == pytest.approx([50, 50, 100])
    assert metric.by_class[3].isnan()
    with pytest.raises(ZooError, match="4 classes"):
        metric.update([found + 2], [true])
    with pytest.raises(ZooError, match="height, width"):
        metric.update([found[:1]], [true])


def test_two_processes_give_what_one_gives() -> None:
    metric = PanopticQuality(THINGS, STUFF)
    metric.update(*random_set(1))
    assert in_processes(2, _share) == [numbers(metric)] * 2
