"""A linear map between patches and latents of a few numbers: principal components of patches, or a trained linear
autoencoder of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from zoo.errors import ZooError, unknown
from zoo.ops.patches import patchify, unpatchify
from zoo.ops.pca import Moments, PrincipalAxes

LatentNorm = Literal["global", "whiten", "none"]
Clean = Literal["projected", "image"]
NORMS: tuple[LatentNorm, ...] = ("global", "whiten", "none")


class PatchTokenizer(nn.Module):
    """z = gain * E (x - mean) of patches x, and back x' = R (z / gain) + back.

    Nothing here is trained: all is buffers, part of the state dict, zero until they are filled. `basis` holds all D
    principal axes, by falling variance; it stays zero where E and R come from a trained autoencoder.

    Args:
        patch_size, in_chans: of patches of D = patch_size^2 * in_chans numbers, in the order (row, column, channel).
        latent_dim: numbers d of a latent.
        latent_norm: "global": one gain, by which the d latents have a variance of 1 in the mean; "whiten": a gain each,
            by which each has; "none": 1.

    Raises:
        ZooError: `latent_dim` is not in 1 ... D, or an unknown norm.
    """

    basis: Tensor
    variances: Tensor
    mean: Tensor
    back: Tensor
    encoder: Tensor
    decoder: Tensor
    gain: Tensor

    def __init__(
        self, patch_size: int = 16, in_chans: int = 3, latent_dim: int = 16, latent_norm: LatentNorm = "global"
    ) -> None:
        super().__init__()
        dim = patch_size**2 * in_chans
        if not 1 <= latent_dim <= dim:
            raise ZooError(f"latent_dim of patches of {dim} numbers is 1 to {dim}, not {latent_dim}")
        if latent_norm not in NORMS:
            raise unknown("latent_norm", latent_norm, NORMS)
        self.patch_size, self.in_chans, self.latent_dim, self.latent_norm = (
            patch_size,
            in_chans,
            latent_dim,
            latent_norm,
        )
        shapes: dict[str, tuple[int, ...]] = {
            "basis": (dim, dim), "variances": (dim,), "mean": (dim,), "back": (dim,),
            "encoder": (latent_dim, dim), "decoder": (dim, latent_dim), "gain": (latent_dim,),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def fitted(self) -> bool:
        """Whether the buffers are filled."""
        return bool(self.gain.any())

    def take_axes(self, axes: PrincipalAxes) -> None:
        """Makes the latents the first d principal components.

        Raises:
            ZooError: the axes are of patches of another size.
        """
        if axes.mean.shape != self.mean.shape:
            raise ZooError(
                f"the principal axes are of patches of {len(axes.mean)} numbers, the model's have {len(self.mean)}"
            )
        first, scale = axes.basis[: self.latent_dim], axes.variances.max() + axes.mean.square().max()
        self._take(encoder=first, decoder=first.T, mean=axes.mean, back=axes.mean, basis=axes.basis)
        self._take(variances=axes.variances, gain=self._gain(axes.variances[: self.latent_dim], scale))

    def take_linear(self, encoder: Tensor, decoder: Tensor, moments: Moments) -> None:
        """Makes the latents E x, centred, of a trained E (d, D), and x' = R E x with a trained R (D, d); `moments` of
        patches say mean and variance of the latents.

        Raises:
            ZooError: they are of another size.
        """
        if encoder.shape != self.encoder.shape or decoder.shape != self.decoder.shape:
            raise ZooError(
                f"the tokenizer maps {tuple(encoder.shape)[::-1]}, the model wants {self.encoder.shape[::-1]}"
            )
        mean, covariance = moments.covariance()
        wide = encoder.to(covariance)
        self._take(encoder=encoder, decoder=decoder, mean=mean, back=decoder.to(covariance) @ (wide @ mean))
        variances = (wide @ covariance @ wide.T).diagonal()
        self._take(gain=self._gain(variances, variances.max() + (wide @ mean).square().max()))

    def _gain(self, variances: Tensor, scale: Tensor) -> Tensor:
        if self.latent_norm == "none":
            return torch.ones_like(variances)
        variances = variances if self.latent_norm == "whiten" else variances.mean().expand_as(variances)
        # What is left of no variance after rounding is not one; the mean says how large the sums were.
        if not bool((variances > 1e-12 * scale).all()):
            raise ZooError(
                "latents without variance cannot be normalised: fewer of them (latent_dim), or other pictures"
            )
        return variances.rsqrt()

    @torch.no_grad()
    def _take(self, **values: Tensor) -> None:
        for name, value in values.items():
            getattr(self, name).copy_(value)

    def _exact(self) -> AbstractContextManager[Any]:
        """Noise and targets are no matter of half precision."""
        kind = self.gain.device.type
        return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()

    def encode(self, patches: Tensor) -> Tensor:
        """Patches (B, L, D) to latents (B, L, d)."""
        with self._exact():
            return linear(patches - self.mean, self.encoder) * self.gain

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, L, d) to patches (B, L, D)."""
        with self._exact():
            return linear(latents / self.gain, self.decoder, self.back)

    def components(self, patches: Tensor) -> Tensor:
        """All D principal components (B, L, D) of differences of patches; not normalised."""
        with self._exact():
            return linear(patches, self.basis)

    def latents(self, images: Tensor) -> Tensor:
        """Pictures (B, C, S, S) to latents (B, L, d)."""
        return self.encode(patchify(images, self.patch_size))

    def pictures(self, latents: Tensor) -> Tensor:
        """Latents (B, L, d) to pictures (B, C, S, S)."""
        return unpatchify(self.decode(latents), self.patch_size)


def fold_tokenizer(
    kernel: Tensor, bias: Tensor, state: Mapping[str, Tensor], in_chans: int = 3, clean: Clean = "projected"
) -> tuple[Tensor, Tensor]:
    """Kernel (K, C, p, p) and bias (K,) of a patch embedding of pictures, out of one that stands behind a tokenizer.

    Args:
        kernel, bias: (K, d, 1, 1), of latents; or (K, C, p, p), of pictures that were projected on the latents.
        state: of the :class:`PatchTokenizer`.
        clean: of the second kind, project a picture on the latents ("projected"), or take it as it is ("image").
    """
    encoder, decoder, mean, back = (state[name] for name in ("encoder", "decoder", "mean", "back"))
    flat = kernel.permute(0, 2, 3, 1).flatten(1)
    side = math.isqrt(len(mean) // in_chans)
    if kernel.shape[-1] != side:  # gain * E (x - mean)
        flat = flat * state["gain"] @ encoder
        bias = bias - flat @ mean
    elif clean == "projected":  # R E (x - mean) + back
        bias, flat = bias + flat @ back, flat @ decoder @ encoder
        bias = bias - flat @ mean
    return flat.unflatten(1, (side, side, in_chans)).permute(0, 3, 1, 2).contiguous(), bias
