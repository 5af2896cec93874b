"""One declaration of optimiser and schedule, built once from the trainer.

The learning rate follows the linear rule on the effective batch (per-device batch x processes x accumulation) and is
set before every optimiser step, at the fractional epoch of the first micro-batch of its accumulation window; under
warm-up from 0 the very first update therefore has learning rate 0, as in MAE and MoCo v3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from zoo.errors import ZooError, unknown
from zoo.training.lars import LARC, LARS
from zoo.training.muon import Muon, NAdam

Name = Literal["adamw", "adam", "sgd", "lars", "larc", "muon", "nadam"]
Schedule = Literal["cosine", "step", "constant"]
Interval = Literal["step", "epoch"]
NoDecay = Literal["1d", "norm", "none"]
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)
From = Literal["warmup", "start"]


@dataclass(frozen=True)
class Optim:
    """Optimiser and learning-rate schedule of a run.

    Args:
        name: the optimiser; "adam" takes its decay as a part of the gradient (L2), "adamw" beside it. "muon" takes
            parameters of two dimensions, but for tables of embeddings, as matrices, and treats the others as "nadam".
        base_lr: learning rate for `reference_batch` samples; scaled linearly to the effective batch.
        lr: the absolute learning rate; where given, `base_lr` is not used.
        reference_batch: the batch that `base_lr` is stated for (256 in most papers).
        weight_decay: decay of the parameters that `no_decay` and the model's `no_weight_decay()` leave.
        norm_weight_decay: decay of normalisation layers, which are a group of their own then; null: as `no_decay` says.
        bias_weight_decay: decay of all biases, those of normalisation layers too; null: as the others'.
        bias_lr_scale: factor of the learning rate of all biases.
        overrides: `weight_decay` and `lr_scale` of parameters by the last part of their name, such as
            `{rel_pos_h: {weight_decay: 0.0}}`, whatever else would give them theirs; `lr_scale` stands in for that of
            the layer.
        betas, eps: of Adam, AdamW and NAdam.
        momentum: of SGD, LARS and LARC.
        muon_momentum: of the matrices under Muon.
        nesterov, dampening: of SGD.
        trust_coefficient: of LARS and LARC.
        layer_decay: factor per layer from the top down; wants a model with `layer_id(name)` and `num_layer_ids`.
        constant_lr: beginnings of the names of parameters whose rate stays at the peak from the first step on, such as
            SimSiam's `predictor`; they are groups of their own.
        no_decay: "1d" spares biases and parameters of one dimension, "norm" those of normalisation layers only, "none"
            decays everything.
        schedule: what follows the warm-up.
        interval: whether the schedule moves with every step or with whole epochs.
        first_epoch: the number of a run's first epoch. 1 where the original code counts from 1: the schedule of whole
            epochs is one ahead, and a cosine is 0 in the last of them.
        schedule_from: "warmup": the cosine begins at the end of the warm-up, which rises to the peak. "start": it has
            begun with the run, and the warm-up rises to the value that it has come down to by then.
        warmup_epochs: linear warm-up, in epochs.
        warmup_steps: the same in optimiser steps; where given, `warmup_epochs` is not used.
        warmup_start_lr: the absolute rate that a linear warm-up starts from.
        warmup_lr: where given, the warm-up is this constant rate instead of a linear rise.
        min_lr: the floor of the cosine; layer decay scales it too.
        milestones: epochs at which the step schedule multiplies the rate by `gamma`.
        milestone_steps: the same in optimiser steps; where given, `milestones` is not used.
        gamma: factor of the step schedule.
        factors: of the peak rate after each milestone, where they are no powers of `gamma`.
        global_batch: the recipe's effective batch. It is held whatever the number of devices by accumulation, or the
            run refuses to start.

    Raises:
        ZooError: an unknown name or a value out of range.
    """

    name: Name = "adamw"
    base_lr: float = 1e-3
    lr: float | None = None
    reference_batch: int = 256
    weight_decay: float = 0.05
    norm_weight_decay: float | None = None
    bias_weight_decay: float | None = None
    bias_lr_scale: float = 1.0
    overrides: dict[str, dict[str, float]] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.9
    muon_momentum: float = 0.95
    nesterov: bool = False
    dampening: float = 0.0
    trust_coefficient: float = 0.001
    layer_decay: float | None = None
    constant_lr: tuple[str, ...] = ()
    no_decay: NoDecay = "1d"
    schedule: Schedule = "cosine"
    interval: Interval = "step"
    first_epoch: int = 0
    schedule_from: From = "warmup"
    warmup_epochs: float = 0.0
    warmup_steps: int | None = None
    warmup_start_lr: float = 0.0
    warmup_lr: float | None = None
    min_lr: float = 0.0
    milestones: tuple[float, ...] = ()
    milestone_steps: tuple[int, ...] = ()
    gamma: float = 0.1
    factors: tuple[float, ...] = ()
    global_batch: int | None = None

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("optimiser", self.name, Name),
            ("schedule", self.schedule, Schedule),
            ("interval", self.interval, Interval),
            ("no_decay", self.no_decay, NoDecay),
            ("schedule_from", self.schedule_from, From),
        ):
            if value not in get_args(known):
                raise unknown(kind, str(value), get_args(known))
        for key in ("base_lr", "reference_batch", "bias_lr_scale"):
            if not getattr(self, key) > 0:
                raise ZooError(f"optim.{key} must be positive, not {getattr(self, key)}")
        for key in ("lr", "layer_decay", "warmup_lr", "global_batch"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ZooError(f"optim.{key} must be positive or null, not {getattr(self, key)}")
        if not 0 <= self.muon_momentum < 1:
            raise ZooError(f"optim.muon_momentum must be in [0, 1), not {self.muon_momentum}")
        for key in ("weight_decay", "eps", "dampening", "warmup_epochs", "warmup_start_lr", "min_lr"):
            if not getattr(self, key) >= 0:
                raise ZooError(f"optim.{key} must not be negative, but is {getattr(self, key)}")
        for key in ("norm_weight_decay", "bias_weight_decay"):
            if getattr(self, key) is not None and not getattr(self, key) >= 0:
                raise ZooError(f"optim.{key} must be null or not negative, but is {getattr(self, key)}")
        for leaf, entry in self.overrides.items():
            for fact, number in entry.items():
                if fact not in ("weight_decay", "lr_scale"):
                    raise unknown(f"override of {leaf}", fact, ("weight_decay", "lr_scale"))
                if not number >= 0:
                    raise ZooError(f"optim.overrides.{leaf}.{fact} must not be negative, but is {number}")
        if self.first_epoch not in (0, 1):
            raise ZooError(f"optim.first_epoch must be 0 or 1, not {self.first_epoch}")
        in_steps = self.interval == "step" or self.milestone_steps or self.warmup_steps
        if self.first_epoch and (in_steps or self.warmup_epochs):
            raise ZooError("optim.first_epoch 1 wants a schedule of whole epochs (interval: epoch) without warm-up")
        if self.nesterov and self.dampening:
            raise ZooError("optim.nesterov wants dampening 0")
        milestones = self.milestone_steps or self.milestones
        if self.factors and len(self.factors) != len(milestones):
            raise ZooError(f"optim.factors are {len(self.factors)}, one a milestone would be {len(milestones)}")

    def peak_lr(self, batch: int) -> float:
        """The learning rate at the end of warm-up for an effective batch of `batch` samples."""
        return self.lr if self.lr is not None else self.base_lr * batch / self.reference_batch


def lr_at(
    optim: Optim,
    epoch: float,
    total_epochs: float,
    lr: float,
    warmup_epochs: float | None = None,
    milestones: Sequence[float] | None = None,
) -> float:
    """The learning rate at a fractional `epoch` of a run of `total_epochs` whose peak is `lr`.

    `warmup_epochs` and `milestones` stand in for the declaration's own (where those are given in steps). After the
    warm-up of w epochs the cosine is min_lr + (lr - min_lr) * (1 + cos(pi * (epoch - w) / (total - w))) / 2, or without
    w in it where the schedule counts from the start.
    """
    warmup = optim.warmup_epochs if warmup_epochs is None else warmup_epochs
    milestones = optim.milestones if milestones is None else milestones
    if optim.interval == "epoch":
        epoch = math.floor(epoch) + optim.first_epoch
    if epoch >= warmup:
        return _scheduled(optim, epoch, total_epochs, lr, warmup, milestones)
    if optim.warmup_lr is not None:
        return optim.warmup_lr
    end = lr
    if optim.schedule == "step" or optim.schedule_from == "start":
        end = _scheduled(optim, warmup, total_epochs, lr, warmup, milestones)
    return optim.warmup_start_lr + (end - optim.warmup_start_lr) * epoch / warmup


def _scheduled(
    optim: Optim, epoch: float, total_epochs: float, lr: float, warmup: float, milestones: Sequence[float]
) -> float:
    """The rate without warm-up."""
    if optim.schedule == "constant":
        return lr
    if optim.schedule == "step":
        passed = sum(epoch >= milestone for milestone in milestones)
        return lr * ((1.0, *optim.factors)[passed] if optim.factors else optim.gamma**passed)
    begin = warmup if optim.schedule_from == "warmup" else 0.0
    progress = min(1.0, (epoch - begin) / max(total_epochs - begin, 1e-12))
    return optim.min_lr + (lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def param_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """The trainable parameters of `model`, grouped by weight decay and learning-rate scale.

    Undecayed are what `no_decay` spares and the names in `no_weight_decay()` of the model or of any part of it, save
    the names in its `weight_decay_too()`. Normalisation layers (but those names) and biases with a decay of their own
    have that instead, a bias of a normalisation layer that of biases; `overrides` come last. Without layer decay
    these groups come first, then the undecayed one; with it, groups come in the order in which they first occur in
    `named_parameters`, and a layer's scale is layer_decay ** (top - id), top being `model.num_layer_ids` - 1. Under
    Muon matrices are groups of their own, and so are parameters of a constant rate, behind the others.

    Returns:
        Groups with keys `params`, `names`, `weight_decay`, `lr_scale`, `constant` where the rate is, and under Muon
        `orthogonal`.

    Raises:
        ZooError: nothing to train, layer decay for a model that does not number its layers, or a constant rate or an
            override for names that nothing trainable has.
    """
    spared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in model.named_modules()
        if callable(listing := getattr(part, "no_weight_decay", None))
        for name in listing()
    }
    layer_id: Callable[[str], int] | None = getattr(model, "layer_id", None)
    if optim.layer_decay is not None and layer_id is None:
        raise ZooError(f"optim.layer_decay wants a model with layer_id(name); {type(model).__name__} has none")

    included: set[str] = getattr(model, "weight_decay_too", set)()
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    used: set[str | None] = set()
    leaves: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        norm = isinstance(owner, NORMS)
        leaf = name.rpartition(".")[2]
        leaves |= {leaf}
        bias = leaf == "bias"
        plain = norm if optim.no_decay == "norm" else parameter.ndim <= 1 or name.endswith(".bias")
        decayed = optim.no_decay == "none" or name in included or not (plain or name in spared)
        layer, scale = 0, 1.0
        if optim.layer_decay is not None and layer_id is not None:
            layer = layer_id(name)
            top = int(model.num_layer_ids) - 1  # type: ignore[arg-type]
            scale = optim.layer_decay ** (top - layer)
        if bias:
            scale *= optim.bias_lr_scale
        kind, decay = (2, optim.weight_decay) if decayed else (1, 0.0)
        if norm and name not in included and optim.norm_weight_decay is not None:
            kind, decay = -1, optim.norm_weight_decay
        if bias and optim.bias_weight_decay is not None:
            kind, decay = 0, optim.bias_weight_decay
        own = optim.overrides.get(leaf, {})
        scale = own.get("lr_scale", scale)
        if "weight_decay" in own:
            kind, decay = 3 + list(optim.overrides).index(leaf), own["weight_decay"]
        matrix = optim.name == "muon" and parameter.ndim == 2 and not isinstance(owner, nn.Embedding)
        prefix = next((start for start in optim.constant_lr if f"{name}.".startswith(f"{start}.")), None)
        used |= {prefix}
        facts = {"weight_decay": decay, "lr_scale": scale} | ({"orthogonal": matrix} if optim.name == "muon" else {})
        facts |= {"constant": True} if prefix is not None else {}
        group = groups.setdefault(
            (layer, kind, scale, matrix, prefix is not None), {"params": [], "names": [], **facts}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ZooError(f"{type(model).__name__} has no parameter that requires a gradient; nothing to train")
    if unused := [prefix for prefix in optim.constant_lr if prefix not in used]:
        raise ZooError(f"optim.constant_lr names {unused[0]!r}, which no trainable parameter of the model begins with")
    if strangers := [leaf for leaf in optim.overrides if leaf not in leaves]:
        raise ZooError(f"optim.overrides names {strangers[0]!r}, which no trainable parameter of the model is called")
    if optim.layer_decay is None:
        return [groups[key] for key in sorted(groups)]
    return list(groups.values())


def make_optimizer(groups: list[dict[str, Any]], optim: Optim, lr: float, fused: bool = False) -> Optimizer:
    """The declared optimiser over `groups`, each at `lr` times its `lr_scale`."""
    groups = [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    if optim.name in ("adamw", "adam"):
        kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
        return kind(groups, lr=lr, betas=optim.betas, eps=optim.eps, fused=fused or None)
    if optim.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=lr,
            momentum=optim.momentum,
            dampening=optim.dampening,
            nesterov=optim.nesterov,
            fused=fused or None,
        )
    if optim.name == "muon":
        return Muon(groups, lr=lr, betas=optim.betas, eps=optim.eps, momentum=optim.muon_momentum)
    if optim.name == "nadam":
        return NAdam(groups, lr=lr, betas=optim.betas, eps=optim.eps)
    trusting = LARS if optim.name == "lars" else LARC
    return trusting(groups, lr=lr, momentum=optim.momentum, trust_coefficient=optim.trust_coefficient)


def build(model: nn.Module, optim: Optim, trainer: L.Trainer) -> Any:
    """What `configure_optimizers` returns for the parameters of `model`: the optimiser and its per-step schedule.

    Holds `optim.global_batch` first (see :func:`hold_global_batch`). The schedule spans `trainer.max_epochs`, or
    `trainer.max_steps` where the number of epochs is not limited (max_epochs: -1).

    Raises:
        ZooError: the global batch cannot be held, the batch size is not known, the run has no end to anneal to, or a
            strategy splits the matrices of Muon.
    """
    if optim.name == "muon" and trainer.strategy.restore_checkpoint_after_setup:
        raise ZooError("optim.name muon wants whole matrices on every device: take trainer.strategy ddp")
    hold_global_batch(optim, trainer)
    if optim.schedule == "cosine" and trainer.max_epochs == -1 and (trainer.max_steps == -1 or optim.first_epoch):
        ends = "trainer.max_epochs" if optim.first_epoch else "trainer.max_epochs or trainer.max_steps"
        raise ZooError(f"a cosine schedule needs an end: set {ends}")
    peak = optim.peak_lr(1 if optim.lr is not None else effective_batch(optim, trainer))
    groups = param_groups(model, optim)
    # Under autocast Lightning refuses to clip before a fused step.
    clipped = trainer.gradient_clip_val and str(trainer.precision).endswith("mixed")
    fused = not clipped and all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point() for group in groups for p in group["params"]
    )
    optimizer = make_optimizer(groups, optim, peak, fused=fused)

    def factor(step: int) -> float:
        if step == 0:  # the number of batches is not known yet, and no schedule's start depends on it
            warm = 1.0 if (optim.warmup_epochs if optim.warmup_steps is None else optim.warmup_steps) else 0.0
            milestones = [m for m in optim.milestone_steps or optim.milestones if m <= optim.first_epoch]
            total = float(trainer.max_epochs or 1) if optim.first_epoch else 1.0
            return lr_at(optim, 0.0, total, peak, warm, milestones) / peak
        epoch_of, total = _clock(optim, trainer)
        warmup = optim.warmup_epochs if optim.warmup_steps is None else epoch_of(optim.warmup_steps)
        milestones = [epoch_of(m) for m in optim.milestone_steps] or list(optim.milestones)
        return lr_at(optim, epoch_of(step), total, peak, warmup, milestones) / peak

    factors: list[Any] = [_always if group.get("constant") else factor for group in groups]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}}


def _always(step: int) -> float:
    """The factor of a constant rate."""
    return 1.0


def run_position(optim: Optim, trainer: L.Trainer) -> tuple[float, float]:
    """(the fractional epoch at which the current optimiser step begins, the epochs of the whole run): where a schedule
    of a task's own, such as that of a momentum, is read. It is that of the learning rate."""
    epoch_of, total = _clock(optim, trainer)
    return epoch_of(trainer.global_step), total


def _clock(optim: Optim, trainer: L.Trainer) -> tuple[Callable[[int], float], float]:
    """The epoch before an optimiser step of a given number (from 0), and the total of epochs."""
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    if math.isinf(batches):
        # A stream without length has no epochs: the run counts as one.
        if (optim.warmup_epochs and optim.warmup_steps is None) or optim.interval == "epoch":
            raise ZooError(
                "the training data has no length, so epochs are unknown; set optim.warmup_steps, interval: step"
            )
        total = trainer.max_steps if trainer.max_steps > 0 else 1
        return lambda steps: steps / total, 1.0

    def epoch_of(steps: int) -> float:
        # Lightning closes the last window of an epoch early, so every epoch has a whole number of windows.
        whole, windows = divmod(steps, math.ceil(batches / accumulate))
        return whole + windows * accumulate / batches

    limit = trainer.max_epochs
    return epoch_of, float(limit) if limit is not None and limit != -1 else epoch_of(max(trainer.max_steps, 1))


def effective_batch(optim: Optim, trainer: L.Trainer) -> int:
    """Samples per optimiser step over all processes.

    Raises:
        ZooError: the loaders do not tell their batch size.
    """
    if optim.global_batch is not None:
        return optim.global_batch
    return _device_batch(trainer) * trainer.world_size * trainer.accumulate_grad_batches


def hold_global_batch(optim: Optim, trainer: L.Trainer) -> None:
    """Derives `trainer.accumulate_grad_batches`: per-device batch x processes x accumulation == `optim.global_batch`.

    Batches at the end of an epoch that do not fill a window are left out (as drop_last does), so that every update sees
    the whole global batch. Does nothing where the declaration names no global batch.

    Raises:
        ZooError: no whole accumulation gives the global batch, or the trainer asks for another one.
    """
    wanted = optim.global_batch
    if wanted is None:
        return
    batch, world = _device_batch(trainer), trainer.world_size
    if wanted % world:
        raise ZooError(
            f"the global batch {wanted} cannot be split over {world} processes;"
            " set trainer.devices and num_nodes to a divisor of it, or model.optim.global_batch"
        )
    share = wanted // world
    if share % batch:
        near = max(d for d in range(1, min(batch, share) + 1) if share % d == 0)
        raise ZooError(
            f"the global batch {wanted} is no multiple of {batch} samples x {world} process(es); set data.batch_size to"
            f" a divisor of {share} (nearest below: {near}), or model.optim.global_batch"
        )
    accumulate = share // batch
    if trainer.accumulate_grad_batches not in (1, accumulate):
        raise ZooError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} does not give the global batch {wanted}"
            f" with {batch} samples x {world} process(es): leave it out ({accumulate} is derived), or set"
            " model.optim.global_batch"
        )
    if trainer.accumulate_grad_batches != accumulate:
        if trainer.strategy.handles_gradient_accumulation:
            raise ZooError(f"this strategy accumulates by itself: set trainer.accumulate_grad_batches={accumulate}")
        trainer.accumulate_grad_batches = accumulate
        rank_zero_info(
            f"global batch {wanted} = {batch} samples x {world} process(es) x {accumulate} accumulated batches"
        )
    if accumulate > 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _drop_open_window(trainer, accumulate)


def _drop_open_window(trainer: L.Trainer, accumulate: int) -> None:
    """Ends every epoch with its last whole accumulation window."""
    try:
        length = len(_train_loader(trainer))
    except TypeError:  # a stream
        return
    limit = trainer.limit_train_batches
    length = min(limit, length) if isinstance(limit, int) else int(length * limit)
    if length < accumulate:
        raise ZooError(
            f"an epoch has {length} batches a process, fewer than the {accumulate} that make the global batch; use more"
            " data or a larger data.batch_size, or set model.optim.global_batch"
        )
    if length % accumulate:
        trainer.limit_train_batches = length - length % accumulate


def _train_loader(trainer: L.Trainer) -> Any:
    # Not trainer.estimated_stepping_batches: it sets up the fit loop's data before a checkpoint's loops are restored,
    # after which Lightning never gives the loader its position back.
    if trainer.train_dataloader is not None:
        return trainer.train_dataloader
    if trainer.datamodule is not None:  # type: ignore[attr-defined]
        return trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
    if "train_dataloader" in vars(type(trainer.lightning_module)):
        return trainer.lightning_module.train_dataloader()
    if trainer.ckpt_path is not None:
        raise ZooError("to resume, hand the data over in a LightningDataModule, or set optim.lr and no global_batch")
    trainer.fit_loop.setup_data()
    return trainer.train_dataloader


def _device_batch(trainer: L.Trainer) -> int:
    """Samples a process loads per micro-batch."""
    size = getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
    if size is None:
        loader = _train_loader(trainer)
        size = getattr(loader, "batch_size", None) or getattr(
            getattr(loader, "batch_sampler", None), "batch_size", None
        )
    if not isinstance(size, int):
        raise ZooError(
            "the training data does not tell its batch size; set optim.lr, or give the data module batch_size"
        )
    return size
