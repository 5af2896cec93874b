"""Back to Basics: Let Denoising Generative Models Denoise (JiT, "Just image Transformers").

Tianhong Li, Kaiming He. CVPR 2026, arXiv 2511.13720.

Pictures lie on a manifold of few dimensions, noise and velocity do not. A network that is to say what the noise or the
velocity was must carry all of its input's dimensions to its end; one that says what the picture was may forget most of
them. So JiT predicts the clean picture x, takes its loss in the space of velocities, and is a plain transformer on
large patches of raw pixels, of 16, 32 and even 64 a side: no autoencoder, no pre-training, no further loss.

Conventions: x data in [-1, 1], e noise times the noise scale, z_t = t x + (1 - t) e, so that the noise is at t = 0 and
v = x - e; MeanFlow's run the other way. Networks are called as network(z, t, labels) with t in [0, 1], unscaled; the
last row of the label table is "no label".

Deviations from the official code, none of which changes a value:
- Where the guidance scale is 1 the unconditional pass is not made; elsewhere both passes are one batch.
- In half precision the scores of attention have that precision too (official: float32).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.errors import ZooError, unknown
from zoo.metrics.generation import to_uint8
from zoo.nn.dit import MODERN, SIZES, BlockStyle, DiT
from zoo.ops.flow import LinearPath, like, logit_normal
from zoo.ops.guidance import drop_labels, guide
from zoo.ops.samplers import ode_path, times_between
from zoo.training import BaseModule, Optim
from zoo.training.sampling import draw_samples

__all__ = [
    "Denoising",
    "JiT",
    "Sampling",
    "convert",
    "convert_official",
    "denoising_loss",
    "guided_velocity",
    "jit_b4",
    "jit_b16",
    "jit_b32",
    "jit_b64",
    "jit_g16",
    "jit_g32",
    "jit_h16",
    "jit_h32",
    "jit_l16",
    "jit_l32",
    "resolution_noise_scale",
    "steps",
]

PATH = LinearPath(noise_at=0)
Quantity = Literal["x", "eps", "v"]
QUANTITIES: tuple[Quantity, ...] = ("x", "eps", "v")
T_EPS = 0.05

# ------------------------------------------------------------------------------------------------------- 1. equations


def convert(given: Quantity, wanted: Quantity, value: Tensor, z: Tensor, t: Tensor, t_eps: float = T_EPS) -> Tensor:
    """What x, eps or v of a point z (B, ...) at times t (B,) says of another of them (Table 1).

    Args:
        given, wanted: which of the three `value` is, and which it is to become.
        value: like z.
        t_eps: nothing is divided by less; it bounds 1 - t and t in training and in sampling.

    Raises:
        ZooError: an unknown quantity.
    """
    for quantity in (given, wanted):
        if quantity not in QUANTITIES:
            raise unknown("quantity", quantity, QUANTITIES)
    if given == wanted:
        return value
    t = like(t, z)
    to_data, to_noise = (1 - t).clamp(min=t_eps), t.clamp(min=t_eps)
    ways: dict[tuple[Quantity, Quantity], Callable[[], Tensor]] = {
        ("x", "eps"): lambda: (z - t * value) / to_data,
        ("x", "v"): lambda: (value - z) / to_data,
        ("eps", "x"): lambda: (z - (1 - t) * value) / to_noise,
        ("eps", "v"): lambda: (z - value) / to_noise,
        ("v", "x"): lambda: z + (1 - t) * value,
        ("v", "eps"): lambda: z - t * value,
    }
    return ways[given, wanted]()


def denoising_loss(
    network: Callable[..., Tensor],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    prediction: Quantity = "x",
    loss_space: Quantity = "v",
    t_eps: float = T_EPS,
) -> Tensor:
    """The loss (B,) of a batch: the mean over pixels of the squared error in the space of `loss_space` (section 3.3,
    Algorithm 1; the nine combinations are those of Tables 1 and 2).

    What was to be predicted is converted just as the prediction is, so that where t_eps bites a perfect network still
    has no loss; there the v-loss of an x-prediction is its x-loss over t_eps^2.

    Args:
        network: (z, t, labels) to what `prediction` says.
        x: pictures (B, C, S, S).
        noise: e, likewise, the noise scale in it.
        t: (B,) in [0, 1].
        labels: (B,), "no label" already among them.
        prediction, loss_space: "x", "eps" or "v".
        t_eps: of :func:`convert`.
    """
    z = PATH.interpolate(x, noise, t)
    true = {"x": x, "eps": noise, "v": PATH.velocity(x, noise, t)}
    if prediction not in true:
        raise unknown("prediction", prediction, QUANTITIES)
    output = network(z, t, labels).to(z.dtype)
    found, wanted = (convert(prediction, loss_space, value, z, t, t_eps) for value in (output, true[prediction]))
    return (found - wanted).square().flatten(1).mean(1)


def resolution_noise_scale(img_size: int) -> float:
    """The deviation of the noise for pictures of a side: 1 up to 256 pixels, 2 at 512, 4 at 1024 (Table 9)."""
    return max(1.0, img_size / 256)


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn (Table 9).

    Args:
        steps: of equal length, from t = 0 to 1. Heun takes 2 * steps - 1 evaluations.
        method: "heun", or "euler"; the last step is Euler's in both.
        guidance: scale of classifier-free guidance; 1 is none.
        interval: times strictly within which it acts; a lower end of 0 includes 0.

    Raises:
        ZooError: an unknown method, no step, or an interval that is none.
    """

    steps: int = 50
    method: Literal["heun", "euler"] = "heun"
    guidance: float = 1.0
    interval: tuple[float, float] = (0.1, 1.0)

    def __post_init__(self) -> None:
        if self.method not in ("heun", "euler"):
            raise unknown("method", self.method, ("heun", "euler"))
        if self.steps < 1:
            raise ZooError(f"a sampler takes 1 step or more, not {self.steps}")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ZooError(f"a guidance interval is two times that rise within [0, 1], not {list(self.interval)}")

    def scale(self, t: Tensor) -> Tensor:
        """The guidance scale (B,) at times (B,)."""
        low, high = self.interval
        inside = (t < high) & ((t > low) | (low == 0))
        return torch.where(inside, torch.full_like(t, self.guidance), 1.0)


def guided_velocity(
    network: Callable[..., Tensor],
    z: Tensor,
    t: Tensor,
    labels: Tensor,
    null_label: int,
    sampling: Sampling = Sampling(),
    prediction: Quantity = "x",
    t_eps: float = T_EPS,
) -> Tensor:
    """The velocity (B, ...) at z, t for labels (B,): v_u + s (v_c - v_u) with the scale s of time t."""

    def velocity(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return convert(prediction, "v", network(z, t, labels).to(z.dtype), z, t, t_eps)

    scale = sampling.scale(t)
    if bool((scale == 1).all()):
        return velocity(z, t, labels)
    both = torch.cat([labels, torch.full_like(labels, null_label)])
    conditional, unconditional = velocity(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
    return guide(conditional, unconditional, like(scale, z))


def steps(velocity: Callable[[Tensor, Tensor], Tensor], z: Tensor, sampling: Sampling = Sampling()) -> Iterator[Tensor]:
    """The states (B, ...) after each step of dz/dt = velocity(z, t) from noise z at t = 0 to t = 1 (section 3.3)."""
    times = times_between(0.0, 1.0, sampling.steps, z)
    state = z
    for state in ode_path(velocity, z, times[:-1], sampling.method):
        yield state
    yield from ode_path(velocity, state, times[-2:], "euler")


# ---------------------------------------------------------------------------------------------------------- 2. network


class JiT(DiT):
    """A transformer on patches of raw pixels. The defaults are those of JiT-B/16 at 256 pixels.

    Args:
        img_size, patch_size, in_chans: sides of pictures and patches in pixels, and channels.
        embed_dim, depth, num_heads: sizes of the transformer.
        style: what blocks are made of; Table 4 compares.
        bottleneck: rank of the patch embedding; null for a full one (Figure 4).
        context_tokens: class tokens before the patches from block `context_start` on; 0 for none.
        context_start: see there.
        options: further ones of :class:`~zoo.nn.dit.DiT`.
    """

    def __init__(
        self,
        img_size: int = 256,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        style: BlockStyle = MODERN,
        bottleneck: int | None = 128,
        context_tokens: int = 32,
        context_start: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            style=style,
            bottleneck=bottleneck,
            context_tokens=context_tokens,
            context_start=context_start,
            times=("t",),
            pos_embed="stored",
            out_chans=None,
            null_class=True,
            **options,
        )

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        label: Tensor,
        sampling: Sampling = Sampling(),
        noise_scale: float | None = None,
        prediction: Quantity = "x",
        t_eps: float = T_EPS,
    ) -> Tensor:
        """Pictures like standard normal `noise` (B, C, S, S), about in [-1, 1], of classes `label` (B,).

        Args:
            sampling: steps and guidance.
            noise_scale: deviation of the noise; None for that of the resolution.
            prediction, t_eps: what the network was trained to.
        """
        scale = resolution_noise_scale(self.img_size) if noise_scale is None else noise_scale

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            return guided_velocity(self, z, t, label, self.num_classes, sampling, prediction, t_eps)

        *_, end = steps(velocity, scale * noise, sampling)
        return end


# ------------------------------------------------------------------------------------------------------------- 3. task


class Denoising(BaseModule):
    """Training and sampling.

    Batches hold `image` (B, C, S, S) in [-1, 1] and `label` (B,). They may pin the draws: `noise` (B, C, S, S) and
    `noise_t` (B,), standard normal, and `drop` (B,), uniform. No label is dropped in evaluation.

    Args:
        prediction: what the network says: "x", "eps" or "v".
        loss_space: of which of them the loss is the squared error.
        t_mean, t_std: of the logit-normal that times are drawn from (Table 3).
        t_eps: nothing is divided by less than this, in training and in sampling.
        noise_scale: deviation of the noise; null for that of the resolution, 1 up to 256 pixels, 2 at 512, 4 at 1024.
        label_dropout: share of samples that train without label.
        sampling: steps and guidance.
        optim: optimiser and schedule.
        network: of :class:`JiT`; a recipe takes `img_size` and `num_classes` from the data module.

    Raises:
        ZooError: an unknown quantity, a t_eps outside (0, 1), or no classes.
    """

    batch_keys = ("image", "label")

    # What `sample` takes instead of the task's own, so that it can be swept over.
    sampling_options = ("guidance", "interval", "steps")

    def __init__(
        self,
        prediction: Quantity = "x",
        loss_space: Quantity = "v",
        t_mean: float = -0.8,
        t_std: float = 0.8,
        t_eps: float = T_EPS,
        noise_scale: float | None = None,
        label_dropout: float = 0.1,
        sampling: Sampling = Sampling(),
        optim: Optim = Optim(base_lr=5e-5, weight_decay=0.0, schedule="constant", warmup_epochs=5),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters()
        for quantity in (prediction, loss_space):
            if quantity not in QUANTITIES:
                raise unknown("quantity", quantity, QUANTITIES)
        if not 0 < t_eps < 1:
            raise ZooError(f"t_eps must lie in (0, 1), not {t_eps}")
        self.network = JiT(**network)
        self.num_classes, self.noise_shape = self.network.num_classes, self.network.noise_shape
        if self.num_classes < 1:
            raise ZooError("a class-conditional model wants num_classes of 1 or more")
        self.prediction, self.loss_space = prediction, loss_space
        self.t_mean, self.t_std, self.t_eps = t_mean, t_std, t_eps
        self.noise_scale = resolution_noise_scale(self.network.img_size) if noise_scale is None else noise_scale
        self.label_dropout = label_dropout
        # A checkpoint holds declarations as plain mappings.
        self.sampling = Sampling(**sampling) if isinstance(sampling, Mapping) else sampling

    def trainable(self) -> nn.Module:
        return self.network

    def drawn(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B, C, S, S), times (B,) and labels (B,) that a batch is trained with."""
        x, labels = batch["image"], batch["label"]
        noise = self.draws(batch, "noise", *x.shape[1:], normal=True)
        t = logit_normal(self.draws(batch, "noise_t", normal=True), self.t_mean, self.t_std)
        if self.training:
            labels = drop_labels(labels, self.draws(batch, "drop") < self.label_dropout, self.num_classes)
        return (self.noise_scale * noise).to(x.dtype), t.to(x.dtype), labels

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss (B,) of a batch."""
        noise, t, labels = self.drawn(batch)
        how = (self.prediction, self.loss_space, self.t_eps)
        return denoising_loss(self.network, batch["image"], noise, t, labels, *how)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.loss(batch).mean()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.tally("val/loss", self.loss(batch))

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.tally("test/loss", self.loss(batch))

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        label: Tensor | None = None,
        guidance: float | None = None,
        interval: tuple[float, float] | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Pictures (B, C, S, S), about in [-1, 1], of standard normal noise, likewise, and labels (B,).

        Args:
            guidance, interval, steps: in place of those of the task's :class:`Sampling`.
        """
        if label is None:
            raise ZooError("samples of a class-conditional model want labels")
        asked: dict[str, Any] = {"guidance": guidance, "interval": interval, "steps": steps}
        sampling = replace(self.sampling, **{name: value for name, value in asked.items() if value is not None})
        how = (sampling, self.noise_scale, self.prediction, self.t_eps)
        return self.network.sample(noise.to(self.dtype), label, *how)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """A generated picture (B, 3, H, W), uint8, of each sample's class, from noise that its index decides."""
        pictures = draw_samples(self, batch["index"].tolist(), batch["image"].device, label=batch["label"])
        return {"picture": to_uint8(pictures, "round"), "index": batch["index"]}


# ----------------------------------------------------------------------------------------------------------- 4. models

_B: dict[str, Any] = {**SIZES["B"], "bottleneck": 128, "context_start": 4}
_L: dict[str, Any] = {**SIZES["L"], "bottleneck": 128, "context_start": 8}
_H: dict[str, Any] = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "bottleneck": 256, "context_start": 10}
_G: dict[str, Any] = {"depth": 40, "embed_dim": 1664, "num_heads": 16, "bottleneck": 256, "context_start": 10}
_DROP: dict[str, Any] = {"proj_drop": 0.2}


def jit_b4(**overrides: Any) -> JiT:
    """JiT-B/4 at 64 pixels (Table 2b)."""
    return JiT(**{**_B, "img_size": 64, "patch_size": 4, **overrides})


def jit_b16(**overrides: Any) -> JiT:
    """JiT-B/16 at 256 pixels."""
    return JiT(**{**_B, "img_size": 256, "patch_size": 16, **overrides})


def jit_b32(**overrides: Any) -> JiT:
    """JiT-B/32 at 512 pixels."""
    return JiT(**{**_B, "img_size": 512, "patch_size": 32, **overrides})


def jit_b64(**overrides: Any) -> JiT:
    """JiT-B/64 at 1024 pixels (Table 5)."""
    return JiT(**{**_B, "img_size": 1024, "patch_size": 64, **overrides})


def jit_l16(**overrides: Any) -> JiT:
    """JiT-L/16 at 256 pixels."""
    return JiT(**{**_L, "img_size": 256, "patch_size": 16, **overrides})


def jit_l32(**overrides: Any) -> JiT:
    """JiT-L/32 at 512 pixels."""
    return JiT(**{**_L, "img_size": 512, "patch_size": 32, **overrides})


def jit_h16(**overrides: Any) -> JiT:
    """JiT-H/16 at 256 pixels, with dropout."""
    return JiT(**{**_H, **_DROP, "img_size": 256, "patch_size": 16, **overrides})


def jit_h32(**overrides: Any) -> JiT:
    """JiT-H/32 at 512 pixels, with dropout."""
    return JiT(**{**_H, **_DROP, "img_size": 512, "patch_size": 32, **overrides})


def jit_g16(**overrides: Any) -> JiT:
    """JiT-G/16 at 256 pixels, with dropout; no weights are published."""
    return JiT(**{**_G, **_DROP, "img_size": 256, "patch_size": 16, **overrides})


def jit_g32(**overrides: Any) -> JiT:
    """JiT-G/32 at 512 pixels, with dropout; no weights are published."""
    return JiT(**{**_G, **_DROP, "img_size": 512, "patch_size": 32, **overrides})


# ------------------------------------------------------------------------------------------------- 5. official weights

_AFFINE = r"\.(?:weight|bias)"
_OFFICIAL = re.compile(
    rf"pos_embed|in_context_posemb|t_embedder\.mlp\.[02]{_AFFINE}|y_embedder\.embedding_table\.weight"
    rf"|x_embedder\.(?:proj1\.weight|proj2{_AFFINE})"
    rf"|blocks\.\d+\.(?:norm[12]\.weight|attn\.[qk]_norm\.weight|(?:attn\.(?:qkv|proj)|mlp\.w12|mlp\.w3){_AFFINE})"
    rf"|(?:blocks\.\d+|final_layer)\.adaLN_modulation\.1{_AFFINE}|final_layer\.(?:norm_final\.weight|linear{_AFFINE})"
)


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in the names of :class:`JiT`: the official ones without ``net.``.

    Raises:
        ZooError: a key of another layout.
    """
    converted = {key.removeprefix("net."): value for key, value in state_dict.items()}
    if foreign := [key for key in converted if not _OFFICIAL.fullmatch(key)]:
        raise ZooError(f"not a checkpoint of JiT: {len(foreign)} unknown keys, such as {foreign[0]!r}")
    return converted
