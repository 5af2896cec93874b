"""The trainer of parity cases against plain loops: groups, accumulation, clipping, averages, two optimisers."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from zoo import parity
from zoo.errors import ZooError
from zoo.training import EMA, BaseModule, Optim, lr_at

OFFICIAL = {"repo": "owner/name", "commit": "1" * 40, "entry": "loop"}


# The "official" network keeps kernels as (in, out), and two of them apart that ours has as one.
def _official_forward(p: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.cat([x @ p["query/kernel"], x @ p["key/kernel"]], dim=1) + p["scale"]
    return hidden.tanh() @ p["out/kernel"] + p["out/bias"]


SHAPES = {"query/kernel": (3, 2), "key/kernel": (3, 2), "scale": (4,), "out/kernel": (4, 2), "out/bias": (2,)}


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Linear(3, 4, bias=False)
        self.scale = nn.Parameter(torch.zeros(4))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.joint(x) + self.scale).tanh())


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "joint.weight": torch.cat([state["query/kernel"].T, state["key/kernel"].T]),
        "scale": state["scale"],
        "out.weight": state["out/kernel"].T,
        "out.bias": state["out/bias"],
    }


class _Task(BaseModule):
    def __init__(self, optim: Optim) -> None:
        super().__init__(optim)
        self.network = _Network()

    def trainable(self) -> nn.Module:
        return self.network

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        pred = self.network(batch["image"])
        self.log("train/size", pred.abs().mean())
        return {"loss": mse_loss(pred, batch["target"]), "largest": pred.abs().max()}


TRAIN = {"batch_size": 4, "iters_per_epoch": 4, "epochs": 3, "iterations": 8, "accum": 2, "clip": 0.05, "lr": 0.1}
OPTIM = Optim(lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), warmup_epochs=1)
SERIES = ("loss", "lr", "lr_group_0", "lr_group_1", "weight_decay_per_group", "grad_norm_before_clipping")


def _loop(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Any]:
    p = {name: value.clone().requires_grad_() for name, value in state.items()}
    groups = [[p[n] for n in ("query/kernel", "key/kernel", "out/kernel")], [p["scale"], p["out/bias"]]]
    optimizer = torch.optim.AdamW(
        [{"params": part, "weight_decay": decay} for part, decay in zip(groups, (0.3, 0.0), strict=True)],
        betas=(0.8, 0.9),
    )
    average = {name: value.detach().clone() for name, value in p.items()}
    series: dict[str, list[Any]] = {name: [] for name in (*SERIES, "loss:largest", "size")}
    for k in range(TRAIN["iterations"]):
        if k % TRAIN["accum"] == 0:
            rate = lr_at(OPTIM, k / TRAIN["iters_per_epoch"], TRAIN["epochs"], TRAIN["lr"])
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = rate
                series[f"lr_group_{i}"].append(rate)
            series["lr"].append(rate)
        pred = _official_forward(p, inputs[f"x_{k}"])
        loss = mse_loss(pred, inputs[f"y_{k}"])
        (loss / TRAIN["accum"]).backward()
        series["loss"].append(loss.item())
        series["loss:largest"].append(pred.abs().max().item())
        series["size"].append(pred.abs().mean().item())
        if (k + 1) % TRAIN["accum"] == 0:
            gradients = {f"grad:{name}": value.grad.clone() for name, value in p.items()}
            series["grad_norm_before_clipping"].append(nn.utils.clip_grad_norm_(list(p.values()), TRAIN["clip"]))
            optimizer.step()
            optimizer.zero_grad()
            average = {name: 0.7 * value + 0.3 * p[name].detach() for name, value in average.items()}
    series["weight_decay_per_group"] = [0.3, 0.0]
    return {
        **{name: torch.tensor(values) for name, values in series.items()},
        "loss_step3": torch.tensor(series["loss"][3]),
        "weight_decay_by_sorted_name": torch.tensor([0.3, 0.0, 0.3, 0.3, 0.0]),
        **gradients,
        **{f"param:{name}": value for name, value in p.items()},
        **{f"ema:{name}": value for name, value in average.items()},
        "eval_pred": _official_forward(average, inputs["x_eval"]),
    }


def _case(compute: Any, state: dict[str, Any], inputs: dict[str, Any], config: dict[str, Any]) -> parity.Case:
    case = parity.make("toy", "run", OFFICIAL, compute, state=state, inputs=inputs, config=config)
    return {**case, "device": "cpu"}


def _inputs(count: int) -> dict[str, Any]:
    steps = {f"{name}_{k}": ([4, n], "normal") for k in range(count) for name, n in (("x", 3), ("y", 2))}
    return {**steps, "x_eval": ([5, 3], "normal")}


def _differing(case: parity.Case, outputs: dict[str, Tensor]) -> dict[str, str | None]:
    notes = {n: parity.compare(d, outputs[n]) if n in outputs else "absent" for n, d in case["outputs"].items()}
    return {name: note for name, note in notes.items() if note}


def _ours(case: parity.Case, **options: Any) -> dict[str, Tensor]:
    task, ema = _Task(OPTIM), EMA(0.7)

    def after() -> dict[str, Tensor]:
        with ema.applied(task):
            return {"eval_pred": task.network(parity.filled_inputs(case)["x_eval"])}

    options = {"accumulate_grad_batches": TRAIN["accum"], "gradient_clip_val": TRAIN["clip"], **options}
    names = {"x": "image", "y": "target"}
    return parity.train(case, task, _convert, names, averages={"ema": ema}, after=after, **options)


@pytest.fixture(scope="module")
def case() -> parity.Case:
    config = {"train": TRAIN, "group_first_parameter": ["query/kernel", "scale"]}
    return _case(_loop, SHAPES, _inputs(TRAIN["iterations"]), config)


def test_a_run_equals_the_plain_loop(case: parity.Case) -> None:
    outputs = _ours(case)
    assert not _differing(case, outputs)
    assert {"grad:key/kernel", "ema:query/kernel", "loss_step3"} <= outputs.keys()


def test_a_run_that_differs_is_found(case: parity.Case) -> None:
    differing = _differing(case, _ours(case, gradient_clip_val=None))
    assert {"param:out/bias", "ema:scale"} <= differing.keys()
    assert "lr" not in differing


class _Adversaries(L.LightningModule):
    """Two optimisers in turn, each clipped by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.gen, self.dis = nn.Linear(3, 2, dtype=torch.float64), nn.Linear(2, 1, dtype=torch.float64)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr) for part, lr in ((self.gen, 0.1), (self.dis, 0.2))]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        side = 1 - batch_idx % 2
        optimizer: Any = self.optimizers()[side]  # type: ignore[index]
        score = self.dis(self.gen(batch["image"])).mean()
        loss = score if side else score.square()
        self.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()
        return {"loss": loss, "is_discriminator_step": torch.tensor(float(side))}


def test_two_optimisers_are_recorded_in_the_order_of_their_steps() -> None:
    def loop(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Any]:
        task = _Adversaries()
        task.load_state_dict(state)
        optimizers = task.configure_optimizers()
        losses, norms = [], []
        for k in range(4):
            side = 1 - k % 2
            score = task.dis(task.gen(inputs[f"x_{k}"])).mean()
            losses.append(score if side else score.square())
            task.zero_grad()
            losses[-1].backward()
            own = list((task.gen, task.dis)[side].parameters())
            norms.append(nn.utils.clip_grad_norm_(own, 0.1))
            optimizers[side].step()
        return {
            "loss": torch.stack(losses),
            "grad_norm_before_clipping": torch.stack(norms),
            "is_discriminator_step": torch.tensor([1.0, 0.0, 1.0, 0.0]),
            "lr_group_0": torch.tensor([0.1, 0.1]),
            "lr_group_1": torch.tensor([0.2, 0.2]),
            **{f"param:{name}": value for name, value in task.state_dict().items()},
        }

    inputs = {f"x_{k}": ([4, 3], "normal") for k in range(4)}
    case = _case(loop, dict(_Adversaries().state_dict()), inputs, {})
    task = _Adversaries()
    assert not _differing(case, parity.train(case, task, lambda state: state, {"x": "image"}, network=task))


def test_epochs_may_lie_apart_and_averages_may_begin_with_weights_of_their_own() -> None:
    optim = Optim(
        name="sgd", lr=0.1, weight_decay=0.0, schedule="step", interval="epoch", milestones=(3, 6), no_decay="none"
    )

    class Still(BaseModule):
        def __init__(self) -> None:
            super().__init__(optim)
            self.network = nn.Linear(3, 1, bias=False)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return 0 * self.network(batch["image"]).sum()

    def rates(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Any]:
        slow, net = state["slow.weight"], state["net.weight"]
        return {
            "lr": torch.tensor([0.1, 0.1, 0.01, 0.01, 0.001, 0.001]),
            "param:net.weight": net,
            "ema:slow.weight": 0.5**6 * slow + (1 - 0.5**6) * net,
        }

    def strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.partition(".")[2]: value for name, value in state.items()}

    state = {f"{name}.weight": (1, 3) for name in ("net", "slow")}
    config = {"train": {"iters_per_epoch": 2, "epochs": [0, 3, 6]}}
    case = _case(rates, state, {f"x_{k}": ([4, 3], "normal") for k in range(6)}, config)
    averages = {"slow": EMA(0.5, name="slow")}
    assert not _differing(case, parity.train(case, Still(), strip, {"x": "image"}, averages=averages))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"train": {"iterations": 9}}}, "9 iterations and has 8 batches"),
        ({"inputs": {"x_1": {"shape": [4, 3], "rule": "normal"}}}, "NAME_0"),
        ({"config": {}, "inputs": {"z_0": {"shape": [4, 3], "rule": "normal"}}}, "no batch holds: z"),
        ({"state": {}}, "keys differ|query/kernel"),
    ],
)
def test_what_a_case_lacks_is_named(case: parity.Case, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ZooError, KeyError), match=message):
        parity.train({**case, **change}, _Task(OPTIM), _convert, {"x": "image", "y": "target"})


def test_official_names_and_layouts_come_back() -> None:
    state = {name: {"shape": list(shape), "rule": "normal"} for name, shape in SHAPES.items()}
    case: parity.Case = {"state": state, "outputs": {f"grad:{name}": {} for name in SHAPES}, "dtype": "float64"}
    filled = parity.filled_state(case)
    official = parity.Official(case, _convert)
    assert official.ours("key/kernel") == "joint.weight"
    for name, value in filled.items():
        assert torch.equal(official.take(name, _convert(filled)), value), name
    assert official.take("scale", {}) is None
    named = parity.named(case, _convert, grad=_convert(filled))
    assert torch.equal(named["grad:query/kernel"], filled["query/kernel"])
    with pytest.raises(ZooError, match="did you mean 'key/kernel'"):
        official.ours("key/kernels")
