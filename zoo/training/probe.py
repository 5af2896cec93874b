"""What frozen features are worth: linear probe and nearest neighbours, as callbacks.

The task gives `features(image) -> (B, D)`. Features are extracted once, in eval mode, on the (averaged) weights. These
are monitors that see every image in one view; a paper's own linear-probe number wants its recipe, with fresh crops.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from zoo.errors import ZooError
from zoo.metrics.knn import KNNAccuracy
from zoo.ops.collective import gather_objects
from zoo.training.base import read_batch
from zoo.training.ema import evaluation_weights
from zoo.training.optim import Name, Optim, lr_at, make_optimizer, param_groups


def probe_head(dim: int, num_classes: int) -> nn.Sequential:
    """MAE's linear-probe head: BatchNorm1d without affine (eps 1e-6), then Linear with trunc_normal(0.01) weights."""
    linear = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)


def probe_lr(optimizer: Name, samples: int) -> float:
    """A learning rate per 256 samples that suits a training set of `samples`.

    For LARS MAE's 0.1 on ImageNet-1k, and more on smaller sets: its steps are relative to the weights, so that the head
    moves as (rate x samples x epochs) and would hardly leave its initial values on a small set. At most 10.
    """
    return {"lars": min(10.0, 0.1 * 1_281_167 / samples), "sgd": 0.1, "adamw": 1e-3}[optimizer]


def fit_probe(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    epochs: int = 90,
    batch_size: int = 256,
    optim: Optim | None = None,
    seed: int = 0,
    progress: Iterable[int] | None = None,
) -> nn.Sequential:
    """Trains a :func:`probe_head` on features (N, D) with labels (N,); the same result on every process.

    Batches hold min(batch_size, N) samples, the last incomplete one of an epoch is left out; learning rate by the
    linear rule on that batch. `optim` defaults to LARS at :func:`probe_lr`, no decay, 10 epochs of warm-up, cosine.
    `progress` is what counts the epochs, where somebody watches.
    """
    if optim is None:
        rate = probe_lr("lars", len(features))
        optim = Optim(name="lars", base_lr=rate, weight_decay=0.0, warmup_epochs=min(10, epochs / 2))
    batch_size = min(batch_size, len(features))
    steps = len(features) // batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = probe_head(features.shape[1], num_classes).to(features.device, features.dtype)
    order = torch.Generator().manual_seed(seed)
    peak = optim.peak_lr(batch_size)
    optimizer = make_optimizer(param_groups(head, optim), optim, peak)
    for epoch in range(epochs) if progress is None else progress:
        shuffled = torch.randperm(len(features), generator=order).to(features.device)
        for step in range(steps):
            rate = lr_at(optim, epoch + step / steps, epochs, peak)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            pick = shuffled[step * batch_size : (step + 1) * batch_size]
            optimizer.zero_grad()
            cross_entropy(head(features[pick]), labels[pick]).backward()
            optimizer.step()
    return head.eval()


@torch.no_grad()
def topk_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """{"top1", "top5"} (fractions) of logits (N, K) against labels (N,); top-5 counts min(5, K) classes."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {"top1": hits[:, 0].double().mean().item(), "top5": hits.any(dim=1).double().mean().item()}


def told(what: str, steps: Any, trainer: L.Trainer, seconds: float = 10.0) -> Iterator[Any]:
    """The entries of `steps`, with a line of progress every `seconds` on the first process."""
    last = time.monotonic()
    for number, step in enumerate(steps, 1):
        yield step
        if trainer.is_global_zero and (now := time.monotonic()) - last >= seconds:
            last = now
            print(f"{what} {number}/{len(steps)}", flush=True)


def extract_features(
    trainer: L.Trainer, module: L.LightningModule, loader: Any, what: str = "features: batch"
) -> dict[str, Tensor]:
    """{"features" (N, D), "label" (N,), "index" (N,)} of this process's share of `loader`, on the module's device.

    `module` is taken as it stands (see :func:`zoo.training.ema.evaluation_weights`). Samples without an index get their
    place in the loader, counted over all processes. A process without samples, beside others, gets {}. Long extractions
    say how far they are, under the name `what`.

    Raises:
        ZooError: the task has no `features`, or the data no labels.
    """
    if not callable(getattr(module, "features", None)):
        raise ZooError(f"{type(module).__name__} cannot be probed: it has no method features(image)")
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    seen = 0
    with torch.inference_mode():
        for batch in told(what, loader, trainer):
            batch = read_batch(trainer.precision_plugin.convert_input(batch), "a probe", ("image", "label"))
            batch = trainer.strategy.batch_to_device(batch, module.device)
            image, label = batch["image"], batch["label"]
            with trainer.precision_plugin.forward_context():
                features = module.features(image)  # type: ignore[operator]
            size = len(image)
            place = (torch.arange(seen, seen + size) * trainer.world_size + trainer.global_rank).to(module.device)
            seen += size
            dtype = torch.promote_types(features.dtype, torch.float32)
            rows.append((features.to(dtype), label, batch.get("index", place)))
    if not rows and trainer.world_size > 1:
        return {}  # others may have some
    if not rows:
        raise ZooError("a probe got no data: the loader is empty")
    features, labels, indices = (torch.cat(column).clone() for column in zip(*rows, strict=True))
    return {"features": features, "label": labels, "index": indices}


def gather_samples(trainer: L.Trainer, samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """The samples of all processes, each once and in the order of "index", on every process.

    Shares may differ in length; an empty one may be {}.

    Raises:
        ZooError: all are empty.
    """
    if trainer.world_size > 1:
        kinds = gather_objects({key: (tuple(value.shape[1:]), value.dtype) for key, value in samples.items()})
        if not (kind := next(filter(None, kinds), None)):
            raise ZooError("a probe got no data: the loaders are empty")
        device = trainer.strategy.root_device
        samples = samples or {
            key: torch.zeros(0, *shape, dtype=dtype, device=device) for key, (shape, dtype) in kind.items()
        }
        sizes = [int(n) for n in trainer.strategy.all_gather(torch.tensor(len(samples["index"]), device=device))]
        gathered = {}
        for key, value in samples.items():
            padded = value.new_zeros(max(sizes), *value.shape[1:])
            padded[: len(value)] = value
            shares = trainer.strategy.all_gather(padded)
            gathered[key] = torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])
        samples = gathered
    # A loader that repeats or pads samples must not give them weight.
    order = samples["index"].argsort(stable=True)
    index = samples["index"][order]
    fresh = torch.ones_like(index, dtype=torch.bool)
    fresh[1:] = index[1:] != index[:-1]
    return {key: value[order[fresh]] for key, value in samples.items()}


class _Some:
    """The first `count` batches of a loader."""

    def __init__(self, loader: Any, count: int) -> None:
        self.loader, self.count = loader, count

    def __len__(self) -> int:
        return min(len(self.loader), self.count)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.count)


def _loader(trainer: L.Trainer, split: str, count: int | None = None) -> Any:
    """The loader of "train", "val", "test" or "predict": the data module's own, else the one the trainer holds; as many
    batches of it as the trainer's limit for the split lets through.

    A data module with `samples(split, train_transform)` gives the training samples under its evaluation transform, each
    once; of these a limit counts the batches of all processes together. Where `count` of them are enough, so many are
    drawn with the run's seed, whatever the limit.
    """
    limit = getattr(trainer, f"limit_{split}_batches", None) or 1.0  # 0 is for the trainer's own loop
    source = trainer.datamodule  # type: ignore[attr-defined]
    if source is not None:
        if split == "train" and trainer.state.fn != TrainerFn.FITTING:
            source.setup("fit")
        loader = getattr(source, f"{split}_dataloader")()
        if split == "train" and callable(getattr(source, "samples", None)):
            samples = source.samples("train", train_transform=False)
            chosen = list(range(len(samples)))
            if count is not None and count < len(samples):
                draw = torch.Generator().manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)))
                chosen = torch.randperm(len(samples), generator=draw)[:count].sort().values.tolist()
            elif count is None:
                batches = math.ceil(len(samples) / loader.batch_size)
                batches = min(batches, limit) if isinstance(limit, int) else math.ceil(batches * limit)
                chosen = chosen[: batches * loader.batch_size]
            count, limit = None, 1.0
            loader = DataLoader(
                samples,
                batch_size=loader.batch_size,
                sampler=chosen[trainer.global_rank :: trainer.world_size],
                collate_fn=loader.collate_fn,
                num_workers=loader.num_workers,
            )
    else:
        loader = {
            "train": trainer.train_dataloader,
            "val": trainer.val_dataloaders,
            "test": trainer.test_dataloaders,
        }[split]
    if isinstance(loader, list | tuple):
        loader = loader[0] if loader else None
    if loader is None:
        raise ZooError(f"a probe needs {split} data, and this run has none; hand over a LightningDataModule")
    if count is not None and split == "train" and len(loader) * (getattr(loader, "batch_size", None) or 1) > count:
        raise ZooError("train_samples of a probe wants a data module that has samples(split, train_transform)")
    if limit == 1.0 and not isinstance(limit, int):
        return loader
    return _Some(loader, limit if isinstance(limit, int) else max(1, int(len(loader) * limit)))


def _some(count: int | None) -> int | None:
    if count is not None and count < 2:
        raise ZooError(f"train_samples of a probe must be 2 or more, not {count}")
    return count


def _num_classes(trainer: L.Trainer, *labels: Tensor) -> int:
    known = getattr(trainer.datamodule, "num_classes", None)  # type: ignore[attr-defined]
    return int(known) if known else 1 + max(int(label.max()) for label in labels)


class LinearProbe(L.Callback):
    """Scores the task's frozen features by a linear classifier: on the validation split when training ends and in
    `validate`, on the test split in `test`. Logs `probe_top1` and `probe_top5` (fractions) and prints one line.

    Args:
        epochs: passes over the extracted training features.
        base_lr: per 256 samples; by default what :func:`probe_lr` finds suitable (0.1 for LARS on ImageNet-1k).
        optimizer: "lars" as MAE, or "sgd" or "adamw".
        batch_size: samples a step (fewer where the training set is smaller).
        warmup_epochs: linear warm-up; the cosine takes the rest.
        weight_decay: 0 in every published probe but VISSL's.
        seed: of the head and the order of samples.
        train_samples: learn from so many training samples only, drawn with the run's seed.
    """

    def __init__(
        self,
        epochs: int = 90,
        base_lr: float | None = None,
        optimizer: Name = "lars",
        batch_size: int = 256,
        warmup_epochs: float = 10,
        weight_decay: float = 0.0,
        seed: int = 0,
        train_samples: int | None = None,
    ) -> None:
        if epochs < 1 or batch_size < 2 or not 0 <= warmup_epochs < epochs:
            raise ZooError("a linear probe wants epochs >= 1, batch_size >= 2 and 0 <= warmup_epochs < epochs")
        self.epochs, self.batch_size, self.seed, self.base_lr = epochs, batch_size, seed, base_lr
        self.train_samples = _some(train_samples)
        self.optim = Optim(name=optimizer, weight_decay=weight_decay, warmup_epochs=warmup_epochs)

    def run(self, trainer: L.Trainer, module: L.LightningModule, split: str) -> dict[str, float]:
        """{"probe_top1", "probe_top5"} on `split` ("val" or "test"); call on every process."""
        with evaluation_weights(trainer, module):
            train, held = (
                gather_samples(
                    trainer,
                    extract_features(
                        trainer, module, _loader(trainer, name, count), f"linear probe: {name} features, batch"
                    ),
                )
                for name, count in (("train", self.train_samples), (split, None))
            )
        classes = _num_classes(trainer, train["label"], held["label"])
        with torch.inference_mode(False), torch.enable_grad():
            features, labels = train["features"].clone(), train["label"].clone()
            rate = self.base_lr or probe_lr(self.optim.name, len(features))
            optim = replace(self.optim, base_lr=rate)
            progress = told("linear probe: epoch", range(self.epochs), trainer)
            head = fit_probe(features, labels, classes, self.epochs, self.batch_size, optim, self.seed, progress)
        with torch.no_grad():
            accuracy = topk_accuracy(head(held["features"]), held["label"])
        if trainer.is_global_zero:
            print(
                f"linear probe on {split}: top-1 {accuracy['top1']:.2%}"
                + (f", top-5 {accuracy['top5']:.2%}" if classes > 5 else "")
                + f" ({classes} classes, {len(train['label'])} train and {len(held['label'])} {split} samples)",
                flush=True,
            )
        return {f"probe_{name}": value for name, value in accuracy.items()}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        score = self.run(trainer, pl_module, "val")
        # self.log is closed by now.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in score.items()})
        for logger in trainer.loggers:
            logger.log_metrics(score, step=trainer.global_step)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            pl_module.log_dict(self.run(trainer, pl_module, "val"))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log_dict(self.run(trainer, pl_module, "test"))


class KNNProbe(L.Callback):
    """Logs `knn_top1` and `knn_top5` of the task's features on the validation split, in a test on the test split, with
    train features as the bank.

    Args:
        k: neighbours.
        temperature: of the vote exp(cosine / T).
        every_n_epochs: epochs between two measurements.
        train_samples: a bank of so many training samples only, drawn with the run's seed.
    """

    def __init__(
        self, k: int = 20, temperature: float = 0.07, every_n_epochs: int = 1, train_samples: int | None = None
    ) -> None:
        if every_n_epochs < 1:
            raise ZooError(f"every_n_epochs must be 1 or more, not {every_n_epochs}")
        self.k, self.temperature, self.every_n_epochs = k, temperature, every_n_epochs
        self.train_samples = _some(train_samples)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or (
            trainer.state.fn == TrainerFn.FITTING and (trainer.current_epoch + 1) % self.every_n_epochs
        ):
            return
        self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module, "test")

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, held: str) -> None:
        found = self.accuracy(trainer, pl_module, held)
        pl_module.log_dict({f"knn_{name}": value for name, value in found.items()})

    def accuracy(self, trainer: L.Trainer, pl_module: L.LightningModule, held: str = "val") -> dict[str, float]:
        """{"top1", "top5"} on the split `held`, now; call on every process."""
        with evaluation_weights(trainer, pl_module):
            bank, query = (
                gather_samples(
                    trainer,
                    extract_features(
                        trainer, pl_module, _loader(trainer, split, count), f"kNN: {split} features, batch"
                    ),
                )
                for split, count in (("train", self.train_samples), (held, None))
            )
        # Gathered already (without repeats), so every process computes the same.
        metric = KNNAccuracy(
            _num_classes(trainer, bank["label"], query["label"]), self.k, self.temperature, sync_on_compute=False
        ).to(pl_module.device)
        metric.update_bank(bank["features"], bank["label"])
        metric.update(query["features"], query["label"])
        return {name: value.item() for name, value in metric.compute().items()}
