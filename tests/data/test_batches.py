"""Small pictures, a whole batch at a time: the same as one by one, and whatever else is in the batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from zoo.data import ImageDataModule, batches
from zoo.data import transforms as T
from zoo.data.memory import HeldSource, hold
from zoo.data.sources import MemorySource
from zoo.errors import ZooError

TRANSFORMS = {
    "crop and flip": T.PadCropTrain(24),
    "cutout": T.PadCropTrain(32, fill="zero", cutout=11),
    "resized crop": T.MAEPretrain(32),
    "one draw": T.LinearProbeTrain(20, interpolation="bilinear"),
    "moco v2": T.ContrastiveAugment(24),
    "moco v1": T.ContrastiveAugment(32, jitter=(0.4,) * 4, jitter_prob=1.0, gray_first=True, blur_prob=0.0),
    "byol": T.ContrastiveAugment(27, interpolation="bicubic", solarize_prob=0.4, jitter=(0.4, 0.4, 0.0, 0.2)),
    "generation": T.ADMCrop(24, flip=0.5),
    "evaluation": T.EvalResizeCrop(24),
    "border": T.EvalResizeCrop(32, crop_pct=1.0, crop_mode="border"),
}
BY_NAME = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


def pictures(count: int, height: int = 28, width: int = 32) -> Tensor:
    """Half of them smooth, half of them noise."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    rough[::2] = (255 * smooth[::2]).to(torch.uint8)
    return rough


def rows(transform: T.ImageTransform, count: int, seed: int = 0) -> Tensor:
    parts = np.stack([np.arange(count), np.zeros(count, int), np.zeros(count, int)], axis=1)
    return batches.uniforms(seed, 0, parts, transform.draws or 0)


def views(found: Tensor | list[Tensor]) -> list[Tensor]:
    return found if isinstance(found, list) else [found]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What torch draws next, instead of its own numbers; an order of four is drawn as one number."""
    queue: list[float] = []

    def rand(*shape: object, **_: object) -> Tensor:
        size = torch.Size(shape[0] if shape and isinstance(shape[0], tuple) else shape)
        taken = [queue.pop(0) for _ in range(size.numel())]
        return torch.tensor(taken, dtype=torch.float64).reshape(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        patch.setattr(torch, "randperm", lambda _: batches.ORDERS[int(24 * queue.pop(0))])
        yield queue


@BY_NAME
def test_many_are_as_one_by_one_where_the_draws_are_given(
    transform: T.ImageTransform, request: pytest.FixtureRequest
) -> None:
    images = pictures(64)
    kept, draws, given = images.clone(), rows(transform, 64), request.getfixturevalue("given")
    together = transform.batch(images, draws)
    assert isinstance(together, Tensor)
    assert torch.equal(images, kept)
    alone = []
    for image, row in zip(images, draws.tolist(), strict=True):
        if isinstance(transform, T.ContrastiveAugment) and row[41] >= transform.jitter_prob:
            row[45:50] = []  # the colours' draws are not made
        given[:] = row
        alone.append(transform(image))
        assert given == []
    gap = (together.int() - torch.stack(alone).int()).abs()
    if isinstance(transform, T.ContrastiveAugment):
        assert float((gap > 0).float().mean()) < 1e-3  # after a change of hue
    else:
        assert int(gap.max()) == 0


@BY_NAME
def test_a_picture_does_not_see_its_neighbours(transform: T.ImageTransform) -> None:
    transform = T.TwoViews(transform)
    images, draws = pictures(40, 27, 31), rows(transform, 40)
    together = views(transform.batch(images, draws))
    assert len(together) == 2
    order = torch.randperm(40)
    for view, other in zip(together, views(transform.batch(images[order], draws[order])), strict=True):
        assert torch.equal(view[order], other)
    for k in (0, 7, 39):
        for view, other in zip(together, views(transform.batch(images[k : k + 1], draws[k : k + 1])), strict=True):
            assert torch.equal(view[k], other[0])
    if transform.random:
        assert not torch.equal(*together)


@pytest.mark.parametrize("name", ["cutout", "one draw", "moco v2", "byol"])
def test_the_law_is_that_of_one_by_one(name: str) -> None:
    transform, image, count = TRANSFORMS[name], pictures(1)[0], 600
    torch.manual_seed(0)
    alone = torch.stack([transform(image) for _ in range(count)]).double()
    together = transform.batch(image.expand(count, -1, -1, -1), rows(transform, count)).double()
    for moment in (
        lambda x: x,
        torch.square,
        lambda x: x * x.flip(-1),
        lambda x: x * x.roll(1, 1),
        lambda x: x.amax((2, 3)),
    ):
        a, b = (moment(x).flatten(1).unflatten(1, (3, -1)).mean(2) for x in (alone, together))
        error = ((a.var(0) + b.var(0)) / count).sqrt()
        assert float(((a.mean(0) - b.mean(0)).abs() / error).max()) < 4.5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("sizes", [(32, 32, 32), (40, 48, 24), (64, 64, 32), (20, 24, 64)])
def test_crops_are_resized_to_the_bit(sizes: tuple[int, int, int], interpolation: str) -> None:
    height, width, size = sizes
    images = pictures(24, height, width)
    draws = torch.rand(24, 10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    boxes = batches.resized_crop_boxes(height, width, (0.08, 1.0), (3 / 4, 4 / 3), draws)
    plain = [T.random_resized_crop_params(height, width, (0.08, 1.0), (3 / 4, 4 / 3), row) for row in draws.tolist()]
    assert boxes.tolist() == [list(box) for box in plain]
    wanted = torch.stack([T.crop_resize(i, b, size, interpolation) for i, b in zip(images, plain, strict=True)])
    assert torch.equal(batches.crop_resize(images, boxes, size, interpolation), wanted)


def test_a_crop_that_never_fits_is_the_middle() -> None:
    draws = torch.full((3, 10, 4), 0.999, dtype=torch.float64)
    for height, width in ((20, 60), (60, 20), (30, 30)):
        boxes = batches.resized_crop_boxes(height, width, (1.4, 1.5), (3 / 4, 4 / 3), draws)
        plain = T.random_resized_crop_params(height, width, (1.4, 1.5), (3 / 4, 4 / 3), draws[0].tolist())
        assert boxes.tolist() == [list(plain)] * 3


@pytest.mark.parametrize("longest", [0.6, 2.0, 9.0])
def test_blurs_are_pillows_to_the_bit(longest: float) -> None:
    images = pictures(30, 24, 36)
    sigma = torch.linspace(0.05, longest, 30, dtype=torch.float64)
    planes = images.transpose(0, 1).float().contiguous()
    chosen = torch.arange(3, 30)
    found = batches.blur(planes, chosen, sigma).transpose(0, 1).to(torch.uint8)
    assert torch.equal(found[:3], images[:3])
    wanted = [
        F.pil_to_tensor(F.to_pil_image(images[k]).filter(ImageFilter.GaussianBlur(float(sigma[k])))) for k in chosen
    ]
    assert torch.equal(found[3:], torch.stack(wanted))


@pytest.mark.parametrize("step", range(4))
def test_colours_are_torchvisions(step: int) -> None:
    theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[step]
    levels = torch.arange(0, 256, 15, dtype=torch.uint8)
    image = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(3, 72, 81)
    for factor in (0.0, 0.6, 1.0, 1.37) if step < 3 else (-0.5, -0.1, 0.0, 0.03, 0.4):
        order = torch.tensor([[-1, step, -1, -1]])
        found = batches.jitter(image[:, None].float(), torch.full((1, 4), factor, dtype=torch.float64), order)[:, 0]
        gap = (found - theirs(image, factor)).abs()
        assert float(gap.max()) <= 1
        assert float(gap.mean()) < 2e-4


def test_pillows_hue_is_as_far_off_as_it_is_said_to_be() -> None:
    """The docstring of ContrastiveAugment and MoCo's ledger state these numbers."""
    levels = torch.arange(0, 256, 15, dtype=torch.uint8)
    image = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(3, 72, 81)
    picture = F.to_pil_image(image)
    for limit, most, mean in ((0.1, 15, 0.8), (0.4, 18, 0.9)):
        gaps = []
        for factor in np.linspace(-limit, limit, 41).tolist():
            theirs = F.pil_to_tensor(F.adjust_hue(picture, factor)).int()
            gaps.append((F.adjust_hue(image, factor).int() - theirs).abs())
        gap = torch.stack(gaps)
        assert int(gap.max()) == most
        assert float(gap.float().mean()) == pytest.approx(mean, abs=0.06)


def test_draws_are_uniform_and_a_samples_own() -> None:
    parts = np.array(list(itertools.product(range(300), range(2), range(2))))
    draws = batches.uniforms(3, 0, parts, 6)
    assert draws.shape == (1200, 6)
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.012)
    together = torch.corrcoef(torch.cat([draws[:-1], draws[1:]], dim=1).T) - torch.eye(12)
    assert float(together.abs().max()) < 0.12
    assert torch.equal(batches.uniforms(3, 0, parts[77:78], 4)[0], draws[77, :4])
    assert len(torch.unique(draws)) == draws.numel()
    for seed, salt in ((4, 0), (3, 1)):
        assert not torch.isin(batches.uniforms(seed, salt, parts, 6), draws).any()


# --------------------------------------------------------------------------------------------------------- in the data


def test_a_batch_is_what_its_samples_are(monkeypatch: pytest.MonkeyPatch) -> None:
    views = T.TwoViews(T.ContrastiveAugment())
    data = ImageDataModule("shapes", image_size=16, train_samples=12, train_transform=views, seed=5)
    monkeypatch.setattr(T.ContrastiveAugment, "forward", lambda *_: pytest.fail("one by one"))
    samples = data.samples("train")
    before = torch.get_rng_state()
    keys = [(k % 12, k // 12, k % 2) for k in range(36)]
    batch = samples.__getitems__(keys)
    assert torch.equal(torch.get_rng_state(), before)
    assert [view.shape for view in batch["views"]] == [(36, 3, 16, 16)] * 2
    for k in (5, 20):
        alone = samples[keys[k]]
        assert all(torch.equal(view[k], one) for view, one in zip(batch["views"], alone["views"], strict=True))
        assert int(alone["label"]) == int(batch["label"][k])
    assert not torch.equal(batch["views"][0][3], batch["views"][0][15])  # another epoch
    assert batch["label"][3] == batch["label"][15]
    assert not torch.equal(samples[(3, 0, 0)]["views"][0], samples[(3, 0, 1)]["views"][0])


def test_large_pictures_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(T.MAEPretrain, "batch", lambda *_: pytest.fail("together"))
    data = ImageDataModule("shapes", image_size=72, train_samples=4, train_transform=T.MAEPretrain(16), batch_size=2)
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("odd", [False, True])
def test_small_files_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: bool) -> None:
    for label, k in itertools.product("ab", range(4)):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.new("RGB", (20, 24 + (odd and label == "b")), (k, 0, 0)).save(tmp_path / label / f"{k}.png")
    data = ImageDataModule(
        str(tmp_path), image_size=16, batch_size=2, train_transform=T.PadCropTrain(), eval_transform=T.EvalResizeCrop()
    )
    loader = data.train_dataloader()
    assert isinstance(data.held("train"), HeldSource) is not odd
    if odd:
        return
    assert loader.num_workers == 0
    monkeypatch.setattr("zoo.data.sources.read_image", lambda *_: pytest.fail("decoded again"))
    labels = torch.cat([batch["label"] for epoch in range(3) for batch in loader])
    assert sorted(set(labels.tolist())) == [0, 1]
    again = data.samples("train", train_transform=False)
    assert len(again.__getitems__(list(range(len(again))))["image"]) == len(again)


def test_what_is_drawn_is_kept() -> None:
    class Drawn:
        class_names, asked = ["a"], []  # type: ignore[var-annotated]

        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> dict[str, object]:
            raise AssertionError

        def read_many(self, indices: list[int]) -> dict[str, object]:
            self.asked += indices
            images = torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
            return {"image": images, "label": torch.tensor(indices), "captions": [[str(i)] for i in indices]}

    source = hold(Drawn())
    source.source.asked.clear()
    for wanted in ([3, 1, 3], [1, 8], [8, 3, 0]):
        many = source.read_many(wanted)
        assert many["image"][:, 0, 0, 0].tolist() == many["label"].tolist() == wanted
        assert many["captions"] == [[str(i)] for i in wanted]
    assert sorted(source.source.asked) == [0, 1, 3, 8]
    sample = source[5]
    assert (sample["label"], sample["captions"], sample["image"].shape) == (5, ["5"], (3, 4, 4))
    memory = MemorySource(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3), ["a"])
    assert hold(memory) is memory


def test_gray_pictures_in_memory_take_colours() -> None:
    gray = MemorySource(pictures(6)[:, :1], torch.arange(6), list("abcdef"))
    for transform in TRANSFORMS.values():
        out = transform.batch(gray.read_many(range(6))["image"], rows(transform, 6))
        assert out.shape == (6, 3, transform.side, transform.side)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ZooError, match="cutout"):
        T.PadCropTrain(cutout=-1)
    with pytest.raises(ZooError, match="chances"):
        T.ContrastiveAugment(solarize_prob=-0.1)
