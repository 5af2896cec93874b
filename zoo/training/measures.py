"""Callbacks that measure what ablations are about: gradients across depth, single units, parts of a label, masks in
boxes that are given. `zoo fit RECIPE --trainer.callbacks+=zoo.training.GradientSpread` adds one to any run.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.errors import ZooError
from zoo.metrics.boundary import overlaps
from zoo.metrics.spread import view_variance
from zoo.ops.collective import sum_over
from zoo.ops.masks import boundary_width, paste_masks
from zoo.training.ema import evaluation_weights
from zoo.training.probe import KNNProbe, _loader

_UNSEEN = 1 << 20  # repetitions of a sample that no training draws


def _chosen(module: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The parts of `module` whose names match `pattern`, each ``*`` standing for one level."""
    levels = pattern.count(".")
    found = {n: m for n, m in module.named_modules() if n.count(".") == levels and fnmatch.fnmatchcase(n, pattern)}
    if not found:
        raise ZooError(f"no part of {type(module).__name__} is called {pattern!r}")
    return found


class GradientSpread(L.Callback):
    """Logs `gradient_spread`: decades between the largest and the smallest gradient norm of the chosen parts' outputs,
    in the first training batch, before any step. The network is left as it was.

    Args:
        parts: names such as ``network.stages.*.*``.
    """

    def __init__(self, parts: str) -> None:
        self.parts = parts

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step or batch_idx:
            return
        outputs: list[Tensor] = []

        def keep(part: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
                outputs.append(output)

        state = {name: value.clone() for name, value in pl_module.state_dict().items()}  # running statistics will move
        hooks = [part.register_forward_hook(keep) for part in _chosen(pl_module, self.parts).values()]
        try:
            result: Any = pl_module.training_step(batch, batch_idx)
            (result["loss"] if isinstance(result, Mapping) else result).backward()
        finally:
            for hook in hooks:
                hook.remove()
            pl_module.zero_grad(set_to_none=True)
            pl_module.load_state_dict(state)
        norms = torch.stack([output.grad.norm() for output in outputs if output.grad is not None])
        pl_module.log("gradient_spread", (norms.max() / norms.min()).log10(), on_step=True, on_epoch=False)


class UnitDeletion(L.Callback):
    """Logs `deletion_median` and `deletion_largest`: by how much the validation loss grows where one of the chosen
    parts is left out, of those whose output is shaped like their input (Veit et al. 2016, arXiv 1605.06431).

    For tasks with `predict_logits(batch)` and batches with `label`. One process measures on its own share.

    Args:
        parts: names such as ``network.stages.*.*``.
        batches: validation batches that the loss is taken over.
    """

    def __init__(self, parts: str, batches: int = 1) -> None:
        if batches < 1:
            raise ZooError(f"batches must be 1 or more, not {batches}")
        self.parts, self.batches = parts, batches

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        some = [
            trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), pl_module.device)
            for batch in itertools.islice(_loader(trainer, "val"), self.batches)
        ]
        with evaluation_weights(trainer, pl_module), torch.inference_mode():
            growth = self._growth(pl_module, some)
        pl_module.log_dict(
            {"deletion_median": median(growth), "deletion_largest": max(growth)}, sync_dist=trainer.world_size > 1
        )

    def _growth(self, module: Any, batches: Sequence[Mapping[str, Any]]) -> list[float]:
        def loss() -> float:
            logits = torch.cat([module.predict_logits(batch).float() for batch in batches])
            return float(cross_entropy(logits, torch.cat([batch["label"] for batch in batches])))

        kept: set[str] = set()
        parts = _chosen(module, self.parts)

        def watch(name: str) -> Any:
            return lambda part, inputs, output: kept.add(name) if inputs[0].shape == output.shape else None

        hooks = [part.register_forward_hook(watch(name)) for name, part in parts.items()]
        whole = loss()
        for hook in hooks:
            hook.remove()
        if not kept:
            raise ZooError(
                f"{self.parts}: no part can be left out; the output of each has another shape than its input"
            )
        growth = []
        for name in kept:
            module.set_submodule(name, nn.Identity())
            growth.append(loss() - whole)
            module.set_submodule(name, parts[name])
        return growth


class FactorAccuracy(L.Callback):
    """Logs `{val,test}/NAME` (fractions) for each factor of a label that stands for several: of label a * n + b the
    factors {a: m, b: n} are a and b. For tasks with `predict_logits(batch)`.

    Args:
        factors: number of values by name, the slowest first.
    """

    def __init__(self, factors: dict[str, int]) -> None:
        if not factors or min(factors.values()) < 1:
            raise ZooError("factors must name one or more, each of 1 value or more")
        self.factors = dict(factors)
        self._hits: Tensor | None = None
        self._count = 0

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._hits, self._count = torch.zeros(len(self.factors), device=pl_module.device), 0

    on_validation_epoch_start = on_test_epoch_start = _start

    def _update(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        guess, truth = pl_module.predict_logits(batch).argmax(dim=1), batch["label"]
        assert self._hits is not None
        for n, size in reversed(list(enumerate(self.factors.values()))):
            self._hits[n] += (guess % size == truth % size).sum()
            guess, truth = guess // size, truth // size
        self._count += len(truth)

    on_validation_batch_end = on_test_batch_end = _update

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str) -> None:
        assert self._hits is not None
        sums = torch.cat([self._hits, self._hits.new_tensor([self._count])])
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        for name, hits in zip(self.factors, sums[:-1], strict=True):
            pl_module.log(f"{split}/{name}", (hits / sums[-1].clamp(min=1)).item())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "test")


class ParameterCount(L.Callback):
    """Logs `parameters`, millions of numbers that the optimiser trains."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        count = sum(parameter.numel() for parameter in pl_module.trainable().parameters() if parameter.requires_grad)
        pl_module.log("parameters", count / 1e6)


class GivenBoxMasks(L.Callback):
    """Logs how well a detector draws masks in boxes that are given, whatever it finds itself; one without regions says
    by ``draw_given(batch, boxes)`` what it draws, and in which windows.

    `val/mask_iou` is the mean overlap with the true mask in the whole picture; `val/mask_above_50` and
    `val/mask_above_75` are the shares of objects whose overlap is larger; `val/mask_iou_large` is of objects with a
    side of `large` pixels or more. `val/boundary_iou` and `val/boundary_iou_large` are the overlaps of the masks'
    boundaries (:class:`zoo.metrics.BoundaryIoU`).

    The boxes are the objects' own, each border moved by up to `jitter` of the box's side, alike for all networks; the
    class is given, too. One process measures on its own share.

    Args:
        jitter: share of a side.
        large: pixels.
        boundary: width of the boundaries, as a share of the picture's diagonal.
    """

    def __init__(self, jitter: float = 0.1, large: float = 32.0, boundary: float = 0.02) -> None:
        self.jitter, self.large, self.boundary = jitter, large, boundary
        self._overlaps: list[Tensor] = []
        self._boundaries: list[Tensor] = []
        self._large: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._overlaps, self._boundaries, self._large = [], [], []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        from pycocotools import mask as coco

        network, generator = pl_module.network, torch.Generator().manual_seed(batch_idx)
        heads = getattr(network, "roi_heads", None)
        if "segm" not in network.iou_types:
            raise ZooError(f"{type(network).__name__} has no mask head to measure")
        given: list[dict[str, Any]] = []
        for target, (height, width), (tall, wide) in zip(
            batch["target"], batch["size"].tolist(), batch["original_size"].tolist(), strict=True
        ):
            boxes = target["boxes"].float().cpu() * torch.tensor([width / wide, height / tall] * 2)
            sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            boxes = boxes + sides * self.jitter * (2 * torch.rand(boxes.shape, generator=generator) - 1)
            boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
            given.append({"boxes": boxes.to(pl_module.device), "labels": target["labels"].to(pl_module.device)})
        if heads is None:
            given = network.draw_given(batch, [found["boxes"] for found in given])
        else:
            maps = network.backbone(batch["image"])
            heads.complete([maps[name] for name in heads.levels], given)
        for found, target, (height, width), (tall, wide) in zip(
            given, batch["target"], batch["size"].tolist(), batch["original_size"].tolist(), strict=True
        ):
            if not len(target["boxes"]):
                continue
            boxes = found["windows" if heads is None else "boxes"].cpu()
            boxes = boxes * torch.tensor([wide / width, tall / height] * 2)
            drawn = paste_masks([probs.cpu() for probs in found["mask_probs"]], boxes, (tall, wide))
            truth = torch.from_numpy(coco.decode(target["masks"])).permute(2, 0, 1).bool()
            whole, rim = overlaps(drawn, truth, boundary_width((tall, wide), self.boundary))
            self._overlaps.append(whole)
            self._boundaries.append(rim)
            sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
            self._large.append(sides.amax(dim=1).cpu() >= self.large)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._overlaps:
            return
        whole, rims, large = (torch.cat(parts) for parts in (self._overlaps, self._boundaries, self._large))
        found = {"mask_iou": whole, "mask_above_50": (whole > 0.5).float(), "boundary_iou": rims}
        found |= {"mask_above_75": (whole > 0.75).float()}
        found |= {"mask_iou_large": whole[large], "boundary_iou_large": rims[large]} if large.any() else {}
        numbers = {f"val/{name}": value.mean().item() for name, value in found.items()}
        pl_module.log_dict(numbers, sync_dist=trainer.world_size > 1)


class EasyNegativeShare(L.Callback):
    """Logs which part of a dense detector's classification loss is of easy negatives, on the validation split: of the
    classes that an anchor is not of and that have a probability less than `below` (RetinaNet, section 3).

    `val/easy_negative_share` is their loss over that of all, both summed over all pictures; `val/easy_negative_ratio`
    is the ratio of their loss to that of the rest. For networks with `loss_of_easy(batch, below)`.

    Args:
        below: probability.
    """

    def __init__(self, below: float = 0.1) -> None:
        if not 0 < below < 1:
            raise ZooError(f"easy negatives have a probability below a number between 0 and 1, not {below}")
        self.below = below
        self._sums: Tensor | None = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums = None

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        scale = (batch["size"] / batch["original_size"]).flip(1).repeat(1, 2)  # from the file's pixels to the input's
        targets = [
            {"boxes": target["boxes"].to(scale) * factor, "labels": target["labels"]}
            for target, factor in zip(batch["target"], scale, strict=True)
        ]
        easy, every = pl_module.network.loss_of_easy({"image": batch["image"], "target": targets}, self.below)
        sums = torch.stack([easy, every]).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self._sums is None:
            return
        easy, every = sum_over(self._sums).tolist()
        numbers = {"val/easy_negative_share": easy / every, "val/easy_negative_ratio": easy / (every - easy)}
        pl_module.log_dict(numbers)


class ViewVariance(L.Callback):
    """Logs `variance/SIDE`: how far the embeddings of one image lie apart under its training views, for each side of a
    siamese network (Asym-Siam, arXiv 2204.00613; :func:`zoo.metrics.spread.view_variance`).

    For tasks with `sides(views)`, which gives {"source": (N, C), "target": (N, C)}, or other sides, of a batch of
    `views`; and data modules with `samples("train")`. It is measured in eval mode at the end of a validation, on the
    first images of the training split, under views that no epoch of the run draws. Every process measures the same.

    Args:
        images: of the training split.
        repeats: how often their views are drawn, 2 or more.
        every_n_epochs: epochs between two measurements.
    """

    def __init__(self, images: int = 256, repeats: int = 8, every_n_epochs: int = 1) -> None:
        if images < 1 or repeats < 2 or every_n_epochs < 1:
            raise ZooError(
                "the variance of views wants 1 or more images and every_n_epochs, and 2 or more repeats; got"
                f" {images}, {every_n_epochs} and {repeats}"
            )
        self.images, self.repeats, self.every_n_epochs = images, repeats, every_n_epochs

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or (
            trainer.state.fn == TrainerFn.FITTING and (trainer.current_epoch + 1) % self.every_n_epochs
        ):
            return
        self._measure(trainer, pl_module)

    on_test_epoch_end = on_validation_epoch_end

    def _measure(self, trainer: L.Trainer, pl_module: Any) -> None:
        source: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not callable(getattr(source, "samples", None)):
            raise ZooError("the variance of views wants a data module that has samples(split)")
        if not callable(getattr(pl_module, "sides", None)):
            raise ZooError(f"{type(pl_module).__name__} has no sides(views) whose variance could be measured")
        samples = source.samples("train")
        found: dict[str, list[Tensor]] = {}
        with evaluation_weights(trainer, pl_module), torch.inference_mode():
            for repeat in range(self.repeats):
                # Repetitions of a sample are drawn apart; those of training are numbered from 0.
                keys = [(index, 0, _UNSEEN + repeat) for index in range(min(self.images, len(samples)))]
                batch = trainer.strategy.batch_to_device(
                    trainer.precision_plugin.convert_input(samples.__getitems__(keys)), pl_module.device
                )
                if "views" not in batch:
                    raise ZooError("the variance of views wants a train_transform that gives views")
                with trainer.precision_plugin.forward_context():
                    for side, embedding in pl_module.sides(batch["views"]).items():
                        found.setdefault(side, []).append(embedding.float())
        pl_module.log_dict({f"variance/{side}": view_variance(torch.stack(rows)) for side, rows in found.items()})


def dips(curve: Sequence[float], drop: float = 0.02) -> int:
    """How often a curve of accuracies falls more than `drop` below the highest value so far; it must come back to
    within `drop` before it can fall again."""
    count, best, below = 0, -float("inf"), False
    for value in curve:
        fallen = value < best - drop
        count += fallen and not below
        best, below = max(best, value), fallen
    return count


class Instability(L.Callback):
    """Makes unstable training visible, as MoCo v3 (arXiv 2104.02057, section 4) looks at it: the gradient of the first
    layer, and dips of the kNN accuracy within epochs.

    Logs `gradient/first` and `gradient/last`, the L2 norms of the gradients of the first and the last weights of the
    task's `trainable()` that train, before clipping, at every update, and their largest values so far,
    `gradient/first_max` and `gradient/last_max`; at every `every_n_steps`-th update `knn_curve`, the top-1 of the
    nearest neighbours of the task's features, `knn_dips` (:func:`dips`) and `knn_drop`, the deepest fall below the best
    so far.

    Args:
        first, last: names of layers inside `trainable()` instead, such as "base_encoder.patch_embed.proj".
        every_n_steps: updates between two measurements of the nearest neighbours; null for none.
        drop: a fall of the accuracy that counts as a dip.
        k, temperature, train_samples: as of :class:`~zoo.training.KNNProbe`.

    Raises:
        ZooError: a number out of range, or at the start of a run a layer that has no weights or does not train.
    """

    def __init__(
        self,
        first: str | None = None,
        last: str | None = None,
        every_n_steps: int | None = None,
        drop: float = 0.02,
        k: int = 20,
        temperature: float = 0.07,
        train_samples: int | None = None,
    ) -> None:
        if (every_n_steps is not None and every_n_steps < 1) or not 0 <= drop < 1:
            raise ZooError(
                f"every_n_steps must be 1 or more or null, and drop in [0, 1); got {every_n_steps} and {drop}"
            )
        self.layers, self.every_n_steps, self.drop = {"first": first, "last": last}, every_n_steps, drop
        self._probe = KNNProbe(k, temperature, train_samples=train_samples)
        self._weights: dict[str, nn.Parameter] = {}
        self._norms: dict[str, Tensor] = {}
        self._largest: dict[str, float] = {}
        self.curve: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"curve": list(self.curve), "largest": {name: float(value) for name, value in self._largest.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve, self._largest = list(state_dict["curve"]), dict(state_dict["largest"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        part = pl_module.trainable()
        train = {
            name.rpartition(".")[0]: parameter
            for name, parameter in part.named_parameters()
            if parameter.requires_grad and parameter.ndim > 1 and name.endswith("weight")
        }
        ends = {"first": next(iter(train), None), "last": next(reversed(train), None)}
        for end, asked in self.layers.items():
            layer = asked or ends[end]
            if layer not in train:
                raise ZooError(f"{type(part).__name__} has no layer {layer!r} with weights that train")
            self._weights[end] = train[layer]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = {end: weight.grad for end, weight in self._weights.items() if weight.grad is not None}
        self._norms = {end: gradient.detach().float().norm() for end, gradient in gradients.items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._norms:  # no update yet
            return
        for end, norm in self._norms.items():
            self._largest[end] = max(self._largest.get(end, 0.0), norm.item())
        pl_module.log_dict({f"gradient/{end}": norm for end, norm in self._norms.items()})
        pl_module.log_dict({f"gradient/{end}_max": value for end, value in self._largest.items()})
        self._norms = {}
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self.curve.append(self._probe.accuracy(trainer, pl_module)["top1"])
            best = itertools.accumulate(self.curve, max)
            pl_module.log("knn_curve", self.curve[-1])
            pl_module.log("knn_dips", float(dips(self.curve, self.drop)))
            pl_module.log("knn_drop", max(top - now for top, now in zip(best, self.curve, strict=True)))
