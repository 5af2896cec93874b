"""Run by test_coco_ap.py in one or two processes: CocoAP and LvisAP of small worlds, dealt unevenly to the ranks.

`python -m tests.metrics.ddp_coco_ap RANK WORLD PORT OUT` writes the numbers that this rank computes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from tests.metrics.test_coco_ap import as_batches, random_world
from tests.metrics.test_lvis_ap import as_federated, federated_world
from zoo.metrics import CocoAP, LvisAP

# Of eight pictures: rank 1 gets few and shares one with rank 0, or none at all.
DEALT = {"uneven": ([0, 1, 2, 3, 4, 6], [5, 6, 7]), "empty": (list(range(8)), [])}


def main() -> None:
    rank, world, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    coco, lvis = as_batches(*random_world(5, pictures=8)), as_federated(*federated_world(0))
    results = {}
    for name, dealt in [*DEALT.items(), *((f"lvis_{name}", dealt) for name, dealt in DEALT.items())]:
        federated = name.startswith("lvis")
        metric = LvisAP(("bbox", "segm")) if federated else CocoAP(("bbox", "segm", "keypoints"))
        preds, target = lvis if federated else coco
        for n in dealt[rank] if world > 1 else range(8):
            metric.update(preds[n : n + 1], target[n : n + 1])
        results[name] = {key: float(value) for key, value in metric.compute().items()}
    out.write_text(json.dumps(results))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
