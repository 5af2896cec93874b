"""The base of classifiers: evaluation on views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from zoo.errors import ZooError
from zoo.recognition.preact_resnet import PreActResNet
from zoo.training import Classification, Optim


def _data(views: int = 0, count: int = 8) -> DataLoader:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    crops = {"views": [images[:, :, : 16 - k, : 16 - k] for k in range(views)]}
    samples = [
        {"label": i % 3, **({"views": [v[i] for v in crops["views"]]} if views else {"image": images[i]})}
        for i in range(count)
    ]
    return DataLoader(samples, batch_size=4)


def _trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, **options},
    )


def test_crops_are_averaged_by_their_logits(tmp_path: Path) -> None:
    network = PreActResNet([1, 1, 1], [4, 8, 16], num_classes=3)
    task = Classification(network, Optim(), 3).eval()
    (scores,) = _trainer(tmp_path).test(task, _data(views=3), verbose=False)
    images, labels = torch.stack([sample["image"] for sample in _data().dataset]), torch.arange(8) % 3
    with torch.no_grad():
        logits = sum(task(images[:, :, : 16 - k, : 16 - k]) for k in range(3)) / 3
        whole = task(images)
    assert scores["test/loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores["test/top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    probabilities = torch.cat(_trainer(tmp_path).predict(task, _data(views=3)))
    torch.testing.assert_close(probabilities, logits.softmax(1))
    torch.testing.assert_close(torch.cat(_trainer(tmp_path).predict(task, _data())), whole.softmax(1))


def test_mixed_labels_are_trained_on() -> None:
    task = Classification(PreActResNet([1, 1, 1], [4, 8, 16], num_classes=3), Optim(), 3, mixup=0.8, cutmix=1.0)
    batch = {"image": torch.randn(4, 3, 16, 16), "label": torch.tensor([0, 1, 2, 0])}
    assert task.training_step(batch, 0).isfinite()
    assert batch["label"].ndim == 1
    with pytest.raises(ZooError, match="even"):
        task.training_step({key: value[:3] for key, value in batch.items()}, 0)


@pytest.mark.parametrize(("known", "line"), [(0, "toys: has no labels"), (4, "toys has 4 classes, the model 3")])
def test_labels_that_the_classifier_has_not_are_one_line(tmp_path: Path, known: int, line: str) -> None:
    data = L.LightningDataModule.from_datasets(_data().dataset, batch_size=4)
    data.dataset, data.num_classes = "toys", known
    task = Classification(PreActResNet([1, 1, 1], [4, 8, 16], num_classes=3), Optim(), 3)
    for run in (_trainer(tmp_path).fit, _trainer(tmp_path).test):
        with pytest.raises(ZooError, match=line):
            run(task, datamodule=data)


def test_logits_that_are_not_numbers_are_no_hit(tmp_path: Path) -> None:
    task = Classification(PreActResNet([1, 1, 1], [4, 8, 16], num_classes=3), Optim(), 3)
    torch.nn.init.constant_(task.network.fc.bias, torch.nan)
    (scores,) = _trainer(tmp_path).test(task, _data(), verbose=False)
    assert (scores["test/top1"], scores["test/top5"]) == (0, 0)
