"""Sources, transforms, samplers, the resumable loader and the data module."""

from __future__ import annotations

import gzip
import math
import random
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from zoo.data import transforms as T
from zoo.data.datamodule import ImageDataModule, SampleSet
from zoo.data.loader import EpochSampler, ExactSampler, TrainLoader
from zoo.data.sources import decode_image, describe, open_source
from zoo.errors import ZooError

SHARED = Path(__file__).parents[2] / "../shared/data"


def shared(name: str) -> str:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the real data folder ../shared/data/{name} is not here")
    return str(SHARED / name)


def picture(value: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    pixels[0, 0] = 255 - value
    return Image.fromarray(pixels)


def image_folder(root: Path, classes: dict[str, int], ending: str = "png") -> Path:
    for k, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(20 * k + i).save(root / name / f"{i:03}.{ending}")
    return root


# -------------------------------------------------------------------------------------------------------------- sources


def test_image_folder_with_splits(tmp_path):
    image_folder(tmp_path / "train", {"cat": 5, "dog": 4})
    image_folder(tmp_path / "val", {"cat": 2, "dog": 1})
    about = describe(str(tmp_path))
    assert (about.num_classes, about.class_names, about.image_size) == (2, ["cat", "dog"], 224)
    train, val, test = (open_source(str(tmp_path), split) for split in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [9, 3, 3]  # no test split: the validation split serves
    sample = train[5]
    assert sample["label"] == 1
    assert sample["image"].shape == (3, 10, 12)
    assert sample["image"].dtype == torch.uint8
    assert sample["image"][0, 5, 5] == 20


def test_a_folder_without_splits_holds_out_every_tenth(tmp_path):
    image_folder(tmp_path, {"a": 12, "b": 13})
    train, val, test, everything = (open_source(str(tmp_path), s) for s in ("train", "val", "test", "predict"))
    assert [len(train), len(val), len(test), len(everything)] == [23, 2, 2, 25]
    kept = {train[i]["image"][0, 5, 5].item() for i in range(23)}
    held = {val[i]["image"][0, 5, 5].item() for i in range(2)}
    assert len(kept) == 23
    assert not kept & held


def test_a_folder_of_loose_pictures_is_unlabelled(tmp_path):
    for k, ending in enumerate(("png", "jpg", "bmp", "webp")):
        picture(60 * k).save(tmp_path / f"{k}.{ending}")
    data = ImageDataModule(str(tmp_path), batch_size=4, image_size=8, num_workers=0)
    assert data.num_classes == 0
    batch = next(iter(data.predict_dataloader()))
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["label"].tolist() == [-1] * 4


@pytest.mark.parametrize("saved_as", ["dict", "single", "parquet"])
def test_datasets_on_disk(tmp_path, saved_as):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"pic": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y", "z"])})

    def part(count):
        return datasets.Dataset.from_dict(
            {"pic": [picture(i) for i in range(count)], "kind": [i % 3 for i in range(count)]}, features=features
        )

    if saved_as == "dict":
        datasets.DatasetDict({"train": part(20), "validation": part(5)}).save_to_disk(tmp_path / "set")
    elif saved_as == "single":
        part(20).save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        part(20).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
        part(5).to_parquet(tmp_path / "set" / "validation-00000-of-00001.parquet")
    where = str(tmp_path / "set")
    assert describe(where).class_names == ["x", "y", "z"]
    train, val = open_source(where, "train"), open_source(where, "val")
    assert (len(train), len(val)) == ((18, 2) if saved_as == "single" else (20, 5))
    assert train[7]["label"] == 1
    assert train[7]["image"][0, 5, 5] == 7
    with pytest.raises(ZooError, match="pic"):
        open_source(where, "train", image_column="image")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_idx_files(tmp_path):
    images = np.arange(6 * 28 * 28, dtype=np.uint8).reshape(6, 28, 28)
    for stem, count in (("train", 6), ("t10k", 3)):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images[:count])
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    data = ImageDataModule("fashion_mnist", data_dir=str(tmp_path), batch_size=3)
    assert data.num_workers == 0
    assert data.class_names[1] == "Trouser"
    assert [len(data.source(s)) for s in ("train", "val", "test")] == [6, 3, 3]
    assert torch.equal(data.source("train")[4]["image"], torch.from_numpy(images[4]).expand(3, -1, -1))
    batch = next(iter(data.val_dataloader()))
    expected = (torch.from_numpy(images[:3]).float() / 255 - 0.2860) / 0.3530
    assert torch.allclose(batch["image"], expected[:, None].expand(-1, 3, -1, -1), atol=1e-5)

    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-5]))
    with pytest.raises(ZooError, match="damaged"):
        open_source("fashion_mnist", "train", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "sizes", "image_size"),
    [("cifar10", (50_000, 10_000), 32), ("fashion_mnist", (700, 200), 28), ("imagenet_sample", (900, 100), 224)],
)
def test_real_folders(name, sizes, image_size):
    data = ImageDataModule(name, data_dir=shared(name), batch_size=16, num_workers=0)
    assert (len(data.source("train")), len(data.source("val"))) == sizes
    few = ImageDataModule(name, data_dir=shared(name), batch_size=16, num_workers=0, train_samples=64)
    batch = next(iter(few.train_dataloader()))
    assert batch["image"].shape == (16, 3, image_size, image_size)
    assert batch["image"].mean().abs() < 1
    assert 0.4 < batch["image"].std() < 2


def test_wrong_names_and_folders_are_named(tmp_path):
    image_folder(tmp_path / "photos", {"a": 2})
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("shapez",), "'shapes'"),
        (("cifar12",), "'cifar10'"),
        ((str(tmp_path / "photo"),), "photos"),
        ((str(tmp_path / "empty"),), "no known layout"),
        (("cifar10", str(tmp_path / "photos")), "1 classes, cifar10 has 10"),
        (("imagenet_sample",), "data_dir"),
    ):
        with pytest.raises(ZooError, match=message):
            describe(*arguments) if len(arguments) == 2 else open_source(*arguments)
    with pytest.raises(ZooError, match="image_column"):
        describe(str(tmp_path / "photos"), image_colum="x")
    with pytest.raises(ZooError, match="batch_size"):
        ImageDataModule(batch_size=0)


def test_a_damaged_picture_is_named(tmp_path):
    image_folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "000.png").write_bytes(b"not a picture")
    with pytest.raises(ZooError, match=r"000\.png"):
        open_source(str(tmp_path), "predict")[0]
    with pytest.raises(ZooError, match="cannot read"):
        decode_image(b"")


# ----------------------------------------------------------------------------------------------------------- transforms


@given(
    height=st.integers(8, 300),
    width=st.integers(8, 300),
    low=st.floats(0.05, 0.9),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=40, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_crops_lie_in_the_picture(height, width, low, draws):
    ratio = (3 / 4, 4 / 3)
    rows = [draws[k : k + 4] for k in range(0, 40, 4)]
    for i, j, h, w in (
        T.random_resized_crop_params(height, width, (low, 1), ratio, rows),
        T.one_draw_crop_params(height, width, (low, 1), ratio, rows[0]),
    ):
        assert min(h, w) >= 1
        assert 0 <= i <= height - h
        assert 0 <= j <= width - w


def test_one_draw_crop_by_hand():
    # A quarter of 64 x 97 at ratio 1: a square of round(sqrt(1552)) = 39; top 0.5 * 26 = 13, left int(0.99 * 59) = 58.
    share = (0.25 - 0.08) / 0.92
    assert T.one_draw_crop_params(64, 97, (0.08, 1), (3 / 4, 4 / 3), (share, 0.5, 0.5, 0.99)) == (13, 58, 39, 39)
    # clamped, not redrawn, where the box does not fit
    assert T.one_draw_crop_params(20, 100, (0.08, 1), (3 / 4, 4 / 3), (0.9, 0.5, 0.0, 0.0))[2] == 20


def test_random_resized_crop_follows_torchvisions_law():
    generator = torch.Generator().manual_seed(0)
    ours = [
        T.random_resized_crop_params(90, 120, (0.2, 1), (3 / 4, 4 / 3), torch.rand(10, 4, generator=generator).tolist())
        for _ in range(3000)
    ]
    torch.manual_seed(0)
    from torchvision.transforms import RandomResizedCrop

    theirs = [RandomResizedCrop.get_params(torch.empty(3, 90, 120), (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]
    a, b = torch.tensor(ours).double(), torch.tensor(theirs).double()
    assert torch.allclose(a.mean(0), b.mean(0), atol=1.5)
    assert torch.allclose(a.std(0), b.std(0), atol=1.5)


def smooth(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    waves = torch.stack([y.sin(), x.cos(), (x + y).sin()])
    return ((waves + 1) * 127).to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(80, 120), (120, 80), (64, 64), (30, 50)])
def test_eval_crop_is_resize_and_center_crop(height, width):
    image = smooth(height, width)
    ours = T.EvalResizeCrop(56)(image)
    pil = v2.CenterCrop(56)(v2.Resize(64, v2.InterpolationMode.BICUBIC)(v2.functional.to_pil_image(image)))
    assert ours.shape == (3, 56, 56)
    assert (ours.int() - v2.functional.pil_to_tensor(pil).int()).abs().max() <= 2


def test_eval_crop_modes():
    image = torch.full((3, 40, 80), 200, dtype=torch.uint8)
    assert T.EvalResizeCrop(32, 1.0, crop_mode="squash")(image).shape == (3, 32, 32)
    border = T.EvalResizeCrop(32, 1.0, crop_mode="border")(image)
    assert border.shape == (3, 32, 32)
    assert border[:, 16, 16].tolist() == [200] * 3
    assert border[:, 0, 0].tolist() == [round(255 * m) for m in T.IMAGENET_MEAN]
    with pytest.raises(ZooError, match="'center'"):
        T.EvalResizeCrop(32, crop_mode="centre")
    with pytest.raises(ZooError, match="bicubic"):
        T.MAEPretrain(32, interpolation="bicubc")


@pytest.mark.parametrize(
    "transform",
    [T.MAEPretrain(), T.LinearProbeTrain(), T.FineTuneTrain(random_erase=1.0), v2.RandomHorizontalFlip()],
    ids=lambda t: type(t).__name__,
)
def test_randomness_is_the_samples_own(transform):
    data = ImageDataModule(batch_size=8, image_size=32, train_transform=transform, train_samples=64, seed=5)
    samples = data.samples("train")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    together = samples.__getitems__([(k, 2, 0) for k in range(10)])
    assert (torch.rand(1), random.random(), np.random.rand()) == before  # training's generators did not move
    alone = samples[(7, 2, 0)]
    assert torch.equal(together["image"][7], alone["image"])
    others = [samples[key]["image"] for key in ((7, 3, 0), (7, 2, 1))]
    changed = [not torch.equal(alone["image"], other) for other in others]
    assert all(changed) if not isinstance(transform, v2.RandomHorizontalFlip) else alone["image"].shape == (3, 32, 32)


def test_a_recipes_size_and_mean_reach_the_transforms():
    inner = T.MAEPretrain()
    data = ImageDataModule(image_size=48, train_transform=nn.Sequential(inner), eval_transform=T.EvalResizeCrop(40))
    assert inner.size == 48
    assert inner.mean == data.mean
    assert next(iter(data.val_dataloader()))["image"].shape == (64, 3, 40, 40)
    assert T.MAEPretrain()(smooth(50, 60)).shape == (3, 224, 224)


def test_erasing_comes_after_normalising():
    data = ImageDataModule(
        image_size=32, train_transform=T.FineTuneTrain(auto_augment=None, random_erase=1.0), options={"noise": 0.0}
    )
    pixels = next(iter(data.train_dataloader()))["image"]
    assert pixels.min() < -2.5  # normal noise leaves the range that pixels have
    assert torch.isfinite(pixels).all()


def test_mixing_makes_soft_labels():
    np.random.seed(0)
    batch = {"image": torch.rand(6, 3, 8, 8), "label": torch.arange(6), "index": torch.arange(6)}
    before = batch["image"].clone()
    mixed = T.Mixing(num_classes=7)(batch)
    assert mixed["label"].shape == (6, 7)
    assert torch.allclose(mixed["label"].sum(1), torch.ones(6))
    assert not torch.equal(mixed["image"], before)
    assert torch.equal(batch["image"], before)
    with pytest.raises(ZooError, match="even"):
        T.Mixing(num_classes=7)({k: v[:5] for k, v in batch.items()})


# ------------------------------------------------------------------------------------------------- samplers and loaders


@given(length=st.integers(1, 60), world=st.integers(1, 4), epoch=st.integers(0, 3), repeats=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_samplers_share_out_exactly(length, world, epoch, repeats):
    exact = [list(ExactSampler(length, rank, world)) for rank in range(world)]
    assert sorted(i for part in exact for i in part) == list(range(length))
    assert [len(part) for part in exact] == [len(ExactSampler(length, rank, world)) for rank in range(world)]

    parts = []
    for rank in range(world):
        sampler = EpochSampler(length, 7, repeats, rank, world)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == length // world
    keys = [key for part in parts for key in part]
    assert len(set(keys)) == len(keys)
    assert all(e == epoch and r < repeats for _, e, r in keys)
    if repeats == 1 and length % world == 0:
        assert sorted(i for i, _, _ in keys) == list(range(length))


def test_order_changes_with_epoch_and_seed_only():
    def order(seed, epoch):
        sampler = EpochSampler(50, seed)
        sampler.set_epoch(epoch)
        return [i for i, _, _ in sampler]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_workers_give_the_same_batches():
    def batches(workers):
        data = ImageDataModule(
            batch_size=16, train_samples=64, image_size=32, train_transform=T.MAEPretrain(), num_workers=workers
        )
        return list(data.train_dataloader())

    for a, b in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a["index"], b["index"])
        assert torch.equal(a["image"], b["image"])


class Counting(LightningModule):
    """Notes which samples it trained on, and a digest of what they looked like."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[int, ...], float]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, tuple(batch["index"].tolist()), batch["image"].sum().item()))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(folder: Path, workers: int, every: int, ckpt_path: str | None = None):
    data = ImageDataModule(
        batch_size=8, train_samples=50, image_size=16, train_transform=T.MAEPretrain(), num_workers=workers, seed=3
    )
    module = Counting()
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)],
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path, workers):
    whole = run(tmp_path / "whole", workers, every=1)
    assert len(whole) == 4 * 6
    for epoch in range(4):
        counts = Counter(i for e, indices, _ in whole for i in indices if e == epoch)
        assert len(counts) == 48
        assert max(counts.values()) == 1
    for step in (2, 6, 9, 17) if workers == 0 else (9,):
        rest = run(
            tmp_path / f"rest{step}", workers, every=100, ckpt_path=str(tmp_path / "whole" / f"step={step}.ckpt")
        )
        assert rest == whole[step:], step


def test_a_position_is_not_carried_to_other_settings(tmp_path):
    def loader(batch_size, samples=64):
        return ImageDataModule(batch_size=batch_size, train_samples=samples, image_size=16).train_dataloader()

    first = loader(8)
    iterator = iter(first)
    next(iterator), next(iterator)
    state = first.state_dict()
    assert (state["epoch"], state["batches"]) == (0, 2)
    with pytest.raises(ZooError, match="batch_size was 8 and is 16"):
        loader(16).load_state_dict(state)
    list(iterator)
    loader(16).load_state_dict(first.state_dict())  # at an epoch's end nothing hangs on it
    second = loader(8)
    second.load_state_dict(state)
    assert second.state_dict() == state


# ------------------------------------------------------------------------------------------------------ the data module


def test_it_says_what_it_holds_before_reading():
    data = ImageDataModule(options={"label": "count", "max_objects": 4})
    assert (data.num_classes, data.image_size, data.class_names) == (4, 64, ["1", "2", "3", "4"])
    assert ImageDataModule("imagenet1k").num_classes == 1000
    assert ImageDataModule("cifar10", mean=[0.5] * 3, std=[0.2] * 3).mean == (0.5,) * 3
    assert len(ImageDataModule("fashion_mnist").mean) == 3


def test_batches():
    data = ImageDataModule(batch_size=10, eval_batch_size=7, train_samples=25)
    train, val = data.train_dataloader(), data.val_dataloader()
    assert isinstance(train, TrainLoader)
    assert len(train) == 2
    batch = next(iter(train))
    assert {k: (v.dtype, v.shape[0]) for k, v in batch.items()} == {
        "image": (torch.float32, 10),
        "label": (torch.int64, 10),
        "index": (torch.int64, 10),
    }
    assert len(val) == math.ceil(5000 / 7)
    small = ImageDataModule(batch_size=10, train_samples=4).train_dataloader()
    assert [len(b["label"]) for b in small] == [4]  # fewer samples than a batch: one smaller batch, not none


def test_train_samples_are_a_fixed_draw(tmp_path):
    image_folder(tmp_path / "train", {"a": 30, "b": 30})
    image_folder(tmp_path / "test", {"a": 2, "b": 2})

    def indices(seed):
        return ImageDataModule(str(tmp_path), train_samples=10, seed=seed).source("train").indices.tolist()

    assert indices(0) == indices(0) != indices(1)
    assert len(set(indices(0))) == 10
    with pytest.raises(ZooError, match="train_samples is 61"):
        ImageDataModule(str(tmp_path), train_samples=61).source("train")


def test_the_seed_is_lightnings_unless_given(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert ImageDataModule().seed == 11
    assert ImageDataModule(seed=4).seed == 4


def test_pictures_of_different_sizes_need_a_transform(tmp_path):
    (tmp_path / "a").mkdir()
    for k in range(12):
        picture(k, (10 + k, 10)).save(tmp_path / "a" / f"{k:02}.png")
    samples = SampleSet(open_source(str(tmp_path), "train"), nn.Identity(), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ZooError, match="different sizes"):
        samples.__getitems__([0, 1])
