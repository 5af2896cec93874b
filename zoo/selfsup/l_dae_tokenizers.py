"""The tokenizers that l-DAE's walk takes apart (arXiv 2401.14404, sections 4.1 and 4.2), trained.

From the autoencoder of latent diffusion (reconstruction, KL, perceptual and adversarial loss), whose perceptual and
then adversarial loss are left out, by way of a variational one that is linear and sees single patches, to a plain
linear autoencoder of patches. What comes after it, principal components, takes no training.

Losses are sums over the numbers of a picture, or of a patch, and means over them. The adversarial part follows
VQGAN (Esser et al. 2021, arXiv 2012.09841): hinge loss, a discriminator of patches, a weight by the ratio of gradients
at the last layer. One optimiser moves both sides in one step, where VQGAN's two take turns on the same batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu

from zoo.errors import ZooError
from zoo.nn.autoencoder import Autoencoder, AutoencoderKL
from zoo.nn.perceptual import FrozenNetwork, load_lpips
from zoo.ops.patches import patchify, unpatchify
from zoo.ops.sheet import titled_sheet
from zoo.training import BaseModule, Optim

__all__ = [
    "ConvTokenizerTraining",
    "PatchAutoencoder",
    "PatchDiscriminator",
    "PatchTokenizerTraining",
    "kl_to_normal",
]


def kl_to_normal(mean: Tensor, std: Tensor) -> Tensor:
    """KL of Gaussians to the unit one, summed over all but the first axis: (B, ...) to (B,)."""
    variance = std.square()
    return 0.5 * (mean.square() + variance - 1 - variance.clamp(min=1e-20).log()).flatten(1).sum(1)


class PatchAutoencoder(Autoencoder):
    """x' = U^T V x of each patch x of D numbers: V (d, D) and U^T (D, d), without bias (section 4.2).

    Args:
        patch_size, in_chans: of the patches.
        latent_dim: d.
        variational: V gives means and log variances.
    """

    def __init__(
        self, patch_size: int = 16, in_chans: int = 3, latent_dim: int = 16, variational: bool = False
    ) -> None:
        super().__init__()
        dim = patch_size**2 * in_chans
        self.channels, self.factor, self.variational = latent_dim, patch_size, variational
        self.patch_encoder = nn.Linear(dim, latent_dim * (2 if variational else 1), bias=False)
        self.patch_decoder = nn.Linear(latent_dim, dim, bias=False)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (B, d, S/p, S/p) of pictures (B, C, S, S); without `variational` the latter is 0."""
        out = unpatchify(self.patch_encoder(patchify(images, self.factor)), 1)
        if not self.variational:
            return out, torch.zeros_like(out)
        mean, log_variance = out.chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()

    def decode(self, latents: Tensor) -> Tensor:
        return unpatchify(self.patch_decoder(latents.flatten(2).transpose(1, 2)), self.factor)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures as they come back from the mean of their latents."""
        return self.decode(self.latents(images))


class PatchDiscriminator(nn.Sequential):
    """PatchGAN: pictures (B, C, H, W) to a map (B, 1, h, w) of how real each part looks (Isola et al. 2017).

    Args:
        width: channels of the first of `depth` layers of stride 2.
    """

    def __init__(self, in_chans: int = 3, width: int = 64, depth: int = 3) -> None:
        layers: list[nn.Module] = [nn.Conv2d(in_chans, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for n in range(1, depth + 1):
            before, after = width * min(2 ** (n - 1), 8), width * min(2**n, 8)
            stride = 2 if n < depth else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(width * min(2**depth, 8), 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)


class _TokenizerTraining(BaseModule):
    """What both kinds share: reconstruction and KL, and their evaluation.

    Batches hold `image` (B, C, S, S), and may pin `noise` like the latents.
    """

    batch_keys = ("image",)
    network: Any

    def __init__(self, network: Autoencoder, kl_weight: float, optim: Optim) -> None:
        super().__init__(optim)
        self.network, self.kl_weight = network, kl_weight

    def _through(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures as they come back from drawn latents, and the latents' mean and deviation."""
        mean, std = self.network.encode(batch["image"])
        noise = self.draws(batch, "noise", *mean.shape[1:], normal=True).to(mean)
        return self.network.decode((mean + std * noise) * self.network.scale), mean, std

    def _kl(self, mean: Tensor, std: Tensor) -> Tensor:
        """Of each sample (B,)."""
        return kl_to_normal(mean, std) if self.kl_weight else mean.new_zeros(len(mean))

    def _evaluate(self, batch: Mapping[str, Any], split: str) -> None:
        back, mean, std = self._through(batch)
        self.tally(f"{split}/error", (batch["image"] - back).square().flatten(1).mean(1))
        self.tally(f"{split}/kl", self._kl(mean, std))
        self.tally(f"{split}/latent_power", (mean.square() + std.square()).flatten(1).mean(1))

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The `reconstruction` (B, C, S, S) from the mean of the latents, normalised as the data."""
        return {"reconstruction": self.network(batch["image"])}

    @torch.no_grad()
    def picture(self, batch: Mapping[str, Any]) -> Tensor:
        """A uint8 sheet (3, H, W): a row a picture; titled columns original and reconstruction."""
        images, data = batch["image"], getattr(self._trainer, "datamodule", None)
        shift, scale = (
            torch.as_tensor(getattr(data, name, (0.5,) * 3), dtype=images.dtype, device=images.device)[:, None, None]
            for name in ("mean", "std")
        )
        views = {"original": images, "reconstruction": self.network(images)}
        return titled_sheet({name: view * scale + shift for name, view in views.items()})


class PatchTokenizerTraining(_TokenizerTraining):
    """A linear autoencoder of patches: |x - U^T V x|^2, with the KL of its latents where it is variational.

    Args:
        kl_weight: of the KL; without effect where the network is not variational.
        optim: optimiser and schedule.
        network: of :class:`PatchAutoencoder`.
    """

    def __init__(
        self,
        kl_weight: float = 1.0,
        optim: Optim = Optim(base_lr=1e-4, weight_decay=0.0),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        net = PatchAutoencoder(**network)
        super().__init__(net, kl_weight if net.variational else 0.0, optim)
        self.save_hyperparameters()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        back, mean, std = self._through(batch)
        patches = mean[0, 0].numel()
        error = (batch["image"] - back).square().flatten(1).sum(1)
        return (error + self.kl_weight * self._kl(mean, std)).mean() / patches


class ConvTokenizerTraining(_TokenizerTraining):
    """The convolutional autoencoder of latent diffusion, on pictures in [-1, 1]: with the defaults a plain variational
    one, section 4.2; with the two weights that of section 4.1.

    Args:
        distance: of the reconstruction, "l2", or "l1" as latent diffusion has it.
        kl_weight: of the KL.
        perceptual_weight: of LPIPS, counted once for each number of the picture; 0 for none.
        adversarial_weight: of the adversarial loss; 0 for none.
        adversarial_start: the first step in which it counts.
        discriminator_width: of :class:`PatchDiscriminator`.
        optim: optimiser and schedule, of the discriminator too.
        network: of :class:`~zoo.nn.autoencoder.AutoencoderKL`.

    Raises:
        ZooError: a negative weight; or the weights of LPIPS cannot be had.
    """

    def __init__(
        self,
        distance: Literal["l1", "l2"] = "l2",
        kl_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 0,
        discriminator_width: int = 64,
        optim: Optim = Optim(base_lr=1e-4, weight_decay=0.0),  # noqa: B008 (frozen)
        **network: Any,
    ) -> None:
        super().__init__(AutoencoderKL(**network), kl_weight, optim)
        self.save_hyperparameters()
        if min(kl_weight, perceptual_weight, adversarial_weight) < 0:
            raise ZooError("the weights of a tokenizer's losses are 0 or more")
        self.distance, self.perceptual_weight = distance, perceptual_weight
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.perceptual = FrozenNetwork(load_lpips) if perceptual_weight else None
        self.discriminator = PatchDiscriminator(width=discriminator_width) if adversarial_weight else None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.perceptual is not None and stage == "fit":
            self.perceptual.check()

    def _adversarial(self, images: Tensor, back: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's part, weighted, and the discriminator's hinge loss."""
        assert self.discriminator is not None
        held = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooling = -functional_call(self.discriminator, held, (back,)).mean()
        last = self.network.decoder.conv_out.weight
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, fooling)]
        balance = (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
        real, fake = self.discriminator(images), self.discriminator(back.detach())
        return self.adversarial_weight * balance * fooling, 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        images = batch["image"]
        back, mean, std = self._through(batch)
        difference = images - back
        error = (difference.abs() if self.distance == "l1" else difference.square()).flatten(1).sum(1)
        if self.perceptual is not None:
            seen = self.perceptual.net(images.device)(images, back)
            error = error + self.perceptual_weight * seen * images[0].numel()
        reconstruction = error.mean()
        loss = reconstruction + self.kl_weight * self._kl(mean, std).mean()
        if self.discriminator is not None and self.global_step >= self.adversarial_start:
            fooling, judging = self._adversarial(images, back, reconstruction)
            if self._trainer is not None:
                self.log("train/discriminator", judging.detach(), on_step=True, on_epoch=False)
            loss = loss + fooling + judging
        elif self.discriminator is not None:  # its parameters take part in every step, as several processes want it
            loss = loss + 0.0 * sum(p.sum() for p in self.discriminator.parameters())
        return loss
