"""MAE's claim in miniature: pre-training with a high mask ratio pays.

Three arms a seed, the same small ViT in each: from scratch, MAE with 25 % of the patches masked, MAE with 75 %. Each is
fine-tuned on 500 labels (layer decay 0.75) and probed linearly on 5,000; both MAEs see the same images for the same
number of steps. Real data (CIFAR-10) where it is found, the embedded `shapes` otherwise.

    python benchmarks/claims/mae.py            # about a quarter of an hour on one core; a killed run goes on
"""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch

from benchmarks.claims.common import (
    Batches,
    Store,
    SubClaim,
    World,
    choose_data,
    in_batches,
    labelled,
    open_world,
    parser,
    result,
    result_path,
    show,
    train,
    write,
)
from zoo.selfsup.mae import MAEFineTuning, MAEPretraining
from zoo.training import Optim
from zoo.training.probe import fit_probe

STATEMENT = (
    "MAE pre-training helps a ViT with few labels, a mask ratio of 75 % costs no quality against 25 %, and is faster"
)
ARMS = {"scratch": None, "mae_25": 0.25, "mae_75": 0.75}


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers but the seed."""

    dataset: str = "cifar10"
    img_size: int = 32
    patch_size: int = 4
    embed_dim: int = 96
    depth: int = 4
    num_heads: int = 4
    decoder_embed_dim: int = 48
    decoder_depth: int = 1
    decoder_num_heads: int = 4
    batch: int = 64
    pretrain_images: int = 50_000
    pretrain_steps: int = 1000
    pretrain_lr: float = 1.5e-3
    finetune_labels: int = 500
    finetune_steps: int = 200
    finetune_lr: float = 3e-3
    layer_decay: float = 0.75
    probe_labels: int = 5000
    probe_epochs: int = 60
    probe_lr: float = 3e-3
    test_images: int = 5000

    @property
    def network(self) -> dict[str, int]:
        """The arguments of the masked autoencoder."""
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        decoder = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
        return {name: getattr(self, name) for name in names + decoder}


QUICK = {
    "pretrain_images": 256,
    "pretrain_steps": 4,
    "finetune_labels": 64,
    "finetune_steps": 3,
    "probe_labels": 64,
    "probe_epochs": 12,
    "test_images": 64,
    "batch": 16,
}


def pretraining_task(settings: Settings, ratio: float) -> MAEPretraining:
    optim = Optim(lr=settings.pretrain_lr, warmup_steps=settings.pretrain_steps // 10)
    return MAEPretraining(**settings.network, mask_ratio=ratio, feature="avg", optim=optim)


def finetuning_task(settings: Settings, classes: int, optim: Optim, checkpoint: Path | None) -> MAEFineTuning:
    """The classifier on the encoder of `checkpoint`, or on a fresh one; no mixing, no stochastic depth."""
    sizes = {name: size for name, size in settings.network.items() if not name.startswith("decoder")}
    return MAEFineTuning(
        **sizes,
        num_classes=classes,
        drop_path_rate=0.0,
        init_from=None if checkpoint is None else str(checkpoint),
        mixup=0.0,
        cutmix=0.0,
        optim=optim,
    )


def pretrain(settings: Settings, world: World, seed: int, ratio: float, checkpoint: Path) -> dict[str, Any]:
    """Pre-trains one arm and leaves its checkpoint; tokens are those that pass the encoder for one image."""
    L.seed_everything(seed, verbose=False)
    task = pretraining_task(settings, ratio)
    images, labels = world.train
    batches = Batches(images, labels, world, settings.pretrain_steps, settings.batch, seed)
    trainer, diary = train(task, batches)
    part = checkpoint.with_suffix(".part")
    trainer.save_checkpoint(part, weights_only=True)
    part.replace(checkpoint)
    patches = (settings.img_size // settings.patch_size) ** 2
    return {
        "encoder_tokens": int(patches * (1 - ratio)) + 1,
        "step_seconds": median(diary.seconds),
        "step_processor_seconds": median(diary.processor),
        "last_loss": diary.loss_at(min(len(diary.losses), settings.pretrain_steps))
        if len(diary.losses) >= 10
        else None,
        "loss_at_100": diary.loss_at(100),
        "loss_at_1000": diary.loss_at(1000),
    }


def finetune(settings: Settings, world: World, seed: int, checkpoint: Path | None) -> dict[str, Any]:
    """Fine-tunes on the seed's labels; top-1 on the test images."""
    L.seed_everything(seed, verbose=False)
    optim = Optim(
        lr=settings.finetune_lr,
        betas=(0.9, 0.999),
        layer_decay=settings.layer_decay,
        warmup_steps=settings.finetune_steps // 10,
    )
    task = finetuning_task(settings, world.classes, optim, checkpoint)
    images, labels = labelled(world, seed, settings.finetune_labels)
    batches = Batches(images, labels, world, settings.finetune_steps, settings.batch, seed)
    train(task, batches)
    task.eval()
    logits = in_batches(task, world.test[0], world)
    return {"top1": float((logits.argmax(1) == world.test[1]).float().mean())}


def probe(settings: Settings, world: World, seed: int, checkpoint: Path | None) -> dict[str, Any]:
    """Linear probe of the frozen features; top-1 on the test images.

    MAE's head with AdamW: LARS at the published rate is far from done after the few steps that 5,000 images give.
    """
    L.seed_everything(seed, verbose=False)
    task = pretraining_task(settings, 0.75)
    if checkpoint is not None:
        task.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    task.eval()
    images, labels = labelled(world, seed, settings.probe_labels)
    features = in_batches(task.features, images, world)
    optim = Optim(lr=settings.probe_lr, betas=(0.9, 0.999), weight_decay=0.0, warmup_epochs=settings.probe_epochs / 10)
    head = fit_probe(features, labels, world.classes, settings.probe_epochs, batch_size=250, optim=optim, seed=seed)
    with torch.no_grad():
        logits = head(in_batches(task.features, world.test[0], world))
    return {"top1": float((logits.argmax(1) == world.test[1]).float().mean())}


def run_seed(settings: Settings, world: World, seed: int, store: Store) -> dict[str, dict[str, Any]]:
    """All arms of one seed, each part computed or taken from the store."""
    arms: dict[str, dict[str, Any]] = {}
    for arm, ratio in ARMS.items():
        name = f"seed{seed}_{arm}"
        checkpoint = None if ratio is None else store.path(f"{name}.ckpt")
        pretrained = {}
        if ratio is not None:
            assert checkpoint is not None
            pretrained = store.part(
                f"{name}_pretrain", lambda r=ratio, c=checkpoint: pretrain(settings, world, seed, r, c)
            )
        tuned = store.part(f"{name}_finetune", lambda c=checkpoint: finetune(settings, world, seed, c))
        probed = store.part(f"{name}_probe", lambda c=checkpoint: probe(settings, world, seed, c))
        arms[arm] = {"pretrain": pretrained, "finetune": tuned, "probe": probed}
        print(f"seed {seed} {arm:8} fine-tune {tuned['top1']:.2%}, linear probe {probed['top1']:.2%}", flush=True)
    return arms


def conclude(seeds: list[dict[str, dict[str, Any]]]) -> list[SubClaim]:
    """The sub-claims, stated with their bounds before the run, over the seeds."""

    def gain(kind: str, arm: str, other: str) -> list[float]:
        return [100 * (seed[arm][kind]["top1"] - seed[other][kind]["top1"]) for seed in seeds]

    clock = "step_processor_seconds"
    faster = [seed["mae_25"]["pretrain"][clock] / seed["mae_75"]["pretrain"][clock] for seed in seeds]
    points = "points of top-1"
    return [
        SubClaim(
            "few_labels",
            "fine-tuned on few labels, MAE at 75 % beats training from scratch",
            points,
            0.0,
            gain("finetune", "mae_75", "scratch"),
        ),
        SubClaim(
            "high_ratio_probe",
            "the linear probe of MAE at 75 % is at most one point below that at 25 %",
            points,
            -1.0,
            gain("probe", "mae_75", "mae_25"),
        ),
        SubClaim(
            "high_ratio_speed",
            "a pre-training step at 25 % takes at least 1.5 times the processor time of one at 75 %",
            "times",
            1.5,
            faster,
        ),
    ]


def summarise(seeds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Every arm's numbers by seed."""
    arms: dict[str, Any] = {}
    for arm, ratio in ARMS.items():
        runs = [seed[arm] for seed in seeds]
        arms[arm] = {
            "mask_ratio": ratio,
            "finetune_top1": [run["finetune"]["top1"] for run in runs],
            "probe_top1": [run["probe"]["top1"] for run in runs],
        }
        if ratio is not None:
            for key in ("encoder_tokens", "step_seconds", "step_processor_seconds", "loss_at_100", "loss_at_1000"):
                arms[arm][key] = [run["pretrain"][key] for run in runs]
    return arms


def main(argv: list[str] | None = None) -> int:
    given = parser(__doc__).parse_args(argv)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dataset, folder = choose_data(given.data, given.data_dir)
    settings = replace(Settings(dataset=dataset), **(QUICK if given.quick else {}))
    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        store = Store(given.work / "mae", asdict(settings) | {"threads": given.threads})
        world = open_world(settings.dataset, folder, settings.img_size, settings.pretrain_images, settings.test_images)
        seeds = [run_seed(settings, world, seed, store) for seed in range(given.seeds)]
    finally:
        torch.set_num_threads(threads)
    parts = [part for seed in seeds for arm in seed.values() for part in arm.values() if part]
    record = result(
        "mae",
        STATEMENT,
        asdict(settings) | {"seeds": given.seeds, "threads": given.threads, "quick": given.quick},
        summarise(seeds),
        conclude(seeds),
        parts,
    )
    out = result_path("mae", given)
    write(record, out)
    show(record)
    if given.quick:
        print("a quick run tries the program; its numbers say nothing")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
