"""Runs of a few steps of every kind of task, for the tests of what is done with runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from zoo.command.cli import main

_MADE: dict[str, Path] = {}
_SMALL = {
    "preact_resnet/pocket": ["--model.depths=[1,1,1]", "--model.widths=[4,8,8]", "--data.image_size=16"],
    "mae/pocket": [
        *("--model.embed_dim=16", "--model.depth=1", "--model.num_heads=2", "--data.image_size=32"),
        *("--model.decoder_embed_dim=16", "--model.decoder_depth=1", "--model.decoder_num_heads=2"),
    ],
    "moco/pocket": ["--model.width=4", "--model.queue_size=8", "--model.bn_splits=2", "--data.image_size=16"],
    "mask_rcnn/pocket": [
        *("--data.options.size=64", "--model.resnet.channels=8", "--model.fpn.channels=8", "--model.mask.channels=8"),
        *("--model.box.fc_channels=8", "--model.roi.detections=3"),
    ],
    "slowfast/pocket": ["--model.width=8", "--data.num_frames=4", "--model.num_frames=4", "--model.alpha=2"],
    "flip/pocket": ["--model.embed_dim=16", "--model.depth=1", "--model.text_depth=1", "--data.image_size=32"],
    "meanflow/pocket": [
        *("--model.embed_dim=16", "--model.depth=1", "--model.num_heads=2", "--data.image_size=16"),
        "--trainer.callbacks=[{class_path: zoo.training.EMA, init_args: {decay: 0.5}}]",
    ],
    "varc/pocket": [
        *("--model.embed_dim=16", "--model.depth=1", "--model.num_heads=2", "--model.mlp_dim=16"),
        *("--data.options={tasks: 2, pairs: 4, max_side: 5}", "--data.image_size=14"),
    ],
}


def fit(recipe: str) -> None:
    """Two steps of a recipe made small, under ``runs/`` here."""
    words = [
        "--data.batch_size=4",
        "--data.eval_batch_size=4",
        "--data.num_workers=0",
        "--model.optim.global_batch=null",
    ]
    words += ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    words += ["--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    words += ["--trainer.check_val_every_n_epoch=1", "--trainer.precision=32-true", "--trainer.logger=false"]
    if not recipe.startswith("varc"):
        words.append("--data.train_samples=8")
    if "--trainer.callbacks" not in " ".join(_SMALL[recipe]):
        words.append("--trainer.callbacks=[]")
    assert main(["fit", recipe, *words, *_SMALL[recipe]]) == 0


def folder_with(tmp_path_factory: pytest.TempPathFactory, *recipes: str) -> Iterator[Path]:
    """A folder, the working one as long as the tests of a module run, with a run of each recipe under ``runs/``."""
    place = tmp_path_factory.mktemp("runs_of_all")
    for recipe in recipes:
        if recipe not in _MADE:  # by another module's tests
            _MADE[recipe] = tmp_path_factory.mktemp("run")
            with chdir(_MADE[recipe]):
                fit(recipe)
        shutil.copytree(_MADE[recipe] / "runs", place / "runs", dirs_exist_ok=True)
    with chdir(place):
        yield place
