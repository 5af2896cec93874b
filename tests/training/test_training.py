"""Base module, averaging, guard, probes and timing in real Lightning runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import read_image

from tests.conftest import ROOT
from tests.training import training_task
from tests.training.training_task import CLASSES, OPTIM, Blobs, Classifier, Data, trainer
from zoo.data.datamodule import ImageDataModule
from zoo.errors import ZooError
from zoo.metrics import KNNAccuracy, knn_scores
from zoo.training import (
    EMA,
    KNNProbe,
    LinearProbe,
    NonFiniteGuard,
    Optim,
    Pictures,
    Timing,
    choose_average,
    default_callbacks,
    evaluation_weights,
    half_life_decay,
)
from zoo.training import fit_probe as train_probe
from zoo.training.probe import _loader, topk_accuracy


def fresh(kind: type[Classifier] = Classifier, **options: Any) -> Any:
    L.seed_everything(0, verbose=False)
    return kind(**options)


def saver(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, enable_version_counter=False, **options)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# --- base module -------------------------------------------------------------------------------------------------


def test_a_step_depends_on_its_position_not_on_what_ran_before() -> None:
    plain, disturbed = fresh(noise=0.5), fresh(noise=0.5)

    class Disturb(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.rand(7)

    trainer().fit(plain, Data())
    trainer(callbacks=[Disturb()]).fit(disturbed, Data())
    assert same(plain.state_dict(), disturbed.state_dict())


def test_resumed_run_ends_bit_identical_average_included(tmp_path: Path) -> None:
    whole, ema = fresh(noise=0.5), EMA(0.9)
    trainer(max_epochs=3, callbacks=[ema]).fit(whole, Data())

    trainer(max_epochs=1, callbacks=[EMA(0.9), saver(tmp_path)], enable_checkpointing=True).fit(
        fresh(noise=0.5), Data()
    )
    torch.manual_seed(99)
    resumed, resumed_ema = Classifier(noise=0.5), EMA(0.9)
    trainer(max_epochs=3, callbacks=[resumed_ema]).fit(resumed, Data(), ckpt_path=tmp_path / "last.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(ema.weights, resumed_ema.weights)


def test_resumed_schedule_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rates: list[list[float]] = []

    class Watch(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            rates.append([])

        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
            rates[-1].append(optimizer.param_groups[0]["lr"])

    optim = Optim(lr=0.01, warmup_epochs=1, global_batch=48)

    class Stop(L.Callback):  # as a kill does, with the schedule's end still ahead
        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            trainer.should_stop = True

    trainer(max_epochs=4, callbacks=[Watch()]).fit(fresh(optim=optim), Data())
    trainer(max_epochs=4, callbacks=[Watch(), Stop(), saver(tmp_path)], enable_checkpointing=True).fit(
        fresh(optim=optim), Data()
    )
    trainer(max_epochs=4, callbacks=[Watch()]).fit(fresh(optim=optim), Data(), ckpt_path=tmp_path / "last.ckpt")
    assert len(rates[1]) == 5
    assert rates[1] + rates[2] == rates[0]


def test_loss_is_logged_undivided_under_accumulation() -> None:
    run = trainer(max_epochs=1, accumulate_grad_batches=2)
    run.fit(fresh(optim=Optim(lr=1e-9, schedule="constant")), Data())
    one = trainer(max_epochs=1)
    one.fit(fresh(optim=Optim(lr=1e-9, schedule="constant")), Data())
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(
        float(one.callback_metrics["train/loss"]), rel=1e-4
    )
    assert float(run.callback_metrics["train/lr"]) == pytest.approx(1e-9)


class WithHparams(Classifier):
    def __init__(self, optim: Optim = OPTIM) -> None:
        super().__init__(optim)
        self.save_hyperparameters()


def test_checkpoints_hold_plain_types_only(tmp_path: Path) -> None:
    callbacks = [*default_callbacks(), EMA(0.9), saver(tmp_path)]
    trainer(max_epochs=1, callbacks=callbacks, enable_checkpointing=True).fit(WithHparams(Optim(name="lars")), Data())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["optim"]["name"] == "lars"
    assert WithHparams.load_from_checkpoint(tmp_path / "last.ckpt").optim == Optim(name="lars")


# --- average -----------------------------------------------------------------------------------------------------


def test_average_equals_weights_at_the_start_and_follows_its_rule() -> None:
    module, ema = fresh(), EMA(0.9)
    expected: dict[str, Tensor] = {}

    class Watch(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            assert same(ema.weights, module.state_dict())
            expected.update({name: value.clone() for name, value in module.state_dict().items()})

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx % 2:  # an optimiser step every second batch
                for name, value in module.state_dict().items():
                    average = 0.9 * expected[name] + 0.1 * value if value.is_floating_point() else value.clone()
                    expected[name] = average

    trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[Watch(), ema]).fit(module, Data())
    assert ema.weights["body.1.num_batches_tracked"] == 10
    for name, value in expected.items():
        torch.testing.assert_close(ema.weights[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_two_named_sets_in_a_checkpoint_and_evaluation_on_the_average(tmp_path: Path) -> None:
    module, ema = fresh(), EMA(0.5)
    trainer(max_epochs=1, callbacks=[ema, saver(tmp_path)], enable_checkpointing=True).fit(module, Data())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    raw, average = checkpoint["state_dict"], checkpoint["ema_state_dict"]
    assert same(raw, module.state_dict())
    assert same(average, ema.weights)
    assert not raw["head.weight"].equal(average["head.weight"])
    assert module.validated[-1].equal(average["head.weight"])  # validation, right before the checkpoint

    tested = Classifier()
    trainer(callbacks=[EMA(0.5)]).test(tested, Data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert tested.validated[-1].equal(average["head.weight"])
    assert same(tested.state_dict(), raw)

    tested = Classifier()
    trainer(callbacks=[EMA(0.5, evaluate=False)]).test(tested, Data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert tested.validated[-1].equal(raw["head.weight"])


def test_several_averages_of_one_run(tmp_path: Path) -> None:
    options = {"every_n_steps": 2, "per_step": True}
    averages = [EMA(0.5, name="ema", **options), EMA(0.9, name="ema_9", evaluate=False, **options), EMA(0.1, name="x")]
    module = fresh()
    trainer(max_epochs=1, callbacks=[*averages, saver(tmp_path)], enable_checkpointing=True).fit(module, Data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert module.validated[-1].equal(saved["ema_state_dict"]["head.weight"])  # the first that evaluates
    raw = saved["state_dict"]["head.weight"]
    distances = [(saved[f"{name}_state_dict"]["head.weight"] - raw).norm() for name in ("x", "ema", "ema_9")]
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize(("chosen", "key"), [("ema_500", "ema_500_state_dict"), ("raw", "state_dict"), (None, None)])
def test_an_average_is_chosen_by_name(tmp_path: Path, chosen: str | None, key: str | None) -> None:
    options = [{"half_life": 500.0, "name": "ema_500"}, {"half_life": 5.0, "ramp": None, "name": "ema_5"}]
    trainer(max_epochs=1, callbacks=[*[EMA(**o) for o in options], saver(tmp_path)], enable_checkpointing=True).fit(
        fresh(), Data()
    )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    tested, callbacks = Classifier(), [EMA(**o) for o in reversed(options)]
    choose_average(callbacks, chosen)
    run = trainer(callbacks=callbacks)
    run.test(tested, Data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert tested.validated[-1].equal(saved[key or "ema_5_state_dict"]["head.weight"])
    for name in ("ema_5", "raw"):  # inside an evaluation that has taken another
        callbacks[1].on_test_start(run, tested)
        with evaluation_weights(run, tested, name):
            assert tested.head.weight.equal(
                saved["state_dict" if name == "raw" else f"{name}_state_dict"]["head.weight"]
            )
        callbacks[1].on_test_end(run, tested)
        assert tested.head.weight.equal(saved["state_dict"]["head.weight"])


def test_a_half_life_counts_images_of_the_effective_batch() -> None:
    module, ema = fresh(), EMA(half_life=100.0, ramp=0.5)
    seen: list[Tensor] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx % 2:
                seen.append(module.head.weight.detach().clone())

    start = module.head.weight.detach().clone()
    data = Data()
    trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[Watch(), ema]).fit(module, data)
    average, batch = start, 2 * data.batch_size
    for step, value in enumerate(seen, start=1):
        decay = 0.5 ** (batch / min(100.0, 0.5 * step * batch))
        average = decay * average + (1 - decay) * value
    assert ema.batch == batch
    torch.testing.assert_close(ema.weights["head.weight"], average)
    assert half_life_decay(400_000, 2e6, 1024) == pytest.approx(0.5 ** (1024 / 2e6))
    assert half_life_decay(0, 2e6, 1024) == 0


def test_an_average_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"unknown average 'ema_7'.*ema"):
        choose_average([EMA()], "ema_7")
    with pytest.raises(ZooError, match="an average cannot be named 'raw'"):
        EMA(name="raw")
    with pytest.raises(ZooError, match="wants it and its ramp positive"):
        EMA(half_life=0.0)
    trainer(max_epochs=1, callbacks=[saver(tmp_path)], enable_checkpointing=True).fit(fresh(), Data())
    callbacks = [EMA(name="ema_9")]
    choose_average(callbacks, "ema_9")
    trainer(callbacks=callbacks).test(Classifier(), Data(), verbose=False)  # it would begin so
    with (
        pytest.warns(UserWarning, match="ema_9_state_dict"),
        pytest.raises(ZooError, match="there is no average 'ema_9'"),
    ):
        trainer(callbacks=callbacks).test(Classifier(), Data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_a_checkpoint_without_average_is_used_raw_with_a_warning(tmp_path: Path) -> None:
    trainer(max_epochs=1, callbacks=[saver(tmp_path)], enable_checkpointing=True).fit(fresh(), Data())
    tested = Classifier()
    with pytest.warns(UserWarning, match="ema_state_dict"):
        trainer(callbacks=[EMA()]).test(tested, Data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert tested.validated[-1].equal(tested.head.weight)


def test_an_average_of_another_model_is_refused() -> None:
    ema = EMA()
    ema.weights = {"other": torch.zeros(1)}
    with pytest.raises(ZooError, match="do not belong"):
        trainer(callbacks=[ema]).fit(fresh(), Data())


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_every_precision_trains_averages_and_probes(precision: Any) -> None:
    module, ema = fresh(optim=Optim(lr=0.05)), EMA(0.999)
    callbacks = [*default_callbacks(), ema, KNNProbe(k=10), LinearProbe(batch_size=48)]
    run = trainer(callbacks=callbacks, precision=precision, gradient_clip_val=1.0)
    run.fit(module, Data())
    assert float(run.callback_metrics["probe_top1"]) > 0.5
    raw, average = module.head.weight, ema.weights["head.weight"]
    assert raw.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert average.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    start = fresh(optim=Optim()).head.weight.to(raw.dtype).to(average.dtype)
    moved = (average - start).norm() / (raw.to(average.dtype) - start).norm()
    assert 0 < moved < 0.05  # 20 steps of a thousandth of the way


# --- guard -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 7])
def test_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path, every: int | None) -> None:
    save = saver(tmp_path, every_n_train_steps=2)
    run = trainer(callbacks=[NonFiniteGuard(every), save], enable_checkpointing=True)
    with pytest.raises(ZooError, match=r"not finite at step 13.*last\.ckpt"):
        run.fit(fresh(break_at=13), Data())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_broken_weights_are_never_saved(tmp_path: Path) -> None:
    class Break(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Classifier) -> None:
            if trainer.current_epoch == 1:
                module.head.weight.data[0, 0] = float("inf")

    run = trainer(callbacks=[Break(), saver(tmp_path, save_weights_only=True)], enable_checkpointing=True)
    with pytest.raises(ZooError, match=r"non-finite weights at step 20 \(head.weight"):
        run.fit(fresh(), Data())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 10
    assert checkpoint["state_dict"]["head.weight"].isfinite().all()


# --- probes and pictures -----------------------------------------------------------------------------------------


def test_probe_trains_a_good_head_the_same_each_time() -> None:
    train, held = (next(iter(DataLoader(Blobs(split, 600), 600))) for split in (0, 1))
    features, labels = train["image"], train["label"]
    rng = torch.random.get_rng_state()
    heads = [train_probe(features, labels, CLASSES, batch_size=64) for _ in range(2)]
    assert rng.equal(torch.random.get_rng_state())
    assert same(heads[0].state_dict(), heads[1].state_dict())
    accuracy = topk_accuracy(heads[0](held["image"]), held["label"])
    assert accuracy["top1"] > 0.85
    assert accuracy["top5"] >= accuracy["top1"]


def test_topk_counts_what_is_there() -> None:
    logits = torch.eye(3)
    assert topk_accuracy(logits, torch.tensor([0, 1, 0])) == {"top1": pytest.approx(2 / 3), "top5": 1.0}


def test_linear_and_knn_probe_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, logger = fresh(), CSVLogger(tmp_path)
    probe = LinearProbe(batch_size=48)
    run = trainer(callbacks=[EMA(0.5), KNNProbe(k=10, every_n_epochs=2), probe], logger=logger)
    run.fit(module, Data())
    assert module.body[1].training
    assert 0.8 < float(run.callback_metrics["probe_top1"]) <= float(run.callback_metrics["probe_top5"]) <= 1
    assert 0.8 < float(run.callback_metrics["knn_top1"]) <= 1
    assert "probe_top1" in Path(logger.log_dir, "metrics.csv").read_text()
    assert "linear probe on val: top-1" in capsys.readouterr().out
    (tested,) = run.test(module, Data(), verbose=False)
    assert 0.8 < tested["probe_top1"] <= 1
    assert "linear probe on test" in capsys.readouterr().out
    (validated,) = run.validate(module, Data(), verbose=False)
    assert validated["probe_top1"] == pytest.approx(float(run.callback_metrics["probe_top1"]))


def test_probe_does_not_touch_the_training(tmp_path: Path) -> None:
    plain, probed = fresh(noise=0.5), fresh(noise=0.5)
    trainer().fit(plain, Data())
    trainer(callbacks=[KNNProbe(), LinearProbe(epochs=2, warmup_epochs=0)]).fit(probed, Data())
    assert same(plain.state_dict(), probed.state_dict())


def test_pictures_are_written_and_their_path_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(max_epochs=1, callbacks=[Pictures(str(tmp_path), count=5)]).fit(fresh(), Data())
    (path,) = tmp_path.glob("*.png")
    assert str(path) in capsys.readouterr().out
    assert read_image(str(path)).shape == (3, 5, 16)


def test_default_folder_of_pictures_is_the_run(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(max_epochs=2, callbacks=[Pictures(every_n_epochs=1)], logger=logger).fit(fresh(), Data())
    assert len(list(Path(logger.log_dir, "pictures").glob("*.png"))) == 2


def test_times_of_data_and_compute_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("zoo.training.callbacks.time.perf_counter", lambda: float(next(clock)))
    run = trainer(max_epochs=1, callbacks=[Timing()], limit_val_batches=0)
    run.fit(fresh(), Data())  # 10 batches, one tick a look at the clock
    assert float(run.callback_metrics["time/data"]) == 10
    assert float(run.callback_metrics["time/compute"]) == 10
    samples = len(Data().train_dataloader().dataset)  # type: ignore[arg-type]
    assert float(run.callback_metrics["speed/samples_per_s"]) == samples / 20
    assert 10 < float(run.callback_metrics["memory/peak_mib"]) < 1e6


# --- kNN metric --------------------------------------------------------------------------------------------------


def test_knn_votes_by_hand() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], dtype=torch.float64)
    query = torch.tensor([[5.0, 0.0]], dtype=torch.float64)
    scores = knn_scores(query, bank, torch.tensor([0, 1, 1]), 3, k=2, temperature=0.5)
    expected = torch.tensor([[2.0, 2**0.5, 0.0]], dtype=torch.float64).exp()
    expected[0, 2] = 0
    torch.testing.assert_close(scores, expected)
    everyone = knn_scores(query, bank, torch.tensor([0, 1, 1]), 3, k=200, temperature=0.5)
    assert everyone[0, 1] == pytest.approx(expected[0, 1].item() + 1.0)


def test_knn_metric_counts_over_chunks_and_refuses_emptiness() -> None:
    metric = KNNAccuracy(num_classes=7, k=1, chunk=2)
    with pytest.raises(ZooError, match="KNNAccuracy has seen no feature"):
        metric.compute()
    eye = torch.eye(7)
    metric.update_bank(eye[:4], torch.arange(4))
    metric.update_bank(eye[4:], torch.arange(4, 7))
    metric.update(eye[:3], torch.tensor([0, 1, 6]))
    metric.update(eye[3:5], torch.tensor([3, 4]))
    assert metric.compute()["top1"] == pytest.approx(4 / 5)
    synced = KNNAccuracy(num_classes=7, k=1)
    synced.updates = metric.updates
    for name in ("bank_features", "bank_labels", "query_features", "query_labels"):
        setattr(synced, name, torch.cat(getattr(metric, name)))  # as other processes' states leave them
    assert synced.compute() == metric.compute()
    metric.reset()
    assert metric.bank_features == []


# --- two processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_average_and_probe_as_one(tmp_path: Path) -> None:
    training_task.main(1, str(tmp_path / "1.pt"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.training_task", "2", str(tmp_path / "2.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert done.stdout.count("linear probe on val") == 1
    one, two = (torch.load(tmp_path / f"{devices}.pt", weights_only=True) for devices in (1, 2))
    for part in ("weights", "ema"):
        for name in one[part]:
            torch.testing.assert_close(two[part][name], one[part][name], rtol=1e-9, atol=1e-12)
    assert two["fit"] == pytest.approx(one["fit"], rel=1e-6)
    assert two["test"] == pytest.approx(one["test"], rel=1e-6)
    assert one["fit"]["probe_top1"] > 0.7


# --- with the house's data module --------------------------------------------------------------------------------


class Pixels(Classifier):
    """The small classifier on 8 means of a picture."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step({**batch, "image": batch["image"].flatten(1)[:, ::400][:, :8]}, batch_idx)


def shapes() -> ImageDataModule:
    return ImageDataModule("shapes", batch_size=4, train_samples=60, image_size=32, num_workers=0)


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_resume_inside_an_epoch_is_exact_under_accumulation(tmp_path: Path, stop: int) -> None:
    optim = Optim(lr=0.01, warmup_epochs=1, global_batch=12)  # 15 batches, 5 updates an epoch
    data = shapes()
    classes = data.num_classes

    def task() -> Pixels:
        module = fresh(kind=Pixels, optim=optim, noise=0.3)
        module.head = torch.nn.Linear(16, classes)
        torch.nn.init.ones_(module.head.weight)
        return module

    def fit(module: Pixels, *callbacks: L.Callback, **options: Any) -> None:
        run = trainer(max_epochs=2, callbacks=list(callbacks), enable_checkpointing=True, limit_val_batches=0)
        run.fit(module, shapes(), **options)
        assert run.accumulate_grad_batches == 3

    whole, ema = task(), EMA(0.8)
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(whole, ema, keep)
    resumed, resumed_ema = task(), EMA(0.8)
    fit(resumed, resumed_ema, ModelCheckpoint(tmp_path / "b"), ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(ema.weights, resumed_ema.weights)


def test_probe_sees_clean_training_samples() -> None:
    data, state = shapes(), SimpleNamespace(fn=TrainerFn.FITTING)
    run: Any = SimpleNamespace(datamodule=data, global_rank=0, world_size=1, state=state)
    seen = list(_loader(run, "train"))
    assert torch.cat([batch["index"] for batch in seen]).tolist() == list(range(60))
    clean = data.samples("train", train_transform=False).__getitems__(list(range(4)))
    assert seen[0]["image"].equal(clean["image"])
