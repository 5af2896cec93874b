"""What the base of every task does with batches, draws and the values of an evaluation."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import zoo
from tests.processes import in_processes
from zoo.data import ImageDataModule
from zoo.errors import ZooError
from zoo.training import BaseModule, Classification, LinearProbe, Optim
from zoo.training.base import read_batch
from zoo.training.probe import _loader


def _trainer(**options: Any) -> L.Trainer:
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **silent, **options)


def _task(num_classes: int = 3) -> Classification:
    torch.manual_seed(0)
    return Classification(nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes)), Optim(), num_classes)


def test_pictures_with_labels_are_a_batch_and_others_name_the_keys() -> None:
    images, labels = torch.randn(8, 3, 2, 2), torch.arange(8) % 3
    trainer, task = _trainer(), _task()
    trainer.fit(task, *(DataLoader(TensorDataset(images, labels), 4) for _ in range(2)))
    assert trainer.callback_metrics["val/top5"] == 1
    assert len(trainer.predict(task, DataLoader(TensorDataset(images), 4))) == 2  # type: ignore[arg-type]
    for batch, line in (
        ((images, labels.float()), r"dicts with keys such as image, label, or \(image, label\); got a tuple of Tensor"),
        ((images, labels, labels), "got a tuple of Tensor, Tensor, Tensor"),
        ((images.flatten(1), labels), "got a tuple"),
        ("words", "got a str"),
        ({"picture": images, "label": labels}, "Classification wants 'image' in a batch, which has picture, label"),
        ({"image": images, "target": 3}, "Classification wants 'label' in a batch, which has image, target"),
    ):
        with pytest.raises(ZooError, match=line):
            task.validation_step(task.on_after_batch_transfer(batch, 0), 0)
    nested = read_batch({"target": [{"boxes": 1}]}, "it", ("target",))
    with pytest.raises(ZooError, match="it wants 'labels' in target of a batch, which has boxes"):
        nested["target"][0]["labels"]
    toy = BaseModule(Optim())
    assert toy.on_after_batch_transfer((images, labels), 0)[0] is images  # says nothing of its batches


def test_draws_of_an_evaluation_are_the_samples_own() -> None:
    task = _task().eval()
    both = {"image": torch.zeros(3, 1), "index": torch.tensor([4, 9, 2])}
    drawn = task.draws(both, "noise", 5, normal=True)
    alone = {"image": torch.zeros(1, 1), "index": torch.tensor([9])}
    assert torch.equal(task.draws(alone, "noise", 5, normal=True)[0], drawn[1])
    assert not torch.equal(task.draws(alone, "other", 5, normal=True)[0], drawn[1])
    assert task.draws({**both, "noise": both["image"]}, "noise", 1) is both["image"]
    uniform = task.draws({"image": torch.zeros(4000), "index": torch.arange(4000)}, "u")
    assert uniform.shape == (4000,)
    assert 0.48 < uniform.mean() < 0.52
    task.train()
    assert not torch.equal(task.draws(both, "noise", 5), task.draws(both, "noise", 5))


class Numbers(Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        torch.manual_seed(index)
        return {"image": torch.randn(3, 2, 2), "label": index % 3}


def _scores(world: int) -> dict[str, float]:
    shared = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    trainer = _trainer(use_distributed_sampler=False, **shared)
    rank = trainer.global_rank
    loader = DataLoader(Numbers(), batch_size=2, sampler=range(rank, 5, world))
    (scores,) = trainer.test(_task(), loader, verbose=False)
    return {key: float(value) for key, value in scores.items()}


def test_means_are_those_of_all_samples_in_any_number_of_processes() -> None:
    one = _scores(1)
    assert one.keys() == {"test/top1", "test/top5", "test/loss"}
    for world in (2, 3):
        for scores in in_processes(world, _scores, world):
            assert scores == pytest.approx(one, rel=1e-6)


def test_probes_see_as_much_as_the_trainer(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    data = ImageDataModule("shapes", batch_size=4, eval_batch_size=3, image_size=16, train_samples=32)
    probe = LinearProbe(epochs=2, warmup_epochs=1)
    trainer = _trainer(limit_train_batches=3, limit_val_batches=2, callbacks=[probe])
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr("zoo.training.probe.time.monotonic", lambda: float(next(clock)))
    task = _task(10)
    task.network = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    monkeypatch.setattr(task, "features", lambda images: images.flatten(1), raising=False)
    trainer.validate(task, datamodule=data, verbose=False)
    said = capsys.readouterr().out
    assert "12 train and 6 val samples" in said
    for line in ("train features, batch 3/3", "val features, batch 2/2", "epoch 2/2"):
        assert line in said
    assert len(_loader(trainer, "val")) == 2


def test_the_text_of_a_data_module_makes_no_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise AssertionError("a loader was made")

    for split in ("train", "val", "test", "predict"):
        monkeypatch.setattr(ImageDataModule, f"{split}_dataloader", fail)
    assert str(ImageDataModule("shapes")) == "ImageDataModule(shapes)"
    zoo.load_recipe("mae/pocket", {"trainer.logger": False})
