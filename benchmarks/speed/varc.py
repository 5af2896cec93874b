"""VARC beside the official code: the training step (offline, batch 32; in test-time training, batch 8), and the data.

The batch holds real pairs at random views, as in training: ARC-1's where it is found, else `arc_like`'s.
An epoch of test-time training is (demonstrations x 51) / 8 such steps: `--model varc_vit_18m_ttt --batch 8`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.environment import ROOT
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from zoo.beyond.varc import pixel_loss
from zoo.data.arc import WORLD, draw_view, place, pseudo_tasks, read_tasks, stack
from zoo.errors import ZooError

LR, CANVAS, LOADING_BATCH = 3e-4, 64, 32
PACKAGES = ("timm", "diffusers")


@dataclass(frozen=True)
class Size:
    """A recipe's network, the arguments of the official one, and the number of task tokens."""

    recipe: str
    network: dict[str, Any]
    official: dict[str, Any]
    num_tasks: int = 400

    @property
    def options(self) -> dict[str, Any]:
        own = {f"model.{name}": value for name, value in self.network.items()}
        return {**own, "model.num_tasks": self.num_tasks, "model.compile": False, "data.image_size": CANVAS}


def _vit(num_tasks: int = 400, **sizes: int) -> Size:
    return Size("varc/offline_vit_arc_agi_1", sizes, sizes, num_tasks)


def _unet(size: str, **sizes: Any) -> Size:
    return Size("varc/offline_unet_arc_agi_1", sizes, {"size": size})


MODELS = {
    "varc_vit_18m": _vit(embed_dim=512, depth=10, num_heads=8),
    "varc_vit_18m_ttt": _vit(51, embed_dim=512, depth=10, num_heads=8),
    "varc_vit_6m": _vit(embed_dim=384, depth=5, num_heads=8),
    "varc_unet_small": _unet("small", embed_dim=160, depth=1, num_heads=4, mid_block=False),
    "varc_unet_big": _unet("big", embed_dim=320, depth=2, num_heads=8, mid_block=True),
    "tiny": _vit(51, embed_dim=24, depth=1, num_heads=3, mlp_dim=16),  # for the harness's own test
}
DEFAULT_MODEL = "varc_vit_18m"


def _tasks() -> list[Any]:
    folder = ROOT.parent / "shared" / "data" / "arc_agi_1"
    return read_tasks("arc_agi_1", "training", folder) if folder.is_dir() else read_tasks(WORLD, "training", pairs=4)


def images(setting: Setting) -> Tensor:
    """A batch as one tensor (B, 4, S, S): canvas, mask, target, and the number of the task everywhere in the last."""
    rng, size, tasks = random.Random(0), MODELS[setting.model], _tasks()
    if setting.model.endswith("_ttt"):
        pseudos = pseudo_tasks(tasks[0])
        pairs = [(pair, number) for number, pseudo in enumerate(pseudos) for pair in pseudo.task.train]
    else:
        pairs = [(pair, task.index % size.num_tasks) for task in tasks for pair in task.train]
    chosen = [pairs[rng.randrange(len(pairs))] for _ in range(setting.batch)]
    batch = stack([place(pair, CANVAS, draw_view(pair, CANVAS, rng.randint)) for pair, _ in chosen])
    number = torch.tensor([n for _, n in chosen])[:, None, None].expand_as(batch["image"])
    return torch.stack([batch["image"], batch["mask"].long(), batch["target"], number], dim=1).to(setting.device)


def _batch(images: Tensor) -> dict[str, Tensor]:
    canvas, mask, target, task = images.unbind(1)
    return {"image": canvas, "mask": mask, "target": target, "task": task[:, 0, 0]}


def official(size: Size, setting: Setting) -> Trainer:
    assert setting.official is not None
    module, kind = ("src.ARC_UNet", "ARCUNet") if "size" in size.official else ("src.ARC_ViT", "ARCViT")
    with contextlib.redirect_stdout(None):
        made = getattr(harness.import_from(setting.official, module), kind)
        net = made(num_tasks=size.num_tasks, image_size=CANVAS, num_colors=12, **size.official)
    net.to(setting.device).train()

    def loss(images: Tensor) -> Tensor:
        batch = _batch(images)
        logits = net(batch["image"], batch["task"], attention_mask=batch["mask"])
        flat = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
        return cross_entropy(flat, batch["target"].reshape(-1), ignore_index=10)

    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    about = "the official network and loss as its training scripts call them (without their accuracy bookkeeping)"
    return Trainer("official", harness.revision(setting.official), loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Ours first, then the official one where its checkout is given."""
    size = MODELS[setting.model]
    ours = harness.from_recipe(size.recipe, size.options, _batch, setting)
    return [ours, *([official(size, setting)] if setting.official is not None else [])]


def work(setting: Setting) -> Work:
    """Images, and the FLOPs of the whole network, all patches of the canvas in the sequence."""
    size = MODELS[setting.model]
    net = harness.recipe_task(size.recipe, size.options, "meta").network
    with torch.device("meta"):
        canvas = torch.zeros(setting.batch, CANVAS, CANVAS, dtype=torch.long)
        task = torch.zeros(setting.batch, dtype=torch.long)
        flops = harness.count_flops(lambda: pixel_loss(net(canvas, task), canvas))
    return Work(setting.batch, 0, flops, {"canvas": CANVAS, "flops": "of the whole canvas"})


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """From the tasks in memory to batches of canvases, in this process (no workers), ours first."""
    if setting.official is None:
        raise ZooError("the data pipelines are compared with the official one: give --official, or --only step")
    size, checkout, batch = MODELS[DEFAULT_MODEL], setting.official, LOADING_BATCH
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "data" / "training"
        written.mkdir(parents=True)
        for task in _tasks():
            content = {
                part: [{"input": pair.input.tolist(), "output": pair.output.tolist()} for pair in pairs]
                for part, pairs in (("train", task.train), ("test", task.test))
            }
            (written / f"{task.name}.json").write_text(json.dumps(content))
        found = [harness.data_from_recipe(size.recipe, {}, Path(folder), batch, how="scale, place and stack")]
        with harness.importing(checkout, "src.ARC_loader"), contextlib.redirect_stdout(None):
            module = importlib.import_module("src.ARC_loader")
            data = module.ARCDataset(Path(folder), "training", subset="train", max_size=CANVAS)
        common = {"about": "ARCDataset and its collate_fn", "collate_fn": module.collate_fn}
        found.append(harness.peer_loader("official", checkout, data, batch, image=lambda b: b["inputs"], **common))
        yield found, Work(batch, detail={"title": f"tasks to canvases of {CANVAS}, batch {batch}"})
