"""The plain Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): blocks, patch embedding, classifier.

Parameter names are those of timm and of the official MAE, MoCo v3 and DeiT releases. LayerNorm eps 1e-6, qkv with
bias, exact GELU (JAX's releases have the tanh approximation).
"""

# The annotations are evaluated here: TorchScript reads those of traced networks.
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.fx
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.utils.checkpoint import checkpoint

from zoo.errors import ZooError
from zoo.nn.protocol import intermediate_indices
from zoo.ops.attention import attention

NORM_EPS = 1e-6
torch.fx.wrap("attention")  # a tracer leaves the choice of the path to the call


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ZooError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Tokens (B, N, D) to (B, N, D); with `last`, only the outputs (B, last, D) of the last tokens."""
        batch, length, dim = x.shape
        heads = self.num_heads
        width = dim // heads
        if last is None:
            q, k, v = self.qkv(x).reshape(batch, length, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            weights, biases = self.qkv.weight.split([dim, 2 * dim]), self.qkv.bias.split([dim, 2 * dim])
            q = linear(x[:, -last:], weights[0], biases[0]).reshape(batch, last, heads, width).transpose(1, 2)
            both = linear(x, weights[1], biases[1]).reshape(batch, length, 2, heads, width)
            k, v = both.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)), each with stochastic depth.

    `gelu` is the form of the activation: the exact one, or its "tanh" approximation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        gelu: Literal["exact", "tanh"] = "exact",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        activation: Any = nn.GELU if gelu == "exact" else partial(nn.GELU, approximate=gelu)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=activation)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Tokens (B, N, D) to (B, N, D), or to (B, last, D) where only the `last` tokens are wanted."""
        kept = x if last is None else x[:, -last:]
        x = kept + self.drop_path(self.attn(self.norm1(x), last))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def run_blocks(blocks: nn.ModuleList, x: Tensor, grad_checkpointing: bool = False, last: int | None = None) -> Tensor:
    """Tokens through `blocks`; `last` holds for the final block. With checkpointing, activations are recomputed."""
    for index, block in enumerate(blocks):
        wanted = last if index == len(blocks) - 1 else None
        if grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, wanted, use_reentrant=False)
        else:
            x = block(x, wanted)
    return x


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping patches: a convolution whose stride is its kernel."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        if img_size % patch_size:
            raise ZooError(f"img_size {img_size} is no multiple of patch_size {patch_size}")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.grid = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def check(self, images: Tensor) -> None:
        """Raises ZooError unless images are (B, in_chans, img_size, img_size)."""
        if isinstance(images, torch.fx.Proxy):  # a trace is of any images
            return
        wanted = (self.in_chans, self.img_size, self.img_size)
        if tuple(images.shape[1:]) != wanted:
            raise ZooError(
                f"the model takes images of shape {wanted} (channels, height, width), not {tuple(images.shape[1:])};"
                " set img_size and in_chans, or resize"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, L, D)."""
        if not torch.jit.is_scripting():
            self.check(images)
        return self.proj(images).flatten(2).transpose(1, 2)

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Patches (B, K, p*p*C) as :func:`zoo.ops.patches.patchify` cuts them, to tokens (B, K, D).

        The same numbers as the convolution, for only those patches that are wanted.
        """
        return linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class SpaceTimePatchEmbed(nn.Module):
    """Linear embedding of non-overlapping space-time patches: a convolution whose stride is its kernel,
    (`tubelet_size`, `patch_size`, `patch_size`). `grid` is (moments, rows, columns)."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, num_frames: int, tubelet_size: int = 2
    ) -> None:
        super().__init__()
        if img_size % patch_size or num_frames % tubelet_size:
            raise ZooError(
                f"img_size {img_size} must be a multiple of patch_size {patch_size}, and num_frames {num_frames} of"
                f" tubelet_size {tubelet_size}"
            )
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        side = img_size // patch_size
        self.grid = (num_frames // tubelet_size, side, side)
        self.num_patches = self.grid[0] * side * side
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, stride=kernel)

    def check(self, videos: Tensor) -> None:
        """Raises ZooError unless videos are (B, in_chans, num_frames, img_size, img_size)."""
        wanted = (self.in_chans, self.num_frames, self.img_size, self.img_size)
        if tuple(videos.shape[1:]) != wanted:
            raise ZooError(
                f"the model takes clips of shape {wanted} (channels, frames, height, width), not"
                f" {tuple(videos.shape[1:])}; set num_frames, img_size and in_chans, or resize"
            )

    def forward(self, videos: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) to tokens (B, L, D)."""
        self.check(videos)
        return self.proj(videos).flatten(2).transpose(1, 2)

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Patches (B, K, u*p*p*C) as :func:`zoo.ops.patches.patchify_video` cuts them, to tokens (B, K, D)."""
        return linear(patches, self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """A ViT classifier with timm's protocol.

    Args:
        img_size: side of the square images, in pixels.
        num_classes: 0 for no head (logits are the pooled features).
        global_pool: "avg" takes the mean of the patch tokens through `fc_norm` (MAE's fine-tuning), "token" the class
            token after `norm`, "" all tokens after `norm`.
        drop_rate: dropout of the features before the head.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        grad_checkpointing: recompute activations in the backward pass.
        class_token: without it, tokens are those of the patches alone.
        gelu: the exact activation, or its "tanh" approximation.
    """

    __constants__ = (
        "norms_pooled",
        "norms_tokens",
        "num_prefix_tokens",
    )  # for TorchScript, which leaves out what is not there

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        global_pool: Literal["avg", "token", ""] = "avg",
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
        drop_rate: float = 0.0,
        class_token: bool = True,
        gelu: Literal["exact", "tanh"] = "exact",
    ) -> None:
        super().__init__()
        if global_pool == "token" and not class_token:
            raise ZooError("global_pool 'token' wants a class token; 'avg' does without")
        self.num_prefix_tokens = int(class_token)
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.grad_checkpointing, self.drop_rate = grad_checkpointing, drop_rate
        # Registered in the order of the official models, by which optimisers group parameters.
        token: Any = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.cls_token = token
        length = (img_size // patch_size) ** 2 + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dim))
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate, gelu) for rate in rates)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.norms_pooled = global_pool == "avg"
        self.norms_tokens = not self.norms_pooled
        if self.norms_tokens:
            self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.reset_classifier(num_classes, global_pool)
        if self.norms_pooled:
            self.fc_norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.apply(_init_linear)
        for token in (self.cls_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    @property
    def num_layer_ids(self) -> int:
        """Layers for layer-wise learning rates: embedding, blocks, head."""
        return len(self.blocks) + 2

    @torch.jit.ignore
    def layer_id(self, name: str) -> int:
        """The layer of parameter `name`: 0 for tokens, positions and patches, block i is i + 1, the rest the top."""
        if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.num_layer_ids - 1

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by layer for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one for `num_classes` classes (0: none), and the pooling if given; the norms stay
        as the network was built."""
        if global_pool is not None:
            if global_pool not in ("avg", "token", ""):
                raise ZooError(f"global_pool must be 'avg', 'token' or '', not {global_pool!r}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head: nn.Module = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.apply(_init_linear)

    def _embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.pos_embed

    @torch.jit.unused
    def _recomputed(self, x: Tensor) -> Tensor:
        return run_blocks(self.blocks, x, True)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, 1 + L, D), class token first; normalised but where "avg" is pooled."""
        x = self._embed(images)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = self._recomputed(x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.norm(x) if self.norms_tokens else x

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1 + L, D) to logits (B, num_classes), or to the pooled features (B, D) with `pre_logits`; without
        pooling both are of every token."""
        x = tokens
        if self.global_pool == "avg":
            x = tokens[:, self.num_prefix_tokens :].mean(dim=1)
        elif self.global_pool == "token":
            x = tokens[:, 0]
        if self.norms_pooled:
            x = self.fc_norm(x)
        if self.drop_rate > 0.0:
            x = dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of the blocks, as timm gives them, and the final tokens as of :meth:`forward_features`.

        Args:
            x: images (B, C, H, W).
            indices: of which blocks; the last n for a number, all for None.
            return_prefix_tokens: pairs of the patches' output and the class token's (B, 1, D).
            norm: through the final norm, where the network has one.
            stop_early: compute no more than is asked for.
            output_fmt: "NCHW": (B, D, h, w); "NLC": (B, L, D).
            intermediates_only: the outputs alone, without the final tokens before them.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ZooError(f"output_fmt must be 'NCHW' or 'NLC', not {output_fmt!r}")
        wanted = intermediate_indices(indices, len(self.blocks), "blocks")
        found: list[Any] = []
        x = self._embed(x)
        for i, block in enumerate(self.blocks[: max(wanted) + 1] if stop_early else self.blocks):
            x = run_blocks(nn.ModuleList([block]), x, self.grad_checkpointing)
            if i in wanted:
                tokens = self.norm(x) if norm and self.norms_tokens else x
                patches = tokens[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, self.patch_embed.grid).contiguous()
                found.append((patches, tokens[:, : self.num_prefix_tokens]) if return_prefix_tokens else patches)
        return found if intermediates_only else (self.norm(x) if self.norms_tokens else x, found)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the intermediates `indices` do not need; returns them counted from the front."""
        wanted = intermediate_indices(indices, len(self.blocks), "blocks")
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm and self.norms_tokens:
            self.norms_tokens = False
            del self.norm
        if prune_head:
            if self.norms_pooled:
                self.norms_pooled = False
                del self.fc_norm
            self.reset_classifier(0, "")
        return wanted


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def init_as_linear(conv: nn.Conv2d | nn.Conv3d) -> None:
    """Xavier-uniform weights for a patch embedding, counted as the linear layer that it is."""
    fan_in, fan_out = conv.weight[0].numel(), conv.weight.shape[0]
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(conv.weight, -bound, bound)
