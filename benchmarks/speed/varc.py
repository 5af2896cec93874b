"""VARC beside the official code: the training step (offline, batch 32; in test-time training, batch 8), and the data.

The batch holds real pairs at random views, as in training: ARC-1's where it is found, else `arc_like`'s.
An epoch of test-time training is (demonstrations x 51) / 8 such steps: `--model varc_vit_18m_ttt --batch 8`.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.environment import ROOT
from benchmarks.speed.harness import Loader, Setting, Trainer, Work, count_flops, forever, revision
from zoo.errors import ZooError

LR = 3e-4
LOADING_BATCH = 32
PACKAGES = ("timm", "diffusers")


@dataclass(frozen=True)
class Size:
    """Our model, the arguments of the official one, and the number of task tokens."""

    zoo: str
    official: dict[str, Any]
    num_tasks: int = 400
    overrides: dict[str, Any] | None = None


_VIT = {"embed_dim": 512, "depth": 10, "num_heads": 8}
_TINY = {"embed_dim": 24, "depth": 1, "num_heads": 3, "mlp_dim": 16}
MODELS = {
    "varc_vit_18m": Size("varc_vit_18m", _VIT),
    "varc_vit_18m_ttt": Size("varc_vit_18m", _VIT, 51),
    "varc_vit_6m": Size("varc_vit_6m", {"embed_dim": 384, "depth": 5, "num_heads": 8}),
    "varc_unet_small": Size("varc_unet_small", {"size": "small"}),
    "varc_unet_big": Size("varc_unet_big", {"size": "big"}),
    "tiny": Size("varc_vit_18m", _TINY, 51, _TINY),  # for the harness's own test
}
DEFAULT_MODEL = "varc_vit_18m"
CANVAS = 64


def _tasks() -> list[Any]:
    from zoo.data.arc import WORLD, read_tasks

    folder = ROOT.parent / "shared" / "data" / "arc_agi_1"
    return read_tasks("arc_agi_1", "training", folder) if folder.is_dir() else read_tasks(WORLD, "training", pairs=4)


def images(setting: Setting) -> Tensor:
    """A batch as one tensor (B, 4, S, S): canvas, mask, target, and the number of the task everywhere in the last."""
    from zoo.data.arc import draw_view, place, pseudo_tasks, stack

    rng, size = random.Random(0), MODELS[setting.model]
    tasks = _tasks()
    if setting.model.endswith("_ttt"):
        pseudos = pseudo_tasks(tasks[0])
        pairs = [(pair, number) for number, pseudo in enumerate(pseudos) for pair in pseudo.task.train]
    else:
        pairs = [(pair, task.index % size.num_tasks) for task in tasks for pair in task.train]
    chosen = [pairs[rng.randrange(len(pairs))] for _ in range(setting.batch)]
    batch = stack([place(pair, CANVAS, draw_view(pair, CANVAS, rng.randint)) for pair, _ in chosen])
    number = torch.tensor([n for _, n in chosen])[:, None, None].expand_as(batch["image"])
    parts = [batch["image"], batch["mask"].long(), batch["target"], number]
    return torch.stack(parts, dim=1).to(setting.device)


def ours(size: Size, setting: Setting) -> Trainer:
    import zoo
    from zoo.training import Optim, make_optimizer, param_groups

    net = zoo.create_model(size.zoo, num_tasks=size.num_tasks, **(size.overrides or {})).to(setting.device).train()

    def loss(images: Tensor) -> Tensor:
        canvas, mask, target, task = images.unbind(1)
        return net.loss(canvas, task[:, 0, 0], mask, target)  # type: ignore[operator]

    declared = Optim(lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    optimizer = make_optimizer(param_groups(net, declared), declared, LR, fused=True)
    about = "zoo.beyond.varc: the loss of the patches that decide it, fused AdamW"
    return Trainer("zoo", zoo.__version__, loss, optimizer, about)


@contextlib.contextmanager
def _importing(checkout: Path) -> Iterator[None]:
    """The checkout first on the path; its `src` and `utils` are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("src", "utils"):
                del sys.modules[name]


def official(size: Size, setting: Setting) -> Trainer:
    assert setting.official is not None
    with _importing(setting.official), contextlib.redirect_stdout(None):
        if "size" in size.official:
            kind = importlib.import_module("src.ARC_UNet").ARCUNet
        else:
            kind = importlib.import_module("src.ARC_ViT").ARCViT
        net = kind(num_tasks=size.num_tasks, image_size=CANVAS, num_colors=12, **size.official)
    net.to(setting.device).train()

    def loss(images: Tensor) -> Tensor:
        canvas, mask, target, task = images.unbind(1)
        logits = net(canvas, task[:, 0, 0], attention_mask=mask)
        flat = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
        return cross_entropy(flat, target.reshape(-1), ignore_index=10)

    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    about = "the official network and loss as its training scripts call them (without their accuracy bookkeeping)"
    return Trainer("official", revision(setting.official), loss, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Ours first, then the official one where its checkout is given."""
    size = MODELS[setting.model]
    return [ours(size, setting), *([official(size, setting)] if setting.official is not None else [])]


def work(setting: Setting) -> Work:
    """Images, and the FLOPs of the whole network, all patches of the canvas in the sequence."""
    import zoo
    from zoo.beyond.varc import pixel_loss

    size = MODELS[setting.model]
    with torch.device("meta"):
        net = zoo.create_model(size.zoo, num_tasks=size.num_tasks, **(size.overrides or {}))
        canvas = torch.zeros(setting.batch, CANVAS, CANVAS, dtype=torch.long)
        task = torch.zeros(setting.batch, dtype=torch.long)
        flops = count_flops(lambda: pixel_loss(net(canvas, task), canvas))
    return Work(setting.batch, 0, flops, {"canvas": CANVAS, "flops": "of the whole canvas"})


def _zoo_loader(folder: Path, batch: int) -> Loader:
    import zoo
    from zoo.data import ARCDataModule

    module = ARCDataModule(str(folder), image_size=CANVAS, batch_size=batch, seed=0, num_workers=0)
    about = "ARCDataModule: scale, place and stack"
    return Loader("zoo", zoo.__version__, forever(module.train_dataloader(), lambda b: b["image"]), about)


def _official_loader(folder: Path, batch: int, checkout: Path) -> Loader:
    with _importing(checkout), contextlib.redirect_stdout(None):
        module = importlib.import_module("src.ARC_loader")
        data = module.ARCDataset(folder, "training", subset="train", max_size=CANVAS)
        loader = DataLoader(data, batch_size=batch, shuffle=True, collate_fn=module.collate_fn, drop_last=True)
    about = "ARCDataset and its collate_fn"
    return Loader("official", revision(checkout), forever(loader, lambda b: b["inputs"]), about)


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """From the tasks in memory to batches of canvases, in this process (no workers), ours first."""
    import json
    import tempfile

    def plain(pairs: Any) -> list[dict[str, Any]]:
        return [{"input": pair.input.tolist(), "output": pair.output.tolist()} for pair in pairs]

    if setting.official is None:
        raise ZooError("the data pipelines are compared with the official one: give --official, or --only step")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "data" / "training"
        place.mkdir(parents=True)
        for task in _tasks():
            content = {"train": plain(task.train), "test": plain(task.test)}
            (place / f"{task.name}.json").write_text(json.dumps(content))
        made = [
            _zoo_loader(Path(folder), LOADING_BATCH),
            _official_loader(Path(folder), LOADING_BATCH, setting.official),
        ]
        yield made, Work(LOADING_BATCH, detail={"title": f"tasks to canvases of {CANVAS}, batch {LOADING_BATCH}"})
