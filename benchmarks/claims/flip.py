"""FLIP's claim in miniature: masking half of the patches costs nothing, and a tuning on whole images mends the rest.

Three arms a seed, the same small pair of encoders in each: no masks, half, three quarters of the patches masked. All
see the same number of encoder tokens, so that masked arms train on two and four times the pairs; each is then tuned on
whole images for a few steps. Texts are made of the label (one of CLIP's seven templates at random); test pictures are
classified zero-shot by all seven, before and after the tuning. Real data (CIFAR-10) where it is found.

    python benchmarks/claims/flip.py            # about ten minutes on one core; a killed run goes on
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch

from benchmarks.claims.common import Batches, SubClaim, World, in_batches, parser, run_arms, train
from zoo.data.sources import describe
from zoo.data.text import WordPiece, prompts, write_vocabulary
from zoo.metrics.zero_shot import class_features
from zoo.multimodal.flip import FLIPPretraining
from zoo.training import Optim

STATEMENT = (
    "at equal encoder tokens, masking half of the patches is no worse than none; three quarters are too many until a"
    " short tuning on whole images"
)
ARMS = {"mask_0": 0.0, "mask_50": 0.5, "mask_75": 0.75}


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers but the seed."""

    dataset: str = "cifar10"
    img_size: int = 32
    patch_size: int = 4
    embed_dim: int = 64
    depth: int = 4
    num_heads: int = 4
    text_embed_dim: int = 64
    text_depth: int = 2
    text_num_heads: int = 2
    proj_dim: int = 64
    context_length: int = 8
    batch: int = 128
    train_images: int = 50_000
    test_images: int = 5000
    whole_steps: int = 240  # of the arm without masks; the others take what the same tokens allow
    lr: float = 2e-3
    tune_steps: int = 30
    tune_lr: float = 2e-4

    def encoder_tokens(self, ratio: float) -> int:
        """Tokens that pass the image encoder for one picture."""
        return int((self.img_size // self.patch_size) ** 2 * (1 - ratio)) + 1

    def steps(self, ratio: float) -> int:
        return round(self.whole_steps * self.encoder_tokens(0.0) / self.encoder_tokens(ratio))


QUICK = {"train_images": 256, "test_images": 64, "whole_steps": 4, "tune_steps": 2, "batch": 16}


class Pairs(Batches):
    """Training batches with a text a picture: one of the label's prompts, drawn by the seed and the step."""

    table: torch.Tensor  # (K, T, L)

    def __getitem__(self, step: int) -> dict[str, Any]:
        batch = super().__getitem__(step)
        draw = torch.Generator().manual_seed((self.seed * 100_003 + step) * 2)
        template = torch.randint(self.table.shape[1], batch["label"].shape, generator=draw)
        return {**batch, "text": self.table[batch["label"], template]}


def prompt_table(settings: Settings) -> tuple[torch.Tensor, int]:
    """The prompts (K, T, L) of all classes in a vocabulary of their own, and its size."""
    _, texts = prompts(settings.dataset, describe(settings.dataset).class_names, "short")
    if settings.dataset == "shapes":
        texts = prompts("cifar10", describe("shapes").class_names, "short")[1]
    with tempfile.TemporaryDirectory() as folder:
        words = write_vocabulary([text for of_class in texts for text in of_class], Path(folder) / "words.txt")
        tokenize = WordPiece(str(words), settings.context_length)
        return tokenize.table(texts), tokenize.size


def make_task(settings: Settings, vocab_size: int, ratio: float, lr: float, steps: int) -> FLIPPretraining:
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "context_length")
    text = ("text_embed_dim", "text_depth", "text_num_heads", "proj_dim")
    sizes = {name: getattr(settings, name) for name in (*names, *text)}
    optim = Optim(lr=lr, weight_decay=0.2, warmup_steps=max(1, steps // 10))
    return FLIPPretraining(None, **sizes, vocab_size=vocab_size, mask_ratio=ratio, optim=optim)


@torch.no_grad()
def zero_shot(task: FLIPPretraining, table: torch.Tensor, world: World) -> float:
    """Top-1 of the test pictures, classified by their prompts."""
    network = task.eval().network
    classes = class_features(network.encode_text, table)
    images, labels = world.test
    found = in_batches(lambda part: network.encode_image(part) @ classes.T, images, world).argmax(1)
    return float((found == labels).float().mean())


def run_arm(settings: Settings, world: World, seed: int, arm: str) -> dict[str, Any]:
    """Trains one arm, tunes it, and classifies after either."""
    ratio = ARMS[arm]
    table, words = prompt_table(settings)

    def pairs(steps: int, seed: int) -> Pairs:
        batches = Pairs(*world.train, world, steps, settings.batch, seed)
        batches.table = table
        return batches

    L.seed_everything(seed, verbose=False)
    steps = settings.steps(ratio)
    task = make_task(settings, words, ratio, settings.lr, steps)
    _, diary = train(task, pairs(steps, seed))
    before = zero_shot(task, table, world)
    L.seed_everything(seed + 1000, verbose=False)
    tuned = make_task(settings, words, 0.0, settings.tune_lr, settings.tune_steps)
    tuned.network.load_state_dict(task.network.state_dict())
    train(tuned, pairs(settings.tune_steps, seed + 1000))
    return {
        "mask_ratio": ratio,
        "steps": steps,
        "encoder_tokens": settings.encoder_tokens(ratio),
        "top1": before,
        "tuned_top1": zero_shot(tuned, table, world),
        "step_seconds": median(diary.seconds),
        "step_processor_seconds": median(diary.processor),
        "training_processor_seconds": sum(diary.processor),
        "loss_at_100": diary.loss_at(100),
    }


def conclude(seeds: list[dict[str, dict[str, Any]]]) -> list[SubClaim]:
    """The sub-claims, stated with their bounds before the run, over the seeds."""

    def difference(one: tuple[str, str], other: tuple[str, str]) -> list[float]:
        return [100 * (seed[one[0]][one[1]] - seed[other[0]][other[1]]) for seed in seeds]

    gains = {arm: difference((arm, "tuned_top1"), (arm, "top1")) for arm in ("mask_50", "mask_75")}
    clock = "step_processor_seconds"
    points = "points of top-1"
    return [
        SubClaim(
            "half_is_no_worse",
            "half masked and tuned is at most one point below no masks, tuned as long, at the same encoder tokens",
            points,
            -1.0,
            difference(("mask_50", "tuned_top1"), ("mask_0", "tuned_top1")),
        ),
        SubClaim(
            "three_quarters_are_too_many",
            "before the tuning, three quarters masked is below half",
            points,
            0.0,
            difference(("mask_50", "top1"), ("mask_75", "top1")),
        ),
        SubClaim(
            "tuning_helps_most_there",
            "the tuning raises the model of three quarters more than that of half",
            points,
            0.0,
            [a - b for a, b in zip(gains["mask_75"], gains["mask_50"], strict=True)],
        ),
        SubClaim(
            "half_is_cheaper",
            "a step without masks takes at least 1.4 times the processor time of one with half of the patches",
            "times",
            1.4,
            [seed["mask_0"][clock] / seed["mask_50"][clock] for seed in seeds],
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    given = parser(__doc__).parse_args(argv)
    return run_arms("flip", STATEMENT, given, Settings, QUICK, list(ARMS), run_arm, conclude)


if __name__ == "__main__":
    raise SystemExit(main())
