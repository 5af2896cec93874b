"""The feature encoder of Drifting Models (:mod:`zoo.generation.drifting`): its pre-training, and the features that
images are compared in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.autoencoder import PIXELS, FrozenAutoencoder
from zoo.nn.resnet_mae import FeatureSet, MAEResNet, convert_mae_resnet, sizes_of
from zoo.training import BaseModule, Optim
from zoo.weights.pretrained import read_source


class FrozenFeatures:
    """What images are compared in: the image itself ("global"), and the features of a frozen encoder. It is no part of
    a task's parameters, checkpoints and averages.

    Args:
        encoder: None for none; the name of published weights, a file of them, or a checkpoint of
            :class:`MAEResNetPretraining`, loaded at first use; or the network.
        which: of the encoder.
        in_chans: channels of the images.
    """

    def __init__(self, encoder: str | MAEResNet | None, which: FeatureSet, in_chans: int) -> None:
        self.encoder, self.which, self.in_chans = encoder, which, in_chans

    def net(self, x: Tensor) -> MAEResNet:
        """The encoder, on the device and in the precision of `x`."""
        if isinstance(self.encoder, str):
            state = convert_mae_resnet(read_source(self.encoder))
            found = MAEResNet(**sizes_of(state, self.in_chans))
            found.load_state_dict(state)
            self.encoder = found
        assert self.encoder is not None
        return self.encoder.to(x.device, x.dtype).requires_grad_(False).eval()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features (B, T, D) of images (B, C, S, S) by name, with their gradient."""
        found = {"global": images.flatten(1)[:, None]}
        if self.encoder is None:
            return found
        return found | self.net(images).features(images, self.which)


class MAEResNetPretraining(BaseModule):
    """Pre-training of the feature encoder (appendix A.3): masked reconstruction, and in the last steps classification.

    Batches hold `image` (B, C, S, S) and `label` (B,). They may pin, uniform in [0, 1), `mask_noise` (B, h, w), a
    number for each square that is hidden or not, and `mask_ratio` (B,), and standard normal `latent_noise`.

    Args:
        mask_ratio: range of the share of squares that are hidden.
        cls_steps: in so many last steps the classifier is trained too.
        cls_warmup: of these, steps in which its weight rises from 0.
        cls_weight: that weight; the reconstruction has the rest.
        autoencoder: weights of the autoencoder whose latents of the pictures are encoded; "pixels" for images as they
            come.
        optim: optimiser and schedule.
        network: of :class:`~zoo.nn.resnet_mae.MAEResNet`; a recipe takes `num_classes` from the data module.
    """

    batch_keys = ("image", "label")

    def __init__(
        self,
        mask_ratio: tuple[float, float] = (0.5, 0.5),
        cls_steps: int = 0,
        cls_warmup: int = 1000,
        cls_weight: float = 0.1,
        autoencoder: str = PIXELS,
        optim: Optim = Optim(lr=4e-3, weight_decay=0.01, no_decay="none", schedule="constant"),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters()
        if not 0 < mask_ratio[0] <= mask_ratio[1] <= 1 or not 0 <= cls_weight <= 1:
            raise ZooError(
                f"mask_ratio must rise in (0, 1] and cls_weight lie in [0, 1]; got {mask_ratio}, {cls_weight}"
            )
        self.network = MAEResNet(**network)
        self.mask_ratio = tuple(mask_ratio)
        self.cls_steps, self.cls_warmup, self.cls_weight = cls_steps, cls_warmup, cls_weight
        self.autoencoder = FrozenAutoencoder(autoencoder)

    def trainable(self) -> nn.Module:
        return self.network

    def _weight(self) -> float:
        """That of the classifier in this step."""
        begun = self.global_step - (self.trainer.estimated_stepping_batches - self.cls_steps)
        return self.cls_weight * min(1.0, begun / max(1, self.cls_warmup)) if self.cls_steps and begun >= 0 else 0.0

    def inputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Images or latents, mask noise and ratio of a batch."""
        x = batch["image"]
        if self.autoencoder.source != PIXELS:
            mean, std = self.autoencoder.encode(x)
            x = (mean + std * self.draws(batch, "latent_noise", *mean.shape[1:], normal=True)) * self.autoencoder.net(
                x.device
            ).scale
        side = self.network.input_patch * self.network.mask_patch
        noise = self.draws(batch, "mask_noise", x.shape[2] // side, x.shape[3] // side)
        low, high = self.mask_ratio
        return x, noise, low + (high - low) * self.draws(batch, "mask_ratio")

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        x, noise, ratio = self.inputs(batch)
        out, _ = self.network.loss(x, batch["label"], noise, ratio, self._weight())
        return {"loss": out.loss.mean(), "reconstruction": out.reconstruction.detach().mean()}

    def _evaluate(self, stage: str, batch: Mapping[str, Any]) -> None:
        x, noise, ratio = self.inputs(batch)
        out, _ = self.network.loss(x, batch["label"], noise, ratio)
        self.tally(f"{stage}/reconstruction", out.reconstruction)
        self.tally(f"{stage}/top1", self.network(x).argmax(1) == batch["label"])

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The `masked` images and their `reconstruction`, visible places pasted in, as the network sees them."""
        masked, pasted = self.network.reconstruct(*self.inputs(batch))
        return {"masked": masked, "reconstruction": pasted}

    def features(self, images: Tensor) -> Tensor:
        """Frozen features (B, 8 width) of images or latents, for probes."""
        return self.network.pooled(images)


def mae_resnet_256(**overrides: Any) -> MAEResNet:
    """The encoder of width 256 for latents."""
    return MAEResNet(**{"width": 256, **overrides})


def mae_resnet_640(**overrides: Any) -> MAEResNet:
    """The encoder of width 640 for latents."""
    return MAEResNet(**{"width": 640, **overrides})


def mae_resnet_640_pixel(**overrides: Any) -> MAEResNet:
    """The encoder of width 640 for pictures of 256 pixels, in patches of 8."""
    return MAEResNet(**{"width": 640, "in_chans": 3, "input_patch": 8, **overrides})
