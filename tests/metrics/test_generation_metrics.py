"""Scores of generated pictures: the official numbers, what may be called FID, and the protocol by sampling."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import ROOT
from tests.training.sampling_task import METRICS, Painter, data, evaluation, trainer
from zoo import parity
from zoo.errors import ZooError
from zoo.metrics.generation import (
    ClassifierFeatures,
    Extractor,
    GenerationMetrics,
    InceptionFeatures,
    RandomFeatures,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    make_extractor,
    precision_recall,
    read_pictures,
    tf1_resize,
    to_uint8,
)
from zoo.training import EMA, SampleGrid, SamplingEvaluation
from zoo.training.sampling import draw_samples, grid, labels_of, noise_of, reference_statistics

CASES = Path(__file__).parents[1] / "parity" / "cases" / "_generation_common"


def _features(count: int, dim: int = 5, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def _bytes(count: int, seed: int = 0, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


# ----------------------------------------------------------------------------------------------------------- functions


def test_official_numbers() -> None:
    for name in ("fid_isc_kid_prc_from_features", "tf1_bilinear"):
        verdicts = parity.run_case(parity.load(CASES / f"{name}.json"))
        assert verdicts
        assert [verdict.note for verdict in verdicts if not verdict.ok] == []


def test_distances_of_a_set_from_itself() -> None:
    x = _features(60)
    assert frechet_distance(Statistics.of(x), Statistics.of(x)).item() == pytest.approx(0, abs=1e-9)
    assert [share.item() for share in precision_recall(x, x)] == [1.0, 1.0]
    assert precision_recall(x, x + 100)[0] == 0
    mean, _ = kernel_distance(x, x[torch.randperm(60)], subsets=20, subset_size=30)
    far, _ = kernel_distance(x, x + 2, subsets=20, subset_size=30)
    assert abs(mean) < 0.5 < far


def test_frechet_of_gaussians_in_closed_form() -> None:
    """Of commuting covariances the distance is that of the means plus that of the deviations."""
    a = Statistics(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double())
    b = Statistics(torch.tensor([0.0, 2.0]).double(), torch.diag(torch.tensor([1.0, 1.0])).double())
    assert frechet_distance(a, b).item() == pytest.approx(1 + (2 - 1) ** 2 + (3 - 1) ** 2)


def test_the_score_of_sure_and_even_classes_is_their_number() -> None:
    logits = 100 * torch.eye(4, dtype=torch.float64).repeat(50, 1)
    mean, std = inception_score(logits, splits=2)
    assert mean.item() == pytest.approx(4, abs=0.1)
    assert inception_score(torch.zeros(20, 4), splits=2)[0].item() == pytest.approx(1)
    # In the order of their classes the splits hold one class each: what the permutation is there for.
    ordered = logits.argmax(dim=1).argsort()
    assert inception_score(logits[ordered], splits=4, seed=None)[0].item() == pytest.approx(1)
    assert std < 0.1


def test_bytes_by_each_protocol() -> None:
    x = torch.tensor([-1.2, -1.0, -0.004, 0.0, 0.9999, 1.0, 3.0])
    assert to_uint8(x, "adm").tolist() == [0, 0, 127, 128, 255, 255, 255]
    assert to_uint8(x, "round").tolist() == [0, 0, 127, 128, 255, 255, 255]
    assert to_uint8(x, "floor").tolist() == [0, 0, 126, 127, 254, 255, 255]
    with pytest.raises(ZooError, match="rounding"):
        to_uint8(x, "up")  # type: ignore[arg-type]


def test_resize_of_tensorflow_1() -> None:
    reference = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = _bytes(2, side=32)[:, :, :20].float()
    for size in ((299, 299), (40, 64), (9, 17)):
        for corners in (False, True):
            wanted = reference.interpolate_bilinear_2d_like_tensorflow1x(images, size=size, align_corners=corners)
            torch.testing.assert_close(tf1_resize(images, size, corners), wanted, rtol=0, atol=1e-4)
    wanted = reference.interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    assert torch.equal(tf1_resize(images, (299, 299)), wanted)
    assert torch.equal(tf1_resize(images, (20, 32)), images)


# ----------------------------------------------------------------------------------------------------------- statistics


def test_statistics_files_of_every_kind(tmp_path: Path) -> None:
    ours = replace(Statistics.of(_features(30).float(), "mine"), facts={"features": "drawn"})
    ours.write(tmp_path / "ours.npz", features=True)
    back = Statistics.read(tmp_path / "ours.npz")
    assert back.facts == {"features": "drawn"}
    torch.testing.assert_close(back.mean, ours.mean)
    torch.testing.assert_close(back.covariance, ours.covariance)
    assert back.features is not None
    assert torch.equal(back.features, _features(30).float())
    mean, covariance = ours.mean.numpy(), ours.covariance.numpy()
    np.savez(tmp_path / "meanflow.npz", ref_mu=mean, ref_sigma=covariance)
    pictures = _bytes(4).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance, arr_0=pictures)
    for name in ("meanflow", "adm"):
        other = Statistics.read(tmp_path / f"{name}.npz")
        assert frechet_distance(ours, other).item() == pytest.approx(0, abs=1e-9)
        assert (other.features, other.name) == (None, f"{name}.npz")
    assert torch.equal(read_pictures(tmp_path / "adm.npz"), _bytes(4))
    np.savez(tmp_path / "none.npz", mean=mean)
    with pytest.raises(ZooError, match="no mu and sigma"):
        Statistics.read(tmp_path / "none.npz")
    with pytest.raises(ZooError, match="no pictures"):
        read_pictures(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("statistics")
    with pytest.raises(ZooError, match="not a whole npz file"):
        Statistics.read(tmp_path / "text.npz")
    with pytest.raises(ZooError, match="no file"):
        Statistics.read(tmp_path / "nowhere.npz")
    with pytest.raises(ZooError, match="another extractor"):
        frechet_distance(ours, Statistics.of(_features(9, dim=3)))


def test_reference_statistics_by_sums_are_those_of_all_features() -> None:
    module, extractor = data(40), RandomFeatures()
    by_sums = reference_statistics(module, "train", extractor)
    whole = reference_statistics(module, "train", extractor, features=True)
    assert whole.features is not None
    assert whole.features.shape == (40, 256)
    assert by_sums.features is None
    assert by_sums.name == "shapes train, 40 pictures"
    assert by_sums.facts == whole.facts == extractor.facts
    torch.testing.assert_close(by_sums.mean, whole.mean)
    torch.testing.assert_close(by_sums.covariance, whole.covariance)


# ----------------------------------------------------------------------------------------------------------- extractors


def test_inception_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in the published file's layout: the same features and logits for both ways to resize."""
    pytest.importorskip("torch_fidelity", reason="FID wants torch-fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as official

    weights: dict[str, Tensor] = {}

    def no_download(*_: Any, **__: Any) -> dict[str, Tensor]:
        return weights

    monkeypatch.setattr(official, "load_state_dict_from_url", no_download)
    with monkeypatch.context() as patch:  # a network of random weights, to take its layout from
        patch.setattr(official.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        net = official.FeatureExtractorInceptionV3("random", ["2048"], verbose=False)
        for parameter in net.parameters():
            if parameter.ndim > 1:  # else the features of so deep a network vanish
                nn.init.kaiming_normal_(parameter)
    weights.update(net.state_dict())
    torch.save(weights, tmp_path / "inception.pth")
    wanted = official.FeatureExtractorInceptionV3("again", ["2048", "logits_unbiased"], verbose=False)
    images = _bytes(2, side=24)
    ours = InceptionFeatures(str(tmp_path / "inception.pth"))
    monkeypatch.setenv("ZOO_INCEPTION", str(tmp_path / "inception.pth"))
    smooth = InceptionFeatures(resize="antialias")
    with torch.no_grad():
        torch.testing.assert_close(ours(images), wanted(images))
        assert not torch.allclose(smooth(images)[0], ours(images)[0], rtol=1e-3)
    assert not any(module.training for module in ours.train().modules())
    assert ours.facts["resize"] == "tf1"
    assert GenerationMetrics(ours, ["fid"]).label("fid") == "fid"
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ZooError, match="not the weights of FID's Inception"):
        InceptionFeatures(str(tmp_path / "other.pth"))


def test_missing_inception_weights_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity", reason="FID wants torch-fidelity")
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    with pytest.raises(
        ZooError, match=r"no Inception weights, and so no FID: put weights-inception.*extractor: random"
    ):
        InceptionFeatures()
    with pytest.raises(ZooError, match=r"no Inception weights 'nowhere.pth'"):
        InceptionFeatures("nowhere.pth")
    with pytest.raises(ZooError, match="no FID") as caught:
        trainer(SamplingEvaluation(num_samples=4)).validate(Painter(), datamodule=data(), verbose=False)
    assert "\n" not in str(caught.value)


def test_without_torch_fidelity_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ZooError, match=r"pip install 'paperzoo\[generation\]'"):
        InceptionFeatures()


class Plain(nn.Module):
    """A classifier with timm's protocol."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x.mean(dim=(2, 3)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.head(x)


def test_other_features_are_never_called_fid() -> None:
    classifier = ClassifierFeatures(Plain(), "cifar_cnn", (0.5,) * 3, (0.25,) * 3)
    for extractor, name in ((RandomFeatures(), "random"), (classifier, "cifar_cnn")):
        features, _ = extractor(_bytes(30))
        metric = GenerationMetrics(extractor, ["fid", "kid", "precision_recall"], Statistics.of(features, "real"))
        metric.kid_subset_size = 10
        metric.update(_bytes(20, seed=1), torch.arange(20))
        names = {f"frechet_{name}", f"kernel_{name}", f"kernel_std_{name}", f"precision_{name}", f"recall_{name}"}
        assert set(metric.compute()) == names
        assert metric.protocol()["reference"] == "real"
    scored = GenerationMetrics(classifier, ["is"], is_splits=2)
    scored.update(_bytes(20), torch.arange(20))
    assert set(scored.compute()) == {"score_cifar_cnn", "score_std_cifar_cnn"}
    for name in ("inception_v3", "FID"):
        with pytest.raises(ZooError, match="cannot be named"):
            ClassifierFeatures(Plain(), name, (0.5,) * 3, (0.5,) * 3)


def test_random_features_are_the_same_everywhere() -> None:
    features, logits = RandomFeatures()(_bytes(2))
    assert logits is None
    torch.testing.assert_close(features[:, :3], RandomFeatures()(_bytes(2))[0][:, :3])
    probe = torch.linspace(0, 255, 3 * 16 * 16).round().to(torch.uint8).reshape(1, 3, 16, 16)
    wanted = torch.tensor(RANDOM_PROBE)
    torch.testing.assert_close(RandomFeatures()(probe)[0][0, 36:130:31], wanted, rtol=0, atol=1e-4)


RANDOM_PROBE = [0.4739, 0.0912, 0.1564, 0.0]


# --------------------------------------------------------------------------------------------------------------- metric


def test_the_metric_does_not_depend_on_order_batches_and_repeats() -> None:
    reference = Statistics.of(RandomFeatures()(_bytes(40))[0])
    metric = GenerationMetrics("random", METRICS, reference, kid_subset_size=10)
    images = _bytes(24, seed=2)
    metric.update(images, torch.arange(24))
    once = metric.compute()
    metric.reset()
    order = torch.randperm(24)
    for part in (order[:7], order[7:], order[5:9]):
        metric.update(images[part], part)
    again = metric.compute()
    for name, value in once.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("metrics", "reference", "told"),
    [
        (["fid"], None, "fid wants the statistics of real pictures"),
        (["kid"], Statistics(torch.zeros(256), torch.eye(256), None, "adm.npz"), "the reference adm.npz holds their"),
        (
            ["fid"],
            Statistics(torch.zeros(256), torch.eye(256), None, "old.npz", {"features": "vgg"}),
            "reference old.npz was made with .*cannot be compared",
        ),
        (["sfid"], None, "unknown metric of generation 'sfid'"),
        (["is"], None, "come without logits"),
    ],
)
def test_mistakes_are_told(metrics: list[str], reference: Statistics | None, told: str) -> None:
    with pytest.raises(ZooError, match=told):  # noqa: PT012
        metric = GenerationMetrics("random", metrics, reference)
        metric.update(_bytes(6), torch.arange(6))
        metric.compute()


def test_more_mistakes_are_told() -> None:
    metric = GenerationMetrics("random")
    with pytest.raises(ZooError, match="as bytes"):
        metric.update(torch.zeros(1, 3, 8, 8), torch.arange(1))
    with pytest.raises(ZooError, match="update comes first"):
        metric.compute()
    with pytest.raises(ZooError, match="extractor"):
        make_extractor("vgg")
    with pytest.raises(ZooError, match="extractor random"):
        make_extractor("random", depth=3)
    with pytest.raises(ZooError, match="lower kid_subset_size"):
        kernel_distance(_features(5), _features(5))
    assert isinstance(make_extractor(RandomFeatures()), Extractor)


# ------------------------------------------------------------------------------------------------------------- sampling


def test_samples_are_functions_of_their_number() -> None:
    torch.testing.assert_close(noise_of([3, 9], (2, 4)), torch.cat([noise_of([3], (2, 4)), noise_of([9], (2, 4))]))
    assert not torch.equal(noise_of([3], (2, 4), seed=1), noise_of([3], (2, 4)))
    many = noise_of(range(400), (4, 4))
    assert abs(many.mean()) < 0.05
    assert many.std().item() == pytest.approx(1, abs=0.05)
    drawn = labels_of(range(2000), 10, 2000)
    assert drawn is not None
    assert torch.equal(drawn[5:9], torch.as_tensor(labels_of(range(5, 9), 10, 2000)))
    assert torch.bincount(drawn, minlength=10).min() > 140
    even = labels_of(range(20), 10, 20, labels="balanced")
    assert even is not None
    assert even.tolist() == [k // 2 for k in range(20)]
    assert labels_of(range(3), 0, 3) is None


def test_grids_are_drawn_while_training(tmp_path: Path) -> None:
    painter = Painter(num_classes=3)
    ema = EMA(decay=0.5)
    callback = SampleGrid(count=6, columns=3, every_n_steps=2, out=str(tmp_path), classes=[2, 0])
    run = trainer(ema, callback, max_epochs=1, limit_val_batches=0)
    run.fit(painter, datamodule=data(80))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"samples_step{n:07d}.png" for n in (2, 4, 5)]
    from torchvision.io import read_image

    last = read_image(str(tmp_path / "samples_step0000005.png"))
    # Of the averaged weights; a row a class.
    with torch.no_grad(), ema.applied(painter):
        label = torch.tensor([2, 2, 2, 0, 0, 0])
        wanted = grid(draw_samples(painter, range(6), "cpu", 0, label), 3)
    assert torch.equal(last, wanted)
    assert last.shape == (3, 2 + 2 * 66, 2 + 3 * 66)


def test_predicting_draws_a_grid(tmp_path: Path) -> None:
    trainer(SampleGrid(count=4, out=str(tmp_path))).predict(
        Painter(num_classes=0), datamodule=data(), return_predictions=False
    )
    assert [path.name for path in tmp_path.iterdir()] == ["samples_step0000000.png"]


def test_evaluation_by_sampling_follows_learning() -> None:
    """The distance falls as the colours are learned; training measures `val_samples`, validation all."""
    painter, callback = Painter(), evaluation(val_samples=20, metrics=["fid"], every_n_epochs=2)
    before = trainer(evaluation(metrics=["fid"])).validate(painter, datamodule=data(), verbose=False)[0]
    run = trainer(callback, max_epochs=2)
    run.fit(painter, datamodule=data(160))
    assert "val/frechet_random" in run.callback_metrics
    after = trainer(callback).validate(painter, datamodule=data(), verbose=False)[0]
    assert after["val/frechet_random"] < 0.8 * before["val/frechet_random"]
    facts = callback.protocol()
    assert facts["num_samples"] == 45
    assert facts["reference"].startswith("shapes train, 160 pictures")
    assert facts["features"].startswith("random convolutions")


def test_without_pictures_a_reference_must_be_a_file() -> None:
    class Latents(L.LightningDataModule):
        def val_dataloader(self) -> list[Tensor]:
            return [torch.zeros(1)]

    with pytest.raises(ZooError, match=r"reference: train wants a data module of pictures; name a file"):
        trainer(evaluation()).validate(Painter(), datamodule=Latents(), verbose=False)


def test_a_reference_with_pictures_serves_every_metric(tmp_path: Path) -> None:
    """ADM's files hold statistics and some of the pictures."""
    pictures = _bytes(30, side=32)
    real = Statistics.of(RandomFeatures()(pictures)[0])
    real.write(tmp_path / "plain.npz")
    arrays = {"mu": real.mean.numpy(), "sigma": real.covariance.numpy()}
    np.savez(tmp_path / "adm.npz", arr_0=pictures.permute(0, 2, 3, 1).numpy(), **arrays)
    callback = evaluation(reference=str(tmp_path / "adm.npz"))
    found = trainer(callback).validate(Painter(), datamodule=data(), verbose=False)[0]
    samples = to_uint8(draw_samples(Painter(), range(45), "cpu", 0, labels_of(range(45), 10, 45)))
    features = RandomFeatures()(samples)[0]
    assert found["val/frechet_random"] == pytest.approx(
        frechet_distance(Statistics.of(features), real).item(), rel=1e-5
    )
    assert found["val/recall_random"] == precision_recall(features, RandomFeatures()(pictures)[0])[1]
    with pytest.raises(ZooError, match=r"want features or pictures of the reference; .*plain.npz holds"):
        trainer(evaluation(reference=str(tmp_path / "plain.npz"))).validate(Painter(), datamodule=data(), verbose=False)


def test_a_task_that_does_not_sample_is_told() -> None:
    class Silent(Painter):
        noise_shape = property()  # type: ignore[assignment]

    with pytest.raises(ZooError, match="Silent does not sample: it has no noise_shape"):
        trainer(SampleGrid()).validate(Silent(), datamodule=data(), verbose=False)
    with pytest.raises(ZooError, match="there is no class 7"):
        SampleGrid(classes=[7]).sheet(Painter(num_classes=3), "cpu")
    with pytest.raises(ZooError, match="num_samples must be at least 1"):
        SamplingEvaluation(num_samples=0)


class Shaded(Painter):
    """Paints darker by a setting."""

    sampling_options = ("shade", "interval", "steps")

    def sample(self, noise: Tensor, label: Tensor | None, shade: float = 0.0) -> Tensor:
        return (super().sample(noise, label) - shade).clamp(-1, 1)


def test_a_sweep_finds_the_setting_that_the_evaluation_takes(tmp_path: Path, capsys: Any) -> None:
    sweep = {"samples": 12, "shade": [0.5, 0.0, 1.0], "average": ["ema", "raw"]}
    callback = evaluation(metrics=["fid"], sweep=sweep)
    ema, model = EMA(), Shaded()
    ema.start(model)
    ema.weights["colour"] = torch.full_like(model.colour, 1.0)  # white
    run = trainer(callback, ema, default_root_dir=tmp_path)
    run.test(model, datamodule=data(), verbose=False)
    assert [(row["shade"], row["average"]) for row in callback.table] == list(
        itertools.product(*list(sweep.values())[1:])
    )
    scores = [row["frechet_random"] for row in callback.table]
    assert len(set(scores)) == 6
    assert callback.best == {name: callback.table[scores.index(min(scores))][name] for name in ("shade", "average")}
    again = callback.evaluate(run, model, 45, callback.best)["frechet_random"]
    assert run.callback_metrics["test/frechet_random"].item() == pytest.approx(again.item())
    assert json.loads((tmp_path / "sweep.json").read_text()) == callback.results()["sweep"]
    assert callback.protocol()["sampled_with"] == callback.best
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sweep, 12 samples each:"
    assert lines[2 + scores.index(min(scores))].endswith("  best")
    assert model.colour.equal(torch.zeros_like(model.colour))


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({}, "a sweep wants lists of values"),
        ({"shade": 1.0}, "shade wants a list of values"),
        ({"shade": [1.0], "samples": 1}, "samples must be a number of 2 or more"),
        ({"shades": [1.0]}, "unknown sampling option of Shaded 'shades'.*shade"),
        ({"shade": [1.0, "dark"]}, "a value of shade is a number, not 'dark'"),
        ({"interval": [0.1, 1.0]}, "a value of interval is two times that rise"),
        ({"steps": [0]}, "a value of steps is a whole number of 1 or more"),
        ({"average": [1]}, "a value of average is a name"),
        ({"average": ["ema"]}, "unknown average 'ema'"),
    ],
)
def test_a_sweep_that_cannot_be_is_told(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        trainer(evaluation(sweep=sweep)).test(Shaded(), datamodule=data(), verbose=False)


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    results = []
    for devices in (1, 2):
        out = tmp_path / f"{devices}.json"
        command = [sys.executable, "-m", "tests.training.sampling_task", str(devices), str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
    assert results[0] == pytest.approx(results[1], rel=1e-5, abs=1e-7)
    scores = {f"test/{name}_random" for name in ("frechet", "kernel", "kernel_std", "precision", "recall")}
    assert set(results[0]) == {*scores, "mean", "covariance"}


OWN_PAPER = """
import torch
from zoo.nn.autoencoder import AutoencoderKL

class Blobs(torch.nn.Module):
    autoencoder = "decoder.pth"
    noise_shape = (4, 4, 4)
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.colour = torch.nn.Parameter(torch.zeros(3, 4, 1, 1))

    def sample(self, noise, label):
        return self.colour[label] + noise

def blobs(**overrides):
    return Blobs(**overrides)

def silent(**overrides):
    return torch.nn.Linear(1, 1)

def convert_official(state):
    return state
"""


def test_a_published_model_draws_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.io import read_image

    from zoo.command.cli import main
    from zoo.nn.autoencoder import AutoencoderKL

    monkeypatch.setenv("ZOO_PAPERS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs_paper.py").write_text(OWN_PAPER)
    facts = {"slug": "blobs_paper", "field": "generation", "title": "Blobs", "authors": ["A"], "year": 2026}
    facts |= {"summary": "A test's.", "models": [{"name": name, "params": 12} for name in ("blobs", "silent")]}
    (tmp_path / "blobs_paper.yaml").write_text(json.dumps(facts))
    torch.manual_seed(0)
    torch.save(AutoencoderKL(width=32, channel_mult=(1, 1), depth=1).state_dict(), "decoder.pth")
    torch.save({"colour": torch.randn(3, 4, 1, 1)}, "blobs.pth")
    words = ["predict", "blobs", "--weights", "blobs.pth", "--count", "6"]
    assert main([*words, "--classes", "2", "0", "-o", "sheet.png"]) == 0
    assert "blobs: sheet.png" in capsys.readouterr().out
    sheet = read_image("sheet.png")
    assert sheet.shape == (3, 2 + 2 * 66, 2 + 3 * 66)
    assert main(words) == 0
    assert not torch.equal(read_image("blobs.png"), sheet)  # of the first classes
    assert main([*words, "-o", "samples"]) == 2
    assert "drawn into a .png" in capsys.readouterr().err
    assert main([*words, "--classes", "7"]) == 2
    assert "no class 7" in capsys.readouterr().err
    torch.save(torch.nn.Linear(1, 1).state_dict(), "silent.pth")
    assert main(["predict", "silent", "--weights", "silent.pth"]) == 2
    assert "makes nothing without pictures" in capsys.readouterr().err
    assert main(["predict", "silent", "one.png", "--count", "3"]) == 2
    assert "which want no pictures" in capsys.readouterr().err
