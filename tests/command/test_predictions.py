"""`zoo predict RECIPE`: a row a sample from all processes, in order, with its index and file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.processes import in_processes
from zoo.command.cli import main
from zoo.command.predictions import _rows

SMALL = [
    *["--model.embed_dim", "16", "--model.depth", "1", "--model.num_heads", "2", "--trainer.precision", "32-true"],
    *["--model.decoder_embed_dim", "16", "--model.decoder_depth", "1", "--model.decoder_num_heads", "2"],
    *["--data.eval_batch_size", "2", "--data.image_size", "64", "--trainer.accelerator", "cpu"],
]


def _predict(world: int, folder: str) -> int:
    several = ["--trainer.devices", str(world), "--trainer.strategy", "ddp"] if world > 1 else []
    return main(["predict", "mae/pocket", *SMALL, "--data.dataset", folder, *several])


def test_processes_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    draw = np.random.default_rng(0)
    for n in range(7):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photos / f"{n}.png")
    found = {}
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        monkeypatch.chdir(tmp_path / str(world))
        if world == 1:
            assert _predict(world, str(photos)) == 0
        else:
            monkeypatch.setenv("ZOO_RUN_DIR", str(tmp_path / "2" / "runs"))  # as the first process hands it on
            assert in_processes(world, _predict, world, str(photos)) == [0, 0]
        (path,) = Path().rglob("predictions.pt")
        found[world] = torch.load(path, weights_only=True)
        assert list(Path().rglob("pictures/*.png"))
    for rows in found.values():
        assert [row["index"] for row in rows] == list(range(7))
        assert [Path(row["file"]).name for row in rows] == [f"{n}.png" for n in range(7)]
    for one, two in zip(found[1], found[2], strict=True):
        assert one["file"] == two["file"]
        for name in ("masked", "reconstruction"):
            torch.testing.assert_close(two[name], one[name])
        assert one["reconstruction"].shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("outputs", "rows"),
    [
        (torch.tensor([1, 2]), [{"prediction": torch.tensor(1)}, {"prediction": torch.tensor(2)}]),
        ({"a": torch.tensor([1, 2]), "b": 3}, [{"a": torch.tensor(1), "b": 3}, {"a": torch.tensor(2), "b": 3}]),
        ([{"a": np.float32(1)}, {"a": (1, 2)}], [{"a": 1.0}, {"a": [1, 2]}]),
        (["x", None], [{"prediction": "x"}, {"prediction": None}]),
    ],
)
def test_rows_of_a_batch(outputs: Any, rows: Any) -> None:
    assert _rows(outputs, 2) == rows
