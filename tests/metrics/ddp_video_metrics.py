"""Run by test_video_metrics.py: metrics in two processes, one of which sees nothing at first.

`python -m tests.metrics.ddp_video_metrics RANK PORT OUT` writes what the process computes of unequal shares that
overlap.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from zoo.metrics import ARCScore, FrameMAP, ImageTextRetrieval, KNNAccuracy, MultiLabelMAP, MultiViewAccuracy
from zoo.metrics.generation import GenerationMetrics, Statistics

VIDEOS, VIEWS, CLASSES, FRAMES = 12, 3, 5, 9


def views(kind: str) -> tuple[torch.Tensor, ...]:
    """Scores, labels, video_id and view of every view."""
    draw = torch.Generator().manual_seed(0)
    number = torch.arange(VIDEOS * VIEWS)
    scores = torch.rand(len(number), CLASSES, generator=draw)
    label = torch.randint(CLASSES, (VIDEOS,), generator=draw)
    hot = (torch.rand(VIDEOS, CLASSES, generator=draw) > 0.6).float()
    labels = label if kind == "accuracy" else hot
    return scores, labels[number // VIEWS], number // VIEWS, number % VIEWS


def key_frame(k: int) -> dict[str, Any]:
    """One frame with some detections near true boxes."""
    draw = torch.Generator().manual_seed(100 + k)
    true, found = k % 3, 1 + k % 4
    corner = torch.rand(found, 2, generator=draw) * 0.5
    boxes = torch.cat([corner, corner + 0.3], 1)
    truth = (boxes + 0.04 * torch.randn(found, 4, generator=draw))[:true]
    labels = torch.randint(CLASSES, (len(truth),), generator=draw)
    scores = torch.rand(found, CLASSES, generator=draw)
    return {
        "scores": scores, "boxes": boxes, "true_boxes": truth, "true_labels": labels, "video_id": k // 2, "second": k
    }  # fmt: skip


def compute(shares: tuple[list[int], list[int]]) -> dict[str, float]:
    """What a process that got these views and key frames computes."""
    found = {}
    for kind, metric in (("accuracy", MultiViewAccuracy(CLASSES, (1, 2))), ("labels", MultiLabelMAP(CLASSES))):
        data = views(kind)
        for part in torch.tensor(shares[0], dtype=torch.long).split(4):
            if len(part):
                metric.update(*(value[part] for value in data))
        found |= {f"{kind} {name}": float(value) for name, value in metric.compute().items()}
    frames = FrameMAP(CLASSES, classes=[0, 1, 3, 4])
    for k in shares[1]:
        frames.update(**key_frame(k))
    return found | {f"frames {name}": float(value) for name, value in frames.compute().items()}


def others(rank: int) -> dict[str, float]:
    """The metrics whose states' shapes are told by the samples; only the first process has any."""
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(20, 6, generator=draw), torch.randint(3, (20,), generator=draw)
    pictures = torch.randint(256, (20, 3, 8, 8), generator=draw, dtype=torch.uint8)
    number = torch.arange(20)
    knn, retrieval, arc = KNNAccuracy(3, k=5), ImageTextRetrieval((1,)), ARCScore()
    generation = GenerationMetrics("random", ("fid",), reference=Statistics.of(torch.randn(300, 256, generator=draw)))
    if rank == 0:
        knn.update_bank(features[:12], labels[:12])
        knn.update(features[12:], labels[12:])
        retrieval.update(features, number, features.roll(1, 1), number)
        generation.update(pictures, number)
        arc.update([np.zeros((2, 2))], np.zeros((2, 2)))
    found: dict[str, float] = {}
    for metric in (knn, retrieval, generation, arc):
        found |= {f"{type(metric).__name__} {name}": float(value) for name, value in metric.compute().items()}
        found |= {f"{type(metric).__name__} {name} again": float(value) for name, value in metric.compute().items()}
    return found


def process(rank: int, port: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    every = list(range(VIDEOS * VIEWS))
    shares = {
        "mixed": ((every[10:], [3, 4, 5, 6]), ([*every[20::-1], 5, 6], [0, 1, 2, 3, 7, 8]))[rank],
        "one empty": ((every, list(range(FRAMES))), ([], []))[rank],
    }
    results = {name: compute(share) for name, share in shares.items()}
    results["others"] = others(rank)
    with open(f"{out}.{rank}", "w") as file:
        json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    process(int(sys.argv[1]), *sys.argv[2:])
