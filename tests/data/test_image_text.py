"""Captioned pictures: layouts, shards, order and resumption, word pieces, prompts, retrieval."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image

from zoo.data import ImageTextDataModule
from zoo.data.image_text import ShardPairs, StreamSampler, open_pairs, shard_index
from zoo.data.shapes import COLORS, SCENES, SHAPES, TEXTURES, render
from zoo.data.text import WordPiece, prompts, write_vocabulary, zero_shot
from zoo.errors import ZooError
from zoo.metrics import ImageTextRetrieval
from zoo.metrics.retrieval import ranks, recall


def _jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), 8 * number % 256, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def _shard(path: Path, numbers: range, broken: tuple[int, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            files = {"jpg": b"no picture" if number in broken else _jpeg(number)}
            files |= {"txt": f"picture number {number}\n".encode(), "json": b"{}"}
            for kind, content in files.items():
                member = tarfile.TarInfo(f"{number:09d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(4):
        _shard(tmp_path / "set" / f"{number:05d}.tar", range(10 * number, 10 * number + 8 + number))
    return tmp_path / "set"


# -------------------------------------------------------------------------------------------------------------- layouts


def test_shards(shards: Path) -> None:
    train, held = open_pairs(str(shards)), open_pairs(str(shards), "val")
    assert isinstance(train, ShardPairs)
    assert train.sizes == [8, 9, 10]  # the last is held out
    assert len(train) == 27
    assert len(held) == 11
    for index, number in ((0, 0), (7, 7), (8, 10), (26, 29)):
        row = train[index]
        assert row["captions"] == [f"picture number {number}"]
        assert row["image"].shape == (3, 20, 24)
        assert abs(int(row["image"][0, 5, 5]) - 8 * number % 256) < 3


def test_shards_in_splits_and_a_single_one(tmp_path: Path) -> None:
    _shard(tmp_path / "a" / "train" / "0.tar", range(5))
    _shard(tmp_path / "a" / "val" / "0.tar", range(5, 8))
    assert (len(open_pairs(str(tmp_path / "a"))), len(open_pairs(str(tmp_path / "a"), "test"))) == (5, 3)
    _shard(tmp_path / "b" / "0.tar", range(20))
    assert (len(open_pairs(str(tmp_path / "b"))), len(open_pairs(str(tmp_path / "b"), "val"))) == (18, 2)
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "c").mkdir()
    with webdataset.TarWriter(str(tmp_path / "c" / "0.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"k/{number}", "jpg": _jpeg(number), "txt": f"text {number}"})
    assert open_pairs(str(tmp_path / "c"), "predict")[2]["captions"] == ["text 2"]


def test_a_broken_sample_is_stood_in_for_and_a_broken_shard_refused(tmp_path: Path) -> None:
    source = ShardPairs([_shard(tmp_path / "0.tar", range(5), broken=(1, 2))])
    with pytest.warns(UserWarning, match="stands in"):
        assert source[1]["captions"] == ["picture number 3"]
    assert source[4]["captions"] == ["picture number 4"]
    with pytest.raises(ZooError, match="no readable sample"), pytest.warns(UserWarning, match="stands in"):
        ShardPairs([_shard(tmp_path / "1.tar", range(2), broken=(0, 1))])[0]
    (tmp_path / "2.tar").write_bytes(b"nothing of the kind")
    with pytest.raises(ZooError, match="no whole tar"):
        shard_index(tmp_path / "2.tar")
    with tarfile.open(tmp_path / "3.tar", "w"):
        pass
    with pytest.raises(ZooError, match="holds no pair"):
        shard_index(tmp_path / "3.tar")


def test_the_index_follows_the_file(tmp_path: Path) -> None:
    assert len(shard_index(_shard(tmp_path / "0.tar", range(3)))) == 3
    assert len(shard_index(_shard(tmp_path / "0.tar", range(5)))) == 5


def test_coco_captions(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        (tmp_path / f"{part}2017").mkdir()
        images = [{"id": 7 * k, "file_name": f"{k}.jpg", "height": 20, "width": 24} for k in range(count)]
        notes = [
            {"id": 9, "image_id": 7 * k, "caption": f" a  {part}\n {k} {n}"} for n in range(2) for k in range(count)
        ]
        for k in range(count):
            (tmp_path / f"{part}2017" / f"{k}.jpg").write_bytes(_jpeg(k))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        content = {"images": [*images, {"id": 99, "file_name": "uncaptioned.jpg"}], "annotations": notes}
        (tmp_path / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(content))
    train, val = open_pairs("coco_captions", "train", tmp_path), open_pairs("coco_captions", "test", tmp_path)
    assert (len(train), len(val)) == (3, 2)
    assert train[2]["captions"] == ["a train 2 0", "a train 2 1"]
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    with pytest.raises(ZooError, match="no lists images and annotations"):
        open_pairs(str(tmp_path), "val")


def test_karpathys_split(tmp_path: Path) -> None:
    images = []
    for k, split in enumerate(["train", "restval", "val", "test"]):
        entry = {"filename": f"{k}.jpg", "split": split, "sentences": [{"raw": f"text {k}"}, {"raw": f"other {k}"}]}
        images.append(entry)
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{k}.jpg").write_bytes(_jpeg(k))
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    assert len(open_pairs("flickr30k", "train", tmp_path)) == 2
    assert open_pairs("flickr30k", "test", tmp_path)[0]["captions"] == ["text 3", "other 3"]
    (tmp_path / "images" / "2.jpg").unlink()
    with pytest.raises(ZooError, match=r"no picture 2\.jpg"):
        open_pairs("flickr30k", "val", tmp_path)


@pytest.mark.parametrize("texts", ["one", "several"])
def test_datasets_on_disk(tmp_path: Path, texts: str) -> None:
    import datasets

    captions = [f"text {k}" if texts == "one" else [f"text {k}", "more"] for k in range(20)]
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    if texts == "several":
        features["caption"] = datasets.Sequence(datasets.Value("string"))
    rows = {"image": [{"bytes": _jpeg(k), "path": None} for k in range(20)], "caption": captions}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(tmp_path / "set"))
    source = open_pairs(str(tmp_path / "set"), "predict")
    assert source[3]["captions"] == (["text 3"] if texts == "one" else ["text 3", "more"])
    assert source[3]["image"].shape == (3, 20, 24)
    assert len(open_pairs(str(tmp_path / "set"), "val")) == 2
    with pytest.raises(ZooError, match="no caption column 'words'"):
        open_pairs(str(tmp_path / "set"), caption_column="words")


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(_jpeg(1))
    (tmp_path / "train.tsv").write_text('filepath\ttitle\n1.jpg\ta "quoted" text, with commas\n')
    assert open_pairs(str(tmp_path), "predict")[0]["captions"][0].startswith("a ")
    (tmp_path / "train.tsv").write_text("path\ttitle\n1.jpg\tx\n")
    with pytest.raises(ZooError, match="needs the columns filepath and title"):
        open_pairs(str(tmp_path))


def test_the_embedded_worlds_captions_are_those_of_its_pictures() -> None:
    source = open_pairs("shapes", "val", size=32, max_objects=2)
    whole = render(0, "val", [5, 3], 32, ("image", "caption", "label"), max_objects=2)
    many = source.read_many([5, 3])  # type: ignore[attr-defined]
    assert torch.equal(many["image"], whole["image"])
    assert [texts for (texts,) in many["captions"]] == whole["caption"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: open_pairs("coco_caption"), "did you mean 'coco_captions'"),
        (lambda: open_pairs("coco_captions"), "data_dir"),
        (lambda: open_pairs("cifar10"), "has no captions"),
        (lambda: open_pairs("./absent"), "no such folder absent"),
        (lambda: open_pairs("shapes", max_object=1), "did you mean 'max_objects'"),
        (lambda: open_pairs("shapes", "trial"), "unknown split"),
        (lambda: ImageTextDataModule("shapes", epoch_samples=0), "epoch_samples"),
        (lambda: ImageTextDataModule("shapes", context_length=0), "at least one token"),
        (lambda: ImageTextDataModule("shapes", tokenizer="brt").tokenize.size, "did you mean 'bert'"),
    ],
)
def test_wrong_names_are_one_line(call: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZooError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_set_without_labels_is_not_taken_for_a_labelled_one() -> None:
    from zoo.data import ImageDataModule

    with pytest.raises(ZooError, match="laion400m is a set of image-text pairs"):
        ImageDataModule("laion400m")


# ---------------------------------------------------------------------------------------------------- order and batches


@pytest.mark.parametrize(("sizes", "length", "window"), [([8, 9, 10], 27, 2), ([5, 30], 12, 1), ([7], 20, 8)])
def test_a_stream_gives_every_sample_once_a_pass(sizes: list[int], length: int, window: int) -> None:
    total = sum(sizes)

    def order(world: int, epochs: range, skip: int = 0) -> list[tuple[int, int, int]]:
        found = []
        for epoch in epochs:
            ranks = [StreamSampler(sizes, length, seed=3, window=window, rank=r, world=world) for r in range(world)]
            for sampler in ranks:
                sampler.set_epoch(epoch)
                sampler.first = skip
            found += [key for keys in zip(*ranks, strict=True) for key in keys]
        return found

    keys = order(1, range(6))
    for turn in range(6 * length // total):
        part = keys[turn * total : (turn + 1) * total]
        assert sorted(index for index, _, _ in part) == list(range(total))
        assert {lap for _, lap, _ in part} == {turn}
    if len(keys) >= 2 * total:
        assert keys[:total] != keys[total : 2 * total]
    assert order(1, range(2, 3)) == keys[2 * length : 3 * length]
    assert order(1, range(1, 2), skip=4) == keys[length + 4 : 2 * length]
    if length % 2 == 0:  # two ranks share the same stream
        assert order(2, range(6)) == keys
        assert order(2, range(1, 2), skip=2) == keys[length + 4 : 2 * length]


def test_shards_are_mixed_within_windows(shards: Path) -> None:
    sampler = StreamSampler([8, 9, 10, 11], 38, window=2)
    first = [index for index, _, _ in sampler]
    shard_of = np.repeat(np.arange(4), [8, 9, 10, 11])
    pairs = [set(shard_of[first[:k]]) for k in (10, 38)]
    assert len(pairs[0]) == 2
    assert len(pairs[1]) == 4


def test_batches_of_shapes() -> None:
    data = ImageTextDataModule(
        "shapes",
        batch_size=6,
        eval_batch_size=5,
        train_samples=20,
        image_size=32,
        tokenizer="shapes",
        context_length=10,
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (6, 3, 32, 32)
    assert batch["text"].shape == (6, 10)
    assert batch["text"].dtype == batch["owner"].dtype == torch.int64
    assert torch.equal(batch["owner"], batch["index"])
    for text, label in zip(batch["caption"], batch["label"], strict=True):
        assert f"{SHAPES[label]}" in text
    assert torch.equal(data.tokenize(batch["caption"]), batch["text"])
    assert data.class_names == list(SHAPES)
    assert data.class_prompts is not None
    assert data.class_prompts.shape == (10, 2, 10)


def test_captions_are_drawn_in_training_and_all_evaluated(tmp_path: Path) -> None:
    images = [
        {
            "filename": f"{k}.jpg",
            "split": "train" if k < 8 else "test",
            "sentences": [{"raw": f"{k} {n}"} for n in "abc"],
        }
        for k in range(10)
    ]
    for k in range(10):
        (tmp_path / f"{k}.jpg").write_bytes(_jpeg(k))
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))

    def module(**options: Any) -> ImageTextDataModule:
        return ImageTextDataModule(
            str(tmp_path), batch_size=8, image_size=16, tokenizer="shapes", num_workers=0, **options
        )

    def epoch(data: ImageTextDataModule, number: int) -> dict[str, str]:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        (batch,) = loader
        return dict(text.split() for text in batch["caption"])

    first, second = (epoch(module(seed=1), number) for number in (0, 1))
    assert first.keys() == {str(k) for k in range(8)}
    assert first != second
    assert first == epoch(module(seed=1), 0)
    (batch,) = module(eval_captions=2).test_dataloader()
    assert batch["caption"] == ["8 a", "8 b", "9 a", "9 b"]
    assert batch["owner"].tolist() == [0, 0, 1, 1]
    assert batch["index"].tolist() == [0, 1]
    assert module().class_prompts is None


def test_labelled_pictures_may_be_what_is_evaluated(shards: Path) -> None:
    data = ImageTextDataModule(
        str(shards),
        batch_size=4,
        image_size=32,
        tokenizer="shapes",
        eval_dataset="shapes",
        epoch_samples=12,
        num_workers=0,
    )
    assert data.num_classes == 10
    assert [len(batch["text"]) for batch in data.train_dataloader()] == [4, 4, 4]
    batch = next(iter(data.val_dataloader()))
    assert batch.keys() == {"image", "label", "index"}
    assert batch["image"].shape == (4, 3, 32, 32)


def test_what_is_trained_on_need_not_be_there_to_evaluate_another_set() -> None:
    class Counts(LightningModule):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test/count", float(len(batch["image"])))

    data = ImageTextDataModule("laion400m", batch_size=4, tokenizer="shapes", eval_dataset="shapes", num_workers=0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", limit_test_batches=1, **quiet)
    assert trainer.test(Counts(), data, verbose=False) == [{"test/count": 4.0}]
    with pytest.raises(ZooError, match="give its path as data_dir"):
        data.source("train")


def test_a_resumed_stream_goes_on(shards: Path) -> None:
    def loader() -> Any:
        data = ImageTextDataModule(
            str(shards), batch_size=3, image_size=16, tokenizer="shapes", epoch_samples=15, num_workers=0, seed=4
        )
        return data.train_dataloader()

    whole = loader()
    whole.sampler.set_epoch(1)
    batches = list(whole)
    stopped = loader()
    stopped.sampler.set_epoch(1)
    running = iter(stopped)
    next(running), next(running)
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    resumed.sampler.set_epoch(1)
    rest = list(resumed)
    assert [b["caption"] for b in rest] == [b["caption"] for b in batches[2:]]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(rest, batches[2:], strict=True))


# ----------------------------------------------------------------------------------------------------- text and prompts


def test_word_pieces_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "un", "##aff", "##able", "cafe", "!", "a"]) + "\n")
    tokenize = WordPiece(str(path), length=6)
    assert tokenize.size == 8
    assert tokenize.pieces("UNaffable Café!") == ["un", "##aff", "##able", "cafe", "!"]
    assert tokenize(["unaffable café!", "", "a x [PAD] a a a a a"]).tolist() == [
        [2, 3, 4, 5, 6, 0],
        [0] * 6,
        [7, 1, 1, 1, 1, 7],
    ]
    path.write_text("a\nb\n")
    with pytest.raises(ZooError, match="no word-piece vocabulary"):
        WordPiece(str(path)).size  # noqa: B018
    with pytest.raises(ZooError, match="no vocabulary file"):
        WordPiece(str(tmp_path / "absent.txt")).size  # noqa: B018


def test_word_pieces_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = write_vocabulary(["naive photo of the tench", "1st great-white shark (blurred)!"], tmp_path / "vocab.txt")
    texts = ["A photo of thé TENCH, naïve.", "great   white\tsharks 2nd", "深い shark", "x" * 120]
    theirs = transformers.BertTokenizer(vocab=str(path), vocab_file=str(path), do_lower_case=True, cls_token="[UNK]")
    ours = WordPiece(str(path))
    for text in texts:
        assert ours.pieces(text) == theirs.tokenize(text), text


def test_the_embedded_worlds_vocabulary_covers_its_captions() -> None:
    tokenize = WordPiece("shapes")
    words = {word for group in (SHAPES, COLORS, TEXTURES, SCENES) for word in group}
    assert all(tokenize.pieces(word) == [word] for word in words)
    for text in render(0, "train", range(50), 16, ("caption",))["caption"]:
        assert "[UNK]" not in tokenize.pieces(text)
        assert not any(piece.startswith("##") for piece in tokenize.pieces(text))
    assert tokenize.pieces("zebra") == ["z", "##e", "##b", "##r", "##a"]


def test_published_vocabulary_is_fetched_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.data import text

    assert set(text.PUBLISHED) == {"bert"}
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    urls, facts = text.PUBLISHED["bert"]
    monkeypatch.setitem(text.PUBLISHED, "bert", ((str(tmp_path / "vocab.txt"),), facts))
    with pytest.raises(ZooError, match="231,508 are due"):
        text.vocabulary_path("bert")
    assert all(url.startswith("https://") for url in urls)


def test_prompts() -> None:
    names, texts = prompts("imagenet1k")
    assert (len(names), len(texts), len(texts[0])) == (1000, 1000, 7)
    assert names[0] == "tench"
    assert texts[0][0] == "itap of a tench."
    assert len(prompts("imagenet1k", templates="long")[1][5]) == 80
    assert prompts("cifar10", ["fire_truck"], ["{} or {}"])[1] == [["fire truck or fire truck"]]
    assert prompts("shapes", ["ring"], "short")[1] == [["a large ring", "a large ring on a background"]]
    assert "class_names" not in zero_shot("cifar10")
    for arguments, message in (
        (("imagenet1k", None, "sort"), "did you mean 'short'"),
        (("imagenet1k", ["a"], ["no place"]), "{}"),
        (("cifar10",), "no class names"),
    ):
        with pytest.raises(ZooError, match=message):
            prompts(*arguments)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ retrieval


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.3, 0.3, 0.3]])
    positive = torch.tensor([[True, False, False], [False, True, True], [True, False, False]])
    above, level = ranks(scores, positive)
    assert (above.tolist(), level.tolist()) == ([0, 1, 0], [0, 0, 2])
    chances = [recall(above, level, k).tolist() for k in (1, 2, 3)]  # equal scores are chance
    assert chances == [[1, 0, pytest.approx(1 / 3)], [1, 1, pytest.approx(2 / 3)], [1, 1, 1]]


def test_retrieval_with_several_captions() -> None:
    metric = ImageTextRetrieval(k=(1, 2))
    axes = torch.eye(4)
    images, numbers = axes[:3], torch.tensor([10, 20, 30])
    texts = torch.stack([axes[0], axes[1], axes[0], axes[2], axes[3]])
    owners = torch.tensor([10, 20, 20, 30, 30])
    metric.update(images[:2], numbers[:2], texts[:3], owners[:3])
    metric.update(images[2:], numbers[2:], texts[3:], owners[3:])
    metric.update(images[:2], numbers[:2], texts[:3], owners[:3])  # a sampler's padding counts once
    found = {key: value.item() for key, value in metric.compute().items()}
    # 10 ties with another's caption; 20 and 30 find one of theirs first.
    assert found["image_to_text_r1"] == pytest.approx(2.5 / 3)
    # The caption (20, e0) finds picture 10 first, then 20 and 30 tie; (30, e3) fits none: all tie.
    assert found["text_to_image_r1"] == pytest.approx((3 + 1 / 3) / 5)
    assert found["text_to_image_r2"] == pytest.approx((3 + 1 / 2 + 2 / 3) / 5)
    constant = ImageTextRetrieval(k=(1,))
    constant.update(torch.ones(50, 4), torch.arange(50), torch.ones(50, 4), torch.arange(50))
    assert constant.compute()["text_to_image_r1"] == pytest.approx(1 / 50)
    assert constant.compute()["text_to_image_median"] == 25.5
    with pytest.raises(ZooError, match="needs images"):
        ImageTextRetrieval().compute()
    constant.update(torch.full((1, 4), torch.nan), torch.tensor([50]), torch.ones(1, 4), torch.tensor([50]))
    with pytest.raises(ZooError, match="NaN"):
        constant.compute()
    lonely = ImageTextRetrieval()
    lonely.update(torch.ones(2, 4), torch.arange(2), torch.ones(1, 4), torch.arange(1))
    with pytest.raises(ZooError, match="a text for every image"):
        lonely.compute()


def test_retrieval_is_chunked_without_a_difference() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(30, 8), torch.randn(60, 8)
    owners = torch.arange(30).repeat_interleave(2)
    results = []
    for chunk in (7, 512):
        metric = ImageTextRetrieval(chunk=chunk)
        metric.update(images, torch.arange(30), texts, owners)
        results.append(metric.compute())
    assert results[0] == results[1]
