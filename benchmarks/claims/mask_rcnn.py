"""The two ideas of Mask R-CNN in miniature: features of a region without rounding, masks without rivalry of classes.

Drawn scenes (the embedded world: one large object and up to two small ones of ten shapes, exact masks), a small
convolutional net whose only map has stride 16, and the paper's mask head on it. The regions are the objects' boxes,
each side jittered, so that no proposal network has a say. Four arms a seed, the same start and batches in each:
RoIAlign with a sigmoid a class; RoIPool; RoIAlign of boxes rounded to whole cells of the map; and RoIAlign with one
softmax over classes and background in each cell, the rule of fully convolutional segmentation. Judged by the overlap
(IoU) of the drawn mask with the true one in the whole picture, the class being given.

Compare the paper's Table 2b (sigmoid or softmax) and 2c and 2d (RoIPool, RoIWarp, RoIAlign), ResNet-50-C4 of stride 16
in the first two.

Tried before the run, on a seed that is none of its own (100): after 500 steps RoIAlign stood at a mean IoU of 0.709,
RoIPool at 0.644 and rounded boxes at 0.639; after 1500 at 0.737, 0.661 and 0.660. The softmax found next to nothing as
long as the share of the given class had to pass one half (0.004 after 500 steps); it is therefore judged by the given
class against the background alone, and on the large objects (32 pixels or more), since on small ones, whose class
this net hardly tells, it failed even so (0.80 on large and 0.02 on small objects after 1500 steps). The run takes
1500 steps; its bounds were set before it, but for one mishap: the file that ran the three seeds compared sigmoid and
softmax over all objects (+32.6 points) instead of the large ones; put right, on the same runs, it stays undecided.

    python benchmarks/claims/mask_rcnn.py                # about six minutes of one core; a killed run goes on
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import Dataset

from benchmarks.claims.common import SubClaim, parser, run_seeds, train
from zoo.data.shapes import SHAPES, render
from zoo.nn.detection.roi_heads import MaskHead, MaskHeadConfig, PoolConfig, RoIPooler
from zoo.ops.masks import crop_masks, paste_masks

STATEMENT = (
    "on a map of stride 16, RoIAlign gives better masks than RoIPool and than RoIAlign of rounded boxes, the more so"
    " under a strict measure; and independent sigmoids a class give better masks than a softmax over classes"
)
STRIDE = 16
ARMS: dict[str, dict[str, Any]] = {
    "align": {"pooling": "align", "rounded": False, "softmax": False},
    "pool": {"pooling": "pool", "rounded": False, "softmax": False},
    "rounded": {"pooling": "align", "rounded": True, "softmax": False},
    "softmax": {"pooling": "align", "rounded": False, "softmax": True},
}


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers but the seed and the arm."""

    dataset: str = "shapes"
    img_size: int = 96
    objects: int = 3
    min_visible: float = 0.5
    jitter: float = 0.1
    width: int = 32
    batch: int = 8
    steps: int = 1500
    lr: float = 2e-3
    train_images: int = 2000
    test_images: int = 400


QUICK = {"steps": 3, "train_images": 16, "test_images": 8, "width": 8}


@dataclass
class Objects:
    """Scenes, and the objects on them one after the other: the scene each stands in, class, box, mask."""

    images: Tensor  # (N, 3, H, W) uint8
    scene: Tensor  # (M,)
    labels: Tensor  # (M,)
    boxes: Tensor  # (M, 4)
    masks: Tensor  # (M, H, W) bool


@functools.lru_cache(2)
def draw(settings: Settings, split: str, count: int) -> Objects:
    """`count` scenes of a split with the objects of which enough is visible."""
    fields = ("image", "shape", "boxes", "masks", "visible")
    drawn = render(0, split, range(count), settings.img_size, fields, max_objects=settings.objects)
    scene, slot = ((drawn["shape"] >= 0) & (drawn["visible"] >= settings.min_visible)).nonzero(as_tuple=True)
    facts = [drawn[name][scene, slot] for name in ("shape", "boxes", "masks")]
    return Objects(drawn["image"], scene, *facts)


def jittered(boxes: Tensor, share: float, side: int, generator: torch.Generator) -> Tensor:
    """Boxes (M, 4) whose borders move by up to `share` of the box's sides, inside the picture."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = boxes + sides * share * (2 * torch.rand(boxes.shape, generator=generator) - 1)
    return moved.clamp(0, side)


class Batches(Dataset):
    """Training batches: item `i` is a pure function of the seed and `i`. Half of the batches are mirrored."""

    def __init__(self, settings: Settings, objects: Objects, seed: int) -> None:
        self.settings, self.objects, self.seed = settings, objects, seed
        self.batch = min(settings.batch, len(objects.images))

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        s, o = self.settings, self.objects
        epoch, place = divmod(step, len(o.images) // self.batch)
        order = torch.randperm(len(o.images), generator=torch.Generator().manual_seed(self.seed * 100_003 + epoch))
        picked = order[place * self.batch : (place + 1) * self.batch]
        generator = torch.Generator().manual_seed((self.seed * 100_003 + step) * 2 + 1)
        index, row = (o.scene[None] == picked[:, None]).nonzero(as_tuple=True)
        rois, images, masks = jittered(o.boxes[row], s.jitter, s.img_size, generator), o.images[picked], o.masks[row]
        if torch.rand((), generator=generator) < 0.5:
            images, masks = images.flip(-1), masks.flip(-1)
            rois = torch.stack([s.img_size - rois[:, 2], rois[:, 1], s.img_size - rois[:, 0], rois[:, 3]], 1)
        return {"image": images, "index": index, "label": o.labels[row], "boxes": rois, "masks": masks}


class RegionMasks(L.LightningModule):
    """A backbone of stride 16, a pooling of regions, and Mask R-CNN's head."""

    def __init__(self, settings: Settings, pooling: str, rounded: bool, softmax: bool) -> None:
        super().__init__()
        self.settings, self.rounded, self.softmax = settings, rounded, softmax
        widths = [3, settings.width // 2, *[settings.width] * 4]
        layers: list[nn.Module] = []
        for n, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if n < 4 else 1
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(4, after), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        config = PoolConfig(14, pooling=pooling)  # type: ignore[arg-type]
        self.pooler = RoIPooler((STRIDE,), config)
        maps = len(SHAPES) + softmax  # a softmax has a rival for the background, too
        self.head = MaskHead(settings.width, maps, MaskHeadConfig(pool=config, channels=settings.width))

    def forward(self, images: Tensor, index: Tensor, boxes: Tensor) -> Tensor:
        """Logits (M, K, 28, 28) of the regions `boxes` (M, 4) of images (B, 3, H, W) uint8."""
        maps = self.backbone(images.float() / 127.5 - 1)
        if self.rounded:
            boxes = (boxes / STRIDE).round() * STRIDE
            boxes = torch.cat([boxes[:, :2], boxes[:, 2:].maximum(boxes[:, :2] + STRIDE)], 1)
        return self.head(self.pooler([maps], torch.cat([index[:, None].to(boxes.dtype), boxes], 1)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch["image"], batch["index"], batch["boxes"])
        rows = torch.arange(len(logits))
        wanted = crop_masks(batch["masks"], rows, batch["boxes"], logits.shape[-1])
        if self.softmax:
            return cross_entropy(logits, torch.where(wanted, batch["label"][:, None, None], len(SHAPES)))
        return binary_cross_entropy_with_logits(logits[rows, batch["label"]], wanted.float())

    def probabilities(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(M, 28, 28) of the given classes; under a softmax, of the class against the background alone."""
        chosen = logits[torch.arange(len(labels)), labels]
        return (chosen - logits[:, -1] if self.softmax else chosen).sigmoid()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.settings.lr)


@torch.no_grad()
def overlaps(task: RegionMasks, objects: Objects, settings: Settings) -> Tensor:
    """(M,) IoU of each object's drawn mask with the true one; the jitter of the boxes is the same for all arms."""
    generator = torch.Generator().manual_seed(1)
    boxes = jittered(objects.boxes, settings.jitter, settings.img_size, generator)
    found = []
    for scenes in torch.arange(len(objects.images)).split(50):
        row = ((objects.scene >= scenes[0]) & (objects.scene <= scenes[-1])).nonzero()[:, 0]
        logits = task(objects.images[scenes], objects.scene[row] - scenes[0], boxes[row])
        soft = task.probabilities(logits, objects.labels[row])
        drawn = paste_masks(soft, boxes[row], (settings.img_size, settings.img_size))
        both, either = (drawn & objects.masks[row]).sum((1, 2)), (drawn | objects.masks[row]).sum((1, 2))
        found.append(both / either.clamp(min=1))
    return torch.cat(found)


def run_arm(settings: Settings, seed: int, arm: str) -> dict[str, Any]:
    """Trains an arm and measures the overlaps on the test scenes."""
    L.seed_everything(seed, verbose=False)
    task = RegionMasks(settings, **ARMS[arm])
    _, diary = train(task, Batches(settings, draw(settings, "train", settings.train_images), seed))  # type: ignore[arg-type]
    objects = draw(settings, "test", settings.test_images)
    iou = overlaps(task.eval(), objects, settings)
    large = (objects.boxes[:, 2:] - objects.boxes[:, :2]).amax(1) >= 2 * STRIDE
    return {
        "mean_iou": float(iou.mean()),
        "above_50": float((iou > 0.5).float().mean()),
        "above_75": float((iou > 0.75).float().mean()),
        "mean_iou_large": float(iou[large].mean()),
        "mean_iou_small": float(iou[~large].mean()),
        "objects": len(iou),
        "step_processor_seconds": median(diary.processor),
        "loss_at_100": diary.loss_at(100),
        "loss_at_500": diary.loss_at(500),
    }


def conclude(seeds: list[dict[str, dict[str, Any]]]) -> list[SubClaim]:
    """The sub-claims, stated with their bounds before the run, over the seeds."""

    def gain(key: str, over: str) -> list[float]:
        return [100 * (seed["align"][key] - seed[over][key]) for seed in seeds]

    points = "points of mask IoU"
    strict = [a - b for a, b in zip(gain("above_75", "pool"), gain("above_50", "pool"), strict=True)]
    return [
        SubClaim("align_over_pool", "RoIAlign beats RoIPool by over 2 points", points, 2.0, gain("mean_iou", "pool")),
        SubClaim(
            "more_when_strict",
            "of the objects, RoIAlign lifts more over an IoU of 0.75 than over 0.5",
            "points of objects",
            0.0,
            strict,
        ),
        SubClaim(
            "rounding_is_the_cause",
            "RoIAlign beats RoIAlign of rounded boxes by over 2 points",
            points,
            2.0,
            gain("mean_iou", "rounded"),
        ),
        SubClaim(
            "sigmoid_over_softmax",
            "on large objects a sigmoid a class beats the softmax over classes by over a point",
            points,
            1.0,
            gain("mean_iou_large", "softmax"),
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    given = options.parse_args(argv)
    if given.data not in (None, "shapes") or given.data_dir is not None:
        options.error("this claim draws its scenes itself: --data and --data-dir are not for it")
    settings = replace(Settings(), **(QUICK if given.quick else {}))
    arm = functools.partial(run_arm, settings)
    return run_seeds("mask_rcnn", STATEMENT, given, settings, ARMS, arm, conclude)


if __name__ == "__main__":
    raise SystemExit(main())
