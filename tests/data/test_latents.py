"""Latents kept on disk: what is written is what the autoencoder says, and the module that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from zoo.command.cli import main
from zoo.data import ImageDataModule, LatentDataModule
from zoo.data.latents import cache_latents
from zoo.data.transforms import ADMCrop
from zoo.errors import ZooError
from zoo.metrics.generation import RandomFeatures, Statistics
from zoo.nn.autoencoder import AutoencoderKL, load_autoencoder

COUNT, SIZE = 10, 16


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("autoencoder") / "tiny.pth"
    torch.save(AutoencoderKL(width=32, channel_mult=(1, 1), depth=1).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes of pictures of unequal sides; one split."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.RandomState(0)
    for n in range(COUNT):
        folder = root / "ab"[n % 2]
        folder.mkdir(exist_ok=True)
        pixels = draw.randint(0, 256, (20 + n, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:02d}.png")
    return str(root)


@pytest.fixture(scope="module")
def latents(autoencoder: str, pictures: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "set"
    cache_latents(pictures, out, autoencoder, SIZE, splits=("train", "val"), batch_size=4, shard_size=4)
    return out


def test_the_folder_holds_the_moments_of_both_views(latents: Path, autoencoder: str, pictures: str) -> None:
    facts = json.loads((latents / "latents.json").read_text())
    assert (facts["shape"], facts["views"], facts["splits"]) == ([4, 8, 8], 2, {"train": 9, "val": 1})
    assert (facts["scale"], facts["num_classes"], facts["class_names"]) == (0.18215, 2, ["a", "b"])
    names = ["latents.json", *(f"train-0000{n}.safetensors" for n in range(3)), "val-00000.safetensors"]
    assert sorted(path.name for path in latents.iterdir() if path.suffix != ".lock") == sorted(names)
    stored = [load_file(latents / f"train-0000{n}.safetensors") for n in range(3)]
    mean, std, label = (torch.cat([shard[name] for shard in stored]) for name in ("mean", "std", "label"))
    assert mean.shape == std.shape == (9, 2, 4, 8, 8)

    half = [0.5] * 3
    data = ImageDataModule(pictures, image_size=SIZE, eval_transform=ADMCrop(), mean=half, std=half)
    batch = data.samples("train", train_transform=False).__getitems__(range(9))
    net = load_autoencoder(autoencoder)
    assert torch.equal(label, batch["label"])
    for view, images in enumerate((batch["image"], batch["image"].flip(-1))):
        wanted = net.encode(images)
        torch.testing.assert_close((mean[:, view], std[:, view]), wanted, rtol=1e-4, atol=1e-5)


def _batches(module: LatentDataModule, epoch: int = 0) -> dict[str, Tensor]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_latents_are_drawn_afresh_and_scaled(latents: Path) -> None:
    module = LatentDataModule(str(latents), batch_size=3, num_workers=0, seed=1)
    assert (module.image_size, module.num_classes, module.class_names) == (8, 2, ["a", "b"])
    first, again, later = _batches(module), _batches(module), _batches(module, epoch=1)
    assert first["image"].shape == (9, 4, 8, 8)
    assert sorted(first["index"].tolist()) == list(range(9))
    assert torch.equal(first["image"], again["image"])
    shards = [load_file(latents / f"train-0000{n}.safetensors") for n in range(3)]
    moments = {name: torch.cat([shard[name] for shard in shards]) for name in ("mean", "std", "label")}
    assert torch.equal(first["label"], moments["label"][first["index"]])
    seen: set[int] = set()
    draws = []
    for batch in (first, later):
        for latent, index in zip(batch["image"], batch["index"].tolist(), strict=True):
            noises = [(latent / 0.18215 - moments["mean"][index, v]) / moments["std"][index, v] for v in (0, 1)]
            view = int(noises[1].square().mean() < noises[0].square().mean())
            seen.add(view)
            draws.append(noises[view])
    noise = torch.stack(draws)
    assert seen == {0, 1}
    assert abs(noise.mean()) < 0.1
    assert noise.std().item() == pytest.approx(1, abs=0.1)


def test_evaluation_takes_each_once_without_mirroring(latents: Path) -> None:
    module = LatentDataModule(str(latents), batch_size=2, num_workers=0, seed=1, train_samples=5)
    assert len(_batches(module)["index"]) == 4  # whole batches
    held = load_file(latents / "val-00000.safetensors")
    for split, count in (("val", 1), ("test", 9), ("predict", 9)):  # there is no test split: the training one
        loader: Any = getattr(module, f"{split}_dataloader")()
        batches = list(loader)
        assert sum(len(batch["index"]) for batch in batches) == count
        if split == "val":
            noise = (batches[0]["image"][0] / 0.18215 - held["mean"][0, 0]) / held["std"][0, 0]
            assert noise.std().item() == pytest.approx(1, abs=0.15)


def test_a_stopped_call_goes_on_and_shares_fit_together(
    latents: Path, autoencoder: str, pictures: str, tmp_path: Path
) -> None:
    for part in ((1, 2), (0, 2)):
        cache_latents(pictures, tmp_path, autoencoder, SIZE, batch_size=4, shard_size=4, part=part)
        if part[0]:
            with pytest.raises(ZooError, match=r"2 of 3 shards are missing .*goes on where it stopped"):
                LatentDataModule(str(tmp_path)).train_dataloader()
    cache_latents(pictures, tmp_path, autoencoder, SIZE, splits=["val"], batch_size=4, shard_size=4)
    for path in latents.glob("*.safetensors"):
        whole, shared = load_file(path), load_file(tmp_path / path.name)
        for name in whole:
            torch.testing.assert_close(shared[name], whole[name])
    with pytest.raises(ZooError, match="holds other latents: image_size is 16 there and 32 here"):
        cache_latents(pictures, tmp_path, autoencoder, 32, batch_size=4, shard_size=4)


def test_from_the_command_line(
    autoencoder: str, pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [pictures, "--image_size", "16", "--batch_size", "5"]
    words = ["data", "latents", *common, "--autoencoder", autoencoder, "-o", str(tmp_path / "set"), "--no_mirror"]
    assert main([*words, "--dtype", "float16"]) == 0
    assert "latents 4x8x8, 9 of train" in capsys.readouterr().out
    assert load_file(tmp_path / "set" / "train-00000.safetensors")["mean"].dtype == torch.float16
    module = LatentDataModule(str(tmp_path / "set"), mirrored=False, num_workers=0)
    assert next(iter(module.train_dataloader()))["image"].dtype == torch.float32
    assert main([*words[:-1], "--part", "3"]) == 2
    assert "--part is K/N" in capsys.readouterr().err
    stats = tmp_path / "stats.npz"
    assert main(["data", "stats", *common, "--extractor", "random", "-o", str(stats), "--features"]) == 0
    found = Statistics.read(stats)
    assert found.features is not None
    half = [0.5] * 3
    data = ImageDataModule(pictures, image_size=SIZE, eval_transform=ADMCrop(), mean=half, std=half)
    batch = data.samples("train", train_transform=False).__getitems__(range(9))
    wanted, _ = RandomFeatures()(((batch["image"] + 1) * 127.5).round().to(torch.uint8))
    torch.testing.assert_close(found.features, wanted, rtol=1e-4, atol=1e-5)


def test_mistakes_are_told(latents: Path, autoencoder: str, pictures: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="is no folder of latents"):
        LatentDataModule(str(tmp_path))
    early = LatentDataModule(str(tmp_path / "later"), image_size=8, num_classes=2)  # a recipe before its latents
    assert (early.image_size, early.num_classes) == (8, 2)
    with pytest.raises(ZooError, match="is no folder of latents"):
        early.train_dataloader()
    with pytest.raises(ZooError, match="num_classes of the latents is 2, not 10"):
        LatentDataModule(str(latents), num_classes=10)
    with pytest.raises(ZooError, match=r"data.train_samples must be at least 1"):
        LatentDataModule(str(latents), train_samples=0)
    with pytest.raises(ZooError, match="train_samples is 99"):
        LatentDataModule(str(latents), train_samples=99).train_dataloader()
    cache_latents(pictures, tmp_path / "plain", autoencoder, SIZE, mirrored=False)
    with pytest.raises(ZooError, match="holds no mirror images"):
        LatentDataModule(str(tmp_path / "plain"))
    broken = tmp_path / "plain" / "train-00000.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.raises(ZooError, match="not a whole shard"):
        next(iter(LatentDataModule(str(tmp_path / "plain"), mirrored=False, num_workers=0).train_dataloader()))
    for options, told in (
        ({"dtype": "int8"}, "not 'int8'"),
        ({"part": (2, 2)}, "part 2/2"),
        ({"splits": ["x"]}, "'x'"),
    ):
        with pytest.raises(ZooError, match=told):
            cache_latents(pictures, tmp_path / "other", autoencoder, SIZE, **options)


# ----------------------------------------------------------------------------------------------------------- ADM's crop


def test_the_crop_is_adms() -> None:
    """Against Pillow step by step: halved once by a box, then bicubic, then the middle."""
    image = torch.randint(0, 256, (3, 70, 101), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    halved = picture.resize((50, 35), Image.Resampling.BOX)
    resized = np.asarray(halved.resize((round(50 * 32 / 35), 32), Image.Resampling.BICUBIC))
    wanted = resized[:, 7 : 7 + 32]
    assert np.array_equal(ADMCrop(32)(image).permute(1, 2, 0).numpy(), wanted)
    small = image[:, :20, :20]
    assert ADMCrop(32)(small).shape == (3, 32, 32)
    assert torch.equal(ADMCrop(20)(small), small)
    assert torch.equal(ADMCrop(20, flip=1.0)(small), small.flip(-1))
    assert (ADMCrop(20).random, ADMCrop(20, flip=0.5).random) == (False, True)
    with pytest.raises(ZooError, match="chance of a flip"):
        ADMCrop(flip=2)
