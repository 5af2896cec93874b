"""The feature encoder of Drifting Models (:mod:`zoo.generation.drifting`): its pre-training, and the features that
images are compared in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from zoo.errors import ZooError
from zoo.nn.autoencoder import PIXELS, FrozenAutoencoder
from zoo.nn.perceptual import ConvNeXtV2Features, FrozenNetwork, load_convnextv2
from zoo.nn.resnet_mae import FeatureSet, MAEResNet, convert_mae_resnet, sizes_of
from zoo.training import BaseModule, Optim
from zoo.weights.pretrained import fill, read_source

IMAGENET_MEAN, IMAGENET_STD, CONVNEXT_SIDE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224


class FrozenFeatures:
    """What images are compared in: the image itself ("global"), and the features of frozen networks, which are no part
    of a task's parameters, checkpoints and averages.

    Args:
        encoder: None for none; the name of published weights, a file of them, or a checkpoint of
            :class:`MAEResNetPretraining`; or the network.
        which: of the encoder.
        in_chans: channels of the images.
        convnext: the features of ConvNeXt V2 too: a file of its weights, or "published"; None for none.

    Raises:
        ZooError: ConvNeXt V2 for what are no pictures.
    """

    def __init__(
        self, encoder: str | MAEResNet | None, which: FeatureSet, in_chans: int, convnext: str | None = None
    ) -> None:
        if convnext is not None and in_chans != 3:
            raise ZooError(f"the features of ConvNeXt V2 are of pictures of 3 channels, not {in_chans}")
        self.which, self.nets = which, {}
        if encoder is not None:
            load = (lambda: load_encoder(encoder, in_chans)) if isinstance(encoder, str) else (lambda: encoder)
            self.nets["encoder"] = FrozenNetwork(load)
        if convnext is not None:
            weights = None if convnext == "published" else convnext
            self.nets["convnext"] = FrozenNetwork(lambda: load_convnextv2(weights))

    def check(self) -> None:
        """Loads the networks; a ZooError of one line where weights cannot be had."""
        for net in self.nets.values():
            net.check()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features (B, T, D) of images (B, C, S, S) by name, with their gradient."""
        found = {"global": images.flatten(1)[:, None]}
        for name, frozen in self.nets.items():
            net: Any = frozen.net(images.device).to(images.dtype)
            found |= net.features(images, self.which) if name == "encoder" else convnext_features(net, images)
        return found


def load_encoder(source: str, in_chans: int) -> MAEResNet:
    """The encoder of images of so many channels from published weights, a file, or a checkpoint of its pre-training.

    Raises:
        ZooError: nothing there, or the weights of another network.
    """
    state = convert_mae_resnet(read_source(source))
    with torch.device("meta"):
        net = MAEResNet(**sizes_of(state, in_chans))
    net.to_empty(device="cpu")
    fill(net, state, source, lambda key: True)
    return net


def convnext_features(net: ConvNeXtV2Features, images: Tensor) -> dict[str, Tensor]:
    """Features (B, T, D) of pictures (B, 3, S, S) in [-1, 1], resized to 224: the maps of ConvNeXt V2's last three
    stages, standardised over the channels at each place, mean and deviation over places of all four, and the pooled
    features with their norm."""
    mean, std = (images.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = interpolate((images + 1) / 2, (CONVNEXT_SIDE, CONVNEXT_SIDE), mode="bilinear", antialias=True)
    maps = net.maps((x - mean) / std)
    found: dict[str, Tensor] = {}
    for stage, y in enumerate(maps):
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        y = (y - y.mean(1, keepdim=True)) / (y.std(1, correction=0, keepdim=True) + 1e-3)
        of_map = FeatureSet(patch_means=(), patch_stds=()).of(f"convnext_stage_{stage}", y)
        found |= of_map if stage else {name: value for name, value in of_map.items() if value.shape[1] == 1}
    found["global_mean"] = net.pooled(maps[-1])[:, None]
    return found | {"global_std": found[f"convnext_stage_{len(maps) - 1}_std"]}


class MAEResNetPretraining(BaseModule):
    """Pre-training of the feature encoder (appendix A): masked reconstruction, and in the last steps classification.

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
