"""What a pre-training is worth, on one's own folder, by one option: nearest neighbours, a linear probe, fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import write_png

import zoo
from zoo import catalog
from zoo.errors import ZooError
from zoo.weights.files import read_checkpoint

PAPERS = ("mae", "diffmae", "moco", "moco_v2", "moco_v3", "simsiam", "asym_siam")
SIZES = ("arch", "layers", "width", "small_images", "patch_size", "embed_dim", "depth", "num_heads", "stem")
QUIET: dict[str, Any] = {
    **{"trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.logger": False, "trainer.max_steps": 1},
    **{"trainer.enable_checkpointing": False, "trainer.enable_progress_bar": False, "trainer.precision": "32-true"},
    **{"data.num_workers": 0, "data.batch_size": 8, "model.optim.global_batch": 8},
}

NEIGHBOURS = {"trainer.callbacks": [{"class_path": "zoo.training.KNNProbe"}]}


def _folder(path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 3)):
        for kind in ("bright", "dark"):
            (path / split / kind).mkdir(parents=True)
            for k in range(count):
                picture = torch.randint(0, 100, (3, 40, 40), generator=draw, dtype=torch.uint8)
                write_png(picture + 150 * (kind == "bright"), str(path / split / kind / f"{k}.png"))
    return path


def _save(task: Any, trainer: Any, path: Path) -> None:
    task.trainer = trainer
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_pre_training_is_judged_on_a_folder(paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = {"data.dataset": str(_folder(tmp_path / "pictures")), **QUIET}
    task, data, trainer = zoo.load_recipe(f"{paper}/pocket", {**folder, **NEIGHBOURS, "data.train_samples": None})
    _save(task, trainer, tmp_path / "last.ckpt")
    (neighbours,) = trainer.test(task, datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert neighbours["knn_top1"] > 0.6

    options = read_checkpoint(tmp_path / "last.ckpt")["hyper_parameters"]
    sizes = {f"model.{name}": options[name] for name in SIZES if name in options}
    start = {**folder, "model.init_from": str(tmp_path / "last.ckpt"), "data.image_size": data.image_size}
    kinds = [name for name in catalog.list_recipes(f"{paper}/*") if "/linprobe" in name or "/finetune" in name]
    for name in (name for name in kinds if "resnet" not in name):
        task, data, trainer = zoo.load_recipe(name, {**start, **sizes})
        assert task.num_classes == 2
        trainer.fit(task, datamodule=data)
        (found,) = trainer.test(task, datamodule=data, verbose=False)
        assert 0 <= found["test/top1"] <= 1
    assert any("linprobe" in name for name in kinds)


def test_a_checkpoint_of_other_sizes_tells_its_own(tmp_path: Path) -> None:
    task, _, trainer = zoo.load_recipe("simsiam/pocket", QUIET)
    _save(task, trainer, tmp_path / "last.ckpt")
    probe = zoo.load_recipe("simsiam/linprobe_imagenet1k", {**QUIET, "model.init_from": str(tmp_path / "last.ckpt")})[0]
    with pytest.raises(
        ZooError, match=r"trained with model.arch resnet18, model.layers \[1, 1, 1, 1\], model.width \d+"
    ):
        probe.setup("fit")
