"""Is Noise Conditioning Necessary for Denoising Generative Models?

Qiao Sun, Zhicheng Jiang, Hanhong Zhao, Kaiming He. ICML 2025, arXiv 2502.13129.

A denoising generative model sees z = a(t) x + b(t) e, regresses r = c(t) x + d(t) e, and is told t. Here it is not: in
many dimensions the noise level can be read off z itself, p(t | z) is sharp, and what is regressed without t, R(z) =
E[R(z | t)] over p(t | z), is close to R(z | t). Whether sampling survives the small error depends on how the sampler's
coefficients let it grow: that of flow matching does, that of EDM nearly, deterministic DDIM does not. uEDM is EDM with
an output scaling that does not depend on t. Weights, preconditioning and sampler know t as before, the network not.

Conventions: x data, e noise, t rises with the noise; each formulation has its own t. A network is called as
network(z, t, label, augment) and gives r, whether it is told t or not.

No official code was found. The formulations of EDM, its networks and sampler are checked against NVlabs/edm; those of
the paper's own experiments that public texts do not state are choices, and the card's ledger says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from zoo.data.augment import PARTS, EDMAugment
from zoo.errors import ZooError, unknown
from zoo.metrics.generation import to_uint8
from zoo.nn.unet import DhariwalUNet, SongUNet, convert_edm
from zoo.ops import karras
from zoo.ops.denoising import (
    Coefficients,
    DiscreteDiffusion,
    FlowMatching,
    Formulation,
    Preconditioned,
    Sampling,
    between,
    denoising_loss,
    sample_path,
    step_coefficients,
    step_noises,
)
from zoo.ops.flow import like
from zoo.training import BaseModule, Optim
from zoo.training.sampling import draw_samples

__all__ = [
    "FORMULATIONS",
    "ADMDenoiser",
    "ADMDenoising",
    "Coefficients",
    "Denoiser",
    "Denoising",
    "DiscreteDiffusion",
    "ErrorBound",
    "FlowMatching",
    "Formulation",
    "Preconditioned",
    "Sampling",
    "UNetDenoiser",
    "UNetDenoising",
    "accumulated_bound",
    "convert_official",
    "denoising_loss",
    "edm_adm_64",
    "edm_ddpmpp_64",
    "edm_ddpmpp_cifar10",
    "edm_ncsnpp_64",
    "edm_ncsnpp_cifar10",
    "effective_targets",
    "lipschitz",
    "sample_path",
    "step_coefficients",
    "uedm_ddpmpp_cifar10",
]

# ----------------------------------------------------------------------------------------------------- 1. formulations

FORMULATIONS: dict[str, Callable[..., Formulation]] = {
    "ddpm": lambda **options: DiscreteDiffusion(**{"betas": "linear", **options}),
    "iddpm": lambda **options: DiscreteDiffusion(**{"betas": "cosine", **options}),
    "flow_matching": FlowMatching,
    "edm": lambda **options: Preconditioned(karras.EDM(**options)),
    "uedm": lambda **options: Preconditioned(karras.EDM(**options), constant_output=True),
    "vp": lambda **options: Preconditioned(karras.VP(**options)),
    "ve": lambda **options: Preconditioned(karras.VE(**options)),
    "edm_iddpm": lambda **options: Preconditioned(karras.IDDPM(**options)),
}


_SAMPLING = Sampling()


def make_formulation(name: str, options: Mapping[str, Any] | None = None) -> Formulation:
    """A formulation by its name in :data:`FORMULATIONS`.

    Raises:
        ZooError: an unknown name or option.
    """
    if name not in FORMULATIONS:
        raise unknown("formulation", name, FORMULATIONS)
    try:
        return FORMULATIONS[name](**(options or {}))
    except TypeError as error:
        raise ZooError(f"formulation {name!r} has other options: {error}") from error


# ------------------------------------------------------------------------------------- 2. what is lost without the time


class Targets(NamedTuple):
    """Of one z and times t_k: R(z | t_k) (K, D), p(t_k | z) (K,), R(z) (D,), and E(z) = E |R(z | t) - R(z)|^2."""

    conditional: Tensor
    posterior: Tensor
    unconditional: Tensor
    error: Tensor


def effective_targets(z: Tensor, points: Tensor, coefficients: Coefficients, prior: Tensor | None = None) -> Targets:
    """What networks with and without t regress at z (D,), exactly, where the data are `points` (N, D) (equations 6, 8
    and 10).

    Args:
        coefficients: at times t_k (K,).
        prior: p(t_k) (K,), up to a factor; None: all alike.
    """
    a, b, c, d, _ = (value[:, None] for value in coefficients)
    square = points.square().sum(1)
    distance = (z.square().sum() - 2 * a * (points @ z) + a.square() * square).clamp(min=0)
    fits = -distance / (2 * b.square())  # (K, N)
    mean = fits.softmax(1) @ points
    evidence = fits.logsumexp(1) - len(z) * b[:, 0].log()
    posterior = (evidence if prior is None else evidence + prior.log()).softmax(0)
    conditional = c * mean + d * (z - a * mean) / b
    unconditional = posterior @ conditional
    error = posterior @ (conditional - unconditional).square().sum(1)
    return Targets(conditional, posterior, unconditional, error)


def lipschitz(z: Tensor, points: Tensor, coefficients: Coefficients, iterations: int = 20) -> Tensor:
    """The largest stretch of R(. | t) at z (D,) where the data are `points` (N, D), N <= D: its Jacobian is d / b +
    (c - a d / b) a / b^2 Cov[x | z, t], whose largest eigenvalue power iteration finds; the smallest is 0. Of more
    points it may be less.

    Args:
        coefficients: at one time, ().
    """
    a, b, c, d, _ = coefficients
    weight = (-(z - a * points).square().sum(1) / (2 * b.square())).softmax(0)
    spread = weight.sqrt()[:, None] * (points - weight @ points)
    vector = spread.sum(0) + z / z.norm()
    for _ in range(iterations):
        vector = vector / vector.norm().clamp(min=1e-30)
        vector = spread.T @ (spread @ vector)
    rate = vector.norm() * a / b.square()
    return torch.maximum((d / b).abs(), (d / b + (c - a * d / b) * rate).abs())


def accumulated_bound(kappa: Tensor, eta: Tensor, stretch: Tensor, delta: Tensor) -> Tensor:
    """sum_i A_i B_i (), the bound on how far sampling without t strays (statement 3): B_i = |eta_i| delta_i, and A_i =
    prod_{j > i} (kappa_j + |eta_j| L_j). All (N,), in the order of the steps."""
    growth = kappa + eta.abs() * stretch
    after = torch.cat([growth[1:], growth.new_ones(1)])
    return (after.flip(0).cumprod(0).flip(0) * eta.abs() * delta).sum()


class ErrorBound(L.Callback):
    """The paper's prediction of what a sampler loses without t, which wants no training (section 4).

    At the end of each validation, of pictures of the data's validation split, which are taken to be all the data there
    are, so that R(z | t) and R(z) are exact; in the task's formulation, at the times of its sampler:

    - `val/error_bound`: of statement 3, in units of a picture's norm,
    - `val/astray`: how far samples by R(z) end from the nearest picture, in this unit; those by R(z | t) end on one,
    - `val/target_error`: E(z) / D (statement 2),
    - `val/noise_spread`: the median of sqrt(2 D Var[b | z]) / b, which for a single picture is 1 (statement 1; its t is
      b in flow matching).

    Args:
        points: pictures.
        samples: noisy pictures at each time, over which is averaged (of Lipschitz constants the largest is taken), and
            samples that may stray.
        times: among which p(t | z) is taken; evenly spread over uniform draws, or normal ones up to 4.5.
        seed: of noises and of which pictures; added to that of the run.
    """

    def __init__(self, points: int = 256, samples: int = 2, times: int = 512, seed: int = 0) -> None:
        if min(points, samples, times) < 1:
            raise ZooError("ErrorBound wants at least one of points, samples and times")
        self.points, self.samples, self.times, self.seed = points, samples, times, seed

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        task: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(task, Denoising) or not hasattr(data, "samples"):
            raise ZooError("ErrorBound is of denoising tasks, on a data module of pictures")
        pictures = data.samples("val", train_transform=False)
        generator = torch.Generator().manual_seed(self.seed + int(os.environ.get("PL_GLOBAL_SEED", 0)))
        chosen = torch.randperm(len(pictures), generator=generator)[: self.points].tolist()
        points = torch.stack([pictures[index]["image"].flatten() for index in chosen]).double()
        found = self.measure(task.network.formulation, task.sampling, points, generator)
        for name, value in found.items():
            pl_module.log(f"val/{name}", value.float(), rank_zero_only=False)

    def measure(
        self, formulation: Formulation, sampling: Sampling, points: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The four numbers () of data that are `points` (N, D), float64."""
        draws = (torch.arange(self.times, dtype=torch.float64) + 0.5) / self.times
        prior = torch.ones_like(draws)
        if formulation.normal:
            draws = 9 * draws - 4.5
            prior = (-draws.square() / 2).exp()
        times = formulation.time(draws)
        grid = formulation.coefficients(times)
        noise = torch.randn(self.samples, points.shape[1], generator=generator, dtype=torch.float64)
        rows, errors, spreads = [], [], []
        for t, after in pairwise(formulation.steps(sampling)):
            kappa, eta, _ = between(formulation, t, after)
            here, scale = formulation.coefficients(t), formulation.scale(t)
            deltas, stretches = [], []
            for x, e in zip(points, noise, strict=False):
                z = here.a * x + here.b * e
                over = effective_targets(z, points, grid, prior)
                told = effective_targets(z, points, Coefficients(*(value[None] for value in here))).unconditional
                deltas.append((told - over.unconditional).norm())
                stretches.append(lipschitz(z, points, here) * scale)
                errors.append(over.error / len(z))
                mean = over.posterior @ grid.b
                variance = over.posterior @ (grid.b - mean).square()
                spreads.append((2 * len(z) * variance).sqrt() / mean)
            rows.append(torch.stack([kappa, eta, torch.stack(stretches).max(), torch.stack(deltas).mean()]))
        bound = accumulated_bound(*torch.stack(rows, dim=1)) / points.norm(dim=1).mean()
        samples = self._sampled(formulation, sampling, noise, points, grid, prior)
        return {
            "error_bound": bound,
            "astray": (torch.cdist(samples, points).min(dim=1).values / points.norm(dim=1).mean()).mean(),
            "target_error": torch.stack(errors).mean(),
            "noise_spread": torch.stack(spreads).median(),
        }

    @staticmethod
    def _sampled(
        formulation: Formulation,
        sampling: Sampling,
        noise: Tensor,
        points: Tensor,
        grid: Coefficients,
        prior: Tensor,
    ) -> Tensor:
        """Samples (B, D) by R(z), over a grid of times with its prior."""

        def predict(z: Tensor, t: Tensor) -> Tensor:
            return torch.stack([effective_targets(row, points, grid, prior).unconditional for row in z])

        return list(sample_path(predict, formulation, noise, replace(sampling, stochasticity=0.0, churn=0.0)))[-1]


# ---------------------------------------------------------------------------------------------------------- 3. networks


class Denoiser(nn.Module):
    """A U-Net in one of the formulations, which may be told the time or not.

    Args:
        model: of (z, times, augment, label).
        formulation, formulation_options: see :data:`FORMULATIONS`.
        noise_conditional: tell the network t. Otherwise the embedding of t is 0; labels and augmentation stay.
    """

    def __init__(
        self,
        model: SongUNet | DhariwalUNet,
        formulation: str,
        formulation_options: Mapping[str, Any] | None = None,
        noise_conditional: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.noise_conditional = model, noise_conditional
        self.formulation = make_formulation(formulation, formulation_options)
        self.num_classes, self.noise_shape, self.augment_dim = model.num_classes, model.noise_shape, model.augment_dim
        if not (noise_conditional or model.num_classes or model.augment_dim):
            model.map_layer0.weight.requires_grad_(False)  # of an input that always is 0

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """r (B, C, S, S) of z (B, C, S, S) at times t (B,), which are not used where the network is not told them."""
        times = (self.formulation.embedding(t),) if self.noise_conditional else None
        return self.model(z, times, augment, label)[:, : z.shape[1]]

    def denoise(self, x: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """The data (B, C, S, S) expected in the sampler's state x at times t (B,)."""
        c, d = (like(value, x) for value in self.formulation.coefficients(t)[2:4])
        alpha, beta = (like(value, x) for value in self.formulation.state(t))
        r = self((x * like(self.formulation.scale(t), x)).to(x.dtype), t, label, augment)
        return (d * x - beta * r) / (alpha * d - beta * c)

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor | None = None, sampling: Sampling = _SAMPLING) -> Tensor:
        """Samples like `noise` (B, C, S, S) of classes `label` (B,); steps are added up in float64."""
        wide = noise.float() if noise.device.type == "mps" else noise.double()

        def predict(z: Tensor, t: Tensor) -> Tensor:
            return self(z.to(noise.dtype), t, label).to(wide.dtype)

        states = sample_path(predict, self.formulation, wide, sampling, step_noises(wide, sampling.noises))
        return list(states)[-1].to(noise.dtype)


class UNetDenoiser(Denoiser):
    """DDPM++ or NCSN++; the defaults are uEDM's on CIFAR-10.

    Args:
        img_size: side of the square pictures.
        in_chans: their channels.
        formulation, formulation_options, noise_conditional: as in :class:`Denoiser`.
        dropout, augment_dim: as in :class:`~zoo.nn.unet.SongUNet`, as are
        options: its other sizes; `label_dim` for classes.
    """

    def __init__(
        self,
        img_size: int = 32,
        in_chans: int = 3,
        formulation: str = "uedm",
        formulation_options: dict[str, Any] | None = None,
        noise_conditional: bool = False,
        dropout: float = 0.13,
        augment_dim: int = 9,
        **options: Any,
    ) -> None:
        model = SongUNet(
            img_resolution=img_size,
            in_channels=in_chans,
            out_channels=in_chans * make_formulation(formulation, formulation_options).outputs,
            dropout=dropout,
            augment_dim=augment_dim,
            **options,
        )
        super().__init__(model, formulation, formulation_options, noise_conditional)


class ADMDenoiser(Denoiser):
    """ADM; the defaults are EDM's on ImageNet in 64 x 64 pixels.

    Args:
        img_size, in_chans, formulation, formulation_options, noise_conditional: as in :class:`UNetDenoiser`.
        options: sizes, of :class:`~zoo.nn.unet.DhariwalUNet`; `label_dim` for classes.
    """

    def __init__(
        self,
        img_size: int = 64,
        in_chans: int = 3,
        formulation: str = "edm",
        formulation_options: dict[str, Any] | None = None,
        noise_conditional: bool = True,
        **options: Any,
    ) -> None:
        model = DhariwalUNet(
            img_resolution=img_size,
            in_channels=in_chans,
            out_channels=in_chans * make_formulation(formulation, formulation_options).outputs,
            **options,
        )
        super().__init__(model, formulation, formulation_options, noise_conditional)


# ------------------------------------------------------------------------------------------------------------- 4. tasks


class Denoising(BaseModule):
    """Training and sampling, whatever the network; the two tasks below name it.

    Batches hold `image` (B, C, S, S), in [-1, 1], and `label` (B,) where the network has classes. They may pin the
    draws: `noise` (B, C, S, S), `time` (B,), and `augment` (B, A), which says how pictures were augmented.

    Args:
        network: the denoiser.
        optim: optimiser and schedule.
        sampling: how samples are drawn.
        augment: chance of each of EDM's geometric changes in training, whose labels the network sees; 0 for none.
        label_dropout: share of samples that train without their label.

    Raises:
        ZooError: `augment_dim` is not the length of the augmentation's labels, or the sampler is not one of the
            formulation's.
    """

    batch_keys: Sequence[str] = ("image",)
    sampling_options = ("steps", "stochasticity", "churn")

    def __init__(
        self, network: Denoiser, optim: Optim, sampling: Sampling, augment: float, label_dropout: float = 0.0
    ) -> None:
        super().__init__(optim)
        self.network, self.formulation = network, network.formulation
        self.num_classes, self.noise_shape = network.num_classes, network.noise_shape
        # A checkpoint holds declarations as plain mappings.
        self.sampling = Sampling(**sampling) if isinstance(sampling, Mapping) else sampling
        self.label_dropout = label_dropout
        self.augment = EDMAugment(augment, tuple(PARTS)) if augment else None
        if self.num_classes:
            self.batch_keys = ("image", "label")
        if self.augment is not None and self.augment.label_dim != network.augment_dim:
            length = self.augment.label_dim
            raise ZooError(f"the augmentation's labels hold {length} numbers: set augment_dim, or augment: 0")
        if self.sampling.method == "heun" and not self.formulation.straight:
            raise ZooError("sampling.method heun wants continuous time; discrete diffusion takes euler")

    def trainable(self) -> nn.Module:
        return self.network

    def loss_map(self, batch: Mapping[str, Any]) -> Tensor:
        """The weighted error of each element (B, C, S, S)."""
        x, label = batch["image"], batch["label"] if self.num_classes else None
        draw = self.draws(batch, "time", normal=self.formulation.normal)  # times want more than half precision
        noise = self.draws(batch, "noise", *x.shape[1:], normal=True).to(x.dtype)
        if label is not None and self.label_dropout and self.training:
            label = torch.where(self.draws(batch, "drop") < self.label_dropout, self.num_classes, label)
        t = self.formulation.time(draw)
        augment = batch.get("augment")
        return denoising_loss(self.network, self.formulation, x, noise, t, label=label, augment=augment)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        if self.augment is not None and "augment" not in batch:
            batch = self.augment(dict(batch))
        errors = self.loss_map(batch)
        error = errors.mean()
        self.log("train/error", error, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(errors))
        # The squared norm, as the paper and EDM's trainer have it: the sum over a picture.
        return {"loss": error * errors[0].numel(), "error": error}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.tally("val/error", self.loss_map(batch).flatten(1).mean(1))

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.tally("test/error", self.loss_map(batch).flatten(1).mean(1))

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor | None = None, **setting: Any) -> Tensor:
        """Pictures (B, C, S, S), about in [-1, 1], of noise (B, C, S, S) and, for a conditional model, labels (B,).

        `setting` are fields of :class:`Sampling` that differ from the task's.
        """
        return self.network.sample(noise.to(self.dtype), label, replace(self.sampling, **setting))

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """A generated picture (B, 3, H, W), uint8, from noise that the sample's index decides."""
        label = batch["label"] if self.num_classes else None
        pictures = draw_samples(self, batch["index"].tolist(), batch["image"].device, label=label)
        return {"picture": to_uint8(pictures), "index": batch["index"]}


_ADAM = Optim(name="adam", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant", warmup_steps=19531)


class UNetDenoising(Denoising):
    """DDPM++ and NCSN++ on pixels.

    Args:
        augment, label_dropout, sampling, optim: as in :class:`Denoising`.
        network: of :class:`UNetDenoiser`; a recipe takes `img_size` from the data module.
    """

    def __init__(
        self,
        augment: float = 0.12,
        label_dropout: float = 0.0,
        sampling: Sampling = _SAMPLING,
        optim: Optim = _ADAM,
        **network: Any,
    ) -> None:
        super().__init__(UNetDenoiser(**network), optim, sampling, augment, label_dropout)
        self.save_hyperparameters()


class ADMDenoising(Denoising):
    """ADM on pixels.

    Args:
        augment, label_dropout, sampling, optim: as in :class:`Denoising`.
        network: of :class:`ADMDenoiser`; a recipe takes `img_size` from the data module.
    """

    def __init__(
        self,
        augment: float = 0.0,
        label_dropout: float = 0.0,
        sampling: Sampling = _SAMPLING,
        optim: Optim = _ADAM,
        **network: Any,
    ) -> None:
        super().__init__(ADMDenoiser(**network), optim, sampling, augment, label_dropout)
        self.save_hyperparameters()


# ----------------------------------------------------------------------------------------------------------- 5. models

_NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
_NCSNPP |= {"resample_filter": (1, 3, 3, 1)}
_EDM = {"formulation": "edm", "noise_conditional": True}
_SIDE_64 = {"img_size": 64, "channel_mult": (1, 2, 2, 2)}


def uedm_ddpmpp_cifar10(**overrides: Any) -> UNetDenoiser:
    """uEDM: DDPM++ on 32 x 32 pixels, not told the noise level."""
    return UNetDenoiser(**overrides)


def edm_ddpmpp_cifar10(**overrides: Any) -> UNetDenoiser:
    """EDM's DDPM++ on 32 x 32 pixels; its releases call it vp."""
    return UNetDenoiser(**{**_EDM, **overrides})


def edm_ncsnpp_cifar10(**overrides: Any) -> UNetDenoiser:
    """EDM's NCSN++ on 32 x 32 pixels; its releases call it ve."""
    return UNetDenoiser(**{**_EDM, **_NCSNPP, **overrides})


def edm_ddpmpp_64(**overrides: Any) -> UNetDenoiser:
    """EDM's DDPM++ on 64 x 64 pixels: FFHQ and AFHQv2."""
    return UNetDenoiser(**{**_EDM, **_SIDE_64, **overrides})


def edm_ncsnpp_64(**overrides: Any) -> UNetDenoiser:
    """EDM's NCSN++ on 64 x 64 pixels: FFHQ and AFHQv2."""
    return UNetDenoiser(**{**_EDM, **_SIDE_64, **_NCSNPP, **overrides})


def edm_adm_64(**overrides: Any) -> ADMDenoiser:
    """EDM's ADM on 64 x 64 pixels: ImageNet, with its classes."""
    return ADMDenoiser(**{"label_dim": 1000, **overrides})


# ------------------------------------------------------------------------------------------------- 6. published weights


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a module of NVlabs/edm in our names, with or without ``model.``; iDDPM's table of noise levels,
    which its constants give, is left.

    Raises:
        ZooError: a key of another layout.
    """
    state = {key.removeprefix("model."): value for key, value in state_dict.items() if key != "u"}
    heads = 64 if "out_norm.weight" in state else 0
    return {f"model.{key}": value for key, value in convert_edm(state, heads).items()}
