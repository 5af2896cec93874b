"""Kill a pocket run at random moments, resume it, and compare with the run that was never killed.

The suite does five trials; more: `python -m tests.command.kill_and_resume --trials 50`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
RECIPE = ["fit", "mae/pocket"]
SMALL = [
    *["--trainer.max_epochs", "-1", "--trainer.max_steps", str(STEPS)],
    *["--data.train_samples", "160", "--data.batch_size", "16", "--model.optim.global_batch", "null"],
    *["--model.embed_dim", "32", "--model.depth", "1", "--model.num_heads", "2"],
    *["--model.decoder_embed_dim", "32", "--model.decoder_depth", "1", "--model.decoder_num_heads", "2"],
    *["--trainer.limit_val_batches", "1", "--trainer.precision", "32-true", "--trainer.logger", "false"],
    "--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: DIR,"
    " every_n_train_steps: 2, save_top_k: 0, save_last: true, enable_version_counter: false}}]",
]


def _start(folder: Path, resume: bool) -> subprocess.Popen:
    options = [option.replace("DIR", str(folder / "ckpt")) for option in SMALL]
    if resume:
        options += ["--ckpt_path", str(folder / "ckpt" / "last.ckpt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "zoo", *RECIPE, *options],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )


def _weights(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    checkpoint = torch.load(folder / "ckpt" / "last.ckpt", weights_only=True)
    return checkpoint["global_step"], checkpoint["state_dict"]


def uninterrupted(folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The weights after STEPS steps of a run left alone, and its seconds."""
    folder.mkdir(parents=True)
    begin = time.monotonic()
    if _start(folder, resume=False).wait(timeout=300) != 0:
        raise RuntimeError((folder / "log").read_text()[-3000:])
    step, weights = _weights(folder)
    assert step == STEPS, step
    return weights, time.monotonic() - begin


def killed(folder: Path, draw: random.Random) -> tuple[dict[str, torch.Tensor], int]:
    """The weights after STEPS steps of a run killed (SIGKILL) once or twice at random; how often it was killed."""
    folder.mkdir(parents=True)
    last, kills = folder / "ckpt" / "last.ckpt", 0
    for _ in range(draw.choice([1, 2])):
        known = last.stat().st_mtime_ns if last.exists() else 0
        process = _start(folder, resume=last.exists())
        saves = draw.randrange(1, 4)  # let it save so many times, then a random moment more
        while process.poll() is None and saves:
            now = last.stat().st_mtime_ns if last.exists() else 0
            if now != known:
                known, saves = now, saves - 1
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    if not last.exists() or _weights(folder)[0] < STEPS:
        code = _start(folder, resume=last.exists()).wait(timeout=300)
        if code != 0:
            raise RuntimeError((folder / "log").read_text()[-3000:])
    return _weights(folder)[1], kills


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that are not bit-identical."""
    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not a[name].equal(b[name]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        reference, seconds = uninterrupted(Path(name) / "reference")
        print(f"uninterrupted run: {seconds:.1f} s")
        bad = 0
        for trial in range(arguments.trials):
            weights, kills = killed(Path(name) / f"trial{trial}", draw)
            differing = compare(reference, weights)
            bad += bool(differing)
            print(f"trial {trial}: killed {kills} times, {len(differing)} tensors differ {differing[:3]}", flush=True)
    print(f"{arguments.trials - bad} of {arguments.trials} resumed runs ended bit-identical")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
