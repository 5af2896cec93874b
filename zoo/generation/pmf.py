"""One-step Latent-free Image Generation with Pixel Mean Flows (pMF).

Yiyang Lu, Susie Lu, Qiao Sun, Hanhong Zhao, Zhicheng Jiang, Xianbang Wang, Tianhong Li, Zhengyang Geng, Kaiming He.
2026, arXiv 2601.22158.

Improved MeanFlow in raw pixels, with patches so large that a patch has more numbers than a token. Pictures lie on a
manifold of few dimensions and velocities do not, so the network predicts a picture, and the loss stays that of
improved MeanFlow on the velocity. The link is the field x(z_t, r, t) = z_t - t u(z_t, r, t): a network that gives x
has u = (z_t - x) / t. In one step, from t = 1 to r = 0, the sample is what the network gives. As that is a picture,
losses of perception apply to it directly: LPIPS and features of ConvNeXt V2, each of a random crop that prediction and
truth share, for samples with little noise.

Conventions: those of improved MeanFlow (:mod:`zoo.generation.imf`): x data in [-1, 1], e noise of deviation
`noise_scale`, z_t = (1 - t) x + t e, 0 <= r <= t <= 1. Divisions by t are divisions by max(t, 0.05), in the network's
u and v and in the velocity that they regress, (z_t - x) / max(t, 0.05), alike.

Deviations from the official code, none of which changes a value: those of improved MeanFlow, and the networks of
perception see the samples with t below their threshold only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.generation.imf import Errors, GuidedMeanFlow, ImprovedMeanFlowDiT, Tangent
from zoo.nn.autoencoder import PIXELS
from zoo.nn.perceptual import FrozenNetwork, load_convnextv2, load_lpips
from zoo.nn.token_dit import convert_token_dit
from zoo.ops.flow import LinearPath, like
from zoo.ops.meanflow import GuidanceConditions, TimePairs, adaptive_loss
from zoo.training import Optim

__all__ = [
    "Perceptual",
    "PixelMeanFlow",
    "PixelMeanFlowDiT",
    "PixelPath",
    "convert_official",
    "crop_resize",
    "pmf_b16",
    "pmf_b32",
    "pmf_h16",
    "pmf_h32",
    "pmf_l16",
    "pmf_l32",
    "predicted_picture",
    "random_boxes",
]

MIN_TIME = 0.05  # what is divided by is at least this
Prediction = Literal["x", "u"]

# ------------------------------------------------------------------------------------------------------- 1. equations


@dataclass(frozen=True)
class PixelPath(LinearPath):
    """The linear path, whose velocity is what a perfect x stands for: (z_t - x) / max(t, 0.05), e - x above it."""

    noise_at: int = 1

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return (self.interpolate(x, noise, t) - x) / like(t.clamp(MIN_TIME, 1.0), x)


def predicted_picture(z: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """x(z, r, t) = z - t u (B, C, H, W): the picture that an average velocity stands for (section 4.1)."""
    return z - like(t, z) * u


def random_boxes(
    draws: Tensor,
    height: int,
    width: int,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Boxes (B, 4) of whole pixels, (top, left, height, width), within pictures of this size.

    Args:
        draws: uniform (B, 4): for the area, a share in `scale` of the picture's; for the ratio of width to height, even
            in its logarithm; for top and left.
        height, width: of the pictures.
        scale, ratio: see there.
    """
    draws = draws.float()
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * draws[:, 1])
    wide = (area * aspect).sqrt().round().clamp(1, width)
    tall = (area / aspect).sqrt().round().clamp(1, height)
    top = (draws[:, 2] * (height - tall + 1)).floor()
    left = (draws[:, 3] * (width - wide + 1)).floor()
    return torch.stack([top, left, tall, wide], dim=1).long()


def _weights(first: Tensor, length: Tensor, count: int, size: int) -> Tensor:
    """(B, size, count): what each of `count` pixels gives to the `size` pixels of a box that starts at `first` (B,) and
    is `length` (B,) long. Keys' cubic, widened where pixels are merged; pixels beyond the box count."""
    step = (length / size)[:, None, None]
    places = (torch.arange(size, device=first.device)[None, :, None] + 0.5) * step + first[:, None, None] - 0.5
    distance = (places - torch.arange(count, device=first.device)).abs() / step.clamp(min=1)
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    return weights / weights.sum(dim=2, keepdim=True)


def crop_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """A box of each picture (B, C, H, W), bicubic with antialiasing to (B, C, size, size); boxes as
    :func:`random_boxes` gives them. As in jax.image.scale_and_translate, pixels near the border of the box are also
    made of those beyond."""
    top, left, tall, wide = boxes.to(images.dtype).unbind(1)
    rows = _weights(top, tall, images.shape[2], size)
    columns = _weights(left, wide, images.shape[3], size)
    return torch.einsum("bih,bchw,bjw->bcij", rows, images, columns)


@dataclass(frozen=True)
class Perceptual:
    """The losses of perception (section 4.4, Figure 3b).

    Args:
        lpips, convnext: weights of LPIPS and of the squared distance of ConvNeXt V2's features; 0 leaves one out.
        max_t: samples with a t below it have these losses.
        size: side of the crops.
        scale, ratio: of the crops' area and sides.
        vgg, convnextv2: files of weights, see :func:`~zoo.nn.perceptual.load_lpips` and
            :func:`~zoo.nn.perceptual.load_convnextv2`; null: the published ones.

    Raises:
        ZooError: a negative weight, none at all, or no size.
    """

    lpips: float = 0.4
    convnext: float = 0.1
    max_t: float = 0.8
    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    vgg: str | None = None
    convnextv2: str | None = None

    def __post_init__(self) -> None:
        if min(self.lpips, self.convnext) < 0 or self.lpips + self.convnext == 0 or self.size < 1:
            raise ZooError(
                "perceptual wants weights lpips and convnext of 0 or more, not both 0, and a size, not"
                f" {self.lpips}, {self.convnext} and {self.size}"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Of the losses there are, by name."""
        return {name: weight for name in ("lpips", "convnext") if (weight := getattr(self, name))}

    def networks(self) -> dict[str, FrozenNetwork]:
        """Of the losses there are, by name; their weights are read at first use."""
        loads: dict[str, Any] = {
            "lpips": partial(load_lpips, self.vgg),
            "convnext": partial(load_convnextv2, self.convnextv2),
        }
        return {name: FrozenNetwork(loads[name]) for name in self.weights}


# ---------------------------------------------------------------------------------------------------------- 2. network


class PixelMeanFlowDiT(ImprovedMeanFlowDiT):
    """A transformer that predicts pictures, and gives the velocities that these stand for.

    Args:
        predict: "x", the picture; or "u", the velocity itself (Table 2).
        noise_scale: deviation of the noise that a sample starts from; :meth:`sample` takes standard normal noise.
        img_size, patch_size, in_chans, bottleneck, rope, pos_embed: of :class:`~zoo.nn.token_dit.TokenDiT`, as are
        sizes: its other sizes, and `omega` and `interval` of
            :class:`~zoo.generation.imf.ImprovedMeanFlowDiT`.

    Raises:
        ZooError: an unknown prediction, no noise; sizes that do not fit each other.
    """

    autoencoder = PIXELS

    def __init__(
        self,
        predict: Prediction = "x",
        noise_scale: float = 1.0,
        img_size: int = 256,
        patch_size: int = 16,
        in_chans: int = 3,
        bottleneck: int | None = 128,
        rope: Literal["sequence", "grid"] = "grid",
        pos_embed: bool = True,
        **sizes: Any,
    ) -> None:
        if predict not in ("x", "u"):
            raise unknown("prediction", predict, ("x", "u"))
        if noise_scale <= 0:
            raise ZooError(f"noise_scale must be positive, not {noise_scale}")
        super().__init__(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, bottleneck=bottleneck, rope=rope,
            pos_embed=pos_embed, **sizes,
        )  # fmt: skip
        self.predict, self.noise_scale = predict, noise_scale

    def velocity_from(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """(z - output) / max(t, 0.05) (B, C, S, S) of a predicted picture."""
        return (z - output) / like(t.clamp(MIN_TIME, 1.0), z) if self.predict == "x" else output

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        label: Tensor,
        times: Sequence[float] = (1.0, 0.0),
        omega: float | None = None,
        interval: Sequence[float] | None = None,
    ) -> Tensor:
        """Pictures (B, C, S, S) about in [-1, 1] from standard normal `noise` like them, of classes `label` (B,), in as
        many evaluations as `times` has steps; guided by `omega` within `interval`, by default the network's own."""
        return super().sample(self.noise_scale * noise, label, times, omega, interval)


# ------------------------------------------------------------------------------------------------------------- 3. task


class PixelMeanFlow(GuidedMeanFlow):
    """Training and sampling of pixel MeanFlow (Tables 2 to 7).

    Batches hold `image` (B, 3, S, S) in [-1, 1] and `label` (B,); they may pin the draws of
    :class:`~zoo.generation.imf.GuidedMeanFlow`, and `crop` (B, 4), those of :func:`random_boxes`.

    Args:
        perceptual: the losses of perception; null trains without.
        guidance, label_dropout, tangent, pairs, loss_power, loss_eps, sampling_times, optim: as in
            :class:`~zoo.generation.imf.GuidedMeanFlow`.
        network: of :class:`PixelMeanFlowDiT`; a recipe takes `img_size` and `num_classes` from the data module.
    """

    def __init__(
        self,
        perceptual: Perceptual | None = None,
        guidance: GuidanceConditions = GuidanceConditions(),  # noqa: B008 (frozen)
        label_dropout: float = 0.1,
        tangent: Tangent = "predicted",
        pairs: TimePairs = TimePairs(mean=0.8, std=0.8, equal=0.5, order="equal_first"),  # noqa: B008
        loss_power: float = 1.0,
        loss_eps: float = 0.01,
        sampling_times: Sequence[float] = (1.0, 0.0),
        optim: Optim = Optim(name="muon", lr=1e-3, weight_decay=0.0, schedule="constant"),  # noqa: B008
        **network: Any,
    ) -> None:
        net = PixelMeanFlowDiT(**network)
        super().__init__(
            net, optim, pairs, guidance, label_dropout, tangent, loss_power, loss_eps, sampling_times, PIXELS,
            noise_scale=net.noise_scale, path=PixelPath(),
        )  # fmt: skip
        self.save_hyperparameters()
        self.perceptual = Perceptual(**perceptual) if isinstance(perceptual, Mapping) else perceptual
        self.perception = self.perceptual.networks() if self.perceptual else {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":  # missing weights are told before the run
            for network in self.perception.values():
                network.check()

    def distances(self, batch: Mapping[str, Any], pictures: Tensor, truth: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """How far predicted pictures (N, 3, S, S) look from true ones, (N,) by name, each pair in one crop.

        Args:
            batch: may pin the draws of the crops.
            pictures, truth: of the samples `rows` (N,) of the batch.
        """
        assert self.perceptual is not None
        facts = self.perceptual
        draws = self.draws(batch, "crop", 4)[rows]
        height, width = truth.shape[2:]
        boxes = random_boxes(draws, height, width, facts.scale, facts.ratio)
        first, second = (crop_resize(x.float(), boxes, facts.size) for x in (pictures, truth))
        found = {}
        for name, held in self.perception.items():
            net = held.net(first.device)
            if name == "lpips":
                found[name] = net(first, second)
            else:
                with torch.no_grad():
                    goal = net(second)
                found[name] = (net(first) - goal).float().square().sum(1)
        return found

    def seen(self, batch: Mapping[str, Any], errors: Errors) -> dict[str, Tensor]:
        """The distances of perception (B,) by name; 0 for samples with a t of `max_t` or more."""
        if self.perceptual is None:
            return {}
        found = {name: torch.zeros_like(errors.u) for name in self.perception}
        rows = (errors.t < self.perceptual.max_t).nonzero()[:, 0]
        if len(rows):
            pictures = predicted_picture(errors.z[rows], errors.t[rows], errors.average[rows])
            near = self.distances(batch, pictures, batch["image"][rows], rows)
            found = {name: found[name].index_put((rows,), value.to(errors.u.dtype)) for name, value in near.items()}
        return found

    def total(self, batch: Mapping[str, Any], errors: Errors) -> Tensor:
        """The loss () of the errors of a batch; in training with those of perception."""
        loss = super().total(batch, errors)
        if self.perceptual is not None and self.training:
            for name, distance in self.seen(batch, errors).items():
                if self._trainer is not None:
                    facts: dict[str, Any] = {"on_step": True, "on_epoch": True, "batch_size": len(distance)}
                    self.log(f"train/{name}", distance.detach().mean(), sync_dist=True, **facts)
                loss = loss + self.perceptual.weights[name] * adaptive_loss(distance, self.loss_power, self.loss_eps)
        return loss


# ----------------------------------------------------------------------------------------------------------- 4. models


def _model(depth: int, dim: int, heads: int, sizes: dict[str, Any], overrides: dict[str, Any]) -> PixelMeanFlowDiT:
    own = {"depth": depth, "embed_dim": dim, "num_heads": heads, "velocity_head": False}
    return PixelMeanFlowDiT(**{**own, **sizes, **overrides})


_512 = {"img_size": 512, "patch_size": 32}
_HUGE = {"bottleneck": 256, "mlp_multiple": 8}


def pmf_b16(**overrides: Any) -> PixelMeanFlowDiT:
    """pMF-B/16 on 256 pixels, without v-head (``velocity_head=True`` has it), guided as its samples were."""
    return _model(16, 768, 12, {"omega": 8.5, "interval": (0.1, 0.7)}, overrides)


def pmf_l16(**overrides: Any) -> PixelMeanFlowDiT:
    """pMF-L/16 on 256 pixels, likewise."""
    return _model(32, 1024, 16, {"omega": 7.0, "interval": (0.2, 0.7)}, overrides)


def pmf_h16(**overrides: Any) -> PixelMeanFlowDiT:
    """pMF-H/16 on 256 pixels, likewise."""
    own = {"omega": 7.0, "interval": (0.2, 0.6), "noise_scale": 2.0}
    return _model(48, 1280, 16, {**_HUGE, **own}, overrides)


def pmf_b32(**overrides: Any) -> PixelMeanFlowDiT:
    """pMF-B/32 on 512 pixels, likewise."""
    return _model(16, 768, 12, {**_512, "omega": 6.5, "interval": (0.1, 0.7), "noise_scale": 2.0}, overrides)


def pmf_l32(**overrides: Any) -> PixelMeanFlowDiT:
    """pMF-L/32 on 512 pixels, likewise."""
    return _model(32, 1024, 16, {**_512, "omega": 7.5, "interval": (0.2, 0.6), "noise_scale": 4.0}, overrides)


def pmf_h32(**overrides: Any) -> PixelMeanFlowDiT:
    """pMF-H/32 on 512 pixels, likewise."""
    own = {"omega": 5.5, "interval": (0.1, 0.6), "noise_scale": 4.0}
    return _model(48, 1280, 16, {**_512, **_HUGE, **own}, overrides)


# ------------------------------------------------------------------------------------------------ 5. official weights


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names, flax (one average of it) or PyTorch, with the v-head (``-full``) or without;
    the table of rotations of the PyTorch files is left out.

    Raises:
        ZooError: a key of another layout.
    """
    return convert_token_dit(state_dict)
