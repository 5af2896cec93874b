"""SlowFast's claim in miniature: two pathways, one for what is there and one for how it moves, do what neither can.

Pictures (CIFAR-10) shake on a small circle, and both are to be named: the picture's class, and which of four bands the
frequency lies in. Each band is as wide as Slow's frame rate, and the phase is random: at Slow's frames all four are
distributed alike, and Slow alone can only guess, one in four. Fast sees how fast it shakes, but with an eighth of the
channels it is too thin to name pictures. Four arms a seed, the same pictures, motions and steps in each: Slow alone,
Fast alone, SlowFast with its lateral connections (time-strided convolutions), and SlowFast without any. Real data
(CIFAR-10) where it is found, the embedded `shapes` otherwise.

Alpha is 7 and clips have 28 frames, so that Slow's frames, from the first to the last, are exactly 9 apart.

Tried before the run, with a plain 3-D CNN of three layers: two bands times the sense of rotation, as the four patterns.
In 250 steps it told the bands apart and the sense hardly at all, so that four bands took its place. The bounds were set
before either.

    python benchmarks/claims/slowfast.py        # about a quarter of an hour on one core; a killed run goes on
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch
from torch import Tensor

from benchmarks.claims.common import Batches, SubClaim, World, parser, run_arms, train
from zoo.training import Optim
from zoo.video.slowfast import SlowFastClassification, slow_indices

STATEMENT = (
    "two pathways name picture and motion where Slow alone is blind to the motion and Fast alone too thin for the"
    " picture, and lateral connections help"
)
ARMS: dict[str, dict[str, Any]] = {
    "slow": {"arch": "slow"},
    "fast": {"arch": "fast"},
    "slowfast": {"arch": "slowfast", "fusion": "time_strided_conv", "fusion_kernel": 5},
    "unconnected": {"arch": "slowfast", "fusion": "none"},
}


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers but the seed and the arm."""

    dataset: str = "cifar10"
    img_size: int = 32
    frames: int = 28
    alpha: int = 7
    beta_inv: int = 8
    depth: int = 18
    width: int = 24
    radius: float = 3.0
    bands: tuple[float, ...] = (0.02, 0.14, 0.26, 0.38)  # where the frequencies begin, in turns a frame
    batch: int = 32
    train_images: int = 20_000
    steps: int = 300
    lr: float = 0.1
    warmup_steps: int = 30
    weight_decay: float = 1e-4
    test_images: int = 2000


QUICK = {
    "width": 8,
    "batch": 2,
    "train_images": 60,
    "steps": 11,
    "warmup_steps": 2,
    "test_images": 8,
}


def shaken(images: Tensor, pattern: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, S, S) moved on circles: (B, 3, T, S, S), wrapped around at the borders."""
    count, _, height, across = images.shape
    place, phase, sense = torch.rand(3, count, generator=generator, dtype=torch.float64)
    slow = slow_indices(settings.frames, settings.alpha)
    width = 1 / int(slow[1] - slow[0])
    frequency = torch.tensor(settings.bands, dtype=torch.float64)[pattern] + width * place
    time = torch.arange(settings.frames, dtype=torch.float64)
    angle = 2 * math.pi * (phase[:, None] + torch.where(sense < 0.5, 1, -1)[:, None] * frequency[:, None] * time)
    right, down = ((settings.radius * f(angle)).round().long() for f in (torch.cos, torch.sin))
    rows = (torch.arange(height) - down[..., None]) % height  # (B, T, S)
    columns = (torch.arange(across) - right[..., None]) % across
    batch = torch.arange(count)[:, None, None, None]
    moved = images[batch, :, rows[..., :, None], columns[..., None, :]]  # (B, T, S, S, 3)
    return moved.permute(0, 4, 1, 2, 3)


class Clips(Batches):
    """Batches of pictures that shake; `label` is class * 4 + band."""

    settings: Settings

    def __getitem__(self, step: int) -> dict[str, Any]:
        batch = super().__getitem__(step)
        label = batch["label"] * len(self.settings.bands) + batch.pop("pattern")
        return {**batch, "label": label}

    def augment(self, images: Tensor, generator: torch.Generator) -> dict[str, Any]:
        moved = super().augment(images, generator)["image"]
        pattern = torch.randint(len(self.settings.bands), (len(images),), generator=generator)
        return {"video": shaken(moved, pattern, self.settings, generator), "pattern": pattern}


def make_task(settings: Settings, classes: int, arm: str) -> SlowFastClassification:
    options: dict[str, Any] = {**ARMS[arm], "depth": settings.depth, "width": settings.width}
    options |= {"crop_size": settings.img_size, "dropout": 0.0, "num_classes": classes * len(settings.bands)}
    options["num_frames"] = settings.frames
    if options["arch"] == "slow":
        options["num_frames"] //= settings.alpha
    else:
        options["beta_inv"] = settings.beta_inv
    if options["arch"] == "slowfast":
        options["alpha"] = settings.alpha
    optim = Optim(
        name="sgd",
        lr=settings.lr,
        nesterov=True,
        weight_decay=settings.weight_decay,
        no_decay="norm",
        schedule="cosine",
        schedule_from="start",
        warmup_steps=settings.warmup_steps,
    )
    return SlowFastClassification(model=None, optim=optim, **options)


def seen(video: Tensor, arm: str, settings: Settings) -> Tensor:
    """What an arm is shown of a clip: Slow alone takes its own frames."""
    return video[:, :, slow_indices(settings.frames, settings.alpha)] if arm == "slow" else video


def run_arm(settings: Settings, world: World, seed: int, arm: str) -> dict[str, Any]:
    """One arm of one seed: training, then accuracies over the test pictures, shaken alike for all arms."""
    L.seed_everything(seed, verbose=False)
    task = make_task(settings, world.classes, arm)

    class Shown(Clips):
        def __getitem__(self, step: int) -> dict[str, Any]:
            batch = super().__getitem__(step)
            return {**batch, "video": seen(batch["video"], arm, settings)}

    Shown.settings = settings
    _, diary = train(task, Shown(*world.train, world, settings.steps, settings.batch, seed))
    task.eval()
    images, labels = world.test
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    pattern = torch.arange(len(images)) % len(settings.bands)
    found = []
    with torch.no_grad():
        for part, kind in zip(images.split(100), pattern.split(100), strict=True):
            video = shaken(world.normalise(part), kind, settings, generator)
            found.append(task(seen(video, arm, settings)).argmax(1))
    guess = torch.cat(found)
    picture, motion = guess // len(settings.bands) == labels, guess % len(settings.bands) == pattern
    return {
        "joint": float((picture & motion).float().mean()),
        "picture": float(picture.float().mean()),
        "pattern": float(motion.float().mean()),
        "parameters": sum(p.numel() for p in task.parameters()),
        "loss_at_100": diary.loss_at(100),
        "loss_at_300": diary.loss_at(300),
    }


def conclude(seeds: list[dict[str, dict[str, Any]]]) -> list[SubClaim]:
    """The sub-claims, stated with their bounds before the run, over the seeds."""

    def above(key: str, arm: str, other: str) -> list[float]:
        return [100 * (seed[arm][key] - seed[other][key]) for seed in seeds]

    return [
        SubClaim(
            "slow_is_blind_to_motion",
            "Slow alone names the band less than 5 points more often than chance (25 %)",
            "points kept below 5",
            0.0,
            [5 - 100 * (seed["slow"]["pattern"] - 1 / len(Settings.bands)) for seed in seeds],
        ),
        SubClaim(
            "fast_is_thin",
            "Fast alone names pictures more than 5 points less often than SlowFast",
            "points",
            5.0,
            above("picture", "slowfast", "fast"),
        ),
        SubClaim(
            "better_than_slow",
            "SlowFast names picture and band more than 10 points more often than Slow alone",
            "points",
            10.0,
            above("joint", "slowfast", "slow"),
        ),
        SubClaim(
            "better_than_fast",
            "SlowFast names picture and band more than 3 points more often than Fast alone",
            "points",
            3.0,
            above("joint", "slowfast", "fast"),
        ),
        SubClaim(
            "laterals_help",
            "lateral connections make SlowFast name picture and band more often than without them",
            "points",
            0.0,
            above("joint", "slowfast", "unconnected"),
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    given = parser(__doc__).parse_args(argv)
    return run_arms("slowfast", STATEMENT, given, Settings, QUICK, list(ARMS), run_arm, conclude)


if __name__ == "__main__":
    raise SystemExit(main())
