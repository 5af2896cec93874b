"""Where an evaluation errs: who is taken for whom, the AP of each class, and the worst samples with their pictures."""

from __future__ import annotations

import base64
import io
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zoo import files
from zoo.data.shown import name_of, pixels, strip
from zoo.errors import ZooError
from zoo.ops.collective import gather_at_first


class ErrorAnalysis(L.Callback):
    """Writes <run>/errors_val.json or errors_test.json when an evaluation ends, for the page of the run.

    It takes what the steps of a task return, so that nothing is computed twice:

    - {"logits" (B, K), "loss" (B,)} of a batch with `label` (B,): the confusion matrix and the samples of highest loss;
    - {"detections": list of dicts} of a batch with `target`: the pictures with most mistakes, objects missed and boxes
      of a score of 0.5 or more that are of none (IoU 0.5, same class).

    A task with `judged(split)` tells itself, from what its metrics gathered, {"pairs": (truth (N,), guess (N,))}
    instead of counting logits, or {"ap": {kind: {class: AP}}}. Processes are joined, each sample counts once. What goes
    wrong here is told in a line and stops no run.

    Args:
        out: the folder; default: of the run.
        worst: samples kept.
        side: of their pictures in pixels, at most.
    """

    def __init__(self, out: str | None = None, worst: int = 12, side: int = 160) -> None:
        if worst < 0 or side < 8:
            raise ZooError(f"error analysis wants worst of 0 or more and side of 8 or more, got {worst} and {side}")
        self.out, self.worst, self.side = out, worst, side
        self._begin()

    def _begin(self) -> None:
        self._pairs: Counter[tuple[int, int]] = Counter()
        self._kept: list[dict[str, Any]] = []
        self._count = 0
        self._fault = ""

    # ------------------------------------------------------------------------------------------------------- a batch

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or self._fault or not isinstance(outputs, Mapping) or not isinstance(batch, Mapping):
            return
        split = "test" if trainer.testing else "val"
        try:
            if "detections" in outputs and "target" in batch:
                self._see_objects(trainer, outputs["detections"], batch)
            elif "logits" in outputs and "loss" in outputs and "label" in batch:
                self._see_labels(trainer, outputs["logits"], outputs["loss"], batch, split)
        except Exception as error:
            self._fault = f"{type(error).__name__}: {error}"

    on_test_batch_end = on_validation_batch_end

    def _see_labels(
        self, trainer: L.Trainer, logits: Tensor, loss: Tensor, batch: Mapping[str, Any], split: str
    ) -> None:
        labels = batch["label"]
        if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
            return
        likely = logits.detach().float().softmax(dim=1)
        sure, guess = likely.max(dim=1)
        self._pairs.update(zip(labels.tolist(), guess.tolist(), strict=True))
        loss = loss.detach().float().nan_to_num(nan=math.inf)
        samples: Any = getattr(trainer.val_dataloaders if split == "val" else trainer.test_dataloaders, "dataset", None)
        named = callable(getattr(samples, "name", None)) and "index" in batch
        key = next((key for key in ("video_id", "index") if key in batch), None)
        numbers = torch.arange(self._count, self._count + len(loss)) if key is None else batch[key]
        self._count += len(labels)
        for place, number in self._candidates(loss, numbers):
            self._keep(
                {
                    "loss": float(loss[place]),
                    "truth": int(labels[place]),
                    "guess": int(guess[place]),
                    "probability": float(sure[place]),
                    "index": number,
                    "file": _file(samples.name(int(batch["index"][place]))) if named else None,
                    "pixels": self._picture(trainer, batch, place),
                }
            )

    def _see_objects(self, trainer: L.Trainer, found: Any, batch: Mapping[str, Any]) -> None:
        mistakes = torch.tensor([_mistakes(one, true) for one, true in zip(found, batch["target"], strict=True)])
        self._count += len(mistakes)
        numbers = torch.tensor([int(true["image_id"]) for true in batch["target"]])
        for place, number in self._candidates(mistakes.float(), numbers):
            one, true = found[place], batch["target"][place]
            sure = one["scores"] >= 0.5
            self._keep(
                {
                    "loss": float(mistakes[place]),
                    "measure": "mistakes",
                    "truth": _named(trainer, true["labels"]),
                    "guess": _named(trainer, one["labels"][sure]),
                    "index": number,
                    "file": _file(batch["path"][place]) if "path" in batch else None,
                    "large": True,
                    "pixels": self._scene(trainer, batch, place, true["boxes"], one["boxes"][sure]),
                }
            )

    def _candidates(self, loss: Tensor, numbers: Tensor) -> list[tuple[int, int]]:
        """Place in the batch and number of the samples that may be among the worst of all, the worst first; of equal
        ones those of lower numbers, whatever the batches and processes."""
        bar = _badness(self._kept[-1]) if self._kept and len(self._kept) == self.worst else (math.inf, 0)
        order = sorted(
            (-value, number, place)
            for place, (value, number) in enumerate(zip(loss.tolist(), numbers.tolist(), strict=True))
        )
        return [(place, number) for bad, number, place in order[: self.worst] if (bad, number) < bar]

    def _keep(self, entry: dict[str, Any]) -> None:
        """Takes a sample among the worst; of several views of one, the worst view."""
        self._kept = _worst([*self._kept, entry], self.worst)

    def _picture(self, trainer: L.Trainer, batch: Mapping[str, Any], place: int) -> Tensor | None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if "video" in batch:
            video = batch["video"]
            shown = pixels(data, video[place : place + 1]) if isinstance(video, Tensor) else None
            return None if shown is None else self._small(strip(shown[0]))
        image = batch["image"] if "image" in batch else batch["views"][0] if "views" in batch else None
        shown = pixels(data, image[place : place + 1]) if image is not None else None
        return None if shown is None else self._small(shown[0])

    def _scene(
        self, trainer: L.Trainer, batch: Mapping[str, Any], place: int, true: Tensor, found: Tensor
    ) -> Tensor | None:
        """The picture with what is there in green and what was found in red."""
        from torchvision.utils import draw_bounding_boxes

        shown = pixels(trainer.datamodule, batch["image"][place : place + 1])  # type: ignore[attr-defined]
        if shown is None:
            return None
        size, original = batch["size"][place].tolist(), batch["original_size"][place].tolist()
        shown = self._small(shown[0][:, : size[0], : size[1]], 2)
        scale = torch.tensor([shown.shape[2] / original[1], shown.shape[1] / original[0]] * 2)
        for boxes, colour in ((true, (60, 200, 90)), (found, (225, 60, 50))):
            if len(boxes):
                shown = draw_bounding_boxes(shown, boxes.cpu().float() * scale, colors=colour, width=2)
        return shown

    def _small(self, picture: Tensor, times: int = 1) -> Tensor:
        """At most `side` (times `times`) pixels high and wide; tiny ones are enlarged by a whole number."""
        height, width = picture.shape[-2:]
        most = self.side * times
        shrink = -(-max(height, width // (3 if width >= 3 * height else 1)) // most)
        if shrink > 1:
            return torch.nn.functional.interpolate(
                picture[None].float(), size=(height // shrink, width // shrink), mode="area"
            )[0].to(torch.uint8)
        zoom = max(1, 96 // max(height, 1))
        return picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)

    # ---------------------------------------------------------------------------------------------------------- the end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        mine = {"pairs": self._pairs, "worst": self._kept, "count": self._count, "fault": self._fault}
        parts = gather_at_first(mine)
        self._kept = []  # the pictures are no longer wanted
        if parts is None:
            return
        split = "test" if trainer.testing else "val"
        try:
            if fault := next((part["fault"] for part in parts if part["fault"]), ""):
                raise ZooError(fault)
            if found := self._joined(trainer, pl_module, parts, split):
                path = Path(self.out or trainer.default_root_dir) / f"errors_{split}.json"
                files.write_json(path, {"split": split, "step": trainer.global_step, **found})
        except Exception as error:
            print(f"no error analysis of {split}: {error}", file=sys.stderr)

    on_test_end = on_validation_end

    def _joined(self, trainer: L.Trainer, pl_module: Any, parts: list[dict[str, Any]], split: str) -> dict[str, Any]:
        told = pl_module.judged(split) if callable(getattr(pl_module, "judged", None)) else {}
        pairs: Counter[tuple[int, int]] = sum((part["pairs"] for part in parts), Counter())
        if "pairs" in told:
            truth, guess = told["pairs"]
            pairs = Counter(zip(truth.tolist(), guess.tolist(), strict=True))
        names = getattr(trainer.datamodule, "class_names", None) or []  # type: ignore[attr-defined]
        ap = {
            kind: {name_of(names, k): value for k, value in scores.items()}
            for kind, scores in told.get("ap", {}).items()
            if scores
        }
        worst = _worst([one for part in parts for one in part["worst"]], self.worst)
        if not (pairs or ap or worst):
            return {}
        return {
            "samples": sum(pairs.values()) or sum(part["count"] for part in parts),
            "classes": list(names),
            "confusion": [[truth, guess, count] for (truth, guess), count in sorted(pairs.items())],
            "ap": ap,
            "worst": [_told(one, names) for one in worst],
        }


def _badness(entry: Mapping[str, Any]) -> tuple[float, int]:
    return (-entry["loss"], entry["index"])


def _worst(entries: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` worst, each sample once."""
    found: dict[int, dict[str, Any]] = {}
    for entry in sorted(entries, key=_badness):
        found.setdefault(entry["index"], entry)
    return list(found.values())[:count]


def _told(entry: dict[str, Any], names: Any) -> dict[str, Any]:
    """An entry of the file: classes by name, the picture inside."""
    told = {key: value for key, value in entry.items() if key != "pixels" and value is not None}
    for key in ("truth", "guess"):
        if isinstance(entry.get(key), int):
            told[key] = name_of(names, entry[key])
    if not math.isfinite(entry["loss"]):
        told["loss"] = None
    if (shown := entry.get("pixels")) is not None:
        from PIL import Image

        data = io.BytesIO()
        Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy()).save(data, "JPEG", quality=85)
        told["picture"] = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    return told


def _file(name: Any) -> str | None:
    """The end of a file's path: its name and folder."""
    return "/".join(Path(str(name)).parts[-2:]) if name else None


def _named(trainer: L.Trainer, labels: Tensor) -> str:
    """Classes by name with their number, such as "2 circle, star"."""
    names = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
    counts = Counter(name_of(names, k) for k in labels.tolist())
    told = [name if n == 1 else f"{n} {name}" for name, n in sorted(counts.items())]
    return ", ".join(told[:8]) + (", …" if len(told) > 8 else "") or "nothing"


def _mistakes(found: Mapping[str, Tensor], true: Mapping[str, Any]) -> int:
    """Objects missed, and boxes of a score of 0.5 or more that are of none, on one picture; crowds and what lies on
    them aside. The surer boxes choose first."""
    from torchvision.ops import box_iou

    sure = found["scores"] >= 0.5
    order = found["scores"][sure].argsort(descending=True)
    boxes, labels = found["boxes"][sure][order].cpu().double(), found["labels"][sure][order].cpu()
    crowd = true["iscrowd"].bool().cpu() if "iscrowd" in true else torch.zeros(len(true["labels"]), dtype=torch.bool)
    there, classes = true["boxes"].cpu().double(), true["labels"].cpu()
    overlap = box_iou(boxes, there) if len(boxes) and len(there) else torch.zeros(len(boxes), len(there))
    overlap = overlap * (labels[:, None] == classes[None])
    free, false = ~crowd, 0
    for row in overlap:
        best, at = (row * free).max(dim=0) if len(row) else (torch.tensor(0.0), 0)
        if best >= 0.5:
            free[at] = False
        elif not (row[crowd] > 0).any():
            false += 1
    return int(free.sum()) + false
