"""Run by test_varc.py in one or two processes: offline training, its scores, and test-time training.

`python -m tests.papers.ddp_varc DEVICES OUT` writes OUT/found.pt, and the predictions of test-time training under
OUT/ttt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

from zoo.beyond.varc import VARCTestTimeTraining, VARCTraining
from zoo.data import ARCDataModule, ARCTaskDataModule
from zoo.training import Optim

TINY: dict[str, Any] = {"img_size": 12, "embed_dim": 24, "depth": 1, "num_heads": 3, "mlp_dim": 20}


def _trainer(devices: int) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=2,
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def run(devices: int, out: Path) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    options = {"tasks": 3, "pairs": 8, "max_side": 5, "test_pairs": 5}
    data = ARCDataModule(image_size=12, batch_size=8, test_views=2, options=options)
    task = VARCTraining(None, num_tasks=3, **TINY)
    optim = Optim(lr=1e-3, weight_decay=0.0, interval="epoch")
    module = VARCTestTimeTraining(None, permutations=0, views=2, runs=1, work_dir=str(out / "ttt"), optim=optim, **TINY)
    trainer = _trainer(devices)
    # Before training: the weights of one and of two processes differ afterwards, as their batches do.
    scores = {**trainer.validate(task, data, verbose=False)[0], **trainer.test(task, data, verbose=False)[0]}
    scores |= trainer.test(
        module, ARCTaskDataModule(image_size=12, options={"tasks": 3, "max_side": 5}), verbose=False
    )[0]
    trainer.fit(task, data)
    weights = torch.cat([p.detach().flatten() for p in task.network.parameters()])
    everywhere = trainer.strategy.all_gather(weights)
    if trainer.is_global_zero:
        spread = float((everywhere - weights).abs().max())
        torch.save({"scores": {k: float(v) for k, v in scores.items()}, "spread": spread}, out / "found.pt")


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
